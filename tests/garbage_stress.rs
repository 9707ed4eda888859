//! Adders, readers, builders, linkers and collectors in several processes, killed at random: nothing that
//! somebody relies on goes, and the store is whole at the end.
//!
//! Each process is this test program again, with a role. It checks what it may rely on, and a fault
//! ends it with words that the parent repeats.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::report::Silent;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};
use larder_fs::layout::{Access, Layout};
use larder_store::collect::{CollectOptions, Freed};
use larder_store::ingest::ContentAddressed;
use larder_store::verify::{Nobody, VerifyOptions};
use larder_store::{LocalStore, Options, StoreError};

/// What the processes are told: role, folder, seed.
const ROLE: &str = "LARDER_GARBAGE_ROLE";

/// Different objects that are added.
const OBJECTS: u64 = 12;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n.max(1)
    }
}

pub fn layout(folder: &Path) -> Layout {
    let store = folder.join("store");
    Layout {
        store_dir: StoreDir::new(store.to_str().unwrap()).unwrap(),
        real_store: store,
        state: folder.join("var"),
        log: folder.join("log"),
    }
}

fn open(folder: &Path, auto_optimise_store: bool) -> LocalStore {
    // Durability costs time and is not what is tested here: no power is cut.
    let options = Options { sync: false, auto_optimise_store, ..Options::default() };
    LocalStore::open(layout(folder), options, Access::ReadWrite, Arc::new(Silent)).unwrap()
}

fn source(folder: &Path, n: u64) -> (PathBuf, ContentAddressed) {
    let name = Name::new(&format!("object{n}")).unwrap();
    let content = ContentAddressed { name, method: Method::Recursive, algorithm: Algorithm::Sha256 };
    (folder.join("sources").join(n.to_string()), content)
}

/// Reads all of an object that must be there.
fn read_all(store: &LocalStore, path: &StorePath) {
    let real = store.layout().real_path(path);
    let mut names = 0;
    for entry in std::fs::read_dir(&real).unwrap_or_else(|e| panic!("{path} has gone: {e}")) {
        let text = std::fs::read(entry.unwrap().path()).unwrap_or_else(|e| panic!("a file of {path} has gone: {e}"));
        assert!(text.starts_with(b"object "), "{path} has other contents");
        names += 1;
    }
    assert_eq!(names, 3, "{path} is not whole");
    assert!(store.verify_path(path).unwrap(), "{path} has changed");
}

fn adder(folder: &Path, random: &mut Random) {
    let store = open(folder, random.below(2) == 0);
    for _ in 0..=random.below(4) {
        let n = random.below(OBJECTS);
        let (file, content) = source(folder, n);
        let path = store.add(&file, &content).unwrap();
        read_all(&store, &path);
        let link = folder.join("links").join(format!("root{n}"));
        match random.below(4) {
            // The link keeps it from now on, whoever comes and whoever is killed.
            0 => {
                let roots = larder_fs::temp_roots::TempRoots::new(store.layout().clone());
                larder_gc::add_root::add_permanent(store.layout(), &roots, &path, &link).unwrap();
            }
            1 => drop(std::fs::remove_file(link)),
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(random.below(5)));
        read_all(&store, &path);
    }
}

fn reader(folder: &Path, random: &mut Random) {
    let store = open(folder, false);
    for _ in 0..=random.below(8) {
        let (file, content) = source(folder, random.below(OBJECTS));
        let path = store.content_path(&file, &content).unwrap();
        store.add_temp_roots([&path]).unwrap();
        if store.is_valid(&path).unwrap() {
            read_all(&store, &path);
            std::thread::sleep(Duration::from_millis(random.below(5)));
            assert!(store.is_valid(&path).unwrap(), "{path} is not valid any more");
            read_all(&store, &path);
        }
    }
}

/// Builds something out of an object, with the program itself. The builder needs its input for some
/// time; what was made has a link, so nobody takes it away until the link goes.
fn builder(folder: &Path, random: &mut Random) {
    let n = random.below(OBJECTS);
    let me = format!("built-{}-{}", std::process::id(), random.below(1 << 30));
    let script = format!(
        "mkdir $out; for f in a b c; do cp $src/$f $out/$f; sleep 0.0{}; done; cmp $src/a $out/a; echo {} > $out/.by",
        random.below(10),
        if random.below(3) == 0 { me.as_str() } else { "anybody" },
    );
    let json = serde_json::json!({
        "name": format!("built{n}"),
        "builder": "/bin/sh",
        "args": ["-e", "-c", script],
        "env": { "PATH": "/bin:/usr/bin" },
        "files": { "src": folder.join("sources").join(n.to_string()) },
    });
    let (file, link) = (folder.join(format!("{me}.json")), folder.join("links").join(&me));
    std::fs::write(&file, json.to_string()).unwrap();
    let mut larder = Command::new(env!("CARGO_BIN_EXE_larder"));
    larder.args(["build", "--option", "sandbox", "false", "--option", "build-users-group", ""]);
    larder.args(["--option", "substituters", "", "--root"]);
    larder.arg(&link).arg(&file).env("NIX_STORE_DIR", folder.join("store")).env("NIX_REMOTE", "");
    for (name, dir) in [("NIX_STATE_DIR", "var"), ("NIX_LOG_DIR", "log"), ("NIX_CONF_DIR", "etc")] {
        larder.env(name, folder.join(dir));
    }
    let made = larder.output().unwrap();
    assert!(made.status.success(), "a build failed: {}", String::from_utf8_lossy(&made.stderr));
    std::thread::sleep(Duration::from_millis(random.below(5)));
    for name in ["a", "b", "c"] {
        let text = std::fs::read(link.join(name)).unwrap_or_else(|e| panic!("{name} of what was built has gone: {e}"));
        assert!(text.starts_with(b"object "), "what was built has other contents");
    }
    std::fs::remove_file(&link).unwrap();
    std::fs::remove_file(&file).unwrap();
}

fn collector(folder: &Path, random: &mut Random) {
    let store = open(folder, false);
    let limit = (random.below(3) == 0).then(|| random.below(4000));
    store.collect(CollectOptions { max_freed_bytes: limit }, &mut Freed::default()).unwrap();
    std::thread::sleep(Duration::from_millis(random.below(3)));
}

fn linker(folder: &Path) {
    match open(folder, false).optimise() {
        Ok(_) => {}
        // Directories that another process deletes while we are in them.
        Err(StoreError::NotLinked { .. }) => panic!("files could not be linked"),
        Err(error) => panic!("{error:?}"),
    }
}

/// The process of one role, until it is killed.
fn play(role: &str) {
    let mut words = role.splitn(3, ' ');
    let (role, seed, folder) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    let folder = Path::new(folder);
    let mut random = Random(seed.parse::<u64>().unwrap() | 1);
    while !folder.join("stop").exists() {
        match role {
            "adder" => adder(folder, &mut random),
            "reader" => reader(folder, &mut random),
            "builder" => builder(folder, &mut random),
            "collector" => collector(folder, &mut random),
            "linker" => linker(folder),
            other => panic!("no role {other}"),
        }
    }
}

fn start(folder: &Path, role: &str, seed: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "garbage_stress::s090_soak_many_processes", "--nocapture", "--test-threads=1"])
        .env(ROLE, format!("{role} {seed} {}", folder.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap()
}

/// Waits for a process that ends by itself; one that was killed by us is no fault.
fn finish(child: Child, role: &str) {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || output.status.code().is_none(), "{role}: {text}");
}

#[test]
fn s090_soak_many_processes() {
    if let Ok(role) = std::env::var(ROLE) {
        return play(&role);
    }
    let seconds = std::env::var("LARDER_SOAK_S").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for n in 0..OBJECTS {
        let object = folder.join("sources").join(n.to_string());
        std::fs::create_dir_all(&object).unwrap();
        for (file, text) in [
            ("a", "object shared by all".to_owned()),
            ("b", format!("object {}", n % 3)),
            ("c", format!("object {n} alone")),
        ] {
            std::fs::write(object.join(file), text.repeat(20)).unwrap();
        }
    }
    drop(open(folder, false));
    let mut random = Random(0x1234_5678_9abc_def1);
    let roles =
        ["adder", "adder", "adder", "reader", "reader", "builder", "builder", "collector", "collector", "linker"];
    let mut children: Vec<(usize, Child)> = Vec::new();
    let mut seed = 0;
    let (mut starts, mut kills) = (0, 0);
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(seconds) {
        for (n, role) in roles.iter().enumerate() {
            if !children.iter().any(|(at, _)| *at == n) {
                seed += 1;
                starts += 1;
                children.push((n, start(folder, role, seed * 7919)));
            }
        }
        std::thread::sleep(Duration::from_millis(20 + random.below(120)));
        let victim = usize::try_from(random.below(children.len() as u64)).unwrap();
        let (at, mut child) = children.swap_remove(victim);
        // It may have ended by itself, for a reason that we want to hear.
        if child.try_wait().unwrap().is_none() {
            // With what it has started.
            let group = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
            kills += 1;
        }
        finish(child, roles[at]);
    }
    std::fs::write(folder.join("stop"), "").unwrap();
    for (at, child) in children {
        finish(child, roles[at]);
    }
    let store = open(folder, false);
    let verified = store.verify(VerifyOptions { check_contents: true, repair: false, resume: false }, &Nobody).unwrap();
    assert_eq!((verified.errors, verified.disappeared), (0, Vec::new()));
    // What builders did not come to take away.
    let links: Vec<PathBuf> =
        std::fs::read_dir(folder.join("links")).into_iter().flatten().map(|link| link.unwrap().path()).collect();
    for link in links.iter().filter(|link| link.to_string_lossy().contains("/built-")) {
        std::fs::remove_file(link).unwrap();
    }
    let mut kept = Vec::new();
    for link in std::fs::read_dir(folder.join("links")).into_iter().flatten() {
        let link = link.unwrap().path();
        // What a killed process has left half done has another name.
        if link.extension().is_none() {
            let target = std::fs::read_link(&link).unwrap();
            let path = store.dir().parse(target.to_str().unwrap()).unwrap();
            let known = larder_gc::add_root::auto_link(store.layout(), &link);
            if std::fs::symlink_metadata(known).is_ok() {
                read_all(&store, &path);
                kept.push(path.to_string());
            }
        }
    }
    store.collect(CollectOptions::default(), &mut Freed::default()).unwrap();
    let names = std::fs::read_dir(folder.join("store")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name != ".links").collect();
    names.sort();
    kept.sort();
    assert_eq!(names, kept);
    println!("{starts} processes, {kills} killed, in {seconds} s; {} of {OBJECTS} objects have a root", kept.len());
}
