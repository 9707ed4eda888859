//! What goes on with one build: its lines go to whoever listens.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use larder_core::report::Level;
use larder_store::LocalStore;

use super::{Lines, Listener};
use crate::job::{Failure, Job, Mode, Watch};

pub(super) struct Watcher<'a> {
    store: &'a LocalStore,
    listener: &'a dyn Listener,
    job: &'a Job,
    cancel: &'a AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    started: bool,
    lines: Lines,
}

impl<'a> Watcher<'a> {
    pub(super) fn new(store: &'a LocalStore, listener: &'a dyn Listener, job: &'a Job, cancel: &'a AtomicBool) -> Self {
        Self { store, listener, job, cancel, state: Mutex::default() }
    }

    fn line(&self, line: &[u8]) {
        if !is_message(line) {
            self.listener.line(&self.job.drv_path, line);
        }
    }

    pub(super) fn end(&self, how: Result<(), &Failure>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lines.finish(|line| self.line(line));
        if std::mem::take(&mut state.started) {
            self.listener.ended(&self.job.drv_path, how);
        }
    }
}

/// A message for programs, which some builders write: `@nix {...}`.
fn is_message(line: &[u8]) -> bool {
    line.strip_prefix(b"@nix ").is_some_and(|rest| serde_json::from_slice::<serde::de::IgnoredAny>(rest).is_ok())
}

impl Watch for Watcher<'_> {
    fn started(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).started = true;
        let drv = self.store.dir().display(&self.job.drv_path);
        let reporter = self.store.reporter();
        match self.job.mode {
            Mode::Normal => reporter.message(Level::Info, format_args!("building '{drv}'...")),
            Mode::Check => reporter.message(Level::Info, format_args!("checking outputs of '{drv}'...")),
            Mode::Repair => reporter.message(Level::Info, format_args!("repairing outputs of '{drv}'...")),
        }
        self.listener.started(self.job);
    }

    fn log(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.lines.push(bytes, |line| self.line(line));
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed) || self.store.reporter().is_cancelled()
    }
}
