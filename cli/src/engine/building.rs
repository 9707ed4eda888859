//! Building and fetching for clients: from what the protocols ask to the driver, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use larder_cache::Caches;
use larder_core::api::{BuildMode, BuildResult, DerivedPath, ErrorKind, Missing, Outputs, StoreError, Substitutable};
use larder_core::derivation::{Derivation, OutputName};
use larder_core::hash::Sha256Digest;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_realise::build::BuildSettings;
use larder_realise::build::elsewhere::Elsewhere;
use larder_realise::derivations::Derivations;
use larder_realise::driver::{Delegate, Driver, Listener, RealiseError, Report};
use larder_realise::job::{Failure, Job};
use larder_realise::missing::{MissingError, Sources, missing_from};
use larder_realise::plan::{Stop, Target};
use larder_realise::results::Times;
use larder_realise::sharing::Sharing;
use larder_realise::substitute::{Substituters, Substitution, Trust};
use larder_store::verify::Mender;

use super::Engine;
use crate::caches::caches;
use crate::exit::{Status, chain, indent};
use crate::hook::may_delegate;
use crate::realising::CannotRepair;

/// What the client hears of a run beside activities.
struct Ears<'a> {
    engine: &'a Engine,
    times: &'a Times,
}

impl Listener for Ears<'_> {
    fn started(&self, job: &Job) {
        self.times.started(job);
    }
    fn ended(&self, drv: &StorePath, how: Result<(), &Failure>) {
        self.times.ended(drv, how);
    }
    fn failed(&self, text: &str) {
        self.engine.tell_error(text);
    }
}

impl Engine {
    fn tell_error(&self, text: &str) {
        self.local.reporter().message(Level::Error, format_args!("error: {}", indent(text)));
    }

    fn drive(&self, targets: &[Target], mode: BuildMode, derivations: &Derivations<'_>, times: &Times) -> Report {
        let _hold = self.interrupt.hold();
        let mut settings = BuildSettings::new(Arc::clone(&self.settings), self.builds.launcher.clone());
        settings.hides_log = self.hides_logs;
        let settings = Arc::new(settings);
        let builder = Sharing::new(&self.builds, &self.local, Arc::clone(&settings));
        let delegate = may_delegate(&self.settings, |text| self.tell_error(text));
        let delegate = delegate.then(|| Elsewhere::new(&self.local, &settings));
        let ears = Ears { engine: self, times };
        let caches = self.caches();
        let substitution = caches.as_ref().map(|caches| Substitution::new(&self.local, caches, self.trust()));
        Driver::new(&self.local, &self.settings, derivations, &builder, &ears)
            .substituters(substitution.as_ref().map(|from| from as &dyn Substituters))
            .delegate(delegate.as_ref().map(|to| to as &dyn Delegate))
            .realise(targets, mode.into())
    }

    /// Who may be asked for paths, if anybody.
    fn caches(&self) -> Option<Caches> {
        let caches = || caches(&self.env, &self.settings, self.local.dir(), &self.local.shared_reporter());
        self.settings.substitute.then(caches).filter(|caches| !caches.is_empty())
    }

    fn trust(&self) -> Trust {
        Trust::of(&self.settings).unwrap_or_else(|error| {
            // Then nobody's signatures count.
            self.tell_error(&chain(&error));
            Trust { requires_signatures: self.settings.require_sigs, keys: Vec::new() }
        })
    }

    /// What caches say of paths that they have.
    pub(super) fn offered(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<Substitutable>, StoreError> {
        let Some(caches) = self.caches() else { return Ok(Vec::new()) };
        let mut offered = Vec::new();
        for (path, found) in caches.find_all(paths) {
            match found {
                Ok(Some(found)) => offered.push(Substitutable {
                    path,
                    deriver: found.info.info.deriver.clone(),
                    references: found.info.info.references.clone(),
                    download_size_bytes: found.info.file_size_bytes.unwrap_or(0),
                    nar_size_bytes: found.info.info.nar_size_bytes,
                }),
                Ok(None) => {}
                Err(error) if self.settings.fallback => self.tell_error(&chain(&error)),
                Err(error) => return Err(StoreError::new(ErrorKind::Other, error)),
            }
        }
        caches.flush();
        Ok(offered)
    }

    /// An error if not all is there, with the exit status that it means; what its text leaves out
    /// is told.
    fn check(&self, report: &Report) -> Result<(), StoreError> {
        report.check(|text| self.tell_error(text)).map_err(|error| {
            let kind = match &error {
                RealiseError::Interrupted => ErrorKind::Interrupted,
                RealiseError::Failed { kinds, .. } => match Status::of_failures(kinds).code() {
                    status @ 100.. => ErrorKind::BuildFailed { status },
                    _ => ErrorKind::Other,
                },
                _ => ErrorKind::Other,
            };
            StoreError::new(kind, error)
        })
    }

    pub(super) fn realise_all(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<(), StoreError> {
        let targets: Vec<Target> = targets.iter().map(Target::from).collect();
        self.check(&self.drive(&targets, mode, &Derivations::new(&self.local), &Times::default()))
    }

    pub(super) fn build_each(&self, paths: &[DerivedPath], mode: BuildMode) -> Result<Vec<BuildResult>, StoreError> {
        let targets: Vec<Target> = paths.iter().map(Target::from).collect();
        let times = Times::default();
        let report = self.drive(&targets, mode, &Derivations::new(&self.local), &times);
        self.results(&report, &times, |number| match paths.get(number) {
            Some(DerivedPath::Built { drv, outputs }) => {
                let all = larder_core::api::ReadStore::derivation_outputs(&self.local, drv)?;
                built_outputs(self.local.output_ids(drv)?, all, outputs)
            }
            _ => Ok(BTreeMap::new()),
        })
    }

    pub(super) fn build_given(
        &self,
        path: &StorePath,
        drv: &Derivation,
        mode: BuildMode,
    ) -> Result<BuildResult, StoreError> {
        let targets = [Target::from(&DerivedPath::Built { drv: path.clone(), outputs: Outputs::All })];
        let times = Times::default();
        let derivations = Derivations::new(&self.local).with(path.clone(), drv.clone());
        let report = self.drive(&targets, mode, &derivations, &times);
        let results = self.results(&report, &times, |_| {
            let built = self.local.built_outputs(drv)?;
            let path = |name: &OutputName, path: Option<&StorePath>| path.or_else(|| built.get(name.as_str())).cloned();
            let all = drv.output_paths().map(|(name, known)| (name.clone(), path(name, known))).collect();
            built_outputs(self.local.output_ids_of(drv)?, all, &Outputs::All)
        })?;
        Ok(results.into_iter().next().unwrap_or_default())
    }

    /// What came of each target; an error if the run as a whole came to nothing.
    fn results(
        &self,
        report: &Report,
        times: &Times,
        outputs: impl Fn(usize) -> Result<BTreeMap<DrvOutput, Realisation>, StoreError>,
    ) -> Result<Vec<BuildResult>, StoreError> {
        if matches!(report.stopped, Some(Stop::Interrupted | Stop::NoJobs)) {
            self.check(report)?;
        }
        let each = |(number, ended)| {
            let mut result = times.result(ended, self.local.dir());
            if result.status.is_success() {
                result.built_outputs = outputs(number)?;
            }
            Ok(result)
        };
        report.targets.iter().enumerate().map(each).collect()
    }

    pub(super) fn what_is_missing(&self, targets: &[DerivedPath]) -> Result<Missing, StoreError> {
        let targets: Vec<Target> = targets.iter().map(Target::from).collect();
        let caches = self.caches();
        let sources = caches.as_ref().map(|caches| Sources { caches, settings: &self.settings });
        let found = missing_from(&self.local, &Derivations::new(&self.local), &targets, sources);
        let found = found.map_err(|error| match error {
            MissingError::Store(error) => error.into(),
            error => StoreError::new(ErrorKind::Other, error),
        })?;
        Ok(Missing {
            will_build: found.will_build.into_iter().collect(),
            will_substitute: found.will_fetch,
            unknown: found.unknown,
            download_size_bytes: found.download_size_bytes,
            nar_size_bytes: found.nar_size_bytes,
        })
    }

    /// Makes a damaged or missing valid path anew: from a cache, or with what made it.
    fn repair(&self, path: &StorePath) -> Result<(), StoreError> {
        let again = |target| self.realise_all(&[target], BuildMode::Repair);
        if self.caches().is_some() && again(DerivedPath::Opaque(path.clone())).is_ok() {
            return Ok(());
        }
        match self.local.info(path)?.deriver {
            Some(drv) if self.local.is_valid(&drv)? => again(DerivedPath::Built { drv, outputs: Outputs::All }),
            _ => Err(StoreError::new(ErrorKind::Other, CannotRepair { path: self.local.dir().full(path) })),
        }
    }
}

impl Mender for Engine {
    fn mend(&self, path: &StorePath) -> bool {
        match self.repair(path) {
            Ok(()) => true,
            Err(error) => {
                // Whoever asked says that the path cannot be repaired.
                let is_said =
                    std::error::Error::source(&error).is_some_and(<dyn std::error::Error>::is::<CannotRepair>);
                if !is_said {
                    self.tell_error(&chain(&error));
                }
                false
            }
        }
    }
}

/// The wanted outputs by their ids.
fn built_outputs(
    digest: Sha256Digest,
    all: BTreeMap<OutputName, Option<StorePath>>,
    wanted: &Outputs,
) -> Result<BTreeMap<DrvOutput, Realisation>, StoreError> {
    let mut found = BTreeMap::new();
    for (name, path) in all {
        let is_wanted = match wanted {
            Outputs::All => true,
            Outputs::Named(names) => names.contains(&name),
        };
        if let (Some(out_path), true) = (path, is_wanted) {
            let id = DrvOutput::new(digest, name.as_str()).map_err(|error| StoreError::new(ErrorKind::Other, error))?;
            let (signatures, dependent_realisations) = (BTreeSet::new(), BTreeMap::new());
            found.insert(id.clone(), Realisation { id, out_path, signatures, dependent_realisations });
        }
    }
    Ok(found)
}
