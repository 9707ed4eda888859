//! Requests to web servers: as many at once as is allowed, tried again when that may help, and
//! gone on with where they were cut.
//!
//! Source: protocols, section 5.1.

mod download;
pub(crate) mod multiplex;
mod options;
mod payload;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use larder_core::report::{Level, Reporter, chain};
use rustix::fs::{Mode, OFlags};
use ureq::http::request::Parts as Asked;
use ureq::http::response::Parts as Answered;
use ureq::http::{self, HeaderMap, Request, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::{Agent, BodyReader, Proxy, SendBody};

pub use self::download::Download;
use self::download::Resume;
use self::multiplex::{ChoseHttp2, Connection, Entry, Lines, Secure, agreed};
pub use self::options::{Authorities, ClientOptions, Proxies};
pub use self::payload::{Contents, Payload};
use crate::compress;
use crate::error::DownloadError;
use crate::netrc::credentials;
use crate::s3::Bucket;
use crate::uri::{host, percent_decoded};

/// What the text of the agent says.
const USER_AGENT: &str = concat!("Larder/", env!("CARGO_PKG_VERSION"));

/// The pause before the second attempt; doubled before each further one.
const PAUSE: Duration = Duration::from_millis(250);

/// How often somebody who waits looks whether the user wants to stop.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Bytes of the body of an answer without interest that are read, so that the connection lives on.
const DRAIN_BYTES: u64 = 64 << 10;

/// Characters of what a server says of its refusal that are shown.
const REASON_MAX: usize = 400;

/// Encodings of contents that are undone, in the order of preference.
const ENCODINGS: &str = "zstd, br, gzip, deflate, bzip2, xz";

/// Bodies from this size on (bytes) are held back until the server says that it wants them.
const ASK_FIRST_FROM: u64 = 1 << 20;

/// How often a server may choose HTTP/2 and hang up, until the request counts as failed.
const CHOICES_MAX: u32 = 4;

/// How often it is gone where a server sends.
const REDIRECTS_MAX: u32 = 10;

/// What a server is asked for.
#[derive(Debug, Clone, Default)]
pub struct Ask {
    pub method: Method,
    pub url: String,
    /// The header of that name, if it is not to come from the netrc file.
    pub authorization: Option<String>,
    /// The bucket whose keys sign the URL, each time it is asked for.
    pub bucket: Option<Arc<Bucket>>,
    /// May the server encode what it sends? Then it cannot be resumed.
    pub takes_encodings: bool,
    /// What is sent along.
    pub payload: Option<Payload>,
}

/// What is to be done with what a URL names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Method {
    #[default]
    Get,
    /// Is it there?
    Head,
    Post,
    Put,
    Delete,
}

impl Method {
    /// As HTTP spells it.
    const fn name(self) -> http::Method {
        match self {
            Self::Get => http::Method::GET,
            Self::Head => http::Method::HEAD,
            Self::Post => http::Method::POST,
            Self::Put => http::Method::PUT,
            Self::Delete => http::Method::DELETE,
        }
    }

    /// What is not done when it fails, for messages.
    const fn verb(self) -> &'static str {
        match self {
            Self::Get | Self::Head | Self::Post => "download",
            Self::Put => "upload",
            Self::Delete => "delete",
        }
    }
}

/// A client for any number of threads.
pub struct Client {
    options: ClientOptions,
    reporter: Arc<dyn Reporter + Send + Sync>,
    /// Made by the first request, as reading certificates takes time.
    agent: Mutex<Option<Agent>>,
    tls: OnceLock<TlsConfig>,
    /// The same for servers that may speak HTTP/2.
    secure: Mutex<Option<Agent>>,
    agreed: OnceLock<Arc<rustls::ClientConfig>>,
    lines: Arc<Lines>,
    /// How often all was stopped.
    stops: AtomicU64,
    busy: Mutex<usize>,
    free: Condvar,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

/// The right to have a request open.
#[derive(Debug)]
struct Slot(Arc<Client>);

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.busy.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.free.notify_one();
    }
}

/// An answer whose body is to be read. The body goes first: its connection is to be free again
/// before another request is.
struct Open {
    body: Body,
    _slot: Slot,
    status: u16,
    headers: HeaderMap,
}

/// The body of an answer, by one version or the other.
enum Body {
    Single(Box<BodyReader<'static>>),
    Many(Box<multiplex::Stream>),
}

impl Read for Body {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Single(body) => body.read(buf),
            Self::Many(body) => body.read(buf),
        }
    }
}

impl Open {
    fn text(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    fn size_bytes(&self) -> Option<u64> {
        self.text(header::CONTENT_LENGTH)?.trim().parse().ok()
    }

    fn encoding(&self) -> Option<String> {
        let text = self.text(header::CONTENT_ENCODING)?.trim().to_ascii_lowercase();
        (!text.is_empty() && text != "identity").then_some(text)
    }

    /// `bytes 40-99/100`: the first byte, and of how many in all.
    fn content_range(&self) -> Option<(u64, Option<u64>)> {
        let (range, total) = self.text(header::CONTENT_RANGE)?.trim().strip_prefix("bytes ")?.split_once('/')?;
        Some((range.split_once('-')?.0.trim().parse().ok()?, total.trim().parse().ok()))
    }
}

impl Client {
    pub fn new(options: ClientOptions, reporter: Arc<dyn Reporter + Send + Sync>) -> Arc<Self> {
        Arc::new(Self {
            options,
            reporter,
            agent: Mutex::default(),
            tls: OnceLock::new(),
            secure: Mutex::default(),
            agreed: OnceLock::new(),
            lines: Arc::default(),
            stops: AtomicU64::new(0),
            busy: Mutex::default(),
            free: Condvar::new(),
        })
    }

    pub fn options(&self) -> &ClientOptions {
        &self.options
    }

    /// Ends all requests that are open, soon. Later ones are not concerned.
    pub fn stop(&self) {
        self.stops.fetch_add(1, Ordering::SeqCst);
        for agent in [&self.agent, &self.secure] {
            if let Some(agent) = agent.lock().unwrap_or_else(PoisonError::into_inner).take() {
                agent.shutdown();
            }
        }
        self.lines.close();
        self.free.notify_all();
    }

    /// Asks until there is an answer, or no hope.
    pub fn ask(self: &Arc<Self>, ask: &Ask) -> Result<Download, DownloadError> {
        let stops = self.stops.load(Ordering::SeqCst);
        for attempt in 1.. {
            match self.once(ask, None, stops) {
                Ok(open) => return Ok(Download::new(self, ask, open, attempt, stops)),
                Err(error) if error.is_passing() && attempt < self.options.attempts => {
                    self.pause(ask, attempt, &error, stops)?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(DownloadError::Stopped)
    }

    /// The same, for who wants to know that it was done and no more.
    pub fn tell(self: &Arc<Self>, ask: &Ask) -> Result<(), DownloadError> {
        let mut answer = self.ask(ask)?;
        // Read, the connection can be used again; what comes after the head is no matter.
        let _ = io::copy(&mut (&mut answer).take(DRAIN_BYTES), &mut io::sink());
        Ok(())
    }

    /// Opens whatever a URL names: also `file://`, of which only regular files are read. Encodings
    /// of the server are undone.
    pub fn open(self: &Arc<Self>, url: &str) -> Result<Box<dyn Read + Send>, DownloadError> {
        if let Some(path) = url.strip_prefix("file://") {
            let path = OsString::from_vec(percent_decoded(path));
            // Not blocking: a FIFO would be waited for without end.
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let opened = rustix::fs::open(&path, flags, Mode::empty());
            let file = File::from(opened.map_err(|e| DownloadError::File(e.into()))?);
            if !file.metadata().is_ok_and(|meta| meta.is_file()) {
                return Err(DownloadError::NotRegular);
            }
            return Ok(Box::new(file));
        }
        let download = self.ask(&Ask { url: url.to_owned(), ..Ask::default() })?;
        let Some(encoding) = download.encoding().map(str::to_owned) else { return Ok(Box::new(download)) };
        let method = compress::Method::of_encoding(&encoding).ok_or(DownloadError::Encoding(encoding))?;
        method.decoder(download).map_err(|source| DownloadError::Cut { at: 0, source })
    }

    /// One attempt.
    fn once(self: &Arc<Self>, ask: &Ask, resume: Option<&Resume>, stops: u64) -> Result<Open, DownloadError> {
        if let Some((scheme, _)) = ask.url.split_once("://").filter(|(scheme, _)| !matches!(*scheme, "http" | "https"))
        {
            return Err(DownloadError::Scheme { scheme: scheme.to_owned() });
        }
        if ask.url.starts_with("https:") {
            self.options.authorities.check()?;
        }
        let slot = self.slot(stops)?;
        let url = ask.bucket.as_ref().map_or_else(|| ask.url.clone(), |bucket| bucket.signed(ask.method, &ask.url));
        let mut request = Request::builder().method(ask.method.name()).uri(url);
        if let Some(authorization) = self.authorization(ask) {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request = request.header(header::ACCEPT_ENCODING, if ask.takes_encodings { ENCODINGS } else { "identity" });
        if let Some(resume) = resume {
            request = request.header(header::RANGE, format!("bytes={}-", resume.at));
            if let Some(tag) = &resume.tag {
                request = request.header(header::IF_RANGE, tag);
            }
        }
        let bad = |error| DownloadError::from(ureq::Error::Http(error));
        let (parts, mut body) = match &ask.payload {
            None => {
                let (request, ()) = request.body(()).map_err(bad)?.into_parts();
                self.follow(request, stops)
            }
            Some(payload) => {
                for (name, value) in payload.headers() {
                    request = request.header(name, value);
                }
                if payload.size_bytes() >= ASK_FIRST_FROM {
                    request = request.header(header::EXPECT, "100-continue");
                }
                let mut body = payload.reader();
                let request = request.body(SendBody::from_reader(&mut body)).map_err(bad)?;
                // What was sent is not sent elsewhere because somebody says so.
                let agent = self.agent();
                let config = agent.configure_request(request).max_redirects(0).max_redirects_will_error(false);
                let answer = agent.run(config.proxy(self.proxy(&ask.url)?).build());
                answer.map(single).map_err(DownloadError::from)
            }
        }
        .map_err(|error| self.or_stopped(error, stops))?;
        if !parts.status.is_success() {
            // Read, the connection can be used again; a long text is not worth that.
            let mut text = Vec::new();
            let _ = (&mut body).take(DRAIN_BYTES).read_to_end(&mut text);
            let mut reason = parts.status.canonical_reason().unwrap_or_default().to_owned();
            let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
            if ask.method == Method::Put && kind.starts_with("text/plain") {
                // Why something is not taken is worth knowing.
                let line = String::from_utf8_lossy(&text);
                let line = line.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control());
                let line: String = line.take(REASON_MAX).collect();
                reason = if line.is_empty() { reason } else { format!("{reason}: {line}") };
            }
            return Err(DownloadError::Status { code: parts.status.as_u16(), reason });
        }
        Ok(Open { body, _slot: slot, status: parts.status.as_u16(), headers: parts.headers })
    }

    /// Makes a request, and goes where the servers send.
    fn follow(self: &Arc<Self>, mut request: Asked, stops: u64) -> Result<(Answered, Body), DownloadError> {
        for _ in 0..=REDIRECTS_MAX {
            let url = request.uri.to_string();
            let proxy = self.proxy(&url)?;
            if !self.options.http2 || proxy.is_some() || !url.starts_with("https:") {
                // From here on it follows by itself.
                let agent = self.agent();
                let request = Request::from_parts(request, ());
                return Ok(single(agent.run(agent.configure_request(request).proxy(proxy).build())?));
            }
            self.options.authorities.check()?;
            let answer = self.secure_answer(&request, stops)?;
            let to = answer.0.headers.get(header::LOCATION).and_then(|to| to.to_str().ok());
            let (301 | 302 | 303 | 307 | 308, Some(to)) = (answer.0.status.as_u16(), to) else { return Ok(answer) };
            let failed = || DownloadError::from(ureq::Error::RedirectFailed);
            let to = url::Url::parse(&url).and_then(|url| url.join(to)).map_err(|_| failed())?;
            if !matches!(to.scheme(), "http" | "https") {
                return Err(DownloadError::Scheme { scheme: to.scheme().to_owned() });
            }
            request.uri = to.as_str().parse().map_err(|_| failed())?;
            // Passwords are for whom they were meant for.
            request.headers.remove(header::AUTHORIZATION);
        }
        Err(ureq::Error::TooManyRedirects.into())
    }

    /// The answer of a server over TLS, in the version that it prefers.
    fn secure_answer(self: &Arc<Self>, request: &Asked, stops: u64) -> Result<(Answered, Body), DownloadError> {
        let server = request.uri.authority().map(ToString::to_string).unwrap_or_default();
        let whole = || Request::from_parts(request.clone(), ());
        let mut is_fresh = false;
        for _ in 0..CHOICES_MAX {
            let entry = self.lines.enter(&server, || self.is_stopped(stops)).ok_or(DownloadError::Stopped)?;
            let _scout = match entry {
                Entry::Single => None,
                Entry::First(scout) => Some(scout),
                Entry::Many(connection) => match self.ask_by(&server, &connection, whole()) {
                    // It may have been closed while nothing was asked.
                    Err(error) if !is_fresh && error.kind() != io::ErrorKind::TimedOut && !self.is_stopped(stops) => {
                        is_fresh = true;
                        continue;
                    }
                    answer => return answer.map_err(|error| ureq::Error::Io(error).into()),
                },
            };
            let agent = self.secure_agent();
            let config = agent.configure_request(whole()).max_redirects(0).max_redirects_will_error(false);
            match agent.run(config.build()) {
                Err(ureq::Error::Other(error)) if error.is::<ChoseHttp2>() => is_fresh = true,
                answer => return Ok(single(answer?)),
            }
        }
        // It is willing, but hangs up each time.
        Err(ureq::Error::ConnectionFailed.into())
    }

    /// Makes a request over a connection for many.
    fn ask_by(
        &self,
        server: &str,
        connection: &Arc<Connection>,
        mut request: Request<()>,
    ) -> io::Result<(Answered, Body)> {
        let value = header::HeaderValue::from_str(&self.user_agent()).map_err(io::Error::other)?;
        request.headers_mut().insert(header::USER_AGENT, value);
        request.headers_mut().insert(header::ACCEPT, header::HeaderValue::from_static("*/*"));
        *request.version_mut() = http::Version::HTTP_2;
        let answer = connection.ask(request, self.options.stall_timeout).inspect_err(|_| {
            // Others may do better by a new one.
            self.lines.leave(server, connection);
        })?;
        let (parts, body) = answer.into_parts();
        Ok((parts, Body::Many(Box::new(body))))
    }

    fn or_stopped(&self, error: DownloadError, stops: u64) -> DownloadError {
        if self.is_stopped(stops) { DownloadError::Stopped } else { error }
    }

    fn is_stopped(&self, stops: u64) -> bool {
        self.stops.load(Ordering::SeqCst) != stops || self.reporter.is_cancelled()
    }

    /// Waits until another request may be made.
    fn slot(self: &Arc<Self>, stops: u64) -> Result<Slot, DownloadError> {
        let most = self.options.connections;
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        while most > 0 && *busy >= most {
            if self.is_stopped(stops) {
                return Err(DownloadError::Stopped);
            }
            busy = self.free.wait_timeout(busy, LOOK_UP).unwrap_or_else(PoisonError::into_inner).0;
        }
        *busy += 1;
        drop(busy);
        Ok(Slot(Arc::clone(self)))
    }

    fn pause(&self, ask: &Ask, attempt: u32, error: &DownloadError, stops: u64) -> Result<(), DownloadError> {
        // 2^(attempt - 1 + r), r below a half and random: who was refused together comes back apart.
        let random = RandomState::new().build_hasher().finish() >> 11;
        #[expect(clippy::cast_precision_loss, reason = "53 bits are left")]
        let part = random as f64 / (1u64 << 53) as f64 / 2.0;
        let pause = PAUSE.mul_f64((f64::from(attempt.min(16) - 1) + part).exp2());
        self.reporter.message(
            Level::Warn,
            format_args!(
                "unable to {} '{}': {}; retrying in {} ms",
                ask.method.verb(),
                ask.url,
                chain(error),
                pause.as_millis()
            ),
        );
        let end = Instant::now() + pause;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if self.is_stopped(stops) {
                return Err(DownloadError::Stopped);
            }
            std::thread::sleep(left.min(LOOK_UP));
        }
        Ok(())
    }

    fn authorization(&self, ask: &Ask) -> Option<String> {
        let own = ask.authorization.clone();
        // A bucket has keys of its own, and takes no second word for who asks.
        own.or_else(|| {
            let netrc = self.options.netrc.as_deref().filter(|_| ask.bucket.is_none())?;
            credentials(netrc, host(&ask.url))
        })
    }

    fn proxy(&self, url: &str) -> Result<Option<Proxy>, DownloadError> {
        Ok(self.options.proxies.of(url).map(Proxy::new).transpose()?)
    }

    fn agent(&self) -> Agent {
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = &*agent {
            return agent.clone();
        }
        let made = Agent::from(self.config().tls_config(self.tls().clone()).build());
        *agent = Some(made.clone());
        made
    }

    /// The agent for servers that may speak HTTP/2.
    fn secure_agent(&self) -> Agent {
        let mut agent = self.secure.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = &*agent {
            return agent.clone();
        }
        let config = self.agreed.get_or_init(|| {
            let certificates = certificates(self.options.authorities.pem.as_deref().unwrap_or_default());
            let certificates = certificates.iter().map(|one| one.der().to_vec().into()).collect();
            agreed(certificates, self.options.checks_certificates)
        });
        let connector = Secure { config: Arc::clone(config), lines: Arc::downgrade(&self.lines) };
        let made = Agent::with_parts(self.config().build(), connector, DefaultResolver::default());
        *agent = Some(made.clone());
        made
    }

    fn config(&self) -> ureq::config::ConfigBuilder<ureq::typestate::AgentScope> {
        let options = &self.options;
        let idle = if options.connections == 0 { 25 } else { options.connections };
        Agent::config_builder()
            .user_agent(self.user_agent())
            .timeout_connect(options.connect_timeout)
            .timeout_per_read(options.stall_timeout)
            .http_status_as_error(false)
            .max_idle_connections(idle)
            .max_idle_connections_per_host(idle)
    }

    fn user_agent(&self) -> String {
        let suffix = &self.options.user_agent_suffix;
        let blank = if suffix.is_empty() { "" } else { " " };
        format!("{USER_AGENT}{blank}{suffix}")
    }

    fn tls(&self) -> &TlsConfig {
        self.tls.get_or_init(|| {
            let certificates = certificates(self.options.authorities.pem.as_deref().unwrap_or_default());
            let config = TlsConfig::builder().disable_verification(!self.options.checks_certificates);
            if certificates.is_empty() {
                config.build()
            } else {
                config.root_certs(RootCerts::Specific(Arc::new(certificates))).build()
            }
        })
    }
}

/// An answer that came by version 1.1.
fn single(answer: http::Response<ureq::Body>) -> (Answered, Body) {
    let (parts, body) = answer.into_parts();
    (parts, Body::Single(Box::new(body.into_reader())))
}

/// The certificates of a text; what else is in it is left out.
fn certificates(pem: &str) -> Vec<Certificate<'static>> {
    let items = ureq::tls::parse_pem(pem.as_bytes());
    items
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect()
}
