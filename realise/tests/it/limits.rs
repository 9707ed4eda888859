//! Limits, logs, and what ends a build early.

use std::io::Read as _;
use std::sync::atomic::Ordering;

use larder_core::settings::Sandbox;
use larder_realise::job::{FailureKind, Mode, Outcome};
use larder_realise::logs;

use crate::house::{House, WAYS, recipe};

#[test]
fn s026_endless_logs_are_ended() {
    for way in WAYS {
        let house = House::with(way, |values| values.max_build_log_size = 1000);
        std::thread::scope(|scope| {
            for n in 0..3 {
                let house = &house;
                scope.spawn(move || {
                    let spam = recipe(&format!("spam{n}"), "while true; do echo spam spam spam; done");
                    match house.run(&spam, Mode::Normal) {
                        Outcome::Failed(failure) => {
                            assert_eq!(failure.kind, FailureKind::LogLimitExceeded);
                            let goal = house.store.dir().full(&house.derivation(&spam).0) + "!*";
                            let text = format!(
                                "building of '{goal}' from .drv file killed after writing more than 1000 bytes of log output"
                            );
                            assert_eq!(failure.text, text);
                        }
                        other => panic!("{other:?}"),
                    }
                });
            }
        });
        house.check_nothing_left();
    }
}

#[test]
fn s059_timeouts() {
    for way in WAYS {
        let mut house = House::with(way, |values| values.timeout = 1);
        let noisy = recipe("noisy", "while true; do echo .; sleep 0.1; done");
        let text = "building of '{drv}!*' from .drv file timed out after 1 seconds";
        house.fails(&noisy, Mode::Normal, FailureKind::TimedOut, text);
        house.values().timeout = 0;
        house.values().max_silent_time = 1;
        let silent = recipe("silent", "sleep 1000 & echo x; exec >&- 2>&-; wait");
        let text = "building of '{drv}!*' from .drv file timed out after 1 seconds of silence";
        house.fails(&silent, Mode::Normal, FailureKind::TimedOut, text);
        house.values().max_silent_time = 1000;
        house.seen.cancelled.store(true, Ordering::Relaxed);
        house.fails(&silent, Mode::Normal, FailureKind::Cancelled, "build of '{drv}' was cancelled");
    }
}

/// A builder that closes its output is waited for, and not failed for it.
#[test]
fn closed_output_is_not_the_end() {
    for way in WAYS {
        let house = House::new(way);
        let out = house.build(&recipe("x", "exec >&- 2>&-; sleep 1.3; echo late > $out"));
        assert_eq!(house.text(&out), "late\n");
        house.fails(
            &recipe("y", "exec >&- 2>&-; sleep 0.3; exit 7"),
            Mode::Normal,
            FailureKind::Permanent,
            "builder for '{drv}' failed with exit code 7",
        );
    }
}

#[test]
fn s006_s066_logs_are_stored() {
    for compress in [true, false] {
        let house = House::with(Sandbox::On, |values| values.compress_build_log = compress);
        let noisy = recipe("x", r"printf '\033[3pX \033[31mY\r\n'; seq 3; echo end > $out");
        house.build(&noisy);
        let drv = house.derivation(&noisy).0;
        let mut log = logs::open(house.store.layout(), &drv).unwrap().unwrap();
        assert_eq!(log.path.extension().is_some_and(|ext| ext == "bz2"), compress);
        let mut text = Vec::new();
        log.read_to_end(&mut text).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), "\x1b[3pX \x1b[31mY\r\n1\n2\n3\n");
    }
    let house = House::with(Sandbox::On, |values| values.keep_build_log = false);
    let quiet = recipe("x", "echo x; echo end > $out");
    house.build(&quiet);
    assert!(logs::open(house.store.layout(), &house.derivation(&quiet).0).unwrap().is_none());
}

#[test]
fn failed_directories_are_kept_if_wanted() {
    for way in WAYS {
        let house = House::with(way, |values| values.keep_failed = true);
        let job = house.job(&recipe("x", "echo made > f; exit 1"), Mode::Normal);
        let outcome = larder_realise::build::run(&house.store, &house.settings, &job, &house.seen);
        assert!(matches!(outcome, Outcome::Failed(_)));
        let name = format!("nix-build-{}-0", job.drv_path.name());
        let kept = house.path("tmp").join(name);
        assert_eq!(std::fs::read_to_string(kept.join("build/f")).unwrap(), "made\n");
        assert!(house.said().contains(&format!("note: keeping build directory '{}'\n", kept.display())));
    }
}

#[test]
fn locks_and_users_that_others_have() {
    use larder_fs::lock_file::Wait;
    use larder_fs::path_lock::PathLocks;
    let house = House::new(Sandbox::On);
    let x = recipe("x", "echo x > $out");
    let (_, drv) = house.derivation(&x);
    let path = house.real(drv.output_paths().next().unwrap().1.unwrap());
    let held = PathLocks::acquire([&path], &house.store.options().held_locks, Wait::No).unwrap();
    match house.run(&x, Mode::Normal) {
        Outcome::Locked { path: told } => assert_eq!(told, path),
        other => panic!("{other:?}"),
    }
    drop(held);
    if crate::house::is_root() {
        let pool = house.store.layout().user_pool();
        std::fs::create_dir_all(&pool).unwrap();
        let locks: Vec<_> = (0..4)
            .map(|n| {
                let file = larder_fs::lock_file::LockFile::open(&pool.join((house.first_uid + n).to_string())).unwrap();
                assert!(file.lock(larder_fs::lock_file::Sharing::Exclusive, &mut Wait::No).unwrap());
                file
            })
            .collect();
        assert!(matches!(house.run(&x, Mode::Normal), Outcome::NoBuildUser));
        drop(locks);
    }
    house.build(&x);
}

/// Several threads build at once, each with a user of its own.
#[test]
fn builds_side_by_side() {
    let house = House::new(Sandbox::On);
    std::thread::scope(|scope| {
        for n in 0..4 {
            let house = &house;
            scope.spawn(move || {
                for k in 0..3 {
                    let one = recipe(&format!("x{n}-{k}"), "id -u > $out; sleep 0.05");
                    assert!(matches!(house.run(&one, Mode::Normal), Outcome::Built { .. }));
                }
            });
        }
    });
    house.check_nothing_left();
}

/// Not a test: `cargo test --release -- --ignored --nocapture speed` prints what builds cost.
#[test]
#[ignore = "a measurement"]
fn speed() {
    for way in WAYS {
        let house = House::new(way);
        let begun = std::time::Instant::now();
        let count = std::env::var("BUILDS").map_or(100, |count| count.parse().unwrap());
        for n in 0..count {
            house.build(&recipe(&format!("x{n}"), "echo > $out"));
        }
        println!("{way:?}: {:?} a build", begun.elapsed() / count);
    }
}
