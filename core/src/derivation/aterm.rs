//! The text of a `.drv` file: an "ATerm", `Derive([outputs],[inputs],...)` without white space.
//!
//! Reading is as tolerant as Nix is: order and duplicates do not matter, an escape may stand
//! before any character, and what follows the last `)` is ignored. So the text that is written
//! for what was read may be another one; the hashes of [`modulo`](super::modulo) are made of the
//! written text, and the store path of a `.drv` file of the bytes it has.
//!
//! All work and memory is linear in the length of the text. Source: formats, 5.1, 5.2 and 5.4;
//! `drv_parse.json`.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use super::bytes::shown;
use super::{Bytes, Derivation, IMPURE, Output, OutputMethod, OutputName};
use crate::content_address::ContentAddress;
use crate::hash::{Algorithm, Hash, HashError, Sha256Digest};
use crate::store_dir::{MakePathError, StoreDir};
use crate::store_path::{Name, NameError, StorePath, StorePathError};

/// Why a text is no derivation. Positions are byte offsets, from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DerivationError {
    #[error("expected string '{expected}' at byte {at}, found {found}")]
    Expected { expected: &'static str, at: usize, found: String },
    #[error("the string that begins at byte {at} has no end")]
    Unterminated { at: usize },
    #[error(
        "it has the form 'DrvWithVersion', which needs the experimental feature 'dynamic-derivations'; that is not supported"
    )]
    Dynamic,
    #[error("bad path '{path}' in derivation, at byte {at}")]
    Path { path: String, at: usize, source: StorePathError },
    #[error("bad output name at byte {at}")]
    OutputName { at: usize, source: NameError },
    #[error("bad system '{system}' at byte {at}: it must be text without '\"' and '\\'")]
    System { system: String, at: usize },
    #[error("output '{output}' has a bad hash algorithm")]
    Algorithm { output: OutputName, source: HashError },
    #[error("output '{output}' has a bad hash")]
    Hash { output: OutputName, source: HashError },
    #[error("output '{output}' has '{prefix}{algorithm}', but this method does not go with this algorithm")]
    Method { output: OutputName, prefix: &'static str, algorithm: Algorithm },
    #[error("output '{output}' has the path '{path}', though its path depends on what is built")]
    PathOfFloating { output: OutputName, path: String },
    #[error("output '{output}' of a fixed-output derivation has the bad path '{path}'")]
    PathOfFixed { output: OutputName, path: String },
    #[error("output '{output}' has no possible path")]
    MakePath { output: OutputName, source: MakePathError },
}

/// Reads the text of the `.drv` file of the derivation called `name`.
pub fn parse(dir: &StoreDir, name: &Name, text: &[u8]) -> Result<Derivation, DerivationError> {
    if text.starts_with(b"DrvWithVersion(") {
        return Err(DerivationError::Dynamic);
    }
    let mut parser = Parser { dir, text, at: 0 };
    parser.expect("Derive([")?;
    let mut outputs = BTreeMap::new();
    while !parser.end_of_list() {
        parser.expect("(")?;
        let output = parser.output_name()?;
        parser.expect(",")?;
        let fields = parser.output_fields()?;
        parser.expect(")")?;
        let value = fields.into_output(dir, name, &output)?;
        // The first of several with one name counts.
        outputs.entry(output).or_insert(value);
    }
    parser.expect(",[")?;
    let mut input_drvs = BTreeMap::new();
    while !parser.end_of_list() {
        parser.expect("(")?;
        let path = parser.store_path()?;
        parser.expect(",[")?;
        let mut names = BTreeSet::new();
        while !parser.end_of_list() {
            names.insert(parser.output_name()?);
        }
        parser.expect(")")?;
        // Here the last of several counts.
        input_drvs.insert(path, names);
    }
    parser.expect(",[")?;
    let mut input_srcs = BTreeSet::new();
    while !parser.end_of_list() {
        input_srcs.insert(parser.store_path()?);
    }
    parser.expect(",")?;
    let system = parser.system()?;
    parser.expect(",")?;
    let builder = parser.bytes()?;
    parser.expect(",[")?;
    let mut args = Vec::new();
    while !parser.end_of_list() {
        args.push(parser.bytes()?);
    }
    parser.expect(",[")?;
    let mut env = BTreeMap::new();
    while !parser.end_of_list() {
        parser.expect("(")?;
        let key = parser.bytes()?;
        parser.expect(",")?;
        let value = parser.bytes()?;
        parser.expect(")")?;
        env.insert(key, value);
    }
    parser.expect(")")?;
    Ok(Derivation { name: name.clone(), outputs, input_drvs, input_srcs, system, builder, args, env })
}

/// May this text be the system, which is written without escapes?
pub(super) fn is_system(text: &str) -> bool {
    !text.contains(['"', '\\'])
}

struct Parser<'a> {
    dir: &'a StoreDir,
    text: &'a [u8],
    at: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a [u8] {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn expect(&mut self, expected: &'static str) -> Result<(), DerivationError> {
        if !self.rest().starts_with(expected.as_bytes()) {
            let rest = self.rest();
            let found = match rest.get(..expected.len().min(rest.len())) {
                None | Some([]) => "the end of the text".to_owned(),
                Some(found) => format!("'{}'", shown(found)),
            };
            return Err(DerivationError::Expected { expected, at: self.at, found });
        }
        self.at += expected.len();
        Ok(())
    }

    /// Between the items of a list: skips one comma, or the bracket at the end.
    ///
    /// As in Nix, a comma may be missing between items or stand before the first one.
    fn end_of_list(&mut self) -> bool {
        match self.rest().first() {
            Some(b',') => {
                self.at += 1;
                false
            }
            Some(b']') => {
                self.at += 1;
                true
            }
            _ => false,
        }
    }

    /// A string; a copy is made only if it has escapes.
    fn string(&mut self) -> Result<Cow<'a, [u8]>, DerivationError> {
        let start = self.at;
        self.expect("\"")?;
        let mut copy: Option<Vec<u8>> = None;
        loop {
            let rest = self.rest();
            let unterminated = DerivationError::Unterminated { at: start };
            let Some(end) = memchr::memchr2(b'"', b'\\', rest) else { return Err(unterminated) };
            let (plain, tail) = rest.split_at(end);
            match tail {
                [b'\\', escaped, ..] => {
                    let copy = copy.get_or_insert_default();
                    copy.extend_from_slice(plain);
                    copy.push(match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        other => *other,
                    });
                    self.at += end + 2;
                }
                [b'"', ..] => {
                    self.at += end + 1;
                    return Ok(match copy {
                        None => Cow::Borrowed(plain),
                        Some(mut copy) => {
                            copy.extend_from_slice(plain);
                            Cow::Owned(copy)
                        }
                    });
                }
                _ => return Err(unterminated),
            }
        }
    }

    fn bytes(&mut self) -> Result<Bytes, DerivationError> {
        Ok(self.string()?.into_owned().into())
    }

    fn system(&mut self) -> Result<String, DerivationError> {
        let at = self.at;
        let text = self.string()?;
        match std::str::from_utf8(&text) {
            Ok(system) if is_system(system) => Ok(system.to_owned()),
            _ => Err(DerivationError::System { system: shown(&text).to_string(), at }),
        }
    }

    fn output_name(&mut self) -> Result<OutputName, DerivationError> {
        let at = self.at;
        let text = self.string()?;
        // Replaced characters are in no name, so they give the error that the bytes deserve.
        OutputName::new(&String::from_utf8_lossy(&text)).map_err(|source| DerivationError::OutputName { at, source })
    }

    fn store_path(&mut self) -> Result<StorePath, DerivationError> {
        let at = self.at;
        let text = self.string()?;
        parse_path(self.dir, &text, at)
    }

    fn output_fields(&mut self) -> Result<OutputFields<'a>, DerivationError> {
        let at = self.at;
        let path = self.string()?;
        self.expect(",")?;
        let algorithm = self.string()?;
        self.expect(",")?;
        let hash = self.string()?;
        Ok(OutputFields { at, path, algorithm, hash })
    }
}

/// An output from the three fields that stand for it in a `.drv` file and in protocols.
pub fn output_from_fields(
    dir: &StoreDir,
    drv_name: &Name,
    output: &OutputName,
    fields: [&[u8]; 3],
) -> Result<Output, DerivationError> {
    let [path, algorithm, hash] = fields.map(Cow::Borrowed);
    OutputFields { at: 0, path, algorithm, hash }.into_output(dir, drv_name, output)
}

fn parse_path(dir: &StoreDir, text: &[u8], at: usize) -> Result<StorePath, DerivationError> {
    dir.parse(text).map_err(|source| DerivationError::Path { path: shown(text).to_string(), at, source })
}

/// The three fields of an output after its name.
struct OutputFields<'a> {
    at: usize,
    path: Cow<'a, [u8]>,
    algorithm: Cow<'a, [u8]>,
    hash: Cow<'a, [u8]>,
}

impl OutputFields<'_> {
    /// The table of formats, 5.1: which fields are empty tells what the output is.
    fn into_output(self, dir: &StoreDir, drv_name: &Name, output: &OutputName) -> Result<Output, DerivationError> {
        let output = output.clone();
        if self.algorithm.is_empty() {
            // A hash without an algorithm is ignored.
            return match &*self.path {
                b"" => Ok(Output::Deferred),
                path => parse_path(dir, path, self.at).map(Output::InputAddressed),
            };
        }
        let (method, algorithm) = parse_algorithm(&self.algorithm, &output)?;
        if self.hash.is_empty() || *self.hash == *IMPURE.as_bytes() {
            if !self.path.is_empty() {
                return Err(DerivationError::PathOfFloating { output, path: shown(&self.path).to_string() });
            }
            return Ok(if self.hash.is_empty() {
                Output::Floating { method, algorithm }
            } else {
                Output::Impure { method, algorithm }
            });
        }
        // The path has to look like one, and is then ignored for the computed one.
        if !self.path.starts_with(b"/") {
            return Err(DerivationError::PathOfFixed { output, path: shown(&self.path).to_string() });
        }
        let address = parse_address(&self.hash, method, algorithm, &output)?;
        Output::fixed(dir, drv_name, &output, address).map_err(|source| DerivationError::MakePath { output, source })
    }
}

fn parse_algorithm(text: &[u8], output: &OutputName) -> Result<(OutputMethod, Algorithm), DerivationError> {
    let text = String::from_utf8_lossy(text);
    let (method, name) = OutputMethod::split_prefix(&text);
    let algorithm: Algorithm =
        name.parse().map_err(|source| DerivationError::Algorithm { output: output.clone(), source })?;
    if !method.allows(algorithm) {
        return Err(DerivationError::Method { output: output.clone(), prefix: method.prefix(), algorithm });
    }
    Ok((method, algorithm))
}

fn parse_address(
    hash: &[u8],
    method: OutputMethod,
    algorithm: Algorithm,
    output: &OutputName,
) -> Result<ContentAddress, DerivationError> {
    let hash = Hash::parse_bare(&String::from_utf8_lossy(hash), algorithm)
        .map_err(|source| DerivationError::Hash { output: output.clone(), source })?;
    Ok(match method {
        OutputMethod::Fixed(method) => ContentAddress::Fixed(method, hash),
        OutputMethod::Text => ContentAddress::Text(hash.sha256().expect("text allows SHA-256 alone")),
    })
}

/// Which inputs are written.
pub(super) enum Inputs<'a> {
    /// The derivation's own, by path.
    Paths,
    /// These digests instead, in hexadecimal; sorting the bytes sorts the text.
    Digests(&'a BTreeMap<Sha256Digest, BTreeSet<&'a OutputName>>),
}

/// Are output paths left out, both in the outputs and in the environment?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// The text as it is.
    Off,
    /// The paths of the outputs are empty, and so are variables named after outputs.
    On,
}

/// The text as it stands in the `.drv` file.
pub(super) fn print(drv: &Derivation, dir: &StoreDir) -> Vec<u8> {
    let mut out = Vec::with_capacity(estimate(drv));
    print_into(&mut out, drv, dir, Mask::Off, &Inputs::Paths);
    out
}

/// Roughly the length of the text, in bytes.
fn estimate(drv: &Derivation) -> usize {
    let env: usize = drv.env.iter().map(|(key, value)| key.len() + value.len() + 8).sum();
    let args: usize = drv.args.iter().map(|arg| arg.len() + 4).sum();
    256 + env + env / 16 + args + args / 16 + 100 * (drv.outputs.len() + drv.input_drvs.len() + drv.input_srcs.len())
}

/// Appends the text to `out`.
pub(super) fn print_into(out: &mut Vec<u8>, drv: &Derivation, dir: &StoreDir, mask: Mask, inputs: &Inputs<'_>) {
    out.extend_from_slice(b"Derive(");
    list(out, &drv.outputs, |out, (name, output)| {
        out.push(b'(');
        plain(out, name.as_str());
        out.push(b',');
        match output.path() {
            Some(path) if mask == Mask::Off => store_path(out, dir, path),
            _ => plain(out, ""),
        }
        let (algorithm, hash) = output.hash_fields();
        out.push(b',');
        plain(out, &algorithm);
        out.push(b',');
        plain(out, &hash);
        out.push(b')');
    });
    out.push(b',');
    match inputs {
        Inputs::Paths => list(out, &drv.input_drvs, |out, (path, names)| {
            out.push(b'(');
            store_path(out, dir, path);
            out.push(b',');
            list(out, names, |out, name| plain(out, name.as_str()));
            out.push(b')');
        }),
        Inputs::Digests(digests) => list(out, *digests, |out, (digest, names)| {
            out.push(b'(');
            plain(out, &digest.to_hex());
            out.push(b',');
            list(out, names, |out, name| plain(out, name.as_str()));
            out.push(b')');
        }),
    }
    out.push(b',');
    list(out, &drv.input_srcs, |out, path| store_path(out, dir, path));
    out.push(b',');
    plain(out, &drv.system);
    out.push(b',');
    escaped(out, &drv.builder);
    out.push(b',');
    list(out, &drv.args, |out, arg| escaped(out, arg));
    out.push(b',');
    list(out, &drv.env, |out, (key, value)| {
        out.push(b'(');
        escaped(out, key);
        out.push(b',');
        let masked = mask == Mask::On && drv.has_output(key);
        escaped(out, if masked { b"" } else { value });
        out.push(b')');
    });
    out.push(b')');
}

fn list<T>(out: &mut Vec<u8>, items: impl IntoIterator<Item = T>, mut item: impl FnMut(&mut Vec<u8>, T)) {
    out.push(b'[');
    for (n, value) in items.into_iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        item(out, value);
    }
    out.push(b']');
}

/// A string that never needs escapes.
fn plain(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
}

fn store_path(out: &mut Vec<u8>, dir: &StoreDir, path: &StorePath) {
    out.push(b'"');
    out.extend_from_slice(dir.as_str().as_bytes());
    out.push(b'/');
    out.extend_from_slice(&path.hash_part().to_text());
    out.push(b'-');
    out.extend_from_slice(path.name().as_str().as_bytes());
    out.push(b'"');
}

fn escaped(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'"');
    let mut rest = bytes;
    while let Some(end) = rest.iter().position(|b| matches!(b, b'"' | b'\\' | b'\n' | b'\r' | b'\t')) {
        let (plain, tail) = rest.split_at(end);
        out.extend_from_slice(plain);
        let Some((special, tail)) = tail.split_first() else { break };
        out.push(b'\\');
        out.push(match special {
            b'\n' => b'n',
            b'\r' => b'r',
            b'\t' => b't',
            other => *other,
        });
        rest = tail;
    }
    out.extend_from_slice(rest);
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::{Index, select};

    use super::*;
    use crate::arb;
    use crate::derivation::Kind;

    fn dir() -> StoreDir {
        StoreDir::new("/nix/store").unwrap()
    }

    fn read(name: &Name, text: &[u8]) -> Result<Derivation, DerivationError> {
        parse(&dir(), name, text)
    }

    /// The text with a backslash before every byte of a string that may have one.
    fn with_idle_escapes(text: &[u8]) -> Vec<u8> {
        let (mut out, mut inside, mut bytes) = (Vec::new(), false, text.iter());
        while let Some(&b) = bytes.next() {
            match (inside, b) {
                (_, b'"') => inside = !inside,
                (true, b'\\') => {
                    out.push(b);
                    out.extend(bytes.next());
                    continue;
                }
                (true, b'n' | b'r' | b't') | (false, _) => {}
                (true, _) => out.push(b'\\'),
            }
            out.push(b);
        }
        out
    }

    proptest! {
        #[test]
        fn parse_undoes_print(
            (dir, drv) in arb::paths::store_dir().prop_flat_map(|d| (Just(d.clone()), arb::derivation::derivation(d)))
        ) {
            let text = drv.to_aterm(&dir);
            prop_assert_eq!(parse(&dir, &drv.name, &text), Ok(drv.clone()));
            // What follows is ignored, and any byte may be escaped.
            prop_assert_eq!(parse(&dir, &drv.name, &[&text[..], b")\n\""].concat()), Ok(drv.clone()));
            prop_assert_eq!(parse(&dir, &drv.name, &with_idle_escapes(&text)), Ok(drv));
        }

        /// What is cut short is refused, wherever the cut is.
        #[test]
        fn no_prefix_is_a_derivation(drv in arb::derivation::derivation(dir()), cut in any::<Index>()) {
            let text = drv.to_aterm(&dir());
            let cut = cut.index(text.len());
            match read(&drv.name, &text[..cut]).unwrap_err() {
                DerivationError::Expected { at, .. } | DerivationError::Unterminated { at } => prop_assert!(at <= cut),
                other => prop_assert!(false, "{other}"),
            }
        }

        /// One wrong byte is an error or makes another derivation, which is written and read as any.
        #[test]
        fn one_wrong_byte(
            drv in arb::derivation::derivation(dir()),
            at in any::<Index>(),
            byte in prop_oneof![any::<u8>(), select(b"\"\\,()[]/:\0".to_vec())],
        ) {
            let mut text = drv.to_aterm(&dir());
            *at.get_mut(&mut text) = byte;
            if let Ok(other) = read(&drv.name, &text) {
                prop_assert_eq!(read(&drv.name, &other.to_aterm(&dir())), Ok(other));
            }
        }

        /// Masking is as if the paths were not known yet.
        #[test]
        fn masking(mut drv in arb::derivation::derivation(dir())) {
            for name in drv.outputs.keys() {
                drv.env.insert(name.as_str().into(), "/some/path".into());
            }
            let (mut masked, mut plain) = (Vec::new(), Vec::new());
            print_into(&mut masked, &drv, &dir(), Mask::On, &Inputs::Paths);
            for (name, output) in &mut drv.outputs {
                drv.env.insert(name.as_str().into(), "".into());
                if let Output::InputAddressed(_) = output {
                    *output = Output::Deferred;
                }
            }
            print_into(&mut plain, &drv, &dir(), Mask::Off, &Inputs::Paths);
            if drv.kind() == Ok(Kind::Fixed) {
                prop_assert!(masked.len() < plain.len());
            } else {
                prop_assert_eq!(masked, plain);
            }
        }
    }

    const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// An output with these fields, in an otherwise empty derivation.
    fn output(fields: &str) -> Result<Output, DerivationError> {
        let text = format!(r#"Derive([("out",{fields})],[],[],"s","b",[],[])"#);
        read(&Name::new("x").unwrap(), text.as_bytes()).map(|drv| drv.outputs["out"].clone())
    }

    #[test]
    fn outputs_by_their_fields() {
        let path = "/nix/store/9zicq1m4wy4bv50xa4l1jk4kpyy41kih-x";
        let full = |o: &Output| o.path().map(|p| dir().full(p));
        for ok in [
            format!(r#""{path}","","""#),
            format!(r#""{path}","","{HASH}""#),
            format!(r#""{path}","sha256","{HASH}""#),
            format!(r#""/other","sha256","{HASH}""#),
            format!(r#""/","sha256","{}""#, HASH.to_uppercase()),
            r#""/","sha256","0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73""#.to_owned(),
            r#""/","sha256","47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=""#.to_owned(),
        ] {
            assert_eq!(full(&output(&ok).unwrap()).as_deref(), Some(path), "{ok}");
        }
        let (method, algorithm) = (OutputMethod::RECURSIVE, Algorithm::Sha256);
        for (fields, expected) in [
            (r#""","","""#, Output::Deferred),
            (r#""","","abc""#, Output::Deferred),
            (r#""","r:sha256","""#, Output::Floating { method, algorithm }),
            (r#""","r:sha256","impure""#, Output::Impure { method, algorithm }),
            (r#""","md5","""#, Output::Floating { method: OutputMethod::FLAT, algorithm: Algorithm::Md5 }),
            (r#""","text:sha256","""#, Output::Floating { method: OutputMethod::Text, algorithm }),
        ] {
            assert_eq!(output(fields).unwrap(), expected, "{fields}");
        }
        for (fields, words) in [
            (r#""x","","""#.to_owned(), "bad path 'x' in derivation, at byte 15"),
            (r#""/tmp/x","","""#.to_owned(), "bad path '/tmp/x'"),
            (format!(r#""{path}/bin","","""#), "bad path"),
            (format!(r#""","sha256","{HASH}""#), "fixed-output derivation has the bad path ''"),
            (format!(r#""rel","sha256","{HASH}""#), "fixed-output derivation has the bad path 'rel'"),
            (format!(r#""{path}","sha256","sha256:{HASH}""#), "bad hash"),
            (format!(r#""{path}","sha256","{}""#, &HASH[1..]), "bad hash"),
            (format!(r#""{path}","sha256","""#), "though its path depends on what is built"),
            (format!(r#""{path}","sha256","impure""#), "though its path depends on what is built"),
            (format!(r#""{path}","SHA256","{HASH}""#), "bad hash algorithm"),
            (format!(r#""{path}","x:sha256","{HASH}""#), "bad hash algorithm"),
            (format!(r#""{path}","git:sha256","{HASH}""#), "this method does not go with this algorithm"),
            (r#""","text:sha1","""#.to_owned(), "this method does not go with this algorithm"),
        ] {
            let message = output(&fields).unwrap_err().to_string();
            assert!(message.contains(words), "{fields}: {message}");
        }
    }

    #[test]
    fn refused_with_a_position() {
        for (text, message) in [
            ("", "expected string 'Derive([' at byte 0, found the end of the text"),
            ("Derive[", "expected string 'Derive([' at byte 0, found 'Derive['"),
            ("\u{1b}[31m", "expected string 'Derive([' at byte 0, found '\\u{1b}[31m'"),
            (r#"Derive([],[],[],"s","b",[],[]"#, "expected string ')' at byte 29, found the end of the text"),
            (r#"Derive([],[],[],"s","b",["a""#, "expected string '\"' at byte 28, found the end of the text"),
            (r#"Derive([],[],[],"s","b"#, "the string that begins at byte 20 has no end"),
            (r#"Derive([],[],[],"s","b\"#, "the string that begins at byte 20 has no end"),
            (r#"Derive([],[],[],"s","b",["a",],[])"#, "expected string '\"' at byte 29, found ']'"),
            (r#"Derive([],[],[],"s","b",[,,"a"],[])"#, "expected string '\"' at byte 26, found ','"),
            (r#"Derive([],[], [],"s","b",[],[])"#, "expected string ',[' at byte 12, found ', '"),
            (r#"Derive([("a b","","","")],[],[],"s","b",[],[])"#, "bad output name at byte 9"),
            (
                r#"Derive([],[],[],"a\"b","b",[],[])"#,
                "bad system 'a\"b' at byte 16: it must be text without '\"' and '\\'",
            ),
            (
                r#"DrvWithVersion("xp-dyn-drv",[],[],[],"s","b",[],[])"#,
                "it has the form 'DrvWithVersion', which needs the experimental feature 'dynamic-derivations'; \
                 that is not supported",
            ),
        ] {
            let error = read(&Name::new("x").unwrap(), text.as_bytes()).unwrap_err();
            assert_eq!(error.to_string(), message, "{text}");
        }
    }

    /// Neither length nor nesting nor unfinished escapes take more than one look at each byte.
    #[test]
    fn hostile_texts_end() {
        let name = Name::new("x").unwrap();
        let long = 1 << 22;
        for unit in ["\\", "\"", "[", "(", ",", "\"\"", "\"\",", "(\"\",\"\")", "\\\"", "\0"] {
            for head in ["", "Derive([", r#"Derive([],[],[],"s",""#, r#"Derive([],[],[],"s","b",["#] {
                let text = [head, &unit.repeat(long / unit.len())].concat();
                assert!(read(&name, text.as_bytes()).is_err(), "{head} {unit}");
            }
        }
    }
}
