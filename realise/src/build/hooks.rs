//! Programs of the user that run around builds.
//!
//! Source: building, section 14; modern, section 8.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use larder_core::report::{Level, Reporter};
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use super::failure::signal_name;
use super::tempdir::Owner;
use crate::job::{Failure, FailureKind};

/// `failed with exit code 4`, as messages have it. `None` for success.
pub(super) fn outcome(status: ExitStatus) -> Option<String> {
    match (status.code(), status.signal()) {
        (Some(0), _) => None,
        (Some(code), _) => Some(format!("failed with exit code {code}")),
        (None, Some(signal)) => Some(format!("failed due to signal {signal} ({})", signal_name(signal))),
        (None, None) => Some("died abnormally".into()),
    }
}

fn misc(text: String) -> Failure {
    Failure::new(FailureKind::Misc, text)
}

/// Runs `pre-build-hook`; gives what it adds to the sandbox, as `sandbox-paths` has it.
pub(super) fn pre_build(hook: &str, drv: &str, root: Option<&Path>) -> Result<Vec<String>, Failure> {
    let mut command = Command::new(hook);
    command.arg(drv).stdin(Stdio::null()).stderr(Stdio::inherit());
    if let Some(root) = root {
        command.arg(root);
    }
    let output = command.output().map_err(|e| misc(format!("executing '{hook}': {e}")))?;
    if let Some(how) = outcome(output.status) {
        return Err(misc(format!("program '{hook}' {how}")));
    }
    parse_pre_build(&String::from_utf8_lossy(&output.stdout))
}

/// `extra-sandbox-paths`, then a path a line until an empty line.
fn parse_pre_build(text: &str) -> Result<Vec<String>, Failure> {
    let mut paths = Vec::new();
    let mut within = false;
    for line in text.lines() {
        match (within, line) {
            (false, "extra-sandbox-paths" | "extra-chroot-dirs") => within = true,
            (false, other) => return Err(misc(format!("unknown pre-build hook command '{other}'"))),
            (true, "") => within = false,
            (true, path) => paths.push(path.to_owned()),
        }
    }
    Ok(paths)
}

/// Runs `post-build-hook` for outputs that are valid now.
pub(super) fn post_build(
    settings: &Settings,
    dir: &StoreDir,
    reporter: &dyn Reporter,
    drv: &StorePath,
    outputs: &BTreeSet<StorePath>,
    environment: &BTreeMap<Vec<u8>, Vec<u8>>,
) -> Result<(), Failure> {
    let hook = settings.post_build_hook.as_str();
    if hook.is_empty() {
        return Ok(());
    }
    reporter.message(Level::Talkative, format_args!("running post-build-hook '{hook}'..."));
    let config: Vec<String> = settings.show().map(|(name, value)| format!("{name} = {value}")).collect();
    let paths: Vec<String> = outputs.iter().map(|path| dir.full(path)).collect();
    let (reader, writer) = std::io::pipe().map_err(|e| misc(format!("creating pipe: {e}")))?;
    let second = writer.try_clone().map_err(|e| misc(format!("creating pipe: {e}")))?;
    let mut command = Command::new(hook);
    command.env_clear();
    command.envs(environment.iter().map(|(k, v)| (OsString::from_vec(k.clone()), OsString::from_vec(v.clone()))));
    command.env("DRV_PATH", dir.full(drv)).env("OUT_PATHS", paths.join(" ")).env("NIX_CONFIG", config.join("\n"));
    command.stdin(Stdio::null()).stdout(writer).stderr(second);
    let mut child = command.spawn().map_err(|e| misc(format!("executing '{hook}': {e}")))?;
    // The writing ends must be the child's alone.
    drop(command);
    for line in BufReader::new(reader).split(b'\n') {
        let Ok(line) = line else { break };
        reporter.message(Level::Error, format_args!("post-build-hook: {}", String::from_utf8_lossy(&line)));
    }
    let status = child.wait().map_err(|e| misc(format!("waiting for '{hook}': {e}")))?;
    match outcome(status) {
        None => Ok(()),
        Some(how) => Err(misc(format!("program '{hook}' {how}"))),
    }
}

/// Runs `diff-hook` on two outputs that should be equal, as the build user. Failures are told.
pub(super) fn diff(settings: &Settings, reporter: &dyn Reporter, words: [&OsStr; 4], user: Option<Owner>) {
    let Some(hook) = settings.diff_hook.get().filter(|_| settings.run_diff_hook) else { return };
    let mut command = Command::new(hook);
    command.args(words).current_dir("/").stdin(Stdio::null());
    if let Some(Owner { uid, gid }) = user {
        command.uid(uid).gid(gid);
    }
    let failed = match command.output() {
        Err(e) => format!("executing '{hook}': {e}"),
        Ok(output) => {
            let Some(how) = outcome(output.status) else {
                let text = String::from_utf8_lossy(&output.stdout);
                if !text.is_empty() {
                    reporter.message(Level::Error, format_args!("{}", text.trim_end_matches('\n')));
                }
                return;
            };
            format!("diff-hook program '{hook}' {how}")
        }
    };
    reporter.message(Level::Error, format_args!("diff hook execution failed: {failed}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_pre_build_hook_says() {
        let parse = |text| parse_pre_build(text).map_err(|failure| failure.text);
        assert_eq!(parse("").unwrap(), [""; 0]);
        assert_eq!(parse("extra-sandbox-paths\n/a\n/b=/c\n\nextra-chroot-dirs\n/d\n").unwrap(), ["/a", "/b=/c", "/d"]);
        assert_eq!(parse("zork\n").unwrap_err(), "unknown pre-build hook command 'zork'");
    }
}
