//! The words of `nix-store`: [`LowArgs`] (what was typed), then [`Command`] (what is meant).
//!
//! Flags may stand before or after the operation and its arguments, so they are kept as they come
//! and judged once the operation is known. The errors, and which of two errors is told, are those
//! of Nix 2.8.0; `--stdin`, `--valid-derivers` and the failure cache come from other versions.
//! Source: cli, sections 1 and 5.

use std::ffi::{OsStr, OsString};

use larder_core::content_address::Method;
use larder_core::hash::Algorithm;

use super::{Common, Grammar, ScanError, UsageError, Words, parse_integer, scan, shown};

/// What `nix-store` can be asked for, without its flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    Version,
    Realise,
    Query,
    Add,
    AddFixed,
    PrintFixedPath,
    Delete,
    Gc,
    Dump,
    Restore,
    Export,
    Import,
    Verify,
    VerifyPath,
    RepairPath,
    Optimise,
    DumpDb,
    LoadDb,
    RegisterValidity,
    Init,
    CheckValidity,
    PrintEnv,
    ReadLog,
    Serve,
    GenerateBinaryCacheKey,
    QueryFailedPaths,
    ClearFailedPaths,
}

/// Every word that names an operation.
pub const OPERATIONS: &[(&str, Operation)] = &[
    ("--version", Operation::Version),
    ("--realise", Operation::Realise),
    ("--realize", Operation::Realise),
    ("-r", Operation::Realise),
    ("--query", Operation::Query),
    ("-q", Operation::Query),
    ("--add", Operation::Add),
    ("-A", Operation::Add),
    ("--add-fixed", Operation::AddFixed),
    ("--print-fixed-path", Operation::PrintFixedPath),
    ("--delete", Operation::Delete),
    ("--gc", Operation::Gc),
    ("--dump", Operation::Dump),
    ("--restore", Operation::Restore),
    ("--export", Operation::Export),
    ("--import", Operation::Import),
    ("--verify", Operation::Verify),
    ("--verify-path", Operation::VerifyPath),
    ("--repair-path", Operation::RepairPath),
    ("--optimise", Operation::Optimise),
    ("--optimize", Operation::Optimise),
    ("--dump-db", Operation::DumpDb),
    ("--load-db", Operation::LoadDb),
    ("--register-validity", Operation::RegisterValidity),
    ("--init", Operation::Init),
    ("--check-validity", Operation::CheckValidity),
    ("--print-env", Operation::PrintEnv),
    ("--read-log", Operation::ReadLog),
    ("-l", Operation::ReadLog),
    ("--serve", Operation::Serve),
    ("--generate-binary-cache-key", Operation::GenerateBinaryCacheKey),
    ("--query-failed-paths", Operation::QueryFailedPaths),
    ("--clear-failed-paths", Operation::ClearFailedPaths),
];

/// The words of one call, sorted but not yet judged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LowArgs {
    pub operation: Option<Operation>,
    /// Flags for the operation, values of `--max-freed` and the like among them.
    pub flags: Vec<OsString>,
    pub arguments: Vec<OsString>,
    pub roots: RootOptions,
    /// `--no-output`: print no paths after realising.
    pub no_output: bool,
    /// `--stdin`: more arguments are to be read from there, white-space separated.
    pub stdin: bool,
}

/// Where a collector root for a result goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RootOptions {
    /// `--add-root PATH`, as given: relative to the working directory.
    pub add_root: Option<OsString>,
    /// `--indirect`; 2.x makes no difference.
    pub indirect: bool,
}

/// What is meant, with everything an operation needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Version,
    Realise(Realise),
    Query(Query),
    Add { files: Vec<OsString> },
    AddFixed { method: Method, algorithm: Algorithm, files: Vec<OsString> },
    PrintFixedPath { method: Method, algorithm: Algorithm, hash: OsString, name: OsString },
    Delete { ignore_liveness: bool, paths: Vec<OsString> },
    Gc { action: GcAction, max_freed_bytes: Option<u64> },
    Dump { path: OsString },
    Restore { path: OsString },
    Export { paths: Vec<OsString> },
    Import,
    Verify { check_contents: bool, repair: bool },
    VerifyPath { paths: Vec<OsString> },
    RepairPath { paths: Vec<OsString> },
    Optimise,
    DumpDb { paths: Vec<OsString> },
    LoadDb,
    RegisterValidity { reregister: bool, hash_given: bool },
    Init,
    CheckValidity { print_invalid: bool, paths: Vec<OsString> },
    PrintEnv { derivation: OsString },
    ReadLog { paths: Vec<OsString> },
    Serve { write: bool },
    GenerateBinaryCacheKey { name: OsString, secret: OsString, public: OsString },
    QueryFailedPaths,
    ClearFailedPaths { paths: Vec<OsString> },
}

/// `--realise`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Realise {
    /// Paths, derivations, or `DERIVATION!OUTPUT,OUTPUT`.
    pub targets: Vec<OsString>,
    pub dry_run: bool,
    pub mode: BuildMode,
    pub ignore_unknown: bool,
    pub no_output: bool,
    pub roots: RootOptions,
}

/// What is done about outputs that are valid already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BuildMode {
    #[default]
    Normal,
    /// Make corrupt or missing ones anew.
    Repair,
    /// Build again and compare.
    Check,
}

/// `--query`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    pub kind: QueryKind,
    /// Look at the outputs of derivations instead of at them.
    pub use_output: bool,
    pub force_realise: bool,
    pub include_outputs: bool,
    pub paths: Vec<OsString>,
    pub roots: RootOptions,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueryKind {
    Outputs,
    Requisites,
    References,
    Referrers,
    ReferrersClosure,
    Deriver,
    ValidDerivers,
    /// The value of this variable of the derivation.
    Binding(OsString),
    Hash,
    Size,
    Tree,
    Graph,
    Graphml,
    Resolve,
    Roots,
}

/// What a collection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GcAction {
    #[default]
    Delete,
    PrintRoots,
    PrintLive,
    PrintDead,
}

impl Grammar for LowArgs {
    fn word(&mut self, word: OsString, words: &mut Words) -> Result<(), UsageError> {
        if let Some((_, operation)) = OPERATIONS.iter().find(|(name, _)| word == *name) {
            if self.operation.is_some_and(|earlier| earlier != *operation) {
                return Err(UsageError::TwoOperations);
            }
            self.operation = Some(*operation);
            return Ok(());
        }
        match word.to_str() {
            Some("--add-root") => self.roots.add_root = Some(words.argument("--add-root")?),
            Some("--indirect") => self.roots.indirect = true,
            Some("--no-output") => self.no_output = true,
            Some("--stdin") => self.stdin = true,
            Some(flag @ ("--max-freed" | "--max-links" | "--max-atime")) => {
                let value = words.argument(flag)?;
                self.flags.extend([word, value]);
            }
            _ if word.as_encoded_bytes().first() == Some(&b'-') => self.flags.push(word),
            _ => self.arguments.push(word),
        }
        Ok(())
    }
}

/// The flags of one operation, judged one by one.
struct Flags<'a>(std::slice::Iter<'a, OsString>);

impl<'a> Flags<'a> {
    /// Calls `take` with each flag, and the iterator for its value, until one is not known.
    fn each(
        mut self,
        unknown: fn(&OsStr) -> UsageError,
        mut take: impl FnMut(&str, &mut std::slice::Iter<'a, OsString>) -> Result<bool, UsageError>,
    ) -> Result<(), UsageError> {
        while let Some(flag) = self.0.next() {
            let taken = match flag.to_str() {
                Some(text) => take(text, &mut self.0)?,
                None => false,
            };
            if !taken {
                return Err(unknown(flag));
            }
        }
        Ok(())
    }
}

fn unknown(_: &OsStr) -> UsageError {
    UsageError::UnknownFlag
}

fn unknown_named(flag: &OsStr) -> UsageError {
    UsageError::UnknownFlagNamed { flag: shown(flag) }
}

fn none_expected(_: &OsStr) -> UsageError {
    UsageError::NoFlags
}

fn no_arguments(_: &OsStr) -> UsageError {
    UsageError::NoArguments
}

fn bad_sub_operation(flag: &OsStr) -> UsageError {
    UsageError::BadSubOperation { flag: shown(flag) }
}

impl LowArgs {
    /// Sorts the words of one call.
    pub fn scan(words: impl IntoIterator<Item = OsString>) -> Result<(Common, Self), ScanError> {
        let mut low = Self::default();
        let common = scan(words, &mut low)?;
        Ok((common, low))
    }

    /// May this come to a build, here or for a client? (When in doubt, it may.)
    pub fn may_build(&self) -> bool {
        let forcing = |flag: &OsString| matches!(flag.to_str(), Some("--force-realise" | "--force-realize" | "-f"));
        match self.operation {
            Some(Operation::Query) => self.flags.iter().any(forcing),
            Some(
                Operation::Version
                | Operation::PrintFixedPath
                | Operation::Dump
                | Operation::Restore
                | Operation::DumpDb
                | Operation::LoadDb
                | Operation::CheckValidity,
            ) => false,
            _ => true,
        }
    }

    /// Should arguments be read from standard input? Not where that is the data.
    pub fn wants_stdin(&self) -> bool {
        self.stdin && !matches!(self.operation, Some(Operation::Import | Operation::Restore | Operation::Serve))
    }

    /// No flags but those that set one of the given switches.
    fn switches<const N: usize>(
        &self,
        names: [&str; N],
        unknown: fn(&OsStr) -> UsageError,
    ) -> Result<[bool; N], UsageError> {
        let mut on = [false; N];
        Flags(self.flags.iter()).each(unknown, |flag, _| {
            let switch = names.iter().zip(&mut on).find(|(name, _)| **name == flag);
            Ok(switch.map(|(_, on)| *on = true).is_some())
        })?;
        Ok(on)
    }

    fn no_flags(&self, unknown: fn(&OsStr) -> UsageError) -> Result<(), UsageError> {
        self.switches([], unknown).map(|[]| ())
    }

    fn no_arguments(&self) -> Result<(), UsageError> {
        if self.arguments.is_empty() { Ok(()) } else { Err(UsageError::NoArguments) }
    }

    /// Exactly `N` arguments, or this error.
    fn exactly<const N: usize>(self, error: UsageError) -> Result<[OsString; N], UsageError> {
        self.arguments.try_into().map_err(|_| error)
    }

    /// What is meant.
    #[expect(clippy::too_many_lines, reason = "one short arm for each operation")]
    pub fn command(self) -> Result<Command, UsageError> {
        let command = match self.operation.ok_or(UsageError::NoOperation)? {
            Operation::Version => Command::Version,
            Operation::Realise => Command::Realise(self.realise()?),
            Operation::Query => Command::Query(self.query()?),
            Operation::Add => {
                self.no_flags(unknown)?;
                Command::Add { files: self.arguments }
            }
            Operation::AddFixed => {
                let method = self.method()?;
                let mut files = self.arguments;
                if files.is_empty() {
                    return Err(UsageError::NoAlgorithm);
                }
                let algorithm = algorithm(&files.remove(0))?;
                Command::AddFixed { method, algorithm, files }
            }
            Operation::PrintFixedPath => {
                let method = self.method()?;
                let [name_of_algorithm, hash, name] = self.exactly(UsageError::PrintFixedPath)?;
                Command::PrintFixedPath { method, algorithm: algorithm(&name_of_algorithm)?, hash, name }
            }
            Operation::Delete => {
                let [ignore_liveness] = self.switches(["--ignore-liveness"], unknown_named)?;
                Command::Delete { ignore_liveness, paths: self.arguments }
            }
            Operation::Gc => self.gc()?,
            Operation::Dump => {
                self.no_flags(unknown)?;
                let [path] = self.exactly(UsageError::OneArgument)?;
                Command::Dump { path }
            }
            Operation::Restore => {
                self.no_flags(unknown)?;
                let [path] = self.exactly(UsageError::OneArgument)?;
                Command::Restore { path }
            }
            Operation::Export => {
                self.no_flags(unknown_named)?;
                Command::Export { paths: self.arguments }
            }
            Operation::Import => {
                self.no_flags(unknown_named)?;
                self.no_arguments()?;
                Command::Import
            }
            Operation::Verify => {
                self.no_arguments()?;
                let [check_contents, repair] = self.switches(["--check-contents", "--repair"], unknown_named)?;
                Command::Verify { check_contents, repair }
            }
            Operation::VerifyPath => {
                self.no_flags(none_expected)?;
                Command::VerifyPath { paths: self.arguments }
            }
            Operation::RepairPath => {
                self.no_flags(none_expected)?;
                Command::RepairPath { paths: self.arguments }
            }
            Operation::Optimise => {
                self.no_arguments()?;
                self.no_flags(no_arguments)?;
                Command::Optimise
            }
            Operation::DumpDb => {
                self.no_flags(unknown)?;
                Command::DumpDb { paths: self.arguments }
            }
            Operation::LoadDb => {
                self.no_flags(unknown)?;
                self.no_arguments()?;
                Command::LoadDb
            }
            Operation::RegisterValidity => {
                let [reregister, hash_given] = self.switches(["--reregister", "--hash-given"], unknown_named)?;
                self.no_arguments()?;
                Command::RegisterValidity { reregister, hash_given }
            }
            Operation::Init => {
                self.no_flags(unknown)?;
                self.no_arguments()?;
                Command::Init
            }
            Operation::CheckValidity => {
                let [print_invalid] = self.switches(["--print-invalid"], unknown_named)?;
                Command::CheckValidity { print_invalid, paths: self.arguments }
            }
            Operation::PrintEnv => {
                self.no_flags(unknown)?;
                let [derivation] = self.exactly(UsageError::PrintEnv)?;
                Command::PrintEnv { derivation }
            }
            Operation::ReadLog => {
                self.no_flags(unknown)?;
                Command::ReadLog { paths: self.arguments }
            }
            Operation::Serve => {
                let [write] = self.switches(["--write"], unknown_named)?;
                self.no_arguments()?;
                Command::Serve { write }
            }
            Operation::GenerateBinaryCacheKey => {
                self.no_flags(unknown_named)?;
                let [name, secret, public] = self.exactly(UsageError::ThreeArguments)?;
                Command::GenerateBinaryCacheKey { name, secret, public }
            }
            Operation::QueryFailedPaths => {
                self.no_flags(unknown)?;
                self.no_arguments()?;
                Command::QueryFailedPaths
            }
            Operation::ClearFailedPaths => {
                self.no_flags(unknown)?;
                Command::ClearFailedPaths { paths: self.arguments }
            }
        };
        Ok(command)
    }

    fn method(&self) -> Result<Method, UsageError> {
        let [recursive] = self.switches(["--recursive"], unknown_named)?;
        Ok(if recursive { Method::Recursive } else { Method::Flat })
    }

    fn realise(self) -> Result<Realise, UsageError> {
        let mut realise = Realise { no_output: self.no_output, roots: self.roots, ..Realise::default() };
        Flags(self.flags.iter()).each(unknown_named, |flag, _| {
            match flag {
                "--dry-run" => realise.dry_run = true,
                "--repair" => realise.mode = BuildMode::Repair,
                "--check" => realise.mode = BuildMode::Check,
                "--ignore-unknown" => realise.ignore_unknown = true,
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        realise.targets = self.arguments;
        Ok(realise)
    }

    fn query(self) -> Result<Query, UsageError> {
        use QueryKind as Kind;
        let mut arguments = self.arguments.into_iter();
        let (mut use_output, mut force_realise, mut include_outputs) = (false, false, false);
        let mut kind: Option<Kind> = None;
        Flags(self.flags.iter()).each(unknown_named, |flag, _| {
            let wanted = match flag {
                "--use-output" | "-u" => {
                    use_output = true;
                    return Ok(true);
                }
                "--force-realise" | "--force-realize" | "-f" => {
                    force_realise = true;
                    return Ok(true);
                }
                "--include-outputs" => {
                    include_outputs = true;
                    return Ok(true);
                }
                "--outputs" => Kind::Outputs,
                "--requisites" | "-R" => Kind::Requisites,
                "--references" => Kind::References,
                "--referrers" | "--referers" => Kind::Referrers,
                "--referrers-closure" | "--referers-closure" => Kind::ReferrersClosure,
                "--deriver" | "-d" => Kind::Deriver,
                "--valid-derivers" => Kind::ValidDerivers,
                "--binding" | "-b" => Kind::Binding(arguments.next().ok_or(UsageError::NoBindingName)?),
                "--hash" => Kind::Hash,
                "--size" => Kind::Size,
                "--tree" => Kind::Tree,
                "--graph" => Kind::Graph,
                "--graphml" => Kind::Graphml,
                "--resolve" => Kind::Resolve,
                "--roots" => Kind::Roots,
                _ => return Ok(false),
            };
            let same = |earlier: &Kind| std::mem::discriminant(earlier) == std::mem::discriminant(&wanted);
            if kind.as_ref().is_some_and(|earlier| !same(earlier)) {
                return Err(UsageError::QueryConflict { flag: flag.to_owned() });
            }
            kind = Some(wanted);
            Ok(true)
        })?;
        Ok(Query {
            kind: kind.unwrap_or(Kind::Outputs),
            use_output,
            force_realise,
            include_outputs,
            paths: arguments.collect(),
            roots: self.roots,
        })
    }

    fn gc(self) -> Result<Command, UsageError> {
        let mut action = GcAction::Delete;
        let mut max_freed_bytes = None;
        Flags(self.flags.iter()).each(bad_sub_operation, |flag, rest| {
            match flag {
                "--print-roots" => action = GcAction::PrintRoots,
                "--print-live" => action = GcAction::PrintLive,
                "--print-dead" => action = GcAction::PrintDead,
                "--max-freed" => {
                    let value = rest.next().map(|value| value.to_string_lossy()).unwrap_or_default();
                    // A negative limit is none at all to Nix: nothing is deleted.
                    max_freed_bytes = Some(u64::try_from(parse_integer(&value)?).unwrap_or(0));
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        self.no_arguments()?;
        Ok(Command::Gc { action, max_freed_bytes })
    }
}

fn algorithm(word: &OsStr) -> Result<Algorithm, UsageError> {
    Ok(shown(word).parse::<Algorithm>()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn meant(words: &str) -> Result<Command, ScanError> {
        let words = words.split(' ').filter(|word| !word.is_empty()).map(OsString::from);
        let (_, low) = LowArgs::scan(words)?;
        Ok(low.command()?)
    }

    fn query(words: &str) -> Query {
        match meant(words) {
            Ok(Command::Query(query)) => query,
            other => panic!("{words}: {other:?}"),
        }
    }

    /// Words and what Nix 2.8.0 says to them (captured), apart from the rows marked otherwise.
    const ERRORS: &[(&str, &str)] = &[
        ("", "no operation specified"),
        ("--zork", "no operation specified"),
        ("foo --bar", "no operation specified"),
        ("-", "no operation specified"),
        ("--", "no operation specified"),
        ("-h", "no operation specified"),
        ("--upgrade", "no operation specified"),
        ("--gc --delete", "only one operation may be specified"),
        ("-r -q", "only one operation may be specified"),
        ("--version foo --gc", "only one operation may be specified"),
        ("--gc --delete --help", "only one operation may be specified"),
        ("--zork --gc", "bad sub-operation '--zork' in GC"),
        ("--gc foo --zork", "bad sub-operation '--zork' in GC"),
        ("--gc --max-links 3", "bad sub-operation '--max-links' in GC"),
        ("--gc foo", "no arguments expected"),
        ("--gc --max-freed 1X", "invalid unit specifier 'X'"),
        ("--gc --max-freed -ab", "invalid unit specifier 'B'"),
        ("--gc --max-freed K", "'' is not an integer"),
        ("--gc --max-freed --", "'--' is not an integer"),
        ("--gc --max-freed 9223372036854775808", "'9223372036854775808' is not an integer"),
        ("--max-freed", "'--max-freed' requires an argument"),
        ("--add-root", "'--add-root' requires an argument"),
        ("-r --add-root", "'--add-root' requires an argument"),
        ("--add-root --init", "no operation specified"),
        ("-q --zork /x", "unknown flag '--zork'"),
        ("-q -z", "unknown flag '-z'"),
        ("-q --size --hash /x", "query type '--hash' conflicts with earlier flag"),
        ("-q --outputs --hash", "query type '--hash' conflicts with earlier flag"),
        ("-q --binding", "expected binding name"),
        ("-q -b", "expected binding name"),
        ("-q -b --zork", "expected binding name"),
        ("-q --hash --binding", "expected binding name"),
        ("--init foo", "no arguments expected"),
        ("--init -", "unknown flag"),
        ("--init --zork foo", "unknown flag"),
        ("--init -- --zork", "unknown flag"),
        ("--init -- -v", "unknown flag"),
        ("--init -- foo", "no arguments expected"),
        ("--init --max-freed 3", "unknown flag"),
        ("--init --max-links x", "unknown flag"),
        ("--init --dry-run", "unknown flag"),
        ("--keep-outputs true --init", "no arguments expected"),
        ("--dump", "only one argument allowed"),
        ("--dump a b", "only one argument allowed"),
        ("--dump --zork a", "unknown flag"),
        ("--dump -- --foo", "unknown flag"),
        ("--restore", "only one argument allowed"),
        ("--restore --zork x", "unknown flag"),
        ("--print-fixed-path", "'--print-fixed-path' requires three arguments"),
        ("--print-fixed-path a b c", "unknown hash algorithm 'a'"),
        ("--print-fixed-path r:sha256 b c", "unknown hash algorithm 'r:sha256'"),
        ("--print-fixed-path --zork", "unknown flag '--zork'"),
        ("--generate-binary-cache-key", "three arguments expected"),
        ("--generate-binary-cache-key --zork a b c", "unknown flag '--zork'"),
        ("--add --recursive x", "unknown flag"),
        ("--add-fixed", "first argument must be hash algorithm"),
        ("--add-fixed zork x", "unknown hash algorithm 'zork'"),
        ("--add-fixed --zork", "unknown flag '--zork'"),
        ("--read-log --zork foo", "unknown flag"),
        ("--print-env", "'--print-env' requires one derivation store path"),
        ("--print-env a b", "'--print-env' requires one derivation store path"),
        ("--print-env --zork x", "unknown flag"),
        ("--verify x --zork", "no arguments expected"),
        ("--verify --zork", "unknown flag '--zork'"),
        ("--verify-path --zork foo", "no flags expected"),
        ("--repair-path --zork foo", "no flags expected"),
        ("--optimise x", "no arguments expected"),
        ("--optimise --zork", "no arguments expected"),
        ("--optimise --max-freed 3", "no arguments expected"),
        ("--delete foo --zork", "unknown flag '--zork'"),
        ("--delete --max-freed 3", "unknown flag '--max-freed'"),
        ("--dump-db --zork foo", "unknown flag"),
        ("--load-db foo", "no arguments expected"),
        ("--load-db --zork foo", "unknown flag"),
        ("--register-validity foo", "no arguments expected"),
        ("--register-validity --zork foo", "unknown flag '--zork'"),
        ("--check-validity --zork", "unknown flag '--zork'"),
        ("--serve --write foo", "no arguments expected"),
        ("--serve --zork foo", "unknown flag '--zork'"),
        ("--export --sign x", "unknown flag '--sign'"),
        ("--import foo", "no arguments expected"),
        ("--import --zork foo", "unknown flag '--zork'"),
        ("-r --zork", "unknown flag '--zork'"),
        // Larder's own: an operation of 1.x.
        ("--query-failed-paths x", "no arguments expected"),
    ];

    #[test]
    fn errors() {
        for (words, text) in ERRORS {
            let error = meant(words).expect_err(words);
            assert_eq!(error.to_string(), *text, "nix-store {words}");
            assert!(matches!(error, ScanError::Usage(_)));
        }
    }

    #[test]
    fn every_operation_is_meant() {
        let paths = || vec![OsString::from("a"), OsString::from("b")];
        let roots = RootOptions::default();
        for (words, command) in [
            ("--version --zork foo", Command::Version),
            ("--add a b", Command::Add { files: paths() }),
            (
                "--add-fixed sha1 a b --recursive",
                Command::AddFixed { method: Method::Recursive, algorithm: Algorithm::Sha1, files: paths() },
            ),
            (
                "--print-fixed-path sha256 a b",
                Command::PrintFixedPath {
                    method: Method::Flat,
                    algorithm: Algorithm::Sha256,
                    hash: "a".into(),
                    name: "b".into(),
                },
            ),
            ("a --delete --ignore-liveness b", Command::Delete { ignore_liveness: true, paths: paths() }),
            (
                "--gc --max-freed 1T --print-dead --max-freed 3",
                Command::Gc { action: GcAction::PrintDead, max_freed_bytes: Some(3) },
            ),
            ("--max-freed -5 --gc", Command::Gc { action: GcAction::Delete, max_freed_bytes: Some(0) }),
            ("--gc --print-roots", Command::Gc { action: GcAction::PrintRoots, max_freed_bytes: None }),
            ("--dump a", Command::Dump { path: "a".into() }),
            ("--restore a", Command::Restore { path: "a".into() }),
            ("--export a b", Command::Export { paths: paths() }),
            ("--import", Command::Import),
            ("--verify --repair", Command::Verify { check_contents: false, repair: true }),
            ("--verify --check-contents", Command::Verify { check_contents: true, repair: false }),
            ("--verify-path a b", Command::VerifyPath { paths: paths() }),
            ("--repair-path a b", Command::RepairPath { paths: paths() }),
            ("--optimize", Command::Optimise),
            ("--dump-db a b", Command::DumpDb { paths: paths() }),
            ("--load-db", Command::LoadDb),
            ("--register-validity --hash-given", Command::RegisterValidity { reregister: false, hash_given: true }),
            ("--init --indirect --no-output --add-root -ab -v --", Command::Init),
            ("-- --init", Command::Init),
            ("--init --init", Command::Init),
            ("--optimise --optimize", Command::Optimise),
            ("--check-validity --print-invalid a b", Command::CheckValidity { print_invalid: true, paths: paths() }),
            ("--print-env a", Command::PrintEnv { derivation: "a".into() }),
            ("-l a b", Command::ReadLog { paths: paths() }),
            ("--serve --write", Command::Serve { write: true }),
            (
                "--generate-binary-cache-key k a b",
                Command::GenerateBinaryCacheKey { name: "k".into(), secret: "a".into(), public: "b".into() },
            ),
            ("--query-failed-paths", Command::QueryFailedPaths),
            ("--clear-failed-paths *", Command::ClearFailedPaths { paths: vec!["*".into()] }),
            (
                "-rj4 a b --repair --check --dry-run --ignore-unknown --no-output",
                Command::Realise(Realise {
                    targets: paths(),
                    dry_run: true,
                    mode: BuildMode::Check,
                    ignore_unknown: true,
                    no_output: true,
                    roots,
                }),
            ),
        ] {
            assert_eq!(meant(words), Ok(command), "nix-store {words}");
        }
    }

    #[test]
    fn queries() {
        assert_eq!(query("-q").kind, QueryKind::Outputs);
        assert_eq!(query("-qR").kind, QueryKind::Requisites);
        assert_eq!(query("-Rq").kind, QueryKind::Requisites);
        assert_eq!(query("-q -- --size").kind, QueryKind::Size);
        assert_eq!(query("-q --referers --referrers").kind, QueryKind::Referrers);
        assert_eq!(query("-q --valid-derivers").kind, QueryKind::ValidDerivers);
        let bound = query("-q p -b -u -f");
        assert_eq!(bound.kind, QueryKind::Binding("p".into()));
        assert_eq!((bound.use_output, bound.force_realise, bound.paths.len()), (true, true, 0));
        let closure = query("a --query --requisites b --include-outputs --add-root r");
        assert!(closure.include_outputs);
        assert_eq!(closure.paths, ["a", "b"]);
        assert_eq!(closure.roots.add_root, Some("r".into()));
    }

    #[test]
    fn what_may_build() {
        for (words, builds) in [
            ("-q --hash p", false),
            ("--query --tree p", false),
            ("-q -f --outputs p", true),
            ("-q p --force-realize", true),
            ("--version", false),
            ("--dump p", false),
            ("-r p", true),
            ("--serve", true),
            ("--verify --repair", true),
            ("p", true),
        ] {
            let (_, low) = LowArgs::scan(words.split(' ').map(OsString::from)).unwrap();
            assert_eq!(low.may_build(), builds, "{words}");
        }
    }

    #[test]
    fn stdin_is_not_for_data() {
        let wants = |words: &str| {
            let (_, low) = LowArgs::scan(words.split(' ').map(OsString::from)).unwrap();
            low.wants_stdin()
        };
        assert!(wants("-q --stdin"));
        assert!(!wants("--import --stdin"));
        assert!(!wants("-q"));
    }

    fn word() -> impl Strategy<Value = OsString> {
        let operations = proptest::sample::select(OPERATIONS).prop_map(|(name, _)| OsString::from(name));
        let flags = proptest::sample::select(
            &[
                "--zork",
                "-qR",
                "-j4",
                "-j",
                "--max-freed",
                "1K",
                "--option",
                "--size",
                "--tree",
                "-b",
                "--",
                "-",
                "--stdin",
                "--add-root",
                "--keep-outputs",
                "--no-keep-outputs",
                "--repair",
                "--print-dead",
                "-é",
                "",
            ][..],
        );
        prop_oneof![
            1 => operations,
            3 => flags.prop_map(OsString::from),
            1 => "[ -~]{0,6}".prop_map(OsString::from),
            1 => proptest::collection::vec(1u8.., 0..5).prop_map(std::os::unix::ffi::OsStringExt::from_vec),
        ]
    }

    proptest! {
        /// Whatever the words, there is a command or an error; and two operations are never taken.
        #[test]
        fn any_words_have_an_answer(words in proptest::collection::vec(word(), 0..8)) {
            if let Ok((_, low)) = LowArgs::scan(words) {
                let operation = low.operation;
                let result = low.command();
                prop_assert!(operation.is_some() || result == Err(UsageError::NoOperation));
            }
        }

        /// Flags may stand anywhere among the arguments.
        #[test]
        fn the_place_of_a_flag_does_not_matter(at in 0usize..5) {
            let mut words = vec!["a", "-q", "b", "--include-outputs"];
            words.insert(at, "--requisites");
            prop_assert_eq!(query(&words.join(" ")), query("-q -R --include-outputs a b"));
        }
    }
}
