//! Serving a store as a binary cache.
//!
//! One thread a connection, one request after another; archives are made as they are sent, so
//! nothing is held in memory and nothing lies on the disk twice. Who may connect, and with which
//! sockets, is for the caller.
//!
//! | request | answer |
//! |---|---|
//! | `GET /nix-cache-info` | what the cache is, with `LarderClosure: closure` |
//! | `GET /HASHPART.narinfo` | signed with each key as it is asked for |
//! | `GET /nar/NARHASH.nar?hash=HASHPART` | the archive; ranges, or zstd for who takes that |
//! | `GET /HASHPART.ls` | what lies in it |
//! | `GET /log/DERIVATION` | the log of a build |
//! | `POST /closure` | many narinfo files at once, see [`crate::closure`] |
//! | `PUT /nar/...`, `/HASHPART.narinfo`, `/log/DERIVATION` | what comes into the store, see [`Uploads`] |
//! | `GET /metrics`, `/health`, `/` | for those who run it |
//!
//! Source: protocols, section 5.6.

/// Adds to a text, which cannot fail.
macro_rules! add {
    ($text:ident, $($words:tt)*) => {
        std::fmt::Write::write_fmt(&mut $text, format_args!($($words)*)).unwrap_or_default()
    };
}

mod http;
mod uploads;

use std::collections::{BTreeSet, HashMap};
use std::io::{self, BufWriter, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use larder_core::api::{self, ReadStore};
use larder_core::hash::Encoding;
use larder_core::hash_part::HashPart;
use larder_core::narinfo::NarInfo;
use larder_core::path_info::PathInfo;
use larder_core::signature::SecretKey;
use larder_core::store_path::StorePath;

use self::http::{
    Asked, Body, Chunks, Head, Small, TEXT, Window, head_of, parse_range, read_body, read_head, reason, send_small,
};
pub use self::uploads::{Intake, Uploads};
use crate::closure;
use crate::compress::{Encoder, Method};
use crate::listing::Lister;

/// Bytes of a question after closures, at most.
const BODY_MAX: usize = 33 * closure::ASKED_MAX;

/// Bytes of memory for narinfo files that were asked for. If they do not do, all are forgotten.
const TEXTS_BYTES: usize = 16 << 20;

/// Records that are read from the ledger together.
const READ_TOGETHER: usize = 1000;

/// How long a client may say nothing, or take nothing.
const PATIENCE: Duration = Duration::from_mins(1);

/// For how long, and how much, a client may go on sending once it has its last answer.
const LINGER: Duration = Duration::from_millis(500);
const LINGER_BYTES: u64 = 1 << 20;

const INFO: &str = "text/x-nix-cache-info";
const NARINFO: &str = "text/x-nix-narinfo";
const NAR: &str = "application/x-nix-nar";

/// The store that is served.
pub trait Shop: Sync {
    fn store(&self) -> &dyn ReadStore;

    /// A path that is not collected while it is held.
    fn hold<'s>(&'s self, path: &'s StorePath) -> Result<Box<dyn Held + 's>, api::StoreError>;

    /// The log of a build, if it is here.
    fn log(&self, drv: &StorePath) -> io::Result<Option<Box<dyn Read + '_>>>;
}

/// A path that stays where it is.
pub trait Held {
    /// Was it valid still when it was taken hold of?
    fn is_valid(&self) -> Result<bool, api::StoreError>;

    /// Writes its archive but for the first `skipped` bytes. It need not be checked: clients know the
    /// hash, and when we knew it they would have all of it.
    fn nar(&self, skipped: u64, out: &mut dyn Write) -> Result<(), api::StoreError>;
}

/// How to serve.
#[derive(Debug, Default)]
pub struct ServeOptions {
    /// What signs, beside the signatures that paths have.
    pub keys: Vec<SecretKey>,
    pub priority: i32,
    /// What clients must know: as `Bearer`, or as the password of anyone.
    pub token: Option<String>,
    /// The level of zstd for archives; `None`: they are sent as they are.
    pub zstd_level: Option<i32>,
}

/// What has been done so far.
#[derive(Debug, Default)]
struct Metrics {
    requests: [AtomicU64; ROUTES.len()],
    errors: AtomicU64,
    refused: AtomicU64,
    nar_bytes: AtomicU64,
    taken_bytes: AtomicU64,
    micros: AtomicU64,
}

/// The sorts of requests, as metrics name them.
const ROUTES: [&str; 8] = ["cache-info", "narinfo", "nar", "ls", "log", "closure", "upload", "other"];

/// Narinfo files that were asked for, beside what they tell of: a signature takes longer than all else
/// that is done for one.
#[derive(Default)]
struct Texts {
    made: HashMap<HashPart, (PathInfo, Arc<str>)>,
    bytes: usize,
}

impl Texts {
    fn keep(&mut self, info: PathInfo, text: &Arc<str>) {
        // The record has about the same in it again.
        let bytes = 2 * text.len() + size_of::<PathInfo>();
        if self.bytes + bytes > TEXTS_BYTES {
            *self = Self::default();
        }
        let replaced = self.made.insert(info.path.hash_part(), (info, Arc::clone(text)));
        self.bytes += replaced.map_or(bytes, |(_, old)| (2 * text.len()).saturating_sub(2 * old.len()));
    }
}

/// Serves a store.
pub struct Server<'a> {
    shop: &'a dyn Shop,
    options: ServeOptions,
    /// `None`: nothing is taken.
    uploads: Option<Uploads<'a>>,
    metrics: Metrics,
    texts: Mutex<Texts>,
}

impl std::fmt::Debug for Server<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("options", &self.options).finish_non_exhaustive()
    }
}

/// What becomes of the connection.
type Next = io::Result<bool>;

impl<'a> Server<'a> {
    pub fn new(shop: &'a dyn Shop, options: ServeOptions, uploads: Option<Uploads<'a>>) -> Self {
        Self { shop, options, uploads, metrics: Metrics::default(), texts: Mutex::default() }
    }

    /// Answers all that comes over a connection.
    pub fn connection(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        self.answer_all(stream)?;
        // What the client still sends must be taken, or it may never see the answer.
        stream.shutdown(Shutdown::Write)?;
        stream.set_read_timeout(Some(LINGER))?;
        io::copy(&mut stream.take(LINGER_BYTES), &mut io::sink()).map(drop)
    }

    fn answer_all(&self, stream: &TcpStream) -> io::Result<()> {
        let mut input = stream;
        let mut buffer = Vec::new();
        loop {
            let asked = match read_head(&mut input, &mut buffer)? {
                Head::Asked(asked) => asked,
                Head::End => return Ok(()),
                Head::Bad(status) => {
                    let mut out = BufWriter::new(stream);
                    send_small(&mut out, &Small::text(status, reason(status)), true, true)?;
                    return out.flush();
                }
            };
            let mut out = BufWriter::with_capacity(64 << 10, stream);
            let began = Instant::now();
            let goes_on = self.answer(&asked, &mut input, &mut buffer, &mut out)?;
            out.flush()?;
            let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.metrics.micros.fetch_add(micros, Ordering::Relaxed);
            if !goes_on || asked.closes {
                return Ok(());
            }
        }
    }

    fn count(&self, route: &str) {
        if let Some(n) = ROUTES.iter().position(|name| *name == route)
            && let Some(counter) = self.metrics.requests.get(n)
        {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Answers one request; says whether the connection may go on.
    fn answer(&self, asked: &Asked, input: &mut dyn Read, buffer: &mut Vec<u8>, out: &mut dyn Write) -> Next {
        let is_head = asked.method == "HEAD";
        let small = |out: &mut dyn Write, small: Small| {
            if small.status >= 500 {
                self.metrics.errors.fetch_add(1, Ordering::Relaxed);
            }
            send_small(out, &small, !is_head, asked.closes)?;
            Ok(true)
        };
        if asked.method == "PUT" {
            return self.put(asked, input, buffer, out);
        }
        if asked.body_bytes > BODY_MAX {
            small(out, Small::text(413, "that is too long"))?;
            return Ok(false);
        }
        let body = read_body(input, buffer, asked.body_bytes)?;
        if asked.path == "/health" {
            return small(out, Small::text(200, "good"));
        }
        if !self.may(asked) {
            self.metrics.refused.fetch_add(1, Ordering::Relaxed);
            return small(out, Small::text(401, "a token is needed"));
        }
        let path = asked.path.strip_prefix('/').unwrap_or_default();
        match (asked.method.as_str(), path) {
            // Whoever sends archives asks first.
            ("HEAD", _) if self.may_write(asked) && self.uploads.as_ref().is_some_and(|uploads| uploads.has(path)) => {
                self.count("upload");
                small(out, Small::text(200, "it waits to be told of"))
            }
            ("POST", "closure") => {
                self.count("closure");
                self.closure(asked, &body, out)
            }
            ("GET" | "HEAD", "nix-cache-info") => {
                self.count("cache-info");
                let (dir, priority, key) = (self.shop.store().dir(), self.options.priority, closure::KEY);
                let text = format!("StoreDir: {dir}\nWantMassQuery: 1\nPriority: {priority}\n{key} closure\n");
                small(out, Small::ok(INFO, text))
            }
            ("GET" | "HEAD", "metrics") => small(out, Small::ok("text/plain; version=0.0.4", self.metrics())),
            ("GET" | "HEAD", "") => {
                self.count("other");
                let text = format!("larder {}, serving {}", env!("CARGO_PKG_VERSION"), self.shop.store().dir());
                small(out, Small::text(200, &text))
            }
            ("GET" | "HEAD", _) => {
                if let Some(part) = path.strip_suffix(".narinfo") {
                    self.count("narinfo");
                    return small(out, or_500(self.narinfo(part)));
                }
                if let Some(part) = path.strip_suffix(".ls") {
                    self.count("ls");
                    return small(out, or_500(self.listing(part)));
                }
                if let Some(name) = path.strip_prefix("nar/") {
                    self.count("nar");
                    return self.nar(asked, name, out, is_head);
                }
                if let Some(name) = path.strip_prefix("log/") {
                    self.count("log");
                    return small(out, self.log(name));
                }
                self.count("other");
                small(out, Small::text(404, "there is no such file"))
            }
            _ => small(out, Small::text(405, "only GET, HEAD, PUT and POST /closure are answered")),
        }
    }

    /// May the client read? Who may write may that, too.
    fn may(&self, asked: &Asked) -> bool {
        self.options.token.as_ref().is_none_or(|token| knows(asked, token)) || self.may_write(asked)
    }

    fn may_write(&self, asked: &Asked) -> bool {
        self.uploads.as_ref().is_some_and(|uploads| knows(asked, &uploads.token))
    }

    /// Takes what a client sends. What is refused is not read, and ends the connection.
    fn put(&self, asked: &Asked, input: &mut dyn Read, buffer: &mut Vec<u8>, out: &mut dyn Write) -> Next {
        self.count("upload");
        let name = asked.path.strip_prefix('/').unwrap_or_default();
        let refused = match &self.uploads {
            None => Err(Small::text(405, "nothing is taken here")),
            Some(_) if !self.may_write(asked) => {
                self.metrics.refused.fetch_add(1, Ordering::Relaxed);
                Err(Small::text(401, "a token is needed"))
            }
            Some(uploads) => uploads.refuse(asked, name).map_or(Ok(uploads), Err),
        };
        let uploads = match refused {
            Ok(uploads) => uploads,
            Err(small) => {
                send_small(out, &small, true, true)?;
                return Ok(false);
            }
        };
        if asked.waits && buffer.is_empty() {
            out.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            out.flush()?;
        }
        let mut body = Body { input, buffer, left: asked.body_bytes as u64 };
        let answer = uploads.take(self.shop.store().dir(), asked, name, &mut body)?;
        let is_read = body.left == 0;
        self.metrics.taken_bytes.fetch_add(asked.body_bytes as u64 - body.left, Ordering::Relaxed);
        if answer.status >= 500 {
            self.metrics.errors.fetch_add(1, Ordering::Relaxed);
        }
        send_small(out, &answer, true, asked.closes || !is_read)?;
        Ok(is_read)
    }

    fn find(&self, part: &str) -> Result<Option<PathInfo>, api::StoreError> {
        let Ok(part) = part.parse::<HashPart>() else { return Ok(None) };
        self.shop.store().info_by_hash_part(part)
    }

    fn narinfo(&self, part: &str) -> Result<Small, api::StoreError> {
        Ok(match self.find(part)? {
            None => Small::text(404, "there is no such path"),
            Some(info) => Small::ok(NARINFO, self.text_of(info).as_bytes()),
        })
    }

    /// The text of a narinfo file, signed: the one that was made before, if nothing has changed since.
    fn text_of(&self, info: PathInfo) -> Arc<str> {
        let texts = || self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let part = info.path.hash_part();
        if let Some((_, text)) = texts().made.get(&part).filter(|(of, _)| *of == info) {
            return Arc::clone(text);
        }
        let text: Arc<str> = self.make_text(info.clone()).into();
        texts().keep(info, &text);
        text
    }

    fn make_text(&self, mut info: PathInfo) -> String {
        let dir = self.shop.store().dir();
        // A path without a size cannot be signed, and is told of without.
        let signatures = self.options.keys.iter().filter_map(|key| key.sign_path(dir, &info).ok());
        let signatures: Vec<_> = signatures.collect();
        info.signatures.extend(signatures);
        let hash = info.nar_hash.to_hash();
        let url = format!("nar/{}.nar?hash={}", hash.encode(Encoding::Base32), info.path.hash_part());
        let (file_hash, file_size_bytes) = (Some(hash), Some(info.nar_size_bytes));
        NarInfo { info, url, compression: "none".to_owned(), file_hash, file_size_bytes }.to_text(dir)
    }

    fn listing(&self, part: &str) -> Result<Small, api::StoreError> {
        let Some(info) = self.find(part)? else { return Ok(Small::text(404, "there is no such path")) };
        let mut lister = Lines(Lister::new());
        self.shop.hold(&info.path)?.nar(0, &mut lister)?;
        Ok(match lister.0.finish() {
            Some(text) => Small::ok("application/json", text),
            None => Small::text(404, "it cannot be listed"),
        })
    }

    fn log(&self, name: &str) -> Small {
        let Ok(drv) = StorePath::from_base_name(name.as_bytes()) else {
            return Small::text(404, "there is no such log");
        };
        let mut text = Vec::new();
        match self.shop.log(&drv) {
            Ok(Some(log)) => match log.take(256 << 20).read_to_end(&mut text) {
                Ok(_) => Small::ok(TEXT, text),
                Err(_) => Small::text(500, "the log cannot be read"),
            },
            Ok(None) => Small::text(404, "there is no such log"),
            Err(_) => Small::text(500, "the log cannot be read"),
        }
    }

    fn nar(&self, asked: &Asked, name: &str, out: &mut dyn Write, is_head: bool) -> Next {
        let absent = |out: &mut dyn Write, status: u16, text: &str| {
            send_small(out, &Small::text(status, text), !is_head, asked.closes)?;
            Ok(true)
        };
        let part = asked.query.split('&').find_map(|pair| pair.strip_prefix("hash=")).unwrap_or_default();
        let wanted = name.strip_suffix(".nar").unwrap_or_default();
        let found = self.find(part);
        let held = match &found {
            // Valid still, now that it is held?
            Ok(Some(info)) if info.nar_hash.to_hash().encode(Encoding::Base32) == wanted => {
                self.shop.hold(&info.path).and_then(|held| Ok(held.is_valid()?.then_some((held, info))))
            }
            Ok(_) => Ok(None),
            Err(_) => {
                self.metrics.errors.fetch_add(1, Ordering::Relaxed);
                return absent(out, 500, "the store cannot be read");
            }
        };
        let (held, info) = match held {
            Ok(Some(found)) => found,
            Ok(None) => return absent(out, 404, "there is no such archive"),
            Err(_) => {
                self.metrics.errors.fetch_add(1, Ordering::Relaxed);
                return absent(out, 500, "the store cannot be read");
            }
        };
        let size = info.nar_size_bytes;
        let Ok(range) = parse_range(asked.range.as_deref(), size) else {
            return absent(out, 416, "there are not so many bytes");
        };
        let zstd = self.options.zstd_level.filter(|_| asked.takes_zstd && asked.is_1_1 && range.is_none());
        let (status, from, to) = range.map_or((200, 0, size), |(from, to)| (206, from, to));
        let mut head = head_of(status, NAR, asked.closes);
        head.push_str("Cache-Control: public, max-age=31536000, immutable\r\nVary: Accept-Encoding\r\n");
        add!(head, "ETag: \"{wanted}{}\"\r\n", if zstd.is_some() { "-zstd" } else { "" });
        match zstd {
            Some(_) => head.push_str("Content-Encoding: zstd\r\nTransfer-Encoding: chunked\r\n"),
            None => add!(head, "Accept-Ranges: bytes\r\nContent-Length: {}\r\n", to - from),
        }
        if status == 206 {
            add!(head, "Content-Range: bytes {from}-{}/{size}\r\n", to - 1);
        }
        head.push_str("\r\n");
        out.write_all(head.as_bytes())?;
        if is_head {
            return Ok(true);
        }
        let is_whole = if let Some(level) = zstd {
            let mut encoder = Encoder::new(Method::Zstd, Some(level), 1, Chunks::new(out))?;
            let written = held.nar(0, &mut encoder).is_ok();
            if written {
                encoder.finish()?.end()?;
            }
            written
        } else {
            let mut window = Window { out, left: to - from };
            // Behind a range, or an object that has become longer, it ends with an error.
            let _ = held.nar(from, &mut window);
            window.left == 0
        };
        if !is_whole {
            // Without its end the client knows that.
            return Ok(false);
        }
        self.metrics.nar_bytes.fetch_add(to - from, Ordering::Relaxed);
        Ok(true)
    }

    fn closure(&self, asked: &Asked, body: &[u8], out: &mut dyn Write) -> Next {
        let parsed: Option<Vec<HashPart>> = std::str::from_utf8(body)
            .ok()
            .and_then(|text| text.split_ascii_whitespace().map(|part| part.parse().ok()).collect());
        let Some(parts) = parsed.filter(|parts| parts.len() <= closure::ASKED_MAX) else {
            send_small(out, &Small::text(400, "hash parts, one a line, are expected"), true, asked.closes)?;
            return Ok(true);
        };
        let answer = (|| {
            let store = self.shop.store();
            let mut answer = Vec::new();
            let mut there = BTreeSet::new();
            for part in parts {
                match store.by_hash_part(part)? {
                    Some(path) => drop(there.insert(path)),
                    None => closure::write(&mut answer, part, None)?,
                }
            }
            let closure: Vec<StorePath> = store.closure(&there, false)?.into_iter().collect();
            for paths in closure.chunks(READ_TOGETHER) {
                for info in store.infos(paths)?.into_iter().flatten() {
                    closure::write(&mut answer, info.path.hash_part(), Some(&self.text_of(info)))?;
                }
            }
            closure::write_end(&mut answer)?;
            Ok::<_, api::StoreError>(answer)
        })();
        let Ok(answer) = answer else {
            self.metrics.errors.fetch_add(1, Ordering::Relaxed);
            send_small(out, &Small::text(500, "the store cannot be read"), true, asked.closes)?;
            return Ok(true);
        };
        if !asked.takes_zstd || answer.len() < 1024 {
            send_small(out, &Small::ok("application/x-larder-closure", answer), true, asked.closes)?;
            return Ok(true);
        }
        let mut encoder = Encoder::new(Method::Zstd, None, 1, Vec::new())?;
        encoder.write_all(&answer)?;
        let packed = encoder.finish()?;
        let mut head = head_of(200, "application/x-larder-closure", asked.closes);
        add!(head, "Content-Encoding: zstd\r\nContent-Length: {}\r\n\r\n", packed.len());
        out.write_all(head.as_bytes())?;
        out.write_all(&packed)?;
        Ok(true)
    }

    fn metrics(&self) -> String {
        let mut text =
            String::from("# HELP larder_requests_total Requests answered.\n# TYPE larder_requests_total counter\n");
        for (route, counter) in ROUTES.iter().zip(&self.metrics.requests) {
            add!(text, "larder_requests_total{{route=\"{route}\"}} {}\n", counter.load(Ordering::Relaxed));
        }
        for (name, help, value) in [
            ("errors", "Answers with status 500.", &self.metrics.errors),
            ("refused", "Requests without the token.", &self.metrics.refused),
            ("nar_bytes", "Bytes of archives sent, before compression.", &self.metrics.nar_bytes),
            ("taken_bytes", "Bytes that clients have sent.", &self.metrics.taken_bytes),
            ("busy_microseconds", "Time spent on answers.", &self.metrics.micros),
        ] {
            let value = value.load(Ordering::Relaxed);
            add!(
                text,
                "# HELP larder_{name}_total {help}\n# TYPE larder_{name}_total counter\nlarder_{name}_total {value}\n"
            );
        }
        text
    }
}

/// Does a client know a token: as `Bearer`, or as the password of anyone?
fn knows(asked: &Asked, token: &str) -> bool {
    let Some((scheme, value)) = asked.authorization.as_deref().and_then(|text| text.split_once(' ')) else {
        return false;
    };
    if scheme.eq_ignore_ascii_case("bearer") {
        return same(value.trim().as_bytes(), token.as_bytes());
    }
    let pair = larder_core::hash::decode_base64(value.trim()).unwrap_or_default();
    let password = pair.iter().position(|b| *b == b':').and_then(|at| pair.get(at + 1..)).unwrap_or_default();
    scheme.eq_ignore_ascii_case("basic") && same(password, token.as_bytes())
}

fn or_500(answer: Result<Small, api::StoreError>) -> Small {
    answer.unwrap_or_else(|_| Small::text(500, "the store cannot be read"))
}

/// Compares in a time that does not depend on where they differ.
fn same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

/// A listing as something to write to.
struct Lines(Lister);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        assert!(same(b"abc", b"abc") && !same(b"abc", b"abd") && !same(b"abc", b"ab"));
    }
}
