//! Build logs: written while a builder runs, found again later.
//!
//! `<log dir>/drvs/XX/REST[.bz2]`, XX being the first two characters of the derivation's base
//! name. The bytes are stored as they came; filtering is for whoever shows them.
//! Source: building, section 10.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bzip2::Compression;
use bzip2::read::MultiBzDecoder;
use bzip2::write::BzEncoder;
use larder_core::store_path::StorePath;
use larder_fs::file_error::{At as _, FileError};
use larder_fs::layout::{Layout, make_dirs};

/// How a log that is being written lies on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Plain,
    /// bzip2 (setting `compress-build-log`).
    Compressed,
}

enum Sink {
    Plain(BufWriter<File>),
    /// A log that is short as yet. To compress in large blocks costs megabytes of memory and
    /// their clearing, which is more than most builds cost otherwise.
    Short(File, Vec<u8>),
    Compressed(BzEncoder<File>),
}

/// A log is short up to here, in bytes; less than the smallest block of bzip2 holds.
const SHORT_BYTES: usize = 64 << 10;

/// The stream of bzip2 that says nothing.
const NOTHING: &[u8] = b"BZh9\x17rE8P\x90\0\0\0\0";

/// The log of a build that goes on.
pub struct LogWriter {
    path: PathBuf,
    sink: Sink,
}

impl std::fmt::Debug for LogWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogWriter").field("path", &self.path).finish_non_exhaustive()
    }
}

/// `drvs/XX/REST`, without what compression adds.
fn log_path(layout: &Layout, drv: &StorePath) -> PathBuf {
    let base = drv.to_string();
    // Base names begin with 32 ASCII characters.
    let (front, rest) = base.split_at(2);
    layout.drv_logs().join(front).join(rest)
}

fn with_suffix(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".bz2");
    name.into()
}

impl LogWriter {
    /// Begins the log of a derivation, in place of the one there was.
    pub fn create(layout: &Layout, drv: &StorePath, form: Form) -> Result<Self, FileError> {
        let plain = log_path(layout, drv);
        if let Some(dir) = plain.parent() {
            make_dirs(dir)?;
        }
        let compressed = with_suffix(&plain);
        let (path, other) = match form {
            Form::Plain => (plain, compressed),
            Form::Compressed => (compressed, plain),
        };
        // A log in the other form is of an older build, and would be found before this one.
        match std::fs::remove_file(&other) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(FileError::new("deleting", other, e)),
            _ => {}
        }
        let file = File::create(&path).at("creating log file", &path)?;
        let sink = match form {
            Form::Plain => Sink::Plain(BufWriter::new(file)),
            Form::Compressed => Sink::Short(file, Vec::new()),
        };
        Ok(Self { path, sink })
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.put(bytes).at("writing to log file", &self.path)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.sink {
            // Whoever follows the file sees lines as they come.
            Sink::Plain(file) => file.write_all(bytes).and_then(|()| file.flush()),
            Sink::Short(_, text) if text.len() + bytes.len() <= SHORT_BYTES => {
                text.extend_from_slice(bytes);
                Ok(())
            }
            Sink::Short(file, text) => {
                let mut encoder = BzEncoder::new(file.try_clone()?, Compression::best());
                encoder.write_all(text)?;
                encoder.write_all(bytes)?;
                self.sink = Sink::Compressed(encoder);
                Ok(())
            }
            Sink::Compressed(encoder) => encoder.write_all(bytes),
        }
    }

    /// Brings all of it to the file; without that its end is missing.
    pub fn finish(self) -> Result<(), FileError> {
        match self.sink {
            Sink::Plain(mut file) => file.flush(),
            Sink::Short(mut file, text) if text.is_empty() => file.write_all(NOTHING),
            Sink::Short(file, text) => {
                let mut encoder = BzEncoder::new(file, Compression::fast());
                encoder.write_all(&text).and_then(|()| encoder.finish()).map(drop)
            }
            Sink::Compressed(encoder) => encoder.finish().map(drop),
        }
        .at("writing to log file", &self.path)
    }
}

/// Keeps the log of a build that was done elsewhere, whole or not at all. A log that is there
/// already stays.
///
/// Errors: the source fails, or the log directory cannot be written to.
pub fn keep(layout: &Layout, drv: &StorePath, form: Form, source: &mut dyn Read) -> Result<(), FileError> {
    let plain = log_path(layout, drv);
    let path = match form {
        Form::Plain => plain,
        Form::Compressed => with_suffix(&plain),
    };
    if open(layout, drv)?.is_some() {
        return io::copy(source, &mut io::sink()).map(drop).at("reading the log for", &path);
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    make_dirs(dir)?;
    let name = format!(".{}.{}-", drv.hash_part(), std::process::id());
    let (temporary, file) = unused(dir, &name)?;
    let mut kept = || {
        match form {
            Form::Plain => {
                let mut file = &file;
                io::copy(source, &mut file)?;
            }
            Form::Compressed => {
                let mut encoder = BzEncoder::new(&file, Compression::best());
                io::copy(source, &mut encoder)?;
                encoder.finish()?;
            }
        }
        std::fs::rename(&temporary, &path)
    };
    let kept = kept();
    if kept.is_err() {
        // It is the first error that counts.
        let _ = std::fs::remove_file(&temporary);
    }
    kept.at("writing to log file", &path)
}

/// A file with a name that begins so, and that nobody has.
fn unused(dir: &Path, prefix: &str) -> Result<(PathBuf, File), FileError> {
    for number in 0u64.. {
        let path = dir.join(format!("{prefix}{number}"));
        match File::options().write(true).create_new(true).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.at("creating log file", &path).map(|file| (path.clone(), file)),
        }
    }
    unreachable!("there are more numbers than files in any directory")
}

/// A log that was found.
pub struct LogReader {
    pub path: PathBuf,
    source: Box<dyn Read + Send>,
}

impl std::fmt::Debug for LogReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogReader").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Read for LogReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.source.read(buffer)
    }
}

/// The log of a derivation: in its directory, or else in the flat layout of before 1.0.
/// `None` if there is none.
pub fn open(layout: &Layout, drv: &StorePath) -> Result<Option<LogReader>, FileError> {
    let flat = layout.drv_logs().join(drv.to_string());
    for plain in [log_path(layout, drv), flat] {
        let compressed = with_suffix(&plain);
        for (path, form) in [(plain, Form::Plain), (compressed, Form::Compressed)] {
            match File::open(&path) {
                Ok(file) => {
                    let source: Box<dyn Read + Send> = match form {
                        Form::Plain => Box::new(file),
                        Form::Compressed => Box::new(MultiBzDecoder::new(BufReader::new(file))),
                    };
                    return Ok(Some(LogReader { path, source }));
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(FileError::new("opening log file", path, e)),
            }
        }
    }
    Ok(None)
}

/// Bytes of a line that are kept for a message about a failure.
const MAX_LINE_BYTES: usize = 4096;

/// The last lines of a log that goes by.
#[derive(Debug)]
pub struct Tail {
    most: usize,
    lines: VecDeque<Vec<u8>>,
    /// The line that has not ended yet.
    pending: Vec<u8>,
}

impl Tail {
    pub fn new(lines: u64) -> Self {
        Self { most: usize::try_from(lines).unwrap_or(usize::MAX), lines: VecDeque::new(), pending: Vec::new() }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            // As on a screen, what follows a carriage return is what stays to be seen.
            let text = match text.strip_suffix(b"\r").unwrap_or(text).rsplit(|b| *b == b'\r').next() {
                Some(after) if text.contains(&b'\r') && !after.is_empty() => {
                    self.pending.clear();
                    after
                }
                _ => text,
            };
            let room = MAX_LINE_BYTES.saturating_sub(self.pending.len());
            self.pending.extend_from_slice(text.get(..text.len().min(room)).unwrap_or_default());
            if ended {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        let line = std::mem::take(&mut self.pending);
        if self.most == 0 {
            return;
        }
        if self.lines.len() == self.most {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The lines as text, without control sequences and what is not UTF-8.
    pub fn finish(mut self) -> Vec<String> {
        if !self.pending.is_empty() {
            self.end_line();
        }
        self.lines.iter().map(|line| plain(line)).collect()
    }
}

/// A line without escape sequences and control characters.
fn plain(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' => match chars.next() {
                Some('[') => while chars.next_if(|c| !('\u{40}'..='\u{7e}').contains(c)).is_some() {},
                _ => continue,
            },
            '\t' => {
                out.push('\t');
                continue;
            }
            c if c.is_control() => continue,
            c => {
                out.push(c);
                continue;
            }
        }
        // The final byte of the sequence.
        chars.next();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::store_dir::StoreDir;

    fn place() -> (tempfile::TempDir, Layout, StorePath) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::rooted(StoreDir::new("/nix/store").unwrap(), dir.path());
        (dir, layout, "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().unwrap())
    }

    fn read(layout: &Layout, drv: &StorePath) -> Option<Vec<u8>> {
        let mut text = Vec::new();
        open(layout, drv).unwrap()?.read_to_end(&mut text).unwrap();
        Some(text)
    }

    #[test]
    fn s006_s066_bytes_and_places() {
        let (_dir, layout, drv) = place();
        assert_eq!(read(&layout, &drv), None);
        let text = b"\x1b[3pX \x1b[31mY\xff\0\r\n";
        for form in [Form::Compressed, Form::Plain, Form::Compressed] {
            let mut log = LogWriter::create(&layout, &drv, form).unwrap();
            log.write(text).unwrap();
            log.write(text).unwrap();
            log.finish().unwrap();
            assert_eq!(read(&layout, &drv).unwrap(), [&text[..], text].concat());
            let suffix = if form == Form::Plain { "" } else { ".bz2" };
            let name = format!("0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv{suffix}");
            let path = layout.drv_logs().join("0c").join(name);
            assert!(path.exists());
            // The flat layout is looked at last.
            let flat = layout.drv_logs().join(format!("{drv}{suffix}"));
            std::fs::rename(&path, &flat).unwrap();
            assert_eq!(read(&layout, &drv).unwrap(), [&text[..], text].concat());
            std::fs::remove_file(flat).unwrap();
        }
    }

    /// Short logs and long ones are written in different ways.
    #[test]
    fn lengths() {
        let (_dir, layout, drv) = place();
        for length in [0, 1, SHORT_BYTES - 1, SHORT_BYTES, SHORT_BYTES + 1, 3 * SHORT_BYTES, 2_000_000] {
            let text: Vec<u8> = (0..=250).cycle().take(length).collect();
            let mut log = LogWriter::create(&layout, &drv, Form::Compressed).unwrap();
            text.chunks(1000).for_each(|piece| log.write(piece).unwrap());
            log.finish().unwrap();
            assert!(read(&layout, &drv).unwrap() == text, "{length}");
        }
    }

    #[test]
    fn the_last_lines() {
        let tail = |lines, text: &[u8]| {
            let mut tail = Tail::new(lines);
            text.chunks(3).for_each(|piece| tail.push(piece));
            tail.finish()
        };
        assert_eq!(tail(2, b"a\nb\nc\n"), ["b", "c"]);
        assert_eq!(tail(2, b"a\nb\nc"), ["b", "c"]);
        assert_eq!(tail(0, b"a\n"), [""; 0]);
        assert_eq!(tail(9, b"x\x1b[1;31mred\x1b[0m\x07\ty\r\n\xff\n"), ["xred\ty", "\u{fffd}"]);
        assert_eq!(tail(9, &b"a".repeat(100_000))[0].len(), MAX_LINE_BYTES);
    }
}
