//! The seed rows about what a builder sees.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

use larder_sandbox::launch::Ended;
use larder_sandbox::plan::{Bind, Isolation, Personality};

use crate::house::{House, descendants, is_alive, is_root, log_of, log_until, root_of, run, start};
use crate::twice::{has, is_inner, run_inner};

#[test]
fn s024_terminals_can_be_opened() {
    let house = House::new();
    let log = log_of(&house.plan("stat -c %a /dev/pts/ptmx; stat -L -c %a /dev/ptmx"));
    assert_eq!(log, "666\n666\n");
    if has("script") {
        log_of(&house.plan("script -qc 'tty && echo inner' /dev/null | grep -q inner"));
    }
}

#[test]
fn s025_terminals_of_the_host_are_hidden() {
    let house = House::new();
    assert_eq!(log_of(&house.plan("ls /dev/pts")), "ptmx\n");
}

/// Fails where a node of our own would be used instead of one that is bound.
#[test]
fn s027_kvm_only_where_the_host_has_it() {
    let house = House::new();
    let mut plan = house.plan("test ! -e /dev/kvm || echo kvm");
    root_of(&mut plan).dev.as_mut().unwrap().kvm = true;
    let expected = if Path::new("/dev/kvm").exists() { "kvm\n" } else { "" };
    assert_eq!(log_of(&plan), expected);
    assert_eq!(log_of(&house.plan("test ! -e /dev/kvm || echo kvm")), "", "and only if asked for");
    if is_inner("seeds::s027_kvm_only_where_the_host_has_it") {
        assert!(!Path::new("/dev/kvm").exists());
    } else if is_root() && has("unshare") {
        let hide = "d=$(mktemp -d) && mount -t tmpfs none $d && cd $d && \
            for n in full null random tty urandom zero; do : > $n && mount --bind /dev/$n $n || exit 1; done && \
            mkdir pts && ln -s pts/ptmx ptmx && mount --rbind /dev/pts pts && mount --rbind $d /dev && cd / && \"$@\"; \
            s=$?; umount -R -l /dev; umount -R -l $d; rmdir $d; exit $s";
        run_inner(
            "seeds::s027_kvm_only_where_the_host_has_it",
            &["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh"],
        );
    }
}

#[test]
fn s046_32_bit_personality() {
    let house = House::new();
    let mut plan = house.plan("uname -m");
    plan.personality = Personality::of_system("i686-linux", "i686-linux", false);
    if cfg!(target_arch = "x86_64") {
        assert_eq!(log_of(&plan), "i686\n");
    }
    let mut plan = house.plan("uname -r");
    plan.personality.uname26 = true;
    assert!(log_of(&plan).starts_with("2.6."));
}

#[test]
fn s047_own_personality_without_randomisation() {
    let house = House::new();
    let machine = rustix::system::uname().machine().to_string_lossy().into_owned();
    for mut plan in
        [house.plan("uname -m; cat /proc/self/personality"), house.plain("uname -m; cat /proc/self/personality")]
    {
        plan.personality = Personality::of_system("x86_64-linux", "i686-linux", false);
        assert_eq!(log_of(&plan), format!("{machine}\n00040000\n"));
    }
}

#[test]
fn s050_single_files() {
    let house = House::new();
    let services = house.top.path().join("services");
    std::fs::write(&services, "echo 7/tcp\n").unwrap();
    let mut plan = house.plan("cat /etc/services; ls -1 /etc; echo x > /etc/services");
    let bind = Bind { source: services.clone(), ..Bind::same("/etc/services") };
    let missing = Bind { source: house.top.path().join("none"), optional: true, ..Bind::same("/etc/none") };
    root_of(&mut plan).binds.extend([bind, missing]);
    let (ended, log) = run(&plan);
    assert!(log.starts_with("echo 7/tcp\ngroup\nhosts\npasswd\nservices\n"), "{log}");
    assert!(!ended.is_success(), "read-only");
    assert_eq!(std::fs::read_to_string(services).unwrap(), "echo 7/tcp\n");
}

#[test]
fn s101_processes_are_their_own() {
    let house = House::new();
    let mut child = start(&house.plan("sleep 1000 & cd /proc; echo [0-9]*; echo ready; wait"));
    let log = log_until(&mut child, "ready");
    let seen: Vec<&str> = log.lines().next().unwrap().split(' ').collect();
    assert_eq!(seen, ["1", "2", "3"], "the reaper, the shell and what it has started");
    let all = descendants(child.id());
    assert_eq!(all.len(), 4, "launcher, reaper, shell, sleep: {all:?}");
    let reaper = std::fs::read_to_string(format!("/proc/{}/status", all[1])).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(reaper.contains(&format!("{set}:\t0000000000000000\n")), "{reaper}");
    }
    child.kill();
    assert_eq!(child.wait().unwrap(), Ended::Signalled(9));
    assert!(!all.iter().any(|pid| is_alive(*pid)), "all are gone when the wait is over");
}

#[test]
fn s102_orphans_are_reaped_and_what_is_left_is_killed() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    // The log ends only when everything that has it open is dead.
    let (ended, log) = run(&house.probe_plan(&probe, &["daemons", "100"]));
    assert_eq!((ended, log.as_str()), (Ended::Exited(0), ""));
    let mut plan = house.plan(
        "/probe daemons 100; n=0; while cat /proc/[0-9]*/stat | grep -q ' Z ' && test $n -lt 100; \
        do sleep 0.1; n=$((n + 1)); done; test $n -lt 100",
    );
    root_of(&mut plan).binds.push(Bind { source: probe, ..Bind::same("/probe") });
    let (ended, log) = run(&plan);
    assert_eq!(ended, Ended::Exited(0), "zombies stay while the builder runs: {log}");
}

#[test]
fn s103_host_and_domain_name() {
    let own = || {
        let names = rustix::system::uname();
        [names.nodename(), names.domainname()].map(std::ffi::CStr::to_owned)
    };
    let before = own();
    let house = House::new();
    let script =
        "uname -n; cat /proc/sys/kernel/hostname /proc/sys/kernel/domainname; cut -d: -f3 /proc/self/cgroup | sort -u";
    let mut plan = house.plan("cat /proc/sys/kernel/domainname");
    root_of(&mut plan).domain_name = "elsewhere".into();
    assert_eq!(log_of(&plan), "elsewhere\n");
    let log = log_of(&house.plan(script));
    assert_eq!(log, "localhost\nlocalhost\n(none)\n/\n", "and no control groups but its own");
    assert_eq!(own(), before, "the host's");
}

#[test]
fn s104_ipc_objects_are_private_and_vanish() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let before = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
    let key = 0x1a2d.to_string();
    let has_ours = || std::fs::read_to_string("/proc/sysvipc/shm").unwrap().contains(&key);
    assert!(!has_ours(), "{before}");
    let mut child = start(&house.probe_plan(&probe, &["shm", "pause"]));
    assert_eq!(log_until(&mut child, "\n"), "shm ok\n");
    assert!(!has_ours());
    child.kill();
    child.wait().unwrap();
    assert!(!has_ours());
}

#[test]
fn s105_s106_network_is_private_and_loopback_works() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let host = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port().to_string();
    let mut plan = house.plan(&format!(
        "grep : /proc/net/dev; /probe dial {port}; /probe serve 9999 & \
         for n in $(seq 300); do /probe dial 9999 | grep ok && break; sleep 0.1; done; echo ready; wait"
    ));
    root_of(&mut plan).binds.push(Bind { source: probe, ..Bind::same("/probe") });
    let mut child = start(&plan);
    let log = log_until(&mut child, "ready");
    let interfaces: Vec<&str> = log.lines().filter(|l| l.contains(": ")).collect();
    assert_eq!(interfaces.len(), 1, "{log}");
    assert!(interfaces[0].trim().starts_with("lo:"), "{log}");
    assert!(log.contains("dial ECONNREFUSED\n"), "the host's service: {log}");
    assert!(log.contains("dial ok\n"), "its own: {log}");
    assert!(TcpStream::connect("127.0.0.1:9999").is_err(), "from outside");
    assert!(!std::fs::read_to_string("/proc/net/tcp").unwrap().contains(":270F"));
    child.kill();
    child.wait().unwrap();
}

#[test]
fn s107_two_builds_may_have_one_port() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let mut children: Vec<_> = (0..2).map(|_| start(&house.probe_plan(&probe, &["serve", "9999"]))).collect();
    for child in &mut children {
        assert_eq!(log_until(child, "listening ok"), "bind ok\nlistening ok\n");
    }
}

#[test]
fn s108_fixed_outputs_have_the_network() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let host = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port().to_string();
    let mut plan = house.probe_plan(&probe, &["dial", &port]);
    root_of(&mut plan).private_network = false;
    assert_eq!(log_of(&plan), "dial ok\n");
    assert_eq!(log_of(&house.probe_plan(&probe, &["dial", &port])), "dial ECONNREFUSED\n");
}

/// What the log is: a raw terminal that only the builder may open, and nothing comes from it.
#[test]
fn standard_streams() {
    let house = House::new();
    let script = "grep -E '^Sig(Ign|Blk)' /proc/self/status; ulimit -c; \
        test $(stat -L -c %u /proc/self/fd/1) = $(id -u) || exit 1; readlink /proc/self/fd/0; stat -L -c '%a %u' /proc/self/fd/1; { stty -a <&3 | grep -o -e -opost; } 3>&1; \
        cat; ls -1 /proc/self/fd; ps -o sid= -p $$ | tr -d ' '; echo $$; umask; echo a >/dev/stderr; printf '\\0\\377\\r\\n'";
    // A descriptor that a careless caller has left open for everyone.
    let leak = std::fs::File::open("/dev/zero").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    for plan in [house.plan(script), house.plain(script)] {
        let mut child = start(&plan);
        let mut log = Vec::new();
        child.log().read_to_end(&mut log).unwrap();
        assert!(child.wait().unwrap().is_success(), "{}", String::from_utf8_lossy(&log));
        let end = b"a\n\0\xff\r\n";
        assert!(log.ends_with(end), "bytes pass as they are: {log:?}");
        let text = String::from_utf8_lossy(&log[..log.len() - end.len()]).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        let none = "\t0000000000000000";
        assert_eq!(lines[..3], [format!("SigBlk:{none}"), format!("SigIgn:{none}"), "0".into()]);
        let lines = &lines[3..];
        assert_eq!(lines[0], "/dev/null");
        assert!(lines[1].starts_with("600 "), "{text}");
        assert_eq!(lines[2..7], ["-opost", "0", "1", "2", "3"], "3 is the listed directory itself");
        assert_eq!(lines[7], lines[8], "a session of its own");
        assert_eq!(lines[9], "0022");
    }
    drop(leak);
}

#[test]
fn ids_inside_and_outside() {
    let house = House::new();
    let script = "id -u; id -g; id -un; grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; echo x > file; cat /proc/self/uid_map";
    let log = log_of(&house.plan(script));
    assert!(log.starts_with("1000\n100\nnixbld\n"), "{log}");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(log.contains(&format!("{set}:\t0000000000000000\n")), "{log}");
    }
    assert!(log.contains("NoNewPrivs:\t1\nSeccomp:\t2\n"), "{log}");
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(house.build.join("file")).unwrap());
    let words: Vec<&str> = log.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(words, ["1000", &owner.to_string(), "1"]);
    if !is_root() {
        return;
    }
    assert_eq!(owner, crate::house::BUILD_UID);
    // Without a user namespace the ids are the same on both sides; so are they without a sandbox.
    let mut plan = house.plan("id -u; id -G; grep -E '^Cap' /proc/self/status; ls -nd /proc/1 | cut -d' ' -f3");
    root_of(&mut plan).user_namespace = None;
    let mut plain = house.plain("id -u; id -G; grep -E '^Cap' /proc/self/status");
    for plan in [&mut plan, &mut plain] {
        plan.ids.as_mut().unwrap().groups = vec![12];
        let log = log_of(plan);
        assert!(log.starts_with("30501\n30500 12\n"), "{log}");
        assert_eq!(log.matches("\t0000000000000000\n").count(), 5, "{log}");
    }
}

/// `allow-new-privileges`, which takes rights that an ordinary user has only in a sandbox.
#[test]
fn new_privileges_may_be_allowed() {
    let house = House::new();
    let script = "grep NoNewPrivs /proc/self/status; touch f; chmod 4755 f 2>/dev/null || echo filtered";
    for mut plan in [house.plan(script), house.plain(script)] {
        plan.no_new_privileges = false;
        if plan.isolation == Isolation::None && !is_root() {
            let error = crate::house::try_run(&plan).unwrap_err().to_string();
            assert!(error.ends_with("do not set 'allow-new-privileges'"), "{error}");
        } else {
            assert_eq!(log_of(&plan), "NoNewPrivs:\t0\nfiltered\n");
        }
    }
}

#[test]
fn binds_are_read_only_with_everything_below() {
    let house = House::new();
    let shared = house.top.path().join("shared");
    std::fs::create_dir_all(shared.join("below")).unwrap();
    if rustix::process::geteuid().is_root() {
        for dir in ["shared", "shared/below"] {
            std::os::unix::fs::chown(house.top.path().join(dir), Some(crate::house::BUILD_UID), None).unwrap();
        }
    }
    let mut plan = house.plan("touch /shared/x; touch /shared/below/x; touch /build/ok; test ! -e /shared/x");
    root_of(&mut plan).binds.push(Bind { source: shared.clone(), ..Bind::same("/shared") });
    assert!(run(&plan).0.is_success());
    assert!(house.build.join("ok").exists());
    assert_eq!(std::fs::read_dir(&shared).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(shared.join("below")).unwrap().count(), 0);
}

/// The host's mounts are gone, those of the plan are there.
#[test]
fn mounts_are_those_of_the_plan() {
    let house = House::new();
    let mut plan = house.plan("cut -d' ' -f5 /proc/self/mountinfo | sort");
    // No mounts of the host below it, which would show too.
    root_of(&mut plan).binds.retain(|bind| bind.target != Path::new("/usr"));
    root_of(&mut plan).binds.push(Bind { recursive: !is_root(), ..Bind::same("/usr") });
    let log = log_of(&plan);
    let mut expected: Vec<String> =
        root_of(&mut plan).binds.iter().map(|bind| bind.target.to_str().unwrap().to_owned()).collect();
    let devices = ["full", "null", "pts", "random", "shm", "tty", "urandom", "zero"];
    expected.extend(devices.map(|name| format!("/dev/{name}")));
    expected.extend(["/", "/proc"].map(String::from));
    let mut found: Vec<&str> = log.lines().collect();
    expected.sort();
    found.sort_unstable();
    assert_eq!(found, expected);
}

/// A closure may be large.
#[test]
fn many_binds() {
    let house = House::new();
    let mut plan = house.plan("ls /store | wc -l; ls /store/0 /store/199");
    let source = house.top.path().join("input");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("file"), "").unwrap();
    let bind = |n: u32| Bind { source: source.clone(), ..Bind::same(format!("/store/{n}")) };
    root_of(&mut plan).binds.extend((0..200).map(bind));
    assert_eq!(log_of(&plan), "200\n/store/0:\nfile\n\n/store/199:\nfile\n");
}

/// Nothing is made in directories of the host.
#[test]
fn targets_within_a_bind_must_exist() {
    let house = House::new();
    let shared = house.top.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let mut plan = house.plan("true");
    root_of(&mut plan).binds.extend([
        Bind::writable(&shared, "/shared"),
        Bind { source: "/usr".into(), ..Bind::same("/shared/deeper/usr") },
    ]);
    let error = crate::house::try_run(&plan).unwrap_err();
    assert!(error.to_string().starts_with("binding '/usr' to '/shared/deeper/usr': openat2 failed"), "{error}");
    assert_eq!(std::fs::read_dir(&shared).unwrap().count(), 0);
}

/// A link in the root leads to where it leads inside.
#[test]
fn links_in_the_root_do_not_lead_out() {
    let house = House::new();
    let outside = house.top.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let mut plan = house.plan("cat /link/file");
    let root = root_of(&mut plan);
    std::os::unix::fs::symlink(&outside, root.dir.join("link")).unwrap();
    root.files.push(larder_sandbox::plan::File { path: "/link/file".into(), mode: 0o644, contents: "x\n".into() });
    let error = crate::house::try_run(&plan).unwrap_err();
    assert!(error.to_string().contains("mkdirat failed: File exists"), "{error}");
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn a_program_that_is_not_there_fails_the_build() {
    let house = House::new();
    let mut plan = house.plan("");
    plan.program = "/nonexistent".into();
    let (ended, log) = run(&plan);
    assert_eq!(ended, Ended::Exited(1));
    assert_eq!(log, "error: executing '/nonexistent': No such file or directory\n");
}

/// Arguments and variables are bytes, as many as the kernel takes.
#[test]
fn arguments_are_bytes() {
    use std::os::unix::ffi::OsStringExt as _;
    let house = House::new();
    let mut plan = house.plan("printf '%s' \"$1\"; printf '%s' \"$LONG\" | wc -c");
    plan.argv.extend(["sh".into(), std::ffi::OsString::from_vec(b"\xff\n".to_vec())]);
    plan.env.push(("LONG".into(), "x".repeat(100_000).into()));
    let mut child = start(&plan);
    let mut log = Vec::new();
    child.log().read_to_end(&mut log).unwrap();
    assert_eq!(log, b"\xff\n100000\n");
    std::io::stderr().flush().unwrap();
}
