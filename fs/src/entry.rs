//! One directory entry: its status, and acting on it without walking its path again.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, IFlags, Mode, OFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::path::Arg;

use crate::lock_file::retry;

/// What `statx` says, in one call, flags of the file system included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Status {
    pub(crate) kind: FileType,
    /// Permissions with suid, sgid and sticky bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) links: u32,
    pub(crate) size: u64,
    pub(crate) mtime_s: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) id: FileId,
    /// Immutable or append-only.
    pub(crate) frozen: bool,
    pub(crate) mount_root: bool,
}

/// Device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    pub device: u64,
    pub inode: u64,
}

impl Status {
    /// The entry itself, never what a symlink points to.
    pub(crate) fn at(dir: BorrowedFd<'_>, name: impl Arg + Copy) -> rustix::io::Result<Self> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        retry(|| rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS)).map(|s| Self::from(&s))
    }

    /// What is open, be it only as a path.
    pub(crate) fn of(fd: BorrowedFd<'_>) -> rustix::io::Result<Self> {
        let flags = AtFlags::EMPTY_PATH;
        retry(|| rustix::fs::statx(fd, c"", flags, StatxFlags::BASIC_STATS)).map(|s| Self::from(&s))
    }

    fn from(s: &rustix::fs::Statx) -> Self {
        let has = |attribute| s.stx_attributes.intersects(attribute);
        Self {
            kind: FileType::from_raw_mode(u32::from(s.stx_mode)),
            mode: u32::from(s.stx_mode) & 0o7777,
            uid: s.stx_uid,
            links: s.stx_nlink,
            size: s.stx_size,
            mtime_s: s.stx_mtime.tv_sec,
            mtime_ns: s.stx_mtime.tv_nsec,
            id: FileId { device: rustix::fs::makedev(s.stx_dev_major, s.stx_dev_minor), inode: s.stx_ino },
            frozen: has(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND),
            mount_root: has(StatxAttributes::MOUNT_ROOT),
        }
    }
}

/// The name under which the kernel gives what is open, even if only as a path, or a symlink.
pub(crate) fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The same with a name below it, in bytes.
pub(crate) fn proc_path_below(dir: BorrowedFd<'_>, name: &OsStr, buffer: &mut Vec<u8>) {
    use std::os::unix::ffi::OsStrExt as _;
    let mut text = String::with_capacity(32);
    let _ = write!(text, "/proc/self/fd/{}/", dir.as_raw_fd());
    buffer.clear();
    buffer.extend_from_slice(text.as_bytes());
    buffer.extend_from_slice(name.as_bytes());
}

/// Opens an entry as it is, symlinks included, without any permission on it and without side
/// effects (devices, FIFOs).
pub(crate) fn open_path(dir: BorrowedFd<'_>, name: impl Arg + Copy) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    retry(|| rustix::fs::openat(dir, name, flags, Mode::empty()))
}

/// Opens a directory for reading, no symlink to one.
pub(crate) fn open_dir(dir: BorrowedFd<'_>, name: impl Arg + Copy) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    retry(|| rustix::fs::openat(dir, name, flags, Mode::empty()))
}

/// Clears the immutable and append-only flags of an open file or directory.
pub(crate) fn clear_frozen(fd: impl AsFd) -> rustix::io::Result<()> {
    let flags = rustix::fs::ioctl_getflags(&fd)?;
    rustix::fs::ioctl_setflags(&fd, flags - (IFlags::IMMUTABLE | IFlags::APPEND))
}

/// Clears these flags of an entry. Only regular files and directories have them.
pub(crate) fn clear_frozen_at(dir: BorrowedFd<'_>, name: impl Arg + Copy) -> rustix::io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = retry(|| rustix::fs::openat(dir, name, flags, Mode::empty()))?;
    match rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
        FileType::RegularFile | FileType::Directory => clear_frozen(fd),
        _ => Err(Errno::PERM),
    }
}
