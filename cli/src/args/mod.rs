//! From words to meaning: the flags that every applet shares, and the scanner that takes them out.
//!
//! Words are taken from left to right. Each applet has a [`Grammar`] for what is its own; the
//! flags of [`Common`] come first. Scanning is pure: no file and no environment is looked at.
//! Source: cli, sections 1 and 3, and the answers of Nix 2.8.0 to odd words.

pub mod nix_store;

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use larder_core::hash::HashError;
use larder_core::report::Level;
use larder_core::settings::{Entry, Group, Kind, find};

/// A command that means nothing; printed with a hint at `--help`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    #[error("only one operation may be specified")]
    TwoOperations,
    #[error("no operation specified")]
    NoOperation,
    #[error("unknown flag")]
    UnknownFlag,
    #[error("unknown flag '{flag}'")]
    UnknownFlagNamed { flag: String },
    #[error("no flags expected")]
    NoFlags,
    #[error("unrecognised flag '{flag}'")]
    UnrecognisedFlag { flag: String },
    #[error("unexpected argument '{word}'")]
    UnexpectedArgument { word: String },
    #[error("invalid number of days specifier '{text}', expected something like '14d'")]
    Days { text: String },
    #[error("bad sub-operation '{flag}' in GC")]
    BadSubOperation { flag: String },
    #[error("flag '{flag}' requires {wanted} argument(s)")]
    FlagNeeds { flag: String, wanted: usize },
    #[error("'{flag}' requires an argument")]
    NeedsArgument { flag: String },
    #[error("no arguments expected")]
    NoArguments,
    #[error("only one argument allowed")]
    OneArgument,
    #[error("you must specify a URL")]
    NoUrl,
    #[error("too many arguments")]
    TooManyArguments,
    #[error("three arguments expected")]
    ThreeArguments,
    #[error("'--print-fixed-path' requires three arguments")]
    PrintFixedPath,
    #[error("'--print-env' requires one derivation store path")]
    PrintEnv,
    #[error("first argument must be hash algorithm")]
    NoAlgorithm,
    #[error("query type '{flag}' conflicts with earlier flag")]
    QueryConflict { flag: String },
    #[error("expected binding name")]
    NoBindingName,
    #[error(transparent)]
    Algorithm(#[from] HashError),
    #[error(transparent)]
    Number(#[from] NumberError),
    #[error("configuration setting 'max-jobs' should be 'auto' or an integer")]
    MaxJobs,
    #[error("setting '{name}' has invalid value '{value}'")]
    SettingValue { name: String, value: String },
    #[error("'{shown}' is not valid UTF-8, which the value of {flag} must be")]
    NotUtf8 { flag: String, shown: String },
}

/// What is wrong with a number given to a flag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NumberError {
    #[error("'{text}' is not an integer")]
    NotInteger { text: String },
    #[error("invalid unit specifier '{unit}'")]
    Unit { unit: char },
    #[error("'{text}' is too large")]
    TooLarge { text: String },
}

/// A word as it may be shown: not UTF-8 replaced, control characters escaped.
pub fn shown(word: &OsStr) -> String {
    let mut out = String::new();
    for c in word.to_string_lossy().chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Reads an integer with an optional unit `K`, `M`, `G` or `T` (powers of 1024, any case).
///
/// ```
/// assert_eq!(larder::args::parse_integer("2k"), Ok(2048));
/// ```
pub fn parse_integer(text: &str) -> Result<i64, NumberError> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(unit) if unit.is_ascii_alphabetic() => {
            let unit = char::from(unit.to_ascii_uppercase());
            let shift = match unit {
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(NumberError::Unit { unit }),
            };
            (&text[..text.len() - 1], shift)
        }
        _ => (text, 0),
    };
    let number: i64 = digits.parse().map_err(|_| NumberError::NotInteger { text: digits.to_owned() })?;
    number.checked_mul(1 << shift).ok_or_else(|| NumberError::TooLarge { text: text.to_owned() })
}

/// As [`parse_integer`], without negative numbers.
pub fn parse_unsigned(text: &str) -> Result<u64, NumberError> {
    let number = parse_integer(text)?;
    u64::try_from(number).map_err(|_| NumberError::NotInteger { text: text.to_owned() })
}

/// A setting given on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    pub name: String,
    pub value: String,
    pub from: OverrideFrom,
}

/// How a setting was given, which decides what a bad value does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverrideFrom {
    /// `--NAME`: a bad value is a [`UsageError`].
    Flag,
    /// `--option NAME VALUE`: a bad value, or an unknown name, is a warning.
    Option,
}

/// How messages are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    Raw,
    /// Raw, with the output of builders.
    #[default]
    RawWithLogs,
    InternalJson,
    Bar,
    BarWithLogs,
}

/// `--log-format` was given a word that is none. Not a usage error in Nix either.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("option 'log-format' has an invalid value '{value}'")]
pub struct LogFormatError {
    pub value: String,
}

impl std::str::FromStr for LogFormat {
    type Err = LogFormatError;
    fn from_str(text: &str) -> Result<Self, LogFormatError> {
        Ok(match text {
            "raw" => Self::Raw,
            "raw-with-logs" => Self::RawWithLogs,
            "internal-json" => Self::InternalJson,
            "bar" => Self::Bar,
            "bar-with-logs" => Self::BarWithLogs,
            _ => return Err(LogFormatError { value: text.to_owned() }),
        })
    }
}

/// Why scanning stopped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScanError {
    #[error(transparent)]
    Usage(#[from] UsageError),
    #[error(transparent)]
    LogFormat(#[from] LogFormatError),
}

impl From<NumberError> for ScanError {
    fn from(error: NumberError) -> Self {
        Self::Usage(UsageError::Number(error))
    }
}

/// What the flags that every applet shares say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag that was given or not")]
pub struct Common {
    /// `--help`: nothing after it was looked at.
    pub help: bool,
    /// Steps above (`-v`) or below (`--quiet`) the default verbosity; see [`Common::verbosity`].
    verbosity: Verbosity,
    pub log_format: LogFormat,
    /// `-Q`: no live output of builders.
    pub no_build_output: bool,
    /// `--no-gc-warning`
    pub no_gc_warning: bool,
    /// `--readonly-mode`
    pub read_only: bool,
    /// `--print-build-trace`
    pub build_trace: bool,
    /// Settings in the order given.
    pub overrides: Vec<Override>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Verbosity(Level);

impl Default for Verbosity {
    fn default() -> Self {
        Self(Level::Info)
    }
}

/// All levels, from quiet to loud.
const LEVELS: [Level; 8] = [
    Level::Error,
    Level::Warn,
    Level::Notice,
    Level::Info,
    Level::Talkative,
    Level::Chatty,
    Level::Debug,
    Level::Vomit,
];

impl Verbosity {
    fn step(&mut self, louder: bool) {
        let at = LEVELS.iter().position(|level| *level == self.0).unwrap_or_default();
        let to = if louder { at + 1 } else { at.saturating_sub(1) };
        self.0 = LEVELS.get(to).copied().unwrap_or(Level::Vomit);
    }
}

impl Common {
    /// What was said in another way than by these flags.
    pub fn of(verbosity: Level, overrides: Vec<Override>) -> Self {
        Self { verbosity: Verbosity(verbosity), overrides, ..Self::default() }
    }

    /// The last level that is shown.
    pub fn verbosity(&self) -> Level {
        self.verbosity.0
    }

    fn set(&mut self, name: &str, value: impl Into<String>) {
        self.overrides.push(Override { name: name.to_owned(), value: value.into(), from: OverrideFrom::Flag });
    }
}

/// The words that are left, in order.
#[derive(Debug)]
pub struct Words {
    left: VecDeque<OsString>,
    /// Has `--` gone by?
    plain: bool,
}

impl Words {
    pub fn new(words: impl IntoIterator<Item = OsString>) -> Self {
        Self { left: words.into_iter().collect(), plain: false }
    }

    /// The next word as it is: the value of a flag is never taken apart.
    pub fn value(&mut self) -> Option<OsString> {
        self.left.pop_front()
    }

    /// The value of a flag of the applet's own.
    pub fn argument(&mut self, flag: &str) -> Result<OsString, UsageError> {
        self.value().ok_or_else(|| UsageError::NeedsArgument { flag: flag.to_owned() })
    }

    /// Has `--` gone by, so that no shared flag is looked for?
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// The next word, with a bundle of short flags taken apart: `-qR` is `-q -R`, and `-j4` is `-j 4`.
    fn next(&mut self) -> Option<OsString> {
        let word = self.value()?;
        if self.plain {
            return Some(word);
        }
        if word == "--" {
            self.plain = true;
            return self.value();
        }
        let bytes = word.as_bytes();
        if let [b'-', first, rest @ ..] = bytes
            && first.is_ascii_alphabetic()
            && !rest.is_empty()
            && *first != b'I'
        {
            let letters = rest.iter().take_while(|b| b.is_ascii_alphabetic()).count();
            let (letters, value) = rest.split_at(letters);
            if !value.is_empty() {
                self.left.push_front(OsString::from_vec(value.to_vec()));
            }
            for letter in letters.iter().rev() {
                self.left.push_front(short_flag(*letter));
            }
            return Some(short_flag(*first));
        }
        Some(word)
    }
}

fn short_flag(letter: u8) -> OsString {
    OsString::from_vec(vec![b'-', letter])
}

/// What an applet makes of the words that are no shared flag.
pub trait Grammar {
    /// Takes a word, and its values from `words`.
    fn word(&mut self, word: OsString, words: &mut Words) -> Result<(), UsageError>;
}

/// Goes through all words.
///
/// Stops at `--help`, which wins over whatever comes after it but not over an error before it.
pub fn scan(words: impl IntoIterator<Item = OsString>, grammar: &mut dyn Grammar) -> Result<Common, ScanError> {
    let mut words = Words::new(words);
    let mut common = Common::default();
    while let Some(word) = words.next() {
        if !words.is_plain()
            && let Some(flag) = word.to_str().filter(|word| word.starts_with('-'))
        {
            if flag == "--help" {
                common.help = true;
                return Ok(common);
            }
            if common.take(flag, &mut words)? {
                continue;
            }
        }
        grammar.word(word, &mut words)?;
    }
    Ok(common)
}

/// The next `N` words as values of a shared flag.
fn values<const N: usize>(flag: &str, words: &mut Words) -> Result<[String; N], UsageError> {
    let missing = || UsageError::FlagNeeds { flag: flag.to_owned(), wanted: N };
    let mut found = [const { String::new() }; N];
    for slot in &mut found {
        let word = words.value().ok_or_else(missing)?;
        *slot =
            word.into_string().map_err(|word| UsageError::NotUtf8 { flag: flag.to_owned(), shown: shown(&word) })?;
    }
    Ok(found)
}

impl Common {
    /// Takes a flag if it is a shared one.
    fn take(&mut self, flag: &str, words: &mut Words) -> Result<bool, ScanError> {
        match flag {
            "-v" | "--verbose" => self.verbosity.step(true),
            "--quiet" => self.verbosity.step(false),
            "--debug" => self.verbosity = Verbosity(Level::Debug),
            "-Q" | "--no-build-output" => self.no_build_output = true,
            "--log-format" => {
                let [value] = values(flag, words)?;
                self.log_format = value.parse()?;
            }
            "-K" | "--keep-failed" => self.set("keep-failed", "true"),
            "-k" | "--keep-going" => self.set("keep-going", "true"),
            "--fallback" => self.set("fallback", "true"),
            "-j" | "--max-jobs" => {
                let [value] = values(flag, words)?;
                if value != "auto" && value.parse::<u32>().is_err() {
                    return Err(UsageError::MaxJobs.into());
                }
                self.set("max-jobs", value);
            }
            "--cores" | "--timeout" | "--max-silent-time" => {
                let name = flag.trim_start_matches('-');
                let [value] = values(flag, words)?;
                let number = parse_unsigned(&value)?;
                if name == "cores" && u32::try_from(number).is_err() {
                    return Err(UsageError::SettingValue { name: name.to_owned(), value }.into());
                }
                self.set(name, number.to_string());
            }
            "--option" => {
                let [name, value] = values(flag, words)?;
                self.overrides.push(Override { name, value, from: OverrideFrom::Option });
            }
            "--readonly-mode" => self.read_only = true,
            "--no-gc-warning" => self.no_gc_warning = true,
            "--print-build-trace" => self.build_trace = true,
            // Of 1.x: without machines no hook is asked. So much any client of a daemon may say.
            "--no-build-hook" => self.set("builders", ""),
            // Of the evaluator: nothing here depends on them.
            "--show-trace" | "--no-show-trace" => {}
            "-I" | "--log-type" => drop(values::<1>(flag, words)?),
            _ if flag.starts_with("-I") => {}
            _ => return Ok(self.take_setting(flag, words)?),
        }
        Ok(true)
    }

    /// `--NAME VALUE`, or `--NAME` and `--no-NAME` for a switch, for each setting.
    fn take_setting(&mut self, flag: &str, words: &mut Words) -> Result<bool, UsageError> {
        let Some(name) = flag.strip_prefix("--") else { return Ok(false) };
        if let Some(entry) = setting(name) {
            if is_switch(entry) {
                self.set(name, "true");
            } else {
                let [value] = values(flag, words)?;
                self.set(name, value);
            }
            return Ok(true);
        }
        let prefixed = |prefix: &str| name.strip_prefix(prefix).and_then(setting);
        if let Some(entry) = prefixed("no-").filter(|entry| is_switch(entry)) {
            self.set(entry.name, "false");
        } else if prefixed("extra-").is_some_and(|entry| entry.kind.appends()) {
            let [value] = values(flag, words)?;
            self.set(name, value);
        } else if let Some(entry) = prefixed("relaxed-").filter(|entry| entry.kind == Kind::Sandbox) {
            self.set(entry.name, "relaxed");
        } else {
            return Ok(false);
        }
        Ok(true)
    }
}

/// The setting of this name that can be a flag: aliases and the settings of 1.x cannot.
fn setting(name: &str) -> Option<&'static Entry> {
    find(name).filter(|entry| entry.name == name && entry.group != Group::Historic)
}

fn is_switch(entry: &Entry) -> bool {
    matches!(entry.kind, Kind::Bool | Kind::Sandbox)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Keeps words as they come.
    #[derive(Default)]
    struct Keep(Vec<OsString>);

    impl Grammar for Keep {
        fn word(&mut self, word: OsString, _words: &mut Words) -> Result<(), UsageError> {
            self.0.push(word);
            Ok(())
        }
    }

    fn scanned(words: &str) -> Result<(Common, Vec<OsString>), ScanError> {
        let mut keep = Keep::default();
        let common = scan(words.split(' ').filter(|w| !w.is_empty()).map(OsString::from), &mut keep)?;
        Ok((common, keep.0))
    }

    #[test]
    fn bundles_come_apart() {
        for (words, left) in [
            ("-qR", "-q -R"),
            ("-vQk x", "x"),
            ("-j4", ""),
            ("-rj4", "-r"),
            ("-q-u", "-q -u"),
            ("-v12", "12"),
            ("-12", "-12"),
            ("-v=x", "=x"),
            ("--qR", "--qR"),
            ("-", "-"),
            ("-- -qR -v --option", "-qR -v --option"),
            ("a -- b", "a b"),
            ("-- --", "--"),
            ("-I path -Ipath --log-type flat --no-build-hook", ""),
        ] {
            let (_, found) = scanned(words).unwrap();
            let left: Vec<OsString> = left.split(' ').filter(|w| !w.is_empty()).map(OsString::from).collect();
            assert_eq!(found, left, "{words}");
        }
    }

    #[test]
    fn settings_are_flags() {
        for (words, name, value) in [
            ("--substitute", "substitute", "true"),
            ("--no-substitute", "substitute", "false"),
            ("--sandbox", "sandbox", "true"),
            ("--no-sandbox", "sandbox", "false"),
            ("--no-build-hook", "builders", ""),
            ("--relaxed-sandbox", "sandbox", "relaxed"),
            ("--substituters -ab", "substituters", "-ab"),
            ("--extra-substituters x", "extra-substituters", "x"),
            ("--builders --no-sandbox", "builders", "--no-sandbox"),
            ("-k", "keep-going", "true"),
            ("--cores 2K", "cores", "2048"),
            ("--timeout +3", "timeout", "3"),
            ("-j auto", "max-jobs", "auto"),
            ("--store daemon", "store", "daemon"),
        ] {
            let (common, left) = scanned(words).unwrap();
            assert_eq!(left, Vec::<OsString>::new(), "{words}");
            let wanted = Override { name: name.into(), value: value.into(), from: OverrideFrom::Flag };
            assert_eq!(common.overrides, [wanted], "{words}");
        }
        for words in ["--no-substituters", "--extra-substitute", "--no-x", "--relaxed-substitute", "--build-cores"] {
            let (common, left) = scanned(words).unwrap();
            assert_eq!((common.overrides.len(), left), (0, vec![OsString::from(words)]), "{words}");
        }
    }

    #[test]
    fn verbosity_stays_within_bounds() {
        for (words, level) in [
            ("", Level::Info),
            ("-v", Level::Talkative),
            ("-vvvvvvvvvv", Level::Vomit),
            ("--quiet --quiet --quiet --quiet --quiet", Level::Error),
            ("--quiet", Level::Notice),
            ("--debug -v --quiet", Level::Debug),
        ] {
            assert_eq!(scanned(words).unwrap().0.verbosity(), level, "{words}");
        }
    }

    /// Texts of Nix 2.8.0 where it is not told otherwise.
    #[test]
    fn errors() {
        for (words, text) in [
            ("--option", "flag '--option' requires 2 argument(s)"),
            ("--option a", "flag '--option' requires 2 argument(s)"),
            ("-j", "flag '-j' requires 1 argument(s)"),
            ("-jx", "configuration setting 'max-jobs' should be 'auto' or an integer"),
            ("-jauto", "configuration setting 'max-jobs' should be 'auto' or an integer"),
            ("-j1K", "configuration setting 'max-jobs' should be 'auto' or an integer"),
            ("-j -4", "configuration setting 'max-jobs' should be 'auto' or an integer"),
            ("--cores x", "invalid unit specifier 'X'"),
            ("--cores 1KK", "'1K' is not an integer"),
            ("--cores 0x3", "'0x3' is not an integer"),
            ("--cores -1", "'-1' is not an integer"),
            ("--cores 1é", "'1é' is not an integer"),
            ("--cores 5000000000", "setting 'cores' has invalid value '5000000000'"),
            ("--cores 99999999999999999999", "'99999999999999999999' is not an integer"),
            // Larder's own: 2.8.0 makes this 0.
            ("--cores 16777216T", "'16777216T' is too large"),
            ("--log-format zork", "option 'log-format' has an invalid value 'zork'"),
            ("--store", "flag '--store' requires 1 argument(s)"),
            ("--extra-substituters", "flag '--extra-substituters' requires 1 argument(s)"),
        ] {
            assert_eq!(scanned(words).unwrap_err().to_string(), text, "{words}");
        }
    }

    #[test]
    fn help_ends_the_scan() {
        assert!(scanned("a --help --cores x").unwrap().0.help);
        scanned("--cores x --help").unwrap_err();
        assert!(!scanned("-- --help").unwrap().0.help);
    }

    #[test]
    fn words_are_shown_without_control_characters() {
        assert_eq!(shown(OsStr::from_bytes(b"a\x1b[31m\nb\xff")), "a\\u{1b}[31m\\nb\u{fffd}");
    }

    proptest! {
        /// Without flags nothing is lost, added or moved, whatever the bytes.
        #[test]
        fn positional_words_stay(words in proptest::collection::vec(proptest::collection::vec(1u8.., 0..9), 0..9)) {
            let words: Vec<OsString> =
                words.into_iter().map(OsString::from_vec).filter(|w| w.as_bytes().first() != Some(&b'-')).collect();
            let mut keep = Keep::default();
            let common = scan(words.clone(), &mut keep).unwrap();
            prop_assert_eq!(keep.0, words);
            prop_assert_eq!(common, Common::default());
        }

        /// A bundle of letters is the same as its letters.
        #[test]
        fn a_bundle_is_its_letters(letters in "[a-zA-HJ-Z]{1,6}") {
            let apart: Vec<String> = letters.chars().map(|c| format!("-{c}")).collect();
            prop_assert_eq!(scanned(&format!("-{letters}")), scanned(&apart.join(" ")));
        }

        /// Flags shared by all may stand anywhere.
        #[test]
        fn the_place_of_a_shared_flag_does_not_matter(at in 0usize..4) {
            let mut words = vec!["a", "-q", "b"];
            words.insert(at, "-k");
            let (common, left) = scanned(&words.join(" ")).unwrap();
            prop_assert_eq!(common.overrides.len(), 1);
            prop_assert_eq!(left, vec!["a", "-q", "b"]);
        }

        #[test]
        fn units_are_powers_of_1024(number in 0i64..1 << 20, unit in 0usize..5) {
            let suffix = ["", "k", "M", "g", "T"][unit];
            prop_assert_eq!(parse_integer(&format!("{number}{suffix}")), Ok(number << (10 * unit)));
        }
    }
}
