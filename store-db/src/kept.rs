//! Snapshots that stay open between questions that come one upon the other.
//!
//! To begin and to end a snapshot takes five system calls, four of them locks, and its tables are
//! looked up anew: more than it takes to answer most questions. As long as the header of the file is
//! the same as when a snapshot began, nothing was committed since, as every commit changes it; then
//! one look at it is enough, and the snapshot answers the next question too.
//!
//! An open snapshot keeps its pages from being used again, so none is kept for longer than a moment
//! without a question ([`REST`]), and none is kept at all for questions that are far apart.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::damage::drop_quietly;
use crate::query::ReadTxn;

/// Bytes of a file's header: its two slots, one of which every commit writes, lie within them.
const HEADER_BYTES: usize = 320;

/// A snapshot is let go of when nobody has asked for so long, or for twice that.
const REST: Duration = Duration::from_millis(50);

/// Questions that are no farther apart than this are worth keeping one for.
const NEAR: Duration = Duration::from_millis(5);

/// Snapshots that are kept for threads that ask at the same time.
const MOST: usize = 4;

/// What the file began with at some moment.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Header([u8; HEADER_BYTES]);

/// Where snapshots are kept.
pub(crate) struct Kept(Arc<Shared>);

struct Shared {
    file: File,
    state: Mutex<State>,
    /// There is something to let go of, or no more to wait for.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    header: Option<Header>,
    /// All of that header.
    snapshots: Vec<ReadTxn>,
    /// How often all handles were given up: what began before is of no use behind it.
    round: u64,
    /// When the last question was answered.
    asked: Option<Instant>,
    sweeper: Sweeper,
    closed: bool,
}

/// The thread that lets go of snapshots.
#[derive(Default, PartialEq, Eq)]
enum Sweeper {
    #[default]
    None,
    /// There is nothing to do until it is woken.
    Waiting,
    Watching,
}

/// What a snapshot answers for.
#[derive(Clone, Copy)]
pub(crate) struct Ticket {
    header: Header,
    round: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header(&self) -> Option<Header> {
        let mut bytes = [0; HEADER_BYTES];
        self.file.read_exact_at(&mut bytes, 0).ok().map(|()| Header(bytes))
    }
}

impl Kept {
    /// Of the file at this path.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self(Arc::new(Shared { file, state: Mutex::default(), changed: Condvar::new() })))
    }

    /// A snapshot that is still the newest, if one is kept, and what it answers for: one that begins
    /// after this call answers for the same if [`Kept::is_current`] then. Nothing for a question that
    /// comes alone.
    pub(crate) fn take(&self) -> (Option<ReadTxn>, Option<Ticket>) {
        if self.0.state().asked.is_none_or(|asked| asked.elapsed() > NEAR) {
            return (None, None);
        }
        let Some(header) = self.0.header() else { return (None, None) };
        let mut state = self.0.state();
        let ticket = Ticket { header, round: state.round };
        if state.header == Some(header) {
            return (state.snapshots.pop(), Some(ticket));
        }
        let old = std::mem::take(&mut state.snapshots);
        state.header = Some(header);
        drop(state);
        drop_quietly(old);
        (None, Some(ticket))
    }

    /// Has nothing been committed since the ticket was given?
    pub(crate) fn is_current(&self, ticket: &Ticket) -> bool {
        self.0.header() == Some(ticket.header)
    }

    /// A question was answered; its snapshot is kept for the next one, if it can be told what it
    /// answers for.
    pub(crate) fn put(&self, snapshot: ReadTxn, ticket: Option<&Ticket>) {
        let mut state = self.0.state();
        state.asked = Some(Instant::now());
        let is_newest = ticket.is_some_and(|t| state.header == Some(t.header) && state.round == t.round);
        if is_newest && state.snapshots.len() < MOST && self.is_swept(&mut state) {
            state.snapshots.push(snapshot);
        } else {
            drop(state);
            drop_quietly(snapshot);
        }
    }

    /// Lets go of all, as their handles are given up.
    pub(crate) fn forget(&self) {
        let mut state = self.0.state();
        state.round += 1;
        let old = std::mem::take(&mut state.snapshots);
        drop(state);
        drop_quietly(old);
    }

    /// Sees to it that what is kept is let go of in time; not where no thread can be had.
    fn is_swept(&self, state: &mut State) -> bool {
        match state.sweeper {
            Sweeper::Watching => return true,
            Sweeper::Waiting => self.0.changed.notify_one(),
            Sweeper::None => {
                let shared = Arc::clone(&self.0);
                let thread = thread::Builder::new().name("ledger".to_owned()).stack_size(256 << 10);
                if thread.spawn(move || sweep(&shared)).is_err() {
                    return false;
                }
            }
        }
        state.sweeper = Sweeper::Watching;
        true
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.0.state().closed = true;
        self.forget();
        self.0.changed.notify_one();
    }
}

/// Looks now and then whether what is kept is still asked.
fn sweep(shared: &Shared) {
    let mut state = shared.state();
    while !state.closed {
        if state.snapshots.is_empty() && state.asked.is_none_or(|asked| asked.elapsed() >= REST) {
            state.sweeper = Sweeper::Waiting;
            while state.sweeper == Sweeper::Waiting && !state.closed {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            continue;
        }
        (state, _) = shared.changed.wait_timeout(state, REST).unwrap_or_else(PoisonError::into_inner);
        if state.asked.is_none_or(|asked| asked.elapsed() >= REST) {
            let old = std::mem::take(&mut state.snapshots);
            drop(state);
            drop_quietly(old);
            state = shared.state();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use larder_core::hash::Sha256Digest;
    use larder_core::hash_part::HashPart;
    use larder_core::path_info::PathInfo;
    use larder_core::store_path::{Name, StorePath};

    use super::*;
    use crate::{Batch, DbError, Mode, OpenOptions, StoreDb};

    fn path(n: u32) -> StorePath {
        let digest = Sha256Digest::of(&n.to_le_bytes());
        let hash_part = HashPart::from_bytes(*digest.as_bytes().first_chunk().unwrap());
        StorePath::new(hash_part, Name::new("x").unwrap())
    }

    fn register(db: &StoreDb, n: u32) {
        let mut batch = Batch::new();
        batch.push_info(&PathInfo::new(path(n), Sha256Digest([7; 32]), 100), &BTreeMap::new()).unwrap();
        db.register(batch).unwrap();
    }

    fn is_valid(db: &StoreDb, n: u32) -> bool {
        db.read(|txn| txn.is_valid(&path(n))).unwrap()
    }

    /// A ledger whose snapshots are kept, and the same for another process.
    fn house() -> (tempfile::TempDir, StoreDb, StoreDb) {
        let dir = tempfile::tempdir().unwrap();
        let other = StoreDb::open(dir.path(), &OpenOptions::new(Mode::Create)).unwrap();
        let options = OpenOptions { keeps_snapshots: true, ..OpenOptions::new(Mode::Existing) };
        let db = StoreDb::open(dir.path(), &options).unwrap();
        (dir, db, other)
    }

    fn kept(db: &StoreDb) -> usize {
        db.kept().unwrap().0.state().snapshots.len()
    }

    /// Asks until the questions came fast enough, however busy the machine is.
    fn ask_until_kept(db: &StoreDb, n: u32) {
        let since = Instant::now();
        while kept(db) == 0 {
            assert!(since.elapsed() < Duration::from_mins(2), "nothing is kept");
            assert!(is_valid(db, n));
        }
    }

    /// Whatever others and we ourselves commit is seen by the next question.
    #[test]
    fn commits_are_seen_at_once() {
        let (_dir, db, other) = house();
        for n in 0..40 {
            register(if n % 3 == 0 { &db } else { &other }, n);
            for _ in 0..3 {
                assert!(is_valid(&db, n));
            }
            ask_until_kept(&db, n);
            assert!(!is_valid(&db, n + 1));
        }
    }

    /// All threads are answered, and few snapshots stay.
    #[test]
    fn many_threads_ask() {
        let (_dir, db, other) = house();
        register(&other, 0);
        thread::scope(|scope| {
            for _ in 0..3 * MOST {
                scope.spawn(|| {
                    for n in 0..100 {
                        // One within the other, so that a second one is needed.
                        let both = db.read(|txn| Ok::<_, DbError>((txn.is_valid(&path(0))?, is_valid(&db, 0))));
                        assert_eq!(both.unwrap(), (true, true), "{n}");
                        assert!(kept(&db) <= MOST);
                    }
                });
            }
            for n in 1..20 {
                register(&other, n);
            }
        });
        assert!(is_valid(&db, 19));
    }

    /// The pages of what is deleted are used again once nobody has asked for a while.
    #[test]
    fn nothing_is_held_when_nobody_asks() {
        let (_dir, db, other) = house();
        register(&other, 0);
        ask_until_kept(&db, 0);
        let since = Instant::now();
        while kept(&db) > 0 {
            assert!(since.elapsed() < Duration::from_mins(2), "it is kept for ever");
            thread::sleep(Duration::from_millis(1));
        }
        // The next ones have it watched again.
        ask_until_kept(&db, 0);
        while kept(&db) > 0 {
            assert!(since.elapsed() < Duration::from_mins(4), "it is kept for ever");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What belongs to handles that were given up does not come back.
    #[test]
    fn snapshots_go_with_their_handles() {
        let (_dir, db, other) = house();
        register(&other, 0);
        ask_until_kept(&db, 0);
        let store = db.kept().unwrap();
        let (snapshot, ticket) = loop {
            if let (Some(snapshot), ticket) = store.take() {
                break (snapshot, ticket);
            }
            is_valid(&db, 0);
        };
        assert!(store.is_current(ticket.as_ref().unwrap()));
        store.forget();
        store.put(snapshot, ticket.as_ref());
        assert_eq!(kept(&db), 0);
        // So does what is of before a commit.
        register(&other, 1);
        assert!(!store.is_current(ticket.as_ref().unwrap()));
        ask_until_kept(&db, 1);
        db.close().unwrap();
    }
}
