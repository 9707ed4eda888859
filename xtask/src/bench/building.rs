//! Building: what many small builders cost, and a graph in which there is nothing to do.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::garbage::copy;
use super::place::Place;
use super::{Bench, Goal, Reset, cpu, fresh_store, remove};
use crate::run::{Failed, Job, Side, say};

/// Small derivations that are built, and those of the graph.
const SMALL: usize = 300;
const GRAPH: usize = 10_000;

/// The settings that both sides get. Nobody has a group of build users, so that both do the same, and
/// builders work beside the store.
pub(super) fn configured(side: &Side, mut job: Job, sandbox: bool) -> Job {
    let tmp = side.dir.with_extension("tmp");
    if std::fs::create_dir_all(&tmp).is_ok() {
        job.env.push(("TMPDIR".into(), tmp.display().to_string()));
    }
    let text = format!(
        "build-users-group =\nsandbox = {sandbox}\nsandbox-fallback = false\nsandbox-paths = /bin /usr /lib /lib64?\n\
         substituters =\nmax-jobs = 2"
    );
    job.env.push(("NIX_CONFIG".into(), text));
    job
}

/// A derivation of a shell that writes one line, and needs others of the same folder.
pub(super) fn write(folder: &Path, name: &str, needs: &[String]) -> Result<PathBuf, Failed> {
    let mut inputs = String::new();
    for (n, need) in needs.iter().enumerate() {
        let _ = write!(inputs, "{}\"dep{n}\": \"{need}.json\"", if n > 0 { ", " } else { "" });
    }
    let text = format!(
        r#"{{"name": "{name}", "builder": "/bin/sh", "args": ["-c", "echo > $out"], "derivations": {{{inputs}}}}}"#
    );
    let file = folder.join(format!("{name}.json"));
    std::fs::write(&file, text)?;
    Ok(file)
}

fn lines(bytes: &[u8]) -> Vec<String> {
    String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect()
}

impl Bench {
    pub(super) fn building(&mut self) -> Result<(), Failed> {
        let names = ["300 derivations", "nothing to do", "to the first instruction"];
        if !names.iter().any(|name| self.wanted(name)) {
            return Ok(());
        }
        let place = Place::new("builds")?;
        let mut there = Self {
            work: place.dir.clone(),
            nix: self.nix.as_ref().map(|side| Side::nix(&side.program, &place.dir.join("nix"))),
            larder: Side::larder(&self.larder.program, &place.dir.join("larder")),
            filters: self.filters.clone(),
            failures: 0,
        };
        let outcome = there.building_there();
        self.failures += there.failures;
        outcome
    }

    fn building_there(&mut self) -> Result<(), Failed> {
        let folder = self.work.join("recipes");
        std::fs::create_dir_all(&folder)?;
        let small: Vec<PathBuf> =
            (0..SMALL).map(|n| write(&folder, &format!("small{n}"), &[])).collect::<Result<_, _>>()?;
        self.small(&small)?;
        // Each needs three before it; the last needs what nobody else does.
        let mut graph = Vec::new();
        for n in 0..GRAPH {
            let needs: Vec<String> = if n + 1 == GRAPH {
                (GRAPH / 2..n).map(|n| format!("g{n}")).collect()
            } else {
                let mut needs: Vec<usize> =
                    [n / 2, n / 3, n.saturating_sub(1)].into_iter().filter(|m| *m < n).collect();
                needs.dedup();
                needs.iter().map(|m| format!("g{m}")).collect()
            };
            graph.push(write(&folder, &format!("g{n}"), &needs)?);
        }
        self.nothing_to_do(&graph)?;
        remove(&folder);
        Ok(())
    }

    /// Adds derivations to a fresh store of a side, by Larder, since real Nix needs an evaluator
    /// for it; gives their paths.
    fn add(&self, side: &Side, files: &[PathBuf]) -> Result<Vec<String>, Failed> {
        let ours = self.larder.dir == side.dir;
        fresh_store(side)?;
        let scratch = self.work.join("scratch");
        remove(&scratch);
        // The same store directory with a ledger of our own.
        let state = |mut job: Job| {
            for (name, value) in &mut job.env {
                if !ours && (name == "NIX_STATE_DIR" || name == "NIX_LOG_DIR") {
                    *value = scratch.join(name.to_lowercase()).display().to_string();
                }
            }
            job.program.clone_from(&self.larder.program);
            job
        };
        let mut paths = Vec::new();
        for files in files.chunks(2000) {
            let mut job = side.job(Vec::<String>::new());
            job.args = ["derivation", "add"].iter().map(Into::into).chain(files.iter().map(Into::into)).collect();
            paths.extend(lines(&state(job).output()?));
        }
        if ours {
            return Ok(paths);
        }
        let stream = side.dir.with_extension("export");
        let mut export = side.job(Vec::<String>::new());
        export.args = ["nix-store", "--export"].iter().map(Into::into).chain(paths.iter().map(Into::into)).collect();
        export.stdout = Some(stream.clone());
        state(export).cost(1)?;
        fresh_store(side)?;
        let mut import = side.job(["--import"]);
        import.stdin = Some(stream.clone());
        import.output()?;
        std::fs::remove_file(stream)?;
        remove(&scratch);
        Ok(paths)
    }

    fn small(&mut self, files: &[PathBuf]) -> Result<(), Failed> {
        let mut added = Vec::new();
        for side in self.sides() {
            let paths = self.add(&side, files)?;
            copy(&side.dir, &side.dir.with_extension("saved"))?;
            added.push((side.dir.clone(), paths));
        }
        let paths_of = |side: &Side| -> Vec<String> {
            added.iter().find(|(dir, _)| *dir == side.dir).map(|(_, paths)| paths.clone()).unwrap_or_default()
        };
        let again: Reset<'_> = Some(&|side: &Side| {
            remove(&side.dir);
            copy(&side.dir.with_extension("saved"), &side.dir)
        });
        for (sandbox, most) in [(false, 1.0 / 4.0), (true, 1.0 / 3.0)] {
            let name = format!("-r -j2 of 300 derivations, {}", if sandbox { "sandboxed" } else { "unsandboxed" });
            let job = |side: &Side| {
                let words = ["-r", "-j2", "--quiet", "--quiet"].map(str::to_owned);
                configured(side, side.job(words.into_iter().chain(paths_of(side))), sandbox)
            };
            self.row(&name, cpu(most), &job, again)?;
        }
        for side in self.sides() {
            remove(&side.dir.with_extension("saved"));
        }
        self.first_instruction()
    }

    /// From the start of a sandbox to the first byte of its builder, as the sandbox's own example
    /// measures it.
    fn first_instruction(&mut self) -> Result<(), Failed> {
        const MOST_MS: f64 = 5.0;
        const NAME: &str = "sandbox: to the first instruction";
        if !self.wanted(NAME) {
            return Ok(());
        }
        let words = ["run", "--release", "--quiet", "--package", "larder-sandbox", "--example", "start"];
        // Roots are made where all builds are measured.
        let output = crate::run::cargo(&words).env("TMPDIR", &self.work).output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Failed(format!("the sandbox's example: {said}")));
        }
        for line in lines(&output.stdout) {
            let Some((kind, rest)) = line.split_once(": ").filter(|(kind, _)| *kind != "no sandbox") else { continue };
            let text = rest.split(", ").find_map(|part| part.strip_prefix("first output ")).unwrap_or_default();
            let millis = text.strip_suffix("ms").and_then(|ms| ms.parse::<f64>().ok());
            let millis = millis.ok_or_else(|| Failed(format!("the sandbox's example says '{line}'")))?;
            self.failures += u32::from(millis >= MOST_MS);
            let verdict = if millis < MOST_MS { "reached" } else { "MISSED" };
            say(&format!("{NAME}, {kind}: {millis:.2} ms (goal: {MOST_MS} ms, median) {verdict}"));
        }
        Ok(())
    }

    fn nothing_to_do(&mut self, files: &[PathBuf]) -> Result<(), Failed> {
        let names = ["-r of 10k derivations, nothing to do", "-r of one above 10k, nothing to do"];
        if !names.iter().any(|name| self.wanted(name)) {
            return Ok(());
        }
        let mut added = Vec::new();
        for side in self.sides() {
            let paths = self.add(&side, files)?;
            // The outputs are valid because the ledger says so; nobody reads them.
            let mut text = String::new();
            for drvs in paths.chunks(5000) {
                let words = ["-q", "--outputs"].map(str::to_owned).into_iter().chain(drvs.iter().cloned());
                for (output, drv) in lines(&side.job(words).output()?).iter().zip(drvs) {
                    let _ = writeln!(text, "{output}\n{:064x}\n120\n{drv}\n0", 1);
                }
            }
            let file = side.dir.with_extension("load");
            std::fs::write(&file, text)?;
            let mut load = side.job(["--load-db"]);
            load.stdin = Some(file.clone());
            load.cost(1)?;
            std::fs::remove_file(file)?;
            added.push((side.dir.clone(), paths));
        }
        let of = |side: &Side, from: usize| -> Job {
            let paths = added.iter().find(|(dir, _)| *dir == side.dir).map(|(_, paths)| paths.get(from..));
            let paths = paths.flatten().unwrap_or_default();
            let words = ["-r", "--quiet"].map(str::to_owned).into_iter().chain(paths.iter().cloned());
            configured(side, side.job(words), false)
        };
        let tenth = Goal { cpu: Some(0.1), wall: None, peak_mib: None };
        self.row(names[0], tenth, &|side| of(side, 0), None)?;
        self.row(names[1], tenth, &|side| of(side, files.len() - 1), None)
    }
}
