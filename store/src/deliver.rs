//! Objects that are fetched: claimed first, then taken in, then registered together.
//!
//! A claim is the lock of the path, held while the object comes: of several processes that want
//! the same path one fetches it. Nobody waits for a lock here; what is taken is looked at again
//! later. The locks end with the registration, or with the failure, of their own object.

use std::io::Read;
use std::path::PathBuf;

use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;
use larder_fs::lock_file::Wait;
use larder_fs::path_lock::{OnRelease, PathLocks};

use crate::adopt::{Output, Taken};
use crate::error::StoreError;
use crate::ingest::Incoming;
use crate::local::LocalStore;

/// How many are registered together: fewer than what an arrival commits by itself.
const GROUP: usize = 48;

/// What came of claiming a path.
#[derive(Debug)]
pub enum Claim {
    /// There is nothing to be done.
    Valid,
    /// Another process makes it.
    Busy(PathBuf),
    Ours(Claimed),
}

/// A path that nobody else makes.
#[derive(Debug)]
pub struct Claimed {
    path: StorePath,
    locks: PathLocks,
    /// Is what is there to be replaced?
    replace: bool,
}

/// An object that has come whole and is what it should be.
#[derive(Debug)]
pub struct Delivery<'s> {
    incoming: Incoming<'s>,
    info: PathInfo,
    claimed: Claimed,
}

impl Delivery<'_> {
    pub fn path(&self) -> &StorePath {
        &self.info.path
    }
}

impl LocalStore {
    /// Claims a path, which becomes a temporary root. With `replace` also one that is valid.
    pub fn claim(&self, path: &StorePath, replace: bool) -> Result<Claim, StoreError> {
        self.add_temp_roots([path])?;
        let real = self.layout().real_path(path);
        let Some(mut locks) = PathLocks::acquire([&real], &self.options().held_locks, Wait::No)? else {
            let is_there = !replace && self.is_valid(path)?;
            return Ok(if is_there { Claim::Valid } else { Claim::Busy(real) });
        };
        locks.on_release(OnRelease::Delete);
        if !replace && self.is_valid_under_lock(path)? {
            locks.release()?;
            return Ok(Claim::Valid);
        }
        Ok(Claim::Ours(Claimed { path: path.clone(), locks, replace }))
    }

    /// Takes in the NAR of a claimed path, whose hash, size and content address are checked.
    ///
    /// Errors: also that the record is not of the claimed path.
    pub fn receive_claimed(
        &self,
        claimed: Claimed,
        info: PathInfo,
        nar: &mut dyn Read,
    ) -> Result<Delivery<'_>, StoreError> {
        if info.path != claimed.path {
            return Err(self.not_valid(&info.path));
        }
        let incoming = self.take_checked(&info, nar)?;
        let info = PathInfo { nar_size_bytes: incoming.nar_size_bytes, ultimate: false, ..info };
        Ok(Delivery { incoming, info, claimed })
    }

    /// Registers objects, durably and together as far as they are good; what they refer to must be
    /// valid, or before them. What came of each is in their order.
    pub fn register_deliveries<'s>(&'s self, deliveries: Vec<Delivery<'s>>) -> Vec<Result<(), StoreError>> {
        let mut results = Vec::with_capacity(deliveries.len());
        let mut group = Vec::new();
        for delivery in deliveries {
            if delivery.claimed.replace || group.len() == GROUP {
                self.register_group(std::mem::take(&mut group), &mut results);
            }
            if delivery.claimed.replace {
                let Delivery { incoming, info, claimed } = delivery;
                let done = self.register_outputs(vec![Output { taken: Taken::of(incoming), info }], &[], &|_| Ok(()));
                results.push(done.and_then(|()| Ok(claimed.locks.release()?)));
            } else {
                group.push(delivery);
            }
        }
        self.register_group(group, &mut results);
        results
    }

    fn register_group<'s>(&'s self, group: Vec<Delivery<'s>>, results: &mut Vec<Result<(), StoreError>>) {
        let first = results.len();
        let mut arrivals = self.arrivals();
        // One question for all; if it fails, each asks for itself, and tells.
        let _ = arrivals.foresee(group.iter().flat_map(|delivery| &delivery.info.references));
        for Delivery { incoming, info, claimed } in group {
            results.push(arrivals.seal_claimed(incoming, info, claimed.locks));
        }
        if let Err(error) = arrivals.commit() {
            // They go in together, or not at all; which of them is at fault nobody can tell.
            let reason = crate::error::chain(&error);
            for result in results.iter_mut().skip(first).filter(|result| result.is_ok()) {
                *result = Err(StoreError::NotRegistered { reason: reason.clone() });
            }
        }
    }
}
