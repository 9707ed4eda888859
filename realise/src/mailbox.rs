//! Letters between threads.
//!
//! A lock and a condition rather than a channel: channels spin before they sleep, and whoever waits
//! for a build waits long as a rule.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Letters that wait, in the order in which they came; for any number of senders and readers.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    letters: VecDeque<T>,
    /// Threads that wait for one.
    readers: usize,
    closed: bool,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        let state = State { letters: VecDeque::new(), readers: 0, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl<T> Mailbox<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        // A panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a letter in, and wakes one reader.
    pub(crate) fn post(&self, letter: T) {
        let mut state = self.state();
        state.letters.push_back(letter);
        let is_awaited = state.readers > 0;
        drop(state);
        if is_awaited {
            self.changed.notify_one();
        }
    }

    /// The same for a reader that waits and has none to read yet; given back if there is none.
    pub(crate) fn hand(&self, letter: T) -> Result<(), T> {
        let mut state = self.state();
        if state.letters.len() >= state.readers {
            return Err(letter);
        }
        state.letters.push_back(letter);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn readers(&self) -> usize {
        self.state().readers
    }

    /// No letters will come any more; those that are there are still read.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }

    /// The next letter, however long it takes; `None` when there will be no more.
    pub(crate) fn next(&self) -> Option<T> {
        self.wait(None).letters.pop_front()
    }

    /// The next letter, if one comes in time.
    pub(crate) fn next_within(&self, at_most: Duration) -> Option<T> {
        self.wait(Some(at_most)).letters.pop_front()
    }

    /// All letters there are, if there is one in time.
    pub(crate) fn all_within(&self, at_most: Duration) -> VecDeque<T> {
        std::mem::take(&mut self.wait(Some(at_most)).letters)
    }

    /// Until there is a letter, or will be none.
    fn wait(&self, at_most: Option<Duration>) -> MutexGuard<'_, State<T>> {
        let mut state = self.state();
        if !state.letters.is_empty() || state.closed {
            return state;
        }
        let until = at_most.map(|at_most| Instant::now() + at_most);
        state.readers += 1;
        while state.letters.is_empty() && !state.closed {
            state = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        state.readers -= 1;
        state
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    /// Each letter is read once, whoever reads and whenever it came.
    #[test]
    fn every_letter_is_read_once() {
        let mailbox = Mailbox::default();
        let mut read: Vec<u32> = thread::scope(|scope| {
            let readers: Vec<_> =
                (0..3).map(|_| scope.spawn(|| std::iter::from_fn(|| mailbox.next()).collect::<Vec<_>>())).collect();
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    scope.spawn({
                        let mailbox = &mailbox;
                        move || (0..500).for_each(|n| mailbox.post(writer * 500 + n))
                    })
                })
                .collect();
            for writer in writers {
                writer.join().unwrap();
            }
            mailbox.close();
            readers.into_iter().flat_map(|reader| reader.join().unwrap()).collect()
        });
        read.sort_unstable();
        assert_eq!(read, (0..2000).collect::<Vec<_>>());
    }

    /// Who waits for a time only goes on after it, and gets what came meanwhile in order.
    #[test]
    fn in_time_or_not() {
        let mailbox = Mailbox::default();
        assert_eq!(mailbox.next_within(Duration::from_millis(5)), None::<u32>);
        assert!(mailbox.all_within(Duration::ZERO).is_empty());
        (0..3).for_each(|n| mailbox.post(n));
        assert_eq!(mailbox.next_within(Duration::ZERO), Some(0));
        assert_eq!(mailbox.all_within(Duration::from_mins(1)), [1, 2]);
        thread::scope(|scope| {
            scope.spawn(|| mailbox.post(7));
            assert_eq!(mailbox.next_within(Duration::from_mins(1)), Some(7));
        });
        mailbox.close();
        assert_eq!(mailbox.next(), None);
    }
}
