//! What builders are given: `builder_environment.json`, seen by real builders.

use std::collections::BTreeMap;

use larder_core::settings::Sandbox;
use larder_core::store_path::StorePath;

use crate::house::{House, Recipe, WAYS, recipe};

fn listing(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter_map(|line| line.split_once('='));
    lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// What the shell and the helper of these tests add.
const OURS: [&str; 4] = ["_", "SHLVL", "OLDPWD", "builder"];

#[test]
fn environment_vectors() {
    let file = format!("{}/../tests/vectors/builder_environment.json", env!("CARGO_MANIFEST_DIR"));
    let vectors: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    for way in WAYS {
        let house = House::new(way);
        for (id, bindings) in [
            ("env-plain", &[("x", "1"), ("l", "1 2")][..]),
            ("env-pass-as-file", &[("passAsFile", "big x"), ("big", "BIG"), ("x", "X")]),
            (
                "env-override",
                &[
                    ("HOME", "/h"),
                    ("NIX_STORE", "/x"),
                    ("NIX_BUILD_CORES", "77"),
                    ("TMPDIR", "/t"),
                    ("NIX_BUILD_TOP", "/q"),
                    ("TERM", "dumb"),
                    ("NIX_LOG_FD", "9"),
                ],
            ),
        ] {
            let mut recipe = recipe(id, "env | sort > $out").env("PATH", "/usr/bin:/bin").env("system", "x86_64-linux");
            for (name, value) in bindings {
                recipe = recipe.env(name, *value);
            }
            let out = house.build(&recipe);
            let found = listing(&house.text(&out));
            let vectors = vectors["cases"].as_array().unwrap();
            let vector = vectors.iter().find(|case| case["id"] == id).unwrap()["output_text"].as_str().unwrap();
            let mut expected = listing(vector);
            let top = found["NIX_BUILD_TOP"].clone();
            assert_eq!(top == "/build", way == Sandbox::On);
            for (name, value) in &mut expected {
                match name.as_str() {
                    "out" => *value = house.store.dir().full(&out),
                    "NIX_STORE" if id != "env-override" => *value = house.store.dir().to_string(),
                    _ => *value = value.replace("/build", &top),
                }
            }
            let without = |map: BTreeMap<String, String>| {
                map.into_iter().filter(|(name, _)| !OURS.contains(&name.as_str())).collect::<BTreeMap<_, _>>()
            };
            assert_eq!(without(found), without(expected), "{id}");
        }
    }
}

#[test]
fn graphs_are_exported() {
    for way in WAYS {
        let house = House::new(way);
        let full = |path: &StorePath| house.store.dir().full(path);
        let a = house.build(&recipe("dep-a", "echo A > $out"));
        let b = house.build(&recipe("dep-b", "echo $a > $out").source(&a).env("a", full(&a)));
        let graph = recipe("env-graph", "cat graph > $out")
            .source(&b)
            .env("exportReferencesGraph", "graph ".to_owned() + &full(&b));
        let text = house.text(&house.build(&graph));
        let record = |path: &StorePath, references: &[&StorePath]| {
            let mut text = format!("{}\n\n{}\n", full(path), references.len());
            for path in references {
                text.push_str(&(full(path) + "\n"));
            }
            text
        };
        let mut records = [(&a, record(&a, &[])), (&b, record(&b, &[&a]))];
        records.sort();
        assert_eq!(text, records.map(|(_, text)| text).concat());

        let json = serde_json::json!({ "exportReferencesGraph": { "g": [full(&b)] }, "x": 1 });
        let script = ". $NIX_ATTRS_SH_FILE; /bin/cp $NIX_ATTRS_JSON_FILE ${outputs[out]}";
        let structured = recipe("structured", script).source(&b).env("__json", json.to_string());
        let out = house.build(&Recipe { builder: "/bin/bash".into(), ..structured });
        let found: serde_json::Value = serde_json::from_str(&house.text(&out)).unwrap();
        assert_eq!(found["outputs"]["out"], full(&out));
        let graph = found["g"].as_array().unwrap();
        let [of_a, of_b] = [&a, &b].map(|path| graph.iter().find(|info| info["path"] == full(path)).unwrap());
        assert_eq!(of_a["references"], serde_json::json!([]));
        let sizes = [&a, &b].map(|path| house.info(path).nar_size_bytes);
        assert_eq!(of_b["closureSize"], sizes[0] + sizes[1]);
        assert_eq!(of_b["narHash"], format!("sha256:{}", house.info(&b).nar_hash.to_base32()));
    }
}
