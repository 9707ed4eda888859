//! Builds that others do on other machines: whom it is worth asking, and when.
//!
//! One build at a time is offered, and what comes of the offer is said before the next one is. A
//! build that is accepted takes no slot here. One that is declined is done here, if it can be; for
//! one that all machines are too busy for it is asked again when something has ended, or after
//! some time. What has the same needs is not asked for meanwhile: it would be told the same.
//! Source: building, sections 1.4, 2.11 and 11.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use larder_core::machines::Needs;

use super::goal::{Id, Key, State};
use super::{Delegated, Notice, Plan, path_of};
use crate::job::Mode;

/// What waits for others, and what they do.
#[derive(Debug)]
pub(super) struct Elsewhere {
    /// May anyone be asked at all?
    open_for_all: bool,
    /// What could be offered, by what it needs.
    waiting: BTreeMap<Arc<Needs>, BTreeSet<(Key, Id)>>,
    /// What there is no machine free for just now.
    busy: BTreeSet<Arc<Needs>>,
    /// Is a build offered, and has it a slot here?
    offered: Option<bool>,
    pub(super) running: u32,
}

impl Elsewhere {
    pub(super) const fn new(open_for_all: bool) -> Self {
        Self { open_for_all, waiting: BTreeMap::new(), busy: BTreeSet::new(), offered: None, running: 0 }
    }

    pub(super) fn wait(&mut self, needs: Arc<Needs>, entry: (Key, Id)) {
        self.waiting.entry(needs).or_default().insert(entry);
    }

    /// The next build to offer, if one may be.
    pub(super) fn next(&mut self) -> Option<Id> {
        if self.offered.is_some() {
            return None;
        }
        let able = self.waiting.iter().filter(|(needs, _)| !self.busy.contains(*needs));
        let (_, needs) = able.filter_map(|(needs, entries)| Some((entries.first()?, needs))).min()?;
        let needs = Arc::clone(needs);
        let entries = self.waiting.get_mut(&needs)?;
        let entry = entries.pop_first();
        if entries.is_empty() {
            self.waiting.remove(&needs);
        }
        entry.map(|(_, id)| id)
    }

    pub(super) const fn offer(&mut self, willing: bool) {
        self.offered = Some(willing);
    }

    pub(super) const fn holds_slot(&self) -> bool {
        matches!(self.offered, Some(true))
    }

    /// How many builds somebody else has been told of, and will say something about.
    pub(super) const fn open(&self) -> u32 {
        self.running + if self.offered.is_some() { 1 } else { 0 }
    }

    /// Something has changed: what was too much may be possible.
    pub(super) fn ask_again(&mut self) {
        self.busy.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

impl Plan {
    /// What a machine must be on which a build may be done instead of this one.
    pub(super) fn may_delegate(&self, id: Id) -> Option<Arc<Needs>> {
        let goal = self.goal(id);
        let facts = goal.facts.as_ref()?;
        let stays = facts.prefers_local && facts.unsupported.is_none() && self.options.max_jobs > 0;
        let may = self.elsewhere.open_for_all && !goal.declined && goal.mode == Mode::Normal && !stays;
        facts.needs.clone().filter(|_| may)
    }

    /// The answer to [`super::Action::Delegate`].
    pub(super) fn answered(&mut self, id: Id, answer: Delegated) {
        self.elsewhere.offered = None;
        match answer {
            Delegated::Accepted => {
                self.elsewhere.running += 1;
                self.goal_mut(id).state = State::RunningElsewhere;
            }
            Delegated::Ended(built) => self.ran(id, built),
            Delegated::Declined | Delegated::DeclinedForever | Delegated::Postponed => {
                self.release(id, |_| false);
                if self.stop.is_some() {
                    self.goal_mut(id).state = State::Beaten;
                    return;
                }
                match answer {
                    Delegated::Postponed => {
                        self.elsewhere.busy.extend(self.may_delegate(id));
                        let drv = path_of(self.goal(id));
                        self.poll_later(id, Notice::WaitsForMachine { drv });
                        self.make_ready(id);
                    }
                    Delegated::DeclinedForever => {
                        self.elsewhere.open_for_all = false;
                        let waiting = std::mem::take(&mut self.elsewhere.waiting);
                        self.ready_or_unsupported(id);
                        for (_, other) in waiting.into_values().flatten() {
                            self.ready_or_unsupported(other);
                        }
                    }
                    _ => {
                        self.goal_mut(id).declined = true;
                        self.ready_or_unsupported(id);
                    }
                }
            }
        }
    }
}
