//! A cache that failed is left alone for a while: others may have what it should have.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use larder_core::report::{Level, Reporter, chain};

use crate::error::{CacheError, SharedError};

/// How long a cache that failed is passed over.
const LEFT_ALONE: Duration = Duration::from_mins(1);

/// When a cache last failed, and why.
#[derive(Debug, Default)]
pub(crate) struct Lapses(Mutex<Option<(Instant, Arc<str>)>>);

impl Lapses {
    /// Why the cache is passed over, if it is.
    pub(crate) fn disabled(&self, uri: &str) -> Option<CacheError> {
        let failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, why) = failed.as_ref().filter(|(at, _)| at.elapsed() < LEFT_ALONE)?;
        Some(CacheError::Disabled { uri: uri.to_owned(), source: SharedError(Arc::clone(why)) })
    }

    /// Notes an error, if it says something of the whole cache.
    pub(crate) fn note(&self, uri: &str, error: &CacheError, reporter: &dyn Reporter) {
        if !error.is_of_whole_cache() || matches!(error, CacheError::Disabled { .. }) {
            return;
        }
        let mut failed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.as_ref().is_none_or(|(at, _)| at.elapsed() >= LEFT_ALONE) {
            let seconds = LEFT_ALONE.as_secs();
            reporter.message(Level::Warn, format_args!("disabling binary cache '{uri}' for {seconds} seconds"));
        }
        *failed = Some((Instant::now(), chain(error).into()));
    }
}
