//! The applets: what the binary is, by the name it is called by.
//!
//! A new applet is one row in [`APPLETS`]; `larder links` then makes a link for it.

mod copying;
pub mod larder;
mod nar;
pub mod nix_collect_garbage;
pub mod nix_copy_closure;
mod nix_daemon;
pub mod nix_hash;
pub mod nix_prefetch_url;
pub mod nix_store;
mod place;
mod pushing;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::sync::Arc;

use larder_core::report::{ActivityResult, Level, Reporter, Start};
use larder_core::settings::{Configured, Settings};

use self::nix_store::store::{StoreOpError, Voice};
use crate::args::{Common, Override};
use crate::builds::shows_logs;
use crate::conf::{Env, StoreChoice, load, machine};
use crate::exit::{Failure, Status, chain};
use crate::interrupt::{Interrupt, Interrupted};
use crate::printer::{Output, PrintError, Printer};
use crate::remote::Opened;
use crate::terminal::Terminal;

/// The version of Nix whose behaviour is followed where versions differ.
pub const NIX_VERSION: &str = "2.26.3";

/// A tool of Nix that this binary stands for.
#[derive(Debug)]
pub struct Applet {
    pub name: &'static str,
    /// What it is for, in a few words.
    pub about: &'static str,
    run: fn(&Context, Vec<OsString>) -> Result<Status, Failure>,
}

pub const APPLETS: &[Applet] = &[
    Applet { name: "nix-store", about: "manipulate or query the Nix store", run: nix_store::run },
    Applet { name: "nix-daemon", about: "serve the store to other users and machines", run: nix_daemon::run },
    Applet { name: "nix-collect-garbage", about: "delete unreachable store paths", run: nix_collect_garbage::run },
    Applet {
        name: "nix-copy-closure",
        about: "copy paths with all they need to or from a machine",
        run: nix_copy_closure::run,
    },
    Applet { name: "nix-hash", about: "compute the cryptographic hash of a path", run: nix_hash::run },
    Applet { name: "nix-prefetch-url", about: "copy a file from a URL into the store", run: nix_prefetch_url::run },
];

const LARDER: Applet = Applet { name: "larder", about: "the Nix store, written anew", run: larder::run };

/// What an applet is given besides its words.
#[derive(Debug)]
pub struct Context {
    /// The applet's own name, for its messages.
    pub name: &'static str,
    pub env: Env,
    pub terminal: Arc<Terminal>,
    pub interrupt: Interrupt,
}

impl Context {
    /// Settings from files, the environment and flags; warns of what is odd about them.
    fn settings(&self, overrides: &[Override]) -> Result<Settings, Failure> {
        self.settings_for(overrides, true)
    }

    /// The same for a command that never `builds`: `cores` and `system-features` need not be right.
    fn settings_for(&self, overrides: &[Override], builds: bool) -> Result<Settings, Failure> {
        let Configured { settings, warnings, .. } = load(&self.env, overrides, machine(&self.env, builds)?)?;
        for warning in warnings {
            self.terminal.message(Level::Warn, format_args!("{}", chain(&warning)));
        }
        Ok(settings)
    }
}

impl Context {
    /// Opens a store that another process keeps.
    fn connect(&self, settings: &Settings, common: &Common, choice: StoreChoice) -> Result<Opened, Failure> {
        let configured = load(&self.env, &common.overrides, machine(&self.env, false)?)?;
        let voice = Voice { terminal: Arc::clone(&self.terminal), interrupt: self.interrupt.clone() };
        let shows_logs = shows_logs(&self.terminal, common.log_format, common.no_build_output);
        let reporter = Arc::new(FarVoice { voice, shows_logs });
        let uri = settings.store.clone();
        let opened = Opened::open(choice, &self.env, &configured, common.verbosity(), shows_logs, reporter)?;
        Ok(opened.ok_or(StoreOpError::NotLocal { uri })?)
    }
}

/// Tells what a server says.
struct FarVoice {
    voice: Voice,
    /// Is the output of builders shown as it comes?
    shows_logs: bool,
}

impl Reporter for FarVoice {
    fn shows(&self, level: Level) -> bool {
        self.voice.shows(level)
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.voice.message(level, text);
    }
    fn start(&self, start: &Start<'_>) -> u64 {
        self.voice.start(start)
    }
    fn result(&self, _activity: u64, result: ActivityResult<'_>) {
        if let ActivityResult::BuildLogLine(line) | ActivityResult::PostBuildLogLine(line) = result
            && self.shows_logs
        {
            self.voice.log_line(line);
        }
    }
    fn is_cancelled(&self) -> bool {
        self.voice.is_cancelled()
    }
}

/// The applet for a name with or without a directory; any unknown name is `larder`.
fn by_name(called: &OsStr) -> &'static Applet {
    let base = Path::new(called).file_name().unwrap_or(called);
    APPLETS.iter().find(|applet| base == applet.name).unwrap_or(&LARDER)
}

/// The applet that is meant, and its words: `larder nix-store ...` is `nix-store ...`, so that
/// no links are needed.
fn pick(called: &OsStr, mut words: Vec<OsString>) -> (&'static Applet, Vec<OsString>) {
    let applet = by_name(called);
    if applet.name == LARDER.name
        && let Some(inner) = words.first().and_then(|word| APPLETS.iter().find(|inner| word == inner.name))
    {
        words.remove(0);
        return (inner, words);
    }
    (applet, words)
}

/// Runs the applet, tells of its failure, and gives the exit status.
pub fn run(called: &OsStr, words: Vec<OsString>) -> Status {
    let (applet, words) = pick(called, words);
    let terminal = Arc::new(Terminal::new());
    let last_words = Arc::clone(&terminal);
    // Without the watcher a signal ends the process just as well, with less to say.
    let interrupt = Interrupt::watch(move || last_words.error(&Interrupted)).unwrap_or_default();
    let cx = Context { name: applet.name, env: Env::of_process(), terminal, interrupt };
    match (applet.run)(&cx, words) {
        Ok(status) => status,
        Err(failure) => {
            if !failure.is_interrupt() || cx.interrupt.claim_last_words() {
                cx.terminal.failure(applet.name, &failure);
            }
            failure.status()
        }
    }
}

/// Prints a text to standard output.
fn print(text: &str) -> Result<(), PrintError> {
    let mut printer = Printer::new(Output::Listing);
    printer.bytes(text.as_bytes())?;
    printer.finish()
}

/// Prints a value, for people indented.
fn print_json(value: &serde_json::Value) -> Result<(), Failure> {
    Ok(print(&format!("{value:#}\n"))?)
}

/// What `--version` prints: which Nix it can stand for, and what it is.
fn version(name: &str) -> String {
    format!("{name} (Nix) {NIX_VERSION}\nlarder {}\n", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_picks_the_applet() {
        for (called, words, name, left) in [
            ("nix-store", "-q x", "nix-store", "-q x"),
            ("/usr/bin/nix-hash", "f", "nix-hash", "f"),
            ("larder", "nix-store -q x", "nix-store", "-q x"),
            ("larder", "add nix-store", "larder", "add nix-store"),
            ("larder-0.1", "nix-hash f", "nix-hash", "f"),
            ("nix-store", "nix-hash f", "nix-store", "nix-hash f"),
            ("", "", "larder", ""),
        ] {
            let split = |words: &str| words.split(' ').filter(|w| !w.is_empty()).map(OsString::from).collect();
            let (applet, found) = pick(OsStr::new(called), split(words));
            let left: Vec<OsString> = split(left);
            assert_eq!((applet.name, found), (name, left), "{called} {words}");
        }
    }

    #[test]
    fn help_fits_a_terminal() {
        for text in [
            nix_store::HELP,
            nix_hash::HELP,
            nix_collect_garbage::HELP,
            nix_copy_closure::HELP,
            nix_daemon::HELP,
            nix_prefetch_url::HELP,
        ] {
            for line in text.lines() {
                assert!(line.chars().count() <= 80, "{line}");
                assert_eq!(line.trim_end(), line);
            }
        }
    }
}
