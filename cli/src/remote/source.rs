//! Other stores as places to fetch from: over ssh, or by a process of their own.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, PipeReader, Read, Write as _};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use larder_cache::source::{Opener, PathStore};
use larder_core::api::{ErrorKind, StoreError};
use larder_core::path_info::PathInfo;
use larder_core::report::{Level, Reporter};
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use super::address::Address;
use super::{Far, RemoteError, Way};
use crate::conf::{ChoiceError, ConfError, Env, Facts, StoreChoice, choose};

/// How a store is reached.
#[derive(Debug)]
struct Road {
    uri: String,
    env: Env,
    settings: Settings,
    dir: StoreDir,
}

/// Why a store cannot be fetched from.
#[derive(Debug, thiserror::Error)]
enum RoadError {
    #[error(transparent)]
    Choice(#[from] ChoiceError),
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(transparent)]
    Conf(#[from] ConfError),
    #[error("interrupted by the user")]
    Stopped,
}

/// A store that is asked, over a connection that is made anew when it breaks.
struct FarSource {
    road: Road,
    reporter: Arc<dyn Reporter + Send + Sync>,
    line: Mutex<Option<Arc<Far>>>,
    stopped: AtomicBool,
}

/// Opens stores for those who fetch. The first connection is made at once, so that a store which is
/// not there is known not to be.
pub fn opener(env: &Env, settings: &Settings, dir: &StoreDir, reporter: &Arc<dyn Reporter + Send + Sync>) -> Opener {
    let (env, settings, dir, reporter) = (env.clone(), settings.clone(), dir.clone(), Arc::clone(reporter));
    Opener::new(move |uri| {
        let road = Road { uri: uri.to_owned(), env: env.clone(), settings: settings.clone(), dir: dir.clone() };
        let (reporter, stopped) = (Arc::clone(&reporter), AtomicBool::new(false));
        let source = FarSource { road, reporter, line: Mutex::default(), stopped };
        source.far()?;
        Ok(Arc::new(Handle(Arc::new(source))))
    })
}

/// What those who fetch have of it.
struct Handle(Arc<FarSource>);

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::new(ErrorKind::Other, error)
}

impl Road {
    fn connect(&self, reporter: &Arc<dyn Reporter + Send + Sync>) -> Result<Far, RoadError> {
        let facts = Facts::gather(&self.env, false)?;
        let (dir, reporter) = (self.dir.clone(), Arc::clone(reporter));
        Ok(match choose(&self.uri, &self.env, facts)? {
            StoreChoice::Remote { uri } => {
                let address = Address::parse(&uri).map_err(RemoteError::from)?;
                let options = self.env.get("NIX_SSHOPTS").map(|words| words.to_string_lossy().into_owned());
                let mut options = options.unwrap_or_default();
                if self.settings.connect_timeout > 0 {
                    let _ = write!(options, " -oConnectTimeout={}", self.settings.connect_timeout);
                }
                let way = Way { options: &options, is_verbose: reporter.shows(Level::Chatty) };
                Far::open(&uri, &address, dir, &self.settings, way, Stdio::inherit(), reporter)?
            }
            StoreChoice::Daemon { socket } => Far::daemon(&socket, dir, reporter)?,
            StoreChoice::Local(_) => Far::here(&self.uri, dir, &self.settings, Stdio::inherit(), reporter)?,
        })
    }
}

impl FarSource {
    /// The connection; one that is made anew if there is none.
    fn far(&self) -> Result<Arc<Far>, StoreError> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if self.stopped.load(Ordering::SeqCst) {
            return Err(failed(RoadError::Stopped));
        }
        if let Some(far) = &*line {
            return Ok(Arc::clone(far));
        }
        let far = Arc::new(self.road.connect(&self.reporter).map_err(failed)?);
        *line = Some(Arc::clone(&far));
        Ok(far)
    }

    /// A connection is of no use any more.
    fn hang_up(&self, far: &Arc<Far>) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if line.as_ref().is_some_and(|held| Arc::ptr_eq(held, far)) {
            *line = None;
        }
    }
}

impl PathStore for Handle {
    fn infos(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<PathInfo>, StoreError> {
        let paths: Vec<StorePath> = paths.iter().cloned().collect();
        let ask = || {
            let far = self.0.far()?;
            far.store().infos(&paths).inspect_err(|_| self.0.hang_up(&far))
        };
        // The connection may have been cut, or given up, since it was used last.
        let found = ask().or_else(|_| ask())?;
        Ok(found.into_iter().flatten().collect())
    }

    fn nar(&self, path: &StorePath) -> Result<Box<dyn Read + Send>, StoreError> {
        let (source, path) = (Arc::clone(&self.0), path.clone());
        let (reader, mut writer) = io::pipe()?;
        let give = move || {
            let far = source.far()?;
            let given = far.store().nar(&path, &mut writer).and_then(|()| Ok(writer.flush()?));
            given.inspect_err(|_| source.hang_up(&far))
        };
        let giving = std::thread::Builder::new().name("far archive".to_owned()).spawn(give)?;
        Ok(Box::new(Archive { reader, giving: Some(giving) }))
    }

    fn stop(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        if let Some(far) = &*self.0.line.lock().unwrap_or_else(PoisonError::into_inner) {
            far.end();
        }
    }
}

/// An archive as it comes; why it ended early is its last word.
struct Archive {
    reader: PipeReader,
    giving: Option<JoinHandle<Result<(), StoreError>>>,
}

impl Read for Archive {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(into)?;
        if n == 0
            && !into.is_empty()
            && let Some(giving) = self.giving.take()
        {
            match giving.join() {
                Ok(given) => given.map_err(io::Error::other)?,
                Err(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
        Ok(n)
    }
}
