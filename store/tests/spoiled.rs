//! Streams of every kind, spoiled in one place: an error or another stream, never a valid path
//! whose bytes are not those of its hash, and nothing left lying about.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, LazyLock};

use larder_core::arb::texts::spoiled;
use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::report::Silent;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::Name;
use larder_fs::layout::{Access, Layout};
use larder_store::ingest::ContentAddressed;
use larder_store::register::RegisterOptions;
use larder_store::verify::{Nobody, VerifyOptions};
use larder_store::{LocalStore, Options};
use proptest::prelude::*;
use tempfile::TempDir;

fn open(root: &Path) -> LocalStore {
    let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), root);
    // What is durable is not the question here.
    let options = Options { sync: false, gc_reserved_space_bytes: 0, ..Options::default() };
    LocalStore::open(layout, options, Access::ReadWrite, Arc::new(Silent)).unwrap()
}

fn source(name: &str) -> ContentAddressed {
    ContentAddressed { name: Name::new(name).unwrap(), method: Method::Recursive, algorithm: Algorithm::Sha256 }
}

/// A derivation without inputs, with its own output path.
fn derivation() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let text = |out: &str| {
            format!(
                "Derive([(\"out\",\"{out}\",\"\",\"\")],[],[],\"x\",\"/bin/sh\",[\"-c\",\"x\"],[(\"out\",\"{out}\")])"
            )
        };
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.drv");
        std::fs::write(&file, text("/nix/store/ssssssssssssssssssssssssssssssss-x")).unwrap();
        let error = open(&folder.path().join("store")).add(&file, &source("x.drv")).unwrap_err().to_string();
        text(error.rsplit('\'').nth(1).unwrap())
    });
    &TEXT
}

/// A store with a file, a tree with all that a tree can have, a derivation, and references.
struct Filled {
    _folder: TempDir,
    store: LocalStore,
    stream: Vec<u8>,
    dump: Vec<u8>,
}

fn fill() -> Filled {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store"));
    let tree = folder.path().join("tree");
    std::fs::create_dir_all(tree.join("d/e")).unwrap();
    std::fs::write(tree.join("d/file"), "contents").unwrap();
    // A name that is not UTF-8.
    std::fs::write(tree.join(OsStr::from_bytes(b"\xff\xfe\x80")), [0xff; 9]).unwrap();
    std::os::unix::fs::symlink("d/file", tree.join("link")).unwrap();
    let run = tree.join("run");
    std::fs::write(&run, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&run, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let a = store.add(&tree, &source("tree")).unwrap();
    let file = folder.path().join("x.drv");
    std::fs::write(&file, derivation()).unwrap();
    let drv = store.add(&file, &source("x.drv")).unwrap();
    let mut plain = Vec::new();
    store.export(&[a.clone(), drv.clone()], &mut plain).unwrap();
    // References and a deriver, which no addition gives: registered anew.
    let mut dump = Vec::new();
    store.dump_db(Some(std::slice::from_ref(&a)), &mut dump).unwrap();
    let record = String::from_utf8(dump).unwrap();
    let head: Vec<&str> = record.lines().take(3).collect();
    let full = |path| store.dir().full(path);
    let record = format!("{}\n{}\n2\n{}\n{}\n", head.join("\n"), full(&drv), full(&a), full(&drv));
    store.load_db(record.as_bytes()).unwrap();
    let (mut stream, mut dump) = (Vec::new(), Vec::new());
    store.export(&[drv, a], &mut stream).unwrap();
    store.dump_db(None, &mut dump).unwrap();
    assert!(stream.len() > plain.len());
    Filled { _folder: folder, store, stream, dump }
}

fn filled() -> &'static Filled {
    static FILLED: LazyLock<Filled> = LazyLock::new(fill);
    &FILLED
}

/// Every valid path is whole, refers to valid paths only, and is all that is there.
fn sound(store: &LocalStore) -> Result<usize, TestCaseError> {
    let verified = store.verify(VerifyOptions { check_contents: true, repair: false, resume: false }, &Nobody).unwrap();
    prop_assert_eq!(verified.errors, 0);
    prop_assert!(verified.disappeared.is_empty());
    let mut dump = Vec::new();
    store.dump_db(None, &mut dump).unwrap();
    let dump = String::from_utf8(dump).unwrap();
    let valid = dump.lines().filter(|line| line.starts_with('/')).map(str::to_owned).collect::<BTreeSet<_>>();
    let mut count = 0;
    for entry in std::fs::read_dir(&store.layout().real_store).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name == ".links" {
            continue;
        }
        prop_assert!(valid.contains(&format!("/nix/store/{name}")), "{} is left behind", name);
        count += 1;
    }
    Ok(count)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 200, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn import(stream in spoiled(filled().stream.clone())) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let mut told = BTreeSet::new();
        let outcome = store.import(stream.as_slice(), |path| {
            told.insert(path.clone());
            Ok(())
        });
        let there = sound(&store)?;
        prop_assert_eq!(told.len(), there, "not what was told");
        prop_assert_eq!(&store.valid_subset(&told).unwrap(), &told);
        if outcome.is_ok() && there > 0 {
            // What came in goes out again.
            let paths: Vec<_> = told.into_iter().collect();
            let mut again = Vec::new();
            store.export(&paths, &mut again).unwrap();
            let other = tempfile::tempdir().unwrap();
            open(other.path()).import(again.as_slice(), |_| Ok(())).unwrap();
        }
    }

    #[test]
    fn load_db(text in spoiled(registrations())) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        let outcome = store.load_db(text.as_slice());
        let mut dump = Vec::new();
        store.dump_db(None, &mut dump).unwrap();
        // All or nothing; and closed under references, as it can be loaded elsewhere.
        prop_assert!(outcome.is_ok() || dump.is_empty());
        let other = tempfile::tempdir().unwrap();
        let other = open(other.path());
        other.load_db(dump.as_slice()).unwrap();
        let mut again = Vec::new();
        other.dump_db(None, &mut again).unwrap();
        prop_assert_eq!(again, dump);
    }

    /// Objects that lie there, with a text that tells of them: their hashes are found out.
    #[test]
    fn register_validity(text in spoiled(without_hashes())) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(folder.path());
        store.import(filled().stream.as_slice(), |_| Ok(())).unwrap();
        // The same objects under a ledger that knows nothing.
        let ledger = tempfile::tempdir().unwrap();
        let options = Options { sync: false, db_dir: Some(ledger.path().to_owned()), ..Options::default() };
        let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), folder.path());
        let store = LocalStore::open(layout, options, Access::ReadWrite, Arc::new(Silent)).unwrap();
        let outcome = store.register_validity(text.as_slice(), RegisterOptions::default());
        let mut dump = Vec::new();
        store.dump_db(None, &mut dump).unwrap();
        prop_assert!(outcome.is_ok() || dump.is_empty());
        let verified = store.verify(VerifyOptions { check_contents: true, repair: false, resume: false }, &Nobody).unwrap();
        prop_assert_eq!(verified.errors, 0);
    }

    #[test]
    fn derivations(text in spoiled(derivation().as_bytes().to_vec())) {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder.path().join("store"));
        let file = folder.path().join("x.drv");
        std::fs::write(&file, &text).unwrap();
        let outcome = store.add(&file, &source("x.drv"));
        let there = sound(&store)?;
        prop_assert_eq!(there, usize::from(outcome.is_ok()));
        if let Ok(path) = outcome {
            // Registered, so it can be read, and its outputs are known.
            let drv = store.derivation(&path).unwrap();
            prop_assert_eq!(store.derivation_outputs(&path).unwrap().len(), drv.output_paths().filter(|(_, p)| p.is_some()).count());
        }
    }
}

/// Registrations of paths that refer to each other; no derivations, which would have to be there.
fn registrations() -> Vec<u8> {
    let path = |digit: &str| format!("/nix/store/{}-p{digit}", digit.repeat(32));
    let record = |digit: &str, deriver: &str, references: &[&str]| {
        let mut lines = vec![path(digit), digit.repeat(64), format!("1{digit}"), deriver.to_owned()];
        lines.push(references.len().to_string());
        lines.extend(references.iter().map(|reference| path(reference)));
        lines.join("\n") + "\n"
    };
    let deriver = format!("{}.drv", path("8"));
    [record("1", "", &["1"]), record("3", &deriver, &["1", "2", "3"]), record("2", &deriver, &["1"])].concat().into()
}

/// The dump without hashes and sizes, as `--register-validity` wants it.
fn without_hashes() -> Vec<u8> {
    let text = String::from_utf8(filled().dump.clone()).unwrap();
    let mut lines = text.lines();
    let mut kept = Vec::new();
    while let Some(path) = lines.next() {
        let (_hash, _size) = (lines.next().unwrap(), lines.next().unwrap());
        let (deriver, count) = (lines.next().unwrap(), lines.next().unwrap());
        kept.extend([path, deriver, count]);
        kept.extend(lines.by_ref().take(count.parse().unwrap()));
    }
    (kept.join("\n") + "\n").into_bytes()
}

/// The streams that the others spoil are sound themselves, and what they were made from stays so.
#[test]
fn whole_streams() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    store.import(filled().stream.as_slice(), |_| Ok(())).unwrap();
    assert_eq!(sound(&store).unwrap(), 2);
    let mut dump = Vec::new();
    store.dump_db(None, &mut dump).unwrap();
    assert_eq!(dump, filled().dump);
    store.load_db(registrations().as_slice()).unwrap();
    assert_eq!(sound(&filled().store).unwrap(), 2);
}
