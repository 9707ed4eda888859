//! The logical store directory, and the store paths made in it.
//!
//! Source: formats, sections 1.3 and 1.4; `store_paths_*.json`.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};

use crate::content_address::{ContentAddress, Method};
use crate::hash::{Hash, Sha256Digest, fold};
use crate::hash_part::HashPart;
use crate::store_path::{Name, NameError, StorePath, StorePathError};

/// The directory that store paths are written with, usually `/nix/store`.
///
/// It is part of what a store path's hash is made of, so it is never the place where a
/// relocated store really lies. Absolute, without `.`, `..` or a final slash; and without `"`,
/// `\` and control characters, since paths stand unescaped in `.drv` files and in lines of text.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct StoreDir(Arc<Utf8Path>);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreDirError {
    #[error("the store directory '{path}' is not an absolute path")]
    NotAbsolute { path: String },
    #[error("the store directory must not be the root directory")]
    Root,
    #[error("the store directory '{}' must have no quotation mark, backslash or control character", .path.escape_default())]
    Character { path: String },
}

/// References of an object to others, and to itself, as they go into its own path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    pub others: BTreeSet<StorePath>,
    pub to_self: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MakePathError {
    #[error("'{name}' is no name for a store object")]
    Name { name: String, source: NameError },
    #[error(
        "fixed output derivation '{name}' is not allowed to refer to other store paths: its hash covers the contents only"
    )]
    References { name: String },
}

impl StoreDir {
    pub fn new(path: impl AsRef<str>) -> Result<Self, StoreDirError> {
        let path = path.as_ref();
        let Some(clean) = canonicalise(path.as_bytes()) else {
            return Err(StoreDirError::NotAbsolute { path: path.to_owned() });
        };
        let clean = String::from_utf8(clean).expect("made of pieces of a str, cut at '/'");
        if clean == "/" {
            return Err(StoreDirError::Root);
        }
        if clean.contains(|c: char| c.is_control() || c == '"' || c == '\\') {
            return Err(StoreDirError::Character { path: clean });
        }
        Ok(Self(Utf8PathBuf::from(clean).into()))
    }

    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    pub fn as_path(&self) -> &Utf8Path {
        &self.0
    }

    /// The full path, for display or for text formats.
    pub fn display<'a>(&'a self, path: &'a StorePath) -> impl fmt::Display + 'a {
        fmt::from_fn(move |f| write!(f, "{}/{path}", self.0))
    }

    /// The full path as text.
    pub fn full(&self, path: &StorePath) -> String {
        let mut text = String::with_capacity(self.as_str().len() + 34 + path.name().as_str().len());
        text.push_str(self.as_str());
        text.push('/');
        text.push_str(std::str::from_utf8(&path.hash_part().to_text()).expect("base-32 is ASCII"));
        text.push('-');
        text.push_str(path.name().as_str());
        text
    }

    /// Parses a full path; it must be a store path exactly, not something inside one.
    pub fn parse(&self, text: impl AsRef<[u8]>) -> Result<StorePath, StorePathError> {
        let text = text.as_ref();
        // The usual case needs no canonicalisation.
        if let Some(base) = self.below(text)
            && base.len() > HashPart::TEXT_LEN
            && !base.contains(&b'/')
        {
            return StorePath::from_base_name(base);
        }
        let Some(clean) = canonicalise(text) else {
            return Err(StorePathError::NotAbsolute { path: String::from_utf8_lossy(text).into_owned() });
        };
        match self.below(&clean) {
            Some(base) if !base.contains(&b'/') => StorePath::from_base_name(base),
            _ => Err(StorePathError::NotInStore { path: String::from_utf8_lossy(&clean).into_owned() }),
        }
    }

    /// Parses a path at or below a store path; gives the store path and what follows it,
    /// which is empty or begins with `/`.
    pub fn parse_inside<'a>(&self, text: &'a [u8]) -> Result<(StorePath, &'a [u8]), StorePathError> {
        let Some(rest) = self.below(text) else {
            return Err(StorePathError::NotInStore { path: String::from_utf8_lossy(text).into_owned() });
        };
        let end = memchr::memchr(b'/', rest).unwrap_or(rest.len());
        let (base, inner) = rest.split_at(end);
        Ok((StorePath::from_base_name(base)?, inner))
    }

    /// What follows `<store dir>/`, if the text begins so.
    pub fn below<'a>(&self, text: &'a [u8]) -> Option<&'a [u8]> {
        text.strip_prefix(self.as_str().as_bytes())?.strip_prefix(b"/")
    }

    /// The path for a fingerprint: `kind` ":sha256:" hex ":" store dir ":" name, hashed and folded.
    pub fn make_path(&self, kind: &str, inner: &Sha256Digest, name: &Name) -> StorePath {
        let fingerprint = format!("{kind}:sha256:{}:{}:{name}", inner.to_hex(), self.as_str());
        let digest = Sha256Digest::of(fingerprint.as_bytes());
        StorePath::new(HashPart::from_digest(fold(digest.as_bytes())), name.clone())
    }

    fn make_type(&self, kind: &str, references: &References) -> String {
        let mut text = kind.to_owned();
        for path in &references.others {
            text.push(':');
            text.push_str(&self.full(path));
        }
        if references.to_self {
            text.push_str(":self");
        }
        text
    }

    /// The path of an input-addressed output, from the derivation's modulo hash.
    pub fn make_output_path(
        &self,
        output: &str,
        modulo: &Sha256Digest,
        drv_name: &Name,
    ) -> Result<StorePath, NameError> {
        Ok(self.make_path(&format!("output:{output}"), modulo, &drv_name.for_output(output)?))
    }

    /// The path of a content-addressed object.
    ///
    /// Errors: a reference where the method allows none (text has no self reference, and
    /// anything but `text` and recursive SHA-256 has no references at all).
    pub fn make_content_path(
        &self,
        name: &Name,
        address: &ContentAddress,
        references: &References,
    ) -> Result<StorePath, MakePathError> {
        let refused = || MakePathError::References { name: name.to_string() };
        match address {
            ContentAddress::Text(digest) if !references.to_self => {
                Ok(self.make_path(&self.make_type("text", references), digest, name))
            }
            ContentAddress::Text(_) => Err(refused()),
            ContentAddress::Fixed(method, hash) => {
                if let (Method::Recursive, Some(digest)) = (method, hash.sha256()) {
                    return Ok(self.make_path(&self.make_type("source", references), &digest, name));
                }
                if references.to_self || !references.others.is_empty() {
                    return Err(refused());
                }
                let inner = format!(
                    "fixed:out:{}{}:{}:",
                    method.prefix(),
                    hash.algorithm(),
                    hash.encode(crate::hash::Encoding::Base16)
                );
                Ok(self.make_path("output:out", &Sha256Digest::of(inner.as_bytes()), name))
            }
        }
    }

    /// The path `--add-fixed` and fixed-output derivations give.
    pub fn make_fixed_path(&self, method: Method, hash: Hash, name: &Name) -> Result<StorePath, MakePathError> {
        self.make_content_path(name, &ContentAddress::Fixed(method, hash), &References::default())
    }
}

impl fmt::Display for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Collapses `//`, `/./`, `/x/../` and final slashes of an absolute path, by text alone.
/// `None` if it is not absolute.
pub fn canonicalise(path: &[u8]) -> Option<Vec<u8>> {
    if path.first() != Some(&b'/') {
        return None;
    }
    let mut clean: Vec<u8> = Vec::with_capacity(path.len());
    for piece in path.split(|b| *b == b'/') {
        match piece {
            b"" | b"." => {}
            b".." => clean.truncate(memchr::memrchr(b'/', &clean).unwrap_or(0)),
            _ => {
                clean.push(b'/');
                clean.extend_from_slice(piece);
            }
        }
    }
    if clean.is_empty() {
        clean.push(b'/');
    }
    Some(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories() {
        for (text, expected) in [
            ("/nix/store", Ok("/nix/store")),
            ("/nix//x/../store/", Ok("/nix/store")),
            ("/tmp/a b/sté", Ok("/tmp/a b/sté")),
            ("nix/store", Err(StoreDirError::NotAbsolute { path: "nix/store".into() })),
            ("", Err(StoreDirError::NotAbsolute { path: String::new() })),
            ("/x/..", Err(StoreDirError::Root)),
            ("/a\"b", Err(StoreDirError::Character { path: "/a\"b".into() })),
            ("/a\\b", Err(StoreDirError::Character { path: "/a\\b".into() })),
            ("/a\nb", Err(StoreDirError::Character { path: "/a\nb".into() })),
        ] {
            assert_eq!(StoreDir::new(text).as_ref().map(StoreDir::as_str), expected.as_ref().copied());
        }
    }

    #[test]
    fn canonicalises() {
        for (text, clean) in
            [("/", "/"), ("/nix/store/", "/nix/store"), ("//nix/./store//x/../y/.", "/nix/store/y"), ("/../..", "/")]
        {
            assert_eq!(canonicalise(text.as_bytes()).unwrap(), clean.as_bytes());
        }
        assert_eq!(canonicalise(b"nix"), None);
    }
}
