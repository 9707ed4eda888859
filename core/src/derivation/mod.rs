//! Derivations: what is built, from what, how, and where the results go.
//!
//! - [`aterm`]: the text of a `.drv` file, read and written.
//! - [`modulo`]: the hash of a derivation that leaves out how fixed outputs came about, and the
//!   output paths that follow from it.
//! - [`check`]: what must hold before a `.drv` file becomes valid.
//! - [`resolve`]: a derivation with its inputs replaced by what they were built to.
//! - [`json`]: the two shapes other tools read and write.
//! - [`options`]: attributes that steer a build, and the environment as shell text.
//!
//! Source: formats, section 5; modern, sections 2 and 3; `derivations.json`, `drv_parse.json`,
//! `modern.json`.

pub mod aterm;
mod bytes;
pub mod check;
pub mod json;
pub mod modulo;
pub mod options;
pub mod placeholder;
pub mod resolve;

use std::borrow::Borrow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

pub use self::aterm::{DerivationError, parse};
pub use self::bytes::Bytes;
use crate::content_address::{ContentAddress, Method};
use crate::hash::{Algorithm, Encoding, Sha256Digest};
use crate::store_dir::{MakePathError, References, StoreDir};
use crate::store_path::{MAX_NAME_LEN, Name, NameError, StorePath};

/// The suffix of the name of a derivation's store path.
pub const DRV_SUFFIX: &str = ".drv";

/// The name of an output, usually `out`: characters and length as of a store object's name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OutputName(Name);

impl OutputName {
    pub fn new(text: &str) -> Result<Self, NameError> {
        Name::new(text).map(Self)
    }

    /// `out`, the output that adds nothing to the name of its path.
    pub fn out() -> Self {
        Self(Name::new("out").expect("it is a name"))
    }

    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

/// Compares and hashes as text does, so that a map is searched by text.
impl Borrow<str> for OutputName {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

impl FromStr for OutputName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl fmt::Display for OutputName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for OutputName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// How the contents of an output become the bytes that are hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OutputMethod {
    /// As any other content-addressed object.
    Fixed(Method),
    /// As a `.drv` file: a text whose path depends on its references (2.26).
    Text,
}

impl OutputMethod {
    pub const FLAT: Self = Self::Fixed(Method::Flat);
    pub const RECURSIVE: Self = Self::Fixed(Method::Recursive);

    /// The prefix before the algorithm: nothing, `r:`, `git:` or `text:`.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Fixed(method) => method.prefix(),
            Self::Text => "text:",
        }
    }

    /// Splits `[r:|git:|text:]rest`.
    pub fn split_prefix(text: &str) -> (Self, &str) {
        if let Some(rest) = text.strip_prefix("text:") {
            return (Self::Text, rest);
        }
        let (method, rest) = Method::split_prefix(text);
        (Self::Fixed(method), rest)
    }

    /// May it be used with this algorithm? Text needs SHA-256 and git SHA-1.
    pub fn allows(self, algorithm: Algorithm) -> bool {
        match self {
            Self::Fixed(Method::Flat | Method::Recursive) => true,
            Self::Fixed(Method::Git) => algorithm == Algorithm::Sha1,
            Self::Text => algorithm == Algorithm::Sha256,
        }
    }

    /// The method of a content address.
    pub const fn of(address: &ContentAddress) -> Self {
        match address {
            ContentAddress::Text(_) => Self::Text,
            ContentAddress::Fixed(method, _) => Self::Fixed(*method),
        }
    }
}

/// An output: how its path is known, or becomes known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// The path follows from the derivation.
    InputAddressed(StorePath),
    /// The contents are known beforehand, and the path follows from their hash alone.
    ///
    /// `path` is always the computed one: make it with [`Output::fixed`].
    Fixed { address: ContentAddress, path: StorePath },
    /// The path follows from the contents, once they are built (`ca-derivations`).
    Floating { method: OutputMethod, algorithm: Algorithm },
    /// As input-addressed, but above a floating output, so not known yet.
    Deferred,
    /// As floating, and built anew for each run (`impure-derivations`).
    Impure { method: OutputMethod, algorithm: Algorithm },
}

impl Output {
    /// A fixed output of the derivation `drv_name`, its path computed.
    pub fn fixed(
        dir: &StoreDir,
        drv_name: &Name,
        output: &OutputName,
        address: ContentAddress,
    ) -> Result<Self, MakePathError> {
        let name = drv_name
            .for_output(output.as_str())
            .map_err(|source| MakePathError::Name { name: placeholder::output_path_name(drv_name, output), source })?;
        let path = dir.make_content_path(&name, &address, &References::default())?;
        Ok(Self::Fixed { address, path })
    }

    /// The path, where it does not depend on what is built.
    pub const fn path(&self) -> Option<&StorePath> {
        match self {
            Self::InputAddressed(path) | Self::Fixed { path, .. } => Some(path),
            Self::Floating { .. } | Self::Deferred | Self::Impure { .. } => None,
        }
    }

    /// `[r:|git:|text:]ALGORITHM` and the hash as they stand in a `.drv` file.
    pub fn hash_fields(&self) -> (String, String) {
        let algo = |method: OutputMethod, algorithm: Algorithm| format!("{}{algorithm}", method.prefix());
        match self {
            Self::InputAddressed(_) | Self::Deferred => (String::new(), String::new()),
            Self::Fixed { address, .. } => {
                let hash = address_hash(address);
                (algo(OutputMethod::of(address), hash.algorithm()), hash.encode(Encoding::Base16))
            }
            Self::Floating { method, algorithm } => (algo(*method, *algorithm), String::new()),
            Self::Impure { method, algorithm } => (algo(*method, *algorithm), IMPURE.to_owned()),
        }
    }
}

/// What stands in place of the hash of an impure output.
const IMPURE: &str = "impure";

fn address_hash(address: &ContentAddress) -> crate::hash::Hash {
    match address {
        ContentAddress::Text(digest) => digest.to_hash(),
        ContentAddress::Fixed(_, hash) => *hash,
    }
}

/// A derivation, as its `.drv` file describes it.
///
/// Nothing is promised about how the parts fit together: see [`Derivation::kind`] and
/// [`check::check`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Derivation {
    /// The name of the `.drv` path without its suffix.
    pub name: Name,
    pub outputs: BTreeMap<OutputName, Output>,
    /// Derivations to build first, and which outputs of each are used.
    pub input_drvs: BTreeMap<StorePath, BTreeSet<OutputName>>,
    /// Other store objects that are used.
    pub input_srcs: BTreeSet<StorePath>,
    /// Such as `x86_64-linux`. Written without escapes, so never with `"` or `\`.
    pub system: String,
    pub builder: Bytes,
    pub args: Vec<Bytes>,
    pub env: BTreeMap<Bytes, Bytes>,
}

/// What all outputs of a derivation are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    InputAddressed,
    /// One output, `out`.
    Fixed,
    /// One algorithm for all; methods may differ.
    Floating,
    Deferred,
    Impure,
}

impl Kind {
    /// Are the output paths written in the derivation?
    pub const fn has_paths(self) -> bool {
        matches!(self, Self::InputAddressed | Self::Fixed)
    }
}

/// Outputs that do not go together. Worded as Nix 2.8 and 2.26 do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KindError {
    #[error("must have at least one output")]
    None,
    #[error("can't mix derivation output types")]
    Mixed,
    #[error("only one fixed output is allowed for now")]
    ManyFixed,
    #[error("single fixed output must be named \"out\"")]
    FixedName,
    #[error("all floating outputs must use the same hash type")]
    Algorithms,
}

/// A path that is not one of a derivation.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("path '{path}' is not the path of a derivation")]
pub struct NotDerivation {
    pub path: StorePath,
}

/// The name of the derivation at a path: the path's name without `.drv`.
pub fn name_of(path: &StorePath) -> Result<Name, NotDerivation> {
    let name = path.name().as_str().strip_suffix(DRV_SUFFIX).and_then(|name| Name::new(name).ok());
    name.ok_or_else(|| NotDerivation { path: path.clone() })
}

/// The path of the `.drv` file of a derivation with this name, text and references.
///
/// Errors: the name with its suffix is too long (more than 207 characters without).
/// Source: formats, section 5.3.
pub fn drv_path(
    dir: &StoreDir,
    name: &Name,
    text: &[u8],
    references: BTreeSet<StorePath>,
) -> Result<StorePath, MakePathError> {
    let file_name = format!("{name}{DRV_SUFFIX}");
    let file_name = Name::new(&file_name).map_err(|source| MakePathError::Name { name: file_name, source })?;
    let address = ContentAddress::Text(Sha256Digest::of(text));
    dir.make_content_path(&file_name, &address, &References { others: references, to_self: false })
}

impl Derivation {
    /// What its outputs are; all are of one kind.
    pub fn kind(&self) -> Result<Kind, KindError> {
        let mut kinds = self.outputs.values().map(|output| match output {
            Output::InputAddressed(_) => Kind::InputAddressed,
            Output::Fixed { .. } => Kind::Fixed,
            Output::Floating { .. } => Kind::Floating,
            Output::Deferred => Kind::Deferred,
            Output::Impure { .. } => Kind::Impure,
        });
        let kind = kinds.next().ok_or(KindError::None)?;
        if kinds.any(|other| other != kind) {
            return Err(KindError::Mixed);
        }
        match kind {
            Kind::Fixed if self.outputs.len() > 1 => return Err(KindError::ManyFixed),
            Kind::Fixed if self.outputs.keys().any(|name| name.as_str() != "out") => return Err(KindError::FixedName),
            Kind::Floating => {
                let mut algorithms = self.outputs.values().filter_map(|output| match output {
                    Output::Floating { algorithm, .. } => Some(algorithm),
                    _ => None,
                });
                let first = algorithms.next();
                if algorithms.any(|other| Some(other) != first) {
                    return Err(KindError::Algorithms);
                }
            }
            _ => {}
        }
        Ok(kind)
    }

    /// The paths of its outputs where they are known without building.
    pub fn output_paths(&self) -> impl Iterator<Item = (&OutputName, Option<&StorePath>)> {
        self.outputs.iter().map(|(name, output)| (name, output.path()))
    }

    /// Is there an output of this name? Any bytes may be asked for.
    pub fn has_output(&self, name: &[u8]) -> bool {
        name.len() <= MAX_NAME_LEN && std::str::from_utf8(name).is_ok_and(|name| self.outputs.contains_key(name))
    }

    /// The value of a variable in its environment: what `nix-store --query --binding` prints.
    pub fn binding(&self, name: &[u8]) -> Option<&Bytes> {
        self.env.get(name)
    }

    /// What the `.drv` file refers to: inputs of both sorts.
    pub fn references(&self) -> BTreeSet<StorePath> {
        self.input_srcs.iter().chain(self.input_drvs.keys()).cloned().collect()
    }

    /// The text of the `.drv` file.
    pub fn to_aterm(&self, dir: &StoreDir) -> Vec<u8> {
        aterm::print(self, dir)
    }

    /// The path of the `.drv` file with the text that [`Derivation::to_aterm`] gives.
    pub fn path(&self, dir: &StoreDir) -> Result<StorePath, MakePathError> {
        drv_path(dir, &self.name, &self.to_aterm(dir), self.references())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drv(outputs: &[(&str, Output)]) -> Derivation {
        Derivation {
            name: Name::new("x").unwrap(),
            outputs: outputs.iter().map(|(n, o)| (OutputName::new(n).unwrap(), o.clone())).collect(),
            input_drvs: BTreeMap::new(),
            input_srcs: BTreeSet::new(),
            system: "s".into(),
            builder: "b".into(),
            args: Vec::new(),
            env: BTreeMap::new(),
        }
    }

    #[test]
    fn kinds() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let recursive = |algorithm| Output::Floating { method: OutputMethod::RECURSIVE, algorithm };
        let flat = Output::Floating { method: OutputMethod::FLAT, algorithm: Algorithm::Sha256 };
        let impure = Output::Impure { method: OutputMethod::RECURSIVE, algorithm: Algorithm::Sha256 };
        let address = ContentAddress::Text(Sha256Digest::of(b""));
        let fixed = Output::fixed(&dir, &Name::new("x").unwrap(), &OutputName::out(), address).unwrap();
        let path = fixed.path().unwrap().clone();
        for (outputs, expected) in [
            (vec![], Err(KindError::None)),
            (vec![("a", Output::Deferred), ("b", Output::Deferred)], Ok(Kind::Deferred)),
            (vec![("a", Output::Deferred), ("b", impure.clone())], Err(KindError::Mixed)),
            (vec![("a", impure.clone()), ("b", impure)], Ok(Kind::Impure)),
            (vec![("out", fixed.clone())], Ok(Kind::Fixed)),
            (vec![("a", fixed.clone())], Err(KindError::FixedName)),
            (vec![("a", fixed.clone()), ("out", fixed)], Err(KindError::ManyFixed)),
            (vec![("a", recursive(Algorithm::Sha256)), ("b", flat)], Ok(Kind::Floating)),
            (vec![("a", recursive(Algorithm::Sha256)), ("b", recursive(Algorithm::Sha1))], Err(KindError::Algorithms)),
            (vec![("a", Output::InputAddressed(path))], Ok(Kind::InputAddressed)),
        ] {
            assert_eq!(drv(&outputs).kind(), expected, "{outputs:?}");
        }
    }

    #[test]
    fn names_of_paths() {
        let hash = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c";
        for (base, name) in [("a.drv", Some("a")), ("a.drv.drv", Some("a.drv")), (".drv", None), ("a", None)] {
            let path: StorePath = format!("{hash}-{base}").parse().unwrap();
            assert_eq!(name_of(&path).ok().map(|n| n.to_string()).as_deref(), name, "{base}");
        }
    }
}
