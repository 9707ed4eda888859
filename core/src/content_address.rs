//! Content-address assertions: what a path claims its contents to be.
//!
//! Source: formats, section 1.5; `content_address.json`.

use std::fmt;
use std::str::FromStr;

use crate::hash::{Algorithm, Encoding, Hash, HashError, Sha256Digest};

/// How the bytes of an object are made one stream to hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// The contents of a regular file.
    Flat,
    /// The NAR.
    Recursive,
    /// A git tree or blob object (experimental in Nix; SHA-1 only).
    Git,
}

impl Method {
    /// The prefix before the algorithm: nothing, `r:` or `git:`.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Flat => "",
            Self::Recursive => "r:",
            Self::Git => "git:",
        }
    }

    /// Splits `[r:|git:]rest`.
    pub fn split_prefix(text: &str) -> (Self, &str) {
        if let Some(rest) = text.strip_prefix("r:") {
            (Self::Recursive, rest)
        } else if let Some(rest) = text.strip_prefix("git:") {
            (Self::Git, rest)
        } else {
            (Self::Flat, text)
        }
    }
}

/// `text:sha256:H`, `fixed:ALGO:H`, `fixed:r:ALGO:H` or `fixed:git:sha1:H`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ContentAddress {
    Text(Sha256Digest),
    Fixed(Method, Hash),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContentAddressError {
    #[error("content address '{text}' begins with neither 'text:' nor 'fixed:'")]
    Kind { text: String },
    #[error("content address '{text}' has a hash that its kind does not allow")]
    Algorithm { text: String },
    #[error("content address '{text}' has no hash algorithm")]
    NoAlgorithm { text: String },
    #[error("content address '{text}' has a bad hash")]
    Hash { text: String, source: HashError },
}

impl FromStr for ContentAddress {
    type Err = ContentAddressError;
    fn from_str(text: &str) -> Result<Self, ContentAddressError> {
        let parse = |rest: &str| {
            // An algorithm and a colon are required here, unlike in `Hash::parse`.
            let Some((name, digest)) = rest.split_once(':') else {
                return Err(ContentAddressError::NoAlgorithm { text: text.to_owned() });
            };
            name.parse::<Algorithm>()
                .and_then(|algorithm| Hash::parse(digest, Some(algorithm)))
                .map_err(|source| ContentAddressError::Hash { text: text.to_owned(), source })
        };
        if let Some(rest) = text.strip_prefix("text:") {
            let digest = parse(rest)?.sha256();
            digest.map(Self::Text).ok_or_else(|| ContentAddressError::Algorithm { text: text.to_owned() })
        } else if let Some(rest) = text.strip_prefix("fixed:") {
            let (method, rest) = Method::split_prefix(rest);
            let hash = parse(rest)?;
            if method == Method::Git && hash.algorithm() != Algorithm::Sha1 {
                return Err(ContentAddressError::Algorithm { text: text.to_owned() });
            }
            Ok(Self::Fixed(method, hash))
        } else {
            Err(ContentAddressError::Kind { text: text.to_owned() })
        }
    }
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(digest) => write!(f, "text:{digest}"),
            Self::Fixed(method, hash) => {
                write!(f, "fixed:{}{}:{}", method.prefix(), hash.algorithm(), hash.encode(Encoding::Base32))
            }
        }
    }
}
