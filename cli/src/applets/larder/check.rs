//! `larder verify` and `larder db`: is the store whole, and what if its database is not?

use std::path::PathBuf;

use clap::{Args, Subcommand};
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_store::rebuild::{Rebuilt, set_broken_ledger_aside};
use larder_store::verify::VerifyOptions;
use serde_json::{Value, json};

use super::Json;
use crate::applets::Context;
use crate::applets::nix_store::store::{local, open};
use crate::exit::{Failure, Status};
use crate::paths::store_path;
use crate::printer::{Output, Printer};

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub struct Verify {
    /// Paths whose contents are checked; the whole store if there are none
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Check the database, and that all paths are there (the default)
    #[arg(long, conflicts_with_all = ["full", "resume", "paths"])]
    pub quick: bool,
    /// Also read and hash all contents
    #[arg(short = 'c', long, visible_alias = "contents")]
    pub full: bool,
    /// Go on where a full check was stopped
    #[arg(long, conflicts_with = "paths")]
    pub resume: bool,
    /// Mend what is found
    #[arg(long, conflicts_with = "paths")]
    pub repair: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Db {
    #[command(subcommand)]
    pub command: DbCommand,
}

#[derive(Debug, Subcommand)]
pub enum DbCommand {
    /// Make the database anew from what lies in the store, after it was lost or broken
    Rebuild(Rebuild),
}

#[derive(Debug, Args)]
pub struct Rebuild {
    /// Only tell what would be registered
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub json: Json,
}

pub(super) fn verify(cx: &Context, settings: &Settings, args: &Verify) -> Result<Status, Failure> {
    if !args.paths.is_empty() {
        return verify_paths(cx, settings, args);
    }
    let store = open(cx, settings, Access::ReadWrite)?;
    let check_contents = args.full || args.resume;
    let verified = store.verify(VerifyOptions { check_contents, repair: args.repair, resume: args.resume })?;
    let mut out = Printer::new(Output::Listing);
    if args.json.json {
        let gone: Vec<String> = verified.disappeared.iter().map(|path| store.dir().full(path)).collect();
        out.line(json!({"errors": verified.errors, "disappeared": gone, "contents": check_contents}))?;
    } else {
        let what = if check_contents { "database, paths and contents" } else { "database and paths" };
        match verified.errors {
            0 => out.line(format_args!("{what}: no fault"))?,
            1 => out.line(format_args!("{what}: one fault is left"))?,
            count => out.line(format_args!("{what}: {count} faults are left"))?,
        }
    }
    out.finish()?;
    Ok(if verified.errors == 0 { Status::SUCCESS } else { Status::FAILURE })
}

fn verify_paths(cx: &Context, settings: &Settings, args: &Verify) -> Result<Status, Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let mut faults: Vec<Value> = Vec::new();
    for path in &args.paths {
        let path = store_path(store.dir(), path.as_os_str())?;
        if !store.verify_path(&path)? {
            faults.push(store.dir().full(&path).into());
        }
    }
    let status = if faults.is_empty() { Status::SUCCESS } else { Status::FAILURE };
    if args.json.json {
        let mut out = Printer::new(Output::Listing);
        out.line(json!({"errors": faults.len(), "modified": faults}))?;
        out.finish()?;
    }
    Ok(status)
}

pub(super) fn db(cx: &Context, settings: &Settings, args: &Db) -> Result<Status, Failure> {
    let DbCommand::Rebuild(args) = &args.command;
    if !args.dry_run
        && let Some(aside) = set_broken_ledger_aside(&local(cx, settings)?.db_dir)?
    {
        let text = format_args!("the database cannot be read and is now '{}'", aside.display());
        cx.terminal.message(Level::Warn, text);
    }
    let store = open(cx, settings, Access::ReadWrite)?;
    let Rebuilt { proved, taken, left, unknown_derivers } = store.rebuild(args.dry_run)?;
    let full = |path: &StorePath| store.dir().full(path);
    let mut out = Printer::new(Output::Listing);
    if args.json.json {
        let list = |paths: &[StorePath]| paths.iter().map(full).collect::<Vec<_>>();
        let left: Vec<Value> = left.iter().map(|(name, why)| json!({"name": name, "why": why})).collect();
        out.line(json!({
            "proved": list(&proved), "taken": list(&taken), "left": left, "unknownDerivers": list(&unknown_derivers),
        }))?;
    } else {
        for (name, why) in &left {
            out.line(format_args!("left out: {name}: {why}"))?;
        }
        for path in &unknown_derivers {
            out.line(format_args!("several derivations can make it, so its deriver is not known: {}", full(path)))?;
        }
        let done = if args.dry_run { "would be registered" } else { "registered" };
        out.line(format_args!(
            "{} paths {done}, of which {} are proved to be whole by their names; lost are the times of registration, \
             signatures, and what was built here",
            proved.len() + taken.len(),
            proved.len(),
        ))?;
    }
    out.finish()?;
    Ok(Status::SUCCESS)
}
