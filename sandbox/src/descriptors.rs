//! Descriptors beyond the first three, for programs that expect them under certain numbers.
//!
//! The standard library hands a program three descriptors and closes all others. Whoever speaks to
//! a build hook needs two more; here, as this is the one crate in which that can be done.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

/// Numbers from here on are never asked for, so that no descriptor is in the way of another.
const FIRST_FREE: RawFd = 64;

/// Gives a program that is to be started descriptors under these numbers, which are above 2.
///
/// They are held open until the command is dropped: whoever waits for the end of a pipe drops it
/// once the program runs.
pub fn give(command: &mut Command, descriptors: Vec<(OwnedFd, RawFd)>) -> io::Result<()> {
    let mut given = Vec::with_capacity(descriptors.len());
    for (fd, number) in descriptors {
        if !(3..FIRST_FREE).contains(&number) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        given.push((fcntl_dupfd_cloexec(&fd, FIRST_FREE)?, number));
    }
    let place = move || {
        for (fd, number) in &given {
            // SAFETY: both are numbers; what had the second one in this process, which is about to
            // become another program, is closed by that.
            if unsafe { libc::dup2(fd.as_raw_fd(), *number) } == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only `dup2` is called, which may be called there, and an error
    // is made from a number, which allocates nothing.
    unsafe { command.pre_exec(place) };
    Ok(())
}

/// Takes over descriptors that this program was started with, under numbers above 2.
///
/// To be called once, first thing: what is open later may belong to somebody. Errors: one is not
/// open, or it is too late.
pub fn take<const N: usize>(numbers: [RawFd; N]) -> io::Result<[OwnedFd; N]> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) || numbers.iter().any(|number| *number < 3) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for number in numbers {
        // SAFETY: asking for the flags of a number changes nothing, whether it is open or not.
        if unsafe { libc::fcntl(number, libc::F_GETFD) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: they are open, were so when the program began, and are taken no second time.
    let taken = numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) });
    for fd in &taken {
        fcntl_setfd(fd.as_fd(), FdFlags::CLOEXEC)?;
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_program_finds_what_it_was_given() {
        let (mut heard, said) = io::pipe().unwrap();
        let (question, mut asker) = io::pipe().unwrap();
        asker.write_all(b"how so\n").unwrap();
        drop(asker);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "read word <&5; echo \"$word\" >&4; ls /proc/self/fd | wc -l >&4"]);
        give(&mut command, vec![(said.into(), 4), (question.into(), 5)]).unwrap();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        drop(command);
        let mut text = String::new();
        heard.read_to_string(&mut text).unwrap();
        // The two, and what any program has here: some that start us leave more than three open.
        let usual = Command::new("/bin/sh").args(["-c", "ls /proc/self/fd | wc -l"]).output().unwrap().stdout;
        let usual: u32 = String::from_utf8(usual).unwrap().trim().parse().unwrap();
        assert_eq!(text, format!("how so\n{}\n", usual + 2));
        assert!(child.wait().unwrap().success());
    }

    #[test]
    fn numbers_that_cannot_be() {
        let file = || OwnedFd::from(File::open("/dev/null").unwrap());
        for number in [-1, 0, 2, FIRST_FREE] {
            give(&mut Command::new("true"), vec![(file(), number)]).unwrap_err();
        }
        take([60]).unwrap_err();
    }
}
