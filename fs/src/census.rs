//! How many bytes deleting some trees would free, hard links counted as they are.
//!
//! The same rule as [`remove_counted`](crate::remove::remove_counted): a file counts when its last
//! name in the store goes, one in `.links` aside. So what is told before a deletion is what it frees.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustc_hash::FxHashMap;
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::entry::{Status, Target, open_dir, read_names};
use crate::file_error::{At as _, FileError};
use crate::remove::LinkCounts;

/// A file with several names.
#[derive(Debug, Clone, Copy)]
struct Shared {
    names: u32,
    counted: u32,
    size: u64,
}

/// Trees that might be deleted together. Threads may share it.
#[derive(Debug, Default)]
pub struct Census {
    single: AtomicU64,
    shared: Mutex<FxHashMap<u64, Shared>>,
}

/// A directory that is being read.
struct Level {
    fd: OwnedFd,
    subdirs: Vec<CString>,
}

impl Census {
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a tree, or whatever the entry is; gives the sizes of all its files, each name for itself.
    ///
    /// That it is not there is fine. Trees deeper than there may be open files are an error.
    pub fn add(&self, target: Target<'_>) -> Result<u64, FileError> {
        const DOING: &str = "getting status of";
        let name = target.checked_name(DOING)?;
        let mut sum = 0;
        let mut count = |status: &Status| {
            sum += status.size;
            self.count(status);
        };
        let mut levels: Vec<Level> = Vec::new();
        match Status::at(target.dir, &name) {
            Err(Errno::NOENT) => return Ok(0),
            Err(e) => return Err(FileError::new(DOING, target.path(), e)),
            Ok(status) if status.kind == FileType::Directory => {
                levels.push(read(target.dir, &name, &mut count).at(DOING, target.path())?);
            }
            Ok(status) => count(&status),
        }
        while let Some(level) = levels.last_mut() {
            let Some(name) = level.subdirs.pop() else {
                levels.pop();
                continue;
            };
            let path = || target.path().join(OsStr::from_bytes(name.as_bytes()));
            match read(level.fd.as_fd(), &name, &mut count) {
                Err(Errno::NOENT) => {}
                next => levels.push(next.at(DOING, path())?),
            }
        }
        Ok(sum)
    }

    fn count(&self, status: &Status) {
        if status.links == 1 {
            self.single.fetch_add(status.size, Ordering::Relaxed);
            return;
        }
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let one = Shared { names: status.links, counted: 0, size: status.size };
        shared.entry(status.id.inode).or_insert(one).counted += 1;
    }

    /// What deleting all that was counted would free, in bytes.
    pub fn freed_bytes(&self, links: &LinkCounts) -> u64 {
        let shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let last = |(inode, one): &(&u64, &Shared)| {
            one.counted == one.names || one.counted + 1 == one.names && links.holds(**inode)
        };
        let shared: u64 = shared.iter().filter(last).map(|(_, one)| one.size).sum();
        self.single.load(Ordering::Relaxed) + shared
    }
}

fn read(
    dir: std::os::fd::BorrowedFd<'_>,
    name: &CString,
    count: &mut impl FnMut(&Status),
) -> rustix::io::Result<Level> {
    let fd = open_dir(dir, name)?;
    let mut subdirs = Vec::new();
    let (mut buffer, mut names) = (Vec::new(), Vec::new());
    while !read_names(fd.as_fd(), &mut buffer, &mut names)?.none {
        for (name, kind) in names.drain(..) {
            if kind == FileType::Directory {
                subdirs.push(name);
                continue;
            }
            match Status::at(fd.as_fd(), &name) {
                Ok(status) if status.kind == FileType::Directory => subdirs.push(name),
                Ok(status) => count(&status),
                Err(Errno::NOENT) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(Level { fd, subdirs })
}
