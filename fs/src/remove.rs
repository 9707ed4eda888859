//! Deleting trees, however deep, wide or closed they are.
//!
//! Below a held directory and by single names: a symlink that somebody puts into the tree while
//! it is deleted leads nowhere else, and a mount point is not entered. Descriptors and memory
//! are bounded: what lies deeper than a few dozen levels is first moved up to the root of the tree.
//! A tree that is being deleted is garbage already, so a crash in between costs nothing.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};
use rustc_hash::FxHashSet;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::entry::{
    MAX_OPEN, Names, Status, Target, clear_frozen, clear_frozen_at, open_dir, open_path, proc_path, read_names,
};
use crate::file_error::{FileError, shown};
use crate::lock_file::retry;

/// Failures that are kept with their paths; beyond it they are counted only.
const MAX_FAILURES: usize = 100;

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

/// The same, but hard links are counted as they are: a file counts when its last name in the store
/// goes, whichever thread takes it, be there an entry of `.links` for it or not.
pub fn remove_counted(target: Target<'_>, on_failure: OnFailure, links: &LinkCounts) -> Result<Removed, RemoveError> {
    let name = target.checked_name("deleting").map_err(|e| RemoveError::new(e, Removed::default()))?;
    let top = Top { dir: target.dir, path: target.dir_path, name, inside: false };
    let mut remover = Remover::new(&top, on_failure, PARALLEL_LEVELS);
    remover.links = Some(links);
    remover.run()
}

/// [`remove_counted`] of what goes at once: no directory, and no file of more than 16 MiB, which keeps
/// some file systems busy. Of those nothing is done, and `None` given.
pub fn remove_small_counted(target: Target<'_>, links: &LinkCounts) -> Result<Option<Removed>, RemoveError> {
    let name = target.checked_name("deleting").map_err(|e| RemoveError::new(e, Removed::default()))?;
    let top = Top { dir: target.dir, path: target.dir_path, name, inside: false };
    let mut remover = Remover::new(&top, OnFailure::Stop, 0);
    remover.links = Some(links);
    remover.most_bytes = 16 << 20;
    match remover.unlink(&top.name) {
        Ok(Outcome::Gone) => Ok(Some(remover.removed)),
        Ok(Outcome::IsDirectory | Outcome::TooLarge) => Ok(None),
        Err(Stop(error)) => Err(RemoveError::new(error, remover.removed)),
    }
}

/// [`remove_counted`] of what is a directory as far as the caller knows, which saves a look at it.
pub fn remove_directory_counted(
    target: Target<'_>,
    on_failure: OnFailure,
    links: &LinkCounts,
) -> Result<Removed, RemoveError> {
    let name = target.checked_name("deleting").map_err(|e| RemoveError::new(e, Removed::default()))?;
    let top = Top { dir: target.dir, path: target.dir_path, name, inside: false };
    let mut remover = Remover::new(&top, on_failure, PARALLEL_LEVELS);
    remover.links = Some(links);
    remover.run_from(Outcome::IsDirectory)
}

/// Clears the immutable and append-only flags of an entry, which keep it from being renamed.
pub fn thaw(target: Target<'_>) -> Result<(), FileError> {
    const DOING: &str = "clearing the flags of";
    let name = target.checked_name(DOING)?;
    clear_frozen_at(target.dir, &name).map_err(|e| FileError::new(DOING, target.path(), e))
}

/// What is known of files with several names while many threads delete.
#[derive(Debug)]
pub struct LinkCounts {
    /// `.links`.
    dir: PathBuf,
    /// The inodes that are there; read when the first file with two names is met.
    linked: OnceLock<FxHashSet<u64>>,
    /// Of two names of one file one is taken after the other.
    turns: [Mutex<()>; 64],
}

impl LinkCounts {
    /// `dir`: where the hard links named by content are; need not exist.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, linked: OnceLock::new(), turns: [const { Mutex::new(()) }; 64] }
    }

    fn turn(&self, inode: u64) -> MutexGuard<'_, ()> {
        let at = usize::try_from(inode % self.turns.len() as u64).unwrap_or(0);
        self.turns.get(at).expect("a remainder").lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is this the last name but the one in `.links`?
    fn is_last(&self, status: &Status) -> bool {
        status.links == 1 || status.links == 2 && self.holds(status.id.inode)
    }

    /// Is there an entry of `.links` for it?
    pub fn holds(&self, inode: u64) -> bool {
        self.linked.get_or_init(|| crate::links::inodes(&self.dir).unwrap_or_default()).contains(&inode)
    }
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
    let name = target.checked_name("deleting").map_err(|e| RemoveError::new(e, Removed::default()))?;
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
    /// Is it taken for read when a reading gives less than it could?
    trusts: bool,
    passes: u32,
    /// Something in it stays, so it stays too, and that is no failure of its own.
    keeps: bool,
}

struct Remover<'a> {
    top: &'a Top<'a>,
    levels: Vec<Level>,
    on_failure: OnFailure,
    parallel_levels: usize,
    links: Option<&'a LinkCounts>,
    /// Larger files are left alone.
    most_bytes: u64,
    removed: Removed,
    buffer: Vec<u8>,
    /// Serial number for the names of what is moved up.
    moved: u64,
}

/// Something went wrong, and we stop.
struct Stop(FileError);

/// What became of an entry.
#[derive(Clone, Copy)]
enum Outcome {
    Gone,
    IsDirectory,
    /// Left alone, see [`Remover::most_bytes`].
    TooLarge,
}

impl<'a> Remover<'a> {
    fn new(top: &'a Top<'a>, on_failure: OnFailure, parallel_levels: usize) -> Self {
        let (levels, removed) = (Vec::new(), Removed::default());
        let (links, most_bytes, buffer) = (None, u64::MAX, Vec::new());
        Self { top, levels, on_failure, parallel_levels, links, most_bytes, removed, buffer, moved: 0 }
    }

    fn run(mut self) -> Result<Removed, RemoveError> {
        match self.unlink(&self.top.name) {
            Ok(outcome) => self.run_from(outcome),
            Err(Stop(error)) => Err(RemoveError::new(error, self.removed)),
        }
    }

    /// The rest, after a look at the entry itself.
    fn run_from(mut self, outcome: Outcome) -> Result<Removed, RemoveError> {
        let mut result = match outcome {
            Outcome::Gone | Outcome::TooLarge => Ok(()),
            Outcome::IsDirectory => self.enter(self.top.name.clone()),
        };
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
            return if depth < MAX_OPEN { self.enter(name) } else { self.move_up(&name) };
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
        let read = read_names(self.dir(), &mut buffer, &mut names);
        self.buffer = buffer;
        match read {
            // Deleted by somebody else: it reads as empty, or not at all.
            Ok(Names { none: true, .. }) | Err(Errno::NOENT) => self.mark(|level| level.read_all = true),
            // Deleting it will tell whether that was all, without another reading of most directories.
            Ok(Names { looks_done: true, .. }) => self.mark(|level| level.read_all = level.trusts),
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
            let mut status = match Status::at(self.dir(), name) {
                Ok(status) if status.kind == FileType::Directory => return Ok(Outcome::IsDirectory),
                Ok(status) if status.size > self.most_bytes => return Ok(Outcome::TooLarge),
                Ok(status) => status,
                Err(Errno::NOENT) => return Ok(Outcome::Gone),
                Err(Errno::ACCESS) if !last_try && self.loosen() => continue,
                Err(e) => return self.fail("getting status of", Some(name), e).map(|()| Outcome::Gone),
            };
            let turn = self.links.filter(|_| status.links > 1).map(|links| links.turn(status.id.inode));
            if turn.is_some() {
                // Another thread may have taken a name since.
                status = Status::at(self.dir(), name).unwrap_or(status);
            }
            match retry(|| rustix::fs::unlinkat(self.dir(), name, AtFlags::empty())) {
                Ok(()) => {
                    self.removed.entries += 1;
                    if self.links.map_or(status.links <= 2, |links| links.is_last(&status)) {
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
                let (subdirs, read_all, trusts, passes, keeps) = (Vec::new(), false, true, 0, false);
                self.levels.push(Level { fd, name, subdirs, read_all, trusts, passes, keeps });
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            // No directory any more.
            Err(Errno::NOTDIR | Errno::LOOP) => match self.unlink(&name)? {
                Outcome::Gone | Outcome::TooLarge => Ok(()),
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
        level.passes += u32::from(!level.trusts);
        level.trusts = false;
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
        let links = self.links;
        let results: Vec<_> = subdirs
            .into_par_iter()
            .map(|name| {
                let top = Top { dir, path: &path, name, inside: true };
                let mut remover = Remover::new(&top, on_failure, levels);
                remover.links = links;
                remover.run()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{
        self, child, child_argument, deep_trees, finish, give_away, memory_dir, open, public_dir, root_or_skip,
        unprivileged,
    };
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    fn remove_named(dir: &Path, name: &OsStr, on_failure: OnFailure) -> Result<Removed, RemoveError> {
        let fd = open(dir);
        remove(Target { dir: fd.as_fd(), name, dir_path: dir }, on_failure)
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    /// What goes at once, and what is left for somebody with more time.
    #[test]
    fn small_things_go_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let links = LinkCounts::new(dir.path().join(".links"));
        let fd = open(dir.path());
        let of = |name| Target { dir: fd.as_fd(), name: OsStr::new(name), dir_path: dir.path() };
        fs::write(dir.path().join("small"), "12345").unwrap();
        symlink("nowhere", dir.path().join("link")).unwrap();
        fs::File::create(dir.path().join("large")).unwrap().set_len((16 << 20) + 1).unwrap();
        fs::create_dir_all(dir.path().join("tree/sub")).unwrap();
        fs::write(dir.path().join("tree/sub/file"), "123").unwrap();
        let freed = |name| remove_small_counted(of(name), &links).unwrap().map(|removed| removed.bytes_freed);
        assert_eq!(freed("small"), Some(5));
        assert_eq!(freed("link"), Some(7));
        assert_eq!(freed("missing"), Some(0));
        assert_eq!((freed("large"), freed("tree")), (None, None));
        let all = |name| remove_directory_counted(of(name), OnFailure::Stop, &links).unwrap();
        assert_eq!((all("tree").bytes_freed, all("large").bytes_freed, all("missing").entries), (3, (16 << 20) + 1, 0));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn counts_what_it_frees() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("one"), [0; 1000]).unwrap();
        fs::write(tree.join("a/two"), [0; 200]).unwrap();
        fs::hard_link(tree.join("a/two"), dir.path().join("link")).unwrap();
        fs::write(tree.join("a/three"), [0; 30]).unwrap();
        fs::hard_link(tree.join("a/three"), dir.path().join("link1")).unwrap();
        fs::hard_link(tree.join("a/three"), dir.path().join("link2")).unwrap();
        symlink("four", tree.join("a/b/symlink")).unwrap();
        let removed = remove_path(&tree, OnFailure::Stop).unwrap();
        assert_eq!((removed.bytes_freed, removed.entries, removed.failed), (1204, 7, 0));
        assert!(!tree.exists());
        assert_eq!(fs::metadata(dir.path().join("link")).unwrap().len(), 200);
        let nothing = remove_path(&tree, OnFailure::Stop).unwrap();
        assert_eq!((nothing.bytes_freed, nothing.entries), (0, 0));
        assert_eq!(remove_path(&tree.join("x/y"), OnFailure::Stop).unwrap().entries, 0);
        let file = remove_path(&dir.path().join("link"), OnFailure::Stop).unwrap();
        assert_eq!((file.bytes_freed, file.entries), (200, 1));
    }

    #[test]
    fn refuses_what_is_no_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        for name in ["", ".", "..", "a/b", "/", "a/", "a\0"] {
            let e = remove_named(dir.path(), OsStr::new(name), OnFailure::Continue).unwrap_err();
            assert_eq!(e.source.kind(), io::ErrorKind::InvalidInput, "{name}");
        }
        assert!(remove_path(Path::new("/"), OnFailure::Stop).is_err());
        assert!(remove_path(Path::new("/tmp/.."), OnFailure::Stop).is_err());
        assert!(dir.path().join("a/b").exists());
    }

    #[test]
    fn follows_no_symlink() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("outside/x")).unwrap();
        fs::create_dir(dir.path().join("tree")).unwrap();
        symlink(dir.path().join("outside"), dir.path().join("tree/link")).unwrap();
        symlink("../outside", dir.path().join("direct")).unwrap();
        remove_path(&dir.path().join("tree"), OnFailure::Stop).unwrap();
        remove_path(&dir.path().join("direct"), OnFailure::Stop).unwrap();
        assert!(dir.path().join("outside/x").exists());
    }

    /// A chain of 100,000 directories, many with names of the greatest length, in few
    /// descriptors and little stack; files on the way and at the end.
    #[test]
    fn s068_deep_trees() {
        if let Some(dir) = child_argument() {
            let dir = Path::new(&dir);
            for parallel in [false, true] {
                let mut fd = open(dir);
                let long = "n".repeat(255);
                for n in 0..100_000 {
                    let name = if n == 0 {
                        "top"
                    } else if n % 10 == 0 {
                        &long
                    } else {
                        "d"
                    };
                    rustix::fs::mkdirat(&fd, name, Mode::from_raw_mode(0o755)).unwrap();
                    fd = rustix::fs::openat(&fd, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
                    if n % 1000 == 999 {
                        rustix::fs::symlinkat("..", &fd, "file").unwrap();
                        rustix::fs::mkdirat(&fd, ".removing-3", Mode::from_raw_mode(0o755)).unwrap();
                    }
                }
                drop(fd);
                let store = open(dir);
                let target = Target { dir: store.as_fd(), name: OsStr::new("top"), dir_path: dir };
                let remove = if parallel { remove_parallel } else { remove };
                let removed = remove(target, OnFailure::Stop).unwrap();
                // Moving up may replace the empty directories that have the name already.
                assert!((100_100..=100_200).contains(&removed.entries), "{}", removed.entries);
                assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
            }
            return;
        }
        let _alone = deep_trees();
        let dir = memory_dir();
        let argument = dir.path().to_str().unwrap();
        finish(child("remove::tests::s068_deep_trees", argument, "ulimit -n 80; ulimit -s 256"));
    }

    #[test]
    fn wide_trees() {
        let dir = tempfile::tempdir().unwrap();
        for parallel in [false, true] {
            let tree = dir.path().join("tree");
            for a in 0..40 {
                for b in 0..10 {
                    let sub = tree.join(format!("{a}-{}/{b}", "x".repeat(200)));
                    fs::create_dir_all(&sub).unwrap();
                    (0..8).for_each(|n| fs::write(sub.join(n.to_string()), b"12345").unwrap());
                }
            }
            (0..3000).for_each(|n| fs::write(tree.join(format!("file-{n}")), b"").unwrap());
            let fd = open(dir.path());
            let target = Target { dir: fd.as_fd(), name: OsStr::new("tree"), dir_path: dir.path() };
            let remove = if parallel { remove_parallel } else { remove };
            let removed = remove(target, OnFailure::Stop).unwrap();
            assert_eq!((removed.entries, removed.bytes_freed), (1 + 40 + 400 + 3200 + 3000, 3200 * 5));
            assert!(!tree.exists());
        }
    }

    /// Directories that their owner may not read, write or enter.
    #[test]
    fn hostile_modes() {
        for mode in [0o000, 0o111, 0o444, 0o222, 0o333, 0o555] {
            let dir = public_dir();
            let store = dir.path().join("store");
            let tree = store.join("tree");
            for path in [store.clone(), tree.clone(), tree.join("sub"), tree.join("sub/empty")] {
                fs::create_dir(&path).unwrap();
                give_away(&path);
            }
            fs::write(tree.join("sub/file"), b"1").unwrap();
            for path in ["sub/empty", "sub", ""] {
                chmod(&tree.join(path), mode);
            }
            let removed = unprivileged(|| remove_path(&tree, OnFailure::Stop)).unwrap();
            assert_eq!(removed.entries, 4, "{mode:o}");
        }
    }

    /// What cannot be deleted stays, with its parents; the rest goes. Stopping says where.
    #[test]
    fn failures_are_told() {
        if !root_or_skip("failures_are_told") {
            return;
        }
        for parallel in [false, true] {
            let dir = public_dir();
            let (store, tree) = (dir.path().join("store"), dir.path().join("store/tree"));
            fs::create_dir_all(tree.join("mine/sub")).unwrap();
            fs::create_dir_all(tree.join("theirs")).unwrap();
            fs::write(tree.join("theirs/file"), b"x").unwrap();
            fs::write(tree.join("mine/file"), b"x").unwrap();
            // `theirs` belongs to root and is closed to the user, who owns all the rest.
            for path in [&store, &tree, &tree.join("mine"), &tree.join("mine/sub")] {
                give_away(path);
            }
            let e = unprivileged(|| remove_path(&tree.join("theirs"), OnFailure::Stop)).unwrap_err();
            assert_eq!(e.to_string(), format!("deleting '{}'", tree.join("theirs/file").display()));
            assert_eq!(e.source.kind(), io::ErrorKind::PermissionDenied);
            let removed = unprivileged(|| {
                let fd = open(&store);
                let target = Target { dir: fd.as_fd(), name: OsStr::new("tree"), dir_path: &store };
                if parallel {
                    // The pool's threads have other rights than ours: one level by hand.
                    let top = Top { dir: target.dir, path: target.dir_path, name: c"tree".into(), inside: false };
                    Remover::new(&top, OnFailure::Continue, 0).run()
                } else {
                    remove(target, OnFailure::Continue)
                }
            })
            .unwrap();
            assert_eq!((removed.failed, removed.entries), (1, 3));
            assert_eq!(removed.failures[0].path, tree.join("theirs/file"));
            assert!(tree.join("theirs/file").exists() && !tree.join("mine").exists());
        }
    }

    #[test]
    fn s082_clears_frozen_flags() {
        if !root_or_skip("s082_clears_frozen_flags") {
            return;
        }
        for parallel in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let tree = dir.path().join("tree");
            fs::create_dir_all(tree.join("sub/sub")).unwrap();
            fs::write(tree.join("sub/file"), b"x").unwrap();
            fs::write(tree.join("sub/appended"), b"x").unwrap();
            for (path, flag) in
                [("sub/file", "+i"), ("sub/appended", "+a"), ("sub/sub", "+i"), ("sub", "+a"), ("", "+i")]
            {
                let changed = std::process::Command::new("chattr").arg(flag).arg(tree.join(path)).output();
                if !changed.is_ok_and(|output| output.status.success()) {
                    println!("s082_clears_frozen_flags: skipped, chattr does not work here");
                    remove_path(&tree, OnFailure::Stop).unwrap();
                    return;
                }
            }
            let fd = open(dir.path());
            let target = Target { dir: fd.as_fd(), name: OsStr::new("tree"), dir_path: dir.path() };
            let remove = if parallel { remove_parallel } else { remove };
            assert_eq!(remove(target, OnFailure::Stop).unwrap().entries, 5);
        }
    }

    /// Large sparse files count with their size, in 64 bits.
    #[test]
    fn s088_large_files() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::create(dir.path().join("big")).unwrap();
        file.set_len(5 << 30).unwrap();
        assert_eq!(remove_path(&dir.path().join("big"), OnFailure::Stop).unwrap().bytes_freed, 5 << 30);
    }

    /// While a tree is deleted, another process swaps directories of it for symlinks to the
    /// outside, and others delete and make things in it.
    #[test]
    fn swapped_symlinks_lead_nowhere() {
        let dir = memory_dir();
        let outside = dir.path().join("outside");
        fs::create_dir_all(outside.join("sub/sub")).unwrap();
        fs::write(outside.join("sub/precious"), b"x").unwrap();
        chmod(&outside, 0o500);
        let before = snapshot(&outside);
        for round in 0..200 {
            let tree = dir.path().join("tree");
            for n in 0..20 {
                fs::create_dir_all(tree.join(format!("{n}/sub/sub"))).unwrap();
                fs::write(tree.join(format!("{n}/sub/precious")), b"y").unwrap();
            }
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            for n in 0..20 {
                                let (a, b) = (tree.join(n.to_string()), tree.join(format!("{n}.old")));
                                let _ = fs::rename(&a, &b);
                                let _ = symlink(&outside, &a);
                            }
                        }
                    });
                }
                scope.spawn(|| remove_path(&tree, OnFailure::Continue).unwrap());
                let on_failure = if round % 2 == 0 { OnFailure::Continue } else { OnFailure::Stop };
                let _ = remove_path(&tree, on_failure);
                stop.store(true, Ordering::Relaxed);
            });
            remove_path(&tree, OnFailure::Stop).unwrap();
        }
        assert_eq!(snapshot(&outside), before);
    }

    /// Paths below a directory, with what must not change.
    fn snapshot(dir: &Path) -> BTreeMap<PathBuf, (u32, u64, u64, Vec<u8>)> {
        let mut found = BTreeMap::new();
        let mut todo = vec![dir.to_owned()];
        while let Some(path) = todo.pop() {
            let status = fs::symlink_metadata(&path).unwrap();
            let text = if status.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if status.is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
            found.insert(path, (status.mode(), status.ino(), status.nlink(), text));
        }
        found
    }

    #[derive(Debug, Clone)]
    enum Node {
        File(u8),
        Fifo,
        Link(bool),
        HardLink,
        Dir(u32, Vec<(Vec<u8>, Node)>),
    }

    fn nodes() -> impl Strategy<Value = Node> {
        let leaf = prop_oneof![
            any::<u8>().prop_map(Node::File),
            Just(Node::Fifo),
            any::<bool>().prop_map(Node::Link),
            Just(Node::HardLink),
        ];
        leaf.prop_recursive(6, 60, 6, |inner| {
            let name = prop_oneof![
                prop::collection::vec(prop_oneof![1u8..=b'.', b'0'..=255], 1..12),
                prop::collection::vec(prop_oneof![1u8..=b'.', b'0'..=255], 255),
            ];
            let name = name.prop_filter("dots", |n| n != b"." && n != b"..");
            (0u32..0o7777, prop::collection::vec((name, inner), 0..6)).prop_map(|(mode, list)| Node::Dir(mode, list))
        })
    }

    /// Makes a node; gives the number of entries made. Modes of directories are set last.
    fn make(path: &Path, node: &Node, outside: &Path) -> u64 {
        match node {
            Node::File(n) => fs::write(path, vec![*n; usize::from(*n)]).unwrap(),
            Node::Fifo => {
                rustix::fs::mkfifoat(CWD, path, Mode::from_raw_mode(0o600)).unwrap();
            }
            Node::Link(dir) => symlink(if *dir { outside } else { Path::new("../../..") }, path).unwrap(),
            Node::HardLink => fs::hard_link(outside.join("file"), path).unwrap(),
            Node::Dir(mode, list) => {
                fs::create_dir(path).unwrap();
                let mut count = 1;
                for (name, node) in list {
                    let below = path.join(OsStr::from_bytes(name));
                    if fs::symlink_metadata(&below).is_err() {
                        count += make(&below, node, outside);
                    }
                }
                give_away(path);
                chmod(path, *mode);
                return count;
            }
        }
        1
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]
        /// Whatever the tree, its owner can delete it all, and nothing else changes.
        #[test]
        fn hostile_trees(node in nodes(), parallel in any::<bool>()) {
            let dir = public_dir();
            let (store, outside) = (dir.path().join("store"), dir.path().join("outside"));
            fs::create_dir(&store).unwrap();
            give_away(&store);
            fs::create_dir(&outside).unwrap();
            fs::write(outside.join("file"), b"precious").unwrap();
            chmod(&outside, 0o755);
            let before = snapshot(&outside);
            let entries = make(&store.join("tree"), &node, &outside);
            let fd = open(&store);
            let target = Target { dir: fd.as_fd(), name: OsStr::new("tree"), dir_path: &store };
            let removed = if parallel && testing::is_root() {
                remove_parallel(target, OnFailure::Stop).unwrap()
            } else {
                unprivileged(|| remove(target, OnFailure::Stop)).unwrap()
            };
            prop_assert_eq!(removed.entries, entries);
            prop_assert_eq!(fs::read_dir(&store).unwrap().count(), 0);
            let same = snapshot(&outside) == before;
            prop_assert!(same);
        }
    }
}
