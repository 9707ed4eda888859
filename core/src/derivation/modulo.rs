//! The hash of a derivation "modulo" fixed outputs, and the output paths that follow.
//!
//! It is the hash of the text in which each input derivation is replaced by its own such hash;
//! that of a fixed output says what comes out and nothing of how. So two ways to fetch one file
//! lead to the same paths above them. Source: formats, sections 5.4 to 5.6; modern, section 2.2.

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};

use rustc_hash::{FxHashMap, FxHashSet};

pub use super::aterm::Mask;
use super::aterm::{Inputs, print_into};
use super::{Derivation, IMPURE, Kind, KindError, NotDerivation, Output, OutputName, name_of};
use crate::hash::Sha256Digest;
use crate::store_dir::StoreDir;
use crate::store_path::{NameError, StorePath};

/// The hash of a derivation modulo fixed outputs, the same for all of its outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Modulo {
    pub digest: Sha256Digest,
    /// Something it is made of has a path that is not known before it is built, so the digest
    /// names outputs (`sha256:DIGEST!out`) but gives no paths.
    pub deferred: bool,
}

/// Why there is no hash. `E` is the error of whoever fetches derivations.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModuloError<E: std::error::Error + 'static> {
    #[error("cannot read the derivation '{path}', which others are made of")]
    Resolve { path: StorePath, source: E },
    #[error("the input '{path}' is not a derivation")]
    NotDerivation { path: StorePath, source: NotDerivation },
    #[error("derivation '{path}' needs itself as an input")]
    Cycle { path: StorePath },
    #[error("derivation '{path}' has no output '{output}', which '{user}' uses")]
    NoOutput { path: StorePath, output: OutputName, user: String },
    #[error("derivation '{name}' is not valid")]
    Kind { name: String, source: KindError },
}

/// Remembers the hashes of derivations that are inputs of others.
///
/// Valid for one store directory, and as long as no path changes its contents: in practice for
/// the life of a store.
#[derive(Debug, Default, Clone)]
pub struct Memo {
    known: FxHashMap<StorePath, Known>,
}

#[derive(Debug, Clone)]
struct Known {
    modulo: Modulo,
    outputs: Box<[OutputName]>,
}

/// A derivation whose inputs are being hashed.
struct Frame<D> {
    path: StorePath,
    drv: D,
    todo: std::vec::IntoIter<StorePath>,
}

impl Memo {
    pub fn new() -> Self {
        Self::default()
    }

    /// How many derivations are remembered.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// The hash of `drv`. For its own output paths the mask is on; as an input of others, off.
    ///
    /// `resolve` gives the derivation at a path, once for each input and only for inputs that
    /// matter: none are below a fixed or an impure derivation.
    pub fn modulo<E, D>(
        &mut self,
        dir: &StoreDir,
        drv: &Derivation,
        mask: Mask,
        mut resolve: impl FnMut(&StorePath) -> Result<D, E>,
    ) -> Result<Modulo, ModuloError<E>>
    where
        E: std::error::Error + 'static,
        D: Borrow<Derivation>,
    {
        let mut buffer = Vec::new();
        for input in inputs_that_matter(drv)? {
            self.settle(dir, input, &mut buffer, &mut resolve)?;
        }
        self.with_known_inputs(dir, drv, mask, &mut buffer)
    }

    /// The hash of the derivation at `path`, as an input of others (mask off).
    pub fn modulo_at<E, D>(
        &mut self,
        dir: &StoreDir,
        path: &StorePath,
        mut resolve: impl FnMut(&StorePath) -> Result<D, E>,
    ) -> Result<Modulo, ModuloError<E>>
    where
        E: std::error::Error + 'static,
        D: Borrow<Derivation>,
    {
        self.settle(dir, path.clone(), &mut Vec::new(), &mut resolve)?;
        Ok(self.known.get(path).expect("settled just now").modulo)
    }

    /// Hashes `root` and, before it, all it needs: depth first, with a stack of its own, since
    /// a chain of derivations may be as long as someone cares to make it.
    fn settle<E, D>(
        &mut self,
        dir: &StoreDir,
        root: StorePath,
        buffer: &mut Vec<u8>,
        resolve: &mut impl FnMut(&StorePath) -> Result<D, E>,
    ) -> Result<(), ModuloError<E>>
    where
        E: std::error::Error + 'static,
        D: Borrow<Derivation>,
    {
        let mut stack: Vec<Frame<D>> = Vec::new();
        let mut open: FxHashSet<StorePath> = FxHashSet::default();
        let mut next = Some(root);
        loop {
            if let Some(path) = next.take()
                && !self.known.contains_key(&path)
            {
                if !open.insert(path.clone()) {
                    return Err(ModuloError::Cycle { path });
                }
                name_of(&path).map_err(|source| ModuloError::NotDerivation { path: path.clone(), source })?;
                let drv = resolve(&path).map_err(|source| ModuloError::Resolve { path: path.clone(), source })?;
                let todo = inputs_that_matter(drv.borrow())?.collect::<Vec<_>>().into_iter();
                stack.push(Frame { path, drv, todo });
            }
            let Some(frame) = stack.last_mut() else { return Ok(()) };
            next = frame.todo.next();
            if next.is_none()
                && let Some(Frame { path, drv, .. }) = stack.pop()
            {
                let drv = drv.borrow();
                let modulo = self.with_known_inputs(dir, drv, Mask::Off, buffer)?;
                let outputs = drv.outputs.keys().cloned().collect();
                open.remove(&path);
                self.known.insert(path, Known { modulo, outputs });
            }
        }
    }

    /// The hash of a derivation all of whose inputs are known.
    fn with_known_inputs<E: std::error::Error + 'static>(
        &self,
        dir: &StoreDir,
        drv: &Derivation,
        mask: Mask,
        buffer: &mut Vec<u8>,
    ) -> Result<Modulo, ModuloError<E>> {
        let kind = kind(drv)?;
        if let (Kind::Fixed, Some(output)) = (kind, drv.outputs.values().next()) {
            return Ok(Modulo { digest: fixed_digest(dir, output), deferred: false });
        }
        if kind == Kind::Impure {
            return Ok(Modulo { digest: Sha256Digest::of(IMPURE.as_bytes()), deferred: true });
        }
        // Outputs may have been deferred with more caution than was needed, so what counts is inputs.
        let mut deferred = kind == Kind::Floating;
        let mut digests: BTreeMap<Sha256Digest, BTreeSet<&OutputName>> = BTreeMap::new();
        for (path, names) in &drv.input_drvs {
            let Known { modulo, outputs } = self.known.get(path).expect("inputs are settled first");
            deferred |= modulo.deferred;
            for name in names {
                if outputs.binary_search(name).is_err() {
                    let (path, output) = (path.clone(), name.clone());
                    return Err(ModuloError::NoOutput { path, output, user: drv.name.to_string() });
                }
                digests.entry(modulo.digest).or_default().insert(name);
            }
        }
        buffer.clear();
        print_into(buffer, drv, dir, mask, &Inputs::Digests(&digests));
        Ok(Modulo { digest: Sha256Digest::of(buffer), deferred })
    }
}

fn kind<E: std::error::Error + 'static>(drv: &Derivation) -> Result<Kind, ModuloError<E>> {
    drv.kind().map_err(|source| ModuloError::Kind { name: drv.name.to_string(), source })
}

/// The inputs whose hashes go into that of `drv`.
fn inputs_that_matter<E: std::error::Error + 'static>(
    drv: &Derivation,
) -> Result<impl Iterator<Item = StorePath>, ModuloError<E>> {
    let count = match kind(drv)? {
        Kind::Fixed | Kind::Impure => 0,
        Kind::InputAddressed | Kind::Floating | Kind::Deferred => usize::MAX,
    };
    Ok(drv.input_drvs.keys().take(count).cloned())
}

/// What is known of a fixed output: method, hash and path.
fn fixed_digest(dir: &StoreDir, output: &Output) -> Sha256Digest {
    let (algorithm, hash) = output.hash_fields();
    let path = output.path().map(|path| dir.full(path)).unwrap_or_default();
    Sha256Digest::of(format!("fixed:out:{algorithm}:{hash}:{path}").as_bytes())
}

/// The paths that input-addressed outputs have by the hash of their derivation (mask on).
///
/// Fixed outputs know their paths themselves; floating ones have none.
pub fn output_paths(
    dir: &StoreDir,
    drv: &Derivation,
    masked: &Sha256Digest,
) -> Result<BTreeMap<OutputName, StorePath>, NameError> {
    let paths = drv.outputs.keys().map(|output| {
        let path = dir.make_output_path(output.as_str(), masked, &drv.name)?;
        Ok((output.clone(), path))
    });
    paths.collect()
}

/// Gives deferred outputs their paths, in the outputs and in the environment.
///
/// Nothing else changes. The derivation may have inputs, if `masked` is not deferred.
pub fn fill_deferred(dir: &StoreDir, drv: &mut Derivation, masked: &Sha256Digest) -> Result<(), NameError> {
    for (name, path) in output_paths(dir, drv, masked)? {
        if let Some(output @ Output::Deferred) = drv.outputs.get_mut(&name) {
            drv.env.insert(name.as_str().into(), dir.full(&path).into());
            *output = Output::InputAddressed(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;
    use crate::arb;
    use crate::content_address::{ContentAddress, Method};
    use crate::derivation::OutputMethod;
    use crate::hash::{Algorithm, Hash};
    use crate::hash_part::HashPart;
    use crate::store_path::Name;

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    fn path(name: &str) -> StorePath {
        StorePath::new(HashPart::from_bytes([7; 20]), Name::new(name).unwrap())
    }

    /// A derivation with one deferred output and these inputs.
    fn drv(name: &str, inputs: &[String]) -> Derivation {
        Derivation {
            name: Name::new(name).unwrap(),
            outputs: BTreeMap::from([(OutputName::out(), Output::Deferred)]),
            input_drvs: inputs.iter().map(|name| (path(name), BTreeSet::from([OutputName::out()]))).collect(),
            input_srcs: BTreeSet::new(),
            system: "s".into(),
            builder: "b".into(),
            args: Vec::new(),
            env: BTreeMap::new(),
        }
    }

    fn above(name: &str, input: &str) -> Derivation {
        drv(name, &[input.to_owned()])
    }

    fn fixed(mut drv: Derivation) -> Derivation {
        let address = ContentAddress::Fixed(Method::Flat, Hash::of(Algorithm::Md5, b"x"));
        let output = Output::fixed(&dir(), &drv.name, &OutputName::out(), address).unwrap();
        drv.outputs.insert(OutputName::out(), output);
        drv
    }

    #[derive(Debug, PartialEq, Eq, thiserror::Error)]
    #[error("no such derivation")]
    struct Absent;

    fn of(drvs: &[Derivation], top: &Derivation) -> Result<Modulo, ModuloError<Absent>> {
        Memo::new().modulo(&dir(), top, Mask::On, |path| {
            drvs.iter().find(|drv| format!("{}.drv", drv.name) == path.name().as_str()).ok_or(Absent)
        })
    }

    fn number(path: &StorePath) -> usize {
        path.name().as_str().strip_suffix(".drv").unwrap().parse().unwrap()
    }

    /// The stack is our own: this thread's has room for some hundred calls.
    #[test]
    fn a_chain_of_100k() {
        let length = 100_000;
        let resolve = |path: &StorePath| -> Result<Derivation, Infallible> {
            let below = number(path).checked_sub(1).map(|n| format!("{n}.drv"));
            Ok(drv(&number(path).to_string(), below.as_slice()))
        };
        let run = move || {
            let mut memo = Memo::new();
            let top = path(&format!("{}.drv", length - 1));
            let whole = memo.modulo_at(&dir(), &top, resolve).unwrap();
            assert_eq!(memo.len(), length);
            // Bottom up it is the same.
            let mut memo = Memo::new();
            for n in 0..length {
                memo.modulo_at(&dir(), &path(&format!("{n}.drv")), resolve).unwrap();
            }
            assert_eq!(memo.modulo_at(&dir(), &top, resolve).unwrap(), whole);
        };
        std::thread::Builder::new().stack_size(64 << 10).spawn(run).unwrap().join().unwrap();
    }

    /// Each derivation is asked for once, though there are 2^60 ways down.
    #[test]
    fn a_ladder() {
        let asked = Cell::new(0);
        let resolve = |path: &StorePath| -> Result<Derivation, Infallible> {
            asked.set(asked.get() + 1);
            let n = number(path);
            let below = if n < 2 { vec![] } else { [n / 2 * 2 - 2, n / 2 * 2 - 1].map(|n| format!("{n}.drv")).into() };
            Ok(drv(&n.to_string(), &below))
        };
        Memo::new().modulo_at(&dir(), &path("120.drv"), resolve).unwrap();
        assert_eq!(asked.get(), 121);
    }

    #[test]
    fn cycles() {
        let cycle = |drvs: &[Derivation], top: &Derivation| match of(drvs, top) {
            Err(ModuloError::Cycle { path }) => path.name().to_string(),
            other => panic!("{other:?}"),
        };
        let itself = above("a", "a.drv");
        assert_eq!(cycle(std::slice::from_ref(&itself), &itself), "a.drv");
        let three = [above("a", "b.drv"), above("b", "c.drv"), above("c", "a.drv")];
        assert_eq!(cycle(&three, &three[0]), "b.drv");
        assert_eq!(cycle(&three, &above("top", "b.drv")), "b.drv");
        // One below a fixed output does not matter: nobody looks there.
        let below = [fixed(above("f", "a.drv")), above("a", "f.drv")];
        assert!(of(&below, &below[0]).is_ok() && of(&below, &below[1]).is_ok());
    }

    #[test]
    fn what_may_be_wrong() {
        let good = drv("good", &[]);
        let base = |name: &str| path(name).to_string();
        for (top, message) in [
            (
                above("t", "gone.drv"),
                format!("cannot read the derivation '{}', which others are made of", base("gone.drv")),
            ),
            (above("t", "good"), format!("the input '{}' is not a derivation", base("good"))),
        ] {
            assert_eq!(of(std::slice::from_ref(&good), &top).unwrap_err().to_string(), message);
        }
        let mut top = above("t", "good.drv");
        top.input_drvs.values_mut().for_each(|names| *names = BTreeSet::from([OutputName::new("dev").unwrap()]));
        assert!(matches!(of(&[good], &top), Err(ModuloError::NoOutput { output, .. }) if output.as_str() == "dev"));
        top.outputs.clear();
        assert!(matches!(of(&[], &top), Err(ModuloError::Kind { source: KindError::None, .. })));
    }

    #[test]
    fn impure_is_a_constant_and_spreads() {
        let mut impure = above("i", "gone.drv");
        let output = Output::Impure { method: OutputMethod::RECURSIVE, algorithm: Algorithm::Sha256 };
        impure.outputs.insert(OutputName::out(), output);
        let modulo = of(&[], &impure).unwrap();
        assert!(modulo.digest.to_hex().starts_with("ddffc267") && modulo.deferred);
        assert!(of(std::slice::from_ref(&impure), &above("up", "i.drv")).unwrap().deferred);
        assert!(!of(&[impure], &fixed(above("f", "i.drv"))).unwrap().deferred);
    }

    #[test]
    fn deferred_is_what_is_above_floating() {
        let mut floating = drv("f", &[]);
        let output = Output::Floating { method: OutputMethod::RECURSIVE, algorithm: Algorithm::Sha256 };
        floating.outputs.insert(OutputName::out(), output);
        let drvs =
            [floating, above("a", "f.drv"), above("b", "a.drv"), fixed(above("c", "b.drv")), above("d", "c.drv")];
        let flags = drvs.each_ref().map(|drv| of(&drvs, drv).unwrap().deferred);
        assert_eq!(flags, [true, true, true, false, false]);
    }

    proptest! {
        /// In whatever order derivations are asked for, and whatever is known before.
        #[test]
        fn order_does_not_matter(
            (graph, order) in arb::derivation::graph(dir(), 1..12)
                .prop_flat_map(|g| (Just(g.clone()), Just(g).prop_shuffle()))
        ) {
            let find = |path: &StorePath| -> Result<&Derivation, Infallible> {
                Ok(graph.iter().find(|(p, _)| p == path).map(|(_, drv)| drv).unwrap())
            };
            let mut memo = Memo::new();
            for (path, drv) in &order {
                for mask in [Mask::On, Mask::Off] {
                    let alone = Memo::new().modulo(&dir(), drv, mask, find).unwrap();
                    prop_assert_eq!(memo.modulo(&dir(), drv, mask, find).unwrap(), alone);
                    if mask == Mask::Off {
                        prop_assert_eq!(memo.modulo_at(&dir(), path, find).unwrap(), alone);
                    }
                }
            }
        }

        /// How a fixed output is fetched does not show above it.
        #[test]
        fn fixed_outputs_hide_their_recipe(note in arb::derivation::bytes()) {
            let top = above("top", "f.drv");
            let mut other = fixed(above("f", "gone.drv"));
            other.args.push(note);
            prop_assert_eq!(of(&[fixed(drv("f", &[]))], &top).unwrap(), of(&[other], &top).unwrap());
        }
    }
}
