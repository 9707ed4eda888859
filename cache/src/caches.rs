//! Several caches, asked in the order of their priority.
//!
//! They are opened when first asked: who needs nothing from them hears nothing of them. Source:
//! protocols, sections 5.2 and 5.4.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use larder_core::hash_part::HashPart;
use larder_core::narinfo::NarInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::{Level, Reporter, chain};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::binary_cache::BinaryCache;
use crate::client::{Client, ClientOptions};
use crate::closure;
use crate::error::CacheError;
use crate::lookups::{Known, Lifetimes, Lookups};
use crate::nar::NarReader;
use crate::parallel::in_parallel;
use crate::source::{Opener, OtherStore, Source};
use crate::uri::CacheUri;

/// Threads that ask, where requests are not limited; and the most where they are.
const MANY: usize = 100;
const MOST: usize = 256;

/// Which caches, and how they are spoken to.
#[derive(Debug, Clone)]
pub struct Options {
    /// What their paths must begin with.
    pub dir: StoreDir,
    pub uris: Vec<String>,
    pub client: ClientOptions,
    pub lifetimes: Lifetimes,
    /// Where answers of caches on the network are written down.
    pub memory: Option<PathBuf>,
    /// Who opens what is no binary cache; without, there is no such thing.
    pub stores: Option<Opener>,
}

/// A path that a cache has.
#[derive(Debug, Clone)]
pub struct Found {
    /// The number of the cache, in the order in which they are asked.
    pub cache: usize,
    pub info: Arc<NarInfo>,
}

/// What a cache says that an output was built as.
#[derive(Debug, Clone)]
pub struct Realised {
    /// The number of the cache, in the order in which they are asked.
    pub cache: usize,
    pub realisation: Arc<Realisation>,
}

/// Several caches.
pub struct Caches {
    options: Options,
    client: Arc<Client>,
    lookups: Lookups,
    opened: OnceLock<Vec<Source>>,
    reporter: Arc<dyn Reporter + Send + Sync>,
}

impl std::fmt::Debug for Caches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Caches").field("uris", &self.options.uris).finish_non_exhaustive()
    }
}

impl Caches {
    pub fn new(options: Options, reporter: Arc<dyn Reporter + Send + Sync>) -> Self {
        let client = Client::new(options.client.clone(), Arc::clone(&reporter));
        let lookups = Lookups::new(options.memory.as_deref(), options.lifetimes, Arc::clone(&reporter));
        Self { options, client, lookups, opened: OnceLock::new(), reporter }
    }

    /// Are there none at all?
    pub fn is_empty(&self) -> bool {
        self.options.uris.is_empty()
    }

    /// Threads that may ask at once. For what lies on a disk one does.
    pub fn parallel(&self) -> usize {
        let remote = self.options.uris.iter().any(|uri| !uri.starts_with("file:"));
        match self.options.client.connections {
            _ if !remote => 1,
            0 => MANY,
            most => most.min(MOST),
        }
    }

    /// The caches that can be used, the one to ask first in front.
    pub fn list(&self) -> &[Source] {
        self.opened.get_or_init(|| {
            let mut unique = BTreeSet::new();
            let uris: Vec<&String> = self.options.uris.iter().filter(|uri| unique.insert(uri.as_str())).collect();
            let opened = in_parallel(uris.len().min(8), &uris, |uri| {
                let Options { dir, stores, .. } = &self.options;
                let reporter = Arc::clone(&self.reporter);
                match stores.as_ref().filter(|_| !CacheUri::is_cache(uri)) {
                    Some(opener) => OtherStore::open(uri, opener, reporter).map(Source::Store),
                    None => BinaryCache::open(CacheUri::parse(uri)?, dir, &self.client, &self.lookups, reporter)
                        .map(|cache| Source::Cache(Box::new(cache))),
                }
            });
            let mut list = Vec::new();
            for cache in opened {
                match cache {
                    Ok(cache) => list.push(cache),
                    Err(error) => self.reporter.message(Level::Warn, format_args!("{}", chain(&error))),
                }
            }
            list.sort_by_key(Source::priority);
            list
        })
    }

    pub fn get(&self, cache: usize) -> Option<&Source> {
        self.list().get(cache)
    }

    /// The first cache that has a path, among those behind number `after`.
    ///
    /// A cache that fails is passed over. The error comes only where no other has the path.
    pub fn find(&self, path: &StorePath, after: Option<usize>) -> Result<Option<Found>, CacheError> {
        let ask = |cache: &Source| match cache.find(&self.lookups, path)? {
            Known::There(info) if info.info.path == *path => Ok(Some(info)),
            _ => Ok(None),
        };
        Ok(self.first(after, ask)?.map(|(cache, info)| Found { cache, info }))
    }

    /// What the first cache that knows it says that an output was built as; the rest as above.
    pub fn find_realisation(&self, id: &DrvOutput, after: Option<usize>) -> Result<Option<Realised>, CacheError> {
        let ask = |cache: &Source| match cache.realisation(&self.lookups, id)? {
            Known::There(realisation) => Ok(Some(realisation)),
            Known::Absent => Ok(None),
        };
        Ok(self.first(after, ask)?.map(|(cache, realisation)| Realised { cache, realisation }))
    }

    /// The first cache behind number `after` that has something, and what.
    fn first<T>(
        &self,
        after: Option<usize>,
        ask: impl Fn(&Source) -> Result<Option<T>, CacheError>,
    ) -> Result<Option<(usize, T)>, CacheError> {
        let mut failed = None;
        for (number, cache) in self.list().iter().enumerate().skip(after.map_or(0, |after| after + 1)) {
            let answer = match cache.disabled() {
                Some(error) => Err(error),
                None => ask(cache),
            };
            match answer {
                Ok(Some(found)) => return Ok(Some((number, found))),
                Ok(None) => {}
                Err(CacheError::Interrupted) => return Err(CacheError::Interrupted),
                Err(error) => {
                    cache.note(&error);
                    failed = failed.or(Some(error));
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    /// The same for many paths, asked for at once as far as that is allowed.
    pub fn find_all(&self, paths: &BTreeSet<StorePath>) -> BTreeMap<StorePath, Result<Option<Found>, CacheError>> {
        if paths.is_empty() {
            return BTreeMap::new();
        }
        self.ask_closures(paths);
        let list: Vec<&StorePath> = paths.iter().collect();
        let found = in_parallel(self.parallel(), &list, |path| self.find(path, None));
        list.into_iter().cloned().zip(found).collect()
    }

    /// Asks for the closures of paths of which nothing is known yet, where that can be done.
    fn ask_closures(&self, paths: &BTreeSet<StorePath>) {
        for source in self.list().iter().filter(|source| source.disabled().is_none()) {
            let cache = match source {
                Source::Cache(cache) if cache.offers_closures() => cache,
                Source::Cache(_) => continue,
                Source::Store(store) => {
                    // One question for all of them.
                    if let Err(error) = store.look_up(&self.lookups, paths) {
                        source.note(&error);
                    }
                    continue;
                }
            };
            let unknown: Vec<HashPart> = paths
                .iter()
                .map(StorePath::hash_part)
                .filter(|part| cache.known(&self.lookups, *part).is_none())
                .collect();
            for parts in unknown.chunks(closure::ASKED_MAX) {
                cache.ask_closures(&self.lookups, parts);
            }
        }
    }

    /// Opens the archive of a path that was found; `None` if the cache has not got it after all.
    pub fn nar(&self, found: &Found) -> Result<Option<NarReader>, CacheError> {
        let Some(cache) = self.get(found.cache) else { return Ok(None) };
        let nar = cache.nar(&found.info).inspect_err(|error| cache.note(error))?;
        if nar.is_none() {
            self.forget(found);
        }
        Ok(nar)
    }

    /// A cache has not got, or not as it says, what was found.
    pub fn forget(&self, found: &Found) {
        if let Some(cache) = self.get(found.cache) {
            cache.forget(&self.lookups, &found.info.info.path);
        }
    }

    /// Ends all requests that are open.
    pub fn stop(&self) {
        self.client.stop();
        for source in self.opened.get().into_iter().flatten() {
            source.stop();
        }
    }

    /// Lets other processes know what was found.
    pub fn flush(&self) {
        self.lookups.flush();
    }
}
