//! Which of the goals that could run do: slots, goals that make the same, goals that wait for other
//! processes, and goals that wait for each other.

use std::collections::{HashMap, HashSet};

use larder_core::derivation::OutputName;
use larder_core::store_path::StorePath;

use super::error::GoalError;
use super::goal::{Goal, Id, Key, State};
use super::{Action, Notice, Plan, Stop, Success};
use crate::job::Mode;

/// Where something is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Here,
    Elsewhere { willing: bool },
}

impl Plan {
    pub(super) fn make_ready(&mut self, id: Id) {
        let goal = self.goal_mut(id);
        goal.state = State::Ready;
        let entry = (goal.key.clone(), id);
        match entry.0 {
            Key::Path(_) => drop(self.ready_paths.insert(entry)),
            Key::Derivation(_) => match self.may_delegate(id) {
                Some(needs) => self.elsewhere.wait(needs, entry),
                None => drop(self.ready_derivations.insert(entry)),
            },
        }
    }

    /// Lets a goal wait for another process, and tells so the first time.
    pub(super) fn park(&mut self, id: Id, notice: Notice) {
        match notice {
            Notice::WaitsForUser { .. } => self.parked_for_user.push(id),
            _ => self.parked.push(id),
        }
        self.goal_mut(id).state = State::Parked;
        self.poll_later(id, notice);
    }

    /// Looks again after some time, and tells why the first time.
    pub(super) fn poll_later(&mut self, id: Id, notice: Notice) {
        if !std::mem::replace(&mut self.goal_mut(id).told_parked, true) {
            self.actions.push(Action::Tell(notice));
        }
        if !self.polling {
            self.polling = true;
            self.actions.push(Action::PollLater);
        }
    }

    /// Is there a slot for a build here? A build that is offered to others has one until they answer.
    const fn has_slot(&self) -> bool {
        let offered = if self.elsewhere.holds_slot() { 1 } else { 0 };
        self.running_builds + offered < self.options.max_jobs
    }

    /// Starts what may start: paths first, then derivations, each in order. What others may do is
    /// offered to them first.
    pub(super) fn start_ready(&mut self) {
        if self.asked_here > 0 {
            return;
        }
        while self.stop.is_none() {
            let fetch = self.running_fetches < self.options.max_fetches.max(1) && !self.ready_paths.is_empty();
            if fetch && let Some((_, id)) = self.ready_paths.pop_first() {
                self.start(id, Place::Here);
            } else if let Some(id) = self.elsewhere.next() {
                if self.may_delegate(id).is_none() {
                    // It is to be repaired now.
                    self.ready_or_unsupported(id);
                    continue;
                }
                let willing = self.has_slot() && self.facts(id).unsupported.is_none();
                self.start(id, Place::Elsewhere { willing });
            } else if self.has_slot()
                && let Some((_, id)) = self.ready_derivations.pop_first()
            {
                self.start(id, Place::Here);
            } else {
                return;
            }
        }
    }

    /// Runs a goal, unless another makes, or has made, the same.
    fn start(&mut self, id: Id, place: Place) {
        let goal = self.goal(id);
        let beaten = goal.makes().find(|path| self.making.contains_key(*path)).cloned();
        if let Some(path) = beaten {
            self.goal_mut(id).state = State::Beaten;
            self.making.entry(path).or_default().push(id);
            return;
        }
        if goal.mode == Mode::Normal {
            let there = match goal.key {
                Key::Path(ref path) => self.made.contains(path),
                Key::Derivation(_) => goal.missing().all(|(_, path)| self.made.contains(path)),
            };
            if there {
                self.finish(id, Ok(Success::AlreadyValid));
                return;
            }
        }
        for path in self.goal(id).makes().cloned().collect::<Vec<_>>() {
            self.making.insert(path, Vec::new());
        }
        let goal = self.goal_mut(id);
        goal.state = if place == Place::Here { State::Running } else { State::Offered };
        goal.restart = false;
        goal.served = goal.wanted.clone();
        let (mode, wanted) = (goal.mode, goal.wanted.clone());
        let action = match &goal.key {
            Key::Path(path) => {
                let (path, substituter) = (path.clone(), goal.at);
                self.running_fetches += 1;
                Action::Fetch { path, substituter, replace: mode == Mode::Repair }
            }
            Key::Derivation(drv) => {
                let drv = drv.clone();
                match place {
                    Place::Here => {
                        self.running_builds += 1;
                        Action::Build { drv, wanted, mode }
                    }
                    Place::Elsewhere { willing } => {
                        self.elsewhere.offer(willing);
                        Action::Delegate { drv, wanted, willing }
                    }
                }
            }
        };
        self.actions.push(action);
    }

    /// A goal no longer runs, and made some outputs: those it beat look again.
    pub(super) fn release(&mut self, id: Id, made: impl Fn(Option<&OutputName>) -> bool) {
        let goal = self.goal(id);
        let paths: Vec<(StorePath, bool)> = match &goal.key {
            Key::Path(path) => vec![(path.clone(), made(None))],
            Key::Derivation(_) => {
                goal.outputs.iter().map(|(name, known)| (known.path.clone(), made(Some(name)))).collect()
            }
        };
        for (path, made) in paths {
            for beaten in self.making.remove(&path).unwrap_or_default() {
                self.make_ready(beaten);
            }
            if made {
                self.made.insert(path);
            }
        }
    }

    /// Is there nothing that could bring things forward?
    pub(super) fn is_stuck(&self) -> bool {
        self.stop.is_none()
            && self.tops_left > 0
            && self.running() == 0
            && self.asked_here + self.asked_there == 0
            && self.parked.is_empty()
            && self.parked_for_user.is_empty()
            && self.elsewhere.is_empty()
    }

    /// Either there are no slots, or goals wait for each other: paths that a substituter says
    /// refer to each other, or a store that somebody damaged.
    pub(super) fn break_deadlock(&mut self) -> bool {
        if !self.ready_derivations.is_empty() {
            self.stop(Stop::NoJobs);
            return false;
        }
        let waits = |goal: &Goal| goal.result.is_none() && goal.state != State::Beaten;
        let Some(start) = self.goals.iter().position(waits) else { return false };
        // From whom to whom: any one that is not done, until we come by a second time.
        let mut awaits: HashMap<Id, Id> = HashMap::new();
        for (goal, number) in self.goals.iter().zip(0..) {
            if goal.result.is_none() {
                let current = goal.waiters.iter().filter(|w| self.goal(w.id).waiting.epoch == w.epoch);
                awaits.extend(current.map(|waiter| (waiter.id, number)));
            }
        }
        let mut at = Id::try_from(start).expect("goals have numbers of this type");
        let mut seen = HashSet::new();
        while seen.insert(at) {
            match awaits.get(&at) {
                Some(next) => at = *next,
                None => break,
            }
        }
        let path = self.goal(at).key.path().clone();
        self.fail(at, GoalError::Cycle { path });
        true
    }
}
