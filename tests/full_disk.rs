//! A disk without room, and one without inodes: the collector runs, and makes room.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests may panic")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::garbage::base;
use crate::house::House;

/// A small file system, unmounted when dropped.
struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    fn point(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    fn new(words: &[&str], image_mib: u64) -> Option<Self> {
        let mount = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(mount.point()).unwrap();
        let ok = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let image = mount.dir.path().join("image");
        if image_mib > 0 {
            std::fs::File::create(&image).unwrap().set_len(image_mib << 20).unwrap();
            if !ok(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image)) {
                println!("skipped: no mkfs.ext4 here");
                return None;
            }
        }
        let source = if image_mib > 0 { image } else { PathBuf::from("none") };
        if !ok(Command::new("mount").args(words).arg(source).arg(mount.point())) {
            println!("skipped: nothing can be mounted here");
            return None;
        }
        Some(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.point()).output();
    }
}

/// Writes until nothing more fits.
fn fill(dir: &Path) {
    let mut file = std::fs::File::create(dir.join("filler")).unwrap();
    let block = vec![b'x'; 64 << 10];
    while file.write_all(&block).is_ok() {}
    while file.write_all(b"x").is_ok() {}
    drop(file);
    for n in 0.. {
        if std::fs::write(dir.join(format!("more{n}")), b"xx").is_err() {
            break;
        }
    }
}

/// Makes empty files until there can be no more.
fn use_up_names(dir: &Path) {
    std::fs::create_dir(dir.join("names")).unwrap();
    for n in 0.. {
        if std::fs::File::create(dir.join("names").join(n.to_string())).is_err() {
            break;
        }
    }
}

fn collects_on(mount: &Mount, fill: fn(&Path)) {
    let house = House::below(&mount.point());
    std::fs::create_dir_all(house.work().join("tree/sub")).unwrap();
    for n in 0..20 {
        house.write(&format!("tree/sub/f{n}"), vec![b'a'; 20_000]);
    }
    let kept = house.add("kept", "k");
    house.root("r", &kept);
    let tree = house.words("nix-store", "--add tree").stdout;
    for n in 0..5 {
        house.add(&format!("g{n}"), vec![b'0' + n; 10_000]);
    }
    assert!(!tree.is_empty());
    fill(&mount.point());
    let full = house.words("nix-store", "--add work/none");
    assert_ne!(full.status, Some(0));
    let run = house.gc("");
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.stdout.starts_with("6 store paths deleted, 0.43 MiB freed"), "{run:?}");
    assert_eq!(house.store_names(), [base(&kept)]);
    // There is room again, and with it the reserve.
    let _ = std::fs::remove_file(mount.point().join("filler"));
    house.words("nix-store", "--init").prints("");
    let reserved = std::fs::metadata(house.path().join("var/db/reserved")).unwrap();
    assert_eq!(reserved.len(), 8 << 20);
    let verified = house.words("nix-store", "--verify --check-contents");
    assert_eq!(verified.status, Some(0), "{verified:?}");
}

#[test]
fn s109_a_full_disk() {
    let Some(mount) = Mount::new(&["-o", "loop"], 40) else { return };
    collects_on(&mount, fill);
}

#[test]
fn s109_a_full_memory_disk() {
    let Some(mount) = Mount::new(&["-t", "tmpfs", "-o", "size=24m"], 0) else { return };
    collects_on(&mount, fill);
}

#[test]
fn s109_no_inodes() {
    let Some(mount) = Mount::new(&["-t", "tmpfs", "-o", "size=40m,nr_inodes=150"], 0) else { return };
    collects_on(&mount, use_up_names);
}
