//! Fetching from stores that are no caches: over ssh, and from other stores of this machine.

use std::process::{Command, Stdio};

use crate::house::{LARDER, Run, run};
use crate::remote_builds::{Pair, output};
use crate::served::has;

/// A pair whose far store has a path with a reference, both of which are gone here; the paths, the
/// one that refers to the other first.
fn pair_with_paths(server: &str, serve: &str) -> (Pair, [String; 2]) {
    let pair = Pair::new(server, serve);
    let low = pair.add("low", "echo low > $out", "");
    let low_out = output(&pair.near, &low);
    let high = pair.add(
        "high",
        &format!("mkdir $out; echo {low_out} > $out/low; head -c 3000000 /dev/zero > $out/zeros"),
        &format!(r#", "inputDrvs": {{"{low}": ["out"]}}"#),
    );
    let scheme = if serve.contains("--stdio") { "ssh-ng" } else { "ssh" };
    let built = pair.realise(&high, &format!("{scheme}://far"));
    assert_eq!(built.status, Some(0), "{built:?}");
    let paths = [built.stdout.trim().to_owned(), low_out];
    for path in &paths {
        assert_eq!(run(pair.near.rooted("nix-store").args(["--delete", path]), b"").status, Some(0));
    }
    std::fs::remove_file(pair.near.path().join("calls")).unwrap();
    (pair, paths)
}

impl Pair {
    fn fetch(&self, config: &str, words: &[&str]) -> Run {
        run(self.command("nix-store", config).arg("-r").args(words), b"")
    }

    fn is_there(&self, path: &str) -> bool {
        run(self.near.rooted("nix-store").args(["--check-validity", path]), b"").status == Some(0)
    }
}

#[test]
fn s033_hosts_are_substituters() {
    for (scheme, serve) in [("ssh", "nix-store --serve --write"), ("ssh-ng", "nix-daemon --stdio")] {
        for server in [LARDER, ""] {
            if server.is_empty() && !has("nix-store") {
                continue;
            }
            let (pair, [high, low]) = pair_with_paths(server, serve);
            let config = if scheme == "ssh" {
                "ssh-substituter-hosts = me@far\nrequire-sigs = false".to_owned()
            } else {
                format!("substituters = {scheme}://me@far?trusted=true")
            };
            let told = pair.fetch(&config, &["--dry-run", &high]);
            for line in ["these 2 paths will be fetched (", &format!("\n  {high}\n"), &format!("\n  {low}\n")] {
                assert!(told.stderr.contains(line), "{line} {told:?}");
            }
            let fetched = pair.fetch(&config, &[&high]);
            assert_eq!((fetched.status, fetched.stdout.trim()), (Some(0), high.as_str()), "{scheme} {fetched:?}");
            assert!(fetched.stderr.contains(&format!("copying path '{high}' from '{scheme}://me@far'...")));
            assert!(pair.is_there(&low));
            let text = std::fs::read_to_string(Pair::place(&pair.near, &high).join("low")).unwrap();
            assert_eq!(text, format!("{low}\n"));
            // A connection a run.
            assert_eq!(pair.calls(), vec![format!("me@far -x -a -- {serve}"); 2]);
            let verified = run(pair.near.rooted("nix-store").args(["--verify", "--check-contents"]), b"");
            assert_eq!(verified.status, Some(0), "{verified:?}");
        }
    }
}

/// What is not signed is not believed, also over ssh.
#[test]
fn hosts_are_not_trusted_blindly() {
    let (pair, [high, _]) = pair_with_paths(LARDER, "nix-store --serve --write");
    let refused = pair.fetch("ssh-substituter-hosts = far", &[&high]);
    assert_eq!(refused.status, Some(1), "{refused:?}");
    let warning = "from 'ssh://far' is not signed by any of the keys in 'trusted-public-keys'";
    assert!(refused.stderr.contains(warning), "{refused:?}");
    let off = pair.fetch("ssh-substituter-hosts = far\nrequire-sigs = false\nuse-ssh-substituter = false", &[&high]);
    assert_eq!(off.status, Some(1), "{off:?}");
}

/// Only the first host counts; that it is not there is an error, and soon.
#[test]
fn s034_a_host_that_is_not_there() {
    let (pair, [high, _]) = pair_with_paths(LARDER, "nix-store --serve --write");
    pair.write_ssh("case \"$*\" in *gone*) echo 'ssh: no such host' >&2; exit 255;; esac");
    let hosts = "ssh-substituter-hosts = gone far\nrequire-sigs = false\nconnect-timeout = 7";
    let failed = pair.fetch(hosts, &[&high]);
    assert_eq!(failed.status, Some(1), "{failed:?}");
    for line in ["cannot fetch from the store 'ssh://gone'", "ssh: no such host"] {
        assert!(failed.stderr.contains(line), "{line} {failed:?}");
    }
    assert_eq!(pair.calls(), ["gone -x -a -oConnectTimeout=7 -- nix-store --serve --write"]);
    let odd = pair.fetch("substituters = zork", &[&high]);
    assert!(odd.stderr.contains("don't know how to open Nix store 'zork'"), "{odd:?}");
    let both = pair.fetch("substituters = ssh://gone ssh://far?trusted=1", &[&high]);
    assert_eq!(both.status, Some(0), "{both:?}");
}

/// A connection that is cut in the middle of an archive, at several places: nothing is registered.
#[test]
fn cut_connections() {
    let (pair, [high, low]) = pair_with_paths(LARDER, "nix-store --serve --write");
    let before = std::fs::read_dir(pair.near.path().join("root/nix/store")).unwrap().count();
    for bytes in [8, 100, 600, 5000, 2_000_000] {
        // Nobody but `head` may hold the way back open.
        let serve = format!("{LARDER} nix-store --serve --write");
        pair.write_ssh(&format!("exec bash -c 'exec stdbuf -o0 head -c {bytes} < <(exec {serve} <&3)' 3<&0"));
        let failed = pair.fetch("substituters = ssh://far?trusted=1", &[&high]);
        assert_eq!(failed.status, Some(1), "{bytes}: {failed:?}");
        assert!(failed.stderr.contains("from the store 'ssh://far'"), "{bytes}: {failed:?}");
        assert!(!pair.is_there(&high), "{bytes}");
        if pair.is_there(&low) {
            assert_eq!(run(pair.near.rooted("nix-store").args(["--delete", &low]), b"").status, Some(0));
        }
    }
    assert_eq!(run(pair.near.rooted("nix-store").arg("--gc"), b"").status, Some(0));
    let after = std::fs::read_dir(pair.near.path().join("root/nix/store")).unwrap().count();
    assert!(after <= before, "something was left");
}

/// Another store of this machine is asked by way of its own process.
#[test]
fn other_stores_of_this_machine() {
    let (pair, [high, low]) = pair_with_paths(LARDER, "nix-store --serve --write");
    let config = format!("substituters = local?root={}/root&trusted=1", pair.far.path().display());
    let fetched = pair.fetch(&config, &[&high]);
    assert_eq!(fetched.status, Some(0), "{fetched:?}");
    assert!(pair.is_there(&low) && fetched.stderr.contains("copying path"), "{fetched:?}");
    assert_eq!(pair.calls(), [""; 0]);
}

/// The user gives up while a host is silent.
#[test]
fn a_silent_host_does_not_hold_up_the_end() {
    let (pair, [high, _]) = pair_with_paths(LARDER, "nix-store --serve --write");
    let gate = pair.near.path().join("silent");
    let serve = format!("{LARDER} nix-store --serve --write");
    // What comes after the first archive never does.
    let then = format!("touch {}; exec sleep 1000", gate.display());
    pair.write_ssh(&format!("exec bash -c 'stdbuf -o0 head -c 100000 < <(exec {serve} <&3); {then}' 3<&0"));
    let mut fetch = pair.command("nix-store", "substituters = ssh://far?trusted=1");
    let mut fetch = fetch.args(["-r", &high]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    crate::served::wait_for("the host is silent", || gate.exists());
    assert!(Command::new("kill").arg(fetch.id().to_string()).status().unwrap().success());
    assert_eq!(fetch.wait().unwrap().code(), Some(1));
    assert!(!pair.is_there(&high));
}
