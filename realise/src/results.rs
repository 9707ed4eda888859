//! What came of builds, in the words of the protocols.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use larder_core::api::{BuildMode, BuildResult, BuildStatus, DerivedPath, Outputs};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::driver::{Ended, Listener};
use crate::job::{Failure, FailureKind, Job, Mode};
use crate::plan::{GoalError, Key, Success, Target, Wanted};

impl From<BuildMode> for Mode {
    fn from(mode: BuildMode) -> Self {
        match mode {
            BuildMode::Normal => Self::Normal,
            BuildMode::Repair => Self::Repair,
            BuildMode::Check => Self::Check,
        }
    }
}

impl From<&DerivedPath> for Target {
    fn from(path: &DerivedPath) -> Self {
        match path {
            DerivedPath::Opaque(path) => Self { key: Key::Path(path.clone()), wanted: Wanted::All },
            DerivedPath::Built { drv, outputs } => {
                let wanted = match outputs {
                    Outputs::All => Wanted::All,
                    Outputs::Named(names) => Wanted::Only(names.clone()),
                };
                Self { key: Key::Derivation(drv.clone()), wanted }
            }
        }
    }
}

/// How a build that failed in some way ended.
const fn status(kind: FailureKind) -> BuildStatus {
    match kind {
        FailureKind::Permanent => BuildStatus::PermanentFailure,
        FailureKind::Transient => BuildStatus::TransientFailure,
        FailureKind::TimedOut => BuildStatus::TimedOut,
        FailureKind::HashMismatch | FailureKind::OutputRejected => BuildStatus::OutputRejected,
        FailureKind::NotDeterministic => BuildStatus::NotDeterministic,
        FailureKind::LogLimitExceeded => BuildStatus::LogLimitExceeded,
        FailureKind::InputRejected => BuildStatus::InputRejected,
        FailureKind::Cached => BuildStatus::CachedFailure,
        FailureKind::Misc | FailureKind::Cancelled => BuildStatus::MiscFailure,
    }
}

fn status_of(error: &GoalError) -> BuildStatus {
    match error {
        GoalError::Failed(failure) => status(failure.kind),
        GoalError::Dependencies { .. } | GoalError::NoSource { .. } => BuildStatus::DependencyFailed,
        GoalError::NoSubstituter { .. } | GoalError::References { .. } => BuildStatus::NoSubstituters,
        GoalError::UnknownOutputs { .. } | GoalError::NoSuchInput { .. } | GoalError::Unsupported { .. } => {
            BuildStatus::InputRejected
        }
        _ => BuildStatus::MiscFailure,
    }
}

/// Remembers when builders ran.
#[derive(Debug, Default)]
pub struct Times(Mutex<BTreeMap<StorePath, Span>>);

/// Seconds since 1970.
#[derive(Debug, Clone, Copy, Default)]
struct Span {
    start_s: u64,
    stop_s: u64,
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Times {
    fn change(&self, drv: &StorePath, change: impl FnOnce(&mut Span)) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(all.entry(drv.clone()).or_default());
    }

    /// What came of a target, but for the outputs.
    pub fn result(&self, ended: &Ended, dir: &StoreDir) -> BuildResult {
        let (status, error) = match &ended.result {
            Some(Ok(Success::Built)) => (BuildStatus::Built, String::new()),
            Some(Ok(Success::Substituted)) => (BuildStatus::Substituted, String::new()),
            Some(Ok(Success::AlreadyValid)) => (BuildStatus::AlreadyValid, String::new()),
            Some(Err(error)) => (status_of(error), error.text(dir).to_string()),
            // It was given up when another target failed.
            None => (BuildStatus::MiscFailure, String::new()),
        };
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let span = match &ended.target.key {
            Key::Derivation(drv) => all.get(drv).copied(),
            Key::Path(_) => None,
        };
        let Span { start_s, stop_s } = span.unwrap_or_default();
        BuildResult {
            status,
            error,
            times_built: u64::from(span.is_some()),
            start_time_s: start_s,
            stop_time_s: stop_s,
            is_non_deterministic: status == BuildStatus::NotDeterministic,
            ..BuildResult::default()
        }
    }
}

impl Listener for Times {
    fn started(&self, job: &Job) {
        self.change(&job.drv_path, |span| span.start_s = now_s());
    }
    fn ended(&self, drv: &StorePath, _how: Result<(), &Failure>) {
        self.change(drv, |span| span.stop_s = now_s());
    }
}
