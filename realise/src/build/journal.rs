//! What builds have lying about, written down before it is there, so that what a crash leaves can
//! be cleaned up at the next start: by the book, not by guess.
//!
//! Each running build has a file `$V/larder/builds/<pid>-<n>`, locked while it runs. A file that
//! nobody has locked belongs to a build that died. Records are `KIND TEXT NUL`:
//! - `making PATH`: a build directory, or an output on its way into the store, is about to be made
//!   under a name that nobody else uses;
//! - `made DEVICE:INODE PATH`: it gets this name, and is deleted if it still is that;
//! - `user UID`: processes of this build user are ours, unless someone else has taken its lock;
//! - `entry DEVICE:INODE NAME`: an entry of the store directory (a sandbox's root), as above.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use larder_core::report::Level;
use larder_fs::file_error::{At as _, FileError};
use larder_fs::layout::{Layout, make_dirs};
use larder_fs::lock_file::{LockFile, Sharing, Wait};
use larder_fs::remove::{self, OnFailure};
use larder_store::LocalStore;

use super::tempdir::Notes;

/// The longest journal that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// The journal of a build that runs; dropped, it goes away, since so has the rest.
#[derive(Debug)]
pub struct Journal {
    file: LockFile,
}

fn directory(layout: &Layout) -> PathBuf {
    layout.state.join("larder").join("builds")
}

impl Journal {
    pub fn begin(layout: &Layout) -> Result<Self, FileError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let dir = directory(layout);
        make_dirs(&dir)?;
        loop {
            let name = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let file = LockFile::open(&dir.join(name))?;
            // Another may be at cleaning up, or an older process with this number has left it.
            if file.lock(Sharing::Exclusive, &mut Wait::No)? && !file.is_stale()? {
                return Ok(Self { file });
            }
        }
    }

    fn write(&self, kind: &str, text: &[u8]) -> Result<(), FileError> {
        let record = [kind.as_bytes(), b" ", text, b"\0"].concat();
        let mut rest = record.as_slice();
        while !rest.is_empty() {
            let n = rustix::io::write(&self.file, rest).at("writing to journal", self.file.path())?;
            rest = rest.get(n..).unwrap_or_default();
        }
        Ok(())
    }

    /// Processes of this user may be left.
    pub fn user(&self, uid: u32) -> Result<(), FileError> {
        self.write("user", uid.to_string().as_bytes())
    }

    /// This entry of the store directory has been made.
    pub fn entry(&self, store: &Path, name: &OsStr) -> Result<(), FileError> {
        let path = store.join(name);
        let meta = std::fs::symlink_metadata(&path).at("getting status of", &path)?;
        self.identified("entry", (meta.dev(), meta.ino()), name)
    }

    fn identified(&self, kind: &str, (device, inode): Identity, name: &OsStr) -> Result<(), FileError> {
        self.write(kind, &[format!("{device}:{inode} ").as_bytes(), name.as_bytes()].concat())
    }
}

impl Notes for Journal {
    fn making(&self, path: &Path) -> Result<(), FileError> {
        self.write("making", path.as_os_str().as_bytes())
    }

    fn naming(&self, dir: BorrowedFd<'_>, path: &Path) -> Result<(), FileError> {
        let status = rustix::fs::fstat(dir).at("getting status of", path)?;
        self.identified("made", (status.st_dev, status.st_ino), path.as_os_str())
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // A file that stays is cleaned up at the next start.
        let _ = self.file.delete();
    }
}

/// What a journal says.
#[derive(Debug, PartialEq, Eq)]
enum Record {
    Making(PathBuf),
    Made(Identity, PathBuf),
    User(u32),
    Entry(Identity, OsString),
}

/// Device and inode.
type Identity = (u64, u64);

/// Reads the records; one that the crash has cut off is left out.
fn parse(text: &[u8]) -> Vec<Record> {
    let whole = text.split_inclusive(|b| *b == 0).filter_map(|record| record.strip_suffix(b"\0"));
    whole
        .filter_map(|record| {
            let at = record.iter().position(|b| *b == b' ')?;
            let (kind, rest) = (record.get(..at)?, record.get(at + 1..)?);
            let number = |text: &[u8]| std::str::from_utf8(text).ok()?.parse::<u64>().ok();
            match kind {
                b"making" => Some(Record::Making(OsString::from_vec(rest.to_vec()).into())),
                b"user" => Some(Record::User(u32::try_from(number(rest)?).ok()?)),
                b"made" | b"entry" => {
                    let blank = rest.iter().position(|b| *b == b' ')?;
                    let colon = rest.iter().position(|b| *b == b':')?;
                    let identity = (number(rest.get(..colon)?)?, number(rest.get(colon + 1..blank)?)?);
                    let name = OsString::from_vec(rest.get(blank + 1..)?.to_vec());
                    Some(if kind == b"made" {
                        Record::Made(identity, name.into())
                    } else {
                        Record::Entry(identity, name)
                    })
                }
                _ => None,
            }
        })
        .collect()
}

/// Cleans up after builds that died. `kill` ends all processes of a build user.
///
/// What cannot be cleaned up is told, and tried again at the next start.
pub fn clean_up(store: &LocalStore, kill: &dyn Fn(u32) -> io::Result<()>) {
    let dir = directory(store.layout());
    let Ok(entries) = std::fs::read_dir(&dir) else { return };
    for entry in entries.flatten() {
        if let Err(error) = clean_one(store, &entry.path(), kill) {
            let text = crate::job::Failure::from(error).text;
            let reporter = store.reporter();
            reporter.message(Level::Warn, format_args!("cannot clean up after a build that died: {text}"));
        }
    }
}

fn clean_one(store: &LocalStore, path: &Path, kill: &dyn Fn(u32) -> io::Result<()>) -> Result<(), FileError> {
    let Some(file) = LockFile::open_existing(path)? else { return Ok(()) };
    // It has contents, which is what marks locks of paths as stale, but not this.
    if !file.lock(Sharing::Exclusive, &mut Wait::No)? || !file.has_name()? {
        return Ok(());
    }
    let mut text = Vec::new();
    let opened = std::fs::File::open(path).at("opening journal", path)?;
    opened.take(MAX_BYTES).read_to_end(&mut text).at("reading journal", path)?;
    let records = parse(&text);
    // Nothing is deleted under the hands of those who may still write to it.
    for record in &records {
        if let Record::User(uid) = record
            && let Some(_ours) = super::users::lock(store.layout(), *uid)?
        {
            kill(*uid).at("killing the processes of a dead build, recorded in", path)?;
        }
    }
    for record in records {
        match record {
            Record::Making(path) => {
                let ours = rustix::process::geteuid().as_raw();
                if std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.uid() == ours) {
                    remove::remove_path(&path, OnFailure::Stop).map_err(FileError::from)?;
                }
            }
            Record::Made(identity, path) => remove_if(&path, identity)?,
            Record::Entry(identity, name) => remove_if(&store.layout().real_store.join(name), identity)?,
            Record::User(_) => {}
        }
    }
    // Opened for reading only, so it cannot be marked; a file without a name is stale all the same.
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(FileError::new("deleting journal", path, e)),
        _ => Ok(()),
    }
}

/// Deletes what a path names, if it still is that.
fn remove_if(path: &Path, identity: Identity) -> Result<(), FileError> {
    let found = std::fs::symlink_metadata(path);
    if found.is_ok_and(|meta| (meta.dev(), meta.ino()) == identity) {
        remove::remove_path(path, OnFailure::Stop).map_err(FileError::from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::report::Silent;
    use larder_core::store_dir::StoreDir;
    use larder_fs::layout::Access;
    use larder_store::Options;
    use std::cell::RefCell;
    use std::os::fd::AsFd as _;
    use std::sync::Arc;

    #[test]
    fn records_read_back_and_cut_ones_do_not() {
        let text = b"making /tmp/a b\0user 40001\0made 1:2 /t\0entry 12:34 0c-x y.chroot\0zork 1\0making /tmp/cut";
        let expected = [
            Record::Making("/tmp/a b".into()),
            Record::User(40001),
            Record::Made((1, 2), "/t".into()),
            Record::Entry((12, 34), "0c-x y.chroot".into()),
        ];
        assert_eq!(parse(text), expected);
        for end in 0..text.len() {
            assert!(expected.starts_with(&parse(&text[..end])), "cut at {end}");
        }
    }

    #[test]
    fn the_dead_are_cleaned_up_and_the_living_are_not() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), root.path());
        let store = LocalStore::open(layout, Options::default(), Access::ReadWrite, Arc::new(Silent)).unwrap();
        let real = store.layout().real_store.clone();
        let make = |name: &str| {
            let journal = Journal::begin(store.layout()).unwrap();
            let temp = root.path().join(format!("nix-build-{name}-0"));
            std::fs::create_dir_all(temp.join("build/x")).unwrap();
            journal.naming(std::fs::File::open(&temp).unwrap().as_fd(), &temp).unwrap();
            let unnamed = root.path().join(format!(".unnamed-{name}"));
            journal.making(&unnamed).unwrap();
            std::fs::create_dir(&unnamed).unwrap();
            std::fs::create_dir(real.join(name)).unwrap();
            journal.entry(&real, OsStr::new(name)).unwrap();
            journal.user(40001).unwrap();
            (journal, temp)
        };
        let (living, living_temp) = make("living.chroot");
        let (dead, dead_temp) = make("dead.chroot");
        let (moved, _) = make("moved.chroot");
        // Another has the name by now.
        std::fs::rename(real.join("moved.chroot"), real.join("elsewhere")).unwrap();
        std::fs::create_dir(real.join("moved.chroot")).unwrap();
        // Die as a killed process does: the lock goes, the file stays.
        for journal in [dead, moved] {
            journal.file.unlock().unwrap();
            std::mem::forget(journal);
        }
        let killed = RefCell::new(Vec::new());
        clean_up(&store, &|uid| {
            killed.borrow_mut().push(uid);
            Ok(())
        });
        assert_eq!(*killed.borrow(), [40001, 40001]);
        assert!(living_temp.exists() && real.join("living.chroot").exists());
        assert!(!dead_temp.exists() && !real.join("dead.chroot").exists());
        assert!(root.path().join(".unnamed-living.chroot").exists());
        assert!(!root.path().join(".unnamed-dead.chroot").exists());
        assert!(real.join("moved.chroot").exists());
        assert_eq!(std::fs::read_dir(directory(store.layout())).unwrap().count(), 1);
        drop(living);
        assert_eq!(std::fs::read_dir(directory(store.layout())).unwrap().count(), 0);
    }
}
