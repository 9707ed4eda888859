//! What is alive and what is garbage, at one moment.

use std::ffi::{OsStr, OsString};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;

use larder_core::hash_part::HashPart;
use larder_core::store_path::{PathRef, StorePath};
use larder_fs::file_error::FileError;
use larder_fs::lock_file::LockFile;
use larder_gc::live::{self, Rules};
use larder_gc::roots::{self, Found, Root, RootKind, StaleLinks};
use larder_store_db::graph::NodeSet;
use larder_store_db::{Graph, Node};
use rustc_hash::FxHashSet;

use crate::broom::is_trash;
use crate::error::StoreError;
use crate::local::LocalStore;

/// The store as a collector sees it.
#[derive(Debug)]
pub struct Survey {
    /// All valid paths.
    pub graph: Graph,
    pub rules: Rules,
    /// Sorted, all kinds.
    pub roots: Vec<Root>,
    pub live: NodeSet,
    /// Entries of the store directory that are no valid path, and that nobody needs.
    pub invalid: Vec<OsString>,
    /// Hash parts of temporary roots: they keep what is not valid, too.
    pub(crate) temporary: FxHashSet<HashPart>,
    /// What killed runs have moved aside.
    pub(crate) trash: Vec<OsString>,
    /// What may hide roots.
    pub unreadable: Vec<FileError>,
    /// Keep owners of temporary roots of the style of Nix 1.8 waiting.
    pub(crate) _legacy_locks: Vec<LockFile>,
}

impl Survey {
    /// What whoever keeps the store has told of it. What is not valid is not among that.
    pub fn of_told(graph: Graph, rules: Rules, mut roots: Vec<Root>) -> Self {
        roots.sort();
        let mut survey = Self {
            live: NodeSet::new(&graph),
            graph,
            rules,
            roots,
            invalid: Vec::new(),
            temporary: FxHashSet::default(),
            trash: Vec::new(),
            unreadable: Vec::new(),
            _legacy_locks: Vec::new(),
        };
        survey.live = live::live(&survey.graph, survey.nodes(&survey.roots), survey.rules);
        survey
    }

    /// All valid paths that nothing keeps.
    pub fn dead(&self) -> NodeSet {
        live::complement(&self.graph, &self.live)
    }

    /// Live paths, ascending.
    pub fn live_paths(&self) -> impl Iterator<Item = PathRef<'_>> {
        self.live.iter().map(|node| self.graph.path_ref(node))
    }

    /// All that would be deleted and looks like a store path, ascending.
    pub fn dead_paths(&self) -> impl Iterator<Item = PathRef<'_>> {
        let valid = self.graph.nodes().filter(|node| !self.live.contains(*node));
        let mut valid = valid.map(|node| self.graph.path_ref(node)).peekable();
        let mut invalid: Vec<_> = self.invalid.iter().filter_map(|name| PathRef::parse(name.as_bytes()).ok()).collect();
        invalid.sort_unstable();
        let mut invalid = invalid.into_iter().peekable();
        std::iter::from_fn(move || match (valid.peek(), invalid.peek()) {
            (Some(v), Some(i)) if i < v => invalid.next(),
            (Some(_), _) => valid.next(),
            (None, _) => invalid.next(),
        })
    }

    /// The valid paths that some roots stand for.
    pub fn nodes<'a>(&'a self, roots: &'a [Root]) -> impl Iterator<Item = Node> + 'a {
        roots.iter().filter_map(|root| match root.kind {
            RootKind::Temporary => self.graph.by_hash_part(root.path.hash_part()),
            _ => self.graph.node(&root.path),
        })
    }
}

/// What a name in the store directory stands for.
pub(crate) enum Entry {
    /// Not looked at: `.links`.
    Ours,
    Trash,
    Valid,
    /// Has the form of a store path.
    Invalid(HashPart),
    Junk,
}

pub(crate) fn entry_kind(graph: &Graph, name: &OsStr) -> Entry {
    if name == ".links" {
        return Entry::Ours;
    }
    if is_trash(name) {
        return Entry::Trash;
    }
    match StorePath::from_base_name(name.as_bytes()) {
        Ok(path) if graph.node(&path).is_some() => Entry::Valid,
        Ok(path) => Entry::Invalid(path.hash_part()),
        Err(_) => Entry::Junk,
    }
}

/// Names of entries of the store directory on their way. Nearly all are those of valid paths, which
/// are looked up together, and of which nothing is made.
#[derive(Default)]
struct Names<'a> {
    text: Vec<u8>,
    /// Of each name that begins like that of a path: its hash part, and where it lies.
    hash_parts: Vec<(HashPart, Range<usize>)>,
    /// The names of the valid paths with these hash parts.
    valid: Vec<Option<&'a str>>,
}

impl<'a> Names<'a> {
    /// What may be looked up together.
    const MOST: usize = 256;

    /// Calls `each` with what is known by itself to be no valid path, and with what turns out to be none.
    fn push(&mut self, graph: &'a Graph, name: &OsStr, each: &mut impl FnMut(&OsStr)) {
        let bytes = name.as_bytes();
        let hash_part = bytes.first_chunk::<{ HashPart::TEXT_LEN }>().and_then(|text| HashPart::parse(text).ok());
        let Some(hash_part) = hash_part else { return each(name) };
        let start = self.text.len();
        self.text.extend_from_slice(bytes);
        self.hash_parts.push((hash_part, start..self.text.len()));
        if self.hash_parts.len() >= Self::MOST {
            self.finish(graph, each);
        }
    }

    fn finish(&mut self, graph: &'a Graph, each: &mut impl FnMut(&OsStr)) {
        let hash_parts = self.hash_parts.iter().map(|(hash_part, _)| hash_part);
        graph.by_hash_parts(hash_parts, |node| self.valid.push(node.map(|node| graph.name(node))));
        for ((_, range), valid) in self.hash_parts.drain(..).zip(self.valid.drain(..)) {
            let name = self.text.get(range).unwrap_or_default();
            let after = name.get(HashPart::TEXT_LEN..).and_then(|rest| rest.strip_prefix(b"-"));
            if valid.is_none_or(|valid| Some(valid.as_bytes()) != after) {
                each(OsStr::from_bytes(name));
            }
        }
        self.text.clear();
    }
}

impl LocalStore {
    /// What of the settings says which paths others keep.
    pub fn rules(&self) -> Rules {
        Rules { keep_outputs: self.options().keep_outputs, keep_derivations: self.options().keep_derivations }
    }

    /// All roots, sorted by link and path; what could not be read is told and passed over.
    pub fn all_roots(&self) -> Result<Vec<Root>, StoreError> {
        Ok(self.roots()?.roots)
    }

    /// Looks at everything. Nothing is locked and nothing deleted: what comes and goes meanwhile may
    /// be seen or not.
    pub fn survey(&self) -> Result<Survey, StoreError> {
        self.survey_with(StaleLinks::Keep)
    }

    /// As [`Self::survey`], for who asks what lives: the directory is not read, and `invalid` stays empty.
    pub fn survey_live(&self) -> Result<Survey, StoreError> {
        self.survey_paths(StaleLinks::Keep)
    }

    /// A collector that is about to delete has the lock, and listens, before it calls this.
    ///
    /// The order matters: the temporary roots, then the ledger, then links and processes, then the
    /// directory. See `docs/gc-protocol.md`.
    pub(crate) fn survey_with(&self, stale: StaleLinks) -> Result<Survey, StoreError> {
        let mut survey = self.survey_paths(stale)?;
        let Survey { graph, invalid, temporary, trash, .. } = &mut survey;
        let mut each = |name: &OsStr| match entry_kind(graph, name) {
            Entry::Ours | Entry::Valid => {}
            Entry::Trash => trash.push(name.to_owned()),
            Entry::Invalid(hash_part) if temporary.contains(&hash_part) => {}
            Entry::Invalid(_) | Entry::Junk => invalid.push(name.to_owned()),
        };
        let mut names = Names::default();
        let entries = self.each_entry(|name| names.push(graph, name, &mut each));
        names.finish(graph, &mut each);
        match entries {
            // There is no store yet.
            Err(StoreError::File(e)) if e.kind() == std::io::ErrorKind::NotFound => Ok(survey),
            read => read.map(|()| survey),
        }
    }

    /// All of it but the directory.
    fn survey_paths(&self, stale: StaleLinks) -> Result<Survey, StoreError> {
        let temporary = roots::temporary(self.layout(), stale, self.reporter())?;
        if stale == StaleLinks::Remove {
            // Whoever has no temporary root any more may have died as the ledger was synced for the last time.
            self.ledger()?.settle()?;
        }
        let graph = self.read(|txn| Ok(Graph::load(txn)?))?;
        let mut valid = |path: &StorePath| Ok::<_, Box<StoreError>>(graph.node(path).is_some());
        let lasting = roots::lasting(self.layout(), stale, &mut valid, self.reporter());
        let lasting = lasting.map_err(|error| StoreError::Roots(Box::new(error)))?;
        let Found { mut roots, mut unreadable, legacy_locks } = temporary;
        let temporary: FxHashSet<HashPart> = roots.iter().map(|root| root.path.hash_part()).collect();
        roots.extend(lasting.roots);
        unreadable.extend(lasting.unreadable);
        let survey = Survey::of_told(graph, self.rules(), roots);
        Ok(Survey { temporary, unreadable, _legacy_locks: legacy_locks, ..survey })
    }
}
