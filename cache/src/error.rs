//! What can go wrong with a cache.

use std::io;
use std::path::PathBuf;

use larder_core::hash::Hash;
use larder_core::narinfo::{CacheInfoError, NarInfoError};
use larder_core::realisation::RealisationError;
use larder_core::store_path::StorePathError;

/// An error of a cache. The texts name the cache and the file; the reason is the source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    #[error("don't know how to open Nix store '{uri}'")]
    UnknownStore { uri: String },
    #[error("cannot use the cache '{uri}': this version of Larder speaks to file, http, https and s3 caches only")]
    Unsupported { uri: String },
    #[error("the URI '{uri}' of a cache is not valid: {reason}")]
    Uri { uri: String, reason: String },
    #[error("'{uri}' does not appear to be a binary cache")]
    NoCache { uri: String },
    #[error(transparent)]
    Info(#[from] CacheInfoError),
    #[error("unable to download '{url}'")]
    Download { url: String, source: DownloadError },
    #[error("unable to upload '{url}'")]
    Upload { url: String, source: DownloadError },
    #[error("unable to upload '{url}'")]
    UploadAnswer { url: String, source: AnswerError },
    #[error("no keys for the bucket of '{uri}'")]
    Keys { uri: String, source: KeysError },
    #[error("{doing} '{}'", path.display())]
    File { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("'{}' in the cache '{uri}' is no regular file", path.display())]
    NotRegular { uri: String, path: PathBuf },
    #[error("the cache '{uri}' names a file outside of itself, '{name}', which is not looked at")]
    Outside { uri: String, name: String },
    #[error("file '{name}' does not exist in binary cache '{uri}'")]
    Missing { uri: String, name: String },
    #[error("file '{name}' of the cache '{uri}' has more than {limit} bytes")]
    TooLong { uri: String, name: String, limit: u64 },
    #[error("what the cache '{uri}' says of '{name}' is not valid")]
    NarInfo { uri: String, name: String, source: NarInfoError },
    #[error("what the cache '{uri}' says in '{name}' is not valid")]
    Realisation { uri: String, name: String, source: Box<RealisationError> },
    #[error("unknown compression method '{method}' in the cache '{uri}'")]
    Compression { uri: String, method: String },
    #[error("'{name}' of the cache '{uri}' cannot be decompressed")]
    Decompress { uri: String, name: String, source: io::Error },
    #[error("size mismatch of '{name}' from the cache '{uri}';\n  specified: {expected}\n  got:       {found}")]
    FileSize { uri: String, name: String, expected: u64, found: u64 },
    #[error("size mismatch of '{name}' from the cache '{uri}': there is more than the {expected} bytes it said")]
    MoreThanSaid { uri: String, name: String, expected: u64 },
    #[error("hash mismatch of '{name}' from the cache '{uri}';\n  specified: {expected}\n  got:       {found}")]
    FileHash { uri: String, name: String, expected: Box<Hash>, found: Box<Hash> },
    /// It failed a short while ago and is left alone for now.
    #[error("the cache '{uri}' is passed over for now, as it failed")]
    Disabled {
        uri: String,
        #[source]
        source: SharedError,
    },
    #[error("cannot fetch from the store '{uri}'")]
    OtherStore { uri: String, source: larder_core::api::StoreError },
    #[error("the answer of the cache '{uri}' about a closure is not valid: {reason}")]
    Closure { uri: String, reason: &'static str },
    #[error(transparent)]
    Path(#[from] StorePathError),
    #[error("{method} compression")]
    Compress { method: &'static str, source: io::Error },
    #[error("reading the key file '{}'", path.display())]
    KeyFile { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Key(#[from] larder_core::signature::SignatureError),
    #[error(transparent)]
    Store(#[from] larder_core::api::StoreError),
    #[error("interrupted by the user")]
    Interrupted,
}

/// An error that several have to hear of, by its text.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct SharedError(pub std::sync::Arc<str>);

/// What the answer of a server of S3 lacks.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnswerError {
    #[error("the answer cannot be read")]
    Read(#[source] io::Error),
    #[error("the server does not say how it calls the upload")]
    NoUpload,
    #[error("part {number} was taken without an ETag")]
    NoTag { number: u16 },
    #[error("it could not be put together: {0}")]
    Refused(String),
}

/// Why there are no keys for a bucket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    #[error("cannot read '{}'", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("the profile '{profile}' is in no file ({})", shown(files))]
    NoProfile { profile: String, files: Vec<PathBuf> },
    #[error("the profile '{profile}' has no 'aws_secret_access_key' beside its 'aws_access_key_id'")]
    Half { profile: String },
    #[error("the profile '{profile}' gets its keys by '{way}', which is not spoken here")]
    Way { profile: String, way: String },
}

fn shown(files: &[PathBuf]) -> String {
    let files: Vec<String> = files.iter().map(|file| format!("'{}'", file.display())).collect();
    if files.is_empty() { "none is named".to_owned() } else { files.join(", ") }
}

/// Why something could not be had from a server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DownloadError {
    #[error("HTTP error {code} ('{reason}')")]
    Status { code: u16, reason: String },
    #[error(transparent)]
    Http(Box<ureq::Error>),
    #[error("{scheme} is not spoken here; only http and https are")]
    Scheme { scheme: String },
    #[error("less than a byte a second came in {seconds} seconds")]
    Stalled { seconds: u64 },
    #[error("it was cut after {at} bytes and cannot be resumed")]
    Cut {
        at: u64,
        #[source]
        source: io::Error,
    },
    #[error("it was cut after {at} of {total} bytes")]
    Short { at: u64, total: u64 },
    #[error("no server can be trusted")]
    Authorities { source: SharedError },
    #[error("the content encoding '{0}' is not known")]
    Encoding(String),
    #[error("the download was stopped")]
    Stopped,
    #[error("cannot read the file")]
    File(#[source] io::Error),
    #[error("it is no regular file")]
    NotRegular,
}

impl From<ureq::Error> for DownloadError {
    fn from(error: ureq::Error) -> Self {
        Self::Http(Box::new(error))
    }
}

impl DownloadError {
    /// May another attempt do better?
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Status { code, .. } => {
                matches!(code, 408 | 429) || (*code >= 500 && !matches!(code, 501 | 505 | 511))
            }
            Self::Http(error) => match &**error {
                ureq::Error::Io(error) => !is_of_tls(error),
                error => matches!(
                    error,
                    ureq::Error::Timeout(_)
                        | ureq::Error::ConnectionFailed
                        | ureq::Error::HostNotFound
                        | ureq::Error::Protocol(_)
                ),
            },
            Self::Stalled { .. } | Self::Cut { .. } | Self::Short { .. } => true,
            Self::Scheme { .. }
            | Self::Authorities { .. }
            | Self::Encoding(_)
            | Self::Stopped
            | Self::File(_)
            | Self::NotRegular => false,
        }
    }

    /// Will the same server do no better with anything else?
    pub fn is_of_server(&self) -> bool {
        let tls = match self {
            Self::Authorities { .. } => true,
            Self::Http(error) => match &**error {
                ureq::Error::Io(error) => is_of_tls(error),
                ureq::Error::Rustls(_) | ureq::Error::Tls(_) => true,
                _ => false,
            },
            _ => false,
        };
        tls || self.is_passing()
    }
}

/// Is it the server's certificate, or its way to speak TLS? That is found, as rustls says, in data
/// that are not valid.
fn is_of_tls(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidData
}

impl CacheError {
    /// Does it say something of the whole cache, so that it had better be left alone for a while?
    pub fn is_of_whole_cache(&self) -> bool {
        match self {
            Self::Download { source, .. } => source.is_of_server(),
            Self::Disabled { .. } | Self::OtherStore { .. } => true,
            _ => false,
        }
    }

    /// The error beneath, where it went through a stream.
    pub fn from_io(error: io::Error) -> Result<Self, io::Error> {
        if error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<Self>) {
            let inner = error.into_inner().and_then(|inner| inner.downcast::<Self>().ok());
            return inner.map(|inner| *inner).ok_or_else(|| io::Error::other("an error without one"));
        }
        Err(error)
    }
}
