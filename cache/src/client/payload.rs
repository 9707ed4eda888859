//! What is sent along with a request, as often as it takes.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use ureq::http::header::{self, HeaderName};

/// Bytes that are sent.
#[derive(Debug, Clone)]
pub enum Contents {
    Bytes(Arc<[u8]>),
    /// A part of a file, which nobody changes meanwhile: where it begins, and how many bytes it has.
    File {
        file: Arc<File>,
        from: u64,
        size_bytes: u64,
    },
}

/// What is sent, and what is said of it.
#[derive(Debug, Clone)]
pub struct Payload {
    pub contents: Contents,
    /// Its `Content-Type`.
    pub kind: &'static str,
    /// Its `Content-Encoding`.
    pub encoding: Option<&'static str>,
}

impl Payload {
    pub fn bytes(kind: &'static str, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { contents: Contents::Bytes(bytes.into()), kind, encoding: None }
    }

    /// A whole file.
    pub fn file(kind: &'static str, file: Arc<File>, size_bytes: u64) -> Self {
        Self { contents: Contents::File { file, from: 0, size_bytes }, kind, encoding: None }
    }

    pub fn size_bytes(&self) -> u64 {
        match &self.contents {
            Contents::Bytes(bytes) => bytes.len() as u64,
            Contents::File { size_bytes, .. } => *size_bytes,
        }
    }

    pub(super) fn headers(&self) -> impl Iterator<Item = (HeaderName, String)> {
        [
            Some((header::CONTENT_TYPE, self.kind.to_owned())),
            self.encoding.map(|encoding| (header::CONTENT_ENCODING, encoding.to_owned())),
            Some((header::CONTENT_LENGTH, self.size_bytes().to_string())),
        ]
        .into_iter()
        .flatten()
    }

    /// All of it, from the beginning.
    pub fn reader(&self) -> PayloadReader<'_> {
        PayloadReader { contents: &self.contents, at: 0, size_bytes: self.size_bytes() }
    }
}

/// Reads a payload, and leaves the position of its file alone.
#[derive(Debug)]
pub struct PayloadReader<'a> {
    contents: &'a Contents,
    at: u64,
    size_bytes: u64,
}

impl Read for PayloadReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.size_bytes - self.at).unwrap_or(usize::MAX).min(buf.len());
        let buf = buf.get_mut(..most).unwrap_or_default();
        if buf.is_empty() {
            return Ok(0);
        }
        let n = match self.contents {
            Contents::Bytes(bytes) => {
                let from = usize::try_from(self.at).unwrap_or(usize::MAX);
                bytes.get(from..).unwrap_or_default().read(buf)?
            }
            Contents::File { file, from, .. } => match file.read_at(buf, from + self.at)? {
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter")),
                n => n,
            },
        };
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_read_again_and_again() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"0123456789").unwrap();
        let file = Arc::new(file);
        let part = Contents::File { file: Arc::clone(&file), from: 3, size_bytes: 4 };
        let part = Payload { contents: part, kind: "x", encoding: None };
        let bytes = Payload::bytes("x", *b"3456");
        for payload in [&part, &bytes, &part] {
            let mut text = String::new();
            payload.reader().read_to_string(&mut text).unwrap();
            assert_eq!((text.as_str(), payload.size_bytes()), ("3456", 4));
        }
        file.set_len(5).unwrap();
        let error = part.reader().read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
