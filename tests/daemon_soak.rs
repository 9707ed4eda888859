//! Many clients that build and add beside a collector: nothing leaks, and nothing is lost.
//!
//! A few seconds by default; `cargo xtask soak 1200` is the long form.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use larder_core::api::{BuildMode, BuildStatus, ContentMethod, NewContent, ReadStore as _, Store as _};
use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::nar::encoder;

use crate::house::{House, LARDER};
use crate::served::{Daemon, children, connect, shell, wait_for};

fn seconds() -> u64 {
    std::env::var("LARDER_SOAK_S").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

/// Open files of a process, without numbers that differ from one to the next.
fn files(pid: u32) -> Vec<String> {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let mut names: Vec<String> = open
        .filter_map(|entry| std::fs::read_link(entry.path()).ok())
        .map(|target| target.to_string_lossy().split('[').next().unwrap_or_default().to_owned())
        .collect();
    names.sort();
    names
}

fn rss_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

const CLIENTS: u64 = 32;

fn build_first(house: &House, daemon: &Daemon) {
    let (client, _, line) = connect(house, daemon, 38);
    let drv = shell(client.dir(), "first", "echo > $out");
    let built = client.build_derivation(&drv.path(client.dir()).unwrap(), &drv, BuildMode::Normal).unwrap();
    assert!(built.status.is_success(), "{built:?}");
    drop(line);
}

#[test]
fn many_clients_beside_a_collector() {
    // It takes trusted clients.
    if !crate::served::is_root() {
        return;
    }
    let house = House::new();
    let daemon = Daemon::start(&house, LARDER, "sandbox = false\nmax-jobs = 2\nbuild-poll-interval = 1");
    // The ledger stays open from the first question on.
    house.write("f", "x");
    assert_eq!(house.words("nix-store", "--add f --store daemon").status, Some(0));
    // So does the line to the process from which launchers are forked, from the first build on.
    build_first(&house, &daemon);
    let pid = daemon.child.id();
    let mut files_before = Vec::new();
    wait_for("nobody is connected", || {
        let now = files(pid);
        let last = std::mem::replace(&mut files_before, now);
        files_before == last && !last.iter().any(|file| file.contains("/temproots/"))
    });
    let end = Instant::now() + Duration::from_secs(seconds());
    let (builds, adds, most_kib) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (house, daemon, builds, adds) = (&house, &daemon, &builds, &adds);
                scope.spawn(move || {
                    let mut turn = 0u64;
                    while Instant::now() < end {
                        turn += 1;
                        let (client, _, line) = connect(house, daemon, 38);
                        // Half of all builds are wanted by two clients.
                        let name = format!("built-{}-{turn}", number / 2);
                        let drv = shell(client.dir(), &name, "echo $name; echo x > $out");
                        let path = drv.path(client.dir()).unwrap();
                        if (number + turn).is_multiple_of(7) {
                            // Some leave in the middle.
                            let closing = std::thread::spawn(move || {
                                std::thread::sleep(Duration::from_millis(3));
                                drop(line.shutdown(std::net::Shutdown::Both));
                            });
                            let _ = client.build_derivation(&path, &drv, BuildMode::Normal);
                            closing.join().unwrap();
                            continue;
                        }
                        let result = client.build_derivation(&path, &drv, BuildMode::Normal).unwrap();
                        assert!(result.status.is_success(), "{result:?}");
                        builds.fetch_add(u64::from(result.status == BuildStatus::Built), Ordering::Relaxed);
                        // What was built is there while the connection is, whatever a collector does.
                        let out = drv.outputs.values().next().unwrap().path().unwrap();
                        assert!(client.is_valid(out).unwrap());
                        assert!(house.path().join("store").join(out.to_string()).exists());
                        let nar = encoder::file(format!("{number} {turn}").as_bytes(), false);
                        let new = NewContent {
                            name: "added".parse().unwrap(),
                            method: ContentMethod::Fixed(Method::Recursive, Algorithm::Sha256),
                            references: BTreeSet::new(),
                            is_nar: true,
                            repair: false,
                        };
                        let info = client.add_content(&new, &mut &nar[..]).unwrap();
                        let mut back = Vec::new();
                        client.nar(&info.path, &mut back).unwrap();
                        assert_eq!(back, nar);
                        adds.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let collector = scope.spawn(|| {
            let mut times = 0;
            while !over.load(Ordering::Relaxed) {
                let done = house.words("nix-store", "--gc --store daemon");
                assert_eq!(done.status, Some(0), "{done:?}");
                most_kib.fetch_max(rss_kib(pid), Ordering::Relaxed);
                times += 1;
                std::thread::sleep(Duration::from_millis(200));
            }
            times
        });
        let outcomes: Vec<_> = clients.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        over.store(true, Ordering::Relaxed);
        let times = collector.join().unwrap();
        for outcome in outcomes {
            outcome.unwrap();
        }
        println!("{builds:?} builds, {adds:?} adds, {times} collections, {most_kib:?} KiB at most");
    });
    assert!(builds.load(Ordering::Relaxed) > 0 && adds.load(Ordering::Relaxed) > 0);
    wait_for("nothing runs", || children(pid) == 0);
    wait_for("all files are closed", || {
        let mut more = files(pid);
        for file in &files_before {
            more.iter().position(|other| other == file).map(|at| more.remove(at));
        }
        more.is_empty()
    });
    wait_for("the temporary roots are gone", || {
        std::fs::read_dir(house.path().join("var/temproots")).map_or(0, Iterator::count) == 0
    });
    assert!(most_kib.load(Ordering::Relaxed) < 200 << 10, "{most_kib:?} KiB");
    let verified = house.words("nix-store", "--verify --check-contents --store daemon");
    assert_eq!(verified.status, Some(0), "{verified:?}");
    assert_eq!(daemon.stop(), Some(0));
}
