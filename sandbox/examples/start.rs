//! How long it takes from a plan to the builder's first instruction, and to its end: in the middle of
//! many builds of one process, and for the first of them, which starts what the others are forked from.
//!
//! `cargo run --release -p larder-sandbox --example start -- [ROUNDS]`; the launcher is this
//! program itself.

#![allow(clippy::print_stdout, reason = "it prints its measurements")]

use std::io::Read as _;
use std::time::{Duration, Instant};

use larder_sandbox::enter::launcher_main;
use larder_sandbox::launch::{LAUNCHER_WORD, Launcher, launch};
use larder_sandbox::plan::{Bind, Dev, Ids, InsideIds, Isolation, Personality, Plan, Root, Scope};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args_os().nth(1).is_some_and(|word| word == LAUNCHER_WORD) {
        launcher_main();
    }
    let rounds = std::env::args().nth(1).map_or(Ok(100_u32), |n| n.parse())?;
    for (name, user_namespace, is_sandboxed) in
        [("no sandbox", false, false), ("sandbox", false, true), ("sandbox with user namespace", true, true)]
    {
        let is_root = rustix::process::geteuid().is_root();
        if is_sandboxed && !user_namespace && !is_root {
            continue;
        }
        let before = cpu_ticks()?;
        let launcher = Launcher::default();
        let mut times: [Vec<Duration>; 3] = [const { Vec::new() }; 3];
        for _ in 0..rounds {
            let top = tempfile::tempdir()?;
            let plan = plan(top.path(), is_root, user_namespace, is_sandboxed);
            let start = Instant::now();
            let mut child = launch(&plan, &launcher)?;
            let ready = start.elapsed();
            let mut log = [0; 1];
            let first = if child.log().read(&mut log)? > 0 { start.elapsed() } else { Duration::ZERO };
            std::io::copy(child.log(), &mut std::io::sink())?;
            let ended = child.wait()?;
            if !ended.is_success() {
                return Err(format!("the builder ended with {ended}").into());
            }
            let all = start.elapsed();
            for (times, time) in times.iter_mut().zip([ready, first, all]) {
                times.push(time);
            }
        }
        // The time of what it has started counts once that has ended.
        drop(launcher);
        let very_first = times[1].first().copied().unwrap_or_default();
        let [ready, first, all] = times.map(|mut times| {
            times.sort_unstable();
            times.get(times.len() / 2).copied().unwrap_or_default()
        });
        let cpu = Duration::from_millis(10) * (cpu_ticks()? - before) / rounds;
        println!(
            "{name}: ready {ready:.2?}, first output {first:.2?}, end {all:.2?}, CPU {cpu:.2?} ({rounds} rounds; \
             first output of the first {very_first:.2?})"
        );
    }
    Ok(())
}

/// Hundredths of a second that this process and its children have used.
fn cpu_ticks() -> Result<u32, Box<dyn std::error::Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(") ").ok_or("no fields")?.1.split(' ');
    Ok(fields.skip(11).take(4).map(str::parse::<u32>).sum::<Result<u32, _>>()?)
}

fn plan(top: &std::path::Path, is_root: bool, user_namespace: bool, is_sandboxed: bool) -> Plan {
    let binds = ["/bin", "/lib", "/lib64", "/usr"].iter().filter(|path| std::path::Path::new(path).exists());
    let root = Root {
        dir: top.to_owned(),
        user_namespace: user_namespace.then_some(InsideIds { uid: 1000, gid: 100 }),
        dirs: vec![],
        files: vec![],
        links: vec![],
        binds: binds.map(Bind::same).collect(),
        dev: Some(Dev { kvm: false, shm_size: Some("50%".into()), pts: true }),
        proc: true,
        private_network: true,
        host_name: "localhost".into(),
        domain_name: "(none)".into(),
    };
    Plan {
        program: "/bin/sh".into(),
        argv: ["sh", "-c", "echo"].map(Into::into).into(),
        env: vec![],
        cwd: "/".into(),
        umask: 0o022,
        ids: is_root.then(|| Ids { uid: 30_501, gid: 30_500, groups: vec![] }),
        isolation: if is_sandboxed { Isolation::Root(Box::new(root)) } else { Isolation::None },
        personality: Personality::default(),
        limits: vec![],
        filter_syscalls: true,
        no_new_privileges: true,
        scope: Scope { abstract_sockets: true, signals: true },
        cgroups: vec![],
    }
}
