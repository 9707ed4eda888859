//! Threads that let clients in and serve them, one client at a time each.
//!
//! A thread that waits at the door serves whom it lets in itself, so that nobody has to be woken for
//! that; first it sees to it that another one waits. One that has served waits again, for a while, which
//! saves starting one.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

/// The serving of one client.
pub(super) type Work = Box<dyn FnOnce() + Send>;

/// How long a thread waits beside another one before it ends. (In tests as long as it takes.)
const IDLE: Timespec = Timespec { tv_sec: if cfg!(test) { 600 } else { 2 }, tv_nsec: 0 };

/// How long nobody tries to let clients in after that has failed.
const PAUSE: Duration = Duration::from_millis(20);

/// What an event is about.
const CONNECTION: u64 = 0;
const END: u64 = 1;

/// Who may come in, and what is done for them.
pub(super) trait Door: Send + Sync + 'static {
    /// What there is to do for this client; `None` if it is turned away.
    fn admit(self: &Arc<Self>, stream: UnixStream) -> Option<Work>;

    /// Says that a client could not be let in.
    fn complain(&self, what: &str, error: &io::Error);
}

/// Threads that wait at a door, and those that serve and will wait again.
pub(super) struct Crew<D>(Arc<Shared<D>>);

struct Shared<D> {
    door: Arc<D>,
    socket: UnixListener,
    /// Wakes one thread when there are connections, until it is told to look again, and all at the end.
    events: OwnedFd,
    end: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Threads that wait at the door, and one that is just started for it.
    waiting: usize,
    ending: bool,
}

impl<D: Door> Crew<D> {
    /// Lets clients in from now on.
    pub(super) fn open(door: Arc<D>, socket: UnixListener) -> io::Result<Self> {
        // Another thread, or another process with the same socket, may have been faster.
        socket.set_nonblocking(true)?;
        let end = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let events = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&events, &socket, EventData::new_u64(CONNECTION), EventFlags::IN | EventFlags::ONESHOT)?;
        epoll::add(&events, &end, EventData::new_u64(END), EventFlags::IN)?;
        let state = Mutex::new(State { waiting: 1, ending: false });
        let shared = Arc::new(Shared { door, socket, events, end, state, changed: Condvar::new() });
        shared.start()?;
        Ok(Self(shared))
    }

    /// Lets nobody in any more. Whoever was let in before has been told to the door when this returns,
    /// unless that takes longer than `at_most`.
    pub(super) fn close(&self, at_most: Duration) {
        let mut state = self.0.state();
        state.ending = true;
        // It cannot fail: it is written to once.
        let _ = rustix::io::write(&self.0.end, &1_u64.to_ne_bytes());
        let waited = self.0.changed.wait_timeout_while(state, at_most, |state| state.waiting > 0);
        drop(waited);
    }
}

impl<D: Door> Shared<D> {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that is counted as waiting already.
    fn start(self: &Arc<Self>) -> io::Result<()> {
        let shared = Arc::clone(self);
        thread::Builder::new().name("client".to_owned()).spawn(move || shared.wait_and_serve()).map(drop)
    }

    fn wait_and_serve(self: Arc<Self>) {
        while let Some(stream) = self.next() {
            // A panic costs its client the connection, and nobody else anything.
            let Ok(Some(work)) = catch_unwind(AssertUnwindSafe(|| self.door.admit(stream))) else { continue };
            if let Err(error) = self.hand_over() {
                self.door.complain("starting a thread", &error);
                continue;
            }
            let _ = catch_unwind(AssertUnwindSafe(work));
            let mut state = self.state();
            if state.ending {
                return;
            }
            state.waiting += 1;
        }
    }

    /// Leaves the door, where another one then waits.
    fn hand_over(self: &Arc<Self>) -> io::Result<()> {
        let mut state = self.state();
        if state.waiting == 1 && !state.ending {
            // It takes this one's place.
            return self.start();
        }
        self.depart(&mut state);
        Ok(())
    }

    fn depart(&self, state: &mut State) {
        state.waiting -= 1;
        if state.ending && state.waiting == 0 {
            self.changed.notify_all();
        }
    }

    /// The next client; `None`, and no longer waiting, if this thread is not needed.
    fn next(&self) -> Option<UnixStream> {
        loop {
            // Somebody always waits, for as long as it takes.
            let is_alone = self.state().waiting == 1;
            let mut found = [Event { flags: EventFlags::empty(), data: EventData::new_u64(END) }];
            match epoll::wait(&self.events, &mut found, (!is_alone).then_some(&IDLE)) {
                Err(rustix::io::Errno::INTR) => continue,
                Ok(0) => {
                    let mut state = self.state();
                    if state.waiting > 1 {
                        self.depart(&mut state);
                        return None;
                    }
                    continue;
                }
                Ok(_) => {}
                Err(error) => {
                    self.door.complain("waiting for connections", &error.into());
                    thread::sleep(PAUSE);
                }
            }
            {
                let mut state = self.state();
                if state.ending {
                    self.depart(&mut state);
                    return None;
                }
            }
            let accepted = self.socket.accept();
            if let Err(error) = &accepted
                && error.kind() != io::ErrorKind::WouldBlock
            {
                // Too many open files, or the client has left already.
                self.door.complain("accepting connection", error);
                thread::sleep(PAUSE);
            }
            let again = EventFlags::IN | EventFlags::ONESHOT;
            while let Err(error) = epoll::modify(&self.events, &self.socket, EventData::new_u64(CONNECTION), again) {
                // Nobody would be woken any more.
                self.door.complain("waiting for connections", &error.into());
                thread::sleep(PAUSE);
            }
            if let Ok((stream, _)) = accepted {
                return Some(stream);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::io::{Read as _, Write as _};
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::SocketAddr;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Tells which thread serves, and ends when the client does. A client that says `!` makes it panic, and
    /// one that says `?` is turned away by a panic.
    struct Told(Mutex<Sender<thread::ThreadId>>);

    impl Door for Told {
        fn admit(self: &Arc<Self>, mut stream: UnixStream) -> Option<Work> {
            let mut first = [0];
            stream.read_exact(&mut first).ok()?;
            if first == *b"?" {
                std::panic::resume_unwind(Box::new("turned away"));
            }
            let door = Arc::clone(self);
            Some(Box::new(move || {
                door.0.lock().unwrap().send(thread::current().id()).unwrap();
                if first == *b"!" {
                    std::panic::resume_unwind(Box::new("no more"));
                }
                let _ = stream.read(&mut first);
            }))
        }

        fn complain(&self, what: &str, error: &io::Error) {
            panic!("{what}: {error}");
        }
    }

    struct House {
        crew: Crew<Told>,
        address: SocketAddr,
        served: Receiver<thread::ThreadId>,
    }

    impl House {
        fn new(name: &str) -> Self {
            let name = format!("larder-crew-{name}-{}", std::process::id());
            let address = SocketAddr::from_abstract_name(name).unwrap();
            let (told, served) = channel();
            let socket = UnixListener::bind_addr(&address).unwrap();
            let crew = Crew::open(Arc::new(Told(Mutex::new(told))), socket).unwrap();
            Self { crew, address, served }
        }

        fn client(&self, first: u8) -> UnixStream {
            let mut stream = UnixStream::connect_addr(&self.address).unwrap();
            stream.write_all(&[first]).unwrap();
            stream
        }
    }

    /// Nobody waits for another to end, and who has ended serves again.
    #[test]
    fn all_are_served_at_once_and_threads_serve_again() {
        let house = House::new("all");
        let mut all = HashSet::new();
        for round in 0..3 {
            let clients: Vec<UnixStream> = (0..8).map(|_| house.client(b'.')).collect();
            // All are served before any of them ends.
            let threads: HashSet<_> = (0..8).map(|_| house.served.recv().unwrap()).collect();
            assert_eq!(threads.len(), 8, "round {round}");
            all.extend(threads);
            drop(clients);
            while house.crew.0.state().waiting < 9 {
                thread::yield_now();
            }
        }
        assert!(all.len() <= 9, "eight that serve and one at the door, not {}", all.len());
    }

    /// Work that panics costs its client, and nobody else.
    #[test]
    fn a_panic_is_the_end_of_one_client() {
        let house = House::new("panic");
        for first in *b"!?!?" {
            drop(house.client(first));
        }
        let after = house.client(b'.');
        for _ in 0..3 {
            house.served.recv().unwrap();
        }
        drop(after);
    }

    /// After the end nobody is let in, and who was let in is served on.
    #[test]
    fn a_closed_door() {
        let house = House::new("closed");
        let mut inside = house.client(b'.');
        house.served.recv().unwrap();
        house.crew.close(Duration::from_mins(1));
        assert_eq!(house.crew.0.state().waiting, 0);
        let _outside = house.client(b'.');
        house.served.recv_timeout(Duration::from_millis(100)).unwrap_err();
        inside.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        assert_eq!(inside.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock, "still served");
        drop(inside);
    }
}
