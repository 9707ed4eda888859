//! Collecting garbage with `nix-store`.

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
