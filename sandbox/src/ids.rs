//! Whom the builder runs as, and what it may never do again.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::filter::{self, Part};
use crate::plan::{Ids, InsideIds, Isolation, Plan, Root, Scope};
use crate::report::{During, SetupError, Step};
use crate::sys;
use crate::zygote;

/// First version of Landlock with scopes.
const LANDLOCK_SCOPES: u32 = 6;
const SCOPE_ABSTRACT_SOCKETS: u64 = 1;
const SCOPE_SIGNALS: u64 = 2;

/// Enters new namespaces; a refusal is marked as one of namespaces.
pub(crate) fn namespaces(call: &str, kinds: libc::c_int, attempt: &str) -> Step<()> {
    sys::unshare(kinds).during(call, || attempt.to_owned()).map_err(|e| SetupError { namespaces: true, ..e })
}

/// The ids of the plan, or our own.
fn host_ids(plan: &Plan) -> (u32, u32) {
    match &plan.ids {
        Some(Ids { uid, gid, .. }) => (*uid, *gid),
        None => (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
    }
}

/// As an ordinary user: the user namespace that all others will belong to.
pub(crate) fn enter_own_user_namespace(plan: &Plan, root: &Root) -> Step<()> {
    let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let wanted = host_ids(plan);
    if wanted != own {
        let attempt = format!("becoming user {} and group {}", wanted.0, wanted.1);
        return Err(SetupError::new(attempt, "setuid", Errno::PERM).with_hint("only root can build as another user"));
    }
    if root.user_namespace.is_none() {
        return Err(SetupError::new("creating a sandbox without a user namespace", "unshare", Errno::PERM)
            .with_hint("only root can; an ordinary user needs a user namespace"));
    }
    namespaces("unshare(CLONE_NEWUSER)", libc::CLONE_NEWUSER, "creating the user namespace")?;
    map_ids("/proc/self", plan, root)
}

/// Maps the ids of the process whose directory in `/proc` that is.
pub(crate) fn map_ids(process: &str, plan: &Plan, root: &Root) -> Step<()> {
    let Some(InsideIds { uid, gid }) = root.user_namespace else { return Ok(()) };
    write_maps(process, uid, gid, host_ids(plan))
}

pub(crate) fn write_maps(process: &str, uid: u32, gid: u32, host: (u32, u32)) -> Step<()> {
    let write = |name: &str, text: String| {
        let file = format!("{process}/{name}");
        std::fs::write(&file, text)
            .during("write", || format!("mapping ids in '{file}'"))
            .map_err(|e| SetupError { namespaces: true, ..e })
    };
    write("uid_map", format!("{uid} {} 1\n", host.0))?;
    // Without this no ordinary user may map a group; with it nobody can drop groups to get at
    // files that a group is kept from.
    write("setgroups", "deny".into())?;
    write("gid_map", format!("{gid} {} 1\n", host.1))
}

/// Groups, filter, capabilities and ids; afterwards there is no way back.
///
/// `user_namespace` enters one between what needs the host's rights and what does not.
pub(crate) fn become_builder(
    plan: &Plan,
    inside: Option<InsideIds>,
    is_root: bool,
    user_namespace: impl FnOnce() -> Step<()>,
) -> Step<()> {
    sys::new_session_keyring().during("keyctl", || "leaving the session's keys behind".into())?;
    if let Some(ids) = &plan.ids
        && is_root
    {
        sys::set_groups(&ids.groups).during("setgroups", || "setting the supplementary groups".into())?;
    }
    user_namespace()?;
    if plan.no_new_privileges {
        no_new_privileges()?;
    }
    set_scope(plan.scope)?;
    if plan.filter_syscalls {
        if !zygote::is_filtered() {
            install_filter(Part::Early)?;
        }
        install_filter(Part::Late)?;
    }
    let is_sandboxed = matches!(plan.isolation, Isolation::Root(_));
    let gives_up_all = is_sandboxed || plan.ids.is_some();
    if gives_up_all && plan.no_new_privileges {
        empty_bounding_set()?;
    }
    let (uid, gid) = match inside {
        Some(InsideIds { uid, gid }) => (uid, gid),
        None => host_ids(plan),
    };
    if is_sandboxed || plan.ids.is_some() {
        sys::set_gid(gid).during("setresgid", || format!("becoming group {gid}"))?;
        sys::set_uid(uid, uid, uid).during("setresuid", || format!("becoming user {uid}"))?;
    }
    if gives_up_all {
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        rustix::thread::set_capabilities(None, sets).during("capset", || "dropping all capabilities".into())?;
    }
    Ok(())
}

pub(crate) fn no_new_privileges() -> Step<()> {
    rustix::thread::set_no_new_privs(true).during("prctl(PR_SET_NO_NEW_PRIVS)", || "giving up new privileges".into())
}

/// For this process and all that come from it.
pub(crate) fn install_filter(part: Part) -> Step<()> {
    sys::install_filter(&filter::program(part))
        .during("seccomp(SECCOMP_SET_MODE_FILTER)", || "installing the system call filter".into())
}

/// No capability can be had again, not even from a file.
///
/// Where we lack the right to do so (an ordinary user without a sandbox) we have no capabilities
/// either, and `no_new_privs` keeps it so.
fn empty_bounding_set() -> Step<()> {
    for number in 0..63 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last, or not ours to drop.
            Err(Errno::INVAL | Errno::PERM) => return Ok(()),
            Err(e) => return Err(e).during("prctl(PR_CAPBSET_DROP)", || format!("dropping capability {number}")),
        }
    }
    Ok(())
}

/// Scopes, where the kernel has them.
fn set_scope(scope: Scope) -> Step<()> {
    let sockets = if scope.abstract_sockets { SCOPE_ABSTRACT_SOCKETS } else { 0 };
    let signals = if scope.signals { SCOPE_SIGNALS } else { 0 };
    if sockets | signals == 0 || !has_scopes() {
        return Ok(());
    }
    sys::landlock_scope(sockets | signals)
        .during("landlock_restrict_self", || "keeping sockets and signals inside".into())
}

/// Does the kernel have Landlock's scopes?
pub(crate) fn has_scopes() -> bool {
    sys::landlock_version() >= LANDLOCK_SCOPES
}
