//! The server's way to the client: messages while it works, then the reply.
//!
//! Messages may come from any thread. A client that does not read must not hold the work up, which
//! may have locks that others wait for: messages that cannot be sent at once are kept, up to a
//! limit, and sent with the reply; beyond it they are lost.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use larder_core::report::{Activity, ActivityResult, Level, Progress, Reporter, Start};
use larder_core::store_dir::StoreDir;

use super::activity;
use super::message::{ErrorMessage, Message};
use crate::codec::{Encoder, Protocol};
use crate::value::Wire as _;

/// Messages that are kept for a client that does not read, in bytes.
const MAX_KEPT: usize = 1 << 20;

/// How often it is looked whether the client is still there.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Changes of activities wait so long for others to go with, if one was sent shortly before: each
/// wakes the client. What waits is sent by whoever looks whether the client is still there.
const TOGETHER: Duration = Duration::from_millis(20);

/// Changes of activities that are sent without waiting for more, in bytes.
const ENOUGH: usize = 4 << 10;

/// The least time between two reports of progress.
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// What bytes to the client go into.
pub trait Outlet: Write + Send {
    /// Writes as much as can be written without waiting, maybe nothing.
    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize>;
}

/// A buffer never lets one wait.
impl Outlet for Vec<u8> {
    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.extend_from_slice(bytes);
        Ok(bytes.len())
    }
}

/// What else there is to know and to say about a connection.
pub trait Line: Send + Sync {
    /// Has the client gone away?
    fn has_hung_up(&self) -> bool;

    /// From now on, all reading must be over after this time; `None` for no limit.
    fn set_deadline(&self, after: Option<Duration>);

    /// No request is under way, or one begins: while none is, the connection may be ended.
    fn set_resting(&self, _resting: bool) {}
}

/// A line that stays up.
#[derive(Debug, Clone, Copy, Default)]
pub struct Steady;

impl Line for Steady {
    fn has_hung_up(&self) -> bool {
        false
    }
    fn set_deadline(&self, _: Option<Duration>) {}
}

/// Tells the client of one connection.
pub struct Tunnel {
    dir: StoreDir,
    minor: AtomicU8,
    verbosity: AtomicU8,
    /// Does a client without activities want the output of builders?
    shows_logs: AtomicBool,
    line: Box<dyn Line>,
    gone: AtomicBool,
    last_id: AtomicU64,
    looked: Mutex<Option<Instant>>,
    state: Mutex<State>,
}

struct State {
    out: Box<dyn Outlet>,
    /// Encoded, and not sent yet.
    kept: Vec<u8>,
    /// When something was sent last.
    sent: Option<Instant>,
    /// Does the client expect messages now?
    working: bool,
    /// Work that reports its progress, the innermost last.
    work: Vec<Work>,
}

struct Work {
    id: u64,
    total: u64,
    done: u64,
    told: Instant,
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("minor", &self.minor).finish_non_exhaustive()
    }
}

/// A panic elsewhere leaves nothing half done under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Tunnel {
    /// Activities get numbers above `first_id`.
    pub fn new(dir: StoreDir, minor: u8, out: Box<dyn Outlet>, line: Box<dyn Line>, first_id: u64) -> Self {
        Self {
            dir,
            minor: AtomicU8::new(minor),
            verbosity: AtomicU8::new(Level::Info as u8),
            shows_logs: AtomicBool::new(true),
            line,
            gone: AtomicBool::new(false),
            last_id: AtomicU64::new(first_id),
            looked: Mutex::new(None),
            state: Mutex::new(State { out, kept: Vec::new(), sent: None, working: false, work: Vec::new() }),
        }
    }

    /// The same with something that is to be sent before all else.
    #[must_use]
    pub(super) fn after(mut self, words: Vec<u8>) -> Self {
        self.state.get_mut().unwrap_or_else(PoisonError::into_inner).kept = words;
        self
    }

    pub fn minor(&self) -> u8 {
        self.minor.load(Ordering::Relaxed)
    }

    pub fn line(&self) -> &dyn Line {
        &*self.line
    }

    /// Messages above this level are not sent.
    pub fn set_verbosity(&self, level: u32) {
        self.verbosity.store(u8::try_from(level).unwrap_or(u8::MAX), Ordering::Relaxed);
    }

    /// Whether clients that know no activities are sent the output of builders, as plain lines.
    pub fn set_shows_logs(&self, shows: bool) {
        self.shows_logs.store(shows, Ordering::Relaxed);
    }

    /// Does the client show the output of builders as it comes? One that knows activities decides
    /// that for itself, so that nobody knows.
    pub fn shows_logs(&self) -> bool {
        !self.has_activities() && self.shows_logs.load(Ordering::Relaxed)
    }

    /// Work ends soon, as if the client had gone.
    pub fn cancel(&self) {
        self.gone.store(true, Ordering::Relaxed);
    }

    fn encode(&self, message: &Message, out: &mut Vec<u8>) {
        message.write(&mut Encoder::new(out, &self.dir, Protocol::Worker(self.minor())));
    }

    /// Sends a message that may be late, or be lost if the client does not read.
    fn tell(&self, message: &Message) {
        let mut state = lock(&self.state);
        if state.kept.len() < MAX_KEPT {
            self.encode(message, &mut state.kept);
        }
        if state.working && state.try_send().is_err() {
            self.cancel();
        }
    }

    /// The same, and it may wait for others that follow soon.
    fn tell_soon(&self, message: &Message) {
        let mut state = lock(&self.state);
        if state.kept.len() < MAX_KEPT {
            self.encode(message, &mut state.kept);
        }
        if state.working && state.is_due() && state.try_send().is_err() {
            self.cancel();
        }
    }

    /// Sends what has waited long enough.
    fn send_due(&self) {
        let mut state = lock(&self.state);
        if state.working && !state.kept.is_empty() && state.is_due() && state.try_send().is_err() {
            self.cancel();
        }
    }

    /// The client waits from now on, and may be told things.
    pub fn begin(&self) {
        let mut state = lock(&self.state);
        state.working = true;
        if state.try_send().is_err() {
            self.cancel();
        }
    }

    /// Says how the work ended.
    pub fn end(&self, outcome: Result<(), ErrorMessage>) -> io::Result<()> {
        let message = match outcome {
            Ok(()) => Message::Last,
            Err(error) => Message::Error(error),
        };
        let mut state = lock(&self.state);
        state.working = false;
        self.encode(&message, &mut state.kept);
        state.send()
    }

    /// Says that the work is done, and sends the reply.
    pub fn reply(&self, reply: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.working = false;
        self.encode(&Message::Last, &mut state.kept);
        state.kept.extend_from_slice(reply);
        state.send()
    }

    /// Says of several pieces of work, one after the other, that they are done, and sends the replies.
    pub(super) fn reply_all(&self, replies: &[Vec<u8>]) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.working = false;
        for reply in replies {
            self.encode(&Message::Last, &mut state.kept);
            state.kept.extend_from_slice(reply);
        }
        state.send()
    }

    /// Asks the client for data.
    pub(super) fn demand(&self, message: &Message) -> io::Result<()> {
        let mut state = lock(&self.state);
        self.encode(message, &mut state.kept);
        state.send()
    }

    /// Bytes as they are, outside of messages.
    pub const fn raw(&self) -> Raw<'_> {
        Raw(self)
    }

    fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn has_activities(&self) -> bool {
        self.minor() >= 20
    }

    fn work_progress(&self, id: u64, done: u64, total: u64) {
        self.result(id, ActivityResult::Progress { done, expected: total, running: 0, failed: 0 });
    }
}

impl State {
    fn is_due(&self) -> bool {
        self.kept.len() >= ENOUGH || self.sent.is_none_or(|sent| sent.elapsed() >= TOGETHER)
    }

    /// What can be sent without waiting.
    fn try_send(&mut self) -> io::Result<()> {
        if !self.kept.is_empty() {
            self.sent = Some(Instant::now());
        }
        while !self.kept.is_empty() {
            let n = self.out.try_write(&self.kept)?;
            if n == 0 {
                return Ok(());
            }
            self.kept.drain(..n);
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        self.sent = Some(Instant::now());
        self.out.write_all(&self.kept)?;
        self.kept.clear();
        // A reply may have been large, and the connection may be idle for long.
        self.kept.shrink_to(4096);
        self.out.flush()
    }
}

/// Writes bytes as they are. Nothing else may be sent meanwhile.
pub struct Raw<'a>(&'a Tunnel);

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0.state).out.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        lock(&self.0.state).out.flush()
    }
}

/// Writes data as messages.
pub(super) struct MessageWriter<'a> {
    pub(super) tunnel: &'a Tunnel,
    pub(super) buffer: Vec<u8>,
}

/// Data in one message, in bytes.
const PIECE: usize = 64 << 10;

impl Write for MessageWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(bytes.split_at(n).0);
        if self.buffer.len() == PIECE {
            self.flush()?;
        }
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.tunnel.demand(&Message::Write(std::mem::take(&mut self.buffer)))
    }
}

impl Reporter for Tunnel {
    fn shows(&self, level: Level) -> bool {
        level as u8 <= self.verbosity.load(Ordering::Relaxed)
    }

    fn message(&self, level: Level, text: fmt::Arguments<'_>) {
        if self.shows(level) {
            let prefix = if level == Level::Warn { "warning: " } else { "" };
            self.tell(&Message::Next(format!("{prefix}{text}\n").into_bytes()));
        }
    }

    fn progress(&self, step: Progress<'_>) {
        if !self.has_activities() {
            return;
        }
        match step {
            Progress::Begin { total, .. } => {
                // The text was told, or nobody waits for it: clients would print it.
                let id =
                    self.start(&Start { level: Level::Debug, text: "", activity: Activity::VerifyPaths, parent: 0 });
                let work = Work { id, total: total.unwrap_or(0), done: 0, told: Instant::now() };
                lock(&self.state).work.push(work);
            }
            Progress::Advance(more) => {
                let due = {
                    let mut state = lock(&self.state);
                    let Some(work) = state.work.last_mut() else { return };
                    work.done += more;
                    (work.told.elapsed() >= PROGRESS_EVERY).then(|| {
                        work.told = Instant::now();
                        (work.id, work.done, work.total)
                    })
                };
                if let Some((id, done, total)) = due {
                    self.work_progress(id, done, total);
                }
            }
            Progress::End => {
                let ended = lock(&self.state).work.pop();
                if let Some(work) = ended {
                    self.work_progress(work.id, work.done, work.total);
                    self.stop(work.id);
                }
            }
        }
    }

    fn start(&self, start: &Start<'_>) -> u64 {
        let id = self.next_id();
        if self.has_activities() {
            let (kind, fields) = activity::start(start.activity);
            self.tell_soon(&Message::Start {
                id,
                level: start.level as u64,
                kind,
                text: start.text.as_bytes().to_vec(),
                fields,
                parent: start.parent,
            });
        } else if !start.text.is_empty() && self.shows(start.level) {
            self.tell(&Message::Next(format!("{}...\n", start.text).into_bytes()));
        }
        id
    }

    fn result(&self, activity: u64, result: ActivityResult<'_>) {
        if !self.has_activities() {
            // As daemons did when such clients were new.
            if let ActivityResult::BuildLogLine(line) | ActivityResult::PostBuildLogLine(line) = result
                && self.shows_logs()
            {
                self.tell(&Message::Next([line, b"\n"].concat()));
            }
            return;
        }
        let Some((kind, fields)) = activity::result(result) else { return };
        self.tell_soon(&Message::Result { id: activity, kind, fields });
    }

    fn stop(&self, activity: u64) {
        if self.has_activities() {
            self.tell_soon(&Message::Stop { id: activity });
        }
    }

    fn is_cancelled(&self) -> bool {
        if self.gone.load(Ordering::Relaxed) {
            return true;
        }
        self.send_due();
        let mut looked = lock(&self.looked);
        if looked.is_none_or(|at| at.elapsed() >= LOOK_EVERY) {
            *looked = Some(Instant::now());
            if self.line.has_hung_up() {
                self.cancel();
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// What was sent, piece by piece.
    #[derive(Default, Clone)]
    struct Pieces(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).push(bytes.to_vec());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Outlet for Pieces {
        fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.write(bytes)
        }
    }

    fn start(tunnel: &Tunnel) -> u64 {
        tunnel.start(&Start { level: Level::Info, text: "x", activity: Activity::Builds, parent: 0 })
    }

    /// Changes that follow upon each other go together, none waits for longer than it takes somebody
    /// to look for the client, and what people read goes at once.
    #[test]
    fn changes_of_activities_go_together() {
        let pieces = Pieces::default();
        let tunnel =
            Tunnel::new(StoreDir::new("/nix/store").unwrap(), 38, Box::new(pieces.clone()), Box::new(Steady), 0);
        let count = || lock(&pieces.0).len();
        tunnel.begin();
        let begun = Instant::now();
        let ids: Vec<u64> = (0..20).map(|_| start(&tunnel)).collect();
        if begun.elapsed() < TOGETHER {
            assert_eq!(count(), 1, "the first, and nothing of the others");
            while begun.elapsed() < TOGETHER + Duration::from_millis(5) {
                std::thread::yield_now();
            }
            assert_eq!(count(), 1);
            assert!(!tunnel.is_cancelled());
            assert_eq!(count(), 2, "the others, in one piece");
        }
        tunnel.stop(ids[0]);
        tunnel.message(Level::Error, format_args!("read this"));
        let sent = lock(&pieces.0).concat();
        assert!(sent.ends_with(b"read this\n\0\0\0\0\0\0"), "{sent:?}");
        // Nothing is lost, and all is in order, at the end of the work.
        tunnel.stop(ids[1]);
        tunnel.reply(b"reply").unwrap();
        let sent = lock(&pieces.0).concat();
        let mut all = Vec::new();
        tunnel.encode(&Message::Stop { id: ids[1] }, &mut all);
        tunnel.encode(&Message::Last, &mut all);
        assert!(sent.ends_with(&[&all[..], b"reply"].concat()), "{sent:?}");
    }
}
