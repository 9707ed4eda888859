//! Store paths: the name of an object, `<hash part>-<name>`.
//!
//! Source: formats, section 1.3; `store_path_names.json`, `store_path_parse.json`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::hash_part::{HashPart, HashPartError};

/// The longest name, in bytes.
pub const MAX_NAME_LEN: usize = 211;

/// The name of a store object: 1 to 211 characters of `0-9 a-z A-Z + - . _ ? =`.
///
/// `.`, `..` and names that begin with `.-` or `..-` are refused (the rule of 2.26; 2.8 takes them).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    #[error("name must not be empty")]
    Empty,
    #[error("name '{name}' must be no longer than {MAX_NAME_LEN} characters")]
    TooLong { name: String },
    #[error("name '{name}' is not valid")]
    Dots { name: String },
    #[error("name '{name}' contains illegal character '{bad}'")]
    Character { name: String, bad: char },
}

/// May this byte stand in a name?
pub const fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.' | b'_' | b'?' | b'=')
}

impl Name {
    pub fn new(text: &str) -> Result<Self, NameError> {
        check_name(text.as_bytes())?;
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of output `output` of a derivation with this name: `out` adds nothing.
    pub fn for_output(&self, output: &str) -> Result<Self, NameError> {
        if output == "out" { Ok(self.clone()) } else { Self::new(&format!("{self}-{output}")) }
    }

    /// Does it end with `.drv`?
    pub fn is_derivation(&self) -> bool {
        self.0.ends_with(".drv")
    }
}

/// Checks a name of any origin.
pub fn check_name(name: &[u8]) -> Result<(), NameError> {
    let lossy = || String::from_utf8_lossy(name).into_owned();
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > MAX_NAME_LEN {
        return Err(NameError::TooLong { name: lossy() });
    }
    if let Some(bad) = name.iter().position(|b| !is_name_byte(*b)) {
        let bad = String::from_utf8_lossy(name.get(bad..).unwrap_or_default()).chars().next().unwrap_or('?');
        return Err(NameError::Character { name: lossy(), bad });
    }
    if matches!(name, b"." | b"..") || name.starts_with(b".-") || name.starts_with(b"..-") {
        return Err(NameError::Dots { name: lossy() });
    }
    Ok(())
}

impl FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A store path without its store directory: `<hash part>-<name>`.
///
/// Sorts as the text of the base name does. [`Display`](fmt::Display) gives the base name; the
/// full path comes from [`StoreDir`](crate::store_dir::StoreDir).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath {
    hash_part: HashPart,
    name: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StorePathError {
    #[error("'{base}' is too short to be a valid store path")]
    TooShort { base: String },
    #[error("store path '{path}' contains illegal base-32 character '{bad}'")]
    HashPart { path: String, bad: char },
    #[error("path '{path}' is not a valid store path: it has '{found}' instead of '-' after the hash part")]
    Separator { path: String, found: char },
    #[error("path '{path}' is not a valid store path: {source}")]
    Name { path: String, source: NameError },
    #[error("not an absolute path: '{path}'")]
    NotAbsolute { path: String },
    #[error("path '{path}' is not in the Nix store")]
    NotInStore { path: String },
}

impl StorePath {
    pub const fn new(hash_part: HashPart, name: Name) -> Self {
        Self { hash_part, name }
    }

    pub const fn hash_part(&self) -> HashPart {
        self.hash_part
    }

    pub const fn name(&self) -> &Name {
        &self.name
    }

    pub fn is_derivation(&self) -> bool {
        self.name.is_derivation()
    }

    /// Parses a base name. Bytes that are not UTF-8 give an error, as they are in no name.
    pub fn from_base_name(base: &[u8]) -> Result<Self, StorePathError> {
        let lossy = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        // As in Nix 2.26, errors name the base name alone.
        let path = || lossy(base);
        let Some((hash, rest)) = base.split_at_checked(HashPart::TEXT_LEN) else {
            return Err(StorePathError::TooShort { base: path() });
        };
        let Some((separator, name)) = rest.split_first() else {
            return Err(StorePathError::TooShort { base: path() });
        };
        let hash_part = HashPart::parse(hash).map_err(|error| {
            let HashPartError::Alphabet { bad, .. } = error else { unreachable!("split at its length") };
            StorePathError::HashPart { path: path(), bad }
        })?;
        if *separator != b'-' {
            let found = lossy(rest).chars().next().unwrap_or('?');
            return Err(StorePathError::Separator { path: path(), found });
        }
        check_name(name).map_err(|source| StorePathError::Name { path: path(), source })?;
        let name = std::str::from_utf8(name).expect("a checked name is ASCII");
        Ok(Self { hash_part, name: Name(name.into()) })
    }
}

/// A store path that is borrowed: a hash part and a legal name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PathRef<'a> {
    hash_part: HashPart,
    name: &'a str,
}

impl<'a> PathRef<'a> {
    /// Parses a base name without copying it.
    pub fn parse(base: &'a [u8]) -> Result<Self, StorePathError> {
        // The error texts are those of `StorePath`; only good input is fast.
        let parsed = base.split_at_checked(HashPart::TEXT_LEN).and_then(|(hash, rest)| {
            let name = rest.strip_prefix(b"-")?;
            check_name(name).ok()?;
            Some(Self { hash_part: HashPart::parse(hash).ok()?, name: std::str::from_utf8(name).ok()? })
        });
        match parsed {
            Some(path) => Ok(path),
            None => Err(match StorePath::from_base_name(base) {
                Err(error) => error,
                Ok(path) => unreachable!("'{path}' parses one way only"),
            }),
        }
    }

    /// For a name that was checked before: one of a record, or of a `StorePath`.
    pub const fn trusted(hash_part: HashPart, name: &'a str) -> Self {
        Self { hash_part, name }
    }

    pub const fn hash_part(self) -> HashPart {
        self.hash_part
    }

    pub const fn name(self) -> &'a str {
        self.name
    }

    pub fn is_derivation(self) -> bool {
        self.name.strip_suffix(".drv").is_some()
    }

    /// Appends the base name, `HASHPART-NAME`.
    pub fn write_base_name(self, out: &mut Vec<u8>) {
        out.reserve(HashPart::TEXT_LEN + 1 + self.name.len());
        out.extend_from_slice(&self.hash_part.to_text());
        out.push(b'-');
        out.extend_from_slice(self.name.as_bytes());
    }

    pub fn to_store_path(self) -> StorePath {
        StorePath::new(self.hash_part, Name::new(self.name).expect("the name was checked"))
    }
}

impl<'a> From<&'a StorePath> for PathRef<'a> {
    fn from(path: &'a StorePath) -> Self {
        Self { hash_part: path.hash_part(), name: path.name().as_str() }
    }
}

impl PartialEq<StorePath> for PathRef<'_> {
    fn eq(&self, other: &StorePath) -> bool {
        self.hash_part == other.hash_part() && self.name == other.name().as_str()
    }
}

impl fmt::Display for PathRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.hash_part, self.name)
    }
}

impl fmt::Debug for PathRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for StorePath {
    type Err = StorePathError;
    fn from_str(text: &str) -> Result<Self, StorePathError> {
        Self::from_base_name(text.as_bytes())
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.hash_part, self.name)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
