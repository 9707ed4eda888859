//! `nix-hash`: hashes of files and trees, and hashes in other encodings.
//!
//! Source: cli, section 10; formats, section 2; `nix_hash.json`.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;

use larder_core::hash::{Algorithm, Encoding, Hash, Hasher, encode_base64, fold};
use larder_fs::dump::{DumpError, DumpOptions, Dumper};
use larder_fs::pipe::pump;
use rayon::prelude::*;
use rustix::buffer::spare_capacity;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::{Context, print, version};
use crate::args::{Grammar, UsageError, Words, scan, shown};
use crate::exit::{Failure, Status};
use crate::interrupt::{Interrupt, Interrupted};
use crate::printer::{Output, Printer};

pub const HELP: &str = "\
nix-hash - compute the cryptographic hash of a path

Usage:
  nix-hash [--flat] [--truncate] [--type ALGO] [FORMAT] PATH...
  nix-hash --to-base16|--to-base32|--to-base64|--to-sri --type ALGO HASH...

Prints one hash a line: of the NAR of each path (its contents, its names, what
is executable), or of the contents of each file.

  --flat            hash the contents of files instead of their NAR
  --type ALGO       md5 (the default), sha1, sha256 or sha512
  --truncate        make hashes longer than 160 bits that long

Format:
  --base16          hexadecimal (the default)
  --base32          base 32 as in store paths
  --base64          base 64
  --sri             ALGO-BASE64

Converting:
  --to-base16, --to-base32, --to-base64, --to-sri
                    print the given hashes, in whatever encoding, in this one

  --version         print the version

Example: nix-hash --type sha256 --flat --base32 hello-2.12.tar.gz
";

/// Digests are folded to this many bytes by `--truncate`.
const TRUNCATED: usize = 20;

/// From this many paths on they are hashed by all cores.
const PARALLEL_FROM: usize = 4;

/// Paths that are hashed before their hashes are printed.
const BATCH: usize = 512;

/// How to hash a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HashOptions {
    /// The contents of a file, not the NAR.
    pub flat: bool,
    pub algorithm: Algorithm,
}

/// How to print a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrintOptions {
    pub encoding: Encoding,
    /// Fold digests that are longer than 20 bytes.
    pub truncate: bool,
}

/// The words of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LowArgs {
    version: bool,
    hash: HashOptions,
    print: PrintOptions,
    /// Convert instead of hashing.
    to: Option<Encoding>,
    arguments: Vec<OsString>,
}

impl Default for LowArgs {
    fn default() -> Self {
        Self {
            version: false,
            hash: HashOptions { flat: false, algorithm: Algorithm::Md5 },
            print: PrintOptions { encoding: Encoding::Base16, truncate: false },
            to: None,
            arguments: Vec::new(),
        }
    }
}

impl Grammar for LowArgs {
    fn word(&mut self, word: OsString, words: &mut Words) -> Result<(), UsageError> {
        if words.is_plain() && word.as_encoded_bytes().first() == Some(&b'-') {
            return Err(UsageError::UnexpectedArgument { word: shown(&word) });
        }
        match word.to_str() {
            Some("--version") => self.version = true,
            Some("--flat") => self.hash.flat = true,
            Some("--truncate") => self.print.truncate = true,
            Some("--type") => self.hash.algorithm = shown(&words.argument("--type")?).parse()?,
            Some("--base16") => self.print.encoding = Encoding::Base16,
            Some("--base32") => self.print.encoding = Encoding::Base32,
            Some("--base64") => self.print.encoding = Encoding::Base64,
            Some("--sri") => self.print.encoding = Encoding::Sri,
            Some("--to-base16") => self.to = Some(Encoding::Base16),
            Some("--to-base32") => self.to = Some(Encoding::Base32),
            Some("--to-base64") => self.to = Some(Encoding::Base64),
            Some("--to-sri") => self.to = Some(Encoding::Sri),
            _ if word.as_encoded_bytes().first() == Some(&b'-') => {
                return Err(UsageError::UnrecognisedFlag { flag: shown(&word) });
            }
            _ => self.arguments.push(word),
        }
        Ok(())
    }
}

/// Why a path has no hash.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HashPathError {
    #[error("opening file '{}'", shown(path))]
    Open { path: OsString, source: io::Error },
    #[error("reading from file '{}'", shown(path))]
    Read { path: OsString, source: io::Error },
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Runs `nix-hash`.
pub(super) fn run(cx: &Context, words: Vec<OsString>) -> Result<Status, Failure> {
    let mut low = LowArgs::default();
    let common = scan(words, &mut low)?;
    cx.terminal.configure(&common);
    if common.help {
        print(HELP)?;
        return Ok(Status::SUCCESS);
    }
    // No setting matters here; that they are well-formed is checked as everywhere.
    cx.settings_for(&common.overrides, false)?;
    if low.version {
        print(&version(cx.name))?;
    } else if let Some(to) = low.to {
        convert(&low, to)?;
    } else {
        hash_all(&low, &cx.interrupt)?;
    }
    Ok(Status::SUCCESS)
}

fn convert(low: &LowArgs, to: Encoding) -> Result<(), Failure> {
    let mut out = Printer::new(Output::Listing);
    for argument in &low.arguments {
        let hash = Hash::parse(&shown(argument), Some(low.hash.algorithm))?;
        out.line(hash.encode(to))?;
    }
    Ok(out.finish()?)
}

fn hash_all(low: &LowArgs, interrupt: &Interrupt) -> Result<(), Failure> {
    let mut out = Printer::new(Output::Listing);
    if low.arguments.len() < PARALLEL_FROM {
        for path in &low.arguments {
            let hash = hash_path(path, low.hash, interrupt)?;
            out.line(encode(hash, low.print))?;
        }
        return Ok(out.finish()?);
    }
    // In order, and up to the first that fails, as if they were done one by one.
    for batch in low.arguments.chunks(BATCH) {
        let hashes: Vec<Result<Hash, HashPathError>> =
            batch.par_iter().map(|path| hash_path(path, low.hash, interrupt)).collect();
        for hash in hashes {
            out.line(encode(hash?, low.print))?;
        }
    }
    Ok(out.finish()?)
}

/// The text of a hash, without its algorithm unless in the SRI form.
pub fn encode(hash: Hash, options: PrintOptions) -> String {
    if !options.truncate || hash.as_bytes().len() <= TRUNCATED {
        return hash.encode(options.encoding);
    }
    let folded: [u8; TRUNCATED] = fold(hash.as_bytes());
    match options.encoding {
        Encoding::Sri => format!("{}-{}", hash.algorithm(), encode_base64(&folded)),
        // The other forms do not name the algorithm; SHA-1 has the right size.
        encoding => Hash::new(Algorithm::Sha1, &folded).expect("SHA-1 has 20 bytes").encode(encoding),
    }
}

/// The hash of a file's contents, or of the NAR of a path.
///
/// What is long is read on one thread and hashed on another.
pub fn hash_path(path: &OsStr, options: HashOptions, interrupt: &Interrupt) -> Result<Hash, HashPathError> {
    let mut hasher = Hasher::new(options.algorithm);
    let sink = |block: &[u8]| -> Result<(), HashPathError> {
        hasher.update(block);
        Ok(interrupt.check()?)
    };
    if options.flat {
        let error = |source: Errno| HashPathError::Open { path: path.to_owned(), source: source.into() };
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(error)?;
        let read = |block: &mut Vec<u8>| {
            fill(&file, block).map_err(|source| HashPathError::Read { path: path.to_owned(), source: source.into() })
        };
        pump(read, sink)?;
    } else {
        let mut dumper = Dumper::new(CWD, path, DumpOptions::default());
        pump(|block| dumper.fill(block), sink)?;
    }
    Ok(hasher.finish())
}

/// Fills the block; is there more to come?
fn fill(file: &OwnedFd, block: &mut Vec<u8>) -> Result<bool, Errno> {
    while block.len() < block.capacity() {
        match rustix::io::read(file, spare_capacity(block)) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;
    use std::os::unix::fs::PermissionsExt as _;

    fn scanned(words: &str) -> Result<LowArgs, String> {
        let mut low = LowArgs::default();
        scan(words.split(' ').filter(|w| !w.is_empty()).map(OsString::from), &mut low)
            .map_err(|error| error.to_string())?;
        Ok(low)
    }

    #[test]
    fn words() {
        let low = scanned("--type md5 --flat a --type sha256 --base32 --truncate -v b --").unwrap();
        assert_eq!(low.hash, HashOptions { flat: true, algorithm: Algorithm::Sha256 });
        assert_eq!(low.print, PrintOptions { encoding: Encoding::Base32, truncate: true });
        assert_eq!(low.arguments, ["a", "b"]);
        assert_eq!(scanned("--to-base16 --to-sri x").unwrap().to, Some(Encoding::Sri));
        assert_eq!(scanned("-v12").unwrap().arguments, ["12"]);
        // What 2.8.0 says.
        for (words, text) in [
            ("--type", "'--type' requires an argument"),
            ("--type zork", "unknown hash algorithm 'zork'"),
            ("--type SHA1", "unknown hash algorithm 'SHA1'"),
            ("--type=sha1 f", "unrecognised flag '--type=sha1'"),
            ("f --zork", "unrecognised flag '--zork'"),
            ("-", "unrecognised flag '-'"),
            ("-qf f", "unrecognised flag '-q'"),
            ("-12", "unrecognised flag '-12'"),
            ("-v-12", "unrecognised flag '-12'"),
            ("--flat -- --x", "unexpected argument '--x'"),
        ] {
            assert_eq!(scanned(words).unwrap_err(), text, "{words}");
        }
    }

    #[derive(Deserialize)]
    struct File {
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        id: String,
        algo: String,
        executable: bool,
        content_hex: Option<String>,
        content_repeat: Option<Repeat>,
        flat_hex: String,
        flat_nix32: String,
        nar_hex: String,
        nar_nix32: String,
        flat_truncated_hex: String,
        flat_truncated_nix32: String,
        nar_truncated_nix32: String,
    }

    #[derive(Deserialize)]
    struct Repeat {
        byte_hex: String,
        count: usize,
    }

    #[test]
    fn vectors() {
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/nix_hash.json"));
        let file: File = serde_json::from_str(text).unwrap();
        println!("nix_hash: {} cases", file.cases.len());
        let dir = tempfile::tempdir().unwrap();
        for case in &file.cases {
            let path = dir.path().join(&case.id);
            let contents = match (&case.content_hex, &case.content_repeat) {
                (Some(hex), None) => data_encoding::HEXLOWER.decode(hex.as_bytes()).unwrap(),
                (None, Some(repeat)) => {
                    data_encoding::HEXLOWER.decode(repeat.byte_hex.as_bytes()).unwrap().repeat(repeat.count)
                }
                _ => panic!("{}: contents in one of two ways", case.id),
            };
            std::fs::write(&path, contents).unwrap();
            let mode = if case.executable { 0o755 } else { 0o644 };
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let algorithm = case.algo.parse().unwrap();
            let hash = |flat| {
                let options = HashOptions { flat, algorithm };
                hash_path(path.as_os_str(), options, &Interrupt::default()).unwrap()
            };
            let (flat, nar) = (hash(true), hash(false));
            for (hash, truncate, encoding, wanted) in [
                (flat, false, Encoding::Base16, &case.flat_hex),
                (flat, false, Encoding::Base32, &case.flat_nix32),
                (nar, false, Encoding::Base16, &case.nar_hex),
                (nar, false, Encoding::Base32, &case.nar_nix32),
                (flat, true, Encoding::Base16, &case.flat_truncated_hex),
                (flat, true, Encoding::Base32, &case.flat_truncated_nix32),
                (nar, true, Encoding::Base32, &case.nar_truncated_nix32),
            ] {
                let found = encode(hash, PrintOptions { encoding, truncate });
                assert_eq!(&found, wanted, "{} {encoding:?} truncate {truncate}", case.id);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// On one thread or on two, the hash of a file is that of the whole.
        #[test]
        fn sizes_do_not_matter(size in prop_oneof![0usize..1000, 500_000usize..800_000], algorithm in 0usize..4) {
            let contents: Vec<u8> = (0..=255).cycle().take(size).collect();
            let algorithm = Algorithm::ALL[algorithm];
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), &contents).unwrap();
            let options = HashOptions { flat: true, algorithm };
            let hash = hash_path(file.path().as_os_str(), options, &Interrupt::default()).unwrap();
            prop_assert_eq!(hash, Hash::of(algorithm, &contents));
        }
    }

    #[test]
    fn an_interrupt_ends_hashing() {
        let interrupt = Interrupt::default();
        interrupt.raise();
        let options = HashOptions { flat: true, algorithm: Algorithm::Md5 };
        let error = hash_path(OsStr::new("/dev/zero"), options, &interrupt).unwrap_err();
        assert!(matches!(error, HashPathError::Interrupted(_)));
    }
}
