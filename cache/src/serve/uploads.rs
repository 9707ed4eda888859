//! Taking what clients send: an archive first, which waits in a file without a name, and then what
//! is said of it, with which it comes into the store.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use larder_core::api;
use larder_core::hash_part::HashPart;
use larder_core::narinfo::{self, NarInfo};
use larder_core::report::chain;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use super::http::{Asked, Small};
use crate::compress::Method;
use crate::nar::NarReader;

/// How long an archive waits that nobody tells of, or tells of again.
const KEPT: Duration = Duration::from_hours(1);

/// Bytes of a log, at most.
const LOG_MAX: usize = 256 << 20;

/// Whoever puts what came into a store.
pub trait Intake: Sync {
    /// Takes an object, if it may come in; its archive is checked against the record.
    fn add(&self, info: &NarInfo, nar: &mut dyn Read) -> Result<(), api::StoreError>;

    /// Takes the log of a build.
    fn add_log(&self, drv: &StorePath, log: &mut dyn Read) -> Result<(), api::StoreError>;
}

/// Who may send what, and what has been sent and not told of.
pub struct Uploads<'a> {
    intake: &'a dyn Intake,
    /// What clients must know.
    pub(super) token: String,
    /// Bytes of archives that may wait.
    space_bytes: u64,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    archives: BTreeMap<String, Archive>,
    /// Bytes of those, and of what is still coming.
    taken_bytes: u64,
}

struct Archive {
    file: Arc<File>,
    size_bytes: u64,
    used: Instant,
}

impl std::fmt::Debug for Uploads<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uploads").field("space_bytes", &self.space_bytes).finish_non_exhaustive()
    }
}

/// The name of an archive in a cache: `nar/` and a plain name.
fn is_archive(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._+=-".contains(c);
    name.strip_prefix("nar/").is_some_and(|base| !base.is_empty() && base.len() <= 255 && base.chars().all(is_plain))
}

/// The hash part of a file about an object.
fn part_of(name: &str, ending: &str) -> Option<HashPart> {
    name.strip_suffix(ending)?.parse().ok()
}

impl<'a> Uploads<'a> {
    pub fn new(intake: &'a dyn Intake, token: String, space_bytes: u64) -> Self {
        Self { intake, token, space_bytes, waiting: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is there an archive of this name that waits to be told of?
    pub(super) fn has(&self, name: &str) -> bool {
        let mut waiting = self.lock();
        waiting.archives.get_mut(name).is_some_and(|archive| {
            archive.used = Instant::now();
            true
        })
    }

    /// Can a file of that name be taken, before any of it has come?
    pub(super) fn refuse(&self, asked: &Asked, name: &str) -> Option<Small> {
        if is_archive(name) {
            let too_long = asked.body_bytes as u64 > self.space_bytes;
            return too_long.then(|| Small::text(413, "there is not that much room for archives here"));
        }
        if name.starts_with("log/") {
            return (asked.body_bytes > LOG_MAX).then(|| Small::text(413, "that is too long for a log"));
        }
        if part_of(name, ".narinfo").is_some() || part_of(name, ".ls").is_some() {
            return (asked.body_bytes > narinfo::MAX_LEN).then(|| Small::text(413, "that is too long"));
        }
        Some(Small::text(404, "only archives, narinfo files, listings and logs are taken"))
    }

    /// Takes a file. Errors: the client does not send all of it.
    pub(super) fn take(&self, dir: &StoreDir, asked: &Asked, name: &str, body: &mut dyn Read) -> io::Result<Small> {
        if is_archive(name) {
            return self.take_archive(name, asked.body_bytes as u64, body);
        }
        let Some(encoding) = asked.encoding.as_deref().map_or(Some(Method::None), Method::of_encoding) else {
            return Ok(Small::text(415, "that content encoding is not known"));
        };
        if let Some(drv) = name.strip_prefix("log/") {
            let Some(drv) = StorePath::from_base_name(drv.as_bytes()).ok().filter(StorePath::is_derivation) else {
                return Ok(Small::text(404, "that is no derivation"));
            };
            let mut file = tempfile::tempfile()?;
            io::copy(body, &mut file)?;
            let log = encoding.decoder(FromStart { file: Arc::new(file), at: 0 });
            let taken = log
                .map_err(api::StoreError::from)
                .and_then(|log| self.intake.add_log(&drv, &mut log.take(LOG_MAX as u64)));
            return Ok(answer_of(&taken));
        }
        let mut text = Vec::new();
        body.read_to_end(&mut text)?;
        if part_of(name, ".ls").is_some() {
            // Listings are made when somebody asks for them.
            return Ok(Small::text(200, "listings are made here"));
        }
        let mut plain = Vec::new();
        let decoded = encoding.decoder(text.as_slice()).and_then(|decoder| {
            let mut decoder = decoder.take(narinfo::MAX_LEN as u64 + 1);
            decoder.read_to_end(&mut plain)
        });
        if let Err(error) = decoded {
            return Ok(Small::text(400, &format!("'{name}' cannot be decompressed: {error}")));
        }
        Ok(self.take_narinfo(dir, name, &plain))
    }

    fn take_archive(&self, name: &str, size_bytes: u64, body: &mut dyn Read) -> io::Result<Small> {
        if !self.make_room(size_bytes) {
            return Ok(Small::text(503, "others are sending; come again later"));
        }
        let taken = tempfile::tempfile().and_then(|mut file| io::copy(body, &mut file).map(|_| file));
        let mut waiting = self.lock();
        let file = match taken {
            Ok(file) => file,
            Err(error) => {
                waiting.taken_bytes -= size_bytes;
                // What is left of the disk is no fault of the client.
                let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
                return if full { Ok(Small::text(507, "the disk is full")) } else { Err(error) };
            }
        };
        let archive = Archive { file: Arc::new(file), size_bytes, used: Instant::now() };
        if let Some(before) = waiting.archives.insert(name.to_owned(), archive) {
            waiting.taken_bytes -= before.size_bytes;
        }
        Ok(Small::text(201, "taken"))
    }

    /// Forgets archives that have waited for too long, and then the oldest, until there is room.
    fn make_room(&self, size_bytes: u64) -> bool {
        let mut waiting = self.lock();
        let now = Instant::now();
        let Waiting { archives, taken_bytes } = &mut *waiting;
        archives.retain(|_, archive| {
            let stays = now.duration_since(archive.used) < KEPT;
            *taken_bytes -= if stays { 0 } else { archive.size_bytes };
            stays
        });
        while taken_bytes.saturating_add(size_bytes) > self.space_bytes {
            let oldest = archives.iter().min_by_key(|(_, archive)| archive.used).map(|(name, _)| name.clone());
            let Some(gone) = oldest.and_then(|name| archives.remove(&name)) else { return false };
            *taken_bytes -= gone.size_bytes;
        }
        *taken_bytes += size_bytes;
        true
    }

    fn take_narinfo(&self, dir: &StoreDir, name: &str, text: &[u8]) -> Small {
        let part = part_of(name, ".narinfo");
        let info = match NarInfo::parse(dir, text, name) {
            Ok(info) => info,
            Err(error) => return Small::text(400, &chain(&error)),
        };
        if part.is_none_or(|part| !info.answers(part, None)) {
            return Small::text(400, &format!("'{name}' tells of '{}'", dir.display(&info.info.path)));
        }
        let archive = {
            let mut waiting = self.lock();
            waiting.archives.get_mut(&info.url).map(|archive| {
                archive.used = Instant::now();
                Arc::clone(&archive.file)
            })
        };
        let Some(file) = archive else {
            return Small::text(409, &format!("'{}' has not been sent, or a long time ago", info.url));
        };
        let taken = NarReader::new("what was sent", &info, Box::new(FromStart { file, at: 0 }))
            .map_err(|error| api::StoreError::new(api::ErrorKind::Other, error))
            .and_then(|mut nar| self.intake.add(&info, &mut nar));
        answer_of(&taken)
    }
}

/// What the client is told of what came of it. What it may try again has a status above 500.
fn answer_of(taken: &Result<(), api::StoreError>) -> Small {
    let Err(error) = taken else { return Small::text(201, "taken") };
    let status = match error.kind {
        api::ErrorKind::Refused => 403,
        api::ErrorKind::NotValid => 409,
        api::ErrorKind::Interrupted => 503,
        _ => 400,
    };
    Small::text(status, &chain(error))
}

/// Reads a file from its start, and leaves its position alone.
struct FromStart {
    file: Arc<File>,
    at: u64,
}

impl Read for FromStart {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buf, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl Intake for Nobody {
        fn add(&self, _info: &NarInfo, _nar: &mut dyn Read) -> Result<(), api::StoreError> {
            Err(api::StoreError::unsupported("nothing is taken"))
        }
        fn add_log(&self, _drv: &StorePath, _log: &mut dyn Read) -> Result<(), api::StoreError> {
            Err(api::StoreError::unsupported("nothing is taken"))
        }
    }

    #[test]
    fn names_of_archives() {
        for (name, is) in [
            ("nar/1abc.nar.xz", true),
            ("nar/", false),
            ("nar/../x", false),
            ("nar/a/b", false),
            ("nar/a b", false),
            ("x.narinfo", false),
        ] {
            assert_eq!(is_archive(name), is, "{name}");
        }
    }

    #[test]
    fn the_oldest_archives_make_room() {
        let uploads = Uploads::new(&Nobody, String::new(), 100);
        let dir = StoreDir::new("/nix/store").unwrap();
        let send = |name: &str, bytes: usize| {
            let asked = Asked { body_bytes: bytes, ..Asked::default() };
            if let Some(refused) = uploads.refuse(&asked, name) {
                return refused.status;
            }
            uploads.take(&dir, &asked, name, &mut vec![b'x'; bytes].as_slice()).unwrap().status
        };
        assert_eq!([send("nar/a", 40), send("nar/b", 40)], [201, 201]);
        assert!(uploads.has("nar/b") && uploads.has("nar/a"));
        // `b` was asked for longest ago.
        assert_eq!(send("nar/c", 30), 201);
        assert!(uploads.has("nar/a") && !uploads.has("nar/b") && uploads.has("nar/c"));
        assert_eq!([send("nar/d", 101), send("nar/d", 100)], [413, 201]);
        assert!(!uploads.has("nar/a") && !uploads.has("nar/c"));
        // Again, it is there once.
        assert_eq!([send("nar/d", 60), u16::try_from(uploads.lock().taken_bytes).unwrap()], [201, 60]);
        let [ls, narinfo] = [".ls", ".narinfo"].map(|ending| format!("{}{ending}", "0".repeat(32)));
        assert_eq!(
            [send("zork", 1), send("log/x", 1), send(&ls, 1), send(&narinfo, 1), send("x.ls", 1)],
            [404, 404, 200, 400, 404]
        );
    }
}
