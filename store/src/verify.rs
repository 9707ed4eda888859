//! Does the store hold what the ledger says?

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use larder_core::hash::{NarHasher, Sha256Digest};
use larder_core::path_info::PathInfo;
use larder_core::report::{Level, Progress, Unit};
use larder_core::store_path::StorePath;
use larder_fs::dump::{self, DumpOptions};
use larder_fs::gc_lock::{GcLock, WAITING};
use larder_fs::lock_file::{Sharing, Wait};
use larder_store_db::check::Finding;
use larder_store_db::graph::NodeSet;
use larder_store_db::{Graph, Node};
use rayon::prelude::*;

use crate::error::StoreError;
use crate::ingest::stream_error;
use crate::local::LocalStore;

/// Objects that are checked between two looks at what was found.
const CHUNK: usize = 256;

/// Archives larger than this (bytes) are read on one thread and hashed on another.
const LARGE: u64 = 32 << 20;

#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyOptions {
    /// Read everything and compare hashes, too.
    pub check_contents: bool,
    /// Mend what can be mended.
    pub repair: bool,
    /// Go on where a run with `check_contents` was stopped.
    pub resume: bool,
}

/// Marker: the last path whose contents a run has checked that has not come to its end.
const CURSOR: &str = "verify-cursor";

/// Chunks between two notes of how far we are: a commit costs as much as reading some objects.
const CHUNKS_PER_NOTE: usize = 16;

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    /// Paths that are missing, and were forgotten.
    pub disappeared: Vec<StorePath>,
    /// Faults that remain.
    pub errors: u64,
}

/// How the contents of one object compare with its record.
#[derive(Debug)]
enum Contents {
    Good,
    Changed {
        expected: Sha256Digest,
        found: Sha256Digest,
    },
    Unreadable(StoreError),
    /// It was deleted while we looked.
    Gone,
}

/// Who makes a damaged or missing valid path anew: a rebuild, or somebody who has it.
///
/// The store cannot do that; who realises can. Afterwards the path has the contents of its record,
/// which may have changed with them.
pub trait Mender {
    /// Was the path mended? Why it was not is told to the reporter, not given.
    fn mend(&self, path: &StorePath) -> bool;
}

/// Mends nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nobody;

impl Mender for Nobody {
    fn mend(&self, _: &StorePath) -> bool {
        false
    }
}

impl LocalStore {
    /// Checks the store; every fault is told to the reporter as it is found, in Nix's words.
    ///
    /// With `repair`, `mender` is asked to make anew what is damaged.
    pub fn verify(&self, options: VerifyOptions, mender: &dyn Mender) -> Result<Verified, StoreError> {
        let say = |text: std::fmt::Arguments<'_>| self.reporter().message(Level::Info, text);
        say(format_args!("reading the Nix store..."));
        // Only who may write can keep collectors out; others look at what they can see.
        let _lock = if self.ledger().is_ok() { self.keep_collectors_out()? } else { None };
        let mut verified = Verified::default();
        let present = self.entries()?;
        say(format_args!("checking path existence..."));
        self.check_ledger(options, &mut verified)?;
        let gone = self.check_existence(&present, options, mender, &mut verified)?;
        if options.check_contents {
            say(format_args!("checking link hashes..."));
            self.check_links(options, &mut verified)?;
            say(format_args!("checking store hashes..."));
            self.check_contents(&gone, options, mender, &mut verified)?;
        }
        Ok(verified)
    }

    /// While what this gives lives, nothing is deleted; a collection under way is waited for.
    pub(crate) fn keep_collectors_out(&self) -> Result<Option<GcLock>, StoreError> {
        let mut wait = |_: &std::path::Path| self.reporter().message(Level::Info, format_args!("{WAITING}"));
        Ok(GcLock::acquire(self.layout(), Sharing::Shared, Wait::Yes(&mut wait))?)
    }

    /// Tells a fault, and mends it if that is asked for; what stays is counted.
    fn is_mended(
        &self,
        path: &StorePath,
        text: &str,
        options: VerifyOptions,
        mender: &dyn Mender,
        verified: &mut Verified,
    ) -> bool {
        self.reporter().message(Level::Error, format_args!("{text}"));
        let mended = options.repair && mender.mend(path);
        if !mended {
            verified.errors += 1;
            if options.repair {
                let shown = self.dir().display(path);
                self.reporter().message(Level::Error, format_args!("cannot repair path '{shown}'"));
            }
        }
        mended
    }

    fn fault(&self, verified: &mut Verified, text: std::fmt::Arguments<'_>) {
        verified.errors += 1;
        self.reporter().message(Level::Error, text);
    }

    /// The names in the store directory, ascending.
    pub(crate) fn entries(&self) -> Result<BTreeSet<OsString>, StoreError> {
        Ok(self.entry_names()?.into_iter().collect())
    }

    /// The names in the store directory but `.` and `..`, in no order.
    pub(crate) fn entry_names(&self) -> Result<Vec<OsString>, StoreError> {
        let mut names = Vec::new();
        self.each_entry(|name| names.push(name.to_owned()))?;
        Ok(names)
    }

    /// Calls `each` with the names in the store directory but `.` and `..`, in no order.
    pub(crate) fn each_entry(&self, mut each: impl FnMut(&OsStr)) -> Result<(), StoreError> {
        let at = |e: rustix::io::Errno| {
            larder_fs::file_error::FileError::new(
                "reading directory",
                &self.layout().real_store,
                std::io::Error::from(e),
            )
        };
        let dir = self.object_dir()?;
        Ok(larder_fs::entry::each_name(dir, |name| each(OsStr::from_bytes(name.to_bytes()))).map_err(at)?)
    }

    /// Does the ledger agree with itself?
    fn check_ledger(&self, options: VerifyOptions, verified: &mut Verified) -> Result<(), StoreError> {
        if let Ok(ledger) = self.ledger() {
            let findings = if options.repair {
                ledger.write(|txn| Ok::<_, StoreError>(txn.repair()?))?
            } else {
                ledger.read(|txn| Ok::<_, StoreError>(txn.check()?))?
            };
            for finding in findings {
                let lost = matches!(finding, Finding::BadRecord { .. } | Finding::DanglingReference { .. });
                if options.repair && !lost {
                    self.reporter().message(Level::Info, format_args!("mended in the database: {finding}"));
                    continue;
                }
                self.fault(verified, format_args!("the database contradicts itself: {finding}"));
            }
        }
        Ok(())
    }

    /// Forgets missing paths that no other needs; tells of the others, and gives all missing.
    fn check_existence(
        &self,
        present: &BTreeSet<OsString>,
        options: VerifyOptions,
        mender: &dyn Mender,
        verified: &mut Verified,
    ) -> Result<BTreeSet<StorePath>, StoreError> {
        let graph = self.read(|txn| Ok(Some(Graph::load(txn)?)))?;
        let Some(graph) = graph else { return Ok(BTreeSet::new()) };
        let mut missing = NodeSet::new(&graph);
        let mut name = Vec::new();
        for node in graph.nodes() {
            name.clear();
            graph.path_ref(node).write_base_name(&mut name);
            if present.contains(OsStr::from_bytes(&name)) {
                continue;
            }
            // It may have come since the names were read.
            let real = self.layout().real_store.join(OsStr::from_bytes(&name));
            match std::fs::symlink_metadata(&real) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    missing.insert(node);
                }
                Err(e) => return Err(larder_fs::file_error::FileError::new("getting status of", real, e).into()),
            }
        }
        if missing.is_empty() {
            return Ok(BTreeSet::new());
        }
        // Referrers first: a missing path goes only if all that need it have gone.
        let mut forgotten = NodeSet::new(&graph);
        let mut kept: Vec<Node> = Vec::new();
        for node in graph.topological(&missing)?.into_iter().rev() {
            if graph.referrers(node).all(|referrer| forgotten.contains(referrer)) {
                forgotten.insert(node);
            } else {
                kept.push(node);
            }
        }
        for node in forgotten.iter() {
            let path = graph.path(node);
            self.reporter().message(
                Level::Error,
                format_args!("path '{}' disappeared, removing from database...", self.dir().display(&path)),
            );
            verified.disappeared.push(path);
        }
        let paths: BTreeSet<StorePath> = verified.disappeared.iter().cloned().collect();
        if !paths.is_empty() {
            self.ledger()?
                .write(|txn| Ok::<_, StoreError>(txn.invalidate(&paths)?))
                .map_err(|error| error.in_dir(self.dir()))?;
        }
        kept.sort_unstable();
        let mut gone: BTreeSet<StorePath> = missing.iter().map(|node| graph.path(node)).collect();
        for node in kept {
            let path = graph.path(node);
            let shown = self.dir().display(&path);
            let text = format!("path '{shown}' disappeared, but it still has valid referrers!");
            if self.is_mended(&path, &text, options, mender, verified) {
                gone.remove(&path);
            }
        }
        Ok(gone)
    }

    /// Does every entry of `.links` have the hash of its name?
    fn check_links(&self, options: VerifyOptions, verified: &mut Verified) -> Result<(), StoreError> {
        let links = self.layout().links();
        let at = |e: std::io::Error| larder_fs::file_error::FileError::new("reading directory", &links, e);
        let names = match std::fs::read_dir(&links) {
            Ok(entries) => {
                entries.map(|e| Ok(e?.file_name())).collect::<Result<Vec<OsString>, std::io::Error>>().map_err(at)?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(at(e).into()),
        };
        let found: Vec<(OsString, Result<String, StoreError>)> = names
            .into_par_iter()
            .filter_map(|name| {
                let mut hasher = NarHasher::new();
                let path = links.join(&name);
                let hashed = dump::dump(rustix::fs::CWD, path.as_os_str(), &DumpOptions::default(), |bytes| {
                    hasher.update(bytes);
                    Ok::<(), StoreError>(())
                });
                let hash = hashed.map_err(stream_error).map(|_| hasher.finish().0.to_base32());
                (!matches!(&hash, Ok(hash) if OsStr::new(hash) == name)).then_some((name, hash))
            })
            .collect();
        for (name, hash) in found {
            let link = links.join(&name);
            match hash {
                Ok(hash) => {
                    let (link_text, name) = (link.display(), name.display());
                    let text = format!("link '{link_text}' was modified! expected hash '{name}', got '{hash}'");
                    if options.repair && std::fs::remove_file(&link).is_ok() {
                        self.reporter().message(Level::Error, format_args!("{text}"));
                        self.reporter().message(Level::Info, format_args!("removed link '{link_text}'"));
                    } else {
                        self.fault(verified, format_args!("{text}"));
                    }
                }
                Err(error) => self.fault(verified, format_args!("{}", crate::error::chain(&error))),
            }
        }
        Ok(())
    }

    /// Reads and hashes all objects but the missing ones, in parallel, and tells in order.
    fn check_contents(
        &self,
        gone: &BTreeSet<StorePath>,
        options: VerifyOptions,
        mender: &dyn Mender,
        verified: &mut Verified,
    ) -> Result<(), StoreError> {
        let cursor =
            if options.resume { self.read(|txn| Ok(txn.meta(CURSOR)?))?.unwrap_or_default() } else { Vec::new() };
        let paths = self.read(|txn| Ok(txn.all_paths()?))?;
        let paths: Vec<StorePath> = paths
            .into_iter()
            .filter(|path| !gone.contains(path) && path.to_string().as_bytes() > cursor.as_slice())
            .collect();
        self.reporter().progress(Progress::Begin {
            what: "checking store hashes",
            total: Some(paths.len() as u64),
            unit: Unit::Paths,
        });
        let mut noted = !cursor.is_empty();
        for (n, chunk) in paths.chunks(CHUNK).enumerate() {
            let stopped = self.check_interrupt();
            if let Some(before) = n.checked_sub(1).and_then(|last| paths.chunks(CHUNK).nth(last)?.last())
                && (stopped.is_err() || n % CHUNKS_PER_NOTE == 0)
            {
                self.note_cursor(before.to_string().as_bytes())?;
                noted = true;
            }
            stopped?;
            let infos: Vec<PathInfo> = self.read(|txn| Ok(txn.infos(chunk)?))?.into_iter().flatten().collect();
            // The largest first, so that no core waits long for the other at the end.
            let mut turn: Vec<usize> = (0..infos.len()).collect();
            turn.sort_unstable_by_key(|i| std::cmp::Reverse(infos.get(*i).map(|info| info.nar_size_bytes)));
            let mut results: Vec<(usize, Contents)> = turn
                .into_par_iter()
                .with_max_len(1)
                .filter_map(|i| {
                    let contents = self.compare(infos.get(i)?);
                    self.reporter().progress(Progress::Advance(1));
                    Some((i, contents))
                })
                .collect();
            results.sort_unstable_by_key(|(i, _)| *i);
            for (i, contents) in results {
                let Some(info) = infos.get(i) else { continue };
                self.judge(info, contents, options, mender, verified)?;
            }
        }
        self.reporter().progress(Progress::End);
        if noted {
            self.note_cursor(b"")?;
        }
        Ok(())
    }

    /// Remembers how far a run has come. Who may not write cannot resume.
    fn note_cursor(&self, cursor: &[u8]) -> Result<(), StoreError> {
        match self.ledger() {
            Ok(ledger) => ledger.write(|txn| Ok(txn.set_meta(CURSOR, cursor)?)),
            Err(_) => Ok(()),
        }
    }

    /// Reads one object and compares its hash.
    fn compare(&self, info: &PathInfo) -> Contents {
        let mut hasher = NarHasher::new();
        let sink = |bytes: &[u8]| {
            hasher.update(bytes);
            Ok::<(), StoreError>(())
        };
        let read = if info.nar_size_bytes > LARGE {
            self.dump_object(&info.path, sink)
        } else {
            let below = Some(self.layout().real_store.as_path());
            let options = DumpOptions { case_hack: self.options().use_case_hack, below };
            let name = info.path.to_string();
            self.object_dir().and_then(|dir| dump::dump(dir, OsStr::new(&name), &options, sink).map_err(stream_error))
        };
        match read {
            Ok(_) => {
                let (found, _) = hasher.finish();
                if found == info.nar_hash {
                    Contents::Good
                } else {
                    Contents::Changed { expected: info.nar_hash, found }
                }
            }
            Err(error) => match self.is_valid(&info.path) {
                Ok(false) => Contents::Gone,
                _ => Contents::Unreadable(error),
            },
        }
    }

    fn judge(
        &self,
        info: &PathInfo,
        contents: Contents,
        options: VerifyOptions,
        mender: &dyn Mender,
        verified: &mut Verified,
    ) -> Result<(), StoreError> {
        let path = self.dir().full(&info.path);
        match contents {
            Contents::Good if info.nar_size_bytes == 0 => {
                let size_bytes = self.dump_object(&info.path, |_| Ok(()))?;
                self.reporter().message(Level::Info, format_args!("updating size field on '{path}' to {size_bytes}"));
                self.set_contents(&info.path, info.nar_hash, size_bytes)?;
            }
            Contents::Good => {}
            Contents::Changed { expected, found } if expected.0 == [0; 32] => {
                self.reporter().message(Level::Info, format_args!("fixing missing hash on '{path}'"));
                let size_bytes = self.dump_object(&info.path, |_| Ok(()))?;
                self.set_contents(&info.path, found, size_bytes)?;
            }
            // It may have been mended together with another path, and have other contents now.
            Contents::Changed { .. } | Contents::Unreadable(_)
                if options.repair && self.contents_are_good(&self.info(&info.path)?)? => {}
            Contents::Changed { expected, found } => {
                let text = format!("path '{path}' was modified! expected hash '{expected}', got '{found}'");
                self.is_mended(&info.path, &text, options, mender, verified);
            }
            Contents::Unreadable(error) => {
                self.is_mended(&info.path, &crate::error::chain(&error), options, mender, verified);
            }
            Contents::Gone => {
                self.reporter().message(Level::Warn, format_args!("path '{path}' was deleted while it was checked"));
            }
        }
        Ok(())
    }

    fn set_contents(&self, path: &StorePath, hash: Sha256Digest, size_bytes: u64) -> Result<(), StoreError> {
        self.ledger()?.write(|txn| Ok::<_, StoreError>(txn.set_contents(path, hash, size_bytes)?))
    }

    /// Compares the contents of one valid path with its record; a difference is told.
    pub fn verify_path(&self, path: &StorePath) -> Result<bool, StoreError> {
        let info = self.info(path)?;
        let shown = self.dir().full(path);
        self.reporter().message(Level::Talkative, format_args!("checking path '{shown}'..."));
        match self.compare(&info) {
            Contents::Good => Ok(true),
            Contents::Changed { expected, found } => {
                self.reporter().message(
                    Level::Error,
                    format_args!("path '{shown}' was modified! expected hash '{expected}', got '{found}'"),
                );
                Ok(false)
            }
            Contents::Unreadable(error) => Err(error),
            Contents::Gone => Err(self.not_valid(path)),
        }
    }
}
