//! `larder db`: what if the database is lost or broken?

use clap::{Args, Subcommand};
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_store::rebuild::{Rebuilt, SetAside, set_ledger_aside};
use serde_json::{Value, json};

use super::Json;
use crate::applets::Context;
use crate::applets::nix_store::store::{local, open};
use crate::exit::Failure;
use crate::printer::{Output, Printer};

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
    /// Set the present database aside even if it can be read, as what it says is wrong
    #[arg(long, conflicts_with = "dry_run")]
    pub fresh: bool,
    #[command(flatten)]
    pub json: Json,
}

pub(super) fn db(cx: &Context, settings: &Settings, args: &Db) -> Result<(), Failure> {
    let DbCommand::Rebuild(args) = &args.command;
    let which = if args.fresh { SetAside::Any } else { SetAside::Broken };
    if !args.dry_run
        && let Some(aside) = set_ledger_aside(&local(cx, settings, Access::ReadWrite)?.db_dir, which)?
    {
        let why = if args.fresh { "was set aside" } else { "cannot be used" };
        cx.terminal.message(Level::Warn, format_args!("the database {why} and is now '{}'", aside.display()));
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
    Ok(out.finish()?)
}
