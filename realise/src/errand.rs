//! One build on another machine: inputs go there, it builds, and the outputs come back.
//!
//! All of it is said over one connection, whose other end protects what was sent, and what it
//! made, until it is closed. Source: building, section 11; modern, section 2.12.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::api::{
    AddOptions, BuildMode, BuildResult, BuildStatus, DerivedPath, ErrorKind, Outputs, Store, StoreError,
};
use larder_core::derivation::{Derivation, OutputName};
use larder_core::path_info::PathInfo;
use larder_core::realisation::Realisation;
use larder_core::store_path::StorePath;

use crate::copy::{copy_closure, copy_known, infos};

/// What is to be built, and what for.
#[derive(Debug, Clone, Copy)]
pub struct Errand<'a> {
    pub drv_path: &'a StorePath,
    pub drv: &'a Derivation,
    /// The closure of the inputs.
    pub inputs: &'a BTreeSet<StorePath>,
    pub outputs: &'a BTreeSet<OutputName>,
    /// The machine fetches inputs itself where it can.
    pub substitute: bool,
    /// The machine does not believe what we say the derivation is: it wants to see it, and all it
    /// is made from.
    pub shows_derivation: bool,
}

/// The machine built something, but not what was wanted.
#[derive(Debug, thiserror::Error)]
#[error("the machine did not build the output '{output}' of '{drv}'")]
struct NotBuilt {
    output: OutputName,
    drv: String,
}

impl Errand<'_> {
    /// Sends what is missing there, and has all inputs protected.
    pub fn send(
        &self,
        near: &(dyn Store + Sync),
        far: &dyn Store,
        tell: &dyn Fn(&StorePath),
    ) -> Result<(), StoreError> {
        let mut needed = self.inputs.clone();
        if self.shows_derivation {
            needed.extend(near.closure(&[self.drv_path.clone()].into(), false)?);
        }
        copy_closure(near, far, &needed, self.substitute, AddOptions::default(), tell).map(drop)
    }

    /// Has it built. How that went is in the result.
    pub fn build(&self, far: &dyn Store) -> Result<BuildResult, StoreError> {
        if self.shows_derivation {
            let outputs = Outputs::Named(self.outputs.clone());
            let target = DerivedPath::Built { drv: self.drv_path.clone(), outputs };
            let results = far.build(&[target], BuildMode::Normal)?;
            return Ok(results.into_iter().next().unwrap_or_default());
        }
        let mut drv = self.drv.clone();
        // What it is made from is there. If nothing else says where, this does.
        if !drv.input_drvs.is_empty() {
            drv.input_drvs.clear();
            drv.input_srcs.clone_from(self.inputs);
        }
        far.build_derivation(self.drv_path, &drv, BuildMode::Normal)
    }

    /// Brings the outputs that are missing here.
    pub fn fetch(
        &self,
        near: &dyn Store,
        far: &(dyn Store + Sync),
        result: &BuildResult,
        tell: &dyn Fn(&StorePath),
    ) -> Result<(), StoreError> {
        let realised = self.realised(result);
        let all: BTreeMap<&OutputName, &StorePath> = self
            .drv
            .output_paths()
            .filter_map(|(name, path)| Some((name, path.or_else(|| realised.get(name).map(|found| &found.out_path))?)))
            .collect();
        let mut wanted = Vec::with_capacity(self.outputs.len());
        for name in self.outputs {
            let path = all.get(name).ok_or_else(|| {
                let drv = near.dir().full(self.drv_path);
                StoreError::new(ErrorKind::Other, NotBuilt { output: name.clone(), drv })
            })?;
            wanted.push((*path).clone());
        }
        let own: BTreeSet<StorePath> = all.into_values().cloned().collect();
        let valid = near.hold_valid(&own, false)?;
        wanted.retain(|path| !valid.contains(path));
        let mut found: BTreeMap<StorePath, PathInfo> = BTreeMap::new();
        while !wanted.is_empty() {
            let new = infos(far, &wanted)?;
            // Other outputs that these refer to are needed as well.
            wanted = new.iter().flat_map(|info| &info.references).filter(|path| own.contains(*path)).cloned().collect();
            found.extend(new.into_iter().map(|info| (info.path.clone(), info)));
            wanted.retain(|path| !valid.contains(path) && !found.contains_key(path));
            wanted.sort_unstable();
            wanted.dedup();
        }
        if !found.is_empty() {
            let graph = found.values().map(|info| (info.path.clone(), info.references.clone())).collect();
            let order = larder_wire::order::order(near.dir(), graph)?;
            let infos = order.iter().filter_map(|path| found.remove(path)).collect();
            copy_known(far, near, infos, AddOptions::default(), tell)?;
        }
        for (name, realisation) in realised {
            if self.outputs.contains(name) {
                near.add_realisation(realisation)?;
            }
        }
        Ok(())
    }

    /// What outputs were built as whose paths nobody knew before.
    fn realised<'r>(&self, result: &'r BuildResult) -> BTreeMap<&'_ OutputName, &'r Realisation> {
        let unknown = self.drv.output_paths().filter(|(_, path)| path.is_none()).map(|(name, _)| name);
        let built = |name: &OutputName| {
            result.built_outputs.iter().find(|(id, _)| id.output() == name.as_str()).map(|(_, found)| found)
        };
        unknown.filter_map(|name| Some((name, built(name)?))).collect()
    }
}

/// What a hook ends with for a result that is none.
pub const fn exit_code(status: BuildStatus) -> u8 {
    match status {
        BuildStatus::TimedOut => crate::build::elsewhere::TIMED_OUT,
        BuildStatus::PermanentFailure
        | BuildStatus::InputRejected
        | BuildStatus::OutputRejected
        | BuildStatus::CachedFailure
        | BuildStatus::DependencyFailed
        | BuildStatus::LogLimitExceeded
        | BuildStatus::NotDeterministic => crate::build::elsewhere::PERMANENT,
        _ => 1,
    }
}
