//! The server's side of a connection: reads requests, asks a store, sends replies.
//!
//! What a client that is not trusted may do is decided here; what its settings may be, by the
//! [`Session`]. Source: protocols, sections 2.6 to 2.8.

mod data;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::error::Error;
use std::ffi::OsStr;
use std::io::{BufRead, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use larder_core::api::{
    AddOptions, BuildMode, BuildStatus, Collect, Collected, ContentMethod, DerivedPath, ErrorKind, NewContent, Store,
    StoreError,
};
use larder_core::content_address::Method;
use larder_core::derivation::Kind;
use larder_core::export::write_trailer;
use larder_core::report::{Level, Reporter as _};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use self::data::{ManyObjects, OneObject, Pulled};
use super::handshake::accept;
use super::message::{ErrorMessage, MAX_ERROR};
use super::ops::{
    self, AddWhat, Added, Data, FoundRealisation, GcAction, GcReply, HexHash, NamelessSubstitutable, Operation,
    OptionalInfo, OptionalSubstitutable, Request, SetOptions,
};
use super::tunnel::{Line, MessageWriter, Outlet, Tunnel};
use crate::codec::{Allowance, Budget, Decoder, Encoder, Protocol, WireError};
use crate::stream::{BareNar, Framed, Lookahead};
use crate::value::{FilePath, Info, KeyedResult, One, Wire as _};

/// A store for one connection.
pub trait Session {
    fn store(&self) -> &dyn Store;

    /// Heeds the settings that a client asks for, as far as it may set them. What it may not set
    /// is told to it, and is no error.
    fn configure(&mut self, wishes: &SetOptions, trusted: bool);
}

/// The program around a connection.
pub trait Host: Sync {
    fn dir(&self) -> &StoreDir;

    /// Opens the store for a client, once that has made itself known. The tunnel is for messages.
    fn open(&self, tunnel: Arc<Tunnel>, trusted: bool) -> Result<Box<dyn Session + '_>, StoreError>;
}

/// How a connection is served.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the server calls its own version.
    pub version: String,
    pub trusted: bool,
    /// Memory that all connections share.
    pub budget: Arc<Budget>,
    /// The handshake must be over after this time.
    pub handshake_timeout: Duration,
    /// The fields of a request must be read after this time.
    pub request_timeout: Duration,
    /// Activities get numbers above this one.
    pub first_id: u64,
}

impl Options {
    pub fn new(version: &str, trusted: bool, budget: Arc<Budget>) -> Self {
        Self {
            version: version.to_owned(),
            trusted,
            budget,
            handshake_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_mins(5),
            first_id: u64::from(std::process::id()) << 32,
        }
    }
}

/// Serves a connection until the client goes away.
///
/// An error means that the connection is out of step, and was told to the client if it listens.
pub fn serve(
    input: &mut dyn BufRead,
    mut output: Box<dyn Outlet>,
    line: Box<dyn Line>,
    host: &dyn Host,
    options: &Options,
) -> Result<(), WireError> {
    line.set_deadline(Some(options.handshake_timeout));
    let (agreed, last_words) = accept(input, &mut output, host.dir(), &options.version, options.trusted)?;
    line.set_deadline(None);
    // What is told from here on goes with the last words of the handshake, in one write.
    let tunnel = Tunnel::new(host.dir().clone(), agreed.minor, output, line, options.first_id);
    let tunnel = Arc::new(tunnel.after(last_words));
    let session = match host.open(Arc::clone(&tunnel), options.trusted) {
        Ok(session) => session,
        Err(error) => {
            return tunnel.end(Err(error_message(&error, error.status(), agreed.minor))).map_err(WireError::Write);
        }
    };
    tunnel.reply(&[]).map_err(WireError::Write)?;
    let protocol = Protocol::Worker(agreed.minor);
    let (minor, closures) = (agreed.minor, agreed.closures);
    let mut connection = Connection { session, tunnel, minor, closures, protocol, options, host };
    connection.run(input)
}

/// The error as clients get it, its reasons behind it.
pub(crate) fn error_message(error: &(dyn Error + 'static), status: u8, minor: u8) -> ErrorMessage {
    let mut text = larder_core::report::chain(error);
    if text.len() > MAX_ERROR {
        let end = (0..=MAX_ERROR).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        text.truncate(end);
    }
    if minor < 26 {
        text.insert_str(0, "error: ");
    }
    ErrorMessage { text: text.into_bytes(), status: status.into(), traces: Vec::new() }
}

/// Questions that are answered from one snapshot, at most.
const TOGETHER: usize = 256;

/// Why an operation has no reply.
enum Failure {
    /// The connection is in step, and goes on.
    Kept(StoreError),
    /// Nobody knows what the next bytes are.
    Broken(WireError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Kept(error)
    }
}

/// What goes to the client after the messages.
enum Reply {
    Bytes(Vec<u8>, Allowance),
    /// The NAR of this path.
    Nar(StorePath),
}

struct Connection<'h> {
    session: Box<dyn Session + 'h>,
    tunnel: Arc<Tunnel>,
    minor: u8,
    /// Does the client know `QueryClosure`?
    closures: bool,
    protocol: Protocol,
    options: &'h Options,
    host: &'h dyn Host,
}

fn refused(text: &str) -> Failure {
    Failure::Kept(StoreError::new(ErrorKind::Refused, text))
}

impl Connection<'_> {
    fn run(&mut self, input: &mut dyn BufRead) -> Result<(), WireError> {
        let input = &mut Lookahead::new(input);
        loop {
            // Between requests a client may rest for as long as it likes, and may leave.
            self.tunnel.line().set_resting(true);
            let ended = input.fill_buf()?.is_empty();
            self.tunnel.line().set_resting(false);
            if ended {
                return Ok(());
            }
            self.tunnel.line().set_deadline(Some(self.options.request_timeout));
            let request = self.read_request(input);
            self.tunnel.line().set_deadline(None);
            let outcome = match request {
                Ok((Request::QueryPathInfo(r), _allowance)) if self.answer_together(&r.path, input)? => continue,
                Ok((request, _allowance)) => {
                    self.tunnel.begin();
                    self.perform(request, input)
                }
                Err(error) => Err(Failure::Broken(error)),
            };
            let sent = match outcome {
                Ok(Reply::Bytes(reply, _allowance)) => self.tunnel.reply(&reply),
                Ok(Reply::Nar(path)) => {
                    self.tunnel.reply(&[]).map_err(WireError::Write)?;
                    // An error from here on can only be told by hanging up.
                    let written = self.session.store().nar(&path, &mut self.tunnel.raw());
                    written.map_err(|error| WireError::Write(std::io::Error::other(error)))?;
                    self.tunnel.raw().flush()
                }
                Err(Failure::Kept(error)) if error.kind == ErrorKind::OutOfMemory => {
                    let error = WireError::OutOfMemory;
                    self.tunnel.end(Err(error_message(&error, 1, self.minor))).map_err(WireError::Write)?;
                    return Err(error);
                }
                Err(Failure::Kept(error)) => self.tunnel.end(Err(error_message(&error, error.status(), self.minor))),
                Err(Failure::Broken(error)) => {
                    // The client may be gone, and nobody minds then.
                    let _ = self.tunnel.end(Err(error_message(&error, 1, self.minor)));
                    return Err(error);
                }
            };
            sent.map_err(WireError::Write)?;
        }
    }

    /// Answers a question and those of the same kind that have come behind it, from one snapshot: clients
    /// that walk a closure send many ahead. Not if there are none, or if anything goes wrong: then each
    /// is answered by itself.
    fn answer_together(&self, first: &StorePath, input: &mut Lookahead<'_>) -> Result<bool, WireError> {
        if self.minor < 17 {
            return Ok(false);
        }
        let mut paths = vec![first.clone()];
        let held = input.held()?;
        let mut rest = held;
        let mut allowances = Vec::new();
        while paths.len() < TOGETHER {
            let mut behind = rest;
            match self.read_request(&mut behind) {
                Ok((Request::QueryPathInfo(r), allowance)) => {
                    paths.push(r.path);
                    allowances.push(allowance);
                }
                // Another kind, half a request, or a wrong one: that is found again.
                _ => break,
            }
            rest = behind;
        }
        let used = held.len() - rest.len();
        if used == 0 {
            return Ok(false);
        }
        self.tunnel.begin();
        let Ok(infos) = self.session.store().infos(&paths) else { return Ok(false) };
        let mut allowance = Allowance::new(Arc::clone(&self.options.budget));
        let mut replies = Vec::with_capacity(infos.len());
        for info in infos {
            let mut out = Vec::new();
            OptionalInfo(info.map(Info::new)).write(&mut Encoder::new(&mut out, self.host.dir(), self.protocol));
            if allowance.charge(out.len()).is_err() {
                return Ok(false);
            }
            replies.push(out);
        }
        input.consume(used);
        self.tunnel.reply_all(&replies).map_err(WireError::Write)?;
        Ok(true)
    }

    fn read_request(&self, input: &mut dyn BufRead) -> Result<(Request, Allowance), WireError> {
        let mut from = Decoder::new(input, self.host.dir(), self.protocol, Arc::clone(&self.options.budget));
        let code = from.word()?;
        let request = Request::read(code, &mut from)?;
        Ok((request, from.into_allowance()))
    }

    /// The reply to an operation, which has the type that belongs to it.
    fn reply<O: Operation>(&self, _: &O, reply: &O::Reply) -> Result<Reply, Failure> {
        let mut out = Vec::new();
        reply.write(&mut Encoder::new(&mut out, self.host.dir(), self.protocol));
        // It stays in memory until the client has read it, which may be never.
        let mut allowance = Allowance::new(Arc::clone(&self.options.budget));
        allowance.charge(out.len()).map_err(Failure::Broken)?;
        Ok(Reply::Bytes(out, allowance))
    }

    /// An error unless the client is trusted.
    fn need_trust(&self, text: &str) -> Result<(), Failure> {
        if self.options.trusted { Ok(()) } else { Err(refused(text)) }
    }

    /// Runs `work` on the frames that follow, and reads them to their end whatever came of it.
    fn with_frames<T>(
        input: &mut dyn BufRead,
        work: impl FnOnce(&mut Framed<'_>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut framed = Framed::new(input);
        let outcome = work(&mut framed);
        match (framed.skip(), outcome) {
            (Ok(()), outcome) => outcome,
            (Err(error), _) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(Failure::Broken(WireError::UnexpectedEnd))
            }
            // What the store has said tells more than that the rest cannot be read either.
            (Err(_), Err(Failure::Kept(error))) => Err(Failure::Broken(WireError::Read(std::io::Error::other(error)))),
            (Err(error), _) => Err(Failure::Broken(error.into())),
        }
    }

    /// The same with a NAR that has no frames.
    fn with_nar<T>(
        input: &mut dyn BufRead,
        work: impl FnOnce(&mut BareNar<&mut dyn BufRead>) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut nar = BareNar::new(input);
        let outcome = work(&mut nar);
        match (nar.skip(), outcome) {
            (Ok(()), outcome) => outcome,
            // The store has said what is wrong with the NAR better than the skipping does.
            (Err(_), Err(Failure::Kept(error))) => Err(Failure::Broken(WireError::Read(std::io::Error::other(error)))),
            (Err(error), _) => Err(Failure::Broken(error.into())),
        }
    }

    fn root(&self, path: &StorePath) -> Result<(), StoreError> {
        self.session.store().add_temp_roots(&BTreeSet::from([path.clone()]))
    }

    fn need_valid(&self, path: &StorePath) -> Result<larder_core::path_info::PathInfo, StoreError> {
        self.session.store().info(path)?.ok_or_else(|| StoreError::not_valid(self.host.dir(), path))
    }

    #[expect(clippy::too_many_lines, reason = "a list of like entries, one for each operation")]
    fn perform(&mut self, request: Request, input: &mut dyn BufRead) -> Result<Reply, Failure> {
        let data = request.data(self.minor);
        match request {
            Request::IsValidPath(r) => self.reply(&r, &self.session.store().is_valid(&r.path)?),
            Request::HasSubstitutes(r) => {
                let paths = [(r.path.clone(), None)].into();
                self.reply(&r, &!self.session.store().substitutable(&paths)?.is_empty())
            }
            Request::QueryPathHash(r) => self.reply(&r, &HexHash(self.need_valid(&r.path)?.nar_hash)),
            Request::QueryReferences(r) => self.reply(&r, &self.need_valid(&r.path)?.references),
            Request::QueryReferrers(r) => self.reply(&r, &self.session.store().referrers(&r.path)?),
            Request::AddToStore(r) => {
                let new = new_content(&r.what);
                let info = match data {
                    Data::Framed => Self::with_frames(input, |framed| self.add_content(&new, framed))?,
                    _ => Self::with_nar(input, |nar| self.add_content(&new, nar))?,
                };
                self.reply(&r, &Added::new(info))
            }
            Request::AddTextToStore(r) => {
                let new = NewContent {
                    name: r.name.clone(),
                    method: ContentMethod::Text,
                    references: r.references.clone(),
                    is_nar: false,
                    repair: false,
                };
                let info = self.session.store().add_content(&new, &mut r.contents.0.as_slice())?;
                self.reply(&r, &info.path)
            }
            Request::BuildPaths(r) => {
                self.check_mode(r.mode)?;
                self.session.store().realise(&r.targets, r.mode)?;
                self.reply(&r, &One)
            }
            Request::EnsurePath(r) => {
                self.ensure(&r.path)?;
                self.reply(&r, &One)
            }
            Request::AddTempRoot(r) => {
                self.root(&r.path)?;
                self.reply(&r, &One)
            }
            Request::AddIndirectRoot(r) => {
                self.session.store().add_indirect_root(&absolute(&r.link))?;
                self.reply(&r, &One)
            }
            Request::SyncWithGc(r) => self.reply(&r, &One),
            Request::FindRoots(r) => {
                let mut roots = self.session.store().roots()?;
                if !self.options.trusted {
                    for root in roots.iter_mut().filter(|root| root.is_private) {
                        root.link = b"{censored}".to_vec();
                    }
                    roots.sort_unstable();
                    roots.dedup();
                }
                self.reply(&r, &roots)
            }
            Request::ExportPath(r) => {
                self.export(&r.path)?;
                self.reply(&r, &One)
            }
            Request::QueryDeriver(r) => self.reply(&r, &self.need_valid(&r.path)?.deriver),
            Request::SetOptions(r) => {
                self.tunnel.set_verbosity(r.verbosity);
                self.tunnel.set_shows_logs(r.verbose_build == 0);
                self.session.configure(&r, self.options.trusted);
                self.reply(&r, &())
            }
            Request::CollectGarbage(r) => {
                if r.ignore_liveness.0 {
                    return Err(refused("you are not allowed to ignore liveness"));
                }
                let what = match r.action {
                    GcAction::ReturnLive => Collect::ListLive,
                    GcAction::ReturnDead => Collect::ListDead,
                    GcAction::DeleteDead => Collect::DeleteDead,
                    GcAction::DeleteSpecific => Collect::DeleteSpecific(r.paths.clone()),
                };
                // Real servers do nothing at all then.
                let nothing = r.max_freed_bytes == 0 && r.action != GcAction::DeleteSpecific;
                let done = if nothing {
                    Collected::default()
                } else {
                    self.session.store().collect(&what, r.max_freed_bytes)?
                };
                let paths = done.paths.into_iter().map(FilePath).collect();
                self.reply(&r, &GcReply { paths, bytes_freed: done.bytes_freed })
            }
            Request::QuerySubstitutablePathInfo(r) => {
                let found = self.session.store().substitutable(&[(r.path.clone(), None)].into())?.into_iter().next();
                let found = found.map(|found| NamelessSubstitutable {
                    deriver: found.deriver,
                    references: found.references,
                    download_size_bytes: found.download_size_bytes,
                    nar_size_bytes: found.nar_size_bytes,
                });
                self.reply(&r, &OptionalSubstitutable(found))
            }
            Request::QueryDerivationOutputs(r) => {
                let outputs = self.session.store().derivation_outputs(&r.drv)?;
                self.reply(&r, &outputs.into_values().flatten().collect())
            }
            Request::QueryAllValidPaths(r) => self.reply(&r, &self.session.store().all_paths()?),
            Request::QueryPathInfo(r) => {
                let info = if self.minor < 17 {
                    Some(self.need_valid(&r.path)?)
                } else {
                    self.session.store().info(&r.path)?
                };
                self.reply(&r, &OptionalInfo(info.map(Info::new)))
            }
            Request::ImportPaths(r) => {
                self.need_trust(
                    "importing paths needs signatures, which this format does not carry; you are not a trusted user",
                )?;
                let mut pulled = Pulled::new(input, &self.tunnel, self.host.dir());
                let imported = self.session.store().import(&mut pulled);
                if let Some(error) = pulled.into_failure() {
                    return Err(Failure::Broken(error));
                }
                self.reply(&r, &imported?)
            }
            Request::QueryDerivationOutputNames(r) => {
                self.reply(&r, &self.session.store().derivation_outputs(&r.drv)?.into_keys().collect())
            }
            Request::QueryPathFromHashPart(r) => self.reply(&r, &self.session.store().by_hash_part(r.hash_part)?),
            Request::QuerySubstitutablePathInfos(r) => self.reply(&r, &self.session.store().substitutable(&r.paths.0)?),
            Request::QueryValidPaths(r) => {
                self.session.store().add_temp_roots(&r.paths)?;
                let mut valid = self.session.store().valid_subset(&r.paths)?;
                if r.substitute {
                    let missing: Vec<DerivedPath> = r
                        .paths
                        .difference(&valid)
                        .filter(|path| !path.is_derivation())
                        .map(|path| DerivedPath::Opaque(path.clone()))
                        .collect();
                    if !missing.is_empty() {
                        if let Err(error) = self.session.store().build(&missing, BuildMode::Normal) {
                            let text = larder_core::report::chain(&error);
                            self.tunnel.message(Level::Warn, format_args!("{text}"));
                        }
                        valid = self.session.store().valid_subset(&r.paths)?;
                    }
                }
                self.reply(&r, &valid)
            }
            Request::QuerySubstitutablePaths(r) => {
                let wanted = r.paths.iter().map(|path| (path.clone(), None)).collect();
                let found = self.session.store().substitutable(&wanted)?;
                self.reply(&r, &found.into_iter().map(|found| found.path).collect())
            }
            Request::QueryValidDerivers(r) => self.reply(&r, &self.session.store().valid_derivers(&r.path)?),
            Request::OptimiseStore(r) => {
                self.session.store().optimise()?;
                self.reply(&r, &One)
            }
            Request::VerifyStore(r) => {
                if r.repair.0 {
                    self.need_trust("you are not privileged to repair paths")?;
                }
                self.reply(&r, &self.session.store().verify(r.check_contents.0, r.repair.0)?)
            }
            Request::BuildDerivation(r) => {
                let kind = r.derivation.drv.kind().map_err(|error| StoreError::new(ErrorKind::Other, error))?;
                if !matches!(kind, Kind::Fixed | Kind::Floating) {
                    self.need_trust("you are not privileged to build input-addressed derivations")?;
                }
                self.check_mode(r.mode)?;
                let mut path = r.derivation.path.clone();
                if !self.options.trusted {
                    // A name that somebody else's derivation has would be a lie in the records.
                    let own = r.derivation.drv.path(self.host.dir());
                    path = own.map_err(|error| StoreError::new(ErrorKind::Other, error))?;
                }
                let result = self.session.store().build_derivation(&path, &r.derivation.drv, r.mode)?;
                self.reply(&r, &result)
            }
            Request::AddSignatures(r) => {
                self.need_valid(&r.path)?;
                self.session.store().add_signatures(&r.path, &r.signatures)?;
                self.reply(&r, &One)
            }
            Request::NarFromPath(r) => {
                self.root(&r.path)?;
                self.need_valid(&r.path)?;
                Ok(Reply::Nar(r.path))
            }
            Request::AddToStoreNar(r) => {
                let mut info = r.info.0.clone();
                info.ultimate &= self.options.trusted;
                let options = self.add_options(r.repair.0, r.dont_check_signatures.0);
                let add = |source: &mut dyn Read| {
                    if r.repair.0 {
                        self.need_trust("you are not privileged to repair paths")?;
                    }
                    Ok(self.session.store().add_nars(&mut OneObject::new(info, source), options)?)
                };
                match data {
                    Data::Framed => Self::with_frames(input, |framed| add(framed))?,
                    Data::Pulled => {
                        let mut pulled = Pulled::new(input, &self.tunnel, self.host.dir());
                        let added = add(&mut BareNar::new(&mut pulled));
                        if let Some(error) = pulled.into_failure() {
                            return Err(Failure::Broken(error));
                        }
                        added?;
                    }
                    _ => Self::with_nar(input, |nar| add(nar))?,
                }
                self.reply(&r, &())
            }
            Request::QueryMissing(r) => self.reply(&r, &self.session.store().missing(&r.targets)?),
            Request::QueryDerivationOutputMap(r) => self.reply(&r, &self.session.store().derivation_outputs(&r.drv)?),
            Request::RegisterDrvOutput(r) => {
                self.need_trust("you are not privileged to register realisations")?;
                self.session.store().add_realisation(&r.realisation.0)?;
                self.reply(&r, &())
            }
            Request::QueryRealisation(r) => {
                let found = self.session.store().realisation(&r.id)?;
                let found = if self.minor >= 31 {
                    FoundRealisation::Whole(found.into_iter().collect())
                } else {
                    FoundRealisation::Paths(found.into_iter().map(|found| found.out_path).collect())
                };
                self.reply(&r, &found)
            }
            Request::AddMultipleToStore(r) => {
                let options = self.add_options(r.repair.0, r.dont_check_signatures.0);
                Self::with_frames(input, |framed| {
                    if r.repair.0 {
                        self.need_trust("you are not privileged to repair paths")?;
                    }
                    let mut objects = ManyObjects::new(framed, self.host.dir(), &self.options.budget);
                    Ok(self.session.store().add_nars(&mut objects, options)?)
                })?;
                self.reply(&r, &())
            }
            Request::AddBuildLog(r) => {
                Self::with_frames(input, |framed| {
                    self.need_trust("you are not privileged to add logs")?;
                    Ok(self.session.store().add_build_log(&r.drv.0, framed)?)
                })?;
                self.reply(&r, &One)
            }
            Request::BuildPathsWithResults(r) => {
                self.check_mode(r.mode)?;
                let results = self.session.store().build(&r.targets, r.mode)?;
                let keyed = r.targets.iter().cloned().zip(results);
                self.reply(&r, &keyed.map(|(target, result)| KeyedResult { target, result }).collect())
            }
            Request::QueryClosure(r) => {
                if !self.closures {
                    return Err(Failure::Broken(WireError::UnknownOperation { code: ops::QueryClosure::CODE }));
                }
                let list = self.session.store().listed_closure(&r.paths, r.include_outputs.0)?;
                self.reply(&r, &list.ok_or_else(|| StoreError::unsupported("this store cannot list closures"))?)
            }
            Request::AddPermRoot(r) => {
                self.need_trust(
                    "you are not privileged to create perm roots; hint: you can just do this client-side without \
                     special privileges, and probably want to do that instead",
                )?;
                let link = absolute(&r.link);
                self.session.store().add_root(&r.path, &link)?;
                self.reply(&r, &FilePath(link.as_os_str().as_bytes().to_vec()))
            }
        }
    }

    fn check_mode(&self, mode: BuildMode) -> Result<(), Failure> {
        if mode == BuildMode::Repair {
            self.need_trust("repairing is not allowed because you are not in 'trusted-users'")?;
        }
        Ok(())
    }

    /// Makes a path valid, as it is.
    fn ensure(&self, path: &StorePath) -> Result<(), StoreError> {
        let results = self.session.store().build(&[DerivedPath::Opaque(path.clone())], BuildMode::Normal)?;
        let Some(failed) = results.into_iter().find(|result| !result.status.is_success()) else { return Ok(()) };
        // That nobody has it is no news to a client that asks for this.
        let text = if failed.status == BuildStatus::NoSubstituters || failed.error.is_empty() {
            format!("path '{}' does not exist and cannot be created", self.host.dir().display(path))
        } else {
            failed.error
        };
        Err(StoreError::new(ErrorKind::Other, text))
    }

    fn add_options(&self, repair: bool, dont_check_signatures: bool) -> AddOptions {
        AddOptions { repair, check_signatures: !(dont_check_signatures && self.options.trusted) }
    }

    fn add_content(
        &self,
        new: &NewContent,
        source: &mut dyn Read,
    ) -> Result<larder_core::path_info::PathInfo, Failure> {
        if new.repair {
            self.need_trust("you are not privileged to repair paths")?;
        }
        Ok(self.session.store().add_content(new, source)?)
    }

    /// Sends the export record of a path as messages.
    fn export(&self, path: &StorePath) -> Result<(), StoreError> {
        self.root(path)?;
        let info = self.need_valid(path)?;
        let mut out = MessageWriter { tunnel: &self.tunnel, buffer: Vec::new() };
        self.session.store().nar(path, &mut out)?;
        let mut trailer = Vec::new();
        let references = info.references.iter().map(Into::into);
        let deriver = info.deriver.as_ref().map(Into::into);
        write_trailer(&mut trailer, self.host.dir(), path.into(), references, deriver);
        out.write_all(&trailer)?;
        Ok(out.flush()?)
    }
}

/// What is to be added, in the words of a store.
fn new_content(what: &AddWhat) -> NewContent {
    match what.clone() {
        AddWhat::Content { name, method, references, repair } => {
            let is_nar = matches!(method, ContentMethod::Fixed(Method::Recursive | Method::Git, _));
            NewContent { name, method, references, is_nar, repair }
        }
        AddWhat::Old { name, method, algorithm } => NewContent {
            name,
            method: ContentMethod::Fixed(method, algorithm),
            references: BTreeSet::new(),
            is_nar: true,
            repair: false,
        },
    }
}

/// A path from a client; a relative one is taken from the root directory.
fn absolute(path: &FilePath) -> std::path::PathBuf {
    Path::new("/").join(OsStr::from_bytes(&path.0))
}
