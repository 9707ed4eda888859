//! A store in a temporary folder: what comes in, what can be said of it, what goes out.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::Path;
use std::sync::Arc;

use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::report::Silent;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};
use larder_fs::layout::{Access, Layout};
use larder_store::ingest::ContentAddressed;
use larder_store::verify::{Nobody, VerifyOptions};
use larder_store::{LocalStore, Options, StoreError};

fn open(root: &Path) -> LocalStore {
    let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), root);
    LocalStore::open(layout, Options::default(), Access::ReadWrite, Arc::new(Silent)).unwrap()
}

fn source(name: &str) -> ContentAddressed {
    ContentAddressed { name: Name::new(name).unwrap(), method: Method::Recursive, algorithm: Algorithm::Sha256 }
}

fn names(store: &LocalStore) -> BTreeSet<String> {
    let entries = std::fs::read_dir(&store.layout().real_store).unwrap();
    entries.map(|e| e.unwrap().file_name().into_string().unwrap()).filter(|n| n != ".links").collect()
}

#[test]
fn a_tree_comes_in_and_goes_out() {
    let folder = tempfile::tempdir().unwrap();
    let tree = folder.path().join("tree");
    std::fs::create_dir_all(tree.join("bin")).unwrap();
    std::fs::write(tree.join("bin/run"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(tree.join("bin/run"), std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::write(tree.join("text"), "hello\n").unwrap();
    symlink("text", tree.join("link")).unwrap();
    let store = open(&folder.path().join("one"));
    let path = store.add(&tree, &source("tree")).unwrap();
    assert_eq!(names(&store), BTreeSet::from([path.to_string()]), "nothing else is left behind");
    let real = store.layout().real_path(&path);
    for (name, mode) in [("", 0o555), ("bin", 0o555), ("bin/run", 0o555), ("text", 0o444)] {
        let meta = std::fs::symlink_metadata(real.join(name)).unwrap();
        assert_eq!((meta.mode() & 0o7777, meta.mtime()), (mode, 1), "{name}");
    }
    assert!(
        store.verify(VerifyOptions { check_contents: true, repair: false, resume: false }, &Nobody).unwrap().errors
            == 0
    );
    // Adding again changes nothing.
    assert_eq!(store.add(&tree, &source("tree")).unwrap(), path);
    assert_eq!(names(&store), BTreeSet::from([path.to_string()]));

    let mut stream = Vec::new();
    store.export(std::slice::from_ref(&path), &mut stream).unwrap();
    let other = open(&folder.path().join("two"));
    let mut imported = Vec::new();
    other
        .import(stream.as_slice(), |path| {
            imported.push(path.clone());
            Ok(())
        })
        .unwrap();
    assert_eq!(imported, std::slice::from_ref(&path));
    assert_eq!(other.info(&path).unwrap().nar_hash, store.info(&path).unwrap().nar_hash);
    let mut again = Vec::new();
    other.export(&[path], &mut again).unwrap();
    assert_eq!(again, stream);
}

/// A stream cut anywhere leaves nothing: no valid path, no entry.
#[test]
fn a_cut_stream_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "contents\n").unwrap();
    let store = open(&folder.path().join("one"));
    let path = store.add(&file, &source("file")).unwrap();
    let mut stream = Vec::new();
    store.export(&[path], &mut stream).unwrap();
    let other = open(&folder.path().join("two"));
    for cut in 0..stream.len() - 8 {
        let error = other.import(&stream[..cut], |_| Ok(())).unwrap_err();
        assert!(matches!(error, StoreError::Export(_)), "{cut}: {error}");
        assert_eq!(names(&other), BTreeSet::new(), "{cut}");
    }
    // The end marker is missing, but the object is whole: it stays, as in Nix.
    other.import(&stream[..stream.len() - 8], |_| Ok(())).unwrap_err();
    assert_eq!(names(&other).len(), 1);
}

/// S038: a derivation that claims an output path that is not its own does not become valid.
#[test]
fn s038_wrong_output_paths_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("one"));
    let drv = |out: &str| {
        format!("Derive([(\"out\",\"{out}\",\"\",\"\")],[],[],\"x86_64-linux\",\"/bin/sh\",[],[(\"out\",\"{out}\")])")
    };
    let file = folder.path().join("x.drv");
    std::fs::write(&file, drv("/nix/store/ssssssssssssssssssssssssssssssss-x")).unwrap();
    let error = store.add(&file, &source("x.drv")).unwrap_err().to_string();
    assert!(
        error.contains("has incorrect output '/nix/store/ssssssssssssssssssssssssssssssss-x', should be '"),
        "{error}"
    );
    assert_eq!(names(&store), BTreeSet::new());
    let right = error.rsplit('\'').nth(1).unwrap().to_owned();
    std::fs::write(&file, drv(&right)).unwrap();
    let path = store.add(&file, &source("x.drv")).unwrap();
    let outputs = store.derivation_outputs(&path).unwrap();
    assert_eq!(outputs.values().map(|p| store.dir().full(p)).collect::<Vec<_>>(), [right]);
}

#[test]
fn registrations_go_round() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("one"));
    let path = |n: u8| format!("/nix/store/{}-p{n}", char::from(b'0' + n).to_string().repeat(32));
    let record = |n: u8, refs: &[u8]| {
        let refs: Vec<String> = refs.iter().map(|n| path(*n)).collect();
        format!("{}\n{:064}\n{}\n\n{}\n{}\n", path(n), n, 100 + u32::from(n), refs.len(), refs.join("\n"))
            .replace("\n0\n\n", "\n0\n")
    };
    // In an order that refers to what comes later.
    let text = [record(3, &[1, 2, 3]), record(2, &[1]), record(1, &[])].concat();
    store.load_db(text.as_bytes()).unwrap();
    let mut dumped = Vec::new();
    store.dump_db(None, &mut dumped).unwrap();
    let sorted = [record(1, &[]), record(2, &[1]), record(3, &[1, 2, 3])].concat();
    assert_eq!(String::from_utf8(dumped).unwrap(), sorted);
    let p3: StorePath = store.dir().parse(path(3)).unwrap();
    let mut one = Vec::new();
    store.dump_db(Some(&[p3]), &mut one).unwrap();
    assert_eq!(String::from_utf8(one).unwrap(), record(3, &[1, 2, 3]));
    let error = store.load_db(record(4, &[5]).as_bytes()).unwrap_err();
    assert_eq!(error.to_string(), format!("path '{}' is not valid", path(5)));
}
