//! Whole processes against real Nix: the same work in turn, medians of figures and of ratios.
#![expect(clippy::indexing_slicing, reason = "indices below lengths that this file chose")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "figures for people"
)]

mod building;
mod caches;
mod daemon;
mod garbage;
mod place;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::run::{Cost, Failed, Job, Side, median, real_nix, release_binary, say};

/// Rounds of each pair, at least and at most; the median counts. More than the least are done as long
/// as they took less than [`ROUNDS_S`].
const ROUNDS: std::ops::Range<usize> = 5..15;
const ROUNDS_S: u64 = 10;
/// A measurement shorter than this is repeated within a round.
const SHORT_S: f64 = 0.25;

/// What a workload must reach.
#[derive(Clone, Copy)]
struct Goal {
    /// CPU of Larder divided by CPU of real Nix.
    cpu: Option<f64>,
    /// The same for wall time.
    wall: Option<f64>,
    /// Resident memory of Larder, MiB.
    peak_mib: Option<f64>,
}

const fn cpu(ratio: f64) -> Goal {
    Goal { cpu: Some(ratio), wall: None, peak_mib: None }
}

struct Bench {
    work: PathBuf,
    nix: Option<Side>,
    larder: Side,
    filters: Vec<String>,
    failures: u32,
}

/// Pseudo-random numbers, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n.max(1) as u64).unwrap_or(0)
    }
}

pub(crate) fn run(filters: &[String]) -> Result<(), Failed> {
    let program = release_binary()?;
    let base = if Path::new("/dev/shm").is_dir() { PathBuf::from("/dev/shm") } else { std::env::temp_dir() };
    let work = base.join(format!("larder-bench-{}", std::process::id()));
    std::fs::create_dir_all(&work)?;
    let nix = real_nix().map(|nix| Side::nix(&nix, &work.join("nix")));
    if nix.is_none() {
        say("no real nix-store is installed (Debian: apt-get install nix-bin): figures without ratios");
    }
    let larder = Side::larder(&program, &work.join("larder"));
    let mut bench = Bench { work: work.clone(), nix, larder, filters: filters.to_vec(), failures: 0 };
    let outcome = if filters.iter().any(|f| f == "memory") { bench.memory() } else { bench.all() };
    remove(&work);
    outcome?;
    if bench.failures > 0 {
        say(&format!("{} of the goals were missed", bench.failures));
    }
    Ok(())
}

fn remove(path: &Path) {
    if path.is_file() {
        let _ = std::fs::remove_file(path);
    } else if path.is_dir() {
        let _ = std::process::Command::new("chmod").args(["-R", "u+w"]).arg(path).status();
    }
    let _ = std::fs::remove_dir_all(path);
}

/// An empty store, made now.
fn fresh_store(side: &Side) -> Result<(), Failed> {
    remove(&side.dir);
    std::fs::create_dir_all(&side.dir)?;
    side.job(["--init"]).output()?;
    Ok(())
}

/// What is done to a side before each counted run: it must cost nothing in the figures.
/// A workload without one may be repeated as often as the clock needs.
type Reset<'a> = Option<&'a dyn Fn(&Side) -> Result<(), Failed>>;

impl Bench {
    fn wanted(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|f| name.contains(f.as_str()))
    }

    fn all(&mut self) -> Result<(), Failed> {
        say(&format!(
            "{:<44} {:>9} {:>9} {:>7} {:>7} {:>8}  goal",
            "workload", "nix cpu s", "ours", "cpu x", "wall x", "peak MiB"
        ));
        self.start_up()?;
        self.trees()?;
        self.ledger()?;
        self.garbage()?;
        self.building()?;
        self.daemon()?;
        self.caches()
    }

    /// Measures one workload on both sides in turn and prints a row.
    fn row(&mut self, name: &str, goal: Goal, job: &dyn Fn(&Side) -> Job, reset: Reset<'_>) -> Result<(), Failed> {
        if !self.wanted(name) {
            return Ok(());
        }
        let mut mine: Vec<Cost> = Vec::new();
        let mut theirs: Vec<Cost> = Vec::new();
        let once = |side: &Side, times: u32| {
            if let Some(reset) = reset {
                reset(side)?;
            }
            job(side).cost(times)
        };
        // The first run warms caches and tells how often a short command must be repeated.
        let first = once(&self.larder, 1)?;
        let times = |cost: &Cost| match reset {
            None => (SHORT_S / cost.cpu_s.max(0.0025)).clamp(1.0, 100.0) as u32,
            Some(_) => 1,
        };
        let my_times = times(&first);
        let their_times = match &self.nix {
            Some(nix) => times(&once(nix, 1)?),
            None => 1,
        };
        let mut peak = first.peak_mib;
        let begun = Instant::now();
        while mine.len() < ROUNDS.start || (mine.len() < ROUNDS.end && begun.elapsed().as_secs() < ROUNDS_S) {
            if let Some(nix) = &self.nix {
                theirs.push(once(nix, their_times)?);
            }
            let cost = once(&self.larder, my_times)?;
            peak = peak.max(cost.peak_mib);
            mine.push(cost);
        }
        let pick = |costs: &[Cost], f: fn(&Cost) -> f64| median(costs.iter().map(f).collect());
        let my_cpu = pick(&mine, |c| c.cpu_s);
        let mut line = String::new();
        let mut missed = Vec::new();
        if theirs.is_empty() {
            let _ = write!(line, "{name:<44} {:>9} {my_cpu:>9.4} {:>7} {:>7} {peak:>8.1}", "-", "-", "-");
        } else {
            let their_cpu = pick(&theirs, |c| c.cpu_s);
            // Round by round: a machine that is slow for a while is so for both sides of a round.
            let ratio = |f: fn(&Cost) -> f64| median(mine.iter().zip(&theirs).map(|(m, t)| f(m) / f(t)).collect());
            let (cpu_x, wall_x) = (ratio(|c| c.cpu_s), ratio(|c| c.wall_s));
            let _ = write!(line, "{name:<44} {their_cpu:>9.4} {my_cpu:>9.4} {cpu_x:>7.3} {wall_x:>7.3} {peak:>8.1}");
            if goal.cpu.is_some_and(|most| cpu_x > most) {
                missed.push("cpu");
            }
            if goal.wall.is_some_and(|most| wall_x > most) {
                missed.push("wall");
            }
        }
        if goal.peak_mib.is_some_and(|most| peak > most) {
            missed.push("memory");
        }
        let mut wants = Vec::new();
        if let Some(x) = goal.cpu {
            wants.push(format!("cpu {x:.3}"));
        }
        if let Some(x) = goal.wall {
            wants.push(format!("wall {x:.3}"));
        }
        if let Some(m) = goal.peak_mib {
            wants.push(format!("{m:.0} MiB"));
        }
        let verdict = if missed.is_empty() { "reached".to_owned() } else { format!("MISSED: {}", missed.join(", ")) };
        self.failures += u32::from(!missed.is_empty());
        say(&format!("{line}  {} {verdict}", wants.join(", ")));
        Ok(())
    }

    /// The resident memory of what streams, with a file of 6 GiB. Takes twice that on the disk
    /// where temporary files are, and minutes; only done when asked for by its name.
    fn memory(&mut self) -> Result<(), Failed> {
        const MOST_MIB: f64 = 64.0;
        let disk = std::env::temp_dir().join(format!("larder-memory-{}", std::process::id()));
        std::fs::create_dir_all(&disk)?;
        let sparse = disk.join("sparse");
        std::fs::File::create(&sparse)?.set_len(6 << 30)?;
        let side = Side::larder(&self.larder.program, &disk.join("larder"));
        let word = |s: &str| OsString::from(s);
        let stream = disk.join("stream");
        let mut measure = |name: &str, job: Job| {
            let cost = job.cost(1)?;
            let fine = cost.peak_mib < MOST_MIB;
            self.failures += u32::from(!fine);
            let verdict = if fine { "reached" } else { "MISSED" };
            say(&format!("{name:<12} 6 GiB: {:>6.1} MiB, {:>6.1} s CPU  64 MiB {verdict}", cost.peak_mib, cost.cpu_s));
            Ok::<(), Failed>(())
        };
        let outcome = (|| {
            measure("nix-hash", side.applet("nix-hash", [word("--type"), word("sha256"), sparse.clone().into()]))?;
            let mut dump = side.job([word("--dump"), sparse.clone().into()]);
            dump.stdout = Some(stream.clone());
            measure("--dump", dump)?;
            let restored = disk.join("restored");
            let mut restore = side.job([word("--restore"), restored.clone().into()]);
            restore.stdin = Some(stream.clone());
            measure("--restore", restore)?;
            remove(&restored);
            std::fs::remove_file(&stream)?;
            measure("--add", side.job([word("--add"), sparse.clone().into()]))?;
            let path = side.job([word("--add"), sparse.clone().into()]).output()?;
            let path = String::from_utf8_lossy(&path).trim().to_owned();
            measure("--verify", side.job(["--verify", "--check-contents"]))?;
            let mut export = side.job(["--export", &path]);
            export.stdout = Some(stream.clone());
            measure("--export", export)?;
            side.job(["--delete", &path]).output()?;
            let mut import = side.job(["--import"]);
            import.stdin = Some(stream.clone());
            measure("--import", import)
        })();
        remove(&disk);
        outcome
    }

    fn start_up(&mut self) -> Result<(), Failed> {
        let goal = Goal { cpu: Some(1.0 / 6.0), wall: None, peak_mib: Some(12.0) };
        self.row("start-up: --version", goal, &|side| side.job(["--version"]), None)?;
        let file = self.work.join("hello.txt");
        std::fs::write(&file, "hello\n")?;
        for side in self.sides() {
            side.job([OsString::from("--add"), file.clone().into()]).output()?;
        }
        let sides = self.sides();
        let paths: Vec<(PathBuf, String)> = sides
            .iter()
            .map(|side| {
                let path = side.job([OsString::from("--add"), file.clone().into()]).output()?;
                Ok((side.dir.clone(), String::from_utf8_lossy(&path).trim().to_owned()))
            })
            .collect::<Result<_, Failed>>()?;
        let of =
            |side: &Side| paths.iter().find(|(dir, _)| *dir == side.dir).map(|(_, p)| p.clone()).unwrap_or_default();
        self.row("start-up: -q --hash P", goal, &|side| side.job(["-q".to_owned(), "--hash".into(), of(side)]), None)
    }

    fn sides(&self) -> Vec<Side> {
        self.nix.iter().chain([&self.larder]).cloned().collect()
    }

    fn trees(&mut self) -> Result<(), Failed> {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let small = self.work.join("small");
        let big = self.work.join("big");
        for n in 0..10_000usize {
            let folder = small.join(format!("d{:02}", n / 100));
            std::fs::create_dir_all(&folder)?;
            let len = 64 + random.below(4000);
            let bytes: Vec<u8> = (0..len).map(|_| random.next().to_le_bytes()[0]).collect();
            std::fs::write(folder.join(format!("file{n}")), bytes)?;
        }
        std::fs::create_dir_all(&big)?;
        for n in 0..16 {
            let mut bytes = Vec::with_capacity(10_000_000);
            while bytes.len() < 10_000_000 {
                bytes.extend_from_slice(&random.next().to_le_bytes());
            }
            std::fs::write(big.join(format!("blob{n}")), bytes)?;
        }
        let fresh: Reset<'_> = Some(&fresh_store);
        let better = Goal { cpu: Some(1.0), wall: Some(1.0 / 1.3), peak_mib: Some(64.0) };
        for (name, tree) in [("10k small files", &small), ("160 MB", &big)] {
            let add = Goal { cpu: Some(1.0 / 1.3), wall: None, peak_mib: Some(64.0) };
            let word = |s: &str| OsString::from(s);
            self.row(&format!("--add of {name}"), add, &|side| side.job([word("--add"), tree.into()]), fresh)?;
            self.row(&format!("--dump of {name}"), better, &|side| side.job([word("--dump"), tree.into()]), None)?;
            self.row(
                &format!("nix-hash sha256 of {name}"),
                better,
                &|side| side.applet("nix-hash", [word("--type"), word("sha256"), tree.into()]),
                None,
            )?;
            let nar = self.work.join("tree.nar");
            let mut job = self.larder.job([word("--dump"), tree.into()]);
            job.stdout = Some(nar.clone());
            job.cost(1)?;
            let target = self.work.join("restored");
            let gone = |_: &Side| {
                remove(&target);
                Ok(())
            };
            let restore = |side: &Side| {
                let mut job = side.job([word("--restore"), target.clone().into()]);
                job.stdin = Some(nar.clone());
                job
            };
            self.row(&format!("--restore of {name}"), better, &restore, Some(&gone))?;
            remove(&target);
            self.moves(name, tree, better, fresh)?;
        }
        remove(&small);
        remove(&big);
        Ok(())
    }

    /// Export, import and verify of a store that holds one tree.
    fn moves(&mut self, name: &str, tree: &Path, better: Goal, fresh: Reset<'_>) -> Result<(), Failed> {
        let mut added = Vec::new();
        for side in self.sides() {
            fresh_store(&side)?;
            let path = side.job([OsString::from("--add"), tree.into()]).output()?;
            let path = String::from_utf8_lossy(&path).trim().to_owned();
            let stream = side.dir.with_extension("export");
            let mut job = side.job(["--export", &path]);
            job.stdout = Some(stream.clone());
            job.cost(1)?;
            added.push((side.dir.clone(), path, stream));
        }
        let of = |side: &Side| added.iter().find(|(dir, ..)| *dir == side.dir).cloned().unwrap_or_default();
        self.row(&format!("--export of {name}"), better, &|side| side.job(["--export".to_owned(), of(side).1]), None)?;
        let verify = Goal { cpu: Some(1.0), wall: None, peak_mib: None };
        self.row(
            &format!("--verify --check-contents, {name}"),
            verify,
            &|side| side.job(["--verify", "--check-contents"]),
            None,
        )?;
        let import = |side: &Side| {
            let mut job = side.job(["--import"]);
            job.stdin = Some(of(side).2);
            job
        };
        self.row(&format!("--import of {name}"), better, &import, fresh)?;
        if name == "160 MB" {
            self.verify_many()?;
        }
        for (.., stream) in added {
            let _ = std::fs::remove_file(stream);
        }
        Ok(())
    }

    /// Verification of many paths has both cores at work.
    fn verify_many(&mut self) -> Result<(), Failed> {
        let name = "--verify --check-contents, 200 paths of 1 MB";
        if !self.wanted(name) {
            return Ok(());
        }
        let mut random = Random(77);
        let folder = self.work.join("many");
        std::fs::create_dir_all(&folder)?;
        let mut files = Vec::new();
        for n in 0..200 {
            let mut bytes = Vec::with_capacity(1_000_000);
            while bytes.len() < 1_000_000 {
                bytes.extend_from_slice(&random.next().to_le_bytes());
            }
            let file = folder.join(format!("file{n}"));
            std::fs::write(&file, bytes)?;
            files.push(OsString::from(file));
        }
        for side in self.sides() {
            remove(&side.dir);
            side.job([OsString::from("--add")].into_iter().chain(files.clone())).output()?;
        }
        let goal = Goal { cpu: Some(1.0), wall: Some(1.0 / 1.7), peak_mib: None };
        self.row(name, goal, &|side| side.job(["--verify", "--check-contents"]), None)?;
        remove(&folder);
        Ok(())
    }

    fn ledger(&mut self) -> Result<(), Failed> {
        let names = [
            "--load-db of 100k",
            "-qR of 20k paths",
            "--referrers of 25k",
            "-q --hash of 10k paths",
            "--dump-db of 100k",
            "--load-db of 1M",
        ];
        if !names.iter().any(|name| self.wanted(name)) {
            return Ok(());
        }
        let fresh: Reset<'_> = Some(&fresh_store);
        let mut graphs = Vec::new();
        for side in self.sides() {
            let file = side.dir.with_extension("dump");
            let graph = write_registrations(&file, &side.store_dir(), 100_000)?;
            graphs.push((side.dir.clone(), file, graph));
        }
        let of = |side: &Side| graphs.iter().find(|(dir, ..)| *dir == side.dir).expect("made for each side");
        let load = |side: &Side| {
            let mut job = side.job(["--load-db"]);
            job.stdin = Some(of(side).1.clone());
            job
        };
        let goal = Goal { cpu: Some(1.0 / 5.0), wall: None, peak_mib: Some(150.0) };
        self.row("--load-db of 100k", goal, &load, fresh)?;
        for side in self.sides() {
            fresh_store(&side)?;
            load(&side).output()?;
        }
        let twentieth = cpu(1.0 / 20.0);
        let query = |side: &Side, words: &[&str], paths: &[String]| {
            side.job(words.iter().map(|w| (*w).to_owned()).chain(paths.iter().cloned()))
        };
        self.row("-qR of 20k paths", twentieth, &|side| query(side, &["-qR"], &of(side).2.closure_of_20k), None)?;
        self.row("--referrers of 25k", twentieth, &|side| query(side, &["-q", "--referrers"], &of(side).2.hub), None)?;
        self.row(
            "-q --hash of 10k paths",
            twentieth,
            &|side| query(side, &["-q", "--hash"], &of(side).2.ten_thousand),
            None,
        )?;
        self.row("--dump-db of 100k", twentieth, &|side| query(side, &["--dump-db"], &[]), None)?;
        let sizes: Vec<(u64, bool)> = self
            .sides()
            .iter()
            .map(|side| (folder_size(&side.dir.join("var/db")), side.dir == self.larder.dir))
            .collect();
        for (size, ours) in sizes {
            let who = if ours { "Larder" } else { "real Nix" };
            say(&format!(
                "  ledger of 100k paths, {who}: {:.1} MiB (goal: 1.5 times real Nix's)",
                size as f64 / 1_048_576.0
            ));
        }
        if self.wanted("--load-db of 1M") {
            let side = self.larder.clone();
            let file = self.work.join("million.dump");
            write_registrations(&file, &side.store_dir(), 1_000_000)?;
            fresh_store(&side)?;
            let mut job = side.job(["--load-db"]);
            job.stdin = Some(file.clone());
            let cost = job.cost(1)?;
            say(&format!(
                "--load-db of 1M paths, 6.9M references: {:.1} s CPU, {:.1} s wall, {:.0} MiB peak, ledger {:.1} MiB (goal: 60 s CPU)",
                cost.cpu_s,
                cost.wall_s,
                cost.peak_mib,
                folder_size(&side.dir.join("var/db")) as f64 / 1_048_576.0
            ));
            let _ = std::fs::remove_file(file);
        }
        Ok(())
    }
}

/// Bytes in a folder, without the reserve that both programs keep there.
fn folder_size(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|e| e.file_name() != "reserved").filter_map(|e| Some(e.metadata().ok()?.len())).sum()
}

/// Paths of a made-up ledger that the queries use.
#[derive(Debug, Clone, Default)]
struct Registered {
    closure_of_20k: Vec<String>,
    hub: Vec<String>,
    ten_thousand: Vec<String>,
    paths: Vec<String>,
}

/// Writes `count` registrations with 6.9 references each: a quarter refers to one hub, and one
/// path's closure has 20,000 members.
fn write_registrations(file: &Path, store: &Path, count: usize) -> Result<Registered, Failed> {
    const DIGITS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";
    let mut random = Random(0x0123_4567_89ab_cdef);
    let mut paths: Vec<String> = Vec::with_capacity(count);
    for n in 0..count {
        let mut path = format!("{}/", store.display());
        for _ in 0..32 {
            path.push(char::from(DIGITS[random.below(32)]));
        }
        let _ = write!(path, "-package-{}.{}", n % 977, n);
        paths.push(path);
    }
    let mut out = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(file)?);
    let closure = 20_000.min(count);
    let hub = closure; // just outside of the closure
    for (n, path) in paths.iter().enumerate() {
        let mut refs: Vec<&String> = Vec::new();
        if n > 0 && n < closure {
            // The previous one, and some before it: the last one's closure is all of them.
            refs.push(&paths[n - 1]);
            refs.extend((0..6).map(|_| &paths[random.below(n)]));
        } else if n > hub {
            refs.extend((0..6).map(|_| &paths[closure + random.below(n - closure)]));
            if n % 3 == 0 && n / 3 < 25_000 + hub {
                refs.push(&paths[hub]);
            }
            if n % 10 != 0 {
                refs.push(path);
            }
        }
        refs.sort();
        refs.dedup();
        writeln!(out, "{path}\n{:064x}\n{}\n\n{}", random.next(), 1000 + random.below(1_000_000), refs.len())?;
        for reference in refs {
            writeln!(out, "{reference}")?;
        }
    }
    out.flush()?;
    Ok(Registered {
        closure_of_20k: paths.get(closure - 1).into_iter().cloned().collect(),
        hub: paths.get(hub).into_iter().cloned().collect(),
        ten_thousand: paths.iter().step_by(count / 10_000).take(10_000).cloned().collect(),
        paths,
    })
}
