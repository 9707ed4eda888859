//! Store paths and what text formats say of them.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::export::Object;
use crate::hash::Sha256Digest;
use crate::hash_part::HashPart;
use crate::registration::{Form, Record};
use crate::settings::TABLE;
use crate::store_path::{Name, StorePath};

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

/// Names, mostly short; some as long as they may be, some with a dot at the front.
pub fn name() -> impl Strategy<Value = Name> {
    prop_oneof![
        6 => "[0-9a-zA-Z+_?=-][0-9a-zA-Z+._?=-]{0,20}",
        1 => "[0-9a-z-]{1,20}\\.drv",
        1 => r"\.[0-9a-z+_?=][0-9a-z.-]{0,10}",
        1 => "[0-9a-z]{200,211}",
    ]
    .prop_map(|text| Name::new(&text).expect("made of name characters"))
}

pub fn store_path() -> impl Strategy<Value = StorePath> {
    (hash_part(), name()).prop_map(|(hash_part, name)| StorePath::new(hash_part, name))
}

pub fn sha256() -> impl Strategy<Value = Sha256Digest> {
    any::<[u8; 32]>().prop_map(Sha256Digest)
}

/// A set of paths, and maybe one more.
pub fn references() -> impl Strategy<Value = BTreeSet<StorePath>> {
    prop::collection::btree_set(store_path(), 0..8)
}

/// A registration record of the given form; it may refer to itself.
pub fn record(form: Form) -> impl Strategy<Value = Record> {
    let parts = (store_path(), sha256(), any::<u64>(), prop::option::of(store_path()), references(), any::<bool>());
    parts.prop_map(move |(path, hash, size, deriver, mut references, to_self)| {
        if to_self {
            references.insert(path.clone());
        }
        Record { path, hash_size: (form == Form::WithHash).then_some((hash, size)), deriver, references }
    })
}

pub fn form() -> impl Strategy<Value = Form> {
    prop::sample::select(vec![Form::WithHash, Form::WithoutHash])
}

/// Spoils bytes at one place: a byte changed, removed or put in, or the end cut off.
///
/// For well-formed input, to get past the first check of a parser.
pub fn spoiled(bytes: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let interesting = prop::sample::select(b"\n \t\0/-.+=#:;,\xff\x80aez019\r".to_vec());
    let byte = prop_oneof![any::<u8>(), interesting];
    (0..=bytes.len(), 0..4, byte).prop_map(move |(at, how, byte)| {
        let mut bytes = bytes.clone();
        match how {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, byte),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            _ => {
                if let Some(b) = bytes.get_mut(at) {
                    *b = byte;
                }
            }
        }
        bytes
    })
}

/// What an export stream says of an object.
pub fn object() -> impl Strategy<Value = Object> {
    record(Form::WithoutHash).prop_map(|r| Object { path: r.path, references: r.references, deriver: r.deriver })
}

/// A word that some settings take as a value.
pub fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("true".to_owned()),
        prop::sample::select(vec!["false", "yes", "no", "relaxed", "auto", "a=b", "c=d", "4K", "-3"])
            .prop_map(str::to_owned),
        any::<u32>().prop_map(|n| n.to_string()),
        "/[a-z./]{0,10}",
        "[a-zé=@:]{1,8}",
    ]
}

/// The text of a file of settings: mostly known names, some with `extra-`.
pub fn settings() -> impl Strategy<Value = String> {
    let names = TABLE.iter().flat_map(|e| e.aliases.iter().copied().chain([e.name])).collect::<Vec<_>>();
    let prefix = prop::sample::select(vec!["", "", "", "extra-"]);
    let name = (prefix, prop::sample::select(names)).prop_map(|(prefix, name)| format!("{prefix}{name}"));
    let end = prop::sample::select(vec!["\n", "\n", " # comment\n", "\r\n", "\n\n"]);
    let value = prop::collection::vec(word(), 0..3);
    let line = (name, value, end).prop_map(|(name, value, end)| format!("{name} = {}{end}", value.join(" ")));
    prop::collection::vec(line, 0..4).prop_map(|lines| lines.concat())
}
