//! What can go wrong with the local store.

use std::io;
use std::path::PathBuf;

use larder_core::derivation::aterm::DerivationError;
use larder_core::derivation::check::CheckError;
use larder_core::derivation::modulo::ModuloError;
use larder_core::export::ExportError;
use larder_core::hash::Sha256Digest;
use larder_core::registration::RegistrationError;
use larder_core::store_dir::{MakePathError, StoreDir};
use larder_core::store_path::{NameError, StorePath};
use larder_fs::canon::CanonError;
use larder_fs::dump::DumpError;
use larder_fs::file_error::FileError;
use larder_fs::layout::LayoutError;
use larder_fs::restore::RestoreError;
use larder_store_db::DbError;

use crate::foreign::ForeignError;

/// An error of the local store. Paths are full, so that the text can be shown as it is; the
/// reason beneath is the source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("path '{path}' is not valid")]
    NotValid { path: String },
    #[error("cycle detected in the references of '{path}' from '{from}'")]
    Cycle { path: String, from: String },
    #[error("cannot delete path '{path}' because it is in use by {by}")]
    InUse { path: String, by: String },
    #[error(
        "Cannot delete path '{path}' since it is still alive. To find out why, use: \
         nix-store --query --roots and nix-store --query --referrers"
    )]
    StillAlive { path: String },
    #[error(
        "real Nix has registered {count} paths in '{}' that Larder does not know, such as '{example}'; \
         nothing may be deleted until 'larder adopt' has taken them over",
        ledger.display()
    )]
    NotAdopted { ledger: PathBuf, count: u64, example: String },
    #[error("cannot tell whether real Nix has paths in '{}' that Larder does not know, so nothing may be deleted", ledger.display())]
    MayNotBeAdopted { ledger: PathBuf, source: ForeignError },
    #[error(
        "cannot replace '{path}', which real Nix has registered and which has other contents; \
         'larder adopt' takes its registrations over"
    )]
    BelongsToRealNix { path: String },
    #[error("cannot take over the registrations of real Nix")]
    Adopt(#[from] ForeignError),
    #[error("the state folder '{}' has no ledger of real Nix", state.display())]
    NothingToAdopt { state: PathBuf },
    #[error("hash of path '{path}' has changed from '{expected}' to '{found}'!")]
    Changed { path: String, expected: Sha256Digest, found: Sha256Digest },
    #[error("cannot find out who else needs the paths, so nothing may be deleted")]
    Roots(#[source] Box<larder_gc::roots::RootsError<Box<StoreError>>>),
    #[error("roots may be hidden from us, so nothing may be deleted")]
    HiddenRoots(#[source] FileError),
    #[error("cannot read the database '{}'; should it be broken, 'larder db rebuild' makes a new one", path.display())]
    Ledger { path: PathBuf, source: DbError },
    /// Some files could not be linked; each was told of, and the others are linked.
    #[error("{count} files could not be linked")]
    NotLinked { count: u64, saved: larder_fs::optimise::Saved },
    /// Part of what was to go is still there; each was told of.
    #[error("{count} entries of the store could not be deleted")]
    Undeletable { count: u64 },
    #[error(transparent)]
    Db(DbError),
    #[error(transparent)]
    AddRoot(#[from] larder_gc::add_root::AddRootError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Canon(#[from] CanonError),
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Registration(#[from] RegistrationError),
    #[error("derivation '{path}' cannot be read")]
    Derivation { path: String, source: DerivationError },
    /// A derivation that says of itself what is not so.
    #[error(transparent)]
    DerivationCheck(#[from] Box<CheckError<ModuloError<Box<StoreError>>>>),
    #[error("derivation '{path}' is too large: it has {size_bytes} bytes")]
    LargeDerivation { path: String, size_bytes: u64 },
    #[error("'{name}' cannot be the name of a store object")]
    Name { name: String, source: NameError },
    #[error(transparent)]
    MakePath(#[from] MakePathError),
    /// Bytes that go elsewhere (standard output, a connection) could not be written.
    #[error("writing to file")]
    Output(#[source] io::Error),
    #[error("reading from file")]
    Input(#[source] io::Error),
    #[error("'{path}' is not a regular file, so it has no flat hash")]
    NotRegular { path: PathBuf },
    #[error("the store was opened for reading only")]
    ReadOnly,
    /// Something that went in together with it was refused, or the disk failed.
    #[error("{reason}")]
    NotRegistered { reason: String },
    #[error("hash mismatch importing path '{path}';\n  specified: sha256:{}\n  got:       sha256:{}", expected.to_base32(), found.to_base32())]
    ImportHash { path: String, expected: Sha256Digest, found: Sha256Digest },
    #[error("size mismatch importing path '{path}';\n  specified: {expected}\n  got:       {found}")]
    ImportSize { path: String, expected: u64, found: u64 },
    #[error("ca hash mismatch importing path '{path}': the contents are not what '{address}' says")]
    ImportAddress { path: String, address: larder_core::content_address::ContentAddress },
    #[error("cannot add path '{path}' because it lacks a signature by a trusted key")]
    Unsigned { path: String },
    #[error("the archive of '{name}' is followed by bytes that do not belong to it")]
    TrailingBytes { name: String },
    #[error("cannot add '{name}': objects addressed by the hash of a git tree are not supported")]
    GitAddress { name: String },
    #[error("cannot replace '{path}', whose contents have changed: this version of Larder does not do that yet")]
    CannotReplace { path: String },
    #[error(transparent)]
    Nar(#[from] larder_core::nar::NarError),
    #[error(transparent)]
    Modulo(#[from] Box<ModuloError<Box<StoreError>>>),
    /// What the caller of a stream had to say.
    #[error(transparent)]
    Api(#[from] larder_core::api::StoreError),
    #[error(transparent)]
    Realisation(#[from] larder_core::realisation::RealisationError),
    #[error(
        "Trying to register a realisation of '{id}', but we already have another one locally.\n\
         Local:  {local}\nRemote: {remote}"
    )]
    RealisedOtherwise { id: String, local: String, remote: String },
    /// The reporter said that the user wants to stop.
    #[error("interrupted by the user")]
    Interrupted,
}

impl From<DbError> for StoreError {
    fn from(error: DbError) -> Self {
        Self::Db(error)
    }
}

impl From<StoreError> for larder_core::api::StoreError {
    fn from(error: StoreError) -> Self {
        use larder_core::api::ErrorKind;
        let kind = match &error {
            StoreError::NotValid { .. } => ErrorKind::NotValid,
            StoreError::Interrupted => ErrorKind::Interrupted,
            StoreError::Unsigned { .. } => ErrorKind::Refused,
            StoreError::GitAddress { .. } | StoreError::CannotReplace { .. } => ErrorKind::Unsupported,
            StoreError::Input(error) | StoreError::Output(error) if error.kind() == io::ErrorKind::OutOfMemory => {
                ErrorKind::OutOfMemory
            }
            _ => ErrorKind::Other,
        };
        match error {
            StoreError::Api(error) => error,
            other => Self::new(kind, other),
        }
    }
}

impl StoreError {
    /// Gives errors of the ledger, which does not know the store directory, their full paths.
    #[must_use]
    pub fn in_dir(self, dir: &StoreDir) -> Self {
        let full = |path: &StorePath| dir.full(path);
        match self {
            Self::Db(DbError::NotValid { path }) => Self::NotValid { path: full(&path) },
            Self::Db(DbError::Cycle { path, from }) => Self::Cycle { path: full(&path), from: full(&from) },
            Self::Db(DbError::InUse { path, by }) => {
                let by: Vec<String> = by.iter().map(|path| format!("'{}'", full(path))).collect();
                Self::InUse { path: full(&path), by: by.join(", ") }
            }
            other => other,
        }
    }
}

impl StoreError {
    /// Says of an error that may come of a broken file which file that is, and what helps.
    pub(crate) fn in_ledger(self, path: &std::path::Path) -> Self {
        match self {
            Self::Db(
                source @ (DbError::Storage { .. }
                | DbError::Corrupt { .. }
                | DbError::Damaged { .. }
                | DbError::Inconsistent { .. }
                | DbError::Record { .. }),
            ) => Self::Ledger { path: path.to_owned(), source },
            other => other,
        }
    }
}

/// An error and its reasons in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(reason) = next {
        text.push_str(": ");
        text.push_str(&reason.to_string());
        next = reason.source();
    }
    text
}
