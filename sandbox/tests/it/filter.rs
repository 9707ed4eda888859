//! The system call filter, on the kernel at hand.

use crate::house::{House, compile, log_of, root_of, run};
use larder_sandbox::plan::Bind;

const REFUSED: [&str; 12] = [
    "chmod",
    "chmod-gid",
    "fchmod",
    "fchmodat",
    "fchmodat2",
    "creat",
    "open",
    "openat",
    "tmpfile",
    "mknod",
    "mknodat",
    "x32-chmod",
];
const UNSUPPORTED: [&str; 8] =
    ["setxattr", "lsetxattr", "fsetxattr", "getxattr", "lgetxattr", "fgetxattr", "setxattrat", "x32-setxattr"];

#[test]
fn no_set_id_bits_and_no_attributes_by_any_entry() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let mut plain = house.plain("");
    plain.program = probe.clone();
    plain.argv = vec!["probe".into(), "filter".into()];
    let mut expected: Vec<String> = REFUSED.iter().map(|call| format!("{call} EPERM")).collect();
    expected.extend(UNSUPPORTED.iter().map(|call| format!("{call} EOPNOTSUPP")));
    expected.extend(["openat2 ENOSYS", "io_uring ENOSYS", "chmod-plain ok", "open-no-creat ok"].map(Into::into));
    if cfg!(target_arch = "x86_64") {
        let i386 = ["chmod-plain ok", "chmod EPERM", "open EPERM", "setxattr EOPNOTSUPP"];
        expected.extend(i386.map(|line| format!("i386-{line}")));
    }
    expected.push("no set-id file".into());
    for plan in [house.probe_plan(&probe, &["filter"]), plain] {
        let log = log_of(&plan);
        let lines: Vec<&str> = log.lines().collect();
        for line in &expected {
            let call = line.split(' ').next().unwrap();
            let known = cfg!(target_arch = "x86_64") || !call.starts_with("x32");
            assert!(!known || lines.contains(&line.as_str()), "{line} is not in\n{log}");
        }
    }
}

/// Without the filter the same calls succeed: it is the filter that refuses them.
#[test]
fn without_a_filter_nothing_is_refused() {
    let house = House::new();
    let Some(probe) = house.probe() else { return };
    let mut plan = house.probe_plan(&probe, &["filter"]);
    plan.filter_syscalls = false;
    let log = log_of(&plan);
    for call in ["chmod", "fchmodat", "open", "openat", "mknod", "openat2"] {
        assert!(log.contains(&format!("\n{call} ok\n")), "{call} in\n{log}");
    }
    assert!(log.contains("\nset-id file "), "{log}");
}

/// 32-bit programs run on a 64-bit kernel, filter or not.
#[cfg(target_arch = "x86_64")]
#[test]
fn foreign_architectures_still_run() {
    let house = House::new();
    let (source, program) = (house.top.path().join("a.c"), house.top.path().join("a"));
    let text = r#"
        static int call(int n, int a, int b, int c) {
            int r;
            __asm__ volatile("int $0x80" : "=a"(r) : "a"(n), "b"(a), "c"(b), "d"(c) : "memory");
            return r;
        }
        void _start(void) {
            int fd = call(5, (int)"made", 0102, 0644);
            call(4, 1, (int)"i686 runs\n", 10);
            int plain = call(94, fd, 0755, 0), set_id = call(94, fd, 04755, 0);
            call(4, 1, (int)(plain == 0 && set_id == -1 ? "filtered\n" : "open\n"), plain == 0 && set_id == -1 ? 9 : 5);
            call(1, 0, 0, 0);
        }
    "#;
    std::fs::write(&source, text).unwrap();
    let flags = ["-m32", "-nostdlib", "-static", "-fno-pie", "-no-pie", "-fno-stack-protector", "-O1"];
    let Some(program) = compile(&flags, &source, &program) else { return };
    if std::process::Command::new(&program).current_dir(house.top.path()).output().is_err() {
        eprintln!("skipped: this kernel runs no 32-bit programs");
        return;
    }
    let mut plan = house.plan_argv("/a", &["a"]);
    root_of(&mut plan).binds.push(Bind { source: program, ..Bind::same("/a") });
    let (ended, log) = run(&plan);
    assert!(ended.is_success(), "{ended}: {log}");
    assert_eq!(log, "i686 runs\nfiltered\n");
}
