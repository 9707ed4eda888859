//! One binary cache.
//!
//! Source: protocols, sections 5.1 and 5.5; modern, section 2.9; `cache_info.json`.

use std::io::{BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use larder_core::hash_part::HashPart;
use larder_core::narinfo::{self, CacheInfo, NarInfo};
use larder_core::realisation::{self, DrvOutput, Realisation};
use larder_core::report::{Level, Reporter, chain};
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::client::{Client, Payload};
use crate::closure;
use crate::compress::Method;
use crate::error::CacheError;
use crate::lapses::Lapses;
use crate::lookups::{CacheId, Known, Lookups};
use crate::nar::NarReader;
use crate::place::{CACHE_INFO, CACHE_INFO_MAX, Place};
use crate::uri::CacheUri;

/// The file in which a cache says what an output was built as.
pub(crate) fn realisation_name(id: &DrvOutput) -> String {
    format!("realisations/{id}.doi")
}

/// One cache.
pub struct BinaryCache {
    uri: CacheUri,
    place: Place,
    dir: StoreDir,
    id: CacheId,
    info: CacheInfo,
    priority: i32,
    wants_mass_query: bool,
    is_trusted: bool,
    /// Where whole closures can be asked for, if anywhere.
    closures: Option<String>,
    refuses_closures: AtomicBool,
    lapses: Lapses,
    reporter: Arc<dyn Reporter + Send + Sync>,
}

impl std::fmt::Debug for BinaryCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BinaryCache").field("uri", &self.uri.shown).finish_non_exhaustive()
    }
}

impl BinaryCache {
    /// Looks at a cache. Errors: there is none, it is for another store directory, or it is ill.
    pub fn open(
        uri: CacheUri,
        dir: &StoreDir,
        client: &Arc<Client>,
        lookups: &Lookups,
        reporter: Arc<dyn Reporter + Send + Sync>,
    ) -> Result<Self, CacheError> {
        let place = Place::of(&uri, client)?;
        let (priority, wanted) = (uri.number("priority")?, uri.flag("want-mass-query")?);
        let mut cache = Self {
            id: CacheId::of(&uri.identity),
            is_trusted: uri.flag("trusted")?.unwrap_or(false),
            place,
            dir: dir.clone(),
            info: CacheInfo::default(),
            priority: 0,
            wants_mass_query: false,
            closures: None,
            refuses_closures: AtomicBool::new(false),
            lapses: Lapses::default(),
            reporter,
            uri,
        };
        let text = match cache.on_disk().then(|| lookups.cache_info(cache.id)).flatten() {
            Some(text) => text,
            None => match cache.small(CACHE_INFO, CACHE_INFO_MAX)? {
                Some(text) => {
                    if cache.on_disk() {
                        lookups.put_cache_info(cache.id, &text);
                    }
                    text
                }
                None if cache.on_disk() => return Err(CacheError::NoCache { uri: cache.uri.shown }),
                // A folder that is empty, or not there yet.
                None => Vec::new(),
            },
        };
        cache.info = CacheInfo::parse(dir, &text, &cache.uri.shown)?;
        cache.closures = closure::offered(&text);
        cache.priority = priority.or(cache.info.priority).unwrap_or(0);
        cache.wants_mass_query = wanted.unwrap_or(cache.info.want_mass_query);
        Ok(cache)
    }

    /// As people see it.
    pub fn uri(&self) -> &str {
        &self.uri.shown
    }

    /// Lower is asked first.
    pub const fn priority(&self) -> i32 {
        self.priority
    }

    /// May it be asked for many paths that it may well not have?
    pub const fn wants_mass_query(&self) -> bool {
        self.wants_mass_query
    }

    /// Do its paths count without signatures?
    pub const fn is_trusted(&self) -> bool {
        self.is_trusted
    }

    /// Is it worth writing down what it says? On the disk it is already.
    pub(crate) const fn on_disk(&self) -> bool {
        matches!(self.place, Place::Web(_))
    }

    pub(crate) const fn id(&self) -> CacheId {
        self.id
    }

    /// Why it is passed over, if it is.
    pub(crate) fn disabled(&self) -> Option<CacheError> {
        self.lapses.disabled(&self.uri.shown)
    }

    /// Notes an error, if it says something of the whole cache.
    pub(crate) fn note(&self, error: &CacheError) {
        self.lapses.note(&self.uri.shown, error, &*self.reporter);
    }

    /// A file that is read into memory; `None` if there is none.
    pub fn small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>, CacheError> {
        self.place.small(name, limit)
    }

    /// What is known already of what it has.
    pub(crate) fn known(&self, lookups: &Lookups, part: HashPart) -> Option<Known> {
        let parse = |text: &[u8]| NarInfo::parse(&self.dir, text, "").ok();
        lookups.get(self.id, self.on_disk(), part, parse)
    }

    /// What it has of a path.
    pub fn narinfo(&self, lookups: &Lookups, part: HashPart) -> Result<Known, CacheError> {
        if let Some(known) = self.known(lookups, part) {
            return Ok(known);
        }
        let name = format!("{part}.narinfo");
        match self.small(&name, narinfo::MAX_LEN as u64)? {
            None => {
                lookups.put(self.id, self.on_disk(), part, Known::Absent, b"");
                Ok(Known::Absent)
            }
            Some(text) => self.take_in(lookups, part, &text),
        }
    }

    /// Remembers the text of a narinfo file that the cache gave for a hash part.
    fn take_in(&self, lookups: &Lookups, part: HashPart, text: &[u8]) -> Result<Known, CacheError> {
        let name = format!("{part}.narinfo");
        let info = NarInfo::parse(&self.dir, text, &name).map_err(|source| CacheError::NarInfo {
            uri: self.uri.shown.clone(),
            name,
            source,
        })?;
        if !info.answers(part, None) {
            self.reporter.message(
                Level::Warn,
                format_args!(
                    "the cache '{}' was asked for the path with the hash part '{part}' and tells of '{}'; \
                     it is taken as not having it",
                    self.uri(),
                    self.dir.display(&info.info.path)
                ),
            );
            lookups.put(self.id, false, part, Known::Absent, b"");
            return Ok(Known::Absent);
        }
        let known = Known::There(Arc::new(info));
        lookups.put(self.id, self.on_disk(), part, known.clone(), text);
        Ok(known)
    }

    /// What it says that an output of a derivation was built as.
    ///
    /// What it says of another output than the one asked for is as good as nothing.
    pub fn realisation(&self, lookups: &Lookups, id: &DrvOutput) -> Result<Known<Realisation>, CacheError> {
        if let Some(known) = lookups.realisation(self.id, self.on_disk(), id) {
            return Ok(known);
        }
        let name = realisation_name(id);
        let Some(text) = self.small(&name, realisation::MAX_LEN as u64)? else {
            lookups.put_realisation(self.id, self.on_disk(), id, Known::Absent, b"");
            return Ok(Known::Absent);
        };
        let read = Realisation::from_json(&text).map_err(|error| CacheError::Realisation {
            uri: self.uri.shown.clone(),
            name,
            source: Box::new(error),
        })?;
        if read.id != *id {
            self.reporter.message(
                Level::Warn,
                format_args!(
                    "the cache '{}' was asked for the realisation of '{id}' and tells of '{}'; it is taken as not \
                     having it",
                    self.uri(),
                    read.id
                ),
            );
            lookups.put_realisation(self.id, false, id, Known::Absent, b"");
            return Ok(Known::Absent);
        }
        let known = Known::There(Arc::new(read));
        lookups.put_realisation(self.id, self.on_disk(), id, known.clone(), &text);
        Ok(known)
    }

    /// Opens an archive; `None` if the cache has not got it after all.
    pub fn nar(&self, info: &NarInfo) -> Result<Option<NarReader>, CacheError> {
        let uncompressed = Method::parse(&info.compression) == Some(Method::None);
        let file = self.place.open(&info.url, uncompressed)?;
        file.map(|file| NarReader::new(self.uri(), info, file)).transpose()
    }

    /// The log of a build, if it has that.
    pub fn log(&self, drv: &StorePath) -> Result<Option<Box<dyn Read + Send>>, CacheError> {
        self.place.open(&format!("log/{drv}"), true)
    }

    /// Asks for whole closures at once, where the cache can do that, and remembers what it says.
    ///
    /// Whatever goes wrong, paths can be asked for one by one.
    pub(crate) fn ask_closures(&self, lookups: &Lookups, parts: &[HashPart]) {
        let (Place::Web(web), Some(name)) = (&self.place, &self.closures) else { return };
        if parts.is_empty() || self.refuses_closures.load(Ordering::Relaxed) {
            return;
        }
        let asked = (|| {
            let lines: Vec<String> = parts.iter().map(ToString::to_string).collect();
            let body = lines.join("\n");
            let payload = Payload::bytes("text/plain", body.into_bytes());
            let Some(answer) = web.post(name, payload)? else {
                return Err(CacheError::Closure { uri: self.uri.shown.clone(), reason: "there is none" });
            };
            let answer = BufReader::new(answer);
            closure::read(self.uri(), answer, |part, text| {
                if let Some(text) = text {
                    return self.take_in(lookups, part, text).map(drop);
                }
                lookups.put(self.id, true, part, Known::Absent, b"");
                Ok(())
            })
        })();
        if let Err(error) = asked {
            self.refuses_closures.store(true, Ordering::Relaxed);
            let text = chain(&error);
            self.reporter.message(Level::Talkative, format_args!("asking for paths one by one: {text}"));
        }
    }

    pub(crate) fn offers_closures(&self) -> bool {
        self.closures.is_some() && !self.refuses_closures.load(Ordering::Relaxed)
    }
}
