//! Properties, over graphs, failures and orders of events of any kind.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use larder_core::derivation::OutputName;
use larder_core::store_path::StorePath;
use proptest::prelude::*;
use proptest::sample::Index;

use super::world::{Answer, Drv, Has, Realised, Turn, World, name, path};
use crate::job::{FailureKind, Mode};
use crate::plan::{Key, Options, Target, Wanted};

const NAMES: [&str; 4] = ["dev", "man", "out", "nope"];

/// What a derivation is made from; numbers are taken modulo what there is.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "each is one way to be odd")]
struct Seed {
    outputs: u8,
    inputs: Vec<(Index, u8)>,
    sources: Vec<Index>,
    turns: Vec<Turn>,
    answers: Vec<Answer>,
    /// Bits: prefers this machine, needs another.
    place: u8,
    /// Bits: outputs valid, outputs damaged.
    valid: u8,
    damaged: u8,
    drv_missing: bool,
    unsupported: bool,
    allow_substitutes: bool,
    registers_all: bool,
    /// Its `out` is that of an earlier one: a fixed output.
    shares: Option<Index>,
    offers: Vec<Vec<(u8, Vec<Index>)>>,
    /// What others say of its outputs, whose paths they alone know; which of them they know.
    realised: Option<(u8, u8)>,
}

fn rarely() -> impl Strategy<Value = bool> {
    prop::bool::weighted(0.07)
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        12 => Just(Turn::Good),
        2 => Just(Turn::Locked),
        2 => Just(Turn::NoUser),
        1 => Just(Turn::Fails(FailureKind::Permanent)),
        1 => Just(Turn::Fails(FailureKind::HashMismatch)),
        1 => Just(Turn::Hangs),
    ]
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        8 => Just(Answer::Sensible),
        3 => Just(Answer::Decline),
        3 => Just(Answer::Postpone),
        1 => Just(Answer::DeclineForever),
        1 => Just(Answer::Locked),
        1 => Just(Answer::Fails),
    ]
}

fn seed() -> impl Strategy<Value = Seed> {
    let graph = (
        1u8..8,
        prop::collection::vec((any::<Index>(), prop_oneof![20 => 1u8..8, 1 => 8u8..16]), 0..4),
        prop::collection::vec(any::<Index>(), 0..2),
        prop::collection::vec(turn(), 0..3),
    );
    let state = (prop_oneof![3 => Just(0u8), 1 => 0u8..8], prop_oneof![3 => Just(0u8), 1 => 0u8..8]);
    let flags = (rarely(), rarely(), prop::bool::weighted(0.8), any::<bool>());
    let offers = prop::collection::vec(
        prop::collection::vec((0u8..12, prop::collection::vec(any::<Index>(), 0..3)), 0..3),
        3..=3,
    );
    let elsewhere = (prop::collection::vec(answer(), 0..3), 0u8..16);
    let realised = prop::option::weighted(0.3, (0u8..12, prop_oneof![2 => Just(7u8), 1 => 0u8..8]));
    (graph, state, flags, (prop::option::weighted(0.1, any::<Index>()), elsewhere, realised), offers).prop_map(
        |((outputs, inputs, sources, turns), (valid, damaged), flags, (shares, (answers, place), realised), offers)| {
            Seed {
                realised,
                answers,
                place,
                outputs,
                inputs,
                sources,
                turns,
                valid,
                damaged,
                drv_missing: flags.0,
                unsupported: flags.1,
                allow_substitutes: flags.2,
                registers_all: flags.3,
                shares,
                offers,
            }
        },
    )
}

fn set(bits: u8) -> BTreeSet<OutputName> {
    NAMES.iter().enumerate().filter(|(n, _)| bits >> n & 1 == 1).map(|(_, text)| name(text)).collect()
}

/// What may be said about a world without running it.
struct Made {
    world: World,
    /// No substituter does anything it should not.
    clean: bool,
}

fn make(seeds: &[Seed], dirty: bool) -> Made {
    let mut world = World::default();
    let sources: Vec<StorePath> = (0..4).map(|n| path(900 + n, "source")).collect();
    // The last source is missing.
    world.valid.extend(sources.iter().take(3).cloned());
    let mut drvs: Vec<Drv> = Vec::new();
    let mut lower: Vec<StorePath> = sources.clone();
    let mut clean = true;
    for (number, seed) in seeds.iter().enumerate() {
        let mut outputs: BTreeMap<OutputName, StorePath> = set(seed.outputs)
            .into_iter()
            .map(|output| (output.clone(), path(1000 + number * 10 + output.as_str().len(), &format!("o{output}"))))
            .collect();
        if let (Some(shares), Some(own)) = (seed.shares, outputs.get_mut("out"))
            && !drvs.is_empty()
            && let Some(theirs) = shares.get(&drvs).outputs.get("out")
        {
            *own = theirs.clone();
        }
        let mut inputs = BTreeMap::new();
        for (input, bits) in &seed.inputs {
            if number > 0 {
                inputs.insert(input.get(&drvs).path.clone(), set(*bits));
            }
        }
        let elsewhere = |output: &OutputName| path(5000 + number * 10 + output.as_str().len(), &format!("o{output}"));
        let realised = match seed.realised {
            None => Realised::Known,
            Some((0, _)) if dirty => {
                clean = false;
                Realised::Error
            }
            Some((kind, bits)) => {
                let known = outputs.keys().enumerate().filter(|(n, _)| bits >> n & 1 == 1);
                let known = known.map(|(_, output)| (output.clone(), elsewhere(output))).collect();
                if kind == 1 { Realised::Refused(known) } else { Realised::As(known) }
            }
        };
        for (n, (output, own)) in outputs.iter().enumerate() {
            // What is valid and floating has been built here.
            if seed.valid >> n & 1 == 1 {
                world.valid.insert(own.clone());
                if seed.damaged >> n & 1 == 1 {
                    world.damaged.insert(own.clone());
                }
            }
            let offers = seed.offers.get(n).into_iter().flatten().map(|(kind, references)| {
                let mut of: BTreeSet<StorePath> = references.iter().map(|index| index.get(&lower).clone()).collect();
                // Sometimes itself, which is fine; sometimes each other, which is not.
                if *kind % 2 == 1 {
                    of.insert(own.clone());
                }
                match kind {
                    0 | 1 if dirty => {
                        clean = false;
                        Has::Error
                    }
                    2 if dirty => {
                        clean = false;
                        Has::It { references: of, fetched: Turn::Fails(FailureKind::Misc) }
                    }
                    3 if dirty => {
                        clean = false;
                        of.insert(path(1000 + (number + 1) * 10 + 3, "oout"));
                        Has::It { references: of, fetched: Turn::Good }
                    }
                    4 => Has::Gone { references: of },
                    5 => Has::It { references: of, fetched: Turn::Locked },
                    6 | 7 => Has::It { references: of, fetched: Turn::Good },
                    _ => Has::Nothing,
                }
            });
            let place = if realised == Realised::Known { own.clone() } else { elsewhere(output) };
            world.caches.insert(place, offers.collect());
        }
        lower.extend(outputs.values().cloned());
        let drv = Drv {
            path: path(number, &format!("n{}.drv", number % 3)),
            valid: !seed.drv_missing,
            outputs,
            inputs,
            sources: seed.sources.iter().map(|index| index.get(&sources).clone()).collect(),
            allow_substitutes: seed.allow_substitutes,
            supported: !seed.unsupported,
            turns: VecDeque::from(seed.turns.clone()),
            answers: VecDeque::from(seed.answers.clone()),
            prefers_local: seed.place & 3 == 3,
            system: if seed.place >> 2 == 3 { "there" } else { "here" },
            registers_all: seed.registers_all,
            becomes: None,
            realised,
        };
        world.drvs.insert(drv.path.clone(), drv.clone());
        drvs.push(drv);
    }
    Made { world, clean }
}

impl Made {
    /// Derivations that cannot but be realised: nothing they need can fail.
    fn sound(&self) -> BTreeSet<StorePath> {
        let mut sound = BTreeSet::new();
        // Numbers are ascending, and so are paths.
        for drv in self.world.drvs.values() {
            let good = drv.valid
                && drv.supported
                && !drv.answers.contains(&Answer::Fails)
                && drv.turns.iter().all(|turn| !matches!(turn, Turn::Fails(_) | Turn::Hangs))
                && drv.sources.iter().all(|source| self.world.valid.contains(source))
                && drv.inputs.iter().all(|(input, names)| {
                    sound.contains(input)
                        && names.iter().all(|n| self.world.drvs.get(input).is_some_and(|d| d.outputs.contains_key(n)))
                });
            if good {
                sound.insert(drv.path.clone());
            }
        }
        sound
    }
}

fn any_options() -> impl Strategy<Value = Options> {
    let mode = prop_oneof![3 => Just(Mode::Normal), 1 => Just(Mode::Check), 2 => Just(Mode::Repair)];
    let jobs = prop_oneof![1 => Just(0u32), 12 => 1u32..5];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), prop::bool::weighted(0.7), rarely(), any::<bool>());
    (mode, jobs, 0u32..4, flags).prop_map(|(mode, max_jobs, max_fetches, flags)| Options {
        mode,
        substitute: flags.3,
        has_substituters: flags.1,
        fallback: flags.2,
        keep_going: flags.0,
        max_jobs,
        delegates: flags.5,
        max_fetches,
        read_only: flags.4,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Every plan ends, whatever fails and in whatever order things happen; nothing starts before
    /// its inputs; nothing is made twice; not too many run at once; after the first failure nothing
    /// starts, and with `keep_going` what does not need the failed one is made all the same.
    /// (The world sees to most of it.)
    #[test]
    fn plans_end_well(
        seeds in prop::collection::vec(seed(), 1..14),
        options in any_options(),
        dirty in any::<bool>(),
        tops in prop::collection::vec((any::<Index>(), 0u8..16, rarely()), 1..5),
        order in any::<u64>(),
    ) {
        let mut made = make(&seeds, dirty);
        made.world.room_elsewhere = usize::try_from(order % 3).unwrap();
        let sound = made.sound();
        let drvs: Vec<Drv> = made.world.drvs.values().cloned().collect();
        let mut targets: Vec<Target> = tops.iter().map(|(index, bits, whole)| {
            let drv = index.get(&drvs);
            let names: BTreeSet<OutputName> = set(*bits);
            let wanted = if *whole || names.is_empty() { Wanted::All } else { Wanted::Only(names) };
            Target { key: Key::Derivation(drv.path.clone()), wanted }
        }).collect();
        if order % 5 == 0 {
            let own = drvs.first().and_then(|drv| drv.outputs.values().next()).unwrap();
            targets.push(Target { key: Key::Path(own.clone()), wanted: Wanted::All });
        }
        let mut random = order | 1;
        let mut pick = |many: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(random >> 33).unwrap() % many
        };
        let plan = made.world.run(options, &targets, &mut pick);

        for ended in plan.ended() {
            if let Some(Ok(_)) = ended.result {
                let paths: Vec<StorePath> = match &ended.target.key {
                    Key::Path(path) => vec![path.clone()],
                    Key::Derivation(drv) => made.world.drvs.get(drv).unwrap().outputs.iter()
                        .filter(|(name, _)| ended.target.wanted.has(name)).map(|(_, path)| path.clone()).collect(),
                };
                for path in paths {
                    prop_assert!(made.world.valid.contains(&path), "{} is said to be there", path);
                    prop_assert!(options.mode != Mode::Repair || !made.world.damaged.contains(&path));
                }
            }
            let harmless = made.clean || options.fallback || !options.substitute || !options.has_substituters;
            let sound = sound.contains(ended.target.key.path()) && matches!(ended.target.key, Key::Derivation(_));
            let named = match (&ended.target.wanted, made.world.drvs.get(ended.target.key.path())) {
                (Wanted::Only(names), Some(drv)) => names.iter().all(|name| drv.outputs.contains_key(name)),
                _ => true,
            };
            let simple = options.mode == Mode::Normal && options.max_jobs > 0 && !options.read_only;
            if options.keep_going && sound && harmless && simple && named {
                prop_assert!(matches!(ended.result, Some(Ok(_))), "poisoned: {:?}", ended);
            }
        }
    }
}
