//! What builds leave on the host: nothing; and what the host may forbid.

use std::collections::HashSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use larder_sandbox::launch::{Ended, LaunchError, Launcher, launch};
use larder_sandbox::plan::Bind;
use larder_sandbox::support::support;

use crate::house::{
    House, Killed, descendants, host_binds, is_alive, is_root, launcher, log_of, log_until, root_of, start, try_run,
    until_gone,
};
use crate::twice::{AS_NOBODY, has, is_inner, run_inner};

/// With all mounts shared, as systemd has them, nothing shows outside.
#[test]
fn s089_mounts_do_not_leak_out() {
    const NAME: &str = "outside::s089_mounts_do_not_leak_out";
    if !is_inner(NAME) {
        if is_root() && has("unshare") {
            run_inner(NAME, &["unshare", "-m", "--propagation", "shared"]);
        }
        return;
    }
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    assert!(before.lines().any(|line| line.contains(" shared:")), "{before}");
    let house = House::new();
    for user_namespace in [true, false] {
        let mut plan =
            house.plan("grep -c . /proc/self/mountinfo; grep shared: /proc/self/mountinfo; echo ready; sleep 1000");
        if !user_namespace {
            root_of(&mut plan).user_namespace = None;
        }
        let mut child = start(&plan);
        let log = log_until(&mut child, "ready");
        assert_eq!(log.lines().count(), 2, "it has mounts, and none is shared: {log}");
        assert_eq!(mounts(), before);
        child.kill();
        child.wait().unwrap();
        assert_eq!(mounts(), before);
    }
    let left = |dir: &Path| std::fs::remove_dir_all(dir).unwrap();
    left(&house.root.borrow());
}

/// A kernel that shows a mount's flags as locked to an ordinary user, and one below the bind.
#[test]
fn flags_of_bound_mounts_stay() {
    const NAME: &str = "outside::flags_of_bound_mounts_stay";
    if !is_inner(NAME) {
        if is_root() && has("unshare") && has("setpriv") {
            let setup = "mount -t tmpfs -o nosuid,nodev,noexec,noatime,mode=1777 none /mnt && mkdir -m 777 /mnt/below && \
                mount -t tmpfs -o nosuid,nodev,mode=1777 none /mnt/below && exec \"$@\"";
            let unshare = ["unshare", "-m", "--propagation", "private", "sh", "-c", setup, "sh"];
            run_inner(NAME, &unshare);
            run_inner(NAME, &[&unshare[..], &AS_NOBODY[..]].concat());
        }
        return;
    }
    let house = House::new();
    let mut plan = house.plan("grep ' /mnt' /proc/self/mountinfo | cut -d' ' -f5,6; touch /mnt/x /mnt/below/x; test ! -e /mnt/x -a ! -e /mnt/below/x");
    root_of(&mut plan).binds.push(Bind::same("/mnt"));
    let log = log_of(&plan);
    assert!(log.contains("/mnt ro,nosuid,nodev,noexec,noatime\n"), "{log}");
    assert!(log.contains("/mnt/below ro,nosuid,nodev,relatime\n"), "{log}");
}

/// The build directory may be below one that only root can enter.
#[test]
fn directories_below_a_closed_one() {
    use std::os::unix::fs::PermissionsExt;
    let house = House::new();
    std::fs::set_permissions(house.top.path(), PermissionsExt::from_mode(0o700)).unwrap();
    assert_eq!(log_of(&house.plan("pwd; echo x > made; cat made")), "/build\nx\n");
    assert!(house.build.join("made").exists());
}

/// Many threads launch; see [`s004_s077_children_are_made_by_fork`].
#[test]
fn builders_from_many_threads() {
    let house = House::new();
    let plans: Vec<_> = (0..8).map(|n| house.plan_argv("/bin/true", &["true", &n.to_string()])).collect();
    std::thread::scope(|scope| {
        for plan in &plans {
            scope.spawn(|| {
                for round in 0..3 {
                    let mut plan = plan.clone();
                    if round > 0 {
                        // The root is there already.
                        let root = root_of(&mut plan);
                        root.dir =
                            root.dir.with_file_name(format!("{}-{round}", root.dir.file_name().unwrap().display()));
                        std::fs::create_dir(&root.dir).unwrap();
                    }
                    assert_eq!(log_of(&plan), "");
                }
            });
        }
    });
}

/// No vfork, nothing that shares memory with a parent, and no namespaces by a process with threads.
#[test]
fn s004_s077_children_are_made_by_fork() {
    if !is_root() || !has("strace") {
        return;
    }
    let trace = tempfile::NamedTempFile::new().unwrap();
    let path = trace.path().to_str().unwrap();
    let calls = "trace=clone,clone3,vfork,fork,unshare,execve,setns";
    run_inner("outside::builders_from_many_threads", &["strace", "-f", "-qq", "-o", path, "-e", calls]);
    let text = std::fs::read_to_string(trace.path()).unwrap();
    let mut threaded = HashSet::new();
    let (mut launchers, mut unshared) = (0, 0);
    for line in text.lines() {
        let (pid, call) = line.split_once(' ').unwrap();
        let call = call.trim_start();
        assert!(!call.starts_with("vfork("), "{line}");
        if call.starts_with("clone") {
            assert!(!call.contains("CLONE_NEW"), "{line}");
            if call.contains("CLONE_THREAD") {
                threaded.insert(pid);
            } else {
                assert!(!call.contains("CLONE_VM"), "{line}");
            }
        }
        if call.starts_with("unshare(") {
            unshared += 1;
            assert!(!threaded.contains(pid), "{line}");
        }
        launchers += usize::from(call.contains("\"__sandbox\""));
    }
    assert!(!threaded.is_empty() && launchers == 24 && unshared >= 48, "{launchers} {unshared}: {text}");
}

/// If whoever launched the builder is killed, it goes too.
#[test]
fn a_killed_caller_leaves_nothing() {
    const NAME: &str = "outside::a_killed_caller_leaves_nothing";
    let house = House::new();
    if is_inner(NAME) {
        let mut sandboxed = start(&house.plan("setsid sleep 1000 & echo ready; sleep 1000"));
        let mut plain = start(&house.plain("setsid sleep 1000 & echo ready; sleep 1000"));
        for child in [&mut sandboxed, &mut plain] {
            log_until(child, "ready");
        }
        std::fs::write(std::env::var_os("LARDER_SANDBOX_READY").unwrap(), "").unwrap();
        std::thread::sleep(Duration::from_secs(1000));
        return;
    }
    let ready = house.top.path().join("ready");
    let mut caller = Command::new(std::env::current_exe().unwrap())
        .args([NAME, "--exact"])
        .env("LARDER_SANDBOX_INNER", NAME)
        .env("LARDER_SANDBOX_READY", &ready)
        .spawn()
        .map(Killed)
        .unwrap();
    while !ready.exists() {
        assert!(caller.0.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(10));
    }
    let all = descendants(caller.0.id());
    assert!(all.len() >= 8, "{all:?}");
    drop(caller);
    // The launchers notice by themselves, so that there is nobody to wait for.
    until_gone(&all);
}

/// Nor does a launcher that is killed.
#[test]
fn a_killed_launcher_leaves_nothing() {
    let house = House::new();
    for plan in [house.plan("echo ready; sleep 1000"), house.plain("echo ready; exec sleep 1000")] {
        let mut child = start(&plan);
        log_until(&mut child, "ready");
        let all = descendants(child.id());
        rustix::process::pidfd_send_signal(child.pidfd(), rustix::process::Signal::KILL).unwrap();
        assert_eq!(child.wait().unwrap(), Ended::Signalled(9));
        until_gone(&all);
    }
}

#[test]
fn a_dropped_builder_is_gone() {
    let house = House::new();
    let mut child = start(&house.plan("setsid sleep 1000 & echo ready; sleep 1000"));
    log_until(&mut child, "ready");
    let all = descendants(child.id());
    drop(child);
    assert!(!all.iter().any(|pid| is_alive(*pid)));
}

/// Where the kernel refuses, the call and what helps are named, and nothing runs instead.
#[test]
fn refusals_are_told() {
    const NAME: &str = "outside::refusals_are_told";
    if !is_inner(NAME) {
        if is_root() && has("unshare") {
            // In a user namespace of its own, so that only it is affected.
            let setup = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
            run_inner(NAME, &["unshare", "-U", "-r", "sh", "-c", setup, "sh"]);
        }
        return;
    }
    let house_without_ids = || {
        let top = tempfile::tempdir().unwrap();
        std::fs::create_dir(top.path().join("root")).unwrap();
        top
    };
    let top = house_without_ids();
    let mut plan = plan_without_ids(top.path());
    let error = try_run(&plan).unwrap_err();
    assert!(error.is_about_namespaces());
    let text = error.to_string();
    assert_eq!(
        text,
        "creating the user namespace: unshare(CLONE_NEWUSER) failed: No space left on device; \
         raise /proc/sys/user/max_user_namespaces and the other limits in /proc/sys/user"
    );
    assert!(!top.path().join("root/ran").exists());
    assert!(support(&launcher()).unwrap().user_namespace.is_err());
    root_of(&mut plan).user_namespace = None;
    assert!(matches!(try_run(&plan), Err(LaunchError::Plan(_))), "root outside of a user namespace");
}

fn plan_without_ids(top: &Path) -> larder_sandbox::plan::Plan {
    let house = House::new_for_self();
    let mut plan = house.plan("touch /ran");
    plan.ids = None;
    plan.cwd = "/".into();
    let root = root_of(&mut plan);
    root.dir = top.join("root");
    root.binds = host_binds();
    plan
}

#[test]
fn what_is_wrong_is_named() {
    let house = House::new();
    let missing = Bind { source: "/no/such/thing".into(), ..Bind::same("/thing") };
    let mut plan = house.plan("true");
    root_of(&mut plan).binds.push(missing);
    let error = try_run(&plan).unwrap_err().to_string();
    assert_eq!(error, "binding '/no/such/thing': stat failed: No such file or directory");

    let mut plan = house.plan("true");
    plan.cwd = "/nowhere".into();
    let error = try_run(&plan).unwrap_err();
    assert_eq!(error.to_string(), "entering '/nowhere': chdir failed: No such file or directory");
    assert!(!error.is_about_namespaces());

    let mut plan = house.plan("true");
    root_of(&mut plan).binds.push(Bind { source: "/usr".into(), ..Bind::same("/a/../../b") });
    assert!(matches!(try_run(&plan), Err(LaunchError::Plan(_))));

    let nobody = Launcher::new("/no/such/launcher");
    let error = launch(&house.plan("true"), &nobody).unwrap_err();
    assert_eq!(error.to_string(), "cannot start the launcher '/no/such/launcher'; is /proc mounted?");
    let wrong = Launcher::new("/bin/false");
    let error = launch(&house.plan("true"), &wrong).unwrap_err();
    assert_eq!(error.to_string(), "the launcher ended early; was it killed?");

    if !is_root() {
        let mut plan = house.plan("true");
        plan.ids = Some(larder_sandbox::plan::Ids { uid: 1, gid: 1, groups: vec![] });
        let error = try_run(&plan).unwrap_err().to_string();
        assert!(error.ends_with("only root can build as another user"), "{error}");
    }
}

#[test]
fn the_hidden_word_is_no_command() {
    let output = Command::new(launcher().program).arg(larder_sandbox::launch::LAUNCHER_WORD).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stderr, b"error: this is how builders are started, and no command\n");
}

#[test]
fn support_is_what_works() {
    let support = support(&launcher()).unwrap();
    assert!(support.has_sandbox(), "{support:?}");
    assert_eq!(support.user_namespace, Ok(()));
    assert_eq!(support.terminal, Ok(()));
    assert_eq!(support.filter, Ok(()));
}
