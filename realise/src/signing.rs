//! The keys that sign what is built here.

use larder_core::path_info::PathInfo;
use larder_core::realisation::Realisation;
use larder_core::settings::Settings;
use larder_core::signature::SecretKey;
use larder_core::store_dir::StoreDir;
use larder_fs::file_error::FileError;

use crate::job::{Failure, FailureKind};

fn keys(settings: &Settings) -> impl Iterator<Item = Result<SecretKey, Failure>> {
    settings.secret_key_files.iter().map(|file| {
        let text =
            std::fs::read_to_string(file).map_err(|e| Failure::from(FileError::new("reading secret key", file, e)))?;
        SecretKey::parse(text.trim()).map_err(|e| Failure::of(FailureKind::Misc, &e))
    })
}

/// Signs a path with all keys of `secret-key-files`.
pub(crate) fn sign_path(settings: &Settings, dir: &StoreDir, info: &mut PathInfo) -> Result<(), Failure> {
    for key in keys(settings) {
        let signature = key?.sign_path(dir, info).map_err(|e| Failure::of(FailureKind::Misc, &e))?;
        info.signatures.insert(signature);
    }
    Ok(())
}

/// Signs a realisation with all of them.
pub(crate) fn sign_realisation(settings: &Settings, realisation: &mut Realisation) -> Result<(), Failure> {
    for key in keys(settings) {
        let signature = realisation.sign(&key?);
        realisation.signatures.insert(signature);
    }
    Ok(())
}
