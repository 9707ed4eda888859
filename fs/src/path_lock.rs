//! Locks on store paths, held while they are made.
//!
//! `<path>.lock` beside each path, as Nix does it: `flock` exclusive, in ascending order of the
//! bytes, all or nothing. Source: formats, section 10.2.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use crate::file_error::FileError;
use crate::lock_file::{LockFile, Sharing, Wait};

/// Paths that our parent process has locked for us (`NIX_HELD_LOCKS`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldLocks(BTreeSet<PathBuf>);

impl HeldLocks {
    /// Reads the value of the variable: paths, without `.lock`, between blanks.
    pub fn parse(value: &[u8]) -> Self {
        let words = value.split(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r')).filter(|w| !w.is_empty());
        Self(words.map(|w| PathBuf::from(OsString::from_vec(w.to_vec()))).collect())
    }

    pub fn contains(&self, path: &Path) -> bool {
        self.0.contains(path)
    }
}

impl FromIterator<PathBuf> for HeldLocks {
    fn from_iter<I: IntoIterator<Item = PathBuf>>(paths: I) -> Self {
        Self(paths.into_iter().collect())
    }
}

/// What becomes of the lock files when the locks are released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRelease {
    /// Leave the empty files: the next taker finds them, the collector removes them.
    Keep,
    /// Delete them: the paths are valid now, so nobody needs the locks any more.
    Delete,
}

/// The locks of some paths, released on drop.
#[derive(Debug)]
#[must_use = "the locks are released when this is dropped"]
pub struct PathLocks {
    files: Vec<LockFile>,
    on_release: OnRelease,
}

impl PathLocks {
    /// Locks all `paths` (real paths, without `.lock`), but those that are `held` already.
    ///
    /// `None` if one of them is taken and `wait` says not to wait; nothing is locked then.
    /// To wait for several sets at once deadlocks, so a process takes one set at a time or does
    /// not wait. The locks start as [`OnRelease::Keep`].
    ///
    /// Errors: the lock file cannot be opened, created or locked.
    pub fn acquire<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        held: &HeldLocks,
        mut wait: Wait<'_>,
    ) -> Result<Option<Self>, FileError> {
        // Sorted as bytes: `Path` would compare by components.
        let sorted: BTreeSet<OsString> = paths
            .into_iter()
            .filter(|path| !held.contains(path.as_ref()))
            .map(|path| path.as_ref().as_os_str().to_owned())
            .collect();
        let mut locks = Self { files: Vec::with_capacity(sorted.len()), on_release: OnRelease::Keep };
        for path in sorted {
            match lock_one(&lock_path(Path::new(&path)), Path::new(&path), &mut wait)? {
                Some(file) => locks.files.push(file),
                None => return Ok(None),
            }
        }
        Ok(Some(locks))
    }

    /// Says what becomes of the files.
    pub fn on_release(&mut self, what: OnRelease) {
        self.on_release = what;
    }

    /// Releases the locks, and tells if a lock file could not be deleted (dropping does not).
    ///
    /// All are released in any case; the first error is returned.
    pub fn release(mut self) -> Result<(), FileError> {
        self.finish()
    }

    fn finish(&mut self) -> Result<(), FileError> {
        let mut first = Ok(());
        for file in self.files.drain(..) {
            if self.on_release == OnRelease::Delete {
                let deleted = file.delete();
                first = first.and(deleted);
            }
        }
        first
    }
}

impl Drop for PathLocks {
    fn drop(&mut self) {
        // A file that stays is harmless, and the lock itself ends with the descriptor.
        let _ = self.finish();
    }
}

/// `<path>.lock`.
pub fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().as_bytes().to_vec();
    name.extend_from_slice(b".lock");
    PathBuf::from(OsString::from_vec(name))
}

/// Opens and locks until the file that is locked is the one that has the name.
fn lock_one(lock: &Path, path: &Path, wait: &mut Wait<'_>) -> Result<Option<LockFile>, FileError> {
    loop {
        let file = LockFile::open(lock)?;
        let locked = match wait {
            Wait::No => file.lock(Sharing::Exclusive, &mut Wait::No)?,
            // The user is told the store path, not the name of the lock file.
            Wait::Yes(waiting) => file.lock(Sharing::Exclusive, &mut Wait::Yes(&mut |_| waiting(path)))?,
        };
        if !locked {
            return Ok(None);
        }
        if !file.is_stale()? {
            return Ok(Some(file));
        }
    }
}
