//! Derivations as JSON, in the shapes of Nix 2.8 (`nix show-derivation`) and of Nix 2.26
//! (`nix derivation show` and `add`).
//!
//! Both programs print an object that maps the path of each derivation to the value made here.
//! JSON is text, so a derivation with other bytes has no such form. Source: formats, section
//! 5.7; `derivations.json`, `drv_parse.json`.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{Bytes, Derivation, Output, OutputMethod, OutputName, address_hash, aterm};
use crate::content_address::{ContentAddress, Method};
use crate::hash::{Algorithm, Encoding, Hash, HashError};
use crate::store_dir::{MakePathError, StoreDir};
use crate::store_path::{Name, NameError, StorePath, StorePathError};

/// Why a derivation has no JSON form, or a JSON value is no derivation.
///
/// `place` says where in the value, such as `outputs.out.method`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JsonError {
    #[error("{place} is not valid UTF-8 ('{shown}'), so it cannot be written as JSON")]
    NotUtf8 { place: String, shown: String },
    #[error("{place} should be {wanted}")]
    Type { place: String, wanted: &'static str },
    #[error("{place} has no key '{key}'")]
    Missing { place: String, key: &'static str },
    #[error("{place} has an unexpected key '{key}'")]
    Unexpected { place: String, key: String },
    #[error("{place} has keys ({keys}) that no kind of output has")]
    OutputKeys { place: String, keys: String },
    #[error("{place} is not empty, which needs the experimental feature 'dynamic-derivations'; that is not supported")]
    Dynamic { place: String },
    #[error("{place} is no name")]
    Name { place: String, source: NameError },
    #[error("{place} is no store path")]
    Path { place: String, source: StorePathError },
    #[error("{place} is not a hash, or not of the given algorithm")]
    Hash { place: String, source: HashError },
    #[error("{place} is '{found}', not 'flat', 'nar', 'git' or 'text'")]
    Method { place: String, found: String },
    #[error("{place} has method '{method}', which does not go with {algorithm}")]
    Algorithm { place: String, method: &'static str, algorithm: Algorithm },
    #[error("{place} has no possible path")]
    MakePath { place: String, source: MakePathError },
    #[error("{place} is '{found}', but the hash leads to '{right}'")]
    WrongPath { place: String, found: String, right: String },
    #[error("{place} must be text without '\"' and '\\'")]
    System { place: String },
}

/// The shape of Nix 2.8.
pub fn to_json_2_8(drv: &Derivation, dir: &StoreDir) -> Result<Value, JsonError> {
    let output = |output: &Output| {
        let mut map = Map::new();
        if let Some(path) = output.path() {
            map.insert("path".into(), dir.full(path).into());
        }
        let (algorithm, hash) = output.hash_fields();
        if !algorithm.is_empty() {
            map.insert("hashAlgo".into(), algorithm.into());
        }
        match output {
            Output::Fixed { .. } => map.insert("hash".into(), hash.into()),
            Output::Impure { .. } => map.insert("impure".into(), true.into()),
            _ => None,
        };
        Value::Object(map)
    };
    let mut map = Map::new();
    map.insert("outputs".into(), outputs(drv, output));
    map.insert("inputSrcs".into(), input_srcs(drv, dir));
    map.insert("inputDrvs".into(), input_drvs(drv, dir, |names| names));
    map.insert("system".into(), drv.system.clone().into());
    map.insert("builder".into(), text(&drv.builder, || "builder".into())?);
    map.insert("args".into(), args(drv)?);
    map.insert("env".into(), env(drv)?);
    Ok(Value::Object(map))
}

/// The shape of Nix 2.26; keys are sorted throughout.
pub fn to_json(drv: &Derivation, dir: &StoreDir) -> Result<Value, JsonError> {
    let output = |output: &Output| match output {
        Output::InputAddressed(path) => json!({ "path": dir.full(path) }),
        Output::Fixed { address, path } => {
            let hash = address_hash(address);
            json!({
                "hash": hash.encode(Encoding::Base16),
                "hashAlgo": hash.algorithm().name(),
                "method": method_name(OutputMethod::of(address)),
                "path": dir.full(path),
            })
        }
        Output::Floating { method, algorithm } => {
            json!({ "hashAlgo": algorithm.name(), "method": method_name(*method) })
        }
        Output::Deferred => json!({}),
        Output::Impure { method, algorithm } => {
            json!({ "hashAlgo": algorithm.name(), "impure": true, "method": method_name(*method) })
        }
    };
    let mut map = Map::new();
    map.insert("args".into(), args(drv)?);
    map.insert("builder".into(), text(&drv.builder, || "builder".into())?);
    map.insert("env".into(), env(drv)?);
    map.insert("inputDrvs".into(), input_drvs(drv, dir, |names| json!({ "dynamicOutputs": {}, "outputs": names })));
    map.insert("inputSrcs".into(), input_srcs(drv, dir));
    map.insert("name".into(), drv.name.as_str().into());
    map.insert("outputs".into(), outputs(drv, output));
    map.insert("system".into(), drv.system.clone().into());
    Ok(Value::Object(map))
}

fn method_name(method: OutputMethod) -> &'static str {
    match method {
        OutputMethod::Fixed(Method::Flat) => "flat",
        OutputMethod::Fixed(Method::Recursive) => "nar",
        OutputMethod::Fixed(Method::Git) => "git",
        OutputMethod::Text => "text",
    }
}

fn text(bytes: &Bytes, place: impl FnOnce() -> String) -> Result<Value, JsonError> {
    match bytes.as_str() {
        Some(text) => Ok(text.into()),
        None => Err(JsonError::NotUtf8 { place: place(), shown: bytes.to_string() }),
    }
}

fn outputs(drv: &Derivation, output: impl Fn(&Output) -> Value) -> Value {
    drv.outputs.iter().map(|(name, value)| (name.to_string(), output(value))).collect::<Map<_, _>>().into()
}

fn input_srcs(drv: &Derivation, dir: &StoreDir) -> Value {
    drv.input_srcs.iter().map(|path| dir.full(path)).collect()
}

fn input_drvs(drv: &Derivation, dir: &StoreDir, shape: impl Fn(Value) -> Value) -> Value {
    let entry = |(path, names): (&StorePath, &BTreeSet<OutputName>)| {
        (dir.full(path), shape(names.iter().map(OutputName::as_str).collect()))
    };
    drv.input_drvs.iter().map(entry).collect::<Map<_, _>>().into()
}

fn args(drv: &Derivation) -> Result<Value, JsonError> {
    drv.args
        .iter()
        .enumerate()
        .map(|(n, arg)| text(arg, || format!("args[{n}]")))
        .collect::<Result<Vec<_>, _>>()
        .map(Value::Array)
}

fn env(drv: &Derivation) -> Result<Value, JsonError> {
    let mut map = Map::new();
    for (key, value) in &drv.env {
        let Some(name) = key.as_str() else {
            return Err(JsonError::NotUtf8 { place: "a key of env".into(), shown: key.to_string() });
        };
        map.insert(name.to_owned(), text(value, || format!("env.{key}"))?);
    }
    Ok(Value::Object(map))
}

/// Reads the shape of Nix 2.26, and nothing besides: each object has exactly its keys.
pub fn from_json(dir: &StoreDir, value: &Value) -> Result<Derivation, JsonError> {
    const KEYS: [&str; 8] = ["args", "builder", "env", "inputDrvs", "inputSrcs", "name", "outputs", "system"];
    let [args, builder, env, input_drvs, input_srcs, name, outputs, system] = fields(value, "the derivation", KEYS)?;
    let name = string(name, || "name".into())?;
    let name = Name::new(name).map_err(|source| JsonError::Name { place: "name".into(), source })?;
    let system = string(system, || "system".into())?;
    if !aterm::is_system(system) {
        return Err(JsonError::System { place: "system".into() });
    }
    let mut drv = Derivation {
        name,
        outputs: BTreeMap::new(),
        input_drvs: BTreeMap::new(),
        input_srcs: BTreeSet::new(),
        system: system.to_owned(),
        builder: string(builder, || "builder".into())?.into(),
        args: Vec::new(),
        env: BTreeMap::new(),
    };
    for (output, value) in object(outputs, || "outputs".into())? {
        let place = format!("outputs.{output}");
        let output = output_name(output, &place)?;
        let value = read_output(dir, &drv.name, &output, value, &place)?;
        drv.outputs.insert(output, value);
    }
    for (path, value) in object(input_drvs, || "inputDrvs".into())? {
        let place = format!("inputDrvs.{path}");
        let path = store_path(dir, path, &place)?;
        let [nested, outputs] = fields(value, &place, ["dynamicOutputs", "outputs"])?;
        let nested_place = || format!("{place}.dynamicOutputs");
        if !object(nested, nested_place)?.is_empty() {
            return Err(JsonError::Dynamic { place: nested_place() });
        }
        let names = array(outputs, || format!("{place}.outputs"))?.iter().enumerate().map(|(n, name)| {
            let place = format!("{place}.outputs[{n}]");
            output_name(string(name, || place.clone())?, &place)
        });
        drv.input_drvs.insert(path, names.collect::<Result<_, _>>()?);
    }
    for (n, path) in array(input_srcs, || "inputSrcs".into())?.iter().enumerate() {
        let place = format!("inputSrcs[{n}]");
        drv.input_srcs.insert(store_path(dir, string(path, || place.clone())?, &place)?);
    }
    for (n, arg) in array(args, || "args".into())?.iter().enumerate() {
        drv.args.push(string(arg, || format!("args[{n}]"))?.into());
    }
    for (key, value) in object(env, || "env".into())? {
        drv.env.insert(key.as_str().into(), string(value, || format!("env.{key}"))?.into());
    }
    Ok(drv)
}

fn read_output(
    dir: &StoreDir,
    drv_name: &Name,
    output: &OutputName,
    value: &Value,
    place: &str,
) -> Result<Output, JsonError> {
    let map = object(value, || place.to_owned())?;
    let mut keys: Vec<&str> = map.keys().map(String::as_str).collect();
    keys.sort_unstable();
    match *keys {
        [] => Ok(Output::Deferred),
        ["path"] => {
            let [path] = fields(value, place, ["path"])?;
            read_path(dir, path, place).map(Output::InputAddressed)
        }
        // Without its path, which follows: nobody who writes one by hand knows it.
        ["hash", "hashAlgo", "method"] | ["hash", "hashAlgo", "method", "path"] => {
            let path = map.get("path");
            let [hash, algorithm, method] =
                ["hash", "hashAlgo", "method"].map(|key| map.get(key).unwrap_or(&Value::Null));
            let (method, algorithm) = read_method(method, algorithm, place)?;
            let hash = Hash::parse_bare(string(hash, || format!("{place}.hash"))?, algorithm)
                .map_err(|source| JsonError::Hash { place: format!("{place}.hash"), source })?;
            let address = match (method, hash.sha256()) {
                (OutputMethod::Fixed(method), _) => ContentAddress::Fixed(method, hash),
                (OutputMethod::Text, digest) => ContentAddress::Text(digest.expect("text allows SHA-256 alone")),
            };
            let fixed = Output::fixed(dir, drv_name, output, address)
                .map_err(|source| JsonError::MakePath { place: place.to_owned(), source })?;
            let found = path.map(|path| read_path(dir, path, place)).transpose()?;
            match (fixed.path(), found) {
                (Some(right), Some(found)) if *right != found => Err(JsonError::WrongPath {
                    place: format!("{place}.path"),
                    found: dir.full(&found),
                    right: dir.full(right),
                }),
                _ => Ok(fixed),
            }
        }
        ["hashAlgo", "method"] => {
            let [algorithm, method] = fields(value, place, ["hashAlgo", "method"])?;
            let (method, algorithm) = read_method(method, algorithm, place)?;
            Ok(Output::Floating { method, algorithm })
        }
        ["hashAlgo", "impure", "method"] => {
            let [algorithm, impure, method] = fields(value, place, ["hashAlgo", "impure", "method"])?;
            if *impure != Value::Bool(true) {
                return Err(JsonError::Type { place: format!("{place}.impure"), wanted: "true" });
            }
            let (method, algorithm) = read_method(method, algorithm, place)?;
            Ok(Output::Impure { method, algorithm })
        }
        _ => Err(JsonError::OutputKeys { place: place.to_owned(), keys: keys.join(", ") }),
    }
}

fn read_path(dir: &StoreDir, path: &Value, place: &str) -> Result<StorePath, JsonError> {
    let place = format!("{place}.path");
    store_path(dir, string(path, || place.clone())?, &place)
}

fn read_method(method: &Value, algorithm: &Value, place: &str) -> Result<(OutputMethod, Algorithm), JsonError> {
    let method = match string(method, || format!("{place}.method"))? {
        "flat" => OutputMethod::FLAT,
        "nar" => OutputMethod::RECURSIVE,
        "git" => OutputMethod::Fixed(Method::Git),
        "text" => OutputMethod::Text,
        other => return Err(JsonError::Method { place: format!("{place}.method"), found: other.to_owned() }),
    };
    let algorithm: Algorithm = string(algorithm, || format!("{place}.hashAlgo"))?
        .parse()
        .map_err(|source| JsonError::Hash { place: format!("{place}.hashAlgo"), source })?;
    if !method.allows(algorithm) {
        return Err(JsonError::Algorithm { place: place.to_owned(), method: method_name(method), algorithm });
    }
    Ok((method, algorithm))
}

/// The values of exactly these keys.
fn fields<'a, const N: usize>(
    value: &'a Value,
    place: &str,
    keys: [&'static str; N],
) -> Result<[&'a Value; N], JsonError> {
    let map = object(value, || place.to_owned())?;
    if let Some(key) = map.keys().find(|key| !keys.contains(&key.as_str())) {
        return Err(JsonError::Unexpected { place: place.to_owned(), key: key.clone() });
    }
    let mut values = [&Value::Null; N];
    for (slot, key) in values.iter_mut().zip(keys) {
        *slot = map.get(key).ok_or_else(|| JsonError::Missing { place: place.to_owned(), key })?;
    }
    Ok(values)
}

fn object(value: &Value, place: impl FnOnce() -> String) -> Result<&Map<String, Value>, JsonError> {
    value.as_object().ok_or_else(|| JsonError::Type { place: place(), wanted: "an object" })
}

fn array(value: &Value, place: impl FnOnce() -> String) -> Result<&Vec<Value>, JsonError> {
    value.as_array().ok_or_else(|| JsonError::Type { place: place(), wanted: "an array" })
}

fn string(value: &Value, place: impl FnOnce() -> String) -> Result<&str, JsonError> {
    value.as_str().ok_or_else(|| JsonError::Type { place: place(), wanted: "a string" })
}

fn output_name(text: &str, place: &str) -> Result<OutputName, JsonError> {
    OutputName::new(text).map_err(|source| JsonError::Name { place: place.to_owned(), source })
}

fn store_path(dir: &StoreDir, text: &str, place: &str) -> Result<StorePath, JsonError> {
    dir.parse(text).map_err(|source| JsonError::Path { place: place.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arb;
    use crate::derivation::parse;

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    proptest! {
        #[test]
        fn reading_undoes_writing(drv in arb::derivation::text_derivation(dir())) {
            let value = to_json(&drv, &dir()).unwrap();
            prop_assert_eq!(from_json(&dir(), &value), Ok(drv.clone()));
            let text: Value = serde_json::from_str(&value.to_string()).unwrap();
            prop_assert_eq!(from_json(&dir(), &text), Ok(drv));
        }

        /// Bytes that are no text are refused, never replaced.
        #[test]
        fn only_text_has_a_form(drv in arb::derivation::derivation(dir())) {
            let mut strings = drv.args.iter().chain(drv.env.keys()).chain(drv.env.values()).chain([&drv.builder]);
            let text = strings.all(|bytes| bytes.as_str().is_some());
            prop_assert_eq!(to_json(&drv, &dir()).is_ok(), text);
            prop_assert_eq!(to_json_2_8(&drv, &dir()).is_ok(), text);
        }
    }

    fn sample() -> Value {
        json!({
            "args": ["-c", "x"],
            "builder": "/bin/sh",
            "env": { "a": "1" },
            "inputDrvs": {
                "/nix/store/6mc2qvhpid2f0v7x0xmhxk410qqjjdqr-a.drv": { "dynamicOutputs": {}, "outputs": ["out"] }
            },
            "inputSrcs": ["/nix/store/qi890a9493c7dwya6c1v4f88ijm3hz8i-s"],
            "name": "x",
            "outputs": {
                "out": {
                    "hash": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
                    "hashAlgo": "sha256",
                    "method": "flat",
                    "path": "/nix/store/9zicq1m4wy4bv50xa4l1jk4kpyy41kih-x"
                }
            },
            "system": "s"
        })
    }

    /// The sample with one place set, or taken away.
    fn changed(place: &str, value: Option<Value>) -> Value {
        let mut changed = sample();
        let (parent, key) = place.rsplit_once('/').unwrap();
        match (changed.pointer_mut(parent).unwrap(), value) {
            (Value::Object(map), Some(value)) => drop(map.insert(key.to_owned(), value)),
            (Value::Object(map), None) => drop(map.remove(key).unwrap()),
            (Value::Array(items), Some(value)) => items[key.parse::<usize>().unwrap()] = value,
            other => panic!("{other:?}"),
        }
        changed
    }

    #[test]
    fn strict() {
        assert!(from_json(&dir(), &sample()).is_ok());
        let zeros = "/nix/store/00000000000000000000000000000000-x";
        let right = "/nix/store/9zicq1m4wy4bv50xa4l1jk4kpyy41kih-x";
        for (place, value, message) in [
            ("/args", None, "the derivation has no key 'args'"),
            ("/name", None, "the derivation has no key 'name'"),
            ("/version", Some(json!(4)), "the derivation has an unexpected key 'version'"),
            ("/args", Some(json!("-c")), "args should be an array"),
            ("/args/1", Some(json!(1)), "args[1] should be a string"),
            ("/builder", Some(json!(null)), "builder should be a string"),
            ("/env", Some(json!([])), "env should be an object"),
            ("/env/a", Some(json!(true)), "env.a should be a string"),
            ("/inputSrcs/0", Some(json!("/tmp/x")), "inputSrcs[0] is no store path"),
            ("/inputDrvs", Some(json!({"x": {}})), "inputDrvs.x is no store path"),
            ("/name", Some(json!("a/b")), "name is no name"),
            ("/outputs/a b", Some(json!({})), "outputs.a b is no name"),
            ("/outputs/out/hash", None, "outputs.out has keys (hashAlgo, method, path) that no kind of output has"),
            (
                "/outputs/out/hash",
                Some(json!("sha256:00")),
                "outputs.out.hash is not a hash, or not of the given algorithm",
            ),
            (
                "/outputs/out/hashAlgo",
                Some(json!("r:sha256")),
                "outputs.out.hashAlgo is not a hash, or not of the given algorithm",
            ),
            (
                "/outputs/out/method",
                Some(json!("recursive")),
                "outputs.out.method is 'recursive', not 'flat', 'nar', 'git' or 'text'",
            ),
            ("/outputs/out/method", Some(json!("git")), "outputs.out has method 'git', which does not go with sha256"),
            (
                "/outputs/out/path",
                Some(json!(zeros)),
                &format!("outputs.out.path is '{zeros}', but the hash leads to '{right}'"),
            ),
            (
                "/outputs/out",
                Some(json!({"hashAlgo": "sha256", "method": "nar", "impure": false})),
                "outputs.out.impure should be true",
            ),
            ("/system", Some(json!("a\"b")), "system must be text without '\"' and '\\'"),
        ] {
            let error = from_json(&dir(), &changed(place, value)).unwrap_err();
            assert_eq!(error.to_string(), message, "{place}");
        }
        let nested = changed(
            "/inputDrvs",
            Some(json!({
                "/nix/store/6mc2qvhpid2f0v7x0xmhxk410qqjjdqr-a.drv":
                    { "dynamicOutputs": {"out": {"dynamicOutputs": {}, "outputs": ["out"]}}, "outputs": [] }
            })),
        );
        assert!(matches!(from_json(&dir(), &nested), Err(JsonError::Dynamic { .. })));
    }

    /// As Nix 2.8.0 prints it.
    #[test]
    fn impure_of_2_8() {
        let text = br#"Derive([("out","","sha1","impure")],[],[],"s","b",[],[])"#;
        let drv = parse(&dir(), &Name::new("imp").unwrap(), text).unwrap();
        let value = to_json_2_8(&drv, &dir()).unwrap();
        assert_eq!(value["outputs"].to_string(), r#"{"out":{"hashAlgo":"sha1","impure":true}}"#);
    }
}
