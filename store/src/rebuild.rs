//! A ledger made anew from what lies in the store directory, after the old one was lost.
//!
//! Hashes, sizes, references and the outputs of derivations are in the objects themselves. Content
//! addresses follow from a path's own name: if the hash of the contents leads to it, the object is
//! proved to be whole. What was only in the old ledger is lost, and said to be: when a path was
//! registered, signatures, what was built here, and which of several derivations made a path.
//! An object that is no content-addressed one may be half built or damaged without anybody knowing.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use larder_core::content_address::{ContentAddress, Method};
use larder_core::hash::{Algorithm, Hash, Hasher, NarHasher};
use larder_core::nar::{Event, Limits, Parser};
use larder_core::path_info::PathInfo;
use larder_core::report::{Level, Progress, Unit};
use larder_core::store_path::StorePath;
use larder_fs::dump::{self, DumpOptions};
use larder_fs::file_error::FileError;
use larder_fs::gc_lock::{GcLock, WAITING};
use larder_fs::lock_file::{Sharing, Wait};
use larder_store_db::check::Finding;
use larder_store_db::{Batch, DbError, Mode, OpenOptions, StoreDb};
use rayon::prelude::*;
use rustc_hash::FxHashMap;

use crate::error::{StoreError, chain};
use crate::ingest::stream_error;
use crate::local::{LocalStore, now_s};

/// What lies beside a path while it is made, by the end of its name.
const BESIDE: [&str; 4] = [".lock", ".check", ".chroot", ".drv.chroot"];

/// What came of it. Names are base names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// Registered, and proved to be whole.
    pub proved: Vec<StorePath>,
    /// Registered as they are.
    pub taken: Vec<StorePath>,
    /// Not registered, and why.
    pub left: Vec<(String, String)>,
    /// Paths that several derivations can make, so that their deriver is not known.
    pub unknown_derivers: Vec<StorePath>,
}

/// An object that was read.
struct Read {
    info: PathInfo,
    proved: bool,
    outputs: BTreeMap<String, StorePath>,
}

/// Which ledgers are put out of the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetAside {
    /// Those that cannot be read, or not be written to.
    Broken,
    /// Any. What it says may be wrong in a way that only its owner knows of.
    Any,
}

/// Puts a ledger out of the way; gives where it is now, `None` if it stays.
///
/// Opening it is how one finds out whether it is sound.
pub fn set_ledger_aside(db_dir: &Path, which: SetAside) -> Result<Option<PathBuf>, StoreError> {
    let db = match StoreDb::open(db_dir, &OpenOptions::new(Mode::Existing)) {
        Err(DbError::Missing { .. }) => return Ok(None),
        db => db?,
    };
    if which == SetAside::Broken && !is_broken(&db)? {
        return Ok(None);
    }
    let file = db.path().to_owned();
    drop(db);
    let mut aside = file.as_os_str().to_owned();
    aside.push(format!(".broken-{}", now_s()));
    std::fs::rename(&file, &aside).map_err(|e| FileError::new("moving aside", &file, e))?;
    Ok(Some(aside.into()))
}

fn is_broken(db: &StoreDb) -> Result<bool, DbError> {
    // Some of what a reader never looks at is needed for writing.
    match db.check().and_then(|findings| db.settle().map(|()| findings)) {
        Ok(findings) => Ok(findings.iter().any(|finding| matches!(finding, Finding::BadRecord { .. }))),
        Err(
            DbError::Corrupt { .. }
            | DbError::Damaged { .. }
            | DbError::Storage { .. }
            | DbError::Inconsistent { .. }
            | DbError::Record { .. },
        ) => Ok(true),
        Err(error) => Err(error),
    }
}

impl LocalStore {
    /// Registers what lies in the store directory and is not valid, as far as it can be.
    ///
    /// Nobody deletes anything meanwhile. What is valid already stays as it is. With `dry_run` nothing is
    /// registered.
    pub fn rebuild(&self, dry_run: bool) -> Result<Rebuilt, StoreError> {
        let say = |text: std::fmt::Arguments<'_>| self.reporter().message(Level::Info, text);
        self.ledger()?;
        let mut wait = |_: &Path| say(format_args!("{WAITING}"));
        let _lock = GcLock::acquire(self.layout(), Sharing::Exclusive, Wait::Yes(&mut wait))?;
        let mut rebuilt = Rebuilt::default();
        let mut found = BTreeSet::new();
        for name in self.entry_names()? {
            let shown = || name.to_string_lossy().into_owned();
            if name == ".links" {
                continue;
            }
            match StorePath::from_base_name(name.as_bytes()) {
                Ok(path) if is_unfinished(&path) => rebuilt.left.push((shown(), "left over from an addition".into())),
                Ok(path) => drop(found.insert(path)),
                Err(error) => rebuilt.left.push((shown(), error.to_string())),
            }
        }
        let names: Names<'_> = found.iter().map(|path| (path.hash_part().to_text(), path)).collect();
        let valid = self.valid_subset(&found)?;
        let missing: Vec<&StorePath> = found.difference(&valid).collect();
        self.reporter().progress(Progress::Begin {
            what: "reading objects",
            total: Some(missing.len() as u64),
            unit: Unit::Paths,
        });
        let read: Vec<(&StorePath, Result<Read, StoreError>)> = missing
            .into_par_iter()
            .map(|path| {
                let read = self.check_interrupt().and_then(|()| self.read_object(path, &names));
                self.reporter().progress(Progress::Advance(1));
                (path, read)
            })
            .collect();
        self.reporter().progress(Progress::End);
        let mut objects: BTreeMap<StorePath, Read> = BTreeMap::new();
        for (path, read) in read {
            match read {
                Ok(read) => drop(objects.insert(path.clone(), read)),
                Err(StoreError::Interrupted) => return Err(StoreError::Interrupted),
                Err(error) => rebuilt.left.push((path.to_string(), chain(&error))),
            }
        }
        leave_incomplete(&mut objects, &valid, &mut rebuilt);
        find_derivers(&mut objects, &mut rebuilt);
        let mut batch = Batch::new();
        for (path, object) in &objects {
            batch.push_info(&object.info, &object.outputs)?;
            if object.proved { &mut rebuilt.proved } else { &mut rebuilt.taken }.push(path.clone());
        }
        if !dry_run {
            self.register(batch)?;
        }
        rebuilt.left.sort();
        Ok(rebuilt)
    }

    fn read_object(&self, path: &StorePath, names: &Names<'_>) -> Result<Read, StoreError> {
        let mut hasher = NarHasher::new();
        let mut mentions = Mentions { names, run: Vec::new(), found: BTreeSet::new() };
        let mut flat = FlatHash::new();
        let options = DumpOptions { case_hack: self.options().use_case_hack, below: Some(&self.layout().real_store) };
        let name = path.to_string();
        dump::dump(self.object_dir()?, OsStr::new(&name), &options, |bytes| {
            hasher.update(bytes);
            mentions.push(bytes);
            flat.push(bytes);
            Ok::<(), StoreError>(())
        })
        .map_err(stream_error)?;
        let (nar_hash, nar_size_bytes) = hasher.finish();
        let mut info = PathInfo::new(path.clone(), nar_hash, nar_size_bytes);
        info.references = mentions.found.into_iter().cloned().collect();
        info.registration_time_s = now_s();
        let mut addresses = vec![ContentAddress::Fixed(Method::Recursive, nar_hash.to_hash())];
        if let Some(hash) = flat.finish() {
            addresses.push(ContentAddress::Fixed(Method::Flat, hash));
            addresses.extend(hash.sha256().map(ContentAddress::Text));
        }
        for address in addresses {
            info.content_address = Some(address);
            if info.is_content_addressed(self.dir()) {
                break;
            }
            info.content_address = None;
        }
        let proved = info.content_address.is_some();
        let mut outputs = BTreeMap::new();
        if path.is_derivation() {
            let drv = self.derivation(path)?;
            outputs = drv.output_paths().filter_map(|(n, p)| Some((n.as_str().to_owned(), p?.clone()))).collect();
        }
        Ok(Read { info, proved, outputs })
    }
}

/// Is it something that lies beside a path, or on the way to one?
fn is_unfinished(path: &StorePath) -> bool {
    let name = path.name().as_str();
    name == "larder-incoming" || BESIDE.iter().any(|end| name.ends_with(end))
}

/// What refers to something that is not there, or was not taken, is not taken either. Objects that
/// refer to each other in a ring cannot be told from chance, and stay out too.
fn leave_incomplete(objects: &mut BTreeMap<StorePath, Read>, valid: &BTreeSet<StorePath>, rebuilt: &mut Rebuilt) {
    loop {
        let lacking = |object: &Read| {
            let known = |path: &&StorePath| !objects.contains_key(*path) && !valid.contains(*path);
            object.info.references.iter().find(known).cloned()
        };
        let out: Vec<(StorePath, StorePath)> =
            objects.iter().filter_map(|(path, object)| Some((path.clone(), lacking(object)?))).collect();
        if out.is_empty() {
            break;
        }
        for (path, missing) in out {
            objects.remove(&path);
            rebuilt.left.push((path.to_string(), format!("it refers to '{missing}', which was not taken")));
        }
    }
    // References first, until nothing more can be taken.
    let mut taken: BTreeSet<StorePath> = valid.clone();
    loop {
        let ready: Vec<StorePath> = objects
            .iter()
            .filter(|(path, object)| {
                !taken.contains(*path) && object.info.references.iter().all(|r| r == *path || taken.contains(r))
            })
            .map(|(path, _)| path.clone())
            .collect();
        if ready.is_empty() {
            break;
        }
        taken.extend(ready);
    }
    objects.retain(|path, _| {
        let keep = taken.contains(path);
        if !keep {
            rebuilt.left.push((path.to_string(), "it is part of a ring of references".into()));
        }
        keep
    });
}

fn find_derivers(objects: &mut BTreeMap<StorePath, Read>, rebuilt: &mut Rebuilt) {
    let mut makers: BTreeMap<StorePath, Vec<StorePath>> = BTreeMap::new();
    for (path, object) in objects.iter() {
        for output in object.outputs.values() {
            makers.entry(output.clone()).or_default().push(path.clone());
        }
    }
    for (output, makers) in makers {
        let Some(object) = objects.get_mut(&output) else { continue };
        match makers.as_slice() {
            [only] => object.info.deriver = Some(only.clone()),
            _ => rebuilt.unknown_derivers.push(output),
        }
    }
}

/// All that may be referred to, by the text of its hash part.
type Names<'a> = FxHashMap<[u8; 32], &'a StorePath>;

/// Looks for any of very many hash parts: the usual scanner is for the few inputs of one build, and
/// takes a copy of its candidates for each object.
struct Mentions<'a> {
    names: &'a Names<'a>,
    /// The last characters, as far as all of them may be of a hash part.
    run: Vec<u8>,
    found: BTreeSet<&'a StorePath>,
}

impl Mentions<'_> {
    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if !matches!(byte, b'0'..=b'9' | b'a'..=b'd' | b'f'..=b'n' | b'p'..=b's' | b'v'..=b'z') {
                self.run.clear();
                continue;
            }
            self.run.push(*byte);
            if let Some(last) = self.run.last_chunk::<32>()
                && let Some(path) = self.names.get(last)
            {
                self.found.insert(path);
            }
            if self.run.len() > 4096 {
                self.run.drain(..4096 - 31);
            }
        }
    }
}

/// The hash of the contents of an archive that holds one plain file.
struct FlatHash {
    parser: Parser,
    hasher: Option<Hasher>,
}

impl FlatHash {
    fn new() -> Self {
        Self { parser: Parser::new(Limits::default()), hasher: Some(Hasher::new(Algorithm::Sha256)) }
    }

    fn push(&mut self, mut bytes: &[u8]) {
        while let Some(hasher) = &mut self.hasher
            && !bytes.is_empty()
        {
            match self.parser.next(&mut bytes) {
                Ok(Some(Event::File { executable: false, .. } | Event::EndFile)) => {}
                Ok(Some(Event::Contents(contents))) => hasher.update(contents),
                Ok(None) => return,
                _ => self.hasher = None,
            }
        }
    }

    fn finish(self) -> Option<Hash> {
        self.hasher.map(Hasher::finish)
    }
}
