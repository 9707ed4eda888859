//! What lies in an archive, and where: `<hash part>.ls`, so that files can be read one by one.
//!
//! `{"version":1,"root":NODE}`; a node is a directory with `entries`, a file with `size`,
//! `narOffset` and maybe `executable`, or a symlink with its `target`. Source: formats, section 8.5.

use larder_core::nar::{Event, NarError, Parser};
use serde_json::{Map, Value, json};

/// Entries of an archive that is listed, at most; a larger one has no listing.
const MAX_ENTRIES: usize = 1 << 20;

/// Watches an archive that passes by.
#[derive(Debug, Default)]
pub struct Lister {
    parser: Parser,
    at: u64,
    tree: Tree,
    entries: usize,
    /// A name or a target is not UTF-8, which JSON cannot say; or it is too much.
    unfit: bool,
}

/// As much of the tree as has come.
#[derive(Debug, Default)]
struct Tree {
    /// Directories that are open, outermost first, each with the name it has in the one before.
    open: Vec<(String, Map<String, Value>)>,
    /// The name of the next node.
    name: String,
    root: Option<Value>,
}

impl Tree {
    fn node(&mut self, node: Value) {
        match self.open.last_mut() {
            Some((_, entries)) => drop(entries.insert(std::mem::take(&mut self.name), node)),
            None => self.root = Some(node),
        }
    }
}

impl Lister {
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes more of the archive.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), NarError> {
        if self.unfit {
            return Ok(());
        }
        loop {
            let before = bytes.len();
            let Some(event) = self.parser.next(&mut bytes)? else {
                self.at += before as u64;
                return Ok(());
            };
            self.at += (before - bytes.len()) as u64;
            match event {
                Event::Directory => {
                    let name = std::mem::take(&mut self.tree.name);
                    self.tree.open.push((name, Map::new()));
                }
                Event::Entry { name } => match std::str::from_utf8(name) {
                    Ok(name) if self.entries < MAX_ENTRIES => {
                        name.clone_into(&mut self.tree.name);
                        self.entries += 1;
                    }
                    _ => {
                        self.unfit = true;
                        return Ok(());
                    }
                },
                Event::EndDirectory => {
                    if let Some((name, entries)) = self.tree.open.pop() {
                        self.tree.name = name;
                        self.tree.node(json!({"type": "directory", "entries": entries}));
                    }
                }
                Event::File { executable, size_bytes } => {
                    let mut node = json!({"type": "regular", "size": size_bytes});
                    if let Some(node) = node.as_object_mut() {
                        if executable {
                            node.insert("executable".into(), true.into());
                        }
                        node.insert("narOffset".into(), self.at.into());
                    }
                    self.tree.node(node);
                }
                Event::Symlink { target } => {
                    let Ok(target) = std::str::from_utf8(target) else {
                        self.unfit = true;
                        return Ok(());
                    };
                    self.tree.node(json!({"type": "symlink", "target": target}));
                }
                Event::Contents(_) | Event::EndFile => {}
            }
        }
    }

    /// The text of the file; `None` if JSON cannot say it, or the archive has not ended.
    pub fn finish(self) -> Option<String> {
        let root = self.tree.root.filter(|_| !self.unfit)?;
        Some(json!({"version": 1, "root": root}).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use larder_core::nar::Encoder;

    #[test]
    fn a_tree_is_listed() {
        let (mut encoder, mut nar) = (Encoder::new(), Vec::new());
        for event in [
            Event::Directory,
            Event::Entry { name: b"d" },
            Event::Directory,
            Event::Entry { name: b"e" },
            Event::Directory,
            Event::EndDirectory,
            Event::EndDirectory,
            Event::Entry { name: b"f" },
            Event::File { executable: false, size_bytes: 3 },
            Event::Contents(b"hi\n"),
            Event::EndFile,
            Event::Entry { name: b"l" },
            Event::Symlink { target: b"f" },
            Event::Entry { name: b"x" },
            Event::File { executable: true, size_bytes: 3 },
            Event::Contents(b"#!\n"),
            Event::EndFile,
            Event::EndDirectory,
        ] {
            encoder.push(event, &mut nar);
        }
        // As Nix 2.8 wrote it for the same tree.
        let expected = r#"{"version":1,"root":{"type":"directory","entries":{"d":{"type":"directory","entries":{"e":{"type":"directory","entries":{}}}},"f":{"type":"regular","size":3,"narOffset":568},"l":{"type":"symlink","target":"f"},"x":{"type":"regular","size":3,"executable":true,"narOffset":984}}}}"#;
        for piece in [1, 7, 8, 64, 5000] {
            let mut lister = Lister::new();
            for bytes in nar.chunks(piece) {
                lister.push(bytes).unwrap();
            }
            assert_eq!(lister.finish().as_deref(), Some(expected), "in pieces of {piece}");
        }
        let mut cut = Lister::new();
        cut.push(&nar[..100]).unwrap();
        assert_eq!(cut.finish(), None);
    }
}
