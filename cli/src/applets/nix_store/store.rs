//! The operations of `nix-store` on a local store, but for queries.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use larder_core::content_address::Method;
use larder_core::hash::Algorithm;
use larder_core::registration::write_path;
use larder_core::report::{ActivityResult, Level, Progress, Reporter, Start};
use larder_core::settings::Settings;
use larder_core::store_path::{Name, NameError, StorePath};
use larder_fs::layout::Access;
use larder_fs::path_lock::HeldLocks;
use larder_store::collect::{CollectOptions, Freed};
use larder_store::delete::DeleteOptions;
use larder_store::ingest::ContentAddressed;
use larder_store::register::RegisterOptions;
use larder_store::verify::VerifyOptions;
use larder_store::{LocalStore, Options, Pages};
use larder_wire::worker::tunnel::Line as _;

use super::realise;
use crate::applets::Context;
use crate::args::nix_store::{BuildMode, Command, GcAction, Query};
use crate::args::{Common, shown};
use crate::builds::expand_tabs;
use crate::conf::{self, Facts, StoreChoice, choose};
use crate::daemon::LAST_GRACE;
use crate::daemon::overlay::Rules;
use crate::daemon::socket::{StdioLine, StdoutWriter};
use crate::engine::Engine;
use crate::exit::{Failure, Status};
use crate::interrupt::Interrupt;
use crate::paths::{absolute, store_path, store_paths};
use crate::printer::{Output, Printer};
use crate::realising::Repairs;
use crate::remote::Opened;
use crate::terminal::{Terminal, filter_log};

/// Why an operation on the store cannot be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(in crate::applets) enum StoreOpError {
    #[error("cannot open Nix store '{uri}': this works on local stores only")]
    NotLocal { uri: String },
    #[error("path '{path}' does not exist")]
    NoFile { path: String },
    #[error("path '{path}' does not exist and cannot be created")]
    CannotBeCreated { path: String },
    #[error("path '{path}' is not a derivation")]
    NoDerivation { path: String },
    #[error("'{path}' has no name that a store object could have")]
    NoName { path: String },
    #[error("'{name}' cannot be the name of a store object")]
    Name { name: String, source: NameError },
}

/// Tells the terminal, and asks whether the user wants us to stop.
pub(in crate::applets) struct Voice {
    pub(in crate::applets) terminal: Arc<Terminal>,
    pub(in crate::applets) interrupt: Interrupt,
}

impl Voice {
    /// Shows a line of a builder's output.
    pub(in crate::applets) fn log_line(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let shown = filter_log(&text, self.terminal.has_colour());
        self.terminal.message(Level::Error, format_args!("{}", expand_tabs(&shown)));
    }
}

impl Reporter for Voice {
    fn shows(&self, level: Level) -> bool {
        self.terminal.shows(level)
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.terminal.message(level, text);
    }
    fn progress(&self, step: Progress<'_>) {
        self.terminal.progress(step);
    }
    fn start(&self, start: &Start<'_>) -> u64 {
        // In the log for programs a build is told by who follows it.
        if !start.text.is_empty() && !self.terminal.is_json() {
            self.terminal.message(start.level, format_args!("{}...", start.text));
        }
        0
    }
    fn is_cancelled(&self) -> bool {
        self.interrupt.is_raised()
    }
}

/// The store that is chosen, if another process keeps it.
pub(super) fn elsewhere(cx: &Context, settings: &Settings, command: &Command) -> Result<Option<StoreChoice>, Failure> {
    let changes = !matches!(
        command,
        Command::Query(Query { force_realise: false, .. })
            | Command::ReadLog { .. }
            | Command::Export { .. }
            | Command::VerifyPath { .. }
            | Command::CheckValidity { .. }
            | Command::DumpDb { .. }
            | Command::PrintEnv { .. }
            | Command::QueryFailedPaths
            | Command::Gc { action: GcAction::PrintRoots | GcAction::PrintLive | GcAction::PrintDead, .. }
            | Command::Serve { write: false }
    );
    match choose(&settings.store, &cx.env, Facts::gather(&cx.env, changes)?)? {
        StoreChoice::Local(_) => Ok(None),
        choice => Ok(Some(choice)),
    }
}

/// The local store that the settings and the environment choose.
pub(in crate::applets) fn local(
    cx: &Context,
    settings: &Settings,
    access: Access,
) -> Result<conf::LocalStore, Failure> {
    match choose(&settings.store, &cx.env, Facts::gather(&cx.env, access == Access::ReadWrite)?)? {
        StoreChoice::Local(local) => Ok(local),
        StoreChoice::Daemon { socket } => {
            Err(StoreOpError::NotLocal { uri: format!("unix://{}", socket.display()) }.into())
        }
        StoreChoice::Remote { uri } => Err(StoreOpError::NotLocal { uri }.into()),
    }
}

/// Opens the store that the settings and the environment choose.
pub(in crate::applets) fn open(cx: &Context, settings: &Settings, access: Access) -> Result<LocalStore, Failure> {
    open_with(cx, settings, access, Pages::Usual)
}

/// The same for who looks at all that is there.
pub(in crate::applets) fn open_for_survey(
    cx: &Context,
    settings: &Settings,
    access: Access,
) -> Result<LocalStore, Failure> {
    open_with(cx, settings, access, Pages::Few)
}

/// The same for who is going to answer many questions.
pub(in crate::applets) fn open_for_many(
    cx: &Context,
    settings: &Settings,
    access: Access,
) -> Result<LocalStore, Failure> {
    open_with(cx, settings, access, Pages::Many)
}

fn open_with(cx: &Context, settings: &Settings, access: Access, pages: Pages) -> Result<LocalStore, Failure> {
    open_chosen(cx, settings, local(cx, settings, access)?, access, pages)
}

/// Opens a local store that was chosen.
pub(in crate::applets) fn open_chosen(
    cx: &Context,
    settings: &Settings,
    local: conf::LocalStore,
    access: Access,
    pages: Pages,
) -> Result<LocalStore, Failure> {
    let access = if local.read_only { Access::ReadOnly } else { access };
    if access == Access::ReadWrite {
        if local.is_private && !local.layout.state.exists() {
            cx.terminal.message(
                Level::Notice,
                format_args!(
                    "'/nix' is not yours to write to, so this store is your own and lies in '{}'",
                    local.root.as_deref().unwrap_or(&local.layout.state).display()
                ),
            );
        }
        if cx.env.is_root() {
            // Before anything is opened below it, and before there are threads to leave behind.
            larder_fs::mounts::make_store_writable(&local.layout.real_store)?;
        }
    }
    open_local(cx, settings, local, access, pages)
}

fn open_local(
    cx: &Context,
    settings: &Settings,
    local: conf::LocalStore,
    access: Access,
    pages: Pages,
) -> Result<LocalStore, Failure> {
    let options = Options { pages, ..store_options(cx, settings, &local) };
    let voice = Arc::new(Voice { terminal: Arc::clone(&cx.terminal), interrupt: cx.interrupt.clone() });
    let store = LocalStore::open(local.layout, options, access, voice)?;
    store.tell_of_real_nix()?;
    Ok(store)
}

/// Opens the local store for a daemon, and says how options of it follow from settings.
pub(in crate::applets) fn open_for_daemon(
    cx: &Context,
    settings: &Settings,
) -> Result<(LocalStore, Rules, conf::LocalStore), Failure> {
    let store = open_for_many(cx, settings, Access::ReadWrite)?;
    let StoreChoice::Local(local) = choose(&settings.store, &cx.env, Facts::gather(&cx.env, true)?)? else {
        return Err(StoreOpError::NotLocal { uri: settings.store.clone() }.into());
    };
    let base = Arc::clone(store.options());
    let options = move |settings: &Settings| Options {
        free_space_file: base.free_space_file.clone(),
        gc_sync_file: base.gc_sync_file.clone(),
        db_dir: base.db_dir.clone(),
        held_locks: base.held_locks.clone(),
        ..of_settings(settings)
    };
    let rules = Rules { machine: conf::machine(&cx.env, true)?, options: Box::new(options) };
    Ok((store, rules, local))
}

/// `--serve`: commands of another machine on standard input and output.
pub(super) fn serve(cx: &Context, settings: Settings, write: bool) -> Result<(), Failure> {
    let access = if write { Access::ReadWrite } else { Access::ReadOnly };
    let local = open_for_many(cx, &settings, access)?;
    let voice = Arc::new(RemoteVoice {
        voice: Voice { terminal: Arc::clone(&cx.terminal), interrupt: cx.interrupt.clone() },
        line: StdioLine(cx.interrupt.clone()),
        builds: AtomicBool::new(false),
    });
    let local = local.session(Arc::clone(local.options()), Arc::clone(&voice) as _);
    let (interrupt, env) = (cx.interrupt.clone(), Arc::new(cx.env.clone()));
    let settings = Arc::new(settings);
    let engine = Engine { local, settings, builds: Arc::default(), hides_logs: false, interrupt, env };
    let mut session = RemoteSession { engine, voice };
    let mut input = io::BufReader::with_capacity(64 << 10, io::stdin());
    let mut output = io::BufWriter::with_capacity(64 << 10, StdoutWriter::new()?);
    let served = larder_wire::serve::server::serve(&mut input, &mut output, &mut session, write);
    // What was built is known before the last of it is tidied up.
    session.engine.builds.wait_until_idle(LAST_GRACE);
    Ok(served?)
}

/// `--serve` for a store that is a daemon's: what an ordinary user's login comes to.
pub(super) fn serve_elsewhere(cx: &Context, opened: Opened, write: bool) -> Result<(), Failure> {
    let mut input = io::BufReader::with_capacity(64 << 10, io::stdin());
    let mut output = io::BufWriter::with_capacity(64 << 10, StdoutWriter::new()?);
    let mut session = RelaySession { opened, terminal: Arc::clone(&cx.terminal) };
    Ok(larder_wire::serve::server::serve(&mut input, &mut output, &mut session, write)?)
}

/// The daemon behind a remote command.
struct RelaySession {
    opened: Opened,
    terminal: Arc<Terminal>,
}

impl larder_wire::serve::server::Session for RelaySession {
    fn store(&self) -> &dyn larder_core::api::Store {
        self.opened.store()
    }

    fn configure_builds(&mut self, options: &larder_wire::serve::ops::BuildOptions) {
        self.terminal.set_verbosity(Level::Error);
        self.opened.configure_builds(options);
    }
}

/// The store of a remote command.
struct RemoteSession {
    engine: Engine,
    voice: Arc<RemoteVoice>,
}

/// Tells the terminal of the other machine, and asks whether the client is still there.
struct RemoteVoice {
    voice: Voice,
    line: StdioLine,
    /// Only builds end with the client: other commands may well be the last that it sends.
    builds: AtomicBool,
}

impl Reporter for RemoteVoice {
    fn shows(&self, level: Level) -> bool {
        self.voice.shows(level)
    }
    fn message(&self, level: Level, text: std::fmt::Arguments<'_>) {
        self.voice.message(level, text);
    }
    fn start(&self, start: &Start<'_>) -> u64 {
        self.voice.start(start)
    }
    fn result(&self, _activity: u64, result: ActivityResult<'_>) {
        // The other machine shows it, or not.
        if let ActivityResult::BuildLogLine(line) = result {
            self.voice.log_line(line);
        }
    }
    fn is_cancelled(&self) -> bool {
        self.voice.is_cancelled() || (self.builds.load(Ordering::Relaxed) && self.line.has_hung_up())
    }
}

impl larder_wire::serve::server::Session for RemoteSession {
    fn store(&self) -> &dyn larder_core::api::Store {
        &self.engine
    }

    fn configure_builds(&mut self, options: &larder_wire::serve::ops::BuildOptions) {
        let seconds = |s: u64| i64::try_from(s).unwrap_or(i64::MAX);
        let settings = Arc::make_mut(&mut self.engine.settings);
        settings.max_silent_time = seconds(options.max_silent_time_s);
        settings.timeout = seconds(options.build_timeout_s);
        settings.max_build_log_size = options.max_log_size_bytes;
        settings.keep_failed = options.keep_failed;
        // The other side has looked for substitutes already, and has the log.
        settings.substitute = false;
        settings.keep_build_log = false;
        self.voice.voice.terminal.set_verbosity(Level::Error);
        self.voice.builds.store(true, Ordering::Relaxed);
    }
}

/// What of the settings and the environment concerns a local store.
fn store_options(cx: &Context, settings: &Settings, local: &conf::LocalStore) -> Options {
    Options {
        free_space_file: cx.env.get_filled("_NIX_TEST_FREE_SPACE_FILE").map(Into::into),
        gc_sync_file: cx.env.get_filled("_NIX_TEST_GC_SYNC").map(Into::into),
        db_dir: Some(local.db_dir.clone()),
        held_locks: cx.env.get("NIX_HELD_LOCKS").map(|v| HeldLocks::parse(v.as_bytes())).unwrap_or_default(),
        ..of_settings(settings)
    }
}

/// What of the settings concerns a local store.
fn of_settings(settings: &Settings) -> Options {
    Options {
        use_case_hack: settings.use_case_hack,
        allow_symlinked_store: settings.allow_symlinked_store,
        build_users_group: settings.build_users_group.clone(),
        ignored_acls: settings.ignored_acls.iter().cloned().collect(),
        preallocate_contents: settings.preallocate_contents,
        gc_reserved_space_bytes: u64::try_from(settings.gc_reserved_space).unwrap_or(0),
        keep_outputs: settings.keep_outputs,
        keep_derivations: settings.keep_derivations,
        min_free_bytes: settings.min_free,
        max_free_bytes: settings.max_free,
        min_free_check_interval_s: settings.min_free_check_interval,
        auto_optimise_store: settings.auto_optimise_store,
        sync: settings.fsync_metadata,
        ..Options::default()
    }
}

/// What a file is called in the store: the last part of its path.
pub(in crate::applets) fn object_name(file: &OsStr) -> Result<Name, Failure> {
    let path = absolute(file)?;
    let base = Path::new(OsStr::from_bytes(&path)).file_name();
    let base = base.ok_or_else(|| StoreOpError::NoName { path: shown(file) })?;
    let text = base.to_str().unwrap_or("\u{fffd}");
    Name::new(text).map_err(|source| StoreOpError::Name { name: shown(base), source }.into())
}

/// `--add` and `--add-fixed`: all files in as few commits as can be; paths are printed as they
/// become valid, in order, also those before an error.
pub(super) fn add(
    cx: &Context,
    settings: &Settings,
    files: &[OsString],
    method: Method,
    algorithm: Algorithm,
) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let mut arrivals = store.arrivals();
    let mut out = Printer::new(Output::Listing);
    let mut waiting = Vec::new();
    let mut outcome: Result<(), Failure> = Ok(());
    for file in files {
        let added = object_name(file).and_then(|name| {
            let path = std::path::PathBuf::from(OsStr::from_bytes(&absolute(file)?));
            if let Err(e) = std::fs::symlink_metadata(&path)
                && e.kind() == io::ErrorKind::NotFound
            {
                return Err(StoreOpError::NoFile { path: path.display().to_string() }.into());
            }
            Ok(arrivals.add(&path, &ContentAddressed { name, method, algorithm })?)
        });
        match added {
            Ok(path) => waiting.push(path),
            Err(error) => {
                outcome = Err(error);
                break;
            }
        }
    }
    arrivals.commit()?;
    for path in waiting {
        out.line(store.dir().display(&path))?;
    }
    out.finish()?;
    outcome
}

pub(super) fn export(cx: &Context, settings: &Settings, paths: &[OsString]) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let paths = store_paths(store.dir(), paths)?;
    let mut out = Printer::new(Output::Stream);
    store.export(&paths, &mut out)?;
    Ok(out.finish()?)
}

pub(super) fn import(cx: &Context, settings: &Settings) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    // Printed when all is there: a stream that ends in an error prints nothing, as in real Nix.
    let mut imported = Vec::new();
    store.import(io::stdin().lock(), |path| {
        imported.push(path.clone());
        Ok(())
    })?;
    let mut out = Printer::new(Output::Listing);
    for path in &imported {
        out.line(store.dir().display(path))?;
    }
    Ok(out.finish()?)
}

pub(super) fn verify(
    cx: &Context,
    settings: &Settings,
    common: &Common,
    check_contents: bool,
    repair: bool,
) -> Result<Status, Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let repairs = Repairs { realiser: cx.realiser(&store, settings), how: realise::how(cx, common, BuildMode::Repair) };
    let verified = store.verify(VerifyOptions { check_contents, repair, resume: false }, &repairs)?;
    if verified.errors > 0 {
        cx.terminal.message(Level::Warn, format_args!("not all store errors were fixed"));
        return Ok(Status::FAILURE);
    }
    Ok(Status::SUCCESS)
}

pub(super) fn verify_path(cx: &Context, settings: &Settings, paths: &[OsString]) -> Result<Status, Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let mut status = Status::SUCCESS;
    for path in paths {
        if !store.verify_path(&store_path(store.dir(), path)?)? {
            status = Status::FAILURE;
        }
    }
    Ok(status)
}

pub(super) fn check_validity(
    cx: &Context,
    settings: &Settings,
    print_invalid: bool,
    paths: &[OsString],
) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let mut out = Printer::new(Output::Listing);
    for path in store_paths(store.dir(), paths)? {
        if store.is_valid(&path)? {
            continue;
        }
        if !print_invalid {
            return Err(store.not_valid(&path).into());
        }
        out.line(store.dir().display(&path))?;
    }
    Ok(out.finish()?)
}

pub(super) fn dump_db(cx: &Context, settings: &Settings, paths: &[OsString]) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let mut out = Printer::new(Output::Listing);
    if paths.is_empty() {
        store.dump_db(None, &mut out)?;
    } else {
        store.dump_db(Some(&store_paths(store.dir(), paths)?), &mut out)?;
    }
    Ok(out.finish()?)
}

pub(super) fn load_db(cx: &Context, settings: &Settings) -> Result<(), Failure> {
    Ok(open(cx, settings, Access::ReadWrite)?.load_db(io::stdin().lock())?)
}

pub(super) fn register_validity(
    cx: &Context,
    settings: &Settings,
    reregister: bool,
    hash_given: bool,
) -> Result<(), Failure> {
    let options = RegisterOptions { hash_given, reregister };
    Ok(open(cx, settings, Access::ReadWrite)?.register_validity(io::stdin().lock(), options)?)
}

/// `--delete`: what was done is told on standard output, whether it went well or not.
pub(super) fn delete(
    cx: &Context,
    settings: &Settings,
    ignore_liveness: bool,
    paths: &[OsString],
) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let paths = store_paths(store.dir(), paths)?;
    let mut freed = Freed::default();
    let outcome = store.delete(&paths, DeleteOptions { ignore_liveness }, &mut freed);
    print_freed(&freed)?;
    Ok(outcome?)
}

/// What a deletion prints, however it ended.
fn print_freed(freed: &Freed) -> Result<(), Failure> {
    let mut out = Printer::new(Output::Listing);
    out.line(format_args!("{} store paths deleted, {} freed", freed.paths, mib(freed.bytes)))?;
    Ok(out.finish()?)
}

/// `--gc`
pub(in crate::applets) fn collect(
    cx: &Context,
    settings: &Settings,
    action: GcAction,
    max_freed_bytes: Option<u64>,
) -> Result<(), Failure> {
    if action == GcAction::Delete {
        let store = open_for_survey(cx, settings, Access::ReadWrite)?;
        let mut freed = Freed::default();
        let outcome = store.collect(CollectOptions { max_freed_bytes }, &mut freed);
        print_freed(&freed)?;
        return Ok(outcome?);
    }
    let store = open_for_survey(cx, settings, Access::ReadOnly)?;
    let mut out = Printer::new(Output::Listing);
    if action == GcAction::PrintRoots {
        for root in store.all_roots()? {
            out.line(root.display(store.dir()))?;
        }
        return Ok(out.finish()?);
    }
    let say = |text: &str| cx.terminal.message(Level::Info, format_args!("{text}"));
    say("finding garbage collector roots...");
    let lists_live = action == GcAction::PrintLive;
    let survey = if lists_live { store.survey_live() } else { store.survey() }?;
    // Nothing is looked at when nothing may be deleted, as in Nix.
    if max_freed_bytes != Some(0) {
        say("determining live/dead paths...");
        let mut line = Vec::new();
        let mut tell = |path| {
            line.clear();
            write_path(&mut line, store.dir(), path);
            out.bytes(&line)
        };
        if lists_live {
            survey.live_paths().try_for_each(&mut tell)?;
        } else {
            survey.dead_paths().try_for_each(&mut tell)?;
        }
    }
    // The process ends now; to give this back piece by piece takes longer than to leave it.
    std::mem::forget(survey);
    Ok(out.finish()?)
}

/// `--optimise`
pub(super) fn optimise(cx: &Context, settings: &Settings) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let outcome = store.optimise();
    if let Ok(saved) | Err(larder_store::StoreError::NotLinked { saved, .. }) = &outcome {
        let text = format_args!("{} freed by hard-linking {} files", mib(saved.bytes), saved.files);
        cx.terminal.message(Level::Notice, text);
    }
    outcome?;
    Ok(())
}

/// A number of bytes in mebibytes, two decimals: `0.01 MiB`.
pub(in crate::applets) fn mib(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
    let mib = bytes as f64 / f64::from(1 << 20);
    format!("{mib:.2} MiB")
}

pub(super) fn print_env(cx: &Context, settings: &Settings, derivation: &OsStr) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let path = store.dir().parse(derivation.as_bytes())?;
    must_be_there(&store, &path)?;
    if !path.is_derivation() {
        return Err(StoreOpError::NoDerivation { path: store.dir().full(&path) }.into());
    }
    let mut out = Printer::new(Output::Listing);
    out.bytes(&larder_core::derivation::options::print_env(&store.derivation(&path)?))?;
    Ok(out.finish()?)
}

/// Fails for a derivation that is not valid and that nothing can bring.
pub(super) fn must_be_there(store: &LocalStore, path: &StorePath) -> Result<(), Failure> {
    if store.is_valid(path)? {
        return Ok(());
    }
    Err(StoreOpError::CannotBeCreated { path: store.dir().full(path) }.into())
}

pub(super) fn query_failed_paths(cx: &Context, settings: &Settings) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let mut out = Printer::new(Output::Listing);
    for path in store.failed_paths()? {
        out.line(store.dir().display(&path))?;
    }
    Ok(out.finish()?)
}

pub(super) fn clear_failed_paths(cx: &Context, settings: &Settings, paths: &[OsString]) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    if paths.iter().any(|path| path == "*") {
        return Ok(store.clear_failed_paths(None)?);
    }
    Ok(store.clear_failed_paths(Some(&store_paths(store.dir(), paths)?))?)
}
