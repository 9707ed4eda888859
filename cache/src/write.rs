//! Writing to a cache on a disk.
//!
//! An archive gets a name only when it lies there whole and is on the disk; what is said of it
//! (`.narinfo`) comes last, and only after that of everything it refers to. So whoever reads the
//! cache meanwhile, and whoever finds it after a crash, finds nothing that is not there.
//!
//! Source: protocols, sections 5.1 and 5.5.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use larder_core::api;
use larder_core::hash::{Algorithm, Hasher, NarHasher};
use larder_core::narinfo::{CacheInfo, NarInfo};
use larder_core::path_info::PathInfo;
use larder_core::signature::SecretKey;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::compress::{Encoder, LevelChoice, Method};
use crate::error::CacheError;
use crate::files::Folder;
use crate::listing::Lister;
use crate::uri::{CacheUri, Location};

/// Archives from this size on (bytes) are compressed by several threads, where the method can.
const PARALLEL_FROM: u64 = 8 << 20;

/// A cache that is written to.
#[derive(Debug)]
pub struct Writer {
    folder: Folder,
    uri: String,
    dir: StoreDir,
    method: Method,
    level: LevelChoice,
    threads: u32,
    key: Option<SecretKey>,
    listings: bool,
}

/// What an archive came to.
#[derive(Debug)]
pub struct Written {
    pub info: NarInfo,
    listing: Option<String>,
}

/// Counts and hashes on the way into a file.
struct Counted<W> {
    out: W,
    hasher: Hasher,
    size_bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.hasher.update(bytes.get(..n).unwrap_or_default());
        self.size_bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// An archive on its way: hashed, listed and compressed.
struct Passing<W: Write> {
    encoder: Encoder<W>,
    hasher: NarHasher,
    lister: Option<Lister>,
}

impl<W: Write> Write for Passing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.encoder.write_all(bytes)?;
        self.hasher.update(bytes);
        if let Some(lister) = &mut self.lister {
            lister.push(bytes).map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.encoder.flush()
    }
}

/// A file without its final name; gone when dropped.
struct Draft {
    file: File,
    path: PathBuf,
    is_named: bool,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_named {
            // What stays is no file of the cache, and may be deleted by anyone.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Writer {
    /// Opens a cache, and makes it if there is none. `usual` is how it compresses if the URI does
    /// not say.
    pub fn open(uri: &CacheUri, dir: &StoreDir, usual: Method, threads: u32) -> Result<Self, CacheError> {
        let Location::Folder(path) = &uri.location else {
            return Err(uri.invalid("only caches on a disk (file://) can be written to".to_owned()));
        };
        let method = match uri.parameter("compression") {
            None => usual,
            Some(name) => Method::parse(name)
                .ok_or_else(|| CacheError::Compression { uri: uri.shown.clone(), method: name.to_owned() })?,
        };
        let key = match uri.parameter("secret-key") {
            None => None,
            Some(file) => {
                let failed = |source| CacheError::KeyFile { path: file.into(), source };
                Some(SecretKey::parse(&std::fs::read_to_string(file).map_err(failed)?)?)
            }
        };
        let parallel = uri.flag("parallel-compression")?.unwrap_or(true);
        let writer = Self {
            folder: Folder::new(path.clone(), uri.shown.clone()),
            uri: uri.shown.clone(),
            dir: dir.clone(),
            method,
            level: uri.number("compression-level")?.filter(|level| *level != -1),
            threads: if parallel { threads } else { 1 },
            key,
            listings: uri.flag("write-nar-listing")?.unwrap_or(false),
        };
        for name in ["nar", "log", "realisations"] {
            let folder = path.join(name);
            std::fs::create_dir_all(&folder).map_err(|source| CacheError::File {
                doing: "making directory",
                path: folder,
                source,
            })?;
        }
        writer.tell_of_itself()?;
        Ok(writer)
    }

    /// As people see it.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    fn tell_of_itself(&self) -> Result<(), CacheError> {
        const NAME: &str = "nix-cache-info";
        if let Some((file, _)) = self.folder.open(NAME)? {
            let mut text = Vec::new();
            file.take(64 << 10).read_to_end(&mut text).map_err(|error| self.folder.reading(NAME, error))?;
            CacheInfo::parse(&self.dir, &text, &self.uri)?;
            return Ok(());
        }
        let info = CacheInfo { has_store_dir: true, ..CacheInfo::default() };
        self.put(NAME, info.to_text(&self.dir).as_bytes())
    }

    /// Has the cache this path already?
    pub fn has(&self, path: &StorePath) -> Result<bool, CacheError> {
        Ok(self.folder.open(&format!("{}.narinfo", path.hash_part()))?.is_some())
    }

    /// Writes the archive of an object, and nothing yet of what is said of it. `dump` writes it to
    /// what it is given.
    pub fn write_nar(
        &self,
        info: &PathInfo,
        dump: impl FnOnce(&mut dyn Write) -> Result<(), api::StoreError>,
    ) -> Result<Written, CacheError> {
        let mut draft = Self::draft(&self.folder.path().join("nar"))?;
        let failed = |source| CacheError::Compress { method: self.method.name(), source };
        let file = BufWriter::with_capacity(256 << 10, draft.file.try_clone().map_err(failed)?);
        let counted = Counted { out: file, hasher: Hasher::new(Algorithm::Sha256), size_bytes: 0 };
        let threads = if info.nar_size_bytes >= PARALLEL_FROM { self.threads } else { 1 };
        let encoder = Encoder::new(self.method, self.level, threads, counted).map_err(failed)?;
        let mut passing = Passing { encoder, hasher: NarHasher::new(), lister: self.listings.then(Lister::new) };
        dump(&mut passing)?;
        let Passing { encoder, hasher, lister } = passing;
        let mut counted = encoder.finish().map_err(failed)?;
        counted.flush().map_err(failed)?;
        let Counted { out, hasher: file_hasher, size_bytes } = counted;
        drop(out);
        let (nar_hash, nar_size_bytes) = hasher.finish();
        if nar_hash != info.nar_hash {
            let text = format!("hash of path '{}' has changed", self.dir.display(&info.path));
            return Err(api::StoreError::new(api::ErrorKind::Other, text).into());
        }
        let file_hash = file_hasher.finish();
        let base = file_hash.encode(larder_core::hash::Encoding::Base32);
        let url = format!("nar/{base}.nar{}", self.method.extension());
        self.name(&mut draft, &url)?;
        let info = PathInfo { nar_size_bytes, ..info.clone() };
        let info = NarInfo {
            info: self.signed(info)?,
            url,
            compression: self.method.name().to_owned(),
            file_hash: Some(file_hash),
            file_size_bytes: Some(size_bytes),
        };
        Ok(Written { info, listing: lister.and_then(Lister::finish) })
    }

    fn signed(&self, mut info: PathInfo) -> Result<PathInfo, CacheError> {
        if let Some(key) = &self.key {
            info.signatures.insert(key.sign_path(&self.dir, &info)?);
        }
        Ok(info)
    }

    /// Says what is there of an object, whose archive and references are in the cache.
    pub fn write_info(&self, written: &Written) -> Result<(), CacheError> {
        let part = written.info.info.path.hash_part();
        if let Some(listing) = &written.listing {
            self.put(&format!("{part}.ls"), listing.as_bytes())?;
        }
        self.put(&format!("{part}.narinfo"), written.info.to_text(&self.dir).as_bytes())
    }

    /// Writes the log of a build.
    pub fn write_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), CacheError> {
        let mut draft = Self::draft(&self.folder.path().join("log"))?;
        io::copy(log, &mut draft.file).map_err(|source| CacheError::File {
            doing: "writing file",
            path: draft.path.clone(),
            source,
        })?;
        self.name(&mut draft, &format!("log/{drv}"))
    }

    /// Brings the names of all that was written to the disk.
    pub fn finish(&self) -> Result<(), CacheError> {
        for path in [self.folder.path().join("nar"), self.folder.path().to_owned()] {
            let synced = File::open(&path).and_then(|dir| dir.sync_all());
            synced.map_err(|source| CacheError::File { doing: "syncing", path, source })?;
        }
        Ok(())
    }

    /// Writes a small file.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), CacheError> {
        let mut draft = Self::draft(self.folder.path())?;
        draft.file.write_all(bytes).map_err(|source| CacheError::File {
            doing: "writing file",
            path: draft.path.clone(),
            source,
        })?;
        self.name(&mut draft, name)
    }

    fn draft(folder: &Path) -> Result<Draft, CacheError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".larder.tmp.{}.{number}", std::process::id()));
        // A file of that name is left of a process that was killed, and whose number came again.
        let _ = std::fs::remove_file(&path);
        let opened = File::options().write(true).create_new(true).mode(0o644).open(&path);
        let file = opened.map_err(|source| CacheError::File { doing: "making file", path: path.clone(), source })?;
        Ok(Draft { file, path, is_named: false })
    }

    /// Brings a file to the disk, and gives it its name.
    fn name(&self, draft: &mut Draft, name: &str) -> Result<(), CacheError> {
        let path = self.folder.path().join(name);
        let failed = |doing, path: &Path, source| CacheError::File { doing, path: path.to_owned(), source };
        draft.file.sync_data().map_err(|source| failed("syncing", &draft.path, source))?;
        std::fs::rename(&draft.path, &path).map_err(|source| failed("renaming to", &path, source))?;
        draft.is_named = true;
        Ok(())
    }
}

/// Writes many objects, the archives in several threads at once. `infos` have references before
/// what refers to them; those that the cache has are left out. `begin` hears of each that is
/// written.
pub fn write_all(
    writer: &Writer,
    infos: &[PathInfo],
    threads: usize,
    begin: &(dyn Fn(&StorePath) + Sync),
    dump: &(dyn Fn(&StorePath, &mut dyn Write) -> Result<(), api::StoreError> + Sync),
) -> Result<(), CacheError> {
    use std::sync::{Mutex, PoisonError};
    struct Line {
        /// Archives that lie there, by the number of their object.
        done: Vec<Option<Written>>,
        /// The first object that nothing is said of.
        next: usize,
        failed: Option<CacheError>,
    }
    let line = Mutex::new(Line { done: infos.iter().map(|_| None).collect(), next: 0, failed: None });
    let lock = || line.lock().unwrap_or_else(PoisonError::into_inner);
    let number = std::sync::atomic::AtomicUsize::new(0);
    let work = || {
        loop {
            let at = number.fetch_add(1, Ordering::Relaxed);
            let Some(info) = infos.get(at) else { return };
            if lock().failed.is_some() {
                return;
            }
            begin(&info.path);
            let written = writer.write_nar(info, |out| dump(&info.path, out));
            let mut line = lock();
            match written {
                Ok(written) => {
                    if let Some(place) = line.done.get_mut(at) {
                        *place = Some(written);
                    }
                }
                Err(error) => {
                    line.failed.get_or_insert(error);
                    return;
                }
            }
            // In order: nothing is said of an object before what it refers to.
            let line = &mut *line;
            while let Some(written) = line.done.get_mut(line.next).and_then(Option::take) {
                line.next += 1;
                if let Err(error) = writer.write_info(&written) {
                    line.failed.get_or_insert(error);
                    return;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(infos.len()) {
            // With fewer threads it takes longer, and that is all.
            let _ = std::thread::Builder::new().name("compress".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    if let Some(error) = line.into_inner().unwrap_or_else(PoisonError::into_inner).failed {
        return Err(error);
    }
    writer.finish()
}
