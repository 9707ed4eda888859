//! `larder build` and `larder log`.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use larder_core::settings::Settings;
use larder_fs::layout::Access;
use larder_realise::job::Mode;
use larder_realise::plan::{Key, Target, Wanted};
use serde_json::{Value, json};

use super::asking::paths;
use super::derivation::Loader;
use super::{Build, Log};
use crate::applets::nix_store::realise::print_log;
use crate::applets::nix_store::store::open;
use crate::applets::{Context, print_json};
use crate::args::{LogFormat, Override, OverrideFrom};
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
pub(super) fn build(cx: &Context, settings: &Settings, args: &Build) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let mut loader = Loader::new(&store, settings);
    let mut targets = Vec::new();
    for word in &args.targets {
        targets.push(if is_file(word) {
            Target { key: Key::Derivation(loader.load(Path::new(word))?), wanted: Wanted::All }
        } else {
            target(store.dir(), word)?
        });
    }
    let mode = match (args.check, args.repair) {
        (true, _) => Mode::Check,
        (_, true) => Mode::Repair,
        _ => Mode::Normal,
    };
    let how = How {
        mode,
        dry_run: args.dry_run,
        shows_logs: shows_logs(&cx.terminal, LogFormat::RawWithLogs, args.no_output),
        ..How::NORMAL
    };
    let realiser = cx.realiser(&store, settings);
    let targets = realiser.realise(targets, how)?;
    if args.dry_run {
        return Ok(());
    }
    let (mut rows, mut lines, mut count) = (Vec::new(), Vec::new(), 0);
    let mut last = None;
    for target in &targets {
        let mut outputs = BTreeMap::new();
        for (name, path) in realiser.outputs(target)? {
            count += 1;
            let full = store.dir().full(&path);
            lines.push(full.clone());
            outputs.insert(name.map_or_else(|| "out".to_owned(), |name| name.to_string()), full);
            last = Some(path);
        }
        let drv = match &target.key {
            Key::Derivation(drv) => Value::from(store.dir().full(drv)),
            Key::Path(_) => Value::Null,
        };
        rows.push(json!({ "drvPath": drv, "outputs": outputs }));
    }
    if let (Some(link), Some(path)) = (&args.root, last) {
        if count > 1 {
            return Err(BuildError::OneRoot { count }.into());
        }
        let link = absolute(link.as_os_str())?;
        store.add_permanent_root(&path, &PathBuf::from(OsStr::from_bytes(&link)))?;
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
pub(super) fn log(cx: &Context, settings: &Settings, args: &Log) -> Result<(), Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    for path in paths(store.dir(), &args.paths)? {
        print_log(cx, settings, &store, &path, &mut out)?;
    }
    Ok(out.finish()?)
}
