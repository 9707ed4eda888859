//! Beside real Nix: its store is recognised, added to, never deleted from, and taken over.

use std::path::Path;

use super::has_nix;
use super::store::Made;
use crate::house::run;

/// What deletes, or could: every one is refused as long as real Nix knows more than Larder.
const DELETING: &[&[&str]] = &[
    &["--delete", "{src}"],
    &["--delete", "--ignore-liveness", "{multi-man}"],
    &["--gc"],
    &["--gc", "--max-freed", "1"],
];

fn refused(made: &Made) {
    for words in DELETING {
        let words: Vec<String> = words
            .iter()
            .map(|word| match word.strip_prefix('{').and_then(|name| name.strip_suffix('}')) {
                Some(name) => made.path(name).to_owned(),
                None => (*word).to_owned(),
            })
            .collect();
        let run = made.ours(&words);
        assert_eq!(run.status, Some(1), "{words:?}: {run:?}");
        assert!(run.stderr.contains("larder adopt"), "{words:?}: {run:?}");
    }
}

/// All files below the store, with what would show that one was touched.
fn state(dir: &Path) -> Vec<(String, u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = std::fs::symlink_metadata(&path).unwrap();
        found.push((path.display().to_string(), meta.ino(), meta.len()));
        if meta.is_dir() {
            found.extend(state(&path));
        }
    }
    found.sort();
    found
}

#[test]
fn a_store_of_real_nix_is_safe_and_is_taken_over() {
    if !has_nix() {
        return;
    }
    let made = Made::new();
    let store = made.house.path().join("store");
    let registered = made.real(&["--dump-db"]).stdout;
    let before = state(&store);

    // Reading tells of it, once.
    let first = made.ours(&["--query", "--size", made.path("top")]);
    assert_eq!(first.status, Some(1));
    assert!(first.stderr.contains("is managed by real Nix") && first.stderr.contains("larder adopt"), "{first:?}");
    // Adding works; a path that real Nix has already is left as it is.
    let file = made.house.write("new", "new\n");
    let added = made.ours(&["--add", file.to_str().unwrap()]);
    assert_eq!(added.status, Some(0), "{added:?}");
    let added = added.stdout.trim_end().to_owned();
    let again = made.ours(&["--query", "--size", &added]);
    assert_eq!((again.stdout.as_str(), again.stderr.as_str()), ("120\n", ""), "told twice");
    refused(&made);
    let after: Vec<_> = state(&store).into_iter().filter(|(path, ..)| *path != added).collect();
    assert_eq!(after, before, "something in the store of real Nix was touched");

    let dry = made.house.words("larder", "adopt --dry-run");
    assert_eq!((dry.status, made.ours(&["--query", "--size", made.path("top")]).status), (Some(0), Some(1)), "{dry:?}");
    let adopted = made.house.words("larder", "adopt");
    assert_eq!(adopted.status, Some(0), "{adopted:?}");
    let new = run(made.house.command("nix-store").args(["--add"]).arg(&file), b"");
    assert_eq!(new.stdout.trim_end(), added);
    same_ledgers(&made);

    // What a root keeps stays; what nothing needs goes.
    let alive = made.ours(&["--delete", made.path("multi")]);
    assert!(alive.status == Some(1) && alive.stderr.contains("since it is still alive"), "{alive:?}");
    let gone = made.ours(&["--delete", made.path("unbuilt.drv")]);
    assert_eq!(gone.status, Some(0), "{gone:?}");
    assert!(!Path::new(made.path("unbuilt.drv")).exists());

    // Real Nix goes on, and with it the care.
    let later = made.house.write("later", "later\n");
    let later = made.real(&["--add", later.to_str().unwrap()]).stdout;
    let kept = made.ours(&["--delete", later.trim_end()]);
    assert!(kept.status == Some(1) && kept.stderr.contains("larder adopt"), "{kept:?}");
    assert!(Path::new(later.trim_end()).exists());
    drop(registered);
}

fn same_ledgers(made: &Made) {
    let (theirs, ours) = (made.real(&["--dump-db"]), made.ours(&["--dump-db"]));
    assert_eq!(ours, theirs);
    for path in theirs.stdout.lines().filter(|line| line.starts_with('/')) {
        for query in ["--hash", "--references", "--referrers", "--deriver", "--roots"] {
            assert_eq!(made.ours(&["-q", query, path]), made.real(&["-q", query, path]), "{query} {path}");
        }
    }
}

#[test]
fn a_dump_is_taken_over() {
    if !has_nix() {
        return;
    }
    let made = Made::new();
    let dump = made.house.write("dump", made.real(&["--dump-db"]).stdout);
    let adopted = made.house.words("larder", &format!("adopt --from {}", dump.display()));
    assert_eq!(adopted.status, Some(0), "{adopted:?}");
    same_ledgers(&made);
    let gone = made.ours(&["--delete", made.path("unbuilt.drv")]);
    assert_eq!(gone.status, Some(0), "{gone:?}");
}

/// What real Nix has registered is not replaced by something else of the same name.
#[test]
fn objects_of_real_nix_are_not_replaced() {
    if !has_nix() {
        return;
    }
    let made = Made::new();
    let store = made.house.path().join("store");
    let src = made.path("src").to_owned();
    let good = crate::house::output(made.house.command("nix-store").args(["--export", &src]), b"").stdout;
    let at = good.windows(4).position(|bytes| bytes == b"text").unwrap();
    let mut other = good.clone();
    other[at..at + 4].copy_from_slice(b"TEXT");
    let before = state(&store);
    let refused = made.house.feed("nix-store", "--import", &other);
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("which real Nix has registered"), "{refused:?}");
    assert_eq!(state(&store), before);
    // The same object is taken as it lies there.
    let taken = made.house.feed("nix-store", "--import", &good);
    assert_eq!((taken.status, taken.stdout.trim_end()), (Some(0), src.as_str()), "{taken:?}");
    assert_eq!(state(&store), before);
    assert_eq!(made.ours(&["-q", "--hash", &src]), made.real(&["-q", "--hash", &src]));
    assert_eq!(made.ours(&["--verify-path", &src]).status, Some(0));
    assert_eq!(made.real(&["--verify-path", &src]).status, Some(0));
}
