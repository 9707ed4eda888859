//! `larder gc`, `larder why`, `larder roots`, `larder optimise`: collecting garbage, explained.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use clap::Args;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_fs::layout::Access;
use larder_gc::roots::{Root, RootKind};
use larder_gc::why::Step;
use larder_store::collect::{CollectOptions, Freed};
use larder_store::plan::{Plan, Reason};
use larder_store::survey::Survey;
use larder_store::{LocalStore, StoreError};
use serde_json::{Value, json};

use super::Json;
use crate::applets::Context;
use crate::applets::nix_store::store::{mib, open, open_for_survey};
use crate::args::{parse_unsigned, shown};
use crate::exit::{Failure, Status};
use crate::paths::{absolute, store_path};
use crate::printer::{Output, Printer};

/// So many of the largest paths are shown before the question.
const LARGEST: usize = 20;

#[derive(Debug, Args)]
pub struct Gc {
    /// Only tell what would go
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// List all paths, not only the largest
    #[arg(short, long)]
    pub list: bool,
    /// Stop after so many bytes (K, M, G, T)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_freed: Option<u64>,
    /// Only tell what would go besides, were these roots dropped (links, as `larder roots` shows them)
    #[arg(long, value_name = "ROOT", num_args = 1.., conflicts_with_all = ["yes", "max_freed"])]
    pub if_dropped: Vec<OsString>,
    #[command(flatten)]
    pub json: Json,
}

fn size(text: &str) -> Result<u64, crate::args::NumberError> {
    parse_unsigned(text)
}

#[derive(Debug, Args)]
pub struct Why {
    /// Paths in the store, or links to them
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Roots {
    #[command(flatten)]
    pub json: Json,
}

#[derive(Debug, Args)]
pub struct Optimise {
    #[command(flatten)]
    pub json: Json,
}

/// Why nothing was collected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum GarbageError {
    #[error("nobody can be asked here whether to delete that; --yes deletes without asking, --dry-run does not delete")]
    NobodyToAsk,
    #[error("reading the answer")]
    Answer(#[source] io::Error),
    #[error("'{root}' is no root; `larder roots` shows them")]
    NoRoot { root: String },
}

/// Text, as far as it is some, of what may be any bytes.
fn text(bytes: &OsStr) -> String {
    String::from_utf8_lossy(bytes.as_bytes()).into_owned()
}

fn set(object: &mut Value, key: &str, value: Value) {
    if let Value::Object(fields) = object {
        fields.insert(key.to_owned(), value);
    }
}

fn full(store: &LocalStore, name: &OsStr) -> String {
    format!("{}/{}", store.dir().as_str(), text(name))
}

pub(super) fn collect(cx: &Context, settings: &Settings, args: &Gc) -> Result<Status, Failure> {
    let only_tell = args.dry_run || !args.if_dropped.is_empty();
    let store = open_for_survey(cx, settings, if only_tell { Access::ReadOnly } else { Access::ReadWrite })?;
    if !only_tell {
        // Before anybody is asked a question.
        store.refuse_unless_adopted()?;
    }
    let survey = store.survey()?;
    let plan = if args.if_dropped.is_empty() {
        store.plan(&survey)?
    } else {
        store.plan_without(&survey, &named_roots(&survey, &args.if_dropped)?)?
    };
    let mut out = Printer::new(Output::Listing);
    if !args.json.json {
        print_plan(&mut out, &store, &plan, args)?;
        io::Write::flush(&mut out)?;
    }
    let mut freed = Freed::default();
    let mut outcome = Ok(());
    let wanted = !only_tell && (args.yes || args.json.json || plan.entries.is_empty() || ask(cx)?);
    if args.json.json && !only_tell && !args.yes {
        return Err(GarbageError::NobodyToAsk.into());
    }
    if wanted && !(plan.entries.is_empty() && plan.freed_bytes == 0) {
        outcome = store.collect(CollectOptions { max_freed_bytes: args.max_freed }, &mut freed);
    }
    if args.json.json {
        let mut value = plan_json(&store, &plan);
        if !only_tell {
            set(&mut value, "deleted", json!({"paths": freed.paths, "bytes": freed.bytes}));
        }
        out.line(value)?;
    } else if wanted && freed != Freed::default() {
        out.line(format_args!("{} paths deleted, {} freed", freed.paths, mib(freed.bytes)))?;
    }
    out.finish()?;
    outcome?;
    Ok(Status::SUCCESS)
}

/// The roots with these links.
fn named_roots(survey: &Survey, names: &[OsString]) -> Result<Vec<Root>, Failure> {
    let mut found = Vec::new();
    for name in names {
        let path = absolute(name)?;
        let before = found.len();
        let is_meant =
            |root: &&Root| root.link.as_os_str() == name.as_os_str() || root.link.as_os_str().as_bytes() == path;
        found.extend(survey.roots.iter().filter(is_meant).cloned());
        if found.len() == before {
            return Err(GarbageError::NoRoot { root: shown(name) }.into());
        }
    }
    Ok(found)
}

fn print_plan(out: &mut Printer, store: &LocalStore, plan: &Plan, args: &Gc) -> Result<(), Failure> {
    let mut entries: Vec<_> = plan.entries.iter().collect();
    let more = if args.list {
        0
    } else {
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.size_bytes));
        entries.len().saturating_sub(LARGEST)
    };
    for entry in entries.iter().take(plan.entries.len() - more) {
        let note = if entry.valid { "" } else { "  (not valid)" };
        out.line(format_args!("{:>14}  {}{note}", mib(entry.size_bytes), full(store, &entry.name)))?;
    }
    if more > 0 {
        out.line(format_args!("{:>14}  and {more} smaller ones", ""))?;
    }
    let count = plan.entries.len();
    let paths = if count == 1 { "path" } else { "paths" };
    let which = if args.if_dropped.is_empty() { "" } else { " more" };
    out.line(format_args!("{count}{which} {paths} would be deleted, {} freed", mib(plan.freed_bytes)))?;
    Ok(())
}

fn plan_json(store: &LocalStore, plan: &Plan) -> Value {
    let entries: Vec<Value> = plan
        .entries
        .iter()
        .map(|entry| json!({"path": full(store, &entry.name), "valid": entry.valid, "size": entry.size_bytes}))
        .collect();
    json!({"paths": entries, "freedBytes": plan.freed_bytes})
}

fn ask(cx: &Context) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return Err(GarbageError::NobodyToAsk.into());
    }
    let mut stderr = io::stderr();
    stderr.write_all(b"Delete them? [y/N] ").and_then(|()| stderr.flush()).map_err(GarbageError::Answer)?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(GarbageError::Answer)?;
    cx.interrupt.check()?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

pub(super) fn why(cx: &Context, settings: &Settings, args: &Why) -> Result<Status, Failure> {
    let store = open_for_survey(cx, settings, Access::ReadOnly)?;
    let paths: Vec<_> =
        args.paths.iter().map(|path| store_path(store.dir(), path.as_os_str())).collect::<Result<_, _>>()?;
    let survey = store.survey()?;
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    let mut values = Vec::new();
    for path in &paths {
        let reasons = store.why(&survey, path)?;
        let path = store.dir().full(path);
        if args.json.json {
            let reasons: Vec<Value> = reasons.iter().map(|reason| reason_json(&store, &survey, reason)).collect();
            values.push(json!({"path": path, "live": !reasons.is_empty(), "roots": reasons}));
            continue;
        }
        if reasons.is_empty() {
            out.line(format_args!("{path}: no root keeps it; the next collection deletes it"))?;
        }
        for reason in &reasons {
            out.line(format_args!("{} ({})", reason.root.link.display(), kind(reason.root.kind)))?;
            out.line(format_args!("  -> {}", store.dir().full(&survey.graph.path(reason.chain.start))))?;
            for (step, node) in &reason.chain.steps {
                let name = store.dir().full(&survey.graph.path(*node));
                out.line(format_args!("  {} {name}", step_text(*step)))?;
            }
        }
    }
    if args.json.json {
        out.line(Value::Array(values))?;
    }
    out.finish()?;
    Ok(Status::SUCCESS)
}

fn step_text(step: Step) -> &'static str {
    match step {
        Step::Reference => "refers to",
        Step::Deriver => "was built (keep-derivations) from",
        Step::Output => "makes (keep-outputs)",
    }
}

fn kind(kind: RootKind) -> &'static str {
    match kind {
        RootKind::Link => "link",
        RootKind::Indirect => "indirect",
        RootKind::File => "file",
        RootKind::Temporary => "temporary",
        RootKind::Runtime => "process",
    }
}

/// The process that a root is of.
fn pid(root: &Root) -> Option<u64> {
    let link = root.link.to_str()?;
    let text = match root.kind {
        RootKind::Temporary => link.strip_prefix("{temp:")?.strip_suffix('}')?,
        RootKind::Runtime => link.strip_prefix("/proc/")?.split('/').next()?,
        _ => return None,
    };
    text.parse().ok()
}

fn root_json(store: &LocalStore, root: &Root) -> Value {
    let mut value = json!({
        "link": text(root.link.as_os_str()), "path": store.dir().full(&root.path), "kind": kind(root.kind),
    });
    if let Some(pid) = pid(root) {
        set(&mut value, "pid", json!(pid));
    }
    value
}

fn reason_json(store: &LocalStore, survey: &Survey, reason: &Reason) -> Value {
    let name = |node| store.dir().full(&survey.graph.path(node));
    let steps = reason.chain.steps.iter().map(|(step, node)| {
        let by = match step {
            Step::Reference => "reference",
            Step::Deriver => "keep-derivations",
            Step::Output => "keep-outputs",
        };
        json!({"by": by, "path": name(*node)})
    });
    let mut value = root_json(store, &reason.root);
    set(&mut value, "chain", steps.collect());
    value
}

pub(super) fn roots(cx: &Context, settings: &Settings, args: &Roots) -> Result<Status, Failure> {
    let store = open(cx, settings, Access::ReadOnly)?;
    let roots = store.all_roots()?;
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    if args.json.json {
        out.line(roots.iter().map(|root| root_json(&store, root)).collect::<Value>())?;
    } else {
        for root in &roots {
            out.line(root.display(store.dir()))?;
        }
    }
    out.finish()?;
    Ok(Status::SUCCESS)
}

pub(super) fn optimise(cx: &Context, settings: &Settings, args: &Optimise) -> Result<Status, Failure> {
    let store = open(cx, settings, Access::ReadWrite)?;
    let outcome = store.optimise();
    if let Ok(saved) | Err(StoreError::NotLinked { saved, .. }) = &outcome {
        if args.json.json {
            let mut out = Printer::new(Output::Listing);
            out.line(json!({"files": saved.files, "bytes": saved.bytes, "blocks": saved.blocks}))?;
            out.finish()?;
        } else {
            let text = format_args!("{} freed by hard-linking {} files", mib(saved.bytes), saved.files);
            cx.terminal.message(Level::Notice, text);
        }
    }
    outcome?;
    Ok(Status::SUCCESS)
}
