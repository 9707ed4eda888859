//! Compressed streams, told apart by how they begin, and archives in them.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek as _};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, symlink};
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

/// How an archive of `zip` begins: with a file, or with its end where there is none.
const ZIP: [&[u8]; 2] = [b"PK\x03\x04", b"PK\x05\x06"];

/// Bytes of the target of a symlink in an archive, at most.
const TARGET_MAX: u64 = 4096;

/// Unpacks an archive into a directory that is there: one of `zip`, or one of `tar`, compressed or
/// not. Nothing is written outside of the directory.
pub fn unpack(mut archive: File, out: &Path) -> io::Result<()> {
    let mut start = Vec::new();
    (&mut archive).take(4).read_to_end(&mut start)?;
    archive.rewind()?;
    if ZIP.contains(&start.as_slice()) { unzip(archive, out) } else { untar(archive, out) }
}

/// Files first, and then the symlinks: nothing is written by way of one that came along.
fn unzip(archive: File, out: &Path) -> io::Result<()> {
    let mut archive = zip::ZipArchive::new(BufReader::new(archive))?;
    let mut links = Vec::new();
    for number in 0..archive.len() {
        let mut entry = archive.by_index(number)?;
        let Some(name) = entry.enclosed_name() else {
            let name = String::from_utf8_lossy(entry.name_raw());
            return Err(io::Error::other(format!("'{name}' would lie outside of the archive")));
        };
        let path = out.join(name);
        if entry.is_dir() {
            std::fs::create_dir_all(path)?;
            continue;
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        if entry.is_symlink() {
            let mut target = Vec::new();
            entry.take(TARGET_MAX).read_to_end(&mut target)?;
            links.push((target, path));
            continue;
        }
        let is_executable = entry.unix_mode().is_some_and(|mode| mode & 0o100 != 0);
        let mode = if is_executable { 0o755 } else { 0o644 };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        io::copy(&mut entry, &mut file)?;
    }
    for (target, path) in links {
        symlink(std::ffi::OsString::from_vec(target), path)?;
    }
    Ok(())
}

fn untar(source: impl Read + Send, out: &Path) -> io::Result<()> {
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

    /// Puts something into an archive.
    type Fill<'a> = &'a dyn Fn(&mut zip::ZipWriter<File>);

    #[test]
    fn zip_archives_stay_where_they_are() {
        use zip::write::SimpleFileOptions;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.zip");
        let packed = |fill: &dyn Fn(&mut zip::ZipWriter<File>)| {
            let mut writer = zip::ZipWriter::new(File::create(&file).unwrap());
            fill(&mut writer);
            writer.finish().unwrap();
            let out = dir.path().join("out/in");
            let _ = std::fs::remove_dir_all(dir.path().join("out"));
            std::fs::create_dir_all(&out).unwrap();
            unpack(File::open(&file).unwrap(), &out).map(|()| out)
        };
        let plain = SimpleFileOptions::default();
        let out = packed(&|zip| {
            zip.add_directory("top/empty", plain).unwrap();
            zip.start_file("top/x", plain.unix_permissions(0o755)).unwrap();
            zip.write_all(b"#!").unwrap();
            zip.add_symlink("top/link", "x", plain).unwrap();
        });
        let top = out.unwrap().join("top");
        assert_eq!(std::fs::read(top.join("link")).unwrap(), b"#!");
        let mode =
            |name: &str| std::os::unix::fs::PermissionsExt::mode(&top.join(name).metadata().unwrap().permissions());
        assert!(mode("x") & 0o100 != 0 && top.join("empty").is_dir());
        // Upwards, through a symlink, twice the same; and what is none.
        let bad: [Fill<'_>; 2] = [&|zip| zip.start_file("../x", plain).unwrap(), &|zip| {
            zip.add_symlink("link", "..", plain).unwrap();
            zip.start_file("link/x", plain).unwrap();
        }];
        for fill in bad {
            packed(fill).unwrap_err();
            assert!(!dir.path().join("out/x").exists());
        }
        std::fs::write(&file, b"PK\x03\x04junk").unwrap();
        unpack(File::open(&file).unwrap(), dir.path()).unwrap_err();
    }
}
