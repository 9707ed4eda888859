//! Builds that belong to a process with many clients: what several of them want is built once.
//!
//! A build has a thread to itself, and whoever wants its outputs follows it: hears what it says,
//! the log from its last part on, and what comes of it. It goes on while anybody follows, so a
//! client that goes away cancels what only it wanted. The settings are those of the first. What
//! failed because of these (a time limit, say) is no verdict for the others, who try again.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use larder_core::derivation::Derivation;
use larder_core::report::{Level, Reporter};
use larder_core::store_path::StorePath;
use larder_sandbox::launch::Launcher;
use larder_store::LocalStore;

use crate::build::{self, BuildSettings};
use crate::crew::Crew;
use crate::driver::Builder;
use crate::job::{Failure, FailureKind, Job, Mode, Outcome, Watch};
use crate::mailbox::Mailbox;

/// How often a follower asks whether its own client is still there.
const LOOK_UP: Duration = Duration::from_millis(100);

/// What is kept of a log for followers that come late, in bytes.
const KEPT_LOG_BYTES: usize = 64 << 10;

/// A panic elsewhere leaves nothing half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The builds of a process.
#[derive(Debug, Default)]
pub struct SharedBuilds {
    /// How builders are started; all of a process have one parent.
    pub launcher: Launcher,
    running: Mutex<HashMap<StorePath, Arc<Shared>>>,
    /// How many threads there are; builds that nobody wants any more among them.
    threads: Mutex<usize>,
    changed: Condvar,
    crew: Crew,
}

/// Builds for one client.
#[derive(Debug)]
pub struct Sharing<'a> {
    builds: &'a Arc<SharedBuilds>,
    store: &'a LocalStore,
    settings: Arc<BuildSettings>,
}

/// One build that runs.
struct Shared {
    /// What is built. A client that is trusted may call another derivation by the same path.
    drv: Derivation,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    followers: HashMap<u64, Arc<Mailbox<Said>>>,
    last: u64,
    started: bool,
    log: VecDeque<u8>,
    /// Nobody may follow any more.
    over: bool,
}

/// What a follower hears.
enum Said {
    Started,
    Log(Arc<[u8]>),
    Message(Level, Arc<str>),
    Ended(Arc<Outcome>),
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    fn say(state: &State, what: &dyn Fn() -> Said) {
        for follower in state.followers.values() {
            follower.post(what());
        }
    }

    /// A new follower hears what was said, as far as it is kept.
    fn follow(self: &Arc<Self>, is_first: bool) -> Option<Seat> {
        let mut state = lock(&self.state);
        if state.over {
            return None;
        }
        let from = Arc::new(Mailbox::default());
        if state.started {
            from.post(Said::Started);
        }
        if !state.log.is_empty() {
            let log: Vec<u8> = state.log.iter().copied().collect();
            from.post(Said::Log(log.into()));
        }
        state.last += 1;
        let number = state.last;
        state.followers.insert(number, Arc::clone(&from));
        Some(Seat { build: Arc::clone(self), number, from, is_first })
    }
}

/// The build's own side.
impl Watch for Shared {
    fn started(&self) {
        let mut state = lock(&self.state);
        state.started = true;
        Self::say(&state, &|| Said::Started);
    }

    fn log(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        state.log.extend(bytes);
        if state.log.len() > 2 * KEPT_LOG_BYTES {
            let too_many = state.log.len() - KEPT_LOG_BYTES;
            state.log.drain(..too_many);
            // A line without its beginning would look like another one.
            if let Some(at) = state.log.iter().position(|byte| *byte == b'\n') {
                state.log.drain(..=at);
            }
        }
        let bytes: Arc<[u8]> = bytes.into();
        Self::say(&state, &|| Said::Log(Arc::clone(&bytes)));
    }

    fn is_cancelled(&self) -> bool {
        lock(&self.state).followers.is_empty()
    }
}

/// What the store tells while it takes outputs in. Each follower shows what it wants to.
impl Reporter for Shared {
    fn shows(&self, _level: Level) -> bool {
        true
    }

    fn message(&self, level: Level, text: fmt::Arguments<'_>) {
        let text: Arc<str> = text.to_string().into();
        Self::say(&lock(&self.state), &|| Said::Message(level, Arc::clone(&text)));
    }

    fn is_cancelled(&self) -> bool {
        Watch::is_cancelled(self)
    }
}

/// A follower's place; given up with this value.
struct Seat {
    build: Arc<Shared>,
    number: u64,
    from: Arc<Mailbox<Said>>,
    /// The build is done with this one's settings.
    is_first: bool,
}

impl Drop for Seat {
    fn drop(&mut self) {
        lock(&self.build.state).followers.remove(&self.number);
    }
}

impl SharedBuilds {
    /// Waits until no build runs; not for longer than so long.
    pub fn wait_until_idle(&self, at_most: Duration) {
        drop(self.changed.wait_timeout_while(lock(&self.threads), at_most, |threads| *threads > 0));
    }

    /// Follows the build of this derivation, which is begun if there is none. `None` if another
    /// one is being built by its name.
    fn join(
        self: &Arc<Self>,
        store: &LocalStore,
        settings: &Arc<BuildSettings>,
        job: &Job,
    ) -> Result<Option<Seat>, std::io::Error> {
        let mut running = lock(&self.running);
        if let Some(build) = running.get(&job.drv_path) {
            if build.drv != job.drv {
                return Ok(None);
            }
            if let Some(seat) = build.follow(false) {
                return Ok(Some(seat));
            }
        }
        let build = Arc::new(Shared { drv: job.drv.clone(), state: Mutex::default() });
        let seat = build.follow(true).ok_or(std::io::ErrorKind::NotFound)?;
        let (builds, settings, job) = (Arc::clone(self), Arc::clone(settings), job.clone());
        let drv = job.drv_path.clone();
        // The roots of the client that began it stay as long as it needs them.
        let store = store.with_reporter(Arc::clone(&build) as _);
        let this = Arc::clone(&build);
        *lock(&self.threads) += 1;
        let called = self.crew.call(Box::new(move || {
            let built = AssertUnwindSafe(|| build::run(&store, &settings, &job, &*this));
            let outcome = std::panic::catch_unwind(built).unwrap_or_else(|_| {
                let drv = store.dir().display(&job.drv_path);
                let text = format!("the builder of '{drv}' broke down; this is a bug");
                Outcome::Failed(Failure { kind: FailureKind::Misc, text })
            });
            let outcome = Arc::new(outcome);
            {
                let mut running = lock(&builds.running);
                if running.get(&job.drv_path).is_some_and(|found| Arc::ptr_eq(found, &this)) {
                    running.remove(&job.drv_path);
                }
                let mut state = lock(&this.state);
                state.over = true;
                Shared::say(&state, &|| Said::Ended(Arc::clone(&outcome)));
            }
            drop(store);
            *lock(&builds.threads) -= 1;
            builds.changed.notify_all();
        }));
        if let Err(error) = called {
            *lock(&self.threads) -= 1;
            return Err(error);
        }
        running.insert(drv, build);
        Ok(Some(seat))
    }
}

impl<'a> Sharing<'a> {
    pub fn new(builds: &'a Arc<SharedBuilds>, store: &'a LocalStore, settings: Arc<BuildSettings>) -> Self {
        Self { builds, store, settings }
    }

    /// Follows a build to its end; `None` if it ended in a way that says nothing to this client.
    fn follow(&self, seat: &Seat, job: &Job, watch: &dyn Watch) -> Option<Outcome> {
        loop {
            match seat.from.next_within(LOOK_UP) {
                Some(Said::Started) => watch.started(),
                Some(Said::Log(bytes)) => watch.log(&bytes),
                Some(Said::Message(level, text)) => self.store.reporter().message(level, format_args!("{text}")),
                Some(Said::Ended(outcome)) => return verdict(&outcome, seat.is_first),
                None => {}
            }
            if watch.is_cancelled() {
                let text = format!("build of '{}' was cancelled", self.store.dir().display(&job.drv_path));
                return Some(Outcome::Failed(Failure { kind: FailureKind::Cancelled, text }));
            }
        }
    }
}

/// What an outcome means to a follower. To one who came later, only what does not depend on
/// settings.
fn verdict(outcome: &Outcome, is_first: bool) -> Option<Outcome> {
    let failed = |failure: &Failure| Outcome::Failed(Failure { kind: failure.kind, text: failure.text.clone() });
    Some(match outcome {
        Outcome::Built { outputs } => Outcome::Built { outputs: outputs.clone() },
        Outcome::Failed(failure) if is_first || is_final(failure.kind) => failed(failure),
        _ if !is_first => return None,
        Outcome::AlreadyValid { outputs } => Outcome::AlreadyValid { outputs: outputs.clone() },
        Outcome::Locked { path } => Outcome::Locked { path: path.clone() },
        Outcome::NoBuildUser => Outcome::NoBuildUser,
        Outcome::Failed(failure) => failed(failure),
    })
}

/// Would the build fail for anybody?
const fn is_final(kind: FailureKind) -> bool {
    matches!(
        kind,
        FailureKind::Permanent | FailureKind::Transient | FailureKind::HashMismatch | FailureKind::OutputRejected
    )
}

impl Builder for Sharing<'_> {
    fn build(&self, job: &Job, watch: &dyn Watch) -> Outcome {
        if job.mode != Mode::Normal {
            return build::run(self.store, &self.settings, job, watch);
        }
        loop {
            match self.builds.join(self.store, &self.settings, job) {
                Ok(None) => return build::run(self.store, &self.settings, job, watch),
                Ok(Some(seat)) => {
                    if let Some(outcome) = self.follow(&seat, job, watch) {
                        return outcome;
                    }
                }
                Err(error) => {
                    let text = format!("cannot start a thread for a build: {error}");
                    return Outcome::Failed(Failure { kind: FailureKind::Misc, text });
                }
            }
        }
    }
}
