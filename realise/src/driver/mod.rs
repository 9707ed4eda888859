//! Carries out what a [`Plan`] says: asks the store, runs builders in threads, tells the user.
//!
//! One thread decides; a thread for each running build waits for its builder, and others fetch
//! and ask caches. Questions to the store are answered by the deciding thread, all that are open
//! in one reading of the ledger.
//! Paths become temporary roots before anyone asks whether they are valid, so that no collector
//! can take them away in between.

mod ask;
mod lines;
mod pool;
mod progress;
mod report;
mod resolve;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use larder_core::derivation::OutputName;
use larder_core::realisation::DrvOutput;
use larder_core::report::Level;
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_store::LocalStore;

pub use self::lines::Lines;
use self::pool::Pool;
use self::progress::Activities;
pub use self::report::{Ended, RealiseError, Report};
use self::watch::Watcher;
use crate::derivations::Derivations;
use crate::job::{Failure, FailureKind, Job, Mode, Outcome, Watch};
use crate::mailbox::Mailbox;
use crate::plan::{self, Action, Built, Delegated, Event, Fetched, Notice, Options, Plan, Target};
use crate::substitute::Substituters;

/// How often the driver asks whether the user wants to stop, while it waits for builders.
const LOOK_UP: Duration = Duration::from_millis(100);

/// Runs a builder. Called from several threads at once.
pub trait Builder: Sync {
    fn build(&self, job: &Job, watch: &dyn Watch) -> Outcome;
}

/// What came of a build that was to be done elsewhere.
#[derive(Debug)]
pub enum Offered {
    /// It has to be done here.
    Declined,
    /// So have all others.
    DeclinedForever,
    /// All machines that could do it are busy.
    Postponed,
    /// It is over; `accepted` was called before if another machine did it.
    Ended(Outcome),
}

/// Has builds done on other machines. Called from several threads at once, but for one build after
/// another until `accepted` is called.
pub trait Delegate: Sync {
    /// Offers a build to other machines, and follows it if one takes it, which is when `accepted`
    /// is called. `willing`: there is a slot for it here.
    fn delegate(&self, job: &Job, willing: bool, watch: &dyn Watch, accepted: &dyn Fn()) -> Offered;
}

/// Hears of builds while they go on. Called from several threads at once.
pub trait Listener: Sync {
    /// A builder runs.
    fn started(&self, _job: &Job) {}
    /// It wrote a line, without its end. Escapes are as they came.
    fn line(&self, _drv: &StorePath, _line: &[u8]) {}
    /// A builder that ran has ended, and what it made is registered, or not.
    fn ended(&self, _drv: &StorePath, _how: Result<(), &Failure>) {}
    /// A path of so many bytes is being fetched.
    fn fetching(&self, _path: &StorePath, _nar_size_bytes: u64) {}
    /// That has ended, well or not.
    fn fetched(&self, _path: &StorePath) {}
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
    substituters: Option<&'a dyn Substituters>,
    delegate: Option<&'a dyn Delegate>,
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
        Self { store, settings, builder, listener, derivations, substituters: None, delegate: None, read_only: false }
    }

    /// From whom paths are fetched; without, from nobody.
    #[must_use]
    pub const fn substituters(mut self, substituters: Option<&'a dyn Substituters>) -> Self {
        self.substituters = substituters;
        self
    }

    /// Who has builds done elsewhere; without, all are done here.
    #[must_use]
    pub const fn delegate(mut self, delegate: Option<&'a dyn Delegate>) -> Self {
        self.delegate = delegate;
        self
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
            has_substituters: self.substituters.is_some(),
            fallback: self.settings.fallback,
            keep_going: self.settings.keep_going,
            max_jobs: self.settings.max_jobs.0,
            delegates: self.delegate.is_some(),
            max_fetches: self.settings.max_substitution_jobs,
            read_only: self.read_only,
        };
        let mut plan = Plan::new(options);
        let activities = Activities::begin(self.store.reporter());
        let cancel = AtomicBool::new(false);
        let questions = self.substituters.map_or(1, Substituters::parallel_questions);
        thread::scope(|scope| {
            let done = Arc::new(Mailbox::<Event>::default());
            let (cancel, activities) = (&cancel, &activities);
            let mut run = Run {
                driver: self,
                activities,
                cancel,
                builds: Pool::new(
                    scope,
                    "build",
                    options.max_jobs,
                    &done,
                    |job: &Job| &job.drv_path,
                    |drv| Event::Built { built: Built::Failed(self.broke_down("builder of", &drv)), drv },
                    move |job: Job, done| {
                        let drv = job.drv_path.clone();
                        let built = self.build(&job, cancel, activities);
                        done.post(Event::Built { drv, built });
                    },
                ),
                offers: Pool::new(
                    scope,
                    "offer",
                    usize::MAX,
                    &done,
                    |task: &Offer| &task.job.drv_path,
                    |drv| {
                        let built = Built::Failed(self.broke_down("builder of", &drv));
                        Event::Delegated { drv, answer: Delegated::Ended(built) }
                    },
                    move |task: Offer, done| {
                        let drv = task.job.drv_path.clone();
                        let say = |answer| done.post(Event::Delegated { drv: drv.clone(), answer });
                        say(self.offer(&task, cancel, activities, &|| say(Delegated::Accepted)));
                    },
                ),
                fetches: Pool::new(
                    scope,
                    "fetch",
                    options.max_fetches,
                    &done,
                    |task: &Fetch| &task.path,
                    |path| {
                        let fetched = Fetched::Failed(self.broke_down("fetching of", &path));
                        Event::Fetched { path, fetched }
                    },
                    move |task: Fetch, done| {
                        self.fetch(&task, &|path, fetched| done.post(Event::Fetched { path, fetched }));
                    },
                ),
                questions: Pool::new(
                    scope,
                    "ask",
                    questions,
                    &done,
                    |question: &Question| &question.path,
                    |path| {
                        let failure = self.broke_down("question after", &path);
                        Event::Offer { path, offer: plan::Offer::Error { substituter: 0, failure } }
                    },
                    move |question: Question, done| {
                        let Question { path, after } = question;
                        let offer = self.substituters.map_or(plan::Offer::Nobody, |from| from.offer(&path, after));
                        done.post(Event::Offer { path, offer });
                    },
                ),
                outputs: Pool::new(
                    scope,
                    "ask",
                    questions,
                    &done,
                    |question: &OutputQuestion| &question.drv,
                    |drv| Event::Realisations { answer: Err(self.broke_down("question after", &drv)), drv },
                    move |OutputQuestion { drv, ids }: OutputQuestion, done| {
                        done.post(Event::Realisations { drv, answer: self.built_elsewhere(&ids) });
                    },
                ),
                finished: done,
                poll_at: None,
            };
            run.drive(&mut plan, targets.to_vec());
        });
        drop(activities);
        Report::new(&plan, self.store.dir())
    }

    /// As what others have built outputs.
    fn built_elsewhere(
        &self,
        ids: &BTreeMap<DrvOutput, OutputName>,
    ) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
        let Some(from) = self.substituters else { return Ok(BTreeMap::new()) };
        let found = from.realisations(&ids.keys().cloned().collect::<Vec<_>>())?;
        Ok(found.into_iter().filter_map(|(id, path)| Some((ids.get(&id)?.clone(), path))).collect())
    }

    fn broke_down(&self, what: &str, path: &StorePath) -> Failure {
        let text = format!("the {what} '{}' broke down; this is a bug", self.store.dir().full(path));
        Failure { kind: FailureKind::Misc, text }
    }

    fn fetch(&self, task: &Fetch, done: &dyn Fn(StorePath, Fetched)) {
        let Fetch { path, replace } = task;
        let Some(from) = self.substituters else { return done(path.clone(), Fetched::Gone) };
        self.listener.fetching(path, from.size_bytes(path));
        let ended = |path: StorePath, fetched| {
            self.listener.fetched(&path);
            done(path, fetched);
        };
        from.fetch(path, *replace, &ended, &|text| self.listener.failed(text));
    }

    fn build(&self, job: &Job, cancel: &AtomicBool, activities: &Activities<'_>) -> Built {
        let on_start = || activities.started();
        let watcher = Watcher::new(self.store, self.listener, job, cancel, &on_start);
        let outcome = self.builder.build(job, &watcher);
        Self::ended(outcome, &watcher, activities)
    }

    /// Offers a build to others, and follows it if they take it.
    fn offer(&self, task: &Offer, cancel: &AtomicBool, activities: &Activities<'_>, accepted: &dyn Fn()) -> Delegated {
        let Offer { job, willing } = task;
        let Some(delegate) = self.delegate else { return Delegated::DeclinedForever };
        let on_start = || activities.started();
        let watcher = Watcher::new(self.store, self.listener, job, cancel, &on_start);
        match delegate.delegate(job, *willing, &watcher, accepted) {
            Offered::Declined => Delegated::Declined,
            Offered::DeclinedForever => Delegated::DeclinedForever,
            Offered::Postponed => Delegated::Postponed,
            Offered::Ended(outcome) => Delegated::Ended(Self::ended(outcome, &watcher, activities)),
        }
    }

    fn ended(outcome: Outcome, watcher: &Watcher<'_>, activities: &Activities<'_>) -> Built {
        let built = match outcome {
            Outcome::Built { outputs } => Built::Valid { outputs, made: true },
            Outcome::AlreadyValid { outputs } => Built::Valid { outputs, made: false },
            Outcome::Locked { path } => Built::Locked(path),
            Outcome::NoBuildUser => Built::NoBuildUser,
            Outcome::Failed(failure) => Built::Failed(failure),
        };
        let how = match &built {
            Built::Failed(failure) => Err(failure),
            _ => Ok(()),
        };
        if watcher.end(how) {
            activities.ended(how.is_ok());
        }
        built
    }
}

/// A build that others may do.
struct Offer {
    job: Job,
    willing: bool,
}

/// A path to fetch from whoever offered it.
struct Fetch {
    path: StorePath,
    replace: bool,
}

/// Who has a path?
struct Question {
    path: StorePath,
    after: Option<usize>,
}

/// As what were outputs of a derivation built?
struct OutputQuestion {
    drv: StorePath,
    ids: BTreeMap<DrvOutput, OutputName>,
}

/// One run of a driver.
struct Run<'a, 's> {
    driver: &'a Driver<'a>,
    activities: &'a Activities<'a>,
    cancel: &'a AtomicBool,
    builds: Pool<'s, Job>,
    offers: Pool<'s, Offer>,
    fetches: Pool<'s, Fetch>,
    questions: Pool<'s, Question>,
    outputs: Pool<'s, OutputQuestion>,
    finished: Arc<Mailbox<Event>>,
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
        let (mut outputs, mut offers) = (Vec::new(), Vec::new());
        for action in actions {
            match action {
                Action::AskOutputs { drv, verify } => outputs.push((drv, verify)),
                Action::AskInputs { drv } => {
                    self.activities.expect();
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
                Action::AskRealisations { drv, outputs } => {
                    let failure = || Failure { kind: FailureKind::Misc, text: pool::NO_THREAD.to_owned() };
                    let given = driver.ids(&drv, &outputs).and_then(|ids| {
                        self.outputs.give(OutputQuestion { drv: drv.clone(), ids }).map_err(|_| failure())
                    });
                    if let Err(failure) = given {
                        events.push_back(Event::Realisations { drv, answer: Err(failure) });
                    }
                }
                Action::Register { drv, outputs } => {
                    let answer = driver.register(&drv, &outputs);
                    events.push_back(Event::Registered { drv, answer });
                }
                Action::AskOffer { path, after, verify } => offers.push(ask::OfferAsked { path, after, verify }),
                Action::Fetch { path, replace, .. } => {
                    if let Err(task) = self.fetches.give(Fetch { path, replace }) {
                        let failure = Failure { kind: FailureKind::Misc, text: pool::NO_THREAD.to_owned() };
                        events.push_back(Event::Fetched { path: task.path, fetched: Fetched::Failed(failure) });
                    }
                }
                Action::Build { drv, wanted, mode } => match driver.job(&drv, &wanted, mode) {
                    Ok(job) => {
                        if let Err(job) = self.builds.give(job) {
                            let failure = Failure { kind: FailureKind::Misc, text: pool::NO_THREAD.to_owned() };
                            events.push_back(Event::Built { drv: job.drv_path, built: Built::Failed(failure) });
                        }
                    }
                    Err(failure) => events.push_back(Event::Built { drv, built: Built::Failed(failure) }),
                },
                Action::Delegate { drv, wanted, willing } => {
                    let ended = |failure| Delegated::Ended(Built::Failed(failure));
                    let given = driver.job(&drv, &wanted, Mode::Normal).map_err(ended).and_then(|job| {
                        let failure = || Failure { kind: FailureKind::Misc, text: pool::NO_THREAD.to_owned() };
                        self.offers.give(Offer { job, willing }).map_err(|_| ended(failure()))
                    });
                    if let Err(answer) = given {
                        events.push_back(Event::Delegated { drv, answer });
                    }
                }
                Action::CancelAll => {
                    self.cancel.store(true, Ordering::SeqCst);
                    if let Some(from) = driver.substituters {
                        from.stop();
                    }
                }
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
        if !offers.is_empty() {
            for ask::OfferAsked { path, after, .. } in driver.offers(offers, events) {
                if let Err(question) = self.questions.give(Question { path, after }) {
                    let failure = Failure { kind: FailureKind::Misc, text: pool::NO_THREAD.to_owned() };
                    let offer = plan::Offer::Error { substituter: 0, failure };
                    events.push_back(Event::Offer { path: question.path, offer });
                }
            }
        }
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
            let mut all = Vec::from(self.finished.all_within(patience));
            if all.is_empty() {
                continue;
            }
            for event in &all {
                match event {
                    Event::Built { .. } => self.builds.is_back(),
                    Event::Delegated { answer: Delegated::Accepted, .. } => {}
                    Event::Delegated { .. } => self.offers.is_back(),
                    Event::Fetched { .. } => self.fetches.is_back(),
                    Event::Realisations { .. } => self.outputs.is_back(),
                    _ => self.questions.is_back(),
                }
            }
            // A builder may have heard of it before us: then it has not failed, but was stopped.
            if !stopped && self.driver.store.reporter().is_cancelled() {
                all.insert(0, Event::Interrupt);
            }
            return all;
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
            Notice::WaitsForMachine { drv } => {
                reporter
                    .message(Level::Error, format_args!("waiting for a machine to build '{}'...", dir.display(drv)));
            }
            Notice::Substituter(text) => self.listener.failed(text),
        }
    }

    /// The outputs a build is for; names that the derivation does not have are left out.
    fn job(&self, drv_path: &StorePath, wanted: &crate::plan::Wanted, mode: Mode) -> Result<Job, Failure> {
        let drv = self.derivations.get(drv_path).map_err(|error| ask::store_failure(&error))?;
        self.derivations.forget(drv_path);
        let wants_all = *wanted == crate::plan::Wanted::All;
        let wanted: BTreeSet<OutputName> = drv.outputs.keys().filter(|name| wanted.has(name)).cloned().collect();
        Ok(Job { drv_path: drv_path.clone(), drv: Arc::unwrap_or_clone(drv), wanted, wants_all, mode })
    }
}
