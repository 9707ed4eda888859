//! Makes a new file grow in steps of some megabytes instead of doubling.
//!
//! redb grows a file region by region, but takes regions of 4 GiB and doubles the file until the
//! first one is full; a ledger of 800 MB would take 1.6 GB as soon as one more page is needed.
//! The size of a region is a field of the file's header (redb's `docs/design.md`, "Database
//! header"), fixed when the file is made and read from there ever after; only redb's builder has
//! no way to set it. So while the file is made, and only then, the header passes through here.

use std::io;
use std::ops::Bound;

use redb::{BackendError, StorageBackend};

/// Pages of 4 KiB in a region: 8 MiB. This is also the most that one value may take, so a path
/// may have 400,000 references.
const REGION_PAGES: u32 = 2048;

/// Where the header has the size of a region, in pages, u32 LE.
const FIELD: std::ops::Range<usize> = 20..24;
/// What redb puts there.
const REDBS_OWN: [u8; 4] = (1u32 << 20).to_le_bytes();
/// The smallest write that is the header.
const HEADER_LEN: usize = 320;

/// A file in the making. Passes everything on, but for one field of the header.
#[derive(Debug)]
pub(crate) struct SmallRegions<B>(pub(crate) B);

type LockResult<T> = Result<T, BackendError>;

impl<B: StorageBackend> StorageBackend for SmallRegions<B> {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if offset == 0
            && data.len() >= HEADER_LEN
            && let Some(field) = data.get(FIELD)
            && field == REDBS_OWN
        {
            let mut data = data.to_vec();
            if let Some(field) = data.get_mut(FIELD) {
                field.copy_from_slice(&REGION_PAGES.to_le_bytes());
            }
            return self.0.write(offset, &data);
        }
        self.0.write(offset, data)
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<bool> {
        self.0.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<bool> {
        self.0.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<()> {
        self.0.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<()> {
        self.0.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<()> {
        self.0.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> LockResult<bool> {
        self.0.query_lock_range(start, end)
    }
}
