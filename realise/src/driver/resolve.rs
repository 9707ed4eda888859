//! Derivations whose paths are not known before they are built: what they were built as, and what
//! they become once their inputs are.
//!
//! Source: modern, sections 2 and 3.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::derivation::placeholder::scratch_path;
use larder_core::derivation::resolve::resolve;
use larder_core::derivation::{Derivation, Kind, OutputName};
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::Level;
use larder_core::store_path::{NameError, StorePath};
use larder_store::StoreError;

use super::Driver;
use super::ask::{rejected, store_failure};
use crate::job::{Failure, FailureKind};
use crate::plan::Known;
use crate::signing::sign_realisation;

/// Which output of which input derivation lies where.
type Inputs = BTreeMap<(StorePath, OutputName), StorePath>;

impl Driver<'_> {
    pub(super) fn has_feature(&self, name: &str) -> bool {
        self.settings.experimental_features.contains(name)
    }

    /// Where outputs are whose paths the derivation does not say: what they were built as, or a
    /// path that nothing else has.
    pub(super) fn realised_or_scratch(
        &self,
        path: &StorePath,
        drv: &Derivation,
    ) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
        let kind = drv.kind().map_err(|error| rejected(error.to_string()))?;
        let needed: &[&str] =
            if kind == Kind::Impure { &["impure-derivations", "ca-derivations"] } else { &["ca-derivations"] };
        if let Some(missing) = needed.iter().find(|feature| !self.has_feature(feature)) {
            return Err(rejected(format!(
                "experimental Nix feature '{missing}' is disabled; add '--extra-experimental-features {missing}' to \
                 enable it"
            )));
        }
        // What is impure is never what it was.
        let known = if kind == Kind::Impure {
            BTreeMap::new()
        } else {
            // It may not lie in the store.
            self.store.built_outputs(drv).map_err(|e| store_failure(&e))?
        };
        let place = |name: &OutputName| {
            let path = match known.get(name.as_str()) {
                Some(known) => known.clone(),
                None => scratch_path(self.store.dir(), path, &drv.name, name).map_err(|e| rejected(e.to_string()))?,
            };
            Ok((name.clone(), path))
        };
        drv.outputs.keys().map(place).collect()
    }

    /// Is it built as what it becomes once the paths of its inputs are known?
    pub(super) fn resolves(&self, drv: &Derivation) -> bool {
        match drv.kind() {
            Ok(Kind::Deferred) => true,
            Ok(Kind::Floating | Kind::Impure) => !drv.input_drvs.is_empty(),
            Ok(Kind::Fixed) => !drv.input_drvs.is_empty() && self.has_feature("ca-derivations"),
            Ok(Kind::InputAddressed) | Err(_) => false,
        }
    }

    /// The ids of outputs of a derivation.
    pub(super) fn ids<'n>(
        &self,
        path: &StorePath,
        names: impl IntoIterator<Item = &'n OutputName>,
    ) -> Result<BTreeMap<DrvOutput, OutputName>, Failure> {
        let digest = self.derivations.get(path).and_then(|drv| self.store.output_ids_of(&drv));
        let digest = digest.map_err(|error| store_failure(&error))?;
        let id = |name: &OutputName| Ok((DrvOutput::new(digest, name.as_str())?, name.clone()));
        let ids: Result<_, NameError> = names.into_iter().map(id).collect();
        ids.map_err(|error| rejected(error.to_string()))
    }

    /// Notes as what others have built outputs.
    pub(super) fn register(&self, path: &StorePath, outputs: &BTreeMap<OutputName, StorePath>) -> Result<(), Failure> {
        let Some(from) = self.substituters else { return Ok(()) };
        let ids: Vec<DrvOutput> = self.ids(path, outputs.keys())?.into_keys().collect();
        self.derivations.forget(path);
        from.register(&ids)
    }

    /// What is not impure itself, nor known beforehand, must not be made of what is.
    pub(super) fn check_purity(&self, path: &StorePath, drv: &Derivation) -> Result<(), Failure> {
        if !matches!(drv.kind(), Ok(Kind::Floating | Kind::Deferred)) {
            return Ok(());
        }
        for input in drv.input_drvs.keys() {
            // One that is not there yet is looked at when it is built.
            let Ok(read) = self.derivations.get(input) else { continue };
            if read.kind() == Ok(Kind::Impure) {
                let dir = self.store.dir();
                let (pure, impure) = (dir.display(path), dir.display(input));
                return Err(rejected(format!("pure derivation '{pure}' depends on impure derivation '{impure}'")));
            }
        }
        Ok(())
    }

    /// Writes down what a derivation becomes.
    pub(super) fn resolve(&self, path: &StorePath, inputs: &Inputs) -> Result<StorePath, Failure> {
        let store = self.store;
        let fail = |error: StoreError| store_failure(&error);
        let drv = self.derivations.get(path).map_err(fail)?;
        let built = |drv: &StorePath, name: &OutputName| inputs.get(&(drv.clone(), name.clone())).cloned();
        let resolved =
            resolve(store.dir(), &drv, built).map_err(|error| Failure::of(FailureKind::InputRejected, &error))?;
        let mut arrivals = store.arrivals();
        let other = arrivals.add_derivation(&resolved).map_err(fail)?;
        arrivals.commit().map_err(fail)?;
        let dir = store.dir();
        store.reporter().message(
            Level::Info,
            format_args!("resolved derivation: '{}' -> '{}'...", dir.display(path), dir.display(&other)),
        );
        Ok(other)
    }

    /// Notes that the outputs of what a derivation has become are its own.
    pub(super) fn realised(
        &self,
        path: &StorePath,
        outputs: BTreeMap<OutputName, StorePath>,
        inputs: &Inputs,
    ) -> Result<BTreeMap<OutputName, Known>, Failure> {
        let fail = |error: StoreError| store_failure(&error);
        let drv = self.derivations.get(path).map_err(fail)?;
        self.derivations.forget(path);
        let kind = drv.kind().map_err(|error| rejected(error.to_string()))?;
        if kind != Kind::Impure {
            let digest = self.store.output_ids(path).map_err(fail)?;
            let dependents =
                if kind == Kind::Fixed { BTreeMap::new() } else { self.dependents(inputs).map_err(fail)? };
            let mut new = Vec::with_capacity(outputs.len());
            for (name, out) in &outputs {
                let id = DrvOutput::new(digest, name.as_str()).map_err(|e| rejected(e.to_string()))?;
                let references = self.store.info(out).map_err(fail)?.references;
                let direct = dependents.iter().filter(|(_, path)| references.contains(*path));
                let mut realisation = Realisation {
                    id,
                    out_path: out.clone(),
                    signatures: BTreeSet::new(),
                    dependent_realisations: direct.map(|(id, path)| (id.clone(), path.clone())).collect(),
                };
                sign_realisation(self.settings, &mut realisation)?;
                new.push(realisation);
            }
            self.store.register_realisations(&new).map_err(fail)?;
        }
        Ok(outputs.into_iter().map(|(name, path)| (name, Known { path, valid: true })).collect())
    }

    /// What the outputs of inputs realise, with all that those depend on.
    fn dependents(&self, inputs: &Inputs) -> Result<BTreeMap<DrvOutput, StorePath>, StoreError> {
        let mut all = BTreeMap::new();
        for ((drv, name), path) in inputs {
            let read = self.derivations.get(drv)?;
            // All impure derivations have one id.
            if read.kind() == Ok(Kind::Impure) {
                continue;
            }
            if let Ok(id) = DrvOutput::new(self.store.output_ids(drv)?, name.as_str()) {
                all.insert(id, path.clone());
            }
        }
        for realisation in self.store.realisations(&all.keys().cloned().collect::<Vec<_>>())?.into_values() {
            all.extend(realisation.dependent_realisations);
        }
        Ok(all)
    }
}
