//! What came of a run.

use std::collections::BTreeSet;
use std::sync::Arc;

use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::job::FailureKind;
use crate::plan::{GoalError, Plan, Stop, Success, Target};

/// What came of each target.
#[derive(Debug)]
pub struct Report {
    pub targets: Vec<Ended>,
    /// In what ways goals failed, also those that are no target.
    pub kinds: BTreeSet<FailureKind>,
    pub stopped: Option<Stop>,
    dir: StoreDir,
}

/// What came of one target.
#[derive(Debug)]
pub struct Ended {
    pub target: Target,
    /// `None`: it was given up.
    pub result: Option<Result<Success, Arc<GoalError>>>,
    told: bool,
}

/// Not all could be realised.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RealiseError {
    #[error("interrupted by the user")]
    Interrupted,
    /// The text is the whole message, and `kinds` say which exit status it has.
    #[error("{text}")]
    Failed { text: String, kinds: BTreeSet<FailureKind> },
}

impl Report {
    pub(super) fn new(plan: &Plan, dir: &StoreDir) -> Self {
        let targets =
            plan.ended().map(|ended| Ended { target: ended.target.clone(), result: ended.result, told: ended.told });
        Self {
            targets: targets.collect(),
            kinds: plan.errors().map(GoalError::kind).collect(),
            stopped: plan.stopped(),
            dir: dir.clone(),
        }
    }

    /// An error if some target is not there. What is not in its text is told to `tell`.
    ///
    /// One failed target: its own error. Several, or one that nobody has: each error, then a
    /// summary.
    pub fn check(&self, mut tell: impl FnMut(&str)) -> Result<(), RealiseError> {
        match self.stopped {
            Some(Stop::Interrupted) => return Err(RealiseError::Interrupted),
            Some(Stop::NoJobs) => {
                let text = "unable to start any build; either increase '--max-jobs' or enable remote builds.\n\
                            https://nixos.org/manual/nix/stable/advanced-topics/distributed-builds.html";
                return Err(RealiseError::Failed { text: text.into(), kinds: self.kinds.clone() });
            }
            Some(Stop::Failed) | None => {}
        }
        let mut failed: BTreeSet<&StorePath> = BTreeSet::new();
        let mut errors: Vec<String> = Vec::new();
        // By name, as goals are worked.
        let mut targets: Vec<&Ended> = self.targets.iter().collect();
        targets.sort_by(|one, other| one.target.key.cmp(&other.target.key));
        for ended in targets {
            if matches!(ended.result, Some(Ok(_))) {
                continue;
            }
            let first = failed.insert(ended.target.key.path());
            if let Some(Err(error)) = &ended.result
                && !ended.told
                && error.speaks()
                && first
            {
                errors.push(error.text(&self.dir).to_string());
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        let mut errors = errors.into_iter();
        let text = match (failed.len(), errors.next()) {
            (1, Some(only)) => only,
            // Nix keeps the first, in case there is no other, and so tells it last.
            (_, first) => {
                for text in errors.chain(first) {
                    tell(&text);
                }
                let names: Vec<String> = failed.iter().map(|path| format!("'{}'", self.dir.display(path))).collect();
                format!("build of {} failed", names.join(", "))
            }
        };
        Err(RealiseError::Failed { text, kinds: self.kinds.clone() })
    }
}
