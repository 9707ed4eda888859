//! A daemon in a house, and clients of it: real ones, and scripted ones that speak the protocol
//! word by word.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use larder_core::api::{DerivedPath, Outputs};
use larder_core::derivation::aterm::Mask;
use larder_core::derivation::modulo::{Memo, fill_deferred};
use larder_core::derivation::{Derivation, Output, OutputName};
use larder_core::report::{ActivityResult, Level, Reporter, Start};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};
use larder_wire::worker::client::Client;

use crate::house::House;

/// How long anything here may take, on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A daemon in a house; killed if the test fails.
pub struct Daemon {
    pub child: Child,
    pub socket: PathBuf,
    pub log: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Daemon {
    pub fn start(house: &House, program: &str, conf: &str) -> Self {
        Self::start_as(house, house.command(program), conf)
    }

    /// A daemon that this command is, but for its environment.
    pub fn start_as(house: &House, mut command: Command, conf: &str) -> Self {
        let log = house.path().join("daemon.log");
        // A store that is not there yet would be looked for behind the socket.
        for dir in ["store", "var"] {
            let _ = std::fs::create_dir(house.path().join(dir));
        }
        command.arg0("nix-daemon").env("NIX_REMOTE", "local");
        command.env("NIX_CONFIG", format!("build-users-group =\nsubstituters =\n{conf}"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
        let child = command.spawn().expect("the daemon starts");
        let socket = house.path().join("socket");
        wait_for("the daemon listens", || UnixStream::connect(&socket).is_ok());
        Self { child, socket, log }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Does it still serve?
    pub fn is_well(&self) {
        let mut stream = self.connect();
        greet(&mut stream);
    }

    /// Ends it, and gives its status.
    pub fn stop(mut self) -> Option<i32> {
        self.signal(rustix::process::Signal::TERM);
        let mut status = None;
        wait_for("the daemon ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap().code()
    }
}

pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

pub fn text(text: &str) -> Vec<u8> {
    let mut out = words(&[text.len() as u64]);
    out.extend_from_slice(text.as_bytes());
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

/// A handshake at 1.34, read to its end.
pub fn greet(stream: &mut UnixStream) {
    stream.write_all(&words(&[0x6e69_7863, 0x122, 0, 0])).unwrap();
    let mut answer = vec![0; 16 + 16 + 8];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[32..], words(&[0x616c_7473]));
}

pub fn has(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output();
    let found = found.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("(Nix) 2.8.0"));
    if !found {
        println!("skipped: there is no {program} 2.8.0 here");
    }
    found
}

pub fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: only root may be somebody else");
    }
    root
}

/// Where real programs are: on this machine, or in a folder with another system.
#[derive(Debug, Clone)]
pub struct Land {
    root: Option<PathBuf>,
}

/// Puts a folder in the place of the root directory, for one program: arguments are the folder, the
/// house, and the program with its words.
const ENTER: &str = r#"
set -e
root=$1 house=$2
shift 2
mount --bind "$root" "$root"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root$house"
mount --rbind "$house" "$root$house"
for dir in proc dev sys; do mount --rbind "/$dir" "$root/$dir"; done
here=$(pwd)
cd "$root"
pivot_root . mnt
exec chroot . /bin/sh -c 'umount -l /mnt; cd "$1"; shift; exec "$@"' sh "$here" "$@"
"#;

impl Land {
    /// Nix 2.8.0 on this machine.
    pub fn here() -> Option<Self> {
        has("nix-daemon").then_some(Self { root: None })
    }

    /// Nix 2.26.3 of Debian trixie, where `tests/clients/trixie.sh` has put it.
    pub fn trixie() -> Option<Self> {
        let root = std::env::var_os("LARDER_TRIXIE").map_or_else(|| "/var/tmp/larder-trixie".into(), PathBuf::from);
        if !root.join("usr/bin/nix-store").exists() {
            println!("skipped: there is no '{}'; tests/clients/trixie.sh makes it", root.display());
            return None;
        }
        // The house must be visible there under the same name, without leaving anything behind.
        if !std::env::temp_dir().starts_with("/tmp") {
            println!("skipped: temporary files are not below /tmp");
            return None;
        }
        let land = Self { root: Some(root) };
        let house = House::new();
        let found = is_root().then(|| land.command(&house, "nix-store").arg("--version").output());
        let found =
            found.and_then(Result::ok).is_some_and(|out| String::from_utf8_lossy(&out.stdout).contains("2.26."));
        if !found {
            println!("skipped: the nix-store of trixie cannot be run here");
        }
        found.then_some(land)
    }

    /// Are messages compared, too? Ours are those of 2.8 or 2.26, whichever says it better.
    pub fn compares_messages(&self) -> bool {
        self.root.is_none()
    }

    /// A program of that land, in a house.
    pub fn command(&self, house: &House, program: &str) -> Command {
        let Some(root) = &self.root else { return house.command(program) };
        let mut command = house.command("unshare");
        command.args(["--mount", "--propagation", "private", "/bin/sh", "-c", ENTER, "sh"]);
        command.arg(root).arg(house.path()).arg(program);
        command
    }

    /// A real client's command in a house, with the daemon as its store.
    pub fn client(&self, house: &House, words: &[&str]) -> Command {
        let mut command = self.command(house, words[0]);
        command.args(&words[1..]).env("NIX_REMOTE", "daemon").env("NIX_USER_CONF_FILES", "/dev/null");
        command.env("NIX_CONFIG", "experimental-features = nix-command\nsubstituters =\nbuild-users-group =");
        command
    }

    /// Its own daemon.
    pub fn daemon(&self, house: &House, conf: &str) -> Daemon {
        Daemon::start_as(house, self.command(house, "nix-daemon"), conf)
    }
}

/// The same with the programs of this machine.
pub fn client(house: &House, words: &[&str]) -> Command {
    Land { root: None }.client(house, words)
}

/// Two houses at one place, one after the other, so that paths are the same.
pub fn twin() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::Builder::new().prefix("larder-twin-").tempdir().unwrap();
    let place = dir.path().join("house");
    (dir, place)
}

/// Keeps what a server says.
#[derive(Default)]
pub struct Heard(Mutex<Vec<String>>);

impl Heard {
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
    fn put(&self, text: String) {
        self.0.lock().unwrap().push(text);
    }
}

impl Reporter for Heard {
    fn shows(&self, _level: Level) -> bool {
        true
    }
    fn message(&self, _level: Level, text: std::fmt::Arguments<'_>) {
        self.put(text.to_string());
    }
    fn start(&self, start: &Start<'_>) -> u64 {
        if !start.text.is_empty() {
            self.put(start.text.to_owned());
        }
        1
    }
    fn result(&self, _activity: u64, result: ActivityResult<'_>) {
        if let ActivityResult::BuildLogLine(line) = result {
            self.put(format!("> {}", String::from_utf8_lossy(line)));
        }
    }
}

/// Our own client at a version.
pub fn connect(house: &House, daemon: &Daemon, newest: u8) -> (Client, Arc<Heard>, UnixStream) {
    let stream = daemon.connect();
    stream.set_read_timeout(None).unwrap();
    let dir = StoreDir::new(house.path().join("store").to_str().unwrap()).unwrap();
    let input = Box::new(BufReader::new(stream.try_clone().unwrap()));
    let output = Box::new(stream.try_clone().unwrap());
    let heard = Arc::new(Heard::default());
    (Client::connect(input, output, dir, newest, Arc::clone(&heard) as _).unwrap(), heard, stream)
}

/// All outputs of a derivation.
pub fn all_of(drv: &StorePath) -> [DerivedPath; 1] {
    [DerivedPath::Built { drv: drv.clone(), outputs: Outputs::All }]
}

/// Processes whose parent is this one, or a child of it.
pub fn children(pid: u32) -> usize {
    let mut found = 0;
    let mut left = vec![pid];
    while let Some(pid) = left.pop() {
        for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            let more: Vec<u32> = text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
            // From which launchers are forked: it stays.
            let is_zygote = |pid: &&u32| {
                std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "larder-zygote\n")
            };
            found += more.len() - more.iter().filter(is_zygote).count();
            left.extend(more);
        }
    }
    found
}

/// A derivation that a shell makes, with its paths.
pub fn shell(dir: &StoreDir, name: &str, script: &str) -> Derivation {
    let mut drv = Derivation {
        name: Name::new(name).unwrap(),
        outputs: BTreeMap::new(),
        input_drvs: BTreeMap::new(),
        input_srcs: BTreeSet::new(),
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
        args: vec!["-c".into(), script.into()],
        env: [("PATH".into(), "/bin:/usr/bin".into())].into(),
    };
    fill(dir, &mut drv);
    drv
}

/// Gives the output of a derivation the path that follows from what it is now.
pub fn fill(dir: &StoreDir, drv: &mut Derivation) {
    drv.outputs = [(OutputName::out(), Output::Deferred)].into();
    drv.env.insert("out".into(), "".into());
    let nothing = |_: &StorePath| Err::<Derivation, _>(std::fmt::Error);
    let modulo = Memo::new().modulo(dir, drv, Mask::On, nothing).unwrap();
    fill_deferred(dir, drv, &modulo.digest).unwrap();
}
