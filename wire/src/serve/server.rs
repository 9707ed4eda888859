//! The server's side: `nix-store --serve [--write]`.
//!
//! Whoever may log in is trusted with the store as it was opened; without `--write` nothing is
//! changed, fetched or locked. An error ends the process, but for builds, which report theirs.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, BufRead, Read, Write};

use larder_core::api::{AddOptions, BuildMode, NarSource, Store, StoreError};
use larder_core::export::{Next, write_lead, write_trailer};
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;

use super::ops::{BuildOptions, BuildOutcome, Command, Infos, Record, Request};
use super::{accept, decoder};
use crate::codec::{Budget, Encoder, Protocol, WireError};
use crate::value::{One, Wire as _};

/// A store that takes the options of a client's builds.
pub trait Session {
    fn store(&self) -> &dyn Store;

    /// For the builds that follow.
    fn configure_builds(&mut self, options: &BuildOptions);
}

/// What ends the process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Store(#[from] StoreError),
    /// `--write` was not given.
    #[error("{what} is not allowed")]
    ReadOnly { what: &'static str },
    #[error("NAR for '{path}' has no size")]
    NoSize { path: String },
    #[error("server is no longer able to build paths more than once: 'repeat' is {repeats}")]
    Repeats { repeats: u64 },
}

/// Serves commands until the client goes away.
pub fn serve(
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    session: &mut dyn Session,
    may_write: bool,
) -> Result<(), ServeError> {
    let dir = session.store().dir().clone();
    let minor = accept(input, output, &dir)?;
    let budget = Budget::unlimited();
    while !input.fill_buf().map_err(WireError::from)?.is_empty() {
        let mut from = decoder(input, &dir, minor, &budget);
        let code = from.word()?;
        let request = Request::read(code, &mut from)?;
        let mut turn = Turn { session, output, minor, may_write };
        turn.perform(request, input)?;
        output.flush().map_err(WireError::Write)?;
    }
    Ok(())
}

struct Turn<'a> {
    session: &'a mut dyn Session,
    output: &'a mut dyn Write,
    minor: u8,
    may_write: bool,
}

impl Turn<'_> {
    fn need_write(&self, what: &'static str) -> Result<(), ServeError> {
        if self.may_write { Ok(()) } else { Err(ServeError::ReadOnly { what }) }
    }

    /// Sends the reply to a command, which has the type that belongs to it.
    fn reply<C: Command>(&mut self, _: &C, reply: &C::Reply) -> Result<(), ServeError> {
        let mut out = Vec::new();
        reply.write(&mut Encoder::new(&mut out, self.session.store().dir(), Protocol::Serve(self.minor)));
        Ok(self.output.write_all(&out).map_err(WireError::Write)?)
    }

    fn perform(&mut self, request: Request, input: &mut dyn BufRead) -> Result<(), ServeError> {
        match request {
            Request::QueryValidPaths(r) => {
                if r.lock && self.may_write {
                    self.session.store().add_temp_roots(&r.paths)?;
                }
                let mut valid = self.session.store().valid_subset(&r.paths)?;
                if r.substitute && self.may_write {
                    let missing: Vec<_> = r
                        .paths
                        .difference(&valid)
                        .filter(|path| !path.is_derivation())
                        .map(|path| larder_core::api::DerivedPath::Opaque(path.clone()))
                        .collect();
                    if !missing.is_empty() {
                        self.session.store().build(&missing, BuildMode::Normal)?;
                        valid = self.session.store().valid_subset(&r.paths)?;
                    }
                }
                self.reply(&r, &valid)
            }
            Request::QueryPathInfos(r) => {
                let mut found = Vec::new();
                for path in &r.paths {
                    found.extend(self.session.store().info(path)?.map(Record::new));
                }
                self.reply(&r, &Infos(found))
            }
            Request::DumpStorePath(r) => {
                if self.session.store().info(&r.path)?.is_none() {
                    return Err(StoreError::not_valid(self.session.store().dir(), &r.path).into());
                }
                Ok(self.session.store().nar(&r.path, self.output)?)
            }
            Request::ImportPaths(r) => {
                self.need_write("importing paths")?;
                self.session.store().import(input)?;
                self.reply(&r, &One)
            }
            Request::ExportPaths(r) => self.export(&r.paths),
            Request::BuildPaths(r) => {
                self.need_write("building paths")?;
                self.configure(&r.options)?;
                let outcome = self.session.store().realise(&r.targets, BuildMode::Normal);
                let outcome = outcome.map_err(|error| (error.status().into(), larder_core::report::chain(&error)));
                self.reply(&r, &BuildOutcome(outcome))
            }
            Request::QueryClosure(r) => {
                let closure = self.session.store().closure(&r.paths, r.include_outputs)?;
                self.reply(&r, &closure)
            }
            Request::BuildDerivation(r) => {
                self.need_write("building paths")?;
                self.configure(&r.options)?;
                let path = &r.derivation.path;
                let result = self.session.store().build_derivation(path, &r.derivation.drv, BuildMode::Normal)?;
                self.reply(&r, &result)
            }
            Request::AddToStoreNar(r) => {
                self.need_write("importing paths")?;
                let info = r.info.0.clone();
                if info.nar_size_bytes == 0 {
                    return Err(ServeError::NoSize { path: self.session.store().dir().full(&info.path) });
                }
                let size_bytes = info.nar_size_bytes;
                let mut source = Measured { info: Some(info), source: input.take(size_bytes) };
                self.session.store().add_nars(&mut source, AddOptions::default())?;
                io::copy(&mut source.source, &mut io::sink()).map_err(WireError::from)?;
                self.reply(&r, &One)
            }
        }
    }

    fn configure(&mut self, options: &BuildOptions) -> Result<(), ServeError> {
        if options.repeats != 0 {
            return Err(ServeError::Repeats { repeats: options.repeats });
        }
        self.session.configure_builds(options);
        Ok(())
    }

    /// Writes an export stream, references before referrers.
    fn export(&mut self, paths: &BTreeSet<StorePath>) -> Result<(), ServeError> {
        if self.may_write {
            self.session.store().add_temp_roots(paths)?;
        }
        let mut infos: HashMap<StorePath, PathInfo> = HashMap::new();
        for path in paths {
            let info = self.session.store().info(path)?;
            let info = info.ok_or_else(|| StoreError::not_valid(self.session.store().dir(), path))?;
            infos.insert(path.clone(), info);
        }
        let mut framing = Vec::new();
        for path in self.session.store().sorted(paths)? {
            let Some(info) = infos.get(&path) else { continue };
            framing.clear();
            write_lead(&mut framing, Next::Object);
            self.output.write_all(&framing).map_err(WireError::Write)?;
            self.session.store().nar(&path, self.output)?;
            framing.clear();
            let references = info.references.iter().map(Into::into);
            let deriver = info.deriver.as_ref().map(Into::into);
            write_trailer(&mut framing, self.session.store().dir(), (&path).into(), references, deriver);
            self.output.write_all(&framing).map_err(WireError::Write)?;
        }
        framing.clear();
        write_lead(&mut framing, Next::End);
        Ok(self.output.write_all(&framing).map_err(WireError::Write)?)
    }
}

/// One object whose NAR has a length.
struct Measured<'a> {
    info: Option<PathInfo>,
    source: io::Take<&'a mut dyn BufRead>,
}

impl Read for Measured<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.source.read(into)?;
        if n == 0 && !into.is_empty() && self.source.limit() > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(n)
    }
}

impl NarSource for Measured<'_> {
    fn next_object(&mut self) -> Result<Option<PathInfo>, StoreError> {
        Ok(self.info.take())
    }
}
