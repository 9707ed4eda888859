//! A tree on disk from its archive.
//!
//! A [`Restorer`] is pushed the bytes of an archive and creates what they say, below one name of a
//! directory that is held open. Everything is created anew (`O_EXCL`) by a single name below the
//! descriptor of its directory, and no symlink is followed, so that no archive can reach out of
//! its place. Memory and descriptors are bounded, whatever the depth and the sizes.
//!
//! Restoring for the store ([`Metadata::Store`]) gives each object its final mode and time when it
//! is created, so that a path need not be gone through again to make its metadata canonical.
//! Nothing is flushed to the disk: the store does that once for many paths.
//!
//! Source: formats, 3.2 to 3.5 and 4; `restore_dump.json`, `nar_reject.json`, `case_hack.json`.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use larder_core::nar::case_hack::{CaseHackError, Names};
use larder_core::nar::{Event, Limits, NarError, Parser, Shown};
use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

use crate::dump::{identity_of, reopen_parent};
use crate::pipe::{self, BLOCK_BYTES};

/// Directories that are open at once; those further out are opened again on the way back.
const MAX_OPEN: usize = 32;

/// Contents are written in pieces of at least this many bytes, but for the last of a file.
const WRITE_BYTES: usize = 64 * 1024;

/// Which modes and times the objects get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Metadata {
    /// As `nix-store --restore`: 0644, 0755 for executables and directories, times as they come.
    /// The umask of the process has no part in it.
    #[default]
    User,
    /// Canonical: 0444, 0555 for executables and directories, modified one second after the epoch.
    Store,
}

/// How to restore.
#[derive(Debug, Clone, Copy, Default)]
pub struct RestoreOptions<'a> {
    pub metadata: Metadata,
    /// Give a suffix to names that differ from others in case alone.
    pub case_hack: bool,
    /// Reserve the space of each file before writing it (setting `preallocate-contents`).
    pub preallocate: bool,
    pub limits: Limits,
    /// Extended attributes that may stay on store objects (setting `ignored-acls`).
    pub ignored_xattrs: &'a [String],
    /// Where the directory is that the name is in: for messages only.
    pub below: Option<&'a Path>,
}

/// Why an archive could not be restored. What has been created so far is left in place.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    #[error(transparent)]
    Nar(#[from] NarError),
    #[error("{doing} '{}'", Shown(path.as_os_str().as_bytes()))]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("creating symlink '{}' -> '{}'", Shown(path.as_os_str().as_bytes()), Shown(target))]
    Symlink { path: PathBuf, target: Vec<u8>, source: io::Error },
    #[error("cannot restore an entry of directory '{}'", Shown(path.as_os_str().as_bytes()))]
    CaseHack { path: PathBuf, source: CaseHackError },
    #[error("reading from file")]
    Input { source: io::Error },
    #[error("directory '{}' was moved while it was restored", Shown(path.as_os_str().as_bytes()))]
    Moved { path: PathBuf },
}

/// A tree has been restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Size of the archive, in bytes.
    pub nar_size_bytes: u64,
    /// Is the metadata canonical throughout? If not (for [`Metadata::User`] it never is), the file
    /// system gave the objects an owner or attributes of its own, and a pass of `canon` is due.
    pub canonical: bool,
}

/// Creates a tree from the bytes of its archive.
#[derive(Debug)]
pub struct Restorer<'a> {
    parser: Parser,
    tree: Tree<'a>,
}

/// What has been created, and where the next object goes.
#[derive(Debug)]
struct Tree<'a> {
    at: BorrowedFd<'a>,
    options: RestoreOptions<'a>,
    /// Open directories, outermost first; the innermost `MAX_OPEN` have their descriptor.
    open: Vec<Directory>,
    /// The name of the next object in the innermost open directory, or of the root.
    name: Vec<u8>,
    /// The path of that object.
    path: Vec<u8>,
    file: Option<File>,
    kinds: [Checked; 3],
    canonical: bool,
}

#[derive(Debug)]
struct Directory {
    fd: Option<OwnedFd>,
    /// Device and inode, known when the descriptor has been given up.
    identity: (u64, u64),
    path_length: usize,
    /// With the case hack.
    names: Option<Names>,
}

#[derive(Debug)]
struct File {
    fd: OwnedFd,
    left: u64,
    /// Contents that have come in pieces too small to be written.
    pending: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    File,
    Executable,
    Directory,
}

/// Does the mode that is asked for on creating come out? The first object of each kind tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Checked {
    Unknown,
    Fine,
    /// The umask or an ACL is in the way: each object gets its mode once more.
    Needed,
}

/// Restores the archive that comes from an open file, pipe or socket: `name` below `at`.
///
/// What follows the archive is not looked at, but may have been read. A regular file beyond half a
/// MiB is read on a thread of its own; the other end of a pipe is a process of its own already, and
/// need not be closed for this to end.
pub fn restore(
    input: impl AsFd,
    at: impl AsFd,
    name: &OsStr,
    options: RestoreOptions<'_>,
) -> Result<Restored, RestoreError> {
    restore_while(input, at, name, options, || Ok(()))
}

/// [`restore`], as long as `check`, which is asked at every block, gives no error.
pub fn restore_while<E: From<RestoreError>>(
    input: impl AsFd,
    at: impl AsFd,
    name: &OsStr,
    options: RestoreOptions<'_>,
    mut check: impl FnMut() -> Result<(), E>,
) -> Result<Restored, E> {
    enum Stop<E> {
        Done,
        Failed(E),
    }
    impl<E: From<RestoreError>> From<RestoreError> for Stop<E> {
        fn from(error: RestoreError) -> Self {
            Self::Failed(error.into())
        }
    }
    let input = input.as_fd();
    let failed = |e: Errno| RestoreError::Input { source: e.into() };
    let mut restorer = Restorer::new(at.as_fd(), name, options);
    let fill = |block: &mut Vec<u8>| loop {
        match rustix::io::read(input, spare_capacity(block)) {
            Ok(read) => return Ok(read > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(failed(e)),
        }
    };
    let mut sink = |block: &[u8]| {
        check().map_err(Stop::Failed)?;
        restorer.push(block)?;
        if restorer.is_done() { Err(Stop::Done) } else { Ok(()) }
    };
    let stat = rustix::fs::fstat(input).map_err(failed)?;
    let pumped = if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        pipe::pump(fill, sink)
    } else {
        let mut block = Vec::with_capacity(BLOCK_BYTES);
        loop {
            block.clear();
            match fill(&mut block) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
            if let Err(stop) = sink(&block) {
                break Err(stop);
            }
        }
    };
    match pumped {
        Ok(()) | Err(Stop::Done) => Ok(restorer.finish()?),
        Err(Stop::Failed(error)) => Err(error),
    }
}

impl<'a> Restorer<'a> {
    /// Will create `name` below `at`. `name` may be a longer path; its last part must not exist.
    pub fn new(at: BorrowedFd<'a>, name: &OsStr, options: RestoreOptions<'a>) -> Self {
        let path = options.below.map_or_else(|| PathBuf::from(name), |below| below.join(name));
        let tree = Tree {
            at,
            options,
            open: Vec::new(),
            name: name.as_bytes().to_vec(),
            path: path.into_os_string().into_vec(),
            file: None,
            kinds: [Checked::Unknown; 3],
            canonical: options.metadata == Metadata::Store,
        };
        Self { parser: Parser::new(options.limits), tree }
    }

    /// Takes more of the archive; gives how many of the bytes belong to it, which is all of them
    /// until it ends.
    ///
    /// After an error nothing more is created.
    pub fn push(&mut self, bytes: &[u8]) -> Result<usize, RestoreError> {
        let mut input = bytes;
        while let Some(event) = self.parser.next(&mut input)? {
            self.tree.create(event)?;
        }
        Ok(bytes.len() - input.len())
    }

    /// Has the archive ended?
    pub fn is_done(&self) -> bool {
        self.parser.is_done()
    }

    /// Ends the archive, which must be complete.
    pub fn finish(self) -> Result<Restored, RestoreError> {
        self.parser.finish()?;
        Ok(Restored { nar_size_bytes: self.parser.consumed(), canonical: self.tree.canonical })
    }
}

impl Tree<'_> {
    fn create(&mut self, event: Event<'_>) -> Result<(), RestoreError> {
        match event {
            Event::Directory => self.enter(),
            Event::Entry { name } => self.entry(name),
            Event::EndDirectory => self.leave(),
            Event::File { executable, size_bytes } => self.begin_file(executable, size_bytes),
            Event::Contents(piece) => self.contents(piece),
            Event::EndFile => self.end_file(),
            Event::Symlink { target } => self.symlink(target),
        }
    }

    fn entry(&mut self, name: &[u8]) -> Result<(), RestoreError> {
        let directory = self.open.last_mut().expect("an entry is in a directory");
        self.path.truncate(directory.path_length);
        self.name.clear();
        match &mut directory.names {
            None => self.name.extend_from_slice(name),
            Some(names) => match names.on_disk(name) {
                Ok(on_disk) => self.name.extend_from_slice(&on_disk),
                Err(source) => return Err(RestoreError::CaseHack { path: self.path(), source }),
            },
        }
        self.path.push(b'/');
        self.path.extend_from_slice(&self.name);
        Ok(())
    }

    fn enter(&mut self) -> Result<(), RestoreError> {
        rustix::fs::mkdirat(self.parent(), self.name.as_slice(), Mode::from_raw_mode(0o755))
            .map_err(|e| self.io("creating directory", e))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.parent(), self.name.as_slice(), flags, Mode::empty())
            .map_err(|e| self.io("opening directory", e))?;
        self.check(Kind::Directory, &fd)?;
        let names = self.options.case_hack.then(Names::default);
        self.open.push(Directory { fd: Some(fd), identity: (0, 0), path_length: self.path.len(), names });
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

    fn leave(&mut self) -> Result<(), RestoreError> {
        let done = self.open.pop().expect("a directory is open");
        self.path.truncate(done.path_length);
        let fd = done.fd.expect("the innermost directory is open");
        if let Some(outer) = self.open.last_mut()
            && outer.fd.is_none()
        {
            let identity = outer.identity;
            let above = reopen_parent(&fd).map_err(|e| self.io("opening the parent of directory", e))?;
            if rustix::fs::fstat(&above).map(|stat| identity_of(&stat)) != Ok(identity) {
                return Err(RestoreError::Moved { path: self.path() });
            }
            if let Some(outer) = self.open.last_mut() {
                outer.fd = Some(above);
            }
        }
        if self.options.metadata == Metadata::Store {
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o555)).map_err(|e| self.io("changing mode of", e))?;
            rustix::fs::futimens(&fd, &CANONICAL).map_err(|e| self.io("changing modification time of", e))?;
        }
        Ok(())
    }

    fn begin_file(&mut self, executable: bool, size_bytes: u64) -> Result<(), RestoreError> {
        let kind = if executable { Kind::Executable } else { Kind::File };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.parent(), self.name.as_slice(), flags, self.mode(kind))
            .map_err(|e| self.io("creating file", e))?;
        self.check(kind, &fd)?;
        if self.options.preallocate && size_bytes > 0 {
            match rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, size_bytes) {
                // As Nix: a file system that cannot do so is fine.
                Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => {}
                Err(e) => return Err(self.io("preallocating file", e)),
            }
        }
        let pending = self.file.take().map(|file| file.pending).unwrap_or_default();
        self.file = Some(File { fd, left: size_bytes, pending });
        Ok(())
    }

    fn contents(&mut self, piece: &[u8]) -> Result<(), RestoreError> {
        let file = self.file.as_mut().expect("contents are of an open file");
        file.left -= piece.len() as u64;
        let written = if file.pending.is_empty() && (file.left == 0 || piece.len() >= WRITE_BYTES) {
            write_all(&file.fd, piece)
        } else {
            file.pending.extend_from_slice(piece);
            if file.left > 0 && file.pending.len() < WRITE_BYTES {
                return Ok(());
            }
            let written = write_all(&file.fd, &file.pending);
            file.pending.clear();
            written
        };
        written.map_err(|e| self.io("writing to file", e))
    }

    fn end_file(&mut self) -> Result<(), RestoreError> {
        let file = self.file.take().expect("a file is open");
        if self.options.metadata == Metadata::Store {
            rustix::fs::futimens(&file.fd, &CANONICAL).map_err(|e| self.io("changing modification time of", e))?;
        }
        Ok(())
    }

    fn symlink(&mut self, target: &[u8]) -> Result<(), RestoreError> {
        let (parent, name) = (self.parent(), self.name.as_slice());
        rustix::fs::symlinkat(target, parent, name).map_err(|e| RestoreError::Symlink {
            path: self.path(),
            target: target.to_vec(),
            source: e.into(),
        })?;
        if self.options.metadata == Metadata::Store {
            rustix::fs::utimensat(parent, name, &CANONICAL, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| self.io("changing modification time of", e))?;
            if self.open.is_empty() {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|e| self.io("getting status of", e))?;
                self.canonical &= owner_is_us(&stat);
            }
        }
        Ok(())
    }

    /// Looks at the first object of each kind, and sets right what creating it did not.
    fn check(&mut self, kind: Kind, fd: &OwnedFd) -> Result<(), RestoreError> {
        let mode = self.mode(kind);
        let store = self.options.metadata == Metadata::Store;
        match self.kinds.get(kind as usize).expect("there are three kinds") {
            Checked::Fine => return Ok(()),
            Checked::Needed => return self.set_mode(fd, mode),
            Checked::Unknown => {}
        }
        if store && self.open.is_empty() {
            self.strip(fd)?;
        }
        let stat = rustix::fs::fstat(fd).map_err(|e| self.io("getting status of", e))?;
        let found = Mode::from_raw_mode(stat.st_mode);
        let state = if found == mode { Checked::Fine } else { Checked::Needed };
        if let Some(kind) = self.kinds.get_mut(kind as usize) {
            *kind = state;
        }
        if state == Checked::Needed {
            self.set_mode(fd, mode)?;
        }
        if store {
            self.canonical &= owner_is_us(&stat);
        }
        Ok(())
    }

    /// Rids the root of what it has from the directory it is in (an ACL, a group), so that what is
    /// created below has nothing to inherit.
    fn strip(&mut self, fd: &OwnedFd) -> Result<(), RestoreError> {
        let mut names = [0; 1024];
        let length = match rustix::fs::flistxattr(fd, &mut names[..]) {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP | Errno::NODATA) => 0,
            Err(Errno::RANGE) => {
                self.canonical = false;
                0
            }
            Err(e) => return Err(self.io("listing extended attributes of", e)),
        };
        let names = names.get(..length).unwrap_or_default().split(|b| *b == 0).filter(|name| !name.is_empty());
        for name in names {
            if self.options.ignored_xattrs.iter().any(|ignored| ignored.as_bytes() == name) {
            } else if matches!(name, b"system.posix_acl_access" | b"system.posix_acl_default") {
                rustix::fs::fremovexattr(fd, name).map_err(|e| self.io("removing extended attribute of", e))?;
            } else {
                self.canonical = false;
            }
        }
        Ok(())
    }

    fn set_mode(&self, fd: &OwnedFd, mode: Mode) -> Result<(), RestoreError> {
        rustix::fs::fchmod(fd, mode).map_err(|e| self.io("changing mode of", e))
    }

    /// The mode to create with; directories of the store get their final one when they are full.
    fn mode(&self, kind: Kind) -> Mode {
        Mode::from_raw_mode(match (self.options.metadata, kind) {
            (_, Kind::Directory) | (Metadata::User, Kind::Executable) => 0o755,
            (Metadata::User, Kind::File) => 0o644,
            (Metadata::Store, Kind::Executable) => 0o555,
            (Metadata::Store, Kind::File) => 0o444,
        })
    }

    /// The directory that the next object is created in.
    fn parent(&self) -> BorrowedFd<'_> {
        match self.open.last() {
            None => self.at,
            Some(directory) => directory.fd.as_ref().expect("the innermost directory is open").as_fd(),
        }
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(OsStr::from_bytes(&self.path))
    }

    fn io(&self, doing: &'static str, error: impl Into<io::Error>) -> RestoreError {
        RestoreError::Io { doing, path: self.path(), source: error.into() }
    }
}

/// One second after the epoch; the time of access stays.
const CANONICAL: Timestamps = Timestamps {
    last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
    last_modification: Timespec { tv_sec: 1, tv_nsec: 0 },
};

/// Does an object belong to this process, as what a process creates mostly does?
fn owner_is_us(stat: &Stat) -> bool {
    stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_gid == rustix::process::getegid().as_raw()
}

fn write_all(fd: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(fd, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
