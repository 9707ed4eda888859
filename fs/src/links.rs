//! `.links`: hard links to the contents of store files, named by their hash.

use std::ffi::OsStr;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustc_hash::FxHashSet;
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::file_error::{At as _, FileError};
use crate::layout::Layout;

/// What linking saves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Sizes of all linked files, each once, in bytes.
    pub actual_bytes: u64,
    /// What they would take if none were linked, in bytes.
    pub unshared_bytes: u64,
    /// What the directory itself takes, in bytes.
    pub overhead_bytes: u64,
}

impl LinkStats {
    /// Bytes saved, less than nothing for a store without duplicates.
    pub fn saved_bytes(self) -> i128 {
        i128::from(self.unshared_bytes) - i128::from(self.actual_bytes) - i128::from(self.overhead_bytes)
    }
}

/// The inode numbers in a directory, as it tells them itself: no file is looked at. Empty if there
/// is no such directory.
pub fn inodes(dir: &Path) -> Result<FxHashSet<u64>, FileError> {
    const DOING: &str = "reading directory";
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = match rustix::fs::openat(CWD, dir, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(FxHashSet::default()),
        opened => opened.at(DOING, dir)?,
    };
    let mut found = FxHashSet::default();
    for entry in Dir::read_from(&fd).at(DOING, dir)? {
        let entry = entry.at(DOING, dir)?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            found.insert(entry.ino());
        }
    }
    Ok(found)
}

/// Deletes the links of contents that no object has any more, and sums up the others.
///
/// `deleted` hears of each link that goes. A file that is linked again just now loses no more than
/// its place in the index. Source: gc, section 8.
pub fn remove_unused(layout: &Layout, mut deleted: impl FnMut(&OsStr)) -> Result<LinkStats, FileError> {
    const DOING: &str = "reading directory";
    let path = layout.links();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let dir = match rustix::fs::openat(CWD, &path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(LinkStats::default()),
        opened => opened.at(DOING, &path)?,
    };
    let mut stats = LinkStats::default();
    let status = rustix::fs::fstat(&dir).at(DOING, &path)?;
    stats.overhead_bytes = u64::try_from(status.st_blocks).unwrap_or(0) * 512;
    for entry in Dir::read_from(&dir).at(DOING, &path)? {
        let entry = entry.at(DOING, &path)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let status = match rustix::fs::statat(dir.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            status => status.at("getting status of", path.join(name))?,
        };
        if status.st_nlink == 1 {
            match rustix::fs::unlinkat(dir.as_fd(), name, AtFlags::empty()) {
                Ok(()) => deleted(name),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(FileError::new("deleting", path.join(name), error)),
            }
            continue;
        }
        let size = u64::try_from(status.st_size).unwrap_or(0);
        stats.actual_bytes += size;
        stats.unshared_bytes += size.saturating_mul(status.st_nlink.saturating_sub(1));
    }
    Ok(stats)
}
