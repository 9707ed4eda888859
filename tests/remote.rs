//! Larder's own commands on stores of others: a daemon's, ours and the real one, and over ssh.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::house::{House, LARDER, Run, run};
use crate::served::{Daemon, has, is_root, twin, wait_for};

/// Commands whose answers must not depend on where the store is. `$f` and `$d` are paths that the
/// first lines add, `$drv` is a derivation, `$out` what it makes, `$none` is not valid.
const SCENARIO: &str = "\
--add f
--add d
--add-fixed sha256 f
--add-fixed --recursive sha1 d
-r --dry-run $drv
-r $drv
-r $drv --add-root root
-r $none
-q --outputs $drv
-q --references $out
-q --referrers $f $d
-qR $out $d
-qR --include-outputs $drv
-q --referrers-closure $f
-q --deriver $out
-q --deriver $f
-q --valid-derivers $out
-q --hash $f $d
-q --size $f
-q --tree $drv
-q --graph $drv
-q --graphml $drv
-q --binding name $drv
-q --binding zork $drv
-q --roots $out
-q --hash $none
--check-validity $f $d
--check-validity --print-invalid $none $f
--check-validity $none
--verify-path $f
--verify --check-contents
-l $drv
-l $out
-l $f
--dump-db $f
--print-env $drv
--print-env $f
--gc --print-roots
--optimise
--delete $out
--delete $d
--gc --print-dead
--gc
--check-validity --print-invalid $f $d
";

fn furnish(house: &House) -> Vec<(&'static str, String)> {
    house.write("f", "hello\n");
    std::fs::create_dir(house.work().join("d")).unwrap();
    house.write("d/x", "x\n");
    std::os::unix::fs::symlink("x", house.work().join("d/y")).unwrap();
    let here = house.path().to_str().unwrap().to_owned();
    let json = house.write(
        "x.json",
        r#"{"name": "x", "builder": "/bin/sh", "args": ["-c", "echo said; echo x > $out"], "env": {"name": "x"}}"#,
    );
    let found = house.run("larder", ["derivation".as_ref(), "add".as_ref(), json.as_os_str()]);
    let drv = found.stdout.trim().to_owned();
    assert!(drv.ends_with("x.drv"), "{found:?}");
    let out = house.run("nix-store", ["-q", "--outputs", &drv]).stdout.trim().to_owned();
    let kept = house.run("nix-store", ["-r", "--dry-run", "--add-root", "drv-root", &drv]);
    assert_eq!(kept.status, Some(0), "{kept:?}");
    let none = format!("{here}/store/00000000000000000000000000000000-x");
    vec![("$drv", drv), ("$out", out), ("$none", none)]
}

/// Runs the scenario with a store, and gives what came of each line.
fn scenario(house: &House, mut known: Vec<(&'static str, String)>, remote: &str) -> Vec<(String, Run)> {
    let mut runs = Vec::new();
    for line in SCENARIO.lines() {
        let mut words = line.to_owned();
        for (name, value) in &known {
            words = words.replace(name, value);
        }
        let mut command = house.applet("nix-store");
        command.args(words.split(' ')).env("NIX_REMOTE", remote);
        command.env("NIX_CONFIG", "build-users-group =\nsandbox = false\nsubstituters =");
        let mut found = run(&mut command, b"");
        let first = found.stdout.lines().next().unwrap_or_default().to_owned();
        match line {
            "--add f" => known.push(("$f", first)),
            "--add d" => known.push(("$d", first)),
            _ => {}
        }
        // Links that are gone are told of by whoever removes them; what goes first is left to chance.
        let mut lines: Vec<&str> = found.stderr.lines().filter(|line| !line.starts_with("removing stale")).collect();
        if line == "--gc" {
            lines.sort_unstable();
        }
        // A daemon shows the end of the log, as it does not know what its clients see.
        found.stderr = lines.join("\n");
        runs.push((line.to_owned(), found));
    }
    runs
}

#[test]
fn a_store_behind_a_daemon_is_like_ones_own() {
    let (_dir, place) = twin();
    let mut results = Vec::new();
    for remote in ["local", "daemon", "unix"] {
        let house = House::at(&place);
        let known = furnish(&house);
        let remote = if remote == "unix" { format!("unix://{}/socket", place.display()) } else { remote.to_owned() };
        let daemon = (remote != "local").then(|| Daemon::start(&house, LARDER, "sandbox = false"));
        results.push(scenario(&house, known, &remote));
        drop(daemon);
    }
    let local = results.remove(0);
    let mut different = 0;
    for far in results {
        for ((line, local), (_, far)) in local.iter().zip(&far) {
            if local != far {
                different += 1;
                println!("{line}\n--- local {local:#?}\n--- far {far:#?}");
            }
        }
    }
    assert_eq!(different, 0);
}

/// The real daemon answers our commands, too.
#[test]
fn a_real_daemon_serves_us() {
    // It takes a trusted client.
    if !has("nix-daemon") || !crate::served::is_root() {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, "nix-daemon", "sandbox = false");
    house.write("f", "x\n");
    house.write("x.nix", "derivation { name = \"x\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; args = [ \"-c\" \"echo said; echo > $out\" ]; }");
    let drv = run(house.command("nix-instantiate").arg("x.nix").env("NIX_REMOTE", "daemon"), b"").stdout;
    let ours = |words: &[&str]| run(house.applet("nix-store").args(words).env("NIX_REMOTE", "daemon"), b"");
    let path = ours(&["--add", "f"]).stdout.trim().to_owned();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "x\n");
    let built = ours(&["-r", drv.trim()]);
    assert_eq!(built.status, Some(0), "{built:?}");
    assert!(built.stderr.contains("\nsaid\n"), "{built:?}");
    let closure = ours(&["-qR", "--include-outputs", drv.trim()]);
    assert_eq!(closure.stdout.lines().count(), 2, "{closure:?}");
    let exported =
        crate::house::output(house.applet("nix-store").args(["--export", &path]).env("NIX_REMOTE", "daemon"), b"");
    assert_eq!(ours(&["--delete", &path]).status, Some(0));
    let imported = run(house.applet("nix-store").arg("--import").env("NIX_REMOTE", "daemon"), &exported.stdout);
    assert_eq!(imported.stdout.trim(), path, "{imported:?}");
    // A failed build has its message, and the status that is left of it.
    let failed = ours(&["-r", &format!("{}/store/00000000000000000000000000000000-x", house.path().display())]);
    assert_eq!(failed.status, Some(1), "{failed:?}");
    drop(daemon);
    let refused = ours(&["--check-validity", &path]);
    assert!(refused.stderr.starts_with("error: cannot connect to daemon at '"), "{refused:?}");
}

/// `ssh` that runs the command here, in the store of another house.
fn fake_ssh(near: &House, far: &House, command: &str) -> PathBuf {
    let bin = near.path().join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\necho \"$@\" >> {near}/calls\nwhile [ \"$1\" != -- ]; do shift; done; shift\n\
         export NIX_REMOTE='local?root={far}/root' NIX_CONFIG='build-users-group ='\nexec {command}\n",
        near = near.path().display(),
        far = far.path().display(),
    );
    std::fs::write(bin.join("ssh"), script).unwrap();
    std::fs::set_permissions(bin.join("ssh"), std::fs::Permissions::from_mode(0o755)).unwrap();
    bin
}

/// Our commands over both protocols, with our programs at the other end and with real ones.
#[test]
fn s014_s016_our_commands_over_ssh() {
    let real = has("nix-store");
    for (scheme, serve) in [("ssh", "nix-store --serve --write"), ("ssh-ng", "nix-daemon --stdio")] {
        for server in [LARDER, ""] {
            if server.is_empty() && !real {
                continue;
            }
            let (near, far) = (House::new(), House::new());
            // A forced command: what the client asks for does not matter.
            let bin = fake_ssh(&near, &far, format!("{server} {serve}").trim());
            near.write("f", "x\n");
            let path = near.words("nix-store", "--add f").stdout.trim().to_owned();
            let there = far.path().join("root/nix/store").join(path.rsplit('/').next().unwrap());
            let with_path = |words: &[&str]| {
                let mut command = near.applet("nix-store");
                let path = std::env::var("PATH").unwrap();
                run(
                    command.args(words).env("PATH", format!("{}:{path}", bin.display())).env("NIX_SSHOPTS", "-p 7"),
                    b"",
                )
            };
            let url = format!("{scheme}://far");
            let exported = crate::house::output(near.applet("nix-store").args(["--export", &path]), b"");
            let mut import = near.applet("nix-store");
            let search = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
            let imported = run(import.args(["--import", "--store", &url]).env("PATH", search), &exported.stdout);
            assert_eq!(imported.stdout.trim(), path, "{scheme} {server}: {imported:?}");
            assert_eq!(std::fs::read_to_string(&there).unwrap(), "x\n");
            let calls = std::fs::read_to_string(near.path().join("calls")).unwrap();
            // One connection, whose words end with what runs there.
            assert_eq!(calls, format!("far -x -a -- {serve}\n"));
            let asked = with_path(&["-q", "--hash", "--size", &path, "--store", &url]);
            assert_eq!(asked.status, Some(1));
            for query in ["--hash", "--size", "--references", "--requisites", "--tree"] {
                let far = with_path(&["-q", query, &path, "--store", &url]);
                assert_eq!(far, near.run("nix-store", ["-q", query, &path]), "{scheme} {server} {query}");
            }
            let back = crate::house::output(
                near.applet("nix-store")
                    .args(["--export", &path, "--store", &url])
                    .env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap())),
                b"",
            );
            assert!(back.stdout == exported.stdout, "{scheme} {server}");
            let refused = with_path(&["--load-db", "--store", &url]);
            assert!(refused.stderr.contains("is not supported by store"), "{refused:?}");
        }
    }
}

/// `nix-copy-closure` both ways, `larder copy`, and what they say.
#[test]
fn closures_are_copied() {
    let real = has("nix-copy-closure");
    for server in [LARDER, ""] {
        if server.is_empty() && !real {
            continue;
        }
        let (near, far) = (House::new(), House::new());
        let bin = fake_ssh(&near, &far, format!("{server} nix-store --serve --write").trim());
        // The real client puts no `--` before the command.
        let script = std::fs::read_to_string(bin.join("ssh")).unwrap();
        std::fs::write(bin.join("ssh"), script.replace("while [ \"$1\" != -- ]; do shift; done; shift\n", "")).unwrap();
        let search = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let json = near.write(
            "x.json",
            r#"{"name": "x", "builder": "/bin/sh", "args": ["-c", "echo x > $out"], "env": {"name": "x"}}"#,
        );
        let drv =
            near.run("larder", ["derivation".as_ref(), "add".as_ref(), json.as_os_str()]).stdout.trim().to_owned();
        let mut realise = near.applet("nix-store");
        realise.args(["-r", &drv]).env("NIX_CONFIG", "build-users-group =\nsandbox = false\nsubstituters =");
        let out = run(&mut realise, b"").stdout.trim().to_owned();
        near.write("a", "a");
        let added = near.words("nix-store", "--add a").stdout.trim().to_owned();
        let copy = |program: &str, words: &[&str]| {
            let mut command = if program == "real" { near.command("nix-copy-closure") } else { near.applet(program) };
            run(command.args(words).env("PATH", &search), b"")
        };
        let there = |path: &str| far.path().join("root/nix/store").join(path.rsplit('/').next().unwrap());
        let tried = copy("nix-copy-closure", &["--dry-run", "far", &added]);
        assert_eq!((tried.status, tried.stderr.as_str()), (Some(0), "copying 1 paths...\n"));
        assert!(!there(&added).exists());
        let sent = copy("nix-copy-closure", &["--to", "far", &added]);
        let said = format!("copying 1 paths...\ncopying path '{added}' to 'ssh://far'...\n");
        assert_eq!((sent.status, sent.stderr.as_str()), (Some(0), said.as_str()), "{server}");
        assert!(there(&added).exists());
        assert_eq!(copy("nix-copy-closure", &["far", &added]).stderr, "copying 0 paths...\n");
        let sent = copy("larder", &["copy", "--to", "ssh://far", "--include-outputs", "--json", &drv]);
        assert_eq!(sent.status, Some(0), "{sent:?}");
        assert!(there(&drv).exists() && there(&out).exists(), "{sent:?}");
        // And back, when it is gone here; not signed, so that it must be said that this is no matter.
        for path in [&added, &out] {
            assert_eq!(near.run("nix-store", ["--delete", path]).status, Some(0));
        }
        let got = copy("nix-copy-closure", &["--from", "--gzip", "far", &added]);
        let said = format!("copying 1 paths...\ncopying path '{added}' from 'ssh://far'...\n");
        assert_eq!((got.status, got.stderr.as_str()), (Some(0), said.as_str()), "{server}");
        let refused = copy("larder", &["copy", "--from", "ssh://far", &out]);
        assert!(refused.stderr.contains("lacks a signature by a trusted key"), "{refused:?}");
        assert_eq!(copy("larder", &["copy", "--from", "ssh://far", "--no-check-sigs", &out]).status, Some(0));
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "x\n");
        assert_eq!(near.run("nix-store", ["--verify", "--check-contents"]).status, Some(0));
        if real && !server.is_empty() {
            // Real Nix has a ledger of its own: it copies what it has added itself.
            near.write("b", "b");
            let path = run(near.command("nix-store").args(["--add", "b"]), b"").stdout.trim().to_owned();
            let sent = copy("real", &["--to", "far", &path]);
            assert_eq!(sent.status, Some(0), "{sent:?}");
            assert!(there(&path).exists());
        }
        for (words, error) in [(&["--to"][..], "no host name specified"), (&["-x"][..], "unrecognised flag '-x'")] {
            let found = copy("nix-copy-closure", words);
            assert!(found.stderr.contains(error), "{found:?}");
        }
    }
}

/// A server of the real `ssh`, for one test; killed with it.
pub struct Sshd {
    child: Child,
    dir: tempfile::TempDir,
    pub port: u16,
}

impl Drop for Sshd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Sshd {
    /// With variables for what it runs, and a command that it runs whatever is asked for.
    pub fn start(variables: &str, forced: Option<&str>) -> Option<Self> {
        if !is_root() || !Path::new("/usr/sbin/sshd").exists() {
            println!("skipped: there is no /usr/sbin/sshd here, or we are not root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        for key in ["host", "client"] {
            let made = run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f", &path(key)]), b"");
            assert_eq!(made.status, Some(0), "{made:?}");
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let forced = forced.map(|command| format!("ForceCommand {command}\n")).unwrap_or_default();
        let config = format!(
            "ListenAddress 127.0.0.1\nPort {port}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
             PidFile none\nPermitRootLogin yes\nPasswordAuthentication no\nSetEnv {variables}\n{forced}",
            path("host"),
            path("client.pub"),
        );
        std::fs::write(dir.path().join("config"), config).unwrap();
        let _ = std::fs::create_dir("/run/sshd");
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f", &path("config")]).stdin(Stdio::null()).stderr(log);
        let child = command.spawn().unwrap();
        wait_for("sshd listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        Some(Self { child, dir, port })
    }

    /// The same, where the keys of both sides are known otherwise.
    pub fn plain_options(&self) -> String {
        format!(
            "-p {} -oHostKeyAlias=127.0.0.1 -oStrictHostKeyChecking=yes -oBatchMode=yes -oLogLevel=ERROR",
            self.port
        )
    }

    /// The file with the client's key, and the key of the host in base 64.
    pub fn keys(&self) -> (String, String) {
        let path = |name: &str| self.dir.path().join(name).display().to_string();
        let key = std::fs::read_to_string(path("host.pub")).unwrap();
        let words: Vec<&str> = key.split_whitespace().take(2).collect();
        (path("client"), data_encoding::BASE64.encode(words.join(" ").as_bytes()))
    }

    /// What clients put between `ssh` and the host.
    fn options(&self) -> String {
        let key = self.dir.path().join("client");
        format!(
            "-p {} -i {} -oStrictHostKeyChecking=no -oUserKnownHostsFile=/dev/null -oBatchMode=yes -oLogLevel=ERROR",
            self.port,
            key.display()
        )
    }
}

/// Over the real ssh: our client and the real one, our server and the real one.
#[test]
fn s016_over_a_real_ssh() {
    let far = House::new();
    let links = far.path().join("bin");
    let linked = far.run("larder", ["links".as_ref(), links.as_os_str()]);
    assert_eq!(linked.status, Some(0), "{linked:?}");
    let variables = |first: &Path| {
        format!(
            "NIX_REMOTE=local?root={}/root \"NIX_CONFIG=build-users-group =\" PATH={}:/usr/bin:/bin",
            far.path().display(),
            first.display()
        )
    };
    let Some(ours) = Sshd::start(&variables(&links), None) else { return };
    let Some(theirs) = Sshd::start(&variables(Path::new("/usr/bin")), None) else { return };
    let forced = format!("{} --serve --write", links.join("nix-store").display());
    let Some(forced) = Sshd::start(&variables(&links), Some(&forced)) else { return };
    let real = has("nix");
    for (number, (sshd, scheme, client)) in [
        (&ours, "ssh", "ours"),
        (&ours, "ssh-ng", "ours"),
        (&theirs, "ssh", "ours"),
        (&theirs, "ssh-ng", "ours"),
        (&forced, "ssh", "ours"),
        (&ours, "ssh", "real"),
        (&ours, "ssh-ng", "real"),
        (&forced, "ssh", "real"),
    ]
    .into_iter()
    .enumerate()
    {
        if !real && (client == "real" || sshd.port == theirs.port) {
            continue;
        }
        let near = House::new();
        let url = format!("{scheme}://root@127.0.0.1");
        near.write("f", format!("{number}\n"));
        let mut add = near.rooted("nix-store");
        let path = run(add.args(["--add", "f"]), b"").stdout.trim().to_owned();
        let there = far.path().join("root").join(path.trim_start_matches('/'));
        let copied = if client == "ours" {
            let exported = crate::house::output(near.rooted("nix-store").args(["--export", &path]), b"");
            let mut import = near.rooted("nix-store");
            run(import.args(["--import", "--store", &url]).env("NIX_SSHOPTS", sshd.options()), &exported.stdout)
        } else {
            let house = House::new();
            house.write("f", format!("{number}\n"));
            let mut add = house.command("nix-store");
            house.as_root_of_its_own(&mut add);
            assert_eq!(run(add.args(["--add", "f"]), b"").stdout.trim(), path);
            let mut copy = house.command("nix");
            house.as_root_of_its_own(&mut copy);
            copy.args(["--extra-experimental-features", "nix-command", "copy", "--no-check-sigs", "--to", &url, &path]);
            run(copy.env("NIX_SSHOPTS", sshd.options()), b"")
        };
        assert_eq!(copied.status, Some(0), "{scheme} {client} {number}: {copied:?}");
        assert_eq!(std::fs::read_to_string(&there).unwrap(), format!("{number}\n"));
    }
}

/// Exports from a daemon's store are those of one's own, faults among them; what is not to be seen from
/// here comes from the daemon.
#[test]
fn objects_behind_a_daemon_are_read_where_they_lie() {
    let house = House::new();
    house.write("f", "hello\n");
    let path = house.run("nix-store", ["--add", "f"]).stdout.trim().to_owned();
    let _daemon = Daemon::start(&house, LARDER, "");
    let export = |remote: &str| {
        let found =
            crate::house::output(house.applet("nix-store").args(["--export", &path]).env("NIX_REMOTE", remote), b"");
        (found.status.code(), found.stdout, String::from_utf8_lossy(&found.stderr).into_owned())
    };
    let whole = export("local");
    assert_eq!(whole.0, Some(0), "{whole:?}");
    assert_eq!(export("daemon"), whole);
    let change = |text: &str| {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    };
    change("jello\n");
    let changed = export("local");
    assert!(changed.0 == Some(1) && changed.2.contains("' has changed from '"), "{changed:?}");
    assert_eq!(export("daemon"), changed);
    change("hello\n");
    let (store, hidden) = (house.path().join("store"), house.path().join("hidden"));
    std::fs::rename(&store, &hidden).unwrap();
    let from_daemon = export("daemon");
    std::fs::rename(&hidden, &store).unwrap();
    assert_eq!(from_daemon, whole);
}
