//! Builders that mean harm.

use std::process::{Command, Stdio};

use larder_sandbox::launch::{Ended, kill_user};
use larder_sandbox::plan::{Bind, Limit, Resource};

use crate::house::{
    BUILD_GID, BUILD_UID, House, Killed, descendants, is_alive, is_root, launcher, log_of, log_until, root_of, run,
    start,
};
use crate::twice::has;

/// Everything that would change the outside, or get there, is refused.
#[test]
fn there_is_no_way_out() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let mut plans = vec![house.probe_plan(&probe, &["escape"])];
    if is_root() {
        let mut plan = house.probe_plan(&probe, &["escape"]);
        root_of(&mut plan).user_namespace = None;
        plans.push(plan);
        // Root itself, but only within a user namespace.
        let mut plan = house.probe_plan(&probe, &["escape"]);
        plan.ids = None;
        root_of(&mut plan).binds.retain(|b| b.target != std::path::Path::new("/build"));
        root_of(&mut plan).binds.push(Bind::writable(house.top.path(), "/build"));
        plans.push(plan);
    }
    for plan in plans {
        let (ended, log) = run(&plan);
        assert_eq!(ended, Ended::Exited(0), "{log}");
        let results: Vec<(&str, &str)> = log.lines().map(|l| l.split_once(' ').unwrap()).collect();
        assert_eq!(results.len(), 17, "{log}");
        for (name, result) in results {
            // Signals to process 1 of a namespace are taken, and do nothing.
            let harmless = matches!(name, "kill-reaper" | "still-here");
            let allowed = if harmless { &["ok"][..] } else { &["EPERM", "EACCES", "EROFS", "EINVAL", "ENOENT"][..] };
            assert!(allowed.contains(&result), "{name} {result} in\n{log}");
        }
    }
    assert_ne!(std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), "x\n");
}

/// Two builds with the host's network cannot meet on an abstract socket (CVE-2024-27297).
#[test]
fn no_descriptors_from_one_fixed_output_build_to_another() {
    if !larder_sandbox::support::support(&launcher()).is_ok_and(|s| s.landlock >= 6) {
        eprintln!("skipped: this kernel has no scopes");
        return;
    }
    for scoped in [true, false] {
        let house = House::new();
        let Some(probe) = house.probe() else { return };
        let name = format!("larder-test-{}-{scoped}", std::process::id());
        let plan = |word: &str| {
            let mut plan = house.probe_plan(&probe, &[word, &name]);
            root_of(&mut plan).private_network = false;
            plan.scope.abstract_sockets = scoped;
            plan
        };
        let mut taker = start(&plan("take-fd"));
        log_until(&mut taker, "listening ok");
        let log = log_of(&plan("give-fd"));
        if scoped {
            assert_eq!(log, "connect EPERM\n");
        } else {
            // So it is the scope that keeps them apart.
            assert_eq!(log, "connect ok\nsend ok\n");
            log_until(&mut taker, "received ok");
        }
    }
}

/// Without a sandbox, too, a builder signals only what it has started.
#[test]
fn processes_outside_are_not_signalled() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let bystander = if is_root() {
        if !has("setpriv") {
            return;
        }
        let ids = [format!("--reuid={BUILD_UID}"), format!("--regid={BUILD_GID}")];
        Command::new("setpriv").args(ids).args(["--clear-groups", "sleep", "1000"]).spawn().unwrap()
    } else {
        Command::new("sleep").arg("1000").spawn().unwrap()
    };
    let mut bystander = Killed(bystander);
    let pid = bystander.0.id().to_string();
    let (_, log) = run(&house.probe_plan(&probe, &["kill", &pid, "kill-all"]));
    assert!(log.starts_with("kill ESRCH\n"), "{log}");
    if larder_sandbox::support::support(&launcher()).is_ok_and(|s| s.landlock >= 6) {
        let mut plain = house.plain("");
        plain.program = probe;
        plain.argv = ["probe", "kill", &pid].map(Into::into).to_vec();
        assert_eq!(run(&plain).1, "kill EPERM\n");
    }
    assert!(bystander.0.try_wait().unwrap().is_none(), "it lives");
}

/// What a build without a sandbox has left behind goes when it is over.
#[test]
fn nothing_is_left_of_a_build_without_a_sandbox() {
    let house = House::new();
    let script = "setsid sleep 1001 >/dev/null 2>&1 & \
        (setsid sh -c 'sleep 1002 & sleep 1003' >/dev/null 2>&1 &); until test -e go; do sleep 0.1; done";
    let mut child = start(&house.plain(script));
    let is_sleeper = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.starts_with("sleep\x00100"))
    };
    let mut left = Vec::new();
    while left.len() < 3 {
        assert!(is_alive(child.id()));
        std::thread::sleep(std::time::Duration::from_millis(10));
        left = descendants(child.id()).into_iter().filter(is_sleeper).collect();
    }
    std::fs::write(house.build.join("go"), "").unwrap();
    assert!(std::io::read_to_string(child.log()).unwrap().is_empty());
    let ended = child.finish(std::time::Duration::from_mins(1)).unwrap();
    assert_eq!(ended, Ended::Exited(0));
    assert!(!left.iter().any(|pid| is_alive(*pid)), "{left:?}");
}

/// A limit of processes ends a fork bomb, whose end leaves nothing.
#[test]
fn fork_bombs_are_bounded_by_the_limit() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let mut plan = house.probe_plan(&probe, &["bomb"]);
    if is_root() {
        // A user of its own: the limit counts all its processes.
        plan.ids.as_mut().unwrap().uid = BUILD_UID + 100;
        std::os::unix::fs::chown(&house.build, Some(BUILD_UID + 100), None).unwrap();
    }
    plan.limits.push(Limit { resource: Resource::Processes, soft: Some(50), hard: Some(50) });
    let log = log_of(&plan);
    let words: Vec<&str> = log.split_whitespace().collect();
    assert_eq!((words[0], words[2]), ("started", "EAGAIN"), "{log}");
    assert!(words[1].parse::<u32>().unwrap() < 50, "{log}");
}

/// A control group that goes with the value.
struct Group(String);

impl Drop for Group {
    fn drop(&mut self) {
        // What was killed a moment ago may still be listed.
        let start = std::time::Instant::now();
        while std::fs::remove_dir(&self.0).is_err() && start.elapsed() < std::time::Duration::from_secs(10) {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

/// So does a control group.
#[test]
fn fork_bombs_are_bounded_by_a_control_group() {
    if !is_root() {
        return;
    }
    let hierarchies = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
    let group = hierarchies.iter().find_map(|dir| {
        let group = format!("{dir}/larder-test-{}", std::process::id());
        std::fs::create_dir(&group).ok()?;
        if std::fs::write(format!("{group}/pids.max"), "30").is_ok() {
            return Some(Group(group));
        }
        std::fs::remove_dir(&group).unwrap();
        None
    });
    let Some(group) = group else {
        eprintln!("skipped: no control group of ours can count processes");
        return;
    };
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let mut plan = house.probe_plan(&probe, &["bomb"]);
    plan.cgroups = vec![group.0.clone().into()];
    let log = log_of(&plan);
    let words: Vec<&str> = log.split_whitespace().collect();
    assert_eq!((words[0], words[2]), ("started", "EAGAIN"), "{log}");
    assert!(words[1].parse::<u32>().unwrap() < 30, "{log}");
}

/// All processes of a user, also such as would rather not; and nobody else's.
#[test]
fn all_processes_of_a_user_are_killed() {
    if !is_root() || !has("setpriv") {
        return;
    }
    let uid = BUILD_UID + 101;
    let start = |uid: u32, script: &str| {
        let ids = [format!("--reuid={uid}"), format!("--regid={BUILD_GID}"), "--clear-groups".into()];
        let mut command = Command::new("setpriv");
        Killed(command.args(ids).args(["sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap())
    };
    let stubborn = "trap '' TERM HUP INT; echo; while :; do sleep 1000; done";
    let mut ours: Vec<_> = (0..3).map(|_| start(uid, stubborn)).collect();
    let mut other = start(uid + 1, stubborn);
    for child in ours.iter_mut().chain([&mut other]) {
        // It has become who it is when it says so.
        let mut byte = [0];
        std::io::Read::read_exact(child.0.stdout.as_mut().unwrap(), &mut byte).unwrap();
    }
    kill_user(uid, &launcher()).unwrap();
    for child in &ours {
        assert!(!is_alive(child.0.id()));
    }
    kill_user(uid, &launcher()).unwrap();
    assert!(is_alive(other.0.id()));
    kill_user(uid + 1, &launcher()).unwrap();
    assert!(!is_alive(other.0.id()));
    assert!(kill_user(0, &launcher()).is_err());
}

/// Several may be at killing, each the processes of another user.
#[test]
fn killers_do_not_kill_each_other() {
    if !is_root() {
        return;
    }
    std::thread::scope(|scope| {
        for n in 0..8 {
            scope.spawn(move || {
                for _ in 0..20 {
                    kill_user(BUILD_UID + 110 + n, &launcher()).unwrap();
                }
            });
        }
    });
}
