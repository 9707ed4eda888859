//! `nix-store`: from its words to what is done.
//!
//! The operations that need no store are here and in `keys`; the words are in
//! [`args::nix_store`](crate::args::nix_store).

mod keys;
pub(super) mod query;
pub(super) mod realise;
pub(super) mod remote;
pub(super) mod store;

use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Read as _};
use std::os::unix::ffi::OsStringExt as _;

use larder_core::content_address::Method;
use larder_core::hash::{Algorithm, Hash};
use larder_core::report::Level;
use larder_core::settings::Settings;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::{Name, StorePath};

use larder_fs::layout::Access;

use super::nar::{dump_options, dump_to, restore_from, restore_options};
use super::{Context, print, version};
use crate::args::nix_store::{Command, GcAction, LowArgs};
use crate::args::{Common, shown};
use crate::conf::{Facts, LocalStore, StoreChoice, choose, store_dir};
use crate::exit::{Failure, Status};

pub const HELP: &str = "\
nix-store - manipulate or query the Nix store

Usage: nix-store OPERATION [FLAG]... [ARGUMENT]...

Paths in and out of the store:
  --add, -A FILE...               copy files or trees into the store
  --add-fixed [--recursive] ALGO FILE...
                                  the same, addressed by a hash of one's choice
  --print-fixed-path [--recursive] ALGO HASH NAME
                                  the path that --add-fixed would give
  --export PATH...  --import      write paths to stdout; read them from stdin
  --dump FILE  --restore FILE     write a NAR to stdout; unpack one from stdin

Asking:
  --query, -q WHAT PATH...        --outputs (the default), --requisites (-R),
      --references, --referrers, --referrers-closure, --deriver (-d),
      --valid-derivers, --binding (-b) NAME, --hash, --size, --tree, --graph,
      --graphml, --resolve, --roots
      with --use-output (-u), --force-realise (-f), --include-outputs
  --check-validity [--print-invalid] PATH...
  --read-log, -l PATH...          print build logs
  --print-env DERIVATION          print its environment for a shell

Making and removing:
  --realise, -r PATH...           build or fetch, and print the outputs; with
      --dry-run, --repair, --check, --ignore-unknown, --add-root LINK
  --gc                            delete what no root needs; with --print-roots,
      --print-live, --print-dead, --max-freed N[KMGT]
  --delete [--ignore-liveness] PATH...

Looking after the store:
  --verify [--check-contents] [--repair]    --verify-path PATH...
  --repair-path PATH...           --optimise
  --init                          make its directories and database
  --dump-db [PATH]...             --load-db
  --register-validity [--reregister] [--hash-given]
  --query-failed-paths            --clear-failed-paths PATH...|'*'
  --serve [--write]               serve it on stdin and stdout
  --generate-binary-cache-key NAME SECRET-FILE PUBLIC-FILE

For all: -v, --quiet, --store URI, --option NAME VALUE, --SETTING VALUE,
  --stdin (more arguments from there), --version [-v]
";

/// More words than this are not read from standard input, in bytes.
const MAX_STDIN_BYTES: u64 = 1 << 30;

/// Why one of the operations here failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NixStoreError {
    #[error("reading arguments from standard input")]
    Stdin(#[source] io::Error),
    #[error("more than {MAX_STDIN_BYTES} bytes of arguments on standard input")]
    TooMuchStdin,
}

/// Runs `nix-store`.
pub(super) fn run(cx: &Context, words: Vec<OsString>) -> Result<Status, Failure> {
    let (common, mut low) = LowArgs::scan(words)?;
    cx.terminal.configure(&common);
    if common.help {
        print(HELP)?;
        return Ok(Status::SUCCESS);
    }
    let settings = cx.settings_for(&common.overrides, low.may_build())?;
    if low.wants_stdin() && !io::stdin().is_terminal() {
        low.arguments.extend(words_of_stdin(io::stdin().lock())?);
    }
    let command = low.command()?;
    if needs_store(&command)
        && let Some(choice) = store::elsewhere(cx, &settings, &command)?
    {
        return far(cx, &settings, &common, choice, &command);
    }
    match command {
        Command::Version if common.verbosity() > Level::Info => print(&long_version(cx, &settings)?)?,
        Command::Version => print(&version(cx.name))?,
        Command::PrintFixedPath { method, algorithm, hash, name } => {
            let dir = logical_store_dir(cx, &settings)?;
            let path = fixed_path(&dir, method, algorithm, &shown(&hash), &shown(&name))?;
            print(&format!("{}\n", dir.display(&path)))?;
        }
        Command::GenerateBinaryCacheKey { name, secret, public } => {
            keys::generate(&shown(&name), secret.as_ref(), public.as_ref())?;
        }
        Command::Dump { path } => dump_to(&path, &dump_options(&settings), None, &cx.interrupt)?,
        Command::Restore { path } => restore_from(&path, restore_options(&settings), None, &cx.interrupt)?,
        Command::Init => drop(store::open(cx, &settings, Access::ReadWrite)?),
        Command::Realise(args) => realise::realise(cx, &settings, &common, &args)?,
        Command::RepairPath { paths } => realise::repair_paths(cx, &settings, &common, &paths)?,
        Command::ReadLog { paths } => realise::read_logs(cx, &settings, &paths)?,
        Command::Query(query) => query::run(cx, &settings, &query)?,
        Command::Add { files } => store::add(cx, &settings, &files, Method::Recursive, Algorithm::Sha256)?,
        Command::AddFixed { method, algorithm, files } => store::add(cx, &settings, &files, method, algorithm)?,
        Command::Export { paths } => store::export(cx, &settings, &paths)?,
        Command::Import => store::import(cx, &settings)?,
        Command::Verify { check_contents, repair } => {
            return store::verify(cx, &settings, &common, check_contents, repair);
        }
        Command::VerifyPath { paths } => return store::verify_path(cx, &settings, &paths),
        Command::CheckValidity { print_invalid, paths } => {
            store::check_validity(cx, &settings, print_invalid, &paths)?;
        }
        Command::DumpDb { paths } => store::dump_db(cx, &settings, &paths)?,
        Command::LoadDb => store::load_db(cx, &settings)?,
        Command::RegisterValidity { reregister, hash_given } => {
            store::register_validity(cx, &settings, reregister, hash_given)?;
        }
        Command::Gc { action, max_freed_bytes } => store::collect(cx, &settings, action, max_freed_bytes)?,
        Command::Optimise => store::optimise(cx, &settings)?,
        Command::Delete { ignore_liveness, paths } => store::delete(cx, &settings, ignore_liveness, &paths)?,
        Command::PrintEnv { derivation } => store::print_env(cx, &settings, &derivation)?,
        Command::QueryFailedPaths => store::query_failed_paths(cx, &settings)?,
        Command::ClearFailedPaths { paths } => store::clear_failed_paths(cx, &settings, &paths)?,
        Command::Serve { write } => store::serve(cx, settings, write)?,
    }
    Ok(Status::SUCCESS)
}

/// Is it about a store at all?
const fn needs_store(command: &Command) -> bool {
    !matches!(
        command,
        Command::Version
            | Command::PrintFixedPath { .. }
            | Command::GenerateBinaryCacheKey { .. }
            | Command::Dump { .. }
            | Command::Restore { .. }
    )
}

/// Does it in a store that another process keeps.
fn far(
    cx: &Context,
    settings: &Settings,
    common: &Common,
    choice: StoreChoice,
    command: &Command,
) -> Result<Status, Failure> {
    let opened = cx.connect(settings, common, choice)?;
    if let Command::Serve { write } = command {
        store::serve_elsewhere(cx, opened, *write)?;
        return Ok(Status::SUCCESS);
    }
    remote::Far::new(cx, settings, common, &opened).run(command)
}

/// `--gc`, wherever the store is.
pub(super) fn delete_garbage(
    cx: &Context,
    settings: &Settings,
    common: &Common,
    max_freed_bytes: Option<u64>,
) -> Result<(), Failure> {
    let command = Command::Gc { action: GcAction::Delete, max_freed_bytes };
    match store::elsewhere(cx, settings, &command)? {
        Some(choice) => far(cx, settings, common, choice, &command).map(drop),
        None => store::collect(cx, settings, GcAction::Delete, max_freed_bytes),
    }
}

/// Words between white space.
fn words_of_stdin(input: impl io::Read) -> Result<Vec<OsString>, NixStoreError> {
    let mut bytes = Vec::new();
    input.take(MAX_STDIN_BYTES + 1).read_to_end(&mut bytes).map_err(NixStoreError::Stdin)?;
    if bytes.len() as u64 > MAX_STDIN_BYTES {
        return Err(NixStoreError::TooMuchStdin);
    }
    let words = bytes.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    Ok(words.map(|word| OsString::from_vec(word.to_vec())).collect())
}

/// What store paths are written with, without looking at any disk.
fn logical_store_dir(cx: &Context, settings: &Settings) -> Result<StoreDir, Failure> {
    match choose(&settings.store, &cx.env, Facts::NONE)? {
        StoreChoice::Local(store) => Ok(store.layout.store_dir),
        StoreChoice::Daemon { .. } | StoreChoice::Remote { .. } => Ok(store_dir(&cx.env)?),
    }
}

fn fixed_path(
    dir: &StoreDir,
    method: Method,
    algorithm: Algorithm,
    hash: &str,
    name: &str,
) -> Result<StorePath, Failure> {
    let hash = Hash::parse(hash, Some(algorithm))?;
    let name = Name::new(name)?;
    Ok(dir.make_fixed_path(method, hash, &name)?)
}

/// `--version` with `-v`.
fn long_version(cx: &Context, settings: &Settings) -> Result<String, Failure> {
    let user: Vec<String> = cx.env.user_conf_files()?.into_iter().map(String::from).collect();
    let extra: Vec<&str> = settings.extra_platforms.iter().map(String::as_str).collect();
    let layout = LocalStore::from_env(&cx.env)?.layout;
    Ok(format!(
        "{}System type: {}\nAdditional system types: {}\nFeatures: gc, signed-caches\n\
         System configuration file: {}\nUser configuration files: {}\n\
         Store directory: {}\nState directory: {}\n",
        version(cx.name),
        settings.system,
        extra.join(", "),
        cx.env.conf_dir()?.join("nix.conf"),
        user.join(":"),
        layout.store_dir,
        layout.state.display(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Vectors<C> {
        cases: Vec<C>,
    }

    #[derive(Deserialize)]
    struct Fixed {
        id: String,
        algo: String,
        recursive: bool,
        hash_hex: String,
        name: String,
        path: String,
    }

    #[test]
    fn fixed_paths() {
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/store_paths_fixed.json"));
        let vectors: Vectors<Fixed> = serde_json::from_str(text).unwrap();
        println!("store_paths_fixed: {} cases", vectors.cases.len());
        let dir = StoreDir::new("/nix/store").unwrap();
        for case in &vectors.cases {
            let method = if case.recursive { Method::Recursive } else { Method::Flat };
            let algorithm: Algorithm = case.algo.parse().unwrap();
            let hash = Hash::parse(&case.hash_hex, Some(algorithm)).unwrap();
            // Any encoding of the hash will do.
            for text in [case.hash_hex.clone(), hash.to_string(), hash.encode(larder_core::hash::Encoding::Sri)] {
                let path = fixed_path(&dir, method, algorithm, &text, &case.name).unwrap();
                assert_eq!(dir.full(&path), case.path, "{} {text}", case.id);
            }
        }
    }

    #[derive(Deserialize)]
    struct Named {
        id: String,
        name: String,
        #[serde(rename = "2.26.3")]
        verdict: Verdict,
    }

    #[derive(Deserialize)]
    struct Verdict {
        accepted: bool,
        path: Option<String>,
        message: Option<String>,
    }

    #[test]
    fn names() {
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/store_path_names.json"));
        let vectors: Vectors<Named> = serde_json::from_str(text).unwrap();
        println!("store_path_names: {} cases", vectors.cases.len());
        let dir = StoreDir::new("/nix/store").unwrap();
        for case in &vectors.cases {
            let made = fixed_path(&dir, Method::Flat, Algorithm::Sha256, &"0".repeat(64), &case.name);
            assert_eq!(made.is_ok(), case.verdict.accepted, "{}", case.id);
            match made {
                Ok(path) => assert_eq!(Some(dir.full(&path)), case.verdict.path, "{}", case.id),
                Err(failure) => {
                    // A part of the message says what is wrong with the name. Where Nix shows one
                    // byte of a character we show the character.
                    let message = case.verdict.message.as_deref().unwrap();
                    let text = failure.error().to_string().replace("character 'é'", "character '\u{fffd}'");
                    assert!(message.contains(&text), "{}: '{text}' for '{message}'", case.id);
                }
            }
        }
    }

    #[test]
    fn stdin_has_words() {
        let words = words_of_stdin(&b" a\tb\n\n c\xff  "[..]).unwrap();
        assert_eq!(words, [OsString::from("a"), "b".into(), OsString::from_vec(b"c\xff".to_vec())]);
        assert!(words_of_stdin(io::empty()).unwrap().is_empty());
    }

    #[test]
    fn help_names_every_operation() {
        for (name, _) in crate::args::nix_store::OPERATIONS {
            let other_spelling = matches!(*name, "--realize" | "--optimize");
            assert!(other_spelling || HELP.contains(name), "{name}");
        }
    }
}
