//! Liveness against a reference that is as simple as can be.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::store_path::{Name, StorePath};
use larder_store_db::{Batch, Mode, OpenOptions, StoreDb};
use proptest::prelude::*;

use super::*;

/// A store in a few words. Number `n` refers to lower numbers only.
#[derive(Debug, Clone)]
struct Sketch {
    paths: Vec<Sketched>,
}

#[derive(Debug, Clone, Default)]
struct Sketched {
    derivation: bool,
    references: BTreeSet<usize>,
    deriver: Option<usize>,
    outputs: BTreeSet<usize>,
}

impl Sketch {
    fn path(&self, n: usize) -> StorePath {
        let mut key = [0; 20];
        key[..8].copy_from_slice(&(n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        key[12..].copy_from_slice(&(n as u64).to_be_bytes());
        let name = if self.paths[n].derivation { format!("p{n}.drv") } else { format!("p{n}") };
        StorePath::new(HashPart::from_bytes(key), Name::new(&name).unwrap())
    }

    fn graph(&self) -> Graph {
        let dir = tempfile::tempdir().unwrap();
        let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Create)).unwrap();
        let mut batch = Batch::new();
        for (n, p) in self.paths.iter().enumerate() {
            let mut info = PathInfo::new(self.path(n), Sha256Digest([1; 32]), 10);
            info.references = p.references.iter().map(|r| self.path(*r)).collect();
            info.deriver = p.deriver.map(|d| self.path(d));
            let outputs: BTreeMap<String, StorePath> =
                p.outputs.iter().map(|o| (format!("o{o}"), self.path(*o))).collect();
            batch.push_info(&info, &outputs).unwrap();
        }
        db.register(batch).unwrap();
        db.read(Graph::load).unwrap()
    }

    /// What a path keeps.
    fn keeps(&self, n: usize, rules: Rules) -> BTreeSet<usize> {
        let p = &self.paths[n];
        let mut all = p.references.clone();
        if rules.keep_derivations {
            all.extend(p.deriver);
        }
        if rules.keep_outputs {
            all.extend(&p.outputs);
        }
        all
    }

    /// Goes over all paths until nothing changes.
    fn live(&self, roots: &BTreeSet<usize>, rules: Rules) -> BTreeSet<usize> {
        let mut live = roots.clone();
        loop {
            let before = live.len();
            let more: Vec<usize> = live.iter().flat_map(|n| self.keeps(*n, rules)).collect();
            live.extend(more);
            if live.len() == before {
                return live;
            }
        }
    }
}

fn sketch() -> impl Strategy<Value = Sketch> {
    let one = (any::<u8>(), any::<u32>(), any::<u32>(), any::<u16>());
    proptest::collection::vec(one, 1..24).prop_map(|all| {
        let count = all.len();
        let outputs_of = |n: usize| -> BTreeSet<usize> {
            let (kind, _, outputs, _) = all[n];
            if kind % 3 != 0 {
                return BTreeSet::new();
            }
            (0..count).filter(|o| outputs >> (o % 32) & 3 == 3).take(3).collect()
        };
        let paths = all.iter().enumerate().map(|(n, (kind, references, outputs, deriver))| {
            // Who names a deriver is an output of it: otherwise real Nix contradicts itself.
            let derivers: Vec<usize> = (0..count).filter(|d| outputs_of(*d).contains(&n)).collect();
            Sketched {
                derivation: kind % 3 == 0,
                references: (0..=n).filter(|r| references & outputs >> (r % 5) & 1 << (r % 32) != 0).collect(),
                deriver: derivers.get(usize::from(*deriver) % (derivers.len() + 1)).copied(),
                outputs: outputs_of(n),
            }
        });
        Sketch { paths: paths.collect() }
    })
}

const ALL_RULES: [Rules; 4] = [
    Rules { keep_outputs: false, keep_derivations: false },
    Rules { keep_outputs: false, keep_derivations: true },
    Rules { keep_outputs: true, keep_derivations: false },
    Rules { keep_outputs: true, keep_derivations: true },
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn live_is_what_the_reference_says(sketch in sketch(), roots in any::<u32>(), seed in any::<u64>()) {
        let graph = sketch.graph();
        let roots: BTreeSet<usize> = (0..sketch.paths.len()).filter(|n| roots >> (n % 32) & 3 == 3).collect();
        let node = |n: usize| graph.node(&sketch.path(n)).unwrap();
        for rules in ALL_RULES {
            let live = live(&graph, roots.iter().map(|n| node(*n)), rules);
            let wanted = sketch.live(&roots, rules);
            let found: BTreeSet<usize> = (0..sketch.paths.len()).filter(|n| live.contains(node(*n))).collect();
            prop_assert_eq!(&found, &wanted);

            // Backward it is the same relation.
            for n in 0..sketch.paths.len() {
                let keepers = graph.closure([node(n)], rules.kept_by());
                prop_assert_eq!(roots.iter().any(|root| keepers.contains(node(*root))), found.contains(&n));
            }

            let dead = complement(&graph, &live);
            prop_assert_eq!(dead.len() + live.len(), graph.len());
            let units = units(&graph, &dead, rules, seed);
            prop_assert_eq!(units.iter().count(), units.len());
            let mut left: BTreeSet<usize> = (0..sketch.paths.len()).filter(|n| !found.contains(n)).collect();
            for unit in units.iter() {
                let numbers: Vec<usize> =
                    unit.iter().map(|m| (0..sketch.paths.len()).find(|n| node(*n) == *m).unwrap()).collect();
                // Within a unit referrers go first, each path once.
                for n in &numbers {
                    prop_assert!(left.remove(n));
                    let used = |m: &usize| sketch.paths[*m].references.contains(n) && m != n;
                    prop_assert!(!left.iter().any(used));
                }
                // What is left keeps nothing that is gone, in any way.
                for n in &left {
                    prop_assert!(sketch.keeps(*n, rules).is_disjoint(&numbers.iter().copied().collect()));
                }
                // All of one unit keep each other.
                for n in &numbers {
                    let reach = sketch.live(&BTreeSet::from([*n]), rules);
                    prop_assert!(numbers.iter().all(|m| reach.contains(m)));
                }
            }
            prop_assert!(left.is_empty());
        }
    }
}

/// Derivation 2 with inputs 0 and 1, and outputs out (4, refers to dev), dev (3) and man (5); root: out.
/// Captured from real Nix (gc, section 2).
fn multi() -> Sketch {
    let p = Sketched::default;
    let drv = |references: &[usize], outputs: &[usize]| Sketched {
        derivation: true,
        references: references.iter().copied().collect(),
        outputs: outputs.iter().copied().collect(),
        deriver: None,
    };
    let out =
        |references: &[usize]| Sketched { references: references.iter().copied().collect(), deriver: Some(2), ..p() };
    Sketch { paths: vec![drv(&[], &[6]), p(), drv(&[0, 1], &[3, 4, 5]), out(&[]), out(&[3, 4]), out(&[]), p()] }
}

#[test]
fn the_captured_table() {
    let sketch = multi();
    let graph = sketch.graph();
    for ((keep_outputs, keep_derivations), wanted) in [
        ((false, true), &[0, 1, 2, 3, 4][..]),
        ((true, true), &[0, 1, 2, 3, 4, 5, 6]),
        ((true, false), &[3, 4]),
        ((false, false), &[3, 4]),
    ] {
        let live = live(&graph, graph.node(&sketch.path(4)), Rules { keep_outputs, keep_derivations });
        let found: Vec<usize> = (0..7).filter(|n| live.contains(graph.node(&sketch.path(*n)).unwrap())).collect();
        assert_eq!(found, wanted, "{keep_outputs} {keep_derivations}");
    }
}

#[test]
fn s085_cycles_are_one_unit() {
    let sketch = multi();
    let graph = sketch.graph();
    let rules = Rules { keep_outputs: true, keep_derivations: true };
    let node = |n: usize| graph.node(&sketch.path(n)).unwrap();
    for root in [3, 4, 5] {
        assert_eq!(live(&graph, [node(root)], rules).len(), 7, "any output keeps all");
    }
    let dead = complement(&graph, &NodeSet::new(&graph));
    let units = units(&graph, &dead, rules, 7);
    assert_eq!(units.iter().map(<[Node]>::len).max(), Some(4), "the derivation and its three outputs");
    let cycle = units.iter().find(|unit| unit.len() == 4).unwrap();
    let place = |n: usize| cycle.iter().position(|m| *m == node(n)).unwrap();
    assert!(place(4) < place(3), "out refers to dev");
}

#[test]
fn s070_only_the_recorded_deriver() {
    let mut paths = vec![Sketched { deriver: Some(500), ..Sketched::default() }];
    let outputs = BTreeSet::from([0]);
    paths.extend((0..1000).map(|_| Sketched { derivation: true, outputs: outputs.clone(), ..Sketched::default() }));
    let sketch = Sketch { paths };
    let graph = sketch.graph();
    let root = graph.node(&sketch.path(0));
    assert_eq!(live(&graph, root, Rules { keep_outputs: false, keep_derivations: true }).len(), 2);
}

#[test]
fn s071_cycles_through_fixed_outputs_end() {
    // F has two derivers, and the second has F among its inputs.
    let derivation = |references: &[usize]| Sketched {
        derivation: true,
        references: references.iter().copied().collect(),
        outputs: BTreeSet::from([0]),
        deriver: None,
    };
    let sketch =
        Sketch { paths: vec![Sketched { deriver: Some(2), ..Sketched::default() }, derivation(&[]), derivation(&[0])] };
    let graph = sketch.graph();
    let rules = Rules { keep_outputs: true, keep_derivations: true };
    let dead = complement(&graph, &NodeSet::new(&graph));
    let units = units(&graph, &dead, rules, 1);
    assert_eq!(units.iter().map(<[Node]>::len).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(live(&graph, graph.node(&sketch.path(0)), rules).len(), 2);
}

/// A chain as long as any store, and a path as wide: no recursion, on a small stack.
#[test]
fn s068_deep_and_wide() {
    const LENGTH: usize = 100_000;
    let chain =
        (0..LENGTH).map(|n| Sketched { references: n.checked_sub(1).into_iter().collect(), ..Sketched::default() });
    let wide = Sketched { references: (0..LENGTH).collect(), ..Sketched::default() };
    let sketch = Sketch { paths: chain.chain([wide]).collect() };
    let graph = sketch.graph();
    let small = std::thread::Builder::new().stack_size(128 << 10);
    let lengths = std::thread::scope(|scope| {
        let work = small.spawn_scoped(scope, || {
            let rules = Rules { keep_outputs: true, keep_derivations: true };
            let dead = complement(&graph, &NodeSet::new(&graph));
            let units = units(&graph, &dead, rules, 3);
            let first = units.iter().next().unwrap()[0];
            (live(&graph, [first], rules).len(), units.len())
        });
        work.unwrap().join().unwrap()
    });
    assert_eq!(lengths, (LENGTH + 1, LENGTH + 1), "the wide one goes first, and keeps all");
}

#[test]
fn shuffling_loses_nothing() {
    for seed in [0, 1, u64::MAX] {
        let mut things: Vec<u32> = (0..100).collect();
        shuffle(&mut things, seed);
        assert!(!things.is_sorted());
        things.sort_unstable();
        assert!(things.iter().copied().eq(0..100));
    }
}
