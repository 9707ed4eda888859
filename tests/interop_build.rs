//! The same derivations built by a real Nix and by Larder: what is said, what comes out, and the
//! exit status must be the same. Runs where `nix-instantiate` is installed, and says so where not.

use std::collections::BTreeMap;
use std::process::Command;

use crate::house::{House, Run, built_by_real, output, run};

fn has_nix() -> bool {
    let found = Command::new("nix-instantiate").arg("--version").output().is_ok_and(|out| out.status.success());
    if !found {
        println!("skipped: there is no nix-instantiate here");
    }
    found
}

const COMMON: &str = "--option sandbox false --option substituters";

/// `d NAME SCRIPT ATTRIBUTES` is a derivation made by a shell.
const PRELUDE: &str = r#"
let
  d = name: script: more: derivation ({
    inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-e" "-c" script ]; PATH = "/bin:/usr/bin";
  } // more);
  range = n: builtins.genList (i: i) n;
in
"#;

/// Words of `nix-store`; `@name` is the derivation of that name.
const SCENES: &str = "
-r --dry-run @top
-r @good
-r @good @good @multi
-r @multi!man
-r @multi!nope
-r @bad
-r -Q @bad
-r @silent @bad
-r -k @top
-r @top
-r @sparc
-r @feature
-r -j0 @bad
-r --check @bad
-r --check @good
-r --check @differs
-r @killed
-r @none
-r @mismatch
-r @illegal
-r -k @mismatch @bad
-r -k @bad @silent @good
-r --ignore-unknown @bad!zork
-r --quiet @bad
-r --timeout 1 @slow
-r --max-silent-time 1 @slow
-l @good
-l @none
-r --add-root root @good @multi
";

const SCENE_DERIVATIONS: &str = r#"
rec {
  good = d "good" "echo said; echo x > $out" {};
  bad = d "bad" "echo hi; echo there; exit 3" {};
  silent = d "silent" "exit 4" {};
  killed = d "killed" "kill -9 $$" {};
  none = d "none" "true" {};
  slow = d "slow" "sleep 100" {};
  differs = d "differs" "cat /proc/sys/kernel/random/uuid > $out" {};
  multi = d "multi" "for o in $out $dev $man; do echo > $o; done" { outputs = [ "out" "dev" "man" ]; };
  top = d "top" "echo $a $b > $out" { a = bad; b = silent; c = good; };
  sparc = derivation { name = "sparc"; system = "sparc-linux"; builder = "/bin/sh"; };
  feature = d "feature" "echo > $out" { requiredSystemFeatures = [ "zork" "kvm" ]; };
  mismatch = d "mismatch" "echo > $out" {
    outputHashAlgo = "sha256"; outputHashMode = "flat";
    outputHash = "0000000000000000000000000000000000000000000000000000";
  };
  illegal = d "illegal" "echo $good > $out" { inherit good; allowedReferences = []; };
}
"#;

/// A graph of more than sixty, in which each special attribute occurs.
const GRAPH: &str = r#"
rec {
  base = d "base" "echo base > $out" {};
  chain = builtins.foldl' (below: i:
    d "chain-${toString i}" "mkdir $out; ln -s $below $out/below; cat /proc/self/environ > /dev/null" { inherit below; }) base (range 20);
  wide = map (i: d "wide-${toString i}" "echo ${toString i} $base $out > $out" { inherit base; }) (range 30);
  multi = d "multi" "mkdir $out $dev; echo $out > $dev/to-out; echo $lib > $out/to-lib; echo > $lib" {
    outputs = [ "out" "dev" "lib" ]; };
  files = d "files" "cat $textPath > $out; env | grep -v '^_=' | sort >> $out.env; cat $out.env | wc -l >> $out; rm $out.env" {
    text = "long"; other = "x"; passAsFile = [ "text" ]; };
  graph = d "graph" "sed 's/^/x/' closure > $out; cat refs >> $out" {
    exportReferencesGraph = [ "closure" chain "refs" multi ]; };
  structured = d "structured" ". ./.attrs.sh; echo \${outputs[out]} > /dev/null; cp .attrs.json \${outputs[out]}" {
    __structuredAttrs = true; list = [ "a" 1 true ]; object.nested = "y"; builder = "/bin/bash"; };
  flat = d "flat" "printf fixed > $out" {
    outputHashAlgo = "sha256"; outputHashMode = "flat"; outputHash = builtins.hashString "sha256" "fixed"; };
  user = d "user" "cat $flat > $out; echo $flat >> $out" { inherit flat; impureEnvVars = [ "HOME" ]; };
  self = d "self" "mkdir $out; echo $out > $out/self; ln $out/self $out/link; mkfifo p; chmod 700 $out" { };
  refs = d "refs" "echo $base > $out" {
    inherit base; allowedReferences = [ base ]; disallowedReferences = [ flat ]; allowedRequisites = [ base ]; };
  local = d "local" "echo > $out" { preferLocalBuild = true; allowSubstitutes = false; };
  odd = d "odd" "mkdir -p $out/a/b; echo x > $out/a/exe; chmod 755 $out/a/exe; chmod 000 $out/a/b; ln -s none $out/dangling" {};
  top = d "top" "mkdir $out; for i in $all; do echo $i >> $out/list; done" {
    all = wide ++ [ chain multi.dev files graph structured flat user self refs local odd ]; };
}
"#;

/// Derivations by attribute, instantiated by real Nix, and an archive of them all.
fn instantiate(house: &House, expression: &str) -> (BTreeMap<String, String>, Vec<u8>) {
    let file = house.write("x.nix", format!("{PRELUDE}{expression}"));
    let names: Vec<&str> = expression
        .lines()
        .filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?.split_once(" = "))
        .map(|(name, _)| name)
        .filter(|name| !["chain", "wide"].contains(name))
        .collect();
    let drvs: BTreeMap<String, String> = names
        .iter()
        .map(|name| {
            let run = run(house.command("nix-instantiate").arg(&file).args(["-A", name]), b"");
            assert_eq!(run.status, Some(0), "{run:?}");
            ((*name).to_owned(), run.stdout.trim().to_owned())
        })
        .collect();
    let closure = run(house.command("nix-store").arg("-qR").args(drvs.values()), b"").stdout;
    let export = output(house.command("nix-store").arg("--export").args(closure.lines()), b"");
    assert!(export.status.success());
    (drvs, export.stdout)
}

/// Forgets all that is in the store.
fn empty(house: &House) {
    run(house.command("chmod").args(["-R", "u+w", "store"]).current_dir(house.path()), b"");
    for name in ["store", "var", "log"] {
        let _ = std::fs::remove_dir_all(house.path().join(name));
    }
}

fn words(drvs: &BTreeMap<String, String>, line: &str) -> Vec<String> {
    let word = |word: &str| match word.strip_prefix('@') {
        None => word.to_owned(),
        Some(name) => {
            let (name, outputs) = name.split_at(name.find('!').unwrap_or(name.len()));
            format!("{}{outputs}", drvs.get(name).unwrap_or_else(|| panic!("no derivation {name}")))
        }
    };
    let all = line.split(' ').map(word).chain(COMMON.split(' ').map(str::to_owned)).chain([String::new()]);
    // Reading logs takes no settings.
    all.collect()
}

/// What differs on purpose.
fn same_words(mut run: Run) -> Run {
    let once = "warning: you did not specify '--add-root'; the result might be removed by the garbage collector\n";
    // Real Nix says it for each argument.
    while run.stderr.matches(once).count() > 1 {
        run.stderr = run.stderr.replacen(once, "", 1);
    }
    run
}

#[test]
fn the_same_is_said() {
    if !has_nix() {
        return;
    }
    let house = House::new();
    let (drvs, export) = instantiate(&house, SCENE_DERIVATIONS);
    let scenes: Vec<&str> = SCENES.lines().filter(|line| !line.is_empty()).collect();
    let real: Vec<Run> =
        scenes.iter().map(|line| run(house.command("nix-store").args(words(&drvs, line)), b"")).collect();
    empty(&house);
    let import = output(house.applet("nix-store").arg("--import"), &export);
    assert!(import.status.success(), "{import:?}");
    let mut different = 0;
    for (line, real) in scenes.iter().zip(real) {
        let ours = run(house.applet("nix-store").args(words(&drvs, line)), b"");
        if same_words(ours.clone()) != same_words(real.clone()) {
            println!("nix-store {line}\n--- real {real:#?}\n--- ours {ours:#?}");
            different += 1;
        }
    }
    assert_eq!(different, 0);
}

/// Every output has the path, contents, size, references and deriver that real Nix gives it.
#[test]
fn the_same_is_made() {
    if !has_nix() {
        return;
    }
    let house = House::new();
    let (drvs, export) = instantiate(&house, GRAPH);
    let top = drvs.get("top").unwrap();
    let line = "-r -j2 @top";
    let real = built_by_real(|| run(house.command("nix-store").args(words(&drvs, line)), b""));
    assert_eq!(real.status, Some(0), "{real:?}");
    let dump = |program: &str| {
        let mut command = if program == "real" { house.command("nix-store") } else { house.applet("nix-store") };
        let closure = run(command.args(["-qR", "--include-outputs", top]), b"").stdout;
        let mut command = if program == "real" { house.command("nix-store") } else { house.applet("nix-store") };
        run(command.arg("--dump-db").args(closure.lines()), b"").stdout
    };
    let wanted = dump("real");
    assert!(wanted.matches(".drv\n").count() > 120, "{}", wanted.len());
    empty(&house);
    assert!(output(house.applet("nix-store").arg("--import"), &export).status.success());
    let ours = run(house.applet("nix-store").args(words(&drvs, line)), b"");
    assert_eq!((ours.stdout.as_str(), ours.status), (real.stdout.as_str(), Some(0)), "{ours:?}");
    let found = dump("ours");
    for (wanted, found) in wanted.lines().zip(found.lines()) {
        assert_eq!(wanted, found);
    }
    assert_eq!(wanted, found);
}
