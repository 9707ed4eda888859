//! Making room before something is added: the settings `min-free` and `max-free`.
//!
//! Whether room is needed is a decision of its own ([`needed_bytes`]), so that whoever must not wait
//! (a scheduler of builds) can have the collection done by another thread. Source: gc, section 4.3.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use larder_core::report::Level;
use larder_fs::file_error::FileError;

use crate::collect::{CollectOptions, Freed};
use crate::error::{StoreError, chain};
use crate::local::{LocalStore, Options};

/// What is remembered between two looks.
#[derive(Debug, Default)]
pub(crate) struct Room {
    looked: Option<Instant>,
    /// Free bytes after the last collection for room.
    after_last: Option<u64>,
}

/// How many bytes a collection is to free; `None` if there is room, or if the last collection did not
/// help and little has changed since. Pure.
pub fn needed_bytes(available: u64, after_last: Option<u64>, options: &Options) -> Option<u64> {
    let (min, max) = (options.min_free_bytes, options.max_free_bytes);
    if min == 0 || available >= min || available >= max {
        return None;
    }
    // Less than 97 hundredths of what there was.
    if after_last.is_some_and(|last| u128::from(available) * 100 >= u128::from(last) * 97) {
        return None;
    }
    Some(max - available)
}

impl LocalStore {
    /// Bytes that can still be written to the store.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        const DOING: &str = "getting the free space of";
        if let Some(file) = &self.options().free_space_file {
            let text = std::fs::read_to_string(file).map_err(|e| FileError::new(DOING, file, e))?;
            let invalid = || FileError::new(DOING, file, std::io::Error::from(std::io::ErrorKind::InvalidData));
            return Ok(text.trim().parse().map_err(|_| invalid())?);
        }
        let real_store = &self.layout().real_store;
        let status =
            rustix::fs::statvfs(real_store).map_err(|e| FileError::new(DOING, real_store, std::io::Error::from(e)))?;
        Ok(status.f_bavail.saturating_mul(status.f_frsize))
    }

    /// Collects garbage if there is little room; looks at most every `min-free-check-interval`.
    ///
    /// Whoever comes while another thread does it waits for that. A failure is only told: there may be
    /// room enough for what is to come.
    pub fn make_room(&self) {
        if self.options().min_free_bytes == 0 || self.ledger().is_err() {
            return;
        }
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let interval = Duration::from_secs(self.options().min_free_check_interval_s);
        if room.looked.is_some_and(|looked| looked.elapsed() < interval) {
            return;
        }
        let made = self.make_room_now(room.after_last);
        room.looked = Some(Instant::now());
        match made {
            Ok(None) => {}
            Ok(after) => room.after_last = after,
            Err(error) => {
                self.reporter().message(Level::Warn, format_args!("cannot make room: {}", chain(&error)));
            }
        }
    }

    /// Gives the bytes that are free after a collection, if there was one.
    fn make_room_now(&self, after_last: Option<u64>) -> Result<Option<u64>, StoreError> {
        let Some(wanted) = needed_bytes(self.free_bytes()?, after_last, self.options()) else { return Ok(None) };
        self.reporter().message(Level::Info, format_args!("running auto-GC to free {wanted} bytes"));
        self.collect(CollectOptions { max_freed_bytes: Some(wanted) }, &mut Freed::default())?;
        self.free_bytes().map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_room_is_needed() {
        let options = |min, max| Options { min_free_bytes: min, max_free_bytes: max, ..Options::default() };
        for (available, last, min, max, wanted) in [
            (500, None, 0, 1000, None),
            (500, None, 600, 1000, Some(500)),
            (600, None, 600, 1000, None),
            (500, None, 600, 500, None),
            (500, Some(500), 600, 1000, None),
            (485, Some(500), 600, 1000, None),
            (484, Some(500), 600, 1000, Some(516)),
            (0, None, 1, u64::MAX, Some(u64::MAX)),
            (u64::MAX - 1, Some(u64::MAX), u64::MAX, u64::MAX, None),
        ] {
            assert_eq!(needed_bytes(available, last, &options(min, max)), wanted, "{available} {last:?} {min} {max}");
        }
    }
}
