//! `ssh` as the way to a program on another machine. Source: protocols, section 4.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::address::Address;

/// How long the program over there may take to end once it has been told everything.
const END: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SshError {
    #[error("cannot start '{program}'")]
    Start { program: String, source: io::Error },
    #[error("cannot write the host key of '{host}' for ssh to read")]
    HostKey { host: String, source: io::Error },
    #[error("the host key of '{host}' is not in base 64")]
    Base64 { host: String },
}

/// A program that runs over there.
#[derive(Debug)]
pub struct Ssh {
    child: Child,
    input: ChildStdout,
    output: ChildStdin,
    known_hosts: Option<tempfile::NamedTempFile>,
}

impl Ssh {
    /// Starts it; `options` are further words for `ssh` (`NIX_SSHOPTS`). What it complains of goes
    /// to `errors`.
    pub fn start(address: &Address, options: &str, is_verbose: bool, errors: Stdio) -> Result<Self, SshError> {
        let mut known_hosts = None;
        let command = address.command();
        let mut words: Vec<String>;
        if address.host == "localhost" {
            // The rule of Nix: this machine needs no login.
            words = vec!["bash".into(), "-c".into(), command.join(" ")];
        } else {
            words = vec!["ssh".into(), address.host.clone(), "-x".into(), "-a".into()];
            words.extend(options.split_whitespace().map(str::to_owned));
            if let Some(key) = &address.key {
                words.extend(["-i".to_owned(), key.clone()]);
            }
            if let Some(key) = &address.host_key {
                let file = host_key_file(address, key)?;
                words.push(format!("-oUserKnownHostsFile={}", file.path().display()));
                known_hosts = Some(file);
            }
            if address.compress {
                words.push("-C".into());
            }
            if is_verbose {
                words.push("-v".into());
            }
            words.push("--".into());
            words.extend(command);
        }
        Self::spawn(&words, &[], errors, known_hosts)
    }

    /// Starts another program that serves a store of this machine, with some variables.
    pub fn start_program(words: &[String], variables: &[(&str, OsString)], errors: Stdio) -> Result<Self, SshError> {
        Self::spawn(words, variables, errors, None)
    }

    /// Starts the program for a store of this machine: it is its own process that cares for it. That
    /// one has the same settings, but builds itself.
    pub fn start_here(uri: &str, errors: Stdio) -> Result<Self, SshError> {
        let program = ["/proc/self/exe", "nix-store", "--serve", "--write", "--store", uri];
        let words = program.into_iter().chain(["--max-jobs", "1", "--builders", ""]);
        Self::spawn(&words.map(str::to_owned).collect::<Vec<_>>(), &[], errors, None)
    }

    fn spawn(
        words: &[String],
        variables: &[(&str, OsString)],
        errors: Stdio,
        known_hosts: Option<tempfile::NamedTempFile>,
    ) -> Result<Self, SshError> {
        let (program, words) = words.split_first().expect("there is a program in both cases");
        let start = |source| SshError::Start { program: program.clone(), source };
        let mut command = Command::new(program);
        command.args(words).envs(variables.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().map_err(start)?;
        match (child.stdout.take(), child.stdin.take()) {
            (Some(input), Some(output)) => Ok(Self { child, input, output, known_hosts }),
            _ => Err(start(io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Something to end it with, whatever it does. Linux before 5.3 has none.
    pub fn handle(&self) -> Option<Arc<OwnedFd>> {
        let id = Pid::from_raw(i32::try_from(self.child.id()).ok()?)?;
        // It is not waited for yet, so the number is its own.
        pidfd_open(id, PidfdFlags::empty()).ok().map(Arc::new)
    }

    /// What it says, and what it is told; it ends with both.
    pub fn into_ends(self) -> (impl Read + Send + 'static, impl Write + Send + 'static) {
        let output = Output { child: self.child, pipe: Some(self.output), _known_hosts: self.known_hosts };
        (self.input, output)
    }
}

/// A file in which `ssh` finds this key for the host.
fn host_key_file(address: &Address, key: &str) -> Result<tempfile::NamedTempFile, SshError> {
    let host = || address.host.clone();
    let decoded = larder_core::hash::decode_base64(key).ok_or_else(|| SshError::Base64 { host: host() })?;
    let write = || {
        let mut file = tempfile::NamedTempFile::new()?;
        let name = address.host.rsplit('@').next().unwrap_or_default();
        file.write_all(name.as_bytes())?;
        file.write_all(b" ")?;
        file.write_all(&decoded)?;
        file.write_all(b"\n")?;
        file.flush()?;
        Ok(file)
    };
    write().map_err(|source| SshError::HostKey { host: host(), source })
}

/// The way to the program, which ends when nothing more comes.
struct Output {
    child: Child,
    pipe: Option<ChildStdin>,
    _known_hosts: Option<tempfile::NamedTempFile>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pipe.as_mut().map_or(Ok(0), |pipe| pipe.write(bytes))
    }
    fn flush(&mut self) -> io::Result<()> {
        self.pipe.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.pipe = None;
        let since = Instant::now();
        while since.elapsed() < END {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                _ => return,
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
