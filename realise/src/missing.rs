//! What a run would build and fetch, before it does.
//!
//! Source: building, rule 1.5; cli, section 5.1.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use larder_cache::{CacheError, Caches, Found};
use larder_core::derivation::{Derivation, Kind, OutputName};
use larder_core::report::{Level, chain};
use larder_core::store_path::StorePath;
use larder_store::{LocalStore, StoreError};

use crate::derivations::{Derivations, allows_substitutes, known_outputs};
use crate::plan::{Key, Target, Wanted};

/// What is missing for some targets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Missing {
    /// Derivations to build, in the order of `-qR`: what others need comes first.
    pub will_build: Vec<StorePath>,
    /// Paths to fetch.
    pub will_fetch: BTreeSet<StorePath>,
    /// What that is to download, as far as caches say, and unpacked as archives.
    pub download_size_bytes: u64,
    pub nar_size_bytes: u64,
    /// Paths that nobody has.
    pub unknown: BTreeSet<StorePath>,
}

/// Why that cannot be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MissingError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Who may have what is missing.
#[derive(Debug, Clone, Copy)]
pub struct Sources<'a> {
    pub caches: &'a Caches,
    pub settings: &'a larder_core::settings::Settings,
}

/// What is missing for these targets, where nothing is fetched.
///
/// A derivation is read only if one of its outputs is wanted and not valid.
pub fn missing(store: &LocalStore, derivations: &Derivations<'_>, targets: &[Target]) -> Result<Missing, StoreError> {
    match missing_from(store, derivations, targets, None) {
        Ok(missing) => Ok(missing),
        Err(MissingError::Store(error)) => Err(error),
        // There are none.
        Err(MissingError::Cache(_)) => Ok(Missing::default()),
    }
}

/// What is missing for these targets.
///
/// It goes by levels of the graph: one reading of the ledger, and one round of questions to
/// caches, answer for all of a level.
pub fn missing_from(
    store: &LocalStore,
    derivations: &Derivations<'_>,
    targets: &[Target],
    sources: Option<Sources<'_>>,
) -> Result<Missing, MissingError> {
    let mut survey = Survey {
        store,
        derivations,
        sources,
        wanted: HashMap::new(),
        left: BTreeMap::new(),
        left_paths: BTreeSet::new(),
        seen: HashSet::new(),
        will_build: BTreeSet::new(),
        missing: Missing::default(),
    };
    for target in targets {
        match &target.key {
            Key::Path(path) => survey.want_path(path),
            Key::Derivation(path) => survey.want(path, &target.wanted),
        }
    }
    while !survey.left.is_empty() || !survey.left_paths.is_empty() {
        survey.level()?;
    }
    survey.missing.will_build = store.order(&survey.will_build)?;
    Ok(survey.missing)
}

struct Survey<'a> {
    store: &'a LocalStore,
    derivations: &'a Derivations<'a>,
    sources: Option<Sources<'a>>,
    /// What is wanted of each derivation, and what of that was not looked at.
    wanted: HashMap<StorePath, Wanted>,
    left: BTreeMap<StorePath, Wanted>,
    /// Paths that were not looked at, and all that ever were among them.
    left_paths: BTreeSet<StorePath>,
    seen: HashSet<StorePath>,
    will_build: BTreeSet<StorePath>,
    missing: Missing,
}

type Answers = BTreeMap<StorePath, Result<Option<Found>, CacheError>>;

impl Survey<'_> {
    fn want(&mut self, path: &StorePath, more: &Wanted) {
        let known = self.wanted.entry(path.clone()).or_insert_with(|| Wanted::Only(BTreeSet::new()));
        if known.add(more) {
            self.left.insert(path.clone(), known.clone());
        }
    }

    fn want_path(&mut self, path: &StorePath) {
        if self.seen.insert(path.clone()) {
            self.left_paths.insert(path.clone());
        }
    }

    fn level(&mut self) -> Result<(), MissingError> {
        let unbuilt = self.unbuilt()?;
        let mut paths = std::mem::take(&mut self.left_paths);
        let valid = self.store.valid_subset(&paths)?;
        paths.retain(|path| !valid.contains(path));
        let mut asked = paths.clone();
        for (drv, outputs) in &unbuilt {
            if self.may_fetch(drv)? {
                asked.extend(outputs.iter().flatten().cloned());
            }
        }
        let mut answers = match self.sources {
            Some(sources) => sources.caches.find_all(&asked),
            None => Answers::new(),
        };
        for (path, outputs) in unbuilt {
            let all = match outputs {
                Some(outputs) if outputs.iter().all(|output| answers.contains_key(output)) => outputs,
                _ => {
                    self.build(path)?;
                    continue;
                }
            };
            let mut there = true;
            for output in &all {
                there &= self.found(&mut answers, output)?.is_some();
            }
            if there {
                for output in &all {
                    self.want_path(output);
                }
            } else {
                self.build(path)?;
            }
        }
        for path in paths {
            let Some(found) = self.found(&mut answers, &path)? else {
                self.missing.unknown.insert(path);
                continue;
            };
            self.missing.download_size_bytes += found.info.file_size_bytes.unwrap_or(0);
            self.missing.nar_size_bytes += found.info.info.nar_size_bytes;
            self.missing.will_fetch.insert(path);
            for reference in &found.info.info.references {
                self.want_path(reference);
            }
        }
        Ok(())
    }

    /// Derivations of this level of which something wanted is not valid, and what; `None` if the
    /// paths of outputs are not known.
    fn unbuilt(&mut self) -> Result<Vec<(StorePath, Option<Vec<StorePath>>)>, MissingError> {
        let level = std::mem::take(&mut self.left);
        let mut found = Vec::with_capacity(level.len());
        let unknown = &mut self.missing.unknown;
        self.store.read(|txn| {
            for (path, wanted) in level {
                if !txn.is_valid(&path)? {
                    unknown.insert(path);
                    continue;
                }
                let outputs = txn.derivation_outputs(&path)?;
                let mut missing = Vec::new();
                for (name, output) in &outputs {
                    let is_wanted = OutputName::new(name).is_ok_and(|name| wanted.has(&name));
                    if is_wanted && !txn.is_valid(output)? {
                        missing.push(output.clone());
                    }
                }
                if !missing.is_empty() || outputs.is_empty() {
                    found.push((path, (!outputs.is_empty()).then_some(missing)));
                }
            }
            Ok::<_, StoreError>(())
        })?;
        Ok(found)
    }

    fn may_fetch(&self, drv: &StorePath) -> Result<bool, StoreError> {
        let Some(sources) = self.sources else { return Ok(false) };
        Ok(allows_substitutes(drv, &*self.derivations.get(drv)?, sources.settings))
    }

    fn build(&mut self, path: StorePath) -> Result<(), StoreError> {
        let drv = self.derivations.get(&path)?;
        // What its ledger does not know may be known by having been built.
        if known_outputs(&drv).is_err() && self.is_realised(&path, &drv)? {
            return Ok(());
        }
        if self.will_build.insert(path) {
            for path in &drv.input_srcs {
                self.want_path(path);
            }
            for (input, names) in &drv.input_drvs {
                self.want(input, &Wanted::Only(names.clone()));
            }
        }
        Ok(())
    }

    /// Were all wanted outputs built whose paths nobody knew before?
    fn is_realised(&self, path: &StorePath, drv: &Derivation) -> Result<bool, StoreError> {
        if drv.kind() == Ok(Kind::Impure) {
            return Ok(false);
        }
        let (known, wanted) = (self.store.known_outputs(path)?, self.wanted.get(path));
        Ok(drv.outputs.keys().all(|name| known.contains_key(name.as_str()) || wanted.is_some_and(|w| !w.has(name))))
    }

    /// What caches said of a path. That one failed is an error, unless what fails is built.
    fn found(&self, answers: &mut Answers, path: &StorePath) -> Result<Option<Found>, CacheError> {
        let Some(answer) = answers.get_mut(path) else { return Ok(None) };
        match answer {
            Ok(found) => Ok(found.clone()),
            Err(_) => match std::mem::replace(answer, Ok(None)) {
                Err(CacheError::Interrupted) => Err(CacheError::Interrupted),
                Err(error) if self.sources.is_some_and(|sources| sources.settings.fallback) => {
                    self.store.reporter().message(Level::Error, format_args!("error: {}", chain(&error)));
                    Ok(None)
                }
                Err(error) => Err(error),
                Ok(found) => Ok(found),
            },
        }
    }
}
