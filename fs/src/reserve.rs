//! Disk space kept in reserve, so that a collection can run on a full disk.
//!
//! `$V/db/reserved` is allocated for real when the store is opened and deleted as the first step
//! of a deleting collection, before anything needs space. Source: gc, section 7.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::lock_file::retry;

/// The default size, in bytes.
pub const DEFAULT_BYTES: u64 = 8 << 20;

/// Creates or resizes the reserve at `path`, mode 0600; size 0 means none, and deletes it.
///
/// A file of the right size is left as it is. Two processes may do this at once. An error is
/// harmless to everything else: callers go on without a reserve, and no partial one stays.
pub fn ensure(path: &Path, size_bytes: u64) -> io::Result<()> {
    if size_bytes == 0 {
        return release(path);
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() && found.len() == size_bytes => return Ok(()),
        // What is there in another size goes first: it may be the space we are about to ask for.
        Ok(_) => release(path)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let made = create(path, size_bytes);
    if made.is_err() {
        let _ = release(path);
    }
    made
}

/// Deletes the reserve. There being none is fine.
pub fn release(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn create(path: &Path, size_bytes: u64) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(CWD, path, flags, Mode::RUSR | Mode::WUSR)?;
    match retry(|| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size_bytes)) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
        Err(e) => return Err(e.into()),
    }
    // No fallocate here. Not zeros, which a compressing file system would make nothing of.
    let mut block = vec![0u8; 64 << 10];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut done = 0;
    while done < size_bytes {
        for eight in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            eight.copy_from_slice(&state.to_ne_bytes());
        }
        let want = usize::try_from(size_bytes - done).unwrap_or(usize::MAX).min(block.len());
        let written = retry(|| rustix::io::write(&file, block.get(..want).unwrap_or_default()))?;
        done += written as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    #[test]
    fn s109_reserves_and_releases() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reserved");
        for size in [1 << 20, 100_001, 300_000] {
            ensure(&path, size).unwrap();
            let found = std::fs::symlink_metadata(&path).unwrap();
            assert_eq!(found.len(), size);
            assert_eq!(found.permissions().mode() & 0o7777, 0o600);
            assert!(found.blocks() * 512 >= size, "allocated for real");
            let inode = found.ino();
            ensure(&path, size).unwrap();
            assert_eq!(std::fs::symlink_metadata(&path).unwrap().ino(), inode, "left as it is");
        }
        release(&path).unwrap();
        release(&path).unwrap();
        assert!(!path.exists());
        ensure(&path, 0).unwrap();
        assert!(!path.exists());
        // A symlink in its place is replaced, not followed.
        let victim = dir.path().join("victim");
        std::fs::write(&victim, b"precious").unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        ensure(&path, 4096).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert!(std::fs::symlink_metadata(&path).unwrap().is_file());
        assert!(ensure(&dir.path().join("no/such"), 4096).is_err());
    }
}
