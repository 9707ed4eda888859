//! Making roots.
//!
//! Source: gc, section 1, "Creating roots"; cli, section 5.1. Links are made under a temporary
//! name and renamed, so that a reader sees the old one or the new one. The path is a temporary
//! root before there is a link, and once more after it: a collector that was not there the first
//! time, and has read the links in between, hears of the path then.

use std::ffi::OsString;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use larder_core::hash::{Algorithm, Encoding, Hash};
use larder_core::report::{Level, Reporter};
use larder_core::store_dir::canonicalise;
use larder_core::store_path::StorePath;
use larder_fs::file_error::{At as _, FileError, shown};
use larder_fs::layout::{Layout, make_dirs};
use larder_fs::temp_roots::TempRoots;
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::roots::Root;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddRootError {
    #[error(
        "creating a garbage collector root ({}) in the Nix store is forbidden (are you running nix-build inside the store?)",
        shown(link)
    )]
    InStore { link: PathBuf },
    #[error("cannot create symlink '{}'; already exists", shown(link))]
    Exists { link: PathBuf },
    #[error("path '{}' is not a valid garbage collector root; it's not in the directory '{}'", shown(link), shown(dir))]
    NotInRoots { link: PathBuf, dir: PathBuf },
    #[error("'{}' is no absolute path for a garbage collector root", shown(link))]
    NotAbsolute { link: PathBuf },
    #[error(transparent)]
    File(#[from] FileError),
}

/// Makes `link` a root for `path`, and gives the link in the form it was made (`.` and `..` gone).
///
/// It becomes a symlink to the path, and `gcroots/auto` points to it. Directories on the way to
/// it are made. `path` is a temporary root from now on; the caller has made sure, or will, that
/// it is valid.
///
/// Errors: `link` is not absolute, is below the store, or is there and no symlink into the store.
pub fn add_permanent(
    layout: &Layout,
    temp_roots: &TempRoots,
    path: &StorePath,
    link: &Path,
) -> Result<PathBuf, AddRootError> {
    temp_roots.add(path)?;
    let link = make_link(layout, path, link)?;
    add_indirect(layout, &link)?;
    temp_roots.add(path)?;
    Ok(link)
}

/// Makes the link of [`add_permanent`] alone: whoever does so makes the path a temporary root
/// first, and the link known after.
pub fn make_link(layout: &Layout, path: &StorePath, link: &Path) -> Result<PathBuf, AddRootError> {
    let link = clean(link)?;
    if layout.store_dir.below(link.as_os_str().as_bytes()).is_some() || link.starts_with(&layout.real_store) {
        return Err(AddRootError::InStore { link });
    }
    if let Some(dir) = link.parent() {
        make_dirs(dir)?;
    }
    let target = layout.store_dir.full(path);
    put(&link, &|name| rustix::fs::symlink(&target, name), Some(layout))?;
    Ok(link)
}

/// Makes a symlink somewhere, which may or may not point into the store, known as a root:
/// `gcroots/auto/HASH` points to it, with the SHA-1 of its path in base 32.
pub fn add_indirect(layout: &Layout, link: &Path) -> Result<(), AddRootError> {
    let link = clean(link)?;
    let auto = auto_link(layout, &link);
    make_dirs(&layout.auto_roots())?;
    put(&auto, &|name| rustix::fs::symlink(&link, name), None)
}

/// Where the root at an absolute path is kept known.
pub fn auto_link(layout: &Layout, link: &Path) -> PathBuf {
    let hash = Hash::of(Algorithm::Sha1, link.as_os_str().as_bytes());
    layout.auto_roots().join(hash.encode(Encoding::Base32))
}

/// A root below `gcroots` itself, as Nix 1.8 makes them without `--indirect`: an empty file if
/// it has the base name of the path, else a symlink.
///
/// Errors: `link` is not below `gcroots`; it is there and neither a symlink into the store nor
/// (for a file) a regular file.
pub fn add_direct(
    layout: &Layout,
    temp_roots: &TempRoots,
    path: &StorePath,
    link: &Path,
) -> Result<PathBuf, AddRootError> {
    let link = clean(link)?;
    let dir = layout.gc_roots();
    if !link.starts_with(&dir) || link == dir {
        return Err(AddRootError::NotInRoots { link, dir });
    }
    temp_roots.add(path)?;
    if let Some(dir) = link.parent() {
        make_dirs(dir)?;
    }
    if link.file_name().is_some_and(|name| name.as_bytes() == path.to_string().as_bytes()) {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let create = |name: &Path| rustix::fs::openat(CWD, name, flags, Mode::from_raw_mode(0o644)).map(drop);
        let is_file = std::fs::symlink_metadata(&link).is_ok_and(|status| status.is_file());
        put(&link, &create, (!is_file).then_some(layout))?;
    } else {
        let target = layout.store_dir.full(path);
        put(&link, &|name| rustix::fs::symlink(&target, name), Some(layout))?;
    }
    temp_roots.add(path)?;
    Ok(link)
}

/// Warns if the collector would not find a new root (setting `gc-check-reachability`).
pub fn check_reachability(
    roots: &[Root],
    layout: &Layout,
    path: &StorePath,
    link: &Path,
    reporter: &dyn Reporter,
) -> bool {
    let found = roots.iter().any(|root| root.link == link && root.path == *path);
    if !found {
        let text = format_args!(
            "'{}' is not in a directory where the garbage collector looks for roots; therefore, '{}' might be removed by the garbage collector",
            shown(link),
            layout.store_dir.display(path)
        );
        reporter.message(Level::Warn, text);
    }
    found
}

fn clean(link: &Path) -> Result<PathBuf, AddRootError> {
    match canonicalise(link.as_os_str().as_bytes()) {
        Some(clean) => Ok(PathBuf::from(OsString::from_vec(clean))),
        None => Err(AddRootError::NotAbsolute { link: link.to_owned() }),
    }
}

/// Makes something under a temporary name and renames it to `link`. With a layout, only over
/// nothing or over a symlink into its store.
fn put(
    link: &Path,
    create: &dyn Fn(&Path) -> rustix::io::Result<()>,
    only_over_roots: Option<&Layout>,
) -> Result<(), AddRootError> {
    const DOING: &str = "creating symlink";
    let temporary = loop {
        let mut name = link.as_os_str().to_owned();
        let random = RandomState::new().build_hasher().finish() & 0x7fff_ffff;
        name.push(format!(".tmp-{}-{random}", std::process::id()));
        let name = PathBuf::from(name);
        match create(&name) {
            Ok(()) => break name,
            Err(Errno::EXIST) => {}
            Err(e) => {
                // What is in the way is a better reason than that nothing can be made there.
                if let Some(layout) = only_over_roots {
                    check_replaceable(link, layout)?;
                }
                return Err(FileError::new(DOING, link, e).into());
            }
        }
    };
    let renamed = rename(&temporary, link, only_over_roots);
    if renamed.is_err() {
        let _ = rustix::fs::unlink(&temporary);
    }
    renamed
}

fn rename(temporary: &Path, link: &Path, only_over_roots: Option<&Layout>) -> Result<(), AddRootError> {
    const DOING: &str = "creating symlink";
    loop {
        let Some(layout) = only_over_roots else {
            return Ok(rustix::fs::rename(temporary, link).at(DOING, link)?);
        };
        if check_replaceable(link, layout)? {
            return Ok(rustix::fs::rename(temporary, link).at(DOING, link)?);
        }
        match rustix::fs::renameat_with(CWD, temporary, CWD, link, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            // Somebody was quicker: look at what it is.
            Err(Errno::EXIST) => {}
            // A file system without it.
            Err(Errno::INVAL | Errno::NOSYS) => return Ok(rustix::fs::rename(temporary, link).at(DOING, link)?),
            Err(e) => return Err(FileError::new(DOING, link, e).into()),
        }
    }
}

/// Is there a symlink into the store? `false` if there is nothing; anything else is an error.
fn check_replaceable(link: &Path, layout: &Layout) -> Result<bool, AddRootError> {
    match rustix::fs::readlink(link, Vec::new()) {
        Ok(target) if layout.store_dir.below(target.as_bytes()).is_some_and(|rest| !rest.is_empty()) => Ok(true),
        Ok(_) | Err(Errno::INVAL) => Err(AddRootError::Exists { link: link.to_owned() }),
        Err(Errno::NOENT) => Ok(false),
        Err(e) => Err(FileError::new("reading symlink", link, e).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::roots::{RootKind, StaleLinks, persistent};
    use crate::testing::{RealNix, Told, layout, path};
    use larder_core::report::Silent;
    use std::convert::Infallible;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn prepared() -> (tempfile::TempDir, Layout, TempRoots) {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        fs::create_dir_all(layout.temp_roots()).unwrap();
        fs::create_dir_all(&layout.real_store).unwrap();
        let roots = TempRoots::new(layout.clone());
        (dir, layout, roots)
    }

    fn found(layout: &Layout) -> Vec<Root> {
        let mut all = |_: &StorePath| Ok::<_, Infallible>(true);
        persistent(layout, StaleLinks::Keep, &mut all, &Silent).unwrap().roots
    }

    #[test]
    fn permanent_roots() {
        let (dir, layout, roots) = prepared();
        let link = dir.path().join("new/dir/result");
        // What we are told need not be tidy; what we make is.
        let told = dir.path().join("new/./dir//x/../result");
        assert_eq!(add_permanent(&layout, &roots, &path(1), &told).unwrap(), link);
        assert_eq!(fs::read_link(&link).unwrap(), layout.real_path(&path(1)));
        let expected = Root { link: link.clone(), path: path(1), kind: RootKind::Indirect };
        assert_eq!(found(&layout), [expected]);
        assert!(roots.file().is_some(), "the path is a temporary root");
        // Over an older root, and over one that points into a path.
        add_permanent(&layout, &roots, &path(2), &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), layout.real_path(&path(2)));
        let names: Vec<_> = fs::read_dir(link.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["result"], "no temporary names are left");
        assert_eq!(fs::read_dir(layout.auto_roots()).unwrap().count(), 1);
    }

    #[test]
    fn names_of_indirect_roots() {
        // Both captured from a real Nix.
        let layout = layout(Path::new("/tmp/fsx/a"));
        let auto = auto_link(&layout, Path::new("/tmp/fsx/a/r2"));
        assert_eq!(auto, layout.auto_roots().join("89g64y768cfw4grvlckcjq8m2628s4ym"));
    }

    #[test]
    fn refusals() {
        let (dir, layout, roots) = prepared();
        let here = dir.path().display();
        for (name, text) in [("file", ""), ("dir", ""), ("link", "elsewhere"), ("store-itself", "store")] {
            let at = dir.path().join(name);
            match (name, text) {
                ("file", _) => fs::write(&at, b"mine").unwrap(),
                ("dir", _) => fs::create_dir(&at).unwrap(),
                (_, "store") => symlink(&layout.real_store, &at).unwrap(),
                (_, target) => symlink(target, &at).unwrap(),
            }
            let e = add_permanent(&layout, &roots, &path(1), &at).unwrap_err();
            assert_eq!(e.to_string(), format!("cannot create symlink '{here}/{name}'; already exists"));
        }
        assert_eq!(fs::read(dir.path().join("file")).unwrap(), b"mine");
        let e = add_permanent(&layout, &roots, &path(1), &layout.real_store.join("result")).unwrap_err();
        let text = format!(
            "creating a garbage collector root ({here}/store/result) in the Nix store is forbidden \
             (are you running nix-build inside the store?)"
        );
        assert_eq!(e.to_string(), text);
        let e = add_permanent(&layout, &roots, &path(1), Path::new("result")).unwrap_err();
        assert!(matches!(e, AddRootError::NotAbsolute { .. }));
        let e = add_permanent(&layout, &roots, &path(1), &dir.path().join("file/result")).unwrap_err();
        assert!(matches!(e, AddRootError::File(_)), "{e}");
        assert!(!layout.auto_roots().exists(), "nothing was registered");
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_string_lossy().contains(".tmp-")), "{left:?}");
    }

    #[test]
    fn direct_roots() {
        let (dir, layout, roots) = prepared();
        let e = add_direct(&layout, &roots, &path(1), &dir.path().join("x")).unwrap_err();
        let text = format!(
            "path '{0}/x' is not a valid garbage collector root; it's not in the directory '{0}/var/gcroots'",
            dir.path().display()
        );
        assert_eq!(e.to_string(), text);
        let file = layout.gc_roots().join("sub").join(path(1).to_string());
        for _ in 0..2 {
            add_direct(&layout, &roots, &path(1), &file).unwrap();
            assert!(fs::symlink_metadata(&file).unwrap().is_file());
        }
        let link = layout.gc_roots().join("link");
        add_direct(&layout, &roots, &path(2), &link).unwrap();
        let all = found(&layout);
        assert_eq!(all.iter().map(|root| root.kind).collect::<Vec<_>>(), [RootKind::Link, RootKind::File]);
        let told = Told::default();
        assert!(check_reachability(&all, &layout, &path(2), &link, &told));
        assert!(!check_reachability(&all, &layout, &path(1), &link, &told));
        let text = format!(
            "Warn: '{}' is not in a directory where the garbage collector looks for roots; therefore, '{}' \
             might be removed by the garbage collector",
            link.display(),
            layout.store_dir.full(&path(1))
        );
        assert_eq!(told.take(), [text]);
    }

    /// The link is never missing or half made while it is replaced.
    #[test]
    fn replacing_is_atomic() {
        let (dir, layout, roots) = prepared();
        let link = dir.path().join("result");
        add_permanent(&layout, &roots, &path(0), &link).unwrap();
        std::thread::scope(|scope| {
            let writers: Vec<_> = (1..4)
                .map(|n| {
                    let (layout, roots, link) = (&layout, &roots, &link);
                    scope.spawn(move || {
                        (0..100).for_each(|_| drop(add_permanent(layout, roots, &path(n), link).unwrap()));
                    })
                })
                .collect();
            while !writers.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                assert!(fs::read_link(&link).unwrap().starts_with(&layout.real_store));
            }
        });
    }

    /// A real collector keeps what our root names.
    #[test]
    fn interop_real_collector_honours_our_roots() {
        let (dir, layout, roots) = prepared();
        let Some(nix) = RealNix::find("interop_real_collector_honours_our_roots", &layout) else { return };
        let mut paths = Vec::new();
        for name in ["kept", "gone"] {
            fs::write(dir.path().join(name), name).unwrap();
            let full = nix.run(&["--add", dir.path().join(name).to_str().unwrap()]);
            paths.push(layout.store_dir.parse(full).unwrap());
        }
        add_permanent(&layout, &roots, &paths[0], &dir.path().join("result")).unwrap();
        drop(roots);
        nix.run(&["--gc"]);
        assert!(layout.real_path(&paths[0]).exists() && !layout.real_path(&paths[1]).exists());
        let listed = nix.run(&["-q", "--roots", &layout.store_dir.full(&paths[0])]);
        assert_eq!(listed, format!("{}/result -> {}", dir.path().display(), layout.store_dir.full(&paths[0])));
    }
}
