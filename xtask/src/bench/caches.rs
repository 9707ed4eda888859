//! Binary caches: many small paths behind a slow server, much data, and serving a store.

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::garbage::DIGITS;
use super::{Bench, Goal, Random, fresh_store, remove};
use crate::run::{Cost, Failed, Job, Side, cargo, median, newest, say, step};

/// Small paths of the closure, and the archives of one GiB.
const SMALL: usize = 1000;
const LARGE: usize = 40;

/// Rounds of each measurement.
const ROUNDS: usize = 3;

/// What is asked of a server of narinfo files: so often a second, for so many seconds, by so many.
const ASKED_PER_S: u32 = 1000;
const ASKED_FOR_S: u32 = 5;
const ASKERS: u32 = 4;

/// A cache that was written for the store directory of one side.
struct Cache {
    folder: PathBuf,
    /// The path whose closure it holds.
    top: String,
    paths: Vec<String>,
    key: String,
}

/// A server of a folder, each answer after some time; gone when dropped.
struct Slow {
    child: Child,
    url: String,
    said: BufReader<std::process::ChildStdout>,
}

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Slow {
    fn start(mut command: Command) -> Result<Self, Failed> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let out = child.stdout.take().ok_or_else(|| Failed("the server has no output".to_owned()))?;
        let mut slow = Self { child, url: String::new(), said: BufReader::new(out) };
        slow.url = slow.line()?;
        Ok(slow)
    }

    fn line(&mut self) -> Result<String, Failed> {
        let mut line = String::new();
        self.said.read_line(&mut line)?;
        if line.is_empty() { Err(Failed("the server has ended".to_owned())) } else { Ok(line.trim_end().to_owned()) }
    }

    /// Requests since the start, and the most connections that were open at once.
    fn counts(&mut self) -> Result<(u64, u64), Failed> {
        if let Some(input) = &mut self.child.stdin {
            input.write_all(b"\n")?;
        }
        let line = self.line()?;
        let mut numbers = line.split(' ').filter_map(|word| word.parse().ok());
        Ok((numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)))
    }
}

/// What fetching a closure cost, and what was asked for it.
#[derive(Clone, Copy)]
struct Fetched {
    cost: Cost,
    requests: u64,
    open: u64,
}

fn put_str(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// An object of an export stream: a regular file.
fn put_object(out: &mut Vec<u8>, path: &str, contents: &[u8], references: &[&String]) {
    out.extend_from_slice(&1u64.to_le_bytes());
    for word in [&b"nix-archive-1"[..], b"(", b"type", b"regular", b"contents", contents, b")"] {
        put_str(out, word);
    }
    out.extend_from_slice(&0x4558_494e_u64.to_le_bytes());
    put_str(out, path.as_bytes());
    out.extend_from_slice(&(references.len() as u64).to_le_bytes());
    for reference in references {
        put_str(out, reference.as_bytes());
    }
    put_str(out, b"");
    out.extend_from_slice(&0u64.to_le_bytes());
}

/// Bytes of which zstd saves about a half.
fn contents(random: &mut Random, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 16);
    while bytes.len() < length {
        let word = random.next().to_le_bytes();
        bytes.extend_from_slice(&word);
        bytes.extend_from_slice(&word);
    }
    bytes.truncate(length);
    bytes
}

impl Bench {
    pub(super) fn caches(&mut self) -> Result<(), Failed> {
        let small = ["cache: 1,000 paths at 20 ms", "cache: 1,000 paths at 100 ms"];
        let (large, serving) = ("cache: 1 GiB in 40 NARs", "serve: narinfo, NARs");
        if small.iter().any(|name| self.wanted(name)) || self.wanted(large) {
            let server = slow_cache()?;
            for (name, delay_ms) in small.into_iter().zip([20, 100]) {
                if self.wanted(name) {
                    self.closure_of_many(name, &server, delay_ms)?;
                }
            }
            if self.wanted(large) {
                self.one_gib(large, &server)?;
            }
        }
        if self.wanted(serving) {
            self.serving()?;
        }
        Ok(())
    }

    /// Larder with a store directory of a side and a ledger for this once.
    fn scribe(&self, side: &Side, words: &[&str]) -> Job {
        let mut job = side.job(words.iter().copied());
        let state = self.work.join("scribe");
        for (name, value) in &mut job.env {
            if name == "NIX_STATE_DIR" || name == "NIX_LOG_DIR" {
                *value = state.join(name.to_lowercase()).display().to_string();
            }
        }
        job.program.clone_from(&self.larder.program);
        job.args = words.iter().map(Into::into).collect();
        job
    }

    /// Writes a cache for a side: `count` objects of `length` bytes or less; each refers to two before
    /// it, so that the graph is ten levels deep, and the last to the later half.
    fn cache(&self, side: &Side, count: usize, length: usize) -> Result<Cache, Failed> {
        let mut random = Random(0x5851_f42d_4c95_7f2d);
        let folder = side.dir.with_extension("cache");
        remove(&folder);
        remove(&side.dir);
        remove(&self.work.join("scribe"));
        std::fs::create_dir_all(&side.dir)?;
        let mut paths: Vec<String> = Vec::with_capacity(count);
        let stream = self.work.join("stream");
        let mut out = std::fs::File::create(&stream)?;
        for n in 0..count {
            let mut path = format!("{}/", side.store_dir().display());
            (0..32).for_each(|_| path.push(char::from(DIGITS[random.below(32)])));
            let _ = write!(path, "-package-{n}");
            let before: Vec<usize> = if n + 1 == count { (count / 2..n).collect() } else { vec![n / 2, n / 3] };
            let mut references: Vec<&String> = before.into_iter().filter_map(|m| paths.get(m)).collect();
            references.sort();
            references.dedup();
            let mut object = Vec::new();
            let length = if length > 1 << 20 { length } else { 1 + random.below(length) };
            put_object(&mut object, &path, &contents(&mut random, length), &references);
            out.write_all(&object)?;
            paths.push(path);
        }
        out.write_all(&0u64.to_le_bytes())?;
        drop(out);
        let mut import = self.scribe(side, &["nix-store", "--import"]);
        import.stdin = Some(stream.clone());
        import.output()?;
        remove(&stream);
        let [secret, public] = ["secret", "public"].map(|name| self.work.join(name));
        if !secret.exists() {
            let (secret, public) = (secret.display().to_string(), public.display().to_string());
            let words = ["nix-store", "--generate-binary-cache-key", "bench-1", &secret, &public];
            self.scribe(side, &words).output()?;
        }
        let top = paths.last().cloned().unwrap_or_default();
        let uri = format!("file://{}?secret-key={}", folder.display(), secret.display());
        self.scribe(side, &["push", &uri, &top]).output()?;
        remove(&self.work.join("scribe"));
        remove(&side.dir);
        Ok(Cache { folder, top, paths, key: std::fs::read_to_string(public)?.trim().to_owned() })
    }

    /// A row of figures beside those of real Nix, and what was asked.
    fn tell(&mut self, name: &str, theirs: Option<&Fetched>, ours: &Fetched, goal: Goal, delay_ms: u32) {
        let cost = ours.cost;
        let ratio = |f: fn(&Cost) -> f64| theirs.map(|theirs| f(&cost) / f(&theirs.cost));
        let shown = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.3}"));
        let (cpu_x, wall_x) = (ratio(|c| c.cpu_s), ratio(|c| c.wall_s));
        let their_cpu = theirs.map_or_else(|| "-".to_owned(), |theirs| format!("{:.4}", theirs.cost.cpu_s));
        let mut missed = Vec::new();
        let mut wants = Vec::new();
        for (what, found, most) in
            [("cpu", cpu_x, goal.cpu), ("wall", wall_x, goal.wall), ("MiB", Some(cost.peak_mib), goal.peak_mib)]
        {
            if let Some(most) = most {
                wants.push(format!("{what} {most:.3}"));
                if found.is_some_and(|found| found > most) {
                    missed.push(what);
                }
            }
        }
        let verdict = if missed.is_empty() { "reached".to_owned() } else { format!("MISSED: {}", missed.join(", ")) };
        self.failures += u32::from(!missed.is_empty());
        say(&format!(
            "{name:<44} {their_cpu:>9} {:>9.4} {:>7} {:>7} {:>8.1}  {} {verdict}",
            cost.cpu_s,
            shown(cpu_x),
            shown(wall_x),
            cost.peak_mib,
            wants.join(", ")
        ));
        for (who, fetched) in [("real Nix", theirs), ("Larder", Some(ours))] {
            let Some(Fetched { cost, requests, open }) = fetched else { continue };
            let mut line = format!("  {who}: {:.2} s, {requests} requests, at most {open} at once", cost.wall_s);
            if delay_ms > 0 {
                let _ = write!(
                    line,
                    ", as long as {:.0} requests one after another",
                    cost.wall_s * 1000.0 / f64::from(delay_ms)
                );
            }
            say(&line);
        }
    }

    fn closure_of_many(&mut self, name: &str, server: &Path, delay_ms: u32) -> Result<(), Failed> {
        let slow = |folder: &Path, closure: Option<&Path>| {
            let mut command = Command::new(server);
            command.arg(folder).arg(delay_ms.to_string()).args(closure);
            command
        };
        let theirs = match self.nix.clone() {
            None => None,
            Some(nix) => {
                let cache = self.cache(&nix, SMALL, 4000)?;
                // As it is if nobody configures it, and as it is at its best. Time that is waiting is the
                // same in each round.
                let usual = fetch(&nix, &cache, 1, 1, || slow(&cache.folder, None))?;
                let best = fetch(&nix, &cache, 16, 1, || slow(&cache.folder, None))?;
                remove(&cache.folder);
                Some((usual, best))
            }
        };
        let larder = self.larder.clone();
        let cache = self.cache(&larder, SMALL, 4000)?;
        let (theirs, best) = (theirs.map(|(usual, _)| usual), theirs.map(|(_, best)| best));
        let ours = fetch(&larder, &cache, 1, ROUNDS, || slow(&cache.folder, None))?;
        let goal = Goal { cpu: Some(1.0 / 3.0), wall: Some(0.5), peak_mib: Some(100.0) };
        self.tell(name, theirs.as_ref(), &ours, goal, delay_ms);
        let answer = self.work.join("closure");
        std::fs::write(&answer, answer_of(&cache)?)?;
        let ours = fetch(&larder, &cache, 1, ROUNDS, || slow(&cache.folder, Some(&answer)))?;
        let goal = Goal { wall: Some(0.2), ..goal };
        self.tell(&format!("{name}, batched"), theirs.as_ref(), &ours, goal, delay_ms);
        if let Some(Fetched { cost, requests, open }) = best {
            let Cost { cpu_s, wall_s, .. } = cost;
            say(&format!(
                "  real Nix with max-jobs = 16: {cpu_s:.2} s CPU, {wall_s:.2} s, {requests} requests, at most {open} at once"
            ));
        }
        remove(&answer);
        remove(&cache.folder);
        remove(&larder.dir);
        Ok(())
    }

    fn one_gib(&mut self, name: &str, server: &Path) -> Result<(), Failed> {
        let quick = |folder: &Path| {
            let mut command = Command::new(server);
            command.arg(folder).arg("0");
            command
        };
        let length = (1 << 30) / LARGE;
        let theirs = match self.nix.clone() {
            None => None,
            Some(nix) => {
                let cache = self.cache(&nix, LARGE, length)?;
                let fetched = fetch(&nix, &cache, 16, ROUNDS, || quick(&cache.folder))?;
                remove(&cache.folder);
                remove(&nix.dir);
                Some(fetched)
            }
        };
        let larder = self.larder.clone();
        let cache = self.cache(&larder, LARGE, length)?;
        let ours = fetch(&larder, &cache, 16, ROUNDS, || quick(&cache.folder))?;
        remove(&larder.dir);
        let goal = Goal { cpu: None, wall: None, peak_mib: Some(100.0) };
        self.tell(name, theirs.as_ref(), &ours, goal, 0);
        // The same by hand: one archive after another.
        let slow = Slow::start(quick(&cache.folder))?;
        let mut script = String::from("set -e\n");
        for entry in std::fs::read_dir(cache.folder.join("nar"))? {
            let file = entry?.file_name().to_string_lossy().into_owned();
            let _ = writeln!(script, "curl -sf {}/nar/{file} | zstd -dc | openssl sha256", slow.url);
        }
        let program = PathBuf::from("/bin/sh");
        let args = vec!["-c".into(), script.into()];
        let by_hand = Job { program, args, env: Vec::new(), stdin: None, stdout: None };
        let has = |tool: &str| {
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|dir| dir.join(tool).is_file())
        };
        if ["curl", "zstd", "openssl"].into_iter().all(has) {
            let wall = median((0..ROUNDS).map(|_| Ok(by_hand.cost(1)?.wall_s)).collect::<Result<_, Failed>>()?);
            let fine = ours.cost.wall_s <= wall;
            self.failures += u32::from(!fine);
            let verdict = if fine { "reached" } else { "MISSED: wall" };
            say(&format!("  curl | zstd -d | openssl sha256: {wall:.2} s (goal: no longer than that) {verdict}"));
        } else {
            say("  curl, zstd or openssl is not here: no figure to compare with");
        }
        remove(&cache.folder);
        Ok(())
    }

    /// A store as a cache: how soon narinfo files come, and how fast archives.
    fn serving(&mut self) -> Result<(), Failed> {
        let larder = self.larder.clone();
        let start = |bench: &Self, cache: &Cache| {
            let _ = std::fs::remove_dir_all(larder.dir.join("home"));
            fresh_store(&larder)?;
            let mut fill = larder.job(["-r", &cache.top]);
            let config =
                format!("build-users-group =\nrequire-sigs = false\nsubstituters = file://{}", cache.folder.display());
            fill.env.push(("NIX_CONFIG".to_owned(), config));
            fill.output()?;
            let job = larder.job(Vec::<String>::new());
            let mut command = Command::new(&bench.larder.program);
            command.args(["serve", "--listen", "127.0.0.1:0", "--key"]).arg(bench.work.join("secret"));
            command.envs(job.env);
            Slow::start(command)
        };
        let cache = self.cache(&larder, SMALL, 4000)?;
        let server = start(self, &cache)?;
        let mut latencies = ask_often(&server.url, &cache.paths)?;
        latencies.sort_by(f64::total_cmp);
        let at = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize];
        let fine = at(0.99) < 1.0;
        self.failures += u32::from(!fine);
        say(&format!(
            "serve: {} narinfo files, {ASKED_PER_S} a second: median {:.3} ms, p99 {:.3} ms, longest {:.1} ms (goal: p99 1 ms) {}",
            latencies.len(),
            at(0.5),
            at(0.99),
            at(1.0),
            if fine { "reached" } else { "MISSED" }
        ));
        drop(server);
        remove(&cache.folder);
        let cache = self.cache(&larder, 4, 64 << 20)?;
        let server = start(self, &cache)?;
        let mut total = [0.0; 2];
        for path in &cache.paths {
            let narinfo = String::from_utf8_lossy(&get(&server.url, &format!("/{}.narinfo", hash_part(path)), "")?.1)
                .into_owned();
            let url = narinfo.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap_or_default().to_owned();
            for (seconds, more) in total.iter_mut().zip(["", "Accept-Encoding: zstd\r\n"]) {
                let begun = Instant::now();
                let address = server.url.trim_start_matches("http://");
                let came =
                    drain(address, &format!("GET /{url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n"))?;
                if more.is_empty() && came < 64 << 20 {
                    return Err(Failed(format!("of {url} came {came} bytes")));
                }
                *seconds += begun.elapsed().as_secs_f64();
            }
        }
        let (mut plain, mut zstd) = (0.0, Ok(0.0));
        for path in &cache.paths {
            plain += send_plainly(path)?;
            let packed = file_job("zstd", &["-3", "-c", "-q", path]).cost(1).map(|cost| cost.wall_s);
            zstd = zstd.and_then(|sum| packed.map(|s| sum + s));
        }
        let mb = (cache.paths.len() * (64 << 20)) as f64 / 1e6;
        say(&format!(
            "serve: NARs {:.0} MB/s (the files as they are, by reading and writing in one thread: {:.0}), \
             with zstd {:.0} MB/s (`zstd -3` {})",
            mb / total[0],
            mb / plain,
            mb / total[1],
            zstd.map_or_else(|_: Failed| "-".to_owned(), |s| format!("{:.0}", mb / s))
        ));
        drop(server);
        remove(&cache.folder);
        remove(&larder.dir);
        Ok(())
    }
}

fn file_job(program: &str, words: &[&str]) -> Job {
    let args = words.iter().map(Into::into).collect();
    Job { program: program.into(), args, env: Vec::new(), stdin: None, stdout: None }
}

/// The server that the crate of caches has for measurements, built now.
fn slow_cache() -> Result<PathBuf, Failed> {
    step(&mut cargo(&[
        "build",
        "--release",
        "--package",
        "larder-cache",
        "--example",
        "slow_cache",
        "--features",
        "testing",
    ]))?;
    newest("release/examples/slow_cache")
}

/// Fetches a closure into an empty store, from a server that was just started. Larder fetches as
/// many paths at once as `max-substitution-jobs` says; real Nix 2.8 as many as `max_jobs`.
fn fetch(
    side: &Side,
    cache: &Cache,
    max_jobs: u32,
    rounds: usize,
    server: impl Fn() -> Command,
) -> Result<Fetched, Failed> {
    let mut done: Vec<Fetched> = Vec::new();
    for _ in 0..rounds {
        fresh_store(side)?;
        let mut slow = Slow::start(server())?;
        let mut job = side.job(["-r", &cache.top]);
        let config = format!(
            "build-users-group =\nsubstituters = {}\ntrusted-public-keys = {}\nmax-jobs = {max_jobs}",
            slow.url, cache.key
        );
        job.env.push(("NIX_CONFIG".to_owned(), config));
        job.env.push(("HOME".to_owned(), side.dir.join("home").display().to_string()));
        job.env.push(("XDG_CACHE_HOME".to_owned(), side.dir.join("home/.cache").display().to_string()));
        let cost = job.cost(1)?;
        let (requests, open) = slow.counts()?;
        done.push(Fetched { cost, requests, open });
    }
    let pick = |f: fn(&Fetched) -> f64| median(done.iter().map(f).collect());
    let last = done[done.len() - 1];
    let cost = Cost {
        cpu_s: pick(|round| round.cost.cpu_s),
        wall_s: pick(|round| round.cost.wall_s),
        peak_mib: done.iter().map(|round| round.cost.peak_mib).fold(0.0, f64::max),
    };
    Ok(Fetched { cost, ..last })
}

/// All narinfo files of a cache as one answer; `docs/cache-protocol.md`.
fn answer_of(cache: &Cache) -> Result<Vec<u8>, Failed> {
    let mut answer = Vec::new();
    for path in &cache.paths {
        let part = hash_part(path);
        let text = std::fs::read(cache.folder.join(format!("{part}.narinfo")))?;
        answer.extend_from_slice(format!("{part} {}\n", text.len()).as_bytes());
        answer.extend_from_slice(&text);
    }
    answer.extend_from_slice(b"end\n");
    Ok(answer)
}

fn hash_part(path: &str) -> &str {
    path.rsplit('/').next().and_then(|name| name.get(..32)).unwrap_or_default()
}

/// Reads an answer whose length is said, or that comes in chunks until the connection ends.
fn get(url: &str, path: &str, more: &str) -> Result<(String, Vec<u8>), Failed> {
    let mut stream = TcpStream::connect(url.trim_start_matches("http://"))?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n");
    stream.write_all(request.as_bytes())?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all)?;
    let at = all.windows(4).position(|four| four == b"\r\n\r\n").map_or(all.len(), |at| at + 4);
    let body = all.split_off(at);
    let head = String::from_utf8_lossy(&all).into_owned();
    if head.starts_with("HTTP/1.1 200") { Ok((head, body)) } else { Err(Failed(format!("{path}: {head}"))) }
}

/// Sends a request and takes what comes until the connection ends; how many bytes that are.
fn drain(address: &str, request: &str) -> Result<u64, Failed> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(request.as_bytes())?;
    let (mut block, mut came) = (vec![0; 64 << 10], 0);
    loop {
        match stream.read(&mut block)? {
            0 => return Ok(came),
            n => came += n as u64,
        }
    }
}

/// How long it takes to send a file over a connection of this machine, in seconds.
fn send_plainly(file: &str) -> Result<f64, Failed> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?.to_string();
    let mut file = std::fs::File::open(file)?;
    let sender = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let mut block = vec![0; 64 << 10];
        loop {
            match file.read(&mut block)? {
                0 => return Ok::<(), std::io::Error>(()),
                n => stream.write_all(&block[..n])?,
            }
        }
    });
    let begun = Instant::now();
    drain(&address, "")?;
    let seconds = begun.elapsed().as_secs_f64();
    sender.join().map_err(|_| Failed("the sender panicked".to_owned()))??;
    Ok(seconds)
}

/// Asks for narinfo files at a steady pace, over connections that stay; how long each took after it
/// was due, in ms.
fn ask_often(url: &str, paths: &[String]) -> Result<Vec<f64>, Failed> {
    let address = url.trim_start_matches("http://");
    let begun = Instant::now() + Duration::from_millis(50);
    let ask = |asker: u32| {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        let (mut latencies, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        for number in (asker..ASKED_PER_S * ASKED_FOR_S).step_by(ASKERS as usize) {
            let due = begun + Duration::from_secs(1) * number / ASKED_PER_S;
            if let Some(early) = due.checked_duration_since(Instant::now()) {
                std::thread::sleep(early);
            }
            let path = &paths[number as usize % paths.len()];
            // Whoever sleeps is woken a little late, which is not the server's doing.
            let sent = Instant::now().max(due);
            write!(stream, "GET /{}.narinfo HTTP/1.1\r\nHost: x\r\n\r\n", hash_part(path))?;
            let mut length = 0;
            while !is_whole(&buffer[..length]) {
                match stream.read(&mut buffer[length..])? {
                    0 => return Err(Failed("the server has closed the connection".to_owned())),
                    n => length += n,
                }
            }
            latencies.push(sent.elapsed().as_secs_f64() * 1000.0);
        }
        Ok(latencies)
    };
    let all: Vec<Result<Vec<f64>, Failed>> = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..ASKERS).map(|asker| scope.spawn(move || ask(asker))).collect();
        askers
            .into_iter()
            .map(|asker| asker.join().unwrap_or_else(|_| Err(Failed("an asker panicked".to_owned()))))
            .collect()
    });
    Ok(all.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}

/// Has an answer come whole, as its length says?
fn is_whole(bytes: &[u8]) -> bool {
    let Some(at) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&bytes[..at]);
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse::<usize>().ok());
    length.is_some_and(|length| bytes.len() >= at + 4 + length)
}
