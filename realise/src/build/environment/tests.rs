//! What a builder is given, against what real Nix gives.

use super::*;
use larder_core::derivation::{name_of, parse};

/// The cases of `tests/vectors/NAME.json`.
fn cases(name: &str) -> Vec<Value> {
    let path = format!("{}/../tests/vectors/{name}.json", env!("CARGO_MANIFEST_DIR"));
    let vectors: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    vectors["cases"].as_array().unwrap().clone()
}

fn dir() -> StoreDir {
    StoreDir::new("/nix/store").unwrap()
}

fn drv_with(env: &[(&str, &str)]) -> Derivation {
    let path: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().unwrap();
    let mut drv = parse(&dir(), &name_of(&path).unwrap(), br#"Derive([],[],[],"s","/bin/sh",[],[])"#).unwrap();
    drv.env = env.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
    drv
}

fn run(
    drv: &Derivation,
    kind: Kind,
    outputs: &BTreeMap<OutputName, StorePath>,
    graph_values: BTreeMap<String, Value>,
    rewrites: &[(HashPart, HashPart)],
) -> Result<Prepared, EnvironmentError> {
    let path: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().unwrap();
    let attributes = Attributes::new(&path, drv)?;
    prepare(&Given {
        dir: &dir(),
        drv,
        attributes: &attributes,
        kind,
        build_dir: b"/build",
        cores: 2,
        outputs,
        rewrites,
        impure: &|name| (name == b"http_proxy").then(|| b"proxy".to_vec()),
        graph_files: BTreeMap::new(),
        graph_values,
    })
}

fn listing(prepared: &Prepared) -> String {
    let lines = prepared.env.iter().map(|(name, value)| [name, &b"="[..], value, b"\n"].concat());
    String::from_utf8(lines.flatten().collect()).unwrap()
}

/// The listings of the vectors, from the same bindings (they also have what the shell adds).
#[test]
fn s051_environment_vectors() {
    let all: Vec<(&str, &[(&str, &str)])> = vec![
        ("env-plain", &[("x", "1"), ("l", "1 2")]),
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
    ];
    let cases = cases("builder_environment");
    for (id, bindings) in all {
        let case = cases.iter().find(|case| case["id"] == id).unwrap();
        let out = case["out_path"].as_str().unwrap();
        let mut drv = drv_with(bindings);
        for (name, value) in
            [("PATH", "/usr/bin:/bin"), ("builder", "/bin/sh"), ("name", id), ("system", "x86_64-linux"), ("out", out)]
        {
            drv.env.insert(name.into(), value.into());
        }
        let outputs = BTreeMap::from([(OutputName::out(), dir().parse(out).unwrap())]);
        let prepared = run(&drv, Kind::InputAddressed, &outputs, BTreeMap::new(), &[]).unwrap();
        assert_eq!(listing(&prepared), case["output_text"].as_str().unwrap(), "{id}");
        assert_eq!(prepared.args, [b"sh"]);
        if id == "env-pass-as-file" {
            let texts: Vec<&[u8]> = prepared.files.values().map(Vec::as_slice).collect();
            assert_eq!(texts, [b"X", &b"BIG"[..]]);
        }
    }
}

/// Lines of `.attrs.sh`; one value goes beyond what C defines, see [`attrs`].
fn lines(text: &str) -> Vec<&str> {
    text.lines().filter(|line| !line.starts_with("declare exp=")).collect()
}

#[test]
fn structured_attribute_vectors() {
    let mut seen = 0;
    for case in cases("modern").iter().filter(|case| case["id"].as_str().unwrap().starts_with("attrs-")) {
        let made = &case["2.8.0"];
        let key = if made["resolved_drv_text"].is_string() { "resolved_drv" } else { "drv" };
        let path = dir().parse(made[format!("{key}_path")].as_str().unwrap()).unwrap();
        let drv = parse(&dir(), &name_of(&path).unwrap(), made[format!("{key}_text")].as_str().unwrap().as_bytes());
        let drv = drv.unwrap();
        let expected: Value = serde_json::from_str(made["attrs_json"].as_str().unwrap()).unwrap();
        let attributes = Attributes::new(&path, &drv).unwrap();
        let graphs = attributes.structured().unwrap()["exportReferencesGraph"].as_object().unwrap().keys();
        let graphs = graphs.map(|name| (name.clone(), expected[name].clone())).collect();
        let outputs: BTreeMap<OutputName, StorePath> = drv
            .outputs
            .keys()
            .map(|name| {
                let path = larder_core::derivation::placeholder::scratch_path(&dir(), &path, &drv.name, name).unwrap();
                (name.clone(), drv.outputs[name].path().cloned().unwrap_or(path))
            })
            .collect();
        let kind = drv.kind().unwrap();
        let prepared = run(&drv, kind, &outputs, graphs, &[]).unwrap();
        let text = |name: &str| String::from_utf8(prepared.files[name].clone()).unwrap();
        assert_eq!(text(".attrs.json"), made["attrs_json"].as_str().unwrap());
        assert_eq!(lines(&text(".attrs.sh")), lines(made["attrs_sh"].as_str().unwrap()));
        assert!(!prepared.env.contains_key(&b"out"[..]));
        assert_eq!(prepared.env[&b"NIX_ATTRS_SH_FILE"[..]], b"/build/.attrs.sh");
        seen += 1;
    }
    assert_eq!(seen, 2);
}

#[test]
fn structured_shell_vector() {
    let cases = cases("builder_environment");
    let of = |id: &str| cases.iter().find(|case| case["id"] == id).unwrap()["output_text"].as_str().unwrap().to_owned();
    let mut all: BTreeMap<String, Value> = serde_json::from_str(&of("env-structured-json")).unwrap();
    assert_eq!(String::from_utf8(attrs::to_json(&all)).unwrap(), of("env-structured-json"));
    all.insert("name".into(), "env-structured-sh".into());
    all["outputs"].as_object().unwrap();
    let out = "/nix/store/ynsvc66wbn28msb2vkqv7cjj3kd8gz8b-env-structured-sh";
    all.insert("outputs".into(), serde_json::json!({ "out": out }));
    assert_eq!(String::from_utf8(attrs::to_shell(&all)).unwrap(), of("env-structured-sh"));
}

#[test]
fn impure_variables_are_for_fixed_outputs() {
    let drv = drv_with(&[("impureEnvVars", "http_proxy HOME"), ("http_proxy", "mine"), ("NIX_OUTPUT_CHECKED", "x")]);
    let outputs = BTreeMap::new();
    let of = |kind, name: &str| {
        let prepared = run(&drv, kind, &outputs, BTreeMap::new(), &[]).unwrap();
        prepared.env.get(name.as_bytes()).map(|value| String::from_utf8(value.clone()).unwrap())
    };
    for (kind, proxy, home, checked) in [
        (Kind::InputAddressed, "mine", "/homeless-shelter", "x"),
        (Kind::Fixed, "proxy", "", "1"),
        (Kind::Impure, "proxy", "", "x"),
    ] {
        assert_eq!(of(kind, "http_proxy").unwrap(), proxy);
        assert_eq!(of(kind, "HOME").unwrap(), home);
        assert_eq!(of(kind, "NIX_OUTPUT_CHECKED").unwrap(), checked);
    }
}

#[test]
fn paths_are_replaced() {
    let [from, to]: [StorePath; 2] =
        ["0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x", "1c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x"].map(|p| p.parse().unwrap());
    let own = Placeholder::own(&OutputName::out());
    let mut drv = drv_with(&[("a", &format!("{own}/b {}", dir().full(&from)))]);
    drv.args = vec![format!("--prefix={own}").into()];
    let outputs = BTreeMap::from([(OutputName::out(), to.clone())]);
    let rewrites = [(from.hash_part(), to.hash_part())];
    let prepared = run(&drv, Kind::InputAddressed, &outputs, BTreeMap::new(), &rewrites).unwrap();
    let full = dir().full(&to);
    assert_eq!(prepared.env[&b"a"[..]], format!("{full}/b {full}").into_bytes());
    assert_eq!(prepared.args[1], format!("--prefix={full}").into_bytes());
}

#[test]
fn what_no_program_can_be_given() {
    for env in [[("a", "x\0y")], [("a\0", "x")]] {
        assert!(run(&drv_with(&env), Kind::InputAddressed, &BTreeMap::new(), BTreeMap::new(), &[]).is_err());
    }
}
