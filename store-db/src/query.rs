//! Questions to a snapshot of the ledger.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;
use redb::{AccessGuard, ReadOnlyTable, ReadTransaction, ReadableTable, ReadableTableMetadata as _};
use rustc_hash::FxHashMap;

use crate::batch::leading;
use crate::error::DbError;
use crate::record::{DeriverView, Details, PathRef, Record, RecordView, ReferencesView, read_output};
use crate::tables::{
    self, Bytes, DERIVERS, DETAILS, HashKey, META, OUTPUTS, PATHS, PairKey, REALISATIONS, REFERENCES, REFERRERS,
    dangling, inconsistent, pairs_of, split_output_key, split_pair,
};

/// One lookup costs as much as going over so many records in order. (Less in tests, whose tables
/// are small, so that they see both ways.)
const SCAN_RATIO: u64 = if cfg!(test) { 2 } else { 5 };

type RowsRead = ReadOnlyTable<HashKey, Bytes>;
type PairsRead = ReadOnlyTable<PairKey, ()>;

/// A snapshot of the ledger: everything asked of it is answered from one moment.
///
/// Given by [`StoreDb::read`](crate::StoreDb::read). A path is looked up by its hash part and
/// answered for only if the name is the same.
pub struct ReadTxn {
    txn: ReadTransaction,
    paths: OnceCell<RowsRead>,
    references: OnceCell<RowsRead>,
    details: OnceCell<RowsRead>,
    referrers: OnceCell<PairsRead>,
    outputs: OnceCell<ReadOnlyTable<Bytes, Bytes>>,
    derivers: OnceCell<PairsRead>,
    /// Of paths that others refer to: where questions come one by one, they are the same ones again and again.
    names: RefCell<FxHashMap<[u8; 20], StorePath>>,
}

/// Names that a snapshot remembers, at most: a megabyte of them.
const NAMES: usize = 8192;

/// From so many on it is better to go over the table for names.
const FEW: usize = 64;

/// A record and the page it lies on.
pub struct RecordGuard<'t> {
    key: [u8; 20],
    bytes: AccessGuard<'t, Bytes>,
}

impl RecordGuard<'_> {
    pub fn view(&self) -> RecordView<'_> {
        RecordView::parse(&self.key, self.bytes.value()).expect("it was read before")
    }
}

fn opened<T>(cell: &OnceCell<T>, open: impl FnOnce() -> Result<T, redb::TableError>) -> Result<&T, DbError> {
    if let Some(table) = cell.get() {
        return Ok(table);
    }
    let table = open()?;
    Ok(cell.get_or_init(|| table))
}

impl ReadTxn {
    pub(crate) fn new(txn: ReadTransaction) -> Self {
        Self {
            txn,
            paths: OnceCell::new(),
            references: OnceCell::new(),
            details: OnceCell::new(),
            referrers: OnceCell::new(),
            outputs: OnceCell::new(),
            derivers: OnceCell::new(),
            names: RefCell::default(),
        }
    }

    pub(crate) fn schema_version(&self) -> Result<u32, DbError> {
        schema_version(&self.txn.open_table(META)?)
    }

    pub(crate) fn paths(&self) -> Result<&RowsRead, DbError> {
        opened(&self.paths, || self.txn.open_table(PATHS))
    }

    pub(crate) fn references_table(&self) -> Result<&RowsRead, DbError> {
        opened(&self.references, || self.txn.open_table(REFERENCES))
    }

    pub(crate) fn details(&self) -> Result<&RowsRead, DbError> {
        opened(&self.details, || self.txn.open_table(DETAILS))
    }

    pub(crate) fn referrers_table(&self) -> Result<&PairsRead, DbError> {
        opened(&self.referrers, || self.txn.open_table(REFERRERS))
    }

    pub(crate) fn outputs(&self) -> Result<&ReadOnlyTable<Bytes, Bytes>, DbError> {
        opened(&self.outputs, || self.txn.open_table(OUTPUTS))
    }

    pub(crate) fn derivers_table(&self) -> Result<&PairsRead, DbError> {
        opened(&self.derivers, || self.txn.open_table(DERIVERS))
    }

    pub fn is_valid(&self, path: &StorePath) -> Result<bool, DbError> {
        Ok(self.record(path)?.is_some())
    }

    /// The record as it lies on its page; `None` if the path is not valid.
    pub fn record(&self, path: &StorePath) -> Result<Option<RecordGuard<'_>>, DbError> {
        self.record_ref(path.into())
    }

    pub fn record_ref(&self, path: PathRef<'_>) -> Result<Option<RecordGuard<'_>>, DbError> {
        find(self.paths()?, path)
    }

    pub(crate) fn by_key(&self, key: &[u8; 20]) -> Result<Option<RecordGuard<'_>>, DbError> {
        let Some(bytes) = self.paths()?.get(key)? else { return Ok(None) };
        parse(key, bytes.value())?;
        Ok(Some(RecordGuard { key: *key, bytes }))
    }

    /// How many references there may be at most: those to others, and one of each path to itself.
    pub(crate) fn reference_count(&self) -> Result<usize, DbError> {
        let others = self.referrers_table()?.len()?;
        let own = self.references_table()?.len()?;
        Ok(usize::try_from(others.saturating_add(own)).unwrap_or(usize::MAX))
    }

    /// The whole record with the full names of its references; `None` if the path is not valid.
    pub fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, DbError> {
        let mut all = self.infos(std::slice::from_ref(path))?;
        Ok(all.pop().flatten())
    }

    /// [`ReadTxn::info`] of many paths, in their order, for less than the sum of the costs.
    pub fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>, DbError> {
        let order = in_order(paths);
        let keys: Vec<[u8; 20]> = order.iter().map(|(path, _)| *path.hash_part().as_bytes()).collect();
        let mut found = Vec::with_capacity(keys.len());
        each_key(self.paths()?, &keys, |_, key, bytes| {
            found.push(bytes.map(|bytes| own(&parse(key, bytes)?)).transpose()?);
            Ok::<_, DbError>(())
        })?;
        each_key(self.references_table()?, &keys, |at, key, bytes| {
            if let (Some(Some(record)), Some(bytes)) = (found.get_mut(at), bytes) {
                record.references = parse_references(key, bytes)?.0.to_vec();
            }
            Ok::<_, DbError>(())
        })?;
        each_key(self.details()?, &keys, |at, _, bytes| {
            if let (Some(Some(record)), Some(bytes)) = (found.get_mut(at), bytes) {
                record.details = Details::parse(bytes).map_err(|source| bad_record((&record.path).into(), source))?;
            }
            Ok::<_, DbError>(())
        })?;
        let mut records: Vec<Option<Record>> = Vec::new();
        records.resize_with(paths.len(), || None);
        for ((path, index), record) in order.into_iter().zip(found) {
            if let Some(slot) = records.get_mut(index) {
                *slot = record.filter(|record| record.path == *path);
            }
        }
        let mut keys: Vec<[u8; 20]> = records.iter().flatten().flat_map(|r| r.references.iter().copied()).collect();
        keys.sort_unstable();
        keys.dedup();
        let names = self.named(&keys)?;
        let with_names = |record: Record| {
            let name = |key: &[u8; 20]| {
                let found = keys.binary_search(key).ok().and_then(|at| names.get(at)).and_then(Option::as_ref);
                found.cloned().ok_or_else(|| dangling(record.path.hash_part().as_bytes(), key))
            };
            Ok(PathInfo {
                references: record.references.iter().map(name).collect::<Result<_, DbError>>()?,
                path: record.path,
                nar_hash: record.nar_hash,
                nar_size_bytes: record.nar_size_bytes,
                deriver: record.deriver,
                registration_time_s: record.registration_time_s,
                ultimate: record.ultimate,
                signatures: record.details.signatures,
                content_address: record.details.content_address,
            })
        };
        records.into_iter().map(|record| record.map(with_names).transpose()).collect()
    }

    /// Calls `f` with every path's place in `paths` and its record (`None`: not valid).
    ///
    /// The order of the calls is that of the hash parts.
    pub fn each<E: From<DbError>>(
        &self,
        paths: &[StorePath],
        mut f: impl FnMut(usize, Option<RecordView<'_>>) -> Result<(), E>,
    ) -> Result<(), E> {
        let order = in_order(paths);
        let keys: Vec<[u8; 20]> = order.iter().map(|(path, _)| *path.hash_part().as_bytes()).collect();
        each_key(self.paths()?, &keys, |at, key, bytes| {
            let Some(&(path, index)) = order.get(at) else { return Ok(()) };
            let view = bytes.map(|bytes| parse(key, bytes)).transpose()?;
            f(index, view.filter(|view| view.path() == *path))
        })
    }

    /// The full paths of ascending keys.
    fn named(&self, keys: &[[u8; 20]]) -> Result<Vec<Option<StorePath>>, DbError> {
        let mut names = Vec::with_capacity(keys.len());
        if keys.len() < FEW {
            let mut known = self.names.borrow_mut();
            for key in keys {
                let name = match known.get(key) {
                    Some(name) => Some(name.clone()),
                    None => self.by_hash_part(HashPart::from_bytes(*key))?,
                };
                if let Some(name) = &name
                    && known.len() < NAMES
                {
                    known.entry(*key).or_insert_with(|| name.clone());
                }
                names.push(name);
            }
            return Ok(names);
        }
        each_key(self.paths()?, keys, |_, key, bytes| {
            names.push(bytes.map(|bytes| Ok::<_, DbError>(parse(key, bytes)?.path().to_store_path())).transpose()?);
            Ok::<_, DbError>(())
        })?;
        Ok(names)
    }

    /// Of these paths, those that are valid.
    pub fn valid_subset(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, DbError> {
        let paths: Vec<StorePath> = paths.iter().cloned().collect();
        let mut valid = BTreeSet::new();
        self.each(&paths, |index, view| {
            if view.is_some() {
                valid.extend(paths.get(index).cloned());
            }
            Ok::<_, DbError>(())
        })?;
        Ok(valid)
    }

    /// The valid path with this hash part.
    pub fn by_hash_part(&self, hash_part: HashPart) -> Result<Option<StorePath>, DbError> {
        let found = self.paths()?.get(hash_part.as_bytes())?;
        found.map(|bytes| Ok(parse(hash_part.as_bytes(), bytes.value())?.path().to_store_path())).transpose()
    }

    /// The references of a path, ascending, itself too if it refers to itself; `None` if it is not valid.
    pub fn references(&self, path: &StorePath) -> Result<Option<Vec<StorePath>>, DbError> {
        if !self.is_valid(path)? {
            return Ok(None);
        }
        let keys = self.reference_keys(path.hash_part().as_bytes())?;
        self.all_named(path.hash_part(), &keys).map(Some)
    }

    /// The valid paths that refer to a path, ascending, itself too if it refers to itself;
    /// `None` if it is not valid.
    pub fn referrers(&self, path: &StorePath) -> Result<Option<Vec<StorePath>>, DbError> {
        if !self.is_valid(path)? {
            return Ok(None);
        }
        let own = *path.hash_part().as_bytes();
        let mut keys = self.referrer_keys(&own)?;
        if self.reference_keys(&own)?.binary_search(&own).is_ok()
            && let Err(at) = keys.binary_search(&own)
        {
            keys.insert(at, own);
        }
        self.all_named(path.hash_part(), &keys).map(Some)
    }

    fn all_named(&self, of: HashPart, keys: &[[u8; 20]]) -> Result<Vec<StorePath>, DbError> {
        let names = self.named(keys)?;
        keys.iter().zip(names).map(|(key, name)| name.ok_or_else(|| dangling(of.as_bytes(), key))).collect()
    }

    /// Keys of what this one refers to, ascending.
    pub(crate) fn reference_keys(&self, key: &[u8; 20]) -> Result<Vec<[u8; 20]>, DbError> {
        let Some(bytes) = self.references_table()?.get(key)? else { return Ok(Vec::new()) };
        Ok(parse_references(key, bytes.value())?.0.to_vec())
    }

    /// Keys of the others that refer to this one, ascending.
    pub(crate) fn referrer_keys(&self, key: &[u8; 20]) -> Result<Vec<[u8; 20]>, DbError> {
        seconds(self.referrers_table()?, key)
    }

    /// Keys of the valid derivations that can make this path, ascending.
    pub(crate) fn deriver_keys(&self, key: &[u8; 20]) -> Result<Vec<[u8; 20]>, DbError> {
        seconds(self.derivers_table()?, key)
    }

    /// The valid derivations that have this path, valid or not, as an output, ascending.
    pub fn valid_derivers(&self, path: &StorePath) -> Result<Vec<StorePath>, DbError> {
        let keys = self.deriver_keys(path.hash_part().as_bytes())?;
        let mut derivers = self.all_named(path.hash_part(), &keys)?;
        // The key has no name; the outputs have.
        let mut error = None;
        derivers.retain(|derivation| match self.derivation_outputs(derivation) {
            Ok(outputs) => outputs.values().any(|output| output == path),
            Err(e) => {
                error = Some(e);
                false
            }
        });
        error.map_or(Ok(derivers), Err)
    }

    /// The outputs of a valid derivation by name; empty if it is none.
    pub fn derivation_outputs(&self, derivation: &StorePath) -> Result<BTreeMap<String, StorePath>, DbError> {
        if !self.is_valid(derivation)? {
            return Ok(BTreeMap::new());
        }
        outputs_of(self.outputs()?, derivation.into())
    }

    /// Calls `f` with every record in the order of the base names.
    pub fn for_each<E: From<DbError>>(&self, mut f: impl FnMut(RecordView<'_>) -> Result<(), E>) -> Result<(), E> {
        for row in self.paths()?.iter().map_err(DbError::from)? {
            let (key, bytes) = row.map_err(DbError::from)?;
            f(parse(key.value(), bytes.value())?)?;
        }
        Ok(())
    }

    /// All valid paths in order.
    pub fn all_paths(&self) -> Result<Vec<StorePath>, DbError> {
        let mut all = Vec::new();
        self.for_each(|view| {
            all.push(view.path().to_store_path());
            Ok::<_, DbError>(())
        })?;
        Ok(all)
    }

    /// How many paths are valid. At no cost.
    pub fn count(&self) -> Result<u64, DbError> {
        Ok(self.paths()?.len()?)
    }

    /// The sum of the NAR sizes of all valid paths. Goes over all records.
    pub fn total_nar_size_bytes(&self) -> Result<u64, DbError> {
        let mut sum = 0u64;
        self.for_each(|view| {
            sum = sum.saturating_add(view.nar_size_bytes);
            Ok::<_, DbError>(())
        })?;
        Ok(sum)
    }

    /// What was stored for the realisation with this id.
    pub fn realisation(&self, id: &str) -> Result<Option<Vec<u8>>, DbError> {
        let table = self.txn.open_table(REALISATIONS)?;
        Ok(table.get(id)?.map(|bytes| bytes.value().to_vec()))
    }

    /// All realisations, ascending by id.
    pub fn realisations(&self) -> Result<Vec<(String, Vec<u8>)>, DbError> {
        let mut all = Vec::new();
        for row in self.txn.open_table(REALISATIONS)?.iter()? {
            let (id, bytes) = row?;
            all.push((id.value().to_owned(), bytes.value().to_vec()));
        }
        Ok(all)
    }

    /// When building this path failed, in seconds since 1970; `None` if it did not.
    pub fn failed(&self, path: &StorePath) -> Result<Option<u64>, DbError> {
        let table = self.txn.open_table(tables::FAILED)?;
        Ok(table.get(path.to_string().as_str())?.map(|time| time.value()))
    }

    /// All paths whose build failed and the times in seconds since 1970, ascending by path.
    pub fn failed_paths(&self) -> Result<Vec<(StorePath, u64)>, DbError> {
        let mut all = Vec::new();
        for row in self.txn.open_table(tables::FAILED)?.iter()? {
            let (path, time) = row?;
            let path = StorePath::from_base_name(path.value().as_bytes());
            let path = path.map_err(|error| inconsistent(format_args!("in the failed paths: {error}")))?;
            all.push((path, time.value()));
        }
        Ok(all)
    }

    /// A marker.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, DbError> {
        Ok(self.txn.open_table(META)?.get(key)?.map(|bytes| bytes.value().to_vec()))
    }
}

impl std::fmt::Debug for ReadTxn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadTxn").finish_non_exhaustive()
    }
}

pub(crate) fn schema_version(meta: &impl ReadableTable<&'static str, Bytes>) -> Result<u32, DbError> {
    let bytes = meta.get(tables::SCHEMA_KEY)?;
    let version = bytes.as_ref().and_then(|bytes| <[u8; 4]>::try_from(bytes.value()).ok());
    version.map(u32::from_le_bytes).ok_or_else(|| inconsistent(format_args!("the schema version is missing")))
}

pub(crate) fn bad_record(path: PathRef<'_>, source: crate::record::RecordError) -> DbError {
    DbError::Record { path: path.to_string(), source }
}

pub(crate) fn parse<'a>(key: &[u8; 20], bytes: &'a [u8]) -> Result<RecordView<'a>, DbError> {
    RecordView::parse(key, bytes)
        .map_err(|source| DbError::Record { path: HashPart::from_bytes(*key).to_string(), source })
}

pub(crate) fn parse_references<'a>(key: &[u8; 20], bytes: &'a [u8]) -> Result<ReferencesView<'a>, DbError> {
    ReferencesView::parse(bytes)
        .map_err(|source| DbError::Record { path: HashPart::from_bytes(*key).to_string(), source })
}

/// A copy of a row of the paths, with nothing from the other tables.
pub(crate) fn own(view: &RecordView<'_>) -> Result<Record, DbError> {
    let deriver = view.deriver().map(DeriverView::to_store_path).transpose();
    Ok(Record {
        path: view.path().to_store_path(),
        nar_hash: view.nar_hash,
        nar_size_bytes: view.nar_size_bytes,
        registration_time_s: view.registration_time_s,
        ultimate: view.ultimate(),
        references: Vec::new(),
        deriver: deriver.map_err(|source| bad_record(view.path(), source))?,
        details: Details::default(),
    })
}

/// The paths in ascending order, each with its place.
fn in_order(paths: &[StorePath]) -> Vec<(&StorePath, usize)> {
    // The first bytes of a key decide nearly every comparison.
    let with_place = paths.iter().zip(0..).map(|(path, at)| (leading(path.hash_part().as_bytes()), path, at));
    let mut order: Vec<(u64, &StorePath, usize)> = with_place.collect();
    order.sort_unstable();
    order.into_iter().map(|(_, path, at)| (path, at)).collect()
}

/// Calls `f` with the place, the key and the value (`None`: not there) of every one of these
/// ascending keys, repeated ones too: one lookup each, or one going over the table when they
/// are many.
pub(crate) fn each_key<E: From<DbError>>(
    table: &impl ReadableTable<HashKey, Bytes>,
    keys: &[[u8; 20]],
    mut f: impl FnMut(usize, &[u8; 20], Option<&[u8]>) -> Result<(), E>,
) -> Result<(), E> {
    let (Some(first), Some(last)) = (keys.first(), keys.last()) else { return Ok(()) };
    if (keys.len() as u64).saturating_mul(SCAN_RATIO) < table.len().map_err(DbError::from)? {
        for (at, key) in keys.iter().enumerate() {
            let found = table.get(key).map_err(DbError::from)?;
            f(at, key, found.as_ref().map(AccessGuard::value))?;
        }
        return Ok(());
    }
    let mut wanted = keys.iter().enumerate().peekable();
    for row in table.range::<&[u8; 20]>(first..=last).map_err(DbError::from)? {
        let (key, bytes) = row.map_err(DbError::from)?;
        let key = key.value();
        while let Some((at, missing)) = wanted.next_if(|(_, k)| *k < key) {
            f(at, missing, None)?;
        }
        while let Some((at, key)) = wanted.next_if(|(_, k)| *k == key) {
            f(at, key, Some(bytes.value()))?;
        }
    }
    for (at, missing) in wanted {
        f(at, missing, None)?;
    }
    Ok(())
}

/// The record with this hash part *and* name.
pub(crate) fn find<'t>(
    paths: &'t impl ReadableTable<HashKey, Bytes>,
    path: PathRef<'_>,
) -> Result<Option<RecordGuard<'t>>, DbError> {
    let key = *path.hash_part().as_bytes();
    let Some(bytes) = paths.get(&key)? else { return Ok(None) };
    let same = parse(&key, bytes.value())?.path() == path;
    Ok(same.then_some(RecordGuard { key, bytes }))
}

/// The second halves of the pairs that begin with `first`, ascending.
pub(crate) fn seconds(table: &impl ReadableTable<PairKey, ()>, first: &[u8; 20]) -> Result<Vec<[u8; 20]>, DbError> {
    let (low, high) = pairs_of(first);
    let mut all = Vec::new();
    for row in table.range::<&[u8; 40]>(&low..=&high)? {
        all.push(split_pair(row?.0.value()).1);
    }
    Ok(all)
}

/// The outputs of a derivation by name.
pub(crate) fn outputs_of(
    table: &impl ReadableTable<Bytes, Bytes>,
    derivation: PathRef<'_>,
) -> Result<BTreeMap<String, StorePath>, DbError> {
    let (start, end) = tables::outputs_of(derivation.hash_part().as_bytes());
    let end = end.as_ref().map_or(Bound::Unbounded, |end| Bound::Excluded(end.as_slice()));
    let mut outputs = BTreeMap::new();
    for row in table.range::<&[u8]>((Bound::Included(start.as_slice()), end))? {
        let (key, value) = row?;
        let (_, output) = split_output_key(key.value())?;
        let path = read_output(derivation.name(), output, value.value());
        outputs.insert(output.to_owned(), path.map_err(|source| bad_record(derivation, source))?);
    }
    Ok(outputs)
}
