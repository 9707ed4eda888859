//! A build hook: the program that knows other machines, and has builds done there.
//!
//! It is asked about one build after another until it takes one; then it serves that one alone,
//! and the next question goes to a new process. Larder's own hook is the program that is running,
//! called by [`WORD`]. Source: building, section 11; protocols, section 6.

use std::ffi::OsString;
use std::io::{self, PipeReader, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use larder_core::report::Level;
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_sandbox::descriptors;
use larder_wire::hook::{self as words, Answer, Order, Try};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process_group};

/// First argument of the program when it is to be the hook.
pub const WORD: &str = "__build-remote";

/// The descriptors of a hook at which the log of a build goes in, and at which it comes out.
pub const LOG_IN: i32 = 4;
pub const LOG_OUT: i32 = 5;

/// How often it is asked whether all is to end.
const TICK: Duration = Duration::from_millis(200);

/// The longest line that a hook may say, in bytes.
const MAX_LINE: usize = 1 << 20;

/// What goes wrong with a hook.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    #[error("cannot start the build hook '{}'", program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("build hook died unexpectedly: {how}")]
    Died { how: String },
    #[error("bad hook reply '{line}'")]
    Reply { line: String },
    #[error("cannot talk to the build hook")]
    Talk(#[source] io::Error),
    #[error("interrupted by the user")]
    Cancelled,
}

/// What a hook says beside answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Message(Level, String),
    /// A line of the log, without its end.
    LogLine(String),
    /// Of no use here.
    Other,
}

/// How a hook is started.
#[derive(Debug, Clone)]
pub struct Program {
    pub path: PathBuf,
    /// What stands before the verbosity.
    pub words: Vec<OsString>,
}

/// A hook that runs.
#[derive(Debug)]
pub struct Hook {
    child: Child,
    /// Until everything is said.
    to: Option<ChildStdin>,
    /// What it says.
    from: PipeReader,
    log: PipeReader,
    /// The beginning of a line whose end has not come.
    begun: Vec<u8>,
}

impl Hook {
    /// Starts it, and tells it the settings.
    pub fn start(program: &Program, dir: &StoreDir, settings: &Settings, verbosity: Level) -> Result<Self, HookError> {
        let start = |source| HookError::Start { program: program.path.clone(), source };
        let (from, replies) = io::pipe().map_err(start)?;
        let (log, log_in) = io::pipe().map_err(start)?;
        let mut command = Command::new(&program.path);
        command.args(&program.words).arg((verbosity as u32).to_string()).current_dir("/").process_group(0);
        // Nobody can be asked for a password.
        command.env_remove("DISPLAY").env_remove("SSH_ASKPASS");
        command.stdin(Stdio::piped()).stdout(replies.try_clone().map_err(start)?).stderr(replies);
        let log_out = OwnedFd::from(log.try_clone().map_err(start)?);
        descriptors::give(&mut command, vec![(log_in.into(), LOG_IN), (log_out, LOG_OUT)]).map_err(start)?;
        let mut child = command.spawn().map_err(start)?;
        // The writing ends are its own alone.
        drop(command);
        let to = child.stdin.take();
        let mut hook = Self { child, to, from, log, begun: Vec::new() };
        let told = hook.tell(&words::settings(dir, settings.show()));
        told.map_err(|_| hook.died())?;
        Ok(hook)
    }

    fn tell(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.as_mut().map_or(Err(io::ErrorKind::BrokenPipe.into()), |to| to.write_all(bytes))
    }

    /// It should be there, and is not.
    fn died(&mut self) -> HookError {
        self.kill();
        let how = match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        HookError::Died { how }
    }

    /// Asks whether it has a certain build done; with [`Answer::Accept`] comes the name of the machine.
    pub fn ask(
        &mut self,
        question: &Try,
        dir: &StoreDir,
        hear: &dyn Fn(Said),
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<(Answer, String), HookError> {
        if self.tell(&question.write(dir)).is_err() {
            return Err(self.died());
        }
        let mut answer = None;
        loop {
            let line = self.line(is_cancelled)?;
            let text = String::from_utf8_lossy(&line).into_owned();
            if let Some(answer) = answer {
                return Ok((answer, text));
            }
            let Some(word) = text.strip_prefix("# ") else {
                match said(&line) {
                    None => hear(Said::Message(Level::Error, text)),
                    Some(said) => hear(said),
                }
                continue;
            };
            match Answer::parse(word) {
                Some(Answer::Accept) => answer = Some(Answer::Accept),
                Some(answer) => return Ok((answer, String::new())),
                None => {
                    self.kill();
                    return Err(HookError::Reply { line: word.to_owned() });
                }
            }
        }
    }

    /// The next line that it says.
    fn line(&mut self, is_cancelled: &dyn Fn() -> bool) -> Result<Vec<u8>, HookError> {
        loop {
            if let Some(line) = cut_line(&mut self.begun) {
                return Ok(line);
            }
            if is_cancelled() {
                self.kill();
                return Err(HookError::Cancelled);
            }
            if wait(&mut [PollFd::new(&self.from, PollFlags::IN)]).map_err(HookError::Talk)? == 0 {
                continue;
            }
            let mut block = [0; 4096];
            match self.from.read(&mut block).map_err(HookError::Talk)? {
                0 => return Err(self.died()),
                n => self.begun.extend_from_slice(block.get(..n).unwrap_or_default()),
            }
        }
    }

    /// Has an accepted build done, and follows it to its end. `log` takes in what the builder says,
    /// and may give up.
    pub fn follow<E: From<HookError>>(
        mut self,
        order: &Order,
        dir: &StoreDir,
        hear: &dyn Fn(Said),
        log: &mut dyn FnMut(&[u8]) -> Result<(), E>,
        is_cancelled: &dyn Fn() -> bool,
    ) -> Result<ExitStatus, E> {
        let talk = |error| E::from(HookError::Talk(error));
        if let Some(mut to) = self.to.take() {
            // It may take a while to read it all, and may never do so; what comes of that is seen below.
            let bytes = order.write(dir);
            let write = move || drop(to.write_all(&bytes));
            std::thread::Builder::new().name("order".to_owned()).spawn(write).map_err(talk)?;
        }
        let mut block = vec![0; 64 << 10];
        let (mut talks, mut logs) = (true, true);
        while talks || logs {
            if is_cancelled() {
                return Err(HookError::Cancelled.into());
            }
            let ready = {
                let mut fds = Vec::with_capacity(2);
                if talks {
                    fds.push(PollFd::new(&self.from, PollFlags::IN));
                }
                if logs {
                    fds.push(PollFd::new(&self.log, PollFlags::IN));
                }
                wait(&mut fds).map_err(talk)?;
                let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
                (talks && ready.next() == Some(true), logs && ready.next() == Some(true))
            };
            if ready.0 {
                let n = self.from.read(&mut block).map_err(talk)?;
                talks = n > 0;
                self.begun.extend_from_slice(block.get(..n).unwrap_or_default());
                while let Some(line) = cut_line(&mut self.begun) {
                    match said(&line) {
                        Some(Said::LogLine(line)) => log(format!("{line}\n").as_bytes())?,
                        Some(said) => hear(said),
                        // What is no message goes nowhere.
                        None => {}
                    }
                }
            }
            if ready.1 {
                let n = self.log.read(&mut block).map_err(talk)?;
                logs = n > 0;
                log(block.get(..n).unwrap_or_default())?;
            }
        }
        loop {
            if let Some(status) = self.child.try_wait().map_err(talk)? {
                return Ok(status);
            }
            if is_cancelled() {
                return Err(HookError::Cancelled.into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it, and what it has started.
    fn kill(&mut self) {
        if let Ok(None) = self.child.try_wait()
            && let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a while until there is something to read; says from how many.
fn wait(fds: &mut [PollFd<'_>]) -> io::Result<usize> {
    let tick = Timespec { tv_sec: 0, tv_nsec: i64::try_from(TICK.as_nanos()).unwrap_or(i64::MAX) };
    match poll(fds, Some(&tick)) {
        Ok(n) => Ok(n),
        Err(rustix::io::Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Takes a line off the front; one that is too long comes in pieces.
fn cut_line(bytes: &mut Vec<u8>) -> Option<Vec<u8>> {
    let Some(at) = memchr::memchr(b'\n', bytes) else {
        return (bytes.len() > MAX_LINE).then(|| std::mem::take(bytes));
    };
    let rest = bytes.split_off(at + 1);
    let mut line = std::mem::replace(bytes, rest);
    line.pop();
    Some(line)
}

/// A line for programs, if it is one.
fn said(line: &[u8]) -> Option<Said> {
    let value: serde_json::Value = serde_json::from_slice(line.strip_prefix(b"@nix ")?).ok()?;
    let text = |name: &str| value.get(name).and_then(serde_json::Value::as_str).map(str::to_owned);
    let number = |name: &str| value.get(name).and_then(serde_json::Value::as_u64);
    let level = Level::of_number(number("level").unwrap_or(0));
    Some(match (text("action").as_deref(), number("type")) {
        (Some("msg"), _) => Said::Message(level, text("msg").unwrap_or_default()),
        // What it begins, people may want to know.
        (Some("start"), _) => match text("text").filter(|text| !text.is_empty()) {
            Some(text) => Said::Message(level, format!("{text}...")),
            None => Said::Other,
        },
        (Some("result"), Some(101)) => {
            let field = value.get("fields").and_then(|fields| fields.get(0)).and_then(serde_json::Value::as_str);
            field.map_or(Said::Other, |line| Said::LogLine(line.to_owned()))
        }
        _ => Said::Other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_for_programs() {
        let said = |text: &str| said(text.as_bytes());
        assert_eq!(said("plain"), None);
        assert_eq!(said("@nix no json"), None);
        let message = |level, text: &str| Some(Said::Message(level, text.to_owned()));
        assert_eq!(said(r#"@nix {"action":"msg","level":1,"msg":"so"}"#), message(Level::Warn, "so"));
        let start = r#"@nix {"action":"start","id":7,"level":3,"type":100,"text":"copying path 'P'","parent":0}"#;
        assert_eq!(said(start), message(Level::Info, "copying path 'P'..."));
        let line = r#"@nix {"action":"result","id":7,"type":101,"fields":["a line"]}"#;
        assert_eq!(said(line), Some(Said::LogLine("a line".to_owned())));
        assert_eq!(said(r#"@nix {"action":"stop","id":7}"#), Some(Said::Other));
    }

    #[test]
    fn lines_are_cut() {
        let mut bytes = b"one\ntwo\nthr".to_vec();
        assert_eq!(cut_line(&mut bytes).unwrap(), b"one");
        assert_eq!(cut_line(&mut bytes).unwrap(), b"two");
        assert_eq!(cut_line(&mut bytes), None);
        bytes.resize(MAX_LINE + 1, b'x');
        assert_eq!(cut_line(&mut bytes).unwrap().len(), MAX_LINE + 1);
        assert!(bytes.is_empty());
    }
}
