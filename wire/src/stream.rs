//! Contents on the wire: framed, as a bare NAR, or pulled by the server.
//!
//! Each is a `Read` that ends where the contents end, and of which the rest can be skipped, so
//! that the connection is in step again after a failure.

use std::io::{self, BufRead, Read, Write};

use larder_core::nar::Parser;

use crate::codec::WireError;

/// An input of which is known what has come already.
pub(crate) struct Lookahead<'a> {
    inner: &'a mut dyn BufRead,
    /// So many bytes can be had without waiting.
    held: usize,
}

impl<'a> Lookahead<'a> {
    pub(crate) const fn new(inner: &'a mut dyn BufRead) -> Self {
        Self { inner, held: 0 }
    }

    /// What has come and is not consumed.
    pub(crate) fn held(&mut self) -> io::Result<&[u8]> {
        if self.held == 0 {
            return Ok(&[]);
        }
        self.fill_buf()
    }
}

impl Read for Lookahead<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(out)?;
        self.held = self.held.saturating_sub(n);
        Ok(n)
    }
}

impl BufRead for Lookahead<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let found = self.inner.fill_buf()?;
        self.held = found.len();
        Ok(found)
    }

    fn consume(&mut self, n: usize) {
        self.held = self.held.saturating_sub(n);
        self.inner.consume(n);
    }
}

/// Frames: a length, so many bytes, and again, until a length of 0. No padding.
pub struct Framed<'a> {
    input: &'a mut dyn BufRead,
    /// Bytes left of the current frame.
    left: u64,
    done: bool,
    /// Was there a length that cannot be one, so that nobody knows where the frames end?
    broken: bool,
}

/// No frame is longer; others read the length as 32 bits.
const MAX_FRAME: u64 = 1 << 31;

impl<'a> Framed<'a> {
    pub const fn new(input: &'a mut dyn BufRead) -> Self {
        Self { input, left: 0, done: false, broken: false }
    }

    /// Makes sure that `left` bytes are to come, unless all is over.
    fn advance(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if self.left == 0 && !self.done {
            let mut word = [0; 8];
            self.input.read_exact(&mut word)?;
            self.left = u64::from_le_bytes(word);
            self.done = self.left == 0;
            if self.left > MAX_FRAME {
                let found = std::mem::take(&mut self.left);
                self.broken = true;
                return Err(WireError::Integer { found, kind: 'j' }.into_io());
            }
        }
        Ok(())
    }

    /// Reads and forgets the rest, up to the last frame.
    pub fn skip(&mut self) -> io::Result<()> {
        loop {
            let taken = self.fill_buf()?.len();
            if taken == 0 {
                return Ok(());
            }
            self.consume(taken);
        }
    }
}

impl Read for Framed<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.advance()?;
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.input.read(into.get_mut(..most).unwrap_or_default())?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

impl BufRead for Framed<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.advance()?;
        if self.done {
            return Ok(&[]);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let bytes = self.input.fill_buf()?;
        if bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes.get(..most.min(bytes.len())).unwrap_or_default())
    }

    fn consume(&mut self, n: usize) {
        self.left -= n as u64;
        self.input.consume(n);
    }
}

/// A NAR without a length: its end is where it ends.
pub struct BareNar<R> {
    input: R,
    parser: Parser,
    /// What was parsed and is still to be given out.
    parsed: usize,
    failed: bool,
}

impl<R: BufRead> BareNar<R> {
    pub fn new(input: R) -> Self {
        Self { input, parser: Parser::default(), parsed: 0, failed: false }
    }

    /// What it is read from: for what stands between two NARs.
    pub const fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Another NAR follows.
    pub fn restart(&mut self) {
        self.parser = Parser::default();
    }

    /// Was it no NAR, so that nobody knows where it ends?
    pub const fn has_failed(&self) -> bool {
        self.failed
    }

    pub fn skip(&mut self) -> io::Result<()> {
        self.copy_to(&mut io::sink())
    }

    /// Writes what is left of it, in pieces as they come, without a buffer in between.
    pub fn copy_to(&mut self, out: &mut dyn Write) -> io::Result<()> {
        loop {
            let bytes = self.fill_buf()?;
            if bytes.is_empty() {
                return Ok(());
            }
            out.write_all(bytes)?;
            let taken = bytes.len();
            self.consume(taken);
        }
    }
}

impl<R: BufRead> Read for BareNar<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let bytes = self.fill_buf()?;
        let n = bytes.len().min(into.len());
        into.split_at_mut(n).0.copy_from_slice(bytes.split_at(n).0);
        self.consume(n);
        Ok(n)
    }
}

impl<R: BufRead> BufRead for BareNar<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.parsed == 0 && !self.parser.is_done() {
            if self.failed {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let bytes = self.input.fill_buf().inspect_err(|_| self.failed = true)?;
            if bytes.is_empty() {
                self.failed = true;
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let before = self.parser.consumed();
            let mut rest = bytes;
            loop {
                match self.parser.next(&mut rest) {
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(error) => {
                        self.failed = true;
                        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
                    }
                }
            }
            self.parsed = usize::try_from(self.parser.consumed() - before).unwrap_or(usize::MAX);
        }
        if self.parsed == 0 {
            return Ok(&[]);
        }
        let bytes = self.input.fill_buf()?;
        Ok(bytes.get(..self.parsed.min(bytes.len())).unwrap_or_default())
    }

    fn consume(&mut self, n: usize) {
        self.parsed -= n;
        self.input.consume(n);
    }
}

/// Writes frames; [`FramedWriter::finish`] writes the last, empty one.
///
/// Each goes out in one write, its length and its bytes.
pub struct FramedWriter<'a> {
    out: &'a mut dyn Write,
    /// Room for a length, and bytes of the next frame behind it.
    buffer: Vec<u8>,
    /// How much of that there is, the length included.
    used: usize,
}

/// Size of the frames that are written, in bytes.
const FRAME: usize = 64 << 10;

/// Size of their length.
const HEAD: usize = 8;

impl<'a> FramedWriter<'a> {
    pub fn new(out: &'a mut dyn Write) -> Self {
        Self { out, buffer: vec![0; HEAD + FRAME], used: HEAD }
    }

    /// Where more of the frame goes.
    fn room(&mut self) -> &mut [u8] {
        self.buffer.get_mut(self.used..).unwrap_or_default()
    }

    /// So many bytes have been put there.
    fn filled(&mut self, n: usize) -> io::Result<()> {
        self.used += n;
        if self.used == self.buffer.len() { self.frame() } else { Ok(()) }
    }

    fn frame(&mut self) -> io::Result<()> {
        let used = std::mem::replace(&mut self.used, HEAD);
        if used == HEAD {
            return Ok(());
        }
        if let Some(head) = self.buffer.first_chunk_mut::<HEAD>() {
            *head = ((used - HEAD) as u64).to_le_bytes();
        }
        self.out.write_all(self.buffer.get(..used).unwrap_or_default())
    }

    /// Reads a source to its end, straight into frames.
    pub fn copy_from(&mut self, source: &mut dyn Read) -> io::Result<()> {
        loop {
            match source.read(self.room()) {
                Ok(0) => return Ok(()),
                Ok(n) => self.filled(n)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub fn finish(mut self) -> io::Result<()> {
        self.frame()?;
        self.out.write_all(&[0; 8])?;
        self.out.flush()
    }
}

impl Write for FramedWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = self.room();
        let n = bytes.len().min(room.len());
        room.split_at_mut(n).0.copy_from_slice(bytes.split_at(n).0);
        self.filled(n)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.frame()?;
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::BufReader;

    proptest! {
        /// What is framed is read back, and what follows it stays, however the reads are cut.
        #[test]
        fn frames_read_back(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..5),
            after in prop::collection::vec(any::<u8>(), 0..20),
            cut in 1usize..50,
            skipped in any::<bool>(),
            copied in any::<bool>(),
        ) {
            let mut wire = Vec::new();
            let mut writer = FramedWriter::new(&mut wire);
            for piece in &pieces {
                if copied {
                    writer.copy_from(&mut BufReader::with_capacity(cut, &piece[..])).unwrap();
                } else {
                    writer.write_all(piece).unwrap();
                }
                writer.flush().unwrap();
            }
            writer.finish().unwrap();
            wire.extend(&after);
            let mut input = BufReader::with_capacity(cut, &wire[..]);
            let mut framed = Framed::new(&mut input);
            if skipped {
                framed.skip().unwrap();
            } else {
                let mut read = Vec::new();
                framed.read_to_end(&mut read).unwrap();
                prop_assert_eq!(read, pieces.concat());
            }
            let mut rest = Vec::new();
            input.read_to_end(&mut rest).unwrap();
            prop_assert_eq!(rest, after);
        }

        /// A NAR ends where it ends.
        #[test]
        fn bare_nars_end(
            tree in larder_core::arb::nar::tree(),
            after in prop::collection::vec(any::<u8>(), 0..20),
            cut in 1usize..50,
            copied in any::<bool>(),
        ) {
            let nar = tree.to_nar();
            let wire = [&nar[..], &after].concat();
            let mut input = BufReader::with_capacity(cut, &wire[..]);
            let mut bare = BareNar::new(&mut input);
            let mut read = Vec::new();
            if copied {
                bare.copy_to(&mut read).unwrap();
            } else {
                bare.read_to_end(&mut read).unwrap();
            }
            prop_assert!(!bare.has_failed());
            prop_assert_eq!(read, nar);
            let mut rest = Vec::new();
            input.read_to_end(&mut rest).unwrap();
            prop_assert_eq!(rest, after);
        }
    }

    /// More than a frame is cut into whole frames and a rest.
    #[test]
    fn long_contents_fill_their_frames() {
        let contents: Vec<u8> = (0..FRAME + 5).map(|n| n.to_le_bytes()[0]).collect();
        let mut wire = Vec::new();
        let mut writer = FramedWriter::new(&mut wire);
        writer.copy_from(&mut BufReader::with_capacity(1000, &contents[..])).unwrap();
        writer.finish().unwrap();
        let length = |at: usize| u64::from_le_bytes(*wire[at..].first_chunk().unwrap());
        assert_eq!((length(0), length(HEAD + FRAME)), (FRAME as u64, 5));
        assert_eq!(wire.len(), HEAD + FRAME + HEAD + 5 + HEAD);
        let mut read = Vec::new();
        Framed::new(&mut &wire[..]).read_to_end(&mut read).unwrap();
        assert!(read == contents);
    }

    #[test]
    fn truncated_frames() {
        for (wire, kind) in [
            (&[][..], io::ErrorKind::UnexpectedEof),
            (&[5, 0, 0, 0, 0, 0, 0, 0, 1][..], io::ErrorKind::UnexpectedEof),
            (&[1, 0, 0, 0, 0, 0, 0, 0, 1][..], io::ErrorKind::UnexpectedEof),
            (&[0, 0, 0, 0, 0, 0, 0, 0x80][..], io::ErrorKind::InvalidData),
        ] {
            let mut input = wire;
            let mut read = Vec::new();
            assert_eq!(Framed::new(&mut input).read_to_end(&mut read).unwrap_err().kind(), kind);
        }
    }
}
