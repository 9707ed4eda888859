//! Finding the roots: what must stay, and why.
//!
//! Source: gc, section 1. Where Nix overlooks what it cannot read, this tells it apart
//! ([`Found::unreadable`]), so that a run that deletes can stop.
//!
//! A process first has a temporary root, then makes a link, then ends. So temporary roots are
//! read first and links second: at each moment one of both is there to be seen. For the same
//! reason running processes come last: a link may go once a program has been started from it.

use std::collections::BTreeSet;
use std::ffi::{CString, OsStr, OsString};
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use larder_core::report::{Level, Reporter};
use larder_core::store_dir::{StoreDir, canonicalise};
use larder_core::store_path::StorePath;
use larder_fs::file_error::{FileError, shown};
use larder_fs::layout::Layout;
use larder_fs::lock_file::LockFile;
use larder_fs::temp_roots::{self, Stale};
use rustc_hash::FxHashSet;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::runtime;

/// Where a root comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RootKind {
    /// A symlink below `gcroots` or `profiles`.
    Link,
    /// A user's symlink, which one of those points to.
    Indirect,
    /// A regular file there that has the name of a store path.
    File,
    /// Of a living process, which wants to do something with the path.
    Temporary,
    /// A process runs, has open, or has in its environment something below the path.
    Runtime,
}

impl RootKind {
    /// Does it tell about processes, which is not for everybody?
    pub const fn is_private(self) -> bool {
        matches!(self, Self::Temporary | Self::Runtime)
    }
}

/// A path that must stay. Sorts as listings do: by the bytes of the link, then by path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Root {
    /// What listings call it: the user's link, `/proc/PID/...` or `{temp:PID}`.
    pub link: PathBuf,
    pub path: StorePath,
    pub kind: RootKind,
}

impl Ord for Root {
    /// Not as paths compare, which is piece by piece, and slow.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        let links = self.link.as_os_str().as_bytes().cmp(other.link.as_os_str().as_bytes());
        links.then_with(|| self.path.cmp(&other.path)).then_with(|| self.kind.cmp(&other.kind))
    }
}

impl PartialOrd for Root {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Root {
    /// `LINK -> PATH`, as it is printed.
    pub fn display<'a>(&'a self, store_dir: &'a StoreDir) -> impl fmt::Display + 'a {
        fmt::from_fn(move |f| write!(f, "{} -> {}", self.link.display(), store_dir.display(&self.path)))
    }
}

/// Is the path valid? Asked for each candidate, from one thread.
pub type IsValid<'a, E> = &'a mut dyn FnMut(&StorePath) -> Result<bool, E>;

/// What to do about links in `gcroots/auto` whose target is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StaleLinks {
    Keep,
    /// Delete them, as Nix does even when it only lists roots. Not being allowed to is no error.
    Remove,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RootsError<E: std::error::Error + 'static> {
    #[error("checking whether '{path}' is valid")]
    Validity { path: StorePath, source: E },
    #[error(transparent)]
    File(#[from] FileError),
}

/// The roots, and what could not be looked at.
#[derive(Debug, Default)]
pub struct Found {
    /// Sorted, each link with each path once.
    pub roots: Vec<Root>,
    /// What may hide roots. A run that deletes must not go on, others may; it has been told to
    /// the reporter (`cannot read potential root`).
    pub unreadable: Vec<FileError>,
    /// See [`temp_roots::LiveTempRoots::legacy_locks`].
    pub legacy_locks: Vec<LockFile>,
}

impl Found {
    fn sort(&mut self) {
        self.roots.sort();
        self.roots.dedup_by(|a, b| a.link.as_os_str() == b.link.as_os_str() && a.path == b.path);
    }

    /// Joins what was found in two places.
    pub fn add(&mut self, other: Self) {
        self.roots.extend(other.roots);
        self.unreadable.extend(other.unreadable);
        self.legacy_locks.extend(other.legacy_locks);
        self.sort();
    }
}

/// All roots but the temporary ones: links, files, and what running processes use.
///
/// A collector holds its lock and listens on its socket already, and has read the temporary roots.
/// Links and files whose path is not valid are no roots, and links are told (`skipping invalid root`).
///
/// A snapshot of the ledger that answers `is_valid` must be younger than the reading of the
/// temporary roots: what became valid before that has them no more.
pub fn lasting<E: std::error::Error + 'static>(
    layout: &Layout,
    stale_links: StaleLinks,
    is_valid: IsValid<'_, E>,
    reporter: &dyn Reporter,
) -> Result<Found, RootsError<E>> {
    let mut found = persistent(layout, stale_links, is_valid, reporter)?;
    let (candidates, unreadable) = runtime::candidates(&layout.store_dir, Path::new("/proc"));
    found.unreadable.extend(unreadable);
    for root in candidates {
        if ask(is_valid, &root.path)? {
            found.roots.push(root);
        }
    }
    found.sort();
    Ok(found)
}

/// The temporary roots alone (`--ignore-liveness`).
pub fn temporary(layout: &Layout, stale: StaleLinks, reporter: &dyn Reporter) -> Result<Found, FileError> {
    let stale = match stale {
        StaleLinks::Keep => Stale::Ignore,
        StaleLinks::Remove => Stale::Delete,
    };
    let live = match temp_roots::read_all(layout, stale, reporter) {
        // Only the owner may open a file for writing, which marking a stale one needs.
        Ok(live) if stale == Stale::Delete && !live.unreadable.is_empty() => {
            drop(live);
            temp_roots::read_all(layout, Stale::Ignore, reporter)?
        }
        other => other?,
    };
    for e in &live.unreadable {
        cannot_read(reporter, &e.path);
    }
    let roots = live.roots.into_iter().map(|root| Root {
        link: format!("{{temp:{}}}", root.pid).into(),
        path: root.path,
        kind: RootKind::Temporary,
    });
    let mut found = Found { roots: roots.collect(), unreadable: live.unreadable, legacy_locks: live.legacy_locks };
    found.sort();
    Ok(found)
}

/// The roots below `gcroots` and `profiles`.
pub fn persistent<E: std::error::Error + 'static>(
    layout: &Layout,
    stale_links: StaleLinks,
    is_valid: IsValid<'_, E>,
    reporter: &dyn Reporter,
) -> Result<Found, RootsError<E>> {
    let (auto, valid, found) = (layout.auto_roots(), FxHashSet::default(), Found::default());
    let mut scan = Scan { layout, auto, stale_links, is_valid, valid, reporter, found };
    scan.tree(&layout.gc_roots())?;
    scan.tree(&layout.profiles())?;
    scan.found.sort();
    Ok(scan.found)
}

/// What people who may not know about other people's processes are told: all roots, but
/// `{censored}` for the names of private ones.
pub fn censored(roots: &[Root]) -> Vec<Root> {
    let roots = roots.iter().map(|root| {
        let link = if root.kind.is_private() { "{censored}".into() } else { root.link.clone() };
        Root { link, ..root.clone() }
    });
    let sorted: BTreeSet<Root> = roots.collect();
    let mut roots: Vec<Root> = sorted.into_iter().collect();
    roots.dedup_by(|a, b| a.link.as_os_str() == b.link.as_os_str() && a.path == b.path);
    roots
}

fn ask<E: std::error::Error + 'static>(is_valid: IsValid<'_, E>, path: &StorePath) -> Result<bool, RootsError<E>> {
    is_valid(path).map_err(|source| RootsError::Validity { path: path.clone(), source })
}

fn cannot_read(reporter: &dyn Reporter, path: &Path) {
    reporter.message(Level::Info, format_args!("cannot read potential root '{}'", shown(path)));
}

/// The longest path that is walked in one system call, in bytes; Linux takes 4095.
const MAX_STEP: usize = 4000;

/// The longest target that a symlink of Linux can have, in bytes.
const MAX_TARGET: usize = 4096;

struct Scan<'a, E> {
    layout: &'a Layout,
    auto: PathBuf,
    stale_links: StaleLinks,
    is_valid: IsValid<'a, E>,
    /// Those that are: many links lead to few paths.
    valid: FxHashSet<StorePath>,
    reporter: &'a dyn Reporter,
    found: Found,
}

/// A directory that is being read.
struct Here<'a> {
    fd: BorrowedFd<'a>,
    path: &'a Path,
    is_auto: bool,
}

impl<E: std::error::Error + 'static> Scan<'_, E> {
    /// A directory and all below it. It may itself be a symlink to one: then somebody has moved
    /// the roots to another disk, and they are no less roots.
    fn tree(&mut self, top: &Path) -> Result<(), RootsError<E>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let base = match rustix::fs::openat(CWD, top, flags, Mode::empty()) {
            Ok(base) => base,
            Err(e) => {
                self.unreadable("opening directory", top, e);
                return Ok(());
            }
        };
        let mut todo = vec![PathBuf::new()];
        while let Some(below) = todo.pop() {
            let path = if below.as_os_str().is_empty() { top.to_owned() } else { top.join(&below) };
            match open_below(&base, &below) {
                Ok(fd) => self.directory(&fd, &path, &below, &mut todo)?,
                // No directory any more, or a symlink on the way to it now.
                Err(Errno::LOOP) => cannot_read(self.reporter, &path),
                Err(e) => self.unreadable("opening directory", &path, e),
            }
        }
        Ok(())
    }

    fn directory(
        &mut self,
        fd: &OwnedFd,
        path: &Path,
        below: &Path,
        todo: &mut Vec<PathBuf>,
    ) -> Result<(), RootsError<E>> {
        let here = Here { fd: fd.as_fd(), path, is_auto: path.starts_with(&self.auto) };
        let entries = match Dir::read_from(fd) {
            Ok(entries) => entries,
            Err(e) => {
                self.unreadable("reading directory", path, e);
                return Ok(());
            }
        };
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(e) => {
                    self.unreadable("reading directory", path, e);
                    return Ok(());
                }
            };
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => match rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(status) => FileType::from_raw_mode(status.st_mode),
                    Err(e) => {
                        self.unreadable("getting status of", &path.join(os(name.to_bytes())), e);
                        continue;
                    }
                },
                known => known,
            };
            match kind {
                FileType::Directory => todo.push(below.join(os(name.to_bytes()))),
                FileType::Symlink => self.link(&here, &name.to_owned())?,
                // Only the name is looked at: such roots exist to cost nothing more.
                FileType::RegularFile => self.file(&here, os(name.to_bytes()))?,
                _ => {}
            }
        }
        Ok(())
    }

    fn is_valid(&mut self, path: &StorePath) -> Result<bool, RootsError<E>> {
        if self.valid.contains(path) {
            return Ok(true);
        }
        let valid = ask(self.is_valid, path)?;
        if valid {
            self.valid.insert(path.clone());
        }
        Ok(valid)
    }

    fn file(&mut self, here: &Here<'_>, name: &OsStr) -> Result<(), RootsError<E>> {
        let Ok(path) = StorePath::from_base_name(name.as_bytes()) else { return Ok(()) };
        if self.is_valid(&path)? {
            self.found.roots.push(Root { link: here.path.join(name), path, kind: RootKind::File });
        }
        Ok(())
    }

    fn link(&mut self, here: &Here<'_>, name: &CString) -> Result<(), RootsError<E>> {
        let link = here.path.join(os(name.as_bytes()));
        let mut room = [MaybeUninit::uninit(); MAX_TARGET];
        let target = match rustix::fs::readlinkat_raw(here.fd, name, &mut room) {
            Ok((target, _)) => &*target,
            // No symlink any more.
            Err(Errno::INVAL) => return Ok(()),
            Err(e) => {
                self.unreadable("reading symlink", &link, e);
                return Ok(());
            }
        };
        if is_below_store(&self.layout.store_dir, target) {
            return self.points_to(link, target, RootKind::Link);
        }
        // Of the directory where the link is, whose path is absolute.
        let absolute = [here.path.as_os_str().as_bytes(), b"/", target].concat();
        let absolute = if target.starts_with(b"/") { target } else { &absolute };
        let Some(absolute) = canonicalise(absolute).map(|path| PathBuf::from(OsString::from_vec(path))) else {
            return Ok(());
        };
        // One hop more, and no other.
        let mut room = [MaybeUninit::uninit(); MAX_TARGET];
        match rustix::fs::readlinkat_raw(CWD, &absolute, &mut room) {
            Ok((second, _)) if is_below_store(&self.layout.store_dir, second) => {
                self.points_to(absolute, second, RootKind::Indirect)
            }
            // To something that is no symlink, or no symlink into the store.
            Ok(_) | Err(Errno::INVAL) => Ok(()),
            Err(Errno::NOENT | Errno::NOTDIR) => {
                if here.is_auto {
                    self.stale(here, name, &link, &absolute);
                }
                Ok(())
            }
            // Nobody can get there.
            Err(Errno::LOOP | Errno::NAMETOOLONG) => {
                cannot_read(self.reporter, &link);
                Ok(())
            }
            Err(e) => {
                self.unreadable("reading symlink", &absolute, e);
                Ok(())
            }
        }
    }

    /// A link, so named, points into the store.
    fn points_to(&mut self, link: PathBuf, target: &[u8], kind: RootKind) -> Result<(), RootsError<E>> {
        let Ok((path, _)) = self.layout.store_dir.parse_inside(target) else { return Ok(()) };
        if self.is_valid(&path)? {
            self.found.roots.push(Root { link, path, kind });
        } else {
            let text =
                format_args!("skipping invalid root from '{}' to '{}'", shown(&link), shown(Path::new(os(target))));
            self.reporter.message(Level::Info, text);
        }
        Ok(())
    }

    /// The user has removed the link that this one points to.
    fn stale(&self, here: &Here<'_>, name: &CString, link: &Path, target: &Path) {
        if self.stale_links == StaleLinks::Keep {
            return;
        }
        let text = format_args!("removing stale link from '{}' to '{}'", shown(link), shown(target));
        self.reporter.message(Level::Info, text);
        if let Err(e) = rustix::fs::unlinkat(here.fd, name, AtFlags::empty()) {
            let e = std::io::Error::from(e);
            self.reporter.message(Level::Info, format_args!("cannot remove '{}': {e}", shown(link)));
            return;
        }
        // Somebody may have made the user's link and then this one anew, after we had looked and
        // before we unlinked. User's links come first, so it would be there by now.
        if rustix::fs::lstat(target).is_ok()
            && let Err(e) = rustix::fs::symlinkat(target, here.fd, name)
            && e != Errno::EXIST
        {
            let e = std::io::Error::from(e);
            let text = format_args!("cannot restore the root '{}' to '{}': {e}", shown(link), shown(target));
            self.reporter.message(Level::Error, text);
        }
    }

    /// Something may hide roots, unless it is just gone.
    fn unreadable(&mut self, doing: &'static str, path: &Path, e: Errno) {
        cannot_read(self.reporter, path);
        if !matches!(e, Errno::NOENT | Errno::NOTDIR) {
            self.found.unreadable.push(FileError::new(doing, path, e));
        }
    }
}

fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

/// By the text: the store directory, a slash, and something.
fn is_below_store(store_dir: &StoreDir, target: &[u8]) -> bool {
    store_dir.below(target).is_some_and(|rest| !rest.is_empty())
}

/// Opens a directory that no symlink leads to: users own some of those on the way.
///
/// The way may be longer than the system takes at once: users can make it so, and must not be able
/// to stop a collection by that.
fn open_below(base: &OwnedFd, below: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let step = |base: BorrowedFd<'_>, piece: &Path| {
        match rustix::fs::openat2(base, piece, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
            // Linux before 5.6, or a filter of system calls.
            Err(Errno::NOSYS | Errno::PERM) => rustix::fs::openat(base, piece, flags, Mode::empty()),
            other => other,
        }
    };
    let mut fd: Option<OwnedFd> = None;
    let mut piece = PathBuf::from(".");
    for name in below {
        if piece.as_os_str().len() + 1 + name.len() > MAX_STEP {
            fd = Some(step(fd.as_ref().unwrap_or(base).as_fd(), &piece)?);
            piece = PathBuf::from(".");
        }
        piece.push(name);
    }
    step(fd.as_ref().unwrap_or(base).as_fd(), &piece)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RealNix, Told, child, child_argument, finish, layout, path};
    use larder_core::report::Silent;
    use larder_fs::temp_roots::TempRoots;
    use std::convert::Infallible;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::process::{Command, Stdio};

    /// A user nests directories deeper than any path can say: roots are found nevertheless, and
    /// nothing counts as hidden.
    #[test]
    fn a_way_too_long_for_a_path_hides_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let layout = layout(folder.path());
        let valid = [path(1)];
        fs::create_dir_all(layout.gc_roots()).unwrap();
        let mut dir: OwnedFd = fs::File::open(layout.gc_roots()).unwrap().into();
        let name = "d".repeat(250);
        for _ in 0..40 {
            rustix::fs::mkdirat(&dir, &name, Mode::RWXU).unwrap();
            dir = rustix::fs::openat(&dir, &name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        rustix::fs::symlinkat(layout.store_dir.full(&valid[0]), &dir, "root").unwrap();
        let found = persistent(&layout, StaleLinks::Keep, &mut only_valid(&valid), &Silent).unwrap();
        assert_eq!(found.unreadable.len(), 0);
        assert_eq!(found.roots.iter().map(|root| root.path.clone()).collect::<Vec<_>>(), valid);
        larder_fs::remove::remove_path(&layout.gc_roots(), larder_fs::remove::OnFailure::Stop).unwrap();
    }

    fn only_valid(valid: &[StorePath]) -> impl FnMut(&StorePath) -> Result<bool, Infallible> {
        move |path| Ok(valid.contains(path))
    }

    fn lines(found: &[Root], layout: &Layout) -> Vec<String> {
        found.iter().map(|root| root.display(&layout.store_dir).to_string()).collect()
    }

    /// A state directory with one of everything. Path 1 and path 2 are valid, path 9 is not.
    fn prepared(layout: &Layout) {
        let (roots, auto) = (layout.gc_roots(), layout.auto_roots());
        let dir = layout.state.parent().unwrap();
        for path in [&auto, &roots.join("per-user/u"), &layout.profiles(), &dir.join("home/sub")] {
            fs::create_dir_all(path).unwrap();
        }
        let full = |n| layout.store_dir.full(&path(n));
        let link = |target: &str, at: &Path| symlink(target, at).unwrap();
        link(&full(1), &dir.join("home/result"));
        link("result", &dir.join("home/twice"));
        for (name, target) in [
            ("direct", full(1)),
            ("inside", format!("{}/bin/x y", full(1))),
            ("invalid", full(9)),
            ("inside-invalid", format!("{}/bin", full(9))),
            ("no-name", format!("{}/foo", layout.store_dir)),
            ("store", layout.store_dir.to_string()),
            ("store-slash", format!("{}/", layout.store_dir)),
            ("slashes", format!("{}//{}", layout.store_dir, path(1))),
            ("stale", "/no/such/file".to_owned()),
            ("relative", "../../home/result".to_owned()),
            ("dots", format!("{}/./home/sub/../result", dir.display())),
            ("through-file", format!("{}/home/result/x/y", dir.display())),
            ("two-hops", format!("{}/home/twice", dir.display())),
            ("directory", format!("{}/home", dir.display())),
            ("relative-store", format!("../../store/{}", path(1))),
            ("profiles", layout.profiles().display().to_string()),
            ("loop", format!("{}/loop", roots.display())),
            ("auto/a", format!("{}/home/result", dir.display())),
            ("auto/b", format!("{}/home/gone", dir.display())),
            ("auto/c", full(9)),
            ("auto/d", full(2)),
            ("per-user/u/e", full(2)),
        ] {
            link(&target, &roots.join(name));
        }
        for name in [path(1).to_string(), path(9).to_string(), "foo".to_owned(), "per-user/u/x".to_owned()] {
            fs::write(roots.join(name), b"").unwrap();
        }
        fs::write(roots.join("auto").join(path(2).to_string()), b"").unwrap();
        rustix::fs::mkfifoat(CWD, roots.join(format!("{}x", path(1))), Mode::RWXU).unwrap();
        link(&full(2), &layout.profiles().join("default-1-link"));
        link("default-1-link", &layout.profiles().join("default"));
    }

    fn expected(layout: &Layout) -> Vec<String> {
        let dir = layout.state.parent().unwrap().display();
        let mut lines: Vec<String> = [
            (1, "home/result".to_owned()),
            (1, format!("var/gcroots/{}", path(1))),
            (2, format!("var/gcroots/auto/{}", path(2))),
            (2, "var/gcroots/auto/d".to_owned()),
            (1, "var/gcroots/direct".to_owned()),
            (1, "var/gcroots/inside".to_owned()),
            (2, "var/gcroots/per-user/u/e".to_owned()),
            (2, "var/profiles/default-1-link".to_owned()),
        ]
        .map(|(n, link)| format!("{dir}/{link} -> {}", layout.store_dir.full(&path(n))))
        .into();
        lines.sort();
        lines
    }

    #[test]
    fn s007_s008_s042_finds_links_and_files() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        prepared(&layout);
        // A real Nix gives up here.
        symlink(layout.gc_roots().join("loop/x"), layout.gc_roots().join("through-loop")).unwrap();
        let told = Told::default();
        let both = [path(1), path(2)];
        let mut valid = only_valid(&both);
        let found = persistent(&layout, StaleLinks::Keep, &mut valid, &told).unwrap();
        assert_eq!(lines(&found.roots, &layout), expected(&layout));
        assert_eq!(found.unreadable.len(), 0);
        let mut told = told.take();
        told.sort();
        let here = dir.path().display();
        let full = layout.store_dir.full(&path(9));
        assert_eq!(
            told,
            [
                format!("Info: cannot read potential root '{here}/var/gcroots/through-loop'"),
                format!("Info: skipping invalid root from '{here}/var/gcroots/auto/c' to '{full}'"),
                format!("Info: skipping invalid root from '{here}/var/gcroots/inside-invalid' to '{full}/bin'"),
                format!("Info: skipping invalid root from '{here}/var/gcroots/invalid' to '{full}'"),
            ]
        );
        assert!(fs::symlink_metadata(layout.auto_roots().join("b")).is_ok());
        let told = Told::default();
        persistent(&layout, StaleLinks::Remove, &mut valid, &told).unwrap();
        let stale = format!("Info: removing stale link from '{here}/var/gcroots/auto/b' to '{here}/home/gone'");
        assert!(told.take().contains(&stale));
        for (link, there) in [("auto/b", false), ("stale", true), ("auto/a", true), ("auto/c", true)] {
            assert_eq!(fs::symlink_metadata(layout.gc_roots().join(link)).is_ok(), there, "{link}");
        }
    }

    #[test]
    fn nothing_there_is_nothing_found() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let found = persistent(&layout, StaleLinks::Remove, &mut only_valid(&[]), &Silent).unwrap();
        assert!(found.roots.is_empty() && found.unreadable.is_empty());
    }

    /// Roots on another disk are roots.
    #[test]
    fn moved_root_directories() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        prepared(&layout);
        fs::rename(layout.gc_roots(), dir.path().join("elsewhere")).unwrap();
        symlink("../elsewhere", layout.gc_roots()).unwrap();
        let found = persistent(&layout, StaleLinks::Keep, &mut only_valid(&[path(1), path(2)]), &Silent).unwrap();
        assert_eq!(lines(&found.roots, &layout), expected(&layout));
    }

    /// Whatever hides roots is told apart from what is just not there.
    #[test]
    fn what_cannot_be_read_is_told() {
        if !rustix::process::geteuid().is_root() {
            println!("what_cannot_be_read_is_told: skipped, needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let layout = layout(dir.path());
        prepared(&layout);
        let closed = dir.path().join("closed");
        fs::create_dir(&closed).unwrap();
        symlink(closed.join("result"), layout.auto_roots().join("z")).unwrap();
        for path in [&closed, &layout.gc_roots().join("per-user/u"), &layout.profiles()] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
        }
        let told = Told::default();
        let found = crate::testing::unprivileged(|| {
            persistent(&layout, StaleLinks::Remove, &mut only_valid(&[path(1), path(2)]), &told).unwrap()
        });
        let mut unreadable: Vec<_> =
            found.unreadable.iter().map(|e| e.path.strip_prefix(dir.path()).unwrap()).collect();
        unreadable.sort();
        assert_eq!(unreadable, ["closed/result", "var/gcroots/per-user/u", "var/profiles"].map(Path::new));
        assert!(told.take().contains(&format!("Info: cannot read potential root '{}/result'", closed.display())));
        assert_eq!(found.roots.len(), expected(&layout).len() - 2);
        assert!(fs::symlink_metadata(layout.auto_roots().join("b")).is_ok(), "may not be removed, and that is fine");
    }

    /// Neither a `readlink` nor a `stat` for a root that is a file.
    #[test]
    fn s009_file_roots_cost_no_more_than_their_names() {
        const COUNT: u32 = 2000;
        if let Some(dir) = child_argument() {
            let layout = layout(Path::new(&dir));
            let mut all = |_: &StorePath| Ok::<_, Infallible>(true);
            let found = persistent(&layout, StaleLinks::Keep, &mut all, &Silent).unwrap();
            assert_eq!(found.roots.len(), COUNT as usize);
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        fs::create_dir_all(layout.gc_roots().join("many")).unwrap();
        (0..COUNT).for_each(|n| fs::write(layout.gc_roots().join("many").join(path(n).to_string()), b"").unwrap());
        let log = dir.path().join("log");
        let strace = Command::new("strace").args(["-o", "/dev/null", "true"]).stderr(Stdio::null()).status();
        let traced = strace.is_ok_and(|status| status.success());
        let shell = if traced { format!("exec strace -f -o {} \"$0\" \"$@\"", log.display()) } else { String::new() };
        let test = "roots::tests::s009_file_roots_cost_no_more_than_their_names";
        finish(child(test, dir.path().to_str().unwrap(), &shell));
        if !traced {
            println!("s009_file_roots_cost_no_more_than_their_names: calls not counted, no strace");
            return;
        }
        let calls = fs::read_to_string(log).unwrap();
        assert!(calls.contains("getdents64"));
        assert!(!calls.contains("-name17"), "{}", calls.lines().find(|l| l.contains("-name17")).unwrap());
        assert!(calls.lines().count() < COUNT as usize, "{} calls", calls.lines().count());
    }

    #[test]
    fn errors_of_validity_stop() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        prepared(&layout);
        let mut failing = |_: &StorePath| Err(std::io::Error::other("broken"));
        let e = persistent(&layout, StaleLinks::Keep, &mut failing, &Silent).unwrap_err();
        assert!(matches!(e, RootsError::Validity { .. }));
    }

    /// A user makes the link anew just when the one that points to it is being removed.
    #[test]
    fn stale_links_that_come_back() {
        struct User<'a>(&'a Layout, &'a TempRoots, PathBuf);
        impl Reporter for User<'_> {
            fn shows(&self, _level: Level) -> bool {
                true
            }
            fn message(&self, _level: Level, text: fmt::Arguments<'_>) {
                if text.to_string().starts_with("removing stale link") {
                    crate::add_root::add_permanent(self.0, self.1, &path(1), &self.2).unwrap();
                }
            }
        }
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let roots = TempRoots::new(layout.clone());
        fs::create_dir_all(layout.temp_roots()).unwrap();
        let result = dir.path().join("result");
        crate::add_root::add_permanent(&layout, &roots, &path(1), &result).unwrap();
        fs::remove_file(&result).unwrap();
        let user = User(&layout, &roots, result.clone());
        persistent(&layout, StaleLinks::Remove, &mut only_valid(&[]), &user).unwrap();
        let auto = crate::add_root::auto_link(&layout, &result);
        assert_eq!(fs::read_link(auto).unwrap(), result);
        assert!(fs::symlink_metadata(result).is_ok());
    }

    #[test]
    fn censored_names() {
        let root = |link: &str, n, kind| Root { link: link.into(), path: path(n), kind };
        let all = [
            root("/proc/1/cwd", 1, RootKind::Runtime),
            root("/proc/2/exe", 1, RootKind::Runtime),
            root("/proc/2/exe", 2, RootKind::Runtime),
            root("{temp:7}", 1, RootKind::Temporary),
            root("/home/u/result", 1, RootKind::Indirect),
        ];
        let layout = layout(Path::new("/x"));
        let full = |n| layout.store_dir.full(&path(n));
        let expected = [
            format!("/home/u/result -> {}", full(1)),
            format!("{{censored}} -> {}", full(1)),
            format!("{{censored}} -> {}", full(2)),
        ];
        assert_eq!(lines(&censored(&all), &layout), expected);
    }

    /// The same store, the same roots of all kinds: the lines a real Nix prints.
    #[test]
    fn interop_same_lines_as_real_nix() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(dir.path());
        let Some(nix) = RealNix::find("interop_same_lines_as_real_nix", &layout) else { return };
        fs::create_dir(dir.path().join("tree")).unwrap();
        fs::write(dir.path().join("tree/file"), b"x").unwrap();
        let paths: Vec<StorePath> = ["tree", "one", "two", "three"]
            .iter()
            .map(|name| {
                let file = dir.path().join(name);
                if *name != "tree" {
                    fs::write(&file, name).unwrap();
                }
                layout.store_dir.parse(nix.run(&["--add", file.to_str().unwrap()])).unwrap()
            })
            .collect();
        prepared(&layout_with_gc_roots_gone(&layout));
        // The prepared links name paths that are not valid here; these are.
        let full = |n: usize| layout.store_dir.full(&paths[n]);
        symlink(full(0), dir.path().join("r1")).unwrap();
        for (name, target) in [
            ("auto/r1", dir.path().join("r1").display().to_string()),
            ("again", dir.path().join("r1").display().to_string()),
            ("rel", "../../r1".to_owned()),
            ("in", format!("{}/file", full(0))),
            ("in-deep", format!("{}/no/such", full(1))),
            ("relst", format!("../../store/{}", paths[1])),
        ] {
            symlink(target, layout.gc_roots().join(name)).unwrap();
        }
        fs::write(layout.gc_roots().join(paths[2].to_string()), b"").unwrap();
        symlink(full(2), layout.profiles().join("p-7-link")).unwrap();
        symlink("p-7-link", layout.profiles().join("p")).unwrap();
        let roots = TempRoots::new(layout.clone());
        roots.add(&paths[1]).unwrap();
        roots.add(&path(77)).unwrap();
        let mut sleeper = Command::new("sleep")
            .arg("60")
            .current_dir(layout.real_path(&paths[0]))
            .env("SOME", format!("a:{}:{}/bin:{}x y", full(3), full(1), full(2)))
            .env("GLUED", format!("{}glued", full(2)))
            .stdin(fs::File::open(layout.real_path(&paths[2])).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Both read all processes; what others do between must not matter, so ask twice at most.
        let mut agreed = false;
        let mut last = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let real = nix.run(&["--gc", "--print-roots"]);
            let mut valid = |path: &StorePath| Ok::<_, Infallible>(layout.real_path(path).exists());
            let mut found = temporary(&layout, StaleLinks::Keep, &Silent).unwrap();
            found.add(lasting(&layout, StaleLinks::Keep, &mut valid, &Silent).unwrap());
            last = (real.lines().map(str::to_owned).collect(), lines(&found.roots, &layout));
            agreed = last.0 == last.1;
            if agreed {
                break;
            }
        }
        sleeper.kill().unwrap();
        sleeper.wait().unwrap();
        assert!(agreed, "theirs {:#?}\nours {:#?}", last.0, last.1);
        assert!(last.0.len() >= 11, "{:#?}", last.0);
    }

    /// A real Nix has made these; the test makes its own.
    fn layout_with_gc_roots_gone(layout: &Layout) -> Layout {
        fs::remove_dir_all(layout.gc_roots()).unwrap();
        fs::remove_dir_all(layout.profiles()).unwrap();
        layout.clone()
    }
}
