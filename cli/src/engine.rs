//! The store that a daemon's connection, or a remote command, works with: the local store, and the
//! settings it is worked with.
//!
//! What needs builders, substituters or the collector goes through here to where that is done.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read, Write};
use std::path::Path;

use larder_core::api::{
    AddOptions, BuildMode, BuildResult, BuildStatus, Collect, Collected, DerivedPath, ErrorKind, Missing, NarSource,
    NewContent, Outputs, ReadStore, RootLink, Store, StoreError, Substitutable,
};
use larder_core::content_address::ContentAddress;
use larder_core::derivation::{Derivation, OutputName};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::Level;
use larder_core::settings::Settings;
use larder_core::signature::{PublicKey, Signature, count_valid};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_gc::add_root;
use larder_store::LocalStore;
use larder_store::collect::{CollectOptions, Freed};
use larder_store::delete::DeleteOptions;
use larder_store::error::StoreError as LocalError;
use larder_store::verify::{Nobody, VerifyOptions};

/// A local store with settings.
#[derive(Debug)]
pub struct Engine {
    pub local: LocalStore,
    pub settings: Settings,
}

/// What is not done yet.
fn not_yet(what: &str) -> StoreError {
    StoreError::unsupported(&format!("{what}: this version of Larder does not do that yet (see SHORTCOMINGS.md)"))
}

const CANNOT_BUILD: &str = "cannot build or substitute";

impl Engine {
    /// Is there a signature by a key that the settings trust, or no need for one?
    fn is_trusted(&self, info: &PathInfo) -> bool {
        if !self.settings.require_sigs || info.is_content_addressed(self.local.dir()) {
            return true;
        }
        // A key that cannot be read is nobody's.
        let keys: Vec<PublicKey> =
            self.settings.trusted_public_keys.iter().filter_map(|key| key.parse().ok()).collect();
        count_valid(self.local.dir(), info, &keys) > 0
    }

    /// The outputs that are asked for and not valid, of a derivation that is.
    fn missing_outputs(&self, drv: &StorePath, wanted: &Outputs) -> Result<BTreeSet<OutputName>, StoreError> {
        let outputs = ReadStore::derivation_outputs(&self.local, drv)?;
        let mut missing = BTreeSet::new();
        if let Outputs::Named(names) = wanted
            && let Some(unknown) = names.iter().find(|name| !outputs.contains_key(*name))
        {
            let drv = self.local.dir().display(drv);
            return Err(StoreError::new(
                ErrorKind::Other,
                format!("derivation '{drv}' does not have wanted outputs '{unknown}'"),
            ));
        }
        for (name, path) in outputs {
            let is_wanted = match wanted {
                Outputs::All => true,
                Outputs::Named(names) => names.contains(&name),
            };
            let is_there = match &path {
                Some(path) => self.local.is_valid(path)?,
                None => false,
            };
            if is_wanted && !is_there {
                missing.insert(name);
            }
        }
        Ok(missing)
    }

    /// The result for a target whose wanted outputs are all there; `None` if some are not.
    fn already(&self, target: &DerivedPath) -> Result<Option<BuildResult>, StoreError> {
        let mut result = BuildResult { status: BuildStatus::AlreadyValid, ..BuildResult::default() };
        match target {
            DerivedPath::Opaque(path) => {
                self.local.add_temp_roots([path])?;
                Ok(self.local.is_valid(path)?.then_some(result))
            }
            DerivedPath::Built { drv, outputs } => {
                self.local.add_temp_roots([drv])?;
                if !self.local.is_valid(drv)? {
                    return Ok(None);
                }
                let paths = ReadStore::derivation_outputs(&self.local, drv)?;
                self.local.add_temp_roots(paths.values().flatten())?;
                if !self.missing_outputs(drv, outputs)?.is_empty() {
                    return Ok(None);
                }
                let digest = self.local.output_ids(drv)?;
                for (name, path) in paths {
                    let is_wanted = match outputs {
                        Outputs::All => true,
                        Outputs::Named(names) => names.contains(&name),
                    };
                    if let (Some(out_path), true) = (path, is_wanted) {
                        let id = DrvOutput::new(digest, name.as_str())
                            .map_err(|error| StoreError::new(ErrorKind::Other, error))?;
                        let realisation = Realisation {
                            id: id.clone(),
                            out_path,
                            signatures: BTreeSet::new(),
                            dependent_realisations: BTreeMap::new(),
                        };
                        result.built_outputs.insert(id, realisation);
                    }
                }
                Ok(Some(result))
            }
        }
    }
}

impl ReadStore for Engine {
    fn dir(&self) -> &StoreDir {
        self.local.dir()
    }
    fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, StoreError> {
        ReadStore::info(&self.local, path)
    }
    fn is_valid(&self, path: &StorePath) -> Result<bool, StoreError> {
        ReadStore::is_valid(&self.local, path)
    }
    fn valid_subset(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, StoreError> {
        ReadStore::valid_subset(&self.local, paths)
    }
    fn all_paths(&self) -> Result<BTreeSet<StorePath>, StoreError> {
        self.local.all_paths()
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        self.local.referrers(path)
    }
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        self.local.valid_derivers(path)
    }
    fn by_hash_part(&self, hash_part: HashPart) -> Result<Option<StorePath>, StoreError> {
        self.local.by_hash_part(hash_part)
    }
    fn derivation_outputs(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>, StoreError> {
        ReadStore::derivation_outputs(&self.local, drv)
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, StoreError> {
        self.local.realisation(id)
    }
    fn closure(&self, paths: &BTreeSet<StorePath>, include_outputs: bool) -> Result<BTreeSet<StorePath>, StoreError> {
        ReadStore::closure(&self.local, paths, include_outputs)
    }
    fn sorted(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, StoreError> {
        self.local.sorted(paths)
    }
    fn nar(&self, path: &StorePath, out: &mut dyn Write) -> Result<(), StoreError> {
        self.local.nar(path, out)
    }
}

impl Store for Engine {
    fn add_temp_roots(&self, paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
        Ok(self.local.add_temp_roots(paths)?)
    }

    fn add_indirect_root(&self, link: &Path) -> Result<(), StoreError> {
        add_root::add_indirect(self.local.layout(), link).map_err(|error| StoreError::new(ErrorKind::Other, error))
    }

    fn add_root(&self, path: &StorePath, link: &Path) -> Result<(), StoreError> {
        add_root::add_permanent(self.local.layout(), self.local.temp_roots(), path, link)
            .map(drop)
            .map_err(|error| StoreError::new(ErrorKind::Other, error))
    }

    fn roots(&self) -> Result<Vec<RootLink>, StoreError> {
        Ok(self.local.root_links()?)
    }

    fn collect(&self, what: &Collect, max_freed_bytes: u64) -> Result<Collected, StoreError> {
        let local = &self.local;
        let full = |name: &[u8]| [local.dir().as_str().as_bytes(), b"/", name].concat();
        let mut freed = Freed::default();
        match what {
            Collect::ListLive | Collect::ListDead => {
                let say = |text: &str| local.reporter().message(Level::Info, format_args!("{text}"));
                say("finding garbage collector roots...");
                let survey = local.survey()?;
                say("determining live/dead paths...");
                let names = if *what == Collect::ListLive { survey.live_names() } else { survey.dead_names() };
                return Ok(Collected { paths: names.into_iter().map(full).collect(), bytes_freed: 0 });
            }
            Collect::DeleteDead => {
                let max_freed_bytes = (max_freed_bytes != u64::MAX).then_some(max_freed_bytes);
                local.collect(CollectOptions { max_freed_bytes }, &mut freed)?;
            }
            Collect::DeleteSpecific(paths) => {
                let paths: Vec<StorePath> = paths.iter().cloned().collect();
                local.delete(&paths, DeleteOptions::default(), &mut freed)?;
            }
        }
        let paths = freed.names.iter().map(|name| full(name.as_encoded_bytes())).collect();
        Ok(Collected { paths, bytes_freed: freed.bytes })
    }

    fn add_content(&self, new: &NewContent, source: &mut dyn Read) -> Result<PathInfo, StoreError> {
        Ok(self.local.add_content(new, source)?)
    }

    fn add_nars(&self, source: &mut dyn NarSource, options: AddOptions) -> Result<(), StoreError> {
        Ok(self.local.add_nars(source, options, |info| {
            if options.check_signatures && !self.is_trusted(info) {
                return Err(LocalError::Unsigned { path: self.local.dir().full(&info.path) });
            }
            Ok(())
        })?)
    }

    fn import(&self, source: &mut dyn BufRead) -> Result<Vec<StorePath>, StoreError> {
        let mut paths = Vec::new();
        self.local.import_from(source, |path| {
            paths.push(path.clone());
            Ok(())
        })?;
        Ok(paths)
    }

    fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<(), StoreError> {
        Ok(self.local.add_signatures(path, signatures)?)
    }

    fn add_realisation(&self, realisation: &Realisation) -> Result<(), StoreError> {
        Ok(self.local.add_realisation(realisation)?)
    }

    fn add_build_log(&self, _drv: &StorePath, _source: &mut dyn Read) -> Result<(), StoreError> {
        Err(not_yet("cannot keep build logs"))
    }

    fn optimise(&self) -> Result<(), StoreError> {
        let outcome = self.local.optimise();
        if let Ok(saved) | Err(LocalError::NotLinked { saved, .. }) = &outcome {
            #[expect(clippy::cast_precision_loss, reason = "two decimals are shown")]
            let mib = saved.bytes as f64 / f64::from(1 << 20);
            let text = format_args!("{mib:.2} MiB freed by hard-linking {} files", saved.files);
            self.local.reporter().message(Level::Notice, text);
        }
        Ok(outcome.map(drop)?)
    }

    fn verify(&self, check_contents: bool, repair: bool) -> Result<bool, StoreError> {
        Ok(self.local.verify(VerifyOptions { check_contents, repair, ..VerifyOptions::default() }, &Nobody)?.errors > 0)
    }

    fn missing(&self, targets: &[DerivedPath]) -> Result<Missing, StoreError> {
        let mut missing = Missing::default();
        let mut left = targets.to_vec();
        let mut seen: BTreeSet<DerivedPath> = targets.iter().cloned().collect();
        while let Some(target) = left.pop() {
            if !self.local.is_valid(target.path())? {
                missing.unknown.insert(target.path().clone());
                continue;
            }
            let DerivedPath::Built { drv, outputs } = target else { continue };
            if self.missing_outputs(&drv, &outputs)?.is_empty() {
                continue;
            }
            let inputs = self.local.derivation(&drv)?;
            missing.will_build.insert(drv);
            let built = inputs
                .input_drvs
                .into_iter()
                .map(|(drv, names)| DerivedPath::Built { drv, outputs: Outputs::Named(names) });
            let plain = inputs.input_srcs.into_iter().map(DerivedPath::Opaque);
            left.extend(built.chain(plain).filter(|target| seen.insert(target.clone())));
        }
        Ok(missing)
    }

    fn substitutable(
        &self,
        _paths: &BTreeMap<StorePath, Option<ContentAddress>>,
    ) -> Result<Vec<Substitutable>, StoreError> {
        Ok(Vec::new())
    }

    fn build(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<Vec<BuildResult>, StoreError> {
        let each = |target: &DerivedPath| {
            if mode == BuildMode::Normal
                && let Some(result) = self.already(target)?
            {
                return Ok(result);
            }
            let status = match target {
                DerivedPath::Opaque(_) => BuildStatus::NoSubstituters,
                DerivedPath::Built { .. } => BuildStatus::MiscFailure,
            };
            // Where there is nobody to fetch from there is nothing left undone.
            let nobody = self.settings.substituters.is_empty() || !self.settings.substitute;
            let error = match target {
                DerivedPath::Opaque(_) if nobody => String::new(),
                _ => not_yet(CANNOT_BUILD).to_string(),
            };
            Ok(BuildResult { status, error, ..BuildResult::default() })
        };
        targets.iter().map(each).collect()
    }

    fn build_derivation(
        &self,
        _path: &StorePath,
        _drv: &Derivation,
        _mode: BuildMode,
    ) -> Result<BuildResult, StoreError> {
        let error = not_yet(CANNOT_BUILD).to_string();
        Ok(BuildResult { status: BuildStatus::MiscFailure, error, ..BuildResult::default() })
    }
}
