//! The one way to the file: opening, creating, recovering, upgrading, and the two kinds of transaction.
//!
//! The file is used in redb's `MultiWriter` mode: any number of processes read and write, one
//! write transaction at a time, and a reader never waits for one. See `docs/db-format.md` for
//! what was measured and why not otherwise.
//!
//! Two rules for callers: do nothing slow inside [`StoreDb::read`] (an open snapshot keeps freed
//! pages from being reused) and still less inside [`StoreDb::write`] (every other writer waits);
//! and never `fork` without `exec` while a `StoreDb` is open, as its locks belong to the open
//! file descriptions, which a child would share.

use std::fmt;
use std::fs::{self, File, OpenOptions as FileOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Duration;

use redb::backends::FileBackend;
use redb::{ConcurrencyMode, Database, DatabaseError, ReadOnlyDatabase, ReadableDatabase as _, StorageError};

use crate::damage::{self, guarded};
use crate::error::DbError;
use crate::kept::Kept;
use crate::query::ReadTxn;
use crate::read_ahead::ReadAhead;
use crate::regions::SmallRegions;
use crate::tables;
use crate::txn::WriteTxn;

/// Name of the file inside the db directory.
const FILE_NAME: &str = "larder.redb";
/// Locked while the file is made.
const LOCK_NAME: &str = "larder.lock";
/// The file while it is made.
const NEW_NAME: &str = "larder.redb.new";

/// A read-only open may meet a file between the close of one writer and the open of the next,
/// and then looks as after a crash. So often it is tried again...
const OPEN_ATTEMPTS: u32 = 50;
/// ... after such a pause.
const OPEN_PAUSE: Duration = Duration::from_micros(500);

/// What the caller will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Reads only, and leaves even recovery after a crash to others.
    ReadOnly,
    /// Reads and writes a database that must exist.
    Existing,
    /// Reads and writes, and makes the database if there is none.
    Create,
}

/// How to open the ledger.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    pub mode: Mode,
    /// The most memory that pages may take, in bytes, where this process has begun to write. It is
    /// filled only as pages are touched. A change of many paths comes to the same pages several times,
    /// so as many are kept as the references of 100,000 paths take.
    pub cache_bytes: usize,
    /// The same where it has only read so far.
    pub read_cache_bytes: usize,
    /// Keep snapshots for a moment, for who answers many questions one upon the other.
    pub keeps_snapshots: bool,
}

/// For who asks once. More is not faster: the kernel has the pages too, and the first
/// touch of fresh memory costs more than the system call that brings a page again. (The closure of
/// 20,000 of 100,000 paths: 67 ms of CPU with 1 MiB, 70 with 256 KiB, 68 with 8 MiB; the hashes of 10,000
/// paths: 17, 23 and 24.)
const READ_CACHE_BYTES: usize = 1 << 20;

impl OpenOptions {
    pub const fn new(mode: Mode) -> Self {
        Self { mode, cache_bytes: 24 << 20, read_cache_bytes: READ_CACHE_BYTES, keeps_snapshots: false }
    }
}

/// A step from one schema version to the next, inside one write transaction.
pub(crate) type Step = fn(&redb::WriteTransaction) -> Result<(), DbError>;

/// The schema this program speaks, and how to get there.
#[derive(Debug)]
pub(crate) struct Schema {
    pub(crate) version: u32,
    /// The versions that can be upgraded, each with the step to its successor.
    pub(crate) steps: &'static [(u32, Step)],
}

static SCHEMA: Schema = Schema { version: 1, steps: &[] };

/// The ledger of one store.
pub struct StoreDb {
    dir: PathBuf,
    path: PathBuf,
    options: OpenOptions,
    schema: &'static Schema,
    /// Of the handles below, so that it goes before them.
    kept: OnceLock<Option<Kept>>,
    /// Opened by the first read.
    reader: Mutex<Option<Arc<ReadOnlyDatabase>>>,
    /// Opened by the first write and kept, as opening and closing costs more than a commit.
    writer: Mutex<Option<Arc<Database>>>,
    /// Stands for the file in tests.
    #[cfg(test)]
    disk: Option<crate::tests::disk::Disk>,
    /// The thread inside `write`, to catch a write within a write, which would wait for itself.
    writing: Mutex<Option<ThreadId>>,
}

impl fmt::Debug for StoreDb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreDb").field("path", &self.path).finish_non_exhaustive()
    }
}

/// A panic elsewhere leaves nothing half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StoreDb {
    /// The ledger in the db directory `dir` (`STATE/db`).
    ///
    /// Looks for the file, and makes it if asked to; it is opened when first used. Of many
    /// processes that come at once one makes it and all go on.
    pub fn open(dir: &Path, options: &OpenOptions) -> Result<Self, DbError> {
        Self::open_with(dir, options, &SCHEMA)
    }

    pub(crate) fn open_with(dir: &Path, options: &OpenOptions, schema: &'static Schema) -> Result<Self, DbError> {
        let db = Self {
            dir: dir.to_path_buf(),
            path: dir.join(FILE_NAME),
            options: options.clone(),
            schema,
            kept: OnceLock::new(),
            reader: Mutex::default(),
            writer: Mutex::default(),
            #[cfg(test)]
            disk: None,
            writing: Mutex::default(),
        };
        match fs::symlink_metadata(&db.path) {
            Ok(_) => Ok(db),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if options.mode != Mode::Create {
                    return Err(DbError::Missing { path: db.path.clone() });
                }
                db.create()?;
                Ok(db)
            }
            Err(error) => Err(db.io("look at", error)),
        }
    }

    /// A ledger on a disk that a test can stop at any moment. Reads go through the writing handle.
    #[cfg(test)]
    pub(crate) fn on_disk(disk: &crate::tests::disk::Disk) -> Result<Self, DbError> {
        let db = Self {
            dir: PathBuf::new(),
            path: PathBuf::from("disk"),
            options: OpenOptions::new(Mode::Existing),
            schema: &SCHEMA,
            kept: OnceLock::new(),
            reader: Mutex::default(),
            writer: Mutex::default(),
            disk: Some(disk.clone()),
            writing: Mutex::default(),
        };
        if disk.is_empty() {
            let new = db.builder().create_with_backend(SmallRegions(disk.handle()));
            let new = new.map_err(|error| db.database(error))?;
            make_tables(&new, SCHEMA.version)?;
            new.close().map_err(|error| db.database(error))?;
        }
        drop(db.writer()?);
        Ok(db)
    }

    /// Is there a ledger in this directory?
    pub fn exists(dir: &Path) -> bool {
        fs::symlink_metadata(dir.join(FILE_NAME)).is_ok()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `f` on a snapshot of the ledger. Never waits for a writer.
    ///
    /// `f` should not print or wait: while it runs no page that it may see is reused, so the
    /// file grows with every commit of others.
    pub fn read<T, E: From<DbError>>(&self, f: impl FnOnce(&ReadTxn) -> Result<T, E>) -> Result<T, E> {
        self.guarded(|| {
            let Some(kept) = self.kept() else { return f(&self.begin_read()?) };
            let (found, mut ticket) = kept.take();
            let txn = if let Some(txn) = found {
                txn
            } else {
                let txn = self.begin_read()?;
                // Of a commit since then nobody knows on which side of it this one began.
                ticket = ticket.filter(|ticket| kept.is_current(ticket));
                txn
            };
            let value = f(&txn)?;
            kept.put(txn, ticket.as_ref());
            Ok(value)
        })
    }

    /// Where snapshots are kept between questions, if they are.
    pub(crate) fn kept(&self) -> Option<&Kept> {
        let open = || self.options.keeps_snapshots.then(|| Kept::open(&self.path).ok()).flatten();
        self.kept.get_or_init(open).as_ref()
    }

    /// Lets go of snapshots, whose handle is given up.
    fn forget_kept(&self) {
        if let Some(Some(kept)) = self.kept.get() {
            kept.forget();
        }
    }

    /// Lets damage of the file end in an error.
    fn guarded<T, E: From<DbError>>(&self, f: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        guarded(&self.path, f, || {
            self.forget_writer();
            let reader = lock(&self.reader).take();
            drop(reader);
        })
    }

    /// Runs `f` in the one write transaction there may be, waiting for others to finish theirs.
    ///
    /// All or nothing: when `f` gives an error, nothing has happened. When this returns, the
    /// change is on the disk and every later [`StoreDb::read`] of any process sees it.
    /// `f` must not call `write` again, nor wait for anything.
    pub fn write<T, E: From<DbError>>(&self, f: impl FnOnce(&mut WriteTxn<'_>) -> Result<T, E>) -> Result<T, E> {
        let writing = Writing::enter(&self.writing);
        self.guarded(|| self.write_guarded(&writing, f))
    }

    fn write_guarded<T, E: From<DbError>>(
        &self,
        writing: &Writing<'_>,
        f: impl FnOnce(&mut WriteTxn<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let txn = self.begin_write()?;
        writing.begun();
        let mut open = WriteTxn::open(&txn)?;
        let result = f(&mut open);
        let changed = open.changed();
        drop(open);
        match result {
            Ok(value) if changed => match txn.commit() {
                Ok(()) => Ok(value),
                Err(error) => {
                    self.forget_writer();
                    Err(E::from(DbError::from(error)))
                }
            },
            result => {
                // A failure leaves the transaction undone, which is what is wanted anyway; the
                // handle tells of it at its next use and is then opened anew.
                drop(txn);
                result
            }
        }
    }

    /// Decides what became of a write that ended in an error.
    ///
    /// If the last sync of a commit fails, readers see the ledger of before, but the commit may be
    /// found complete by whoever writes next, and then it counts. When this returns, that has
    /// been decided, and reads tell.
    pub fn settle(&self) -> Result<(), DbError> {
        self.guarded(|| self.begin_write().map(drop))
    }

    /// Closes the file, which tells of errors that dropping keeps to itself. Nothing is lost
    /// without it, as every commit is durable.
    pub fn close(self) -> Result<(), DbError> {
        self.guarded(|| {
            self.forget_kept();
            let writer = lock(&self.writer).take().and_then(Arc::into_inner);
            writer.map_or(Ok(()), |db| db.close().map_err(|error| self.database(error)))
        })
    }

    fn begin_read(&self) -> Result<ReadTxn, DbError> {
        let txn = match self.snapshot() {
            Ok(txn) => txn,
            // An I/O error sticks to a handle; a new one tells whether it is still there.
            Err(DbError::Storage { source: redb::Error::Io(_) | redb::Error::PreviousIo }) => {
                self.forget_writer();
                *lock(&self.reader) = None;
                self.snapshot()?
            }
            Err(error) => return Err(error),
        };
        let txn = ReadTxn::new(txn);
        match txn.schema_version()? {
            found if found == self.schema.version => Ok(txn),
            found if found > self.schema.version => {
                Err(DbError::SchemaTooNew { found, supported: self.schema.version })
            }
            found => {
                if self.options.mode == Mode::ReadOnly {
                    return Err(DbError::SchemaTooOld { found, supported: self.schema.version });
                }
                drop(txn);
                self.begin_write()?;
                Ok(ReadTxn::new(self.snapshot()?))
            }
        }
    }

    fn snapshot(&self) -> Result<redb::ReadTransaction, DbError> {
        #[cfg(test)]
        if self.disk.is_some() {
            return Ok(self.writer()?.begin_read()?);
        }
        let writer = lock(&self.writer).clone();
        match writer {
            Some(db) => Ok(db.begin_read()?),
            None => self.with_reader(|db| Ok(db.begin_read()?)),
        }
    }

    fn with_reader<T>(&self, f: impl FnOnce(&ReadOnlyDatabase) -> Result<T, DbError>) -> Result<T, DbError> {
        let open = lock(&self.reader).clone();
        if let Some(db) = open {
            return f(&db);
        }
        for attempt in 0.. {
            match self.open_reader() {
                Ok(db) => {
                    let db = Arc::new(db);
                    *lock(&self.reader) = Some(db.clone());
                    return f(&db);
                }
                Err(DatabaseError::RepairAborted) if attempt < OPEN_ATTEMPTS => thread::sleep(OPEN_PAUSE),
                Err(DatabaseError::RepairAborted) if self.may_recover() => {
                    // Opening for writing is the recovery.
                    drop(self.writer()?);
                }
                Err(error) => return Err(self.database(error)),
            }
        }
        unreachable!("the attempts are without end")
    }

    fn open_reader(&self) -> Result<ReadOnlyDatabase, DatabaseError> {
        let file = FileBackend::new(FileOptions::new().read(true).open(&self.path)?)?;
        let mut builder = self.builder();
        builder.set_cache_size(self.options.read_cache_bytes);
        builder.open_read_only_with_backend(ReadAhead::new(file))
    }

    /// May this user, by mode and by permission, write to the file?
    fn may_recover(&self) -> bool {
        self.options.mode != Mode::ReadOnly && rustix::fs::access(&self.path, rustix::fs::Access::WRITE_OK).is_ok()
    }

    fn begin_write(&self) -> Result<redb::WriteTransaction, DbError> {
        let txn = if let Ok(txn) = self.writer()?.begin_write() {
            txn
        } else {
            // The error of an earlier transaction sticks to the handle.
            self.forget_writer();
            self.writer()?.begin_write()?
        };
        match schema_version(&txn)? {
            found if found == self.schema.version => Ok(txn),
            found if found > self.schema.version => {
                Err(DbError::SchemaTooNew { found, supported: self.schema.version })
            }
            found => {
                self.upgrade(&txn, found)?;
                txn.commit()?;
                Ok(self.writer()?.begin_write()?)
            }
        }
    }

    fn upgrade(&self, txn: &redb::WriteTransaction, mut found: u32) -> Result<(), DbError> {
        while found < self.schema.version {
            let supported = self.schema.version;
            let Some((_, step)) = self.schema.steps.iter().find(|(from, _)| *from == found) else {
                return Err(DbError::SchemaTooOld { found, supported });
            };
            step(txn)?;
            found += 1;
        }
        set_schema_version(txn, found)
    }

    fn writer(&self) -> Result<Arc<Database>, DbError> {
        if self.options.mode == Mode::ReadOnly {
            return Err(DbError::ReadOnly { path: self.path.clone() });
        }
        // Held while opening, so that two threads do not open it twice.
        let mut slot = lock(&self.writer);
        if let Some(db) = &*slot {
            return Ok(db.clone());
        }
        let db = Arc::new(self.open_writer().map_err(|error| self.database(error))?);
        *slot = Some(db.clone());
        Ok(db)
    }

    fn open_writer(&self) -> Result<Database, DatabaseError> {
        #[cfg(test)]
        if let Some(disk) = &self.disk {
            return self.builder().create_with_backend(disk.handle());
        }
        self.builder().open(&self.path)
    }

    fn forget_writer(&self) {
        self.forget_kept();
        *lock(&self.writer) = None;
    }

    /// Makes the file: complete under another name, then renamed.
    fn create(&self) -> Result<(), DbError> {
        let lock_path = self.dir.join(LOCK_NAME);
        let lock_file = FileOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|source| DbError::Io { action: "open", path: lock_path.clone(), source })?;
        lock_file.lock().map_err(|source| DbError::Io { action: "lock", path: lock_path, source })?;
        if Self::exists(&self.dir) {
            return Ok(());
        }
        let new = self.dir.join(NEW_NAME);
        let new_io = |action| move |source| DbError::Io { action, path: self.dir.join(NEW_NAME), source };
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(new_io("remove")(error)),
            _ => {}
        }
        let mut options = FileOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o644).open(&new).map_err(new_io("create"))?;
        let file = FileBackend::new(file).map_err(|error| self.database(error))?;
        let db = self.builder().create_with_backend(SmallRegions(file)).map_err(|error| self.database(error))?;
        make_tables(&db, self.schema.version)?;
        db.close().map_err(|error| self.database(error))?;
        fs::rename(&new, &self.path).map_err(new_io("rename"))?;
        // The commits to come are durable only if the name is.
        let sync = File::open(&self.dir).and_then(|dir| dir.sync_all());
        sync.map_err(|source| DbError::Io { action: "sync", path: self.dir.clone(), source })
    }

    fn builder(&self) -> redb::Builder {
        let mut builder = redb::Builder::new();
        builder.set_concurrency_mode(ConcurrencyMode::MultiWriter).set_cache_size(self.options.cache_bytes);
        builder
    }

    fn io(&self, action: &'static str, source: io::Error) -> DbError {
        let path = self.path.clone();
        match source.kind() {
            io::ErrorKind::NotFound => DbError::Missing { path },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                DbError::Permission { action, path, source }
            }
            _ => DbError::Io { action, path, source },
        }
    }

    fn database(&self, error: DatabaseError) -> DbError {
        let path = self.path.clone();
        match error {
            // What redb says of a file that does not begin as its files do, or ends too early.
            DatabaseError::Storage(StorageError::Io(source))
                if matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                DbError::Corrupt { path, source: DatabaseError::Storage(StorageError::Io(source)) }
            }
            DatabaseError::Storage(StorageError::Io(source)) => self.io("open", source),
            DatabaseError::Storage(StorageError::Corrupted(_)) | DatabaseError::UpgradeRequired(_) => {
                DbError::Corrupt { path, source: error }
            }
            DatabaseError::RepairAborted => DbError::NeedsRecovery { path },
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                DbError::OtherProtocol { path, source: error }
            }
            other => DbError::Storage { source: other.into() },
        }
    }
}

impl Drop for StoreDb {
    fn drop(&mut self) {
        self.forget_kept();
        let Self { reader, writer, .. } = self;
        damage::drop_quietly((lock(reader).take(), lock(writer).take()));
    }
}

/// Remembers who writes until dropped.
struct Writing<'a>(&'a Mutex<Option<ThreadId>>);

impl<'a> Writing<'a> {
    /// Other threads wait in redb, in turn; the same thread would wait for itself.
    fn enter(slot: &'a Mutex<Option<ThreadId>>) -> Self {
        let me = thread::current().id();
        assert!(*lock(slot) != Some(me), "a write inside a write");
        Self(slot)
    }

    fn begun(&self) {
        *lock(self.0) = Some(thread::current().id());
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let mut slot = lock(self.0);
        if *slot == Some(thread::current().id()) {
            *slot = None;
        }
    }
}

/// The first transaction of a new file.
pub(crate) fn make_tables(db: &Database, version: u32) -> Result<(), DbError> {
    let txn = db.begin_write()?;
    txn.open_table(tables::PATHS)?;
    txn.open_table(tables::REFERENCES)?;
    txn.open_table(tables::DETAILS)?;
    txn.open_table(tables::REFERRERS)?;
    txn.open_table(tables::OUTPUTS)?;
    txn.open_table(tables::DERIVERS)?;
    txn.open_table(tables::REALISATIONS)?;
    txn.open_table(tables::FAILED)?;
    set_schema_version(&txn, version)?;
    Ok(txn.commit()?)
}

fn set_schema_version(txn: &redb::WriteTransaction, version: u32) -> Result<(), DbError> {
    txn.open_table(tables::META)?.insert(tables::SCHEMA_KEY, version.to_le_bytes().as_slice())?;
    Ok(())
}

fn schema_version(txn: &redb::WriteTransaction) -> Result<u32, DbError> {
    let meta = txn.open_table(tables::META)?;
    crate::query::schema_version(&meta)
}
