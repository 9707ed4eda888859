//! Bringing objects to the disk before they are registered.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::file_error::{At as _, FileError};

const DOING: &str = "syncing";

/// Syncs every file and directory of a small tree; for a large one `syncfs` is cheaper. Where there is
/// something that its owner may not open (a directory without permission to enter it), all of the file
/// system is synced.
///
/// Symlinks live in their directory and need no more. The name of the tree itself is not synced:
/// that is for [`sync_dir`] of the directory it ends up in.
pub fn sync_tree(dir: BorrowedFd<'_>, name: &OsStr, dir_path: &Path) -> Result<(), FileError> {
    let shown = || dir_path.join(name);
    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).at(DOING, shown())?;
    let synced = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => sync_file(dir, name),
        FileType::Directory => open_dir(dir, name).and_then(sync_below),
        _ => Ok(()),
    };
    match synced {
        Err(Errno::ACCESS) => rustix::fs::syncfs(dir),
        synced => synced,
    }
    .at(DOING, shown())
}

/// Syncs a directory: the names in it.
///
/// Some file systems do not know how; they have nothing to be synced either.
pub fn sync_dir(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    match rustix::fs::fsync(dir) {
        Err(Errno::INVAL | Errno::NOTSUP) => Ok(()),
        done => done,
    }
}

fn open_dir(dir: BorrowedFd<'_>, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

fn sync_file(dir: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    sync_dir(rustix::fs::openat(dir, name, flags, Mode::empty())?.as_fd())
}

/// A stack of open directories: the tree is small.
fn sync_below(root: OwnedFd) -> Result<(), Errno> {
    let mut open = vec![root];
    while let Some(dir) = open.pop() {
        for entry in Dir::read_from(&dir)? {
            let entry = entry?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    FileType::from_raw_mode(rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode)
                }
                known => known,
            };
            match kind {
                FileType::Directory => open.push(open_dir(dir.as_fd(), &OsString::from(name))?),
                FileType::RegularFile => sync_file(dir.as_fd(), name)?,
                _ => {}
            }
        }
        sync_dir(dir.as_fd())?;
    }
    Ok(())
}
