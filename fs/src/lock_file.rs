//! `flock` on small files that exist only to be locked.
//!
//! Shared with Nix: the whole-file `flock` regime, mode 0600. A lock belongs to the open file
//! description, so two opens in one process exclude each other as two processes do, and a lock
//! ends with its last descriptor: a killed holder leaves nothing behind.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::file_error::{At as _, FileError};

/// What is shut out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Other shared holders may come in.
    Shared,
    Exclusive,
}

/// What to do while another process holds the lock.
pub enum Wait<'a> {
    /// Give up at once.
    No,
    /// Sleep until it is free. The function is called once for each lock that has to be waited
    /// for, with the path that is locked, before the sleep.
    ///
    /// A sleep cannot be cancelled: who wants to be able to stop uses [`Wait::No`] in a loop.
    Yes(&'a mut dyn FnMut(&Path)),
}

/// An open file and the lock on it, until dropped.
#[derive(Debug)]
pub struct LockFile {
    fd: File,
    path: PathBuf,
}

impl LockFile {
    /// Opens the file, or creates it with mode 0600, without locking it.
    ///
    /// A symlink in the last place is refused, and so is anything but a regular file: lock files
    /// lie in directories where build users may write.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        const DOING: &str = "opening lock file";
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let fd = retry(|| rustix::fs::openat(CWD, path, flags, Mode::RUSR | Mode::WUSR)).at(DOING, path)?;
        Self::regular(fd, path, DOING)
    }

    /// Opens an existing file for reading, which is enough for a lock. `None` if there is none.
    pub fn open_existing(path: &Path) -> Result<Option<Self>, FileError> {
        const DOING: &str = "opening lock file";
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        match retry(|| rustix::fs::openat(CWD, path, flags, Mode::empty())) {
            Err(Errno::NOENT) => Ok(None),
            other => Self::regular(other.at(DOING, path)?, path, DOING).map(Some),
        }
    }

    fn regular(fd: OwnedFd, path: &Path, doing: &'static str) -> Result<Self, FileError> {
        let status = rustix::fs::fstat(&fd).at("getting status of", path)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(FileError::new(doing, path, io::Error::other("not a regular file")));
        }
        Ok(Self { fd: fd.into(), path: path.to_owned() })
    }

    /// Takes the lock, or changes the kind of one that is held; `false` if it is not free and
    /// we shall not wait.
    ///
    /// Changing is not atomic: another process may hold the lock in between.
    pub fn lock(&self, sharing: Sharing, wait: &mut Wait<'_>) -> Result<bool, FileError> {
        const DOING: &str = "acquiring lock";
        let (now, later) = match sharing {
            Sharing::Shared => (FlockOperation::NonBlockingLockShared, FlockOperation::LockShared),
            Sharing::Exclusive => (FlockOperation::NonBlockingLockExclusive, FlockOperation::LockExclusive),
        };
        match retry(|| rustix::fs::flock(&self.fd, now)) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) => {}
            Err(e) => return Err(FileError::new(DOING, &self.path, e)),
        }
        let Wait::Yes(waiting) = wait else { return Ok(false) };
        waiting(&self.path);
        retry(|| rustix::fs::flock(&self.fd, later)).at(DOING, &self.path)?;
        Ok(true)
    }

    pub fn unlock(&self) -> Result<(), FileError> {
        retry(|| rustix::fs::flock(&self.fd, FlockOperation::Unlock)).at("releasing lock", &self.path)
    }

    /// Is this the file of a holder that has gone and taken the name away?
    ///
    /// Holders that delete their file write a byte to it after the unlink. A file without any
    /// name is as useless, whatever its size (a collector may have unlinked it).
    pub fn is_stale(&self) -> Result<bool, FileError> {
        let status = rustix::fs::fstat(&self.fd).at("getting status of", &self.path)?;
        Ok(status.st_size != 0 || status.st_nlink == 0)
    }

    /// Has nobody unlinked it?
    pub fn has_name(&self) -> Result<bool, FileError> {
        Ok(rustix::fs::fstat(&self.fd).at("getting status of", &self.path)?.st_nlink != 0)
    }

    /// What is in it.
    pub(crate) fn read(&self) -> io::Result<Vec<u8>> {
        let mut text = Vec::new();
        (&self.fd).read_to_end(&mut text)?;
        Ok(text)
    }

    /// Takes the name away and tells those who have the file open, in this order.
    pub fn delete(&self) -> Result<(), FileError> {
        match rustix::fs::unlink(&self.path) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(FileError::new("deleting lock file", &self.path, e)),
        }
        self.mark_stale()
    }

    /// The second half of [`LockFile::delete`].
    pub(crate) fn mark_stale(&self) -> Result<(), FileError> {
        retry(|| rustix::io::pwrite(&self.fd, b"d", 0)).at("writing to lock file", &self.path).map(drop)
    }

    /// Writes a byte to the file, or takes it away, as a mark for others.
    pub(crate) fn mark(&self, marked: bool) -> Result<(), FileError> {
        if marked {
            return self.mark_stale();
        }
        retry(|| rustix::fs::ftruncate(&self.fd, 0)).at("writing to lock file", &self.path)
    }

    /// Is there a mark?
    pub(crate) fn is_marked(&self) -> Result<bool, FileError> {
        Ok(rustix::fs::fstat(&self.fd).at("getting status of", &self.path)?.st_size != 0)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Unlocks: to close it is not enough while a child that another thread has just forked shares the
/// descriptor, until that becomes another program.
impl Drop for LockFile {
    fn drop(&mut self) {
        // It can only fail if nothing is locked.
        let _ = self.unlock();
    }
}

impl AsFd for LockFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Repeats what a signal interrupted.
pub(crate) fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
