//! Where the parts of a local store lie, and opening (or making) them.
//!
//! Shared with Nix: names, modes and owners of everything below the state directory. Source:
//! formats, section 10.1; settings, section 8.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use larder_core::report::{Level, Reporter};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::file_error::{At as _, FileError, shown};
use crate::lock_file::{LockFile, Sharing, Wait};
use crate::users::Users;

/// The places of one local store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// What store paths are written with.
    pub store_dir: StoreDir,
    /// Where the objects really lie: the same, but for a store below another root.
    pub real_store: PathBuf,
    /// `$V`: database, roots, locks. Usually `/nix/var/nix`.
    pub state: PathBuf,
    /// Build logs. Usually `/nix/var/log/nix`.
    pub log: PathBuf,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    #[error(
        "the path '{}' is a symlink; this is not allowed for the Nix store and its parent directories",
        shown(path)
    )]
    SymlinkedStore { path: PathBuf },
    #[error("the store directory '{}' is not an absolute path", shown(path))]
    NotAbsolute { path: PathBuf },
    #[error("looking up the group '{name}' specified in 'build-users-group'")]
    Group { name: String, source: std::io::Error },
    #[error(transparent)]
    File(#[from] FileError),
}

/// What the opener means to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Make what is missing, put right modes and owners.
    ReadWrite,
    /// Touch nothing. A part that is missing or closed to us is no error.
    ReadOnly,
}

#[derive(Debug, Clone, Copy)]
pub struct OpenOptions<'a> {
    pub access: Access,
    /// Setting `allow-symlinked-store`.
    pub allow_symlinked_store: bool,
    /// Setting `build-users-group`; empty for none. Only root minds it.
    pub build_users_group: &'a str,
    pub users: &'a Users,
}

/// A store's directories, open.
#[derive(Debug)]
pub struct OpenDirs {
    store: Option<OwnedFd>,
    big_lock: Option<BigLock>,
}

impl OpenDirs {
    /// The real store directory; everything works below this descriptor.
    ///
    /// `None` only if opened read-only and there is no store, or none that we may see.
    pub fn store(&self) -> Option<BorrowedFd<'_>> {
        self.store.as_ref().map(AsFd::as_fd)
    }

    /// `None` only if opened read-only and the lock file is missing or closed to us.
    pub fn big_lock(&self) -> Option<&BigLock> {
        self.big_lock.as_ref()
    }
}

impl Layout {
    /// The store with its parts below another root (`local?root=DIR`): `DIR/nix/store`,
    /// `DIR/nix/var/nix`, `DIR/nix/var/log/nix`.
    ///
    /// The logical store directory stays what it is, and does not change where the real one lies.
    pub fn rooted(store_dir: StoreDir, root: &Path) -> Self {
        Self {
            store_dir,
            real_store: root.join("nix/store"),
            state: root.join("nix/var/nix"),
            log: root.join("nix/var/log/nix"),
        }
    }

    /// The real place of an object.
    pub fn real_path(&self, path: &StorePath) -> PathBuf {
        self.real_store.join(path.to_string())
    }

    /// Hard links named by content.
    pub fn links(&self) -> PathBuf {
        self.real_store.join(".links")
    }

    pub fn db(&self) -> PathBuf {
        self.state.join("db")
    }

    pub fn big_lock(&self) -> PathBuf {
        self.state.join("db/big-lock")
    }

    /// The schema version that Nix has written, if this is (also) Nix's store.
    pub fn schema(&self) -> PathBuf {
        self.state.join("db/schema")
    }

    pub fn reserved(&self) -> PathBuf {
        self.state.join("db/reserved")
    }

    pub fn gc_lock(&self) -> PathBuf {
        self.state.join("gc.lock")
    }

    pub fn gc_socket(&self) -> PathBuf {
        self.state.join("gc-socket/socket")
    }

    pub fn temp_roots(&self) -> PathBuf {
        self.state.join("temproots")
    }

    pub fn gc_roots(&self) -> PathBuf {
        self.state.join("gcroots")
    }

    pub fn auto_roots(&self) -> PathBuf {
        self.state.join("gcroots/auto")
    }

    pub fn profiles(&self) -> PathBuf {
        self.state.join("profiles")
    }

    pub fn user_pool(&self) -> PathBuf {
        self.state.join("userpool")
    }

    pub fn current_load(&self) -> PathBuf {
        self.state.join("current-load")
    }

    pub fn daemon_socket(&self) -> PathBuf {
        self.state.join("daemon-socket/socket")
    }

    pub fn drv_logs(&self) -> PathBuf {
        self.log.join("drvs")
    }

    /// Opens the store, and makes what is missing of it.
    ///
    /// A store on a read-only mount has to be made writable first (`mounts`). The big lock is
    /// taken shared, and waited for while another process upgrades the schema. Nothing is said
    /// about the database, and the reserve is left to who opens that.
    ///
    /// Errors: a symlink where the store directory or a parent of it should be (unless allowed);
    /// what is missing cannot be made; without [`Access::ReadWrite`], I/O errors other than "not
    /// found" and "permission denied".
    pub fn open(&self, options: &OpenOptions<'_>, reporter: &dyn Reporter) -> Result<OpenDirs, LayoutError> {
        match options.access {
            Access::ReadWrite => self.open_read_write(options, reporter),
            Access::ReadOnly => self.open_read_only(options, reporter),
        }
    }

    fn open_read_only(&self, options: &OpenOptions<'_>, reporter: &dyn Reporter) -> Result<OpenDirs, LayoutError> {
        let store = match open_store(&self.real_store, options, false) {
            Err(LayoutError::File(e)) if is_out_of_reach(&e) => None,
            other => Some(other?),
        };
        let big_lock = match LockFile::open_existing(&self.big_lock()) {
            Err(e) if is_out_of_reach(&e) => None,
            other => other?,
        };
        let big_lock = big_lock.map(|file| BigLock::shared(file, reporter)).transpose()?;
        Ok(OpenDirs { store, big_lock })
    }

    fn open_read_write(&self, options: &OpenOptions<'_>, reporter: &dyn Reporter) -> Result<OpenDirs, LayoutError> {
        let store = open_store(&self.real_store, options, true)?;
        set_store_owner(&store, &self.real_store, options, reporter)?;
        make_dir(store.as_fd(), OsStr::new(".links"), &self.links())?;
        make_dirs(&self.state)?;
        for name in ["temproots", "profiles", "db"] {
            make_dirs(&self.state.join(name))?;
        }
        self.make_gc_roots()?;
        for dir in [self.profiles(), self.gc_roots()] {
            let dir = dir.join("per-user");
            make_dirs(&dir)?;
            set_mode(&dir, 0o755)?;
        }
        let big_lock = BigLock::shared(LockFile::open(&self.big_lock())?, reporter)?;
        Ok(OpenDirs { store: Some(store), big_lock: Some(big_lock) })
    }

    /// `gcroots`, which gets its link to the profiles only when it is new: an administrator
    /// may have taken the link away.
    fn make_gc_roots(&self) -> Result<(), FileError> {
        let dir = self.gc_roots();
        match rustix::fs::mkdir(&dir, DIR_MODE) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(()),
            Err(e) => return Err(FileError::new("creating directory", dir, e)),
        }
        let link = dir.join("profiles");
        match rustix::fs::symlink(self.profiles(), &link) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(e) => Err(FileError::new("creating symlink", link, e)),
        }
    }

    /// Makes the user's own directories `profiles/per-user/NAME` and `gcroots/per-user/NAME`,
    /// mode 0755, and gives them to the user. Only root can do that for others.
    ///
    /// Errors: `name` is no single file name; I/O errors.
    pub fn create_user_dirs(&self, name: &str, uid: u32) -> Result<(), FileError> {
        if Path::new(name).file_name() != Some(OsStr::new(name)) {
            return Err(FileError::new("creating directory of user", name, Errno::INVAL));
        }
        for parent in [self.profiles(), self.gc_roots()] {
            let dir = parent.join("per-user").join(name);
            make_dirs(&dir)?;
            let fd = open_dir(CWD, dir.as_os_str(), OFlags::NOFOLLOW).at("opening directory", &dir)?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).at("changing permissions of", &dir)?;
            rustix::fs::fchown(&fd, Some(Uid::from_raw(uid)), Some(rustix::process::getgid()))
                .at("changing ownership of", &dir)?;
        }
        Ok(())
    }
}

/// `$V/db/big-lock`: shared for as long as the store is open, exclusive for a schema upgrade.
#[derive(Debug)]
pub struct BigLock {
    file: LockFile,
}

impl BigLock {
    fn shared(file: LockFile, reporter: &dyn Reporter) -> Result<Self, FileError> {
        let lock = Self { file };
        lock.take(Sharing::Shared, "waiting for the big Nix store lock...", reporter)?;
        Ok(lock)
    }

    /// Waits until nobody else has the store open. Not atomic: look at the schema again after.
    pub fn upgrade(&self, reporter: &dyn Reporter) -> Result<(), FileError> {
        self.take(Sharing::Exclusive, "waiting for exclusive access to the Nix store...", reporter)
    }

    /// Back to shared.
    pub fn downgrade(&self, reporter: &dyn Reporter) -> Result<(), FileError> {
        self.take(Sharing::Shared, "waiting for the big Nix store lock...", reporter)
    }

    fn take(&self, sharing: Sharing, message: &str, reporter: &dyn Reporter) -> Result<(), FileError> {
        let mut waiting = |_: &Path| reporter.message(Level::Error, format_args!("{message}"));
        self.file.lock(sharing, &mut Wait::Yes(&mut waiting)).map(drop)
    }
}

const DIR_MODE: Mode = Mode::from_raw_mode(0o755);

/// Sticky, and writable for the build users, who make their outputs there.
const SHARED_STORE_MODE: u32 = 0o1775;

fn is_out_of_reach(e: &FileError) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(e.kind(), NotFound | NotADirectory | PermissionDenied)
}

fn open_dir(parent: BorrowedFd<'_>, name: &OsStr, more: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more;
    match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        // To look things up in it, a directory need not be readable.
        Err(Errno::ACCESS) => rustix::fs::openat(parent, name, flags | OFlags::PATH, Mode::empty()),
        other => other,
    }
}

/// Walks down to the store directory, one component at a time so that a symlink is seen.
fn open_store(path: &Path, options: &OpenOptions<'_>, create: bool) -> Result<OwnedFd, LayoutError> {
    if !path.is_absolute() || path.components().any(|c| c == Component::ParentDir) {
        return Err(LayoutError::NotAbsolute { path: path.to_owned() });
    }
    if options.allow_symlinked_store {
        if create {
            make_dirs(path)?;
        }
        return Ok(open_dir(CWD, path.as_os_str(), OFlags::empty()).at("opening the store directory", path)?);
    }
    let mut walked = PathBuf::from("/");
    let mut dir = open_dir(CWD, walked.as_os_str(), OFlags::PATH).at("opening directory", &walked)?;
    let mut names =
        path.components().filter_map(|c| if let Component::Normal(n) = c { Some(n) } else { None }).peekable();
    while let Some(name) = names.next() {
        walked.push(name);
        let last = names.peek().is_none();
        let flags = OFlags::NOFOLLOW | if last { OFlags::empty() } else { OFlags::PATH };
        let mut opened = open_dir(dir.as_fd(), name, flags);
        if matches!(opened, Err(Errno::NOENT)) && create {
            make_dir(dir.as_fd(), name, &walked)?;
            opened = open_dir(dir.as_fd(), name, flags);
        }
        dir = match opened {
            // With O_DIRECTORY a symlink gives ENOTDIR, as a plain file does.
            Err(Errno::LOOP | Errno::NOTDIR) if is_symlink(dir.as_fd(), name) => {
                return Err(LayoutError::SymlinkedStore { path: walked });
            }
            other => other.at("opening the store directory", &walked)?,
        };
    }
    Ok(dir)
}

fn is_symlink(dir: BorrowedFd<'_>, name: &OsStr) -> bool {
    rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|status| FileType::from_raw_mode(status.st_mode) == FileType::Symlink)
}

/// As root with build users, the store is theirs to write in, but not to delete from.
fn set_store_owner(
    store: &OwnedFd,
    path: &Path,
    options: &OpenOptions<'_>,
    reporter: &dyn Reporter,
) -> Result<(), LayoutError> {
    let name = options.build_users_group;
    if name.is_empty() || !rustix::process::getuid().is_root() {
        return Ok(());
    }
    let found = options.users.group_by_name(name);
    let Some(group) = found.map_err(|source| LayoutError::Group { name: name.to_owned(), source })? else {
        let text = format_args!("the group '{name}' specified in 'build-users-group' does not exist");
        reporter.message(Level::Warn, text);
        return Ok(());
    };
    let status = rustix::fs::fstat(store).at("getting status of", path)?;
    if status.st_uid != 0 || status.st_gid != group.gid {
        rustix::fs::fchown(store, Some(Uid::ROOT), Some(Gid::from_raw(group.gid))).at("changing ownership of", path)?;
    }
    if status.st_uid != 0 || status.st_gid != group.gid || status.st_mode & 0o7777 != SHARED_STORE_MODE {
        rustix::fs::fchmod(store, Mode::from_raw_mode(SHARED_STORE_MODE)).at("changing permissions of", path)?;
    }
    Ok(())
}

/// Makes one directory; that it is there already is fine.
fn make_dir(parent: BorrowedFd<'_>, name: &OsStr, shown: &Path) -> Result<(), FileError> {
    match rustix::fs::mkdirat(parent, name, DIR_MODE) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(FileError::new("creating directory", shown, e)),
    }
}

/// Makes a directory and its parents, mode 0755; symlinks on the way are followed.
pub fn make_dirs(path: &Path) -> Result<(), FileError> {
    if path.as_os_str().as_bytes().is_empty() || path.is_dir() {
        return Ok(());
    }
    let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.is_dir()).collect();
    for dir in missing.into_iter().rev() {
        make_dir(CWD, dir.as_os_str(), dir)?;
    }
    // Something else may have the name.
    open_dir(CWD, path.as_os_str(), OFlags::PATH).at("creating directory", path).map(drop)
}

/// Of a directory itself, never of what a symlink in its place leads to.
fn set_mode(path: &Path, mode: u32) -> Result<(), FileError> {
    let fd = open_dir(CWD, path.as_os_str(), OFlags::NOFOLLOW).at("opening directory", path)?;
    let status = rustix::fs::fstat(&fd).at("getting status of", path)?;
    if status.st_mode & 0o7777 != mode {
        rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode)).at("changing permissions of", path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RealNix, give_away, is_root, layout, public_dir, unprivileged};
    use larder_core::report::Silent;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::sync::Mutex;

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl Reporter for Told {
        fn shows(&self, _level: Level) -> bool {
            true
        }
        fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
            self.0.lock().unwrap().push(format!("{level:?}: {text}"));
        }
    }

    fn open(layout: &Layout, access: Access) -> Result<OpenDirs, LayoutError> {
        open_with(layout, access, "", &Users::from_files("/no/passwd", "/no/group"), &Silent)
    }

    fn open_with(
        layout: &Layout,
        access: Access,
        build_users_group: &str,
        users: &Users,
        reporter: &dyn Reporter,
    ) -> Result<OpenDirs, LayoutError> {
        layout.open(&OpenOptions { access, allow_symlinked_store: false, build_users_group, users }, reporter)
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    fn tree(dir: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut todo = vec![dir.to_owned()];
        while let Some(path) = todo.pop() {
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            }
            found.push(path.strip_prefix(dir).unwrap().to_owned());
        }
        found.sort();
        found
    }

    #[test]
    fn makes_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(&dir.path().join("nix"));
        let opened = open(&layout, Access::ReadWrite).unwrap();
        let expected = [
            "",
            "store",
            "store/.links",
            "var",
            "var/db",
            "var/db/big-lock",
            "var/gcroots",
            "var/gcroots/per-user",
            "var/gcroots/profiles",
            "var/profiles",
            "var/profiles/per-user",
            "var/temproots",
        ];
        assert_eq!(tree(&dir.path().join("nix")), expected.map(PathBuf::from));
        assert_eq!(mode(&layout.big_lock()), 0o600);
        assert_eq!(mode(&layout.profiles().join("per-user")), 0o755);
        assert_eq!(fs::read_link(layout.gc_roots().join("profiles")).unwrap(), layout.profiles());
        let status = rustix::fs::fstat(opened.store().unwrap()).unwrap();
        assert_eq!(status.st_ino, fs::metadata(&layout.real_store).unwrap().ino());
        // Again, and what the administrator took away stays away.
        fs::remove_file(layout.gc_roots().join("profiles")).unwrap();
        fs::set_permissions(layout.profiles().join("per-user"), fs::Permissions::from_mode(0o777)).unwrap();
        let again = open(&layout, Access::ReadWrite).unwrap();
        assert!(!layout.gc_roots().join("profiles").exists());
        assert_eq!(mode(&layout.profiles().join("per-user")), 0o755);
        // Both hold the lock shared.
        let other = LockFile::open(&layout.big_lock()).unwrap();
        assert!(!other.lock(Sharing::Exclusive, &mut Wait::No).unwrap());
        drop((opened, again));
        assert!(other.lock(Sharing::Exclusive, &mut Wait::No).unwrap());
    }

    #[test]
    fn store_of_the_build_users() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        fs::write(dir.path().join("group"), "nixbld:x:30000:\n").unwrap();
        let users = Users::from_files("/no/passwd", dir.path().join("group"));
        let told = Told::default();
        open_with(&layout, Access::ReadWrite, "other", &users, &told).unwrap();
        let before = mode(&layout.real_store);
        if !is_root() {
            assert!(told.0.lock().unwrap().is_empty());
            return;
        }
        let warning = "Warn: the group 'other' specified in 'build-users-group' does not exist";
        assert_eq!(*told.0.lock().unwrap(), [warning]);
        assert_eq!(before & 0o022, 0);
        open_with(&layout, Access::ReadOnly, "nixbld", &users, &told).unwrap();
        assert_eq!(mode(&layout.real_store), before, "read-only changes nothing");
        open_with(&layout, Access::ReadWrite, "nixbld", &users, &told).unwrap();
        assert_eq!(mode(&layout.real_store), 0o1775);
        assert_eq!(fs::metadata(&layout.real_store).unwrap().gid(), 30_000);
    }

    #[test]
    fn symlinks_on_the_way_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("real")).unwrap();
        symlink("real", dir.path().join("link")).unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        let mut layout = layout(&dir.path().join("x"));
        for (store, link) in [("link/store", "link"), ("real/store", "real/store")] {
            layout.real_store = dir.path().join(store);
            for access in [Access::ReadWrite, Access::ReadOnly] {
                let e = open(&layout, access).unwrap_err();
                assert!(matches!(&e, LayoutError::SymlinkedStore { path } if *path == dir.path().join(link)), "{e}");
            }
            let options = OpenOptions {
                access: Access::ReadWrite,
                allow_symlinked_store: true,
                build_users_group: "",
                users: &Users::default(),
            };
            layout.open(&options, &Silent).unwrap();
            let _ = fs::remove_dir_all(dir.path().join("real/store"));
            symlink("../link", dir.path().join("real/store")).unwrap();
        }
        layout.real_store = dir.path().join("file/store");
        assert!(matches!(open(&layout, Access::ReadWrite), Err(LayoutError::File(_))));
        layout.real_store = dir.path().join("real/../link");
        assert!(matches!(open(&layout, Access::ReadWrite), Err(LayoutError::NotAbsolute { .. })));
    }

    #[test]
    fn read_only_makes_nothing_and_minds_nothing() {
        let dir = public_dir();
        let layout = layout(&dir.path().join("nix"));
        let opened = open(&layout, Access::ReadOnly).unwrap();
        assert!(opened.store().is_none() && opened.big_lock().is_none());
        assert!(!dir.path().join("nix").exists());
        drop(open(&layout, Access::ReadWrite).unwrap());
        let opened = open(&layout, Access::ReadOnly).unwrap();
        assert!(opened.store().is_some() && opened.big_lock().is_some());
        if is_root() {
            unprivileged(|| {
                let opened = open(&layout, Access::ReadOnly).unwrap();
                assert!(opened.store().is_some() && opened.big_lock().is_none());
                let e = open(&layout, Access::ReadWrite).unwrap_err();
                assert!(matches!(&e, LayoutError::File(e) if e.kind() == std::io::ErrorKind::PermissionDenied), "{e}");
            });
            fs::set_permissions(dir.path().join("nix"), fs::Permissions::from_mode(0o700)).unwrap();
            unprivileged(|| assert!(open(&layout, Access::ReadOnly).unwrap().store().is_none()));
        }
    }

    /// A store of one's own needs no privileges, and its directory need not be readable.
    #[test]
    fn stores_of_users() {
        let dir = public_dir();
        let home = dir.path().join("home");
        fs::create_dir(&home).unwrap();
        give_away(&home);
        let layout = layout(&home);
        unprivileged(|| {
            drop(open(&layout, Access::ReadWrite).unwrap());
            fs::set_permissions(&layout.real_store, fs::Permissions::from_mode(0o311)).unwrap();
            let opened = open(&layout, Access::ReadWrite).unwrap();
            assert!(rustix::fs::statat(opened.store().unwrap(), ".links", AtFlags::empty()).is_ok());
        });
    }

    #[test]
    fn upgrades_wait_for_others() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let (ours, others) = (open(&layout, Access::ReadWrite).unwrap(), open(&layout, Access::ReadWrite).unwrap());
        let told = Told::default();
        std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| ours.big_lock().unwrap().upgrade(&told).unwrap());
            crate::testing::eventually("it waits", || !told.0.lock().unwrap().is_empty());
            assert!(!upgrade.is_finished());
            drop(others);
            upgrade.join().unwrap();
        });
        assert_eq!(*told.0.lock().unwrap(), ["Error: waiting for exclusive access to the Nix store..."]);
        std::thread::scope(|scope| {
            let opener = scope.spawn(|| open_with(&layout, Access::ReadWrite, "", &Users::default(), &told).unwrap());
            crate::testing::eventually("it waits", || told.0.lock().unwrap().len() == 2);
            assert!(!opener.is_finished());
            ours.big_lock().unwrap().downgrade(&told).unwrap();
            opener.join().unwrap();
        });
        assert_eq!(told.0.lock().unwrap()[1], "Error: waiting for the big Nix store lock...");
    }

    #[test]
    fn directories_of_users() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        drop(open(&layout, Access::ReadWrite).unwrap());
        let uid = if is_root() { 1234 } else { rustix::process::getuid().as_raw() };
        for _ in 0..2 {
            layout.create_user_dirs("alice", uid).unwrap();
            for path in [layout.profiles(), layout.gc_roots()] {
                let status = fs::metadata(path.join("per-user/alice")).unwrap();
                assert_eq!((status.uid(), status.mode() & 0o7777), (uid, 0o755));
            }
        }
        for name in ["", "..", "a/b", "."] {
            assert!(layout.create_user_dirs(name, uid).is_err(), "{name}");
        }
        // A link that somebody has put there does not lead to a change of owner.
        symlink(dir.path(), layout.profiles().join("per-user/bob")).unwrap();
        assert!(layout.create_user_dirs("bob", uid).is_err());
    }

    #[test]
    fn below_another_root() {
        let store_dir = StoreDir::new("/nix/store").unwrap();
        let layout = Layout::rooted(store_dir, Path::new("/mnt"));
        let path: StorePath = "00000000000000000000000000000001-x".parse().unwrap();
        let real = Path::new("/mnt/nix/store/00000000000000000000000000000001-x");
        assert_eq!(layout.real_path(&path), real);
        assert_eq!(layout.store_dir.full(&path), "/nix/store/00000000000000000000000000000001-x");
        assert_eq!(layout.state, Path::new("/mnt/nix/var/nix"));
        assert_eq!(layout.drv_logs(), Path::new("/mnt/nix/var/log/nix/drvs"));
    }

    /// What we make, a real Nix takes; and the other way round.
    #[test]
    fn interop_same_directories() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (layout(&dir.path().join("ours")), layout(&dir.path().join("theirs")));
        let Some(nix) = RealNix::find("interop_same_directories", &theirs) else { return };
        nix.run(&["--gc", "--print-roots"]);
        drop(open_with(&ours, Access::ReadWrite, "nixbld", &Users::default(), &Silent).unwrap());
        for path in tree(&dir.path().join("ours")) {
            let [ours, theirs] = ["ours", "theirs"].map(|d| fs::symlink_metadata(dir.path().join(d).join(&path)));
            let (ours, theirs) = (ours.unwrap(), theirs.unwrap_or_else(|e| panic!("{path:?}: {e}")));
            assert_eq!((ours.mode(), ours.uid(), ours.gid()), (theirs.mode(), theirs.uid(), theirs.gid()), "{path:?}");
        }
        let nix = RealNix::find("interop_same_directories", &ours).unwrap();
        nix.add("file", "text");
        drop(open(&theirs, Access::ReadWrite).unwrap());
    }
}
