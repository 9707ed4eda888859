//! Objects and other data that come from the client.

use std::io::{self, BufRead, Read};
use std::sync::Arc;

use larder_core::api::{ErrorKind, NarSource, StoreError};
use larder_core::path_info::PathInfo;
use larder_core::store_dir::StoreDir;

use crate::codec::{Budget, Decoder, Protocol, WireError};
use crate::stream::{BareNar, Framed};
use crate::value::{WholeInfo, Wire as _};
use crate::worker::message::Message;
use crate::worker::tunnel::Tunnel;

/// Data that the client sends in pieces when it is asked to.
pub(super) struct Pulled<'a> {
    input: &'a mut dyn BufRead,
    tunnel: &'a Tunnel,
    dir: &'a StoreDir,
    piece: Vec<u8>,
    at: usize,
    failure: Option<WireError>,
}

/// What is asked for at a time, in bytes.
const PULL: u64 = 32 << 10;

impl<'a> Pulled<'a> {
    pub(super) const fn new(input: &'a mut dyn BufRead, tunnel: &'a Tunnel, dir: &'a StoreDir) -> Self {
        Self { input, tunnel, dir, piece: Vec::new(), at: 0, failure: None }
    }

    /// The connection itself failed: what is left of it makes no sense.
    pub(super) fn into_failure(self) -> Option<WireError> {
        self.failure
    }

    fn pull(&mut self) -> Result<(), WireError> {
        self.tunnel.demand(&Message::Read(PULL)).map_err(WireError::Write)?;
        let protocol = Protocol::Worker(self.tunnel.minor());
        self.piece = Decoder::new(self.input, self.dir, protocol, Budget::unlimited()).bytes(PULL)?;
        self.at = 0;
        Ok(())
    }
}

impl Read for Pulled<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let n = bytes.len().min(into.len());
        into.split_at_mut(n).0.copy_from_slice(bytes.split_at(n).0);
        self.consume(n);
        Ok(n)
    }
}

impl BufRead for Pulled<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.failure.is_some() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if self.at == self.piece.len() {
            if let Err(error) = self.pull() {
                let text = error.to_string();
                self.failure = Some(error);
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
            }
            // The client has no more, and is in step.
            if self.piece.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, WireError::UnexpectedEnd));
            }
        }
        Ok(self.piece.get(self.at..).unwrap_or_default())
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

/// One object, whose record is known.
pub(super) struct OneObject<'a> {
    info: Option<PathInfo>,
    source: &'a mut dyn Read,
}

impl<'a> OneObject<'a> {
    pub(super) const fn new(info: PathInfo, source: &'a mut dyn Read) -> Self {
        Self { info: Some(info), source }
    }
}

impl Read for OneObject<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.source.read(into)
    }
}

impl NarSource for OneObject<'_> {
    fn next_object(&mut self) -> Result<Option<PathInfo>, StoreError> {
        Ok(self.info.take())
    }
}

/// A count, then records and NARs, all in one framed stream.
pub(super) struct ManyObjects<'a, 'f> {
    nar: BareNar<&'a mut Framed<'f>>,
    dir: &'a StoreDir,
    budget: &'a Arc<Budget>,
    /// Objects to come; not known at first.
    left: Option<u64>,
}

impl<'a, 'f> ManyObjects<'a, 'f> {
    pub(super) fn new(framed: &'a mut Framed<'f>, dir: &'a StoreDir, budget: &'a Arc<Budget>) -> Self {
        Self { nar: BareNar::new(framed), dir, budget, left: None }
    }

    fn read_next(&mut self) -> Result<Option<PathInfo>, WireError> {
        // The layout of a record is that of all newer versions, whatever is spoken.
        let protocol = Protocol::Worker(super::super::MINOR);
        let left = match self.left {
            Some(left) => {
                self.nar.skip()?;
                left
            }
            None => Decoder::new(self.nar.input(), self.dir, protocol, Arc::clone(self.budget)).word()?,
        };
        self.left = Some(left.saturating_sub(1));
        if left == 0 {
            return Ok(None);
        }
        self.nar.restart();
        let info = WholeInfo::read(&mut Decoder::new(self.nar.input(), self.dir, protocol, Arc::clone(self.budget)))?;
        Ok(Some(info.0))
    }
}

impl Read for ManyObjects<'_, '_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.nar.read(into)
    }
}

impl NarSource for ManyObjects<'_, '_> {
    fn next_object(&mut self) -> Result<Option<PathInfo>, StoreError> {
        self.read_next().map_err(|error| {
            let kind = match error {
                WireError::OutOfMemory => ErrorKind::OutOfMemory,
                _ => ErrorKind::Other,
            };
            StoreError::new(kind, error)
        })
    }
}
