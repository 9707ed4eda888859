//! Building and fetching for clients: from what the protocols ask to the driver, and back.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use larder_core::api::{BuildMode, BuildResult, DerivedPath, ErrorKind, Missing, Outputs, StoreError};
use larder_core::derivation::{Derivation, OutputName};
use larder_core::hash::Sha256Digest;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_realise::build::BuildSettings;
use larder_realise::derivations::Derivations;
use larder_realise::driver::{Driver, Listener, RealiseError, Report};
use larder_realise::job::{Failure, Job};
use larder_realise::missing::missing;
use larder_realise::plan::{Stop, Target};
use larder_realise::results::Times;
use larder_realise::sharing::Sharing;
use larder_sandbox::launch::Launcher;

use super::Engine;
use crate::exit::{Status, indent};

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
        let mut settings = BuildSettings::new(Arc::new(self.settings.clone()), Launcher::default());
        settings.hides_log = self.hides_logs;
        let builder = Sharing::new(&self.builds, &self.local, settings);
        let ears = Ears { engine: self, times };
        Driver::new(&self.local, &self.settings, derivations, &builder, &ears).realise(targets, mode.into())
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
            let all = drv.output_paths().map(|(name, path)| (name.clone(), path.cloned())).collect();
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
        let found = missing(&self.local, &Derivations::new(&self.local), &targets)?;
        let will_build: BTreeSet<StorePath> = found.will_build.into_iter().collect();
        Ok(Missing { will_build, unknown: found.unknown, ..Missing::default() })
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
