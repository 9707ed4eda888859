//! Random stores: what lives and what goes, by Larder, by real Nix where there is one, and by a
//! reference that is as simple as can be; plans and what comes of them.
//!
//! The stores have derivations with several outputs, fixed outputs that many derivations could make,
//! outputs that are not valid, derivers that are not valid or not known, and temporary roots.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use larder_core::arb::derivation::graph;
use larder_core::derivation::{Derivation, Kind};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;

use crate::house::{House, Run, run};

/// Stores in the short form.
const STORES: u64 = 16;
/// Stores in the long form (`cargo xtask soak`).
const MANY_STORES: u64 = 200;

/// A valid path.
#[derive(Debug, Clone, Default)]
struct Valid {
    references: BTreeSet<String>,
    deriver: Option<String>,
    /// Of a derivation.
    outputs: BTreeSet<String>,
}

struct World {
    house: House,
    valid: BTreeMap<String, Valid>,
    invalid: BTreeSet<String>,
    /// Links in both state folders, by name.
    roots: BTreeMap<String, String>,
    temporary: Option<String>,
    keep_outputs: bool,
    keep_derivations: bool,
    optimised: bool,
    locks: Vec<std::fs::File>,
}

/// Pseudo-random numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap() % n.max(1)
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Each with the chance one in `n`.
    fn some<T: Clone>(&mut self, things: &[T], n: usize) -> Vec<T> {
        things.iter().filter(|_| self.one_in(n)).cloned().collect()
    }
}

/// Derivations whose paths are known, inputs first; some of them twice with another text, so that
/// fixed outputs have several makers.
fn derivations(dir: &StoreDir, seed: u64) -> Vec<(StorePath, Derivation)> {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let all = graph(dir.clone(), 3..10).new_tree(&mut runner).unwrap().current();
    let mut kept: Vec<(StorePath, Derivation)> = Vec::new();
    for (path, drv) in all {
        let inputs_kept = drv.input_drvs.keys().all(|input| kept.iter().any(|(path, _)| path == input));
        // What is named like a derivation must be one, of which neither Nix nor Larder makes an exception.
        let poses = drv.output_paths().any(|(_, output)| output.is_some_and(StorePath::is_derivation));
        if !inputs_kept || poses || !drv.kind().is_ok_and(Kind::has_paths) {
            continue;
        }
        if drv.kind() == Ok(Kind::Fixed) {
            for n in 0..seed % 4 {
                let mut twin = drv.clone();
                twin.env.insert("note".into(), format!("twin {n}").into());
                // Of a fixed output nothing but the hash counts, so any inputs will do: outputs among them.
                twin.input_drvs = kept
                    .iter()
                    .rev()
                    .take(usize::try_from(n).unwrap())
                    .map(|(path, drv)| (path.clone(), drv.outputs.keys().cloned().collect()))
                    .collect();
                kept.push((twin.path(dir).unwrap(), twin));
            }
        }
        kept.push((path, drv));
    }
    kept
}

impl World {
    fn new(seed: u64) -> Self {
        let house = House::new();
        let store = house.path().join("store");
        let dir = StoreDir::new(store.to_str().unwrap()).unwrap();
        std::fs::create_dir(&store).unwrap();
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut world = Self {
            house,
            valid: BTreeMap::new(),
            invalid: BTreeSet::new(),
            roots: BTreeMap::new(),
            temporary: None,
            keep_outputs: random.one_in(2),
            keep_derivations: !random.one_in(3),
            optimised: random.one_in(2),
            locks: Vec::new(),
        };
        let mut plain: Vec<String> = Vec::new();
        for n in 0..random.below(5) {
            let path = format!("{}/{:032}-source{n}", store.display(), random.below(1 << 30));
            Self::put(&path, &mut random);
            let references = random.some(&plain, 2).into_iter().collect();
            world.valid.insert(path.clone(), Valid { references, ..Valid::default() });
            plain.push(path);
        }
        let derivations = derivations(&dir, seed);
        for (path, drv) in &derivations {
            let inputs: BTreeSet<String> = drv.references().iter().map(|input| dir.full(input)).collect();
            if !inputs.iter().all(|input| world.valid.contains_key(input)) || random.one_in(8) {
                continue;
            }
            let outputs = drv.output_paths().map(|(_, path)| dir.full(path.unwrap())).collect();
            std::fs::write(store.join(path.to_string()), drv.to_aterm(&dir)).unwrap();
            let path = dir.full(path);
            world.valid.insert(path, Valid { references: inputs, deriver: None, outputs });
        }
        for (path, drv) in &derivations {
            for (_, output) in drv.output_paths() {
                let output = dir.full(output.unwrap());
                if world.valid.contains_key(&output) || random.one_in(3) {
                    continue;
                }
                Self::put(&output, &mut random);
                let mut references: BTreeSet<String> = random.some(&plain, 3).into_iter().collect();
                if random.one_in(3) {
                    references.insert(output.clone());
                }
                let deriver = (!random.one_in(5)).then(|| dir.full(path));
                world.valid.insert(output.clone(), Valid { references, deriver, ..Valid::default() });
                plain.push(output);
            }
        }
        for n in 0..random.below(3) {
            let name = format!("{:032}-left{n}.lock", random.below(1 << 30));
            std::fs::write(store.join(&name), vec![b'x'; n * 100]).unwrap();
            world.invalid.insert(format!("{}/{name}", store.display()));
        }
        world.register(&mut random);
        world
    }

    /// Makes files, the same contents now and then.
    fn put(path: &str, random: &mut Random) {
        let path = PathBuf::from(path);
        let contents = |random: &mut Random| vec![b'a'; 100 + random.below(4)];
        if random.one_in(3) {
            std::fs::write(&path, contents(random)).unwrap();
        } else {
            std::fs::create_dir_all(path.join("bin")).unwrap();
            for n in 0..random.below(4) {
                std::fs::write(path.join("bin").join(format!("f{n}")), contents(random)).unwrap();
            }
            symlink("bin", path.join("link")).unwrap();
        }
        let readonly = std::process::Command::new("chmod").args(["-R", "a-w"]).arg(&path).status().unwrap();
        assert!(readonly.success());
    }

    fn register(&mut self, random: &mut Random) {
        let mut text = String::new();
        for (path, valid) in &self.valid {
            let deriver = valid.deriver.as_deref().unwrap_or_default();
            write!(text, "{path}\n{}\n{}\n{deriver}\n{}\n", "ab".repeat(32), 1000, valid.references.len()).unwrap();
            valid.references.iter().for_each(|reference| writeln!(text, "{reference}").unwrap());
        }
        self.ours("--load-db", text.as_bytes()).prints("");
        if let Some(run) = self.theirs("--load-db", text.as_bytes()) {
            run.prints("");
        }
        let paths: Vec<String> = self.valid.keys().cloned().collect();
        for (n, path) in random.some(&paths, 7).into_iter().enumerate() {
            self.roots.insert(format!("root{n}"), path);
        }
        if random.one_in(2) && !paths.is_empty() {
            self.temporary = Some(paths[random.below(paths.len())].clone());
        }
        for state in ["var", "var-nix"] {
            let state = self.house.path().join(state);
            std::fs::create_dir_all(state.join("gcroots")).unwrap();
            std::fs::create_dir_all(state.join("temproots")).unwrap();
            for (name, path) in &self.roots {
                symlink(path, state.join("gcroots").join(name)).unwrap();
            }
            if let Some(path) = &self.temporary {
                let file = state.join("temproots").join(std::process::id().to_string());
                std::fs::write(&file, format!("{path}\0")).unwrap();
                let file = std::fs::File::open(&file).unwrap();
                rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
                self.locks.push(file);
            }
        }
        if self.optimised {
            let run = self.ours("--optimise", b"");
            assert_eq!(run.status, Some(0), "{run:?}");
        }
    }

    fn settings(&self) -> String {
        format!(
            "build-users-group =\nsubstituters =\nkeep-outputs = {}\nkeep-derivations = {}",
            self.keep_outputs, self.keep_derivations
        )
    }

    fn ours(&self, words: &str, stdin: &[u8]) -> Run {
        let mut command = self.house.applet("nix-store");
        run(command.args(words.split(' ')).env("NIX_CONFIG", self.settings()), stdin)
    }

    fn larder(&self, words: &[&str]) -> Run {
        run(self.house.applet("larder").args(words).env("NIX_CONFIG", self.settings()), b"")
    }

    fn json(&self, words: &[&str]) -> Value {
        let run = self.larder(words);
        assert_eq!(run.status, Some(0), "{words:?}: {run:?}");
        serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}: {}", run.stdout))
    }

    /// `None` without a real Nix. It also gives up while any process of the machine, such as another
    /// test, has a directory open whose path is too long for it; that passes.
    fn theirs(&self, words: &str, stdin: &[u8]) -> Option<Run> {
        if !crate::interop::has_nix() {
            return None;
        }
        for _ in 0..50 {
            let mut command = self.house.command("nix-store");
            command.args(words.split(' ')).env("NIX_CONFIG", self.settings());
            command.env("NIX_STATE_DIR", self.house.path().join("var-nix"));
            let run = run(&mut command, stdin);
            if !run.stderr.contains("File name too long") {
                return Some(run);
            }
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        println!("real Nix cannot list roots here, as somebody has a very deep directory open");
        None
    }

    /// What a path keeps.
    fn keeps(&self, path: &str) -> BTreeSet<String> {
        let Some(valid) = self.valid.get(path) else { return BTreeSet::new() };
        let mut all = valid.references.clone();
        if self.keep_derivations {
            all.extend(valid.deriver.clone());
        }
        if self.keep_outputs {
            all.extend(valid.outputs.clone());
        }
        all.retain(|path| self.valid.contains_key(path));
        all
    }

    /// Goes over all paths until nothing changes.
    fn live(&self, roots: BTreeSet<String>) -> BTreeSet<String> {
        let mut live = roots;
        loop {
            let before = live.len();
            let more: Vec<String> = live.iter().flat_map(|path| self.keeps(path)).collect();
            live.extend(more);
            if live.len() == before {
                return live;
            }
        }
    }

    fn all_roots(&self) -> BTreeSet<String> {
        self.roots.values().chain(&self.temporary).cloned().collect()
    }

    fn entries(&self) -> BTreeSet<String> {
        let store = self.house.path().join("store");
        self.house.store_names().into_iter().map(|name| format!("{}/{name}", store.display())).collect()
    }
}

fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(str::to_owned).collect()
}

fn paths_of(plan: &Value) -> BTreeSet<String> {
    plan["paths"].as_array().unwrap().iter().map(|entry| entry["path"].as_str().unwrap().to_owned()).collect()
}

fn check(seed: u64) {
    let world = World::new(seed);
    let live = world.live(world.all_roots());
    let mut dead: BTreeSet<String> = world.valid.keys().filter(|path| !live.contains(*path)).cloned().collect();
    dead.extend(world.invalid.iter().cloned());

    // What lives, by all who know.
    let told = |words: &str| lines(&world.ours(words, b"").stdout);
    assert_eq!(told("--gc --print-live"), live, "seed {seed}");
    assert_eq!(told("--gc --print-dead"), dead, "seed {seed}");
    for (words, ours) in [("--gc --print-live", &live), ("--gc --print-dead", &dead)] {
        if let Some(theirs) = world.theirs(words, b"") {
            assert_eq!(lines(&theirs.stdout), *ours, "seed {seed}: real Nix on {words}: {}", theirs.stderr);
        }
    }

    // Why it does.
    if !world.valid.is_empty() {
        let mut words = vec!["why", "--json"];
        words.extend(world.valid.keys().map(String::as_str));
        for told in world.json(&words).as_array().unwrap() {
            let path = told["path"].as_str().unwrap();
            assert_eq!(told["live"].as_bool().unwrap(), live.contains(path), "seed {seed}: {path}");
            for root in told["roots"].as_array().unwrap() {
                let mut at = root["path"].as_str().unwrap().to_owned();
                for step in root["chain"].as_array().unwrap() {
                    let next = step["path"].as_str().unwrap().to_owned();
                    assert!(world.keeps(&at).contains(&next), "seed {seed}: {at} does not keep {next}");
                    at = next;
                }
                assert_eq!(at, path, "seed {seed}");
            }
            let reasons = told["roots"].as_array().unwrap().len();
            let leading = world.roots.values().chain(&world.temporary);
            let leading = leading.filter(|root| world.live(BTreeSet::from([(*root).clone()])).contains(path));
            assert_eq!(reasons, leading.count(), "seed {seed}: {path}");
        }
        // The keep settings count (S067).
        let some = world.valid.keys().nth(usize::try_from(seed).unwrap() % world.valid.len()).unwrap();
        let leading = world.roots.values().chain(&world.temporary);
        let leading: BTreeSet<String> =
            leading.filter(|root| world.live(BTreeSet::from([(*root).clone()])).contains(some)).cloned().collect();
        let roots_of = |told: &Run| -> BTreeSet<String> {
            told.stdout.lines().map(|line| line.split(" -> ").nth(1).unwrap().to_owned()).collect()
        };
        let words = format!("-q --roots {some}");
        assert_eq!(roots_of(&world.ours(&words, b"")), leading, "seed {seed}: {some}");
        // Real Nix also names outputs that another derivation is recorded to have made.
        if let Some(theirs) = world.theirs(&words, b"") {
            assert!(roots_of(&theirs).is_superset(&leading), "seed {seed}: {some}: {theirs:?}");
        }
    }

    // What would go, were a root dropped; and what goes then.
    let dropped = world.roots.iter().next();
    let if_dropped = dropped.map(|(name, _)| {
        let link = world.house.path().join("var/gcroots").join(name);
        let plan = world.json(&["gc", "--json", "--if-dropped", link.to_str().unwrap()]);
        (link, plan)
    });
    let plan = world.json(&["gc", "--json", "--dry-run"]);
    assert_eq!(paths_of(&plan), dead, "seed {seed}");
    let before = world.entries();
    let done = world.json(&["gc", "--json", "--yes"]);
    assert_eq!(done["deleted"]["bytes"], plan["freedBytes"], "seed {seed}");
    assert_eq!(done["deleted"]["paths"], dead.len(), "seed {seed}");
    assert_eq!(world.entries(), before.difference(&dead).cloned().collect(), "seed {seed}");
    if let Some((link, plan)) = if_dropped {
        std::fs::remove_file(link).unwrap();
        let roots = world.roots.values().skip(1).chain(&world.temporary).cloned().collect();
        let live_then = world.live(roots);
        let goes: BTreeSet<String> = live.difference(&live_then).cloned().collect();
        assert_eq!(paths_of(&plan), goes, "seed {seed}");
        let done = world.json(&["gc", "--json", "--yes"]);
        assert_eq!(done["deleted"]["bytes"], plan["freedBytes"], "seed {seed}");
        assert_eq!(done["deleted"]["paths"], goes.len(), "seed {seed}");
        assert_eq!(lines(&world.ours("-q --requisites", b"").stdout), BTreeSet::new());
        assert_eq!(world.entries(), live_then.iter().cloned().collect(), "seed {seed}");
    }
    let left = world.house.words("nix-store", "--dump-db").stdout;
    assert!(world.entries().iter().all(|path| left.contains(path)), "seed {seed}");
    assert!(
        dead.iter().all(
            |path| world.invalid.contains(path.as_str()) || !left.contains(&format!("{path}\n{}", "ab".repeat(32)))
        )
    );
}

#[test]
fn random_stores() {
    if !crate::interop::has_nix() {
        println!("without real Nix: only the reference is compared with");
    }
    (1..=STORES).for_each(check);
}

#[test]
fn soak_random_stores() {
    if std::env::var_os("LARDER_SOAK_S").is_none() {
        return;
    }
    (1..=MANY_STORES).for_each(|n| check(1000 + n));
    println!("random stores: {MANY_STORES} agree");
}
