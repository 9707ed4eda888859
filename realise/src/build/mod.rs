//! One local build, from the locks to the ledger.
pub mod attrs;
pub mod environment;
