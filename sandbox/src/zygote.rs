//! One launcher that is executed, from which all others are forked.
//!
//! To execute a program costs ten times what it costs to fork a process that has one thread and few
//! pages, and a build has enough to pay for already. So the first build executes a *zygote*, which
//! does nothing but fork a launcher for each request. A request carries descriptors: where the
//! builder writes, the launcher's socket, and its job. The launcher's first message is a handle on
//! itself; from then on it is as if it had been executed, but for its parent, which does not look
//! after it: it ends when its own socket does.
//!
//! There are two at most: one that has the early part of the filter already, which its launchers
//! inherit, and one without, for builders that are to have none.
//!
//! The zygote ends with the socket on which it is asked, and so with whoever has started it.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, recvmsg, sendmsg,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::enter;
use crate::filter::Part;
use crate::ids;
use crate::launch::{Job, LaunchError, Launcher, job_file, open_null, unexpected};
use crate::report::{Report, SetupError, tell_failure};
use crate::sys::{self, Forked, Words};

/// What the two are called in lists of processes.
const ZYGOTE_NAME: &CStr = c"larder-zygote";
const LAUNCHER_NAME: &CStr = c"larder-launcher";

/// Descriptors of a request.
const ASKED_WITH: usize = 3;

/// The zygotes of whoever shares this, plain and filtered: executed when they are first needed, and
/// anew if they were killed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Nest(Arc<Mutex<[Option<Arc<Zygote>>; 2]>>);

#[derive(Debug)]
pub(crate) struct Zygote {
    pid: Pid,
    socket: OwnedFd,
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // It can only fail if the other side has ended.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        drop(sys::wait_for(self.pid));
    }
}

impl Nest {
    /// The zygote that is there, or a new one; any will do if `filtered` is not told.
    pub(crate) fn zygote(&self, launcher: &Launcher, filtered: Option<bool>) -> Result<Arc<Zygote>, LaunchError> {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let [plain, with_filter] = &mut *places;
        let (place, filtered) = match filtered {
            Some(true) => (with_filter, true),
            None if with_filter.is_some() => (with_filter, true),
            Some(false) | None => (plain, false),
        };
        if let Some(zygote) = place {
            return Ok(Arc::clone(zygote));
        }
        let zygote = Arc::new(Zygote::start(launcher, filtered)?);
        *place = Some(Arc::clone(&zygote));
        Ok(zygote)
    }

    /// This one is of no use any more.
    pub(crate) fn forget(&self, zygote: &Arc<Zygote>) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for place in &mut *places {
            place.take_if(|kept| Arc::ptr_eq(kept, zygote));
        }
    }
}

impl Zygote {
    fn start(launcher: &Launcher, filtered: bool) -> Result<Self, LaunchError> {
        let null = open_null().map_err(LaunchError::Job)?;
        let (pid, socket) = execute(&Job::Zygote { filtered }, launcher, null.as_fd())?;
        let zygote = Self { pid, socket };
        match Report::receive(zygote.socket.as_fd()).map_err(LaunchError::Follow)? {
            Some(Report::Ready) => Ok(zygote),
            Some(Report::ExecFailed(errno)) => Err(launcher.not_executed(errno)),
            Some(Report::Failed(error)) => Err(LaunchError::Setup(error)),
            Some(report) => Err(unexpected(&report)),
            None => Err(LaunchError::Lost),
        }
    }

    /// Has it fork a launcher, whose socket is given back. An error tells that it was killed.
    pub(crate) fn fork(&self, job: BorrowedFd<'_>, output: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let (control, theirs) = socket_pair()?;
        send_with(self.socket.as_fd(), b"!", &[output, theirs.as_fd(), job])?;
        Ok(control)
    }
}

/// Executes a launcher with that job; gives its process and its socket.
pub(crate) fn execute(job: &Job, launcher: &Launcher, output: BorrowedFd<'_>) -> Result<(Pid, OwnedFd), LaunchError> {
    let job = job_file(job).map_err(LaunchError::Job)?;
    let null = open_null().map_err(LaunchError::Job)?;
    let (control, theirs) = socket_pair().map_err(LaunchError::Job)?;
    let argv = Words::new([b"larder".as_slice(), launcher.word.as_bytes()]);
    let fds = [null.as_fd(), output, output, theirs.as_fd(), job.as_fd()];
    let spawn = |source| LaunchError::Spawn { program: launcher.program.clone(), source };
    let pid = sys::spawn(&launcher.program, &argv, fds).map_err(spawn)?;
    Ok((pid, control))
}

fn socket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Set once, by a zygote before it has children.
static FILTERED: OnceLock<()> = OnceLock::new();

/// Has this process come from a zygote that has the early part of the filter?
pub(crate) fn is_filtered() -> bool {
    FILTERED.get().is_some()
}

/// What the zygote does.
pub(crate) fn zygote(socket: OwnedFd, filtered: bool) -> ! {
    if filtered {
        if let Err(e) = ids::no_new_privileges().and_then(|()| ids::install_filter(Part::Early)) {
            tell_failure(&socket, e);
            sys::exit(1)
        }
        let _ = FILTERED.set(());
    }
    // For people; what cannot be named goes without.
    let _ = rustix::thread::set_name(ZYGOTE_NAME);
    let Ok(signals) = sys::child_signals() else { sys::exit(1) };
    if Report::Ready.send(socket.as_fd()).is_err() {
        sys::exit(1)
    }
    loop {
        if !enter::wait_readable(socket.as_fd(), signals.as_fd()) {
            reap(signals.as_fd());
            continue;
        }
        let mut word = [0; 8];
        let fds = match receive_with(socket.as_fd(), &mut word) {
            Ok((0, _)) => break,
            Ok((_, fds)) => fds,
            Err(_) => sys::exit(1),
        };
        let Ok([output, control, job]) = <[OwnedFd; ASKED_WITH]>::try_from(fds) else { continue };
        match sys::fork() {
            Ok(Forked::Parent(_)) => {}
            Ok(Forked::Child) => {
                // Who asks a dead zygote must learn that nobody listens.
                drop((socket, signals));
                launcher(output, control, job)
            }
            Err(e) => {
                let errno = Errno::from_io_error(&e).unwrap_or(Errno::AGAIN);
                tell_failure(&control, SetupError::new("starting a launcher", "fork", errno));
            }
        }
    }
    reap(signals.as_fd());
    sys::exit(0)
}

/// Takes the zombies away. How they have ended is for those who have handles on them; but the time
/// that they took becomes ours, and so that of the program that had it all done.
fn reap(signals: BorrowedFd<'_>) {
    sys::drain(signals);
    while let Ok(Some(_)) = sys::wait_any(libc::WNOHANG) {}
}

/// The zygote's child becomes what would otherwise be executed.
fn launcher(output: OwnedFd, control: OwnedFd, job: OwnedFd) -> ! {
    let _ = rustix::thread::set_name(LAUNCHER_NAME);
    let begun: io::Result<OwnedFd> = (|| {
        rustix::process::setsid()?;
        sys::print_to(output.as_fd())?;
        Ok(pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?)
    })();
    // The log ends when nobody has it open any more.
    drop(output);
    match begun {
        Ok(handle) => {
            let report = Report::Started(rustix::process::getpid().as_raw_nonzero().get());
            if report.send_with(control.as_fd(), handle.as_fd()).is_err() {
                sys::exit(1)
            }
        }
        Err(e) => {
            let errno = Errno::from_io_error(&e).unwrap_or(Errno::IO);
            tell_failure(&control, SetupError::new("starting a launcher", "pidfd_open", errno));
            sys::exit(1)
        }
    }
    enter::launcher(control, job)
}

/// A message with descriptors.
pub(crate) fn send_with(to: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ASKED_WITH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(to, &[io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Waits for a message; 0: the other end is closed.
pub(crate) fn receive_with(from: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ASKED_WITH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    loop {
        let mut into = [io::IoSliceMut::new(bytes)];
        match recvmsg(from, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(message) => {
                let size = message.bytes;
                let rights = control.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                });
                return Ok((size, rights.flatten().collect()));
            }
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok((0, Vec::new())),
            Err(e) => return Err(e.into()),
        }
    }
}
