//! What must hold before a `.drv` file is registered as valid: its output paths are the ones
//! that follow from it, so that nothing can claim the outputs of something else.
//!
//! Source: formats, the end of section 5.2; `drv_parse.json`.

use super::modulo::Modulo;
use super::{Derivation, Kind, KindError, Output};
use crate::store_dir::{MakePathError, StoreDir};
use crate::store_path::{NameError, StorePath};

/// Why a derivation must not become valid. Worded as Nix does.
///
/// `E` is the error of computing the hash, or of what that needs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError<E: std::error::Error + 'static> {
    #[error("derivation '{drv}' is not valid")]
    Kind { drv: String, source: KindError },
    #[error("derivation '{drv}' has incorrect output '{found}', should be '{right}'")]
    Output { drv: String, found: String, right: String },
    #[error("derivation '{drv}' has incorrect environment variable '{variable}', should be '{right}'")]
    Variable { drv: String, variable: String, right: String },
    #[error("cannot check the output paths of derivation '{drv}'")]
    Modulo { drv: String, source: E },
    #[error("an output of derivation '{drv}' has no possible path")]
    Name { drv: String, source: NameError },
    #[error("the output of derivation '{drv}' has no possible path")]
    MakePath { drv: String, source: MakePathError },
}

/// Checks the derivation at `path`.
///
/// `modulo` computes its hash (mask on) and is called only if there are input-addressed
/// outputs: so inputs of a fixed-output derivation need not be there. Whether the hash is
/// deferred does not matter, as in Nix.
pub fn check<E: std::error::Error + 'static>(
    dir: &StoreDir,
    path: &StorePath,
    drv: &Derivation,
    modulo: impl FnOnce() -> Result<Modulo, E>,
) -> Result<(), CheckError<E>> {
    let full = || dir.full(path);
    let kind = drv.kind().map_err(|source| CheckError::Kind { drv: full(), source })?;
    let masked = match kind {
        Kind::InputAddressed => Some(modulo().map_err(|source| CheckError::Modulo { drv: full(), source })?.digest),
        Kind::Fixed | Kind::Floating | Kind::Deferred | Kind::Impure => None,
    };
    for (name, output) in &drv.outputs {
        let (found, right) = match (output, &masked) {
            (Output::InputAddressed(found), Some(masked)) => {
                let right = dir.make_output_path(name.as_str(), masked, &drv.name);
                (found, right.map_err(|source| CheckError::Name { drv: full(), source })?)
            }
            // Right already if it was read from a `.drv` file, where the path is ignored.
            (Output::Fixed { path: found, address }, _) => match Output::fixed(dir, &drv.name, name, address.clone()) {
                Ok(Output::Fixed { path: right, .. }) => (found, right),
                Ok(_) => continue,
                Err(source) => return Err(CheckError::MakePath { drv: full(), source }),
            },
            _ => continue,
        };
        if *found != right {
            return Err(CheckError::Output { drv: full(), found: dir.full(found), right: dir.full(&right) });
        }
        let right = dir.full(&right);
        if drv.env.get(name.as_str().as_bytes()).is_none_or(|value| **value != *right.as_bytes()) {
            return Err(CheckError::Variable { drv: full(), variable: name.to_string(), right });
        }
    }
    Ok(())
}
