//! As what others have built outputs whose paths nobody knows beforehand.
//!
//! A cache may say anything, and whoever believes it takes some path for the output of some
//! derivation: a realisation counts only if a trusted key has signed it, or if the whole cache is
//! trusted. Nix 2.8 and 2.26 do not look. Source: modern, section 2.9.

use std::collections::{BTreeMap, HashSet};

use larder_cache::caches::Realised;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::Level;
use larder_core::store_path::StorePath;

use super::{Substitution, failure, lock, store_failure};
use crate::job::Failure;

/// More realisations than this are not fetched for one output.
const MOST: usize = 10_000;

impl Substitution<'_> {
    /// The path of an output, as the first cache says that may be believed and does not contradict what
    /// is known here.
    pub(super) fn find_realisation(&self, id: &DrvOutput) -> Result<Option<StorePath>, Failure> {
        let mut after = None;
        while let Some(found) = self.caches.find_realisation(id, after).map_err(|error| failure(&error))? {
            after = Some(found.cache);
            if self.believes(&found)
                && let Some(all) = self.with_dependents(&found)?
            {
                lock(&self.realised).insert(id.clone(), all);
                return Ok(Some(found.realisation.out_path.clone()));
            }
        }
        Ok(None)
    }

    /// Registers what was found of outputs, all at once.
    pub(super) fn register_found(&self, ids: &[DrvOutput]) -> Result<(), Failure> {
        let mut all: BTreeMap<DrvOutput, Realisation> = BTreeMap::new();
        {
            let mut realised = lock(&self.realised);
            for found in ids.iter().filter_map(|id| realised.remove(id)) {
                all.extend(found.into_iter().map(|realisation| (realisation.id.clone(), realisation)));
            }
        }
        let all: Vec<Realisation> = all.into_values().collect();
        self.store.register_realisations(&all).map_err(|error| store_failure(&error))
    }

    fn is_signed(&self, found: &Realised) -> bool {
        self.trusts(found.cache) || found.realisation.count_valid(&self.trust.keys) > 0
    }

    /// May it be believed? That it may not is told once.
    fn believes(&self, found: &Realised) -> bool {
        let Realised { cache, realisation } = found;
        let believed = self.is_signed(found);
        if !believed && lock(&self.doubted).insert((*cache, realisation.id.clone())) {
            self.store.reporter().message(
                Level::Warn,
                format_args!(
                    "the realisation of '{}' from '{}' is not signed by any of the keys in 'trusted-public-keys' ({})",
                    realisation.id,
                    self.uri(*cache),
                    self.keys_of(&realisation.signatures)
                ),
            );
        }
        believed
    }

    /// A realisation with all it depends on that is not known here. `None`: something else is known
    /// here, or something cannot be had.
    fn with_dependents(&self, first: &Realised) -> Result<Option<Vec<Realisation>>, Failure> {
        let mut all = vec![(*first.realisation).clone()];
        let mut seen: HashSet<DrvOutput> = [first.realisation.id.clone()].into();
        let mut next = 0;
        while let Some(realisation) = all.get(next) {
            next += 1;
            let dependents: Vec<(DrvOutput, StorePath)> =
                realisation.dependent_realisations.clone().into_iter().filter(|(id, _)| !seen.contains(id)).collect();
            let known = self.store.realisations(dependents.iter().map(|(id, _)| id)).map_err(|e| store_failure(&e))?;
            for (id, path) in dependents {
                match known.get(&id) {
                    Some(known) if known.out_path == path => {}
                    Some(known) => {
                        self.tell_incompatible(first.cache, &id, &known.out_path, &path);
                        return Ok(None);
                    }
                    None if all.len() >= MOST => return Ok(None),
                    None => match self.find_dependent(&id, &path)? {
                        Some(found) => all.push(found),
                        None => return Ok(None),
                    },
                }
                seen.insert(id);
            }
        }
        Ok(Some(all))
    }

    /// The realisation of an output of which one that is believed says where it is. Without dependents it
    /// says nothing more than that, and needs no signature of its own.
    fn find_dependent(&self, id: &DrvOutput, path: &StorePath) -> Result<Option<Realisation>, Failure> {
        let mut after = None;
        while let Some(found) = self.caches.find_realisation(id, after).map_err(|error| failure(&error))? {
            after = Some(found.cache);
            let realisation = &found.realisation;
            if realisation.out_path == *path && (realisation.dependent_realisations.is_empty() || self.believes(&found))
            {
                return Ok(Some((**realisation).clone()));
            }
        }
        let (path, reporter) = (self.store.dir().display(path), self.store.reporter());
        reporter.message(Level::Talkative, format_args!("nobody says that '{id}' was built as '{path}'"));
        Ok(None)
    }

    fn tell_incompatible(&self, cache: usize, id: &DrvOutput, local: &StorePath, remote: &StorePath) {
        let (dir, uri) = (self.store.dir(), self.uri(cache));
        self.store.reporter().message(
            Level::Warn,
            format_args!(
                "substituter '{uri}' has an incompatible realisation for '{id}', ignoring.\nLocal:  {}\nRemote: {}",
                dir.display(local),
                dir.display(remote)
            ),
        );
    }
}
