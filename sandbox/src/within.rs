//! Names that are resolved below a directory, whatever links lie on the way.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Links that are followed on one way, as the kernel has it.
const MAX_LINKS: u32 = 40;

/// Opens what `path` names if `root` is `/`.
///
/// Errors: those of `openat2`.
pub(crate) fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
        // Containers whose filter of system calls does not know it.
        Err(Errno::NOSYS | Errno::PERM) => walk(root, path, flags),
        outcome => outcome,
    }
}

/// The same step by step. No step follows a link or leaves the directory that it begins in but for one
/// that was on the way, so nobody who changes the tree meanwhile leads it out of the root.
fn walk(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let stops_at_links = flags.contains(OFlags::NOFOLLOW);
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let pieces = |path: &OsStr| -> Vec<OsString> {
        path.as_bytes().split(|byte| *byte == b'/').map(|piece| OsString::from_vec(piece.to_vec())).collect()
    };
    let mut left: VecDeque<OsString> = pieces(path.as_os_str()).into();
    let mut on_the_way: Vec<OwnedFd> = Vec::new();
    let mut links = 0;
    while let Some(name) = left.pop_front() {
        let here = on_the_way.last().map_or(root, OwnedFd::as_fd);
        match name.as_bytes() {
            b"" | b"." => continue,
            b".." => {
                on_the_way.pop();
                continue;
            }
            _ => {}
        }
        let found = rustix::fs::openat(here, &name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
        if kind == FileType::Symlink && left.is_empty() && stops_at_links {
            return match (flags.contains(OFlags::DIRECTORY), flags.contains(OFlags::PATH)) {
                (true, _) => Err(Errno::NOTDIR),
                (false, true) => Ok(found),
                (false, false) => Err(Errno::LOOP),
            };
        }
        if kind == FileType::Symlink {
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
            if target.as_bytes().first() == Some(&b'/') {
                on_the_way.clear();
            }
            for piece in pieces(OsStr::from_bytes(target.as_bytes())).into_iter().rev() {
                left.push_front(piece);
            }
        } else if !left.is_empty() || flags.contains(OFlags::DIRECTORY) && kind != FileType::Directory {
            // A slash behind a name wants a directory, too.
            if kind != FileType::Directory {
                return Err(Errno::NOTDIR);
            }
            on_the_way.push(found);
        } else if flags.contains(OFlags::PATH) {
            return Ok(found);
        } else {
            return rustix::fs::openat(here, &name, flags, Mode::empty());
        }
    }
    let here = on_the_way.last().map_or(root, OwnedFd::as_fd);
    rustix::fs::openat(here, ".", flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;
    use rustix::fs::CWD;

    use super::*;

    /// A tree with links of all kinds, also out of it.
    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join("root").join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::write(at("a/f"), "").unwrap();
        fs::write(dir.path().join("outside"), "").unwrap();
        for (name, target) in [
            ("l", "a/b"),
            ("a/up", ".."),
            ("a/b/abs", "/a/f"),
            ("a/b/c/out", "../../../../../outside"),
            ("a/loop", "loop"),
            ("loop2", "a/up/loop2"),
            ("nowhere", "no/thing"),
            ("a/slash", "/"),
            ("dirlink", "a/b/c/"),
        ] {
            symlink(target, at(name)).unwrap();
        }
        dir
    }

    fn open_at(dir: &Path) -> OwnedFd {
        rustix::fs::openat(CWD, dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    type Found = Result<(u64, u64), Errno>;

    fn seen(outcome: rustix::io::Result<OwnedFd>) -> Found {
        outcome.map(|fd| {
            let status = rustix::fs::fstat(&fd).unwrap();
            (status.st_dev, status.st_ino)
        })
    }

    proptest! {
        /// Both ways find the same, or fail alike.
        #[test]
        fn step_by_step_is_the_same(
            words in prop::collection::vec(
                prop::sample::select(vec![
                    "a", "b", "c", "f", "l", "up", "abs", "out", "loop", "loop2", "nowhere", "slash", "dirlink", "..",
                    ".", "", "x",
                ]),
                1..8,
            ),
            is_dir: bool,
            is_path: bool,
            stops_at_links: bool,
        ) {
            let dir = tree();
            let root = open_at(&dir.path().join("root"));
            let mut flags = OFlags::CLOEXEC | if is_path { OFlags::PATH } else { OFlags::RDONLY };
            if is_dir {
                flags |= OFlags::DIRECTORY;
            }
            if stops_at_links {
                flags |= OFlags::NOFOLLOW;
            }
            let path = words.join("/");
            let path = Path::new(if path.is_empty() { "." } else { &path });
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let expected = seen(rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve));
            prop_assume!(expected != Err(Errno::NOSYS) && expected != Err(Errno::PERM));
            prop_assert_eq!(seen(walk(root.as_fd(), path, flags)), expected, "{:?} {:?}", path, flags);
        }
    }
}
