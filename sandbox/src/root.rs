//! The root that the builder sees, made in a mount namespace of its own.
//!
//! First all that is missing is made in the root directory alone, before anything is mounted on
//! it, so that nothing is ever made in a directory of the host; then everything is mounted.
//! Names in the root are resolved below its descriptor, and links in it cannot lead out of it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change, move_mount,
    open_tree, unmount,
};

use crate::plan::{Bind, Dev, Plan, Root};
use crate::report::{During, SetupError, Step};
use crate::{sys, within};

/// What `/dev` has of the host, on every machine.
const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];

const DEV_LINKS: [(&str, &str); 4] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Makes the root and moves into it.
pub(crate) fn enter(root: &Root, plan: &Plan) -> Step<()> {
    // Before anything else: where mounts are shared, what follows would show outside.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .during("mount(MS_PRIVATE)", || "making all mounts private".into())?;
    let base = Base::open(&root.dir)?;
    let binds = present_binds(root)?;
    base.furnish(root, &binds)?;
    for bind in &binds {
        base.mount_bind(bind)?;
    }
    base.pivot()?;
    mount_own(root, plan)?;
    unmount(".", UnmountFlags::DETACH).during("umount2(MNT_DETACH)", || "leaving the host's files".into())?;
    rustix::process::chdir("/").during("chdir", || "entering the new root".into())
}

/// A bind whose source exists.
struct Present {
    source: PathBuf,
    /// Without the leading slash.
    target: PathBuf,
    is_dir: bool,
    read_only: bool,
    recursive: bool,
}

/// What is to be bound, devices too, outer targets first.
fn present_binds(root: &Root) -> Step<Vec<Present>> {
    let mut all = Vec::with_capacity(root.binds.len() + DEVICES.len() + 1);
    for bind in &root.binds {
        all.extend(present(bind)?);
    }
    if let Some(dev) = &root.dev {
        let kvm = dev.kvm.then_some("kvm");
        for name in DEVICES.into_iter().chain(kvm) {
            let path = Path::new("/dev").join(name);
            // A bind of the same place was asked for; it is that one that counts.
            if root.binds.iter().any(|b| b.target == path) {
                continue;
            }
            let bind = Bind {
                source: path.clone(),
                target: path,
                optional: name == "kvm",
                read_only: false,
                recursive: false,
            };
            all.extend(present(&bind)?);
        }
    }
    all.sort_by(|a, b| a.target.cmp(&b.target));
    Ok(all)
}

fn present(bind: &Bind) -> Step<Option<Present>> {
    let Bind { source, target, optional, read_only, recursive } = bind;
    let stat = match rustix::fs::stat(source) {
        Ok(stat) => stat,
        Err(Errno::NOENT) if *optional => return Ok(None),
        Err(e) => return Err(e).during("stat", || format!("binding '{}'", source.display())),
    };
    Ok(Some(Present {
        source: source.clone(),
        target: below_root(target).to_owned(),
        is_dir: FileType::from_raw_mode(stat.st_mode).is_dir(),
        read_only: *read_only,
        recursive: *recursive,
    }))
}

/// A path inside, as one below the root's descriptor.
fn below_root(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// The root directory, bound onto itself.
struct Base {
    fd: OwnedFd,
}

impl Base {
    /// `pivot_root` wants a mount.
    fn open(dir: &Path) -> Step<Self> {
        let binding = || format!("binding '{}' onto itself", dir.display());
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let below = rustix::fs::open(dir, flags, Mode::empty()).during("open", binding)?;
        let fd = clone_tree(below.as_fd(), "", true).during("open_tree", binding)?;
        attach(&fd, below.as_fd()).during("move_mount", binding)?;
        Ok(Self { fd })
    }

    /// Makes what is missing, and nothing else is mounted yet.
    fn furnish(&self, root: &Root, binds: &[Present]) -> Step<()> {
        for dir in &root.dirs {
            self.dir(below_root(&dir.path))?;
        }
        for file in &root.files {
            self.write_file(&file.path, &file.contents, file.mode)?;
        }
        for link in &root.links {
            self.link(below_root(&link.path), &link.target)?;
        }
        if let Some(dev) = &root.dev {
            self.furnish_dev(dev, root)?;
        }
        if root.proc {
            self.dir(Path::new("proc"))?;
        }
        for bind in binds {
            self.mount_point(bind)?;
        }
        // Modes last: an ordinary user may be about to take its own right to write away.
        for dir in root.dirs.iter().rev() {
            let setting = || format!("setting mode and owner of '{}'", dir.path.display());
            let fd = self.find(below_root(&dir.path), OFlags::RDONLY | OFlags::DIRECTORY).during("openat2", setting)?;
            if let Some((uid, gid)) = dir.owner {
                rustix::fs::fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                    .during("fchown", setting)?;
            }
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(dir.mode)).during("fchmod", setting)?;
        }
        Ok(())
    }

    fn furnish_dev(&self, dev: &Dev, root: &Root) -> Step<()> {
        self.dir(Path::new("dev"))?;
        for (name, target) in DEV_LINKS {
            self.link(&Path::new("dev").join(name), OsStr::new(target))?;
        }
        if dev.shm_size.is_some() {
            self.dir(Path::new("dev/shm"))?;
        }
        if own_pts(root) {
            self.dir(Path::new("dev/pts"))?;
            self.link(Path::new("dev/ptmx"), OsStr::new("pts/ptmx"))?;
        }
        Ok(())
    }

    /// Opens something in the root; links in it are followed within the root.
    fn find(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        within::open(self.fd.as_fd(), path, flags)
    }

    /// The directory, made with its parents if it is missing.
    fn dir(&self, path: &Path) -> Step<OwnedFd> {
        let making = || format!("creating directory '/{}'", path.display());
        match self.find(path, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).during("openat2", making),
        }
        let (parent, name) = self.parent(path)?;
        // Somebody's link to nowhere is not followed but told.
        rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)).during("mkdirat", making)?;
        self.find(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW).during("openat2", making)
    }

    fn parent<'a>(&self, path: &'a Path) -> Step<(OwnedFd, &'a OsStr)> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(SetupError::new("creating the root in itself", "mkdirat", Errno::INVAL));
        };
        Ok((self.dir(parent)?, name))
    }

    fn write_file(&self, path: &Path, contents: &[u8], mode: u32) -> Step<()> {
        let writing = || format!("writing '{}'", path.display());
        let (parent, name) = self.parent(below_root(path))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600)).during("openat", writing)?;
        let mut rest = contents;
        while !rest.is_empty() {
            let n = rustix::io::write(&file, rest).during("write", writing)?;
            rest = rest.get(n..).unwrap_or_default();
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).during("fchmod", writing)
    }

    fn link(&self, path: &Path, target: &OsStr) -> Step<()> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::symlinkat(target, &parent, name)
            .during("symlinkat", || format!("creating link '/{}'", path.display()))
    }

    /// Something to mount on, of the right kind.
    fn mount_point(&self, bind: &Present) -> Step<()> {
        if bind.is_dir {
            return self.dir(&bind.target).map(drop);
        }
        let making = || format!("creating mount point '/{}'", bind.target.display());
        match self.find(&bind.target, OFlags::PATH) {
            Ok(_) => return Ok(()),
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).during("openat2", making),
        }
        let (parent, name) = self.parent(&bind.target)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644)).during("openat", making).map(drop)
    }

    fn mount_bind(&self, bind: &Present) -> Step<()> {
        let binding = || format!("binding '{}' to '/{}'", bind.source.display(), bind.target.display());
        let tree = clone_tree(CWD, &bind.source, bind.recursive).during("open_tree", binding)?;
        if bind.read_only {
            sys::make_read_only(tree.as_fd()).during("mount_setattr", binding)?;
        }
        let target = self.find(&bind.target, OFlags::PATH).during("openat2", binding)?;
        attach(&tree, target.as_fd()).during("move_mount", binding)
    }

    /// Becomes `/`, with the old root on top of it.
    fn pivot(&self) -> Step<()> {
        let pivoting = || "entering the new root".to_owned();
        rustix::process::fchdir(&self.fd).during("fchdir", pivoting)?;
        rustix::process::pivot_root(".", ".").during("pivot_root", pivoting)
    }
}

/// Are `/dev/pts` and `/dev/ptmx` ours to make?
fn own_pts(root: &Root) -> bool {
    let is_bound = |path: &str| root.binds.iter().any(|b| b.target == Path::new(path));
    root.dev.as_ref().is_some_and(|dev| dev.pts) && !is_bound("/dev/pts") && !is_bound("/dev/ptmx")
}

/// What is there, as a mount that is nowhere yet.
fn clone_tree(at: BorrowedFd<'_>, path: impl AsRef<Path>, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    flags.set(OpenTreeFlags::AT_EMPTY_PATH, path.as_ref().as_os_str().is_empty());
    open_tree(at, path.as_ref(), flags)
}

fn attach(tree: &OwnedFd, target: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, "", target, "", flags)
}

/// Mounts that are not the host's. We are in the new root, so that names mean what is in it; the
/// host's `/proc` is still somewhere below, which is what allows an ordinary user a new one.
fn mount_own(root: &Root, plan: &Plan) -> Step<()> {
    let own = |fs: &str, target: &str, flags: MountFlags, options: String| {
        let options = std::ffi::CString::new(options).map_err(|_| Errno::INVAL);
        options
            .and_then(|options| mount(fs, target, fs, flags, Some(options.as_c_str())))
            .during(&format!("mount({fs})"), || format!("mounting '{target}'"))
    };
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    if root.proc {
        // For the kernel's knobs root is root in whatever namespace.
        let is_root = plan.ids.as_ref().map_or(rustix::process::geteuid().is_root(), |ids| ids.uid == 0);
        let read_only = if is_root { MountFlags::RDONLY } else { MountFlags::empty() };
        own("proc", "/proc", plain | MountFlags::NOEXEC | read_only, String::new())?;
    }
    let Some(dev) = &root.dev else { return Ok(()) };
    if let Some(size) = &dev.shm_size {
        own("tmpfs", "/dev/shm", plain, format!("mode=1777,size={size}"))?;
    }
    // Else the place is bound. An instance of its own, always: the kernels that could share one
    // are older than the calls above.
    if own_pts(root) {
        own(
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "newinstance,mode=0620,ptmxmode=0666".into(),
        )?;
    }
    Ok(())
}
