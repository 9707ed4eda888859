//! The words of `larder`, on a store of one's own, through a daemon, and over ssh: the same answers.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use crate::house::{House, LARDER, Run, run};
use crate::served::{Daemon, twin};

const CONFIG: &str = "build-users-group =\nsandbox = false\nsubstituters =";

/// Words that only ask. `$f` and `$d` are files, `$out` is made by `$drv` of `$f`, `$dead` is kept by
/// nothing, `$none` is not valid, `$here` is the house. With `*` they need the files on this machine, with
/// `+` they need so little that `ssh://` does.
const ASKING: &str = "\
path-info $f $out
path-info --json -S -r $out
path-info --all
path-info $none
+ closure $out
+ closure --format tree $out
+ closure --format dot $drv
+ closure --format graphml $drv
closure --referrers --json $f
closure --referrers --format tree $f
+ closure $f $none
du
du --json $out
+ derivation show $drv
derivation show $out
+ derivation show -r $drv
derivation show $none
derivation add $here/work/x.json
* log $drv
* log $out
* log $f
roots
roots --json
why $out
why --json $f $dead
why $dead
why $none
gc --json
* gc --dry-run
* gc --dry-run --json
* gc --if-dropped $here/work/result
gc --if-dropped $here/work/nonsense
gc
+ verify $f $out
verify --json $f
verify $none
verify
verify --contents
build $drv
build --json $drv^out
build --dry-run $drv
build $none
";

/// Words that change something.
const CHANGING: &str = "\
add f d
add --json --name g --mode flat --hash sha1 f
add --json d --root link
add f d --root two
add nope
derivation add x.json
derivation add cycle.json
build --dry-run x.json
build x.json --root result
build --json x.json
build x.json -Q --check
build -Q x.json x.json --root two
derivation show result
log result
roots
verify --repair --contents
optimise
gc --dry-run
gc --dry-run --json
gc
gc --json --yes
gc --yes
why result
closure result link
";

fn furnish(house: &House) {
    house.write("f", "hello\n");
    std::fs::create_dir(house.work().join("d")).unwrap();
    house.write("d/x", "x\n");
    std::os::unix::fs::symlink("x", house.work().join("d/y")).unwrap();
    house.write("dead", "nobody needs this\n");
    let shell = r#""builder": "/bin/sh", "args": ["-c", "echo said; read x < $f; echo $x $f > $out"]"#;
    house.write("y.json", format!(r#"{{"name": "y", {shell}, "files": {{"f": "f"}}}}"#));
    let both = r#""files": {"f": "f"}, "derivations": {"y": "y.json"}"#;
    house.write("x.json", format!(r#"{{"name": "x", {shell}, {both}}}"#));
    house.write("cycle.json", format!(r#"{{"name": "x", {shell}, "derivations": {{"x": "cycle.json"}}}}"#));
}

/// Runs `larder` with words in which names are replaced.
fn larder(house: &House, remote: &str, line: &str, known: &[(&str, String)]) -> Run {
    let mut words = line.to_owned();
    for (name, value) in known {
        words = words.replace(name, value);
    }
    let mut command = house.applet("larder");
    command.args(words.split(' ')).env("NIX_REMOTE", remote).env("NIX_CONFIG", CONFIG);
    let search = format!("{}:{}", house.path().join("bin").display(), std::env::var("PATH").unwrap());
    run(command.env("PATH", search), b"")
}

/// What must be the same. A daemon that collects says how far it is.
fn comparable(mut run: Run) -> Run {
    let is_progress = |line: &str| line.starts_with("finding garbage") || line.starts_with("determining live");
    let mut stderr: Vec<&str> = run.stderr.lines().filter(|line| !is_progress(line)).collect();
    if stderr.iter().any(|line| line.starts_with("deleting ")) {
        stderr.sort_unstable();
    }
    run.stderr = stderr.join("\n");
    run
}

fn same(line: &str, remote: &str, local: &Run, far: Run) -> bool {
    let far = comparable(far);
    let same = (&local.stdout, local.status) == (&far.stdout, far.status)
        && (local.stderr.is_empty() || local.stderr == far.stderr);
    if !same {
        println!("{line}\n--- local {local:#?}\n--- {remote} {far:#?}");
    }
    same
}

/// `ssh` that runs a command here, whatever it is asked for.
fn forced_ssh(house: &House) -> PathBuf {
    let bin = house.path().join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\nexport NIX_REMOTE=local\n\
         case \"$*\" in *--serve*) exec {LARDER} nix-store --serve --write;; esac\n\
         exec {LARDER} nix-daemon --stdio\n"
    );
    std::fs::write(bin.join("ssh"), script).unwrap();
    std::fs::set_permissions(bin.join("ssh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    bin
}

#[test]
fn words_that_ask_have_the_same_answers_everywhere() {
    let house = House::new();
    furnish(&house);
    forced_ssh(&house);
    let first = |line: &str| {
        let found = larder(&house, "local", line, &[]);
        assert_eq!(found.status, Some(0), "{line}: {found:?}");
        found.stdout.lines().next().unwrap().to_owned()
    };
    let out = first("build -Q x.json --root result");
    let known = [
        ("$out", out.clone()),
        ("$drv", first("derivation add x.json")),
        ("$f", first("add f")),
        ("$dead", first("add dead")),
        ("$none", format!("{}/store/00000000000000000000000000000000-x", house.path().display())),
        ("$here", house.path().display().to_string()),
    ];
    std::fs::create_dir(house.path().join("var/gcroots/mine")).unwrap();
    std::os::unix::fs::symlink(&out, house.path().join("var/gcroots/mine/x")).unwrap();
    let daemon = Daemon::start(&house, LARDER, "sandbox = false");
    let mut different = 0;
    for line in ASKING.lines() {
        let (remotes, line): (&[&str], &str) = match line.split_at(2) {
            ("* ", line) => (&["daemon"], line),
            ("+ ", line) => (&["daemon", "ssh-ng://far", "ssh://far"], line),
            _ => (&["daemon", "ssh-ng://far"], line),
        };
        let local = comparable(larder(&house, "local", line, &known));
        for remote in remotes {
            different += usize::from(!same(line, remote, &local, larder(&house, remote, line, &known)));
        }
    }
    // Where the files are out of reach, sizes are those of archives.
    let planned = larder(&house, "ssh-ng://far", "gc --dry-run", &known);
    assert!(planned.status == Some(0) && planned.stdout.contains(&known[3].1), "{planned:?}");
    // What cannot be done says so.
    let not_there = "; it works on local stores only";
    for (remote, line, said) in [
        ("ssh-ng://far", "log $drv", not_there),
        ("ssh-ng://far", "add f --root link", not_there),
        ("ssh-ng://far", "build x.json --root link", not_there),
        ("daemon", "verify --json", not_there),
        ("daemon", "verify --resume", not_there),
        ("daemon", "optimise --json", not_there),
        ("daemon", "db rebuild", "this works on local stores only"),
        ("daemon", "adopt", "this works on local stores only"),
        ("daemon", "serve", "this works on local stores only"),
        ("ssh://far", "roots", "'ssh-ng://' can"),
    ] {
        let found = larder(&house, remote, line, &known);
        assert_eq!((found.status, found.stdout.as_str()), (Some(1), ""), "{remote} {line}: {found:?}");
        assert!(found.stderr.starts_with("error: ") && found.stderr.contains(said), "{remote} {line}: {found:?}");
    }
    assert!(!house.work().join("link").exists());
    drop(daemon);
    assert_eq!(different, 0);
}

#[test]
fn words_that_change_something_do_the_same_through_a_daemon() {
    let (_dir, place) = twin();
    let mut results = Vec::new();
    for remote in ["local", "daemon"] {
        let house = House::at(&place);
        furnish(&house);
        // Repairing is for trusted users, and we may be an ordinary one.
        let daemon = (remote != "local").then(|| Daemon::start(&house, LARDER, "sandbox = false\ntrusted-users = *"));
        let runs: Vec<Run> = CHANGING.lines().map(|line| larder(&house, remote, line, &[])).collect();
        results.push(runs);
        drop(daemon);
    }
    let far = results.pop().unwrap();
    let local = results.pop().unwrap();
    let mut different = 0;
    for ((line, local), far) in CHANGING.lines().zip(local).zip(far) {
        different += usize::from(!same(line, "daemon", &comparable(local), far));
    }
    assert_eq!(different, 0);
}
