//! `larder doctor`: is this installation in order, and what mends it if not?
//!
//! Nothing is changed, and nothing is waited for. Each check gives a finding with what helps.

use std::ffi::OsStr;
use std::io::BufReader;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use indicatif::HumanBytes;
use larder_core::report::Silent;
use larder_core::settings::{Sandbox, Settings};
use larder_core::signature::PublicKey;
use larder_fs::layout::Access;
use larder_fs::users::Users;
use larder_sandbox::launch::Launcher;
use larder_store_db::{DbError, Mode, OpenOptions, StoreDb};
use larder_wire::worker::MINOR;
use larder_wire::worker::client::Client;
use serde_json::json;

use super::Json;
use crate::applets::nix_store::store::local;
use crate::applets::{Context, print_json};
use crate::conf::LocalStore;
use crate::exit::{Failure, Status, chain};
use crate::printer::{Output, Printer};

/// A daemon that says nothing for so long is of no use.
const DAEMON_ANSWERS: Duration = Duration::from_secs(5);

/// Less room than this for the store is told of.
const LITTLE_ROOM: u64 = 1 << 30;

#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Good,
    /// It works, but one may want to know.
    Note,
    /// Something will not work.
    Problem,
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Note => "note",
            Self::Problem => "problem",
        }
    }
}

#[derive(Debug)]
struct Finding {
    verdict: Verdict,
    /// What was looked at, in a word or two.
    about: &'static str,
    text: String,
    /// What to do about it.
    remedy: Option<String>,
}

#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn good(&mut self, about: &'static str, text: impl Into<String>) {
        self.0.push(Finding { verdict: Verdict::Good, about, text: text.into(), remedy: None });
    }

    fn note(&mut self, about: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { verdict: Verdict::Note, about, text: text.into(), remedy: Some(remedy.into()) });
    }

    fn problem(&mut self, about: &'static str, text: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(Finding { verdict: Verdict::Problem, about, text: text.into(), remedy: Some(remedy.into()) });
    }
}

/// Exit status 1 if there is a problem.
pub(super) fn doctor(cx: &Context, settings: &Settings, args: &Doctor) -> Result<Status, Failure> {
    let place =
        local(cx, settings, Access::ReadOnly).or_else(|_| LocalStore::from_env(&cx.env).map_err(Failure::from))?;
    let mut found = Findings::default();
    directory(cx, settings, &place, &mut found);
    ledger(&place, &mut found);
    leftovers(&place, &mut found);
    users(cx, settings, &mut found);
    sandbox(cx, settings, &mut found);
    daemon(cx, &place, &mut found);
    keys(settings, &mut found);
    let worst = found.0.iter().map(|finding| finding.verdict).max();
    if args.json.json {
        let rows = found.0.iter().map(|Finding { verdict, about, text, remedy }| {
            json!({ "verdict": verdict.as_str(), "about": about, "text": text, "remedy": remedy })
        });
        print_json(&json!(rows.collect::<Vec<_>>()))?;
    } else {
        let mut out = Printer::new(Output::Listing);
        for Finding { verdict, about, text, remedy } in &found.0 {
            out.line(format_args!("{:<8} {about}: {text}", verdict.as_str()))?;
            if let Some(remedy) = remedy {
                out.line(format_args!("{:<8} {remedy}", ""))?;
            }
        }
        out.finish()?;
    }
    Ok(if worst == Some(Verdict::Problem) { Status::FAILURE } else { Status::SUCCESS })
}

fn shown(path: &Path) -> String {
    format!("'{}'", path.display())
}

fn directory(cx: &Context, settings: &Settings, place: &LocalStore, found: &mut Findings) {
    const ABOUT: &str = "store directory";
    let store = &place.layout.real_store;
    let status = match std::fs::symlink_metadata(store) {
        Ok(status) => status,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return found.note(ABOUT, format!("{} is not there yet", shown(store)), "the first addition makes it");
        }
        Err(error) => {
            return found.problem(ABOUT, format!("{}: {error}", shown(store)), "let the user who asks reach it");
        }
    };
    if !status.is_dir() {
        return found.problem(ABOUT, format!("{} is no directory", shown(store)), "move it away, or set NIX_STORE_DIR");
    }
    let (mode, uid, gid) = (status.mode() & 0o7777, status.uid(), status.gid());
    let me = rustix::process::geteuid().as_raw();
    let group = Users::default().group_by_name(&settings.build_users_group).ok().flatten();
    if uid != 0 && uid != me {
        let text = format!("{} belongs to user {uid}, neither root nor you", shown(store));
        found.problem(
            ABOUT,
            text,
            format!("chown {} {}", if cx.env.is_root() { "root" } else { "$USER" }, shown(store)),
        );
    } else if mode & 0o002 != 0 {
        let text = format!("{} can be written to by everybody (mode {mode:04o})", shown(store));
        found.problem(ABOUT, text, format!("chmod o-w {}", shown(store)));
    } else if let Some(group) = group.filter(|group| uid == 0 && (gid != group.gid || mode != 0o1775)) {
        let text = format!("{} has group {gid} and mode {mode:04o}, usual are {} and 1775", shown(store), group.name);
        found.note(ABOUT, text, format!("chgrp {} {1}; chmod 1775 {1}", group.name, shown(store)));
    } else {
        found.good(ABOUT, format!("{}, owner {uid}, mode {mode:04o}", shown(store)));
    }
    if let Ok(space) = rustix::fs::statvfs(store) {
        let bytes = space.f_bavail.saturating_mul(space.f_frsize);
        let text = format!("{} left", HumanBytes(bytes));
        if bytes < LITTLE_ROOM {
            found.note("room", text, "larder gc, or the settings min-free and max-free");
        } else if space.f_files > 0 && space.f_favail < 10_000 {
            found.note("room", format!("{text}, but only {} files can be made", space.f_favail), "larder gc");
        } else {
            found.good("room", text);
        }
    }
}

fn ledger(place: &LocalStore, found: &mut Findings) {
    const ABOUT: &str = "database";
    let file = place.db_dir.join("larder.redb");
    let opened = StoreDb::open(&place.db_dir, &OpenOptions::new(Mode::ReadOnly));
    match opened.and_then(|db| db.read(larder_store_db::ReadTxn::count)) {
        Ok(count) => found.good(ABOUT, format!("{}, {count} valid paths", shown(&file))),
        Err(DbError::Missing { .. }) => {
            found.note(ABOUT, format!("there is no {} yet", shown(&file)), "the first change makes it");
        }
        Err(error @ (DbError::Permission { .. } | DbError::NeedsRecovery { .. } | DbError::SchemaTooOld { .. })) => {
            found.problem(ABOUT, chain(&error), "run any command that changes the store as its owner");
        }
        Err(error) => found.problem(ABOUT, chain(&error), "larder db rebuild"),
    }
    if larder_store::foreign::ForeignLedger::find(&place.db_dir).is_some() {
        let adopted = StoreDb::open(&place.db_dir, &OpenOptions::new(Mode::ReadOnly))
            .and_then(|db| db.read(|txn| txn.meta("foreign-adopted")))
            .is_ok_and(|mark| mark.is_some());
        let text = "real Nix has a database of its own for this store";
        if adopted {
            found.good("real Nix", format!("{text}, which was adopted"));
        } else {
            found.note("real Nix", format!("{text}; nothing is deleted until it is adopted"), "larder adopt");
        }
    }
}

/// What killed runs have left in the store directory.
fn leftovers(place: &LocalStore, found: &mut Findings) {
    const ABOUT: &str = "leftovers";
    let Ok(entries) = std::fs::read_dir(&place.layout.real_store) else { return };
    let (mut trash, mut locks, mut held) = (0u64, 0u64, 0u64);
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.as_bytes();
        if name.starts_with(b".larder-trash-") || name.starts_with(b".tmp-link-") {
            trash += 1;
        } else if name.ends_with(b".lock") {
            match is_locked(&entry.path()) {
                Some(true) => held += 1,
                Some(false) => locks += 1,
                None => {}
            }
        }
    }
    if trash + locks > 0 {
        let text = format!("{trash} entries that a killed run was deleting or linking, {locks} lock files of nobody");
        found.note(ABOUT, text, "harmless; larder gc takes them away");
    } else {
        let text = match held {
            0 => "none".to_owned(),
            1 => "none; a path is being made".to_owned(),
            many => format!("none; {many} paths are being made"),
        };
        found.good(ABOUT, text);
    }
}

/// Does somebody hold the lock? `None`: the file cannot be opened.
fn is_locked(path: &Path) -> Option<bool> {
    let file = std::fs::File::open(path).ok()?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared) {
        Ok(()) => Some(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Some(true),
        Err(_) => None,
    }
}

fn users(cx: &Context, settings: &Settings, found: &mut Findings) {
    const ABOUT: &str = "build users";
    let name = &settings.build_users_group;
    if !cx.env.is_root() {
        return found.good(ABOUT, "not needed: builders run as you, in a user namespace");
    }
    if settings.auto_allocate_uids {
        let text = format!("ids from {} on (auto-allocate-uids)", settings.start_id);
        return found.good(ABOUT, text);
    }
    if name.is_empty() {
        return found.note(
            ABOUT,
            "none (build-users-group is empty): builders without a sandbox run as root",
            "make a group of users for builders, and name it in build-users-group",
        );
    }
    let database = Users::default();
    let group = match database.group_by_name(name) {
        Ok(Some(group)) => group,
        Ok(None) => {
            let text = format!("there is no group '{name}': builds run in a sandbox under ids that belong to nobody");
            let remedy = format!(
                "for builds without a sandbox: groupadd -r {name}; useradd -r -g {name} -G {name} -d /var/empty \
                 -s /sbin/nologin {name}1 (and as many more as builds run at once)"
            );
            return found.note(ABOUT, text, remedy);
        }
        Err(error) => return found.problem(ABOUT, format!("the group database: {error}"), "see /etc/group"),
    };
    let mut missing = Vec::new();
    let mut uids = std::collections::BTreeSet::new();
    for member in &group.members {
        match database.user_by_name(member) {
            Ok(Some(user)) if user.uid != 0 => drop(uids.insert(user.uid)),
            _ => missing.push(member.clone()),
        }
    }
    if group.members.is_empty() {
        found.problem(ABOUT, format!("group '{name}' has no members"), format!("usermod -aG {name} USER"));
    } else if !missing.is_empty() {
        let text = format!("group '{name}' has members that are no users for builders: {}", missing.join(", "));
        found.problem(ABOUT, text, format!("take them out of the line of '{name}' in /etc/group"));
    } else if uids.len() < group.members.len() {
        let text = format!("two members of group '{name}' have the same id");
        found.problem(ABOUT, text, "give each an id of its own: builders must not reach each other");
    } else {
        let most = settings.max_jobs.0;
        let text = format!("{} in group '{name}'", uids.len());
        if (uids.len() as u64) < u64::from(most) {
            found.note(ABOUT, format!("{text}, and max-jobs is {most}: more builds wait"), "add users to the group");
        } else {
            found.good(ABOUT, text);
        }
    }
}

fn sandbox(cx: &Context, settings: &Settings, found: &mut Findings) {
    const ABOUT: &str = "sandbox";
    let support = match larder_sandbox::support::support(&Launcher::default()) {
        Ok(support) => support,
        Err(error) => return found.problem(ABOUT, chain(&error), "start larder from a file that can be run"),
    };
    let wanted = settings.sandbox != Sandbox::Off;
    let needed = [
        (&support.user_namespace, !cx.env.is_root()),
        (&support.namespaces, true),
        (&support.proc, true),
        (&support.terminal, true),
        (&support.filter, settings.filter_syscalls),
    ];
    let failed = needed.into_iter().filter(|(_, needed)| *needed).find_map(|(result, _)| result.as_ref().err());
    match failed {
        None if wanted => {
            let scopes = if support.landlock >= 6 {
                "builds with network cannot hand files to each other"
            } else {
                "builds with network could hand files to each other, and their outputs are copied (Linux 6.12 \
                 keeps them apart)"
            };
            found.good(ABOUT, format!("the kernel allows it; {scopes}"));
        }
        None => found.note(ABOUT, "the kernel allows it, and the settings have it off", "sandbox = true in nix.conf"),
        Some(error) if wanted => found.problem(
            ABOUT,
            format!("the kernel does not allow it: {}", chain(error)),
            "see user.max_user_namespaces, kernel.unprivileged_userns_clone and \
             kernel.apparmor_restrict_unprivileged_userns (sysctl); without them: sandbox = false in nix.conf",
        ),
        Some(error) => found.note(
            ABOUT,
            format!("off in the settings, and the kernel does not allow it: {}", chain(error)),
            "builders see all of the machine",
        ),
    }
}

fn daemon(cx: &Context, place: &LocalStore, found: &mut Findings) {
    const ABOUT: &str = "daemon";
    let socket = place.daemon_socket(&cx.env);
    if std::fs::symlink_metadata(&socket).is_err() {
        let text = format!("none: there is no socket {}", shown(&socket));
        if cx.env.is_root() {
            let remedy = "other users need one: systemctl enable --now larder-daemon.socket, or nix-daemon --daemon";
            found.note(ABOUT, text, remedy);
        } else {
            found.good(ABOUT, text);
        }
        return;
    }
    let stream = match UnixStream::connect(&socket) {
        Ok(stream) => stream,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
            let text = format!("nobody listens at {}", shown(&socket));
            return found.problem(
                ABOUT,
                text,
                format!("start it (systemctl start larder-daemon), or rm {}", shown(&socket)),
            );
        }
        Err(error) => {
            let text = format!("cannot connect to {}: {error}", shown(&socket));
            return found.problem(ABOUT, text, "everybody who may use it needs to reach the socket (mode 0666)");
        }
    };
    let greeted = (|| {
        stream.set_read_timeout(Some(DAEMON_ANSWERS))?;
        stream.set_write_timeout(Some(DAEMON_ANSWERS))?;
        Ok::<_, std::io::Error>((stream.try_clone()?, stream))
    })();
    let (input, output) = match greeted {
        Ok(ends) => ends,
        Err(error) => return found.problem(ABOUT, format!("{}: {error}", shown(&socket)), "start it anew"),
    };
    let dir = place.layout.store_dir.clone();
    match Client::connect(Box::new(BufReader::new(input)), Box::new(output), dir, MINOR, Arc::new(Silent)) {
        Ok(client) => {
            let agreed = client.agreed();
            let version = agreed.server_version.as_deref().unwrap_or("of an old version");
            found.good(ABOUT, format!("{} answers: {version}, protocol 1.{}", shown(&socket), agreed.minor));
        }
        Err(error) => found.problem(
            ABOUT,
            format!("{} does not answer as a daemon does: {}", shown(&socket), chain(&error)),
            "see its log, and allowed-users in nix.conf",
        ),
    }
}

fn keys(settings: &Settings, found: &mut Findings) {
    const ABOUT: &str = "trusted keys";
    let bad: Vec<&str> = settings
        .trusted_public_keys
        .iter()
        .map(String::as_str)
        .filter(|key| key.parse::<PublicKey>().is_err())
        .collect();
    if bad.is_empty() {
        found.good(ABOUT, settings.trusted_public_keys.len().to_string());
    } else {
        let text = format!("not all can be read: {}", bad.join(" "));
        found.problem(ABOUT, text, "a key is NAME:BASE64 in trusted-public-keys");
    }
    for file in settings.secret_key_files.iter().filter(|file| !Path::new(OsStr::new(file)).exists()) {
        found.problem("secret keys", format!("'{file}' is not there"), "nix-store --generate-binary-cache-key");
    }
}
