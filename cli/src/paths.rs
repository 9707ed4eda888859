//! How a path argument is taken. Source: cli, section 4.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use larder_core::store_dir::{StoreDir, canonicalise};
use larder_core::store_path::{StorePath, StorePathError};
use larder_fs::file_error::FileError;

use crate::args::shown;

/// More links than this in a row lead nowhere.
const MAX_LINKS: usize = 64;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PathArgumentError {
    #[error(transparent)]
    StorePath(#[from] StorePathError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("path '{path}' is not in the Nix store")]
    NotInStore { path: String },
    #[error("too many symbolic links from '{path}'")]
    TooManyLinks { path: String },
}

/// The store path an argument stands for: itself, what contains it, or what it is a link to.
///
/// A relative argument is taken from the working directory. Only the last component is followed
/// if it is a symlink. Whether the path is valid is not asked.
pub fn store_path(dir: &StoreDir, argument: &OsStr) -> Result<StorePath, PathArgumentError> {
    let bytes = argument.as_bytes();
    // The usual case: exactly a path of the store, with nothing to clean up.
    if let Some(base) = dir.below(bytes)
        && !base.is_empty()
        && !base.contains(&b'/')
        && !base.starts_with(b".")
    {
        return Ok(StorePath::from_base_name(base)?);
    }
    let outside = |path: &[u8]| PathArgumentError::NotInStore { path: shown(OsStr::from_bytes(path)) };
    let mut path = absolute(argument)?;
    for _ in 0..MAX_LINKS {
        if dir.below(&path).is_some() {
            return Ok(dir.parse_inside(&path)?.0);
        }
        // Not a link, or not there: then it is a path outside of the store.
        let Ok(target) = std::fs::read_link(OsStr::from_bytes(&path)) else { return Err(outside(&path)) };
        let parent = Path::new(OsStr::from_bytes(&path)).parent().unwrap_or(Path::new("/"));
        let joined = parent.join(target).into_os_string().into_vec();
        path = canonicalise(&joined).ok_or_else(|| outside(&joined))?;
    }
    Err(PathArgumentError::TooManyLinks { path: shown(argument) })
}

/// An argument as an absolute path without `.`, `..` and double slashes.
pub fn absolute(argument: &OsStr) -> Result<Vec<u8>, PathArgumentError> {
    if let Some(clean) = canonicalise(argument.as_bytes()) {
        return Ok(clean);
    }
    let here = std::env::current_dir().map_err(|e| FileError::new("getting the working directory", "", e))?;
    let mut joined = here.into_os_string().into_vec();
    joined.push(b'/');
    joined.extend_from_slice(argument.as_bytes());
    canonicalise(&joined).ok_or_else(|| PathArgumentError::NotInStore { path: shown(argument) })
}

/// The store paths of many arguments.
pub fn store_paths(dir: &StoreDir, arguments: &[OsString]) -> Result<Vec<StorePath>, PathArgumentError> {
    arguments.iter().map(|argument| store_path(dir, argument)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_an_argument_stands_for() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let store = root.join("store");
        let base = format!("{}-x", "0".repeat(32));
        std::fs::create_dir_all(store.join(&base).join("bin")).unwrap();
        symlink(store.join(&base), root.join("direct")).unwrap();
        symlink("direct", root.join("twice")).unwrap();
        symlink("twice", root.join("thrice")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let dir = StoreDir::new(store.to_str().unwrap()).unwrap();
        let of = |text: String| store_path(&dir, OsStr::new(&text)).map(|path| path.to_string());
        let at = |inner: &str| format!("{}/{inner}", root.display());
        for good in [
            format!("store/{base}"),
            format!("store/{base}/"),
            format!("store/{base}/bin/x"),
            format!("./store//x/../{base}"),
            "direct".into(),
            "twice".into(),
            "thrice".into(),
        ] {
            assert_eq!(of(at(&good)).unwrap(), base, "{good}");
        }
        for bad in ["", "store", "loop", "missing", "direct/bin/none", "store/abc", "store/.links"] {
            let error = of(at(bad)).unwrap_err();
            assert!(!error.to_string().is_empty(), "{bad}");
        }
        assert!(of(at("missing")).unwrap_err().to_string().ends_with("is not in the Nix store"));
        assert!(of(at("store/abc")).unwrap_err().to_string().contains("'abc' is too short to be a valid store path"));
    }
}
