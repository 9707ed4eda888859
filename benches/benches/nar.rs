//! How fast is an archive read, written, dumped from a disk and restored to one?
#![expect(clippy::unwrap_used, reason = "a bench may panic")]

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs;
use std::hint::black_box;
use std::os::fd::AsFd;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use larder_core::hash::NarHasher;
use larder_core::nar::{Encoder, Event, Parser};
use larder_fs::dump::{DumpOptions, dump, dump_pipelined};
use larder_fs::restore::{Metadata, RestoreOptions, Restorer};

/// 100 folders of 100 files of 10 to 4000 bytes.
fn small_files(root: &Path) {
    let mut state = 1u32;
    for folder in 0..100 {
        let folder = root.join(format!("dir{folder:03}"));
        fs::create_dir_all(&folder).unwrap();
        for file in 0..100 {
            let contents: Vec<u8> = (0..10 + state % 3990)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    state.to_be_bytes()[0]
                })
                .collect();
            fs::write(folder.join(format!("file{file:03}.txt")), contents).unwrap();
        }
    }
}

/// Four files of 25 MiB.
fn large_files(root: &Path) {
    fs::create_dir_all(root).unwrap();
    for file in 0..4 {
        let contents: Vec<u8> = (0..25u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        fs::write(root.join(format!("file{file}")), contents).unwrap();
    }
}

fn benches(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().unwrap();
    let at = fs::File::open(folder.path()).unwrap();
    let trees: [(&str, fn(&Path)); 2] = [("10k_small_files", small_files), ("100_mib", large_files)];
    for (name, make) in trees {
        make(&folder.path().join(name));
        let mut nar = Vec::new();
        let append = |piece: &[u8]| {
            nar.extend_from_slice(piece);
            Ok::<_, Infallible>(())
        };
        dump(&at, OsStr::new(name), &DumpOptions::default(), append).unwrap();

        let mut group = criterion.benchmark_group("nar");
        group.throughput(Throughput::Bytes(nar.len() as u64)).sample_size(20);
        group.bench_function(format!("parse_{name}"), |bencher| {
            bencher.iter(|| {
                let mut parser = Parser::default();
                for mut piece in nar.chunks(64 * 1024) {
                    while let Some(event) = parser.next(&mut piece).unwrap() {
                        black_box(event);
                    }
                }
                parser.finish().unwrap();
            });
        });
        group.bench_function(format!("parse_and_encode_{name}"), |bencher| {
            let mut out = Vec::with_capacity(64 * 1024 * 2);
            bencher.iter(|| {
                let (mut parser, mut encoder) = (Parser::default(), Encoder::new());
                for mut piece in nar.chunks(64 * 1024) {
                    out.clear();
                    while let Some(event) = parser.next(&mut piece).unwrap() {
                        // As a dump does: contents are there already.
                        if !matches!(event, Event::Contents(_)) {
                            encoder.push(event, &mut out);
                        }
                    }
                    black_box(&out);
                }
            });
        });
        group.bench_function(format!("dump_{name}"), |bencher| {
            bencher.iter(|| {
                let sink = |piece: &[u8]| {
                    black_box(piece);
                    Ok::<_, Infallible>(())
                };
                dump(&at, OsStr::new(name), &DumpOptions::default(), sink).unwrap()
            });
        });
        group.bench_function(format!("dump_and_hash_{name}"), |bencher| {
            bencher.iter(|| {
                let mut hasher = NarHasher::new();
                let sink = |piece: &[u8]| {
                    hasher.update(piece);
                    Ok::<_, Infallible>(())
                };
                dump_pipelined(&at, OsStr::new(name), &DumpOptions::default(), sink).unwrap();
                hasher.finish()
            });
        });
        for (mode, metadata) in [("user", Metadata::User), ("store", Metadata::Store)] {
            group.sample_size(10).bench_function(format!("restore_{mode}_{name}"), |bencher| {
                // The removal of what was restored is not counted, but an ext4 may be slow to
                // create anew what has just been removed: take a tmpfs (TMPDIR) to compare.
                bencher.iter_batched_ref(
                    || tempfile::tempdir().unwrap(),
                    |target| {
                        let at = fs::File::open(target.path()).unwrap();
                        let options = RestoreOptions { metadata, ..RestoreOptions::default() };
                        let mut restorer = Restorer::new(at.as_fd(), OsStr::new("t"), options);
                        for piece in nar.chunks(64 * 1024) {
                            restorer.push(piece).unwrap();
                        }
                        restorer.finish().unwrap()
                    },
                    BatchSize::PerIteration,
                );
            });
        }
        group.finish();
    }
}

criterion_group!(nar, benches);
criterion_main!(nar);
