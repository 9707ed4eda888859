//! How fast are references found, and how fast is registration text read and written?

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use larder_core::hash_part::HashPart;
use larder_core::refscan::Scanner;

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

criterion_group!(benches, refscan);
criterion_main!(benches);
