//! As much of HTTP as a cache needs: heads, ranges, chunks.

use std::io::{self, Read, Write};

/// Bytes of the head of a request, at most.
const HEAD_MAX: usize = 16 << 10;

/// The type of texts for people.
pub(super) const TEXT: &str = "text/plain; charset=utf-8";

/// A request without its body.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is something that a head says or not")]
pub(super) struct Asked {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) authorization: Option<String>,
    pub(super) range: Option<String>,
    pub(super) takes_zstd: bool,
    pub(super) body_bytes: usize,
    /// The `Content-Encoding` of the body.
    pub(super) encoding: Option<String>,
    /// Does the client wait until it hears that the body is wanted?
    pub(super) waits: bool,
    pub(super) closes: bool,
    /// Does the client know chunks?
    pub(super) is_1_1: bool,
}

/// An answer that is small.
pub(super) struct Small {
    pub(super) status: u16,
    pub(super) kind: &'static str,
    pub(super) body: Vec<u8>,
}

impl Small {
    pub(super) fn text(status: u16, text: &str) -> Self {
        Self { status, kind: TEXT, body: format!("{text}\n").into_bytes() }
    }

    pub(super) fn ok(kind: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self { status: 200, kind, body: body.into() }
    }
}

pub(super) fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        206 => "Partial Content",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        507 => "Insufficient Storage",
        _ => "Internal Server Error",
    }
}

/// Lets through the beginning of what is written, and ends it with an error behind that.
pub(super) struct Window<'o> {
    pub(super) out: &'o mut dyn Write,
    pub(super) left: u64,
}

impl Write for Window<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left == 0 && !bytes.is_empty() {
            return Err(io::Error::other("the range has ended"));
        }
        let n = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        self.out.write_all(bytes.get(..n).unwrap_or_default())?;
        self.left -= n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Bytes of a chunk, and of the line in front of it.
const CHUNK: usize = 64 << 10;
const CHUNK_LINE: usize = "00010000\r\n".len();

/// Gathers what is written in the chunks of HTTP.
pub(super) struct Chunks<'o> {
    out: &'o mut dyn Write,
    /// Room for the line, and what is in the chunk so far.
    chunk: Vec<u8>,
}

impl<'o> Chunks<'o> {
    pub(super) fn new(out: &'o mut dyn Write) -> Self {
        let mut chunk = Vec::with_capacity(CHUNK_LINE + CHUNK + 2);
        chunk.resize(CHUNK_LINE, 0);
        Self { out, chunk }
    }

    fn send(&mut self) -> io::Result<()> {
        let length = self.chunk.len() - CHUNK_LINE;
        if length == 0 {
            return Ok(());
        }
        let mut line = self.chunk.get_mut(..CHUNK_LINE).unwrap_or_default();
        write!(line, "{length:08x}\r\n")?;
        self.chunk.extend_from_slice(b"\r\n");
        self.out.write_all(&self.chunk)?;
        self.chunk.truncate(CHUNK_LINE);
        Ok(())
    }

    pub(super) fn end(mut self) -> io::Result<()> {
        self.send()?;
        self.out.write_all(b"0\r\n\r\n")
    }
}

impl Write for Chunks<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = (CHUNK_LINE + CHUNK - self.chunk.len()).min(bytes.len());
        self.chunk.extend_from_slice(bytes.get(..n).unwrap_or_default());
        if self.chunk.len() == CHUNK_LINE + CHUNK {
            self.send()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()?;
        self.out.flush()
    }
}

/// The first byte and the one behind the last, of `bytes=A-B`, `bytes=A-` or `bytes=-N`. What is no
/// range of bytes, or several, is not heeded.
pub(super) fn parse_range(text: Option<&str>, size: u64) -> Result<Option<(u64, u64)>, ()> {
    let Some((from, to)) = text.and_then(|text| text.trim().strip_prefix("bytes=")?.split_once('-')) else {
        return Ok(None);
    };
    let range = match (from.parse::<u64>(), to.parse::<u64>()) {
        (Ok(from), Ok(last)) if from <= last => (from, last.saturating_add(1).min(size)),
        (Ok(from), Err(_)) if to.is_empty() => (from, size),
        (Err(_), Ok(many)) if from.is_empty() && many > 0 => (size.saturating_sub(many), size),
        _ => return Ok(None),
    };
    if range.0 < range.1 { Ok(Some(range)) } else { Err(()) }
}

pub(super) fn head_of(status: u16, kind: &str, closes: bool) -> String {
    let close = if closes { "Connection: close\r\n" } else { "" };
    format!("HTTP/1.1 {status} {}\r\nServer: larder\r\nContent-Type: {kind}\r\n{close}", reason(status))
}

pub(super) fn send_small(out: &mut dyn Write, small: &Small, with_body: bool, closes: bool) -> io::Result<()> {
    let mut head = head_of(small.status, small.kind, closes);
    if small.status != 200 {
        head.push_str("Cache-Control: no-store\r\n");
    }
    if small.status == 401 {
        head.push_str("WWW-Authenticate: Basic realm=\"larder\"\r\n");
    }
    add!(head, "Content-Length: {}\r\n\r\n", small.body.len());
    out.write_all(head.as_bytes())?;
    if with_body { out.write_all(&small.body) } else { Ok(()) }
}

pub(super) enum Head {
    Asked(Asked),
    End,
    /// To be answered with this status, and no more.
    Bad(u16),
}

/// Reads the head of a request; what follows stays in the buffer.
pub(super) fn read_head(input: &mut dyn Read, buffer: &mut Vec<u8>) -> io::Result<Head> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(buffer) {
            Ok(httparse::Status::Complete(length)) => {
                let asked = asked_of(&parsed);
                buffer.drain(..length);
                return Ok(asked.map_or(Head::Bad(400), Head::Asked));
            }
            Ok(httparse::Status::Partial) if buffer.len() < HEAD_MAX => {}
            Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => return Ok(Head::Bad(431)),
            Err(_) => return Ok(Head::Bad(400)),
        }
        let mut block = [0; 4096];
        match input.read(&mut block) {
            Ok(0) => return Ok(Head::End),
            Ok(n) => buffer.extend_from_slice(block.get(..n).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Nothing came for long, or the client has gone: no more to be said.
            Err(_) => return Ok(Head::End),
        }
    }
}

/// `None`: it is a request that is not understood.
fn asked_of(parsed: &httparse::Request<'_, '_>) -> Option<Asked> {
    let target = parsed.path?;
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let mut asked = Asked {
        method: parsed.method?.to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        is_1_1: parsed.version == Some(1),
        closes: parsed.version != Some(1),
        ..Asked::default()
    };
    for header in parsed.headers.iter() {
        let value = std::str::from_utf8(header.value).ok()?.trim();
        match header.name.to_ascii_lowercase().as_str() {
            "authorization" => asked.authorization = Some(value.to_owned()),
            "range" => asked.range = Some(value.to_owned()),
            "accept-encoding" => {
                asked.takes_zstd = value.split(',').any(|word| {
                    let (name, quality) = word.split_once(';').unwrap_or((word, ""));
                    name.trim() == "zstd" && !matches!(quality.trim(), "q=0" | "q=0.0")
                });
            }
            "content-length" => asked.body_bytes = value.parse().ok()?,
            "transfer-encoding" => return None,
            "content-encoding" => asked.encoding = Some(value.to_ascii_lowercase()),
            "expect" => asked.waits = value.eq_ignore_ascii_case("100-continue"),
            "connection" => {
                asked.closes |= value.split(',').any(|word| word.trim().eq_ignore_ascii_case("close"));
            }
            _ => {}
        }
    }
    Some(asked)
}

/// The body of a request as it comes: first what was read with the head.
pub(super) struct Body<'b> {
    pub(super) input: &'b mut dyn Read,
    pub(super) buffer: &'b mut Vec<u8>,
    pub(super) left: u64,
}

impl Read for Body<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        let buf = buf.get_mut(..most).unwrap_or_default();
        if buf.is_empty() {
            return Ok(0);
        }
        let n = if self.buffer.is_empty() {
            self.input.read(buf)?
        } else {
            let n = self.buffer.as_slice().read(buf)?;
            self.buffer.drain(..n);
            n
        };
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

pub(super) fn read_body(input: &mut dyn Read, buffer: &mut Vec<u8>, length: usize) -> io::Result<Vec<u8>> {
    let here = buffer.len().min(length);
    let mut body: Vec<u8> = buffer.drain(..here).collect();
    let left = length - here;
    if left > 0 {
        input.take(left as u64).read_to_end(&mut body)?;
        if body.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (text, expected) in [
            (None, Ok(None)),
            (Some("bytes=0-9"), Ok(Some((0, 10)))),
            (Some("bytes=5-"), Ok(Some((5, 100)))),
            (Some("bytes=90-200"), Ok(Some((90, 100)))),
            (Some("bytes=-7"), Ok(Some((93, 100)))),
            (Some("bytes=-700"), Ok(Some((0, 100)))),
            (Some("bytes=100-"), Err(())),
            (Some("bytes=9-5"), Ok(None)),
            (Some("bytes=1-2,4-5"), Ok(None)),
            (Some("lines=1-2"), Ok(None)),
            (Some("bytes=x-"), Ok(None)),
        ] {
            assert_eq!(parse_range(text, 100), expected, "{text:?}");
        }
    }

    #[test]
    fn chunks_and_windows() {
        let text: Vec<u8> = (0..=255).cycle().take(2 * CHUNK + 5).collect();
        for step in [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, text.len()] {
            let mut out = Vec::new();
            let mut chunks = Chunks::new(&mut out);
            text.chunks(step).for_each(|piece| chunks.write_all(piece).unwrap());
            chunks.end().unwrap();
            let mut expected = Vec::new();
            for chunk in text.chunks(CHUNK) {
                write!(expected, "{:08x}\r\n", chunk.len()).unwrap();
                expected.extend_from_slice(chunk);
                expected.extend_from_slice(b"\r\n");
            }
            expected.extend_from_slice(b"0\r\n\r\n");
            assert!(out == expected, "{step}");
        }
        let mut out = Vec::new();
        let mut window = Window { out: &mut out, left: 5 };
        window.write_all(b"abc").unwrap();
        window.write_all(b"def").unwrap_err();
        assert_eq!((window.left, &*out), (0, &b"abcde"[..]));
    }

    #[test]
    fn heads() {
        let read = |text: &str| read_head(&mut text.as_bytes(), &mut Vec::new()).unwrap();
        let Head::Asked(asked) =
            read("GET /x?hash=1 HTTP/1.1\r\nAccept-Encoding: br, zstd;q=0.5\r\nRange: bytes=1-\r\n\r\n")
        else {
            panic!("it is a request")
        };
        assert_eq!(
            (asked.path.as_str(), asked.query.as_str(), asked.takes_zstd, asked.closes),
            ("/x", "hash=1", true, false)
        );
        assert!(matches!(read("GET /x HTTP/1.0\r\n\r\n"), Head::Asked(asked) if asked.closes));
        assert!(matches!(read("nonsense\r\n\r\n"), Head::Bad(400)));
        assert!(matches!(read("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), Head::Bad(400)));
        assert!(matches!(read("POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), Head::Bad(400)));
        assert!(matches!(read(&format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(HEAD_MAX))), Head::Bad(431)));
        assert!(matches!(read(""), Head::End));
        assert!(matches!(read("GET / HTTP/1.1\r\n"), Head::End));
    }
}
