//! `larder path-info`, `closure` and `du`: what the store knows, and what takes the space.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::PathBuf;

use indicatif::HumanBytes;
use jiff::Timestamp;
use larder_core::api::{Store, StoreError as ApiError};
use larder_core::hash::Encoding;
use larder_core::path_info::PathInfo;
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_fs::layout::Access;
use larder_store::StoreError;
use larder_store_db::graph::closure_of;
use larder_store_db::{Graph, Node, Walk};
use serde_json::{Map, Value, json};

use super::{Closure, ClosureFormat, Du, PathInfo as PathInfoArgs};
use crate::applets::nix_store::query::Snapshot;
use crate::applets::nix_store::remote::query::referrers_closure;
use crate::applets::place::Place;
use crate::applets::{Context, print_json};
use crate::args::Common;
use crate::exit::Failure;
use crate::graphs::{self, Tree};
use crate::paths::store_paths;
use crate::printer::{Output, Printer};

/// The store paths that arguments of `larder` stand for.
pub(super) fn paths(dir: &StoreDir, arguments: &[PathBuf]) -> Result<Vec<StorePath>, Failure> {
    let words: Vec<OsString> = arguments.iter().map(|path| path.clone().into_os_string()).collect();
    Ok(store_paths(dir, &words)?)
}

/// `larder path-info`.
pub(super) fn path_info(
    cx: &Context,
    settings: &Settings,
    common: &Common,
    args: &PathInfoArgs,
) -> Result<(), Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadOnly)?;
    let store = place.store();
    let asked = match (args.all, place.local()) {
        (false, _) => paths(store.dir(), &args.paths)?,
        (true, Some(local)) => local.read(|txn| Ok(txn.all_paths()?))?,
        (true, None) => store.all_paths()?.into_iter().collect(),
    };
    let wanted = if args.recursive { closure(&place, &asked, Walk::REFERENCES)?.1 } else { asked };
    let infos = store.infos(&wanted)?;
    let mut infos = infos.into_iter();
    let sizes = if args.closure_size { closure_sizes(&place, &wanted)? } else { Vec::new() };
    let mut sizes = sizes.into_iter();
    let mut all = Map::new();
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    for path in &wanted {
        let info = infos.next().flatten().ok_or_else(|| ApiError::not_valid(store.dir(), path))?;
        let closure_bytes = sizes.next();
        if args.json.json {
            all.insert(store.dir().full(path), as_json(store.dir(), &info, closure_bytes));
        } else {
            out.bytes(as_text(store.dir(), &info, closure_bytes).as_bytes())?;
        }
    }
    if args.json.json {
        return print_json(&Value::Object(all));
    }
    Ok(out.finish()?)
}

/// What `nix path-info --json` prints for a path, so that scripts can read either.
fn as_json(dir: &StoreDir, info: &PathInfo, closure_bytes: Option<u64>) -> Value {
    let full = |path: &StorePath| dir.full(path);
    let mut value = json!({
        "ca": info.content_address.as_ref().map(ToString::to_string),
        "deriver": info.deriver.as_ref().map(full),
        "narHash": info.nar_hash.to_hash().encode(Encoding::Sri),
        "narSize": info.nar_size_bytes,
        "references": info.references.iter().map(full).collect::<Vec<_>>(),
        "registrationTime": info.registration_time_s,
        "signatures": info.signatures.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "ultimate": info.ultimate,
    });
    if let (Some(bytes), Some(object)) = (closure_bytes, value.as_object_mut()) {
        object.insert("closureSize".to_owned(), bytes.into());
    }
    value
}

fn as_text(dir: &StoreDir, info: &PathInfo, closure_bytes: Option<u64>) -> String {
    let mut lines = vec![dir.full(&info.path)];
    let mut row = |name: &str, value: String| lines.push(format!("  {name:<11} {value}"));
    row("size", HumanBytes(info.nar_size_bytes).to_string());
    if let Some(bytes) = closure_bytes {
        row("closure", HumanBytes(bytes).to_string());
    }
    row("hash", info.nar_hash.to_hash().encode(Encoding::Sri));
    if let Some(address) = &info.content_address {
        row("address", address.to_string());
    }
    row("registered", time(info.registration_time_s));
    if let Some(deriver) = &info.deriver {
        row("deriver", deriver.to_string());
    }
    if info.ultimate {
        row("built", "here".to_owned());
    }
    for signature in &info.signatures {
        row("signature", signature.to_string());
    }
    for (index, reference) in info.references.iter().enumerate() {
        let itself = if *reference == info.path { " (itself)" } else { "" };
        row(if index == 0 { "references" } else { "" }, format!("{reference}{itself}"));
    }
    lines.push(String::new());
    lines.join("\n")
}

/// Seconds since 1970 as a date and time in UTC.
pub(super) fn time(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

/// What some valid paths need, or what needs them, as it is at one moment; with the paths in
/// dependency order.
fn closure(place: &Place, asked: &[StorePath], walk: Walk) -> Result<(Graph, Vec<StorePath>), Failure> {
    let store = place.store();
    let valid = store.valid_subset(&asked.iter().cloned().collect())?;
    if let Some(path) = asked.iter().find(|path| !valid.contains(*path)) {
        return Err(ApiError::not_valid(store.dir(), path).into());
    }
    let in_dir = |error| StoreError::from(error).in_dir(store.dir());
    let graph = if let Some(local) = place.local() {
        local.read(|txn| Ok(Some(closure_of(txn, asked, walk)?)))?.unwrap_or_default()
    } else {
        let set = if walk.backward { referrers_closure(store, asked)? } else { store.closure(&valid, false)? };
        told(store, set)?
    };
    let order = graph.topological_all().map_err(in_dir)?;
    let order = order.into_iter().map(|node| graph.path(node)).collect();
    Ok((graph, order))
}

/// Some valid paths, and what binds them, as whoever keeps the store tells it.
fn told(store: &dyn Store, paths: BTreeSet<StorePath>) -> Result<Graph, Failure> {
    let paths: Vec<StorePath> = paths.into_iter().collect();
    let mut records = Vec::with_capacity(paths.len());
    for (path, info) in paths.iter().zip(store.infos(&paths)?) {
        records.push(info.ok_or_else(|| ApiError::not_valid(store.dir(), path))?);
    }
    Ok(Graph::of_records(&records, &BTreeMap::new())?)
}

/// The size of the closure of each of some valid paths, in bytes of archives.
fn closure_sizes(place: &Place, asked: &[StorePath]) -> Result<Vec<u64>, Failure> {
    let (graph, _) = closure(place, asked, Walk::REFERENCES)?;
    Ok(asked.iter().map(|path| graph.node(path).map_or(0, |node| closure_bytes(&graph, node))).collect())
}

fn closure_bytes(graph: &Graph, node: Node) -> u64 {
    graph.closure([node], Walk::REFERENCES).iter().map(|node| graph.nar_size_bytes(node)).sum()
}

/// `larder closure`.
pub(super) fn print_closure(cx: &Context, settings: &Settings, common: &Common, args: &Closure) -> Result<(), Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadOnly)?;
    let store = place.store();
    let asked = paths(store.dir(), &args.paths)?;
    let walk = if args.referrers { Walk::REFERRERS } else { Walk::REFERENCES };
    let (graph, order) = closure(&place, &asked, walk)?;
    if args.json.json {
        let list: Vec<String> = order.iter().map(|path| store.dir().full(path)).collect();
        return print_json(&json!(list));
    }
    let mut out = Printer::paged(&cx.env, &cx.interrupt);
    let mut snapshot = Snapshot::new(store.dir(), graph, args.referrers);
    match args.format {
        ClosureFormat::List => {
            for path in &order {
                out.line(store.dir().display(path))?;
            }
        }
        ClosureFormat::Tree => {
            let mut tree = Tree::default();
            for path in &asked {
                tree.print(store.dir(), path, &mut snapshot, &mut out)?;
            }
        }
        ClosureFormat::Dot => graphs::print_dot(asked, &mut snapshot, &mut out)?,
        ClosureFormat::Graphml => graphs::print_graphml(asked, &mut snapshot, &mut out)?,
    }
    Ok(out.finish()?)
}

/// What one path takes.
#[derive(Debug, PartialEq, Eq)]
struct Taken {
    path: StorePath,
    closure_bytes: u64,
    /// What would be free if nothing but this path had ever been wanted less.
    own_bytes: u64,
}

/// `larder du`.
pub(super) fn disk_usage(cx: &Context, settings: &Settings, common: &Common, args: &Du) -> Result<(), Failure> {
    let place = Place::open(cx, settings, common, None, Access::ReadOnly)?;
    let store = place.store();
    let rooted: BTreeSet<StorePath> = store.roots()?.into_iter().map(|root| root.path).collect();
    let asked: BTreeSet<StorePath> =
        if args.paths.is_empty() { rooted.clone() } else { paths(store.dir(), &args.paths)?.into_iter().collect() };
    let bases: Vec<StorePath> = rooted.union(&asked).cloned().collect();
    let (graph, _) = closure(&place, &bases, Walk::REFERENCES)?;
    let mut taken = measure(&graph, &bases).map_err(|error| StoreError::from(error).in_dir(store.dir()))?;
    taken.retain(|row| asked.contains(&row.path));
    taken.sort_by(|a, b| b.closure_bytes.cmp(&a.closure_bytes).then_with(|| a.path.cmp(&b.path)));
    taken.truncate(args.largest.unwrap_or(usize::MAX));
    if args.json.json {
        let rows: Vec<Value> = taken
            .iter()
            .map(|row| {
                json!({
                    "path": store.dir().full(&row.path),
                    "closureSize": row.closure_bytes,
                    "ownSize": row.own_bytes,
                })
            })
            .collect();
        return print_json(&json!(rows));
    }
    let mut out = Printer::new(Output::Listing);
    if !taken.is_empty() {
        out.line(format_args!("{:>12}  {:>12}  path", "closure", "only here"))?;
    }
    for row in &taken {
        let (closure, own) = (HumanBytes(row.closure_bytes).to_string(), HumanBytes(row.own_bytes).to_string());
        out.line(format_args!("{closure:>12}  {own:>12}  {}", store.dir().display(&row.path)))?;
    }
    Ok(out.finish()?)
}

/// Who needs a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needed {
    By(Node),
    BySeveral,
}

/// What the closure of each base takes, and how much of it no other base needs.
///
/// One pass over the graph tells who needs what: from referrers to what they refer to.
fn measure(graph: &Graph, bases: &[StorePath]) -> Result<Vec<Taken>, larder_store_db::DbError> {
    let nodes: Vec<Node> = bases.iter().filter_map(|path| graph.node(path)).collect();
    let mut needed: BTreeMap<Node, Needed> = nodes.iter().map(|node| (*node, Needed::By(*node))).collect();
    let mut own: BTreeMap<Node, u64> = BTreeMap::new();
    for node in graph.topological_all()?.into_iter().rev() {
        let Some(who) = needed.get(&node).copied() else { continue };
        if let Needed::By(base) = who {
            *own.entry(base).or_default() += graph.nar_size_bytes(node);
        }
        for reference in graph.references(node).filter(|reference| *reference != node) {
            let merged = match needed.get(&reference) {
                None => who,
                Some(other) if *other == who => who,
                Some(_) => Needed::BySeveral,
            };
            needed.insert(reference, merged);
        }
    }
    let row = |node: &Node| Taken {
        path: graph.path(*node),
        closure_bytes: closure_bytes(graph, *node),
        own_bytes: own.get(node).copied().unwrap_or(0),
    };
    Ok(nodes.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_utc() {
        assert_eq!(time(0), "1970-01-01T00:00:00Z");
        assert_eq!(time(1_000_000_000), "2001-09-09T01:46:40Z");
        assert_eq!(time(u64::MAX), i64::MAX.to_string());
    }
}
