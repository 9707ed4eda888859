//! The ledger against a model of maps, by random changes.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::content_address::ContentAddress;
use larder_core::hash::Sha256Digest;
use larder_core::path_info::PathInfo;
use larder_core::signature::Signature;
use larder_core::store_path::StorePath;
use proptest::prelude::*;

use super::disk::Disk;
use super::{house, path};
use crate::graph::{Graph, Node, Walk, closure_of};
use crate::{Batch, DbError, Mode, OpenOptions, ReadTxn, StoreDb};

/// Number of paths; those from `FIRST_DRV` are derivations, and the last has the hash part of the
/// first with another name.
const PATHS: u8 = 14;
const FIRST_DRV: u8 = 9;
const TWIN: u8 = 13;

/// The path with a number.
fn nth(n: u8) -> StorePath {
    match n {
        TWIN => path(17, "twin"),
        FIRST_DRV.. => path(n.wrapping_mul(37).wrapping_add(17), &format!("pkg-{}.drv", n % 3)),
        _ => path(n.wrapping_mul(37).wrapping_add(17), &format!("pkg-{}{}", n % 3, ["", "-dev"][usize::from(n / 5)])),
    }
}

#[derive(Debug, Clone)]
struct Entry {
    n: u8,
    references: BTreeSet<u8>,
    deriver: Option<u8>,
    outputs: BTreeMap<String, u8>,
    contents: u8,
    signatures: BTreeSet<u8>,
    ultimate: bool,
    content_addressed: bool,
}

#[derive(Debug, Clone)]
enum Change {
    Register(Vec<Entry>),
    Invalidate(BTreeSet<u8>),
    Sign(u8, BTreeSet<u8>),
    SetContents(u8, u8),
    SetMeta(u8),
    Fail(u8),
    ClearFailed(u8),
    Realise(u8, u8),
    Reopen,
    /// The closure succeeds in all this and then gives an error.
    RolledBack(Vec<Entry>),
}

fn signature(n: u8) -> Signature {
    // One that is packed and some that are not.
    match n {
        0 => format!("key-1:{}A==", "Zm9v".repeat(21)).parse().unwrap(),
        1 => format!("key-1:{}A", "Zm9v".repeat(21)).parse().unwrap(),
        n => format!("key-{n}:short").parse().unwrap(),
    }
}

fn entry() -> impl Strategy<Value = Entry> {
    let references = prop_oneof![
        3 => prop::collection::btree_set(0u8..PATHS - 1, 0..2),
        1 => prop::collection::btree_set(0u8..PATHS, 0..5),
    ];
    let outputs = prop::collection::btree_map(prop_oneof!["out", "dev", "x"], 0u8..PATHS, 0..3);
    let bits = (any::<bool>(), any::<bool>());
    let signatures = prop::collection::btree_set(0u8..3, 0..3);
    (0u8..PATHS, references, prop::option::of(0u8..PATHS), outputs, any::<u8>(), signatures, bits).prop_map(
        |(n, references, deriver, outputs, contents, signatures, (ultimate, content_addressed))| Entry {
            n,
            references: references.into_iter().filter(|r| *r <= n || n % 4 == 0).collect(),
            deriver,
            outputs: if (FIRST_DRV..TWIN).contains(&n) { outputs } else { BTreeMap::new() },
            contents,
            signatures,
            ultimate,
            content_addressed,
        },
    )
}

fn change() -> impl Strategy<Value = Change> {
    let some = || prop::collection::btree_set(0u8..PATHS, 0..6);
    prop_oneof![
        8 => prop::collection::vec(entry(), 1..8).prop_map(Change::Register),
        4 => some().prop_map(Change::Invalidate),
        1 => (0u8..PATHS, prop::collection::btree_set(0u8..3, 1..3)).prop_map(|(n, s)| Change::Sign(n, s)),
        1 => (0u8..PATHS, any::<u8>()).prop_map(|(n, c)| Change::SetContents(n, c)),
        1 => any::<u8>().prop_map(Change::SetMeta),
        1 => (0u8..PATHS).prop_map(Change::Fail),
        1 => (0u8..PATHS).prop_map(Change::ClearFailed),
        1 => (0u8..3, any::<u8>()).prop_map(|(n, v)| Change::Realise(n, v)),
        1 => Just(Change::Reopen),
        1 => prop::collection::vec(entry(), 1..4).prop_map(Change::RolledBack),
    ]
}

/// What the ledger ought to hold.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    valid: BTreeMap<StorePath, PathInfo>,
    outputs: BTreeMap<StorePath, BTreeMap<String, StorePath>>,
    failed: BTreeMap<StorePath, u64>,
    realisations: BTreeMap<String, Vec<u8>>,
    meta: Option<Vec<u8>>,
    clock_s: u64,
}

fn batch(entries: &[Entry], time_s: u64) -> Batch {
    let mut batch = Batch::new();
    for entry in entries {
        let (info, outputs) = record(entry, time_s);
        batch.push_info(&info, &outputs).unwrap();
    }
    batch
}

fn record(entry: &Entry, time_s: u64) -> (PathInfo, BTreeMap<String, StorePath>) {
    let info = PathInfo {
        path: nth(entry.n),
        nar_hash: Sha256Digest([entry.contents; 32]),
        nar_size_bytes: u64::from(entry.contents) << 30,
        references: entry.references.iter().map(|r| nth(*r)).collect(),
        deriver: entry.deriver.map(nth),
        registration_time_s: time_s,
        ultimate: entry.ultimate,
        signatures: entry.signatures.iter().map(|s| signature(*s)).collect(),
        content_address: entry.content_addressed.then_some(ContentAddress::Text(Sha256Digest([entry.contents; 32]))),
    };
    (info, entry.outputs.iter().map(|(name, n)| (name.clone(), nth(*n))).collect())
}

impl Model {
    /// Registers, or gives false and changes nothing.
    fn register(&mut self, entries: &[Entry]) -> bool {
        let mut next = self.clone();
        next.clock_s += 1;
        let last: BTreeMap<u8, &Entry> = entries.iter().map(|entry| (entry.n, entry)).collect();
        for entry in last.values() {
            let (mut info, outputs) = record(entry, next.clock_s);
            if let Some(old) = next.valid.get(&info.path) {
                info.registration_time_s = old.registration_time_s;
                info.deriver.clone_from(&old.deriver);
                info.references.extend(old.references.iter().cloned());
            }
            if !outputs.is_empty() {
                next.outputs.insert(info.path.clone(), outputs);
            }
            next.valid.insert(info.path.clone(), info);
        }
        let parts: BTreeSet<_> = next.valid.keys().map(StorePath::hash_part).collect();
        let all_there = next.valid.values().all(|info| info.references.iter().all(|r| next.valid.contains_key(r)));
        let fine = parts.len() == next.valid.len() && all_there && next.order().is_some();
        if fine {
            *self = next;
        }
        fine
    }

    /// The order of `-qR` over everything; `None` if there is a cycle.
    fn order(&self) -> Option<Vec<StorePath>> {
        fn visit(
            model: &Model,
            path: &StorePath,
            open: &mut BTreeSet<StorePath>,
            order: &mut Vec<StorePath>,
        ) -> Option<()> {
            if order.contains(path) {
                return Some(());
            }
            if !open.insert(path.clone()) {
                return None;
            }
            for reference in model.valid[path].references.iter().filter(|r| *r != path) {
                visit(model, reference, open, order)?;
            }
            open.remove(path);
            order.push(path.clone());
            Some(())
        }
        let mut order = Vec::new();
        for path in self.valid.keys() {
            visit(self, path, &mut BTreeSet::new(), &mut order)?;
        }
        Some(order)
    }

    fn referrers(&self, path: &StorePath) -> Vec<StorePath> {
        let refers = |info: &&PathInfo| info.references.contains(path);
        self.valid.values().filter(refers).map(|info| info.path.clone()).collect()
    }

    fn derivers(&self, path: &StorePath) -> Vec<StorePath> {
        let makes = |(_, outputs): &(&StorePath, &BTreeMap<String, StorePath>)| outputs.values().any(|o| o == path);
        self.outputs.iter().filter(makes).map(|(derivation, _)| derivation.clone()).collect()
    }

    fn next(&self, path: &StorePath, walk: Walk) -> BTreeSet<StorePath> {
        let mut next = BTreeSet::new();
        let names_as_deriver =
            |output: &StorePath| self.valid.get(output).is_some_and(|info| info.deriver.as_ref() == Some(path));
        let outputs = self.outputs.get(path).into_iter().flat_map(BTreeMap::values).cloned();
        if walk.backward {
            next.extend(self.referrers(path));
            if walk.outputs {
                next.extend(self.derivers(path));
            }
            if walk.derivers {
                next.extend(outputs.filter(|output| names_as_deriver(output)));
            }
        } else {
            next.extend(self.valid[path].references.iter().cloned());
            if walk.outputs {
                next.extend(outputs);
            }
            if walk.derivers {
                next.extend(self.valid[path].deriver.clone());
            }
        }
        next.retain(|path| self.valid.contains_key(path));
        next
    }

    fn closure(&self, roots: &[StorePath], walk: Walk) -> BTreeSet<StorePath> {
        let mut closure: BTreeSet<StorePath> = roots.iter().cloned().collect();
        let mut rest = roots.to_vec();
        while let Some(path) = rest.pop() {
            rest.extend(self.next(&path, walk).into_iter().filter(|next| closure.insert(next.clone())));
        }
        closure
    }

    /// Does what is asked and checks the answer.
    fn apply(&mut self, db: &StoreDb, change: &Change) -> Result<(), TestCaseError> {
        match change {
            Change::Register(entries) => {
                let before = self.clone();
                let result = db.register(batch(entries, self.clock_s + 1));
                let expected = self.register(entries);
                prop_assert_eq!(result.is_ok(), expected, "{:?} on {:?}", result, before);
                if let Err(error) = result {
                    let known = matches!(
                        error,
                        DbError::NotValid { .. } | DbError::Cycle { .. } | DbError::HashPartTaken { .. }
                    );
                    prop_assert!(known, "{error}");
                }
            }
            Change::RolledBack(entries) => {
                let result = db.write(|w| {
                    w.register(batch(entries, self.clock_s + 1))?;
                    w.set_meta("model", b"rolled back")?;
                    Err::<(), _>(DbError::Inconsistent { detail: "on purpose".to_owned() })
                });
                prop_assert!(result.is_err());
            }
            Change::Invalidate(numbers) => {
                let paths: BTreeSet<StorePath> = numbers.iter().map(|n| nth(*n)).collect();
                let result = db.write(|w| w.invalidate(&paths));
                let doomed: Vec<StorePath> = paths.iter().filter(|p| self.valid.contains_key(*p)).cloned().collect();
                let users: BTreeSet<StorePath> = doomed.iter().flat_map(|p| self.referrers(p)).collect();
                if users.iter().all(|user| paths.contains(user)) {
                    prop_assert_eq!(result.unwrap(), doomed.len());
                    for path in doomed {
                        self.valid.remove(&path);
                        self.outputs.remove(&path);
                    }
                } else {
                    let refused =
                        matches!(&result, Err(DbError::InUse { by, .. }) if by.iter().all(|p| users.contains(p)));
                    prop_assert!(refused, "{:?}", result);
                }
            }
            Change::Sign(n, signatures) => {
                let signatures: BTreeSet<Signature> = signatures.iter().map(|s| signature(*s)).collect();
                let result = db.write(|w| w.add_signatures(&nth(*n), &signatures));
                prop_assert_eq!(result.is_ok(), self.valid.contains_key(&nth(*n)));
                if let Some(info) = self.valid.get_mut(&nth(*n)) {
                    info.signatures.extend(signatures);
                }
            }
            Change::SetContents(n, contents) => {
                let hash = Sha256Digest([*contents; 32]);
                let result = db.write(|w| w.set_contents(&nth(*n), hash, 5));
                prop_assert_eq!(result.is_ok(), self.valid.contains_key(&nth(*n)));
                if let Some(info) = self.valid.get_mut(&nth(*n)) {
                    (info.nar_hash, info.nar_size_bytes) = (hash, 5);
                }
            }
            Change::SetMeta(value) => {
                db.write(|w| w.set_meta("model", &[*value])).unwrap();
                self.meta = Some(vec![*value]);
            }
            Change::Fail(n) => {
                db.write(|w| w.set_failed(&nth(*n), 7)).unwrap();
                self.failed.insert(nth(*n), 7);
            }
            Change::ClearFailed(n) => {
                let cleared = db.write(|w| w.clear_failed(&nth(*n))).unwrap();
                prop_assert_eq!(cleared, self.failed.remove(&nth(*n)).is_some());
            }
            Change::Realise(n, value) => {
                db.write(|w| w.set_realisation(&format!("sha256:{n}!out"), &[*value])).unwrap();
                self.realisations.insert(format!("sha256:{n}!out"), vec![*value]);
            }
            Change::Reopen => {}
        }
        Ok(())
    }

    /// Compares every answer of the ledger.
    fn compare(&self, r: &ReadTxn) -> Result<(), TestCaseError> {
        let all: Vec<StorePath> = (0..PATHS).map(nth).collect();
        prop_assert_eq!(r.check().unwrap(), []);
        prop_assert_eq!(r.count().unwrap(), self.valid.len() as u64);
        prop_assert_eq!(r.all_paths().unwrap(), self.valid.keys().cloned().collect::<Vec<_>>());
        prop_assert_eq!(r.infos(&all).unwrap(), all.iter().map(|p| self.valid.get(p).cloned()).collect::<Vec<_>>());
        let subset = r.valid_subset(&all.iter().cloned().collect()).unwrap();
        prop_assert_eq!(subset, self.valid.keys().cloned().collect());
        prop_assert_eq!(
            r.total_nar_size_bytes().unwrap(),
            self.valid.values().map(|info| info.nar_size_bytes).sum::<u64>()
        );
        for path in &all {
            let info = self.valid.get(path);
            prop_assert_eq!(r.is_valid(path).unwrap(), info.is_some());
            prop_assert_eq!(r.info(path).unwrap(), info.cloned());
            prop_assert_eq!(r.references(path).unwrap(), info.map(|i| i.references.iter().cloned().collect()));
            prop_assert_eq!(r.referrers(path).unwrap(), info.map(|_| self.referrers(path)));
            let by_hash = self.valid.keys().find(|p| p.hash_part() == path.hash_part());
            prop_assert_eq!(r.by_hash_part(path.hash_part()).unwrap(), by_hash.cloned());
            prop_assert_eq!(r.valid_derivers(path).unwrap(), self.derivers(path));
            let outputs = self.outputs.get(path).cloned().unwrap_or_default();
            prop_assert_eq!(r.derivation_outputs(path).unwrap(), outputs);
            prop_assert_eq!(r.failed(path).unwrap(), self.failed.get(path).copied());
        }
        let failed: Vec<_> = self.failed.clone().into_iter().collect();
        prop_assert_eq!(r.failed_paths().unwrap(), failed);
        prop_assert_eq!(r.realisations().unwrap(), self.realisations.clone().into_iter().collect::<Vec<_>>());
        prop_assert_eq!(r.meta("model").unwrap(), self.meta.clone());
        self.compare_graphs(r)
    }

    fn compare_graphs(&self, r: &ReadTxn) -> Result<(), TestCaseError> {
        let graph = Graph::load(r).unwrap();
        let paths = |graph: &Graph, nodes: &[Node]| nodes.iter().map(|n| graph.path(*n)).collect::<Vec<_>>();
        prop_assert_eq!(
            paths(&graph, &graph.nodes().collect::<Vec<_>>()),
            self.valid.keys().cloned().collect::<Vec<_>>()
        );
        prop_assert_eq!(paths(&graph, &graph.topological_all().unwrap()), self.order().unwrap());
        for bits in 0..8u8 {
            let walk = Walk { backward: bits & 1 != 0, outputs: bits & 2 != 0, derivers: bits & 4 != 0 };
            let full = |graph: &Graph, root| {
                let set = graph.closure([root], walk);
                set.iter().map(|n| graph.path(n)).collect::<BTreeSet<_>>()
            };
            for path in (0..PATHS).map(nth) {
                let roots = std::slice::from_ref(&path);
                let part = closure_of(r, roots, walk);
                if !self.valid.contains_key(&path) {
                    let refused = matches!(part, Err(DbError::NotValid { .. }));
                    prop_assert!(refused);
                    prop_assert_eq!(graph.node(&path), None);
                    continue;
                }
                let expected = self.closure(roots, walk);
                prop_assert_eq!(&full(&graph, graph.node(&path).unwrap()), &expected, "{:?} from {}", walk, path);
                let part = part.unwrap();
                let members: BTreeSet<StorePath> = part.nodes().map(|n| part.path(n)).collect();
                prop_assert_eq!(&members, &expected, "{:?} from {}", walk, path);
                for node in part.nodes() {
                    let info = &self.valid[&part.path(node)];
                    let within: Vec<StorePath> = info.references.intersection(&expected).cloned().collect();
                    prop_assert_eq!(paths(&part, &part.references(node).collect::<Vec<_>>()), within);
                    let deriver = info.deriver.clone().filter(|d| expected.contains(d));
                    prop_assert_eq!(part.deriver(node).map(|n| part.path(n)), deriver);
                    prop_assert_eq!(part.nar_size_bytes(node), info.nar_size_bytes);
                }
            }
        }
        Ok(())
    }
}

fn run(changes: &[Change], open: impl Fn() -> StoreDb) -> Result<(), TestCaseError> {
    let mut model = Model::default();
    let mut db = open();
    for change in changes {
        if matches!(change, Change::Reopen) {
            db.close().unwrap();
            db = open();
        }
        model.apply(&db, change)?;
        db.read(|r| Ok::<_, DbError>(model.compare(r))).unwrap()?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn the_ledger_is_its_model(changes in prop::collection::vec(change(), 1..24)) {
        let disk = Disk::default();
        run(&changes, || StoreDb::on_disk(&disk).unwrap())?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3, ..ProptestConfig::default() })]

    /// The same on files, with reads through a handle of their own.
    #[test]
    fn the_ledger_is_its_model_on_files(changes in prop::collection::vec(change(), 1..12)) {
        let (dir, db) = house();
        drop(db);
        run(&changes, || StoreDb::open(dir.path(), &OpenOptions::new(Mode::Existing)).unwrap())?;
    }
}
