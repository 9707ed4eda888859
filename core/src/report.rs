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

impl Level {
    /// The level of a number from 0 to 7; what is higher is the highest.
    pub const fn of_number(number: u64) -> Self {
        match number {
            0 => Self::Error,
            1 => Self::Warn,
            2 => Self::Notice,
            3 => Self::Info,
            4 => Self::Talkative,
            5 => Self::Chatty,
            6 => Self::Debug,
            _ => Self::Vomit,
        }
    }
}

/// Takes what the user should hear while work goes on.
pub trait Reporter: Sync {
    /// Is a message of this level shown at all? Ask before making an expensive one.
    fn shows(&self, level: Level) -> bool;

    /// One message, without a final newline.
    fn message(&self, level: Level, text: fmt::Arguments<'_>);

    /// Work of a known or unknown size begins, goes on (`done` of `total`, any unit), or ends.
    fn progress(&self, _step: Progress<'_>) {}

    /// An activity begins; gives its number, to be used for what comes of it. 0 is none.
    fn start(&self, _start: &Start<'_>) -> u64 {
        0
    }

    /// Something came of an activity.
    fn result(&self, _activity: u64, _result: ActivityResult<'_>) {}

    /// An activity ends.
    fn stop(&self, _activity: u64) {}

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

/// The beginning of an activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start<'a> {
    pub level: Level,
    /// For people; may be empty.
    pub text: &'a str,
    pub activity: Activity<'a>,
    /// The activity that it is part of; 0 for none.
    pub parent: u64,
}

/// What goes on, in the words of Nix's own logs. Paths are full. Source: protocols, section 2.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activity<'a> {
    Unknown,
    CopyPath {
        path: &'a str,
        from: &'a str,
        to: &'a str,
    },
    FileTransfer {
        uri: &'a str,
    },
    /// All of the work for some targets.
    Realise,
    CopyPaths,
    Builds,
    Build {
        drv: &'a str,
        /// Empty for this one.
        machine: &'a str,
    },
    Optimise,
    VerifyPaths,
    Substitute {
        path: &'a str,
        uri: &'a str,
    },
    QueryPathInfo {
        path: &'a str,
        uri: &'a str,
    },
    PostBuildHook {
        drv: &'a str,
    },
    BuildWaiting,
}

/// What comes of an activity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ActivityResult<'a> {
    FileLinked {
        saved_bytes: u64,
        blocks: u64,
    },
    /// Without its line feed.
    BuildLogLine(&'a [u8]),
    UntrustedPath(&'a str),
    CorruptedPath(&'a str),
    SetPhase(&'a str),
    Progress {
        done: u64,
        expected: u64,
        running: u64,
        failed: u64,
    },
    /// So many activities of a kind are to be expected.
    SetExpected {
        of: Activity<'a>,
        expected: u64,
    },
    PostBuildLogLine(&'a [u8]),
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

/// An error and its reasons in one text, joined by colons: `cannot open 'P': Permission denied`.
///
/// A reason that already ends the text is not said again; the number that Rust adds to errors of
/// the operating system is left out.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    for reason in std::iter::successors(Some(error), |error| (**error).source()) {
        let mut said = reason.to_string();
        if let Some(at) = said.rfind(" (os error ").filter(|_| said.ends_with(')')) {
            said.truncate(at);
        }
        if !said.is_empty() && !text.ends_with(&said) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&said);
        }
    }
    text
}
