//! One directory entry: its status, and acting on it without walking its path again.

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, IFlags, Mode, OFlags, RawDir, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::path::Arg;

use crate::file_error::FileError;
use crate::lock_file::retry;

/// An entry of an open directory.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    pub dir: BorrowedFd<'a>,
    /// A single file name.
    pub name: &'a OsStr,
    /// How messages call the directory.
    pub dir_path: &'a Path,
}

impl Target<'_> {
    pub(crate) fn path(&self) -> PathBuf {
        self.dir_path.join(self.name)
    }

    /// The name, if it is one: not a path, and nothing that leads elsewhere.
    pub(crate) fn checked_name(&self, doing: &'static str) -> Result<CString, FileError> {
        let bytes = self.name.as_bytes();
        match CString::new(bytes) {
            Ok(name) if !matches!(bytes, b"" | b"." | b"..") && !bytes.contains(&b'/') => Ok(name),
            _ => Err(FileError::new(doing, self.path(), Errno::INVAL)),
        }
    }
}

/// Directories that are held open at once while one tree is walked.
pub(crate) const MAX_OPEN: usize = 48;

/// One read of a directory. It holds more than a thousand names, or a hundred very long ones.
const READ_BYTES: usize = 32 << 10;

/// What an entry takes of that at most, without its name: 19 bytes, a NUL, and up to 7 of padding.
const RECORD_BYTES: usize = 27;

/// What `statx` says, in one call, flags of the file system included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Status {
    pub(crate) kind: FileType,
    /// Permissions with suid, sgid and sticky bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) links: u32,
    pub(crate) size: u64,
    /// Of 512 bytes.
    pub(crate) blocks: u64,
    pub(crate) mtime_s: i64,
    pub(crate) mtime_ns: u32,
    pub(crate) id: FileId,
    /// Immutable or append-only.
    pub(crate) frozen: bool,
    pub(crate) mount_root: bool,
}

/// Device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
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
            blocks: s.stx_blocks,
            mtime_s: s.stx_mtime.tv_sec,
            mtime_ns: s.stx_mtime.tv_nsec,
            id: FileId { device: rustix::fs::makedev(s.stx_dev_major, s.stx_dev_minor), inode: s.stx_ino },
            frozen: has(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND),
            mount_root: has(StatxAttributes::MOUNT_ROOT),
        }
    }
}

/// The name under which the kernel gives what is open, even if only as a path, or a symlink.
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
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

/// Calls `each` with the name of every entry but `.` and `..`, in the order of the file system. Where
/// `dir` itself has been read to does not matter. Makes no copy of a name.
pub fn each_name(dir: BorrowedFd<'_>, mut each: impl FnMut(&CStr)) -> rustix::io::Result<()> {
    let own = rustix::fs::openat(dir, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut buffer = Vec::with_capacity(READ_BYTES);
    let mut entries = RawDir::new(own, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        match entry {
            Ok(entry) if matches!(entry.file_name().to_bytes(), b"." | b"..") => {}
            Ok(entry) => each(entry.file_name()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What one reading of a directory gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Names {
    /// Nothing came: it has been read to its end.
    pub(crate) none: bool,
    /// There was room for more in the buffer, so nothing more will come; on most file systems.
    pub(crate) looks_done: bool,
}

/// One `getdents`: appends names and types, without `.` and `..`. `buffer` is scratch space.
pub(crate) fn read_names(
    dir: BorrowedFd<'_>,
    buffer: &mut Vec<u8>,
    names: &mut Vec<(CString, FileType)>,
) -> rustix::io::Result<Names> {
    buffer.clear();
    buffer.reserve(READ_BYTES);
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut used_bytes = 0;
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let name = entry.file_name();
        used_bytes += RECORD_BYTES + name.to_bytes().len();
        if name != c"." && name != c".." {
            names.push((name.to_owned(), entry.file_type()));
        }
        if entries.is_buffer_empty() {
            break;
        }
    }
    Ok(Names { none: used_bytes == 0, looks_done: used_bytes < READ_BYTES / 2 })
}
