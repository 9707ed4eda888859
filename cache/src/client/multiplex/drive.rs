//! As much of an asynchronous runtime as HTTP/2 needs: a connection is driven by a thread of its own, which
//! sleeps in `poll`; those who wait for something from it are parked.

use std::future::Future;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What the other side must do, or have done, before it goes on.
#[derive(Debug, Default)]
struct Interest {
    read: AtomicBool,
    write: AtomicBool,
}

/// A connection with TLS that never blocks. Only [`drive`] may poll it.
#[derive(Debug)]
pub(crate) struct Line {
    tls: rustls::Connection,
    stream: Arc<TcpStream>,
    interest: Arc<Interest>,
}

impl Line {
    /// The handshake may be over, or still to come.
    pub(crate) fn new(tls: rustls::Connection, stream: Arc<TcpStream>) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { tls, stream, interest: Arc::default() })
    }

    /// Sends what TLS has ready.
    fn send(&mut self) -> Poll<io::Result<()>> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut &*self.stream) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.interest.write.store(true, Ordering::Relaxed);
                    return Poll::Pending;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Line {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut ended = false;
        loop {
            match self.tls.reader().read(buf.initialize_unfilled()) {
                Ok(n) => {
                    buf.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ended => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
            let stream = Arc::clone(&self.stream);
            match self.tls.read_tls(&mut &*stream) {
                Ok(n) => {
                    ended = n == 0;
                    let processed = self.tls.process_new_packets();
                    // Also why it is given up is for the other side to hear.
                    if let Poll::Ready(Err(error)) = self.send() {
                        return Poll::Ready(Err(error));
                    }
                    if let Err(error) = processed {
                        return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.interest.read.store(true, Ordering::Relaxed);
                    return Poll::Pending;
                }
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Line {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // Only when all that was taken before has gone: so no more than that is kept.
        ready!(self.send())?;
        let taken = self.tls.writer().write(buf)?;
        if let Poll::Ready(Err(error)) = self.send() {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.send()
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.tls.send_close_notify();
        ready!(self.send())?;
        Poll::Ready(self.stream.shutdown(Shutdown::Write))
    }
}

/// Wakes the thread that drives a connection.
#[derive(Debug)]
struct Bell {
    rung: AtomicBool,
    event: OwnedFd,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // It can only fail because it has been rung already.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }
}

/// What drives one connection: a socket, and who rings.
#[derive(Debug)]
pub(crate) struct Engine {
    stream: Arc<TcpStream>,
    interest: Arc<Interest>,
    bell: Arc<Bell>,
}

impl Engine {
    pub(crate) fn new(line: &Line) -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let bell = Arc::new(Bell { rung: AtomicBool::new(false), event });
        Ok(Self { stream: Arc::clone(&line.stream), interest: Arc::clone(&line.interest), bell })
    }

    /// Runs what waits for nothing but the line, and for whom it wakes by itself.
    pub(crate) fn drive<F: Future>(&self, future: F) -> io::Result<F::Output> {
        let waker = Waker::from(Arc::clone(&self.bell));
        let mut future = pin!(future);
        loop {
            self.bell.rung.store(false, Ordering::SeqCst);
            self.interest.read.store(false, Ordering::Relaxed);
            self.interest.write.store(false, Ordering::Relaxed);
            if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
                return Ok(output);
            }
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::IN, self.interest.read.load(Ordering::Relaxed));
            wanted.set(PollFlags::OUT, self.interest.write.load(Ordering::Relaxed));
            let mut both = [PollFd::new(&self.stream, wanted), PollFd::new(&self.bell.event, PollFlags::IN)];
            // A line of which nothing is wanted must not keep us awake once it is closed.
            let here = if wanted.is_empty() { both.get_mut(1..) } else { both.get_mut(..) };
            match poll(here.unwrap_or_default(), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // Empty is fine: it was the line.
            let _ = rustix::io::read(&self.bell.event, &mut [0u8; 8]);
        }
    }
}

/// Wakes a thread that is parked.
struct Parked(Thread);

impl Wake for Parked {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits until something is ready; `None` when it has taken too long.
pub(crate) fn wait<T>(limit: Option<Duration>, mut ready: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Option<T> {
    let waker = Waker::from(Arc::new(Parked(thread::current())));
    let mut context = Context::from_waker(&waker);
    let end = limit.map(|limit| Instant::now() + limit);
    loop {
        if let Poll::Ready(value) = ready(&mut context) {
            return Some(value);
        }
        match end {
            None => thread::park(),
            Some(end) => thread::park_timeout(end.checked_duration_since(Instant::now())?),
        }
    }
}
