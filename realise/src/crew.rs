//! Threads that do one piece of work at a time each, and wait a while for the next one, which saves
//! starting threads.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::mailbox::Mailbox;

pub(crate) type Work = Box<dyn FnOnce() + Send>;

/// How long a thread waits for work before it ends. (In tests as long as it takes.)
const IDLE: Duration = Duration::from_secs(if cfg!(test) { 600 } else { 2 });

/// Threads that wait, and those that work and may wait again.
#[derive(Default)]
pub(crate) struct Crew(Arc<Mailbox<Work>>);

impl fmt::Debug for Crew {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Crew").finish_non_exhaustive()
    }
}

impl Crew {
    /// Has a thread do this at once: one that waits, or a new one.
    pub(crate) fn call(&self, work: Work) -> io::Result<()> {
        let Err(work) = self.0.hand(work) else { return Ok(()) };
        let mailbox = Arc::clone(&self.0);
        let run = move || {
            let mut next = Some(work);
            while let Some(work) = next {
                work();
                next = mailbox.next_within(IDLE);
            }
        };
        thread::Builder::new().name("shared build".to_owned()).spawn(run).map(drop)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::{Barrier, mpsc};

    use super::*;

    /// Nobody waits for another to end, and who has ended is called again.
    #[test]
    fn all_work_is_done_at_once_and_threads_work_again() {
        let crew = Crew::default();
        let (told, hear) = mpsc::channel();
        let mut all = HashSet::new();
        for round in 0..3 {
            let gate = Arc::new(Barrier::new(9));
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
            while crew.0.readers() < 8 {
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
