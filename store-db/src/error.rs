//! What can go wrong with the ledger.

use std::fmt::Write as _;
use std::io;
use std::path::PathBuf;

use larder_core::store_path::StorePath;

use crate::record::RecordError;

/// An error of the ledger. Paths are named by their base names, as the store directory is not
/// known here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DbError {
    #[error("there is no database '{}'", path.display())]
    Missing { path: PathBuf },
    #[error("no permission to {action} database '{}'", path.display())]
    Permission { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {action} '{}'", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("current Nix store schema is version {found}, but I only support {supported}")]
    SchemaTooNew { found: u32, supported: u32 },
    #[error(
        "current Nix store schema is version {found}, and only a user who may write to it can upgrade it to {supported}"
    )]
    SchemaTooOld { found: u32, supported: u32 },
    #[error("database '{}' was left by a crash and only a user who may write to it can recover it", path.display())]
    NeedsRecovery { path: PathBuf },
    #[error("database '{}' is in use by a program that locks it in another way", path.display())]
    OtherProtocol { path: PathBuf, source: redb::DatabaseError },
    /// The file is no database of ours, or a part of it cannot be what we wrote.
    #[error("database '{}' is corrupt", path.display())]
    Corrupt { path: PathBuf, source: redb::DatabaseError },
    /// What is in a file of ours makes no sense.
    #[error("database '{}' is damaged", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        detail: Nonsense,
    },
    /// Reading or writing the file failed in the middle of things (for instance on a full disk).
    #[error("cannot use the database")]
    Storage {
        #[from]
        source: redb::Error,
    },
    /// The database was opened read-only by the caller's own wish.
    #[error("database '{}' is opened for reading only", path.display())]
    ReadOnly { path: PathBuf },
    #[error("record of path '{path}' in the database is corrupt")]
    Record { path: String, source: RecordError },
    /// The tables contradict each other; `check` tells more.
    #[error("the database is inconsistent: {detail}")]
    Inconsistent { detail: String },
    #[error("path '{path}' is not valid")]
    NotValid { path: StorePath },
    #[error("cycle detected in the references of '{path}' from '{from}'")]
    Cycle { path: StorePath, from: StorePath },
    #[error("cannot delete path '{path}' because it is in use by {}", quoted(by))]
    InUse { path: StorePath, by: Vec<StorePath> },
    /// Two paths with one hash part cannot be told apart, so the second is refused.
    #[error("path '{path}' has the hash part of the valid path '{other}'")]
    HashPartTaken { path: StorePath, other: StorePath },
    #[error("the registration holds more than {limit} paths or references")]
    TooLarge { limit: u32 },
}

/// What makes no sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Nonsense(pub String);

fn quoted(paths: &[StorePath]) -> String {
    let mut text = String::new();
    for path in paths {
        let comma = if text.is_empty() { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(text, "{comma}'{path}'");
    }
    text
}

/// The errors of redb's single steps, all of which stand in `redb::Error`.
macro_rules! from_redb {
    ($($kind:ty),*) => {$(
        impl From<$kind> for DbError {
            fn from(error: $kind) -> Self {
                Self::Storage { source: error.into() }
            }
        }
    )*};
}
from_redb!(redb::StorageError, redb::TableError, redb::TransactionError, redb::CommitError);

impl From<redb::CursorError> for DbError {
    fn from(error: redb::CursorError) -> Self {
        match error {
            redb::CursorError::Storage(source) => source.into(),
            other => Self::Inconsistent { detail: other.to_string() },
        }
    }
}
