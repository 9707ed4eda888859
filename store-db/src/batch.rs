//! Paths to register in one transaction, kept compactly: a million of them fit in memory.

use std::collections::{BTreeMap, HashMap};

use larder_core::content_address::ContentAddress;
use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::signature::Signature;
use larder_core::store_path::StorePath;

use crate::error::DbError;
use crate::graph::topological_order;
use crate::record::{Details, PathRef};

/// Stands for "none" where a number is wanted.
pub(crate) const NONE: u32 = u32::MAX;

/// A path to register, borrowed; [`Batch::push`] copies what it needs.
#[derive(Debug, Clone)]
pub struct NewPath<'a> {
    pub path: PathRef<'a>,
    /// SHA-256 of the NAR.
    pub nar_hash: Sha256Digest,
    pub nar_size_bytes: u64,
    /// In any order; may hold the path itself and paths that come later in the batch.
    pub references: &'a [PathRef<'a>],
    /// Need not be valid.
    pub deriver: Option<PathRef<'a>>,
    /// Seconds since 1970.
    pub registration_time_s: u64,
    /// Built here, so trusted without signatures.
    pub ultimate: bool,
    pub signatures: &'a [Signature],
    pub content_address: Option<ContentAddress>,
    /// Of a derivation: its outputs by name. They need not be valid.
    pub outputs: &'a [(&'a str, PathRef<'a>)],
}

impl<'a> NewPath<'a> {
    /// A path with the given contents and nothing else known.
    pub const fn new(path: PathRef<'a>, nar_hash: Sha256Digest, nar_size_bytes: u64) -> Self {
        Self {
            path,
            nar_hash,
            nar_size_bytes,
            references: &[],
            deriver: None,
            registration_time_s: 0,
            ultimate: false,
            signatures: &[],
            content_address: None,
            outputs: &[],
        }
    }
}

/// Paths to register together: `StoreDb::register` makes all of them valid or none.
#[derive(Debug, Default)]
pub struct Batch {
    nodes: Nodes,
    rows: Vec<Row>,
    /// Node -> row, `NONE` if it is only mentioned.
    row_of: Vec<u32>,
    /// References of all rows, as nodes.
    references: Vec<u32>,
    extras: Vec<Extra>,
}

#[derive(Debug)]
struct Row {
    node: u32,
    /// Place and number in `Batch::references`.
    references: (u32, u32),
    deriver: u32,
    extra: u32,
    nar_hash: Sha256Digest,
    nar_size_bytes: u64,
    registration_time_s: u64,
    ultimate: bool,
}

/// What few paths of a large batch have.
#[derive(Debug)]
struct Extra {
    details: Details,
    outputs: BTreeMap<Box<str>, u32>,
}

/// Every path that a batch mentions, once.
#[derive(Debug, Default)]
struct Nodes {
    keys: Vec<[u8; 20]>,
    names: String,
    name_ends: Vec<u32>,
    by_key: HashMap<[u8; 20], u32>,
    /// Paths whose hash part stands in `by_key` with another name. Never seen in real data.
    twins: BTreeMap<StorePath, u32>,
}

impl Nodes {
    fn name(&self, node: u32) -> &str {
        let node = node as usize;
        let end = self.name_ends.get(node).map_or(0, |end| *end as usize);
        let start = node.checked_sub(1).and_then(|n| self.name_ends.get(n)).map_or(0, |end| *end as usize);
        self.names.get(start..end).unwrap_or_default()
    }

    fn path(&self, node: u32) -> PathRef<'_> {
        let key = self.keys.get(node as usize).copied().unwrap_or_default();
        PathRef::trusted(HashPart::from_bytes(key), self.name(node))
    }

    fn intern(&mut self, path: PathRef<'_>) -> Result<u32, DbError> {
        let key = *path.hash_part().as_bytes();
        match self.by_key.get(&key) {
            None => {
                let node = self.add(path)?;
                self.by_key.insert(key, node);
                Ok(node)
            }
            Some(&node) if self.name(node) == path.name() => Ok(node),
            Some(_) => {
                let full = path.to_store_path();
                if let Some(node) = self.twins.get(&full) {
                    return Ok(*node);
                }
                let node = self.add(path)?;
                self.twins.insert(full, node);
                Ok(node)
            }
        }
    }

    fn add(&mut self, path: PathRef<'_>) -> Result<u32, DbError> {
        let node = index(self.keys.len())?;
        let end = index(self.names.len() + path.name().len())?;
        self.keys.push(*path.hash_part().as_bytes());
        self.names.push_str(path.name());
        self.name_ends.push(end);
        Ok(node)
    }
}

/// Numbers below `NONE` only.
fn index(n: usize) -> Result<u32, DbError> {
    u32::try_from(n).ok().filter(|n| *n != NONE).ok_or(DbError::TooLarge { limit: NONE })
}

impl Batch {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn len(&self) -> usize {
        self.row_of.iter().filter(|row| **row != NONE).count()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Adds a path. Of two with the same path the later one counts.
    pub fn push(&mut self, new: &NewPath<'_>) -> Result<(), DbError> {
        let node = self.intern(new.path)?;
        let start = index(self.references.len())?;
        for reference in new.references {
            let reference = self.intern(*reference)?;
            self.references.push(reference);
        }
        let count = index(new.references.len())?;
        let deriver = new.deriver.map_or(Ok(NONE), |deriver| self.intern(deriver))?;
        let extra = if new.signatures.is_empty() && new.content_address.is_none() && new.outputs.is_empty() {
            NONE
        } else {
            let mut outputs = BTreeMap::new();
            for (name, path) in new.outputs {
                outputs.insert(Box::from(*name), self.intern(*path)?);
            }
            let signatures = new.signatures.iter().cloned().collect();
            let details = Details { content_address: new.content_address.clone(), signatures };
            self.extras.push(Extra { details, outputs });
            index(self.extras.len() - 1)?
        };
        let row = index(self.rows.len())?;
        self.rows.push(Row {
            node,
            references: (start, count),
            deriver,
            extra,
            nar_hash: new.nar_hash,
            nar_size_bytes: new.nar_size_bytes,
            registration_time_s: new.registration_time_s,
            ultimate: new.ultimate,
        });
        if let Some(slot) = self.row_of.get_mut(node as usize) {
            *slot = row;
        }
        Ok(())
    }

    /// Adds a path info, with its outputs if it is a derivation.
    pub fn push_info(&mut self, info: &PathInfo, outputs: &BTreeMap<String, StorePath>) -> Result<(), DbError> {
        let references: Vec<PathRef<'_>> = info.references.iter().map(PathRef::from).collect();
        let signatures: Vec<Signature> = info.signatures.iter().cloned().collect();
        let outputs: Vec<(&str, PathRef<'_>)> =
            outputs.iter().map(|(name, path)| (name.as_str(), PathRef::from(path))).collect();
        self.push(&NewPath {
            path: PathRef::from(&info.path),
            nar_hash: info.nar_hash,
            nar_size_bytes: info.nar_size_bytes,
            references: &references,
            deriver: info.deriver.as_ref().map(PathRef::from),
            registration_time_s: info.registration_time_s,
            ultimate: info.ultimate,
            signatures: &signatures,
            content_address: info.content_address.clone(),
            outputs: &outputs,
        })
    }

    fn intern(&mut self, path: PathRef<'_>) -> Result<u32, DbError> {
        let node = self.nodes.intern(path)?;
        if self.row_of.len() <= node as usize {
            self.row_of.push(NONE);
        }
        Ok(node)
    }

    /// Sorts everything and looks for cycles and doubtful hash parts inside the batch.
    pub(crate) fn sort(self) -> Result<Sorted, DbError> {
        let Self { nodes, rows, row_of, references, extras } = self;
        let mut order: Vec<(u64, u32)> = nodes.keys.iter().zip(0..).map(|(key, node)| (leading(key), node)).collect();
        order.sort_unstable_by(|a, b| a.0.cmp(&b.0).then_with(|| nodes.path(a.1).cmp(&nodes.path(b.1))));
        let mut rank_of = vec![NONE; order.len()];
        for ((_, node), rank) in order.iter().zip(0..) {
            if let Some(slot) = rank_of.get_mut(*node as usize) {
                *slot = rank;
            }
        }
        let rank = |node: &u32| rank_of.get(*node as usize).copied().unwrap_or(NONE);
        let mut sorted = Sorted {
            order: order.iter().map(|(_, node)| *node).collect(),
            row_of_rank: order.iter().map(|(_, node)| row_of.get(*node as usize).copied().unwrap_or(NONE)).collect(),
            mentioned: vec![false; order.len()],
            starts: Vec::with_capacity(order.len() + 1),
            references: Vec::with_capacity(references.len()),
            nodes,
            rows,
            extras,
        };
        sorted.starts.push(0);
        for row in &sorted.row_of_rank {
            let start = sorted.references.len();
            if let Some(row) = sorted.rows.get(*row as usize) {
                let (at, count) = (row.references.0 as usize, row.references.1 as usize);
                let mut own: Vec<u32> = references.get(at..at + count).unwrap_or_default().iter().map(rank).collect();
                own.sort_unstable();
                own.dedup();
                sorted.references.extend_from_slice(&own);
            }
            for reference in sorted.references.get(start..).unwrap_or_default() {
                if let Some(slot) = sorted.mentioned.get_mut(*reference as usize) {
                    *slot = true;
                }
            }
            sorted.starts.push(index(sorted.references.len())?);
        }
        sorted.check()?;
        Ok(sorted)
    }
}

/// The first 8 bytes of a key as a number that sorts alike.
pub(crate) fn leading(key: &[u8; 20]) -> u64 {
    key.first_chunk::<8>().copied().map_or(0, u64::from_be_bytes)
}

/// A batch in the order of its base names. A *rank* is a place in that order, of any path that
/// is mentioned.
#[derive(Debug)]
pub(crate) struct Sorted {
    nodes: Nodes,
    rows: Vec<Row>,
    extras: Vec<Extra>,
    order: Vec<u32>,
    row_of_rank: Vec<u32>,
    /// Does any row refer to it?
    mentioned: Vec<bool>,
    starts: Vec<u32>,
    references: Vec<u32>,
}

impl Sorted {
    pub(crate) fn ranks(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.order.len()).expect("checked when pushed")
    }

    pub(crate) fn path(&self, rank: u32) -> PathRef<'_> {
        self.nodes.path(self.order.get(rank as usize).copied().unwrap_or(NONE))
    }

    pub(crate) fn key(&self, rank: u32) -> &[u8; 20] {
        let node = self.order.get(rank as usize).map_or(NONE, |node| *node);
        self.nodes.keys.get(node as usize).unwrap_or(&[0; 20])
    }

    /// Is it to be registered (or only mentioned)?
    pub(crate) fn is_row(&self, rank: u32) -> bool {
        self.row_of_rank.get(rank as usize).is_some_and(|row| *row != NONE)
    }

    /// Does a row refer to it?
    pub(crate) fn is_referenced(&self, rank: u32) -> bool {
        self.mentioned.get(rank as usize).copied().unwrap_or(false)
    }

    /// The references of a row as ranks, ascending, itself too.
    pub(crate) fn references(&self, rank: u32) -> &[u32] {
        let at = |rank: usize| self.starts.get(rank).map_or(0, |start| *start as usize);
        self.references.get(at(rank as usize)..at(rank as usize + 1)).unwrap_or_default()
    }

    pub(crate) fn row(&self, rank: u32) -> Option<RowView<'_>> {
        let row = self.row_of_rank.get(rank as usize).and_then(|row| self.rows.get(*row as usize))?;
        debug_assert_eq!(self.order.get(rank as usize), Some(&row.node));
        let extra = self.extras.get(row.extra as usize);
        Some(RowView {
            nar_hash: &row.nar_hash,
            nar_size_bytes: row.nar_size_bytes,
            registration_time_s: row.registration_time_s,
            ultimate: row.ultimate,
            deriver: (row.deriver != NONE).then(|| self.nodes.path(row.deriver)),
            details: extra.map(|extra| &extra.details).filter(|details| !details.is_empty()),
        })
    }

    /// The outputs of a row by name.
    pub(crate) fn outputs(&self, rank: u32) -> impl Iterator<Item = (&str, PathRef<'_>)> {
        let row = self.row_of_rank.get(rank as usize).and_then(|row| self.rows.get(*row as usize));
        let extra = row.and_then(|row| self.extras.get(row.extra as usize));
        let outputs = extra.into_iter().flat_map(|extra| extra.outputs.iter());
        outputs.map(|(name, node)| (&**name, self.nodes.path(*node)))
    }

    fn check(&self) -> Result<(), DbError> {
        // Two names for one hash part stand side by side.
        for rank in self.ranks().skip(1) {
            if self.key(rank) == self.key(rank - 1) && self.is_row(rank) && self.is_row(rank - 1) {
                let [path, other] = [rank, rank - 1].map(|rank| self.path(rank).to_store_path());
                return Err(DbError::HashPartTaken { path, other });
            }
        }
        let members = self.ranks().filter(|rank| self.is_row(*rank));
        let order =
            topological_order(self.order.len(), members, |rank| self.references(rank), |rank| self.is_row(rank));
        match order {
            Ok(_) => Ok(()),
            Err((path, from)) => {
                let [path, from] = [path, from].map(|rank| self.path(rank).to_store_path());
                Err(DbError::Cycle { path, from })
            }
        }
    }
}

/// The fields of a row.
pub(crate) struct RowView<'a> {
    pub(crate) nar_hash: &'a Sha256Digest,
    pub(crate) nar_size_bytes: u64,
    pub(crate) registration_time_s: u64,
    pub(crate) ultimate: bool,
    pub(crate) deriver: Option<PathRef<'a>>,
    /// Not empty.
    pub(crate) details: Option<&'a Details>,
}
