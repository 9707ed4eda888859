//! The archive of a tree on disk.
//!
//! The walk is a machine that fills blocks ([`Dumper::fill`]) and keeps its place between them, so
//! that reading and what is done with the bytes (hashing, writing, restoring elsewhere) can share a
//! thread or have one each. It holds directory descriptors and goes by single names below them,
//! never by longer paths; the number of descriptors is bounded, whatever the depth.
//!
//! No mmap: measured, it takes twice the time of `read` into a block.
//! Source: formats, 3.3 to 3.5; `restore_dump.json`, `case_hack.json`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use larder_core::nar::case_hack::{self, CaseHackError};
use larder_core::nar::{Encoder, Event, Shown};
use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Stat};
use rustix::io::Errno;

use crate::pipe::{self, BLOCK_BYTES};

/// A step that is no file contents (a name, a target, their framing) adds less than this.
const STEP_BYTES: usize = 8 * 1024;

/// Directories that are open at once; those further out are opened again on the way back.
const MAX_OPEN: usize = 32;

/// How to dump.
#[derive(Debug, Clone, Copy, Default)]
pub struct DumpOptions<'a> {
    /// Drop the suffixes that restoring with the case hack gave to names.
    pub case_hack: bool,
    /// Where the directory is that names are relative to: for messages only.
    pub below: Option<&'a Path>,
}

/// Why a tree could not be dumped. The wording is Nix's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DumpError {
    #[error("{doing} '{}'", Shown(path.as_os_str().as_bytes()))]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("file '{}' has an unsupported type", Shown(path.as_os_str().as_bytes()))]
    UnsupportedType { path: PathBuf },
    #[error("file '{}' shrank while it was read, {missing_bytes} bytes are missing", Shown(path.as_os_str().as_bytes()))]
    Shrank { path: PathBuf, missing_bytes: u64 },
    #[error("directory '{}' was moved while it was read", Shown(path.as_os_str().as_bytes()))]
    Moved { path: PathBuf },
    #[error(
        "file name collision between '{}' and '{}'",
        Shown(first.as_os_str().as_bytes()),
        Shown(second.as_os_str().as_bytes())
    )]
    Collision { first: PathBuf, second: PathBuf },
    #[error("cannot dump directory '{}'", Shown(path.as_os_str().as_bytes()))]
    CaseHack { path: PathBuf, source: CaseHackError },
}

/// A stream failed at its source, or where it goes.
#[derive(Debug, thiserror::Error)]
pub enum StreamError<E: std::error::Error + 'static> {
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error(transparent)]
    Sink(E),
}

/// A walk over one tree, giving its archive.
#[derive(Debug)]
pub struct Dumper<'a> {
    at: BorrowedFd<'a>,
    root: &'a OsStr,
    options: DumpOptions<'a>,
    encoder: Encoder,
    begun: bool,
    file: Option<OpenFile>,
    /// Open directories, outermost first; the innermost `MAX_OPEN` have their descriptor.
    open: Vec<Directory>,
    /// Directories that are done with, kept for their buffers.
    spare: Vec<Directory>,
    /// Where directory entries are read to; `fill` keeps no other buffer.
    entries: Vec<u8>,
    /// Bytes of the archive that are still to be left out.
    skip: u64,
}

#[derive(Debug)]
struct OpenFile {
    fd: OwnedFd,
    left: u64,
}

#[derive(Debug, Default)]
struct Directory {
    fd: Option<OwnedFd>,
    /// Device and inode, known when the descriptor has been given up.
    identity: (u64, u64),
    /// All names on disk, in one row.
    names: Vec<u8>,
    /// Sorted by the name in the archive.
    entries: Vec<Entry>,
    /// How many entries have been begun.
    begun: usize,
}

/// A name in `Directory::names`.
#[derive(Debug, Clone, Copy)]
struct Entry {
    start: usize,
    length: u16,
    /// The name in the archive is the beginning of that on disk.
    archive_length: u16,
    kind: FileType,
}

/// Dumps the tree `name` below the directory `at` into `sink`; gives the size in bytes.
///
/// `name` may be a longer path, of which the last part alone is not followed if a symlink.
/// `sink` gets pieces of up to [`BLOCK_BYTES`], none empty. All is done on the caller's thread:
/// take this where there are many trees to share the cores, [`dump_pipelined`] where there is one.
pub fn dump<E: std::error::Error>(
    at: impl AsFd,
    name: &OsStr,
    options: &DumpOptions<'_>,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<u64, StreamError<E>> {
    let mut dumper = Dumper::new(at.as_fd(), name, *options);
    let (mut block, mut size_bytes) = (Vec::with_capacity(BLOCK_BYTES), 0);
    loop {
        block.clear();
        let more = dumper.fill(&mut block)?;
        size_bytes += block.len() as u64;
        sink(&block).map_err(StreamError::Sink)?;
        if !more {
            return Ok(size_bytes);
        }
    }
}

/// As [`dump`], but a tree beyond half a MiB is read on a thread of its own, ahead of `sink`.
pub fn dump_pipelined<E: std::error::Error>(
    at: impl AsFd,
    name: &OsStr,
    options: &DumpOptions<'_>,
    sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<u64, StreamError<E>> {
    pumped(Dumper::new(at.as_fd(), name, *options), sink)
}

/// The same without the first `skipped` bytes; contents of files among them are not read.
pub fn dump_pipelined_after<E: std::error::Error>(
    at: impl AsFd,
    name: &OsStr,
    options: &DumpOptions<'_>,
    skipped: u64,
    sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<u64, StreamError<E>> {
    pumped(Dumper::new(at.as_fd(), name, *options).after(skipped), sink)
}

fn pumped<E: std::error::Error>(
    mut dumper: Dumper<'_>,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<u64, StreamError<E>> {
    let mut size_bytes = 0;
    pipe::pump(
        |block| dumper.fill(block),
        |block| {
            size_bytes += block.len() as u64;
            sink(block).map_err(StreamError::Sink)
        },
    )?;
    Ok(size_bytes)
}

impl<'a> Dumper<'a> {
    /// A walk over `name` below `at`; nothing is looked at yet.
    pub fn new(at: BorrowedFd<'a>, name: &'a OsStr, options: DumpOptions<'a>) -> Self {
        Self {
            at,
            root: name,
            options,
            encoder: Encoder::new(),
            begun: false,
            file: None,
            open: Vec::new(),
            spare: Vec::new(),
            entries: Vec::new(),
            skip: 0,
        }
    }

    /// Leaves out the first bytes of the archive.
    #[must_use]
    pub fn after(self, skipped: u64) -> Self {
        Self { skip: skipped, ..self }
    }

    /// Appends to `block` what its capacity holds; is there more to come?
    ///
    /// Adds at least one byte, unless all that is left is left out. The capacity should be [`BLOCK_BYTES`]; below 16 KiB it grows.
    pub fn fill(&mut self, block: &mut Vec<u8>) -> Result<bool, DumpError> {
        if block.capacity() < 2 * STEP_BYTES {
            block.reserve(2 * STEP_BYTES - block.len());
        }
        let mut from = block.len();
        if !self.begun {
            self.begun = true;
            self.begin_root(block)?;
        }
        loop {
            if self.skip > 0 {
                let left_out = usize::try_from(self.skip).unwrap_or(usize::MAX).min(block.len() - from);
                block.drain(from..from + left_out);
                self.skip -= left_out as u64;
                from = block.len();
            }
            if block.capacity() - block.len() < STEP_BYTES {
                return Ok(true);
            }
            if let Some(file) = &mut self.file {
                if file.left > 0 {
                    self.read(block)?;
                } else {
                    self.file = None;
                    self.encoder.push(Event::EndFile, block);
                }
            } else if let Some(directory) = self.open.last_mut() {
                if directory.begun < directory.entries.len() {
                    directory.begun += 1;
                    self.begin_entry(block)?;
                } else {
                    self.encoder.push(Event::EndDirectory, block);
                    self.leave()?;
                }
            } else {
                return Ok(false);
            }
        }
    }

    fn begin_root(&mut self, block: &mut Vec<u8>) -> Result<(), DumpError> {
        let stat = rustix::fs::statat(self.at, self.root, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| self.io("getting status of", e))?;
        let name = self.root;
        let fd = self.at;
        let opened = begin(fd, name.as_bytes(), kind_of(&stat));
        self.begun_node(opened, block)
    }

    fn begin_entry(&mut self, block: &mut Vec<u8>) -> Result<(), DumpError> {
        let directory = self.open.last().expect("an entry is in a directory");
        let entry = directory.current().expect("the entry has been begun");
        let name = directory.name(entry);
        let (archived, _) = name.split_at(usize::from(entry.archive_length));
        self.encoder.push(Event::Entry { name: archived }, block);
        let fd = directory.fd.as_ref().expect("the innermost directory is open").as_fd();
        let opened = match entry.kind {
            FileType::Unknown => rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| ("getting status of", e))
                .and_then(|stat| begin(fd, name, kind_of(&stat))),
            kind => begin(fd, name, kind),
        };
        self.begun_node(opened, block)
    }

    fn begun_node(
        &mut self,
        opened: Result<Opened, (&'static str, Errno)>,
        block: &mut Vec<u8>,
    ) -> Result<(), DumpError> {
        match opened.map_err(|(doing, e)| self.io(doing, e))? {
            Opened::File { fd, executable, size_bytes } => {
                self.encoder.push(Event::File { executable, size_bytes }, block);
                self.file = Some(OpenFile { fd, left: size_bytes });
            }
            Opened::Symlink { target } => self.encoder.push(Event::Symlink { target: &target }, block),
            Opened::Directory { fd } => {
                self.encoder.push(Event::Directory, block);
                self.enter(fd)?;
            }
            Opened::Unsupported => return Err(DumpError::UnsupportedType { path: self.path() }),
        }
        Ok(())
    }

    /// Reads more of the open file, up to its size when it was opened.
    fn read(&mut self, block: &mut Vec<u8>) -> Result<(), DumpError> {
        let file = self.file.as_mut().expect("a file is open");
        let left_out = self.skip.min(file.left);
        if left_out > 0 {
            let there = rustix::fs::seek(&file.fd, SeekFrom::Current(i64::try_from(left_out).unwrap_or(i64::MAX)));
            file.left -= left_out;
            self.skip -= left_out;
            return there.map(drop).map_err(|e| self.io("reading from file", e));
        }
        let before = block.len();
        loop {
            match rustix::io::read(&file.fd, spare_capacity(block)) {
                Ok(0) => return Err(DumpError::Shrank { missing_bytes: file.left, path: self.path() }),
                Ok(read) => {
                    // A file that grows is cut.
                    let read = usize::try_from(file.left).map_or(read, |left| left.min(read));
                    block.truncate(before + read);
                    file.left -= read as u64;
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.io("reading from file", e)),
            }
        }
    }

    /// Reads a directory whole, and goes into it.
    fn enter(&mut self, fd: OwnedFd) -> Result<(), DumpError> {
        let mut directory = self.spare.pop().unwrap_or_default();
        if let Err(e) = directory.list(&fd, &mut self.entries) {
            return Err(self.io("reading directory", e));
        }
        if let Err(source) = directory.sort(self.options.case_hack) {
            return Err(DumpError::CaseHack { path: self.path(), source });
        }
        if self.options.case_hack
            && let Some((first, second)) = directory.collision()
        {
            let path = self.path();
            return Err(DumpError::Collision {
                first: path.join(OsStr::from_bytes(first)),
                second: path.join(OsStr::from_bytes(second)),
            });
        }
        directory.fd = Some(fd);
        self.open.push(directory);
        // Deeper than that, a directory further out gives up its descriptor.
        if let Some(outer) = self.open.len().checked_sub(MAX_OPEN + 1).and_then(|at| self.open.get_mut(at))
            && let Some(fd) = outer.fd.take()
        {
            match rustix::fs::fstat(&fd) {
                Ok(stat) => outer.identity = identity_of(&stat),
                Err(e) => return Err(self.io("getting status of a directory above", e)),
            }
        }
        Ok(())
    }

    /// Leaves the innermost directory, which is done.
    fn leave(&mut self) -> Result<(), DumpError> {
        let mut done = self.open.pop().expect("a directory is open");
        let inner = done.fd.take().expect("the innermost directory is open");
        if let Some(outer) = self.open.last_mut()
            && outer.fd.is_none()
        {
            let identity = outer.identity;
            let fd = reopen_parent(&inner).map_err(|e| self.io("opening the parent of directory", e))?;
            if rustix::fs::fstat(&fd).map(|stat| identity_of(&stat)) != Ok(identity) {
                return Err(DumpError::Moved { path: self.path() });
            }
            if let Some(outer) = self.open.last_mut() {
                outer.fd = Some(fd);
            }
        }
        done.clear();
        self.spare.push(done);
        Ok(())
    }

    /// The path of the node that is being dumped.
    fn path(&self) -> PathBuf {
        let mut path = self.options.below.map(Path::to_owned).unwrap_or_default();
        path.push(self.root);
        for directory in &self.open {
            if let Some(entry) = directory.current() {
                path.push(OsStr::from_bytes(directory.name(entry)));
            }
        }
        path
    }

    fn io(&self, doing: &'static str, error: impl Into<io::Error>) -> DumpError {
        DumpError::Io { doing, path: self.path(), source: error.into() }
    }
}

impl Directory {
    /// The entry that was begun last.
    fn current(&self) -> Option<Entry> {
        self.entries.get(self.begun.checked_sub(1)?).copied()
    }

    fn name(&self, entry: Entry) -> &[u8] {
        name_in(&self.names, entry)
    }

    fn list(&mut self, fd: &OwnedFd, buffer: &mut Vec<u8>) -> rustix::io::Result<()> {
        buffer.reserve(32 * 1024);
        let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Err(Errno::INTR) => continue,
                entry => entry?,
            };
            let name = entry.file_name().to_bytes();
            if !matches!(name, b"." | b"..") {
                let length = u16::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
                let start = self.names.len();
                self.names.extend_from_slice(name);
                self.entries.push(Entry { start, length, archive_length: length, kind: entry.file_type() });
            }
        }
        Ok(())
    }

    /// Brings the entries in the order of the archive.
    fn sort(&mut self, case_hack: bool) -> Result<(), CaseHackError> {
        let Self { names, entries, .. } = self;
        if case_hack {
            for entry in entries.iter_mut() {
                let name = case_hack::archive_name(name_in(names, *entry))?;
                entry.archive_length = u16::try_from(name.len()).expect("not longer than on disk");
            }
        }
        entries.sort_unstable_by(|a, b| {
            let by_archive = archived_in(names, *a).cmp(archived_in(names, *b));
            by_archive.then_with(|| name_in(names, *a).cmp(name_in(names, *b)))
        });
        Ok(())
    }

    /// Two names on disk, if any, that would be one in the archive.
    fn collision(&self) -> Option<(&[u8], &[u8])> {
        let pairs = self.entries.iter().zip(self.entries.iter().skip(1));
        pairs
            .map(|(a, b)| (*a, *b))
            .find(|(a, b)| archived_in(&self.names, *a) == archived_in(&self.names, *b))
            .map(|(a, b)| (self.name(a), self.name(b)))
    }

    fn clear(&mut self) {
        self.names.clear();
        self.entries.clear();
        self.begun = 0;
    }
}

fn name_in(names: &[u8], entry: Entry) -> &[u8] {
    names.get(entry.start..entry.start + usize::from(entry.length)).expect("entries lie in the names")
}

fn archived_in(names: &[u8], entry: Entry) -> &[u8] {
    names.get(entry.start..entry.start + usize::from(entry.archive_length)).expect("entries lie in the names")
}

/// A node, opened as what it is.
enum Opened {
    File { fd: OwnedFd, executable: bool, size_bytes: u64 },
    Symlink { target: Vec<u8> },
    Directory { fd: OwnedFd },
    Unsupported,
}

/// Opens `name`, which was of this `kind` when last seen.
fn begin(at: BorrowedFd<'_>, name: &[u8], kind: FileType) -> Result<Opened, (&'static str, Errno)> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match kind {
        FileType::RegularFile => {
            // Not to wait, should it be a fifo by now.
            let fd = rustix::fs::openat(at, name, flags | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())
                .map_err(|e| ("opening file", e))?;
            let stat = rustix::fs::fstat(&fd).map_err(|e| ("getting status of", e))?;
            if kind_of(&stat) != FileType::RegularFile {
                return Ok(Opened::Unsupported);
            }
            let executable = Mode::from_raw_mode(stat.st_mode).contains(Mode::XUSR);
            Ok(Opened::File { fd, executable, size_bytes: u64::try_from(stat.st_size).unwrap_or_default() })
        }
        FileType::Directory => rustix::fs::openat(at, name, flags | OFlags::DIRECTORY, Mode::empty())
            .map(|fd| Opened::Directory { fd })
            .map_err(|e| ("opening directory", e)),
        FileType::Symlink => rustix::fs::readlinkat(at, name, Vec::new())
            .map(|target| Opened::Symlink { target: target.into_bytes() })
            .map_err(|e| ("reading symbolic link", e)),
        _ => Ok(Opened::Unsupported),
    }
}

pub(crate) fn reopen_parent(inner: &OwnedFd) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::DIRECTORY;
    rustix::fs::openat(inner, c"..", flags, Mode::empty())
}

pub(crate) fn identity_of(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn kind_of(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}
