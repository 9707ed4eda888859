//! Names on file systems that do not tell `FOO` from `foo` (setting `use-case-hack`).
//!
//! On restoring, a later name that differs from an earlier one of its directory in case alone gets
//! a suffix and a number; on dumping the suffix and what follows is dropped. Only `A-Z` and `a-z`
//! count as differing in case. Source: formats, section 3.5; `case_hack.json`.

use std::borrow::Cow;
use std::collections::hash_map::Entry;

use rustc_hash::{FxHashMap, FxHashSet};

use super::Shown;

/// What comes between the name and the number.
pub const SUFFIX: &[u8] = b"~nix~case~hack~";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CaseHackError {
    #[error("file name '{}' collides with case-hacked file name '{}'", Shown(name), Shown(on_disk))]
    Collision { name: Vec<u8>, on_disk: Vec<u8> },
    #[error("file name '{}' has nothing before its case-hack suffix", Shown(on_disk))]
    EmptyName { on_disk: Vec<u8> },
}

/// The names of one directory that is being restored.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// Lower-cased names of the archive, with the last number given out for each.
    archived: FxHashMap<Vec<u8>, u64>,
    /// Lower-cased names that got a suffix.
    hacked: FxHashSet<Vec<u8>>,
}

impl Names {
    /// The name on disk for the next `name` of the archive.
    ///
    /// Never gives two names that are equal up to case: where the suffix would not help since the
    /// archive has such a name itself, that is an error. (Nix 2.26 finds one order of this in
    /// its table and the other when the file exists already.)
    pub fn on_disk<'n>(&mut self, name: &'n [u8]) -> Result<Cow<'n, [u8]>, CaseHackError> {
        let key = name.to_ascii_lowercase();
        if self.hacked.contains(&key) {
            return Err(CaseHackError::Collision { name: name.to_vec(), on_disk: name.to_vec() });
        }
        let number = match self.archived.entry(key) {
            Entry::Vacant(free) => {
                free.insert(0);
                return Ok(Cow::Borrowed(name));
            }
            Entry::Occupied(mut taken) => {
                *taken.get_mut() += 1;
                *taken.get()
            }
        };
        let on_disk = [name, SUFFIX, number.to_string().as_bytes()].concat();
        let key = on_disk.to_ascii_lowercase();
        if self.archived.contains_key(&key) {
            return Err(CaseHackError::Collision { name: name.to_vec(), on_disk });
        }
        self.hacked.insert(key);
        Ok(Cow::Owned(on_disk))
    }
}

/// The name in the archive for a name on disk.
///
/// Two names of one directory may give the same: the caller must refuse that. A name that begins
/// with the suffix is an error, since nothing would be left of it (Nix writes an archive that
/// nobody can restore).
///
/// ```
/// # use larder_core::nar::case_hack::archive_name;
/// assert_eq!(archive_name(b"foo~nix~case~hack~1"), Ok(&b"foo"[..]));
/// assert_eq!(archive_name(b"foo"), Ok(&b"foo"[..]));
/// ```
pub fn archive_name(on_disk: &[u8]) -> Result<&[u8], CaseHackError> {
    match memchr::memmem::find(on_disk, SUFFIX).map(|at| on_disk.get(..at).unwrap_or_default()) {
        None => Ok(on_disk),
        Some([]) => Err(CaseHackError::EmptyName { on_disk: on_disk.to_vec() }),
        Some(name) => Ok(name),
    }
}
