//! Linking equal files: of the whole store, or of a path that has just come in.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering};

use larder_core::report::{Level, Progress, Unit};
use larder_core::store_path::StorePath;
use larder_fs::optimise::{Optimiser, Preload, Saved};
use rayon::prelude::*;

use crate::error::StoreError;
use crate::local::LocalStore;

/// Paths that get their temporary roots at once.
const CHUNK: usize = 512;

impl LocalStore {
    /// Replaces equal files of all valid paths by hard links to one.
    ///
    /// What cannot be linked is told and counted ([`StoreError::NotLinked`], after all else).
    pub fn optimise(&self) -> Result<Saved, StoreError> {
        self.ledger()?;
        let paths = self.read(|txn| Ok(txn.all_paths()?))?;
        let real_store = &self.layout().real_store;
        let optimiser = Optimiser::new(self.store_fd()?, real_store, Preload::Yes, self.reporter())?;
        let failed = AtomicU64::new(0);
        self.reporter().progress(Progress::Begin {
            what: "linking equal files",
            total: Some(paths.len() as u64),
            unit: Unit::Paths,
        });
        for chunk in paths.chunks(CHUNK) {
            // First the root, then the question.
            self.add_temp_roots(chunk)?;
            let valid: Vec<StorePath> = self.valid_subset(&chunk.iter().cloned().collect())?.into_iter().collect();
            valid.par_iter().try_for_each(|path| {
                self.check_interrupt()?;
                self.reporter()
                    .message(Level::Talkative, format_args!("optimising path '{}'...", self.dir().display(path)));
                failed.fetch_add(optimiser.entry(OsStr::new(&path.to_string()))?, Ordering::Relaxed);
                self.reporter().progress(Progress::Advance(1));
                Ok::<_, StoreError>(())
            })?;
        }
        self.reporter().progress(Progress::End);
        match failed.into_inner() {
            0 => Ok(optimiser.saved()),
            count => Err(StoreError::NotLinked { count, saved: optimiser.saved() }),
        }
    }

    /// Links the files of one path to what is in `.links` (setting `auto-optimise-store`).
    ///
    /// It saves space and nothing depends on it, so a failure is only told.
    pub fn optimise_path(&self, path: &StorePath) {
        let linked = self.store_fd().and_then(|fd| {
            let real_store = &self.layout().real_store;
            let optimiser = Optimiser::new(fd, real_store, Preload::No, self.reporter())?;
            Ok(optimiser.entry(OsStr::new(&path.to_string()))?)
        });
        if let Err(error) = linked {
            let text = crate::error::chain(&error);
            self.reporter()
                .message(Level::Warn, format_args!("cannot link the files of '{}': {text}", self.dir().display(path)));
        }
    }
}
