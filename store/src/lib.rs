//! The local store.

pub mod foreign;
pub mod sqlite;
