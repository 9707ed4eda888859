//! Tests that are run again in other circumstances, by this program executing itself.

use std::path::Path;
use std::process::{Command, Output};

use crate::house::{LAUNCHER_VARIABLE, is_root, launcher};

/// Set where a test is run in circumstances made for it.
const INNER: &str = "LARDER_SANDBOX_INNER";

/// An ordinary user: nobody.
pub(crate) const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

/// This program and its launcher, where everyone can read them.
struct Copy {
    dir: tempfile::TempDir,
}

impl Copy {
    fn new() -> Self {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o1777)).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), dir.path().join("tests")).unwrap();
        std::fs::copy(launcher().program, dir.path().join("launcher")).unwrap();
        Self { dir }
    }

    /// The program, with words before it that change its circumstances.
    fn command(&self, before: &[&str]) -> Command {
        let tests = self.dir.path().join("tests");
        let mut words: Vec<&std::ffi::OsStr> = before.iter().map(std::convert::AsRef::as_ref).collect();
        words.push(tests.as_os_str());
        let (program, arguments) = words.split_first().unwrap();
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env(LAUNCHER_VARIABLE, self.dir.path().join("launcher"))
            .env("TMPDIR", self.dir.path())
            .env("RUST_BACKTRACE", "0")
            .current_dir("/");
        command
    }
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

/// Are we in the circumstances that the test of that name made?
pub(crate) fn is_inner(test: &str) -> bool {
    std::env::var_os(INNER).is_some_and(|inner| inner == test)
}

/// Runs one test of this program in other circumstances; what it said.
pub(crate) fn run_inner(test: &str, before: &[&str]) -> String {
    let copy = Copy::new();
    let mut command = copy.command(before);
    let output = command.args([test, "--exact", "--nocapture"]).env(INNER, test).output().unwrap();
    let said = said(&output);
    assert!(output.status.success(), "{test} in other circumstances: {said}");
    assert!(said.contains("1 passed"), "there is no test {test}: {said}");
    said
}

/// Is there such a program?
pub(crate) fn has(program: &str) -> bool {
    let found = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"].iter().any(|dir| Path::new(dir).join(program).exists());
    if !found {
        eprintln!("skipped: there is no '{program}'");
    }
    found
}

/// Everything that does not need root, as a user without any rights.
#[test]
fn everything_as_an_ordinary_user() {
    if !is_root() || std::env::var_os(INNER).is_some() || !has("setpriv") {
        return;
    }
    let copy = Copy::new();
    let output = copy.command(&AS_NOBODY).env(INNER, "user").output().unwrap();
    assert!(output.status.success(), "as an ordinary user: {}", said(&output));
}
