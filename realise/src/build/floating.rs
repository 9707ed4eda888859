//! Outputs whose paths follow from their contents: where they are built, and what becomes of them.
//!
//! A builder makes them at scratch paths. Afterwards, those first that others refer to, each is
//! hashed with its own hash part left out, gets its path by that, and has the scratch paths in it
//! replaced. Source: modern, sections 2.4, 2.5 and 3.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::path::PathBuf;

use larder_core::base32;
use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::placeholder::scratch_path;
use larder_core::derivation::{Kind, Output as Declared, OutputMethod, OutputName};
use larder_core::hash::{Algorithm, Hash};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::store_dir::References;
use larder_core::store_path::StorePath;
use larder_fs::file_error::FileError;
use larder_store::adopt::{Output, Take, Way};
use larder_store::{LocalStore, StoreError};

use super::Build;
use super::journal::Journal;
use super::outputs::{Collected, rejected};
use super::tempdir::Notes as _;
use crate::job::{Failure, FailureKind, Job};
use crate::signing::sign_realisation;

/// The paths whose locks stand for a build: those of the outputs, or `DRV.OUTPUT`.
pub(super) fn places_to_lock(store: &LocalStore, job: &Job) -> BTreeSet<PathBuf> {
    let place = |(name, path): (&OutputName, Option<&StorePath>)| match path {
        Some(path) => store.layout().real_path(path),
        None => store.layout().real_store.join(format!("{}.{name}", job.drv_path)),
    };
    job.drv.output_paths().map(place).collect()
}

/// Where the outputs are, as far as that is known; else where they are built.
pub(super) fn paths(store: &LocalStore, job: &Job, kind: Kind) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
    if kind.has_paths() {
        return Ok(job.drv.output_paths().filter_map(|(name, path)| Some((name.clone(), path?.clone()))).collect());
    }
    let mut paths = scratch_paths(store, job, kind)?;
    if kind != Kind::Impure {
        for (name, known) in store.built_outputs(&job.drv)? {
            if let Some(path) = paths.get_mut(name.as_str()) {
                *path = known;
            }
        }
    }
    Ok(paths)
}

/// Where outputs are built that have no paths yet; none of others.
pub(super) fn scratch_paths(
    store: &LocalStore,
    job: &Job,
    kind: Kind,
) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
    if kind.has_paths() {
        return Ok(BTreeMap::new());
    }
    let scratch = |name: &OutputName| {
        let path = scratch_path(store.dir(), &job.drv_path, &job.drv.name, name)
            .map_err(|error| Failure::of(FailureKind::InputRejected, &error))?;
        // Somebody else may build the same impure derivation now, and both count.
        let path = if kind == Kind::Impure { elsewhere(&path)? } else { path };
        Ok((name.clone(), path))
    };
    job.drv.outputs.keys().map(scratch).collect()
}

/// The name of a path with a hash part that nobody can guess.
fn elsewhere(path: &StorePath) -> Result<StorePath, Failure> {
    const RANDOM: &str = "/dev/urandom";
    let mut bytes = [0; 20];
    std::fs::File::open(RANDOM)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|e| FileError::new("reading from", RANDOM, e))?;
    let text = format!("{}-{}", base32::encode(&bytes), path.name());
    text.parse().map_err(|error: larder_core::store_path::StorePathError| Failure::of(FailureKind::Misc, &error))
}

/// Gives each output its path and takes the scratch paths out of it.
pub(super) fn settle<'s>(
    build: &Build<'s>,
    collected: Collected<'s>,
    journal: &Journal,
) -> Result<Collected<'s>, Failure> {
    if build.kind.has_paths() {
        return Ok(collected);
    }
    let order = references_first(&collected);
    let mut left = collected;
    let mut settled = Collected::new();
    // Scratch paths of settled outputs and what they are now.
    let mut moved: BTreeMap<StorePath, StorePath> = build
        .outputs
        .values()
        .filter(|place| !place.wanted)
        .filter_map(|place| Some((place.path.clone(), place.known.as_ref()?.path.clone())))
        .collect();
    for name in order {
        let Some(output) = left.remove(&name) else { continue };
        let scratch = output.info.path.clone();
        let output = settle_one(build, &name, output, &moved, journal)?;
        moved.insert(scratch, output.info.path.clone());
        settled.insert(name, output);
    }
    Ok(settled)
}

/// The names of outputs, each after those that it refers to. There are no cycles among them.
fn references_first(collected: &Collected<'_>) -> Vec<OutputName> {
    let by_path: BTreeMap<&StorePath, &OutputName> =
        collected.iter().map(|(name, output)| (&output.info.path, name)).collect();
    let mut order: Vec<OutputName> = Vec::new();
    let mut todo: Vec<&OutputName> = collected.keys().collect();
    while !todo.is_empty() {
        let before = todo.len();
        todo.retain(|name| {
            let references = collected.get(*name).into_iter().flat_map(|output| &output.info.references);
            let waits =
                references.filter_map(|path| by_path.get(path)).any(|other| other != name && !order.contains(other));
            if !waits {
                order.push((*name).clone());
            }
            waits
        });
        if todo.len() == before {
            // A cycle, which was refused before.
            break;
        }
    }
    order
}

fn settle_one<'s>(
    build: &Build<'s>,
    name: &OutputName,
    output: Output<'s>,
    moved: &BTreeMap<StorePath, StorePath>,
    journal: &Journal,
) -> Result<Output<'s>, Failure> {
    let store = build.store;
    let (method, algorithm) = match build.job.drv.outputs.get(name) {
        Some(Declared::Floating { method, algorithm } | Declared::Impure { method, algorithm }) => {
            (*method, *algorithm)
        }
        _ => return Err(rejected(format!("output '{name}' has a path of its own"))),
    };
    let scratch = output.info.path.clone();
    let to_self = output.info.references.contains(&scratch);
    let others: BTreeSet<StorePath> = output
        .info
        .references
        .iter()
        .filter(|path| **path != scratch)
        .map(|path| moved.get(path).unwrap_or(path).clone())
        .collect();
    let parts = |(from, to): (&StorePath, &StorePath)| (from.hash_part(), to.hash_part());
    let mut rewrites: Vec<(HashPart, HashPart)> = moved.iter().map(parts).collect();
    let address = address_of(build, &output, method, algorithm, &rewrites)?;
    refuse_references(build, &address, !others.is_empty(), to_self)?;
    let references = References { others: others.clone(), to_self };
    let path = store.dir().make_content_path(scratch.name(), &address, &references).map_err(StoreError::from)?;
    rewrites.push((scratch.hash_part(), path.hash_part()));
    // What refers to nothing that has moved stays as it is.
    let refers = to_self || output.info.references.iter().any(|path| moved.contains_key(path));
    let Output { taken, mut info } = output;
    let taken = if refers {
        let take = Take { way: Way::Copy, candidates: &BTreeSet::new(), rewrites: &rewrites, also: None };
        store.retake(&taken, &take, &|path| journal.making(path))?
    } else {
        taken
    };
    (info.nar_hash, info.nar_size_bytes) = (taken.nar_hash(), taken.nar_size_bytes());
    info.references = others;
    if to_self {
        info.references.insert(path.clone());
    }
    info.path = path;
    info.content_address = Some(address);
    Ok(Output { taken, info })
}

fn address_of(
    build: &Build<'_>,
    output: &Output<'_>,
    method: OutputMethod,
    algorithm: Algorithm,
    rewrites: &[(HashPart, HashPart)],
) -> Result<ContentAddress, Failure> {
    let store = build.store;
    let flat = || -> Result<Hash, Failure> {
        let path = store.dir().full(&output.info.path);
        store.flat_hash(&output.taken, algorithm)?.ok_or_else(|| {
            rejected(format!(
                "output path '{path}' should be a non-executable regular file since recursive hashing is not enabled \
                 (outputHashMode=flat)"
            ))
        })
    };
    Ok(match method {
        OutputMethod::Text => {
            let hash = flat()?;
            let digest =
                hash.sha256().ok_or_else(|| rejected(format!("a text output is hashed by sha256, not {algorithm}")))?;
            ContentAddress::Text(digest)
        }
        OutputMethod::Fixed(Method::Flat) => ContentAddress::Fixed(Method::Flat, flat()?),
        OutputMethod::Fixed(Method::Recursive) => {
            let own = output.info.path.hash_part();
            let hashes = store.hash_modulo_self(&output.taken, rewrites, algorithm, own)?;
            ContentAddress::Fixed(Method::Recursive, hashes.with_offsets)
        }
        OutputMethod::Fixed(Method::Git) => {
            let drv = build.shown_drv();
            let text = format!("derivation '{drv}' wants a git hash, which cannot be made here");
            return Err(Failure::new(FailureKind::InputRejected, text));
        }
    })
}

/// Only archives by SHA-256, and texts, can refer to anything.
fn refuse_references(
    build: &Build<'_>,
    address: &ContentAddress,
    to_others: bool,
    to_self: bool,
) -> Result<(), Failure> {
    match address {
        ContentAddress::Text(_) if to_self => Err(rejected("self-reference not allowed with text hashing".into())),
        ContentAddress::Text(_) => Ok(()),
        ContentAddress::Fixed(Method::Recursive, hash) if hash.algorithm() == Algorithm::Sha256 => Ok(()),
        ContentAddress::Fixed(..) if !to_others && !to_self => Ok(()),
        ContentAddress::Fixed(..) => Err(rejected(format!(
            "fixed output derivation '{}' is not allowed to refer to other store paths.\nYou may need to use the \
             'unsafeDiscardReferences' derivation attribute, see the manual for more details.",
            build.job.drv.name
        ))),
    }
}

/// What the outputs of a build realise; none without the feature, and none if it is impure.
pub(super) fn realisations<'i>(
    build: &Build<'_>,
    infos: impl Iterator<Item = (&'i OutputName, &'i PathInfo)>,
) -> Result<Vec<Realisation>, Failure> {
    let values = &build.settings.values;
    if build.kind == Kind::Impure || !values.experimental_features.contains("ca-derivations") {
        return Ok(Vec::new());
    }
    let digest = build.store.output_ids_of(&build.job.drv)?;
    let one = |(name, info): (&OutputName, &PathInfo)| {
        let id = DrvOutput::new(digest, name.as_str()).map_err(|e| Failure::of(FailureKind::InputRejected, &e))?;
        let (out_path, signatures) = (info.path.clone(), BTreeSet::new());
        let mut realisation = Realisation { id, out_path, signatures, dependent_realisations: BTreeMap::new() };
        sign_realisation(values, &mut realisation)?;
        Ok(realisation)
    };
    infos.map(one).collect()
}
