//! Hashes and their textual forms: base 16, base 32, base 64 and SRI.
//!
//! Source: formats, section 2; `hash_encodings.json`, `hash_parse.json`.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use sha2::Digest as _;

use crate::base32;

/// Reads base 64 as Nix does: padding optional, stray trailing bits ignored.
const LENIENT_BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new()
        .with_decode_allow_trailing_bits(true)
        .with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Text beyond this many bytes is no hash in any form.
const MAX_TEXT: usize = 1024;

/// A hash algorithm. Names are lowercase and exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    Md5,
    Sha1,
    Sha256,
    Sha512,
}

impl Algorithm {
    pub const ALL: [Self; 4] = [Self::Md5, Self::Sha1, Self::Sha256, Self::Sha512];

    /// Digest size in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = HashError;
    fn from_str(text: &str) -> Result<Self, HashError> {
        Self::ALL
            .into_iter()
            .find(|a| a.name() == text)
            .ok_or_else(|| HashError::UnknownAlgorithm { name: text.to_owned() })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HashError {
    #[error("unknown hash algorithm '{name}'")]
    UnknownAlgorithm { name: String },
    #[error("hash '{text}' should have type '{wanted}'")]
    OtherAlgorithm { text: String, wanted: Algorithm },
    #[error("hash '{text}' does not include a type, nor is the type otherwise known from context")]
    NoAlgorithm { text: String },
    #[error("hash '{text}' has wrong length for hash algorithm '{algorithm}'")]
    Length { text: String, algorithm: Algorithm },
    #[error("invalid base-16 hash '{text}'")]
    Base16 { text: String },
    #[error("invalid base-32 hash '{text}'")]
    Base32 { text: String, source: base32::Base32Error },
    #[error("invalid base-64 hash '{text}'")]
    Base64 { text: String },
    #[error("hash '{text}' is not in SRI form (ALGORITHM-BASE64)")]
    NotSri { text: String },
    #[error("'{text}...' is far too long for a hash")]
    TooLong { text: String },
}

/// How a hash is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Base16,
    Base32,
    Base64,
    /// `ALGORITHM-BASE64`; always with its algorithm.
    Sri,
}

/// A digest and its algorithm.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash {
    algorithm: Algorithm,
    /// Bytes beyond the algorithm's size are zero.
    bytes: [u8; 64],
}

impl Hash {
    /// From a digest of exactly the algorithm's size; `None` for another size.
    pub fn new(algorithm: Algorithm, digest: &[u8]) -> Option<Self> {
        if digest.len() != algorithm.size() {
            return None;
        }
        let mut bytes = [0; 64];
        bytes.get_mut(..digest.len())?.copy_from_slice(digest);
        Some(Self { algorithm, bytes })
    }

    /// The hash of `data`.
    pub fn of(algorithm: Algorithm, data: &[u8]) -> Self {
        let mut hasher = Hasher::new(algorithm);
        hasher.update(data);
        hasher.finish()
    }

    pub const fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.algorithm.size()).unwrap_or_default()
    }

    /// The text in one encoding, without the algorithm's name (SRI has it always).
    pub fn encode(&self, encoding: Encoding) -> String {
        match encoding {
            Encoding::Base16 => data_encoding::HEXLOWER.encode(self.as_bytes()),
            Encoding::Base32 => base32::encode(self.as_bytes()),
            Encoding::Base64 => data_encoding::BASE64.encode(self.as_bytes()),
            Encoding::Sri => format!("{}-{}", self.algorithm, data_encoding::BASE64.encode(self.as_bytes())),
        }
    }

    /// `ALGORITHM:TEXT` (SRI as it is).
    pub fn encode_prefixed(&self, encoding: Encoding) -> String {
        match encoding {
            Encoding::Sri => self.encode(encoding),
            _ => format!("{}:{}", self.algorithm, self.encode(encoding)),
        }
    }

    /// Reads `[algo:]base16`, `[algo:]base32`, `[algo:]base64` or SRI.
    ///
    /// The form is chosen by length. `wanted` is the algorithm known from context; text and
    /// context must agree, and one of them must give it.
    pub fn parse(text: &str, wanted: Option<Algorithm>) -> Result<Self, HashError> {
        if text.len() > MAX_TEXT {
            let text = text.chars().take(40).collect();
            return Err(HashError::TooLong { text });
        }
        let owned = || text.to_owned();
        let (named, rest, sri) = match (text.split_once(':'), text.split_once('-')) {
            (Some((name, rest)), _) => (Some(name), rest, false),
            (None, Some((name, rest))) => (Some(name), rest, true),
            (None, None) => (None, text, false),
        };
        let algorithm = match (named.map(str::parse).transpose()?, wanted) {
            (Some(found), Some(wanted)) if found != wanted => {
                return Err(HashError::OtherAlgorithm { text: owned(), wanted });
            }
            (Some(found), _) => found,
            (None, Some(wanted)) => wanted,
            (None, None) => return Err(HashError::NoAlgorithm { text: owned() }),
        };
        let size = algorithm.size();
        let mut hash = Self { algorithm, bytes: [0; 64] };
        let out = hash.bytes.get_mut(..size).expect("no digest is longer than 64 bytes");
        if !sri && rest.len() == size * 2 {
            let decoded = data_encoding::HEXLOWER_PERMISSIVE
                .decode(rest.as_bytes())
                .map_err(|_| HashError::Base16 { text: owned() })?;
            out.copy_from_slice(&decoded);
        } else if !sri && rest.len() == base32::encoded_len(size) {
            base32::decode_into(rest.as_bytes(), out).map_err(|source| HashError::Base32 { text: owned(), source })?;
        } else if sri || rest.len() == size.div_ceil(3) * 4 {
            let decoded = decode_base64(rest).ok_or_else(|| HashError::Base64 { text: owned() })?;
            if decoded.len() != size {
                return Err(HashError::Length { text: owned(), algorithm });
            }
            out.copy_from_slice(&decoded);
        } else {
            return Err(HashError::Length { text: owned(), algorithm });
        }
        Ok(hash)
    }

    /// Reads base 16, base 32 or base 64, chosen by length, with no algorithm before it.
    pub fn parse_bare(text: &str, algorithm: Algorithm) -> Result<Self, HashError> {
        if text.contains([':', '-']) {
            let text = text.chars().take(MAX_TEXT).collect();
            return Err(HashError::Length { text, algorithm });
        }
        Self::parse(text, Some(algorithm))
    }

    /// Reads the SRI form only.
    pub fn parse_sri(text: &str) -> Result<Self, HashError> {
        match text.split_once('-') {
            Some((name, _)) if !name.contains(':') => Self::parse(text, None),
            _ => Err(HashError::NotSri { text: text.to_owned() }),
        }
    }

    /// The SHA-256 digest, if that is the algorithm.
    pub fn sha256(&self) -> Option<Sha256Digest> {
        (self.algorithm == Algorithm::Sha256).then(|| {
            let (first, _) = self.bytes.split_at(32);
            Sha256Digest(first.try_into().expect("split at 32"))
        })
    }
}

/// Base 64 as Nix reads it: ends at the first `=`, line feeds are skipped, padding is optional
/// and left-over bits are ignored. `None` for any other character.
pub fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let body = text.split('=').next().unwrap_or_default();
    let mut clean: Vec<u8> = body.bytes().filter(|b| *b != b'\n').collect();
    // A lone last character holds 6 bits, too few for a byte; Nix drops it.
    if clean.len() % 4 == 1 {
        let last = clean.pop()?;
        if !(last.is_ascii_alphanumeric() || last == b'+' || last == b'/') {
            return None;
        }
    }
    LENIENT_BASE64.decode(clean).ok()
}

/// Base 64 with padding.
pub fn encode_base64(bytes: &[u8]) -> String {
    data_encoding::BASE64.encode(bytes)
}

impl fmt::Display for Hash {
    /// `ALGORITHM:BASE32`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm, base32::encode(self.as_bytes()))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A SHA-256 digest: the hash of a NAR, the only one the store keeps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Digest(pub [u8; 32]);

impl Sha256Digest {
    pub fn of(data: &[u8]) -> Self {
        Self(sha2::Sha256::digest(data).into())
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// 64 lowercase hexadecimal digits.
    pub fn to_hex(self) -> String {
        data_encoding::HEXLOWER.encode(&self.0)
    }

    /// 52 base-32 characters, no prefix.
    pub fn to_base32(self) -> String {
        base32::encode(&self.0)
    }

    pub fn to_hash(self) -> Hash {
        Hash::new(Algorithm::Sha256, &self.0).expect("32 bytes are a SHA-256 digest")
    }

    /// Reads any textual form of a SHA-256 hash, the prefix optional.
    pub fn parse(text: &str) -> Result<Self, HashError> {
        let hash = Hash::parse(text, Some(Algorithm::Sha256))?;
        Ok(hash.sha256().expect("parsed as SHA-256"))
    }
}

impl fmt::Display for Sha256Digest {
    /// `sha256:BASE32`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_base32())
    }
}

impl fmt::Debug for Sha256Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Computes a hash piece by piece.
#[derive(Clone)]
pub enum Hasher {
    Md5(md5::Md5),
    Sha1(sha1::Sha1),
    Sha256(sha2::Sha256),
    Sha512(sha2::Sha512),
}

impl Hasher {
    pub fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Md5 => Self::Md5(md5::Md5::new()),
            Algorithm::Sha1 => Self::Sha1(sha1::Sha1::new()),
            Algorithm::Sha256 => Self::Sha256(sha2::Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(sha2::Sha512::new()),
        }
    }

    pub fn update(&mut self, data: &[u8]) {
        match self {
            Self::Md5(h) => h.update(data),
            Self::Sha1(h) => h.update(data),
            Self::Sha256(h) => h.update(data),
            Self::Sha512(h) => h.update(data),
        }
    }

    pub fn finish(self) -> Hash {
        let made = match self {
            Self::Md5(h) => Hash::new(Algorithm::Md5, &h.finalize()),
            Self::Sha1(h) => Hash::new(Algorithm::Sha1, &h.finalize()),
            Self::Sha256(h) => Hash::new(Algorithm::Sha256, &h.finalize()),
            Self::Sha512(h) => Hash::new(Algorithm::Sha512, &h.finalize()),
        };
        made.expect("a hasher gives its own size")
    }
}

/// SHA-256 piece by piece, with the number of bytes seen: what the database keeps of a NAR.
#[derive(Clone, Default)]
pub struct NarHasher {
    hasher: sha2::Sha256,
    size: u64,
}

impl NarHasher {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn update(&mut self, data: &[u8]) {
        self.hasher.update(data);
        self.size += data.len() as u64;
    }

    /// The digest and the size in bytes.
    pub fn finish(self) -> (Sha256Digest, u64) {
        (Sha256Digest(self.hasher.finalize().into()), self.size)
    }
}

/// Folds `data` to `N` bytes by XOR: byte i goes to place i mod N.
pub fn fold<const N: usize>(data: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    for chunk in data.chunks(N) {
        for (o, b) in out.iter_mut().zip(chunk) {
            *o ^= b;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_encoding_reads_back(data in any::<Vec<u8>>()) {
            for algorithm in Algorithm::ALL {
                let hash = Hash::of(algorithm, &data);
                for encoding in [Encoding::Base16, Encoding::Base32, Encoding::Base64, Encoding::Sri] {
                    prop_assert_eq!(Hash::parse(&hash.encode(encoding), Some(algorithm)), Ok(hash));
                    prop_assert_eq!(Hash::parse(&hash.encode_prefixed(encoding), None), Ok(hash));
                }
            }
        }
    }
}
