//! Validity registration text: what `--dump-db` writes and `--load-db` reads.
//!
//! ```text
//! record = path LF [ sha256 LF nar-size LF ] [deriver] LF reference-count LF { reference LF }
//! ```
//! Source: formats, section 7.2; `validity.json`, and runs of 2.8.0.
//!
//! A store has millions of references, so nothing here allocates for one: the parser lends slices
//! of its buffer ([`RecordRef`]), the writer appends to a vector.
//!
//! Where Nix aborts (blank path, list cut short, count below zero) or drops a last path line
//! without a line feed in silence, there is an error here.

use std::collections::BTreeSet;

use crate::hash::{HashError, Sha256Digest};
use crate::hash_part::HashPart;
use crate::path_info::PathInfo;
use crate::store_dir::StoreDir;
pub use crate::store_path::PathRef;
use crate::store_path::{MAX_NAME_LEN, StorePath, StorePathError, check_name, is_name_byte};

/// Longest line read, in bytes. Store paths need far less; spare for odd spellings (`//`).
pub const MAX_LINE: usize = 64 << 10;

/// Most references of one record.
pub const MAX_REFERENCES: u64 = 1 << 20;

/// Do records carry hash and size?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `--dump-db`, `--load-db`, `--register-validity --hash-given`.
    WithHash,
    /// `--register-validity`, files of `exportReferencesGraph`.
    WithoutHash,
}

/// What is wrong with a registration text. The texts are those of Nix where it has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistrationError {
    #[error(transparent)]
    Path(#[from] StorePathError),
    #[error(transparent)]
    Hash(#[from] HashError),
    /// A size or a count that is no decimal number in range. `found` is its text.
    #[error("number expected")]
    Number { found: String },
    /// The text ends within a record, or without a line feed.
    #[error("missing input")]
    MissingInput,
    #[error("path '{path}' claims to have {count} references, more than the {MAX_REFERENCES} allowed")]
    References { path: String, count: u64 },
    #[error("line is longer than {MAX_LINE} bytes: it begins '{begin}'")]
    LongLine { begin: String },
}

/// A record as the parser lends it.
#[derive(Debug, Clone, Copy)]
pub struct RecordRef<'a> {
    pub path: PathRef<'a>,
    /// SHA-256 of the NAR and its size in bytes, if the form has them.
    pub hash_size: Option<(Sha256Digest, u64)>,
    pub deriver: Option<PathRef<'a>>,
    references: &'a [Span],
    text: &'a [u8],
}

impl<'a> RecordRef<'a> {
    /// The references in the order of the text, which need not be sorted and may repeat.
    pub fn references(&self) -> impl ExactSizeIterator<Item = PathRef<'a>> + Clone + use<'a> {
        let text = self.text;
        self.references.iter().map(move |span| span.of(text))
    }

    pub fn to_record(&self) -> Record {
        Record {
            path: self.path.to_store_path(),
            hash_size: self.hash_size,
            deriver: self.deriver.map(PathRef::to_store_path),
            references: self.references().map(PathRef::to_store_path).collect(),
        }
    }
}

/// A record of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub path: StorePath,
    pub hash_size: Option<(Sha256Digest, u64)>,
    pub deriver: Option<StorePath>,
    pub references: BTreeSet<StorePath>,
}

impl Record {
    /// Appends it as text.
    pub fn write(&self, out: &mut Vec<u8>, dir: &StoreDir) {
        let references = self.references.iter().map(PathRef::from);
        let hash_size = self.hash_size.as_ref().map(|(hash, size)| (hash, *size));
        write_record(out, dir, (&self.path).into(), hash_size, self.deriver.as_ref().map(PathRef::from), references);
    }
}

/// A path found in the text of a record: where its name lies, from the beginning of the record.
#[derive(Debug, Clone, Copy)]
struct Span {
    hash_part: HashPart,
    name_len: u8,
    name_at: usize,
}

const _: () = assert!(MAX_NAME_LEN <= u8::MAX as usize);

impl Span {
    fn of(self, text: &[u8]) -> PathRef<'_> {
        let name = text.get(self.name_at..).and_then(|t| t.get(..usize::from(self.name_len)));
        let name = std::str::from_utf8(name.unwrap_or_default()).expect("a checked name is ASCII");
        PathRef::trusted(self.hash_part, name)
    }
}

/// Which line comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Path,
    Hash,
    Size,
    Deriver,
    Count,
    References {
        left: u64,
    },
    /// The record is whole.
    End,
}

/// Reads records from bytes that come in pieces of any size.
///
/// Push a piece, take the records that are whole, push the next; at the end of the input ask
/// [`Parser::finish`]. After an error the parser gives the same error for ever.
///
/// ```
/// use larder_core::{registration::{Form, Parser}, store_dir::StoreDir};
/// let dir = StoreDir::new("/nix/store")?;
/// let mut parser = Parser::new(&dir, Form::WithoutHash);
/// parser.push(b"/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x\n\n0\n");
/// let record = parser.next_record()?.expect("a whole record");
/// assert_eq!(record.path.name(), "x");
/// assert!(parser.next_record()?.is_none());
/// parser.finish()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Parser<'d> {
    dir: &'d StoreDir,
    form: Form,
    text: Vec<u8>,
    /// Where in `text` the record under way begins, where its next line begins, and up to where
    /// no line feed was found.
    begin: usize,
    at: usize,
    searched: usize,
    lines: u64,
    next: Line,
    path: Option<Span>,
    hash: Option<Sha256Digest>,
    hash_size: Option<(Sha256Digest, u64)>,
    deriver: Option<Span>,
    references: Vec<Span>,
}

impl<'d> Parser<'d> {
    pub fn new(dir: &'d StoreDir, form: Form) -> Self {
        Self {
            dir,
            form,
            text: Vec::new(),
            begin: 0,
            at: 0,
            searched: 0,
            lines: 0,
            next: Line::Path,
            path: None,
            hash: None,
            hash_size: None,
            deriver: None,
            references: Vec::new(),
        }
    }

    /// Takes the next piece of the input.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.next == Line::End {
            self.begin_record();
        }
        self.text.drain(..self.begin);
        self.at -= self.begin;
        self.searched -= self.begin;
        self.begin = 0;
        self.text.extend_from_slice(bytes);
    }

    /// The next whole record; `None` if more input is needed.
    pub fn next_record(&mut self) -> Result<Option<RecordRef<'_>>, RegistrationError> {
        if self.next == Line::End {
            self.begin_record();
        }
        while self.next != Line::End {
            if !self.read_line()? {
                return Ok(None);
            }
        }
        let text = self.text.get(self.begin..).unwrap_or_default();
        Ok(self.path.map(|path| RecordRef {
            path: path.of(text),
            hash_size: self.hash_size,
            deriver: self.deriver.map(|span| span.of(text)),
            references: &self.references,
            text,
        }))
    }

    /// Whole lines read so far; an error is in the one after.
    pub const fn lines(&self) -> u64 {
        self.lines
    }

    /// Tells that the input is at its end. All records must have been taken.
    pub fn finish(&self) -> Result<(), RegistrationError> {
        let between = matches!(self.next, Line::Path | Line::End);
        if between && self.at == self.text.len() { Ok(()) } else { Err(RegistrationError::MissingInput) }
    }

    fn begin_record(&mut self) {
        self.begin = self.at;
        self.next = Line::Path;
        // All but these are replaced on the way to the end of a record.
        self.references.clear();
    }

    /// Reads one line, if it is whole.
    fn read_line(&mut self) -> Result<bool, RegistrationError> {
        let unread = self.text.get(self.at..).unwrap_or_default();
        let searched = self.searched - self.at;
        let Some(len) = memchr::memchr(b'\n', unread.get(searched..).unwrap_or_default()).map(|n| n + searched) else {
            self.searched = self.text.len();
            return if unread.len() > MAX_LINE { Err(long_line(unread)) } else { Ok(false) };
        };
        if len > MAX_LINE {
            return Err(long_line(unread));
        }
        let line = unread.get(..len).unwrap_or_default();
        let at = self.at - self.begin;
        self.next = match self.next {
            Line::Path => {
                self.path = Some(parse_path(self.dir, line, at)?);
                if self.form == Form::WithHash { Line::Hash } else { Line::Deriver }
            }
            Line::Hash => {
                self.hash = Some(parse_hash(line)?);
                Line::Size
            }
            Line::Size => {
                let size = parse_number(line)?;
                self.hash_size = self.hash.map(|hash| (hash, size));
                Line::Deriver
            }
            Line::Deriver => {
                self.deriver = if line.is_empty() { None } else { Some(parse_path(self.dir, line, at)?) };
                Line::Count
            }
            Line::Count => {
                let count = parse_number(line)?;
                if i32::try_from(count).is_err() {
                    return Err(RegistrationError::Number { found: lossy(line) });
                }
                if count > MAX_REFERENCES {
                    let text = self.text.get(self.begin..).unwrap_or_default();
                    let path = self.path.map(|span| self.dir.full(&span.of(text).to_store_path()));
                    return Err(RegistrationError::References { path: path.unwrap_or_default(), count });
                }
                if count == 0 { Line::End } else { Line::References { left: count } }
            }
            Line::References { left } => {
                self.references.push(parse_path(self.dir, line, at)?);
                if left == 1 { Line::End } else { Line::References { left: left - 1 } }
            }
            Line::End => Line::End,
        };
        self.at += len + 1;
        self.searched = self.at;
        self.lines += 1;
        Ok(true)
    }
}

fn lossy(line: &[u8]) -> String {
    String::from_utf8_lossy(line).into_owned()
}

fn long_line(line: &[u8]) -> RegistrationError {
    RegistrationError::LongLine { begin: lossy(line.get(..80).unwrap_or(line)) }
}

/// Parses a full path that begins at `at` of its record.
fn parse_path(dir: &StoreDir, line: &[u8], at: usize) -> Result<Span, RegistrationError> {
    // The usual spelling, without a copy.
    if let Some(base) = dir.below(line)
        && let Some((hash, rest)) = base.split_at_checked(HashPart::TEXT_LEN)
        && let Some(name) = rest.strip_prefix(b"-")
        && !name.is_empty()
        && name.iter().all(|b| is_name_byte(*b))
        && let Ok(name_len) = u8::try_from(name.len())
        && let Ok(hash_part) = HashPart::parse(hash)
        && ((usize::from(name_len) <= MAX_NAME_LEN && name.first() != Some(&b'.')) || check_name(name).is_ok())
    {
        return Ok(Span { hash_part, name_len, name_at: at + line.len() - name.len() });
    }
    let path = dir.parse(line)?;
    // Other spellings differ in the slashes; the base name is in the line as it is.
    let name = path.name().as_str().as_bytes();
    let found = memchr::memmem::rfind(line, name).expect("canonicalising keeps the last piece");
    let name_len = u8::try_from(name.len()).expect("names have at most 211 bytes");
    Ok(Span { hash_part: path.hash_part(), name_len, name_at: at + found })
}

fn parse_hash(line: &[u8]) -> Result<Sha256Digest, RegistrationError> {
    let mut digest = [0; 32];
    if line.len() == 64 && data_encoding::HEXLOWER.decode_mut(line, &mut digest) == Ok(32) {
        return Ok(Sha256Digest(digest));
    }
    Ok(Sha256Digest::parse(&String::from_utf8_lossy(line))?)
}

/// A decimal number of 64 bits, with or without `+`.
fn parse_number(line: &[u8]) -> Result<u64, RegistrationError> {
    let digits = line.strip_prefix(b"+").unwrap_or(line);
    let number = digits.iter().try_fold(0u64, |n, c| {
        let digit = c.is_ascii_digit().then(|| u64::from(c - b'0'))?;
        n.checked_mul(10)?.checked_add(digit)
    });
    match number {
        Some(number) if !digits.is_empty() => Ok(number),
        _ => Err(RegistrationError::Number { found: lossy(line) }),
    }
}

/// Appends a record. References should come sorted, as Nix writes them.
pub fn write_record<'a>(
    out: &mut Vec<u8>,
    dir: &StoreDir,
    path: PathRef<'_>,
    hash_size: Option<(&Sha256Digest, u64)>,
    deriver: Option<PathRef<'_>>,
    references: impl ExactSizeIterator<Item = PathRef<'a>>,
) {
    write_path(out, dir, path);
    write_facts(out, dir, hash_size, deriver, references.len());
    references.for_each(|reference| write_path(out, dir, reference));
}

/// A base name whose hash part is at hand as text.
pub type TextAndName<'a> = (&'a [u8; HashPart::TEXT_LEN], &'a str);

/// [`write_record`] where the hash parts are at hand as text, which spares making it for each
/// reference: most of what a whole ledger costs to write.
pub fn write_named_record<'a>(
    out: &mut Vec<u8>,
    dir: &StoreDir,
    path: TextAndName<'_>,
    hash_size: Option<(&Sha256Digest, u64)>,
    deriver: Option<PathRef<'_>>,
    references: impl ExactSizeIterator<Item = TextAndName<'a>>,
) {
    write_named_path(out, dir, path);
    write_facts(out, dir, hash_size, deriver, references.len());
    references.for_each(|reference| write_named_path(out, dir, reference));
}

/// What stands between a path and its references.
fn write_facts(
    out: &mut Vec<u8>,
    dir: &StoreDir,
    hash_size: Option<(&Sha256Digest, u64)>,
    deriver: Option<PathRef<'_>>,
    references: usize,
) {
    if let Some((hash, size_bytes)) = hash_size {
        let mut hex = [0; 65];
        for (two, byte) in hex.chunks_exact_mut(2).zip(hash.as_bytes()) {
            two.copy_from_slice(&[hex_digit(byte >> 4), hex_digit(byte & 15)]);
        }
        *hex.last_mut().expect("65 bytes") = b'\n';
        out.extend_from_slice(&hex);
        write_number(out, size_bytes);
    }
    match deriver {
        Some(deriver) => write_path(out, dir, deriver),
        None => out.push(b'\n'),
    }
    write_number(out, references as u64);
}

/// Appends the record of a valid path, with its hash.
pub fn write_path_info(out: &mut Vec<u8>, dir: &StoreDir, info: &PathInfo) {
    let deriver = info.deriver.as_ref().map(PathRef::from);
    let references = info.references.iter().map(PathRef::from);
    write_record(out, dir, (&info.path).into(), Some((&info.nar_hash, info.nar_size_bytes)), deriver, references);
}

/// Appends a full path and a line feed.
pub fn write_path(out: &mut Vec<u8>, dir: &StoreDir, path: PathRef<'_>) {
    write_named_path(out, dir, (&path.hash_part().to_text(), path.name()));
}

fn write_named_path(out: &mut Vec<u8>, dir: &StoreDir, (hash_part, name): TextAndName<'_>) {
    out.reserve(dir.as_str().len() + HashPart::TEXT_LEN + name.len() + 3);
    out.extend_from_slice(dir.as_str().as_bytes());
    out.push(b'/');
    out.extend_from_slice(hash_part);
    out.push(b'-');
    out.extend_from_slice(name.as_bytes());
    out.push(b'\n');
}

const fn hex_digit(value: u8) -> u8 {
    if value < 10 { b'0' + value } else { b'a' + value - 10 }
}

fn write_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0; 20];
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
        used += 1;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(digits.split_at(digits.len() - used).1);
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb::texts as arb;
    use crate::test_vectors::cases;
    use proptest::prelude::*;

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    fn parse(form: Form, text: &[u8], cut: usize) -> Result<Vec<Record>, RegistrationError> {
        let dir = dir();
        let mut parser = Parser::new(&dir, form);
        let mut records = Vec::new();
        for piece in text.chunks(cut) {
            parser.push(piece);
            while let Some(record) = parser.next_record()? {
                records.push(record.to_record());
            }
        }
        parser.finish()?;
        Ok(records)
    }

    fn write(records: &[Record]) -> Vec<u8> {
        let mut out = Vec::new();
        for record in records {
            record.write(&mut out, &dir());
        }
        out
    }

    #[test]
    fn validity_vectors() {
        let cases = cases("validity");
        println!("validity: {} cases", cases.len());
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            if let Some(text) = case["text"].as_str() {
                let records = parse(Form::WithHash, text.as_bytes(), 10).unwrap();
                assert_eq!(write(&records), text.as_bytes(), "{id}");
                let paths: Vec<String> = records.iter().map(|r| dir().full(&r.path)).collect();
                assert_eq!(serde_json::json!(paths), case["paths"], "{id}");
                continue;
            }
            let flags: Vec<&str> = case["flags"].as_array().unwrap().iter().filter_map(|f| f.as_str()).collect();
            let form = if flags == ["--register-validity"] { Form::WithoutHash } else { Form::WithHash };
            let parsed = parse(form, case["stdin"].as_str().unwrap().as_bytes(), 10);
            let expected = &case["2.8.0"];
            let message = expected["message"].as_str().unwrap_or_default();
            match id {
                // The text is fine; what it says is not: that is for the store to find.
                "regdb-load-db-missing-ref" | "regdb-register-hash-given" | "regdb-register-missing-file" => {
                    assert!(parsed.is_ok(), "{id}");
                }
                _ if expected["accepted"] == true => {
                    assert_eq!(write(&parsed.unwrap()), expected["dump_db_after"].as_str().unwrap().as_bytes(), "{id}");
                }
                // Nix says what is wrong with the line after, which is not there.
                "regdb-load-db-blank-line" => assert_eq!(parsed.unwrap_err().to_string(), "not an absolute path: ''"),
                // Nix aborts.
                "regdb-load-db-truncated-refs" => assert_eq!(parsed, Err(RegistrationError::MissingInput)),
                "regdb-load-db-negative-count" => assert_eq!(parsed.unwrap_err().to_string(), "number expected"),
                _ => assert_eq!(format!("error: {}", parsed.unwrap_err()), message, "{id}"),
            }
        }
    }

    #[test]
    fn lines_nix_refuses_or_not() {
        const PATH: &str = "/nix/store/0123456789abcdfg0123456789abcdfg-x";
        const HASH: &str = "abababababababababababababababababababababababababababababababab";
        let text = |path: &str, hash: &str, size: &str, deriver: &str, rest: &str| {
            format!("{path}\n{hash}\n{size}\n{deriver}\n{rest}")
        };
        let fine = [
            text(PATH, HASH, "+7", "", "+0\n"),
            text(PATH, HASH, "007", "", "00\n"),
            text(PATH, HASH, "0", "", "0\n"),
            text("//nix/./store//0123456789abcdfg0123456789abcdfg-x/", HASH, "7", "", "0\n"),
            text(PATH, &HASH.to_uppercase(), "18446744073709551615", PATH, &format!("2\n{PATH}\n{PATH}\n")),
        ];
        for text in fine {
            let records = parse(Form::WithHash, text.as_bytes(), 7).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(dir().full(&records[0].path), PATH);
        }
        let md5 = "md5:d41d8cd98f00b204e9800998ecf8427e";
        let refused = [
            (text(PATH, HASH, "", "", "0\n"), "number expected"),
            (text(PATH, HASH, "+", "", "0\n"), "number expected"),
            (text(PATH, HASH, "-1", "", "0\n"), "number expected"),
            (text(PATH, HASH, "1 ", "", "0\n"), "number expected"),
            (text(PATH, HASH, "18446744073709551616", "", "0\n"), "number expected"),
            (text(PATH, HASH, "1", "", "4294967296\n"), "number expected"),
            (text(PATH, HASH, "1", "", "\n"), "number expected"),
            (
                text(PATH, HASH, "1", "", "2000000\n"),
                "path '/nix/store/0123456789abcdfg0123456789abcdfg-x' claims to have 2000000 references, \
                 more than the 1048576 allowed",
            ),
            (text(PATH, md5, "1", "", "0\n"), "hash 'md5:d41d8cd98f00b204e9800998ecf8427e' should have type 'sha256'"),
            (text("", HASH, "1", "", "0\n"), "not an absolute path: ''"),
            (text(PATH, HASH, "1", "", &format!("1\n{PATH}")), "missing input"),
            // Nix drops this one in silence.
            (PATH.to_owned(), "missing input"),
            (text("/gnu/store/x", HASH, "1", "", "0\n"), "path '/gnu/store/x' is not in the Nix store"),
        ];
        for (text, message) in refused {
            assert_eq!(parse(Form::WithHash, text.as_bytes(), 7).unwrap_err().to_string(), message, "{text}");
        }
        let endless = vec![b'/'; MAX_LINE + 2];
        assert!(matches!(parse(Form::WithHash, &endless, 1000), Err(RegistrationError::LongLine { .. })));
    }

    proptest! {
        /// What is written reads back, however the text is cut.
        #[test]
        fn reads_what_it_writes(
            (form, records) in arb::form().prop_flat_map(|f| (Just(f), prop::collection::vec(arb::record(f), 0..6))),
            cut in 1usize..300,
        ) {
            let text = write(&records);
            prop_assert_eq!(parse(form, &text, cut), Ok(records.clone()));
            prop_assert_eq!(parse(form, &text, usize::MAX), Ok(records));
        }

        /// A spoiled text gives records or an error, the same at any cut; what it gives reads back.
        #[test]
        fn spoiled_text_is_an_error_or_other_records(
            (form, text) in arb::form().prop_flat_map(|f| {
                let texts = prop::collection::vec(arb::record(f), 1..4).prop_map(|records| write(&records));
                (Just(f), texts.prop_flat_map(arb::spoiled))
            }),
            cut in 1usize..300,
        ) {
            let whole = parse(form, &text, usize::MAX);
            prop_assert_eq!(&parse(form, &text, cut), &whole);
            if let Ok(records) = whole {
                prop_assert_eq!(parse(form, &write(&records), cut), Ok(records));
            }
        }
    }
}
