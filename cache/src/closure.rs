//! Whole closures in one question, from caches that Larder serves. `docs/cache-protocol.md` has it.
//!
//! A cache that can do it says `LarderClosure: NAME` in its `nix-cache-info`. A `POST` to that
//! name with hash parts, one a line, is answered by what there is of each and of all that those
//! refer to: a line `HASHPART LENGTH` and a narinfo file of so many bytes, or `HASHPART -` for a path
//! that was asked for and is not there; at the end the line `end`.

use std::io::{self, BufRead, Read as _};

use larder_core::hash_part::HashPart;
use larder_core::narinfo;

use crate::error::CacheError;

/// The line of `nix-cache-info`, with the colon.
pub const KEY: &str = "LarderClosure:";

/// Longest line of an answer, in bytes.
const LINE_MAX: u64 = 64;

/// Bytes of an answer, in all.
const ANSWER_MAX: u64 = 512 << 20;

/// Hash parts in one question.
pub const ASKED_MAX: usize = 20_000;

/// What a cache says where closures can be asked for.
pub fn offered(cache_info: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(cache_info).ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix(KEY))?.trim();
    crate::files::is_inside(name).then(|| name.to_owned())
}

/// Reads an answer; `each` hears of every path in it.
pub fn read(
    uri: &str,
    answer: impl BufRead,
    mut each: impl FnMut(HashPart, Option<&[u8]>) -> Result<(), CacheError>,
) -> Result<(), CacheError> {
    let invalid = |reason| CacheError::Closure { uri: uri.to_owned(), reason };
    let failed = |error: io::Error| CacheError::from_io(error).unwrap_or_else(|_| invalid("it cannot be read"));
    let mut answer = answer.take(ANSWER_MAX);
    let (mut line, mut text) = (Vec::new(), Vec::new());
    loop {
        line.clear();
        (&mut answer).take(LINE_MAX).read_until(b'\n', &mut line).map_err(failed)?;
        let Some(words) = line.strip_suffix(b"\n") else { return Err(invalid("it is cut, or a line is too long")) };
        let words = std::str::from_utf8(words).map_err(|_| invalid("a line is not UTF-8"))?;
        if words == "end" {
            return Ok(());
        }
        let (part, length) = words.split_once(' ').ok_or_else(|| invalid("a line has not two words"))?;
        let part: HashPart = part.parse().map_err(|_| invalid("there is no hash part"))?;
        if length == "-" {
            each(part, None)?;
            continue;
        }
        let length: usize = length.parse().map_err(|_| invalid("there is no length"))?;
        if length > narinfo::MAX_LEN {
            return Err(invalid("a narinfo file is too long"));
        }
        text.clear();
        let taken = (&mut answer).take(length as u64).read_to_end(&mut text).map_err(failed)?;
        if taken < length {
            return Err(invalid("it is cut"));
        }
        each(part, Some(&text))?;
    }
}

/// Writes the part of an answer for one path.
pub fn write(out: &mut dyn io::Write, part: HashPart, text: Option<&str>) -> io::Result<()> {
    match text {
        Some(text) => write!(out, "{part} {}\n{text}", text.len()),
        None => writeln!(out, "{part} -"),
    }
}

/// Writes the end of an answer.
pub fn write_end(out: &mut dyn io::Write) -> io::Result<()> {
    out.write_all(b"end\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8]) -> Result<Vec<(HashPart, Option<Vec<u8>>)>, CacheError> {
        let mut found = Vec::new();
        read("u", bytes, |part, text| {
            found.push((part, text.map(<[u8]>::to_vec)));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn answers_are_read_back_and_cut_ones_are_not() {
        let (one, two): (HashPart, HashPart) = ("0".repeat(32).parse().unwrap(), "1".repeat(32).parse().unwrap());
        let mut bytes = Vec::new();
        write(&mut bytes, one, Some("A: b\nC: d\n")).unwrap();
        write(&mut bytes, two, None).unwrap();
        write_end(&mut bytes).unwrap();
        assert_eq!(all(&bytes).unwrap(), [(one, Some(b"A: b\nC: d\n".to_vec())), (two, None)]);
        for end in 0..bytes.len() {
            all(&bytes[..end]).unwrap_err();
        }
        for odd in ["x\n", "\n", "zz 3\nend\n", &format!("{one} 99999999999\n"), &format!("{one} {}\n", "1".repeat(80))]
        {
            all(odd.as_bytes()).unwrap_err();
        }
    }

    #[test]
    fn offers() {
        assert_eq!(offered(b"StoreDir: /x\nLarderClosure: closure\n").as_deref(), Some("closure"));
        assert_eq!(offered(b"LarderClosure: ../x\n"), None);
        assert_eq!(offered(b"LarderClosure: http://elsewhere/\n"), None);
        assert_eq!(offered(b"Priority: 1\n"), None);
    }
}
