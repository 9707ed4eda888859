//! The ledger from outside, case by case.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};

use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::store_path::{Name, StorePath};

use super::disk::Disk;
use super::{batch, house, info, path, set};
use crate::check::Finding;
use crate::graph::Graph;
use crate::open::Schema;
use crate::tables::{META, OUTPUTS, PATHS, REFERRERS, pair};
use crate::{Batch, DbError, Mode, NewPath, OpenOptions, PathRef, ReadTxn, StoreDb, Walk, graph};

#[test]
fn registered_paths_are_found_again() {
    let (dir, db) = house();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let infos = [info(&a, &[&b, &a]), info(&b, &[&c]), info(&c, &[])];
    db.register(batch(&infos)).unwrap();
    db.close().unwrap();
    let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::ReadOnly)).unwrap();
    for info in &infos {
        assert_eq!(db.read(|r| r.info(&info.path)).unwrap().as_ref(), Some(info));
    }
    assert_eq!(db.read(|r| r.referrers(&a)).unwrap(), Some(vec![a.clone()]));
    assert_eq!(db.read(|r| r.referrers(&c)).unwrap(), Some(vec![b.clone()]));
    assert_eq!(db.read(|r| r.info(&path(1, "other"))).unwrap(), None);
    let graph = db.read(|r| graph::closure_of(r, std::slice::from_ref(&b), Walk::REFERENCES)).unwrap();
    let names: Vec<String> = graph.topological_all().unwrap().into_iter().map(|n| graph.base_name(n)).collect();
    assert_eq!(names, [c.to_string(), b.to_string()]);
    assert!(matches!(db.write(|w| w.set_meta("x", b"y")), Err(DbError::ReadOnly { .. })));
}

/// Records make the graph that the ledger gives of them, and what does not fit is left out.
#[test]
fn a_graph_of_records_is_that_of_the_ledger() {
    let (_dir, db) = house();
    let (a, b, c, drv) = (path(9, "a"), path(2, "b"), path(7, "c"), path(1, "b.drv"));
    let mut infos = [info(&a, &[&b, &a, &c]), info(&b, &[&c]), info(&c, &[]), info(&drv, &[&c])];
    infos[1].deriver = Some(drv.clone());
    infos[2].deriver = Some(path(4, "gone.drv"));
    let outputs = [("out", &b), ("man", &path(5, "unbuilt"))];
    let mut all = batch(&infos[..3]);
    let named = outputs.iter().map(|(name, path)| ((*name).to_owned(), (*path).clone())).collect();
    all.push_info(&infos[3], &named).unwrap();
    db.register(all).unwrap();
    let ledger = db.read(Graph::load).unwrap();
    let outputs = BTreeMap::from([(drv.clone(), outputs.iter().map(|(_, path)| (*path).clone()).collect())]);
    let stranger = info(&path(9, "other"), &[&path(6, "nowhere")]);
    let told = Graph::of_records(infos.iter().chain([&stranger]), &outputs).unwrap();
    let names = |graph: &Graph| graph.nodes().map(|node| graph.path(node)).collect::<Vec<_>>();
    assert_eq!(names(&told), names(&ledger));
    assert_eq!(told.topological_all().unwrap(), ledger.topological_all().unwrap());
    for node in ledger.nodes() {
        assert_eq!(told.nar_size_bytes(node), ledger.nar_size_bytes(node));
        for bits in 0..8 {
            let walk = Walk { backward: bits & 1 != 0, outputs: bits & 2 != 0, derivers: bits & 4 != 0 };
            assert_eq!(told.closure([node], walk), ledger.closure([node], walk), "{walk:?}");
        }
    }
    assert!(Graph::of_records([], &BTreeMap::new()).unwrap().is_empty());
}

#[test]
fn nothing_is_left_dangling() {
    let (_dir, db) = house();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let error = db.register(batch(&[info(&a, &[&b])])).unwrap_err();
    assert_eq!(error.to_string(), format!("path '{b}' is not valid"));
    let error = db.register(batch(&[info(&a, &[&b]), info(&b, &[&a])])).unwrap_err();
    assert_eq!(error.to_string(), format!("cycle detected in the references of '{a}' from '{b}'"));
    db.register(batch(&[info(&a, &[&b]), info(&c, &[&b, &a]), info(&b, &[])])).unwrap();
    let error = db.write(|w| w.invalidate(&set([&b]))).unwrap_err();
    assert_eq!(error.to_string(), format!("cannot delete path '{b}' because it is in use by '{a}', '{c}'"));
    // A cycle through a reference that was there before.
    let error = db.register(batch(&[info(&b, &[&c])])).unwrap_err();
    assert_eq!(error.to_string(), format!("cycle detected in the references of '{b}' from '{a}'"));
    assert_eq!(db.write(|w| w.invalidate(&set([&a, &b, &c]))).unwrap(), 3);
    assert_eq!(db.read(ReadTxn::count).unwrap(), 0);
    assert_eq!(db.check().unwrap(), []);
}

/// Registering again keeps time and deriver, replaces the contents, and adds references, as
/// `--load-db` of Nix 2.8 does.
#[test]
fn registering_again_adds_and_replaces() {
    let (_dir, db) = house();
    let (a, b, c) = (path(1, "a"), path(2, "b"), path(3, "c"));
    let mut first = info(&a, &[&b]);
    (first.registration_time_s, first.deriver) = (5, Some(path(8, "a.drv")));
    first.signatures = BTreeSet::from(["key:text".parse().unwrap()]);
    db.register(batch(&[first.clone(), info(&b, &[]), info(&c, &[])])).unwrap();
    let mut again = info(&a, &[&c]);
    (again.registration_time_s, again.deriver, again.nar_size_bytes) = (9, Some(path(9, "other.drv")), 11);
    db.register(batch(&[again.clone()])).unwrap();
    let found = db.read(|r| r.info(&a)).unwrap().unwrap();
    assert_eq!((found.registration_time_s, &found.deriver), (5, &first.deriver));
    assert_eq!((found.nar_size_bytes, &found.references), (11, &set([&b, &c])));
    assert_eq!(found.signatures, BTreeSet::new());
    assert_eq!(db.read(|r| r.referrers(&b)).unwrap(), Some(vec![a.clone()]));
    assert_eq!(db.check().unwrap(), []);
    // Of two records of one path the later counts.
    db.register(batch(&[info(&path(4, "d"), &[&path(66, "nowhere")]), info(&path(4, "d"), &[&c])])).unwrap();
    assert_eq!(db.read(|r| r.references(&path(4, "d"))).unwrap(), Some(vec![c]));
}

#[test]
fn one_hash_part_is_one_path() {
    let (_dir, db) = house();
    let (one, two) = (path(1, "one"), path(1, "two"));
    let text = format!("path '{two}' has the hash part of the valid path '{one}'");
    assert_eq!(db.register(batch(&[info(&one, &[]), info(&two, &[])])).unwrap_err().to_string(), text);
    db.register(batch(&[info(&one, &[])])).unwrap();
    assert_eq!(db.register(batch(&[info(&two, &[])])).unwrap_err().to_string(), text);
    let error = db.register(batch(&[info(&path(2, "x"), &[&two])])).unwrap_err();
    assert_eq!(error.to_string(), format!("path '{two}' is not valid"));
    assert_eq!(db.write(|w| w.invalidate(&set([&two]))).unwrap(), 0);
    assert!(db.read(|r| r.is_valid(&one)).unwrap());
}

/// A path of a large ledger; `n` may have any order.
fn numbered(n: u32) -> StorePath {
    let digest = Sha256Digest::of(&n.to_le_bytes());
    let hash_part = HashPart::from_bytes(*digest.as_bytes().first_chunk().unwrap());
    StorePath::new(hash_part, Name::new(&format!("path-{n}")).unwrap())
}

/// Paths that refer to five others, the hub among them.
fn crowd(numbers: impl Iterator<Item = u32>) -> Batch {
    let mut batch = Batch::new();
    for n in numbers {
        let references: Vec<StorePath> = [0, n / 2, n / 3, n.saturating_sub(1), n]
            .into_iter()
            .filter(|r| *r < n || n % 2 == 0)
            .map(numbered)
            .collect();
        let references: Vec<PathRef<'_>> = references.iter().map(PathRef::from).collect();
        let path = numbered(n);
        let new = NewPath::new(PathRef::from(&path), Sha256Digest([1; 32]), 1000);
        batch.push(&NewPath { references: &references, ..new }).unwrap();
    }
    batch
}

#[test]
fn a_large_batch_is_merged_into_what_is_there() {
    let (_dir, db) = house();
    // A few, then as many as are put in through runs, then some that fall between them.
    for part in [0..10, 10..4000, 4000..5000] {
        db.register(crowd(part)).unwrap();
    }
    assert_eq!(db.check().unwrap(), []);
    let (_dir, whole) = house();
    whole.register(crowd(0..5000)).unwrap();
    let all = |db: &StoreDb| db.read(|r| r.infos(&r.all_paths()?)).unwrap();
    assert_eq!(all(&db), all(&whole));
    assert_eq!(db.read(|r| r.referrers(&numbered(0))).unwrap().unwrap().len(), 5000);
    // Many, few and none of them at once, in any order.
    for step in [1, 7, 4999] {
        let some: Vec<StorePath> = (0..6000).rev().step_by(step).map(numbered).collect();
        let infos = db.read(|r| r.infos(&some)).unwrap();
        for (path, info) in some.iter().zip(infos) {
            let number: u32 = path.name().as_str()[5..].parse().unwrap();
            assert_eq!(info.map(|info| info.path), (number < 5000).then(|| path.clone()));
        }
    }
}

/// The hash part alone leads to the path, by one lookup however many there are.
#[test]
fn s095_a_hash_part_leads_to_its_path() {
    let (_dir, db) = house();
    db.register(crowd(0..5000)).unwrap();
    db.read(|r| {
        for n in 0..5000 {
            assert_eq!(r.by_hash_part(numbered(n).hash_part())?, Some(numbered(n)));
        }
        assert_eq!(r.by_hash_part(numbered(5000).hash_part())?, None);
        Ok::<_, DbError>(())
    })
    .unwrap();
}

/// A reader that has stopped in the middle of its output holds no snapshot, so deleting
/// everything a few paths at a time does not make the file grow.
#[test]
fn s001_a_paused_reader_does_not_make_the_file_grow() {
    let (dir, db) = house();
    db.register(crowd(0..30_000)).unwrap();
    db.close().unwrap();
    let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Existing)).unwrap();
    let size = || fs::metadata(db.path()).unwrap().len();
    let before = size();
    let reader = StoreDb::open(dir.path(), &OpenOptions::new(Mode::ReadOnly)).unwrap();
    let mut hashes = Vec::new();
    let graph = reader
        .read(|r| {
            Graph::load_with(r, |view| {
                hashes.push(view.nar_hash);
                Ok::<_, DbError>(())
            })
        })
        .unwrap();
    let mut output = graph.nodes().zip(hashes).map(|(node, hash)| format!("{}{hash}", graph.base_name(node)));
    assert!(output.next().is_some());
    // The output is stuck here; the collector works, referrers first.
    for some in (0..30_000).rev().collect::<Vec<_>>().chunks(60) {
        let paths: BTreeSet<StorePath> = some.iter().map(|n| numbered(*n)).collect();
        assert_eq!(db.write(|w| w.invalidate(&paths)).unwrap(), some.len());
        // By one step at most, which of a ledger of 100k paths is a tenth.
        assert!(size() <= before + (8 << 20), "the file grew from {before} to {} bytes", size());
    }
    assert_eq!(output.count(), 29_999);
    assert_eq!(db.read(ReadTxn::count).unwrap(), 0);
}

fn step_to_2(txn: &redb::WriteTransaction) -> Result<(), DbError> {
    txn.open_table(META)?.insert("upgraded", [2u8].as_slice())?;
    Ok(())
}

fn step_to_3(txn: &redb::WriteTransaction) -> Result<(), DbError> {
    use redb::ReadableTable as _;

    let mut meta = txn.open_table(META)?;
    let was = meta.get("upgraded")?.map(|value| value.value().to_vec());
    assert_eq!(was, Some(vec![2]));
    meta.insert("upgraded", [3u8].as_slice())?;
    Ok(())
}

fn step_that_fails(txn: &redb::WriteTransaction) -> Result<(), DbError> {
    step_to_2(txn)?;
    Err(DbError::Inconsistent { detail: "on purpose".to_owned() })
}

#[test]
fn an_old_schema_is_upgraded_and_a_new_one_refused() {
    static THREE: Schema = Schema { version: 3, steps: &[(1, step_to_2), (2, step_to_3)] };
    static FAILING: Schema = Schema { version: 2, steps: &[(1, step_that_fails)] };
    static NO_WAY: Schema = Schema { version: 2, steps: &[] };
    let (dir, db) = house();
    let a = path(1, "a");
    db.register(batch(&[info(&a, &[])])).unwrap();
    let open = |mode, schema| StoreDb::open_with(dir.path(), &OpenOptions::new(mode), schema).unwrap();
    let meta = |db: &StoreDb| db.read(|r| r.meta("upgraded"));

    let error = meta(&open(Mode::ReadOnly, &THREE)).unwrap_err();
    assert!(matches!(error, DbError::SchemaTooOld { found: 1, supported: 3 }), "{error}");
    assert!(matches!(meta(&open(Mode::Existing, &NO_WAY)), Err(DbError::SchemaTooOld { found: 1, supported: 2 })));
    assert!(matches!(meta(&open(Mode::Existing, &FAILING)), Err(DbError::Inconsistent { .. })));
    assert_eq!(meta(&db).unwrap(), None, "a step that failed has left traces");

    assert_eq!(meta(&open(Mode::Existing, &THREE)).unwrap(), Some(vec![3]));
    assert!(open(Mode::ReadOnly, &THREE).read(|r| r.is_valid(&a)).unwrap());
    // A program from before, even one that had the file open, neither reads nor writes it now.
    let text = "current Nix store schema is version 3, but I only support 1";
    assert_eq!(meta(&db).unwrap_err().to_string(), text);
    assert_eq!(db.write(|w| w.set_meta("x", b"y")).unwrap_err().to_string(), text);
    let fresh = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Create)).unwrap();
    assert_eq!(meta(&fresh).unwrap_err().to_string(), text);
}

#[test]
fn what_is_no_ledger_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = |mode| StoreDb::open(dir.path(), &OpenOptions::new(mode));
    assert!(matches!(open(Mode::ReadOnly), Err(DbError::Missing { .. })));
    assert!(matches!(open(Mode::Existing), Err(DbError::Missing { .. })));
    let file = dir.path().join("larder.redb");
    let empty = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Create)).unwrap();
    let good = fs::read(empty.path()).unwrap();
    drop(empty);
    let mut bad_start = good.clone();
    bad_start[..64].fill(0x55);
    for (what, bytes) in [
        ("nothing", &b""[..]),
        ("a little", b"hello"),
        ("a text", "once upon a time ".repeat(1000).as_bytes()),
        ("zeros", &vec![0; 1 << 16]),
        ("a bad start", &bad_start),
        ("half a file", &good[..good.len() / 2]),
    ] {
        fs::write(&file, bytes).unwrap();
        for mode in [Mode::ReadOnly, Mode::Existing, Mode::Create] {
            let db = open(mode).unwrap();
            let read = db.read(ReadTxn::count);
            if what != "half a file" {
                assert!(matches!(read, Err(DbError::Corrupt { .. })), "{what}, {mode:?}: {read:?}");
            }
            if mode != Mode::ReadOnly {
                let written = db.write(|w| w.set_meta("x", b"y"));
                assert!(matches!(written, Err(DbError::Corrupt { .. })), "{what}, {mode:?}: {written:?}");
            }
        }
        assert_eq!(fs::read(&file).unwrap(), bytes, "{what} was written to");
    }
}

/// Damage anywhere in the file gives errors or wrong answers, never a panic of ours. (redb itself
/// asserts in debug builds that what it reads is what it wrote, so there they are let pass.)
#[test]
fn damage_gives_errors() {
    let disk = Disk::default();
    let db = StoreDb::on_disk(&disk).unwrap();
    db.register(crowd(0..400)).unwrap();
    db.close().unwrap();
    let good = disk.image();
    let used = good.iter().rposition(|b| *b != 0).unwrap();
    let (mut errors, mut panics) = (0, 0);
    for n in 0..400usize {
        let mut bad = good.clone();
        let at = (n * 7919) % used;
        bad[at] ^= 1 << (n % 8);
        bad[(at + 20 * n) % used] = 0xff;
        let ask = || -> Result<(), DbError> {
            let db = StoreDb::on_disk(&Disk::of(bad.clone()))?;
            db.read(|r| {
                r.check()?;
                let all = r.all_paths()?;
                r.infos(&all)?;
                Graph::load(r)?.topological_all()?;
                Ok(())
            })
        };
        match catch_unwind(AssertUnwindSafe(ask)) {
            Ok(Ok(())) => {}
            Ok(Err(_)) => errors += 1,
            Err(_) => panics += 1,
        }
    }
    println!("{errors} errors, {panics} panics");
    assert!(errors > 0);
    assert!(panics == 0 || cfg!(debug_assertions));
}

#[test]
fn a_full_disk_is_an_error_and_no_more() {
    let disk = Disk::default();
    let db = StoreDb::on_disk(&disk).unwrap();
    db.register(crowd(0..50)).unwrap();
    for room in [0, 1, 2, 5, 20, 60] {
        disk.set_room(Some(room));
        let result = db.register(crowd(50..1500));
        assert!(matches!(&result, Err(DbError::Storage { .. })), "{room}: {result:?}");
        // Reading goes on while the disk is full...
        assert_eq!(db.read(ReadTxn::count).unwrap(), 50, "{room}");
        disk.set_room(None);
        // ... and writing as soon as there is room.
        db.write(|w| w.set_meta("room", &[1; 100])).unwrap();
        assert_eq!(db.check().unwrap(), []);
    }
    db.register(crowd(50..1500)).unwrap();
    assert_eq!(db.read(ReadTxn::count).unwrap(), 1500);
}

#[test]
fn the_check_finds_and_repairs() {
    let (dir, db) = house();
    let (a, b, drv) = (path(1, "a"), path(2, "b"), path(3, "a.drv"));
    let mut records = Batch::new();
    records.push_info(&info(&a, &[&b]), &[].into()).unwrap();
    records.push_info(&info(&b, &[]), &[].into()).unwrap();
    records.push_info(&info(&drv, &[]), &[("out".to_owned(), a.clone())].into()).unwrap();
    db.register(records).unwrap();
    db.close().unwrap();
    // What no transaction of ours does.
    let spoil = |f: &dyn Fn(&redb::WriteTransaction)| {
        let mut builder = redb::Builder::new();
        builder.set_concurrency_mode(redb::ConcurrencyMode::MultiWriter);
        let file = builder.open(dir.path().join("larder.redb")).unwrap();
        let txn = file.begin_write().unwrap();
        f(&txn);
        txn.commit().unwrap();
        file.close().unwrap();
        StoreDb::open(dir.path(), &OpenOptions::new(Mode::Existing)).unwrap()
    };
    let (key_a, key_b) = (*a.hash_part().as_bytes(), *b.hash_part().as_bytes());
    let db = spoil(&|txn| {
        let mut referrers = txn.open_table(REFERRERS).unwrap();
        referrers.remove(&pair(&key_b, &key_a)).unwrap();
        referrers.insert(&pair(&key_a, &key_b), ()).unwrap();
        txn.open_table(OUTPUTS).unwrap().insert([key_b.as_slice(), b"out"].concat().as_slice(), &key_a[..]).unwrap();
    });
    let expected = [
        Finding::StrayOutput { derivation: b.hash_part(), output: "out".to_owned() },
        Finding::Referrers { reference: a.hash_part(), referrer: b.hash_part(), listed: true },
        Finding::Referrers { reference: b.hash_part(), referrer: a.hash_part(), listed: false },
    ];
    assert_eq!(db.check().unwrap(), expected);
    assert_eq!(db.repair().unwrap(), expected);
    assert_eq!(db.check().unwrap(), []);
    assert_eq!(db.read(|r| r.referrers(&b)).unwrap(), Some(vec![a.clone()]));
    db.close().unwrap();

    let db = spoil(&|txn| {
        txn.open_table(PATHS).unwrap().remove(&key_b).unwrap();
    });
    let dangling = Finding::DanglingReference { path: a.hash_part(), reference: b.hash_part() };
    assert_eq!(db.check().unwrap(), std::slice::from_ref(&dangling));
    // It cannot be repaired but by registering the lost path again.
    assert_eq!(db.repair().unwrap(), std::slice::from_ref(&dangling));
    assert!(matches!(db.read(|r| r.info(&a)), Err(DbError::Inconsistent { .. })));
    db.register(batch(&[info(&b, &[])])).unwrap();
    assert_eq!(db.check().unwrap(), []);
}

#[test]
fn a_write_inside_a_write_is_a_bug_that_shows() {
    let (_dir, db) = house();
    let nested = catch_unwind(AssertUnwindSafe(|| {
        let _ = db.write(|_| db.write(|w| w.set_meta("x", b"y")));
    }));
    assert!(nested.is_err());
    // The panic has undone the outer one, and the ledger is as usable as before.
    db.write(|w| w.set_meta("x", b"z")).unwrap();
    assert_eq!(db.read(|r| r.meta("x")).unwrap().as_deref(), Some(&b"z"[..]));
    assert_eq!(db.check().unwrap(), []);
}

/// Threads of one process share a ledger.
#[test]
fn threads_take_turns() {
    let (_dir, db) = house();
    std::thread::scope(|scope| {
        for n in 0..4u8 {
            let db = &db;
            scope.spawn(move || {
                for m in 0..10 {
                    let own = path(n * 20 + m + 1, "own");
                    db.register(batch(&[info(&own, &[])])).unwrap();
                    assert!(db.read(|r| r.is_valid(&own)).unwrap());
                }
            });
        }
    });
    assert_eq!(db.read(ReadTxn::count).unwrap(), 40);
}
