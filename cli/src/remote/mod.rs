//! Stores of other processes: behind a daemon's socket, or a program on another machine.

pub mod address;
pub mod source;
pub mod ssh;

use std::ffi::OsStr;
use std::io::{BufReader, BufWriter};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use larder_core::api::{Store, StoreError};
use larder_core::derivation::Derivation;
use larder_core::report::{Level, Reporter};
use larder_core::settings::{Configured, Settings};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_wire::serve::client::Client as ServeClient;
use larder_wire::serve::ops::BuildOptions;
use larder_wire::value::{Obsolete, One};
use larder_wire::worker::client::Client as WorkerClient;
use larder_wire::worker::ops::{Overrides, SetOptions};

use self::address::{Address, AddressError, Scheme};
use self::ssh::{Ssh, SshError};
use crate::conf::{ConfError, Env, LocalStore, StoreChoice};
use crate::daemon::socket::PatientReader;

/// Bytes that are read, or written, at a time.
const BUFFER: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    #[error("cannot connect to daemon at '{}'", path.display())]
    Connect { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error(transparent)]
    Ssh(#[from] SshError),
    #[error("cannot open connection to remote store '{uri}'")]
    Open { uri: String, source: StoreError },
    #[error("cannot talk to the daemon at '{}'", path.display())]
    Greet { path: PathBuf, source: StoreError },
}

/// What a client asks of a daemon when it connects.
pub fn wishes(configured: &Configured, verbosity: Level, shows_logs: bool) -> SetOptions {
    let settings = &configured.settings;
    let overrides = configured.overrides().into_iter();
    SetOptions {
        keep_failed: settings.keep_failed,
        keep_going: settings.keep_going,
        try_fallback: settings.fallback,
        verbosity: verbosity as u32,
        max_build_jobs: settings.max_jobs.0,
        max_silent_time_s: u64::try_from(settings.max_silent_time).unwrap_or(0),
        use_build_hook: One,
        verbose_build: if shows_logs { Level::Error as u32 } else { Level::Vomit as u32 },
        log_type: Obsolete,
        print_build_trace: Obsolete,
        build_cores: settings.cores,
        use_substitutes: settings.substitute,
        overrides: Overrides(overrides.map(|(name, value)| (name.to_owned(), value.into_bytes().into())).collect()),
    }
}

/// A store that another process keeps, opened.
#[derive(Debug)]
pub struct Opened {
    pub uri: String,
    /// Where the files lie, if that is on this machine.
    pub files: Option<LocalStore>,
    far: FarStore,
}

enum FarStore {
    Daemon(Box<WorkerClient>, SetOptions),
    Other(Far),
}

impl std::fmt::Debug for FarStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FarStore").finish_non_exhaustive()
    }
}

impl Opened {
    pub fn store(&self) -> &(dyn Store + Sync) {
        match &self.far {
            FarStore::Daemon(client, _) => &**client,
            FarStore::Other(far) => far.store(),
        }
    }

    /// What a client on another machine wants of the builds that follow. A daemon that is gone is
    /// noticed with the build itself.
    pub fn configure_builds(&mut self, options: &BuildOptions) {
        if let FarStore::Daemon(client, wishes) = &mut self.far {
            wishes.max_silent_time_s = options.max_silent_time_s;
            wishes.keep_failed = options.keep_failed;
            wishes.use_substitutes = false;
            wishes.verbosity = Level::Error as u32;
            wishes.verbose_build = Level::Vomit as u32;
            let numbers = [("timeout", options.build_timeout_s), ("max-build-log-size", options.max_log_size_bytes)];
            for (name, value) in numbers {
                wishes.overrides.0.retain(|(found, _)| found != name);
                if value > 0 {
                    wishes.overrides.0.push((name.to_owned(), value.to_string().into_bytes().into()));
                }
            }
            let _ = client.call(&*wishes);
        }
    }

    /// Opens what was chosen.
    pub fn open(
        choice: StoreChoice,
        env: &Env,
        configured: &Configured,
        verbosity: Level,
        shows_logs: bool,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Option<Self>, RemoteOpenError> {
        match choice {
            StoreChoice::Local(_) => Ok(None),
            StoreChoice::Daemon { socket } => {
                let files = LocalStore::from_env(env)?;
                let wishes = wishes(configured, verbosity, shows_logs);
                let client = daemon(&socket, files.layout.store_dir.clone(), &wishes, reporter)?;
                let uri = format!("unix://{}", socket.display());
                Ok(Some(Self { uri, files: Some(files), far: FarStore::Daemon(Box::new(client), wishes) }))
            }
            StoreChoice::Remote { uri } => {
                let dir = crate::conf::store_dir(env)?;
                let options = env.get("NIX_SSHOPTS").map(|words| words.to_string_lossy().into_owned());
                let options = options.unwrap_or_default();
                let way = Way { options: &options, is_verbose: verbosity >= Level::Chatty };
                let address = Address::parse(&uri).map_err(RemoteError::from)?;
                let far = Far::open(&uri, &address, dir, &configured.settings, way, Stdio::inherit(), reporter)?;
                Ok(Some(Self { uri, files: None, far: FarStore::Other(far) }))
            }
        }
    }
}

/// Why a store elsewhere was not opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteOpenError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Conf(#[from] ConfError),
}

/// Opens the store of a daemon.
pub fn daemon(
    socket: &Path,
    dir: StoreDir,
    wishes: &SetOptions,
    reporter: Arc<dyn Reporter + Send + Sync>,
) -> Result<WorkerClient, RemoteError> {
    let client = greet_daemon(socket, dir, reporter)?;
    match client.call(wishes) {
        Ok(()) => Ok(client),
        Err(source) => Err(RemoteError::Greet { path: socket.to_owned(), source }),
    }
}

fn greet_daemon(
    socket: &Path,
    dir: StoreDir,
    reporter: Arc<dyn Reporter + Send + Sync>,
) -> Result<WorkerClient, RemoteError> {
    let path = || socket.to_owned();
    let connect = || {
        let stream = self::connect(socket)?;
        Ok::<_, std::io::Error>((PatientReader::new(stream.try_clone()?), stream))
    };
    let (input, output) = connect().map_err(|source| RemoteError::Connect { path: path(), source })?;
    let input = Box::new(BufReader::with_capacity(BUFFER, input));
    let output = Box::new(BufWriter::with_capacity(BUFFER, output));
    WorkerClient::connect(input, output, dir, larder_wire::worker::MINOR, reporter)
        .map_err(|source| RemoteError::Greet { path: path(), source })
}

/// Connects to a socket, whose path may be longer than an address holds.
pub fn connect(socket: &Path) -> std::io::Result<UnixStream> {
    match UnixStream::connect(socket) {
        Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => {}
        outcome => return outcome,
    }
    let (dir, name) = (socket.parent().unwrap_or(Path::new("/")), socket.file_name().unwrap_or_default());
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, rustix::fs::Mode::empty())?;
    let by_fd = PathBuf::from(larder_fs::entry::proc_path(std::os::fd::AsFd::as_fd(&dir)));
    UnixStream::connect(by_fd.join(name))
}

/// How a store on another machine is spoken to.
#[derive(Debug, Clone, Copy)]
pub struct Way<'a> {
    /// Further words for `ssh` (`NIX_SSHOPTS`).
    pub options: &'a str,
    pub is_verbose: bool,
}

/// A store on another machine, or at least in another process.
#[derive(Debug)]
pub struct Far {
    client: FarClient,
    /// What leads there, if that is a process of ours.
    process: Option<Arc<OwnedFd>>,
}

/// Its protocol.
#[derive(Debug)]
enum FarClient {
    Serve(Box<ServeClient>),
    Worker(Box<WorkerClient>),
}

impl Far {
    /// Opens the store at an address; what `ssh` and the program over there complain of goes to `errors`.
    pub fn open(
        uri: &str,
        address: &Address,
        dir: StoreDir,
        settings: &Settings,
        way: Way<'_>,
        errors: Stdio,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, RemoteError> {
        let ssh = Ssh::start(address, way.options, way.is_verbose, errors)?;
        Self::greet(ssh, address.scheme, uri, dir, settings, reporter)
    }

    /// Opens a store of this machine that is not ours, by way of a process of its own.
    pub fn here(
        uri: &str,
        dir: StoreDir,
        settings: &Settings,
        errors: Stdio,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, RemoteError> {
        Self::greet(Ssh::start_here(uri, errors)?, Scheme::Serve, uri, dir, settings, reporter)
    }

    /// Opens the store of this machine that another program keeps: real Nix, which has a ledger of its
    /// own. It is told which locks are held for it.
    pub fn of_program(
        words: &[String],
        held_locks: &OsStr,
        dir: StoreDir,
        settings: &Settings,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, RemoteError> {
        let variables = [("NIX_HELD_LOCKS", held_locks.to_owned())];
        let ssh = Ssh::start_program(words, &variables, Stdio::inherit())?;
        Self::greet(ssh, Scheme::Serve, words.first().map_or("", String::as_str), dir, settings, reporter)
    }

    /// A derivation that lies there, if the serve protocol is spoken.
    pub fn derivation(&self, drv: &StorePath) -> Result<Derivation, StoreError> {
        match &self.client {
            FarClient::Serve(client) => client.derivation(drv),
            FarClient::Worker(_) => Err(StoreError::unsupported("a daemon's store cannot give a derivation here")),
        }
    }

    /// Opens the store of a daemon of this machine, with that one's own settings.
    pub fn daemon(
        socket: &Path,
        dir: StoreDir,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, RemoteError> {
        let client = FarClient::Worker(Box::new(greet_daemon(socket, dir, reporter)?));
        Ok(Self { client, process: None })
    }

    fn greet(
        ssh: Ssh,
        scheme: Scheme,
        uri: &str,
        dir: StoreDir,
        settings: &Settings,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, RemoteError> {
        let open = |source| RemoteError::Open { uri: uri.to_owned(), source };
        let process = ssh.handle();
        let (input, output) = ssh.into_ends();
        let input = Box::new(BufReader::with_capacity(BUFFER, input));
        let output = Box::new(BufWriter::with_capacity(BUFFER, output));
        let client = match scheme {
            Scheme::Serve => {
                let newest = larder_wire::serve::MINOR;
                let mut client = ServeClient::connect(input, output, dir, newest).map_err(open)?;
                let seconds = |s: i64| u64::try_from(s).unwrap_or(0);
                client.options = BuildOptions {
                    max_silent_time_s: seconds(settings.max_silent_time),
                    build_timeout_s: seconds(settings.timeout),
                    max_log_size_bytes: settings.max_build_log_size,
                    repeats: 0,
                    enforce_determinism: false,
                    keep_failed: settings.keep_failed,
                };
                FarClient::Serve(Box::new(client))
            }
            // Settings are the other machine's own.
            Scheme::Worker => {
                let newest = larder_wire::worker::MINOR;
                let client = WorkerClient::connect(input, output, dir, newest, reporter).map_err(open)?;
                FarClient::Worker(Box::new(client))
            }
        };
        Ok(Self { client, process })
    }

    /// Ends the connection, whatever goes on there. Whoever waits for an answer gets an error.
    pub fn end(&self) {
        if let Some(process) = &self.process {
            // It may have ended by itself.
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
        }
    }

    pub fn store(&self) -> &(dyn Store + Sync) {
        match &self.client {
            FarClient::Serve(client) => &**client,
            FarClient::Worker(client) => &**client,
        }
    }

    /// Does it believe what we say a derivation is?
    pub fn trusts_us(&self) -> bool {
        match &self.client {
            // The login user is trusted as far as the protocol can tell.
            FarClient::Serve(_) => true,
            FarClient::Worker(client) => client.agreed().trusted != Some(false),
        }
    }

    /// Has it keep the limits of builds that the serve protocol has in each request. What is not
    /// limited stays as the other machine has it, and then nothing is said at all.
    pub fn limit_builds(&self, settings: &Settings) -> Result<(), StoreError> {
        let FarClient::Worker(client) = &self.client else { return Ok(()) };
        let limits = [
            ("timeout", u64::try_from(settings.timeout).unwrap_or(0)),
            ("max-silent-time", u64::try_from(settings.max_silent_time).unwrap_or(0)),
            ("max-build-log-size", settings.max_build_log_size),
        ];
        let limits: Vec<_> = limits.into_iter().filter(|(_, limit)| *limit > 0).collect();
        if limits.is_empty() {
            return Ok(());
        }
        let overrides =
            limits.into_iter().map(|(name, limit)| (name.to_owned(), limit.to_string().into_bytes().into()));
        client.call(&SetOptions {
            keep_failed: settings.keep_failed,
            keep_going: false,
            try_fallback: false,
            verbosity: Level::Error as u32,
            max_build_jobs: 1,
            max_silent_time_s: u64::try_from(settings.max_silent_time).unwrap_or(0),
            use_build_hook: One,
            // It is our log.
            verbose_build: Level::Error as u32,
            log_type: Obsolete,
            print_build_trace: Obsolete,
            build_cores: 0,
            use_substitutes: true,
            overrides: Overrides(overrides.collect()),
        })
    }
}
