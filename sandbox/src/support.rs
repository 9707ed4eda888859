//! What the kernel lets us have, found out by trying.

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::filter::Part;
use crate::ids;
use crate::launch::{Job, LaunchError, Launcher, ask, unexpected};
use crate::report::{During, Report, SetupError, Step};
use crate::sys::{self, Forked};

/// What a launcher of ours could do, each tried in a process of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Support {
    /// Entering a user namespace and mapping ids.
    pub user_namespace: Result<(), SetupError>,
    /// All others that a sandbox needs; as an ordinary user, within a user namespace.
    pub namespaces: Result<(), SetupError>,
    /// A new `/proc` in a process namespace of its own.
    pub proc: Result<(), SetupError>,
    /// A terminal for the log.
    pub terminal: Result<(), SetupError>,
    /// The system call filter.
    pub filter: Result<(), SetupError>,
    /// Version of Landlock; 0: there is none. From 6 on it has the scopes that keep builders with
    /// network from handing each other descriptors.
    pub landlock: u32,
    pub kvm: bool,
}

impl Support {
    /// Can there be a sandbox at all?
    pub fn has_sandbox(&self) -> bool {
        self.namespaces.is_ok() && self.proc.is_ok()
    }
}

/// Tries it all; some milliseconds.
pub fn support(launcher: &Launcher) -> Result<Support, LaunchError> {
    match ask(&Job::Probe, launcher)? {
        Report::Support(support) => Ok(*support),
        Report::Failed(error) => Err(LaunchError::Setup(error)),
        report => Err(unexpected(&report)),
    }
}

pub(crate) fn try_all() -> Support {
    Support {
        user_namespace: in_child(try_user_namespace),
        namespaces: in_child(|| try_namespaces().map(drop)),
        proc: in_child(try_proc),
        terminal: try_terminal(),
        filter: in_child(try_filter),
        landlock: sys::landlock_version(),
        kvm: rustix::fs::access("/dev/kvm", rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_ok(),
    }
}

/// What a child process makes of it, which comes back over a pipe.
fn in_child(attempt: impl FnOnce() -> Step<()>) -> Step<()> {
    let trying = || "trying what the kernel allows".to_owned();
    let (from, to) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during("pipe", trying)?;
    let forked = sys::fork().during("fork", trying)?;
    let Forked::Parent(pid) = forked else {
        drop(from);
        let result = attempt();
        let bytes = postcard::to_stdvec(&result).unwrap_or_default();
        // Far below what a pipe holds.
        let told = rustix::io::write(&to, &bytes);
        sys::exit(i32::from(told.is_err()))
    };
    drop(to);
    let mut bytes = Vec::new();
    let read = std::io::Read::read_to_end(&mut std::fs::File::from(from), &mut bytes);
    drop(sys::wait_for(pid));
    read.during("read", trying)?;
    postcard::from_bytes(&bytes).unwrap_or_else(|_| Err(SetupError::new(trying(), "fork", Errno::CHILD)))
}

fn try_user_namespace() -> Step<()> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    ids::namespaces("unshare(CLONE_NEWUSER)", libc::CLONE_NEWUSER, "creating the user namespace")?;
    ids::write_maps("/proc/self", 1000, 100, (uid, gid))
}

fn try_namespaces() -> Step<()> {
    if !rustix::process::geteuid().is_root() {
        try_user_namespace()?;
    }
    let kinds = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET | libc::CLONE_NEWPID;
    let call = "unshare(CLONE_NEWNS|CLONE_NEWIPC|CLONE_NEWUTS|CLONE_NEWNET|CLONE_NEWPID)";
    ids::namespaces(call, kinds, "creating the namespaces")
}

fn try_proc() -> Step<()> {
    try_namespaces()?;
    in_child(|| {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
            .during("mount(MS_PRIVATE)", || "making all mounts private".into())?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("proc", "/proc", "proc", flags, None).during("mount(proc)", || "mounting '/proc'".into())
    })
}

fn try_terminal() -> Step<()> {
    use rustix::pty::OpenptFlags;
    rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .map(drop)
        .during("open", || "opening '/dev/ptmx'".into())
        .map_err(|e| e.with_hint("mount a devpts on /dev/pts and make /dev/ptmx usable"))
}

fn try_filter() -> Step<()> {
    ids::no_new_privileges()?;
    ids::install_filter(Part::Early)?;
    ids::install_filter(Part::Late)
}
