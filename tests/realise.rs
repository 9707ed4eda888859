//! Building, from the words to the exit status. Derivations are written as JSON; where the sandbox
//! is not what a test is about, it is off.

use std::path::{Path, PathBuf};

use crate::house::{House, Run, run};

/// A derivation made by a shell script; `more` are further keys of the JSON.
fn derivation(house: &House, name: &str, script: &str, more: &str) -> String {
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    let script = serde_json::Value::from(script);
    let json = format!(r#"{{"name": "{name}", "builder": "/bin/sh", "args": ["-e", "-c", {script}]{more}}}"#);
    let file = house.write(&format!("{name}.json"), json);
    let added = house.run("larder", ["derivation".as_ref(), "add".as_ref(), file.as_os_str()]);
    assert_eq!((added.status, added.stderr.as_str()), (Some(0), ""), "{added:?}");
    added.stdout.trim_end().to_owned()
}

fn with_path(more: &str) -> String {
    let more = if more.is_empty() { String::new() } else { format!(", {more}") };
    format!(r#""env": {{"PATH": "/bin:/usr/bin"{more}}}"#)
}

/// `nix-store` with these words, without a sandbox.
fn nix_store(house: &House, words: &[&str]) -> Run {
    let fixed = ["--option", "sandbox", "false", "--option", "substituters", "", "--no-gc-warning"];
    house.run("nix-store", words.iter().copied().chain(fixed))
}

/// What `nix-store -r` prints for one derivation, which must be built.
fn realised(house: &House, drv: &str) -> PathBuf {
    let run = nix_store(house, &["-r", drv]);
    assert_eq!(run.status, Some(0), "{run:?}");
    PathBuf::from(run.stdout.lines().next().expect("a path"))
}

/// Writes over a file of the store, as no store would.
fn spoil(path: &Path) {
    let mut permissions = path.metadata().unwrap().permissions();
    #[expect(clippy::permissions_set_readonly_false, reason = "it is spoilt on purpose")]
    permissions.set_readonly(false);
    std::fs::set_permissions(path, permissions).unwrap();
    std::fs::write(path, "spoilt").unwrap();
}

#[test]
fn what_is_built_is_told_and_printed() {
    let house = House::new();
    let a = derivation(&house, "a", "echo from a; echo a > $out", "");
    let more = format!("{}, \"derivations\": {{\"dep\": \"a.json\"}}", with_path(""));
    let b = derivation(&house, "b", "printf 'one\\ttwo\\033[3p\\n50%%\\r100%%\\n' >&2; cp $dep $out", &more);
    let dry = nix_store(&house, &["-r", "--dry-run", &b]);
    let missing = format!("these 2 derivations will be built:\n  {a}\n  {b}\n");
    assert_eq!(dry, Run { stdout: String::new(), stderr: missing.clone(), status: Some(0) });
    let made = nix_store(&house, &["-r", &b]);
    let said = format!("{missing}building '{a}'...\nfrom a\nbuilding '{b}'...\none     two\n100%\n");
    assert_eq!((made.stderr, made.status), (said, Some(0)));
    let out = made.stdout.trim_end();
    assert_eq!(std::fs::read_to_string(out).unwrap(), "a\n");
    // Once more: nothing is said, and it is printed as often as it is asked for.
    let again = nix_store(&house, &["-r", &b, out, &b]);
    again.prints(&format!("{out}\n{out}\n{out}\n"));
    house.words("nix-store", &format!("-q --deriver {out}")).prints(&format!("{b}\n"));
    // What is there need not be read: not even the derivation it was made from.
    spoil(Path::new(&a));
    nix_store(&house, &["-r", &b]).prints(&format!("{out}\n"));
    let bare = house.run("nix-store", ["-r", &b]);
    let warning = "warning: you did not specify '--add-root'; the result might be removed by the garbage collector\n";
    assert_eq!(bare.stderr, warning);
}

#[test]
fn s076_roots_and_outputs() {
    let house = House::new();
    let outputs = r#""outputs": {"out": {}, "dev": {}, "man": {}}"#;
    let multi = derivation(&house, "multi", "for o in $out $dev $man; do echo > $o; done", outputs);
    let one = derivation(&house, "one", "echo > $out", "");
    let at = |name: &str| house.work().join(name).display().to_string();
    let run = nix_store(&house, &["-r", &one, &multi, "--add-root", "result", "--indirect"]);
    let links = ["result", "result-2", "result-2-dev", "result-2-man"].map(at);
    assert_eq!(run.stdout, links.map(|link| format!("{link}\n")).concat());
    let roots = house.words("nix-store", &format!("-q --roots {}", at("result-2-man")));
    assert!(roots.stdout.contains(&at("result-2-man")), "{roots:?}");
    // In the order of the paths, whatever the outputs are called.
    let all = nix_store(&house, &["-r", &multi]).stdout;
    let mut sorted: Vec<&str> = all.lines().collect();
    sorted.sort_unstable();
    assert_eq!(all.lines().collect::<Vec<_>>(), sorted);
    for words in ["!man", "^man", "!man,man"] {
        let man = nix_store(&house, &["-r", &format!("{multi}{words}")]).stdout;
        assert!(man.ends_with("-multi-man\n") && man.lines().count() == 1, "{man}");
    }
    nix_store(&house, &["-r", &format!("{multi}!nope,out")])
        .fails(&format!("derivation '{multi}' does not have wanted outputs 'nope'"));
    nix_store(&house, &["-r", "--no-output", &multi]).prints("");
}

#[test]
fn failures_have_their_texts_and_statuses() {
    let house = House::new();
    let bad = derivation(&house, "bad", "echo hi; echo there; exit 3", "");
    let killed = derivation(&house, "killed", "kill -9 $$", "");
    let slow = derivation(&house, "slow", "while :; do :; done", "");
    let zeros = "0".repeat(64);
    let fixed = format!(r#""outputs": {{"out": {{"method": "flat", "hashAlgo": "sha256", "hash": "{zeros}"}}}}"#);
    let wrong = derivation(&house, "wrong", "echo > $out", &fixed);
    let none = derivation(&house, "none", "true", "");
    let more = format!(r#"{}, "derivations": {{"a": "bad.json", "b": "none.json"}}"#, with_path(""));
    let top = derivation(&house, "top", "echo > $out", &more);
    let sparc = derivation(&house, "sparc", "true", r#""system": "sparc-linux""#);

    let missing = |drv: &str| format!("this derivation will be built:\n  {drv}\n");
    let building = |drv: &str| format!("{}building '{drv}'...\n", missing(drv));
    let fails = |words: &[&str], stderr: &str, status| {
        let run = nix_store(&house, words);
        assert_eq!(run, Run { stdout: String::new(), stderr: stderr.to_owned(), status: Some(status) });
    };
    let text = format!("error: builder for '{bad}' failed with exit code 3");
    fails(&["-r", &bad], &format!("{}hi\nthere\n{text}\n", building(&bad)), 100);
    let hidden = nix_store(&house, &["-r", "-Q", &bad]);
    let tail = format!(
        "{}{text};\n       last 2 log lines:\n       > hi\n       > there\n       For full logs, run",
        building(&bad)
    );
    assert!(hidden.stderr.starts_with(&tail), "{hidden:?}");
    let text = format!("{}error: builder for '{killed}' failed due to signal 9 (Killed)\n", building(&killed));
    fails(&["-r", &killed], &text, 100);
    let slept = nix_store(&house, &["-r", "--timeout", "1", &slow]);
    assert!(slept.stderr.ends_with("timed out after 1 seconds\n"), "{slept:?}");
    assert_eq!(slept.status, Some(101));
    let mismatch = nix_store(&house, &["-r", &wrong]);
    assert!(mismatch.stderr.contains(&format!("error: hash mismatch in fixed-output derivation '{wrong}':\n")));
    assert_eq!(mismatch.status, Some(102));
    let text =
        format!("{}error: builder for '{none}' failed to produce output path for output 'out' at '", building(&none));
    let run = nix_store(&house, &["-r", &none]);
    assert!(run.stderr.starts_with(&text) && run.status == Some(1), "{run:?}");
    // With --keep-going all that can be is built, and the status has all bits.
    let run = nix_store(&house, &["-r", "-k", "--timeout", "1", &slow, &wrong]);
    assert_eq!(run.status, Some(103));
    let mut both = [format!("'{slow}'"), format!("'{wrong}'")];
    both.sort();
    assert!(run.stderr.ends_with(&format!("error: build of {} failed\n", both.join(", "))), "{run:?}");
    let run = nix_store(&house, &["-r", "-k", &top]);
    assert!(run.stderr.ends_with(&format!("error: 2 dependencies of derivation '{top}' failed to build\n")), "{run:?}");
    assert_eq!((run.stderr.matches("error: builder for ").count(), run.status), (2, Some(100)));
    let run = nix_store(&house, &["-r", "-j1", &top]);
    assert!(run.stderr.ends_with(&format!("error: 1 dependencies of derivation '{top}' failed to build\n")), "{run:?}");
    let run = nix_store(&house, &["-r", &sparc]);
    let text = format!("error: a 'sparc-linux' with features {{}} is required to build '{sparc}', but I am a '");
    assert!(run.stderr.contains(&text) && run.status == Some(1), "{run:?}");
    let run = nix_store(&house, &["-r", "-j0", &bad]);
    let text = "error: unable to start any build; either increase '--max-jobs' or enable remote builds.\n";
    assert!(run.stderr.starts_with(&format!("{}{text}", missing(&bad))) && run.status == Some(1), "{run:?}");
}

#[test]
fn what_nobody_has_is_told() {
    let house = House::new();
    let nowhere = house.path().join(format!("store/{}-foo", "0".repeat(32))).display().to_string();
    let unknown = |path: &str| format!("don't know how to build these paths:\n  {path}\n");
    let run = nix_store(&house, &["-r", &nowhere]);
    assert_eq!(run.stderr, format!("{}error: build of '{nowhere}' failed\n", unknown(&nowhere)));
    let drv = format!("{nowhere}.drv");
    let run = nix_store(&house, &["-r", &drv]);
    let text = format!("{}error: cannot build missing derivation '{drv}'\n", unknown(&drv));
    assert_eq!((run.stderr, run.status), (text, Some(1)));
    nix_store(&house, &["-r", "--ignore-unknown", &drv, &nowhere]).prints("");
    assert_eq!(nix_store(&house, &["-r", "--dry-run", &drv]).status, Some(0));
    nix_store(&house, &["-r"]).prints("");
}

#[test]
fn s030_s031_s032_checks() {
    let house = House::new();
    let same = derivation(&house, "same", "echo $out > $out", "");
    let other = derivation(&house, "other", "cat /proc/sys/kernel/random/uuid > $out", &with_path(""));
    let run = nix_store(&house, &["-r", "--check", &same]);
    let text = format!("error: some outputs of '{same}' are not valid, so checking is not possible\n");
    assert!(run.stderr.ends_with(&text) && run.status == Some(1), "{run:?}");
    let (good, bad) = (realised(&house, &same), realised(&house, &other));
    let before = std::fs::read_to_string(&bad).unwrap();
    let run = nix_store(&house, &["-r", "--check", &same]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_eq!(run.stdout, format!("{}\n", good.display()));
    assert!(run.stderr.contains(&format!("checking outputs of '{same}'...\n")));
    let run = nix_store(&house, &["-r", "--check", &other]);
    let text = format!("error: derivation '{other}' may not be deterministic: output '{}' differs\n", bad.display());
    assert!(run.stderr.ends_with(&text) && run.status == Some(104), "{run:?}");
    assert_eq!(std::fs::read_to_string(&bad).unwrap(), before);
    // A failed build besides: both bits.
    let fails = derivation(&house, "fails", "exit 1", "");
    let run = nix_store(&house, &["-r", "-k", "--check", &other, &fails]);
    assert_eq!(run.status, Some(104), "an output that is not valid has no bit of its own: {run:?}");
}

#[test]
fn s057_s078_s079_repairs() {
    let house = House::new();
    let dep = derivation(&house, "dep", "cat /proc/sys/kernel/random/uuid > $out", &with_path(""));
    let more = format!(r#"{}, "derivations": {{"dep": "dep.json"}}"#, with_path(""));
    let top = derivation(&house, "top", "echo $dep > $out", &more);
    let (below, out) = (realised(&house, &dep), realised(&house, &top));
    let repair = |drv: &str| nix_store(&house, &["-r", "--repair", drv]);
    spoil(&below);
    let run = repair(&dep);
    assert!(run.stderr.contains(&format!("repairing outputs of '{dep}'...\n")), "{run:?}");
    assert!(run.stderr.contains(&format!("path '{}' is corrupted or missing!", below.display())), "{run:?}");
    let run = repair(&dep);
    assert!(run.status == Some(0) && !run.stderr.contains("repairing outputs"), "{run:?}");
    house.words("nix-store", &format!("--verify-path {}", below.display())).prints("");
    // Damage below is found from above.
    spoil(&below);
    let run = repair(&top);
    let found = format!("found corrupted or missing path '{}' in the output closure of '{top}'\n", below.display());
    assert!(run.stderr.contains(&found) && run.status == Some(0), "{run:?}");
    house.words("nix-store", &format!("--verify-path {} {}", below.display(), out.display())).prints("");
    // What is gone altogether comes back, by the path alone too.
    std::fs::remove_file(&below).unwrap();
    let run = nix_store(&house, &["--repair-path", below.to_str().unwrap()]);
    assert_eq!(run.status, Some(0), "{run:?}");
    house.words("nix-store", &format!("--verify-path {}", below.display())).prints("");
}

/// A verification with `--repair` makes anew what something can make, and tells of the rest.
#[test]
fn s080_verification_repairs_contents() {
    let house = House::new();
    let dep = derivation(&house, "dep", "cat /proc/sys/kernel/random/uuid > $out", &with_path(""));
    let more = format!(r#"{}, "derivations": {{"dep": "dep.json"}}"#, with_path(""));
    let top = derivation(
        &house,
        "top",
        "echo $dep > $out; echo equal > $two",
        &format!(r#"{more}, "outputs": {{"out": {{}}, "two": {{}}}}"#),
    );
    let run = nix_store(&house, &["-r", &top]);
    assert_eq!(run.status, Some(0), "{run:?}");
    let made: Vec<PathBuf> = run.stdout.lines().map(PathBuf::from).collect();
    let below = realised(&house, &dep);
    let source = house.write("source", "equal\n");
    let source = PathBuf::from(house.run("nix-store", ["--add".as_ref(), source.as_os_str()]).stdout.trim_end());
    let verify = |more: &[&str]| nix_store(&house, &[&["--verify", "--check-contents"], more].concat());
    assert_eq!(verify(&[]).status, Some(0));
    // Two outputs, one of them equal to a source through `.links`, and what they need.
    nix_store(&house, &["--optimise"]);
    spoil(&source);
    spoil(made.iter().find(|path| std::fs::read_to_string(path).unwrap() != "spoilt").unwrap());
    std::fs::remove_file(&below).unwrap();
    let names = |run: &Run, text: &str| run.stderr.matches(text).count();
    let run = verify(&[]);
    assert_eq!(run.status, Some(1), "{run:?}");
    assert_eq!(names(&run, "was modified!"), 5, "two links, and three files: {run:?}");
    assert_eq!(names(&run, "disappeared, but it still has valid referrers!"), 1, "{run:?}");
    let run = verify(&["--repair"]);
    // Nothing makes the source.
    let cannot = format!("cannot repair path '{}'\n", source.display());
    assert!(run.stderr.contains(&cannot) && names(&run, "cannot repair path") == 1, "{run:?}");
    assert!(run.stderr.ends_with("warning: not all store errors were fixed\n") && run.status == Some(1), "{run:?}");
    assert_eq!(names(&run, "removed link '"), 2, "{run:?}");
    assert_eq!(names(&run, "repairing outputs of"), 2, "each derivation once: {run:?}");
    for path in made.iter().chain([&below]) {
        nix_store(&house, &["--verify-path", path.to_str().unwrap()]).prints("");
    }
    // What was damaged is not linked to what is sound.
    nix_store(&house, &["--optimise"]);
    assert!(made.iter().any(|path| std::fs::read_to_string(path).unwrap() == "equal\n"));
    nix_store(&house, &["--delete", source.to_str().unwrap()]);
    assert_eq!(verify(&["--repair"]).status, Some(0));
    assert_eq!(verify(&[]).status, Some(0));
    let run = house.run("larder", ["verify", "--full", "--repair"]);
    assert_eq!(run.status, Some(0), "{run:?}");
}

/// Little room: what nobody needs goes before a builder starts, and what it needs stays.
#[test]
fn room_is_made_before_a_build() {
    let house = House::new();
    let waste: Vec<String> = (0..3u8).map(|n| house.add(&format!("waste{n}"), vec![n; 10_000])).collect();
    let source = house.write("source", "needed\n");
    let more = format!(r#"{}, "files": {{"src": {:?}}}"#, with_path(""), source);
    let drv = derivation(&house, "d", "cp $src $out", &more);
    let free = house.write("free", "1000");
    let words = format!("-r {drv} --option sandbox false --option min-free 2000 --option max-free 1000000");
    let made = run(house.applet("nix-store").args(words.split(' ')).env("_NIX_TEST_FREE_SPACE_FILE", &free), b"");
    assert!(made.status == Some(0) && made.stderr.contains("running auto-GC to free 999000 bytes\n"), "{made:?}");
    assert_eq!(std::fs::read_to_string(made.stdout.trim_end()).unwrap(), "needed\n");
    assert!(waste.iter().all(|path| !Path::new(path).exists()));
}

#[test]
fn s066_logs_are_found_in_old_places_too() {
    let house = House::new();
    let drv = derivation(&house, "d", "printf 'a\\033[31mb\\tc'; echo > $out", "");
    let out = realised(&house, &drv);
    let base = drv.rsplit('/').next().unwrap();
    let (front, rest) = base.split_at(2);
    let logs = house.path().join("log/drvs");
    let file = logs.join(front).join(format!("{rest}.bz2"));
    assert!(file.exists());
    let text = "a\u{1b}[31mb\tc";
    for what in [drv.as_str(), out.to_str().unwrap()] {
        nix_store(&house, &["-l", what]).prints(text);
        house.run("larder", ["log", what]).prints(text);
    }
    std::fs::rename(file, logs.join(format!("{base}.bz2"))).unwrap();
    nix_store(&house, &["-l", &drv]).prints(text);
    let nothing = derivation(&house, "nothing", "true", "");
    nix_store(&house, &["-l", &nothing]).fails(&format!("build log of derivation '{nothing}' is not available"));
}

#[test]
fn queries_realise_on_demand() {
    let house = House::new();
    let drv = derivation(&house, "d", "echo > $out", "");
    let sizes = ["-q", "-u", "-f", "--size", &drv];
    let run = nix_store(&house, &sizes);
    assert_eq!((run.stdout.as_str(), run.status), ("120\n", Some(0)), "{run:?}");
    assert_eq!(run.stderr, format!("building '{drv}'...\n"));
}

#[test]
fn builds_are_traced_for_programs() {
    let house = House::new();
    let good = derivation(&house, "good", "echo > $out", "");
    let bad = derivation(&house, "bad", "exit 1", "");
    let run = nix_store(&house, &["-r", "-k", "--print-build-trace", &good, &bad]);
    let lines: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("@ ")).collect();
    let log = |drv: &str| {
        let (front, rest) = drv.rsplit('/').next().unwrap().split_at(2);
        format!("{}/log/drvs/{front}/{rest}.bz2", house.path().display())
    };
    let system = format!("{}-linux", std::env::consts::ARCH);
    let started = |drv: &str| format!("@ build-started {drv} - {system} {}", log(drv));
    let failed = format!("@ build-failed {bad} - 100 builder for '{bad}' failed with exit code 1");
    assert_eq!(lines, [started(&bad), failed, started(&good), format!("@ build-succeeded {good} -")]);
}

/// Two builders each of which waits for the other: they do run at once.
#[test]
fn builders_run_side_by_side() {
    let house = House::new();
    let script = |mine: &str, theirs: &str| {
        let dir = house.work().display().to_string();
        format!("echo > {dir}/{mine}; while ! test -e {dir}/{theirs}; do sleep 0.05; done; echo > $out")
    };
    let a = derivation(&house, "a", &script("a", "b"), &with_path(""));
    let b = derivation(&house, "b", &script("b", "a"), &with_path(""));
    let run = nix_store(&house, &["-r", "-j2", "--timeout", "120", &a, &b]);
    assert_eq!(run.status, Some(0), "{run:?}");
}

#[test]
fn s026_many_that_write_too_much() {
    let house = House::new();
    let script = "while :; do echo spam spam spam spam; done";
    let drvs: Vec<String> = (0..8).map(|n| derivation(&house, &format!("spam{n}"), script, "")).collect();
    let mut words = vec!["-r", "-j8", "-k", "--option", "max-build-log-size", "1000", "--quiet", "--quiet"];
    words.extend(drvs.iter().map(String::as_str));
    let run = nix_store(&house, &words);
    let killed = "killed after writing more than 1000 bytes of log output";
    assert_eq!((run.stderr.matches(killed).count(), run.status), (8, Some(1)), "{run:?}");
}

/// After Ctrl-C no builder is left, and the status says what happened.
#[test]
fn an_interrupt_ends_builders() {
    let house = House::new();
    let pid_file = house.work().join("pid");
    let script = format!("echo $$ > {0}.new; mv {0}.new {0}; while :; do sleep 0.1; done", pid_file.display());
    let drv = derivation(&house, "d", &script, &with_path(""));
    let mut command = house.applet("nix-store");
    command.args(["-r", "--option", "sandbox", "false", &drv]);
    let child = crate::house::spawn(&mut command);
    while !pid_file.exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let builder = std::fs::read_to_string(&pid_file).unwrap();
    let kill = |signal: &str, pid: &str| run(house.command("kill").args([signal, pid]), b"").status;
    assert_eq!(kill("-INT", &child.id().to_string()), Some(0));
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.ends_with("error: interrupted by the user\n"), "{stderr}");
    assert_eq!(output.status.code(), Some(1));
    assert_ne!(kill("-0", builder.trim()), Some(0), "the builder lives");
}

#[test]
fn people_write_derivations() {
    let house = House::new();
    let add = |text: &str| {
        house.write("x.json", text);
        house.words("larder", "derivation add x.json")
    };
    for (text, error) in [
        ("[]", "it in 'x.json' should be an object"),
        ("{", "'x.json' is not JSON: EOF while parsing an object at line 1 column 1"),
        (r#"{"builder": "b"}"#, "'x.json' is no derivation: the derivation has no key 'name'"),
        (
            r#"{"name": "x", "builder": "b", "zork": 1}"#,
            "'x.json' is no derivation: the derivation has an unexpected key 'zork'",
        ),
        (r#"{"name": "x", "builder": "b", "files": {"src": 1}}"#, "files.src in 'x.json' should be the name of a file"),
        (
            r#"{"name": "x", "builder": "b", "derivations": {"d": "x.json"}}"#,
            "'x.json' needs itself, by way of 'x.json'",
        ),
    ] {
        add(text).fails(error);
    }
    // As deep as one likes, but not in a circle.
    house.write("n0.json", r#"{"name": "n0", "builder": "b"}"#);
    for n in 1..300 {
        let text = format!(r#"{{"name": "n{n}", "builder": "b", "derivations": {{"d": "n{}.json"}}}}"#, n - 1);
        house.write(&format!("n{n}.json"), &text);
    }
    let top = house.words("larder", "derivation add n299.json").stdout;
    assert_eq!(house.run("nix-store", ["-qR", top.trim()]).stdout.lines().count(), 300);
    house.write("n0.json", r#"{"name": "n0", "builder": "b", "derivations": {"d": "n2.json"}}"#);
    house.words("larder", "derivation add n2.json").fails("'n2.json' needs itself, by way of 'n0.json'");
    house.words("larder", "derivation add none.json").fails("cannot read 'none.json': No such file or directory");
    // What is shown can be added again, and is the same.
    let outputs = r#""outputs": {"out": {}, "doc": {}}"#;
    let drv = derivation(&house, "d", "echo > $out", outputs);
    let shown = house.run("larder", ["derivation", "show", &drv]);
    let value: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    let inner = value.get(&drv).unwrap().to_string();
    add(&inner).prints(&format!("{drv}\n"));
    let fed = house.feed("larder", "derivation add -", inner.as_bytes());
    fed.prints(&format!("{drv}\n"));
}

/// The examples, built in a sandbox as they are in the README.
#[test]
fn examples_are_built() {
    let house = House::new();
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    let store = format!("local?root={}", house.path().join("root").display());
    let build = |words: &[&str]| {
        let mut command = house.command(crate::house::LARDER);
        command.env_remove("NIX_STORE_DIR").env_remove("NIX_STATE_DIR").env_remove("NIX_LOG_DIR");
        command.current_dir(&examples).args(["build", "--host-tools", "--json", "--store", &store]);
        command.args(["--option", "sandbox", "true", "--option", "sandbox-fallback", "false"]);
        run(command.args(words), b"")
    };
    let files = ["hello.json", "outputs.json", "fixed.json", "program.json"];
    let made = build(&files);
    if made.status != Some(0) && (made.stderr.contains("namespace") || made.stderr.contains("unshare")) {
        println!("skipped: no sandbox on this machine: {}", made.stderr);
        return;
    }
    assert_eq!(made.status, Some(0), "{made:?}");
    let rows: serde_json::Value = serde_json::from_str(&made.stdout).unwrap();
    let real = |row: usize, output: &str| {
        let path = rows[row]["outputs"][output].as_str().unwrap();
        house.path().join("root").join(path.trim_start_matches('/'))
    };
    let hello = run(&mut house.command(real(0, "out")), b"");
    hello.prints("Hello, world!\n");
    assert!(real(1, "doc").join("share/README").exists());
    run(&mut house.command(real(1, "out").join("bin/hello")), b"").prints("Hello, world!\n");
    run(house.command(real(3, "out").join("bin/primes")).arg("12"), b"").prints("2 3 5 7 11\n");
    let checked = build(&["--check", "program.json"]);
    assert_eq!(checked.status, Some(0), "{checked:?}");
}
