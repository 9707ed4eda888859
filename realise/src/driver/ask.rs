//! What the plan asks about the store.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use larder_core::derivation::{Kind, OutputName};
use larder_core::report::Level;
use larder_core::store_path::StorePath;
use larder_store::StoreError;

use super::Driver;
use crate::derivations::{allows_substitutes, known_outputs, needs, prefers_local, unsupported};
use crate::job::{Failure, FailureKind};
use crate::plan::{Event, Facts, Known, Offer, Wanted};

/// An error of the store as the failure of a goal.
pub(super) fn store_failure(error: &StoreError) -> Failure {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(reason) = next {
        let said = reason.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = reason.source();
    }
    Failure { kind: FailureKind::Misc, text }
}

pub(super) fn rejected(text: String) -> Failure {
    Failure { kind: FailureKind::InputRejected, text }
}

type Outputs = BTreeMap<OutputName, Known>;

/// Who has a path, behind the substituters that were tried?
pub(super) struct OfferAsked {
    pub(super) path: StorePath,
    pub(super) after: Option<usize>,
    pub(super) verify: bool,
}

impl Driver<'_> {
    /// Answers for many derivations, with two readings of the ledger.
    pub(super) fn outputs(&self, asked: Vec<(StorePath, Option<Wanted>)>, events: &mut VecDeque<Event>) {
        match self.known(asked.iter().map(|(drv, _)| drv)) {
            Ok(known) => {
                for ((drv, verify), outputs) in asked.into_iter().zip(known) {
                    let answer = outputs.and_then(|outputs| match (outputs, verify) {
                        (Some(outputs), Some(wanted)) => self.verified(outputs, &wanted).map(Some),
                        (outputs, _) => Ok(outputs),
                    });
                    events.push_back(Event::Outputs { drv, answer });
                }
            }
            Err(error) => {
                for (drv, _) in asked {
                    events.push_back(Event::Outputs { drv, answer: Err(store_failure(&error)) });
                }
            }
        }
    }

    fn known<'d>(
        &self,
        drvs: impl Iterator<Item = &'d StorePath> + Clone,
    ) -> Result<Vec<Result<Option<Outputs>, Failure>>, StoreError> {
        let store = self.store;
        store.add_temp_roots(drvs.clone())?;
        let mut found = store.read_or(
            || drvs.clone().map(|_| Ok(None)).collect(),
            |txn| {
                let ledger = |drv| Ok(if txn.is_valid(drv)? { Some(txn.derivation_outputs(drv)?) } else { None });
                drvs.clone().map(|drv| ledger(drv).map(Ok)).collect::<Result<Vec<_>, StoreError>>()
            },
        )?;
        let mut paths: Vec<Result<Option<BTreeMap<OutputName, StorePath>>, Failure>> = Vec::with_capacity(found.len());
        for (drv, ledger) in drvs.zip(found.drain(..)) {
            paths.push(match ledger {
                Err(failure) => Err(failure),
                // What was given says itself what it makes, whatever has its path in the store.
                Ok(_) if self.derivations.given(drv).is_some() => self.paths_of(drv, BTreeMap::new()).map(Some),
                Ok(None) => Ok(None),
                Ok(Some(ledger)) => self.paths_of(drv, ledger).map(Some),
            });
        }
        let all = || paths.iter().flatten().flatten().flat_map(BTreeMap::values);
        store.add_temp_roots(all())?;
        let valid = store.valid_subset(&all().cloned().collect())?;
        let known = |path: StorePath| Known { valid: valid.contains(&path), path };
        let outputs = |paths: BTreeMap<OutputName, StorePath>| paths.into_iter().map(|(n, p)| (n, known(p))).collect();
        Ok(paths.into_iter().map(|answer| answer.map(|paths| paths.map(outputs))).collect())
    }

    /// The outputs as the ledger has them; if it has none, as the derivation says.
    fn paths_of(
        &self,
        drv: &StorePath,
        ledger: BTreeMap<String, StorePath>,
    ) -> Result<BTreeMap<OutputName, StorePath>, Failure> {
        if !ledger.is_empty() {
            let named = ledger.into_iter().map(|(name, path)| Ok((OutputName::new(&name)?, path)));
            return named
                .collect::<Result<_, larder_core::store_path::NameError>>()
                .map_err(|e| rejected(e.to_string()));
        }
        let derivation = self.derivations.get(drv).map_err(|error| store_failure(&error))?;
        match known_outputs(&derivation) {
            Ok(outputs) => Ok(outputs.into_iter().collect()),
            Err(_) => self.realised_or_scratch(drv, &derivation),
        }
    }

    /// Repairing, a path is good only if it has the contents it should have.
    fn verified(&self, mut outputs: Outputs, wanted: &Wanted) -> Result<Outputs, Failure> {
        for (name, known) in &mut outputs {
            if known.valid && wanted.has(name) {
                known.valid = self.is_good(&known.path)?;
            }
        }
        Ok(outputs)
    }

    fn is_good(&self, path: &StorePath) -> Result<bool, Failure> {
        let store = self.store;
        let full = store.dir().full(path);
        store.reporter().message(Level::Info, format_args!("checking path '{full}'..."));
        if std::fs::symlink_metadata(store.layout().real_store.join(path.to_string())).is_ok()
            && store.verify_path(path).map_err(|error| store_failure(&error))?
        {
            return Ok(true);
        }
        store.reporter().message(Level::Error, format_args!("path '{full}' is corrupted or missing!"));
        Ok(false)
    }

    pub(super) fn inputs(&self, path: &StorePath) -> Result<Facts, Failure> {
        let facts = || {
            let drv = self.derivations.get(path)?;
            let valid = self.store.valid_subset(&drv.input_srcs)?;
            let has_paths = known_outputs(&drv).is_ok();
            let is_there = self.derivations.given(path).is_none() || self.store.is_valid(path)?;
            let facts = Facts {
                inputs: drv.input_drvs.clone(),
                missing_sources: drv.input_srcs.iter().filter(|path| !valid.contains(*path)).cloned().collect(),
                // A path that nobody knows cannot be asked for.
                allow_substitutes: has_paths && allows_substitutes(path, &drv, self.settings),
                asks_realisations: matches!(drv.kind(), Ok(Kind::Floating | Kind::Deferred))
                    && self.has_feature("ca-derivations")
                    && allows_substitutes(path, &drv, self.settings),
                unsupported: unsupported(self.store, path, &drv, self.settings).map(Into::into),
                // Whoever is asked reads it from the store.
                needs: needs(path, &drv).filter(|_| is_there).map(Into::into),
                prefers_local: prefers_local(path, &drv),
                resolves: self.resolves(&drv),
            };
            Ok((drv, facts))
        };
        let (drv, facts) = facts().map_err(|error: StoreError| store_failure(&error))?;
        self.check_purity(path, &drv)?;
        Ok(facts)
    }

    /// Answers what can be answered here, and gives back what others are to be asked.
    pub(super) fn offers(&self, asked: Vec<OfferAsked>, events: &mut VecDeque<Event>) -> Vec<OfferAsked> {
        let valid = (|| {
            self.store.add_temp_roots(asked.iter().map(|asked| &asked.path))?;
            self.store.valid_subset(&asked.iter().map(|asked| asked.path.clone()).collect())
        })();
        let mut left = Vec::new();
        for asked in asked {
            let known = match &valid {
                Ok(valid) if !valid.contains(&asked.path) => Ok(false),
                Ok(_) if asked.verify => self.is_good(&asked.path),
                Ok(_) => Ok(true),
                Err(error) => Err(store_failure(error)),
            };
            let offer = match known {
                Ok(true) => Offer::Valid,
                Ok(false) if self.substituters.is_some() && !self.read_only => {
                    left.push(asked);
                    continue;
                }
                Ok(false) => Offer::Nobody,
                Err(failure) => Offer::Error { substituter: 0, failure },
            };
            events.push_back(Event::Offer { path: asked.path, offer });
        }
        left
    }

    /// Damaged paths in the closure of the outputs, but for these, and the derivation in the
    /// closure of the inputs that makes each.
    pub(super) fn damaged_closure(&self, path: &StorePath) -> Result<Vec<(StorePath, Option<StorePath>)>, Failure> {
        let store = self.store;
        let fail = |error: StoreError| store_failure(&error);
        let own: BTreeSet<StorePath> = store.known_outputs(path).map_err(fail)?.into_values().collect();
        let valid = store.valid_subset(&own).map_err(fail)?;
        let mut bad = Vec::new();
        for other in store.closure(&valid).map_err(fail)? {
            if !own.contains(&other) && !self.is_good(&other)? {
                bad.push(other);
            }
        }
        if bad.is_empty() {
            return Ok(Vec::new());
        }
        let mut makers = BTreeMap::new();
        if self.derivations.given(path).is_some() {
            return Ok(bad.into_iter().map(|path| (path, None)).collect());
        }
        for input in store.closure([path]).map_err(fail)?.into_iter().filter(StorePath::is_derivation) {
            for output in store.known_outputs(&input).map_err(fail)?.into_values() {
                makers.entry(output).or_insert_with(|| input.clone());
            }
        }
        for path_there in &bad {
            store.reporter().message(
                Level::Error,
                format_args!(
                    "found corrupted or missing path '{}' in the output closure of '{}'",
                    store.dir().display(path_there),
                    store.dir().display(path)
                ),
            );
        }
        Ok(bad.into_iter().map(|path| (path.clone(), makers.get(&path).cloned())).collect())
    }
}
