//! The process from which launchers are forked.

use larder_sandbox::launch::{Child, Ended, launch};
use larder_sandbox::plan::Plan;
use rustix::process::{Pid, Signal, kill_process};

use crate::house::{House, is_alive, launcher, log_until, until_gone};

/// A builder that ends once this file is there.
const WAITS: &str = "echo ready; while [ ! -e go ]; do sleep 0.01; done; exit 7";

fn parent(child: &Child) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}

#[test]
fn one_is_executed_for_all_and_ends_with_them() {
    let house = House::new();
    let launcher = launcher();
    let plans = [house.plan(WAITS), house.plain(WAITS), house.plan(WAITS)];
    let mut children: Vec<Child> = plans.iter().map(|plan| launch(plan, &launcher.clone()).unwrap()).collect();
    for child in &mut children {
        log_until(child, "ready");
    }
    let zygote = parent(&children[0]);
    assert!(zygote != std::process::id() && children.iter().all(|child| parent(child) == zygote));
    // It has nothing of theirs.
    let open = std::fs::read_dir(format!("/proc/{zygote}/fd")).unwrap().count();
    assert!(open <= 6, "{open}");
    drop(launcher);
    assert!(is_alive(zygote), "builders run");
    std::fs::write(house.build.join("go"), "").unwrap();
    for mut child in children {
        assert_eq!(child.wait().unwrap(), Ended::Exited(7));
    }
    until_gone(&[zygote]);
}

/// A filter cannot be taken off, so a builder that is to have none comes from another.
#[test]
fn with_the_filter_and_without() {
    const SCRIPT: &str = "grep Seccomp: /proc/self/status; echo end; while [ ! -e go ]; do sleep 0.01; done";
    let launcher = launcher();
    let said = |filter_syscalls: bool, is_sandboxed: bool| {
        let house = House::new();
        let plan = if is_sandboxed { house.plan(SCRIPT) } else { house.plain(SCRIPT) };
        let mut child = launch(&Plan { filter_syscalls, ..plan }, &launcher).unwrap();
        let said = log_until(&mut child, "end");
        let parent = parent(&child);
        std::fs::write(house.build.join("go"), "").unwrap();
        assert_eq!(child.wait().unwrap(), Ended::Exited(0));
        (said, parent)
    };
    let [with, without] = [true, false].map(|filter| said(filter, true));
    assert!(with.0.contains("Seccomp:\t2"), "{with:?}");
    assert!(without.0.contains("Seccomp:\t0"), "{without:?}");
    assert_ne!(with.1, without.1);
    for is_sandboxed in [true, false] {
        assert_eq!(said(true, is_sandboxed), with);
        assert_eq!(said(false, is_sandboxed), without);
    }
}

/// Those that run go on, and the next has another parent.
#[test]
fn one_that_is_killed_is_followed_by_another() {
    let house = House::new();
    let launcher = launcher();
    let mut first = launch(&house.plan(WAITS), &launcher).unwrap();
    log_until(&mut first, "ready");
    let killed = parent(&first);
    kill_process(Pid::from_raw(i32::try_from(killed).unwrap()).unwrap(), Signal::KILL).unwrap();
    let mut second = launch(&house.plan(WAITS), &launcher).unwrap();
    log_until(&mut second, "ready");
    assert_ne!(parent(&second), killed);
    std::fs::write(house.build.join("go"), "").unwrap();
    assert_eq!(first.wait().unwrap(), Ended::Exited(7));
    assert_eq!(second.wait().unwrap(), Ended::Exited(7));
}

/// Many at once, some of which are killed and some of which cannot start.
#[test]
fn each_request_gets_its_own_answer() {
    let house = House::new();
    let launcher = launcher();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (house, launcher) = (&house, &launcher);
            let plan = house.plain(&format!("echo {number}; exit {number}"));
            scope.spawn(move || {
                for turn in 0..10 {
                    if (number + turn) % 5 == 0 {
                        let mut plan = plan.clone();
                        plan.cwd = format!("/nowhere-{number}").into();
                        let error = launch(&plan, launcher).unwrap_err().to_string();
                        assert!(error.contains(&format!("'/nowhere-{number}'")), "{error}");
                        continue;
                    }
                    let mut child = launch(&plan, launcher).unwrap();
                    log_until(&mut child, &number.to_string());
                    assert_eq!(child.wait().unwrap(), Ended::Exited(number));
                }
            });
        }
    });
}
