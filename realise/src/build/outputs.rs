//! From what a builder left behind to registered outputs.
//!
//! Source: building, sections 6 and 12; formats, section 6. The order matters: first the owner of
//! every entry is checked and the metadata made canonical (a builder may have linked somebody
//! else's secret file into its output), only then is anything read. Outputs that somebody may
//! still have open for writing are copied before they are hashed (CVE-2024-27297).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::{Output as Declared, OutputMethod, OutputName};
use larder_core::hash::{Algorithm, Encoding, Hash};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;
use larder_fs::canon::{self, CanonError, CanonOptions, Origin, Seen};
use larder_fs::entry::Target;
use larder_fs::file_error::FileError;
use larder_fs::lock_file::Wait;
use larder_fs::path_lock::{OnRelease, PathLocks};
use larder_store::StoreError;
use larder_store::adopt::{Output, Take, Taken, Way, is_missing};
use rustix::fs::{AtFlags, FileType};

use super::journal::Journal;
use super::tempdir::Notes as _;
use super::{Build, Place, checks, floating};
use crate::job::{Failure, FailureKind, Mode};
use crate::signing::sign_path;

/// Where the builder's outputs lie.
#[derive(Debug)]
pub(super) struct Left<'a> {
    /// The store directory as the builder saw it.
    pub dir: BorrowedFd<'a>,
    pub dir_path: &'a Path,
    /// Who made them.
    pub uids: RangeInclusive<u32>,
    pub way: Way,
    pub journal: &'a Journal,
}

impl<'a> Left<'a> {
    fn target(&self, name: &'a OsStr) -> Target<'a> {
        Target { dir: self.dir, name, dir_path: self.dir_path }
    }
}

pub(super) fn rejected(text: String) -> Failure {
    Failure::new(FailureKind::OutputRejected, text)
}

/// All outputs of a build that are to be registered (or compared), out of the builder's reach.
pub(super) type Collected<'s> = BTreeMap<OutputName, Output<'s>>;

/// Takes the outputs in and finds out what is to be recorded of them.
pub(super) fn collect<'s>(build: &Build<'s>, left: &Left<'_>) -> Result<Collected<'s>, Failure> {
    let origin = Origin::Builder(left.uids.clone());
    let options = CanonOptions { origin: &origin, ignored_acls: &build.store.options().ignored_acls };
    let mut seen = Seen::default();
    for (name, place) in build.outputs.iter().filter(|(_, place)| place.wanted) {
        let entry = place.scratch.to_string();
        let target = left.target(OsStr::new(&entry));
        let canonical = canon::check_output(target, name.as_str(), &left.uids).and_then(|()| {
            // Files first: what follows reads them.
            canon::canonicalise(target, &options, &mut seen)
        });
        canonical.map_err(|error| canon_failure(build, name, &left.dir_path.join(&entry), &error))?;
        if let Some(Declared::Fixed { address, .. }) = build.job.drv.outputs.get(name)
            && OutputMethod::of(address) != OutputMethod::RECURSIVE
        {
            require_flat(target, &left.dir_path.join(&entry))?;
        }
    }
    let candidates: BTreeSet<HashPart> = build
        .inputs
        .iter()
        .map(StorePath::hash_part)
        .chain(build.outputs.values().map(|place| place.path.hash_part()))
        .collect();
    let rewrites: Vec<(HashPart, HashPart)> = build.rewrites.iter().map(|(from, to)| (*to, *from)).collect();
    let mut collected = BTreeMap::new();
    for (name, place) in build.outputs.iter().filter(|(_, place)| place.wanted) {
        let entry = place.scratch.to_string();
        let also = match build.job.drv.outputs.get(name) {
            Some(Declared::Fixed { address: ContentAddress::Fixed(Method::Recursive, hash), .. }) => {
                Some(hash.algorithm()).filter(|algorithm| *algorithm != Algorithm::Sha256)
            }
            _ => None,
        };
        let take = Take { way: left.way, candidates: &candidates, rewrites: &rewrites, also };
        let taken = build.store.take(left.target(OsStr::new(&entry)), &take, &|path| left.journal.making(path))?;
        let info = describe(build, name, &place.path, &taken);
        collected.insert(name.clone(), Output { taken, info });
    }
    let infos = infos(&collected);
    if let Some((path, parent)) = checks::find_cycle(&infos) {
        let drv = build.shown_drv();
        return Err(rejected(format!(
            "cycle detected in build of '{drv}' in the references of output '{path}' from output '{parent}'"
        )));
    }
    Ok(collected)
}

fn canon_failure(build: &Build<'_>, name: &OutputName, path: &Path, error: &CanonError) -> Failure {
    if is_missing(error) && matches!(error, CanonError::File(file) if file.path == path) {
        let drv = build.shown_drv();
        let path = larder_fs::file_error::shown(path);
        return rejected(format!("builder for '{drv}' failed to produce output path for output '{name}' at '{path}'"));
    }
    let kind = match error {
        CanonError::File(_) | CanonError::Attribute { .. } => FailureKind::Misc,
        _ => FailureKind::OutputRejected,
    };
    Failure::of(kind, error)
}

fn require_flat(target: Target<'_>, path: &Path) -> Result<(), Failure> {
    let status = rustix::fs::statat(target.dir, target.name, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(|e| FileError::new("getting status of", path, std::io::Error::from(e)))?;
    if FileType::from_raw_mode(status.st_mode) == FileType::RegularFile && status.st_mode & 0o100 == 0 {
        return Ok(());
    }
    Err(rejected(format!(
        "output path '{}' should be a non-executable regular file since recursive hashing is not enabled \
         (outputHashMode=flat)",
        larder_fs::file_error::shown(path)
    )))
}

fn infos(collected: &Collected<'_>) -> BTreeMap<OutputName, PathInfo> {
    collected.iter().map(|(name, output)| (name.clone(), output.info.clone())).collect()
}

/// The record of an output.
fn describe(build: &Build<'_>, name: &OutputName, path: &StorePath, taken: &Taken<'_>) -> PathInfo {
    let mut info = PathInfo::new(path.clone(), taken.nar_hash(), taken.nar_size_bytes());
    info.deriver = Some(build.job.drv_path.clone());
    info.ultimate = true;
    if !discards_references(build, name) {
        let all = build.inputs.iter().chain(build.outputs.values().map(|place| &place.path));
        info.references = all.filter(|path| taken.found().contains(&path.hash_part())).cloned().collect();
    }
    if let Some(Declared::Fixed { address, .. }) = build.job.drv.outputs.get(name) {
        info.content_address = Some(address.clone());
    }
    info
}

/// `unsafeDiscardReferences.OUT`, of structured attributes only.
fn discards_references(build: &Build<'_>, name: &OutputName) -> bool {
    let structured = build.attributes.structured();
    let all = structured.and_then(|map| map.get("unsafeDiscardReferences"));
    all.and_then(|all| all.get(name.as_str())) == Some(&serde_json::Value::Bool(true))
}

/// Checks a fixed output against its hash. What came instead is registered under the path that
/// belongs to it, so that a corrected derivation finds it.
pub(super) fn check_fixed<'s>(
    build: &Build<'s>,
    mut collected: Collected<'s>,
    journal: &Journal,
) -> Result<Collected<'s>, Failure> {
    let fixed = build.job.drv.outputs.iter().find_map(|(name, output)| match output {
        Declared::Fixed { address, .. } => Some((name, address)),
        _ => None,
    });
    let Some((name, address)) = fixed else { return floating::settle(build, collected, journal) };
    let Some(output) = collected.remove(name) else { return Ok(collected) };
    let (wanted, got, actual) = found_address(build, address, &output.taken)?;
    if wanted == got {
        if !output.info.references.is_empty() {
            return Err(rejected(format!(
                "fixed output derivation '{}' is not allowed to refer to other store paths.\nYou may need to use the \
                 'unsafeDiscardReferences' derivation attribute, see the manual for more details.",
                output.info.path.name()
            )));
        }
        collected.insert(name.clone(), output);
        return Ok(collected);
    }
    let text = format!(
        "hash mismatch in fixed-output derivation '{}':\n  specified: {}\n     got:    {}",
        build.shown_drv(),
        wanted.encode(Encoding::Sri),
        got.encode(Encoding::Sri)
    );
    if build.job.mode != Mode::Check && output.info.references.is_empty() {
        let path = build
            .store
            .dir()
            .make_content_path(output.info.path.name(), &actual, &output.info.split_references())
            .map_err(StoreError::from)?;
        let mut output = output;
        output.info.path = path;
        output.info.content_address = Some(actual);
        sign_path(&build.settings.values, build.store.dir(), &mut output.info)?;
        build.store.register_content(output)?;
    }
    Err(Failure::new(FailureKind::HashMismatch, text))
}

/// The hash that was promised, the one there is, and the address with that.
fn found_address(
    build: &Build<'_>,
    address: &ContentAddress,
    taken: &Taken<'_>,
) -> Result<(Hash, Hash, ContentAddress), Failure> {
    let flat = |algorithm| {
        let hash = build.store.flat_hash(taken, algorithm)?;
        hash.ok_or_else(|| rejected("a flat output is no regular file any more".into()))
    };
    Ok(match address {
        ContentAddress::Text(digest) => {
            let got = flat(Algorithm::Sha256)?;
            let actual = got.sha256().map_or_else(|| address.clone(), ContentAddress::Text);
            (digest.to_hash(), got, actual)
        }
        ContentAddress::Fixed(Method::Flat, hash) => {
            let got = flat(hash.algorithm())?;
            (*hash, got, ContentAddress::Fixed(Method::Flat, got))
        }
        ContentAddress::Fixed(Method::Recursive, hash) => {
            let got = taken.also().unwrap_or_else(|| taken.nar_hash().to_hash());
            (*hash, got, ContentAddress::Fixed(Method::Recursive, got))
        }
        ContentAddress::Fixed(Method::Git, _) => {
            let drv = build.shown_drv();
            let text = format!("derivation '{drv}' promises a git hash, which cannot be checked here");
            return Err(Failure::new(FailureKind::InputRejected, text));
        }
    })
}

/// Checks what the derivation asks for, signs, and registers everything at once.
pub(super) fn register(build: &Build<'_>, collected: Collected<'_>, journal: &Journal) -> Result<(), Failure> {
    let closure = |paths: &BTreeSet<StorePath>| Ok(build.store.infos(&build.store.closure(paths)?)?);
    let path_of = |name: &OutputName, place: &Place| {
        collected.get(name).map_or_else(|| place.path.clone(), |output| output.info.path.clone())
    };
    let outputs: BTreeMap<OutputName, StorePath> =
        build.outputs.iter().map(|(name, place)| (name.clone(), path_of(name, place))).collect();
    let known =
        checks::Known { dir: build.store.dir(), drv_path: &build.job.drv_path, outputs: &outputs, closure: &closure };
    checks::check(&infos(&collected), &build.attributes, &known)?;
    let realised = floating::realisations(build, collected.iter().map(|(name, output)| (name, &output.info)))?;
    // Paths that nobody knew before are not locked yet.
    let mut locks = Vec::new();
    if build.is_floating() {
        let sorted: BTreeSet<&StorePath> = collected.values().map(|output| &output.info.path).collect();
        build.store.add_temp_roots(sorted.iter().copied())?;
        let real: Vec<PathBuf> = sorted.into_iter().map(|path| build.store.layout().real_path(path)).collect();
        locks.extend(PathLocks::acquire(&real, &build.store.options().held_locks, Wait::Yes(&mut |_| {}))?);
    }
    let mut outputs = Vec::with_capacity(collected.len());
    for (name, mut output) in collected {
        let Some(place) = build.outputs.get(&name) else { continue };
        if build.is_floating() {
            let path = &output.info.path;
            if place.known.as_ref().is_some_and(|known| known.path != *path) {
                let (drv, known) = (build.shown_drv(), build.store.dir().full(path));
                let text = format!("derivation '{drv}' may not be deterministic: output '{known}' differs");
                return Err(Failure::new(FailureKind::NotDeterministic, text));
            }
            // The same contents are there: those stay.
            if build.job.mode == Mode::Normal && build.store.is_valid_under_lock(path)? {
                continue;
            }
        }
        sign_path(&build.settings.values, build.store.dir(), &mut output.info)?;
        outputs.push(output);
    }
    build.store.register_outputs(outputs, &realised, &|path| journal.making(path))?;
    for mut lock in locks {
        lock.on_release(OnRelease::Delete);
        lock.release()?;
    }
    Ok(())
}
