//! Collecting, listing roots and linking.

use std::fmt::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::{Bench, Goal, Random, Reset, cpu, fresh_store, remove};
use crate::run::{Failed, Job, Side, say};

pub(super) const DIGITS: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// A store of small files, half of them dead: every path of a half refers to seven of the same, as the
/// paths of the other rows do, and one root leads to all of the living half.
fn half_dead(side: &Side, count: usize, random: &mut Random) -> Result<(), Failed> {
    fresh_store(side)?;
    let store = side.store_dir();
    let mut text = String::new();
    let mut halves: [Vec<String>; 2] = [Vec::new(), Vec::new()];
    for n in 0..count {
        let mut path = format!("{}/", store.display());
        (0..32).for_each(|_| path.push(char::from(DIGITS[random.below(32)])));
        let _ = write!(path, "-package-{n}");
        std::fs::write(&path, format!("contents {n}"))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444))?;
        let half = &mut halves[n % 2];
        let mut refs: Vec<&String> = half.last().into_iter().collect();
        refs.extend((0..6).filter_map(|_| half.get(random.below(half.len()))));
        refs.sort();
        refs.dedup();
        let _ = writeln!(text, "{path}\n{:064x}\n130\n\n{}", random.next(), refs.len());
        for reference in refs {
            let _ = writeln!(text, "{reference}");
        }
        half.push(path);
    }
    let file = side.dir.with_extension("load");
    std::fs::write(&file, text)?;
    let mut job = side.job(["--load-db"]);
    job.stdin = Some(file.clone());
    job.cost(1)?;
    std::fs::remove_file(file)?;
    if let Some(top) = halves[0].last() {
        symlink(top, side.dir.join("var/gcroots/top"))?;
    }
    Ok(())
}

/// Links, files and indirect roots, so many of each.
fn many_roots(side: &Side, count: usize, random: &mut Random) -> Result<(), Failed> {
    half_dead(side, 1000, random)?;
    let names: Vec<PathBuf> =
        std::fs::read_dir(side.store_dir())?.map(|e| Ok(e?.path())).collect::<Result<_, std::io::Error>>()?;
    let names: Vec<PathBuf> = names.into_iter().filter(|path| !path.ends_with(".links")).collect();
    let roots = side.dir.join("var/gcroots");
    for folder in ["links", "files", "auto", "users"] {
        std::fs::create_dir_all(roots.join(folder))?;
    }
    for n in 0..count {
        let path = &names[n % names.len()];
        symlink(path, roots.join(format!("links/l{n}")))?;
        let folder = roots.join(format!("files/{}", n / names.len()));
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(path.file_name().unwrap_or_default()), "")?;
        let user = side.dir.join(format!("result-{n}"));
        symlink(path, &user)?;
        symlink(&user, roots.join(format!("auto/a{n}")))?;
    }
    Ok(())
}

pub(super) fn copy(from: &Path, to: &Path) -> Result<(), Failed> {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    if status.success() { Ok(()) } else { Err(Failed(format!("cannot copy {}", from.display()))) }
}

impl Bench {
    pub(super) fn garbage(&mut self) -> Result<(), Failed> {
        let names = ["--gc --print-dead", "--gc --print-live", "--gc of 5k", "--print-roots", "--optimise", "dead set"];
        if !names.iter().any(|name| self.wanted(name)) {
            return Ok(());
        }
        for side in self.sides() {
            half_dead(&side, 10_000, &mut Random(5))?;
        }
        let ask = |words: &'static [&'static str]| move |side: &Side| -> Job { side.job(words.iter().copied()) };
        let sixtieth = cpu(1.0 / 60.0);
        self.row("--gc --print-dead, 10k paths", sixtieth, &ask(&["--gc", "--print-dead"]), None)?;
        self.row("--gc --print-live, 10k paths", sixtieth, &ask(&["--gc", "--print-live"]), None)?;
        if self.wanted("--gc of 5k") {
            for side in self.sides() {
                copy(&side.dir, &side.dir.with_extension("saved"))?;
            }
            let again: Reset<'_> = Some(&|side: &Side| {
                remove(&side.dir);
                copy(&side.dir.with_extension("saved"), &side.dir)
            });
            self.row("--gc of 5k small paths of 10k", cpu(1.0 / 12.0), &ask(&["--gc"]), again)?;
            for side in self.sides() {
                remove(&side.dir.with_extension("saved"));
            }
        }
        for side in self.sides() {
            many_roots(&side, 8334, &mut Random(6))?;
        }
        self.row("--gc --print-roots of 25k", cpu(0.25), &ask(&["--gc", "--print-roots"]), None)?;
        self.linking()?;
        if self.wanted("dead set") {
            let side = self.larder.clone();
            half_dead(&side, 100_000, &mut Random(7))?;
            let cost = side.job(["--gc", "--print-dead"]).cost(1)?;
            say(&format!(
                "dead set of 100k paths from a cold open: {:.3} s CPU, {:.3} s wall, {:.0} MiB peak (goal: 0.3 s CPU)",
                cost.cpu_s, cost.wall_s, cost.peak_mib
            ));
            // The ledger alone: no files.
            fresh_store(&side)?;
            let file = self.work.join("million.dump");
            super::write_registrations(&file, &side.store_dir(), 1_000_000)?;
            let mut load = side.job(["--load-db"]);
            load.stdin = Some(file.clone());
            load.cost(1)?;
            std::fs::remove_file(file)?;
            let cost = side.job(["--gc", "--print-live"]).cost(1)?;
            say(&format!(
                "live set of 1M paths from a cold open: {:.3} s CPU, {:.3} s wall, {:.0} MiB peak (goal: linear, 286 MiB)",
                cost.cpu_s, cost.wall_s, cost.peak_mib
            ));
        }
        Ok(())
    }

    /// 12,500 files in 250 paths, four of five with contents that others have too.
    fn linking(&mut self) -> Result<(), Failed> {
        if !self.wanted("--optimise") {
            return Ok(());
        }
        let folder = self.work.join("equal");
        let mut files = Vec::new();
        let mut random = Random(8);
        for path in 0..250 {
            let tree = folder.join(format!("tree{path}"));
            std::fs::create_dir_all(tree.join("sub"))?;
            for n in 0..50 {
                let of = random.below(2500);
                std::fs::write(tree.join(format!("sub/f{n}")), format!("contents {of} ").repeat(50 + of % 200))?;
            }
            files.push(std::ffi::OsString::from(tree));
        }
        for side in self.sides() {
            fresh_store(&side)?;
            side.job([std::ffi::OsString::from("--add")].into_iter().chain(files.clone())).output()?;
            copy(&side.dir, &side.dir.with_extension("saved"))?;
        }
        let again: Reset<'_> = Some(&|side: &Side| {
            remove(&side.dir);
            copy(&side.dir.with_extension("saved"), &side.dir)
        });
        let job = |side: &Side| side.job(["--optimise"]);
        let first = Goal { cpu: Some(1.0 / 1.8), wall: Some(1.0 / 2.5), peak_mib: None };
        self.row("--optimise of 12.5k files, first run", first, &job, again)?;
        self.row("--optimise of 12.5k files, all linked", cpu(0.5), &job, None)?;
        for side in self.sides() {
            remove(&side.dir.with_extension("saved"));
        }
        remove(&folder);
        Ok(())
    }
}
