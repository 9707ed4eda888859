//! `nix-store --query` on a store elsewhere: what is asked of it, a level of the graph at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;

use larder_core::api::{self, DerivedPath, Outputs, ReadStore, StoreError};
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;

use super::Far;
use crate::applets::nix_store::query::QueryError;
use crate::args::nix_store::{Query, QueryKind};
use crate::args::shown;
use crate::exit::Failure;
use crate::graphs::{self, Nodes, Tree, dependency_order};
use crate::paths::store_paths;
use crate::printer::Printer;

/// Records that were asked for, each once.
struct Known<'f, 'a> {
    far: &'f Far<'a>,
    infos: BTreeMap<StorePath, Rc<PathInfo>>,
}

impl Known<'_, '_> {
    fn info(&mut self, path: &StorePath) -> Result<Rc<PathInfo>, Failure> {
        if let Some(info) = self.infos.get(path) {
            return Ok(Rc::clone(info));
        }
        let info = Rc::new(self.far.info(path)?);
        self.infos.insert(path.clone(), Rc::clone(&info));
        Ok(info)
    }

    /// Asks for many at once.
    fn learn(&mut self, paths: &BTreeSet<StorePath>) -> Result<(), Failure> {
        let unknown: Vec<StorePath> = paths.iter().filter(|path| !self.infos.contains_key(*path)).cloned().collect();
        for (path, info) in unknown.iter().zip(self.far.store.infos(&unknown)?) {
            let info = info.ok_or_else(|| self.far.not_valid(path))?;
            self.infos.insert(path.clone(), Rc::new(info));
        }
        Ok(())
    }

    /// All that some paths need, themselves among them.
    fn closure(&mut self, paths: &[StorePath]) -> Result<BTreeSet<StorePath>, Failure> {
        let mut closure: BTreeSet<StorePath> = paths.iter().cloned().collect();
        let mut level = closure.clone();
        while !level.is_empty() {
            self.learn(&level)?;
            let mut next = BTreeSet::new();
            for path in &level {
                let info = self.info(path)?;
                next.extend(info.references.iter().filter(|path| closure.insert((*path).clone())).cloned());
            }
            level = next;
        }
        Ok(closure)
    }
}

impl Nodes for Known<'_, '_> {
    fn references(&mut self, path: &StorePath) -> Result<Rc<[StorePath]>, Failure> {
        Ok(self.info(path)?.references.iter().cloned().collect())
    }
    fn nar_size_bytes(&mut self, path: &StorePath) -> Result<u64, Failure> {
        Ok(self.info(path)?.nar_size_bytes)
    }
}

/// Some paths, and all that refers to them, directly or not.
pub(in crate::applets) fn referrers_closure(
    store: &dyn ReadStore,
    paths: &[StorePath],
) -> Result<BTreeSet<StorePath>, StoreError> {
    let mut closure: BTreeSet<StorePath> = paths.iter().cloned().collect();
    let mut left = paths.to_vec();
    while let Some(path) = left.pop() {
        left.extend(store.referrers(&path)?.into_iter().filter(|path| closure.insert(path.clone())));
    }
    Ok(closure)
}

impl Far<'_> {
    #[expect(clippy::too_many_lines, reason = "a list of like entries, one for each query")]
    pub(super) fn query(&self, query: &Query) -> Result<(), Failure> {
        let (store, dir) = (self.store, self.store.dir());
        let paths = store_paths(dir, &query.paths)?;
        if query.force_realise {
            let targets: Vec<DerivedPath> = paths
                .iter()
                .map(|path| {
                    if path.is_derivation() {
                        DerivedPath::Built { drv: path.clone(), outputs: Outputs::All }
                    } else {
                        DerivedPath::Opaque(path.clone())
                    }
                })
                .collect();
            store.realise(&targets, api::BuildMode::Normal)?;
        }
        let mut known = Known { far: self, infos: BTreeMap::new() };
        let mut out = Printer::paged(&self.cx.env, &self.cx.interrupt);
        match &query.kind {
            QueryKind::Outputs => {
                for path in &paths {
                    for output in self.outputs_at(path)? {
                        out.line(dir.display(&output))?;
                    }
                }
            }
            QueryKind::Requisites => {
                let roots = self.meant(query, &paths)?;
                let set = roots.iter().cloned().collect();
                if let Some(list) = store.listed_closure(&set, query.include_outputs)? {
                    let prefix = format!("{dir}/");
                    for path in list {
                        out.bytes(prefix.as_bytes())?;
                        out.line(path)?;
                    }
                    return Ok(out.finish()?);
                }
                let mut all = known.closure(&roots)?;
                if query.include_outputs {
                    all = store.closure(&all, true)?;
                    known.learn(&all)?;
                }
                self.print_sorted(&all, &mut known, &mut out)?;
            }
            QueryKind::References => {
                let mut all = BTreeSet::new();
                for path in self.meant(query, &paths)? {
                    all.extend(known.info(&path)?.references.iter().cloned());
                }
                self.print_sorted(&all, &mut known, &mut out)?;
            }
            QueryKind::Referrers => {
                let mut all = BTreeSet::new();
                for path in self.meant(query, &paths)? {
                    known.info(&path)?;
                    all.extend(store.referrers(&path)?);
                }
                self.print_sorted(&all, &mut known, &mut out)?;
            }
            QueryKind::ReferrersClosure => {
                let roots = self.meant(query, &paths)?;
                for path in &roots {
                    known.info(path)?;
                }
                let all = referrers_closure(store, &roots)?;
                self.print_sorted(&all, &mut known, &mut out)?;
            }
            QueryKind::Deriver => {
                for path in &paths {
                    match &known.info(path)?.deriver {
                        Some(deriver) => out.line(dir.display(deriver))?,
                        None => out.line("unknown-deriver")?,
                    }
                }
            }
            QueryKind::ValidDerivers => {
                for path in &paths {
                    for deriver in store.valid_derivers(path)? {
                        out.line(dir.display(&deriver))?;
                    }
                }
            }
            QueryKind::Binding(name) => {
                for path in &paths {
                    out.bytes(&self.binding(path, name)?)?;
                    out.bytes(b"\n")?;
                }
            }
            QueryKind::Hash => {
                for path in self.meant(query, &paths)? {
                    out.line(format_args!("sha256:{}", known.info(&path)?.nar_hash.to_base32()))?;
                }
            }
            QueryKind::Size => {
                for path in self.meant(query, &paths)? {
                    out.line(known.info(&path)?.nar_size_bytes)?;
                }
            }
            QueryKind::Tree => {
                let mut tree = Tree::default();
                for path in &paths {
                    tree.print(dir, path, &mut known, &mut out)?;
                }
            }
            QueryKind::Graph => {
                let roots = self.meant(query, &paths)?;
                known.closure(&roots)?;
                graphs::print_dot(roots, &mut known, &mut out)?;
            }
            QueryKind::Graphml => {
                let roots = self.meant(query, &paths)?;
                known.closure(&roots)?;
                graphs::print_graphml(roots, &mut known, &mut out)?;
            }
            QueryKind::Resolve => {
                for path in &paths {
                    out.line(dir.display(path))?;
                }
            }
            QueryKind::Roots => {
                let needing = referrers_closure(store, &self.meant(query, &paths)?)?;
                for root in store.roots()? {
                    if needing.contains(&root.path) {
                        graphs::print_root(dir, OsStr::from_bytes(&root.link), &root.path, &mut out)?;
                    }
                }
            }
        }
        Ok(out.finish()?)
    }

    fn print_sorted(
        &self,
        all: &BTreeSet<StorePath>,
        known: &mut Known<'_, '_>,
        out: &mut Printer,
    ) -> Result<(), Failure> {
        known.learn(all)?;
        for path in dependency_order(self.store.dir(), all, known)? {
            out.line(self.store.dir().display(&path))?;
        }
        Ok(())
    }

    /// What the arguments mean: with `--use-output` the outputs of derivations.
    fn meant(&self, query: &Query, paths: &[StorePath]) -> Result<Vec<StorePath>, Failure> {
        if !query.use_output {
            return Ok(paths.to_vec());
        }
        let mut all = Vec::new();
        for path in paths {
            all.extend(self.outputs_at(path)?);
        }
        Ok(all)
    }

    /// The outputs of a derivation, ascending; anything else stands for itself.
    fn outputs_at(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, Failure> {
        if !path.is_derivation() {
            return Ok(BTreeSet::from([path.clone()]));
        }
        if !self.store.is_valid(path)? {
            return Err(super::FarError::CannotBeCreated { path: self.store.dir().full(path) }.into());
        }
        Ok(self.store.derivation_outputs(path)?.into_values().flatten().collect())
    }

    /// A variable of a derivation, or of what made an output.
    fn binding(&self, path: &StorePath, name: &OsStr) -> Result<Vec<u8>, Failure> {
        let full = |path: &StorePath| self.store.dir().full(path);
        let derivation = if path.is_derivation() {
            path.clone()
        } else {
            self.info(path)?.deriver.ok_or_else(|| QueryError::NoDeriver { path: full(path) })?
        };
        match self.derivation(&derivation)?.binding(name.as_bytes()) {
            Some(value) => Ok(value.to_vec()),
            None => Err(QueryError::NoBinding { derivation: full(&derivation), name: shown(name) }.into()),
        }
    }
}
