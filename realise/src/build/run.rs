//! Running one builder: its directory, its log, its limits, its end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, Instant};

use larder_core::derivation::{Kind, OutputName};
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_sandbox::launch::{Child, Ended, LaunchError, SETUP_TRACE, kill_user, launch};
use larder_store::adopt::Way;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::chroot::{self, Chroot};
use super::environment::{Given, Prepared, prepare};
use super::failure::signal_name;
use super::journal::Journal;
use super::outputs::{self, Left};
use super::tempdir::{Entry, Owner, TempDir};
use super::users::BuildUser;
use super::{Build, compare, graphs};
use crate::job::{Failure, FailureKind, Mode};
use crate::logs::{Form, LogWriter, Tail};

/// How often a builder that says nothing is looked at, for limits and cancelling.
const TICK: Duration = Duration::from_millis(200);

/// Less free space than this (bytes), and a full disk may be why a builder failed.
const FULL_BELOW_BYTES: u64 = 8 << 20;

/// Why there is no result.
pub(super) enum Stopped {
    Failed(Failure),
    /// The kernel allows no sandbox, for this reason.
    NoSandbox(String),
}

impl<E: Into<Failure>> From<E> for Stopped {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Builds, several times if `repeat` says so, and registers or compares the outputs.
pub(super) fn rounds(build: &mut Build<'_>, sandboxed: bool, user: Option<&BuildUser>) -> Result<Made, Stopped> {
    build.place(sandboxed)?;
    let result = rounds_placed(build, sandboxed, user);
    if !sandboxed {
        build.discard(result.is_err());
    }
    result
}

fn rounds_placed(build: &Build<'_>, sandboxed: bool, user: Option<&BuildUser>) -> Result<Made, Stopped> {
    let values = &build.settings.values;
    // What has a known hash, or is compared anyway, needs no second time.
    let repeats = if matches!(build.kind, Kind::Fixed | Kind::Impure) || build.job.mode == Mode::Check {
        0
    } else {
        values.repeat
    };
    let mut before = None;
    for _ in 0..repeats {
        before = Some(once(build, sandboxed, user, before.as_ref(), false)?);
        if !sandboxed {
            // Out of the way of the next builder, which may not be able to replace it.
            build.discard(true);
        }
    }
    once(build, sandboxed, user, before.as_ref(), true)
}

/// What a round made: hash and references of each output.
pub(super) type Made = BTreeMap<OutputName, larder_core::path_info::PathInfo>;

fn once(
    build: &Build<'_>,
    sandboxed: bool,
    user: Option<&BuildUser>,
    before: Option<&Made>,
    last: bool,
) -> Result<Made, Stopped> {
    let store = build.store;
    let values = &build.settings.values;
    let journal = Journal::begin(store.layout())?;
    if let Some(user) = user {
        journal.user(user.uid)?;
        // Whoever had this user before us.
        kill_all(build, user)?;
    }
    if !sandboxed {
        chroot::check_unsandboxed()?;
    }
    let owner = user.map(|user| Owner { uid: user.uid, gid: user.gid });
    let base = values.build_dir.get().map_or(build.settings.temp_dir.as_path(), |dir| dir.as_std_path());
    let drv_name = build.job.drv_path.name().as_str();
    let entry = if sandboxed { Entry::Bound } else { Entry::Path };
    let temp = TempDir::create(base, drv_name, owner, entry, &journal)?;
    let prepared = give(build, sandboxed, &temp)?;
    let chroot = if sandboxed { Some(Chroot::create(build, user, &journal)?) } else { None };
    let plan = chroot::plan(build, &prepared, &temp, user, chroot.as_ref())?;
    let mut log = Log::begin(build)?;
    let child = match launch(&plan, &build.settings.launcher) {
        Ok(child) => child,
        Err(error) if sandboxed && error.is_about_namespaces() => {
            return Err(Stopped::NoSandbox(Failure::of(FailureKind::Misc, &error).text));
        }
        Err(error) => return Err(setup_failure(&error).into()),
    };
    let ended = log.follow(build, child);
    if let Some(user) = user.filter(|_| !sandboxed || ended.is_err()) {
        kill_all(build, user)?;
    }
    let tail = log.finish()?;
    let judged = ended.and_then(|ended| judge(build, ended, tail, &temp));
    let result = judged.and_then(|()| {
        let uid = user.map_or_else(|| rustix::process::geteuid().as_raw(), |user| user.uid);
        let left = match &chroot {
            Some(chroot) => Left {
                dir: std::os::fd::AsFd::as_fd(&chroot.outputs),
                dir_path: &chroot.outputs_path,
                uids: uid..=uid,
                // Its network is shared with processes that it may have handed descriptors to.
                way: if matches!(build.kind, Kind::Fixed | Kind::Impure) { Way::Copy } else { Way::Move },
                journal: &journal,
            },
            None => Left {
                dir: store.directory()?,
                dir_path: &store.layout().real_store,
                uids: uid..=uid,
                way: if user.is_some() || matches!(build.kind, Kind::Fixed | Kind::Impure) {
                    Way::Copy
                } else {
                    Way::Move
                },
                journal: &journal,
            },
        };
        let collected = outputs::collect(build, &left)?;
        let collected = outputs::check_fixed(build, collected, &journal)?;
        let made: Made = collected.iter().map(|(name, output)| (name.clone(), output.info.clone())).collect();
        if build.job.mode == Mode::Check {
            compare::check(build, collected, owner, &temp)?;
        } else {
            if let Some(before) = before {
                compare::rounds(build, before, &made)?;
            }
            if last {
                outputs::register(build, collected, &journal)?;
            }
        }
        Ok(made)
    });
    drop(chroot);
    match result {
        Ok(made) => {
            if let Err(error) = temp.delete() {
                let text = Failure::from(error).text;
                build.say(Level::Warn, format_args!("cannot delete a build directory: {text}"));
            }
            Ok(made)
        }
        Err(failure) => {
            let is_builtin = build.job.drv.builder.starts_with(b"builtin:");
            if values.keep_failed && !is_builtin && failure.kind != FailureKind::Cancelled {
                // Set-user-id programs in it would be anybody's, if there could be any.
                let kept = temp.keep(user.is_none() || values.filter_syscalls)?;
                build.say(Level::Error, format_args!("note: keeping build directory '{}'", kept.display()));
            }
            Err(failure.into())
        }
    }
}

fn setup_failure(error: &LaunchError) -> Failure {
    let failure = Failure::of(FailureKind::Misc, error);
    match error {
        LaunchError::Setup(_) => Failure::new(FailureKind::Misc, format!("{}\n… {SETUP_TRACE}", failure.text)),
        _ => failure,
    }
}

/// Kills everything that runs as a build user.
fn kill_all(build: &Build<'_>, user: &BuildUser) -> Result<(), Failure> {
    if !runs_anything(user.uid) {
        // Only root could start something now.
        return Ok(());
    }
    kill_user(user.uid, &build.settings.launcher).map_err(|error| Failure::of(FailureKind::Misc, &error))
}

/// Is there any process of this user? In doubt there is.
pub(super) fn runs_anything(uid: u32) -> bool {
    // The one question to the kernel about all processes of a user that costs a single call.
    let asked = rustix::process::getpriority_user(rustix::process::Uid::from_raw(uid));
    !matches!(asked, Err(rustix::io::Errno::SRCH))
}

/// Makes what the builder is given, and writes its files.
fn give(build: &Build<'_>, sandboxed: bool, temp: &TempDir) -> Result<Prepared, Failure> {
    use std::os::unix::ffi::OsStrExt as _;
    let values = &build.settings.values;
    let host = temp.path();
    let build_dir = if sandboxed { values.sandbox_build_dir.as_bytes() } else { host.as_os_str().as_bytes() };
    let outputs: BTreeMap<OutputName, StorePath> =
        build.outputs.iter().map(|(name, place)| (name.clone(), place.scratch.clone())).collect();
    let impure = |name: &[u8]| {
        let text = std::str::from_utf8(name).ok().and_then(|name| values.impure_env.get(name));
        match text.filter(|_| values.experimental_features.contains("configurable-impure-env")) {
            Some(text) => Some(text.clone().into_bytes()),
            None => build.settings.environment.get(name).cloned(),
        }
    };
    let prepared = prepare(&Given {
        dir: build.store.dir(),
        drv: &build.job.drv,
        attributes: &build.attributes,
        kind: build.kind,
        build_dir,
        cores: values.cores,
        outputs: &outputs,
        rewrites: &build.rewrites,
        impure: &impure,
        graph_files: graphs::files(build.store, &build.attributes, &build.inputs)?,
        graph_values: graphs::values(build.store, &build.attributes, &build.inputs)?,
    })?;
    for (name, contents) in &prepared.files {
        temp.write(name, contents, 0o644)?;
    }
    Ok(prepared)
}

/// The log of one builder, and what it says about failures.
pub(super) struct Log {
    file: Option<LogWriter>,
    tail: Tail,
    bytes: u64,
}

impl Log {
    pub(super) fn begin(build: &Build<'_>) -> Result<Self, Failure> {
        let values = &build.settings.values;
        let form = if values.compress_build_log { Form::Compressed } else { Form::Plain };
        let file = if values.keep_build_log {
            Some(LogWriter::create(build.store.layout(), &build.job.drv_path, form)?)
        } else {
            None
        };
        Ok(Self { file, tail: Tail::new(values.log_lines), bytes: 0 })
    }

    /// Closes the file; gives the last lines.
    pub(super) fn finish(self) -> Result<Vec<String>, Failure> {
        if let Some(file) = self.file {
            file.finish()?;
        }
        Ok(self.tail.finish())
    }

    /// Follows a builder to its end.
    ///
    /// The log is read until nobody can write to it any more; then the builder is waited for, as
    /// one that has closed its output may still be at work. Whatever stops it early kills it.
    fn follow(&mut self, build: &Build<'_>, mut child: Child) -> Result<Ended, Failure> {
        let limits = Limits::new(build);
        let mut block = vec![0; 64 << 10];
        let lost =
            |error: std::io::Error| Failure::new(FailureKind::Misc, format!("reading from the builder: {error}"));
        let mut heard = Instant::now();
        loop {
            limits.check(build, heard)?;
            let tick = Timespec { tv_sec: 0, tv_nsec: i64::try_from(TICK.as_nanos()).unwrap_or(i64::MAX) };
            let ready = {
                let log = child.log();
                match poll(&mut [PollFd::new(&*log, PollFlags::IN)], Some(&tick)) {
                    Ok(n) => n > 0,
                    Err(rustix::io::Errno::INTR) => false,
                    Err(error) => return Err(lost(error.into())),
                }
            };
            if !ready {
                continue;
            }
            let n = match child.log().read(&mut block) {
                Ok(0) => break,
                Ok(n) => n,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(lost(error)),
            };
            heard = Instant::now();
            self.take(build, block.get(..n).unwrap_or_default())?;
        }
        loop {
            if let Some(ended) = child.wait_timeout(TICK).map_err(|error| Failure::of(FailureKind::Misc, &error))? {
                return Ok(ended);
            }
            limits.check(build, heard)?;
        }
    }

    /// Takes in what came. Errors: it is too much.
    pub(super) fn take(&mut self, build: &Build<'_>, bytes: &[u8]) -> Result<(), Failure> {
        build.watch.log(bytes);
        self.tail.push(bytes);
        if let Some(file) = &mut self.file {
            file.write(bytes)?;
        }
        self.bytes += bytes.len() as u64;
        let limit = build.settings.values.max_build_log_size;
        if limit > 0 && self.bytes > limit {
            let goal = goal(build);
            let text = format!(
                "building of '{goal}' from .drv file killed after writing more than {limit} bytes of log output"
            );
            return Err(Failure::new(FailureKind::LogLimitExceeded, text));
        }
        Ok(())
    }
}

/// The derivation with its wanted outputs, as messages about limits name it.
fn goal(build: &Build<'_>) -> String {
    let job = build.job;
    let outputs = if job.wants_all {
        "*".to_owned()
    } else {
        job.wanted.iter().map(OutputName::as_str).collect::<Vec<_>>().join(",")
    };
    format!("{}!{outputs}", build.shown_drv())
}

/// How long a builder may take.
struct Limits {
    begun: Instant,
    total_s: Option<u64>,
    silent_s: Option<u64>,
}

impl Limits {
    fn new(build: &Build<'_>) -> Self {
        let positive = |seconds: i64| u64::try_from(seconds).ok().filter(|seconds| *seconds > 0);
        let values = &build.settings.values;
        Self { begun: Instant::now(), total_s: positive(values.timeout), silent_s: positive(values.max_silent_time) }
    }

    fn check(&self, build: &Build<'_>, heard: Instant) -> Result<(), Failure> {
        if build.watch.is_cancelled() {
            let drv = build.shown_drv();
            return Err(Failure::new(FailureKind::Cancelled, format!("build of '{drv}' was cancelled")));
        }
        let over = |since: Instant, limit: Option<u64>| {
            limit.filter(|seconds| since.elapsed() >= Duration::from_secs(*seconds))
        };
        let late = |seconds: u64, what: &str| {
            let goal = goal(build);
            let text = format!("building of '{goal}' from .drv file timed out after {seconds} seconds{what}");
            Err(Failure::new(FailureKind::TimedOut, text))
        };
        if let Some(seconds) = over(heard, self.silent_s) {
            return late(seconds, " of silence");
        }
        match over(self.begun, self.total_s) {
            Some(seconds) => late(seconds, ""),
            None => Ok(()),
        }
    }
}

/// What the end of the builder means.
fn judge(build: &Build<'_>, ended: Ended, tail: Vec<String>, temp: &TempDir) -> Result<(), Failure> {
    let how = match ended {
        Ended::Exited(0) => return Ok(()),
        Ended::Exited(code) => format!("failed with exit code {code}"),
        Ended::Signalled(signal) => format!("failed due to signal {signal} ({})", signal_name(signal)),
    };
    let drv = build.shown_drv();
    let mut text = format!("builder for '{drv}' {how}");
    add_tail(build, &mut text, tail);
    let store = &build.store.layout().real_store;
    let mut kind =
        if matches!(build.kind, Kind::Fixed | Kind::Impure) { FailureKind::Transient } else { FailureKind::Permanent };
    if is_full(store) || is_full(&temp.path()) {
        text.push_str("\nnote: build failure may have been caused by lack of free disk space");
        kind = FailureKind::Misc;
    }
    Err(Failure::new(kind, text))
}

/// Shows the end of the log to those who have not seen it.
pub(super) fn add_tail(build: &Build<'_>, text: &mut String, tail: Vec<String>) {
    if build.settings.hides_log && !tail.is_empty() {
        let _ = write!(text, ";\nlast {} log lines:", tail.len());
        for line in tail {
            text.push_str("\n> ");
            text.push_str(&line);
        }
        let _ = write!(text, "\nFor full logs, run 'nix log {}'.", build.shown_drv());
    }
}

fn is_full(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|status| status.f_bavail.saturating_mul(status.f_frsize) < FULL_BELOW_BYTES)
}
