//! Connections with TLS, on which client and server agree what to speak.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, RootCertStore, SignatureScheme};
use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, ShutdownHandle, Transport,
};

use super::drive::Line;
use super::{ChoseHttp2, Connection, Lines};

/// The shortest time that a connection to one of several addresses is waited for.
const LEAST: Duration = Duration::from_millis(10);

/// Both versions, the better one first.
const SPOKEN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Whom to believe, and that both versions are spoken. Without certificates, those whom Mozilla believes.
pub(in crate::client) fn agreed(certificates: Vec<CertificateDer<'static>>, checks: bool) -> Arc<ClientConfig> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .expect("the provider knows the usual versions");
    let builder = if checks {
        let mut roots = RootCertStore::empty();
        if certificates.is_empty() {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        } else {
            roots.add_parsable_certificates(certificates);
        }
        builder.with_root_certificates(roots)
    } else {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider)))
    };
    let mut config = builder.with_no_client_auth();
    config.alpn_protocols = SPOKEN.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

/// Believes everybody (setting `verify-https-binary-caches`), but wants signatures to be of who shows up.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Makes connections with TLS, without a proxy. What speaks HTTP/2 goes to the lines.
pub(in crate::client) struct Secure {
    pub(in crate::client) config: Arc<ClientConfig>,
    pub(in crate::client) lines: Weak<Lines>,
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secure").finish_non_exhaustive()
    }
}

impl Connector<()> for Secure {
    type Out = Single;

    fn connect(&self, details: &ConnectionDetails<'_>, _: Option<()>) -> Result<Option<Single>, Error> {
        let limit = details.timeout.not_zero().map(|limit| *limit);
        let late = || Error::Timeout(details.timeout.reason);
        let end = limit.map(|limit| Instant::now() + limit);
        let authority = details.uri.authority().ok_or(Error::ConnectionFailed)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let name = ServerName::try_from(host.to_owned()).map_err(|_| Error::Tls("the server has no valid name"))?;
        let stream = Arc::new(connect(&details.addrs, end).map_err(|error| in_time(error, &late))?);
        stream.set_nodelay(true)?;
        let socket = Arc::new(Socket(Arc::clone(&stream)));
        let weak: Weak<Socket> = Arc::downgrade(&socket);
        (details.register_shutdown)(weak)?;
        let mut tls = ClientConnection::new(Arc::clone(&self.config), name)?;
        let each = details.timeout.per_read.map(|each| *each);
        while tls.is_handshaking() {
            let left = left_of(end).map_err(|error| in_time(error, &late))?;
            let left = [left, each].into_iter().flatten().min();
            stream.set_read_timeout(left)?;
            stream.set_write_timeout(left)?;
            match tls.complete_io(&mut &*stream) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(in_time(error, &late)),
            }
        }
        if tls.alpn_protocol() == Some(b"h2") {
            let lines = self.lines.upgrade().ok_or(Error::ConnectionFailed)?;
            let line = Line::new(tls.into(), Arc::clone(&stream))?;
            lines.open(authority.to_string(), Connection::start(line, stream)?);
            return Err(Error::Other(Box::new(ChoseHttp2)));
        }
        let buffers = LazyBuffers::new(details.config.input_buffer_size(), details.config.output_buffer_size());
        Ok(Some(Single { tls, socket, buffers }))
    }
}

fn left_of(end: Option<Instant>) -> io::Result<Option<Duration>> {
    let Some(end) = end else { return Ok(None) };
    end.checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .map(Some)
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

fn in_time(error: io::Error, late: &dyn Fn() -> Error) -> Error {
    if matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) { late() } else { error.into() }
}

/// To the first address where somebody answers; each has its part of the time.
fn connect(addresses: &[SocketAddr], end: Option<Instant>) -> io::Result<TcpStream> {
    let mut failed = io::Error::from(io::ErrorKind::ConnectionRefused);
    for (number, address) in addresses.iter().enumerate() {
        let connected = match left_of(end)? {
            None => TcpStream::connect(address),
            Some(left) => {
                // The last gets all that is left, others a half of it.
                let part = if number + 1 == addresses.len() { left } else { left / 2 };
                TcpStream::connect_timeout(address, part.max(LEAST))
            }
        };
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// A socket that can be shut from another thread.
struct Socket(Arc<TcpStream>);

impl ShutdownHandle for Socket {
    fn shutdown(&self) {
        // It may be shut already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// A connection for one request at a time.
pub(in crate::client) struct Single {
    tls: ClientConnection,
    socket: Arc<Socket>,
    buffers: LazyBuffers,
}

impl fmt::Debug for Single {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Single").field("to", &self.socket.0.peer_addr().ok()).finish_non_exhaustive()
    }
}

impl Single {
    fn limit(&self, timeout: NextTimeout) -> Result<(), Error> {
        if timeout.after.is_zero() {
            return Err(Error::Timeout(timeout.reason));
        }
        let limit = timeout.not_zero().map(|limit| *limit);
        self.socket.0.set_read_timeout(limit)?;
        Ok(self.socket.0.set_write_timeout(limit)?)
    }
}

impl Transport for Single {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        let timeout = timeout.for_write();
        let late = || Error::Timeout(timeout.reason);
        self.limit(timeout)?;
        let mut socket = &*self.socket.0;
        let mut stream = rustls::Stream::new(&mut self.tls, &mut socket);
        let output = self.buffers.output().get(..amount).unwrap_or_default();
        stream.write_all(output).and_then(|()| stream.flush()).map_err(|error| in_time(error, &late))
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        let timeout = timeout.for_read();
        let late = || Error::Timeout(timeout.reason);
        self.limit(timeout)?;
        let mut socket = &*self.socket.0;
        let mut stream = rustls::Stream::new(&mut self.tls, &mut socket);
        let input = self.buffers.input_append_buf();
        let amount = loop {
            match stream.read(input) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other.map_err(|error| in_time(error, &late))?,
            }
        };
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        // Whatever comes when nothing was asked is the end, or no good.
        let probe = || {
            self.socket.0.set_nonblocking(true)?;
            let peeked = self.socket.0.peek(&mut [0]);
            self.socket.0.set_nonblocking(false)?;
            Ok::<_, io::Error>(matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock))
        };
        probe().unwrap_or(false)
    }

    fn is_tls(&self) -> bool {
        true
    }
}
