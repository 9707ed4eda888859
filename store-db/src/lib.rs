//! The ledger of the store: path infos, references, derivers and realisations in redb tables.
//!
//! Nothing else opens the file. [`StoreDb`] is the way in: [`StoreDb::read`] and
//! [`StoreDb::write`] take closures, so that transactions are short; many processes may read and
//! write at once. Paths are given without a store directory, so messages that name a path name
//! its base name; a caller that knows the directory says the full path.
//! The form of the file is told in `docs/db-format.md`.

pub mod batch;
pub mod check;
mod codec;
mod damage;
pub mod error;
pub mod graph;
mod kept;
mod key_index;
pub mod open;
pub mod query;
mod read_ahead;
pub mod record;
mod regions;
mod tables;
pub mod txn;

pub use batch::{Batch, NewPath};
pub use error::DbError;
pub use graph::{Graph, Node, Walk};
pub use open::{Mode, OpenOptions, StoreDb};
pub use query::ReadTxn;
pub use record::{PathRef, RecordView, ReferencesView};
pub use txn::WriteTxn;

#[cfg(test)]
mod tests;
