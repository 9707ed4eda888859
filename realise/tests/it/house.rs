//! A store of its own for each test, and derivations to build in it.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::modulo::{Mask, Memo};
use larder_core::derivation::{Derivation, Output, OutputName};
use larder_core::hash::Hash;
use larder_core::path_info::PathInfo;
use larder_core::report::{Level, Reporter};
use larder_core::settings::{Machine, Os, Sandbox, Settings};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};
use larder_fs::layout::{Access, Layout};
use larder_fs::users::Users;
use larder_realise::build::{self, BuildSettings};
use larder_realise::job::{Failure, FailureKind, Job, Mode, Outcome, Watch};
use larder_sandbox::launch::Launcher;
use larder_store::{LocalStore, Options};
use tempfile::TempDir;

/// The group of the build users of these tests; no account has such ids.
pub(crate) const GROUP: u32 = 30_600;
/// Each house has its own users, since each has its own pool of locks: else they would kill each
/// other's processes. Other processes of these tests have other users.
fn first_uid() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    1_000_000 + (std::process::id() % 10_000) * 1000 + NEXT.fetch_add(1, Ordering::Relaxed) * 4
}

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Says so where a test cannot run.
pub(crate) fn root_or_skip(test: &str) -> bool {
    if !is_root() {
        println!("{test}: skipped, needs root");
    }
    is_root()
}

/// Keeps what is said.
#[derive(Default)]
pub(crate) struct Said(Mutex<Vec<(Level, String)>>);

impl Reporter for Said {
    fn shows(&self, _level: Level) -> bool {
        true
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.0.lock().unwrap().push((level, text.to_string()));
    }
}

/// Keeps what a builder writes.
#[derive(Default)]
pub(crate) struct Seen {
    log: Mutex<Vec<u8>>,
    pub(crate) cancelled: AtomicBool,
}

impl Watch for Seen {
    fn log(&self, bytes: &[u8]) {
        self.log.lock().unwrap().extend_from_slice(bytes);
    }
    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }
}

pub(crate) struct House {
    root: PathBuf,
    /// Who made the directory deletes it.
    dir: Option<TempDir>,
    pub(crate) store: LocalStore,
    pub(crate) settings: BuildSettings,
    said: Arc<Said>,
    pub(crate) seen: Seen,
    pub(crate) first_uid: u32,
}

impl Drop for House {
    fn drop(&mut self) {
        // An ordinary user cannot delete what is canonical before its modes are changed.
        if self.dir.is_some() {
            drop(larder_fs::remove::remove_path(&self.root, larder_fs::remove::OnFailure::Continue));
        }
    }
}

/// A derivation before its output paths are known.
#[derive(Clone)]
pub(crate) struct Recipe {
    pub(crate) name: String,
    pub(crate) outputs: Vec<String>,
    pub(crate) script: String,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) sources: BTreeSet<StorePath>,
    pub(crate) fixed: Option<(Method, Hash)>,
    pub(crate) system: String,
    pub(crate) builder: String,
}

pub(crate) fn recipe(name: &str, script: &str) -> Recipe {
    let path = "/usr/bin:/bin:/usr/sbin:/sbin".to_owned();
    Recipe {
        name: name.into(),
        outputs: vec!["out".into()],
        script: script.into(),
        env: BTreeMap::from([("PATH".into(), path)]),
        sources: BTreeSet::new(),
        fixed: None,
        system: "x86_64-linux".into(),
        builder: "/bin/sh".into(),
    }
}

impl Recipe {
    pub(crate) fn outputs(mut self, names: &[&str]) -> Self {
        self.outputs = names.iter().map(|name| (*name).to_owned()).collect();
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    pub(crate) fn source(mut self, path: &StorePath) -> Self {
        self.sources.insert(path.clone());
        self
    }

    pub(crate) fn fixed(mut self, method: Method, hash: Hash) -> Self {
        self.fixed = Some((method, hash));
        self
    }
}

fn machine() -> Machine {
    Machine {
        cores: 2,
        root: is_root(),
        system: "x86_64-linux".into(),
        extra_platforms: BTreeSet::new(),
        os: Os::Linux,
        kvm: false,
        conf_dir: "/nonexistent".into(),
        build_hook: String::new(),
    }
}

impl House {
    /// With build users if we are root, and in a sandbox if that is wanted.
    pub(crate) fn new(sandbox: Sandbox) -> Self {
        Self::with(sandbox, |_| {})
    }

    pub(crate) fn with(sandbox: Sandbox, change: impl FnOnce(&mut Settings)) -> Self {
        let dir = tempfile::Builder::new().prefix("larder-build-").tempdir().unwrap();
        // Builders have to get through.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("tmp")).unwrap();
        std::fs::write(at("group"), format!("lbuild:x:{GROUP}:lb1,lb2,lb3,lb4\n")).unwrap();
        let first_uid = first_uid();
        std::fs::write(at("first-uid"), first_uid.to_string()).unwrap();
        let passwd: Vec<String> =
            (0..4).map(|n| format!("lb{}:x:{}:{GROUP}::/:/bin/false", n + 1, first_uid + n)).collect();
        std::fs::write(at("passwd"), passwd.join("\n")).unwrap();
        let mut house = Self::open(dir.path(), sandbox, change);
        house.dir = Some(dir);
        house
    }

    /// A house that is there already.
    pub(crate) fn open(root: &Path, sandbox: Sandbox, change: impl FnOnce(&mut Settings)) -> Self {
        let at = |name: &str| root.join(name);
        let first_uid = std::fs::read_to_string(at("first-uid")).unwrap().parse().unwrap();
        let layout = Layout {
            store_dir: StoreDir::new(at("store").to_str().unwrap()).unwrap(),
            real_store: at("store"),
            state: at("var"),
            log: at("log"),
        };
        let said = Arc::new(Said::default());
        let reporter: Arc<dyn Reporter + Send + Sync> = said.clone();
        let options = Options { sync: false, ..Options::default() };
        let store = LocalStore::open(layout, options, Access::ReadWrite, reporter).unwrap();
        if is_root() {
            // As it is where the store knows of build users.
            std::os::unix::fs::chown(at("store"), None, Some(GROUP)).unwrap();
            std::fs::set_permissions(at("store"), PermissionsExt::from_mode(0o1775)).unwrap();
        }
        let mut values = Settings::new(&machine());
        values.sandbox = sandbox;
        values.sandbox_fallback = false;
        values.build_users_group = if is_root() { "lbuild".into() } else { String::new() };
        values.sandbox_paths =
            ["/bin?", "/lib?", "/lib32?", "/lib64?", "/usr?"].into_iter().map(str::to_owned).collect();
        change(&mut values);
        let launcher = Launcher::new(env!("CARGO_BIN_EXE_larder-realise-launcher"));
        let mut settings = BuildSettings::new(Arc::new(values), launcher);
        settings.temp_dir = at("tmp");
        settings.users = Users::from_files(at("passwd"), at("group"));
        Self { root: root.to_owned(), dir: None, store, settings, said, seen: Seen::default(), first_uid }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(crate) fn values(&mut self) -> &mut Settings {
        Arc::make_mut(&mut self.settings.values)
    }

    /// The derivation and its path, with its outputs computed as real Nix does.
    pub(crate) fn derivation(&self, recipe: &Recipe) -> (StorePath, Derivation) {
        let store_dir = self.store.dir();
        let name = Name::new(&recipe.name).unwrap();
        let mut env: BTreeMap<_, _> = recipe.env.iter().map(|(k, v)| (k.as_str().into(), v.as_str().into())).collect();
        env.insert("name".into(), recipe.name.as_str().into());
        let names = recipe.outputs.iter().map(|name| OutputName::new(name).unwrap());
        let mut drv = Derivation {
            name: name.clone(),
            outputs: names.map(|name| (name, Output::Deferred)).collect(),
            input_drvs: BTreeMap::new(),
            input_srcs: recipe.sources.clone(),
            system: recipe.system.clone(),
            builder: recipe.builder.as_str().into(),
            args: if recipe.builder.starts_with("builtin:") {
                Vec::new()
            } else {
                vec!["-c".into(), recipe.script.as_str().into()]
            },
            env,
        };
        for output in &recipe.outputs {
            drv.env.insert(output.as_str().into(), "".into());
        }
        if let Some((method, hash)) = recipe.fixed {
            let address = ContentAddress::Fixed(method, hash);
            let output = Output::fixed(store_dir, &name, &OutputName::out(), address).unwrap();
            drv.outputs.insert(OutputName::out(), output);
        } else {
            let never = |_: &StorePath| -> Result<Derivation, std::io::Error> { unreachable!("no inputs") };
            let modulo = Memo::new().modulo(store_dir, &drv, Mask::On, never).unwrap();
            for (output, value) in &mut drv.outputs {
                let path = store_dir.make_output_path(output.as_str(), &modulo.digest, &name).unwrap();
                *value = Output::InputAddressed(path);
            }
        }
        let paths: Vec<_> =
            drv.output_paths().map(|(name, path)| (name.to_string(), store_dir.full(path.unwrap()))).collect();
        for (name, path) in paths {
            drv.env.insert(name.into(), path.into());
        }
        (drv.path(store_dir).unwrap(), drv)
    }

    pub(crate) fn job(&self, recipe: &Recipe, mode: Mode) -> Job {
        let (drv_path, drv) = self.derivation(recipe);
        Job { wanted: drv.outputs.keys().cloned().collect(), wants_all: true, drv_path, drv, mode }
    }

    pub(crate) fn run(&self, recipe: &Recipe, mode: Mode) -> Outcome {
        let job = self.job(recipe, mode);
        build::run(&self.store, &self.settings, &job, &self.seen)
    }

    /// Builds; the path of `out`.
    pub(crate) fn build(&self, recipe: &Recipe) -> StorePath {
        match self.run(recipe, Mode::Normal) {
            Outcome::Built { outputs } => outputs[&OutputName::out()].clone(),
            other => panic!("{other:?}\n{}", self.log()),
        }
    }

    /// Fails to build; nothing is left.
    pub(crate) fn fail(&self, recipe: &Recipe, mode: Mode) -> Failure {
        let failure = match self.run(recipe, mode) {
            Outcome::Failed(failure) => failure,
            other => panic!("{other:?}\n{}", self.log()),
        };
        if mode == Mode::Normal {
            for (_, path) in self.derivation(recipe).1.output_paths() {
                assert!(!self.store.is_valid(path.unwrap()).unwrap());
            }
        }
        self.check_nothing_left();
        failure
    }

    /// Fails with this text and kind, in which `{drv}` and output names stand for paths.
    pub(crate) fn fails(&self, recipe: &Recipe, mode: Mode, kind: FailureKind, text: &str) {
        let failure = self.fail(recipe, mode);
        let (drv_path, drv) = self.derivation(recipe);
        let mut text = text.replace("{drv}", &self.store.dir().full(&drv_path));
        for (name, path) in drv.output_paths() {
            text = text.replace(&format!("{{{name}}}"), &self.store.dir().full(path.unwrap()));
        }
        assert_eq!(failure.text, text, "{}", self.log());
        assert_eq!(failure.kind, kind);
    }

    /// No build directory, sandbox, journal, temporary object or process is left.
    pub(crate) fn check_nothing_left(&self) {
        assert_eq!(names(&self.path("tmp")), [""; 0]);
        assert_eq!(names(&self.path("var/larder/builds")), [""; 0]);
        let odd: Vec<String> = names(&self.path("store"))
            .into_iter()
            .filter(|name| name != ".links" && !name.contains(".lock"))
            .filter(|name| {
                let path = StorePath::from_base_name(name.as_bytes());
                !path.is_ok_and(|path| self.store.is_valid(&path).unwrap())
            })
            .collect();
        assert_eq!(odd, [""; 0]);
    }

    pub(crate) fn info(&self, path: &StorePath) -> PathInfo {
        self.store.info(path).unwrap()
    }

    pub(crate) fn real(&self, path: &StorePath) -> PathBuf {
        self.store.layout().real_path(path)
    }

    pub(crate) fn text(&self, path: &StorePath) -> String {
        std::fs::read_to_string(self.real(path)).unwrap()
    }

    /// What builders wrote so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&self.seen.log.lock().unwrap()).into_owned()
    }

    pub(crate) fn said(&self) -> String {
        let said = self.said.0.lock().unwrap();
        said.iter().flat_map(|(_, text)| [text.as_str(), "\n"]).collect()
    }
}

pub(crate) fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Both ways to build, with their names.
pub(crate) const WAYS: [Sandbox; 2] = [Sandbox::On, Sandbox::Off];
