//! What to fetch and what to build, in which order: a pure state machine.
//!
//! [`Plan::step`] takes an [`Event`] and gives [`Action`]s; each action that asks or runs something
//! is answered by one event. Nothing here reads a file or a clock. Goals are kept in a table and
//! refer to each other by number, and what follows from what is worked off a list, so that a
//! chain of a hundred thousand derivations needs no deep stack.
//!
//! - [`exchange`]: options, events and actions;
//! - [`goal`]: what is known of one goal;
//! - `derivation`, `path`: what a goal of either sort does next;
//! - `schedule`: which of those that could run do, and when;
//! - `elsewhere`: which of those are built on other machines;
//! - [`error`]: why it failed.
//!
//! Source: building, sections 1 to 3 and 13.

mod derivation;
mod elsewhere;
pub mod error;
pub mod exchange;
pub mod goal;
mod path;
mod schedule;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use larder_core::store_path::StorePath;

use self::elsewhere::Elsewhere;
use self::error::Class;
pub use self::error::GoalError;
pub use self::exchange::{
    Action, Built, Delegated, Ended, Event, Facts, Fetched, Known, Notice, Offer, Options, Stop, Success, Target,
};
use self::goal::{Goal, Id, State, Waiter};
pub use self::goal::{Key, Wanted};
use crate::job::Mode;

/// The state machine.
#[derive(Debug)]
pub struct Plan {
    options: Options,
    goals: Vec<Goal>,
    ids: HashMap<Key, Id>,
    tops: Vec<(Target, Id)>,
    /// The first so many goals are those of targets.
    top_goals: Id,
    /// How many of these are not done.
    tops_left: usize,
    /// How many goals are done.
    done: usize,
    actions: Vec<Action>,
    /// Goals whose waiting is over.
    woken: Vec<Id>,
    ready_paths: BTreeSet<(Key, Id)>,
    ready_derivations: BTreeSet<(Key, Id)>,
    elsewhere: Elsewhere,
    /// Paths that running goals make, and the goals that must look again after that.
    making: HashMap<StorePath, Vec<Id>>,
    /// Paths that were made in this run.
    made: HashSet<StorePath>,
    running_builds: u32,
    running_fetches: u32,
    /// Questions about this store that are not answered; nothing starts meanwhile, for the order
    /// of what starts must not depend on the order of the answers.
    asked_here: usize,
    /// Questions to substituters.
    asked_there: usize,
    parked: Vec<Id>,
    /// Parked goals that wait for a build user: those may come free in this process.
    parked_for_user: Vec<Id>,
    polling: bool,
    stop: Option<Stop>,
}

impl Plan {
    pub fn new(options: Options) -> Self {
        Self {
            options,
            goals: Vec::new(),
            ids: HashMap::new(),
            tops: Vec::new(),
            top_goals: 0,
            tops_left: 0,
            done: 0,
            actions: Vec::new(),
            woken: Vec::new(),
            ready_paths: BTreeSet::new(),
            ready_derivations: BTreeSet::new(),
            elsewhere: Elsewhere::new(options.delegates),
            making: HashMap::new(),
            made: HashSet::new(),
            running_builds: 0,
            running_fetches: 0,
            asked_here: 0,
            asked_there: 0,
            parked: Vec::new(),
            parked_for_user: Vec::new(),
            polling: false,
            stop: None,
        }
    }

    /// Takes in what happened, and says what to do.
    ///
    /// An answer to a question that was not asked changes nothing.
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Realise(targets) => self.realise(targets),
            Event::Outputs { drv, answer } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::Asking) {
                    self.asked_here -= 1;
                    self.outputs(id, answer);
                }
            }
            Event::Inputs { drv, answer } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::Reading) {
                    self.asked_here -= 1;
                    self.inputs(id, answer);
                }
            }
            Event::Closure { drv, answer } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::Surveying) {
                    self.asked_here -= 1;
                    self.closure(id, answer);
                }
            }
            Event::Resolved { drv, answer } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::Resolving) {
                    self.asked_here -= 1;
                    self.resolved(id, answer);
                }
            }
            Event::Realised { drv, answer } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::Noting) {
                    self.asked_here -= 1;
                    self.noted(id, answer);
                }
            }
            Event::Realisations { drv, answer } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::AskingRealisations) {
                    self.asked_there -= 1;
                    self.realisations(id, answer);
                }
            }
            Event::Registered { drv, answer } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::Registering) {
                    self.asked_here -= 1;
                    self.registered(id, answer);
                }
            }
            Event::Offer { path, offer } => {
                if let Some(id) = self.asked(&Key::Path(path), State::Asking) {
                    self.asked_there -= 1;
                    self.offer(id, offer);
                }
            }
            Event::Fetched { path, fetched } => {
                if let Some(id) = self.asked(&Key::Path(path), State::Running) {
                    self.running_fetches -= 1;
                    self.release(id, |_| matches!(fetched, Fetched::Done));
                    self.fetched(id, fetched);
                }
            }
            Event::Built { drv, built } => {
                if let Some(id) = self.asked(&Key::Derivation(drv), State::Running) {
                    self.running_builds -= 1;
                    for waiting in std::mem::take(&mut self.parked_for_user) {
                        self.make_ready(waiting);
                    }
                    self.ran(id, built);
                }
            }
            Event::Delegated { drv, answer } => {
                let key = Key::Derivation(drv);
                if let Some(id) = self.asked(&key, State::Offered) {
                    self.answered(id, answer);
                } else if let (Some(id), Delegated::Ended(built)) = (self.asked(&key, State::RunningElsewhere), answer)
                {
                    self.elsewhere.running -= 1;
                    self.ran(id, built);
                }
            }
            Event::Poll => {
                self.polling = false;
                self.elsewhere.ask_again();
                let parked = std::mem::take(&mut self.parked).into_iter();
                for id in parked.chain(std::mem::take(&mut self.parked_for_user)) {
                    self.make_ready(id);
                }
            }
            Event::Interrupt => self.stop(Stop::Interrupted),
        }
        loop {
            while let Some(id) = self.woken.pop() {
                self.go_on(id);
            }
            self.start_ready();
            if !self.woken.is_empty() {
                continue;
            }
            if !self.is_stuck() || !self.break_deadlock() {
                break;
            }
        }
        std::mem::take(&mut self.actions)
    }

    /// Is everything done, or given up, and nothing running?
    pub fn is_done(&self) -> bool {
        self.running() == 0 && self.asked_here + self.asked_there == 0 && (self.tops_left == 0 || self.stop.is_some())
    }

    /// Why it ended early, if it did.
    pub const fn stopped(&self) -> Option<Stop> {
        self.stop
    }

    /// How the targets ended, in the order they were given.
    pub fn ended(&self) -> impl Iterator<Item = Ended<'_>> {
        self.tops.iter().map(|(target, id)| {
            let goal = self.goal(*id);
            let result = goal.result.as_ref().map(|result| match result {
                Err(error) => Err(Arc::new(error.clone())),
                Ok(success) => goal.unknown(&target.wanted).map_or(Ok(*success), |error| Err(Arc::new(error))),
            });
            Ended { target, result, told: goal.told }
        })
    }

    /// The errors of all goals that failed, also of those that are no target.
    pub fn errors(&self) -> impl Iterator<Item = &GoalError> {
        self.goals.iter().filter_map(|goal| goal.result.as_ref()?.as_ref().err())
    }

    /// How many derivations and paths there are goals for, and how many of them are done.
    pub fn count(&self) -> (usize, usize) {
        (self.done, self.goals.len())
    }

    fn goal(&self, id: Id) -> &Goal {
        self.goals.get(id as usize).expect("numbers are given out by this plan, and goals are kept")
    }

    fn goal_mut(&mut self, id: Id) -> &mut Goal {
        self.goals.get_mut(id as usize).expect("numbers are given out by this plan, and goals are kept")
    }

    fn asked(&self, key: &Key, state: State) -> Option<Id> {
        self.ids.get(key).copied().filter(|id| self.goal(*id).state == state)
    }

    const fn running(&self) -> u32 {
        self.running_builds + self.running_fetches + self.elsewhere.open()
    }

    /// A build ended, here or elsewhere.
    fn ran(&mut self, id: Id, built: Built) {
        self.release(id, |name| match &built {
            Built::Valid { outputs, .. } => name.is_some_and(|name| outputs.contains_key(name)),
            _ => false,
        });
        // A slot is free now, or a machine.
        self.elsewhere.ask_again();
        self.built(id, built);
    }

    fn realise(&mut self, targets: Vec<Target>) {
        let mode = self.options.mode;
        for target in targets {
            let id = self.want(&target.key, &target.wanted, mode);
            match &mut self.goal_mut(id).named {
                Some(named) => drop(named.add(&target.wanted)),
                named => *named = Some(target.wanted.clone()),
            }
            self.tops.push((target, id));
        }
        self.tops_left = self.goals.len();
        self.top_goals = Id::try_from(self.goals.len()).expect("each goal has such a number");
    }

    /// The goal for something, made or told that more is wanted.
    fn want(&mut self, key: &Key, wanted: &Wanted, mode: Mode) -> Id {
        let Some(&id) = self.ids.get(key) else {
            let id = Id::try_from(self.goals.len()).expect("each goal takes more than a byte of memory");
            self.goals.push(Goal::new(key.clone(), wanted.clone(), mode));
            self.ids.insert(key.clone(), id);
            self.ask(id);
            return id;
        };
        let made = self.made.len();
        let goal = self.goal_mut(id);
        let more = goal.wanted.add(wanted);
        let stricter = goal.mode == Mode::Normal && mode == Mode::Repair;
        if stricter {
            goal.mode = mode;
        }
        let again = match &goal.result {
            Some(Ok(_)) => stricter || (more && !covers(goal)),
            // What nobody had may have been made since. Else what failed stays so.
            Some(Err(error)) => error.class() != Class::Real && goal.made_before < made,
            None => false,
        };
        match goal.state {
            State::Done if again => {
                goal.result = None;
                goal.tried_fetch = false;
                goal.again = goal::Again::No;
                self.tops_left += usize::from(id < self.top_goals);
                self.done -= 1;
                self.ask(id);
            }
            State::Done => {}
            _ => goal.restart |= more || stricter,
        }
        id
    }

    /// Begins with a goal, or begins anew.
    fn ask(&mut self, id: Id) {
        let goal = self.goal_mut(id);
        goal.state = State::Asking;
        goal.restart = false;
        let verify = goal.mode == Mode::Repair;
        let action = match &goal.key {
            Key::Derivation(drv) => {
                Action::AskOutputs { drv: drv.clone(), verify: verify.then(|| goal.wanted.clone()) }
            }
            Key::Path(path) => Action::AskOffer { path: path.clone(), after: None, verify },
        };
        match goal.key {
            Key::Derivation(_) => self.asked_here += 1,
            Key::Path(_) => self.asked_there += 1,
        }
        self.actions.push(action);
    }

    /// Lets a goal wait for others in a state. None to wait for: it goes on at once.
    fn wait_for(&mut self, id: Id, state: State, others: &[Id]) {
        let goal = self.goal_mut(id);
        goal.state = state;
        let epoch = goal.waiting.epoch + 1;
        goal.waiting = goal::Waiting { epoch, ..goal::Waiting::default() };
        let mut left = 0;
        for &other in others {
            match &self.goal(other).result {
                None => {
                    left += 1;
                    self.goal_mut(other).waiters.push(Waiter { id, epoch });
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    let class = error.class();
                    self.tell_failure(other, class, state);
                    self.count_failure(id, class);
                }
            }
        }
        let fast = !self.options.keep_going;
        let goal = self.goal_mut(id);
        goal.waiting.left = left;
        if left == 0 || (fast && goal.waiting.real > 0) {
            goal.waiting.over = true;
            self.woken.push(id);
        }
    }

    fn count_failure(&mut self, id: Id, class: Class) {
        let waiting = &mut self.goal_mut(id).waiting;
        match class {
            Class::Nobody => waiting.nobody += 1,
            Class::Incomplete => waiting.incomplete += 1,
            Class::Real => waiting.real += 1,
        }
    }

    /// Tells of a failed goal that someone needs. That nobody has a path is worth a word only
    /// where there is no other way to get it.
    fn tell_failure(&mut self, id: Id, class: Class, needed: State) {
        let no_other_way = matches!(needed, State::AwaitingInputs | State::AwaitingResolved | State::RepairingClosure);
        if class != Class::Real && !no_other_way {
            return;
        }
        let goal = self.goal_mut(id);
        if goal.told {
            return;
        }
        goal.told = true;
        if let Some(Err(error)) = &goal.result {
            let notice = Notice::Failed(Arc::new(error.clone()));
            self.actions.push(Action::Tell(notice));
        }
    }

    /// A goal is done; whoever waits for it is told.
    fn finish(&mut self, id: Id, result: Result<Success, GoalError>) {
        let class = result.as_ref().err().map(GoalError::class);
        let made = self.made.len();
        self.done += 1;
        let goal = self.goal_mut(id);
        goal.made_before = made;
        goal.state = State::Done;
        goal.result = Some(result);
        for waiter in std::mem::take(&mut goal.waiters) {
            let Waiter { id: who, epoch } = waiter;
            let (state, waiting) = (self.goal(who).state, &self.goal(who).waiting);
            if waiting.epoch != epoch || waiting.over {
                continue;
            }
            if let Some(class) = class {
                self.tell_failure(id, class, state);
                self.count_failure(who, class);
            }
            let fast = !self.options.keep_going && class == Some(Class::Real);
            let waiting = &mut self.goal_mut(who).waiting;
            waiting.left -= 1;
            if waiting.left == 0 || fast {
                waiting.over = true;
                self.woken.push(who);
            }
        }
        if id < self.top_goals {
            self.tops_left -= 1;
            let goal = self.goal(id);
            let bad = class.is_some() || goal.named.as_ref().is_some_and(|named| goal.unknown(named).is_some());
            if bad && !self.options.keep_going {
                self.stop(Stop::Failed);
            }
        }
    }

    fn fail(&mut self, id: Id, error: GoalError) {
        self.finish(id, Err(error));
    }

    /// Nothing starts any more.
    fn stop(&mut self, why: Stop) {
        if self.stop.is_none() {
            self.stop = Some(why);
            if self.running() > 0 {
                self.actions.push(Action::CancelAll);
            }
        }
    }

    /// A goal's waiting is over.
    fn go_on(&mut self, id: Id) {
        if self.stop.is_some() {
            return;
        }
        match self.goal(id).state {
            State::FetchingDrv => self.drv_fetched(id),
            State::FetchingOutputs => self.outputs_fetched(id),
            State::FetchingRealised => self.realised_fetched(id),
            State::AwaitingInputs => self.inputs_there(id),
            State::RepairingClosure => self.closure_repaired(id),
            State::AwaitingResolved => self.resolved_there(id),
            State::AwaitingReferences => self.references_there(id),
            _ => {}
        }
    }
}

fn path_of(goal: &Goal) -> StorePath {
    goal.key.path().clone()
}

/// Was all that is wanted there when the goal was last looked at?
fn covers(goal: &Goal) -> bool {
    match goal.key {
        Key::Path(_) => true,
        Key::Derivation(_) => goal.outputs.keys().all(|name| !goal.wanted.has(name) || goal.served.has(name)),
    }
}
