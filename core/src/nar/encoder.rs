//! Writes archives.

use super::{Event, padding, row};

/// Turns [`Event`]s into an archive: the framing is appended to a buffer of the caller.
///
/// The events must form an archive with sorted entries (debug builds assert the order of kinds);
/// a walk over a tree gives no other. Contents need not pass through: a caller that moves them
/// itself leaves out [`Event::Contents`] and writes exactly `size_bytes` bytes before
/// [`Event::EndFile`].
///
/// ```
/// use larder_core::nar::{Encoder, Event};
/// let (mut encoder, mut nar) = (Encoder::new(), Vec::new());
/// encoder.push(Event::File { executable: false, size_bytes: 2 }, &mut nar);
/// nar.extend(b"hi");
/// encoder.push(Event::EndFile, &mut nar);
/// assert_eq!(nar.len(), 120);
/// assert_eq!(nar, larder_core::nar::encoder::file(b"hi", false));
/// ```
#[derive(Debug, Clone, Default)]
pub struct Encoder {
    begun: bool,
    /// Open directories.
    depth: usize,
    /// Zeros due after the open file.
    padding: usize,
}

impl Encoder {
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the bytes of one event.
    pub fn push(&mut self, event: Event<'_>, out: &mut Vec<u8>) {
        if !self.begun {
            self.begun = true;
            out.extend_from_slice(&row::MAGIC);
        }
        match event {
            Event::Directory => {
                out.extend_from_slice(&row::DIRECTORY);
                self.depth += 1;
            }
            Event::Entry { name } => {
                debug_assert!(self.depth > 0, "an entry outside of a directory");
                out.extend_from_slice(&row::ENTRY);
                string(name, out);
                out.extend_from_slice(&row::NODE);
            }
            Event::EndDirectory => {
                debug_assert!(self.depth > 0, "the end of no directory");
                self.depth -= 1;
                self.close(out);
            }
            Event::File { executable, size_bytes } => {
                if executable {
                    out.extend_from_slice(&row::EXECUTABLE);
                } else {
                    out.extend_from_slice(&row::FILE);
                }
                out.extend_from_slice(&size_bytes.to_le_bytes());
                self.padding = padding(size_bytes);
            }
            Event::Contents(bytes) => out.extend_from_slice(bytes),
            Event::EndFile => {
                zeros(self.padding, out);
                self.close(out);
            }
            Event::Symlink { target } => {
                out.extend_from_slice(&row::SYMLINK);
                string(target, out);
                self.close(out);
            }
        }
    }

    /// Ends a node, and the entry that holds it.
    fn close(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&row::CLOSE);
        if self.depth > 0 {
            out.extend_from_slice(&row::CLOSE);
        }
    }
}

/// The archive of a single file.
pub fn file(contents: &[u8], executable: bool) -> Vec<u8> {
    let mut encoder = Encoder::new();
    let mut out = Vec::with_capacity(144 + contents.len());
    encoder.push(Event::File { executable, size_bytes: contents.len() as u64 }, &mut out);
    out.extend_from_slice(contents);
    encoder.push(Event::EndFile, &mut out);
    out
}

fn string(bytes: &[u8], out: &mut Vec<u8>) {
    let length = bytes.len() as u64;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
    zeros(padding(length), out);
}

fn zeros(count: usize, out: &mut Vec<u8>) {
    out.resize(out.len() + count, 0);
}
