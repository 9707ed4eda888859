//! The ledger of the store: path infos, references, derivers and realisations in redb tables.
