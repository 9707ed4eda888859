//! Who builds how much on which machine: locks that all processes of a store share.
//!
//! `STATE/current-load` has a file for each slot of a machine, locked as long as a build has it;
//! one by which processes choose one after another; and one for each machine, by which they send
//! their inputs there one after another. Shared with Nix; source: building, section 11.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use larder_core::machines::{Choice, Machine, Needs, choose};
use larder_fs::file_error::{At as _, FileError};
use larder_fs::lock_file::{LockFile, Sharing, Wait};
use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

/// How often it is looked whether a lock has come free that one can stop waiting for.
const LOOK_UP: Duration = Duration::from_millis(50);

/// The slots of all machines.
#[derive(Debug)]
pub struct Slots {
    dir: PathBuf,
}

/// What is to become of a build.
#[derive(Debug)]
pub enum Slot {
    /// The machine of this number builds it, as long as the lock is held.
    Taken(usize, LockFile),
    /// All machines that suit it are busy.
    Busy,
    /// None suits it.
    None,
}

/// How waiting for one's turn to send something ended.
#[derive(Debug)]
pub enum Turn {
    Ours(LockFile),
    /// Somebody has it for too long.
    TooLong,
    Cancelled,
}

impl Slots {
    /// Those of a store with this state directory.
    pub fn open(state: &Path) -> Result<Self, FileError> {
        let dir = state.join("current-load");
        match std::fs::create_dir_all(&dir) {
            Ok(()) => Ok(Self { dir }),
            Err(error) => Err(FileError::new("creating directory", &dir, error)),
        }
    }

    /// Takes a slot of the machine that suits a build best, but for those that are out of order.
    pub fn take(&self, machines: &[Machine], out_of_order: &BTreeSet<usize>, needs: &Needs) -> Result<Slot, FileError> {
        let main = LockFile::open(&self.dir.join("main-lock"))?;
        // Nobody has it for longer than this takes.
        main.lock(Sharing::Exclusive, &mut Wait::Yes(&mut |_| {}))?;
        let mut free: Vec<Option<LockFile>> = Vec::new();
        free.resize_with(machines.len(), || None);
        let mut error = None;
        let choice = choose(machines, needs, |number| {
            let machine = machines.get(number).filter(|_| !out_of_order.contains(&number))?;
            match self.load(machine) {
                Ok((load, slot)) => {
                    if let Some(free) = free.get_mut(number) {
                        *free = slot;
                    }
                    Some(load)
                }
                Err(failed) => {
                    error.get_or_insert(failed);
                    None
                }
            }
        });
        if let Some(error) = error {
            return Err(error);
        }
        let Choice::Take(number) = choice else {
            return Ok(if choice == Choice::Busy { Slot::Busy } else { Slot::None });
        };
        let Some(slot) = free.get_mut(number).and_then(Option::take) else { return Ok(Slot::Busy) };
        // When it was last used is what people see of it.
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let times = Timestamps { last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }, last_modification: now };
        rustix::fs::futimens(&slot, &times).at("setting the time of", slot.path())?;
        Ok(Slot::Taken(number, slot))
    }

    /// How many slots of a machine are taken, and one that is not.
    fn load(&self, machine: &Machine) -> Result<(u32, Option<LockFile>), FileError> {
        let (mut load, mut free) = (0, None);
        for number in 0..machine.max_jobs {
            let slot = LockFile::open(&self.dir.join(format!("{}-{number}", machine.file_name())))?;
            if !slot.lock(Sharing::Exclusive, &mut Wait::No)? {
                load += 1;
            } else if free.is_none() {
                free = Some(slot);
            }
        }
        Ok((load, free))
    }

    /// Waits until nobody else sends anything to a machine, but not for longer than so long.
    pub fn turn(
        &self,
        machine: &Machine,
        at_most: Duration,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<Turn, FileError> {
        let lock = LockFile::open(&self.dir.join(format!("{}.upload-lock", machine.file_name())))?;
        let since = Instant::now();
        while !lock.lock(Sharing::Exclusive, &mut Wait::No)? {
            if is_cancelled() {
                return Ok(Turn::Cancelled);
            }
            if since.elapsed() >= at_most {
                return Ok(Turn::TooLong);
            }
            std::thread::sleep(LOOK_UP);
        }
        Ok(Turn::Ours(lock))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines(text: &str) -> Vec<Machine> {
        larder_core::machines::parse(text, "s", &mut |_| Ok(None)).unwrap()
    }

    #[test]
    fn slots_are_taken_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let slots = Slots::open(dir.path()).unwrap();
        let machines = machines("ssh://u@a - - 2\nb - - 1 2");
        let needs = Needs { system: "s".to_owned(), ..Needs::default() };
        let take = |out: &[usize]| slots.take(&machines, &out.iter().copied().collect(), &needs).unwrap();
        let mut held = Vec::new();
        for wanted in [1, 0, 0] {
            match take(&[]) {
                Slot::Taken(number, lock) => {
                    assert_eq!(number, wanted);
                    held.push(lock);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(take(&[]), Slot::Busy));
        // Names that real Nix knows, too.
        let mut names: Vec<String> = std::fs::read_dir(dir.path().join("current-load"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["main-lock", "ssh:__b-0", "ssh:__u@a-0", "ssh:__u@a-1"]);
        held.remove(1);
        assert!(matches!(take(&[0]), Slot::Busy), "the one that is left is busy");
        assert!(matches!(take(&[0, 1]), Slot::None));
        assert!(matches!(take(&[]), Slot::Taken(0, _)));
        let needs = Needs { system: "t".to_owned(), ..Needs::default() };
        assert!(matches!(slots.take(&machines, &BTreeSet::new(), &needs).unwrap(), Slot::None));
    }

    #[test]
    fn one_sends_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let slots = Slots::open(dir.path()).unwrap();
        let [machine] = machines("h").try_into().unwrap();
        let ours = slots.turn(&machine, Duration::ZERO, &|| false).unwrap();
        assert!(matches!(ours, Turn::Ours(_)));
        assert!(matches!(slots.turn(&machine, Duration::ZERO, &|| false).unwrap(), Turn::TooLong));
        assert!(matches!(slots.turn(&machine, Duration::from_hours(1), &|| true).unwrap(), Turn::Cancelled));
        drop(ours);
        assert!(matches!(slots.turn(&machine, Duration::ZERO, &|| false).unwrap(), Turn::Ours(_)));
    }
}
