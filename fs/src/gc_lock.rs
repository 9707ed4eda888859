//! The collector's lock: exclusive while it runs, shared for what must not meet it.
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
}

impl GcLock {
    /// Takes the lock; `None` if it is not free and we shall not wait.
    ///
    /// The collector takes it exclusively for its whole run, `--verify` takes it shared. The
    /// message for [`Wait::Yes`] is [`WAITING`]. Errors: the file cannot be opened or created.
    pub fn acquire(layout: &Layout, sharing: Sharing, mut wait: Wait<'_>) -> Result<Option<Self>, FileError> {
        let file = LockFile::open(&layout.gc_lock())?;
        Ok(file.lock(sharing, &mut wait)?.then_some(Self { file, sharing }))
    }

    pub const fn sharing(&self) -> Sharing {
        self.sharing
    }

    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

/// What the user is told before a wait.
pub const WAITING: &str = "waiting for the big garbage collector lock...";
