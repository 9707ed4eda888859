//! What a store can do, whoever keeps it: the traits that servers and clients share.
//!
//! No implementation is here. [`ReadStore`] answers questions; [`Store`] also takes things in,
//! builds and collects. Bytes of objects go through `Read` and `Write`, so that nothing is held
//! in memory whole. Nothing is said about users: whoever calls has decided that it is allowed.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::path::Path;

use crate::content_address::{ContentAddress, Method};
use crate::derivation::{Derivation, OutputName};
use crate::hash::Algorithm;
use crate::hash_part::HashPart;
use crate::path_info::PathInfo;
use crate::realisation::{DrvOutput, Realisation};
use crate::signature::Signature;
use crate::store_dir::StoreDir;
use crate::store_path::{Name, NameError, StorePath, StorePathError};

/// What an error of a store means to whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Anything without a meaning of its own.
    Other,
    /// A path that had to be valid is not.
    NotValid,
    /// The rules do not allow it to this user.
    Refused,
    /// This store cannot do that at all.
    Unsupported,
    /// Exit statuses of builds, bits together: 100 and what is added to it.
    BuildFailed { status: u8 },
    /// The user, or the client that waited, wants no more.
    Interrupted,
    /// Not enough memory, in the process or by its own limits.
    OutOfMemory,
}

/// An error of any store: what it means, and the error itself, whose text it has.
#[derive(Debug)]
pub struct StoreError {
    pub kind: ErrorKind,
    source: Box<dyn Error + Send + Sync>,
}

impl StoreError {
    pub fn new(kind: ErrorKind, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { kind, source: source.into() }
    }

    /// The error for a path that ought to be valid.
    pub fn not_valid(dir: &StoreDir, path: &StorePath) -> Self {
        Self::new(ErrorKind::NotValid, format!("path '{}' is not valid", dir.display(path)))
    }

    /// The error for what a store cannot do: `cannot ...`.
    pub fn unsupported(what: &str) -> Self {
        Self::new(ErrorKind::Unsupported, what)
    }

    /// The exit status of a command that ends with this error.
    pub const fn status(&self) -> u8 {
        match self.kind {
            ErrorKind::BuildFailed { status } => status,
            _ => 1,
        }
    }

    /// The error that this one stands for.
    pub fn inner(&self) -> &(dyn Error + Send + Sync + 'static) {
        &*self.source
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.source, f)
    }
}

impl Error for StoreError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.source()
    }
}

/// Failures of the streams that a store reads from or writes to.
impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        let kind = match error.kind() {
            io::ErrorKind::OutOfMemory => ErrorKind::OutOfMemory,
            _ => ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Which outputs of a derivation are meant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outputs {
    All,
    Named(BTreeSet<OutputName>),
}

/// Something to be made present: a path as it is, or outputs of a derivation.
///
/// Text: `PATH`, `DRV!out,dev` or `DRV!*`. Source: protocols, section 2.5.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DerivedPath {
    /// To be fetched if it is not there; of a derivation, the `.drv` file itself.
    Opaque(StorePath),
    Built {
        drv: StorePath,
        outputs: Outputs,
    },
}

/// A text that names nothing to be built or fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DerivedPathError {
    #[error(transparent)]
    Path(#[from] StorePathError),
    #[error("'{text}' names no output of a derivation")]
    Output { text: String, source: NameError },
    #[error("'{text}' asks for outputs, and its path is not that of a derivation")]
    NotDerivation { text: String },
    #[error("'{text}' names outputs of a derivation that is itself to be built, which is not supported")]
    Dynamic { text: String },
}

impl DerivedPath {
    pub const fn path(&self) -> &StorePath {
        match self {
            Self::Opaque(path) | Self::Built { drv: path, .. } => path,
        }
    }

    /// Parses the text; `bare_means_all` is the rule of old, by which `DRV` means `DRV!*`.
    pub fn parse(dir: &StoreDir, text: &[u8], bare_means_all: bool) -> Result<Self, DerivedPathError> {
        let shown = || String::from_utf8_lossy(text).into_owned();
        let Some(at) = memchr::memrchr(b'!', text) else {
            let path = dir.parse(text)?;
            return Ok(if bare_means_all && path.is_derivation() {
                Self::Built { drv: path, outputs: Outputs::All }
            } else {
                Self::Opaque(path)
            });
        };
        let (path, outputs) = text.split_at(at);
        let outputs = outputs.strip_prefix(b"!").unwrap_or_default();
        if path.contains(&b'!') {
            return Err(DerivedPathError::Dynamic { text: shown() });
        }
        let drv = dir.parse(path)?;
        if !drv.is_derivation() {
            return Err(DerivedPathError::NotDerivation { text: shown() });
        }
        let outputs = match outputs {
            b"*" => Outputs::All,
            names => Outputs::Named(
                names
                    .split(|b| *b == b',')
                    .map(|name| {
                        OutputName::new(&String::from_utf8_lossy(name))
                            .map_err(|source| DerivedPathError::Output { text: shown(), source })
                    })
                    .collect::<Result<_, _>>()?,
            ),
        };
        Ok(Self::Built { drv, outputs })
    }

    /// The text; `bare_means_all` writes all outputs as the bare path.
    pub fn to_text(&self, dir: &StoreDir, bare_means_all: bool) -> String {
        match self {
            Self::Opaque(path) => dir.full(path),
            Self::Built { drv, outputs: Outputs::All } if bare_means_all => dir.full(drv),
            Self::Built { drv, outputs: Outputs::All } => format!("{}!*", dir.display(drv)),
            Self::Built { drv, outputs: Outputs::Named(names) } => {
                let names: Vec<&str> = names.iter().map(OutputName::as_str).collect();
                format!("{}!{}", dir.display(drv), names.join(","))
            }
        }
    }
}

/// Why a build is done at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BuildMode {
    /// Something is missing.
    #[default]
    Normal,
    /// What is there may be damaged.
    Repair,
    /// Is what is there what a build makes?
    Check,
}

/// How a build ended. The numbers are those of the protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BuildStatus {
    Built = 0,
    Substituted = 1,
    AlreadyValid = 2,
    PermanentFailure = 3,
    InputRejected = 4,
    OutputRejected = 5,
    TransientFailure = 6,
    CachedFailure = 7,
    TimedOut = 8,
    #[default]
    MiscFailure = 9,
    DependencyFailed = 10,
    LogLimitExceeded = 11,
    NotDeterministic = 12,
    ResolvesToAlreadyValid = 13,
    NoSubstituters = 14,
}

impl BuildStatus {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 15] = [
        Self::Built,
        Self::Substituted,
        Self::AlreadyValid,
        Self::PermanentFailure,
        Self::InputRejected,
        Self::OutputRejected,
        Self::TransientFailure,
        Self::CachedFailure,
        Self::TimedOut,
        Self::MiscFailure,
        Self::DependencyFailed,
        Self::LogLimitExceeded,
        Self::NotDeterministic,
        Self::ResolvesToAlreadyValid,
        Self::NoSubstituters,
    ];

    pub const fn is_success(self) -> bool {
        matches!(self, Self::Built | Self::Substituted | Self::AlreadyValid | Self::ResolvesToAlreadyValid)
    }
}

/// What came of building one derivation, or of fetching one path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BuildResult {
    pub status: BuildStatus,
    /// Empty after success; without `error: `.
    pub error: String,
    pub times_built: u64,
    pub is_non_deterministic: bool,
    /// Seconds since 1970; 0 where nothing was built.
    pub start_time_s: u64,
    pub stop_time_s: u64,
    pub cpu_user_us: Option<i64>,
    pub cpu_system_us: Option<i64>,
    pub built_outputs: BTreeMap<DrvOutput, Realisation>,
}

/// What there is to do for some targets.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Missing {
    pub will_build: BTreeSet<StorePath>,
    pub will_substitute: BTreeSet<StorePath>,
    /// Neither valid nor to be had.
    pub unknown: BTreeSet<StorePath>,
    pub download_size_bytes: u64,
    pub nar_size_bytes: u64,
}

/// What a substituter says of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Substitutable {
    pub path: StorePath,
    pub deriver: Option<StorePath>,
    pub references: BTreeSet<StorePath>,
    pub download_size_bytes: u64,
    pub nar_size_bytes: u64,
}

/// What a collector is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Collect {
    ListLive,
    ListDead,
    DeleteDead,
    /// Only these, and only if nothing else needs them.
    DeleteSpecific(BTreeSet<StorePath>),
}

/// What a collector has done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Collected {
    /// Full paths; of a deletion, junk of the store directory as well.
    pub paths: BTreeSet<Vec<u8>>,
    pub bytes_freed: u64,
}

/// A link, a file or a process that keeps a path alive.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RootLink {
    /// The path of the link, or `{temp:PID}` and the like.
    pub link: Vec<u8>,
    pub path: StorePath,
    /// Does it tell what other users' programs do? Then it is not for all to know.
    pub is_private: bool,
}

/// How contents become an address: `text:sha256`, `fixed:ALGO`, `fixed:r:ALGO`, `fixed:git:sha1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ContentMethod {
    Text,
    Fixed(Method, Algorithm),
}

/// An object whose path follows from its contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewContent {
    pub name: Name,
    pub method: ContentMethod,
    pub references: BTreeSet<StorePath>,
    /// Is what comes a NAR, also where the hash is one of a flat file?
    pub is_nar: bool,
    /// Replace what is there.
    pub repair: bool,
}

/// How objects with known records come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AddOptions {
    /// Replace what is there.
    pub repair: bool,
    /// Refuse what is neither signed by a trusted key nor content-addressed.
    pub check_signatures: bool,
}

/// Objects that come one after another: first a record, then its NAR.
pub trait NarSource: Read {
    /// The record of the next object, whose NAR is then read up to its end; `None` when there is
    /// no further one. What is left of the NAR before is skipped.
    fn next_object(&mut self) -> Result<Option<PathInfo>, StoreError>;
}

/// A store that can be asked.
pub trait ReadStore {
    /// What its paths are written with.
    fn dir(&self) -> &StoreDir;

    /// The record of a path, if it is valid.
    fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, StoreError>;

    fn is_valid(&self, path: &StorePath) -> Result<bool, StoreError> {
        Ok(self.info(path)?.is_some())
    }

    /// The records of many paths, in their order.
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>, StoreError> {
        paths.iter().map(|path| self.info(path)).collect()
    }

    /// The valid ones among some paths.
    fn valid_subset(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, StoreError> {
        let mut valid = BTreeSet::new();
        for path in paths {
            if self.is_valid(path)? {
                valid.insert(path.clone());
            }
        }
        Ok(valid)
    }

    fn all_paths(&self) -> Result<BTreeSet<StorePath>, StoreError>;

    /// Valid paths that refer to one; none if that is not valid.
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError>;

    /// Valid derivations with this output.
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError>;

    fn by_hash_part(&self, hash_part: HashPart) -> Result<Option<StorePath>, StoreError>;

    /// The record of the valid path with a hash part.
    fn info_by_hash_part(&self, hash_part: HashPart) -> Result<Option<PathInfo>, StoreError> {
        self.by_hash_part(hash_part)?.map_or(Ok(None), |path| self.info(&path))
    }

    /// Outputs of a valid derivation, with their paths where these are known.
    fn derivation_outputs(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>, StoreError>;

    /// The same of several, in their order.
    fn derivations_outputs(
        &self,
        drvs: &[&StorePath],
    ) -> Result<Vec<BTreeMap<OutputName, Option<StorePath>>>, StoreError> {
        drvs.iter().map(|drv| self.derivation_outputs(drv)).collect()
    }

    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, StoreError>;

    /// The paths and all they refer to, directly or not; with `include_outputs` also the outputs
    /// of derivations among them. All must be valid.
    fn closure(&self, paths: &BTreeSet<StorePath>, include_outputs: bool) -> Result<BTreeSet<StorePath>, StoreError> {
        let mut closure = paths.clone();
        let mut left: Vec<StorePath> = paths.iter().cloned().collect();
        while let Some(path) = left.pop() {
            let info = self.info(&path)?.ok_or_else(|| StoreError::not_valid(self.dir(), &path))?;
            let mut near = info.references;
            if include_outputs && path.is_derivation() {
                let outputs: BTreeSet<StorePath> = self.derivation_outputs(&path)?.into_values().flatten().collect();
                near.extend(self.valid_subset(&outputs)?);
            }
            left.extend(near.into_iter().filter(|path| closure.insert(path.clone())));
        }
        Ok(closure)
    }

    /// The closure in the order in which listings have it: references before referrers, otherwise by
    /// name. `None` from a store that has no shorter way to it than a question for each path.
    fn listed_closure(
        &self,
        _paths: &BTreeSet<StorePath>,
        _include_outputs: bool,
    ) -> Result<Option<Vec<StorePath>>, StoreError> {
        Ok(None)
    }

    /// Some valid paths, references before referrers.
    fn sorted(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, StoreError>;

    /// Writes the NAR of a valid path; what is written is checked against the record.
    fn nar(&self, path: &StorePath, out: &mut dyn Write) -> Result<(), StoreError>;
}

/// A store that can be changed.
pub trait Store: ReadStore {
    /// Protects paths, valid or not, from collectors until this value goes away.
    fn add_temp_roots(&self, paths: &BTreeSet<StorePath>) -> Result<(), StoreError>;

    /// Protects paths as [`Store::add_temp_roots`] does, and gives the valid ones; with `substitute`
    /// those that are not valid, and no derivations, are fetched first where somebody has them.
    fn hold_valid(&self, paths: &BTreeSet<StorePath>, substitute: bool) -> Result<BTreeSet<StorePath>, StoreError> {
        self.add_temp_roots(paths)?;
        let valid = self.valid_subset(paths)?;
        let missing = paths.difference(&valid).filter(|path| substitute && !path.is_derivation());
        let missing: Vec<DerivedPath> = missing.map(|path| DerivedPath::Opaque(path.clone())).collect();
        if missing.is_empty() {
            return Ok(valid);
        }
        self.build(&missing, BuildMode::Normal)?;
        self.valid_subset(paths)
    }

    /// Makes a link anywhere on the disk a root.
    fn add_indirect_root(&self, link: &Path) -> Result<(), StoreError>;

    /// Makes a link to a path, and a root of the link.
    fn add_root(&self, path: &StorePath, link: &Path) -> Result<(), StoreError>;

    fn roots(&self) -> Result<Vec<RootLink>, StoreError>;

    /// `max_freed_bytes` is where a deletion may stop.
    fn collect(&self, what: &Collect, max_freed_bytes: u64) -> Result<Collected, StoreError>;

    /// Adds an object under the path that follows from its contents, and reads it to its end.
    fn add_content(&self, new: &NewContent, source: &mut dyn Read) -> Result<PathInfo, StoreError>;

    /// Adds objects with known records: contents that are not as recorded are refused. What was
    /// added before an error stays.
    fn add_nars(&self, source: &mut dyn NarSource, options: AddOptions) -> Result<(), StoreError>;

    /// Reads an export stream, and nothing behind it; gives its paths in order. Signatures are not
    /// asked for.
    fn import(&self, source: &mut dyn BufRead) -> Result<Vec<StorePath>, StoreError>;

    fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<(), StoreError>;

    fn add_realisation(&self, realisation: &Realisation) -> Result<(), StoreError>;

    /// Keeps the log of a build that was done elsewhere.
    fn add_build_log(&self, drv: &StorePath, source: &mut dyn Read) -> Result<(), StoreError>;

    fn optimise(&self) -> Result<(), StoreError>;

    /// Tells of what is wrong, and gives whether something still is.
    fn verify(&self, check_contents: bool, repair: bool) -> Result<bool, StoreError>;

    /// What would have to be done for some targets.
    fn missing(&self, targets: &[DerivedPath]) -> Result<Missing, StoreError>;

    /// What substituters have of some paths. A content address helps to find a path under
    /// another store directory.
    fn substitutable(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
    ) -> Result<Vec<Substitutable>, StoreError>;

    /// Builds or fetches; a result for each target, in order, whether it succeeded or not.
    fn build(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<Vec<BuildResult>, StoreError>;

    /// Builds or fetches all targets. What failed is told to the user as it fails; the error sums
    /// it up, and has the exit status that it means.
    fn realise(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<(), StoreError>;

    /// Builds a derivation that need not lie in the store, and whose inputs are all valid.
    fn build_derivation(&self, path: &StorePath, drv: &Derivation, mode: BuildMode) -> Result<BuildResult, StoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DRV: &str = "/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv";

    #[test]
    fn derived_paths() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let drv = dir.parse(DRV).unwrap();
        let parse = |suffix: &str, old| DerivedPath::parse(&dir, format!("{DRV}{suffix}").as_bytes(), old);
        let built = |outputs| Ok(DerivedPath::Built { drv: drv.clone(), outputs });
        assert_eq!(parse("", false), Ok(DerivedPath::Opaque(drv.clone())));
        assert_eq!(parse("", true), built(Outputs::All));
        assert_eq!(parse("!*", false), built(Outputs::All));
        let names = |names: &[&str]| Outputs::Named(names.iter().map(|n| n.parse().unwrap()).collect());
        assert_eq!(parse("!out,dev", true), built(names(&["out", "dev"])));
        assert!(matches!(parse("!out!dev", false), Err(DerivedPathError::Dynamic { .. })));
        assert!(matches!(parse("!out,", false), Err(DerivedPathError::Output { .. })));
        assert!(matches!(parse("!", false), Err(DerivedPathError::Output { .. })));
        assert!(matches!(parse("/bin", false), Err(DerivedPathError::Path(_))));
        let plain = DerivedPath::parse(&dir, format!("{}!out", DRV.trim_end_matches(".drv")).as_bytes(), false);
        assert!(matches!(plain, Err(DerivedPathError::NotDerivation { .. })));
    }

    proptest! {
        #[test]
        fn derived_paths_read_back(target in crate::arb::api::derived_path(), old in any::<bool>()) {
            let dir = StoreDir::new("/nix/store").unwrap();
            let asks_for_drv = matches!(&target, DerivedPath::Opaque(path) if path.is_derivation());
            prop_assume!(!(old && asks_for_drv));
            let text = target.to_text(&dir, old);
            prop_assert_eq!(DerivedPath::parse(&dir, text.as_bytes(), old), Ok(target));
        }
    }
}
