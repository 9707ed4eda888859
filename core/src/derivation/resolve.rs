//! Resolving: a derivation whose inputs have been built becomes one without input derivations.
//!
//! Placeholders of the inputs' outputs give way to the paths they were built to, and outputs
//! that were deferred become input-addressed. Source: modern, section 2.3; `modern.json`.

use std::collections::BTreeMap;

use rustc_hash::FxHashMap;

use super::modulo::{Mask, Memo, ModuloError, fill_deferred};
use super::placeholder::Placeholder;
use super::{Bytes, Derivation, NotDerivation, OutputName};
use crate::base32;
use crate::store_dir::StoreDir;
use crate::store_path::{NameError, StorePath};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError {
    #[error("output '{output}' of input '{drv}' missing, aborting the resolving")]
    Missing { drv: StorePath, output: OutputName },
    #[error("an input cannot be resolved")]
    Input { source: NotDerivation },
    #[error("the resolved derivation has no hash")]
    Modulo { source: ModuloError<std::convert::Infallible> },
    #[error("the resolved derivation has outputs without possible paths")]
    Name { source: NameError },
}

/// The basic derivation that is really built, where `built` gives the path of an output of an
/// input derivation.
///
/// It has the same name. Floating outputs and placeholders of the derivation's own outputs stay.
pub fn resolve(
    dir: &StoreDir,
    drv: &Derivation,
    built: impl Fn(&StorePath, &OutputName) -> Option<StorePath>,
) -> Result<Derivation, ResolveError> {
    let mut rewrites = Rewrites::default();
    let mut input_srcs = drv.input_srcs.clone();
    for (input, outputs) in &drv.input_drvs {
        for output in outputs {
            let missing = || ResolveError::Missing { drv: input.clone(), output: output.clone() };
            let path = built(input, output).ok_or_else(missing)?;
            let placeholder = Placeholder::upstream(input, output).map_err(|source| ResolveError::Input { source })?;
            rewrites.0.insert(placeholder.to_text().into_bytes(), dir.full(&path).into_bytes());
            input_srcs.insert(path);
        }
    }
    let mut resolved = Derivation {
        name: drv.name.clone(),
        outputs: drv.outputs.clone(),
        input_drvs: BTreeMap::new(),
        input_srcs,
        system: drv.system.clone(),
        builder: rewrites.apply(&drv.builder),
        args: drv.args.iter().map(|arg| rewrites.apply(arg)).collect(),
        env: drv.env.iter().map(|(key, value)| (rewrites.apply(key), rewrites.apply(value))).collect(),
    };
    let none = |_: &StorePath| -> Result<Derivation, std::convert::Infallible> {
        unreachable!("a resolved derivation has no input derivations")
    };
    let modulo =
        Memo::new().modulo(dir, &resolved, Mask::On, none).map_err(|source| ResolveError::Modulo { source })?;
    fill_deferred(dir, &mut resolved, &modulo.digest).map_err(|source| ResolveError::Name { source })?;
    Ok(resolved)
}

/// Texts of placeholders and what takes their place.
#[derive(Default)]
struct Rewrites(FxHashMap<Vec<u8>, Vec<u8>>);

impl Rewrites {
    /// Replaces each occurrence, in one pass: no placeholder overlaps another, since all are a
    /// slash and then none.
    fn apply(&self, bytes: &Bytes) -> Bytes {
        let mut out = Vec::with_capacity(bytes.len());
        let mut rest: &[u8] = bytes;
        while let Some(at) = memchr::memchr(b'/', rest) {
            let (before, from) = rest.split_at(at);
            out.extend_from_slice(before);
            let known = from.get(..Placeholder::LEN).filter(|text| text.get(1).is_some_and(|b| base32::is_digit(*b)));
            let (new, used) = match known.and_then(|text| self.0.get(text)) {
                Some(path) => (path.as_slice(), Placeholder::LEN),
                None => (&b"/"[..], 1),
            };
            out.extend_from_slice(new);
            rest = from.get(used..).unwrap_or_default();
        }
        out.extend_from_slice(rest);
        out.into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arb;
    use crate::derivation::{Kind, Output};

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    /// The outputs of input derivations that are used.
    fn uses(drv: &Derivation) -> Vec<(&StorePath, &OutputName)> {
        drv.input_drvs.iter().flat_map(|(path, names)| names.iter().map(move |name| (path, name))).collect()
    }

    proptest! {
        /// Every placeholder of an input is gone, and nothing else changes.
        #[test]
        fn one_pass_replaces_all(
            mut drv in arb::derivation::derivation(dir()),
            built in arb::paths::store_path(),
            pieces in proptest::collection::vec(arb::derivation::bytes(), 0..5),
        ) {
            let (mut with, mut without) = (Vec::new(), Vec::new());
            for (n, piece) in pieces.iter().enumerate() {
                with.extend_from_slice(piece);
                without.extend_from_slice(piece);
                if let Some((input, output)) = uses(&drv).get(n % uses(&drv).len().max(1)) {
                    let placeholder = Placeholder::upstream(input, output).unwrap().to_text();
                    with.extend_from_slice(placeholder.as_bytes());
                    without.extend_from_slice(dir().full(&built).as_bytes());
                }
            }
            drv.args.push(with.into());
            let resolved = resolve(&dir(), &drv, |_, _| Some(built.clone())).unwrap();
            let (last, others) = resolved.args.split_last().unwrap();
            prop_assert_eq!(last, &Bytes::from(without));
            prop_assert_eq!(others, &drv.args[..others.len()]);
            prop_assert!(resolved.input_drvs.is_empty());
            prop_assert_eq!(resolved.input_srcs.contains(&built), !uses(&drv).is_empty());
            if drv.kind() == Ok(Kind::Deferred) {
                prop_assert_eq!(resolved.kind(), Ok(Kind::InputAddressed));
                for (name, output) in &resolved.outputs {
                    let Output::InputAddressed(path) = output else { panic!("{output:?}") };
                    let value = resolved.binding(name.as_str().as_bytes()).unwrap();
                    prop_assert_eq!(value, &Bytes::from(dir().full(path)));
                }
            } else {
                prop_assert_eq!(&resolved.outputs, &drv.outputs);
                prop_assert_eq!(&resolved.env, &drv.env);
            }
            if let Some((input, output)) = uses(&drv).first() {
                let error = resolve(&dir(), &drv, |_, _| None).unwrap_err().to_string();
                prop_assert_eq!(error, format!("output '{output}' of input '{input}' missing, aborting the resolving"));
            }
        }
    }
}
