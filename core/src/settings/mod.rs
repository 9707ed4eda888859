//! Settings: `nix.conf`, `--option`, and what clients of the daemon ask for.
//!
//! Source: the settings specification, sections 1 to 5, and runs of 2.8.0.
//!
//! All settings stand in one table ([`TABLE`]), the historic ones and those of the evaluator too,
//! so that no known name gives a warning. A [`Settings`] value is built once by a
//! [`SettingsBuilder`], from the lowest source to the highest, and passed down. Nothing here reads
//! a file or the environment: texts come in through a closure, and what depends on the machine
//! through [`Machine`].

mod builder;
mod file;
mod table;
mod value;

use std::collections::BTreeSet;

use camino::Utf8PathBuf;

pub use builder::{Configured, ReadFile, SettingsBuilder, UserFiles, remote_systems};
pub use table::{Entry, Group, Settings, TABLE, find};
pub use value::{Jobs, Kind, PathText, Sandbox};

/// What the defaults depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Processors this process may use, at least 1; what `auto` stands for.
    pub cores: u32,
    /// Does it run as root?
    pub root: bool,
    /// Such as `x86_64-linux`.
    pub system: String,
    /// Further systems that run here: `i686-linux`, `x86_64-v1-linux`, ...
    pub extra_platforms: BTreeSet<String>,
    pub os: Os,
    /// Is `/dev/kvm` accessible?
    pub kvm: bool,
    /// `NIX_CONF_DIR`, usually `/etc/nix`.
    pub conf_dir: Utf8PathBuf,
    /// Program that builds on other machines; empty for none.
    pub build_hook: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Os {
    Linux,
    MacOs,
    Other,
}

/// What is wrong with a setting or a file of them. The texts are those of Nix.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    #[error("Boolean setting '{name}' has invalid value '{value}'")]
    Bool { name: &'static str, value: String },
    /// No number, or one that the setting cannot hold.
    #[error("setting '{name}' has invalid value '{value}'")]
    Integer { name: &'static str, value: String },
    #[error("configuration setting '{name}' should be 'auto' or an integer")]
    Jobs { name: &'static str, value: String },
    #[error("option '{name}' has invalid value '{value}'")]
    Sandbox { name: &'static str, value: String },
    #[error("not an absolute path: '{value}'")]
    Path { name: &'static str, value: String },
    #[error("illegal configuration line '{line}' in '{file}'")]
    Line { line: String, file: Utf8PathBuf },
    /// Comments may hold any bytes, the rest may not.
    #[error("line {line} of '{file}' is not UTF-8")]
    Encoding { line: u64, file: Utf8PathBuf },
    #[error("file '{file}' included from '{from}' not found")]
    IncludeMissing { file: Utf8PathBuf, from: Utf8PathBuf },
    /// A text that is no file has no directory to look in.
    #[error("not an absolute path: './{file}'")]
    IncludeRelative { file: Utf8PathBuf },
    #[error("file '{file}' included from '{from}' includes itself")]
    IncludeCycle { file: Utf8PathBuf, from: Utf8PathBuf },
    #[error("file '{file}' included from '{from}' is one include too many")]
    IncludeLimit { file: Utf8PathBuf, from: Utf8PathBuf },
    #[error("cannot read the settings in '{file}'")]
    Read { file: Utf8PathBuf, source: std::io::Error },
}

impl SettingsError {
    /// Is it a mistake in what the user wrote, after which Nix points to `--help`?
    pub const fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Bool { .. } | Self::Integer { .. } | Self::Jobs { .. } | Self::Sandbox { .. } | Self::Line { .. }
        )
    }
}

/// What the user should hear, though it stops nothing. Printed after `warning: `.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    #[error("unknown setting '{name}'")]
    Unknown { name: String },
    /// An invalid value in `--option` or from a client; the setting keeps its value.
    #[error("error: {0}")]
    Invalid(SettingsError),
}

#[cfg(test)]
mod tests;
