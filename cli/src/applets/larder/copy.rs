//! `larder copy`.

use std::collections::BTreeSet;
use std::ffi::OsString;

use clap::Args;
use larder_cache::uri::CacheUri;
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use serde_json::json;

use super::Json;
use crate::applets::copying::{How, copy};
use crate::applets::place::Place;
use crate::applets::{Context, print_json, pushing};
use crate::args::Common;
use crate::exit::Failure;
use crate::paths::store_paths;

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub struct Copy {
    /// Paths in the store, copied with all they need
    #[arg(required_unless_present = "all", value_name = "PATH")]
    pub paths: Vec<OsString>,
    /// Copy every path
    #[arg(short, long)]
    pub all: bool,
    /// Store to copy to, instead of this one: `ssh-ng://HOST`, `ssh://HOST`, daemon, /DIR, or a
    /// binary cache
    #[arg(long, value_name = "URI", required_unless_present = "from")]
    pub to: Option<String>,
    /// Store to copy from, instead of this one
    #[arg(long, value_name = "URI")]
    pub from: Option<String>,
    /// Copy also what no key that is trusted has signed
    #[arg(long)]
    pub no_check_sigs: bool,
    /// Copy these paths alone, without what they need
    #[arg(long)]
    pub no_recursive: bool,
    /// Copy the outputs of derivations, too
    #[arg(long)]
    pub include_outputs: bool,
    /// Let the receiver fetch what it can get elsewhere
    #[arg(short, long)]
    pub substitute_on_destination: bool,
    /// Only tell what would be copied
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum CopyError {
    #[error("the binary cache '{uri}' cannot fetch anything (--substitute-on-destination)")]
    FetchesNothing { uri: String },
}

pub(super) fn run(cx: &Context, settings: &Settings, common: &Common, args: &Copy) -> Result<(), Failure> {
    let from = Place::open(cx, settings, common, args.from.as_deref(), Access::ReadOnly)?;
    let cache = args.to.as_deref().filter(|uri| CacheUri::is_cache(uri));
    if let Some(uri) = cache.filter(|_| args.substitute_on_destination) {
        return Err(CopyError::FetchesNothing { uri: uri.to_owned() }.into());
    }
    let told = |copied: Vec<StorePath>, dir: &StoreDir| {
        let copied: Vec<String> = copied.iter().map(|path| dir.full(path)).collect();
        if args.json.json { print_json(&json!(copied)) } else { Ok(()) }
    };
    let dir = from.store().dir();
    let paths: BTreeSet<_> =
        if args.all { from.store().all_paths()? } else { store_paths(dir, &args.paths)?.into_iter().collect() };
    if let Some(uri) = cache {
        // A cache takes what nobody has signed; who reads it decides.
        let how = pushing::How {
            uri,
            jobs: None,
            logs: false,
            include_outputs: args.include_outputs,
            no_closure: args.no_recursive,
            dry_run: args.dry_run,
        };
        return told(pushing::push(cx, settings, &from, &paths, how)?, dir);
    }
    let to = Place::open(cx, settings, common, args.to.as_deref(), Access::ReadWrite)?;
    let how = How {
        check_signatures: !args.no_check_sigs,
        substitute: args.substitute_on_destination,
        include_outputs: args.include_outputs,
        no_closure: args.no_recursive,
        dry_run: args.dry_run,
    };
    told(copy(cx, &from, &to, &paths, how)?, dir)
}
