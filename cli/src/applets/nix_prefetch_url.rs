//! `nix-prefetch-url`: a file, or what is in an archive, from a URL into the store.
//!
//! Source: cli, section 11.

use std::ffi::OsString;
use std::fs::Permissions;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use larder_cache::DownloadError;
use larder_cache::client::Client;
use larder_core::content_address::Method;
use larder_core::hash::{Algorithm, Encoding, Hash};
use larder_core::report::{Level, Reporter as _};
use larder_core::store_path::{Name, NameError};
use larder_fs::layout::Access;
use larder_realise::build::builtin::unpack::unpack;
use larder_store::ingest::ContentAddressed;

use super::nix_hash::{HashOptions, hash_path};
use super::nix_store::store::open;
use super::{Context, print, version};
use crate::args::{Grammar, UsageError, Words, scan, shown};
use crate::caches::client_options;
use crate::exit::{Failure, Status};
use crate::printer::{Output, Printer};

pub const HELP: &str = "\
nix-prefetch-url - copy a file from a URL into the store, and print its hash

Usage:
  nix-prefetch-url [--type ALGO] [--print-path] [--unpack] [--name NAME]
                   URL [HASH]

What has the given hash already is not downloaded.

  --type ALGO       md5, sha1, sha256 (the default) or sha512
  --print-path      print the store path too (also PRINT_PATH=1)
  --unpack          add what is in the archive (zip, or tar, compressed or not)
  --executable      make the file executable
  --name NAME       name of the store path, instead of the file's own
  --version         print the version

Example: nix-prefetch-url https://example.org/hello-2.12.tar.gz
";

/// The words of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
struct LowArgs {
    version: bool,
    algorithm: Algorithm,
    print_path: bool,
    unpack: bool,
    executable: bool,
    name: Option<String>,
    arguments: Vec<OsString>,
}

impl Grammar for LowArgs {
    fn word(&mut self, word: OsString, words: &mut Words) -> Result<(), UsageError> {
        match word.to_str() {
            Some("--version") => self.version = true,
            Some("--type") => self.algorithm = shown(&words.argument("--type")?).parse()?,
            Some("--print-path") => self.print_path = true,
            Some("--unpack") => self.unpack = true,
            Some("--executable") => self.executable = true,
            Some("--name") => self.name = Some(shown(&words.argument("--name")?)),
            _ if word.as_encoded_bytes().first() == Some(&b'-') => {
                return Err(UsageError::UnrecognisedFlag { flag: shown(&word) });
            }
            _ if self.arguments.len() == 2 => return Err(UsageError::TooManyArguments),
            _ => self.arguments.push(word),
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
enum PrefetchError {
    #[error("cannot figure out file name for '{url}'")]
    NoName { url: String },
    #[error("'{name}' cannot be the name of a store object; another can be given with --name")]
    Name { name: String, source: NameError },
    #[error("unable to download '{url}'")]
    Download { url: String, source: DownloadError },
    #[error("unable to download '{url}'")]
    Read { url: String, source: io::Error },
    #[error("'{url}': lists of mirrors need an evaluator, which Larder does not have")]
    Mirror { url: String },
    #[error("failed to open archive")]
    Unpack(#[source] io::Error),
    #[error("hash mismatch for '{url}': {expected} was expected, and it is {found}")]
    Mismatch { url: String, expected: String, found: String },
    #[error("writing to '{}'", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// Runs `nix-prefetch-url`.
pub(super) fn run(cx: &Context, words: Vec<OsString>) -> Result<Status, Failure> {
    let is_set = |name| cx.env.get_filled(name).is_some();
    let mut low = LowArgs {
        version: false,
        algorithm: Algorithm::Sha256,
        print_path: is_set("PRINT_PATH"),
        unpack: false,
        executable: false,
        name: None,
        arguments: Vec::new(),
    };
    let common = scan(words, &mut low)?;
    cx.terminal.configure(&common);
    if common.help {
        print(HELP)?;
        return Ok(Status::SUCCESS);
    }
    let settings = cx.settings_for(&common.overrides, false)?;
    if low.version {
        print(&version(cx.name))?;
        return Ok(Status::SUCCESS);
    }
    let url = shown(low.arguments.first().ok_or(UsageError::NoUrl)?);
    if url.starts_with("mirror://") {
        return Err(PrefetchError::Mirror { url }.into());
    }
    let expected = low.arguments.get(1).map(|text| Hash::parse(&shown(text), Some(low.algorithm))).transpose()?;
    let name = match &low.name {
        Some(name) => name.clone(),
        None => url.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned(),
    };
    if name.is_empty() || (low.name.is_none() && !url.contains('/')) {
        return Err(PrefetchError::NoName { url }.into());
    }
    let name = Name::new(&name).map_err(|source| PrefetchError::Name { name, source })?;
    let method = if low.unpack || low.executable { Method::Recursive } else { Method::Flat };

    let store = open(cx, &settings, Access::ReadWrite)?;
    let mut known = None;
    if let Some(hash) = expected {
        let path = store.dir().make_fixed_path(method, hash, &name)?;
        store.add_temp_roots([&path])?;
        if store.is_valid(&path)? {
            known = Some((path, hash));
        }
    }
    let (path, hash) = if let Some(known) = known {
        known
    } else {
        let folder = tempfile::Builder::new().prefix("larder-prefetch-").tempdir()?;
        let client = Client::new(client_options(&cx.env, &settings), store.shared_reporter());
        let source = fetch(&client, &url, folder.path(), &low)?;
        let options = HashOptions { flat: method == Method::Flat, algorithm: low.algorithm };
        let found = hash_path(source.as_os_str(), options, &cx.interrupt)?;
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            let (expected, found) = (as_printed(expected), as_printed(found));
            return Err(PrefetchError::Mismatch { url, expected, found }.into());
        }
        (store.add(&source, &ContentAddressed { name, method, algorithm: low.algorithm })?, found)
    };
    let full = store.dir().full(&path);
    if !low.print_path && !is_set("QUIET") {
        cx.terminal.message(Level::Info, format_args!("path is '{full}'"));
    }
    let mut out = Printer::new(Output::Listing);
    out.line(as_printed(hash))?;
    if low.print_path {
        out.line(full)?;
    }
    out.finish()?;
    Ok(Status::SUCCESS)
}

fn as_printed(hash: Hash) -> String {
    hash.encode(if hash.algorithm() == Algorithm::Md5 { Encoding::Base16 } else { Encoding::Base32 })
}

/// Downloads into a folder of ours; gives what is to be added.
fn fetch(client: &Arc<Client>, url: &str, folder: &Path, low: &LowArgs) -> Result<PathBuf, PrefetchError> {
    let opened = client.open(url);
    let mut source = opened.map_err(|source| PrefetchError::Download { url: url.to_owned(), source })?;
    let file = folder.join("tmp");
    let wrote = |path: &Path, source| PrefetchError::Write { path: path.to_owned(), source };
    let mut out = std::fs::File::create(&file).map_err(|source| wrote(&file, source))?;
    let mut block = vec![0; 256 << 10];
    loop {
        match source.read(&mut block) {
            Ok(0) => break,
            Ok(n) => io::Write::write_all(&mut out, block.get(..n).unwrap_or_default())
                .map_err(|source| wrote(&file, source))?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(PrefetchError::Read { url: url.to_owned(), source }),
        }
    }
    drop(out);
    if low.unpack {
        let unpacked = folder.join("unpacked");
        std::fs::create_dir(&unpacked).map_err(|source| wrote(&unpacked, source))?;
        let packed = std::fs::File::open(&file).map_err(|source| wrote(&file, source))?;
        unpack(packed, &unpacked).map_err(PrefetchError::Unpack)?;
        // The one directory that most archives have is not part of it.
        let mut entries = std::fs::read_dir(&unpacked).map_err(|source| wrote(&unpacked, source))?;
        return Ok(match (entries.next(), entries.next()) {
            (Some(Ok(only)), None) => only.path(),
            (None, _) => return Err(PrefetchError::Unpack(io::Error::other("there is nothing in it"))),
            _ => unpacked,
        });
    }
    if low.executable {
        std::fs::set_permissions(&file, Permissions::from_mode(0o700)).map_err(|source| wrote(&file, source))?;
    }
    Ok(file)
}
