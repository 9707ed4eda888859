//! Where settings come from, and which store is meant.
//!
//! Everything here is a function of an [`Env`] and of [`Facts`], so that it can be tested; the
//! applets pass in the real ones. [`load`] goes through environment, files and flags from the lowest
//! to the highest precedence; [`choose`] tells a local store from a daemon and from a remote one.
//! Source: settings, sections 2, 6, 7 and 8.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use camino::{Utf8Path, Utf8PathBuf};
use larder_core::settings::{Configured, Machine, Os, SettingsBuilder, SettingsError, UserFiles, remote_systems};
use larder_core::store_dir::{StoreDir, StoreDirError, canonicalise};
use larder_fs::layout::Layout;
use rustix::fs::{Access, AtFlags};

use crate::args::{Override, OverrideFrom, shown};

/// Environment variables, as a value.
#[derive(Debug, Clone, Default)]
pub struct Env {
    variables: HashMap<OsString, OsString>,
    /// From the user database, for when `HOME` is not set.
    is_root: bool,
}

impl Env {
    /// Those of the process.
    pub fn of_process() -> Self {
        Self { variables: std::env::vars_os().collect(), is_root: rustix::process::geteuid().is_root() }
    }

    /// Exactly these, for an ordinary user.
    pub fn from_pairs<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let variables = pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
        Self { variables, is_root: false }
    }

    pub const fn is_root(&self) -> bool {
        self.is_root
    }

    pub fn get(&self, name: &str) -> Option<&OsStr> {
        self.variables.get(OsStr::new(name)).map(OsString::as_os_str)
    }

    /// As [`Env::get`]; an empty value counts as none.
    pub fn get_filled(&self, name: &str) -> Option<&OsStr> {
        self.get(name).filter(|value| !value.is_empty())
    }

    /// The user's home directory: `HOME`, or root's.
    fn home(&self) -> PathBuf {
        match self.get("HOME") {
            Some(home) => home.into(),
            None if self.is_root => "/root".into(),
            None => "/".into(),
        }
    }

    /// An XDG base directory; a relative one does not count.
    fn xdg(&self, name: &str, default: &str) -> PathBuf {
        match self.get_filled(name) {
            Some(dir) if Path::new(dir).is_absolute() => dir.into(),
            _ => self.home().join(default),
        }
    }

    /// The system configuration directory: `NIX_CONF_DIR`, else `/etc/nix`.
    pub fn conf_dir(&self) -> Result<Utf8PathBuf, ConfError> {
        match self.get_filled("NIX_CONF_DIR") {
            Some(dir) => Ok(utf8("NIX_CONF_DIR", dir)?.into()),
            None => Ok("/etc/nix".into()),
        }
    }

    /// The user's configuration files, the one that wins first.
    pub fn user_conf_files(&self) -> Result<Vec<Utf8PathBuf>, ConfError> {
        let text = |name| self.get(name).map(|value| utf8(name, value)).transpose();
        let config_home = self.xdg("XDG_CONFIG_HOME", ".config");
        let config_home = utf8("XDG_CONFIG_HOME", config_home.as_os_str())?;
        let (only, dirs) = (text("NIX_USER_CONF_FILES")?, text("XDG_CONFIG_DIRS")?);
        let files = UserFiles {
            nix_user_conf_files: only.as_deref(),
            config_home: Some(&config_home),
            config_dirs: dirs.as_deref(),
        };
        let mut list = files.list();
        list.reverse();
        Ok(list)
    }

    /// The user's own profiles, where newer versions of Nix keep them.
    pub fn own_profiles(&self) -> PathBuf {
        self.xdg("XDG_STATE_HOME", ".local/state").join("nix/profiles")
    }

    /// Where answers of caches are remembered: `$XDG_CACHE_HOME/larder`.
    pub fn cache_folder(&self) -> PathBuf {
        self.xdg("XDG_CACHE_HOME", ".cache").join("larder")
    }

    /// Where a user without a store gets one: `$XDG_DATA_HOME/larder/root`.
    pub fn own_root(&self) -> PathBuf {
        self.xdg("XDG_DATA_HOME", ".local/share").join("larder/root")
    }
}

/// Why the environment cannot be heeded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfError {
    #[error("the environment variable {name} is not valid UTF-8: '{shown}'")]
    NotUtf8 { name: &'static str, shown: String },
    #[error("not an absolute path: '{shown}', the value of {name}")]
    NotAbsolute { name: &'static str, shown: String },
    #[error(transparent)]
    StoreDir(#[from] StoreDirError),
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    #[error(transparent)]
    Conf(#[from] ConfError),
    #[error(transparent)]
    Settings(#[from] SettingsError),
}

fn utf8(name: &'static str, value: &OsStr) -> Result<String, ConfError> {
    let text = value.to_str().ok_or_else(|| ConfError::NotUtf8 { name, shown: shown(value) })?;
    Ok(text.to_owned())
}

/// Builds the settings from the environment, the files it names, and flags.
///
/// What the environment says directly stands in place of a default, so that files win over it.
pub fn load(env: &Env, flags: &[Override], machine: Machine) -> Result<Configured, LoadError> {
    load_with(env, flags, machine, &mut |path: &Utf8Path| read_conf(path.as_std_path()))
}

/// Variables of the environment that are settings by another name.
const PRESETS: [(&str, &str); 3] =
    [("NIX_REMOTE", "store"), ("NIX_CONNECT_TIMEOUT", "connect-timeout"), ("NIX_BUILD_HOOK", "build-hook")];

fn load_with(
    env: &Env,
    flags: &[Override],
    machine: Machine,
    read: &mut dyn FnMut(&Utf8Path) -> io::Result<Option<Vec<u8>>>,
) -> Result<Configured, LoadError> {
    let system_file = machine.conf_dir.join("nix.conf");
    let mut builder = SettingsBuilder::new(machine);
    for (variable, setting) in PRESETS {
        if let Some(value) = env.get(variable) {
            builder.preset(setting, &utf8(variable, value)?)?;
        }
    }
    if env.get("NIX_IGNORE_SYMLINK_STORE").is_some_and(|value| value == "1") {
        builder.preset("allow-symlinked-store", "true")?;
    }
    if let Some(files) = env.get("NIX_REMOTE_SYSTEMS") {
        builder.preset("builders", &remote_systems(&utf8("NIX_REMOTE_SYSTEMS", files)?))?;
    }
    builder.system_file(&system_file, read)?;
    for file in env.user_conf_files()?.iter().rev() {
        builder.user_file(file, read)?;
    }
    if let Some(text) = env.get("NIX_CONFIG") {
        builder.text("NIX_CONFIG", text.as_bytes(), read)?;
    }
    for flag in flags {
        match flag.from {
            OverrideFrom::Flag => builder.flag(&flag.name, &flag.value)?,
            OverrideFrom::Option => builder.option(&flag.name, &flag.value),
        }
    }
    Ok(builder.finish())
}

/// Reads a configuration file; one that is not there, or is not ours to read, is empty.
fn read_conf(path: &Path) -> io::Result<Option<Vec<u8>>> {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if matches!(error.kind(), NotFound | PermissionDenied | NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What the defaults of settings depend on, as it is here.
///
/// What only builds depend on (cores, and whether there is KVM) is not looked for if `builds` is
/// false, as that would be a third of the system calls of a short command.
pub fn machine(env: &Env, builds: bool) -> Result<Machine, ConfError> {
    let cores = || std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    Ok(Machine {
        cores: if builds { cores() } else { 1 },
        root: env.is_root,
        system: system(),
        extra_platforms: extra_systems().into_iter().collect(),
        os: match std::env::consts::OS {
            "linux" => Os::Linux,
            "macos" => Os::MacOs,
            _ => Os::Other,
        },
        kvm: builds && may(Path::new("/dev/kvm"), Access::READ_OK | Access::WRITE_OK),
        conf_dir: env.conf_dir()?,
        build_hook: String::new(),
    })
}

/// The system this binary builds for, in Nix's words.
fn system() -> String {
    let os = match std::env::consts::OS {
        "macos" => "darwin",
        os => os,
    };
    format!("{}-{os}", std::env::consts::ARCH)
}

/// Systems whose programs run here as well.
fn extra_systems() -> Vec<String> {
    #[cfg(target_arch = "x86_64")]
    {
        let levels = [
            true,
            is_x86_feature_detected!("sse4.2") && is_x86_feature_detected!("popcnt"),
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("fma"),
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512cd")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl"),
        ];
        let levels = levels.iter().zip(1..).take_while(|(has, _)| **has).map(|(_, n)| format!("x86_64-v{n}-linux"));
        std::iter::once("i686-linux".to_owned()).chain(levels).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// A local store: where it is and how it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalStore {
    pub layout: Layout,
    /// `NIX_DB_DIR` of 1.x, else `db` in the state directory.
    pub db_dir: PathBuf,
    /// The directory a relocated store lies in.
    pub root: Option<PathBuf>,
    pub read_only: bool,
    /// A user's own, as the usual one is out of reach. Whoever creates it says so.
    pub is_private: bool,
}

impl LocalStore {
    /// What the environment says, for no special store.
    pub fn from_env(env: &Env) -> Result<Self, ConfError> {
        let store_dir = store_dir(env)?;
        let layout = Layout {
            real_store: PathBuf::from(store_dir.as_str()),
            store_dir,
            state: directory(env, "NIX_STATE_DIR", "/nix/var/nix")?,
            log: directory(env, "NIX_LOG_DIR", "/nix/var/log/nix")?,
        };
        let db_dir = directory_or(env, "NIX_DB_DIR", || layout.db())?;
        Ok(Self { layout, db_dir, root: None, read_only: false, is_private: false })
    }

    /// The same store below another root directory.
    fn below(mut self, root: PathBuf) -> Self {
        self.layout = Layout::rooted(self.layout.store_dir, &root);
        self.db_dir = self.layout.db();
        self.root = Some(root);
        self
    }

    pub fn daemon_socket(&self, env: &Env) -> PathBuf {
        match env.get_filled("NIX_DAEMON_SOCKET_PATH") {
            Some(path) => path.into(),
            None => self.layout.state.join("daemon-socket/socket"),
        }
    }
}

/// The logical store directory: `NIX_STORE_DIR`, else `NIX_STORE`, else `/nix/store`.
pub fn store_dir(env: &Env) -> Result<StoreDir, ConfError> {
    let named = ["NIX_STORE_DIR", "NIX_STORE"];
    match named.into_iter().find_map(|name| env.get_filled(name).map(|value| (name, value))) {
        Some((name, value)) => Ok(StoreDir::new(utf8(name, value)?)?),
        None => Ok(StoreDir::new("/nix/store")?),
    }
}

fn directory(env: &Env, name: &'static str, default: &str) -> Result<PathBuf, ConfError> {
    directory_or(env, name, || default.into())
}

fn directory_or(env: &Env, name: &'static str, default: impl FnOnce() -> PathBuf) -> Result<PathBuf, ConfError> {
    let Some(value) = env.get_filled(name) else { return Ok(default()) };
    let clean = canonicalise(value.as_bytes());
    let clean = clean.ok_or_else(|| ConfError::NotAbsolute { name, shown: shown(value) })?;
    Ok(PathBuf::from(OsString::from_vec(clean)))
}

/// The store that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreChoice {
    Local(LocalStore),
    /// The daemon that listens on this socket.
    Daemon {
        socket: PathBuf,
    },
    /// Anything over ssh, http, s3 and so on.
    Remote {
        uri: String,
    },
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChoiceError {
    #[error("don't know how to open Nix store '{uri}'")]
    Unknown { uri: String },
    #[error("store URI '{uri}' has no absolute path for '{parameter}': '{value}'")]
    NotAbsolute { uri: String, parameter: String, value: String },
    #[error("store URI '{uri}' is not valid: {reason}")]
    Parameter { uri: String, reason: &'static str },
    #[error("cannot open Nix store '{uri}': this works on local stores only")]
    NotLocal { uri: String },
    #[error(transparent)]
    Conf(#[from] ConfError),
}

/// What is found on disk, as far as choosing a store depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "facts are independent of each other")]
pub struct Facts {
    pub state_dir: StateDir,
    pub socket_exists: bool,
    pub is_root: bool,
    /// Does the user want to change the store?
    pub to_write: bool,
    /// Does the user have a store of their own already?
    pub own_exists: bool,
}

/// What we can do with the state directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDir {
    /// Read and write.
    Usable,
    /// It is there, but not for us to write to.
    ReadOnly,
    /// It is not there, and we could make it.
    Creatable,
    /// It is not there, and we cannot make it.
    OutOfReach,
}

impl Facts {
    /// Nothing is known, for where it does not matter.
    pub const NONE: Self = Self {
        state_dir: StateDir::OutOfReach,
        socket_exists: false,
        is_root: false,
        to_write: false,
        own_exists: false,
    };

    pub fn gather(env: &Env, to_write: bool) -> Result<Self, ConfError> {
        let local = LocalStore::from_env(env)?;
        let state = &local.layout.state;
        let state_dir = if may(state, Access::READ_OK | Access::WRITE_OK) {
            StateDir::Usable
        } else if state.exists() {
            StateDir::ReadOnly
        } else if creatable(state) {
            StateDir::Creatable
        } else {
            StateDir::OutOfReach
        };
        Ok(Self {
            state_dir,
            socket_exists: local.daemon_socket(env).exists(),
            is_root: env.is_root,
            to_write,
            own_exists: env.own_root().exists(),
        })
    }
}

/// With the rights the process acts with, as opposed to those of who started it.
fn may(path: &Path, access: Access) -> bool {
    rustix::fs::accessat(rustix::fs::CWD, path, access, AtFlags::EACCESS).is_ok()
}

/// Is the nearest directory above that exists ours to write to?
fn creatable(path: &Path) -> bool {
    let nearest = path.ancestors().skip(1).find(|dir| dir.symlink_metadata().is_ok());
    nearest.is_some_and(|dir| dir.is_dir() && may(dir, Access::WRITE_OK | Access::EXEC_OK))
}

/// Picks the store for a URI, which is the setting `store`.
///
/// A relative directory is taken from the working directory, the only thing looked at here.
pub fn choose(uri: &str, env: &Env, facts: Facts) -> Result<StoreChoice, ChoiceError> {
    let unknown = || ChoiceError::Unknown { uri: uri.to_owned() };
    let (base, query) = uri.split_once('?').unwrap_or((uri, ""));
    match base {
        "" | "auto" => auto(uri, query, env, facts),
        "local" => local(uri, query, env, None),
        "daemon" => Ok(StoreChoice::Daemon { socket: LocalStore::from_env(env)?.daemon_socket(env) }),
        _ if base.starts_with('/') => local(uri, query, env, Some(PathBuf::from(decode(uri, base)?))),
        _ => match base.split_once("://") {
            Some(("unix", path)) if path.starts_with('/') => {
                Ok(StoreChoice::Daemon { socket: decode(uri, path)?.into() })
            }
            Some(("ssh" | "ssh-ng" | "http" | "https" | "file" | "s3" | "dummy", _)) => {
                Ok(StoreChoice::Remote { uri: uri.to_owned() })
            }
            // A relative directory must look like a path.
            None if base.contains('/') => {
                let here = std::path::absolute(decode(uri, base)?).map_err(|_| unknown())?;
                local(uri, query, env, Some(here))
            }
            _ => Err(unknown()),
        },
    }
}

/// Settings, section 7. A user's own store is taken where 2.26 takes one, and also where the store
/// of the system is there, but only to be read: then for whoever wants to change it, and from then on.
fn auto(uri: &str, query: &str, env: &Env, facts: Facts) -> Result<StoreChoice, ChoiceError> {
    let configured = ["NIX_STORE_DIR", "NIX_STORE", "NIX_STATE_DIR", "NIX_LOG_DIR", "NIX_DB_DIR"];
    let configured = configured.into_iter().any(|name| env.get_filled(name).is_some());
    if facts.state_dir == StateDir::Usable {
        local(uri, query, env, None)
    } else if facts.socket_exists {
        Ok(StoreChoice::Daemon { socket: LocalStore::from_env(env)?.daemon_socket(env) })
    } else if !facts.is_root
        && !configured
        && match facts.state_dir {
            StateDir::OutOfReach => true,
            StateDir::ReadOnly => facts.to_write || facts.own_exists,
            StateDir::Usable | StateDir::Creatable => false,
        }
    {
        match local(uri, query, env, Some(env.own_root()))? {
            StoreChoice::Local(store) => Ok(StoreChoice::Local(LocalStore { is_private: true, ..store })),
            other => Ok(other),
        }
    } else {
        local(uri, query, env, None)
    }
}

/// A local store with the parameters of its URI.
fn local(uri: &str, query: &str, env: &Env, root: Option<PathBuf>) -> Result<StoreChoice, ChoiceError> {
    let mut store = LocalStore::from_env(env)?;
    let mut parameters = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        parameters.push((name, decode(uri, value)?));
    }
    let given = |wanted: &str| parameters.iter().rev().find(|(name, _)| *name == wanted).map(|(_, value)| value);
    let directory = |parameter: &str| -> Result<Option<PathBuf>, ChoiceError> {
        let Some(value) = given(parameter).filter(|value| !value.is_empty()) else { return Ok(None) };
        let clean = canonicalise(value.as_bytes()).ok_or_else(|| ChoiceError::NotAbsolute {
            uri: uri.to_owned(),
            parameter: parameter.to_owned(),
            value: value.clone(),
        })?;
        Ok(Some(PathBuf::from(OsString::from_vec(clean))))
    };
    if let Some(dir) = directory("store")? {
        store.layout.store_dir = StoreDir::new(dir.to_string_lossy()).map_err(ConfError::from)?;
        store.layout.real_store = dir;
    }
    if let Some(root) = directory("root")?.or(root) {
        store = store.below(root);
    }
    if let Some(dir) = directory("state")? {
        store.db_dir = dir.join("db");
        store.layout.state = dir;
    }
    if let Some(dir) = directory("log")? {
        store.layout.log = dir;
    }
    if let Some(dir) = directory("real")? {
        store.layout.real_store = dir;
    }
    store.read_only = match given("read-only").map(String::as_str) {
        None | Some("false" | "0" | "no") => false,
        Some("true" | "1" | "yes") => true,
        Some(_) => {
            let reason = "'read-only' must be 'true' or 'false'";
            return Err(ChoiceError::Parameter { uri: uri.to_owned(), reason });
        }
    };
    Ok(StoreChoice::Local(store))
}

/// The names of parameters of a store URI that mean nothing, to warn about: `unknown setting 'x'`.
pub fn unknown_parameters(uri: &str) -> Vec<&str> {
    const KNOWN: [&str; 9] =
        ["root", "store", "state", "log", "real", "read-only", "path-info-cache-size", "trusted", "priority"];
    let query = uri.split_once('?').map_or("", |(_, query)| query);
    let names = query.split('&').map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
    names.filter(|name| !name.is_empty() && !KNOWN.contains(name)).collect()
}

/// Undoes percent-encoding.
fn decode(uri: &str, text: &str) -> Result<String, ChoiceError> {
    let fault = |reason| ChoiceError::Parameter { uri: uri.to_owned(), reason };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes().iter();
    while let Some(byte) = rest.next() {
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(*b).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(fault("'%' needs two hexadecimal digits after it"));
        };
        bytes.push(high << 4 | low);
    }
    String::from_utf8(bytes).map_err(|_| fault("it is not UTF-8 when decoded"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&'static str, &'static str)]) -> Env {
        Env::from_pairs(pairs.iter().copied())
    }

    fn files(env: &Env) -> Vec<String> {
        env.user_conf_files().unwrap().into_iter().map(String::from).collect()
    }

    /// As `nix-store --version -v` of 2.8.0 lists them.
    #[test]
    fn user_files() {
        for (pairs, wanted) in [
            (&[("HOME", "/h")][..], "/h/.config/nix/nix.conf:/etc/xdg/nix/nix.conf"),
            (&[("HOME", "/h"), ("NIX_USER_CONF_FILES", "")], ""),
            (&[("NIX_USER_CONF_FILES", "a:b")], "a:b"),
            (
                &[("HOME", "/h"), ("XDG_CONFIG_DIRS", "/a:/b")],
                "/h/.config/nix/nix.conf:/a/nix/nix.conf:/b/nix/nix.conf",
            ),
            (&[("HOME", "/h"), ("XDG_CONFIG_DIRS", "")], "/h/.config/nix/nix.conf"),
            (&[("HOME", "/h"), ("XDG_CONFIG_HOME", "/q")], "/q/nix/nix.conf:/etc/xdg/nix/nix.conf"),
        ] {
            assert_eq!(files(&env(pairs)).join(":"), wanted, "{pairs:?}");
        }
    }

    fn test_machine() -> Machine {
        Machine { cores: 2, kvm: false, conf_dir: "/c".into(), ..machine(&Env::default(), false).unwrap() }
    }

    fn flag(name: &str, value: &str, from: OverrideFrom) -> Override {
        Override { name: name.into(), value: value.into(), from }
    }

    /// `cores` as each source sets it, from the lowest to the highest precedence.
    #[test]
    fn precedence() {
        let mut pairs = vec![("NIX_USER_CONF_FILES", "/first:/second")];
        let mut files: HashMap<&str, &str> = HashMap::new();
        let mut flags = Vec::new();
        let cores = |pairs: &[(&'static str, &'static str)], files: &HashMap<&str, &str>, flags: &[Override]| {
            let mut read = |path: &Utf8Path| Ok(files.get(path.as_str()).map(|text| text.as_bytes().to_vec()));
            load_with(&env(pairs), flags, test_machine(), &mut read).unwrap().settings.cores
        };
        assert_eq!(cores(&pairs, &files, &flags), 2);
        files.insert("/c/nix.conf", "cores = 3");
        assert_eq!(cores(&pairs, &files, &flags), 3);
        files.insert("/second", "cores = 4");
        assert_eq!(cores(&pairs, &files, &flags), 4);
        files.insert("/first", "cores = 5");
        assert_eq!(cores(&pairs, &files, &flags), 5);
        pairs.push(("NIX_CONFIG", "cores = 6"));
        assert_eq!(cores(&pairs, &files, &flags), 6);
        flags.push(flag("cores", "7", OverrideFrom::Option));
        assert_eq!(cores(&pairs, &files, &flags), 7);
        flags.push(flag("cores", "8", OverrideFrom::Flag));
        assert_eq!(cores(&pairs, &files, &flags), 8);
        flags.push(flag("cores", "x", OverrideFrom::Option));
        assert_eq!(cores(&pairs, &files, &flags), 8, "a bad option is a warning");
    }

    #[test]
    fn the_environment_stands_for_defaults() {
        let pairs = [("NIX_REMOTE", "daemon"), ("NIX_REMOTE_SYSTEMS", "/m1:/m2"), ("NIX_IGNORE_SYMLINK_STORE", "1")];
        let mut read = |path: &Utf8Path| Ok((path == "/c/nix.conf").then(|| b"builders =".to_vec()));
        let settings = load_with(&env(&pairs), &[], test_machine(), &mut read).unwrap().settings;
        assert_eq!(settings.get("store").as_deref(), Some("daemon"));
        assert_eq!(settings.get("builders").as_deref(), Some(""));
        assert_eq!(settings.get("allow-symlinked-store").as_deref(), Some("true"));
    }

    #[test]
    fn bad_values() {
        let load = |pairs: &[(&'static str, &'static str)], flags: &[Override]| {
            load_with(&env(pairs), flags, test_machine(), &mut |_| Ok(None))
        };
        let error = load(&[("NIX_CONFIG", "cores = x")], &[]).unwrap_err();
        assert_eq!(error.to_string(), "setting 'cores' has invalid value 'x'");
        load(&[], &[flag("http-connections", "x", OverrideFrom::Flag)]).unwrap_err();
        let found = load(&[], &[flag("zork", "1", OverrideFrom::Option)]).unwrap();
        let warnings: Vec<String> = found.warnings.iter().map(ToString::to_string).collect();
        assert_eq!(warnings, ["unknown setting 'zork'"]);
    }

    /// One line for a choice.
    fn told(uri: &str, pairs: &[(&'static str, &'static str)], facts: Facts) -> String {
        match choose(uri, &env(pairs), facts) {
            Ok(StoreChoice::Local(s)) => format!(
                "local {} at {}, state {}, log {}{}{}",
                s.layout.store_dir,
                s.layout.real_store.display(),
                s.layout.state.display(),
                s.layout.log.display(),
                if s.is_private { ", private" } else { "" },
                if s.read_only { ", read-only" } else { "" },
            ),
            Ok(StoreChoice::Daemon { socket }) => format!("daemon {}", socket.display()),
            Ok(StoreChoice::Remote { uri }) => format!("remote {uri}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn auto_depends_on_what_is_there() {
        let plain = "local /nix/store at /nix/store, state /nix/var/nix, log /nix/var/log/nix";
        let private = "local /nix/store at /h/.local/share/larder/root/nix/store, \
            state /h/.local/share/larder/root/nix/var/nix, log /h/.local/share/larder/root/nix/var/log/nix, private";
        let home = &[("HOME", "/h")];
        let seen = |state_dir| Facts { state_dir, ..Facts::NONE };
        let socket = |state_dir| Facts { socket_exists: true, to_write: true, ..seen(state_dir) };
        let daemon = "daemon /nix/var/nix/daemon-socket/socket";
        assert_eq!(told("", home, socket(StateDir::Usable)), plain);
        for state_dir in [StateDir::ReadOnly, StateDir::Creatable, StateDir::OutOfReach] {
            assert_eq!(told("auto", home, socket(state_dir)), daemon);
        }
        assert_eq!(told("auto", home, seen(StateDir::ReadOnly)), plain, "one may ask a store that one cannot change");
        let read_only = seen(StateDir::ReadOnly);
        assert_eq!(told("auto", home, Facts { to_write: true, ..read_only }), private);
        assert_eq!(told("auto", home, Facts { own_exists: true, ..read_only }), private, "it stays the same store");
        assert_eq!(told("auto", home, Facts { to_write: true, is_root: true, ..read_only }), plain);
        assert_eq!(told("auto", home, seen(StateDir::Creatable)), plain);
        assert_eq!(told("auto", home, seen(StateDir::OutOfReach)), private);
        assert_eq!(told("auto", home, Facts { is_root: true, ..Facts::NONE }), plain);
        assert_eq!(told("local", home, Facts::NONE), plain);
        let configured = told("", &[("HOME", "/h"), ("NIX_STATE_DIR", "/s/")], Facts::NONE);
        assert_eq!(configured, "local /nix/store at /nix/store, state /s, log /nix/var/log/nix");
        let xdg = told("", &[("XDG_DATA_HOME", "/d")], Facts::NONE);
        assert!(xdg.starts_with("local /nix/store at /d/larder/root/nix/store"), "{xdg}");
    }

    #[test]
    fn uris() {
        let below = |root: &str| {
            format!("local /nix/store at {root}/nix/store, state {root}/nix/var/nix, log {root}/nix/var/log/nix")
        };
        for (uri, wanted) in [
            ("local?root=/r", below("/r")),
            ("local?root=/r%20s/", below("/r s")),
            ("/r", below("/r")),
            ("auto?root=/r", below("/r")),
            (
                "local?root=/r&store=/x/store&state=/s&log=/l&real=/p",
                "local /x/store at /p, state /s, log /l".to_owned(),
            ),
            ("local?store=/x", "local /x at /x, state /nix/var/nix, log /nix/var/log/nix".to_owned()),
            ("local?read-only=true&root=/r", format!("{}, read-only", below("/r"))),
            ("daemon", "daemon /nix/var/nix/daemon-socket/socket".to_owned()),
            ("unix:///run/s", "daemon /run/s".to_owned()),
            ("ssh://h", "remote ssh://h".to_owned()),
            ("https://cache.example?x=1", "remote https://cache.example?x=1".to_owned()),
            ("zork", "don't know how to open Nix store 'zork'".to_owned()),
            ("foo://x", "don't know how to open Nix store 'foo://x'".to_owned()),
            ("local://x", "don't know how to open Nix store 'local://x'".to_owned()),
            ("local?root=r", "store URI 'local?root=r' has no absolute path for 'root': 'r'".to_owned()),
            (
                "local?root=%2",
                "store URI 'local?root=%2' is not valid: '%' needs two hexadecimal digits after it".to_owned(),
            ),
            (
                "local?read-only=x",
                "store URI 'local?read-only=x' is not valid: 'read-only' must be 'true' or 'false'".to_owned(),
            ),
        ] {
            let facts = Facts { state_dir: StateDir::Usable, ..Facts::NONE };
            assert_eq!(told(uri, &[("HOME", "/h")], facts), wanted, "{uri}");
        }
        assert_eq!(unknown_parameters("local?root=/r&zork=1&x"), ["zork", "x"]);
    }

    #[test]
    fn directories_from_the_environment() {
        let pairs = &[("NIX_STORE", "/s//store/"), ("NIX_STATE_DIR", "/v"), ("NIX_LOG_DIR", "/l")];
        let store = LocalStore::from_env(&env(pairs)).unwrap();
        assert_eq!(store.layout.store_dir.as_str(), "/s/store");
        assert_eq!(store.db_dir, Path::new("/v/db"));
        assert_eq!(store_dir(&env(&[("NIX_STORE", "/a"), ("NIX_STORE_DIR", "/b")])).unwrap().as_str(), "/b");
        let relative = LocalStore::from_env(&env(&[("NIX_STATE_DIR", "rel")])).unwrap_err();
        assert_eq!(relative.to_string(), "not an absolute path: 'rel', the value of NIX_STATE_DIR");
        LocalStore::from_env(&env(&[("NIX_STORE_DIR", "rel")])).unwrap_err();
        LocalStore::from_env(&env(&[("NIX_STORE_DIR", "/")])).unwrap_err();
    }

    #[test]
    fn a_missing_file_has_no_settings() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read_conf(&dir.path().join("none")).unwrap(), None);
        std::fs::write(dir.path().join("nix.conf"), "cores = 1\n").unwrap();
        assert_eq!(read_conf(&dir.path().join("nix.conf")).unwrap().as_deref(), Some(&b"cores = 1\n"[..]));
        assert_eq!(read_conf(&dir.path().join("nix.conf/x")).unwrap(), None);
        read_conf(dir.path()).unwrap_err();
    }
}
