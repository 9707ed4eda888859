//! Reads of pages that lie in a row become few and long.
//!
//! redb reads page by page, a system call for each 4 KiB. Tables that were loaded in one go lie in
//! the file in the order of their keys, so going over one, or over two in step, asks for pages in
//! a row; what follows in such a row is read at once. A page on its own, as a lookup needs, is read
//! on its own. Copying a page that nobody wants costs as much as a system call, so a row must be
//! of some length before anything is read ahead, and have few gaps: a closure that was read ahead
//! more eagerly (gaps of 32 KiB, from the second page on) took twice the time.
//!
//! Other processes may write to the file at any time, but not to the pages of an open snapshot,
//! and every snapshot begins with a shared lock on the header. What was read before such a lock may
//! be out of date behind it, so it is thrown away then; redb's own cache follows the same rule.

use std::io;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redb::{BackendError, StorageBackend};

/// Rows that are followed at a time: two tables gone over in step, and the branches of their trees.
const ROWS: usize = 4;
/// A page so far behind the end of a row still belongs to it: branch pages lie between leaves.
const GAP_BYTES: u64 = 4096;
/// Pages that must have come one by one.
const SINGLE: u32 = 12;
/// What is read ahead at first, and at most.
const FIRST_BYTES: usize = 16 * 1024;
const MOST_BYTES: usize = 32 * 1024;

/// A file that is only read, by the handle that answers snapshots.
#[derive(Debug)]
pub(crate) struct ReadAhead<B> {
    inner: B,
    rows: Mutex<Rows>,
}

#[derive(Debug, Default)]
struct Rows {
    rows: [Row; ROWS],
    clock: u64,
}

/// Pages in a row, of which the last ones are here.
#[derive(Debug, Default)]
struct Row {
    start: u64,
    bytes: Vec<u8>,
    /// How much of that was asked for.
    wanted_bytes: usize,
    /// Pages that were read one by one.
    single: u32,
    /// How much to read at once, next time; 0 for an unused row.
    next_bytes: usize,
    used: u64,
}

impl Row {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(from..from.checked_add(len)?)
    }

    /// How much to read as the row goes on; nothing in advance while it is young.
    fn grow(&mut self) -> Option<usize> {
        if self.bytes.is_empty() {
            self.single += 1;
        } else if self.wanted_bytes >= self.bytes.len() / 4 * 3 {
            self.next_bytes = (self.next_bytes * 2).min(MOST_BYTES);
        } else {
            (self.single, self.next_bytes) = (0, FIRST_BYTES);
        }
        (self.single >= SINGLE).then_some(self.next_bytes)
    }

    /// Begins behind a piece that is read alone.
    fn behind(&mut self, offset: u64, len: usize) {
        self.bytes.clear();
        self.start = offset + len as u64;
    }

    /// Is this the next piece of the row, or one close behind it?
    fn goes_on_at(&self, offset: u64) -> bool {
        self.next_bytes > 0 && offset.checked_sub(self.end()).is_some_and(|gap| gap <= GAP_BYTES)
    }
}

impl<B: StorageBackend> ReadAhead<B> {
    pub(crate) fn new(inner: B) -> Self {
        Self { inner, rows: Mutex::default() }
    }

    fn forget(&self) {
        // The memory stays for the next snapshot, the contents go.
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        for row in &mut rows.rows {
            row.bytes.clear();
            row.next_bytes = 0;
        }
    }

    /// Reads one piece; the rows are locked meanwhile, so that nothing read before a `forget` is
    /// kept after it.
    fn read_in(&self, mut rows: MutexGuard<'_, Rows>, offset: u64, out: &mut [u8]) -> io::Result<()> {
        rows.clock += 1;
        let clock = rows.clock;
        for row in &mut rows.rows {
            if let Some(found) = row.get(offset, out.len()) {
                out.copy_from_slice(found);
                row.wanted_bytes += out.len();
                row.used = clock;
                return Ok(());
            }
        }
        if let Some(row) = rows.rows.iter_mut().find(|row| row.goes_on_at(offset)) {
            row.used = clock;
            if let Some(ahead) = row.grow() {
                row.start = offset;
                row.bytes.resize(ahead.max(out.len()), 0);
                // Behind the end of the file there is nothing to be had: then page by page.
                if self.inner.read(offset, &mut row.bytes).is_ok()
                    && let Some(found) = row.bytes.get(..out.len())
                {
                    out.copy_from_slice(found);
                    row.wanted_bytes = out.len();
                    return Ok(());
                }
                (row.single, row.next_bytes) = (0, FIRST_BYTES);
            }
            row.behind(offset, out.len());
        } else if let Some(row) = rows.rows.iter_mut().min_by_key(|row| row.used) {
            row.behind(offset, out.len());
            (row.single, row.next_bytes, row.used) = (0, FIRST_BYTES, clock);
        }
        drop(rows);
        self.inner.read(offset, out)
    }
}

type LockResult<T> = Result<T, BackendError>;

impl<B: StorageBackend> StorageBackend for ReadAhead<B> {
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        // The header is at the front, and values beyond a few pages gain nothing.
        if offset == 0 || out.len() > FIRST_BYTES {
            return self.inner.read(offset, out);
        }
        match self.rows.try_lock() {
            Ok(rows) => self.read_in(rows, offset, out),
            // Another thread is at it, or was when it panicked.
            Err(_) => self.inner.read(offset, out),
        }
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<bool> {
        let locked = self.inner.try_lock_shared_range(start, end);
        self.forget();
        locked
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<()> {
        let locked = self.inner.lock_shared_range(start, end);
        // Once it is held, not before: until then the file may change.
        self.forget();
        locked
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let written = self.inner.write(offset, data);
        self.forget();
        written
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<bool> {
        self.inner.try_lock_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<()> {
        self.inner.lock_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<()> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<bool> {
        self.inner.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const PAGE: usize = 4096;

    /// A file in memory that others may write to, and that counts what is read from it.
    #[derive(Debug, Clone, Default)]
    struct Shared {
        bytes: Arc<Mutex<Vec<u8>>>,
        reads: Arc<AtomicUsize>,
    }

    impl Shared {
        fn of_pages(count: usize) -> Self {
            let shared = Self::default();
            shared.bytes.lock().unwrap().resize(count * PAGE, 0);
            (0..count).for_each(|page| shared.put(page, page));
            shared
        }

        fn put(&self, page: usize, value: usize) {
            let value = value.to_le_bytes();
            self.bytes.lock().unwrap()[page * PAGE..][..value.len()].copy_from_slice(&value);
        }
    }

    impl StorageBackend for Shared {
        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let bytes = self.bytes.lock().unwrap();
            let from = usize::try_from(offset).unwrap();
            let found = bytes.get(from..from + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            out.copy_from_slice(found);
            Ok(())
        }

        fn len(&self) -> io::Result<u64> {
            Ok(self.bytes.lock().unwrap().len() as u64)
        }

        fn set_len(&self, _: u64) -> io::Result<()> {
            unreachable!("it is only read")
        }

        fn sync_data(&self) -> io::Result<()> {
            unreachable!("it is only read")
        }

        fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
            unreachable!("it is only read")
        }

        fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<bool> {
            Ok(true)
        }

        fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> LockResult<()> {
            Ok(())
        }
    }

    fn page(file: &ReadAhead<Shared>, page: usize) -> usize {
        let mut out = [0; PAGE];
        file.read((page * PAGE) as u64, &mut out).unwrap();
        usize::from_le_bytes(*out.first_chunk().unwrap())
    }

    #[test]
    fn rows_are_read_in_long_pieces_and_lookups_are_not() {
        let shared = Shared::of_pages(4000);
        let file = ReadAhead::new(shared.clone());
        // Two tables in step, with a branch page now and then, and one left out.
        for n in (0..1000).filter(|n| n % 7 != 3) {
            assert_eq!(page(&file, 1 + n), 1 + n);
            assert_eq!(page(&file, 2000 + n), 2000 + n);
            if n % 100 == 0 {
                assert_eq!(page(&file, 3500 + n / 10), 3500 + n / 10);
            }
        }
        let reads = shared.reads.swap(0, Ordering::Relaxed);
        assert!(reads < 300, "{reads} reads");
        for n in 0..50 {
            assert_eq!(page(&file, 1 + n * 77), 1 + n * 77);
        }
        assert!(shared.reads.load(Ordering::Relaxed) <= 50);
    }

    #[test]
    fn a_snapshot_sees_what_was_committed_before_it() {
        let shared = Shared::of_pages(100);
        let file = ReadAhead::new(shared.clone());
        (1..20).for_each(|n| assert_eq!(page(&file, n), n));
        shared.put(21, 1234);
        file.lock_shared_range(Bound::Unbounded, Bound::Unbounded).unwrap();
        assert_eq!(page(&file, 21), 1234);
    }

    proptest! {
        /// In whatever order pages are asked for, also the last ones of the file, and whatever
        /// is written to pages between snapshots.
        #[test]
        fn pages_come_as_they_are(steps in proptest::collection::vec((0usize..3, 1usize..60, 1usize..12), 1..60)) {
            let shared = Shared::of_pages(60);
            let file = ReadAhead::new(shared.clone());
            let mut model: Vec<usize> = (0..60).collect();
            for (step, (kind, first, count)) in steps.into_iter().enumerate() {
                let pages = first..(first + count).min(60);
                if kind == 0 {
                    for n in pages {
                        shared.put(n, n + 1000 * step);
                        model[n] = n + 1000 * step;
                    }
                    file.lock_shared_range(Bound::Unbounded, Bound::Unbounded).unwrap();
                } else {
                    for n in pages.step_by(kind) {
                        prop_assert_eq!(page(&file, n), model[n]);
                    }
                }
            }
        }
    }
}
