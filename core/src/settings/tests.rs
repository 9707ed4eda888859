//! Settings as whole configurations: recorded answers of real Nix, and properties.

use std::collections::BTreeMap;
use std::io;

use camino::Utf8Path;
use proptest::prelude::*;

use super::*;
use crate::arb::texts as arb;
use crate::test_vectors::{cases, vector_file};

/// The machine the vectors were made on.
fn machine() -> Machine {
    Machine {
        cores: 2,
        root: true,
        system: "x86_64-linux".into(),
        extra_platforms: ["i686-linux", "x86_64-v1-linux", "x86_64-v2-linux", "x86_64-v3-linux"].map(Into::into).into(),
        os: Os::Linux,
        kvm: true,
        conf_dir: "/etc/nix".into(),
        build_hook: "/usr/libexec/nix/build-remote".into(),
    }
}

type Files = BTreeMap<String, Vec<u8>>;

fn reader(files: &Files) -> impl FnMut(&Utf8Path) -> io::Result<Option<Vec<u8>>> {
    |path| Ok(files.get(path.as_str()).cloned())
}

fn file(text: &str) -> Files {
    BTreeMap::from([("/etc/nix/nix.conf".to_owned(), text.as_bytes().to_vec())])
}

fn configure(files: &Files) -> Result<Configured, SettingsError> {
    let mut builder = SettingsBuilder::new(machine());
    builder.system_file("/etc/nix/nix.conf".into(), &mut reader(files))?;
    Ok(builder.finish())
}

fn fine(text: &str) -> Configured {
    configure(&file(text)).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn fails(text: &str) -> SettingsError {
    configure(&file(text)).expect_err(text)
}

#[test]
fn defaults_are_those_of_nix() {
    let defaults = vector_file("settings")["defaults"].take();
    let defaults = defaults.as_object().unwrap();
    let settings = Settings::new(&machine());
    println!("settings: {} defaults", defaults.len());
    for (name, value) in defaults {
        match name.as_str() {
            // The command that printed the defaults turns these on.
            "experimental-features" | "pure-eval" => {}
            // The attribute that later versions add.
            "ignored-acls" => assert_eq!(settings.get(name).unwrap(), "security.csm security.selinux system.nfs4_acl"),
            _ => assert_eq!(settings.get(name).as_deref(), value.as_str(), "{name}"),
        }
        let group = find(name).unwrap().group;
        assert!(matches!(group, Group::Store | Group::Evaluator), "{name} is of 2.8");
    }
    for entry in TABLE.iter().filter(|e| e.group == Group::Store) {
        // Of macOS, so the defaults do not show it.
        assert!(defaults.contains_key(entry.name) || entry.name.starts_with("darwin-"), "{} is not of 2.8", entry.name);
    }
}

#[test]
fn settings_vectors() {
    let cases = cases("settings");
    println!("settings: {} cases", cases.len());
    let defaults: BTreeMap<_, _> = Settings::new(&machine()).show().collect();
    for case in &cases {
        let id = case["id"].as_str().unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().as_bytes().to_vec();
        let files: Files = case["files"].as_object().unwrap().iter().map(|(k, v)| (k.clone(), text(v))).collect();
        let environment = |name: &str| case["environment"][name].as_str();
        let mut read = reader(&files);
        let mut run = || {
            let mut builder = SettingsBuilder::new(machine());
            if let Some(systems) = environment("NIX_REMOTE_SYSTEMS") {
                builder.preset("builders", &remote_systems(systems))?;
            }
            builder.system_file("/etc/nix/nix.conf".into(), &mut read)?;
            let nix_user_conf_files = environment("NIX_USER_CONF_FILES").or(Some(""));
            for file in (UserFiles { nix_user_conf_files, ..Default::default() }).list() {
                builder.user_file(&file, &mut read)?;
            }
            if case["nix_config"].is_string() {
                builder.text("NIX_CONFIG", &text(&case["nix_config"]), &mut read)?;
            }
            for option in case["options"].as_array().into_iter().flatten() {
                builder.option(option[0].as_str().unwrap(), option[1].as_str().unwrap());
            }
            Ok::<_, SettingsError>(builder.finish())
        };
        let mut stderr = Vec::new();
        let made = run();
        if id == "settings-int-suffix" {
            // As 2.26 does.
            assert_eq!(made.unwrap().settings.min_free, 1024);
            continue;
        }
        assert_eq!(made.is_ok(), case["accepted"] == true, "{id}");
        match made {
            Ok(made) => {
                stderr.extend(made.warnings.iter().map(|w| format!("warning: {w}")));
                let mut changed: BTreeMap<_, _> = made.settings.show().collect();
                changed.retain(|name, value| defaults[name] != *value);
                assert_eq!(serde_json::json!(changed), case["changed"], "{id}");
            }
            Err(error) => {
                stderr.push(format!("error: {error}"));
                stderr.extend(error.is_usage().then(|| "Try 'nix --help' for more information.".to_owned()));
            }
        }
        match id {
            // `nix` looks for unknown names before it reads options; `nix-store` after.
            "settings-option-unknown" => {
                assert_eq!(stderr, ["warning: unknown setting 'bar'", "warning: unknown setting 'foo'"]);
            }
            "settings-option-extra-int" => assert_eq!(stderr, ["warning: unknown setting 'extra-cores'"]),
            "settings-nix-config-unknown" => {
                let names = ["alpha", "beta", "foo", "gamma", "zeta"];
                assert_eq!(stderr, names.map(|n| format!("warning: unknown setting '{n}'")));
            }
            _ => assert_eq!(serde_json::json!(stderr), case["stderr"], "{id}"),
        }
    }
}

#[test]
fn the_table_is_sorted_and_names_are_unique() {
    assert!(TABLE.is_sorted_by(|a, b| a.name < b.name));
    let mut names: Vec<_> = TABLE.iter().flat_map(|e| e.aliases.iter().copied().chain([e.name])).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
    for entry in TABLE {
        assert!(entry.doc.ends_with('.'), "{}", entry.name);
        assert!(
            entry.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
            "{}",
            entry.name
        );
    }
}

#[test]
fn historic_names_give_no_warning() {
    for entry in TABLE.iter().filter(|e| e.group == Group::Historic) {
        assert_eq!(fine(&format!("{} = true\n", entry.name)).warnings.len(), 0, "{}", entry.name);
        assert!(!fine("").settings.show().any(|(name, _)| name == entry.name), "{}", entry.name);
    }
    assert_eq!(fine("binary-cache-public-key-x.org-1 = /etc/nix/key\n").warnings.len(), 0);
    let made = fine("build-chroot-dirs = /b\nbuild-extra-chroot-dirs = /a /b\n");
    assert_eq!(made.settings.mounts().collect::<Vec<_>>(), ["/a", "/b"]);
}

#[test]
fn suffixes_of_numbers() {
    for (text, value) in
        [("3K", 3 << 10), ("3k", 3 << 10), ("+2M", 2 << 20), ("1G", 1 << 30), ("16777215T", 16_777_215 << 40)]
    {
        assert_eq!(fine(&format!("max-free = {text}")).settings.max_free, value, "{text}");
    }
    assert_eq!(fine("gc-reserved-space = -1K").settings.gc_reserved_space, -1024);
    for text in ["K", "1KK", "1X", "1 K", "16777216T", "99999999999999999999999999999999999999999K", "-1K", "+", "++1"]
    {
        assert!(matches!(fails(&format!("max-free = {text}")), SettingsError::Integer { .. }), "{text}");
    }
    assert!(matches!(fails("cores = 4G"), SettingsError::Integer { .. }));
}

#[test]
fn includes_end() {
    let at = |names: &[(&str, &str)]| -> Files {
        names.iter().map(|(name, text)| (format!("/etc/nix/{name}"), text.as_bytes().to_vec())).collect()
    };
    let own = configure(&at(&[("nix.conf", "include ./x/../nix.conf")])).unwrap_err();
    assert_eq!(own.to_string(), "file '/etc/nix/nix.conf' included from '/etc/nix/nix.conf' includes itself");
    let two = configure(&at(&[("nix.conf", "include a"), ("a", "include b"), ("b", "!include a")])).unwrap_err();
    assert!(matches!(two, SettingsError::IncludeCycle { file, from } if file == "/etc/nix/a" && from == "/etc/nix/b"));
    // Twice in a row is no cycle, but doubles the work each time.
    let names: Vec<String> = (0..40).map(|n| format!("f{n}")).collect();
    let mut files: Files = (0..40)
        .map(|n| (format!("/etc/nix/f{n}"), format!("include f{0}\ninclude f{0}\n", n + 1).into_bytes()))
        .collect();
    files.insert("/etc/nix/nix.conf".into(), format!("include {}", names[0]).into_bytes());
    files.insert("/etc/nix/f40".into(), Vec::new());
    assert!(matches!(configure(&files).unwrap_err(), SettingsError::IncludeLimit { .. }));
    // Deep, but within the limit.
    let mut files: Files =
        (0..40).map(|n| (format!("/etc/nix/f{n}"), format!("include f{}", n + 1).into_bytes())).collect();
    files.insert("/etc/nix/f40".into(), b"cores = 77".to_vec());
    files.insert("/etc/nix/nix.conf".into(), b"include f0".to_vec());
    assert_eq!(configure(&files).unwrap().settings.cores, 77);
}

#[test]
fn bytes_and_files_that_cannot_be_read() {
    let files =
        BTreeMap::from([("/etc/nix/nix.conf".to_owned(), b"# \xe9\ncores = 5 # \xff\nbuilders = \xe9\n".to_vec())]);
    assert!(matches!(configure(&files).unwrap_err(), SettingsError::Encoding { line: 3, .. }));
    let mut builder = SettingsBuilder::new(machine());
    let mut broken = |_: &Utf8Path| Err(io::Error::from(io::ErrorKind::TimedOut));
    let error = builder.system_file("/etc/nix/nix.conf".into(), &mut broken).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the settings in '/etc/nix/nix.conf'");
    let error = builder.text("NIX_CONFIG", b"!include /x", &mut broken).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the settings in '/x'");
}

#[test]
fn overrides_are_what_the_user_set() {
    let mut builder = SettingsBuilder::new(machine());
    let files = file("log-lines = 3\nextra-substituters = a\n");
    builder.preset("store", "daemon").unwrap();
    builder.system_file("/etc/nix/nix.conf".into(), &mut reader(&files)).unwrap();
    builder.text("NIX_CONFIG", b"extra-binary-caches = b", &mut reader(&files)).unwrap();
    builder.flag("cores", "3").unwrap();
    builder.option("show-trace", "true");
    builder.option("build-timeout", "1");
    builder.option("keep-outputs", "maybe");
    builder.option("unheard-of", "1");
    assert!(builder.flag("max-silent-time", "x").is_err());
    let made = builder.finish();
    let names: Vec<_> = made.overridden.iter().copied().collect();
    assert_eq!(names, ["cores", "show-trace", "substituters", "timeout"]);
    let overrides = BTreeMap::from([("substituters", "https://cache.nixos.org/ a b".into()), ("timeout", "1".into())]);
    assert_eq!(made.overrides(), overrides);
    assert_eq!(made.settings.store, "daemon");
    assert_eq!(made.warnings.len(), 2);
    // A connection begins with the settings of the daemon.
    let mut builder = SettingsBuilder::over(made.settings.clone(), machine());
    builder.flag("cores", "7").unwrap();
    let over = builder.finish();
    assert_eq!((over.settings.cores, over.settings.timeout, over.overridden.len()), (7, 1, 1));
}

#[test]
fn user_files_in_order() {
    let list = |files: UserFiles<'_>| files.list().iter().map(ToString::to_string).collect::<Vec<_>>();
    let base = UserFiles { config_home: Some("/home/u/.config"), ..Default::default() };
    assert_eq!(list(base.clone()), ["/etc/xdg/nix/nix.conf", "/home/u/.config/nix/nix.conf"]);
    let two = UserFiles { config_dirs: Some("/a:/b"), ..base.clone() };
    assert_eq!(list(two), ["/b/nix/nix.conf", "/a/nix/nix.conf", "/home/u/.config/nix/nix.conf"]);
    assert_eq!(list(UserFiles { nix_user_conf_files: Some(""), ..base.clone() }), [""; 0]);
    assert_eq!(list(UserFiles { nix_user_conf_files: Some("a::b"), ..base }), ["b", "a"]);
}

#[test]
fn defaults_depend_on_the_machine() {
    let other = Machine { root: false, os: Os::MacOs, kvm: false, conf_dir: "/x".into(), ..machine() };
    let settings = Settings::new(&other);
    assert_eq!(settings.build_users_group, "");
    assert_eq!(settings.sandbox, Sandbox::Off);
    assert!(settings.use_case_hack && !settings.require_drop_supplementary_groups);
    assert_eq!(settings.get("system-features").unwrap(), "benchmark big-parallel nixos-test");
    assert_eq!((settings.builders.as_str(), settings.netrc_file.as_str()), ("@/x/machines", "/x/netrc"));
}

proptest! {
    /// What a setting prints, sent as an option, is the same. (Not in a file: that `/a/ ` ends in
    /// a blank cannot be said there.)
    #[test]
    fn printed_values_read_back(text in arb::settings()) {
        if let Ok(made) = configure(&file(&text)) {
            let mut builder = SettingsBuilder::new(machine());
            for entry in TABLE {
                builder.option(entry.name, &(entry.print)(&made.settings));
            }
            let again = builder.finish();
            prop_assert!(again.settings == made.settings && again.warnings.is_empty());
        }
    }

    #[test]
    fn paths_may_end_in_a_blank(path in "/[a /.]{0,6}") {
        let printed = PathText::new(&path).unwrap();
        let text = printed.get().unwrap().as_str();
        prop_assert_eq!(PathText::new(text), Some(printed.clone()));
    }

    /// Of two texts the later counts, and lists that are added to hold both.
    #[test]
    fn later_wins_and_extra_appends(entry in prop::sample::select(TABLE), a in arb::word(), b in arb::word()) {
        let set = |value: &str| configure(&file(&format!("{} = {value}\n", entry.name)));
        if let (Ok(one), Ok(two)) = (set(&a), set(&b)) {
            let both = fine(&format!("{0} = {a}\n{0} = {b}\n", entry.name));
            prop_assert_eq!(&both.settings, &two.settings);
            let added = fine(&format!("{0} = {a}\nextra-{0} = {b}\n", entry.name));
            if entry.kind.appends() {
                let joined = fine(&format!("{0} = {a} {b}\n", entry.name));
                prop_assert_eq!(added.settings, joined.settings);
            } else {
                prop_assert_eq!(added.settings, one.settings);
                prop_assert_eq!(added.warnings.len(), 1);
            }
        }
    }

    /// Spoiled text is an error or other settings, and never a panic.
    #[test]
    fn spoiled_text(text in arb::settings().prop_flat_map(|text| arb::spoiled(text.into_bytes()))) {
        let files = BTreeMap::from([("/etc/nix/nix.conf".to_owned(), text)]);
        if let Ok(made) = configure(&files) {
            prop_assert!(made.overrides().is_empty());
        }
    }
}
