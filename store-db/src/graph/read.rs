//! How a [`Graph`] comes out of the ledger: whole, or as much as a question needs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::hash_map::Entry;
use std::hash::{Hash, Hasher};

use larder_core::hash_part::HashPart;
use larder_core::store_path::StorePath;
use redb::ReadableTable as _;
use rustc_hash::{FxHashMap, FxHashSet};

use super::{Graph, Lists, Node, Walk};
use crate::batch::{NONE, leading};
use crate::error::DbError;
use crate::key_index::KeyIndex;
use crate::query::{ReadTxn, each_key, parse, parse_references};
use crate::record::{DeriverView, PathRef, RecordView, ReferencesView};
use crate::tables::{inconsistent, split_output_key};

/// Once so many-th a part of the table has been visited path by path, the rest is read in one
/// go. (More in tests, whose tables are small, so that they see both ways.)
const SWITCH_RATIO: u64 = if cfg!(test) { 2 } else { 8 };

/// The same where references alone are followed, which takes fewer lookups.
const SWEEP_RATIO: u64 = 2;

/// Paths for which there is room from the beginning, at most.
const MOST_RESERVED: usize = 1 << 20;

impl Graph {
    /// All valid paths.
    pub fn load(r: &ReadTxn) -> Result<Self, DbError> {
        Self::load_with(r, |_| Ok(()))
    }

    /// All valid paths; `each` sees every record in the order of the nodes, so that a caller who
    /// wants more of them than a graph has need not read the ledger again.
    pub fn load_with<E: From<DbError>>(
        r: &ReadTxn,
        mut each: impl FnMut(RecordView<'_>) -> Result<(), E>,
    ) -> Result<Self, E> {
        // A damaged ledger may say anything: it decides how much is reserved, up to a limit.
        let count = usize::try_from(r.count()?).unwrap_or(usize::MAX).min(MOST_RESERVED);
        let mut names = Names::with_capacity(count);
        let mut owners = Vec::with_capacity(count);
        r.for_each(|view| {
            if view.has_references() {
                owners.push(u32::try_from(names.graph.len()).map_err(|_| DbError::TooLarge { limit: NONE })?);
            }
            names.push(&view)?;
            each(view)
        })?;
        // Keys are numbers now, which take a fifth of the room.
        names.index();
        let references = names.graph.load_references(r, &owners)?;
        let mut graph = names.into_graph(references);
        graph.load_outputs(r)?;
        Ok(graph)
    }

    /// The references of all; `owners` have some. They lie in the order of the nodes.
    fn load_references(&self, r: &ReadTxn, owners: &[u32]) -> Result<Lists, DbError> {
        let mut lists = Lists::with_capacity(self.len());
        lists.nodes.reserve_exact(r.reference_count()?.min(self.len().saturating_mul(16)));
        let mut rows = r.references_table()?.iter()?;
        for owner in owners {
            let row = rows.next().transpose()?;
            let lost = || inconsistent(format_args!("the references of '{}' are lost", self.path_ref(Node(*owner))));
            let (key, bytes) = row.as_ref().ok_or_else(lost)?;
            if self.keys.get(*owner as usize) != Some(key.value()) {
                return Err(lost());
            }
            lists.end_until(*owner)?;
            let keys = parse_references(key.value(), bytes.value())?.0;
            self.index.find_all(&self.keys, keys.iter(), |node| lists.nodes.extend(node));
        }
        lists.end_until(u32::try_from(self.len()).map_err(|_| DbError::TooLarge { limit: NONE })?)?;
        Ok(lists)
    }

    pub(super) fn push_name(&mut self, path: PathRef<'_>, nar_size_bytes: u64) -> Result<(), DbError> {
        self.keys.push(*path.hash_part().as_bytes());
        self.names.push_str(path.name());
        self.name_ends.push(u32::try_from(self.names.len()).map_err(|_| DbError::TooLarge { limit: NONE })?);
        self.nar_sizes_bytes.push(nar_size_bytes);
        Ok(())
    }

    /// The outputs lie in the order of the derivations, as the nodes do.
    fn load_outputs(&mut self, r: &ReadTxn) -> Result<(), DbError> {
        let mut outputs = Lists::with_capacity(self.len());
        let mut current = 0u32;
        let mut own = Vec::new();
        let finish = |outputs: &mut Lists, own: &mut Vec<u32>| {
            own.sort_unstable();
            own.dedup();
            outputs.nodes.append(own);
            outputs.end_list()
        };
        for row in r.outputs()?.iter()? {
            let (key, value) = row?;
            let (derivation, output) = split_output_key(key.value())?;
            let Some(node) = self.index.find(&self.keys, &derivation) else {
                let derivation = HashPart::from_bytes(derivation);
                return Err(inconsistent(format_args!("'{derivation}' has outputs but is not valid")));
            };
            while current < node {
                finish(&mut outputs, &mut own)?;
                current += 1;
            }
            let name = self.path_ref(Node(node)).name();
            let path = crate::record::read_output(name, output, value.value());
            let path = path.map_err(|source| crate::query::bad_record(self.path_ref(Node(node)), source))?;
            own.extend(self.node(&path).map(|node| node.0));
        }
        for _ in current..u32::try_from(self.len()).unwrap_or(NONE) {
            finish(&mut outputs, &mut own)?;
        }
        self.outputs = outputs;
        Ok(())
    }
}

/// The closure of some valid paths as a graph of just its members.
///
/// Costs a lookup a member as long as they are few, and a reading of the whole ledger at most.
/// Outputs of derivations are edges of the walk if it says so, but are not kept in the graph.
/// A root that is not valid gives [`DbError::NotValid`].
pub fn closure_of(r: &ReadTxn, roots: &[StorePath], walk: Walk) -> Result<Graph, DbError> {
    let mut roots: Vec<StorePath> = roots.to_vec();
    roots.sort_unstable();
    roots.dedup();
    let total = r.count()?;
    let whole = |r: &ReadTxn, roots: &[StorePath]| {
        let graph = Graph::load(r)?;
        let nodes: Option<Vec<Node>> = roots.iter().map(|root| graph.node(root)).collect();
        let nodes = nodes.expect("the roots were looked up in the same snapshot");
        let set = graph.closure(nodes, walk);
        if set.len() == graph.len() { Ok(graph) } else { graph.restrict(&set) }
    };
    let mut frontier: Vec<[u8; 20]> = Vec::with_capacity(roots.len());
    for root in &roots {
        if r.record(root)?.is_none() {
            return Err(DbError::NotValid { path: root.clone() });
        }
        frontier.push(*root.hash_part().as_bytes());
    }
    frontier.dedup();
    if walk == Walk::REFERENCES {
        return match sweep(r, &frontier, total / SWEEP_RATIO)? {
            Some(graph) => Ok(graph),
            None => whole(r, &roots),
        };
    }
    let mut seen: FxHashSet<[u8; 20]> = frontier.iter().copied().collect();
    let mut found = Found::default();
    while !frontier.is_empty() {
        if (seen.len() as u64).saturating_mul(SWITCH_RATIO) > total {
            return whole(r, &roots);
        }
        let mut next = Vec::new();
        each_key(r.paths()?, &frontier, |_, key, bytes| {
            let Some(bytes) = bytes else {
                return Err(inconsistent(format_args!("'{}' is not valid", HashPart::from_bytes(*key))));
            };
            let view = parse(key, bytes)?;
            let references = if view.has_references() { r.reference_keys(key)? } else { Vec::new() };
            found.push(&view, ReferencesView(&references))?;
            neighbours(r, &view, &references, walk, |key| {
                if seen.insert(key) {
                    next.push(key);
                }
            })
        })?;
        next.sort_unstable();
        frontier = next;
    }
    found.into_graph()
}

/// Keys, numbered as they are come upon.
#[derive(Default)]
struct Numbers {
    keys: Vec<[u8; 20]>,
    of: FxHashMap<Key, u32>,
}

/// A key that is told from others by its first bytes, nearly always: they are those of a digest.
#[derive(PartialEq, Eq)]
struct Key([u8; 20]);

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(leading(&self.0));
    }
}

impl Numbers {
    /// The number of a key; is it new?
    fn number(&mut self, key: &[u8; 20]) -> Result<(u32, bool), DbError> {
        let next = u32::try_from(self.keys.len()).map_err(|_| DbError::TooLarge { limit: NONE })?;
        Ok(match self.of.entry(Key(*key)) {
            Entry::Occupied(known) => (*known.get(), false),
            Entry::Vacant(free) => {
                free.insert(next);
                self.keys.push(*key);
                (next, true)
            }
        })
    }
}

/// What can be reached from some keys by references; `None` if that is more than `most`.
///
/// Goes through the table of references in its own order, as a lift through a house: what is
/// found ahead is taken along, what is found behind waits for the next turn. So a page is read a
/// few times only, however deep the closure is. The records are read at the end, in one turn.
fn sweep(r: &ReadTxn, roots: &[[u8; 20]], most: u64) -> Result<Option<Graph>, DbError> {
    let table = r.references_table()?;
    let mut numbers = Numbers::default();
    // By number: where the references of each lie in `all`, which has numbers too.
    let mut ranges: Vec<std::ops::Range<u32>> = Vec::new();
    let mut all: Vec<u32> = Vec::new();
    // The first bytes of a key decide nearly every comparison, and the others do not matter here.
    let mut ahead: BinaryHeap<Reverse<(u64, u32)>> = BinaryHeap::new();
    let mut behind: Vec<(u64, u32)> = Vec::new();
    for root in roots {
        behind.push((leading(root), numbers.number(root)?.0));
    }
    let here = |all: &Vec<u32>| u32::try_from(all.len()).map_err(|_| DbError::TooLarge { limit: NONE });
    while !behind.is_empty() {
        ahead.extend(behind.drain(..).map(Reverse));
        while let Some(Reverse((place, number))) = ahead.pop() {
            if numbers.keys.len() as u64 > most {
                return Ok(None);
            }
            let key = numbers.keys.get(number as usize).copied().unwrap_or_default();
            let start = here(&all)?;
            if let Some(bytes) = table.get(&key)? {
                for reference in parse_references(&key, bytes.value())?.0 {
                    let (number, new) = numbers.number(reference)?;
                    all.push(number);
                    if new {
                        let next = (leading(reference), number);
                        if next.0 > place { ahead.push(Reverse(next)) } else { behind.push(next) }
                    }
                }
            }
            if ranges.len() <= number as usize {
                ranges.resize(number as usize + 1, 0..0);
            }
            if let Some(range) = ranges.get_mut(number as usize) {
                *range = start..here(&all)?;
            }
        }
    }
    let mut order: Vec<u32> = (0u32..).take(numbers.keys.len()).collect();
    order.sort_unstable_by_key(|number| numbers.keys.get(*number as usize));
    let keys: Vec<[u8; 20]> = order.iter().filter_map(|number| numbers.keys.get(*number as usize)).copied().collect();
    drop(numbers);
    let mut names = Names::read(r, &keys)?;
    names.index();
    let mut node_of = vec![NONE; order.len()];
    for (node, number) in (0..).zip(&order) {
        if let Some(slot) = node_of.get_mut(*number as usize) {
            *slot = node;
        }
    }
    let mut references = Lists::with_capacity(order.len());
    references.nodes.reserve_exact(all.len());
    for number in order {
        let range = ranges.get(number as usize).cloned().unwrap_or_default();
        let own = all.get(range.start as usize..range.end as usize).unwrap_or_default();
        references.nodes.extend(own.iter().filter_map(|number| node_of.get(*number as usize)));
        references.end_list()?;
    }
    Ok(Some(names.into_graph(references)))
}

/// What some valid paths refer to, or what refers to them, as a graph of just these neighbours.
///
/// A path that refers to itself is its own neighbour both ways. Costs a few lookups for each
/// neighbour, or a reading of the whole ledger if they are many.
/// A path that is not valid gives [`DbError::NotValid`].
pub fn neighbours_of(r: &ReadTxn, paths: &[StorePath], backward: bool) -> Result<Graph, DbError> {
    let mut keys: Vec<[u8; 20]> = Vec::new();
    for path in paths {
        let Some(record) = r.record(path)? else { return Err(DbError::NotValid { path: path.clone() }) };
        let own = *path.hash_part().as_bytes();
        let view = record.view();
        let references = if view.has_references() { r.reference_keys(&own)? } else { Vec::new() };
        if backward {
            keys.extend(references.binary_search(&own).map(|_| own));
            keys.extend(r.referrer_keys(&own)?);
        } else {
            keys.extend(references);
        }
    }
    keys.sort_unstable();
    keys.dedup();
    let mut names = Names::read(r, &keys)?;
    names.index();
    let mut lists = Lists::with_capacity(keys.len());
    each_key(r.references_table()?, &keys, |_, key, bytes| {
        if let Some(bytes) = bytes {
            let graph = &names.graph;
            let all = parse_references(key, bytes)?.0.iter();
            lists.nodes.extend(all.filter_map(|key| graph.index.find(&graph.keys, key)));
        }
        lists.end_list()
    })?;
    Ok(names.into_graph(lists))
}

/// Calls `each` with the keys one step away.
fn neighbours(
    r: &ReadTxn,
    view: &RecordView<'_>,
    references: &[[u8; 20]],
    walk: Walk,
    mut each: impl FnMut([u8; 20]),
) -> Result<(), DbError> {
    let path = view.path();
    if walk.backward {
        r.referrer_keys(path.hash_part().as_bytes())?.into_iter().for_each(&mut each);
        if walk.outputs {
            for deriver in r.valid_derivers(&path.to_store_path())? {
                each(*deriver.hash_part().as_bytes());
            }
        }
    } else {
        references.iter().copied().for_each(&mut each);
        if walk.derivers
            && let Some(deriver) = view.deriver()
            && let Some(record) = r.by_key(deriver.hash_part.as_bytes())?
            && deriver.is(record.view().path())
        {
            each(*deriver.hash_part.as_bytes());
        }
    }
    let outputs = if walk.backward { walk.derivers } else { walk.outputs };
    if outputs && path.is_derivation() {
        for output in r.derivation_outputs(&path.to_store_path())?.values() {
            let Some(record) = r.record(output)? else { continue };
            if !walk.backward || record.view().deriver().is_some_and(|deriver| deriver.is(path)) {
                each(*output.hash_part().as_bytes());
            }
        }
    }
    Ok(())
}

/// Names, sizes and derivers of paths. [`Names::index`] makes nodes of them, if their keys ascend.
#[derive(Default)]
struct Names {
    /// Nothing else than these.
    graph: Graph,
    /// Of those that have one, ascending.
    derivers: Vec<(u32, FoundDeriver)>,
    /// Ends of names of derivers, where they are not `.drv`.
    deriver_rests: Vec<Box<str>>,
}

/// A deriver whose name begins as its path's.
#[derive(Clone, Copy)]
struct FoundDeriver {
    key: [u8; 20],
    shared: u8,
    rest: u32,
}

impl FoundDeriver {
    /// As `rest`: the name goes on with `.drv`.
    const DRV: u32 = NONE;
}

impl Names {
    fn with_capacity(paths: usize) -> Self {
        Self {
            graph: Graph {
                keys: Vec::with_capacity(paths),
                names: String::with_capacity(paths.saturating_mul(32)),
                name_ends: Vec::with_capacity(paths),
                nar_sizes_bytes: Vec::with_capacity(paths),
                ..Graph::default()
            },
            derivers: Vec::new(),
            deriver_rests: Vec::new(),
        }
    }

    /// The records of ascending keys, which must all be there.
    fn read(r: &ReadTxn, keys: &[[u8; 20]]) -> Result<Self, DbError> {
        let mut names = Self::with_capacity(keys.len());
        each_key(r.paths()?, keys, |_, key, bytes| {
            let Some(bytes) = bytes else {
                return Err(inconsistent(format_args!("'{}' is not valid", HashPart::from_bytes(*key))));
            };
            names.push(&parse(key, bytes)?)
        })?;
        Ok(names)
    }

    fn push(&mut self, view: &RecordView<'_>) -> Result<(), DbError> {
        let Some(deriver) = view.deriver() else {
            return self.graph.push_name(view.path(), view.nar_size_bytes);
        };
        let number = |len: usize| u32::try_from(len).map_err(|_| DbError::TooLarge { limit: NONE });
        let [shared, rest] = deriver.name;
        let rest = if rest == ".drv" {
            FoundDeriver::DRV
        } else {
            self.deriver_rests.push(rest.into());
            number(self.deriver_rests.len() - 1)?
        };
        let shared = u8::try_from(shared.len()).expect("it is read from a byte");
        let found = FoundDeriver { key: *deriver.hash_part.as_bytes(), shared, rest };
        self.derivers.push((number(self.graph.len())?, found));
        self.graph.push_name(view.path(), view.nar_size_bytes)
    }

    /// The same in the order of the keys, which is given.
    fn sorted(self, order: &[u32]) -> Result<Self, DbError> {
        let mut sorted = Self { deriver_rests: self.deriver_rests, ..Self::with_capacity(order.len()) };
        let mut places = vec![NONE; order.len()];
        for (to, from) in (0..).zip(order) {
            let node = Node(*from);
            sorted.graph.push_name(self.graph.path_ref(node), self.graph.nar_size_bytes(node))?;
            if let Some(place) = places.get_mut(node.index()) {
                *place = to;
            }
        }
        let place = |(from, found): (u32, _)| Some((*places.get(from as usize)?, found));
        sorted.derivers = self.derivers.into_iter().filter_map(place).collect();
        sorted.derivers.sort_unstable_by_key(|(node, _)| *node);
        Ok(sorted)
    }

    fn index(&mut self) {
        self.graph.names.shrink_to_fit();
        self.graph.index = KeyIndex::new(&self.graph.keys);
    }

    /// The recorded deriver of the `n`th path, whose name is `own`, if it is there.
    fn deriver_of(&self, found: FoundDeriver, own: Node) -> Option<Node> {
        let rest =
            if found.rest == FoundDeriver::DRV { ".drv" } else { self.deriver_rests.get(found.rest as usize)? };
        let node = Node(self.graph.index.find(&self.graph.keys, &found.key)?);
        let name = [self.graph.name(own).get(..usize::from(found.shared))?, rest];
        let deriver = DeriverView { hash_part: HashPart::from_bytes(found.key), name };
        deriver.is(self.graph.path_ref(node)).then_some(node)
    }

    fn into_graph(mut self, references: Lists) -> Graph {
        let mut derivers = vec![NONE; self.graph.len()];
        for (node, found) in &self.derivers {
            if let (Some(slot), Some(deriver)) =
                (derivers.get_mut(*node as usize), self.deriver_of(*found, Node(*node)))
            {
                *slot = deriver.0;
            }
        }
        self.graph.derivers = derivers;
        self.graph.references = references;
        self.graph
    }
}

/// Paths as they were come upon, in any order, with their references.
#[derive(Default)]
struct Found {
    names: Names,
    /// References of all, end to end, and where those of each end.
    references: Vec<[u8; 20]>,
    ends: Vec<u32>,
}

impl Found {
    fn push(&mut self, view: &RecordView<'_>, references: ReferencesView<'_>) -> Result<(), DbError> {
        self.names.push(view)?;
        self.references.extend_from_slice(references.0);
        self.ends.push(u32::try_from(self.references.len()).map_err(|_| DbError::TooLarge { limit: NONE })?);
        Ok(())
    }

    /// Where the references of the `n`th path lie.
    fn references_of(&self, n: usize) -> &[[u8; 20]] {
        let start = n.checked_sub(1).and_then(|n| self.ends.get(n)).map_or(0, |end| *end as usize);
        let end = self.ends.get(n).map_or(start, |end| *end as usize);
        self.references.get(start..end).unwrap_or_default()
    }

    /// Puts the paths in order. References out of the graph are left out.
    fn into_graph(mut self) -> Result<Graph, DbError> {
        let mut order: Vec<u32> = self.names.graph.nodes().map(|node| node.0).collect();
        if !self.names.graph.keys.is_sorted() {
            order.sort_unstable_by_key(|n| self.names.graph.keys.get(*n as usize));
            self.names = std::mem::take(&mut self.names).sorted(&order)?;
        }
        self.names.index();
        let mut references = Lists::with_capacity(order.len());
        references.nodes.reserve_exact(self.references.len());
        for n in order {
            let keys = self.references_of(n as usize).iter();
            let graph = &self.names.graph;
            references.nodes.extend(keys.filter_map(|key| graph.index.find(&graph.keys, key)));
            references.end_list()?;
        }
        Ok(self.names.into_graph(references))
    }
}
