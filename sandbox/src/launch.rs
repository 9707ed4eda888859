//! Starting a builder, and following it to its end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;
use serde::{Deserialize, Serialize};

use crate::plan::{Isolation, Plan, PlanError};
use crate::report::{Report, SetupError};
use crate::sys;
use crate::zygote::{Nest, Zygote, execute};

/// First argument of the program when it is to be a launcher.
pub const LAUNCHER_WORD: &str = "__sandbox";

/// What traces of a [`LaunchError`] say that it happened in.
pub const SETUP_TRACE: &str = "while setting up the build environment";

/// How the program is executed anew. Clones share the process from which launchers are forked,
/// which lives as long as the last of them.
#[derive(Debug, Clone)]
pub struct Launcher {
    pub program: PathBuf,
    /// Its first argument, on which it must call [`crate::enter::launcher_main`].
    pub word: String,
    nest: Nest,
}

impl Default for Launcher {
    /// The program that is running, even if its file was replaced meanwhile.
    fn default() -> Self {
        Self::new("/proc/self/exe")
    }
}

impl Launcher {
    /// This program, with [`LAUNCHER_WORD`].
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), word: LAUNCHER_WORD.into(), nest: Nest::default() }
    }

    pub(crate) fn not_executed(&self, errno: [u8; 4]) -> LaunchError {
        let source = io::Error::from_raw_os_error(i32::from_le_bytes(errno));
        LaunchError::Spawn { program: self.program.clone(), source }
    }
}

/// What a launcher is to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    Build(Box<Plan>),
    /// Fork launchers, with the early part of the filter or without.
    Zygote {
        filtered: bool,
    },
    /// Kill all processes of a user.
    KillUser(u32),
    /// Try what the kernel allows.
    Probe,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    #[error("the builder cannot be run as planned")]
    Plan(#[from] PlanError),
    /// The kernel refused a step; show [`SETUP_TRACE`] with it.
    #[error(transparent)]
    Setup(SetupError),
    #[error("cannot open a pseudo-terminal for the log; is a devpts mounted on /dev/pts?")]
    Terminal(#[source] io::Error),
    #[error("cannot start the launcher '{}'; is /proc mounted?", program.display())]
    Spawn { program: PathBuf, source: io::Error },
    #[error("cannot hand the launcher its job")]
    Job(#[source] io::Error),
    #[error("cannot follow the launcher")]
    Follow(#[source] io::Error),
    #[error("the launcher ended early; was it killed?")]
    Lost,
    #[error("refusing to kill all processes of root")]
    KillRoot,
}

impl LaunchError {
    /// Is it that this kernel does not let us have namespaces? Then `sandbox-fallback` applies.
    pub fn is_about_namespaces(&self) -> bool {
        matches!(self, Self::Setup(error) if error.namespaces)
    }
}

/// How a builder ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(u8),
    Signalled(i32),
}

impl Ended {
    fn of_status(status: i32) -> Self {
        if libc::WIFSIGNALED(status) {
            return Self::Signalled(libc::WTERMSIG(status));
        }
        Self::Exited(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
    }

    pub fn is_success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Signalled(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Starts the builder of a plan; returns when it is set up and about to execute its program.
///
/// A program that cannot be executed is no error here: the log says so, and the exit code is 1
/// (building, rule 9.14).
pub fn launch(plan: &Plan, launcher: &Launcher) -> Result<Child, LaunchError> {
    plan.check()?;
    if rustix::process::geteuid().is_root()
        && let Isolation::Root(root) = &plan.isolation
        && root.user_namespace.is_none()
        && plan.ids.as_ref().is_none_or(|ids| ids.uid == 0)
    {
        return Err(PlanError::Root.into());
    }
    let (master, slave) = open_terminal(plan).map_err(LaunchError::Terminal)?;
    let job = job_file(&Job::Build(Box::new(plan.clone()))).map_err(LaunchError::Job)?;
    let filtered = plan.filter_syscalls && plan.no_new_privileges;
    let mut running = Running::fork(job.as_fd(), launcher, Some(filtered), slave.as_fd())?;
    drop(slave);
    match running.receive(launcher)? {
        Report::Ready => Ok(Child { log: Log(File::from(master)), running, ended: None }),
        Report::Failed(error) => Err(LaunchError::Setup(error)),
        report => Err(unexpected(&report)),
    }
}

/// Kills all processes of a user, wherever they run, and waits until they are gone.
pub fn kill_user(uid: u32, launcher: &Launcher) -> Result<(), LaunchError> {
    if uid == 0 {
        return Err(LaunchError::KillRoot);
    }
    let null = open_null().map_err(LaunchError::Job)?;
    let job = job_file(&Job::KillUser(uid)).map_err(LaunchError::Job)?;
    match Running::fork(job.as_fd(), launcher, None, null.as_fd())?.receive(launcher)? {
        Report::Killed => Ok(()),
        Report::Failed(error) => Err(LaunchError::Setup(error)),
        report => Err(unexpected(&report)),
    }
}

/// Has a launcher executed that only answers.
pub(crate) fn ask(job: &Job, launcher: &Launcher) -> Result<Report, LaunchError> {
    let null = open_null().map_err(LaunchError::Job)?;
    Running::execute(job, launcher, null.as_fd())?.receive(launcher)
}

pub(crate) fn unexpected(report: &Report) -> LaunchError {
    let text = format!("unexpected report {report:?}");
    LaunchError::Follow(io::Error::new(io::ErrorKind::InvalidData, text))
}

/// A builder that runs, or has ended. Dropped, it is killed and reaped.
#[derive(Debug)]
pub struct Child {
    log: Log,
    running: Running,
    ended: Option<Ended>,
}

impl Child {
    /// What the builder and its children write.
    pub fn log(&mut self) -> &mut Log {
        &mut self.log
    }

    /// The same, for a thread of its own.
    pub fn try_clone_log(&self) -> io::Result<Log> {
        self.log.0.try_clone().map(Log)
    }

    /// Readable when the builder has ended, so that [`Child::wait`] will not wait.
    pub fn end(&self) -> BorrowedFd<'_> {
        self.running.control.as_fd()
    }

    /// The launcher's process. It ends after the builder.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.running.pidfd.as_fd()
    }

    /// The launcher's process id, for people and for traces.
    pub fn id(&self) -> u32 {
        self.running.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Kills the builder and all that it has started; [`Child::wait`] tells when that is done.
    pub fn kill(&self) {
        self.running.stop();
    }

    /// Waits for the builder's end, and until all it has started in the sandbox is gone.
    ///
    /// Without a sandbox what it has left behind is killed then (but not before: it may still
    /// write to the log, whose end is the end of the build).
    pub fn wait(&mut self) -> Result<Ended, LaunchError> {
        if let Some(ended) = self.ended {
            return Ok(ended);
        }
        let ended = match self.running.receive_end()? {
            Some(ended) => ended,
            // The launcher itself was killed: the builder has no better chance.
            None => Ended::Signalled(libc::SIGKILL),
        };
        self.ended = Some(ended);
        self.running.reap().map_err(LaunchError::Follow)?;
        Ok(ended)
    }

    /// As [`Child::wait`], but gives up after that time with `None`.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<Ended>, LaunchError> {
        if self.ended.is_none() && !readable(self.end(), timeout).map_err(LaunchError::Follow)? {
            return Ok(None);
        }
        self.wait().map(Some)
    }

    /// After the end of the log: waits for the builder for that long, then kills it.
    ///
    /// A builder that closes its output just before it exits is not failed for it.
    pub fn finish(&mut self, grace: Duration) -> Result<Ended, LaunchError> {
        if let Some(ended) = self.wait_timeout(grace)? {
            return Ok(ended);
        }
        self.kill();
        self.wait()
    }
}

/// The master of the builder's pseudo-terminal; ends when no process has the other side.
#[derive(Debug)]
pub struct Log(File);

impl Read for Log {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match self.0.read(to) {
            // What Linux says when the last slave is closed.
            Err(e) if e.raw_os_error() == Some(libc::EIO) => Ok(0),
            result => result,
        }
    }
}

impl AsFd for Log {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A launcher.
#[derive(Debug)]
struct Running {
    pid: Pid,
    pidfd: OwnedFd,
    control: OwnedFd,
    /// Of which it was forked, and which lives as long; or it is our own child, to be reaped by us.
    parent: Option<Arc<Zygote>>,
    is_reaped: bool,
}

impl Running {
    /// Has a launcher executed.
    fn execute(job: &Job, launcher: &Launcher, output: BorrowedFd<'_>) -> Result<Self, LaunchError> {
        let (pid, control) = execute(job, launcher, output)?;
        // It is our child and not yet reaped, so that the number is still its own.
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { pid, pidfd, control, parent: None, is_reaped: false }),
            Err(e) => {
                drop(control);
                drop(sys::wait_for(pid));
                Err(LaunchError::Follow(e.into()))
            }
        }
    }

    /// Has a launcher forked, filtered or not if it is told.
    fn fork(
        job: BorrowedFd<'_>,
        launcher: &Launcher,
        filtered: Option<bool>,
        output: BorrowedFd<'_>,
    ) -> Result<Self, LaunchError> {
        // A zygote that somebody has killed is followed by another; one more death is a fault.
        for _ in 0..2 {
            let zygote = launcher.nest.zygote(launcher, filtered)?;
            if let Ok(control) = zygote.fork(job, output) {
                match Report::receive_with(control.as_fd()).map_err(LaunchError::Follow)? {
                    (Some(Report::Started(pid)), Some(pidfd)) => {
                        let pid = Pid::from_raw(pid).ok_or(LaunchError::Lost)?;
                        return Ok(Self { pid, pidfd, control, parent: Some(zygote), is_reaped: false });
                    }
                    (Some(Report::Failed(error)), _) => return Err(LaunchError::Setup(error)),
                    (Some(report), _) => return Err(unexpected(&report)),
                    (None, _) => {}
                }
            }
            launcher.nest.forget(&zygote);
        }
        Err(LaunchError::Lost)
    }

    /// The first report.
    fn receive(&mut self, launcher: &Launcher) -> Result<Report, LaunchError> {
        match Report::receive(self.control.as_fd()).map_err(LaunchError::Follow)? {
            Some(Report::ExecFailed(errno)) => Err(launcher.not_executed(errno)),
            Some(report) => Ok(report),
            None => {
                self.reap().map_err(LaunchError::Follow)?;
                Err(LaunchError::Lost)
            }
        }
    }

    fn receive_end(&self) -> Result<Option<Ended>, LaunchError> {
        match Report::receive(self.control.as_fd()).map_err(LaunchError::Follow)? {
            Some(Report::Ended(status)) => Ok(Some(Ended::of_status(status))),
            None => Ok(None),
            // The builder was set up, and then was not: its program could not be executed as the
            // kernel promised. Nothing sends this today.
            Some(report) => Err(unexpected(&report)),
        }
    }

    /// The launcher sees the end of its socket, kills what runs, and ends.
    fn stop(&self) {
        // It can only fail if the other side has ended.
        let _ = rustix::net::shutdown(&self.control, Shutdown::Write);
    }

    fn reap(&mut self) -> io::Result<()> {
        self.stop();
        self.is_reaped = true;
        if self.parent.is_none() {
            return sys::wait_for(self.pid).map(drop);
        }
        wait_readable(self.pidfd.as_fd())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.is_reaped {
            // Nobody is left to be told.
            drop(self.reap());
        }
    }
}

/// Waits for something to read, or an end.
fn wait_readable(fd: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Is there something to read, or an end, within that time?
fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = left.try_into().map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)) {
            Ok(n) => return Ok(n > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// A memory file with the job in it; it is no program's business, and never on a disk.
pub(crate) fn job_file(job: &Job) -> io::Result<OwnedFd> {
    let bytes = postcard::to_stdvec(job).map_err(io::Error::other)?;
    let file = rustix::fs::memfd_create("larder-plan", MemfdFlags::CLOEXEC)?;
    let mut rest = bytes.as_slice();
    let mut at = 0;
    while !rest.is_empty() {
        let n = rustix::io::pwrite(&file, rest, at)?;
        at += n as u64;
        rest = rest.get(n..).unwrap_or_default();
    }
    Ok(file)
}

pub(crate) fn open_null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

/// A pseudo-terminal in raw mode; the slave is the builder's alone (building, rule 5.3).
fn open_terminal(plan: &Plan) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&master)?;
    // By descriptor, not by name: /dev/pts may show another instance.
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::fs::fchmod(&slave, Mode::RUSR | Mode::WUSR)?;
    if let Some(ids) = &plan.ids
        && rustix::process::geteuid().is_root()
    {
        rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(ids.uid)), None)?;
    }
    let mut mode = rustix::termios::tcgetattr(&slave)?;
    mode.make_raw();
    rustix::termios::tcsetattr(&slave, OptionalActions::Now, &mode)?;
    Ok((master, slave))
}
