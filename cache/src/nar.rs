//! An archive on its way from a cache: decompressed, and held to what was said of it.
//!
//! The compressed file is hashed and counted as it comes, and so is what comes out of it counted:
//! neither may have a byte more than the narinfo file says, so what unpacks a small file to a huge
//! one is cut where the archive ought to end. The hash of the archive itself is for whoever
//! unpacks it to check, as it is taken there in the same reading.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, bounded};
use larder_core::hash::{Hash, Hasher};
use larder_core::narinfo::NarInfo;

use crate::compress::Method;
use crate::error::CacheError;

/// Archives from this size on (bytes) are decompressed in a thread of their own.
const AHEAD_FROM: u64 = 1 << 20;

/// How far that thread runs ahead: so many blocks of so many bytes.
const BLOCKS: usize = 4;
const BLOCK: usize = 128 << 10;

/// Whose file it is, for messages.
#[derive(Debug, Clone)]
struct Label {
    uri: String,
    name: String,
}

/// The compressed file.
struct FileCheck {
    source: Box<dyn Read + Send>,
    label: Label,
    size_bytes: u64,
    expected_size: Option<u64>,
    hasher: Option<(Hasher, Hash)>,
}

impl Read for FileCheck {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(buf)?;
        self.size_bytes += n as u64;
        if let Some(expected) = self.expected_size
            && self.size_bytes > expected
        {
            let Label { uri, name } = self.label.clone();
            return Err(io::Error::other(CacheError::MoreThanSaid { uri, name, expected }));
        }
        if let Some((hasher, _)) = &mut self.hasher {
            hasher.update(buf.get(..n).unwrap_or_default());
        }
        Ok(n)
    }
}

impl FileCheck {
    /// Reads what a decoder has left, and compares.
    fn finish(&mut self) -> Result<(), CacheError> {
        let mut block = vec![0; 16 << 10];
        loop {
            match self.read(&mut block) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.label.error(error)),
            }
        }
        let Label { uri, name } = self.label.clone();
        if let Some(expected) = self.expected_size.filter(|expected| *expected != self.size_bytes) {
            return Err(CacheError::FileSize { uri, name, expected, found: self.size_bytes });
        }
        if let Some((hasher, expected)) = self.hasher.take() {
            let found = hasher.finish();
            if found != expected {
                return Err(CacheError::FileHash { uri, name, expected: expected.into(), found: found.into() });
            }
        }
        Ok(())
    }
}

impl Label {
    /// An error of a stream: one of ours that went through it, or one of the decoder.
    fn error(&self, error: io::Error) -> CacheError {
        CacheError::from_io(error).unwrap_or_else(|source| {
            let Self { uri, name } = self.clone();
            CacheError::Decompress { uri, name, source }
        })
    }
}

/// A file that a decoder reads and we still have.
#[derive(Clone)]
struct Shared(Arc<Mutex<FileCheck>>);

impl Read for Shared {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(buf)
    }
}

/// An archive. Its errors are [`CacheError`]s within errors of I/O.
pub struct NarReader {
    decoder: Option<Box<dyn Read + Send>>,
    file: Shared,
    label: Label,
    size_bytes: u64,
    expected_size: u64,
}

impl std::fmt::Debug for NarReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NarReader")
            .field("label", &self.label)
            .field("size_bytes", &self.size_bytes)
            .finish_non_exhaustive()
    }
}

impl NarReader {
    /// `source` is the file that the narinfo file of the cache `uri` names.
    pub fn new(uri: &str, info: &NarInfo, source: Box<dyn Read + Send>) -> Result<Self, CacheError> {
        let label = Label { uri: uri.to_owned(), name: info.url.clone() };
        let method = Method::parse(&info.compression)
            .ok_or_else(|| CacheError::Compression { uri: uri.to_owned(), method: info.compression.clone() })?;
        let nar_hash = info.info.nar_hash.to_hash();
        let mut hasher = info.file_hash.map(|hash| (Hasher::new(hash.algorithm()), hash));
        let mut expected_size = info.file_size_bytes;
        if method == Method::None {
            // The file is the archive, which is hashed where it is unpacked.
            hasher = hasher.filter(|(_, hash)| *hash != nar_hash);
            expected_size = Some(expected_size.unwrap_or(info.info.nar_size_bytes));
        }
        let file = FileCheck { source, label: label.clone(), size_bytes: 0, expected_size, hasher };
        let file = Shared(Arc::new(Mutex::new(file)));
        let decoder = method.decoder(file.clone()).map_err(|error| label.error(error))?;
        let expected_size = info.info.nar_size_bytes;
        Ok(Self { decoder: Some(decoder), file, label, size_bytes: 0, expected_size })
    }

    /// The same archive, decompressed in another thread if it is large enough for that.
    pub fn ahead(self) -> Box<dyn Read + Send> {
        if self.expected_size < AHEAD_FROM { Box::new(self) } else { Box::new(Ahead::new(self)) }
    }

    fn next(&mut self, buf: &mut [u8]) -> Result<usize, CacheError> {
        let Some(decoder) = &mut self.decoder else { return Ok(0) };
        let n = loop {
            match decoder.read(buf) {
                Ok(n) => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.label.error(error)),
            }
        };
        if n == 0 {
            self.decoder = None;
            self.file.0.lock().unwrap_or_else(PoisonError::into_inner).finish()?;
            return Ok(0);
        }
        self.size_bytes += n as u64;
        if self.size_bytes > self.expected_size {
            let Label { uri, name } = self.label.clone();
            return Err(CacheError::MoreThanSaid { uri, name, expected: self.expected_size });
        }
        Ok(n)
    }
}

impl Read for NarReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() { Ok(0) } else { self.next(buf).map_err(io::Error::other) }
    }
}

/// Blocks that another thread reads. It ends by itself when nobody wants them any more.
struct Ahead {
    blocks: Receiver<io::Result<Vec<u8>>>,
    block: Vec<u8>,
    at: usize,
}

impl Ahead {
    fn new(mut source: NarReader) -> Self {
        let (send, blocks) = bounded::<io::Result<Vec<u8>>>(BLOCKS);
        let run = move || {
            loop {
                let mut block = vec![0; BLOCK];
                let mut filled = 0;
                let failed = loop {
                    match source.read(block.get_mut(filled..).unwrap_or_default()) {
                        Ok(0) => break None,
                        Ok(n) => filled += n,
                        Err(error) => break Some(error),
                    }
                };
                block.truncate(filled);
                let ended = filled < BLOCK;
                if (filled > 0 && send.send(Ok(block)).is_err()) || (ended && failed.is_none()) {
                    return;
                }
                if let Some(error) = failed {
                    // Whoever reads has the error, or has gone.
                    let _ = send.send(Err(error));
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("decompress".to_owned()).spawn(run) {
            let (send, blocks) = bounded(1);
            let _ = send.send(Err(error));
            return Self { blocks, block: Vec::new(), at: 0 };
        }
        Self { blocks, block: Vec::new(), at: 0 }
    }
}

impl Read for Ahead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() {
            match self.blocks.recv() {
                Ok(block) => (self.block, self.at) = (block?, 0),
                Err(_) => return Ok(0),
            }
        }
        let left = self.block.get(self.at..).unwrap_or_default();
        let n = left.len().min(buf.len());
        if let (Some(to), Some(from)) = (buf.get_mut(..n), left.get(..n)) {
            to.copy_from_slice(from);
        }
        self.at += n;
        Ok(n)
    }
}
