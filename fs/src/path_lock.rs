//! Locks on store paths, held while they are made.
//!
//! `<path>.lock` beside each path, as Nix does it: `flock` exclusive, in ascending order of the
//! bytes, all or nothing. Source: formats, section 10.2.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use crate::file_error::FileError;
use crate::lock_file::{LockFile, Sharing, Wait};

/// Paths that our parent process has locked for us (`NIX_HELD_LOCKS`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HeldLocks(BTreeSet<PathBuf>);

impl HeldLocks {
    /// Reads the value of the variable: paths, without `.lock`, between blanks.
    pub fn parse(value: &[u8]) -> Self {
        let words = value.split(|b| matches!(b, b' ' | b'\t' | b'\n' | b'\r')).filter(|w| !w.is_empty());
        Self(words.map(|w| PathBuf::from(OsString::from_vec(w.to_vec()))).collect())
    }

    pub fn contains(&self, path: &Path) -> bool {
        self.0.contains(path)
    }
}

impl FromIterator<PathBuf> for HeldLocks {
    fn from_iter<I: IntoIterator<Item = PathBuf>>(paths: I) -> Self {
        Self(paths.into_iter().collect())
    }
}

/// What becomes of the lock files when the locks are released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRelease {
    /// Leave the empty files: the next taker finds them, the collector removes them.
    Keep,
    /// Delete them: the paths are valid now, so nobody needs the locks any more.
    Delete,
}

/// The locks of some paths, released on drop.
#[derive(Debug)]
#[must_use = "the locks are released when this is dropped"]
pub struct PathLocks {
    files: Vec<LockFile>,
    on_release: OnRelease,
}

impl PathLocks {
    /// Locks all `paths` (real paths, without `.lock`), but those that are `held` already.
    ///
    /// `None` if one of them is taken and `wait` says not to wait; nothing is locked then.
    /// To wait for several sets at once deadlocks, so a process takes one set at a time or does
    /// not wait. The locks start as [`OnRelease::Keep`].
    ///
    /// Errors: the lock file cannot be opened, created or locked.
    pub fn acquire<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        held: &HeldLocks,
        mut wait: Wait<'_>,
    ) -> Result<Option<Self>, FileError> {
        // Sorted as bytes: `Path` would compare by components.
        let sorted: BTreeSet<OsString> = paths
            .into_iter()
            .filter(|path| !held.contains(path.as_ref()))
            .map(|path| path.as_ref().as_os_str().to_owned())
            .collect();
        let mut locks = Self { files: Vec::with_capacity(sorted.len()), on_release: OnRelease::Keep };
        for path in sorted {
            match lock_one(&lock_path(Path::new(&path)), Path::new(&path), &mut wait)? {
                Some(file) => locks.files.push(file),
                None => return Ok(None),
            }
        }
        Ok(Some(locks))
    }

    /// Says what becomes of the files.
    pub fn on_release(&mut self, what: OnRelease) {
        self.on_release = what;
    }

    /// Releases the locks, and tells if a lock file could not be deleted (dropping does not).
    ///
    /// All are released in any case; the first error is returned.
    pub fn release(mut self) -> Result<(), FileError> {
        self.finish()
    }

    fn finish(&mut self) -> Result<(), FileError> {
        let mut first = Ok(());
        for file in self.files.drain(..) {
            if self.on_release == OnRelease::Delete {
                let deleted = file.delete();
                first = first.and(deleted);
            }
        }
        first
    }
}

impl Drop for PathLocks {
    fn drop(&mut self) {
        // A file that stays is harmless, and the lock itself ends with the descriptor.
        let _ = self.finish();
    }
}

/// `<path>.lock`.
pub fn lock_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().as_bytes().to_vec();
    name.extend_from_slice(b".lock");
    PathBuf::from(OsString::from_vec(name))
}

/// Opens and locks until the file that is locked is the one that has the name.
fn lock_one(lock: &Path, path: &Path, wait: &mut Wait<'_>) -> Result<Option<LockFile>, FileError> {
    loop {
        let file = LockFile::open(lock)?;
        let locked = match wait {
            Wait::No => file.lock(Sharing::Exclusive, &mut Wait::No)?,
            // The user is told the store path, not the name of the lock file.
            Wait::Yes(waiting) => file.lock(Sharing::Exclusive, &mut Wait::Yes(&mut |_| waiting(path)))?,
        };
        if !locked {
            return Ok(None);
        }
        if !file.is_stale()? {
            return Ok(Some(file));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RealNix, child, child_argument, eventually, layout, memory_dir};
    use proptest::prelude::*;
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::{Duration, Instant};

    fn paths(dir: &Path, names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(|n| dir.join(n)).collect()
    }

    fn try_lock(dir: &Path, names: &[&str]) -> Option<PathLocks> {
        PathLocks::acquire(paths(dir, names), &HeldLocks::default(), Wait::No).unwrap()
    }

    #[test]
    fn all_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let held = try_lock(dir.path(), &["b"]).unwrap();
        assert!(try_lock(dir.path(), &["c", "b", "a"]).is_none());
        let others = try_lock(dir.path(), &["c", "a", "c"]).unwrap();
        assert!(try_lock(dir.path(), &["a"]).is_none());
        drop((held, others));
        let all = try_lock(dir.path(), &["c", "b", "a"]).unwrap();
        assert_eq!(
            all.files.iter().map(LockFile::path).collect::<Vec<_>>(),
            paths(dir.path(), &["a.lock", "b.lock", "c.lock"])
        );
        for path in paths(dir.path(), &["a.lock", "b.lock", "c.lock"]) {
            let status = fs::metadata(path).unwrap();
            assert_eq!((status.len(), status.permissions().mode() & 0o7777), (0, 0o600));
        }
    }

    #[test]
    fn deletes_only_when_told() {
        let dir = tempfile::tempdir().unwrap();
        try_lock(dir.path(), &["a"]).unwrap().release().unwrap();
        assert!(dir.path().join("a.lock").exists());
        let mut locks = try_lock(dir.path(), &["a"]).unwrap();
        let seen = fs::File::open(dir.path().join("a.lock")).unwrap();
        locks.on_release(OnRelease::Delete);
        drop(locks);
        assert!(!dir.path().join("a.lock").exists());
        assert_eq!(seen.metadata().unwrap().len(), 1, "those who have it open see that it is stale");
        // A lock file that went already is fine.
        let mut locks = try_lock(dir.path(), &["a"]).unwrap();
        fs::remove_file(dir.path().join("a.lock")).unwrap();
        locks.on_release(OnRelease::Delete);
        locks.release().unwrap();
    }

    #[test]
    fn held_locks_are_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let _parent = try_lock(dir.path(), &["a"]).unwrap();
        let text = format!(" {}  /other/path\n", dir.path().join("a").display());
        let held = HeldLocks::parse(text.as_bytes());
        assert!(held.contains(Path::new("/other/path")) && !held.contains(Path::new("")));
        let locks = PathLocks::acquire(paths(dir.path(), &["a", "b"]), &held, Wait::No).unwrap().unwrap();
        assert_eq!(locks.files.len(), 1);
        assert_eq!(HeldLocks::parse(b""), HeldLocks::default());
    }

    /// A build user may put things beside the paths.
    #[test]
    fn refuses_strange_lock_files() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("victim"), b"precious").unwrap();
        std::os::unix::fs::symlink("victim", dir.path().join("a.lock")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("b.lock"), rustix::fs::Mode::RWXU).unwrap();
        fs::create_dir(dir.path().join("c.lock")).unwrap();
        for name in ["a", "b", "c"] {
            let e = PathLocks::acquire(paths(dir.path(), &[name]), &HeldLocks::default(), Wait::No).unwrap_err();
            assert!(e.to_string().starts_with("opening lock file"), "{e}");
        }
        assert_eq!(fs::read(dir.path().join("victim")).unwrap(), b"precious");
    }

    #[test]
    fn waiting_is_told_once_with_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let held = try_lock(dir.path(), &["a"]).unwrap();
        let mut told = Vec::new();
        std::thread::scope(|scope| {
            let (sender, receiver) = std::sync::mpsc::channel();
            scope.spawn(move || {
                receiver.recv().unwrap();
                std::thread::sleep(Duration::from_millis(20));
                let mut held = held;
                // The waiter wakes with a stale file, and goes on to a new one.
                held.on_release(OnRelease::Delete);
            });
            let mut waiting = |path: &Path| {
                told.push(path.to_owned());
                sender.send(()).unwrap();
            };
            let wait = Wait::Yes(&mut waiting);
            let locks = PathLocks::acquire(paths(dir.path(), &["a", "b"]), &HeldLocks::default(), wait);
            let locks = locks.unwrap().unwrap();
            assert_eq!(locks.files.len(), 2);
            assert!(try_lock(dir.path(), &["a"]).is_none(), "what is locked is the file that others find");
        });
        assert_eq!(told, paths(dir.path(), &["a"]));
    }

    /// One of those who want the lock, and the step it is at.
    enum Actor {
        Out,
        Opened(LockFile),
        Locked(LockFile),
        Inside(LockFile),
        /// Has unlinked, but not written yet.
        Leaving(LockFile),
    }

    proptest! {
        /// In every order of steps of several takers at most one is inside. `flock` belongs to the
        /// open file, so that actors in one thread are as good as processes.
        #[test]
        fn at_most_one_inside(steps in prop::collection::vec((0usize..4, 0u8..4), 1..300)) {
            let dir = memory_dir();
            let path = dir.path().join("x.lock");
            let mut actors: Vec<Actor> = (0..4).map(|_| Actor::Out).collect();
            for (who, how) in steps {
                let actor = std::mem::replace(&mut actors[who], Actor::Out);
                actors[who] = match (actor, how) {
                    // Killed, or leaves without deleting.
                    (_, 0) => Actor::Out,
                    (Actor::Out, _) => Actor::Opened(LockFile::open(&path).unwrap()),
                    (Actor::Opened(file), _) => {
                        if file.lock(Sharing::Exclusive, &mut Wait::No).unwrap() { Actor::Locked(file) } else { Actor::Opened(file) }
                    }
                    (Actor::Locked(file), _) => {
                        if file.is_stale().unwrap() { Actor::Out } else { Actor::Inside(file) }
                    }
                    (Actor::Inside(file), _) => {
                        fs::remove_file(&path).unwrap();
                        Actor::Leaving(file)
                    }
                    (Actor::Leaving(file), _) => {
                        file.mark_stale().unwrap();
                        Actor::Out
                    }
                };
                let inside = actors.iter().filter(|a| matches!(a, Actor::Inside(_))).count();
                prop_assert!(inside <= 1);
            }
        }
    }

    /// Many processes, some of which are killed: never two inside, and nobody waits for ever.
    #[test]
    fn processes_exclude_each_other() {
        const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
        if let Some(argument) = child_argument() {
            let (dir, seed) = argument.rsplit_once(' ').unwrap();
            let (dir, mut random) = (Path::new(dir), seed.parse::<u64>().unwrap() * 2 + 1);
            // Opened before the locks, since a dying process closes its files in this order.
            let witnesses: Vec<LockFile> =
                NAMES.iter().map(|n| LockFile::open(&dir.join(n).join("witness")).unwrap()).collect();
            for _ in 0..300 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let chosen: Vec<usize> = (0..NAMES.len()).filter(|n| random >> (40 + n) & 1 == 1).collect();
                let wanted = chosen.iter().map(|n| dir.join(NAMES[*n]));
                let wait = Wait::Yes(&mut |_| ());
                let mut locks = PathLocks::acquire(wanted, &HeldLocks::default(), wait).unwrap().unwrap();
                for n in &chosen {
                    // Of a killed process the lock may be gone a moment before the witness.
                    let free = (0..50).any(|_| {
                        let free = witnesses[*n].lock(Sharing::Exclusive, &mut Wait::No).unwrap();
                        free || {
                            std::thread::sleep(Duration::from_millis(2));
                            false
                        }
                    });
                    assert!(free, "two inside");
                }
                std::thread::sleep(Duration::from_micros(random >> 52));
                for n in &chosen {
                    witnesses[*n].unlock().unwrap();
                }
                if random >> 50 & 1 == 1 {
                    locks.on_release(OnRelease::Delete);
                }
                locks.release().unwrap();
            }
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in NAMES {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let start = |seed: usize| {
            let argument = format!("{} {seed}", dir.path().display());
            child("path_lock::tests::processes_exclude_each_other", &argument, "")
        };
        let mut lasting: Vec<_> = (0..6).map(start).collect();
        for seed in 6..14 {
            let mut victim = start(seed);
            std::thread::sleep(Duration::from_millis(30 + seed as u64 * 3));
            victim.kill().unwrap();
            victim.wait().unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(100);
        for process in &mut lasting {
            while process.try_wait().unwrap().is_none() {
                assert!(Instant::now() < deadline, "somebody waits for ever");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        for process in lasting {
            crate::testing::finish(process);
        }
    }

    /// A real Nix waits for our lock, and we for its.
    #[test]
    fn interop_real_nix_waits() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let Some(nix) = RealNix::find("interop_real_nix_waits", &layout) else { return };
        let path = nix.add("file", "text");
        nix.run(&["--delete", &layout.store_dir.full(&path)]);
        let mut locks =
            PathLocks::acquire([layout.real_path(&path)], &HeldLocks::default(), Wait::No).unwrap().unwrap();
        let mut add = nix.command(&["--add", dir.path().join("file").to_str().unwrap()]).spawn().unwrap();
        // It has its temporary root before it waits for the lock.
        eventually("the temporary root of a real Nix is read", || {
            let found =
                crate::temp_roots::read_all(&layout, crate::temp_roots::Stale::Delete, &larder_core::report::Silent);
            found.unwrap().roots.iter().any(|root| root.path == path && root.pid == add.id())
        });
        std::thread::sleep(Duration::from_millis(200));
        assert!(add.try_wait().unwrap().is_none(), "it waits");
        locks.on_release(OnRelease::Delete);
        locks.release().unwrap();
        let output = add.wait_with_output().unwrap();
        std::io::stdout().write_all(&output.stderr).unwrap();
        assert!(output.status.success());
        assert!(layout.real_path(&path).exists());
        assert!(!lock_path(&layout.real_path(&path)).exists());
    }
}
