//! What programs that follow a run are told of it as a whole: how many builds there are to be, and
//! how far they are.
//!
//! The activities and their order are those of Nix; source: protocols, section 2.4.

use std::sync::{Mutex, PoisonError};

use larder_core::report::{Activity, ActivityResult, Level, Reporter, Start};

/// The activities of one run; they end with this value.
pub(super) struct Activities<'a> {
    reporter: &'a dyn Reporter,
    realise: u64,
    builds: u64,
    copies: u64,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    done: u64,
    expected: u64,
    running: u64,
    failed: u64,
}

impl<'a> Activities<'a> {
    pub(super) fn begin(reporter: &'a dyn Reporter) -> Self {
        let start = |activity| reporter.start(&Start { level: Level::Error, text: "", activity, parent: 0 });
        let (realise, builds) = (start(Activity::Realise), start(Activity::Builds));
        Self { reporter, realise, builds, copies: start(Activity::CopyPaths), counts: Mutex::default() }
    }

    /// One more derivation is likely to be built.
    pub(super) fn expect(&self) {
        self.change(|counts| counts.expected += 1);
    }

    pub(super) fn started(&self) {
        self.change(|counts| counts.running += 1);
    }

    pub(super) fn ended(&self, well: bool) {
        self.change(|counts| {
            counts.running = counts.running.saturating_sub(1);
            *(if well { &mut counts.done } else { &mut counts.failed }) += 1;
        });
    }

    fn change(&self, change: impl FnOnce(&mut Counts)) {
        // Told under the lock, so that the last word is the newest.
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut counts);
        let Counts { done, expected, running, failed } = *counts;
        let expected = expected.max(done + running);
        self.reporter.result(self.builds, ActivityResult::Progress { done, expected, running, failed });
    }
}

impl Drop for Activities<'_> {
    fn drop(&mut self) {
        for activity in [self.copies, self.builds, self.realise] {
            self.reporter.stop(activity);
        }
    }
}
