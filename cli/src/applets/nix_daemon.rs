//! `nix-daemon`: serves the store to other users, or to one client on standard input and output.
//!
//! Source: cli, section 9.

use std::ffi::OsString;
use std::sync::Arc;

use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;

use super::nix_store::store::open_for_daemon;
use super::{Context, print, version};
use crate::args::{Common, Grammar, UsageError, Words, scan, shown};
use crate::conf::{Facts, StoreChoice, choose};
use crate::daemon::Daemon;
use crate::daemon::relay::relay;
use crate::daemon::socket::Listener;
use crate::exit::{Failure, Status, chain};

pub(super) const HELP: &str = "\
nix-daemon - serve the store to other users and machines

Usage: nix-daemon [--daemon] [--stdio] [FLAG]...

Listens on a socket, by default STATE/daemon-socket/socket, and does what the
clients ask for, as far as they may: the settings trusted-users and
allowed-users name them. SIGTERM ends it when the clients have been served,
SIGHUP makes it read its settings again.

  --stdio           serve one client on standard input and output
  --daemon          has no effect
  --version         print the version

For all: -v, --quiet, --store URI, --option NAME VALUE, --SETTING VALUE
";

/// The daemon that this one stands before cannot be spoken to.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to daemon at '{socket}'")]
struct RelayError {
    socket: String,
    source: std::io::Error,
}

#[derive(Debug, Default)]
struct LowArgs {
    version: bool,
    stdio: bool,
}

impl Grammar for LowArgs {
    fn word(&mut self, word: OsString, _words: &mut Words) -> Result<(), UsageError> {
        match word.to_str() {
            Some("--daemon") => {}
            Some("--stdio") => self.stdio = true,
            Some("--version") => self.version = true,
            _ if word.as_encoded_bytes().first() == Some(&b'-') => {
                return Err(UsageError::UnrecognisedFlag { flag: shown(&word) });
            }
            _ => return Err(UsageError::UnexpectedArgument { word: shown(&word) }),
        }
        Ok(())
    }
}

/// Runs `nix-daemon`.
pub(super) fn run(cx: &Context, words: Vec<OsString>) -> Result<Status, Failure> {
    let mut low = LowArgs::default();
    let common = scan(words, &mut low)?;
    cx.terminal.configure(&common);
    if common.help {
        print(HELP)?;
        return Ok(Status::SUCCESS);
    }
    let settings = cx.settings(&common.overrides)?;
    if low.version {
        print(&version(cx.name))?;
        return Ok(Status::SUCCESS);
    }
    if low.stdio
        && let StoreChoice::Daemon { socket } = choose(&settings.store, &cx.env, Facts::gather(&cx.env, true)?)?
    {
        let name = || socket.display().to_string();
        relay(&socket).map_err(|source| RelayError { socket: name(), source })?;
        return Ok(Status::SUCCESS);
    }
    let (store, rules, local) = open_for_daemon(cx, &settings)?;
    let terminal = Arc::clone(&cx.terminal);
    let daemon = Daemon::new(store, settings, rules, terminal, cx.interrupt.clone(), cx.env.clone());
    if low.stdio {
        daemon.serve_stdio()?;
        return Ok(Status::SUCCESS);
    }
    let listener = match Listener::activated(&cx.env)? {
        Some(listener) => listener,
        None => Listener::bind(&local.daemon_socket(&cx.env))?,
    };
    // What was relative has been opened; no directory is kept busy.
    std::env::set_current_dir("/").map_err(|error| larder_fs::file_error::FileError::new("changing to", "/", error))?;
    Arc::new(daemon).listen(listener, &cx.env, &|| reload(cx, &common))?;
    Ok(Status::SUCCESS)
}

/// The settings as they are now; a fault is told, and the old ones stay.
fn reload(cx: &Context, common: &Common) -> Option<Settings> {
    match cx.settings(&common.overrides) {
        Ok(settings) => Some(settings),
        Err(failure) => {
            cx.terminal.message(Level::Error, format_args!("error: {}", chain(failure.error())));
            None
        }
    }
}
