//! Collecting garbage with `nix-store`.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::house::{House, Run, run};

impl House {
    /// Adds a file and gives its path.
    pub fn add(&self, name: &str, contents: impl AsRef<[u8]>) -> String {
        self.write(name, contents);
        let added = self.words("nix-store", &format!("--add {name}"));
        assert_eq!(added.status, Some(0), "{added:?}");
        added.stdout.trim_end().to_owned()
    }

    /// Makes a root below `gcroots`.
    pub fn root(&self, name: &str, path: &str) -> PathBuf {
        let link = self.path().join("var/gcroots").join(name);
        symlink(path, &link).expect("a new root");
        link
    }

    /// The names in the store, but `.links`.
    pub fn store_names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path().join("store")).expect("a store");
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter(|name| name != ".links").collect();
        names.sort();
        names
    }

    pub fn gc(&self, words: &str) -> Run {
        self.words("nix-store", &format!("--gc {words}"))
    }
}

pub fn base(path: &str) -> String {
    path.rsplit('/').next().unwrap().to_owned()
}

#[test]
fn output_of_a_run() {
    let house = House::new();
    let (kept, gone) = (house.add("kept", "k"), house.add("gone", vec![b'x'; 20_000]));
    house.root("r", &kept);
    let store = house.path().join("store").display().to_string();
    let lock = format!("{}-x.lock", "1".repeat(32));
    house.words("nix-store", "--init").prints("");
    std::fs::write(house.path().join("store").join(&lock), "").unwrap();
    std::fs::create_dir_all(house.path().join("store/.tmp-link-1/x")).unwrap();

    let found = "finding garbage collector roots...\n";
    let live = house.gc("--print-live");
    assert_eq!((live.stdout, live.status), (format!("{kept}\n"), Some(0)));
    assert_eq!(live.stderr, format!("{found}determining live/dead paths...\n"));
    let mut dead = [format!("{store}/{lock}"), gone.clone()];
    dead.sort();
    assert_eq!(house.gc("--print-dead").stdout, format!("{}\n{}\n", dead[0], dead[1]));
    house.gc("--print-roots").prints(&format!("{}/var/gcroots/r -> {kept}\n", house.path().display()));
    assert_eq!(house.store_names().len(), 4, "asking deletes nothing");

    let links = "deleting unused links...\nnote: currently hard linking saves -0.00 MiB\n";
    let nothing = house.gc("--max-freed 0");
    assert_eq!(nothing.stdout, "0 store paths deleted, 0.00 MiB freed\n");
    assert_eq!(nothing.stderr.replace("saves 0.00", "saves -0.00"), format!("{found}{links}"));

    let run = house.gc("");
    assert_eq!((run.stdout.as_str(), run.status), ("3 store paths deleted, 0.02 MiB freed\n", Some(0)));
    let mut lines: Vec<&str> = run.stderr.lines().collect();
    lines[2..5].sort_unstable();
    let mut deleted = [".tmp-link-1".to_owned(), lock, base(&gone)].map(|name| format!("deleting '{store}/{name}'"));
    deleted.sort();
    let wanted = ["finding garbage collector roots...".to_owned(), "deleting garbage...".to_owned()]
        .into_iter()
        .chain(deleted)
        .chain(["deleting unused links...".to_owned()]);
    assert_eq!(lines[..6], wanted.collect::<Vec<_>>());
    assert!(lines[6].starts_with("note: currently hard linking saves "));
    assert_eq!(house.store_names(), [base(&kept)]);
    assert_eq!(house.words("nix-store", "--verify --check-contents").status, Some(0));
}

#[test]
fn limits_stop_it() {
    let house = House::new();
    for n in 0..8 {
        house.add(&format!("f{n}"), vec![b'0' + n; 10_000]);
    }
    let run = house.gc("--max-freed 25000");
    assert_eq!(run.stdout, "3 store paths deleted, 0.03 MiB freed\n");
    assert!(run.stderr.contains("\ndeleted more than 25000 bytes; stopping\ndeleting unused links...\n"));
    assert_eq!(house.store_names().len(), 5);
    assert!(!house.gc("--max-freed 1T").stderr.contains("stopping"));
    assert_eq!(house.store_names().len(), 0);
}

#[test]
fn s007_s008_files_as_roots() {
    let house = House::new();
    let path = house.add("kept", "k");
    let roots = house.path().join("var/gcroots/x");
    std::fs::create_dir(&roots).unwrap();
    std::fs::write(roots.join("foo"), "").unwrap();
    house.gc("--print-roots").prints("");
    std::fs::write(roots.join(base(&path)), "").unwrap();
    house.gc("--print-roots").prints(&format!("{} -> {path}\n", roots.join(base(&path)).display()));
    assert_eq!(house.gc("").stdout, "0 store paths deleted, 0.00 MiB freed\n");
    std::fs::remove_file(roots.join(base(&path))).unwrap();
    assert_eq!(house.gc("").stdout, "1 store paths deleted, 0.00 MiB freed\n");
}

#[test]
fn what_cannot_be_deleted_is_told_and_the_rest_goes() {
    let house = House::new();
    let paths = [house.add("a", "a"), house.add("b", "b")];
    let mounted = house.path().join("store").join(format!("{}-mount", "2".repeat(32)));
    std::fs::create_dir(&mounted).unwrap();
    let mount = |words: &[&str]| std::process::Command::new(words[0]).args(&words[1..]).arg(&mounted).status();
    if !mount(&["mount", "-t", "tmpfs", "none"]).is_ok_and(|status| status.success()) {
        println!("skipped: nothing can be mounted here");
        return;
    }
    let run = house.gc("");
    mount(&["umount"]).unwrap();
    assert_eq!(run.status, Some(1), "{run:?}");
    assert!(run.stdout.ends_with(" store paths deleted, 0.00 MiB freed\n"), "{run:?}");
    assert!(run.stderr.ends_with("error: 1 entries of the store could not be deleted\n"), "{run:?}");
    assert!(!PathBuf::from(&paths[0]).exists() && !PathBuf::from(&paths[1]).exists());
    let again = house.gc("");
    assert_eq!((again.status, house.store_names().len()), (Some(0), 0), "{again:?}");
}

#[test]
fn s082_immutable_flags_are_cleared() {
    let house = House::new();
    std::fs::create_dir_all(house.work().join("tree/sub")).unwrap();
    house.write("tree/sub/file", "x");
    let added = house.words("nix-store", "--add tree").stdout;
    let path = added.trim_end();
    let mut chattr = std::process::Command::new("chattr");
    chattr.args(["+i", path]).arg(format!("{path}/sub/file")).arg(format!("{path}/sub"));
    if !chattr.output().is_ok_and(|output| output.status.success()) {
        println!("skipped: chattr does not work here");
        return;
    }
    let run = house.gc("");
    assert_eq!((run.status, house.store_names().len()), (Some(0), 0), "{run:?}");
}

/// Real Nix's state folder, not taken over: every deleting operation refuses.
#[test]
fn beside_real_nix_nothing_is_deleted() {
    let house = House::new();
    house.write("f", "x");
    let added = run(house.command("nix-store").args(["--add", "f"]), b"");
    if added.status != Some(0) || !added.stderr.is_empty() {
        println!("skipped: there is no nix-store here");
        return;
    }
    let path = added.stdout.trim_end().to_owned();
    for words in ["--gc", "--gc --max-freed 0", &format!("--delete {path}")] {
        let refused = house.words("nix-store", words);
        assert_eq!(refused.status, Some(1), "{words}");
        assert!(refused.stderr.contains("larder adopt"), "{words}: {}", refused.stderr);
        assert!(PathBuf::from(&path).exists());
        assert!(house.path().join("var/db/reserved").exists(), "not even the reserve is touched");
    }
}

/// Valid or not, what is dead is listed in the order of the names.
#[test]
fn dead_paths_are_listed_in_order() {
    let house = House::new();
    for name in ["a", "b", "c", "d"] {
        house.add(name, name);
    }
    for first in ["0", "5", "b", "h", "q", "z"] {
        std::fs::write(house.path().join(format!("store/{}-junk", first.repeat(32))), "").unwrap();
    }
    let listed = house.words("nix-store", "--gc --print-dead").stdout;
    let lines: Vec<&str> = listed.lines().collect();
    assert!(lines.len() == 10 && lines.is_sorted(), "{listed}");
}

#[test]
fn delete_and_liveness() {
    let house = House::new();
    let (a, b) = (house.add("a", "a"), house.add("b", "b"));
    house.root("r", &a);
    let text = format!(
        "finding garbage collector roots...\nerror: Cannot delete path '{a}' since it is still alive. To find out why, \
         use: nix-store --query --roots and nix-store --query --referrers\n"
    );
    let alive = house.words("nix-store", &format!("--delete {b} {a}"));
    assert_eq!((alive.stdout.as_str(), alive.status), ("1 store paths deleted, 0.00 MiB freed\n", Some(1)));
    assert!(alive.stderr.ends_with(&text[text.find("error").unwrap()..]), "{}", alive.stderr);
    assert!(!PathBuf::from(&b).exists());
    let ignored = house.words("nix-store", &format!("--delete --ignore-liveness {a}"));
    assert_eq!((ignored.stdout.as_str(), ignored.status), ("1 store paths deleted, 0.00 MiB freed\n", Some(0)));
    let missing = format!("{}/{}-none", house.path().join("store").display(), "0".repeat(32));
    let gone = house.words("nix-store", &format!("--delete {missing}"));
    assert_eq!((gone.stdout.as_str(), gone.status), ("1 store paths deleted, 0.00 MiB freed\n", Some(0)));
}

fn strace(house: &House, calls: &str, words: &str) -> Option<String> {
    let log = house.path().join("trace");
    let mut command = house.command("strace");
    command.args(["-f", "-qq", "-e", calls, "-o"]).arg(&log).arg(crate::house::LARDER).arg("nix-store");
    let run = run(command.args(words.split(' ')), b"");
    if run.status != Some(0) {
        println!("skipped: strace does not work here: {}", run.stderr);
        return None;
    }
    std::fs::read_to_string(log).ok()
}

#[test]
fn s020_what_is_linked_is_not_read_again() {
    let house = House::new();
    std::fs::create_dir_all(house.work().join("tree/sub")).unwrap();
    for n in 0..30 {
        house.write(&format!("tree/sub/f{n}"), format!("text {}", n % 5));
    }
    house.words("nix-store", "--add tree");
    let first = house.words("nix-store", "--optimise");
    assert_eq!(first.stderr, "0.00 MiB freed by hard-linking 25 files\n");
    let Some(trace) = strace(&house, "openat", "--optimise") else { return };
    let read = trace.lines().filter(|line| line.contains("\"f")).count();
    assert_eq!(read, 0, "{trace}");
}

#[test]
fn s023_s092_links_are_counted_and_cleaned() {
    let house = House::new();
    for name in ["a", "b", "c"] {
        house.add(name, vec![b'x'; 2 << 20]);
    }
    let other = house.add("other", vec![b'y'; 1 << 20]);
    house.root("r", &other);
    let kept = house.add("a", vec![b'x'; 2 << 20]);
    house.root("a", &kept);
    assert_eq!(house.words("nix-store", "--optimise").stderr, "4.00 MiB freed by hard-linking 2 files\n");
    assert!(house.gc("--max-freed 0").stderr.ends_with("note: currently hard linking saves 4.00 MiB\n"));
    // Two of the three names go: nothing is freed but the names.
    let run = house.gc("");
    assert_eq!(run.stdout, "2 store paths deleted, 0.00 MiB freed\n");
    assert!(run.stderr.contains("note: currently hard linking saves -0.00 MiB\n"), "{}", run.stderr);
    let links = || std::fs::read_dir(house.path().join("store/.links")).unwrap().count();
    assert_eq!(links(), 2);
    std::fs::remove_file(house.path().join("var/gcroots/a")).unwrap();
    assert_eq!(house.gc("").stdout, "1 store paths deleted, 2.00 MiB freed\n");
    assert_eq!(links(), 1, "no entry has one name left");
}

#[test]
fn s042_s067_roots_of_a_path() {
    let house = House::new();
    let path = house.add("p", "p");
    let link = house.work().join("result");
    symlink(&path, &link).unwrap();
    let auto = house.path().join("var/gcroots/auto");
    std::fs::create_dir_all(&auto).unwrap();
    symlink(&link, auto.join("x")).unwrap();
    house.words("nix-store", &format!("-q --roots {path}")).prints(&format!("{} -> {path}\n", link.display()));
}

#[test]
fn s094_paths_are_linked_as_they_come() {
    use std::os::unix::fs::MetadataExt as _;
    let house = House::new();
    house.write("f", "the same");
    std::fs::copy(house.work().join("f"), house.work().join("g")).unwrap();
    let added = house.words("nix-store", "--option auto-optimise-store true --add f g");
    assert_eq!((added.status, added.stderr.as_str()), (Some(0), ""));
    for path in added.stdout.lines() {
        assert_eq!(std::fs::metadata(path).unwrap().nlink(), 3, "{path}");
    }
    assert_eq!(house.words("nix-store", "--verify --check-contents").status, Some(0));
}

/// A run that is killed leaves a half-deleted tree aside: the path cannot come back to life with
/// it, and the next run removes the rest.
#[test]
fn s069_leftovers_are_finished() {
    let house = House::new();
    std::fs::create_dir_all(house.work().join("tree/sub")).unwrap();
    for n in 0..10 {
        house.write(&format!("tree/sub/f{n}"), format!("{n}"));
    }
    let path = house.words("nix-store", "--add tree").stdout;
    let mut command = house.command("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=unlinkat", "-e", "inject=unlinkat:signal=KILL:when=4"]);
    let killed = run(command.args([crate::house::LARDER, "nix-store", "--gc"]).env("RAYON_NUM_THREADS", "1"), b"");
    if killed.status == Some(0) || killed.stderr.contains("strace:") {
        println!("skipped: strace does not work here");
        return;
    }
    let left = house.store_names();
    assert!(left.len() == 1 && left[0].starts_with(".larder-trash-"), "{left:?}");
    house.words("nix-store", "--add tree").prints(&path);
    house.root("r", path.trim_end());
    assert_eq!(house.words("nix-store", "--verify --check-contents").status, Some(0));
    assert_eq!(house.gc("").status, Some(0));
    assert_eq!(house.store_names(), [base(path.trim_end())]);
}

/// Room is made before something is added.
#[test]
fn auto_gc() {
    let house = House::new();
    for n in 0..4 {
        house.add(&format!("f{n}"), vec![b'0' + n; 10_000]);
    }
    let free = house.write("free", "1000");
    house.write("new", "n");
    let add = |options: &str| {
        let words = format!("{options} --add new");
        run(house.applet("nix-store").args(words.split(' ')).env("_NIX_TEST_FREE_SPACE_FILE", &free), b"")
    };
    let enough = add("--option min-free 1000 --option max-free 20000");
    assert_eq!((enough.status, enough.stderr.as_str()), (Some(0), ""));
    let made = add("--option min-free 1001 --option max-free 16000");
    assert_eq!(made.status, Some(0));
    assert!(made.stderr.starts_with("running auto-GC to free 15000 bytes\n"), "{}", made.stderr);
    assert!(made.stderr.contains("deleted more than 15000 bytes; stopping"), "{}", made.stderr);
    assert!(house.store_names().len() <= 4, "{:?}", house.store_names());
    assert!(PathBuf::from(made.stdout.trim_end()).exists());
}

#[test]
fn generations() {
    let house = House::new();
    let paths = [house.add("a", "a"), house.add("b", "b"), house.add("c", "c")];
    let profiles = house.path().join("var/profiles/per-user/me");
    std::fs::create_dir_all(&profiles).unwrap();
    for (n, path) in (1..).zip(&paths) {
        symlink(path, profiles.join(format!("p-{n}-link"))).unwrap();
    }
    symlink("p-2-link", profiles.join("p")).unwrap();
    let said = format!("removing old generations of profile {}/p\n", profiles.display());
    let dry = house.words("nix-collect-garbage", "-d --dry-run");
    let wanted = format!("{said}would remove profile version 1\nwould remove profile version 3\n");
    assert_eq!((dry.stdout.as_str(), dry.stderr), ("", wanted));
    assert_eq!(house.words("nix-collect-garbage", "").stdout, "0 store paths deleted, 0.00 MiB freed\n");
    let young = house.words("nix-collect-garbage", "--delete-older-than 1d");
    assert!(young.stderr.starts_with(&format!("{said}finding")), "{}", young.stderr);
    let run = house.words("nix-collect-garbage", "-d");
    let wanted = format!("{said}removing profile version 1\nremoving profile version 3\nfinding");
    assert!(run.stderr.starts_with(&wanted), "{}", run.stderr);
    assert_eq!(run.stdout, "2 store paths deleted, 0.00 MiB freed\n");
    assert_eq!(house.store_names(), [base(&paths[1])]);
    house
        .words("nix-collect-garbage", "--delete-older-than 1x")
        .fails_usage("nix-collect-garbage", "invalid number of days specifier '1x', expected something like '14d'");
}

/// The database is lost: what can be known again is, what cannot is told.
#[test]
fn the_database_is_made_anew() {
    let house = House::new();
    std::fs::create_dir_all(house.work().join("tree")).unwrap();
    house.write("tree/x", "x");
    let (flat, tree) = (house.add("flat", "f"), house.words("nix-store", "--add tree").stdout);
    let tree = tree.trim_end();
    house.write("user", format!("refers to {flat} and {tree}/x"));
    let base_of = |path: &str| base(path);
    // Registered by hand, as a build would.
    let user = format!("{}/{}-user", house.path().join("store").display(), "3".repeat(32));
    std::fs::copy(house.work().join("user"), &user).unwrap();
    let text = format!("{user}\n\n2\n{flat}\n{tree}\n");
    let registered = house.feed("nix-store", "--register-validity", text.as_bytes());
    assert_eq!(registered.status, Some(0), "{registered:?}");
    std::fs::write(house.path().join("store").join(format!("{}-left.lock", "4".repeat(32))), "").unwrap();
    let before = house.words("nix-store", "--dump-db").stdout;
    let db = house.path().join("var/db/larder.redb");
    for damage in ["lost", "cut", "zeros"] {
        let bytes = std::fs::read(&db).unwrap();
        match damage {
            "lost" => std::fs::remove_file(&db).unwrap(),
            "cut" => std::fs::write(&db, &bytes[..bytes.len() / 3]).unwrap(),
            _ => std::fs::write(&db, vec![0; bytes.len()]).unwrap(),
        }
        if damage != "lost" {
            let broken = house.words("nix-store", "--dump-db");
            assert_eq!((broken.status, broken.stdout.as_str()), (Some(1), ""), "{damage}: {broken:?}");
            assert!(broken.stderr.contains("larder.redb"), "{damage}: {broken:?}");
            assert!(house.gc("").status == Some(1) && std::path::Path::new(&flat).exists(), "{damage}: nothing goes");
        }
        let rebuilt = house.words("larder", "db rebuild --json");
        assert_eq!(rebuilt.status, Some(0), "{damage}: {rebuilt:?}");
        let told: serde_json::Value = serde_json::from_str(&rebuilt.stdout).unwrap();
        assert_eq!(told["proved"].as_array().unwrap().len(), 2, "{damage}: {told}");
        assert_eq!(told["taken"][0].as_str().map(base_of), Some(base(&user)), "{damage}: {told}");
        assert_eq!(told["left"].as_array().unwrap().len(), 1, "{damage}: {told}");
        assert_eq!(house.words("nix-store", "--dump-db").stdout, before, "{damage}");
        assert_eq!(house.words("larder", "verify --full").status, Some(0), "{damage}");
    }
}

#[test]
fn people_are_told_and_asked() {
    let house = House::new();
    let (kept, gone) = (house.add("kept", "k"), house.add("gone", "g"));
    house.root("r", &kept);
    let refused = house.words("larder", "gc");
    assert_eq!((refused.status, refused.stdout.contains(&gone)), (Some(1), true));
    assert!(refused.stderr.contains("--yes"), "{}", refused.stderr);
    assert!(PathBuf::from(&gone).exists());
    let plan = house.words("larder", "gc --dry-run").stdout;
    assert!(plan.ends_with("1 path would be deleted, 0.00 MiB freed\n"), "{plan}");
    let why = house.words("larder", &format!("why {kept} {gone}")).stdout;
    let link = house.path().join("var/gcroots/r");
    assert!(why.starts_with(&format!("{} (link)\n  -> {kept}\n", link.display())), "{why}");
    assert!(why.ends_with("no root keeps it; the next collection deletes it\n"), "{why}");
    house.words("larder", "roots").prints(&format!("{} -> {kept}\n", link.display()));
    house.words("larder", "gc --if-dropped nonsense").fails("'nonsense' is no root; `larder roots` shows them");
    assert_eq!(house.words("larder", "gc --yes").status, Some(0));
    assert_eq!(house.store_names(), [base(&kept)]);
    assert_eq!(house.words("larder", "verify --quick").status, Some(0));
}
