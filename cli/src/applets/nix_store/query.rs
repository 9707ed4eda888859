//! `nix-store --query`. Source: cli, sections 5.2 and 6.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::rc::Rc;

use larder_core::hash::Sha256Digest;
use larder_core::registration::write_path;
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_store::{LocalStore, StoreError};
use larder_store_db::graph::{closure_of, neighbours_of};
use larder_store_db::{Graph, Walk};

use super::realise::force;
use super::store::{must_be_there, open};
use crate::applets::Context;
use crate::args::nix_store::{Query, QueryKind};
use crate::args::shown;
use crate::exit::Failure;
use crate::graphs::{self, Nodes, Tree};
use crate::paths::store_paths;
use crate::printer::Printer;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum QueryError {
    #[error("derivation '{derivation}' has no environment binding named '{name}'")]
    NoBinding { derivation: String, name: String },
    #[error("deriver of path '{path}' is not known")]
    NoDeriver { path: String },
}

/// A query's store, what it is about, and where the answer goes.
struct Asked<'a> {
    store: &'a LocalStore,
    query: &'a Query,
    out: Printer,
}

pub(super) fn run(cx: &Context, settings: &Settings, query: &Query) -> Result<(), Failure> {
    let access = if query.force_realise { Access::ReadWrite } else { Access::ReadOnly };
    let store = open(cx, settings, access)?;
    let mut asked = Asked { store: &store, query, out: Printer::paged(&cx.env, &cx.interrupt) };
    let paths = store_paths(store.dir(), &query.paths)?;
    if query.force_realise {
        force(cx, settings, &store, &paths)?;
    }
    asked.answer(&paths)?;
    Ok(asked.out.finish()?)
}

impl Asked<'_> {
    fn answer(&mut self, paths: &[StorePath]) -> Result<(), Failure> {
        let store = self.store;
        let dir = store.dir();
        match &self.query.kind {
            QueryKind::Outputs => {
                for path in paths {
                    for output in self.outputs(path)? {
                        self.out.line(dir.display(&output))?;
                    }
                }
            }
            QueryKind::Requisites => {
                let roots = self.meant(paths)?;
                let walk = Walk { outputs: self.query.include_outputs, ..Walk::REFERENCES };
                self.print_closure(&roots, walk)?;
            }
            QueryKind::ReferrersClosure => {
                let roots = self.meant(paths)?;
                self.print_closure(&roots, Walk::REFERRERS)?;
            }
            QueryKind::References | QueryKind::Referrers => {
                let backward = self.query.kind == QueryKind::Referrers;
                let paths = self.meant(paths)?;
                let graph = store.read(|txn| Ok(Some(neighbours_of(txn, &paths, backward)?)))?;
                self.print_graph(&paths, graph)?;
            }
            QueryKind::Deriver => {
                for path in paths {
                    match store.info(path)?.deriver {
                        Some(deriver) => self.out.line(dir.display(&deriver))?,
                        None => self.out.line("unknown-deriver")?,
                    }
                }
            }
            QueryKind::ValidDerivers => {
                for path in paths {
                    for deriver in store.read(|txn| Ok(txn.valid_derivers(path)?))? {
                        self.out.line(dir.display(&deriver))?;
                    }
                }
            }
            QueryKind::Binding(name) => {
                for path in paths {
                    let value = self.binding(path, name)?;
                    self.out.bytes(&value)?;
                    self.out.bytes(b"\n")?;
                }
            }
            QueryKind::Hash | QueryKind::Size => self.print_contents(paths)?,
            QueryKind::Tree => {
                let mut snapshot = Snapshot::of(store, paths)?;
                let mut tree = Tree::default();
                for path in paths {
                    tree.print(dir, path, &mut snapshot, &mut self.out)?;
                }
            }
            QueryKind::Graph | QueryKind::Graphml => {
                let roots = self.meant(paths)?;
                let mut snapshot = Snapshot::of(store, &roots)?;
                if self.query.kind == QueryKind::Graph {
                    graphs::print_dot(roots.into_owned(), &mut snapshot, &mut self.out)?;
                } else {
                    graphs::print_graphml(roots.into_owned(), &mut snapshot, &mut self.out)?;
                }
            }
            QueryKind::Resolve => {
                for path in paths {
                    self.out.line(dir.display(path))?;
                }
            }
            QueryKind::Roots => {
                for root in store.roots_of(&self.meant(paths)?)? {
                    graphs::print_root(dir, root.link.as_os_str(), &root.path, &mut self.out)?;
                }
            }
        }
        Ok(())
    }

    /// What the arguments mean: with `--use-output` the outputs of derivations; with
    /// `--force-realise` they must be there.
    fn meant<'p>(&self, paths: &'p [StorePath]) -> Result<Cow<'p, [StorePath]>, Failure> {
        if !self.query.use_output && !self.query.force_realise {
            return Ok(paths.into());
        }
        let mut all = Vec::new();
        for path in paths {
            let outputs = self.outputs(path)?;
            if self.query.use_output {
                all.extend(outputs);
            } else {
                all.push(path.clone());
            }
        }
        Ok(all.into())
    }

    /// The outputs of a derivation, ascending; anything else stands for itself.
    fn outputs(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, Failure> {
        let outputs = if path.is_derivation() {
            must_be_there(self.store, path)?;
            self.store.derivation_outputs(path)?.into_values().collect()
        } else {
            BTreeSet::from([path.clone()])
        };
        Ok(outputs)
    }

    /// A closure, dependencies first.
    fn print_closure(&mut self, roots: &[StorePath], walk: Walk) -> Result<(), Failure> {
        let graph = self.store.read(|txn| Ok(Some(closure_of(txn, roots, walk)?)))?;
        self.print_graph(roots, graph)
    }

    /// All paths of a graph, dependencies first. A store without a ledger has no graph: then the
    /// first of the paths asked for is not valid.
    fn print_graph(&mut self, asked: &[StorePath], graph: Option<Graph>) -> Result<(), Failure> {
        let store = self.store;
        let Some(graph) = graph else {
            return asked.first().map_or(Ok(()), |path| Err(store.not_valid(path).into()));
        };
        let mut line = Vec::new();
        for node in graph.topological_all().map_err(|error| StoreError::from(error).in_dir(store.dir()))? {
            line.clear();
            write_path(&mut line, store.dir(), graph.path_ref(node));
            self.out.bytes(&line)?;
        }
        Ok(())
    }

    /// `--hash` and `--size`: answers before a path that is not valid are printed.
    fn print_contents(&mut self, paths: &[StorePath]) -> Result<(), Failure> {
        let store = self.store;
        let paths = self.meant(paths)?;
        let mut found: Vec<Option<(Sha256Digest, u64)>> = vec![None; paths.len()];
        store.read(|txn| {
            txn.each(&paths, |index, view| {
                if let (Some(slot), Some(view)) = (found.get_mut(index), view) {
                    *slot = Some((view.nar_hash, view.nar_size_bytes));
                }
                Ok::<(), StoreError>(())
            })
        })?;
        for (path, found) in paths.iter().zip(found) {
            let (hash, size_bytes) = found.ok_or_else(|| store.not_valid(path))?;
            match self.query.kind {
                QueryKind::Hash => {
                    self.out.bytes(b"sha256:")?;
                    self.out.bytes(hash.to_base32().as_bytes())?;
                    self.out.bytes(b"\n")?;
                }
                _ => self.out.line(size_bytes)?,
            }
        }
        Ok(())
    }

    /// A variable of a derivation, or of what made an output.
    fn binding(&self, path: &StorePath, name: &OsStr) -> Result<Vec<u8>, Failure> {
        let info = self.store.info(path)?;
        let full = |path: &StorePath| self.store.dir().full(path);
        let derivation = if path.is_derivation() {
            path.clone()
        } else {
            info.deriver.ok_or_else(|| QueryError::NoDeriver { path: full(path) })?
        };
        if !self.store.is_valid(&derivation)? {
            return Err(self.store.not_valid(&derivation).into());
        }
        match self.store.derivation(&derivation)?.binding(name.as_bytes()) {
            Some(value) => Ok(value.to_vec()),
            None => Err(QueryError::NoBinding { derivation: full(&derivation), name: shown(name) }.into()),
        }
    }
}

/// The closure of some paths as it was at one moment.
pub(in crate::applets) struct Snapshot<'s> {
    dir: &'s StoreDir,
    graph: Graph,
    /// Are referrers shown in the place of references?
    backward: bool,
}

impl<'s> Snapshot<'s> {
    /// Paths that are not valid are left out; asking for one is an error.
    fn of(store: &'s LocalStore, paths: &[StorePath]) -> Result<Self, Failure> {
        let graph = store.read(|txn| {
            let mut valid = Vec::new();
            for path in paths {
                if txn.is_valid(path)? {
                    valid.push(path.clone());
                }
            }
            Ok(Some(closure_of(txn, &valid, Walk::REFERENCES)?))
        })?;
        Ok(Self::new(store.dir(), graph.unwrap_or_default(), false))
    }

    pub(in crate::applets) fn new(dir: &'s StoreDir, graph: Graph, backward: bool) -> Self {
        Self { dir, graph, backward }
    }

    fn node(&self, path: &StorePath) -> Result<larder_store_db::Node, Failure> {
        Ok(self.graph.node(path).ok_or_else(|| StoreError::NotValid { path: self.dir.full(path) })?)
    }
}

impl Nodes for Snapshot<'_> {
    fn references(&mut self, path: &StorePath) -> Result<Rc<[StorePath]>, Failure> {
        let node = self.node(path)?;
        if self.backward {
            return Ok(self.graph.referrers(node).map(|node| self.graph.path(node)).collect());
        }
        Ok(self.graph.references(node).map(|node| self.graph.path(node)).collect())
    }

    fn nar_size_bytes(&mut self, path: &StorePath) -> Result<u64, Failure> {
        Ok(self.graph.nar_size_bytes(self.node(path)?))
    }
}
