//! Deleting trees, however deep, wide or closed they are.
//!
//! Below a held directory and by single names: a symlink that somebody puts into the tree while
//! it is deleted leads nowhere else, and a mount point is not entered. Descriptors and memory
//! are bounded: what lies deeper than [`MAX_DEPTH`] is first moved up to the root of the tree.
//! A tree that is being deleted is garbage already, so a crash in between costs nothing.

use std::ffi::{CString, OsStr};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use crate::entry::{Status, clear_frozen, clear_frozen_at, open_dir, open_path, proc_path};
use crate::file_error::{FileError, shown};
use crate::lock_file::retry;

/// Directories open at once for one tree (times the threads, if parallel).
pub const MAX_DEPTH: usize = 48;

/// Failures that are kept with their paths; beyond it they are counted only.
const MAX_FAILURES: usize = 100;

/// One read of a directory. It holds more than a thousand names, or a hundred very long ones.
const READ_BYTES: usize = 32 << 10;

/// How often a directory is read again because entries came in behind our back.
const MAX_PASSES: u32 = 32;

/// How many of the uppermost levels hand their subdirectories to other threads.
const PARALLEL_LEVELS: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFailure {
    /// Stop at the first entry that cannot be deleted.
    #[default]
    Stop,
    /// Delete what can be deleted.
    Continue,
}

/// What is gone.
#[derive(Debug, Default)]
pub struct Removed {
    /// Sum of the sizes of non-directories that had one link or two, when they were removed. Two,
    /// since `.links` may hold the other one, and its removal is not counted again.
    pub bytes_freed: u64,
    /// Entries of any kind.
    pub entries: u64,
    /// What is still there and why, the first hundred; only with [`OnFailure::Continue`].
    pub failures: Vec<FileError>,
    /// The number of all failures.
    pub failed: u64,
}

impl Removed {
    fn add(&mut self, other: Self) {
        self.bytes_freed += other.bytes_freed;
        self.entries += other.entries;
        self.failed += other.failed;
        let room = MAX_FAILURES.saturating_sub(self.failures.len());
        self.failures.extend(other.failures.into_iter().take(room));
    }
}

/// The deletion stopped at an entry; a part of the tree may be gone.
#[derive(Debug, thiserror::Error)]
#[error("{doing} '{}'", shown(path))]
pub struct RemoveError {
    pub doing: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
    /// What is gone nevertheless.
    pub removed: Box<Removed>,
}

impl RemoveError {
    fn new(error: FileError, removed: Removed) -> Self {
        Self { doing: error.doing, path: error.path, source: error.source, removed: Box::new(removed) }
    }
}

impl From<RemoveError> for FileError {
    fn from(e: RemoveError) -> Self {
        Self::new(e.doing, e.path, e.source)
    }
}

/// What to delete: the entry `name` of an open directory.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub dir: BorrowedFd<'a>,
    /// A single file name.
    pub name: &'a OsStr,
    /// How messages call the directory.
    pub dir_path: &'a Path,
}

/// Deletes a tree, or whatever the entry is.
///
/// Directories inside the tree are made accessible and writable first, and immutable and
/// append-only flags are cleared, where needed; the directory that holds the entry is left
/// alone. That an entry is not there, or goes while we look, is fine.
///
/// Errors: see [`OnFailure`]; `name` is no single file name.
pub fn remove(target: Target<'_>, on_failure: OnFailure) -> Result<Removed, RemoveError> {
    run(target, on_failure, 0)
}

/// The same, with the subdirectories of the upper levels shared out to the current rayon pool.
pub fn remove_parallel(target: Target<'_>, on_failure: OnFailure) -> Result<Removed, RemoveError> {
    run(target, on_failure, PARALLEL_LEVELS)
}

/// Deletes what a path names (its last component; symlinks before it are followed).
pub fn remove_path(path: &Path, on_failure: OnFailure) -> Result<Removed, RemoveError> {
    let refused = |e: Errno| RemoveError::new(FileError::new("deleting", path, e), Removed::default());
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(refused(Errno::INVAL)) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = match retry(|| rustix::fs::openat(CWD, parent, flags, Mode::empty())) {
        Err(Errno::NOENT) => return Ok(Removed::default()),
        other => other.map_err(refused)?,
    };
    remove(Target { dir: dir.as_fd(), name, dir_path: parent }, on_failure)
}

fn run(target: Target<'_>, on_failure: OnFailure, parallel_levels: usize) -> Result<Removed, RemoveError> {
    let bytes = target.name.as_bytes();
    let name = match CString::new(bytes) {
        Ok(name) if !matches!(bytes, b"" | b"." | b"..") && !bytes.contains(&b'/') => name,
        _ => {
            let error = FileError::new("deleting", target.dir_path.join(target.name), Errno::INVAL);
            return Err(RemoveError::new(error, Removed::default()));
        }
    };
    let top = Top { dir: target.dir, path: target.dir_path, name, inside: false };
    Remover::new(&top, on_failure, parallel_levels).run()
}

/// Where a [`Remover`] starts.
struct Top<'a> {
    dir: BorrowedFd<'a>,
    path: &'a Path,
    name: CString,
    /// Does the directory belong to the tree, so that we may change it?
    inside: bool,
}

/// A directory that is being emptied.
struct Level {
    fd: OwnedFd,
    /// In the level above.
    name: CString,
    /// Subdirectories of the last read that are still to be entered.
    subdirs: Vec<CString>,
    read_all: bool,
    passes: u32,
    /// Something in it stays, so it stays too, and that is no failure of its own.
    keeps: bool,
}

struct Remover<'a> {
    top: &'a Top<'a>,
    levels: Vec<Level>,
    on_failure: OnFailure,
    parallel_levels: usize,
    removed: Removed,
    buffer: Vec<u8>,
    /// Serial number for the names of what is moved up.
    moved: u64,
}

/// Something went wrong, and we stop.
struct Stop(FileError);

/// What became of an entry.
enum Outcome {
    Gone,
    IsDirectory,
}

impl<'a> Remover<'a> {
    fn new(top: &'a Top<'a>, on_failure: OnFailure, parallel_levels: usize) -> Self {
        let (levels, removed) = (Vec::new(), Removed::default());
        Self { top, levels, on_failure, parallel_levels, removed, buffer: Vec::new(), moved: 0 }
    }

    fn run(mut self) -> Result<Removed, RemoveError> {
        let name = self.top.name.clone();
        let mut result = self.unlink(&name).and_then(|outcome| match outcome {
            Outcome::Gone => Ok(()),
            Outcome::IsDirectory => self.enter(name),
        });
        while result.is_ok() && !self.levels.is_empty() {
            result = self.step();
        }
        match result {
            Ok(()) => Ok(self.removed),
            Err(Stop(error)) => Err(RemoveError::new(error, self.removed)),
        }
    }

    /// One piece of work in the innermost directory.
    fn step(&mut self) -> Result<(), Stop> {
        let depth = self.levels.len();
        let Some(level) = self.levels.last_mut() else { return Ok(()) };
        if level.subdirs.len() > 1 && depth <= self.parallel_levels {
            let subdirs = std::mem::take(&mut level.subdirs);
            return self.share_out(subdirs);
        }
        if let Some(name) = level.subdirs.pop() {
            return if depth < MAX_DEPTH { self.enter(name) } else { self.move_up(&name) };
        }
        if !level.read_all {
            return self.read();
        }
        self.leave()
    }

    /// The innermost open directory, or the one that holds the tree.
    fn dir(&self) -> BorrowedFd<'_> {
        self.levels.last().map_or(self.top.dir, |level| level.fd.as_fd())
    }

    /// Reads one buffer full of names; deletes what is no directory.
    fn read(&mut self) -> Result<(), Stop> {
        let mut names = Vec::new();
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.reserve(READ_BYTES);
        let read = read_names(self.dir(), buffer.spare_capacity_mut(), &mut names);
        self.buffer = buffer;
        match read {
            // Deleted by somebody else: it reads as empty, or not at all.
            Ok(0) | Err(Errno::NOENT) => self.mark(|level| level.read_all = true),
            Ok(_) => {}
            Err(e) => {
                self.mark(|level| level.read_all = true);
                self.fail("reading directory", None, e)?;
            }
        }
        for (name, kind) in names {
            let outcome = if kind == FileType::Directory { Outcome::IsDirectory } else { self.unlink(&name)? };
            if matches!(outcome, Outcome::IsDirectory) {
                self.mark(|level| level.subdirs.push(name));
            }
        }
        Ok(())
    }

    /// Deletes an entry of the innermost directory that is no directory itself.
    fn unlink(&mut self, name: &CString) -> Result<Outcome, Stop> {
        for last_try in [false, true] {
            let status = match Status::at(self.dir(), name) {
                Ok(status) if status.kind == FileType::Directory => return Ok(Outcome::IsDirectory),
                Ok(status) => status,
                Err(Errno::NOENT) => return Ok(Outcome::Gone),
                Err(Errno::ACCESS) if !last_try && self.loosen() => continue,
                Err(e) => return self.fail("getting status of", Some(name), e).map(|()| Outcome::Gone),
            };
            match retry(|| rustix::fs::unlinkat(self.dir(), name, AtFlags::empty())) {
                Ok(()) => {
                    self.removed.entries += 1;
                    if status.links <= 2 {
                        self.removed.bytes_freed += status.size;
                    }
                    return Ok(Outcome::Gone);
                }
                Err(Errno::NOENT) => return Ok(Outcome::Gone),
                Err(Errno::ISDIR) => return Ok(Outcome::IsDirectory),
                Err(Errno::ACCESS | Errno::PERM) if !last_try => {
                    self.loosen();
                    if status.frozen {
                        let _ = clear_frozen_at(self.dir(), name);
                    }
                }
                Err(e) => return self.fail("deleting", Some(name), e).map(|()| Outcome::Gone),
            }
        }
        Ok(Outcome::Gone)
    }

    /// Opens a subdirectory as the new innermost one.
    fn enter(&mut self, name: CString) -> Result<(), Stop> {
        match self.open(&name) {
            Ok(fd) => {
                self.levels.push(Level { fd, name, subdirs: Vec::new(), read_all: false, passes: 0, keeps: false });
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            // No directory any more.
            Err(Errno::NOTDIR | Errno::LOOP) => match self.unlink(&name)? {
                Outcome::Gone => Ok(()),
                Outcome::IsDirectory if self.levels.is_empty() => self.fail("deleting", Some(&name), Errno::AGAIN),
                Outcome::IsDirectory => {
                    self.mark(|level| level.subdirs.push(name));
                    Ok(())
                }
            },
            Err(e) => self.fail("opening directory", Some(&name), e),
        }
    }

    fn open(&self, name: &CString) -> rustix::io::Result<OwnedFd> {
        let mut opened = open_dir(self.dir(), name);
        if matches!(opened, Err(Errno::ACCESS)) && self.loosen() {
            opened = open_dir(self.dir(), name);
        }
        if matches!(opened, Err(Errno::ACCESS)) {
            let closed = open_path(self.dir(), name)?;
            make_accessible(closed.as_fd())?;
            opened = open_dir(closed.as_fd(), c".");
        }
        let fd = opened?;
        let status = Status::of(fd.as_fd())?;
        if status.mount_root {
            return Err(Errno::BUSY);
        }
        // Only root can delete without the owner's permissions; and nobody from a frozen one.
        if status.frozen || (status.mode & 0o700 != 0o700 && !rustix::process::geteuid().is_root()) {
            loosen(fd.as_fd());
        }
        Ok(fd)
    }

    /// The innermost directory has been read to its end.
    fn leave(&mut self) -> Result<(), Stop> {
        let Some(level) = self.levels.pop() else { return Ok(()) };
        if level.keeps {
            self.mark(|parent| parent.keeps = true);
            return Ok(());
        }
        let remove = || retry(|| rustix::fs::unlinkat(self.dir(), &level.name, AtFlags::REMOVEDIR));
        let mut result = remove();
        if matches!(result, Err(Errno::ACCESS | Errno::PERM)) {
            self.loosen();
            loosen(level.fd.as_fd());
            result = remove();
        }
        match result {
            Ok(()) => {
                self.removed.entries += 1;
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTEMPTY | Errno::EXIST) if level.passes < MAX_PASSES => self.again(level),
            // Another process has put something else in its place.
            Err(Errno::NOTDIR) if level.passes < MAX_PASSES => self.unlink(&level.name).map(drop),
            Err(e) => self.fail("deleting", Some(&level.name), e),
        }
    }

    /// Reads the directory from the start: entries came in, or reading skipped some while others
    /// were deleted (which POSIX allows).
    fn again(&mut self, mut level: Level) -> Result<(), Stop> {
        let sought = rustix::fs::seek(&level.fd, SeekFrom::Start(0));
        level.read_all = false;
        level.passes += 1;
        self.levels.push(level);
        sought.map(drop).or_else(|e| {
            self.mark(|level| level.read_all = true);
            self.fail("reading directory", None, e)
        })
    }

    /// Takes a subdirectory that lies too deep to the root of the tree, where the next pass over
    /// the root finds it.
    fn move_up(&mut self, name: &CString) -> Result<(), Stop> {
        loop {
            let number = self.moved;
            self.moved += 1;
            let (Some(root), Some(level)) = (self.levels.first(), self.levels.last()) else { return Ok(()) };
            let up = format!(".removing-{number}");
            // What it may replace is an empty directory of the tree.
            let rename = || rustix::fs::renameat(&level.fd, name, &root.fd, up.as_str());
            let mut result = rename();
            if matches!(result, Err(Errno::ACCESS | Errno::PERM)) {
                loosen(root.fd.as_fd());
                loosen(level.fd.as_fd());
                if let Ok(moved) = open_path(level.fd.as_fd(), name) {
                    let _ = make_accessible(moved.as_fd());
                    let _ = clear_frozen_at(level.fd.as_fd(), name);
                }
                result = rename();
            }
            match result {
                Ok(()) => {
                    if let Some(root) = self.levels.first_mut() {
                        root.passes = 0;
                    }
                    return Ok(());
                }
                Err(Errno::NOENT) => return Ok(()),
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR | Errno::ISDIR) if number < u64::from(u32::MAX) => {}
                Err(e) => return self.fail("moving up for deletion", Some(name), e),
            }
        }
    }

    /// Deletes subdirectories of the innermost directory in parallel.
    fn share_out(&mut self, subdirs: Vec<CString>) -> Result<(), Stop> {
        let (dir, path) = (self.dir(), self.path(None));
        let (on_failure, levels) = (self.on_failure, self.parallel_levels - self.levels.len());
        let results: Vec<_> = subdirs
            .into_par_iter()
            .map(|name| {
                let top = Top { dir, path: &path, name, inside: true };
                Remover::new(&top, on_failure, levels).run()
            })
            .collect();
        let mut first = Ok(());
        for result in results {
            match result {
                Ok(removed) => {
                    if removed.failed > 0 {
                        self.mark(|level| level.keeps = true);
                    }
                    self.removed.add(removed);
                }
                Err(mut e) => {
                    self.removed.add(std::mem::take(&mut *e.removed));
                    first = first.and(Err(Stop(e.into())));
                }
            }
        }
        first
    }

    fn mark(&mut self, change: impl FnOnce(&mut Level)) {
        if let Some(level) = self.levels.last_mut() {
            change(level);
        }
    }

    /// Lets us write in the innermost directory, if it is part of the tree. Did that change it?
    fn loosen(&self) -> bool {
        (self.top.inside || !self.levels.is_empty()) && loosen(self.dir())
    }

    /// An entry of the innermost directory, or that directory itself, cannot be deleted.
    fn fail(&mut self, doing: &'static str, name: Option<&CString>, e: Errno) -> Result<(), Stop> {
        let error = FileError::new(doing, self.path(name), e);
        if self.on_failure == OnFailure::Stop {
            return Err(Stop(error));
        }
        self.mark(|level| level.keeps = true);
        self.removed.failed += 1;
        if self.removed.failures.len() < MAX_FAILURES {
            self.removed.failures.push(error);
        }
        Ok(())
    }

    fn path(&self, name: Option<&CString>) -> PathBuf {
        let names = self.levels.iter().map(|level| &level.name).chain(name);
        let mut path = self.top.path.to_owned();
        path.extend(names.map(|name| OsStr::from_bytes(name.as_bytes())));
        path
    }
}

/// One `getdents`: appends names and types, tells how many entries there were, `.` and `..`
/// included.
fn read_names(
    dir: BorrowedFd<'_>,
    buffer: &mut [MaybeUninit<u8>],
    names: &mut Vec<(CString, FileType)>,
) -> rustix::io::Result<usize> {
    let mut entries = RawDir::new(dir, buffer);
    let mut count = 0;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        count += 1;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push((name.to_owned(), entry.file_type()));
        }
        if entries.is_buffer_empty() {
            break;
        }
    }
    Ok(count)
}

/// Gives the owner all permissions on an open directory and clears its flags. Did that change it?
fn loosen(dir: BorrowedFd<'_>) -> bool {
    let Ok(status) = Status::of(dir) else { return false };
    let thawed = status.frozen && clear_frozen(dir).is_ok();
    let opened =
        status.mode & 0o700 != 0o700 && rustix::fs::fchmod(dir, Mode::from_raw_mode(status.mode | 0o700)).is_ok();
    thawed || opened
}

/// The same permissions for a directory that is open as a path only.
fn make_accessible(dir: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let status = Status::of(dir)?;
    if status.kind != FileType::Directory {
        return Err(Errno::NOTDIR);
    }
    rustix::fs::chmod(proc_path(dir), Mode::from_raw_mode(status.mode | 0o700))
}
