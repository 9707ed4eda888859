//! What to run, and what it may see: plain data.
//!
//! A plan is made by someone who knows the store and the derivation, and is sent to the launcher.
//! Paths "inside" are those that the builder sees; they are absolute, without `..`.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One builder and its surroundings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The program, as the builder sees it.
    #[serde(with = "path_bytes")]
    pub program: PathBuf,
    /// All arguments, the first being the program's name for itself.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Where it starts, as the builder sees it. Must exist by then.
    #[serde(with = "path_bytes")]
    pub cwd: PathBuf,
    pub umask: u32,
    /// Whom it runs as; `None`: as whoever launches it.
    pub ids: Option<Ids>,
    pub isolation: Isolation,
    pub personality: Personality,
    pub limits: Vec<Limit>,
    /// Refuse set-user-id bits and extended attributes ([`crate::filter`]).
    pub filter_syscalls: bool,
    /// Programs with set-user-id bits gain nothing; also, no capability can be had again.
    pub no_new_privileges: bool,
    /// What the kernel shall keep apart from the outside, where it can (Landlock, Linux 6.12).
    pub scope: Scope,
    /// Directories of control groups that the builder joins, one in each hierarchy wanted.
    pub cgroups: Vec<OsString>,
}

/// User, group and supplementary groups, as the host counts them.
///
/// An ordinary user can only name its own user and group, and keeps its supplementary groups in
/// a user namespace (the kernel lets nobody drop them there).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Isolation {
    /// No sandbox: the host's files, processes and network; still a session of its own, its
    /// own ids, filter and limits, and no inherited descriptors.
    None,
    Root(Box<Root>),
}

/// A sandbox: own mounts, processes, IPC, host name, control group view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// An existing directory of the host that becomes `/`; best below one that only its owner
    /// can enter. What it lacks is made in it and left there.
    #[serde(with = "path_bytes")]
    pub dir: PathBuf,
    /// Ids inside, in a user namespace; `None`: no user namespace, ids are the host's. An
    /// ordinary user needs one.
    pub user_namespace: Option<InsideIds>,
    /// Made first; existing ones get mode and owner too.
    pub dirs: Vec<Dir>,
    /// Written next; must not exist.
    pub files: Vec<File>,
    /// Symbolic links; must not exist.
    pub links: Vec<Link>,
    pub binds: Vec<Bind>,
    /// `None`: no `/dev` is made (one is among the binds, or none is wanted).
    pub dev: Option<Dev>,
    /// A new `/proc`.
    pub proc: bool,
    /// The builder has no network but its own loopback.
    pub private_network: bool,
    pub host_name: OsString,
    pub domain_name: OsString,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InsideIds {
    pub uid: u32,
    pub gid: u32,
}

/// A directory in the root, with its final mode; parents that are missing get 0755.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dir {
    #[serde(with = "path_bytes")]
    pub path: PathBuf,
    pub mode: u32,
    /// Owner and group on the host; only root can give directories away.
    pub owner: Option<(u32, u32)>,
}

/// A small file in the root, such as `/etc/passwd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    #[serde(with = "path_bytes")]
    pub path: PathBuf,
    pub mode: u32,
    pub contents: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    #[serde(with = "path_bytes")]
    pub path: PathBuf,
    pub target: OsString,
}

/// Something of the host, of any type, that appears inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    /// On the host. Symbolic links are followed: nobody may be able to swap them who is not
    /// allowed to choose what the builder sees.
    #[serde(with = "path_bytes")]
    pub source: PathBuf,
    /// Inside. Made, as a directory or an empty file, if the root lacks it; in another bind it
    /// must exist.
    #[serde(with = "path_bytes")]
    pub target: PathBuf,
    /// A missing source is passed over.
    pub optional: bool,
    pub read_only: bool,
    /// With what is mounted below; an ordinary user cannot leave that out.
    pub recursive: bool,
}

impl Bind {
    /// Read-only, with everything below, at the same place; must exist.
    pub fn same(path: impl Into<PathBuf>) -> Self {
        let source: PathBuf = path.into();
        Self { target: source.clone(), source, optional: false, read_only: true, recursive: true }
    }

    /// Writable, with everything below; must exist.
    pub fn writable(source: impl Into<PathBuf>, target: impl Into<PathBuf>) -> Self {
        Self { source: source.into(), target: target.into(), optional: false, read_only: false, recursive: true }
    }
}

/// The fixed minimal `/dev`: full null random tty urandom zero, links fd stdin stdout stderr,
/// and by choice kvm, shm, pts with ptmx.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dev {
    /// Provide `/dev/kvm` if the host has it.
    pub kvm: bool,
    /// `size=` of the tmpfs on `/dev/shm`, such as `50%`; `None`: no `/dev/shm`.
    pub shm_size: Option<String>,
    /// A terminal directory of its own.
    pub pts: bool,
}

/// What programs are told about the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Personality {
    /// `uname` speaks of a 32-bit machine.
    pub linux32: bool,
    /// `uname` speaks of Linux 2.6.
    pub uname26: bool,
    /// Addresses are not randomised.
    pub fixed_addresses: bool,
}

impl Personality {
    /// That of a derivation for `wanted`, where our own system is `own` (building, rule 5.4).
    ///
    /// Asking only the setting is wrong: a 32-bit installation on a 64-bit kernel must switch too.
    pub fn of_system(wanted: &str, own: &str, impersonate_linux_26: bool) -> Self {
        let uname = rustix::system::uname();
        let (sysname, machine) = (uname.sysname().to_bytes(), uname.machine().to_bytes());
        Self::decide(wanted, own, impersonate_linux_26, sysname, machine)
    }

    fn decide(wanted: &str, own: &str, uname26: bool, sysname: &[u8], machine: &[u8]) -> Self {
        let kernel64 = |name: &[u8]| sysname == b"Linux" && machine == name;
        let linux32 = match wanted {
            "i686-linux" => own == "x86_64-linux" || kernel64(b"x86_64"),
            "armv6l-linux" | "armv7l-linux" => own == "aarch64-linux" || kernel64(b"aarch64"),
            _ => false,
        };
        let x86 = matches!(wanted, "i686-linux" | "x86_64-linux");
        Self { linux32, uname26: uname26 && x86, fixed_addresses: true }
    }
}

/// A resource limit; what is left out stays as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    pub resource: Resource,
    pub soft: Option<u64>,
    pub hard: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resource {
    /// Bytes of a core file.
    Core,
    /// Processes of the user, wherever they run.
    Processes,
    OpenFiles,
    /// Bytes of address space.
    AddressSpace,
    /// Seconds.
    CpuTime,
    /// Bytes of a file.
    FileSize,
}

/// What stays inside, with the help of Landlock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Scope {
    /// No connection to abstract sockets made outside. Without a private network this is what
    /// keeps two builders from handing each other descriptors (CVE-2024-27297).
    pub abstract_sockets: bool,
    /// No signals to processes outside.
    pub signals: bool,
}

/// A plan that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    #[error("'{}' is no absolute path without '..' in the sandbox", path.display())]
    Inside { path: PathBuf },
    #[error("'{}' is no absolute path of the host", path.display())]
    Host { path: PathBuf },
    #[error("'{}' has a zero byte", text.display())]
    ZeroByte { text: OsString },
    #[error("there is no first argument")]
    NoArgument,
    #[error("'{}' cannot name an environment variable", name.display())]
    Variable { name: OsString },
    #[error("the builder would run as root outside of a user namespace; a build user is required")]
    Root,
}

impl Plan {
    /// Can this be meant at all? What depends on the machine shows when it is launched.
    pub fn check(&self) -> Result<(), PlanError> {
        use std::os::unix::ffi::OsStrExt as _;
        let texts = self.argv.iter().chain(self.env.iter().flat_map(|(name, value)| [name, value]));
        let paths = [&self.program, &self.cwd];
        for text in texts.map(OsString::as_os_str).chain(paths.map(|p| p.as_os_str())) {
            if text.as_bytes().contains(&0) {
                return Err(PlanError::ZeroByte { text: text.to_owned() });
            }
        }
        if self.argv.is_empty() {
            return Err(PlanError::NoArgument);
        }
        for (name, _) in &self.env {
            if name.is_empty() || name.as_bytes().contains(&b'=') {
                return Err(PlanError::Variable { name: name.clone() });
            }
        }
        match &self.isolation {
            Isolation::None => Ok(()),
            Isolation::Root(root) => root.check(&self.cwd),
        }
    }
}

impl Root {
    fn check(&self, cwd: &Path) -> Result<(), PlanError> {
        let inside = (self.dirs.iter().map(|d| &d.path))
            .chain(self.files.iter().map(|f| &f.path))
            .chain(self.links.iter().map(|l| &l.path))
            .chain(self.binds.iter().map(|b| &b.target));
        for path in inside.map(PathBuf::as_path).chain([cwd]) {
            let plain = path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
            if !plain || !path.is_absolute() {
                return Err(PlanError::Inside { path: path.to_owned() });
            }
        }
        for path in self.binds.iter().map(|b| &b.source).chain([&self.dir]) {
            if !path.is_absolute() {
                return Err(PlanError::Host { path: path.clone() });
            }
        }
        Ok(())
    }
}

/// Paths are bytes; serde's own form insists on UTF-8.
mod path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Vec::<u8>::deserialize(from).map(|bytes| OsString::from_vec(bytes).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of seed S046 and building, rule 5.4: system or kernel.
    #[test]
    fn s046_personality_by_system_or_kernel() {
        let check = |wanted, own, machine: &str, linux32| {
            let found = Personality::decide(wanted, own, false, b"Linux", machine.as_bytes());
            assert_eq!(found.linux32, linux32, "{wanted} on {own}, {machine}");
            assert!(found.fixed_addresses);
        };
        check("i686-linux", "x86_64-linux", "x86_64", true);
        check("i686-linux", "i686-linux", "x86_64", true);
        check("i686-linux", "i686-linux", "i686", false);
        check("x86_64-linux", "x86_64-linux", "x86_64", false);
        check("x86_64-linux", "i686-linux", "x86_64", false);
        check("armv7l-linux", "armv7l-linux", "aarch64", true);
        check("armv7l-linux", "armv7l-linux", "armv7l", false);
        assert!(!Personality::decide("aarch64-linux", "aarch64-linux", true, b"Linux", b"aarch64").uname26);
        assert!(Personality::decide("x86_64-linux", "x86_64-linux", true, b"Linux", b"x86_64").uname26);
    }
}
