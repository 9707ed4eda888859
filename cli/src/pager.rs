//! A pager for long listings on a terminal.
//!
//! Source: cli, rule 1.10.

use std::ffi::{OsStr, OsString};
use std::process::{Child, ChildStdin, Command, Stdio};

use crate::conf::Env;
use crate::interrupt::Interrupt;

/// What `less` is told where the user does not tell it: quit if one screen is enough, keep
/// colours, chop long lines.
const LESS: &str = "FRSXMK";

/// A way to start a pager.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Way {
    /// A command line for the shell.
    Shell(OsString),
    Program(&'static str),
}

/// The ways to try, in order; none if the user wants no pager.
fn ways(env: &Env) -> Vec<Way> {
    match env.get("NIX_PAGER").or_else(|| env.get("PAGER")) {
        Some(wanted) if wanted.is_empty() || wanted == "cat" => Vec::new(),
        Some(wanted) => vec![Way::Shell(wanted.to_owned())],
        None => vec![Way::Program("pager"), Way::Program("less"), Way::Program("more")],
    }
}

/// A pager that runs.
#[derive(Debug)]
pub struct Pager {
    child: Child,
    interrupt: Interrupt,
}

impl Pager {
    /// Starts one. `None` if the user wants none or none can be started: then the output goes
    /// to the terminal directly. While it runs Ctrl-C is meant for it.
    pub fn start(env: &Env, interrupt: &Interrupt) -> Option<(Self, ChildStdin)> {
        let (mut child, interrupt) = ways(env).iter().find_map(|way| {
            let mut command = match way {
                Way::Shell(line) => {
                    let mut command = Command::new("/bin/sh");
                    command.args([OsStr::new("-c"), line]);
                    command
                }
                Way::Program(name) => Command::new(name),
            };
            if env.get("LESS").is_none() {
                command.env("LESS", LESS);
            }
            command.stdin(Stdio::piped()).spawn().ok().map(|child| (child, interrupt.clone()))
        })?;
        let stdin = child.stdin.take()?;
        interrupt.lend(true);
        Some((Self { child, interrupt }, stdin))
    }

    /// Waits until the user has seen enough.
    pub fn wait(mut self) {
        // How it ended is the user's business.
        drop(self.child.wait());
        self.interrupt.lend(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_gets_to_the_pager() {
        use std::io::Write as _;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("seen");
        let line = format!("(echo $LESS; cat) > '{}'", file.display());
        let interrupt = Interrupt::default();
        let (pager, mut stdin) = Pager::start(&Env::from_pairs([("PAGER", line.as_str())]), &interrupt).unwrap();
        stdin.write_all(b"a\nb\n").unwrap();
        drop(stdin);
        pager.wait();
        assert_eq!(std::fs::read_to_string(file).unwrap(), format!("{LESS}\na\nb\n"));
        assert!(Pager::start(&Env::from_pairs([("PAGER", "")]), &interrupt).is_none());
    }

    #[test]
    fn the_environment_chooses() {
        let defaults = vec![Way::Program("pager"), Way::Program("less"), Way::Program("more")];
        for (env, wanted) in [
            (&[][..], defaults),
            (&[("PAGER", "most -s")], vec![Way::Shell("most -s".into())]),
            (&[("PAGER", "most"), ("NIX_PAGER", "less -R")], vec![Way::Shell("less -R".into())]),
            (&[("PAGER", "most"), ("NIX_PAGER", "")], vec![]),
            (&[("PAGER", "cat")], vec![]),
            (&[("PAGER", "")], vec![]),
        ] {
            assert_eq!(ways(&Env::from_pairs(env.iter().copied())), wanted, "{env:?}");
        }
    }
}
