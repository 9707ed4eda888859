//! Rules of the house that no compiler knows: which way the doors open, where `unsafe` may be,
//! how files begin, and which rows of the mission have a test.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Each crate with those of ours that it may know. Tests and benches know what they need.
const DOORS: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("store-db", &["core"]),
    ("fs", &["core"]),
    ("wire", &["core"]),
    ("cache", &["core"]),
    ("sandbox", &[]),
    ("gc", &["core", "store-db", "fs"]),
    ("store", &["core", "store-db", "fs", "gc"]),
    ("realise", &["core", "fs", "gc", "store", "sandbox", "wire", "cache"]),
    ("cli", &["core", "store-db", "fs", "wire", "cache", "sandbox", "gc", "store", "realise"]),
    ("benches", &["core", "store-db", "fs", "wire", "cache", "sandbox", "gc", "store", "realise"]),
    ("fuzz", &["core", "store-db", "fs", "wire", "cache", "sandbox", "gc", "store", "realise"]),
    ("xtask", &[]),
];

/// Rows of the mission, `S001` to this one.
const LAST_ROW: u32 = 110;

/// Rows that have a test by now, and must keep it.
const CLOSED: &[u32] = &[
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
    32, 35, 36, 37, 38, 39, 40, 42, 43, 44, 45, 46, 47, 48, 50, 51, 52, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65,
    66, 67, 68, 69, 70, 71, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 83, 84, 85, 87, 88, 89, 90, 92, 93, 94, 95, 96, 97,
    98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110,
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn members() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let list = text.lines().find_map(|line| line.strip_prefix("members = [")).expect("the members, on one line");
    list.trim_end_matches(']').split(',').map(|name| name.trim().trim_matches('"').to_owned()).collect()
}

/// The crates of ours in the sections of a manifest whose names end so.
fn ours(manifest: &str, section: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut inside = false;
    for line in manifest.lines() {
        if let Some(name) = line.strip_prefix('[') {
            let name = name.trim_end().trim_end_matches(']');
            inside = name == section || name.ends_with(&format!(".{section}"));
            // `[dependencies.larder-x]` would be a way around the next test.
            assert!(!name.contains("dependencies.larder"), "write '{line}' as a line of its section");
        } else if inside && let Some(rest) = line.strip_prefix("larder-") {
            let end = rest.find(['.', ' ', '=']).unwrap_or(rest.len());
            found.insert(rest[..end].to_owned());
        }
    }
    found
}

/// Every Rust file of the workspace, from its root.
fn sources() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> = members().into_iter().map(PathBuf::from).collect();
    folders.push("tests".into());
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(root().join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let path = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                if entry.file_name() != "target" {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|ext| ext == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

#[test]
fn doors_open_one_way() {
    for name in members() {
        let (_, allowed) = DOORS
            .iter()
            .find(|(crate_name, _)| *crate_name == name)
            .unwrap_or_else(|| panic!("{name} has no row here"));
        let manifest = read(&Path::new(&name).join("Cargo.toml"));
        for section in ["dependencies", "build-dependencies"] {
            for known in ours(&manifest, section) {
                assert!(allowed.contains(&known.as_str()), "{name} must not depend on {known}");
            }
        }
        // The one crate with `unsafe` says all lints itself.
        let lints =
            if name == "sandbox" { "undocumented_unsafe_blocks = \"deny\"" } else { "[lints]\nworkspace = true\n" };
        assert!(manifest.contains(lints), "{name} does not have the lints of the workspace");
    }
    // The table itself: a crate knows only those above it.
    for (at, (name, allowed)) in DOORS.iter().enumerate() {
        for known in *allowed {
            assert!(DOORS[..at].iter().any(|(above, _)| above == known), "{name} is above {known}");
        }
    }
    let sections = "[dependencies]\nlarder-core.workspace = true\n[target.'cfg(unix)'.dependencies]\n\
                    larder-fs = { path = \"x\" }\n[dev-dependencies]\nlarder-gc.workspace = true\n";
    assert_eq!(ours(sections, "dependencies"), BTreeSet::from(["core".into(), "fs".into()]));
}

#[test]
fn unsafe_code_stays_in_the_sandbox() {
    let begins = ["{", "fn", "impl", "extern", "trait", "("];
    for path in sources().iter().filter(|path| !path.starts_with("sandbox")) {
        for (number, line) in read(path).lines().enumerate() {
            let code = line.trim_start();
            let comment = code.starts_with("//") || path.ends_with("tests/tidy.rs");
            let used = code.split("unsafe").skip(1).any(|rest| begins.iter().any(|b| rest.trim_start().starts_with(b)));
            assert!(comment || !used, "{}:{}: {code}", path.display(), number + 1);
            let allowed = code.contains("allow(unsafe_code") || code.contains("expect(unsafe_code");
            assert!(comment || !allowed, "{}:{}: {code}", path.display(), number + 1);
        }
    }
}

#[test]
fn files_say_what_they_are() {
    for path in sources() {
        let target = path.starts_with("fuzz/fuzz_targets");
        let head = if target { "#![no_main]" } else { "//! " };
        assert!(read(&path).starts_with(head), "{} does not begin with {head}", path.display());
    }
}

/// `cargo test s0` is the map of the mission: names of tests begin with the rows they close.
#[test]
fn rows_have_tests() {
    let mut map: BTreeMap<u32, Vec<String>> = BTreeMap::new();
    for path in sources() {
        for line in read(&path).lines() {
            let line = line.trim_start();
            let Some(name) = line.strip_prefix("fn ").or_else(|| line.strip_prefix("async fn ")) else { continue };
            let name = name.split(['(', '<']).next().unwrap_or_default();
            for part in name.split('_') {
                let row = part.strip_prefix('s').filter(|digits| digits.len() == 3).and_then(|d| d.parse().ok());
                let Some(row) = row else { break };
                assert!((1..=LAST_ROW).contains(&row), "{}: '{name}' names no row of the mission", path.display());
                map.entry(row).or_default().push(format!("{} ({})", name, path.display()));
            }
        }
    }
    for (row, tests) in &map {
        println!("S{row:03}: {}", tests.join(", "));
    }
    println!("{} of {LAST_ROW} rows have tests", map.len());
    for row in CLOSED {
        assert!(map.contains_key(row), "no test is named after S{row:03}");
    }
}

/// Every file of recorded facts is read by some test, and the list of them is whole.
#[test]
fn vectors_are_read() {
    let folder = root().join("tests/vectors");
    let list = std::fs::read_to_string(folder.join("README.md")).unwrap();
    let texts: Vec<(PathBuf, String)> = sources().into_iter().map(|path| (path.clone(), read(&path))).collect();
    let mut count = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let Some(stem) = name.strip_suffix(".json") else { continue };
        let ways = [format!("vectors/{name}"), format!("cases(\"{stem}\")"), format!("vectors!(\"{stem}\")")];
        let ways = [&ways[..], &[format!("vector_file(\"{stem}\")")]].concat();
        let readers: Vec<String> = texts
            .iter()
            .filter(|(_, text)| ways.iter().any(|way| text.contains(way)))
            .map(|(path, _)| path.display().to_string())
            .collect();
        println!("{name}: {}", readers.join(", "));
        assert!(!readers.is_empty(), "no test reads tests/vectors/{name}");
        let row = list.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let row = row.unwrap_or_else(|| panic!("tests/vectors/README.md has no row for {name}"));
        for reader in readers {
            assert!(row.contains(&format!("`{reader}`")), "tests/vectors/README.md, {name}: {reader} is not named");
        }
        count += 1;
    }
    println!("{count} files of vectors");
}

/// Nothing that is built can be taken for a library of the system: no libraries leave the house.
#[test]
fn s040_no_libraries_are_installed() {
    let mut programs = Vec::new();
    for name in members() {
        let manifest = read(&Path::new(&name).join("Cargo.toml"));
        for kind in ["cdylib", "dylib", "staticlib"] {
            assert!(!manifest.contains(kind), "{name} makes a {kind}");
        }
        let package = manifest.lines().find_map(|line| line.strip_prefix("name = ")).unwrap().trim_matches('"');
        let private = ["xtask"];
        assert!(package.starts_with("larder") || private.contains(&package), "{package} could be anything");
        if name == "cli" {
            programs.extend(manifest.split("[[bin]]").skip(1).filter_map(|part| {
                part.lines().find_map(|line| line.strip_prefix("name = ")).map(|n| n.trim_matches('"').to_owned())
            }));
        }
    }
    assert_eq!(programs, ["larder"]);
}
