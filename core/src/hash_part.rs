//! The hash part of a store path.

use std::fmt;
use std::str::FromStr;

use crate::base32;

/// The 20-byte digest that begins the base name of a store path.
///
/// Text form: 32 characters of the store's own base-32 alphabet (no `e o t u`).
/// The bytes are kept most significant first, so that they sort as the text does; a digest
/// comes in by [`HashPart::from_digest`].
/// Errors name the text and the position. Source: `store_path_parse.json`.
///
/// ```
/// use larder_core::hash_part::HashPart;
/// let part: HashPart = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c".parse()?;
/// assert_eq!(part.as_bytes().len(), 20);
/// assert_eq!(part.to_string(), "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c");
/// # Ok::<(), larder_core::hash_part::HashPartError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HashPart([u8; 20]);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HashPartError {
    #[error("hash part '{text}' has {found} characters, a store path needs 32")]
    Length { text: String, found: usize },
    #[error("hash part '{text}' has '{bad}' at position {at}, which base-32 does not use")]
    Alphabet { text: String, bad: char, at: usize },
}

impl HashPart {
    /// Length of the text form, in characters.
    pub const TEXT_LEN: usize = 32;

    /// From the 20 bytes of a folded digest, least significant first as digests come.
    pub fn from_digest(mut digest: [u8; 20]) -> Self {
        digest.reverse();
        Self(digest)
    }

    /// From the bytes as [`HashPart::as_bytes`] gives them (a database key).
    pub const fn from_bytes(bytes: [u8; 20]) -> Self {
        Self(bytes)
    }

    /// The bytes in the order of the text: they compare as the text does.
    pub const fn as_bytes(&self) -> &[u8; 20] {
        &self.0
    }

    /// The 32 characters, as ASCII bytes.
    pub fn to_text(self) -> [u8; 32] {
        let mut text = [0; 32];
        for (five, eight) in self.0.chunks_exact(5).zip(text.chunks_exact_mut(8)) {
            let group = five.iter().fold(0u64, |n, b| n << 8 | u64::from(*b));
            for (k, c) in eight.iter_mut().enumerate() {
                *c = base32::digit(group >> (35 - 5 * k));
            }
        }
        text
    }

    /// Parses the 32 characters.
    pub fn parse(text: &[u8]) -> Result<Self, HashPartError> {
        let lossy = || String::from_utf8_lossy(text).into_owned();
        if text.len() != Self::TEXT_LEN {
            return Err(HashPartError::Length { text: lossy(), found: text.len() });
        }
        let mut bytes = [0; 20];
        for (n, (eight, five)) in text.chunks_exact(8).zip(bytes.chunks_exact_mut(5)).enumerate() {
            let mut group = 0u64;
            for (k, &c) in eight.iter().enumerate() {
                let Some(value) = base32::digit_value(c) else {
                    return Err(HashPartError::Alphabet { text: lossy(), bad: char::from(c), at: n * 8 + k });
                };
                group = group << 5 | u64::from(value);
            }
            five.copy_from_slice(group.to_be_bytes().last_chunk::<5>().expect("8 bytes hold 5"));
        }
        Ok(Self(bytes))
    }
}

impl FromStr for HashPart {
    type Err = HashPartError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text.as_bytes())
    }
}

impl fmt::Display for HashPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(&self.to_text()).expect("base-32 is ASCII"))
    }
}

impl fmt::Debug for HashPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The fast text form is the general base-32 of the digest, and sorts as the bytes do.
        #[test]
        fn agrees_with_base32(a in any::<[u8; 20]>(), b in any::<[u8; 20]>()) {
            let (x, y) = (HashPart::from_digest(a), HashPart::from_digest(b));
            prop_assert_eq!(x.to_string(), base32::encode(&a));
            prop_assert_eq!(HashPart::parse(&x.to_text()), Ok(x));
            prop_assert_eq!(x.cmp(&y), x.to_string().cmp(&y.to_string()));
        }
    }

    #[test]
    fn errors_name_the_position() {
        let e = HashPart::parse(b"0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1e").unwrap_err();
        assert!(matches!(e, HashPartError::Alphabet { bad: 'e', at: 31, .. }), "{e}");
    }
}
