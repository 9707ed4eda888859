//! What is alive among a million paths, and in which order the rest may go.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use larder_benches::Synthetic;
use larder_gc::live::{self, Rules};
use larder_store_db::{Batch, Graph, Mode, OpenOptions, StoreDb};

const PATHS: u32 = 1_000_000;

fn decisions(c: &mut Criterion) {
    let synthetic = Synthetic::new(PATHS);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Create)).expect("a new ledger");
    let mut batch = Batch::new();
    (0..synthetic.count()).for_each(|n| synthetic.push(&mut batch, n));
    db.register(batch).expect("registered");
    let graph = db.read(Graph::load).expect("read");
    // References lead to smaller numbers: these keep about half of all.
    let roots: Vec<_> = (0..20).filter_map(|n| graph.node(&synthetic.path(PATHS / 2 - n * 1000))).collect();
    let rules = Rules { keep_outputs: true, keep_derivations: true };
    let mut group = c.benchmark_group("gc_1m_paths");
    group.sample_size(10);
    group.bench_function("graph", |b| b.iter(|| black_box(db.read(Graph::load).expect("read"))));
    group.bench_function("live", |b| b.iter(|| black_box(live::live(&graph, roots.iter().copied(), rules))));
    let dead = live::complement(&graph, &live::live(&graph, roots.iter().copied(), rules));
    group.bench_function("units", |b| b.iter(|| black_box(live::units(&graph, &dead, rules, 7))));
    group.finish();
}

criterion_group!(benches, decisions);
criterion_main!(benches);
