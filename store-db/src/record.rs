//! The record of a valid path: its bytes, and a view of them without copies.
//!
//! It lies in three tables, so that what is asked most is on the fewest pages (see
//! `docs/db-format.md`); the hash part is the key of each and not repeated:
//!
//! ```text
//! paths:      version u8 | flags u8 | NAR hash 32 | NAR size u64 LE | registration time u64 LE
//!             | name length u8 | name
//!             | deriver: hash part 20, shared prefix u8 [, rest length u8, rest]      (by flags)
//! references: hash parts, 20 bytes each, ascending                                    (by flags)
//! details:    version u8 | content address: 0, or 1 + kind, and digest
//!             | signatures, each: length * 2 + packed varint, text [, 64 bytes]       (by flags)
//! ```
//!
//! A hand-made form rather than serde's, as the fixed fields lie at fixed places and nothing is
//! copied to read them.

use std::collections::BTreeSet;
use std::fmt;

use larder_core::content_address::{ContentAddress, Method};
use larder_core::hash::{Algorithm, Hash, Sha256Digest, encode_base64};
use larder_core::hash_part::HashPart;
use larder_core::signature::Signature;
pub use larder_core::store_path::PathRef;
use larder_core::store_path::{Name, StorePath, check_name};

use crate::codec::{Input, put_varint};

/// The version byte that begins a record.
const VERSION: u8 = 1;

const ULTIMATE: u8 = 1;
/// The deriver's name is the shared prefix and `.drv`.
const DERIVER_SHORT: u8 = 2;
/// The deriver's name is the shared prefix and the rest that follows.
const DERIVER_LONG: u8 = 4;
/// There is a row in the references.
const REFERENCES: u8 = 8;
/// There is a row in the details.
const DETAILS: u8 = 16;

/// Why bytes are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    #[error("it ends too early")]
    Short,
    #[error("it has version {0}, which is unknown")]
    Version(u8),
    #[error("its {0} is impossible")]
    Field(&'static str),
}

/// A deriver as a record keeps it: the name in two pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeriverView<'a> {
    pub hash_part: HashPart,
    pub name: [&'a str; 2],
}

impl DeriverView<'_> {
    pub fn to_store_path(self) -> Result<StorePath, RecordError> {
        let name = Name::new(&self.name.concat()).map_err(|_| RecordError::Field("deriver"))?;
        Ok(StorePath::new(self.hash_part, name))
    }

    /// Is it this path?
    pub fn is(self, path: PathRef<'_>) -> bool {
        let [prefix, rest] = self.name;
        self.hash_part == path.hash_part() && path.name().strip_prefix(prefix) == Some(rest)
    }
}

impl fmt::Display for DeriverView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [prefix, rest] = self.name;
        write!(f, "{}-{prefix}{rest}", self.hash_part)
    }
}

/// One signature: `NAME:` and the text or the bytes that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SignatureView<'a> {
    Packed { key_name: &'a str, bytes: &'a [u8; 64] },
    Text(&'a str),
}

impl fmt::Display for SignatureView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Packed { key_name, bytes } => write!(f, "{key_name}:{}", encode_base64(*bytes)),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// What the ledger knows of a valid path, borrowed from the page it lies on: all but references,
/// signatures and content address.
#[derive(Debug, Clone, Copy)]
pub struct RecordView<'a> {
    path: PathRef<'a>,
    flags: u8,
    pub nar_hash: Sha256Digest,
    pub nar_size_bytes: u64,
    /// Seconds since 1970.
    pub registration_time_s: u64,
    deriver: Option<DeriverView<'a>>,
}

impl<'a> RecordView<'a> {
    pub(crate) fn parse(key: &[u8; 20], bytes: &'a [u8]) -> Result<Self, RecordError> {
        let mut input = Input(bytes);
        check_version(&mut input)?;
        Self::parse_body(key, input).ok_or(RecordError::Short)?
    }

    fn parse_body(key: &[u8; 20], mut input: Input<'a>) -> Option<Result<Self, RecordError>> {
        let flags = input.byte()?;
        let nar_hash = Sha256Digest(*input.array()?);
        let nar_size_bytes = u64::from_le_bytes(*input.array()?);
        let registration_time_s = u64::from_le_bytes(*input.array()?);
        let len = usize::from(input.byte()?);
        let name = input.take(len)?;
        let Some(name) = check_name(name).ok().and_then(|()| str::from_utf8(name).ok()) else {
            return Some(Err(RecordError::Field("name")));
        };
        let deriver = if flags & (DERIVER_SHORT | DERIVER_LONG) == 0 {
            None
        } else {
            let hash_part = HashPart::from_bytes(*input.array()?);
            let shared = usize::from(input.byte()?);
            let rest = if flags & DERIVER_SHORT != 0 {
                Some(".drv")
            } else {
                let len = usize::from(input.byte()?);
                str::from_utf8(input.take(len)?).ok()
            };
            match (name.get(..shared), rest) {
                (Some(prefix), Some(rest)) => Some(DeriverView { hash_part, name: [prefix, rest] }),
                _ => return Some(Err(RecordError::Field("deriver"))),
            }
        };
        if !input.0.is_empty() {
            return Some(Err(RecordError::Field("length")));
        }
        let path = PathRef::trusted(HashPart::from_bytes(*key), name);
        Some(Ok(Self { path, flags, nar_hash, nar_size_bytes, registration_time_s, deriver }))
    }

    pub const fn path(&self) -> PathRef<'a> {
        self.path
    }

    /// Built here, so trusted without signatures.
    pub const fn ultimate(&self) -> bool {
        self.flags & ULTIMATE != 0
    }

    pub const fn deriver(&self) -> Option<DeriverView<'a>> {
        self.deriver
    }

    pub(crate) const fn has_references(&self) -> bool {
        self.flags & REFERENCES != 0
    }

    pub(crate) const fn has_details(&self) -> bool {
        self.flags & DETAILS != 0
    }
}

fn check_version(input: &mut Input<'_>) -> Result<(), RecordError> {
    match input.byte() {
        Some(VERSION) => Ok(()),
        Some(other) => Err(RecordError::Version(other)),
        None => Err(RecordError::Short),
    }
}

/// Hash parts of the references of one path, ascending; may hold the path itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReferencesView<'a>(pub(crate) &'a [[u8; 20]]);

impl<'a> ReferencesView<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, RecordError> {
        let (keys, rest) = bytes.as_chunks::<20>();
        if rest.is_empty() && keys.is_sorted_by(|a, b| a < b) {
            Ok(Self(keys))
        } else {
            Err(RecordError::Field("list of references"))
        }
    }

    pub const fn len(self) -> usize {
        self.0.len()
    }

    pub const fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    pub fn iter(self) -> impl ExactSizeIterator<Item = HashPart> + use<'a> {
        self.0.iter().map(|bytes| HashPart::from_bytes(*bytes))
    }

    pub fn contains(self, path: HashPart) -> bool {
        self.0.binary_search(path.as_bytes()).is_ok()
    }
}

/// What few paths have, or few ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Details {
    pub(crate) content_address: Option<ContentAddress>,
    pub(crate) signatures: BTreeSet<Signature>,
}

impl Details {
    pub(crate) fn is_empty(&self) -> bool {
        self.content_address.is_none() && self.signatures.is_empty()
    }

    /// Replaces `out` by the value of the details table.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.clear();
        out.push(VERSION);
        match &self.content_address {
            None => out.push(0),
            Some(address) => put_content_address(out, address),
        }
        for signature in &self.signatures {
            put_signature(out, signature);
        }
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, RecordError> {
        let mut input = Input(bytes);
        check_version(&mut input)?;
        let content_address = match input.byte().ok_or(RecordError::Short)? {
            0 => None,
            kind => Some(read_content_address(kind, &mut input).ok_or(RecordError::Field("content address"))?),
        };
        let mut signatures = BTreeSet::new();
        while !input.0.is_empty() {
            let signature = read_signature(&mut input).ok_or(RecordError::Field("signature"))?;
            signatures.insert(signature.to_string().parse().map_err(|_| RecordError::Field("signature"))?);
        }
        Ok(Self { content_address, signatures })
    }
}

/// A whole record with its own memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) path: StorePath,
    pub(crate) nar_hash: Sha256Digest,
    pub(crate) nar_size_bytes: u64,
    pub(crate) registration_time_s: u64,
    pub(crate) ultimate: bool,
    /// Ascending, no duplicates.
    pub(crate) references: Vec<[u8; 20]>,
    pub(crate) deriver: Option<StorePath>,
    pub(crate) details: Details,
}

impl Record {
    pub(crate) fn fields(&self) -> Fields<'_> {
        Fields {
            name: self.path.name().as_str(),
            nar_hash: &self.nar_hash,
            nar_size_bytes: self.nar_size_bytes,
            registration_time_s: self.registration_time_s,
            ultimate: self.ultimate,
            deriver: self.deriver.as_ref().map(PathRef::from),
            has_references: !self.references.is_empty(),
            has_details: !self.details.is_empty(),
        }
    }
}

/// A row of the paths before it is written, borrowed.
pub(crate) struct Fields<'a> {
    pub(crate) name: &'a str,
    pub(crate) nar_hash: &'a Sha256Digest,
    pub(crate) nar_size_bytes: u64,
    pub(crate) registration_time_s: u64,
    pub(crate) ultimate: bool,
    pub(crate) deriver: Option<PathRef<'a>>,
    pub(crate) has_references: bool,
    pub(crate) has_details: bool,
}

impl Fields<'_> {
    /// Replaces `out` by the row.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let deriver = self.deriver.map(|deriver| (deriver, shared_prefix(self.name, deriver.name())));
        let flag = |on: bool, flag: u8| if on { flag } else { 0 };
        let flags = flag(self.ultimate, ULTIMATE)
            | flag(self.has_references, REFERENCES)
            | flag(self.has_details, DETAILS)
            | deriver.map_or(0, |(_, (_, rest))| if rest == ".drv" { DERIVER_SHORT } else { DERIVER_LONG });
        out.clear();
        out.extend_from_slice(&[VERSION, flags]);
        out.extend_from_slice(self.nar_hash.as_bytes());
        out.extend_from_slice(&self.nar_size_bytes.to_le_bytes());
        out.extend_from_slice(&self.registration_time_s.to_le_bytes());
        put_short(out, self.name);
        if let Some((deriver, (shared, rest))) = deriver {
            out.extend_from_slice(deriver.hash_part().as_bytes());
            out.push(shared);
            if rest != ".drv" {
                put_short(out, rest);
            }
        }
    }
}

/// A legal name is at most 211 bytes long.
fn put_short(out: &mut Vec<u8>, text: &str) {
    out.push(u8::try_from(text.len()).expect("a legal name is shorter than 256 bytes"));
    out.extend_from_slice(text.as_bytes());
}

/// How much of its beginning `name` shares with `own`, and what remains.
fn shared_prefix<'a>(own: &str, name: &'a str) -> (u8, &'a str) {
    let mut shared = own.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
    // The short form is wanted for `x.d` derived by `x.drv` too.
    if let Some(stem) = name.strip_suffix(".drv") {
        shared = shared.min(stem.len());
    }
    (u8::try_from(shared).expect("a legal name is shorter than 256 bytes"), name.get(shared..).unwrap_or_default())
}

fn put_content_address(out: &mut Vec<u8>, address: &ContentAddress) {
    match address {
        ContentAddress::Text(digest) => {
            out.push(1);
            out.extend_from_slice(digest.as_bytes());
        }
        ContentAddress::Fixed(method, hash) => {
            let method = match method {
                Method::Flat => 0u8,
                Method::Recursive => 1,
                Method::Git => 2,
            };
            let algorithm = match hash.algorithm() {
                Algorithm::Md5 => 0u8,
                Algorithm::Sha1 => 1,
                Algorithm::Sha256 => 2,
                Algorithm::Sha512 => 3,
            };
            out.push(2 + method * 4 + algorithm);
            out.extend_from_slice(hash.as_bytes());
        }
    }
}

/// Reads the digest of a kind, which is not 0.
fn read_content_address(kind: u8, input: &mut Input<'_>) -> Option<ContentAddress> {
    let Some(kind) = kind.checked_sub(2) else { return Some(ContentAddress::Text(Sha256Digest(*input.array()?))) };
    let method = match kind / 4 {
        0 => Method::Flat,
        1 => Method::Recursive,
        2 => Method::Git,
        _ => return None,
    };
    let algorithm = match kind % 4 {
        0 => Algorithm::Md5,
        1 => Algorithm::Sha1,
        2 => Algorithm::Sha256,
        _ => Algorithm::Sha512,
    };
    Some(ContentAddress::Fixed(method, Hash::new(algorithm, input.take(algorithm.size())?)?))
}

fn put_signature(out: &mut Vec<u8>, signature: &Signature) {
    let (text, key_name) = (signature.as_str(), signature.key_name());
    // Base 64 has more than one text for 64 bytes (padding); only the usual one is packed.
    let packed = signature
        .bytes()
        .filter(|bytes| text.get(key_name.len() + 1..).is_some_and(|encoded| encoded == encode_base64(bytes)));
    if let Some(bytes) = packed {
        put_varint(out, key_name.len() as u64 * 2 + 1);
        out.extend_from_slice(key_name.as_bytes());
        out.extend_from_slice(&bytes);
    } else {
        put_varint(out, text.len() as u64 * 2);
        out.extend_from_slice(text.as_bytes());
    }
}

fn read_signature<'a>(input: &mut Input<'a>) -> Option<SignatureView<'a>> {
    let head = input.varint()?;
    let text = str::from_utf8(input.take(usize::try_from(head / 2).ok()?)?).ok()?;
    if head % 2 == 0 {
        return Some(SignatureView::Text(text));
    }
    Some(SignatureView::Packed { key_name: text, bytes: input.array()? })
}

/// The value that names an output of a derivation: a hash part, and the name where it is not the
/// usual `NAME` or `NAME-OUTPUT`.
pub(crate) fn encode_output(out: &mut Vec<u8>, derivation_name: &str, output: &str, path: PathRef<'_>) {
    out.clear();
    out.extend_from_slice(path.hash_part().as_bytes());
    if !is_usual_output(derivation_name, output, path.name()) {
        out.extend_from_slice(path.name().as_bytes());
    }
}

fn is_usual_output(derivation_name: &str, output: &str, name: &str) -> bool {
    let stem = derivation_name.strip_suffix(".drv").unwrap_or(derivation_name);
    match name.strip_prefix(stem) {
        Some("") => output == "out",
        Some(rest) => output != "out" && rest.strip_prefix('-') == Some(output),
        None => false,
    }
}

/// Reads what [`encode_output`] wrote.
pub(crate) fn read_output(derivation_name: &str, output: &str, bytes: &[u8]) -> Result<StorePath, RecordError> {
    let (hash_part, name) = bytes.split_first_chunk::<20>().ok_or(RecordError::Short)?;
    let wrong = || RecordError::Field("output name");
    let name = if name.is_empty() {
        let stem = derivation_name.strip_suffix(".drv").unwrap_or(derivation_name);
        Name::new(stem).and_then(|stem| stem.for_output(output)).map_err(|_| wrong())?
    } else {
        let text = str::from_utf8(name).map_err(|_| wrong())?;
        Name::new(text).map_err(|_| wrong())?
    };
    Ok(StorePath::new(HashPart::from_bytes(*hash_part), name))
}
