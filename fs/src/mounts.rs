//! A store on a read-only mount, writable for this process alone.
//!
//! Systems protect the store by a read-only bind mount over itself. As root we then take a mount
//! namespace of our own and make the mount writable there; all others keep the read-only view.
//!
//! The remount itself is the test whether that works: `mountinfo` cannot tell a bind mount, and
//! after the remount of another kind of mount it claims "rw" while writes still fail. Those fail
//! at the first write, as on any read-only disk. Source: building, section 15.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

use crate::file_error::shown;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MountError {
    #[error("setting up a private mount namespace")]
    Namespace { source: io::Error },
    #[error("remounting '{}' writable; it is on a read-only file system, and no mount point itself", shown(path))]
    NotAMountPoint { path: PathBuf, source: io::Error },
    #[error("remounting '{}' writable", shown(path))]
    Remount { path: PathBuf, source: io::Error },
}

/// The mount namespace that this process has left.
#[derive(Debug)]
pub struct PrivateMounts {
    original: Option<OwnedFd>,
}

impl PrivateMounts {
    /// Where programs we start for the user belong (`setns`). `None` without `/proc`.
    pub fn original(&self) -> Option<BorrowedFd<'_>> {
        self.original.as_ref().map(|fd| fd.as_fd())
    }
}

/// Makes the store writable, if we are root and it is on a read-only mount; `None` if there is
/// nothing to do.
///
/// Call it at start-up, in the main thread and before others are started: the new namespace is
/// that of the calling thread and of what it starts later. Mounts that the system makes later
/// still appear in it. Flags of the mount (`nosuid`, `nodev`, `noexec`) stay.
///
/// Errors: no namespace can be made; the store is no mount point, or not ours to remount.
pub fn make_store_writable(store: &Path) -> Result<Option<PrivateMounts>, MountError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    // A store that is not there or broken is told by who opens it.
    let Ok(status) = rustix::fs::statvfs(store) else { return Ok(None) };
    if !status.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Ok(None);
    }
    let namespace = |source: Errno| MountError::Namespace { source: source.into() };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let original = rustix::fs::openat(CWD, "/proc/thread-self/ns/mnt", flags, Mode::empty()).ok();
    leave_namespace().map_err(namespace)?;
    // Nothing of ours goes out, new mounts come in. A root that is no mount point (chroot) has no
    // propagation to change, and a remount is not propagated in any case.
    match rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC) {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(e) => return Err(namespace(e)),
    }
    // The bits of `statvfs` and `mount` are the same for these three.
    let kept = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let kept = MountFlags::from_bits_truncate(u32::try_from(status.f_flag.bits() & 0xff).unwrap_or(0)) & kept;
    rustix::mount::mount_remount(store, MountFlags::BIND | kept, c"").map_err(|e| {
        let (path, source) = (store.to_owned(), e.into());
        if e == Errno::INVAL {
            MountError::NotAMountPoint { path, source }
        } else {
            MountError::Remount { path, source }
        }
    })?;
    Ok(Some(PrivateMounts { original }))
}

#[expect(deprecated, reason = "what is unsafe about it concerns descriptor tables, which stay shared")]
fn leave_namespace() -> rustix::io::Result<()> {
    rustix::thread::unshare(UnshareFlags::NEWNS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::root_or_skip;
    use std::fs;
    use std::process::Command;

    /// Runs `f` where its mounts are nobody else's business, and end with it.
    fn in_own_namespace(test: &str, f: impl FnOnce(&Path) + Send) {
        if !root_or_skip(test) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        on_other_thread(|| {
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            if leave_namespace().is_err() || rustix::mount::mount_change("/", private).is_err() {
                println!("{test}: skipped, may not mount here");
                return;
            }
            f(dir.path());
        });
    }

    /// A namespace belongs to a thread, and what it starts.
    fn on_other_thread<T: Send>(f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| scope.spawn(f).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    }

    fn tmpfs(path: &Path) {
        fs::create_dir_all(path).unwrap();
        rustix::mount::mount("none", path, "tmpfs", MountFlags::empty(), None).unwrap();
    }

    fn remount(path: &Path, flags: MountFlags) {
        rustix::mount::mount_remount(path, flags, c"").unwrap();
    }

    fn is_read_only(path: &Path) -> bool {
        match fs::write(path.join("x"), b"x") {
            Ok(()) => false,
            Err(e) => {
                assert_eq!(e.kind(), io::ErrorKind::ReadOnlyFilesystem);
                true
            }
        }
    }

    #[test]
    fn s083_read_only_bind_mount() {
        in_own_namespace("s083_read_only_bind_mount", |dir| {
            let store = dir.join("store");
            fs::create_dir(&store).unwrap();
            rustix::mount::mount_bind(&store, &store).unwrap();
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            remount(&store, MountFlags::BIND | MountFlags::RDONLY | flags);
            assert!(is_read_only(&store));
            on_other_thread(|| {
                let ours = make_store_writable(&store).unwrap().expect("it was read-only");
                assert!(!is_read_only(&store));
                let left = rustix::fs::statvfs(&store).unwrap().f_flag.bits();
                assert_eq!(left & 15, u64::from(flags.bits()), "other flags stay");
                assert!(make_store_writable(&store).unwrap().is_none(), "nothing left to do");
                // A program started in the old namespace sees what all others see.
                let original = ours.original().unwrap();
                on_other_thread(|| {
                    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
                    rustix::fs::openat(CWD, "/", OFlags::PATH, Mode::empty()).unwrap();
                    unshare_fs();
                    move_into_link_name_space(original, Some(LinkNameSpaceType::Mount)).unwrap();
                    assert!(is_read_only(&store));
                });
            });
            assert!(is_read_only(&store), "all others keep the read-only view");
            assert!(store.join("x").exists());
        });
    }

    #[expect(deprecated, reason = "see above")]
    fn unshare_fs() {
        rustix::thread::unshare(UnshareFlags::FS).unwrap();
    }

    /// The store is the root of a file system of its own, bound onto itself.
    #[test]
    fn s062_own_file_system() {
        in_own_namespace("s062_own_file_system", |dir| {
            let store = dir.join("store");
            tmpfs(&store);
            rustix::mount::mount_bind(&store, &store).unwrap();
            remount(&store, MountFlags::BIND | MountFlags::RDONLY);
            assert!(is_read_only(&store));
            on_other_thread(|| {
                make_store_writable(&store).unwrap().unwrap();
                assert!(!is_read_only(&store));
            });
            assert!(is_read_only(&store));
        });
    }

    /// The store's own file system is read-only: it cannot be helped, and the first write says so.
    #[test]
    fn s061_read_only_file_system() {
        in_own_namespace("s061_read_only_file_system", |dir| {
            let store = dir.join("store");
            tmpfs(&store);
            remount(&store, MountFlags::RDONLY);
            make_store_writable(&store).unwrap();
            assert!(is_read_only(&store));
        });
        in_own_namespace("s061_read_only_file_system: ext4", |dir| {
            let (image, store) = (dir.join("image"), dir.join("store"));
            fs::create_dir(&store).unwrap();
            fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
            let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
                Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
            };
            let made = run("mkfs.ext4", &["-q".as_ref(), image.as_ref()])
                && run("mount", &["-oloop,ro".as_ref(), image.as_ref(), store.as_ref()]);
            if !made {
                println!("s061_read_only_file_system: ext4 skipped, no loop device or no mkfs.ext4");
                return;
            }
            make_store_writable(&store).unwrap();
            assert!(is_read_only(&store));
            assert!(run("umount", &[store.as_ref()]));
        });
    }

    /// The store lies in a read-only file system and is no mount point: an error at once.
    #[test]
    fn s060_no_mount_point() {
        in_own_namespace("s060_no_mount_point", |dir| {
            let root = dir.join("root");
            tmpfs(&root);
            let store = root.join("nix/store");
            fs::create_dir_all(&store).unwrap();
            remount(&root, MountFlags::RDONLY);
            let e = make_store_writable(&store).unwrap_err();
            assert!(matches!(e, MountError::NotAMountPoint { .. }));
            let expected = format!("remounting '{}' writable", store.display());
            assert!(e.to_string().starts_with(&expected), "{e}");
        });
    }

    #[test]
    fn writable_stores_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert!(make_store_writable(dir.path()).unwrap().is_none());
        assert!(make_store_writable(&dir.path().join("missing")).unwrap().is_none());
    }
}
