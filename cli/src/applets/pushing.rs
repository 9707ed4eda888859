//! Closures from a store to a binary cache.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;

use larder_cache::client::Client;
use larder_cache::compress::Method;
use larder_cache::lookups::Lookups;
use larder_cache::uri::CacheUri;
use larder_cache::write::{Writer, write_all};
use larder_core::api::{Store, StoreError as ApiError};
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_fs::layout::Layout;
use larder_realise::logs;
use larder_store::{LocalStore, StoreError};

use super::Context;
use super::place::Place;
use crate::caches::{client_options, lifetimes};
use crate::exit::Failure;

/// What to do, and how.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub(super) struct How<'a> {
    /// The cache.
    pub(super) uri: &'a str,
    /// Archives that are compressed at once; one a processor if that is not said.
    pub(super) jobs: Option<usize>,
    /// Copy logs of builds, too.
    pub(super) logs: bool,
    /// Copy outputs of derivations along with them.
    pub(super) include_outputs: bool,
    /// Copy these paths only, and not what they need.
    pub(super) no_closure: bool,
    pub(super) dry_run: bool,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum PushError {
    #[error("logs can be copied from a store on this machine only, not from '{uri}'")]
    LogsElsewhere { uri: String },
}

/// Copies paths with all they need to a cache; gives those that it had not got, references first.
pub(super) fn push(
    cx: &Context,
    settings: &Settings,
    from: &Place,
    paths: &BTreeSet<StorePath>,
    how: How<'_>,
) -> Result<Vec<StorePath>, Failure> {
    let store = from.store();
    let all = if how.no_closure { paths.clone() } else { store.closure(paths, how.include_outputs)? };
    match from {
        Place::Here(engine) => protect(&engine.local, &all)?,
        Place::Far(opened) if how.logs && opened.files.is_none() => {
            return Err(PushError::LogsElsewhere { uri: opened.uri.clone() }.into());
        }
        Place::Far(_) => drop(store.hold_valid(&all, false)?),
    }
    let jobs = how.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, std::num::NonZero::get)).max(1);
    let uri = CacheUri::parse(how.uri)?;
    let client = Client::new(client_options(&cx.env, settings), Arc::clone(&cx.terminal) as _);
    let lookups = Lookups::new(Some(&cx.env.cache_folder()), lifetimes(settings), Arc::clone(&cx.terminal) as _);
    let threads = u32::try_from(jobs).unwrap_or(1);
    let writer = Writer::open(&uri, store.dir(), &client, lookups, Method::Zstd, threads)?;
    let missing = store.sorted(&writer.missing(&all)?)?;
    if !missing.is_empty() || how.dry_run {
        cx.terminal.message(Level::Info, format_args!("copying {} paths...", missing.len()));
    }
    if how.dry_run {
        return Ok(missing);
    }
    if let Some(layout) = from.layout().filter(|_| how.logs) {
        push_logs(store, layout, &writer, &all)?;
    }
    let mut infos = Vec::with_capacity(missing.len());
    for (path, info) in missing.iter().zip(store.infos(&missing)?) {
        infos.push(info.ok_or_else(|| ApiError::not_valid(store.dir(), path))?);
    }
    let begin = |path: &StorePath| {
        let path = store.dir().display(path);
        cx.terminal.message(Level::Info, format_args!("copying path '{path}' to '{}'...", writer.uri()));
    };
    write_all(&writer, &infos, jobs, &begin, &|path, out| store.nar(path, out))?;
    Ok(missing)
}

/// Copies the logs of what made some paths, where they are here.
fn push_logs(store: &dyn Store, layout: &Layout, writer: &Writer, paths: &BTreeSet<StorePath>) -> Result<(), Failure> {
    let list: Vec<StorePath> = paths.iter().cloned().collect();
    let derivers = store.infos(&list)?.into_iter().flatten().filter_map(|info| info.deriver);
    let own = paths.iter().filter(|path| path.is_derivation()).cloned();
    for drv in derivers.chain(own).collect::<BTreeSet<_>>() {
        if let Some(mut log) = logs::open(layout, &drv)? {
            writer.write_log(&drv, &mut log)?;
        }
    }
    Ok(())
}

/// Keeps paths from being collected, where this user may.
pub(super) fn protect(store: &LocalStore, paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
    store.add_temp_roots(paths).or_else(|error| match error {
        // From a store that is not theirs an ordinary user copies too; a collection in between
        // shows as an error.
        StoreError::File(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        other => Err(other),
    })
}
