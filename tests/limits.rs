//! A disk that is full, and memory that stays small whatever the size of what goes through it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::house::{House, Run, run};

/// The most resident memory, in MiB, of what streams.
const MOST_MIB: u64 = 64;

/// A file system of 14 MiB below a house. Dropped, it is unmounted.
struct SmallDisk {
    house: House,
    mount: PathBuf,
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.mount).status();
    }
}

impl SmallDisk {
    /// `None`, with a word why, where none can be had.
    fn new(kind: &str) -> Option<Self> {
        let house = House::new();
        let mount = house.path().join("disk");
        std::fs::create_dir(&mount).unwrap();
        let script = match kind {
            "tmpfs" => "mount -t tmpfs -o size=14m,mode=755 none disk",
            _ => {
                "truncate -s 14M image && mkfs.ext4 -q -O ^has_journal -m 0 -N 256 image && mount -o loop image disk \
                 && rmdir disk/lost+found"
            }
        };
        let output = Command::new("sh").args(["-c", script]).current_dir(house.path()).output().unwrap();
        if output.status.success() {
            return Some(Self { house, mount });
        }
        println!("skipped: no {kind} can be mounted here: {}", String::from_utf8_lossy(&output.stderr).trim());
        None
    }

    fn command(&self) -> Command {
        let mut command = self.house.applet("nix-store");
        command.env("NIX_STORE_DIR", self.mount.join("store")).env("NIX_STATE_DIR", self.mount.join("var"));
        command
    }

    fn run(&self, words: &str) -> Run {
        self.feed(words, b"")
    }

    fn feed(&self, words: &str, stdin: &[u8]) -> Run {
        run(self.command().args(words.split(' ')), stdin)
    }

    fn entries(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.mount.join("store")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// Status 1 with the reason, nothing left behind, and the store as before.
    #[track_caller]
    fn refuses(&self, words: &str, stdin: &[u8], ledger: &str) {
        let before = self.entries();
        let run = self.feed(words, stdin);
        assert_eq!(run.status, Some(1), "{words}: {run:?}");
        assert!(run.stderr.contains("No space left on device"), "{words}: {run:?}");
        assert_eq!(self.entries(), before, "{words}: {run:?}");
        self.is_whole(ledger);
    }

    #[track_caller]
    fn is_whole(&self, ledger: &str) {
        let verified = self.run("--verify --check-contents");
        assert_eq!((verified.status, verified.stderr.contains("error")), (Some(0), false), "{verified:?}");
        assert_eq!(self.run("--dump-db").stdout, ledger);
    }
}

/// Registrations with long names: more than the disk holds.
fn registrations(store: &str) -> Vec<u8> {
    let mut text = String::new();
    for n in 0..60_000 {
        let _ = write!(text, "{store}/{n:032}-{}\n{n:064x}\n120\n\n0\n", "name".repeat(50));
    }
    text.into_bytes()
}

#[test]
fn a_disk_that_is_full_leaves_the_store_as_it_was() {
    let mut tried = 0;
    for kind in ["tmpfs", "ext4"] {
        let Some(disk) = SmallDisk::new(kind) else { continue };
        tried += 1;
        let small = disk.house.write("small", "small\n");
        std::fs::create_dir(disk.house.work().join("tree")).unwrap();
        for n in 0..12 {
            disk.house.write(&format!("tree/{n}"), vec![n; 1 << 20]);
        }
        let big = disk.house.write("big", vec![b'b'; 12 << 20]);
        let added = disk.run("--add small");
        assert_eq!(added.status, Some(0), "{added:?}");
        let path = added.stdout.trim().to_owned();
        let ledger = disk.run("--dump-db").stdout;
        disk.refuses("--add tree", b"", &ledger);
        disk.refuses("--add big", b"", &ledger);
        disk.refuses("--add-fixed sha256 big", b"", &ledger);
        // What was right before the fault stays.
        let two = run(disk.command().arg("--add").arg(&small).arg(&big), b"");
        assert_eq!((two.stdout.trim(), two.status), (path.as_str(), Some(1)));
        disk.is_whole(&ledger);
        let stream = export_of_big(&disk);
        disk.refuses("--import", &stream, &ledger);
        disk.refuses("--load-db", &registrations(disk.mount.join("store").to_str().unwrap()), &ledger);
        // Filled by others to the last block: nothing can be added, but deleted.
        let mut filler = File::create(disk.mount.join("filler")).unwrap();
        while std::io::Write::write_all(&mut filler, &[7; 4096]).is_ok() {}
        let refused = disk.run("--add big");
        assert_eq!(refused.status, Some(1), "{refused:?}");
        disk.is_whole(&ledger);
        let deleted = disk.run(&format!("--delete {path}"));
        assert_eq!(deleted.status, Some(0), "{deleted:?}");
        assert_eq!(disk.run("--dump-db").stdout, "");
        std::fs::remove_file(disk.mount.join("filler")).unwrap();
        assert_eq!(disk.run("--add small").stdout.trim(), path);
        disk.is_whole(&ledger);
    }
    println!("{tried} file systems");
}

/// An export stream of a file too big for the disk, made in a store with the same name elsewhere.
fn export_of_big(disk: &SmallDisk) -> Vec<u8> {
    let state = disk.house.path().join("elsewhere");
    let real = disk.house.path().join("elsewhere-store");
    let store = format!("local?store={}&real={}", disk.mount.join("store").display(), real.display());
    let command = || {
        let mut command = disk.command();
        command.env("NIX_STATE_DIR", &state).env_remove("NIX_REMOTE").args(["--store", &store]);
        command
    };
    let path = run(command().args(["--add", "big"]), b"");
    assert_eq!(path.status, Some(0), "{path:?}");
    let stream = crate::house::output(command().arg("--export").arg(path.stdout.trim()), b"");
    assert!(stream.status.success(), "{stream:?}");
    stream.stdout
}

/// Runs a command to its end and gives its peak of resident memory in MiB, as far as it was seen.
fn peak_mib(command: &mut Command) -> u64 {
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let status = PathBuf::from(format!("/proc/{}/status", child.id()));
    let mut peak_kib = 0;
    loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let now = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
        peak_kib = peak_kib.max(now.unwrap_or(0));
        if let Some(status) = child.try_wait().unwrap() {
            let output = child.wait_with_output().unwrap();
            assert!(status.success(), "{status}: {}", String::from_utf8_lossy(&output.stderr));
            return peak_kib / 1024;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn memory_is_the_same_whatever_the_size() {
    let house = House::new();
    // Far larger than the limit, of which nothing lies on the disk; and a folder of many names.
    let tree = house.work().join("tree");
    std::fs::create_dir_all(tree.join("many")).unwrap();
    File::create(tree.join("sparse")).unwrap().set_len(100 << 20).unwrap();
    for n in 0..3000 {
        std::fs::write(tree.join(format!("many/a rather long name of a file {n}")), "x").unwrap();
    }
    let (nar, exported) = (house.work().join("nar"), house.work().join("exported"));
    let command = |words: &[&str]| {
        let mut command = house.applet("nix-store");
        command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
        command
    };
    let check = |what: &str, command: &mut Command| {
        let peak = peak_mib(command);
        println!("{what}: {peak} MiB");
        assert!(peak < MOST_MIB, "{what} took {peak} MiB");
    };
    check("--dump", command(&["--dump", "tree"]).stdout(File::create(&nar).unwrap()));
    check("--restore", command(&["--restore", "restored"]).stdin(File::open(&nar).unwrap()));
    std::fs::remove_file(&nar).unwrap();
    std::fs::remove_dir_all(house.work().join("restored")).unwrap();
    check("--add", &mut command(&["--add", "tree"]));
    let path = house.words("nix-store", "--add tree").stdout.trim().to_owned();
    check("--export", command(&["--export", &path]).stdout(File::create(&exported).unwrap()));
    assert_eq!(house.run("nix-store", ["--delete", &path]).status, Some(0));
    check("--import", command(&["--import"]).stdin(File::open(&exported).unwrap()));
    check("--verify", &mut command(&["--verify", "--check-contents"]));
}
