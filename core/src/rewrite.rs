//! Replacing hash parts in a stream, and hashing a stream modulo its own hash part.
//!
//! Source: formats, section 6; `content_address.json`.
//!
//! Nix replaces one needle after another in the whole text, in sorted order, and looks on from
//! where it replaced, so replaced bytes may be part of a later match. Each needle is a stage here,
//! and keeps the last 31 bytes back; the stages are few (the outputs of one derivation).

use std::collections::BTreeMap;

use memchr::memmem::Finder;

use crate::hash::{Algorithm, Hash, Hasher};
use crate::hash_part::HashPart;

const LEN: usize = HashPart::TEXT_LEN;

/// Replaces one needle.
struct Stage {
    finder: Finder<'static>,
    to: [u8; LEN],
    /// Bytes not given on yet: at most 31 between pushes. No needle is in them.
    pending: Vec<u8>,
    /// Where `pending` begins in the stream.
    at: u64,
}

impl Stage {
    fn new(from: &[u8; LEN], to: [u8; LEN]) -> Self {
        Self { finder: Finder::new(from).into_owned(), to, pending: Vec::new(), at: 0 }
    }

    /// Appends to `out` what is settled; tells `found` where in the stream it replaced.
    fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>, mut found: impl FnMut(u64)) {
        self.pending.extend_from_slice(bytes);
        let mut from = 0;
        while let Some(n) = self.finder.find(self.pending.get(from..).unwrap_or_default()) {
            from += n;
            if let Some(needle) = self.pending.get_mut(from..from + LEN) {
                needle.copy_from_slice(&self.to);
            }
            found(self.at + from as u64);
            // The same place cannot match again, as `to` is another text.
            from += 1;
        }
        let settled = self.pending.len().saturating_sub(LEN - 1);
        out.extend(self.pending.drain(..settled));
        self.at += settled as u64;
    }
}

/// Replaces hash parts by others in a stream that comes in pieces of any size.
///
/// ```
/// use larder_core::rewrite::Rewriter;
/// let from = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c".parse()?;
/// let to = "1c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c".parse()?;
/// let (mut rewriter, mut out) = (Rewriter::new([(from, to)]), Vec::new());
/// rewriter.push(b"/nix/store/0c0mv0v7jmmvwkr0f", &mut out);
/// rewriter.push(b"qm8jrc4clmz2w1c-x", &mut out);
/// rewriter.finish(&mut out);
/// assert_eq!(out, b"/nix/store/1c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x");
/// # Ok::<(), larder_core::hash_part::HashPartError>(())
/// ```
pub struct Rewriter {
    /// By needle, sorted.
    stages: Vec<Stage>,
    /// What goes from one stage to the next.
    between: [Vec<u8>; 2],
}

impl Rewriter {
    /// Replaces each first hash part by the second. Of one first part the last pair counts.
    pub fn new(pairs: impl IntoIterator<Item = (HashPart, HashPart)>) -> Self {
        let pairs: BTreeMap<HashPart, HashPart> = pairs.into_iter().collect();
        let changes = pairs.into_iter().filter(|(from, to)| from != to);
        let stages = changes.map(|(from, to)| Stage::new(&from.to_text(), to.to_text())).collect();
        Self { stages, between: Default::default() }
    }

    /// Does it leave every stream as it is?
    pub fn is_identity(&self) -> bool {
        self.stages.is_empty()
    }

    /// Takes the next bytes and appends to `out` those that are settled.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        self.push_from(0, bytes, out);
    }

    /// Appends the bytes kept back.
    pub fn finish(mut self, out: &mut Vec<u8>) {
        for n in 0..self.stages.len() {
            let last = self.stages.get_mut(n).map(|stage| std::mem::take(&mut stage.pending));
            self.push_from(n + 1, &last.unwrap_or_default(), out);
        }
    }

    /// Sends bytes through the stages from the n-th on.
    fn push_from(&mut self, n: usize, bytes: &[u8], out: &mut Vec<u8>) {
        let Some((last, others)) = self.stages.get_mut(n..).and_then(<[Stage]>::split_last_mut) else {
            out.extend_from_slice(bytes);
            return;
        };
        let [text, next] = &mut self.between;
        text.clear();
        text.extend_from_slice(bytes);
        for stage in others {
            next.clear();
            stage.push(text, next, |_| {});
            std::mem::swap(text, next);
        }
        last.push(text, out, |_| {});
    }
}

/// Hashes a stream in which a hash part, its own, counts as 32 zero bytes.
///
/// Nix up to 2.16 and from 2.35 on then hashes `|` and the decimal offset of each place; the
/// versions between forgot to. One pass gives both.
pub struct ModuloSelfHasher {
    stage: Stage,
    hasher: Hasher,
    settled: Vec<u8>,
    places: Places,
}

/// Hashes modulo self.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModuloSelf {
    /// With the offsets: what we make.
    pub with_offsets: Hash,
    /// Without them: as 2.17 to 2.34 made it.
    pub without_offsets: Hash,
    /// How often the hash part occurs. If never, both are the plain hash.
    pub occurrences: u64,
}

impl ModuloSelf {
    /// Is this the hash, in either form?
    pub fn accepts(&self, claimed: &Hash) -> bool {
        [self.with_offsets, self.without_offsets].contains(claimed)
    }
}

impl ModuloSelfHasher {
    pub fn new(algorithm: Algorithm, own: HashPart) -> Self {
        Self {
            stage: Stage::new(&own.to_text(), [0; LEN]),
            hasher: Hasher::new(algorithm),
            settled: Vec::new(),
            places: Places::default(),
        }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.settled.clear();
        self.stage.push(bytes, &mut self.settled, |at| self.places.push(at));
        self.hasher.update(&self.settled);
    }

    pub fn finish(mut self) -> ModuloSelf {
        self.hasher.update(&self.stage.pending);
        let without_offsets = self.hasher.clone().finish();
        self.places.for_each(|at| self.hasher.update(format!("|{at}").as_bytes()));
        ModuloSelf { with_offsets: self.hasher.finish(), without_offsets, occurrences: self.places.count }
    }
}

/// Ascending offsets, kept as differences of 7 bits a byte: an output of nothing but its own hash
/// part needs a 32nd of its size, and not a quarter.
#[derive(Debug, Default)]
struct Places {
    differences: Vec<u8>,
    last: u64,
    count: u64,
}

impl Places {
    fn push(&mut self, at: u64) {
        let mut difference = at - self.last;
        while difference > 0x7f {
            self.differences.push((difference & 0x7f) as u8 | 0x80);
            difference >>= 7;
        }
        self.differences.push((difference & 0x7f) as u8);
        self.last = at;
        self.count += 1;
    }

    fn for_each(&self, mut each: impl FnMut(u64)) {
        let (mut at, mut difference, mut shift) = (0, 0, 0);
        for byte in &self.differences {
            difference |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                at += difference;
                each(at);
                (difference, shift) = (0, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb::texts as arb;
    use crate::content_address::ContentAddress;
    use crate::hash::Sha256Digest;
    use crate::store_dir::StoreDir;
    use crate::test_vectors::{base64, cases, nar_of};
    use proptest::prelude::*;

    fn rewrite(pairs: &[(HashPart, HashPart)], bytes: &[u8], cut: usize) -> Vec<u8> {
        let mut rewriter = Rewriter::new(pairs.iter().copied());
        let mut out = Vec::new();
        bytes.chunks(cut).for_each(|piece| rewriter.push(piece, &mut out));
        rewriter.finish(&mut out);
        out
    }

    /// What a rewriting means: the whole text, one needle after another.
    fn naive(pairs: &[(HashPart, HashPart)], bytes: &[u8]) -> Vec<u8> {
        let mut text = bytes.to_vec();
        for (from, to) in pairs.iter().copied().collect::<BTreeMap<_, _>>() {
            if from != to {
                naive_one(&from.to_text(), &to.to_text(), &mut text);
            }
        }
        text
    }

    fn naive_one(from: &[u8], to: &[u8], text: &mut [u8]) -> Vec<usize> {
        let mut places = Vec::new();
        for at in 0..text.len().saturating_sub(31) {
            if text[at..at + 32] == *from {
                text[at..at + 32].copy_from_slice(to);
                places.push(at);
            }
        }
        places
    }

    fn modulo(own: HashPart, bytes: &[u8], cut: usize) -> ModuloSelf {
        let mut hasher = ModuloSelfHasher::new(Algorithm::Sha256, own);
        bytes.chunks(cut).for_each(|piece| hasher.push(piece));
        hasher.finish()
    }

    #[test]
    fn content_address_vectors() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let cases = cases("content_address");
        println!("content_address: {} cases", cases.len());
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let contents = match &case["input_content"] {
                serde_json::Value::String(text) => text.clone(),
                parts => {
                    let dots = usize::try_from(parts["dots"].as_u64().unwrap()).unwrap();
                    format!("{}{}", ".".repeat(dots), parts["then"].as_str().unwrap())
                }
            };
            let encoded = crate::hash::encode_base64(contents.as_bytes());
            let input = nar_of(&serde_json::json!({ "type": "regular", "parts": [{ "b64": encoded }] }));
            let parse = |text: &serde_json::Value| dir.parse(text.as_str().unwrap()).unwrap();
            let own = parse(&case["input_path"]);
            for version in ["2.8.0", "2.26.3"] {
                let made = &case[version];
                let path = parse(&made["rewritten_path"]);
                // References get new paths first; by their names it is plain which is which.
                let mut pairs = vec![(own.hash_part(), path.hash_part())];
                for new in made["references"].as_array().unwrap().iter().map(parse) {
                    let old = case["input_references"].as_array().unwrap().iter().map(parse);
                    let old = old.filter(|old| old.name() == new.name()).map(|old| old.hash_part());
                    pairs.extend(old.map(|old| (old, new.hash_part())));
                }
                for cut in [1, 31, 33, 4096, usize::MAX] {
                    let nar = rewrite(&pairs, &input, cut);
                    assert_eq!(Sha256Digest::of(&nar).to_hex(), made["nar_sha256_hex"], "{id} {version}");
                    if made["nar_b64"].is_string() {
                        assert!(nar == base64(&made["nar_b64"]), "{id} {version}");
                    }
                    let hashes = modulo(path.hash_part(), &nar, cut);
                    let hash = if version == "2.8.0" { hashes.with_offsets } else { hashes.without_offsets };
                    let address = ContentAddress::Fixed(crate::content_address::Method::Recursive, hash);
                    assert_eq!(address.to_string(), made["ca"], "{id} {version}");
                    assert!(hashes.accepts(&hash));
                }
            }
        }
    }

    /// Bytes, and pairs whose needles are in them or come about by replacing.
    fn texts() -> impl Strategy<Value = (Vec<(HashPart, HashPart)>, Vec<u8>)> {
        arb::haystack().prop_flat_map(|(parts, bytes)| {
            let all: Vec<HashPart> = parts.into_iter().collect();
            let one = prop::sample::select(all);
            let other = prop_oneof![one.clone(), arb::hash_part()];
            (prop::collection::vec((one, other), 0..4), Just(bytes))
        })
    }

    #[test]
    fn replaced_bytes_may_be_part_of_a_later_match() {
        let part = |text: String| text.parse::<HashPart>().unwrap();
        let pairs = [(part("a".repeat(32)), part(format!("b{}", "a".repeat(31))))];
        for cut in [1, 32, 100] {
            let made = rewrite(&pairs, "a".repeat(34).as_bytes(), cut);
            assert_eq!(String::from_utf8(made).unwrap(), format!("bbb{}", "a".repeat(31)), "cut at {cut}");
        }
        // One after another, in sorted order: the second needle is made by the first pair.
        let [a, b, c] = ["a", "b", "c"].map(|letter| part(letter.repeat(32)));
        assert_eq!(rewrite(&[(b, c), (a, b)], "a".repeat(32).as_bytes(), 5), "c".repeat(32).into_bytes());
        assert_eq!(rewrite(&[(a, c), (b, a)], "b".repeat(32).as_bytes(), 5), "a".repeat(32).into_bytes());
    }

    proptest! {
        /// A rewriting is that of the whole text, however it is cut.
        #[test]
        fn equals_the_whole_text((pairs, bytes) in texts(), cut in 1usize..100) {
            let wanted = naive(&pairs, &bytes);
            prop_assert_eq!(&rewrite(&pairs, &bytes, cut), &wanted);
            prop_assert_eq!(&rewrite(&pairs, &bytes, usize::MAX), &wanted);
        }

        /// The hash modulo self is that of the text with zeros, then of the offsets.
        #[test]
        fn modulo_is_that_of_the_whole_text((parts, bytes) in arb::haystack(), cut in 1usize..100) {
            let own = *parts.first().unwrap();
            let mut text = bytes.clone();
            let places = naive_one(&own.to_text(), &[0; 32], &mut text);
            let made = modulo(own, &bytes, cut);
            prop_assert_eq!(made.without_offsets, Hash::of(Algorithm::Sha256, &text));
            prop_assert_eq!(made.occurrences, places.len() as u64);
            text.extend(places.iter().flat_map(|at| format!("|{at}").into_bytes()));
            prop_assert_eq!(made.with_offsets, Hash::of(Algorithm::Sha256, &text));
        }

        #[test]
        fn places_read_back(steps in prop::collection::vec(prop_oneof![1u64..200, any::<u32>().prop_map(u64::from)], 0..20)) {
            let mut places = Places::default();
            let mut at = 0;
            let wanted: Vec<u64> = steps.iter().map(|step| { at += step; at }).collect();
            for at in &wanted {
                places.push(*at);
            }
            let mut read = Vec::new();
            places.for_each(|at| read.push(at));
            prop_assert_eq!(read, wanted);
        }
    }
}
