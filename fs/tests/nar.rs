//! Trees between disk and archive.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, reason = "tests may panic and tell")]

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use data_encoding::BASE64;
use larder_core::arb::nar::{Tree, spoiled_nar, tree};
use larder_core::hash::{Algorithm, Encoding, Hash};
use larder_core::nar::{Encoder, Event, Limits, NarError, Parser, encoder};
use larder_fs::dump::{DumpError, DumpOptions, Dumper, StreamError, dump, dump_pipelined, dump_pipelined_after};
use larder_fs::restore::{Metadata, RestoreError, RestoreOptions, Restored, Restorer, restore};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use rustix::fs::{CWD, Mode, OFlags};
use serde_json::Value;
use tempfile::TempDir;

const NAR: &str = include_str!("../../tests/vectors/nar.json");
const REJECT: &str = include_str!("../../tests/vectors/nar_reject.json");
const CASE_HACK: &str = include_str!("../../tests/vectors/case_hack.json");

fn cases(text: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(text).unwrap();
    file["cases"].as_array().unwrap().clone()
}

fn b64(value: &Value) -> Vec<u8> {
    BASE64.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

fn sha256_hex(bytes: &[u8]) -> String {
    Hash::of(Algorithm::Sha256, bytes).encode(Encoding::Base16)
}

/// A folder, its descriptor, and the name `t` in it.
struct Place {
    folder: TempDir,
    fd: fs::File,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fd = fs::File::open(folder.path()).unwrap();
        Self { folder, fd }
    }

    /// In memory where there is such a file system: for what would keep a disk busy.
    fn in_memory() -> Self {
        let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return Self::new() };
        let fd = fs::File::open(folder.path()).unwrap();
        Self { folder, fd }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("t")
    }

    fn restore(&self, nar: &[u8], options: RestoreOptions<'_>) -> Result<Restored, RestoreError> {
        let options = RestoreOptions { below: Some(self.folder.path()), ..options };
        let mut restorer = Restorer::new(self.fd.as_fd(), OsStr::new("t"), options);
        for piece in nar.chunks(7777) {
            restorer.push(piece)?;
        }
        restorer.finish()
    }

    fn dump(&self, case_hack: bool) -> Result<Vec<u8>, DumpError> {
        let options = DumpOptions { case_hack, below: Some(self.folder.path()) };
        dump_at(&self.fd, OsStr::new("t"), &options)
    }

    /// By means that neither recurse nor need permissions.
    fn clear(&self) {
        assert!(Command::new("chmod").args(["-R", "u+w"]).arg(self.path()).status().unwrap().success());
        assert!(Command::new("rm").arg("-rf").arg(self.path()).status().unwrap().success());
    }
}

fn dump_at(at: impl AsFd, name: &OsStr, options: &DumpOptions<'_>) -> Result<Vec<u8>, DumpError> {
    let mut out = Vec::new();
    let size = dump(at, name, options, |piece| {
        assert!(!piece.is_empty());
        out.extend_from_slice(piece);
        Ok::<_, io::Error>(())
    });
    match size {
        Ok(size) => assert_eq!(size, out.len() as u64),
        Err(StreamError::Dump(error)) => return Err(error),
        Err(StreamError::Sink(error)) => panic!("{error}"),
    }
    Ok(out)
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        None => error.to_string(),
        Some(source) => format!("{error}: {}", chain(source)),
    }
}

fn store() -> RestoreOptions<'static> {
    RestoreOptions { metadata: Metadata::Store, ..RestoreOptions::default() }
}

#[test]
fn vectors_nar() {
    let cases = cases(NAR);
    println!("nar: {} cases", cases.len());
    for case in cases.iter().filter(|case| case.get("nar_b64").is_some()) {
        let (id, nar) = (case["id"].as_str().unwrap(), b64(&case["nar_b64"]));
        for options in [RestoreOptions::default(), store()] {
            let place = Place::new();
            let restored = place.restore(&nar, options).unwrap_or_else(|e| panic!("{id}: {}", chain(&e)));
            assert_eq!(restored.nar_size_bytes, nar.len() as u64, "{id}");
            assert_eq!(place.dump(false).unwrap(), nar, "{id}");
        }
    }
}

/// Wherever it begins, the rest of an archive is the same.
#[test]
fn archives_from_any_byte_on() {
    let place = Place::new();
    fs::create_dir_all(place.path().join("deep/down")).unwrap();
    for (name, size) in [("a", 0), ("b", 1), ("deep/c", 100_000), ("deep/down/d", 1_500_001), ("e", 8)] {
        let contents: Vec<u8> = (0..=250).cycle().take(size).collect();
        fs::write(place.path().join(name), contents).unwrap();
    }
    symlink("deep/down", place.path().join("link")).unwrap();
    let whole = place.dump(false).unwrap();
    let near = |at: usize| at.saturating_sub(3)..at + 3;
    let steps = (0..whole.len()).step_by(33_331).chain(0..1000).chain(near(whole.len()));
    for skipped in steps.chain(near(101_000)).chain(near(1_602_000)) {
        let mut out = Vec::new();
        let options = DumpOptions::default();
        let size = dump_pipelined_after(&place.fd, OsStr::new("t"), &options, skipped as u64, |piece| {
            out.extend_from_slice(piece);
            Ok::<_, io::Error>(())
        });
        assert!(out == whole[skipped.min(whole.len())..], "behind {skipped} bytes");
        assert_eq!(size.unwrap(), out.len() as u64);
    }
}

#[test]
fn fixtures() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/fixtures");
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    println!("fixtures: {} cases", files.len());
    for file in files {
        let place = Place::new();
        let input = fs::File::open(&file).unwrap();
        restore(&input, &place.fd, OsStr::new("t"), store()).unwrap();
        assert_eq!(place.dump(false).unwrap(), fs::read(&file).unwrap(), "{}", file.display());
    }
}

/// What a reader refuses is refused, and creates nothing beside its target.
#[test]
fn vectors_reject() {
    let cases = cases(REJECT);
    println!("nar_reject: {} cases (the two compressed ones are core's)", cases.len());
    for case in cases.iter().filter(|case| case.get("nar_b64").is_some()) {
        let (id, nar) = (case["id"].as_str().unwrap(), b64(&case["nar_b64"]));
        let place = Place::new();
        let result = place.restore(&nar, RestoreOptions::default());
        // Stricter: Nix cuts a target at its NUL.
        let accepted = case["2.26.3"]["restore_accepted"].as_bool().unwrap() && id != "nar-reject-symlink-nul-target";
        assert_eq!(result.is_ok(), accepted, "{id}: {result:?}");
        if accepted {
            assert_eq!(sha256_hex(&place.dump(false).unwrap()), case["2.26.3"]["restored_nar_sha256_hex"], "{id}");
        }
        let names: Vec<_> = fs::read_dir(place.folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(names.is_empty() || names == ["t"], "{id}: {names:?}");
    }
}

fn names_below(folder: &Path, prefix: &str, out: &mut Vec<String>) {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    for name in names {
        let shown = format!("{prefix}{}", name.to_str().unwrap());
        let path = folder.join(&name);
        if path.symlink_metadata().unwrap().is_dir() {
            out.push(format!("{shown}/"));
            names_below(&path, &format!("{shown}/"), out);
        } else {
            out.push(shown);
        }
    }
}

#[test]
fn vectors_case_hack() {
    /// Dumped by Nix to an archive that nobody can restore: refused here.
    const STRICTER: &str = "casehack-dump-suffix-only";
    let cases = cases(CASE_HACK);
    println!("case_hack: {} cases", cases.len());
    for case in &cases {
        let (id, real) = (case["id"].as_str().unwrap(), &case["2.26.3"]);
        let place = Place::new();
        let accepted = real["accepted"].as_bool().unwrap();
        if case["op"] == "restore" {
            let nar = b64(&case["nar_b64"]);
            let result = place.restore(&nar, RestoreOptions { case_hack: true, ..RestoreOptions::default() });
            assert_eq!(result.is_ok(), accepted, "{id}: {result:?}");
            if !accepted {
                continue;
            }
            let mut names = Vec::new();
            names_below(&place.path(), "", &mut names);
            let mut expected: Vec<_> =
                real["restored_names"].as_array().unwrap().iter().map(|n| n.as_str().unwrap()).collect();
            names.sort();
            expected.sort_unstable();
            assert_eq!(names, expected, "{id}");
            let hacked = place.dump(true).unwrap();
            assert_eq!(sha256_hex(&hacked), real["dump_with_hack"]["sha256_hex"], "{id}");
            assert_eq!(hacked == nar, real["dump_with_hack"]["equals_input"].as_bool().unwrap(), "{id}");
            assert_eq!(sha256_hex(&place.dump(false).unwrap()), real["dump_without_hack_sha256_hex"], "{id}");
        } else {
            fs::create_dir(place.path()).unwrap();
            for (name, contents) in case["files"].as_object().unwrap() {
                fs::write(place.path().join(name), contents.as_str().unwrap()).unwrap();
            }
            match place.dump(true) {
                Ok(nar) => assert_eq!(nar, b64(&real["nar_b64"]), "{id}"),
                Err(DumpError::CaseHack { .. }) => assert_eq!(id, STRICTER),
                Err(error) => {
                    let message = real["message"].as_str().unwrap().replace("$T/ch", place.path().to_str().unwrap());
                    assert_eq!(format!("error: {error}"), message, "{id}");
                }
            }
        }
    }
}

fn two_names() -> Vec<u8> {
    let file = |contents: &str| Tree::File { executable: false, contents: contents.into() };
    let entries = [(b"xt_CONNMARK.h".to_vec(), file("upper")), (b"xt_connmark.h".to_vec(), file("lower"))];
    Tree::Directory(entries.into()).to_nar()
}

#[test]
fn s012_names_that_differ_in_case_get_a_suffix() {
    let place = Place::new();
    place.restore(&two_names(), RestoreOptions { case_hack: true, ..RestoreOptions::default() }).unwrap();
    let mut names = Vec::new();
    names_below(&place.path(), "", &mut names);
    assert_eq!(names, ["xt_CONNMARK.h", "xt_connmark.h~nix~case~hack~1"]);
    assert_eq!(fs::read(place.path().join("xt_connmark.h~nix~case~hack~1")).unwrap(), b"lower");
}

#[test]
fn s013_dumping_drops_the_suffixes() {
    let place = Place::new();
    place.restore(&two_names(), RestoreOptions { case_hack: true, ..store() }).unwrap();
    assert_eq!(place.dump(true).unwrap(), two_names());
}

/// The file has no blocks, so that what takes time is to copy its zeros.
#[test]
fn s088_a_file_beyond_4_gib() {
    const SIZE: u64 = (5 << 30) + 5;
    let place = Place::in_memory();
    fs::File::create(place.path()).unwrap().set_len(SIZE).unwrap();
    let (mut parser, mut contents) = (Parser::default(), 0);
    let size = dump(&place.fd, OsStr::new("t"), &DumpOptions::default(), |mut piece: &[u8]| {
        while let Some(event) = parser.next(&mut piece)? {
            if let Event::Contents(piece) = event {
                contents += piece.len() as u64;
            }
        }
        Ok::<_, NarError>(())
    })
    .unwrap();
    assert!(parser.is_done());
    assert_eq!((contents, size), (SIZE, SIZE.next_multiple_of(8) + 112));
}

#[test]
fn names_need_not_be_text() {
    let place = Place::new();
    fs::create_dir(place.path()).unwrap();
    for name in [&b"\xff\xfe"[..], b"a\nb", b"~", b"\x80"] {
        fs::write(place.path().join(OsStr::from_bytes(name)), name).unwrap();
    }
    let nar = place.dump(false).unwrap();
    let Tree::Directory(entries) = Tree::from_pieces([&nar[..]]).unwrap().0 else { panic!() };
    assert!(entries.keys().map(Vec::as_slice).eq([&b"a\nb"[..], b"~", b"\x80", b"\xff\xfe"]));
    let other = Place::new();
    other.restore(&nar, store()).unwrap();
    assert_eq!(other.dump(false).unwrap(), nar);
}

/// `t/d/d/..` around a file, made without any long path.
fn make_deep(place: &Place, levels: usize) {
    let mut fd = place.fd.try_clone().unwrap().into();
    for name in std::iter::once("t").chain(std::iter::repeat_n("d", levels - 1)) {
        rustix::fs::mkdirat(&fd, name, Mode::from_raw_mode(0o755)).unwrap();
        fd = rustix::fs::openat(&fd, name, OFlags::DIRECTORY | OFlags::RDONLY, Mode::empty()).unwrap();
    }
    drop(rustix::fs::openat(&fd, "f", OFlags::CREATE | OFlags::WRONLY, Mode::from_raw_mode(0o644)).unwrap());
}

fn count(text: &[u8], word: &[u8]) -> usize {
    text.windows(word.len()).filter(|w| *w == word).count()
}

#[test]
fn depth_beyond_any_path() {
    let place = Place::in_memory();
    make_deep(&place, 3000);
    let nar = place.dump(false).unwrap();
    assert_eq!(count(&nar, b"directory"), 3000);
    let other = Place::in_memory();
    let refused = other.restore(&nar, store());
    assert!(matches!(refused, Err(RestoreError::Nar(NarError::TooDeep { max: 1024, .. }))));
    other.clear();
    let limits = Limits { max_depth: 3000, ..Limits::default() };
    let restored = other.restore(&nar, RestoreOptions { limits, ..store() }).unwrap();
    assert!(restored.canonical);
    assert_eq!(other.dump(false).unwrap(), nar);
    place.clear();
    other.clear();
}

#[test]
fn unsupported_types_are_named() {
    let place = Place::new();
    fs::create_dir(place.path()).unwrap();
    let fifo = place.path().join("p");
    rustix::fs::mkfifoat(CWD, &fifo, Mode::from_raw_mode(0o644)).unwrap();
    let error = place.dump(false).unwrap_err();
    assert_eq!(error.to_string(), format!("file '{}' has an unsupported type", fifo.display()));
    let error = dump_at(CWD, fifo.as_os_str(), &DumpOptions::default()).unwrap_err();
    assert!(matches!(error, DumpError::UnsupportedType { path } if path == fifo));
    fs::remove_file(&fifo).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(place.path().join("s")).unwrap();
    assert!(matches!(place.dump(false), Err(DumpError::UnsupportedType { .. })));
    drop(socket);
}

#[test]
fn missing_things_are_named() {
    let place = Place::new();
    let path = place.path();
    let error = place.dump(false).unwrap_err();
    let expected = format!("getting status of '{}': No such file or directory (os error 2)", path.display());
    assert_eq!(chain(&error), expected);
    let inner = OsString::from_vec([path.as_os_str().as_bytes(), b"/no/t"].concat());
    let mut restorer = Restorer::new(CWD, &inner, RestoreOptions::default());
    let error = restorer.push(&encoder::file(b"", false)).unwrap_err();
    let expected = format!("creating file '{}/no/t': No such file or directory (os error 2)", path.display());
    assert_eq!(chain(&error), expected);
}

/// The top is never followed, but the way to it is.
#[test]
fn symlinks_at_the_top() {
    let place = Place::new();
    symlink("no/where", place.path()).unwrap();
    let nar = place.dump(false).unwrap();
    assert_eq!(Tree::from_pieces([&nar[..]]).unwrap().0, Tree::Symlink { target: b"no/where".to_vec() });
    let link = place.folder.path().join("link");
    symlink(place.folder.path(), &link).unwrap();
    assert_eq!(dump_at(CWD, link.join("t").as_os_str(), &DumpOptions::default()).unwrap(), nar);
}

/// Goes on until the error that must come.
fn failure_of(mut dumper: Dumper<'_>, block: &mut Vec<u8>) -> DumpError {
    loop {
        block.clear();
        match dumper.fill(block) {
            Ok(more) => assert!(more, "the dump ended well"),
            Err(error) => return error,
        }
    }
}

/// The size is that of the beginning: what is missing then is an error, what is more is left.
#[test]
fn files_that_change_while_they_are_read() {
    let place = Place::new();
    let file = fs::File::create(place.path()).unwrap();
    let start = |block: &mut Vec<u8>| {
        let mut dumper = Dumper::new(place.fd.as_fd(), OsStr::new("t"), DumpOptions::default());
        assert!(dumper.fill(block).unwrap());
        dumper
    };
    let mut block = Vec::with_capacity(64 * 1024);
    file.set_len(1 << 20).unwrap();
    let dumper = start(&mut block);
    file.set_len(100_000).unwrap();
    let error = failure_of(dumper, &mut block);
    assert!(matches!(error, DumpError::Shrank { missing_bytes: 948_576, .. }), "{error}");

    let mut nar = Vec::with_capacity(64 * 1024);
    let mut dumper = start(&mut nar);
    file.set_len(1 << 20).unwrap();
    let mut more = true;
    while more && nar.len() < 2 << 20 {
        block.clear();
        more = dumper.fill(&mut block).unwrap();
        nar.extend_from_slice(&block);
    }
    let (tree, left) = Tree::from_pieces([&nar[..]]).unwrap();
    assert_eq!((tree, left), (Tree::File { executable: false, contents: vec![0; 100_000] }, 0));
}

/// A directory that is moved while it is read, so deep that its parent has to be found again.
#[test]
fn directories_that_move_while_they_are_read() {
    let place = Place::new();
    make_deep(&place, 100);
    let deepest = ["t"].into_iter().chain(["d"; 99]).collect::<PathBuf>();
    fs::File::create(place.folder.path().join(&deepest).join("f")).unwrap().set_len(1 << 20).unwrap();
    let mut dumper = Dumper::new(place.fd.as_fd(), OsStr::new("t"), DumpOptions::default());
    let mut block = Vec::with_capacity(64 * 1024);
    assert!(dumper.fill(&mut block).unwrap());
    let moved: PathBuf = ["t"].into_iter().chain(["d"; 10]).collect();
    fs::rename(place.folder.path().join(moved), place.folder.path().join("moved")).unwrap();
    let error = failure_of(dumper, &mut block);
    assert!(matches!(error, DumpError::Moved { .. }), "{error}");
}

#[test]
fn two_threads_give_the_same() {
    let place = Place::new();
    fs::create_dir_all(place.path().join("sub")).unwrap();
    for n in 0..300u32 {
        fs::write(place.path().join(format!("sub/{n}")), n.to_le_bytes().repeat(3000)).unwrap();
    }
    let one = place.dump(false).unwrap();
    let mut two = Vec::new();
    let size = dump_pipelined(&place.fd, OsStr::new("t"), &DumpOptions::default(), |piece| {
        two.extend_from_slice(piece);
        Ok::<_, io::Error>(())
    });
    assert_eq!(size.unwrap(), one.len() as u64);
    assert!(one == two);
    // Either end may fail.
    let mut taken = 0;
    let stopped = dump_pipelined(&place.fd, OsStr::new("t"), &DumpOptions::default(), |piece| {
        taken += piece.len();
        if taken > 1_500_000 { Err(io::Error::other("full")) } else { Ok(()) }
    });
    assert!(matches!(stopped, Err(StreamError::Sink(_))));
    rustix::fs::mkfifoat(CWD, place.path().join("sub/~"), Mode::from_raw_mode(0o600)).unwrap();
    let failed = dump_pipelined(&place.fd, OsStr::new("t"), &DumpOptions::default(), |_| Ok::<_, io::Error>(()));
    assert!(matches!(failed, Err(StreamError::Dump(DumpError::UnsupportedType { .. }))));

    // And restoring from a file, which is read by another thread, and from a pipe, which is not.
    fs::write(place.folder.path().join("nar"), [&one[..], b"what follows"].concat()).unwrap();
    let other = Place::new();
    let input = fs::File::open(place.folder.path().join("nar")).unwrap();
    let restored = restore(&input, &other.fd, OsStr::new("t"), store()).unwrap();
    assert_eq!(restored, Restored { nar_size_bytes: one.len() as u64, canonical: true });
    assert!(other.dump(false).unwrap() == one);
    let mut cat = Command::new("sh");
    let mut cat =
        cat.args(["-c", "cat; exec sleep 1000"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = cat.stdin.take().unwrap();
    let writer = std::thread::spawn(move || io::Write::write_all(&mut stdin, &one));
    restore(cat.stdout.as_ref().unwrap(), &other.fd, OsStr::new("from-pipe"), store()).unwrap();
    cat.kill().unwrap();
    writer.join().unwrap().unwrap();
    cat.wait().unwrap();
}

/// What stands there stays as it is, whatever it is.
#[test]
fn nothing_is_overwritten() {
    let archives = [encoder::file(b"new", true), Tree::Symlink { target: b"x".to_vec() }.to_nar(), two_names()];
    for nar in &archives {
        for what in ["file", "dir", "dangling"] {
            let place = Place::new();
            match what {
                "file" => fs::write(place.path(), "old").unwrap(),
                "dir" => fs::create_dir(place.path()).unwrap(),
                _ => symlink(place.folder.path().join("elsewhere"), place.path()).unwrap(),
            }
            let before = place.dump(false).unwrap();
            let error = place.restore(nar, store()).unwrap_err();
            assert!(chain(&error).contains("File exists"), "{}", chain(&error));
            assert_eq!(place.dump(false).unwrap(), before);
            assert!(!place.folder.path().join("elsewhere").exists());
        }
    }
}

/// An archive whose framing is fine and whose names are not, or which names a thing twice to go
/// through a symlink, stays in its place.
#[test]
fn hostile_archives_do_not_escape() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().as_os_str().as_bytes();
    for names in [["..", "b"], ["a/../../x", "b"], ["/tmp/x", "b"], ["a", "a"], ["", "a"], [".", "a"], ["b\0", "c"]] {
        let (mut encoder, mut nar) = (Encoder::new(), Vec::new());
        encoder.push(Event::Directory, &mut nar);
        encoder.push(Event::Entry { name: names[0].as_bytes() }, &mut nar);
        encoder.push(Event::Symlink { target }, &mut nar);
        encoder.push(Event::Entry { name: names[1].as_bytes() }, &mut nar);
        encoder.push(Event::Directory, &mut nar);
        encoder.push(Event::Entry { name: b"evil" }, &mut nar);
        encoder.push(Event::File { executable: false, size_bytes: 0 }, &mut nar);
        encoder.push(Event::EndFile, &mut nar);
        encoder.push(Event::EndDirectory, &mut nar);
        encoder.push(Event::EndDirectory, &mut nar);
        for case_hack in [false, true] {
            let place = Place::new();
            let result = place.restore(&nar, RestoreOptions { case_hack, ..RestoreOptions::default() });
            assert!(matches!(result, Err(RestoreError::Nar(_))), "{names:?}: {result:?}");
            assert_eq!(fs::read_dir(place.folder.path()).unwrap().count(), 1, "{names:?}");
        }
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "{names:?}");
    }
}

/// Goes through a tree that should be canonical.
fn assert_canonical(path: &Path) {
    let stat = path.symlink_metadata().unwrap();
    assert_eq!((stat.mtime(), stat.mtime_nsec()), (1, 0), "{}", path.display());
    assert_eq!(stat.uid(), rustix::process::geteuid().as_raw(), "{}", path.display());
    if !stat.is_symlink() {
        let mode = stat.permissions().mode() & 0o7777;
        assert!(mode == 0o555 || (mode == 0o444 && stat.is_file()), "{}: {mode:o}", path.display());
        assert_eq!(rustix::fs::listxattr(path, &mut [0u8; 256][..]), Ok(0), "{}", path.display());
    }
    if stat.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            assert_canonical(&entry.unwrap().path());
        }
    }
}

#[test]
fn store_metadata_needs_no_second_pass() {
    let executable = Tree::File { executable: true, contents: b"#!".to_vec() };
    let plain = Tree::File { executable: false, contents: vec![7; 100_000] };
    let link = Tree::Symlink { target: b"bin/run".to_vec() };
    let bin = Tree::Directory([(b"run".to_vec(), executable.clone()), (b"x".to_vec(), plain.clone())].into());
    let whole = Tree::Directory(
        [
            (b"bin".to_vec(), bin),
            (b"e".to_vec(), Tree::Directory([].into())),
            (b"l".to_vec(), link.clone()),
            (b"p".to_vec(), plain.clone()),
        ]
        .into(),
    );
    // With nothing to inherit; with a group; with an ACL.
    for parent in ["plain", "setgid", "acl"] {
        for tree in [&whole, &executable, &plain, &link] {
            let place = Place::new();
            match parent {
                "plain" => {}
                "setgid" => rustix::fs::fchmod(&place.fd, Mode::from_raw_mode(0o2755)).unwrap(),
                _ if !set_default_acl(&place.fd) => continue,
                _ => {}
            }
            let restored = place.restore(&tree.to_nar(), store()).unwrap();
            assert!(restored.canonical, "{parent}");
            assert_canonical(&place.path());
        }
    }
    let place = Place::new();
    let restored = place.restore(&whole.to_nar(), RestoreOptions::default()).unwrap();
    assert!(!restored.canonical);
    let mode = |name: &str| fs::symlink_metadata(place.path().join(name)).unwrap().permissions().mode() & 0o7777;
    assert_eq!([mode("."), mode("bin"), mode("bin/run"), mode("p")], [0o755, 0o755, 0o755, 0o644]);
}

/// Lets what is created below be writable by another user.
fn set_default_acl(folder: &fs::File) -> bool {
    // Version 2; tag, permissions, id: owner, user 1234, group, mask, others.
    let rows: [(u16, u16, u32); 5] =
        [(1, 7, u32::MAX), (2, 7, 1234), (4, 5, u32::MAX), (0x10, 7, u32::MAX), (0x20, 5, u32::MAX)];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in rows {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(id.to_le_bytes());
    }
    let set = rustix::fs::fsetxattr(folder, "system.posix_acl_default", &acl, rustix::fs::XattrFlags::empty());
    if let Err(e) = set {
        println!("skipped: no ACLs here: {e}");
    }
    set.is_ok()
}

/// Runs a test of this binary again as nobody. Tells whether the test should go on here.
fn as_nobody(test: &str) -> bool {
    use std::os::unix::process::CommandExt as _;
    if !rustix::process::geteuid().is_root() {
        return true;
    }
    // Where nobody can execute it.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let mut command = Command::new(&program);
    command.args(["--exact", test, "--nocapture"]).current_dir("/").uid(65534).gid(65534);
    let output = command.output().unwrap();
    assert!(output.status.success(), "as nobody: {}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
    false
}

#[test]
fn nobody_restores_and_dumps() {
    if as_nobody("nobody_restores_and_dumps") {
        let place = Place::new();
        make_deep(&place, 100);
        let nar = place.dump(false).unwrap();
        let other = Place::new();
        assert!(other.restore(&nar, store()).unwrap().canonical);
        assert_canonical(&other.path());
        assert_eq!(other.dump(false).unwrap(), nar);
        other.clear();
        let locked = Place::new();
        fs::write(locked.path(), "secret").unwrap();
        fs::set_permissions(locked.path(), fs::Permissions::from_mode(0o000)).unwrap();
        let error = locked.dump(false).unwrap_err();
        let expected = format!("opening file '{}': Permission denied (os error 13)", locked.path().display());
        assert_eq!(chain(&error), expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn dump_undoes_restore(tree in tree(), canonical: bool, case_hack: bool, cut in 1usize..5000) {
        let nar = tree.to_nar();
        let place = Place::new();
        let metadata = if canonical { Metadata::Store } else { Metadata::User };
        let options = RestoreOptions { metadata, case_hack, ..RestoreOptions::default() };
        let mut restorer = Restorer::new(place.fd.as_fd(), OsStr::new("t"), options);
        for piece in nar.chunks(cut) {
            match restorer.push(piece) {
                Ok(taken) => prop_assert_eq!(taken, piece.len()),
                // The one name of the generator that has the suffix collides; and a suffix can
                // make a name too long.
                Err(RestoreError::CaseHack { .. }) if case_hack => return Ok(()),
                Err(RestoreError::Io { source, .. }) if case_hack && source.raw_os_error() == Some(36) => return Ok(()),
                Err(e) => panic!("{}", chain(&e)),
            }
        }
        prop_assert!(restorer.is_done());
        prop_assert_eq!(restorer.push(b"more").unwrap(), 0);
        let restored = restorer.finish().unwrap();
        prop_assert_eq!(restored.canonical, canonical);
        if canonical {
            assert_canonical(&place.path());
        }
        let odd = count(&nar, b"~nix~case~hack~") > 0;
        if !(case_hack && odd) {
            prop_assert!(place.dump(case_hack).unwrap() == nar);
        }
    }

    /// Whatever comes, the verdict is the parser's, and nothing is created outside.
    #[test]
    fn spoiled_archives_fail_alike(nar in spoiled_nar()) {
        let place = Place::new();
        let result = place.restore(&nar, RestoreOptions::default());
        match Tree::from_pieces([&nar[..]]) {
            Ok((tree, _)) => {
                result.unwrap();
                prop_assert!(place.dump(false).unwrap() == tree.to_nar());
            }
            Err(expected) => match result {
                Err(RestoreError::Nar(found)) => prop_assert_eq!(found, expected),
                other => panic!("{other:?}, not {expected}"),
            },
        }
        prop_assert!(fs::read_dir(place.folder.path()).unwrap().count() <= 1);
    }
}

/// The same bytes as a real Nix, and the same modes.
#[test]
fn real_nix_agrees() {
    if Command::new("nix-store").arg("--version").output().is_err() {
        println!("skipped: no nix-store here");
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let nix = |args: &[&OsStr], input: Option<&Path>| {
        let mut command = Command::new("nix-store");
        for name in ["STORE", "STATE", "LOG", "CONF"] {
            command.env(format!("NIX_{name}_DIR"), home.path().join(name));
        }
        command.env("NIX_REMOTE", "").args(args);
        if let Some(input) = input {
            command.stdin(fs::File::open(input).unwrap());
        }
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..8 {
        let nar = tree().new_tree(&mut runner).unwrap().current().to_nar();
        let place = Place::new();
        let file = place.folder.path().join("nar");
        fs::write(&file, &nar).unwrap();
        let theirs = place.folder.path().join("theirs");
        nix(&["--restore".as_ref(), theirs.as_os_str()], Some(&file));
        place.restore(&nar, RestoreOptions::default()).unwrap();
        assert!(nix(&["--dump".as_ref(), place.path().as_os_str()], None) == nar);
        assert!(dump_at(CWD, theirs.as_os_str(), &DumpOptions::default()).unwrap() == nar);
        let modes = |path: &Path| {
            let find = Command::new("find").arg(".").args(["-printf", "%P %y %m %l\\n"]).current_dir(path).output();
            let mut lines: Vec<_> = find.unwrap().stdout.split(|b| *b == b'\n').map(<[u8]>::to_vec).collect();
            lines.sort();
            lines
        };
        if theirs.symlink_metadata().unwrap().is_dir() {
            assert_eq!(modes(&place.path()), modes(&theirs));
        }
    }
}
