//! The collector's lock: exclusive while it runs, shared for what must not meet it.
//!
//! While a collector runs there is a byte in the file. Who gets the lock and finds one knows that the
//! last collector was killed, and that the ledger may not tell yet what it has deleted last.
//!
//! Source: gc, sections 5 and 6; formats, section 10.3.

use std::path::Path;

use crate::file_error::FileError;
use crate::layout::Layout;
use crate::lock_file::{LockFile, Sharing, Wait};

/// `$V/gc.lock`, held until dropped.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub struct GcLock {
    file: LockFile,
    sharing: Sharing,
    /// There was a mark of somebody who was killed: it stays for those who can settle the ledger.
    found_mark: bool,
}

impl GcLock {
    /// Takes the lock; `None` if it is not free and we shall not wait.
    ///
    /// The collector takes it exclusively for its whole run, `--verify` takes it shared. The
    /// message for [`Wait::Yes`] is [`WAITING`]. Errors: the file cannot be opened or created.
    pub fn acquire(layout: &Layout, sharing: Sharing, mut wait: Wait<'_>) -> Result<Option<Self>, FileError> {
        let file = LockFile::open(&layout.gc_lock())?;
        if !file.lock(sharing, &mut wait)? {
            return Ok(None);
        }
        let found_mark = file.is_marked()?;
        if sharing == Sharing::Exclusive {
            // On a disk that is full there is no room for a mark, and a collector is wanted all the more.
            let _ = file.mark(true);
        }
        Ok(Some(Self { file, sharing, found_mark }))
    }

    pub const fn sharing(&self) -> Sharing {
        self.sharing
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Drop for GcLock {
    fn drop(&mut self) {
        if self.sharing == Sharing::Exclusive && !self.found_mark {
            let _ = self.file.mark(false);
        }
    }
}

/// What the user is told before a wait.
pub const WAITING: &str = "waiting for the big garbage collector lock...";
