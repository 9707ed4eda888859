//! The operations of `nix-store` on a store that another process keeps.
//!
//! What the protocols have no word for is refused. Where the store is a daemon's, its files lie on
//! this machine and are read from there.

pub(in crate::applets) mod objects;
pub(in crate::applets) mod query;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use larder_core::api::{self, Collect, ContentMethod, DerivedPath, Missing, NewContent, Outputs, Store};
use larder_core::content_address::Method;
use larder_core::derivation::{Derivation, OutputName};
use larder_core::hash::Algorithm;
use larder_core::path_info::PathInfo;
use larder_core::registration::write_path_info;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_gc::add_root;
use larder_realise::plan::{Key, Target, Wanted};
use larder_store::ingest::ContentAddressed;

use super::realise::{print_log, root_link, warn_of_collector};
use super::store::{mib, object_name};
use crate::applets::Context;
use crate::applets::nar::dump_options;
use crate::args::Common;
use crate::args::nix_store::{BuildMode, Command, GcAction, Realise};
use crate::conf::LocalStore;
use crate::exit::{Failure, Status};
use crate::paths::{absolute, store_path, store_paths};
use crate::printer::{Output, Printer};
use crate::realising::target;
use crate::remote::Opened;

/// Why it cannot be done there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum FarError {
    #[error("operation '{operation}' is not supported by store '{uri}'; it works on local stores only")]
    NotThere { operation: &'static str, uri: String },
    #[error("path '{path}' is not valid")]
    NotValid { path: String },
    #[error("path '{path}' does not exist")]
    NoFile { path: String },
    #[error("path '{path}' does not exist and cannot be created")]
    CannotBeCreated { path: String },
    #[error("path '{path}' is not a derivation")]
    NoDerivation { path: String },
    #[error("cannot repair path '{path}'")]
    CannotRepair { path: String },
    #[error("path '{path}' was modified! expected hash 'sha256:{expected}', got 'sha256:{found}'")]
    Modified { path: String, expected: String, found: String },
}

/// Outputs with their names, or a path that is none.
pub(in crate::applets) type Outs = Vec<(Option<OutputName>, StorePath)>;

/// A store elsewhere, and who asks.
pub(in crate::applets) struct Far<'a> {
    cx: &'a Context,
    settings: &'a Settings,
    common: &'a Common,
    store: &'a dyn Store,
    uri: &'a str,
    /// Where the files lie, if that is on this machine.
    files: Option<&'a LocalStore>,
}

impl<'a> Far<'a> {
    pub(in crate::applets) fn new(
        cx: &'a Context,
        settings: &'a Settings,
        common: &'a Common,
        opened: &'a Opened,
    ) -> Self {
        Self { cx, settings, common, store: opened.store(), uri: &opened.uri, files: opened.files.as_ref() }
    }

    /// Where the files lie, which an operation needs to be on this machine.
    pub(in crate::applets) fn files(&self, operation: &'static str) -> Result<&'a LocalStore, Failure> {
        self.files.ok_or_else(|| self.not_there(operation))
    }
}

impl Far<'_> {
    /// Does what is asked.
    pub(super) fn run(&self, command: &Command) -> Result<Status, Failure> {
        let dir = self.store.dir();
        match command {
            Command::Realise(args) => self.realise(args)?,
            Command::Query(query) => self.query(query)?,
            Command::Add { files } => self.add(files, Method::Recursive, Algorithm::Sha256)?,
            Command::AddFixed { method, algorithm, files } => self.add(files, *method, *algorithm)?,
            Command::RepairPath { paths } => self.repair(&store_paths(dir, paths)?)?,
            Command::ReadLog { paths } => self.read_logs(paths)?,
            Command::Export { paths } => self.export(&store_paths(dir, paths)?)?,
            Command::Import => self.import()?,
            Command::Verify { check_contents, repair } => {
                if self.store.verify(*check_contents, *repair)? {
                    self.cx.terminal.message(Level::Warn, format_args!("not all store errors were fixed"));
                    return Ok(Status::FAILURE);
                }
            }
            Command::VerifyPath { paths } => return self.verify(&store_paths(dir, paths)?),
            Command::CheckValidity { print_invalid, paths } => {
                self.check_validity(*print_invalid, &store_paths(dir, paths)?)?;
            }
            Command::DumpDb { paths } => self.dump_db(&store_paths(dir, paths)?)?,
            Command::Gc { action, max_freed_bytes } => self.collect(*action, *max_freed_bytes)?,
            Command::Optimise => self.store.optimise()?,
            Command::Delete { ignore_liveness: true, .. } => return Err(self.not_there("--ignore-liveness")),
            Command::Delete { ignore_liveness: false, paths } => {
                let paths = store_paths(dir, paths)?.into_iter().collect();
                self.print_freed(&Collect::DeleteSpecific(paths), u64::MAX)?;
            }
            Command::PrintEnv { derivation } => {
                let path = dir.parse(derivation.as_bytes())?;
                if !path.is_derivation() {
                    return Err(FarError::NoDerivation { path: dir.full(&path) }.into());
                }
                let mut out = Printer::new(Output::Listing);
                out.bytes(&larder_core::derivation::options::print_env(&self.derivation(&path)?))?;
                out.finish()?;
            }
            Command::Init => {}
            Command::LoadDb => return Err(self.not_there("--load-db")),
            Command::RegisterValidity { .. } => return Err(self.not_there("--register-validity")),
            Command::QueryFailedPaths => return Err(self.not_there("--query-failed-paths")),
            Command::ClearFailedPaths { .. } => return Err(self.not_there("--clear-failed-paths")),
            Command::Serve { .. }
            | Command::Version
            | Command::PrintFixedPath { .. }
            | Command::GenerateBinaryCacheKey { .. }
            | Command::Dump { .. }
            | Command::Restore { .. } => return Err(self.not_there("this")),
        }
        Ok(Status::SUCCESS)
    }

    /// Why that is done in a local store only.
    pub(in crate::applets) fn not_there(&self, operation: &'static str) -> Failure {
        FarError::NotThere { operation, uri: self.uri.to_owned() }.into()
    }

    fn not_valid(&self, path: &StorePath) -> Failure {
        FarError::NotValid { path: self.store.dir().full(path) }.into()
    }

    fn info(&self, path: &StorePath) -> Result<PathInfo, Failure> {
        self.store.info(path)?.ok_or_else(|| self.not_valid(path))
    }

    fn realise(&self, args: &Realise) -> Result<(), Failure> {
        let dir = self.store.dir();
        let mut targets: Vec<DerivedPath> =
            args.targets.iter().map(|word| Ok(derived(&target(dir, word)?))).collect::<Result<_, Failure>>()?;
        if targets.is_empty() {
            return Ok(());
        }
        let mode = match args.mode {
            BuildMode::Normal => api::BuildMode::Normal,
            BuildMode::Repair => api::BuildMode::Repair,
            BuildMode::Check => api::BuildMode::Check,
        };
        self.make_valid(&mut targets, mode, args.dry_run, args.ignore_unknown)?;
        if args.dry_run || args.ignore_unknown {
            return Ok(());
        }
        if args.roots.add_root.is_none() {
            warn_of_collector(self.cx, self.common);
        }
        let mut out = Printer::new(Output::Listing);
        for (outputs, number) in self.outputs_of(&targets)?.into_iter().zip(1usize..) {
            let mut printed: BTreeSet<Vec<u8>> = BTreeSet::new();
            for (output, path) in outputs {
                let suffix = output.as_ref().map(OutputName::as_str).filter(|name| *name != "out");
                printed.insert(match &args.roots.add_root {
                    None => dir.full(&path).into_bytes(),
                    Some(root) => {
                        let link = root_link(root, number, suffix)?;
                        self.add_root("--add-root", &path, &link)?.into_os_string().into_vec()
                    }
                });
            }
            if !args.no_output {
                for line in printed {
                    out.bytes(&line)?;
                    out.bytes(b"\n")?;
                }
            }
        }
        Ok(out.finish()?)
    }

    /// Builds or fetches, after telling what is missing. What nobody has may be left out.
    pub(in crate::applets) fn make_valid(
        &self,
        targets: &mut Vec<DerivedPath>,
        mode: api::BuildMode,
        dry_run: bool,
        ignore_unknown: bool,
    ) -> Result<(), Failure> {
        let mut missing = self.store.missing(targets)?;
        if ignore_unknown {
            targets.retain(|target| !missing.unknown.contains(target.path()));
            missing.unknown.clear();
        }
        if self.settings.print_missing {
            self.tell_missing(&missing)?;
        }
        if !dry_run {
            self.store.realise(targets, mode)?;
        }
        Ok(())
    }

    fn tell_missing(&self, missing: &Missing) -> Result<(), Failure> {
        let dir = self.store.dir();
        let say = |text: std::fmt::Arguments<'_>| self.cx.terminal.message(Level::Info, text);
        let each = |paths: &[StorePath]| paths.iter().for_each(|path| say(format_args!("  {}", dir.display(path))));
        match missing.will_build.len() {
            0 => {}
            1 => say(format_args!("this derivation will be built:")),
            many => say(format_args!("these {many} derivations will be built:")),
        }
        if !missing.will_build.is_empty() {
            each(&self.store.sorted(&missing.will_build)?);
        }
        let sizes =
            format!("({} download, {} unpacked)", mib(missing.download_size_bytes), mib(missing.nar_size_bytes));
        match missing.will_substitute.len() {
            0 => {}
            1 => say(format_args!("this path will be fetched {sizes}:")),
            many => say(format_args!("these {many} paths will be fetched {sizes}:")),
        }
        each(&missing.will_substitute.iter().cloned().collect::<Vec<_>>());
        if !missing.unknown.is_empty() {
            let why = if self.common.read_only { " (may be caused by read-only store access)" } else { "" };
            say(format_args!("don't know how to build these paths{why}:"));
        }
        each(&missing.unknown.iter().cloned().collect::<Vec<_>>());
        Ok(())
    }

    /// Makes a link on this machine, and lets the daemon know of it.
    pub(in crate::applets) fn add_root(
        &self,
        flag: &'static str,
        path: &StorePath,
        link: &Path,
    ) -> Result<PathBuf, Failure> {
        let files = self.files(flag)?;
        self.store.add_temp_roots(&[path.clone()].into())?;
        let link = add_root::make_link(&files.layout, path, link)?;
        self.store.add_indirect_root(&link)?;
        Ok(link)
    }

    /// For each target the outputs that it names, or the path itself, with the names of outputs.
    pub(in crate::applets) fn outputs_of(&self, targets: &[DerivedPath]) -> Result<Vec<Outs>, Failure> {
        let drv = |target: &'_ DerivedPath| matches!(target, DerivedPath::Built { .. });
        let drvs: Vec<&StorePath> = targets.iter().filter(|target| drv(target)).map(DerivedPath::path).collect();
        let mut known = self.store.derivations_outputs(&drvs)?.into_iter();
        let opaque: Vec<StorePath> =
            targets.iter().filter(|target| !drv(target)).map(|target| target.path().clone()).collect();
        for (path, info) in opaque.iter().zip(self.store.infos(&opaque)?) {
            info.ok_or_else(|| self.not_valid(path))?;
        }
        let of = |target: &DerivedPath| match target {
            DerivedPath::Opaque(path) => vec![(None, path.clone())],
            DerivedPath::Built { outputs, .. } => {
                let is_wanted = |name: &OutputName| match outputs {
                    Outputs::All => true,
                    Outputs::Named(names) => names.contains(name),
                };
                let wanted = known.next().unwrap_or_default().into_iter().filter(|(name, _)| is_wanted(name));
                wanted.filter_map(|(name, path)| Some((Some(name), path?))).collect()
            }
        };
        Ok(targets.iter().map(of).collect())
    }

    fn repair(&self, paths: &[StorePath]) -> Result<(), Failure> {
        for path in paths {
            let deriver = match self.info(path)?.deriver {
                Some(deriver) if self.store.is_valid(&deriver)? => deriver,
                _ => return Err(FarError::CannotRepair { path: self.store.dir().full(path) }.into()),
            };
            let target = DerivedPath::Built { drv: deriver, outputs: Outputs::All };
            self.store.realise(&[target], api::BuildMode::Repair)?;
        }
        Ok(())
    }

    fn add(&self, files: &[OsString], method: Method, algorithm: Algorithm) -> Result<(), Failure> {
        let mut out = Printer::new(Output::Listing);
        for file in files {
            let name = object_name(file)?;
            let path = PathBuf::from(OsStr::from_bytes(&absolute(file)?));
            if let Err(error) = std::fs::symlink_metadata(&path)
                && error.kind() == io::ErrorKind::NotFound
            {
                return Err(FarError::NoFile { path: path.display().to_string() }.into());
            }
            let info = self.add_file(&path, ContentAddressed { name, method, algorithm })?;
            out.line(self.store.dir().display(&info.path))?;
        }
        Ok(out.finish()?)
    }

    /// Sends a file or a tree.
    pub(in crate::applets) fn add_file(&self, path: &Path, content: ContentAddressed) -> Result<PathInfo, Failure> {
        let ContentAddressed { name, method, algorithm } = content;
        let new = NewContent {
            name,
            method: ContentMethod::Fixed(method, algorithm),
            references: BTreeSet::new(),
            is_nar: method != Method::Flat,
            repair: false,
        };
        objects::send(self.store, &new, path, &dump_options(self.settings))
    }

    fn read_logs(&self, paths: &[OsString]) -> Result<(), Failure> {
        let layout = &self.files("--read-log")?.layout;
        let mut out = Printer::paged(&self.cx.env, &self.cx.interrupt);
        for argument in paths {
            let path = store_path(self.store.dir(), argument)?;
            print_log(self.cx, self.settings, self.store, layout, &path, &mut out)?;
        }
        Ok(out.finish()?)
    }

    fn verify(&self, paths: &[StorePath]) -> Result<Status, Failure> {
        let mut status = Status::SUCCESS;
        for path in paths {
            if !self.verify_path(path)? {
                status = Status::FAILURE;
            }
        }
        Ok(status)
    }

    /// Compares the contents of one valid path with its record; a difference is told.
    pub(in crate::applets) fn verify_path(&self, path: &StorePath) -> Result<bool, Failure> {
        let info = self.info(path)?;
        let full = || self.store.dir().full(path);
        self.cx.terminal.message(Level::Talkative, format_args!("checking path '{}'...", full()));
        let found = objects::hash(self, path)?;
        if found != info.nar_hash {
            let (expected, found) = (info.nar_hash.to_base32(), found.to_base32());
            self.cx.terminal.error(&FarError::Modified { path: full(), expected, found });
        }
        Ok(found == info.nar_hash)
    }

    fn check_validity(&self, print_invalid: bool, paths: &[StorePath]) -> Result<(), Failure> {
        let valid = self.store.valid_subset(&paths.iter().cloned().collect())?;
        let mut out = Printer::new(Output::Listing);
        for path in paths.iter().filter(|path| !valid.contains(*path)) {
            if !print_invalid {
                return Err(self.not_valid(path));
            }
            out.line(self.store.dir().display(path))?;
        }
        Ok(out.finish()?)
    }

    fn dump_db(&self, paths: &[StorePath]) -> Result<(), Failure> {
        let paths: Vec<StorePath> =
            if paths.is_empty() { self.store.all_paths()?.into_iter().collect() } else { paths.to_vec() };
        let mut out = Printer::new(Output::Listing);
        let mut record = Vec::new();
        for path in &paths {
            record.clear();
            write_path_info(&mut record, self.store.dir(), &self.info(path)?);
            out.bytes(&record)?;
        }
        Ok(out.finish()?)
    }

    fn collect(&self, action: GcAction, max_freed_bytes: Option<u64>) -> Result<(), Failure> {
        let max_freed_bytes = max_freed_bytes.unwrap_or(u64::MAX);
        let what = match action {
            GcAction::Delete => return self.print_freed(&Collect::DeleteDead, max_freed_bytes),
            GcAction::PrintRoots => {
                let mut out = Printer::new(Output::Listing);
                for root in self.store.roots()? {
                    out.bytes(&root.link)?;
                    out.line(format_args!(" -> {}", self.store.dir().display(&root.path)))?;
                }
                return Ok(out.finish()?);
            }
            GcAction::PrintLive => Collect::ListLive,
            GcAction::PrintDead => Collect::ListDead,
        };
        let mut out = Printer::new(Output::Listing);
        for path in self.store.collect(&what, max_freed_bytes)?.paths {
            out.bytes(&path)?;
            out.bytes(b"\n")?;
        }
        Ok(out.finish()?)
    }

    fn print_freed(&self, what: &Collect, max_freed_bytes: u64) -> Result<(), Failure> {
        let outcome = self.store.collect(what, max_freed_bytes);
        let (paths, bytes) = outcome.as_ref().map_or((0, 0), |done| (done.paths.len(), done.bytes_freed));
        let mut out = Printer::new(Output::Listing);
        out.line(format_args!("{paths} store paths deleted, {} freed", mib(bytes)))?;
        out.finish()?;
        outcome?;
        Ok(())
    }

    /// A derivation that the store has.
    pub(in crate::applets) fn derivation(&self, path: &StorePath) -> Result<Derivation, Failure> {
        if !self.store.is_valid(path)? {
            return Err(self.not_valid(path));
        }
        Ok(objects::derivation(self.store, path)?)
    }
}

/// A target as stores of others are asked for it.
pub(in crate::applets) fn derived(target: &Target) -> DerivedPath {
    match &target.key {
        Key::Path(path) => DerivedPath::Opaque(path.clone()),
        Key::Derivation(drv) => {
            let outputs = match &target.wanted {
                Wanted::All => Outputs::All,
                Wanted::Only(names) => Outputs::Named(names.clone()),
            };
            DerivedPath::Built { drv: drv.clone(), outputs }
        }
    }
}
