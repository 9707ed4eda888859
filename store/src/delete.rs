//! Deletion of paths that nothing needs.
//!
//! Whoever deletes holds the collector's lock, so that nobody can become dependent on a path
//! between the decision and the deletion: who adds a temporary root meanwhile waits. Paths are
//! invalidated, then moved aside under the lock; trees are taken apart after it is released. What
//! a killed run leaves aside, the next one finishes. Source: gc, section 3.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use larder_core::hash_part::HashPart;
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_fs::entry::Target;
use larder_fs::file_error::FileError;
use larder_fs::gc_lock::GcLock;
use larder_fs::lock_file::{Sharing, Wait};
use larder_fs::remove::{OnFailure, remove_parallel};
use larder_gc::roots::{self, Found, Root, RootKind, StaleLinks};
use larder_store_db::graph::closure_of;
use larder_store_db::{ReadTxn, Walk};
use rustix::io::Errno;

use crate::error::StoreError;
use crate::local::LocalStore;

/// What has been moved aside is called this and a number; no store path is.
const TRASH: &str = ".larder-trash-";

#[derive(Debug, Clone, Copy, Default)]
pub struct DeleteOptions {
    /// Do not ask whether roots need the paths.
    pub ignore_liveness: bool,
}

/// What is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    /// Entries of the store directory.
    pub paths: u64,
    pub bytes: u64,
}

/// What keeps paths alive.
#[derive(Default)]
struct Kept {
    roots: HashSet<StorePath>,
    /// Whatever has one of these hash parts.
    hash_parts: HashSet<HashPart>,
}

impl LocalStore {
    /// The roots that keep some paths alive, in the order of their links.
    ///
    /// The settings `keep-outputs` and `keep-derivations` count.
    pub fn roots_of(&self, paths: &[StorePath]) -> Result<Vec<Root>, StoreError> {
        let walk =
            Walk { backward: true, outputs: self.options().keep_outputs, derivers: self.options().keep_derivations };
        let needed = self.read(|txn| Ok(Some(closure_of(txn, paths, walk)?)))?;
        let Some(needed) = needed else { return Ok(Vec::new()) };
        let mut roots = self.roots()?.roots;
        roots.retain(|root| needed.node(&root.path).is_some());
        Ok(roots)
    }

    /// All roots whose paths are valid, in the order of their links.
    pub fn all_roots(&self) -> Result<Vec<Root>, StoreError> {
        Ok(self.roots()?.roots)
    }

    /// All roots: links, files, temporary ones, and what running programs use.
    pub(crate) fn roots(&self) -> Result<Found, StoreError> {
        let stale = if self.ledger().is_ok() { StaleLinks::Remove } else { StaleLinks::Keep };
        let mut valid = |path: &StorePath| self.is_valid(path).map_err(Box::new);
        let found = roots::find(self.layout(), stale, &mut valid, self.reporter());
        found.map_err(|error| StoreError::Roots(Box::new(error)))
    }

    /// Deletes some paths, each only if nothing outside of `paths` needs it.
    ///
    /// `freed` counts what is gone, also when there is an error: paths before the one that is
    /// still alive are deleted.
    pub fn delete(&self, paths: &[StorePath], options: DeleteOptions, freed: &mut Freed) -> Result<(), StoreError> {
        self.refuse_unless_adopted()?;
        let say = |text: std::fmt::Arguments<'_>| self.reporter().message(Level::Info, text);
        // Room for the ledger to note what goes, on a disk that may be full.
        let _ = larder_fs::reserve::release(&self.layout().reserved());
        let mut wait = |_: &std::path::Path| say(format_args!("waiting for the big garbage collector lock..."));
        let lock = GcLock::acquire(self.layout(), Sharing::Exclusive, Wait::Yes(&mut wait))?;
        let mut trash = self.old_trash()?;
        let outcome = self.delete_locked(paths, options, freed, &mut trash);
        drop(lock);
        let emptied = self.empty_trash(&trash, freed);
        if matches!(outcome, Ok(()) | Err(StoreError::File(_))) {
            say(format_args!("deleting unused links..."));
            let stats = larder_fs::links::remove_unused(self.layout(), |name| {
                let link = self.layout().links().join(name);
                self.reporter().message(Level::Talkative, format_args!("deleting unused link '{}'", link.display()));
            })?;
            #[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
            let saved_mib = stats.saved_bytes() as f64 / f64::from(1 << 20);
            say(format_args!("note: currently hard linking saves {saved_mib:.2} MiB"));
        }
        outcome.and(emptied)
    }

    fn delete_locked(
        &self,
        paths: &[StorePath],
        options: DeleteOptions,
        freed: &mut Freed,
        trash: &mut Vec<OsString>,
    ) -> Result<(), StoreError> {
        self.reporter().message(Level::Info, format_args!("finding garbage collector roots..."));
        let found = if options.ignore_liveness {
            roots::temporary(self.layout(), StaleLinks::Remove, self.reporter())?
        } else {
            self.roots()?
        };
        // The locks keep owners of old-style temporary roots out until all is decided and done.
        let Found { roots, unreadable, legacy_locks: _held } = found;
        if let Some(hidden) = unreadable.into_iter().next() {
            return Err(StoreError::HiddenRoots(hidden));
        }
        let mut kept = Kept::default();
        for root in roots {
            if root.kind == RootKind::Temporary {
                kept.hash_parts.insert(root.path.hash_part());
            } else {
                kept.roots.insert(root.path);
            }
        }
        let listed: BTreeSet<&StorePath> = paths.iter().collect();
        let mut deleted = HashSet::new();
        for path in paths {
            if deleted.contains(path) {
                continue;
            }
            let dead = self.read(|txn| self.dead_with(txn, path, &listed, &kept, options))?;
            let Some(dead) = dead else { return Err(StoreError::StillAlive { path: self.dir().full(path) }) };
            let order = self.order(&dead)?;
            self.ledger()?
                .write(|txn| Ok::<_, StoreError>(txn.invalidate(&dead)?))
                .map_err(|error| error.in_dir(self.dir()))?;
            for path in order.into_iter().rev() {
                self.reporter().message(Level::Info, format_args!("deleting '{}'", self.dir().display(&path)));
                self.move_aside(OsStr::new(&path.to_string()), trash)?;
                freed.paths += 1;
                deleted.insert(path);
            }
        }
        Ok(())
    }

    /// What must go with `path`, itself included; `None` if something keeps it alive. Only listed
    /// paths may go.
    fn dead_with(
        &self,
        txn: &ReadTxn,
        path: &StorePath,
        listed: &BTreeSet<&StorePath>,
        kept: &Kept,
        options: DeleteOptions,
    ) -> Result<Option<BTreeSet<StorePath>>, StoreError> {
        let keep_outputs = self.options().keep_outputs && !options.ignore_liveness;
        let keep_derivations = self.options().keep_derivations && !options.ignore_liveness;
        let mut visited = BTreeSet::from([path.clone()]);
        let mut left = vec![path.clone()];
        while let Some(path) = left.pop() {
            if kept.roots.contains(&path) || kept.hash_parts.contains(&path.hash_part()) || !listed.contains(&path) {
                return Ok(None);
            }
            let mut needing = txn.referrers(&path)?.unwrap_or_default();
            if keep_outputs {
                needing.extend(txn.valid_derivers(&path)?);
            }
            if keep_derivations && path.is_derivation() {
                for output in txn.derivation_outputs(&path)?.into_values() {
                    if txn.info(&output)?.is_some_and(|info| info.deriver.as_ref() == Some(&path)) {
                        needing.push(output);
                    }
                }
            }
            for path in needing {
                if visited.insert(path.clone()) {
                    left.push(path);
                }
            }
        }
        Ok(Some(visited))
    }

    /// Gives an entry of the store directory a name that is no store path's.
    fn move_aside(&self, entry: &OsStr, trash: &mut Vec<OsString>) -> Result<(), StoreError> {
        let dir = self.store_fd()?;
        let mut number = trash.len();
        loop {
            let name = OsString::from(format!("{TRASH}{}-{number}", std::process::id()));
            match rustix::fs::renameat_with(dir, entry, dir, &name, rustix::fs::RenameFlags::NOREPLACE) {
                Ok(()) => {
                    trash.push(name);
                    return Ok(());
                }
                // It never had files, or somebody was faster.
                Err(Errno::NOENT) => return Ok(()),
                Err(Errno::EXIST) => number += 1,
                // An immutable directory cannot be moved: then it is taken apart where it is.
                Err(Errno::PERM | Errno::ACCESS | Errno::INVAL) => {
                    trash.push(entry.to_owned());
                    return Ok(());
                }
                Err(error) => {
                    let path = self.layout().real_store.join(entry);
                    return Err(FileError::new("moving aside", path, error).into());
                }
            }
        }
    }

    /// What killed runs have left.
    fn old_trash(&self) -> Result<Vec<OsString>, StoreError> {
        let entries = self.entries()?;
        Ok(entries.into_iter().filter(|name| name.as_bytes().starts_with(TRASH.as_bytes())).collect())
    }

    /// Deletes what was moved aside; tells of what cannot be deleted, and gives the first fault.
    fn empty_trash(&self, trash: &[OsString], freed: &mut Freed) -> Result<(), StoreError> {
        let dir = self.store_fd()?;
        let mut outcome = Ok(());
        for name in trash {
            let target = Target { dir, name, dir_path: &self.layout().real_store };
            match remove_parallel(target, OnFailure::Continue) {
                Ok(removed) => {
                    freed.bytes += removed.bytes_freed;
                    for failure in removed.failures {
                        if outcome.is_ok() {
                            outcome = Err(failure.into());
                        } else {
                            let text = crate::error::chain(&failure);
                            self.reporter().message(Level::Error, format_args!("{text}"));
                        }
                    }
                }
                Err(error) => outcome = outcome.and(Err(FileError::from(error).into())),
            }
        }
        outcome
    }
}
