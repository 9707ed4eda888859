//! What a run would build and fetch, before it does.
//!
//! Source: building, rule 1.5; cli, section 5.1.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use larder_core::derivation::{Derivation, Kind, OutputName};
use larder_core::store_path::StorePath;
use larder_store::{LocalStore, StoreError};

use crate::derivations::{Derivations, known_outputs};
use crate::plan::{Key, Target, Wanted};

/// What is missing for some targets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Missing {
    /// Derivations to build, in the order of `-qR`: what others need comes first.
    pub will_build: Vec<StorePath>,
    /// Paths that nobody has.
    pub unknown: BTreeSet<StorePath>,
}

/// What is missing for these targets.
///
/// A derivation is read only if one of its outputs is wanted and not valid.
pub fn missing(store: &LocalStore, derivations: &Derivations<'_>, targets: &[Target]) -> Result<Missing, StoreError> {
    let mut will_build = BTreeSet::new();
    let mut unknown = BTreeSet::new();
    // What is wanted of each derivation, and what of that was not looked at.
    let mut wanted: HashMap<StorePath, Wanted> = HashMap::new();
    let mut left: BTreeMap<StorePath, Wanted> = BTreeMap::new();
    let mut paths = BTreeSet::new();
    for target in targets {
        match &target.key {
            Key::Path(path) => drop(paths.insert(path.clone())),
            Key::Derivation(path) => add(&mut wanted, &mut left, path, &target.wanted),
        }
    }
    // A level of the graph at a time: one reading of the ledger answers for all of it.
    while !left.is_empty() {
        let level = std::mem::take(&mut left);
        let mut found = Vec::with_capacity(level.len());
        store.read(|txn| {
            for (path, wanted) in level {
                if !txn.is_valid(&path)? {
                    unknown.insert(path);
                    continue;
                }
                let outputs = txn.derivation_outputs(&path)?;
                let mut all_valid = !outputs.is_empty();
                for (name, output) in &outputs {
                    let is_wanted = OutputName::new(name).is_ok_and(|name| wanted.has(&name));
                    all_valid &= !is_wanted || txn.is_valid(output)?;
                }
                if !all_valid {
                    found.push(path);
                }
            }
            Ok::<_, StoreError>(())
        })?;
        for path in found {
            let drv = derivations.get(&path)?;
            // What its ledger does not know may be known by having been built.
            if known_outputs(&drv).is_err() && is_realised(store, &path, &drv, wanted.get(&path))? {
                continue;
            }
            if will_build.insert(path) {
                paths.extend(drv.input_srcs.iter().cloned());
                for (input, names) in &drv.input_drvs {
                    add(&mut wanted, &mut left, input, &Wanted::Only(names.clone()));
                }
            }
        }
    }
    let valid = store.valid_subset(&paths)?;
    unknown.extend(paths.into_iter().filter(|path| !valid.contains(path)));
    Ok(Missing { will_build: store.order(&will_build)?, unknown })
}

/// Were all wanted outputs built whose paths nobody knew before?
fn is_realised(
    store: &LocalStore,
    path: &StorePath,
    drv: &Derivation,
    wanted: Option<&Wanted>,
) -> Result<bool, StoreError> {
    if drv.kind() == Ok(Kind::Impure) {
        return Ok(false);
    }
    let known = store.known_outputs(path)?;
    Ok(drv.outputs.keys().all(|name| known.contains_key(name.as_str()) || wanted.is_some_and(|w| !w.has(name))))
}

fn add(
    wanted: &mut HashMap<StorePath, Wanted>,
    left: &mut BTreeMap<StorePath, Wanted>,
    path: &StorePath,
    more: &Wanted,
) {
    let known = wanted.entry(path.clone()).or_insert_with(|| Wanted::Only(BTreeSet::new()));
    if known.add(more) {
        left.insert(path.clone(), known.clone());
    }
}
