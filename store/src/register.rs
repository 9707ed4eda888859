//! Registration texts, and what is registered without coming in as a stream.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::io::{Read, Write};

use larder_core::hash::NarHasher;
use larder_core::path_info::PathInfo;
use larder_core::registration::{self, Form, Parser};
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_store_db::{Batch, DbError, Graph, NewPath, Node};

use crate::error::StoreError;
use crate::foreign::ForeignLedger;
use crate::local::{LocalStore, now_s};

/// How `--register-validity` treats its input.
#[derive(Debug, Clone, Copy, Default)]
pub struct RegisterOptions {
    /// Records carry hash and size, which are believed.
    pub hash_given: bool,
    /// Also register what is valid already.
    pub reregister: bool,
}

/// What was taken over from real Nix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adopted {
    /// Paths that real Nix had registered.
    pub registered: u64,
    /// Those of them that Larder did not know.
    pub new: u64,
    /// Those whose files are missing, which were left out.
    pub missing: u64,
}

/// Reads a text in blocks and gives each record to `each`.
fn records(
    mut source: impl Read,
    parser: &mut Parser<'_>,
    each: &mut dyn FnMut(registration::RecordRef<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut block = vec![0; larder_fs::pipe::BLOCK_BYTES];
    loop {
        let n = match source.read(&mut block) {
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(StoreError::Input(e)),
        };
        if n == 0 {
            parser.finish()?;
            return Ok(());
        }
        parser.push(block.get(..n).unwrap_or_default());
        while let Some(record) = parser.next_record()? {
            each(record)?;
        }
    }
}

impl LocalStore {
    /// Writes the validity records of `paths`, or of all valid paths, ascending.
    pub fn dump_db(&self, paths: Option<&[StorePath]>, out: &mut dyn Write) -> Result<(), StoreError> {
        const FULL: usize = 1 << 18;
        let mut text = Vec::with_capacity(FULL + (1 << 16));
        let Some(paths) = paths else {
            return self.read(|txn| {
                // Records name what they refer to by hash parts; the graph knows all names. The
                // rest of each record is kept from the one reading, in the order of the nodes.
                let mut rest = Vec::new();
                let graph = Graph::load_with(txn, |view| {
                    let deriver = view.deriver().map(larder_store_db::record::DeriverView::to_store_path).transpose();
                    let deriver = deriver.map_err(|source| DbError::Record {
                        path: self.dir().full(&view.path().to_store_path()),
                        source,
                    })?;
                    rest.push((view.nar_hash, view.nar_size_bytes, deriver));
                    Ok::<(), StoreError>(())
                })?;
                let texts: Vec<_> = graph.nodes().map(|node| graph.hash_part(node).to_text()).collect();
                let named = |node: Node| (texts.get(node.index()).expect("one for each node"), graph.name(node));
                for (node, (nar_hash, nar_size_bytes, deriver)) in graph.nodes().zip(&rest) {
                    registration::write_named_record(
                        &mut text,
                        self.dir(),
                        named(node),
                        Some((nar_hash, *nar_size_bytes)),
                        deriver.as_ref().map(Into::into),
                        graph.references(node).map(named),
                    );
                    if text.len() > FULL {
                        out.write_all(&text).map_err(StoreError::Output)?;
                        text.clear();
                    }
                }
                out.write_all(&text).map_err(StoreError::Output)
            });
        };
        let infos = self.read(|txn| Ok(txn.infos(paths)?))?;
        let mut infos = infos.into_iter();
        for path in paths {
            let info = infos.next().flatten().ok_or_else(|| self.not_valid(path));
            match info {
                Ok(info) => registration::write_path_info(&mut text, self.dir(), &info),
                Err(error) => {
                    // What was right so far is printed, as real Nix does.
                    out.write_all(&text).map_err(StoreError::Output)?;
                    return Err(error);
                }
            }
        }
        out.write_all(&text).map_err(StoreError::Output)
    }

    /// Registers what `--dump-db` wrote, in one transaction, without looking at the objects; but
    /// derivations are read, for their outputs.
    pub fn load_db(&self, source: impl Read) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        let now = now_s();
        records(source, &mut Parser::new(self.dir(), Form::WithHash), &mut |record| {
            let references: Vec<_> = record.references().collect();
            let (nar_hash, nar_size_bytes) = record.hash_size.expect("this form has both");
            let mut new = NewPath::new(record.path, nar_hash, nar_size_bytes);
            new.references = &references;
            new.deriver = record.deriver;
            new.registration_time_s = now;
            if !record.path.is_derivation() {
                return Ok(batch.push(&new)?);
            }
            let path = record.path.to_store_path();
            let outputs = self.check_derivation(&path, OsStr::new(&path.to_string()))?;
            let outputs: Vec<_> = outputs.iter().map(|(name, path)| (name.as_str(), path.into())).collect();
            new.outputs = &outputs;
            Ok(batch.push(&new)?)
        })?;
        // So many temporary roots as there may be paths are too many; a moment without collector is not.
        let _lock = self.keep_collectors_out()?;
        self.register(batch)
    }

    pub(crate) fn register(&self, batch: Batch) -> Result<(), StoreError> {
        self.ledger()?.register(batch).map_err(|error| StoreError::from(error).in_dir(self.dir()))
    }

    /// Registers objects that lie in the store already: canonical metadata, hash, ledger.
    pub fn register_validity(&self, source: impl Read, options: RegisterOptions) -> Result<(), StoreError> {
        let form = if options.hash_given { Form::WithHash } else { Form::WithoutHash };
        let mut all = Vec::new();
        records(source, &mut Parser::new(self.dir(), form), &mut |record| {
            all.push(record.to_record());
            Ok(())
        })?;
        let now = now_s();
        let mut batch = Batch::new();
        let mut infos: Vec<PathInfo> = Vec::new();
        self.add_temp_roots(all.iter().map(|record| &record.path))?;
        for record in all {
            if !options.reregister && self.is_valid(&record.path)? {
                continue;
            }
            self.canonicalise(OsStr::new(&record.path.to_string()))?;
            let (nar_hash, nar_size_bytes) = if let Some(given) = record.hash_size {
                given
            } else {
                let mut hasher = NarHasher::new();
                self.dump_object(&record.path, |bytes| {
                    hasher.update(bytes);
                    Ok(())
                })?;
                hasher.finish()
            };
            let mut info = PathInfo::new(record.path, nar_hash, nar_size_bytes);
            info.references = record.references;
            info.deriver = record.deriver;
            info.registration_time_s = now;
            infos.push(info);
        }
        for info in &infos {
            let outputs = if info.path.is_derivation() {
                self.check_derivation(&info.path, OsStr::new(&info.path.to_string()))?
            } else {
                BTreeMap::new()
            };
            batch.push_info(info, &outputs)?;
        }
        if self.options().sync {
            rustix::fs::syncfs(self.store_fd()?).map_err(|e| {
                larder_fs::file_error::FileError::new("syncing", &self.layout().real_store, std::io::Error::from(e))
            })?;
        }
        self.register(batch)
    }

    /// Takes the registrations of real Nix over, from its own ledger; a dry run only counts them.
    pub fn adopt(&self, dry_run: bool) -> Result<Adopted, StoreError> {
        let ledger = ForeignLedger::find(&self.layout().db())
            .ok_or_else(|| StoreError::NothingToAdopt { state: self.layout().state.clone() })?;
        let fingerprint = ledger.fingerprint()?;
        let adopted = self.adopt_infos(&ledger.read_all(self.dir())?, dry_run)?;
        if !dry_run {
            // If it changed meanwhile, the fingerprint is an old one and the next look is a full one.
            self.mark_adopted(&fingerprint)?;
        }
        Ok(adopted)
    }

    /// Takes over what a `nix-store --dump-db` printed.
    pub fn adopt_dump(&self, source: impl Read, dry_run: bool) -> Result<Adopted, StoreError> {
        let mut infos = Vec::new();
        let now = now_s();
        records(source, &mut Parser::new(self.dir(), Form::WithHash), &mut |record| {
            let record = record.to_record();
            let (nar_hash, nar_size_bytes) = record.hash_size.expect("this form has both");
            let mut info = PathInfo::new(record.path, nar_hash, nar_size_bytes);
            info.references = record.references;
            info.deriver = record.deriver;
            info.registration_time_s = now;
            infos.push(info);
            Ok(())
        })?;
        self.adopt_infos(&infos, dry_run)
    }

    fn adopt_infos(&self, infos: &[PathInfo], dry_run: bool) -> Result<Adopted, StoreError> {
        let registered = infos.len() as u64;
        let gone = self.not_whole(infos);
        for path in &gone {
            self.reporter().message(
                Level::Warn,
                format_args!(
                    "'{}' was not taken over: its files, or those of something it needs, are missing",
                    self.dir().display(path)
                ),
            );
        }
        let known = self.valid_subset(&infos.iter().map(|info| info.path.clone()).collect())?;
        let mut batch = Batch::new();
        let mut new = 0;
        for info in infos.iter().filter(|info| !gone.contains(&info.path) && !known.contains(&info.path)) {
            let outputs = if info.path.is_derivation() {
                // It was checked when real Nix registered it, and may be one that only real Nix
                // understands: then its outputs are not known here.
                match self.derivation(&info.path) {
                    Ok(drv) => {
                        drv.output_paths().filter_map(|(n, p)| Some((n.as_str().to_owned(), p?.clone()))).collect()
                    }
                    Err(error) => {
                        self.reporter().message(Level::Warn, format_args!("{error}; its outputs are not recorded"));
                        BTreeMap::new()
                    }
                }
            } else {
                BTreeMap::new()
            };
            batch.push_info(info, &outputs)?;
            new += 1;
        }
        if !dry_run {
            let _lock = self.keep_collectors_out()?;
            self.register(batch)?;
        }
        Ok(Adopted { registered, new, missing: gone.len() as u64 })
    }

    /// Those without files, and whatever refers to them, directly or not.
    fn not_whole(&self, infos: &[PathInfo]) -> BTreeSet<StorePath> {
        let mut referrers: BTreeMap<&StorePath, Vec<&StorePath>> = BTreeMap::new();
        for info in infos {
            for reference in &info.references {
                referrers.entry(reference).or_default().push(&info.path);
            }
        }
        let missing = |path: &StorePath| std::fs::symlink_metadata(self.layout().real_path(path)).is_err();
        let mut gone = BTreeSet::new();
        let mut next: Vec<&StorePath> = infos.iter().map(|info| &info.path).filter(|path| missing(path)).collect();
        while let Some(path) = next.pop() {
            if gone.insert(path.clone()) {
                next.extend(referrers.get(path).into_iter().flatten());
            }
        }
        gone
    }
}
