//! Sockets and pipes: listening, and the ends of a connection.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use larder_fs::file_error::FileError;
use larder_wire::worker::tunnel::{Line, Outlet};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::conf::Env;

/// A client that takes nothing of a reply for this long is given up.
const WRITE_TIMEOUT: Duration = Duration::from_mins(5);

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    #[error("unexpected systemd environment variables")]
    Activation,
    #[error("using the socket that the service manager gave us")]
    Given(#[source] io::Error),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot bind to socket '{}'", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error("'{}' is in the way of the socket, and is no socket itself", path.display())]
    InTheWay { path: PathBuf },
}

/// A socket that clients connect to.
#[derive(Debug)]
pub struct Listener {
    pub socket: UnixListener,
    /// Where we made it: device, inode and path. None if somebody gave it to us.
    made: Option<(u64, u64, PathBuf)>,
}

impl Listener {
    /// The socket that a service manager gave us, if it did.
    pub fn activated(env: &Env) -> Result<Option<Self>, ListenError> {
        let Some(count) = env.get("LISTEN_FDS") else { return Ok(None) };
        let pid = std::process::id().to_string();
        if count != "1" || env.get("LISTEN_PID") != Some(pid.as_ref()) {
            return Err(ListenError::Activation);
        }
        let socket = listenfd::ListenFd::from_env().take_unix_listener(0).map_err(ListenError::Given)?;
        let socket = socket.ok_or(ListenError::Activation)?;
        Ok(Some(Self { socket, made: None }))
    }

    /// Makes a socket that everybody may connect to, in place of one that is left over.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        if let Some(dir) = path.parent() {
            larder_fs::layout::make_dirs(dir)?;
        }
        match std::fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ListenError::InTheWay { path: path.to_owned() });
            }
            _ => {}
        }
        let failed = |source| ListenError::Bind { path: path.to_owned(), source };
        // Under another name first, so that clients find the old socket or the ready new one.
        let dir = path.parent().unwrap_or(Path::new("/"));
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let dir_fd = rustix::fs::open(dir, flags, rustix::fs::Mode::empty()).map_err(|e| failed(e.into()))?;
        let temporary = OsString::from(format!(".larder-{}", std::process::id()));
        // An address holds 108 bytes, and paths may be longer.
        let address = PathBuf::from(larder_fs::entry::proc_path(dir_fd.as_fd())).join(&temporary);
        let _ = rustix::fs::unlinkat(&dir_fd, &temporary, rustix::fs::AtFlags::empty());
        let socket = UnixListener::bind(&address).map_err(failed)?;
        std::fs::set_permissions(&address, std::fs::Permissions::from_mode(0o666)).map_err(failed)?;
        let status = std::fs::symlink_metadata(&address).map_err(failed)?;
        std::fs::rename(&address, path).map_err(failed)?;
        Ok(Self { socket, made: Some((status.dev(), status.ino(), path.to_owned())) })
    }

    /// Takes the socket away, unless somebody else has put theirs there.
    pub fn remove(self) {
        if let Some((dev, ino, path)) = self.made
            && std::fs::symlink_metadata(&path).is_ok_and(|found| (found.dev(), found.ino()) == (dev, ino))
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// What is known of a connection, shared by its ends and by who would end it.
#[derive(Debug)]
pub struct Shared {
    stream: UnixStream,
    /// A client that we wait for, in the middle of something, must send some bytes in this time.
    stall: Option<Duration>,
    /// Has writing its limit of time? It gets it when there is something to wait for.
    writes_end: AtomicBool,
    state: Mutex<SharedState>,
}

#[derive(Debug, Default)]
struct SharedState {
    deadline: Option<Instant>,
    /// Is it waiting for a request?
    resting: bool,
    /// Is it to end when it has nothing to do?
    ending: bool,
    /// Is it to end at once?
    cancelled: bool,
}

impl Shared {
    /// `stall`: a client that sends nothing for so long in the middle of something is given up.
    pub fn new(stream: UnixStream, stall: Option<Duration>) -> Arc<Self> {
        Arc::new(Self { stream, stall, writes_end: AtomicBool::new(false), state: Mutex::default() })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, SharedState> {
        // A panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connection as soon as it rests.
    pub fn end(&self) {
        let mut state = self.state();
        state.ending = true;
        if state.resting {
            let _ = self.stream.shutdown(std::net::Shutdown::Read);
        }
    }

    /// Ends the connection now; its work is interrupted.
    pub fn cancel(&self) {
        self.state().cancelled = true;
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// How a socket is read without waking for nothing.
///
/// Whoever sleeps in `recv` is woken not only by what comes, but also each time the other side takes
/// some of what it was sent. Whoever sleeps in `poll` for what comes is not.
#[derive(Debug, Default)]
pub struct Ear {
    /// Did the last piece fill what there was room for, so that there probably is more?
    is_flowing: bool,
}

impl Ear {
    /// What comes next, in at most so long. `None`: nothing did, and there may be some time left.
    pub fn hear(
        &mut self,
        socket: &UnixStream,
        into: &mut [u8],
        at_most: Option<Duration>,
    ) -> io::Result<Option<usize>> {
        if !self.is_flowing {
            let at_most = at_most.map(|left| rustix::event::Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            match poll(&mut [PollFd::new(socket, PollFlags::IN)], at_most.as_ref()) {
                Ok(0) | Err(Errno::INTR) => return Ok(None),
                outcome => outcome?,
            };
        }
        match recv(socket, &mut *into, RecvFlags::DONTWAIT) {
            Ok((n, _)) => {
                self.is_flowing = n == into.len();
                Ok(Some(n))
            }
            Err(Errno::AGAIN) => {
                self.is_flowing = false;
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The reading end of a socket.
pub struct Reader {
    shared: Arc<Shared>,
    ear: Ear,
}

impl Reader {
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared, ear: Ear::default() }
    }

    /// When what is read now must have come.
    fn deadline(&self) -> Option<Instant> {
        let (deadline, resting) = {
            let state = self.shared.state();
            (state.deadline, state.resting)
        };
        match deadline {
            None if resting => None,
            None => self.shared.stall.map(|stall| Instant::now() + stall),
            deadline => deadline,
        }
    }
}

impl Read for Reader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let deadline = self.deadline();
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if let Some(n) = self.ear.hear(&self.shared.stream, into, left)? {
                return Ok(n);
            }
        }
    }
}

/// The reading end of a socket to a daemon, which may take as long as it will.
#[derive(Debug)]
pub struct PatientReader {
    stream: UnixStream,
    ear: Ear,
}

impl PatientReader {
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, ear: Ear::default() }
    }
}

impl Read for PatientReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(n) = self.ear.hear(&self.stream, into, None)? {
                return Ok(n);
            }
        }
    }
}

/// The writing end of a socket.
pub struct Writer(pub Arc<Shared>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Most replies fit into what the system keeps for the client.
        if !self.0.writes_end.load(Ordering::Relaxed) {
            match self.try_write(bytes)? {
                0 if !bytes.is_empty() => {
                    self.0.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
                    self.0.writes_end.store(true, Ordering::Relaxed);
                }
                n => return Ok(n),
            }
        }
        (&self.0.stream).write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Outlet for Writer {
    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match send(&self.0.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) => Ok(n),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}

/// A socket as the line of a connection.
pub struct SocketLine(pub Arc<Shared>);

impl Line for SocketLine {
    fn has_hung_up(&self) -> bool {
        self.0.state().cancelled || has_hung_up(self.0.stream.as_fd(), PollFlags::RDHUP)
    }
    fn set_deadline(&self, after: Option<Duration>) {
        self.0.state().deadline = after.map(|after| Instant::now() + after);
    }
    fn set_resting(&self, resting: bool) {
        let mut state = self.0.state();
        state.resting = resting;
        if resting && state.ending {
            let _ = self.0.stream.shutdown(std::net::Shutdown::Read);
        }
    }
}

fn has_hung_up(fd: BorrowedFd<'_>, wanted: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, wanted)];
    let gone = wanted | PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
    poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|n| n > 0)
        && fds.iter().any(|fd| fd.revents().intersects(gone))
}

/// Standard output as the way to the client.
pub struct StdoutWriter(pub File);

impl StdoutWriter {
    /// A descriptor of its own.
    pub fn new() -> io::Result<Self> {
        Ok(Self(io::stdout().as_fd().try_clone_to_owned()?.into()))
    }
}

impl Write for StdoutWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Outlet for StdoutWriter {
    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A pipe takes a page at least when it says that it takes something.
        let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::OUT)];
        let ready = poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        if ready == 0 { Ok(0) } else { self.0.write(bytes.get(..4096.min(bytes.len())).unwrap_or_default()) }
    }
}

/// Standard input and output as the line of a connection; it is cancelled by signals as well.
pub struct StdioLine(pub crate::interrupt::Interrupt);

impl Line for StdioLine {
    fn has_hung_up(&self) -> bool {
        self.0.is_raised()
            || has_hung_up(io::stdin().as_fd(), PollFlags::RDHUP)
            || has_hung_up(io::stdout().as_fd(), PollFlags::ERR)
    }
    fn set_deadline(&self, _: Option<Duration>) {}
}
