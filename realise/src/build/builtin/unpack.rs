//! Compressed streams, told apart by how they begin, and archives in them.

use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use larder_cache::compress::Method;

/// Longest beginning that tells a format.
const MAGIC_BYTES: usize = 6;

/// What a stream says, uncompressed if it is compressed in a way that we know.
pub fn uncompressed<'a>(source: impl Read + Send + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut source = BufReader::with_capacity(64 << 10, source);
    let mut start = Vec::new();
    while start.len() < MAGIC_BYTES {
        // The buffer is longer than what is looked for, so this ends at the first block as a rule.
        let block = source.fill_buf()?;
        if block.is_empty() {
            break;
        }
        let n = block.len().min(MAGIC_BYTES - start.len());
        start.extend_from_slice(block.get(..n).unwrap_or_default());
        source.consume(n);
    }
    let whole = io::Cursor::new(start.clone()).chain(source);
    Ok(match start.as_slice() {
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Box::new(lzma_rust2::XzReader::new(whole, true)),
        [0x1f, 0x8b, ..] => Box::new(flate2::read::MultiGzDecoder::new(whole)),
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::read::MultiBzDecoder::new(whole)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Method::Zstd.decoder(whole)?,
        _ => Box::new(whole),
    })
}

/// Unpacks an archive of `tar`, compressed or not, into a directory that is there. Nothing is
/// written outside of it.
pub fn untar(source: impl Read + Send, out: &Path) -> io::Result<()> {
    let mut archive = tar::Archive::new(uncompressed(source)?);
    archive.set_preserve_permissions(false);
    archive.set_preserve_mtime(false);
    archive.unpack(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn formats_are_told_apart() {
        let text = b"some text, some text, some text".repeat(1000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip2.write_all(&text).unwrap();
        for packed in [text.clone(), gzip.finish().unwrap(), bzip2.finish().unwrap()] {
            let mut found = Vec::new();
            uncompressed(packed.as_slice()).unwrap().read_to_end(&mut found).unwrap();
            assert!(found == text);
        }
        for short in [&b""[..], b"x", b"BZ"] {
            let mut found = Vec::new();
            uncompressed(short).unwrap().read_to_end(&mut found).unwrap();
            assert_eq!(found, short);
        }
    }
}
