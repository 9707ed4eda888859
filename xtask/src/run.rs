//! Running programs: with what they cost, and what they say.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike as _};
use nix::time::ClockId;
use nix::unistd::Pid;

/// Why a chore failed.
#[derive(Debug)]
pub(crate) struct Failed(pub(crate) String);

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Self(e.to_string())
    }
}

#[expect(clippy::print_stdout, reason = "a chore's output")]
pub(crate) fn say(text: &str) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "a chore's output")]
pub(crate) fn complain(text: &str) {
    eprintln!("xtask: {text}");
}

/// The folder of the workspace.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}

pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What `cargo run` set for this program is not for the next cargo.
    command.args(args).current_dir(root()).env_remove("CARGO_MANIFEST_DIR").env_remove("CARGO_PKG_NAME");
    command
}

/// Says what it runs, runs it, and wants success.
pub(crate) fn step(command: &mut Command) -> Result<(), Failed> {
    say(&format!("$ {}", shown(command)));
    let status = command.status().map_err(|e| Failed(format!("{}: {e}", shown(command))))?;
    if status.success() { Ok(()) } else { Err(Failed(format!("{} ended with {status}", shown(command)))) }
}

fn shown(command: &Command) -> String {
    let words: Vec<_> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

/// The release build of the program, made now; or the program that `LARDER_PROGRAM` names.
pub(crate) fn release_binary() -> Result<PathBuf, Failed> {
    if let Some(program) = std::env::var_os("LARDER_PROGRAM") {
        return Ok(std::path::absolute(program)?);
    }
    step(&mut cargo(&["build", "--release", "--package", "larder"]))?;
    newest("release/larder")
}

/// What was built last under a name, for whatever machine.
pub(crate) fn newest(name: &str) -> Result<PathBuf, Failed> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    let folders = std::fs::read_dir(&target)?.filter_map(|e| Some(e.ok()?.path().join(name)));
    folders
        .chain([target.join(name)])
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
        .ok_or_else(|| Failed(format!("no {name} below {}", target.display())))
}

/// What one run cost.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) cpu_s: f64,
    pub(crate) wall_s: f64,
    /// Peak resident memory in MiB, as last seen before the end; 0 where the run was too short to look.
    pub(crate) peak_mib: f64,
}

/// User and system time of all children that ended so far, in seconds.
fn children_cpu_s() -> f64 {
    let seconds = |time: TimeVal| Duration::from_micros(time.num_microseconds().unsigned_abs()).as_secs_f64();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("every process may ask this");
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// CPU time of a process, of all that have come from it and run, and of those that ended and were
/// waited for by one of these, in seconds. Those that ended are known to a hundredth of a second only.
pub(crate) fn tree_cpu_s(pid: u32) -> f64 {
    let clock = i32::try_from(pid).ok().and_then(|pid| ClockId::pid_cpu_clock_id(Pid::from_raw(pid)).ok());
    let own = clock.and_then(|clock| clock.now().ok()).map_or(0.0, |time| Duration::from(time).as_secs_f64());
    let mut all = own + ticks(&pid.to_string(), 13, 2);
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        all += children.split_whitespace().filter_map(|child| child.parse().ok()).map(tree_cpu_s).sum::<f64>();
    }
    all
}

/// Some figures of `/proc/PID/stat`, counted behind the name, as seconds.
fn ticks(process: &str, first: usize, count: usize) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let after_name = text.rsplit(')').next().unwrap_or_default();
    let all = after_name.split_whitespace().skip(first).take(count);
    all.filter_map(|n| n.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// Resident memory of a process in MiB.
pub(crate) fn resident_mib(pid: u32) -> f64 {
    status_mib(pid, "VmRSS:")
}

fn peak_mib(pid: u32) -> f64 {
    status_mib(pid, "VmHWM:")
}

fn status_mib(pid: u32, name: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()).map_or(0.0, |kib| kib / 1024.0)
}

/// A command to measure: program, arguments, environment, and a file to read from.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<std::ffi::OsString>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) stdin: Option<PathBuf>,
    pub(crate) stdout: Option<PathBuf>,
}

impl Job {
    fn command(&self) -> Result<Command, Failed> {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.env.iter().map(|(k, v)| (k, v))).stderr(Stdio::null());
        command.stdin(match &self.stdin {
            Some(file) => Stdio::from(File::open(file)?),
            None => Stdio::null(),
        });
        command.stdout(match &self.stdout {
            Some(file) => Stdio::from(File::create(file)?),
            None => Stdio::null(),
        });
        Ok(command)
    }

    /// Starts it.
    pub(crate) fn spawn(&self) -> Result<std::process::Child, Failed> {
        self.command()?.spawn().map_err(|e| Failed(format!("{}: {e}", self.program.display())))
    }

    /// Runs it `times` times in a row; the cost is that of one.
    pub(crate) fn cost(&self, times: u32) -> Result<Cost, Failed> {
        let (cpu, begun) = (children_cpu_s(), Instant::now());
        let mut peak: f64 = 0.0;
        for _ in 0..times {
            let mut child = self.spawn()?;
            let status = if times == 1 {
                loop {
                    peak = peak.max(peak_mib(child.id()));
                    if let Some(status) = child.try_wait()? {
                        break status;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            } else {
                child.wait()?
            };
            if !status.success() {
                return Err(Failed(format!("{} {:?} ended with {status}", self.program.display(), self.args.first())));
            }
        }
        let n = f64::from(times);
        Ok(Cost { cpu_s: (children_cpu_s() - cpu) / n, wall_s: begun.elapsed().as_secs_f64() / n, peak_mib: peak })
    }

    /// Runs it once and gives what it printed.
    pub(crate) fn output(&self) -> Result<Vec<u8>, Failed> {
        let mut command = self.command()?;
        let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let mut shown = shown(&command);
        if let Some((at, _)) = shown.char_indices().nth(200) {
            shown.truncate(at);
            shown += "...";
        }
        Err(Failed(format!("{shown} ended with {}: {said}", output.status)))
    }
}

pub(crate) fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(0.0)
}

/// Two programs to compare: real Nix and Larder, each with a store of its own below `dir`.
#[derive(Debug, Clone)]
pub(crate) struct Side {
    pub(crate) program: PathBuf,
    pub(crate) dir: PathBuf,
    first_args: Vec<std::ffi::OsString>,
}

impl Side {
    /// Larder takes the applet's name as its first word.
    pub(crate) fn larder(program: &Path, dir: &Path) -> Self {
        Self { program: program.to_owned(), dir: dir.to_owned(), first_args: vec!["nix-store".into()] }
    }

    pub(crate) fn nix(program: &Path, dir: &Path) -> Self {
        Self { program: program.to_owned(), dir: dir.to_owned(), first_args: Vec::new() }
    }

    pub(crate) fn store_dir(&self) -> PathBuf {
        self.dir.join("store")
    }

    pub(crate) fn job<I: IntoIterator<Item: Into<std::ffi::OsString>>>(&self, args: I) -> Job {
        let folder = |name: &str| self.dir.join(name).display().to_string();
        let mut all = self.first_args.clone();
        all.extend(args.into_iter().map(Into::into));
        Job {
            program: self.program.clone(),
            args: all,
            env: vec![
                ("NIX_STORE_DIR".into(), folder("store")),
                ("NIX_STATE_DIR".into(), folder("var")),
                ("NIX_LOG_DIR".into(), folder("log")),
                ("NIX_CONF_DIR".into(), folder("etc")),
                ("NIX_USER_CONF_FILES".into(), String::new()),
                ("NIX_REMOTE".into(), String::new()),
            ],
            stdin: None,
            stdout: None,
        }
    }

    /// The same with another applet.
    pub(crate) fn applet<I: IntoIterator<Item: Into<std::ffi::OsString>>>(&self, name: &str, args: I) -> Job {
        let mut job = self.job(args);
        if let Some(first) = self.first_args.first() {
            debug_assert_eq!(job.args.first(), Some(first));
            job.args.splice(..1, [name.into()]);
        } else {
            job.program = job.program.with_file_name(name);
        }
        job
    }
}

/// Where the installed `nix-store` of real Nix is, if it is.
pub(crate) fn real_nix() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join("nix-store")).find(|file| {
        file.is_file()
            && Command::new(file).arg("--version").output().is_ok_and(|out| {
                // Ours says its own name on the second line.
                !String::from_utf8_lossy(&out.stdout).contains("larder")
            })
    })
}
