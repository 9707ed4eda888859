//! Writing to a cache: on a disk, by `PUT` to a web server, or to a bucket of S3.
//!
//! On a disk an archive gets its name only when it lies there whole and is on the disk. A server is
//! sent what is whole only, out of a file that has no name. What is said of an object (`.narinfo`)
//! comes last, and only after that of everything it refers to. So whoever reads the cache
//! meanwhile, and whoever finds it after a crash, finds nothing that is not there.
//!
//! Source: protocols, sections 5.1 and 5.5.

mod queue;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::bounded;
use larder_core::api;
use larder_core::hash::{Algorithm, Hasher, NarHasher};
use larder_core::narinfo::{CacheInfo, NarInfo};
use larder_core::path_info::PathInfo;
use larder_core::signature::SecretKey;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use self::queue::{Queue, Task};
use crate::client::{Client, Payload};
use crate::compress::{Encoder, LevelChoice, Method, compress};
use crate::error::CacheError;
use crate::listing::Lister;
use crate::lookups::{CacheId, Known, Lookups};
use crate::parallel::in_parallel;
use crate::place::{CACHE_INFO, CACHE_INFO_MAX, Place};
use crate::uri::CacheUri;

/// Requests at once where they are not limited, and the most where they are.
const MANY: usize = 25;
const MOST: usize = 100;

/// Archives from this size on (bytes) are compressed by several threads, where the method can.
const PARALLEL_FROM: u64 = 8 << 20;

/// A cache that is written to.
#[derive(Debug)]
pub struct Writer {
    place: Place,
    id: CacheId,
    /// What readers on this machine remember, also that something was not there.
    lookups: Lookups,
    dir: StoreDir,
    method: Method,
    small: SmallMethods,
    level: LevelChoice,
    threads: u32,
    key: Option<SecretKey>,
    listings: bool,
}

/// How small files are compressed, in a bucket: the server tells of that as of a content encoding.
#[derive(Debug, Clone, Copy)]
struct SmallMethods {
    narinfo: Method,
    listing: Method,
    log: Method,
}

/// The sorts of files that a cache has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sort {
    CacheInfo,
    NarInfo,
    Nar,
    Listing,
    Log,
}

impl Sort {
    /// Its `Content-Type`.
    const fn kind(self) -> &'static str {
        match self {
            Self::CacheInfo => "text/x-nix-cache-info",
            Self::NarInfo => "text/x-nix-narinfo",
            Self::Nar => "application/x-nix-nar",
            Self::Listing => "application/json",
            Self::Log => "text/plain; charset=utf-8",
        }
    }
}

/// What an archive came to, and is to be said of it.
#[derive(Debug)]
struct Written {
    info: NarInfo,
    listing: Option<String>,
}

/// An archive on its way to the cache.
struct Archive {
    draft: Draft,
    written: Written,
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
    /// `None`: it has no name at all.
    path: Option<PathBuf>,
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // What stays is no file of the cache, and may be deleted by anyone.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Draft {
    fn failed(&self, doing: &'static str, source: io::Error) -> CacheError {
        CacheError::File { doing, path: self.path.clone().unwrap_or_else(std::env::temp_dir), source }
    }
}

impl Writer {
    /// Opens a cache, and makes it if there is none. `usual` is how it compresses if the URI does
    /// not say. What is written goes into the `lookups` as well.
    pub fn open(
        uri: &CacheUri,
        dir: &StoreDir,
        client: &Arc<Client>,
        lookups: Lookups,
        usual: Method,
        threads: u32,
    ) -> Result<Self, CacheError> {
        let key = match uri.parameter("secret-key") {
            None => None,
            Some(file) => {
                let failed = |source| CacheError::KeyFile { path: file.into(), source };
                Some(SecretKey::parse(&std::fs::read_to_string(file).map_err(failed)?)?)
            }
        };
        let parallel = uri.flag("parallel-compression")?.unwrap_or(true);
        let small = |name| uri.method(name).map(|method| method.unwrap_or(Method::None));
        let writer = Self {
            place: Place::of(uri, client)?,
            id: CacheId::of(&uri.identity),
            lookups,
            dir: dir.clone(),
            method: uri.method("compression")?.unwrap_or(usual),
            small: SmallMethods {
                narinfo: small("narinfo-compression")?,
                listing: small("ls-compression")?,
                log: small("log-compression")?,
            },
            level: uri.number("compression-level")?.filter(|level| *level != -1),
            threads: if parallel { threads } else { 1 },
            key,
            listings: uri.flag("write-nar-listing")?.unwrap_or(false),
        };
        if let Place::Folder(folder) = &writer.place {
            for name in ["nar", "log", "realisations"] {
                let path = folder.path().join(name);
                let made = std::fs::create_dir_all(&path);
                made.map_err(|source| CacheError::File { doing: "making directory", path, source })?;
            }
        }
        writer.tell_of_itself()?;
        Ok(writer)
    }

    /// As people see it.
    pub fn uri(&self) -> &str {
        self.place.uri()
    }

    /// Threads that are of use when each compresses or waits for a server; `jobs` compress.
    fn threads(&self, jobs: usize) -> usize {
        match &self.place {
            Place::Folder(_) => jobs,
            Place::Web(web) => match web.client().options().connections {
                0 => MANY.max(jobs),
                most => most.clamp(jobs, MOST.max(jobs)),
            },
        }
    }

    fn tell_of_itself(&self) -> Result<(), CacheError> {
        if let Some(text) = self.place.small(CACHE_INFO, CACHE_INFO_MAX)? {
            CacheInfo::parse(&self.dir, &text, self.uri())?;
            return Ok(());
        }
        let info = CacheInfo { has_store_dir: true, ..CacheInfo::default() };
        self.put(Sort::CacheInfo, CACHE_INFO, info.to_text(&self.dir).into_bytes())
    }

    /// Those of the paths that the cache has not got yet.
    pub fn missing(&self, paths: &BTreeSet<StorePath>) -> Result<BTreeSet<StorePath>, CacheError> {
        let list: Vec<&StorePath> = paths.iter().collect();
        let there =
            in_parallel(self.threads(1), &list, |path| self.place.has(&format!("{}.narinfo", path.hash_part())));
        let mut missing = BTreeSet::new();
        for (path, there) in list.into_iter().zip(there) {
            if !there? {
                missing.insert(path.clone());
            }
        }
        Ok(missing)
    }

    /// Makes the archive of an object, which `dump` writes to what it is given.
    fn compressed(
        &self,
        info: &PathInfo,
        dump: impl FnOnce(&mut dyn Write) -> Result<(), api::StoreError>,
    ) -> Result<Archive, CacheError> {
        let draft = self.draft("nar")?;
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
        let info = PathInfo { nar_size_bytes, ..info.clone() };
        let info = NarInfo {
            info: self.signed(info)?,
            url: format!("nar/{base}.nar{}", self.method.extension()),
            compression: self.method.name().to_owned(),
            file_hash: Some(file_hash),
            file_size_bytes: Some(size_bytes),
        };
        Ok(Archive { draft, written: Written { info, listing: lister.and_then(Lister::finish) } })
    }

    /// Brings an archive to the cache, of which nothing is said there yet.
    fn send(&self, archive: Archive) -> Result<Written, CacheError> {
        let Archive { draft, written } = archive;
        self.name(draft, Sort::Nar, &written.info.url)?;
        Ok(written)
    }

    fn signed(&self, mut info: PathInfo) -> Result<PathInfo, CacheError> {
        if let Some(key) = &self.key {
            info.signatures.insert(key.sign_path(&self.dir, &info)?);
        }
        Ok(info)
    }

    /// Says what is there of an object, whose archive and references are in the cache.
    fn write_info(&self, written: Written) -> Result<(), CacheError> {
        let part = written.info.info.path.hash_part();
        if let Some(listing) = written.listing {
            self.put(Sort::Listing, &format!("{part}.ls"), listing.into_bytes())?;
        }
        let text = written.info.to_text(&self.dir);
        self.put(Sort::NarInfo, &format!("{part}.narinfo"), text.clone().into_bytes())?;
        if matches!(self.place, Place::Web(_)) {
            self.lookups.put(self.id, true, part, Known::There(Arc::new(written.info)), text.as_bytes());
        }
        Ok(())
    }

    /// Writes the log of a build.
    pub fn write_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), CacheError> {
        let name = format!("log/{drv}");
        let mut draft = self.draft("log")?;
        if self.small.log == Method::None || matches!(self.place, Place::Folder(_)) {
            io::copy(log, &mut draft.file).map_err(|source| draft.failed("writing file", source))?;
            return self.name(draft, Sort::Log, &name);
        }
        let failed = |source| CacheError::Compress { method: self.small.log.name(), source };
        let file = draft.file.try_clone().map_err(failed)?;
        let mut encoder = Encoder::new(self.small.log, None, 1, file).map_err(failed)?;
        io::copy(log, &mut encoder).map_err(failed)?;
        encoder.finish().map_err(failed)?;
        self.name(draft, Sort::Log, &name)
    }

    /// Brings the names of all that was written to the disk.
    fn finish(&self) -> Result<(), CacheError> {
        let Place::Folder(folder) = &self.place else { return Ok(()) };
        for path in [folder.path().join("nar"), folder.path().to_owned()] {
            let synced = File::open(&path).and_then(|dir| dir.sync_all());
            synced.map_err(|source| CacheError::File { doing: "syncing", path, source })?;
        }
        Ok(())
    }

    /// The encoding of a sort of files. Where there is no server to tell of it, there is none.
    fn encoding(&self, sort: Sort) -> Method {
        match sort {
            _ if matches!(self.place, Place::Folder(_)) => Method::None,
            Sort::NarInfo => self.small.narinfo,
            Sort::Listing => self.small.listing,
            Sort::Log => self.small.log,
            Sort::CacheInfo | Sort::Nar => Method::None,
        }
    }

    /// Writes a small file.
    fn put(&self, sort: Sort, name: &str, bytes: Vec<u8>) -> Result<(), CacheError> {
        match &self.place {
            Place::Folder(_) => {
                let mut draft = self.draft("")?;
                draft.file.write_all(&bytes).map_err(|source| draft.failed("writing file", source))?;
                self.name(draft, sort, name)
            }
            Place::Web(web) => {
                let method = self.encoding(sort);
                let failed = |source| CacheError::Compress { method: method.name(), source };
                let bytes = if method == Method::None { bytes } else { compress(method, &bytes).map_err(failed)? };
                web.put(name, Payload { encoding: encoding_of(method), ..Payload::bytes(sort.kind(), bytes) })
            }
        }
    }

    /// A file that will be in a folder of the cache, or on a server.
    fn draft(&self, folder: &str) -> Result<Draft, CacheError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let doing = "making file";
        let Place::Folder(cache) = &self.place else {
            let failed = |source| CacheError::File { doing, path: std::env::temp_dir(), source };
            return Ok(Draft { file: tempfile::tempfile().map_err(failed)?, path: None });
        };
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = cache.path().join(folder).join(format!(".larder.tmp.{}.{number}", std::process::id()));
        // A file of that name is left of a process that was killed, and whose number came again.
        let _ = std::fs::remove_file(&path);
        let opened = File::options().write(true).create_new(true).mode(0o644).open(&path);
        let file = opened.map_err(|source| CacheError::File { doing, path: path.clone(), source })?;
        Ok(Draft { file, path: Some(path) })
    }

    /// Brings a file to the disk and gives it its name, or to the server, if that has not got it.
    fn name(&self, mut draft: Draft, sort: Sort, name: &str) -> Result<(), CacheError> {
        match &self.place {
            Place::Folder(folder) => {
                draft.file.sync_data().map_err(|source| draft.failed("syncing", source))?;
                if let Some(draft) = draft.path.take() {
                    let path = folder.path().join(name);
                    let renamed = std::fs::rename(&draft, &path);
                    renamed.map_err(|source| CacheError::File { doing: "renaming to", path, source })?;
                }
                Ok(())
            }
            Place::Web(web) => {
                // An archive is called by its hash.
                if sort == Sort::Nar && self.place.has(name)? {
                    return Ok(());
                }
                let file = draft.file.try_clone().map_err(|source| draft.failed("opening file", source))?;
                let size = file.metadata().map_err(|source| draft.failed("getting status of", source))?.len();
                let encoding = encoding_of(self.encoding(sort));
                web.put(name, Payload { encoding, ..Payload::file(sort.kind(), Arc::new(file), size) })
            }
        }
    }
}

/// As headers name it.
fn encoding_of(method: Method) -> Option<&'static str> {
    (method != Method::None).then(|| method.name())
}

/// Writes many objects, `jobs` archives at once and no more requests than the settings allow. What
/// the `infos` refer to is in the cache or among them. `begin` hears of each that is written.
pub fn write_all(
    writer: &Writer,
    infos: &[PathInfo],
    jobs: usize,
    begin: &(dyn Fn(&StorePath) + Sync),
    dump: &(dyn Fn(&StorePath, &mut dyn Write) -> Result<(), api::StoreError> + Sync),
) -> Result<(), CacheError> {
    let queue = Queue::new(infos);
    // Whoever compresses holds one of so many places; who waits for the server does not.
    let (take, give) = bounded(jobs.max(1));
    let work = || {
        let _watch = queue.watch();
        while let Some(task) = queue.next() {
            let done = match task {
                Task::Nar(number, info) => {
                    begin(&info.path);
                    let _ = take.send(());
                    let archive = writer.compressed(info, |out| dump(&info.path, out));
                    let _ = give.recv();
                    archive.and_then(|archive| writer.send(archive)).map(|written| queue.arrived(number, written))
                }
                Task::Info(number, written) => writer.write_info(*written).map(|()| queue.told(number)),
            };
            if let Err(error) = done {
                queue.fail(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..writer.threads(jobs.max(1)).min(infos.len()) {
            // With fewer threads it takes longer, and that is all.
            let _ = std::thread::Builder::new().name("push".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    queue.finish()?;
    writer.finish()
}
