//! Names, store paths, hashes and records of paths.

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;
use proptest::sample::select;

use crate::content_address::{ContentAddress, Method};
use crate::hash::{Algorithm, Hash, Sha256Digest, encode_base64};
use crate::hash_part::HashPart;
use crate::path_info::PathInfo;
use crate::signature::Signature;
use crate::store_dir::{References, StoreDir};
use crate::store_path::{MAX_NAME_LEN, Name, StorePath};

/// A name: mostly short, at times as long as may be, with dots and dashes anywhere allowed.
pub fn name() -> impl Strategy<Value = Name> {
    let text = prop_oneof![
        8 => "[0-9a-zA-Z+._?=-]{1,12}",
        2 => select(vec![".x", "...", "..a", "-", "--", "a.drv", "a.lock", "?", "="]).prop_map(str::to_owned),
        1 => "[a-z]{1,2}".prop_map(|unit| unit.repeat(MAX_NAME_LEN).split_at(MAX_NAME_LEN).0.to_owned()),
    ];
    text.prop_filter_map("'.', '..' and the like are no names", |text| Name::new(&text).ok())
}

/// A name with room for a suffix.
pub fn short_name() -> impl Strategy<Value = Name> {
    name().prop_filter("leave room for a suffix", |name| name.as_str().len() < 100)
}

pub fn hash_part() -> impl Strategy<Value = HashPart> {
    any::<[u8; 20]>().prop_map(HashPart::from_bytes)
}

pub fn store_path() -> impl Strategy<Value = StorePath> {
    (hash_part(), name()).prop_map(|(hash_part, name)| StorePath::new(hash_part, name))
}

/// The path of a derivation.
pub fn drv_path() -> impl Strategy<Value = StorePath> {
    (hash_part(), short_name()).prop_map(|(hash_part, name)| {
        StorePath::new(hash_part, Name::new(&format!("{name}.drv")).expect("short, and has no new character"))
    })
}

pub fn store_dir() -> impl Strategy<Value = StoreDir> {
    select(vec!["/nix/store", "/gnu/store", "/s", "/tmp/a b/store", "/żółw/store"])
        .prop_map(|path| StoreDir::new(path).expect("absolute, and not the root"))
}

pub fn algorithm() -> impl Strategy<Value = Algorithm> {
    select(Algorithm::ALL.to_vec())
}

pub fn hash() -> impl Strategy<Value = Hash> {
    (algorithm(), any::<[u8; 64]>()).prop_map(|(algorithm, bytes)| {
        let (digest, _) = bytes.split_at(algorithm.size());
        Hash::new(algorithm, digest).expect("cut to size")
    })
}

pub fn sha256() -> impl Strategy<Value = Sha256Digest> {
    any::<[u8; 32]>().prop_map(Sha256Digest)
}

pub fn content_address() -> impl Strategy<Value = ContentAddress> {
    prop_oneof![
        sha256().prop_map(ContentAddress::Text),
        hash().prop_map(|hash| ContentAddress::Fixed(Method::Flat, hash)),
        hash().prop_map(|hash| ContentAddress::Fixed(Method::Recursive, hash)),
        any::<[u8; 20]>().prop_map(|digest| {
            let hash = Hash::new(Algorithm::Sha1, &digest).expect("20 bytes are a SHA-1 digest");
            ContentAddress::Fixed(Method::Git, hash)
        }),
    ]
}

/// References that any recursive SHA-256 object may have.
pub fn references() -> impl Strategy<Value = References> {
    (btree_set(store_path(), 0..4), any::<bool>()).prop_map(|(others, to_self)| References { others, to_self })
}

/// A signature of the right form, by nobody.
pub fn signature() -> impl Strategy<Value = Signature> {
    ("[a-z][a-z0-9.-]{0,10}-[0-9]", vec(any::<u8>(), 64)).prop_map(|(key, bytes)| {
        format!("{key}:{}", encode_base64(&bytes)).parse().expect("a name, a colon and base 64")
    })
}

/// A record in which anything may go with anything; only a content address leads to the path.
pub fn path_info(dir: StoreDir) -> impl Strategy<Value = PathInfo> {
    let named = (store_path(), proptest::option::of(content_address()), references());
    let rest = (
        sha256(),
        1..=u64::MAX,
        proptest::option::of(drv_path()),
        0..=u64::from(u32::MAX),
        any::<bool>(),
        btree_set(signature(), 0..3),
    );
    (named, rest).prop_map(move |((path, address, mut references), rest)| {
        let (nar_hash, nar_size_bytes, deriver, registration_time_s, ultimate, signatures) = rest;
        let mut path = path;
        if let Some(address) = &address {
            if dir.make_content_path(path.name(), address, &references).is_err() {
                references = References::default();
            }
            path = dir.make_content_path(path.name(), address, &references).expect("none refuses no references");
        }
        let mut info = PathInfo::new(path.clone(), nar_hash, nar_size_bytes);
        info.references = references.others;
        if references.to_self {
            info.references.insert(path);
        }
        PathInfo { deriver, registration_time_s, ultimate, signatures, content_address: address, ..info }
    })
}
