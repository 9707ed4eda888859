//! What is known of one goal.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use larder_core::derivation::OutputName;
use larder_core::store_path::StorePath;

use super::error::GoalError;
use super::{Facts, Known, Success};
use crate::job::Mode;

/// Which outputs of a derivation someone wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    All,
    Only(BTreeSet<OutputName>),
}

impl Wanted {
    pub fn has(&self, name: &OutputName) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(name),
        }
    }

    /// Adds what another wants; says whether that is anything new.
    pub fn add(&mut self, other: &Self) -> bool {
        match (&mut *self, other) {
            (Self::All, _) => false,
            (Self::Only(_), Self::All) => {
                *self = Self::All;
                true
            }
            (Self::Only(names), Self::Only(more)) => {
                let before = names.len();
                names.extend(more.iter().cloned());
                names.len() > before
            }
        }
    }
}

/// What is to be made valid.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Key {
    /// Fetch a path.
    Path(StorePath),
    /// Fetch or build outputs of a derivation.
    Derivation(StorePath),
}

impl Key {
    pub fn path(&self) -> &StorePath {
        match self {
            Self::Path(path) | Self::Derivation(path) => path,
        }
    }

    fn rank(&self) -> (bool, &str, &StorePath) {
        (matches!(self, Self::Derivation(_)), self.path().name().as_str(), self.path())
    }
}

/// Paths before derivations, by name, then by the whole path: `aardvark` before `baboon`.
impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The number of a goal.
pub(super) type Id = u32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Asked the driver what outputs there are, or for an offer.
    Asking,
    /// Waits for the `.drv` file itself.
    FetchingDrv,
    /// Asked for the inputs.
    Reading,
    /// Waits for outputs to be fetched.
    FetchingOutputs,
    /// Asked others as what they have built outputs.
    AskingRealisations,
    /// Waits for what they have built to be fetched.
    FetchingRealised,
    /// Asked to note what they have built.
    Registering,
    AwaitingInputs,
    /// Asked what it becomes with its inputs.
    Resolving,
    /// Waits for what it has become.
    AwaitingResolved,
    /// Asked to note what it was built as.
    Noting,
    /// Waits for what the path will refer to.
    AwaitingReferences,
    /// Could run, and waits for a slot, or for someone elsewhere.
    Ready,
    /// Someone was asked to have it built elsewhere.
    Offered,
    /// It is being built elsewhere.
    RunningElsewhere,
    /// Another goal of this run makes one of its paths.
    Beaten,
    Running,
    /// Waits for another process.
    Parked,
    /// Asked what in the output closure is damaged.
    Surveying,
    RepairingClosure,
    Done,
}

/// Whether fetching is tried again once the inputs are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    No,
    Due,
    Used,
}

/// Someone who waits: a goal, and its how-manieth waiting it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waiter {
    pub(super) id: Id,
    pub(super) epoch: u32,
}

/// What a goal waits for.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    pub(super) epoch: u32,
    pub(super) left: usize,
    pub(super) real: usize,
    pub(super) nobody: usize,
    pub(super) incomplete: usize,
    /// Is it over already?
    pub(super) over: bool,
}

impl Waiting {
    pub(super) const fn failed(&self) -> usize {
        self.real + self.nobody + self.incomplete
    }
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is something that did or did not happen")]
pub(super) struct Goal {
    pub(super) key: Key,
    pub(super) state: State,
    pub(super) mode: Mode,
    /// For a derivation; a path has one output, so to speak.
    pub(super) wanted: Wanted,
    /// What was wanted when the running action was told, or when the goal was done.
    pub(super) served: Wanted,
    /// Of a target: what the user named.
    pub(super) named: Option<Wanted>,
    pub(super) waiters: Vec<Waiter>,
    pub(super) waiting: Waiting,
    pub(super) result: Option<Result<Success, GoalError>>,
    /// How many paths this run had made when the goal was done.
    pub(super) made_before: usize,
    /// Was its failure told?
    pub(super) told: bool,
    /// Was it told that it waits for another process?
    pub(super) told_parked: bool,

    // Of a derivation.
    pub(super) outputs: BTreeMap<OutputName, Known>,
    pub(super) facts: Option<Arc<Facts>>,
    /// What it has become, and how that went.
    pub(super) resolved: Option<Id>,
    pub(super) tried_fetch: bool,
    /// As what others have built outputs.
    pub(super) realised: BTreeMap<OutputName, StorePath>,
    /// Nobody elsewhere wants to build it.
    pub(super) declined: bool,
    pub(super) again: Again,
    /// More outputs were wanted while some were fetched.
    pub(super) restart: bool,

    // Of a path.
    /// The substituter of the last offer.
    pub(super) at: usize,
    /// Did a substituter fail that should not have?
    pub(super) bad_try: bool,
}

impl Goal {
    pub(super) fn new(key: Key, wanted: Wanted, mode: Mode) -> Self {
        Self {
            key,
            state: State::Asking,
            mode,
            served: wanted.clone(),
            wanted,
            named: None,
            waiters: Vec::new(),
            waiting: Waiting::default(),
            result: None,
            made_before: 0,
            told: false,
            told_parked: false,
            outputs: BTreeMap::new(),
            facts: None,
            resolved: None,
            tried_fetch: false,
            realised: BTreeMap::new(),
            declined: false,
            again: Again::No,
            restart: false,
            at: 0,
            bad_try: false,
        }
    }

    /// The paths that running it would make.
    pub(super) fn makes(&self) -> impl Iterator<Item = &StorePath> {
        let own = match &self.key {
            Key::Path(path) => Some(path),
            Key::Derivation(_) => None,
        };
        own.into_iter().chain(self.outputs.values().map(|known| &known.path))
    }

    /// Wanted outputs that are not valid, or damaged.
    pub(super) fn missing(&self) -> impl Iterator<Item = (&OutputName, &StorePath)> {
        self.outputs.iter().filter(|(name, known)| !known.valid && self.wanted.has(name)).map(|(n, k)| (n, &k.path))
    }

    /// Outputs that someone names and the derivation does not have.
    pub(super) fn unknown(&self, wanted: &Wanted) -> Option<GoalError> {
        let (Key::Derivation(drv), Wanted::Only(names)) = (&self.key, wanted) else { return None };
        let names: BTreeSet<OutputName> =
            names.iter().filter(|name| !self.outputs.contains_key(*name)).cloned().collect();
        (!names.is_empty()).then(|| GoalError::UnknownOutputs { drv: drv.clone(), names })
    }
}
