//! A state folder that real Nix manages as well: recognise it, and take its registrations over.
//!
//! Real Nix keeps its ledger in `db/db.sqlite`. Paths it has registered and Larder has not are
//! garbage in Larder's eyes, so nothing may be deleted while there are any. What counts is a
//! registration that Larder does not know *and* whose files still exist: a path that Larder
//! collected after adoption stays listed in the other ledger and is no loss.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use larder_core::content_address::ContentAddress;
use larder_core::hash::Sha256Digest;
use larder_core::path_info::PathInfo;
use larder_core::signature::Signature;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use rustc_hash::FxHashMap;

use crate::sqlite::{Row, Sqlite, SqliteError, Value};

/// The other ledger's file, as it was at one moment: what changes when anything is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint(Vec<u8>);

impl Fingerprint {
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Real Nix's ledger in a state folder.
#[derive(Debug, Clone)]
pub struct ForeignLedger {
    file: PathBuf,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignError {
    #[error("cannot look at '{}'", file.display())]
    Look { file: PathBuf, source: io::Error },
    #[error("cannot read the registrations of real Nix")]
    Sqlite(#[from] SqliteError),
    #[error("the registration of '{path}' by real Nix is damaged: {what}")]
    Row { path: String, what: &'static str },
}

impl ForeignLedger {
    /// The ledger below `db_dir` (`$V/db`), if there is one.
    pub fn find(db_dir: &Path) -> Option<Self> {
        let file = db_dir.join("db.sqlite");
        file.exists().then_some(Self { file })
    }

    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Sizes, times and inodes of the file and its write-ahead log.
    pub fn fingerprint(&self) -> Result<Fingerprint, ForeignError> {
        let mut bytes = Vec::new();
        for suffix in ["", "-wal"] {
            let mut name = self.file.as_os_str().to_owned();
            name.push(suffix);
            match std::fs::metadata(&name) {
                Ok(m) => {
                    for n in [m.ino().cast_signed(), m.len().cast_signed(), m.mtime(), m.mtime_nsec()] {
                        bytes.extend_from_slice(&n.to_le_bytes());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => bytes.push(0),
                Err(source) => return Err(ForeignError::Look { file: name.into(), source }),
            }
        }
        Ok(Fingerprint(bytes))
    }

    /// Calls `each` for every registered path; it returns false to stop.
    ///
    /// Names that are not below `dir` belong to another store and are passed over.
    pub fn paths(&self, dir: &StoreDir, each: &mut dyn FnMut(StorePath) -> bool) -> Result<(), ForeignError> {
        Sqlite::open(&self.file)?.rows("ValidPaths", &mut |row| match column(&row, 1).map(|text| dir.parse(text)) {
            Some(Ok(path)) => each(path),
            _ => true,
        })?;
        Ok(())
    }

    /// Reads all registrations, references, signatures and times included.
    ///
    /// Memory grows with the number of paths, about 500 bytes each.
    pub fn read_all(&self, dir: &StoreDir) -> Result<Vec<PathInfo>, ForeignError> {
        let db = Sqlite::open(&self.file)?;
        let mut infos: FxHashMap<i64, PathInfo> = FxHashMap::default();
        let mut fault = None;
        db.rows("ValidPaths", &mut |row| {
            if column(&row, 1).is_none_or(|text| dir.below(text).is_none()) {
                return true;
            }
            match path_info(dir, &row) {
                Ok(info) => {
                    infos.insert(row.rowid, info);
                    true
                }
                Err(what) => {
                    let path = String::from_utf8_lossy(column(&row, 1).unwrap_or_default()).into_owned();
                    fault = Some(ForeignError::Row { path, what });
                    false
                }
            }
        })?;
        let mut edges: Vec<(i64, i64)> = Vec::new();
        db.rows("Refs", &mut |row| {
            if let (Some(from), Some(to)) = (number(&row, 0), number(&row, 1)) {
                edges.push((from, to));
            }
            true
        })?;
        if let Some(fault) = fault {
            return Err(fault);
        }
        for (from, to) in edges {
            // A row that went away between the two reads leaves an edge without an end.
            let Some(target) = infos.get(&to).map(|info| info.path.clone()) else { continue };
            if let Some(info) = infos.get_mut(&from) {
                info.references.insert(target);
            }
        }
        let mut infos: Vec<PathInfo> = infos.into_values().collect();
        infos.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(infos)
    }
}

fn column(row: &Row, i: usize) -> Option<&[u8]> {
    row.columns.get(i).and_then(Value::bytes)
}

fn number(row: &Row, i: usize) -> Option<i64> {
    row.columns.get(i).and_then(Value::integer)
}

/// Columns: id, path, hash, registrationTime, deriver, narSize, ultimate, sigs, ca.
fn path_info(dir: &StoreDir, row: &Row) -> Result<PathInfo, &'static str> {
    let text = |i| match column(row, i) {
        Some(bytes) => std::str::from_utf8(bytes).map_err(|_| "a text is not UTF-8"),
        None => Ok(""),
    };
    let path = dir.parse(text(1)?).map_err(|_| "its name is no store path")?;
    let nar_hash = Sha256Digest::parse(text(2)?).map_err(|_| "its hash is no SHA-256 hash")?;
    let mut info = PathInfo::new(path, nar_hash, u64::try_from(number(row, 5).unwrap_or(0)).unwrap_or(0));
    info.registration_time_s = u64::try_from(number(row, 3).unwrap_or(0)).unwrap_or(0);
    info.deriver = match text(4)? {
        "" => None,
        deriver => Some(dir.parse(deriver).map_err(|_| "its deriver is no store path")?),
    };
    info.ultimate = number(row, 6) == Some(1);
    info.signatures = text(7)?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<BTreeSet<Signature>, _>>()
        .map_err(|_| "a signature is malformed")?;
    info.content_address = match text(8)? {
        "" => None,
        ca => Some(ca.parse::<ContentAddress>().map_err(|_| "its content address is malformed")?),
    };
    Ok(info)
}
