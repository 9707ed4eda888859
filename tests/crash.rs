//! The process ends, or a system call fails, at any step of what changes a store: the store opens,
//! is whole, holds the path whole or not at all, and the same command then succeeds.
//!
//! `strace` cuts at one system call that changes something: the process is killed as it enters the
//! call, or the call fails. A run without a cut gives the list of them. Short runs take an even
//! sample of the list; `LARDER_SOAK_S` (`cargo xtask soak`) takes all.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::house::{House, Run, run};
use crate::stress::number;

/// System calls that change files. Those that this machine does not know are passed over.
const CHANGES: &[&str] = &[
    "copy_file_range",
    "fallocate",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "fchown",
    "fchownat",
    "fdatasync",
    "fremovexattr",
    "fsetxattr",
    "fsync",
    "ftruncate",
    "link",
    "linkat",
    "mkdir",
    "mkdirat",
    "openat",
    "pwrite64",
    "rename",
    "renameat",
    "renameat2",
    "rmdir",
    "symlink",
    "symlinkat",
    "syncfs",
    "unlink",
    "unlinkat",
    "utimensat",
    "write",
    "writev",
];

/// Cuts of each scene in a short run.
const SAMPLE: usize = 9;

const VERIFIED: &str =
    "reading the Nix store...\nchecking path existence...\nchecking link hashes...\nchecking store hashes...\n";

/// One system call: its name, and the how many-eth of that name in its thread.
type Cut = (String, usize);

/// A command, and the store that it finds.
struct Scene {
    house: House,
    words: Vec<String>,
    stdin: Vec<u8>,
    /// Paths that the command makes valid, or deletes.
    paths: Vec<String>,
    /// What `--restore` makes.
    target: Option<PathBuf>,
}

fn strace_is_missing() -> bool {
    let found = Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let missing = !found.is_ok_and(|status| status.success());
    if missing {
        println!("skipped: strace is not installed");
    }
    missing
}

fn shell(house: &House, script: &str) {
    let status = Command::new("sh").args(["-ec", script]).current_dir(house.path()).status().unwrap();
    assert!(status.success(), "{script}: {status}");
}

/// A house with two trees, of which the second refers to the first.
fn furnished() -> (House, Vec<String>) {
    let house = House::new();
    shell(
        &house,
        "mkdir -p work/tree/sub; echo one >work/tree/a; chmod +x work/tree/a; ln -s a work/tree/link; \
         head -c 200000 /dev/zero >work/tree/sub/b; : >work/tree/empty",
    );
    let first = added(&house, "tree");
    house.write("user", format!("see {first}\n"));
    let second = added(&house, "user");
    (house, vec![first, second])
}

fn added(house: &House, name: &str) -> String {
    let run = house.words("nix-store", &format!("--add {name}"));
    assert_eq!(run.status, Some(0), "{run:?}");
    run.stdout.trim().to_owned()
}

impl Scene {
    fn new(house: House, words: &[&str], stdin: Vec<u8>, paths: Vec<String>) -> Self {
        let words = words.iter().map(|word| (*word).to_owned()).collect();
        shell(&house, "mkdir -p store var template; cp -a store var template");
        Self { house, words, stdin, paths, target: None }
    }

    /// Into nothing: the store itself is made on the way.
    fn add() -> Self {
        let (house, paths) = furnished();
        shell(&house, "chmod -R u+w store; rm -rf store var");
        Self::new(house, &["--add", "tree"], Vec::new(), paths[..1].to_vec())
    }

    fn import() -> Self {
        let (house, paths) = furnished();
        // The user of the tree was added without a reference to it: say so.
        let user = registration(&paths[1], &paths[..1]);
        let again = run(house.applet("nix-store").args(["--register-validity", "--reregister"]), user.as_bytes());
        assert_eq!(again.status, Some(0), "{again:?}");
        let stream = crate::house::output(house.applet("nix-store").arg("--export").args(&paths), b"").stdout;
        assert_eq!(house.run("nix-store", ["--delete", &paths[0], &paths[1]]).status, Some(0));
        Self::new(house, &["--import"], stream, paths)
    }

    /// Objects lie in the store that the ledger has forgotten.
    fn forgotten(words: &[&str]) -> Self {
        let (house, paths) = furnished();
        let stdin = if words == ["--load-db"] {
            house.words("nix-store", "--dump-db").stdout
        } else {
            registration(&paths[0], &[]) + &registration(&paths[1], &paths[..1])
        };
        shell(&house, "rm -rf var");
        assert_eq!(house.words("nix-store", "--init").status, Some(0));
        Self::new(house, words, stdin.into_bytes(), paths)
    }

    fn delete() -> Self {
        let (house, paths) = furnished();
        let words = ["--delete", &paths[0], &paths[1]];
        Self::new(house, &words, Vec::new(), paths.clone())
    }

    fn restore() -> Self {
        let (house, _) = furnished();
        let nar = crate::house::output(house.applet("nix-store").args(["--dump", "tree"]), b"").stdout;
        let target = house.work().join("target");
        let mut scene = Self::new(house, &["--restore", "target"], nar, Vec::new());
        scene.target = Some(target);
        scene
    }

    fn all() -> Vec<Self> {
        vec![
            Self::add(),
            Self::import(),
            Self::forgotten(&["--load-db"]),
            Self::forgotten(&["--register-validity"]),
            Self::delete(),
            Self::restore(),
        ]
    }

    fn reset(&self) {
        shell(&self.house, "chmod -R u+w store; rm -rf store var work/target; cp -a template/store template/var .");
    }

    fn strace(&self, words: &[String]) -> Run {
        let mut command = self.house.command("strace");
        command.args(["-f", "-qq", "--seccomp-bpf"]).args(words).arg(crate::house::LARDER).arg("nix-store");
        run(command.args(&self.words), &self.stdin)
    }

    /// The system calls that change something, in their order.
    fn cuts(&self) -> Vec<Cut> {
        self.reset();
        let log = self.house.path().join("trace");
        let set = CHANGES.iter().map(|name| format!("?{name}")).collect::<Vec<_>>().join(",");
        let words = ["-o".into(), log.display().to_string(), "-e".into(), format!("trace={set}")];
        let run = self.strace(&words);
        assert_eq!(run.status, Some(0), "{run:?}");
        let mut seen: BTreeMap<(String, String), usize> = BTreeMap::new();
        let mut cuts: Vec<Cut> = Vec::new();
        for line in std::fs::read_to_string(log).unwrap().lines() {
            let Some((thread, call)) = line.split_once(' ') else { continue };
            let Some((name, args)) = call.trim_start().split_once('(') else { continue };
            if !CHANGES.contains(&name) {
                continue;
            }
            let number = seen.entry((thread.to_owned(), name.to_owned())).or_default();
            *number += 1;
            let cut = (name.to_owned(), *number);
            if (name != "openat" || args.contains("O_CREAT")) && !cuts.contains(&cut) {
                cuts.push(cut);
            }
        }
        assert!(cuts.len() > SAMPLE, "{cuts:?}");
        cuts
    }

    /// An even sample of the cuts, with the last; all of them in the long form.
    fn sample(&self) -> Vec<Cut> {
        let cuts = self.cuts();
        if number("LARDER_SOAK_S").is_some() {
            return cuts;
        }
        (1..=SAMPLE).map(|n| cuts[cuts.len() * n / SAMPLE - 1].clone()).collect()
    }

    /// Names in the store directory, but for that of links.
    fn entries(&self) -> BTreeSet<String> {
        let store = self.house.path().join("store");
        let Ok(entries) = std::fs::read_dir(store) else { return BTreeSet::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != ".links").collect()
    }

    /// The ledger and the objects agree.
    fn verified(&self, cut: &str) {
        let run = self.house.words("nix-store", "--verify --check-contents");
        assert_eq!((run.stderr.as_str(), run.status), (VERIFIED, Some(0)), "{cut}");
    }

    fn valid(&self) -> usize {
        let valid = |path: &&String| self.house.run("nix-store", ["--check-validity", path]).status == Some(0);
        self.paths.iter().filter(valid).count()
    }

    /// The same command succeeds, and then nothing is left that a deletion leaves there.
    fn goes_on(&self, cut: &str) {
        if let Some(target) = &self.target {
            shell(&self.house, &format!("chmod -R u+w '{0}' 2>&- || :; rm -rf '{0}'", target.display()));
        }
        let mut command = self.house.applet("nix-store");
        let again = run(command.args(&self.words), &self.stdin);
        assert_eq!(again.status, Some(0), "{cut}, again: {again:?}");
        let deletes = self.words[0] == "--delete";
        assert_eq!(self.valid(), if deletes { 0 } else { self.paths.len() }, "{cut}");
        self.verified(cut);
        // The remains of the first run go like paths, and with any deletion.
        let store = self.house.path().join("store");
        let mut words = vec!["--delete".to_owned()];
        let objects = |name: &&String| !name.starts_with('.');
        words.extend(self.entries().iter().filter(objects).map(|name| store.join(name).display().to_string()));
        let deleted = self.house.run("nix-store", &words);
        assert_eq!(deleted.status, Some(0), "{cut}: {deleted:?}");
        assert_eq!(self.entries(), BTreeSet::new(), "{cut}");
        let left = |dir: &str| -> BTreeSet<String> {
            let entries = std::fs::read_dir(self.house.path().join(dir)).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        assert_eq!(left("var/temproots"), BTreeSet::new(), "{cut}");
        let db = BTreeSet::from(["big-lock", "larder.lock", "larder.redb", "reserved"].map(str::to_owned));
        assert!(left("var/db").is_subset(&db), "{cut}: {:?}", left("var/db"));
    }
}

/// Runs `each` at the cuts of all scenes, two scenes at a time. A panic is told and the other cuts
/// are tried all the same.
fn at_all_cuts(each: impl Fn(&Scene, usize, &Cut) + Sync) {
    let scenes = Scene::all();
    let run = |scenes: &[Scene]| {
        let (mut tried, mut bad) = (0, 0);
        for scene in scenes {
            for (n, cut) in scene.sample().iter().enumerate() {
                tried += 1;
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| each(scene, n, cut)));
                bad += usize::from(outcome.is_err());
            }
        }
        (tried, bad)
    };
    let (one, two) = scenes.split_at(scenes.len() / 2);
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| run(one));
        let two = run(two);
        (one.join().unwrap(), two)
    });
    println!("{} cuts", one.0 + two.0);
    assert_eq!(one.1 + two.1, 0, "of {} cuts so many went wrong", one.0 + two.0);
}

#[test]
fn a_process_killed_at_any_step_leaves_a_whole_store() {
    if strace_is_missing() {
        return;
    }
    at_all_cuts(|scene, _, (name, number)| {
        let cut = format!("{:?} killed at {name} {number}", scene.words);
        scene.reset();
        let inject = ["-o", "/dev/null", "-e", &format!("inject={name}:signal=KILL:when={number}")];
        scene.strace(&inject.map(str::to_owned));
        scene.verified(&cut);
        scene.goes_on(&cut);
    });
}

#[test]
fn a_system_call_that_fails_at_any_step_leaves_the_store_as_it_was() {
    if strace_is_missing() {
        return;
    }
    let failures =
        [("ENOSPC", "No space left on device"), ("EIO", "Input/output error"), ("EACCES", "Permission denied")];
    at_all_cuts(|scene, n, (name, number)| {
        let (errno, text) = failures[n % failures.len()];
        let cut = format!("{:?}, {errno} at {name} {number}", scene.words);
        scene.reset();
        let (before, valid_before) = (scene.entries(), scene.valid());
        let inject = ["-o", "/dev/null", "-e", &format!("inject={name}:error={errno}:when={number}")];
        let run = scene.strace(&inject.map(str::to_owned));
        scene.verified(&cut);
        if run.status != Some(0) {
            assert_eq!(run.status, Some(1), "{cut}: {run:?}");
            assert!(run.stderr.contains("error: ") && run.stderr.contains(text), "{cut}: {run:?}");
            // A registration that was made before a later step failed stays; so does what could
            // not be taken away.
            if scene.valid() == valid_before && !name.starts_with("unlink") && scene.words[0] != "--delete" {
                assert_eq!(scene.entries(), before, "{cut}: {run:?}");
            }
        }
        scene.goes_on(&cut);
    });
}

/// What `--register-validity` reads for a path without its hash.
fn registration(path: &str, references: &[String]) -> String {
    let mut text = format!("{path}\n\n{}\n", references.len());
    for reference in references {
        text.push_str(reference);
        text.push('\n');
    }
    text
}
