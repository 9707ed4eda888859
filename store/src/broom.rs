//! The one broom: everything that leaves the store directory on purpose leaves it through here.
//!
//! A [`Broom`] exists while the collector's lock is held and its socket is listened at. In one
//! sweep, paths are published as pending, made invalid in one small transaction, moved aside under
//! names that no store path has, and published as gone. What was moved aside is taken apart by
//! another thread on all cores, also after the lock was released. A killed run leaves invalid entries and
//! trash, which the next run finishes. Source: gc, sections 3 to 6; `docs/gc-protocol.md`.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use crossbeam_channel::{Receiver, Sender};
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_fs::entry::Target;
use larder_fs::file_error::FileError;
use larder_fs::gc_lock::{GcLock, WAITING};
use larder_fs::lock_file::{Sharing, Wait};
use larder_fs::remove::{LinkCounts, OnFailure, remove_counted, remove_directory_counted, remove_small_counted, thaw};
use larder_gc::hand_over::{Desk, listen_during};
use larder_store_db::DbError;
use rayon::prelude::*;
use rustix::fs::RenameFlags;
use rustix::io::Errno;

use crate::collect::Freed;
use crate::error::{StoreError, chain};
use crate::local::LocalStore;

/// What has been moved aside is called this, a process id and a number.
const TRASH: &str = ".larder-trash-";

/// Paths that become invalid in one transaction. Whoever needs one of them waits for that long (some
/// tens of milliseconds); but the keys are random, so that every transaction writes most pages anew.
pub(crate) const BATCH: usize = 2048;

pub(crate) fn is_trash(name: &OsStr) -> bool {
    name.as_bytes().starts_with(TRASH.as_bytes())
}

/// Entries to take apart, and whoever wants to know how many bytes that frees.
struct Bag {
    names: Vec<OsString>,
    emptied: Option<Sender<u64>>,
}

/// What the thread that takes things apart has done.
#[derive(Default)]
struct Emptied {
    bytes: u64,
    failed: u64,
}

pub(crate) struct Broom<'r> {
    store: &'r LocalStore,
    pub(crate) desk: &'r Desk,
    bin: Sender<Bag>,
    counts: &'r LinkCounts,
    /// Entries of the store directory that are gone.
    pub(crate) swept: Vec<OsString>,
    /// Entries that could not even be moved aside.
    stuck: u64,
    /// Bytes of what was not moved aside: files, and what there was no room for.
    freed_in_place: u64,
    /// Those of them that nobody has asked for yet.
    not_told: u64,
    /// Our number as a process, and of what was moved aside last.
    process: u32,
    number: u64,
}

impl LocalStore {
    /// Runs `work` as a collector; then deletes what it has moved aside, and unused links.
    ///
    /// `freed` counts what is gone, also when there is an error.
    pub(crate) fn with_broom(
        &self,
        freed: &mut Freed,
        work: impl FnOnce(&mut Broom<'_>) -> Result<(), StoreError> + Send,
    ) -> Result<(), StoreError> {
        let say = |text: std::fmt::Arguments<'_>| self.reporter().message(Level::Info, text);
        self.refuse_unless_adopted()?;
        // Room for the ledger to note what goes, on a disk that may be full.
        let _ = larder_fs::reserve::release(&self.layout().reserved());
        let mut wait = |_: &Path| say(format_args!("{WAITING}"));
        let lock = GcLock::acquire(self.layout(), Sharing::Exclusive, Wait::Yes(&mut wait))?;
        let counts = LinkCounts::new(self.layout().links());
        let (bin, bags) = crossbeam_channel::unbounded();
        let mut swept = (Vec::new(), 0, 0);
        let (outcome, emptied) = std::thread::scope(|scope| {
            let emptying = scope.spawn(|| self.empty(&bags, &counts));
            let outcome = listen_during(self.layout(), self.reporter(), |desk| {
                // Again, now that real Nix has to tell us what it adds.
                self.refuse_unless_adopted()?;
                let counts = &counts;
                let process = std::process::id();
                let (swept_so_far, stuck, freed_in_place, not_told, number) = (Vec::new(), 0, 0, 0, 0);
                let mut broom = Broom {
                    store: self,
                    desk,
                    bin,
                    counts,
                    swept: swept_so_far,
                    stuck,
                    freed_in_place,
                    not_told,
                    process,
                    number,
                };
                let outcome = work(&mut broom);
                swept = (broom.swept, broom.stuck, broom.freed_in_place);
                outcome
            });
            drop(lock);
            (outcome.unwrap_or_else(|error| Err(error.into())), emptying.join())
        });
        let emptied = emptied.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        freed.paths += swept.0.len() as u64;
        freed.names.extend(swept.0);
        freed.bytes += emptied.bytes + swept.2;
        if matches!(outcome, Ok(()) | Err(StoreError::File(_))) {
            self.clean_links()?;
        }
        outcome?;
        match swept.1 + emptied.failed {
            0 => Ok(()),
            count => Err(StoreError::Undeletable { count }),
        }
    }

    /// Deletes what `.links` has and nobody else.
    fn clean_links(&self) -> Result<(), StoreError> {
        let say = |text: std::fmt::Arguments<'_>| self.reporter().message(Level::Info, text);
        say(format_args!("deleting unused links..."));
        let stats = larder_fs::links::remove_unused(self.layout(), |name| {
            let link = self.layout().links().join(name);
            self.reporter().message(Level::Talkative, format_args!("deleting unused link '{}'", link.display()));
        })?;
        #[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
        let saved_mib = stats.saved_bytes() as f64 / f64::from(1 << 20);
        say(format_args!("note: currently hard linking saves {saved_mib:.2} MiB"));
        Ok(())
    }

    /// Takes apart what comes, on all cores; tells of what cannot be deleted.
    fn empty(&self, bags: &Receiver<Bag>, counts: &LinkCounts) -> Emptied {
        let mut all = Emptied::default();
        let Ok(dir) = self.store_fd() else { return all };
        while let Ok(mut bag) = bags.recv() {
            // What has come meanwhile goes along, so that no core waits for a single large tree.
            while bag.emptied.is_none()
                && bag.names.len() < 4 * BATCH
                && let Ok(more) = bags.try_recv()
            {
                bag.names.extend(more.names);
                bag.emptied = more.emptied;
            }
            let emptied = bag
                .names
                .par_iter()
                .map(|name| {
                    let target = Target { dir, name, dir_path: &self.layout().real_store };
                    let removed = match remove_directory_counted(target, OnFailure::Continue, counts) {
                        Ok(removed) => removed,
                        Err(error) => {
                            self.reporter().message(Level::Error, format_args!("{}", chain(&error)));
                            return Emptied { bytes: error.removed.bytes_freed, failed: 1 };
                        }
                    };
                    for failure in &removed.failures {
                        self.reporter().message(Level::Error, format_args!("{}", chain(failure)));
                    }
                    Emptied { bytes: removed.bytes_freed, failed: removed.failed }
                })
                .reduce(Emptied::default, |a, b| Emptied { bytes: a.bytes + b.bytes, failed: a.failed + b.failed });
            all.bytes += emptied.bytes;
            all.failed += emptied.failed;
            if let Some(waiting) = bag.emptied {
                let _ = waiting.send(emptied.bytes);
            }
        }
        all
    }
}

impl Broom<'_> {
    /// Makes paths invalid and moves entries aside, in this order. The caller has published all of
    /// them as pending and nobody has claimed them; they are pending no more afterwards.
    ///
    /// Gives what was moved aside, for [`Broom::discard`]. Errors: a valid path that is not listed
    /// refers to one of them (then nothing has changed); the ledger cannot be written.
    pub(crate) fn sweep(
        &mut self,
        valid: &BTreeSet<StorePath>,
        entries: &[OsString],
    ) -> Result<Vec<OsString>, StoreError> {
        let outcome = self.sweep_pending(valid, entries);
        self.desk.end();
        outcome
    }

    fn sweep_pending(
        &mut self,
        valid: &BTreeSet<StorePath>,
        entries: &[OsString],
    ) -> Result<Vec<OsString>, StoreError> {
        if !valid.is_empty() {
            match self.forget(valid) {
                // Perhaps for want of room: what has been moved aside so far makes some.
                Err(StoreError::Db(DbError::Storage { .. })) => {
                    self.discard_now(Vec::new());
                    self.forget(valid)?;
                }
                outcome => outcome?,
            }
        }
        let mut trash = Vec::with_capacity(entries.len());
        for entry in entries {
            let path = Path::new(self.store.dir().as_str()).join(entry);
            self.store.reporter().message(Level::Info, format_args!("deleting '{}'", path.display()));
            match self.move_aside(entry) {
                Ok(moved) => {
                    self.swept.push(entry.clone());
                    trash.extend(moved);
                }
                Err(error) => {
                    self.stuck += 1;
                    self.store.reporter().message(Level::Error, format_args!("{}", chain(&error)));
                }
            }
        }
        Ok(trash)
    }

    fn forget(&self, paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
        self.store.ledger()?.write(|txn| Ok::<_, StoreError>(txn.invalidate(paths)?)).map(drop)
    }

    /// Has things taken apart, some time before the run ends.
    pub(crate) fn discard(&self, names: Vec<OsString>) {
        if !names.is_empty() {
            // The other end is there as long as we are.
            let _ = self.bin.send(Bag { names, emptied: None });
        }
    }

    /// Has things taken apart now; gives the bytes that were freed.
    pub(crate) fn discard_now(&self, names: Vec<OsString>) -> u64 {
        let (emptied, waiting) = crossbeam_channel::bounded(1);
        let _ = self.bin.send(Bag { names, emptied: Some(emptied) });
        waiting.recv().unwrap_or(0)
    }

    fn has_freed(&mut self, bytes: u64) {
        self.freed_in_place += bytes;
        self.not_told += bytes;
    }

    /// Bytes that were freed without being moved aside since this was asked last.
    pub(crate) const fn take_freed_in_place(&mut self) -> u64 {
        std::mem::replace(&mut self.not_told, 0)
    }

    /// Gives an entry of the store directory a name that is no store path's; `None` if nothing is left
    /// to take apart.
    fn move_aside(&mut self, entry: &OsStr) -> Result<Option<OsString>, StoreError> {
        let dir = self.store.store_fd()?;
        let target = Target { dir, name: entry, dir_path: &self.store.layout().real_store };
        // A small file goes faster than it gets another name.
        match remove_small_counted(target, self.counts) {
            Ok(Some(removed)) => {
                self.has_freed(removed.bytes_freed);
                return Ok(None);
            }
            Ok(None) => {}
            Err(error) => return Err(FileError::from(error).into()),
        }
        let mut thawed = false;
        loop {
            let name = OsString::from(format!("{TRASH}{}-{}", self.process, self.number));
            self.number += 1;
            match rustix::fs::renameat_with(dir, entry, dir, &name, RenameFlags::NOREPLACE) {
                Ok(()) => return Ok(Some(name)),
                // It never had files, or somebody was faster.
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::EXIST) => {}
                // Not even for a name: then it goes where it is, while those who want it wait.
                Err(Errno::NOSPC | Errno::DQUOT) => {
                    let removed = remove_counted(target, OnFailure::Stop, self.counts).map_err(FileError::from)?;
                    self.has_freed(removed.bytes_freed);
                    return Ok(None);
                }
                // An immutable flag, which old versions of Nix have set.
                Err(Errno::PERM) if !thawed && thaw(target).is_ok() => thawed = true,
                // A file system that does not know the flag of the call. The name is ours.
                Err(Errno::INVAL | Errno::NOSYS) => {
                    return match rustix::fs::renameat(dir, entry, dir, &name) {
                        Ok(()) => Ok(Some(name)),
                        Err(Errno::NOENT) => Ok(None),
                        Err(error) => Err(FileError::new("moving aside", target.dir_path.join(entry), error).into()),
                    };
                }
                Err(error) => return Err(FileError::new("moving aside", target.dir_path.join(entry), error).into()),
            }
        }
    }
}
