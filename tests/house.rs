//! A place to live in for one test: a store of its own, an environment of its own.

use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use tempfile::TempDir;

/// The binary under test.
pub const LARDER: &str = env!("CARGO_BIN_EXE_larder");

/// A temporary directory with all directories of a store, known to the programs that it runs.
pub struct House {
    path: PathBuf,
    /// Taken away with it, unless somebody else cares for it.
    _dir: Option<TempDir>,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub stdout: String,
    pub stderr: String,
    /// The exit status; `None` after a signal.
    pub status: Option<i32>,
}

impl House {
    pub fn new() -> Self {
        Self::below(&std::env::temp_dir())
    }

    /// A house in a directory of one's choice.
    pub fn below(parent: &Path) -> Self {
        let dir = tempfile::Builder::new().prefix("larder-house-").tempdir_in(parent).expect("a temporary directory");
        let house = Self { path: dir.path().to_owned(), _dir: Some(dir) };
        house.furnish();
        house
    }

    /// A house at this very place, in a directory of the caller's; what was there is taken away.
    pub fn at(path: &Path) -> Self {
        let _ = Command::new("chmod").args(["-R", "u+w"]).arg(path).stderr(Stdio::null()).status();
        let _ = std::fs::remove_dir_all(path);
        std::fs::create_dir(path).expect("a place for a house");
        let house = Self { path: path.to_owned(), _dir: None };
        house.furnish();
        house
    }

    fn furnish(&self) {
        for name in ["etc", "home", "work"] {
            std::fs::create_dir(self.path.join(name)).expect("a directory in an empty one");
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The working directory of what is run.
    pub fn work(&self) -> PathBuf {
        self.path().join("work")
    }

    /// Writes a file into the working directory.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.work().join(name);
        std::fs::write(&path, contents).expect("a file in a directory of ours");
        path
    }

    /// A command with the environment of this house.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env_clear().current_dir(self.work());
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        for (name, dir) in [
            ("NIX_STORE_DIR", "store"),
            ("NIX_STATE_DIR", "var"),
            ("NIX_LOG_DIR", "log"),
            ("NIX_CONF_DIR", "etc"),
            ("NIX_DAEMON_SOCKET_PATH", "socket"),
            ("HOME", "home"),
        ] {
            command.env(name, self.path().join(dir));
        }
        command.env("NIX_REMOTE", "").env("NIX_USER_CONF_FILES", "");
        // Machines without build users have a warning for that, and the network is for nobody; no
        // test is about either by chance.
        command.env("NIX_CONFIG", "build-users-group =\nsubstituters =");
        command
    }

    /// The binary under the name of an applet.
    pub fn applet(&self, name: &str) -> Command {
        let mut command = self.command(LARDER);
        command.arg0(name);
        command
    }

    /// An applet on a store that is called `/nix/store` and lies in this house.
    pub fn rooted(&self, applet: &str) -> Command {
        let mut command = self.applet(applet);
        self.as_root_of_its_own(&mut command);
        command
    }

    /// Turns a command to a store that is called `/nix/store` and lies in this house.
    pub fn as_root_of_its_own(&self, command: &mut Command) {
        for name in ["NIX_STORE_DIR", "NIX_STATE_DIR", "NIX_LOG_DIR"] {
            command.env_remove(name);
        }
        command.env("NIX_REMOTE", format!("local?root={}", self.path().join("root").display()));
    }

    /// Runs an applet with these words and nothing on standard input.
    pub fn run(&self, applet: &str, words: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Run {
        run(self.applet(applet).args(words), b"")
    }

    /// The same with a text of words that blanks separate.
    pub fn words(&self, applet: &str, words: &str) -> Run {
        self.run(applet, words.split(' ').filter(|word| !word.is_empty()))
    }

    pub fn feed(&self, applet: &str, words: &str, stdin: &[u8]) -> Run {
        run(self.applet(applet).args(words.split(' ')), stdin)
    }
}

/// Runs a command to its end with this on standard input.
pub fn run(command: &mut Command, stdin: &[u8]) -> Run {
    let output = output(command, stdin);
    Run {
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        status: output.status.code(),
    }
}

/// A build by real Nix, which kills a builder as soon as it has closed its output: bash does that just
/// before it ends, and then the build has failed. So it is tried again.
pub fn built_by_real(build: impl Fn() -> Run) -> Run {
    let mut built = build();
    for _ in 0..5 {
        if !built.stderr.contains("failed due to signal 9") {
            break;
        }
        built = build();
    }
    built
}

/// As [`run`], with the bytes as they are.
pub fn output(command: &mut Command, stdin: &[u8]) -> Output {
    let mut child = spawn(command);
    let mut pipe = child.stdin.take().expect("standard input is a pipe");
    thread::scope(|scope| {
        // A program that reads nothing closes the pipe early; that is no matter.
        scope.spawn(move || drop(pipe.write_all(stdin)));
        child.wait_with_output().expect("a child of ours can be waited for")
    })
}

pub fn spawn(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts")
}

impl Run {
    /// Success, nothing on standard error, and this on standard output.
    #[track_caller]
    pub fn prints(&self, stdout: &str) {
        let wanted = Self { stdout: stdout.to_owned(), stderr: String::new(), status: Some(0) };
        assert_eq!(*self, wanted);
    }

    /// Status 1, nothing on standard output, and this error.
    #[track_caller]
    pub fn fails(&self, error: &str) {
        let wanted = Self { stdout: String::new(), stderr: format!("error: {error}\n"), status: Some(1) };
        assert_eq!(*self, wanted);
    }

    /// The same with the hint that follows a usage error.
    #[track_caller]
    pub fn fails_usage(&self, applet: &str, error: &str) {
        self.fails(&format!("{error}\nTry '{applet} --help' for more information."));
    }
}
