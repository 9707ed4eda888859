//! What happens when the user presses Ctrl-C, or the process is told to end.
//!
//! SIGINT, SIGTERM and SIGHUP end the process with status 1 and `interrupted by the user`. Work
//! that takes long asks [`Interrupt::check`] now and then, so that it can tidy up; what does not
//! ask, as it waits for a pipe, is cut off after `GRACE`. A store is safe at any point, so being
//! cut off costs disk space until the next collection and nothing else. A second signal does
//! not wait. Source: cli, rule 1.11.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long work may go on after a signal, unless it holds the end back.
const GRACE: Duration = Duration::from_millis(250);

/// How long the last words may take.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How often the state is looked at while the end is held back.
const POLL: Duration = Duration::from_millis(10);

/// The user, or the system, wants the process to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by the user")]
pub struct Interrupted;

/// Tells whether a signal has come. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<State>);

#[derive(Debug, Default)]
struct State {
    raised: AtomicBool,
    /// Is Ctrl-C meant for a pager?
    lent: AtomicBool,
    /// Work under way that must not be cut off.
    held: AtomicU32,
    /// Is SIGHUP a wish to read the settings again?
    reloads: AtomicBool,
    /// How often that was wished.
    hangups: AtomicU32,
    /// Have the last words been said?
    said: AtomicBool,
}

/// While it lives, the first signal does not cut the work off.
#[derive(Debug)]
pub struct Hold<'a>(&'a Interrupt);

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.0.0.held.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Interrupt {
    /// Begins to watch for signals; `ended` says the last words before the process is cut off.
    ///
    /// Also gives SIGCHLD a handler, in case the parent had it ignored: children could not be
    /// waited for. The children themselves get the default back (cli, rule 1.12).
    pub fn watch(ended: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let interrupt = Self::default();
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        signal_hook::flag::register(SIGCHLD, Arc::new(AtomicBool::new(false)))?;
        let watched = interrupt.clone();
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let first = signals.forever().find(|signal| match *signal {
                SIGINT => !watched.is_lent(),
                SIGHUP if watched.0.reloads.load(Ordering::SeqCst) => {
                    watched.0.hangups.fetch_add(1, Ordering::SeqCst);
                    false
                }
                _ => true,
            });
            if first.is_none() {
                return;
            }
            watched.raise();
            let since = Instant::now();
            while since.elapsed() < GRACE || watched.0.held.load(Ordering::SeqCst) > 0 {
                thread::sleep(POLL);
                if signals.pending().next().is_some() {
                    break;
                }
            }
            if watched.claim_last_words() {
                // Whoever reads standard error may have stopped to: then nothing is said.
                let (said_tx, said) = mpsc::channel();
                let saying = thread::Builder::new().name("last words".to_owned()).spawn(move || {
                    ended();
                    said_tx.send(())
                });
                if saying.is_ok() {
                    let _ = said.recv_timeout(LAST_WORDS);
                }
            }
            std::process::exit(1);
        })?;
        Ok(interrupt)
    }

    /// As if a signal had come.
    pub fn raise(&self) {
        self.0.raised.store(true, Ordering::SeqCst);
    }

    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::Relaxed)
    }

    /// An error once a signal has come.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.is_raised() { Err(Interrupted) } else { Ok(()) }
    }

    /// True for the first who asks: only that one tells the user.
    pub fn claim_last_words(&self) -> bool {
        !self.0.said.swap(true, Ordering::SeqCst)
    }

    /// Holds the end back until what it gives is dropped.
    pub fn hold(&self) -> Hold<'_> {
        self.0.held.fetch_add(1, Ordering::SeqCst);
        Hold(self)
    }

    /// The first signal never cuts this process off: it ends by itself, with a status of its own.
    pub fn hold_for_good(&self) {
        std::mem::forget(self.hold());
    }

    /// Leaves Ctrl-C to a program in the foreground (a pager), or takes it back.
    pub fn lend(&self, lent: bool) {
        self.0.lent.store(lent, Ordering::SeqCst);
    }

    /// From now on SIGHUP ends nothing: it is counted.
    pub fn count_hangups(&self) {
        self.0.reloads.store(true, Ordering::SeqCst);
    }

    /// How often SIGHUP came since it is counted.
    pub fn hangups(&self) -> u32 {
        self.0.hangups.load(Ordering::SeqCst)
    }

    fn is_lent(&self) -> bool {
        self.0.lent.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_the_state() {
        let one = Interrupt::default();
        let two = one.clone();
        assert_eq!(two.check(), Ok(()));
        one.raise();
        assert_eq!(two.check(), Err(Interrupted));
        let hold = two.hold();
        assert_eq!(one.0.held.load(Ordering::SeqCst), 1);
        drop(hold);
        assert_eq!(one.0.held.load(Ordering::SeqCst), 0);
    }
}
