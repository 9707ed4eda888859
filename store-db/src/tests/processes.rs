//! Many processes at one ledger. The test program runs itself anew for each.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::store_path::{Name, StorePath};

use super::{batch, house, info, path, set, soak_s};
use crate::{DbError, Mode, OpenOptions, ReadTxn, StoreDb};

/// What a child is to do.
const ROLE: &str = "LARDER_TEST_ROLE";
const DIR: &str = "LARDER_TEST_DIR";
const NUMBER: &str = "LARDER_TEST_NUMBER";
const TIME: &str = "LARDER_TEST_TIME_MS";

fn spawn(program: &Path, role: &str, dir: &Path, number: u32, time: Duration) -> Command {
    let mut command = Command::new(program);
    command.args(["--exact", "tests::processes::child", "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env(DIR, dir).env(NUMBER, number.to_string()).env(TIME, time.as_millis().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

fn start(role: &str, dir: &Path, number: u32, time: Duration) -> Child {
    spawn(&std::env::current_exe().unwrap(), role, dir, number, time).spawn().unwrap()
}

/// Waits for a child that must succeed; what it said.
fn finish(mut child: Child) -> String {
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}: {said}");
    said
}

/// The children's own program. Does nothing in an ordinary run of the tests.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let dir = std::env::var(DIR).unwrap();
    let dir = Path::new(&dir);
    let number: u32 = std::env::var(NUMBER).unwrap().parse().unwrap();
    let end = Instant::now() + Duration::from_millis(std::env::var(TIME).unwrap().parse().unwrap());
    match role.as_str() {
        "mixed" => mixed(dir, number, end),
        "fresh" => fresh(dir, number),
        "reader of twins" => read_twins(dir, end),
        "writer of twins" => write_twins(dir, end),
        "query" => query(dir),
        "writer" => write_on(dir, number, end),
        "nobody" => nobody(dir),
        other => panic!("no role {other}"),
    }
}

fn existing(dir: &Path) -> StoreDb {
    StoreDb::open(dir, &OpenOptions::new(Mode::Existing)).unwrap()
}

/// A path that belongs to one process.
fn own(number: u32, turn: u32) -> StorePath {
    let digest = Sha256Digest::of(&[number.to_le_bytes(), turn.to_le_bytes()].concat());
    let hash_part = HashPart::from_bytes(*digest.as_bytes().first_chunk().unwrap());
    StorePath::new(hash_part, Name::new(&format!("own-{number}-{turn}")).unwrap())
}

/// Registers, asks and invalidates in turn; nobody else touches its paths, so it knows the answers.
fn mixed(dir: &Path, number: u32, end: Instant) {
    let options = OpenOptions { keeps_snapshots: number % 2 == 1, ..OpenOptions::new(Mode::Existing) };
    let db = StoreDb::open(dir, &options).unwrap();
    let hub = path(1, "hub");
    let reads_a_write = std::env::var("LARDER_TEST_READS").map_or(6, |n| n.parse().unwrap());
    let (mut writes, mut reads, mut turn) = (0u32, 0u32, 0);
    let mut waits = Vec::new();
    let mut slowest_read = Duration::ZERO;
    let mut write = |f: &dyn Fn() -> Result<(), DbError>| {
        let start = Instant::now();
        f().unwrap();
        waits.push(start.elapsed());
        writes += 1;
    };
    while Instant::now() < end {
        let (a, b) = (own(number, turn), own(number, turn + 1));
        turn += 2;
        write(&|| db.register(batch(&[info(&a, &[&hub]), info(&b, &[&a, &b])])));
        for _ in 0..reads_a_write {
            let start = Instant::now();
            db.read(|r| {
                // What is finished is seen at once, here and by a handle opened just now.
                assert_eq!(r.info(&b)?.unwrap().references, set([&a, &b]));
                assert_eq!(r.referrers(&a)?.unwrap(), std::slice::from_ref(&b));
                assert!(r.is_valid(&hub)?);
                Ok::<_, DbError>(())
            })
            .unwrap();
            slowest_read = slowest_read.max(start.elapsed());
            reads += 1;
        }
        if turn % 8 == 0 {
            let other = StoreDb::open(dir, &OpenOptions::new(Mode::Existing)).unwrap();
            assert!(other.read(|r| r.is_valid(&b)).unwrap(), "a change that was finished is not seen");
        }
        write(&|| db.write(|w| w.invalidate(&set([&a, &b])).map(|n| assert_eq!(n, 2))));
        assert!(!db.read(|r| r.is_valid(&b)).unwrap(), "a deletion that was finished is not seen");
    }
    db.close().unwrap();
    waits.sort();
    let p99 = waits.get(waits.len() * 99 / 100).copied().unwrap_or_default();
    println!(
        "DONE {writes} {reads} {} {} {}",
        waits.last().map_or(0, Duration::as_millis),
        p99.as_millis(),
        slowest_read.as_millis()
    );
}

/// Writes, reads and the slowest of each in ms, of a `mixed` child.
fn figures(said: &str) -> Option<[u64; 5]> {
    let line = said.lines().find_map(|line| line.split("DONE ").nth(1))?;
    let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
    numbers.try_into().ok()
}

/// Many processes register, ask and invalidate at once, and some are killed at it.
#[test]
fn s044_many_processes_at_once_see_no_error() {
    let (dir, db) = house();
    db.register(batch(&[info(&path(1, "hub"), &[])])).unwrap();
    let count: u32 =
        std::env::var("LARDER_TEST_PROCS").map_or(if soak_s().is_some() { 64 } else { 24 }, |n| n.parse().unwrap());
    let time = soak_s().map_or(Duration::from_secs(4), Duration::from_secs);
    let kill = std::env::var_os("LARDER_TEST_NO_KILL").is_none();
    let mut children: Vec<Child> = (0..count).map(|n| start("mixed", dir.path(), n, time)).collect();
    // Every fourth is killed along the way.
    let mut killed = Vec::new();
    if kill {
        for n in 0..children.len() / 4 {
            std::thread::sleep(time / (count / 4 + 2));
            let mut child = children.remove(n * 3);
            child.kill().unwrap();
            child.wait().unwrap();
            killed.push(child.id());
        }
    }
    let all: Vec<[u64; 5]> = children.into_iter().map(|child| figures(&finish(child)).unwrap()).collect();
    let sum = |k: usize| all.iter().map(|f| f[k]).sum::<u64>();
    let (least, most) = (all.iter().map(|f| f[0]).min().unwrap(), all.iter().map(|f| f[0]).max().unwrap());
    let worst = |k: usize| all.iter().map(|f| f[k]).max().unwrap();
    println!(
        "{} writes ({least} to {most} a process), {} reads, slowest write {} ms (p99 {} ms), slowest read {} ms, {} killed",
        sum(0),
        sum(1),
        worst(2),
        worst(3),
        worst(4),
        killed.len()
    );
    assert!(least > 0, "a process was starved");
    // What is left is the hub and whole pairs of processes that were killed.
    assert_eq!(db.check().unwrap(), []);
    let left = db.read(ReadTxn::count).unwrap();
    assert!(left % 2 == 1 && left <= 1 + 2 * killed.len() as u64, "{left} paths are left");
}

fn fresh(dir: &Path, number: u32) {
    let db = StoreDb::open(dir, &OpenOptions::new(Mode::Create)).unwrap();
    let own = own(number, 0);
    db.register(batch(&[info(&own, &[])])).unwrap();
    assert!(db.read(|r| r.is_valid(&own)).unwrap());
}

#[test]
fn many_processes_make_one_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let children: Vec<Child> = (0..64).map(|n| start("fresh", dir.path(), n, Duration::ZERO)).collect();
    for child in children {
        finish(child);
    }
    let db = existing(dir.path());
    assert_eq!(db.read(ReadTxn::count).unwrap(), 64);
    assert_eq!(db.check().unwrap(), []);
    let names: BTreeSet<String> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(names, BTreeSet::from(["larder.lock".to_owned(), "larder.redb".to_owned()]));
}

/// Two paths with one hash part, which are never valid at once, and what they refer to.
fn twins() -> [(StorePath, StorePath); 2] {
    [(path(5, "one"), path(6, "of-one")), (path(5, "two"), path(7, "of-two"))]
}

fn write_twins(dir: &Path, end: Instant) {
    let db = existing(dir);
    while Instant::now() < end {
        for (twin, reference) in twins() {
            db.register(batch(&[info(&twin, &[&reference]), info(&reference, &[])])).unwrap();
            db.write(|w| w.invalidate(&set([&twin, &reference]))).unwrap();
        }
    }
}

fn read_twins(dir: &Path, end: Instant) {
    let db = existing(dir);
    let mut seen = [0; 2];
    while Instant::now() < end {
        for (n, (twin, reference)) in twins().into_iter().enumerate() {
            if let Some(references) = db.read(|r| r.references(&twin)).unwrap() {
                assert_eq!(references, std::slice::from_ref(&reference));
                seen[n] += 1;
            }
            // Each question is answered from its own moment: gone, or the right answer.
            let referrers = db.read(|r| r.referrers(&reference)).unwrap();
            assert!(referrers.is_none_or(|r| r == [twin.clone()]));
            let info = db.read(|r| r.info(&twin)).unwrap();
            assert!(info.is_none_or(|info| info.path == twin && info.references == set([&reference])));
        }
    }
    println!("DONE {} {} 0 0 0", seen[0], seen[1]);
}

#[test]
fn s043_a_path_that_goes_between_queries_is_not_taken_for_another() {
    let (dir, _db) = house();
    let time = soak_s().map_or(Duration::from_secs(2), Duration::from_secs);
    let writer = start("writer of twins", dir.path(), 0, time);
    let readers: Vec<Child> = (1..4).map(|n| start("reader of twins", dir.path(), n, time)).collect();
    finish(writer);
    let mut seen = 0;
    for reader in readers {
        let [one, two, ..] = figures(&finish(reader)).unwrap();
        seen += one.min(two);
    }
    assert!(seen > 0, "the readers never met the paths");
}

fn query(dir: &Path) {
    let db = StoreDb::open(dir, &OpenOptions::new(Mode::ReadOnly)).unwrap();
    let valid = db.read(ReadTxn::count).unwrap();
    println!("DONE {valid} 0 0 0 0");
}

#[test]
fn readers_do_not_wait_for_an_open_transaction() {
    let (dir, db) = house();
    db.register(batch(&[info(&path(1, "a"), &[])])).unwrap();
    let other = existing(dir.path());
    db.write(|w| {
        w.register(batch(&[info(&path(2, "b"), &[])]))?;
        // Another process, another handle and this very handle see what was there before.
        let said = finish(start("query", dir.path(), 0, Duration::ZERO));
        assert_eq!(figures(&said).unwrap()[0], 1);
        assert_eq!(other.read(ReadTxn::count)?, 1);
        assert_eq!(db.read(ReadTxn::count)?, 1);
        Ok::<_, DbError>(())
    })
    .unwrap();
    assert_eq!(other.read(ReadTxn::count).unwrap(), 2);
    assert_eq!(figures(&finish(start("query", dir.path(), 0, Duration::ZERO))).unwrap()[0], 2);
}

fn write_on(dir: &Path, number: u32, end: Instant) {
    let db = existing(dir);
    for turn in 0.. {
        db.register(batch(&[info(&own(number, turn), &[&path(1, "hub")])])).unwrap();
        if Instant::now() > end {
            break;
        }
    }
}

/// After `kill -9` in the middle of writing, the next one recovers without being asked.
#[test]
fn a_killed_writer_is_recovered_from() {
    let (dir, db) = house();
    db.register(batch(&[info(&path(1, "hub"), &[])])).unwrap();
    db.close().unwrap();
    let mut needed = 0;
    for round in 0..12 {
        let mut child = start("writer", dir.path(), round, Duration::from_mins(1));
        std::thread::sleep(Duration::from_millis(60 + u64::from(round) * 17));
        child.kill().unwrap();
        child.wait().unwrap();
        // One who may not write says so and does no harm...
        match StoreDb::open(dir.path(), &OpenOptions::new(Mode::ReadOnly)).unwrap().read(ReadTxn::count) {
            Ok(_) => {}
            Err(DbError::NeedsRecovery { .. }) => needed += 1,
            Err(error) => panic!("{error:?}"),
        }
        // ... and one who may recovers, even by a mere question.
        let db = existing(dir.path());
        assert!(db.read(ReadTxn::count).unwrap() > 0);
        assert_eq!(db.check().unwrap(), []);
        let db = StoreDb::open(dir.path(), &OpenOptions::new(Mode::ReadOnly)).unwrap();
        assert!(db.read(ReadTxn::count).unwrap() > 0);
    }
    println!("recovery was needed {needed} times");
}

fn nobody(dir: &Path) {
    let db = existing(dir);
    assert_eq!(db.read(ReadTxn::count).unwrap(), 1);
    let error = db.write(|w| w.set_meta("x", b"y")).unwrap_err();
    assert!(matches!(error, DbError::Permission { .. }), "{error:?}");
    println!("DONE 1 0 0 0 0");
}

/// One who may only read the file can ask, and is told why writing fails.
#[test]
fn reading_needs_no_permission_to_write() {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::process::CommandExt as _;

    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can become somebody else");
        return;
    }
    let (dir, db) = house();
    db.register(batch(&[info(&path(1, "a"), &[])])).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // A copy of this program that others may run.
    let program = dir.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let run = || {
        let mut command = spawn(&program, "nobody", dir.path(), 0, Duration::ZERO);
        command.uid(65534).gid(65534).stderr(Stdio::piped());
        command.output().unwrap()
    };
    let output = run();
    assert!(output.status.success(), "{output:?}");
    // Beside a writer that has the file open, and after it; then without permission to read.
    db.close().unwrap();
    assert!(run().status.success());
    fs::set_permissions(dir.path().join("larder.redb"), fs::Permissions::from_mode(0o600)).unwrap();
    let output = run();
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("Permission {"), "{text}");
}
