//! Canonical metadata: what is left of modes, times, owners and attributes in the store.
//!
//! Source: formats, section 4; `canonical_metadata.json`. Everything is done below a held
//! directory and on what is open, and nothing is followed, so that a builder's tree cannot
//! direct us to other files. What is canonical already costs two calls, `statx` and
//! `llistxattr`, and nothing is written.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::rc::Rc;

use rustc_hash::FxHashSet;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid};
use rustix::io::Errno;

use crate::entry::{FileId, MAX_OPEN, Status, Target, clear_frozen, open_dir, read_names};
use crate::file_error::{At as _, FileError, shown};
use crate::lock_file::retry;

/// Of everything in the store, in seconds after the epoch.
pub const MTIME_S: i64 = 1;

/// The default of the setting `ignored-acls`.
pub const DEFAULT_IGNORED_ACLS: &[&str] = &["security.csm", "security.selinux", "system.nfs4_acl"];

/// The longest list of attribute names Linux gives (`XATTR_LIST_MAX`).
const MAX_ATTRIBUTE_LIST: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CanonError {
    #[error("file '{}' has an unsupported type", shown(path))]
    UnsupportedType { path: PathBuf },
    #[error("invalid ownership on file '{}'", shown(path))]
    InvalidOwnership { path: PathBuf },
    #[error(
        "suspicious ownership or permission on '{}' for output '{output}'; rejecting this build output",
        shown(path)
    )]
    Suspicious { path: PathBuf, output: String },
    #[error("file '{}' was replaced while its metadata was made canonical", shown(path))]
    Replaced { path: PathBuf },
    #[error("removing extended attribute '{attribute}' from '{}'", shown(path))]
    Attribute { path: PathBuf, attribute: String, source: io::Error },
    #[error(transparent)]
    File(#[from] FileError),
}

/// Who has made the tree.
#[derive(Debug, Clone)]
pub enum Origin {
    /// We have, or somebody we trust: any owner will do.
    Trusted,
    /// A builder with these user ids, who may have linked other people's files into it.
    Builder(RangeInclusive<u32>),
}

#[derive(Debug, Clone, Copy)]
pub struct CanonOptions<'a> {
    pub origin: &'a Origin,
    /// Extended attributes that stay (setting `ignored-acls`).
    pub ignored_acls: &'a [String],
}

/// Files with several links that one build has made and that are canonical by now.
///
/// One value serves all outputs of the build: a file may have links in several of them.
#[derive(Debug, Default)]
pub struct Seen(FxHashSet<FileId>);

/// Makes the metadata of a tree canonical, parents before what is in them.
///
/// Permissions become 0444, or 0555 with execute permission for the owner before; the owner
/// becomes the effective user; extended attributes but the ignored ones, immutable and
/// append-only flags go; the modification time becomes one second. Times of access stay.
///
/// Errors leave the tree half done: a file that is no regular file, directory or symlink; with
/// [`Origin::Builder`] a file of another owner that is not [`Seen`], which is not touched; a
/// change we are not allowed to make. Memory grows with the depth of the tree, descriptors do not.
pub fn canonicalise(target: Target<'_>, options: &CanonOptions<'_>, seen: &mut Seen) -> Result<(), CanonError> {
    let name = target.checked_name("getting status of")?;
    let mut canon = Canon {
        target,
        options,
        seen,
        uid: rustix::process::geteuid(),
        gid: rustix::process::getegid(),
        levels: Vec::new(),
        buffer: Vec::new(),
        attributes: vec![0; MAX_ATTRIBUTE_LIST],
        attribute_path: Vec::new(),
    };
    if let Some(id) = canon.entry(target.dir, &name)? {
        canon.enter(target.dir, name, id)?;
        canon.walk()?;
    }
    Ok(())
}

/// Looks at the root of an output before anything is done to it.
///
/// Errors: others than the owner may write to it (symlinks aside), or the builder does not own
/// it; it is not there ([`CanonError::File`] of kind "not found").
pub fn check_output(target: Target<'_>, output: &str, uids: &RangeInclusive<u32>) -> Result<(), CanonError> {
    let name = target.checked_name("getting status of")?;
    let status = Status::at(target.dir, name.as_c_str()).at("getting status of", target.path())?;
    let writable = status.kind != FileType::Symlink && status.mode & 0o022 != 0;
    if writable || !uids.contains(&status.uid) {
        return Err(CanonError::Suspicious { path: target.path(), output: output.to_owned() });
    }
    Ok(())
}

/// The permissions that are left of `mode` (without type bits).
pub const fn canonical_mode(mode: u32) -> u32 {
    if mode & 0o100 == 0 { 0o444 } else { 0o555 }
}

/// A directory whose entries are done, and whose subdirectories are not.
struct Level {
    /// Closed while we are far below; opened again through `..`.
    fd: Option<Rc<OwnedFd>>,
    id: FileId,
    name: CString,
    subdirs: Vec<(CString, FileId)>,
}

struct Canon<'a> {
    target: Target<'a>,
    options: &'a CanonOptions<'a>,
    seen: &'a mut Seen,
    uid: Uid,
    gid: Gid,
    levels: Vec<Level>,
    buffer: Vec<u8>,
    attributes: Vec<u8>,
    attribute_path: Vec<u8>,
}

impl Canon<'_> {
    fn walk(&mut self) -> Result<(), CanonError> {
        while let Some(level) = self.levels.last_mut() {
            let Some((name, id)) = level.subdirs.pop() else {
                self.leave()?;
                continue;
            };
            let fd = level.fd.clone().expect("only levels far above are closed");
            self.enter(fd.as_fd(), name, id)?;
            let far = self.levels.len().checked_sub(MAX_OPEN + 1).and_then(|n| self.levels.get_mut(n));
            if let Some(far) = far {
                far.fd = None;
            }
        }
        Ok(())
    }

    /// Back to the parent, which may have been closed meanwhile.
    fn leave(&mut self) -> Result<(), CanonError> {
        let (Some(done), Some(parent)) = (self.levels.pop(), self.levels.last_mut()) else { return Ok(()) };
        if let (None, Some(fd)) = (&parent.fd, &done.fd) {
            let opened = open_dir(fd.as_fd(), c"..").and_then(|up| Ok((Status::of(up.as_fd())?.id, up)));
            match opened {
                Ok((id, up)) if id == parent.id => parent.fd = Some(Rc::new(up)),
                Ok(_) => return Err(self.replaced(None)),
                Err(e) => return Err(self.error("opening directory", None, e)),
            }
        }
        Ok(())
    }

    /// Does all entries of a directory, which is canonical itself.
    fn enter(&mut self, parent: BorrowedFd<'_>, name: CString, id: FileId) -> Result<(), CanonError> {
        let fd = match open_dir(parent, name.as_c_str()) {
            Ok(fd) => fd,
            Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => return Err(self.replaced(Some(&name))),
            Err(e) => return Err(self.error("opening directory", Some(&name), e)),
        };
        match Status::of(fd.as_fd()) {
            Ok(status) if status.id == id => {}
            Ok(_) => return Err(self.replaced(Some(&name))),
            Err(e) => return Err(self.error("getting status of", Some(&name), e)),
        }
        let fd = Rc::new(fd);
        self.levels.push(Level { fd: Some(Rc::clone(&fd)), id, name, subdirs: Vec::new() });
        let mut subdirs = Vec::new();
        let mut names = Vec::new();
        let mut buffer = std::mem::take(&mut self.buffer);
        while !read_names(fd.as_fd(), &mut buffer, &mut names)
            .map_err(|e| self.error("reading directory", None, e))?
            .none
        {
            for (name, _) in names.drain(..) {
                if let Some(id) = self.entry(fd.as_fd(), &name)? {
                    subdirs.push((name, id));
                }
            }
        }
        self.buffer = buffer;
        if let Some(level) = self.levels.last_mut() {
            level.subdirs = subdirs;
        }
        Ok(())
    }

    /// Does one entry. What it is, if it is a directory.
    fn entry(&mut self, dir: BorrowedFd<'_>, name: &CStr) -> Result<Option<FileId>, CanonError> {
        let status = Status::at(dir, name).map_err(|e| self.error("getting status of", Some(name), e))?;
        let is_dir = status.kind == FileType::Directory;
        if !is_dir && !matches!(status.kind, FileType::RegularFile | FileType::Symlink) {
            return Err(CanonError::UnsupportedType { path: self.path(Some(name)) });
        }
        if let Origin::Builder(uids) = self.options.origin {
            if !uids.contains(&status.uid) {
                if is_dir || !self.seen.0.contains(&status.id) {
                    return Err(CanonError::InvalidOwnership { path: self.path(Some(name)) });
                }
                return Ok(None);
            }
            if !is_dir && status.links > 1 {
                self.seen.0.insert(status.id);
            }
        }
        let extra = self.extra_attributes(dir, name)?;
        if !extra.is_empty() || status.frozen || !self.is_canonical(&status) {
            if status.kind == FileType::Symlink {
                self.change_symlink(dir, name, &status, &extra)?;
            } else {
                self.change(dir, name, &status, &extra)?;
            }
        }
        Ok(is_dir.then_some(status.id))
    }

    fn is_canonical(&self, status: &Status) -> bool {
        status.uid == self.uid.as_raw()
            && (status.kind == FileType::Symlink || status.mode == 0o444 || status.mode == 0o555)
            && (status.mtime_s, status.mtime_ns) == (MTIME_S, 0)
    }

    /// The names of the attributes that have to go. Mostly there is none at all.
    fn extra_attributes(&mut self, dir: BorrowedFd<'_>, name: &CStr) -> Result<Vec<CString>, CanonError> {
        below_proc(dir, name, &mut self.attribute_path);
        let mut listed = rustix::fs::llistxattr(self.attribute_path.as_slice(), self.attributes.as_mut_slice());
        if matches!(listed, Err(Errno::NOENT)) {
            // No /proc here.
            listed = open_plain(dir, name).and_then(|fd| rustix::fs::flistxattr(fd, self.attributes.as_mut_slice()));
        }
        let length = match listed {
            Ok(length) => length,
            // The last is for a symlink without /proc.
            Err(Errno::OPNOTSUPP | Errno::NODATA | Errno::NOSYS | Errno::LOOP) => 0,
            Err(e) => return Err(self.error("querying extended attributes of", Some(name), e)),
        };
        let names = self.attributes.get(..length).unwrap_or_default().split(|b| *b == 0).filter(|n| !n.is_empty());
        let extra = names.filter(|n| !self.options.ignored_acls.iter().any(|i| i.as_bytes() == *n));
        Ok(extra.map(|n| CString::new(n).expect("cut at NUL")).collect())
    }

    /// Changes a regular file or a directory.
    fn change(&self, dir: BorrowedFd<'_>, name: &CStr, status: &Status, extra: &[CString]) -> Result<(), CanonError> {
        let error = |doing, e| self.error(doing, Some(name), e);
        let fd = match open_plain(dir, name) {
            // Without privileges, and not readable for its owner. A name that is changed under us
            // now can only lead to files that are ours anyway.
            Err(Errno::ACCESS) if !self.uid.is_root() => {
                let readable = Mode::from_raw_mode(status.mode | 0o400);
                rustix::fs::chmodat(dir, name, readable, AtFlags::empty()).map_err(|e| error("changing mode of", e))?;
                open_plain(dir, name)
            }
            other => other,
        };
        let fd = match fd {
            Err(Errno::LOOP | Errno::NOENT | Errno::NXIO) => return Err(self.replaced(Some(name))),
            other => other.map_err(|e| error("opening file", e))?,
        };
        let mut status = Status::of(fd.as_fd())
            .map_err(|e| error("getting status of", e))
            .and_then(|found| if found.id == status.id { Ok(found) } else { Err(self.replaced(Some(name))) })?;
        if status.frozen {
            clear_frozen(&fd).map_err(|e| error("clearing flags of", e))?;
        }
        for attribute in extra {
            let removed = rustix::fs::fremovexattr(&fd, attribute.as_c_str());
            self.attribute_removed(removed, name, attribute)?;
        }
        if status.uid != self.uid.as_raw() {
            // First, so that the old owner can undo nothing of the rest.
            rustix::fs::fchown(&fd, Some(self.uid), Some(self.gid)).map_err(|e| error("changing owner of", e))?;
        }
        if !extra.is_empty() || status.uid != self.uid.as_raw() {
            // Both may have changed the mode.
            status = Status::of(fd.as_fd()).map_err(|e| error("getting status of", e))?;
        }
        if status.mode != 0o444 && status.mode != 0o555 {
            let mode = Mode::from_raw_mode(canonical_mode(status.mode));
            rustix::fs::fchmod(&fd, mode).map_err(|e| error("changing mode of", e))?;
        }
        if (status.mtime_s, status.mtime_ns) != (MTIME_S, 0) {
            rustix::fs::futimens(&fd, &canonical_times()).map_err(|e| error("changing modification time of", e))?;
        }
        Ok(())
    }

    /// A symlink cannot be opened so that this works on what is open, but then it can hurt nobody
    /// to become ours, or old.
    fn change_symlink(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        status: &Status,
        extra: &[CString],
    ) -> Result<(), CanonError> {
        let error = |doing, e| self.error(doing, Some(name), e);
        for attribute in extra {
            let removed = rustix::fs::lremovexattr(self.attribute_path.as_slice(), attribute.as_c_str());
            self.attribute_removed(removed, name, attribute)?;
        }
        if status.uid != self.uid.as_raw() {
            rustix::fs::chownat(dir, name, Some(self.uid), Some(self.gid), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| error("changing owner of", e))?;
        }
        if (status.mtime_s, status.mtime_ns) != (MTIME_S, 0) {
            rustix::fs::utimensat(dir, name, &canonical_times(), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|e| error("changing modification time of", e))?;
        }
        Ok(())
    }

    fn attribute_removed(
        &self,
        removed: rustix::io::Result<()>,
        name: &CStr,
        attribute: &CStr,
    ) -> Result<(), CanonError> {
        match removed {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(CanonError::Attribute {
                path: self.path(Some(name)),
                attribute: attribute.to_string_lossy().into_owned(),
                source: e.into(),
            }),
        }
    }

    fn error(&self, doing: &'static str, name: Option<&CStr>, e: Errno) -> CanonError {
        FileError::new(doing, self.path(name), e).into()
    }

    fn replaced(&self, name: Option<&CStr>) -> CanonError {
        CanonError::Replaced { path: self.path(name) }
    }

    fn path(&self, name: Option<&CStr>) -> PathBuf {
        let mut path = self.target.dir_path.to_owned();
        let names = self.levels.iter().map(|level| level.name.as_c_str()).chain(name);
        path.extend(names.map(|name| OsStr::from_bytes(name.to_bytes())));
        path
    }
}

fn canonical_times() -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: MTIME_S, tv_nsec: 0 },
    }
}

/// Opens a file that is regular or a directory. Should it be another by now, then without side
/// effects.
fn open_plain(dir: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    retry(|| rustix::fs::openat(dir, name, flags, Mode::empty()))
}

/// A path for calls that exist without a directory descriptor only.
fn below_proc(dir: BorrowedFd<'_>, name: &CStr, path: &mut Vec<u8>) {
    path.clear();
    path.extend_from_slice(b"/proc/self/fd/");
    path.extend_from_slice(dir.as_raw_fd().to_string().as_bytes());
    path.push(b'/');
    path.extend_from_slice(name.to_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remove::{OnFailure, remove_path};
    use crate::testing::{
        self, child, child_argument, finish, give_away, is_root, memory_dir, open, public_dir, root_or_skip,
        unprivileged,
    };
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink};
    use std::path::Path;
    use std::process::Command;

    const BUILDER: u32 = 30_001;

    fn canon(dir: &Path, name: &str, origin: &Origin, seen: &mut Seen) -> Result<(), CanonError> {
        let fd = open(dir);
        let ignored = ["security.selinux".to_owned(), "user.stays".to_owned()];
        let target = Target { dir: fd.as_fd(), name: OsStr::new(name), dir_path: dir };
        canonicalise(target, &CanonOptions { origin, ignored_acls: &ignored }, seen)
    }

    fn trusted(dir: &Path, name: &str) -> Result<(), CanonError> {
        canon(dir, name, &Origin::Trusted, &mut Seen::default())
    }

    fn by_builder(dir: &Path, name: &str, seen: &mut Seen) -> Result<(), CanonError> {
        canon(dir, name, &Origin::Builder(BUILDER..=BUILDER + 9), seen)
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn assert_canonical(path: &Path, mode: u32) {
        let status = fs::symlink_metadata(path).unwrap();
        let mode = if status.is_symlink() { 0o777 } else { mode };
        let found = (status.mode() & 0o7777, status.mtime(), status.mtime_nsec(), status.uid());
        assert_eq!(found, (mode, 1, 0, rustix::process::geteuid().as_raw()), "{path:?}");
    }

    #[test]
    fn vectors() {
        let text = fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/canonical_metadata.json")).unwrap();
        let all: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let cases = all["cases"].as_array().unwrap();
        for case in cases {
            let id = case["id"].as_str().unwrap();
            let mode = |key: &str| u32::from_str_radix(case[key].as_str().unwrap(), 8).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("out");
            let path = out.join("entry");
            fs::create_dir(&out).unwrap();
            match case["kind"].as_str().unwrap() {
                "dir" => fs::create_dir(&path).unwrap(),
                "file" => fs::write(&path, b"").unwrap(),
                other => panic!("{id}: {other}"),
            }
            if is_root() {
                lchown(&out, Some(BUILDER), Some(BUILDER)).unwrap();
                lchown(&path, Some(BUILDER), Some(BUILDER)).unwrap();
            }
            chmod(&path, mode("mode_before"));
            let origin = if is_root() { Origin::Builder(BUILDER..=BUILDER) } else { Origin::Trusted };
            canon(dir.path(), "out", &origin, &mut Seen::default()).unwrap_or_else(|e| panic!("{id}: {e}"));
            let status = fs::symlink_metadata(&path).unwrap();
            assert_eq!(status.mode() & 0o7777, mode("mode_after"), "{id}");
            assert_eq!(status.mtime(), case["mtime_after"].as_i64().unwrap(), "{id}");
            if is_root() {
                assert_eq!(u64::from(status.uid()), case["uid_after"].as_u64().unwrap(), "{id}");
            }
            assert_canonical(&out, 0o555);
        }
        println!("canonical_metadata: {} cases", cases.len());
    }

    #[test]
    fn every_mode() {
        for mode in 0..0o10000 {
            let expected = match mode {
                0o444 | 0o555 => mode,
                _ => 0o444 | if mode & 0o100 == 0 { 0 } else { 0o111 },
            };
            assert_eq!(canonical_mode(mode), expected, "{mode:o}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for (before, after) in [(0o4755, 0o555), (0o2444, 0o444), (0o1777, 0o555), (0o7000, 0o444), (0o101, 0o555)] {
            fs::write(&path, b"#!").unwrap();
            chmod(&path, before);
            trusted(dir.path(), "file").unwrap();
            assert_canonical(&path, after);
            fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn whole_trees() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::write(tree.join("a/b/file"), b"x").unwrap();
        symlink("/nowhere", tree.join("a/link")).unwrap();
        symlink(dir.path().join("outside"), tree.join("out")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        let before = fs::metadata(dir.path().join("outside")).unwrap();
        let accessed = fs::metadata(tree.join("a/b/file")).unwrap().atime();
        trusted(dir.path(), "tree").unwrap();
        for (path, mode) in [("", 0o555), ("a", 0o555), ("a/b", 0o555), ("a/b/file", 0o444), ("a/link", 0), ("out", 0)]
        {
            assert_canonical(&tree.join(path), mode);
        }
        assert_eq!(fs::metadata(tree.join("a/b/file")).unwrap().atime(), accessed);
        let after = fs::metadata(dir.path().join("outside")).unwrap();
        assert_eq!((before.mode(), before.mtime_nsec()), (after.mode(), after.mtime_nsec()));
        // A second time nothing is changed, not even the time of change.
        let changed = fs::metadata(&tree).unwrap();
        trusted(dir.path(), "tree").unwrap();
        let again = fs::metadata(&tree).unwrap();
        assert_eq!((changed.ctime(), changed.ctime_nsec()), (again.ctime(), again.ctime_nsec()));
        // Time with a fraction of a second is not canonical.
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: 1, tv_nsec: 5 },
        };
        rustix::fs::utimensat(rustix::fs::CWD, &tree, &times, AtFlags::empty()).unwrap();
        trusted(dir.path(), "tree").unwrap();
        assert_canonical(&tree, 0o555);
        let e = trusted(dir.path(), "nothing").unwrap_err();
        assert_eq!(e.to_string(), format!("getting status of '{}/nothing'", dir.path().display()));
        assert!(trusted(dir.path(), "..").is_err());
    }

    #[test]
    fn unsupported_types() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tree")).unwrap();
        let path = dir.path().join("tree/odd");
        let expected = format!("file '{}' has an unsupported type", path.display());
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        assert_eq!(trusted(dir.path(), "tree").unwrap_err().to_string(), expected);
        // It may be closed by now.
        let open = || {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(dir.path().join("tree"), mode).unwrap();
        };
        open();
        fs::remove_file(&path).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert_eq!(trusted(dir.path(), "tree").unwrap_err().to_string(), expected);
        open();
        fs::remove_file(&path).unwrap();
        if root_or_skip("unsupported_types: device") {
            let device = rustix::fs::makedev(1, 3);
            rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, Mode::RWXU, device).unwrap();
            assert_eq!(trusted(dir.path(), "tree").unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn attributes_go_but_for_the_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        let set = |name: &str| rustix::fs::setxattr(&file, name, b"v", rustix::fs::XattrFlags::empty());
        if set("user.goes").is_err() {
            println!("attributes_go_but_for_the_ignored: skipped, no attributes here");
            return;
        }
        set("user.stays").unwrap();
        trusted(dir.path(), "file").unwrap();
        let mut names = [0; 1000];
        let length = rustix::fs::listxattr(&file, &mut names).unwrap();
        let left: Vec<_> =
            names[..length].split(|b| *b == 0).filter(|n| !n.is_empty() && !n.starts_with(b"security")).collect();
        assert_eq!(left, [b"user.stays"]);
        assert_canonical(&file, 0o444);
        // Attributes alone, on what is canonical otherwise; also on a symlink.
        if is_root() {
            chmod(&file, 0o444);
            symlink("x", dir.path().join("link")).unwrap();
            rustix::fs::setxattr(&file, "trusted.x", b"v", rustix::fs::XattrFlags::empty()).unwrap();
            rustix::fs::lsetxattr(dir.path().join("link"), "trusted.x", b"v", rustix::fs::XattrFlags::empty()).unwrap();
            for name in ["file", "link"] {
                trusted(dir.path(), name).unwrap();
                let path = dir.path().join(name);
                assert!(rustix::fs::lgetxattr(&path, "trusted.x", &mut [0; 9]).is_err());
                assert_canonical(&path, 0o444);
            }
        }
        // An access control list: user 1234 may write. The group bits of the mode are its mask.
        let entry =
            |tag: u16, bits: u16, id: u32| [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat();
        let none = u32::MAX;
        let list = [
            2u32.to_le_bytes().to_vec(),
            entry(1, 6, none),
            entry(2, 7, 1234),
            entry(4, 4, none),
            entry(16, 7, none),
            entry(32, 4, none),
        ]
        .concat();
        if rustix::fs::setxattr(&file, "system.posix_acl_access", &list, rustix::fs::XattrFlags::empty()).is_ok() {
            trusted(dir.path(), "file").unwrap();
            assert!(rustix::fs::getxattr(&file, "system.posix_acl_access", &mut [0; 99]).is_err());
            assert_canonical(&file, 0o444);
        }
    }

    #[test]
    fn s082_clears_frozen_flags() {
        if !root_or_skip("s082_clears_frozen_flags") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("tree")).unwrap();
        fs::write(dir.path().join("tree/file"), b"x").unwrap();
        for path in ["tree/file", "tree"] {
            let changed = Command::new("chattr").arg("+ia").arg(dir.path().join(path)).status();
            if !changed.is_ok_and(|status| status.success()) {
                println!("s082_clears_frozen_flags: skipped, chattr does not work here");
                return;
            }
        }
        let result = trusted(dir.path(), "tree");
        remove_path(&dir.path().join("tree"), OnFailure::Stop).unwrap_or_else(|e| panic!("{e}"));
        result.unwrap();
    }

    /// A hard link to a file of somebody else is refused, and that file is not touched.
    #[test]
    fn s063_foreign_files() {
        if !root_or_skip("s063_foreign_files") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        fs::write(&secret, b"x").unwrap();
        chmod(&secret, 0o600);
        let before = fs::metadata(&secret).unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        fs::hard_link(&secret, out.join("foo")).unwrap();
        lchown(&out, Some(BUILDER), Some(BUILDER)).unwrap();
        let e = by_builder(dir.path(), "out", &mut Seen::default()).unwrap_err();
        assert_eq!(e.to_string(), format!("invalid ownership on file '{}/foo'", out.display()));
        let after = fs::metadata(&secret).unwrap();
        assert_eq!((before.mode(), before.mtime_nsec(), before.uid()), (after.mode(), after.mtime_nsec(), after.uid()));
        // Directories are never somebody else's; a symlink of somebody else is as bad as a file.
        fs::remove_file(out.join("foo")).unwrap();
        lchown(&out, Some(BUILDER), Some(BUILDER)).unwrap();
        fs::create_dir(out.join("dir")).unwrap();
        assert!(matches!(
            by_builder(dir.path(), "out", &mut Seen::default()),
            Err(CanonError::InvalidOwnership { .. })
        ));
        fs::remove_dir(out.join("dir")).unwrap();
        lchown(&out, Some(BUILDER), Some(BUILDER)).unwrap();
        symlink("x", out.join("link")).unwrap();
        assert!(matches!(
            by_builder(dir.path(), "out", &mut Seen::default()),
            Err(CanonError::InvalidOwnership { .. })
        ));
        lchown(out.join("link"), Some(BUILDER + 1), Some(BUILDER)).unwrap();
        lchown(&out, Some(BUILDER), Some(BUILDER)).unwrap();
        by_builder(dir.path(), "out", &mut Seen::default()).unwrap();
        assert_canonical(&out.join("link"), 0);
    }

    #[test]
    fn s064_hard_links_within_a_build() {
        if !root_or_skip("s064_hard_links_within_a_build") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        for name in ["out", "dev"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            lchown(dir.path().join(name), Some(BUILDER), Some(BUILDER)).unwrap();
        }
        let file = dir.path().join("out/a");
        fs::write(&file, b"x").unwrap();
        lchown(&file, Some(BUILDER), Some(BUILDER)).unwrap();
        fs::hard_link(&file, dir.path().join("out/b")).unwrap();
        fs::hard_link(&file, dir.path().join("dev/c")).unwrap();
        let mut seen = Seen::default();
        by_builder(dir.path(), "out", &mut seen).unwrap();
        by_builder(dir.path(), "dev", &mut seen).unwrap();
        assert_canonical(&dir.path().join("dev/c"), 0o444);
        // Without the memory of the first output the file is somebody else's.
        lchown(dir.path().join("dev"), Some(BUILDER), Some(BUILDER)).unwrap();
        assert!(by_builder(dir.path(), "dev", &mut Seen::default()).is_err());
    }

    #[test]
    fn s065_suspicious_outputs() {
        let dir = tempfile::tempdir().unwrap();
        let fd = open(dir.path());
        let us = rustix::process::geteuid().as_raw();
        let check = |uids: RangeInclusive<u32>| {
            check_output(Target { dir: fd.as_fd(), name: OsStr::new("out"), dir_path: dir.path() }, "dev", &uids)
        };
        let out = dir.path().join("out");
        assert!(matches!(check(us..=us), Err(CanonError::File(e)) if e.kind() == io::ErrorKind::NotFound));
        fs::write(&out, b"").unwrap();
        for (mode, good) in
            [(0o644, true), (0o700, true), (0o666, false), (0o775, false), (0o602, false), (0o755, true)]
        {
            chmod(&out, mode);
            assert_eq!(check(us..=us).is_ok(), good, "{mode:o}");
        }
        let text = format!(
            "suspicious ownership or permission on '{}' for output 'dev'; rejecting this build output",
            out.display()
        );
        assert_eq!(check(us + 1..=us + 2).unwrap_err().to_string(), text);
        fs::remove_file(&out).unwrap();
        symlink("x", &out).unwrap();
        check(us..=us).unwrap();
    }

    /// As any user, on one's own files, readable or not.
    #[test]
    fn without_privileges() {
        let dir = public_dir();
        let store = dir.path().join("store");
        for path in ["", "tree", "tree/sub"] {
            fs::create_dir(store.join(path)).unwrap();
            give_away(&store.join(path));
        }
        for (name, mode) in [("file", 0o000), ("exec", 0o300), ("fine", 0o644)] {
            fs::write(store.join("tree/sub").join(name), b"x").unwrap();
            give_away(&store.join("tree/sub").join(name));
            chmod(&store.join("tree/sub").join(name), mode);
        }
        chmod(&store.join("tree/sub"), 0o100);
        unprivileged(|| {
            trusted(&store, "tree").unwrap();
            let uid = rustix::process::geteuid().as_raw();
            for (path, mode) in [("file", 0o444), ("exec", 0o555), ("fine", 0o444), ("", 0o555)] {
                let status = fs::metadata(store.join("tree/sub").join(path)).unwrap();
                assert_eq!((status.mode() & 0o7777, status.mtime(), status.uid()), (mode, 1, uid), "{path}");
            }
        });
    }

    /// 30,000 levels, few descriptors, little stack; and the entries beside the way down.
    #[test]
    fn deep_trees() {
        if let Some(dir) = child_argument() {
            let dir = Path::new(&dir);
            let mut fd = open(dir);
            for _ in 0..30_000 {
                rustix::fs::mkdirat(&fd, "d", Mode::from_raw_mode(0o700)).unwrap();
                rustix::fs::mkdirat(&fd, "e", Mode::from_raw_mode(0o700)).unwrap();
                rustix::fs::mkdirat(&fd, "e/f", Mode::from_raw_mode(0o700)).unwrap_or_default();
                fd = rustix::fs::openat(&fd, "d", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
            }
            trusted(dir, "d").unwrap();
            let mut fd = open(dir);
            let mut depth = 0;
            while let Ok(next) = open_dir(fd.as_fd(), c"d") {
                let beside = [Status::at(next.as_fd(), c"e"), Status::at(next.as_fd(), c"e/f")];
                for status in beside.into_iter().chain([Status::of(next.as_fd())]).flatten() {
                    assert_eq!((status.mode, status.mtime_s), (0o555, 1), "{depth}");
                }
                depth += 1;
                fd = next;
            }
            assert_eq!(depth, 30_000);
            drop(fd);
            for name in ["d", "e"] {
                remove_path(&dir.join(name), OnFailure::Stop).unwrap();
            }
            return;
        }
        let _alone = testing::deep_trees();
        let dir = memory_dir();
        finish(child("canon::tests::deep_trees", dir.path().to_str().unwrap(), "ulimit -n 80; ulimit -s 256"));
    }
}
