//! Binary caches as the settings name them.

use std::ffi::OsStr;
use std::sync::Arc;

use larder_cache::client::ClientOptions;
use larder_cache::lookups::Lifetimes;
use larder_cache::uri::CacheUri;
use larder_cache::{Caches, Options};
use larder_core::report::{Level, Reporter};
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;

use crate::conf::Env;
use crate::remote::source::opener;

/// The client that the settings and the environment describe.
pub fn client_options(env: &Env, settings: &Settings) -> ClientOptions {
    ClientOptions::of(settings, |name| env.get_filled(name).map(OsStr::to_owned))
}

/// The URIs of caches, in the order in which they are named.
fn uris(settings: &Settings, reporter: &dyn Reporter) -> Vec<String> {
    let mut uris = Vec::new();
    if settings.use_binary_caches {
        uris.extend(settings.substituters.iter().cloned());
        for file in &settings.binary_caches_files {
            match std::fs::read_to_string(file) {
                Ok(text) => uris.extend(text.split_whitespace().map(str::to_owned)),
                Err(error) => reporter.message(Level::Warn, format_args!("cannot read '{file}': {error}")),
            }
        }
    }
    if settings.use_ssh_substituter {
        uris.extend(settings.ssh_substituter_hosts.iter().take(1).map(|host| format!("ssh://{host}")));
    }
    uris
}

/// How long answers of caches are good for.
pub fn lifetimes(settings: &Settings) -> Lifetimes {
    Lifetimes {
        positive_s: settings.narinfo_cache_positive_ttl.into(),
        negative_s: settings.narinfo_cache_negative_ttl.into(),
    }
}

/// The caches that paths may be fetched from. None is spoken to before it is needed.
pub fn caches(env: &Env, settings: &Settings, dir: &StoreDir, reporter: &Arc<dyn Reporter + Send + Sync>) -> Caches {
    let uris = uris(settings, &**reporter);
    let has_stores = uris.iter().any(|uri| !CacheUri::is_cache(uri));
    let options = Options {
        dir: dir.clone(),
        uris,
        client: client_options(env, settings),
        lifetimes: lifetimes(settings),
        memory: Some(env.cache_folder()),
        stores: has_stores.then(|| opener(env, settings, dir, reporter)),
    };
    Caches::new(options, Arc::clone(reporter))
}
