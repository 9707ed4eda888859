//! `exportReferencesGraph`: closures that a builder gets to read.
//!
//! Source: building, section 4; modern, section 7.3.

use std::collections::{BTreeMap, BTreeSet};

use larder_core::derivation::options::Attributes;
use larder_core::path_info::PathInfo;
use larder_core::registration;
use larder_core::store_path::StorePath;
use larder_store::LocalStore;
use serde_json::{Map, Value, json};

use crate::job::{Failure, FailureKind};

const ATTRIBUTE: &str = "exportReferencesGraph";

fn refused(text: String) -> Failure {
    Failure::new(FailureKind::InputRejected, text)
}

/// The files that plain attributes ask for.
pub(super) fn files(
    store: &LocalStore,
    attributes: &Attributes<'_>,
    inputs: &BTreeSet<StorePath>,
) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let mut files = BTreeMap::new();
    if attributes.structured().is_some() {
        return Ok(files);
    }
    let Some(words) = attributes.strings(ATTRIBUTE)? else { return Ok(files) };
    if words.len() % 2 != 0 {
        let text = attributes.string(ATTRIBUTE)?.unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        return Err(refused(format!("odd number of tokens in '{ATTRIBUTE}': '{text}'")));
    }
    for pair in words.chunks_exact(2) {
        let [name, path] = pair else { continue };
        let shown = String::from_utf8_lossy(name);
        if !is_file_name(name) {
            return Err(refused(format!("invalid file name '{shown}' in '{ATTRIBUTE}'")));
        }
        let (path, _) = store.dir().parse_inside(path).map_err(|_| {
            let path = String::from_utf8_lossy(path);
            // Real Nix takes this for a failure of the builder.
            Failure::new(FailureKind::Permanent, format!("'{ATTRIBUTE}' contains a non-store path '{path}'"))
        })?;
        let mut text = Vec::new();
        for info in exported(store, &BTreeSet::from([path]), inputs)? {
            registration::write_record(
                &mut text,
                store.dir(),
                (&info.path).into(),
                None,
                None,
                info.references.iter().map(Into::into).collect::<Vec<_>>().into_iter(),
            );
        }
        files.insert(shown.into_owned(), text);
    }
    Ok(files)
}

/// `[A-Za-z_][A-Za-z0-9_.-]*`
fn is_file_name(name: &[u8]) -> bool {
    let mut bytes = name.iter();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || *b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(b))
}

/// The values that structured attributes ask for.
pub(super) fn values(
    store: &LocalStore,
    attributes: &Attributes<'_>,
    inputs: &BTreeSet<StorePath>,
) -> Result<BTreeMap<String, Value>, Failure> {
    let mut values = BTreeMap::new();
    let Some(Value::Object(wanted)) = attributes.structured().and_then(|map| map.get(ATTRIBUTE)) else {
        return Ok(values);
    };
    for (key, value) in wanted {
        let mut roots = BTreeSet::new();
        let items = match value {
            Value::Array(items) => items.as_slice(),
            one => std::slice::from_ref(one),
        };
        for item in items {
            let text = item.as_str().ok_or_else(|| {
                refused(format!("'{ATTRIBUTE}' must hold store paths, but '{key}' has something else"))
            })?;
            let parsed = store.dir().parse_inside(text.as_bytes());
            let (path, _) = parsed.map_err(|_| {
                Failure::new(FailureKind::Permanent, format!("'{ATTRIBUTE}' contains a non-store path '{text}'"))
            })?;
            roots.insert(path);
        }
        let infos = exported(store, &roots, inputs)?;
        let by_path: BTreeMap<&StorePath, &PathInfo> = infos.iter().map(|info| (&info.path, info)).collect();
        let graph = infos.iter().map(|info| to_json(store, info, &by_path)).collect();
        values.insert(key.clone(), Value::Array(graph));
    }
    Ok(values)
}

fn to_json(store: &LocalStore, info: &PathInfo, all: &BTreeMap<&StorePath, &PathInfo>) -> Value {
    // The whole graph is closed, so the sizes are all in it.
    let mut seen = BTreeSet::from([&info.path]);
    let mut todo = vec![info];
    let mut closure_size = 0u64;
    while let Some(next) = todo.pop() {
        closure_size = closure_size.saturating_add(next.nar_size_bytes);
        for reference in &next.references {
            if let Some(other) = all.get(reference)
                && seen.insert(&other.path)
            {
                todo.push(other);
            }
        }
    }
    let mut object = Map::new();
    if let Some(address) = &info.content_address {
        object.insert("ca".into(), address.to_string().into());
    }
    object.insert("closureSize".into(), closure_size.into());
    object.insert("narHash".into(), format!("sha256:{}", info.nar_hash.to_base32()).into());
    object.insert("narSize".into(), info.nar_size_bytes.into());
    object.insert("path".into(), store.dir().full(&info.path).into());
    let references: Vec<String> = info.references.iter().map(|path| store.dir().full(path)).collect();
    object.insert("references".into(), json!(references));
    Value::Object(object)
}

/// The closure of some inputs, and of all outputs of the derivations in it, ascending.
fn exported(
    store: &LocalStore,
    roots: &BTreeSet<StorePath>,
    inputs: &BTreeSet<StorePath>,
) -> Result<Vec<PathInfo>, Failure> {
    if let Some(other) = roots.iter().find(|path| !inputs.contains(path)) {
        let path = store.dir().display(other);
        return Err(refused(format!(
            "cannot export references of path '{path}' because it is not in the input closure of the derivation"
        )));
    }
    let mut all = store.closure(roots)?;
    let mut outputs = BTreeSet::new();
    for drv in all.iter().filter(|path| path.is_derivation()) {
        outputs.extend(store.known_outputs(drv)?.into_values());
    }
    if !outputs.is_empty() {
        all.extend(store.closure(&outputs)?);
    }
    Ok(store.infos(&all)?)
}
