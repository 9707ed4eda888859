//! Export streams: objects on their way to another store, and from one.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};

use larder_core::export::{ExportError, Lead, Next, Step, Trailer, write_lead, write_trailer};
use larder_core::hash::NarHasher;
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;
use larder_fs::dump::{self, DumpOptions};

use crate::error::StoreError;
use crate::ingest::stream_error;
use crate::local::LocalStore;

/// A source of bytes, of which the front can be taken off.
struct Blocks<'a>(&'a mut dyn BufRead);

impl Blocks<'_> {
    /// What is there, at least one byte; the end of the source is an error.
    fn front(&mut self) -> Result<&[u8], StoreError> {
        // Twice, as what is found cannot be given back from within a loop.
        while let Err(e) = self.0.fill_buf() {
            match e.kind() {
                std::io::ErrorKind::Interrupted => {}
                std::io::ErrorKind::UnexpectedEof => return Err(ExportError::UnexpectedEnd.into()),
                _ => return Err(StoreError::Input(e)),
            }
        }
        match self.0.fill_buf() {
            Ok([]) => Err(ExportError::UnexpectedEnd.into()),
            Ok(bytes) => Ok(bytes),
            Err(e) => Err(StoreError::Input(e)),
        }
    }

    fn take(&mut self, n: usize) {
        self.0.consume(n);
    }

    /// Feeds a reader until it is done.
    fn feed<T>(&mut self, mut push: impl FnMut(&[u8]) -> Result<Step<T>, ExportError>) -> Result<T, StoreError> {
        loop {
            let front = self.front()?;
            let len = front.len();
            match push(front)? {
                Step::More => self.take(len),
                Step::Done { taken, value } => {
                    self.take(taken);
                    return Ok(value);
                }
            }
        }
    }
}

impl LocalStore {
    /// Writes the objects of `paths`, each once, references before referrers.
    ///
    /// Every object's hash is checked as it is written. An error leaves a stream without its end.
    pub fn export(&self, paths: &[StorePath], out: &mut dyn Write) -> Result<(), StoreError> {
        self.add_temp_roots(paths).or_else(|error| match error {
            // An ordinary user may export from a store that is not theirs; a collection in
            // between shows as an error.
            StoreError::File(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
            other => Err(other),
        })?;
        let wanted: BTreeSet<StorePath> = paths.iter().cloned().collect();
        // The valid ones come first in any case, as far as they go.
        let order = self.order(&wanted)?;
        let mut framing = Vec::new();
        for path in &order {
            framing.clear();
            write_lead(&mut framing, Next::Object);
            out.write_all(&framing).map_err(StoreError::Output)?;
            let info = self.info(path)?;
            self.dump_checked(&info, out)?;
            framing.clear();
            write_trailer(
                &mut framing,
                self.dir(),
                path.into(),
                info.references.iter().map(Into::into),
                info.deriver.as_ref().map(Into::into),
            );
            out.write_all(&framing).map_err(StoreError::Output)?;
        }
        framing.clear();
        write_lead(&mut framing, Next::End);
        out.write_all(&framing).map_err(StoreError::Output)
    }

    /// Writes the archive of a valid path and checks its hash and size on the way.
    pub(crate) fn dump_checked(&self, info: &PathInfo, out: &mut dyn Write) -> Result<(), StoreError> {
        let mut hasher = NarHasher::new();
        self.dump_object(&info.path, |bytes| {
            hasher.update(bytes);
            out.write_all(bytes).map_err(StoreError::Output)
        })?;
        let (found, size_bytes) = hasher.finish();
        // A size of 0 was never recorded.
        if found != info.nar_hash || (info.nar_size_bytes != 0 && size_bytes != info.nar_size_bytes) {
            return Err(StoreError::Changed { path: self.dir().full(&info.path), expected: info.nar_hash, found });
        }
        Ok(())
    }

    /// Writes the archive of a path from some byte on, for who checks what it gets: nothing is hashed.
    pub fn dump_after(&self, path: &StorePath, skipped: u64, out: &mut dyn Write) -> Result<(), StoreError> {
        let options = DumpOptions { case_hack: self.options().use_case_hack, below: Some(&self.layout().real_store) };
        let name = path.to_string();
        dump::dump_pipelined_after(self.object_dir()?, OsStr::new(&name), &options, skipped, |bytes| {
            self.check_interrupt()?;
            out.write_all(bytes).map_err(StoreError::Output)
        })
        .map_err(stream_error)?;
        Ok(())
    }

    /// Gives the archive of what lies at a path, in pieces.
    pub(crate) fn dump_object(
        &self,
        path: &StorePath,
        mut sink: impl FnMut(&[u8]) -> Result<(), StoreError>,
    ) -> Result<u64, StoreError> {
        let options = DumpOptions { case_hack: self.options().use_case_hack, below: Some(&self.layout().real_store) };
        let name = path.to_string();
        dump::dump_pipelined(self.object_dir()?, OsStr::new(&name), &options, |bytes| {
            self.check_interrupt()?;
            sink(bytes)
        })
        .map_err(stream_error)
    }

    /// Reads an export stream and registers its objects; `each` hears of every path in it, as it
    /// becomes valid or is seen to be valid already, in the order of the stream.
    ///
    /// Objects before an error stay. Signatures are not asked for: who may write to the store may
    /// import into it.
    pub fn import(
        &self,
        source: impl Read,
        each: impl FnMut(&StorePath) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.import_from(&mut BufReader::with_capacity(larder_fs::pipe::BLOCK_BYTES, source), each)
    }

    /// The same, and takes nothing that follows the stream.
    pub fn import_from(
        &self,
        source: &mut dyn BufRead,
        mut each: impl FnMut(&StorePath) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut blocks = Blocks(source);
        let mut arrivals = self.arrivals();
        let mut seen: Vec<StorePath> = Vec::new();
        let mut outcome = Ok(());
        loop {
            match self.import_one(&mut blocks, &mut arrivals) {
                Ok(Some(path)) => seen.push(path),
                Ok(None) => break,
                Err(error) => {
                    outcome = Err(error);
                    break;
                }
            }
            if arrivals.pending() == 0 {
                // A full group was registered just now, or the path was valid already.
                seen.drain(..).try_for_each(|path| each(&path))?;
            }
        }
        // What came before the fault is whole, so it stays.
        arrivals.commit()?;
        seen.drain(..).try_for_each(|path| each(&path))?;
        outcome
    }

    /// Seals one object of a stream; `None` at its end.
    fn import_one(
        &self,
        blocks: &mut Blocks<'_>,
        arrivals: &mut crate::ingest::Arrivals<'_>,
    ) -> Result<Option<StorePath>, StoreError> {
        let mut lead = Lead::new();
        if blocks.feed(|bytes| lead.push(bytes))? == Next::End {
            return Ok(None);
        }
        let mut intake = arrivals.store().receive(None)?;
        while !intake.is_done() {
            let mut front = blocks.front()?;
            let before = front.len();
            intake.push(&mut front)?;
            let taken = before - front.len();
            blocks.take(taken);
        }
        let incoming = intake.finish()?;
        let mut trailer = Trailer::new(self.dir());
        let object = blocks.feed(|bytes| trailer.push(bytes))?;
        let mut info = PathInfo::new(object.path.clone(), incoming.nar_hash, incoming.nar_size_bytes);
        info.references = object.references;
        info.deriver = object.deriver;
        arrivals.seal(incoming, info)?;
        Ok(Some(object.path))
    }
}
