//! Deletion of paths that nothing needs.
//!
//! The broom is the collector's; what is different is the decision: only listed paths may go, each
//! with all that needs it. Source: gc, section 3, rules 6 and 7.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;

use larder_core::hash_part::HashPart;
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_gc::live::Rules;
use larder_gc::roots::{self, Found, Root, RootKind, StaleLinks};
use larder_store_db::ReadTxn;
use larder_store_db::graph::closure_of;

use crate::broom::{Broom, is_trash};
use crate::collect::Freed;
use crate::error::StoreError;
use crate::local::LocalStore;

#[derive(Debug, Clone, Copy, Default)]
pub struct DeleteOptions {
    /// Do not ask whether roots need the paths.
    pub ignore_liveness: bool,
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
        let walk = self.rules().kept_by();
        let needed = self.read(|txn| Ok(Some(closure_of(txn, paths, walk)?)))?;
        let Some(needed) = needed else { return Ok(Vec::new()) };
        let mut roots = self.roots()?.roots;
        roots.retain(|root| needed.node(&root.path).is_some());
        Ok(roots)
    }

    /// All roots: links, files, temporary ones, and what running programs use.
    pub(crate) fn roots(&self) -> Result<Found, StoreError> {
        let stale = if self.ledger().is_ok() { StaleLinks::Remove } else { StaleLinks::Keep };
        self.add_lasting(roots::temporary(self.layout(), stale, self.reporter())?, stale)
    }

    /// To some temporary roots, all others.
    fn add_lasting(&self, mut found: Found, stale: StaleLinks) -> Result<Found, StoreError> {
        // One snapshot answers for all links, and it must be younger than that reading: what became
        // valid before has a temporary root no more.
        let lasting = |valid: &mut dyn FnMut(&StorePath) -> Result<bool, Box<StoreError>>| {
            let lasting = roots::lasting(self.layout(), stale, valid, self.reporter());
            lasting.map_err(|error| StoreError::Roots(Box::new(error)))
        };
        let links = self.read_or(
            || lasting(&mut |_| Ok(false)),
            |txn| Ok(lasting(&mut |path| txn.is_valid(path).map_err(|error| Box::new(error.into())))),
        )??;
        found.add(links);
        Ok(found)
    }

    /// Deletes some paths, each only if nothing outside of `paths` needs it.
    ///
    /// `freed` counts what is gone, also when there is an error: paths before the one that is
    /// still alive are deleted.
    pub fn delete(&self, paths: &[StorePath], options: DeleteOptions, freed: &mut Freed) -> Result<(), StoreError> {
        self.with_broom(freed, |broom| self.delete_listed(broom, paths, options))
    }

    fn delete_listed(
        &self,
        broom: &mut Broom<'_>,
        paths: &[StorePath],
        options: DeleteOptions,
    ) -> Result<(), StoreError> {
        self.reporter().message(Level::Info, format_args!("finding garbage collector roots..."));
        let temporary = roots::temporary(self.layout(), StaleLinks::Remove, self.reporter())?;
        // As in `survey_with`.
        self.ledger()?.settle()?;
        let found = if options.ignore_liveness { temporary } else { self.add_lasting(temporary, StaleLinks::Remove)? };
        // The locks keep owners of old-style temporary roots out until all is decided and done.
        let Found { roots, unreadable, legacy_locks: _held } = found;
        if let Some(hidden) = unreadable.into_iter().next() {
            return Err(StoreError::HiddenRoots(hidden));
        }
        let mut kept = Kept::default();
        for root in roots {
            if root.kind == RootKind::Temporary {
                broom.desk.claims().claim(root.path.hash_part());
                kept.hash_parts.insert(root.path.hash_part());
            } else {
                kept.roots.insert(root.path);
            }
        }
        // What a killed run has moved aside.
        broom.discard(self.entries()?.into_iter().filter(|name| is_trash(name)).collect());
        let rules = if options.ignore_liveness { Rules::REFERENCES } else { self.rules() };
        let listed: BTreeSet<&StorePath> = paths.iter().collect();
        let mut deleted = HashSet::new();
        for path in paths {
            if deleted.contains(path) {
                continue;
            }
            self.check_interrupt()?;
            kept.hash_parts.extend(broom.desk.claims().take_new());
            let alive = || StoreError::StillAlive { path: self.dir().full(path) };
            let dead = self.read(|txn| dead_with(txn, path, &listed, &kept, rules))?.ok_or_else(alive)?;
            let order = self.order(&dead)?;
            if !broom.desk.claims().begin(dead.iter().map(StorePath::hash_part).collect::<Vec<_>>()) {
                // Somebody has asked for it this very moment.
                return Err(alive());
            }
            let entries: Vec<OsString> = order.iter().rev().map(|path| path.to_string().into()).collect();
            let trash = broom.sweep(&dead, &entries).map_err(|error| error.in_dir(self.dir()))?;
            broom.discard(trash);
            deleted.extend(order);
        }
        Ok(())
    }
}

/// What must go with `path`, itself included; `None` if something keeps it alive. Only listed
/// paths may go.
fn dead_with(
    txn: &ReadTxn,
    path: &StorePath,
    listed: &BTreeSet<&StorePath>,
    kept: &Kept,
    rules: Rules,
) -> Result<Option<BTreeSet<StorePath>>, StoreError> {
    let mut visited = BTreeSet::from([path.clone()]);
    let mut left = vec![path.clone()];
    while let Some(path) = left.pop() {
        if kept.roots.contains(&path) || kept.hash_parts.contains(&path.hash_part()) || !listed.contains(&path) {
            return Ok(None);
        }
        let mut needing = txn.referrers(&path)?.unwrap_or_default();
        if rules.keep_outputs {
            needing.extend(txn.valid_derivers(&path)?);
        }
        if rules.keep_derivations && path.is_derivation() {
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
