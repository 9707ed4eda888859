//! What the tests of this crate share.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use larder_core::report::{Level, Reporter};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_fs::layout::Layout;

/// A path with a name of its own.
pub(crate) fn path(n: u32) -> StorePath {
    format!("{n:032}-name{n}").parse().unwrap()
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

/// Keeps what it is told.
#[derive(Default)]
pub(crate) struct Told(Mutex<Vec<String>>);

impl Told {
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Reporter for Told {
    fn shows(&self, _level: Level) -> bool {
        true
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.0.lock().unwrap().push(format!("{level:?}: {text}"));
    }
}

/// Runs `f` in a thread that is `nobody`. Only root can do that.
pub(crate) fn unprivileged<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
            let (uid, gid) = (rustix::process::Uid::from_raw(65534), rustix::process::Gid::from_raw(65534));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            f()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

const CHILD: &str = "LARDER_TEST_CHILD";

/// What [`child`] was told, if this process is one.
pub(crate) fn child_argument() -> Option<String> {
    std::env::var(CHILD).ok()
}

/// Starts this test program again for one test only, which sees `argument`. A shell command
/// may go before it.
pub(crate) fn child(test: &str, argument: &str, shell: &str) -> Child {
    let program = std::env::current_exe().unwrap();
    Command::new("sh")
        .args(["-c", &format!("set -- --exact \"$1\" --nocapture --test-threads=1\n{shell}\nexec \"$0\" \"$@\"")])
        .arg(program)
        .arg(test)
        .env(CHILD, argument)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for a child that must succeed.
pub(crate) fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A real Nix, run on the store of a layout.
pub(crate) struct RealNix {
    layout: Layout,
}

impl RealNix {
    /// `None`, with a note, if there is none.
    pub(crate) fn find(test: &str, layout: &Layout) -> Option<Self> {
        let real = Command::new("nix-store").arg("--version").stderr(Stdio::null()).output();
        let version = real.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        if !version.starts_with("nix-store (Nix)") {
            println!("{test}: skipped, no Nix is installed");
            return None;
        }
        Some(Self { layout: layout.clone() })
    }

    /// The standard output of a command that must succeed, without the final newline.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let output = Command::new("nix-store")
            .args(arguments)
            .env("NIX_STORE_DIR", self.layout.store_dir.as_str())
            .env("NIX_STATE_DIR", &self.layout.state)
            .env("NIX_LOG_DIR", &self.layout.log)
            .env("NIX_CONF_DIR", self.layout.state.join("etc"))
            .env("NIX_REMOTE", "")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}
