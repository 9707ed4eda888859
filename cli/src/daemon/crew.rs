//! Threads that serve clients, one client at a time each.
//!
//! A thread that has served one waits for another for a while, which saves starting one. A lock and
//! a condition rather than a channel: channels spin before they sleep, and whoever waits here waits
//! long as a rule.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// The serving of one client.
pub(super) type Work = Box<dyn FnOnce() + Send>;

/// How long a thread waits for another client before it ends. (In tests as long as it takes.)
const IDLE: Duration = Duration::from_secs(if cfg!(test) { 600 } else { 2 });

/// Threads that wait, and those that work and may wait again. Clones are the same.
#[derive(Clone, Default)]
pub(super) struct Crew(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to do.
    called: Condvar,
}

#[derive(Default)]
struct State {
    /// Never more than there are threads that wait.
    work: VecDeque<Work>,
    waiting: usize,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is to do next; `None` if nothing comes in time.
    fn next(&self) -> Option<Work> {
        let mut state = self.state();
        state.waiting += 1;
        let mut is_late = false;
        loop {
            // Also if time is up: it was given out by number.
            if let Some(work) = state.work.pop_front() {
                state.waiting -= 1;
                return Some(work);
            }
            if is_late {
                state.waiting -= 1;
                return None;
            }
            let (locked, waited) = self.called.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            (state, is_late) = (locked, waited.timed_out());
        }
    }
}

impl Crew {
    /// Has a thread do this: one that waits, or a new one.
    pub(super) fn call(&self, work: Work) -> io::Result<()> {
        let mut state = self.0.state();
        if state.work.len() < state.waiting {
            state.work.push_back(work);
            drop(state);
            self.0.called.notify_one();
            return Ok(());
        }
        drop(state);
        let shared = Arc::clone(&self.0);
        let run = move || {
            let mut next = Some(work);
            while let Some(work) = next {
                work();
                next = shared.next();
            }
        };
        thread::Builder::new().name("client".to_owned()).spawn(run).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::mpsc;

    use super::*;

    /// Nobody waits for another to end, and who has ended is called again.
    #[test]
    fn all_work_is_done_at_once_and_threads_serve_again() {
        let crew = Crew::default();
        let (told, hear) = mpsc::channel();
        let mut all = HashSet::new();
        for round in 0..3 {
            let gate = Arc::new(std::sync::Barrier::new(9));
            for _ in 0..8 {
                let (gate, told) = (Arc::clone(&gate), told.clone());
                crew.call(Box::new(move || {
                    gate.wait();
                    told.send(thread::current().id()).unwrap();
                }))
                .unwrap();
            }
            // All of them come here, so each has a thread of its own.
            gate.wait();
            let threads: HashSet<_> = (0..8).map(|_| hear.recv().unwrap()).collect();
            assert_eq!(threads.len(), 8, "round {round}");
            all.extend(threads);
            // Until they wait.
            while crew.0.state().waiting < 8 {
                thread::yield_now();
            }
        }
        assert_eq!(all.len(), 8, "threads that waited were not called");
    }

    /// Work that panics costs its thread, and no other.
    #[test]
    fn a_panic_is_the_end_of_one_thread() {
        let crew = Crew::default();
        let (told, hear) = mpsc::channel();
        crew.call(Box::new(|| std::panic::resume_unwind(Box::new("no more")))).unwrap();
        crew.call(Box::new(move || told.send(()).unwrap())).unwrap();
        hear.recv().unwrap();
    }
}
