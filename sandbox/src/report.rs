//! What launcher, reaper and builder tell whoever launched them.
//!
//! One message of a `SOCK_SEQPACKET` socket is one `Report` in postcard form.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::support::Support;
use crate::sys;
use crate::zygote;

/// Longest message; ours are far below.
const MESSAGE_BYTES: usize = 64 * 1024;

/// Longest text within a failure.
const TEXT_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The launcher could not be executed. First, and of fixed size, since the child that says
    /// so must not allocate: see [`exec_failed`].
    ExecFailed([u8; 4]),
    /// Everything is set up; the next thing is the builder's program.
    Ready,
    /// Setting up failed; there is no builder.
    Failed(SetupError),
    /// The builder's wait status.
    Ended(i32),
    /// The answer to a question of [`crate::support`].
    Support(Box<Support>),
    /// Nothing of that user is left.
    Killed,
    /// A launcher was forked: its process id, and with it, as a descriptor, a handle on it.
    Started(i32),
}

/// The bytes of [`Report::ExecFailed`].
pub(crate) fn exec_failed(errno: i32) -> [u8; 5] {
    let [a, b, c, d] = errno.to_le_bytes();
    [0, a, b, c, d]
}

impl Report {
    pub(crate) fn send(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        let bytes = postcard::to_stdvec(self).map_err(io::Error::other)?;
        sys::send(to, &bytes)
    }

    /// With a descriptor.
    pub(crate) fn send_with(&self, to: BorrowedFd<'_>, fd: BorrowedFd<'_>) -> io::Result<()> {
        let bytes = postcard::to_stdvec(self).map_err(io::Error::other)?;
        zygote::send_with(to, &bytes, &[fd])
    }

    /// Waits for the next message; `None`: nobody is left who could send one.
    pub(crate) fn receive(from: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        let mut bytes = vec![0; MESSAGE_BYTES];
        let size = sys::receive(from, &mut bytes)?;
        Self::read(bytes.get(..size).unwrap_or_default())
    }

    /// The same, with the descriptor that came with it, if one did.
    pub(crate) fn receive_with(from: BorrowedFd<'_>) -> io::Result<(Option<Self>, Option<OwnedFd>)> {
        let mut bytes = vec![0; MESSAGE_BYTES];
        let (size, fds) = zygote::receive_with(from, &mut bytes)?;
        Ok((Self::read(bytes.get(..size).unwrap_or_default())?, fds.into_iter().next()))
    }

    fn read(bytes: &[u8]) -> io::Result<Option<Self>> {
        if bytes.is_empty() {
            return Ok(None);
        }
        postcard::from_bytes(bytes).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }
}

/// A step of setting up the build environment that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupError {
    /// What was attempted, such as `creating the user namespace`.
    pub attempt: String,
    /// The system call, with its telling arguments.
    pub call: String,
    pub errno: i32,
    /// What helps.
    pub hint: Option<String>,
    /// The kernel does not let us have namespaces: another machine's, or another user's, might.
    pub namespaces: bool,
}

impl SetupError {
    pub(crate) fn new(attempt: impl Into<String>, call: impl Into<String>, errno: Errno) -> Self {
        let (mut attempt, mut call): (String, String) = (attempt.into(), call.into());
        for text in [&mut attempt, &mut call] {
            if text.len() > TEXT_BYTES {
                text.truncate((0..=TEXT_BYTES).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0));
            }
        }
        let errno = errno.raw_os_error();
        let mut error = Self { attempt, call, errno, hint: None, namespaces: false };
        error.hint = error.find_hint().map(Into::into);
        error
    }

    pub(crate) fn with_hint(mut self, hint: &str) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// What usually is the matter where this call says no.
    fn find_hint(&self) -> Option<&'static str> {
        let errno = Errno::from_raw_os_error(self.errno);
        let call = self.call.as_str();
        let hint = match errno {
            Errno::NOSPC | Errno::USERS if call.starts_with("unshare") => {
                "raise /proc/sys/user/max_user_namespaces and the other limits in /proc/sys/user"
            }
            Errno::PERM | Errno::ACCESS if call == "unshare(CLONE_NEWUSER)" => {
                "user namespaces are not enabled; check /proc/sys/user/max_user_namespaces, \
                 /proc/sys/kernel/unprivileged_userns_clone and \
                 /proc/sys/kernel/apparmor_restrict_unprivileged_userns, and that we are not in a chroot"
            }
            Errno::PERM if call.starts_with("unshare") => {
                "this needs CAP_SYS_ADMIN or a user namespace; in a container, it must be allowed to nest"
            }
            Errno::INVAL if call.starts_with("unshare") => "the kernel is built without this kind of namespace",
            Errno::PERM if call.starts_with("mount(proc") => {
                "a new /proc may be mounted only where the old one is wholly visible; in a container, unmask its /proc"
            }
            Errno::NOSYS if ["open_tree", "move_mount", "mount_setattr"].iter().any(|c| call.starts_with(c)) => {
                "the sandbox needs Linux 5.12 or newer"
            }
            Errno::INVAL if call.starts_with("open_tree") => {
                "an ordinary user can bind a directory only together with what is mounted below it"
            }
            Errno::ACCESS | Errno::PERM if call.starts_with("seccomp") || call.starts_with("landlock") => {
                "without root this needs no_new_privs: do not set 'allow-new-privileges'"
            }
            Errno::INVAL if call.starts_with("seccomp") => {
                "the kernel is built without CONFIG_SECCOMP_FILTER; set 'filter-syscalls = false' to do without"
            }
            _ => return None,
        };
        Some(hint)
    }
}

impl fmt::Display for SetupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { attempt, call, errno, .. } = self;
        write!(f, "{attempt}: {call} failed: {}", sys::errno_text(*errno))?;
        if let Some(hint) = &self.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for SetupError {}

pub(crate) type Step<T> = Result<T, SetupError>;

/// Says what a call was for.
pub(crate) trait During<T> {
    fn during(self, call: &str, attempt: impl FnOnce() -> String) -> Step<T>;
}

impl<T> During<T> for rustix::io::Result<T> {
    fn during(self, call: &str, attempt: impl FnOnce() -> String) -> Step<T> {
        self.map_err(|e| SetupError::new(attempt(), call, e))
    }
}

impl<T> During<T> for io::Result<T> {
    fn during(self, call: &str, attempt: impl FnOnce() -> String) -> Step<T> {
        self.map_err(|e| SetupError::new(attempt(), call, Errno::from_io_error(&e).unwrap_or(Errno::IO)))
    }
}

/// Tells a failure, if anybody still listens.
pub(crate) fn tell_failure(control: impl AsFd, error: SetupError) {
    // With nobody listening there is nobody to tell either.
    drop(Report::Failed(error).send(control.as_fd()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fixed_form_is_the_postcard_form() {
        for errno in [0, 1, 2, 255, 256, -1, i32::MAX] {
            let report: Report = postcard::from_bytes(&exec_failed(errno)).unwrap();
            assert_eq!(report, Report::ExecFailed(errno.to_le_bytes()));
        }
    }

    #[test]
    fn a_failure_names_call_reason_and_remedy() {
        let error = SetupError::new("creating the user namespace", "unshare(CLONE_NEWUSER)", Errno::NOSPC);
        assert_eq!(
            error.to_string(),
            "creating the user namespace: unshare(CLONE_NEWUSER) failed: No space left on device; \
             raise /proc/sys/user/max_user_namespaces and the other limits in /proc/sys/user"
        );
    }
}
