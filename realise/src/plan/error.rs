//! Why a goal failed.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use larder_core::derivation::OutputName;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::job::{Failure, FailureKind};

/// Why a goal failed. [`GoalError::text`] is what Nix says.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum GoalError {
    /// What the builder's side, a substituter or the store said.
    Failed(Arc<Failure>),
    MissingDerivation {
        drv: StorePath,
    },
    UnknownOutputs {
        drv: StorePath,
        names: BTreeSet<OutputName>,
    },
    /// An input has no output of that name.
    NoSuchInput {
        drv: StorePath,
        input: StorePath,
        name: OutputName,
    },
    Dependencies {
        drv: StorePath,
        count: usize,
    },
    /// A source is missing, and nothing may be fetched.
    NoSource {
        drv: StorePath,
        path: StorePath,
    },
    /// Fetching outputs failed for a real reason, and `fallback` is off.
    Substitutes {
        drv: StorePath,
    },
    /// `--check` of something that was not built yet.
    NotAllValid {
        drv: StorePath,
    },
    /// Of another system, or with features that this machine does not have.
    Unsupported {
        text: Arc<str>,
    },
    /// What the derivation became could not be built.
    Resolved {
        drv: StorePath,
    },
    /// Some path in the output closure is damaged and stays so.
    ClosureNotRepaired {
        drv: StorePath,
    },
    NoSubstituter {
        path: StorePath,
        tried: bool,
    },
    /// The path itself could be fetched, but not all of what it refers to.
    References {
        path: StorePath,
        incomplete: bool,
    },
    ReadOnly {
        path: StorePath,
    },
    /// Goals that wait for each other.
    Cycle {
        path: StorePath,
    },
}

impl GoalError {
    /// The message, without `error: `; may have several lines.
    pub fn text<'a>(&'a self, dir: &'a StoreDir) -> impl fmt::Display + 'a {
        let full = move |path: &'a StorePath| dir.display(path);
        fmt::from_fn(move |f| match self {
            Self::Failed(failure) => f.write_str(&failure.text),
            Self::MissingDerivation { drv } => write!(f, "cannot build missing derivation '{}'", full(drv)),
            Self::UnknownOutputs { drv, names } => {
                write!(f, "derivation '{}' does not have wanted outputs ", full(drv))?;
                for (n, name) in names.iter().enumerate() {
                    write!(f, "{}'{name}'", if n > 0 { ", " } else { "" })?;
                }
                Ok(())
            }
            Self::NoSuchInput { drv, input, name } => write!(
                f,
                "derivation '{}' requires non-existent output '{name}' from input derivation '{}'",
                full(drv),
                full(input)
            ),
            Self::Dependencies { drv, count } => {
                write!(f, "{count} dependencies of derivation '{}' failed to build", full(drv))
            }
            Self::NoSource { drv, path } => {
                write!(f, "dependency '{}' of '{}' does not exist, and substitution is disabled", full(path), full(drv))
            }
            Self::Substitutes { drv } => write!(
                f,
                "some substitutes for the outputs of derivation '{}' failed (usually happens due to networking \
                 issues); try '--fallback' to build derivation from source",
                full(drv)
            ),
            Self::NotAllValid { drv } => {
                write!(f, "some outputs of '{}' are not valid, so checking is not possible", full(drv))
            }
            Self::Unsupported { text } => f.write_str(text),
            Self::Resolved { drv } => write!(f, "build of '{}' failed", full(drv)),
            Self::ClosureNotRepaired { drv } => {
                write!(f, "some paths in the output closure of derivation '{}' could not be repaired", full(drv))
            }
            Self::NoSubstituter { path, .. } => {
                write!(f, "path '{}' is required, but there is no substituter that can build it", full(path))
            }
            Self::References { path, .. } => {
                write!(f, "some references of path '{}' could not be realised", full(path))
            }
            Self::ReadOnly { path } => {
                write!(f, "cannot substitute path '{}' - no write access to the Nix store", full(path))
            }
            Self::Cycle { path } => write!(f, "'{}' needs itself", full(path)),
        })
    }

    /// What failed beneath, where the builder's side said it.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Failed(failure) => failure.kind,
            Self::MissingDerivation { .. }
            | Self::UnknownOutputs { .. }
            | Self::NoSuchInput { .. }
            | Self::NoSource { .. }
            | Self::NotAllValid { .. }
            | Self::Unsupported { .. } => FailureKind::InputRejected,
            _ => FailureKind::Misc,
        }
    }

    /// Is it worth a word? That nobody has a path the user knows from the list of what is missing.
    pub const fn speaks(&self) -> bool {
        matches!(self.class(), Class::Real)
    }

    /// How it counts for whoever waits for the goal.
    pub(super) const fn class(&self) -> Class {
        match self {
            Self::NoSubstituter { tried: false, .. } => Class::Nobody,
            Self::References { incomplete: true, .. } => Class::Incomplete,
            _ => Class::Real,
        }
    }
}

/// What the failure of a goal means for those who wait for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Nobody has the path: no fault of anyone.
    Nobody,
    /// The closure cannot be fetched whole.
    Incomplete,
    Real,
}
