//! Reads tables of an SQLite database file, and nothing more: what is needed to know which
//! paths a real Nix has registered, and to take them over.
//!
//! Only rowid tables are read, with the committed frames of a write-ahead log laid over the
//! file. Nothing is locked: a database that changes while it is read gives an error or an older
//! state, so callers that decide about deletion take every error as "it may hold anything".
//! Source: the published description of the SQLite file format.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SqliteError {
    #[error("cannot read '{}'", file.display())]
    Io { file: PathBuf, source: io::Error },
    #[error("'{}' is no SQLite database this reader understands: {what}", file.display())]
    Format { file: PathBuf, what: &'static str },
    #[error("'{}' has no table '{table}'", file.display())]
    NoTable { file: PathBuf, table: String },
}

/// One column's value. Texts are bytes: their encoding is checked by whoever uses them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    Null,
    Integer(i64),
    Bytes(Vec<u8>),
    /// A floating-point number; no table of the store has one.
    Real,
}

impl Value {
    pub fn integer(&self) -> Option<i64> {
        if let Self::Integer(n) = self { Some(*n) } else { None }
    }

    /// Text or blob; `None` for null and numbers.
    pub fn bytes(&self) -> Option<&[u8]> {
        if let Self::Bytes(b) = self { Some(b) } else { None }
    }
}

/// A row: its rowid, and its columns as stored (a column added later may be missing).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    pub rowid: i64,
    pub columns: Vec<Value>,
}

const HEADER_LEN: usize = 100;
const WAL_HEADER_LEN: usize = 32;
const FRAME_HEADER_LEN: usize = 24;
/// A record larger than this is no path's (the text of a path, its signatures and hash).
const MAX_PAYLOAD: u64 = 16 << 20;

/// An open database file.
#[derive(Debug)]
pub struct Sqlite {
    path: PathBuf,
    file: File,
    page_size: usize,
    /// Page size less the bytes reserved at its end.
    usable: usize,
    /// Pages in the file or the log, whichever says more.
    pages: u64,
    wal: Option<(File, HashMap<u32, u64>)>,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// A variable-length integer and its length in bytes.
fn varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0u64;
    for (i, &b) in bytes.iter().enumerate().take(9) {
        if i == 8 {
            return Some((value << 8 | u64::from(b), 9));
        }
        value = value << 7 | u64::from(b & 0x7f);
        if b & 0x80 == 0 {
            return Some((value, i + 1));
        }
    }
    None
}

impl Sqlite {
    /// Opens `path` and reads the index of its write-ahead log, if there is one.
    pub fn open(path: &Path) -> Result<Self, SqliteError> {
        let io = |source| SqliteError::Io { file: path.to_owned(), source };
        let format = |what| SqliteError::Format { file: path.to_owned(), what };
        let file = File::open(path).map_err(io)?;
        let mut header = [0; HEADER_LEN];
        file.read_exact_at(&mut header, 0).map_err(io)?;
        if !header.starts_with(b"SQLite format 3\0") {
            return Err(format("no SQLite header"));
        }
        let page_size = match u16_at(&header, 16) {
            Some(1) => 65536,
            Some(n) if n.is_power_of_two() && n >= 512 => n,
            _ => return Err(format("bad page size")),
        };
        if u32_at(&header, 56) != Some(1) {
            return Err(format("text is not UTF-8"));
        }
        let journal = sibling(path, "-journal");
        if std::fs::metadata(&journal).is_ok_and(|m| m.len() > 0) {
            return Err(format("it has a rollback journal, so a change is under way or was cut short"));
        }
        let usable = page_size - usize::from(header.get(20).copied().unwrap_or(0));
        if usable < 480 {
            return Err(format("bad page size"));
        }
        let pages = file.metadata().map_err(io)?.len() / page_size as u64;
        let mut db = Self { path: path.to_owned(), file, page_size, usable, pages, wal: None };
        db.open_wal()?;
        Ok(db)
    }

    fn format(&self, what: &'static str) -> SqliteError {
        SqliteError::Format { file: self.path.clone(), what }
    }

    /// Indexes the committed frames of the write-ahead log.
    fn open_wal(&mut self) -> Result<(), SqliteError> {
        let path = sibling(&self.path, "-wal");
        let io = |source| SqliteError::Io { file: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io(e)),
        };
        let len = file.metadata().map_err(io)?.len();
        if len < WAL_HEADER_LEN as u64 {
            return Ok(());
        }
        let mut header = [0; WAL_HEADER_LEN];
        file.read_exact_at(&mut header, 0).map_err(io)?;
        let big_endian = match u32_at(&header, 0) {
            Some(0x377f_0682) => false,
            Some(0x377f_0683) => true,
            _ => return Ok(()), // never written, or cleared
        };
        if u32_at(&header, 8).map(|n| n as usize) != Some(self.page_size) {
            return Err(self.format("the write-ahead log has another page size"));
        }
        let mut sum = (0u32, 0u32);
        checksum(&mut sum, header.get(..24).unwrap_or_default(), big_endian);
        if Some(sum.0) != u32_at(&header, 24) || Some(sum.1) != u32_at(&header, 28) {
            return Ok(());
        }
        let mut committed = HashMap::new();
        let mut pending: Vec<(u32, u64)> = Vec::new();
        let mut frame = vec![0; FRAME_HEADER_LEN + self.page_size];
        let mut at = WAL_HEADER_LEN as u64;
        while at + frame.len() as u64 <= len {
            file.read_exact_at(&mut frame, at).map_err(io)?;
            let (head, page) = frame.split_at(FRAME_HEADER_LEN);
            // Salts of an older round end the log.
            if head.get(8..16) != header.get(16..24) {
                break;
            }
            checksum(&mut sum, head.get(..8).unwrap_or_default(), big_endian);
            checksum(&mut sum, page, big_endian);
            if Some(sum.0) != u32_at(head, 16) || Some(sum.1) != u32_at(head, 20) {
                break;
            }
            let (Some(number), Some(size)) = (u32_at(head, 0), u32_at(head, 4)) else { break };
            pending.push((number, at + FRAME_HEADER_LEN as u64));
            if size != 0 {
                committed.extend(pending.drain(..));
                self.pages = self.pages.max(u64::from(size));
            }
            at += frame.len() as u64;
        }
        self.wal = Some((file, committed));
        Ok(())
    }

    fn page(&self, number: u32) -> Result<Vec<u8>, SqliteError> {
        if number == 0 || u64::from(number) > self.pages {
            return Err(self.format("a page lies beyond its end"));
        }
        let mut page = vec![0; self.page_size];
        let (file, offset) = match &self.wal {
            Some((wal, frames)) if frames.contains_key(&number) => (wal, frames.get(&number).copied().unwrap_or(0)),
            _ => (&self.file, u64::from(number - 1) * self.page_size as u64),
        };
        file.read_exact_at(&mut page, offset).map_err(|source| SqliteError::Io { file: self.path.clone(), source })?;
        Ok(page)
    }

    /// Calls `each` for every row of a table, in rowid order.
    ///
    /// `each` returns false to stop early.
    pub fn rows(&self, table: &str, each: &mut dyn FnMut(Row) -> bool) -> Result<(), SqliteError> {
        let mut root = None;
        self.walk(1, &mut |row| {
            let is = |i: usize, text: &str| row.columns.get(i).and_then(Value::bytes) == Some(text.as_bytes());
            if is(0, "table") && is(1, table) {
                root = row.columns.get(3).and_then(Value::integer).and_then(|n| u32::try_from(n).ok());
            }
            root.is_none()
        })?;
        let root = root.ok_or_else(|| SqliteError::NoTable { file: self.path.clone(), table: table.to_owned() })?;
        self.walk(root, each)
    }

    /// Walks a table's tree from its root page; iterative, and bounded by the number of pages.
    fn walk(&self, root: u32, each: &mut dyn FnMut(Row) -> bool) -> Result<(), SqliteError> {
        let mut stack = vec![root];
        let mut visited = 0u64;
        while let Some(number) = stack.pop() {
            visited += 1;
            if visited > self.pages {
                return Err(self.format("its pages form a cycle"));
            }
            let page = self.page(number)?;
            let damaged = || self.format("a page is damaged");
            let start = if number == 1 { HEADER_LEN } else { 0 };
            let cells = u16_at(&page, start + 3).ok_or_else(damaged)?;
            let kind = page.get(start).copied().ok_or_else(damaged)?;
            let pointers = start + if kind == 0x05 { 12 } else { 8 };
            let cell = |i: usize| -> Result<&[u8], SqliteError> {
                let at = u16_at(&page, pointers + 2 * i).ok_or_else(damaged)?;
                page.get(at..self.usable).ok_or_else(damaged)
            };
            match kind {
                0x05 => {
                    stack.push(u32_at(&page, start + 8).ok_or_else(damaged)?);
                    for i in (0..cells).rev() {
                        stack.push(u32_at(cell(i)?, 0).ok_or_else(damaged)?);
                    }
                }
                0x0d => {
                    for i in 0..cells {
                        if !each(self.row(cell(i)?)?) {
                            return Ok(());
                        }
                    }
                }
                _ => return Err(self.format("a table page has an unknown kind")),
            }
        }
        Ok(())
    }

    fn row(&self, cell: &[u8]) -> Result<Row, SqliteError> {
        let damaged = || self.format("a row is damaged");
        let (size, n) = varint(cell).ok_or_else(damaged)?;
        let cell = cell.get(n..).ok_or_else(damaged)?;
        let (rowid, n) = varint(cell).ok_or_else(damaged)?;
        let cell = cell.get(n..).ok_or_else(damaged)?;
        let payload = self.payload(cell, size)?;
        let columns = record(&payload).ok_or_else(damaged)?;
        Ok(Row { rowid: rowid.cast_signed(), columns })
    }

    /// A row's bytes, the overflow pages included.
    fn payload(&self, cell: &[u8], size: u64) -> Result<Vec<u8>, SqliteError> {
        let damaged = || self.format("a row is damaged");
        if size > MAX_PAYLOAD {
            return Err(self.format("a row is far too long"));
        }
        let size = usize::try_from(size).map_err(|_| damaged())?;
        let most = self.usable - 35;
        if size <= most {
            return Ok(cell.get(..size).ok_or_else(damaged)?.to_vec());
        }
        let least = (self.usable - 12) * 32 / 255 - 23;
        let fitting = least + (size - least) % (self.usable - 4);
        let local = if fitting <= most { fitting } else { least };
        let mut payload = cell.get(..local).ok_or_else(damaged)?.to_vec();
        let mut next = u32_at(cell, local).ok_or_else(damaged)?;
        while payload.len() < size {
            let page = self.page(next)?;
            next = u32_at(&page, 0).ok_or_else(damaged)?;
            let take = (size - payload.len()).min(self.usable - 4);
            payload.extend_from_slice(page.get(4..4 + take).ok_or_else(damaged)?);
        }
        Ok(payload)
    }
}

/// Splits a record into its columns.
fn record(payload: &[u8]) -> Option<Vec<Value>> {
    let (header_len, n) = varint(payload)?;
    let header_len = usize::try_from(header_len).ok()?;
    let mut types = payload.get(n..header_len)?;
    let mut body = payload.get(header_len..)?;
    let mut columns = Vec::new();
    while !types.is_empty() {
        let (kind, n) = varint(types)?;
        types = types.get(n..)?;
        let len = match kind {
            0 | 8 | 9 => 0,
            1..=4 => usize::try_from(kind).ok()?,
            5 => 6,
            6 | 7 => 8,
            10 | 11 => return None,
            _ => usize::try_from((kind - 12) / 2).ok()?,
        };
        let (bytes, rest) = body.split_at_checked(len)?;
        body = rest;
        columns.push(match kind {
            0 => Value::Null,
            8 => Value::Integer(0),
            9 => Value::Integer(1),
            7 => Value::Real,
            1..=6 => {
                let negative = bytes.first().is_some_and(|b| b & 0x80 != 0);
                Value::Integer(bytes.iter().fold(if negative { -1 } else { 0 }, |n, b| n << 8 | i64::from(*b)))
            }
            _ => Value::Bytes(bytes.to_vec()),
        });
    }
    Some(columns)
}

/// The running checksum of a write-ahead log.
fn checksum(sum: &mut (u32, u32), bytes: &[u8], big_endian: bool) {
    for pair in bytes.as_chunks::<8>().0 {
        let [a, b, c, d, e, f, g, h] = *pair;
        let (x, y) = ([a, b, c, d], [e, f, g, h]);
        let (x, y) = if big_endian {
            (u32::from_be_bytes(x), u32::from_be_bytes(y))
        } else {
            (u32::from_le_bytes(x), u32::from_le_bytes(y))
        };
        sum.0 = sum.0.wrapping_add(x).wrapping_add(sum.1);
        sum.1 = sum.1.wrapping_add(y).wrapping_add(sum.0);
    }
}

fn sibling(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn rows(file: &Path, table: &str) -> Result<Vec<Row>, SqliteError> {
        let mut rows = Vec::new();
        Sqlite::open(file)?.rows(table, &mut |row| {
            rows.push(row);
            true
        })?;
        Ok(rows)
    }

    /// 60 rows on pages of 512 bytes: inner pages, overflow pages, every column kind.
    #[test]
    fn reads_a_whole_table() {
        let rows = rows(&fixture("plain.sqlite"), "ValidPaths").unwrap();
        assert_eq!(rows.len(), 60);
        for (i, row) in rows.iter().enumerate() {
            let n = i64::try_from(i).unwrap();
            assert_eq!(row.rowid, n + 1);
            assert!(row.columns[1].bytes().unwrap().ends_with(format!("-package-{i}").as_bytes()));
            assert_eq!(row.columns[3].integer(), Some(1_600_000_000 + n));
            assert_eq!(row.columns[5].integer(), (i > 0).then_some(100 * n));
            let signatures = row.columns[7].bytes().map_or(0, |b| b.split(|c| *c == b' ').count());
            assert_eq!(signatures, i % 7, "row {i}");
        }
    }

    /// 10 rows in the file, 15 more committed in the log, others begun and not committed.
    #[test]
    fn lays_the_committed_log_over_the_file() {
        assert_eq!(rows(&fixture("wal.sqlite"), "ValidPaths").unwrap().len(), 25);
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("db");
        std::fs::copy(fixture("wal.sqlite"), &copy).unwrap();
        assert_eq!(rows(&copy, "ValidPaths").unwrap().len(), 10);
        // A log cut anywhere holds whole transactions or none.
        let wal = std::fs::read(fixture("wal.sqlite-wal")).unwrap();
        for len in (0..wal.len()).step_by(509) {
            std::fs::write(folder.path().join("db-wal"), &wal[..len]).unwrap();
            let count = rows(&copy, "ValidPaths").unwrap().len();
            assert!(count == 10 || count == 25, "{count} rows after {len} bytes of log");
        }
    }

    #[test]
    fn names_what_is_missing() {
        let error = rows(&fixture("plain.sqlite"), "Nothing").unwrap_err();
        assert!(matches!(error, SqliteError::NoTable { .. }), "{error}");
    }

    proptest! {
        /// A damaged file gives rows or an error, and never more rows than pages can hold.
        #[test]
        fn damage_is_no_panic(spoils in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20)) {
            let mut bytes = std::fs::read(fixture("plain.sqlite")).unwrap();
            for (at, byte) in spoils {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("db");
            std::fs::write(&file, &bytes).unwrap();
            if let Ok(rows) = rows(&file, "ValidPaths") {
                prop_assert!(rows.len() <= bytes.len());
            }
        }
    }
}
