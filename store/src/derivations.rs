//! Derivations that lie in the store.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Read as _;
use std::os::fd::OwnedFd;

use larder_core::content_address::ContentAddress;
use larder_core::derivation::aterm::{self, Mask};
use larder_core::derivation::check::{check, fill_output_paths};
use larder_core::derivation::{Derivation, name_of};
use larder_core::hash::Sha256Digest;
use larder_core::nar::Event;
use larder_core::nar::encoder::Encoder;
use larder_core::path_info::PathInfo;
use larder_core::store_path::StorePath;
use larder_fs::file_error::FileError;
use rustix::fs::{Mode, OFlags};

use crate::error::StoreError;
use crate::ingest::Arrivals;
use crate::local::LocalStore;

/// The largest derivation that is read, in bytes. Real ones have up to some megabytes.
const MAX_DERIVATION_BYTES: u64 = 256 << 20;

impl LocalStore {
    /// Reads the derivation at a path, valid or not.
    pub fn derivation(&self, path: &StorePath) -> Result<Derivation, StoreError> {
        self.derivation_in(path, OsStr::new(&path.to_string()))
    }

    /// Reads the derivation that will be at `path` and lies at an entry of the store directory.
    pub(crate) fn derivation_in(&self, path: &StorePath, entry: &OsStr) -> Result<Derivation, StoreError> {
        let full = || self.dir().full(path);
        let real = || self.layout().real_store.join(entry);
        let io = |source: std::io::Error| StoreError::from(FileError::new("opening file", real(), source));
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let fd: OwnedFd = match self.store_fd() {
            Ok(dir) => rustix::fs::openat(dir, entry, flags, Mode::empty()),
            Err(_) => rustix::fs::open(real(), flags, Mode::empty()),
        }
        .map_err(|e| io(e.into()))?;
        let file = std::fs::File::from(fd);
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            return Err(StoreError::NotRegular { path: real() });
        }
        if meta.len() > MAX_DERIVATION_BYTES {
            return Err(StoreError::LargeDerivation { path: full(), size_bytes: meta.len() });
        }
        let mut text = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
        file.take(MAX_DERIVATION_BYTES).read_to_end(&mut text).map_err(io)?;
        let name = name_of(path).map_err(|_| self.not_valid(path))?;
        aterm::parse(self.dir(), &name, &text).map_err(|source| StoreError::Derivation { path: full(), source })
    }

    /// Gives outputs that have no path yet the one that follows from the derivation, in its
    /// environment too, as an evaluator would. The derivations it is made of must be there.
    ///
    /// Nothing changes above outputs whose paths are known only once they are built.
    pub fn fill_output_paths(&self, drv: &mut Derivation) -> Result<(), StoreError> {
        let mut memo = self.derivations.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        fill_output_paths(&mut memo, self.dir(), drv, |input| self.derivation(input).map_err(Box::new))
            .map_err(|error| StoreError::DerivationCheck(Box::new(error)))
    }

    /// Checks a derivation that is to become valid, and gives its outputs.
    ///
    /// It lies at `entry` of the store directory; its references are valid or about to be.
    pub(crate) fn check_derivation(
        &self,
        path: &StorePath,
        entry: &OsStr,
    ) -> Result<BTreeMap<String, StorePath>, StoreError> {
        let drv = self.derivation_in(path, entry)?;
        check(self.dir(), path, &drv, || {
            let mut memo = self.derivations.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            memo.modulo(self.dir(), &drv, Mask::On, |input| self.derivation(input).map_err(Box::new))
        })
        .map_err(|error| StoreError::DerivationCheck(Box::new(error)))?;
        Ok(drv.output_paths().filter_map(|(name, path)| Some((name.as_str().to_owned(), path?.clone()))).collect())
    }
}

impl Arrivals<'_> {
    /// Takes a derivation in as a `.drv` file. What it refers to must be valid or pending.
    ///
    /// It becomes valid with the next [`Arrivals::commit`].
    /// Errors: it says of itself what is not so, such as output paths that do not follow from it.
    pub fn add_derivation(&mut self, drv: &Derivation) -> Result<StorePath, StoreError> {
        let store = self.store();
        let text = drv.to_aterm(store.dir());
        let path = drv.path(store.dir())?;
        let mut intake = store.receive(None)?;
        let mut archive = Vec::with_capacity(text.len() + 128);
        let mut encoder = Encoder::new();
        encoder.push(Event::File { executable: false, size_bytes: text.len() as u64 }, &mut archive);
        encoder.push(Event::Contents(&text), &mut archive);
        encoder.push(Event::EndFile, &mut archive);
        intake.push(&mut archive.as_slice())?;
        let incoming = intake.finish()?;
        let mut info = PathInfo::new(path.clone(), incoming.nar_hash, incoming.nar_size_bytes);
        info.references = drv.references();
        info.content_address = Some(ContentAddress::Text(Sha256Digest::of(&text)));
        self.seal(incoming, info)?;
        Ok(path)
    }
}
