//! What a goal for a path does: someone who has it is looked for, then what it refers to, then
//! it is fetched. Source: building, section 3.

use std::sync::Arc;

use super::error::{Class, GoalError};
use super::goal::{Id, Key, State, Wanted};
use super::{Action, Fetched, Notice, Offer, Plan, Success, path_of};
use crate::job::{FailureKind, Mode};

impl Plan {
    pub(super) fn offer(&mut self, id: Id, offer: Offer) {
        if self.stop.is_some() {
            return;
        }
        let path = path_of(self.goal(id));
        match offer {
            // It was looked at before anyone wanted it repaired.
            Offer::Valid if std::mem::take(&mut self.goal_mut(id).restart) => self.ask(id),
            Offer::Valid => self.finish(id, Ok(Success::AlreadyValid)),
            _ if self.options.read_only => self.fail(id, GoalError::ReadOnly { path }),
            Offer::Nobody => {
                let tried = self.goal(id).bad_try;
                self.fail(id, GoalError::NoSubstituter { path, tried });
            }
            Offer::Error { substituter, failure } => {
                if !self.options.fallback {
                    self.fail(id, GoalError::Failed(Arc::new(failure)));
                    return;
                }
                self.actions.push(Action::Tell(Notice::Substituter(failure.text.into())));
                self.goal_mut(id).at = substituter;
                self.ask_next(id);
            }
            Offer::From { substituter, references } => {
                let mode = self.goal(id).mode;
                self.goal_mut(id).at = substituter;
                let others: Vec<Id> = references
                    .into_iter()
                    .filter(|reference| *reference != path)
                    .map(|reference| self.want(&Key::Path(reference), &Wanted::All, mode))
                    .collect();
                self.wait_for(id, State::AwaitingReferences, &others);
            }
        }
    }

    pub(super) fn references_there(&mut self, id: Id) {
        let waiting = &self.goal(id).waiting;
        if waiting.failed() == 0 {
            self.make_ready(id);
            return;
        }
        let incomplete = waiting.nobody + waiting.incomplete > 0;
        let path = path_of(self.goal(id));
        self.fail(id, GoalError::References { path, incomplete });
    }

    /// Looks for the next one who has it.
    fn ask_next(&mut self, id: Id) {
        let goal = self.goal_mut(id);
        goal.state = State::Asking;
        let verify = goal.mode == Mode::Repair;
        let (path, after) = (path_of(goal), Some(goal.at));
        self.asked_there += 1;
        self.actions.push(Action::AskOffer { path, after, verify });
    }

    pub(super) fn fetched(&mut self, id: Id, fetched: Fetched) {
        match fetched {
            Fetched::Done => self.finish(id, Ok(Success::Substituted)),
            _ if self.stop.is_some() => self.goal_mut(id).state = State::Beaten,
            Fetched::Gone => self.ask_next(id),
            Fetched::Failed(failure) if failure.kind == FailureKind::Cancelled => {
                self.fail(id, GoalError::Failed(Arc::new(failure)));
            }
            Fetched::Failed(failure) => {
                self.actions.push(Action::Tell(Notice::Substituter(failure.text.into())));
                self.goal_mut(id).bad_try = true;
                self.ask_next(id);
            }
            Fetched::Locked(path) => self.park(id, Notice::WaitsForLock { path }),
        }
    }

    /// How many of those waited for failed, and whether all for the same reason.
    pub(super) fn only(&self, id: Id, class: Class) -> bool {
        let waiting = &self.goal(id).waiting;
        let count = match class {
            Class::Nobody => waiting.nobody,
            Class::Incomplete => waiting.incomplete,
            Class::Real => waiting.real,
        };
        count > 0 && count == waiting.failed()
    }
}
