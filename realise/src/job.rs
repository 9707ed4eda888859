//! One build, as the driver asks for it and as the builder's side answers.
//!
//! The driver decides *whether* and *when* (the inputs are valid, a slot is free); the builder's
//! side locks the outputs, looks again, runs the builder and registers what it made.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use larder_core::derivation::{Derivation, OutputName};
use larder_core::store_path::StorePath;

/// Why a build is done at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Some output is missing.
    Normal,
    /// All outputs are valid; are they what the derivation makes (`--check`)?
    Check,
    /// Outputs may be valid, but damaged (`--repair`).
    Repair,
}

/// A build whose inputs are all valid, and temporary roots.
#[derive(Debug, Clone)]
pub struct Job {
    pub drv_path: StorePath,
    pub drv: Derivation,
    /// The outputs that someone wants; never empty.
    pub wanted: BTreeSet<OutputName>,
    /// Were they asked for as all there are, rather than by their names?
    pub wants_all: bool,
    pub mode: Mode,
}

/// What follows a build while it goes on; called from the thread that runs it.
pub trait Watch: Sync {
    /// The builder is about to run; said once all locks are held (building, section 2.14).
    fn started(&self) {}
    /// The same on another machine.
    fn started_on(&self, _machine: &str) {
        self.started();
    }
    /// The builder wrote this, unfiltered.
    fn log(&self, bytes: &[u8]);
    /// Should the build be given up? Asked several times a second.
    fn is_cancelled(&self) -> bool;
}

/// What came of a build.
#[derive(Debug)]
pub enum Outcome {
    /// The builder ran, and all wanted outputs are registered (or, checking, equal).
    Built {
        outputs: BTreeMap<OutputName, StorePath>,
    },
    /// Someone else had made them when we had the locks.
    AlreadyValid {
        outputs: BTreeMap<OutputName, StorePath>,
    },
    /// Another process makes one of the outputs. Nothing is held; try again later.
    Locked {
        path: PathBuf,
    },
    /// All build users are taken. Nothing is held; try again later.
    NoBuildUser,
    Failed(Failure),
}

/// A build that failed.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Failure {
    pub kind: FailureKind,
    /// The whole message, without `error: `; may have several lines.
    pub text: String,
}

/// How a build failed (building, section 13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FailureKind {
    /// The builder says so, and will again.
    Permanent,
    /// The builder says so, but the network or a full disk may be to blame.
    Transient,
    /// `timeout` or `max-silent-time`.
    TimedOut,
    /// A fixed output is not what was promised.
    HashMismatch,
    /// `--check` made something else.
    NotDeterministic,
    LogLimitExceeded,
    /// The builder made something that cannot be an output.
    OutputRejected,
    /// The derivation cannot be built as it is.
    InputRejected,
    /// The result is remembered as failed (`build-cache-failure`).
    Cached,
    /// Anything else: a full disk, a broken store, an interrupt.
    Misc,
    Cancelled,
}
