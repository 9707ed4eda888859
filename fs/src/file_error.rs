//! An I/O error together with what was attempted on which file.

use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// What was attempted, on what, and what the system said.
///
/// The text is `getting status of '/a/b'`; the reason is the source. Control characters of the
/// path are escaped, bytes that are not UTF-8 are replaced.
#[derive(Debug, thiserror::Error)]
#[error("{doing} '{}'", shown(path))]
pub struct FileError {
    pub doing: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

impl FileError {
    pub fn new(doing: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self { doing, path: path.into(), source: source.into() }
    }

    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// Names the file in an I/O error.
pub trait At<T> {
    fn at(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, doing: &'static str, path: impl AsRef<Path>) -> Result<T, FileError> {
        self.map_err(|source| FileError::new(doing, path.as_ref(), source))
    }
}

/// A path for display: lossy, control characters escaped.
pub fn shown(path: &Path) -> impl fmt::Display + '_ {
    fmt::from_fn(move |f| {
        for c in String::from_utf8_lossy(path.as_os_str().as_bytes()).chars() {
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { fmt::Write::write_char(f, c)? }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn shows_what_was_tried() {
        let path = Path::new(OsStr::from_bytes(b"/a\n\x1b[31m/\xff"));
        let e = Err::<(), _>(rustix::io::Errno::NOENT).at("getting status of", path).unwrap_err();
        assert_eq!(e.to_string(), "getting status of '/a\\n\\u{1b}[31m/\u{fffd}'");
        assert_eq!(e.kind(), io::ErrorKind::NotFound);
    }
}
