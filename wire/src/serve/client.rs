//! The client's side: a store behind `nix-store --serve` on another machine.
//!
//! The protocol knows few questions; the others are errors. Texts of the other side go to its
//! standard error, which the transport cares for. After any error but that of a build the
//! connection is given up, since the other process has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use larder_core::api::{
    AddOptions, BuildMode, BuildResult, BuildStatus, Collect, Collected, DerivedPath, ErrorKind, Missing, NarSource,
    NewContent, ReadStore, RootLink, Store, StoreError, Substitutable,
};
use larder_core::content_address::ContentAddress;
use larder_core::derivation::{Derivation, OutputName, aterm, name_of};
use larder_core::export::{Next, write_lead, write_trailer};
use larder_core::hash_part::HashPart;
use larder_core::nar::{Event, Parser};
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::signature::Signature;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use super::ops::{self, BuildOptions, Command, NarRecord};
use super::{MINOR, connect, decoder};
use crate::codec::{Budget, Encoder, Protocol, WireError};
use crate::order::order;
use crate::stream::BareNar;
use crate::value::{BasicDerivation, Wire as _};

/// The largest derivation that is read from the other side, in bytes.
const MAX_DERIVATION: u64 = 64 << 20;

/// The connection was given up after an error, so nothing can be asked any more.
#[derive(Debug, thiserror::Error)]
#[error("the connection to the other store has been given up after an earlier error")]
struct Broken;

/// A store behind a connection.
pub struct Client {
    dir: StoreDir,
    minor: u8,
    /// For the builds that are asked for.
    pub options: BuildOptions,
    line: Mutex<Ends>,
}

struct Ends {
    input: Box<dyn BufRead + Send>,
    output: Box<dyn Write + Send>,
    broken: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("minor", &self.minor).finish_non_exhaustive()
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> StoreError {
    StoreError::new(ErrorKind::Other, error)
}

fn cannot(what: &str) -> StoreError {
    StoreError::unsupported(&format!("a store over 'ssh://' cannot {what}; 'ssh-ng://' can"))
}

/// What goes to the other side after the fields of a request.
type Contents<'a> = Option<&'a mut dyn FnMut(&mut dyn Write) -> Result<(), StoreError>>;

impl Client {
    /// Greets the other side; `newest` is the minor version that is offered, usually [`MINOR`].
    pub fn connect(
        mut input: Box<dyn BufRead + Send>,
        mut output: Box<dyn Write + Send>,
        dir: StoreDir,
        newest: u8,
    ) -> Result<Self, StoreError> {
        let minor = connect(&mut *input, &mut *output, &dir, newest.min(MINOR)).map_err(failed)?;
        let line = Mutex::new(Ends { input, output, broken: false });
        Ok(Self { dir, minor, options: BuildOptions::default(), line })
    }

    /// The minor version that both speak.
    pub const fn minor(&self) -> u8 {
        self.minor
    }

    fn ends(&self) -> Result<MutexGuard<'_, Ends>, StoreError> {
        let ends = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if ends.broken { Err(failed(Broken)) } else { Ok(ends) }
    }

    fn call_with<C: Command, T>(
        &self,
        command: &C,
        data: Contents<'_>,
        after: impl FnOnce(C::Reply, &mut dyn BufRead) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut guard = self.ends()?;
        let ends = &mut *guard;
        // Until all is read, nobody knows where the next reply begins.
        ends.broken = true;
        let mut request = Vec::new();
        let mut to = Encoder::new(&mut request, &self.dir, Protocol::Serve(self.minor));
        to.word(C::CODE);
        command.write(&mut to);
        let lost = |error| failed(WireError::Write(error));
        ends.output.write_all(&request).map_err(lost)?;
        if let Some(send) = data {
            send(&mut *ends.output)?;
        }
        ends.output.flush().map_err(lost)?;
        let reply = C::Reply::read(&mut decoder(&mut *ends.input, &self.dir, self.minor, &Budget::unlimited()));
        let value = after(reply.map_err(failed)?, &mut *ends.input)?;
        ends.broken = false;
        Ok(value)
    }

    fn call<C: Command>(&self, command: &C) -> Result<C::Reply, StoreError> {
        self.call_with(command, None, |reply, _| Ok(reply))
    }

    fn need(&self, minor: u8, operation: &'static str) -> Result<(), StoreError> {
        if self.minor >= minor { Ok(()) } else { Err(failed(WireError::TooOld { operation, minor: self.minor })) }
    }

    /// The records of the valid ones among some paths.
    pub fn records(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<PathInfo>, StoreError> {
        self.need(4, "QueryPathInfos with hashes")?;
        let found = self.call(&ops::QueryPathInfos { paths: paths.clone() })?;
        Ok(found.0.into_iter().filter_map(ops::Record::into_info).collect())
    }

    /// The valid ones among some paths; with `lock` all become temporary roots of the other process
    /// first, and with `substitute` it tries to fetch those that are not valid.
    pub fn query_valid(
        &self,
        paths: &BTreeSet<StorePath>,
        lock: bool,
        substitute: bool,
    ) -> Result<BTreeSet<StorePath>, StoreError> {
        self.call(&ops::QueryValidPaths { lock, substitute, paths: paths.clone() })
    }

    /// Sends an object in the old way, as a stream of one.
    fn export_one(&self, info: &PathInfo, source: &mut dyn Read) -> Result<(), StoreError> {
        let mut send = |out: &mut dyn Write| {
            let mut framing = Vec::new();
            write_lead(&mut framing, Next::Object);
            out.write_all(&framing)?;
            io::copy(source, out)?;
            framing.clear();
            let references = info.references.iter().map(Into::into);
            let deriver = info.deriver.as_ref().map(Into::into);
            write_trailer(&mut framing, &self.dir, (&info.path).into(), references, deriver);
            write_lead(&mut framing, Next::End);
            Ok(out.write_all(&framing)?)
        };
        self.call_with(&ops::ImportPaths {}, Some(&mut send), |_, _| Ok(()))
    }

    /// A derivation that the other side has.
    pub fn derivation(&self, drv: &StorePath) -> Result<Derivation, StoreError> {
        let mut nar = Limited { bytes: Vec::new(), most: MAX_DERIVATION };
        self.nar(drv, &mut nar)?;
        let (mut parser, mut rest, mut text) = (Parser::default(), nar.bytes.as_slice(), Vec::new());
        while let Some(event) = parser.next(&mut rest).map_err(failed)? {
            if let Event::Contents(bytes) = event {
                text.extend_from_slice(bytes);
            }
        }
        let name = name_of(drv).map_err(failed)?;
        aterm::parse(&self.dir, &name, &text).map_err(failed)
    }
}

/// Keeps so many bytes, and no more.
struct Limited {
    bytes: Vec<u8>,
    most: u64,
}

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.bytes.len() + bytes.len()) as u64 > self.most {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ReadStore for Client {
    fn dir(&self) -> &StoreDir {
        &self.dir
    }
    fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, StoreError> {
        Ok(self.records(&[path.clone()].into())?.into_iter().find(|info| info.path == *path))
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>, StoreError> {
        let found = self.records(&paths.iter().cloned().collect())?;
        let found: BTreeMap<StorePath, PathInfo> = found.into_iter().map(|info| (info.path.clone(), info)).collect();
        Ok(paths.iter().map(|path| found.get(path).cloned()).collect())
    }
    fn is_valid(&self, path: &StorePath) -> Result<bool, StoreError> {
        Ok(!self.valid_subset(&[path.clone()].into())?.is_empty())
    }
    fn valid_subset(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, StoreError> {
        self.query_valid(paths, false, false)
    }
    fn all_paths(&self) -> Result<BTreeSet<StorePath>, StoreError> {
        Err(cannot("list its paths"))
    }
    fn referrers(&self, _path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        Err(cannot("tell what refers to a path"))
    }
    fn valid_derivers(&self, _path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        Err(cannot("tell what made a path"))
    }
    fn by_hash_part(&self, _hash_part: HashPart) -> Result<Option<StorePath>, StoreError> {
        Err(cannot("find a path by its hash part"))
    }
    fn derivation_outputs(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>, StoreError> {
        let drv = self.derivation(drv)?;
        Ok(drv.output_paths().map(|(name, path)| (name.clone(), path.cloned())).collect())
    }
    fn realisation(&self, _id: &DrvOutput) -> Result<Option<Realisation>, StoreError> {
        Ok(None)
    }
    fn closure(&self, paths: &BTreeSet<StorePath>, include_outputs: bool) -> Result<BTreeSet<StorePath>, StoreError> {
        self.call(&ops::QueryClosure { include_outputs, paths: paths.clone() })
    }
    fn sorted(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, StoreError> {
        order(&self.dir, self.records(paths)?.into_iter().map(|info| (info.path, info.references)).collect())
    }
    fn nar(&self, path: &StorePath, out: &mut dyn Write) -> Result<(), StoreError> {
        self.call_with(&ops::DumpStorePath { path: path.clone() }, None, |(), input| {
            Ok(BareNar::new(input).copy_to(out)?)
        })
    }
}

impl Store for Client {
    fn add_temp_roots(&self, paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
        self.query_valid(paths, true, false).map(drop)
    }
    fn hold_valid(&self, paths: &BTreeSet<StorePath>, substitute: bool) -> Result<BTreeSet<StorePath>, StoreError> {
        self.query_valid(paths, true, substitute)
    }
    fn add_indirect_root(&self, _link: &Path) -> Result<(), StoreError> {
        Err(cannot("have roots"))
    }
    fn add_root(&self, _path: &StorePath, _link: &Path) -> Result<(), StoreError> {
        Err(cannot("have roots"))
    }
    fn roots(&self) -> Result<Vec<RootLink>, StoreError> {
        Err(cannot("list roots"))
    }
    fn collect(&self, _what: &Collect, _max_freed_bytes: u64) -> Result<Collected, StoreError> {
        Err(cannot("collect garbage"))
    }
    fn add_content(&self, _new: &NewContent, _source: &mut dyn Read) -> Result<PathInfo, StoreError> {
        Err(cannot("add files"))
    }
    fn add_nars(&self, source: &mut dyn NarSource, options: AddOptions) -> Result<(), StoreError> {
        if options.repair {
            return Err(cannot("replace what is there"));
        }
        while let Some(info) = source.next_object()? {
            if self.minor < 5 {
                self.export_one(&info, &mut &mut *source)?;
                continue;
            }
            let mut send = |out: &mut dyn Write| {
                let sent = io::copy(&mut (&mut *source).take(info.nar_size_bytes), out)?;
                if sent < info.nar_size_bytes {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                }
                Ok(())
            };
            let ask = ops::AddToStoreNar { info: NarRecord(info.clone()) };
            self.call_with(&ask, Some(&mut send), |_, _| Ok(()))?;
        }
        Ok(())
    }
    fn import(&self, _source: &mut dyn BufRead) -> Result<Vec<StorePath>, StoreError> {
        Err(StoreError::unsupported("an export stream cannot be sent to another machine whole, only object by object"))
    }
    fn add_signatures(&self, _path: &StorePath, _signatures: &BTreeSet<Signature>) -> Result<(), StoreError> {
        Err(cannot("add signatures"))
    }
    fn add_realisation(&self, _realisation: &Realisation) -> Result<(), StoreError> {
        Err(cannot("register realisations"))
    }
    fn add_build_log(&self, _drv: &StorePath, _source: &mut dyn Read) -> Result<(), StoreError> {
        Err(cannot("keep build logs"))
    }
    fn optimise(&self) -> Result<(), StoreError> {
        Err(cannot("optimise itself"))
    }
    fn verify(&self, _check_contents: bool, _repair: bool) -> Result<bool, StoreError> {
        Err(cannot("verify itself"))
    }
    fn missing(&self, targets: &[DerivedPath]) -> Result<Missing, StoreError> {
        // What it takes to build them only the other side knows.
        let paths: BTreeSet<StorePath> = targets.iter().map(|target| target.path().clone()).collect();
        let valid = self.valid_subset(&paths)?;
        Ok(Missing { unknown: paths.difference(&valid).cloned().collect(), ..Missing::default() })
    }
    fn substitutable(
        &self,
        _paths: &BTreeMap<StorePath, Option<ContentAddress>>,
    ) -> Result<Vec<Substitutable>, StoreError> {
        Ok(Vec::new())
    }
    fn build(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<Vec<BuildResult>, StoreError> {
        let each = |target: &DerivedPath| match self.realise(std::slice::from_ref(target), mode) {
            Ok(()) => Ok(BuildResult { status: BuildStatus::Built, ..BuildResult::default() }),
            Err(error) if matches!(error.kind, ErrorKind::BuildFailed { .. }) => {
                let error = larder_core::report::chain(&error);
                Ok(BuildResult { status: BuildStatus::MiscFailure, error, ..BuildResult::default() })
            }
            Err(error) => Err(error),
        };
        targets.iter().map(each).collect()
    }
    fn realise(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<(), StoreError> {
        if mode != BuildMode::Normal {
            return Err(cannot("check or repair"));
        }
        let ask = ops::BuildPaths { targets: targets.to_vec(), options: self.options.clone() };
        self.call(&ask)?.0.map_err(|(status, text)| {
            let kind = ErrorKind::BuildFailed { status: u8::try_from(status).unwrap_or(1) };
            StoreError::new(kind, text)
        })
    }
    fn build_derivation(&self, path: &StorePath, drv: &Derivation, mode: BuildMode) -> Result<BuildResult, StoreError> {
        self.need(1, "BuildDerivation")?;
        if mode != BuildMode::Normal {
            return Err(cannot("check or repair"));
        }
        let derivation = BasicDerivation { path: path.clone(), drv: drv.clone() };
        self.call(&ops::BuildDerivation { derivation, options: self.options.clone() })
    }
}
