//! The daemon: what a connection costs, what a query costs, and what going through it adds.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use super::building::configured;
use super::garbage::copy;
use super::place::Place;
use super::{Bench, ROUNDS, Random, fresh_store, remove, write_registrations};
use crate::run::{Cost, Failed, Job, Side, median, resident_mib, say, tree_cpu_s};

/// Connections that are made for one figure, and paths that are asked for on one of them.
const CONNECTIONS: u32 = 200;
const QUERIES: usize = 10_000;
/// Members of the closure.
const CLOSURE: usize = 5_000;

/// A daemon of one side, until dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(side: &Side) -> Result<Self, Failed> {
        let socket = side.dir.join("socket");
        let mut job = configured(side, side.applet("nix-daemon", Vec::<String>::new()), false);
        job.env.push(("NIX_DAEMON_SOCKET_PATH".into(), socket.display().to_string()));
        let server = Self { child: job.spawn()?, socket };
        let since = Instant::now();
        while UnixStream::connect(&server.socket).is_err() {
            if since.elapsed() > Duration::from_secs(20) {
                return Err(Failed(format!("{} does not listen", job.program.display())));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// The same command as a client of this daemon.
    fn client(&self, mut job: Job) -> Job {
        for (name, value) in &mut job.env {
            if name == "NIX_REMOTE" {
                *value = format!("unix://{}", self.socket.display());
            }
        }
        job
    }

    /// CPU time of the daemon and of all that it has started.
    fn cpu_s(&self) -> f64 {
        tree_cpu_s(self.child.id())
    }

    /// What `job` costs the daemon.
    fn cost_of(&self, job: &Job, times: u32) -> Result<f64, Failed> {
        let before = self.cpu_s();
        job.cost(times)?;
        // A process of its own for each connection, as real Nix has it, is waited for a little later.
        std::thread::sleep(Duration::from_millis(100));
        Ok((self.cpu_s() - before) / f64::from(times))
    }

    /// What `job` costs itself and the daemon.
    fn whole_cost(&self, job: &Job) -> Result<Cost, Failed> {
        let before = self.cpu_s();
        let cost = job.cost(1)?;
        std::thread::sleep(Duration::from_millis(50));
        Ok(Cost { cpu_s: cost.cpu_s + self.cpu_s() - before, ..cost })
    }
}

/// A file of so many bytes, rounded up to whole blocks, that nothing can make smaller.
fn random_file(file: &Path, bytes: usize) -> Result<(), Failed> {
    let mut random = Random(11);
    let mut out = std::fs::File::create(file)?;
    let mut block = vec![0; 1 << 20];
    for _ in 0..bytes.div_ceil(block.len()) {
        block.chunks_exact_mut(8).for_each(|piece| piece.copy_from_slice(&random.next().to_le_bytes()));
        out.write_all(&block)?;
    }
    Ok(())
}

/// A line of the table, and whether the figure is small enough.
fn line(name: &str, figures: &str, x: f64, most: f64) -> bool {
    let verdict = if x <= most { "reached" } else { "MISSED" };
    say(&format!("{name:<44} {figures}  x {x:.3} (goal: {most:.3}) {verdict}"));
    x <= most
}

impl Bench {
    pub(super) fn daemon(&mut self) -> Result<(), Failed> {
        if self.wanted("daemon: queries") {
            self.daemon_queries()?;
        }
        if self.wanted("daemon: transfer") {
            self.daemon_transfer()?;
        }
        if self.wanted("daemon: builds") {
            self.daemon_builds()?;
        }
        Ok(())
    }

    fn judge(&mut self, reached: bool) {
        self.failures += u32::from(!reached);
    }

    /// The CPU time of both daemons for the same client, the installed one; of a closure with the client
    /// that belongs to each.
    fn daemon_queries(&mut self) -> Result<(), Failed> {
        let mut figures: Vec<(f64, f64, f64)> = Vec::new();
        for side in self.sides() {
            fresh_store(&side)?;
            let file = side.dir.with_extension("dump");
            let paths = write_registrations(&file, &side.store_dir(), QUERIES)?.paths;
            let mut load = side.job(["--load-db"]);
            load.stdin = Some(file.clone());
            load.cost(1)?;
            std::fs::remove_file(file)?;
            let server = Server::start(&side)?;
            let ask = |words: &[&str], paths: &[String]| {
                let mut job = side.job(words.iter().map(|word| (*word).to_owned()).chain(paths.iter().cloned()));
                if let Some(nix) = &self.nix {
                    job.program.clone_from(&nix.program);
                    job.args.retain(|word| word != "nix-store");
                }
                server.client(job)
            };
            let one = ask(&["-q", "--hash"], &paths[..1]);
            let many = ask(&["-q", "--hash"], &paths);
            let top = paths.get(CLOSURE - 1).cloned().unwrap_or_default();
            let closure = server.client(side.job(["-qR".to_owned(), top]));
            for job in [&one, &many, &closure] {
                server.whole_cost(job)?;
            }
            if side.dir == self.larder.dir {
                let rss = resident_mib(server.child.id());
                let reached = rss <= 15.0;
                say(&format!(
                    "daemon: memory after {QUERIES} queries: {rss:.1} MiB (goal: 15) {}",
                    if reached { "reached" } else { "MISSED" }
                ));
                self.failures += u32::from(!reached);
            }
            let mut of: [Vec<f64>; 3] = Default::default();
            for _ in 0..ROUNDS.start {
                let connection = server.cost_of(&one, CONNECTIONS)?;
                of[0].push(connection);
                // Three times, for the clock.
                of[1].push((server.cost_of(&many, 3)? - connection) / QUERIES as f64);
                let mut whole = 0.0;
                for _ in 0..5 {
                    whole += server.whole_cost(&closure)?.cpu_s / 5.0;
                }
                of[2].push(whole);
            }
            let [connections, queries, closures] = of.map(median);
            figures.push((connections, queries, closures));
        }
        let (Some(ours), Some(theirs)) = (figures.pop(), figures.pop()) else {
            say("daemon: no real Nix to compare with");
            return Ok(());
        };
        for (name, unit, scale, ours, theirs, most) in [
            ("daemon: a connection with one query", "ms", 1e3, ours.0, theirs.0, 1.0 / 30.0),
            ("daemon: a query on an open connection", "us", 1e6, ours.1, theirs.1, 1.0 / 2.0),
            ("daemon: -qR of 5k paths, with the client", "ms", 1e3, ours.2, theirs.2, 1.0 / 8.0),
        ] {
            let text = format!("{:>9.3} {:>9.3} {unit} CPU", theirs * scale, ours * scale);
            let reached = line(name, &text, ours / theirs, most);
            self.judge(reached);
        }
        Ok(())
    }

    /// An object of 1 GiB, exported by the daemon and without it.
    fn daemon_transfer(&mut self) -> Result<(), Failed> {
        let side = self.larder.clone();
        fresh_store(&side)?;
        let large = self.work.join("large");
        random_file(&large, 1 << 30)?;
        let path = String::from_utf8_lossy(&side.job(["--add".into(), large.clone().into_os_string()]).output()?)
            .trim_end()
            .to_owned();
        std::fs::remove_file(large)?;
        let server = Server::start(&side)?;
        let direct = side.job(["--export", &path]);
        let through = server.client(direct.clone());
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS.start {
            without.push(direct.cost(1)?);
            with.push(server.whole_cost(&through)?);
        }
        self.conclude("daemon: transfer of 1 GiB", &without, &with, 1.15);
        remove(&side.dir);
        Ok(())
    }

    /// 300 small builds, by the daemon and without it.
    fn daemon_builds(&mut self) -> Result<(), Failed> {
        let place = Place::new("daemon")?;
        self.daemon_builds_on(&place.dir)
    }

    fn daemon_builds_on(&mut self, disk: &Path) -> Result<(), Failed> {
        let side = Side::larder(&self.larder.program, &disk.join("larder"));
        let recipes = disk.join("recipes");
        std::fs::create_dir_all(&recipes)?;
        let files: Vec<PathBuf> =
            (0..300).map(|n| super::building::write(&recipes, &format!("small{n}"), &[])).collect::<Result<_, _>>()?;
        fresh_store(&side)?;
        let mut add = side.job(Vec::<String>::new());
        add.args = ["derivation", "add"].iter().map(Into::into).chain(files.iter().map(Into::into)).collect();
        let paths: Vec<String> = String::from_utf8_lossy(&add.output()?).lines().map(str::to_owned).collect();
        let saved = side.dir.with_extension("saved");
        copy(&side.dir, &saved)?;
        let words = ["-r", "-j2", "--quiet", "--quiet"].map(str::to_owned);
        let direct = configured(&side, side.job(words.into_iter().chain(paths)), false);
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS.start {
            for through in [false, true] {
                remove(&side.dir);
                copy(&saved, &side.dir)?;
                if through {
                    let server = Server::start(&side)?;
                    with.push(server.whole_cost(&server.client(direct.clone()))?);
                } else {
                    without.push(direct.cost(1)?);
                }
            }
        }
        self.conclude("daemon: builds of 300 derivations", &without, &with, 1.1);
        Ok(())
    }

    fn conclude(&mut self, name: &str, without: &[Cost], with: &[Cost], most: f64) {
        let pick = |costs: &[Cost], f: fn(&Cost) -> f64| median(costs.iter().map(f).collect());
        for (what, f) in [("CPU", (|c: &Cost| c.cpu_s) as fn(&Cost) -> f64), ("wall", |c: &Cost| c.wall_s)] {
            let (direct, through) = (pick(without, f), pick(with, f));
            let reached = line(name, &format!("{direct:>9.3} {through:>9.3} s {what}"), through / direct, most);
            self.judge(reached);
        }
    }
}
