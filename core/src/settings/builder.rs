//! Puts settings together, from the lowest source to the highest.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use camino::{Utf8Path, Utf8PathBuf};

use super::file::{Line, parse_line, without_comment};
use super::table::find;
use super::{Machine, Settings, SettingsError, Warning};
use crate::store_dir::canonicalise;

/// Most files within files, and most includes in all: a file that includes itself twice would
/// otherwise never end.
const MAX_DEPTH: usize = 64;
const MAX_INCLUDES: usize = 1024;

/// Sent to a daemon in fields of their own, or never.
const NOT_SENT: &[&str] = &[
    "cores",
    "experimental-features",
    "fallback",
    "keep-failed",
    "keep-going",
    "max-jobs",
    "max-silent-time",
    "show-trace",
    "substitute",
];

/// Names of this form are settings of 1.x (one for each RSA key) and are dropped in silence.
const DROPPED_PREFIX: &str = "binary-cache-public-key-";

/// Reads a file: `None` if it does not exist or may not be read.
pub type ReadFile<'a> = &'a mut dyn FnMut(&Utf8Path) -> io::Result<Option<Vec<u8>>>;

/// Builds [`Settings`]. Call in this order; later calls win:
///
/// 1. [`preset`](Self::preset) for what the environment says in place of a default,
/// 2. [`system_file`](Self::system_file) for `nix.conf`,
/// 3. [`user_file`](Self::user_file) for each of [`UserFiles::list`],
/// 4. [`text`](Self::text) for `NIX_CONFIG`,
/// 5. [`flag`](Self::flag) and [`option`](Self::option) for the command line, left to right.
///
/// What changed since step 3 are the overrides.
#[derive(Debug)]
pub struct SettingsBuilder {
    machine: Machine,
    settings: Settings,
    overridden: BTreeSet<&'static str>,
    unknown: BTreeSet<String>,
    invalid: Vec<SettingsError>,
}

/// What a [`SettingsBuilder`] made.
#[derive(Debug)]
pub struct Configured {
    pub settings: Settings,
    /// Names of what the user set, as opposed to defaults and the system's file.
    pub overridden: BTreeSet<&'static str>,
    /// Invalid options in order, then each unknown name once, sorted.
    pub warnings: Vec<Warning>,
}

impl Configured {
    /// What a client sends to a daemon as names and values: the overrides, but those with a field
    /// of their own in the request, `show-trace` and `experimental-features`.
    pub fn overrides(&self) -> BTreeMap<&'static str, String> {
        let sent = self.overridden.iter().filter(|name| !NOT_SENT.contains(name));
        sent.filter_map(|name| Some((*name, self.settings.get(name)?))).collect()
    }
}

impl SettingsBuilder {
    /// Begins with the defaults.
    pub fn new(machine: Machine) -> Self {
        let settings = Settings::new(&machine);
        Self::over(settings, machine)
    }

    /// Begins with given settings: for one connection of a daemon.
    pub fn over(settings: Settings, machine: Machine) -> Self {
        Self { machine, settings, overridden: BTreeSet::new(), unknown: BTreeSet::new(), invalid: Vec::new() }
    }

    /// Replaces a default by what the environment says.
    pub fn preset(&mut self, name: &str, value: &str) -> Result<(), SettingsError> {
        self.set(name, value).map(drop)
    }

    /// Reads `nix.conf`. That it is missing is fine.
    pub fn system_file(&mut self, file: &Utf8Path, read: ReadFile<'_>) -> Result<(), SettingsError> {
        self.read_file(file, read)?;
        self.overridden.clear();
        Ok(())
    }

    /// Reads a file of the user's. That it is missing is fine.
    pub fn user_file(&mut self, file: &Utf8Path, read: ReadFile<'_>) -> Result<(), SettingsError> {
        self.read_file(file, read)
    }

    /// Takes the text of a file that is none; errors call it `what`: `NIX_CONFIG`.
    pub fn text(&mut self, what: &str, text: &[u8], read: ReadFile<'_>) -> Result<(), SettingsError> {
        self.read_text(Frame::new(what.into(), text.to_vec(), false), read)
    }

    /// Sets what a flag of its own stands for, or a field of a client's request.
    pub fn flag(&mut self, name: &str, value: &str) -> Result<(), SettingsError> {
        self.set(name, value).map(|name| self.overridden.extend(name))
    }

    /// Sets what `--option` or a client asks for. An invalid value is a warning.
    pub fn option(&mut self, name: &str, value: &str) {
        let invalid = self.flag(name, value).err();
        self.invalid.extend(invalid);
    }

    /// The settings so far.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn finish(self) -> Configured {
        let invalid = self.invalid.into_iter().map(Warning::Invalid);
        let unknown = self.unknown.into_iter().map(|name| Warning::Unknown { name });
        let warnings = invalid.chain(unknown).collect();
        Configured { settings: self.settings, overridden: self.overridden, warnings }
    }

    /// Gives the setting's proper name, if there is such a setting.
    fn set(&mut self, name: &str, value: &str) -> Result<Option<&'static str>, SettingsError> {
        if let Some(entry) = find(name) {
            (entry.set)(&mut self.settings, value, &self.machine)?;
            return Ok(Some(entry.name));
        }
        if let Some(entry) = name.strip_prefix("extra-").and_then(find)
            && entry.kind.appends()
        {
            (entry.append)(&mut self.settings, value, &self.machine)?;
            return Ok(Some(entry.name));
        }
        if !name.starts_with(DROPPED_PREFIX) {
            self.unknown.insert(name.to_owned());
        }
        Ok(None)
    }

    fn read_file(&mut self, file: &Utf8Path, read: ReadFile<'_>) -> Result<(), SettingsError> {
        match read(file) {
            Ok(Some(text)) => self.read_text(Frame::new(file.to_owned(), text, true), read),
            Ok(None) => Ok(()),
            Err(source) => Err(SettingsError::Read { file: file.to_owned(), source }),
        }
    }

    /// Reads a text and what it includes, in place.
    fn read_text(&mut self, top: Frame, read: ReadFile<'_>) -> Result<(), SettingsError> {
        let mut stack = vec![top];
        let mut includes = 0;
        while let Some(frame) = stack.last_mut() {
            let Some(line) = frame.next_line() else {
                stack.pop();
                continue;
            };
            let Ok(line) = String::from_utf8(line) else {
                return Err(SettingsError::Encoding { line: frame.lines, file: frame.file.clone() });
            };
            match parse_line(&line) {
                Some(Line::Empty) => {}
                Some(Line::Set { name, value }) => self.flag(&name, &value)?,
                Some(Line::Include { file, may_be_missing }) => {
                    let from = frame.file.clone();
                    let file = frame.resolve(file)?;
                    let text = read(&file).map_err(|source| SettingsError::Read { file: file.clone(), source })?;
                    let Some(text) = text else {
                        if may_be_missing {
                            continue;
                        }
                        return Err(SettingsError::IncludeMissing { file, from });
                    };
                    if stack.iter().any(|frame| frame.file == file) {
                        return Err(SettingsError::IncludeCycle { file, from });
                    }
                    includes += 1;
                    if stack.len() >= MAX_DEPTH || includes > MAX_INCLUDES {
                        return Err(SettingsError::IncludeLimit { file, from });
                    }
                    stack.push(Frame::new(file, text, true));
                }
                None => return Err(SettingsError::Line { line, file: frame.file.clone() }),
            }
        }
        Ok(())
    }
}

/// A text that is being read.
struct Frame {
    file: Utf8PathBuf,
    text: Vec<u8>,
    at: usize,
    lines: u64,
    /// Is it really a file, so that others can lie beside it?
    is_file: bool,
}

impl Frame {
    const fn new(file: Utf8PathBuf, text: Vec<u8>, is_file: bool) -> Self {
        Self { file, text, at: 0, lines: 0, is_file }
    }

    /// The next line without its comment.
    fn next_line(&mut self) -> Option<Vec<u8>> {
        let rest = self.text.get(self.at..).filter(|rest| !rest.is_empty())?;
        let len = memchr::memchr(b'\n', rest).unwrap_or(rest.len());
        let line = without_comment(rest.get(..len).unwrap_or_default()).to_vec();
        self.at += len + 1;
        self.lines += 1;
        Some(line)
    }

    /// The path of a file that it includes.
    fn resolve(&self, file: String) -> Result<Utf8PathBuf, SettingsError> {
        let whole = match self.file.parent() {
            Some(parent) if self.is_file => parent.join(file),
            _ => file.into(),
        };
        match canonicalise(whole.as_str().as_bytes()) {
            Some(clean) => Ok(String::from_utf8(clean).expect("made of pieces of a str, cut at '/'").into()),
            None => Err(SettingsError::IncludeRelative { file: whole }),
        }
    }
}

/// Where a user's files are, from the environment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserFiles<'a> {
    /// `NIX_USER_CONF_FILES`, colon separated: if set, even to nothing, it alone counts.
    pub nix_user_conf_files: Option<&'a str>,
    /// `XDG_CONFIG_HOME`, else `~/.config`.
    pub config_home: Option<&'a str>,
    /// `XDG_CONFIG_DIRS`, colon separated, else `/etc/xdg`.
    pub config_dirs: Option<&'a str>,
}

impl UserFiles<'_> {
    /// The files in the order in which to read them: the first named is last, so that it wins.
    pub fn list(&self) -> Vec<Utf8PathBuf> {
        let pieces = |text: &str| text.split(':').filter(|p| !p.is_empty()).map(Utf8PathBuf::from).collect::<Vec<_>>();
        let mut files = if let Some(files) = self.nix_user_conf_files {
            pieces(files)
        } else {
            let dirs = pieces(self.config_dirs.unwrap_or("/etc/xdg"));
            let dirs = self.config_home.map(Utf8PathBuf::from).into_iter().chain(dirs);
            dirs.map(|dir| dir.join("nix/nix.conf")).collect()
        };
        files.reverse();
        files
    }
}

/// What `NIX_REMOTE_SYSTEMS`, a colon separated list of files, makes of `builders`.
pub fn remote_systems(files: &str) -> String {
    files.split(':').filter(|f| !f.is_empty()).map(|file| format!("@{file}")).collect::<Vec<_>>().join(" ")
}
