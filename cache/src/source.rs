//! Who may have a path: a binary cache, or a store that is no cache and is spoken to by others.
//!
//! A store over ssh, or another one of this machine, answers the same two questions as a cache: what
//! it has of some paths, and what is in one of them. How it is spoken to is for whoever opens it.
//! Source: protocols, section 4; building, section 3.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;

use larder_core::api::StoreError;
use larder_core::narinfo::NarInfo;
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::Reporter;
use larder_core::store_path::StorePath;

use crate::binary_cache::BinaryCache;
use crate::error::CacheError;
use crate::lapses::Lapses;
use crate::lookups::{CacheId, Known, Lookups};
use crate::nar::NarReader;
use crate::uri::percent_decoded;

/// A store that has paths. Called from several threads at once.
pub trait PathStore: Send + Sync {
    /// The records of those that it has, in any order.
    fn infos(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<PathInfo>, StoreError>;

    /// The archive of a path that it has.
    fn nar(&self, path: &StorePath) -> Result<Box<dyn Read + Send>, StoreError>;

    /// Whatever is under way comes to an end.
    fn stop(&self);
}

type Open = dyn Fn(&str) -> Result<Arc<dyn PathStore>, StoreError> + Send + Sync;

/// Opens stores by their URIs.
#[derive(Clone)]
pub struct Opener(Arc<Open>);

impl Opener {
    pub fn new(open: impl Fn(&str) -> Result<Arc<dyn PathStore>, StoreError> + Send + Sync + 'static) -> Self {
        Self(Arc::new(open))
    }
}

impl fmt::Debug for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opener").finish_non_exhaustive()
    }
}

/// A store as one of those that may have a path.
pub struct OtherStore {
    store: Arc<dyn PathStore>,
    /// Without parameters.
    uri: String,
    id: CacheId,
    priority: i32,
    is_trusted: bool,
    lapses: Lapses,
    reporter: Arc<dyn Reporter + Send + Sync>,
}

impl fmt::Debug for OtherStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OtherStore").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl OtherStore {
    /// Opens it. Of its parameters those that every store has are heeded here.
    pub(crate) fn open(
        uri: &str,
        opener: &Opener,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, CacheError> {
        let (shown, query) = uri.split_once('?').unwrap_or((uri, ""));
        let (mut priority, mut is_trusted) = (0, false);
        for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = String::from_utf8_lossy(&percent_decoded(value)).into_owned();
            let invalid = |what: &str| CacheError::Uri { uri: shown.to_owned(), reason: format!("'{name}' is {what}") };
            match name {
                "priority" => priority = value.parse().map_err(|_| invalid("no number"))?,
                "trusted" => {
                    is_trusted = match value.as_str() {
                        "true" | "1" | "yes" => true,
                        "false" | "0" | "no" => false,
                        _ => return Err(invalid("neither true nor false")),
                    };
                }
                _ => {}
            }
        }
        let failed = |source| CacheError::OtherStore { uri: shown.to_owned(), source };
        let store = (opener.0)(uri).map_err(failed)?;
        let (uri, id) = (shown.to_owned(), CacheId::of(uri));
        Ok(Self { store, uri, id, priority, is_trusted, lapses: Lapses::default(), reporter })
    }

    fn failed(&self, source: StoreError) -> CacheError {
        CacheError::OtherStore { uri: self.uri.clone(), source }
    }

    /// Asks for what is not known yet of some paths, all at once.
    pub(crate) fn look_up(&self, lookups: &Lookups, paths: &BTreeSet<StorePath>) -> Result<(), CacheError> {
        let known = |path: &&StorePath| lookups.get(self.id, false, path.hash_part(), |_| None).is_none();
        let unknown: BTreeSet<StorePath> = paths.iter().filter(known).cloned().collect();
        if unknown.is_empty() {
            return Ok(());
        }
        let infos = self.store.infos(&unknown).map_err(|error| self.failed(error))?;
        for path in &unknown {
            lookups.put(self.id, false, path.hash_part(), Known::Absent, b"");
        }
        for info in infos.into_iter().filter(|info| unknown.contains(&info.path)) {
            let part = info.path.hash_part();
            // As a cache would have it that does not compress.
            let info = NarInfo {
                url: info.path.to_string(),
                compression: "none".to_owned(),
                file_hash: None,
                file_size_bytes: Some(info.nar_size_bytes),
                info,
            };
            lookups.put(self.id, false, part, Known::There(Arc::new(info)), b"");
        }
        Ok(())
    }

    fn nar(&self, info: &NarInfo) -> Result<NarReader, CacheError> {
        let source = self.store.nar(&info.info.path).map_err(|error| self.failed(error))?;
        NarReader::new(&self.uri, info, Box::new(Named { source, uri: self.uri.clone() }))
    }
}

/// A stream whose errors say whose it is.
struct Named {
    source: Box<dyn Read + Send>,
    uri: String,
}

impl Read for Named {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.source
            .read(into)
            .map_err(|error| io::Error::other(CacheError::OtherStore { uri: self.uri.clone(), source: error.into() }))
    }
}

/// One who may have a path.
#[derive(Debug)]
pub enum Source {
    Cache(Box<BinaryCache>),
    Store(OtherStore),
}

impl Source {
    /// As people see it.
    pub fn uri(&self) -> &str {
        match self {
            Self::Cache(cache) => cache.uri(),
            Self::Store(store) => &store.uri,
        }
    }

    /// Lower is asked first.
    pub fn priority(&self) -> i32 {
        match self {
            Self::Cache(cache) => cache.priority(),
            Self::Store(store) => store.priority,
        }
    }

    /// Do its paths count without signatures?
    pub fn is_trusted(&self) -> bool {
        match self {
            Self::Cache(cache) => cache.is_trusted(),
            Self::Store(store) => store.is_trusted,
        }
    }

    /// The cache, if it is one.
    pub fn cache(&self) -> Option<&BinaryCache> {
        match self {
            Self::Cache(cache) => Some(cache),
            Self::Store(_) => None,
        }
    }

    /// Why it is passed over, if it is.
    pub(crate) fn disabled(&self) -> Option<CacheError> {
        match self {
            Self::Cache(cache) => cache.disabled(),
            Self::Store(store) => store.lapses.disabled(&store.uri),
        }
    }

    /// Notes an error, if it says something of the whole.
    pub(crate) fn note(&self, error: &CacheError) {
        match self {
            Self::Cache(cache) => cache.note(error),
            Self::Store(store) => store.lapses.note(&store.uri, error, &*store.reporter),
        }
    }

    /// What it has of a path.
    pub(crate) fn find(&self, lookups: &Lookups, path: &StorePath) -> Result<Known, CacheError> {
        match self {
            Self::Cache(cache) => cache.narinfo(lookups, path.hash_part()),
            Self::Store(store) => {
                store.look_up(lookups, &[path.clone()].into())?;
                Ok(lookups.get(store.id, false, path.hash_part(), |_| None).unwrap_or(Known::Absent))
            }
        }
    }

    /// What it says that an output was built as. Stores that are no caches are not asked.
    pub(crate) fn realisation(&self, lookups: &Lookups, id: &DrvOutput) -> Result<Known<Realisation>, CacheError> {
        match self {
            Self::Cache(cache) => cache.realisation(lookups, id),
            Self::Store(_) => Ok(Known::Absent),
        }
    }

    /// Opens an archive; `None` if it has not got it after all.
    pub(crate) fn nar(&self, info: &NarInfo) -> Result<Option<NarReader>, CacheError> {
        match self {
            Self::Cache(cache) => cache.nar(info),
            Self::Store(store) => store.nar(info).map(Some),
        }
    }

    /// It has not got, or not as it says, what was found.
    pub(crate) fn forget(&self, lookups: &Lookups, path: &StorePath) {
        match self {
            Self::Cache(cache) => lookups.forget(cache.id(), cache.on_disk(), path.hash_part()),
            Self::Store(store) => lookups.forget(store.id, false, path.hash_part()),
        }
    }

    pub(crate) fn stop(&self) {
        if let Self::Store(store) = self {
            store.store.stop();
        }
    }
}
