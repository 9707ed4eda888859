//! What running processes use, from `/proc`.
//!
//! Source: gc, section 1, "Runtime roots". Processes come and go, and some are closed to us:
//! whatever of one cannot be read is passed over, and the others are read nevertheless.

use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr};
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_fs::file_error::FileError;
use memchr::memmem;
use rustix::fs::{CWD, Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::roots::{Root, RootKind};

/// Programs that the kernel starts.
const KERNEL_FILES: [&str; 3] = ["modprobe", "fbsplash", "poweroff_cmd"];

/// So many are worth a thread, threads of the kernel included, of which there is not much to read.
const PROCESSES_A_THREAD: usize = 64;

/// Store paths that processes use (valid or not), and errors that may hide some: no memory, no
/// descriptors, but not that a process has ended or is closed to us. Without `/proc` there are none.
pub fn candidates(store_dir: &StoreDir, proc: &Path) -> (Vec<Root>, Vec<FileError>) {
    let mut found = Uses::new(store_dir, proc.join("sys/kernel"));
    for name in KERNEL_FILES {
        let path = proc.join("sys/kernel").join(name);
        match std::fs::read(&path) {
            Ok(text) => found.add(name, text.trim_ascii_end()),
            Err(e) => found.failed("reading", name, Errno::from_io_error(&e).unwrap_or(Errno::IO)),
        }
    }
    let mut pids = Vec::new();
    match open_dir(CWD, proc.as_os_str()).and_then(Dir::new) {
        Err(e) => found.failed("reading directory", "", e),
        Ok(entries) => {
            for entry in entries {
                match entry {
                    Ok(entry) if is_number(entry.file_name()) => pids.push(entry.file_name().to_owned()),
                    Ok(_) => {}
                    Err(e) => found.failed("reading directory", "", e),
                }
            }
        }
    }
    // Plain threads: those of a pool would look for work, at length, when there is none left.
    let next = AtomicUsize::new(0);
    let some = || {
        let (mut found, mut failures) = (BTreeSet::new(), Vec::new());
        let mut buffer = Vec::new();
        while let Some(pid) = pids.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut uses = Uses::new(store_dir, proc.join(OsStr::from_bytes(pid.to_bytes())));
            uses.process(&mut buffer);
            found.extend(uses.found);
            failures.extend(uses.failures);
        }
        (found, failures)
    };
    let helpers = std::thread::available_parallelism().map_or(1, NonZero::get).min(pids.len() / PROCESSES_A_THREAD);
    let mut add = |(more, failed): (BTreeSet<_>, Vec<_>)| {
        found.found.extend(more);
        found.failures.extend(failed);
    };
    std::thread::scope(|scope| {
        // If there can be no more threads, this one does it all.
        let builder = || std::thread::Builder::new().name("processes".to_owned());
        let helpers: Vec<_> = (1..helpers).map_while(|_| builder().spawn_scoped(scope, some).ok()).collect();
        add(some());
        for helper in helpers {
            add(helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
    });
    let roots = found.found.into_iter().map(|(link, path)| Root { link, path, kind: RootKind::Runtime });
    (roots.collect(), found.failures)
}

/// The uses of one process.
struct Uses<'a> {
    store_dir: &'a StoreDir,
    /// `/proc/PID`.
    dir: PathBuf,
    found: BTreeSet<(PathBuf, StorePath)>,
    failures: Vec<FileError>,
}

impl<'a> Uses<'a> {
    fn new(store_dir: &'a StoreDir, dir: PathBuf) -> Self {
        Self { store_dir, dir, found: BTreeSet::new(), failures: Vec::new() }
    }

    /// `buffer` is scratch space.
    fn process(&mut self, buffer: &mut Vec<u8>) {
        // Threads of the kernel, and what has ended, have no program, nor files. They are many.
        if rustix::fs::readlink(self.dir.join("exe"), Vec::new()) == Err(Errno::NOENT) {
            return;
        }
        // All from one directory: the number may be another process's the next moment.
        let dir = match open_dir(CWD, self.dir.as_os_str()) {
            Ok(dir) => dir,
            Err(e) => return self.failed("opening directory", "", e),
        };
        // It has ended meanwhile.
        if self.link(dir.as_fd(), "exe", "exe") == Err(Errno::NOENT) {
            return;
        }
        let _ = self.link(dir.as_fd(), "cwd", "cwd");
        self.descriptors(&dir);
        let finder = memmem::Finder::new(self.store_dir.as_str());
        match read(dir.as_fd(), "maps", buffer) {
            Ok(()) if finder.find(buffer).is_none() => {}
            Ok(()) => buffer.split(|b| *b == b'\n').filter_map(mapped_file).for_each(|file| self.add("maps", file)),
            Err(e) => self.failed("reading", "maps", e),
        }
        match read(dir.as_fd(), "environ", buffer) {
            Ok(()) => self.environment(buffer),
            Err(e) => self.failed("reading", "environ", e),
        }
    }

    fn descriptors(&mut self, dir: &OwnedFd) {
        let fds = match open_dir(dir.as_fd(), OsStr::new("fd")) {
            Ok(fds) => fds,
            Err(e) => return self.failed("opening directory", "fd", e),
        };
        let entries = match Dir::read_from(&fds) {
            Ok(entries) => entries,
            Err(e) => return self.failed("reading directory", "fd", e),
        };
        for entry in entries {
            match entry {
                Ok(entry) if is_number(entry.file_name()) => {
                    let number = entry.file_name().to_string_lossy();
                    let link = self.link(fds.as_fd(), &number, &format!("fd/{number}"));
                    // Who may not trace a process may read none of its links, and there may be many.
                    if matches!(link, Err(Errno::ACCESS | Errno::PERM)) {
                        return;
                    }
                }
                Ok(_) => {}
                Err(e) => return self.failed("reading directory", "fd", e),
            }
        }
    }

    fn link(&mut self, dir: BorrowedFd<'_>, name: &str, shown: &str) -> Result<(), Errno> {
        let target = rustix::fs::readlinkat(dir, name, Vec::new());
        match &target {
            Ok(target) => self.add(shown, target.as_bytes()),
            Err(e) => self.failed("reading symlink", shown, *e),
        }
        target.map(drop)
    }

    /// Every store directory, slash and run of characters of a path. Text that is glued to a path
    /// hides it.
    fn environment(&mut self, text: &[u8]) {
        let store = self.store_dir.as_str().as_bytes();
        let mut rest = text;
        while let Some(at) = memmem::find(rest, store) {
            rest = rest.get(at + store.len()..).unwrap_or_default();
            let Some(base) = rest.strip_prefix(b"/") else { continue };
            let end = base.iter().position(|b| !larder_core::store_path::is_name_byte(*b)).unwrap_or(base.len());
            if let Ok(path) = StorePath::from_base_name(base.get(..end).unwrap_or_default()) {
                self.found.insert((self.dir.join("environ"), path));
            }
        }
    }

    /// A file that is in use, perhaps one in the store.
    fn add(&mut self, name: &str, file: &[u8]) {
        if let Ok((path, _)) = self.store_dir.parse_inside(file) {
            self.found.insert((self.dir.join(name), path));
        }
    }

    fn failed(&mut self, doing: &'static str, name: &str, e: Errno) {
        match e {
            // Gone, closed to us, a kernel thread, or no such file in this kernel.
            Errno::NOENT | Errno::NOTDIR | Errno::SRCH | Errno::ACCESS | Errno::PERM | Errno::INVAL
            // The path of what is open is too long to be told. Anybody can do that at any time, so it
            // must not stop a collection (it does stop that of Nix 2.8).
            | Errno::NAMETOOLONG => {}
            _ => self.failures.push(FileError::new(doing, self.dir.join(name), e)),
        }
    }
}

fn is_number(name: &CStr) -> bool {
    !name.is_empty() && name.to_bytes().iter().all(u8::is_ascii_digit)
}

fn open_dir(dir: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Reads a file of `/proc` into the buffer. The kernel gives a page of it at a time at most.
fn read(dir: BorrowedFd<'_>, name: &str, buffer: &mut Vec<u8>) -> rustix::io::Result<()> {
    const ROOM: usize = 16 << 10;
    let file = rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    buffer.clear();
    loop {
        buffer.reserve(ROOM);
        match rustix::io::read(&file, rustix::buffer::spare_capacity(buffer)) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// The file of a line of `maps`: what follows the fifth field, if it begins with a slash.
///
/// Nix looks only at names without blanks; more roots do no harm.
fn mapped_file(line: &[u8]) -> Option<&[u8]> {
    let mut rest = line;
    for _ in 0..5 {
        let end = rest.iter().position(|b| *b == b' ')?;
        rest = rest.get(end..)?.trim_ascii_start();
    }
    rest.starts_with(b"/").then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::path;
    use std::fs;
    use std::os::unix::fs::symlink;

    const STORE: &str = "/nix/store";

    fn names(proc: &Path) -> Vec<String> {
        let (roots, failures) = candidates(&StoreDir::new(STORE).unwrap(), proc);
        assert!(failures.is_empty(), "{failures:?}");
        let mut names: Vec<_> = roots
            .iter()
            .map(|root| format!("{} {}", root.link.strip_prefix(proc).unwrap().display(), root.path.name()))
            .collect();
        names.sort();
        names
    }

    fn full(n: u32) -> String {
        format!("{STORE}/{}", path(n))
    }

    #[test]
    fn reads_processes() {
        let dir = tempfile::tempdir().unwrap();
        let proc = dir.path();
        for dir in ["12/fd", "13", "self", "14x", "sys/kernel"] {
            fs::create_dir_all(proc.join(dir)).unwrap();
        }
        symlink(format!("{}/bin/sh", full(1)), proc.join("12/exe")).unwrap();
        symlink("/home/u", proc.join("12/cwd")).unwrap();
        symlink("/bin/sh", proc.join("13/exe")).unwrap();
        for (n, target) in [
            ("0", full(2)),
            ("1", format!("{}/x (deleted)", full(3))),
            ("2", "pipe:[123]".to_owned()),
            ("3", format!("x{}", full(4))),
            ("4", format!("{} (deleted)", full(4))),
        ] {
            symlink(target, proc.join("12/fd").join(n)).unwrap();
        }
        symlink(full(9), proc.join("12/fd/x")).unwrap();
        let maps = format!(
            "7f00-7f01 r--p 00000000 fe:00 1234                       {}/lib/libc.so.6\n\
             7f01-7f02 rw-p 00000000 00:00 0\n\
             7f02-7f03 rw-p 00000000 00:00 0                          [heap]\n\
             7f03-7f04 rw-p 00000000 00:00 0                          [anon:{}]\n\
             7f04-7f05 r--p 00000000 fe:00 77 {}/lib/with blank.so (deleted)\n",
            full(5),
            full(9),
            full(6)
        );
        fs::write(proc.join("12/maps"), maps).unwrap();
        fs::write(proc.join("13/environ"), format!("PATH={}/bin:{}\0A={}", full(1), full(2), full(3))).unwrap();
        for other in ["self", "14x"] {
            symlink(full(9), proc.join(other).join("exe")).unwrap();
        }
        fs::write(proc.join("sys/kernel/modprobe"), format!("{}/bin/modprobe\n", full(7))).unwrap();
        fs::write(proc.join("sys/kernel/poweroff_cmd"), format!("{}\n", full(8))).unwrap();
        let expected = [
            "12/exe name1",
            "12/fd/0 name2",
            "12/fd/1 name3",
            "12/maps name5",
            "12/maps name6",
            "13/environ name1",
            "13/environ name2",
            "13/environ name3",
            "sys/kernel/modprobe name7",
            "sys/kernel/poweroff_cmd name8",
        ];
        assert_eq!(names(proc), expected);
        assert_eq!(names(&proc.join("no/such")), Vec::<String>::new());
    }

    #[test]
    fn environments() {
        let store_dir = StoreDir::new(STORE).unwrap();
        let check = |text: &str, expected: &[&str]| {
            let mut uses = Uses::new(&store_dir, "/proc/1".into());
            uses.environment(text.as_bytes());
            let found: Vec<_> = uses.found.iter().map(|(_, path)| path.name().to_string()).collect();
            assert_eq!(found, expected, "{text}");
        };
        let one = full(1);
        check("", &[]);
        check(&one, &["name1"]);
        check(&format!("{one}\0{one}/x:{}", full(2)), &["name1", "name2"]);
        check(&format!("-I{one}"), &["name1"]);
        check(&format!("{one}glued"), &["name1glued"]);
        check(&format!("{one}+x?=._-Z,"), &["name1+x?=._-Z"]);
        check(&format!("/mnt{one}"), &["name1"]);
        check(&format!("{STORE}{one}"), &["name1"]);
        check(&format!("{STORE}/{one}"), &["name1"]);
        check("/nix/store", &[]);
        check("/nix/store/", &[]);
        check("/nix/store/short", &[]);
        check(&format!("/nix/store{}", path(1)), &[]);
        check(&format!("{one}{}", "x".repeat(300)), &[]);
    }

    #[test]
    fn files_of_maps() {
        for (line, file) in [
            ("a b c d e /f", Some("/f")),
            ("a b c d e    /f g", Some("/f g")),
            ("a b c d e f", None),
            ("a b c d e", None),
            ("a b c d /f", None),
            ("", None),
        ] {
            assert_eq!(mapped_file(line.as_bytes()), file.map(str::as_bytes), "{line}");
        }
    }

    /// The real thing: ourselves.
    #[test]
    fn this_process() {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("store");
        fs::create_dir(&store).unwrap();
        let file = fs::File::create(store.join(path(1).to_string())).unwrap();
        let store_dir = StoreDir::new(store.to_str().unwrap()).unwrap();
        let (roots, _) = candidates(&store_dir, Path::new("/proc"));
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let link = PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()));
        assert!(roots.iter().any(|root| root.link == link && root.path == path(1)), "{roots:?}");
    }
}
