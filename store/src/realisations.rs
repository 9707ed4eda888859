//! Realisations in the ledger: what outputs were built as whose paths nobody knew before.
//!
//! A realisation is no root and keeps nothing alive; it counts for as long as its path is valid.
//! Source: modern, sections 2.6 and 2.11.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::derivation::{Derivation, OutputName};
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_store_db::ReadTxn;

use crate::error::StoreError;
use crate::local::LocalStore;

/// What is stored for an id, if its path is valid.
pub(crate) fn realised(txn: &ReadTxn, id: &DrvOutput) -> Result<Option<Realisation>, StoreError> {
    let Some(json) = txn.realisation(&id.to_string())? else { return Ok(None) };
    let realisation = Realisation::from_json(&json)?;
    Ok(if txn.is_valid(&realisation.out_path)? { Some(realisation) } else { None })
}

impl LocalStore {
    /// What outputs were built as; those that were not, or whose paths have gone, are left out.
    pub fn realisations<'a>(
        &self,
        ids: impl IntoIterator<Item = &'a DrvOutput>,
    ) -> Result<BTreeMap<DrvOutput, Realisation>, StoreError> {
        self.read(|txn| {
            let mut found = BTreeMap::new();
            for id in ids {
                if let Some(realisation) = realised(txn, id)? {
                    found.insert(id.clone(), realisation);
                }
            }
            Ok(found)
        })
    }

    /// The outputs of a derivation of the store and where they are, as far as that is known: written
    /// in it, or found out by building it.
    pub fn known_outputs(&self, drv: &StorePath) -> Result<BTreeMap<String, StorePath>, StoreError> {
        let known = self.derivation_outputs(drv)?;
        if !known.is_empty() {
            return Ok(known);
        }
        self.built_outputs(&self.derivation(drv)?)
    }

    /// What outputs of a derivation were built as, whatever is written in it.
    pub fn built_outputs(&self, read: &Derivation) -> Result<BTreeMap<String, StorePath>, StoreError> {
        let digest = self.output_ids_of(read)?;
        let id = |name: &OutputName| DrvOutput::new(digest, name.as_str());
        let ids = read.outputs.keys().map(id).collect::<Result<Vec<_>, _>>();
        let ids = ids.map_err(|source| StoreError::Name { name: read.name.to_string(), source })?;
        let realised = self.realisations(&ids)?;
        Ok(realised.into_iter().map(|(id, found)| (id.output().to_owned(), found.out_path)).collect())
    }

    /// Registers realisations of valid paths, all or none.
    ///
    /// One that is known is united with what is new: signatures are added, and the fuller set of
    /// dependents stays. Errors: it is known with another path, or a path is not valid.
    pub fn register_realisations(&self, new: &[Realisation]) -> Result<(), StoreError> {
        if new.is_empty() {
            return Ok(());
        }
        let known = self.realisations(new.iter().map(|realisation| &realisation.id))?;
        let mut united = Vec::with_capacity(new.len());
        for realisation in new {
            united.push(self.unite(known.get(&realisation.id), realisation)?);
        }
        self.ledger()?.write(|txn| {
            for realisation in &united {
                if !txn.is_valid(&realisation.out_path)? {
                    return Err(self.not_valid(&realisation.out_path));
                }
                txn.set_realisation(&realisation.id.to_string(), realisation.to_json().as_bytes())?;
            }
            Ok(())
        })
    }

    /// A realisation with what was known of it.
    pub(crate) fn unite(&self, known: Option<&Realisation>, new: &Realisation) -> Result<Realisation, StoreError> {
        let Some(known) = known else { return Ok(new.clone()) };
        let (old, fresh) = (&known.dependent_realisations, &new.dependent_realisations);
        if known.out_path != new.out_path || (old != fresh && !old.is_empty() && !fresh.is_empty()) {
            let (local, remote) = (self.dir().full(&known.out_path), self.dir().full(&new.out_path));
            return Err(StoreError::RealisedOtherwise { id: new.id.to_string(), local, remote });
        }
        if old != fresh {
            let id = &new.id;
            self.reporter().message(
                Level::Debug,
                format_args!("the realisation of '{id}' is known with and without what it depends on"),
            );
        }
        Ok(Realisation {
            id: new.id.clone(),
            out_path: new.out_path.clone(),
            signatures: known.signatures.union(&new.signatures).cloned().collect(),
            dependent_realisations: if fresh.is_empty() { old.clone() } else { fresh.clone() },
        })
    }

    /// Forgets realisations whose paths have gone.
    pub(crate) fn forget_realisations(&self) -> Result<(), StoreError> {
        let gone: BTreeSet<String> = self.read(|txn| {
            let mut gone = BTreeSet::new();
            for (id, json) in txn.realisations()? {
                let is_there = match Realisation::from_json(&json) {
                    Ok(realisation) => txn.is_valid(&realisation.out_path)?,
                    Err(_) => false,
                };
                if !is_there {
                    gone.insert(id);
                }
            }
            Ok(gone)
        })?;
        if gone.is_empty() {
            return Ok(());
        }
        self.ledger()?.write(|txn| {
            for id in &gone {
                // It may have been built again in between.
                txn.remove_realisation(id)?;
            }
            Ok(())
        })
    }
}
