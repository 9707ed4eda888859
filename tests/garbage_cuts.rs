//! The process is killed before every system call that changes something on disk: the store is whole
//! after each cut, and the next run finishes the work.
//!
//! `strace` does the cutting. One thread each, so that the calls come in one order.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::report::Silent;
use larder_fs::layout::Access;
use larder_store::collect::{CollectOptions, Freed};
use larder_store::ingest::ContentAddressed;
use larder_store::{LocalStore, Options};

use crate::garbage::base;
use crate::house::{House, LARDER, Run, run};

/// Calls that change what is on disk.
const CALLS: [&str; 14] = [
    "unlink",
    "unlinkat",
    "rename",
    "renameat",
    "renameat2",
    "linkat",
    "mkdir",
    "mkdirat",
    "symlinkat",
    "fchmod",
    "fchmodat",
    "utimensat",
    "pwrite64",
    "fdatasync",
];

/// A store that can be put back as it was.
struct Cut {
    house: House,
    kept: String,
    dump: Vec<u8>,
    saved: std::path::PathBuf,
}

fn is_long() -> bool {
    std::env::var_os("LARDER_SOAK_S").is_some()
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

fn clear(path: &Path) {
    let _ = Command::new("chmod").args(["-R", "u+w"]).arg(path).output();
    let _ = std::fs::remove_dir_all(path);
}

impl Cut {
    fn new() -> Option<Self> {
        let mut traced = Command::new("strace");
        traced.args(["-qq", "-o", "/dev/null", "-e", "inject=unlinkat:signal=KILL", "true"]);
        if !traced.output().is_ok_and(|output| output.status.success()) {
            println!("skipped: strace does not work here");
            return None;
        }
        let house = House::new();
        for (tree, text) in [("kept", "one"), ("gone", "one"), ("other", "two")] {
            std::fs::create_dir_all(house.work().join(tree).join("sub/sub")).unwrap();
            house.write(&format!("{tree}/file"), "the same");
            house.write(&format!("{tree}/sub/file"), text);
            house.write(&format!("{tree}/sub/sub/file"), "the same");
            std::os::unix::fs::symlink("file", house.work().join(tree).join("link")).unwrap();
        }
        house.write("new", "is added");
        let added = house.words("nix-store", "--add kept gone other").stdout;
        let kept = added.lines().next().unwrap().to_owned();
        house.root("r", &kept);
        let dump = crate::house::output(house.applet("nix-store").args(["--dump", &kept]), b"").stdout;
        let saved = house.path().join("saved");
        std::fs::create_dir(&saved).unwrap();
        for name in ["store", "var"] {
            copy(&house.path().join(name), &saved.join(name));
        }
        Some(Self { house, kept, dump, saved })
    }

    fn restore(&self) {
        for name in ["store", "var"] {
            clear(&self.house.path().join(name));
            copy(&self.saved.join(name), &self.house.path().join(name));
        }
    }

    /// Runs `nix-store` up to the `nth` of these calls; was it cut?
    fn cut(&self, words: &str, call: &str, nth: usize) -> (bool, Run) {
        let mut command = self.house.command("strace");
        command.args(["-f", "-qq", "-o", "/dev/null"]);
        command.args(["-e", &format!("trace={call}"), "-e", &format!("inject={call}:signal=KILL:when={nth}")]);
        command.args([LARDER, "nix-store"]).args(words.split(' ')).env("RAYON_NUM_THREADS", "1");
        let run = run(&mut command, b"");
        let was_cut = run.status != Some(0);
        // Where programs of others run, one of them may have been cut, and that fails as it does.
        if was_cut && !words.contains("repair") {
            assert!(run.status.is_none() || run.status == Some(137), "{words} {call} {nth}: {run:?}");
        }
        (was_cut, run)
    }

    fn is_whole(&self, what: &str) {
        let verified = self.house.words("nix-store", "--verify --check-contents");
        assert_eq!(verified.status, Some(0), "{what}: {verified:?}");
        assert!(!verified.stderr.contains("disappeared"), "{what}: {verified:?}");
        self.house.words("nix-store", &format!("--check-validity {}", self.kept)).prints("");
        let dump = crate::house::output(self.house.applet("nix-store").args(["--dump", &self.kept]), b"").stdout;
        assert!(dump == self.dump, "{what}: other contents");
    }

    /// Cuts one operation everywhere, after which all is whole; `after` is what must be possible then.
    fn everywhere(&self, words: &str, after: &dyn Fn(&str)) {
        self.each_cut(words, &|what| {
            self.is_whole(what);
            after(what);
            self.is_whole(what);
        });
    }

    fn each_cut(&self, words: &str, after: &dyn Fn(&str)) {
        let many = is_long();
        let mut cuts = 0;
        for call in CALLS {
            let mut nth = 1;
            loop {
                self.restore();
                let (was_cut, _) = self.cut(words, call, nth);
                if !was_cut {
                    break;
                }
                cuts += 1;
                after(&format!("{words} cut at {call} {nth}"));
                // In the short form ever fewer.
                nth = if many { nth + 1 } else { 3 * nth + 1 };
            }
        }
        println!("{words}: {cuts} cuts");
        assert!(cuts > 5, "{words} was hardly cut at all");
    }

    fn collect_all(&self, what: &str) {
        let collected = self.house.gc("");
        assert_eq!(collected.status, Some(0), "{what}: {collected:?}");
        assert_eq!(self.house.store_names(), [base(&self.kept)], "{what}");
    }
}

/// While a damaged output is made anew, one of the two versions is there all the time.
#[test]
fn s081_soak_repairs_cut_anywhere() {
    let Some(mut cut) = Cut::new() else { return };
    let json = r#"{"name": "made", "builder": "/bin/sh", "args": ["-c", "echo made > $out"]}"#;
    let file = cut.house.write("made.json", json);
    let drv = cut.house.run("larder", ["derivation".as_ref(), "add".as_ref(), file.as_os_str()]).stdout;
    let drv = drv.trim_end();
    let options = "--option sandbox false --option substituters  --no-gc-warning";
    let made = cut.house.words("nix-store", &format!("-r {drv} {options}"));
    assert_eq!(made.status, Some(0), "{made:?}");
    let out = made.stdout.trim_end().to_owned();
    let spoilt = Path::new(&out);
    std::fs::set_permissions(spoilt, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::write(spoilt, "spoilt\n").unwrap();
    for name in ["store", "var"] {
        clear(&cut.saved.join(name));
        copy(&cut.house.path().join(name), &cut.saved.join(name));
    }
    cut.kept = out.clone();
    cut.dump = crate::house::output(cut.house.applet("nix-store").args(["--dump", &cut.kept]), b"").stdout;
    let repair = format!("--repair-path {out} {options}");
    cut.each_cut(&repair, &|what| {
        let text = std::fs::read_to_string(spoilt).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(text == "spoilt\n" || text == "made\n", "{what}: {text}");
        let again = cut.house.words("nix-store", &repair);
        assert_eq!(again.status, Some(0), "{what}: {again:?}");
        assert_eq!(std::fs::read_to_string(spoilt).unwrap(), "made\n", "{what}");
        let verified = cut.house.words("nix-store", "--verify --check-contents");
        assert_eq!(verified.status, Some(0), "{what}: {verified:?}");
    });
}

#[test]
fn soak_collections_cut_anywhere() {
    let Some(cut) = Cut::new() else { return };
    cut.everywhere("--gc", &|what| cut.collect_all(what));
}

#[test]
fn soak_linking_cut_anywhere() {
    let Some(cut) = Cut::new() else { return };
    cut.everywhere("--optimise", &|what| {
        let again = cut.house.words("nix-store", "--optimise");
        assert_eq!(again.status, Some(0), "{what}: {again:?}");
        cut.is_whole(what);
        assert!(cut.house.words("nix-store", "--optimise").stderr.contains(" 0 files"), "{what}");
        cut.collect_all(what);
        let left = std::fs::read_dir(cut.house.path().join("store/.links")).unwrap().count();
        assert_eq!(left, 3, "{what}: contents of two files and a link");
    });
}

#[test]
fn soak_additions_cut_anywhere() {
    let Some(cut) = Cut::new() else { return };
    let both = ["--add new --option auto-optimise-store true", "--add new"];
    for words in both.into_iter().take(if is_long() { 2 } else { 1 }) {
        cut.everywhere(words, &|what| {
            let added = cut.house.words("nix-store", "--add new");
            assert_eq!((added.status, added.stderr.as_str()), (Some(0), ""), "{what}");
            cut.house.words("nix-store", &format!("--check-validity {}", added.stdout.trim_end())).prints("");
            cut.collect_all(what);
        });
    }
}

fn open(folder: &Path) -> LocalStore {
    let layout = crate::garbage_stress::layout(folder);
    LocalStore::open(layout, Options::default(), Access::ReadWrite, Arc::new(Silent)).unwrap()
}

/// Who dies as the ledger is synced for the last time has changed it, but those who have it open are not
/// told before somebody writes. Nobody acts on what they are told until then.
#[test]
fn what_died_at_the_last_sync_is_settled_first() {
    let Some(cut) = Cut::new() else { return };
    cut.house.write("later", "makes known what is in the ledger");
    let later = |what: &str| {
        let done = cut.house.words("nix-store", "--add later");
        assert_eq!(done.status, Some(0), "{what}: {done:?}");
        cut.is_whole(what);
    };
    let work = cut.house.work();
    let add = |store: &LocalStore, name: &str| {
        let content =
            ContentAddressed { name: name.parse().unwrap(), method: Method::Recursive, algorithm: Algorithm::Sha256 };
        store.add(&work.join(name), &content).unwrap()
    };
    // Somebody has the ledger open all the time, in another process.
    let each = |words: &str, act: &dyn Fn(&LocalStore, &str)| {
        for nth in 1.. {
            cut.restore();
            let store = open(cut.house.path());
            assert!(store.is_valid(&store.dir().parse(cut.kept.as_bytes()).unwrap()).unwrap());
            let (was_cut, _) = cut.cut(words, "fdatasync", nth);
            if !was_cut {
                assert!(nth > 1, "{words} was not cut at all");
                break;
            }
            act(&store, &format!("{words} cut at sync {nth}"));
        }
    };
    // Registered, or not, and nothing keeps it: what is not valid goes.
    each("--add new", &|store, what| {
        store.collect(CollectOptions::default(), &mut Freed::default()).unwrap();
        later(what);
    });
    // Deleted, or not: what somebody has found to be there stays.
    each("--gc", &|store, what| {
        let gone = add(store, "gone");
        store.add_permanent_root(&gone, &work.join("found")).unwrap();
        later(what);
        store.collect(CollectOptions::default(), &mut Freed::default()).unwrap();
        assert!(store.verify_path(&gone).unwrap(), "{what}");
        cut.is_whole(what);
    });
    // The same for who makes it again, and dies in turn.
    each("--add new", &|_, what| {
        let (was_cut, run) = cut.cut("--add new", "renameat", 1);
        assert!(was_cut || run.status == Some(0), "{what}");
        later(what);
    });
}
