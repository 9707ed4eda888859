//! The daemon: who connects, and a thread for each.
//!
//! Everything about the protocol is in `larder-wire`; here are sockets, users and signals.

mod crew;
mod notify;
pub mod overlay;
pub mod peer;
pub mod relay;
pub mod socket;

use std::collections::HashMap;
use std::io::{self, BufReader};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use larder_core::api::{Store, StoreError};
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_realise::sharing::SharedBuilds;
use larder_store::LocalStore;
use larder_wire::Budget;
use larder_wire::worker::ops::SetOptions;
use larder_wire::worker::server::{self, Host, Session};
use larder_wire::worker::tunnel::Tunnel;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::socket_peercred;

use self::crew::{Crew, Door, Work};
use self::notify::notify;
use self::overlay::{Overlays, Rules, Terms};
use self::peer::{Peer, Trust};
use self::socket::{Listener, Reader, Shared, SocketLine, StdioLine, StdoutWriter, Writer};
use crate::applets::NIX_VERSION;
use crate::conf::Env;
use crate::engine::Engine;
use crate::interrupt::Interrupt;
use crate::terminal::Terminal;

/// Memory that requests and replies of all connections may take, in bytes.
const BUDGET: usize = 96 << 20;

/// Most connections at a time, and most of one user other than root.
const MAX_CONNECTIONS: usize = 4096;
const MAX_PER_USER: usize = 1024;

/// Bytes that are read from a client at a time.
const READ_BUFFER: usize = 8 << 10;

/// How long connections may go on after we were told to end, and how long builds and connections
/// that were cancelled may take to tidy up.
const DRAIN: Duration = Duration::from_secs(30);
pub const LAST_GRACE: Duration = Duration::from_secs(5);

/// The program around its connections.
pub struct Daemon {
    pub store: LocalStore,
    /// For a client that wishes nothing else.
    terms: RwLock<Terms>,
    rules: Rules,
    pub terminal: Arc<Terminal>,
    pub budget: Arc<Budget>,
    pub interrupt: Interrupt,
    env: Arc<Env>,
    builds: Arc<SharedBuilds>,
    overlays: Overlays,
    connections: Mutex<Connections>,
    changed: Condvar,
}

#[derive(Default)]
struct Connections {
    last: u32,
    /// Does somebody wait for them to end?
    awaited: bool,
    open: HashMap<u32, (u32, Arc<Shared>)>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("store", &self.store).finish_non_exhaustive()
    }
}

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    #[error("waiting for connections")]
    Poll(#[source] io::Error),
    #[error("watching for signals")]
    Signals(#[source] io::Error),
    #[error("using standard output")]
    Stdout(#[source] io::Error),
}

impl Daemon {
    pub fn new(
        store: LocalStore,
        settings: Settings,
        rules: Rules,
        terminal: Arc<Terminal>,
        interrupt: Interrupt,
        env: Env,
    ) -> Self {
        Self {
            store,
            terms: RwLock::new(rules.terms(settings)),
            rules,
            terminal,
            budget: Budget::new(BUDGET),
            interrupt,
            env: Arc::new(env),
            builds: Arc::default(),
            overlays: Overlays::default(),
            connections: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    fn terms(&self) -> Terms {
        self.terms.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.terminal.message(level, text);
    }

    /// Takes connections until a signal comes; `reload` reads the settings again.
    pub fn listen(
        self: &Arc<Self>,
        listener: Listener,
        env: &Env,
        reload: &dyn Fn() -> Option<Settings>,
    ) -> Result<(), DaemonError> {
        let (wake, waker) = UnixStream::pair().map_err(DaemonError::Signals)?;
        wake.set_nonblocking(true).map_err(DaemonError::Signals)?;
        for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT, signal_hook::consts::SIGHUP] {
            let waker = waker.try_clone().map_err(DaemonError::Signals)?;
            signal_hook::low_level::pipe::register(signal, waker).map_err(DaemonError::Signals)?;
        }
        let interrupt = &self.interrupt;
        interrupt.count_hangups();
        // What is left to do after the drain, such as closing the ledger, may take its time as well.
        interrupt.hold_for_good();
        let crew = listener.socket.try_clone().and_then(|socket| Crew::open(Arc::clone(self), socket));
        let crew = crew.map_err(DaemonError::Poll)?;
        notify(env, "READY=1");
        let mut hangups = 0;
        let mut roused: Option<Instant> = None;
        while !interrupt.is_raised() {
            if hangups != interrupt.hangups() {
                hangups = interrupt.hangups();
                if let Some(settings) = reload() {
                    *self.terms.write().unwrap_or_else(PoisonError::into_inner) = self.rules.terms(settings);
                    self.log(Level::Info, format_args!("settings were read again"));
                }
            }
            let mut fds = [PollFd::from_borrowed_fd(wake.as_fd(), PollFlags::IN)];
            // The signal wakes us; what it means is known an instant later.
            let soon = rustix::event::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            let is_roused = roused.is_some_and(|at| at.elapsed() < Duration::from_secs(1));
            match poll(&mut fds, is_roused.then_some(&soon)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => {
                    let mut drained = [0; 64];
                    let _ = io::Read::read(&mut &wake, &mut drained);
                    roused = Some(Instant::now());
                }
                Err(error) => return Err(DaemonError::Poll(error.into())),
            }
        }
        notify(env, "STOPPING=1");
        listener.remove();
        crew.close(LAST_GRACE);
        self.drain();
        Ok(())
    }

    /// Waits for connections to end, first of themselves, then not.
    fn drain(&self) {
        for (_, shared) in self.connections().open.values() {
            shared.end();
        }
        self.wait_until_empty(DRAIN);
        for (_, shared) in self.connections().open.values() {
            shared.cancel();
        }
        self.wait_until_empty(LAST_GRACE);
        self.builds.wait_until_idle(LAST_GRACE);
    }

    fn wait_until_empty(&self, at_most: Duration) {
        let mut all = self.connections();
        all.awaited = true;
        let waited = self.changed.wait_timeout_while(all, at_most, |all| !all.open.is_empty());
        drop(waited);
    }

    /// Looks who it is.
    fn try_admit(self: &Arc<Self>, stream: UnixStream) -> Result<Work, AdmitError> {
        let peer = socket_peercred(&stream).map_err(|error| AdmitError::Credentials(error.into()))?;
        let (pid, uid, gid) = (peer.pid.as_raw_nonzero().get(), peer.uid.as_raw(), peer.gid.as_raw());
        let users = self.store.users();
        let peer = Peer::new(users, pid, uid, gid).map_err(AdmitError::Users)?;
        let settings = self.terms().settings;
        let trust = peer.judge(&settings, users).map_err(AdmitError::Users)?;
        let trust = trust.ok_or_else(|| AdmitError::NotAllowed { user: peer.user.clone() })?;
        let shared = Shared::new(stream, stall_limit(&settings));
        let number = {
            let mut all = self.connections();
            let of_user = all.open.values().filter(|(owner, _)| *owner == uid).count();
            if all.open.len() >= MAX_CONNECTIONS || (uid != 0 && of_user >= MAX_PER_USER) {
                return Err(AdmitError::TooMany { user: peer.user });
            }
            all.last = all.last.wrapping_add(1);
            let number = all.last;
            all.open.insert(number, (uid, Arc::clone(&shared)));
            number
        };
        let place = Place { daemon: Arc::clone(self), number };
        let suffix = if trust == Trust::Trusted { " (trusted)" } else { "" };
        self.log(Level::Info, format_args!("accepted connection from pid {pid}, user {}{suffix}", peer.user));
        Ok(Box::new(move || {
            let daemon = Arc::clone(&place.daemon);
            let options = server::Options {
                first_id: u64::from(number) << 32,
                ..server::Options::new(NIX_VERSION, trust == Trust::Trusted, Arc::clone(&daemon.budget))
            };
            let mut input = BufReader::with_capacity(READ_BUFFER, Reader::new(Arc::clone(&shared)));
            let (writer, line) = (Box::new(Writer(Arc::clone(&shared))), Box::new(SocketLine(shared)));
            let served = server::serve(&mut input, writer, line, &*daemon, &options);
            if let Err(error) = served {
                let text = larder_core::report::chain(&error);
                daemon.log(Level::Talkative, format_args!("connection from pid {pid} ended: {text}"));
            }
            drop(place);
        }))
    }

    /// Serves one client on standard input and output.
    pub fn serve_stdio(&self) -> Result<(), DaemonError> {
        let options = server::Options::new(NIX_VERSION, true, Arc::clone(&self.budget));
        let mut input = BufReader::with_capacity(READ_BUFFER, io::stdin());
        let output = Box::new(StdoutWriter::new().map_err(DaemonError::Stdout)?);
        let line = Box::new(StdioLine(self.interrupt.clone()));
        if let Err(error) = server::serve(&mut input, output, line, self, &options) {
            let text = larder_core::report::chain(&error);
            self.log(Level::Talkative, format_args!("connection ended: {text}"));
        }
        self.builds.wait_until_idle(LAST_GRACE);
        Ok(())
    }
}

/// How long a client may say nothing in the middle of something: as long as a download may.
fn stall_limit(settings: &Settings) -> Option<Duration> {
    let seconds = settings.stalled_download_timeout;
    (seconds > 0).then(|| Duration::from_secs(seconds))
}

/// Why a client was not let in.
#[derive(Debug, thiserror::Error)]
enum AdmitError {
    #[error("user '{user}' is not allowed to connect to the Nix daemon")]
    NotAllowed { user: String },
    #[error("user '{user}' has too many connections open")]
    TooMany { user: String },
    #[error("getting peer credentials: {0}")]
    Credentials(io::Error),
    #[error("reading the users and groups: {0}")]
    Users(io::Error),
}

/// A connection's place in the list, given back when its thread ends in whatever way.
struct Place {
    daemon: Arc<Daemon>,
    number: u32,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.daemon.connections();
        all.open.remove(&self.number);
        if all.awaited {
            self.daemon.changed.notify_all();
        }
    }
}

/// The store of one connection.
struct ClientSession<'d> {
    engine: Engine,
    daemon: &'d Daemon,
    base: Arc<Settings>,
    tunnel: Arc<Tunnel>,
}

impl Door for Daemon {
    fn admit(self: &Arc<Self>, stream: UnixStream) -> Option<Work> {
        let admitted = self.try_admit(stream);
        admitted.inspect_err(|e| self.log(Level::Error, format_args!("error processing connection: {e}"))).ok()
    }

    fn complain(&self, what: &str, error: &io::Error) {
        self.log(Level::Error, format_args!("error: {what}: {error}"));
    }
}

impl Host for Daemon {
    fn dir(&self) -> &StoreDir {
        self.store.dir()
    }

    fn open(&self, tunnel: Arc<Tunnel>, _trusted: bool) -> Result<Box<dyn Session + '_>, StoreError> {
        let Terms { settings, options } = self.terms();
        let local = self.store.session(options, Arc::clone(&tunnel) as _);
        let base = Arc::clone(&settings);
        let engine = Engine {
            local,
            settings,
            builds: Arc::clone(&self.builds),
            hides_logs: !tunnel.shows_logs(),
            interrupt: self.interrupt.clone(),
            env: Arc::clone(&self.env),
        };
        Ok(Box::new(ClientSession { engine, daemon: self, base, tunnel }))
    }
}

impl Session for ClientSession<'_> {
    fn store(&self) -> &dyn Store {
        &self.engine
    }

    fn configure(&mut self, wishes: &SetOptions, trusted: bool) {
        let found = self.daemon.overlays.of(&self.base, &self.daemon.rules, wishes, trusted);
        for text in &found.warnings {
            self.tunnel.message(Level::Warn, format_args!("{text}"));
        }
        for text in &found.debug {
            self.tunnel.message(Level::Debug, format_args!("{text}"));
        }
        self.engine.local.set_options(Arc::clone(&found.terms.options));
        self.engine.settings = Arc::clone(&found.terms.settings);
        self.engine.hides_logs = !self.tunnel.shows_logs();
    }
}
