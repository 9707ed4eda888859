//! What a binary cache says of a path (`.narinfo`) and of itself (`nix-cache-info`).
//!
//! Source: formats, sections 8.2 and 8.3; `narinfo.json`, `narinfo_parse.json`, `cache_info.json`.
//!
//! The parser keeps Nix's quirks, as caches in the wild rely on them: the character after the
//! colon is skipped whatever it is, a value directly after it is the next line's, the last line
//! feed must be there, blank lines spoil the key after them. Stricter than Nix: the hash of the
//! NAR must be SHA-256. A signature of no form is dropped, for it can never be good.

use std::collections::BTreeSet;

use crate::content_address::{ContentAddress, ContentAddressError};
use crate::hash::{Hash, Sha256Digest};
use crate::hash_part::HashPart;
use crate::path_info::PathInfo;
use crate::signature::Signature;
use crate::store_dir::StoreDir;
use crate::store_path::{Name, StorePath, StorePathError};

/// A file with more bytes is none of ours; the longest real ones have some 100 KiB.
pub const MAX_LEN: usize = 16 << 20;

/// The record of a path in a binary cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NarInfo {
    /// Registration time and `ultimate` are not said: 0 and false.
    pub info: PathInfo,
    /// Where the NAR is, relative to the cache or absolute; not empty.
    pub url: String,
    /// How the NAR is compressed, as the file says; whether we know it shows when it is read.
    pub compression: String,
    /// Hash of the compressed file: for information only.
    pub file_hash: Option<Hash>,
    pub file_size_bytes: Option<u64>,
}

/// What is wrong with a `.narinfo` file, named as the cache names it. The texts are those of 2.26.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NarInfoError {
    #[error("NAR info file '{file}' is corrupt: {problem}")]
    Corrupt { file: String, problem: Problem },
    #[error(transparent)]
    Path(#[from] StorePathError),
    #[error(transparent)]
    ContentAddress(#[from] ContentAddressError),
}

/// Why a `.narinfo` file is corrupt. Lines count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    #[error("expecting ':' at line {line}")]
    NoColon { line: u64 },
    #[error("expecting '\\n' at line {line}")]
    NoLineFeed { line: u64 },
    #[error("bad hash at line {line}")]
    Hash { line: u64 },
    #[error("invalid {key} at line {line}")]
    Number { key: &'static str, line: u64 },
    #[error("extra {key} at line {line}")]
    Extra { key: &'static str, line: u64 },
    #[error("{key} is not UTF-8 at line {line}")]
    Encoding { key: &'static str, line: u64 },
    #[error("{key} missing")]
    Missing { key: &'static str },
    #[error("NarSize missing or zero")]
    NoSize,
    #[error("it is longer than {MAX_LEN} bytes")]
    TooLong,
}

impl NarInfo {
    /// Reads the bytes of a file. `file` names it in errors: `<hash part>.narinfo`.
    ///
    /// Ask [`NarInfo::answers`] whether it is about the path that was asked for.
    pub fn parse(dir: &StoreDir, text: &[u8], file: &str) -> Result<Self, NarInfoError> {
        let corrupt = |problem| NarInfoError::Corrupt { file: file.to_owned(), problem };
        if text.len() > MAX_LEN {
            return Err(corrupt(Problem::TooLong));
        }
        let mut draft = Draft::default();
        let mut fields = Fields { rest: text, line: 0 };
        while let Some((key, value)) = fields.next().map_err(corrupt)? {
            draft.take(dir, key, value, fields.line).map_err(|fault| match fault {
                Fault::Problem(problem) => corrupt(problem),
                Fault::Path(source) => NarInfoError::Path(source),
                Fault::ContentAddress(source) => NarInfoError::ContentAddress(source),
            })?;
        }
        let missing = |key| corrupt(Problem::Missing { key });
        let path = draft.path.ok_or_else(|| missing("StorePath"))?;
        let nar_hash = draft.nar_hash.ok_or_else(|| missing("NarHash"))?;
        let url = draft.url.filter(|url| !url.is_empty()).ok_or_else(|| missing("URL"))?;
        let nar_size_bytes = draft.nar_size_bytes.filter(|size| *size != 0).ok_or_else(|| corrupt(Problem::NoSize))?;
        let info = PathInfo {
            references: draft.references,
            deriver: draft.deriver,
            signatures: draft.signatures,
            content_address: draft.content_address,
            ..PathInfo::new(path, nar_hash, nar_size_bytes)
        };
        let compression = draft.compression.filter(|c| !c.is_empty()).unwrap_or_else(|| "bzip2".to_owned());
        Ok(Self { info, url, compression, file_hash: draft.file_hash, file_size_bytes: draft.file_size_bytes })
    }

    /// Is it about the path asked for, by its hash part and, if known, its name?
    ///
    /// If not, the cache does not have the path.
    pub fn answers(&self, hash_part: HashPart, name: Option<&Name>) -> bool {
        self.info.path.hash_part() == hash_part && name.is_none_or(|name| name == self.info.path.name())
    }

    /// The text of the file, as Nix writes it.
    pub fn to_text(&self, dir: &StoreDir) -> String {
        let info = &self.info;
        let mut text = String::new();
        let mut line = |key: &str, value: &str| {
            for piece in [key, ": ", value, "\n"] {
                text.push_str(piece);
            }
        };
        line("StorePath", &dir.full(&info.path));
        line("URL", &self.url);
        line("Compression", &self.compression);
        if let Some(hash) = self.file_hash {
            line("FileHash", &hash.to_string());
        }
        if let Some(size) = self.file_size_bytes {
            line("FileSize", &size.to_string());
        }
        line("NarHash", &info.nar_hash.to_string());
        line("NarSize", &info.nar_size_bytes.to_string());
        let references: Vec<String> = info.references.iter().map(ToString::to_string).collect();
        line("References", &references.join(" "));
        if let Some(deriver) = &info.deriver {
            line("Deriver", &deriver.to_string());
        }
        for signature in &info.signatures {
            line("Sig", signature.as_str());
        }
        if let Some(address) = &info.content_address {
            line("CA", &address.to_string());
        }
        text
    }
}

/// Cuts a file into keys and values, as Nix does.
struct Fields<'a> {
    rest: &'a [u8],
    line: u64,
}

/// A key and its value.
type Field<'a> = (&'a [u8], &'a [u8]);

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<Field<'a>>, Problem> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        self.line += 1;
        let colon = memchr::memchr(b':', self.rest).ok_or(Problem::NoColon { line: self.line })?;
        let (key, value) = self.rest.split_at(colon);
        // Whatever comes after the colon is skipped, be it a line feed.
        let value = value.get(2..).unwrap_or_default();
        let end = memchr::memchr(b'\n', value).ok_or(Problem::NoLineFeed { line: self.line })?;
        let (value, rest) = value.split_at(end);
        self.rest = rest.get(1..).unwrap_or_default();
        Ok(Some((key, value)))
    }
}

enum Fault {
    Problem(Problem),
    Path(StorePathError),
    ContentAddress(ContentAddressError),
}

impl From<Problem> for Fault {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<StorePathError> for Fault {
    fn from(source: StorePathError) -> Self {
        Self::Path(source)
    }
}

/// What the lines so far said.
#[derive(Default)]
struct Draft {
    path: Option<StorePath>,
    url: Option<String>,
    compression: Option<String>,
    file_hash: Option<Hash>,
    file_size_bytes: Option<u64>,
    nar_hash: Option<Sha256Digest>,
    nar_size_bytes: Option<u64>,
    references: BTreeSet<StorePath>,
    deriver: Option<StorePath>,
    signatures: BTreeSet<Signature>,
    content_address: Option<ContentAddress>,
}

impl Draft {
    fn take(&mut self, dir: &StoreDir, key: &[u8], value: &[u8], line: u64) -> Result<(), Fault> {
        let text = |key| std::str::from_utf8(value).map_err(|_| Problem::Encoding { key, line });
        let number = |key| parse_number(value).ok_or(Problem::Number { key, line });
        // The algorithm must be said here.
        let hash = || {
            let text = std::str::from_utf8(value).ok();
            text.and_then(|text| Hash::parse(text, None).ok()).ok_or(Problem::Hash { line })
        };
        match key {
            b"StorePath" => self.path = Some(dir.parse(value)?),
            b"URL" => self.url = Some(text("URL")?.to_owned()),
            b"Compression" => self.compression = Some(text("Compression")?.to_owned()),
            b"FileHash" => self.file_hash = Some(hash()?),
            b"FileSize" => self.file_size_bytes = Some(number("FileSize")?),
            b"NarHash" => self.nar_hash = Some(hash()?.sha256().ok_or(Problem::Hash { line })?),
            b"NarSize" => self.nar_size_bytes = Some(number("NarSize")?),
            b"References" if !self.references.is_empty() => {
                return Err(Problem::Extra { key: "References", line }.into());
            }
            b"References" => {
                let bases = value.split(|b| b" \t\n\r".contains(b)).filter(|base| !base.is_empty());
                self.references = bases.map(StorePath::from_base_name).collect::<Result<_, _>>()?;
            }
            b"Deriver" if value == b"unknown-deriver" => {}
            b"Deriver" => self.deriver = Some(StorePath::from_base_name(value)?),
            b"Sig" => self.signatures.extend(std::str::from_utf8(value).ok().and_then(|text| text.parse().ok())),
            b"CA" if self.content_address.is_some() => return Err(Problem::Extra { key: "CA", line }.into()),
            b"CA" if value.is_empty() => {}
            b"CA" => self.content_address = Some(text("CA")?.parse().map_err(Fault::ContentAddress)?),
            _ => {}
        }
        Ok(())
    }
}

/// A decimal number of 64 bits, with or without `+`.
fn parse_number(text: &[u8]) -> Option<u64> {
    let digits = text.strip_prefix(b"+").unwrap_or(text);
    let fine = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| fine)?.parse().ok()
}

/// What `nix-cache-info` says of a cache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheInfo {
    /// Does it say which store directory it is for? (If so, it is ours.)
    pub has_store_dir: bool,
    /// May it be asked for many paths at once?
    pub want_mass_query: bool,
    /// Lower is asked first.
    pub priority: Option<i32>,
}

/// What is wrong with a cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheInfoError {
    #[error("binary cache '{uri}' is for Nix stores with prefix '{found}', not '{wanted}'")]
    StoreDir { uri: String, found: String, wanted: String },
    #[error("binary cache '{uri}' has the priority '{found}', which is no number")]
    Priority { uri: String, found: String },
}

impl CacheInfo {
    /// Reads the file of the cache at `uri`.
    pub fn parse(dir: &StoreDir, text: &[u8], uri: &str) -> Result<Self, CacheInfoError> {
        let mut info = Self::default();
        for line in text.split(|b| *b == b'\n') {
            let Some(colon) = memchr::memchr(b':', line) else { continue };
            let (key, value) = line.split_at(colon);
            let value = trim(value.get(1..).unwrap_or_default());
            let uri = || uri.to_owned();
            match key {
                b"StoreDir" if value == dir.as_str().as_bytes() => info.has_store_dir = true,
                b"StoreDir" => {
                    let found = String::from_utf8_lossy(value).into_owned();
                    return Err(CacheInfoError::StoreDir { uri: uri(), found, wanted: dir.to_string() });
                }
                b"WantMassQuery" => info.want_mass_query = value == b"1",
                b"Priority" => {
                    let found = || String::from_utf8_lossy(value).into_owned();
                    let priority = leading_number(value);
                    info.priority =
                        Some(priority.ok_or_else(|| CacheInfoError::Priority { uri: uri(), found: found() })?);
                }
                _ => {}
            }
        }
        Ok(info)
    }

    /// The text of the file.
    pub fn to_text(&self, dir: &StoreDir) -> String {
        let dir = self.has_store_dir.then(|| format!("StoreDir: {dir}\n"));
        let mass_query = self.want_mass_query.then(|| "WantMassQuery: 1\n".to_owned());
        let priority = self.priority.map(|priority| format!("Priority: {priority}\n"));
        [dir, mass_query, priority].into_iter().flatten().collect()
    }
}

fn trim(text: &[u8]) -> &[u8] {
    let blank = |b: &u8| b" \t\n\r".contains(b);
    let begin = text.iter().position(|b| !blank(b)).unwrap_or(text.len());
    let end = text.iter().rposition(|b| !blank(b)).map_or(begin, |last| last + 1);
    text.get(begin..end).unwrap_or_default()
}

/// The number at the front, whatever follows: `12x` is 12. It must fit in 32 bits.
fn leading_number(text: &[u8]) -> Option<i32> {
    let sign = usize::from(matches!(text.first(), Some(b'+' | b'-')));
    let digits = text.get(sign..)?.iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(text.get(..sign + digits)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arb::texts as arb;
    use crate::signature::{PublicKey, SecretKey, count_valid};
    use crate::test_vectors::{base64, cases, store_paths};
    use proptest::prelude::*;

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    fn secret_keys() -> Vec<SecretKey> {
        cases("keys").iter().map(|key| SecretKey::parse(key["secret_key_file"].as_str().unwrap()).unwrap()).collect()
    }

    #[test]
    fn narinfo_vectors() {
        let cases = cases("narinfo");
        println!("narinfo: {} cases", cases.len());
        let keys = secret_keys();
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            for version in ["2.8.0", "2.26.3"] {
                let text = case[version]["narinfo"].as_str().unwrap();
                let narinfo = NarInfo::parse(&dir(), text.as_bytes(), id).unwrap();
                assert_eq!(narinfo.to_text(&dir()), text, "{id}");
                let path = dir().parse(case["path"].as_str().unwrap()).unwrap();
                assert!(narinfo.answers(path.hash_part(), Some(path.name())), "{id}");
                // Made and signed anew it is the same text.
                let nar = base64(&case["nar_b64"]);
                let nar_hash = Sha256Digest::of(&nar);
                let mut info = PathInfo {
                    references: narinfo.info.references.clone(),
                    deriver: narinfo.info.deriver.clone(),
                    content_address: narinfo.info.content_address.clone(),
                    ..PathInfo::new(path, nar_hash, nar.len() as u64)
                };
                if !narinfo.info.signatures.is_empty() {
                    info.signatures.insert(keys[0].sign_path(&dir(), &info).unwrap());
                }
                let made = NarInfo {
                    url: format!("nar/{}.nar", nar_hash.to_base32()),
                    compression: "none".into(),
                    file_hash: Some(nar_hash.to_hash()),
                    file_size_bytes: Some(info.nar_size_bytes),
                    info,
                };
                assert_eq!(made.to_text(&dir()), text, "{id}");
            }
        }
    }

    #[test]
    fn narinfo_parse_vectors() {
        let cases = cases("narinfo_parse");
        println!("narinfo_parse: {} cases", cases.len());
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let queried = dir().parse(case["queried_path"].as_str().unwrap()).unwrap();
            let file = format!("{}.narinfo", queried.hash_part());
            let parsed = NarInfo::parse(&dir(), case["narinfo"].as_str().unwrap().as_bytes(), &file);
            let expected = &case["2.26.3"];
            match id {
                // Nix takes these only because it remembers an earlier answer.
                "narinfoparse-storepath-other-hash" | "narinfoparse-storepath-other-name" => {
                    assert!(!parsed.unwrap().answers(queried.hash_part(), Some(queried.name())), "{id}");
                    continue;
                }
                // We keep SHA-256 hashes only.
                "narinfoparse-narhash-md5" => {
                    let message = format!("NAR info file '{file}' is corrupt: bad hash at line 6");
                    assert_eq!(parsed.unwrap_err().to_string(), message);
                    continue;
                }
                // As 2.8, unlike 2.26.
                "narinfoparse-ca-text-sha1" => {
                    assert!(matches!(parsed, Err(NarInfoError::ContentAddress(_))));
                    continue;
                }
                _ => {}
            }
            if expected["accepted"] == false {
                assert_eq!(expected["message"], format!("error: {}", parsed.unwrap_err()), "{id}");
                continue;
            }
            let narinfo = parsed.unwrap_or_else(|e| panic!("{id}: {e}"));
            assert!(narinfo.answers(queried.hash_part(), Some(queried.name())), "{id}");
            let wanted = &expected["parsed"];
            let sri = |hash: Hash| hash.encode(crate::hash::Encoding::Sri);
            assert_eq!(case["2.8.0"]["parsed"]["path"], dir().full(&narinfo.info.path), "{id}");
            assert_eq!(wanted["narHash"], sri(narinfo.info.nar_hash.to_hash()), "{id}");
            assert_eq!(wanted["narSize"], narinfo.info.nar_size_bytes, "{id}");
            assert_eq!(store_paths(&dir(), &wanted["references"]), narinfo.info.references, "{id}");
            assert_eq!(wanted["deriver"].as_str(), narinfo.info.deriver.map(|d| dir().full(&d)).as_deref(), "{id}");
            assert_eq!(wanted["url"], narinfo.url, "{id}");
            assert_eq!(wanted["compression"], narinfo.compression, "{id}");
            assert_eq!(wanted["downloadHash"].as_str(), narinfo.file_hash.map(sri).as_deref(), "{id}");
            assert_eq!(wanted["downloadSize"].as_u64(), narinfo.file_size_bytes, "{id}");
            let address = narinfo.info.content_address.map(|a| a.to_string());
            assert_eq!(wanted["ca"].as_str(), address.as_deref(), "{id}");
            let signatures: Vec<&str> = narinfo.info.signatures.iter().map(Signature::as_str).collect();
            // Of no use, so dropped.
            let usable = wanted["signatures"].as_array().unwrap().iter().filter(|s| **s != "garbage");
            assert_eq!(signatures, usable.map(|s| s.as_str().unwrap()).collect::<Vec<_>>(), "{id}");
        }
    }

    #[test]
    fn odd_fields() {
        let fine = "StorePath: /nix/store/0123456789abcdfg0123456789abcdfg-x\nURL: u\nNarSize: 1\n\
                    NarHash: sha256:05pl8ymh7ylmvmji9m0d73pqsnax8njvq6hr3zh43x5qwhfbjm5g\n";
        let parse = |text: String| NarInfo::parse(&dir(), text.as_bytes(), "f");
        // A key directly before the line feed takes the next line for its value.
        assert_eq!(parse(format!("{fine}Compression:\nURL: v\n")).unwrap().compression, "URL: v");
        assert_eq!(
            parse(format!("{fine}URL:\n\n")).unwrap_err().to_string(),
            "NAR info file 'f' is corrupt: URL missing"
        );
        assert_eq!(parse(format!("{fine}FileSize:_12\n")).unwrap().file_size_bytes, Some(12));
        assert!(parse(format!("{fine}x:")).is_err());
        assert!(parse(format!("{fine}Deriver: \n")).is_err());
        assert!(parse(fine.replace("-x\n", "-x\r\n")).is_err());
        assert!(NarInfo::parse(&dir(), &vec![b'\n'; MAX_LEN + 1], "f").is_err());
    }

    #[test]
    fn signature_vectors() {
        let cases = cases("signatures");
        println!("signatures: {} cases", cases.len());
        let keys = secret_keys();
        let public: Vec<PublicKey> = keys.iter().map(SecretKey::public).collect();
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let path = dir().parse(case["path"].as_str().unwrap()).unwrap();
            let nar_hash = Sha256Digest::parse(case["nar_hash_nix32"].as_str().unwrap()).unwrap();
            assert_eq!(Sha256Digest::parse(case["nar_hash_sri_or_nix32"].as_str().unwrap()).unwrap(), nar_hash);
            let mut info = PathInfo::new(path, nar_hash, case["nar_size"].as_u64().unwrap());
            info.references = store_paths(&dir(), &case["references"]);
            for (key, wanted) in keys.iter().zip(case["signatures"].as_array().unwrap()) {
                let signature = key.sign_path(&dir(), &info).unwrap();
                assert_eq!(wanted, signature.as_str(), "{id}");
                info.signatures.insert(signature);
            }
            assert_eq!(count_valid(&dir(), &info, &public), 2, "{id}");
            assert_eq!(count_valid(&dir(), &info, &public[..1]), 1, "{id}");
            info.nar_size_bytes += 1;
            assert_eq!(count_valid(&dir(), &info, &public), 0, "{id}");
        }
    }

    #[test]
    fn key_vectors() {
        let cases = cases("keys");
        println!("keys: {} cases", cases.len());
        for case in &cases {
            let secret = SecretKey::parse(case["secret_key_file"].as_str().unwrap()).unwrap();
            assert_eq!(secret.to_file_text(), case["secret_key_file"]);
            assert_eq!(secret.public().to_string(), case["public_key_file"]);
            assert_eq!(secret.public(), case["public_key_file"].as_str().unwrap().parse().unwrap());
            assert_eq!(secret.public().name(), case["name"]);
        }
    }

    #[test]
    fn cache_info_vectors() {
        let cases = cases("cache_info");
        println!("cache_info: {} cases", cases.len());
        for case in &cases {
            let id = case["id"].as_str().unwrap();
            let parsed = CacheInfo::parse(&dir(), case["nix_cache_info"].as_str().unwrap().as_bytes(), "file://$T/pc");
            assert_eq!(parsed.is_ok(), case["2.8.0"]["accepted"] == true, "{id}");
            match (id, parsed) {
                // Nix names the function that failed.
                ("cacheinfo-priority-junk", parsed) => {
                    assert!(matches!(parsed, Err(CacheInfoError::Priority { .. })));
                }
                (_, Err(error)) => assert_eq!(case["2.8.0"]["message"], format!("error: {error}"), "{id}"),
                ("cacheinfo-all", Ok(info)) => {
                    assert_eq!(info, CacheInfo { has_store_dir: true, want_mass_query: true, priority: Some(30) });
                    assert_eq!(case["nix_cache_info"], info.to_text(&dir()));
                }
                ("cacheinfo-priority-negative", Ok(info)) => assert_eq!(info.priority, Some(-5)),
                (_, Ok(info)) => assert_eq!(info.has_store_dir, id != "cacheinfo-empty", "{id}"),
            }
        }
        for (text, priority) in
            [("12x", Some(12)), ("+7", Some(7)), (" 3 ", Some(3)), ("2147483648", None), ("-", None)]
        {
            let text = format!("Priority:{text}");
            assert_eq!(
                CacheInfo::parse(&dir(), text.as_bytes(), "u").ok().and_then(|i| i.priority),
                priority,
                "{text}"
            );
        }
        let new = CacheInfo { has_store_dir: true, ..CacheInfo::default() };
        assert_eq!(new.to_text(&dir()), "StoreDir: /nix/store\n");
    }

    proptest! {
        /// What is written reads back.
        #[test]
        fn reads_what_it_writes(narinfo in arb::nar_info()) {
            let text = narinfo.to_text(&dir());
            prop_assert_eq!(NarInfo::parse(&dir(), text.as_bytes(), "f"), Ok(narinfo));
        }

        /// A spoiled file is an error or another record, which reads back.
        #[test]
        fn spoiled_files(
            text in arb::nar_info().prop_flat_map(|n| arb::spoiled(n.to_text(&dir()).into_bytes())),
        ) {
            if let Ok(narinfo) = NarInfo::parse(&dir(), &text, "f") {
                let text = narinfo.to_text(&dir());
                prop_assert_eq!(NarInfo::parse(&dir(), text.as_bytes(), "f"), Ok(narinfo));
            }
        }
    }
}
