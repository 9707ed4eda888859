//! Cases with a name.

use std::collections::BTreeSet;
use std::sync::Arc;

use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use super::world::{
    Answer, Drv, Has, Realised, Turn, World, drv, failure, floating, name, offered, options, path, target, world,
};
use crate::job::{FailureKind, Mode};
use crate::plan::{Action, Event, GoalError, Key, Notice, Options, Plan, Stop, Success, Target, Wanted};

fn run(world: &mut World, options: Options, targets: &[Target]) -> Plan {
    world.run(options, targets, &mut |_| 0)
}

fn results(plan: &Plan) -> Vec<Result<Success, String>> {
    let dir = StoreDir::new("/s").unwrap();
    let text = |error: Arc<GoalError>| error.text(&dir).to_string();
    plan.ended().map(|ended| ended.result.map_or(Err("given up".into()), |result| result.map_err(text))).collect()
}

fn output<'a>(drv: &'a Drv, text: &str) -> &'a StorePath {
    drv.outputs.get(text).unwrap()
}

fn built(world: &World) -> Vec<String> {
    world.built.iter().map(|(path, _)| path.name().to_string()).collect()
}

#[test]
fn builds_go_by_name_whatever_is_answered_first() {
    let leaves: Vec<Drv> =
        ["d", "baboon", "c", "aardvark"].iter().zip(1..).map(|(n, number)| drv(number, n, &["out"], &[])).collect();
    let inputs: Vec<(&Drv, &[&str])> = leaves.iter().map(|leaf| (leaf, &["out"][..])).collect();
    let top = drv(9, "a-top", &["out"], &inputs);
    for pick in [|_: usize| 0, |many: usize| many - 1] {
        let mut world = self::world(&leaves.iter().chain([&top]).collect::<Vec<_>>());
        let plan = world.run(options(), &[target(&top, &[])], &mut { pick });
        assert_eq!(results(&plan), [Ok(Success::Built)]);
        assert_eq!(built(&world), ["aardvark.drv", "baboon.drv", "c.drv", "d.drv", "a-top.drv"]);
    }
}

#[test]
fn s074_only_wanted_outputs_are_fetched() {
    let d = drv(1, "d", &["out", "dev", "man"], &[]);
    let page = path(50, "page");
    let mut world = self::world(&[&d]);
    for own in d.outputs.values() {
        world.caches.insert(own.clone(), vec![offered(&[&page, own])]);
    }
    world.caches.insert(page.clone(), vec![offered(&[])]);
    let plan = run(&mut world, options(), &[target(&d, &["man"])]);
    assert_eq!(results(&plan), [Ok(Success::Substituted)]);
    assert_eq!(world.fetched, [page, output(&d, "man").clone()]);
    assert_eq!(world.asked, 2);
}

/// Nobody is asked for what may not be substituted, also where somebody has it; its input may be.
#[test]
fn s052_what_may_not_be_fetched_is_built() {
    let dep = drv(1, "dep", &["out"], &[]);
    let mut own = drv(2, "own", &["out"], &[(&dep, &["out"])]);
    own.allow_substitutes = false;
    let mut world = self::world(&[&dep, &own]);
    for output in [output(&dep, "out"), output(&own, "out")] {
        world.caches.insert(output.clone(), vec![offered(&[])]);
    }
    let plan = run(&mut world, options(), &[target(&own, &[])]);
    assert_eq!(results(&plan), [Ok(Success::Built)]);
    assert_eq!((built(&world), &world.fetched), (vec!["own.drv".to_owned()], &vec![output(&dep, "out").clone()]));
    assert_eq!(world.asked, 1);
}

/// Two consumers, one of which comes when the fetch for the other is over, or under way.
#[test]
fn s075_a_second_consumer_wants_another_output() {
    let d = drv(1, "d", &["out", "dev", "man"], &[]);
    let slow = drv(2, "slow", &["out"], &[]);
    let mut one = drv(3, "one", &["out"], &[(&d, &["man"])]);
    let mut middle = drv(4, "middle", &["out"], &[(&slow, &["out"])]);
    let mut two = drv(5, "two", &["out"], &[(&middle, &["out"]), (&d, &["dev"])]);
    one.allow_substitutes = false;
    middle.allow_substitutes = false;
    two.allow_substitutes = false;
    for seed in 0..40_usize {
        let mut world = self::world(&[&d, &slow, &one, &middle, &two]);
        for own in d.outputs.values() {
            world.caches.insert(own.clone(), vec![offered(&[])]);
        }
        let mut n = seed;
        let mut pick = |many: usize| {
            n = n.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            (n >> 16) % many
        };
        let targets = [target(&one, &[]), target(&two, &[])];
        let plan = world.run(Options { max_jobs: 3, ..options() }, &targets, &mut pick);
        assert_eq!(results(&plan), [Ok(Success::Built), Ok(Success::Built)]);
        let fetched: BTreeSet<&StorePath> = world.fetched.iter().collect();
        assert_eq!(fetched, BTreeSet::from([output(&d, "man"), output(&d, "dev")]));
        assert!(!built(&world).contains(&"d.drv".to_owned()));
    }
    let mut world = self::world(&[&d]);
    for own in d.outputs.values() {
        world.caches.insert(own.clone(), vec![offered(&[])]);
    }
    run(&mut world, options(), &[target(&d, &["man"]), target(&d, &["dev"])]);
    assert_eq!(world.fetched.len(), 2);
}

/// The output can be had once what it refers to is built.
#[test]
fn an_incomplete_closure_is_fetched_after_the_inputs_are_built() {
    let mut dep = drv(1, "dep", &["out"], &[]);
    dep.allow_substitutes = false;
    let top = drv(2, "top", &["out"], &[(&dep, &["out"])]);
    let mut world = self::world(&[&dep, &top]);
    world.caches.insert(output(&top, "out").clone(), vec![offered(&[output(&dep, "out")])]);
    let plan = run(&mut world, options(), &[target(&top, &[])]);
    assert_eq!(results(&plan), [Ok(Success::Substituted)]);
    assert_eq!(built(&world), ["dep.drv"]);
    assert_eq!(world.fetched, [output(&top, "out").clone()]);
    // Where the references never come the builder helps.
    let nowhere = path(77, "nowhere");
    let mut world = self::world(&[&dep, &top]);
    world.caches.insert(output(&top, "out").clone(), vec![offered(&[&nowhere])]);
    let plan = run(&mut world, options(), &[target(&top, &[])]);
    assert_eq!(results(&plan), [Ok(Success::Built)]);
    assert!(world.notices.is_empty(), "{:?}", world.notices);
}

#[test]
fn a_substituter_that_fails_is_a_failure_without_fallback() {
    let d = drv(1, "d", &["out"], &[]);
    let own = output(&d, "out").clone();
    let bad = |turn| super::world::Has::It { references: BTreeSet::new(), fetched: turn };
    for (caches, fallback, expected) in [
        (vec![bad(Turn::Fails(FailureKind::Misc))], false, Err(())),
        (vec![bad(Turn::Fails(FailureKind::Misc))], true, Ok(Success::Built)),
        (vec![bad(Turn::Fails(FailureKind::Misc)), offered(&[])], false, Ok(Success::Substituted)),
        (vec![super::world::Has::Error, offered(&[])], false, Err(())),
        (vec![super::world::Has::Error, offered(&[])], true, Ok(Success::Substituted)),
        // Gone: as if nobody had it.
        (vec![super::world::Has::Gone { references: BTreeSet::new() }], false, Ok(Success::Built)),
        (vec![super::world::Has::Nothing, bad(Turn::Locked)], false, Ok(Success::Substituted)),
    ] {
        let mut world = self::world(&[&d]);
        world.caches.insert(own.clone(), caches.clone());
        let plan = run(&mut world, Options { fallback, ..options() }, &[target(&d, &[])]);
        let result = results(&plan).remove(0);
        if let Err(text) = &result {
            assert_eq!(
                text,
                &format!(
                    "some substitutes for the outputs of derivation '/s/{}' failed (usually happens due to \
                     networking issues); try '--fallback' to build derivation from source",
                    d.path
                )
            );
        }
        assert_eq!(result.map_err(|_| ()), expected, "{caches:?} {fallback}");
    }
}

#[test]
fn s054_nobody_is_asked_where_there_is_nobody() {
    let d = drv(1, "d", &["out"], &[]);
    let mut world = self::world(&[&d]);
    let plan = run(&mut world, Options { has_substituters: false, ..options() }, &[target(&d, &[])]);
    assert_eq!((results(&plan), world.asked), (vec![Ok(Success::Built)], 0));
}

#[test]
fn one_fixed_output_of_two_derivations_is_made_once() {
    let a = drv(1, "a", &["out"], &[]);
    let mut b = drv(2, "b", &["out"], &[]);
    b.outputs = a.outputs.clone();
    for (max_jobs, turns) in [(1, vec![]), (2, vec![]), (2, vec![Turn::Fails(FailureKind::HashMismatch)])] {
        let mut first = a.clone();
        let fails = !turns.is_empty();
        first.turns = turns.into();
        let mut world = self::world(&[&first, &b]);
        let options = Options { max_jobs, keep_going: true, ..options() };
        let plan = run(&mut world, options, &[target(&a, &[]), target(&b, &[])]);
        assert_eq!(world.built.len(), 1);
        assert_eq!(results(&plan).iter().filter(|r| r.is_err()).count(), usize::from(fails));
    }
}

#[test]
fn failures_are_told_once_and_counted() {
    let mut bad = drv(1, "bad", &["out"], &[]);
    bad.turns = [Turn::Fails(FailureKind::Permanent)].into();
    let mut worse = drv(2, "worse", &["out"], &[]);
    worse.turns = [Turn::Fails(FailureKind::TimedOut)].into();
    let top = drv(3, "top", &["out"], &[(&bad, &["out"]), (&worse, &["out"])]);
    let other = drv(4, "other", &["out"], &[(&bad, &["out"])]);
    let fine = drv(5, "zfine", &["out"], &[]);
    for (keep_going, count, expected) in [(true, 2, Ok(Success::Built)), (false, 1, Err("given up".to_owned()))] {
        let mut world = self::world(&[&bad, &worse, &top, &other, &fine]);
        let targets = [target(&top, &[]), target(&other, &[]), target(&fine, &[])];
        let options = Options { keep_going, has_substituters: false, ..options() };
        let plan = run(&mut world, options, &targets);
        let results = results(&plan);
        let text = |drv: &Drv, n| format!("{n} dependencies of derivation '/s/{}' failed to build", drv.path);
        let failed = [text(&top, count), text(&other, 1)];
        let got: Vec<&String> = results.iter().filter_map(|r| r.as_ref().err()).filter(|t| *t != "given up").collect();
        assert!(got.iter().all(|text| failed.contains(text)) && !got.is_empty(), "{got:?}");
        assert_eq!(results.get(2), Some(&expected));
        let told = world.notices.iter().filter(|n| matches!(n, Notice::Failed(_))).count();
        assert_eq!(told, count);
        assert_eq!(plan.stopped(), (!keep_going).then_some(Stop::Failed));
    }
}

#[test]
fn what_is_declared_wrongly_hurts_nobody_else() {
    let d = drv(1, "d", &["out"], &[]);
    let wrong = drv(2, "wrong", &["out"], &[(&d, &["nope"])]);
    let right = drv(3, "right", &["out"], &[(&d, &["out"])]);
    let mut lost = drv(4, "lost", &["out"], &[]);
    lost.valid = false;
    let mut elsewhere = drv(5, "elsewhere", &["out"], &[]);
    elsewhere.supported = false;
    let mut sourceless = drv(6, "sourceless", &["out"], &[]);
    sourceless.sources.insert(path(99, "source"));
    let all = [&d, &wrong, &right, &lost, &elsewhere, &sourceless];
    let mut targets: Vec<Target> = all.iter().map(|drv| target(drv, &[])).collect();
    targets.push(target(&d, &["out", "x"]));
    for substitute in [true, false] {
        let mut world = self::world(&all);
        let plan = run(&mut world, Options { keep_going: true, substitute, ..options() }, &targets);
        let source = if substitute {
            format!("1 dependencies of derivation '/s/{}' failed to build", sourceless.path)
        } else {
            format!(
                "dependency '/s/{}' of '/s/{}' does not exist, and substitution is disabled",
                path(99, "source"),
                sourceless.path
            )
        };
        assert_eq!(
            results(&plan),
            [
                Ok(Success::Built),
                Err(format!(
                    "derivation '/s/{}' requires non-existent output 'nope' from input derivation '/s/{}'",
                    wrong.path, d.path
                )),
                Ok(Success::Built),
                Err(format!("cannot build missing derivation '/s/{}'", lost.path)),
                Err("another system".into()),
                Err(source),
                Err(format!("derivation '/s/{}' does not have wanted outputs 'x'", d.path)),
            ]
        );
        assert!(matches!(world.notices.as_slice(), [Notice::Failed(_)]) == substitute, "{:?}", world.notices);
    }
}

#[test]
fn without_slots_only_fetching_goes_on() {
    let mut d = drv(1, "d", &["out"], &[]);
    d.allow_substitutes = false;
    let e = drv(2, "e", &["out"], &[]);
    let mut world = self::world(&[&d, &e]);
    world.caches.insert(output(&e, "out").clone(), vec![offered(&[])]);
    let plan = run(&mut world, Options { max_jobs: 0, ..options() }, &[target(&d, &[]), target(&e, &[])]);
    assert_eq!(results(&plan), [Err("given up".into()), Ok(Success::Substituted)]);
    assert_eq!(plan.stopped(), Some(Stop::NoJobs));
}

#[test]
fn s031_only_what_is_built_can_be_checked() {
    let d = drv(1, "d", &["out", "dev"], &[]);
    let mut world = self::world(&[&d]);
    world.valid.insert(output(&d, "out").clone());
    let check = Options { mode: Mode::Check, ..options() };
    let plan = run(&mut world, check, &[target(&d, &[])]);
    let text = format!("some outputs of '/s/{}' are not valid, so checking is not possible", d.path);
    assert_eq!(results(&plan), [Err(text)]);
    world.valid.insert(output(&d, "dev").clone());
    let plan = run(&mut world, check, &[target(&d, &[])]);
    assert_eq!((results(&plan), world.built.len()), (vec![Ok(Success::Built)], 1));
}

#[test]
fn s079_repair_covers_the_output_closure() {
    let dep = drv(1, "dep", &["out", "dev"], &[]);
    let top = drv(2, "top", &["out"], &[(&dep, &["out"])]);
    let source = path(50, "source");
    let everything = [output(&dep, "out"), output(&dep, "dev"), output(&top, "out"), &source];
    let repair = Options { mode: Mode::Repair, ..options() };
    for (damaged, rebuilt, expected) in [
        (vec![], vec![], Ok(Success::AlreadyValid)),
        (vec![output(&dep, "out")], vec!["dep.drv"], Ok(Success::AlreadyValid)),
        (vec![output(&top, "out"), output(&dep, "out")], vec!["dep.drv", "top.drv"], Ok(Success::Built)),
        (
            vec![&source],
            vec![],
            Err(format!("some paths in the output closure of derivation '/s/{}' could not be repaired", top.path)),
        ),
    ] {
        let mut world = self::world(&[&dep, &top]);
        world.valid.extend(everything.iter().map(|path| (*path).clone()));
        world.damaged.extend(damaged.into_iter().cloned());
        let plan = run(&mut world, repair, &[target(&top, &[])]);
        assert_eq!(results(&plan), [expected]);
        assert_eq!(built(&world), rebuilt);
    }
}

#[test]
fn paths_that_refer_to_each_other_are_an_error() {
    let (a, b) = (path(1, "a"), path(2, "b"));
    let mut world = World::default();
    world.caches.insert(a.clone(), vec![offered(&[&b])]);
    world.caches.insert(b, vec![offered(&[&a])]);
    let plan = run(&mut world, options(), &[Target { key: Key::Path(a), wanted: Wanted::All }]);
    assert!(matches!(plan.ended().next().unwrap().result, Some(Err(_))));
}

#[test]
fn an_interrupt_stops_everything() {
    let mut d = drv(1, "d", &["out"], &[]);
    d.turns = [Turn::Hangs].into();
    let mut plan = Plan::new(options());
    plan.step(Event::Realise(vec![target(&d, &[]), target(&drv(2, "e", &["out"], &[]), &[])]));
    let answer = |d: &Drv| {
        let known = |path: &StorePath| crate::plan::Known { path: path.clone(), valid: false };
        d.outputs.iter().map(|(name, path)| (name.clone(), known(path))).collect()
    };
    let actions = plan.step(Event::Outputs { drv: d.path.clone(), answer: Ok(Some(answer(&d))) });
    assert!(matches!(actions.as_slice(), [Action::AskInputs { .. }]));
    plan.step(Event::Outputs { drv: path(2, "e.drv"), answer: Err(failure(FailureKind::Misc)) });
    assert_eq!(plan.stopped(), Some(Stop::Failed));
    assert!(!plan.is_done());
    plan.step(Event::Inputs { drv: d.path, answer: Ok(crate::plan::Facts::default()) });
    assert!(plan.is_done());
    let mut plan = Plan::new(options());
    plan.step(Event::Realise(vec![target(&drv(2, "e", &["out"], &[]), &[])]));
    assert!(plan.step(Event::Interrupt).is_empty());
    assert_eq!(plan.stopped(), Some(Stop::Interrupted));
}

/// Each derivation is looked at once and read once, and each is started once.
#[test]
fn ten_thousand_goals() {
    let leaves: Vec<Drv> = (0..10_000).map(|number| drv(number, "leaf", &["out"], &[])).collect();
    let inputs: Vec<(&Drv, &[&str])> = leaves.iter().map(|leaf| (leaf, &["out"][..])).collect();
    let top = drv(20_000, "top", &["out"], &inputs);
    let mut world = self::world(&leaves.iter().chain([&top]).collect::<Vec<_>>());
    let options = Options { has_substituters: false, max_jobs: 2, ..options() };
    let plan = run(&mut world, options, &[target(&top, &[])]);
    assert_eq!(results(&plan), [Ok(Success::Built)]);
    assert_eq!((world.built.len(), world.looked, plan.count()), (10_001, 20_002, (10_001, 10_001)));
}

/// A chain of a hundred thousand: no deep stack, and each is looked at once.
#[test]
fn a_long_chain() {
    let mut all = vec![drv(0, "d", &["out"], &[])];
    for number in 1..100_000 {
        let mut next = drv(number, "d", &["out"], &[(all.last().unwrap(), &["out"])]);
        next.outputs = [(name("out"), path(1_000_000 + number, "o"))].into();
        all.push(next);
    }
    let first = all.first_mut().unwrap();
    first.turns = [Turn::Fails(FailureKind::Permanent)].into();
    let top = target(all.last().unwrap(), &[]);
    let options = Options { has_substituters: false, ..options() };
    let mut world = self::world(&all.iter().collect::<Vec<_>>());
    let plan = run(&mut world, options, &[top]);
    assert_eq!(plan.count(), (100_000, 100_000));
}

/// A derivation whose outputs are known by what it becomes; two recipes that become the same build
/// once, and what is above them is built from where the outputs are then.
#[test]
fn derivations_become_others_when_their_inputs_are_there() {
    let low = drv(1, "low", &["out"], &[]);
    let becomes = drv(2, "real", &["out", "dev"], &[]);
    let mut one = drv(3, "one", &["out", "dev"], &[(&low, &["out"])]);
    let mut two = drv(4, "two", &["out", "dev"], &[(&low, &["out"])]);
    one.becomes = Some(becomes.path.clone());
    two.becomes = Some(becomes.path.clone());
    let top = drv(5, "top", &["out"], &[(&one, &["dev"]), (&two, &["out"])]);
    for seed in 0..20_usize {
        let mut world = self::world(&[&low, &becomes, &one, &two, &top]);
        let mut n = seed;
        let mut pick = |many: usize| {
            n = n.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            (n >> 16) % many
        };
        let plan = world.run(Options { max_jobs: 3, ..options() }, &[target(&top, &[]), target(&two, &[])], &mut pick);
        assert_eq!(results(&plan), [Ok(Success::Built), Ok(Success::Built)]);
        assert_eq!(built(&world), ["low.drv", "real.drv", "top.drv"]);
    }
    // What it becomes fails, and so does it.
    let mut bad = becomes.clone();
    bad.turns.push_back(Turn::Fails(FailureKind::Permanent));
    let mut world = self::world(&[&low, &bad, &one]);
    let plan = run(&mut world, options(), &[target(&one, &[])]);
    assert_eq!(results(&plan), [Err(format!("build of '/s/{}' failed", one.path))]);
    assert_eq!(world.notices.len(), 1);
}

/// What others have built is fetched and noted; its inputs are not looked at.
#[test]
fn what_others_have_built_is_fetched() {
    let below = drv(1, "below", &["out"], &[]);
    let (theirs, page) = (path(800, "theirs"), path(801, "page"));
    let top = floating(drv(2, "top", &["out", "dev"], &[(&below, &["out"])]), &[("out", &theirs)]);
    let mut world = self::world(&[&below, &top]);
    world.caches.insert(theirs.clone(), vec![offered(&[&page])]);
    world.caches.insert(page.clone(), vec![offered(&[])]);
    let plan = run(&mut world, options(), &[target(&top, &["out"])]);
    assert_eq!(results(&plan), [Ok(Success::Substituted)]);
    assert_eq!((built(&world), world.asked_realisations), (vec![], 1));
    assert_eq!((&world.fetched[..], &world.registered[..]), (&[page, theirs][..], &[top.path.clone()][..]));
    // Of another output nobody says anything: it is built, and what is known of the first is left alone.
    let plan = run(&mut world, options(), &[target(&top, &[])]);
    assert_eq!(results(&plan), [Ok(Success::Built)]);
    assert_eq!((built(&world), world.asked_realisations), (vec!["below.drv".to_owned(), "top.drv".to_owned()], 2));
}

#[test]
fn what_others_have_not_built_or_not_well_is_built() {
    let theirs = path(800, "theirs");
    let plain = drv(1, "d", &["out", "dev"], &[]);
    let known = floating(plain.clone(), &[("out", &theirs), ("dev", &path(801, "dev"))]);
    let outputs = |drv: &Drv| match &drv.realised {
        Realised::As(outputs) => outputs.clone(),
        other => panic!("{other:?}"),
    };
    let refused = Drv { realised: Realised::Refused(outputs(&known)), ..known.clone() };
    let (half, nothing) = (floating(plain.clone(), &[("out", &theirs)]), floating(plain.clone(), &[]));
    let forbidden = Drv { allow_substitutes: false, ..known.clone() };
    let silent = options();
    let nobody = Options { has_substituters: false, ..options() };
    let never = Options { substitute: false, ..options() };
    for (drv, options, asked, fetched) in [
        (&known, silent, 1, 2),
        (&refused, silent, 1, 2),
        (&half, silent, 1, 0),
        (&nothing, silent, 1, 0),
        (&forbidden, silent, 0, 0),
        (&known, nobody, 0, 0),
        (&known, never, 0, 0),
    ] {
        let mut world = self::world(&[drv]);
        world.caches.insert(theirs.clone(), vec![offered(&[])]);
        world.caches.insert(path(801, "dev"), vec![offered(&[])]);
        let plan = run(&mut world, options, &[target(drv, &[])]);
        let is_refused = matches!(drv.realised, Realised::Refused(_));
        let is_theirs = asked == 1 && fetched == 2 && !is_refused;
        let how = if is_theirs { Success::Substituted } else { Success::Built };
        assert_eq!(results(&plan), [Ok(how)], "{:?}", drv.realised);
        assert_eq!((world.asked_realisations, world.fetched.len()), (asked, fetched), "{:?}", drv.realised);
        assert_eq!(world.notices.len(), usize::from(is_refused));
    }
}

#[test]
fn who_does_not_say_what_was_built_is_a_failure_without_fallback() {
    let theirs = path(800, "theirs");
    let plain = drv(1, "d", &["out"], &[]);
    let silent = Drv { realised: Realised::Error, ..plain.clone() };
    let known = floating(plain, &[("out", &theirs)]);
    for drv in [&silent, &known] {
        for fallback in [false, true] {
            let mut world = self::world(&[drv]);
            let fails = Has::It { references: BTreeSet::new(), fetched: Turn::Fails(FailureKind::Misc) };
            world.caches.insert(theirs.clone(), vec![fails]);
            let plan = run(&mut world, Options { fallback, ..options() }, &[target(drv, &[])]);
            let result = results(&plan).remove(0);
            if fallback {
                assert_eq!(result, Ok(Success::Built));
            } else {
                assert!(result.unwrap_err().contains("try '--fallback'"));
            }
            assert!(world.notices.iter().any(|notice| matches!(notice, Notice::Substituter(_))));
        }
    }
    // What nobody has any more is built, whatever was said of it.
    let mut world = self::world(&[&known]);
    let plan = run(&mut world, options(), &[target(&known, &[])]);
    assert_eq!((results(&plan).remove(0), world.notices.len()), (Ok(Success::Built), 0));
}

fn many(count: usize) -> Vec<Drv> {
    (1..=count).map(|number| drv(number, &format!("d{number:02}"), &["out"], &[])).collect()
}

/// A world where so many builds can be done elsewhere at a time.
fn with_machine(room_elsewhere: usize, drvs: &[&Drv]) -> World {
    let mut world = self::world(drvs);
    world.room_elsewhere = room_elsewhere;
    world
}

fn delegating(max_jobs: u32) -> Options {
    Options { delegates: true, max_jobs, has_substituters: false, ..options() }
}

/// What others take needs no slot here, and what they have no room for is built here.
#[test]
fn builds_elsewhere_take_no_slot() {
    let drvs = many(4);
    let mut world = with_machine(2, &drvs.iter().collect::<Vec<_>>());
    // All that can begin does before anything ends.
    for drv in world.drvs.values_mut() {
        drv.turns.push_back(Turn::Hangs);
    }
    let mut plan = Plan::new(delegating(1));
    let targets = drvs.iter().map(|drv| target(drv, &[])).collect();
    let mut running = (0, 0);
    let mut events = vec![Event::Realise(targets)];
    while let Some(event) = events.pop() {
        let actions = plan.step(event);
        let mut todo = Vec::new();
        world.take(&delegating(1), actions, &mut todo);
        for action in todo {
            match action {
                Action::Build { .. } => running.0 += 1,
                action => events.push(world.answer(&delegating(1), action)),
            }
        }
        running.1 = world.elsewhere.len();
    }
    assert_eq!(running, (1, 2));
    assert_eq!(world.offers, 4);
}

#[test]
fn what_nobody_takes_is_built_here() {
    let mut drvs = many(2);
    drvs[0].answers.push_back(Answer::Decline);
    drvs[1].answers.push_back(Answer::DeclineForever);
    let mut world = with_machine(1, &[&drvs[0], &drvs[1]]);
    let plan = run(&mut world, delegating(1), &[target(&drvs[0], &[]), target(&drvs[1], &[])]);
    assert_eq!(results(&plan), [Ok(Success::Built), Ok(Success::Built)]);
    assert_eq!((world.offers, world.built_elsewhere.len()), (2, 0));
    // With no slots it is built nowhere.
    let mut world = with_machine(1, &[&drvs[0]]);
    let plan = run(&mut world, delegating(0), &[target(&drvs[0], &[])]);
    assert_eq!(plan.stopped(), Some(Stop::NoJobs));
    // Nor is what this machine cannot build.
    drvs[0].supported = false;
    let mut world = with_machine(1, &[&drvs[0]]);
    let plan = run(&mut world, delegating(1), &[target(&drvs[0], &[])]);
    assert_eq!(results(&plan), [Err("another system".into())]);
    // Which it does not even look at if it must be repaired.
    let mut world = with_machine(1, &[&drvs[0]]);
    let plan = run(&mut world, Options { mode: Mode::Repair, ..delegating(1) }, &[target(&drvs[0], &[])]);
    assert_eq!((results(&plan), world.offers), (vec![Err("another system".into())], 0));
}

/// Busy machines are waited for, and are not asked again for everything that waits.
#[test]
fn what_is_put_off_is_offered_again() {
    let drvs = many(30);
    let mut world = with_machine(1, &drvs.iter().collect::<Vec<_>>());
    let targets: Vec<Target> = drvs.iter().map(|drv| target(drv, &[])).collect();
    // What has just begun is answered first, so that builds last.
    let plan = world.run(delegating(0), &targets, &mut |many| many - 1);
    assert!(results(&plan).iter().all(|result| *result == Ok(Success::Built)));
    assert_eq!(world.built_elsewhere.len(), 30);
    assert!(world.offers <= 60, "{}", world.offers);
    let waits = world.notices.iter().filter(|notice| matches!(notice, Notice::WaitsForMachine { .. })).count();
    assert_eq!(waits, 29, "each says so once");
    // Nothing but time may help.
    let mut drv = drvs[0].clone();
    drv.answers.extend([Answer::Postpone, Answer::Postpone]);
    let mut world = with_machine(1, &[&drv]);
    let plan = run(&mut world, delegating(1), &[target(&drv, &[])]);
    assert_eq!((results(&plan), world.offers), (vec![Ok(Success::Built)], 3));
}

#[test]
fn what_prefers_this_machine_stays() {
    let mut drv = many(1).remove(0);
    drv.prefers_local = true;
    for (max_jobs, supported, offers) in [(1, true, 0), (0, true, 1), (1, false, 1)] {
        drv.supported = supported;
        let mut world = with_machine(1, &[&drv]);
        let plan = run(&mut world, delegating(max_jobs), &[target(&drv, &[])]);
        assert_eq!((results(&plan), world.offers), (vec![Ok(Success::Built)], offers));
    }
}
