//! The client's side: a store behind a daemon.
//!
//! Requests go one at a time. What the server says while it works goes to a [`Reporter`]. After an
//! error of the server the connection goes on; after any other it is given up. Source: protocols,
//! section 2.4.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error::Error;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use larder_core::api::{
    AddOptions, BuildMode, BuildResult, BuildStatus, Collect, Collected, DerivedPath, ErrorKind, Missing, NarSource,
    NewContent, ReadStore, RootLink, Store, StoreError, Substitutable,
};
use larder_core::content_address::ContentAddress;
use larder_core::derivation::{Derivation, OutputName};
use larder_core::hash_part::HashPart;
use larder_core::path_info::PathInfo;
use larder_core::realisation::{DrvOutput, Realisation};
use larder_core::report::{Level, Reporter, Start};
use larder_core::signature::Signature;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use super::MINOR;
use super::activity::Fields;
use super::handshake::{Agreed, connect};
use super::message::{ErrorMessage, Message};
use super::ops::{self, AddWhat, FoundRealisation, GcAction, Operation, RegisteredOutput, Wanted};
use crate::codec::{Budget, Decoder, Encoder, Protocol, WireError};
use crate::order::order;
use crate::stream::{BareNar, FramedWriter};
use crate::value::{BaseName, BasicDerivation, FilePath, Flag, Obsolete, WholeInfo, Wire as _};

/// An error that the server reports, with where it came from.
#[derive(Debug, thiserror::Error)]
#[error("{}", text.trim_start_matches("error: "))]
pub struct RemoteError {
    text: String,
    pub traces: Vec<String>,
}

/// Questions that are asked before the first reply is read. Each takes a few hundred bytes.
const AHEAD: usize = 128;

/// Activities of a server that are followed at a time; others are told as they begin.
const MAX_ACTIVITIES: usize = 1 << 16;

/// The connection was given up after an error, so nothing can be asked any more.
#[derive(Debug, thiserror::Error)]
#[error("the connection to the daemon has been given up after an earlier error")]
struct Broken;

/// A store behind a connection.
pub struct Client {
    dir: StoreDir,
    agreed: Agreed,
    reporter: Arc<dyn Reporter + Send + Sync>,
    line: Mutex<Ends>,
}

struct Ends {
    input: Box<dyn BufRead + Send>,
    output: Box<dyn Write + Send>,
    broken: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("agreed", &self.agreed).finish_non_exhaustive()
    }
}

fn failed(error: impl Error + Send + Sync + 'static) -> StoreError {
    StoreError::new(ErrorKind::Other, error)
}

/// What goes to the server after the fields of a request.
type Contents<'a> = Option<&'a mut dyn FnMut(&mut dyn Write) -> io::Result<()>>;

/// A source whose failure is kept.
struct Watched<'a> {
    source: &'a mut dyn Read,
    failure: Option<io::Error>,
}

impl Read for Watched<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let outcome = self.source.read(into);
        match outcome {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                let kind = error.kind();
                self.failure = Some(error);
                Err(kind.into())
            }
            outcome => outcome,
        }
    }
}

impl Client {
    /// Greets the server; `newest` is the minor version that is offered, usually [`MINOR`].
    pub fn connect(
        mut input: Box<dyn BufRead + Send>,
        mut output: Box<dyn Write + Send>,
        dir: StoreDir,
        newest: u8,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, StoreError> {
        let agreed = connect(&mut *input, &mut *output, &dir, newest.min(MINOR)).map_err(failed)?;
        let client = Self { dir, agreed, reporter, line: Mutex::new(Ends { input, output, broken: false }) };
        {
            let mut ends = client.ends()?;
            client.settle(&mut ends)?;
        }
        Ok(client)
    }

    /// What both sides know of each other.
    pub const fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    const fn protocol(&self) -> Protocol {
        Protocol::Worker(self.agreed.minor)
    }

    fn ends(&self) -> Result<MutexGuard<'_, Ends>, StoreError> {
        let ends = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if ends.broken { Err(failed(Broken)) } else { Ok(ends) }
    }

    fn decode<T>(
        &self,
        input: &mut dyn BufRead,
        read: impl FnOnce(&mut Decoder<'_>) -> Result<T, WireError>,
    ) -> Result<T, WireError> {
        read(&mut Decoder::new(input, &self.dir, self.protocol(), Budget::unlimited()))
    }

    /// Reads messages until the work is done.
    fn messages(&self, input: &mut dyn BufRead) -> Result<Result<(), ErrorMessage>, WireError> {
        // The server's numbers of activities, and those of whoever is told.
        let mut running: HashMap<u64, u64> = HashMap::new();
        let outcome = self.messages_with(input, &mut running);
        for activity in running.into_values() {
            self.reporter.stop(activity);
        }
        outcome
    }

    fn messages_with(
        &self,
        input: &mut dyn BufRead,
        running: &mut HashMap<u64, u64>,
    ) -> Result<Result<(), ErrorMessage>, WireError> {
        loop {
            match self.decode(input, Message::read)? {
                Message::Last => return Ok(Ok(())),
                Message::Error(error) => return Ok(Err(error)),
                Message::Next(text) => {
                    let text = String::from_utf8_lossy(&text);
                    let text = text.trim_end_matches('\n');
                    self.reporter.message(Level::Error, format_args!("{text}"));
                }
                // We send no operation that is answered so.
                Message::Read(_) | Message::Write(_) => return Err(WireError::UnknownMessage { code: 0 }),
                Message::Start { id, level, kind, text, fields, parent } => {
                    let text = String::from_utf8_lossy(&text);
                    let local = self.reporter.start(&Start {
                        level: Level::of_number(level),
                        text: &text,
                        activity: Fields(&fields).activity(kind),
                        parent: running.get(&parent).copied().unwrap_or(0),
                    });
                    if running.len() < MAX_ACTIVITIES {
                        running.insert(id, local);
                    }
                }
                Message::Stop { id } => {
                    if let Some(activity) = running.remove(&id) {
                        self.reporter.stop(activity);
                    }
                }
                Message::Result { id, kind, fields } => {
                    if let (Some(activity), Some(result)) = (running.get(&id), Fields(&fields).result(kind)) {
                        self.reporter.result(*activity, result);
                    }
                }
            }
        }
    }

    /// Waits for the end of the work.
    fn settle(&self, ends: &mut Ends) -> Result<(), StoreError> {
        let outcome = self.messages(&mut *ends.input);
        Self::judge(ends, outcome)
    }

    fn judge(ends: &mut Ends, outcome: Result<Result<(), ErrorMessage>, WireError>) -> Result<(), StoreError> {
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let text = String::from_utf8_lossy(&error.text).into_owned();
                let traces = error.traces.iter().map(|t| String::from_utf8_lossy(t).into_owned()).collect();
                let kind = match u8::try_from(error.status) {
                    Ok(status @ 100..) => ErrorKind::BuildFailed { status },
                    _ if text.ends_with("is not valid") => ErrorKind::NotValid,
                    _ => ErrorKind::Other,
                };
                Err(StoreError::new(kind, RemoteError { text, traces }))
            }
            Err(error) => {
                ends.broken = true;
                Err(failed(error))
            }
        }
    }

    /// Asks, sends data if there is any, and reads the reply; `after` reads what follows it.
    fn call_with<O: Operation, T>(
        &self,
        operation: &O,
        data: Contents<'_>,
        after: impl FnOnce(O::Reply, &mut dyn BufRead) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut guard = self.ends()?;
        let ends = &mut *guard;
        let mut request = Vec::new();
        let mut to = Encoder::new(&mut request, &self.dir, self.protocol());
        to.word(O::CODE);
        operation.write(&mut to);
        // Until all is read, nobody knows where the next reply begins.
        ends.broken = true;
        let broken = |error: io::Error| failed(WireError::Write(error));
        ends.output.write_all(&request).and_then(|()| ends.output.flush()).map_err(broken)?;
        let outcome = match data {
            None => self.messages(&mut *ends.input),
            // The server may say things while we send, and waits for us if we do not listen.
            Some(send) => {
                let (input, output) = (&mut *ends.input, &mut *ends.output);
                let (sent, outcome) = std::thread::scope(|scope| {
                    let listening = scope.spawn(|| self.messages(input));
                    let sent = send(output);
                    let flushed = output.flush();
                    (sent.and(flushed), listening.join())
                });
                let outcome = outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                // An error of the server tells more than that it did not take everything.
                if !matches!(outcome, Ok(Err(_))) {
                    sent.map_err(broken)?;
                }
                outcome
            }
        };
        let in_step = outcome.is_ok();
        ends.broken = !in_step;
        Self::judge(ends, outcome)?;
        ends.broken = true;
        let reply = self.decode(&mut *ends.input, O::Reply::read).map_err(failed)?;
        let value = after(reply, &mut *ends.input)?;
        ends.broken = false;
        Ok(value)
    }

    /// Asks several times before the first reply is read, so that nobody waits for the other's
    /// next turn. Together they must fit into the buffers of a socket.
    fn call_all<O: Operation>(&self, operations: &[O]) -> Result<Vec<O::Reply>, StoreError> {
        let mut guard = self.ends()?;
        let ends = &mut *guard;
        ends.broken = true;
        let mut requests = Vec::new();
        let mut to = Encoder::new(&mut requests, &self.dir, self.protocol());
        for operation in operations {
            to.word(O::CODE);
            operation.write(&mut to);
        }
        let broken = |error: io::Error| failed(WireError::Write(error));
        ends.output.write_all(&requests).and_then(|()| ends.output.flush()).map_err(broken)?;
        let (mut replies, mut first_error) = (Vec::with_capacity(operations.len()), None);
        for _ in operations {
            let outcome = self.messages(&mut *ends.input);
            let is_lost = outcome.is_err();
            match Self::judge(ends, outcome) {
                Ok(()) => replies.push(self.decode(&mut *ends.input, O::Reply::read).map_err(failed)?),
                Err(error) if is_lost => return Err(error),
                // The others are answered all the same.
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        ends.broken = false;
        first_error.map_or(Ok(replies), Err)
    }

    /// Asks, and gives the reply.
    pub fn call<O: Operation>(&self, operation: &O) -> Result<O::Reply, StoreError> {
        self.call_with(operation, None, |reply, _| Ok(reply))
    }

    /// The same with contents in frames.
    fn call_framed<O: Operation>(&self, operation: &O, source: &mut dyn Read) -> Result<O::Reply, StoreError> {
        let mut source = Watched { source, failure: None };
        let mut send = |out: &mut dyn Write| {
            let mut framed = FramedWriter::new(out);
            let copied = framed.copy_from(&mut source);
            // A source that fails is no reason to have the server wait for the rest, and to wait for it.
            // An archive that is not whole it refuses; of a flat file it may keep what has come.
            let finished = framed.finish();
            copied.and(finished)
        };
        let outcome = self.call_with(operation, Some(&mut send), |reply, _| Ok(reply));
        match source.failure {
            // What the server makes of that says less.
            Some(failure) if outcome.is_err() => Err(failure.into()),
            _ => outcome,
        }
    }

    /// For servers that tell no results: an error is that of the one target.
    fn build_one_by_one(&self, targets: &[DerivedPath], mode: BuildMode) -> Vec<BuildResult> {
        let each = |target: &DerivedPath| match self.realise(std::slice::from_ref(target), mode) {
            Ok(()) => BuildResult { status: BuildStatus::Built, ..BuildResult::default() },
            Err(error) => {
                let error = larder_core::report::chain(&error);
                BuildResult { status: BuildStatus::MiscFailure, error, ..BuildResult::default() }
            }
        };
        targets.iter().map(each).collect()
    }

    fn need(&self, minor: u8, operation: &'static str) -> Result<(), StoreError> {
        if self.agreed.minor >= minor {
            return Ok(());
        }
        Err(failed(WireError::TooOld { operation, minor: self.agreed.minor }))
    }
}

impl ReadStore for Client {
    fn dir(&self) -> &StoreDir {
        &self.dir
    }
    fn info(&self, path: &StorePath) -> Result<Option<PathInfo>, StoreError> {
        match self.call(&ops::QueryPathInfo { path: path.clone() }) {
            Ok(found) => Ok(found.0.map(|info| info.of(path.clone()))),
            // Servers of old know no other way to say so.
            Err(error) if self.agreed.minor < 17 && error.kind == ErrorKind::NotValid => Ok(None),
            Err(error) => Err(error),
        }
    }
    fn infos(&self, paths: &[StorePath]) -> Result<Vec<Option<PathInfo>>, StoreError> {
        if self.agreed.minor < 17 {
            return paths.iter().map(|path| self.info(path)).collect();
        }
        let mut infos = Vec::with_capacity(paths.len());
        for paths in paths.chunks(AHEAD) {
            let asked: Vec<_> = paths.iter().map(|path| ops::QueryPathInfo { path: path.clone() }).collect();
            let found = self.call_all(&asked)?;
            infos.extend(paths.iter().zip(found).map(|(path, found)| found.0.map(|info| info.of(path.clone()))));
        }
        Ok(infos)
    }
    fn is_valid(&self, path: &StorePath) -> Result<bool, StoreError> {
        self.call(&ops::IsValidPath { path: path.clone() })
    }
    fn valid_subset(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, StoreError> {
        self.call(&ops::QueryValidPaths { paths: paths.clone(), substitute: false })
    }
    fn all_paths(&self) -> Result<BTreeSet<StorePath>, StoreError> {
        self.call(&ops::QueryAllValidPaths {})
    }
    fn referrers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        self.call(&ops::QueryReferrers { path: path.clone() })
    }
    fn valid_derivers(&self, path: &StorePath) -> Result<BTreeSet<StorePath>, StoreError> {
        self.call(&ops::QueryValidDerivers { path: path.clone() })
    }
    fn by_hash_part(&self, hash_part: HashPart) -> Result<Option<StorePath>, StoreError> {
        self.call(&ops::QueryPathFromHashPart { hash_part })
    }
    fn derivation_outputs(&self, drv: &StorePath) -> Result<BTreeMap<OutputName, Option<StorePath>>, StoreError> {
        self.need(22, "QueryDerivationOutputMap")?;
        self.call(&ops::QueryDerivationOutputMap { drv: drv.clone() })
    }
    fn derivations_outputs(
        &self,
        drvs: &[&StorePath],
    ) -> Result<Vec<BTreeMap<OutputName, Option<StorePath>>>, StoreError> {
        self.need(22, "QueryDerivationOutputMap")?;
        let mut all = Vec::with_capacity(drvs.len());
        for drvs in drvs.chunks(AHEAD) {
            let asked: Vec<_> = drvs.iter().map(|drv| ops::QueryDerivationOutputMap { drv: (*drv).clone() }).collect();
            all.extend(self.call_all(&asked)?);
        }
        Ok(all)
    }
    fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, StoreError> {
        self.need(31, "QueryRealisation")?;
        match self.call(&ops::QueryRealisation { id: id.clone() })? {
            FoundRealisation::Whole(list) => Ok(list.into_iter().next()),
            FoundRealisation::Paths(_) => Ok(None),
        }
    }
    fn closure(&self, paths: &BTreeSet<StorePath>, include_outputs: bool) -> Result<BTreeSet<StorePath>, StoreError> {
        if let Some(list) = self.listed_closure(paths, include_outputs)? {
            return Ok(list.into_iter().collect());
        }
        // All that is new is asked for at once.
        let mut closure = paths.clone();
        let mut level: Vec<StorePath> = paths.iter().cloned().collect();
        while !level.is_empty() {
            let mut next = Vec::new();
            for (path, info) in level.iter().zip(self.infos(&level)?) {
                let mut near = info.ok_or_else(|| StoreError::not_valid(&self.dir, path))?.references;
                if include_outputs && path.is_derivation() {
                    let outputs: BTreeSet<StorePath> = self.derivation_outputs(path)?.into_values().flatten().collect();
                    near.extend(self.valid_subset(&outputs)?);
                }
                next.extend(near.into_iter().filter(|path| closure.insert(path.clone())));
            }
            level = next;
        }
        Ok(closure)
    }
    fn listed_closure(
        &self,
        paths: &BTreeSet<StorePath>,
        include_outputs: bool,
    ) -> Result<Option<Vec<StorePath>>, StoreError> {
        if !self.agreed.closures {
            return Ok(None);
        }
        let ask = ops::QueryClosure { paths: paths.clone(), include_outputs: Flag(include_outputs) };
        self.call(&ask).map(Some)
    }
    fn sorted(&self, paths: &BTreeSet<StorePath>) -> Result<Vec<StorePath>, StoreError> {
        let list: Vec<StorePath> = paths.iter().cloned().collect();
        let infos = self.infos(&list)?;
        let references = infos.into_iter().map(|info| info.map(|info| info.references).unwrap_or_default());
        order(&self.dir, list.into_iter().zip(references).collect())
    }
    fn nar(&self, path: &StorePath, out: &mut dyn Write) -> Result<(), StoreError> {
        self.call_with(
            &ops::NarFromPath { path: path.clone() },
            None,
            |(), input| Ok(BareNar::new(input).copy_to(out)?),
        )
    }
}

impl Store for Client {
    fn add_temp_roots(&self, paths: &BTreeSet<StorePath>) -> Result<(), StoreError> {
        let asked: Vec<_> = paths.iter().map(|path| ops::AddTempRoot { path: path.clone() }).collect();
        for some in asked.chunks(AHEAD) {
            self.call_all(some)?;
        }
        Ok(())
    }
    fn hold_valid(&self, paths: &BTreeSet<StorePath>, substitute: bool) -> Result<BTreeSet<StorePath>, StoreError> {
        self.add_temp_roots(paths)?;
        self.call(&ops::QueryValidPaths { paths: paths.clone(), substitute })
    }
    fn add_indirect_root(&self, link: &Path) -> Result<(), StoreError> {
        let link = FilePath(link.as_os_str().as_bytes().to_vec());
        self.call(&ops::AddIndirectRoot { link }).map(drop)
    }
    fn add_root(&self, path: &StorePath, link: &Path) -> Result<(), StoreError> {
        self.need(36, "AddPermRoot")?;
        let link = FilePath(link.as_os_str().as_bytes().to_vec());
        self.call(&ops::AddPermRoot { path: path.clone(), link }).map(drop)
    }
    fn roots(&self) -> Result<Vec<RootLink>, StoreError> {
        self.call(&ops::FindRoots {})
    }
    fn collect(&self, what: &Collect, max_freed_bytes: u64) -> Result<Collected, StoreError> {
        let (action, paths) = match what {
            Collect::ListLive => (GcAction::ReturnLive, BTreeSet::new()),
            Collect::ListDead => (GcAction::ReturnDead, BTreeSet::new()),
            Collect::DeleteDead => (GcAction::DeleteDead, BTreeSet::new()),
            Collect::DeleteSpecific(paths) => (GcAction::DeleteSpecific, paths.clone()),
        };
        let done = self.call(&ops::CollectGarbage {
            action,
            paths,
            ignore_liveness: Flag(false),
            max_freed_bytes,
            obsolete_1: Obsolete,
            obsolete_2: Obsolete,
            obsolete_3: Obsolete,
        })?;
        Ok(Collected { paths: done.paths.into_iter().map(|path| path.0).collect(), bytes_freed: done.bytes_freed })
    }
    fn add_content(&self, new: &NewContent, source: &mut dyn Read) -> Result<PathInfo, StoreError> {
        self.need(25, "AddToStore")?;
        let what = AddWhat::Content {
            name: new.name.clone(),
            method: new.method,
            references: new.references.clone(),
            repair: new.repair,
        };
        let added = self.call_framed(&ops::AddToStore { what }, source)?;
        let info = added.info.ok_or_else(|| StoreError::not_valid(&self.dir, &added.path))?;
        Ok(info.of(added.path))
    }
    fn add_nars(&self, source: &mut dyn NarSource, options: AddOptions) -> Result<(), StoreError> {
        self.need(23, "AddToStoreNar")?;
        while let Some(info) = source.next_object()? {
            let ask = ops::AddToStoreNar {
                info: WholeInfo(info),
                repair: Flag(options.repair),
                dont_check_signatures: Flag(!options.check_signatures),
            };
            let mut nar: &mut dyn NarSource = &mut *source;
            self.call_framed(&ask, &mut nar)?;
        }
        Ok(())
    }
    fn import(&self, _source: &mut dyn BufRead) -> Result<Vec<StorePath>, StoreError> {
        Err(StoreError::unsupported("an export stream cannot be sent to a daemon whole, only object by object"))
    }
    fn add_signatures(&self, path: &StorePath, signatures: &BTreeSet<Signature>) -> Result<(), StoreError> {
        let ask = ops::AddSignatures { path: path.clone(), signatures: signatures.clone() };
        self.call(&ask).map(drop)
    }
    fn add_realisation(&self, realisation: &Realisation) -> Result<(), StoreError> {
        self.need(27, "RegisterDrvOutput")?;
        self.call(&ops::RegisterDrvOutput { realisation: RegisteredOutput(realisation.clone()) })
    }
    fn add_build_log(&self, drv: &StorePath, source: &mut dyn Read) -> Result<(), StoreError> {
        self.need(33, "AddBuildLog")?;
        self.call_framed(&ops::AddBuildLog { drv: BaseName(drv.clone()) }, source).map(drop)
    }
    fn optimise(&self) -> Result<(), StoreError> {
        self.call(&ops::OptimiseStore {}).map(drop)
    }
    fn verify(&self, check_contents: bool, repair: bool) -> Result<bool, StoreError> {
        self.call(&ops::VerifyStore { check_contents: Flag(check_contents), repair: Flag(repair) })
    }
    fn missing(&self, targets: &[DerivedPath]) -> Result<Missing, StoreError> {
        self.need(19, "QueryMissing")?;
        self.call(&ops::QueryMissing { targets: targets.to_vec() })
    }
    fn substitutable(
        &self,
        paths: &BTreeMap<StorePath, Option<ContentAddress>>,
    ) -> Result<Vec<Substitutable>, StoreError> {
        self.need(12, "QuerySubstitutablePathInfos")?;
        self.call(&ops::QuerySubstitutablePathInfos { paths: Wanted(paths.clone()) })
    }
    fn build(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<Vec<BuildResult>, StoreError> {
        if self.agreed.minor < 34 {
            return Ok(self.build_one_by_one(targets, mode));
        }
        let results = self.call(&ops::BuildPathsWithResults { targets: targets.to_vec(), mode })?;
        // In whatever order they came.
        let mut found: BTreeMap<DerivedPath, BuildResult> =
            results.into_iter().map(|keyed| (keyed.target, keyed.result)).collect();
        Ok(targets.iter().map(|target| found.remove(target).unwrap_or_default()).collect())
    }
    fn realise(&self, targets: &[DerivedPath], mode: BuildMode) -> Result<(), StoreError> {
        if mode != BuildMode::Normal {
            self.need(15, "BuildPaths with a mode")?;
        }
        self.call(&ops::BuildPaths { targets: targets.to_vec(), mode }).map(drop)
    }
    fn build_derivation(&self, path: &StorePath, drv: &Derivation, mode: BuildMode) -> Result<BuildResult, StoreError> {
        let derivation = BasicDerivation { path: path.clone(), drv: drv.clone() };
        self.call(&ops::BuildDerivation { derivation, mode })
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;
    use std::os::unix::net::UnixStream;

    use larder_core::api::ContentMethod;
    use larder_core::content_address::Method;
    use larder_core::hash::{Algorithm, Sha256Digest};
    use larder_core::nar::encoder;
    use larder_core::report::Silent;

    use super::*;
    use crate::testing::{MemoryHost, MemoryStore};
    use crate::worker::server::{Options, serve};
    use crate::worker::tunnel::{Outlet, Steady};

    struct Socket(UnixStream);

    impl Write for Socket {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Outlet for Socket {
        fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
    }

    /// Client and server of this crate, at a version.
    fn with_client(newest: u8, test: impl FnOnce(&Client)) {
        let dir = StoreDir::new("/nix/store").unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let host = MemoryHost { store: MemoryStore::new(dir.clone()) };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut input = BufReader::new(far.try_clone().unwrap());
                let options = Options::new("9.9", true, Budget::unlimited());
                serve(&mut input, Box::new(Socket(far)), Box::new(Steady), &host, &options).unwrap();
            });
            let input = Box::new(BufReader::new(near.try_clone().unwrap()));
            let client = Client::connect(input, Box::new(near), dir, newest, Arc::new(Silent)).unwrap();
            assert_eq!(client.agreed().minor, newest);
            test(&client);
        });
        host.store.check();
    }

    #[test]
    fn a_store_behind_a_connection() {
        for newest in [25, 32, 38] {
            with_client(newest, |client| {
                let nar = encoder::file(&vec![7; 300_000], false);
                let new = NewContent {
                    name: "x".parse().unwrap(),
                    method: ContentMethod::Fixed(Method::Recursive, Algorithm::Sha256),
                    references: BTreeSet::new(),
                    is_nar: true,
                    repair: false,
                };
                let added = client.add_content(&new, &mut &nar[..]).unwrap();
                assert_eq!(client.info(&added.path).unwrap().unwrap(), added);
                assert_eq!(client.by_hash_part(added.path.hash_part()).unwrap().as_ref(), Some(&added.path));
                assert_eq!(client.all_paths().unwrap(), BTreeSet::from([added.path.clone()]));
                let mut back = Vec::new();
                client.nar(&added.path, &mut back).unwrap();
                assert_eq!(back, nar);
                // An error of the server, also amid data, leaves the connection as it was.
                let bad = client.add_content(&new, &mut vec![9; 300_000].as_slice()).unwrap_err();
                assert!(bad.to_string().starts_with("bad archive"), "{bad}");
                let none = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-none".parse().unwrap();
                let error = client.nar(&none, &mut Vec::new()).unwrap_err();
                assert_eq!(error.kind, ErrorKind::NotValid);
                assert!(!client.is_valid(&none).unwrap());
                assert_eq!(client.info(&none).unwrap(), None);
            });
        }
    }

    /// The server hears that there is no more, and the connection goes on.
    #[test]
    fn a_source_that_fails_ends_the_operation() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("torn"))
            }
        }
        for newest in [25, 38] {
            with_client(newest, |client| {
                let new = NewContent {
                    name: "x".parse().unwrap(),
                    method: ContentMethod::Fixed(Method::Recursive, Algorithm::Sha256),
                    references: BTreeSet::new(),
                    is_nar: true,
                    repair: false,
                };
                let nar = encoder::file(&vec![7; 100_000], false);
                for cut in [0, 50_000] {
                    let error = client.add_content(&new, &mut nar[..cut].chain(Failing)).unwrap_err();
                    assert!(error.to_string().contains("torn"), "{newest} {cut}: {error}");
                    assert_eq!(client.all_paths().unwrap(), BTreeSet::new());
                }
                client.add_content(&new, &mut &nar[..]).unwrap();
            });
        }
    }

    /// Objects that all have the same archive, which is the last field as far as it was not read.
    struct Objects<'a>(std::slice::Iter<'a, PathInfo>, &'a [u8], &'a [u8]);
    impl Read for Objects<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            self.2.read(into)
        }
    }
    impl NarSource for Objects<'_> {
        fn next_object(&mut self) -> Result<Option<PathInfo>, StoreError> {
            self.2 = self.1;
            Ok(self.0.next().cloned())
        }
    }

    /// Ours tell a closure at once; of others it is found out level by level, and comes to the same.
    #[test]
    fn closures() {
        let nar = encoder::file(b"contents", false);
        let path = |n: usize| -> StorePath { format!("{n}c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x").parse().unwrap() };
        let all: Vec<PathInfo> = [vec![], vec![0], vec![0, 1], vec![], vec![3, 2, 4]]
            .into_iter()
            .enumerate()
            .map(|(n, near): (usize, Vec<usize>)| {
                let mut info = PathInfo::new(path(n), Sha256Digest::of(&nar), nar.len() as u64);
                info.references = near.into_iter().map(path).collect();
                info
            })
            .collect();
        for newest in [25, 37, 38] {
            with_client(newest, |client| {
                assert_eq!(client.agreed().closures, newest >= 38);
                client.add_nars(&mut Objects(all.iter(), &nar, &nar), AddOptions::default()).unwrap();
                for (roots, wanted) in [(vec![], vec![]), (vec![2], vec![0, 1, 2]), (vec![4, 1], vec![0, 1, 2, 3, 4])] {
                    let roots = roots.into_iter().map(path).collect();
                    let wanted: BTreeSet<StorePath> = wanted.into_iter().map(path).collect();
                    assert_eq!(client.closure(&roots, false).unwrap(), wanted, "1.{newest}");
                    let listed = client.listed_closure(&roots, false).unwrap();
                    assert_eq!(listed.is_some(), newest >= 38);
                    for list in listed.into_iter().chain([client.sorted(&wanted).unwrap()]) {
                        assert_eq!(list.iter().cloned().collect::<BTreeSet<_>>(), wanted);
                        for (at, path) in list.iter().enumerate() {
                            let near = client.info(path).unwrap().unwrap().references;
                            assert!(near.iter().all(|p| p == path || list[..at].contains(p)), "{list:?}");
                        }
                    }
                }
                let error = client.closure(&[path(7)].into(), false).unwrap_err();
                assert_eq!((error.kind, error.to_string()), {
                    (ErrorKind::NotValid, format!("path '/nix/store/{}' is not valid", path(7)))
                });
                assert!(client.is_valid(&path(4)).unwrap());
            });
        }
    }

    #[test]
    fn servers_of_old() {
        with_client(16, |client| {
            let none = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-none".parse().unwrap();
            assert_eq!(client.info(&none).unwrap(), None);
            assert!(client.missing(&[]).unwrap_err().to_string().contains("newer version"));
            assert!(!client.is_valid(&none).unwrap());
        });
    }

    /// After anything else than an error of the server, nothing is asked any more.
    #[test]
    fn broken_connections_stay_broken() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let said = words(&[0x6478_696f, 0x10a, 0x616c_7473, 0x616c_7473, 7, 0x616c_7473, 0]);
        let input = Box::new(io::Cursor::new(said));
        let client = Client::connect(input, Box::new(io::sink()), dir, MINOR, Arc::new(Silent)).unwrap();
        let path: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x".parse().unwrap();
        assert!(client.is_valid(&path).unwrap());
        assert!(!client.is_valid(&path).unwrap());
        assert!(client.is_valid(&path).unwrap_err().to_string().contains("unexpected end-of-file"));
        assert!(client.is_valid(&path).unwrap_err().to_string().contains("given up"));
    }
}
