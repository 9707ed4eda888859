//! The settings of a connection: the daemon's own, and over them what the client asks for.
//!
//! Source: settings, section 3; protocols, section 2.8.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use larder_core::settings::{Machine, Settings, SettingsBuilder, find};
use larder_store::Options;
use larder_wire::worker::ops::SetOptions;

/// Never taken from a client: a feature must be on at both sides, and the rest would be a danger
/// or means nothing here.
const IGNORED: &[&str] = &["experimental-features", "plugin-files", "ssh-auth-sock"];

/// What any client may set.
const FREE: &[&str] = &["build-poll-interval", "connect-timeout", "max-silent-time", "repeat", "timeout"];

/// What is done for a client, and how.
#[derive(Debug, Clone)]
pub struct Terms {
    pub settings: Arc<Settings>,
    /// What the settings mean for the local store.
    pub options: Arc<Options>,
}

/// What settings mean here.
pub struct Rules {
    pub machine: Machine,
    /// How settings become options of the local store.
    pub options: Box<dyn Fn(&Settings) -> Options + Send + Sync>,
}

impl std::fmt::Debug for Rules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rules").field("machine", &self.machine).finish_non_exhaustive()
    }
}

impl Rules {
    pub fn terms(&self, settings: Settings) -> Terms {
        Terms { options: Arc::new((self.options)(&settings)), settings: Arc::new(settings) }
    }
}

/// What came of a client's wishes.
#[derive(Debug)]
pub struct Overlay {
    pub terms: Terms,
    /// For the client.
    pub warnings: Vec<String>,
    /// For the client, if it wants to know everything.
    pub debug: Vec<String>,
}

/// The wishes of the last client, and what came of them: clients of a kind have the same.
#[derive(Debug, Default)]
pub struct Overlays(Mutex<Option<Remembered>>);

#[derive(Debug)]
struct Remembered {
    base: Arc<Settings>,
    wishes: SetOptions,
    trusted: bool,
    overlay: Arc<Overlay>,
}

/// Wishes with longer values, in bytes, are not remembered.
const MAX_REMEMBERED: usize = 64 << 10;

impl Overlays {
    /// As [`overlay`].
    pub fn of(&self, base: &Arc<Settings>, rules: &Rules, wishes: &SetOptions, trusted: bool) -> Arc<Overlay> {
        let slot = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = &*slot()
            && (Arc::ptr_eq(&last.base, base), last.trusted, &last.wishes) == (true, trusted, wishes)
        {
            return Arc::clone(&last.overlay);
        }
        let overlay = Arc::new(overlay(base, rules, wishes, trusted));
        let length: usize = wishes.overrides.0.iter().map(|(name, value)| name.len() + value.len()).sum();
        if length <= MAX_REMEMBERED {
            let (base, wishes, overlay) = (Arc::clone(base), wishes.clone(), Arc::clone(&overlay));
            *slot() = Some(Remembered { base, wishes, trusted, overlay });
        }
        overlay
    }
}

/// Puts a client's wishes over the daemon's settings.
pub fn overlay(base: &Settings, rules: &Rules, wishes: &SetOptions, trusted: bool) -> Overlay {
    let mut builder = SettingsBuilder::over(base.clone(), rules.machine.clone());
    let (mut warnings, mut debug) = (Vec::new(), Vec::new());
    for (name, value) in [
        ("keep-failed", wishes.keep_failed.to_string()),
        ("keep-going", wishes.keep_going.to_string()),
        ("fallback", wishes.try_fallback.to_string()),
        ("max-jobs", wishes.max_build_jobs.to_string()),
        ("max-silent-time", wishes.max_silent_time_s.to_string()),
        ("cores", wishes.build_cores.to_string()),
        ("substitute", wishes.use_substitutes.to_string()),
    ] {
        builder.option(name, &value);
    }
    for (name, value) in &wishes.overrides.0 {
        let Some(value) = value.as_str() else {
            warnings.push(format!("the client's value of setting '{name}' is not UTF-8"));
            continue;
        };
        // By its proper name, as an alias must not be a way around the rules.
        let proper = find(name).map_or(name.as_str(), |entry| entry.name);
        if IGNORED.contains(&proper) {
            continue;
        }
        if trusted || FREE.contains(&proper) || (proper == "builders" && value.is_empty()) {
            builder.option(name, value);
        } else if proper == "substituters" {
            let (allowed, refused) = allowed_substituters(base, value);
            for uri in refused {
                warnings.push(format!(
                    "ignoring untrusted substituter '{uri}', you are not a trusted user.\n\
                     Run `man nix.conf` for more information on the `substituters` configuration option."
                ));
            }
            builder.option(name, &allowed.join(" "));
        } else {
            debug.push(format!(
                "ignoring the client-specified setting '{name}', because it is a restricted setting and you are not a \
                 trusted user"
            ));
        }
    }
    let configured = builder.finish();
    warnings.extend(configured.warnings.iter().map(|warning| larder_core::report::chain(warning)));
    Overlay { terms: rules.terms(configured.settings), warnings, debug }
}

/// The substituters that an untrusted client may use, and those that it may not.
fn allowed_substituters<'a>(base: &Settings, value: &'a str) -> (Vec<String>, Vec<&'a str>) {
    let known: BTreeSet<&str> =
        base.substituters.iter().chain(&base.trusted_substituters).map(String::as_str).collect();
    let (mut allowed, mut refused) = (Vec::new(), Vec::new());
    for uri in value.split_whitespace() {
        let with_slash = format!("{uri}/");
        if known.contains(uri) {
            allowed.push(uri.to_owned());
        } else if known.contains(with_slash.as_str()) {
            allowed.push(with_slash);
        } else {
            refused.push(uri);
        }
    }
    (allowed, refused)
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::settings::Os;
    use larder_store::Options;
    use larder_wire::value::{Obsolete, One};
    use larder_wire::worker::ops::Overrides;

    fn rules() -> Rules {
        let machine = Machine {
            cores: 4,
            root: true,
            system: "x86_64-linux".into(),
            extra_platforms: BTreeSet::new(),
            os: Os::Linux,
            kvm: false,
            conf_dir: "/etc/nix".into(),
            build_hook: String::new(),
        };
        Rules { machine, options: Box::new(|_| Options::default()) }
    }

    fn asked(pairs: &[(&str, &str)], trusted: bool) -> Overlay {
        let mut base = Settings::new(&rules().machine);
        base.trusted_substituters.insert("https://b.example/".into());
        let pairs = pairs.iter().map(|(name, value)| ((*name).to_owned(), value.as_bytes().into()));
        let wishes = SetOptions {
            keep_failed: true,
            keep_going: false,
            try_fallback: false,
            verbosity: 3,
            max_build_jobs: 7,
            max_silent_time_s: 0,
            use_build_hook: One,
            verbose_build: 0,
            log_type: Obsolete,
            print_build_trace: Obsolete,
            build_cores: 2,
            use_substitutes: false,
            overrides: Overrides(pairs.collect()),
        };
        overlay(&base, &rules(), &wishes, trusted)
    }

    #[test]
    fn fixed_fields_are_for_everybody() {
        for trusted in [true, false] {
            let settings = asked(&[], trusted).terms.settings;
            assert!(settings.keep_failed && !settings.substitute);
            assert_eq!((settings.max_jobs.0, settings.cores), (7, 2));
        }
    }

    #[test]
    fn what_an_untrusted_client_may_set() {
        let after = |name: &str, wish: &str, trusted| {
            asked(&[(name, wish)], trusted).terms.settings.get(find(name).unwrap().name).unwrap()
        };
        let default = |name: &str| asked(&[], true).terms.settings.get(find(name).unwrap().name).unwrap();
        for (name, wish, for_all) in [
            ("timeout", "17", true),
            ("build-timeout", "17", true),
            ("connect-timeout", "17", true),
            ("max-silent-time", "17", true),
            ("builders", "", true),
            ("builders", "ssh://x", false),
            ("sandbox", "relaxed", false),
            ("trusted-users", "*", false),
            ("allowed-users", "nobody", false),
            ("require-sigs", "false", false),
            ("trusted-public-keys", "x-1:AAAA", false),
            ("build-hook", "/bin/sh", false),
            ("post-build-hook", "/bin/sh", false),
            ("secret-key-files", "/etc/shadow", false),
            ("substituters", "https://b.example/", true),
            ("binary-caches", "https://b.example", true),
        ] {
            assert_ne!(after(name, wish, true), default(name), "{name} = {wish}");
            assert_eq!(after(name, wish, false) != default(name), for_all, "{name} = {wish}");
        }
    }

    #[test]
    fn nobody_sets_these() {
        for trusted in [true, false] {
            let found = asked(&[("experimental-features", "ca-derivations"), ("plugin-files", "/x")], trusted);
            assert!(found.terms.settings.experimental_features.is_empty());
            assert_eq!((found.warnings.len(), found.debug.len()), (0, 0));
        }
    }

    #[test]
    fn untrusted_substituters() {
        let found = asked(&[("substituters", "https://b.example https://evil.example")], false);
        assert_eq!(found.terms.settings.substituters, ["https://b.example/"]);
        assert!(found.warnings[0].starts_with("ignoring untrusted substituter 'https://evil.example'"));
        let found = asked(&[("extra-substituters", "https://evil.example")], false);
        assert_eq!(found.terms.settings.substituters, ["https://cache.nixos.org/"]);
    }

    /// What is remembered is of the same settings, the same wishes and the same trust.
    #[test]
    fn only_the_same_is_remembered() {
        let (overlays, rules) = (Overlays::default(), rules());
        let base = Arc::new(Settings::new(&rules.machine));
        let mut wishes = SetOptions {
            keep_failed: false,
            keep_going: false,
            try_fallback: false,
            verbosity: 3,
            max_build_jobs: 7,
            max_silent_time_s: 0,
            use_build_hook: One,
            verbose_build: 0,
            log_type: Obsolete,
            print_build_trace: Obsolete,
            build_cores: 2,
            use_substitutes: false,
            overrides: Overrides(vec![("sandbox".into(), b"relaxed".as_slice().into())]),
        };
        let first = overlays.of(&base, &rules, &wishes, true);
        assert!(Arc::ptr_eq(&first, &overlays.of(&base, &rules, &wishes, true)));
        let untrusted = overlays.of(&base, &rules, &wishes, false);
        assert_ne!(untrusted.terms.settings.sandbox, first.terms.settings.sandbox);
        assert_eq!(overlays.of(&base, &rules, &wishes, true).terms.settings.sandbox, first.terms.settings.sandbox);
        wishes.build_cores = 3;
        assert_eq!(overlays.of(&base, &rules, &wishes, true).terms.settings.cores, 3);
        // The daemon's own settings were read again.
        let mut other = Settings::clone(&base);
        other.trusted_substituters.insert("https://b.example/".into());
        let after = overlays.of(&Arc::new(other), &rules, &wishes, true);
        assert!(after.terms.settings.trusted_substituters.contains("https://b.example/"));
        // What is too long is not.
        wishes.overrides.0.push(("x".into(), vec![b'x'; MAX_REMEMBERED].into()));
        let long = overlays.of(&base, &rules, &wishes, true);
        assert!(!Arc::ptr_eq(&long, &overlays.of(&base, &rules, &wishes, true)));
    }

    #[test]
    fn odd_values_are_warnings() {
        let found = asked(&[("cores", "x"), ("zork", "1"), ("timeout", "\u{fffd}")], true);
        assert_eq!(found.terms.settings.cores, 2);
        assert!(found.warnings.iter().any(|w| w == "unknown setting 'zork'"), "{:?}", found.warnings);
    }
}
