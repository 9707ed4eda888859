//! The daemon as its clients see it: real ones where there are any, and scripted ones that misbehave.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::house::{House, LARDER, Run, output, run};
use crate::served::{Daemon, Land, client, greet, has, is_root, text, twin, wait_for, words};

/// What real clients do, one command a line. `$f` and `$d` are paths that the first lines add,
/// `$drv` is a derivation, `$none` a path that is not valid.
const SCENARIO: &str = "\
nix-store --add f
nix-store --add d
nix-instantiate drv.nix --add-root root
nix-store --add f
nix-store --add-fixed sha256 f
nix-store --add-fixed --recursive sha1 d
nix store add-path ./d --name foo
nix store add-file ./f
nix-store -q --hash $f
nix-store -q --size $f $d
nix-store -qR $d $drv
nix-store -q --references $drv
nix-store -q --referrers $d $f
nix-store -q --deriver $d
nix-store -q --roots $drv
nix-store -q --outputs $drv
nix-store -q --graph $drv
nix-store -q --tree $drv
nix-store -q --binding args $drv
nix-store -q --hash $none
nix-store --check-validity $d $f
nix-store --check-validity --print-invalid $none $f
nix-store --verify
nix-store --verify --check-contents
nix-store --verify-path $drv
nix-store --gc --print-roots
nix-store --print-env $drv
nix show-derivation $drv
nix path-info --all
nix path-info -S $f
nix path-info $none
nix store dump-path $drv
nix store verify --no-trust $d
nix store cat $drv
nix log $drv
nix-store -l $drv
nix-store --load-db
nix copy --to file://$house/cache $d
nix-store --delete $d
nix path-info $d
nix copy --from file://$house/cache $d --no-check-sigs
nix path-info $d
nix store delete $d
nix-store --check-validity $d
nix-store --delete $drv
nix-store --delete /nonsense
nix-store --optimise
nix-store --gc --print-dead
nix-store --gc --print-live
nix-store --gc
nix path-info --all
nix-collect-garbage
";

fn scenario(land: &Land, house: &House) -> Vec<(String, Run)> {
    house.write("f", "hello\n");
    std::fs::create_dir(house.work().join("d")).unwrap();
    house.write("d/x", "x\n");
    std::os::unix::fs::symlink("x", house.work().join("d/y")).unwrap();
    house.write(
        "drv.nix",
        r#"let
             mk = name: args: derivation ({ inherit name; system = "x86_64-linux"; builder = "/bin/sh"; } // args);
             a = mk "a" { args = [ "-c" "echo a > $out" ]; src = ./f; };
           in mk "b" { args = [ "-c" "echo b > $out" ]; inherit a; outputs = [ "out" "dev" ]; }"#,
    );
    let here = house.path().to_str().unwrap();
    let mut known = vec![
        ("$house".to_owned(), here.to_owned()),
        ("$none".to_owned(), format!("{here}/store/00000000000000000000000000000000-x")),
    ];
    let mut runs = Vec::new();
    for line in SCENARIO.lines() {
        let mut words = line.to_owned();
        for (name, value) in &known {
            words = words.replace(name, value);
        }
        let words: Vec<&str> = words.split(' ').collect();
        let found = run(&mut land.client(house, &words), b"");
        let first = found.stdout.lines().next().unwrap_or_default().to_owned();
        match line {
            "nix-store --add f" => known.push(("$f".into(), first)),
            "nix-store --add d" => known.push(("$d".into(), first)),
            _ if line.starts_with("nix-instantiate") => {
                let drv = std::fs::read_link(house.work().join("root")).unwrap();
                known.push(("$drv".into(), drv.to_str().unwrap().to_owned()));
            }
            _ => {}
        }
        let mut found = found;
        if line == "nix-store --gc" {
            // What goes first is left to chance by both.
            let mut lines: Vec<&str> = found.stderr.lines().collect();
            lines.sort_unstable();
            found.stderr = lines.join("\n");
        }
        runs.push((line.to_owned(), found));
    }
    runs
}

/// The scenario with the daemon that the clients belong to, and with ours.
fn cannot_tell_the_difference(land: &Land) {
    let (_dir, place) = twin();
    let mut results = Vec::new();
    for real in [true, false] {
        let house = House::at(&place);
        let conf = "experimental-features = nix-command";
        let daemon = if real { land.daemon(&house, conf) } else { Daemon::start(&house, LARDER, conf) };
        results.push(scenario(land, &house));
        drop(daemon);
    }
    let ours = results.pop().unwrap();
    let real = results.pop().unwrap();
    println!("{} commands", ours.len());
    for ((line, mut ours), (_, mut real)) in ours.into_iter().zip(real) {
        if !land.compares_messages() {
            ours.stderr.clone_from(&real.stderr);
        }
        // 2.26 says more.
        let long = "--query --roots and nix-store --query --referrers";
        if ours.stderr.contains(long) && !real.stderr.contains(long) {
            real.stderr = real.stderr.replace("--query --roots", long);
        }
        assert_eq!(ours, real, "{line}");
    }
}

#[test]
fn real_clients_cannot_tell_the_difference() {
    if let Some(land) = Land::here() {
        cannot_tell_the_difference(&land);
    }
}

#[test]
fn clients_of_trixie_cannot_tell_the_difference() {
    if let Some(land) = Land::trixie() {
        cannot_tell_the_difference(&land);
    }
}

#[test]
fn export_and_import_through_the_daemon() {
    if !has("nix-store") {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "");
    house.write("f", "x");
    let path = run(&mut client(&house, &["nix-store", "--add", "f"]), b"").stdout.trim().to_owned();
    let exported = output(&mut client(&house, &["nix-store", "--export", &path]), b"").stdout;
    assert_eq!(run(&mut client(&house, &["nix-store", "--delete", &path]), b"").status, Some(0));
    let imported = output(&mut client(&house, &["nix-store", "--import"]), &exported);
    assert_eq!(String::from_utf8_lossy(&imported.stdout).trim(), path);
    assert!(Path::new(&path).exists());
    assert_eq!(daemon.stop(), Some(0));
    assert!(!house.path().join("socket").exists());
}

/// Everybody may connect, and what they may do depends on the settings.
#[test]
fn s010_s011_users() {
    if !is_root() || !has("nix-store") {
        return;
    }
    let house = House::new();
    // Others must reach the socket and the store.
    for dir in [house.path().to_owned(), house.work()] {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let as_nobody = |words: &[&str]| {
        let mut command = client(&house, words);
        command.uid(65534).gid(65534).env("HOME", "/nonexistent");
        run(&mut command, b"")
    };
    let daemon = Daemon::start(&house, LARDER, "");
    assert_eq!(std::fs::metadata(&daemon.socket).unwrap().permissions().mode() & 0o777, 0o666);
    house.write("f", "x");
    let path = as_nobody(&["nix-store", "--add", "f"]).stdout.trim().to_owned();
    assert!(path.ends_with("-f"), "{}", daemon.log());
    assert!(daemon.log().contains(", user nobody\n"), "{}", daemon.log());
    let found = as_nobody(&["nix-store", "--verify", "--repair"]);
    assert!(found.stderr.contains("you are not privileged to repair paths"), "{found:?}");
    drop(daemon);
    let daemon = Daemon::start(&house, LARDER, "trusted-users = root nobody");
    assert_eq!(as_nobody(&["nix-store", "--verify", "--repair"]).status, Some(0));
    assert!(daemon.log().contains(", user nobody (trusted)\n"), "{}", daemon.log());
    drop(daemon);
    let daemon = Daemon::start(&house, LARDER, "allowed-users = root");
    assert_ne!(as_nobody(&["nix-store", "--check-validity", &path]).status, Some(0));
    assert!(daemon.log().contains("user 'nobody' is not allowed to connect to the Nix daemon"), "{}", daemon.log());
    assert_eq!(run(&mut client(&house, &["nix-store", "--check-validity", &path]), b"").status, Some(0));
}

/// Clients that send nothing, nonsense, or half of something take nobody with them.
#[test]
fn clients_that_misbehave() {
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "");
    let silent: Vec<UnixStream> = (0..200).map(|_| daemon.connect()).collect();
    daemon.is_well();
    // Garbage is answered with nothing at all.
    let mut garbage = daemon.connect();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = garbage.read_to_end(&mut answer);
    assert_eq!(answer, b"");
    // A string of 2^63 bytes is refused before anything is allocated.
    let mut huge = daemon.connect();
    greet(&mut huge);
    huge.write_all(&words(&[1, 1 << 63])).unwrap();
    let mut answer = Vec::new();
    let _ = huge.read_to_end(&mut answer);
    assert!(String::from_utf8_lossy(&answer).contains("too long"));
    // A client that dies in the midst of an object leaves nothing.
    let mut dying = daemon.connect();
    greet(&mut dying);
    let nar_start = [words(&[13]), b"nix-archive-1\0\0\0".to_vec()].concat();
    let request = [words(&[7]), text("half"), text("fixed:r:sha256"), words(&[0, 0]), words(&[nar_start.len() as u64])];
    dying.write_all(&request.concat()).unwrap();
    dying.write_all(&nar_start).unwrap();
    drop(dying);
    let store = house.path().join("store");
    wait_for("what came is taken away", || {
        let left: Vec<_> = std::fs::read_dir(&store).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.iter().all(|name| name == ".links")
    });
    // A client that asks and never reads.
    let mut deaf = daemon.connect();
    greet(&mut deaf);
    // As much as fits: then the daemon waits for us as we do for it.
    deaf.set_nonblocking(true).unwrap();
    for _ in 0..10_000 {
        if deaf.write(&words(&[23])).is_err() {
            break;
        }
    }
    daemon.is_well();
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib < 200 << 10, "{peak_kib} KiB");
    drop(silent);
    drop(deaf);
    assert_eq!(daemon.stop(), Some(0));
}

/// S018: what does not fit is told, and the daemon lives on.
#[test]
fn s018_out_of_memory_is_told() {
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "");
    // Each connection sends a text that fits its own limits; all together they do not.
    let mut streams = Vec::new();
    let mut refused = false;
    for _ in 0..4 {
        let mut stream = daemon.connect();
        greet(&mut stream);
        let length = 60u64 << 20;
        stream.write_all(&[words(&[8]), text("x"), words(&[length])].concat()).unwrap();
        // All but the end, so that it stays in memory.
        let block = vec![b'x'; 1 << 20];
        for _ in 0..59 {
            if stream.write_all(&block).is_err() {
                break;
            }
        }
        stream.set_nonblocking(true).unwrap();
        let mut answer = vec![0; 4096];
        if let Ok(n) = stream.read(&mut answer)
            && n > 0
        {
            let answer = String::from_utf8_lossy(&answer[..n]).into_owned();
            assert!(answer.contains("Nix daemon out of memory"), "{answer}");
            refused = true;
        }
        streams.push(stream);
    }
    if !refused {
        // The answer may come a little later.
        wait_for("somebody is refused", || {
            streams.iter_mut().any(|stream| {
                let mut answer = vec![0; 4096];
                stream
                    .read(&mut answer)
                    .is_ok_and(|n| String::from_utf8_lossy(&answer[..n]).contains("Nix daemon out of memory"))
            })
        });
    }
    daemon.is_well();
}

/// The temporary roots of a connection go with it.
#[test]
fn temp_roots_go_with_their_connection() {
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "");
    let mut stream = daemon.connect();
    greet(&mut stream);
    let path = format!("{}/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x", house.path().display());
    stream.write_all(&[words(&[11]), text(&path)].concat()).unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    let roots = house.path().join("var/temproots");
    let count = || std::fs::read_dir(&roots).map_or(0, Iterator::count);
    assert_eq!(count(), 1);
    drop(stream);
    wait_for("the roots go", || count() == 0);
}

/// SIGTERM lets a request under way come to its end, and takes no new clients.
#[test]
fn sigterm_drains() {
    let house = House::new();
    let mut daemon = Daemon::start(&house, LARDER, "");
    let (mut idle, mut busy) = (daemon.connect(), daemon.connect());
    greet(&mut idle);
    greet(&mut busy);
    // Half of a request.
    let request = [words(&[1]), text(&format!("{}/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x", house.path().display()))];
    let request = request.concat();
    busy.write_all(&request[..8]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    daemon.signal(rustix::process::Signal::TERM);
    wait_for("no one can connect", || UnixStream::connect(&daemon.socket).is_err());
    let mut nothing = Vec::new();
    idle.read_to_end(&mut nothing).unwrap();
    assert_eq!(nothing, b"");
    busy.write_all(&request[8..]).unwrap();
    let mut answer = [0; 16];
    busy.read_exact(&mut answer).unwrap();
    assert_eq!(answer.to_vec(), words(&[0x616c_7473, 0]));
    let mut status = None;
    wait_for("the daemon ends", || {
        status = daemon.child.try_wait().unwrap();
        status.is_some()
    });
    assert_eq!(status.unwrap().code(), Some(0));
}

/// SIGHUP makes it read its settings again.
#[test]
fn sighup_reloads() {
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "");
    std::fs::write(house.path().join("etc/nix.conf"), "allowed-users =\ntrusted-users =\n").unwrap();
    daemon.signal(rustix::process::Signal::HUP);
    wait_for("the settings are read", || daemon.log().contains("settings were read again"));
    let mut stream = daemon.connect();
    let mut answer = Vec::new();
    let _ = stream.write_all(&words(&[0x6e69_7863]));
    let _ = stream.read_to_end(&mut answer);
    assert_eq!(answer, b"");
}

#[test]
fn stdio() {
    let house = House::new();
    let path = format!("{}/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x", house.path().display());
    let input = [words(&[0x6e69_7863, 0x126, 0, 0, 0, 1]), text(&path)].concat();
    let found = output(house.applet("nix-daemon").arg("--stdio"), &input);
    assert_eq!(found.status.code(), Some(0), "{}", String::from_utf8_lossy(&found.stderr));
    let wanted = [words(&[0x6478_696f, 0x126, 0]), text("2.26.3"), words(&[1, 0x616c_7473]), words(&[0x616c_7473, 0])];
    assert_eq!(found.stdout, wanted.concat());
}

#[test]
fn activation_by_a_service_manager() {
    let house = House::new();
    let mut command = house.applet("nix-daemon");
    command.env("LISTEN_FDS", "1").env("LISTEN_PID", "1");
    run(&mut command, b"").fails("unexpected systemd environment variables");
    let activate = "systemd-socket-activate";
    if Command::new(activate).arg("--version").output().is_err() {
        println!("skipped: there is no {activate} here");
        return;
    }
    let socket = house.path().join("given");
    let mut command = house.command(activate);
    command.arg("-l").arg(&socket).args(["-E", "NIX_CONFIG=build-users-group ="]);
    for name in ["NIX_STORE_DIR", "NIX_STATE_DIR", "NIX_LOG_DIR", "NIX_CONF_DIR"] {
        command.args(["-E", name]);
    }
    command.args([LARDER, "nix-daemon"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    let daemon = Daemon { child, socket: socket.clone(), log: PathBuf::new() };
    wait_for("the socket is there", || UnixStream::connect(&socket).is_ok());
    daemon.is_well();
}

/// S035, S036, S037: many commands on one connection; nothing is changed without `--write`; roots
/// go at the end.
#[test]
fn s035_s036_s037_serve() {
    let house = House::new();
    house.write("f", "x");
    let path = house.words("nix-store", "--add f").stdout.trim().to_owned();
    let greeting = words(&[0x390c_9deb, 0x207]);
    let one = |path: &str| [words(&[1]), text(path)].concat();
    let asked = [
        greeting.clone(),
        [words(&[1, 1, 0]), one(&path)].concat(),
        [words(&[2]), one(&path)].concat(),
        [words(&[7, 0]), one(&path)].concat(),
        [words(&[3]), text(&path)].concat(),
        [words(&[1, 0, 0]), one(&path)].concat(),
    ];
    for write in ["", "--write"] {
        let mut command = house.applet("nix-store");
        command.arg("--serve").args((!write.is_empty()).then_some(write));
        let found = output(&mut command, &asked.concat());
        assert_eq!(found.status.code(), Some(0), "{}", String::from_utf8_lossy(&found.stderr));
        assert!(found.stdout.starts_with(&[words(&[0x5452_eecb, 0x207]), one(&path)].concat()));
        let nar = house.words("nix-store", &format!("--dump {path}")).stdout;
        assert!(found.stdout.ends_with(&[nar.into_bytes(), one(&path)].concat()));
        assert_eq!(std::fs::read_dir(house.path().join("var/temproots")).map_or(0, Iterator::count), 0);
    }
    let refused = output(house.applet("nix-store").arg("--serve"), &[greeting, words(&[4])].concat());
    assert_eq!(String::from_utf8_lossy(&refused.stderr), "error: importing paths is not allowed\n");
    assert_eq!(refused.status.code(), Some(1));
}

/// S016: a real client copies to us, and from us, over a command that it believes to be ssh.
#[test]
fn s014_s016_real_clients_over_ssh() {
    if !has("nix") {
        return;
    }
    for scheme in ["ssh", "ssh-ng"] {
        let (near, far) = (House::new(), House::new());
        // One store directory for both, as paths must mean the same: the far one lies elsewhere.
        let bin = near.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        let words = if scheme == "ssh" { "nix-store --serve --write" } else { "nix-daemon --stdio" };
        let script = format!(
            "#!/bin/sh\necho call >> {near}/calls\nexport NIX_REMOTE='local?root={far}/root'\nexec {LARDER} {words}\n",
            near = near.path().display(),
            far = far.path().display(),
        );
        std::fs::write(bin.join("ssh"), script).unwrap();
        std::fs::set_permissions(bin.join("ssh"), std::fs::Permissions::from_mode(0o755)).unwrap();
        near.write("f", "x");
        let with_ssh = |words: &[&str]| {
            let mut command = client(&near, words);
            let path = std::env::var("PATH").unwrap();
            command.env("NIX_REMOTE", "local").env("PATH", format!("{}:{path}", bin.display()));
            run(&mut command, b"")
        };
        let path = with_ssh(&["nix-store", "--add", "f"]).stdout.trim().to_owned();
        let url = format!("{scheme}://far");
        let copied = with_ssh(&["nix", "copy", "--no-check-sigs", "--to", &url, &path]);
        assert_eq!(copied.status, Some(0), "{copied:?}");
        let there = far.path().join("root/nix/store").join(path.rsplit('/').next().unwrap());
        assert!(there.exists(), "{}", there.display());
        assert_eq!(std::fs::read_to_string(near.path().join("calls")).unwrap().lines().count(), 1);
        assert_eq!(with_ssh(&["nix-store", "--delete", &path]).status, Some(0));
        let copied = with_ssh(&["nix", "copy", "--no-check-sigs", "--from", &url, &path]);
        assert_eq!(copied.status, Some(0), "{copied:?}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "x");
    }
}
