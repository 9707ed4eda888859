//! The vectors of `--restore` and `--dump`, which set the umask: a process of their own.

#![expect(clippy::unwrap_used, reason = "tests may panic")]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use data_encoding::BASE64;
use larder_fs::dump::{DumpOptions, dump};
use larder_fs::restore::{Metadata, RestoreError, RestoreOptions, Restorer};
use rustix::fs::{CWD, Mode};
use serde_json::{Map, Value, json};

fn b64(value: &Value) -> Vec<u8> {
    BASE64.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

/// What stands at a path, in the words of the vectors.
fn state(path: &Path) -> Value {
    let stat = path.symlink_metadata().unwrap();
    let mode = format!("0o{:o}", stat.permissions().mode() & 0o7777);
    if stat.is_symlink() {
        Value::from(format!("symlink -> {}", fs::read_link(path).unwrap().display()))
    } else if stat.is_dir() {
        let entries: Map<String, Value> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), state(&entry.path())))
            .collect();
        json!({ "dir mode": mode, "entries": entries })
    } else {
        json!({ "file mode": mode, "size": stat.len() })
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        None => error.to_string(),
        Some(source) => format!("{error}: {}", chain(source)),
    }
}

fn restore(nar: &[u8], target: &Path, metadata: Metadata) -> Result<(), RestoreError> {
    let options = RestoreOptions { metadata, ..RestoreOptions::default() };
    let mut restorer = Restorer::new(CWD, target.as_os_str(), options);
    restorer.push(nar)?;
    restorer.finish().map(drop)
}

#[test]
fn vectors_restore_dump() {
    let file: Value = serde_json::from_str(include_str!("../../tests/vectors/restore_dump.json")).unwrap();
    let cases = file["cases"].as_array().unwrap();
    println!("restore_dump: {} cases", cases.len());
    for case in cases {
        let (id, real) = (case["id"].as_str().unwrap(), &case["2.8.0"]);
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("t");
        let message = real["message"].as_str().map(|m| m.replace("$T/rc", folder.path().to_str().unwrap()));
        if let Some(umask) = case.get("umask") {
            match case["existing_target"].as_str() {
                None => {}
                Some("file") => fs::write(&target, "old").unwrap(),
                Some("dir") => fs::create_dir(&target).unwrap(),
                Some(other) => panic!("{id}: {other}"),
            }
            let umask = u32::from_str_radix(umask.as_str().unwrap().trim_start_matches("0o"), 8).unwrap();
            let before = rustix::process::umask(Mode::from_raw_mode(umask));
            let result = restore(&b64(&case["nar_b64"]), &target, Metadata::User);
            rustix::process::umask(before);
            assert_eq!(result.is_ok(), real["accepted"].as_bool().unwrap(), "{id}: {result:?}");
            assert_eq!(state(&target), real["state"], "{id}");
            if let Err(error) = result {
                let said = format!("error: {}", chain(&error));
                println!("{id}: {said}");
                // Nix 2.8 says `symlink from 'P' to 'x'`; we say what 2.26 does. It does not say where a stream ends.
                let expected = message.unwrap().replace("symlink from", "symlink").replace("' to '", "' -> '");
                assert!(said.starts_with(&expected), "{id}: {expected}");
            }
        } else {
            match id {
                "dump-dir-with-fifo" => {
                    fs::create_dir(&target).unwrap();
                    rustix::fs::mkfifoat(CWD, target.join("p"), Mode::from_raw_mode(0o644)).unwrap();
                }
                "dump-missing" => {}
                "dump-mode-0611-exec-only-owner" | "dump-mode-0711" => {
                    fs::write(&target, "").unwrap();
                    let mode = if id == "dump-mode-0711" { 0o711 } else { 0o611 };
                    fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
                }
                _ => panic!("{id}: no such case"),
            }
            let mut nar = Vec::new();
            let result = dump(CWD, target.as_os_str(), &DumpOptions::default(), |piece| {
                nar.extend_from_slice(piece);
                Ok::<_, std::io::Error>(())
            });
            match result {
                Ok(_) => assert_eq!(nar, b64(&real["nar_b64"]), "{id}"),
                Err(error) => {
                    let said = format!("error: {}", chain(&error));
                    assert!(said.starts_with(&message.unwrap()), "{id}: {said}");
                }
            }
        }
    }
    deep_trees_with_few_descriptors();
    canonical_under_any_umask();
}

fn canonical_under_any_umask() {
    use larder_core::arb::nar::Tree;
    let file = |executable| Tree::File { executable, contents: b"x".to_vec() };
    let inner = Tree::Directory([(b"a".to_vec(), file(true)), (b"b".to_vec(), file(false))].into());
    let tree =
        Tree::Directory([(b"d".to_vec(), inner), (b"x".to_vec(), file(true)), (b"y".to_vec(), file(true))].into());
    // Nobody but root can enter a directory that lacks even the owner's permissions.
    let worst = if rustix::process::geteuid().is_root() { 0o777 } else { 0o77 };
    for umask in [0, 0o77, worst] {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("t");
        let before = rustix::process::umask(Mode::from_raw_mode(umask));
        let result = restore(&tree.to_nar(), &target, Metadata::Store);
        rustix::process::umask(before);
        result.unwrap();
        let (x, f) = (json!({ "file mode": "0o555", "size": 1 }), json!({ "file mode": "0o444", "size": 1 }));
        let inner = json!({ "dir mode": "0o555", "entries": { "a": x, "b": f } });
        let expected = json!({ "dir mode": "0o555", "entries": { "d": inner, "x": x, "y": x } });
        assert_eq!(state(&target), expected, "umask {umask:o}");
    }
}

/// A tree far deeper than the descriptors that the process may have.
fn deep_trees_with_few_descriptors() {
    use larder_core::nar::{Encoder, Event};
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let (mut encoder, mut nar) = (Encoder::new(), Vec::new());
    encoder.push(Event::Directory, &mut nar);
    for _ in 0..1000 {
        encoder.push(Event::Entry { name: b"d" }, &mut nar);
        encoder.push(Event::Directory, &mut nar);
    }
    (0..=1000).for_each(|_| encoder.push(Event::EndDirectory, &mut nar));
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("t");
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(64), maximum: before.maximum }).unwrap();
    restore(&nar, &target, Metadata::Store).unwrap();
    let mut again = Vec::new();
    dump(CWD, OsStr::new(&target), &DumpOptions::default(), |piece| {
        again.extend_from_slice(piece);
        Ok::<_, std::io::Error>(())
    })
    .unwrap();
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(again == nar);
}
