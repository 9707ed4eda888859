//! Many processes at one store, some killed at any moment: none sees an error but the honest ones,
//! and the store is whole afterwards.
//!
//! `LARDER_SOAK_S` and `LARDER_SOAK_PROCS` make it long and wide (`cargo xtask soak`).

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::house::{House, Run, spawn};

/// Trees that the processes add and delete, each with the same contents whoever adds it.
const TREES: u64 = 24;

/// Numbers that look random (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// A number from the environment, for the long form.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How long and how wide the long form is to be, if it is wanted.
fn soak() -> Option<Duration> {
    number("LARDER_SOAK_S").map(Duration::from_secs)
}

/// What the processes did, by operation: ended well, honest refusals, killed.
#[derive(Default)]
struct Counts(Mutex<BTreeMap<&'static str, [u64; 3]>>);

impl Counts {
    fn count(&self, what: &'static str, column: usize) {
        self.0.lock().unwrap().entry(what).or_default()[column] += 1;
    }

    fn sum(&self, column: usize) -> u64 {
        self.0.lock().unwrap().values().map(|row| row[column]).sum()
    }
}

/// What a process does.
struct Deed {
    name: &'static str,
    words: Vec<String>,
    stdin: Vec<u8>,
    /// One of these in an error is honest: others deleted the path, or are using it.
    honest: &'static [&'static str],
}

const NOT_VALID: &str = "is not valid";
const GONE: &str = "No such file or directory";
const ALIVE: &str = "it is still alive";

/// The trees, and each one's store path and export stream.
struct Place {
    house: House,
    paths: Vec<String>,
    exports: Vec<Vec<u8>>,
}

impl Place {
    fn new() -> Self {
        let house = House::new();
        let mut random = Random(7);
        for n in 0..TREES {
            let tree = house.work().join(format!("tree{n}"));
            std::fs::create_dir_all(tree.join("sub")).unwrap();
            let bytes = vec![n.to_le_bytes()[0]; usize::try_from(random.below(200_000)).unwrap()];
            std::fs::write(tree.join("sub/data"), bytes).unwrap();
            std::os::unix::fs::symlink("sub/data", tree.join("link")).unwrap();
            std::fs::write(tree.join("small"), format!("{n}\n")).unwrap();
        }
        let mut paths = Vec::new();
        let mut exports = Vec::new();
        for n in 0..TREES {
            let added = house.words("nix-store", &format!("--add tree{n}"));
            assert_eq!(added.status, Some(0), "{added:?}");
            let path = added.stdout.trim().to_owned();
            exports.push(crate::house::output(house.applet("nix-store").args(["--export", &path]), b"").stdout);
            paths.push(path);
        }
        Self { house, paths, exports }
    }

    fn deed(&self, random: &mut Random) -> Deed {
        let n = usize::try_from(random.below(TREES)).unwrap();
        let path = self.paths[n].clone();
        let deed = |name, words: &[&str], honest| {
            let words = words.iter().map(|word| (*word).to_owned()).collect();
            Deed { name, words, stdin: Vec::new(), honest }
        };
        match random.below(12) {
            0..=2 => deed("add", &["--add", &format!("tree{n}")], &[]),
            3 => {
                let mut import = deed("import", &["--import"], &[]);
                import.stdin.clone_from(&self.exports[n]);
                import
            }
            4..=6 => deed("delete", &["--delete", &path], &[ALIVE]),
            7 => deed("hash", &["-q", "--hash", &path], &[NOT_VALID]),
            8 => deed("closure", &["-qR", &path], &[NOT_VALID]),
            9 => deed("export", &["--export", &path], &[NOT_VALID, GONE]),
            10 => deed("verify-path", &["--verify-path", &path], &[NOT_VALID, GONE]),
            _ => deed("dump-db", &["--dump-db"], &[]),
        }
    }

    /// One process to its end, or to a sudden one.
    fn run(&self, deed: &Deed, kill_after: Option<Duration>) -> Option<Run> {
        let mut command = self.house.applet("nix-store");
        command.args(&deed.words);
        let mut child = spawn(&mut command);
        let mut pipe = child.stdin.take().expect("standard input is a pipe");
        // A reader of its own, so that a killed process is not waited for by its writer.
        std::thread::scope(|scope| {
            scope.spawn(move || drop(pipe.write_all(&deed.stdin)));
            if let Some(time) = kill_after {
                kill_later(&mut child, time);
            }
            let output = child.wait_with_output().expect("a child of ours can be waited for");
            output.status.code().map(|status| Run {
                stdout: format!("{} bytes", output.stdout.len()),
                stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
                status: Some(status),
            })
        })
    }

    /// The store agrees with its ledger, and all that is left can be taken away.
    fn is_whole(&self) {
        let verified = self.house.words("nix-store", "--verify --check-contents");
        let said =
            "reading the Nix store...\nchecking path existence...\nchecking link hashes...\nchecking store hashes...\n";
        assert_eq!((verified.stderr.as_str(), verified.status), (said, Some(0)));
        let store = self.house.path().join("store");
        let entries = || {
            let names = std::fs::read_dir(&store).unwrap().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name != ".links").collect::<Vec<_>>()
        };
        // Remains of killed processes (lock files among them) go like any path, and with any deletion.
        let mut words = vec!["--delete".to_owned()];
        words.extend(
            entries()
                .iter()
                .filter(|name| !name.as_bytes().starts_with(b"."))
                .map(|name| store.join(name).display().to_string()),
        );
        let deleted = self.house.run("nix-store", &words);
        assert_eq!(deleted.status, Some(0), "{deleted:?}");
        assert_eq!(entries(), Vec::<std::ffi::OsString>::new());
        let roots = std::fs::read_dir(self.house.path().join("var/temproots")).unwrap().count();
        assert_eq!(roots, 0, "temporary roots of processes that are gone");
    }
}

fn kill_later(child: &mut Child, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        if child.try_wait().expect("a child of ours").is_some() {
            return;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    let _ = child.kill();
}

fn many_processes(processes: u64, time: Duration) {
    let place = Place::new();
    let counts = Counts::default();
    let end = Instant::now() + time;
    std::thread::scope(|scope| {
        for worker in 0..processes {
            let (place, counts) = (&place, &counts);
            scope.spawn(move || {
                let mut random = Random(worker << 32 | u64::from(std::process::id()));
                while Instant::now() < end {
                    let deed = place.deed(&mut random);
                    let kill = (random.below(6) == 0).then(|| Duration::from_micros(random.below(30_000)));
                    let Some(run) = place.run(&deed, kill) else {
                        counts.count(deed.name, 2);
                        continue;
                    };
                    if run.status == Some(0) {
                        counts.count(deed.name, 0);
                        continue;
                    }
                    let honest = deed.honest.iter().any(|text| run.stderr.contains(text));
                    assert!(honest && run.status == Some(1), "{:?}: {run:?}", deed.words);
                    counts.count(deed.name, 1);
                }
            });
        }
    });
    println!("{processes} processes, {time:?}; done, refused, killed: {:?}", counts.0.lock().unwrap());
    assert!(counts.sum(0) > 0 && counts.sum(2) > 0, "nothing was tried");
    place.is_whole();
}

#[test]
fn s044_processes_add_ask_and_delete_at_once_and_some_are_killed() {
    let processes = number("LARDER_SOAK_PROCS").unwrap_or(8);
    many_processes(processes, soak().unwrap_or(Duration::from_secs(4)));
}

/// Sixty-four processes, of which most wait for the others: nobody sees "busy".
#[test]
fn s044_sixty_four_processes_change_one_store() {
    if soak().is_some() {
        return many_processes(64, soak().unwrap_or_default());
    }
    let house = House::new();
    let children: Vec<Child> = (0..64)
        .map(|n| {
            let file = house.write(&format!("file{n}"), format!("{n}"));
            let mut command = house.applet("nix-store");
            command.arg("--add").arg(file).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((&*stderr, output.status.code()), ("", Some(0)));
    }
    assert_eq!(house.words("nix-store", "--dump-db").stdout.matches("-file").count(), 64);
}
