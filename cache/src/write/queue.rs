//! What is to be written next: archives in any order, and what is said of an object after its
//! archive and after what is said of all it refers to.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;

use super::Written;
use crate::error::CacheError;

/// Something to do, with the number of the object.
pub(super) enum Task<'a> {
    Nar(usize, &'a PathInfo),
    Info(usize, Box<Written>),
}

/// An object that is not told of.
struct Waiting {
    /// How many of those it refers to are not told of either.
    references: usize,
    /// Those that wait for it.
    referrers: Vec<usize>,
    /// Its archive is there.
    written: Option<Box<Written>>,
}

struct State {
    /// The first object whose archive nobody has begun.
    next: usize,
    objects: Vec<Waiting>,
    /// Those that can be told of.
    ready: VecDeque<(usize, Box<Written>)>,
    /// Objects that are not told of.
    left: usize,
    failed: Option<CacheError>,
}

/// The objects that several threads write.
pub(super) struct Queue<'a> {
    infos: &'a [PathInfo],
    state: Mutex<State>,
    changed: Condvar,
}

impl<'a> Queue<'a> {
    pub(super) fn new(infos: &'a [PathInfo]) -> Self {
        let numbers: BTreeMap<&StorePath, usize> = infos.iter().enumerate().map(|(n, info)| (&info.path, n)).collect();
        let mut objects: Vec<Waiting> =
            infos.iter().map(|_| Waiting { references: 0, referrers: Vec::new(), written: None }).collect();
        for (number, info) in infos.iter().enumerate() {
            for reference in &info.references {
                let Some(&before) = numbers.get(reference).filter(|before| **before != number) else { continue };
                if let Some(object) = objects.get_mut(before) {
                    object.referrers.push(number);
                }
                if let Some(object) = objects.get_mut(number) {
                    object.references += 1;
                }
            }
        }
        let state = State { next: 0, objects, ready: VecDeque::new(), left: infos.len(), failed: None };
        Self { infos, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next thing to do; waits until there is one, and is `None` when there will be none.
    pub(super) fn next(&self) -> Option<Task<'a>> {
        let mut state = self.lock();
        loop {
            if state.failed.is_some() || state.left == 0 {
                return None;
            }
            if let Some((number, written)) = state.ready.pop_front() {
                return Some(Task::Info(number, written));
            }
            let number = state.next;
            if let Some(info) = self.infos.get(number) {
                state.next += 1;
                return Some(Task::Nar(number, info));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// An archive is in the cache.
    pub(super) fn arrived(&self, number: usize, written: Written) {
        let mut state = self.lock();
        if let Some(object) = state.objects.get_mut(number) {
            object.written = Some(Box::new(written));
        }
        state.wake(number);
        self.changed.notify_all();
    }

    /// An object is told of.
    pub(super) fn told(&self, number: usize) {
        let mut state = self.lock();
        state.left -= 1;
        let referrers = state.objects.get_mut(number).map(|object| std::mem::take(&mut object.referrers));
        for referrer in referrers.unwrap_or_default() {
            if let Some(object) = state.objects.get_mut(referrer) {
                object.references -= 1;
            }
            state.wake(referrer);
        }
        self.changed.notify_all();
    }

    /// Something went wrong: nothing more is begun.
    pub(super) fn fail(&self, error: CacheError) {
        self.lock().failed.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Held by a thread that works: one that panics leaves nobody waiting for it.
    pub(super) fn watch(&self) -> Watch<'_, 'a> {
        Watch(self)
    }

    /// What came of it all. What refers to itself by way of others cannot be told of in any order;
    /// no store has that.
    pub(super) fn finish(self) -> Result<(), CacheError> {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).failed.map_or(Ok(()), Err)
    }
}

/// Ends everything if its thread panics.
pub(super) struct Watch<'q, 'a>(&'q Queue<'a>);

impl Drop for Watch<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().left = 0;
            self.0.changed.notify_all();
        }
    }
}

impl State {
    fn wake(&mut self, number: usize) {
        let Some(object) = self.objects.get_mut(number).filter(|object| object.references == 0) else { return };
        if let Some(written) = object.written.take() {
            self.ready.push_back((number, written));
        }
    }
}

#[cfg(test)]
mod tests {
    use larder_core::hash::Sha256Digest;
    use larder_core::narinfo::NarInfo;
    use proptest::prelude::*;

    use super::*;

    fn info(number: usize, references: &[usize]) -> PathInfo {
        let path = |n: usize| format!("{n:032}-x").parse().unwrap();
        let mut info = PathInfo::new(path(number), Sha256Digest([0; 32]), 1);
        info.references = references.iter().map(|n| path(*n)).collect();
        info
    }

    fn written(info: &PathInfo) -> Written {
        let (info, url, compression) = (info.clone(), String::new(), String::new());
        Written { info: NarInfo { info, url, compression, file_hash: None, file_size_bytes: None }, listing: None }
    }

    proptest! {
        /// Whoever is slow, and however objects refer to each other: all are told of, each after
        /// its archive and after what it refers to.
        #[test]
        fn the_order_is_never_wrong(
            graph in prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 0..4), 1..20),
            slow in prop::collection::vec(any::<prop::sample::Index>(), 60),
        ) {
            // Each refers to itself, to one that is not among them, or to those before it.
            let infos: Vec<PathInfo> = graph.iter().enumerate().map(|(n, references)| {
                let references: Vec<usize> = references.iter().map(|index| match index.index(n + 2) {
                    m if m == n + 1 => 99,
                    m => m,
                }).collect();
                info(n, &references)
            }).collect();
            let queue = Queue::new(&infos);
            let (mut told, mut arrived, mut begun) = (vec![false; infos.len()], vec![false; infos.len()], Vec::new());
            let mut slow = slow.into_iter();
            loop {
                // As many are begun as can be without waiting; then one of them ends.
                while {
                    let state = queue.lock();
                    !state.ready.is_empty() || state.next < infos.len()
                } {
                    begun.push(queue.next().unwrap());
                }
                if begun.is_empty() {
                    break;
                }
                let at = slow.next().map_or(0, |index| index.index(begun.len()));
                match begun.swap_remove(at) {
                    Task::Nar(n, info) => {
                        prop_assert!(!std::mem::replace(&mut arrived[n], true));
                        queue.arrived(n, written(info));
                    }
                    Task::Info(n, what) => {
                        prop_assert!(arrived[n] && what.info.info.path == infos[n].path);
                        for (m, before) in infos.iter().enumerate().filter(|(m, _)| *m != n) {
                            prop_assert!(!infos[n].references.contains(&before.path) || told[m], "{m} before {n}");
                        }
                        prop_assert!(!std::mem::replace(&mut told[n], true));
                        queue.told(n);
                    }
                }
            }
            prop_assert!(told.iter().all(|told| *told));
            prop_assert!(queue.next().is_none());
        }
    }
}
