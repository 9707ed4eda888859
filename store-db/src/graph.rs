//! The references of many paths in memory: closures, orders, and what the collector walks.
//!
//! A [`Graph`] is a snapshot, of all valid paths ([`Graph::load`], about 100 bytes a path) or of
//! a closure ([`closure_of`]), or made of records that somebody else has told
//! ([`Graph::of_records`]). Its nodes are numbered in the order of the base names, so sets of
//! nodes come out in the order that listings want. Nothing here recurses.

mod given;
mod read;

use std::fmt;
use std::sync::OnceLock;

use larder_core::hash_part::HashPart;
use larder_core::store_path::StorePath;

use crate::batch::NONE;
use crate::error::DbError;
use crate::key_index::KeyIndex;
use crate::record::PathRef;

pub use self::read::{closure_of, neighbours_of};

/// A path of a [`Graph`]: a number below [`Graph::len`], in the order of the base names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node(u32);

impl Node {
    /// For arrays beside the graph.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({})", self.0)
    }
}

/// A set of nodes of one graph, a bit each.
#[derive(Clone, PartialEq, Eq)]
pub struct NodeSet {
    bits: Vec<u64>,
    len: usize,
}

impl NodeSet {
    /// An empty set of nodes of `graph`.
    pub fn new(graph: &Graph) -> Self {
        Self { bits: vec![0; graph.len().div_ceil(64)], len: 0 }
    }

    /// Adds a node; was it new?
    pub fn insert(&mut self, node: Node) -> bool {
        let Some(word) = self.bits.get_mut(node.index() / 64) else { return false };
        let bit = 1 << (node.0 % 64);
        let new = *word & bit == 0;
        *word |= bit;
        self.len += usize::from(new);
        new
    }

    /// Takes a node out; was it there?
    pub fn remove(&mut self, node: Node) -> bool {
        let Some(word) = self.bits.get_mut(node.index() / 64) else { return false };
        let bit = 1 << (node.0 % 64);
        let there = *word & bit != 0;
        *word &= !bit;
        self.len -= usize::from(there);
        there
    }

    pub fn contains(&self, node: Node) -> bool {
        self.bits.get(node.index() / 64).is_some_and(|word| word & 1 << (node.0 % 64) != 0)
    }

    pub const fn len(&self) -> usize {
        self.len
    }

    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The nodes in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Node> + '_ {
        self.bits.iter().zip((0u32..).step_by(64)).flat_map(|(word, first)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = rest.trailing_zeros();
                (rest != 0).then(|| {
                    rest &= rest - 1;
                    Node(first + bit)
                })
            })
        })
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Which way a closure goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Walk {
    /// To referrers instead of references.
    pub backward: bool,
    /// From a derivation to its valid outputs; backward, from a path to its valid derivers.
    pub outputs: bool,
    /// From a path to its recorded deriver, if valid; backward, from a derivation to its valid
    /// outputs that name it as deriver.
    pub derivers: bool,
}

impl Walk {
    pub const REFERENCES: Self = Self { backward: false, outputs: false, derivers: false };
    pub const REFERRERS: Self = Self { backward: true, outputs: false, derivers: false };
}

/// Lists of nodes, one for each node, end to end.
#[derive(Debug, Default)]
struct Lists {
    /// Where each list begins, and the end of the last.
    starts: Vec<u32>,
    nodes: Vec<u32>,
}

impl Lists {
    fn with_capacity(lists: usize) -> Self {
        let mut starts = Vec::with_capacity(lists + 1);
        starts.push(0);
        Self { starts, nodes: Vec::new() }
    }

    /// Ends the list whose nodes were pushed.
    fn end_list(&mut self) -> Result<(), DbError> {
        self.starts.push(u32::try_from(self.nodes.len()).map_err(|_| DbError::TooLarge { limit: NONE })?);
        Ok(())
    }

    /// Ends the lists before that of `node`.
    fn end_until(&mut self, node: u32) -> Result<(), DbError> {
        while self.starts.len() <= node as usize {
            self.end_list()?;
        }
        Ok(())
    }

    fn of(&self, node: u32) -> &[u32] {
        let at = |n: usize| self.starts.get(n).map(|start| *start as usize);
        match (at(node as usize), at(node as usize + 1)) {
            (Some(start), Some(end)) => self.nodes.get(start..end).unwrap_or_default(),
            _ => &[],
        }
    }

    /// The lists the other way round: `a` in the list of `b` for every `b` in the list of `a`,
    /// each ascending. Without `a` in its own list.
    fn inverse(&self, count: usize) -> Self {
        let mut starts = vec![0u32; count + 1];
        let owners = |each: &mut dyn FnMut(u32, u32)| {
            for owner in 0..u32::try_from(count).unwrap_or(NONE) {
                for node in self.of(owner).iter().filter(|node| **node != owner) {
                    each(owner, *node);
                }
            }
        };
        owners(&mut |_, node| {
            if let Some(slot) = starts.get_mut(node as usize + 1) {
                *slot += 1;
            }
        });
        let mut sum = 0;
        for slot in &mut starts {
            sum += *slot;
            *slot = sum;
        }
        let mut nodes = vec![0u32; sum as usize];
        let mut fill = starts.clone();
        owners(&mut |owner, node| {
            if let Some(at) = fill.get_mut(node as usize) {
                if let Some(slot) = nodes.get_mut(*at as usize) {
                    *slot = owner;
                }
                *at += 1;
            }
        });
        Self { starts, nodes }
    }
}

/// A snapshot of paths and what binds them.
#[derive(Default)]
pub struct Graph {
    keys: Vec<[u8; 20]>,
    index: KeyIndex,
    /// Names end to end.
    names: String,
    /// Where each ends: 4 GiB of names are more than 20 million paths.
    name_ends: Vec<u32>,
    nar_sizes_bytes: Vec<u64>,
    references: Lists,
    referrers: OnceLock<Lists>,
    /// The recorded deriver if it is in the graph, else `NONE`.
    derivers: Vec<u32>,
    /// Derivation -> valid outputs.
    outputs: Lists,
    valid_derivers: OnceLock<Lists>,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Graph {
    pub const fn len(&self) -> usize {
        self.keys.len()
    }

    pub const fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// All nodes, ascending.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = Node> + use<> {
        (0..u32::try_from(self.len()).expect("a graph has fewer than 2^32 nodes")).map(Node)
    }

    /// The node of a path, if it is there under this very name.
    pub fn node(&self, path: &StorePath) -> Option<Node> {
        let node = self.by_hash_part(path.hash_part())?;
        (self.path_ref(node) == *path).then_some(node)
    }

    pub fn by_hash_part(&self, hash_part: HashPart) -> Option<Node> {
        self.index.find(&self.keys, hash_part.as_bytes()).map(Node)
    }

    /// As [`Self::by_hash_part`] of one after another, faster where there are many.
    pub fn by_hash_parts<'a>(
        &self,
        hash_parts: impl Iterator<Item = &'a HashPart>,
        mut each: impl FnMut(Option<Node>),
    ) {
        self.index.find_all(&self.keys, hash_parts.map(HashPart::as_bytes), |node| each(node.map(Node)));
    }

    pub fn name(&self, node: Node) -> &str {
        let end = self.name_ends.get(node.index()).map_or(0, |end| *end as usize);
        let start = node.index().checked_sub(1).and_then(|n| self.name_ends.get(n)).map_or(0, |end| *end as usize);
        self.names.get(start..end).unwrap_or_default()
    }

    /// `HASHPART-NAME`.
    pub fn base_name(&self, node: Node) -> String {
        self.path_ref(node).to_string()
    }

    pub fn hash_part(&self, node: Node) -> HashPart {
        HashPart::from_bytes(self.keys.get(node.index()).copied().unwrap_or_default())
    }

    pub fn path_ref(&self, node: Node) -> PathRef<'_> {
        PathRef::trusted(self.hash_part(node), self.name(node))
    }

    pub fn path(&self, node: Node) -> StorePath {
        self.path_ref(node).to_store_path()
    }

    pub fn is_derivation(&self, node: Node) -> bool {
        self.path_ref(node).is_derivation()
    }

    pub fn nar_size_bytes(&self, node: Node) -> u64 {
        self.nar_sizes_bytes.get(node.index()).copied().unwrap_or(0)
    }

    /// What it refers to, ascending, itself too if it does.
    pub fn references(&self, node: Node) -> impl ExactSizeIterator<Item = Node> + '_ {
        self.references.of(node.0).iter().map(|n| Node(*n))
    }

    fn referrer_lists(&self) -> &Lists {
        self.referrers.get_or_init(|| self.references.inverse(self.len()))
    }

    /// The others that refer to it, ascending.
    pub fn referrers(&self, node: Node) -> impl ExactSizeIterator<Item = Node> + '_ {
        self.referrer_lists().of(node.0).iter().map(|n| Node(*n))
    }

    /// Its recorded deriver, if that is in the graph.
    pub fn deriver(&self, node: Node) -> Option<Node> {
        self.derivers.get(node.index()).copied().filter(|n| *n != NONE).map(Node)
    }

    /// The valid outputs of a derivation, ascending. Only in a graph of all paths.
    pub fn outputs(&self, node: Node) -> impl ExactSizeIterator<Item = Node> + '_ {
        self.outputs.of(node.0).iter().map(|n| Node(*n))
    }

    /// The valid derivations that have it as an output, ascending. Only in a graph of all paths.
    pub fn valid_derivers(&self, node: Node) -> impl ExactSizeIterator<Item = Node> + '_ {
        let lists = self.valid_derivers.get_or_init(|| self.outputs.inverse(self.len()));
        lists.of(node.0).iter().map(|n| Node(*n))
    }

    /// Calls `each` with the nodes one step away (some perhaps twice).
    pub fn neighbours(&self, node: Node, walk: Walk, mut each: impl FnMut(Node)) {
        if walk.backward {
            self.referrers(node).for_each(&mut each);
            if walk.outputs {
                self.valid_derivers(node).for_each(&mut each);
            }
            if walk.derivers {
                self.outputs(node).filter(|output| self.deriver(*output) == Some(node)).for_each(&mut each);
            }
        } else {
            self.references(node).for_each(&mut each);
            if walk.outputs {
                self.outputs(node).for_each(&mut each);
            }
            if walk.derivers {
                self.deriver(node).into_iter().for_each(&mut each);
            }
        }
    }

    /// Everything that can be reached from the roots, themselves too.
    pub fn closure(&self, roots: impl IntoIterator<Item = Node>, walk: Walk) -> NodeSet {
        let mut set = NodeSet::new(self);
        let mut rest: Vec<Node> = roots.into_iter().filter(|root| set.insert(*root)).collect();
        while let Some(node) = rest.pop() {
            self.neighbours(node, walk, |next| {
                if set.insert(next) {
                    rest.push(next);
                }
            });
        }
        set
    }

    /// The nodes of a set with references before referrers: depth first, ascending at each
    /// step, references to oneself aside. What `nix-store -qR` prints in.
    pub fn topological(&self, set: &NodeSet) -> Result<Vec<Node>, DbError> {
        let references = |node: u32| self.references.of(node);
        let members = set.iter().map(|node| node.0);
        match topological_order(self.len(), members, references, |node| set.contains(Node(node))) {
            Ok(order) => Ok(order.into_iter().map(Node).collect()),
            Err((path, from)) => Err(DbError::Cycle { path: self.path(Node(path)), from: self.path(Node(from)) }),
        }
    }

    /// [`Graph::topological`] of all nodes.
    pub fn topological_all(&self) -> Result<Vec<Node>, DbError> {
        let mut all = NodeSet::new(self);
        for node in self.nodes() {
            all.insert(node);
        }
        self.topological(&all)
    }

    /// The graph of some of the nodes and what binds them to each other.
    pub fn restrict(&self, set: &NodeSet) -> Result<Self, DbError> {
        let mut new_of = vec![NONE; self.len()];
        for (node, new) in set.iter().zip(0u32..) {
            if let Some(slot) = new_of.get_mut(node.index()) {
                *slot = new;
            }
        }
        let new = |node: &u32| new_of.get(*node as usize).copied().filter(|n| *n != NONE);
        let mut graph = Self {
            references: Lists::with_capacity(set.len()),
            outputs: Lists::with_capacity(set.len()),
            ..Self::default()
        };
        for node in set.iter() {
            graph.push_name(self.path_ref(node), self.nar_size_bytes(node))?;
            graph.references.nodes.extend(self.references.of(node.0).iter().filter_map(new));
            graph.references.end_list()?;
            graph.outputs.nodes.extend(self.outputs.of(node.0).iter().filter_map(new));
            graph.outputs.end_list()?;
            graph.derivers.push(self.deriver(node).and_then(|deriver| new(&deriver.0)).unwrap_or(NONE));
        }
        graph.index = KeyIndex::new(&graph.keys);
        Ok(graph)
    }
}

/// Depth-first post-order over `members` (ascending), references before referrers; references to
/// oneself and out of the set are passed over.
///
/// A cycle gives the path met again and the one that refers to it. Source: cli, section 6.1.
pub fn topological_order<'a>(
    count: usize,
    members: impl Iterator<Item = u32>,
    references: impl Fn(u32) -> &'a [u32],
    in_set: impl Fn(u32) -> bool,
) -> Result<Vec<u32>, (u32, u32)> {
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Open,
        Done,
    }
    let mut states = vec![State::New; count];
    let mut order = Vec::new();
    let mut stack: Vec<(u32, &[u32])> = Vec::new();
    let set = |states: &mut Vec<State>, node: u32, state| {
        if let Some(slot) = states.get_mut(node as usize) {
            *slot = state;
        }
    };
    for member in members {
        if states.get(member as usize) != Some(&State::New) {
            continue;
        }
        set(&mut states, member, State::Open);
        stack.push((member, references(member)));
        while let Some((node, rest)) = stack.last_mut() {
            let node = *node;
            let Some((next, others)) = rest.split_first() else {
                set(&mut states, node, State::Done);
                order.push(node);
                stack.pop();
                continue;
            };
            let next = *next;
            *rest = others;
            if next == node || !in_set(next) {
                continue;
            }
            match states.get(next as usize) {
                Some(State::New) => {
                    set(&mut states, next, State::Open);
                    stack.push((next, references(next)));
                }
                Some(State::Open) => return Err((next, node)),
                _ => {}
            }
        }
    }
    Ok(order)
}
