//! The export stream of `nix-store --export` and `--import`: all of it but the NARs.
//!
//! ```text
//! stream = { u64(1) object } u64(0)
//! object = nar u64(0x4558494e) str(path) u64(n) { str(reference) } str(deriver or "") u64(0)
//! ```
//! Source: formats, section 7.1; `export.json`, `import.json`, and runs of 2.8.0.
//!
//! A reader asks [`Lead`] what comes, gives an object's bytes to a NAR parser until that has its
//! last byte, then gives what follows to a [`Trailer`], and begins again. Each of them says how
//! many bytes it took. Lengths are checked against a limit before anything is allocated, and
//! memory grows only with bytes that came.
//!
//! Accepted as Nix does: references in any order and repeated, paths in an odd spelling (`//`), a
//! signature of old (flag 1), any other flag. Words beyond 32 bits where Nix reads 32 are errors.

use std::collections::BTreeSet;

use crate::registration::PathRef;
use crate::store_dir::StoreDir;
use crate::store_path::{StorePath, StorePathError};

/// Stands between a NAR and its path: `NIXE`.
pub const MAGIC: u64 = 0x4558_494e;

/// Longest string read, in bytes: paths are far shorter, and so were signatures.
pub const MAX_STRING: u64 = 64 << 10;

/// Most references of one object.
pub const MAX_REFERENCES: u64 = 1 << 20;

/// What is wrong with an export stream. The texts are those of Nix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    #[error("input doesn't look like something created by 'nix-store --export'")]
    Lead { found: u64 },
    #[error("Nix archive cannot be imported; wrong format")]
    Magic { found: u64 },
    #[error("serialised integer {found} is too large for type 'j'")]
    Integer { found: u64 },
    #[error("non-zero padding")]
    Padding,
    #[error("string is too long")]
    LongString { length: u64 },
    #[error("object claims to have {count} references, more than the {MAX_REFERENCES} allowed")]
    References { count: u64 },
    #[error(transparent)]
    Path(#[from] StorePathError),
    /// Said by the caller, who knows when its input ends.
    #[error("unexpected end-of-file")]
    UnexpectedEnd,
}

/// What a reader did with the bytes given to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<T> {
    /// It took all of them and needs more.
    More,
    /// It took so many of them and is done.
    Done { taken: usize, value: T },
}

/// Collects the 8 bytes of a word.
#[derive(Debug, Clone, Default)]
struct Word {
    bytes: [u8; 8],
    have: usize,
}

impl Word {
    /// Takes bytes off `input` until the word is whole.
    fn take(&mut self, input: &mut &[u8]) -> Option<u64> {
        let free = self.bytes.get_mut(self.have..).unwrap_or_default();
        let (now, rest) = input.split_at(free.len().min(input.len()));
        free.split_at_mut(now.len()).0.copy_from_slice(now);
        *input = rest;
        self.have += now.len();
        (self.have == 8).then(|| {
            self.have = 0;
            u64::from_le_bytes(self.bytes)
        })
    }
}

/// What comes next in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// A NAR, then its trailer.
    Object,
    /// Nothing: whatever follows is ignored.
    End,
}

/// Reads the word before each object.
#[derive(Debug, Clone, Default)]
pub struct Lead(Word);

impl Lead {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn push(&mut self, bytes: &[u8]) -> Result<Step<Next>, ExportError> {
        let mut rest = bytes;
        let value = match self.0.take(&mut rest) {
            None => return Ok(Step::More),
            Some(0) => Next::End,
            Some(1) => Next::Object,
            Some(found) => return Err(ExportError::Lead { found }),
        };
        Ok(Step::Done { taken: bytes.len() - rest.len(), value })
    }
}

/// What a stream says of an object, after its NAR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub path: StorePath,
    /// May hold the path itself.
    pub references: BTreeSet<StorePath>,
    pub deriver: Option<StorePath>,
}

/// Which string is being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Text {
    Path,
    Reference { left: u64 },
    Deriver,
    Signature,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Magic,
    Length(Text),
    /// So many bytes of it are missing, padding and all; `length` are its own.
    Body {
        text: Text,
        length: usize,
        missing: usize,
    },
    Count,
    Flag,
    Done,
}

/// Reads what follows the NAR of an object.
///
/// ```
/// use larder_core::{export::{Step, Trailer}, store_dir::StoreDir};
/// let dir = StoreDir::new("/nix/store")?;
/// let path = dir.parse("/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x")?;
/// let mut bytes = Vec::new();
/// larder_core::export::write_trailer(&mut bytes, &dir, (&path).into(), std::iter::empty(), None);
/// let Step::Done { taken, value } = Trailer::new(&dir).push(&bytes)? else { panic!() };
/// assert_eq!((taken, value.path), (bytes.len(), path));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Trailer<'d> {
    dir: &'d StoreDir,
    field: Field,
    word: Word,
    text: Vec<u8>,
    path: Option<StorePath>,
    references: BTreeSet<StorePath>,
    deriver: Option<StorePath>,
}

impl<'d> Trailer<'d> {
    pub fn new(dir: &'d StoreDir) -> Self {
        Self {
            dir,
            field: Field::Magic,
            word: Word::default(),
            text: Vec::new(),
            path: None,
            references: BTreeSet::new(),
            deriver: None,
        }
    }

    /// Takes bytes up to the end of the trailer. After [`Step::Done`] it takes no more.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Step<Object>, ExportError> {
        let mut rest = bytes;
        while self.field != Field::Done {
            if !self.step(&mut rest)? {
                return Ok(Step::More);
            }
        }
        let Some(path) = self.path.take() else { return Ok(Step::More) };
        let value = Object { path, references: std::mem::take(&mut self.references), deriver: self.deriver.take() };
        Ok(Step::Done { taken: bytes.len() - rest.len(), value })
    }

    /// Reads one field; `false` if it is not whole yet.
    fn step(&mut self, rest: &mut &[u8]) -> Result<bool, ExportError> {
        if let Field::Body { text, length, missing } = self.field {
            let (now, after) = rest.split_at(missing.min(rest.len()));
            self.text.extend_from_slice(now);
            *rest = after;
            let missing = missing - now.len();
            if missing > 0 {
                self.field = Field::Body { text, length, missing };
                return Ok(false);
            }
            let (body, padding) = self.text.split_at(length);
            if padding.iter().any(|b| *b != 0) {
                return Err(ExportError::Padding);
            }
            self.field = match text {
                Text::Path => {
                    self.path = Some(self.dir.parse(body)?);
                    Field::Count
                }
                Text::Reference { left } => {
                    self.references.insert(self.dir.parse(body)?);
                    references(left - 1)
                }
                Text::Deriver => {
                    self.deriver = if body.is_empty() { None } else { Some(self.dir.parse(body)?) };
                    Field::Flag
                }
                Text::Signature => Field::Done,
            };
            return Ok(true);
        }
        let Some(word) = self.word.take(rest) else { return Ok(false) };
        self.field = match self.field {
            Field::Magic if word == MAGIC => Field::Length(Text::Path),
            Field::Magic => return Err(small(word).map_or_else(|e| e, |found| ExportError::Magic { found })),
            Field::Length(text) => {
                let length = usize::try_from(word).ok().filter(|_| word <= MAX_STRING);
                let length = length.ok_or(ExportError::LongString { length: word })?;
                self.text.clear();
                Field::Body { text, length, missing: length.next_multiple_of(8) }
            }
            Field::Count if word > MAX_REFERENCES => return Err(ExportError::References { count: word }),
            Field::Count => references(word),
            Field::Flag if small(word)? == 1 => Field::Length(Text::Signature),
            field => {
                debug_assert_eq!(field, Field::Flag);
                Field::Done
            }
        };
        Ok(true)
    }
}

/// The field after the count of references, or after one of them.
const fn references(left: u64) -> Field {
    if left == 0 { Field::Length(Text::Deriver) } else { Field::Length(Text::Reference { left }) }
}

fn small(word: u64) -> Result<u64, ExportError> {
    if u32::try_from(word).is_ok() { Ok(word) } else { Err(ExportError::Integer { found: word }) }
}

/// Appends the word before an object, or at the end.
pub fn write_lead(out: &mut Vec<u8>, next: Next) {
    out.extend_from_slice(&u64::from(next == Next::Object).to_le_bytes());
}

/// Appends what follows the NAR of an object. References must come sorted.
pub fn write_trailer<'a>(
    out: &mut Vec<u8>,
    dir: &StoreDir,
    path: PathRef<'_>,
    references: impl ExactSizeIterator<Item = PathRef<'a>>,
    deriver: Option<PathRef<'_>>,
) {
    out.extend_from_slice(&MAGIC.to_le_bytes());
    write_path(out, dir, path);
    out.extend_from_slice(&(references.len() as u64).to_le_bytes());
    references.for_each(|reference| write_path(out, dir, reference));
    match deriver {
        Some(deriver) => write_path(out, dir, deriver),
        None => out.extend_from_slice(&[0; 8]),
    }
    out.extend_from_slice(&[0; 8]);
}

fn write_path(out: &mut Vec<u8>, dir: &StoreDir, path: PathRef<'_>) {
    let length = dir.as_str().len() + 34 + path.name().len();
    out.extend_from_slice(&(length as u64).to_le_bytes());
    for piece in [dir.as_str().as_bytes(), b"/", &path.hash_part().to_text(), b"-", path.name().as_bytes()] {
        out.extend_from_slice(piece);
    }
    out.extend_from_slice([0u8; 7].split_at(length.next_multiple_of(8) - length).0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb::texts as arb;
    use crate::hash::Sha256Digest;
    use crate::registration;
    use crate::test_vectors::{base64, cases};
    use proptest::prelude::*;

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    /// Length of the NAR at the front: counts brackets, as the real parser is another's business.
    fn nar_len(bytes: &[u8]) -> Result<usize, String> {
        let (mut at, mut depth) = (0, 0);
        loop {
            let word = bytes.get(at..at + 8).ok_or("end")?;
            let length = usize::try_from(u64::from_le_bytes(word.try_into().unwrap())).unwrap();
            let text = bytes.get(at + 8..at + 8 + length).ok_or("end")?;
            at += 8 + length.next_multiple_of(8);
            match text {
                b"(" => depth += 1,
                b")" if depth == 1 => return Ok(at),
                b")" => depth -= 1,
                b"REGULAR" => return Err("bad archive: unknown file type REGULAR".into()),
                _ => {}
            }
        }
    }

    /// Reads with pieces of a given size; the second value is how far it came.
    fn push_all<T>(
        bytes: &[u8],
        cut: usize,
        mut push: impl FnMut(&[u8]) -> Result<Step<T>, ExportError>,
    ) -> Result<(T, usize), ExportError> {
        let mut at = 0;
        for piece in bytes.chunks(cut) {
            match push(piece)? {
                Step::More => at += piece.len(),
                Step::Done { taken, value } => return Ok((value, at + taken)),
            }
        }
        Err(ExportError::UnexpectedEnd)
    }

    type Objects = Vec<(Object, Vec<u8>)>;

    fn read(stream: &[u8], cut: usize) -> (Objects, Result<(), String>) {
        let mut objects = Vec::new();
        let done = read_into(stream, cut, &mut objects);
        (objects, done)
    }

    fn read_into(mut rest: &[u8], cut: usize, objects: &mut Objects) -> Result<(), String> {
        loop {
            let mut lead = Lead::new();
            let (next, taken) = push_all(rest, cut, |piece| lead.push(piece)).map_err(|e| e.to_string())?;
            rest = &rest[taken..];
            if next == Next::End {
                return Ok(());
            }
            let (nar, after) = rest.split_at(nar_len(rest)?);
            let dir = dir();
            let mut trailer = Trailer::new(&dir);
            let (object, taken) = push_all(after, cut, |piece| trailer.push(piece)).map_err(|e| e.to_string())?;
            rest = &after[taken..];
            objects.push((object, nar.to_vec()));
        }
    }

    fn write(objects: &Objects) -> Vec<u8> {
        let mut out = Vec::new();
        for (object, nar) in objects {
            write_lead(&mut out, Next::Object);
            out.extend_from_slice(nar);
            write_object(&mut out, object);
        }
        write_lead(&mut out, Next::End);
        out
    }

    fn write_object(out: &mut Vec<u8>, object: &Object) {
        let references = object.references.iter().map(PathRef::from);
        write_trailer(out, &dir(), (&object.path).into(), references, object.deriver.as_ref().map(PathRef::from));
    }

    #[test]
    fn export_vectors() {
        let cases = cases("export");
        println!("export: {} cases", cases.len());
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let stream = base64(&case["stream_b64"]);
            for cut in [1, 7, 8, 64, usize::MAX] {
                let (objects, done) = read(&stream, cut);
                assert_eq!(done, Ok(()), "{id}");
                assert_eq!(write(&objects), stream, "{id}");
                for (object, nar) in &objects {
                    let path = dir().full(&object.path);
                    let infos = case["path_infos"].as_array().unwrap();
                    let info = infos.iter().find(|i| i["path"] == *path).unwrap();
                    assert_eq!(info["nar_hash_nix32"], Sha256Digest::of(nar).to_string(), "{id}");
                    let references: Vec<String> = object.references.iter().map(|r| dir().full(r)).collect();
                    assert_eq!(info["references"], serde_json::json!(references), "{id}");
                    let deriver = object.deriver.as_ref().map_or("unknown-deriver".into(), |d| dir().full(d));
                    assert_eq!(info["deriver"], deriver, "{id}");
                }
            }
        }
    }

    #[test]
    fn import_vectors() {
        let cases = cases("import");
        println!("import: {} cases", cases.len());
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let (objects, done) = read(&base64(&case["stream_b64"]), 5);
            let expected = &case["2.8.0"];
            match id {
                // The store finds this.
                "import-missing-reference" => assert_eq!(done, Ok(())),
                // Nix 2.8 words errors of base names in another way.
                "import-path-bad-name" => assert!(done.unwrap_err().contains("illegal character '~'")),
                _ if expected["accepted"] == true => {
                    assert_eq!(done, Ok(()), "{id}");
                    let printed: Vec<String> = objects.iter().map(|(o, _)| dir().full(&o.path)).collect();
                    let wanted: Vec<&str> = expected["stdout"].as_str().unwrap().lines().collect();
                    assert_eq!(printed, wanted, "{id}");
                    for (object, nar) in &objects {
                        let mut record = Vec::new();
                        let hash = (&Sha256Digest::of(nar), nar.len() as u64);
                        let references = object.references.iter().map(PathRef::from);
                        let deriver = object.deriver.as_ref().map(PathRef::from);
                        let path = (&object.path).into();
                        registration::write_record(&mut record, &dir(), path, Some(hash), deriver, references);
                        let record = String::from_utf8(record).unwrap();
                        assert!(expected["dump_db"].as_str().unwrap().contains(&record), "{id}");
                    }
                }
                _ => assert_eq!(expected["message"], format!("error: {}", done.unwrap_err()), "{id}"),
            }
        }
    }

    /// Seen with 2.8.0.
    #[test]
    fn odd_words() {
        let string = |text: &[u8]| {
            let mut out = (text.len() as u64).to_le_bytes().to_vec();
            out.extend_from_slice(text);
            out.resize(out.len().next_multiple_of(8), 0);
            out
        };
        let word = |n: u64| n.to_le_bytes().to_vec();
        let path = string(b"/nix/store/66666666666666666666666666666666-s");
        let with = |at: usize, new: Vec<u8>| {
            let mut fields = [word(MAGIC), path.clone(), word(0), word(0), word(0)];
            fields[at] = new;
            let dir = dir();
            let mut trailer = Trailer::new(&dir);
            push_all(&fields.concat(), 3, |piece| trailer.push(piece)).map(|_| ()).map_err(|e| e.to_string())
        };
        let fine = [
            with(4, word(2)),
            with(4, [word(1), string(&[b'x'; 999])].concat()),
            with(1, string(b"//nix/store/66666666666666666666666666666666-s/")),
            with(2, [word(2), path.clone(), path.clone()].concat()),
        ];
        assert!(fine.iter().all(Result::is_ok), "{fine:?}");
        for (at, field, message) in [
            (4, word(1 << 32), "serialised integer 4294967296 is too large for type 'j'"),
            (0, word(MAGIC + (1 << 32)), "serialised integer 5458381134 is too large for type 'j'"),
            (0, word(7), "Nix archive cannot be imported; wrong format"),
            (4, word(1), "unexpected end-of-file"),
            (1, word(1 << 40), "string is too long"),
            (2, word(1 << 62), "object claims to have 4611686018427387904 references, more than the 1048576 allowed"),
            (1, [word(1), b"/\0\0\0\0\0\0\x01".to_vec()].concat(), "non-zero padding"),
        ] {
            assert_eq!(with(at, field), Err(message.to_owned()));
        }
        assert_eq!(
            Lead::new().push(&word(2)).unwrap_err().to_string(),
            "input doesn't look like something created by 'nix-store --export'"
        );
    }

    proptest! {
        /// A trailer reads back and leaves what follows, however it is cut.
        #[test]
        fn trailers_read_back(object in arb::object(), after in any::<Vec<u8>>(), cut in 1usize..100) {
            let mut bytes = Vec::new();
            write_object(&mut bytes, &object);
            let end = bytes.len();
            bytes.extend(after);
            let dir = dir();
            let mut trailer = Trailer::new(&dir);
            prop_assert_eq!(push_all(&bytes, cut, |piece| trailer.push(piece)), Ok((object, end)));
        }

        /// A spoiled trailer is an error or another object, the same at any cut.
        #[test]
        fn spoiled_trailers(
            bytes in arb::object().prop_flat_map(|object| {
                let mut bytes = Vec::new();
                write_object(&mut bytes, &object);
                arb::spoiled(bytes)
            }),
            cut in 1usize..100,
        ) {
            let dir = dir();
            let (mut whole, mut cuts) = (Trailer::new(&dir), Trailer::new(&dir));
            let wanted = push_all(&bytes, usize::MAX, |piece| whole.push(piece));
            prop_assert_eq!(push_all(&bytes, cut, |piece| cuts.push(piece)), wanted);
        }
    }
}
