//! What must hold before a `.drv` file is registered as valid: its output paths are the ones
//! that follow from it, so that nothing can claim the outputs of something else.
//!
//! Source: formats, the end of section 5.2; `drv_parse.json`.

use std::borrow::Borrow;

use super::modulo::{Mask, Memo, Modulo, ModuloError, fill_deferred};
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
        // As a path: Nix reads it as one, so that doubled slashes do not matter.
        let value = drv.env.get(name.as_str().as_bytes());
        if value.and_then(|value| dir.parse(value).ok()).as_ref() != Some(&right) {
            let right = dir.full(&right);
            return Err(CheckError::Variable { drv: full(), variable: name.to_string(), right });
        }
    }
    Ok(())
}

/// Gives outputs that have no path yet the one that follows from the derivation, in its environment
/// too, as an evaluator would. `resolve` reads the derivations that it is made of.
///
/// Nothing changes above outputs whose paths are known only once they are built.
pub fn fill_output_paths<E, D>(
    memo: &mut Memo,
    dir: &StoreDir,
    drv: &mut Derivation,
    resolve: impl FnMut(&StorePath) -> Result<D, E>,
) -> Result<(), CheckError<ModuloError<E>>>
where
    E: std::error::Error + 'static,
    D: Borrow<Derivation>,
{
    // The hash counts the variables, though not their values.
    for (name, output) in &drv.outputs {
        if *output == Output::Deferred {
            drv.env.entry(name.as_str().into()).or_insert_with(|| "".into());
        }
    }
    let modulo = memo
        .modulo(dir, drv, Mask::On, resolve)
        .map_err(|source| CheckError::Modulo { drv: drv.name.to_string(), source })?;
    if !modulo.deferred {
        fill_deferred(dir, drv, &modulo.digest)
            .map_err(|source| CheckError::Name { drv: drv.name.to_string(), source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::arb;
    use crate::derivation::{name_of, parse};

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    type Graph = [(StorePath, Derivation)];

    fn run(graph: &Graph, path: &StorePath, drv: &Derivation) -> Result<(), CheckError<ModuloError<Infallible>>> {
        check(&dir(), path, drv, || {
            Memo::new().modulo(&dir(), drv, Mask::On, |path| {
                Ok(graph.iter().find(|(p, _)| p == path).map(|(_, drv)| drv).unwrap())
            })
        })
    }

    proptest! {
        /// What was made right is accepted; another path or another variable is not.
        #[test]
        fn s038_paths_are_recomputed(
            graph in arb::derivation::graph(dir(), 1..8),
            at in any::<Index>(),
            which in any::<Index>(),
            wrong in arb::paths::store_path(),
        ) {
            for (path, drv) in &graph {
                prop_assert!(run(&graph, path, drv).is_ok(), "{:?}", drv);
            }
            let (path, right) = at.get(&graph);
            let names: Vec<_> = right.outputs.keys().cloned().collect();
            let name = which.get(&names);
            let Some(true_path) = right.outputs[name].path() else { return Ok(()) };
            let (full, found, should) = (dir().full(path), dir().full(&wrong), dir().full(true_path));

            let mut drv = right.clone();
            drv.env.insert(name.as_str().into(), found.as_str().into());
            let message = run(&graph, path, &drv).unwrap_err().to_string();
            let expected =
                format!("derivation '{full}' has incorrect environment variable '{name}', should be '{should}'");
            prop_assert_eq!(message, expected);
            drv.env.insert(name.as_str().into(), should.replace('/', "//").into());
            prop_assert!(run(&graph, path, &drv).is_ok());
            // Without the variable it is another derivation, with other paths unless they are fixed.
            drv.env.remove(name.as_str().as_bytes());
            let message = run(&graph, path, &drv).unwrap_err().to_string();
            prop_assert!(message.starts_with(&format!("derivation '{full}' has incorrect ")), "{message}");

            let mut drv = right.clone();
            if let Some(Output::InputAddressed(path) | Output::Fixed { path, .. }) = drv.outputs.get_mut(name) {
                *path = wrong;
            }
            drv.env.insert(name.as_str().into(), found.as_str().into());
            let message = run(&graph, path, &drv).unwrap_err().to_string();
            prop_assert_eq!(message, format!("derivation '{full}' has incorrect output '{found}', should be '{should}'"));
        }
    }

    #[test]
    fn kinds_are_checked_first() {
        let path: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().unwrap();
        let drv = parse(&dir(), &name_of(&path).unwrap(), br#"Derive([],[],[],"s","b",[],[])"#).unwrap();
        let error = run(&[], &path, &drv).unwrap_err();
        assert!(matches!(error, CheckError::Kind { source: KindError::None, .. }), "{error}");
    }
}
