//! The body of an answer, gone on with where it was cut.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::header;

use super::{Ask, Client, LOOK_UP, Method, Open};
use crate::error::{CacheError, DownloadError};

/// Where to go on, and what the file must be for that.
pub(super) struct Resume {
    pub(super) at: u64,
    pub(super) tag: Option<String>,
}

/// The body of an answer; cut, it is gone on with if the server can do that.
pub struct Download {
    client: Arc<Client>,
    ask: Ask,
    /// `None` at the end.
    open: Option<Open>,
    encoding: Option<String>,
    /// Does the server take ranges?
    ranges: bool,
    tag: Option<String>,
    at: u64,
    total: Option<u64>,
    attempt: u32,
    stops: u64,
    /// When and where the present time of watching for stalls began.
    watched: (Instant, u64),
    /// When it began to come.
    began: Instant,
}

impl std::fmt::Debug for Download {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Download").field("url", &self.ask.url).field("at", &self.at).finish_non_exhaustive()
    }
}

impl Download {
    pub(super) fn new(client: &Arc<Client>, ask: &Ask, open: Open, attempt: u32, stops: u64) -> Self {
        let ranges = open.text(header::ACCEPT_RANGES).is_some_and(|text| text.trim() == "bytes");
        let strong = open.text(header::ETAG).filter(|tag| !tag.starts_with("W/"));
        Self {
            client: Arc::clone(client),
            ask: ask.clone(),
            encoding: open.encoding(),
            ranges,
            tag: strong.map(str::to_owned),
            at: 0,
            // Of a `HEAD` there is no more to come, whatever it says.
            total: open.size_bytes().filter(|_| ask.method != Method::Head),
            attempt,
            stops,
            watched: (Instant::now(), 0),
            began: Instant::now(),
            open: Some(open),
        }
    }

    /// How many bytes it has, if the server says so.
    pub fn size_bytes(&self) -> Option<u64> {
        self.total
    }

    /// What the server calls this very version of it.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The encoding that is to be undone.
    pub fn encoding(&self) -> Option<&str> {
        self.encoding.as_deref()
    }

    /// Has it been too slow for too long?
    fn is_stalled(&mut self) -> bool {
        let Some(most) = self.client.options.stall_timeout else { return false };
        let (since, from) = self.watched;
        let elapsed = since.elapsed();
        if elapsed < most {
            return false;
        }
        self.watched = (Instant::now(), self.at);
        self.at - from < elapsed.as_secs()
    }

    /// How many bytes may be asked for at once, lest all of a second comes and then nothing for long.
    fn most(&self, wanted: usize) -> usize {
        let Some(speed) = self.client.options.speed else { return wanted };
        wanted.min(usize::try_from(speed.get() / 16).unwrap_or(usize::MAX).max(1))
    }

    /// Lets time pass until no more has come than is allowed.
    fn keep_pace(&self) -> Result<(), DownloadError> {
        let Some(speed) = self.client.options.speed else { return Ok(()) };
        let nanos = u128::from(self.at) * 1_000_000_000 / u128::from(speed.get());
        let due = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        while let Some(left) = due.checked_sub(self.began.elapsed()).filter(|left| !left.is_zero()) {
            if self.client.is_stopped(self.stops) {
                return Err(DownloadError::Stopped);
            }
            std::thread::sleep(left.min(LOOK_UP));
        }
        Ok(())
    }

    fn resume(&mut self, error: DownloadError) -> Result<(), DownloadError> {
        self.open = None;
        let mut error = self.client.or_stopped(error, self.stops);
        if !error.is_passing() {
            return Err(error);
        }
        if self.at > 0 && (!self.ranges || self.encoding.is_some()) {
            return Err(DownloadError::Cut { at: self.at, source: io::Error::other(error) });
        }
        loop {
            if self.attempt >= self.client.options.attempts || !error.is_passing() {
                return Err(error);
            }
            self.client.pause(&self.ask, self.attempt, &error, self.stops)?;
            self.attempt += 1;
            match self.reopen() {
                Ok(open) => {
                    self.watched = (Instant::now(), self.at);
                    self.open = Some(open);
                    return Ok(());
                }
                Err(failed) => error = self.client.or_stopped(failed, self.stops),
            }
        }
    }

    fn reopen(&self) -> Result<Open, DownloadError> {
        let changed = |text: &str| DownloadError::Cut { at: self.at, source: io::Error::other(text.to_owned()) };
        let resume = Resume { at: self.at, tag: self.tag.clone() };
        let resume = Some(&resume).filter(|resume| resume.at > 0);
        let mut open = self.client.once(&self.ask, resume, self.stops)?;
        if open.status == 206 {
            return match open.content_range() {
                Some((at, total))
                    if at == self.at && (total.is_none() || self.total.is_none() || total == self.total) =>
                {
                    Ok(open)
                }
                _ => Err(changed("the server went on elsewhere, or with another file")),
            };
        }
        if open.size_bytes() != self.total
            || self.tag.as_deref().is_some_and(|tag| open.text(header::ETAG) != Some(tag))
        {
            return Err(changed("the file has changed on the server"));
        }
        // From the beginning; what was had is skipped. Whether it is the same, hashes will tell.
        let skipped = io::copy(&mut (&mut open.body).take(self.at), &mut io::sink());
        match skipped {
            Ok(n) if n == self.at => Ok(open),
            Ok(_) => Err(changed("the file has become shorter")),
            Err(source) => Err(DownloadError::Cut { at: self.at, source }),
        }
    }

    fn next(&mut self, buf: &mut [u8]) -> Result<usize, DownloadError> {
        let most = self.most(buf.len());
        let buf = buf.get_mut(..most).unwrap_or_default();
        loop {
            let Some(open) = &mut self.open else { return Ok(0) };
            let error = match open.body.read(buf) {
                Ok(0) => match self.total {
                    Some(total) if self.at < total => DownloadError::Short { at: self.at, total },
                    _ => {
                        self.open = None;
                        return Ok(0);
                    }
                },
                Ok(n) => {
                    self.at += n as u64;
                    self.keep_pace()?;
                    if !self.is_stalled() {
                        return Ok(n);
                    }
                    // What has come is good; the next call finds no connection any more.
                    let seconds = self.client.options.stall_timeout.map_or(0, |most| most.as_secs());
                    self.resume(DownloadError::Stalled { seconds })?;
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => DownloadError::from(ureq::Error::Io(error)),
            };
            self.resume(error)?;
        }
    }
}

impl Read for Download {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        self.next(buf).map_err(|source| io::Error::other(CacheError::Download { url: self.ask.url.clone(), source }))
    }
}
