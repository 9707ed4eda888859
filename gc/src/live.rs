//! Liveness: what the roots keep, and in which order the rest may go.
//!
//! Pure, over a snapshot of the ledger. A path is live if it is a root or can be reached from one:
//! through references; with `keep-derivations` from a path to its *recorded* deriver (not to every
//! derivation that could make it, of which one fixed-output path may have thousands); with
//! `keep-outputs` from a derivation to its outputs. Source: gc, section 2.
//!
//! With both settings there are cycles: derivation, output, deriver. A walk that starts from the
//! roots needs no special care for them: whoever is on a cycle is reached with it or not at all.
//! Deleting does: [`units`] puts the members of a cycle (a strongly connected component) together,
//! so that no limit and no late root can part them. Nothing here recurses.

use larder_store_db::graph::{NodeSet, topological_order};
use larder_store_db::{Graph, Node, Walk};

/// What keeps paths besides references: the settings of these names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rules {
    pub keep_outputs: bool,
    pub keep_derivations: bool,
}

impl Rules {
    /// References only (`--ignore-liveness`).
    pub const REFERENCES: Self = Self { keep_outputs: false, keep_derivations: false };

    /// From a path to what it keeps.
    pub const fn keeps(self) -> Walk {
        Walk { backward: false, outputs: self.keep_outputs, derivers: self.keep_derivations }
    }

    /// From a path to what keeps it.
    pub const fn kept_by(self) -> Walk {
        Walk { backward: true, outputs: self.keep_outputs, derivers: self.keep_derivations }
    }
}

/// All that these roots keep, themselves too.
pub fn live(graph: &Graph, roots: impl IntoIterator<Item = Node>, rules: Rules) -> NodeSet {
    graph.closure(roots, rules.keeps())
}

/// What is not in a set.
pub fn complement(graph: &Graph, set: &NodeSet) -> NodeSet {
    let mut rest = NodeSet::new(graph);
    for node in graph.nodes().filter(|node| !set.contains(*node)) {
        rest.insert(node);
    }
    rest
}

/// Groups of paths that go together, in an order in which they may go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Units {
    nodes: Vec<Node>,
    /// Where each ends.
    ends: Vec<u32>,
}

impl Units {
    pub const fn len(&self) -> usize {
        self.ends.len()
    }

    pub const fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The groups, each with referrers before references.
    pub fn iter(&self) -> impl Iterator<Item = &[Node]> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let slice = |(start, end): (u32, &u32)| self.nodes.get(start as usize..*end as usize).unwrap_or_default();
        starts.zip(&self.ends).map(slice)
    }
}

/// Not visited yet.
const NEW: u32 = u32::MAX;
/// Its component is complete.
const DONE: u32 = u32::MAX - 1;

/// The strongly connected components of a dead set, each after all that keep it: deleting in this
/// order never leaves a path whose references are gone.
///
/// Otherwise the order is random, and depends on `seed`: a run that stops at a limit must not always
/// take the same paths. Costs 8 bytes a path of the graph and time in proportion to its edges.
pub fn units(graph: &Graph, dead: &NodeSet, rules: Rules, seed: u64) -> Units {
    let mut search = Components {
        graph,
        dead,
        walk: rules.keeps(),
        place: vec![NEW; graph.len()],
        next_place: 0,
        open: Vec::new(),
        edges: Vec::new(),
        found: Units::default(),
    };
    for node in shuffled(dead, seed) {
        search.visit(node);
    }
    // Tarjan's algorithm completes a component after all that it leads to.
    let mut found = search.found;
    let mut units = Units { nodes: Vec::with_capacity(found.nodes.len()), ends: Vec::with_capacity(found.ends.len()) };
    while let Some(end) = found.ends.pop() {
        let start = found.ends.last().copied().unwrap_or(0);
        let mut members = found.nodes.split_off(start as usize);
        debug_assert_eq!(members.len() + start as usize, end as usize);
        referrers_first(graph, &mut members);
        units.nodes.extend(members);
        units.ends.push(u32::try_from(units.nodes.len()).expect("a graph has fewer than 2^32 nodes"));
    }
    units
}

/// A path that is being visited.
struct Frame {
    node: Node,
    /// Its place, and the least place that can be reached from it.
    place: u32,
    low: u32,
    /// Where its edges that are left begin.
    edges: usize,
}

struct Components<'a> {
    graph: &'a Graph,
    dead: &'a NodeSet,
    walk: Walk,
    /// The order of the first visits, or [`NEW`] or [`DONE`].
    place: Vec<u32>,
    next_place: u32,
    /// Visited, but in no complete component.
    open: Vec<Node>,
    /// Edges left to follow, of all frames end to end.
    edges: Vec<Node>,
    found: Units,
}

impl Components<'_> {
    fn place_of(&self, node: Node) -> u32 {
        self.place.get(node.index()).copied().unwrap_or(DONE)
    }

    fn set_place(&mut self, node: Node, place: u32) {
        if let Some(slot) = self.place.get_mut(node.index()) {
            *slot = place;
        }
    }

    fn enter(&mut self, node: Node) -> Frame {
        let place = self.next_place;
        self.next_place += 1;
        self.set_place(node, place);
        self.open.push(node);
        let edges = self.edges.len();
        let Self { graph, dead, edges: list, .. } = self;
        graph.neighbours(node, self.walk, |next| {
            if next != node && dead.contains(next) {
                list.push(next);
            }
        });
        Frame { node, place, low: place, edges }
    }

    fn visit(&mut self, start: Node) {
        if self.place_of(start) != NEW {
            return;
        }
        let mut stack = vec![self.enter(start)];
        while let Some(frame) = stack.last_mut() {
            if self.edges.len() > frame.edges {
                let Some(next) = self.edges.pop() else { break };
                match self.place_of(next) {
                    NEW => stack.push(self.enter(next)),
                    DONE => {}
                    place => frame.low = frame.low.min(place),
                }
                continue;
            }
            let (node, place, low) = (frame.node, frame.place, frame.low);
            stack.pop();
            if let Some(parent) = stack.last_mut() {
                parent.low = parent.low.min(low);
            }
            if low == place {
                while let Some(member) = self.open.pop() {
                    self.set_place(member, DONE);
                    self.found.nodes.push(member);
                    if member == node {
                        break;
                    }
                }
                self.found.ends.push(u32::try_from(self.found.nodes.len()).expect("fewer than 2^32 nodes"));
            }
        }
    }
}

/// Puts the members of one component in order; their references have no cycles.
fn referrers_first(graph: &Graph, members: &mut Vec<Node>) {
    if members.len() < 2 {
        return;
    }
    members.sort_unstable();
    let number = |node: Node| members.binary_search(&node).ok().and_then(|n| u32::try_from(n).ok());
    let lists: Vec<Vec<u32>> = members
        .iter()
        .map(|node| graph.references(*node).filter(|next| next != node).filter_map(number).collect())
        .collect();
    let of = |n: u32| lists.get(n as usize).map_or(&[][..], Vec::as_slice);
    let all = 0..u32::try_from(members.len()).unwrap_or(0);
    // The ledger lets no cycle of references in; were there one, any order would do.
    if let Ok(order) = topological_order(members.len(), all, of, |_| true) {
        *members = order.into_iter().rev().filter_map(|n| members.get(n as usize).copied()).collect();
    }
}

fn shuffled(set: &NodeSet, seed: u64) -> Vec<Node> {
    let mut nodes: Vec<Node> = set.iter().collect();
    shuffle(&mut nodes, seed);
    nodes
}

/// Puts things into an order that depends on nothing but their number and `seed`.
pub fn shuffle<T>(things: &mut [T], seed: u64) {
    let mut state = seed | 1;
    for last in (1..things.len()).rev() {
        // xorshift64*: good enough to be unfair to nobody.
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let random = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        things.swap(last, usize::try_from(random % (last as u64 + 1)).unwrap_or(0));
    }
}

#[cfg(test)]
mod tests;
