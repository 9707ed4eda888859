//! `larder doctor`: is everything as it should be around the store, and what would mend it?
//!
//! Nothing is changed. Each finding says what was seen and what to do; only those that keep
//! something from working make the status 1.

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use clap::Args;
use larder_core::settings::{Sandbox, Settings};
use larder_fs::layout::Access;
use larder_fs::users::Users;
use larder_sandbox::launch::Launcher;
use larder_sandbox::support::support;
use serde_json::json;

use super::Json;
use crate::applets::nix_store::store::local;
use crate::applets::{Context, print_json};
use crate::conf::{self, Facts, StoreChoice, choose};
use crate::exit::{Failure, Status, chain};
use crate::printer::{Output, Printer};

#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    pub json: Json,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    Well,
    /// It works, though not as well as it could.
    Note,
    /// Something does not work.
    Ill,
}

impl Grade {
    const fn word(self) -> &'static str {
        match self {
            Self::Well => "ok",
            Self::Note => "note",
            Self::Ill => "problem",
        }
    }
}

struct Finding {
    grade: Grade,
    what: String,
    /// What would mend it; empty where nothing needs to.
    remedy: String,
}

/// What was found so far.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn well(&mut self, what: impl Into<String>) {
        self.0.push(Finding { grade: Grade::Well, what: what.into(), remedy: String::new() });
    }
    fn note(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { grade: Grade::Note, what: what.into(), remedy: remedy.into() });
    }
    fn ill(&mut self, what: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { grade: Grade::Ill, what: what.into(), remedy: remedy.into() });
    }
}

pub(super) fn doctor(cx: &Context, settings: &Settings, args: &Doctor) -> Result<Status, Failure> {
    let mut found = Findings::default();
    match choose(&settings.store, &cx.env, Facts::gather(&cx.env, false)?)? {
        StoreChoice::Local(_) => {
            let here = local(cx, settings, Access::ReadOnly)?;
            store_dir(&mut found, &here, settings);
            state_dir(&mut found, &here);
            leftovers(&mut found, &here);
            room(&mut found, &here);
            daemon_socket(&mut found, &here.daemon_socket(&cx.env));
        }
        StoreChoice::Daemon { socket } => daemon_socket(&mut found, &socket),
        StoreChoice::Remote { uri } => {
            found.note(format!("the store '{uri}' is on another machine"), "run `larder doctor` there");
        }
    }
    build_users(&mut found, settings, &Users::default(), cx.env.is_root());
    sandbox(&mut found, settings);
    report(&found, args)
}

fn report(found: &Findings, args: &Doctor) -> Result<Status, Failure> {
    if args.json.json {
        let rows: Vec<_> = found
            .0
            .iter()
            .map(|finding| json!({"grade": finding.grade.word(), "what": finding.what, "remedy": finding.remedy}))
            .collect();
        print_json(&json!(rows))?;
    } else {
        let mut out = Printer::new(Output::Listing);
        for finding in &found.0 {
            out.line(format_args!("{:<8} {}", finding.grade.word(), finding.what))?;
            if !finding.remedy.is_empty() {
                out.line(format_args!("{:<8} -> {}", "", finding.remedy))?;
            }
        }
        out.finish()?;
    }
    let is_ill = found.0.iter().any(|finding| finding.grade == Grade::Ill);
    Ok(if is_ill { Status::FAILURE } else { Status::SUCCESS })
}

fn store_dir(found: &mut Findings, here: &conf::LocalStore, settings: &Settings) {
    let dir = &here.layout.real_store;
    let shown = dir.display();
    let meta = match std::fs::symlink_metadata(dir) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return found
                .note(format!("there is no store in '{shown}' yet"), "the first command that adds something makes it");
        }
        Err(error) => {
            return found.ill(format!("'{shown}' cannot be looked at: {}", chain(&error)), "run this as its owner");
        }
    };
    if meta.file_type().is_symlink() {
        let what = format!("the store '{shown}' is a symlink");
        if settings.allow_symlinked_store {
            found.note(what, "its target must be the same on all machines that share paths");
        } else {
            found.ill(what, "mount the directory there instead, or set allow-symlinked-store");
        }
        return;
    }
    if !meta.is_dir() {
        return found.ill(format!("'{shown}' is no directory"), "move it away");
    }
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o002 != 0 {
        found.ill(format!("anybody may write to '{shown}' (mode {mode:04o})"), format!("chmod 1775 {shown}"));
    } else if mode & 0o020 != 0 && mode & 0o1000 == 0 {
        found.ill(
            format!("members of group {} may delete each other's files in '{shown}' (mode {mode:04o})", meta.gid()),
            format!("chmod 1775 {shown}"),
        );
    } else {
        found.well(format!("store '{shown}': owner {}, group {}, mode {mode:04o}", meta.uid(), meta.gid()));
    }
}

fn state_dir(found: &mut Findings, here: &conf::LocalStore) {
    let state = &here.layout.state;
    let Ok(meta) = std::fs::metadata(state) else { return };
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o022 != 0 {
        found.ill(
            format!(
                "others than its owner may write to '{}' (mode {mode:04o}): they could drop roots",
                state.display()
            ),
            format!("chmod 755 {}", state.display()),
        );
    } else {
        found.well(format!("state '{}': owner {}, mode {mode:04o}", state.display(), meta.uid()));
    }
    for dir in [here.db_dir.clone(), here.layout.gc_roots()] {
        let Ok(meta) = std::fs::metadata(&dir) else { continue };
        let mode = meta.permissions().mode() & 0o7777;
        if mode & 0o022 != 0 {
            found.ill(
                format!("others than its owner may write to '{}' (mode {mode:04o})", dir.display()),
                format!("chmod 755 {}", dir.display()),
            );
        }
    }
}

/// Files that a process which died has left behind.
fn leftovers(found: &mut Findings, here: &conf::LocalStore) {
    let mut locks = 0;
    for entry in std::fs::read_dir(&here.layout.real_store).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().ends_with(b".lock") && is_free(&entry.path()) {
            locks += 1;
        }
    }
    if locks > 0 {
        found.note(
            format!("{locks} lock files in the store belong to nobody"),
            "a collection (`nix-store --gc`) removes them",
        );
    }
    let mut dead = 0;
    for entry in std::fs::read_dir(here.layout.temp_roots()).into_iter().flatten().flatten() {
        dead += usize::from(is_free(&entry.path()));
    }
    if dead > 0 {
        found.note(
            format!("{dead} files of temporary roots belong to processes that are gone"),
            "a collection (`nix-store --gc`) removes them",
        );
    }
    if locks + dead == 0 {
        found.well("nothing is left of processes that died");
    }
}

/// Does nobody hold the lock of this file?
fn is_free(path: &Path) -> bool {
    let Ok(file) = std::fs::File::open(path) else { return false };
    let taken = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared);
    taken.is_ok()
}

fn room(found: &mut Findings, here: &conf::LocalStore) {
    let Ok(status) = rustix::fs::statvfs(&here.layout.real_store) else { return };
    let free_mib = status.f_bavail.saturating_mul(status.f_frsize) >> 20;
    if free_mib < 256 {
        found.ill(format!("only {free_mib} MiB are free where the store is"), "`larder gc` tells what could go");
    } else if status.f_files > 0 && status.f_favail < 10_000 {
        found.ill(
            format!("only {} inodes are free where the store is", status.f_favail),
            "`larder gc` tells what could go",
        );
    } else {
        found.well(format!("{free_mib} MiB are free where the store is"));
    }
}

fn daemon_socket(found: &mut Findings, socket: &Path) {
    let shown = socket.display();
    match std::fs::symlink_metadata(socket) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => found.note(
            format!("no daemon listens on '{shown}'"),
            "only its owner can change the store; for others start `larder daemon` (dist/systemd has units)",
        ),
        Err(error) => {
            found.ill(format!("'{shown}' cannot be looked at: {}", chain(&error)), "see the directories above it");
        }
        Ok(meta) if !meta.file_type().is_socket() => {
            found.ill(format!("'{shown}' is no socket"), "move it away, and start the daemon again");
        }
        Ok(meta) => match crate::remote::connect(socket) {
            Ok(_) if meta.permissions().mode() & 0o666 == 0o666 => found.well(format!("a daemon listens on '{shown}'")),
            Ok(_) => found.note(
                format!("a daemon listens on '{shown}', but not everybody may connect"),
                "allowed-users is the setting for that; the socket has mode 0666",
            ),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                found.ill(format!("you may not connect to '{shown}'"), "ask whoever keeps it");
            }
            Err(error) => found.ill(
                format!("nobody answers on '{shown}': {}", chain(&error)),
                "it is left over from a daemon that died; starting one replaces it",
            ),
        },
    }
}

fn build_users(found: &mut Findings, settings: &Settings, users: &Users, is_root: bool) {
    let name = &settings.build_users_group;
    if name.is_empty() {
        if is_root {
            found.note("builders run as root, as no build-users-group is set", "build-users-group = nixbld");
        }
        return;
    }
    let group = match users.group_by_name(name) {
        Ok(Some(group)) => group,
        Ok(None) if settings.sandbox == Sandbox::On => {
            return found.note(
                format!("there is no group '{name}': root's builders run under ids that belong to nobody"),
                format!("fine in a sandbox; real Nix needs the group and its users: groupadd -r {name}"),
            );
        }
        Ok(None) => {
            return found.ill(
                format!("there is no group '{name}', and without a sandbox root's builders need its users"),
                format!("groupadd -r {name}, and add users to it; or set sandbox = true"),
            );
        }
        Err(error) => return found.ill(format!("the groups cannot be read: {}", chain(&error)), "see /etc/group"),
    };
    if group.members.is_empty() {
        return found.ill(
            format!("the group '{name}' has no members, so that nothing can be built as root"),
            format!("for n in 1 2 3 4 5 6 7 8; do useradd -r -g {name} -G {name} -d /var/empty -s /sbin/nologin nixbld$n; done"),
        );
    }
    let mut uids = std::collections::BTreeSet::new();
    for member in &group.members {
        match users.user_by_name(member) {
            Ok(Some(user)) => {
                if user.uid == 0 {
                    found.ill(format!("'{member}' of group '{name}' is root"), "take that name out of the group");
                } else if !uids.insert(user.uid) {
                    found.ill(
                        format!("'{member}' of group '{name}' has the id {} of another member", user.uid),
                        "builders of one id are not safe from each other: give each an id of its own",
                    );
                }
            }
            Ok(None) => found.ill(
                format!("'{member}' is a member of group '{name}', and no user"),
                format!("useradd -r -g {name} -G {name} -d /var/empty -s /sbin/nologin {member}"),
            ),
            Err(error) => found.ill(format!("the users cannot be read: {}", chain(&error)), "see /etc/passwd"),
        }
    }
    let jobs = settings.max_jobs.0;
    if (uids.len() as u64) < u64::from(jobs) {
        found.note(
            format!("max-jobs is {jobs}, and the group '{name}' has {} users", uids.len()),
            "that many builds run at once; add users for more",
        );
    } else {
        found.well(format!("group '{name}' has {} users", uids.len()));
    }
}

fn sandbox(found: &mut Findings, settings: &Settings) {
    let can = match support(&Launcher::default()) {
        Ok(can) => can,
        Err(error) => return found.ill(format!("the sandbox cannot be tried: {}", chain(&error)), "is /proc mounted?"),
    };
    let wants = settings.sandbox != Sandbox::Off;
    for (what, step) in [
        ("namespaces", &can.namespaces),
        ("a /proc of their own", &can.proc),
        ("a terminal for the log", &can.terminal),
        ("the filter of system calls", &can.filter),
    ] {
        if let Err(error) = step {
            let text = format!("builders cannot have {what}: {}", chain(error));
            let remedy = "allow it in the kernel or the container; or set sandbox = false, and trust all builders";
            if wants && !settings.sandbox_fallback { found.ill(text, remedy) } else { found.note(text, remedy) }
        }
    }
    if can.has_sandbox() {
        let landlock =
            if can.landlock >= 6 { "" } else { "; builders with network are not kept apart (needs Linux 6.12)" };
        found.well(format!("builders can have a sandbox{landlock}"));
    }
}
