//! Builds on other machines, by way of a build hook.
//!
//! The outputs are locked and looked at as for a build on this machine; then the hook is asked. It
//! brings the outputs here and registers them itself, under the locks that are held here. Time
//! limits are the other machine's to keep: copying, or a collector that has to be waited for,
//! is no fault of the builder. Source: building, section 11.

use std::process::ExitStatus;
use std::sync::{Mutex, PoisonError};

use larder_core::derivation::Kind;
use larder_core::derivation::options::Attributes;
use larder_core::report::Level;
use larder_store::LocalStore;
use larder_wire::hook::{Answer, Order, Try};

use super::{Begun, Build, BuildSettings, Held, begin, floating, inputs, post_build, release, run};
use crate::derivations::needs;
use crate::driver::{Delegate, Offered};
use crate::hook::{Hook, HookError, Program, Said};
use crate::job::{Failure, FailureKind, Job, Outcome, Watch};

/// What a hook ends with when the builder failed, and will again.
pub const PERMANENT: u8 = 100;
/// What it ends with when a time limit was hit.
pub const TIMED_OUT: u8 = 101;

/// Has builds done by what a hook knows.
#[derive(Debug)]
pub struct Elsewhere<'a> {
    store: &'a LocalStore,
    settings: &'a BuildSettings,
    program: Program,
    verbosity: Level,
    /// One that may be asked.
    idle: Mutex<Option<Hook>>,
}

impl From<HookError> for Failure {
    fn from(error: HookError) -> Self {
        let kind = if matches!(error, HookError::Cancelled) { FailureKind::Cancelled } else { FailureKind::Misc };
        Self::of(kind, &error)
    }
}

impl<'a> Elsewhere<'a> {
    /// With the hook of the settings, or our own; it says what the reporter of the store shows.
    pub fn new(store: &'a LocalStore, settings: &'a BuildSettings) -> Self {
        let program = match settings.values.build_hook.get() {
            Some(hook) => Program { path: hook.into(), words: Vec::new() },
            None => Program { path: settings.launcher.program.clone(), words: vec![crate::hook::WORD.into()] },
        };
        let levels = (0..=7).rev().map(Level::of_number);
        let verbosity = levels.into_iter().find(|level| store.reporter().shows(*level)).unwrap_or(Level::Error);
        Self { store, settings, program, verbosity, idle: Mutex::default() }
    }

    fn hear(&self, said: Said) {
        if let Said::Message(level, text) = said {
            self.store.reporter().message(level, format_args!("{}", text.trim_end_matches('\n')));
        }
    }

    /// Asks the hook that is there, or a new one; gives it if it takes the build.
    fn ask(&self, question: &Try, watch: &dyn Watch) -> Result<Result<(Hook, String), Offered>, HookError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut hook = match idle {
            Some(hook) => hook,
            None => Hook::start(&self.program, self.store.dir(), &self.settings.values, self.verbosity)?,
        };
        let is_cancelled = || watch.is_cancelled();
        let (answer, machine) = hook.ask(question, self.store.dir(), &|said| self.hear(said), &is_cancelled)?;
        let offered = match answer {
            Answer::Accept => return Ok(Ok((hook, machine))),
            Answer::DeclinePermanently => return Ok(Err(Offered::DeclinedForever)),
            Answer::Decline => Offered::Declined,
            Answer::Postpone => Offered::Postponed,
        };
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(hook);
        Ok(Err(offered))
    }

    fn attempt(&self, job: &Job, willing: bool, watch: &dyn Watch, accepted: &dyn Fn()) -> Result<Offered, Failure> {
        let (store, settings) = (self.store, self.settings);
        // What is written wrongly is for the builder's side to complain about.
        let (Ok(attributes), Ok(kind), Some(needs)) =
            (Attributes::new(&job.drv_path, &job.drv), job.drv.kind(), needs(&job.drv_path, &job.drv))
        else {
            return Ok(Offered::Declined);
        };
        let Held { locks, paths, outputs } = match begin(store, settings, job, kind)? {
            Begun::Held(held) => held,
            Begun::Over(outcome) => return Ok(Offered::Ended(outcome)),
        };
        let question = Try { willing, drv: job.drv_path.clone(), needs };
        let (hook, machine) = match self.ask(&question, watch) {
            Ok(Ok(taken)) => taken,
            Ok(Err(offered)) => return Ok(offered),
            Err(HookError::Cancelled) => return Err(HookError::Cancelled.into()),
            Err(error) => {
                let text = Failure::of(FailureKind::Misc, &error).text;
                store.reporter().message(Level::Error, format_args!("error: {text}"));
                // One that cannot be started will not be the next time, either.
                let forever = matches!(error, HookError::Start { .. });
                return Ok(if forever { Offered::DeclinedForever } else { Offered::Declined });
            }
        };
        accepted();
        let inputs = inputs(store, job)?;
        let build = Build { store, settings, job, watch, attributes, kind, inputs, outputs, rewrites: Vec::new() };
        let missing = build.outputs.iter().filter(|(_, place)| place.wanted && place.known.is_none());
        let missing = missing.map(|(name, _)| name.clone()).filter(|name| job.wanted.contains(name));
        let order = Order { inputs: build.inputs.clone(), outputs: missing.collect() };
        build.make_way()?;
        watch.started_on(&machine);
        let mut log = run::Log::begin(&build)?;
        let mut take = |bytes: &[u8]| if bytes.is_empty() { Ok(()) } else { log.take(&build, bytes) };
        let hear = |said| self.hear(said);
        let status = hook.follow(&order, store.dir(), &hear, &mut take, &|| watch.is_cancelled());
        let tail = log.finish()?;
        judge(&build, status?, tail)?;
        // The hook has registered them; what they are called is known by now.
        let paths = if kind.has_paths() { paths } else { floating::paths(store, job, kind)? };
        store.add_temp_roots(paths.values())?;
        let valid = store.valid_subset(&paths.values().cloned().collect())?;
        if job.wanted.iter().any(|name| paths.get(name).is_none_or(|path| !valid.contains(path))) {
            let text = format!("some outputs of '{}' are unexpectedly invalid", build.shown_drv());
            return Err(Failure::new(FailureKind::Misc, text));
        }
        release(locks)?;
        let registered = paths.into_iter().filter(|(_, path)| valid.contains(path)).collect();
        post_build(store, settings, job, &registered)?;
        Ok(Offered::Ended(Outcome::Built { outputs: registered }))
    }
}

/// What the end of a hook means.
fn judge(build: &Build<'_>, status: ExitStatus, tail: Vec<String>) -> Result<(), Failure> {
    let Some(how) = super::hooks::outcome(status) else { return Ok(()) };
    let kind = match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(PERMANENT) if build.kind == Kind::Fixed => FailureKind::Transient,
        Some(PERMANENT) => FailureKind::Permanent,
        Some(TIMED_OUT) => FailureKind::TimedOut,
        _ => FailureKind::Misc,
    };
    let mut text = format!("builder for '{}' {how}", build.shown_drv());
    run::add_tail(build, &mut text, tail);
    Err(Failure::new(kind, text))
}

impl Delegate for Elsewhere<'_> {
    fn delegate(&self, job: &Job, willing: bool, watch: &dyn Watch, accepted: &dyn Fn()) -> Offered {
        self.settings.clean_up(self.store);
        self.store.make_room();
        self.attempt(job, willing, watch, accepted).unwrap_or_else(|failure| Offered::Ended(Outcome::Failed(failure)))
    }
}
