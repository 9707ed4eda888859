//! Store paths and what text formats say of them.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::hash_part::HashPart;

/// Any hash part; now and then one of few letters, so that needles overlap.
pub fn hash_part() -> impl Strategy<Value = HashPart> {
    prop_oneof![
        4 => any::<[u8; 20]>().prop_map(HashPart::from_bytes),
        1 => "[0a]{32}".prop_map(|text| text.parse().expect("base-32")),
    ]
}

/// Candidates, and bytes in which some of them stand between foreign bytes of several kinds.
pub fn haystack() -> impl Strategy<Value = (BTreeSet<HashPart>, Vec<u8>)> {
    (prop::collection::vec(hash_part(), 1..6), hash_part()).prop_flat_map(|(parts, other)| {
        let needle = prop::sample::select(parts.clone()).prop_map(|p| p.to_text().to_vec());
        let piece = prop_oneof![
            3 => needle.clone(),
            // A needle cut short, so that parts of needles meet.
            2 => (needle.clone(), 0usize..33).prop_map(|(n, at)| n.split_at(at).0.to_vec()),
            2 => (needle, 0usize..33).prop_map(|(n, at)| n.split_at(at).1.to_vec()),
            1 => Just(other.to_text().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 0..80),
            1 => "[0-9a-df-np-sv-z]{0,80}".prop_map(String::into_bytes),
            1 => "[0a]{0,40}".prop_map(String::into_bytes),
            1 => (any::<u8>(), 0usize..300).prop_map(|(b, n)| vec![b; n]),
        ];
        let bytes = prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat());
        (Just(parts.into_iter().collect()), bytes)
    })
}
