//! Questions to a ledger of 100k paths, and commits to it. Figures of whole processes and of a
//! million paths: `cargo run --release -p larder-benches --example db_scale`.

use std::collections::BTreeSet;
use std::hint::black_box;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use larder_benches::Synthetic;
use larder_core::store_path::StorePath;
use larder_store_db::{Batch, DbError, Graph, Mode, OpenOptions, StoreDb, Walk, graph};

const PATHS: u32 = 100_000;

fn filled(synthetic: &Synthetic) -> (tempfile::TempDir, StoreDb) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Create)).expect("a new ledger");
    let mut batch = Batch::new();
    (0..synthetic.count()).for_each(|n| synthetic.push(&mut batch, n));
    db.register(batch).expect("registered");
    db.close().expect("closed");
    let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Existing)).expect("opened");
    (dir, db)
}

fn questions(c: &mut Criterion) {
    let synthetic = Synthetic::new(PATHS);
    let (dir, db) = filled(&synthetic);
    let mut group = c.benchmark_group("db_100k_paths");
    group.sample_size(20);
    group.bench_function("open_and_info_of_one", |b| {
        let path = synthetic.path(PATHS / 2);
        b.iter(|| {
            let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::ReadOnly)).expect("opened");
            black_box(db.read(|r| r.info(&path)).expect("read"))
        });
    });
    group.bench_function("infos_of_1k", |b| {
        let paths: Vec<StorePath> = (0..1000).map(|n| synthetic.path(n * (PATHS / 1000))).collect();
        b.iter(|| black_box(db.read(|r| r.infos(&paths)).expect("read")));
    });
    group.bench_function("hashes_of_10k", |b| {
        let paths: Vec<StorePath> = (0..10_000).map(|n| synthetic.path(n * (PATHS / 10_000))).collect();
        b.iter(|| {
            let mut hashes = Vec::with_capacity(paths.len());
            db.read(|r| {
                r.each(&paths, |at, view| {
                    hashes.push((at, view.map(|view| view.nar_hash)));
                    Ok::<_, DbError>(())
                })
            })
            .expect("read");
            hashes
        });
    });
    group.bench_function("valid_subset_of_10k", |b| {
        let paths: BTreeSet<StorePath> = (0..10_000).map(|n| synthetic.path(n * 20)).collect();
        b.iter(|| black_box(db.read(|r| r.valid_subset(&paths)).expect("read")));
    });
    group.bench_function("referrers_of_hub_25k", |b| {
        let hub = synthetic.path(0);
        b.iter(|| black_box(db.read(|r| r.referrers(&hub)).expect("read")));
    });
    group.bench_function("closure_of_all_and_order", |b| {
        let root = [synthetic.path(PATHS - 1)];
        b.iter(|| {
            let graph = db.read(|r| graph::closure_of(r, &root, Walk::REFERENCES)).expect("read");
            black_box(graph.topological_all().expect("no cycle"))
        });
    });
    group.bench_function("graph", |b| b.iter(|| black_box(db.read(Graph::load).expect("read"))));
    group.bench_function("dump", |b| {
        b.iter(|| larder_benches::dump(&db, &mut std::io::sink()).expect("read"));
    });
    group.bench_function("commit_of_one", |b| {
        let mut next = PATHS;
        b.iter_batched(
            || {
                let mut batch = Batch::new();
                synthetic.push(&mut batch, next);
                next += 1;
                batch
            },
            |batch| db.register(batch).expect("registered"),
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

fn load(c: &mut Criterion) {
    let mut group = c.benchmark_group("db_load");
    group.sample_size(10);
    group.bench_function("closure_20k_paths", |b| {
        let synthetic = Synthetic::new(20_000);
        let (_dir, db) = filled(&synthetic);
        let root = [synthetic.path(19_999)];
        b.iter(|| black_box(db.read(|r| graph::closure_of(r, &root, Walk::REFERENCES)).expect("read")));
    });
    group.bench_function("load_20k_paths", |b| {
        let synthetic = Synthetic::new(20_000);
        b.iter_with_large_drop(|| filled(&synthetic));
    });
    group.finish();
}

criterion_group!(benches, questions, load);
criterion_main!(benches);
