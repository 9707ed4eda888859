//! Equal files become one file with several names.
//!
//! `.links/HASH` is a hard link to one file with those contents; another file that has them is
//! replaced by a link to the same. HASH is the SHA-256 of the NAR of the file alone, so that what is
//! executable is not confused with what is not. Shared with Nix. Source: gc, section 10; formats,
//! section 4.1.
//!
//! A file is linked through the descriptor it was hashed from, and only if it is as it was before;
//! the contents of an entry of `.links` that somebody else made are looked at before it replaces
//! anything. So what was damaged is not spread.

use std::ffi::{CString, OsStr};
use std::hash::{BuildHasher as _, RandomState};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use larder_core::hash::{NarHasher, Sha256Digest};
use larder_core::nar::{Encoder, Event};
use larder_core::report::{Level, Reporter};
use rayon::Scope;
use rustc_hash::FxHashSet;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::entry::{Status, Target, open_dir, open_path, proc_path};
use crate::file_error::{At as _, FileError, shown};
use crate::links::inodes;
use crate::lock_file::retry;

/// How often a name that a collector has taken away is made again.
const ATTEMPTS: u32 = 20;

/// What linking has saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Saved {
    /// Files that were replaced.
    pub files: u64,
    /// Their sizes.
    pub bytes: u64,
    /// What they took on the disk, in blocks of 512 bytes.
    pub blocks: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Preload {
    /// Learn which files are linked already, and pass them over unseen.
    Yes,
    /// For a single path: that would cost more than it saves.
    No,
}

/// Links equal files of one store. Threads may share it; so may processes the store.
pub struct Optimiser<'a> {
    store: BorrowedFd<'a>,
    store_path: PathBuf,
    links: OwnedFd,
    links_path: PathBuf,
    reporter: &'a (dyn Reporter + Sync),
    /// Inodes that have a name in `.links`.
    known: RwLock<FxHashSet<u64>>,
    /// Of these, the ones whose contents were hashed in this run.
    hashed: Mutex<FxHashSet<u64>>,
    /// Names of links under way begin so; the number of a thread follows.
    temporary: String,
    files: AtomicU64,
    bytes: AtomicU64,
    blocks: AtomicU64,
}

impl Drop for Optimiser<'_> {
    fn drop(&mut self) {
        if self.files.load(Ordering::Relaxed) > 0 {
            for thread in 0..=rayon::current_num_threads() {
                let _ = rustix::fs::unlinkat(self.store, format!("{}-{thread}", self.temporary), AtFlags::empty());
            }
        }
    }
}

impl std::fmt::Debug for Optimiser<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Optimiser").field("store", &self.store_path).finish_non_exhaustive()
    }
}

/// A directory whose files are being linked.
struct Folder {
    fd: OwnedFd,
    path: PathBuf,
    /// As it was: put back when the last file is done.
    mode: u32,
    /// We may not write to it as it is.
    needs_opening: bool,
    changed: Mutex<bool>,
}

impl Folder {
    /// Makes it ours to write to.
    fn open_up(&self) -> rustix::io::Result<()> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if self.needs_opening {
            // Each time: another process may have closed it after its own work.
            rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(self.mode | 0o200))?;
        }
        *changed = true;
        Ok(())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !*self.changed.lock().unwrap_or_else(PoisonError::into_inner) {
            return;
        }
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let keep = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
        let _ = rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(self.mode & !0o222));
        let _ = rustix::fs::futimens(&self.fd, &Timestamps { last_access: keep, last_modification: second });
    }
}

/// Where a file is.
struct Place<'p> {
    dir: BorrowedFd<'p>,
    name: &'p CString,
    path: &'p Path,
    /// `None` for the store directory itself, whose mode and times are nobody's business.
    folder: Option<&'p Folder>,
}

impl Place<'_> {
    fn full(&self) -> PathBuf {
        self.path.join(OsStr::from_bytes(self.name.as_bytes()))
    }
}

/// What is the matter with a file is told, and the others go on.
type Linked = Result<(), FileError>;

impl<'a> Optimiser<'a> {
    /// `store`: the open store directory. `.links` is made if it is missing.
    pub fn new(
        store: BorrowedFd<'a>,
        store_path: &Path,
        preload: Preload,
        reporter: &'a (dyn Reporter + Sync),
    ) -> Result<Self, FileError> {
        const DOING: &str = "opening directory";
        let links_path = store_path.join(".links");
        match rustix::fs::mkdirat(store, ".links", Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(FileError::new("creating directory", links_path, e)),
        }
        let links = open_dir(store, c".links").at(DOING, &links_path)?;
        let known = match preload {
            Preload::Yes => inodes(&links_path)?,
            Preload::No => FxHashSet::default(),
        };
        if preload == Preload::Yes {
            reporter.message(Level::Talkative, format_args!("loaded {} hash inodes", known.len()));
        }
        let random = RandomState::new().hash_one(links_path.as_os_str()) & 0x7fff_ffff;
        let temporary = format!(".tmp-link-{}-{random}", std::process::id());
        Ok(Self {
            store,
            store_path: store_path.to_owned(),
            links,
            links_path,
            reporter,
            known: RwLock::new(known),
            hashed: Mutex::default(),
            temporary,
            files: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            blocks: AtomicU64::new(0),
        })
    }

    pub fn saved(&self) -> Saved {
        Saved {
            files: self.files.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            blocks: self.blocks.load(Ordering::Relaxed),
        }
    }

    /// Links the files of one entry of the store directory, on all threads of the current pool.
    ///
    /// What goes wrong with single files is told; the number of those is given. That the entry is not
    /// there is fine.
    pub fn entry(&self, name: &OsStr) -> Result<u64, FileError> {
        let target = Target { dir: self.store, name, dir_path: &self.store_path };
        let name = target.checked_name("optimising")?;
        let failed = AtomicU64::new(0);
        rayon::scope(|scope| {
            let place = Place { dir: self.store, name: &name, path: &self.store_path, folder: None };
            if let Err(error) = self.visit(&place, None, scope, &failed) {
                self.tell(&error, &failed);
            }
        });
        Ok(failed.into_inner())
    }

    fn tell(&self, error: &FileError, failed: &AtomicU64) {
        failed.fetch_add(1, Ordering::Relaxed);
        self.reporter.message(Level::Error, format_args!("{error}: {}", error.source));
    }

    fn is_known(&self, inode: u64) -> bool {
        self.known.read().unwrap_or_else(PoisonError::into_inner).contains(&inode)
    }

    fn learn(&self, inode: u64) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(inode);
        self.hashed.lock().unwrap_or_else(PoisonError::into_inner).insert(inode);
    }

    /// `kind` as far as the directory has told it.
    fn visit<'s>(
        &'s self,
        place: &Place<'_>,
        kind: Option<FileType>,
        scope: &Scope<'s>,
        failed: &'s AtomicU64,
    ) -> Linked {
        let kind = match kind {
            Some(kind) => kind,
            None => match Status::at(place.dir, place.name) {
                Err(Errno::NOENT) => return Ok(()),
                status => status.at("getting status of", place.full())?.kind,
            },
        };
        match kind {
            FileType::Directory => self.directory(place, scope, failed),
            FileType::RegularFile | FileType::Symlink => self.file(place),
            _ => Ok(()),
        }
    }

    fn directory<'s>(&'s self, place: &Place<'_>, scope: &Scope<'s>, failed: &'s AtomicU64) -> Linked {
        const DOING: &str = "reading directory";
        let path = place.full();
        let fd = match open_dir(place.dir, place.name) {
            Err(Errno::NOENT) => return Ok(()),
            fd => fd.at("opening directory", &path)?,
        };
        let mode = Status::of(fd.as_fd()).at("getting status of", &path)?.mode;
        let entries = Dir::read_from(&fd).at(DOING, &path)?;
        let needs_opening = mode & 0o200 == 0 && !rustix::process::geteuid().is_root();
        let folder = Arc::new(Folder { fd, path, mode, needs_opening, changed: Mutex::new(false) });
        for entry in entries {
            let entry = entry.at(DOING, &folder.path)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let kind = Some(entry.file_type()).filter(|kind| *kind != FileType::Unknown);
            // The directory has the number of the inode: most files need not be looked at.
            if kind != Some(FileType::Directory) && self.is_known(entry.ino()) {
                continue;
            }
            let (name, folder) = (name.to_owned(), Arc::clone(&folder));
            scope.spawn(move |scope| {
                let place = Place { dir: folder.fd.as_fd(), name: &name, path: &folder.path, folder: Some(&folder) };
                if let Err(error) = self.visit(&place, kind, scope, failed) {
                    self.tell(&error, failed);
                }
            });
        }
        Ok(())
    }

    fn file(&self, place: &Place<'_>) -> Linked {
        let full = place.full();
        let file = match Opened::open(place.dir, place.name, &full) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            opened => opened?,
        };
        if file.status.links > 1 && self.is_known(file.status.id.inode) {
            return Ok(());
        }
        if file.status.kind == FileType::RegularFile && file.status.mode & 0o200 != 0 {
            let text = format_args!("skipping suspicious writable file '{}'", shown(&full));
            self.reporter.message(Level::Warn, text);
            return Ok(());
        }
        let link = CString::new(file.hash(&full)?.to_base32()).expect("base 32 has no NUL");
        for _ in 0..ATTEMPTS {
            if let Done::Yes = self.link(place, &full, &file, &link)? {
                return Ok(());
            }
        }
        Err(FileError::new("linking", full, Errno::AGAIN))
    }

    fn changes(&self, full: &Path) -> Done {
        self.reporter.message(Level::Warn, format_args!("'{}' changes while it is read", shown(full)));
        Done::Yes
    }

    /// One attempt to make the file and its link the same.
    fn link(&self, place: &Place<'_>, full: &Path, file: &Opened, link: &CString) -> Result<Done, FileError> {
        let Opened { fd, status, .. } = file;
        let link_path = || self.links_path.join(OsStr::from_bytes(link.as_bytes()));
        let found = match Status::at(self.links.as_fd(), link) {
            Err(Errno::NOENT) => {
                if !file.is_unchanged(full)? {
                    return Ok(self.changes(full));
                }
                // Through the descriptor: this is what was hashed.
                let made = rustix::fs::linkat(CWD, proc_path(fd.as_fd()), &self.links, link, AtFlags::SYMLINK_FOLLOW);
                return match made {
                    Ok(()) => {
                        self.learn(status.id.inode);
                        Ok(Done::Yes)
                    }
                    Err(Errno::EXIST) => Ok(Done::No),
                    // Deleted while we looked.
                    Err(Errno::NOENT) => Ok(Done::Yes),
                    // A directory that can take no more, or a file that can have no more names.
                    Err(e @ (Errno::NOSPC | Errno::MLINK)) => {
                        self.cannot_link(full, &link_path(), e);
                        Ok(Done::Yes)
                    }
                    Err(e) => Err(FileError::new("linking", link_path(), e)),
                };
            }
            found => found.at("getting status of", link_path())?,
        };
        if found.id == status.id {
            if !file.is_unchanged(full)? {
                return Ok(self.changes(full));
            }
            self.learn(status.id.inode);
            return Ok(Done::Yes);
        }
        if found.size != status.size || found.kind != status.kind || !self.is_sound(link, &found)? {
            let path = link_path();
            self.reporter.message(Level::Warn, format_args!("removing corrupted link '{}'", shown(&path)));
            let text = "There may be more corrupted paths.\nYou should run `nix-store --verify --check-contents \
                        --repair` to fix them all";
            self.reporter.message(Level::Warn, format_args!("{text}"));
            match rustix::fs::unlinkat(&self.links, link, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => return Ok(Done::No),
                Err(e) => return Err(FileError::new("deleting", link_path(), e)),
            }
        }
        self.replace(place, full, status, link)
    }

    /// Does an entry of `.links` have the contents that its name says?
    fn is_sound(&self, link: &CString, found: &Status) -> Result<bool, FileError> {
        let inode = found.id.inode;
        if self.hashed.lock().unwrap_or_else(PoisonError::into_inner).contains(&inode) {
            return Ok(true);
        }
        let path = self.links_path.join(OsStr::from_bytes(link.as_bytes()));
        let entry = match Opened::open(self.links.as_fd(), link, &path) {
            // Gone: the next attempt makes it.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(true),
            opened => opened?,
        };
        let sound = entry.hash(&path)?.to_base32().as_bytes() == link.as_bytes();
        if sound && entry.status.id == found.id && entry.is_unchanged(&path)? {
            self.learn(inode);
        }
        Ok(sound)
    }

    /// Puts a link to the known file in the place of this one.
    fn replace(&self, place: &Place<'_>, full: &Path, status: &Status, link: &CString) -> Result<Done, FileError> {
        const DOING: &str = "linking";
        if let Some(folder) = place.folder {
            folder.open_up().at("changing permissions of", &folder.path)?;
        }
        let link_path = || self.links_path.join(OsStr::from_bytes(link.as_bytes()));
        let thread = rayon::current_thread_index().map_or(0, |index| index + 1);
        let temporary = format!("{}-{thread}", self.temporary);
        let drop_temporary = || {
            let _ = rustix::fs::unlinkat(self.store, temporary.as_str(), AtFlags::empty());
        };
        match rustix::fs::linkat(&self.links, link, self.store, temporary.as_str(), AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Ok(Done::No),
            // Ours, from a rename that found nothing to do (see below).
            Err(Errno::EXIST) => {
                drop_temporary();
                return Ok(Done::No);
            }
            Err(Errno::MLINK) => return Ok(self.has_all_links(&link_path(), status)),
            Err(e @ Errno::NOSPC) => {
                self.cannot_link(full, &link_path(), e);
                return Ok(Done::Yes);
            }
            Err(e) => return Err(FileError::new(DOING, self.store_path.join(temporary), e)),
        }
        // Is it still what was hashed?
        match Status::at(place.dir, place.name) {
            Ok(now) if now.id == status.id && same(&now, status) => {}
            Ok(now) if now.id == status.id => {
                drop_temporary();
                return Ok(self.changes(full));
            }
            _ => {
                drop_temporary();
                return Ok(Done::Yes);
            }
        }
        let renamed = retry(|| rustix::fs::renameat(self.store, temporary.as_str(), place.dir, place.name));
        match renamed {
            Ok(()) => {
                // Had another process linked it just before, both names would still be there; the
                // next file of this thread, or the end, takes the second one away.
                self.files.fetch_add(1, Ordering::Relaxed);
                self.bytes.fetch_add(status.size, Ordering::Relaxed);
                self.blocks.fetch_add(status.blocks, Ordering::Relaxed);
                let to = link_path();
                self.reporter.message(Level::Talkative, format_args!("linking '{}' to '{}'", shown(full), shown(&to)));
                Ok(Done::Yes)
            }
            // A collector has taken it for garbage; or another process has closed the directory.
            Err(Errno::NOENT) => Ok(Done::No),
            Err(Errno::ACCESS) => {
                drop_temporary();
                Ok(Done::No)
            }
            Err(e) => {
                drop_temporary();
                if e == Errno::MLINK {
                    Ok(self.has_all_links(&link_path(), status))
                } else {
                    Err(FileError::new(DOING, full, e))
                }
            }
        }
    }

    fn has_all_links(&self, link: &Path, status: &Status) -> Done {
        if status.size > 0 {
            self.reporter.message(Level::Info, format_args!("'{}' has maximum number of links", shown(link)));
        }
        Done::Yes
    }

    fn cannot_link(&self, full: &Path, link: &Path, e: Errno) {
        let e = std::io::Error::from(e);
        self.reporter.message(Level::Info, format_args!("cannot link '{}' to '{}': {e}", shown(link), shown(full)));
    }
}

/// Is there nothing more to do for this file?
enum Done {
    Yes,
    No,
}

/// Whatever may change in a file but for its number of links.
fn same(a: &Status, b: &Status) -> bool {
    (a.kind, a.size, a.mode, a.mtime_s, a.mtime_ns) == (b.kind, b.size, b.mode, b.mtime_s, b.mtime_ns)
}

/// A file or symlink, as it was when it was opened.
struct Opened {
    fd: OwnedFd,
    status: Status,
    /// Of a symlink.
    target: Option<CString>,
}

impl Opened {
    fn open(dir: BorrowedFd<'_>, name: &CString, full: &Path) -> Result<Self, FileError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let (fd, target) = match retry(|| rustix::fs::openat(dir, name, flags, Mode::empty())) {
            Err(Errno::LOOP) => {
                let fd = open_path(dir, name).at("opening file", full)?;
                let target = rustix::fs::readlinkat(&fd, c"", Vec::new()).at("reading symlink", full)?;
                (fd, Some(target))
            }
            fd => (fd.at("opening file", full)?, None),
        };
        let status = Status::of(fd.as_fd()).at("getting status of", full)?;
        if target.is_none() && status.kind != FileType::RegularFile {
            return Err(FileError::new("reading from file", full, Errno::INVAL));
        }
        Ok(Self { fd, status, target })
    }

    /// Is it as it was when it was opened?
    fn is_unchanged(&self, full: &Path) -> Result<bool, FileError> {
        Ok(same(&Status::of(self.fd.as_fd()).at("getting status of", full)?, &self.status))
    }

    /// The hash of its NAR.
    fn hash(&self, full: &Path) -> Result<Sha256Digest, FileError> {
        const DOING: &str = "reading from file";
        let mut hasher = NarHasher::new();
        let mut encoder = Encoder::new();
        let mut framing = Vec::new();
        if let Some(target) = &self.target {
            encoder.push(Event::Symlink { target: target.as_bytes() }, &mut framing);
            hasher.update(&framing);
            return Ok(hasher.finish().0);
        }
        let mut left = self.status.size;
        encoder.push(Event::File { executable: self.status.mode & 0o100 != 0, size_bytes: left }, &mut framing);
        hasher.update(&framing);
        let mut block = vec![0; usize::try_from(left).unwrap_or(usize::MAX).clamp(1, crate::pipe::BLOCK_BYTES)];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(block.len());
            let n = retry(|| rustix::io::read(&self.fd, block.get_mut(..most).unwrap_or_default())).at(DOING, full)?;
            if n == 0 {
                return Err(FileError::new(DOING, full, std::io::Error::from(std::io::ErrorKind::UnexpectedEof)));
            }
            framing.clear();
            encoder.push(Event::Contents(block.get(..n).unwrap_or_default()), &mut framing);
            hasher.update(&framing);
            left -= n as u64;
        }
        framing.clear();
        encoder.push(Event::EndFile, &mut framing);
        hasher.update(&framing);
        Ok(hasher.finish().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::open;
    use larder_core::report::Silent;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    fn put(path: &Path, contents: &[u8], mode: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o644));
        fs::write(path, contents).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn optimise(store: &Path, names: &[&str], preload: Preload) -> (Saved, u64) {
        let fd = open(store);
        let optimiser = Optimiser::new(fd.as_fd(), store, preload, &Silent).unwrap();
        let failed = names.iter().map(|name| optimiser.entry(OsStr::new(name)).unwrap()).sum();
        (optimiser.saved(), failed)
    }

    fn inode(path: PathBuf) -> u64 {
        fs::symlink_metadata(path).unwrap().ino()
    }

    fn links(store: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(store.join(".links"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn s093_equal_files_become_one() {
        let dir = tempfile::tempdir().unwrap();
        let s = dir.path();
        put(&s.join("a/x/file"), b"contents", 0o444);
        put(&s.join("a/y/exec"), b"contents", 0o555);
        put(&s.join("a/empty"), b"", 0o444);
        put(&s.join("b"), b"contents", 0o444);
        put(&s.join("c/file"), b"contents", 0o444);
        put(&s.join("c/writable"), b"contents", 0o644);
        symlink("there", s.join("a/link")).unwrap();
        symlink("there", s.join("c/link")).unwrap();
        for folder in ["a/x", "a/y", "a", "c"] {
            fs::set_permissions(s.join(folder), fs::Permissions::from_mode(0o555)).unwrap();
        }
        let (saved, failed) = optimise(s, &["a", "b", "c", "missing"], Preload::Yes);
        assert_eq!((saved.files, saved.bytes, failed), (3, 8 + 8 + 5, 0));
        assert_eq!(inode(s.join("a/x/file")), inode(s.join("b")));
        assert_eq!(inode(s.join("b")), inode(s.join("c/file")));
        assert_eq!(inode(s.join("a/link")), inode(s.join("c/link")));
        assert_ne!(inode(s.join("b")), inode(s.join("a/y/exec")));
        assert_ne!(inode(s.join("b")), inode(s.join("c/writable")));
        for name in links(s) {
            let entry = Opened::open(open(&s.join(".links")).as_fd(), &CString::new(name.clone()).unwrap(), s);
            assert_eq!(entry.unwrap().hash(s).unwrap().to_base32(), name);
        }
        assert_eq!(links(s).len(), 4);
        let folder = fs::metadata(s.join("c")).unwrap();
        assert_eq!((folder.mode() & 0o7777, folder.mtime()), (0o555, 1), "as it was");
        assert!(fs::read_dir(s).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().starts_with(".tmp")));
        // A second time there is nothing to do.
        assert_eq!(optimise(s, &["a", "b", "c"], Preload::Yes), (Saved::default(), 0));
    }

    #[test]
    fn s021_lost_links_are_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let s = dir.path();
        put(&s.join("a"), b"one", 0o444);
        put(&s.join("b"), b"one", 0o444);
        put(&s.join("c"), b"two", 0o444);
        optimise(s, &["a", "b", "c"], Preload::Yes);
        let before = links(s);
        fs::remove_dir_all(s.join(".links")).unwrap();
        assert_eq!(optimise(s, &["a", "b", "c"], Preload::Yes), (Saved::default(), 0));
        assert_eq!(links(s), before);
    }

    #[test]
    fn s022_other_peoples_links_do_not_hide_files() {
        let dir = tempfile::tempdir().unwrap();
        let s = dir.path().join("store");
        put(&s.join("a"), b"one", 0o444);
        put(&s.join("b"), b"one", 0o444);
        fs::hard_link(s.join("a"), dir.path().join("outside")).unwrap();
        assert_eq!(optimise(&s, &["a", "b"], Preload::Yes).0.files, 1);
        assert_eq!(inode(s.join("a")), inode(s.join("b")));
    }

    #[test]
    fn damaged_links_are_not_spread() {
        for damage in [&b"onX"[..], b"longer"] {
            let dir = tempfile::tempdir().unwrap();
            let s = dir.path();
            put(&s.join("a"), b"one", 0o444);
            optimise(s, &["a"], Preload::Yes);
            // The file and its link are damaged together, as they are one.
            put(&s.join(".links").join(&links(s)[0]), damage, 0o444);
            put(&s.join("b"), b"one", 0o444);
            put(&s.join("c"), b"one", 0o444);
            let (saved, failed) = optimise(s, &["b", "c"], Preload::Yes);
            assert_eq!((saved.files, failed), (1, 0));
            assert_eq!(fs::read(s.join("b")).unwrap(), b"one");
            assert_eq!(inode(s.join("b")), inode(s.join("c")));
            assert_eq!(fs::read(s.join("a")).unwrap(), damage);
        }
    }

    /// However many threads there are, of N equal files N - 1 are replaced; readers never see one
    /// missing.
    #[test]
    fn s093_atomic_and_the_same_for_all_threads() {
        let dir = tempfile::tempdir().unwrap();
        let s = dir.path();
        for n in 0..120 {
            put(&s.join(format!("p{}/f{n}", n % 3)), format!("text {}", n % 7).as_bytes(), 0o444);
        }
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for n in (0..120).step_by(13) {
                        let text = fs::read_to_string(s.join(format!("p{}/f{n}", n % 3))).unwrap();
                        assert_eq!(text, format!("text {}", n % 7));
                    }
                }
            });
            let other = scope.spawn(|| optimise(s, &["p2", "p1", "p0"], Preload::Yes));
            let (ours, failed) = optimise(s, &["p0", "p1", "p2"], Preload::Yes);
            let (theirs, failed_there) = other.join().unwrap();
            stop.store(true, Ordering::Relaxed);
            assert_eq!((failed, failed_there), (0, 0));
            assert!(ours.files + theirs.files >= 120 - 7);
        });
        assert_eq!(links(s).len(), 7);
        for n in 0..120 {
            assert_eq!(inode(s.join(format!("p{}/f{n}", n % 3))), inode(s.join(format!("p{}/f{}", n % 7 % 3, n % 7))));
        }
    }
}
