//! Blocks of bytes from one thread to another.
//!
//! A source that fills blocks gets a thread of its own once it turns out to be long; what is done
//! with the blocks stays on the caller's thread, so that it needs no `Send`. A few blocks go round
//! and are used again: memory is constant, and nothing is copied.

use std::thread;

use crossbeam_channel::bounded;

/// Bytes of a block. Larger ones leave the cache between filling and emptying: copying a file by
/// 256 KiB on one core was measured to take a third more time than by 64 KiB.
pub const BLOCK_BYTES: usize = 64 * 1024;

/// Blocks under way between the two threads.
const BLOCKS: usize = 8;

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
    let on_two = thread::scope(|scope| {
        let (give_full, take_full) = bounded::<Result<(Vec<u8>, bool), X>>(BLOCKS);
        let (give_empty, take_empty) = bounded::<Vec<u8>>(BLOCKS);
        for _ in 0..BLOCKS {
            give_empty.send(Vec::with_capacity(BLOCK_BYTES)).expect("there is room, and the receiver is here");
        }
        // The source is lent, so that it is still here if the thread cannot be started.
        let fill = &mut fill;
        let filler = move || {
            for mut block in take_empty {
                block.clear();
                let result = fill(&mut block).map(|more| (block, more));
                let last = !matches!(result, Ok((_, true)));
                // Nobody takes it: the sink has failed.
                if give_full.send(result).is_err() || last {
                    return;
                }
            }
        };
        thread::Builder::new().name("read".into()).spawn_scoped(scope, filler).ok()?;
        let mut emptied = Vec::with_capacity(RETURNED);
        for result in take_full {
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
                // Nobody takes them: the source has failed, and has said so.
                emptied.drain(..).for_each(|block| drop(give_empty.send(block)));
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
}
