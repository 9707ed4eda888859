//! Reference scanning: which hash parts occur in a stream of bytes.
//!
//! Source: formats, section 6; `reference_scan.json`. A needle counts at any offset of the NAR,
//! file names and symlink targets included, overlaps too; neither the name after it nor the store
//! directory before it is looked at.
//!
//! Nix looks at a window of 32 bytes from its end and jumps behind the first byte that is not
//! base-32. That is slow where nearly everything is base-32 (lists of store paths, hexadecimal
//! dumps): there each position costs a lookup. Here the last eight bytes of the window choose how
//! far to jump (the shift table of Wu and Manber, 1994): eight bytes that stand in no candidate
//! allow a jump of 25, whatever bytes they are. The answer is the same; the cost hardly depends
//! on the contents.

use std::collections::BTreeSet;

use rustc_hash::FxHashSet;

use crate::hash_part::HashPart;

/// Bytes of a needle.
const WINDOW: usize = HashPart::TEXT_LEN;
/// Bytes that choose the jump.
const GRAM: usize = 8;
/// The jump where those bytes occur in no needle.
const FAR: u8 = 25;
const _: () = assert!(FAR as usize == WINDOW - GRAM + 1);
/// How many jumps of [`FAR`] are tried side by side.
const AHEAD: usize = 4;
/// Bytes from the first gram of such a try to the end of its last.
const REACH: usize = (AHEAD - 1) * FAR as usize + GRAM;

/// Fewest and most bits of an index into the jump table: 4 KiB stay in the first-level cache,
/// 4 MiB serve a hundred thousand candidates.
const TABLE_BITS: std::ops::RangeInclusive<u32> = 12..=22;

/// Finds which of the candidates occur in the bytes pushed.
///
/// The result does not depend on how the bytes are cut into pieces. Without candidates, and once
/// all of them are found, a push costs nothing.
///
/// ```
/// use larder_core::{hash_part::HashPart, refscan::Scanner};
/// let part: HashPart = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c".parse()?;
/// let mut scanner = Scanner::new([part]);
/// scanner.push(b"/nix/store/0c0mv0v7jmmv");
/// scanner.push(b"wkr0fqm8jrc4clmz2w1c-hello");
/// assert!(scanner.finish().contains(&part));
/// # Ok::<(), larder_core::hash_part::HashPartError>(())
/// ```
#[derive(Clone)]
pub struct Scanner {
    /// Candidates not seen yet, as text.
    wanted: FxHashSet<[u8; WINDOW]>,
    found: BTreeSet<HashPart>,
    /// For the hash of a gram: how far its last occurrence in any candidate is from the end.
    jumps: Box<[u8]>,
    /// Shifts a 64-bit product down to an index of `jumps`.
    down: u32,
    /// The last bytes pushed, at most 31: a needle may begin in them.
    tail: [u8; WINDOW - 1],
    tail_len: usize,
}

/// The slot of a gram (Fibonacci hashing).
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "at most 22 bits are left")]
fn slot(gram: [u8; GRAM], down: u32) -> usize {
    (u64::from_le_bytes(gram).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> down) as usize
}

impl Scanner {
    pub fn new(candidates: impl IntoIterator<Item = HashPart>) -> Self {
        let wanted: FxHashSet<[u8; WINDOW]> = candidates.into_iter().map(HashPart::to_text).collect();
        // About four slots for each gram: three of four looks at foreign bytes jump far.
        let grams = wanted.len().saturating_mul(usize::from(FAR) * 4).max(1);
        let bits = (grams.ilog2() + 1).clamp(*TABLE_BITS.start(), *TABLE_BITS.end());
        let down = u64::BITS - bits;
        let mut jumps = if wanted.is_empty() { Vec::new() } else { vec![FAR; 1 << bits] };
        for needle in &wanted {
            for (rest, gram) in (0..FAR).rev().zip(needle.windows(GRAM)) {
                let gram = gram.try_into().expect("windows have the size asked for");
                if let Some(jump) = jumps.get_mut(slot(gram, down)) {
                    *jump = rest.min(*jump);
                }
            }
        }
        Self { wanted, found: BTreeSet::new(), jumps: jumps.into(), down, tail: [0; WINDOW - 1], tail_len: 0 }
    }

    /// Is there nothing left to find?
    pub fn is_done(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Looks at the next bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.is_done() {
            return;
        }
        // Needles that begin in earlier bytes.
        if self.tail_len > 0 {
            let mut seam = [0; 2 * (WINDOW - 1)];
            let ahead = bytes.len().min(WINDOW - 1);
            let (old, rest) = seam.split_at_mut(self.tail_len);
            old.copy_from_slice(self.tail.split_at(self.tail_len).0);
            rest.split_at_mut(ahead).0.copy_from_slice(bytes.split_at(ahead).0);
            self.scan(seam.split_at(self.tail_len + ahead).0);
        }
        self.scan(bytes);
        self.keep_tail(bytes);
    }

    /// The candidates found.
    pub fn finish(self) -> BTreeSet<HashPart> {
        self.found
    }

    fn keep_tail(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last_chunk() {
            self.tail = *last;
            self.tail_len = self.tail.len();
            return;
        }
        // Fewer than 31 bytes: they push out the oldest.
        let out = (self.tail_len + bytes.len()).saturating_sub(self.tail.len());
        self.tail.copy_within(out..self.tail_len, 0);
        self.tail_len -= out;
        self.tail.split_at_mut(self.tail_len).1.split_at_mut(bytes.len()).0.copy_from_slice(bytes);
        self.tail_len += bytes.len();
    }

    /// Looks at all windows of `bytes`.
    fn scan(&mut self, bytes: &[u8]) {
        // The jump is chosen by the gram at `at`; the window begins FAR - 1 bytes before it.
        let mut at = usize::from(FAR) - 1;
        loop {
            // Mostly the looks at `at`, and at where far jumps lead from there, all say "far".
            // Asking them at once lets the processor overlap the loads.
            let reach = bytes.get(at..).and_then(<[u8]>::first_chunk::<REACH>);
            if let Some(reach) = reach {
                let far = |n: usize| self.jump(gram_at(reach, n * usize::from(FAR)));
                let (a, b, c, d) = (far(0), far(1), far(2), far(3));
                if (a & b & c & d) == FAR {
                    at += AHEAD * usize::from(FAR);
                    continue;
                }
                // Not all are far, but those before the first near one count.
                let mut near = a;
                for next in [b, c, d] {
                    if near == FAR {
                        at += usize::from(FAR);
                        near = next;
                    }
                }
                if near != 0 {
                    at += usize::from(near);
                    continue;
                }
            } else {
                let Some(gram) = bytes.get(at..).and_then(<[u8]>::first_chunk) else { return };
                let jump = self.jump(*gram);
                if jump != 0 {
                    at += usize::from(jump);
                    continue;
                }
            }
            if self.look(bytes, at) {
                return;
            }
            at += 1;
        }
    }

    #[inline]
    fn jump(&self, gram: [u8; GRAM]) -> u8 {
        // The index is always in range; 0 would look closer.
        self.jumps.get(slot(gram, self.down)).copied().unwrap_or(0)
    }

    /// Compares the window whose last gram is at `at`. Is all found now?
    #[cold]
    fn look(&mut self, bytes: &[u8], at: usize) -> bool {
        let begin = at + GRAM - WINDOW;
        if let Some(window) = bytes.get(begin..).and_then(<[u8]>::first_chunk)
            && self.wanted.remove(window)
        {
            self.found.insert(HashPart::parse(window).expect("equals the text of a hash part"));
        }
        self.wanted.is_empty()
    }
}

#[inline]
fn gram_at(reach: &[u8; REACH], at: usize) -> [u8; GRAM] {
    reach.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb::texts as arb;
    use crate::store_dir::StoreDir;
    use crate::store_path::StorePath;
    use crate::test_vectors::{cases, nar_of, store_paths};
    use proptest::prelude::*;

    /// What a scan means: every window of 32 bytes, looked up.
    fn naive(candidates: &BTreeSet<HashPart>, bytes: &[u8]) -> BTreeSet<HashPart> {
        bytes.windows(WINDOW).filter_map(|w| HashPart::parse(w).ok()).filter(|p| candidates.contains(p)).collect()
    }

    fn scan(candidates: &BTreeSet<HashPart>, bytes: &[u8], cut: usize) -> BTreeSet<HashPart> {
        let mut scanner = Scanner::new(candidates.iter().copied());
        bytes.chunks(cut).for_each(|piece| scanner.push(piece));
        scanner.finish()
    }

    #[test]
    fn reference_scan_vectors() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let cases = cases("reference_scan");
        println!("reference_scan: {} cases", cases.len());
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let nar = nar_of(&case["tree"]);
            assert_eq!(crate::hash::Sha256Digest::of(&nar).to_hex(), case["nar_sha256_hex"], "{id}");
            let parts = |key: &str| store_paths(&dir, &case[key]).iter().map(StorePath::hash_part).collect();
            let candidates: BTreeSet<HashPart> = parts("candidates");
            let references: BTreeSet<HashPart> = parts("references");
            for cut in [1, 7, 31, 32, 33, 4096, 65536, usize::MAX] {
                assert_eq!(scan(&candidates, &nar, cut), references, "{id}, cut at {cut}");
            }
        }
    }

    proptest! {
        /// A scan is the naive search, however the stream is cut and whatever stands between needles.
        #[test]
        fn equals_the_naive_search((parts, bytes) in arb::haystack(), cut in 1usize..200) {
            let wanted = naive(&parts, &bytes);
            prop_assert_eq!(&scan(&parts, &bytes, usize::MAX), &wanted);
            prop_assert_eq!(&scan(&parts, &bytes, cut), &wanted);
        }
    }

    #[test]
    fn needles_of_one_letter_overlap() {
        let part: HashPart = "a".repeat(32).parse().unwrap();
        let near: HashPart = format!("{}b", "a".repeat(31)).parse().unwrap();
        let parts = BTreeSet::from([part, near]);
        assert_eq!(scan(&parts, "a".repeat(100).as_bytes(), 3), BTreeSet::from([part]));
        assert_eq!(scan(&parts, format!("{}b", "a".repeat(40)).as_bytes(), 5), parts);
    }

    #[test]
    fn nothing_wanted_is_done() {
        let mut scanner = Scanner::new([]);
        assert!(scanner.is_done());
        scanner.push(&[b'a'; 100]);
        assert!(scanner.finish().is_empty());
    }
}
