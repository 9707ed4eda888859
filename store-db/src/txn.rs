//! Changes to the ledger.
//!
//! What always holds, between transactions: the references of a valid path are valid; the
//! referrers are the inverse of the references; the derivers are the inverse of the derivation
//! outputs; only valid derivations have outputs.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::signature::Signature;
use larder_core::store_path::StorePath;
use redb::{ReadableTable as _, ReadableTableMetadata as _, Table, WriteTransaction};

use crate::batch::{Batch, Sorted, leading};
use crate::error::DbError;
use crate::open::StoreDb;
use crate::query::{bad_record, each_key, find, outputs_of, own, parse, parse_references, seconds};
use crate::record::{Details, Fields, Record, encode_output};
use crate::tables::{
    self, Bytes, DERIVERS, DETAILS, FAILED, META, OUTPUTS, PATHS, Pairs, REALISATIONS, REFERENCES, REFERRERS, Rows,
    output_key, pair,
};

/// The one write transaction there may be at a time.
///
/// Given by [`StoreDb::write`]; committed if its closure succeeds.
pub struct WriteTxn<'t> {
    txn: &'t WriteTransaction,
    paths: Rows<'t>,
    references: Rows<'t>,
    details: Rows<'t>,
    referrers: Pairs<'t>,
    outputs: Table<'t, Bytes, Bytes>,
    derivers: Pairs<'t>,
    changed: bool,
}

impl std::fmt::Debug for WriteTxn<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WriteTxn").finish_non_exhaustive()
    }
}

impl StoreDb {
    /// Makes the paths of a batch valid, all or none, in one transaction that holds nobody up
    /// while the batch is put in order. See [`WriteTxn::register`].
    pub fn register(&self, batch: Batch) -> Result<(), DbError> {
        let sorted = batch.sort()?;
        self.write(|w| w.register_sorted(&sorted))
    }
}

impl<'t> WriteTxn<'t> {
    pub(crate) fn open(txn: &'t WriteTransaction) -> Result<Self, DbError> {
        Ok(Self {
            txn,
            paths: txn.open_table(PATHS)?,
            references: txn.open_table(REFERENCES)?,
            details: txn.open_table(DETAILS)?,
            referrers: txn.open_table(REFERRERS)?,
            outputs: txn.open_table(OUTPUTS)?,
            derivers: txn.open_table(DERIVERS)?,
            changed: false,
        })
    }

    pub(crate) const fn changed(&self) -> bool {
        self.changed
    }

    pub(crate) const fn set_changed(&mut self) {
        self.changed = true;
    }

    /// All tables of paths, for the check.
    pub(crate) const fn tables(&mut self) -> Tables<'_, 't> {
        Tables {
            paths: &mut self.paths,
            references: &mut self.references,
            details: &mut self.details,
            referrers: &mut self.referrers,
            outputs: &mut self.outputs,
            derivers: &mut self.derivers,
        }
    }

    pub fn is_valid(&self, path: &StorePath) -> Result<bool, DbError> {
        Ok(find(&self.paths, path.into())?.is_some())
    }

    /// The valid path with this hash part.
    pub fn by_hash_part(&self, hash_part: HashPart) -> Result<Option<StorePath>, DbError> {
        self.name_of(hash_part.as_bytes())
    }

    /// The whole record; `None` if the path is not valid.
    pub fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, DbError> {
        let Some(record) = self.record(path)? else { return Ok(None) };
        let name = |key: &[u8; 20]| {
            self.name_of(key)?.ok_or_else(|| tables::dangling(record.path.hash_part().as_bytes(), key))
        };
        Ok(Some(PathInfo {
            references: record.references.iter().map(name).collect::<Result<_, _>>()?,
            path: record.path,
            nar_hash: record.nar_hash,
            nar_size_bytes: record.nar_size_bytes,
            deriver: record.deriver,
            registration_time_s: record.registration_time_s,
            ultimate: record.ultimate,
            signatures: record.details.signatures,
            content_address: record.details.content_address,
        }))
    }

    /// The other valid paths that refer to a path, ascending; empty if it is not valid.
    pub fn referrers(&self, path: &StorePath) -> Result<Vec<StorePath>, DbError> {
        if !self.is_valid(path)? {
            return Ok(Vec::new());
        }
        self.names_of(seconds(&self.referrers, path.hash_part().as_bytes())?)
    }

    fn record(&self, path: &StorePath) -> Result<Option<Record>, DbError> {
        let Some(found) = find(&self.paths, path.into())? else { return Ok(None) };
        self.whole(own(&found.view())?).map(Some)
    }

    /// Adds what lies in the other tables.
    fn whole(&self, mut record: Record) -> Result<Record, DbError> {
        let key = *record.path.hash_part().as_bytes();
        record.references = self.reference_keys(&key)?;
        if let Some(bytes) = self.details.get(&key)? {
            let details = Details::parse(bytes.value());
            record.details = details.map_err(|source| bad_record((&record.path).into(), source))?;
        }
        Ok(record)
    }

    fn reference_keys(&self, key: &[u8; 20]) -> Result<Vec<[u8; 20]>, DbError> {
        let Some(bytes) = self.references.get(key)? else { return Ok(Vec::new()) };
        Ok(parse_references(key, bytes.value())?.0.to_vec())
    }

    fn valid_record(&self, path: &StorePath) -> Result<Record, DbError> {
        self.record(path)?.ok_or_else(|| DbError::NotValid { path: path.clone() })
    }

    fn name_of(&self, key: &[u8; 20]) -> Result<Option<StorePath>, DbError> {
        let found = self.paths.get(key)?;
        found.map(|bytes| Ok(parse(key, bytes.value())?.path().to_store_path())).transpose()
    }

    fn names_of(&self, keys: Vec<[u8; 20]>) -> Result<Vec<StorePath>, DbError> {
        let named = keys.into_iter().map(|key| {
            let name = self.name_of(&key)?;
            name.ok_or_else(|| tables::inconsistent(format_args!("'{}' is not valid", HashPart::from_bytes(key))))
        });
        named.collect()
    }

    /// Writes a record whose references are as before.
    fn put(&mut self, record: &Record) -> Result<(), DbError> {
        let key = record.path.hash_part();
        let mut bytes = Vec::new();
        record.fields().encode(&mut bytes);
        self.paths.insert(key.as_bytes(), bytes.as_slice())?;
        if !record.details.is_empty() {
            record.details.encode(&mut bytes);
            self.details.insert(key.as_bytes(), bytes.as_slice())?;
        }
        self.changed = true;
        Ok(())
    }

    /// Makes the paths of a batch valid.
    ///
    /// Every reference must be valid afterwards or be to the path itself
    /// ([`DbError::NotValid`]); cycles are refused ([`DbError::Cycle`]).
    ///
    /// A path that is valid already keeps its registration time and deriver; hash, size,
    /// signatures and the rest are replaced; references are added to those it has, never
    /// dropped. This is what Nix 2.8 does in `--load-db` (but for the cycles through older
    /// references, which it lets in).
    pub fn register(&mut self, batch: Batch) -> Result<(), DbError> {
        self.register_sorted(&batch.sort()?)
    }

    pub(crate) fn register_sorted(&mut self, batch: &Sorted) -> Result<(), DbError> {
        let known = self.known(batch)?;
        let merged = self.merge(batch, known)?;
        self.insert_paths(batch, &merged)?;
        self.insert_referrers(batch, &merged)?;
        self.insert_outputs(batch, &merged)?;
        self.changed |= batch.ranks().any(|rank| batch.is_row(rank));
        Ok(())
    }

    /// The records that the batch replaces. Checks that what it refers to is there.
    fn known(&self, batch: &Sorted) -> Result<BTreeMap<u32, Record>, DbError> {
        let needed: Vec<u32> = batch.ranks().filter(|rank| batch.is_row(*rank) || batch.is_referenced(*rank)).collect();
        let keys: Vec<[u8; 20]> = needed.iter().map(|rank| *batch.key(*rank)).collect();
        let mut known = BTreeMap::new();
        each_key(&self.paths, &keys, |at, key, bytes| {
            let Some(&rank) = needed.get(at) else { return Ok(()) };
            let path = batch.path(rank);
            match bytes.map(|bytes| parse(key, bytes)).transpose()? {
                Some(view) if view.path() == path => {
                    if batch.is_row(rank) {
                        known.insert(rank, self.whole(own(&view)?)?);
                    }
                    Ok(())
                }
                Some(other) if batch.is_row(rank) => {
                    let other = other.path().to_store_path();
                    Err(DbError::HashPartTaken { path: path.to_store_path(), other })
                }
                _ if batch.is_row(rank) => Ok(()),
                _ => Err(DbError::NotValid { path: path.to_store_path() }),
            }
        })?;
        Ok(known)
    }

    /// Old and new put together, for the paths that were valid before.
    fn merge(&self, batch: &Sorted, known: BTreeMap<u32, Record>) -> Result<BTreeMap<u32, Merged>, DbError> {
        let mut merged = BTreeMap::new();
        for (rank, old) in known {
            let Some(row) = batch.row(rank) else { continue };
            let mut references: BTreeSet<[u8; 20]> = old.references.iter().copied().collect();
            let mut added = BTreeSet::new();
            for reference in batch.references(rank) {
                if references.insert(*batch.key(*reference)) {
                    added.insert(*reference);
                }
            }
            let record = Record {
                path: old.path,
                registration_time_s: old.registration_time_s,
                deriver: old.deriver,
                nar_hash: *row.nar_hash,
                nar_size_bytes: row.nar_size_bytes,
                ultimate: row.ultimate,
                references: references.into_iter().collect(),
                details: row.details.cloned().unwrap_or_default(),
            };
            merged.insert(rank, Merged { record, added });
        }
        if merged.values().any(|m| !m.added.is_empty()) {
            self.check_older_cycles(batch, &merged)?;
        }
        Ok(merged)
    }

    /// Looks for cycles through references that are in the ledger already. Such a cycle goes
    /// through a path that was valid and gets a new reference.
    fn check_older_cycles(&self, batch: &Sorted, merged: &BTreeMap<u32, Merged>) -> Result<(), DbError> {
        let rank_of: HashMap<[u8; 20], u32> =
            batch.ranks().filter(|rank| batch.is_row(*rank)).map(|rank| (*batch.key(rank), rank)).collect();
        let references = |key: &[u8; 20]| -> Result<Vec<[u8; 20]>, DbError> {
            let mut all = match rank_of.get(key) {
                Some(rank) => match merged.get(rank) {
                    Some(merged) => merged.record.references.clone(),
                    None => batch.references(*rank).iter().map(|r| *batch.key(*r)).collect(),
                },
                None => self.reference_keys(key)?,
            };
            all.retain(|reference| reference != key);
            // They are taken from the end.
            all.reverse();
            Ok(all)
        };
        // False while a path is being visited, true when all below it is done.
        let mut done: HashMap<[u8; 20], bool> = HashMap::new();
        for (rank, _) in merged.iter().filter(|(_, merged)| !merged.added.is_empty()) {
            let start = *batch.key(*rank);
            if done.contains_key(&start) {
                continue;
            }
            done.insert(start, false);
            let mut stack = vec![(start, references(&start)?)];
            while let Some((key, rest)) = stack.last_mut() {
                let Some(next) = rest.pop() else {
                    done.insert(*key, true);
                    stack.pop();
                    continue;
                };
                match done.get(&next) {
                    Some(true) => {}
                    Some(false) => return Err(self.cycle(batch, &rank_of, &next, key)),
                    None => {
                        done.insert(next, false);
                        let below = references(&next)?;
                        stack.push((next, below));
                    }
                }
            }
        }
        Ok(())
    }

    fn cycle(&self, batch: &Sorted, rank_of: &HashMap<[u8; 20], u32>, path: &[u8; 20], from: &[u8; 20]) -> DbError {
        let name = |key: &[u8; 20]| match rank_of.get(key) {
            Some(rank) => Ok(batch.path(*rank).to_store_path()),
            None => self.names_of(vec![*key]).and_then(|mut names| {
                names.pop().ok_or_else(|| tables::inconsistent(format_args!("a path has no name")))
            }),
        };
        match (name(path), name(from)) {
            (Ok(path), Ok(from)) => DbError::Cycle { path, from },
            (Err(error), _) | (_, Err(error)) => error,
        }
    }

    fn insert_paths(&mut self, batch: &Sorted, merged: &BTreeMap<u32, Merged>) -> Result<(), DbError> {
        let all_rows = || batch.ranks().filter(|rank| batch.is_row(*rank));
        let mut rows = all_rows();
        insert_ascending(&mut self.paths, |bytes| {
            let rank = rows.next()?;
            if let Some(merged) = merged.get(&rank) {
                merged.record.fields().encode(bytes);
            } else if let Some(row) = batch.row(rank) {
                let name = batch.path(rank).name();
                let fields = Fields {
                    name,
                    nar_hash: row.nar_hash,
                    nar_size_bytes: row.nar_size_bytes,
                    registration_time_s: row.registration_time_s,
                    ultimate: row.ultimate,
                    deriver: row.deriver,
                    has_references: !batch.references(rank).is_empty(),
                    has_details: row.details.is_some(),
                };
                fields.encode(bytes);
            }
            Some(*batch.key(rank))
        })?;
        let mut rows = all_rows();
        insert_ascending(&mut self.references, |bytes| {
            let rank = rows.find(|rank| {
                merged.get(rank).map_or(!batch.references(*rank).is_empty(), |merged| !merged.added.is_empty())
            })?;
            bytes.clear();
            match merged.get(&rank) {
                Some(merged) => bytes.extend_from_slice(merged.record.references.as_flattened()),
                None => batch.references(rank).iter().for_each(|r| bytes.extend_from_slice(batch.key(*r))),
            }
            Some(*batch.key(rank))
        })?;
        let mut rows = all_rows().filter_map(|rank| Some((rank, batch.row(rank)?.details?)));
        insert_ascending(&mut self.details, |bytes| {
            let (rank, details) = rows.next()?;
            details.encode(bytes);
            Some(*batch.key(rank))
        })?;
        // Details are replaced, also by none.
        for merged in merged.values().filter(|merged| merged.record.details.is_empty()) {
            self.details.remove(merged.record.path.hash_part().as_bytes())?;
        }
        Ok(())
    }

    /// Adds the inverse of the new references, in its own order: a counting sort by reference.
    fn insert_referrers(&mut self, batch: &Sorted, merged: &BTreeMap<u32, Merged>) -> Result<(), DbError> {
        let count = batch.ranks().len();
        let mut starts = vec![0u32; count + 1];
        let new_pairs = |each: &mut dyn FnMut(u32, u32)| {
            for rank in batch.ranks() {
                let old = merged.get(&rank);
                for reference in batch.references(rank) {
                    if *reference != rank && old.is_none_or(|old| old.added.contains(reference)) {
                        each(*reference, rank);
                    }
                }
            }
        };
        new_pairs(&mut |reference, _| {
            if let Some(slot) = starts.get_mut(reference as usize + 1) {
                *slot += 1;
            }
        });
        for at in 1..starts.len() {
            let before = starts.get(at - 1).copied().unwrap_or(0);
            if let Some(slot) = starts.get_mut(at) {
                *slot += before;
            }
        }
        let total = starts.last().map_or(0, |total| *total as usize);
        let mut referrers = vec![0u32; total];
        let mut fill = starts.clone();
        new_pairs(&mut |reference, rank| {
            if let Some(at) = fill.get_mut(reference as usize) {
                if let Some(slot) = referrers.get_mut(*at as usize) {
                    *slot = rank;
                }
                *at += 1;
            }
        });
        let mut reference = 0u32;
        let mut pairs = referrers.iter().zip(0u32..).map(|(referrer, at)| {
            while starts.get(reference as usize + 1).is_some_and(|end| *end <= at) {
                reference += 1;
            }
            pair(batch.key(reference), batch.key(*referrer))
        });
        insert_ascending(&mut self.referrers, |_| pairs.next())
    }

    fn insert_outputs(&mut self, batch: &Sorted, merged: &BTreeMap<u32, Merged>) -> Result<(), DbError> {
        for (rank, old) in merged {
            if batch.outputs(*rank).next().is_some() {
                self.remove_outputs(&old.record.path)?;
            }
        }
        let mut value = Vec::new();
        let mut derivers = Vec::new();
        for rank in batch.ranks() {
            let derivation = batch.path(rank);
            for (output, path) in batch.outputs(rank) {
                encode_output(&mut value, derivation.name(), output, path);
                self.outputs.insert(output_key(batch.key(rank), output).as_slice(), value.as_slice())?;
                derivers.push(pair(path.hash_part().as_bytes(), batch.key(rank)));
            }
        }
        derivers.sort_unstable();
        derivers.dedup();
        let mut derivers = derivers.into_iter();
        insert_ascending(&mut self.derivers, |_| derivers.next())
    }

    fn remove_outputs(&mut self, derivation: &StorePath) -> Result<(), DbError> {
        let key = derivation.hash_part();
        for (output, path) in outputs_of(&self.outputs, derivation.into())? {
            self.outputs.remove(output_key(key.as_bytes(), &output).as_slice())?;
            self.derivers.remove(&pair(path.hash_part().as_bytes(), key.as_bytes()))?;
        }
        Ok(())
    }

    /// Makes paths invalid and gives the number of those that were valid.
    ///
    /// Refused, and nothing is changed, while a valid path that is not among them refers to one
    /// ([`DbError::InUse`]).
    pub fn invalidate(&mut self, paths: &BTreeSet<StorePath>) -> Result<usize, DbError> {
        let mut records = Vec::new();
        let mut with_details = Vec::new();
        for path in paths {
            let Some(record) = find(&self.paths, path.into())? else { continue };
            let (hash_part, view) = (path.hash_part(), record.view());
            let key = hash_part.as_bytes();
            if view.has_details() {
                with_details.push(*key);
            }
            records.push((path, if view.has_references() { self.reference_keys(key)? } else { Vec::new() }));
        }
        // The set sorts by hash part, which is unique among the valid paths.
        let keys: Vec<[u8; 20]> = records.iter().map(|(path, _)| *path.hash_part().as_bytes()).collect();
        for (path, _) in &records {
            let mut users = seconds(&self.referrers, path.hash_part().as_bytes())?;
            users.retain(|user| {
                let order = |key: &[u8; 20]| leading(key).cmp(&leading(user)).then_with(|| key.cmp(user));
                keys.binary_search_by(order).is_err()
            });
            if !users.is_empty() {
                let by = self.names_of(users)?;
                return Err(DbError::InUse { path: (*path).clone(), by });
            }
        }
        let (mut with_references, mut pairs) = (Vec::new(), Vec::new());
        for (path, references) in &records {
            let key = *path.hash_part().as_bytes();
            with_references.extend((!references.is_empty()).then_some(key));
            pairs.extend(references.iter().filter(|other| **other != key).map(|other| pair(other, &key)));
            if path.is_derivation() {
                self.remove_outputs(path)?;
            }
        }
        remove_all(&mut self.paths, keys)?;
        remove_all(&mut self.references, with_references)?;
        remove_all(&mut self.details, with_details)?;
        remove_all(&mut self.referrers, pairs)?;
        self.changed |= !records.is_empty();
        Ok(records.len())
    }

    /// Adds signatures to a valid path.
    pub fn add_signatures(&mut self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<(), DbError> {
        let mut record = self.valid_record(path)?;
        record.details.signatures.extend(signatures.iter().cloned());
        self.put(&record)
    }

    /// Says what the contents of a valid path are now; for repair.
    pub fn set_contents(
        &mut self,
        path: &StorePath,
        nar_hash: Sha256Digest,
        nar_size_bytes: u64,
    ) -> Result<(), DbError> {
        let mut record = self.valid_record(path)?;
        record.nar_hash = nar_hash;
        record.nar_size_bytes = nar_size_bytes;
        self.put(&record)
    }

    /// Stores what is known of a realisation.
    pub fn set_realisation(&mut self, id: &str, value: &[u8]) -> Result<(), DbError> {
        self.changed = true;
        self.txn.open_table(REALISATIONS)?.insert(id, value)?;
        Ok(())
    }

    /// Forgets a realisation; was there one?
    pub fn remove_realisation(&mut self, id: &str) -> Result<bool, DbError> {
        let removed = self.txn.open_table(REALISATIONS)?.remove(id)?.is_some();
        self.changed |= removed;
        Ok(removed)
    }

    /// Remembers that building a path failed, at a time in seconds since 1970.
    pub fn set_failed(&mut self, path: &StorePath, time_s: u64) -> Result<(), DbError> {
        self.changed = true;
        self.txn.open_table(FAILED)?.insert(path.to_string().as_str(), time_s)?;
        Ok(())
    }

    /// Forgets that building a path failed; had it?
    pub fn clear_failed(&mut self, path: &StorePath) -> Result<bool, DbError> {
        let removed = self.txn.open_table(FAILED)?.remove(path.to_string().as_str())?.is_some();
        self.changed |= removed;
        Ok(removed)
    }

    /// Forgets all failures.
    pub fn clear_all_failed(&mut self) -> Result<(), DbError> {
        let mut failed = self.txn.open_table(FAILED)?;
        self.changed |= !failed.is_empty()?;
        failed.retain(|_, _| false)?;
        Ok(())
    }

    /// Sets a marker. `schema` is the ledger's own.
    pub fn set_meta(&mut self, key: &str, value: &[u8]) -> Result<(), DbError> {
        assert_ne!(key, tables::SCHEMA_KEY, "the schema version is set by upgrades alone");
        self.changed = true;
        self.txn.open_table(META)?.insert(key, value)?;
        Ok(())
    }

    /// A marker.
    pub fn meta(&self, key: &str) -> Result<Option<Vec<u8>>, DbError> {
        Ok(self.txn.open_table(META)?.get(key)?.map(|bytes| bytes.value().to_vec()))
    }
}

/// The tables of a transaction.
pub(crate) struct Tables<'w, 't> {
    pub(crate) paths: &'w mut Rows<'t>,
    pub(crate) references: &'w mut Rows<'t>,
    pub(crate) details: &'w mut Rows<'t>,
    pub(crate) referrers: &'w mut Pairs<'t>,
    pub(crate) outputs: &'w mut Table<'t, Bytes, Bytes>,
    pub(crate) derivers: &'w mut Pairs<'t>,
}

/// A path that was valid before: its record now, and which references of the batch are new to it.
struct Merged {
    record: Record,
    added: BTreeSet<u32>,
}

/// Makes a table's value of the bytes that a record was encoded to.
pub(crate) trait FromBuffer: redb::Value + 'static {
    fn from_buffer(bytes: &[u8]) -> Self::SelfType<'_>;
}

impl FromBuffer for Bytes {
    fn from_buffer(bytes: &[u8]) -> &[u8] {
        bytes
    }
}

impl FromBuffer for () {
    fn from_buffer(_bytes: &[u8]) {}
}

/// Of a table of which more than so many-th a part goes, all rows are gone over: that costs less than
/// finding so many one by one.
const RETAIN_RATIO: u64 = 12;

/// Removes rows; those that are not there are no error.
fn remove_all<const N: usize, V: redb::Value + 'static>(
    table: &mut Table<'_, &'static [u8; N], V>,
    mut keys: Vec<[u8; N]>,
) -> Result<(), DbError> {
    if keys.is_empty() {
        return Ok(());
    }
    // In order, each page is changed in one go.
    keys.sort_unstable();
    if (keys.len() as u64).saturating_mul(RETAIN_RATIO) < table.len()? {
        for key in &keys {
            table.remove(key)?;
        }
        return Ok(());
    }
    let mut going = keys.iter().peekable();
    table.retain(|key, _| {
        while going.next_if(|gone| *gone < key).is_some() {}
        going.next_if(|gone| *gone == key).is_none()
    })?;
    Ok(())
}

/// Inserts rows whose keys ascend, replacing those that are there.
///
/// `next` puts the value into the buffer and gives the key. Runs of keys that fall between two
/// neighbours go in through a cursor, which fills pages and costs a fraction of an insert.
pub(crate) fn insert_ascending<const N: usize, V: FromBuffer>(
    table: &mut Table<'_, &'static [u8; N], V>,
    mut next: impl FnMut(&mut Vec<u8>) -> Option<[u8; N]>,
) -> Result<(), DbError> {
    let mut value = Vec::new();
    let mut row = next(&mut value);
    while let Some(key) = row {
        let mut cursor = table.lower_bound_mut(Bound::Included(&key))?;
        let limit = cursor.peek_next()?.map(|(following, _)| *following.value());
        if limit == Some(key) {
            drop(cursor);
            table.insert(&key, V::from_buffer(&value))?;
            row = next(&mut value);
            continue;
        }
        while let Some(key) = row.filter(|key| limit.is_none_or(|limit| *key < limit)) {
            cursor.insert_before(&key, V::from_buffer(&value))?;
            row = next(&mut value);
        }
        cursor.close()?;
    }
    Ok(())
}
