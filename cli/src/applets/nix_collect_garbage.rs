//! `nix-collect-garbage`: old generations of profiles go, then what nothing needs any more.
//!
//! Source: cli, section 7.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::SystemTime;

use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_gc::profiles::{self, Which};

use super::{Context, nix_store, print, version};
use crate::args::{Grammar, UsageError, Words, parse_integer, scan, shown};
use crate::conf::{Facts, LocalStore, StoreChoice, choose};
use crate::exit::{Failure, Status};

pub const HELP: &str = "\
nix-collect-garbage - delete unreachable store paths

Usage: nix-collect-garbage [FLAG]...

  -d, --delete-old            first delete all old generations of all profiles
  --delete-older-than Nd      or those that were superseded N days ago
  --dry-run                   only tell which generations would go
  --max-freed N[KMGT]         stop after so many bytes

What is left without a root is deleted, as by nix-store --gc.

Example: nix-collect-garbage --delete-older-than 30d
";

const SECONDS_PER_DAY: i64 = 24 * 60 * 60;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct LowArgs {
    version: bool,
    delete_old: bool,
    older_than_days: Option<u32>,
    dry_run: bool,
    max_freed_bytes: Option<u64>,
}

impl Grammar for LowArgs {
    fn word(&mut self, word: OsString, words: &mut Words) -> Result<(), UsageError> {
        let is_flag = word.as_encoded_bytes().first() == Some(&b'-');
        match word.to_str().filter(|_| !words.is_plain()) {
            Some("--version") => self.version = true,
            Some("--delete-old" | "-d") => self.delete_old = true,
            Some("--dry-run") => self.dry_run = true,
            Some("--delete-older-than") => {
                let value = shown(&words.argument("--delete-older-than")?);
                self.older_than_days = Some(days(&value).ok_or(UsageError::Days { text: value })?);
            }
            Some("--max-freed") => {
                let value = shown(&words.argument("--max-freed")?);
                // As for `nix-store`: less than nothing is nothing.
                self.max_freed_bytes = Some(u64::try_from(parse_integer(&value)?).unwrap_or(0));
            }
            Some(_) if is_flag => return Err(UsageError::UnrecognisedFlag { flag: shown(&word) }),
            _ => return Err(UsageError::UnexpectedArgument { word: shown(&word) }),
        }
        Ok(())
    }
}

/// `14d`
fn days(text: &str) -> Option<u32> {
    let digits = text.strip_suffix('d')?;
    if digits.bytes().all(|b| b.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// Runs `nix-collect-garbage`.
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
    let which = match low.older_than_days {
        Some(days) => Some(Which::SupersededBefore(now_s() - i64::from(days) * SECONDS_PER_DAY)),
        None => low.delete_old.then_some(Which::Old),
    };
    if let Some(which) = which {
        for dir in profile_dirs(cx, &settings)? {
            remove_generations(cx, &dir, which, low.dry_run)?;
        }
    }
    if !low.dry_run {
        nix_store::delete_garbage(cx, &settings, &common, low.max_freed_bytes)?;
    }
    Ok(Status::SUCCESS)
}

fn now_s() -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

fn profile_dirs(cx: &Context, settings: &Settings) -> Result<Vec<PathBuf>, Failure> {
    let layout = match choose(&settings.store, &cx.env, Facts::gather(&cx.env, true)?)? {
        StoreChoice::Local(store) => store.layout,
        StoreChoice::Daemon { .. } | StoreChoice::Remote { .. } => LocalStore::from_env(&cx.env)?.layout,
    };
    Ok(vec![layout.profiles(), cx.env.own_profiles()])
}

fn remove_generations(cx: &Context, dir: &std::path::Path, which: Which, dry_run: bool) -> Result<(), Failure> {
    for profile in profiles::find(dir) {
        cx.interrupt.check()?;
        let text = format_args!("removing old generations of profile {}", profile.display());
        cx.terminal.message(Level::Info, text);
        profiles::delete_old(&profile, which, dry_run, |number| {
            let doing = if dry_run { "would remove" } else { "removing" };
            cx.terminal.message(Level::Info, format_args!("{doing} profile version {number}"));
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<LowArgs, crate::args::ScanError> {
        let mut low = LowArgs::default();
        scan(words.split(' ').filter(|w| !w.is_empty()).map(OsString::from), &mut low)?;
        Ok(low)
    }

    #[test]
    fn words() {
        assert_eq!(parse("").unwrap(), LowArgs::default());
        let all = parse("-d --delete-older-than 14d --dry-run --max-freed 2K").unwrap();
        assert_eq!((all.delete_old, all.older_than_days, all.dry_run), (true, Some(14), true));
        assert_eq!(all.max_freed_bytes, Some(2048));
        assert_eq!(parse("--max-freed -5").unwrap().max_freed_bytes, Some(0));
        for (words, text) in [
            ("--zork", "unrecognised flag '--zork'"),
            ("foo", "unexpected argument 'foo'"),
            ("--delete-older-than 1x", "invalid number of days specifier '1x', expected something like '14d'"),
            ("--delete-older-than d", "invalid number of days specifier 'd', expected something like '14d'"),
            ("--delete-older-than -1d", "invalid number of days specifier '-1d', expected something like '14d'"),
            ("--delete-older-than", "'--delete-older-than' requires an argument"),
            ("--max-freed 1X", "invalid unit specifier 'X'"),
        ] {
            assert_eq!(parse(words).unwrap_err().to_string(), text, "{words}");
        }
    }
}
