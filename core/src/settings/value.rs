//! Types of settings: how each is read, appended to and printed.

use std::collections::{BTreeMap, BTreeSet};

use camino::Utf8Path;

use super::{Machine, SettingsError};
use crate::store_dir::canonicalise;

/// How a setting is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bool,
    Integer,
    Jobs,
    Sandbox,
    Text,
    Path,
    List,
    Set,
    Map,
}

impl Kind {
    /// Does `extra-NAME` exist?
    pub const fn appends(self) -> bool {
        matches!(self, Self::List | Self::Set | Self::Map)
    }
}

/// Whose value is read, and where.
pub(super) struct Context<'a> {
    pub(super) name: &'static str,
    pub(super) machine: &'a Machine,
}

pub(super) trait Value: Sized {
    const KIND: Kind;

    fn parse(text: &str, context: &Context<'_>) -> Result<Self, SettingsError>;

    /// As `show-config` prints it; [`Value::parse`] reads it.
    fn print(&self) -> String;

    /// Adds to a list, set or map. Others are never asked to, see [`Kind::appends`].
    fn append(&mut self, more: Self) {
        *self = more;
    }
}

impl Value for bool {
    const KIND: Kind = Kind::Bool;

    fn parse(text: &str, context: &Context<'_>) -> Result<Self, SettingsError> {
        match text {
            "true" | "yes" | "1" => Ok(true),
            "false" | "no" | "0" => Ok(false),
            _ => Err(SettingsError::Bool { name: context.name, value: text.to_owned() }),
        }
    }

    fn print(&self) -> String {
        self.to_string()
    }
}

/// A decimal number with a sign, maybe a suffix for 1024 and its powers.
fn parse_integer(text: &str) -> Option<i128> {
    let (text, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (text.get(..text.len() - 1)?, 10),
        b'M' => (text.get(..text.len() - 1)?, 20),
        b'G' => (text.get(..text.len() - 1)?, 30),
        b'T' => (text.get(..text.len() - 1)?, 40),
        _ => (text, 0),
    };
    // 64 bits and a sign at most, so that the shift cannot overflow.
    let number: i128 = text.parse().ok()?;
    (number.unsigned_abs() <= u64::MAX.into()).then_some(number << shift)
}

macro_rules! integers {
    ($($int:ty),*) => {$(
        impl Value for $int {
            const KIND: Kind = Kind::Integer;

            fn parse(text: &str, context: &Context<'_>) -> Result<Self, SettingsError> {
                let number = parse_integer(text).and_then(|n| n.try_into().ok());
                // No sign where the type has none, not even that of -0.
                let number = number.filter(|_| Self::MIN != 0 || !text.starts_with('-'));
                number.ok_or_else(|| SettingsError::Integer { name: context.name, value: text.to_owned() })
            }

            fn print(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

integers!(u32, u64, i64);

/// Number of builds at a time: `auto` for one a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Jobs(pub u32);

impl Value for Jobs {
    const KIND: Kind = Kind::Jobs;

    fn parse(text: &str, context: &Context<'_>) -> Result<Self, SettingsError> {
        match text {
            "auto" => Ok(Self(context.machine.cores)),
            _ => text.parse().map(Self).map_err(|_| SettingsError::Jobs { name: context.name, value: text.to_owned() }),
        }
    }

    fn print(&self) -> String {
        self.0.to_string()
    }
}

/// Are builds shut in?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sandbox {
    On,
    Off,
    /// On, but a derivation may ask for none (`__noChroot`).
    Relaxed,
}

impl Value for Sandbox {
    const KIND: Kind = Kind::Sandbox;

    fn parse(text: &str, context: &Context<'_>) -> Result<Self, SettingsError> {
        match text {
            "true" => Ok(Self::On),
            "false" => Ok(Self::Off),
            "relaxed" => Ok(Self::Relaxed),
            _ => Err(SettingsError::Sandbox { name: context.name, value: text.to_owned() }),
        }
    }

    fn print(&self) -> String {
        match self {
            Self::On => "true",
            Self::Off => "false",
            Self::Relaxed => "relaxed",
        }
        .to_owned()
    }
}

impl Value for String {
    const KIND: Kind = Kind::Text;

    fn parse(text: &str, _: &Context<'_>) -> Result<Self, SettingsError> {
        Ok(text.to_owned())
    }

    fn print(&self) -> String {
        self.clone()
    }
}

/// An absolute path, canonical by text; empty if unset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathText(String);

impl PathText {
    pub fn get(&self) -> Option<&Utf8Path> {
        (!self.0.is_empty()).then(|| Utf8Path::new(&self.0))
    }

    /// `None` if it is neither absolute nor empty.
    pub fn new(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(Self::default());
        }
        let clean = canonicalise(text.as_bytes())?;
        Some(Self(String::from_utf8(clean).expect("made of pieces of a str, cut at '/'")))
    }
}

impl Value for PathText {
    const KIND: Kind = Kind::Path;

    fn parse(text: &str, context: &Context<'_>) -> Result<Self, SettingsError> {
        Self::new(text).ok_or_else(|| SettingsError::Path { name: context.name, value: text.to_owned() })
    }

    fn print(&self) -> String {
        self.0.clone()
    }
}

/// Pieces between blanks, tabs and ends of lines.
pub(super) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split([' ', '\t', '\n', '\r']).filter(|word| !word.is_empty())
}

impl Value for Vec<String> {
    const KIND: Kind = Kind::List;

    fn parse(text: &str, _: &Context<'_>) -> Result<Self, SettingsError> {
        Ok(words(text).map(str::to_owned).collect())
    }

    fn print(&self) -> String {
        self.join(" ")
    }

    fn append(&mut self, more: Self) {
        self.extend(more);
    }
}

impl Value for BTreeSet<String> {
    const KIND: Kind = Kind::Set;

    fn parse(text: &str, _: &Context<'_>) -> Result<Self, SettingsError> {
        Ok(words(text).map(str::to_owned).collect())
    }

    fn print(&self) -> String {
        self.iter().map(String::as_str).collect::<Vec<_>>().join(" ")
    }

    fn append(&mut self, mut more: Self) {
        BTreeSet::append(self, &mut more);
    }
}

impl Value for BTreeMap<String, String> {
    const KIND: Kind = Kind::Map;

    /// `key=value` words. A word without `=` is dropped, and of one key the first counts.
    fn parse(text: &str, _: &Context<'_>) -> Result<Self, SettingsError> {
        let mut map = Self::new();
        for (key, value) in words(text).filter_map(|word| word.split_once('=')) {
            map.entry(key.to_owned()).or_insert_with(|| value.to_owned());
        }
        Ok(map)
    }

    fn print(&self) -> String {
        self.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")
    }

    fn append(&mut self, more: Self) {
        for (key, value) in more {
            self.entry(key).or_insert(value);
        }
    }
}
