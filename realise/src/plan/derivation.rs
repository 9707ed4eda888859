//! What a goal for outputs of a derivation does: the outputs are looked at, then fetched; if
//! that does not help, the inputs are realised and the builder runs. Where paths follow from what is
//! built, others are asked first what they have built. Source: building, section 2; modern, section 2.9.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use larder_core::derivation::OutputName;
use larder_core::store_path::StorePath;

use super::error::{Class, GoalError};
use super::goal::{Again, Id, Key, State, Wanted};
use super::{Action, Built, Facts, Known, Notice, Options, Plan, Success, covers, path_of};
use crate::job::{Failure, FailureKind, Mode};

impl Plan {
    /// The answer to [`Action::AskOutputs`]: steps 1 to 3.
    pub(super) fn outputs(&mut self, id: Id, answer: Result<Option<BTreeMap<OutputName, Known>>, Failure>) {
        if self.stop.is_some() {
            return;
        }
        let drv = path_of(self.goal(id));
        let outputs = match answer {
            Err(failure) => return self.fail(id, GoalError::Failed(Arc::new(failure))),
            Ok(Some(outputs)) => outputs,
            Ok(None) => {
                if !self.options.substitute || !self.options.has_substituters {
                    return self.fail(id, GoalError::MissingDerivation { drv });
                }
                let file = self.want(&Key::Path(drv), &Wanted::All, Mode::Normal);
                return self.wait_for(id, State::FetchingDrv, &[file]);
            }
        };
        let goal = self.goal_mut(id);
        goal.outputs = outputs;
        if std::mem::take(&mut goal.restart) {
            goal.tried_fetch = false;
            // Only what was wanted when we asked was looked at for damage.
            if goal.mode == Mode::Repair {
                return self.ask(id);
            }
        }
        goal.served = goal.wanted.clone();
        let (mode, tried) = (goal.mode, goal.tried_fetch);
        let all_there = goal.missing().next().is_none();
        match mode {
            Mode::Normal if all_there => {
                self.succeed(id, if tried { Success::Substituted } else { Success::AlreadyValid });
            }
            Mode::Repair if all_there => {
                self.goal_mut(id).state = State::Surveying;
                self.asked_here += 1;
                self.actions.push(Action::AskClosure { drv });
            }
            _ if self.goal(id).facts.is_some() => self.fetch_or_build(id),
            _ => {
                self.goal_mut(id).state = State::Reading;
                self.asked_here += 1;
                self.actions.push(Action::AskInputs { drv });
            }
        }
    }

    pub(super) fn drv_fetched(&mut self, id: Id) {
        if self.goal(id).waiting.failed() > 0 {
            let drv = path_of(self.goal(id));
            return self.fail(id, GoalError::MissingDerivation { drv });
        }
        self.ask(id);
    }

    /// The answer to [`Action::AskInputs`].
    pub(super) fn inputs(&mut self, id: Id, answer: Result<Facts, Failure>) {
        if self.stop.is_some() {
            return;
        }
        match answer {
            Err(failure) => self.fail(id, GoalError::Failed(Arc::new(failure))),
            Ok(facts) => {
                self.goal_mut(id).facts = Some(Arc::new(facts));
                self.fetch_or_build(id);
            }
        }
    }

    pub(super) fn facts(&self, id: Id) -> Arc<Facts> {
        Arc::clone(self.goal(id).facts.as_ref().expect("it was read before anything else was done"))
    }

    /// Step 4: only what is wanted and missing is fetched.
    fn fetch_or_build(&mut self, id: Id) {
        if self.goal(id).mode == Mode::Repair && self.goal(id).restart {
            return self.ask(id);
        }
        let Options { substitute, has_substituters, read_only, .. } = self.options;
        let facts = self.facts(id);
        let goal = self.goal_mut(id);
        // What others have built is as good as damaged contents only if it is the same, which nobody knows.
        let asks = facts.asks_realisations && goal.mode != Mode::Repair && !read_only;
        let may = substitute && has_substituters && (facts.allow_substitutes || asks);
        if may && !goal.tried_fetch {
            goal.tried_fetch = true;
            goal.restart = false;
            goal.served = goal.wanted.clone();
            if asks {
                let outputs: BTreeSet<OutputName> = goal.missing().map(|(name, _)| name.clone()).collect();
                if !outputs.is_empty() {
                    goal.state = State::AskingRealisations;
                    let drv = path_of(goal);
                    self.asked_there += 1;
                    self.actions.push(Action::AskRealisations { drv, outputs });
                    return;
                }
            }
            let mode = if goal.mode == Mode::Repair { Mode::Repair } else { Mode::Normal };
            let missing: Vec<StorePath> = goal.missing().map(|(_, path)| path.clone()).collect();
            if !missing.is_empty() {
                let fetches: Vec<Id> =
                    missing.into_iter().map(|path| self.want(&Key::Path(path), &Wanted::All, mode)).collect();
                return self.wait_for(id, State::FetchingOutputs, &fetches);
            }
        }
        self.build_inputs(id);
    }

    /// Step 5.
    pub(super) fn outputs_fetched(&mut self, id: Id) {
        let drv = path_of(self.goal(id));
        if self.goal(id).waiting.real > 0 && !self.options.fallback {
            return self.fail(id, GoalError::Substitutes { drv });
        }
        let only_incomplete = self.only(id, Class::Incomplete);
        let goal = self.goal_mut(id);
        if only_incomplete && goal.again == Again::No {
            goal.again = Again::Due;
        }
        if goal.restart {
            goal.tried_fetch = false;
        }
        self.ask(id);
    }

    /// The answer to [`Action::AskRealisations`]: what others have built is fetched if that is all
    /// that is wanted, for what is built here makes all outputs.
    pub(super) fn realisations(&mut self, id: Id, answer: Result<BTreeMap<OutputName, StorePath>, Failure>) {
        if self.stop.is_some() {
            return;
        }
        let found = match answer {
            Ok(found) => found,
            Err(failure) => {
                self.actions.push(Action::Tell(Notice::Substituter(failure.text.into())));
                if !self.options.fallback {
                    let drv = path_of(self.goal(id));
                    return self.fail(id, GoalError::Substitutes { drv });
                }
                return self.build_inputs(id);
            }
        };
        let goal = self.goal_mut(id);
        if goal.restart {
            goal.tried_fetch = false;
            return self.ask(id);
        }
        if !goal.missing().all(|(name, _)| found.contains_key(name)) {
            return self.build_inputs(id);
        }
        let paths: Vec<StorePath> = found.values().cloned().collect();
        goal.realised = found;
        let fetches: Vec<Id> =
            paths.into_iter().map(|path| self.want(&Key::Path(path), &Wanted::All, Mode::Normal)).collect();
        self.wait_for(id, State::FetchingRealised, &fetches);
    }

    /// What others have built is there, or is not.
    pub(super) fn realised_fetched(&mut self, id: Id) {
        if self.goal(id).waiting.failed() > 0 {
            return self.outputs_fetched(id);
        }
        let goal = self.goal_mut(id);
        goal.state = State::Registering;
        let (drv, outputs) = (path_of(goal), std::mem::take(&mut goal.realised));
        self.asked_here += 1;
        self.actions.push(Action::Register { drv, outputs });
    }

    /// The answer to [`Action::Register`]. What could not be noted is built.
    pub(super) fn registered(&mut self, id: Id, answer: Result<(), Failure>) {
        if self.stop.is_some() {
            return;
        }
        if let Err(failure) = answer {
            self.actions.push(Action::Tell(Notice::Substituter(failure.text.into())));
        }
        let goal = self.goal_mut(id);
        if goal.restart {
            goal.tried_fetch = false;
        }
        self.ask(id);
    }

    /// Step 6, and what stands in its way.
    fn build_inputs(&mut self, id: Id) {
        let facts = self.facts(id);
        let goal = self.goal(id);
        let drv = path_of(goal);
        let goal_mode = goal.mode;
        if goal_mode == Mode::Check && goal.outputs.values().any(|known| !known.valid) {
            return self.fail(id, GoalError::NotAllValid { drv });
        }
        let mode = if goal_mode == Mode::Repair { Mode::Repair } else { Mode::Normal };
        let can_fetch = self.options.substitute;
        if let Some(path) = facts.missing_sources.first().filter(|_| !can_fetch).cloned() {
            return self.fail(id, GoalError::NoSource { drv, path });
        }
        let mut needed = Vec::with_capacity(facts.inputs.len() + facts.missing_sources.len());
        for (input, names) in &facts.inputs {
            let wanted = Wanted::Only(names.clone());
            needed.push(self.want(&Key::Derivation(input.clone()), &wanted, mode));
        }
        for source in &facts.missing_sources {
            needed.push(self.want(&Key::Path(source.clone()), &Wanted::All, Mode::Normal));
        }
        self.wait_for(id, State::AwaitingInputs, &needed);
    }

    /// Step 7; then, or after fetching once more, it may run.
    pub(super) fn inputs_there(&mut self, id: Id) {
        let drv = path_of(self.goal(id));
        let count = self.goal(id).waiting.failed();
        if count > 0 {
            return self.fail(id, GoalError::Dependencies { drv, count });
        }
        let facts = self.facts(id);
        for (input, names) in &facts.inputs {
            let of = self.ids.get(&Key::Derivation(input.clone())).map(|of| &self.goal(*of).outputs);
            if let Some(name) = names.iter().find(|name| of.is_none_or(|outputs| !outputs.contains_key(*name))) {
                let (input, name) = (input.clone(), name.clone());
                return self.fail(id, GoalError::NoSuchInput { drv, input, name });
            }
        }
        if self.goal(id).again == Again::Due {
            let goal = self.goal_mut(id);
            goal.again = Again::Used;
            goal.tried_fetch = false;
            return self.ask(id);
        }
        if facts.resolves {
            let inputs = self.input_paths(&facts);
            self.goal_mut(id).state = State::Resolving;
            self.asked_here += 1;
            self.actions.push(Action::Resolve { drv, inputs });
            return;
        }
        self.ready_or_unsupported(id);
    }

    /// It runs as soon as it can, here or elsewhere; if it can do so nowhere, it fails.
    pub(super) fn ready_or_unsupported(&mut self, id: Id) {
        let unsupported = self.facts(id).unsupported.clone();
        match unsupported.filter(|_| self.may_delegate(id).is_none()) {
            Some(text) => self.fail(id, GoalError::Unsupported { text }),
            None => self.make_ready(id),
        }
    }

    /// Where the outputs of the inputs are, which are all there.
    fn input_paths(&self, facts: &Facts) -> BTreeMap<(StorePath, OutputName), StorePath> {
        let mut paths = BTreeMap::new();
        for (input, names) in &facts.inputs {
            let goal = self.ids.get(&Key::Derivation(input.clone())).map(|of| self.goal(*of));
            for name in names {
                if let Some(known) = goal.and_then(|goal| goal.outputs.get(name)) {
                    paths.insert((input.clone(), name.clone()), known.path.clone());
                }
            }
        }
        paths
    }

    /// The answer to [`Action::Resolve`].
    pub(super) fn resolved(&mut self, id: Id, answer: Result<StorePath, Failure>) {
        if self.stop.is_some() {
            return;
        }
        match answer {
            Err(failure) => self.fail(id, GoalError::Failed(Arc::new(failure))),
            Ok(resolved) => {
                let goal = self.goal(id);
                let (wanted, mode) = (goal.wanted.clone(), goal.mode);
                let other = self.want(&Key::Derivation(resolved), &wanted, mode);
                self.goal_mut(id).resolved = Some(other);
                self.wait_for(id, State::AwaitingResolved, &[other]);
            }
        }
    }

    /// What it has become is built, or not.
    pub(super) fn resolved_there(&mut self, id: Id) {
        let drv = path_of(self.goal(id));
        let other = self.goal(id).resolved.map(|other| self.goal(other));
        let Some(other) = other.filter(|_| self.goal(id).waiting.failed() == 0) else {
            return self.fail(id, GoalError::Resolved { drv });
        };
        let outputs = other.outputs.iter().map(|(name, known)| (name.clone(), known.path.clone())).collect();
        let facts = self.facts(id);
        let inputs = self.input_paths(&facts);
        self.goal_mut(id).state = State::Noting;
        self.asked_here += 1;
        self.actions.push(Action::Realised { drv, outputs, inputs });
    }

    /// The answer to [`Action::Realised`].
    pub(super) fn noted(&mut self, id: Id, answer: Result<BTreeMap<OutputName, Known>, Failure>) {
        match answer {
            Err(failure) => self.fail(id, GoalError::Failed(Arc::new(failure))),
            Ok(outputs) => {
                let other = self.goal(id).resolved.and_then(|other| self.goal(other).result.as_ref()?.as_ref().ok());
                let success = other.copied().unwrap_or(Success::AlreadyValid);
                let goal = self.goal_mut(id);
                goal.served.add(&Wanted::Only(outputs.keys().cloned().collect()));
                goal.outputs = outputs;
                self.succeed(id, success);
            }
        }
    }

    /// It is done, unless someone wanted another output meanwhile.
    fn succeed(&mut self, id: Id, success: Success) {
        if self.stop.is_none() && !covers(self.goal(id)) {
            self.goal_mut(id).tried_fetch = false;
            return self.ask(id);
        }
        self.finish(id, Ok(success));
    }

    pub(super) fn built(&mut self, id: Id, built: Built) {
        match built {
            Built::Valid { outputs, made } => {
                let goal = self.goal_mut(id);
                for (name, path) in outputs {
                    goal.served.add(&Wanted::Only([name.clone()].into()));
                    if let Some(known) = goal.outputs.get_mut(&name) {
                        // Only now is it known where those are whose paths follow from the contents.
                        known.path = path;
                    }
                }
                self.succeed(id, if made { Success::Built } else { Success::AlreadyValid });
            }
            Built::Failed(failure) if failure.kind == FailureKind::Cancelled && self.stop.is_some() => {
                self.goal_mut(id).state = State::Beaten;
            }
            Built::Failed(failure) => self.fail(id, GoalError::Failed(Arc::new(failure))),
            _ if self.stop.is_some() => self.goal_mut(id).state = State::Beaten,
            Built::Locked(path) => self.park(id, Notice::WaitsForLock { path }),
            Built::NoBuildUser => {
                let drv = path_of(self.goal(id));
                self.park(id, Notice::WaitsForUser { drv });
            }
        }
    }

    /// The answer to [`Action::AskClosure`]: step 12.
    pub(super) fn closure(&mut self, id: Id, answer: Result<Vec<(StorePath, Option<StorePath>)>, Failure>) {
        if self.stop.is_some() {
            return;
        }
        let damaged = match answer {
            Err(failure) => return self.fail(id, GoalError::Failed(Arc::new(failure))),
            Ok(damaged) => damaged,
        };
        let repairs: Vec<Id> = damaged
            .into_iter()
            .map(|(path, maker)| {
                let key = maker.map_or(Key::Path(path), Key::Derivation);
                self.want(&key, &Wanted::All, Mode::Repair)
            })
            .collect();
        self.wait_for(id, State::RepairingClosure, &repairs);
    }

    pub(super) fn closure_repaired(&mut self, id: Id) {
        if self.goal(id).waiting.failed() > 0 {
            let drv = path_of(self.goal(id));
            return self.fail(id, GoalError::ClosureNotRepaired { drv });
        }
        let success = if self.goal(id).tried_fetch { Success::Substituted } else { Success::AlreadyValid };
        self.succeed(id, success);
    }
}
