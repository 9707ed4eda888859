//! `larder gc`, `larder why`, `larder roots`, `larder optimise`: collecting garbage, explained.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use larder_core::api::{Collect, RootLink, StoreError as ApiError};
use larder_core::path_info::PathInfo;
use larder_core::report::{Level, Reporter as _};
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_fs::layout::{Access, Layout};
use larder_gc::live::Rules;
use larder_gc::roots::{Root, RootKind};
use larder_gc::why::Step;
use larder_store::StoreError;
use larder_store::collect::{CollectOptions, Freed};
use larder_store::plan::{Plan, Planned, Reason, measure_there};
use larder_store::survey::Survey;
use larder_store_db::Graph;
use serde_json::{Value, json};

use super::Json;
use crate::applets::Context;
use crate::applets::nix_store::store::{Voice, mib};
use crate::applets::place::{Place, Side};
use crate::args::{Common, parse_unsigned, shown};
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

fn full(dir: &StoreDir, name: &OsStr) -> String {
    format!("{}/{}", dir.as_str(), text(name))
}

pub(super) fn collect(cx: &Context, settings: &Settings, common: &Common, args: &Gc) -> Result<Status, Failure> {
    let only_tell = args.dry_run || !args.if_dropped.is_empty();
    let access = if only_tell { Access::ReadOnly } else { Access::ReadWrite };
    let place = Place::open_for_survey(cx, settings, common, access)?;
    if let Some(local) = place.local().filter(|_| !only_tell) {
        // Before anybody is asked a question.
        local.refuse_unless_adopted()?;
    }
    let dir = place.store().dir();
    let plan = if args.if_dropped.is_empty() {
        plan(cx, &place)?
    } else {
        let survey = survey(&place, settings)?;
        let dropped = named_roots(&survey, &args.if_dropped)?;
        let measured = |dead| measure(cx, &place, survey.entries(dead));
        measured(&survey.dead_without(&dropped))?.without(&measured(&survey.dead())?)
    };
    let mut out = Printer::new(Output::Listing);
    if !args.json.json {
        print_plan(&mut out, dir, &plan, args)?;
        io::Write::flush(&mut out)?;
    }
    let mut freed = Freed::default();
    let mut outcome = Ok(());
    let wanted = !only_tell && (args.yes || args.json.json || plan.entries.is_empty() || ask(cx)?);
    if args.json.json && !only_tell && !args.yes {
        return Err(GarbageError::NobodyToAsk.into());
    }
    if wanted && !(plan.entries.is_empty() && plan.freed_bytes == 0) {
        outcome = delete(&place, args.max_freed, &mut freed);
    }
    if args.json.json {
        let mut value = plan_json(dir, &plan);
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

/// Collects; what was freed is known also after an error, if the store is ours.
fn delete(place: &Place, max_freed_bytes: Option<u64>, freed: &mut Freed) -> Result<(), Failure> {
    if let Some(local) = place.local() {
        return Ok(local.collect(CollectOptions { max_freed_bytes }, freed)?);
    }
    let done = place.store().collect(&Collect::DeleteDead, max_freed_bytes.unwrap_or(u64::MAX))?;
    (freed.paths, freed.bytes) = (done.paths.len() as u64, done.bytes_freed);
    Ok(())
}

/// What a collection would delete now. What is dead in a store of another process is what that one says.
fn plan(cx: &Context, place: &Place) -> Result<Plan, Failure> {
    if let Some(local) = place.local() {
        return Ok(local.plan(&local.survey()?)?);
    }
    let (store, dir) = (place.store(), place.store().dir());
    let dead = store.collect(&Collect::ListDead, u64::MAX)?.paths;
    // Names that are no store paths are deleted as well, but are not told of.
    let paths: BTreeSet<StorePath> = dead.iter().filter_map(|path| dir.parse(path).ok()).collect();
    // A daemon protects paths that it is asked about by name, as long as we are there.
    let valid = store.all_paths()?;
    measure(cx, place, paths.iter().map(|path| (path.to_string().into(), valid.contains(path))).collect())
}

/// What deleting some entries of the store directory, valid ones or not, would free.
fn measure(cx: &Context, place: &Place, mut entries: Vec<(OsString, bool)>) -> Result<Plan, Failure> {
    match (place.local(), place.layout()) {
        (Some(local), _) => return Ok(local.measure(entries)?),
        (None, Some(layout)) => {
            let voice = Voice { terminal: Arc::clone(&cx.terminal), interrupt: cx.interrupt.clone() };
            return Ok(measure_there(entries, layout, &voice)?);
        }
        (None, None) => {}
    }
    // Where the files are out of reach, the sizes are those of archives.
    entries.sort_unstable();
    let paths = entries.iter().map(|(name, _)| StorePath::from_base_name(name.as_bytes()));
    let infos = place.store().infos(&paths.collect::<Result<Vec<_>, _>>()?)?;
    let planned = entries.into_iter().zip(infos).map(|((name, valid), info)| Planned {
        name,
        valid,
        size_bytes: info.map_or(0, |info| info.nar_size_bytes),
    });
    let entries: Vec<Planned> = planned.collect();
    let freed_bytes = entries.iter().map(|entry| entry.size_bytes).sum();
    Ok(Plan { entries, freed_bytes })
}

/// What lives in a store, and what keeps it. What is not valid is known of a store of ours only.
fn survey(place: &Place, settings: &Settings) -> Result<Survey, Failure> {
    if let Some(local) = place.local() {
        return Ok(local.survey()?);
    }
    let store = place.store();
    let rules = Rules { keep_outputs: settings.keep_outputs, keep_derivations: settings.keep_derivations };
    // First what is about to be there, as a collector has it.
    let roots = all_roots(place)?;
    let paths: Vec<StorePath> = store.all_paths()?.into_iter().collect();
    let records: Vec<PathInfo> = store.infos(&paths)?.into_iter().flatten().collect();
    let mut outputs = BTreeMap::new();
    for drv in paths.into_iter().filter(|path| rules.keep_outputs && path.is_derivation()) {
        outputs.insert(drv.clone(), store.derivation_outputs(&drv)?.into_values().flatten().collect());
    }
    Ok(Survey::of_told(Graph::of_records(&records, &outputs)?, rules, roots))
}

/// All roots, sorted by link and path.
fn all_roots(place: &Place) -> Result<Vec<Root>, Failure> {
    if let Some(local) = place.local() {
        return Ok(local.all_roots()?);
    }
    let told = place.store().roots()?.into_iter().map(|RootLink { link, path, .. }| {
        let link = PathBuf::from(OsString::from_vec(link));
        Root { kind: kind_of(&link, place.layout()), link, path }
    });
    let mut roots: Vec<Root> = told.collect();
    roots.sort();
    Ok(roots)
}

/// What a root is, by what it is called: the protocol says no more.
fn kind_of(link: &Path, layout: Option<&Layout>) -> RootKind {
    let text = link.as_os_str().as_bytes();
    if text.starts_with(b"{temp:") {
        return RootKind::Temporary;
    }
    // As `{censored}` for whoever is not trusted, and `{lsof}`.
    if text.starts_with(b"{") || text.starts_with(b"/proc/") {
        return RootKind::Runtime;
    }
    let is_known = match layout {
        Some(layout) => link.starts_with(layout.gc_roots()) || link.starts_with(layout.profiles()),
        // Wherever they may lie over there.
        None => link.iter().any(|part| part == "gcroots" || part == "profiles"),
    };
    match (is_known, layout.and_then(|_| link.symlink_metadata().ok())) {
        (false, _) => RootKind::Indirect,
        (true, Some(status)) if status.is_file() => RootKind::File,
        (true, _) => RootKind::Link,
    }
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

fn print_plan(out: &mut Printer, dir: &StoreDir, plan: &Plan, args: &Gc) -> Result<(), Failure> {
    let mut entries: Vec<_> = plan.entries.iter().collect();
    let more = if args.list {
        0
    } else {
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.size_bytes));
        entries.len().saturating_sub(LARGEST)
    };
    for entry in entries.iter().take(plan.entries.len() - more) {
        let note = if entry.valid { "" } else { "  (not valid)" };
        out.line(format_args!("{:>14}  {}{note}", mib(entry.size_bytes), full(dir, &entry.name)))?;
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

fn plan_json(dir: &StoreDir, plan: &Plan) -> Value {
    let entries: Vec<Value> = plan
        .entries
        .iter()
        .map(|entry| json!({"path": full(dir, &entry.name), "valid": entry.valid, "size": entry.size_bytes}))
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

pub(super) fn why(cx: &Context, settings: &Settings, common: &Common, args: &Why) -> Result<Status, Failure> {
    let place = Place::open_for_survey(cx, settings, common, Access::ReadOnly)?;
    let dir = place.store().dir();
    let paths: Vec<_> = args.paths.iter().map(|path| store_path(dir, path.as_os_str())).collect::<Result<_, _>>()?;
    let survey = survey(&place, settings)?;
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    let mut values = Vec::new();
    for path in &paths {
        let reasons = survey.why(path).ok_or_else(|| ApiError::not_valid(dir, path))?;
        let path = dir.full(path);
        if args.json.json {
            let reasons: Vec<Value> = reasons.iter().map(|reason| reason_json(dir, &survey, reason)).collect();
            values.push(json!({"path": path, "live": !reasons.is_empty(), "roots": reasons}));
            continue;
        }
        if reasons.is_empty() {
            out.line(format_args!("{path}: no root keeps it; the next collection deletes it"))?;
        }
        for reason in &reasons {
            out.line(format_args!("{} ({})", reason.root.link.display(), kind(reason.root.kind)))?;
            out.line(format_args!("  -> {}", dir.full(&survey.graph.path(reason.chain.start))))?;
            for (step, node) in &reason.chain.steps {
                let name = dir.full(&survey.graph.path(*node));
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

fn root_json(dir: &StoreDir, root: &Root) -> Value {
    let mut value = json!({
        "link": text(root.link.as_os_str()), "path": dir.full(&root.path), "kind": kind(root.kind),
    });
    if let Some(pid) = pid(root) {
        set(&mut value, "pid", json!(pid));
    }
    value
}

fn reason_json(dir: &StoreDir, survey: &Survey, reason: &Reason) -> Value {
    let name = |node| dir.full(&survey.graph.path(node));
    let steps = reason.chain.steps.iter().map(|(step, node)| {
        let by = match step {
            Step::Reference => "reference",
            Step::Deriver => "keep-derivations",
            Step::Output => "keep-outputs",
        };
        json!({"by": by, "path": name(*node)})
    });
    let mut value = root_json(dir, &reason.root);
    set(&mut value, "chain", steps.collect());
    value
}

pub(super) fn roots(cx: &Context, settings: &Settings, common: &Common, args: &Roots) -> Result<Status, Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadOnly)?;
    let dir = place.store().dir();
    let roots = all_roots(&place)?;
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    if args.json.json {
        out.line(roots.iter().map(|root| root_json(dir, root)).collect::<Value>())?;
    } else {
        for root in &roots {
            out.line(root.display(dir))?;
        }
    }
    out.finish()?;
    Ok(Status::SUCCESS)
}

pub(super) fn optimise(cx: &Context, settings: &Settings, common: &Common, args: &Optimise) -> Result<Status, Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadWrite)?;
    let local = match place.side(cx, settings, common) {
        Side::Here(local) => local,
        Side::Far(far) if args.json.json => return Err(far.not_there("optimise --json")),
        // Whoever does it tells what it has saved.
        Side::Far(_) => {
            place.store().optimise()?;
            return Ok(Status::SUCCESS);
        }
    };
    let outcome = local.optimise();
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
