//! HTTP/2: many requests at once over one connection, where a server that is spoken to by TLS offers that.
//!
//! The connection is made by `ureq`, by way of [`Secure`], so that names, addresses and time limits
//! are the same in either version. If the server chooses version 1.1, `ureq` goes on with it; if it
//! chooses 2, the request that it was made for fails with [`ChoseHttp2`] and is made anew over it, as
//! are all others to that server. The first request to a server goes ahead alone, since the others would
//! make connections that nobody needs.
//!
//! Source: protocols, section 5.1.

pub(crate) mod drive;
mod secure;

use std::collections::HashMap;
use std::future::Future;
use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use crossbeam_channel::bounded;
use h2::client::SendRequest;
use h2::{RecvStream, client};
use ureq::http::{Request, Response};

use self::drive::{Engine, Line, wait};
pub(super) use self::secure::{Secure, agreed};
use super::LOOK_UP;

/// How much may come of one answer before it is read, in bytes: what is under way at 20 MB a second and 100 ms.
const STREAM_WINDOW: u32 = 2 << 20;

/// How much of all together; so much memory a server can make us take.
const WINDOW: u32 = 16 << 20;

/// Bytes of the head of an answer, at most.
const HEAD_MAX: u32 = 64 << 10;

/// The server has chosen HTTP/2: there is a connection for that now.
#[derive(Debug, thiserror::Error)]
#[error("the server has chosen HTTP/2")]
pub(super) struct ChoseHttp2;

/// A connection for many requests.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<Bytes>,
    stream: Arc<TcpStream>,
    ended: Arc<AtomicBool>,
}

impl Connection {
    /// Begins to speak HTTP/2 over a line, in a thread of its own, which ends with the connection.
    fn start(line: Line, stream: Arc<TcpStream>) -> io::Result<Self> {
        let engine = Engine::new(&line)?;
        let ended = Arc::new(AtomicBool::new(false));
        let (give, given) = bounded(1);
        let is_over = Over(Arc::clone(&ended));
        let run = move || {
            let _is_over = is_over;
            let mut builder = client::Builder::new();
            builder.enable_push(false).max_header_list_size(HEAD_MAX);
            builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(WINDOW);
            let begun = engine.drive(builder.handshake::<_, Bytes>(line));
            match begun.and_then(|begun| begun.map_err(into_io)) {
                Err(error) => drop(give.send(Err(error))),
                Ok((sender, connection)) => {
                    // The connection is to end with its last request, not with this thread.
                    if give.send(Ok(sender)).is_ok() {
                        drop(give);
                        // Whoever has a request open hears of an error.
                        let _ = engine.drive(connection);
                    }
                }
            }
        };
        thread::Builder::new().name("http2".to_owned()).spawn(run)?;
        let sender = given.recv().map_err(|_| io::Error::from(io::ErrorKind::ConnectionAborted))??;
        Ok(Self { sender, stream, ended })
    }

    /// Makes a request, and waits no longer than `limit` for the head of its answer.
    pub(super) fn ask(self: &Arc<Self>, request: Request<()>, limit: Option<Duration>) -> io::Result<Response<Stream>> {
        let mut sender = self.sender.clone();
        let ready = wait(limit, |context| sender.poll_ready(context)).ok_or_else(|| too_late(limit))?;
        ready.map_err(into_io)?;
        let (mut answer, _) = sender.send_request(request, true).map_err(into_io)?;
        let answer =
            wait(limit, |context| Future::poll(Pin::new(&mut answer), context)).ok_or_else(|| too_late(limit))?;
        Ok(answer.map_err(into_io)?.map(|incoming| Stream { incoming, block: Bytes::new(), limit }))
    }

    fn close(&self) {
        // It may be closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Says that a connection can be used no more, however its thread ends.
struct Over(Arc<AtomicBool>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn too_late(limit: Option<Duration>) -> io::Error {
    let seconds = limit.map_or(0, |limit| limit.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, format!("nothing came for {seconds} seconds"))
}

fn into_io(error: h2::Error) -> io::Error {
    match error.is_io().then(|| error.get_io().map(io::Error::kind)).flatten() {
        // What is wrong with TLS after the handshake is an accident of the way, not who the server is.
        Some(kind) if kind != io::ErrorKind::InvalidData => io::Error::new(kind, error),
        _ => io::Error::other(error),
    }
}

/// The body of an answer. What has come of it is bounded by the windows.
#[derive(Debug)]
pub(super) struct Stream {
    incoming: RecvStream,
    block: Bytes,
    limit: Option<Duration>,
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        while self.block.is_empty() {
            let Self { incoming, limit, .. } = self;
            let came = wait(*limit, |context| incoming.poll_data(context)).ok_or_else(|| too_late(*limit))?;
            let Some(came) = came else { return Ok(0) };
            self.block = came.map_err(into_io)?;
            // It is read at once, so there is room for as much again.
            self.incoming.flow_control().release_capacity(self.block.len()).map_err(into_io)?;
        }
        let n = self.block.len().min(buf.len());
        self.block.copy_to_slice(buf.get_mut(..n).unwrap_or_default());
        Ok(n)
    }
}

/// What is known of how a server speaks.
#[derive(Debug)]
enum Way {
    /// Somebody is finding out.
    Asking,
    /// One request a connection at a time, or nobody knows.
    Single,
    Many(Arc<Connection>),
}

/// The connections to all servers.
#[derive(Debug, Default)]
pub(super) struct Lines {
    ways: Mutex<HashMap<String, Way>>,
    found: Condvar,
}

/// How to make a request.
#[derive(Debug)]
pub(super) enum Entry<'l> {
    /// As the first to that server; the others wait until this is dropped.
    First(Scout<'l>),
    /// By a connection of its own.
    Single,
    Many(Arc<Connection>),
}

/// Who finds out how a server speaks.
#[derive(Debug)]
pub(super) struct Scout<'l> {
    lines: &'l Lines,
    server: String,
}

impl Drop for Scout<'_> {
    fn drop(&mut self) {
        let mut ways = self.lines.lock();
        if let Some(way @ Way::Asking) = ways.get_mut(&self.server) {
            *way = Way::Single;
        }
        drop(ways);
        self.lines.found.notify_all();
    }
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Way>> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How to speak to a server; `None` if that is not to be known before all is stopped.
    pub(super) fn enter(&self, server: &str, is_stopped: impl Fn() -> bool) -> Option<Entry<'_>> {
        let mut ways = self.lock();
        loop {
            match ways.get(server) {
                Some(Way::Single) => return Some(Entry::Single),
                Some(Way::Many(connection)) if !connection.ended.load(Ordering::SeqCst) => {
                    return Some(Entry::Many(Arc::clone(connection)));
                }
                Some(Way::Asking) => {
                    if is_stopped() {
                        return None;
                    }
                    ways = self.found.wait_timeout(ways, LOOK_UP).unwrap_or_else(PoisonError::into_inner).0;
                }
                Some(Way::Many(_)) | None => {
                    ways.insert(server.to_owned(), Way::Asking);
                    return Some(Entry::First(Scout { lines: self, server: server.to_owned() }));
                }
            }
        }
    }

    /// A connection for many requests is there, from now on for all.
    fn open(&self, server: String, connection: Connection) {
        self.lock().insert(server, Way::Many(Arc::new(connection)));
        self.found.notify_all();
    }

    /// No more requests by this connection; those that are open go on.
    pub(super) fn leave(&self, server: &str, connection: &Arc<Connection>) {
        let mut ways = self.lock();
        if matches!(ways.get(server), Some(Way::Many(present)) if Arc::ptr_eq(present, connection)) {
            ways.remove(server);
        }
    }

    /// Ends all that is open.
    pub(super) fn close(&self) {
        for (_, way) in self.lock().drain() {
            if let Way::Many(connection) = way {
                connection.close();
            }
        }
        self.found.notify_all();
    }
}
