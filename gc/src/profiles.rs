//! Generations of profiles: which there are, and which of them are old.
//!
//! `DIR/NAME` is a symlink to `NAME-N-link`, the current generation; each `NAME-N-link` points to a
//! store path and is a root. Shared with Nix. Source: formats, section 10.4; cli, section 7.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use larder_fs::file_error::{At as _, FileError};
use larder_fs::lock_file::Wait;
use larder_fs::path_lock::{HeldLocks, OnRelease, PathLocks};
use rustix::fs::{AtFlags, FileType};
use rustix::io::Errno;

/// A generation of a profile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    pub number: u64,
    pub link: PathBuf,
    /// When it became the current one: the time of the link, in seconds since 1970.
    pub time_s: i64,
}

/// Which generations are to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// All but the current one.
    Old,
    /// Those that were superseded before this time, in seconds since 1970.
    SupersededBefore(i64),
}

/// The numbers of the generations that go, in the order in which they do. Pure.
///
/// The current one stays. The newest that is older than the limit stays too, as it was in use then.
pub fn doomed(generations: &[Generation], current: u64, which: Which) -> Vec<u64> {
    let mut numbers: Vec<&Generation> = generations.iter().collect();
    numbers.sort_unstable_by_key(|generation| generation.number);
    match which {
        Which::Old => numbers.iter().map(|g| g.number).filter(|n| *n != current).collect(),
        Which::SupersededBefore(limit_s) => {
            let older = numbers.iter().rev().skip_while(|g| g.time_s >= limit_s).skip(1);
            older.map(|g| g.number).filter(|n| *n != current).collect()
        }
    }
}

/// `NAME-N-link`: the number, if that is what it is.
fn number(profile: &OsStr, name: &OsStr) -> Option<u64> {
    let rest = name.as_bytes().strip_prefix(profile.as_bytes())?.strip_prefix(b"-")?;
    let end = rest.windows(5).position(|w| w == b"-link")?;
    let digits = str::from_utf8(rest.get(..end)?).ok()?;
    if digits.starts_with('+') { None } else { digits.parse().ok() }
}

/// The profiles below a directory: symlinks that speak of links, in directories that we may write to.
///
/// What cannot be read is passed over: it is not ours to clean.
pub fn find(top: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![top.to_owned()];
    while let Some(dir) = todo.pop() {
        let writable =
            rustix::fs::accessat(rustix::fs::CWD, &dir, rustix::fs::Access::WRITE_OK, AtFlags::EACCESS).is_ok();
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                todo.push(entry.path());
            } else if kind.is_symlink()
                && writable
                && std::fs::read_link(entry.path()).is_ok_and(|target| contains(target.as_os_str(), b"link"))
            {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

fn contains(text: &OsStr, part: &[u8]) -> bool {
    text.as_bytes().windows(part.len()).any(|w| w == part)
}

/// The generations of a profile, ascending, and the number of the current one.
pub fn generations(profile: &Path) -> Result<(Vec<Generation>, Option<u64>), FileError> {
    const DOING: &str = "reading directory";
    let (Some(dir), Some(name)) = (profile.parent(), profile.file_name()) else {
        return Err(FileError::new(DOING, profile, Errno::INVAL));
    };
    let mut all = Vec::new();
    for entry in std::fs::read_dir(dir).at(DOING, dir)? {
        let entry = entry.at(DOING, dir)?;
        let Some(number) = number(name, &entry.file_name()) else { continue };
        let link = entry.path();
        let status = match rustix::fs::lstat(&link) {
            Err(Errno::NOENT) => continue,
            status => status.at("getting status of", &link)?,
        };
        if FileType::from_raw_mode(status.st_mode) == FileType::Symlink {
            all.push(Generation { number, link, time_s: status.st_mtime });
        }
    }
    all.sort_unstable_by_key(|generation| generation.number);
    let target = std::fs::read_link(profile).at("reading symlink", profile)?;
    let current = target.file_name().and_then(|target| number(name, target));
    Ok((all, current))
}

/// Deletes generations; `each` hears of every number before it goes. Others who change the profile
/// are kept out meanwhile.
pub fn delete_old(profile: &Path, which: Which, dry_run: bool, mut each: impl FnMut(u64)) -> Result<(), FileError> {
    let locks = if dry_run {
        None
    } else {
        let mut locks = PathLocks::acquire([profile], &HeldLocks::default(), Wait::Yes(&mut |_| {}))?;
        if let Some(locks) = &mut locks {
            locks.on_release(OnRelease::Delete);
        }
        locks
    };
    let (all, current) = generations(profile)?;
    // Without a current one nobody can tell which are old.
    let Some(current) = current else { return Ok(()) };
    for number in doomed(&all, current, which) {
        each(number);
        let Some(generation) = all.iter().find(|g| g.number == number).filter(|_| !dry_run) else { continue };
        match rustix::fs::unlink(&generation.link) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(e) => return Err(FileError::new("deleting", &generation.link, e)),
        }
    }
    locks.map_or(Ok(()), PathLocks::release)
}

/// The name of a generation's link.
pub fn link_name(profile: &OsStr, number: u64) -> OsString {
    let mut name = profile.to_owned();
    name.push(format!("-{number}-link"));
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn all(times: &[(u64, i64)]) -> Vec<Generation> {
        times
            .iter()
            .map(|(number, time_s)| Generation { number: *number, link: PathBuf::new(), time_s: *time_s })
            .collect()
    }

    #[test]
    fn which_are_old() {
        let five = all(&[(1, 10), (2, 20), (3, 30), (4, 40), (7, 70)]);
        assert_eq!(doomed(&five, 7, Which::Old), [1, 2, 3, 4]);
        assert_eq!(doomed(&five, 2, Which::Old), [1, 3, 4, 7]);
        // 3 was in use at 35.
        assert_eq!(doomed(&five, 7, Which::SupersededBefore(35)), [2, 1]);
        assert_eq!(doomed(&five, 1, Which::SupersededBefore(35)), [2]);
        assert_eq!(doomed(&five, 7, Which::SupersededBefore(0)), [0u64; 0]);
        assert_eq!(doomed(&five, 7, Which::SupersededBefore(100)), [4, 3, 2, 1]);
        assert_eq!(doomed(&[], 1, Which::Old), [0u64; 0]);
    }

    #[test]
    fn names() {
        let of = |name: &str| number(OsStr::new("p"), OsStr::new(name));
        assert_eq!(of("p-12-link"), Some(12));
        assert_eq!(of("p-12-link-tmp"), Some(12));
        for no in
            ["p", "p-link", "p-x-link", "q-1-link", "p-+1-link", "p--link", "p-1-lin", "p-99999999999999999999-link"]
        {
            assert_eq!(of(no), None, "{no}");
        }
        assert_eq!(link_name(OsStr::new("p"), 12), "p-12-link");
    }

    #[test]
    fn finds_and_deletes() {
        let dir = tempfile::tempdir().unwrap();
        let sub = dir.path().join("per-user/me");
        std::fs::create_dir_all(&sub).unwrap();
        for n in 1..=3 {
            symlink("/nix/store/x", sub.join(format!("p-{n}-link"))).unwrap();
        }
        symlink("p-2-link", sub.join("p")).unwrap();
        symlink("elsewhere", sub.join("q")).unwrap();
        assert_eq!(find(dir.path()), [sub.join("p")]);
        let mut heard = Vec::new();
        delete_old(&sub.join("p"), Which::Old, true, |n| heard.push(n)).unwrap();
        assert_eq!((heard.as_slice(), std::fs::read_dir(&sub).unwrap().count()), (&[1, 3][..], 5));
        delete_old(&sub.join("p"), Which::Old, false, |_| {}).unwrap();
        let (left, current) = generations(&sub.join("p")).unwrap();
        assert_eq!((left.len(), left[0].number, current), (1, 2, Some(2)));
        assert_eq!(std::fs::read_dir(&sub).unwrap().count(), 3, "no lock file is left");
    }
}
