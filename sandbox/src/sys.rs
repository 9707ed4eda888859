//! System calls for which there is no safe wrapper elsewhere.
//!
//! Most are unsafe only because they change the whole process under other threads' feet; they are
//! called by the launcher and its children, which have one thread. What a process with threads
//! may call says so.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::process::Pid;

use crate::report::exec_failed;

/// The result of a system call in the C library's manner.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn check_long(result: libc::c_long) -> io::Result<libc::c_long> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// What the C library calls this error.
pub(crate) fn errno_text(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.split_once(" (os error") {
        Some((text, _)) => text.into(),
        None => text,
    }
}

/// Which of two processes this is.
pub(crate) enum Forked {
    Parent(Pid),
    Child,
}

/// Forks a process that has no other threads; the child may do anything.
pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: the launcher and its children have one thread, so the child's copy of memory is
    // that of a process between two instructions of its only thread.
    let pid = check(unsafe { libc::fork() })?;
    Ok(match Pid::from_raw(pid) {
        Some(pid) => Forked::Parent(pid),
        None => Forked::Child,
    })
}

/// A program and its arguments, ready to be executed without allocating.
pub(crate) struct Words {
    words: Vec<CString>,
}

impl Words {
    /// Words with zero bytes are cut there; plans are checked for them before.
    pub(crate) fn new<'a>(words: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let whole = |word: &[u8]| CString::new(word.split(|&b| b == 0).next().unwrap_or_default());
        Self { words: words.into_iter().map(|w| whole(w).expect("cut at the first zero byte")).collect() }
    }

    fn pointers(&self) -> Vec<*const libc::c_char> {
        self.words.iter().map(|w| w.as_ptr()).chain([std::ptr::null()]).collect()
    }
}

/// Replaces the process; returns only if that failed.
pub(crate) fn exec(program: &Path, argv: &Words, env: &Words) -> io::Error {
    let program = Words::new([program.as_os_str().as_bytes()]);
    let Some(path) = program.words.first() else { return io::Error::from_raw_os_error(libc::ENOENT) };
    let (argv_pointers, env_pointers) = (argv.pointers(), env.pointers());
    // SAFETY: both arrays end with a null pointer; they and what they point to are alive.
    unsafe { libc::execve(path.as_ptr(), argv_pointers.as_ptr(), env_pointers.as_ptr()) };
    io::Error::last_os_error()
}

/// First descriptor that [`spawn`] does not hand down.
const HANDED: RawFd = 5;

/// Where the launcher finds its socket.
pub(crate) const CONTROL: RawFd = 3;

/// Where the launcher finds its job.
pub(crate) const JOB: RawFd = 4;

/// Runs a program as a new process with an empty environment, all signals blocked, and the five
/// descriptors as 0 to 4. A process with threads may call this.
///
/// That `execve` failed is told on the fourth descriptor as [`exec_failed`].
pub(crate) fn spawn(program: &Path, argv: &Words, fds: [BorrowedFd<'_>; 5]) -> io::Result<Pid> {
    let program = Words::new([program.as_os_str().as_bytes()]);
    let path = program.words.first().map_or(c"".as_ptr(), |p| p.as_ptr());
    let argv_pointers = argv.pointers();
    let env_pointers = [std::ptr::null::<libc::c_char>()];
    // Out of the way of 0 to 4, so that none is overwritten before it is copied.
    let mut high = Vec::with_capacity(fds.len());
    for fd in fds {
        high.push(rustix::io::fcntl_dupfd_cloexec(fd, 16)?);
    }
    let mut all: libc::sigset_t = empty_signals();
    let mut before: libc::sigset_t = empty_signals();
    // SAFETY: both are signal sets of ours.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    // SAFETY: not vfork, and by way of the C library: the child has memory of its own, and its
    // library knows that it has one thread. The child calls async-signal-safe functions only.
    let forked = check(unsafe { libc::fork() });
    if matches!(forked, Ok(0)) {
        // SAFETY: as said; the pointers were made before, and are alive in the child too.
        unsafe { become_program(path, argv_pointers.as_ptr(), env_pointers.as_ptr(), &high) }
    }
    // SAFETY: the set is the one that was read above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    let pid = forked?;
    Ok(Pid::from_raw(pid).expect("the child's branch does not come here"))
}

/// The child's way from fork to exec: nothing here allocates, locks or panics.
///
/// # Safety
/// Only in a child just forked, with all signals blocked; `path` is a C string, `argv` and `env`
/// are arrays of such that end with a null pointer.
unsafe fn become_program(
    path: *const libc::c_char,
    argv: *const *const libc::c_char,
    env: *const *const libc::c_char,
    fds: &[OwnedFd],
) -> ! {
    // SAFETY: async-signal-safe functions with arguments that are valid as the caller promised.
    unsafe {
        for (from, to) in fds.iter().zip(0..HANDED) {
            if libc::dup2(from.as_raw_fd(), to) == -1 {
                libc::_exit(127);
            }
        }
        libc::syscall(libc::SYS_close_range, HANDED as libc::c_uint, libc::c_uint::MAX, 0);
        libc::setsid();
        // A caller that ignores its children makes the launcher deaf to its own.
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
        libc::execve(path, argv, env);
        let message = exec_failed(*libc::__errno_location());
        libc::send(CONTROL, message.as_ptr().cast(), message.len(), libc::MSG_NOSIGNAL);
        libc::_exit(127);
    }
}

fn empty_signals() -> libc::sigset_t {
    // SAFETY: a set of zero bits is a signal set; emptying it makes it an empty one everywhere.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        set
    }
}

/// Gives every signal its default meaning and blocks none.
pub(crate) fn default_signals() {
    let none = empty_signals();
    // `struct sigaction` of the kernel, all zero: the default, no flags, an empty mask. Not by way
    // of the C library, which refuses to touch two signals of its own that may be ignored too.
    let default = [0_u64; 4];
    for signal in 1..=64 as libc::c_long {
        // The two that cannot be changed give errors.
        // SAFETY: the structure is at most as large as that; no handler is installed.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null_mut::<u64>(), 8_usize);
        }
    }
    // SAFETY: the set is ours.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
}

/// A descriptor that is readable while a child waits to be reaped; blocks the signal itself.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    let mut set = empty_signals();
    // SAFETY: the set is ours; the result is a new descriptor or an error.
    unsafe {
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Reads away what [`child_signals`] has gathered.
pub(crate) fn drain(fd: BorrowedFd<'_>) {
    let mut bytes = [0_u8; 1024];
    while rustix::io::read(fd, &mut bytes).is_ok_and(|n| n > 0) {}
}

/// Takes over the descriptor of that number, which whoever executed us has left for us.
pub(crate) fn take_fd(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: asking for flags does no harm, whatever the number is.
    check(unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, as just seen, and each number is taken once, before anything else
    // was opened.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// No descriptor from that number on survives an `exec`.
pub(crate) fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let flags = libc::c_long::from(libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: marks descriptors only.
    let result = unsafe { libc::syscall(libc::SYS_close_range, libc::c_long::from(first), libc::c_uint::MAX, flags) };
    check_long(result).map(drop)
}

/// Ends the process at once.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: ends the process; nothing of ours waits to be written.
    unsafe { libc::_exit(status) }
}

/// A message to whoever has the other end; `EPIPE`, not a signal, if nobody has.
pub(crate) fn send(to: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<()> {
    rustix::net::send(to, bytes, rustix::net::SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Waits for one message; 0: the other end is closed.
pub(crate) fn receive(from: BorrowedFd<'_>, bytes: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::net::recv(from, &mut *bytes, rustix::net::RecvFlags::empty()) {
            Ok((n, _)) => return Ok(n),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(0),
            Err(e) => return Err(e.into()),
        }
    }
}

/// Leaves the namespaces of these kinds for new ones.
pub(crate) fn unshare(kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: there is one thread; descriptors are not among the kinds.
    check(unsafe { libc::unshare(kinds) }).map(drop)
}

pub(crate) fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: pointer and length are those of a slice of ids.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) }).map(drop)
}

/// Sets real, effective and saved group.
pub(crate) fn set_gid(gid: u32) -> io::Result<()> {
    // SAFETY: numbers only; there is one thread.
    check(unsafe { libc::setresgid(gid, gid, gid) }).map(drop)
}

/// Sets real, effective and saved user.
pub(crate) fn set_uid(real: u32, effective: u32, saved: u32) -> io::Result<()> {
    // SAFETY: numbers only; there is one thread.
    check(unsafe { libc::setresuid(real, effective, saved) }).map(drop)
}

/// Kills every process that we may signal, but not ourselves.
pub(crate) fn kill_everything() -> io::Result<()> {
    // SAFETY: affects processes only.
    check(unsafe { libc::kill(-1, libc::SIGKILL) }).map(drop)
}

pub(crate) fn set_personality(persona: libc::c_ulong) -> io::Result<()> {
    // SAFETY: numbers only; takes effect at the next exec, or in what `uname` says.
    check(unsafe { libc::personality(persona) }).map(drop)
}

/// The personality that we have.
pub(crate) fn personality() -> io::Result<libc::c_ulong> {
    // SAFETY: this value only asks.
    let persona = check(unsafe { libc::personality(0xffff_ffff) })?;
    Ok(libc::c_ulong::from(persona.cast_unsigned()))
}

/// Leaves the session's keys behind. What an outer filter forbids us, it forbids the builder.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    let (join, name) = (1 as libc::c_long, std::ptr::null::<libc::c_char>());
    // SAFETY: a null name asks for a keyring without one.
    match check_long(unsafe { libc::syscall(libc::SYS_keyctl, join, name) }) {
        Ok(_) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EOPNOTSUPP)) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Makes a mount, with all below it, read-only; its other flags stay.
pub(crate) fn make_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    /// `struct mount_attr`.
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        user_namespace: u64,
    }
    let attr = MountAttr { set: 1, clear: 0, propagation: 0, user_namespace: 0 };
    let flags = libc::c_long::from(libc::AT_EMPTY_PATH | libc::AT_RECURSIVE);
    // SAFETY: an empty path, and a structure of the size that is said.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check_long(result).map(drop)
}

/// Brings up `lo`; the kernel gives it its addresses.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    // SAFETY: a structure of plain numbers may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_UP | libc::IFF_LOOPBACK | libc::IFF_RUNNING;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).expect("flags of the lower half");
    // SAFETY: the request is of the kind that this operation reads.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) }).map(drop)
}

/// Installs a filter for this process and all that come from it.
pub(crate) fn install_filter(program: &[crate::filter::Instruction]) -> io::Result<()> {
    let instructions: Vec<libc::sock_filter> =
        program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.yes, jf: i.no, k: i.k }).collect();
    let len = u16::try_from(instructions.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: the kernel reads as many instructions as the length says, and checks them.
    let result = unsafe {
        libc::prctl(libc::PR_SET_SECCOMP, u64::from(libc::SECCOMP_MODE_FILTER), &raw const program, 0_u64, 0_u64)
    };
    check(result).map(drop)
}

/// The version of Landlock; 0: there is none.
pub(crate) fn landlock_version() -> u32 {
    let version_flag: libc::c_long = 1;
    // SAFETY: with this flag the call only answers.
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, version_flag) };
    u32::try_from(result).unwrap_or(0)
}

/// Keeps what the bits say inside, for this process and all that come from it.
pub(crate) fn landlock_scope(scoped: u64) -> io::Result<()> {
    /// `struct landlock_ruleset_attr` as of version 6.
    #[repr(C)]
    struct RulesetAttr {
        handled_access_fs: u64,
        handled_access_net: u64,
        scoped: u64,
    }
    let attr = RulesetAttr { handled_access_fs: 0, handled_access_net: 0, scoped };
    let none: libc::c_long = 0;
    // SAFETY: a structure of the size that is said; the result is a new descriptor or an error.
    unsafe {
        let fd = libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attr, size_of::<RulesetAttr>(), none);
        let fd = libc::c_int::try_from(check_long(fd)?).map_err(io::Error::other)?;
        let ruleset = OwnedFd::from_raw_fd(fd);
        check_long(libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), none)).map(drop)
    }
}

/// Waits for a child (`WNOHANG`: asks). `None`: none has ended; an error: there is none.
pub(crate) fn wait_any(options: libc::c_int) -> io::Result<Option<(Pid, i32)>> {
    loop {
        let mut status = 0;
        // SAFETY: the status is ours.
        match check(unsafe { libc::waitpid(-1, &raw mut status, options) }) {
            Ok(pid) => return Ok(Pid::from_raw(pid).map(|pid| (pid, status))),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Waits for that child of ours. A process with threads may call this. Where children are
/// ignored, and the kernel reaps them, this waits for it to do so, and knows no status.
pub(crate) fn wait_for(pid: Pid) -> io::Result<i32> {
    loop {
        let mut status = 0;
        // SAFETY: the status is ours.
        match check(unsafe { libc::waitpid(pid.as_raw_nonzero().get(), &raw mut status, 0) }) {
            Ok(_) => return Ok(status),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(0),
            Err(e) => return Err(e),
        }
    }
}

/// Standard output and error become copies of standard input, which is `/dev/null`.
pub(crate) fn silence() -> io::Result<()> {
    // SAFETY: it is open as long as the process lives.
    print_to(unsafe { BorrowedFd::borrow_raw(0) })
}

/// Standard output and error become copies of this.
pub(crate) fn print_to(fd: BorrowedFd<'_>) -> io::Result<()> {
    for to in [1, 2] {
        // SAFETY: of the two only we know, and neither is owned by a value.
        check(unsafe { libc::dup2(fd.as_raw_fd(), to) })?;
    }
    Ok(())
}

/// Writes to the log, where it comes from nobody else.
pub(crate) fn write_log(text: &[u8]) {
    // SAFETY: pointer and length are those of a slice. What cannot be written is lost.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}
