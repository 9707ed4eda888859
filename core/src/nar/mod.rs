//! The Nix archive format (NAR): a tree of files, directories and symlinks as one string of bytes.
//!
//! ```text
//! str(s) = u64 little-endian length, s, zeros up to a multiple of 8
//! nar    = str("nix-archive-1") node
//! node   = str("(") body str(")")
//! body   = str("type") str("regular") [str("executable") str("")] str("contents") str(DATA)
//!        | str("type") str("symlink") str("target") str(TARGET)
//!        | str("type") str("directory") {str("entry") str("(") str("name") str(NAME) str("node") node str(")")}
//! ```
//! There is one archive for a tree and one tree for an archive: entries are sorted bytewise, and
//! the [`parser`] refuses whatever the [`encoder`] would not have written. Both are machines of
//! [`Event`]s that hold no contents, so that a file may be larger than memory.
//!
//! Source: formats, section 3; `nar.json`, `nar_reject.json`.

pub mod case_hack;
pub mod encoder;
pub mod parser;
#[cfg(test)]
mod tests;

use std::fmt;

pub use encoder::Encoder;
pub use parser::Parser;

/// A step through an archive, in archive order.
///
/// A node is `File Contents* EndFile`, `Symlink`, or `Directory (Entry node)* EndDirectory`; an
/// archive is one node. The pieces of `Contents` are never empty and add up to `size_bytes`; where
/// they are cut depends on the input alone and means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A directory begins.
    Directory,
    /// The node that follows belongs to the innermost open directory under this name.
    Entry { name: &'a [u8] },
    /// The innermost open directory ends.
    EndDirectory,
    /// A regular file begins.
    File { executable: bool, size_bytes: u64 },
    /// More of the file that is open.
    Contents(&'a [u8]),
    /// The file is complete.
    EndFile,
    /// A symlink, whole.
    Symlink { target: &'a [u8] },
}

/// What a [`Parser`] accepts at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Directories open at once. Nix itself has no limit up to 2.34, 64 from 2.35 on.
    pub max_depth: usize,
    /// Bytes in the name of an entry.
    pub max_name_bytes: usize,
    /// Bytes in the target of a symlink.
    pub max_target_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_depth: 1024, max_name_bytes: 255, max_target_bytes: 4095 }
    }
}

/// What is wrong with an archive. `at` is an offset into it, in bytes.
///
/// The wording is that of Nix 2.26 where it has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NarError {
    #[error("bad archive: input doesn't look like a Nix archive")]
    Magic,
    #[error("unexpected end-of-file in an archive, after {at} bytes")]
    UnexpectedEnd { at: u64 },
    #[error("bad archive: non-zero padding at offset {at}")]
    Padding { at: u64 },
    #[error("bad archive: expected tag {expected}, got '{}' at offset {at}", Shown(found))]
    Tag { expected: &'static str, found: Vec<u8>, at: u64 },
    #[error("bad archive: unknown file type '{}' at offset {at}", Shown(found))]
    FileType { found: Vec<u8>, at: u64 },
    #[error("bad archive: executable marker has non-empty value '{}' at offset {at}", Shown(found))]
    ExecutableMarker { found: Vec<u8>, at: u64 },
    #[error("bad archive: NAR contains invalid file name '{}' at offset {at}", Shown(name))]
    Name { name: Vec<u8>, at: u64 },
    #[error("bad archive: NAR directory is not sorted: '{}' follows '{}' at offset {at}", Shown(name), Shown(previous))]
    NotSorted { previous: Vec<u8>, name: Vec<u8>, at: u64 },
    #[error("bad archive: NAR contains invalid symlink target '{}' at offset {at}", Shown(target))]
    Target { target: Vec<u8>, at: u64 },
    #[error("bad archive: {what} of {length} bytes at offset {at}, at most {max} are allowed")]
    TooLong { what: &'static str, length: u64, max: u64, at: u64 },
    #[error("bad archive: more than {max} nested directories at offset {at}")]
    TooDeep { max: usize, at: u64 },
}

/// Shows bytes that ought to be text: lossy where they are not, control characters escaped.
///
/// ```
/// # use larder_core::nar::Shown;
/// assert_eq!(Shown(b"a\nb\xff").to_string(), "a\\nb\u{fffd}");
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Shown<'a>(pub &'a [u8]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use fmt::Write as _;
        for c in String::from_utf8_lossy(self.0).chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        Ok(())
    }
}

/// Bytes of zeros that follow a string of `length` bytes.
const fn padding(length: u64) -> usize {
    (length.wrapping_neg() & 7) as usize
}

/// The framed form of a row of tags that always come together.
#[expect(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "done by the compiler alone")]
const fn tags<const N: usize>(list: &[&str]) -> [u8; N] {
    let mut out = [0; N];
    let (mut at, mut k) = (0, 0);
    while k < list.len() {
        let tag = list[k].as_bytes();
        assert!(tag.len() < 256);
        out[at] = tag.len() as u8;
        at += 8;
        let mut b = 0;
        while b < tag.len() {
            out[at + b] = tag[b];
            b += 1;
        }
        at += tag.len().next_multiple_of(8);
        k += 1;
    }
    assert!(at == N);
    out
}

const MAGIC: &[u8] = b"nix-archive-1";

/// Rows of tags between the variable parts. The parser compares them whole, and goes tag by tag
/// only where they differ, to say what is wrong.
mod row {
    use super::tags;

    pub(super) const MAGIC: [u8; 24] = tags(&["nix-archive-1"]);
    pub(super) const FILE: [u8; 64] = tags(&["(", "type", "regular", "contents"]);
    pub(super) const EXECUTABLE: [u8; 96] = tags(&["(", "type", "regular", "executable", "", "contents"]);
    pub(super) const SYMLINK: [u8; 64] = tags(&["(", "type", "symlink", "target"]);
    pub(super) const DIRECTORY: [u8; 56] = tags(&["(", "type", "directory"]);
    pub(super) const ENTRY: [u8; 48] = tags(&["entry", "(", "name"]);
    pub(super) const NODE: [u8; 16] = tags(&["node"]);
    pub(super) const CLOSE: [u8; 16] = tags(&[")"]);
}
