//! Messages for the user, told to whoever shows them: a terminal or a client's connection.

use std::fmt;

/// How important a message is; the user's verbosity is the last level that is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Error,
    Warn,
    Notice,
    Info,
    Talkative,
    Chatty,
    Debug,
    Vomit,
}

/// Takes what the user should hear while work goes on.
pub trait Reporter: Sync {
    /// Is a message of this level shown at all? Ask before making an expensive one.
    fn shows(&self, level: Level) -> bool;

    /// One message, without a final newline.
    fn message(&self, level: Level, text: fmt::Arguments<'_>);

    /// Work of a known or unknown size begins, goes on (`done` of `total`, any unit), or ends.
    fn progress(&self, _step: Progress<'_>) {}

    /// Does the user want the work to stop? Long work asks now and then, and ends tidily.
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// A step of some long work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    Begin {
        what: &'a str,
        total: Option<u64>,
        unit: Unit,
    },
    /// So many more units are done.
    Advance(u64),
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Paths,
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn shows(&self, _level: Level) -> bool {
        false
    }
    fn message(&self, _level: Level, _text: fmt::Arguments<'_>) {}
}
