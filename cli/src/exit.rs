//! Exit codes, and the one place where an error is printed.
//!
//! An operation gives a [`Failure`] up to here, with all its causes; [`Failure::status`] is the
//! only place that knows which error has which exit code. Source: cli, sections 1.8 and 2.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::io;

use larder_realise::driver::RealiseError;
use larder_realise::job::FailureKind;

use crate::args::{ScanError, UsageError};
use crate::conf::LoadError;
use crate::interrupt::Interrupted;

/// Set with every mask.
const NOT_BUILT: u8 = 0x60;
const TIMEOUT: u8 = 1;
const HASH_MISMATCH: u8 = 2;
const FAILED: u8 = 4;
const CHECK_MISMATCH: u8 = 8;

/// An exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status(u8);

impl Status {
    pub const SUCCESS: Self = Self(0);
    /// Any error that has no status of its own, and `--verify` that found something.
    pub const FAILURE: Self = Self(1);

    /// The status of a run in which something was not built (cli, section 2): `96 | mask`, or 1 if
    /// no failure has a bit of its own.
    pub(crate) fn of_failures(kinds: &BTreeSet<FailureKind>) -> Self {
        let bits = kinds.iter().map(|kind| match kind {
            FailureKind::TimedOut => TIMEOUT | FAILED,
            FailureKind::HashMismatch => HASH_MISMATCH | FAILED,
            FailureKind::Permanent | FailureKind::Cached => FAILED,
            FailureKind::NotDeterministic => CHECK_MISMATCH,
            _ => 0,
        });
        match bits.fold(0, |mask, bits| mask | bits) {
            0 => Self::FAILURE,
            mask => Self(NOT_BUILT | mask),
        }
    }

    /// What a build hook ends with.
    pub(crate) const fn of_hook(code: u8) -> Self {
        Self(code)
    }

    pub const fn code(self) -> u8 {
        self.0
    }
}

/// What ended an operation: an error with its causes.
///
/// Made from any error by `?`; not an error itself, so that it cannot end up inside another one.
#[derive(Debug)]
pub struct Failure(Box<dyn Error + Send + Sync>);

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

impl Failure {
    pub fn error(&self) -> &(dyn Error + 'static) {
        &*self.0
    }

    /// Was the command itself wrong, so that `--help` would help?
    pub fn is_usage(&self) -> bool {
        self.0.is::<UsageError>()
            || matches!(self.0.downcast_ref(), Some(ScanError::Usage(_)))
            || matches!(self.0.downcast_ref(), Some(LoadError::Settings(error)) if error.is_usage())
    }

    pub fn is_interrupt(&self) -> bool {
        causes(self.error()).any(<dyn Error>::is::<Interrupted>)
    }

    /// The exit status.
    pub fn status(&self) -> Status {
        match self.0.downcast_ref() {
            Some(RealiseError::Failed { kinds, .. }) => Status::of_failures(kinds),
            _ => Status::FAILURE,
        }
    }
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (**error).source())
}

/// An error and its causes in one text, joined by colons: `cannot open 'P': Permission denied`.
///
/// A cause that already ends the text is not said again; the number that Rust adds to errors of
/// the operating system is left out.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for cause in causes(error) {
        let said = plain(cause);
        if !said.is_empty() && !text.ends_with(&said) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&said);
        }
    }
    text
}

/// The text of one error, without ` (os error N)`.
fn plain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let number = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    let number = number.or_else(|| error.downcast_ref::<rustix::io::Errno>().map(|e| e.raw_os_error()));
    if let Some(number) = number {
        let suffix = format!(" (os error {number})");
        if text.ends_with(&suffix) {
            text.truncate(text.len() - suffix.len());
        }
    }
    text
}

/// Indents all lines but the first by the width of `error: `.
pub fn indent(text: &str) -> impl fmt::Display + '_ {
    fmt::from_fn(move |f| {
        for (i, line) in text.trim_end_matches('\n').split('\n').enumerate() {
            match (i, line) {
                (0, _) => f.write_str(line)?,
                (_, "") => f.write_str("\n")?,
                _ => write!(f, "\n       {line}")?,
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Sample {
        #[error("cannot open '{0}'")]
        Open(&'static str, #[source] io::Error),
        #[error("bad thing: {source}")]
        Repeats { source: Box<Sample> },
        #[error("cannot run")]
        Outer(#[source] Box<Sample>),
    }

    #[test]
    fn causes_are_joined_and_said_once() {
        let inner = || Sample::Open("x", io::Error::from_raw_os_error(2));
        assert_eq!(chain(&inner()), "cannot open 'x': No such file or directory");
        assert_eq!(chain(&Sample::Outer(Box::new(inner()))), "cannot run: cannot open 'x': No such file or directory");
        let repeats = Sample::Repeats { source: Box::new(inner()) };
        assert_eq!(chain(&repeats), "bad thing: cannot open 'x': No such file or directory");
    }

    #[test]
    fn the_ways_to_fail_make_the_status() {
        use FailureKind as F;
        for (kinds, code) in [
            (&[][..], 1),
            (&[F::Misc, F::OutputRejected, F::InputRejected, F::Transient, F::LogLimitExceeded], 1),
            (&[F::Permanent], 100),
            (&[F::TimedOut], 101),
            (&[F::HashMismatch, F::Misc], 102),
            (&[F::TimedOut, F::HashMismatch], 103),
            (&[F::NotDeterministic], 104),
            (&[F::NotDeterministic, F::Permanent], 108),
        ] {
            let kinds: BTreeSet<FailureKind> = kinds.iter().copied().collect();
            let failure = Failure::from(RealiseError::Failed { text: String::new(), kinds: kinds.clone() });
            assert_eq!(failure.status().code(), code, "{kinds:?}");
        }
        assert_eq!(Failure::from(RealiseError::Interrupted).status(), Status::FAILURE);
    }

    #[test]
    fn later_lines_are_indented() {
        assert_eq!(indent("a\nb\n\nc\n").to_string(), "a\n       b\n\n       c");
        assert_eq!(indent("a").to_string(), "a");
    }
}
