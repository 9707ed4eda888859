//! Where a key stands among many that ascend.

use crate::batch::leading;

/// Finds a key among ascending ones: a table over the first bits, then a binary search, so that
/// no choice of keys is slow.
#[derive(Debug, Default)]
pub(crate) struct KeyIndex {
    shift: u32,
    starts: Vec<u32>,
}

impl KeyIndex {
    pub(crate) fn new(keys: &[[u8; 20]]) -> Self {
        let bits = usize::BITS - keys.len().leading_zeros();
        let shift = 64 - bits.clamp(1, 28);
        let mut starts = vec![0u32; (1 << (64 - shift)) + 1];
        for key in keys {
            if let Some(slot) = starts.get_mut(Self::bucket(shift, key) + 1) {
                *slot += 1;
            }
        }
        let mut sum = 0;
        for slot in &mut starts {
            sum += *slot;
            *slot = sum;
        }
        Self { shift, starts }
    }

    fn bucket(shift: u32, key: &[u8; 20]) -> usize {
        usize::try_from(leading(key) >> shift).unwrap_or(usize::MAX - 1)
    }

    /// Where the bucket of a key lies.
    fn range(&self, key: &[u8; 20]) -> (u32, u32) {
        let bucket = Self::bucket(self.shift, key);
        match self.starts.get(bucket..bucket.saturating_add(2)) {
            Some(&[start, end]) => (start, end),
            _ => (0, 0),
        }
    }

    fn find_within(keys: &[[u8; 20]], (start, end): (u32, u32), key: &[u8; 20]) -> Option<u32> {
        let within = keys.get(start as usize..end as usize)?;
        // One key as a rule; only chosen keys crowd into one bucket.
        let found =
            if within.len() <= 8 { within.iter().position(|k| same(k, key)) } else { within.binary_search(key).ok() };
        u32::try_from(found?).ok().map(|found| start + found)
    }

    pub(crate) fn find(&self, keys: &[[u8; 20]], key: &[u8; 20]) -> Option<u32> {
        Self::find_within(keys, self.range(key), key)
    }

    /// As [`Self::find`] of one after another, but the processor waits for memory once for a handful.
    pub(crate) fn find_all<'a>(
        &self,
        keys: &[[u8; 20]],
        mut wanted: impl Iterator<Item = &'a [u8; 20]>,
        mut each: impl FnMut(Option<u32>),
    ) {
        const HANDFUL: usize = 16;
        let mut handful = [(&[0; 20], (0, 0)); HANDFUL];
        loop {
            let mut taken = 0;
            for (slot, key) in handful.iter_mut().zip(&mut wanted) {
                *slot = (key, self.range(key));
                taken += 1;
            }
            for (key, range) in handful.iter().take(taken) {
                each(Self::find_within(keys, *range, key));
            }
            if taken < HANDFUL {
                break;
            }
        }
    }
}

/// Equality of keys, without a call.
fn same(a: &[u8; 20], b: &[u8; 20]) -> bool {
    let halves = |key: &[u8; 20]| {
        let first = key.first_chunk().map_or(0, |bytes| u128::from_ne_bytes(*bytes));
        (first, key.last_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)))
    };
    halves(a) == halves(b)
}
