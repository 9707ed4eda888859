//! Facts recorded from real Nix, against the whole program: what goes through a store.
//!
//! Formats alone are tested beside their code; `tests/vectors/README.md` has the list.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use data_encoding::{BASE64, HEXLOWER};
use serde_json::Value;

use crate::house::{House, Run, output, run};

fn cases(text: &str, name: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(text).unwrap();
    let cases = file["cases"].as_array().unwrap().clone();
    println!("{name}: {} cases", cases.len());
    cases
}

macro_rules! vectors {
    ($name:literal) => {
        cases(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/", $name, ".json")), $name)
    };
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("{} has no {key}", case["id"]))
}

fn bytes(value: &Value) -> Vec<u8> {
    BASE64.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

/// `nix-store` on a store that is called `/nix/store` and lies in the house.
fn nix_store(house: &House, words: &[&str], stdin: &[u8]) -> Run {
    run(house.rooted("nix-store").args(words), stdin)
}

/// What a fresh store says after the words, and what is registered then.
fn after(words: &[&str], stdin: &[u8]) -> (Run, String) {
    let house = House::new();
    let done = nix_store(&house, words, stdin);
    let dump = nix_store(&house, &["--dump-db"], b"");
    assert_eq!(dump.status, Some(0), "{dump:?}");
    (done, dump.stdout)
}

/// One error, one of those that real Nix gave; or another for what it does badly.
#[track_caller]
fn fails_like(done: &Run, case: &Value, instead: Option<&str>) {
    let id = text(case, "id");
    assert_eq!(done.status, Some(1), "{id}: {done:?}");
    let theirs: Vec<&str> =
        ["2.8.0", "2.26.3"].iter().filter_map(|version| case[*version]["message"].as_str()).collect();
    let said = done.stderr.trim_end();
    match instead {
        Some(instead) => assert_eq!(said, instead, "{id}"),
        None => assert!(theirs.contains(&said), "{id}: {said} is none of {theirs:?}"),
    }
}

#[test]
fn import() {
    let all = vectors!("import");
    let stream = |id: &str| bytes(&all.iter().find(|case| case["id"] == id).unwrap()["stream_b64"]);
    for case in &all {
        let id = text(case, "id");
        let house = House::new();
        if id == "import-refs-unsorted" {
            // "Referenced paths already present."
            for id in ["import-good", "import-good-two"] {
                assert_eq!(nix_store(&house, &["--import"], &stream(id)).status, Some(0));
            }
        }
        let done = nix_store(&house, &["--import"], &bytes(&case["stream_b64"]));
        let real = &case["2.8.0"];
        assert_eq!(done.stdout, text(real, "stdout"), "{id}");
        let dump = nix_store(&house, &["--dump-db"], b"").stdout;
        if real["accepted"] == true {
            assert_eq!((done.status, done.stderr.as_str()), (Some(0), ""), "{id}");
            assert_eq!(dump, text(real, "dump_db"), "{id}");
        } else {
            // We also say where.
            let offset = "error: bad archive: unknown file type 'REGULAR' at offset 56";
            let instead = (id == "import-bad-nar").then_some(offset);
            fails_like(&done, case, instead);
            // What came before the missing end is whole, and stays.
            assert_eq!(dump.is_empty(), id != "import-missing-end-marker", "{id}");
        }
        let verified = nix_store(&house, &["--verify", "--check-contents"], b"");
        assert_eq!(verified.status, Some(0), "{id}: {verified:?}");
    }
}

#[test]
fn export() {
    let all = vectors!("export");
    let house = House::new();
    let first = ["export-one", "export-tree", "export-with-reference", "export-derivation"];
    for id in first.iter().chain(&["export-self-ref-and-deriver"]) {
        let case = all.iter().find(|case| case["id"] == **id).unwrap();
        let done = nix_store(&house, &["--import"], &bytes(&case["stream_b64"]));
        assert_eq!(done.status, Some(0), "{id}: {done:?}");
    }
    for case in &all {
        let id = text(case, "id");
        let given = case["paths_given"].as_array().unwrap().iter().map(|path| path.as_str().unwrap());
        let words: Vec<&str> = std::iter::once("--export").chain(given).collect();
        let stream = output(house.rooted("nix-store").args(&words), b"");
        assert_eq!((stream.status.code(), stream.stderr.len()), (Some(0), 0), "{id}");
        assert!(stream.stdout == bytes(&case["stream_b64"]), "{id}: other bytes");
        for info in case["path_infos"].as_array().unwrap() {
            let path = text(info, "path");
            let ask = |query: &str| nix_store(&house, &["--query", query, path], b"").stdout;
            assert_eq!(ask("--hash").trim_end(), text(info, "nar_hash_nix32"), "{id}");
            assert_eq!(ask("--size").trim_end(), info["nar_size"].to_string(), "{id}");
            let references = ask("--references");
            assert_eq!(serde_json::json!(references.lines().collect::<Vec<_>>()), info["references"], "{id}");
            assert_eq!(ask("--deriver").trim_end(), text(info, "deriver"), "{id}");
        }
    }
}

#[test]
fn validity() {
    let export = vectors!("export");
    let objects = House::new();
    for case in &export {
        let done = nix_store(&objects, &["--import"], &bytes(&case["stream_b64"]));
        // One of them lacks what it refers to until a later one has brought it.
        assert!(done.status == Some(0) || case["id"] == "export-missing-reference-allowed", "{done:?}");
    }
    for case in vectors!("validity") {
        let id = text(&case, "id");
        if let Some(wanted) = case["text"].as_str() {
            assert_eq!(nix_store(&objects, &["--load-db"], wanted.as_bytes()).status, Some(0), "{id}");
            let mut words = vec!["--dump-db"];
            words.extend(case["paths"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()));
            let dump = nix_store(&objects, &words, b"");
            assert_eq!((dump.stdout.as_str(), dump.status), (wanted, Some(0)), "{id}: {}", dump.stderr);
            continue;
        }
        let flags: Vec<&str> = case["flags"].as_array().unwrap().iter().map(|flag| flag.as_str().unwrap()).collect();
        let (done, dump) = after(&flags, text(&case, "stdin").as_bytes());
        let real = &case["2.8.0"];
        if real["accepted"] == true {
            done.prints("");
            assert_eq!(dump, text(real, "dump_db_after"), "{id}");
            continue;
        }
        assert_eq!((done.stdout.as_str(), dump.as_str()), ("", ""), "{id}");
        let instead = match id {
            // Nix stops at an assertion.
            "regdb-load-db-truncated-refs" => Some("error: missing input"),
            "regdb-load-db-negative-count" => Some("error: number expected"),
            // Nix complains of the line after, which is not there.
            "regdb-load-db-blank-line" => Some("error: not an absolute path: ''"),
            // A store that lies elsewhere is looked at where it lies.
            "regdb-register-hash-given" | "regdb-register-missing-file" => {
                assert!(
                    done.status == Some(1) && done.stderr.contains(": No such file or directory"),
                    "{id}: {done:?}"
                );
                continue;
            }
            _ => None,
        };
        fails_like(&done, &case, instead);
    }
}

/// Derivations that are added as files: registered if real Nix registers them.
#[test]
fn s038_drv_parse() {
    let house = House::new();
    let mut accepted = 0;
    for case in vectors!("drv_parse") {
        let id = text(&case, "id");
        // The same name may come again with other contents.
        let folder = house.work().join(id);
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join(format!("{}.drv", text(&case, "name")));
        std::fs::write(&file, text(&case, "drv_text")).unwrap();
        let done = nix_store(&house, &["--add", file.to_str().unwrap()], b"");
        let real = &case["2.26.3"];
        assert_eq!(case["2.8.0"]["accepted"], real["accepted"], "{id}");
        assert_eq!(done.status == Some(0), real["accepted"] == true, "{id}: {done:?}");
        let theirs = real["message"].as_str().unwrap_or_default();
        if theirs.contains("has incorrect") {
            assert_eq!(done.stderr.trim_end(), theirs, "{id}");
        }
        accepted += u32::from(done.status == Some(0));
    }
    let dump = nix_store(&house, &["--dump-db"], b"").stdout;
    let valid = dump.lines().filter(|line| line.starts_with('/') && line.contains(".drv")).count();
    assert!(accepted >= 10 && valid > 0, "{accepted} accepted, {valid} registered");
    assert_eq!(nix_store(&house, &["--verify", "--check-contents"], b"").status, Some(0));
}

fn lay(path: &Path, node: &Value) {
    match node["type"].as_str().unwrap() {
        "regular" => {
            let contents = node["content_hex"].as_str().map(|hex| HEXLOWER.decode(hex.as_bytes()).unwrap());
            let repeated = node["content_repeat"].as_array().map(|pair| {
                let byte = HEXLOWER.decode(pair[0].as_str().unwrap().as_bytes()).unwrap();
                byte.repeat(usize::try_from(pair[1].as_u64().unwrap()).unwrap())
            });
            std::fs::write(path, contents.or(repeated).expect("contents of a kind known here")).unwrap();
            if node["executable"] == true {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        "symlink" => symlink(node["target"].as_str().unwrap(), path).unwrap(),
        "directory" => {
            std::fs::create_dir(path).unwrap();
            for (name, node) in node["entries"].as_object().unwrap() {
                lay(&path.join(name), node);
            }
        }
        other => panic!("no node is a {other}"),
    }
}

#[test]
fn store_paths_add() {
    let house = House::new();
    let mut compared = 0;
    for case in vectors!("store_paths_add") {
        let folder = house.work().join(text(&case, "id"));
        std::fs::create_dir(&folder).unwrap();
        let file = folder.join(text(&case, "name"));
        lay(&file, &case["node"]);
        let file = file.to_str().unwrap();
        let mut check = |words: &[&str], key: &str| {
            let Some(wanted) = case[key].as_str() else { return };
            nix_store(&house, words, b"").prints(&format!("{wanted}\n"));
            compared += 1;
        };
        check(&["--add", file], "add");
        for algorithm in ["md5", "sha1", "sha256", "sha512"] {
            check(&["--add-fixed", algorithm, file], &format!("add_fixed_flat_{algorithm}"));
            check(&["--add-fixed", "--recursive", algorithm, file], &format!("add_fixed_recursive_{algorithm}"));
        }
        let hash = nix_store(&house, &["-q", "--hash", text(&case, "add")], b"");
        hash.prints(&format!("{}\n", text(&case, "nar_sha256")));
    }
    println!("store_paths_add: {compared} paths compared");
    assert!(compared >= 40);
}

/// Paths as the first line of a record: real Nix takes any 33rd character, we want the dash.
#[test]
fn store_path_parse() {
    let mut stricter = Vec::new();
    for case in vectors!("store_path_parse") {
        let input = text(&case, "input");
        let record = format!("{input}\n{}\n120\n\n0\n", "ab".repeat(32));
        let (done, _) = after(&["--load-db"], record.as_bytes());
        let (old, new) = (&case["2.8.0"]["accepted"], &case["2.26.3"]["accepted"]);
        match (done.status, *new == true) {
            (Some(0), true) | (Some(1), false) => {}
            (Some(1), true) => stricter.push(input.to_owned()),
            _ => panic!("{input}: 2.8 {old}, 2.26 {new}, and now {done:?}"),
        }
    }
    println!("stricter than real Nix: {stricter:?}");
    let dashless = |path: &String| path.rsplit('/').next().unwrap().as_bytes().get(32) != Some(&b'-');
    assert!(!stricter.is_empty() && stricter.iter().all(dashless), "{stricter:?}");
}
