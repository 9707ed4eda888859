//! Carries out what a [`Plan`] says: asks the store, runs builders in threads, tells the user.
//!
//! One thread decides; a thread for each running build waits for its builder. Questions to the
//! store are answered by the deciding thread, all that are open in one reading of the ledger.
//! Paths become temporary roots before anyone asks whether they are valid, so that no collector
//! can take them away in between.

mod ask;
mod lines;
mod report;
mod resolve;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use larder_core::derivation::OutputName;
use larder_core::report::Level;
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_store::LocalStore;

pub use self::lines::Lines;
pub use self::report::{RealiseError, Report};
use self::watch::Watcher;
use crate::derivations::Derivations;
use crate::job::{Failure, FailureKind, Job, Mode, Outcome, Watch};
use crate::plan::{Action, Built, Event, Fetched, Notice, Offer, Options, Plan, Target};

/// How often the driver asks whether the user wants to stop, while it waits for builders.
const LOOK_UP: Duration = Duration::from_millis(100);

/// Runs a builder. Called from several threads at once.
pub trait Builder: Sync {
    fn build(&self, job: &Job, watch: &dyn Watch) -> Outcome;
}

/// Hears of builds while they go on. Called from several threads at once.
pub trait Listener: Sync {
    /// A builder runs.
    fn started(&self, _job: &Job) {}
    /// It wrote a line, without its end. Escapes are as they came.
    fn line(&self, _drv: &StorePath, _line: &[u8]) {}
    /// A builder that ran has ended, and what it made is registered, or not.
    fn ended(&self, _drv: &StorePath, _how: Result<(), &Failure>) {}
    /// So many of the goals are done, and so many are known.
    fn count(&self, _done: usize, _total: usize) {}
    /// Something failed for which others wait; the text has no `error: `.
    fn failed(&self, _text: &str) {}
}

/// Hears nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Deaf;

impl Listener for Deaf {}

/// Realises targets in one store.
pub struct Driver<'a> {
    store: &'a LocalStore,
    settings: &'a Settings,
    builder: &'a dyn Builder,
    listener: &'a dyn Listener,
    derivations: &'a Derivations<'a>,
    read_only: bool,
}

impl std::fmt::Debug for Driver<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Driver").field("store", self.store).finish_non_exhaustive()
    }
}

impl<'a> Driver<'a> {
    pub fn new(
        store: &'a LocalStore,
        settings: &'a Settings,
        derivations: &'a Derivations<'a>,
        builder: &'a dyn Builder,
        listener: &'a dyn Listener,
    ) -> Self {
        Self { store, settings, builder, listener, derivations, read_only: false }
    }

    /// `--readonly-mode`: nothing is fetched.
    #[must_use]
    pub const fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Makes the targets valid, or says of each why it is not.
    pub fn realise(&self, targets: &[Target], mode: Mode) -> Report {
        let options = Options {
            mode,
            substitute: self.settings.substitute,
            // There is nobody yet who could be asked.
            has_substituters: false,
            fallback: self.settings.fallback,
            keep_going: self.settings.keep_going,
            max_jobs: self.settings.max_jobs.0,
            read_only: self.read_only,
        };
        let mut plan = Plan::new(options);
        let cancel = AtomicBool::new(false);
        let threads = usize::try_from(options.max_jobs.max(1)).unwrap_or(usize::MAX);
        thread::scope(|scope| {
            let (jobs, waiting) = unbounded::<Job>();
            let (done, finished) = unbounded::<Event>();
            let mut run = Run {
                driver: self,
                cancel: &cancel,
                jobs,
                finished,
                running: 0,
                idle: 0,
                threads: 0,
                poll_at: None,
                spawn: Box::new(|| {
                    let (waiting, done, cancel) = (waiting.clone(), done.clone(), &cancel);
                    thread::Builder::new()
                        .name("build".to_owned())
                        .spawn_scoped(scope, move || self.work(&waiting, &done, cancel))
                        .is_ok()
                }),
                max_threads: threads,
            };
            run.drive(&mut plan, targets.to_vec());
        });
        Report::new(&plan, self.store.dir())
    }

    /// What one thread does: a build after another.
    fn work(&self, waiting: &Receiver<Job>, done: &Sender<Event>, cancel: &AtomicBool) {
        for job in waiting {
            let drv = job.drv_path.clone();
            // A builder's thread that dies must not leave the others waiting for it.
            let built = std::panic::catch_unwind(AssertUnwindSafe(|| self.build(&job, cancel)));
            let built = built.unwrap_or_else(|_| {
                let text = format!("the builder of '{}' broke down; this is a bug", self.store.dir().full(&drv));
                Built::Failed(Failure { kind: FailureKind::Misc, text })
            });
            if done.send(Event::Built { drv, built }).is_err() {
                return;
            }
        }
    }

    fn build(&self, job: &Job, cancel: &AtomicBool) -> Built {
        let watcher = Watcher::new(self.store, self.listener, job, cancel);
        let outcome = self.builder.build(job, &watcher);
        let built = match outcome {
            Outcome::Built { outputs } => Built::Valid { outputs, made: true },
            Outcome::AlreadyValid { outputs } => Built::Valid { outputs, made: false },
            Outcome::Locked { path } => Built::Locked(path),
            Outcome::NoBuildUser => Built::NoBuildUser,
            Outcome::Failed(failure) => Built::Failed(failure),
        };
        watcher.end(match &built {
            Built::Failed(failure) => Err(failure),
            _ => Ok(()),
        });
        built
    }
}

/// One run of a driver.
struct Run<'a, 's> {
    driver: &'a Driver<'a>,
    cancel: &'a AtomicBool,
    jobs: Sender<Job>,
    finished: Receiver<Event>,
    /// Jobs given out and not answered.
    running: usize,
    /// Threads without a job.
    idle: usize,
    threads: usize,
    max_threads: usize,
    spawn: Box<dyn Fn() -> bool + 's>,
    poll_at: Option<Instant>,
}

impl Run<'_, '_> {
    fn drive(&mut self, plan: &mut Plan, targets: Vec<Target>) {
        let mut events = VecDeque::from([Event::Realise(targets)]);
        let mut told = (0, 0);
        loop {
            let mut actions = VecDeque::new();
            while let Some(event) = events.pop_front() {
                actions.extend(plan.step(event));
            }
            let count = plan.count();
            if count != told {
                told = count;
                self.driver.listener.count(count.0, count.1);
            }
            self.act(actions, &mut events);
            if !events.is_empty() {
                continue;
            }
            if plan.is_done() {
                return;
            }
            events.extend(self.wait(plan));
        }
    }

    /// Does what is to be done. What can be answered at once is.
    fn act(&mut self, actions: VecDeque<Action>, events: &mut VecDeque<Event>) {
        let driver = self.driver;
        let mut outputs = Vec::new();
        for action in actions {
            match action {
                Action::AskOutputs { drv, verify } => outputs.push((drv, verify)),
                Action::AskInputs { drv } => {
                    let answer = driver.inputs(&drv);
                    events.push_back(Event::Inputs { drv, answer });
                }
                Action::Resolve { drv, inputs } => {
                    let answer = driver.resolve(&drv, &inputs);
                    events.push_back(Event::Resolved { drv, answer });
                }
                Action::Realised { drv, outputs, inputs } => {
                    let answer = driver.realised(&drv, outputs, &inputs);
                    events.push_back(Event::Realised { drv, answer });
                }
                Action::AskClosure { drv } => {
                    let answer = driver.damaged_closure(&drv);
                    events.push_back(Event::Closure { drv, answer });
                }
                Action::AskOffer { path, verify, .. } => {
                    let offer =
                        driver.offer(&path, verify).unwrap_or_else(|failure| Offer::Error { substituter: 0, failure });
                    events.push_back(Event::Offer { path, offer });
                }
                Action::Fetch { path, .. } => {
                    // Offers come from substituters, and there are none.
                    events.push_back(Event::Fetched { path, fetched: Fetched::Gone });
                }
                Action::Build { drv, wanted, mode } => match driver.job(&drv, &wanted, mode) {
                    Ok(job) => self.start(job, events),
                    Err(failure) => events.push_back(Event::Built { drv, built: Built::Failed(failure) }),
                },
                Action::CancelAll => self.cancel.store(true, Ordering::SeqCst),
                Action::PollLater => {
                    let interval = Duration::from_secs(u64::from(driver.settings.build_poll_interval.max(1)));
                    self.poll_at = Some(Instant::now() + interval);
                }
                Action::Tell(notice) => driver.tell(&notice),
            }
        }
        if !outputs.is_empty() {
            driver.outputs(outputs, events);
        }
    }

    fn start(&mut self, job: Job, events: &mut VecDeque<Event>) {
        if self.idle == 0 && self.threads < self.max_threads {
            if (self.spawn)() {
                self.threads += 1;
            } else if self.threads == 0 {
                let text = "cannot start a thread for a build".to_owned();
                let failure = Failure { kind: FailureKind::Misc, text };
                events.push_back(Event::Built { drv: job.drv_path, built: Built::Failed(failure) });
                return;
            }
        } else {
            self.idle = self.idle.saturating_sub(1);
        }
        self.running += 1;
        // The receiving end is kept by this function's caller, so it is there.
        let _ = self.jobs.send(job);
    }

    /// Waits until something has happened.
    fn wait(&mut self, plan: &Plan) -> Vec<Event> {
        let stopped = plan.stopped().is_some();
        loop {
            let now = Instant::now();
            if !stopped && self.driver.store.reporter().is_cancelled() {
                return vec![Event::Interrupt];
            }
            if self.poll_at.is_some_and(|at| at <= now) {
                self.poll_at = None;
                return vec![Event::Poll];
            }
            let patience = self.poll_at.map_or(LOOK_UP, |at| LOOK_UP.min(at - now));
            match self.finished.recv_timeout(patience) {
                Ok(first) => {
                    let mut all: Vec<Event> = std::iter::once(first).chain(self.finished.try_iter()).collect();
                    self.running -= all.len();
                    self.idle += all.len();
                    // A builder may have heard of it before us: then it has not failed, but was stopped.
                    if !stopped && self.driver.store.reporter().is_cancelled() {
                        all.insert(0, Event::Interrupt);
                    }
                    return all;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return vec![Event::Interrupt],
            }
        }
    }
}

impl Driver<'_> {
    fn tell(&self, notice: &Notice) {
        let reporter = self.store.reporter();
        let dir = self.store.dir();
        match notice {
            Notice::Failed(error) => self.listener.failed(&error.text(dir).to_string()),
            Notice::WaitsForLock { path } => {
                reporter.message(Level::Error, format_args!("waiting for lock on '{}'...", path.display()));
            }
            Notice::WaitsForUser { drv } => reporter
                .message(Level::Error, format_args!("waiting for a free build user ID for '{}'...", dir.display(drv))),
            Notice::Substituter(text) => reporter.message(Level::Warn, format_args!("{text}")),
        }
    }

    /// The outputs a build is for; names that the derivation does not have are left out.
    fn job(&self, drv_path: &StorePath, wanted: &crate::plan::Wanted, mode: Mode) -> Result<Job, Failure> {
        let drv = self.derivations.get(drv_path).map_err(|error| ask::store_failure(&error))?;
        self.derivations.forget(drv_path);
        let wanted: BTreeSet<OutputName> = drv.outputs.keys().filter(|name| wanted.has(name)).cloned().collect();
        Ok(Job { drv_path: drv_path.clone(), drv: Arc::unwrap_or_clone(drv), wanted, mode })
    }
}
