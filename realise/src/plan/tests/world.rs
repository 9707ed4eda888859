//! A made-up store, with builders and substituters that do as they are told; it carries out what
//! a plan says in any order, and sees that the plan asks for nothing that may not be.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use larder_core::derivation::OutputName;
use larder_core::machines::Needs;
use larder_core::store_path::StorePath;

use crate::job::{Failure, FailureKind, Mode};
use crate::plan::{
    Action, Built, Delegated, Event, Facts, Fetched, Key, Known, Notice, Offer, Options, Plan, Stop, Target, Wanted,
};

pub(super) fn failure(kind: FailureKind) -> Failure {
    Failure { kind, text: format!("{kind:?}") }
}

pub(super) fn name(text: &str) -> OutputName {
    OutputName::new(text).unwrap()
}

pub(super) fn path(number: usize, name: &str) -> StorePath {
    format!("{number:032}-{name}").parse().unwrap()
}

/// How a builder ends when its turn comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    Good,
    Fails(FailureKind),
    Locked,
    NoUser,
    /// Ends only when nothing else goes on, or when it is stopped.
    Hangs,
}

/// What those say who are asked to have something built elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is taken if there is room, and put off if not.
    Sensible,
    Decline,
    DeclineForever,
    Postpone,
    /// Nobody is asked: another process makes it.
    Locked,
    Fails,
}

#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is one way to be odd")]
pub(super) struct Drv {
    pub(super) path: StorePath,
    pub(super) valid: bool,
    pub(super) outputs: BTreeMap<OutputName, StorePath>,
    pub(super) inputs: BTreeMap<StorePath, BTreeSet<OutputName>>,
    pub(super) sources: BTreeSet<StorePath>,
    pub(super) allow_substitutes: bool,
    pub(super) supported: bool,
    pub(super) turns: VecDeque<Turn>,
    /// The answers to offers of it, and `Sensible` from then on.
    pub(super) answers: VecDeque<Answer>,
    pub(super) prefers_local: bool,
    /// Its system.
    pub(super) system: &'static str,
    /// Are outputs that nobody wanted registered as well?
    pub(super) registers_all: bool,
    /// The derivation that it becomes, which has outputs of the same names.
    pub(super) becomes: Option<StorePath>,
    /// Its outputs have paths that nobody knows beforehand; this is what others say of them.
    pub(super) realised: Realised,
}

/// As what others have built outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Realised {
    /// The paths are known beforehand: nobody is to be asked.
    Known,
    As(BTreeMap<OutputName, StorePath>),
    /// Nobody answers as they should.
    Error,
    /// They can be fetched, but not noted.
    Refused(BTreeMap<OutputName, StorePath>),
}

/// What one substituter has of a path.
#[derive(Debug, Clone)]
pub(super) enum Has {
    Nothing,
    Error,
    It {
        references: BTreeSet<StorePath>,
        fetched: Turn,
    },
    /// It says so, but has not.
    Gone {
        references: BTreeSet<StorePath>,
    },
}

#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is something that happened or did not")]
pub(super) struct World {
    pub(super) drvs: BTreeMap<StorePath, Drv>,
    pub(super) valid: HashSet<StorePath>,
    pub(super) damaged: BTreeSet<StorePath>,
    pub(super) caches: HashMap<StorePath, Vec<Has>>,
    // What happened.
    pub(super) built: Vec<(StorePath, Wanted)>,
    pub(super) fetched: Vec<StorePath>,
    pub(super) notices: Vec<Notice>,
    /// Derivations of which was noted as what others have built them.
    pub(super) registered: Vec<StorePath>,
    pub(super) asked: usize,
    /// Questions as what others have built something.
    pub(super) asked_realisations: usize,
    /// Questions about derivations in this store.
    pub(super) looked: usize,
    /// Builds at once elsewhere.
    pub(super) room_elsewhere: usize,
    /// What was built elsewhere, and how often somebody was asked to.
    pub(super) built_elsewhere: Vec<StorePath>,
    pub(super) offers: usize,
    pub(super) elsewhere: HashSet<StorePath>,
    /// What is offered, and how many slots it has here.
    offered: Option<(StorePath, usize)>,
    /// Systems for which all machines were busy, and nothing has changed since.
    busy: HashSet<&'static str>,
    declined: HashSet<StorePath>,
    declined_forever: bool,
    making: HashSet<StorePath>,
    building: usize,
    fetching: usize,
    cancelled: bool,
    /// Did a builder fail?
    failed: bool,
    polling: bool,
}

impl World {
    /// Runs a plan to its end. `pick` says which of so many actions is answered next.
    pub(super) fn run(&mut self, options: Options, targets: &[Target], pick: &mut dyn FnMut(usize) -> usize) -> Plan {
        let mut plan = Plan::new(options);
        let mut todo = Vec::new();
        self.take(&options, plan.step(Event::Realise(targets.to_vec())), &mut todo);
        let limit = 1000 + 400 * (self.drvs.len() + self.caches.len());
        for round in 0.. {
            assert!(round < limit, "it does not end");
            let able: Vec<usize> = (0..todo.len()).filter(|n| !self.hangs(todo.get(*n).unwrap())).collect();
            let action = if !able.is_empty() {
                Some(todo.remove(*able.get(pick(able.len())).unwrap()))
            } else if self.polling {
                None
            } else if let Some(hanging) = todo.pop() {
                Some(hanging)
            } else {
                break;
            };
            let event = if let Some(action) = action {
                let event = self.answer(&options, action.clone());
                if matches!(event, Event::Delegated { answer: Delegated::Accepted, .. }) {
                    // It goes on, and ends some time.
                    todo.push(action);
                }
                event
            } else {
                self.polling = false;
                self.busy.clear();
                Event::Poll
            };
            let actions = plan.step(event);
            self.take(&options, actions, &mut todo);
        }
        assert!(plan.is_done(), "it gave up: {plan:#?}");
        assert_eq!((self.building, self.fetching, self.elsewhere.len()), (0, 0, 0));
        if plan.stopped() == Some(Stop::NoJobs) {
            assert_eq!(options.max_jobs, 0);
        }
        plan
    }

    fn hangs(&self, action: &Action) -> bool {
        match action {
            Action::Build { drv, .. } if !self.cancelled => {
                self.drvs.get(drv).is_some_and(|drv| drv.turns.front() == Some(&Turn::Hangs))
            }
            Action::Delegate { drv, .. } if !self.cancelled && self.elsewhere.contains(drv) => {
                self.drvs.get(drv).is_some_and(|drv| drv.turns.front() == Some(&Turn::Hangs))
            }
            _ => false,
        }
    }

    /// Sees that what is asked for may be.
    pub(super) fn take(&mut self, options: &Options, actions: Vec<Action>, todo: &mut Vec<Action>) {
        for action in actions {
            match &action {
                Action::Tell(notice) => {
                    self.notices.push(notice.clone());
                    continue;
                }
                Action::CancelAll => {
                    self.cancelled = true;
                    continue;
                }
                Action::PollLater => {
                    assert!(!self.polling, "asked for twice");
                    self.polling = true;
                    continue;
                }
                Action::Build { drv, wanted, .. } | Action::Delegate { drv, wanted, .. } => {
                    assert!(!self.cancelled && (options.keep_going || !self.failed), "started after the end");
                    let drv = self.drvs.get(drv).expect("it exists");
                    let mode = if let Action::Build { mode, .. } = &action { *mode } else { Mode::Normal };
                    assert!(drv.valid && drv.becomes.is_none());
                    for (input, names) in &drv.inputs {
                        let outputs = &self.drvs.get(input).expect("inputs exist").outputs;
                        for name in names {
                            let path = outputs.get(name).expect("inputs have these outputs");
                            assert!(self.valid.contains(path), "started before its inputs");
                        }
                    }
                    assert!(drv.sources.iter().all(|source| self.valid.contains(source)), "before its sources");
                    let missing =
                        drv.outputs.iter().filter(|(n, _)| wanted.has(n)).any(|(_, p)| !self.valid.contains(p));
                    assert!(missing || mode != Mode::Normal, "made twice");
                    let own: Vec<StorePath> = drv.outputs.values().cloned().collect();
                    for path in own {
                        assert!(self.making.insert(path), "made twice at once");
                    }
                    let (path, system) = (drv.path.clone(), drv.system);
                    if let Action::Delegate { willing, .. } = &action {
                        assert!(options.delegates && !self.declined_forever && !self.declined.contains(&path));
                        assert!(!(drv.prefers_local && drv.supported && options.max_jobs > 0), "it is to stay here");
                        assert!(!self.busy.contains(system), "asked again though nothing has changed");
                        assert!(!*willing || drv.supported);
                        let slot = usize::from(*willing);
                        assert!(self.building + slot <= options.max_jobs as usize, "there is no slot for it here");
                        assert_eq!(self.offered.replace((path, slot)), None, "two offers at once");
                        self.offers += 1;
                    } else {
                        assert!(drv.supported);
                        self.building += 1;
                        let offered = self.offered.as_ref().map_or(0, |(_, slot)| *slot);
                        assert!(self.building + offered <= options.max_jobs as usize, "too many at once");
                    }
                }
                Action::Fetch { path, substituter, replace } => {
                    assert!(!self.cancelled && (options.keep_going || !self.failed), "started after the end");
                    assert!(*replace || !self.valid.contains(path), "fetched twice");
                    let has = self.caches.get(path).and_then(|caches| caches.get(*substituter));
                    let Some(Has::It { references, .. } | Has::Gone { references }) = has else {
                        panic!("fetched from one that has it not")
                    };
                    for reference in references.iter().filter(|reference| *reference != path) {
                        assert!(self.valid.contains(reference), "fetched before what it refers to");
                    }
                    assert!(self.making.insert(path.clone()), "made twice at once");
                    self.fetching += 1;
                    assert!(self.fetching <= options.max_fetches.max(1) as usize, "too many at once");
                }
                Action::AskRealisations { outputs, .. } => {
                    assert!(options.has_substituters && options.substitute && !options.read_only);
                    assert!(!self.cancelled && !outputs.is_empty());
                    self.asked_realisations += 1;
                }
                Action::AskOffer { .. } => {
                    assert!(options.has_substituters || !self.cancelled);
                    self.asked += 1;
                }
                _ => {}
            }
            todo.push(action);
        }
    }

    pub(super) fn answer(&mut self, options: &Options, action: Action) -> Event {
        match action {
            Action::AskOutputs { drv, verify } => {
                self.looked += 1;
                let found = self.drvs.get(&drv).filter(|found| found.valid || self.valid.contains(&found.path));
                let answer = found.map(|found| {
                    let known = |(name, path): (&OutputName, &StorePath)| {
                        let looked = verify.as_ref().is_some_and(|wanted| wanted.has(name));
                        let valid = self.valid.contains(path) && !(looked && self.damaged.contains(path));
                        (name.clone(), Known { path: path.clone(), valid })
                    };
                    found.outputs.iter().map(known).collect()
                });
                if answer.is_some()
                    && let Some(found) = self.drvs.get_mut(&drv)
                {
                    found.valid = true;
                }
                Event::Outputs { drv, answer: Ok(answer) }
            }
            Action::AskInputs { drv } => {
                self.looked += 1;
                let found = self.drvs.get(&drv).expect("it exists");
                let facts = Facts {
                    inputs: found.inputs.clone(),
                    missing_sources: found.sources.iter().filter(|s| !self.valid.contains(*s)).cloned().collect(),
                    allow_substitutes: found.allow_substitutes && found.realised == Realised::Known,
                    asks_realisations: found.allow_substitutes && found.realised != Realised::Known,
                    unsupported: (!found.supported).then(|| "another system".into()),
                    needs: Some(Needs { system: found.system.to_owned(), ..Needs::default() }.into()),
                    prefers_local: found.prefers_local,
                    resolves: found.becomes.is_some(),
                };
                Event::Inputs { drv, answer: Ok(facts) }
            }
            Action::Resolve { drv, inputs } => {
                let found = self.drvs.get(&drv).expect("it exists");
                for (input, names) in &found.inputs {
                    for name in names {
                        let path = inputs.get(&(input.clone(), name.clone())).expect("each input is named");
                        assert!(self.valid.contains(path), "resolved before its inputs");
                    }
                }
                let becomes = found.becomes.clone().expect("it says that it resolves");
                self.drvs.get_mut(&becomes).expect("it exists").valid = true;
                Event::Resolved { drv, answer: Ok(becomes) }
            }
            Action::Realised { drv, outputs, .. } => {
                let found = self.drvs.get_mut(&drv).expect("it exists");
                assert_eq!(found.outputs.len(), outputs.len());
                found.outputs.clone_from(&outputs);
                let known = |(name, path): (OutputName, StorePath)| {
                    let valid = self.valid.contains(&path);
                    (name, Known { path, valid })
                };
                Event::Realised { drv, answer: Ok(outputs.into_iter().map(known).collect()) }
            }
            Action::AskRealisations { drv, outputs } => self.built_by_others(drv, &outputs),
            Action::Register { drv, outputs } => self.register(drv, outputs),
            Action::AskClosure { drv } => {
                let own = &self.drvs.get(&drv).expect("it exists").outputs;
                let damaged = self.damaged.iter().filter(|path| !own.values().any(|own| own == *path));
                let damaged = damaged.map(|path| (path.clone(), self.maker(path))).collect();
                Event::Closure { drv, answer: Ok(damaged) }
            }
            Action::AskOffer { path, after, verify } => Event::Offer { offer: self.offer(&path, after, verify), path },
            Action::Fetch { path, substituter, .. } => {
                self.making.remove(&path);
                self.fetching -= 1;
                let has = self.caches.get_mut(&path).and_then(|caches| caches.get_mut(substituter));
                let fetched = match has {
                    _ if self.cancelled => Fetched::Failed(failure(FailureKind::Cancelled)),
                    Some(Has::It { fetched: turn @ Turn::Locked, .. }) => {
                        *turn = Turn::Good;
                        Fetched::Locked("lock".into())
                    }
                    Some(Has::It { fetched: Turn::Good, .. }) => {
                        self.valid.insert(path.clone());
                        self.damaged.remove(&path);
                        self.fetched.push(path.clone());
                        Fetched::Done
                    }
                    Some(Has::It { .. }) => Fetched::Failed(failure(FailureKind::Misc)),
                    _ => Fetched::Gone,
                };
                Event::Fetched { path, fetched }
            }
            Action::Build { drv, wanted, mode } => {
                self.building -= 1;
                self.busy.clear();
                let built = self.build(options, &drv, &wanted, mode);
                Event::Built { drv, built }
            }
            Action::Delegate { drv, wanted, willing } => {
                let answer = self.delegate(options, &drv, &wanted, willing);
                Event::Delegated { drv, answer }
            }
            other => panic!("{other:?} has no answer"),
        }
    }

    fn built_by_others(&self, drv: StorePath, outputs: &BTreeSet<OutputName>) -> Event {
        let answer = match &self.drvs.get(&drv).expect("it exists").realised {
            Realised::As(known) | Realised::Refused(known) => {
                let known = known.iter().filter(|(name, _)| outputs.contains(*name));
                Ok(known.map(|(name, path)| (name.clone(), path.clone())).collect())
            }
            Realised::Error => Err(failure(FailureKind::Misc)),
            Realised::Known => panic!("asked for what is known"),
        };
        Event::Realisations { drv, answer }
    }

    fn register(&mut self, drv: StorePath, outputs: BTreeMap<OutputName, StorePath>) -> Event {
        assert!(!outputs.is_empty() && outputs.values().all(|path| self.valid.contains(path)));
        let found = self.drvs.get_mut(&drv).expect("it exists");
        let answer = if matches!(found.realised, Realised::Refused(_)) {
            Err(failure(FailureKind::Misc))
        } else {
            found.outputs.extend(outputs);
            self.registered.push(drv.clone());
            Ok(())
        };
        Event::Registered { drv, answer }
    }

    fn maker(&self, path: &StorePath) -> Option<StorePath> {
        self.drvs.values().find(|drv| drv.outputs.values().any(|own| own == path)).map(|drv| drv.path.clone())
    }

    fn offer(&self, path: &StorePath, after: Option<usize>, verify: bool) -> Offer {
        if self.valid.contains(path) && !(verify && self.damaged.contains(path)) {
            return Offer::Valid;
        }
        let from = after.map_or(0, |after| after + 1);
        for (substituter, has) in self.caches.get(path).into_iter().flatten().enumerate().skip(from) {
            match has {
                Has::Nothing => {}
                Has::Error => return Offer::Error { substituter, failure: failure(FailureKind::Misc) },
                Has::It { references, .. } | Has::Gone { references } => {
                    return Offer::From { substituter, references: references.clone() };
                }
            }
        }
        Offer::Nobody
    }

    fn build(&mut self, options: &Options, path: &StorePath, wanted: &Wanted, mode: Mode) -> Built {
        let drv = self.drvs.get_mut(path).expect("it exists");
        for own in drv.outputs.values() {
            self.making.remove(own);
        }
        if self.cancelled {
            return Built::Failed(failure(FailureKind::Cancelled));
        }
        match drv.turns.pop_front().unwrap_or(Turn::Good) {
            Turn::Locked => Built::Locked("lock".into()),
            Turn::NoUser => Built::NoBuildUser,
            Turn::Hangs => {
                self.failed = true;
                Built::Failed(failure(FailureKind::TimedOut))
            }
            Turn::Fails(kind) => {
                self.failed = true;
                let _ = options;
                Built::Failed(failure(kind))
            }
            Turn::Good => {
                let mut outputs = BTreeMap::new();
                for (name, own) in &drv.outputs {
                    if mode != Mode::Check && (drv.registers_all || wanted.has(name)) {
                        self.valid.insert(own.clone());
                        self.damaged.remove(own);
                        outputs.insert(name.clone(), own.clone());
                    }
                }
                self.built.push((path.clone(), wanted.clone()));
                Built::Valid { outputs, made: true }
            }
        }
    }
}

impl World {
    fn delegate(&mut self, options: &Options, path: &StorePath, wanted: &Wanted, willing: bool) -> Delegated {
        if self.elsewhere.remove(path) {
            self.busy.clear();
            let built = self.build(options, path, wanted, Mode::Normal);
            if matches!(built, Built::Valid { .. }) {
                self.built_elsewhere.push(path.clone());
            }
            return Delegated::Ended(built);
        }
        assert_eq!(self.offered.take().map(|(offered, _)| offered).as_ref(), Some(path));
        let drv = self.drvs.get_mut(path).expect("it exists");
        let mut answer = drv.answers.pop_front().unwrap_or(Answer::Sensible);
        if answer == Answer::Sensible && self.elsewhere.len() >= self.room_elsewhere {
            answer = if willing { Answer::Decline } else { Answer::Postpone };
            if self.room_elsewhere == 0 {
                answer = Answer::Decline;
            }
        }
        let (own, system): (Vec<StorePath>, _) = (drv.outputs.values().cloned().collect(), drv.system);
        if answer == Answer::Sensible {
            self.elsewhere.insert(path.clone());
            return Delegated::Accepted;
        }
        for path in own {
            self.making.remove(&path);
        }
        match answer {
            Answer::Decline => {
                self.declined.insert(path.clone());
                Delegated::Declined
            }
            Answer::DeclineForever => {
                self.declined_forever = true;
                Delegated::DeclinedForever
            }
            Answer::Postpone => {
                self.busy.insert(system);
                Delegated::Postponed
            }
            Answer::Locked => {
                self.busy.clear();
                Delegated::Ended(Built::Locked("lock".into()))
            }
            Answer::Fails | Answer::Sensible => {
                self.busy.clear();
                self.failed = true;
                Delegated::Ended(Built::Failed(failure(FailureKind::Misc)))
            }
        }
    }
}

pub(super) fn options() -> Options {
    Options {
        mode: Mode::Normal,
        substitute: true,
        has_substituters: true,
        fallback: false,
        keep_going: false,
        max_jobs: 1,
        delegates: false,
        max_fetches: 1,
        read_only: false,
    }
}

/// A derivation with these outputs; the others fields as they usually are.
pub(super) fn drv(number: usize, name_text: &str, outputs: &[&str], inputs: &[(&Drv, &[&str])]) -> Drv {
    let own = |text: &&str| (name(text), path(100_000 + number * 10 + text.len(), &format!("{name_text}-{text}")));
    let inputs = inputs.iter().map(|(drv, names)| (drv.path.clone(), names.iter().map(|n| name(n)).collect()));
    Drv {
        path: path(number, &format!("{name_text}.drv")),
        valid: true,
        outputs: outputs.iter().map(own).collect(),
        inputs: inputs.collect(),
        sources: BTreeSet::new(),
        allow_substitutes: true,
        supported: true,
        turns: VecDeque::new(),
        answers: VecDeque::new(),
        prefers_local: false,
        system: "here",
        registers_all: true,
        becomes: None,
        realised: Realised::Known,
    }
}

/// The same with outputs whose paths are known to others only.
pub(super) fn floating(drv: Drv, outputs: &[(&str, &StorePath)]) -> Drv {
    let outputs = outputs.iter().map(|(text, path)| (name(text), (*path).clone())).collect();
    Drv { realised: Realised::As(outputs), ..drv }
}

pub(super) fn world(drvs: &[&Drv]) -> World {
    World { drvs: drvs.iter().map(|drv| (drv.path.clone(), (*drv).clone())).collect(), ..World::default() }
}

pub(super) fn target(drv: &Drv, names: &[&str]) -> Target {
    let wanted = if names.is_empty() { Wanted::All } else { Wanted::Only(names.iter().map(|n| name(n)).collect()) };
    Target { key: Key::Derivation(drv.path.clone()), wanted }
}

pub(super) fn offered(references: &[&StorePath]) -> Has {
    Has::It { references: references.iter().map(|path| (*path).clone()).collect(), fetched: Turn::Good }
}
