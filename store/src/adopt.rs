//! Taking in what builders made: from where they left it to valid paths.
//!
//! A finished output is first *taken*: it gets a temporary name in the store directory, and is
//! hashed and scanned in one reading. Where the builder may have left somebody a descriptor to
//! write with, what is taken is a copy, so that nothing that is hashed can be changed any more.
//! Then all outputs of a build are *registered* together: renamed to their own paths, brought to
//! the disk, and last written to the ledger in one transaction.
//!
//! The caller holds the locks of the final paths throughout.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use larder_core::hash::{Algorithm, Hash, Hasher, NarHasher, Sha256Digest};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::realisation::Realisation;
use larder_core::refscan::Scanner;
use larder_core::rewrite::{ModuloSelf, ModuloSelfHasher, Rewriter};
use larder_core::store_path::StorePath;
use larder_fs::canon::CanonError;
use larder_fs::dump::{self, DumpOptions};
use larder_fs::entry::Target;
use larder_fs::file_error::FileError;
use larder_fs::remove::{self, OnFailure};
use larder_store_db::Batch;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::Errno;

use crate::error::StoreError;
use crate::ingest::{Incoming, SYNC_EACH_BELOW, stream_error};
use crate::local::{LocalStore, now_s};

/// How an output comes into the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Renamed: nobody but us can change it any more.
    Move,
    /// Made anew: somebody may have kept a descriptor of it.
    Copy,
}

/// What to do with an output on its way in.
#[derive(Debug)]
pub struct Take<'a> {
    pub way: Way,
    /// Hash parts to look for, in what comes out of the rewriting.
    pub candidates: &'a BTreeSet<HashPart>,
    /// Hash parts to replace; with any of them the output is made anew in any case.
    pub rewrites: &'a [(HashPart, HashPart)],
    /// Hash the archive by this algorithm too.
    pub also: Option<Algorithm>,
}

/// Hears of a path that nobody else uses before there is anything at it, so that it can be cleaned up
/// after a crash.
pub type Announce<'a> = &'a dyn Fn(&std::path::Path) -> Result<(), FileError>;

/// An output in the store directory under a temporary name. Dropped, it is deleted.
#[derive(Debug)]
pub struct Taken<'s> {
    incoming: Incoming<'s>,
    also: Option<Hash>,
}

impl<'s> Taken<'s> {
    /// What came in some other way.
    pub(crate) const fn of(incoming: Incoming<'s>) -> Self {
        Self { incoming, also: None }
    }
}

impl Taken<'_> {
    pub fn nar_hash(&self) -> Sha256Digest {
        self.incoming.nar_hash
    }

    pub fn nar_size_bytes(&self) -> u64 {
        self.incoming.nar_size_bytes
    }

    /// The candidates that occur in it.
    pub fn found(&self) -> &BTreeSet<HashPart> {
        &self.incoming.found
    }

    /// The hash that was asked for beside SHA-256.
    pub fn also(&self) -> Option<Hash> {
        self.also
    }

    /// Its name in the store directory.
    pub fn entry(&self) -> &OsStr {
        &self.incoming.entry
    }
}

/// An output and what is to be recorded of it.
#[derive(Debug)]
pub struct Output<'s> {
    pub taken: Taken<'s>,
    pub info: PathInfo,
}

/// A path that was valid, set aside until its replacement is registered.
struct Aside {
    path: StorePath,
    old: OsString,
    /// Of the replacement.
    nar_hash: Sha256Digest,
}

impl LocalStore {
    /// Takes an output that lies somewhere on the store's file system, its metadata canonical.
    pub fn take<'s>(
        &'s self,
        from: Target<'_>,
        how: &Take<'_>,
        announce: Announce<'_>,
    ) -> Result<Taken<'s>, StoreError> {
        if how.way == Way::Copy || !how.rewrites.is_empty() {
            return self.take_copy(from, how, announce);
        }
        let mut incoming = self.temporary()?;
        announce(&self.layout().real_store.join(&incoming.entry))?;
        let dir = self.store_fd()?;
        move_here(from, dir, &incoming.entry).map_err(|e| {
            FileError::new("renaming to", self.layout().real_store.join(&incoming.entry), io::Error::from(e))
        })?;
        let (mut hasher, mut scanner) = (NarHasher::new(), Scanner::new(how.candidates.iter().copied()));
        let mut also = how.also.map(Hasher::new);
        self.dump_entry(Target { dir, name: &incoming.entry, dir_path: &self.layout().real_store }, |bytes| {
            hasher.update(bytes);
            scanner.push(bytes);
            if let Some(also) = &mut also {
                also.update(bytes);
            }
            Ok(())
        })?;
        (incoming.nar_hash, incoming.nar_size_bytes) = hasher.finish();
        incoming.found = scanner.finish();
        Ok(Taken { incoming, also: also.map(Hasher::finish) })
    }

    fn take_copy<'s>(
        &'s self,
        from: Target<'_>,
        how: &Take<'_>,
        announce: Announce<'_>,
    ) -> Result<Taken<'s>, StoreError> {
        let mut intake = self.receive(Some(how.candidates.clone()))?;
        announce(&self.layout().real_store.join(intake.entry()))?;
        let mut rewriter = Rewriter::new(how.rewrites.iter().copied());
        let mut also = how.also.map(Hasher::new);
        let mut take = |bytes: &[u8]| {
            if let Some(also) = &mut also {
                also.update(bytes);
            }
            intake.push(&mut &*bytes)
        };
        let mut rewritten = Vec::new();
        self.dump_entry(from, |bytes| {
            if rewriter.is_identity() {
                return take(bytes);
            }
            rewritten.clear();
            rewriter.push(bytes, &mut rewritten);
            take(&rewritten)
        })?;
        rewritten.clear();
        rewriter.finish(&mut rewritten);
        take(&rewritten)?;
        Ok(Taken { incoming: intake.finish()?, also: also.map(Hasher::finish) })
    }

    /// Gives the archive of an entry of some directory, in pieces.
    fn dump_entry(
        &self,
        from: Target<'_>,
        mut sink: impl FnMut(&[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let options = DumpOptions { case_hack: self.options().use_case_hack, below: Some(from.dir_path) };
        dump::dump(from.dir, from.name, &options, |bytes| {
            self.check_interrupt()?;
            sink(bytes)
        })
        .map_err(stream_error)?;
        Ok(())
    }

    /// The hash of the contents of a taken output; `None` if it is no regular file, or one that
    /// may be executed.
    pub fn flat_hash(&self, taken: &Taken<'_>, algorithm: Algorithm) -> Result<Option<Hash>, StoreError> {
        let dir = self.store_fd()?;
        let path = self.layout().real_store.join(taken.entry());
        let failed = |doing, e: Errno| FileError::new(doing, &path, io::Error::from(e));
        let status = rustix::fs::statat(dir, taken.entry(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|e| failed("getting status of", e))?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile || status.st_mode & 0o100 != 0 {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = rustix::fs::openat(dir, taken.entry(), flags, Mode::empty()).map_err(|e| failed("opening file", e))?;
        let mut hasher = Hasher::new(algorithm);
        crate::ingest::copy(&mut std::fs::File::from(fd), &mut |bytes| {
            hasher.update(bytes);
            Ok(())
        })?;
        Ok(Some(hasher.finish()))
    }

    /// Makes a taken output anew with hash parts replaced.
    pub fn retake<'s>(
        &'s self,
        taken: &Taken<'s>,
        how: &Take<'_>,
        announce: Announce<'_>,
    ) -> Result<Taken<'s>, StoreError> {
        let dir = self.store_fd()?;
        self.take_copy(Target { dir, name: taken.entry(), dir_path: &self.layout().real_store }, how, announce)
    }

    /// The hash of the archive of a taken output with hash parts replaced, modulo its own hash part.
    pub fn hash_modulo_self(
        &self,
        taken: &Taken<'_>,
        rewrites: &[(HashPart, HashPart)],
        algorithm: Algorithm,
        own: HashPart,
    ) -> Result<ModuloSelf, StoreError> {
        let mut rewriter = Rewriter::new(rewrites.iter().copied());
        let mut hasher = ModuloSelfHasher::new(algorithm, own);
        let mut rewritten = Vec::new();
        let target = Target { dir: self.store_fd()?, name: taken.entry(), dir_path: &self.layout().real_store };
        self.dump_entry(target, |bytes| {
            rewritten.clear();
            rewriter.push(bytes, &mut rewritten);
            hasher.push(&rewritten);
            Ok(())
        })?;
        rewritten.clear();
        rewriter.finish(&mut rewritten);
        hasher.push(&rewritten);
        Ok(hasher.finish())
    }

    /// Registers all outputs of a build with what they realise, or none, durably.
    ///
    /// An output that is valid already is replaced, and its record says so.
    pub fn register_outputs(
        &self,
        outputs: Vec<Output<'_>>,
        realised: &[Realisation],
        announce: Announce<'_>,
    ) -> Result<(), StoreError> {
        let mut placed: Vec<StorePath> = Vec::new();
        let mut aside: Vec<Aside> = Vec::new();
        let done = self.place_and_register(outputs, realised, announce, &mut placed, &mut aside);
        if done.is_err() {
            self.take_back(&placed, aside);
        } else {
            for Aside { old, .. } in &aside {
                self.discard(old);
            }
        }
        done
    }

    /// Undoes what [`LocalStore::place_and_register`] did before it failed, but for what is in the ledger
    /// all the same. If nobody can tell, everything is left to collectors.
    fn take_back(&self, placed: &[StorePath], aside: Vec<Aside>) {
        if self.ledger().and_then(|ledger| Ok(ledger.settle()?)).is_err() {
            return;
        }
        let Ok(dir) = self.store_fd() else { return };
        for path in placed.iter().filter(|path| !aside.iter().any(|aside| aside.path == **path)) {
            if matches!(self.is_valid(path), Ok(false)) {
                self.discard(OsStr::new(&path.to_string()));
            }
        }
        for Aside { path, old, nar_hash } in aside {
            if self.info(&path).is_ok_and(|info| info.nar_hash == nar_hash) {
                self.discard(&old);
            } else {
                let name = OsString::from(path.to_string());
                self.discard(&name);
                let _ = rustix::fs::renameat(dir, &old, dir, &name);
            }
        }
    }

    fn place_and_register(
        &self,
        outputs: Vec<Output<'_>>,
        realised: &[Realisation],
        announce: Announce<'_>,
        placed: &mut Vec<StorePath>,
        aside: &mut Vec<Aside>,
    ) -> Result<(), StoreError> {
        let dir = self.store_fd()?;
        let now = now_s();
        let mut batch = Batch::new();
        let mut large = false;
        for Output { mut taken, mut info } in outputs {
            let derived = if info.path.is_derivation() {
                self.check_derivation(&info.path, &taken.incoming.entry)?
            } else {
                BTreeMap::new()
            };
            if self.options().sync && info.nar_size_bytes < SYNC_EACH_BELOW {
                larder_fs::sync::sync_tree(dir, &taken.incoming.entry, &self.layout().real_store)?;
            }
            large |= info.nar_size_bytes >= SYNC_EACH_BELOW;
            let name = OsString::from(info.path.to_string());
            let real = self.layout().real_store.join(&name);
            let replaced = if self.is_valid(&info.path)? {
                let old = old_name(&info.path);
                announce(&self.layout().real_store.join(&old))?;
                replace(dir, &taken.incoming.entry, &name, &old)
            } else {
                self.remove_entry(&name)?;
                rustix::fs::renameat(dir, &taken.incoming.entry, dir, &name).map(|()| None)
            };
            let old = replaced.map_err(|e| FileError::new("renaming to", &real, io::Error::from(e)))?;
            aside.extend(old.map(|old| Aside { path: info.path.clone(), old, nar_hash: info.nar_hash }));
            taken.incoming.kept = true;
            placed.push(info.path.clone());
            if self.options().auto_optimise_store {
                self.optimise_path(&info.path);
            }
            info.registration_time_s = now;
            batch.push_info(&info, &derived)?;
        }
        if self.options().sync {
            let synced = if large { rustix::fs::syncfs(dir) } else { larder_fs::sync::sync_dir(dir) };
            synced.map_err(|e| FileError::new("syncing", &self.layout().real_store, io::Error::from(e)))?;
        }
        if realised.is_empty() {
            return self.ledger()?.register(batch).map_err(|error| StoreError::from(error).in_dir(self.dir()));
        }
        let known = self.realisations(realised.iter().map(|realisation| &realisation.id))?;
        let mut united = Vec::with_capacity(realised.len());
        for realisation in realised {
            united.push(self.unite(known.get(&realisation.id), realisation)?);
        }
        let written = self.ledger()?.write(|txn| {
            if !batch.is_empty() {
                txn.register(batch)?;
            }
            for realisation in &united {
                txn.set_realisation(&realisation.id.to_string(), realisation.to_json().as_bytes())?;
            }
            Ok::<_, StoreError>(())
        });
        written.map_err(|error| error.in_dir(self.dir()))
    }

    /// Registers an object whose path follows from its contents, unless it is valid by now.
    ///
    /// Takes the lock of that path itself.
    pub fn register_content<'s>(&'s self, output: Output<'s>) -> Result<(), StoreError> {
        let mut arrivals = self.arrivals();
        arrivals.seal(output.taken.incoming, output.info)?;
        arrivals.commit()
    }

    /// Keeps a taken output under another name of the store directory (`P.check`), replacing what
    /// is there.
    pub fn keep_as(&self, mut taken: Taken<'_>, name: &OsStr) -> Result<PathBuf, StoreError> {
        let dir = self.store_fd()?;
        let real = self.layout().real_store.join(name);
        let target = Target { dir, name, dir_path: &self.layout().real_store };
        remove::remove(target, OnFailure::Stop).map_err(FileError::from)?;
        rustix::fs::renameat(dir, &taken.incoming.entry, dir, name)
            .map_err(|e| FileError::new("renaming to", &real, io::Error::from(e)))?;
        taken.incoming.kept = true;
        Ok(real)
    }

    /// Says of valid paths that they were built here.
    pub fn mark_ultimate(&self, paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
        self.ledger()?.write(|txn| {
            let mut batch = Batch::new();
            for path in paths {
                if let Some(mut info) = txn.info(path)?
                    && !info.ultimate
                {
                    info.ultimate = true;
                    let outputs = BTreeMap::new();
                    batch.push_info(&info, &outputs)?;
                }
            }
            if batch.is_empty() { Ok(()) } else { Ok::<(), StoreError>(txn.register(batch)?) }
        })
    }

    /// Are the contents of a valid path what the ledger says? Missing ones are not.
    pub fn contents_are_good(&self, info: &PathInfo) -> Result<bool, StoreError> {
        let mut hasher = NarHasher::new();
        let dumped = self.dump_object(&info.path, |bytes| {
            hasher.update(bytes);
            Ok(())
        });
        match dumped {
            Ok(_) => Ok(hasher.finish().0 == info.nar_hash),
            Err(StoreError::Dump(_)) => Ok(false),
            Err(other) => Err(other),
        }
    }

    /// Deletes an entry of the store directory that is not valid, whatever it is; but for what
    /// real Nix has registered, which is an error.
    ///
    /// The caller holds the lock that goes with it.
    pub fn remove_entry(&self, name: &OsStr) -> Result<(), StoreError> {
        if !self.has_entry(name)? {
            return Ok(());
        }
        if let Ok(path) = StorePath::from_base_name(name.as_bytes())
            && self.belongs_to_real_nix(&path)?
        {
            return Err(StoreError::BelongsToRealNix { path: self.dir().full(&path) });
        }
        let target = Target { dir: self.store_fd()?, name, dir_path: &self.layout().real_store };
        remove::remove(target, OnFailure::Stop).map_err(FileError::from)?;
        Ok(())
    }

    /// Is there anything of this name in the store directory?
    pub fn has_entry(&self, name: &OsStr) -> Result<bool, StoreError> {
        match rustix::fs::statat(self.object_dir()?, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => {
                let path = self.layout().real_store.join(name);
                Err(FileError::new("getting status of", path, io::Error::from(e)).into())
            }
        }
    }

    /// The real store directory, to work below.
    pub fn directory(&self) -> Result<BorrowedFd<'_>, StoreError> {
        self.store_fd()
    }

    /// When building a path failed, if that is remembered (`build-cache-failure`).
    pub fn failed_before(&self, path: &StorePath) -> Result<bool, StoreError> {
        self.read(|txn| Ok(txn.failed(path)?.is_some()))
    }

    /// Remembers that building some paths failed.
    pub fn remember_failed<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> Result<(), StoreError> {
        let now = now_s();
        self.ledger()?.write(|txn| {
            for path in paths {
                txn.set_failed(path, now)?;
            }
            Ok(())
        })
    }
}

/// Is this the error of an output that the builder has not made?
pub fn is_missing(error: &CanonError) -> bool {
    matches!(error, CanonError::File(error) if error.kind() == io::ErrorKind::NotFound)
}

/// What a path that is replaced is called meanwhile. Collectors delete it, should we not.
fn old_name(path: &StorePath) -> OsString {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    OsString::from(format!("{path}.old-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)))
}

/// Puts a new object in the place of one that is valid; gives the name that the old one has then, if
/// there was one. There is no moment at which neither is there, where the file system can exchange
/// two names; elsewhere it lies between two renames.
fn replace(dir: BorrowedFd<'_>, new: &OsStr, name: &OsStr, old: &OsStr) -> rustix::io::Result<Option<OsString>> {
    match rustix::fs::renameat_with(dir, new, dir, name, RenameFlags::EXCHANGE) {
        Ok(()) => return Ok(Some(new.to_owned())),
        Err(Errno::NOENT) => return rustix::fs::renameat(dir, new, dir, name).map(|()| None),
        Err(Errno::INVAL | Errno::NOSYS) => {}
        Err(e) => return Err(e),
    }
    rustix::fs::renameat(dir, name, dir, old)?;
    rustix::fs::renameat(dir, new, dir, name).map(|()| Some(old.to_owned())).inspect_err(|_| {
        let _ = rustix::fs::renameat(dir, old, dir, name);
    })
}

/// Renames a canonical object to a name in another directory.
///
/// A directory must be writable for that (its `..` changes) unless we are root.
fn move_here(from: Target<'_>, dir: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<()> {
    match rustix::fs::renameat(from.dir, from.name, dir, name) {
        Err(Errno::ACCESS) => {}
        other => return other,
    }
    let status = rustix::fs::statat(from.dir, from.name, AtFlags::SYMLINK_NOFOLLOW)?;
    if FileType::from_raw_mode(status.st_mode) != FileType::Directory || status.st_mode & 0o200 != 0 {
        return Err(Errno::ACCESS);
    }
    rustix::fs::chmodat(from.dir, from.name, Mode::RWXU, AtFlags::empty())?;
    rustix::fs::renameat(from.dir, from.name, dir, name)?;
    rustix::fs::chmodat(dir, name, Mode::from_raw_mode(status.st_mode & 0o555), AtFlags::empty())?;
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: larder_fs::canon::MTIME_S, tv_nsec: 0 },
    };
    rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}
