//! Builds whose driver, builders or launchers are killed at any moment: the next start leaves no
//! process, mount, directory or lock of theirs, the same derivations build, and the store is whole.
//!
//! `LARDER_SOAK_ROUNDS` makes it long (`cargo xtask soak kills`). Everything is run as whoever runs
//! the tests, and by root once more as an ordinary user.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use larder_core::hash::{Algorithm, Encoding, Hash};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::house::{House, LARDER, Run, run, spawn};
use crate::stress::{Random, number};

/// Rounds of a short run.
const ROUNDS: u64 = 6;

/// How long anything may take that takes a second.
const PATIENCE: Duration = Duration::from_mins(2);

/// Ids of a slot, and slots for each run.
const SLOT: u32 = 1 << 16;
const SLOTS: u32 = 4;

/// What a builder does. While the gate is held some of them never end, and leave children behind.
const SCRIPT: &str = r#"
    echo "begin $name"; mkdir $out
    (trap '' TERM HUP INT; exec >/dev/null 2>&1 </dev/null; [ ! -e $GATE/hold ] || sleep 1000) &
    n=0; while [ $n -lt $STEPS ]; do echo "line $n"; echo $n > f$n; echo $n > $out/$n; n=$((n + 1)); done
    mkdir -p d/d; chmod 0 d/d; ln -s /etc/passwd d/link
    if [ -e $GATE/hold ] && [ "$HANGS" = 1 ]; then setsid sleep 1000 & sleep 1000; fi
    ln -s $out $out/self; echo "$dep" > $out/dep
"#;

/// A house, and who lives there.
struct Scene {
    house: House,
    /// An ordinary user, where root is to be one.
    user: Option<u32>,
    /// The program is below the house, so that each process of it can be told from others'.
    program: PathBuf,
    config: String,
    kills: BTreeMap<&'static str, u64>,
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl Scene {
    fn new(user: Option<u32>) -> Self {
        let house = House::new();
        let at = |name: &str| house.path().join(name);
        std::fs::set_permissions(house.path(), PermissionsExt::from_mode(0o755)).unwrap();
        for name in ["bin", "builds", "gate"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let program = at("bin/larder");
        // By another process: a child that a thread of this one forks meanwhile would have the copy
        // open for writing, and nobody can run such a file.
        assert!(Command::new("cp").arg(LARDER).arg(&program).status().unwrap().success());
        if let Some(uid) = user {
            for name in [".", "etc", "home", "work", "builds", "gate"] {
                chown(at(name), Some(uid), Some(uid)).unwrap();
            }
        }
        // Ids that no other run has: whoever has an id may kill all its processes.
        let first = 1_000_000_000 + (std::process::id() % 10_000) * SLOT * SLOTS;
        let gate = at("gate").display().to_string();
        let config = format!(
            "sandbox-fallback = false\nsandbox-paths = /bin /usr /lib /lib64? {gate}\nsubstituters =\n\
             build-dir = {}\nexperimental-features = auto-allocate-uids\nbuild-users-group = nixbld\n\
             auto-allocate-uids = true\nstart-id = {first}\nid-count = {}\nmax-jobs = 3\nkeep-going = true\n\
             build-poll-interval = 1",
            at("builds").display(),
            SLOT * SLOTS,
        );
        Self { house, user, program, config, kills: BTreeMap::new() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.house.path().join(name)
    }

    fn command(&self, applet: &str, sandbox: bool) -> Command {
        let mut command = self.house.command(&self.program);
        // An ordinary user has no ids to give away, and needs none.
        let users = if self.user.is_some() || !is_root() || !sandbox { "\nbuild-users-group =" } else { "" };
        let users = if sandbox { users.to_owned() } else { format!("{users}\nauto-allocate-uids = false") };
        command.arg0(applet).env("NIX_CONFIG", format!("{}{users}\nsandbox = {sandbox}", self.config));
        if let Some(uid) = self.user {
            command.uid(uid).gid(uid);
        }
        command
    }

    fn run(&self, applet: &str, sandbox: bool, words: &[&str]) -> Run {
        run(self.command(applet, sandbox).args(words), b"")
    }

    /// Derivations that no round before had: a chain of two that hang and two that do not, one with
    /// two outputs, one whose hash is known. The last needs all others.
    fn derivations(&self, round: u64) -> Vec<String> {
        let text = format!("round {round}\n");
        let hash = Hash::of(Algorithm::Sha256, text.as_bytes());
        let hash = hash.encode(Encoding::Base16);
        let add = |name: &str, script: &str, hangs: bool, more: &[(&str, Value)], needs: &[&str]| {
            let env = json!({
                "PATH": "/bin:/usr/bin", "GATE": self.at("gate"), "STEPS": (round * 7 % 40).to_string(),
                "HANGS": if hangs { "1" } else { "0" }, "round": round.to_string(), "name": name,
            });
            let needs: BTreeMap<String, String> =
                needs.iter().enumerate().map(|(n, need)| (format!("dep{n}"), format!("{need}.json"))).collect();
            let mut drv = json!({
                "name": name, "builder": "/bin/sh", "args": ["-e", "-c", script], "env": env, "derivations": needs,
            });
            for (key, value) in more {
                drv[key] = value.clone();
            }
            let file = self.house.write(&format!("{name}.json"), drv.to_string());
            let added = self.run("larder", true, &["derivation", "add", file.to_str().unwrap()]);
            assert_eq!(added.status, Some(0), "{added:?}");
            added.stdout.trim_end().to_owned()
        };
        let two = format!("{SCRIPT}\nmkdir $dev; ln $out/dep $dev/dep; echo $out > $dev/out");
        let fixed = format!("printf '{text}' > $out; chmod 644 $out");
        let known = json!({"out": {"method": "flat", "hashAlgo": "sha256", "hash": hash}});
        vec![
            add("quick", SCRIPT, false, &[], &[]),
            add("slow", SCRIPT, true, &[], &[]),
            add("two", &two, false, &[("outputs", json!({"out": {}, "dev": {}}))], &["quick"]),
            add("fixed", &fixed, false, &[("outputs", known)], &["quick"]),
            add("stuck", SCRIPT, true, &[], &["two"]),
            add("top", SCRIPT, false, &[], &["slow", "stuck", "fixed"]),
        ]
    }

    fn hold(&self, holds: bool) {
        let file = self.at("gate/hold");
        if holds {
            std::fs::write(file, "").unwrap();
        } else {
            std::fs::remove_file(file).unwrap();
        }
    }

    /// Processes of this house: those that run its program, and those that have its environment.
    fn processes(&self) -> Vec<u32> {
        let house = self.house.path().as_os_str().as_encoded_bytes();
        let is_ours = |dir: &Path| {
            std::fs::read_link(dir.join("exe")).is_ok_and(|exe| exe.starts_with(self.house.path()))
                || std::fs::read(dir.join("environ")).is_ok_and(|text| text.windows(house.len()).any(|w| w == house))
        };
        let all = std::fs::read_dir("/proc").unwrap().flatten();
        all.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
            .filter(|pid| *pid != std::process::id() && is_ours(Path::new(&format!("/proc/{pid}"))))
            .collect()
    }

    /// Starts a build and kills something of it; the driver ends, by itself if it has to.
    fn disturb(&mut self, drvs: &[String], mode: &[&str], sandbox: bool, random: &mut Random) {
        let mut command = self.command("nix-store", sandbox);
        let mut child = spawn(command.args(["-r", "--quiet"]).args(mode).args(drvs));
        let driver = child.id();
        std::thread::sleep(Duration::from_millis(random.below(900)));
        // Without a sandbox, or users for builders, nobody could find what a killed launcher has left.
        let can_lose_launchers = sandbox;
        let builders = || -> Vec<u32> {
            let is_candidate = |pid: &u32| {
                let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
                *pid != driver && (can_lose_launchers || !exe.is_ok_and(|exe| exe == self.program))
            };
            self.processes().into_iter().filter(is_candidate).collect()
        };
        let kill = |pid: u32| {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).unwrap();
            let _ = kill_process(pid, Signal::KILL);
        };
        let what = match random.below(5) {
            0 | 1 => {
                kill(driver);
                "the driver"
            }
            2 => {
                let all = builders();
                for pid in &all {
                    kill(*pid);
                }
                kill(driver);
                "all at once"
            }
            3 => {
                builders().into_iter().for_each(kill);
                "all but the driver"
            }
            _ => {
                let all = builders();
                if !all.is_empty() {
                    kill(all[usize::try_from(random.below(all.len() as u64)).unwrap()]);
                }
                "one of the driver's"
            }
        };
        *self.kills.entry(what).or_default() += 1;
        if what == "the driver" || what == "all at once" {
            drop(child.wait_with_output().unwrap());
            return;
        }
        // Those that hang wait to be killed; a driver that hears of it ends by itself.
        let end = Instant::now() + Duration::from_millis(500);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            }
            assert!(Instant::now() < end + PATIENCE, "the driver hangs");
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(child.wait_with_output().unwrap());
    }

    /// What is left of earlier builds; empty if it is nothing.
    fn left_over(&self) -> Vec<String> {
        let names = |dir: &str| -> Vec<String> {
            let entries = std::fs::read_dir(self.at(dir)).into_iter().flatten().flatten();
            entries.map(|entry| format!("{dir}/{}", entry.file_name().to_string_lossy())).collect()
        };
        let mut left = [names("builds"), names("var/larder/builds")].concat();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let house = self.house.path().to_str().unwrap();
        left.extend(mounts.lines().filter(|line| line.contains(house)).map(str::to_owned));
        let described = |pid: u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            format!("process {pid}: {} ({})", String::from_utf8_lossy(&line).replace('\0', " "), state.trim())
        };
        left.extend(self.processes().into_iter().map(described));
        left
    }

    /// Everything in the store that is no valid path, without the files of locks.
    fn strangers(&self) -> Vec<String> {
        let valid = self.run("nix-store", true, &["--dump-db"]).stdout;
        let valid: Vec<&str> = valid.lines().filter_map(|line| line.rsplit_once("/store/")).map(|(_, n)| n).collect();
        let entries = std::fs::read_dir(self.at("store")).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let is_lock = |name: &str| Path::new(name).extension().is_some_and(|ext| ext == "lock");
        names.filter(|name| name != ".links" && !is_lock(name) && !valid.contains(&name.as_str())).collect()
    }

    fn round(&mut self, round: u64, random: &mut Random) {
        let sandbox = round % 3 != 1;
        let drvs = self.derivations(round);
        let words: Vec<&str> = drvs.iter().map(String::as_str).collect();
        let mut mode: &[&str] = &[];
        if round % 4 == 3 {
            // Of what is valid a check or a repair may be disturbed.
            let made = self.run("nix-store", sandbox, &[&["-r", "--quiet"], &words[..]].concat());
            assert_eq!(made.status, Some(0), "round {round}: {made:?}");
            mode = if round % 8 == 3 { &["--check"] } else { &["--repair"] };
        }
        self.hold(true);
        self.disturb(&drvs, mode, sandbox, random);
        self.hold(false);
        // The next start: it builds all of it.
        let again = self.run("nix-store", sandbox, &[&["-r", "--quiet", "--timeout", "60"], mode, &words[..]].concat());
        assert_eq!(again.status, Some(0), "round {round}: {again:?}");
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let left = self.left_over();
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "round {round}, {:?}: {left:#?}", self.kills);
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(self.strangers(), [""; 0], "round {round}");
        let verified = self.run("nix-store", sandbox, &["--verify", "--check-contents"]);
        assert_eq!(verified.status, Some(0), "round {round}: {verified:?}");
        assert!(!verified.stderr.contains("modified") && !verified.stderr.contains("disappeared"), "{verified:?}");
        if round % 10 == 9 {
            self.collect();
        }
    }

    /// What nobody needs can be deleted, and nothing else is left then.
    fn collect(&self) {
        let collected = self.run("nix-store", true, &["--gc"]);
        assert_eq!(collected.status, Some(0), "{collected:?}");
        let names = |dir: &str| -> Vec<String> {
            let entries = std::fs::read_dir(self.at(dir)).unwrap().flatten();
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
        };
        let store = names("store").into_iter().filter(|name| name != ".links").collect::<Vec<_>>();
        assert_eq!(store, [""; 0]);
        assert_eq!(names("store/.links"), [""; 0]);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // After a failure, nothing of it may stay either.
        for pid in self.processes() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = Command::new("chmod").args(["-R", "u+rwX"]).arg(self.house.path()).status();
    }
}

fn rounds(user: Option<u32>) {
    let rounds = number("LARDER_SOAK_ROUNDS").unwrap_or(ROUNDS);
    let seed = number("LARDER_SOAK_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let mut random = Random(seed);
    let mut scene = Scene::new(user);
    let begun = Instant::now();
    for round in 0..rounds {
        scene.round(round, &mut random);
        if round % 20 == 19 {
            println!("{} rounds, killed {:?}, {:.0} s", round + 1, scene.kills, begun.elapsed().as_secs_f64());
        }
    }
    scene.collect();
    let who = user.map_or_else(|| format!("user {}", rustix::process::geteuid().as_raw()), |uid| format!("user {uid}"));
    println!("{rounds} rounds as {who} (seed {seed}): killed {:?}", scene.kills);
    assert_eq!(
        std::fs::metadata(scene.at("store")).unwrap().uid(),
        user.unwrap_or(rustix::process::geteuid().as_raw())
    );
}

#[test]
fn killed_builds_leave_nothing() {
    rounds(None);
}

#[test]
fn killed_builds_of_an_ordinary_user_leave_nothing() {
    if is_root() {
        rounds(Some(30_700 + std::process::id() % 1000));
    }
}
