//! Figures of the ledger at a given size: `db_scale DIR COUNT STEP`, one STEP a process, so that
//! CPU time and memory are those of the step (`/usr/bin/time`). Steps: load, merge, dump, closure,
//! lookups, singles, one, commits, referrers,
//! graph, check, scan.

#![expect(clippy::print_stderr, reason = "the figures; standard output has the dump")]

use std::path::Path;
use std::time::Instant;

use larder_benches::Synthetic;
use larder_store_db::{Batch, Graph, Mode, OpenOptions, ReadTxn, StoreDb, Walk, graph};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, count, step] = args.as_slice() else { panic!("db_scale DIR COUNT STEP") };
    let (dir, count) = (Path::new(dir), count.parse::<u32>().expect("a count"));
    let synthetic = Synthetic::new(count);
    let start = Instant::now();
    let mut options = OpenOptions::new(if step == "load" { Mode::Create } else { Mode::Existing });
    if let Ok(mib) = std::env::var("CACHE_MIB") {
        options.cache_bytes = mib.parse::<usize>().expect("MiB") << 20;
    }
    let db = StoreDb::open(dir, &options).expect("open");
    let told = match step.as_str() {
        "load" | "merge" => {
            let mut batch = Batch::new();
            let n = if step == "load" { count } else { count / 2 * 3 };
            let from = if step == "load" { 0 } else { count };
            (from..n).for_each(|n| synthetic.push(&mut batch, n));
            let pushed = start.elapsed();
            db.register(batch).expect("register");
            db.close().expect("close");
            format!("pushed after {pushed:?}")
        }
        "dump" => {
            let mut out = std::io::BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
            larder_benches::dump(&db, &mut out).expect("dump");
            String::new()
        }
        "closure" => {
            let root = synthetic.path(count - 1);
            let graph = db.read(|r| graph::closure_of(r, &[root], Walk::REFERENCES)).expect("closure");
            format!("{} paths, {} in order", graph.len(), graph.topological_all().expect("order").len())
        }
        "lookups" => {
            let paths: Vec<_> = (0..10_000).map(|n| synthetic.path(n * (count / 10_000))).collect();
            let mut sum = 0;
            db.read(|r| {
                r.each(&paths, |_, view| {
                    sum += u64::from(view.expect("valid").nar_hash.as_bytes()[0]);
                    Ok::<_, larder_store_db::DbError>(())
                })
            })
            .expect("lookups");
            format!("{sum}")
        }
        "singles" => {
            let mut sum = 0;
            for n in 0..10_000 {
                let path = synthetic.path(n * (count / 10_000));
                sum += db.read(|r| r.info(&path)).expect("info").expect("valid").nar_size_bytes;
            }
            format!("{sum}")
        }
        "one" => {
            let info = db.read(|r| r.info(&synthetic.path(count / 2))).expect("info").expect("valid");
            format!("{}", info.nar_hash)
        }
        // Commits of one path each on an open ledger, and their removal.
        "commits" => {
            let mut times = Vec::new();
            for n in 0..200 {
                let mut batch = Batch::new();
                synthetic.push(&mut batch, count * 2 + n);
                let start = Instant::now();
                db.register(batch).expect("register");
                times.push(start.elapsed());
            }
            let extra = (0..200).map(|n| synthetic.path(count * 2 + n)).collect();
            db.write(|w| w.invalidate(&extra)).expect("invalidate");
            times.sort();
            format!("median {:?}, slowest {:?}", times.get(100), times.last())
        }
        "referrers" => {
            let referrers = db.read(|r| r.referrers(&synthetic.path(0))).expect("referrers").expect("valid");
            format!("{}", referrers.len())
        }
        "graph" => {
            let graph = db.read(Graph::load).expect("graph");
            let loaded = start.elapsed();
            let roots: Vec<_> = graph.nodes().step_by(100).collect();
            let set = graph.closure(roots, Walk::REFERRERS);
            format!("{} nodes after {loaded:?}, {} back", graph.len(), set.len())
        }
        "check" => format!("{:?}", db.check().expect("check")),
        "scan" => format!("{}", db.read(ReadTxn::total_nar_size_bytes).expect("scan")),
        other => panic!("no step {other}"),
    };
    eprintln!("{step} {count}: {:?} {told}", start.elapsed());
}
