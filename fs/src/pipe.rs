//! Blocks of bytes from one thread to another.
//!
//! A source that fills blocks gets a thread of its own once it turns out to be long; what is done
//! with the blocks stays on the caller's thread, so that it needs no `Send`. A few blocks go round
//! and are used again: memory is constant, and nothing is copied.
//!
//! A lock and two conditions rather than a channel: who has to wait here waits long as a rule
//! (one side is slower than the other), and channels spin before they sleep, which was a
//! twentieth of the time that hashing a large file took.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Bytes of a block. Larger ones leave the cache between filling and emptying: copying a file by
/// 256 KiB on one core was measured to take a third more time than by 64 KiB.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// Blocks under way between the two threads.
const BLOCKS: usize = 12;

/// Blocks that go back to be filled at once: each time wakes the other thread, which costs more
/// than it takes to read a block.
const RETURNED: usize = BLOCKS / 2;

/// Blocks that are dealt with before a second thread is worth its start.
const ALONE: usize = 8;

/// Calls `fill` until it says that nothing more comes, and `sink` with each block it has filled.
///
/// `fill` appends at least a byte to a block, of [`BLOCK_BYTES`], or says that nothing more comes.
/// It runs on the caller's thread for the first half a MiB, and on another one from then on (where
/// none can be had, on the caller's). Its error goes to the caller behind the blocks filled before.
/// `sink` can stop all by an error, but a `fill` that waits for something is waited for.
pub fn pump<F, S, X, E>(mut fill: F, mut sink: S) -> Result<(), E>
where
    S: FnMut(&[u8]) -> Result<(), E>,
    F: FnMut(&mut Vec<u8>) -> Result<bool, X> + Send,
    X: Send,
    E: From<X>,
{
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    for _ in 0..ALONE {
        block.clear();
        let more = fill(&mut block)?;
        give(&mut sink, &block)?;
        if !more {
            return Ok(());
        }
    }
    let exchange = Exchange::default();
    let on_two = thread::scope(|scope| {
        // The source is lent, so that it is still here if the thread cannot be started.
        let fill = &mut fill;
        let exchange = &exchange;
        let filler = move || {
            let _gone = Gone(exchange);
            let mut blocks: Vec<Vec<u8>> = Vec::with_capacity(BLOCKS);
            blocks.resize_with(BLOCKS, || Vec::with_capacity(BLOCK_BYTES));
            loop {
                while let Some(mut block) = blocks.pop() {
                    block.clear();
                    let result = fill(&mut block).map(|more| (block, more));
                    let last = !matches!(result, Ok((_, true)));
                    exchange.put_full(result);
                    if last {
                        return;
                    }
                }
                if !exchange.take_empty(&mut blocks) {
                    return;
                }
            }
        };
        thread::Builder::new().name("read".into()).spawn_scoped(scope, filler).ok()?;
        let _gone = Gone(exchange);
        let (mut full, mut emptied) = (Vec::with_capacity(BLOCKS), Vec::with_capacity(BLOCKS));
        while exchange.take_full(&mut full) {
            for result in full.drain(..) {
                let (block, more) = match result {
                    Ok(block_and_more) => block_and_more,
                    Err(error) => return Some(Err(E::from(error))),
                };
                if let Err(error) = give(&mut sink, &block) {
                    return Some(Err(error));
                }
                if !more {
                    return Some(Ok(()));
                }
                emptied.push(block);
                if emptied.len() == RETURNED {
                    exchange.put_empty(&mut emptied);
                }
            }
        }
        // The source panicked, and so does the scope.
        None
    });
    if let Some(done) = on_two {
        return done;
    }
    loop {
        block.clear();
        let more = fill(&mut block)?;
        give(&mut sink, &block)?;
        if !more {
            return Ok(());
        }
    }
}

/// What was filled (is more to come?), or the source's error.
type Filled<X> = Result<(Vec<u8>, bool), X>;

/// Where the two threads meet. Each takes all there is in one go.
struct Exchange<X> {
    state: Mutex<State<X>>,
    filled: Condvar,
    emptied: Condvar,
}

struct State<X> {
    full: Vec<Filled<X>>,
    empty: Vec<Vec<u8>>,
    /// Does the sink wait for full blocks, or the source for empty ones? (Waking nobody is a
    /// system call as well.)
    sink_waits: bool,
    source_waits: bool,
    /// One of the two has ended.
    gone: bool,
}

impl<X> Default for Exchange<X> {
    fn default() -> Self {
        let state = State {
            full: Vec::with_capacity(BLOCKS),
            empty: Vec::with_capacity(BLOCKS),
            sink_waits: false,
            source_waits: false,
            gone: false,
        };
        Self { state: Mutex::new(state), filled: Condvar::new(), emptied: Condvar::new() }
    }
}

impl<X> Exchange<X> {
    /// No panic can happen while it is locked.
    fn lock(&self) -> MutexGuard<'_, State<X>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put_full(&self, filled: Filled<X>) {
        let mut state = self.lock();
        state.full.push(filled);
        let wake = std::mem::take(&mut state.sink_waits);
        drop(state);
        if wake {
            self.filled.notify_one();
        }
    }

    fn put_empty(&self, blocks: &mut Vec<Vec<u8>>) {
        let mut state = self.lock();
        state.empty.append(blocks);
        let wake = std::mem::take(&mut state.source_waits);
        drop(state);
        if wake {
            self.emptied.notify_one();
        }
    }

    /// Waits for full blocks and takes them into `blocks`, which is empty; false if none will come.
    fn take_full(&self, blocks: &mut Vec<Filled<X>>) -> bool {
        let mut state = self.lock();
        while state.full.is_empty() {
            if state.gone {
                return false;
            }
            state.sink_waits = true;
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut state.full, blocks);
        true
    }

    /// The same for empty ones.
    fn take_empty(&self, blocks: &mut Vec<Vec<u8>>) -> bool {
        let mut state = self.lock();
        while !state.gone && state.empty.is_empty() {
            state.source_waits = true;
            state = self.emptied.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::swap(&mut state.empty, blocks);
        !state.gone
    }
}

/// Tells the other side, however this one ends.
struct Gone<'a, X>(&'a Exchange<X>);

impl<X> Drop for Gone<'_, X> {
    fn drop(&mut self) {
        self.0.lock().gone = true;
        self.0.filled.notify_one();
        self.0.emptied.notify_one();
    }
}

fn give<E>(sink: &mut impl FnMut(&[u8]) -> Result<(), E>, block: &[u8]) -> Result<(), E> {
    if block.is_empty() { Ok(()) } else { sink(block) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    enum Failure {
        Source(usize),
        Sink(usize),
    }

    impl From<usize> for Failure {
        fn from(at: usize) -> Self {
            Self::Source(at)
        }
    }

    /// Numbers blocks; fails when told to.
    fn run(blocks: usize, source_fails: Option<usize>, sink_fails: Option<usize>) -> (usize, Result<(), Failure>) {
        let (mut filled, mut seen) = (0, 0);
        let fill = |block: &mut Vec<u8>| {
            if source_fails == Some(filled) {
                return Err(filled);
            }
            block.extend((filled as u64).to_le_bytes());
            filled += 1;
            Ok(filled < blocks)
        };
        let result = pump(fill, |block| {
            assert_eq!(block, (seen as u64).to_le_bytes());
            if sink_fails == Some(seen) {
                return Err(Failure::Sink(seen));
            }
            seen += 1;
            Ok(())
        });
        (seen, result)
    }

    #[test]
    fn blocks_come_in_order_and_errors_behind_them() {
        for blocks in [1, ALONE, ALONE + 1, 1000] {
            assert_eq!(run(blocks, None, None), (blocks, Ok(())));
        }
        for at in [0, ALONE - 1, ALONE, ALONE + BLOCKS, 500] {
            assert_eq!(run(1000, Some(at), None), (at, Err(Failure::Source(at))));
            assert_eq!(run(1000, None, Some(at)), (at, Err(Failure::Sink(at))));
        }
    }

    #[test]
    #[should_panic(expected = "scoped thread panicked")]
    fn a_panic_of_the_source_is_not_lost() {
        let mut filled = 0;
        let fill = |block: &mut Vec<u8>| {
            filled += 1;
            assert!(filled < 100, "enough");
            block.push(1);
            Ok::<_, usize>(true)
        };
        pump(fill, |_| Ok::<_, Failure>(())).unwrap();
    }

    #[test]
    #[should_panic(expected = "the sink is full")]
    fn a_panic_of_the_sink_ends_the_source() {
        let mut seen = 0;
        let fill = |block: &mut Vec<u8>| {
            block.push(1);
            Ok::<_, usize>(true)
        };
        let sink = |_: &[u8]| {
            seen += 1;
            assert!(seen < 100, "the sink is full");
            Ok::<_, Failure>(())
        };
        pump(fill, sink).unwrap();
    }
}
