//! A cache on a disk: reading its files, none of which may lie outside.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::CacheError;

/// A folder that is a cache.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
    uri: String,
}

/// Is it a relative path that does not lead upwards?
pub fn is_inside(name: &str) -> bool {
    let path = Path::new(name);
    !name.is_empty()
        && !name.contains("://")
        && !path.as_os_str().as_bytes().contains(&0)
        && path.components().all(|part| matches!(part, Component::Normal(_)))
}

impl Folder {
    /// `uri` is for messages.
    pub fn new(path: PathBuf, uri: String) -> Self {
        Self { path, uri }
    }

    /// As messages call it.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file and tells how long it is; `None` if there is none. Only regular files are read.
    pub fn open(&self, name: &str) -> Result<Option<(File, u64)>, CacheError> {
        if !is_inside(name) {
            return Err(CacheError::Outside { uri: self.uri.clone(), name: name.to_owned() });
        }
        let path = self.path.join(name);
        let failed = |doing, e: Errno| CacheError::File { doing, path: path.clone(), source: e.into() };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = match rustix::fs::openat(CWD, &path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            Err(e) => return Err(failed("opening file", e)),
        };
        let status = rustix::fs::fstat(&fd).map_err(|e| failed("getting status of", e))?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(CacheError::NotRegular { uri: self.uri.clone(), path });
        }
        Ok(Some((fd.into(), u64::try_from(status.st_size).unwrap_or_default())))
    }

    /// What an error of reading a file is.
    pub fn reading(&self, name: &str, source: io::Error) -> CacheError {
        CacheError::File { doing: "reading file", path: self.path.join(name), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_is_opened() {
        for (name, inside) in [
            ("nar/x.nar", true),
            ("x", true),
            ("../x", false),
            ("nar/../../x", false),
            ("/etc/passwd", false),
            ("", false),
            ("a\0b", false),
        ] {
            assert_eq!(is_inside(name), inside, "{name}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("cache")).unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        std::fs::write(dir.path().join("cache/file"), "1234").unwrap();
        let folder = Folder::new(dir.path().join("cache"), "file:///c".into());
        assert!(matches!(folder.open("../secret"), Err(CacheError::Outside { .. })));
        assert_eq!(folder.open("file").unwrap().unwrap().1, 4);
        assert!(folder.open("none").unwrap().is_none());
        assert!(folder.open("file/none").unwrap().is_none());
        rustix::fs::mknodat(CWD, dir.path().join("cache/pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert!(matches!(folder.open("pipe"), Err(CacheError::NotRegular { .. })));
    }
}
