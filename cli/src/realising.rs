//! Realising for the applets: what is missing is told, then the driver runs.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use larder_core::derivation::OutputName;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{NameError, StorePath};
use larder_realise::build::elsewhere::Elsewhere;
use larder_realise::build::{self, BuildSettings};
use larder_realise::derivations::Derivations;
use larder_realise::driver::{Builder, Delegate, Driver, RealiseError};
use larder_realise::job::{Job, Mode, Outcome, Watch};
use larder_realise::missing::{Missing, Sources, missing_from};
use larder_realise::plan::{Key, Target, Wanted};
use larder_realise::substitute::{Substituters, Substitution, Trust};
use larder_store::LocalStore;
use larder_store::verify::Mender;

use crate::args::shown;
use crate::builds::{BuildView, Trace};
use crate::caches::caches;
use crate::conf::Env;
use crate::exit::{Failure, chain};
use crate::hook::may_delegate;
use crate::interrupt::{Interrupt, Interrupted};
use crate::paths::{PathArgumentError, store_path};
use crate::terminal::Terminal;

/// A target that cannot be one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    #[error(transparent)]
    Path(#[from] PathArgumentError),
    /// Of what is impure nobody remembers what it was built as.
    #[error("cannot operate on output '{output}' of the unbuilt derivation '{drv}'")]
    Unbuilt { output: String, drv: String },
    #[error("'{name}' in '{target}' cannot be the name of an output")]
    Output { target: String, name: String, source: NameError },
}

/// Nobody has a path, and nothing that makes it is known.
#[derive(Debug, thiserror::Error)]
#[error("cannot repair path '{path}'")]
pub struct CannotRepair {
    pub path: String,
}

/// Mends what `--verify --repair` finds.
#[derive(Debug)]
pub struct Repairs<'a> {
    pub realiser: Realiser<'a>,
    pub how: How,
}

impl Mender for Repairs<'_> {
    fn mend(&self, path: &StorePath) -> bool {
        match self.realiser.repair(path, self.how) {
            Ok(()) => true,
            Err(failure) => {
                // Whoever asked says that the path cannot be repaired.
                let is_said = failure.error().is::<CannotRepair>() || failure.is_interrupt();
                if !is_said {
                    self.realiser.terminal.error_text(&chain(failure.error()));
                }
                false
            }
        }
    }
}

/// How to realise.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub struct How {
    pub mode: Mode,
    /// Only tell what would be done.
    pub dry_run: bool,
    /// Leave out what nobody has.
    pub ignore_unknown: bool,
    /// Do without a word about what is missing.
    pub silent: bool,
    /// Builders' output is shown as it comes.
    pub shows_logs: bool,
    pub read_only: bool,
    /// Lines about builds for programs.
    pub trace: bool,
}

impl How {
    pub const NORMAL: Self = Self {
        mode: Mode::Normal,
        dry_run: false,
        ignore_unknown: false,
        silent: false,
        shows_logs: true,
        read_only: false,
        trace: false,
    };
}

/// Reads `PATH`, `DERIVATION!OUTPUT,...` or, as newer tools write it, `DERIVATION^OUTPUT,...`.
pub fn target(dir: &StoreDir, argument: &OsStr) -> Result<Target, TargetError> {
    let bytes = argument.as_bytes();
    // A file may have such a character in its name, an output cannot.
    let at = bytes.iter().rposition(|b| matches!(b, b'!' | b'^' | b'/')).filter(|at| bytes.get(*at) != Some(&b'/'));
    let Some(at) = at else {
        let path = store_path(dir, argument)?;
        let key = if path.is_derivation() { Key::Derivation(path) } else { Key::Path(path) };
        return Ok(Target { key, wanted: Wanted::All });
    };
    let (file, names) = bytes.split_at(at);
    let path = store_path(dir, OsStr::from_bytes(file))?;
    let mut outputs = BTreeSet::new();
    let names = names.get(1..).unwrap_or_default();
    if names != b"*" {
        for name in names.split(|b| *b == b',').filter(|name| !name.is_empty()) {
            let text = String::from_utf8_lossy(name);
            let output = OutputName::new(&text).map_err(|source| TargetError::Output {
                target: shown(argument),
                name: shown(OsStr::from_bytes(name)),
                source,
            })?;
            outputs.insert(output);
        }
    }
    let wanted = if outputs.is_empty() { Wanted::All } else { Wanted::Only(outputs) };
    Ok(Target { key: Key::Derivation(path), wanted })
}

/// Builds here, in the sandbox or without.
struct Here<'a> {
    store: &'a LocalStore,
    settings: BuildSettings,
}

impl Builder for Here<'_> {
    fn build(&self, job: &Job, watch: &dyn Watch) -> Outcome {
        build::run(self.store, &self.settings, job, watch)
    }
}

/// Realises for one command.
#[derive(Debug)]
pub struct Realiser<'a> {
    pub store: &'a LocalStore,
    pub settings: &'a Settings,
    pub terminal: &'a Arc<Terminal>,
    pub interrupt: &'a Interrupt,
    pub env: &'a Env,
}

impl Realiser<'_> {
    /// Makes targets valid; gives those that were not left out.
    pub fn realise(&self, mut targets: Vec<Target>, how: How) -> Result<Vec<Target>, Failure> {
        if targets.is_empty() {
            return Ok(targets);
        }
        let store = self.store;
        let derivations = Derivations::new(store);
        let caches = (self.settings.substitute && !how.read_only)
            .then(|| caches(self.env, self.settings, store.dir(), &store.shared_reporter()))
            .filter(|caches| !caches.is_empty());
        if !how.silent || how.dry_run || how.ignore_unknown {
            let sources = caches.as_ref().map(|caches| Sources { caches, settings: self.settings });
            let missing = missing_from(store, &derivations, &targets, sources)?;
            if how.ignore_unknown {
                targets.retain(|target| !missing.unknown.contains(target.key.path()));
            }
            let told = if how.ignore_unknown { Missing { unknown: BTreeSet::new(), ..missing } } else { missing };
            if self.settings.print_missing && !how.silent {
                self.tell_missing(&told, how.read_only);
            }
        }
        if how.dry_run {
            return Ok(targets);
        }
        // The driver ends tidily, and builders with it.
        let _hold = self.interrupt.hold();
        let mut settings =
            BuildSettings::new(Arc::new(self.settings.clone()), larder_sandbox::launch::Launcher::default());
        settings.hides_log = !how.shows_logs;
        let delegate = may_delegate(self.settings, |text| self.terminal.error_text(text));
        let builder = Here { store, settings };
        let delegate = delegate.then(|| Elsewhere::new(store, &builder.settings));
        let trace =
            how.trace.then(|| Trace { logs: store.layout().drv_logs(), compressed: self.settings.compress_build_log });
        let view = BuildView::new(self.terminal, store.dir(), how.shows_logs, trace);
        let substitution = match &caches {
            Some(caches) => Some(Substitution::new(store, caches, Trust::of(self.settings)?)),
            None => None,
        };
        let driver = Driver::new(store, self.settings, &derivations, &builder, &view)
            .substituters(substitution.as_ref().map(|from| from as &dyn Substituters))
            .delegate(delegate.as_ref().map(|to| to as &dyn Delegate))
            .read_only(how.read_only);
        let report = driver.realise(&targets, how.mode);
        drop(view);
        match report.check(|text| self.terminal.error_text(text)) {
            Ok(()) => Ok(targets),
            Err(RealiseError::Interrupted) => Err(Interrupted.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a damaged or missing valid path anew: from a cache, or with what made it.
    pub fn repair(&self, path: &StorePath, how: How) -> Result<(), Failure> {
        let info = self.store.info(path)?;
        let how = How { silent: true, mode: Mode::Repair, ..how };
        let realise = |key| self.realise(vec![Target { key, wanted: Wanted::All }], how);
        // Who has it is asked first; what made it comes after that.
        if self.settings.substitute && !self.settings.substituters.is_empty() {
            match realise(Key::Path(path.clone())) {
                Ok(_) => return Ok(()),
                Err(failure) if failure.is_interrupt() => return Err(failure),
                Err(_) => {}
            }
        }
        let deriver = match info.deriver {
            Some(deriver) if self.store.is_valid(&deriver)? => deriver,
            _ => return Err(CannotRepair { path: self.store.dir().full(path) }.into()),
        };
        realise(Key::Derivation(deriver))?;
        Ok(())
    }

    fn tell_missing(&self, missing: &Missing, read_only: bool) {
        let dir = self.store.dir();
        let say = |text: std::fmt::Arguments<'_>| self.terminal.message(Level::Info, text);
        match missing.will_build.len() {
            0 => {}
            1 => say(format_args!("this derivation will be built:")),
            many => say(format_args!("these {many} derivations will be built:")),
        }
        for path in &missing.will_build {
            say(format_args!("  {}", dir.display(path)));
        }
        let sizes =
            || format!("{} download, {} unpacked", mib(missing.download_size_bytes), mib(missing.nar_size_bytes));
        match missing.will_fetch.len() {
            0 => {}
            1 => say(format_args!("this path will be fetched ({}):", sizes())),
            many => say(format_args!("these {many} paths will be fetched ({}):", sizes())),
        }
        for path in &missing.will_fetch {
            say(format_args!("  {}", dir.display(path)));
        }
        if !missing.unknown.is_empty() {
            let why = if read_only { " (may be caused by read-only store access)" } else { "" };
            say(format_args!("don't know how to build these paths{why}:"));
        }
        for path in &missing.unknown {
            say(format_args!("  {}", dir.display(path)));
        }
    }

    /// The outputs that a target names, or the path itself, with the names of outputs.
    pub fn outputs(&self, target: &Target) -> Result<Vec<(Option<OutputName>, StorePath)>, Failure> {
        match &target.key {
            Key::Path(path) => {
                self.store.info(path)?;
                Ok(vec![(None, path.clone())])
            }
            Key::Derivation(drv) => {
                let mut outputs = Vec::new();
                let mut known = self.store.known_outputs(drv)?;
                for name in self.store.derivation(drv)?.outputs.into_keys().filter(|name| target.wanted.has(name)) {
                    let path = known.remove(name.as_str()).ok_or_else(|| TargetError::Unbuilt {
                        output: name.to_string(),
                        drv: self.store.dir().full(drv),
                    })?;
                    outputs.push((Some(name), path));
                }
                Ok(outputs)
            }
        }
    }
}

/// Bytes as people read them: `1.50 MiB`.
#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
fn mib(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let drv = format!("/nix/store/{}-x.drv", "0".repeat(32));
        let of = |text: &str| target(&dir, OsStr::new(text));
        let names = |texts: &[&str]| Wanted::Only(texts.iter().map(|text| OutputName::new(text).unwrap()).collect());
        for (rest, wanted) in [
            ("", Wanted::All),
            ("!", Wanted::All),
            ("!*", Wanted::All),
            ("^*", Wanted::All),
            ("!out", names(&["out"])),
            ("!out,man", names(&["out", "man"])),
            ("^dev,,man", names(&["dev", "man"])),
        ] {
            let found = of(&format!("{drv}{rest}")).unwrap();
            assert_eq!(found.wanted, wanted, "{rest}");
            assert!(matches!(found.key, Key::Derivation(_)));
        }
        assert!(matches!(of(&drv.replace(".drv", "")).unwrap().key, Key::Path(_)));
        assert!(of(&format!("{drv}!o ut")).unwrap_err().to_string().contains("'o ut'"));
        of(&format!("{drv}!out!man")).unwrap_err();
    }
}
