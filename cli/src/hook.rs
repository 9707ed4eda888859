//! The build hook: knows machines, chooses one for a build, and has the build done there.
//!
//! A process that builds starts it, tells it settings and asks about one build after another; the
//! first that a machine takes is done, and that is the end. The connection to the machine is open
//! before the build is accepted, so that a machine that is not there costs nothing but a message.
//! Everything that was started ends with the one who asked: the log has no reader then.
//!
//! It serves real Nix as well, whose ledger is its own: with `--nix-store PROGRAM` before the
//! verbosity (for a script to say, as `build-hook` takes no words) outputs go into the store by way of
//! that program. Source: building, section 11; protocols, section 6.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufReader, PipeReader, PipeWriter, Read as _, Write as _};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use larder_core::api::{BuildResult, BuildStatus, Store, StoreError};
use larder_core::derivation::Derivation;
use larder_core::machines::{Machine, MachinesError, parse};
use larder_core::report::{ActivityResult, Level, Reporter};
use larder_core::settings::{Settings, SettingsBuilder};
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_fs::path_lock::HeldLocks;
use larder_realise::errand::{Errand, exit_code};
use larder_realise::hook::{LOG_IN, LOG_OUT};
use larder_realise::slots::{Slot, Slots, Turn};
use larder_sandbox::descriptors;
use larder_store::{LocalStore, Options};
use larder_wire::hook::{Answer, Order, Try, read_settings};
use rustix::event::{PollFd, PollFlags, poll};

use crate::args::LogFormat;
use crate::conf::{self, Env, Facts, StoreChoice, choose, machine};
use crate::engine::Engine;
use crate::exit::{Failure, Status, chain, indent};
use crate::interrupt::{Interrupt, Interrupted};
use crate::remote::address::Address;
use crate::remote::{Far, RemoteError, Way};
use crate::terminal::Terminal;

/// How long one waits for others that send something to the same machine.
const PATIENCE: Duration = Duration::from_mins(15);

/// How long the last words of `ssh` may take after its end.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What of the complaints before a build is kept, in bytes.
const MAX_COMPLAINT: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum HookError {
    #[error("this is a build hook, which is started by what builds and not by hand")]
    ByHand,
    #[error("cannot open Nix store '{uri}': a build hook works for local stores only")]
    NotLocal { uri: String },
    #[error("cannot build in '{uri}', which is the store that needs the build")]
    SameStore { uri: String },
    #[error("build of '{drv}' on '{machine}' failed: {text}")]
    Failed { drv: String, machine: String, text: String },
    #[error("while '{drv}' was built on '{machine}'")]
    Lost { drv: String, machine: String, source: StoreError },
}

/// Runs the hook; the last word is the verbosity.
pub fn run(words: &[OsString]) -> Status {
    let terminal = Arc::new(Terminal::new());
    terminal.set_format(LogFormat::InternalJson);
    match serve(words, &terminal) {
        Ok(status) => status,
        Err(failure) => {
            tell(&terminal, &chain(failure.error()));
            failure.status()
        }
    }
}

/// The machines of the setting `builders`.
pub fn machines(settings: &Settings) -> Result<Vec<Machine>, MachinesError> {
    parse(&settings.builders, &settings.system, &mut |file| match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(chain(&error)),
    })
}

/// Is there anyone who might build something elsewhere? What is wrong with the machines is told.
pub fn may_delegate(settings: &Settings, tell: impl FnOnce(&str)) -> bool {
    if settings.builders.trim().is_empty() {
        return false;
    }
    // Only the hook itself knows which machines it has.
    if settings.build_hook.get().is_some() {
        return true;
    }
    match machines(settings) {
        Ok(machines) => !machines.is_empty(),
        Err(error) => {
            tell(&chain(&error));
            false
        }
    }
}

/// What the hook works with.
struct Desk<'a> {
    settings: Settings,
    env: Arc<Env>,
    terminal: &'a Arc<Terminal>,
    interrupt: Interrupt,
    local: conf::LocalStore,
    machines: Vec<Machine>,
    log: Arc<Log>,
    /// Whose store it is, if it is not ours.
    nix_store: Option<String>,
}

/// The store that needs the outputs.
enum Near {
    Ours(Box<Engine>),
    Theirs(Box<Far>),
}

impl Near {
    fn store(&self) -> &(dyn Store + Sync) {
        match self {
            Self::Ours(engine) => &**engine,
            Self::Theirs(far) => far.store(),
        }
    }
}

fn serve(words: &[OsString], terminal: &Arc<Terminal>) -> Result<Status, Failure> {
    let words: Vec<&str> = words.iter().filter_map(|word| word.to_str()).collect();
    let (nix_store, verbosity) = match *words.as_slice() {
        ["--nix-store", program, verbosity] => (Some(program.to_owned()), verbosity),
        [verbosity] => (None, verbosity),
        _ => return Err(HookError::ByHand.into()),
    };
    let verbosity = verbosity.parse().map_err(|_| HookError::ByHand)?;
    let [log_in, log_out] = descriptors::take([LOG_IN, LOG_OUT]).map_err(|_| HookError::ByHand)?;
    // Nobody else is to keep the log open at that end: when it closes, nobody wants it any more.
    drop(log_out);
    let log = Arc::new(Log { out: File::from(log_in), early: Mutex::new(Some(Vec::new())) });
    let interrupt = Interrupt::watch(|| {})?;
    log.end_with_reader()?;
    terminal.set_verbosity(Level::of_number(verbosity));
    let env = Env::of_process();
    let mut input = BufReader::new(io::stdin());
    let mut builder = SettingsBuilder::new(machine(&env, false)?);
    // Those of another version of Nix may have settings, or values, that are none here.
    for (name, value) in read_settings(&mut input, &conf::store_dir(&env)?)? {
        builder.option(&name, &value);
    }
    let settings = builder.finish().settings;
    let machines = machines(&settings)?;
    if machines.is_empty() {
        say(Answer::DeclinePermanently, None)?;
        return Ok(Status::SUCCESS);
    }
    let StoreChoice::Local(local) = choose(&settings.store, &env, Facts::gather(&env, true)?)? else {
        return Err(HookError::NotLocal { uri: settings.store }.into());
    };
    let desk = Desk { settings, env: Arc::new(env), terminal, interrupt, local, machines, log, nix_store };
    desk.serve(&mut input)
}

/// Tells of an error. Colours are for whoever shows it.
fn tell(terminal: &Terminal, text: &str) {
    terminal.message(Level::Error, format_args!("error: {}", indent(text)));
}

fn say(answer: Answer, machine: Option<&str>) -> io::Result<()> {
    let line = match machine {
        Some(machine) => format!("# {}\n{machine}\n", answer.text()),
        None => format!("# {}\n", answer.text()),
    };
    io::stderr().write_all(line.as_bytes())
}

/// When a connection has ended with an error, what was complained of over there may be on its way.
fn last_words(hears: &JoinHandle<()>) {
    let since = Instant::now();
    while !hears.is_finished() && since.elapsed() < LAST_WORDS {
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Desk<'_> {
    fn serve(&self, input: &mut BufReader<io::Stdin>) -> Result<Status, Failure> {
        let slots = Slots::open(&self.local.layout.state)?;
        let mut out_of_order = BTreeSet::new();
        let dir = &self.local.layout.store_dir;
        while let Some(question) = Try::read(input, dir)? {
            loop {
                let (number, slot) = match slots.take(&self.machines, &out_of_order, &question.needs)? {
                    Slot::Taken(number, slot) => (number, slot),
                    Slot::Busy if !self.can_be_built_there(&question) => {
                        say(Answer::Postpone, None)?;
                        break;
                    }
                    Slot::Busy | Slot::None => {
                        say(Answer::Decline, None)?;
                        break;
                    }
                };
                let Some(machine) = self.machines.get(number) else { continue };
                match self.connect(machine) {
                    Ok((far, hears)) => {
                        say(Answer::Accept, Some(&machine.uri))?;
                        let order = Order::read(input, dir)?;
                        let status = self.run(&question.drv, &order, machine, &far, &slots);
                        // The other side is done with us before anybody else has the slot.
                        drop(far);
                        drop(slot);
                        if status.is_err() {
                            last_words(&hears);
                        }
                        return status;
                    }
                    Err(failure) => {
                        let text = format!("cannot build on '{}': {}", machine.uri, chain(failure.error()));
                        let said = self.log.take_early();
                        let said = said.trim();
                        let more = if said.is_empty() { String::new() } else { format!(": {said}") };
                        tell(self.terminal, &format!("{text}{more}"));
                        out_of_order.insert(number);
                    }
                }
            }
        }
        Ok(Status::SUCCESS)
    }

    /// Can whoever asks do it now?
    fn can_be_built_there(&self, question: &Try) -> bool {
        let (settings, needs) = (&self.settings, &question.needs);
        let is_ours = needs.system == settings.system || settings.extra_platforms.contains(&needs.system);
        let has = |feature: &String| {
            settings.system_features.contains(feature) || settings.experimental_features.contains(feature)
        };
        question.willing && is_ours && needs.features.iter().all(has)
    }

    /// Also gives who hears what is complained of over there.
    fn connect(&self, machine: &Machine) -> Result<(Far, JoinHandle<()>), Failure> {
        let (complaints, errors) = io::pipe()?;
        let log = Arc::clone(&self.log);
        let hears = std::thread::Builder::new().name("complaints".to_owned()).spawn(move || log.follow(complaints))?;
        let far = self.reach(machine, errors);
        if far.is_err() {
            last_words(&hears);
        }
        Ok((far?, hears))
    }

    fn reach(&self, machine: &Machine, errors: PipeWriter) -> Result<Far, Failure> {
        let reporter = Arc::new(FarVoice {
            log: Arc::clone(&self.log),
            terminal: Arc::clone(self.terminal),
            interrupt: self.interrupt.clone(),
        });
        let dir = self.local.layout.store_dir.clone();
        let far = match choose(&machine.uri, &self.env, Facts::gather(&self.env, true)?)? {
            StoreChoice::Remote { uri } => {
                let mut address = Address::parse(&uri).map_err(RemoteError::from)?;
                address.key = machine.key.clone().or(address.key);
                address.host_key = machine.host_key.clone().or(address.host_key);
                let options = self.env.get("NIX_SSHOPTS").map(|words| words.to_string_lossy().into_owned());
                let options = options.unwrap_or_default();
                let way = Way { options: &options, is_verbose: self.terminal.shows(Level::Chatty) };
                Far::open(&uri, &address, dir, &self.settings, way, errors.into(), reporter)?
            }
            StoreChoice::Daemon { socket } => Far::daemon(&socket, dir, reporter)?,
            StoreChoice::Local(there) => {
                let uri = machine.uri.clone();
                if there.layout.real_store == self.local.layout.real_store {
                    return Err(HookError::SameStore { uri }.into());
                }
                Far::here(&uri, dir, &self.settings, Stdio::from(errors), reporter)?
            }
        };
        far.limit_builds(&self.settings)?;
        Ok(far)
    }

    /// Has a build done that was accepted.
    fn run(
        &self,
        drv_path: &StorePath,
        order: &Order,
        machine: &Machine,
        far: &Far,
        slots: &Slots,
    ) -> Result<Status, Failure> {
        let (near, drv) = self.open(drv_path)?;
        let errand = Errand {
            drv_path,
            drv: &drv,
            inputs: &order.inputs,
            outputs: &order.outputs,
            substitute: self.settings.builders_use_substitutes,
            shows_derivation: drv.output_paths().all(|(_, path)| path.is_some())
                && drv.kind().is_ok_and(|kind| kind == larder_core::derivation::Kind::InputAddressed)
                && !far.trusts_us(),
        };
        let uri = &machine.uri;
        let shown_drv = || self.local.layout.store_dir.full(drv_path);
        let lost = |source| HookError::Lost { drv: shown_drv(), machine: uri.clone(), source };
        let tell = |way: &'static str| {
            let dir = &self.local.layout.store_dir;
            move |path: &StorePath| {
                let text = format_args!("copying path '{}' {way} '{uri}'", dir.display(path));
                self.terminal.message(Level::Info, format_args!("{text}..."));
            }
        };
        self.log.open();
        let turn = slots.turn(machine, PATIENCE, &|| self.interrupt.is_raised())?;
        match &turn {
            Turn::Ours(_) => {}
            Turn::Cancelled => return Err(Interrupted.into()),
            Turn::TooLong => {
                let text = format_args!("somebody is hogging the upload lock for '{uri}', continuing...");
                self.terminal.message(Level::Error, text);
            }
        }
        errand.send(near.store(), far.store(), &tell("to")).map_err(lost)?;
        drop(turn);
        let result = errand.build(far.store()).map_err(lost)?;
        if !result.status.is_success() {
            return Ok(self.failed(&result, shown_drv(), uri));
        }
        errand.fetch(near.store(), far.store(), &result, &tell("from")).map_err(lost)?;
        Ok(Status::SUCCESS)
    }

    fn failed(&self, result: &BuildResult, drv: String, machine: &str) -> Status {
        let text = match (result.error.as_str(), result.status) {
            ("", BuildStatus::TimedOut) => "it timed out".to_owned(),
            ("", status) => format!("{status:?}"),
            (text, _) => text.trim_start_matches("error: ").to_owned(),
        };
        tell(self.terminal, &HookError::Failed { drv, machine: machine.to_owned(), text }.to_string());
        Status::of_hook(exit_code(result.status))
    }

    /// The store that needs the outputs, whose locks are held by whoever asked; and the derivation.
    fn open(&self, drv_path: &StorePath) -> Result<(Near, Derivation), Failure> {
        if let Some(program) = &self.nix_store {
            return self.open_theirs(program, drv_path);
        }
        let voice = Arc::new(HookVoice { terminal: Arc::clone(self.terminal), interrupt: self.interrupt.clone() });
        let options = Options {
            db_dir: Some(self.local.db_dir.clone()),
            allow_symlinked_store: self.settings.allow_symlinked_store,
            build_users_group: self.settings.build_users_group.clone(),
            ignored_acls: self.settings.ignored_acls.iter().cloned().collect(),
            auto_optimise_store: self.settings.auto_optimise_store,
            sync: self.settings.fsync_metadata,
            use_case_hack: self.settings.use_case_hack,
            ..Options::default()
        };
        let mut local = LocalStore::open(self.local.layout.clone(), options, Access::ReadWrite, voice)?;
        let drv = local.derivation(drv_path)?;
        let real = |path: &StorePath| self.local.layout.real_path(path);
        let held_locks: HeldLocks = drv.output_paths().filter_map(|(_, path)| path).map(real).collect();
        local.set_options(Arc::new(Options { held_locks, ..Options::clone(local.options()) }));
        let (builds, interrupt) = (Arc::default(), self.interrupt.clone());
        let (settings, env) = (Arc::new(self.settings.clone()), Arc::clone(&self.env));
        let engine = Engine { local, settings, builds, hides_logs: false, interrupt, env };
        Ok((Near::Ours(Box::new(engine)), drv))
    }

    /// The same by a program of real Nix. Which locks are held it is told when it starts, and which
    /// those are the derivation says, which is read by another one.
    fn open_theirs(&self, program: &str, drv_path: &StorePath) -> Result<(Near, Derivation), Failure> {
        let mut words: Vec<String> = [program, "--serve", "--write"].map(str::to_owned).into();
        if !["", "auto"].contains(&self.settings.store.as_str()) {
            words.extend(["--store".to_owned(), self.settings.store.clone()]);
        }
        let layout = &self.local.layout;
        let start = |held_locks: &OsStr| {
            let voice = HookVoice { terminal: Arc::clone(self.terminal), interrupt: self.interrupt.clone() };
            Far::of_program(&words, held_locks, layout.store_dir.clone(), &self.settings, Arc::new(voice))
        };
        let drv = start(OsStr::new(""))?.derivation(drv_path)?;
        // It goes by the names of paths, wherever they lie.
        let paths = drv.output_paths().filter_map(|(_, path)| path);
        let held: Vec<String> = paths.map(|path| layout.store_dir.full(path)).collect();
        let far = start(OsStr::new(&held.join(" ")))?;
        Ok((Near::Theirs(Box::new(far)), drv))
    }
}

/// Tells whoever asked of what goes on here.
struct HookVoice {
    terminal: Arc<Terminal>,
    interrupt: Interrupt,
}

impl Reporter for HookVoice {
    fn shows(&self, level: Level) -> bool {
        self.terminal.shows(level)
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.terminal.message(level, text);
    }
    fn is_cancelled(&self) -> bool {
        self.interrupt.is_raised()
    }
}

/// Tells of what a daemon says on another machine: lines of the builder go to the log.
struct FarVoice {
    log: Arc<Log>,
    terminal: Arc<Terminal>,
    interrupt: Interrupt,
}

impl Reporter for FarVoice {
    fn shows(&self, level: Level) -> bool {
        self.terminal.shows(level)
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.terminal.message(level, text);
    }
    fn result(&self, _activity: u64, result: ActivityResult<'_>) {
        if let ActivityResult::BuildLogLine(line) = result {
            self.log.write(&[line, b"\n"].concat());
        }
    }
    fn is_cancelled(&self) -> bool {
        self.interrupt.is_raised()
    }
}

/// The log of the build, which whoever asked reads.
#[derive(Debug)]
struct Log {
    out: File,
    /// What came before there was a build: `ssh` may say there why there will be none.
    early: Mutex<Option<Vec<u8>>>,
}

impl Log {
    /// Takes bytes in; before there is a build they are kept.
    fn write(&self, bytes: &[u8]) {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *early {
            Some(kept) => {
                let room = MAX_COMPLAINT.saturating_sub(kept.len()).min(bytes.len());
                kept.extend_from_slice(bytes.get(..room).unwrap_or_default());
            }
            // Whoever does not read it is gone, and this process will be, too.
            None => drop((&self.out).write_all(bytes)),
        }
    }

    /// From now on there is a build.
    fn open(&self) {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = early.take() {
            drop((&self.out).write_all(&kept));
        }
    }

    fn take_early(&self) -> String {
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = early.as_mut().map(std::mem::take).unwrap_or_default();
        String::from_utf8_lossy(&kept).into_owned()
    }

    /// Takes in all that comes there.
    fn follow(&self, mut complaints: PipeReader) {
        let mut block = [0; 8 << 10];
        loop {
            match complaints.read(&mut block) {
                Ok(0) => return,
                Ok(n) => self.write(block.get(..n).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    /// Ends this process when nobody reads the log any more, and with it what it started.
    fn end_with_reader(self: &Arc<Self>) -> io::Result<()> {
        let log = Arc::clone(self);
        let watch = move || {
            loop {
                let mut fds = [PollFd::new(&log.out, PollFlags::empty())];
                match poll(&mut fds, None) {
                    Ok(_) => std::process::exit(Status::FAILURE.code().into()),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(_) => return,
                }
            }
        };
        std::thread::Builder::new().name("reader".to_owned()).spawn(watch).map(drop)
    }
}
