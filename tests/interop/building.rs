//! The same derivations built by real Nix and by Larder: whatever can be told of the outputs must
//! be the same, and so must the logs.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use super::has_nix;
use crate::house::{House, run};

/// The derivations, and what they are made of.
const GRAPH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/graph");

/// Builds everything with one `nix-store`, and gives the registrations and the logs.
fn build(command: &dyn Fn() -> Command, derivations: &[String]) -> (String, BTreeMap<String, String>) {
    let mut realise = command();
    let realised = run(realise.args(["-r", "-k"]).args(derivations), b"");
    assert_eq!(realised.status, Some(0), "{}", realised.stderr);
    let dumped = run(command().arg("--dump-db"), b"");
    let names = derivations.iter().filter_map(|drv| drv.split('!').next());
    let closure = run(command().arg("-qR").args(names), b"");
    let mut logs = BTreeMap::new();
    for derivation in closure.stdout.lines().filter(|path| path.ends_with("drv")) {
        let log = run(command().args(["--read-log", derivation]), b"");
        assert_eq!(log.status, Some(0), "{derivation}: {}", log.stderr);
        logs.insert(derivation.to_owned(), log.stdout);
    }
    (dumped.stdout, logs)
}

/// Registrations, a list of lines for each path.
pub(super) fn records(dump: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut records = BTreeMap::new();
    let mut lines = dump.lines();
    while let Some(path) = lines.next() {
        let mut record: Vec<&str> = lines.by_ref().take(4).collect();
        let count = record.last().and_then(|count| count.parse().ok()).unwrap_or(0);
        record.extend(lines.by_ref().take(count));
        records.insert(path, record);
    }
    records
}

fn same_builds(sandboxed: bool) {
    if !has_nix() {
        return;
    }
    let house = House::new();
    let config = format!(
        "build-users-group =\nsandbox = {sandboxed}\nsandbox-fallback = false\n\
         sandbox-paths = /bin /usr /lib /lib64\nsubstituters =\nmax-jobs = 2"
    );
    let real = |program: &str| {
        let mut command = house.command(program);
        command.env("NIX_CONFIG", &config);
        command
    };
    let ours = || {
        let mut command = house.applet("nix-store");
        command.env("NIX_CONFIG", &config);
        command
    };
    let sandboxed = sandboxed.to_string();
    let mut instantiate = real("nix-instantiate");
    instantiate.args(["--arg", "sandboxed", &sandboxed]).arg(Path::new(GRAPH).join("graph.nix"));
    let found = run(&mut instantiate, b"");
    assert_eq!(found.status, Some(0), "{}", found.stderr);
    let derivations: Vec<String> = found.stdout.lines().map(str::to_owned).collect();
    let names: Vec<&str> = derivations.iter().filter_map(|drv| drv.split('!').next()).collect();

    // What real Nix made goes aside, and Larder gets the same derivations in the same places.
    let closure = run(real("nix-store").arg("-qR").args(&names), b"");
    let exported = crate::house::output(real("nix-store").arg("--export").args(closure.stdout.lines()), b"");
    let (their_dump, their_logs) = build(&|| real("nix-store"), &derivations);
    for dir in ["store", "var", "log"] {
        std::fs::rename(house.path().join(dir), house.path().join(format!("{dir}-of-nix"))).unwrap();
    }
    let imported = run(ours().arg("--import"), &exported.stdout);
    assert_eq!(imported.status, Some(0), "{}", imported.stderr);
    let (our_dump, our_logs) = build(&ours, &derivations);

    let (theirs, mine) = (records(&their_dump), records(&our_dump));
    println!("{} derivations, {} valid paths", our_logs.len(), mine.len());
    assert!(our_logs.len() >= 60);
    for (path, record) in &theirs {
        if mine.get(path) != Some(record) {
            let base = path.rsplit('/').next().unwrap_or_default();
            let diff = Command::new("diff")
                .args(["-ru", "--no-dereference"])
                .args([house.path().join("store-of-nix").join(base), house.path().join("store").join(base)])
                .output();
            let diff = diff.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default();
            panic!("{path}: real Nix {record:?}, Larder {:?}\n{diff}", mine.get(path));
        }
    }
    assert_eq!(mine.len(), theirs.len());
    // Builders that are part of real Nix write its own messages, as JSON with random numbers.
    for (derivation, log) in their_logs.iter().filter(|(_, log)| !log.starts_with("@nix")) {
        assert_eq!(our_logs.get(derivation), Some(log), "log of {derivation}");
    }
    let verified = run(ours().args(["--verify", "--check-contents"]), b"");
    assert_eq!(verified.status, Some(0), "{}", verified.stderr);
    let checked = run(ours().args(["-r", "--check", "-k"]).args(&derivations), b"");
    assert_eq!(checked.status, Some(0), "{}", checked.stderr);
}

#[test]
fn builds_in_the_sandbox_are_the_same() {
    same_builds(true);
}

#[test]
fn builds_without_a_sandbox_are_the_same() {
    same_builds(false);
}
