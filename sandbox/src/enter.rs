//! From the launcher to the builder's program.
//!
//! The launcher joins control groups and enters a new process namespace; its child, the reaper
//! (process 1 there), makes the other namespaces, the root and the ids; its child is the builder.
//! The reaper passes the builder's wait status on; a builder that were process 1 itself would
//! be deaf to its own signals and gather zombies. Without a sandbox there is no reaper, and the
//! launcher gathers what the builder leaves behind.
//!
//! As root the user namespace is the last that is entered, so that the others belong to the host:
//! no capability inside is good for anything in them. An ordinary user enters it first, since
//! that is what gives the right to the rest.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::ids;
use crate::kill;
use crate::launch::Job;
use crate::plan::{Isolation, Limit, Personality, Plan, Resource, Root};
use crate::report::{During, Report, SetupError, Step, tell_failure};
use crate::root;
use crate::support;
use crate::sys::{self, Forked, Words};
use crate::zygote;

/// `uname` speaks of a 32-bit machine.
const PER_LINUX32: libc::c_int = 8;

/// Longest job: arguments and environment of a builder are limited to a few MiB by the kernel.
const JOB_BYTES: u64 = 64 << 20;

/// A builder that is a part of the program; gives the exit code.
pub type Inside = fn(&Plan) -> i32;

/// Set once, by the launcher before it has children.
static INSIDE: OnceLock<Inside> = OnceLock::new();

/// As [`launcher_main`], where a program that begins with [`INSIDE_PREFIX`] is a function of ours.
///
/// It is called where another program would be executed: in the sandbox, as the builder, its
/// output being the log.
pub fn launcher_main_with(inside: Inside) -> ! {
    // Nobody else sets it.
    let _ = INSIDE.set(inside);
    launcher_main()
}

/// What the name of a program begins with that is no file.
pub const INSIDE_PREFIX: &str = "builtin:";

/// What the launcher does instead of being the program; call it before there are threads.
pub fn launcher_main() -> ! {
    let (Ok(control), Ok(job)) = (sys::take_fd(sys::CONTROL), sys::take_fd(sys::JOB)) else {
        // Somebody typed the word.
        sys::write_log(b"error: this is how builders are started, and no command\n");
        sys::exit(1)
    };
    launcher(control, job)
}

/// A process with one thread takes these over, and does its job.
pub(crate) fn launcher(control: OwnedFd, job: OwnedFd) -> ! {
    let told = control.try_clone();
    std::panic::set_hook(Box::new(move |panic| {
        if let Ok(told) = &told {
            tell_failure(told, SetupError::new(format!("launcher: {panic}"), "panic", Errno::CANCELED));
        }
        sys::exit(101);
    }));
    let job = match read_job(job) {
        Ok(job) => job,
        Err(e) => fail(&control, e),
    };
    match job {
        Job::Build(plan) => build(&plan, &control),
        Job::KillUser(uid) => {
            let report = match kill::kill_user(uid) {
                Ok(()) => Report::Killed,
                Err(e) => Report::Failed(e),
            };
            drop(report.send(control.as_fd()));
            sys::exit(0)
        }
        Job::Zygote { filtered } => zygote::zygote(control, filtered),
        Job::Probe => {
            drop(Report::Support(Box::new(support::try_all())).send(control.as_fd()));
            sys::exit(0)
        }
    }
}

/// Tells why there is no builder, and ends.
fn fail(control: &OwnedFd, error: SetupError) -> ! {
    tell_failure(control, error);
    sys::exit(1)
}

fn read_job(file: OwnedFd) -> Step<Job> {
    let reading = || "reading the plan".to_owned();
    let file = std::fs::File::from(file);
    let size = file.metadata().during("fstat", reading)?.len();
    if size > JOB_BYTES {
        return Err(SetupError::new(reading(), "fstat", Errno::FBIG));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0).during("read", reading)?;
    postcard::from_bytes(&bytes)
        .map_err(|e| SetupError::new(format!("reading the plan ({e})"), "decoding", Errno::INVAL))
}

fn build(plan: &Plan, control: &OwnedFd) -> ! {
    match &plan.isolation {
        Isolation::None => match start_plain(plan, control) {
            Ok((builder, signals)) => follow_plain(builder, &signals, control),
            Err(e) => fail(control, e),
        },
        Isolation::Root(root) => match start_reaper(plan, root, control) {
            Ok(reaper) => follow_reaper(&reaper, plan, root, control),
            Err(e) => fail(control, e),
        },
    }
}

/// Everything up to the builder's fork, without a sandbox.
fn start_plain(plan: &Plan, control: &OwnedFd) -> Step<(Pid, OwnedFd)> {
    join_cgroups(plan)?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .during("prctl(PR_SET_CHILD_SUBREAPER)", || "gathering what the builder leaves behind".into())?;
    let signals = sys::child_signals().during("signalfd", || "waiting for the builder".into())?;
    let forked = sys::fork().during("fork", || "starting the builder".into())?;
    let Forked::Parent(builder) = forked else {
        let kept = control.as_fd();
        if let Err(e) = ids::become_builder(plan, None, rustix::process::geteuid().is_root(), || Ok(()))
            .and_then(|()| die_with_parent())
        {
            fail(control, e);
        }
        run_builder(plan, kept)
    };
    sys::silence().during("dup2", || "closing the log".into())?;
    Ok((builder, signals))
}

fn follow_plain(builder: Pid, signals: &OwnedFd, control: &OwnedFd) -> ! {
    let mut is_running = true;
    let tell = |status| drop(Report::Ended(status).send(control.as_fd()));
    while !wait_readable(control.as_fd(), signals.as_fd()) {
        sys::drain(signals.as_fd());
        while let Ok(Some((pid, status))) = sys::wait_any(libc::WNOHANG) {
            if pid == builder {
                is_running = false;
                tell(status);
            }
        }
    }
    if is_running {
        // The group may be large, and this takes it all at once. Once the builder is reaped its
        // number may be anybody's.
        let _ = rustix::process::kill_process_group(builder, Signal::KILL);
    }
    kill::kill_descendants(|pid, status| {
        if pid == builder {
            tell(status);
        }
    });
    sys::exit(0)
}

/// Waits for either; is it the first? For a launcher that can only mean its end.
pub(crate) fn wait_readable(control: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&control, PollFlags::IN), PollFd::new(&other, PollFlags::IN)];
    loop {
        match poll(&mut fds, None) {
            Ok(_) => return fds.first().is_some_and(|fd| !fd.revents().is_empty()),
            Err(Errno::INTR) => {}
            // Without poll there is no following; give up as if told to.
            Err(_) => return true,
        }
    }
}

/// The reaper, as the launcher sees it.
struct Reaper {
    pid: Pid,
    signals: OwnedFd,
    /// The reaper asks for its ids to be mapped here; the end of it is the reaper's end.
    questions: OwnedFd,
    answers: OwnedFd,
}

fn start_reaper(plan: &Plan, root: &Root, control: &OwnedFd) -> Step<Reaper> {
    join_cgroups(plan)?;
    let user_first = !rustix::process::geteuid().is_root();
    if user_first {
        ids::enter_own_user_namespace(plan, root)?;
    }
    ids::namespaces("unshare(CLONE_NEWPID)", libc::CLONE_NEWPID, "creating the process namespace")?;
    let pipes = || "starting the reaper".to_owned();
    let signals = sys::child_signals().during("signalfd", pipes)?;
    let (questions, asked) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during("pipe", pipes)?;
    let (answered, answers) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during("pipe", pipes)?;
    let forked = sys::fork().during("fork", pipes)?;
    let Forked::Parent(pid) = forked else {
        drop((questions, answers, signals));
        let map = || ask_for_map(&asked, &answered);
        if let Err(e) = enter_sandbox(plan, root, user_first, map) {
            fail(control, e);
        }
        drop((asked, answered));
        reap(plan, control)
    };
    drop((asked, answered));
    sys::silence().during("dup2", || "closing the log".into())?;
    Ok(Reaper { pid, signals, questions, answers })
}

/// The reaper's side of [`answer`].
fn ask_for_map(asked: &OwnedFd, answered: &OwnedFd) -> Step<()> {
    let mapping = || "waiting for the ids to be mapped".to_owned();
    rustix::io::write(asked, b"?").during("write", mapping)?;
    let mut answer = [0];
    match rustix::io::read(answered, &mut answer).during("read", mapping)? {
        1 => Ok(()),
        // The launcher has told why.
        _ => sys::exit(1),
    }
}

/// Maps the ids, if that is what there is to read.
fn answer(reaper: &Reaper, plan: &Plan, root: &Root) -> Step<()> {
    let mut question = [0];
    if let Ok(1) = rustix::io::read(&reaper.questions, &mut question) {
        ids::map_ids(&format!("/proc/{}", reaper.pid), plan, root)?;
        rustix::io::write(&reaper.answers, b"!").during("write", || "mapping the ids".into())?;
    }
    Ok(())
}

fn follow_reaper(reaper: &Reaper, plan: &Plan, root: &Root, control: &OwnedFd) -> ! {
    let mut is_asking = true;
    loop {
        let waiting = if is_asking { &reaper.questions } else { &reaper.signals };
        let is_stopped = wait_readable(control.as_fd(), waiting.as_fd());
        if is_stopped {
            // Everything in a process namespace dies with its process 1.
            let _ = rustix::process::kill_process(reaper.pid, Signal::KILL);
        } else if is_asking {
            // One question at most; from then on, and if the reaper has ended, signals tell.
            is_asking = false;
            if let Err(e) = answer(reaper, plan, root) {
                let _ = rustix::process::kill_process(reaper.pid, Signal::KILL);
                fail(control, e);
            }
            continue;
        }
        sys::drain(reaper.signals.as_fd());
        match sys::wait_any(if is_stopped { 0 } else { libc::WNOHANG }) {
            Ok(Some((_, status))) => {
                // Else it has told how the builder ended, or why there was none.
                if libc::WIFSIGNALED(status) {
                    drop(Report::Ended(status).send(control.as_fd()));
                }
                sys::exit(0)
            }
            Ok(None) => {}
            Err(_) => sys::exit(1),
        }
    }
}

/// Process 1: all namespaces, the root, the ids.
fn enter_sandbox(plan: &Plan, root: &Root, user_first: bool, map: impl FnOnce() -> Step<()>) -> Step<()> {
    die_with_parent()?;
    let mut kinds = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let mut names = "unshare(CLONE_NEWNS|CLONE_NEWIPC|CLONE_NEWUTS".to_owned();
    if root.private_network {
        kinds |= libc::CLONE_NEWNET;
        names += "|CLONE_NEWNET";
    }
    if rustix::fs::access("/proc/self/ns/cgroup", rustix::fs::Access::EXISTS).is_ok() {
        kinds |= libc::CLONE_NEWCGROUP;
        names += "|CLONE_NEWCGROUP";
    }
    ids::namespaces(&(names + ")"), kinds, "creating the namespaces")?;
    if root.private_network {
        sys::loopback_up().during("ioctl(SIOCSIFFLAGS)", || "bringing up the loopback interface".into())?;
    }
    rustix::system::sethostname(root.host_name.as_bytes()).during("sethostname", || "setting the host name".into())?;
    rustix::system::setdomainname(root.domain_name.as_bytes())
        .during("setdomainname", || "setting the domain name".into())?;
    root::enter(root, plan)?;
    let new_user = root.user_namespace.filter(|_| !user_first);
    ids::become_builder(plan, root.user_namespace, !user_first, || {
        if new_user.is_some() {
            ids::namespaces("unshare(CLONE_NEWUSER)", libc::CLONE_NEWUSER, "creating the user namespace")?;
            map()?;
        }
        Ok(())
    })?;
    // The change of ids has undone the first.
    die_with_parent()
}

fn die_with_parent() -> Step<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .during("prctl(PR_SET_PDEATHSIG)", || "tying the builder to its launcher".into())
}

/// Starts the builder and reaps whatever ends, until the builder does.
fn reap(plan: &Plan, control: &OwnedFd) -> ! {
    // What the builder could trace it could also make say something else.
    let hidden = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .during("prctl(PR_SET_DUMPABLE)", || "hiding the reaper's memory".into());
    let forked = hidden.and_then(|()| sys::fork().during("fork", || "starting the builder".into()));
    let builder = match forked {
        Ok(Forked::Parent(builder)) => builder,
        Ok(Forked::Child) => run_builder(plan, control.as_fd()),
        Err(e) => fail(control, e),
    };
    if let Err(e) = sys::silence().during("dup2", || "closing the log".into()) {
        fail(control, e);
    }
    loop {
        match sys::wait_any(0) {
            Ok(Some((pid, status))) if pid == builder => {
                drop(Report::Ended(status).send(control.as_fd()));
                sys::exit(0)
            }
            Ok(_) => {}
            Err(_) => sys::exit(1),
        }
    }
}

/// The builder: the last steps, and its program.
fn run_builder(plan: &Plan, control: BorrowedFd<'_>) -> ! {
    let argv = Words::new(plan.argv.iter().map(|a| a.as_bytes()));
    let entries: Vec<OsString> = plan
        .env
        .iter()
        .map(|(name, value)| [name.as_os_str(), "=".as_ref(), value.as_os_str()].into_iter().collect())
        .collect();
    let env = Words::new(entries.iter().map(|e| e.as_bytes()));
    if let Err(e) = prepare_builder(plan) {
        tell_failure(control, e);
        sys::exit(1)
    }
    if Report::Ready.send(control).is_err() {
        sys::exit(1)
    }
    if let Some(inside) = INSIDE.get()
        && plan.program.as_os_str().as_bytes().starts_with(INSIDE_PREFIX.as_bytes())
    {
        sys::exit(inside(plan));
    }
    let error = sys::exec(&plan.program, &argv, &env);
    let reason = sys::errno_text(error.raw_os_error().unwrap_or(0));
    let text = format!("error: executing '{}': {reason}\n", plan.program.display());
    sys::write_log(text.as_bytes());
    sys::exit(1)
}

fn prepare_builder(plan: &Plan) -> Step<()> {
    rustix::process::setsid().during("setsid", || "starting a session".into())?;
    rustix::process::chdir(&plan.cwd).during("chdir", || format!("entering '{}'", plan.cwd.display()))?;
    rustix::process::umask(Mode::from_raw_mode(plan.umask & 0o777));
    for limit in &plan.limits {
        set_limit(limit)?;
    }
    set_personality(plan.personality)?;
    sys::default_signals();
    sys::close_on_exec_from(3).during("close_range", || "closing descriptors".into())
}

fn set_limit(limit: &Limit) -> Step<()> {
    use rustix::process as p;
    let resource = match limit.resource {
        Resource::Core => p::Resource::Core,
        Resource::Processes => p::Resource::Nproc,
        Resource::OpenFiles => p::Resource::Nofile,
        Resource::AddressSpace => p::Resource::As,
        Resource::CpuTime => p::Resource::Cpu,
        Resource::FileSize => p::Resource::Fsize,
    };
    let old = p::getrlimit(resource);
    // A soft limit above the hard one means the hard one.
    let hard = limit.hard.or(old.maximum);
    let soft = limit.soft.or(old.current);
    let soft = match (soft, hard) {
        (Some(soft), Some(hard)) => Some(soft.min(hard)),
        (None, hard) => hard,
        (soft, None) => soft,
    };
    p::setrlimit(resource, p::Rlimit { current: soft, maximum: hard })
        .during("setrlimit", || format!("limiting {:?} to {:?}", limit.resource, limit.soft))
}

fn set_personality(personality: Personality) -> Step<()> {
    let bits = [
        (personality.linux32, PER_LINUX32),
        (personality.uname26, libc::UNAME26),
        (personality.fixed_addresses, libc::ADDR_NO_RANDOMIZE),
    ];
    let wanted = bits.into_iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
    if wanted == 0 {
        return Ok(());
    }
    let setting = || "setting the personality".to_owned();
    let old = sys::personality().during("personality", setting)?;
    sys::set_personality(old | libc::c_ulong::from(wanted.cast_unsigned())).during("personality", setting)
}

fn join_cgroups(plan: &Plan) -> Step<()> {
    for dir in &plan.cgroups {
        let file = std::path::Path::new(dir).join("cgroup.procs");
        std::fs::write(&file, "0").during("write", || format!("joining the control group '{}'", dir.display()))?;
    }
    Ok(())
}
