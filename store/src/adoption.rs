//! Beside real Nix: nothing is deleted while it knows of objects that Larder does not.

use std::sync::PoisonError;

use larder_core::report::Level;
use larder_core::store_path::StorePath;
use rustc_hash::FxHashSet;

use crate::error::StoreError;
use crate::foreign::{Fingerprint, ForeignError, ForeignLedger};
use crate::local::LocalStore;

/// Marker: the state of the other ledger of which Larder knows everything.
const ADOPTED: &str = "foreign-adopted";
/// Marker: the user has been told of the other ledger.
const TOLD: &str = "foreign-told";

/// Everything that real Nix had registered when its ledger was in this state.
#[derive(Debug)]
pub(crate) struct Theirs {
    state: Fingerprint,
    paths: FxHashSet<StorePath>,
}

/// What the other ledger has that ours has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    pub count: u64,
    /// One of them, with its directory.
    pub example: String,
}

impl LocalStore {
    /// Objects that real Nix has registered, that exist and that Larder does not know.
    ///
    /// `None` if there are none: no other ledger, an empty one, or one that was taken over.
    pub fn unknown_to_us(&self) -> Result<Option<Unknown>, StoreError> {
        let Some(ledger) = ForeignLedger::find(&self.layout().db()) else { return Ok(None) };
        let unreadable =
            |source: ForeignError| StoreError::MayNotBeAdopted { ledger: ledger.file().to_owned(), source };
        let fingerprint = ledger.fingerprint().map_err(unreadable)?;
        if self.read(|txn| Ok(txn.meta(ADOPTED)?))?.as_deref() == Some(fingerprint.as_bytes()) {
            return Ok(None);
        }
        let mut theirs = std::collections::BTreeSet::new();
        ledger
            .paths(self.dir(), &mut |path| {
                theirs.insert(path);
                true
            })
            .map_err(unreadable)?;
        let ours = self.valid_subset(&theirs)?;
        let mut unknown =
            theirs.difference(&ours).filter(|path| std::fs::symlink_metadata(self.layout().real_path(path)).is_ok());
        let Some(first) = unknown.next() else {
            // The next look need not be this thorough.
            if self.ledger().is_ok() {
                self.mark_adopted(&fingerprint)?;
            }
            return Ok(None);
        };
        Ok(Some(Unknown { count: 1 + unknown.count() as u64, example: self.dir().full(first) }))
    }

    /// Has real Nix registered this path, which Larder does not know?
    ///
    /// What lies at such a path is no remains of something: it must not be replaced.
    pub(crate) fn belongs_to_real_nix(&self, path: &StorePath) -> Result<bool, StoreError> {
        let Some(ledger) = ForeignLedger::find(&self.layout().db()) else { return Ok(false) };
        let unreadable =
            |source: ForeignError| StoreError::MayNotBeAdopted { ledger: ledger.file().to_owned(), source };
        let state = ledger.fingerprint().map_err(unreadable)?;
        if self.read(|txn| Ok(txn.meta(ADOPTED)?))?.as_deref() == Some(state.as_bytes()) {
            return Ok(false);
        }
        let mut known = self.theirs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(theirs) = known.as_ref().filter(|theirs| theirs.state == state) {
            return Ok(theirs.paths.contains(path));
        }
        let mut paths = FxHashSet::default();
        let mut take = |path| {
            paths.insert(path);
            true
        };
        ledger.paths(self.dir(), &mut take).map_err(unreadable)?;
        let found = paths.contains(path);
        *known = Some(Theirs { state, paths });
        Ok(found)
    }

    /// Remembers that everything in this state of the other ledger is known.
    pub(crate) fn mark_adopted(&self, fingerprint: &Fingerprint) -> Result<(), StoreError> {
        self.ledger()?.write(|txn| Ok::<(), StoreError>(txn.set_meta(ADOPTED, fingerprint.as_bytes())?))
    }

    /// Refuses to go on if something may be deleted that only real Nix knows of.
    pub fn refuse_unless_adopted(&self) -> Result<(), StoreError> {
        match self.unknown_to_us()? {
            None => Ok(()),
            Some(Unknown { count, example }) => {
                Err(StoreError::NotAdopted { ledger: self.layout().db().join("db.sqlite"), count, example })
            }
        }
    }

    /// Tells the user, once for this state folder, that real Nix manages it too.
    ///
    /// Failing to find out is no reason to stop here: only deleting needs certainty.
    pub fn tell_of_real_nix(&self) -> Result<(), StoreError> {
        if ForeignLedger::find(&self.layout().db()).is_none() || self.read(|txn| Ok(txn.meta(TOLD)?))?.is_some() {
            return Ok(());
        }
        let Ok(Some(unknown)) = self.unknown_to_us() else { return Ok(()) };
        self.reporter().message(
            Level::Warn,
            format_args!(
                "'{}' is managed by real Nix, which has registered {} paths that Larder does not know; they can be \
                 taken over with 'larder adopt', and until then nothing is deleted",
                self.layout().state.display(),
                unknown.count
            ),
        );
        if let Ok(ledger) = self.ledger() {
            ledger.write(|txn| Ok::<(), StoreError>(txn.set_meta(TOLD, b"1")?))?;
        }
        Ok(())
    }
}
