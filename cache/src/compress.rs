//! The ways in which archives are compressed.
//!
//! Source: protocols, section 5.1; `compression.json`.

use std::io::{self, BufReader, Read, Write};

/// Bytes that decoders read at once.
const BLOCK: usize = 64 << 10;

/// The largest window of zstd, as a power of two: 128 MiB, more than any level of `zstd` without
/// `--ultra --long` uses. What asks for more is refused before memory is taken.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// A way to compress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    None,
    Xz,
    Bzip2,
    Gzip,
    Zstd,
    Brotli,
    /// Of contents only, never of archives.
    Deflate,
}

impl Method {
    /// The method of a narinfo file or of a `compression` parameter.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "none" | "" => Self::None,
            "xz" => Self::Xz,
            "bzip2" => Self::Bzip2,
            "gzip" => Self::Gzip,
            "zstd" => Self::Zstd,
            "br" => Self::Brotli,
            _ => return None,
        })
    }

    /// The method of a header `Content-Encoding`.
    pub fn of_encoding(name: &str) -> Option<Self> {
        match name {
            "identity" => Some(Self::None),
            "x-gzip" => Some(Self::Gzip),
            "deflate" => Some(Self::Deflate),
            "none" => None,
            other => Self::parse(other),
        }
    }

    /// As narinfo files say it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Brotli => "br",
            Self::Deflate => "deflate",
        }
    }

    /// What the names of archives end with, after `.nar`.
    pub const fn extension(self) -> &'static str {
        match self {
            Self::None | Self::Deflate => "",
            Self::Xz => ".xz",
            Self::Bzip2 => ".bz2",
            Self::Gzip => ".gz",
            Self::Zstd => ".zst",
            Self::Brotli => ".br",
        }
    }

    /// What comes out of a stream. Broken or cut ones give errors as they are read.
    pub fn decoder<'a>(self, source: impl Read + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
        let buffered = |source| BufReader::with_capacity(BLOCK, source);
        Ok(match self {
            Self::None => Box::new(source),
            Self::Xz => Box::new(lzma_rust2::XzReader::new(buffered(source), true)),
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(buffered(source))),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(buffered(source))),
            Self::Deflate => Box::new(flate2::bufread::ZlibDecoder::new(buffered(source))),
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered(source))?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Box::new(decoder)
            }
            Self::Brotli => Box::new(brotli::Decompressor::new(source, BLOCK)),
        })
    }
}

/// How hard to try; `None` for what is usual.
pub type LevelChoice = Option<i32>;

/// Compresses what is written to it.
pub enum Encoder<W: Write> {
    None(W),
    Xz(Box<lzma_rust2::XzWriter<W>>),
    Bzip2(bzip2::write::BzEncoder<W>),
    Gzip(flate2::write::GzEncoder<W>),
    Deflate(flate2::write::ZlibEncoder<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
    Brotli(Box<brotli::CompressorWriter<Latch<W>>>),
}

impl<W: Write> std::fmt::Debug for Encoder<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

/// Keeps the first error, for an encoder that does not tell of its last one.
#[derive(Debug)]
pub struct Latch<W> {
    out: W,
    failed: Option<io::Error>,
}

impl<W: Write> Write for Latch<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write(bytes).inspect_err(|error| self.failed = Some(io::Error::from(error.kind())))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<W: Write> Encoder<W> {
    /// `threads` help where the method can use them, and it is no matter if they do not.
    pub fn new(method: Method, level: LevelChoice, threads: u32, out: W) -> io::Result<Self> {
        let small = |usual: u32| level.and_then(|level| u32::try_from(level).ok()).unwrap_or(usual);
        Ok(match method {
            Method::None => Self::None(out),
            Method::Xz => {
                let options = lzma_rust2::XzOptions::with_preset(small(6).min(9));
                Self::Xz(Box::new(lzma_rust2::XzWriter::new(out, options)?))
            }
            Method::Bzip2 => {
                Self::Bzip2(bzip2::write::BzEncoder::new(out, bzip2::Compression::new(small(9).clamp(1, 9))))
            }
            Method::Gzip => Self::Gzip(flate2::write::GzEncoder::new(out, flate2::Compression::new(small(6).min(9)))),
            Method::Deflate => {
                Self::Deflate(flate2::write::ZlibEncoder::new(out, flate2::Compression::new(small(6).min(9))))
            }
            Method::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, level.unwrap_or(3).clamp(-7, 19))?;
                if threads > 1 {
                    encoder.multithread(threads)?;
                }
                Self::Zstd(encoder)
            }
            Method::Brotli => {
                let latch = Latch { out, failed: None };
                Self::Brotli(Box::new(brotli::CompressorWriter::new(latch, BLOCK, small(5).min(11), 22)))
            }
        })
    }

    /// Writes what is left, and gives back where it all went.
    pub fn finish(self) -> io::Result<W> {
        match self {
            Self::None(out) => Ok(out),
            Self::Xz(encoder) => encoder.finish(),
            Self::Bzip2(encoder) => encoder.finish(),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Deflate(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
            Self::Brotli(encoder) => {
                let Latch { out, failed } = encoder.into_inner();
                failed.map_or(Ok(out), Err)
            }
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None(out) => out.write(bytes),
            Self::Xz(encoder) => encoder.write(bytes),
            Self::Bzip2(encoder) => encoder.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Deflate(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
            Self::Brotli(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::None(out) => out.flush(),
            Self::Xz(encoder) => encoder.flush(),
            Self::Bzip2(encoder) => encoder.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Deflate(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
            Self::Brotli(encoder) => encoder.flush(),
        }
    }
}

/// All of some bytes, compressed.
pub fn compress(method: Method, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = Encoder::new(method, None, 1, Vec::new())?;
    encoder.write_all(bytes)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Method; 7] =
        [Method::None, Method::Xz, Method::Bzip2, Method::Gzip, Method::Zstd, Method::Brotli, Method::Deflate];

    fn undone(method: Method, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        method.decoder(bytes)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn what_goes_in_comes_out() {
        let text = b"some text, some text, some text".repeat(3000);
        for method in ALL {
            // No archive is empty; `lzma-rust2` does not read what it writes of nothing.
            for bytes in [&text[..], b"", b"x"].into_iter().filter(|b| !b.is_empty() || method != Method::Xz) {
                let packed = compress(method, bytes).unwrap();
                assert_eq!(undone(method, &packed).unwrap(), bytes, "{method:?}");
            }
            let packed = compress(method, &text).unwrap();
            assert!(method == Method::None || packed.len() < text.len() / 10, "{method:?}");
            assert_eq!(Method::of_encoding(method.name()).is_some(), method != Method::None);
        }
    }

    #[test]
    fn cut_streams_are_errors_wherever_they_are_cut() {
        let text = b"some text, some text, some text, and some other text".repeat(4);
        for method in ALL.into_iter().filter(|method| *method != Method::None) {
            let packed = compress(method, &text).unwrap();
            for end in 1..packed.len() {
                match undone(method, &packed[..end]) {
                    Err(_) => {}
                    Ok(bytes) => {
                        assert!(bytes == text, "{method:?} cut at {end} of {} gives {}", packed.len(), bytes.len());
                    }
                }
            }
        }
    }

    #[test]
    fn other_bytes_are_errors() {
        for method in ALL.into_iter().filter(|method| *method != Method::None) {
            for junk in [&b"this is no such stream at all"[..], &[0xff; 100], &[0; 100]] {
                assert!(
                    undone(method, junk).is_err() || undone(method, junk).is_ok_and(|out| out.len() < 100),
                    "{method:?}"
                );
            }
        }
    }

    #[test]
    fn a_huge_window_is_refused() {
        // A frame of zstd that asks for a window of 2^31 bytes.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00];
        undone(Method::Zstd, &frame).unwrap_err();
    }
}
