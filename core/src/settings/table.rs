//! The table of all settings.

use std::collections::{BTreeMap, BTreeSet};

use super::value::{Context, Jobs, Kind, PathText, Sandbox, Value};
use super::{Machine, Os, SettingsError};

/// Whose setting it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The store's, known to 2.8.
    Store,
    /// The store's, known to later versions only.
    Later,
    /// Of the evaluator and of flakes: read, and without effect here.
    Evaluator,
    /// Of 1.x only: 2.x warns that it is unknown.
    Historic,
    /// Our own: no Nix knows it.
    Larder,
}

/// A setting as a row of the [`TABLE`].
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub name: &'static str,
    /// Other names for the same setting.
    pub aliases: &'static [&'static str],
    pub group: Group,
    pub kind: Kind,
    pub doc: &'static str,
    /// The value as `show-config` prints it.
    pub print: fn(&Settings) -> String,
    pub(super) set: fn(&mut Settings, &str, &Machine) -> Result<(), SettingsError>,
    pub(super) append: fn(&mut Settings, &str, &Machine) -> Result<(), SettingsError>,
}

/// Finds a setting by its name or an alias.
pub fn find(name: &str) -> Option<&'static Entry> {
    TABLE.iter().find(|entry| entry.name == name || entry.aliases.contains(&name))
}

fn set(text: &str) -> BTreeSet<String> {
    super::value::words(text).map(str::to_owned).collect()
}

fn list(text: &str) -> Vec<String> {
    super::value::words(text).map(str::to_owned).collect()
}

/// Makes the struct, its defaults and the table from one row for each setting: name, aliases,
/// group, field, type, default, meaning.
macro_rules! settings {
    ($($name:literal $aliases:tt $group:ident $field:ident: $kind:ty = $default:expr; $doc:literal)*) => {
        /// The values of all settings.
        #[derive(Debug, Clone, PartialEq)]
        pub struct Settings {
            $(#[doc = $doc] pub $field: $kind,)*
        }

        impl Settings {
            /// The defaults.
            pub fn new(machine: &Machine) -> Self {
                Self {
                    $($field: {
                        let default: fn(&Machine) -> $kind = $default;
                        default(machine)
                    },)*
                }
            }
        }

        /// All settings, sorted by name.
        pub static TABLE: &[Entry] = &[
            $(Entry {
                name: $name,
                aliases: &$aliases,
                group: Group::$group,
                kind: <$kind as Value>::KIND,
                doc: $doc,
                print: |settings| settings.$field.print(),
                set: |settings, text, machine| {
                    settings.$field = Value::parse(text, &Context { name: $name, machine })?;
                    Ok(())
                },
                append: |settings, text, machine| {
                    Value::append(&mut settings.$field, Value::parse(text, &Context { name: $name, machine })?);
                    Ok(())
                },
            },)*
        ];
    };
}

settings! {
"abort-on-warn" [] Evaluator abort_on_warn: bool = |_| false;
    "Stop at the first warning of an expression."
"accept-flake-config" [] Evaluator accept_flake_config: bool = |_| false;
    "Take settings from flakes without asking."
"access-tokens" [] Evaluator access_tokens: BTreeMap<String, String> = |_| BTreeMap::new();
    "Tokens for fetching from code hosts, `host=token`."
"allow-dirty" [] Evaluator allow_dirty: bool = |_| true;
    "Allow work trees with changes."
"allow-dirty-locks" [] Evaluator allow_dirty_locks: bool = |_| false;
    "Allow lock files that refer to work trees with changes."
"allow-import-from-derivation" [] Evaluator allow_import_from_derivation: bool = |_| true;
    "Allow expressions that need something built."
"allow-new-privileges" [] Store allow_new_privileges: bool = |_| false;
    "Do not set `no_new_privs` for builders."
"allow-symlinked-store" [] Store allow_symlinked_store: bool = |_| false;
    "Permit symlinks in the path of the store; also `NIX_IGNORE_SYMLINK_STORE=1`."
"allow-unsafe-native-code-during-evaluation" [] Evaluator allow_unsafe_native_code_during_evaluation: bool = |_| false;
    "Enable builtins that run programs."
"allowed-impure-host-deps" [] Store allowed_impure_host_deps: BTreeSet<String> = |_| set("");
    "Prefixes of what `__impureHostDeps` may name."
"allowed-uris" [] Evaluator allowed_uris: Vec<String> = |_| list("");
    "Prefixes of what may be fetched in restricted mode."
"allowed-users" [] Store allowed_users: Vec<String> = |_| list("*");
    "Who may connect to the daemon: names, `@group`, `*`."
"always-allow-substitutes" [] Later always_allow_substitutes: bool = |_| false;
    "Ignore `allowSubstitutes = false` of derivations."
"auto-allocate-uids" [] Later auto_allocate_uids: bool = |_| false;
    "Take builders' user ids from a range instead of the group (experimental)."
"auto-optimise-store" [] Store auto_optimise_store: bool = |_| false;
    "Link equal files as paths are added."
"bash-prompt" [] Evaluator bash_prompt: String = |_| String::new();
    "Prompt of development shells."
"bash-prompt-prefix" [] Evaluator bash_prompt_prefix: String = |_| String::new();
    "Put before the prompt of development shells."
"bash-prompt-suffix" [] Evaluator bash_prompt_suffix: String = |_| String::new();
    "Put after the prompt of development shells."
"binary-caches-files" [] Historic binary_caches_files: Vec<String> = |_| list("");
    "Files with further URLs of binary caches."
"build-cache-failure" [] Historic build_cache_failure: bool = |_| false;
    "Remember failed builds."
"build-dir" [] Later build_dir: PathText = |_| PathText::default();
    "Parent of build directories; unset: `TMPDIR`."
"build-extra-chroot-dirs" [] Historic build_extra_chroot_dirs: BTreeSet<String> = |_| set("");
    "Added to `sandbox-paths`, see [`Settings::mounts`]."
"build-hook" [] Store build_hook: PathText = |m| PathText::new(&m.build_hook).unwrap_or_default();
    "Program that builds on other machines."
"build-poll-interval" [] Store build_poll_interval: u32 = |_| 5;
    "Seconds between attempts to lock a path."
"build-users-group" [] Store build_users_group: String = |m| String::from(if m.root { "nixbld" } else { "" });
    "Group whose members builders run as; empty: the caller."
"builders" [] Store builders: String = |m| format!("@{}", m.conf_dir.join("machines"));
    "Machines to build on, separated by `;` or line feeds; `@file` includes a file. Also `NIX_REMOTE_SYSTEMS`."
"builders-use-substitutes" [] Store builders_use_substitutes: bool = |_| false;
    "Let other machines fetch inputs themselves."
"commit-lockfile-summary" [] Evaluator commit_lockfile_summary: String = |_| String::new();
    "Commit message for changed lock files."
"compress-build-log" ["build-compress-log"] Store compress_build_log: bool = |_| true;
    "Write logs as bzip2."
"connect-timeout" [] Store connect_timeout: u64 = |_| 0;
    "Seconds to wait for a connection, 0: as long as it takes."
"cores" ["build-cores"] Store cores: u32 = |m| m.cores;
    "What builders get as `NIX_BUILD_CORES`."
"darwin-log-sandbox-violations" [] Store darwin_log_sandbox_violations: bool = |_| false;
    "Log what the sandbox of macOS denies."
"debugger-on-trace" [] Evaluator debugger_on_trace: bool = |_| false;
    "Start the debugger at `builtins.trace`."
"debugger-on-warn" [] Evaluator debugger_on_warn: bool = |_| false;
    "Start the debugger at `builtins.warn`."
"diff-hook" [] Store diff_hook: PathText = |_| PathText::default();
    "Program that compares outputs of a build that was not deterministic."
"download-attempts" [] Store download_attempts: u32 = |_| 5;
    "How often a download is tried."
"download-buffer-size" [] Later download_buffer_size: u64 = |_| 64 << 20;
    "Bytes kept of a download that is read too slowly."
"download-speed" [] Later download_speed: u64 = |_| 0;
    "Most KiB a second to download, 0: no limit."
"enforce-determinism" [] Store enforce_determinism: bool = |_| true;
    "Fail when rounds of `repeat` differ."
"eval-cache" [] Evaluator eval_cache: bool = |_| true;
    "Remember results of evaluation."
"eval-system" [] Evaluator eval_system: String = |_| String::new();
    "What `builtins.currentSystem` says; empty: `system`."
"experimental-features" [] Store experimental_features: BTreeSet<String> = |_| set("");
    "Features to enable: `ca-derivations`, `nix-command`, ..."
"external-builders" [] Later external_builders: String = |_| String::from("[]");
    "Programs that build for further systems, as JSON (experimental)."
"extra-platforms" [] Store extra_platforms: BTreeSet<String> = |m| m.extra_platforms.clone();
    "Systems built here besides `system`."
"fallback" ["build-fallback"] Store fallback: bool = |_| false;
    "Build when substitution fails."
"filter-syscalls" [] Store filter_syscalls: bool = |_| true;
    "Keep builders from making setuid files and from setting attributes."
"flake-registry" [] Evaluator flake_registry: String =
    |_| "https://github.com/NixOS/flake-registry/raw/master/flake-registry.json".into();
    "Where the global list of flakes is."
"force-manifest" [] Historic force_manifest: bool = |_| false;
    "Use manifests of channels."
"fsync-metadata" [] Store fsync_metadata: bool = |_| true;
    "Sync commits of the database."
"fsync-store-paths" [] Later fsync_store_paths: bool = |_| false;
    "Sync the contents of paths before they are registered."
"gc-check-reachability" [] Historic gc_check_reachability: bool = |_| false;
    "After a root is made, warn if the collector does not find it."
"gc-reserved-space" [] Store gc_reserved_space: i64 = |_| 8 << 20;
    "Bytes of the file that is removed so that a collection on a full disk can begin."
"hashed-mirrors" [] Store hashed_mirrors: Vec<String> = |_| list("");
    "Mirrors where files are named by their hash."
"http-connections" ["binary-caches-parallel-connections"] Store http_connections: u64 = |_| 25;
    "Parallel downloads, 0: no limit."
"http2" [] Store http2: bool = |_| true;
    "Use HTTP/2."
"id-count" [] Later id_count: u32 = |_| 8_388_608;
    "Number of ids for `auto-allocate-uids`."
"ignore-try" [] Evaluator ignore_try: bool = |_| false;
    "Do not start the debugger within `builtins.tryEval`."
"ignored-acls" [] Store ignored_acls: BTreeSet<String> = |_| set("security.selinux system.nfs4_acl security.csm");
    "Extended attributes that stay on store objects."
"impersonate-linux-26" ["build-impersonate-linux-26"] Store impersonate_linux_26: bool = |_| false;
    "Tell builders the kernel were of the 2.6 series."
"impure-env" [] Later impure_env: BTreeMap<String, String> = |_| BTreeMap::new();
    "Values for `impureEnvVars`, `NAME=value` (experimental)."
"json-log-path" [] Later json_log_path: PathText = |_| PathText::default();
    "File or socket that gets log messages as JSON."
"keep-build-log" ["build-keep-log"] Store keep_build_log: bool = |_| true;
    "Keep logs of builds."
"keep-derivations" ["gc-keep-derivations"] Store keep_derivations: bool = |_| true;
    "The collector keeps derivers of live paths."
"keep-env-derivations" ["env-keep-derivations"] Store keep_env_derivations: bool = |_| false;
    "User environments keep derivations alive."
"keep-failed" [] Store keep_failed: bool = |_| false;
    "Keep directories of failed builds."
"keep-going" [] Store keep_going: bool = |_| false;
    "After a failure build what can be built."
"keep-outputs" ["gc-keep-outputs"] Store keep_outputs: bool = |_| false;
    "The collector keeps outputs of live derivations."
"lazy-trees" [] Evaluator lazy_trees: bool = |_| false;
    "Copy flakes to the store only when needed."
"log-lines" [] Store log_lines: u64 = |_| 10;
    "Lines of the log shown of a failed build."
"log-servers" [] Historic log_servers: Vec<String> = |_| list("");
    "URLs where `nix-store -l` looks for logs."
"max-build-log-size" ["build-max-log-size"] Store max_build_log_size: u64 = |_| 0;
    "Bytes a build may write to its log, 0: no limit."
"max-build-processes" [] Larder max_build_processes: u64 = |m| 4096 + 512 * u64::from(m.cores);
    "Processes and threads that a build may have at a time, where they can be told from others; 0: no limit."
"max-call-depth" [] Evaluator max_call_depth: u32 = |_| 10_000;
    "Deepest nesting of calls in expressions."
"max-free" [] Store max_free: u64 = |_| u64::MAX;
    "Free bytes at which an automatic collection stops."
"max-jobs" ["build-max-jobs"] Store max_jobs: Jobs = |_| Jobs(1);
    "Builds at a time on this machine; 0: none."
"max-silent-time" ["build-max-silent-time"] Store max_silent_time: i64 = |_| 0;
    "Seconds a build may be silent, 0: as long as it likes."
"max-substitution-jobs" ["substitution-max-jobs"] Later max_substitution_jobs: u32 = |_| 16;
    "Substitutions at a time."
"min-free" [] Store min_free: u64 = |_| 0;
    "Free bytes below which a collection starts by itself, 0: never."
"min-free-check-interval" [] Store min_free_check_interval: u64 = |_| 5;
    "Seconds between looks at the free space."
"nar-buffer-size" [] Store nar_buffer_size: u64 = |_| 32 << 20;
    "Bytes of a NAR kept in memory before it goes to a file."
"narinfo-cache-negative-ttl" [] Store narinfo_cache_negative_ttl: u32 = |_| 3600;
    "Seconds for which it is remembered that a cache lacks a path."
"narinfo-cache-positive-ttl" [] Store narinfo_cache_positive_ttl: u32 = |_| 30 * 24 * 3600;
    "Seconds for which it is remembered that a cache has a path."
"netrc-file" [] Store netrc_file: String = |m| m.conf_dir.join("netrc").into_string();
    "Passwords for HTTP."
"nix-path" [] Evaluator nix_path: Vec<String> = |_| list("");
    "Where expressions are looked up."
"nix-shell-always-looks-for-shell-nix" [] Evaluator nix_shell_always_looks_for_shell_nix: bool = |_| true;
    "Let `nix-shell DIR` use `DIR/shell.nix`."
"nix-shell-shebang-arguments-relative-to-script" [] Evaluator nix_shell_shebang_arguments_relative_to_script: bool = |_| true;
    "What `nix-shell` scripts' file arguments are relative to."
"plugin-files" [] Evaluator plugin_files: Vec<String> = |_| list("");
    "Libraries to load."
"post-build-hook" [] Store post_build_hook: String = |_| String::new();
    "Program to run after each build."
"pre-build-hook" [] Store pre_build_hook: String = |_| String::new();
    "Program that may add mounts to a sandbox."
"preallocate-contents" [] Store preallocate_contents: bool = |_| false;
    "Allocate files before they are unpacked."
"print-missing" [] Store print_missing: bool = |_| true;
    "Print what will be built and fetched."
"pure-eval" [] Evaluator pure_eval: bool = |_| false;
    "Evaluate without looking at files or the environment."
"repeat" ["build-repeat"] Store repeat: u64 = |_| 0;
    "Further rounds of each build, to compare."
"require-drop-supplementary-groups" [] Later require_drop_supplementary_groups: bool = |m| m.root;
    "Fail when a builder's further groups cannot be dropped."
"require-sigs" [] Store require_sigs: bool = |_| true;
    "Refuse paths that are neither signed by a trusted key nor content-addressed."
"restrict-eval" [] Evaluator restrict_eval: bool = |_| false;
    "Let expressions read only what the search path names."
"run-diff-hook" [] Store run_diff_hook: bool = |_| false;
    "Run `diff-hook`."
"sandbox" ["build-use-chroot", "build-use-sandbox"] Store sandbox: Sandbox =
    |m| if m.os == Os::Linux { Sandbox::On } else { Sandbox::Off };
    "Shut builds in."
"sandbox-build-dir" [] Store sandbox_build_dir: String = |_| "/build".into();
    "Build directory as seen inside."
"sandbox-dev-shm-size" [] Store sandbox_dev_shm_size: String = |_| "50%".into();
    "Size of `/dev/shm` inside."
"sandbox-fallback" [] Store sandbox_fallback: bool = |_| true;
    "Build without a sandbox where the kernel allows none."
"sandbox-paths" ["build-chroot-dirs", "build-sandbox-paths"] Store sandbox_paths: BTreeSet<String> = |_| set("");
    "What else is visible inside: `path`, `inside=outside`, with `?` at the end if it may be missing."
"secret-key-files" [] Store secret_key_files: Vec<String> = |_| list("");
    "Keys that sign what is built here."
"show-trace" [] Evaluator show_trace: bool = |_| false;
    "Print where in an expression an error came from."
"signed-binary-caches" [] Historic signed_binary_caches: Vec<String> = |_| list("");
    "URLs, or `*`, of caches that must be signed."
"ssh-substituter-hosts" [] Historic ssh_substituter_hosts: Vec<String> = |_| list("");
    "Hosts to fetch from over ssh; only the first is used."
"ssl-cert-file" [] Later ssl_cert_file: String = |_| String::new();
    "Certificates to trust; also `NIX_SSL_CERT_FILE`."
"stalled-download-timeout" [] Store stalled_download_timeout: u64 = |_| 300;
    "Seconds without data after which a download is given up."
"start-id" [] Later start_id: u32 = |_| 872_415_232;
    "First id for `auto-allocate-uids`."
"store" [] Store store: String = |_| "auto".into();
    "URI of the store; also `NIX_REMOTE`."
"substitute" ["build-use-substitutes"] Store substitute: bool = |_| true;
    "Fetch from caches what they have."
"substituters" ["binary-caches"] Store substituters: Vec<String> = |_| list("https://cache.nixos.org/");
    "URLs of caches."
"sync-before-registering" [] Store sync_before_registering: bool = |_| false;
    "Sync file systems before paths are registered."
"system" [] Store system: String = |m| m.system.clone();
    "The system built here."
"system-features" [] Store system_features: BTreeSet<String> =
    |m| set(if m.kvm { "benchmark big-parallel kvm nixos-test" } else { "benchmark big-parallel nixos-test" });
    "Features that derivations may require."
"tarball-ttl" [] Evaluator tarball_ttl: u32 = |_| 3600;
    "Seconds for which a download is not looked at again."
"timeout" ["build-timeout"] Store timeout: i64 = |_| 0;
    "Seconds a build may take, 0: as long as it likes."
"trace-function-calls" [] Evaluator trace_function_calls: bool = |_| false;
    "Print each call in an expression."
"trace-import-from-derivation" [] Evaluator trace_import_from_derivation: bool = |_| false;
    "Warn when an expression needs something built."
"trace-verbose" [] Evaluator trace_verbose: bool = |_| false;
    "Let `builtins.traceVerbose` print."
"trusted-public-keys" ["binary-cache-public-keys"] Store trusted_public_keys: Vec<String> =
    |_| list("cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=");
    "Keys whose signatures count."
"trusted-substituters" ["trusted-binary-caches"] Store trusted_substituters: BTreeSet<String> = |_| set("");
    "URLs of caches that anyone may ask for."
"trusted-users" [] Store trusted_users: Vec<String> = |_| list("root");
    "Who may do all through the daemon: names, `@group`, `*`."
"untrusted-binary-caches" [] Historic untrusted_binary_caches: Vec<String> = |_| list("");
    "Caches an untrusted client asked for."
"upgrade-nix-store-path-url" [] Evaluator upgrade_nix_store_path_url: String =
    |_| "https://github.com/NixOS/nixpkgs/raw/master/nixos/modules/installer/tools/nix-fallback-paths.nix".into();
    "Where `nix upgrade-nix` learns of new versions."
"use-binary-caches" [] Historic use_binary_caches: bool = |_| true;
    "Use caches at all."
"use-case-hack" [] Store use_case_hack: bool = |m| m.os == Os::MacOs;
    "Tell apart names that differ in case only, by a suffix on disk."
"use-cgroups" [] Later use_cgroups: bool = |_| false;
    "Run each build in a control group (experimental)."
"use-registries" [] Evaluator use_registries: bool = |_| true;
    "Look up flakes in lists."
"use-sqlite-wal" [] Store use_sqlite_wal: bool = |_| true;
    "Of SQLite, so without effect here."
"use-ssh-substituter" [] Historic use_ssh_substituter: bool = |_| true;
    "Fetch over ssh."
"use-xdg-base-directories" [] Later use_xdg_base_directories: bool = |_| false;
    "Put profiles and channels into the directories of XDG."
"user-agent-suffix" [] Store user_agent_suffix: String = |_| String::new();
    "Added to the User-Agent header."
"verify-https-binary-caches" [] Historic verify_https_binary_caches: bool = |_| true;
    "Check certificates of caches."
"warn-dirty" [] Evaluator warn_dirty: bool = |_| true;
    "Warn of work trees with changes."
"warn-large-path-threshold" [] Later warn_large_path_threshold: u64 = |_| 0;
    "Bytes of a path from which copying it gives a warning, 0: none."
"warn-short-path-literals" [] Evaluator warn_short_path_literals: bool = |_| false;
    "Warn of paths without `./`."
}

impl Settings {
    /// `sandbox-paths` with what 1.x had added to them.
    pub fn mounts(&self) -> impl Iterator<Item = &str> {
        self.sandbox_paths.union(&self.build_extra_chroot_dirs).map(String::as_str)
    }

    /// The value of a setting, by its name or an alias, as `show-config` prints it.
    pub fn get(&self, name: &str) -> Option<String> {
        find(name).map(|entry| (entry.print)(self))
    }

    /// All settings but the historic ones, and their values: `show-config`.
    pub fn show(&self) -> impl Iterator<Item = (&'static str, String)> {
        TABLE.iter().filter(|e| e.group != Group::Historic).map(|entry| (entry.name, (entry.print)(self)))
    }
}
