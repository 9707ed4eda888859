//! Closures of valid paths, and what is known of their members.

use std::collections::BTreeSet;

use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;
use larder_store_db::graph::{Walk, closure_of};

use crate::error::StoreError;
use crate::local::LocalStore;

impl LocalStore {
    /// All that some valid paths need, themselves included.
    pub fn closure<'a>(
        &self,
        roots: impl IntoIterator<Item = &'a StorePath>,
    ) -> Result<BTreeSet<StorePath>, StoreError> {
        let roots: Vec<StorePath> = roots.into_iter().cloned().collect();
        if roots.is_empty() {
            return Ok(BTreeSet::new());
        }
        self.read_or(BTreeSet::new, |txn| {
            let graph = closure_of(txn, &roots, Walk::REFERENCES)?;
            Ok(graph.nodes().map(|node| graph.path(node)).collect())
        })
    }

    /// The records of some valid paths, in their order.
    pub fn infos<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> Result<Vec<PathInfo>, StoreError> {
        let paths: Vec<StorePath> = paths.into_iter().cloned().collect();
        let found = self.read_or(|| vec![None; paths.len()], |txn| Ok(txn.infos(&paths)?))?;
        found.into_iter().zip(&paths).map(|(info, path)| info.ok_or_else(|| self.not_valid(path))).collect()
    }
}
