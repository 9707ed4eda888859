//! Fetching from binary caches: who has a path and may be believed, and the way of its archive
//! into the store.
//!
//! An archive is downloaded, decompressed, hashed and unpacked in one go, under the lock of its
//! path. What has come whole waits for the ledger: one thread registers for all, and the others go
//! on fetching, so that many small paths cost few commits. Source: building, section 3; protocols,
//! section 5.4.
//!
//! - `realisations`: as what others have built outputs whose paths nobody knows beforehand.

mod realisations;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use larder_cache::caches::{Caches, Found};
use larder_cache::error::{CacheError, DownloadError};
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::{Level, chain};
use larder_core::settings::Settings;
use larder_core::signature::{PublicKey, Signature, SignatureError, count_valid};
use larder_core::store_path::StorePath;
use larder_store::deliver::{Claim, Delivery};
use larder_store::{LocalStore, StoreError};

use crate::job::{Failure, FailureKind};
use crate::plan::{Fetched, Offer};

/// How often an archive is fetched from the start when its download is cut and cannot be resumed.
const FETCHES: u32 = 3;

/// The pause before that.
const PAUSE: Duration = Duration::from_millis(250);

/// For how long more is waited for before what has come is registered, while others fetch: a commit
/// costs about as much as fetching a small path.
const GATHER: Duration = Duration::from_millis(4);

/// Whose signatures count.
#[derive(Debug, Clone, Default)]
pub struct Trust {
    /// Are signatures asked for at all?
    pub requires_signatures: bool,
    pub keys: Vec<PublicKey>,
}

impl Trust {
    /// As the settings say. Errors: a key is none.
    pub fn of(settings: &Settings) -> Result<Self, SignatureError> {
        let keys = settings.trusted_public_keys.iter().map(|key| key.parse()).collect::<Result<_, _>>()?;
        Ok(Self { requires_signatures: settings.require_sigs, keys })
    }
}

/// Who can be asked for paths. Called from several threads at once.
pub trait Substituters: Sync {
    /// Questions at once.
    fn parallel_questions(&self) -> usize;

    /// Who has a path, and what it refers to; only those behind number `after` are asked.
    fn offer(&self, path: &StorePath, after: Option<usize>) -> Offer;

    /// How long the archive of an offered path is said to be, in bytes.
    fn size_bytes(&self, path: &StorePath) -> u64;

    /// Fetches what was offered; `done` hears what came of it, unless another call that has not ended
    /// tells of it, and of others that were registered with it. `tell` is told of errors that the answer does not show.
    fn fetch(&self, path: &StorePath, replace: bool, done: &dyn Fn(StorePath, Fetched), tell: &dyn Fn(&str));

    /// As what others have built outputs whose paths nobody knows beforehand. Where one of them is known
    /// to nobody, the others need not be told.
    fn realisations(&self, ids: &[DrvOutput]) -> Result<BTreeMap<DrvOutput, StorePath>, Failure>;

    /// Notes what was found of them, and what that depends on. The paths are valid by now.
    fn register(&self, ids: &[DrvOutput]) -> Result<(), Failure>;

    /// Nothing is fetched any more, and what is on its way is given up.
    fn stop(&self);
}

/// Fetches from caches into one store.
pub struct Substitution<'a> {
    store: &'a LocalStore,
    caches: &'a Caches,
    trust: Trust,
    /// What was offered, to be fetched.
    offered: Mutex<HashMap<StorePath, Found>>,
    /// What was found of outputs, each with all that is to be registered with it.
    realised: Mutex<HashMap<DrvOutput, Vec<Realisation>>>,
    /// Realisations that are not believed, and were complained of.
    doubted: Mutex<HashSet<(usize, DrvOutput)>>,
    arrived: Mutex<Arrived<'a>>,
    /// Threads that are fetching.
    fetching: AtomicUsize,
    stopped: AtomicBool,
}

/// What came whole and is not registered.
#[derive(Default)]
struct Arrived<'a> {
    deliveries: Vec<Delivery<'a>>,
    /// Does somebody register, who will take the rest along?
    is_served: bool,
}

/// Held by who registers; let go of also if that breaks down.
struct Service<'s, 'a>(&'s Mutex<Arrived<'a>>);

impl Drop for Service<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(self.0).is_served = false;
        }
    }
}

impl<'a> Service<'_, 'a> {
    /// All that has come; with nothing the service ends.
    fn take(&self) -> Option<Vec<Delivery<'a>>> {
        let mut arrived = lock(self.0);
        arrived.is_served = !arrived.deliveries.is_empty();
        arrived.is_served.then(|| std::mem::take(&mut arrived.deliveries))
    }
}

impl std::fmt::Debug for Substitution<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Substitution").field("caches", self.caches).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(error: &CacheError) -> Failure {
    let kind = if matches!(error, CacheError::Interrupted) { FailureKind::Cancelled } else { FailureKind::Misc };
    Failure { kind, text: chain(error) }
}

/// The archive of a path, until everything is given up.
struct Stoppable<'a> {
    source: Box<dyn Read + Send>,
    stopped: &'a AtomicBool,
}

impl Read for Stoppable<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.stopped.load(Ordering::Relaxed) {
            return Err(io::Error::other(CacheError::Interrupted));
        }
        self.source.read(buf)
    }
}

/// What one attempt to fetch came to.
enum Attempt<'a> {
    Whole(Box<Delivery<'a>>),
    Ended(Fetched),
    /// Once more from the start might help.
    Cut(Failure),
}

impl<'a> Substitution<'a> {
    pub fn new(store: &'a LocalStore, caches: &'a Caches, trust: Trust) -> Self {
        Self {
            store,
            caches,
            trust,
            offered: Mutex::default(),
            realised: Mutex::default(),
            doubted: Mutex::default(),
            arrived: Mutex::default(),
            fetching: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        }
    }

    fn is_trusted(&self, found: &Found) -> bool {
        let (dir, info) = (self.store.dir(), &found.info.info);
        self.trusts(found.cache) || info.is_content_addressed(dir) || count_valid(dir, info, &self.trust.keys) > 0
    }

    fn tell_untrusted(&self, found: &Found) {
        let info = &found.info.info;
        self.store.reporter().message(
            Level::Warn,
            format_args!(
                "the substitute for '{}' from '{}' is not signed by any of the keys in 'trusted-public-keys' \
                 ({})",
                self.store.dir().display(&info.path),
                self.uri(found.cache),
                self.keys_of(&info.signatures)
            ),
        );
    }

    /// Whose signatures there are, and whose count.
    fn keys_of<'s>(&self, signatures: impl IntoIterator<Item = &'s Signature>) -> String {
        let list = |names: Vec<&str>| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        let offered = list(signatures.into_iter().map(Signature::key_name).collect());
        let wanted = list(self.trust.keys.iter().map(PublicKey::name).collect());
        format!("it has signatures by: {offered}; trusted are: {wanted}")
    }

    fn trusts(&self, cache: usize) -> bool {
        !self.trust.requires_signatures || self.caches.get(cache).is_some_and(larder_cache::Source::is_trusted)
    }

    fn uri(&self, cache: usize) -> &str {
        self.caches.get(cache).map_or("", larder_cache::Source::uri)
    }

    fn attempt(&self, found: &Found, replace: bool, tell: &dyn Fn(&str)) -> Attempt<'a> {
        let info = &found.info.info;
        let claimed = match self.store.claim(&info.path, replace) {
            Ok(Claim::Valid) => return Attempt::Ended(Fetched::Done),
            Ok(Claim::Busy(path)) => return Attempt::Ended(Fetched::Locked(path)),
            Ok(Claim::Ours(claimed)) => claimed,
            Err(error) => return Attempt::Ended(Fetched::Failed(store_failure(&error))),
        };
        let (full, uri) = (self.store.dir().display(&info.path), self.uri(found.cache));
        self.store.reporter().message(Level::Info, format_args!("copying path '{full}' from '{uri}'..."));
        let source = match self.caches.nar(found) {
            Ok(Some(nar)) => nar.ahead(),
            Ok(None) => {
                let missing = CacheError::Missing { uri: uri.to_owned(), name: found.info.url.clone() };
                tell(&missing.to_string());
                return Attempt::Ended(Fetched::Gone);
            }
            Err(error) => return Attempt::Ended(Fetched::Failed(failure(&error))),
        };
        let mut source = Stoppable { source, stopped: &self.stopped };
        match self.store.receive_claimed(claimed, info.clone(), &mut source) {
            Ok(delivery) => Attempt::Whole(Box::new(delivery)),
            Err(StoreError::Input(error)) => match CacheError::from_io(error) {
                Ok(error) if is_cut(&error) => Attempt::Cut(failure(&error)),
                Ok(error) => Attempt::Ended(Fetched::Failed(failure(&error))),
                Err(error) => Attempt::Ended(Fetched::Failed(store_failure(&StoreError::Input(error)))),
            },
            Err(error) => {
                let mut failure = store_failure(&error);
                match error {
                    StoreError::ImportHash { .. } | StoreError::ImportSize { .. } => {
                        failure.text = format!("{}\n  from:      {uri}", failure.text);
                    }
                    StoreError::Interrupted | StoreError::File(_) => {}
                    _ => failure.text = format!("path '{full}' from '{uri}' cannot be added: {}", failure.text),
                }
                Attempt::Ended(Fetched::Failed(failure))
            }
        }
    }

    /// Has an object registered: by whoever does that now, or else by this thread together with all
    /// that come meanwhile.
    fn register(&self, delivery: Delivery<'a>, done: &dyn Fn(StorePath, Fetched)) {
        {
            let mut arrived = lock(&self.arrived);
            arrived.deliveries.push(delivery);
            if std::mem::replace(&mut arrived.is_served, true) {
                return;
            }
        }
        let service = Service(&self.arrived);
        loop {
            if self.fetching.load(Ordering::Relaxed) > 1 {
                std::thread::sleep(GATHER);
            }
            let Some(all) = service.take() else { return };
            let paths: Vec<StorePath> = all.iter().map(|delivery| delivery.path().clone()).collect();
            for (path, result) in paths.into_iter().zip(self.store.register_deliveries(all)) {
                let fetched = match result {
                    Ok(()) => Fetched::Done,
                    Err(error) => Fetched::Failed(store_failure(&error)),
                };
                done(path, fetched);
            }
        }
    }

    fn fetch_offered(&self, found: &Found, replace: bool, done: &dyn Fn(StorePath, Fetched), tell: &dyn Fn(&str)) {
        let path = &found.info.info.path;
        for fetches in 1.. {
            match self.attempt(found, replace, tell) {
                Attempt::Whole(delivery) => return self.register(*delivery, done),
                Attempt::Ended(fetched) => return done(path.clone(), fetched),
                Attempt::Cut(failure) if fetches >= FETCHES => return done(path.clone(), Fetched::Failed(failure)),
                Attempt::Cut(failure) => {
                    let text = failure.text;
                    self.store.reporter().message(Level::Warn, format_args!("{text}; fetching it anew"));
                    std::thread::sleep(PAUSE * fetches);
                }
            }
        }
    }
}

impl Substituters for Substitution<'_> {
    fn parallel_questions(&self) -> usize {
        self.caches.parallel()
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.caches.stop();
    }

    fn offer(&self, path: &StorePath, after: Option<usize>) -> Offer {
        let mut after = after;
        loop {
            let found = match self.caches.find(path, after) {
                Ok(None) => return Offer::Nobody,
                Ok(Some(found)) => found,
                // All were asked by now.
                Err(error) => {
                    return Offer::Error { substituter: self.caches.list().len(), failure: failure(&error) };
                }
            };
            if self.is_trusted(&found) {
                let (substituter, references) = (found.cache, found.info.info.references.clone());
                lock(&self.offered).insert(path.clone(), found);
                return Offer::From { substituter, references };
            }
            self.tell_untrusted(&found);
            after = Some(found.cache);
        }
    }

    fn realisations(&self, ids: &[DrvOutput]) -> Result<BTreeMap<DrvOutput, StorePath>, Failure> {
        let mut found = BTreeMap::new();
        for id in ids {
            let Some(path) = self.find_realisation(id)? else { break };
            found.insert(id.clone(), path);
        }
        Ok(found)
    }

    fn register(&self, ids: &[DrvOutput]) -> Result<(), Failure> {
        self.register_found(ids)
    }

    fn size_bytes(&self, path: &StorePath) -> u64 {
        lock(&self.offered).get(path).map_or(0, |found| found.info.info.nar_size_bytes)
    }

    fn fetch(&self, path: &StorePath, replace: bool, done: &dyn Fn(StorePath, Fetched), tell: &dyn Fn(&str)) {
        let Some(found) = lock(&self.offered).get(path).cloned() else {
            return done(path.clone(), Fetched::Gone);
        };
        self.fetching.fetch_add(1, Ordering::Relaxed);
        let _ended = Ended(&self.fetching);
        self.fetch_offered(&found, replace, done, tell);
    }
}

/// Counts a thread out, whatever became of it.
struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn is_cut(error: &CacheError) -> bool {
    matches!(error, CacheError::Download { source: DownloadError::Cut { .. } | DownloadError::Short { .. }, .. })
}

fn store_failure(error: &StoreError) -> Failure {
    let kind = if matches!(error, StoreError::Interrupted) { FailureKind::Cancelled } else { FailureKind::Misc };
    Failure { kind, text: chain(error) }
}
