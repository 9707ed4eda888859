//! The local store as others see it: the reading half of `larder_core::api`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

use larder_core::api::{ReadStore, RootLink, StoreError as ApiError};
use larder_core::derivation::aterm::Mask;
use larder_core::derivation::{Derivation, OutputName};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_store_db::Walk;
use larder_store_db::graph::closure_of;

use crate::error::StoreError;
use crate::local::LocalStore;

impl ReadStore for LocalStore {
    fn dir(&self) -> &StoreDir {
        self.dir()
    }

    fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, ApiError> {
        Ok(self.read(|txn| Ok(txn.info(path)?))?)
    }

    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>, ApiError> {
        Ok(self.read_or(|| vec![None; paths.len()], |txn| Ok(txn.infos(paths)?))?)
    }

    fn is_valid(&self, path: &StorePath) -> Result<bool, ApiError> {
        Ok(self.is_valid(path)?)
    }

    fn valid_subset(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, ApiError> {
        Ok(self.valid_subset(paths)?)
    }

    fn all_paths(&self) -> Result<BTreeSet<StorePath>, ApiError> {
        Ok(self.read(|txn| Ok(txn.all_paths()?.into_iter().collect()))?)
    }

    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, ApiError> {
        Ok(self.read(|txn| Ok(txn.referrers(path)?.unwrap_or_default().into_iter().collect()))?)
    }

    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, ApiError> {
        Ok(self.read(|txn| Ok(txn.valid_derivers(path)?.into_iter().collect()))?)
    }

    fn by_hash_part(&self, hash_part: HashPart) -> Result<Option<StorePath>, ApiError> {
        Ok(self.read(|txn| Ok(txn.by_hash_part(hash_part)?))?)
    }

    fn info_by_hash_part(&self, hash_part: HashPart) -> Result<Option<PathInfo>, ApiError> {
        Ok(self.read(|txn| match txn.by_hash_part(hash_part)? {
            Some(path) => Ok(txn.info(&path)?),
            None => Ok(None),
        })?)
    }

    fn derivation_outputs(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>, ApiError> {
        let mut known = self.known_outputs(drv)?;
        let drv = self.derivation(drv)?;
        let outputs = drv
            .outputs
            .iter()
            .map(|(name, output)| (name.clone(), output.path().cloned().or_else(|| known.remove(name.as_str()))));
        Ok(outputs.collect())
    }

    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, ApiError> {
        Ok(self.realisations([id])?.remove(id))
    }

    fn closure(&self, paths: &BTreeSet<StorePath>, include_outputs: bool) -> Result<BTreeSet<StorePath>, ApiError> {
        let walk = Walk { outputs: include_outputs, ..Walk::default() };
        let roots: Vec<StorePath> = paths.iter().cloned().collect();
        Ok(self.read(|txn| {
            let graph = closure_of(txn, &roots, walk)?;
            Ok(graph.nodes().map(|node| graph.path(node)).collect())
        })?)
    }

    fn listed_closure(
        &self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<Option<Vec<StorePath>>, ApiError> {
        let walk = Walk { outputs: include_outputs, ..Walk::default() };
        let roots: Vec<StorePath> = paths.iter().cloned().collect();
        let graph = self.read(|txn| Ok(Some(closure_of(txn, &roots, walk)?)))?;
        let Some(graph) = graph else {
            // Nothing is valid where there is no ledger.
            return roots.first().map_or_else(|| Ok(Some(Vec::new())), |path| Err(self.not_valid(path).into()));
        };
        let order = graph.topological_all().map_err(|error| StoreError::from(error).in_dir(self.dir()))?;
        Ok(Some(order.into_iter().map(|node| graph.path(node)).collect()))
    }

    fn sorted(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, ApiError> {
        Ok(self.order(paths)?)
    }

    fn nar(&self, path: &StorePath, out: &mut dyn Write) -> Result<(), ApiError> {
        let info = self.info(path)?;
        Ok(self.dump_checked(&info, out)?)
    }
}

impl LocalStore {
    /// What the ids of a derivation's outputs begin with.
    pub fn output_ids(&self, path: &StorePath) -> Result<larder_core::hash::Sha256Digest, StoreError> {
        self.output_ids_of(&self.derivation(path)?)
    }

    /// The same of one that may not lie in the store; what it is made of does.
    pub fn output_ids_of(&self, drv: &Derivation) -> Result<larder_core::hash::Sha256Digest, StoreError> {
        let mut memo = self.derivations.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let modulo = memo.modulo(self.dir(), drv, Mask::On, |input| self.derivation(input).map_err(Box::new));
        Ok(modulo.map_err(Box::new)?.digest)
    }

    /// All roots, as clients are told of them.
    pub fn root_links(&self) -> Result<Vec<RootLink>, StoreError> {
        let links = self.roots()?.roots.into_iter().map(|root| RootLink {
            is_private: root.kind.is_private(),
            link: root.link.into_os_string().into_encoded_bytes(),
            path: root.path,
        });
        Ok(links.collect())
    }
}
