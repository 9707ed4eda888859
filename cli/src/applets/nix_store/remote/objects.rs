//! Objects on their way to a store elsewhere, and from it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek as _, Write};
use std::path::Path;

use larder_core::api::{AddOptions, NarSource, NewContent, ReadStore, Store, StoreError};
use larder_core::derivation::{Derivation, aterm, name_of};
use larder_core::export::{ExportError, Lead, Next, Step, Trailer, write_lead, write_trailer};
use larder_core::hash::{NarHasher, Sha256Digest};
use larder_core::nar::{Event, NarError, Parser};
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;
use larder_fs::dump::{DumpError, DumpOptions, Dumper, StreamError, dump_pipelined};
use larder_store::StoreError as LocalError;
use larder_wire::stream::BareNar;
use rustix::fs::CWD;

use super::Far;
use crate::conf::LocalStore;
use crate::exit::Failure;
use crate::printer::{Output, PrintError, Printer};

/// Bytes of an archive that are made at a time.
const BLOCK_BYTES: usize = 64 << 10;

/// The largest derivation that is read, in bytes.
const MAX_DERIVATION_BYTES: usize = 256 << 20;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum ObjectError {
    #[error("opening file '{}'", path.display())]
    Open { path: std::path::PathBuf, source: io::Error },
    #[error("'{}' is no regular file, as a flat hash needs one", path.display())]
    NotRegular { path: std::path::PathBuf },
    #[error("keeping an object for a moment in a temporary file")]
    Spool(#[source] io::Error),
    #[error("reading standard input")]
    Stdin(#[source] io::Error),
}

/// Why a derivation of a store elsewhere cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(in crate::applets) enum DerivationError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("'{path}' is no derivation")]
    None { path: String },
    #[error("the archive of '{path}' cannot be read")]
    Archive { path: String, source: NarError },
    #[error("derivation '{path}' cannot be read")]
    Text { path: String, source: aterm::DerivationError },
}

/// The archive of a tree, as it is read.
struct Archive<'a> {
    dumper: Dumper<'a>,
    block: Vec<u8>,
    at: usize,
    has_more: bool,
    failure: Option<DumpError>,
}

impl Read for Archive<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.at == self.block.len() && self.has_more && self.failure.is_none() {
            self.block.clear();
            self.at = 0;
            match self.dumper.fill(&mut self.block) {
                Ok(more) => self.has_more = more,
                Err(error) => self.failure = Some(error),
            }
        }
        if self.failure.is_some() {
            return Err(io::Error::other("the tree cannot be read"));
        }
        let left = self.block.get(self.at..).unwrap_or_default();
        let n = left.len().min(into.len());
        into.split_at_mut(n).0.copy_from_slice(left.split_at(n).0);
        self.at += n;
        Ok(n)
    }
}

/// Sends a file or a tree.
pub(super) fn send(
    store: &dyn Store,
    new: &NewContent,
    path: &Path,
    options: &DumpOptions<'_>,
) -> Result<PathInfo, Failure> {
    if !new.is_nar {
        let open = |source| ObjectError::Open { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(open)?;
        if !file.metadata().map_err(open)?.is_file() {
            return Err(ObjectError::NotRegular { path: path.to_owned() }.into());
        }
        return Ok(store.add_content(new, &mut file)?);
    }
    let mut archive = Archive {
        dumper: Dumper::new(CWD, path.as_os_str(), *options),
        block: Vec::with_capacity(BLOCK_BYTES),
        at: 0,
        has_more: true,
        failure: None,
    };
    let sent = store.add_content(new, &mut archive);
    match archive.failure {
        Some(error) => Err(error.into()),
        None => Ok(sent?),
    }
}

/// Counts what goes by.
struct Hashing(NarHasher);

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The hash that an object's archive has.
pub(super) fn hash(far: &Far<'_>, path: &StorePath) -> Result<Sha256Digest, Failure> {
    let mut hashing = Hashing(NarHasher::new());
    match &far.files {
        // A daemon that finds it changed can only hang up.
        Some(files) => far.dump_here(files, path, |bytes| {
            hashing.0.update(bytes);
            Ok(())
        })?,
        None => far.store.nar(path, &mut hashing)?,
    }
    Ok(hashing.0.finish().0)
}

/// The derivation at a valid path.
pub(in crate::applets) fn derivation(store: &dyn ReadStore, path: &StorePath) -> Result<Derivation, DerivationError> {
    let full = || store.dir().full(path);
    let no_derivation = || DerivationError::None { path: full() };
    let mut nar = Vec::new();
    store.nar(path, &mut nar)?;
    let (mut parser, mut rest, mut text) = (Parser::default(), nar.as_slice(), Vec::new());
    while let Some(event) =
        parser.next(&mut rest).map_err(|source| DerivationError::Archive { path: full(), source })?
    {
        match event {
            Event::Contents(bytes) => text.extend_from_slice(bytes),
            Event::File { size_bytes, .. } if size_bytes <= MAX_DERIVATION_BYTES as u64 => {}
            Event::EndFile => {}
            _ => return Err(no_derivation()),
        }
    }
    let name = name_of(path).map_err(|_| no_derivation())?;
    aterm::parse(store.dir(), &name, &text).map_err(|source| DerivationError::Text { path: full(), source })
}

impl Far<'_> {
    /// The archive of what lies at a path on this machine, in pieces.
    fn dump_here(
        &self,
        files: &LocalStore,
        path: &StorePath,
        mut sink: impl FnMut(&[u8]) -> Result<(), PrintError>,
    ) -> Result<(), Failure> {
        let real = files.layout.real_path(path);
        let options = DumpOptions { case_hack: self.settings.use_case_hack, below: Some(&files.layout.real_store) };
        match dump_pipelined(CWD, real.as_os_str(), &options, &mut sink) {
            Ok(_) => Ok(()),
            Err(StreamError::Dump(error)) => Err(error.into()),
            Err(StreamError::Sink(error)) => Err(error.into()),
        }
    }

    /// Writes the archive of a valid path, and checks it on the way.
    ///
    /// Where the files of a daemon's store lie on this machine they are read here: what it would send is
    /// the same bytes, copied twice more.
    fn nar(&self, info: &PathInfo, out: &mut Printer) -> Result<(), Failure> {
        let is_here = |files: &&LocalStore| files.layout.real_path(&info.path).symlink_metadata().is_ok();
        let Some(files) = self.files.filter(is_here) else { return Ok(self.store.nar(&info.path, out)?) };
        let mut hasher = NarHasher::new();
        self.dump_here(files, &info.path, |bytes| {
            hasher.update(bytes);
            out.bytes(bytes)
        })?;
        let (found, size_bytes) = hasher.finish();
        // A size of 0 was never recorded.
        if found != info.nar_hash || (info.nar_size_bytes != 0 && size_bytes != info.nar_size_bytes) {
            let path = self.store.dir().full(&info.path);
            return Err(LocalError::Changed { path, expected: info.nar_hash, found }.into());
        }
        Ok(())
    }

    /// `--export`
    pub(super) fn export(&self, paths: &[StorePath]) -> Result<(), Failure> {
        let (store, dir) = (self.store, self.store.dir());
        let paths: BTreeSet<StorePath> = paths.iter().cloned().collect();
        if self.files.is_some() {
            // They are not asked for, one by one, of who would protect them.
            store.add_temp_roots(&paths)?;
        }
        let mut out = Printer::new(Output::Stream);
        let mut framing = Vec::new();
        for path in store.sorted(&paths)? {
            let info = self.info(&path)?;
            framing.clear();
            write_lead(&mut framing, Next::Object);
            out.bytes(&framing)?;
            self.nar(&info, &mut out)?;
            framing.clear();
            let references = info.references.iter().map(Into::into);
            let deriver = info.deriver.as_ref().map(Into::into);
            write_trailer(&mut framing, dir, (&path).into(), references, deriver);
            out.bytes(&framing)?;
        }
        framing.clear();
        write_lead(&mut framing, Next::End);
        out.bytes(&framing)?;
        Ok(out.finish()?)
    }

    /// `--import`: what an object is called comes behind it, so that it is kept for a moment.
    pub(super) fn import(&self) -> Result<(), Failure> {
        let mut input = BufReader::with_capacity(64 << 10, io::stdin().lock());
        let mut imported = Vec::new();
        loop {
            let mut lead = Lead::new();
            if feed(&mut input, |bytes| lead.push(bytes))? == Next::End {
                break;
            }
            let mut spool = tempfile::tempfile().map_err(ObjectError::Spool)?;
            let mut hasher = NarHasher::new();
            let mut nar = BareNar::new(&mut input);
            loop {
                let bytes = nar.fill_buf().map_err(ObjectError::Stdin)?;
                if bytes.is_empty() {
                    break;
                }
                hasher.update(bytes);
                spool.write_all(bytes).map_err(ObjectError::Spool)?;
                let n = bytes.len();
                nar.consume(n);
            }
            let mut trailer = Trailer::new(self.store.dir());
            let object = feed(&mut input, |bytes| trailer.push(bytes))?;
            let (nar_hash, nar_size_bytes) = hasher.finish();
            let mut info = PathInfo::new(object.path, nar_hash, nar_size_bytes);
            (info.references, info.deriver) = (object.references, object.deriver);
            imported.push(info.path.clone());
            spool.rewind().map_err(ObjectError::Spool)?;
            let mut source = Spooled { info: Some(info), file: BufReader::new(spool) };
            self.store.add_nars(&mut source, AddOptions::default())?;
        }
        let mut out = Printer::new(Output::Listing);
        for path in &imported {
            out.line(self.store.dir().display(path))?;
        }
        Ok(out.finish()?)
    }
}

/// Feeds a reader until it is done.
fn feed<T>(input: &mut dyn BufRead, mut push: impl FnMut(&[u8]) -> Result<Step<T>, ExportError>) -> Result<T, Failure> {
    loop {
        let bytes = input.fill_buf().map_err(ObjectError::Stdin)?;
        if bytes.is_empty() {
            return Err(ExportError::UnexpectedEnd.into());
        }
        let length = bytes.len();
        match push(bytes)? {
            Step::More => input.consume(length),
            Step::Done { taken, value } => {
                input.consume(taken);
                return Ok(value);
            }
        }
    }
}

/// One object in a file.
struct Spooled {
    info: Option<PathInfo>,
    file: BufReader<File>,
}

impl Read for Spooled {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.file.read(into)
    }
}

impl NarSource for Spooled {
    fn next_object(&mut self) -> Result<Option<PathInfo>, StoreError> {
        Ok(self.info.take())
    }
}
