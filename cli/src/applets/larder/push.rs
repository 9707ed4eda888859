//! `larder push`: paths of this store to a binary cache on a disk.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::thread;

use clap::Args;
use larder_cache::compress::Method;
use larder_cache::uri::CacheUri;
use larder_cache::write::{Writer, write_all};
use larder_core::api::ReadStore as _;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_realise::logs;
use larder_store::{LocalStore, StoreError};

use super::asking::paths;
use crate::applets::Context;
use crate::applets::nix_store::store::open;
use crate::exit::Failure;

#[derive(Debug, Args)]
pub struct Push {
    /// The cache, a folder
    #[arg(
        value_name = "URI",
        help = "The cache: file:///DIR?compression=METHOD&secret-key=FILE&write-nar-listing=true"
    )]
    pub to: String,
    /// Paths to copy; they come with all that they need
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Copy these paths only, not what they need
    #[arg(long)]
    pub no_closure: bool,
    /// Also copy the logs of the builds that made them, where they are here
    #[arg(long)]
    pub logs: bool,
    /// Archives that are compressed at once, instead of one a processor
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<usize>,
}

pub(super) fn push(cx: &Context, settings: &Settings, args: &Push) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let asked: BTreeSet<StorePath> = paths(store.dir(), &args.paths)?.into_iter().collect();
    let all = if args.no_closure { asked } else { store.closure(&asked)? };
    push_paths(cx, &store, &args.to, &all, args.jobs, args.logs)
}

/// Copies paths to the cache at `uri`, those that it has not. What they refer to must be there or
/// be among them.
pub(in crate::applets) fn push_paths(
    cx: &Context,
    store: &LocalStore,
    uri: &str,
    all: &BTreeSet<StorePath>,
    jobs: Option<usize>,
    with_logs: bool,
) -> Result<(), Failure> {
    protect(store, all)?;
    let threads = jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, std::num::NonZero::get)).max(1);
    let writer = Writer::open(&CacheUri::parse(uri)?, store.dir(), Method::Zstd, u32::try_from(threads).unwrap_or(1))?;
    let mut missing = BTreeSet::new();
    for path in all {
        if !writer.has(path)? {
            missing.insert(path.clone());
        }
    }
    if !missing.is_empty() {
        cx.terminal.message(Level::Info, format_args!("copying {} paths...", missing.len()));
    }
    let infos = store.infos(&store.order(&missing)?)?;
    let begin = |path: &StorePath| {
        let path = store.dir().display(path);
        cx.terminal.message(Level::Info, format_args!("copying path '{path}' to '{}'...", writer.uri()));
    };
    write_all(&writer, &infos, threads, &begin, &|path, out| store.nar(path, out))?;
    if with_logs {
        let derivers = store.infos(all)?.into_iter().filter_map(|info| info.deriver);
        let own = all.iter().filter(|path| path.is_derivation()).cloned();
        for drv in derivers.chain(own).collect::<BTreeSet<_>>() {
            if let Some(mut log) = logs::open(store.layout(), &drv)? {
                writer.write_log(&drv, &mut log)?;
            }
        }
    }
    Ok(())
}

/// Keeps paths from being collected, where this user may.
pub(in crate::applets) fn protect(store: &LocalStore, paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
    store.add_temp_roots(paths).or_else(|error| match error {
        // From a store that is not theirs an ordinary user copies too; a collection in between
        // shows as an error.
        StoreError::File(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        other => Err(other),
    })
}
