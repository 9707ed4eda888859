//! What derivations say of their outputs: `build_checks.json`, and the seeds about references.

use larder_core::content_address::Method;
use larder_core::hash::{Algorithm, Hash};
use larder_core::settings::Sandbox;
use larder_core::store_path::StorePath;
use larder_realise::job::{FailureKind, Mode};

use crate::house::{House, Recipe, WAYS, recipe};

/// `dep-a`, and `dep-b` that refers to it.
fn deps(house: &House) -> (StorePath, StorePath) {
    let a = house.build(&recipe("dep-a", "echo A > $out"));
    let b = recipe("dep-b", "echo ref $a > $out").source(&a).env("a", house.store.dir().full(&a));
    (a, house.build(&b))
}

struct Case {
    id: &'static str,
    recipe: Recipe,
    /// The message of the vector, in which names in braces stand for paths.
    error: Option<(FailureKind, &'static str)>,
}

#[expect(clippy::too_many_lines, reason = "a list")]
/// The cases of the vectors in this store. Their texts are compared with the vectors' own.
fn cases(house: &House, a: &StorePath, b: &StorePath) -> Vec<Case> {
    use FailureKind::{InputRejected, OutputRejected, Permanent};
    let full = |path: &StorePath| house.store.dir().full(path);
    let with = |id: &'static str, script: &str| {
        recipe(&format!("chk{}", id.trim_start_matches("check")), script)
            .source(a)
            .source(b)
            .env("a", full(a))
            .env("b", full(b))
    };
    let empty = Hash::of(Algorithm::Sha256, b"");
    let case = |id, recipe: Recipe, error| Case { id, recipe, error };
    let refers = Some((OutputRejected, "output '{out}' is not allowed to refer to the following paths:\n  {a}"));
    let flat = Some((
        OutputRejected,
        "output path '{built}' should be a non-executable regular file since recursive hashing is not enabled \
         (outputHashMode=flat)",
    ));
    let writable = Some((
        OutputRejected,
        "suspicious ownership or permission on '{built}' for output 'out'; rejecting this build output",
    ));
    vec![
        case("check-allowed-empty", with("check-allowed-empty", "echo $a > $out").env("allowedReferences", ""), refers),
        case(
            "check-allowed-lists-it",
            with("check-allowed-lists-it", "echo $a > $out").env("allowedReferences", full(a)),
            None,
        ),
        case(
            "check-allowed-self-out",
            with("check-allowed-self-out", "echo $a $out > $out").env("allowedReferences", full(a) + " out"),
            None,
        ),
        case(
            "check-requisites-missing-indirect",
            with("check-requisites-missing-indirect", "echo $b > $out").env("allowedRequisites", full(b)),
            refers,
        ),
        case(
            "check-disallowed-ref-indirect-ok",
            with("check-disallowed-ref-indirect-ok", "echo $b > $out").env("disallowedReferences", full(a)),
            None,
        ),
        case(
            "check-disallowed-ref-direct",
            with("check-disallowed-ref-direct", "echo $a > $out").env("disallowedReferences", full(a)),
            refers,
        ),
        case(
            "check-disallowed-self",
            with("check-disallowed-self", "echo $out > $out").env("disallowedReferences", "out"),
            Some((OutputRejected, "output '{out}' is not allowed to refer to the following paths:\n  {out}")),
        ),
        case(
            "check-disallowed-req-self",
            with("check-disallowed-req-self", "echo $out > $out").env("disallowedRequisites", "out"),
            None,
        ),
        case(
            "check-output-name-specifier",
            with("check-output-name-specifier", "echo $dev > $out; echo x > $dev")
                .outputs(&["out", "dev"])
                .env("allowedReferences", "dev"),
            None,
        ),
        case(
            "check-cycle",
            with("check-cycle", "echo $dev > $out; echo $out > $dev").outputs(&["out", "dev"]),
            Some((
                OutputRejected,
                "cycle detected in build of '{drv}' in the references of output 'dev' from output 'out'",
            )),
        ),
        case("check-world-writable", with("check-world-writable", "echo x > $out; chmod 666 $out"), writable),
        case("check-group-writable-dir", with("check-group-writable-dir", "mkdir $out; chmod 775 $out"), writable),
        case(
            "check-fifo",
            with("check-fifo", "mkdir $out; mkfifo $out/p"),
            Some((OutputRejected, "file '{built}/p' has an unsupported type")),
        ),
        case(
            "check-builder-fails",
            with("check-builder-fails", "exit 3"),
            Some((Permanent, "builder for '{drv}' failed with exit code 3")),
        ),
        case("check-fod-ok", with("check-fod-ok", "true > $out").fixed(Method::Flat, empty), None),
        case("check-fod-flat-dir", with("check-fod-flat-dir", "mkdir $out").fixed(Method::Flat, empty), flat),
        case("check-fod-flat-symlink", with("check-fod-flat-symlink", "ln -s x $out").fixed(Method::Flat, empty), flat),
        case(
            "check-missing-feature",
            with("check-missing-feature", "true > $out").env("requiredSystemFeatures", "foo"),
            Some((
                InputRejected,
                "a 'x86_64-linux' with features {foo} is required to build '{drv}', but I am a 'x86_64-linux' with \
                 features {benchmark, big-parallel, ca-derivations, kvm, nixos-test}",
            )),
        ),
        case(
            "check-erg-bad-name",
            with("check-erg-bad-name", "true > $out").env("exportReferencesGraph", "a/b ".to_owned() + &full(a)),
            Some((InputRejected, "invalid file name 'a/b' in 'exportReferencesGraph'")),
        ),
        case(
            "check-erg-not-store",
            with("check-erg-not-store", "true > $out").env("exportReferencesGraph", "x /etc"),
            Some((Permanent, "'exportReferencesGraph' contains a non-store path '/etc'")),
        ),
        case(
            "check-impure-host-dep",
            with("check-impure-host-dep", "true > $out").env("__impureHostDeps", "/etc/hosts"),
            Some((
                InputRejected,
                "derivation '{drv}' requested impure path '/etc/hosts', but it was not in allowed-impure-host-deps",
            )),
        ),
    ]
}

/// A message with paths as they are here.
fn here(text: &str, house: &House, recipe: &Recipe, a: &StorePath) -> String {
    let (drv_path, drv) = house.derivation(recipe);
    let dir = house.store.dir();
    let mut text = text.replace("{drv}", &dir.full(&drv_path)).replace("{a}", &dir.full(a));
    for (name, path) in drv.output_paths() {
        let path = path.unwrap();
        let built = format!("{}.chroot/root{}", dir.full(&drv_path), dir.full(path));
        text = text.replace(&format!("{{{name}}}"), &dir.full(path)).replace("{built}", &built);
    }
    text
}

/// A text without what differs between stores: directories and hashes.
fn without_paths(text: &str) -> String {
    let words = text.split_inclusive([' ', '\'', '\n']).map(|word| {
        let end = word.len() - usize::from(word.ends_with([' ', '\'', '\n']));
        let (word, end) = word.split_at(end);
        // The root of a sandbox is one level deeper here, as in 2.26.
        let base = word.rsplit_once(".drv.chroot/").map_or(word, |(_, inside)| inside);
        let at = base.split('/').position(|piece| StorePath::from_base_name(piece.as_bytes()).is_ok());
        match at {
            Some(at) => {
                let inner: Vec<&str> = base.split('/').skip(at).collect();
                format!("{}{end}", inner.join("/").get(33..).unwrap_or_default())
            }
            None => format!("{word}{end}"),
        }
    });
    words.collect()
}

#[test]
fn build_check_vectors() {
    let file = format!("{}/../tests/vectors/build_checks.json", env!("CARGO_MANIFEST_DIR"));
    let vectors: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let vectors = vectors["cases"].as_array().unwrap();
    let house = House::with(Sandbox::On, |values| {
        values.system_features =
            ["benchmark", "big-parallel", "kvm", "nixos-test"].into_iter().map(str::to_owned).collect();
        values.experimental_features = ["ca-derivations".to_owned()].into();
    });
    let (a, b) = deps(&house);
    let cases = cases(&house, &a, &b);
    assert_eq!(cases.len(), vectors.len());
    for Case { id, recipe, error } in cases {
        let vector = vectors.iter().find(|vector| vector["id"] == id).unwrap();
        assert_eq!(vector["accepted"].as_bool().unwrap(), error.is_none(), "{id}");
        let Some((kind, text)) = error else {
            house.build(&recipe);
            continue;
        };
        let text = here(text, &house, &recipe, &a);
        let failure = house.fail(&recipe, Mode::Normal);
        assert_eq!((failure.kind, &*failure.text), (kind, &*text), "{id}: {}", house.log());
        let theirs = vector["message"].as_str().unwrap().strip_prefix("error: ").unwrap();
        assert_eq!(without_paths(&text), without_paths(&theirs.replace("\n       ", "\n")), "{id}");
    }
}

#[test]
fn s002_s003_references_and_requisites() {
    for way in WAYS {
        let house = House::new(way);
        let (a, b) = deps(&house);
        let full = |path: &StorePath| house.store.dir().full(path);
        let refers = recipe("x", "echo $b > $out").source(&b).env("b", full(&b));
        house.build(&refers.clone().env("disallowedReferences", full(&a)));
        let failure = house.fail(&refers.env("disallowedRequisites", full(&a)), Mode::Normal);
        assert!(failure.text.ends_with(&format!("refer to the following paths:\n  {}", full(&a))), "{}", failure.text);
        let illegal = recipe("y", "echo > $out").env("allowedReferences", "zork");
        let text = "derivation contains an illegal reference specifier 'zork'";
        house.fails(&illegal, Mode::Normal, FailureKind::InputRejected, text);
    }
}

#[test]
fn structured_output_checks() {
    let house = House::new(Sandbox::On);
    let (a, b) = deps(&house);
    let full = |path: &StorePath| house.store.dir().full(path);
    let json = |checks: serde_json::Value| {
        let all = serde_json::json!({ "outputChecks": { "out": checks }, "allowedReferences": [] });
        let script = format!(". ./.attrs.sh; echo {} ${{outputs[out]}} > ${{outputs[out]}}", full(&b));
        let recipe = recipe("s", &script).source(&a).source(&b).env("__json", all.to_string());
        Recipe { builder: "/bin/bash".into(), ..recipe }
    };
    house.build(&json(serde_json::json!({ "maxSize": 100_000, "allowedRequisites": [full(&a), full(&b), "out"] })));
    for (checks, kind, text) in [
        (
            serde_json::json!({ "maxSize": 10 }),
            FailureKind::OutputRejected,
            "path '{out}' is too large at 312 bytes; limit is 10 bytes",
        ),
        (
            serde_json::json!({ "maxClosureSize": 400 }),
            FailureKind::OutputRejected,
            "closure of path '{out}' is too large at 640 bytes; limit is 400 bytes",
        ),
        // Unlike in the environment, an output counts among what it needs.
        (
            serde_json::json!({ "allowedRequisites": [full(&a), full(&b)] }),
            FailureKind::OutputRejected,
            "output '{out}' is not allowed to refer to the following paths:\n  {out}",
        ),
        (
            serde_json::json!({ "allowedReferences": "zork" }),
            FailureKind::InputRejected,
            "attribute 'allowedReferences' of derivation '{drv}' must be a list of strings",
        ),
    ] {
        let recipe = json(checks);
        let failure = house.fail(&recipe, Mode::Normal);
        let text = here(text, &house, &recipe, &a);
        // Sizes depend on the length of the store directory.
        let digits = |text: &str| text.replace(|c: char| c.is_ascii_digit(), "");
        assert_eq!((failure.kind, digits(&failure.text)), (kind, digits(&text)), "{}", house.log());
    }
}
