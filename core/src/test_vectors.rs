//! Reads the vector files, for tests of this crate.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::store_dir::StoreDir;
use crate::store_path::StorePath;

/// `tests/vectors/NAME.json`.
pub(crate) fn vector_file(name: &str) -> Value {
    let path = format!("{}/../tests/vectors/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {path}: {e}"));
    serde_json::from_str(&text).unwrap()
}

/// The cases of `tests/vectors/NAME.json`.
pub(crate) fn cases(name: &str) -> Vec<Value> {
    match vector_file(name)["cases"].take() {
        Value::Array(cases) => cases,
        _ => panic!("{name} has no cases"),
    }
}

/// Bytes of a base-64 string.
pub(crate) fn base64(value: &Value) -> Vec<u8> {
    crate::hash::decode_base64(value.as_str().unwrap()).unwrap()
}

/// Full paths of an array.
pub(crate) fn store_paths(dir: &StoreDir, value: &Value) -> BTreeSet<StorePath> {
    value.as_array().unwrap().iter().map(|p| dir.parse(p.as_str().unwrap()).unwrap()).collect()
}

/// The NAR of a tree as the vectors describe it. Written out here, apart from the real encoder.
pub(crate) fn nar_of(tree: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    token(&mut out, b"nix-archive-1");
    node(&mut out, tree);
    out
}

fn token(out: &mut Vec<u8>, text: &[u8]) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text);
    out.resize(out.len().next_multiple_of(8), 0);
}

fn node(out: &mut Vec<u8>, tree: &Value) {
    let text = |key: &str| tree[key].as_str().unwrap_or_default().as_bytes();
    token(out, b"(");
    token(out, b"type");
    token(out, text("type"));
    match text("type") {
        b"regular" => {
            token(out, b"contents");
            let mut contents = Vec::new();
            for part in tree["parts"].as_array().unwrap() {
                if part["b64"].is_string() {
                    contents.extend(base64(&part["b64"]));
                } else {
                    let byte = u8::from_str_radix(part["byte_hex"].as_str().unwrap(), 16).unwrap();
                    let count = usize::try_from(part["count"].as_u64().unwrap()).unwrap();
                    contents.resize(contents.len() + count, byte);
                }
            }
            token(out, &contents);
        }
        b"symlink" => {
            token(out, b"target");
            token(out, text("target"));
        }
        _ => {
            for (name, entry) in tree["entries"].as_object().unwrap() {
                for text in [b"entry".as_slice(), b"(", b"name", name.as_bytes(), b"node"] {
                    token(out, text);
                }
                node(out, entry);
                token(out, b")");
            }
        }
    }
    token(out, b")");
}
