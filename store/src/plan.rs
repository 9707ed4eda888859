//! What a collection would do, before it does: which paths go and how many bytes that frees.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use larder_core::store_path::StorePath;
use larder_fs::census::Census;
use larder_fs::entry::Target;
use larder_fs::remove::LinkCounts;
use larder_gc::live;
use larder_gc::roots::Root;
use larder_gc::why::{self, Chain};
use larder_store_db::graph::NodeSet;
use rayon::prelude::*;

use crate::error::StoreError;
use crate::local::LocalStore;
use crate::survey::Survey;

/// An entry of the store directory that would go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Planned {
    pub name: OsString,
    pub valid: bool,
    /// The sizes of its files, hard links or not.
    pub size_bytes: u64,
}

/// What would go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Ascending by name.
    pub entries: Vec<Planned>,
    /// What that frees: files whose last name goes.
    pub freed_bytes: u64,
}

/// A root and how it keeps a path.
#[derive(Debug, Clone)]
pub struct Reason {
    pub root: Root,
    pub chain: Chain,
}

impl LocalStore {
    /// What [`LocalStore::collect`] without a limit would delete now.
    pub fn plan(&self, survey: &Survey) -> Result<Plan, StoreError> {
        let mut plan = self.measure(survey, &survey.dead(), &survey.invalid)?;
        // Trash is no entry of its own any more, but takes space.
        let trash = self.measure(survey, &NodeSet::new(&survey.graph), &survey.trash)?;
        plan.freed_bytes += trash.freed_bytes;
        Ok(plan)
    }

    /// What would go *more* if these roots were no roots. Their links stay as they are.
    pub fn plan_without(&self, survey: &Survey, dropped: &[Root]) -> Result<Plan, StoreError> {
        let left: Vec<Root> = survey.roots.iter().filter(|root| !dropped.contains(root)).cloned().collect();
        let live = live::live(&survey.graph, survey.nodes(&left), survey.rules);
        let dead = live::complement(&survey.graph, &live);
        let after = self.measure(survey, &dead, &survey.invalid)?;
        let before = self.measure(survey, &survey.dead(), &survey.invalid)?;
        let entries = after.entries.into_iter().filter(|entry| before.entries.binary_search(entry).is_err()).collect();
        Ok(Plan { entries, freed_bytes: after.freed_bytes - before.freed_bytes })
    }

    fn measure(&self, survey: &Survey, dead: &NodeSet, invalid: &[OsString]) -> Result<Plan, StoreError> {
        let valid = dead.iter().map(|node| (OsString::from(survey.graph.base_name(node)), true));
        let mut names: Vec<(OsString, bool)> = valid.chain(invalid.iter().map(|name| (name.clone(), false))).collect();
        if names.is_empty() {
            return Ok(Plan::default());
        }
        names.sort_unstable();
        let census = Census::new();
        let dir = self.object_dir()?;
        let entries = names
            .into_par_iter()
            .map(|(name, valid)| {
                self.check_interrupt()?;
                let target = Target { dir, name: &name, dir_path: &self.layout().real_store };
                let size_bytes = census.add(target)?;
                Ok(Planned { name, valid, size_bytes })
            })
            .collect::<Result<Vec<_>, StoreError>>()?;
        let links = LinkCounts::new(self.layout().links());
        Ok(Plan { entries, freed_bytes: census.freed_bytes(&links) })
    }

    /// Why a path is kept: for each root that keeps it, in the order of the roots, the shortest way.
    ///
    /// Errors: the path is not valid.
    pub fn why(&self, survey: &Survey, path: &StorePath) -> Result<Vec<Reason>, StoreError> {
        let target = survey.graph.node(path).ok_or_else(|| self.not_valid(path))?;
        let mut starts = Vec::new();
        for root in &survey.roots {
            if let Some(node) = survey.nodes(std::slice::from_ref(root)).next() {
                starts.push((root, node));
            }
        }
        let chains = why::chains(&survey.graph, target, starts.iter().map(|(_, node)| *node), survey.rules);
        let reasons = starts.into_iter().zip(chains);
        Ok(reasons.filter_map(|((root, _), chain)| Some(Reason { root: root.clone(), chain: chain? })).collect())
    }
}

impl Planned {
    /// The store path, if the name is one.
    pub fn is_store_path(&self) -> bool {
        StorePath::from_base_name(OsStr::as_bytes(&self.name)).is_ok()
    }
}
