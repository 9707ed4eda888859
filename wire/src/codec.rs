//! Words, strings and counts, as both protocols have them.
//!
//! Every number is eight bytes, little-endian. A string is its length, its bytes, and zeros up to
//! a multiple of eight. Source: protocols, section 1.
//!
//! Every length is compared with a limit before anything is allocated, and memory grows only with
//! bytes that came. What a request takes in all is taken from a [`Budget`] that connections share,
//! so that many clients together cannot eat the memory of the process either.

use std::io::{self, BufRead};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use larder_core::api::DerivedPathError;
use larder_core::content_address::ContentAddressError;
use larder_core::derivation::{DerivationError, NotDerivation};
use larder_core::hash::HashError;
use larder_core::hash_part::HashPartError;
use larder_core::realisation::RealisationError;
use larder_core::signature::SignatureError;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{NameError, StorePathError};

/// Longest paths, names and other short strings, in bytes.
pub const MAX_SHORT: u64 = 64 << 10;
/// Longest values of settings and of environments, and arguments, in bytes.
pub const MAX_LONG: u64 = 16 << 20;
/// Longest text that is added to the store as a string, in bytes.
pub const MAX_TEXT: u64 = 64 << 20;
/// Most items of a list, set or map.
pub const MAX_ITEMS: u64 = 4 << 20;
/// Most settings in one request.
pub const MAX_SETTINGS: u64 = 4096;
/// What one request may take in memory, in bytes, but for its contents.
pub const MAX_REQUEST: usize = 256 << 20;

/// No more than this is allocated ahead of what has come, in bytes.
const AHEAD: usize = 64 << 10;
/// Slots that are made ready for a list of any declared length.
const MAX_SLOTS: u64 = 1024;

/// Which protocol is spoken, and the minor version of it that both sides know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// 1.x, x from 10 to 38.
    Worker(u8),
    /// 2.x, x from 0 to 7.
    Serve(u8),
}

impl Protocol {
    /// Is it the worker protocol of at least this minor version?
    pub const fn is_worker(self, minor: u8) -> bool {
        matches!(self, Self::Worker(spoken) if spoken >= minor)
    }

    /// Is it the serve protocol of at least this minor version?
    pub const fn is_serve(self, minor: u8) -> bool {
        matches!(self, Self::Serve(spoken) if spoken >= minor)
    }
}

/// What is wrong with what the other side sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    #[error("unexpected end-of-file")]
    UnexpectedEnd,
    #[error("reading from the connection")]
    Read(#[source] io::Error),
    #[error("writing to the connection")]
    Write(#[source] io::Error),
    #[error("non-zero padding")]
    Padding,
    #[error("serialised integer {found} is too large for type '{kind}'")]
    Integer { found: u64, kind: char },
    #[error("string of {length} bytes is too long, at most {max} are allowed")]
    LongString { length: u64, max: u64 },
    #[error("list of {count} items is too long, at most {max} are allowed")]
    LongList { count: u64, max: u64 },
    #[error("request takes more than {MAX_REQUEST} bytes")]
    LargeRequest,
    /// The text that Nix has for it.
    #[error("Nix daemon out of memory")]
    OutOfMemory,
    #[error("'{text}' is not UTF-8")]
    Encoding { text: String },
    #[error("{what} has the value {found}, which means nothing")]
    Choice { what: &'static str, found: u64 },
    #[error("invalid operation {code}")]
    UnknownOperation { code: u64 },
    #[error("unknown message {code:#x} from the other side")]
    UnknownMessage { code: u64 },
    #[error("protocol mismatch: the other side began with {found:#x}")]
    Magic { found: u64 },
    #[error("the other side speaks version {major}.{minor} of the protocol, which is not supported")]
    Version { major: u64, minor: u64 },
    #[error("operation '{operation}' needs a newer version of the protocol than 1.{minor}")]
    TooOld { operation: &'static str, minor: u8 },
    #[error("'{text}' is no content-address method")]
    ContentMethod { text: String },
    #[error(transparent)]
    Path(#[from] StorePathError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Hash(#[from] HashError),
    #[error(transparent)]
    HashPart(#[from] HashPartError),
    #[error(transparent)]
    ContentAddress(#[from] ContentAddressError),
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error(transparent)]
    Target(#[from] DerivedPathError),
    #[error(transparent)]
    Realisation(#[from] RealisationError),
    #[error(transparent)]
    Derivation(#[from] DerivationError),
    #[error(transparent)]
    NotDerivation(#[from] NotDerivation),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::UnexpectedEnd,
            io::ErrorKind::OutOfMemory => Self::OutOfMemory,
            _ => Self::Read(error),
        }
    }
}

impl WireError {
    /// As the failure of a `Read`.
    pub(crate) fn into_io(self) -> io::Error {
        match self {
            Self::Read(error) | Self::Write(error) => error,
            Self::UnexpectedEnd => io::Error::new(io::ErrorKind::UnexpectedEof, self),
            Self::OutOfMemory => io::Error::new(io::ErrorKind::OutOfMemory, self),
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        }
    }
}

/// Memory that all connections of a process share for requests, in bytes.
#[derive(Debug)]
pub struct Budget(AtomicUsize);

impl Budget {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    /// No limit but that of each request.
    pub fn unlimited() -> Arc<Self> {
        Self::new(usize::MAX)
    }

    fn take(&self, bytes: usize) -> Result<(), WireError> {
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes));
        taken.map(drop).map_err(|_| WireError::OutOfMemory)
    }

    /// What is left, in bytes.
    pub fn left(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one request has taken from the budget. Given back on drop.
#[derive(Debug)]
pub struct Allowance {
    budget: Arc<Budget>,
    used: usize,
    /// Taken from the budget, in steps.
    taken: usize,
}

impl Allowance {
    pub const fn new(budget: Arc<Budget>) -> Self {
        Self { budget, used: 0, taken: 0 }
    }

    /// Before so many bytes are allocated.
    pub(crate) fn charge(&mut self, bytes: usize) -> Result<(), WireError> {
        self.used = self.used.saturating_add(bytes);
        if self.used > MAX_REQUEST {
            return Err(WireError::LargeRequest);
        }
        // Small requests take nothing: every connection may have one.
        let wanted = self.used.saturating_sub(AHEAD).next_multiple_of(AHEAD);
        if wanted > self.taken {
            self.budget.take(wanted - self.taken)?;
            self.taken = wanted;
        }
        Ok(())
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        self.budget.0.fetch_add(self.taken, Ordering::Relaxed);
    }
}

/// Reads values.
pub struct Decoder<'a> {
    input: &'a mut dyn BufRead,
    dir: &'a StoreDir,
    protocol: Protocol,
    allowance: Allowance,
}

impl<'a> Decoder<'a> {
    pub const fn new(input: &'a mut dyn BufRead, dir: &'a StoreDir, protocol: Protocol, budget: Arc<Budget>) -> Self {
        Self { input, dir, protocol, allowance: Allowance::new(budget) }
    }

    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    pub const fn dir(&self) -> &'a StoreDir {
        self.dir
    }

    /// What was taken for the values so far; to be kept as long as they are.
    pub fn into_allowance(self) -> Allowance {
        self.allowance
    }

    pub fn word(&mut self) -> Result<u64, WireError> {
        let mut word = [0; 8];
        self.input.read_exact(&mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// A number that others read as 32 bits.
    pub fn word32(&mut self) -> Result<u32, WireError> {
        let found = self.word()?;
        u32::try_from(found).map_err(|_| WireError::Integer { found, kind: 'j' })
    }

    /// Any number but 0 counts as true, as it does for some fields of real servers.
    pub fn bool(&mut self) -> Result<bool, WireError> {
        Ok(self.word()? != 0)
    }

    /// The bytes of a string, at most `max` of them.
    pub fn bytes(&mut self, max: u64) -> Result<Vec<u8>, WireError> {
        let length = self.word()?;
        let too_long = WireError::LongString { length, max };
        if length > max {
            return Err(too_long);
        }
        let Ok(length) = usize::try_from(length) else { return Err(too_long) };
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let step = (length - bytes.len()).min(AHEAD.max(bytes.len()));
            self.allowance.charge(step)?;
            bytes.try_reserve_exact(step).map_err(|_| WireError::OutOfMemory)?;
            let before = bytes.len();
            bytes.resize(before + step, 0);
            self.input.read_exact(bytes.get_mut(before..).unwrap_or_default())?;
        }
        let mut padding = [0; 8];
        let padding = padding.get_mut(..length.wrapping_neg() % 8).unwrap_or_default();
        self.input.read_exact(padding)?;
        if padding.iter().any(|b| *b != 0) {
            return Err(WireError::Padding);
        }
        Ok(bytes)
    }

    /// A string of text.
    pub fn text(&mut self, max: u64) -> Result<String, WireError> {
        String::from_utf8(self.bytes(max)?).map_err(|e| WireError::Encoding {
            text: String::from_utf8_lossy(e.as_bytes()).chars().take(100).collect(),
        })
    }

    /// The number of items that follow, and how many slots to make ready for them.
    pub fn count(&mut self, max: u64) -> Result<(u64, usize), WireError> {
        let count = self.word()?;
        if count > max {
            return Err(WireError::LongList { count, max });
        }
        Ok((count, usize::try_from(count.min(MAX_SLOTS)).unwrap_or(0)))
    }

    /// Before an item of a list is kept: so many bytes beside its strings.
    pub fn charge_item(&mut self, bytes: usize) -> Result<(), WireError> {
        self.allowance.charge(bytes)
    }
}

/// Writes values to a buffer.
pub struct Encoder<'a> {
    out: &'a mut Vec<u8>,
    dir: &'a StoreDir,
    protocol: Protocol,
}

impl<'a> Encoder<'a> {
    pub const fn new(out: &'a mut Vec<u8>, dir: &'a StoreDir, protocol: Protocol) -> Self {
        Self { out, dir, protocol }
    }

    pub const fn protocol(&self) -> Protocol {
        self.protocol
    }

    pub const fn dir(&self) -> &'a StoreDir {
        self.dir
    }

    pub fn word(&mut self, word: u64) {
        self.out.extend_from_slice(&word.to_le_bytes());
    }

    pub fn bool(&mut self, value: bool) {
        self.word(value.into());
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        put_bytes(self.out, bytes);
    }

    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    pub fn count(&mut self, count: usize) {
        self.word(count as u64);
    }
}

/// Appends a string.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
    out.resize(out.len() + bytes.len().wrapping_neg() % 8, 0);
}
