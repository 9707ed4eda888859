//! `larder serve`: this store as a binary cache, over HTTP.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use larder_cache::serve::{Held, Intake, ServeOptions, Server, Shop, Uploads};
use larder_core::api::{ErrorKind, ReadStore, StoreError};
use larder_core::narinfo::NarInfo;
use larder_core::path_info::PathInfo;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::signature::{SecretKey, count_valid};
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_realise::logs::{self, Form};
use larder_realise::substitute::Trust;
use larder_store::LocalStore;
use larder_store::deliver::Claim;
use larder_store::error::StoreError as LocalError;

use crate::applets::nix_store::store::open_for_many;
use crate::applets::pushing::protect;
use crate::applets::{Context, print};
use crate::exit::Failure;

#[derive(Debug, Args)]
pub struct Serve {
    /// Address to listen at
    #[arg(short, long, value_name = "HOST:PORT", default_value = "127.0.0.1:8080")]
    pub listen: String,
    /// Secret key to sign with, besides those of secret-key-files (repeatable)
    #[arg(short, long, value_name = "FILE")]
    pub key: Vec<PathBuf>,
    /// Lower is asked first
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub priority: i32,
    /// File with a token that clients must send: as a bearer, or as the password in netrc
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// File with a token for clients that may send paths to the store: such as are signed by a key
    /// of trusted-public-keys, or all if require-sigs is false
    #[arg(long, value_name = "FILE")]
    pub write_token_file: Option<PathBuf>,
    /// Bytes that archives may take in the folder of temporary files until they are in the store
    #[arg(long, value_name = "BYTES", default_value_t = 16 << 30)]
    pub upload_space: u64,
    /// Level of zstd for clients that take it; 0 sends archives as they are
    #[arg(long, value_name = "LEVEL", default_value_t = 3)]
    pub zstd: i32,
    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub connections: usize,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum ServeError {
    #[error("cannot listen at '{address}'")]
    Listen { address: String, source: io::Error },
    #[error("cannot read '{}'", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("'{}' holds no token", path.display())]
    NoToken { path: PathBuf },
}

/// The local store; each archive that is sent has roots of its own meanwhile.
struct Counter {
    store: LocalStore,
}

impl Shop for Counter {
    fn store(&self) -> &dyn ReadStore {
        &self.store
    }

    fn hold<'s>(&'s self, path: &'s StorePath) -> Result<Box<dyn Held + 's>, StoreError> {
        let session = self.store.session(Arc::clone(self.store.options()), self.store.shared_reporter());
        protect(&session, &BTreeSet::from([path.clone()]))?;
        Ok(Box::new(Lent { session, path }))
    }

    fn log(&self, drv: &StorePath) -> io::Result<Option<Box<dyn Read + '_>>> {
        let opened = logs::open(self.store.layout(), drv).map_err(io::Error::other)?;
        Ok(opened.map(|log| -> Box<dyn Read> { Box::new(log) }))
    }
}

/// A path, and the session that has it as a temporary root.
struct Lent<'s> {
    session: LocalStore,
    path: &'s StorePath,
}

impl Held for Lent<'_> {
    fn is_valid(&self) -> Result<bool, StoreError> {
        Ok(self.session.is_valid(self.path)?)
    }

    fn nar(&self, skipped: u64, out: &mut dyn io::Write) -> Result<(), StoreError> {
        Ok(self.session.dump_after(self.path, skipped, out)?)
    }
}

/// Who puts what clients send into the store.
struct Receiver<'a> {
    store: &'a LocalStore,
    trust: Trust,
    form: Form,
    shift: Mutex<Shift>,
}

/// What came is a temporary root of a session, until what refers to it had time to come.
struct Shift {
    began: Instant,
    present: Arc<LocalStore>,
    /// The session before that.
    last: Option<Arc<LocalStore>>,
}

/// How long a session takes roots.
const SHIFT: Duration = Duration::from_mins(10);

impl Receiver<'_> {
    fn session(&self) -> Arc<LocalStore> {
        let mut shift = self.shift.lock().unwrap_or_else(PoisonError::into_inner);
        if shift.began.elapsed() > SHIFT {
            let next = Arc::new(self.store.session(Arc::clone(self.store.options()), self.store.shared_reporter()));
            shift.last = Some(std::mem::replace(&mut shift.present, next));
            shift.began = Instant::now();
        }
        Arc::clone(&shift.present)
    }

    fn is_trusted(&self, info: &PathInfo) -> bool {
        let dir = self.store.dir();
        !self.trust.requires_signatures
            || info.is_content_addressed(dir)
            || count_valid(dir, info, &self.trust.keys) > 0
    }
}

impl Intake for Receiver<'_> {
    fn add(&self, info: &NarInfo, nar: &mut dyn Read) -> Result<(), StoreError> {
        let info = &info.info;
        if !self.is_trusted(info) {
            let path = self.store.dir().full(&info.path);
            return Err(LocalError::Unsigned { path }.into());
        }
        let session = self.session();
        let claimed = match session.claim(&info.path, false)? {
            Claim::Valid => return Ok(()),
            Claim::Busy(path) => {
                let text = format!("'{}' is being made by somebody else", path.display());
                return Err(StoreError::new(ErrorKind::Interrupted, text));
            }
            Claim::Ours(claimed) => claimed,
        };
        let delivery = session.receive_claimed(claimed, info.clone(), nar)?;
        for result in session.register_deliveries(vec![delivery]) {
            result?;
        }
        Ok(())
    }

    fn add_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), StoreError> {
        logs::keep(self.store.layout(), drv, self.form, log).map_err(|error| StoreError::new(ErrorKind::Other, error))
    }
}

/// A token that is the text of a file.
fn token(path: &PathBuf) -> Result<String, ServeError> {
    let token = read(path)?.trim().to_owned();
    if token.is_empty() { Err(ServeError::NoToken { path: path.clone() }) } else { Ok(token) }
}

fn read(path: &PathBuf) -> Result<String, ServeError> {
    std::fs::read_to_string(path).map_err(|source| ServeError::File { path: path.clone(), source })
}

pub(super) fn serve(cx: &Context, settings: &Settings, args: &Serve) -> Result<(), Failure> {
    let access = if args.write_token_file.is_some() { Access::ReadWrite } else { Access::ReadOnly };
    let store = open_for_many(cx, settings, access)?;
    let files = settings.secret_key_files.iter().map(PathBuf::from).chain(args.key.iter().cloned());
    let mut keys = Vec::new();
    for file in files {
        keys.push(SecretKey::parse(&read(&file)?)?);
    }
    let write_token = args.write_token_file.as_ref().map(token).transpose()?;
    let token = args.token_file.as_ref().map(token).transpose()?;
    let options =
        ServeOptions { keys, priority: args.priority, token, zstd_level: Some(args.zstd).filter(|level| *level != 0) };
    let failed = |source| ServeError::Listen { address: args.listen.clone(), source };
    let listener = TcpListener::bind(&args.listen).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    print(&format!("http://{address}\n"))?;
    let counter = Counter { store };
    let receiver = Receiver {
        store: &counter.store,
        trust: Trust::of(settings)?,
        form: if settings.compress_build_log { Form::Compressed } else { Form::Plain },
        shift: Mutex::new(Shift {
            began: Instant::now(),
            present: Arc::new(
                counter.store.session(Arc::clone(counter.store.options()), counter.store.shared_reporter()),
            ),
            last: None,
        }),
    };
    let uploads = write_token.map(|token| Uploads::new(&receiver, token, args.upload_space));
    let server = Arc::new(Server::new(&counter, options, uploads));
    let open = AtomicUsize::new(0);
    thread::scope(|scope| {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // One that went away again, or no descriptor is free: others will be.
                    cx.terminal.message(Level::Debug, format_args!("cannot accept a connection: {error}"));
                    thread::sleep(std::time::Duration::from_millis(20));
                    continue;
                }
            };
            if open.fetch_add(1, Ordering::SeqCst) >= args.connections {
                open.fetch_sub(1, Ordering::SeqCst);
                refuse(stream);
                continue;
            }
            let (server, open) = (Arc::clone(&server), &open);
            let run = move || {
                // A connection that ends in the middle is no matter to anyone else; nor is a panic.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| server.connection(&stream)));
                open.fetch_sub(1, Ordering::SeqCst);
            };
            if thread::Builder::new().name("serve".to_owned()).spawn_scoped(scope, run).is_err() {
                open.fetch_sub(1, Ordering::SeqCst);
            }
        }
    })
}

/// Tells a client to come again later.
fn refuse(mut stream: TcpStream) {
    let text = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
    let _ = io::Write::write_all(&mut stream, text.as_bytes());
}
