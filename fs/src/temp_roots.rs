//! Temporary roots: what a process protects from the collector while it lives.
//!
//! Shared with Nix 2.5 and later: one file `temproots/PID` per process, locked exclusively for
//! the life of the process, with full store paths that each end in NUL; and while a collector
//! runs, the socket `gc-socket/socket` to tell it about new ones. Source: formats, section 10.3;
//! gc, sections 5 and 6.
//!
//! Who adds a path takes the temporary root *first* and tests validity *then*: a path that was
//! valid before may be gone.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use larder_core::report::{Level, Reporter};
use larder_core::store_path::StorePath;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::file_error::{At as _, FileError, shown};
use crate::layout::{Layout, make_dirs};
use crate::lock_file::{LockFile, Sharing, Wait, retry};

/// How long to wait before asking again whether the collector has started to listen or has ended.
const RETRY: Duration = Duration::from_millis(100);

/// After this time without an answer the path is told again, on a new connection. An answer may
/// rightly take long: the collector deletes that very path first.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// Paths sent before their answers are read; few enough for any socket buffer.
const PATHS_AT_ONCE: usize = 64;

/// Paths that are remembered as protected; others are written down each time.
const MAX_KNOWN: usize = 1 << 14;

/// Larger than any process id Linux gives (`PID_MAX_LIMIT`): added to a name that is taken.
const BEYOND_PIDS: u32 = 1 << 22;

/// How many names are tried. Others read them as 32-bit signed numbers.
const MAX_NAMES: u32 = 500;

/// The temporary roots of this process in one store.
///
/// The file is made by the first root and deleted on drop. All threads share one value; it is
/// locked inside. A process that was forked (without exec) makes a file of its own on its next
/// root, and leaves its parent's alone.
#[derive(Debug)]
pub struct TempRoots {
    layout: Layout,
    answer_timeout: Duration,
    state: Mutex<Option<State>>,
}

#[derive(Debug)]
struct State {
    /// Who made it: not us after a fork.
    pid: u32,
    file: LockFile,
    gc_lock: LockFile,
    /// To the running collector, kept for the next root.
    connection: Option<UnixStream>,
    /// A collector was killed, perhaps: see [`TempRoots::collector_died`].
    died: bool,
    /// Some of what is protected already, which needs nothing any more: collectors that came since
    /// have read our file, and one that ran then was told.
    known: HashSet<StorePath>,
}

impl TempRoots {
    /// No file is made yet.
    pub const fn new(layout: Layout) -> Self {
        Self { layout, answer_timeout: ANSWER_TIMEOUT, state: Mutex::new(None) }
    }

    /// Protects a path, from now until this value is dropped. Adding twice is harmless.
    ///
    /// While a collector runs, this waits until it has heard of the path; if it is deleting the
    /// path just now, until that is over. Errors: the state directory is closed to us, or full.
    pub fn add(&self, path: &StorePath) -> Result<(), FileError> {
        self.add_all([path])
    }

    /// Protects many paths, all when it returns.
    pub fn add_all<'a>(&self, paths: impl IntoIterator<Item = &'a StorePath>) -> Result<(), FileError> {
        let mut paths = paths.into_iter().peekable();
        if paths.peek().is_none() {
            return Ok(());
        }
        // A panic in here leaves nothing half done that a later call would trip over.
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if guard.as_ref().is_none_or(|state| state.pid != std::process::id()) {
            *guard = Some(State::create(&self.layout)?);
        }
        let state = guard.as_mut().expect("made above");
        let (mut text, mut new) = (Vec::new(), Vec::new());
        for path in paths.filter(|path| !state.known.contains(path)) {
            text.extend_from_slice(self.layout.store_dir.full(path).as_bytes());
            text.push(0);
            if state.known.len() + new.len() < MAX_KNOWN {
                new.push(path.clone());
            }
        }
        if !text.is_empty() {
            state.add(&self.layout, &text, self.answer_timeout)?;
            state.known.extend(new);
        }
        Ok(())
    }

    /// Has a collector been killed before or while a root was added?
    ///
    /// Then the ledger may still call valid what that one was deleting: who relies on it has the ledger
    /// settled, and says so by [`TempRoots::settled`].
    pub fn collector_died(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|state| state.died)
    }

    /// Takes away the mark that a killed collector has left.
    pub fn settled(&self) -> Result<(), FileError> {
        let mut guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = guard.as_mut() else { return Ok(()) };
        state.died = false;
        // One that runs has a mark of its own.
        if state.gc_lock.lock(Sharing::Shared, &mut Wait::No)? {
            state.gc_lock.mark(false)?;
            state.gc_lock.unlock()?;
        }
        Ok(())
    }

    /// The name of our file, once there is one.
    pub fn file(&self) -> Option<PathBuf> {
        let guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        guard.as_ref().map(|state| state.file.path().to_owned())
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if self.pid == std::process::id() {
            // The collector takes it away if we cannot.
            let _ = rustix::fs::unlink(self.file.path());
        }
    }
}

impl State {
    fn create(layout: &Layout) -> Result<Self, FileError> {
        let gc_lock = LockFile::open(&layout.gc_lock())?;
        let dir = layout.temp_roots();
        make_dirs(&dir)?;
        let pid = std::process::id();
        // Our own number, unless somebody who lives has it: a process of another PID namespace
        // with the same state directory, or another value of this type in this process.
        let mut taken = None;
        for n in 0..MAX_NAMES {
            let path = dir.join((pid + n * BEYOND_PIDS).to_string());
            if let Some(file) = claim(&path)? {
                return Ok(Self { pid, file, gc_lock, connection: None, died: false, known: HashSet::new() });
            }
            taken = Some(path);
        }
        Err(FileError::new("creating temporary roots file", taken.unwrap_or(dir), Errno::BUSY))
    }

    /// `text` holds paths, each with a NUL behind it.
    fn add(&mut self, layout: &Layout, text: &[u8], timeout: Duration) -> Result<(), FileError> {
        // With the lock held there is no collector, and one that comes reads the file. Without it,
        // the file must have the paths *before* the collector answers: it may end right after, and
        // the next one reads the files.
        let mut appended = false;
        while !self.gc_lock.lock(Sharing::Shared, &mut Wait::No)? {
            if !appended {
                self.append(text)?;
                appended = true;
            }
            match self.tell(layout, text, timeout) {
                Ok(true) => return Ok(()),
                Ok(false) => std::thread::sleep(RETRY),
                Err(e) => {
                    self.connection = None;
                    let socket = layout.gc_socket();
                    match e.kind() {
                        // The collector has ended, or does not listen yet.
                        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => std::thread::sleep(RETRY),
                        io::ErrorKind::BrokenPipe
                        | io::ErrorKind::ConnectionReset
                        | io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::WouldBlock
                        | io::ErrorKind::TimedOut
                        | io::ErrorKind::Interrupted => {}
                        _ => return Err(FileError::new("telling a root to the collector at", socket, e)),
                    }
                }
            }
        }
        // The connection, if any, was to a collector that has ended.
        self.connection = None;
        self.died |= self.gc_lock.is_marked()?;
        let outcome = if appended { Ok(()) } else { self.append(text) };
        self.gc_lock.unlock()?;
        outcome
    }

    fn append(&self, text: &[u8]) -> Result<(), FileError> {
        const DOING: &str = "writing to temporary roots file";
        let end = rustix::fs::fstat(&self.file).at(DOING, self.file.path())?.st_size;
        let mut rest = text;
        let mut offset = end.cast_unsigned();
        while !rest.is_empty() {
            match retry(|| rustix::io::pwrite(&self.file, rest, offset)) {
                Ok(n) => {
                    rest = rest.get(n..).unwrap_or_default();
                    offset += n as u64;
                }
                Err(e) => {
                    // A piece of a path would run together with the next one.
                    let _ = rustix::fs::ftruncate(&self.file, end.cast_unsigned());
                    return Err(FileError::new(DOING, self.file.path(), e));
                }
            }
        }
        Ok(())
    }

    /// Tells the collector all paths; `false` if it answered nonsense.
    fn tell(&mut self, layout: &Layout, text: &[u8], timeout: Duration) -> io::Result<bool> {
        let stream = if let Some(stream) = self.connection.take() {
            self.connection.insert(stream)
        } else {
            let stream = connect(&layout.gc_socket())?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))?;
            self.connection.insert(stream)
        };
        let paths: Vec<&[u8]> = text.split_inclusive(|b| *b == 0).collect();
        for some in paths.chunks(PATHS_AT_ONCE) {
            let mut lines = some.concat();
            lines.iter_mut().filter(|b| **b == 0).for_each(|b| *b = b'\n');
            stream.write_all(&lines)?;
            let mut answers = vec![0; some.len()];
            stream.read_exact(&mut answers)?;
            if answers.iter().any(|a| *a != b'1') {
                self.connection = None;
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Connects to a socket whose path may be longer than an address (108 bytes) holds.
fn connect(path: &Path) -> io::Result<UnixStream> {
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => {}
        other => return other,
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::INVAL.into());
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    let mut short = PathBuf::from(crate::entry::proc_path(dir.as_fd()));
    short.push(name);
    UnixStream::connect(short)
}

/// Makes the file and locks it; `None` if a living process has it.
fn claim(path: &Path) -> Result<Option<LockFile>, FileError> {
    loop {
        if let Some(old) = open_old(path)? {
            if !old.lock(Sharing::Exclusive, &mut Wait::No)? {
                return Ok(None);
            }
            if !old.has_name()? {
                continue;
            }
            // Left by a dead process that had our number.
            old.delete()?;
        }
        // Not exclusively created: a collector may lock and delete it before we have the lock.
        let file = LockFile::open(path)?;
        if !lock_soon(&file)? {
            return Ok(None);
        }
        if !file.is_stale()? {
            return Ok(Some(file));
        }
    }
}

/// Locks a new file. Only a collector can be in the way, for a moment; or one who claims it too.
fn lock_soon(file: &LockFile) -> Result<bool, FileError> {
    for _ in 0..100 {
        if file.lock(Sharing::Exclusive, &mut Wait::No)? {
            return Ok(true);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(false)
}

fn open_old(path: &Path) -> Result<Option<LockFile>, FileError> {
    match rustix::fs::lstat(path) {
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(FileError::new("getting status of", path, e)),
        Ok(_) => LockFile::open(path).map(Some),
    }
}

/// What [`read_all`] does about files whose owners are dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stale {
    Ignore,
    /// Delete them, as Nix does even when it only lists roots.
    Delete,
}

/// A temporary root of some process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TempRoot {
    pub path: StorePath,
    /// The name of the file: a process id, but for the case described at [`TempRoots`].
    pub pid: u32,
}

/// What [`read_all`] found.
#[derive(Debug, Default)]
pub struct LiveTempRoots {
    pub roots: Vec<TempRoot>,
    /// Files that we may not read. They hide roots, so a run that deletes must not go on.
    pub unreadable: Vec<FileError>,
    /// Locks that keep owners of the style of Nix 1.8 from adding roots; hold them until it is
    /// decided what to delete.
    pub legacy_locks: Vec<LockFile>,
}

/// Reads the temporary roots of all living processes. A collector holds the collector's lock,
/// and listens on its socket already.
///
/// Names that are no numbers are not ours and are skipped. An unfinished path at the end of a
/// file, and text that is no store path, is no root. Errors: I/O errors but "permission denied"
/// on single files.
pub fn read_all(layout: &Layout, stale: Stale, reporter: &dyn Reporter) -> Result<LiveTempRoots, FileError> {
    let dir = layout.temp_roots();
    let mut found = LiveTempRoots::default();
    let entries = match std::fs::read_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
        other => other.at("reading directory", &dir)?,
    };
    for entry in entries {
        let name = entry.at("reading directory", &dir)?.file_name();
        let Some(pid) = parse_pid(&name) else { continue };
        match read_one(&dir.join(&name), pid, stale, layout, reporter, &mut found) {
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => found.unreadable.push(e),
            other => other?,
        }
    }
    Ok(found)
}

fn parse_pid(name: &OsStr) -> Option<u32> {
    let digits = name.to_str()?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
}

fn read_one(
    path: &Path,
    pid: u32,
    stale: Stale,
    layout: &Layout,
    reporter: &dyn Reporter,
    found: &mut LiveTempRoots,
) -> Result<(), FileError> {
    // Read-only is enough to lock it and to read it, but not to leave the byte in it.
    let Some(file) = (match stale {
        Stale::Delete => open_old(path)?,
        Stale::Ignore => LockFile::open_existing(path)?,
    }) else {
        return Ok(());
    };
    if file.lock(Sharing::Exclusive, &mut Wait::No)? {
        // Without a name it is somebody else's work already, and the name may be another file's.
        if stale == Stale::Delete && file.has_name()? {
            reporter.message(Level::Info, format_args!("removing stale temporary roots file '{}'", shown(path)));
            if let Err(e) = file.delete() {
                // It is none of the living, whether it can be deleted or not.
                reporter.message(Level::Debug, format_args!("{e}: {}", e.source));
            }
        }
        return Ok(());
    }
    let legacy = matches!(retry(|| rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)), Ok(()));
    let text = file.read().at("reading temporary roots file", path)?;
    let complete = text.iter().rposition(|b| *b == 0).map_or(&[][..], |end| text.get(..end).unwrap_or_default());
    for piece in complete.split(|b| *b == 0) {
        match layout.store_dir.parse(piece) {
            Ok(path) => found.roots.push(TempRoot { path, pid }),
            Err(e) => reporter
                .message(Level::Debug, format_args!("ignoring a line of temporary roots file '{}': {e}", shown(path))),
        }
    }
    if legacy {
        found.legacy_locks.push(file);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gc_lock::GcLock;
    use crate::testing::{
        RealNix, child, child_argument, eventually, give_away, layout, public_dir, root_or_skip, unprivileged,
    };
    use larder_core::report::Silent;
    use std::fs;
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    fn path(n: u32) -> StorePath {
        format!("{n:032}-name{n}").parse().unwrap()
    }

    fn prepared() -> (tempfile::TempDir, Layout) {
        let dir = public_dir();
        let layout = layout(dir.path());
        make_dirs(&layout.temp_roots()).unwrap();
        make_dirs(layout.gc_socket().parent().unwrap()).unwrap();
        (dir, layout)
    }

    fn live(layout: &Layout) -> Vec<TempRoot> {
        let mut found = read_all(layout, Stale::Delete, &Silent).unwrap();
        assert!(found.unreadable.is_empty());
        found.roots.sort();
        found.roots
    }

    #[test]
    fn written_as_nix_does() {
        let (_dir, layout) = prepared();
        let roots = TempRoots::new(layout.clone());
        assert_eq!(roots.file(), None);
        roots.add(&path(1)).unwrap();
        roots.add_all([&path(2), &path(1)]).unwrap();
        roots.add_all([]).unwrap();
        let pid = std::process::id();
        let file = layout.temp_roots().join(pid.to_string());
        assert_eq!(roots.file(), Some(file.clone()));
        // What is protected already is not written again.
        let text: String = [1, 2].map(|n| format!("{}\0", layout.store_dir.full(&path(n)))).concat();
        assert_eq!(fs::read(&file).unwrap(), text.as_bytes());
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(live(&layout), [1, 2].map(|n| TempRoot { path: path(n), pid }));
        assert!(GcLock::acquire(&layout, Sharing::Exclusive, Wait::No).unwrap().is_some(), "not kept locked");
        drop(roots);
        assert!(!file.exists());
    }

    #[test]
    fn files_of_the_dead_are_replaced_and_removed() {
        let (_dir, layout) = prepared();
        let ours = layout.temp_roots().join(std::process::id().to_string());
        let full = layout.store_dir.full(&path(7));
        for name in [ours.clone(), layout.temp_roots().join("123"), layout.temp_roots().join(".tmp")] {
            fs::write(name, format!("{full}\0")).unwrap();
        }
        let found = read_all(&layout, Stale::Ignore, &Silent).unwrap();
        assert!(found.roots.is_empty() && layout.temp_roots().join("123").exists());
        let seen = fs::File::open(layout.temp_roots().join("123")).unwrap();
        let roots = TempRoots::new(layout.clone());
        roots.add(&path(8)).unwrap();
        assert_eq!(live(&layout), [TempRoot { path: path(8), pid: std::process::id() }]);
        assert!(!layout.temp_roots().join("123").exists());
        assert!(layout.temp_roots().join(".tmp").exists());
        let mut text = String::new();
        (&seen).read_to_string(&mut text).unwrap();
        assert!(text.starts_with('d'), "whoever opened it before sees that it is stale");
    }

    /// Two stores values in one process, or a process of another PID namespace.
    #[test]
    fn a_living_file_is_not_taken_over() {
        let (_dir, layout) = prepared();
        let (a, b) = (TempRoots::new(layout.clone()), TempRoots::new(layout.clone()));
        a.add(&path(1)).unwrap();
        b.add(&path(2)).unwrap();
        let pid = std::process::id();
        let expected = [TempRoot { path: path(1), pid }, TempRoot { path: path(2), pid: pid + BEYOND_PIDS }];
        assert_eq!(live(&layout), expected);
        drop(a);
        assert_eq!(live(&layout), &expected[1..]);
    }

    #[test]
    fn rubbish_in_files_is_no_root() {
        let (_dir, layout) = prepared();
        let file = LockFile::open(&layout.temp_roots().join("55")).unwrap();
        assert!(file.lock(Sharing::Exclusive, &mut Wait::No).unwrap());
        let full = layout.store_dir.full(&path(3));
        fs::write(file.path(), format!("\0/etc/passwd\0{full}\0\u{fffd}\0{full}/below\0{full}")).unwrap();
        assert_eq!(live(&layout), [TempRoot { path: path(3), pid: 55 }]);
        fs::write(file.path(), "").unwrap();
        assert_eq!(live(&layout), []);
        fs::write(file.path(), &full).unwrap();
        assert_eq!(live(&layout), [], "not finished");
        fs::create_dir(layout.temp_roots().join("56")).unwrap();
        assert!(read_all(&layout, Stale::Delete, &Silent).is_err());
        fs::remove_dir(layout.temp_roots().join("56")).unwrap();
        fs::remove_dir_all(layout.temp_roots().join("..").join("temproots")).unwrap();
        assert_eq!(live(&layout), [], "no directory, no roots");
    }

    /// An idle process of Nix 1.8 holds its file shared; the collector keeps it from writing.
    #[test]
    fn owners_of_the_old_style_are_held_up() {
        let (_dir, layout) = prepared();
        let file = LockFile::open(&layout.temp_roots().join("77")).unwrap();
        fs::write(file.path(), format!("{}\0", layout.store_dir.full(&path(4)))).unwrap();
        file.lock(Sharing::Shared, &mut Wait::No).unwrap();
        let found = read_all(&layout, Stale::Delete, &Silent).unwrap();
        assert_eq!((found.roots.len(), found.legacy_locks.len()), (1, 1));
        assert!(!file.lock(Sharing::Exclusive, &mut Wait::No).unwrap());
        drop(found);
        assert!(file.lock(Sharing::Exclusive, &mut Wait::No).unwrap());
    }

    #[test]
    fn what_we_may_not_read_is_told() {
        if !root_or_skip("what_we_may_not_read_is_told") {
            return;
        }
        let (_dir, layout) = prepared();
        let roots = TempRoots::new(layout.clone());
        roots.add(&path(1)).unwrap();
        let found = unprivileged(|| read_all(&layout, Stale::Ignore, &Silent)).unwrap();
        assert_eq!((found.roots.len(), found.unreadable.len()), (0, 1));
        let e = unprivileged(|| TempRoots::new(layout.clone()).add(&path(1))).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::PermissionDenied);
        give_away(&layout.state);
        assert_eq!(live(&layout).len(), 1);
    }

    /// Threads share one value; nothing is lost, no line is torn.
    #[test]
    fn threads() {
        let (_dir, layout) = prepared();
        let roots = TempRoots::new(layout.clone());
        std::thread::scope(|scope| {
            for t in 0..8 {
                let roots = &roots;
                scope.spawn(move || (0..50).for_each(|n| roots.add(&path(t * 50 + n)).unwrap()));
            }
        });
        assert_eq!(
            live(&layout),
            (0..400).map(|n| TempRoot { path: path(n), pid: std::process::id() }).collect::<Vec<_>>()
        );
    }

    /// A collector may lock and delete a file that is made, but not locked yet.
    #[test]
    fn new_files_and_collectors() {
        let (_dir, layout) = prepared();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        live(&layout);
                    }
                });
            }
            let mut lost = 0;
            for n in 0..2000 {
                let roots = TempRoots::new(layout.clone());
                roots.add(&path(n)).unwrap();
                lost += u32::from(!roots.file().unwrap().exists());
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(lost, 0, "files that nobody can see");
        });
    }

    /// While a collector runs, roots go through its socket; here it hangs up at times, answers
    /// rubbish, and ends in the middle.
    #[test]
    fn hands_over_to_a_running_collector() {
        let (_dir, layout) = prepared();
        let lock = GcLock::acquire(&layout, Sharing::Exclusive, Wait::No).unwrap().unwrap();
        let roots = TempRoots::new(layout.clone());
        std::thread::scope(|scope| {
            let adder = scope.spawn(|| {
                let many: Vec<_> = (0..200).map(path).collect();
                roots.add_all(&many).unwrap();
                roots.add(&path(200)).unwrap();
                roots.add(&path(201)).unwrap();
            });
            // It does not listen yet. Then there is a socket that nobody listens on.
            std::thread::sleep(Duration::from_millis(50));
            drop(UnixListener::bind(layout.gc_socket()).unwrap());
            std::thread::sleep(Duration::from_millis(150));
            assert!(!adder.is_finished());
            fs::remove_file(layout.gc_socket()).unwrap();
            let listener = UnixListener::bind(layout.gc_socket()).unwrap();
            // Hangs up at once; after some lines; answers nonsense.
            drop(listener.accept().unwrap());
            let mut lines = BufReader::new(listener.accept().unwrap().0).lines();
            for n in 0..64 {
                assert_eq!(lines.next().unwrap().unwrap(), layout.store_dir.full(&path(n)));
            }
            drop(lines);
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[b'0'; 64]).unwrap();
            let _open = stream;
            // At last one that works: all are told again, in order.
            let (stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for n in 0..=200 {
                assert_eq!(lines.next().unwrap().unwrap(), layout.store_dir.full(&path(n)));
                (&stream).write_all(b"1").unwrap();
            }
            // It ends without an answer, so the lock is there for the last one.
            assert_eq!(lines.next().unwrap().unwrap(), layout.store_dir.full(&path(201)));
            drop((stream, lines, listener, lock));
            adder.join().unwrap();
        });
        assert_eq!(live(&layout).len(), 202);
    }

    /// An answer that does not come: the path is told again on a new connection.
    #[test]
    fn asks_again_after_a_time() {
        let (_dir, layout) = prepared();
        let _lock = GcLock::acquire(&layout, Sharing::Exclusive, Wait::No).unwrap().unwrap();
        let listener = UnixListener::bind(layout.gc_socket()).unwrap();
        let mut roots = TempRoots::new(layout.clone());
        roots.answer_timeout = Duration::from_millis(50);
        std::thread::scope(|scope| {
            let adder = scope.spawn(|| roots.add(&path(1)).unwrap());
            let _silent = listener.accept().unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"1").unwrap();
            adder.join().unwrap();
            drop(stream);
        });
        assert_eq!(live(&layout).len(), 1);
    }

    /// The longest address of a socket is 107 bytes.
    #[test]
    fn long_state_directories() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(&dir.path().join("x".repeat(120)));
        make_dirs(layout.gc_socket().parent().unwrap()).unwrap();
        let _lock = GcLock::acquire(&layout, Sharing::Exclusive, Wait::No).unwrap().unwrap();
        let socket_dir = crate::testing::open(layout.gc_socket().parent().unwrap());
        let listener = UnixListener::bind(format!("{}/socket", crate::entry::proc_path(socket_dir.as_fd()))).unwrap();
        let roots = TempRoots::new(layout.clone());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                // An end before the line is read would be a reset.
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                stream.write_all(b"1").unwrap();
            });
            roots.add(&path(1)).unwrap();
        });
    }

    /// A process that is killed leaves its file, but not its protection.
    #[test]
    fn killed_processes_protect_nothing() {
        if let Some(dir) = child_argument() {
            let roots = TempRoots::new(layout(Path::new(&dir)));
            roots.add(&path(5)).unwrap();
            println!("ready");
            std::thread::sleep(Duration::from_mins(1));
            return;
        }
        let (dir, layout) = prepared();
        let argument = dir.path().to_str().unwrap();
        let mut process = child("temp_roots::tests::killed_processes_protect_nothing", argument, "");
        eventually("the child has its root", || live(&layout) == [TempRoot { path: path(5), pid: process.id() }]);
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(layout.temp_roots().join(process.id().to_string()).exists());
        assert_eq!(live(&layout), []);
        assert!(!layout.temp_roots().join(process.id().to_string()).exists());
    }

    /// A real collector spares what our file names, and what we tell it while it runs.
    #[test]
    fn interop_real_collector_spares_our_roots() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let Some(nix) = RealNix::find("interop_real_collector_spares_our_roots", &layout) else { return };
        let [kept, told, gone] = ["kept", "told", "gone"].map(|name| nix.add(name, name));
        let roots = TempRoots::new(layout.clone());
        roots.add(&kept).unwrap();
        let listed = nix.run(&["--gc", "--print-roots"]);
        assert_eq!(listed, format!("{{temp:{}}} -> {}", std::process::id(), layout.store_dir.full(&kept)));
        // The collector reads a byte from here before it deletes anything.
        let fifo = dir.path().join("fifo");
        assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let collector = nix.command(&["--gc"]).env("_NIX_TEST_GC_SYNC", &fifo).spawn().unwrap();
        eventually("the collector has the lock and listens", || {
            layout.gc_socket().exists() && GcLock::acquire(&layout, Sharing::Shared, Wait::No).unwrap().is_none()
        });
        // More than one package of lines.
        let many: Vec<_> = (0..200).map(path).collect();
        roots.add_all(many.iter().chain([&told])).unwrap();
        fs::write(&fifo, b"x").unwrap();
        let output = collector.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(layout.real_path(&kept).exists() && layout.real_path(&told).exists());
        assert!(!layout.real_path(&gone).exists());
        drop(roots);
        nix.run(&["--gc"]);
        assert!(!layout.real_path(&kept).exists() && !layout.real_path(&told).exists());
    }
}
