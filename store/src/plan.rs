//! What a collection would do, before it does: which paths go and how many bytes that frees.

use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;

use larder_core::report::Reporter;
use larder_core::store_path::StorePath;
use larder_fs::census::Census;
use larder_fs::entry::Target;
use larder_fs::file_error::FileError;
use larder_fs::layout::Layout;
use larder_fs::remove::LinkCounts;
use larder_gc::live;
use larder_gc::roots::Root;
use larder_gc::why::{self, Chain};
use larder_store_db::graph::NodeSet;
use rayon::prelude::*;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

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
        let mut plan = self.measure(survey.entries(&survey.dead()))?;
        // Trash is no entry of its own any more, but takes space.
        let trash = self.measure(survey.trash.iter().map(|name| (name.clone(), false)).collect())?;
        plan.freed_bytes += trash.freed_bytes;
        Ok(plan)
    }

    /// What deleting some entries of the store directory, valid ones or not, would free.
    pub fn measure(&self, entries: Vec<(OsString, bool)>) -> Result<Plan, StoreError> {
        if entries.is_empty() {
            return Ok(Plan::default());
        }
        measure(entries, self.object_dir()?, self.layout(), self.reporter(), |_| false)
    }
}

/// The same in a store that another process keeps, where its files lie on this machine. Directories that
/// are closed to us count as nothing.
pub fn measure_there(
    entries: Vec<(OsString, bool)>,
    layout: &Layout,
    reporter: &dyn Reporter,
) -> Result<Plan, StoreError> {
    let failed = |error: Errno| FileError::new("opening directory", &layout.real_store, error);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&layout.real_store, flags, Mode::empty()).map_err(failed)?;
    // What a failed build has left may be closed to whoever asks.
    let is_closed = |error: &FileError| error.kind() == ErrorKind::PermissionDenied;
    measure(entries, dir.as_fd(), layout, reporter, is_closed)
}

fn measure(
    mut entries: Vec<(OsString, bool)>,
    dir: BorrowedFd<'_>,
    layout: &Layout,
    reporter: &dyn Reporter,
    is_passed_over: impl Fn(&FileError) -> bool + Sync,
) -> Result<Plan, StoreError> {
    entries.sort_unstable();
    let census = Census::new();
    let entries = entries
        .into_par_iter()
        .map(|(name, valid)| {
            if reporter.is_cancelled() {
                return Err(StoreError::Interrupted);
            }
            let target = Target { dir, name: &name, dir_path: &layout.real_store };
            let size_bytes = match census.add(target) {
                Err(error) if is_passed_over(&error) => 0,
                size_bytes => size_bytes?,
            };
            Ok(Planned { name, valid, size_bytes })
        })
        .collect::<Result<Vec<_>, StoreError>>()?;
    let links = LinkCounts::new(layout.links());
    Ok(Plan { entries, freed_bytes: census.freed_bytes(&links) })
}

impl Plan {
    /// What is in this one and not in another, which it has all of.
    #[must_use]
    pub fn without(self, other: &Self) -> Self {
        let entries = self.entries.into_iter().filter(|entry| other.entries.binary_search(entry).is_err()).collect();
        Self { entries, freed_bytes: self.freed_bytes.saturating_sub(other.freed_bytes) }
    }
}

impl Survey {
    /// The entries of the store directory that would go if these paths were dead; are they valid?
    pub fn entries(&self, dead: &NodeSet) -> Vec<(OsString, bool)> {
        let valid = dead.iter().map(|node| (OsString::from(self.graph.base_name(node)), true));
        valid.chain(self.invalid.iter().map(|name| (name.clone(), false))).collect()
    }

    /// All valid paths that nothing would keep if these roots were no roots. Their links stay as they are.
    pub fn dead_without(&self, dropped: &[Root]) -> NodeSet {
        let left: Vec<Root> = self.roots.iter().filter(|root| !dropped.contains(root)).cloned().collect();
        live::complement(&self.graph, &live::live(&self.graph, self.nodes(&left), self.rules))
    }

    /// Why a path is kept: for each root that keeps it, in the order of the roots, the shortest way.
    /// `None` if the path is not valid.
    pub fn why(&self, path: &StorePath) -> Option<Vec<Reason>> {
        let target = self.graph.node(path)?;
        let mut starts = Vec::new();
        for root in &self.roots {
            if let Some(node) = self.nodes(std::slice::from_ref(root)).next() {
                starts.push((root, node));
            }
        }
        let chains = why::chains(&self.graph, target, starts.iter().map(|(_, node)| *node), self.rules);
        let reasons = starts.into_iter().zip(chains);
        Some(reasons.filter_map(|((root, _), chain)| Some(Reason { root: root.clone(), chain: chain? })).collect())
    }
}

impl Planned {
    /// The store path, if the name is one.
    pub fn is_store_path(&self) -> bool {
        StorePath::from_base_name(OsStr::as_bytes(&self.name)).is_ok()
    }
}
