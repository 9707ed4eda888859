//! What a plan is told and what it asks for: options, events and actions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use larder_core::derivation::OutputName;
use larder_core::machines::Needs;
use larder_core::store_path::StorePath;

use super::error::GoalError;
use super::goal::{Key, Wanted};
use crate::job::{Failure, Mode};

/// How to go about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "settings are what they are")]
pub struct Options {
    pub mode: Mode,
    /// Fetch at all?
    pub substitute: bool,
    /// Is there anyone to fetch from? If not, nobody is asked.
    pub has_substituters: bool,
    /// Build what could not be fetched, even if a substituter should have had it.
    pub fallback: bool,
    pub keep_going: bool,
    /// Builds at once on this machine.
    pub max_jobs: u32,
    /// Is there anyone who may have builds done elsewhere? They need no slot here.
    pub delegates: bool,
    /// Paths that are fetched at once, beside builds; one at least.
    pub max_fetches: u32,
    /// The store cannot be written to.
    pub read_only: bool,
}

/// Something the user wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub key: Key,
    /// For a derivation.
    pub wanted: Wanted,
}

/// An output, and whether it is valid (one whose path is not known is not: the path is one that no
/// other output has, until it is built); repairing, whether it also is undamaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    pub path: StorePath,
    pub valid: bool,
}

/// What is written in a derivation, and follows from it and this machine.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is so or not")]
pub struct Facts {
    pub inputs: BTreeMap<StorePath, BTreeSet<OutputName>>,
    /// Sources that are not valid.
    pub missing_sources: BTreeSet<StorePath>,
    pub allow_substitutes: bool,
    /// Nobody knows where its outputs will be, but others may be asked as what they have built them.
    pub asks_realisations: bool,
    /// Why it cannot be built on this machine, whatever is done.
    pub unsupported: Option<Arc<str>>,
    /// What a machine must be to build it. `None`: no other machine can be asked to.
    pub needs: Option<Arc<Needs>>,
    /// It is to be built on this machine if it can be.
    pub prefers_local: bool,
    /// It is not built itself, but what it becomes once the paths of its inputs are known.
    pub resolves: bool,
}

/// What a substituter says about a path.
#[derive(Debug)]
pub enum Offer {
    /// It is there already.
    Valid,
    /// The substituter of this number has it, and it refers to these.
    From { substituter: usize, references: BTreeSet<StorePath> },
    /// Nobody after the last one asked has it.
    Nobody,
    /// The substituter of this number did not answer as it should.
    Error { substituter: usize, failure: Failure },
}

/// How fetching from one substituter ended.
#[derive(Debug)]
pub enum Fetched {
    Done,
    /// It says it has it, but has not.
    Gone,
    Failed(Failure),
    /// Another process is at it.
    Locked(PathBuf),
}

/// How a build ended, as far as the plan is concerned.
#[derive(Debug)]
pub enum Built {
    /// These outputs are valid now, and where; `made` here, or by someone else.
    Valid {
        outputs: BTreeMap<OutputName, StorePath>,
        made: bool,
    },
    Failed(Failure),
    Locked(PathBuf),
    NoBuildUser,
}

/// What came of a build that was to be done elsewhere.
#[derive(Debug)]
pub enum Delegated {
    /// Another machine will do it; how it ended is said later, in the same way.
    Accepted,
    /// It has to be done here.
    Declined,
    /// So have all others.
    DeclinedForever,
    /// All machines that could do it are busy.
    Postponed,
    Ended(Built),
}

/// What has happened. But for the first and the last two, each answers an [`Action`].
#[derive(Debug)]
pub enum Event {
    /// Said once, at first.
    Realise(Vec<Target>),
    /// `None`: the derivation itself is not valid.
    Outputs {
        drv: StorePath,
        answer: Result<Option<BTreeMap<OutputName, Known>>, Failure>,
    },
    Inputs {
        drv: StorePath,
        answer: Result<Facts, Failure>,
    },
    /// What is damaged in the closure of the outputs, and what may make it anew.
    Closure {
        drv: StorePath,
        answer: Result<Vec<(StorePath, Option<StorePath>)>, Failure>,
    },
    Offer {
        path: StorePath,
        offer: Offer,
    },
    Fetched {
        path: StorePath,
        fetched: Fetched,
    },
    Built {
        drv: StorePath,
        built: Built,
    },
    /// Said once, or twice if the first answer is [`Delegated::Accepted`].
    Delegated {
        drv: StorePath,
        answer: Delegated,
    },
    /// What the derivation becomes: another one, which is valid.
    Resolved {
        drv: StorePath,
        answer: Result<StorePath, Failure>,
    },
    /// The outputs of what it became are known to be its own.
    Realised {
        drv: StorePath,
        answer: Result<BTreeMap<OutputName, Known>, Failure>,
    },
    /// As what others have built the outputs asked for; those that nobody has are left out.
    Realisations {
        drv: StorePath,
        answer: Result<BTreeMap<OutputName, StorePath>, Failure>,
    },
    /// What others have built is noted.
    Registered {
        drv: StorePath,
        answer: Result<(), Failure>,
    },
    /// The time to look again at what waits for other processes.
    Poll,
    /// The user wants to stop.
    Interrupt,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub enum Action {
    /// Is the derivation valid, and which outputs has it? All become temporary roots first.
    /// `verify`: also read the contents of those wanted.
    AskOutputs {
        drv: StorePath,
        verify: Option<Wanted>,
    },
    AskInputs {
        drv: StorePath,
    },
    AskClosure {
        drv: StorePath,
    },
    /// Write down what the derivation becomes with its inputs where they are.
    Resolve {
        drv: StorePath,
        inputs: BTreeMap<(StorePath, OutputName), StorePath>,
    },
    /// Note that the outputs of one derivation are those of another, which became it.
    Realised {
        drv: StorePath,
        outputs: BTreeMap<OutputName, StorePath>,
        inputs: BTreeMap<(StorePath, OutputName), StorePath>,
    },
    /// Is it valid, or who has it? Substituters up to and with number `after` were tried.
    /// `verify`: being valid is not enough.
    AskOffer {
        path: StorePath,
        after: Option<usize>,
        verify: bool,
    },
    /// As what have others built these outputs?
    AskRealisations {
        drv: StorePath,
        outputs: BTreeSet<OutputName>,
    },
    /// Note as what others have built outputs; the paths are valid by now.
    Register {
        drv: StorePath,
        outputs: BTreeMap<OutputName, StorePath>,
    },
    Fetch {
        path: StorePath,
        substituter: usize,
        replace: bool,
    },
    Build {
        drv: StorePath,
        wanted: Wanted,
        mode: Mode,
    },
    /// Have it built elsewhere. Never asked for a second one before the first is answered.
    /// `willing`: there is a slot for it here.
    Delegate {
        drv: StorePath,
        wanted: Wanted,
        willing: bool,
    },
    /// Stop builds and fetching; each still answers.
    CancelAll,
    /// Say [`Event::Poll`] after some time. Never asked for twice at once.
    PollLater,
    Tell(Notice),
}

/// Something the user may want to know now.
#[derive(Debug, Clone)]
pub enum Notice {
    /// A goal failed for which others wait, so that its error would not be seen otherwise.
    Failed(Arc<GoalError>),
    WaitsForLock {
        path: PathBuf,
    },
    WaitsForUser {
        drv: StorePath,
    },
    WaitsForMachine {
        drv: StorePath,
    },
    /// A substituter failed, and others are tried, or the path is built.
    Substituter(Arc<str>),
}

/// How a goal went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Success {
    Built,
    Substituted,
    AlreadyValid,
}

/// Why a run ended before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// A target failed, and not `keep_going`.
    Failed,
    /// Nothing could run: no slots.
    NoJobs,
    Interrupted,
}

/// How a target ended.
#[derive(Debug)]
pub struct Ended<'a> {
    pub target: &'a Target,
    /// `None`: it was given up before.
    pub result: Option<Result<Success, Arc<GoalError>>>,
    /// Was the error told already, in a [`Notice`]?
    pub told: bool,
}
