//! `nix-copy-closure`: paths and all they need, to or from another machine, over ssh.
//!
//! Source: cli, section 8.

use std::ffi::OsString;

use larder_core::report::{Level, Reporter as _};
use larder_fs::layout::Access;

use super::copying::{How, copy};
use super::place::Place;
use super::{Context, print, version};
use crate::args::{Grammar, UsageError, Words, scan, shown};
use crate::exit::{Failure, Status};
use crate::paths::store_paths;

pub const HELP: &str = "\
nix-copy-closure - copy paths with all they need to or from a machine

Usage: nix-copy-closure [--to|--from] [FLAG]... [USER@]HOST PATH...

  --to                        copy to the machine (default)
  --from                      copy from it
  --gzip                      let ssh compress what it sends
  --include-outputs           copy the outputs of derivations, too
  -s, --use-substitutes       let the receiver fetch what it can get elsewhere
  --dry-run                   only tell how much would be copied

Runs `nix-store --serve --write` there, by one ssh connection; NIX_SSHOPTS has
further words for ssh.
";

/// What is wrong with the words.
#[derive(Debug, thiserror::Error)]
enum CopyClosureError {
    #[error("no host name specified")]
    NoHost,
}

#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
struct LowArgs {
    version: bool,
    from: bool,
    compress: bool,
    include_outputs: bool,
    substitute: bool,
    dry_run: bool,
    /// Ways to compress that ssh does not know.
    other_ways: Vec<String>,
    host: Option<OsString>,
    paths: Vec<OsString>,
}

impl Grammar for LowArgs {
    fn word(&mut self, word: OsString, _words: &mut Words) -> Result<(), UsageError> {
        match word.to_str() {
            Some("--version") => self.version = true,
            Some("--to") => self.from = false,
            Some("--from") => self.from = true,
            Some("--gzip") => self.compress = true,
            Some(way @ ("--bzip2" | "--xz" | "--show-progress")) => self.other_ways.push(way.to_owned()),
            Some("--include-outputs") => self.include_outputs = true,
            Some("--use-substitutes" | "-s") => self.substitute = true,
            Some("--dry-run") => self.dry_run = true,
            _ if word.as_encoded_bytes().first() == Some(&b'-') => {
                return Err(UsageError::UnrecognisedFlag { flag: shown(&word) });
            }
            _ if self.host.is_none() => self.host = Some(word),
            _ => self.paths.push(word),
        }
        Ok(())
    }
}

/// Runs `nix-copy-closure`.
pub(super) fn run(cx: &Context, words: Vec<OsString>) -> Result<Status, Failure> {
    let mut low = LowArgs::default();
    let common = scan(words, &mut low)?;
    cx.terminal.configure(&common);
    if common.help {
        print(HELP)?;
        return Ok(Status::SUCCESS);
    }
    if low.version {
        print(&version(cx.name))?;
        return Ok(Status::SUCCESS);
    }
    let settings = cx.settings(&common.overrides)?;
    for way in &low.other_ways {
        let instead = if way == "--show-progress" { "" } else { ", falling back to gzip" };
        cx.terminal.message(Level::Warn, format_args!("'{way}' is not implemented{instead}"));
        low.compress |= way != "--show-progress";
    }
    let host = low.host.as_deref().ok_or(CopyClosureError::NoHost)?;
    let compress = if low.compress { "?compress=true" } else { "" };
    let uri = format!("ssh://{}{compress}", shown(host));
    let far = Place::open(cx, &settings, &common, Some(&uri), Access::ReadWrite)?;
    let access = if low.from { Access::ReadWrite } else { Access::ReadOnly };
    let near = Place::open(cx, &settings, &common, None, access)?;
    let paths = store_paths(near.store().dir(), &low.paths)?.into_iter().collect();
    let (from, to) = if low.from { (&far, &near) } else { (&near, &far) };
    let how = How {
        // Whoever may log in there is trusted, and whoever runs this trusts the machine.
        check_signatures: false,
        substitute: low.substitute,
        include_outputs: low.include_outputs,
        no_closure: false,
        dry_run: low.dry_run,
    };
    copy(cx, from, to, &paths, how)?;
    Ok(Status::SUCCESS)
}
