//! Building through the daemon: real clients, which must not notice whose daemon it is, and clients
//! that want the same, or go away.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use larder_core::api::{BuildMode, BuildStatus, DerivedPath, ErrorKind, ReadStore as _, Store as _};
use larder_core::derivation::OutputName;
use larder_core::report::Silent;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_wire::worker::client::Client;

use crate::house::{House, LARDER, Run, run};
use crate::served::{
    Daemon, Heard, Land, all_of, children, client, connect, fill, has, is_root, shell, twin, wait_for,
};

/// Derivations of all sorts. `mk` runs a shell.
const EXPRESSION: &str = r#"
let
  mk = name: script: args: derivation ({
    inherit name; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/bin:/usr/bin";
    args = [ "-c" script ]; } // args);
in rec {
  base = mk "base" "echo in base; echo base > $out" {};
  lib = mk "lib" "mkdir $out $dev; echo $base > $out/base; echo lib > $dev/h; echo lib is built >&2" {
    inherit base; outputs = [ "out" "dev" ]; };
  tool = mk "tool-1.0" "mkdir -p $out/bin; echo '#!/bin/sh' > $out/bin/tool; echo 'echo $lib 1' >> $out/bin/tool; chmod +x $out/bin/tool" {
    inherit lib; };
  tool2 = mk "tool-2.0" "mkdir -p $out/bin; echo '#!/bin/sh' > $out/bin/tool; echo 'echo 2' >> $out/bin/tool; chmod +x $out/bin/tool" {};
  top = mk "top" "cat $lib/base $base > $out; for i in 1 2 3; do echo line $i; done" { inherit lib base; };
  bad = mk "bad" "echo going wrong; echo very wrong >&2; exit 3" {};
  worse = mk "worse" "exit 4" {};
  none = mk "none" "true" {};
  onbad = mk "onbad" "echo > $out" { inherit bad worse; };
  slow = mk "slow" "sleep 100; echo > $out" {};
  random = mk "random" "cat /proc/sys/kernel/random/uuid > $out" {};
  flat = mk "flat" "printf fixed > $out" {
    outputHashAlgo = "sha256"; outputHashMode = "flat"; outputHash = builtins.hashString "sha256" "fixed"; };
  mismatch = mk "mismatch" "printf other > $out" {
    outputHashAlgo = "sha256"; outputHashMode = "flat"; outputHash = builtins.hashString "sha256" "wanted"; };
  alien = derivation { name = "alien"; system = "vax-bsd"; builder = "/bin/sh"; };
  shell = mk "shell" "true" { inherit lib; greeting = "hello"; };
}
"#;

/// A key for tests.
const KEY: &str =
    "larder-test-1:Q96AVJJprFymeGSx3qhErPd2Mao5D+9p3ZyBe4h8yb6ddq3zWq58/660NGoUMePHoqOD2MT326BO9jqgdJ1+4A==";

/// What is said of a build's success is the same for all: no status, no paths, no trace.
const CONFIG: &str = "sandbox = true\nsandbox-paths = /bin /usr /lib /lib64\nsandbox-fallback = false\n\
                      substituters =\nmax-jobs = 1\nexperimental-features = nix-command";

/// What real clients do, one command a line; `@name` is the derivation of that name.
const SCENARIO: &str = "\
nix-build x.nix -A base --no-out-link
nix-build x.nix -A base --no-out-link
nix-build x.nix -A top --dry-run
nix-build x.nix -A top -o top
nix-build x.nix -A lib -o lib
nix-build x.nix -A lib -A flat --no-out-link
nix-build x.nix -A bad
nix-build x.nix -A onbad
nix-build x.nix -A onbad -k
nix-build x.nix -A bad -A none -A tool -k
nix-build x.nix -A none -K
nix-build x.nix -A mismatch
nix-build x.nix -A alien
nix-build x.nix -A tool --check
nix-build x.nix -A random --no-out-link -Q
nix-build x.nix -A random --check --keep-failed
nix-build x.nix -A slow --timeout 1
nix-build x.nix -A slow --max-silent-time 1
nix-build x.nix -A slow -j0
nix-build x.nix -A worse --quiet
nix-build x.nix -A lib --check -v
nix-store -r @top
nix-store -r @top --add-root root --indirect
nix-store -r @lib!dev
nix-store -r @lib!zork
nix-store -r @bad
nix-store -r @bad @worse -k
nix-store -r @bad @worse --keep-failed
nix-store -r @tool2 --dry-run
nix-store -r @tool2
nix-store -r $none
nix-store -r --ignore-unknown $none
nix-store --realise @base --repair
nix-store -q --outputs @lib
nix-store -qR --include-outputs @top
nix-store -q --deriver $top
nix-store -q --valid-derivers $top
nix-store -q --requisites $top
nix-store -q --references $top
nix-store -q --referrers-closure $base
nix-store -q --hash $top
nix-store -q --size $top
nix-store -q --roots $top
nix-store -l @top
nix-store -l $top
nix-store -l @bad
nix log @lib
nix log @flat
nix log $none
nix build -f x.nix tool --no-link
nix build -f x.nix bad
nix build -f x.nix bad worse onbad --keep-going
nix build -f x.nix lib top -o out
nix build -f x.nix top --json --no-link
nix build -f x.nix top --rebuild --no-link
nix build -f x.nix mismatch
nix build -f x.nix none -L
nix build @top --no-link
nix path-info -f x.nix top
nix path-info -r -s -S $top
nix path-info --json $top
nix show-derivation @top
nix why-depends $top $base
nix store verify --no-trust -r $top
nix store sign -k ../key $top
nix path-info --sigs $top
nix-env -p profile -f x.nix -iA tool
nix-env -p profile -q
nix-env -p profile -q --out-path
nix-env -p profile -f x.nix -iA tool2
nix-env -p profile -q
nix-env -p profile --rollback
nix-env -p profile -q
nix-env -p profile -G 2
nix-env -p profile -e tool
nix-env -p profile -q
nix-env -p profile --rollback
nix-env -p profile --delete-generations old
nix-env -p profile --set $top
nix-shell x.nix -A shell --run ./show
nix-shell x.nix -A shell --pure --run ./show
nix-shell x.nix -A onbad --run ./show
nix-instantiate x.nix -A top --add-root inst
nix-instantiate --eval -E 1+1
nix-store --verify --check-contents
nix-store --export $top
nix copy --to file://$house/cache $top
nix-store --gc --print-roots
nix-store --delete @base
nix-store --gc
nix path-info --all
nix-store -r $top
nix copy --from file://$house/cache $top --no-check-sigs
nix-collect-garbage -d
nix path-info --all
";

/// What the two daemons may say differently: what is left to chance, and what 2.26 says otherwise
/// than 2.8.
fn plain(line: &str, mut run: Run) -> Run {
    for text in [&mut run.stdout, &mut run.stderr] {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        for line in &mut lines {
            // Names of build directories are left to chance.
            if let Some(at) = line.find("keeping build directory") {
                line.truncate(at);
            }
            // Where a sandbox has its root.
            *line = line.replace(".chroot/root/", ".chroot/");
            *line = line.replace("--query --roots and nix-store --query --referrers", "--query --roots");
            let word = "\"registrationTime\":";
            if let Some(at) = line.find(word) {
                let end = line[at + word.len()..].find([',', '}']).map_or(line.len(), |n| at + word.len() + n);
                line.replace_range(at..end, "");
            }
        }
        // Links of `nix-build` itself, which have random names.
        lines.retain(|line| !line.starts_with("removing stale link"));
        if line.contains("--roots") {
            // In the order of a hash table.
            lines.sort_unstable();
        }
        if line.contains("--gc") || line.contains("collect-garbage") {
            // What goes first is left to chance by both. Real Nix leaves more locks behind.
            lines.retain(|line| !line.ends_with(".lock'") && !line.contains(" store paths deleted, "));
            lines.sort_unstable();
        }
        *text = lines.join("\n");
    }
    run
}

fn scenario(land: &Land, house: &House, is_real: bool) -> Vec<(String, Run)> {
    house.write("x.nix", EXPRESSION);
    let show = house.write("show", "#!/bin/sh\necho $greeting $lib $name $IN_NIX_SHELL\n");
    std::fs::set_permissions(show, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(house.path().join("key"), KEY).unwrap();
    let here = house.path().to_str().unwrap();
    let mut known = vec![
        ("$house".to_owned(), here.to_owned()),
        ("$none".to_owned(), format!("{here}/store/00000000000000000000000000000000-x")),
    ];
    for name in EXPRESSION.lines().filter_map(|line| line.strip_prefix("  ")?.split_once(" = mk ").map(|(n, _)| n)) {
        let instantiate = || run(&mut land.client(house, &["nix-instantiate", "x.nix", "-A", name]), b"");
        let mut found = instantiate();
        if found.status != Some(0) && is_real {
            // On a busy machine, the first client of a new real daemon has been seen to fail.
            println!("once more: {found:?}");
            found = instantiate();
        }
        let drv = found.stdout.trim().trim_end_matches("!dev").to_owned();
        known.push((format!("@{name} "), format!("{drv} ")));
        known.push((format!("@{name}!"), format!("{drv}!")));
        let out = run(&mut land.client(house, &["nix-store", "-q", "--outputs", &drv]), b"").stdout;
        known.push((format!("${name} "), format!("{} ", out.lines().last().unwrap_or_default())));
    }
    let mut runs = Vec::new();
    for line in SCENARIO.lines() {
        let mut words = format!("{line} ");
        for (name, value) in &known {
            words = words.replace(name, value);
        }
        let words: Vec<&str> = words.split_whitespace().collect();
        let mut command = land.client(house, &words);
        command.env("NIX_BUILD_SHELL", "/bin/bash");
        runs.push((line.to_owned(), plain(line, run(&mut command, b""))));
    }
    runs
}

/// The scenario with the daemon that the clients belong to, and with ours.
fn build_alike(land: &Land) {
    let (_dir, place) = twin();
    let mut results = Vec::new();
    for real in [true, false] {
        let house = House::at(&place);
        let daemon = if real { land.daemon(&house, CONFIG) } else { Daemon::start(&house, LARDER, CONFIG) };
        results.push(scenario(land, &house, real));
        drop(daemon);
    }
    let ours = results.pop().unwrap();
    let real = results.pop().unwrap();
    let mut different = 0;
    for ((line, ours), (_, real)) in ours.iter().zip(&real) {
        // Who is not trusted may add signatures since some version after 2.8, and Larder does as 2.26.
        if !crate::served::is_root() && (line.starts_with("nix store sign") || line.contains(" --sigs ")) {
            assert_eq!(ours.status, Some(0), "{line}: {ours:?}");
            continue;
        }
        let is_same = (&ours.stdout, ours.status) == (&real.stdout, real.status);
        if !is_same || (land.compares_messages() && ours.stderr != real.stderr) {
            different += 1;
            for (who, run) in [("real", real), ("ours", ours)] {
                println!("{line}\n--- {who} {:?}\n{}\n--\n{}", run.status, run.stdout, run.stderr);
            }
        }
    }
    println!("{} commands, {different} different", ours.len());
    assert_eq!(different, 0);
}

#[test]
fn real_clients_build_alike() {
    if let Some(land) = Land::here() {
        build_alike(&land);
    }
}

#[test]
fn clients_of_trixie_build_alike() {
    if let Some(land) = Land::trixie() {
        build_alike(&land);
    }
}

/// A derivation whose builder runs a script without a sandbox.
fn add(house: &House, name: &str, script: &str) -> StorePath {
    let file = house.write(
        "made.nix",
        format!(
            r#"derivation {{ name = "{name}"; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/bin:/usr/bin";
                 args = [ "-c" ''{script}'' ]; }}"#
        ),
    );
    let found = run(&mut client(house, &["nix-instantiate", file.to_str().unwrap()]), b"");
    assert_eq!(found.status, Some(0), "{found:?}");
    found.stdout.trim().rsplit('/').next().unwrap().parse().unwrap()
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

const UNBOXED: &str = "sandbox = false\nmax-jobs = 4\nbuild-poll-interval = 1";

/// What several want is built once, and each hears of it.
#[test]
fn one_build_for_two_clients() {
    if !has("nix-instantiate") {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, UNBOXED);
    let count = house.path().join("count");
    let gate = house.path().join("gate");
    let script = format!(
        "echo x >> {}; echo one; until [ -e {} ]; do sleep 0.05; done; echo two; echo > $out",
        count.display(),
        gate.display()
    );
    let drv = add(&house, "shared", &script);
    let mut all_heard = Vec::new();
    std::thread::scope(|scope| {
        for newest in [38, 34, 21] {
            let (client, heard, _) = connect(&house, &daemon, newest);
            all_heard.push(heard);
            let drv = &drv;
            scope.spawn(move || {
                let results = client.build(&all_of(drv), BuildMode::Normal).unwrap();
                assert!(results[0].status.is_success(), "{results:?}");
            });
        }
        let hears = |heard: &Arc<Heard>| heard.all().iter().any(|text| text == "> one");
        wait_for("all hear of the one that runs", || all_heard.iter().all(hears));
        std::fs::write(&gate, "").unwrap();
    });
    assert_eq!(lines(&count), 1);
    for heard in all_heard.iter().map(|heard| heard.all()) {
        assert!(heard.iter().any(|text| text.starts_with("building '")), "{heard:?}");
        for line in ["> one", "> two"] {
            assert!(heard.iter().any(|text| text == line), "{heard:?}");
        }
    }
    wait_for("nothing runs", || children(daemon.child.id()) == 0);
}

/// A client that goes away takes along what only it wanted.
#[test]
fn s058_what_nobody_wants_is_cancelled() {
    if !has("nix-instantiate") {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, UNBOXED);
    let count = house.path().join("count");
    let script = |gate: &Path| {
        let (count, here) = (count.display(), house.path().display());
        format!(
            "echo $$ > {here}/pid-$name; echo x >> {count}; until [ -e {} ]; do sleep 0.05; done; echo > $out",
            gate.display()
        )
    };
    let gate = house.path().join("gate");
    let (alone, both) =
        (add(&house, "alone", &script(&house.path().join("never"))), add(&house, "both", &script(&gate)));
    let (leaving, _, line) = connect(&house, &daemon, 38);
    let (staying, _, _) = connect(&house, &daemon, 38);
    std::thread::scope(|scope| {
        let left = scope.spawn(|| leaving.build(&[all_of(&alone), all_of(&both)].concat(), BuildMode::Normal));
        wait_for("both run", || lines(&count) == 2);
        let stayed = scope.spawn(|| staying.build(&all_of(&both), BuildMode::Normal));
        std::thread::sleep(Duration::from_millis(300));
        line.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(left.join().unwrap().is_err());
        let lives = |name: &str| {
            let pid = std::fs::read_to_string(house.path().join(format!("pid-{name}"))).unwrap();
            Path::new("/proc").join(pid.trim()).exists()
        };
        wait_for("what nobody wants ends", || !lives("alone"));
        assert!(lives("both"));
        std::fs::write(&gate, "").unwrap();
        let results = stayed.join().unwrap().unwrap();
        assert_eq!(results[0].status, BuildStatus::Built, "{results:?}");
    });
    assert_eq!(lines(&count), 2);
    wait_for("nothing runs", || children(daemon.child.id()) == 0);
    let (client, _, _) = connect(&house, &daemon, 38);
    let out = client.derivation_outputs(&alone).unwrap().into_values().flatten().next().unwrap();
    assert!(!client.is_valid(&out).unwrap());
    assert_eq!(daemon.stop(), Some(0));
}

/// The exit status of old protocols, and results of new ones.
#[test]
fn failures_have_their_status() {
    if !has("nix-instantiate") {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, UNBOXED);
    let bad = add(&house, "bad", "echo oh no; exit 3");
    let slow = add(&house, "slow", "sleep 100");
    let (old, heard, _) = connect(&house, &daemon, 18);
    let error = old.realise(&all_of(&bad), BuildMode::Normal).unwrap_err();
    assert_eq!(error.kind, ErrorKind::BuildFailed { status: 100 });
    assert!(error.to_string().contains("failed with exit code 3"), "{error}");
    // Plain lines, where there are no activities.
    assert!(heard.all().iter().any(|text| text == "oh no"), "{:?}", heard.all());
    let (new, _, _) = connect(&house, &daemon, 38);
    let results = new.build(&all_of(&bad), BuildMode::Normal).unwrap();
    assert_eq!((results[0].status, results[0].times_built), (BuildStatus::PermanentFailure, 1));
    assert!(results[0].error.contains("> oh no"), "{}", results[0].error);
    assert!(results[0].start_time_s > 1_700_000_000 && results[0].stop_time_s >= results[0].start_time_s);
    let none: StorePath = "00000000000000000000000000000000-x".parse().unwrap();
    let results = new.build(&[DerivedPath::Opaque(none.clone())], BuildMode::Normal).unwrap();
    assert_eq!(results[0].status, BuildStatus::NoSubstituters);
    let words =
        ["nix-store", "-r", "--timeout", "1", &house.path().join("store").join(slow.to_string()).display().to_string()];
    let found = run(&mut client(&house, &words), b"");
    assert!(found.stderr.contains("timed out after 1 seconds"), "{found:?}");
}

/// A derivation that does not lie in the store; the path it claims is not believed.
#[test]
fn a_derivation_from_elsewhere() {
    // It takes a trusted client.
    if !is_root() {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, UNBOXED);
    let (client, heard, _) = connect(&house, &daemon, 38);
    let dir = client.dir().clone();
    let mut drv = shell(&dir, "elsewhere", "echo made; echo made > $out");
    let path = drv.path(&dir).unwrap();
    let result = client.build_derivation(&path, &drv, BuildMode::Normal).unwrap();
    assert_eq!(result.status, BuildStatus::Built, "{result:?}");
    assert_eq!(result.built_outputs.len(), 1);
    let out = drv.outputs[&OutputName::out()].path().unwrap().clone();
    assert_eq!(client.info(&out).unwrap().unwrap().deriver, Some(path.clone()));
    assert!(!client.is_valid(&path).unwrap());
    assert!(heard.all().contains(&"> made".to_owned()), "{:?}", heard.all());
    let again = client.build_derivation(&path, &drv, BuildMode::Normal).unwrap();
    assert_eq!(again.status, BuildStatus::AlreadyValid);
    // A missing input is the end of it, since there is nobody to fetch it from.
    drv.input_srcs.insert("00000000000000000000000000000000-x".parse().unwrap());
    fill(&dir, &mut drv);
    let failed = client.build_derivation(&drv.path(&dir).unwrap(), &drv, BuildMode::Normal).unwrap();
    assert_eq!(failed.status, BuildStatus::DependencyFailed, "{failed:?}");
}

/// Two derivations that trusted clients call by one name are two builds.
#[test]
fn one_name_for_two_derivations() {
    // It takes a trusted client.
    if !is_root() {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, UNBOXED);
    let gate = house.path().join("gate");
    let started = house.path().join("started");
    let (one, _, _) = connect(&house, &daemon, 38);
    let (two, _, _) = connect(&house, &daemon, 38);
    let script =
        format!("echo > {}; until [ -e {} ]; do sleep 0.05; done; echo > $out", started.display(), gate.display());
    let slow = shell(one.dir(), "slow", &script);
    let other = shell(one.dir(), "other", "echo other > $out");
    let name = slow.path(one.dir()).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let building = scope.spawn(|| one.build_derivation(&name, &slow, BuildMode::Normal).unwrap());
        wait_for("it runs", || started.exists());
        // Lest a fault makes both wait for ever.
        let (gate, done) = (&gate, &done);
        scope.spawn(move || {
            let since = std::time::Instant::now();
            while !done.load(Ordering::Relaxed) && since.elapsed() < Duration::from_secs(20) {
                std::thread::sleep(Duration::from_millis(20));
            }
            std::fs::write(gate, "").unwrap();
        });
        let result = two.build_derivation(&name, &other, BuildMode::Normal).unwrap();
        assert_eq!(result.status, BuildStatus::Built, "{result:?}");
        let out = other.outputs[&OutputName::out()].path().unwrap();
        assert!(two.is_valid(out).unwrap());
        assert!(!gate.exists(), "it did not wait for the other one");
        done.store(true, Ordering::Relaxed);
        assert_eq!(building.join().unwrap().status, BuildStatus::Built);
    });
}

/// Where root has no build users, builders run in a sandbox under ids that belong to nobody.
#[test]
fn builders_of_root_are_nobody() {
    if !is_root() {
        return;
    }
    let house = House::new();
    let conf = "build-users-group = nixbld\nsandbox = true\nsandbox-paths = /bin /usr /lib /lib64";
    let daemon = Daemon::start(&house, LARDER, conf);
    let (client, heard, _) = connect(&house, &daemon, 38);
    let drv = shell(client.dir(), "who", "id -u; cat /proc/self/uid_map; echo > $out");
    let result = client.build_derivation(&drv.path(client.dir()).unwrap(), &drv, BuildMode::Normal).unwrap();
    assert_eq!(result.status, BuildStatus::Built, "{result:?}");
    let heard = heard.all();
    let who = heard.iter().find_map(|line| line.strip_prefix("> ")?.trim().parse::<u32>().ok()).unwrap();
    assert_ne!(who, 0, "{heard:?}");
    let out = house.path().join("store").join(drv.outputs[&OutputName::out()].path().unwrap().to_string());
    assert_eq!(std::fs::metadata(out).unwrap().uid(), 0);
}

/// An ordinary user's own store, served on standard input and output.
#[test]
fn an_ordinary_user_serves_their_own_store() {
    if !is_root() {
        return;
    }
    let house = House::new();
    for dir in [house.path().to_owned(), house.work(), house.path().join("home"), house.path().join("etc")] {
        std::os::unix::fs::chown(&dir, Some(65534), Some(65534)).unwrap();
    }
    let mut command = house.applet("nix-daemon");
    command.arg("--stdio").uid(65534).gid(65534).env("TMPDIR", house.work());
    command.env("NIX_CONFIG", "sandbox = true\nsandbox-paths = /bin /usr /lib /lib64\nsubstituters =");
    let mut child = crate::house::spawn(&mut command);
    let (input, output) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    let dir = StoreDir::new(house.path().join("store").to_str().unwrap()).unwrap();
    let input = Box::new(std::io::BufReader::new(input));
    let client = Client::connect(input, Box::new(output), dir, 38, Arc::new(Silent)).unwrap();
    let drv = shell(client.dir(), "mine", "echo mine > $out");
    let result = client.build_derivation(&drv.path(client.dir()).unwrap(), &drv, BuildMode::Normal).unwrap();
    if result.error.contains("namespace") {
        println!("skipped: ordinary users may not have namespaces here: {}", result.error);
    } else {
        assert_eq!(result.status, BuildStatus::Built, "{result:?}");
        let out = house.path().join("store").join(drv.outputs[&OutputName::out()].path().unwrap().to_string());
        assert_eq!(std::fs::metadata(&out).unwrap().uid(), 65534);
    }
    drop(client);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(std::fs::read_dir(house.path().join("var/temproots")).map_or(0, Iterator::count), 0);
}

/// Logs of builds that were done elsewhere.
#[test]
fn logs_from_elsewhere() {
    // It takes a trusted client.
    if !is_root() {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, UNBOXED);
    let (client, _, _) = connect(&house, &daemon, 38);
    let drv: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().unwrap();
    let text = "a log\n".repeat(100_000);
    client.add_build_log(&drv, &mut text.as_bytes()).unwrap();
    client.add_build_log(&drv, &mut &b"another"[..]).unwrap();
    let full = house.path().join("store").join(drv.to_string());
    let found = house.run("nix-store", ["-l", full.to_str().unwrap()]);
    assert!(found.stdout == text, "{}", found.stderr);
    let logs = house.path().join("log/drvs/0c");
    assert_eq!(std::fs::read_dir(logs).unwrap().count(), 1);
}
