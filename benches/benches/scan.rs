//! How fast are references found, and how fast is registration text read and written?
#![expect(clippy::indexing_slicing, reason = "indices are taken below the length")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::refscan::Scanner;
use larder_core::registration::{Form, Parser, PathRef, write_record};
use larder_core::store_dir::StoreDir;

const SIZE: usize = 16 << 20;

/// A fixed stream of bits (xorshift), so that runs compare.
struct Bits(u64);

impl Bits {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() >> 33).expect("31 bits") % n
    }

    fn part(&mut self) -> HashPart {
        HashPart::from_bytes(std::array::from_fn(|_| self.next().to_le_bytes()[3]))
    }
}

fn binary(bits: &mut Bits) -> Vec<u8> {
    (0..SIZE / 8).flat_map(|_| bits.next().to_le_bytes()).collect()
}

/// Machine code has many zeros and few values; this is much like it.
fn sparse(bits: &mut Bits) -> Vec<u8> {
    (0..SIZE).map(|_| if bits.below(3) == 0 { 0 } else { bits.next().to_le_bytes()[5] & 0x7f }).collect()
}

fn text(bits: &mut Bits) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "the ", "store ", "holds ", "every ", "path ", "that ", "is ", "valid", ", ", "and ", "nothing ", "else ",
        "may ", "live ", "long.\n", "garbage ",
    ];
    let mut out = Vec::with_capacity(SIZE + 16);
    while out.len() < SIZE {
        out.extend_from_slice(WORDS[bits.below(16)].as_bytes());
    }
    out
}

/// Store paths, one a line: of these some are candidates.
fn path_list(bits: &mut Bits, candidates: &[HashPart]) -> Vec<u8> {
    let mut out = Vec::with_capacity(SIZE + 64);
    while out.len() < SIZE {
        let part = if bits.below(8) == 0 { candidates[bits.below(candidates.len())] } else { bits.part() };
        out.extend_from_slice(b"/nix/store/");
        out.extend_from_slice(&part.to_text());
        out.extend_from_slice(b"-name-1.0/lib/file\n");
    }
    out
}

fn base32(bits: &mut Bits) -> Vec<u8> {
    (0..SIZE / 32).flat_map(|_| bits.part().to_text()).collect()
}

fn hexadecimal(bits: &mut Bits) -> Vec<u8> {
    (0..SIZE).map(|_| b"0123456789abcdef"[bits.below(16)]).collect()
}

fn refscan(c: &mut Criterion) {
    let mut bits = Bits(0x2545_f491_4f6c_dd1d);
    for count in [3, 100, 1000] {
        let candidates: Vec<HashPart> = (0..count).map(|_| bits.part()).collect();
        let data = [
            ("binary", binary(&mut bits)),
            ("machine_code", sparse(&mut bits)),
            ("text", text(&mut bits)),
            ("path_list", path_list(&mut bits, &candidates)),
            ("base32", base32(&mut bits)),
            ("hexadecimal", hexadecimal(&mut bits)),
        ];
        let mut group = c.benchmark_group(format!("refscan_16MiB_{count}_candidates"));
        group.throughput(Throughput::Bytes(SIZE as u64)).sample_size(20);
        for (name, bytes) in &data {
            group.bench_with_input(BenchmarkId::from_parameter(name), bytes, |b, bytes| {
                b.iter(|| {
                    let mut scanner = Scanner::new(candidates.iter().copied().chain([HashPart::from_bytes([7; 20])]));
                    bytes.chunks(1 << 16).for_each(|piece| scanner.push(piece));
                    black_box(scanner.finish())
                });
            });
        }
        group.finish();
    }
}

/// 100k paths with 690k references: about 60 MB of text.
fn registration(c: &mut Criterion) {
    let mut bits = Bits(0x2545_f491_4f6c_dd1d);
    let dir = StoreDir::new("/nix/store").expect("a fine directory");
    let names: Vec<String> = (0..1000).map(|n| format!("some-package-{}.{n}", n % 7)).collect();
    let paths: Vec<PathRef<'_>> =
        (0..100_000).map(|n| PathRef::trusted(bits.part(), &names[n % names.len()])).collect();
    let references: Vec<Vec<PathRef<'_>>> = (0..paths.len())
        .map(|_| (0..6 + usize::from(bits.below(10) < 9)).map(|_| paths[bits.below(paths.len())]).collect())
        .collect();
    let hash = Sha256Digest([0xab; 32]);
    // As to a pipe: the buffer is given away whenever it is full.
    let write = |full: &mut dyn FnMut(&[u8])| {
        let mut out = Vec::with_capacity(1 << 18);
        for (path, references) in paths.iter().zip(&references) {
            let deriver = Some(*path);
            write_record(&mut out, &dir, *path, Some((&hash, 123_456)), deriver, references.iter().copied());
            if out.len() > 1 << 17 {
                full(&out);
                out.clear();
            }
        }
        full(&out);
    };
    let mut text = Vec::new();
    write(&mut |piece| text.extend_from_slice(piece));
    let mut group = c.benchmark_group("registration_100k_paths_690k_references");
    group.throughput(Throughput::Bytes(text.len() as u64)).sample_size(10);
    group.bench_function("write", |b| b.iter(|| write(&mut |piece| _ = black_box(piece.last()))));
    group.bench_function("parse", |b| {
        b.iter(|| {
            let mut parser = Parser::new(&dir, Form::WithHash);
            let mut count = 0;
            for piece in text.chunks(1 << 16) {
                parser.push(piece);
                while let Some(record) = parser.next_record().expect("fine text") {
                    count += record.references().map(|r| r.name().len()).sum::<usize>();
                }
            }
            parser.finish().expect("whole");
            black_box(count)
        });
    });
    group.finish();
}

criterion_group!(benches, refscan, registration);
criterion_main!(benches);
