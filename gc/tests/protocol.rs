//! An exhaustive model of `docs/gc-protocol.md`: every order of the steps of collectors, adders and
//! readers, with crashes, on a store of two paths of which the first refers to the second.
//!
//! The claims are those of the real collector ([`Claims`]). Each step of a process is one that others
//! see at once: a lock, a file, a transaction, a rename. What must hold is checked in every state;
//! deliberately broken variants show that the model would notice.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, reason = "tests may panic and talk")]

use larder_gc::hand_over::Claims;
use rustc_hash::FxHashSet;

/// A set of paths.
type Paths = u8;
/// Refers to [`B`].
const A: Paths = 1;
const B: Paths = 2;
const BOTH: Paths = A | B;

/// What is changed from the protocol as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Variant {
    Sound,
    /// As real Nix does: the collector is told first, and then the path goes into the file.
    TellThenAppend,
    /// Validity is tested before there is a root.
    TestThenRoot,
    /// The collector does not publish what it is deleting.
    NoPending,
    /// It deletes files first and forgets them then.
    FilesFirst,
    /// It reads the ledger before the temporary roots.
    EarlySnapshot,
    /// It does not look at claims that came after the roots were read.
    DeafCollector,
}

/// All that a set keeps, by a ledger with these paths.
fn closure(from: Paths, valid: Paths) -> Paths {
    if from & valid & A != 0 { from | B } else { from }
}

fn each(paths: Paths) -> impl Iterator<Item = Paths> + Clone {
    [A, B].into_iter().filter(move |path| paths & path != 0)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Role {
    /// Adds A, and B before it if that is not there; makes a link to A at the end.
    Adder,
    /// Adds B only, and goes.
    Lesser,
    /// Looks whether A is there, and uses it.
    Reader,
}

/// On the way to a temporary root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Asking {
    Start,
    /// Has the collector's lock shared.
    Shared,
    /// Found the lock taken, and is about to tell the collector.
    Telling,
    /// Sent the path and waits for the answer.
    Waiting,
    /// Has the answer, and the file has not got the path yet ([`Variant::TellThenAppend`]).
    Answered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Step {
    /// Wants a root for this path, and then tests it.
    Root(Paths, Asking),
    /// [`Variant::TestThenRoot`]: has tested already, and found this.
    Late(Paths, Asking, bool),
    Test(Paths),
    /// The path is not valid: its files come.
    Rename(Paths),
    Register(Paths),
    Link,
    /// Relies on what it has found.
    Using,
    Gone,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct User {
    role: Role,
    step: Step,
    /// What its file of temporary roots says.
    file: Paths,
    /// What it has found valid under a root, or registered.
    relies: Paths,
}

impl User {
    fn new(role: Role) -> Self {
        let first = if role == Role::Reader { A } else { B };
        Self { role, step: Step::Root(first, Asking::Start), file: 0, relies: 0 }
    }

    fn has_shared(&self) -> bool {
        matches!(self.step, Step::Root(_, Asking::Shared) | Step::Late(_, Asking::Shared, _))
    }

    /// What it waits for an answer about.
    fn waits_for(&self) -> Option<Paths> {
        match self.step {
            Step::Root(path, Asking::Waiting) | Step::Late(path, Asking::Waiting, _) => Some(path),
            _ => None,
        }
    }

    /// Where it goes on with a path that is valid and rooted.
    fn after(&self, path: Paths) -> Step {
        match (self.role, path) {
            (Role::Adder, B) => Step::Root(A, Asking::Start),
            (Role::Adder, _) => Step::Link,
            _ => Step::Using,
        }
    }
}

/// What a collector has decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Plan {
    /// Entries that are to go.
    invalid: Paths,
    dead: Paths,
    /// The snapshot of the ledger.
    valid: Paths,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Sweep {
    Idle,
    Locked,
    Listening,
    /// [`Variant::EarlySnapshot`]
    Early(Paths),
    HasTemporary(Paths),
    HasLedger {
        roots: Paths,
        valid: Paths,
    },
    HasLinks {
        roots: Paths,
        valid: Paths,
    },
    Deciding(Plan),
    /// These are published as pending ...
    Begun(Paths, Plan),
    /// ... are not valid any more (or, in [`Variant::FilesFirst`], have no files) ...
    Half(Paths, Plan),
    /// ... and are gone.
    Swept(Plan),
    Closed,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    /// Whole entries of the store directory.
    files: Paths,
    valid: Paths,
    links: Paths,
    /// While a collector listens.
    claims: Option<Claims<u8>>,
    locked: bool,
    sweep: Sweep,
    runs_left: u8,
    crashes_left: u8,
    users: Vec<User>,
}

type Label = &'static str;
type Next = Vec<(Label, World)>;

impl World {
    fn new(roles: &[Role], (files, valid, links): (Paths, Paths, Paths)) -> Self {
        Self {
            files,
            valid,
            links,
            claims: None,
            locked: false,
            sweep: Sweep::Idle,
            runs_left: 2,
            crashes_left: 1,
            users: roles.iter().map(|role| User::new(*role)).collect(),
        }
    }

    fn next(&self, variant: Variant) -> Next {
        let mut all = Vec::new();
        self.collector(variant, &mut all);
        for n in 0..self.users.len() {
            self.user(n, variant, &mut all);
        }
        if self.crashes_left > 0 {
            self.crashes(&mut all);
        }
        all
    }

    fn sweeps(&self, label: Label, sweep: Sweep, change: impl FnOnce(&mut Self)) -> (Label, Self) {
        let mut next = Self { sweep, ..self.clone() };
        change(&mut next);
        (label, next)
    }

    fn collector(&self, variant: Variant, all: &mut Next) {
        let next = match self.sweep {
            Sweep::Idle if self.runs_left > 0 && !self.users.iter().any(User::has_shared) => {
                self.sweeps("collector locks", Sweep::Locked, |w| {
                    w.runs_left -= 1;
                    w.locked = true;
                })
            }
            Sweep::Idle => return,
            Sweep::Locked => self.sweeps("collector listens", Sweep::Listening, |w| w.claims = Some(Claims::default())),
            Sweep::Listening if variant == Variant::EarlySnapshot => {
                self.sweeps("collector reads the ledger", Sweep::Early(self.valid), |_| {})
            }
            Sweep::Listening | Sweep::Early(_) => {
                let roots = self.users.iter().fold(0, |all, user| all | user.file);
                let sweep = match self.sweep {
                    Sweep::Early(valid) => Sweep::HasLedger { roots, valid },
                    _ => Sweep::HasTemporary(roots),
                };
                self.sweeps("collector reads temporary roots", sweep, |w| {
                    let claims = w.claims.as_mut().unwrap();
                    for path in each(roots) {
                        claims.claim(path);
                    }
                })
            }
            Sweep::HasTemporary(roots) => {
                self.sweeps("collector reads the ledger", Sweep::HasLedger { roots, valid: self.valid }, |_| {})
            }
            Sweep::HasLedger { roots, valid } => {
                // A link to what the ledger does not know is no root.
                let roots = roots | self.links & valid;
                self.sweeps("collector reads links", Sweep::HasLinks { roots, valid }, |_| {})
            }
            Sweep::HasLinks { roots, valid } => {
                let live = closure(roots, valid);
                let plan = Plan { invalid: self.files & !valid & !roots, dead: valid & !live, valid };
                self.sweeps("collector reads the directory", Sweep::Deciding(plan), |_| {})
            }
            Sweep::Deciding(plan) => return self.decide(variant, plan, all),
            // The ledger refuses while a valid path outside refers to it.
            Sweep::Begun(batch, plan) if batch & plan.valid & B != 0 && self.valid & A & !batch != 0 => {
                let plan = Plan { dead: plan.dead & !B, ..plan };
                self.sweeps("ledger refuses", Sweep::Deciding(plan), |w| w.claims.as_mut().unwrap().end())
            }
            Sweep::Begun(batch, plan) if variant == Variant::FilesFirst => {
                self.sweeps("collector moves files aside", Sweep::Half(batch, plan), |w| w.files &= !batch)
            }
            Sweep::Begun(batch, plan) => {
                self.sweeps("collector forgets", Sweep::Half(batch, plan), |w| w.valid &= !(batch & plan.valid))
            }
            Sweep::Half(batch, plan) if variant == Variant::FilesFirst => {
                self.sweeps("collector forgets", Sweep::Swept(plan), |w| w.valid &= !(batch & plan.valid))
            }
            Sweep::Half(batch, plan) => {
                self.sweeps("collector moves files aside", Sweep::Swept(plan), |w| w.files &= !batch)
            }
            Sweep::Swept(plan) => self.sweeps("collector says it is done", Sweep::Deciding(plan), |w| {
                w.claims.as_mut().unwrap().end();
            }),
            Sweep::Closed => self.sweeps("collector unlocks", Sweep::Idle, |w| w.locked = false),
        };
        all.push(next);
    }

    /// Invalid entries one by one, then dead paths: together, or referrers first.
    fn decide(&self, variant: Variant, plan: Plan, all: &mut Next) {
        for path in each(plan.invalid) {
            let left = Plan { invalid: plan.invalid & !path, ..plan };
            all.push(("collector takes an invalid entry", self.clone().begin(variant, path, left)));
        }
        if plan.invalid != 0 {
            return;
        }
        let mut world = self.clone();
        let mut dead = plan.dead;
        if variant != Variant::DeafCollector {
            let new = world.claims.as_mut().unwrap().take_new();
            new.into_iter().filter(|path| plan.dead & path != 0).for_each(|path| dead &= !closure(path, plan.valid));
        }
        if dead == 0 {
            all.push(world.sweeps("collector stops listening", Sweep::Closed, |w| w.claims = None));
            return;
        }
        let left = |batch: Paths| Plan { dead: dead & !batch, ..plan };
        all.push(("collector takes all dead paths", world.clone().begin(variant, dead, left(dead))));
        if dead == BOTH {
            all.push(("collector takes a dead path", world.begin(variant, A, left(A))));
        }
    }

    fn begin(mut self, variant: Variant, batch: Paths, left: Plan) -> Self {
        let may = match variant {
            Variant::DeafCollector | Variant::NoPending => true,
            _ => self.claims.as_mut().unwrap().begin(each(batch)),
        };
        self.sweep = if may { Sweep::Begun(batch, left) } else { Sweep::Deciding(left) };
        self
    }

    fn steps(&self, n: usize, label: Label, step: Step, change: impl FnOnce(&mut Self)) -> (Label, Self) {
        let mut next = self.clone();
        next.users[n].step = step;
        change(&mut next);
        (label, next)
    }

    /// Its temporary roots end with it.
    fn leaves(&self, n: usize, label: Label) -> (Label, Self) {
        self.steps(n, label, Step::Gone, |w| (w.users[n].file, w.users[n].relies) = (0, 0))
    }

    fn user(&self, n: usize, variant: Variant, all: &mut Next) {
        let user = &self.users[n];
        let next = match user.step {
            Step::Root(path, Asking::Start) if variant == Variant::TestThenRoot => {
                let found = self.valid & path != 0;
                self.steps(n, "user tests, too early", Step::Late(path, Asking::Start, found), |_| {})
            }
            Step::Root(path, asking) => {
                return self.ask(n, variant, (path, asking), |asking| Step::Root(path, asking), Step::Test(path), all);
            }
            Step::Late(path, asking, found) => {
                let done = if found { user.after(path) } else { Step::Rename(path) };
                return self.ask(n, variant, (path, asking), |asking| Step::Late(path, asking, found), done, all);
            }
            Step::Test(path) if self.valid & path != 0 => {
                self.steps(n, "user finds it valid", user.after(path), |w| w.users[n].relies |= path)
            }
            Step::Test(_) if user.role == Role::Reader => self.leaves(n, "user finds nothing and goes"),
            Step::Test(path) => self.steps(n, "user finds nothing", Step::Rename(path), |_| {}),
            Step::Rename(path) => self.steps(n, "user puts files there", Step::Register(path), |w| w.files |= path),
            Step::Register(path) => self.steps(n, "user registers", user.after(path), |w| {
                w.valid |= path;
                w.users[n].relies |= path;
            }),
            Step::Link => self.steps(n, "user makes a link", Step::Using, |w| w.links |= A),
            Step::Using => self.leaves(n, "user goes"),
            Step::Gone => return,
        };
        all.push(next);
    }

    /// A step on the way to a temporary root, after which it is `done`.
    fn ask(
        &self,
        n: usize,
        variant: Variant,
        (path, asking): (Paths, Asking),
        step: impl Fn(Asking) -> Step,
        done: Step,
        all: &mut Next,
    ) {
        let append = |w: &mut Self| w.users[n].file |= path;
        let early = variant != Variant::TellThenAppend;
        let answered = if early { done } else { step(Asking::Answered) };
        all.push(match asking {
            Asking::Start if !self.locked => self.steps(n, "user takes the lock shared", step(Asking::Shared), |_| {}),
            Asking::Start if early => {
                self.steps(n, "user finds the lock taken, writes to its file", step(Asking::Telling), append)
            }
            Asking::Start => self.steps(n, "user finds the lock taken", step(Asking::Telling), |_| {}),
            Asking::Shared => self.steps(n, "user writes to its file and unlocks", done, append),
            Asking::Telling | Asking::Waiting if self.claims.is_none() => {
                // Nobody listens: look at the lock again. While it is taken that changes nothing.
                if self.locked && asking == Asking::Telling {
                    return;
                }
                self.steps(n, "user looks at the lock again", step(Asking::Start), |_| {})
            }
            Asking::Telling => {
                let mut at_once = false;
                let (label, mut next) = self.steps(n, "user tells the collector", step(Asking::Waiting), |w| {
                    at_once = w.claims.as_mut().unwrap().claim(path);
                });
                if at_once {
                    next.users[n].step = answered;
                }
                (label, next)
            }
            Asking::Waiting if self.claims.as_ref().is_some_and(|claims| claims.is_pending(path)) => return,
            Asking::Waiting => self.steps(n, "user is answered", answered, |_| {}),
            Asking::Answered => self.steps(n, "user writes to its file", done, append),
        });
    }

    fn crashes(&self, all: &mut Next) {
        if self.sweep != Sweep::Idle {
            all.push(self.sweeps("collector is killed", Sweep::Idle, |w| {
                w.crashes_left -= 1;
                (w.claims, w.locked) = (None, false);
            }));
        }
        for n in (0..self.users.len()).filter(|n| self.users[*n].step != Step::Gone) {
            let (label, mut next) = self.leaves(n, "user is killed");
            next.crashes_left -= 1;
            all.push((label, next));
        }
    }

    /// What must not be, in any state.
    fn fault(&self) -> Option<&'static str> {
        if self.valid & !self.files != 0 {
            return Some("a valid path has no files");
        }
        if self.valid & BOTH == A {
            return Some("a valid path refers to one that is not");
        }
        if self.links & !self.valid != 0 {
            return Some("a link keeps nothing");
        }
        for user in &self.users {
            if user.relies & !self.valid != 0 {
                return Some("a path that somebody relies on has gone");
            }
            if let Step::Register(path) = user.step
                && self.files & path == 0
            {
                return Some("files that somebody is about to register have gone");
            }
            let deleting = matches!(self.sweep, Sweep::Begun(..) | Sweep::Half(..) | Sweep::Swept(_));
            let pending = |path| self.claims.as_ref().is_some_and(|claims| claims.is_pending(path));
            if !deleting && user.waits_for().is_some_and(pending) {
                return Some("somebody waits for longer than one batch");
            }
        }
        None
    }

    /// Has nobody anything left to do?
    fn is_over(&self) -> bool {
        self.sweep == Sweep::Idle && self.users.iter().all(|user| user.step == Step::Gone)
    }
}

/// What a search has found.
struct Searched {
    states: usize,
    steps: usize,
    fault: Option<(&'static str, Vec<Label>)>,
}

/// Goes through all states that can be reached, nearest first.
fn search(start: World, variant: Variant) -> Searched {
    let mut known: FxHashSet<World> = FxHashSet::default();
    let mut came: Vec<(usize, Label)> = vec![(0, "start")];
    let mut worlds = vec![start.clone()];
    known.insert(start);
    let (mut at, mut steps) = (0, 0);
    while at < worlds.len() {
        let next = worlds[at].next(variant);
        let stuck = next.is_empty() && !worlds[at].is_over();
        if let Some(fault) = worlds[at].fault().or(stuck.then_some("nobody can go on")) {
            let mut trace = Vec::new();
            while at != 0 {
                trace.push(came[at].1);
                at = came[at].0;
            }
            trace.reverse();
            return Searched { states: worlds.len(), steps, fault: Some((fault, trace)) };
        }
        steps += next.len();
        for (label, world) in next {
            if known.insert(world.clone()) {
                worlds.push(world);
                came.push((at, label));
            }
        }
        at += 1;
    }
    Searched { states: worlds.len(), steps, fault: None }
}

/// Stores to begin with: files, valid, links.
const STARTS: [(Paths, Paths, Paths); 6] =
    [(0, 0, 0), (B, B, 0), (BOTH, BOTH, 0), (A, 0, 0), (BOTH, B, 0), (BOTH, BOTH, A)];

const TEAMS: [&[Role]; 5] = [
    &[Role::Adder],
    &[Role::Adder, Role::Reader],
    &[Role::Lesser, Role::Reader],
    &[Role::Adder, Role::Lesser],
    &[Role::Reader, Role::Reader],
];

fn worlds() -> impl Iterator<Item = World> {
    TEAMS.iter().flat_map(|team| STARTS.map(|start| World::new(team, start)))
}

#[test]
fn the_protocol_is_sound() {
    let (mut states, mut steps) = (0, 0);
    for start in worlds() {
        let found = search(start.clone(), Variant::Sound);
        if let Some((fault, trace)) = found.fault {
            panic!("from {start:?}: {fault}\n  {}", trace.join("\n  "));
        }
        states += found.states;
        steps += found.steps;
    }
    println!("gc protocol: {states} states, {steps} steps, {} configurations", worlds().count());
}

/// Each of these has a fault, and the model finds it.
#[test]
fn broken_variants_are_caught() {
    for variant in [
        Variant::TellThenAppend,
        Variant::TestThenRoot,
        Variant::NoPending,
        Variant::FilesFirst,
        Variant::EarlySnapshot,
        Variant::DeafCollector,
    ] {
        let found = worlds().find_map(|start| {
            let found = search(start, variant);
            found.fault.map(|fault| (found.states, fault))
        });
        let (states, (fault, trace)) = found.unwrap_or_else(|| panic!("{variant:?} was not noticed"));
        println!("{variant:?}: {fault}; {states} states, {} steps:", trace.len());
        for step in trace {
            println!("  {step}");
        }
    }
}
