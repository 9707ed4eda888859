//! What every builder can rely on.

use std::time::Duration;

use larder_sandbox::launch::{Ended, LaunchError, launch};
use larder_sandbox::plan::PlanError;

use crate::house::{House, is_root, launcher, log_of, root_of, run, start};

#[test]
fn output_and_exit_codes_pass_through() {
    let house = House::new();
    for plan in [house.plan("echo out; echo err >&2; exit 7"), house.plain("echo out; echo err >&2; exit 7")] {
        assert_eq!(run(&plan), (Ended::Exited(7), "out\nerr\n".into()));
    }
    for plan in [house.plan("kill -TERM $$"), house.plain("kill -TERM $$")] {
        assert_eq!(run(&plan), (Ended::Signalled(15), String::new()));
    }
}

/// A builder that closes its output early is waited for, not killed.
#[test]
fn closed_output_is_not_the_end() {
    let house = House::new();
    for plan in [house.plan("exec >&- 2>&-; sleep 0.3; exit 3"), house.plain("exec >&- 2>&-; sleep 0.3; exit 3")] {
        assert_eq!(run(&plan), (Ended::Exited(3), String::new()));
    }
}

#[test]
fn another_user_needs_root() {
    if !is_root() {
        return;
    }
    let house = House::new();
    let mut plan = house.plan("true");
    plan.ids = None;
    root_of(&mut plan).user_namespace = None;
    let error = launch(&plan, &launcher()).unwrap_err();
    assert!(matches!(error, LaunchError::Plan(PlanError::Root)), "{error}");
}

#[test]
fn a_killed_builder_ends_at_once() {
    let house = House::new();
    for plan in [house.plan("sleep 1000 & sleep 1000"), house.plain("sleep 1000 & sleep 1000")] {
        let mut child = start(&plan);
        assert_eq!(child.wait_timeout(Duration::from_millis(10)).unwrap(), None);
        child.kill();
        assert_eq!(child.wait().unwrap(), Ended::Signalled(9));
    }
}

#[test]
fn s028_dev_is_a_fixed_minimal_set() {
    let house = House::new();
    let log = log_of(&house.plan("ls -1 /dev"));
    let found: Vec<&str> = log.split_whitespace().collect();
    let expected = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero";
    assert_eq!(found, expected.split(' ').collect::<Vec<_>>());
    let mut plan = house.plan("ls -1 /dev");
    root_of(&mut plan).dev = None;
    let (ended, _) = run(&plan);
    assert!(!ended.is_success(), "nothing makes /dev when none is asked for");
}
