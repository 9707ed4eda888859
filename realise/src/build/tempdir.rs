//! Build directories.
//!
//! `<base>/nix-build-<name>.drv-<n>` is ours and closed to everybody, but for the builder's group
//! where the builder has to get through; the builder's own directory is `build` in it. In a sandbox
//! it does not have to: `build` is bound to its place there. So nothing that a builder makes there, however it
//! sets the modes, can be reached by other users: no setuid program left for an accomplice
//! (CVE-2024-38531), no directory to be swapped while it is deleted (CVE-2025-52991). All work is
//! done below descriptors that were opened before the builder started.

use std::ffi::{OsStr, OsString};
use std::io;
use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use larder_fs::entry::Target;
use larder_fs::file_error::{At as _, FileError};
use larder_fs::remove::{self, OnFailure};
use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;

/// The name of the builder's part.
const INNER: &str = "build";

/// Who is to own what the builder gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// A build directory; dropped, it is deleted.
#[derive(Debug)]
pub struct TempDir {
    base: OwnedFd,
    base_path: PathBuf,
    name: OsString,
    outer: OwnedFd,
    inner: OwnedFd,
    owner: Option<Owner>,
    entry: Entry,
    kept: bool,
}

/// How the builder comes to its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// By its path.
    Path,
    /// It is bound to another place.
    Bound,
}

/// A name that no other process, nor another time, has.
fn unique_name() -> OsString {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    OsString::from(format!(".larder-build-{}-{count}-{time}", std::process::id()))
}

fn open_dir(dir: BorrowedFd<'_>, name: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// Who hears of a build directory before and after it is made, see [`super::journal`].
pub trait Notes {
    /// A directory of this name, which nobody else uses, is about to be made.
    fn making(&self, path: &Path) -> Result<(), FileError>;
    /// That one is about to get this name.
    fn naming(&self, dir: BorrowedFd<'_>, path: &Path) -> Result<(), FileError>;
}

impl TempDir {
    /// Makes one below `base`.
    ///
    /// It is whole before it has its name, so that a crash leaves nothing that could be taken for
    /// somebody else's.
    pub fn create(
        base: &Path,
        drv_name: &str,
        owner: Option<Owner>,
        entry: Entry,
        notes: &dyn Notes,
    ) -> Result<Self, FileError> {
        const DOING: &str = "creating build directory";
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let base_fd = rustix::fs::openat(CWD, base, flags, Mode::empty()).at("opening directory", base)?;
        let name = unique_name();
        let path = base.join(&name);
        notes.making(&path)?;
        rustix::fs::mkdirat(&base_fd, &name, Mode::RWXU).at(DOING, &path)?;
        let outer = open_dir(base_fd.as_fd(), &name).at("opening directory", &path)?;
        rustix::fs::mkdirat(&outer, INNER, Mode::RWXU).at(DOING, path.join(INNER))?;
        let inner = open_dir(outer.as_fd(), INNER).at("opening directory", path.join(INNER))?;
        let mut this =
            Self { base: base_fd, base_path: base.to_owned(), name, outer, inner, owner, entry, kept: false };
        this.give_away().at("changing owner of", &path)?;
        for n in 0u32.. {
            let name = OsString::from(format!("nix-build-{drv_name}-{n}"));
            if rustix::fs::statat(&this.base, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
                continue;
            }
            let path = base.join(&name);
            notes.naming(this.outer.as_fd(), &path)?;
            match rustix::fs::renameat_with(&this.base, &this.name, &this.base, &name, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    this.name = name;
                    return Ok(this);
                }
                Err(Errno::EXIST) => {}
                Err(e) => return Err(FileError::new(DOING, path, e)),
            }
        }
        Err(FileError::new(DOING, base, Errno::EXIST))
    }

    fn give_away(&self) -> rustix::io::Result<()> {
        // The umask of the process has no part in it.
        rustix::fs::fchmod(&self.outer, Mode::RWXU)?;
        rustix::fs::fchmod(&self.inner, Mode::RWXU)?;
        if let Some(Owner { uid, gid }) = self.owner {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            rustix::fs::fchown(&self.inner, Some(uid), Some(gid))?;
            if self.entry == Entry::Path {
                // The builder must get through; other users must not.
                rustix::fs::fchown(&self.outer, None, Some(gid))?;
                rustix::fs::fchmod(&self.outer, Mode::RWXU | Mode::XGRP)?;
            }
        }
        Ok(())
    }

    /// The directory that is ours.
    pub fn outer_path(&self) -> PathBuf {
        self.base_path.join(&self.name)
    }

    /// The builder's directory on the host.
    pub fn path(&self) -> PathBuf {
        self.outer_path().join(INNER)
    }

    pub fn outer(&self) -> BorrowedFd<'_> {
        self.outer.as_fd()
    }

    /// Writes a file of the builder's, which must not be there yet.
    pub fn write(&self, name: &str, contents: &[u8], mode: u32) -> Result<(), FileError> {
        let path = || self.path().join(name);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        let fd = rustix::fs::openat(&self.inner, name, flags, mode).at("creating file", path())?;
        let mut file = std::fs::File::from(fd);
        file.write_all(contents).at("writing file", path())?;
        rustix::fs::fchmod(&file, mode).at("changing mode of", path())?;
        if let Some(Owner { uid, gid }) = self.owner {
            rustix::fs::fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .at("changing owner of", path())?;
        }
        Ok(())
    }

    /// Keeps it (`keep-failed`); `open` makes it readable for everybody.
    pub fn keep(mut self, open: bool) -> Result<PathBuf, FileError> {
        self.kept = true;
        if open {
            let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
            rustix::fs::fchmod(&self.outer, mode).at("changing mode of", self.outer_path())?;
            rustix::fs::fchmod(&self.inner, mode).at("changing mode of", self.path())?;
        }
        Ok(self.outer_path())
    }

    /// Deletes it, and tells what stays.
    pub fn delete(mut self) -> Result<(), FileError> {
        self.kept = true;
        self.remove()
    }

    fn remove(&self) -> Result<(), FileError> {
        remove_below(self.base.as_fd(), &self.name, &self.base_path)
    }
}

fn remove_below(base: BorrowedFd<'_>, name: &OsStr, base_path: &Path) -> Result<(), FileError> {
    let target = Target { dir: base, name, dir_path: base_path };
    let removed = remove::remove(target, OnFailure::Continue).map_err(FileError::from)?;
    match removed.failures.into_iter().next() {
        Some(first) if first.kind() != io::ErrorKind::NotFound => Err(first),
        _ => Ok(()),
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if !self.kept {
            // Told by nobody: the journal has it, and the next start tries again.
            let _ = self.remove();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    struct Nobody;

    impl Notes for Nobody {
        fn making(&self, _: &Path) -> Result<(), FileError> {
            Ok(())
        }
        fn naming(&self, _: BorrowedFd<'_>, _: &Path) -> Result<(), FileError> {
            Ok(())
        }
    }

    #[test]
    fn cve_2024_38531_closed_to_others() {
        let base = tempfile::tempdir().unwrap();
        let root = rustix::process::geteuid().is_root();
        let owner = root.then_some(Owner { uid: 40001, gid: 40000 });
        let dir = TempDir::create(base.path(), "x.drv", owner, Entry::Path, &Nobody).unwrap();
        assert_eq!(dir.outer_path(), base.path().join("nix-build-x.drv-0"));
        let outer = std::fs::metadata(dir.outer_path()).unwrap();
        let inner = std::fs::metadata(dir.path()).unwrap();
        assert_eq!(outer.uid(), rustix::process::geteuid().as_raw());
        assert_eq!(outer.mode() & 0o7777, if root { 0o710 } else { 0o700 });
        assert_eq!(inner.mode() & 0o7777, 0o700);
        dir.write("f", b"x", 0o644).unwrap();
        if root {
            assert_eq!((inner.uid(), inner.gid()), (40001, 40000));
            assert_eq!(std::fs::metadata(dir.path().join("f")).unwrap().uid(), 40001);
        }
        assert!(dir.write("f", b"y", 0o644).is_err(), "nothing is written twice");
        let second = TempDir::create(base.path(), "x.drv", owner, Entry::Bound, &Nobody).unwrap();
        assert_eq!(std::fs::metadata(second.outer_path()).unwrap().mode() & 0o7777, 0o700);
        assert!(second.outer_path().ends_with("nix-build-x.drv-1"));
        // What the builder does to the modes does not keep it from going.
        std::fs::create_dir(second.path().join("d")).unwrap();
        std::fs::set_permissions(second.path().join("d"), std::fs::Permissions::from_mode(0o0)).unwrap();
        drop(second);
        let kept = dir.keep(true).unwrap();
        assert_eq!(std::fs::metadata(kept).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 1);
    }

    /// While it is deleted somebody swaps a directory in it for a link to another, again and again.
    #[test]
    fn cve_2025_52991_swapped_while_it_is_deleted() {
        let base = tempfile::tempdir().unwrap();
        let victim = base.path().join("victim");
        std::fs::create_dir(&victim).unwrap();
        for n in 0..20 {
            std::fs::write(victim.join(format!("{n}")), "precious").unwrap();
        }
        let mut swaps = 0;
        for _ in 0..40 {
            let dir = TempDir::create(base.path(), "x.drv", None, Entry::Path, &Nobody).unwrap();
            let inner = dir.path();
            for d in 0..20 {
                let sub = inner.join(format!("d{d}"));
                std::fs::create_dir(&sub).unwrap();
                // Names that the other directory has too.
                (0..20).for_each(|n| std::fs::write(sub.join(format!("{n}")), "").unwrap());
            }
            let done = std::sync::atomic::AtomicBool::new(false);
            std::thread::scope(|scope| {
                let swapper = scope.spawn(|| {
                    let mut swaps = 0;
                    while !done.load(Ordering::Relaxed) {
                        for d in 0..20 {
                            let (sub, aside) = (inner.join(format!("d{d}")), inner.join("aside"));
                            let was_there = std::fs::rename(&sub, &aside).is_ok();
                            if std::os::unix::fs::symlink(&victim, &sub).is_ok() && was_there {
                                swaps += 1;
                            }
                            drop(std::fs::remove_file(&sub));
                            drop(std::fs::rename(&aside, &sub));
                        }
                    }
                    swaps
                });
                // What is made while it is deleted may stay; the journal has it.
                drop(dir.delete());
                done.store(true, Ordering::Relaxed);
                swaps += swapper.join().unwrap();
            });
            for entry in std::fs::read_dir(base.path()).unwrap().flatten().filter(|e| e.file_name() != "victim") {
                drop(std::fs::remove_dir_all(entry.path()));
            }
            assert_eq!(std::fs::read_dir(&victim).unwrap().count(), 20, "after {swaps} swaps");
        }
        assert!(swaps > 40, "{swaps}");
    }
}
