//! One build, from the locks of its outputs to the ledger: on this machine, or ([`elsewhere`]) on
//! another one.
//!
//! The order is that of building, sections 2.9 to 2.15: the outputs are locked, then looked at
//! once more; a build user and a directory are taken; the builder is run ([`run`]) with what
//! [`environment`] says it is given, in what `chroot` says it sees; what it leaves behind is
//! taken in and registered (`outputs`). Whatever ends a build early, nothing of it stays: every
//! piece deletes itself when it is dropped, and after a crash the [`journal`] knows what to delete.

pub mod attrs;
pub mod builtin;
pub mod checks;
pub mod elsewhere;
pub mod environment;
pub mod hooks;
pub mod journal;
pub mod tempdir;
pub mod users;

mod chroot;
mod compare;
mod failure;
mod floating;
mod graphs;
mod outputs;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use larder_core::derivation::options::Attributes;
use larder_core::derivation::placeholder::scratch_path_beside;
use larder_core::derivation::{Kind, OutputName};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::report::Level;
use larder_core::settings::{Sandbox, Settings};
use larder_core::store_path::StorePath;
use larder_fs::lock_file::Wait;
use larder_fs::path_lock::{OnRelease, PathLocks};
use larder_fs::users::Users;
use larder_sandbox::launch::Launcher;
use larder_store::LocalStore;

use self::users::{BuildUser, UsersError};
use crate::derivations::unsupported;
use crate::job::{Failure, FailureKind, Job, Mode, Outcome, Watch};

/// What builds depend on beside the store and the derivation.
#[derive(Debug)]
pub struct BuildSettings {
    pub values: Arc<Settings>,
    /// How builders are started.
    pub launcher: Launcher,
    /// Where build directories are made, unless `build-dir` is set (`TMPDIR`, or `/tmp`).
    pub temp_dir: PathBuf,
    /// The environment of the process that builds: for `impureEnvVars` and hooks.
    pub environment: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Where build users are looked up.
    pub users: Users,
    /// Users do not see the log as it is written, so that failures show the end of it.
    pub hides_log: bool,
    /// What dead builds left has been cleaned up.
    cleaned: OnceLock<()>,
}

impl BuildSettings {
    /// With the directories and the environment of this process.
    pub fn new(values: Arc<Settings>, launcher: Launcher) -> Self {
        use std::os::unix::ffi::OsStringExt as _;
        Self {
            values,
            launcher,
            temp_dir: std::env::temp_dir(),
            environment: std::env::vars_os().map(|(name, value)| (name.into_vec(), value.into_vec())).collect(),
            users: Users::default(),
            hides_log: false,
            cleaned: OnceLock::new(),
        }
    }

    /// Cleans up after builds that died with their process; once for these settings.
    ///
    /// Every build does it, so calling it is for those who want to know earlier.
    pub fn clean_up(&self, store: &LocalStore) {
        self.cleaned.get_or_init(|| {
            let kill = |uid| larder_sandbox::launch::kill_user(uid, &self.launcher).map_err(std::io::Error::other);
            journal::clean_up(store, &kill);
        });
    }
}

/// One output of a build.
#[derive(Debug)]
struct Place {
    /// Where it belongs.
    path: StorePath,
    /// Where the builder is to make it.
    scratch: StorePath,
    /// Is it to be registered, replaced or compared?
    wanted: bool,
    /// What the ledger says, if it is valid.
    known: Option<PathInfo>,
}

/// A build whose locks are held.
struct Build<'a> {
    store: &'a LocalStore,
    settings: &'a BuildSettings,
    job: &'a Job,
    watch: &'a dyn Watch,
    attributes: Attributes<'a>,
    kind: Kind,
    /// The closure of all inputs.
    inputs: BTreeSet<StorePath>,
    outputs: BTreeMap<OutputName, Place>,
    /// Hash parts of final paths, and of the scratch paths that the builder gets instead.
    rewrites: Vec<(HashPart, HashPart)>,
}

impl Build<'_> {
    /// The derivation as messages name it.
    fn shown_drv(&self) -> String {
        self.store.dir().full(&self.job.drv_path)
    }

    /// Do the paths follow from what is built?
    fn is_floating(&self) -> bool {
        matches!(self.kind, Kind::Floating | Kind::Impure)
    }

    /// Takes away what lies where outputs are to be and is not valid.
    fn make_way(&self) -> Result<(), Failure> {
        for place in self.outputs.values().filter(|place| place.known.is_none() || self.is_floating()) {
            self.store.remove_entry(OsStr::new(&place.path.to_string()))?;
        }
        Ok(())
    }

    fn say(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.store.reporter().message(level, text);
    }
}

/// Builds, checks or repairs; blocks until that is done.
///
/// Any number of threads may do so at once.
pub fn run(store: &LocalStore, settings: &BuildSettings, job: &Job, watch: &dyn Watch) -> Outcome {
    settings.clean_up(store);
    // Before any lock is held that a collector may wait for.
    store.make_room();
    match attempt(store, settings, job, watch) {
        Ok(outcome) => outcome,
        Err(failure) => Outcome::Failed(failure),
    }
}

fn attempt(store: &LocalStore, settings: &BuildSettings, job: &Job, watch: &dyn Watch) -> Result<Outcome, Failure> {
    let shown_drv = store.dir().full(&job.drv_path);
    let input = |text: String| Failure::new(FailureKind::InputRejected, text);
    let attributes = Attributes::new(&job.drv_path, &job.drv)?;
    let kind = job.drv.kind().map_err(|error| input(format!("derivation '{shown_drv}' {error}")))?;
    // What is written wrongly is no reason to say that it needs another machine.
    attributes.strings("requiredSystemFeatures")?;
    if let Some(text) = unsupported(store, &job.drv_path, &job.drv, &settings.values) {
        return Err(input(text));
    }
    if kind == Kind::Deferred {
        // The driver builds what they become.
        let text = format!("derivation '{shown_drv}' has outputs whose paths follow from what its inputs are built as");
        return Err(input(text));
    }
    let held = match begin(store, settings, job, kind)? {
        Begun::Held(held) => held,
        Begun::Over(outcome) => return Ok(outcome),
    };
    let Held { locks, paths, outputs } = held;
    let inputs = inputs(store, job)?;
    let mut build = Build { store, settings, job, watch, attributes, kind, inputs, outputs, rewrites: Vec::new() };
    let sandboxed = chroot::decide(&build)?;
    let Some(user) = build_user(&build)? else { return Ok(Outcome::NoBuildUser) };
    build.make_way()?;
    watch.started();
    let result = match run::rounds(&mut build, sandboxed, user.as_ref()) {
        // A sandbox that the kernel does not allow.
        Err(run::Stopped::NoSandbox(reason)) => without_sandbox(&mut build, user.as_ref(), &reason),
        Err(run::Stopped::Failed(failure)) => Err(failure),
        Ok(made) => Ok(made),
    };
    let made = match result {
        Ok(made) => made,
        Err(failure) => {
            let is_builders = failure.kind == FailureKind::Permanent && kind != Kind::Fixed;
            if settings.values.build_cache_failure && is_builders {
                store.remember_failed(paths.values())?;
            }
            return Err(failure);
        }
    };
    let is_floating = build.is_floating();
    drop(user);
    release(locks)?;
    // Each has its path now.
    let paths: BTreeMap<OutputName, StorePath> = if is_floating && job.mode != Mode::Check {
        paths
            .into_iter()
            .map(|(name, path)| {
                let path = made.get(&name).map_or(path, |info| info.path.clone());
                (name, path)
            })
            .collect()
    } else {
        paths
    };
    if job.mode != Mode::Check {
        post_build(store, settings, job, &paths)?;
    }
    Ok(Outcome::Built { outputs: paths })
}

/// What is held while outputs are made.
struct Held {
    locks: Vec<PathLocks>,
    /// Where the outputs are to be, or are built.
    paths: BTreeMap<OutputName, StorePath>,
    outputs: BTreeMap<OutputName, Place>,
}

enum Begun {
    Held(Held),
    /// There is nothing to be done, or nothing can be done now.
    Over(Outcome),
}

/// Locks the outputs and looks at them once more: steps 9 to 11.
fn begin(store: &LocalStore, settings: &BuildSettings, job: &Job, kind: Kind) -> Result<Begun, Failure> {
    let locks = match lock(store, &floating::places_to_lock(store, job))? {
        Ok(locks) => locks,
        Err(path) => return Ok(Begun::Over(Outcome::Locked { path })),
    };
    let paths = floating::paths(store, job, kind)?;
    // Roots come before the question what is valid.
    store.add_temp_roots(paths.values())?;
    let valid = store.valid_under_lock(&paths.values().cloned().collect())?;
    let wanted_are_valid = job.wanted.iter().all(|name| paths.get(name).is_some_and(|path| valid.contains(path)));
    match job.mode {
        Mode::Normal if wanted_are_valid => {
            release(locks)?;
            return Ok(Begun::Over(Outcome::AlreadyValid { outputs: paths }));
        }
        Mode::Check if valid.len() != paths.values().collect::<BTreeSet<_>>().len() => {
            let shown_drv = store.dir().display(&job.drv_path);
            let text = format!("some outputs of '{shown_drv}' are not valid, so checking is not possible");
            return Err(Failure::new(FailureKind::Misc, text));
        }
        _ => {}
    }
    refuse_remembered(store, settings, job, paths.values())?;
    let outputs = places(store, job, kind, &paths, &valid)?;
    if !outputs.values().any(|place| place.wanted) {
        release(locks)?;
        return Ok(Begun::Over(Outcome::AlreadyValid { outputs: paths }));
    }
    Ok(Begun::Held(Held { locks, paths, outputs }))
}

/// What is valid needs no lock any more, so that nobody needs the files.
fn release(locks: Vec<PathLocks>) -> Result<(), Failure> {
    for mut lock in locks {
        lock.on_release(OnRelease::Delete);
        lock.release()?;
    }
    Ok(())
}

/// Runs the hook of the user for what is valid now.
fn post_build(
    store: &LocalStore,
    settings: &BuildSettings,
    job: &Job,
    paths: &BTreeMap<OutputName, StorePath>,
) -> Result<(), Failure> {
    let registered = paths.values().cloned().collect();
    let (values, environment) = (&settings.values, &settings.environment);
    hooks::post_build(values, store.dir(), store.reporter(), &job.drv_path, &registered, environment)
}

/// A failure that is remembered is one now (`build-cache-failure`).
fn refuse_remembered<'a>(
    store: &LocalStore,
    settings: &BuildSettings,
    job: &Job,
    paths: impl Iterator<Item = &'a StorePath>,
) -> Result<(), Failure> {
    if !settings.values.build_cache_failure || job.mode != Mode::Normal {
        return Ok(());
    }
    for path in paths {
        if store.failed_before(path)? {
            let text = format!("builder for '{}' failed previously (cached)", store.dir().display(path));
            return Err(Failure::new(FailureKind::Cached, text));
        }
    }
    Ok(())
}

/// Where each output is to be made, and what is known of it.
fn places(
    store: &LocalStore,
    job: &Job,
    kind: Kind,
    paths: &BTreeMap<OutputName, StorePath>,
    valid: &BTreeSet<StorePath>,
) -> Result<BTreeMap<OutputName, Place>, Failure> {
    let scratch = floating::scratch_paths(store, job, kind)?;
    let mut outputs = BTreeMap::new();
    for (name, path) in paths {
        let known = if valid.contains(path) { Some(store.info(path)?) } else { None };
        let wanted = match (job.mode, &known) {
            (_, None) | (Mode::Check, _) => true,
            (Mode::Normal, Some(_)) => false,
            (Mode::Repair, Some(info)) => !store.contents_are_good(info)?,
        };
        // What is made where nobody knows yet where it belongs has the scratch path for its own.
        let path = scratch.get(name).unwrap_or(path);
        outputs.insert(name.clone(), Place { path: path.clone(), scratch: path.clone(), wanted, known });
    }
    Ok(outputs)
}

/// Builds once more without a sandbox, if that is allowed, and says so.
fn without_sandbox(build: &mut Build<'_>, user: Option<&BuildUser>, reason: &str) -> Result<run::Made, Failure> {
    let drv = build.shown_drv();
    let layout = build.store.layout();
    let can =
        build.settings.values.sandbox_fallback && layout.real_store == std::path::Path::new(layout.store_dir.as_str());
    if !can {
        return Err(Failure::new(
            FailureKind::Misc,
            format!(
                "this system does not support the kernel namespaces that are required for sandboxing; use \
                 '--no-sandbox' to disable sandboxing: {reason}"
            ),
        ));
    }
    build.say(
        Level::Warn,
        format_args!(
            "'{drv}' is built WITHOUT a sandbox, since the kernel allows none and 'sandbox-fallback' is on: {reason}"
        ),
    );
    run::rounds(build, false, user).map_err(|stopped| match stopped {
        run::Stopped::Failed(failure) => failure,
        run::Stopped::NoSandbox(reason) => Failure::new(FailureKind::Misc, reason),
    })
}

/// Locks all outputs or none; then, the one that somebody else has.
fn lock(store: &LocalStore, sorted: &BTreeSet<PathBuf>) -> Result<Result<Vec<PathLocks>, PathBuf>, Failure> {
    let mut locks = Vec::with_capacity(sorted.len());
    for path in sorted {
        // One by one in their order is as good as all at once, and tells which is taken.
        match PathLocks::acquire([path], &store.options().held_locks, Wait::No)? {
            Some(lock) => locks.push(lock),
            None => return Ok(Err(path.clone())),
        }
    }
    Ok(Ok(locks))
}

/// All that the inputs need.
fn inputs(store: &LocalStore, job: &Job) -> Result<BTreeSet<StorePath>, Failure> {
    let mut roots = job.drv.input_srcs.clone();
    for (drv, names) in &job.drv.input_drvs {
        let outputs = store.derivation_outputs(drv)?;
        for name in names {
            let path = outputs.get(name.as_str()).ok_or_else(|| {
                let (user, drv) = (store.dir().display(&job.drv_path), store.dir().display(drv));
                let text =
                    format!("derivation '{user}' requires non-existent output '{name}' from input derivation '{drv}'");
                Failure::new(FailureKind::InputRejected, text)
            })?;
            roots.insert(path.clone());
        }
    }
    Ok(store.closure(&roots)?)
}

/// The group of build users where none is named. Where it does not exist, which is a machine on
/// which nothing was set up, root's builds run under ids that belong to nobody.
const DEFAULT_GROUP: &str = "nixbld";

/// A build user where one is needed: `None` if all are taken, `Some(None)` if none is needed.
#[expect(clippy::option_option, reason = "not needed and not to be had are two things")]
fn build_user(build: &Build<'_>) -> Result<Option<Option<BuildUser>>, Failure> {
    let group = &build.settings.values.build_users_group;
    if group.is_empty() || !rustix::process::geteuid().is_root() {
        return Ok(Some(None));
    }
    let values = &build.settings.values;
    let (layout, range) = (build.store.layout(), users::Range { start: values.start_id, count: values.id_count });
    // An id that belongs to nobody has no right to the store itself, so it needs a sandbox.
    let sandboxed = values.sandbox == Sandbox::On;
    if values.auto_allocate_uids && sandboxed {
        return Ok(users::allocate(layout, range)?.map(Some));
    }
    match users::acquire(layout, &build.settings.users, group) {
        Err(UsersError::NoGroup { group }) if sandboxed && group == DEFAULT_GROUP => {
            Ok(users::allocate(layout, range)?.map(Some))
        }
        outcome => Ok(outcome?.map(Some)),
    }
}

impl Build<'_> {
    /// Decides where the builder makes its outputs: in a sandbox in their own places, without one
    /// beside those that are valid.
    fn place(&mut self, sandboxed: bool) -> Result<(), Failure> {
        self.rewrites.clear();
        for place in self.outputs.values_mut() {
            place.scratch = place.path.clone();
            if !sandboxed && place.known.is_some() && self.kind.has_paths() {
                place.scratch = scratch_path_beside(self.store.dir(), &self.job.drv_path, &place.path);
                self.rewrites.push((place.path.hash_part(), place.scratch.hash_part()));
            }
        }
        let scratch: Vec<&StorePath> =
            self.outputs.values().filter(|place| place.scratch != place.path).map(|place| &place.scratch).collect();
        self.store.add_temp_roots(scratch.iter().copied())?;
        for path in scratch {
            self.store.remove_entry(OsStr::new(&path.to_string()))?;
        }
        Ok(())
    }

    /// Deletes what an unsandboxed builder left beside valid paths, and after a failure what it
    /// left in places that are not valid.
    fn discard(&self, failed: bool) {
        for place in self.outputs.values() {
            let is_scratch = place.scratch != place.path || !self.kind.has_paths();
            if is_scratch || (failed && place.known.is_none()) {
                // What stays is deleted by the next build or collection.
                drop(self.store.remove_entry(OsStr::new(&place.scratch.to_string())));
            }
        }
    }
}
