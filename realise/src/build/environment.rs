//! What a builder is given: program, arguments, environment, and files in its directory.
//!
//! Pure: a derivation and what was decided about its build go in, bytes come out.
//! Source: building, section 4; `builder_environment.json`.

use std::collections::BTreeMap;

use larder_core::base32;
use larder_core::derivation::options::{AttributeError, Attributes};
use larder_core::derivation::placeholder::Placeholder;
use larder_core::derivation::{Derivation, Kind, OutputName};
use larder_core::hash::Sha256Digest;
use larder_core::hash_part::HashPart;
use larder_core::rewrite::Rewriter;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use memchr::memmem;
use serde_json::Value;

use super::attrs;

/// What has been decided about a build.
pub struct Given<'a> {
    pub dir: &'a StoreDir,
    pub drv: &'a Derivation,
    pub attributes: &'a Attributes<'a>,
    pub kind: Kind,
    /// The build directory as the builder sees it.
    pub build_dir: &'a [u8],
    pub cores: u32,
    /// Where the builder is to make each output.
    pub outputs: &'a BTreeMap<OutputName, StorePath>,
    /// Hash parts of final paths, and of those the builder is to make instead.
    pub rewrites: &'a [(HashPart, HashPart)],
    /// A variable of the process that builds.
    pub impure: &'a dyn Fn(&[u8]) -> Option<Vec<u8>>,
    /// Files that `exportReferencesGraph` asks for.
    pub graph_files: BTreeMap<String, Vec<u8>>,
    /// Values that it asks for with structured attributes.
    pub graph_values: BTreeMap<String, Value>,
}

/// What a builder is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// As it stands in the derivation; may be relative, or begin `builtin:`.
    pub program: Vec<u8>,
    /// The name of the program comes first.
    pub args: Vec<Vec<u8>>,
    pub env: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Files to write into the build directory before the builder starts.
    pub files: BTreeMap<String, Vec<u8>>,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnvironmentError {
    #[error(transparent)]
    Attribute(#[from] AttributeError),
    #[error("{what} of the builder has a NUL byte, which no program can be given")]
    Nul { what: &'static str },
}

/// Replaces what stands for the paths of a build by what they are.
struct Replace<'a> {
    /// Placeholders and paths, ascending.
    placeholders: BTreeMap<String, String>,
    rewrites: &'a [(HashPart, HashPart)],
}

impl Replace<'_> {
    fn bytes(&self, text: &[u8]) -> Vec<u8> {
        let mut text = text.to_vec();
        for (placeholder, path) in &self.placeholders {
            // Most values have none, so the finder is not kept.
            if memmem::find(&text, placeholder.as_bytes()).is_some() {
                text = replace(&text, placeholder.as_bytes(), path.as_bytes());
            }
        }
        if !self.rewrites.is_empty() {
            let mut rewriter = Rewriter::new(self.rewrites.iter().copied());
            let mut out = Vec::with_capacity(text.len());
            rewriter.push(&text, &mut out);
            rewriter.finish(&mut out);
            text = out;
        }
        text
    }
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len() + to.len());
    let mut done = 0;
    for at in memmem::find_iter(text, from) {
        out.extend_from_slice(text.get(done..at).unwrap_or_default());
        out.extend_from_slice(to);
        done = at + from.len();
    }
    out.extend_from_slice(text.get(done..).unwrap_or_default());
    out
}

/// Makes what the builder is given.
pub fn prepare(given: &Given<'_>) -> Result<Prepared, EnvironmentError> {
    let replace = Replace {
        placeholders: given
            .outputs
            .iter()
            .map(|(name, path)| (Placeholder::own(name).to_text(), given.dir.full(path)))
            .collect(),
        rewrites: given.rewrites,
    };
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let inside = |name: &str| [given.build_dir, b"/", name.as_bytes()].concat();

    let mut env: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    let mut set = |name: &[u8], value: Vec<u8>| env.insert(name.to_vec(), value);
    // What a derivation may override.
    set(b"PATH", b"/path-not-set".to_vec());
    set(b"HOME", b"/homeless-shelter".to_vec());
    set(b"NIX_STORE", given.dir.as_str().into());
    set(b"NIX_BUILD_CORES", given.cores.to_string().into());
    if let Some(map) = given.attributes.structured() {
        let outputs = given.outputs.iter().map(|(name, path)| (name.to_string(), given.dir.full(path))).collect();
        let value = attrs::complete(map, outputs, &given.graph_values);
        files.insert(".attrs.json".into(), replace.bytes(&attrs::to_json(&value)));
        files.insert(".attrs.sh".into(), replace.bytes(&attrs::to_shell(&value)));
    } else {
        let as_file = given.attributes.strings("passAsFile")?.unwrap_or_default();
        for (name, value) in &given.drv.env {
            let value = replace.bytes(value);
            if as_file.contains(&&**name) {
                let file = format!(".attr-{}", base32::encode(Sha256Digest::of(name).as_bytes()));
                set(&[name, &b"Path"[..]].concat(), inside(&file));
                files.insert(file, value);
            } else {
                set(name, value);
            }
        }
    }
    // What it may not.
    for name in ["NIX_BUILD_TOP", "TMPDIR", "TEMPDIR", "TMP", "TEMP", "PWD"] {
        set(name.as_bytes(), given.build_dir.to_vec());
    }
    if given.attributes.structured().is_some() {
        set(b"NIX_ATTRS_JSON_FILE", inside(".attrs.json"));
        set(b"NIX_ATTRS_SH_FILE", inside(".attrs.sh"));
    }
    if given.kind == Kind::Fixed {
        set(b"NIX_OUTPUT_CHECKED", b"1".to_vec());
    }
    if matches!(given.kind, Kind::Fixed | Kind::Impure) {
        for name in given.attributes.strings("impureEnvVars")?.unwrap_or_default() {
            set(name, (given.impure)(name).unwrap_or_default());
        }
    }
    set(b"NIX_LOG_FD", b"2".to_vec());
    set(b"TERM", b"xterm-256color".to_vec());
    files.extend(given.graph_files.iter().map(|(name, text)| (name.clone(), text.clone())));

    let program = given.drv.builder.to_vec();
    let base = program.rsplit(|b| *b == b'/').next().unwrap_or_default().to_vec();
    let args = std::iter::once(base).chain(given.drv.args.iter().map(|arg| replace.bytes(arg))).collect();
    let prepared = Prepared { program, args, env, files };
    prepared.check()?;
    Ok(prepared)
}

impl Prepared {
    fn check(&self) -> Result<(), EnvironmentError> {
        let nul = |what, bytes: &[u8]| {
            if bytes.contains(&0) { Err(EnvironmentError::Nul { what }) } else { Ok(()) }
        };
        nul("the path", &self.program)?;
        self.args.iter().try_for_each(|arg| nul("an argument", arg))?;
        // What else a name may be is left to the builder, as in real Nix.
        for (name, value) in &self.env {
            nul("the name of a variable", name)?;
            nul("a variable", value)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
