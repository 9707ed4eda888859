//! What the tests of this crate share.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use larder_core::store_dir::StoreDir;
use rustix::fs::{Mode, OFlags};

use crate::layout::Layout;

pub(crate) const NOBODY: u32 = 65534;

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// For tests that only root can do: says so and gives `false` to others.
pub(crate) fn root_or_skip(test: &str) -> bool {
    if !is_root() {
        println!("{test}: skipped, needs root");
    }
    is_root()
}

pub(crate) fn open(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// Runs `f` in a thread that has no privileges. For others than root it has none anyway.
pub(crate) fn unprivileged<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    if !is_root() {
        return f();
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
            let (uid, gid) = (rustix::process::Uid::from_raw(NOBODY), rustix::process::Gid::from_raw(NOBODY));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            f()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Gives a tree to the user of [`unprivileged`].
pub(crate) fn give_away(path: &Path) {
    if is_root() {
        std::os::unix::fs::lchown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
}

/// A temporary directory that everybody may enter.
pub(crate) fn public_dir() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// A temporary directory in memory, where there is such a place; some disks take minutes.
pub(crate) fn memory_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

const CHILD: &str = "LARDER_TEST_CHILD";

/// What [`child`] was told, if this process is one.
pub(crate) fn child_argument() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// Starts this test program again for one test only, which sees `argument`. A shell command
/// may go before it (`ulimit`).
pub(crate) fn child(test: &str, argument: &str, shell: &str) -> Child {
    let program = std::env::current_exe().unwrap();
    Command::new("sh")
        .args(["-c", &format!("{shell}\nexec \"$0\" --exact \"$1\" --nocapture --test-threads=1")])
        .arg(program)
        .arg(test)
        .env(CHILD, argument)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for a child that must succeed.
pub(crate) fn finish(child: Child) -> String {
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

/// A layout below `dir`, nothing of it made.
pub(crate) fn layout(dir: &Path) -> Layout {
    let store = dir.join("store");
    Layout {
        store_dir: StoreDir::new(store.to_str().unwrap()).unwrap(),
        real_store: store,
        state: dir.join("var"),
        log: dir.join("log"),
    }
}

/// A real Nix, run on the store of a layout. `None`, with a note, if there is none.
pub(crate) struct RealNix {
    layout: Layout,
    _no_deep_trees: RwLockReadGuard<'static, ()>,
}

/// A real collector gives up if any process has a directory open whose path is too long to be
/// told ("reading symlink: File name too long").
static DEEP_TREES: RwLock<()> = RwLock::new(());

/// While this is held, deep directories may be open, and no real Nix runs.
pub(crate) fn deep_trees() -> RwLockWriteGuard<'static, ()> {
    DEEP_TREES.write().unwrap_or_else(PoisonError::into_inner)
}

impl RealNix {
    pub(crate) fn find(test: &str, layout: &Layout) -> Option<Self> {
        let real = Command::new("nix-store").arg("--version").stderr(Stdio::null()).output();
        let version = real.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        if !version.starts_with("nix-store (Nix)") {
            println!("{test}: skipped, no Nix is installed");
            return None;
        }
        let guard = DEEP_TREES.read().unwrap_or_else(PoisonError::into_inner);
        Some(Self { layout: layout.clone(), _no_deep_trees: guard })
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nix-store");
        command
            .args(arguments)
            .env("NIX_STORE_DIR", self.layout.store_dir.as_str())
            .env("NIX_STATE_DIR", &self.layout.state)
            .env("NIX_LOG_DIR", &self.layout.log)
            .env("NIX_CONF_DIR", self.layout.state.join("etc"))
            .env("NIX_REMOTE", "")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The standard output of a command that must succeed, without the final newline.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        for last_try in (0..100).map(|n| n == 99) {
            let output = self.command(arguments).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            // Some process, perhaps another test, has a file open whose path is too long for it.
            if !last_try && !output.status.success() && said.contains("File name too long") {
                std::thread::sleep(std::time::Duration::from_millis(100));
                continue;
            }
            assert!(output.status.success(), "{arguments:?}: {said}");
            return String::from_utf8(output.stdout).unwrap().trim_end().to_owned();
        }
        unreachable!("the last try returns")
    }

    /// Adds a file with the given name and text.
    pub(crate) fn add(&self, name: &str, text: &str) -> larder_core::store_path::StorePath {
        let file = self.layout.state.parent().unwrap().join(name);
        std::fs::write(&file, text).unwrap();
        self.layout.store_dir.parse(self.run(&["--add", file.to_str().unwrap()])).unwrap()
    }
}

/// Waits until something holds, for some seconds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("in ten seconds it never came true: {what}");
}
