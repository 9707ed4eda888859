//! Killing what a build has left behind.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::report::{During, SetupError, Step};
use crate::sys;

/// How long processes may take to die; only one that hangs in the kernel takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// From this id down there is one for each process that is nobody else's: who has the same real id
/// as a killer may be killed by it, and so must not be another killer.
const NOBODY_AT_ALL: u32 = u32::MAX - 1;

/// As root: kills all processes of that user, and waits until none is alive.
pub(crate) fn kill_user(uid: u32) -> Step<()> {
    let killing = || format!("killing all processes of user {uid}");
    sys::set_groups(&[]).during("setgroups", killing)?;
    // With the user's id as the effective one we may signal its processes; with the others
    // different, they may not signal us: else they could kill the killer first.
    let nobody = NOBODY_AT_ALL - std::process::id();
    if sys::set_uid(nobody, uid, nobody).is_err() {
        // A user namespace that lacks that id.
        sys::set_uid(uid, uid, uid).during("setresuid", killing)?;
    }
    let start = Instant::now();
    loop {
        match sys::kill_everything() {
            Ok(()) => {}
            // Nobody is there, or nobody that we may kill.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::EPERM)) => return Ok(()),
            Err(e) => return Err(e).during("kill", killing),
        }
        // Zombies are signalled too, with success, until somebody else reaps them.
        if !is_any_alive(uid) {
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            return Err(SetupError::new(killing(), "kill", Errno::TIMEDOUT).with_hint("one hangs in the kernel"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Is there a process of that user that is no zombie, nor ourselves?
fn is_any_alive(uid: u32) -> bool {
    let Ok(entries) = fs::read_dir("/proc") else { return false };
    let own = std::process::id().to_string();
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.bytes().all(|b| b.is_ascii_digit())
            && name != own
            // Not the owner of the directory: that is root where a process may not be traced.
            && fs::read_to_string(entry.path().join("status")).is_ok_and(|status| is_running_as(&status, uid))
    })
}

/// Reads `/proc/PID/status`, where the name, which may have anything else in it, has no newline.
fn is_running_as(status: &str, uid: u32) -> bool {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim_start);
    let is_running = field("State:").is_some_and(|state| !state.starts_with(['Z', 'X']));
    is_running && field("Uid:").is_some_and(|ids| ids.split_whitespace().any(|id| id.parse() == Ok(uid)))
}

/// Kills all children, and theirs as they become ours, and reaps them.
pub(crate) fn kill_descendants(mut reaped: impl FnMut(Pid, i32)) {
    loop {
        let mut any_killed = false;
        for child in children() {
            any_killed |= rustix::process::kill_process(child, Signal::KILL).is_ok();
        }
        // One that we may not kill we do not wait for.
        let options = if any_killed { 0 } else { libc::WNOHANG };
        match sys::wait_any(options) {
            Ok(Some((pid, status))) => reaped(pid, status),
            Ok(None) | Err(_) => return,
        }
    }
}

/// Of this process, which has one thread.
fn children() -> Vec<Pid> {
    let list: io::Result<String> = fs::read_to_string("/proc/thread-self/children");
    list.unwrap_or_default().split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_are_told_from_the_dead() {
        let status = |state: &str, ids: &str| format!("Name:\tState: Z\nUmask:\t0022\nState:\t{state}\nUid:\t{ids}\n");
        assert!(is_running_as(&status("S (sleeping)", "0\t7\t0\t0"), 7));
        assert!(!is_running_as(&status("S (sleeping)", "0\t77\t0\t0"), 7));
        assert!(!is_running_as(&status("Z (zombie)", "7\t7\t7\t7"), 7));
        assert!(!is_running_as("", 7));
    }
}
