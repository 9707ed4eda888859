//! What the daemon costs, and what it stands: many clients, clients that stall, remote builds.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use larder_core::api::ReadStore as _;
use larder_core::store_path::StorePath;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::house::{House, LARDER, output, run, spawn};
use crate::served::{Daemon, connect, greet, has, text, wait_for, words};

/// A line of `/proc/PID/status` in KiB.
fn status_kib(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Lets this process, and what it starts, have many files open; `false` if that is not allowed.
fn many_files(count: u64) -> bool {
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= count) {
        return true;
    }
    let raised = setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum: now.maximum }).is_ok();
    if !raised {
        println!("skipped: this process may not have {count} files open");
    }
    raised
}

/// A thousand clients that have said hello and nothing else cost little, and are in nobody's way.
#[test]
fn a_thousand_idle_clients() {
    if !many_files(4096) {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "");
    daemon.is_well();
    let idle_kib = status_kib(daemon.child.id(), "VmRSS:");
    assert!(idle_kib < 15 << 10, "the idle daemon takes {idle_kib} KiB");
    let clients: Vec<_> = (0..1000)
        .map(|_| {
            let mut stream = daemon.connect();
            greet(&mut stream);
            stream
        })
        .collect();
    let since = Instant::now();
    daemon.is_well();
    println!("idle {idle_kib} KiB, another client after {:?}", since.elapsed());
    let full_kib = status_kib(daemon.child.id(), "VmRSS:");
    println!("with 1000 clients {full_kib} KiB");
    assert!(full_kib < 200 << 10, "{full_kib} KiB");
    drop(clients);
    let tasks = || std::fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap().count();
    wait_for("their threads end", || tasks() < 20);
    assert_eq!(daemon.stop(), Some(0));
}

/// A client that stalls in the middle of an object is given up after a while, and nothing is left.
#[test]
fn a_client_that_stalls() {
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "stalled-download-timeout = 1");
    let mut stalling = daemon.connect();
    greet(&mut stalling);
    let nar = [words(&[13]), b"nix-archive-1\0\0\0".to_vec()].concat();
    let request = [words(&[7]), text("half"), text("fixed:r:sha256"), words(&[0, 0]), words(&[nar.len() as u64]), nar];
    stalling.write_all(&request.concat()).unwrap();
    // One that rests may do so for as long as it likes.
    let mut resting = daemon.connect();
    greet(&mut resting);
    let mut said = Vec::new();
    let since = Instant::now();
    stalling.read_to_end(&mut said).unwrap();
    assert!(since.elapsed() < Duration::from_secs(30), "{:?}", since.elapsed());
    let left: Vec<_> = std::fs::read_dir(house.path().join("store")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == ".links"), "{left:?}");
    let path = format!("{}/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x", house.path().display());
    resting.write_all(&[words(&[1]), text(&path)].concat()).unwrap();
    let mut answer = [0; 16];
    resting.read_exact(&mut answer).unwrap();
    assert_eq!(answer.to_vec(), words(&[0x616c_7473, 0]));
}

/// What a client on another machine has locked stays until that client goes.
#[test]
fn s015_inputs_stay_while_the_client_does() {
    let house = House::new();
    house.write("f", "x");
    let path = house.words("nix-store", "--add f").stdout.trim().to_owned();
    let mut serving = spawn(house.applet("nix-store").args(["--serve", "--write"]));
    let (mut to, mut from) = (serving.stdin.take().unwrap(), serving.stdout.take().unwrap());
    let request = [words(&[0x390c_9deb, 0x207, 1, 1, 0, 1]), text(&path)].concat();
    to.write_all(&request).unwrap();
    to.flush().unwrap();
    let mut answer = vec![0; 16 + 8 + text(&path).len()];
    from.read_exact(&mut answer).unwrap();
    let collected = house.words("nix-store", "--gc");
    assert!(collected.stdout.starts_with("0 store paths deleted"), "{collected:?}");
    drop(to);
    assert_eq!(serving.wait().unwrap().code(), Some(0));
    let collected = house.words("nix-store", "--gc");
    assert!(collected.stdout.starts_with("1 store paths deleted"), "{collected:?}");
}

/// Real Nix builds on us over ssh: one connection, outputs copied back, nothing waits for locks.
#[test]
fn s014_s017_real_nix_builds_here_over_ssh() {
    if !has("nix-build") {
        return;
    }
    let (near, far) = (House::new(), House::new());
    let bin = near.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\necho call >> {near}/calls\nexport NIX_REMOTE='local?root={far}/root'\n\
         export NIX_CONFIG='build-users-group =\nsandbox = true\nsandbox-paths = /bin /usr /lib /lib64'\n\
         {LARDER} nix-store --serve --write\n",
        near = near.path().display(),
        far = far.path().display(),
    );
    std::fs::write(bin.join("ssh"), script).unwrap();
    std::fs::set_permissions(bin.join("ssh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    near.write("src", "source\n");
    near.write(
        "x.nix",
        r#"let mk = name: script: args: derivation ({
             inherit name; system = "x86_64-linux"; builder = "/bin/sh"; PATH = "/bin:/usr/bin";
             args = [ "-c" script ]; } // args);
           in mk "top" "echo said far away; cat $src $a > $out" {
             src = ./src; a = mk "a" "echo a > $out" {}; }"#,
    );
    let mut build = near.command("nix-build");
    let path = std::env::var("PATH").unwrap();
    build.args(["x.nix", "--no-out-link", "--max-jobs", "0", "--builders", "ssh://far x86_64-linux"]);
    build.args(["--option", "substituters", ""]).env("PATH", format!("{}:{path}", bin.display()));
    let built = run(&mut build, b"");
    assert_eq!(built.status, Some(0), "{built:?}");
    assert!(built.stderr.contains("said far away"), "{built:?}");
    assert_eq!(std::fs::read_to_string(built.stdout.trim()).unwrap(), "source\na\n");
    // One connection for each of the two builds.
    assert_eq!(std::fs::read_to_string(near.path().join("calls")).unwrap().lines().count(), 2);
    let roots = far.path().join("root/nix/var/nix/temproots");
    // The client kills what it takes for ssh; what it runs notices that nobody is there.
    wait_for("the roots go", || std::fs::read_dir(&roots).map_or(0, Iterator::count) == 0);
}

/// A client may ask for a processor; nothing is ever bound to one.
#[test]
fn s045_nothing_is_bound_to_a_processor() {
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "sandbox = false");
    let mut stream = daemon.connect();
    // Affinity: yes, processor 0.
    stream.write_all(&words(&[0x6e69_7863, 0x122, 1, 0, 0])).unwrap();
    let mut answer = vec![0; 16 + 16 + 8];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[32..], words(&[0x616c_7473]));
    let allowed = |status: &str| {
        let status = std::fs::read_to_string(status).unwrap();
        status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim().to_owned()
    };
    let ours = allowed("/proc/self/status");
    for task in std::fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap().flatten() {
        assert_eq!(allowed(task.path().join("status").to_str().unwrap()), ours);
    }
}

/// S048, S096: ten thousand paths in one question, and ten thousand questions on one connection.
#[test]
fn s048_s096_many_questions() {
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "");
    let (client, _, _) = connect(&house, &daemon, 38);
    let paths: Vec<StorePath> = (0..10_000).map(|n| format!("{n:032}-x").parse().unwrap()).collect();
    let since = Instant::now();
    assert!(client.valid_subset(&paths.iter().cloned().collect()).unwrap().is_empty());
    let at_once = since.elapsed();
    let since = Instant::now();
    assert!(client.infos(&paths).unwrap().iter().all(Option::is_none));
    let ahead = since.elapsed();
    let since = Instant::now();
    for path in paths.iter().take(1000) {
        assert!(!client.is_valid(path).unwrap());
    }
    println!("10000 in one question {at_once:?}, 10000 asked ahead {ahead:?}, 1000 one by one {:?}", since.elapsed());
    // Loose, since other tests run beside this one: each costs microseconds.
    assert!(at_once < Duration::from_secs(5) && ahead < Duration::from_secs(20));
}

/// `larder daemon` is `nix-daemon`; `larder doctor` sees it, and what is wrong.
#[test]
fn doctor_and_daemon() {
    let house = House::new();
    let diagnose = || {
        let found = house.run("larder", ["doctor", "--json"]);
        let rows: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
        let texts = rows.as_array().unwrap().iter().map(|row| format!("{}: {}", row["verdict"], row["text"]));
        (found.status, texts.collect::<Vec<_>>().join("\n"))
    };
    let (status, text) = diagnose();
    assert!(text.contains("is not there yet"), "{text}");
    assert!(text.contains("none: there is no socket"), "{text}");
    assert_eq!(status, Some(0), "{text}");
    house.write("f", "x");
    house.words("nix-store", "--add f");
    let mut command = Command::new(LARDER);
    command.arg0("larder").args(["daemon", "--daemon"]);
    for (name, value) in house.command(LARDER).get_envs() {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    let mut child = command.spawn().unwrap();
    let socket = house.path().join("socket");
    wait_for("it listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    let (_, text) = diagnose();
    assert!(text.contains(" answers: ") && text.contains(", protocol 1."), "{text}");
    child.kill().unwrap();
    child.wait().unwrap();
    let (status, text) = diagnose();
    assert!(text.contains("\"problem\": \"nobody listens at"), "{text}");
    assert_eq!(status, Some(1));
    let version = output(house.applet("larder").args(["daemon", "--version"]), b"");
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("nix-daemon (Nix) ") || version.status.success());
}
