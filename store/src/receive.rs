//! Objects that come in over a connection: with their record, or to be addressed by their contents.
//!
//! Whoever sends may be slow, stop, or lie. So nothing is locked while bytes are waited for: an
//! object is sealed only when it has come whole and is what it was said to be.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek as _, Write as _};

use larder_core::api::{AddOptions, ContentMethod, NarSource, NewContent};
use larder_core::content_address::{ContentAddress, Method};
use larder_core::hash::{Algorithm, Hash, Hasher, Sha256Digest};
use larder_core::nar::{Encoder, Event, Parser};
use larder_core::path_info::PathInfo;
use larder_core::rewrite::ModuloSelfHasher;
use larder_core::store_dir::References;
use larder_core::store_path::StorePath;
use larder_fs::file_error::FileError;
use rustix::fs::{Mode, OFlags};

use crate::error::StoreError;
use crate::ingest::{Incoming, Intake};
use crate::local::LocalStore;

/// Contents of unknown length are kept in memory up to this size, in bytes.
const IN_MEMORY: usize = 1 << 20;

/// How many objects are sealed and registered together.
const GROUP: usize = 64;

/// What is looked for in a stream, in bytes at a time.
const BLOCK: usize = 64 << 10;

/// Reads to the end of the source, in pieces.
fn each_block(
    source: &mut (impl Read + ?Sized),
    mut each: impl FnMut(&[u8]) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut block = vec![0; BLOCK];
    loop {
        match source.read(&mut block) {
            Ok(0) => return Ok(()),
            Ok(n) => each(block.get(..n).unwrap_or_default())?,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(StoreError::Input(e)),
        }
    }
}

/// Hashes the contents of the one regular file that a NAR holds.
struct FileHasher {
    parser: Parser,
    hasher: Hasher,
    /// Was there anything else?
    is_file: bool,
}

impl FileHasher {
    fn new(algorithm: Algorithm) -> Self {
        Self { parser: Parser::default(), hasher: Hasher::new(algorithm), is_file: true }
    }

    fn push(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        while let Some(event) = self.parser.next(&mut bytes)? {
            match event {
                Event::Contents(contents) => self.hasher.update(contents),
                Event::File { .. } | Event::EndFile => {}
                _ => self.is_file = false,
            }
        }
        Ok(())
    }
}

/// Checks a content address against a NAR that passes by.
enum AddressCheck {
    /// The hash of the NAR itself, which is had anyway.
    Nar,
    OtherNar(Hasher),
    Modulo(Box<ModuloSelfHasher>),
    File(FileHasher),
}

impl AddressCheck {
    fn new(info: &PathInfo, address: &ContentAddress) -> Result<Self, StoreError> {
        Ok(match address {
            ContentAddress::Text(_) => Self::File(FileHasher::new(Algorithm::Sha256)),
            ContentAddress::Fixed(Method::Flat, hash) => Self::File(FileHasher::new(hash.algorithm())),
            ContentAddress::Fixed(Method::Recursive, hash) if info.references.contains(&info.path) => {
                Self::Modulo(Box::new(ModuloSelfHasher::new(hash.algorithm(), info.path.hash_part())))
            }
            ContentAddress::Fixed(Method::Recursive, hash) if hash.algorithm() == Algorithm::Sha256 => Self::Nar,
            ContentAddress::Fixed(Method::Recursive, hash) => Self::OtherNar(Hasher::new(hash.algorithm())),
            ContentAddress::Fixed(Method::Git, _) => {
                return Err(StoreError::GitAddress { name: info.path.name().to_string() });
            }
        })
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        match self {
            Self::Nar => {}
            Self::OtherNar(hasher) => hasher.update(bytes),
            Self::Modulo(hasher) => hasher.push(bytes),
            Self::File(hasher) => hasher.push(bytes)?,
        }
        Ok(())
    }

    fn accepts(self, address: &ContentAddress, nar_hash: Sha256Digest) -> bool {
        let claimed = match address {
            ContentAddress::Text(digest) => digest.to_hash(),
            ContentAddress::Fixed(_, hash) => *hash,
        };
        match self {
            Self::Nar => nar_hash.to_hash() == claimed,
            Self::OtherNar(hasher) => hasher.finish() == claimed,
            Self::Modulo(hasher) => hasher.finish().accepts(&claimed),
            Self::File(file) => file.is_file && file.hasher.finish() == claimed,
        }
    }
}

/// What was taken from a source of objects.
enum Took<'s> {
    /// Whole, and to be sealed.
    Object(Box<(Incoming<'s>, PathInfo)>),
    /// It is valid already.
    Valid,
    End,
}

impl LocalStore {
    /// Adds an object under the path that follows from its contents; gives its record.
    ///
    /// Nothing is added unless the source ends where the object does.
    pub fn add_content(&self, new: &NewContent, source: &mut dyn Read) -> Result<PathInfo, StoreError> {
        let (incoming, hash) = match new.method {
            ContentMethod::Fixed(Method::Git, _) => {
                return Err(StoreError::GitAddress { name: new.name.to_string() });
            }
            ContentMethod::Fixed(Method::Recursive, algorithm) => self.take_nar(new, algorithm, source)?,
            ContentMethod::Fixed(Method::Flat, algorithm) => self.take_file(new, algorithm, source)?,
            ContentMethod::Text => self.take_file(new, Algorithm::Sha256, source)?,
        };
        let address = match new.method {
            ContentMethod::Text => ContentAddress::Text(hash.sha256().expect("text is hashed so")),
            ContentMethod::Fixed(method, _) => ContentAddress::Fixed(method, hash),
        };
        let references = References { others: new.references.clone(), to_self: false };
        let path = self.dir().make_content_path(&new.name, &address, &references)?;
        let mut info = PathInfo::new(path.clone(), incoming.nar_hash, incoming.nar_size_bytes);
        info.references.clone_from(&new.references);
        info.content_address = Some(address);
        self.check_repair(new.repair, &path)?;
        let mut arrivals = self.arrivals();
        arrivals.seal(incoming, info)?;
        arrivals.commit()?;
        self.info(&path)
    }

    /// Replacing is needed only where what lies there is not what it ought to be.
    fn check_repair(&self, repair: bool, path: &StorePath) -> Result<(), StoreError> {
        if repair && self.is_valid(path)? && !self.verify_path(path)? {
            return Err(StoreError::CannotReplace { path: self.dir().full(path) });
        }
        Ok(())
    }

    fn take_nar(
        &self,
        new: &NewContent,
        algorithm: Algorithm,
        source: &mut dyn Read,
    ) -> Result<(Incoming<'_>, Hash), StoreError> {
        let mut intake = self.receive(None)?;
        let mut other = (algorithm != Algorithm::Sha256).then(|| Hasher::new(algorithm));
        each_block(source, |bytes| {
            let mut rest = bytes;
            intake.push(&mut rest)?;
            if !rest.is_empty() {
                return Err(StoreError::TrailingBytes { name: new.name.to_string() });
            }
            if let Some(other) = &mut other {
                other.update(bytes);
            }
            Ok(())
        })?;
        let incoming = intake.finish()?;
        let hash = other.map_or_else(|| incoming.nar_hash.to_hash(), Hasher::finish);
        Ok((incoming, hash))
    }

    /// Takes a regular file, bare or as a NAR; what it may execute does not count.
    fn take_file(
        &self,
        new: &NewContent,
        algorithm: Algorithm,
        source: &mut dyn Read,
    ) -> Result<(Incoming<'_>, Hash), StoreError> {
        // An archive says first how long a file is, and a stream of contents does not.
        let mut spool = Spool { store: self, memory: Vec::new(), file: None, size_bytes: 0 };
        let mut hasher = Hasher::new(algorithm);
        if new.is_nar {
            let mut parser = Parser::default();
            each_block(source, |mut bytes| {
                while let Some(event) = parser.next(&mut bytes)? {
                    match event {
                        Event::Contents(contents) => {
                            hasher.update(contents);
                            spool.push(contents)?;
                        }
                        Event::File { .. } | Event::EndFile => {}
                        _ => return Err(StoreError::NotRegular { path: new.name.as_str().into() }),
                    }
                }
                if bytes.is_empty() {
                    return Ok(());
                }
                Err(StoreError::TrailingBytes { name: new.name.to_string() })
            })?;
            parser.finish()?;
        } else {
            each_block(source, |bytes| {
                hasher.update(bytes);
                spool.push(bytes)
            })?;
        }
        let mut intake = self.receive(None)?;
        let (mut encoder, mut framing) = (Encoder::new(), Vec::new());
        encoder.push(Event::File { executable: false, size_bytes: spool.size_bytes }, &mut framing);
        intake.push(&mut framing.as_slice())?;
        spool.play(&mut intake)?;
        framing.clear();
        encoder.push(Event::EndFile, &mut framing);
        intake.push(&mut framing.as_slice())?;
        Ok((intake.finish()?, hasher.finish()))
    }

    /// Adds objects with known records; `check` refuses those that may not come in.
    ///
    /// What came before an error is whole, and stays.
    pub fn add_nars(
        &self,
        source: &mut dyn NarSource,
        options: AddOptions,
        mut check: impl FnMut(&PathInfo) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let mut waiting: Vec<(Incoming<'_>, PathInfo)> = Vec::new();
        let outcome = loop {
            match self.take_object(source, options, &mut check) {
                Ok(Took::Object(object)) => waiting.push(*object),
                Ok(Took::Valid) => {}
                Ok(Took::End) => break Ok(()),
                Err(error) => break Err(error),
            }
            if waiting.len() >= GROUP {
                self.seal_all(&mut waiting)?;
            }
        };
        self.seal_all(&mut waiting)?;
        outcome
    }

    fn seal_all<'s>(&'s self, waiting: &mut Vec<(Incoming<'s>, PathInfo)>) -> Result<(), StoreError> {
        let mut arrivals = self.arrivals();
        let outcome = waiting.drain(..).try_for_each(|(incoming, info)| arrivals.seal(incoming, info));
        arrivals.commit()?;
        outcome
    }

    /// Takes one object.
    fn take_object(
        &self,
        source: &mut dyn NarSource,
        options: AddOptions,
        check: &mut dyn FnMut(&PathInfo) -> Result<(), StoreError>,
    ) -> Result<Took<'_>, StoreError> {
        let Some(info) = source.next_object()? else { return Ok(Took::End) };
        self.add_temp_roots([&info.path])?;
        if self.is_valid(&info.path)? {
            self.check_repair(options.repair, &info.path)?;
            return Ok(Took::Valid);
        }
        check(&info)?;
        let incoming = self.take_checked(&info, source)?;
        let info = PathInfo { nar_size_bytes: incoming.nar_size_bytes, ..info };
        Ok(Took::Object(Box::new((incoming, info))))
    }

    /// Takes a NAR to its end, which must be what its record says.
    pub(crate) fn take_checked(
        &self,
        info: &PathInfo,
        source: &mut (impl Read + ?Sized),
    ) -> Result<Incoming<'_>, StoreError> {
        let path = || self.dir().full(&info.path);
        let mut address = info.content_address.as_ref().map(|ca| AddressCheck::new(info, ca)).transpose()?;
        let mut intake = self.receive(None)?;
        each_block(source, |bytes| {
            let mut rest = bytes;
            intake.push(&mut rest)?;
            if !rest.is_empty() {
                return Err(StoreError::TrailingBytes { name: info.path.name().to_string() });
            }
            address.as_mut().map_or(Ok(()), |address| address.push(bytes))
        })?;
        let incoming = intake.finish()?;
        if incoming.nar_hash != info.nar_hash {
            let (expected, found) = (info.nar_hash, incoming.nar_hash);
            return Err(StoreError::ImportHash { path: path(), expected, found });
        }
        // 0 for unknown.
        if info.nar_size_bytes != 0 && incoming.nar_size_bytes != info.nar_size_bytes {
            let (expected, found) = (info.nar_size_bytes, incoming.nar_size_bytes);
            return Err(StoreError::ImportSize { path: path(), expected, found });
        }
        if let (Some(check), Some(address)) = (address, &info.content_address)
            && !check.accepts(address, incoming.nar_hash)
        {
            return Err(StoreError::ImportAddress { path: path(), address: address.clone() });
        }
        Ok(incoming)
    }

    /// Adds signatures to the record of a valid path.
    pub fn add_signatures(
        &self,
        path: &StorePath,
        signatures: &BTreeSet<larder_core::signature::Signature>,
    ) -> Result<(), StoreError> {
        let added = self.ledger()?.write(|txn| Ok::<_, StoreError>(txn.add_signatures(path, signatures)?));
        added.map_err(|error| error.in_dir(self.dir()))
    }

    /// Notes what an output was built as.
    pub fn add_realisation(&self, realisation: &larder_core::realisation::Realisation) -> Result<(), StoreError> {
        self.register_realisations(std::slice::from_ref(realisation))
    }
}

/// Contents whose length is not known yet: in memory, or in a file without a name.
struct Spool<'s> {
    store: &'s LocalStore,
    memory: Vec<u8>,
    file: Option<File>,
    size_bytes: u64,
}

impl Spool<'_> {
    fn push(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.check_interrupt()?;
        self.size_bytes += bytes.len() as u64;
        if self.file.is_none() && self.memory.len() + bytes.len() <= IN_MEMORY {
            self.memory.extend_from_slice(bytes);
            return Ok(());
        }
        let real_store = &self.store.layout().real_store;
        let failed = |e: std::io::Error| FileError::new("writing temporary file in", real_store, e);
        if self.file.is_none() {
            let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
            let fd = rustix::fs::openat(self.store.store_fd()?, ".", flags, Mode::RUSR | Mode::WUSR);
            let mut file = File::from(fd.map_err(|e| failed(e.into()))?);
            file.write_all(&self.memory).map_err(failed)?;
            self.memory = Vec::new();
            self.file = Some(file);
        }
        let file = self.file.as_mut().expect("made above");
        Ok(file.write_all(bytes).map_err(failed)?)
    }

    fn play(mut self, intake: &mut Intake<'_>) -> Result<(), StoreError> {
        let Some(file) = &mut self.file else { return intake.push(&mut self.memory.as_slice()) };
        file.rewind().map_err(StoreError::Input)?;
        each_block(file, |mut bytes| intake.push(&mut bytes))
    }
}
