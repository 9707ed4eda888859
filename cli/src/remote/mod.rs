//! Stores of other processes: behind a daemon's socket, or a program on another machine.

pub mod address;
pub mod ssh;

use std::io::{BufReader, BufWriter};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use larder_core::api::{Store, StoreError};
use larder_core::report::{Level, Reporter};
use larder_core::settings::{Configured, Settings};
use larder_core::store_dir::StoreDir;
use larder_wire::serve::client::Client as ServeClient;
use larder_wire::serve::ops::BuildOptions;
use larder_wire::value::{Obsolete, One};
use larder_wire::worker::client::Client as WorkerClient;
use larder_wire::worker::ops::{Overrides, SetOptions};

use self::address::{Address, AddressError, Scheme};
use self::ssh::{Ssh, SshError};
use crate::conf::{ConfError, Env, LocalStore, StoreChoice};

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
    Other(Box<dyn Store + Send + Sync>),
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
            FarStore::Other(store) => &**store,
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
                let is_verbose = verbosity >= Level::Chatty;
                let options = options.unwrap_or_default();
                let store = over_ssh(&uri, dir, &configured.settings, &options, is_verbose, reporter)?;
                Ok(Some(Self { uri, files: None, far: FarStore::Other(store) }))
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
    let path = || socket.to_owned();
    let connect = || {
        let stream = self::connect(socket)?;
        Ok::<_, std::io::Error>((stream.try_clone()?, stream))
    };
    let (input, output) = connect().map_err(|source| RemoteError::Connect { path: path(), source })?;
    let input = Box::new(BufReader::with_capacity(BUFFER, input));
    let output = Box::new(BufWriter::with_capacity(BUFFER, output));
    let client = WorkerClient::connect(input, output, dir, larder_wire::worker::MINOR, reporter)
        .and_then(|client| client.call(wishes).map(|()| client));
    client.map_err(|source| RemoteError::Greet { path: path(), source })
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

/// Opens the store of another machine.
pub fn over_ssh(
    uri: &str,
    dir: StoreDir,
    settings: &Settings,
    options: &str,
    is_verbose: bool,
    reporter: Arc<dyn Reporter + Send + Sync>,
) -> Result<Box<dyn Store + Send + Sync>, RemoteError> {
    let address = Address::parse(uri)?;
    let open = |source| RemoteError::Open { uri: uri.to_owned(), source };
    let ssh = Ssh::start(&address, options, is_verbose)?;
    let (input, output) = ssh.into_ends();
    let input = Box::new(BufReader::with_capacity(BUFFER, input));
    let output = Box::new(BufWriter::with_capacity(BUFFER, output));
    match address.scheme {
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
            Ok(Box::new(client))
        }
        // Settings are the other machine's own.
        Scheme::Worker => {
            let newest = larder_wire::worker::MINOR;
            Ok(Box::new(WorkerClient::connect(input, output, dir, newest, reporter).map_err(open)?))
        }
    }
}
