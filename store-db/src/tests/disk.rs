//! A disk in memory that logs what is done to it, so that a test can stop it at any moment.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard};

use redb::{BackendError, StorageBackend};

/// One thing done to the disk.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    SetLen(u64),
    Sync,
    /// The test's own: so many changes have been reported as done.
    Mark(usize),
}

#[derive(Default)]
struct State {
    image: Vec<u8>,
    log: Vec<Op>,
    /// So many more blocks of 4 KiB can be taken into use until the disk is full.
    room: Option<usize>,
    /// The blocks in use. A new length takes none.
    blocks: HashSet<u64>,
}

impl State {
    fn take(&mut self, offset: u64, bytes: usize) -> io::Result<()> {
        for block in offset / 4096..(offset + bytes as u64).div_ceil(4096) {
            if !self.blocks.contains(&block) {
                if let Some(room) = &mut self.room {
                    *room = room.checked_sub(1).ok_or(io::ErrorKind::StorageFull)?;
                }
                self.blocks.insert(block);
            }
        }
        Ok(())
    }
}

/// A disk; its clones are the same disk.
#[derive(Clone, Default)]
pub(crate) struct Disk(Arc<Mutex<State>>);

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}

impl Disk {
    pub(crate) fn of(image: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(State { image, ..State::default() })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.state().image.is_empty()
    }

    /// What redb works on.
    pub(crate) fn handle(&self) -> Handle {
        Handle(self.clone())
    }

    pub(crate) fn mark(&self, done: usize) {
        self.state().log.push(Op::Mark(done));
    }

    /// Lets so many more blocks be taken into use, or any number.
    pub(crate) fn set_room(&self, room: Option<usize>) {
        self.state().room = room;
    }

    pub(crate) fn image(&self) -> Vec<u8> {
        self.state().image.clone()
    }

    pub(crate) fn log(&self) -> Vec<Op> {
        self.state().log.clone()
    }
}

/// Applies a write or a new length to an image.
pub(crate) fn apply(image: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write { offset, data } => {
            let start = usize::try_from(*offset).unwrap();
            if image.len() < start + data.len() {
                image.resize(start + data.len(), 0);
            }
            image[start..start + data.len()].copy_from_slice(data);
        }
        Op::SetLen(len) => image.resize(usize::try_from(*len).unwrap(), 0),
        Op::Sync | Op::Mark(_) => {}
    }
}

/// An open disk. Locks are always had, as there is one process.
#[derive(Debug)]
pub(crate) struct Handle(Disk);

type LockResult<T> = Result<T, BackendError>;

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.state().image.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.0.state();
        let start = usize::try_from(offset).unwrap();
        let bytes = state.image.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.0.state();
        let op = Op::SetLen(len);
        apply(&mut state.image, &op);
        state.log.push(op);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.state().log.push(Op::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.0.state();
        state.take(offset, data.len())?;
        let op = Op::Write { offset, data: data.to_vec() };
        apply(&mut state.image, &op);
        state.log.push(op);
        Ok(())
    }

    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<bool> {
        Ok(true)
    }

    fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<bool> {
        Ok(true)
    }

    fn lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<()> {
        Ok(())
    }

    fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<()> {
        Ok(())
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<()> {
        Ok(())
    }

    fn query_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<bool> {
        Ok(false)
    }
}
