//! A [`Graph`] of records that were told, by whoever keeps a store whose ledger is not ours to read.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;

use super::{Graph, Lists};
use crate::batch::NONE;
use crate::error::DbError;
use crate::key_index::KeyIndex;

impl Graph {
    /// The paths of these records, in any order, and what binds them to each other.
    ///
    /// Nobody has promised that they fit together: references and derivers that are not among them
    /// are left out, and so is a second path of a hash part. `outputs` has those of derivations, as
    /// far as the graph is to know them.
    pub fn of_records<'a>(
        records: impl IntoIterator<Item = &'a PathInfo>,
        outputs: &BTreeMap<StorePath, BTreeSet<StorePath>>,
    ) -> Result<Self, DbError> {
        let mut records: Vec<&PathInfo> = records.into_iter().collect();
        records.sort_by_key(|info| info.path.hash_part());
        records.dedup_by_key(|info| info.path.hash_part());
        let mut graph = Self::default();
        for info in &records {
            graph.push_name((&info.path).into(), info.nar_size_bytes)?;
        }
        graph.index = KeyIndex::new(&graph.keys);
        graph.references = graph.lists(records.iter().map(|info| info.references.iter()))?;
        graph.outputs = graph.lists(records.iter().map(|info| outputs.get(&info.path).into_iter().flatten()))?;
        let deriver = |info: &&PathInfo| info.deriver.as_ref().and_then(|path| graph.node(path));
        graph.derivers = records.iter().map(|info| deriver(info).map_or(NONE, |node| node.0)).collect();
        Ok(graph)
    }

    /// The nodes of some lists of paths, one list for each node.
    fn lists<'a>(&self, each: impl Iterator<Item = impl Iterator<Item = &'a StorePath>>) -> Result<Lists, DbError> {
        let mut lists = Lists::with_capacity(self.len());
        for paths in each {
            let mut nodes: Vec<u32> = paths.filter_map(|path| self.node(path)).map(|node| node.0).collect();
            nodes.sort_unstable();
            lists.nodes.append(&mut nodes);
            lists.end_list()?;
        }
        Ok(lists)
    }
}
