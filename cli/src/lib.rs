//! One binary, many names: what the name it is called by means, what its words mean, and how it
//! talks to people.
//!
//! The way of a call: [`applets`] picks the applet by name, [`args`] makes words into a typed
//! command, [`conf`] collects settings and picks the store, the applet runs the command with a
//! [`terminal::Terminal`] to tell things to and a [`printer::Printer`] for its results, and
//! [`exit`] makes what came of it into an exit status.

pub mod applets;
pub mod args;
pub mod builds;
pub mod caches;
pub mod conf;
pub mod daemon;
pub mod engine;
pub mod exit;
pub mod graphs;
pub mod hook;
pub mod interrupt;
pub mod pager;
pub mod paths;
pub mod printer;
pub mod realising;
pub mod remote;
pub mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs the applet that the first word names.
pub fn main(words: impl Iterator<Item = OsString>) -> ExitCode {
    let mut words: Vec<OsString> = words.collect();
    let called = if words.is_empty() { OsString::from("larder") } else { words.remove(0) };
    // Files of the store must not depend on the mask of whoever calls (cli, rule 1.12).
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    if let Some((word, words)) = words.split_first()
        && word == larder_realise::hook::WORD
    {
        return ExitCode::from(hook::run(words).code());
    }
    ExitCode::from(applets::run(&called, words).code())
}
