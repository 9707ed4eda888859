//! How long do reading and hashing a large closure of derivations take?
//!
//! 10 000 derivations of some 3 kB, each above three others: the size and shape of a small system.
#![expect(clippy::indexing_slicing, reason = "a bench is a program")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use larder_core::derivation::modulo::{Mask, Memo, fill_deferred};
use larder_core::derivation::{Derivation, Output, OutputName, name_of, parse};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};

const COUNT: usize = 10_000;

type Texts = Vec<(StorePath, Vec<u8>)>;

/// Derivations with their texts, inputs first.
fn closure(dir: &StoreDir) -> Texts {
    let mut made: Vec<(StorePath, Vec<u8>)> = Vec::with_capacity(COUNT);
    let mut memo = Memo::new();
    let out = OutputName::out();
    for n in 0..COUNT {
        // The one before, so that the whole is a chain, and two further down.
        let below = [n.checked_sub(1), n.checked_sub(7), (n > 0).then_some(n / 2)];
        let below: BTreeSet<usize> = below.into_iter().flatten().collect();
        let mut env = BTreeMap::from([
            ("out".into(), "".into()),
            ("script".into(), "install -D \"$src/bin\" '$out/bin'\n\tmake check\n".repeat(45).into()),
        ]);
        env.extend((0..30).map(|k| (format!("variable{k}").into(), format!("value {k} of {n}").into())));
        let mut drv = Derivation {
            name: Name::new(&format!("package-{n}-1.0")).expect("a name"),
            outputs: BTreeMap::from([(out.clone(), Output::Deferred)]),
            input_drvs: below.into_iter().map(|k| (made[k].0.clone(), BTreeSet::from([out.clone()]))).collect(),
            input_srcs: BTreeSet::new(),
            system: "x86_64-linux".into(),
            builder: "/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-bash/bin/bash".into(),
            args: vec!["-e".into(), "/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-default-builder.sh".into()],
            env,
        };
        let last = made.last().map(|(path, _)| path.clone());
        let masked = memo
            .modulo(dir, &drv, Mask::On, |path| -> Result<Derivation, Infallible> {
                assert_eq!(last.as_ref(), Some(path), "all others are known");
                let (path, text) = made.last().expect("it has a last");
                Ok(parse(dir, &name_of(path).expect("a derivation"), text).expect("as written"))
            })
            .expect("inputs are there");
        fill_deferred(dir, &mut drv, &masked.digest).expect("short names");
        made.push((drv.path(dir).expect("a short name"), drv.to_aterm(dir)));
    }
    made
}

fn benches(c: &mut Criterion) {
    let dir = StoreDir::new("/nix/store").expect("absolute");
    let texts = closure(&dir);
    let bytes: usize = texts.iter().map(|(_, text)| text.len()).sum();
    let drvs: Vec<(StorePath, Derivation)> = texts
        .iter()
        .map(|(path, text)| {
            (path.clone(), parse(&dir, &name_of(path).expect("a derivation"), text).expect("as written"))
        })
        .collect();
    let by_path: HashMap<&StorePath, &Derivation> = drvs.iter().map(|(path, drv)| (path, drv)).collect();
    let (top, _) = drvs.last().expect("there are some");

    let mut group = c.benchmark_group("derivations");
    group.sample_size(10).throughput(Throughput::Bytes(bytes as u64));
    group.bench_function("parse_10k_drvs", |b| {
        b.iter(|| {
            for ((_, text), (_, drv)) in texts.iter().zip(&drvs) {
                black_box(parse(&dir, &drv.name, text)).expect("as written");
            }
        });
    });
    group.bench_function("print_10k_drvs", |b| {
        b.iter(|| drvs.iter().map(|(_, drv)| drv.to_aterm(&dir).len()).sum::<usize>());
    });
    group.bench_function("modulo_of_10k_drvs", |b| {
        let resolve = |path: &StorePath| -> Result<&Derivation, Infallible> { Ok(by_path[path]) };
        b.iter_batched(
            Memo::new,
            |mut memo| {
                memo.modulo_at(&dir, top, resolve).expect("a closure");
                assert_eq!(memo.len(), COUNT);
                memo
            },
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(drv, benches);
criterion_main!(drv);
