//! Derivations whose paths follow from what is built, built by real Nix and by Larder: the same paths
//! come out, with the same records.

use std::collections::BTreeMap;
use std::process::Command;

use super::building::records;
use super::has_nix;
use crate::house::{House, Run, built_by_real, run};

const FEATURES: &str = "experimental-features = ca-derivations impure-derivations nix-command";

/// `ca` makes a derivation with floating outputs; what is above one has deferred ones.
const PRELUDE: &str = r#"
let
  d = name: more: script: derivation ({
    inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-e" "-c" script ]; PATH = "/bin:/usr/bin";
  } // more);
  ca = name: more: d name ({ __contentAddressed = true; outputHashMode = "recursive"; outputHashAlgo = "sha256"; } // more);
in
"#;

const FLOATING: &str = r#"
rec {
  leaf = ca "leaf" { recipe = "one"; } "echo same > $out";
  # The same contents, which whoever comes first registers: this one comes second.
  leaf-again = ca "leaf" { inherit leaf; } "cat $leaf > $out";
  user = ca "user" { inherit leaf; } "mkdir $out; ln -s $leaf $out/leaf; cat $leaf > $out/copy";
  user-again = ca "user" { leaf = leaf-again; } "mkdir $out; ln -s $leaf $out/leaf; cat $leaf > $out/copy";
  self = ca "self" {} "mkdir -p $out/bin; echo $out > $out/self; ln -s $out/self $out/bin/x; echo a-$out-b-$out >> $out/self";
  several = ca "several" { outputs = [ "out" "dev" "lib" ]; inherit leaf; } ''
    mkdir $out $dev; echo $leaf > $lib; echo $lib $out > $out/f; echo $out $lib $dev > $dev/f; chmod +x $dev/f
  '';
  dev-user = ca "dev-user" { dev = several.dev; } "echo $dev > $out; cat $dev/f >> $out";
  flat = ca "flat" { outputHashMode = "flat"; } "printf flat > $out";
  md5 = ca "md5" { outputHashAlgo = "md5"; } "mkdir $out; echo x > $out/x";
  sha1-flat = ca "sha1-flat" { outputHashAlgo = "sha1"; outputHashMode = "flat"; } "echo x > $out";
  sha512 = ca "sha512" { outputHashAlgo = "sha512"; } "echo long > $out";
  file = ca "file" { passAsFile = [ "text" ]; text = "is at ${placeholder "out"}"; } "cat $textPath > $out";
  structured = ca "structured" { __structuredAttrs = true; inherit user; builder = "/bin/bash"; } ''
    . ./.attrs.sh; echo $user > ''${outputs[out]}; echo ''${outputs[out]} >> ''${outputs[out]}
  '';
  chain = builtins.foldl' (below: n: ca "chain-${toString n}" { inherit below; } "mkdir $out; ln -s $below $out/below; echo $out > $out/own")
    self (builtins.genList (n: n) 5);
  deferred = d "deferred" { inherit user self; outputs = [ "out" "doc" ]; } "echo $user $self > $out; echo $out $doc > $doc";
  above = d "above" { inherit deferred; doc = deferred.doc; } "mkdir $out; echo $deferred $doc $out > $out/f";
  fixed = d "fixed" { inherit leaf; outputHashMode = "flat"; outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" "same\n"; } "cat $leaf > $out";
  above-fixed = d "above-fixed" { inherit fixed; } "cat $fixed > $out; echo $fixed >> $out";
  refs = ca "refs" { inherit leaf; allowedReferences = [ leaf "out" ]; } "echo $leaf $out > $out";
}
"#;

const IMPURE: &str = r#"
rec {
  impure = derivation { name = "impure"; system = builtins.currentSystem; builder = "/bin/sh"; __impure = true;
    args = [ "-e" "-c" "cat /proc/sys/kernel/random/uuid > $out" ]; PATH = "/bin:/usr/bin"; };
  fixed = d "fixed" { inherit impure; outputHashMode = "flat"; outputHashAlgo = "sha256";
    outputHash = builtins.hashString "sha256" "known"; } "test -s $impure; printf known > $out";
  pure = ca "pure" { inherit impure; } "cat $impure > $out";
}
"#;

struct Scene {
    house: House,
    config: String,
}

impl Scene {
    fn new(sandbox: bool, features: &str) -> Self {
        let config = format!(
            "build-users-group =\nsandbox = {sandbox}\nsandbox-fallback = false\n\
             sandbox-paths = /bin /usr /lib /lib64\nsubstituters =\nmax-jobs = 2\n{features}"
        );
        Self { house: House::new(), config }
    }

    fn real(&self, program: &str) -> Command {
        let mut command = self.house.command(program);
        command.env("NIX_CONFIG", &self.config);
        command
    }

    fn ours(&self) -> Command {
        let mut command = self.house.applet("nix-store");
        command.env("NIX_CONFIG", &self.config);
        command
    }

    fn realise(&self, words: &[&str], drvs: &[String]) -> Run {
        run(self.ours().arg("-r").args(words).arg("--no-gc-warning").args(drvs), b"")
    }

    /// Derivations by attribute, and an archive of them.
    fn instantiate(&self, expression: &str) -> (BTreeMap<String, String>, Vec<u8>) {
        let file = self.house.write("x.nix", format!("{PRELUDE}{expression}"));
        let names = expression
            .lines()
            .filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?.split_once(" = "))
            .map(|(name, _)| name);
        let mut drvs = BTreeMap::new();
        for name in names.filter(|name| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')) {
            let found = run(self.real("nix-instantiate").arg(&file).args(["-A", name]), b"");
            assert_eq!(found.status, Some(0), "{name}: {found:?}");
            drvs.insert(name.to_owned(), found.stdout.trim().to_owned());
        }
        let closure = run(self.real("nix-store").arg("-qR").args(drvs.values()), b"").stdout;
        let export = crate::house::output(self.real("nix-store").arg("--export").args(closure.lines()), b"");
        assert!(export.status.success());
        (drvs, export.stdout)
    }

    /// What real Nix made goes aside, and Larder gets the same derivations.
    fn start_anew(&self, export: &[u8]) {
        for dir in ["store", "var", "log"].into_iter().filter(|dir| self.house.path().join(dir).exists()) {
            std::fs::rename(self.house.path().join(dir), self.house.path().join(format!("{dir}-of-nix"))).unwrap();
        }
        let imported = run(self.ours().arg("--import"), export);
        assert_eq!(imported.status, Some(0), "{}", imported.stderr);
    }
}

/// The content addresses of all paths but derivations, whose archives say nothing of them.
fn addresses(json: &str) -> BTreeMap<String, String> {
    let value: serde_json::Value = serde_json::from_str(json).unwrap();
    let pairs: Vec<(String, serde_json::Value)> = match value {
        serde_json::Value::Array(rows) => {
            rows.into_iter().map(|row| (row["path"].as_str().unwrap().to_owned(), row["ca"].clone())).collect()
        }
        serde_json::Value::Object(rows) => rows.into_iter().map(|(path, row)| (path, row["ca"].clone())).collect(),
        other => panic!("{other}"),
    };
    pairs
        .into_iter()
        .filter(|(path, _)| !path.contains(".drv"))
        .filter_map(|(path, ca)| Some((path, ca.as_str().filter(|ca| !ca.is_empty())?.to_owned())))
        .collect()
}

fn same_floating(sandbox: bool) {
    if !has_nix() {
        return;
    }
    let scene = Scene::new(sandbox, FEATURES);
    let (drvs, export) = scene.instantiate(FLOATING);
    let all: Vec<String> = drvs.values().cloned().collect();
    let realised = built_by_real(|| run(scene.real("nix-store").args(["-r", "-k"]).args(&all), b""));
    assert_eq!(realised.status, Some(0), "{}", realised.stderr);
    let theirs = run(scene.real("nix-store").arg("--dump-db"), b"").stdout;
    let their_addresses = run(scene.real("nix").args(["path-info", "--all", "--json"]), b"").stdout;
    scene.start_anew(&export);
    let ours = scene.realise(&["-k"], &all);
    assert_eq!(ours.status, Some(0), "{}", ours.stderr);
    let lines = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines.dedup();
        lines
    };
    assert_eq!(lines(&ours.stdout), lines(&realised.stdout));
    let mine = run(scene.ours().arg("--dump-db"), b"").stdout;
    let (theirs, mine) = (records(&theirs), records(&mine));
    for (path, record) in &theirs {
        assert_eq!(mine.get(path), Some(record), "{path}");
    }
    assert_eq!(mine.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
    let my_addresses = run(scene.house.applet("larder").args(["path-info", "--all", "--json"]), b"").stdout;
    assert_eq!(addresses(&my_addresses), addresses(&their_addresses));
    println!("{} derivations, {} valid paths", all.len(), mine.len());

    // All is there: nothing is built again, nor said to be.
    let again = scene.realise(&[], &all);
    assert_eq!((again.stderr.as_str(), again.status), ("", Some(0)));
    assert_eq!(lines(&again.stdout), lines(&ours.stdout));
    let checked = scene.realise(&["--check", "-k"], &all);
    assert_eq!(checked.status, Some(0), "{}", checked.stderr);
    let verified = run(scene.ours().args(["--verify", "--check-contents"]), b"");
    assert_eq!(verified.status, Some(0), "{}", verified.stderr);
    // Nothing is left of the paths where they were built.
    let valid: Vec<&str> = mine.keys().filter_map(|path| path.rsplit('/').next()).collect();
    for entry in std::fs::read_dir(scene.house.path().join("store")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_lock = name.contains(".lock");
        assert!(name == ".links" || is_lock || valid.contains(&name.as_str()), "{name}");
    }
    // What has gone is built again, and nothing else is.
    let deleted = run(scene.ours().args(["--delete", "--ignore-liveness", &single(&scene, &drvs["md5"])]), b"");
    assert_eq!(deleted.status, Some(0), "{}", deleted.stderr);
    let rebuilt = scene.realise(&[], &all);
    assert_eq!(rebuilt.stderr.matches("building '").count(), 1, "{}", rebuilt.stderr);
    assert_eq!(lines(&rebuilt.stdout), lines(&ours.stdout));
}

/// The one output of a derivation.
fn single(scene: &Scene, drv: &str) -> String {
    let realised = scene.realise(&[], &[drv.to_owned()]);
    assert_eq!(realised.status, Some(0), "{}", realised.stderr);
    realised.stdout.trim_end().to_owned()
}

#[test]
fn floating_outputs_are_the_same() {
    same_floating(false);
}

#[test]
fn floating_outputs_are_the_same_in_the_sandbox() {
    same_floating(true);
}

#[test]
fn impure_derivations_are_built_in_every_run() {
    if !has_nix() {
        return;
    }
    let scene = Scene::new(false, FEATURES);
    let (drvs, export) = scene.instantiate(IMPURE);
    let real = |drv: &str| run(scene.real("nix-store").args(["-r", drv]), b"");
    let theirs = real(&drvs["fixed"]);
    assert_eq!(theirs.status, Some(0), "{theirs:?}");
    let (their_pure, their_impure) = (real(&drvs["pure"]), real(&drvs["impure"]));
    scene.start_anew(&export);
    let ours = |drv: &str| scene.realise(&[], &[drv.to_owned()]);
    let fixed = ours(&drvs["fixed"]);
    assert_eq!((fixed.stdout.as_str(), fixed.status), (theirs.stdout.as_str(), Some(0)), "{fixed:?}");
    let pure = ours(&drvs["pure"]);
    let text = format!("pure derivation '{}' depends on impure derivation '{}'", drvs["pure"], drvs["impure"]);
    for run in [&pure, &their_pure] {
        assert!(run.stderr.contains(&text) && run.status == Some(1), "{run:?}");
    }
    assert_ne!(their_impure.status, Some(0));
    for _ in 0..2 {
        let impure = ours(&drvs["impure"]);
        assert!(impure.stderr.contains(&format!("building '{}'...", drvs["impure"])), "{impure:?}");
        let text = format!("error: cannot operate on output 'out' of the unbuilt derivation '{}'\n", drvs["impure"]);
        assert!(impure.stderr.ends_with(&text) && impure.status == Some(1), "{impure:?}");
    }
    let made = std::fs::read_dir(scene.house.path().join("store")).unwrap();
    let made = made.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with("-impure"));
    // One by the fixed one, and one by each run for itself.
    assert_eq!(made.count(), 3);
}

#[test]
fn without_the_feature_nothing_of_it_is_built() {
    if !has_nix() {
        return;
    }
    let scene = Scene::new(false, FEATURES);
    let (drvs, export) = scene.instantiate(IMPURE);
    scene.start_anew(&export);
    let plain = Scene { config: scene.config.replace(FEATURES, ""), ..scene };
    for (name, feature) in [("pure", "ca-derivations"), ("impure", "impure-derivations")] {
        let run = plain.realise(&[], &[drvs[name].clone()]);
        let text = format!("experimental Nix feature '{feature}' is disabled");
        assert!(run.stderr.contains(&text) && run.status == Some(1), "{run:?}");
    }
}

/// A key that both sides know, and that signs what is built.
fn with_key(scene: &mut Scene) {
    let words = ["--generate-binary-cache-key", "both-1", "secret", "public"];
    assert_eq!(run(scene.real("nix-store").args(words), b"").status, Some(0));
    let key = |name: &str| std::fs::read_to_string(scene.house.work().join(name)).unwrap();
    let (secret, public) = (scene.house.work().join("secret"), key("public"));
    let keys = format!("\nsecret-key-files = {}\ntrusted-public-keys = {}", secret.display(), public.trim_end());
    scene.config.push_str(&keys);
}

/// Where a cache is, as what writes to it is told, and as what reads it is.
fn cache(scene: &Scene) -> [String; 2] {
    let folder = format!("file://{}", scene.house.work().join("cache").display());
    [format!("{folder}?compression=none&secret-key={}", scene.house.work().join("secret").display()), folder]
}

/// Derivations of some of [`FLOATING`]: floating ones, a chain, deferred ones and what is above them.
const COPIED: [&str; 5] = ["chain", "several", "user-again", "deferred", "above"];

#[test]
fn what_real_nix_copied_is_not_built_again() {
    if !has_nix() {
        return;
    }
    let mut scene = Scene::new(false, FEATURES);
    with_key(&mut scene);
    let (drvs, export) = scene.instantiate(FLOATING);
    let [to, from] = cache(&scene);
    let all: Vec<String> = COPIED.iter().map(|name| drvs[*name].clone()).collect();
    let theirs = built_by_real(|| run(scene.real("nix-store").arg("-r").args(&all), b""));
    assert_eq!(theirs.status, Some(0), "{}", theirs.stderr);
    // Nix 2.8 takes a derivation for its outputs.
    let copied = run(scene.real("nix").args(["copy", "--to", &to]).args(&all), b"");
    assert_eq!(copied.status, Some(0), "{}", copied.stderr);
    scene.start_anew(&export);
    scene.config = scene.config.replace("substituters =", &format!("substituters = {from}"));
    let ours = scene.realise(&[], &all);
    assert_eq!((&ours.stdout, ours.status), (&theirs.stdout, Some(0)), "{}", ours.stderr);
    assert!(!ours.stderr.contains("building '") && !ours.stderr.contains("warning"), "{}", ours.stderr);
    let verified = run(scene.ours().args(["--verify", "--check-contents"]), b"");
    assert_eq!(verified.status, Some(0), "{}", verified.stderr);
}
