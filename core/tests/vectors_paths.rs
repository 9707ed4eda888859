//! Hashes, names, store paths and content addresses against what Nix 2.8.0 and 2.26.3 gave.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, reason = "tests may panic and tell")]

use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::drv_path;
use larder_core::hash::{Algorithm, Encoding, Hash, Sha256Digest};
use larder_core::path_info::PathInfo;
use larder_core::store_dir::{References, StoreDir};
use larder_core::store_path::{Name, StorePath};
use serde_json::Value;

macro_rules! vectors {
    ($name:literal) => {
        cases($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/", $name, ".json")))
    };
}

fn cases(name: &str, text: &str) -> Vec<Value> {
    let value: Value = serde_json::from_str(text).unwrap();
    let cases = value["cases"].as_array().unwrap().clone();
    println!("{name}: {} cases", cases.len());
    cases
}

fn dir() -> StoreDir {
    StoreDir::new("/nix/store").unwrap()
}

fn str_of<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("{}: no {key}", case["id"]))
}

fn name(case: &Value) -> Name {
    Name::new(str_of(case, "name")).unwrap()
}

fn unhex(text: &str) -> Vec<u8> {
    data_encoding::HEXLOWER.decode(text.as_bytes()).unwrap()
}

fn paths(dir: &StoreDir, list: &Value) -> std::collections::BTreeSet<StorePath> {
    list.as_array().unwrap().iter().map(|path| dir.parse(path.as_str().unwrap()).unwrap()).collect()
}

#[test]
fn hash_encodings() {
    for case in vectors!("hash_encodings") {
        let id = str_of(&case, "id");
        let algorithm: Algorithm = str_of(&case, "algo").parse().unwrap();
        let hash = Hash::new(algorithm, &unhex(str_of(&case, "hex"))).unwrap();
        for (key, encoding) in [
            ("hex", Encoding::Base16),
            ("nix32", Encoding::Base32),
            ("base64", Encoding::Base64),
            ("sri", Encoding::Sri),
        ] {
            let text = str_of(&case, key);
            assert_eq!(hash.encode(encoding), text, "{id}");
            assert_eq!(Hash::parse(text, Some(algorithm)), Ok(hash), "{id} {key}");
            assert_eq!(Hash::parse_bare(text, algorithm).ok(), (encoding != Encoding::Sri).then_some(hash), "{id}");
        }
    }
}

#[test]
fn hash_parse() {
    for case in vectors!("hash_parse") {
        let id = str_of(&case, "id");
        let wanted = case["algo"].as_str().map(|algo| algo.parse().unwrap());
        let ours = Hash::parse(str_of(&case, "input"), wanted);
        for version in ["2.8.0", "2.26.3"] {
            let theirs = &case[version];
            assert_eq!(ours.is_ok(), theirs["accepted"].as_bool().unwrap(), "{id} {version}: {ours:?}");
            if let Ok(hash) = ours {
                assert_eq!(hash.encode(Encoding::Base16), str_of(theirs, "hex"), "{id} {version}");
            }
        }
    }
}

#[test]
fn store_paths_add() {
    let dir = dir();
    let mut compared = 0;
    for case in vectors!("store_paths_add") {
        let id = str_of(&case, "id");
        let nar = Sha256Digest::parse(str_of(&case, "nar_sha256")).unwrap();
        let path = dir.make_fixed_path(Method::Recursive, nar.to_hash(), &name(&case)).unwrap();
        assert_eq!(dir.full(&path), str_of(&case, "add"), "{id}");
        assert_eq!(dir.full(&path), str_of(&case, "add_fixed_recursive_sha256"), "{id}");
        // Hashes of the contents are known for files alone; those of the NAR for all are in `fs`.
        if let Some(contents) = case["node"]["content_hex"].as_str().map(unhex) {
            for algorithm in Algorithm::ALL {
                let hash = Hash::of(algorithm, &contents);
                let path = dir.make_fixed_path(Method::Flat, hash, &name(&case)).unwrap();
                assert_eq!(dir.full(&path), str_of(&case, &format!("add_fixed_flat_{algorithm}")), "{id}");
                compared += 1;
            }
            let executable = case["node"]["executable"].as_bool().unwrap_or(false);
            for algorithm in Algorithm::ALL {
                let hash = Hash::of(algorithm, &nar_of_file(&contents, executable));
                let path = dir.make_fixed_path(Method::Recursive, hash, &name(&case)).unwrap();
                assert_eq!(dir.full(&path), str_of(&case, &format!("add_fixed_recursive_{algorithm}")), "{id}");
                compared += 1;
            }
        }
    }
    assert!(compared >= 40, "{compared}");
}

/// The NAR of a file.
fn nar_of_file(contents: &[u8], executable: bool) -> Vec<u8> {
    let mut nar = Vec::new();
    let flag: &[&[u8]] = if executable { &[b"executable", b""] } else { &[] };
    let head: &[&[u8]] = &[b"nix-archive-1", b"(", b"type", b"regular"];
    for text in [head, flag, &[b"contents", contents, b")"]].concat() {
        nar.extend_from_slice(&(text.len() as u64).to_le_bytes());
        nar.extend_from_slice(text);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

fn check_fixed(case: &Value, dir: &StoreDir) {
    let algorithm: Algorithm = str_of(case, "algo").parse().unwrap();
    let hash = Hash::parse(str_of(case, "hash_hex"), Some(algorithm)).unwrap();
    let method = if case["recursive"].as_bool().unwrap() { Method::Recursive } else { Method::Flat };
    let path = dir.make_fixed_path(method, hash, &name(case)).unwrap();
    assert_eq!(dir.full(&path), str_of(case, "path"), "{}", case["id"]);
}

#[test]
fn store_paths_fixed() {
    for case in vectors!("store_paths_fixed") {
        check_fixed(&case, &dir());
    }
}

#[test]
fn store_paths_storedir() {
    for case in vectors!("store_paths_storedir") {
        check_fixed(&case, &StoreDir::new(str_of(&case, "store_dir")).unwrap());
    }
}

#[test]
fn store_paths_text() {
    let dir = dir();
    for case in vectors!("store_paths_text") {
        let id = str_of(&case, "id");
        let contents = unhex(str_of(&case, "content_hex"));
        let others = paths(&dir, &case["references"]);
        let address = ContentAddress::Text(Sha256Digest::of(&contents));
        assert_eq!(address.to_string(), str_of(&case, "ca"), "{id}");
        assert_eq!(str_of(&case, "ca").parse(), Ok(address.clone()), "{id}");
        let references = References { others: others.clone(), to_self: false };
        let path = dir.make_content_path(&name(&case), &address, &references).unwrap();
        assert_eq!(dir.full(&path), str_of(&case, "path"), "{id}");
        let nar = Sha256Digest::of(&nar_of_file(&contents, false));
        assert_eq!(Sha256Digest::parse(str_of(&case, "nar_hash")), Ok(nar), "{id}");
        // A `.drv` file is just such an object.
        let drv = drv_path(&dir, &Name::new("n").unwrap(), &contents, others.clone()).unwrap();
        let same = dir.make_content_path(&Name::new("n.drv").unwrap(), &address, &references).unwrap();
        assert_eq!(drv, same, "{id}");
        let mut info = PathInfo::new(path, nar, 1);
        (info.references, info.content_address) = (others, Some(address));
        assert!(info.is_content_addressed(&dir), "{id}");
    }
}

#[test]
fn store_path_names() {
    let dir = dir();
    let zeros = Sha256Digest([0; 32]).to_hash();
    for case in vectors!("store_path_names") {
        let id = str_of(&case, "id");
        let ours = Name::new(str_of(&case, "name"));
        // The rule of 2.26; 2.8 takes names that begin with one or two dots and a dash.
        let theirs = &case["2.26.3"];
        assert_eq!(ours.is_ok(), theirs["accepted"].as_bool().unwrap(), "{id}: {ours:?}");
        if let Ok(name) = ours {
            assert_eq!(case["2.8.0"]["path"], theirs["path"], "{id}");
            let path = dir.make_fixed_path(Method::Flat, zeros, &name).unwrap();
            assert_eq!(dir.full(&path), str_of(theirs, "path"), "{id}");
        }
    }
}

#[test]
fn store_path_parse() {
    // Nix does not look at the character after the hash part; it must be a dash here.
    let stricter = ["store-path-parse-002", "store-path-parse-003"];
    let dir = dir();
    for case in vectors!("store_path_parse") {
        let id = str_of(&case, "id");
        let ours = dir.parse(str_of(&case, "input"));
        let accepted = case["2.26.3"]["accepted"].as_bool().unwrap() && !stricter.contains(&id);
        assert_eq!(ours.is_ok(), accepted, "{id}: {ours:?}");
        if let Ok(path) = ours {
            assert_eq!(dir.parse(dir.full(&path)), Ok(path), "{id}");
        }
    }
}

#[test]
fn content_address() {
    let dir = dir();
    for case in vectors!("content_address") {
        let id = str_of(&case, "id");
        for version in ["2.8.0", "2.26.3"] {
            let made = &case[version];
            let path = dir.parse(str_of(made, "rewritten_path")).unwrap();
            let address: ContentAddress = str_of(made, "ca").parse().unwrap();
            assert_eq!(address.to_string(), str_of(made, "ca"), "{id} {version}");
            let nar = Sha256Digest::parse(str_of(made, "nar_sha256_hex")).unwrap();
            let mut info = PathInfo::new(path, nar, 1);
            info.references = paths(&dir, &made["references"]);
            info.content_address = Some(address);
            assert!(info.is_content_addressed(&dir), "{id} {version}");
            // Any other set of references gives another path.
            if info.references.pop_first().is_some() {
                assert!(!info.is_content_addressed(&dir), "{id} {version}");
            }
        }
    }
}

/// Texts that Nix 2.8 or 2.26 reads as content addresses, or does not (formats, section 1.5).
#[test]
fn content_address_texts() {
    let sha1 = Hash::of(Algorithm::Sha1, b"x");
    let sha256 = Hash::of(Algorithm::Sha256, b"x");
    for (text, accepted) in [
        (format!("fixed:{sha1}"), true),
        (format!("fixed:r:{}", sha1.encode_prefixed(Encoding::Base16)), true),
        (format!("fixed:{}", sha256.encode_prefixed(Encoding::Base64)), true),
        (format!("fixed:git:{sha1}"), true),
        (format!("fixed:git:{sha256}"), false),
        (format!("text:{sha256}"), true),
        // 2.26 reads it; its own path could never be made.
        (format!("text:{sha1}"), false),
        (format!("text:r:{sha256}"), false),
        (format!("{sha256}"), false),
        (format!("fixed:{}", sha256.encode(Encoding::Base16)), false),
        (String::new(), false),
    ] {
        let parsed: Result<ContentAddress, _> = text.parse();
        assert_eq!(parsed.is_ok(), accepted, "{text}: {parsed:?}");
    }
}
