//! Requests to web servers: as many at once as is allowed, tried again when that may help, and
//! gone on with where they were cut.
//!
//! Source: protocols, section 5.1.

mod download;
mod options;
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
use ureq::http::{self, HeaderMap, Request, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, BodyReader, Proxy};

pub use self::download::Download;
use self::download::Resume;
pub use self::options::{ClientOptions, Proxies, certificates};
use crate::compress;
use crate::error::DownloadError;
use crate::netrc::credentials;
use crate::uri::{host, percent_decoded};

/// What the text of the agent says.
const USER_AGENT: &str = concat!("Larder/", env!("CARGO_PKG_VERSION"));

/// The pause before the second attempt; doubled before each further one.
const PAUSE: Duration = Duration::from_millis(250);

/// How often somebody who waits looks whether the user wants to stop.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Bytes of the body of an answer without interest that are read, so that the connection lives on.
const DRAIN_BYTES: u64 = 64 << 10;

/// Encodings of contents that are undone, in the order of preference.
const ENCODINGS: &str = "zstd, br, gzip, deflate, bzip2, xz";

/// What to get.
#[derive(Debug, Clone, Default)]
pub struct Get {
    pub url: String,
    /// The header of that name, if it is not to come from the netrc file.
    pub authorization: Option<String>,
    /// May the server encode what it sends? Then it cannot be resumed.
    pub takes_encodings: bool,
    /// What is sent along; with anything it is a `POST`.
    pub body: Option<Arc<[u8]>>,
}

/// A client for any number of threads.
pub struct Client {
    options: ClientOptions,
    reporter: Arc<dyn Reporter + Send + Sync>,
    /// Made by the first request, as reading certificates takes time.
    agent: Mutex<Option<Agent>>,
    tls: OnceLock<TlsConfig>,
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
    body: BodyReader<'static>,
    _slot: Slot,
    status: u16,
    headers: HeaderMap,
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
        if let Some(agent) = self.agent.lock().unwrap_or_else(PoisonError::into_inner).take() {
            agent.shutdown();
        }
        self.free.notify_all();
    }

    /// Asks for a URL until there is an answer, or no hope.
    pub fn get(self: &Arc<Self>, get: &Get) -> Result<Download, DownloadError> {
        let stops = self.stops.load(Ordering::SeqCst);
        for attempt in 1.. {
            match self.once(get, None, stops) {
                Ok(open) => return Ok(Download::new(self, get, open, attempt, stops)),
                Err(error) if error.is_passing() && attempt < self.options.attempts => {
                    self.pause(&get.url, attempt, &error, stops)?;
                }
                Err(error) => return Err(error),
            }
        }
        Err(DownloadError::Stopped)
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
        let download = self.get(&Get { url: url.to_owned(), ..Get::default() })?;
        let Some(encoding) = download.encoding().map(str::to_owned) else { return Ok(Box::new(download)) };
        let method = compress::Method::of_encoding(&encoding).ok_or(DownloadError::Encoding(encoding))?;
        method.decoder(download).map_err(|source| DownloadError::Cut { at: 0, source })
    }

    /// One attempt.
    fn once(self: &Arc<Self>, get: &Get, resume: Option<&Resume>, stops: u64) -> Result<Open, DownloadError> {
        if let Some((scheme, _)) = get.url.split_once("://").filter(|(scheme, _)| !matches!(*scheme, "http" | "https"))
        {
            return Err(DownloadError::Scheme { scheme: scheme.to_owned() });
        }
        let slot = self.slot(stops)?;
        let agent = self.agent();
        let mut request = Request::builder().uri(&get.url);
        if let Some(authorization) = self.authorization(get) {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request = request.header(header::ACCEPT_ENCODING, if get.takes_encodings { ENCODINGS } else { "identity" });
        if let Some(resume) = resume {
            request = request.header(header::RANGE, format!("bytes={}-", resume.at));
            if let Some(tag) = &resume.tag {
                request = request.header(header::IF_RANGE, tag);
            }
        }
        let proxy = self.proxy(&get.url)?;
        let bad = |error| DownloadError::from(ureq::Error::Http(error));
        let response = match &get.body {
            None => {
                let request = request.method(http::Method::GET).body(()).map_err(bad)?;
                agent.run(agent.configure_request(request).proxy(proxy).build())
            }
            Some(body) => {
                let request = request.method(http::Method::POST).body(&**body).map_err(bad)?;
                agent.run(agent.configure_request(request).proxy(proxy).build())
            }
        };
        let response = response.map_err(|error| self.or_stopped(error.into(), stops))?;
        let (parts, body) = response.into_parts();
        let mut body = body.into_reader();
        if !parts.status.is_success() {
            // Read, the connection can be used again; a long text is not worth that.
            let _ = io::copy(&mut (&mut body).take(DRAIN_BYTES), &mut io::sink());
            let reason = parts.status.canonical_reason().unwrap_or_default().to_owned();
            return Err(DownloadError::Status { code: parts.status.as_u16(), reason });
        }
        Ok(Open { body, _slot: slot, status: parts.status.as_u16(), headers: parts.headers })
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

    fn pause(&self, url: &str, attempt: u32, error: &DownloadError, stops: u64) -> Result<(), DownloadError> {
        // 2^(attempt - 1 + r), r below a half and random: who was refused together comes back apart.
        let random = RandomState::new().build_hasher().finish() >> 11;
        #[expect(clippy::cast_precision_loss, reason = "53 bits are left")]
        let part = random as f64 / (1u64 << 53) as f64 / 2.0;
        let pause = PAUSE.mul_f64((f64::from(attempt.min(16) - 1) + part).exp2());
        self.reporter.message(
            Level::Warn,
            format_args!("unable to download '{url}': {}; retrying in {} ms", chain(error), pause.as_millis()),
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

    fn authorization(&self, get: &Get) -> Option<String> {
        let own = get.authorization.clone();
        own.or_else(|| credentials(self.options.netrc.as_deref()?, host(&get.url)))
    }

    fn proxy(&self, url: &str) -> Result<Option<Proxy>, DownloadError> {
        Ok(self.options.proxies.of(url).map(Proxy::new).transpose()?)
    }

    fn agent(&self) -> Agent {
        let mut agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(agent) = &*agent {
            return agent.clone();
        }
        let options = &self.options;
        let suffix = &options.user_agent_suffix;
        let blank = if suffix.is_empty() { "" } else { " " };
        let idle = if options.connections == 0 { 25 } else { options.connections };
        let config = Agent::config_builder()
            .user_agent(format!("{USER_AGENT}{blank}{suffix}"))
            .timeout_connect(options.connect_timeout)
            .timeout_per_read(options.stall_timeout)
            .http_status_as_error(false)
            .max_idle_connections(idle)
            .max_idle_connections_per_host(idle)
            .tls_config(self.tls().clone())
            .build();
        let made = Agent::from(config);
        *agent = Some(made.clone());
        made
    }

    fn tls(&self) -> &TlsConfig {
        self.tls.get_or_init(|| {
            let pem = self.options.certificates.as_deref().unwrap_or_default();
            let certificates: Vec<Certificate<'static>> = ureq::tls::parse_pem(pem.as_bytes())
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            let config = TlsConfig::builder().disable_verification(!self.options.checks_certificates);
            if certificates.is_empty() {
                config.build()
            } else {
                config.root_certs(RootCerts::Specific(Arc::new(certificates))).build()
            }
        })
    }
}
