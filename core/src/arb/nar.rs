//! Trees and archives.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::Index;

use crate::nar::{Encoder, Event, NarError, Parser};

/// A tree of file system objects, as far as an archive tells them apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tree {
    File { executable: bool, contents: Vec<u8> },
    Symlink { target: Vec<u8> },
    Directory(BTreeMap<Vec<u8>, Tree>),
}

impl Tree {
    /// The archive of this tree.
    pub fn to_nar(&self) -> Vec<u8> {
        let (mut encoder, mut nar) = (Encoder::new(), Vec::new());
        self.visit(&mut |event| encoder.push(event, &mut nar));
        nar
    }

    /// The events of this tree, in archive order. (Recursive, as the generated trees are shallow.)
    pub fn visit<'a>(&'a self, visitor: &mut impl FnMut(Event<'a>)) {
        match self {
            Tree::File { executable, contents } => {
                visitor(Event::File { executable: *executable, size_bytes: contents.len() as u64 });
                if !contents.is_empty() {
                    visitor(Event::Contents(contents));
                }
                visitor(Event::EndFile);
            }
            Tree::Symlink { target } => visitor(Event::Symlink { target }),
            Tree::Directory(entries) => {
                visitor(Event::Directory);
                for (name, node) in entries {
                    visitor(Event::Entry { name });
                    node.visit(visitor);
                }
                visitor(Event::EndDirectory);
            }
        }
    }

    /// The tree of an archive that comes in the given pieces, and how many bytes follow it.
    pub fn from_pieces<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<(Self, usize), NarError> {
        let (mut parser, mut builder, mut left) = (Parser::default(), Builder::default(), 0);
        for mut piece in pieces {
            while let Some(event) = parser.next(&mut piece)? {
                builder.push(event);
            }
            left += piece.len();
        }
        parser.finish()?;
        Ok((builder.root.expect("an archive has a root"), left))
    }
}

type Open = (BTreeMap<Vec<u8>, Tree>, Vec<u8>);

/// Puts a tree together from events.
#[derive(Debug, Default)]
struct Builder {
    /// Open directories: what is in them, and the name of the entry to come.
    open: Vec<Open>,
    file: Option<(bool, u64, Vec<u8>)>,
    root: Option<Tree>,
}

impl Builder {
    fn push(&mut self, event: Event<'_>) {
        match event {
            Event::Directory => self.open.push((BTreeMap::new(), Vec::new())),
            Event::Entry { name } => self.open.last_mut().expect("entries are in directories").1 = name.to_vec(),
            Event::EndDirectory => {
                let (entries, _) = self.open.pop().expect("a directory is open");
                self.node(Tree::Directory(entries));
            }
            Event::File { executable, size_bytes } => self.file = Some((executable, size_bytes, Vec::new())),
            Event::Contents(piece) => {
                assert!(!piece.is_empty(), "pieces are not empty");
                self.file.as_mut().expect("a file is open").2.extend_from_slice(piece);
            }
            Event::EndFile => {
                let (executable, size_bytes, contents) = self.file.take().expect("a file is open");
                assert_eq!(size_bytes, contents.len() as u64, "pieces add up to the size");
                self.node(Tree::File { executable, contents });
            }
            Event::Symlink { target } => self.node(Tree::Symlink { target: target.to_vec() }),
        }
    }

    fn node(&mut self, node: Tree) {
        match self.open.last_mut() {
            None => assert!(self.root.replace(node).is_none(), "one root"),
            Some((entries, name)) => {
                assert!(entries.insert(name.clone(), node).is_none(), "names differ");
            }
        }
    }
}

const ODD_NAMES: &[&[u8]] = &[
    b" ",
    b"...",
    b"-",
    b"~",
    b"a\nb",
    b"\"q\"",
    b"back\\slash",
    b"\xff",
    b"\xc3",
    "é".as_bytes(),
    "É".as_bytes(),
    b"\x01",
    b"foo~nix~case~hack~1",
    b"FOO",
    b"foo",
    b"default.nix",
];

/// Names of entries: plain ones of few letters (so that some differ in case only), odd ones,
/// any bytes.
pub fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[aAbB]{1,3}".prop_map(String::into_bytes),
        2 => "[a-z]{1,20}".prop_map(String::into_bytes),
        2 => proptest::sample::select(ODD_NAMES).prop_map(<[u8]>::to_vec),
        1 => proptest::collection::vec(1u8..=255, 1..40),
        1 => Just(vec![b'n'; 255]),
    ]
    .prop_map(|mut name| {
        name.iter_mut().filter(|b| **b == b'/').for_each(|b| *b = b'|');
        name
    })
    .prop_filter("`.` and `..` are no names", |name| !matches!(name.as_slice(), b"." | b".."))
}

/// Contents of a file: mostly short, sometimes longer than any buffer on the way.
pub fn contents() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => proptest::collection::vec(any::<u8>(), 0..20),
        2 => proptest::collection::vec(any::<u8>(), 0..2000),
        1 => (any::<u8>(), 60_000usize..140_000).prop_map(|(byte, count)| vec![byte; count]),
    ]
}

/// Any tree an archive can hold.
pub fn tree() -> impl Strategy<Value = Tree> {
    let target = prop_oneof![
        Just(b"../up".to_vec()),
        Just(b"/etc".to_vec()),
        Just(vec![b't'; 4095]),
        proptest::collection::vec(1u8..=255, 1..30),
    ];
    let leaf = prop_oneof![
        3 => (any::<bool>(), contents()).prop_map(|(executable, contents)| Tree::File { executable, contents }),
        1 => target.prop_map(|target| Tree::Symlink { target }),
    ];
    leaf.prop_recursive(5, 40, 8, |node| proptest::collection::btree_map(name(), node, 0..8).prop_map(Tree::Directory))
}

/// A well-formed archive with one place spoiled: a bit flipped, a byte changed, dropped or
/// doubled, a row of eight dropped or doubled, the end cut off.
///
/// Most places that are chosen are framing: contents are long but say little.
pub fn spoiled_nar() -> impl Strategy<Value = Vec<u8>> {
    (tree(), any::<Index>(), any::<u8>(), 0u8..7).prop_map(|(tree, place, value, how)| {
        let mut nar = tree.to_nar();
        let at = place.index(nar.len());
        let row = at / 8 * 8..(at / 8 * 8 + 8).min(nar.len());
        match how {
            0 | 1 => nar[at] ^= 1 << (value % 8),
            2 => nar[at] = value,
            3 => drop(nar.remove(at)),
            4 => nar.insert(at, value),
            5 if value % 2 == 0 => drop(nar.drain(row)),
            5 => {
                let copy = nar[row.clone()].to_vec();
                nar.splice(row.start..row.start, copy);
            }
            _ => nar.truncate(at),
        }
        nar
    })
}
