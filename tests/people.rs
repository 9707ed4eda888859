//! `larder` itself.

use std::path::Path;

use crate::house::{House, LARDER, Run, run};

#[test]
fn links_lead_to_the_applets() {
    let house = House::new();
    let made = house.words("larder", "links bin");
    assert_eq!(made.status, Some(0), "{made:?}");
    assert!(made.stdout.contains(&format!("bin/nix-store -> {LARDER}\n")), "{}", made.stdout);
    let link = house.work().join("bin/nix-hash");
    run(&mut house.command(&link), b"").prints("");
    let version = run(house.command(&link).arg("--version"), b"");
    assert!(version.stdout.starts_with("nix-hash (Nix) "), "{version:?}");
}

#[test]
fn help_and_mistakes() {
    let house = House::new();
    let help = house.words("larder", "--help");
    assert_eq!((help.status, help.stderr.as_str()), (Some(0), ""));
    assert!(help.stdout.contains("path-info") && help.stdout.contains("larder nix-store"));
    let version = house.words("larder", "--version");
    assert_eq!(version.stdout, format!("larder {}\n", env!("CARGO_PKG_VERSION")));
    let wrong = house.words("larder", "zork");
    assert_eq!((wrong.status, wrong.stdout.as_str()), (Some(1), ""));
    assert!(wrong.stderr.starts_with("error: unrecognized subcommand 'zork'"), "{}", wrong.stderr);
}

#[test]
fn completions_and_manual_pages() {
    let house = House::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = house.words("larder", &format!("completions {shell}"));
        assert!(script.status == Some(0) && script.stdout.contains("path-info"), "{shell}");
    }
    let page = house.words("larder", "man");
    assert!(page.status == Some(0) && page.stdout.contains(".TH larder 1"), "{}", page.stdout);
    house.words("larder", "man --dir man1").prints("");
    for name in ["larder.1", "larder-add.1", "larder-path-info.1"] {
        assert!(house.work().join("man1").join(name).exists(), "{name}");
    }
}

#[test]
fn a_tree_goes_in_and_is_asked_about() {
    let house = House::new();
    std::fs::create_dir(house.work().join("d")).unwrap();
    house.write("d/x", "hello\n");
    let added = house.words("larder", "add d --root link");
    assert_eq!(added.status, Some(0), "{added:?}");
    let path = added.stdout.trim_end();
    assert!(path.ends_with("-d"), "{added:?}");
    assert!(added.stderr.contains("added 'd' (288 B)") && added.stderr.contains("/link' keeps it"), "{added:?}");
    house.words("nix-store", "--add d").prints(&added.stdout);

    let told = house.words("larder", "path-info -S link");
    assert!(told.stdout.starts_with(&format!("{path}\n  size        288 B\n  closure     288 B\n")), "{told:?}");
    let json = house.words("larder", "path-info --all --json");
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    let hash = house.words("nix-hash", "--type sha256 --sri d");
    assert_eq!(json[path]["narHash"], hash.stdout.trim_end());
    assert_eq!(json[path]["narSize"], 288);

    house.words("larder", "closure link").prints(&added.stdout);
    house.words("larder", "closure --json link").prints(&format!("[\n  \"{path}\"\n]\n"));
    let usage = house.words("larder", "du");
    assert_eq!(usage.stdout, format!("     closure     only here  path\n       288 B         288 B  {path}\n"));

    house.words("larder", "add --name other --mode flat --hash sha1 d").fails("reading from file: Is a directory");
    house.words("larder", "add --name other d d").fails("a name or a root can be given for one file only, not for 2");
    house.words("larder", "path-info /").fails("path '/' is not in the Nix store");
    let nope = house.work().join("nope");
    let error = format!("getting status of '{}': No such file or directory", nope.display());
    house.words("larder", "add nope").fails(&error);

    assert_eq!(house.words("larder", "verify -c").status, Some(0));
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let _ = std::fs::remove_file(Path::new(path).join("x"));
    std::fs::write(Path::new(path).join("x"), "jello\n").unwrap();
    let damaged = house.words("larder", "verify -c");
    assert!(damaged.status == Some(1) && damaged.stderr.contains("was modified!"), "{damaged:?}");
    let one = house.words("larder", "verify --json link");
    assert_eq!(one.stdout, format!("[\n  {{\n    \"path\": \"{path}\",\n    \"good\": false\n  }}\n]\n"));
}

/// What a closure takes, and what of it nothing else needs.
#[test]
fn space_is_told_apart() {
    let house = House::new();
    let path = |digit: &str, name: &str| format!("{}/store/{}-{name}", house.path().display(), digit.repeat(32));
    let (a, b, c) = (path("0", "a"), path("1", "b"), path("2", "c"));
    let record = |path: &str, bytes: u64, references: &[&str]| {
        let mut lines = vec![path.to_owned(), "0".repeat(64), bytes.to_string(), String::new()];
        lines.push(references.len().to_string());
        lines.extend(references.iter().map(|reference| (*reference).to_owned()));
        lines.join("\n") + "\n"
    };
    // Both a and b need c; a also refers to itself.
    let text = record(&c, 1000, &[]) + &record(&a, 10, &[&a, &c]) + &record(&b, 200, &[&c]);
    assert_eq!(house.feed("nix-store", "--load-db", text.as_bytes()).status, Some(0));
    let rows = house.words("larder", &format!("du --json {a} {b}"));
    let rows: serde_json::Value = serde_json::from_str(&rows.stdout).unwrap();
    let sizes = |row: &serde_json::Value| (row["path"].clone(), row["closureSize"].clone(), row["ownSize"].clone());
    assert_eq!(sizes(&rows[0]), (b.clone().into(), 1200.into(), 200.into()));
    assert_eq!(sizes(&rows[1]), (a.clone().into(), 1010.into(), 10.into()));
    // Alone, it needs all of it.
    let rows = house.words("larder", &format!("du --json -n 1 {a}"));
    let rows: serde_json::Value = serde_json::from_str(&rows.stdout).unwrap();
    assert_eq!(sizes(&rows[0]), (a.clone().into(), 1010.into(), 1010.into()));
    // Referrers stand in the place of references.
    let tree = house.words("larder", &format!("closure --referrers --format tree {c}"));
    tree.prints(&format!("{c}\n├───{a}\n└───{b}\n"));
}

/// The installation is looked at, nothing is changed, and each problem comes with what helps.
#[test]
fn doctor_finds_what_is_wrong() {
    let house = House::new();
    let verdicts = |run: &Run| -> std::collections::BTreeMap<String, String> {
        let rows: serde_json::Value = serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e}: {run:?}"));
        let text = |row: &serde_json::Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let rows = rows.as_array().unwrap().iter();
        rows.map(|row| (text(row, "about"), format!("{}: {}", text(row, "verdict"), text(row, "text")))).collect()
    };
    let doctor = |more: &[&str]| house.run("larder", [&["doctor", "--json"], more].concat());
    let before = verdicts(&doctor(&[]));
    assert!(before["database"].starts_with("note: there is no"), "{before:?}");
    assert!(!house.path().join("store").exists() && !house.path().join("var").exists(), "nothing is made");
    let path = house.add("file", "contents");
    let sound = doctor(&[]);
    assert_eq!(sound.status, Some(0), "{sound:?}");
    let sound = verdicts(&sound);
    assert!(sound["database"].ends_with(", 1 valid paths") && sound["leftovers"] == "good: none", "{sound:?}");
    // A dead daemon, what killed runs have left, a key that is none, a store that is everybody's.
    let socket = house.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let store = house.path().join("store");
    std::fs::write(format!("{path}.lock"), "").unwrap();
    std::fs::create_dir(store.join(".larder-trash-1-1")).unwrap();
    std::fs::set_permissions(&store, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    std::fs::write(house.path().join("var/db/larder.redb"), "no database").unwrap();
    let run = doctor(&["--option", "trusted-public-keys", "a:b c"]);
    assert_eq!(run.status, Some(1), "{run:?}");
    let found = verdicts(&run);
    for (about, what) in [
        ("daemon", "problem: nobody listens at"),
        ("store directory", "problem: "),
        ("database", "problem: "),
        ("leftovers", "note: 1 entries that a killed run was deleting or linking, 1 lock files of nobody"),
        ("trusted keys", "problem: not all can be read: a:b c"),
    ] {
        assert!(found[about].starts_with(what), "{about}: {found:?}");
    }
    let words = house.words("larder", "doctor").stdout;
    assert!(words.contains("larder db rebuild") && words.contains("chmod o-w"), "{words}");
}
