//! How a build fails, in words.

use std::error::Error;

use larder_fs::file_error::FileError;
use larder_store::StoreError;

use super::environment::EnvironmentError;
use super::users::UsersError;
use crate::job::{Failure, FailureKind};

impl Failure {
    pub(crate) fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }

    /// An error with its reasons.
    pub(crate) fn of(kind: FailureKind, error: &dyn Error) -> Self {
        let mut text = error.to_string();
        let mut next = error.source();
        while let Some(reason) = next {
            text.push_str(": ");
            text.push_str(&reason.to_string());
            next = reason.source();
        }
        Self { kind, text }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let kind = match error {
            StoreError::Interrupted => FailureKind::Cancelled,
            StoreError::Canon(_) | StoreError::Dump(_) => FailureKind::OutputRejected,
            _ => FailureKind::Misc,
        };
        Self::of(kind, &error)
    }
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        Self::of(FailureKind::Misc, &error)
    }
}

impl From<EnvironmentError> for Failure {
    fn from(error: EnvironmentError) -> Self {
        Self::of(FailureKind::InputRejected, &error)
    }
}

impl From<larder_core::derivation::options::AttributeError> for Failure {
    fn from(error: larder_core::derivation::options::AttributeError) -> Self {
        Self::of(FailureKind::InputRejected, &error)
    }
}

impl From<UsersError> for Failure {
    fn from(error: UsersError) -> Self {
        Self::of(FailureKind::Misc, &error)
    }
}

/// `strsignal` in the C locale, which is what Nix prints.
pub(super) fn signal_name(number: i32) -> String {
    let name = match number {
        1 => "Hangup",
        2 => "Interrupt",
        3 => "Quit",
        4 => "Illegal instruction",
        5 => "Trace/breakpoint trap",
        6 => "Aborted",
        7 => "Bus error",
        8 => "Floating point exception",
        9 => "Killed",
        10 => "User defined signal 1",
        11 => "Segmentation fault",
        12 => "User defined signal 2",
        13 => "Broken pipe",
        14 => "Alarm clock",
        15 => "Terminated",
        16 => "Stack fault",
        24 => "CPU time limit exceeded",
        25 => "File size limit exceeded",
        31 => "Bad system call",
        _ => return format!("Unknown signal {number}"),
    };
    name.to_owned()
}
