//! Threads that do one sort of work, made as they are needed.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::{self, Scope};

use larder_core::store_path::StorePath;

use crate::mailbox::Mailbox;
use crate::plan::Event;

pub(super) const NO_THREAD: &str = "cannot start a thread";

/// Work for threads.
pub(super) struct Pool<'s, T> {
    tasks: Arc<Mailbox<T>>,
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
        done: &Arc<Mailbox<Event>>,
        key: fn(&T) -> &StorePath,
        broken: impl Fn(StorePath) -> Event + Send + Clone + 's,
        work: impl Fn(T, &Mailbox<Event>) + Send + Clone + 's,
    ) -> Self {
        let tasks = Arc::new(Mailbox::<T>::default());
        let (waiting, done) = (Arc::clone(&tasks), Arc::clone(done));
        let spawn = move || {
            let (waiting, done) = (Arc::clone(&waiting), Arc::clone(&done));
            let (work, broken) = (work.clone(), broken.clone());
            let run = move || {
                while let Some(task) = waiting.next() {
                    // A thread that dies must not leave the others waiting for it.
                    let path = key(&task).clone();
                    if std::panic::catch_unwind(AssertUnwindSafe(|| work(task, &done))).is_err() {
                        done.post(broken(path));
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
        self.tasks.post(task);
        Ok(())
    }

    /// A task has been answered.
    pub(super) fn is_back(&mut self) {
        self.idle = (self.idle + 1).min(self.threads);
    }
}

impl<T> Drop for Pool<'_, T> {
    fn drop(&mut self) {
        self.tasks.close();
    }
}
