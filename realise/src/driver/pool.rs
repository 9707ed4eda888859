//! Threads that do one sort of work, made as they are needed.

use std::panic::AssertUnwindSafe;
use std::thread::{self, Scope};

use crossbeam_channel::{Sender, unbounded};
use larder_core::store_path::StorePath;

use crate::plan::Event;

pub(super) const NO_THREAD: &str = "cannot start a thread";

/// Work for threads.
pub(super) struct Pool<'s, T> {
    tasks: Sender<T>,
    /// Threads without a task.
    idle: usize,
    threads: usize,
    most: usize,
    spawn: Box<dyn Fn() -> bool + 's>,
}

impl<'s, T: Send + 's> Pool<'s, T> {
    /// At most so many threads do `work`, which sends an event for each task. `key` and `broken` make
    /// the event of a task over which a thread broke down.
    pub(super) fn new<'e>(
        scope: &'s Scope<'s, 'e>,
        name: &'static str,
        most: impl TryInto<usize>,
        done: &Sender<Event>,
        key: fn(&T) -> &StorePath,
        broken: impl Fn(StorePath) -> Event + Send + Clone + 's,
        work: impl Fn(T, &Sender<Event>) + Send + Clone + 's,
    ) -> Self {
        let (tasks, waiting) = unbounded::<T>();
        let done = done.clone();
        let spawn = move || {
            let (waiting, done, work, broken) = (waiting.clone(), done.clone(), work.clone(), broken.clone());
            let run = move || {
                for task in waiting {
                    // A thread that dies must not leave the others waiting for it.
                    let path = key(&task).clone();
                    if std::panic::catch_unwind(AssertUnwindSafe(|| work(task, &done))).is_err()
                        && done.send(broken(path)).is_err()
                    {
                        return;
                    }
                }
            };
            thread::Builder::new().name(name.to_owned()).spawn_scoped(scope, run).is_ok()
        };
        let most = most.try_into().unwrap_or(usize::MAX).max(1);
        Self { tasks, idle: 0, threads: 0, most, spawn: Box::new(spawn) }
    }

    /// Has a task done. Given back if there can be no thread for it.
    pub(super) fn give(&mut self, task: T) -> Result<(), T> {
        if self.idle > 0 {
            self.idle -= 1;
        } else if self.threads < self.most {
            if (self.spawn)() {
                self.threads += 1;
            } else if self.threads == 0 {
                return Err(task);
            }
        }
        self.tasks.send(task).map_err(|error| error.0)
    }

    /// A task has been answered.
    pub(super) fn is_back(&mut self) {
        self.idle = (self.idle + 1).min(self.threads);
    }
}
