//! Collecting garbage: what nothing keeps goes, all of it or as much as is wanted.
//!
//! Entries that are not valid go first, then valid paths, referrers before what they refer to; in
//! random order otherwise, so that runs with a limit treat all alike. Whoever needs a path while
//! this runs says so and keeps it, with all that it keeps. Source: gc, sections 3 and 4.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::hash::{BuildHasher as _, RandomState};
use std::os::unix::ffi::OsStrExt as _;

use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_gc::live;
use larder_gc::roots::StaleLinks;
use larder_store_db::graph::NodeSet;
use larder_store_db::{DbError, Node};

use crate::broom::{BATCH, Broom};
use crate::error::StoreError;
use crate::local::LocalStore;
use crate::survey::{Entry, Survey, entry_kind};

#[derive(Debug, Clone, Copy, Default)]
pub struct CollectOptions {
    /// Stop once more than so many bytes are free; `None` to delete everything.
    pub max_freed_bytes: Option<u64>,
}

/// What is gone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Freed {
    /// Entries of the store directory.
    pub paths: u64,
    /// Their names.
    pub names: Vec<OsString>,
    /// Sizes of files whose last name in the store is gone.
    pub bytes: u64,
}

/// How much may still go.
struct Budget {
    limit: Option<u64>,
    freed: u64,
}

impl Budget {
    fn is_spent(&self) -> bool {
        self.limit.is_some_and(|limit| self.freed > limit)
    }

    fn left(&self) -> u64 {
        self.limit.map_or(u64::MAX, |limit| limit.saturating_sub(self.freed))
    }

    /// Takes apart what was swept; waits for it only where that matters.
    fn discard(&mut self, broom: &mut Broom<'_>, trash: Vec<OsString>) {
        if self.limit.is_some() {
            self.freed += broom.discard_now(trash) + broom.take_freed_in_place();
        } else {
            broom.discard(trash);
        }
    }
}

impl LocalStore {
    /// Deletes what no root keeps. `freed` counts what is gone, also when there is an error.
    ///
    /// Errors: roots may be hidden from us; real Nix knows of paths that we do not; the ledger cannot
    /// be written; or something could not be deleted ([`StoreError::Undeletable`], after all else).
    pub fn collect(&self, options: CollectOptions, freed: &mut Freed) -> Result<(), StoreError> {
        self.with_broom(freed, |broom| {
            let say = |text: std::fmt::Arguments<'_>| self.reporter().message(Level::Info, text);
            say(format_args!("finding garbage collector roots..."));
            let mut survey = self.survey_with(StaleLinks::Remove)?;
            if let Some(hidden) = survey.unreadable.pop() {
                return Err(StoreError::HiddenRoots(hidden));
            }
            {
                let mut claims = broom.desk.claims();
                for hash_part in &survey.temporary {
                    claims.claim(*hash_part);
                }
            }
            if options.max_freed_bytes == Some(0) {
                return Ok(());
            }
            if let Some(file) = &self.options().gc_sync_file {
                let _ = std::fs::read(file);
            }
            say(format_args!("deleting garbage..."));
            broom.discard(std::mem::take(&mut survey.trash));
            let mut budget = Budget { limit: options.max_freed_bytes, freed: 0 };
            let seed = RandomState::new().hash_one(std::process::id());
            self.sweep_invalid(broom, &mut survey, seed, &mut budget)?;
            if !budget.is_spent() {
                self.sweep_dead(broom, &survey, seed, &mut budget)?;
            }
            self.forget_realisations()?;
            if let Some(limit) = budget.limit.filter(|_| budget.is_spent()) {
                say(format_args!("deleted more than {limit} bytes; stopping"));
            }
            Ok(())
        })
    }

    fn sweep_invalid(
        &self,
        broom: &mut Broom<'_>,
        survey: &mut Survey,
        seed: u64,
        budget: &mut Budget,
    ) -> Result<(), StoreError> {
        let mut names = std::mem::take(&mut survey.invalid);
        live::shuffle(&mut names, seed);
        // How large they are is known only when they are gone.
        for some in names.chunks(if budget.limit.is_some() { 1 } else { BATCH }) {
            self.check_interrupt()?;
            let mut free: Vec<OsString> = {
                let mut claims = broom.desk.claims();
                let mut begin = |name: &OsStr| match entry_kind(&survey.graph, name) {
                    Entry::Invalid(hash_part) => claims.begin([hash_part]),
                    _ => true,
                };
                some.iter().filter(|name| begin(name)).cloned().collect()
            };
            self.keep_valid(&mut free)?;
            let trash = broom.sweep(&BTreeSet::new(), &free)?;
            budget.discard(broom, trash);
            if budget.is_spent() {
                break;
            }
        }
        Ok(())
    }

    /// Takes out what has become valid since the survey: registered by somebody who has asked nobody.
    fn keep_valid(&self, names: &mut Vec<OsString>) -> Result<(), StoreError> {
        let path = |name: &OsString| StorePath::from_base_name(name.as_bytes()).ok();
        let valid = self.valid_subset(&names.iter().filter_map(path).collect())?;
        if !valid.is_empty() {
            names.retain(|name| path(name).is_none_or(|path| !valid.contains(&path)));
        }
        Ok(())
    }

    fn sweep_dead(
        &self,
        broom: &mut Broom<'_>,
        survey: &Survey,
        seed: u64,
        budget: &mut Budget,
    ) -> Result<(), StoreError> {
        let graph = &survey.graph;
        // Of a small ledger all pages are soon written, however many paths go.
        let most = if graph.len() <= 8 * BATCH { 4 * BATCH } else { BATCH };
        let mut dead = survey.dead();
        let units = live::units(graph, &dead, survey.rules, seed);
        let mut units = units.iter().peekable();
        while !budget.is_spent() {
            self.check_interrupt()?;
            let mut batch: Vec<&[Node]> = Vec::new();
            {
                let mut claims = broom.desk.claims();
                for hash_part in claims.take_new() {
                    if let Some(node) = graph.by_hash_part(hash_part) {
                        keep(survey, &mut dead, node);
                    }
                }
                let (mut count, mut bytes) = (0, 0u64);
                while let Some(unit) = units.peek() {
                    // The members of a unit keep each other.
                    if unit.first().is_none_or(|node| !dead.contains(*node)) {
                        units.next();
                        continue;
                    }
                    bytes = unit.iter().fold(bytes, |sum, node| sum.saturating_add(size_bytes(graph, *node)));
                    count += unit.len();
                    // Of what frees no more than the limit, more can go at once.
                    if !batch.is_empty() && (count > most || budget.limit.is_some() && bytes > budget.left()) {
                        break;
                    }
                    if claims.begin(unit.iter().map(|node| graph.hash_part(*node))) {
                        batch.push(unit);
                    }
                    units.next();
                }
            }
            if batch.is_empty() {
                break;
            }
            let trash = sweep_units(broom, survey, &mut dead, &batch)?;
            budget.discard(broom, trash);
        }
        Ok(())
    }
}

/// Sweeps some units that are pending; gives what was moved aside.
fn sweep_units(
    broom: &mut Broom<'_>,
    survey: &Survey,
    dead: &mut NodeSet,
    batch: &[&[Node]],
) -> Result<Vec<OsString>, StoreError> {
    let graph = &survey.graph;
    let entries = |units: &[&[Node]]| -> Vec<OsString> {
        units.concat().iter().map(|node| OsString::from(graph.base_name(*node))).collect()
    };
    let paths = |units: &[&[Node]]| units.concat().iter().map(|node| graph.path(*node)).collect();
    match broom.sweep(&paths(batch), &entries(batch)) {
        // Somebody has registered a referrer without asking for a root first (`--load-db`).
        Err(StoreError::Db(DbError::InUse { .. })) => {}
        other => return other,
    }
    let mut trash = Vec::new();
    for unit in batch {
        let pending = {
            let keys = unit.iter().map(|node| graph.hash_part(*node));
            unit.iter().all(|node| dead.contains(*node)) && broom.desk.claims().begin(keys)
        };
        if !pending {
            continue;
        }
        match broom.sweep(&paths(std::slice::from_ref(unit)), &entries(std::slice::from_ref(unit))) {
            Ok(swept) => trash.extend(swept),
            Err(StoreError::Db(DbError::InUse { .. })) => unit.iter().for_each(|node| keep(survey, dead, *node)),
            Err(error) => return Err(error),
        }
    }
    Ok(trash)
}

/// The most that deleting a path may free; what nobody has recorded may be anything.
fn size_bytes(graph: &larder_store_db::Graph, node: Node) -> u64 {
    match graph.nar_size_bytes(node) {
        0 => u64::MAX,
        size => size,
    }
}

/// Somebody needs a path that was dead, so all that it keeps stays.
fn keep(survey: &Survey, dead: &mut NodeSet, node: Node) {
    if !dead.contains(node) {
        return;
    }
    for node in live::live(&survey.graph, [node], survey.rules).iter() {
        dead.remove(node);
    }
}
