//! The store that a daemon's connection, or a remote command, works with: the local store, and the
//! settings it is worked with.
//!
//! What needs builders, substituters or the collector goes through here to where that is done.

mod building;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, Read, Write};
use std::path::Path;
use std::sync::Arc;

use larder_core::api::{
    AddOptions, BuildMode, BuildResult, Collect, Collected, DerivedPath, ErrorKind, Missing, NarSource, NewContent,
    ReadStore, RootLink, Store, StoreError, Substitutable,
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
use larder_core::store_path::{PathRef, StorePath};
use larder_gc::add_root;
use larder_realise::logs::{self, Form};
use larder_realise::sharing::SharedBuilds;
use larder_store::LocalStore;
use larder_store::collect::{CollectOptions, Freed};
use larder_store::delete::DeleteOptions;
use larder_store::error::StoreError as LocalError;
use larder_store::verify::VerifyOptions;

use crate::conf::Env;
use crate::interrupt::Interrupt;

/// A local store with settings.
#[derive(Debug)]
pub struct Engine {
    pub local: LocalStore,
    pub settings: Arc<Settings>,
    /// What other clients of this process build as well.
    pub builds: Arc<SharedBuilds>,
    /// The client does not show logs as they come, so that failures show the end of it.
    pub hides_logs: bool,
    /// Held while builders run: they are to end tidily.
    pub interrupt: Interrupt,
    /// Of this process: caches are asked with its proxies and certificates.
    pub env: Arc<Env>,
}

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
}

impl ReadStore for Engine {
    fn dir(&self) -> &StoreDir {
        self.local.dir()
    }
    fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, StoreError> {
        ReadStore::info(&self.local, path)
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>, StoreError> {
        ReadStore::infos(&self.local, paths)
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
    fn listed_closure(
        &self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<Option<Vec<StorePath>>, StoreError> {
        self.local.listed_closure(paths, include_outputs)
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
        Ok(self.local.add_permanent_root(path, link).map(drop)?)
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
                let lists_live = *what == Collect::ListLive;
                let survey = if lists_live { local.survey_live() } else { local.survey() }?;
                say("determining live/dead paths...");
                let whole = |path: PathRef<'_>| {
                    let mut whole = full(b"");
                    path.write_base_name(&mut whole);
                    whole
                };
                let paths = if lists_live {
                    survey.live_paths().map(whole).collect()
                } else {
                    survey.dead_paths().map(whole).collect()
                };
                return Ok(Collected { paths, bytes_freed: 0 });
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

    fn add_build_log(&self, drv: &StorePath, source: &mut dyn Read) -> Result<(), StoreError> {
        let form = if self.settings.compress_build_log { Form::Compressed } else { Form::Plain };
        logs::keep(self.local.layout(), drv, form, source).map_err(|error| StoreError::new(ErrorKind::Other, error))
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
        Ok(self.local.verify(VerifyOptions { check_contents, repair, ..VerifyOptions::default() }, self)?.errors > 0)
    }

    fn missing(&self, targets: &[DerivedPath]) -> Result<Missing, StoreError> {
        self.what_is_missing(targets)
    }

    fn substitutable(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
    ) -> Result<Vec<Substitutable>, StoreError> {
        self.offered(&paths.keys().cloned().collect())
    }

    fn build(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<Vec<BuildResult>, StoreError> {
        self.build_each(targets, mode)
    }

    fn realise(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<(), StoreError> {
        self.realise_all(targets, mode)
    }

    fn build_derivation(&self, path: &StorePath, drv: &Derivation, mode: BuildMode) -> Result<BuildResult, StoreError> {
        self.build_given(path, drv, mode)
    }
}
