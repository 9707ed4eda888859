//! Why a path is kept: the shortest chain from each root to it.
//!
//! Pure, over the graph. The steps are those of [`live`](crate::live::live): a path has a chain from
//! some root exactly if it is live.

use larder_store_db::{Graph, Node};

use crate::live::Rules;

/// How one path keeps the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// It refers to it.
    Reference,
    /// It was built from it, and `keep-derivations` is on.
    Deriver,
    /// It is the derivation that makes it, and `keep-outputs` is on.
    Output,
}

/// From a root to a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// What the root stands for.
    pub start: Node,
    /// The last one leads to the path; none if the root stands for the path itself.
    pub steps: Vec<(Step, Node)>,
}

/// The shortest ways from these nodes to `target`, in their order; of those that do not lead there
/// nothing. Of equally short ones the one with the smaller names.
pub fn chains(graph: &Graph, target: Node, starts: impl IntoIterator<Item = Node>, rules: Rules) -> Vec<Option<Chain>> {
    // What the graph cannot be asked: who names a derivation as deriver, be it an output of it or not.
    let mut named: Vec<(Node, Node)> = Vec::new();
    if rules.keep_derivations {
        named = graph.nodes().filter_map(|node| Some((graph.deriver(node)?, node))).collect();
        named.sort_unstable();
    }
    let built_from = |node: Node| {
        let from = named.partition_point(|(deriver, _)| *deriver < node);
        named.iter().skip(from).take_while(move |(deriver, _)| *deriver == node).map(|(_, output)| *output)
    };
    // Where the way goes on, for each node that leads to the target.
    let mut onward: Vec<Option<(Step, Node)>> = vec![None; graph.len()];
    let mut rest = std::collections::VecDeque::from([target]);
    while let Some(node) = rest.pop_front() {
        let mut meet = |step: Step, from: Node| {
            if from != target
                && let Some(slot @ None) = onward.get_mut(from.index())
            {
                *slot = Some((step, node));
                rest.push_back(from);
            }
        };
        graph.referrers(node).for_each(|from| meet(Step::Reference, from));
        built_from(node).for_each(|from| meet(Step::Deriver, from));
        if rules.keep_outputs {
            graph.valid_derivers(node).for_each(|from| meet(Step::Output, from));
        }
    }
    let chain = |start: Node| {
        let mut steps = Vec::new();
        let mut at = start;
        while at != target {
            let (step, next) = onward.get(at.index()).copied().flatten()?;
            steps.push((step, next));
            at = next;
        }
        Some(Chain { start, steps })
    };
    starts.into_iter().map(chain).collect()
}
