//! What caches were asked before: in memory, and for those on the network also on the disk.
//!
//! The file (redb, `narinfo.redb` in the user's cache directory) is shared by all processes and
//! can be deleted at any time. What cannot be read or written of it is done without. Its one
//! table has keys of 32 bytes, 12 of the hash of the cache's URI and the 20 of the hash part (only
//! the first 12, for the cache itself; the 12 and the 32 of the hash of an output's id, for a
//! realisation), and values of 8 bytes of time (seconds since 1970, little endian), one of sort, and a
//! text as the cache gave it.
//!
//! Source: protocols, section 5.3.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::narinfo::NarInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::{Level, Reporter};
use redb::{
    ConcurrencyMode, Database, DatabaseError, ReadOnlyDatabase, ReadableDatabase as _, ReadableTable as _,
    TableDefinition, TableError,
};

const TABLE: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("lookups");

/// The key of the time of the last purge.
const PURGED: &[u8] = &[0];

const FILE_NAME: &str = "narinfo.redb";

/// Seconds for which is remembered what a cache says of itself.
const CACHE_INFO_TTL_S: u64 = 7 * 24 * 3600;

/// Seconds between two times of throwing away what is too old.
const PURGE_EVERY_S: u64 = 24 * 3600;

/// A longer text is not kept.
const MAX_TEXT: usize = 1 << 20;

/// So many answers are written down together, at the latest.
const GROUP: usize = 2000;

/// Bytes of memory for pages of the file.
const MEMORY: usize = 4 << 20;

/// For how long answers count, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    pub positive_s: u64,
    pub negative_s: u64,
}

/// What a cache was found to have: of a path, or of an output of a derivation.
#[derive(Debug, Clone)]
pub enum Known<T = NarInfo> {
    Absent,
    There(Arc<T>),
}

/// Which cache, in keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CacheId([u8; 12]);

impl CacheId {
    pub fn of(uri: &str) -> Self {
        let mut id = [0; 12];
        for (to, from) in id.iter_mut().zip(Sha256Digest::of(uri.as_bytes()).as_bytes()) {
            *to = *from;
        }
        Self(id)
    }

    fn key(self, part: Option<HashPart>) -> Vec<u8> {
        let mut key = self.0.to_vec();
        key.extend(part.iter().flat_map(HashPart::as_bytes));
        key
    }

    fn key_of_output(self, id: &DrvOutput) -> Vec<u8> {
        let mut key = self.0.to_vec();
        key.extend(Sha256Digest::of(id.to_string().as_bytes()).as_bytes());
        key
    }
}

/// The sorts of values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    Absent = 0,
    There = 1,
    CacheInfo = 2,
    /// When too old answers were thrown away.
    Purged = 3,
}

impl Sort {
    fn of(byte: u8) -> Option<Self> {
        [Self::Absent, Self::There, Self::CacheInfo, Self::Purged].into_iter().find(|sort| *sort as u8 == byte)
    }

    fn lifetime_s(self, lifetimes: Lifetimes) -> u64 {
        match self {
            Self::Absent => lifetimes.negative_s,
            Self::There => lifetimes.positive_s,
            Self::CacheInfo => CACHE_INFO_TTL_S,
            Self::Purged => PURGE_EVERY_S,
        }
    }
}

/// A value of the table that is not too old.
struct Row {
    sort: Sort,
    text: Vec<u8>,
}

/// What was asked before.
pub struct Lookups {
    memory: Mutex<HashMap<(CacheId, HashPart), Known>>,
    realisations: Mutex<HashMap<(CacheId, DrvOutput), Known<Realisation>>>,
    disk: Option<Disk>,
    lifetimes: Lifetimes,
    reporter: Arc<dyn Reporter + Send + Sync>,
}

impl std::fmt::Debug for Lookups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookups").field("disk", &self.disk.as_ref().map(|disk| &disk.path)).finish_non_exhaustive()
    }
}

struct Disk {
    path: PathBuf,
    reader: Mutex<Reader>,
    fresh: Mutex<Vec<(Vec<u8>, Vec<u8>)>>,
}

enum Reader {
    Unopened,
    Open(ReadOnlyDatabase),
    /// It could not be, and is not tried again.
    Broken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

impl Lookups {
    /// `folder` is where the file is; none: answers are remembered in memory only.
    pub fn new(folder: Option<&Path>, lifetimes: Lifetimes, reporter: Arc<dyn Reporter + Send + Sync>) -> Self {
        let disk = folder.map(|folder| Disk {
            path: folder.join(FILE_NAME),
            reader: Mutex::new(Reader::Unopened),
            fresh: Mutex::default(),
        });
        Self { memory: Mutex::default(), realisations: Mutex::default(), disk, lifetimes, reporter }
    }

    /// What is known; from the disk it is parsed by `parse`, which may refuse it.
    pub fn get(
        &self,
        cache: CacheId,
        on_disk: bool,
        part: HashPart,
        parse: impl FnOnce(&[u8]) -> Option<NarInfo>,
    ) -> Option<Known> {
        if let Some(known) = lock(&self.memory).get(&(cache, part)) {
            return Some(known.clone());
        }
        let row =
            self.disk.as_ref().filter(|_| on_disk)?.row(&cache.key(Some(part)), self.lifetimes, &*self.reporter)?;
        let known = match row.sort {
            Sort::Absent => Known::Absent,
            Sort::There => Known::There(Arc::new(parse(&row.text)?)),
            Sort::CacheInfo | Sort::Purged => return None,
        };
        lock(&self.memory).insert((cache, part), known.clone());
        Some(known)
    }

    /// Remembers an answer, and its text if the cache is on the network.
    pub fn put(&self, cache: CacheId, on_disk: bool, part: HashPart, known: Known, text: &[u8]) {
        let sort = if matches!(known, Known::Absent) { Sort::Absent } else { Sort::There };
        lock(&self.memory).insert((cache, part), known);
        if on_disk {
            self.write_later(cache.key(Some(part)), sort, text);
        }
    }

    /// What is known of the realisation of an output.
    pub fn realisation(&self, cache: CacheId, on_disk: bool, id: &DrvOutput) -> Option<Known<Realisation>> {
        let asked = (cache, id.clone());
        if let Some(known) = lock(&self.realisations).get(&asked) {
            return Some(known.clone());
        }
        let disk = self.disk.as_ref().filter(|_| on_disk)?;
        let row = disk.row(&cache.key_of_output(id), self.lifetimes, &*self.reporter)?;
        let known = match row.sort {
            Sort::Absent => Known::Absent,
            Sort::There => {
                let read = Realisation::from_json(&row.text).ok().filter(|read| read.id == *id)?;
                Known::There(Arc::new(read))
            }
            Sort::CacheInfo | Sort::Purged => return None,
        };
        lock(&self.realisations).insert(asked, known.clone());
        Some(known)
    }

    /// Remembers an answer about an output, and its text if the cache is on the network.
    pub fn put_realisation(
        &self,
        cache: CacheId,
        on_disk: bool,
        id: &DrvOutput,
        known: Known<Realisation>,
        text: &[u8],
    ) {
        let sort = if matches!(known, Known::Absent) { Sort::Absent } else { Sort::There };
        lock(&self.realisations).insert((cache, id.clone()), known);
        if on_disk {
            self.write_later(cache.key_of_output(id), sort, text);
        }
    }

    /// Forgets that a cache has a path: it has not, after all.
    pub fn forget(&self, cache: CacheId, on_disk: bool, part: HashPart) {
        self.put(cache, on_disk, part, Known::Absent, b"");
    }

    /// What a cache last said of itself.
    pub fn cache_info(&self, cache: CacheId) -> Option<Vec<u8>> {
        let row = self.disk.as_ref()?.row(&cache.key(None), self.lifetimes, &*self.reporter)?;
        (row.sort == Sort::CacheInfo).then_some(row.text)
    }

    pub fn put_cache_info(&self, cache: CacheId, text: &[u8]) {
        self.write_later(cache.key(None), Sort::CacheInfo, text);
    }

    fn write_later(&self, key: Vec<u8>, sort: Sort, text: &[u8]) {
        let Some(disk) = self.disk.as_ref().filter(|_| text.len() <= MAX_TEXT) else { return };
        let mut value = Vec::with_capacity(9 + text.len());
        value.extend_from_slice(&now_s().to_le_bytes());
        value.push(sort as u8);
        value.extend_from_slice(text);
        let mut fresh = lock(&disk.fresh);
        fresh.push((key, value));
        let many = fresh.len() >= GROUP;
        drop(fresh);
        if many {
            self.flush();
        }
    }

    /// Writes down what is not yet. Others see it then.
    pub fn flush(&self) {
        let Some(disk) = &self.disk else { return };
        let fresh = std::mem::take(&mut *lock(&disk.fresh));
        if fresh.is_empty() {
            return;
        }
        if let Err(error) = disk.write(&fresh, self.lifetimes) {
            let path = disk.path.display();
            self.reporter.message(Level::Debug, format_args!("cannot remember what caches have in '{path}': {error}"));
        }
    }
}

impl Drop for Lookups {
    fn drop(&mut self) {
        self.flush();
    }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_concurrency_mode(ConcurrencyMode::MultiWriter).set_cache_size(MEMORY);
    builder
}

/// A row, unless it is too old or was written in the future.
fn parse_row(value: &[u8], lifetimes: Lifetimes, now_s: u64) -> Option<Row> {
    let (time, rest) = value.split_first_chunk::<8>()?;
    let (sort, text) = rest.split_first()?;
    let sort = Sort::of(*sort)?;
    let age = now_s.checked_sub(u64::from_le_bytes(*time))?;
    (age < sort.lifetime_s(lifetimes)).then(|| Row { sort, text: text.to_vec() })
}

impl Disk {
    fn row(&self, key: &[u8], lifetimes: Lifetimes, reporter: &dyn Reporter) -> Option<Row> {
        let mut reader = lock(&self.reader);
        if matches!(*reader, Reader::Unopened) {
            *reader = match self.open() {
                Ok(db) => Reader::Open(db),
                Err(DatabaseError::Storage(redb::StorageError::Io(e))) if e.kind() == std::io::ErrorKind::NotFound => {
                    Reader::Broken
                }
                Err(error) => {
                    let path = self.path.display();
                    reporter.message(Level::Debug, format_args!("cannot read what caches have from '{path}': {error}"));
                    Reader::Broken
                }
            };
        }
        let Reader::Open(db) = &*reader else { return None };
        let found = (|| {
            let table = match db.begin_read()?.open_table(TABLE) {
                Ok(table) => table,
                Err(TableError::TableDoesNotExist(_)) => return Ok(None),
                Err(error) => return Err(redb::Error::from(error)),
            };
            Ok(table.get(key)?.and_then(|value| parse_row(value.value(), lifetimes, now_s())))
        })();
        found.unwrap_or_else(|error: redb::Error| {
            let path = self.path.display();
            reporter.message(Level::Debug, format_args!("cannot read what caches have from '{path}': {error}"));
            *reader = Reader::Broken;
            None
        })
    }

    /// Opens it for reading. Between two writers it may look as after a crash for a moment.
    fn open(&self) -> Result<ReadOnlyDatabase, DatabaseError> {
        for attempt in 0.. {
            match builder().open_read_only(&self.path) {
                Err(DatabaseError::RepairAborted) if attempt < 20 => {
                    std::thread::sleep(std::time::Duration::from_micros(500));
                }
                other => return other,
            }
        }
        Err(DatabaseError::RepairAborted)
    }

    fn write(&self, fresh: &[(Vec<u8>, Vec<u8>)], lifetimes: Lifetimes) -> Result<(), redb::Error> {
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let db = builder().create(&self.path)?;
        let txn = db.begin_write()?;
        {
            let mut table = txn.open_table(TABLE)?;
            for (key, value) in fresh {
                table.insert(key.as_slice(), value.as_slice())?;
            }
            let now = now_s();
            let purged = table.get(PURGED)?.is_some_and(|v| parse_row(v.value(), lifetimes, now).is_some());
            if !purged {
                // At least the usual times, lest one command with short ones empties it for all.
                let at_least = Lifetimes {
                    positive_s: lifetimes.positive_s.max(30 * 24 * 3600),
                    negative_s: lifetimes.negative_s.max(3600),
                };
                table.retain(|_, value| parse_row(value, at_least, now).is_some())?;
                let mut value = now.to_le_bytes().to_vec();
                value.push(Sort::Purged as u8);
                table.insert(PURGED, value.as_slice())?;
            }
        }
        txn.commit()?;
        // Closing tells of errors, of which nobody need know: it is written.
        drop(db.close());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::report::Silent;
    use larder_core::store_dir::StoreDir;

    const LONG: Lifetimes = Lifetimes { positive_s: 1000, negative_s: 1000 };

    fn lookups(folder: &Path, lifetimes: Lifetimes) -> Lookups {
        Lookups::new(Some(folder), lifetimes, Arc::new(Silent))
    }

    fn info() -> (NarInfo, String) {
        let dir = StoreDir::new("/nix/store").unwrap();
        let text = format!(
            "StorePath: /nix/store/{}-x\nURL: nar/x\nCompression: none\nNarHash: sha256:{}\nNarSize: 1\n",
            "0".repeat(32),
            "0".repeat(52)
        );
        (NarInfo::parse(&dir, text.as_bytes(), "x").unwrap(), text)
    }

    #[test]
    fn s100_answers_outlive_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let dir = StoreDir::new("/nix/store").unwrap();
        let parse = |text: &[u8]| NarInfo::parse(&dir, text, "x").ok();
        let (cache, other) = (CacheId::of("http://a"), CacheId::of("http://b"));
        let (info, text) = info();
        let part = info.info.path.hash_part();
        let gone: HashPart = "1".repeat(32).parse().unwrap();
        let one = lookups(folder.path(), LONG);
        assert!(one.get(cache, true, part, parse).is_none());
        one.put(cache, true, part, Known::There(Arc::new(info.clone())), text.as_bytes());
        one.put(cache, true, gone, Known::Absent, b"");
        one.put_cache_info(cache, b"Priority: 3\n");
        drop(one);
        let two = lookups(folder.path(), LONG);
        assert!(matches!(two.get(cache, true, part, parse), Some(Known::There(found)) if *found == info));
        assert!(matches!(two.get(cache, true, gone, parse), Some(Known::Absent)));
        assert!(two.get(other, true, part, parse).is_none());
        assert!(two.get(CacheId::of("http://a"), false, "2".repeat(32).parse().unwrap(), parse).is_none());
        assert_eq!(two.cache_info(cache).as_deref(), Some(&b"Priority: 3\n"[..]));
        // A fault that came later takes the place of what was known.
        two.forget(cache, true, part);
        drop(two);
        let three = lookups(folder.path(), LONG);
        assert!(matches!(three.get(cache, true, part, parse), Some(Known::Absent)));
        // Nothing of it counts any more for who wants it fresh.
        let fresh = lookups(folder.path(), Lifetimes { positive_s: 0, negative_s: 0 });
        assert!(fresh.get(cache, true, part, parse).is_none());
    }

    #[test]
    fn answers_about_outputs_outlive_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let cache = CacheId::of("http://a");
        let text = |id: &str| format!(r#"{{"id":"{id}","outPath":"{}-x"}}"#, "1".repeat(32));
        let (there, gone) = (format!("sha256:{}!out", "0".repeat(64)), format!("sha256:{}!dev", "0".repeat(64)));
        let read = Realisation::from_json(text(&there).as_bytes()).unwrap();
        let (there, gone): (DrvOutput, DrvOutput) = (there.parse().unwrap(), gone.parse().unwrap());
        let one = lookups(folder.path(), LONG);
        assert!(one.realisation(cache, true, &there).is_none());
        one.put_realisation(cache, true, &there, Known::There(Arc::new(read.clone())), read.to_json().as_bytes());
        one.put_realisation(cache, true, &gone, Known::Absent, b"");
        drop(one);
        let two = lookups(folder.path(), LONG);
        assert!(matches!(two.realisation(cache, true, &there), Some(Known::There(found)) if *found == read));
        assert!(matches!(two.realisation(cache, true, &gone), Some(Known::Absent)));
        assert!(two.realisation(CacheId::of("http://b"), true, &there).is_none());
        assert!(two.realisation(cache, false, &there).is_some(), "it is in memory by now");
        // A text of another output does not count, wherever it came from.
        two.put_realisation(cache, true, &gone, Known::There(Arc::new(read.clone())), read.to_json().as_bytes());
        drop(two);
        let three = lookups(folder.path(), LONG);
        assert!(three.realisation(cache, true, &gone).is_none());
        assert!(three.realisation(cache, false, &there).is_none());
        let fresh = lookups(folder.path(), Lifetimes { positive_s: 0, negative_s: 0 });
        assert!(fresh.realisation(cache, true, &there).is_none());
    }

    #[test]
    fn a_broken_file_is_done_without() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(FILE_NAME), "this is no database").unwrap();
        let lookups = lookups(folder.path(), LONG);
        let (info, text) = info();
        let part = info.info.path.hash_part();
        assert!(lookups.get(CacheId::of("x"), true, part, |_| None).is_none());
        lookups.put(CacheId::of("x"), true, part, Known::There(Arc::new(info)), text.as_bytes());
        assert!(lookups.get(CacheId::of("x"), true, part, |_| None).is_some());
    }

    #[test]
    fn rows_age() {
        let row = |time: u64, sort: Sort| [&time.to_le_bytes()[..], &[sort as u8], b"text"].concat();
        let lifetimes = Lifetimes { positive_s: 10, negative_s: 5 };
        let lives = |sort, age: u64| parse_row(&row(1000 - age, sort), lifetimes, 1000).is_some();
        assert!(lives(Sort::There, 9) && !lives(Sort::There, 10));
        assert!(lives(Sort::Absent, 4) && !lives(Sort::Absent, 5));
        assert!(parse_row(&row(1001, Sort::There), lifetimes, 1000).is_none(), "from the future");
        assert!(parse_row(&[0; 8], lifetimes, 1000).is_none());
        assert!(parse_row(&[0, 0, 0, 0, 0, 0, 0, 0, 9], lifetimes, 0).is_none());
    }
}
