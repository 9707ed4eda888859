//! A web server that does as a test says: right, wrong, slow, or in the middle of a word no more.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests may panic")]
#![allow(clippy::missing_panics_doc, reason = "tests may panic")]

mod http2;
mod tls;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use larder_core::hash::Sha256Digest;
use larder_core::nar::{Encoder, Event};
use larder_core::narinfo::NarInfo;
use larder_core::path_info::PathInfo;
use larder_core::signature::SecretKey;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

pub use self::tls::{Authority, Identity};
use crate::compress::{Method, compress};

/// What came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Did it come by HTTP/2?
    pub is_http2: bool,
    pub method: String,
    /// With the slash at its front.
    pub path: String,
    /// Names in lower case.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// What goes back.
#[derive(Debug, Clone)]
pub enum Answer {
    /// A file; ranges are heeded.
    File(Vec<u8>),
    /// A whole answer.
    Full { status: u16, headers: Vec<(String, String)>, body: Vec<u8> },
    /// These bytes, and then the connection is closed.
    Raw(Vec<u8>),
    /// These bytes, and then nothing any more, until the server goes away.
    Hang(Vec<u8>),
    /// This, again and again, until the client has enough.
    Endless { head: Vec<u8>, again: Vec<u8> },
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Self::Full { status, headers: Vec::new(), body: b"some text for people".to_vec() }
    }

    pub fn redirect(to: &str) -> Self {
        Self::Full { status: 302, headers: vec![("Location".into(), to.into())], body: Vec::new() }
    }

    /// A file whose answer is cut after so many bytes of its body.
    pub fn cut(body: &[u8], after: usize, ranges: bool) -> Self {
        let ranges = if ranges { "Accept-Ranges: bytes\r\n" } else { "" };
        let mut raw = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n{ranges}\r\n", body.len()).into_bytes();
        raw.extend_from_slice(&body[..after]);
        Self::Raw(raw)
    }
}

/// The server; gone when dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    scheme: &'static str,
    shared: Arc<Shared>,
    accepts: Option<thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stopped: AtomicBool,
    requests: Mutex<Vec<Request>>,
    open: AtomicUsize,
    most_open: AtomicUsize,
    connections: AtomicUsize,
    /// Over TLS: greets, and says no more.
    hangs_up: AtomicBool,
}

impl Server {
    /// Answers each request as `answer` says, in a thread for each connection.
    pub fn start(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::slow(Duration::ZERO, answer)
    }

    /// The same, each answer after some time.
    pub fn slow(delay: Duration, answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::run(None, delay, answer)
    }

    /// The same over TLS.
    pub fn secret(identity: &Identity, answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::run(Some(identity.config()), Duration::ZERO, answer)
    }

    /// The same, which also speaks HTTP/2, each answer after some time.
    pub fn multiplex(
        identity: &Identity,
        delay: Duration,
        answer: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let mut config = rustls::ServerConfig::clone(&identity.config());
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Self::run(Some(Arc::new(config)), delay, answer)
    }

    fn run(
        tls: Option<Arc<rustls::ServerConfig>>,
        delay: Duration,
        answer: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let answer = Arc::new(answer);
        let theirs = Arc::clone(&shared);
        let accepts = thread::spawn(move || {
            for stream in listener.incoming() {
                if theirs.stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (shared, answer) = (Arc::clone(&theirs), Arc::clone(&answer));
                let now = shared.open.fetch_add(1, Ordering::SeqCst) + 1;
                shared.most_open.fetch_max(now, Ordering::SeqCst);
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let tls = tls.clone();
                thread::spawn(move || {
                    let _ = stream.set_nodelay(true);
                    let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
                    match tls.map(rustls::ServerConnection::new) {
                        None => serve(stream, &shared, delay, &*answer),
                        Some(connection) => serve_tls(connection.unwrap(), stream, &shared, delay, &answer),
                    }
                    shared.open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { address, scheme, shared, accepts: Some(accepts) }
    }

    /// Serves the files of a folder, or what `other` says instead.
    pub fn folder(
        folder: &Path,
        delay: Duration,
        other: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        let folder: PathBuf = folder.to_owned();
        Self::slow(delay, move |request| other(request).unwrap_or_else(|| file_of(&folder, request)))
    }

    pub fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    /// The same by a name instead of an address.
    pub fn named_url(&self) -> String {
        format!("{}://localhost:{}", self.scheme, self.address.port())
    }

    /// From now on every connection over TLS is closed once that is agreed upon, or not.
    pub fn hang_up(&self, always: bool) {
        self.shared.hangs_up.store(always, Ordering::SeqCst);
    }

    /// What was asked since the last call.
    pub fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.shared.requests.lock().unwrap())
    }

    /// The same, in short: `GET /x`.
    pub fn take_lines(&self) -> Vec<String> {
        self.take_requests().into_iter().map(|request| format!("{} {}", request.method, request.path)).collect()
    }

    /// The most connections that were open at once, and how many there were.
    pub fn connections(&self) -> (usize, usize) {
        (self.shared.most_open.load(Ordering::SeqCst), self.shared.connections.load(Ordering::SeqCst))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(accepts) = self.accepts.take() {
            drop(accepts.join());
        }
    }
}

/// The file of a folder that is asked for; or one that is sent becomes a file there.
pub fn file_of(folder: &Path, request: &Request) -> Answer {
    let path = folder.join(request.path.split('?').next().unwrap_or_default().trim_start_matches('/'));
    if request.method == "PUT" {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &request.body).unwrap();
        return Answer::Full { status: 201, headers: Vec::new(), body: Vec::new() };
    }
    std::fs::read(path).map_or_else(|_| Answer::status(404), Answer::File)
}

fn serve_tls(
    mut tls: rustls::ServerConnection,
    mut stream: TcpStream,
    shared: &Arc<Shared>,
    delay: Duration,
    answer: &Arc<impl Fn(&Request) -> Answer + Send + Sync + 'static>,
) {
    // Who does not speak TLS, or does not like what is shown, goes away here.
    while tls.is_handshaking() && !shared.stopped.load(Ordering::SeqCst) {
        match tls.complete_io(&mut stream) {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
    if shared.hangs_up.load(Ordering::SeqCst) {
        return;
    }
    if tls.alpn_protocol() == Some(b"h2") {
        http2::serve(tls, stream, shared, delay, answer);
    } else {
        serve(rustls::StreamOwned::new(tls, stream), shared, delay, &**answer);
    }
}

fn serve(mut stream: impl Read + Write, shared: &Shared, delay: Duration, answer: &dyn Fn(&Request) -> Answer) {
    let mut buffer = Vec::new();
    while let Some(request) = read_request(&mut stream, &mut buffer, shared) {
        shared.requests.lock().unwrap().push(request.clone());
        if request.method == "CONNECT" {
            // It is a proxy then, and whatever it is to connect to itself.
            if stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").is_err() {
                return;
            }
            continue;
        }
        let answer = answer(&request);
        thread::sleep(delay);
        if send(&mut stream, &request, answer, shared).is_none() {
            return;
        }
    }
}

fn read_request(stream: &mut (impl Read + Write), buffer: &mut Vec<u8>, shared: &Shared) -> Option<Request> {
    let mut waits = true;
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Request::new(&mut headers);
        if let httparse::Status::Complete(head) = parsed.parse(buffer).ok()? {
            let (method, path) = (parsed.method?.to_owned(), parsed.path?.to_owned());
            let headers: BTreeMap<String, String> = parsed
                .headers
                .iter()
                .map(|h| (h.name.to_ascii_lowercase(), String::from_utf8_lossy(h.value).into_owned()))
                .collect();
            let length: usize = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
            if buffer.len() >= head + length {
                let body = buffer[head..head + length].to_vec();
                buffer.drain(..head + length);
                return Some(Request { is_http2: false, method, path, headers, body });
            }
            if headers.contains_key("expect") && std::mem::take(&mut waits) {
                stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
            }
        }
        let mut block = [0; 4096];
        match stream.read(&mut block) {
            Ok(0) => return None,
            Ok(n) => buffer.extend_from_slice(&block[..n]),
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                if shared.stopped.load(Ordering::SeqCst) {
                    return None;
                }
            }
            Err(_) => return None,
        }
    }
}

type Whole = (u16, Vec<(String, String)>, Vec<u8>);

/// Status, headers and body of an answer that is whole, or else the answer.
fn whole(request: &Request, answer: Answer) -> Result<Whole, Answer> {
    let (status, mut headers, body) = match answer {
        Answer::File(bytes) => {
            let range = request
                .headers
                .get("range")
                .and_then(|text| text.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
            let mut headers = vec![("Accept-Ranges".to_owned(), "bytes".to_owned())];
            match range {
                Some(at) if at < bytes.len() => {
                    headers.push(("Content-Range".into(), format!("bytes {at}-{}/{}", bytes.len() - 1, bytes.len())));
                    (206, headers, bytes[at..].to_vec())
                }
                _ => (200, headers, bytes),
            }
        }
        Answer::Full { status, headers, body } => (status, headers, body),
        other => return Err(other),
    };
    headers.push(("Content-Length".into(), body.len().to_string()));
    Ok((status, headers, body))
}

/// `None`: the connection is to end.
fn send(stream: &mut (impl Read + Write), request: &Request, answer: Answer, shared: &Shared) -> Option<()> {
    let (status, headers, body) = match whole(request, answer) {
        Ok(whole) => whole,
        Err(Answer::Raw(bytes)) => {
            let _ = stream.write_all(&bytes);
            return None;
        }
        Err(Answer::Hang(bytes)) => {
            let _ = stream.write_all(&bytes);
            let mut block = [0; 64];
            while !shared.stopped.load(Ordering::SeqCst) {
                match stream.read(&mut block) {
                    Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
                    _ => return None,
                }
            }
            return None;
        }
        Err(Answer::Endless { head, again }) => {
            let mut sent = stream.write_all(&head);
            // A gigabyte is as good as without end.
            for _ in 0..(1 << 30) / again.len().max(1) {
                if sent.is_err() || shared.stopped.load(Ordering::SeqCst) {
                    break;
                }
                sent = stream.write_all(&again);
            }
            return None;
        }
        Err(Answer::File(_) | Answer::Full { .. }) => unreachable!("those are whole"),
    };
    let mut head = format!("HTTP/1.1 {status} {}\r\n", if status < 400 { "OK" } else { "Not OK" });
    for (name, value) in headers {
        head.extend([&name, ": ", &value, "\r\n"]);
    }
    head.push_str("\r\n");
    let mut all = head.into_bytes();
    if request.method != "HEAD" {
        all.extend_from_slice(&body);
    }
    stream.write_all(&all).ok()
}

/// A folder that becomes a cache, with whatever a test wants in it.
#[derive(Debug)]
pub struct Shelf {
    pub folder: PathBuf,
    pub dir: StoreDir,
    pub key: SecretKey,
}

impl Shelf {
    /// An empty cache for a store directory. Its key is called `shelf-1`.
    pub fn new(folder: &Path, dir: &StoreDir) -> Self {
        std::fs::create_dir_all(folder.join("nar")).unwrap();
        std::fs::write(folder.join("nix-cache-info"), format!("StoreDir: {dir}\n")).unwrap();
        Self { folder: folder.to_owned(), dir: dir.clone(), key: SecretKey::from_seed("shelf-1", &[7; 32]).unwrap() }
    }

    pub fn uri(&self) -> String {
        format!("file://{}", self.folder.display())
    }

    /// Puts a regular file with some contents there. `number` makes the hash part.
    pub fn add(
        &self,
        number: usize,
        name: &str,
        contents: &[u8],
        references: &[&StorePath],
        method: Method,
    ) -> NarInfo {
        let path: StorePath = format!("{number:032}-{name}").parse().unwrap();
        self.add_nar(path, &nar_of(contents), references, method)
    }

    /// Puts an archive there.
    pub fn add_nar(&self, path: StorePath, nar: &[u8], references: &[&StorePath], method: Method) -> NarInfo {
        let packed = compress(method, nar).unwrap();
        let url = format!("nar/{}{}", path.hash_part(), method.extension());
        std::fs::write(self.folder.join(&url), &packed).unwrap();
        let mut info = PathInfo::new(path, Sha256Digest::of(nar), nar.len() as u64);
        info.references = references.iter().map(|path| (*path).clone()).collect();
        let info = NarInfo {
            info,
            url,
            compression: method.name().to_owned(),
            file_hash: Some(Sha256Digest::of(&packed).to_hash()),
            file_size_bytes: Some(packed.len() as u64),
        };
        self.write(&info);
        info
    }

    /// Writes what is said of an object, signed as it is.
    pub fn write(&self, info: &NarInfo) {
        let mut info = info.clone();
        info.info.signatures = [self.key.sign_path(&self.dir, &info.info).unwrap()].into();
        self.write_unsigned(&info);
    }

    /// The same with the signatures that are in it.
    pub fn write_unsigned(&self, info: &NarInfo) {
        let name = format!("{}.narinfo", info.info.path.hash_part());
        std::fs::write(self.folder.join(name), info.to_text(&self.dir)).unwrap();
    }
}

/// The archive of a regular file.
pub fn nar_of(contents: &[u8]) -> Vec<u8> {
    let (mut encoder, mut nar) = (Encoder::new(), Vec::new());
    encoder.push(Event::File { executable: false, size_bytes: contents.len() as u64 }, &mut nar);
    encoder.push(Event::Contents(contents), &mut nar);
    encoder.push(Event::EndFile, &mut nar);
    nar
}
