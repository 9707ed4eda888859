//! `larder serve`: this store as a binary cache, over HTTP.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use clap::Args;
use larder_cache::serve::{ServeOptions, Server, Shop};
use larder_core::api::{ReadStore, StoreError};
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::signature::SecretKey;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_realise::logs;
use larder_store::LocalStore;

use crate::applets::nix_store::store::open;
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

    fn hold(&self, path: &StorePath) -> Result<Box<dyn ReadStore + '_>, StoreError> {
        let session = self.store.session(self.store.options().clone(), self.store.shared_reporter());
        protect(&session, &BTreeSet::from([path.clone()]))?;
        Ok(Box::new(session))
    }

    fn log(&self, drv: &StorePath) -> io::Result<Option<Box<dyn Read + '_>>> {
        let opened = logs::open(self.store.layout(), drv).map_err(io::Error::other)?;
        Ok(opened.map(|log| -> Box<dyn Read> { Box::new(log) }))
    }
}

pub(super) fn serve(cx: &Context, settings: &Settings, args: &Serve) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|source| ServeError::File { path: path.clone(), source })
    };
    let files = settings.secret_key_files.iter().map(PathBuf::from).chain(args.key.iter().cloned());
    let mut keys = Vec::new();
    for file in files {
        keys.push(SecretKey::parse(&read(&file)?)?);
    }
    let token = match &args.token_file {
        None => None,
        Some(path) => {
            let token = read(path)?.trim().to_owned();
            if token.is_empty() {
                return Err(ServeError::NoToken { path: path.clone() }.into());
            }
            Some(token)
        }
    };
    let options =
        ServeOptions { keys, priority: args.priority, token, zstd_level: Some(args.zstd).filter(|level| *level != 0) };
    let failed = |source| ServeError::Listen { address: args.listen.clone(), source };
    let listener = TcpListener::bind(&args.listen).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    print(&format!("http://{address}\n"))?;
    let counter = Counter { store };
    let server = Arc::new(Server::new(&counter, options));
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
