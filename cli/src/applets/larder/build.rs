//! `larder build` and `larder log`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use larder_core::api::{BuildMode, DerivedPath};
use larder_core::settings::Settings;
use larder_fs::layout::Access;
use larder_realise::plan::{Key, Target, Wanted};
use serde_json::{Value, json};

use super::asking::paths;
use super::derivation::Loader;
use super::{Build, Log};
use crate::applets::nix_store::realise::print_log;
use crate::applets::nix_store::remote::derived;
use crate::applets::place::{Place, Side};
use crate::applets::{Context, print_json};
use crate::args::{Common, LogFormat, Override, OverrideFrom};
use crate::builds::shows_logs;
use crate::exit::Failure;
use crate::paths::absolute;
use crate::printer::{Output, Printer};
use crate::realising::{How, target};

/// Where the programs of a machine usually lie.
const HOST_TOOLS: [&str; 7] = ["/bin", "/etc/alternatives", "/lib", "/lib32", "/lib64", "/libx32", "/usr"];

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum BuildError {
    #[error("a root can be given for one output only, not for {count}")]
    OneRoot { count: usize },
}

impl Build {
    /// The settings that the flags stand for.
    pub(super) fn overrides(&self) -> Vec<Override> {
        let mut all = Vec::new();
        let mut set = |name: &str, value: String| {
            all.push(Override { name: name.to_owned(), value, from: OverrideFrom::Flag });
        };
        if let Some(jobs) = &self.jobs {
            set("max-jobs", jobs.clone());
        }
        if self.keep_going {
            set("keep-going", "true".to_owned());
        }
        if self.keep_failed {
            set("keep-failed", "true".to_owned());
        }
        let mut seen: Vec<String> = self.sandbox_paths.clone();
        if self.host_tools {
            seen.extend(HOST_TOOLS.iter().filter(|path| Path::new(path).exists()).map(|path| (*path).to_owned()));
        }
        if !seen.is_empty() {
            set("extra-sandbox-paths", seen.join(" "));
        }
        all
    }
}

/// `larder build`.
pub(super) fn build(cx: &Context, settings: &Settings, common: &Common, args: &Build) -> Result<(), Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadWrite)?;
    let side = place.side(cx, settings, common);
    if let (Side::Far(far), Some(_)) = (&side, &args.root) {
        // Before anything is built.
        far.files("--root")?;
    }
    let dir = place.store().dir();
    let mut loader = Loader::new(place.store(), &side, settings);
    let mut targets = Vec::new();
    for word in &args.targets {
        targets.push(if is_file(word) {
            Target { key: Key::Derivation(loader.load(Path::new(word))?), wanted: Wanted::All }
        } else {
            target(dir, word)?
        });
    }
    let mode = match (args.check, args.repair) {
        (true, _) => BuildMode::Check,
        (_, true) => BuildMode::Repair,
        _ => BuildMode::Normal,
    };
    let mut outputs = Vec::with_capacity(targets.len());
    match &side {
        Side::Here(local) => {
            let realiser = cx.realiser(local, settings);
            let how = How {
                mode: mode.into(),
                dry_run: args.dry_run,
                shows_logs: shows_logs(&cx.terminal, LogFormat::RawWithLogs, args.no_output),
                ..How::NORMAL
            };
            targets = realiser.realise(targets, how)?;
            for target in targets.iter().filter(|_| !args.dry_run) {
                outputs.push(realiser.outputs(target)?);
            }
        }
        Side::Far(far) => {
            let mut wanted: Vec<DerivedPath> = targets.iter().map(derived).collect();
            far.make_valid(&mut wanted, mode, args.dry_run, false)?;
            if !args.dry_run {
                outputs = far.outputs_of(&wanted)?;
            }
        }
    }
    if args.dry_run {
        return Ok(());
    }
    let (mut rows, mut lines, mut count) = (Vec::new(), Vec::new(), 0);
    let mut last = None;
    for (target, found) in targets.iter().zip(outputs) {
        let mut outputs = BTreeMap::new();
        for (name, path) in found {
            count += 1;
            let full = dir.full(&path);
            lines.push(full.clone());
            outputs.insert(name.map_or_else(|| "out".to_owned(), |name| name.to_string()), full);
            last = Some(path);
        }
        let drv = match &target.key {
            Key::Derivation(drv) => Value::from(dir.full(drv)),
            Key::Path(_) => Value::Null,
        };
        rows.push(json!({ "drvPath": drv, "outputs": outputs }));
    }
    if let (Some(link), Some(path)) = (&args.root, last) {
        if count > 1 {
            return Err(BuildError::OneRoot { count }.into());
        }
        let link = absolute(link.as_os_str())?;
        side.add_root("--root", &path, Path::new(OsStr::from_bytes(&link)))?;
    }
    if args.json.json {
        return print_json(&json!(rows));
    }
    let mut out = Printer::new(Output::Listing);
    for line in lines {
        out.line(line)?;
    }
    Ok(out.finish()?)
}

/// A file with a derivation, rather than something in a store.
fn is_file(word: &OsStr) -> bool {
    word == "-" || Path::new(word).extension().is_some_and(|extension| extension == "json")
}

/// `larder log`.
pub(super) fn log(cx: &Context, settings: &Settings, common: &Common, args: &Log) -> Result<(), Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadOnly)?;
    let layout = match place.side(cx, settings, common) {
        Side::Here(local) => local.layout(),
        Side::Far(far) => &far.files("log")?.layout,
    };
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    for path in paths(place.store().dir(), &args.paths)? {
        print_log(cx, settings, place.store(), layout, &path, &mut out)?;
    }
    Ok(out.finish()?)
}
