//! What a builder may see: the plan of its sandbox, or of running without one.
//!
//! Source: building, section 9, steps in the parent.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use larder_core::derivation::Kind;
use larder_core::settings::{Sandbox, Settings};
use larder_core::store_dir::canonicalise;
use larder_core::store_path::StorePath;
use larder_fs::file_error::{At as _, FileError};
use larder_fs::layout::make_dirs;
use larder_sandbox::plan::{
    Bind, Dev, Dir, File, Ids, InsideIds, Isolation, Limit, Link, Personality, Plan, Resource, Root, Scope,
};
use rustix::fs::{CWD, Gid, Mode, OFlags};

use super::environment::Prepared;
use super::journal::Journal;
use super::tempdir::TempDir;
use super::users::BuildUser;
use super::{Build, builtin, hooks};
use crate::job::{Failure, FailureKind};

/// Ids of the builder inside, unless it runs with those of the host.
const INSIDE: InsideIds = InsideIds { uid: 1000, gid: 100 };

/// Is this build shut in? Errors: the derivation asks for what the settings do not allow.
pub(super) fn decide(build: &Build<'_>) -> Result<bool, Failure> {
    let no_chroot = build.attributes.flag("__noChroot", false)?;
    let has_network = matches!(build.kind, Kind::Fixed | Kind::Impure);
    let layout = build.store.layout();
    if layout.real_store != Path::new(layout.store_dir.as_str()) {
        // Only there do the paths mean what they say.
        return Ok(true);
    }
    match build.settings.values.sandbox {
        Sandbox::On if no_chroot => {
            let drv = build.shown_drv();
            let text =
                format!("derivation '{drv}' has '__noChroot' set, but that's not allowed when 'sandbox' is 'true'");
            Err(Failure::new(FailureKind::InputRejected, text))
        }
        Sandbox::On => Ok(true),
        Sandbox::Off => Ok(false),
        Sandbox::Relaxed => Ok(!no_chroot && !has_network),
    }
}

/// The root of a sandbox, made and empty; dropped, it is deleted.
#[derive(Debug)]
pub(super) struct Chroot<'s> {
    store: &'s larder_store::LocalStore,
    name: OsString,
    /// What becomes `/`.
    root: PathBuf,
    /// The store directory inside, opened before any builder could put something in its place.
    pub outputs: OwnedFd,
    pub outputs_path: PathBuf,
}

impl<'s> Chroot<'s> {
    /// Makes `<drv>.chroot/root` in the store directory, so that outputs can be renamed out of it.
    pub(super) fn create(build: &Build<'s>, user: Option<&BuildUser>, journal: &Journal) -> Result<Self, Failure> {
        let store = build.store;
        let name = OsString::from(format!("{}.chroot", build.job.drv_path));
        // We hold the locks of all outputs, so nobody uses it.
        store.remove_entry(&name)?;
        let real = &store.layout().real_store;
        let top = real.join(&name);
        rustix::fs::mkdirat(store.directory()?, &name, Mode::RWXU).at("creating directory", &top)?;
        journal.entry(real, &name)?;
        let root = top.join("root");
        let inside = Path::new(store.dir().as_str()).strip_prefix("/").unwrap_or(Path::new(""));
        let outputs_path = root.join(inside);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = make_dirs(&outputs_path).and_then(|()| {
            let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP;
            rustix::fs::chmod(&root, mode).at("changing mode of", &root)?;
            if let Some(user) = user {
                rustix::fs::chown(&root, None, Some(Gid::from_raw(user.gid))).at("changing owner of", &root)?;
            }
            rustix::fs::openat(CWD, &outputs_path, flags, Mode::empty()).at("opening directory", &outputs_path)
        });
        match opened {
            Ok(outputs) => Ok(Self { store, name, root, outputs, outputs_path }),
            Err(error) => {
                drop(store.remove_entry(&name));
                Err(error.into())
            }
        }
    }
}

impl Drop for Chroot<'_> {
    fn drop(&mut self) {
        // What stays is in the journal, and no valid path.
        drop(self.store.remove_entry(&self.name));
    }
}

/// Everything the launcher has to know.
pub(super) fn plan(
    build: &Build<'_>,
    prepared: &Prepared,
    temp: &TempDir,
    user: Option<&BuildUser>,
    chroot: Option<&Chroot<'_>>,
) -> Result<Plan, Failure> {
    let values = &build.settings.values;
    let text = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    let groups = |user: &BuildUser| if chroot.is_some() { Vec::new() } else { user.groups.clone() };
    let ids = match user {
        Some(user) => Some(Ids { uid: user.uid, gid: user.gid, groups: groups(user) }),
        // In a user namespace of our own nobody knows any more who we were.
        None if chroot.is_some() => {
            let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            Some(Ids { uid, gid, groups: Vec::new() })
        }
        None => None,
    };
    let isolation = match chroot {
        None => Isolation::None,
        Some(chroot) => Isolation::Root(Box::new(root(build, temp, user, chroot)?)),
    };
    let inside = chroot.is_some();
    Ok(Plan {
        program: text(&prepared.program).into(),
        argv: if builtin::check(build)? {
            vec![text(&prepared.program), builtin::options(build)]
        } else {
            prepared.args.iter().map(|arg| text(arg)).collect()
        },
        env: prepared.env.iter().map(|(name, value)| (text(name), text(value))).collect(),
        cwd: if inside { values.sandbox_build_dir.clone().into() } else { temp.path() },
        umask: 0o022,
        ids,
        isolation,
        personality: Personality::of_system(&build.job.drv.system, &values.system, values.impersonate_linux_26),
        limits: limits(values, chroot.is_some() || user.is_some()),
        filter_syscalls: values.filter_syscalls,
        no_new_privileges: !values.allow_new_privileges,
        scope: Scope { abstract_sockets: inside, signals: inside },
        cgroups: Vec::new(),
    })
}

/// `is_alone`: the builder's processes are told from others, by an id or a namespace of its own.
fn limits(values: &Settings, is_alone: bool) -> Vec<Limit> {
    let core = Limit { resource: Resource::Core, soft: Some(0), hard: None };
    let processes = Some(values.max_build_processes).filter(|most| is_alone && *most > 0);
    let processes = processes.map(|most| Limit { resource: Resource::Processes, soft: Some(most), hard: Some(most) });
    std::iter::once(core).chain(processes).collect()
}

fn root(build: &Build<'_>, temp: &TempDir, user: Option<&BuildUser>, chroot: &Chroot<'_>) -> Result<Root, Failure> {
    let values = &build.settings.values;
    let has_network = matches!(build.kind, Kind::Fixed | Kind::Impure);
    let is_root = rustix::process::geteuid().is_root();
    let user_namespace = (!is_root || has_user_namespaces() || user.is_none()).then_some(INSIDE);
    let ids = user_namespace.unwrap_or_else(|| {
        let user = user.map_or((0, 0), |user| (user.uid, user.gid));
        InsideIds { uid: user.0, gid: user.1 }
    });
    let build_dir = &values.sandbox_build_dir;
    if Path::new(store_dir(build)).starts_with(build_dir) {
        let text = format!("'sandbox-build-dir' must not contain the store directory '{}'", store_dir(build));
        return Err(Failure::new(FailureKind::Misc, text));
    }

    let mut files = vec![
        file("/etc/passwd", &passwd(ids.uid, ids.gid, build_dir)),
        file("/etc/group", &format!("root:x:0:\nnixbld:!:{}:\nnogroup:x:65534:\n", ids.gid)),
    ];
    let mut binds = BTreeMap::new();
    if has_network {
        files.push(file("/etc/nsswitch.conf", "hosts: files dns\nservices: files\n"));
        for path in ["/etc/resolv.conf", "/etc/services", "/etc/hosts"] {
            add(&mut binds, Bind { optional: true, ..Bind::same(path) });
        }
    } else {
        files.push(file("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"));
    }
    let mut visible: BTreeSet<StorePath> = build.inputs.clone();
    for wanted in wanted_paths(build, chroot)? {
        if let Ok((path, _)) = build.store.dir().parse_inside(wanted.source.as_os_str().as_bytes())
            && build.store.is_valid(&path)?
        {
            visible.extend(build.store.closure([&path])?);
        }
        if wanted.source != Path::new("/proc") && wanted.target != Path::new("/proc") {
            add(&mut binds, wanted);
        }
    }
    // A builder may be asked to make anew what is bound, such as the shell of the sandbox.
    for place in build.outputs.values() {
        visible.remove(&place.path);
        binds.remove(Path::new(&build.store.dir().full(&place.path)));
    }
    let mut links = Vec::new();
    for path in visible {
        let source = build.store.layout().real_path(&path);
        let target = PathBuf::from(build.store.dir().full(&path));
        let meta = std::fs::symlink_metadata(&source).at("getting status of", &source)?;
        if meta.is_symlink() {
            let to = std::fs::read_link(&source).at("reading symbolic link", &source)?;
            links.push(Link { path: target, target: to.into() });
        } else {
            binds.entry(target.clone()).or_insert(Bind { target, ..Bind::same(source) });
        }
    }
    add(&mut binds, Bind::writable(temp.path(), build_dir.as_str()));
    // What is bound takes the place of what we would write.
    files.retain(|file| !binds.keys().any(|target| file.path.starts_with(target)));
    let dirs = vec![
        Dir { path: "/tmp".into(), mode: 0o1777, owner: None },
        Dir { path: store_dir(build).into(), mode: 0o1775, owner: user.map(|user| (0, user.gid)) },
        Dir { path: "/etc".into(), mode: 0o555, owner: None },
    ];
    let has_dev = binds.contains_key(Path::new("/dev"));
    let dirs = dirs.into_iter().filter(|dir| !binds.contains_key(&dir.path)).collect();
    let exists = |path: &str| Path::new(path).exists();
    Ok(Root {
        dir: chroot.root.clone(),
        user_namespace,
        dirs,
        files,
        links,
        binds: binds.into_values().collect(),
        dev: (!has_dev).then(|| Dev {
            kvm: values.system_features.contains("kvm"),
            shm_size: exists("/dev/shm").then(|| values.sandbox_dev_shm_size.clone()),
            pts: exists("/dev/pts/ptmx"),
        }),
        proc: true,
        private_network: !has_network,
        host_name: "localhost".into(),
        domain_name: "(none)".into(),
    })
}

fn store_dir<'a>(build: &'a Build<'_>) -> &'a str {
    build.store.dir().as_str()
}

fn add(binds: &mut BTreeMap<PathBuf, Bind>, bind: Bind) {
    binds.insert(bind.target.clone(), bind);
}

fn file(path: &str, contents: &str) -> File {
    File { path: path.into(), mode: 0o644, contents: contents.into() }
}

fn passwd(uid: u32, gid: u32, home: &str) -> String {
    format!(
        "root:x:0:0:Nix build user:{home}:/noshell\nnixbld:x:{uid}:{gid}:Nix build user:{home}:/noshell\n\
         nobody:x:65534:65534:Nobody:/:/noshell\n"
    )
}

fn has_user_namespaces() -> bool {
    std::fs::read_to_string("/proc/sys/user/max_user_namespaces").is_ok_and(|text| text.trim() != "0")
}

/// `sandbox-paths`, what the derivation may ask of the host, and what the hook adds.
fn wanted_paths(build: &Build<'_>, chroot: &Chroot<'_>) -> Result<Vec<Bind>, Failure> {
    let values = &build.settings.values;
    let mut all: Vec<Bind> = values.mounts().map(parse_mount).collect::<Result<_, _>>()?;
    for wanted in build.attributes.strings("__impureHostDeps")?.unwrap_or_default() {
        let path = canonicalise(wanted).map(|path| PathBuf::from(OsStr::from_bytes(&path).to_owned()));
        let allowed = path.filter(|path| values.allowed_impure_host_deps.iter().any(|dir| path.starts_with(dir)));
        let Some(path) = allowed else {
            let (drv, wanted) = (build.shown_drv(), String::from_utf8_lossy(wanted));
            let text = format!(
                "derivation '{drv}' requested impure path '{wanted}', but it was not in allowed-impure-host-deps"
            );
            return Err(Failure::new(FailureKind::InputRejected, text));
        };
        all.push(Bind { optional: true, ..Bind::writable(path.clone(), path) });
    }
    if !values.pre_build_hook.is_empty() {
        let more = hooks::pre_build(&values.pre_build_hook, &build.shown_drv(), Some(&chroot.root))?;
        for text in more {
            let bind = parse_mount(&text)?;
            all.push(Bind { optional: false, ..bind });
        }
    }
    Ok(all)
}

/// `P`, `TARGET=SOURCE`, either with `?` at the end if it may be missing.
fn parse_mount(text: &str) -> Result<Bind, Failure> {
    let (whole, optional) = match text.strip_suffix('?') {
        Some(whole) => (whole, true),
        None => (text, false),
    };
    let (target, source) = whole.split_once('=').unwrap_or((whole, whole));
    let clean = |path: &str| canonicalise(path.as_bytes()).map(|path| PathBuf::from(OsStr::from_bytes(&path)));
    let (Some(target), Some(source)) = (clean(target), clean(source)) else {
        let text = format!("'{text}' in 'sandbox-paths' is neither an absolute path nor 'inside=outside'");
        return Err(Failure::new(FailureKind::Misc, text));
    };
    Ok(Bind { optional, ..Bind::writable(source, target) })
}

/// What nothing outside of a sandbox may have.
pub(super) fn check_unsandboxed() -> Result<(), Failure> {
    match std::fs::symlink_metadata("/homeless-shelter") {
        Ok(_) => Err(Failure::new(
            FailureKind::Misc,
            "home directory '/homeless-shelter' exists; please remove it to assure purity of builds without sandboxing",
        )),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(FileError::new("getting status of", "/homeless-shelter", e).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_as_the_setting_has_them() {
        let parse = |text| parse_mount(text).map(|b| (b.target, b.source, b.optional)).map_err(|f| f.text);
        assert_eq!(parse("/a").unwrap(), ("/a".into(), "/a".into(), false));
        assert_eq!(parse("/a?").unwrap(), ("/a".into(), "/a".into(), true));
        assert_eq!(parse("/bin/sh=/x/../b//sh?").unwrap(), ("/bin/sh".into(), "/b/sh".into(), true));
        for bad in ["a", "/a=b", "", "?", "=/a"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
