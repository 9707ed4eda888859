//! `larder links`: the commands of Nix as links to this binary.

use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::applets::APPLETS;

/// Why a link was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum LinkError {
    #[error("cannot tell where the binary of Larder is")]
    Binary(#[source] io::Error),
    #[error("cannot make the directory '{}'", path.display())]
    Dir { path: PathBuf, source: io::Error },
    #[error("'{}' is there already and is not a link to Larder; --force replaces it", path.display())]
    Taken { path: PathBuf },
    #[error("cannot make the link '{}'", path.display())]
    Link { path: PathBuf, source: io::Error },
}

/// Makes a link for each applet; gives the links and what they point to.
///
/// Nothing is made if a name is taken by something else, unless `force` is given: that is replaced,
/// without a moment in which there is nothing by the name.
pub(super) fn make(dir: &Path, force: bool) -> Result<Vec<(PathBuf, PathBuf)>, LinkError> {
    let binary = std::env::current_exe().map_err(LinkError::Binary)?;
    std::fs::create_dir_all(dir).map_err(|source| LinkError::Dir { path: dir.to_owned(), source })?;
    let links: Vec<PathBuf> = APPLETS.iter().map(|applet| dir.join(applet.name)).collect();
    if !force {
        for path in &links {
            if path.symlink_metadata().is_ok() && !points_to(path, &binary) {
                return Err(LinkError::Taken { path: path.clone() });
            }
        }
    }
    for path in &links {
        if !points_to(path, &binary) {
            replace(path, &binary).map_err(|source| LinkError::Link { path: path.clone(), source })?;
        }
    }
    Ok(links.into_iter().map(|path| (path, binary.clone())).collect())
}

fn points_to(path: &Path, binary: &Path) -> bool {
    std::fs::read_link(path).is_ok_and(|target| target == binary)
}

fn replace(path: &Path, binary: &Path) -> io::Result<()> {
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    symlink(binary, &temporary)?;
    std::fs::rename(&temporary, path).inspect_err(|_| drop(std::fs::remove_file(&temporary)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_made_once_and_replace_nothing_unasked() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("a/bin");
        let made = make(&bin, false).unwrap();
        assert_eq!(made.len(), APPLETS.len());
        for (link, target) in &made {
            assert_eq!(&std::fs::read_link(link).unwrap(), target);
        }
        assert_eq!(make(&bin, false).unwrap(), made);
        std::fs::remove_file(bin.join("nix-hash")).unwrap();
        std::fs::remove_file(bin.join("nix-store")).unwrap();
        std::fs::write(bin.join("nix-hash"), "precious").unwrap();
        assert!(matches!(make(&bin, false), Err(LinkError::Taken { .. })));
        assert!(!bin.join("nix-store").exists(), "all or nothing");
        assert_eq!(make(&bin, true).unwrap(), made);
        assert_eq!(std::fs::read_dir(&bin).unwrap().count(), APPLETS.len());
    }
}
