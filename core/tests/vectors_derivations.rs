//! Derivations against what Nix 2.8.0 and 2.26.3 made of them.
#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::print_stdout, reason = "tests may panic and tell")]

use std::collections::BTreeMap;

use larder_core::content_address::{ContentAddress, Method};
use larder_core::derivation::check::{CheckError, check};
use larder_core::derivation::modulo::{Mask, Memo, Modulo, ModuloError, output_paths};
use larder_core::derivation::placeholder::{Placeholder, scratch_path};
use larder_core::derivation::resolve::resolve;
use larder_core::derivation::{Derivation, Kind, OutputName, json, name_of, parse};
use larder_core::hash::{Algorithm, Hash};
use larder_core::store_dir::{References, StoreDir};
use larder_core::store_path::{Name, StorePath};
use serde_json::Value;

macro_rules! vectors {
    ($name:literal) => {
        cases($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/", $name, ".json")))
    };
}

fn cases(name: &str, text: &str) -> Vec<Value> {
    let value: Value = serde_json::from_str(text).unwrap();
    let cases = value["cases"].as_array().unwrap().clone();
    println!("{name}: {} cases", cases.len());
    cases
}

fn dir() -> StoreDir {
    StoreDir::new("/nix/store").unwrap()
}

fn str_of<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("{}: no {key}", case["id"]))
}

/// Texts of derivations by path.
type Texts = BTreeMap<StorePath, Vec<u8>>;

#[derive(Debug, thiserror::Error)]
#[error("no derivation at {0}")]
struct Absent(StorePath);

fn modulo(texts: &Texts, drv: &Derivation, mask: Mask) -> Result<Modulo, ModuloError<Absent>> {
    Memo::new().modulo(&dir(), drv, mask, |path| {
        let text = texts.get(path).ok_or_else(|| Absent(path.clone()))?;
        Ok(parse(&dir(), &name_of(path).unwrap(), text).unwrap())
    })
}

#[test]
fn derivations() {
    let dir = dir();
    for case in vectors!("derivations") {
        let id = str_of(&case, "id");
        let mut texts = Texts::new();
        for (path, object) in case["input_objects"].as_object().unwrap() {
            let path = dir.parse(path).unwrap();
            if path.is_derivation() {
                texts.insert(path, str_of(object, "text").into());
            }
        }
        let text = str_of(&case, "drv_text").as_bytes();
        let path = dir.parse(str_of(&case, "drv_path")).unwrap();
        let drv = parse(&dir, &name_of(&path).unwrap(), text).unwrap_or_else(|e| panic!("{id}: {e}"));

        assert_eq!(String::from_utf8(drv.to_aterm(&dir)).unwrap(), String::from_utf8_lossy(text), "{id}");
        assert_eq!(drv.path(&dir).unwrap(), path, "{id}");
        let references: Vec<Value> = drv.references().iter().map(|path| dir.full(path).into()).collect();
        assert_eq!(Value::from(references), case["references"], "{id}");

        let known: serde_json::Map<String, Value> =
            drv.output_paths().filter_map(|(name, path)| Some((name.to_string(), dir.full(path?).into()))).collect();
        assert_eq!(Value::Object(known), case["output_paths"], "{id}");
        let masked = modulo(&texts, &drv, Mask::On).unwrap_or_else(|e| panic!("{id}: {e}"));
        if drv.kind() == Ok(Kind::InputAddressed) {
            for (name, path) in output_paths(&dir, &drv, &masked.digest).unwrap() {
                assert_eq!(drv.outputs[&name].path(), Some(&path), "{id}");
            }
        }
        assert_eq!(masked.deferred, !drv.kind().unwrap().has_paths(), "{id}");
        check(&dir, &path, &drv, || modulo(&texts, &drv, Mask::On)).unwrap_or_else(|e| panic!("{id}: {e}"));

        // Compared as text where the vector has text in the order of the program.
        let full = dir.full(&path);
        let old = json::to_json_2_8(&drv, &dir).unwrap();
        assert_eq!(old.to_string(), case["json_2.8.0"][&full].to_string(), "{id}");
        let new = json::to_json(&drv, &dir).unwrap();
        assert_eq!(new.to_string(), case["json_2.26.3"][&full].to_string(), "{id}");
        assert_eq!(json::from_json(&dir, &new).unwrap(), drv, "{id}");
    }
}

/// What became of adding `x.drv`: the message where it was refused.
fn register(texts: &Texts, path: &StorePath, text: &[u8]) -> Result<Derivation, String> {
    let drv = parse(&dir(), &name_of(path).unwrap(), text).map_err(|e| e.to_string())?;
    match check(&dir(), path, &drv, || modulo(texts, &drv, Mask::On)) {
        Ok(()) => Ok(drv),
        Err(CheckError::Kind { source, .. }) => Err(source.to_string()),
        Err(e) => Err(e.to_string()),
    }
}

/// The NAR of a plain file.
fn nar_of_file(contents: &[u8]) -> Vec<u8> {
    let mut nar = Vec::new();
    for text in [&b"nix-archive-1"[..], b"(", b"type", b"regular", b"contents", contents, b")"] {
        nar.extend_from_slice(&(text.len() as u64).to_le_bytes());
        nar.extend_from_slice(text);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

#[test]
fn s038_drv_parse() {
    let dir = dir();
    let mut exact = 0;
    for case in vectors!("drv_parse") {
        let id = str_of(&case, "id");
        let text = str_of(&case, "drv_text").as_bytes();
        let name = Name::new(str_of(&case, "name")).unwrap();
        // Added with `--add`, so the path is that of a NAR.
        let path = dir.make_content_path(
            &Name::new(&format!("{name}.drv")).unwrap(),
            &ContentAddress::Fixed(Method::Recursive, Hash::of(Algorithm::Sha256, &nar_of_file(text))),
            &References::default(),
        );
        let path = path.unwrap();
        let result = register(&Texts::new(), &path, text);
        for version in ["2.8.0", "2.26.3"] {
            let expected = &case[version];
            let accepted = expected["accepted"].as_bool().unwrap();
            assert_eq!(result.is_ok(), accepted, "{id} {version}: {result:?}");
            match &result {
                Err(message) => {
                    let theirs = str_of(expected, "message");
                    // A wrong path: the same words, and the same derivation, output and path.
                    if theirs.contains("has incorrect") || theirs.contains("output") && !theirs.contains("experimental")
                    {
                        assert_eq!(format!("error: {message}"), theirs, "{id} {version}");
                        exact += 1;
                    }
                }
                Ok(drv) if !expected["parsed"].is_null() => {
                    let to_json = if version == "2.8.0" { json::to_json_2_8 } else { json::to_json };
                    let mut ours = to_json(drv, &dir).unwrap();
                    ours.as_object_mut().unwrap().remove("name");
                    assert_eq!(ours, expected["parsed"], "{id} {version}");
                }
                Ok(_) => {}
            }
        }
    }
    assert!(exact >= 10, "{exact} messages compared");
}

/// Derivations with contents not known beforehand: ids, resolved forms, scratch paths.
#[test]
fn modern() {
    let dir = dir();
    let all = vectors!("modern");
    let of_drvs: Vec<&Value> = all.iter().filter(|case| case["drv_text"].is_string()).collect();
    let mut texts = Texts::new();
    for case in &of_drvs {
        texts.insert(dir.parse(str_of(case, "drv_path")).unwrap(), str_of(case, "drv_text").into());
    }
    let (mut ids, mut resolved_forms, mut scratch_paths) = (0, 0, 0);
    for case in of_drvs {
        let id = str_of(case, "id");
        let text = str_of(case, "drv_text").as_bytes();
        let path = dir.parse(str_of(case, "drv_path")).unwrap();
        let drv = match parse(&dir, &name_of(&path).unwrap(), text) {
            Ok(drv) => drv,
            Err(e) => {
                // The one form that needs dynamic derivations.
                assert_eq!(id, "dynamic-wrapper", "{e}");
                let (outer, out) = (OutputName::out(), OutputName::out());
                let producing = dir.parse("/nix/store/r4grb3xwhhpsai1ks8lipzd64gixwwyl-hello.drv.drv").unwrap();
                let placeholder = Placeholder::computed(Placeholder::upstream(&producing, &outer).unwrap(), &out);
                assert_eq!(placeholder.to_text(), str_of(case, "placeholder"));
                continue;
            }
        };
        assert_eq!(drv.to_aterm(&dir), text, "{id}");
        assert_eq!(drv.path(&dir).unwrap(), path, "{id}");
        if let Some(hex) = case["derivation_modulo_sha256"].as_str().or(case["output_id_sha256"].as_str()) {
            ids += 1;
            let modulo = modulo(&texts, &drv, Mask::On).unwrap();
            assert_eq!(modulo.digest.to_hex(), hex, "{id}");
            assert_eq!(modulo.deferred, case["deferred"].as_bool().unwrap_or(true), "{id}");
        }
        for part in [case, &case["2.8.0"], &case["2.26.3"]] {
            let mut built = (path.clone(), drv.clone());
            if let Some(expected) = part["resolved"].as_object() {
                resolved_forms += 1;
                let outputs = expected["input_outputs"].as_object().unwrap();
                let resolved = resolve(&dir, &drv, |input, output| {
                    dir.parse(outputs.get(&format!("{}!{output}", dir.full(input)))?.as_str()?).ok()
                })
                .unwrap();
                let text = String::from_utf8(resolved.to_aterm(&dir)).unwrap();
                assert_eq!(text, expected["drv_text"].as_str().unwrap(), "{id}");
                let path = resolved.path(&dir).unwrap();
                assert_eq!(dir.full(&path), expected["drv_path"].as_str().unwrap(), "{id}");
                let hex = modulo(&Texts::new(), &resolved, Mask::On).unwrap().digest.to_hex();
                assert_eq!(hex, expected["derivation_modulo_sha256"].as_str().unwrap(), "{id}");
                built = (path, resolved);
            }
            for (output, found) in part["outputs"].as_object().into_iter().flatten() {
                if let Some(scratch) = found["scratch_path"].as_str() {
                    scratch_paths += 1;
                    let output = OutputName::new(output).unwrap();
                    let ours = scratch_path(&dir, &built.0, &built.1.name, &output).unwrap();
                    assert_eq!(dir.full(&ours), scratch, "{id} {output}");
                }
            }
        }
    }
    println!("modern: {ids} ids, {resolved_forms} resolved forms, {scratch_paths} scratch paths");
    assert!(ids >= 14 && resolved_forms >= 10 && scratch_paths >= 10);
}
