//! A store in memory, for tests and fuzz bodies.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use larder_core::api::{
    AddOptions, BuildMode, BuildResult, BuildStatus, Collect, Collected, ContentMethod, DerivedPath, ErrorKind,
    Missing, NarSource, NewContent, ReadStore, RootLink, Store, StoreError, Substitutable,
};
use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::{Derivation, OutputName};
use larder_core::hash::{Algorithm, Hash, NarHasher, Sha256Digest};
use larder_core::hash_part::HashPart;
use larder_core::nar::{Event, Parser, encoder};
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::signature::Signature;
use larder_core::store_dir::{References, StoreDir};
use larder_core::store_path::StorePath;

use crate::serve::ops::BuildOptions;
use crate::worker::ops::SetOptions;
use crate::worker::server::{Host, Session};
use crate::worker::tunnel::Tunnel;

/// Records and NARs by path. Builds nothing.
#[derive(Debug)]
pub struct MemoryStore {
    dir: StoreDir,
    objects: Mutex<BTreeMap<StorePath, (PathInfo, Vec<u8>)>>,
    realisations: Mutex<BTreeMap<DrvOutput, Realisation>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn other(text: impl Into<String>) -> StoreError {
    StoreError::new(ErrorKind::Other, text.into())
}

/// Bytes of the one regular file in a NAR.
fn contents(nar: &[u8]) -> Result<Vec<u8>, StoreError> {
    let (mut parser, mut rest, mut contents) = (Parser::default(), nar, Vec::new());
    while let Some(event) = parser.next(&mut rest).map_err(|e| StoreError::new(ErrorKind::Other, e))? {
        match event {
            Event::Contents(bytes) => contents.extend_from_slice(bytes),
            Event::File { .. } | Event::EndFile => {}
            _ => return Err(other("not a regular file")),
        }
    }
    Ok(contents)
}

/// Is it one NAR, and nothing else?
fn check_nar(nar: &[u8]) -> Result<(), StoreError> {
    let (mut parser, mut rest) = (Parser::default(), nar);
    while parser.next(&mut rest).map_err(|e| StoreError::new(ErrorKind::Other, e))?.is_some() {}
    parser.finish().map_err(|e| StoreError::new(ErrorKind::Other, e))?;
    if rest.is_empty() { Ok(()) } else { Err(other("the archive is followed by bytes that do not belong to it")) }
}

impl MemoryStore {
    pub fn new(dir: StoreDir) -> Self {
        Self { dir, objects: Mutex::default(), realisations: Mutex::default() }
    }

    fn put(&self, info: PathInfo, nar: Vec<u8>) -> Result<(), StoreError> {
        let mut objects = lock(&self.objects);
        if let Some(missing) = info.references.iter().find(|path| **path != info.path && !objects.contains_key(path)) {
            return Err(StoreError::not_valid(&self.dir, missing));
        }
        objects.entry(info.path.clone()).or_insert((info, nar));
        Ok(())
    }

    /// What must hold at any time: contents are as recorded, and references are valid.
    pub fn check(&self) {
        let objects = lock(&self.objects);
        for (path, (info, nar)) in objects.iter() {
            assert_eq!(path, &info.path);
            let mut hasher = NarHasher::new();
            hasher.update(nar);
            assert_eq!(hasher.finish().0, info.nar_hash, "{path}");
            check_nar(nar).expect("only whole archives are registered");
            for reference in &info.references {
                assert!(objects.contains_key(reference), "{path} needs {reference}");
            }
        }
    }
}

impl ReadStore for MemoryStore {
    fn dir(&self) -> &StoreDir {
        &self.dir
    }
    fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, StoreError> {
        Ok(lock(&self.objects).get(path).map(|(info, _)| info.clone()))
    }
    fn all_paths(&self) -> Result<BTreeSet<StorePath>, StoreError> {
        Ok(lock(&self.objects).keys().cloned().collect())
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        let objects = lock(&self.objects);
        Ok(objects.values().filter(|(i, _)| i.references.contains(path)).map(|(i, _)| i.path.clone()).collect())
    }
    fn valid_derivers(&self, _path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        Ok(BTreeSet::new())
    }
    fn by_hash_part(&self, hash_part: HashPart) -> Result<Option<StorePath>, StoreError> {
        Ok(lock(&self.objects).keys().find(|path| path.hash_part() == hash_part).cloned())
    }
    fn derivation_outputs(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>, StoreError> {
        Err(StoreError::not_valid(&self.dir, drv))
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, StoreError> {
        Ok(lock(&self.realisations).get(id).cloned())
    }
    fn listed_closure(
        &self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<Option<Vec<StorePath>>, StoreError> {
        self.sorted(&self.closure(paths, include_outputs)?).map(Some)
    }
    fn sorted(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, StoreError> {
        // References first: what is placed, then whatever needs nothing but that.
        let (mut order, mut left) = (Vec::new(), paths.clone());
        while !left.is_empty() {
            let free = |path: &StorePath| {
                let info = self.info(path).ok().flatten();
                info.is_none_or(|i| i.references.iter().all(|r| r == path || !left.contains(r)))
            };
            let next: Vec<StorePath> = left.iter().filter(|path| free(path)).cloned().collect();
            if next.is_empty() {
                return Err(other("cycle detected"));
            }
            for path in next {
                left.remove(&path);
                order.push(path);
            }
        }
        Ok(order)
    }
    fn nar(&self, path: &StorePath, out: &mut dyn Write) -> Result<(), StoreError> {
        let objects = lock(&self.objects);
        let (_, nar) = objects.get(path).ok_or_else(|| StoreError::not_valid(&self.dir, path))?;
        Ok(out.write_all(nar)?)
    }
}

impl Store for MemoryStore {
    fn add_temp_roots(&self, _paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
        Ok(())
    }
    fn add_indirect_root(&self, _link: &Path) -> Result<(), StoreError> {
        Ok(())
    }
    fn add_root(&self, _path: &StorePath, _link: &Path) -> Result<(), StoreError> {
        Ok(())
    }
    fn roots(&self) -> Result<Vec<RootLink>, StoreError> {
        let root = |path: &StorePath| RootLink { link: b"{temp:1}".to_vec(), path: path.clone(), is_private: true };
        Ok(lock(&self.objects).keys().take(1).map(root).collect())
    }
    fn collect(&self, what: &Collect, _max_freed_bytes: u64) -> Result<Collected, StoreError> {
        let live = self.all_paths()?.iter().map(|path| self.dir.full(path).into_bytes()).collect();
        match what {
            Collect::ListLive => Ok(Collected { paths: live, bytes_freed: 0 }),
            Collect::ListDead | Collect::DeleteDead => Ok(Collected::default()),
            Collect::DeleteSpecific(_) => Err(other("still alive")),
        }
    }
    fn add_content(&self, new: &NewContent, source: &mut dyn Read) -> Result<PathInfo, StoreError> {
        let mut bytes = Vec::new();
        source.read_to_end(&mut bytes)?;
        if new.is_nar {
            check_nar(&bytes)?;
        }
        let (nar, address) = match new.method {
            ContentMethod::Text => (encoder::file(&bytes, false), ContentAddress::Text(Sha256Digest::of(&bytes))),
            ContentMethod::Fixed(Method::Flat, algorithm) => {
                let file = if new.is_nar { contents(&bytes)? } else { bytes };
                (encoder::file(&file, false), ContentAddress::Fixed(Method::Flat, Hash::of(algorithm, &file)))
            }
            ContentMethod::Fixed(method, algorithm) => {
                let address = ContentAddress::Fixed(method, Hash::of(algorithm, &bytes));
                (bytes, address)
            }
        };
        let references = References { others: new.references.clone(), to_self: false };
        let path = self.dir.make_content_path(&new.name, &address, &references);
        let path = path.map_err(|error| StoreError::new(ErrorKind::Other, error))?;
        let mut info =
            PathInfo::new(path, Hash::of(Algorithm::Sha256, &nar).sha256().expect("SHA-256"), nar.len() as u64);
        info.references.clone_from(&new.references);
        info.content_address = Some(address);
        self.put(info.clone(), nar)?;
        Ok(info)
    }
    fn add_nars(&self, source: &mut dyn NarSource, options: AddOptions) -> Result<(), StoreError> {
        while let Some(info) = source.next_object()? {
            let mut nar = Vec::new();
            source.read_to_end(&mut nar)?;
            check_nar(&nar)?;
            if Sha256Digest::of(&nar) != info.nar_hash {
                return Err(other("hash mismatch importing path"));
            }
            if options.check_signatures && !info.is_content_addressed(&self.dir) {
                return Err(StoreError::new(ErrorKind::Refused, "it lacks a signature by a trusted key"));
            }
            self.put(info, nar)?;
        }
        Ok(())
    }
    fn import(&self, source: &mut dyn BufRead) -> Result<Vec<StorePath>, StoreError> {
        let mut word = [0; 8];
        source.read_exact(&mut word)?;
        if word == [0; 8] { Ok(Vec::new()) } else { Err(other("this store imports nothing")) }
    }
    fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<(), StoreError> {
        let mut objects = lock(&self.objects);
        let (info, _) = objects.get_mut(path).ok_or_else(|| StoreError::not_valid(&self.dir, path))?;
        info.signatures.extend(signatures.iter().cloned());
        Ok(())
    }
    fn add_realisation(&self, realisation: &Realisation) -> Result<(), StoreError> {
        lock(&self.realisations).insert(realisation.id.clone(), realisation.clone());
        Ok(())
    }
    fn add_build_log(&self, _drv: &StorePath, source: &mut dyn Read) -> Result<(), StoreError> {
        std::io::copy(source, &mut std::io::sink())?;
        Ok(())
    }
    fn optimise(&self) -> Result<(), StoreError> {
        Ok(())
    }
    fn verify(&self, _check_contents: bool, _repair: bool) -> Result<bool, StoreError> {
        Ok(false)
    }
    fn missing(&self, targets: &[DerivedPath]) -> Result<Missing, StoreError> {
        let unknown = targets.iter().map(|target| target.path().clone()).collect();
        Ok(Missing { unknown, ..Missing::default() })
    }
    fn substitutable(
        &self,
        _paths: &BTreeMap<StorePath, Option<ContentAddress>>,
    ) -> Result<Vec<Substitutable>, StoreError> {
        Ok(Vec::new())
    }
    fn build(&self, targets: &[DerivedPath], _mode: BuildMode) -> Result<Vec<BuildResult>, StoreError> {
        let each = |target: &DerivedPath| {
            let is_there = matches!(target, DerivedPath::Opaque(path) if lock(&self.objects).contains_key(path));
            if is_there {
                return BuildResult { status: BuildStatus::AlreadyValid, ..BuildResult::default() };
            }
            let error = "this store builds nothing".to_owned();
            BuildResult { status: BuildStatus::PermanentFailure, error, ..BuildResult::default() }
        };
        Ok(targets.iter().map(each).collect())
    }
    fn realise(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<(), StoreError> {
        match self.build(targets, mode)?.into_iter().find(|result| !result.status.is_success()) {
            None => Ok(()),
            Some(result) => Err(StoreError::new(ErrorKind::BuildFailed { status: 100 }, result.error)),
        }
    }
    fn build_derivation(
        &self,
        _path: &StorePath,
        _drv: &Derivation,
        _mode: BuildMode,
    ) -> Result<BuildResult, StoreError> {
        Ok(BuildResult::default())
    }
}

/// Gives every connection the same store.
#[derive(Debug)]
pub struct MemoryHost {
    pub store: MemoryStore,
}

/// A connection to a [`MemoryStore`].
struct MemorySession<'h>(&'h MemoryStore);

impl Session for MemorySession<'_> {
    fn store(&self) -> &dyn Store {
        self.0
    }
    fn configure(&mut self, _wishes: &SetOptions, _trusted: bool) {}
}

impl crate::serve::server::Session for MemorySession<'_> {
    fn store(&self) -> &dyn Store {
        self.0
    }
    fn configure_builds(&mut self, _options: &BuildOptions) {}
}

impl Host for MemoryHost {
    fn dir(&self) -> &StoreDir {
        &self.store.dir
    }
    fn open(&self, _tunnel: Arc<Tunnel>, _trusted: bool) -> Result<Box<dyn Session + '_>, StoreError> {
        Ok(Box::new(MemorySession(&self.store)))
    }
}

impl MemoryHost {
    /// Serves the serve protocol.
    pub fn serve(
        &self,
        input: &mut dyn BufRead,
        output: &mut dyn Write,
        may_write: bool,
    ) -> Result<(), crate::serve::server::ServeError> {
        crate::serve::server::serve(input, output, &mut MemorySession(&self.store), may_write)
    }
}
