//! Roots that come while a collector runs, and what it is deleting just now.
//!
//! Shared with Nix 2.5 and later: whoever wants a temporary root and finds the collector's lock
//! taken connects to `gc-socket/socket`, sends the path and a line feed, and waits for one byte `1`.
//! It comes at once, unless the collector is deleting that very path: then as soon as that is over,
//! which is at most one batch. So nobody waits for a whole collection. Source: gc, section 6; the
//! whole protocol is told, with why it is safe, in `docs/gc-protocol.md`.
//!
//! [`Claims`] is the pure part, and what the model in `tests/protocol.rs` checks.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use larder_core::hash_part::HashPart;
use larder_core::report::{Level, Reporter};
use larder_fs::file_error::{At as _, FileError, shown};
use larder_fs::layout::{Layout, make_dirs};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Connections at a time; more wait to be accepted.
const MAX_CLIENTS: usize = 256;

/// The longest line that is taken, in bytes: any store directory and any name fit.
const MAX_LINE: usize = 4096 + 256;

/// Who needs what, and what goes just now. A key is a hash part: it stands for a path and for all
/// that lies beside it (`.lock`, `.chroot`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Claims<K: Ord> {
    roots: BTreeSet<K>,
    pending: BTreeSet<K>,
    /// Claimed since [`Claims::take_new`].
    new: Vec<K>,
}

impl<K: Ord> Default for Claims<K> {
    fn default() -> Self {
        Self { roots: BTreeSet::new(), pending: BTreeSet::new(), new: Vec::new() }
    }
}

impl<K: Ord + Copy> Claims<K> {
    /// Somebody needs this one from now on, for the rest of the run. May he go on already?
    pub fn claim(&mut self, key: K) -> bool {
        if self.roots.insert(key) {
            self.new.push(key);
        }
        !self.pending.contains(&key)
    }

    pub fn is_claimed(&self, key: K) -> bool {
        self.roots.contains(&key)
    }

    pub fn is_pending(&self, key: K) -> bool {
        self.pending.contains(&key)
    }

    /// The collector is about to delete these; `false`, and nothing has begun, if one is claimed.
    pub fn begin(&mut self, keys: impl IntoIterator<Item = K, IntoIter: Clone>) -> bool {
        let keys = keys.into_iter();
        if keys.clone().any(|key| self.roots.contains(&key)) {
            return false;
        }
        self.pending.extend(keys);
        true
    }

    /// All that had begun is over.
    pub fn end(&mut self) {
        self.pending.clear();
    }

    /// Claims that came since the last call.
    pub fn take_new(&mut self) -> Vec<K> {
        std::mem::take(&mut self.new)
    }
}

/// The claims of a run, shared with the thread that listens.
#[derive(Debug)]
pub struct Desk {
    claims: Mutex<Claims<HashPart>>,
    /// A byte goes in when somebody may be waiting for [`Claims::end`], and at the end.
    wake: OwnedFd,
    woken: OwnedFd,
    closed: std::sync::atomic::AtomicBool,
}

impl Desk {
    /// Looks at the claims, or changes them; whoever has the guard keeps everybody else waiting.
    pub fn claims(&self) -> MutexGuard<'_, Claims<HashPart>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends what has begun, and lets those go on who wait for it.
    pub fn end(&self) {
        self.claims().end();
        self.ring();
    }

    fn ring(&self) {
        // A full pipe wakes as well.
        let _ = rustix::io::write(&self.wake, b"x");
    }
}

/// Ends the listening when the work is done, or has panicked.
struct Closing<'a>(&'a Desk);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.closed.store(true, std::sync::atomic::Ordering::SeqCst);
        self.0.ring();
    }
}

/// Listens while `work` runs. The caller holds the collector's lock, exclusively.
///
/// Errors: the socket cannot be made.
pub fn listen_during<T>(
    layout: &Layout,
    reporter: &(dyn Reporter + Sync),
    work: impl FnOnce(&Desk) -> T,
) -> Result<T, FileError> {
    const DOING: &str = "making the collector's socket";
    let socket = layout.gc_socket();
    let listener = bind(&socket)?;
    listener.set_nonblocking(true).at(DOING, &socket)?;
    let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
    let (woken, wake) = rustix::pipe::pipe_with(flags).at(DOING, &socket)?;
    let desk = Desk { claims: Mutex::default(), wake, woken, closed: false.into() };
    std::thread::scope(|scope| {
        let listening = std::thread::Builder::new().name("new roots".to_owned());
        let desk = &desk;
        listening.spawn_scoped(scope, move || serve(&listener, desk, layout, reporter)).at(DOING, &socket)?;
        let _closing = Closing(desk);
        Ok(work(desk))
    })
}

/// Makes the socket, in place of one that an earlier collector has left, for everybody to use.
fn bind(socket: &Path) -> Result<UnixListener, FileError> {
    const DOING: &str = "making the collector's socket";
    let (Some(dir), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(FileError::new(DOING, socket, Errno::INVAL));
    };
    make_dirs(dir)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(dir, flags, Mode::empty()).at(DOING, socket)?;
    // An address has room for 108 bytes only, and a path may be longer.
    let short = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let place = if socket.as_os_str().len() < 90 { dir.join(&temporary) } else { short.join(&temporary) };
    match rustix::fs::unlinkat(&fd, &temporary, rustix::fs::AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(e) => return Err(FileError::new(DOING, socket, e)),
    }
    let listener = UnixListener::bind(&place).at(DOING, socket)?;
    let public = fs::Permissions::from_mode(0o666);
    let ready = fs::set_permissions(&place, public).and_then(|()| fs::rename(&place, place.with_file_name(name)));
    if let Err(e) = ready {
        let _ = fs::remove_file(&place);
        return Err(FileError::new(DOING, socket, e));
    }
    Ok(listener)
}

/// Somebody who wants roots.
struct Client {
    stream: UnixStream,
    /// What came and is not answered yet.
    text: Vec<u8>,
    /// What is not sent yet.
    answers: usize,
    /// Waits until this one is deleted.
    waits_for: Option<HashPart>,
    gone: bool,
}

impl Client {
    /// Reads what there is.
    fn read(&mut self) {
        let mut block = [0; 4096];
        // Not more than a line ahead: who sends without reading answers has to wait.
        while self.text.len() < MAX_LINE {
            match self.stream.read(&mut block) {
                Ok(0) => return self.gone = true,
                Ok(n) => self.text.extend_from_slice(block.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.gone = true,
            }
        }
    }

    /// Answers the lines that can be answered now.
    fn answer(&mut self, desk: &Desk, layout: &Layout, reporter: &dyn Reporter) {
        while !self.gone {
            if let Some(key) = self.waits_for {
                if desk.claims().is_pending(key) {
                    break;
                }
                self.waits_for = None;
                self.answers += 1;
            }
            let Some(end) = self.text.iter().position(|b| *b == b'\n') else {
                // No line is as long as this: it is not a client of ours.
                self.gone |= self.text.len() >= MAX_LINE;
                break;
            };
            let line: Vec<u8> = self.text.drain(..=end).collect();
            if let Ok(path) = layout.store_dir.parse(line.strip_suffix(b"\n").unwrap_or_default()) {
                let key = path.hash_part();
                reporter.message(Level::Debug, format_args!("got new GC root '{path}'"));
                if desk.claims().claim(key) {
                    self.answers += 1;
                } else {
                    self.waits_for = Some(key);
                }
            } else {
                reporter.message(Level::Error, format_args!("received garbage instead of a root from client"));
                self.answers += 1;
            }
        }
        self.write();
    }

    fn write(&mut self) {
        const ONES: [u8; 64] = [b'1'; 64];
        while self.answers > 0 && !self.gone {
            match self.stream.write(ONES.get(..self.answers.min(ONES.len())).unwrap_or_default()) {
                Ok(n) => self.answers -= n.min(self.answers),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.gone = true,
            }
        }
    }

    fn interest(&self) -> PollFlags {
        let mut flags = PollFlags::empty();
        if self.text.len() < MAX_LINE {
            flags |= PollFlags::IN;
        }
        if self.answers > 0 {
            flags |= PollFlags::OUT;
        }
        flags
    }
}

/// One thread for all, until the desk is closed; then those who wait see the connection end, which
/// tells them to look at the lock again.
fn serve(listener: &UnixListener, desk: &Desk, layout: &Layout, reporter: &dyn Reporter) {
    let mut clients: Vec<Client> = Vec::new();
    while !desk.closed.load(std::sync::atomic::Ordering::SeqCst) {
        let ready = {
            let mut fds = vec![PollFd::new(&desk.woken, PollFlags::IN)];
            let room = clients.len() < MAX_CLIENTS;
            fds.push(PollFd::new(listener, if room { PollFlags::IN } else { PollFlags::empty() }));
            fds.extend(clients.iter().map(|client| PollFd::new(&client.stream, client.interest())));
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => fds.iter().map(PollFd::revents).collect::<Vec<PollFlags>>(),
                Err(Errno::INTR) => continue,
                Err(e) => {
                    // Without us newcomers wait until the collector ends, which is safe.
                    let socket = layout.gc_socket();
                    reporter.message(Level::Warn, format_args!("cannot listen at '{}' any more: {e}", shown(&socket)));
                    return;
                }
            }
        };
        let mut drain = [0; 64];
        while rustix::io::read(desk.woken.as_fd(), &mut drain).is_ok_and(|n| n > 0) {}
        let closed = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        for (client, events) in clients.iter_mut().zip(ready.iter().skip(2)) {
            if events.contains(PollFlags::IN) {
                client.read();
            } else if events.intersects(closed) {
                client.gone = true;
            }
            client.answer(desk, layout, reporter);
        }
        clients.retain(|client| !client.gone);
        if ready.get(1).is_some_and(|events| events.contains(PollFlags::IN)) {
            while clients.len() < MAX_CLIENTS
                && let Ok((stream, _)) = listener.accept()
            {
                if stream.set_nonblocking(true).is_ok() {
                    clients.push(Client { stream, text: Vec::new(), answers: 0, waits_for: None, gone: false });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Told, layout, path};
    use larder_core::report::Silent;
    use larder_fs::temp_roots::TempRoots;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn claims_and_deletions_exclude_each_other() {
        let mut claims = Claims::default();
        assert!(claims.claim(1));
        assert!(!claims.begin([1, 2]));
        assert!(!claims.is_pending(2), "nothing has begun");
        assert!(claims.begin([2, 3]));
        assert!(!claims.claim(2) && claims.claim(4));
        claims.end();
        assert!(!claims.is_pending(2) && claims.claim(2));
        assert!(!claims.begin([2]), "who waited has it now");
        assert_eq!(claims.take_new(), [1, 2, 4]);
        assert!(claims.take_new().is_empty());
    }

    #[test]
    fn roots_come_in_while_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        // Longer than an address.
        let layout = layout(&dir.path().join("x".repeat(100)));
        fs::create_dir_all(&layout.state).unwrap();
        let lock = larder_fs::gc_lock::GcLock::acquire(
            &layout,
            larder_fs::lock_file::Sharing::Exclusive,
            larder_fs::lock_file::Wait::No,
        );
        let lock = lock.unwrap().unwrap();
        listen_during(&layout, &Silent, |desk| {
            let mode = fs::metadata(layout.gc_socket()).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o666);
            let roots = TempRoots::new(layout.clone());
            roots.add(&path(1)).unwrap();
            assert!(desk.claims().is_claimed(path(1).hash_part()));
            assert!(desk.claims().begin([path(2).hash_part()]));
            std::thread::scope(|scope| {
                let (done_tx, done) = mpsc::channel();
                let layout = &layout;
                scope.spawn(move || {
                    let roots = TempRoots::new(layout.clone());
                    roots.add(&path(3)).unwrap();
                    done_tx.send(3).unwrap();
                    roots.add(&path(2)).unwrap();
                    done_tx.send(2).unwrap();
                });
                assert_eq!(done.recv().unwrap(), 3, "others need not wait");
                assert!(done.recv_timeout(Duration::from_millis(100)).is_err(), "this one is being deleted");
                desk.end();
                assert_eq!(done.recv().unwrap(), 2);
            });
        })
        .unwrap();
        drop(lock);
    }

    #[test]
    fn strange_clients() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        fs::create_dir_all(layout.gc_socket().parent().unwrap()).unwrap();
        // What an earlier collector has left.
        drop(UnixListener::bind(layout.gc_socket()).unwrap());
        let told = Told::default();
        listen_during(&layout, &told, |desk| {
            let mut answer = [0];
            let mut garbage = UnixStream::connect(layout.gc_socket()).unwrap();
            garbage.write_all(b"zork\n").unwrap();
            garbage.read_exact(&mut answer).unwrap();
            let mut endless = UnixStream::connect(layout.gc_socket()).unwrap();
            let _ = endless.write_all(&vec![b'x'; 1 << 20]);
            assert!(matches!(endless.read(&mut answer), Ok(0) | Err(_)), "it is shown the door");
            let mut slow = UnixStream::connect(layout.gc_socket()).unwrap();
            for byte in layout.store_dir.full(&path(4)).bytes().chain(*b"\n") {
                slow.write_all(&[byte]).unwrap();
            }
            slow.read_exact(&mut answer).unwrap();
            assert_eq!(answer, *b"1");
            assert!(desk.claims().is_claimed(path(4).hash_part()));
            // Many at once, more than are served at a time.
            let crowd: Vec<_> =
                (0..MAX_CLIENTS + 20).map(|_| UnixStream::connect(layout.gc_socket()).unwrap()).collect();
            drop(crowd);
            slow.write_all(b"\n").unwrap();
            slow.read_exact(&mut answer).unwrap();
        })
        .unwrap();
        assert_eq!(told.take().iter().filter(|text| text.contains("received garbage")).count(), 2);
        assert!(UnixStream::connect(layout.gc_socket()).is_err(), "nobody listens any more");
    }
}
