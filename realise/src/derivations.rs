//! Derivations read from the store, each once in a run.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use larder_core::derivation::options::Attributes;
use larder_core::derivation::{Derivation, Kind, OutputName};
use larder_core::machines::Needs;
use larder_core::settings::Settings;
use larder_core::store_path::StorePath;
use larder_store::{LocalStore, StoreError};

/// Reads derivations, and remembers them while they may be needed again.
#[derive(Debug)]
pub struct Derivations<'a> {
    store: &'a LocalStore,
    read: Mutex<HashMap<StorePath, Arc<Derivation>>>,
    /// One that need not lie in the store.
    given: Option<(StorePath, Arc<Derivation>)>,
}

impl<'a> Derivations<'a> {
    pub fn new(store: &'a LocalStore) -> Self {
        Self { store, read: Mutex::default(), given: None }
    }

    /// With one that need not lie in the store, and has no input derivations.
    #[must_use]
    pub fn with(mut self, path: StorePath, drv: Derivation) -> Self {
        self.given = Some((path, Arc::new(drv)));
        self
    }

    /// The derivation of this path, if it was given rather than read.
    pub fn given(&self, path: &StorePath) -> Option<&Arc<Derivation>> {
        self.given.as_ref().filter(|(given, _)| given == path).map(|(_, drv)| drv)
    }

    pub fn get(&self, path: &StorePath) -> Result<Arc<Derivation>, StoreError> {
        if let Some(drv) = self.given(path) {
            return Ok(Arc::clone(drv));
        }
        if let Some(drv) = self.read.lock().unwrap_or_else(PoisonError::into_inner).get(path) {
            return Ok(Arc::clone(drv));
        }
        let drv = Arc::new(self.store.derivation(path)?);
        self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(path.clone(), Arc::clone(&drv));
        Ok(drv)
    }

    /// Forgets one that is done.
    pub fn forget(&self, path: &StorePath) {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
    }
}

/// The paths of all outputs, and the name of one whose path is not known before it is built.
pub fn known_outputs(drv: &Derivation) -> Result<Vec<(OutputName, StorePath)>, OutputName> {
    drv.output_paths().map(|(name, path)| Ok((name.clone(), path.ok_or_else(|| name.clone())?.clone()))).collect()
}

/// May its outputs be fetched? Badly formed attributes are the builder's side to complain about.
pub fn allows_substitutes(path: &StorePath, drv: &Derivation, settings: &Settings) -> bool {
    settings.always_allow_substitutes
        || Attributes::new(path, drv).and_then(|attributes| attributes.flag("allowSubstitutes", true)).unwrap_or(true)
}

/// The features that a machine must have to build it, in order.
fn required(path: &StorePath, drv: &Derivation) -> BTreeSet<String> {
    let attributes = Attributes::new(path, drv).ok();
    let required =
        attributes.as_ref().and_then(|attributes| attributes.strings("requiredSystemFeatures").ok().flatten());
    required.unwrap_or_default().iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// What a machine must be to build it in place of this one. `None`: none can be asked to.
pub fn needs(path: &StorePath, drv: &Derivation) -> Option<Needs> {
    let mut features = required(path, drv);
    match drv.kind().ok()? {
        Kind::InputAddressed | Kind::Fixed => {}
        // A rule of Nix: machines must say that they can do this.
        Kind::Floating => drop(features.insert("ca-derivations".to_owned())),
        // Nobody would know what it was built as; or it is not what is built.
        Kind::Impure | Kind::Deferred => return None,
    }
    Some(Needs { system: drv.system.clone(), features })
}

/// Is it to be built on this machine if it can be?
pub fn prefers_local(path: &StorePath, drv: &Derivation) -> bool {
    Attributes::new(path, drv).and_then(|attributes| attributes.flag("preferLocalBuild", false)).unwrap_or(false)
}

/// Why it cannot be built on this machine: its system, or features that it requires.
pub fn unsupported(store: &LocalStore, path: &StorePath, drv: &Derivation, settings: &Settings) -> Option<String> {
    let required: Vec<String> = required(path, drv).into_iter().collect();
    let ours = drv.system == settings.system
        || settings.extra_platforms.contains(&drv.system)
        || drv.builder.starts_with(b"builtin:");
    let mut features: BTreeSet<&str> = settings.system_features.iter().map(String::as_str).collect();
    let experimental = ["ca-derivations", "recursive-nix"];
    features.extend(experimental.into_iter().filter(|feature| settings.experimental_features.contains(*feature)));
    if ours && required.iter().all(|feature| features.contains(feature.as_str())) {
        return None;
    }
    let have: Vec<&str> = features.into_iter().collect();
    Some(format!(
        "a '{}' with features {{{}}} is required to build '{}', but I am a '{}' with features {{{}}}",
        drv.system,
        required.join(", "),
        store.dir().full(path),
        settings.system,
        have.join(", ")
    ))
}
