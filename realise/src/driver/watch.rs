//! What goes on with one build: its lines go to whoever listens.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use larder_core::report::{Activity, ActivityResult, Level, Start};
use larder_store::LocalStore;

use super::{Lines, Listener};
use crate::job::{Failure, Job, Mode, Watch};

pub(super) struct Watcher<'a> {
    store: &'a LocalStore,
    listener: &'a dyn Listener,
    job: &'a Job,
    cancel: &'a AtomicBool,
    /// The activity that all builds are part of, and how it changes.
    state: Mutex<State>,
    on_start: &'a (dyn Fn() + Sync),
}

#[derive(Default)]
struct State {
    /// The number of the activity, once the builder runs.
    started: Option<u64>,
    lines: Lines,
}

impl<'a> Watcher<'a> {
    pub(super) fn new(
        store: &'a LocalStore,
        listener: &'a dyn Listener,
        job: &'a Job,
        cancel: &'a AtomicBool,
        on_start: &'a (dyn Fn() + Sync),
    ) -> Self {
        Self { store, listener, job, cancel, state: Mutex::default(), on_start }
    }

    fn line(&self, activity: u64, line: &[u8]) {
        match message(line) {
            None => {
                self.store.reporter().result(activity, ActivityResult::BuildLogLine(line));
                self.listener.line(&self.job.drv_path, line);
            }
            Some(FromBuilder::Phase(phase)) => {
                self.store.reporter().result(activity, ActivityResult::SetPhase(&phase));
            }
            Some(FromBuilder::Other) => {}
        }
    }

    /// The builder runs, on a machine that has a name if it is not this one.
    fn begin(&self, machine: &str) {
        let drv = self.store.dir().full(&self.job.drv_path);
        let text = match self.job.mode {
            Mode::Normal if !machine.is_empty() => format!("building '{drv}' on '{machine}'"),
            Mode::Normal => format!("building '{drv}'"),
            Mode::Check => format!("checking outputs of '{drv}'"),
            Mode::Repair => format!("repairing outputs of '{drv}'"),
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.started.is_some() {
            return;
        }
        let activity = Activity::Build { drv: &drv, machine };
        let start = Start { level: Level::Info, text: &text, activity, parent: 0 };
        state.started = Some(self.store.reporter().start(&start));
        (self.on_start)();
        self.listener.started(self.job);
    }

    /// Did the builder run?
    pub(super) fn end(&self, how: Result<(), &Failure>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(activity) = state.started.take() else { return false };
        state.lines.finish(|line| self.line(activity, line));
        self.listener.ended(&self.job.drv_path, how);
        self.store.reporter().stop(activity);
        true
    }
}

/// What a builder may say to programs rather than people: `@nix {...}`.
enum FromBuilder {
    Phase(String),
    Other,
}

/// A line for programs, if it is one.
fn message(line: &[u8]) -> Option<FromBuilder> {
    let value: serde_json::Value = serde_json::from_slice(line.strip_prefix(b"@nix ")?).ok()?;
    let text = |name: &str| value.get(name).and_then(serde_json::Value::as_str);
    Some(match (text("action"), text("phase")) {
        (Some("setPhase"), Some(phase)) => FromBuilder::Phase(phase.to_owned()),
        _ => FromBuilder::Other,
    })
}

impl Watch for Watcher<'_> {
    fn started(&self) {
        self.begin("");
    }

    fn started_on(&self, machine: &str) {
        self.begin(machine);
    }

    fn log(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let activity = state.started.unwrap_or(0);
        state.lines.push(bytes, |line| self.line(activity, line));
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed) || self.store.reporter().is_cancelled()
    }
}
