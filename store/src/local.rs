//! A store on the local file system: opening it, and asking about its paths.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use larder_core::derivation::modulo::Memo;
use larder_core::path_info::PathInfo;
use larder_core::report::Reporter;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_fs::layout::{Access, Layout, OpenDirs, OpenOptions};
use larder_fs::path_lock::HeldLocks;
use larder_fs::temp_roots::TempRoots;
use larder_fs::users::Users;
use larder_store_db::{DbError, Mode, ReadTxn, StoreDb};

use crate::adoption::Theirs;
use crate::error::StoreError;

/// How much of the ledger stays in memory once it was read. Fresh memory costs more than to read what
/// the kernel has anyway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// 64 KiB: for who reads it from end to end, each page once.
    Few,
    /// 1 MiB: for who asks once.
    Usual,
    /// 8 MiB, and a snapshot of it for a moment: for who answers many questions.
    Many,
}

/// What of the settings concerns a local store. All have the meaning of the setting of that name.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "settings are what they are")]
pub struct Options {
    pub use_case_hack: bool,
    pub allow_symlinked_store: bool,
    /// Empty for none.
    pub build_users_group: String,
    pub ignored_acls: Vec<String>,
    pub preallocate_contents: bool,
    pub gc_reserved_space_bytes: u64,
    pub keep_outputs: bool,
    pub keep_derivations: bool,
    /// Bytes: below this many free ones, room is made before something is added; 0 for never.
    pub min_free_bytes: u64,
    /// How many are to be free then.
    pub max_free_bytes: u64,
    /// How often that is looked at, in seconds.
    pub min_free_check_interval_s: u64,
    /// Link equal files as paths are added.
    pub auto_optimise_store: bool,
    /// For tests: a file that holds the number of free bytes (`_NIX_TEST_FREE_SPACE_FILE`).
    pub free_space_file: Option<std::path::PathBuf>,
    /// For tests: a file, or FIFO, that a collector reads before it deletes (`_NIX_TEST_GC_SYNC`).
    pub gc_sync_file: Option<std::path::PathBuf>,
    /// Write objects to the disk before they are registered (setting `fsync-metadata`).
    pub sync: bool,
    pub pages: Pages,
    /// Where the ledger is, if not in `db` of the state directory.
    pub db_dir: Option<std::path::PathBuf>,
    /// Locks that our parent process holds for us (`NIX_HELD_LOCKS`).
    pub held_locks: HeldLocks,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            use_case_hack: false,
            allow_symlinked_store: false,
            build_users_group: String::new(),
            ignored_acls: vec!["security.selinux".into(), "system.nfs4_acl".into(), "security.csm".into()],
            preallocate_contents: false,
            gc_reserved_space_bytes: 8 << 20,
            keep_outputs: false,
            keep_derivations: true,
            min_free_bytes: 0,
            max_free_bytes: u64::MAX,
            min_free_check_interval_s: 5,
            auto_optimise_store: false,
            free_space_file: None,
            gc_sync_file: None,
            sync: true,
            pages: Pages::Usual,
            db_dir: None,
            held_locks: HeldLocks::default(),
        }
    }
}

/// A store on the local file system.
///
/// Cheap to open for reading: nothing is made, locked for writing or synced until something
/// is to be changed.
pub struct LocalStore {
    layout: Arc<Layout>,
    options: Arc<Options>,
    reporter: Arc<dyn Reporter + Send + Sync>,
    users: Users,
    access: Access,
    dirs: Arc<OpenDirs>,
    /// `None` only in a store that is opened for reading and has no ledger yet: it is empty.
    db: Option<Arc<StoreDb>>,
    temp_roots: Arc<OnceLock<TempRoots>>,
    pub(crate) room: Mutex<crate::room::Room>,
    pub(crate) names: Mutex<crate::ingest::Names>,
    /// Hashes of derivations seen so far.
    pub(crate) derivations: Mutex<Memo>,
    /// What real Nix has registered, once something asked.
    pub(crate) theirs: Mutex<Option<Theirs>>,
}

impl std::fmt::Debug for LocalStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalStore").field("layout", &self.layout).field("access", &self.access).finish_non_exhaustive()
    }
}

impl LocalStore {
    /// Opens a store. For writing, what is missing of it is made.
    ///
    /// A store of which nothing can be read is taken as empty when it is opened for reading.
    pub fn open(
        layout: Layout,
        options: Options,
        access: Access,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, StoreError> {
        let users = Users::default();
        let dirs = layout.open(
            &OpenOptions {
                access,
                allow_symlinked_store: options.allow_symlinked_store,
                build_users_group: &options.build_users_group,
                users: &users,
            },
            &*reporter,
        )?;
        let db_dir = options.db_dir.clone().unwrap_or_else(|| layout.db());
        let ledger = |mode| {
            let mut how = larder_store_db::OpenOptions::new(mode);
            match options.pages {
                Pages::Few => how.read_cache_bytes = 64 << 10,
                Pages::Usual => {}
                Pages::Many => {
                    how.read_cache_bytes = 8 << 20;
                    how.keeps_snapshots = true;
                }
            }
            StoreDb::open(&db_dir, &how)
        };
        let db = match access {
            Access::ReadWrite => {
                // A full disk is no reason to fail here: the reserve is a help, not a need.
                if let Err(error) = larder_fs::reserve::ensure(&layout.reserved(), options.gc_reserved_space_bytes) {
                    reporter.message(
                        larder_core::report::Level::Debug,
                        format_args!("cannot set space aside in '{}': {error}", layout.reserved().display()),
                    );
                }
                Some(ledger(Mode::Create)?)
            }
            Access::ReadOnly => match ledger(Mode::Existing) {
                Ok(db) => Some(db),
                Err(DbError::Missing { .. }) => None,
                Err(error) => return Err(error.into()),
            },
        };
        Ok(Self {
            layout: Arc::new(layout),
            options: Arc::new(options),
            reporter,
            users,
            access,
            dirs: Arc::new(dirs),
            db: db.map(Arc::new),
            temp_roots: Arc::default(),
            room: Mutex::default(),
            names: Mutex::default(),
            derivations: Mutex::default(),
            theirs: Mutex::default(),
        })
    }

    /// The same store for somebody else: with other options, another to tell, and temporary roots
    /// of its own.
    #[must_use]
    pub fn session(&self, options: Arc<Options>, reporter: Arc<dyn Reporter + Send + Sync>) -> Self {
        Self {
            layout: Arc::clone(&self.layout),
            options,
            reporter,
            users: self.users.clone(),
            access: self.access,
            dirs: Arc::clone(&self.dirs),
            db: self.db.clone(),
            temp_roots: Arc::default(),
            room: Mutex::default(),
            names: Mutex::default(),
            derivations: Mutex::default(),
            theirs: Mutex::default(),
        }
    }

    /// The same with another to tell; temporary roots are shared, and go with the last that has them.
    #[must_use]
    pub fn with_reporter(&self, reporter: Arc<dyn Reporter + Send + Sync>) -> Self {
        Self { temp_roots: Arc::clone(&self.temp_roots), ..self.session(Arc::clone(&self.options), reporter) }
    }

    /// Goes on with other options.
    pub fn set_options(&mut self, options: Arc<Options>) {
        self.options = options;
    }

    /// The temporary roots of this value.
    pub fn temp_roots(&self) -> &TempRoots {
        self.temp_roots.get_or_init(|| TempRoots::new(Layout::clone(&self.layout)))
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub const fn options(&self) -> &Arc<Options> {
        &self.options
    }

    /// What store paths are written with.
    pub fn dir(&self) -> &StoreDir {
        &self.layout.store_dir
    }

    pub fn reporter(&self) -> &(dyn Reporter + Send + Sync) {
        &*self.reporter
    }

    /// The same for whoever keeps it.
    pub fn shared_reporter(&self) -> Arc<dyn Reporter + Send + Sync> {
        Arc::clone(&self.reporter)
    }

    pub fn users(&self) -> &Users {
        &self.users
    }

    /// The ledger, to write to.
    pub(crate) fn ledger(&self) -> Result<&StoreDb, StoreError> {
        match (&self.db, self.access) {
            (Some(db), Access::ReadWrite) => Ok(db),
            _ => Err(StoreError::ReadOnly),
        }
    }

    /// The real store directory, to write below.
    pub(crate) fn store_fd(&self) -> Result<BorrowedFd<'_>, StoreError> {
        self.dirs.store().ok_or(StoreError::ReadOnly)
    }

    /// The real store directory, to read below.
    pub(crate) fn object_dir(&self) -> Result<BorrowedFd<'_>, StoreError> {
        self.dirs.store().ok_or_else(|| {
            let source = std::io::Error::from(std::io::ErrorKind::NotFound);
            larder_fs::file_error::FileError::new("opening directory", &self.layout.real_store, source).into()
        })
    }

    /// Protects paths from collectors until this value goes away.
    pub fn add_temp_roots<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> Result<(), StoreError> {
        self.temp_roots().add_all(paths)?;
        self.settle_after_collector()
    }

    /// Has the ledger tell what a killed collector has deleted last, if there was one.
    fn settle_after_collector(&self) -> Result<(), StoreError> {
        if self.temp_roots().collector_died()
            && let Ok(ledger) = self.ledger()
        {
            ledger.settle()?;
            self.temp_roots().settled()?;
        }
        Ok(())
    }

    /// Makes a link that keeps a path from being collected; gives it as it was made.
    pub fn add_permanent_root(&self, path: &StorePath, link: &Path) -> Result<PathBuf, StoreError> {
        let link = larder_gc::add_root::add_permanent(&self.layout, self.temp_roots(), path, link)?;
        self.settle_after_collector()?;
        Ok(link)
    }

    /// Asks the ledger; everything `f` asks is answered from one moment. `f` must be quick.
    ///
    /// `empty` is the answer of a store without a ledger.
    pub fn read_or<T>(
        &self,
        empty: impl FnOnce() -> T,
        f: impl FnOnce(&ReadTxn) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        match &self.db {
            Some(db) => db.read(f).map_err(|error: StoreError| error.in_dir(self.dir()).in_ledger(db.path())),
            None => Ok(empty()),
        }
    }

    /// An answer that is nothing where there is no ledger.
    pub fn read<T: Default>(&self, f: impl FnOnce(&ReadTxn) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.read_or(T::default, f)
    }

    pub fn is_valid(&self, path: &StorePath) -> Result<bool, StoreError> {
        self.read(|txn| Ok(txn.is_valid(path)?))
    }

    /// Those of some paths that are valid. The caller has locked all of them, and is going to make the
    /// others.
    ///
    /// If something lies there that is not valid, whoever has put it there may have died at the very
    /// end of registering it. That counts as soon as anybody writes to the ledger, so it counts now:
    /// what is valid must not be taken away to make it anew.
    pub fn valid_under_lock(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, StoreError> {
        let valid = self.valid_subset(paths)?;
        for path in paths.difference(&valid) {
            if self.has_entry(OsStr::new(&path.to_string()))? {
                self.ledger()?.settle()?;
                return self.valid_subset(paths);
            }
        }
        Ok(valid)
    }

    /// [`LocalStore::valid_under_lock`] of a single path.
    pub fn is_valid_under_lock(&self, path: &StorePath) -> Result<bool, StoreError> {
        Ok(!self.valid_under_lock(&BTreeSet::from([path.clone()]))?.is_empty())
    }

    /// The record of a path; an error if it is not valid.
    pub fn info(&self, path: &StorePath) -> Result<PathInfo, StoreError> {
        self.read(|txn| Ok(txn.info(path)?))?.ok_or_else(|| self.not_valid(path))
    }

    /// The error for a path that ought to be valid.
    pub fn not_valid(&self, path: &StorePath) -> StoreError {
        StoreError::NotValid { path: self.dir().full(path) }
    }

    /// Outputs of a valid derivation, by name, as far as their paths are known.
    pub fn derivation_outputs(&self, path: &StorePath) -> Result<BTreeMap<String, StorePath>, StoreError> {
        self.read(|txn| if txn.is_valid(path)? { Ok(Some(txn.derivation_outputs(path)?)) } else { Ok(None) })?
            .ok_or_else(|| self.not_valid(path))
    }

    /// Some paths with references before referrers, as `-qR` prints them. Paths that are not
    /// valid refer to nothing.
    pub fn order(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, StoreError> {
        let paths: Vec<StorePath> = paths.iter().cloned().collect();
        let infos = self.read_or(|| vec![None; paths.len()], |txn| Ok(txn.infos(&paths)?))?;
        let number: BTreeMap<&StorePath, u32> = paths.iter().zip(0..).collect();
        let references: Vec<Vec<u32>> = infos
            .iter()
            .zip(0..)
            .map(|(info, this)| {
                let all = info.iter().flat_map(|info| &info.references);
                all.filter_map(|path| number.get(path).copied()).filter(|n| *n != this).collect()
            })
            .collect();
        let of = |node: u32| references.get(node as usize).map_or(&[][..], Vec::as_slice);
        let order = larder_store_db::graph::topological_order(
            paths.len(),
            0..u32::try_from(paths.len()).unwrap_or(u32::MAX),
            of,
            |_| true,
        );
        let path = |node: u32| paths.get(node as usize).expect("the order is of these paths");
        match order {
            Ok(order) => Ok(order.into_iter().map(|node| path(node).clone()).collect()),
            Err((at, from)) => {
                Err(StoreError::Cycle { path: self.dir().full(path(at)), from: self.dir().full(path(from)) })
            }
        }
    }

    /// Paths whose build failed, as far as that is remembered.
    pub fn failed_paths(&self) -> Result<Vec<StorePath>, StoreError> {
        self.read(|txn| Ok(txn.failed_paths()?.into_iter().map(|(path, _)| path).collect()))
    }

    /// Forgets that building some paths, or any, failed.
    pub fn clear_failed_paths(&self, paths: Option<&[StorePath]>) -> Result<(), StoreError> {
        self.ledger()?.write(|txn| {
            match paths {
                None => txn.clear_all_failed()?,
                Some(paths) => {
                    for path in paths {
                        txn.clear_failed(path)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// The valid ones among some paths.
    pub fn valid_subset(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, StoreError> {
        self.read(|txn| Ok(txn.valid_subset(paths)?))
    }
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
