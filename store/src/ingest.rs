//! The one door in: everything that becomes a store object comes through here.
//!
//! An archive streams in; in one pass it is hashed, scanned for references and laid down under a
//! temporary name in the store directory. Then the object is sealed: renamed to its own path
//! under that path's lock. Last, it is committed: its bytes and its name are brought to the disk,
//! and then it is registered, many objects in one transaction. A crash before the commit leaves
//! no more than an entry of the store directory that is not valid, which a collector deletes.
//!
//! The temporary name has the form of a store path and is a temporary root, so neither a
//! collector of ours nor one of real Nix takes it away meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use larder_core::content_address::{ContentAddress, Method};
use larder_core::hash::{Algorithm, Hash, Hasher, NarHasher, Sha256Digest, fold};
use larder_core::hash_part::HashPart;
use larder_core::nar::{Encoder, Event};
use larder_core::path_info::PathInfo;
use larder_core::refscan::Scanner;
use larder_core::report::Level;
use larder_core::store_dir::References;
use larder_core::store_path::{Name, StorePath};
use larder_fs::canon::{self, CanonOptions, Origin, Seen};
use larder_fs::dump::{self, DumpOptions, StreamError};
use larder_fs::entry::Target;
use larder_fs::file_error::FileError;
use larder_fs::lock_file::Wait;
use larder_fs::path_lock::{OnRelease, PathLocks};
use larder_fs::remove::{self, OnFailure};
use larder_fs::restore::{Metadata, RestoreOptions, Restorer};
use larder_store_db::Batch;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use crate::error::StoreError;
use crate::local::{LocalStore, now_s};

/// How many sealed objects wait for one transaction. Each holds a lock file open.
const MAX_PENDING: usize = 64;

/// Names that are made and protected together once a second object comes.
const NAMES_AT_ONCE: usize = 16;

/// The files of objects with smaller archives than this (bytes) are brought to the disk one by
/// one; those of others with all that the file system holds back.
pub(crate) const SYNC_EACH_BELOW: u64 = 128 << 10;

/// An object that lies in the store directory under a temporary name. Dropped, it goes away.
#[derive(Debug)]
pub(crate) struct Incoming<'s> {
    store: &'s LocalStore,
    pub(crate) entry: OsString,
    /// It has its own name by now.
    pub(crate) kept: bool,
    pub(crate) nar_hash: Sha256Digest,
    pub(crate) nar_size_bytes: u64,
    /// Of the candidates that were looked for.
    pub(crate) found: BTreeSet<HashPart>,
}

impl Drop for Incoming<'_> {
    fn drop(&mut self) {
        if !self.kept {
            self.store.discard(&self.entry);
        }
    }
}

/// Takes an archive in pieces.
pub(crate) struct Intake<'s> {
    incoming: Incoming<'s>,
    restorer: Restorer<'s>,
    hasher: NarHasher,
    scanner: Option<Scanner>,
}

impl<'s> Intake<'s> {
    /// Its temporary name in the store directory.
    pub(crate) fn entry(&self) -> &std::ffi::OsStr {
        &self.incoming.entry
    }

    /// Takes what belongs to the archive off the front of `input`.
    pub(crate) fn push(&mut self, input: &mut &[u8]) -> Result<(), StoreError> {
        self.incoming.store.check_interrupt()?;
        let (taken, rest) = input.split_at(self.restorer.push(input)?);
        *input = rest;
        self.hasher.update(taken);
        if let Some(scanner) = &mut self.scanner {
            scanner.push(taken);
        }
        Ok(())
    }

    /// Has the end of the archive come?
    pub(crate) fn is_done(&self) -> bool {
        self.restorer.is_done()
    }

    pub(crate) fn finish(self) -> Result<Incoming<'s>, StoreError> {
        let Self { mut incoming, restorer, hasher, scanner } = self;
        let restored = restorer.finish()?;
        (incoming.nar_hash, incoming.nar_size_bytes) = hasher.finish();
        incoming.found = scanner.map(Scanner::finish).unwrap_or_default();
        if !restored.canonical {
            incoming.store.canonicalise(&incoming.entry)?;
        }
        Ok(incoming)
    }
}

/// An object at its own path, locked, to be registered.
#[derive(Debug)]
struct Sealed {
    info: PathInfo,
    outputs: BTreeMap<String, StorePath>,
    locks: PathLocks,
    /// It lay there before, put there and registered by real Nix, and is not ours to take away.
    foreign: bool,
}

/// Objects on their way in, committed together.
///
/// Dropped without a [`Arrivals::commit`] that went well, what was sealed is taken away again.
#[derive(Debug)]
pub struct Arrivals<'s> {
    store: &'s LocalStore,
    pending: Vec<Sealed>,
    /// Paths that have been found valid, and are protected.
    valid: BTreeSet<StorePath>,
    /// A registration failed.
    failed: bool,
}

impl Drop for Arrivals<'_> {
    fn drop(&mut self) {
        for sealed in self.pending.drain(..).filter(|sealed| !sealed.foreign) {
            // A registration that failed may be there all the same: then the object stays.
            if !self.failed || matches!(self.store.is_valid(&sealed.info.path), Ok(false)) {
                self.store.discard(OsStr::new(&sealed.info.path.to_string()));
            }
        }
    }
}

/// Names for objects that come.
#[derive(Debug, Default)]
pub(crate) struct Names {
    has_begun: bool,
    /// Protected, and of no use yet.
    spare: Vec<StorePath>,
}

/// Unique among processes and times; the restorer refuses an entry that exists.
fn temporary_name() -> StorePath {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let seed =
        format!("{} {} {:?}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed), std::time::SystemTime::now());
    let digest = Sha256Digest::of(seed.as_bytes());
    let name = Name::new("larder-incoming").expect("a legal name");
    StorePath::new(HashPart::from_digest(fold(digest.as_bytes())), name)
}

/// What an object is to be called and to refer to, where that follows from its contents.
#[derive(Debug, Clone)]
pub struct ContentAddressed {
    pub name: Name,
    pub method: Method,
    pub algorithm: Algorithm,
}

impl LocalStore {
    /// An error once the user wants to stop.
    pub(crate) fn check_interrupt(&self) -> Result<(), StoreError> {
        if self.reporter().is_cancelled() { Err(StoreError::Interrupted) } else { Ok(()) }
    }

    /// Deletes an entry of the store directory that is not valid; a failure is only told.
    pub(crate) fn discard(&self, entry: &OsStr) {
        let Ok(dir) = self.store_fd() else { return };
        let target = Target { dir, name: entry, dir_path: &self.layout().real_store };
        if let Err(error) = remove::remove(target, OnFailure::Continue) {
            let reason = &error.source;
            self.reporter()
                .message(Level::Warn, format_args!("cannot remove what is left of an addition: {error}: {reason}"));
        }
    }

    /// Gives everything at an entry of the store directory its canonical metadata.
    pub(crate) fn canonicalise(&self, entry: &OsStr) -> Result<(), StoreError> {
        let target = Target { dir: self.store_fd()?, name: entry, dir_path: &self.layout().real_store };
        Ok(canon::canonicalise(
            target,
            &CanonOptions { origin: &Origin::Trusted, ignored_acls: &self.options().ignored_acls },
            &mut Seen::default(),
        )?)
    }

    /// A name for something on its way in, protected from collectors.
    pub(crate) fn temporary(&self) -> Result<Incoming<'_>, StoreError> {
        self.make_room();
        let path = self.temporary_name()?;
        Ok(Incoming {
            store: self,
            entry: OsString::from(path.to_string()),
            kept: false,
            nar_hash: Sha256Digest([0; 32]),
            nar_size_bytes: 0,
            found: BTreeSet::new(),
        })
    }

    /// A name that nobody else has, protected from the collector.
    fn temporary_name(&self) -> Result<StorePath, StoreError> {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = names.spare.pop() {
            return Ok(name);
        }
        // The first object may be the only one.
        let count = if names.has_begun { NAMES_AT_ONCE } else { 1 };
        let fresh: Vec<StorePath> = (0..count).map(|_| temporary_name()).collect();
        self.add_temp_roots(&fresh)?;
        *names = Names { has_begun: true, spare: fresh };
        Ok(names.spare.pop().expect("one at least"))
    }

    /// Begins to take an archive. `candidates` are the hash parts to look for in it.
    pub(crate) fn receive(&self, candidates: Option<BTreeSet<HashPart>>) -> Result<Intake<'_>, StoreError> {
        let incoming = self.temporary()?;
        let options = RestoreOptions {
            metadata: Metadata::Store,
            case_hack: self.options().use_case_hack,
            preallocate: self.options().preallocate_contents,
            ignored_xattrs: &self.options().ignored_acls,
            below: Some(&self.layout().real_store),
            ..RestoreOptions::default()
        };
        let restorer = Restorer::new(self.store_fd()?, &incoming.entry, options);
        Ok(Intake { incoming, restorer, hasher: NarHasher::new(), scanner: candidates.map(Scanner::new) })
    }

    /// Puts an object at its path, whose lock the caller holds.
    fn put(&self, incoming: &mut Incoming<'_>, path: &StorePath, entry: &OsStr) -> Result<(), StoreError> {
        let dir = self.store_fd()?;
        // What lies there is not valid: the remains of a crash, or of a deletion.
        let target = Target { dir, name: entry, dir_path: &self.layout().real_store };
        remove::remove(target, OnFailure::Stop).map_err(FileError::from)?;
        if self.options().sync && incoming.nar_size_bytes < SYNC_EACH_BELOW {
            larder_fs::sync::sync_tree(dir, &incoming.entry, &self.layout().real_store)?;
        }
        rustix::fs::renameat(dir, &incoming.entry, dir, entry)
            .map_err(|e| FileError::new("renaming to", self.layout().real_path(path), std::io::Error::from(e)))?;
        incoming.kept = true;
        Ok(())
    }

    /// Objects to come in together.
    pub fn arrivals(&self) -> Arrivals<'_> {
        Arrivals { store: self, pending: Vec::new(), valid: BTreeSet::new(), failed: false }
    }

    /// The path a file or tree would get, and its hash and size, without adding it.
    pub fn content_path(&self, source: &Path, content: &ContentAddressed) -> Result<StorePath, StoreError> {
        let mut other = Hasher::new(content.algorithm);
        if content.method == Method::Flat {
            let mut file = open_flat(source)?;
            copy(&mut file, &mut |bytes| {
                other.update(bytes);
                Ok(())
            })?;
        } else {
            let options = DumpOptions { case_hack: self.options().use_case_hack, below: None };
            dump::dump_pipelined(CWD, source.as_os_str(), &options, |bytes| {
                other.update(bytes);
                Ok::<(), StoreError>(())
            })
            .map_err(stream_error)?;
        }
        Ok(self.dir().make_fixed_path(content.method, other.finish(), &content.name)?)
    }

    /// Adds a file or tree under the path that follows from its contents.
    pub fn add(&self, source: &Path, content: &ContentAddressed) -> Result<StorePath, StoreError> {
        let mut arrivals = self.arrivals();
        let path = arrivals.add(source, content)?;
        arrivals.commit()?;
        Ok(path)
    }
}

/// Opens what is to have a flat hash.
fn open_flat(source: &Path) -> Result<std::fs::File, StoreError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(source, flags, Mode::empty())
        .map_err(|e| FileError::new("opening file", source, std::io::Error::from(e)))?;
    Ok(fd.into())
}

/// Reads to the end, in pieces of up to 256 KiB.
pub(crate) fn copy(
    file: &mut dyn Read,
    each: &mut dyn FnMut(&[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut block = vec![0; larder_fs::pipe::BLOCK_BYTES];
    loop {
        match file.read(&mut block) {
            Ok(0) => return Ok(()),
            Ok(n) => each(block.get(..n).unwrap_or_default())?,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(StoreError::Input(e)),
        }
    }
}

pub(crate) fn stream_error(error: StreamError<StoreError>) -> StoreError {
    match error {
        StreamError::Dump(error) => error.into(),
        StreamError::Sink(error) => error,
    }
}

impl<'s> Arrivals<'s> {
    /// Takes a file or tree in, under the path that follows from its contents.
    ///
    /// It becomes valid with the next [`Arrivals::commit`].
    pub fn add(&mut self, source: &Path, content: &ContentAddressed) -> Result<StorePath, StoreError> {
        let store = self.store;
        let mut intake = store.receive(None)?;
        let hash = if content.method == Method::Flat {
            Some(take_flat(&mut intake, source, content.algorithm)?)
        } else {
            // The NAR hash is had anyway; another algorithm is a second hash of the same bytes.
            let mut other = (content.algorithm != Algorithm::Sha256).then(|| Hasher::new(content.algorithm));
            let options = DumpOptions { case_hack: store.options().use_case_hack, below: None };
            dump::dump_pipelined(CWD, source.as_os_str(), &options, |mut bytes| {
                if let Some(other) = &mut other {
                    other.update(bytes);
                }
                intake.push(&mut bytes)
            })
            .map_err(stream_error)?;
            other.map(Hasher::finish)
        };
        let incoming = intake.finish()?;
        let hash = hash.unwrap_or_else(|| incoming.nar_hash.to_hash());
        let address = ContentAddress::Fixed(content.method, hash);
        let path = store.dir().make_content_path(&content.name, &address, &References::default())?;
        let mut info = PathInfo::new(path.clone(), incoming.nar_hash, incoming.nar_size_bytes);
        info.content_address = Some(address);
        self.seal(incoming, info)?;
        Ok(path)
    }

    /// Gives an object its own path, unless that is valid already; it is registered by the next
    /// commit. References must be valid, pending in this group, or to itself.
    pub(crate) fn seal(&mut self, incoming: Incoming<'s>, info: PathInfo) -> Result<(), StoreError> {
        let store = self.store;
        let path = info.path.clone();
        // The root comes before the question whether it is valid: a path found valid earlier may
        // be collected before the root protects it.
        store.add_temp_roots([&path])?;
        if self.pending.iter().any(|sealed| sealed.info.path == path) || store.is_valid(&path)? {
            return Ok(());
        }
        self.check_references(&info)?;
        let real = store.layout().real_path(&path);
        let reporter = store.reporter();
        let mut say =
            |path: &Path| reporter.message(Level::Info, format_args!("waiting for lock on '{}'...", path.display()));
        let mut locks = PathLocks::acquire([&real], &store.options().held_locks, Wait::Yes(&mut say))?
            .expect("waited until it was free");
        // Whether the path becomes valid or goes away again, nobody needs its lock file then.
        locks.on_release(OnRelease::Delete);
        if store.is_valid_under_lock(&path)? {
            // Someone else added it while we waited.
            return Ok(locks.release()?);
        }
        self.place(incoming, info, locks)
    }

    /// The same for a path that the caller has locked, and found not to be valid since.
    pub(crate) fn seal_claimed(
        &mut self,
        incoming: Incoming<'s>,
        info: PathInfo,
        locks: PathLocks,
    ) -> Result<(), StoreError> {
        self.check_references(&info)?;
        self.place(incoming, info, locks)
    }

    fn place(&mut self, mut incoming: Incoming<'s>, mut info: PathInfo, locks: PathLocks) -> Result<(), StoreError> {
        let (store, path) = (self.store, info.path.clone());
        let outputs =
            if path.is_derivation() { store.check_derivation(&path, &incoming.entry)? } else { BTreeMap::new() };
        let entry = OsString::from(path.to_string());
        let foreign = self.keeps_foreign(&incoming, &path, &entry)?;
        if !foreign {
            store.put(&mut incoming, &path, &entry)?;
            if store.options().auto_optimise_store {
                store.optimise_path(&path);
            }
        }
        info.registration_time_s = now_s();
        self.pending.push(Sealed { info, outputs, locks, foreign });
        if self.pending.len() >= MAX_PENDING {
            self.commit()?;
        }
        Ok(())
    }

    /// Does an object of real Nix lie at this path, with the contents of `incoming`? Then it stays.
    ///
    /// One with other contents is an error: replaced, it would no longer be what real Nix has
    /// registered.
    fn keeps_foreign(&self, incoming: &Incoming<'_>, path: &StorePath, entry: &OsStr) -> Result<bool, StoreError> {
        let store = self.store;
        match rustix::fs::statat(store.store_fd()?, entry, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => {
                let real = store.layout().real_path(path);
                return Err(FileError::new("getting status of", &real, std::io::Error::from(e)).into());
            }
            Ok(_) if !store.belongs_to_real_nix(path)? => return Ok(false),
            Ok(_) => {}
        }
        let mut hasher = NarHasher::new();
        store.dump_object(path, |bytes| {
            hasher.update(bytes);
            Ok(())
        })?;
        if hasher.finish() == (incoming.nar_hash, incoming.nar_size_bytes) {
            Ok(true)
        } else {
            Err(StoreError::BelongsToRealNix { path: store.dir().full(path) })
        }
    }

    /// Asks in one go which of these are valid, so that what refers to them need not.
    pub(crate) fn foresee<'a>(
        &mut self,
        references: impl IntoIterator<Item = &'a StorePath>,
    ) -> Result<(), StoreError> {
        let wanted: BTreeSet<StorePath> = references.into_iter().cloned().collect();
        self.valid = self.protected_and_valid(&wanted)?;
        Ok(())
    }

    /// Which of these are valid, and stay so until the commit: a collector leaves them alone.
    fn protected_and_valid(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, StoreError> {
        self.store.add_temp_roots(paths)?;
        self.store.valid_subset(paths)
    }

    fn check_references(&self, info: &PathInfo) -> Result<(), StoreError> {
        let is_there =
            |path: &StorePath| self.valid.contains(path) || self.pending.iter().any(|sealed| sealed.info.path == *path);
        let wanted: BTreeSet<StorePath> =
            info.references.iter().filter(|path| **path != info.path && !is_there(path)).cloned().collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let valid = self.protected_and_valid(&wanted)?;
        match wanted.difference(&valid).next() {
            Some(missing) => Err(self.store.not_valid(missing)),
            None => Ok(()),
        }
    }

    pub(crate) fn store(&self) -> &'s LocalStore {
        self.store
    }

    /// How many objects wait to be registered.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Registers all that was sealed, durably: data, then names, then the ledger.
    pub fn commit(&mut self) -> Result<(), StoreError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let store = self.store;
        if store.options().sync {
            let dir = store.store_fd()?;
            let large = self.pending.iter().any(|sealed| sealed.info.nar_size_bytes >= SYNC_EACH_BELOW);
            // The names of small objects, whose data is on the disk already, need the directory only.
            let synced = if large { rustix::fs::syncfs(dir) } else { larder_fs::sync::sync_dir(dir) };
            synced.map_err(|e| FileError::new("syncing", &store.layout().real_store, std::io::Error::from(e)))?;
        }
        let mut batch = Batch::new();
        for sealed in &self.pending {
            batch.push_info(&sealed.info, &sealed.outputs)?;
        }
        let ledger = store.ledger()?;
        if let Err(error) = ledger.register(batch) {
            self.failed = true;
            if ledger.settle().is_err() {
                // Nobody can tell what is valid: the objects are left to a collector.
                self.pending.clear();
            }
            return Err(StoreError::from(error).in_dir(store.dir()));
        }
        // They are valid: nothing below takes them away again.
        for sealed in std::mem::take(&mut self.pending) {
            sealed.locks.release()?;
        }
        Ok(())
    }
}

/// Takes a regular file as an archive of its own; gives the hash of its contents.
fn take_flat(intake: &mut Intake<'_>, source: &Path, algorithm: Algorithm) -> Result<Hash, StoreError> {
    let mut file = open_flat(source)?;
    let meta = file.metadata().map_err(StoreError::Input)?;
    if !meta.is_file() && !meta.is_dir() {
        return Err(StoreError::NotRegular { path: source.to_owned() });
    }
    let mut left = if meta.is_dir() { 1 } else { meta.len() };
    let mut hasher = Hasher::new(algorithm);
    let mut encoder = Encoder::new();
    let mut framing = Vec::new();
    encoder.push(Event::File { executable: false, size_bytes: left }, &mut framing);
    intake.push(&mut framing.as_slice())?;
    let mut block = vec![0; larder_fs::pipe::BLOCK_BYTES];
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
        let n = file.read(block.get_mut(..most).unwrap_or_default()).map_err(StoreError::Input)?;
        if n == 0 {
            return Err(StoreError::Dump(dump::DumpError::Shrank { path: source.to_owned(), missing_bytes: left }));
        }
        let bytes = block.get(..n).unwrap_or_default();
        hasher.update(bytes);
        intake.push(&mut &*bytes)?;
        left -= n as u64;
    }
    framing.clear();
    encoder.push(Event::EndFile, &mut framing);
    intake.push(&mut framing.as_slice())?;
    Ok(hasher.finish())
}
