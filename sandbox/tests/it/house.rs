//! A root, a plan and what came of it.

use std::cell::RefCell;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use larder_sandbox::launch::{Child, Ended, LaunchError, Launcher, launch};
use larder_sandbox::plan::{
    Bind, Dev, Dir, File, Ids, InsideIds, Isolation, Limit, Personality, Plan, Resource, Root, Scope,
};
use tempfile::TempDir;

static NEXT: AtomicUsize = AtomicUsize::new(0);

/// The build user of these tests.
pub(crate) const BUILD_UID: u32 = 30_501;
pub(crate) const BUILD_GID: u32 = 30_500;

/// Where the launcher is, if not where cargo has put it.
pub(crate) const LAUNCHER_VARIABLE: &str = "LARDER_SANDBOX_LAUNCHER";

pub(crate) fn launcher() -> Launcher {
    let program = std::env::var_os(LAUNCHER_VARIABLE);
    let program = program.unwrap_or_else(|| env!("CARGO_BIN_EXE_larder-sandbox-launcher").into());
    Launcher::new(program)
}

/// Says so where a test cannot run.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: this test needs root");
    }
    root
}

/// Directories of the host that exist here and that a shell needs.
pub(crate) fn host_binds() -> Vec<Bind> {
    let exists = |path: &&str| Path::new(path).exists();
    ["/bin", "/lib", "/lib32", "/lib64", "/usr"].iter().copied().filter(exists).map(Bind::same).collect()
}

/// A directory for the root and one for the build; removed with the value.
pub(crate) struct House {
    pub(crate) top: TempDir,
    /// Of the plan made last.
    pub(crate) root: RefCell<PathBuf>,
    pub(crate) build: PathBuf,
}

impl House {
    /// For the build user if we are root, else for ourselves.
    pub(crate) fn new() -> Self {
        let house = Self::new_for_self();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&house.build, Some(BUILD_UID), Some(BUILD_GID)).unwrap();
        }
        house
    }

    pub(crate) fn new_for_self() -> Self {
        let top = tempfile::tempdir().unwrap();
        std::fs::set_permissions(top.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let build = make_dir(top.path().join("build"));
        Self { top, root: RefCell::default(), build }
    }

    /// A shell script in a sandbox, as a build user with a user namespace.
    pub(crate) fn plan(&self, script: &str) -> Plan {
        self.plan_argv("/bin/sh", &["sh", "-c", script])
    }

    pub(crate) fn plan_argv(&self, program: &str, argv: &[&str]) -> Plan {
        let dir = |path: &str, mode| Dir { path: path.into(), mode, owner: None };
        let file = |path: &str, text: &str| File { path: path.into(), mode: 0o644, contents: text.into() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root = make_dir(self.top.path().join(format!("root-{number}")));
        self.root.borrow_mut().clone_from(&root);
        let mut binds = host_binds();
        binds.push(Bind::writable(&self.build, "/build"));
        Plan {
            program: program.into(),
            argv: argv.iter().map(Into::into).collect(),
            env: vec![("PATH".into(), "/usr/bin:/bin:/usr/sbin:/sbin".into())],
            cwd: "/build".into(),
            umask: 0o022,
            ids: rustix::process::geteuid().is_root().then(|| Ids { uid: BUILD_UID, gid: BUILD_GID, groups: vec![] }),
            isolation: Isolation::Root(Box::new(Root {
                dir: root,
                user_namespace: Some(InsideIds { uid: 1000, gid: 100 }),
                dirs: vec![dir("/tmp", 0o1777), dir("/etc", 0o555)],
                files: vec![
                    file(
                        "/etc/passwd",
                        "root:x:0:0:Nix build user:/build:/noshell\nnixbld:x:1000:100:Nix build user:/build:/noshell\nnobody:x:65534:65534:Nobody:/:/noshell\n",
                    ),
                    file("/etc/group", "root:x:0:\nnixbld:!:100:\nnogroup:x:65534:\n"),
                    file("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
                ],
                links: vec![],
                binds,
                dev: Some(Dev { kvm: false, shm_size: Some("50%".into()), pts: true }),
                proc: true,
                private_network: true,
                host_name: "localhost".into(),
                domain_name: "(none)".into(),
            })),
            personality: Personality { fixed_addresses: true, ..Personality::default() },
            limits: vec![Limit { resource: Resource::Core, soft: Some(0), hard: None }],
            filter_syscalls: true,
            no_new_privileges: true,
            scope: Scope { abstract_sockets: true, signals: true },
            cgroups: vec![],
        }
    }

    /// The program of `probe.c`, if there is a C compiler.
    pub(crate) fn probe(&self) -> Option<PathBuf> {
        let (program, source) = (self.top.path().join("probe"), self.top.path().join("probe.c"));
        std::fs::write(&source, include_str!("probe.c")).unwrap();
        compile(&["-O1", "-static"], &source, &program)
    }

    /// That program alone in an empty root, as `/probe`.
    pub(crate) fn probe_plan(&self, probe: &Path, words: &[&str]) -> Plan {
        let argv = [&["probe"], words].concat();
        let mut plan = self.plan_argv("/probe", &argv);
        root_of(&mut plan).binds =
            vec![Bind { source: probe.to_owned(), ..Bind::same("/probe") }, Bind::writable(&self.build, "/build")];
        plan
    }

    /// The same without a sandbox.
    pub(crate) fn plain(&self, script: &str) -> Plan {
        Plan { isolation: Isolation::None, cwd: self.build.clone(), ..self.plan(script) }
    }
}

/// Compiles a program, if there is a C compiler that can.
pub(crate) fn compile(flags: &[&str], source: &Path, program: &Path) -> Option<PathBuf> {
    let output = Command::new("gcc").args(flags).arg("-o").arg(program).arg(source).output();
    match output {
        Ok(output) if output.status.success() => Some(program.to_owned()),
        Ok(output) => {
            eprintln!("skipped: gcc {flags:?}: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Err(e) => {
            eprintln!("skipped: gcc: {e}");
            None
        }
    }
}

fn make_dir(dir: PathBuf) -> PathBuf {
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
    dir
}

pub(crate) fn root_of(plan: &mut Plan) -> &mut Root {
    match &mut plan.isolation {
        Isolation::Root(root) => root,
        Isolation::None => panic!("no sandbox"),
    }
}

pub(crate) fn start(plan: &Plan) -> Child {
    launch(plan, &launcher()).unwrap_or_else(|e| panic!("{e}"))
}

/// Runs a plan to its end.
pub(crate) fn run(plan: &Plan) -> (Ended, String) {
    try_run(plan).unwrap_or_else(|e| panic!("{e}"))
}

pub(crate) fn try_run(plan: &Plan) -> Result<(Ended, String), LaunchError> {
    let mut child = launch(plan, &launcher())?;
    let mut log = Vec::new();
    child.log().read_to_end(&mut log).unwrap();
    let ended = child.finish(Duration::from_mins(1))?;
    Ok((ended, String::from_utf8_lossy(&log).into_owned()))
}

/// Runs a plan that must succeed; its log.
pub(crate) fn log_of(plan: &Plan) -> String {
    let (ended, log) = run(plan);
    assert!(ended.is_success(), "{ended}: {log}");
    log
}

/// Reads the log until it has that text; what was read.
pub(crate) fn log_until(child: &mut Child, text: &str) -> String {
    let mut log = String::new();
    let mut bytes = [0; 4096];
    while !log.contains(text) {
        let n = child.log().read(&mut bytes).unwrap();
        assert!(n > 0, "the log ended without '{text}': {log}");
        log += &String::from_utf8_lossy(&bytes[..n]);
    }
    log
}

/// The host's numbers of a process and all that come from it.
pub(crate) fn descendants(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut at = 0;
    while let Some(pid) = all.get(at) {
        // A process may be gone meanwhile.
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            all.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        at += 1;
    }
    all
}

/// A process that does not outlive its value.
pub(crate) struct Killed(pub(crate) std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Is there such a process, and is it no zombie?
/// Waits until all of these are gone; what stays is ended, and an error.
pub(crate) fn until_gone(pids: &[u32]) {
    let since = std::time::Instant::now();
    while let Some(alive) = pids.iter().find(|pid| is_alive(**pid)) {
        if since.elapsed().as_secs() > 60 {
            for pid in pids.iter().filter_map(|pid| rustix::process::Pid::from_raw(i32::try_from(*pid).ok()?)) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
            panic!("process {alive} does not end");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}
