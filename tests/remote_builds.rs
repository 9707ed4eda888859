//! Builds on other machines: our hook and the real one, our machines and real ones, custom hooks.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::house::{House, LARDER, Run, run};
use crate::remote::Sshd;
use crate::served::{Daemon, has, is_root, wait_for};

/// Builds happen in a sandbox, so that all stores may be called `/nix/store`.
const CONFIG: &str = "build-users-group =\nsandbox = true\nsandbox-paths = /bin /usr /lib /lib64?\nsubstituters =\n\
    sandbox-fallback = false\nmax-jobs = 0";

/// A house that has builds done, and one in which they are done; `ssh` between them is a script.
pub struct Pair {
    pub near: House,
    pub far: House,
    /// What `ssh` runs in the far house, whatever it is asked to.
    serve: String,
}

impl Pair {
    /// With a program at the far end, of ours or (empty) of real Nix.
    pub fn new(server: &str, serve: &str) -> Self {
        let pair = Self { near: House::new(), far: House::new(), serve: format!("{server} {serve}").trim().to_owned() };
        pair.write_ssh("");
        pair
    }

    fn ours() -> Self {
        Self::new(LARDER, "nix-store --serve --write")
    }

    fn bin(&self) -> PathBuf {
        self.near.path().join("bin")
    }

    /// `before` are lines of shell that come before the connection. What runs over there is out of
    /// reach of signals to what runs here.
    pub fn write_ssh(&self, before: &str) {
        let bin = self.bin();
        std::fs::create_dir_all(&bin).unwrap();
        let script = format!(
            "#!/bin/sh\necho \"$@\" >> {near}/calls\nunset NIX_HELD_LOCKS\nexport NIX_REMOTE='local?root={far}/root' \
             NIX_CONFIG='{CONFIG}\nmax-jobs = 1'\n{before}\nsetsid {serve}\n",
            near = self.near.path().display(),
            far = self.far.path().display(),
            serve = self.serve,
        );
        executable(&bin.join("ssh"), &script);
    }

    /// A command in the near house, that finds `ssh`.
    pub fn command(&self, applet: &str, config: &str) -> Command {
        let mut command = self.near.rooted(applet);
        self.equip(&mut command, config);
        command
    }

    fn equip(&self, command: &mut Command, config: &str) {
        command.env("PATH", format!("{}:{}", self.bin().display(), std::env::var("PATH").unwrap()));
        command.env("NIX_CONFIG", format!("{CONFIG}\n{config}"));
    }

    /// Adds a derivation with this script, whose inputs are `sources`.
    pub fn add(&self, name: &str, script: &str, more: &str) -> String {
        add(&self.near, name, script, more)
    }

    pub fn realise(&self, drv: &str, builders: &str) -> Run {
        run(self.command("nix-store", &format!("builders = {builders}")).args(["-r", drv]), b"")
    }

    pub fn calls(&self) -> Vec<String> {
        let calls = std::fs::read_to_string(self.near.path().join("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    /// Where a path of the near store lies; with `far` of the far one.
    pub fn place(house: &House, path: &str) -> PathBuf {
        house.path().join("root").join(path.trim_start_matches('/'))
    }
}

/// Starts a command whose ends are as they were set.
fn start(command: &mut Command) -> Child {
    command.spawn().expect("the program can be started")
}

fn executable(path: &Path, text: &str) {
    // Not open for writing in this process, which may fork at any time.
    let made =
        run(Command::new("sh").args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"]).arg(path), text.as_bytes());
    assert_eq!(made.status, Some(0), "{made:?}");
}

/// What only this house has. All these stores are called `/nix/store`, and a collector of one sees
/// what builders of others use: so their paths may not be the same.
fn key(house: &House) -> String {
    house.path().file_name().unwrap().to_str().unwrap().to_owned()
}

fn add(house: &House, name: &str, script: &str, more: &str) -> String {
    let script = serde_json::to_string(&format!("PATH=/bin:/usr/bin; {script}")).unwrap();
    let json = format!(
        r#"{{"name": "{name}", "builder": "/bin/sh", "args": ["-c", {script}], "env": {{"name": "{name}", "house": "{}"}}{more}}}"#,
        key(house)
    );
    let file = house.write(&format!("{name}.json"), json);
    let found = run(house.rooted("larder").args(["derivation".as_ref(), "add".as_ref(), file.as_os_str()]), b"");
    let drv = found.stdout.trim().to_owned();
    assert_eq!(found.status, Some(0), "{found:?}");
    drv
}

pub fn output(house: &House, drv: &str) -> String {
    run(house.rooted("nix-store").args(["-q", "--outputs", drv]), b"").stdout.trim().to_owned()
}

/// Larder has builds done by Larder and by real Nix, over both protocols: inputs go there, outputs
/// come back, the log is kept here, and it takes one connection.
#[test]
fn s014_s016_one_connection_a_build() {
    for (scheme, serve) in [("ssh", "nix-store --serve --write"), ("ssh-ng", "nix-daemon --stdio")] {
        for server in [LARDER, ""] {
            if server.is_empty() && !has("nix-store") {
                continue;
            }
            let pair = Pair::new(server, serve);
            pair.near.write("f", "contents\n");
            let file = run(pair.near.rooted("nix-store").args(["--add", "f"]), b"").stdout.trim().to_owned();
            let first = pair.add(
                "first",
                &format!("echo first >&2; cat {file} > $out"),
                &format!(r#", "inputSrcs": ["{file}"]"#),
            );
            let from = output(&pair.near, &first);
            let script = format!("echo second; cat {from} {from} > $out; echo {from} >> $out");
            let second = pair.add("second", &script, &format!(r#", "inputDrvs": {{"{first}": ["out"]}}"#));
            let built = pair.realise(&second, &format!("{scheme}://me@far"));
            let made = output(&pair.near, &second);
            assert_eq!((built.status, built.stdout.trim()), (Some(0), made.as_str()), "{scheme} {server}: {built:?}");
            let text = std::fs::read_to_string(Pair::place(&pair.near, &made)).unwrap();
            assert_eq!(text, format!("contents\ncontents\n{from}\n"));
            assert_eq!(pair.calls(), vec![format!("me@far -x -a -- {serve}"); 2], "a connection a build");
            let words = [
                format!("building '{first}' on '{scheme}://me@far'..."),
                format!("copying path '{file}' to '{scheme}://me@far'..."),
                "first".to_owned(),
                format!("copying path '{made}' from '{scheme}://me@far'..."),
            ];
            for line in words {
                assert!(built.stderr.lines().any(|found| found == line), "{line}\n{built:?}");
            }
            // What the second needs is there from the first one.
            assert!(!built.stderr.contains(&format!("copying path '{from}' to")), "{built:?}");
            let log = run(pair.near.rooted("nix-store").args(["-l", &second]), b"");
            assert!(log.stdout.lines().any(|line| line == "second"), "{log:?}");
            let info = run(pair.near.rooted("nix-store").args(["-q", "--references", "--deriver", &made]), b"");
            assert_eq!(info.status, Some(1), "{info:?}");
            assert_eq!(run(pair.near.rooted("nix-store").args(["-q", "--references", &made]), b"").stdout.trim(), from);
            let checked = run(pair.near.rooted("nix-store").args(["--verify", "--check-contents"]), b"");
            assert_eq!(checked.status, Some(0), "{checked:?}");
            // No lock stays behind.
            let locks = std::fs::read_dir(pair.near.path().join("root/nix/store")).unwrap();
            let locks = locks.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".lock"));
            assert_eq!(locks.count(), 0);
        }
    }
}

/// Over the real `ssh`: our hook and the real one, our machine and a real one.
#[test]
fn builds_over_a_real_ssh() {
    let far = House::new();
    let links = far.path().join("bin");
    assert_eq!(far.run("larder", ["links".as_ref(), links.as_os_str()]).status, Some(0));
    let conf = far.path().join("etc/nix.conf");
    std::fs::write(&conf, format!("{CONFIG}\nmax-jobs = 1\n")).unwrap();
    let variables = |first: &Path| {
        format!(
            "NIX_REMOTE=local?root={house}/root NIX_CONF_DIR={house}/etc PATH={}:/usr/bin:/bin",
            first.display(),
            house = far.path().display(),
        )
    };
    let Some(ours) = Sshd::start(&variables(&links), None) else { return };
    let forced = format!("{} --serve --write", links.join("nix-store").display());
    let Some(forced) = Sshd::start(&variables(&links), Some(&forced)) else { return };
    let Some(theirs) = Sshd::start(&variables(Path::new("/usr/bin")), None) else { return };
    let real = has("nix-store");
    for (number, (sshd, scheme, client)) in [
        (&ours, "ssh", "ours"),
        (&ours, "ssh-ng", "ours"),
        (&forced, "ssh", "ours"),
        (&theirs, "ssh", "ours"),
        (&theirs, "ssh-ng", "ours"),
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
        // The key of the host, and ours, are those of the machine's line.
        let (key, host_key) = sshd.keys();
        let builders = format!("builders = {scheme}://root@127.0.0.1 - {key} 1 1 - - {host_key}");
        let equip = |command: &mut Command| {
            near.as_root_of_its_own(command);
            command.env("NIX_CONFIG", format!("{CONFIG}\n{builders}")).env("NIX_SSHOPTS", sshd.plain_options());
        };
        let script = format!("echo number {number}; echo {number} > $out");
        let (drv, mut realise) = if client == "ours" {
            (add(&near, "x", &script, ""), near.rooted("nix-store"))
        } else {
            near.write(
                "x.nix",
                format!(
                    "derivation {{ name = \"x\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; \
                     args = [ \"-c\" {} ]; }}",
                    serde_json::to_string(&script).unwrap()
                ),
            );
            let mut instantiate = near.command("nix-instantiate");
            equip(instantiate.arg("x.nix"));
            (run(&mut instantiate, b"").stdout.trim().to_owned(), near.command("nix-store"))
        };
        equip(realise.args(["-r", &drv]));
        let built = run(&mut realise, b"");
        assert_eq!(built.status, Some(0), "{scheme} {client} {number}: {built:?}");
        assert!(built.stderr.contains(&format!("building '{drv}' on '{scheme}://root@127.0.0.1'...")), "{built:?}");
        assert!(built.stderr.contains(&format!("\nnumber {number}\n")), "{built:?}");
        let made = Pair::place(&near, built.stdout.trim());
        assert_eq!(std::fs::read_to_string(made).unwrap(), format!("{number}\n"));
    }
}

/// What the builder says of itself becomes our own status, and the reasons are told.
#[test]
fn failures_of_other_machines() {
    let pair = Pair::ours();
    let drv = pair.add("bad", "echo oh; exit 7", "");
    let failed = pair.realise(&drv, "ssh://far");
    assert_eq!(failed.status, Some(100), "{failed:?}");
    for line in [
        "oh".to_owned(),
        format!("error: build of '{drv}' on 'ssh://far' failed: builder for '{drv}' failed with exit code 7"),
        format!("error: builder for '{drv}' failed with exit code 100"),
    ] {
        assert!(failed.stderr.contains(&line), "{line}\n{failed:?}");
    }
    // A machine that is not there is passed over; without any other the build has nowhere to go.
    pair.write_ssh("echo 'ssh: connect to host far: no' >&2; exit 255");
    let drv = pair.add("good", "echo > $out", "");
    let failed = pair.realise(&drv, "ssh://far");
    assert_eq!(failed.status, Some(1), "{failed:?}");
    assert!(failed.stderr.contains("error: cannot build on 'ssh://far': "), "{failed:?}");
    assert!(failed.stderr.contains("ssh: connect to host far: no"), "{failed:?}");
    assert!(failed.stderr.contains("nable to start any build"), "{failed:?}");
    let mut here = pair.command("nix-store", "builders = ssh://far\nmax-jobs = 1");
    let built = run(here.args(["-r", &drv]), b"");
    assert_eq!(built.status, Some(0), "{built:?}");
    assert!(built.stderr.contains(&format!("building '{drv}'...")), "{built:?}");
    // A machine that may not be written to says so, be it after the connection has ended.
    let refusing = Pair::new(LARDER, "nix-store --serve");
    let late = format!("exec bash -c 'exec {LARDER} nix-store --serve 2> >(exec >&2; sleep 0.3; cat)'");
    refusing.write_ssh(&late);
    let file = refusing.near.write("f", "x");
    let file = run(refusing.near.rooted("nix-store").arg("--add").arg(file), b"").stdout.trim().to_owned();
    let drv = refusing.add("x", "echo > $out", &format!(r#", "inputSrcs": ["{file}"]"#));
    let failed = refusing.realise(&drv, "ssh://far");
    assert_eq!(failed.status, Some(1), "{failed:?}");
    assert!(failed.stderr.contains("importing paths is not allowed"), "{failed:?}");
    let bad = refusing.realise(&drv, "ssh://far - - many");
    assert!(bad.stderr.contains("bad machine specification: 'many' in"), "{bad:?}");
}

/// The limits are the other machine's to keep, and waiting for one's turn does not count.
#[test]
fn s049_s086_limits_are_kept_over_there() {
    for (scheme, serve) in [("ssh", "nix-store --serve --write"), ("ssh-ng", "nix-daemon --stdio")] {
        let pair = Pair::new(LARDER, serve);
        let drv = pair.add("slow", "sleep 30; echo > $out", "");
        let builders = format!("builders = {scheme}://far");
        let late = run(pair.command("nix-store", &builders).args(["-r", &drv, "--timeout", "1"]), b"");
        assert_eq!(late.status, Some(101), "{late:?}");
        assert!(late.stderr.contains("timed out after 1 seconds"), "{late:?}");
        let silent = run(pair.command("nix-store", &builders).args(["-r", &drv, "--max-silent-time", "1"]), b"");
        assert_eq!(silent.status, Some(101), "{silent:?}");
        assert!(silent.stderr.contains("1 seconds of silence"), "{silent:?}");
    }
    let pair = Pair::ours();
    let drv = pair.add("quick", "echo > $out", "");
    let load = pair.near.path().join("root/nix/var/nix/current-load");
    std::fs::create_dir_all(&load).unwrap();
    // Somebody else sends something for longer than the builder may take.
    let mut other = Command::new("flock");
    other.arg(load.join("ssh:__far.upload-lock")).args(["sh", "-c", "echo; read done"]);
    let mut other = start(other.stdin(Stdio::piped()).stdout(Stdio::piped()));
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let mut realise = pair.command("nix-store", "builders = ssh://far");
    let waiting = start(realise.args(["-r", &drv, "--timeout", "1"]).stdout(Stdio::null()).stderr(Stdio::piped()));
    wait_for("the machine is taken", || !pair.calls().is_empty());
    std::thread::sleep(std::time::Duration::from_millis(1500));
    drop(other.stdin.take());
    let ended = waiting.wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    other.wait().unwrap();
}

/// Whoever wanted a build is gone: the builder is, too.
#[test]
fn s058_a_builder_ends_with_who_wanted_it() {
    for signal in ["TERM", "KILL"] {
        for (scheme, serve) in [("ssh", "nix-store --serve --write"), ("ssh-ng", "nix-daemon --stdio")] {
            let pair = Pair::new(LARDER, serve);
            let drv = pair.add("slow", "echo begun; sleep 1000; echo > $out", "");
            let mut realise = pair.command("nix-store", &format!("builders = {scheme}://far"));
            let log = std::fs::File::create(pair.near.path().join("log")).unwrap();
            let mut realise = start(realise.args(["-r", &drv]).stdout(Stdio::null()).stderr(log));
            let said = || std::fs::read_to_string(pair.near.path().join("log")).unwrap();
            wait_for("the builder runs", || said().contains("\nbegun\n"));
            let uses = |dir: &str| {
                std::fs::read_dir(pair.far.path().join("root").join(dir)).is_ok_and(|mut dir| dir.next().is_some())
            };
            assert!(uses("nix/var/nix/larder/builds"));
            let id = realise.id().to_string();
            assert!(Command::new("kill").args([&format!("-{signal}"), &id]).status().unwrap().success());
            realise.wait().unwrap();
            wait_for("the builder is gone", || !uses("nix/var/nix/larder/builds"));
            wait_for("the connection is closed", || !uses("nix/var/nix/temproots"));
        }
    }
}

/// A collector over there leaves what a build needs, from the upload to the end.
#[test]
fn s015_s035_inputs_stay_until_the_end() {
    let pair = Pair::ours();
    pair.near.write("f", key(&pair.near));
    let file = run(pair.near.rooted("nix-store").args(["--add", "f"]), b"").stdout.trim().to_owned();
    let gate = pair.near.path().join("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    let script = format!("echo begun; read x < /gate; cat {file} > $out");
    let drv = pair.add("x", &script, &format!(r#", "inputSrcs": ["{file}"]"#));
    pair.write_ssh(&format!("export NIX_CONFIG=\"$NIX_CONFIG\nextra-sandbox-paths = /gate={}\"", gate.display()));
    let mut realise = pair.command("nix-store", "builders = ssh://far");
    let log = std::fs::File::create(pair.near.path().join("log")).unwrap();
    let mut realise = start(realise.args(["-r", &drv]).stdout(Stdio::null()).stderr(log));
    let said = || std::fs::read_to_string(pair.near.path().join("log")).unwrap();
    wait_for("the builder runs", || said().contains("\nbegun\n"));
    let collected = run(pair.far.rooted("nix-store").arg("--gc"), b"");
    assert_eq!(collected.status, Some(0), "{collected:?}");
    assert!(Pair::place(&pair.far, &file).exists(), "{collected:?}");
    std::fs::write(&gate, "\n").unwrap();
    assert!(realise.wait().unwrap().success(), "{}", said());
    // Then nothing holds it any more.
    assert_eq!(run(pair.far.rooted("nix-store").arg("--gc"), b"").status, Some(0));
    assert!(!Pair::place(&pair.far, &file).exists());
}

/// Slots, features and speeds, and what is done here.
#[test]
fn machines_are_chosen() {
    let pair = Pair::ours();
    let place = |run: &Run, drv: &str| {
        let line = run.stderr.lines().find(|line| line.starts_with(&format!("building '{drv}'")));
        line.map(|line| line.rsplit(" on ").next().unwrap().to_owned()).unwrap_or_default()
    };
    let file = pair.near.write(
        "machines",
        "ssh://slow\nssh://fast - - 2 2 # the best\nssh://odd odd-system - 1 9\nssh://kvm - - 1 1 zork must\n",
    );
    let machines = format!("@{}", file.display());
    let plain = pair.add("plain", "echo > $out", "");
    let built = pair.realise(&plain, &machines);
    assert_eq!(place(&built, &plain), "'ssh://fast'...", "{built:?}");
    let odd = pair.add("odd", "echo > $out", r#", "system": "odd-system""#);
    let built = pair.realise(&odd, &machines);
    // It says that it cannot, as it is no such machine.
    assert!(built.stderr.contains("building '") && built.stderr.contains("on 'ssh://odd'"), "{built:?}");
    assert!(built.stderr.contains("a 'odd-system' with features {} is required to build"), "{built:?}");
    let nobody = pair.add("nobody", "echo > $out", r#", "system": "no-system""#);
    let refused = pair.realise(&nobody, &machines);
    assert!(refused.stderr.contains("a 'no-system' with features {} is required to build"), "{refused:?}");
    assert_eq!(refused.status, Some(1));
    // One that prefers this machine stays here, if it may.
    let json = pair.near.write("local.json", r#"{"name": "local", "builder": "/bin/sh", "args": ["-c", "echo > $out"], "env": {"name": "local", "preferLocalBuild": "1"}}"#);
    let local = run(pair.near.rooted("larder").args(["derivation", "add"]).arg(json), b"").stdout.trim().to_owned();
    let config = format!("builders = {machines}\nmax-jobs = 1");
    let built = run(pair.command("nix-store", &config).args(["-r", &local]), b"");
    assert!(built.stderr.contains(&format!("building '{local}'...")), "{built:?}");
    // So does everything if nobody may be asked.
    let alone = pair.add("alone", "echo > $out", "");
    let built = run(pair.command("nix-store", &config).args(["-r", &alone, "--no-build-hook"]), b"");
    assert!(built.stderr.contains(&format!("building '{alone}'...")), "{built:?}");
    // A slot that another process has is not there.
    let load = pair.near.path().join("root/nix/var/nix/current-load");
    let mut other = Command::new("flock");
    other.arg(load.join("ssh:__slow-0")).args(["sh", "-c", "echo; read done"]);
    let mut other = start(other.stdin(Stdio::piped()).stdout(Stdio::piped()));
    std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let next = pair.add("next", "echo > $out", "");
    let mut realise = pair.command("nix-store", "builders = ssh://slow\nbuild-poll-interval = 1");
    let log = std::fs::File::create(pair.near.path().join("log")).unwrap();
    let mut realise = start(realise.args(["-r", &next]).stdout(Stdio::null()).stderr(log));
    let said = || std::fs::read_to_string(pair.near.path().join("log")).unwrap();
    wait_for("it waits", || said().contains(&format!("waiting for a machine to build '{next}'...\n")));
    drop(other.stdin.take());
    other.wait().unwrap();
    assert!(realise.wait().unwrap().success(), "{}", said());
    assert_eq!(said().matches("waiting for a machine").count(), 1);
}

/// Several at once: the machine is given as many as it has slots, and the rest is done here.
#[test]
fn many_builds_at_once() {
    let pair = Pair::ours();
    let drvs: Vec<String> = (0..12).map(|n| pair.add(&format!("n{n}"), &format!("echo {n} > $out"), "")).collect();
    for jobs in [0, 2] {
        let config = format!("builders = ssh://far - - 3\nmax-jobs = {jobs}\nbuild-poll-interval = 1");
        let built = run(pair.command("nix-store", &config).arg("-r").args(&drvs), b"");
        assert_eq!(built.status, Some(0), "{built:?}");
        assert_eq!(built.stdout.lines().count(), 12);
        if jobs == 0 {
            assert_eq!(pair.calls().len(), 12);
            let outputs: Vec<&str> = built.stdout.lines().collect();
            assert_eq!(run(pair.near.rooted("nix-store").arg("--delete").args(outputs), b"").status, Some(0));
        }
    }
    // More than one at a time was built there, and never more than there are slots.
    let load = pair.near.path().join("root/nix/var/nix/current-load");
    let slots = std::fs::read_dir(load).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut slots: Vec<String> = slots.filter(|name| name.starts_with("ssh:__far-")).collect();
    slots.sort();
    assert_eq!(slots, ["ssh:__far-0", "ssh:__far-1", "ssh:__far-2"]);
}

/// The machine fetches inputs itself if it is told to.
#[test]
fn machines_may_fetch_inputs() {
    let pair = Pair::ours();
    pair.near.write("f", "x\n");
    let file = run(pair.near.rooted("nix-store").args(["--add", "f"]), b"").stdout.trim().to_owned();
    let cache = pair.near.path().join("cache");
    let pushed = run(pair.near.rooted("larder").args(["push", &format!("file://{}", cache.display()), &file]), b"");
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    pair.write_ssh(&format!("export NIX_CONFIG=\"$NIX_CONFIG\nsubstituters = file://{}\"", cache.display()));
    let drv = pair.add("x", &format!("cat {file} > $out"), &format!(r#", "inputSrcs": ["{file}"]"#));
    let built =
        run(pair.command("nix-store", "builders = ssh://far\nbuilders-use-substitutes = true").args(["-r", &drv]), b"");
    assert_eq!(built.status, Some(0), "{built:?}");
    assert!(!built.stderr.contains(&format!("copying path '{file}' to")), "{built:?}");
    assert!(Pair::place(&pair.far, &file).exists());
}

/// Clients of a daemon have builds done elsewhere by it.
#[test]
fn a_daemon_has_builds_done() {
    if !is_root() {
        return;
    }
    let pair = Pair::ours();
    let conf = format!("{CONFIG}\nbuilders = local?root={}/root\n", pair.far.path().display());
    let daemon = Daemon::start_as(&pair.near, pair.near.applet("nix-daemon"), &conf);
    let script = r#"["-c", "echo said; echo > $out"]"#;
    let json = format!(r#"{{"name": "x", "builder": "/bin/sh", "args": {script}, "env": {{"name": "x"}}}}"#);
    let json = pair.near.write("x.json", json);
    let added = pair.near.run("larder", ["derivation".as_ref(), "add".as_ref(), json.as_os_str()]);
    let mut client = pair.near.applet("nix-store");
    let built = run(client.args(["-r", added.stdout.trim()]).env("NIX_REMOTE", "daemon"), b"");
    assert_eq!(built.status, Some(0), "{built:?}\n{}", daemon.log());
    assert!(built.stderr.contains("\nsaid\n") && built.stderr.contains("on 'local?root="), "{built:?}");
}

/// Writes a hook in Python, which notes what it is told, and answers as the names of derivations say.
/// It builds nothing: it has outputs registered that it makes up.
fn write_hook(pair: &Pair, hook: &Path) {
    let near = pair.near.path().display();
    let text = format!(
        r##"#!/usr/bin/env python3
import os, struct, subprocess, sys
def word(): return struct.unpack("<Q", os.read(0, 8))[0]
def read(n):
    b = b""
    while len(b) < n: b += os.read(0, n - len(b))
    return b
def text():
    n = word(); s = read(n + -n % 8)[:n]; return s.decode()
def texts(): return [text() for _ in range(word())]
def say(s): os.write(2, (s + "\n").encode())
note = open("{near}/told", "a")
settings = {{}}
while word(): name = text(); settings[name] = text()
note.write(f"{{sys.argv[1:]}} {{os.getcwd()}} {{settings['max-jobs']}} {{settings['builders']}}\n")
while True:
    if text() != "try": sys.exit(0)
    willing, system, drv, features = word(), text(), text(), texts()
    name = drv.split("-", 1)[1]
    note.write(f"{{name}} {{willing}} {{system}} {{features}}\n"); note.flush()
    say("a word before")
    say('@nix {{"action":"msg","level":1,"msg":"a message"}}')
    if "zork" in name: say("# zork")
    if "dies" in name: sys.exit(3)
    if "declined" in name: say("# decline"); continue
    if "never" in name: say("# decline-permanently"); sys.exit(0)
    say("# accept"); say("a-machine")
    inputs, outputs = texts(), texts()
    note.write(f"{{[p.split('-', 1)[1] for p in inputs]}} {{outputs}}\n"); note.flush()
    assert os.read(0, 1) == b""
    say("dropped")
    os.write(4, b"a line of the log\n")
    say('@nix {{"action":"result","id":1,"type":101,"fields":["another line"]}}')
    for code in ["100", "101", "5"]:
        if "code" + code in name: sys.exit(int(code))
    if "nothing" in name: sys.exit(0)
    out = settings["x"] if "x" in settings else subprocess.run(["LARDER", "nix-store", "-q", "--outputs", drv], capture_output=True, text=True).stdout.strip()
    real = "{near}/root" + out
    open(real, "w").write("made\n"); os.chmod(real, 0o444); os.utime(real, (1, 1))
    subprocess.run(["LARDER", "nix-store", "--register-validity", "--reregister"], input=f"{{out}}\n{{drv}}\n0\n", text=True, check=True)
    sys.exit(0)
"##
    );
    executable(hook, &text.replace("LARDER", LARDER));
}

/// A hook of the user's own: what it is told, and every answer it may give.
#[test]
fn hooks_of_ones_own() {
    if !has("python3") {
        return;
    }
    let pair = Pair::ours();
    let hook = pair.near.path().join("hook");
    write_hook(&pair, &hook);
    let config = format!("build-hook = {}\nbuilders = anything", hook.display());
    let realise = |drv: &str, jobs: u32| {
        run(pair.command("nix-store", &format!("{config}\nmax-jobs = {jobs}")).args(["-r", drv]), b"")
    };
    let told = || std::fs::read_to_string(pair.near.path().join("told")).unwrap();
    let features = r#", "system": "odd-system""#;
    let json = pair.near.write("good.json", r#"{"name": "good", "system": "odd-system", "builder": "/bin/sh", "args": [], "env": {"name": "good", "requiredSystemFeatures": "kvm big"}}"#);
    let good = run(pair.near.rooted("larder").args(["derivation", "add"]).arg(json), b"").stdout.trim().to_owned();
    let built = realise(&good, 1);
    assert_eq!(built.status, Some(0), "{built:?}\n{}", told());
    assert_eq!(told(), "['3'] / 1 anything\ngood.drv 0 odd-system ['big', 'kvm']\n[] ['out']\n");
    for line in ["a word before", "a message", "a line of the log", "another line"] {
        assert!(built.stderr.contains(line), "{line}\n{built:?}");
    }
    assert!(
        built.stderr.contains(&format!("building '{good}' on 'a-machine'...")) && !built.stderr.contains("dropped"),
        "{built:?}"
    );
    let log = run(pair.near.rooted("nix-store").args(["-l", &good]), b"");
    assert_eq!(log.stdout, "a line of the log\nanother line\n");
    for (name, status, error) in [
        ("code100", 100, "failed with exit code 100"),
        ("code101", 101, "failed with exit code 101"),
        ("code5", 1, "failed with exit code 5"),
        ("nothing", 1, "are unexpectedly invalid"),
        ("zork", 1, "error: bad hook reply 'zork'"),
        ("dies", 1, "error: build hook died unexpectedly: exit status: 3"),
        ("declined", 1, "a 'odd-system' with features {} is required"),
        ("never", 1, "a 'odd-system' with features {} is required"),
    ] {
        let drv = pair.add(name, "", features);
        let failed = realise(&drv, 1);
        assert_eq!(failed.status, Some(status), "{name}: {failed:?}");
        assert!(failed.stderr.contains(error), "{name}: {failed:?}");
    }
    // What is declined is built here.
    for name in ["declined-here", "never-here", "dies-here"] {
        let drv = pair.add(name, "echo > $out", "");
        let built = realise(&drv, 1);
        assert_eq!(built.status, Some(0), "{name}: {built:?}");
        assert!(built.stderr.contains(&format!("building '{drv}'...")), "{name}: {built:?}");
        assert!(told().contains(&format!("{name}.drv 1 ")), "{}", told());
    }
    // One that is not there is told of once, and asked no more.
    let drvs = [pair.add("here1", "echo > $out", ""), pair.add("here2", "echo > $out", "")];
    let config = "build-hook = /no/such/hook\nbuilders = anything\nmax-jobs = 1";
    let built = run(pair.command("nix-store", config).arg("-r").args(&drvs), b"");
    assert_eq!(built.status, Some(0), "{built:?}");
    assert_eq!(built.stderr.matches("cannot start the build hook '/no/such/hook'").count(), 1, "{built:?}");
}

/// Machines must say that they can do this; what was built there is known here by its id.
#[test]
fn floating_outputs_are_built_elsewhere() {
    /// That of the output `out`.
    const PLACEHOLDER: &str = "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9";
    let features = "experimental-features = ca-derivations";
    let pair = Pair::ours();
    pair.write_ssh(&format!("export NIX_CONFIG=\"$NIX_CONFIG\n{features}\""));
    let json = |name: &str, script: &str, inputs: &str| {
        format!(
            r#"{{"name": "{name}", "builder": "/bin/sh", "args": ["-c", {}], "env": {{"name": "{name}", "out": "{PLACEHOLDER}"}}, {inputs}
            "outputs": {{"out": {{"hashAlgo": "sha256", "method": "nar"}}}}}}"#,
            serde_json::to_string(script).unwrap()
        )
    };
    let file = pair.near.write("f.json", json("floating", "echo said; echo x > $out", ""));
    let mut add = pair.command("larder", features);
    let added = run(add.args(["derivation", "add"]).arg(file), b"");
    let drv = added.stdout.trim().to_owned();
    let refused = run(pair.command("nix-store", &format!("{features}\nbuilders = ssh://far")).args(["-r", &drv]), b"");
    assert_eq!(refused.status, Some(1), "{refused:?}");
    let machines = format!("{features}\nbuilders = ssh://far - - 1 1 ca-derivations");
    let built = run(pair.command("nix-store", &machines).args(["-r", &drv]), b"");
    assert_eq!(built.status, Some(0), "{added:?} {built:?}");
    assert_eq!(std::fs::read_to_string(Pair::place(&pair.near, built.stdout.trim())).unwrap(), "x\n");
    let again = run(pair.command("nix-store", &machines).args(["-r", &drv]), b"");
    assert_eq!((again.stdout, pair.calls().len()), (built.stdout, 1));
}

/// Real Nix has builds done by our hook, which brings the outputs into the ledger of real Nix.
#[test]
fn s017_our_hook_serves_real_nix() {
    if !has("nix-store") {
        return;
    }
    let pair = Pair::ours();
    let hook = pair.near.path().join("hook");
    executable(&hook, &format!("#!/bin/sh\nexec {LARDER} __build-remote --nix-store nix-store \"$@\"\n"));
    let real = |program: &str, config: &str, words: &[&str]| {
        let mut command = pair.near.command(program);
        pair.near.as_root_of_its_own(&mut command);
        pair.equip(&mut command, config);
        run(command.args(words), b"")
    };
    pair.near.write("f", "contents\n");
    let expression = |name: &str, script: &str| {
        format!(
            "derivation {{ name = \"{name}\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; \
             args = [ \"-c\" \"PATH=/bin:/usr/bin; {script}\" ]; src = ./f; }}"
        )
    };
    pair.near.write("good.nix", expression("good", "echo said; cat $src > $out"));
    pair.near.write("bad.nix", expression("bad", "echo oh; exit 3"));
    let config = format!("builders = ssh://far\nbuild-hook = {}", hook.display());
    let drv = |file: &str| real("nix-instantiate", "", &[file]).stdout.trim().to_owned();
    let good = drv("good.nix");
    let built = real("nix-store", &config, &["-r", &good]);
    assert_eq!(built.status, Some(0), "{built:?}");
    for line in [format!("building '{good}' on 'ssh://far'..."), "said".to_owned()] {
        assert!(built.stderr.lines().any(|found| found == line), "{line}\n{built:?}");
    }
    let made = built.stdout.trim();
    assert_eq!(std::fs::read_to_string(Pair::place(&pair.near, made)).unwrap(), "contents\n");
    assert_eq!(real("nix-store", "", &["--verify-path", made]).status, Some(0));
    let failed = real("nix-store", &config, &["-r", &drv("bad.nix")]);
    assert_eq!(failed.status, Some(100), "{failed:?}");
    assert!(failed.stderr.contains("on 'ssh://far' failed: builder for"), "{failed:?}");
    // What it cannot place is left to real Nix.
    let mut here = config.clone();
    here.push_str("\nbuilders = ssh://far other-system\nmax-jobs = 1");
    pair.near.write("here.nix", expression("here", "echo > $out"));
    let built = real("nix-store", &here, &["-r", &drv("here.nix")]);
    assert_eq!(built.status, Some(0), "{built:?}");
    assert_eq!(pair.calls().len(), 2);
}
