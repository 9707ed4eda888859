//! Vectors and properties of the whole format.

use std::collections::BTreeMap;

use data_encoding::{BASE64, HEXLOWER};
use proptest::prelude::*;
use serde_json::Value;

use super::case_hack::{self, CaseHackError, Names};
use super::*;
use crate::arb::nar::{Tree, name, spoiled_nar, tree};
use crate::hash::{Algorithm, Encoding, Hash};

const NAR: &str = include_str!("../../../tests/vectors/nar.json");
const REJECT: &str = include_str!("../../../tests/vectors/nar_reject.json");
const CASE_HACK: &str = include_str!("../../../tests/vectors/case_hack.json");

fn cases(text: &str) -> Vec<Value> {
    let file: Value = serde_json::from_str(text).unwrap();
    file["cases"].as_array().unwrap().clone()
}

fn b64(value: &Value) -> Vec<u8> {
    BASE64.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

fn sha256_hex(bytes: &[u8]) -> String {
    Hash::of(Algorithm::Sha256, bytes).encode(Encoding::Base16)
}

fn hex(value: &Value) -> Vec<u8> {
    HEXLOWER.decode(value.as_str().unwrap().as_bytes()).unwrap()
}

fn tree_of(node: &Value) -> Tree {
    match node["type"].as_str().unwrap() {
        "regular" => {
            let contents = if let Some(repeat) = node.get("content_repeat") {
                hex(&repeat["byte_hex"]).repeat(repeat["count"].as_u64().unwrap().try_into().unwrap())
            } else {
                b64(&node["content_b64"])
            };
            Tree::File { executable: node["executable"].as_bool().unwrap(), contents }
        }
        "symlink" => Tree::Symlink { target: hex(&node["target_hex"]) },
        "directory" => {
            let entries = node["entries"].as_array().unwrap();
            Tree::Directory(entries.iter().map(|e| (hex(&e["name_hex"]), tree_of(&e["node"]))).collect())
        }
        other => panic!("type {other}"),
    }
}

#[test]
fn vectors_nar() {
    let cases = cases(NAR);
    println!("nar: {} cases", cases.len());
    for case in &cases {
        let id = case["id"].as_str().unwrap();
        let tree = tree_of(&case["tree"]);
        let nar = tree.to_nar();
        assert_eq!(nar.len() as u64, case["nar_size"].as_u64().unwrap(), "{id}");
        assert_eq!(sha256_hex(&nar), case["nar_sha256_hex"], "{id}");
        if let Some(expected) = case.get("nar_b64") {
            assert_eq!(nar, b64(expected), "{id}");
        }
        assert_eq!(Tree::from_pieces([&nar[..]]), Ok((tree, 0)), "{id}");
    }
}

/// `deep-N` of the vectors is compressed there: N directories `d`, one in the other, around a file.
fn deep(levels: usize) -> Vec<u8> {
    let (mut encoder, mut nar) = (Encoder::new(), Vec::new());
    for _ in 0..levels {
        encoder.push(Event::Directory, &mut nar);
        encoder.push(Event::Entry { name: b"d" }, &mut nar);
    }
    encoder.push(Event::File { executable: false, size_bytes: 1 }, &mut nar);
    encoder.push(Event::Contents(b"x"), &mut nar);
    encoder.push(Event::EndFile, &mut nar);
    (0..levels).for_each(|_| encoder.push(Event::EndDirectory, &mut nar));
    nar
}

fn verdict(nar: &[u8], limits: Limits) -> Result<u64, NarError> {
    let (mut parser, mut input) = (Parser::new(limits), nar);
    while parser.next(&mut input)?.is_some() {}
    parser.finish().map(|()| parser.consumed())
}

#[test]
fn vectors_reject() {
    /// Accepted by Nix 2.26, refused here.
    const STRICTER: &[(&str, &str)] = &[("nar-reject-symlink-nul-target", "a target with NUL is cut there by Nix")];
    let cases = cases(REJECT);
    println!("nar_reject: {} cases", cases.len());
    for case in &cases {
        let id = case["id"].as_str().unwrap();
        let real = &case["2.26.3"];
        let nar = match (case.get("nar_b64"), id) {
            (Some(nar), _) => b64(nar),
            (None, "nar-reject-deep-64") => deep(64),
            (None, "nar-reject-deep-200") => deep(200),
            (None, _) => panic!("{id}: no archive"),
        };
        let verdict = verdict(&nar, Limits::default());
        let accepted = real["restore_accepted"].as_bool().unwrap();
        if STRICTER.iter().any(|(other, _)| *other == id) {
            assert!(accepted && verdict.is_err(), "{id}: {verdict:?}");
            continue;
        }
        assert_eq!(verdict.is_ok(), accepted, "{id}: {verdict:?}");
        match verdict {
            Ok(consumed) => {
                let read = &nar[..usize::try_from(consumed).unwrap()];
                assert_eq!(sha256_hex(read), real["restored_nar_sha256_hex"], "{id}");
            }
            Err(error) => println!("{id}: {error}"),
        }
    }
}

/// Each rule of formats 3.2 has its own error, which says where.
#[test]
fn errors_say_what_and_where() {
    let good = Tree::Directory(BTreeMap::from([
        (b"a".to_vec(), Tree::File { executable: true, contents: b"xy".to_vec() }),
        (b"b".to_vec(), Tree::Symlink { target: b"a".to_vec() }),
    ]))
    .to_nar();
    let spoil = |from: &[u8], to: &[u8]| {
        let at = memchr::memmem::rfind(&good, from).unwrap();
        [&good[..at], to, &good[at + from.len()..]].concat()
    };
    let framed = |text: &[u8]| {
        let mut out = (text.len() as u64).to_le_bytes().to_vec();
        out.extend(text);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    };
    let check = |nar: &[u8], text: &str| {
        let error = verdict(nar, Limits::default()).unwrap_err();
        assert!(error.to_string().contains(text), "{error}\nwanted: {text}");
    };
    assert_eq!(verdict(&good, Limits::default()), Ok(good.len() as u64));
    check(b"no archive", "doesn't look like a Nix archive");
    check(b"", "unexpected end-of-file in an archive, after 0 bytes");
    check(&good[..100], "unexpected end-of-file in an archive, after 100 bytes");
    check(&spoil(b"xy\0", b"xy\x01"), "non-zero padding at offset 266");
    check(&spoil(b"type\0", b"type\x01"), "non-zero padding");
    check(&spoil(&framed(b"type"), &framed(b"tipe")), "expected tag 'type', got 'tipe' at offset 400");
    check(&spoil(&framed(b"symlink"), &framed(b"fi\nfo")), "unknown file type 'fi\\nfo'");
    let marker = |value: &[u8]| [framed(b"executable"), framed(value)].concat();
    check(&spoil(&marker(b""), &marker(b"1")), "executable marker has non-empty value '1'");
    check(&spoil(&framed(b"b"), &framed(b"..")), "invalid file name '..'");
    check(&spoil(&framed(b"b"), &framed(b"b/c")), "invalid file name 'b/c'");
    check(&spoil(&framed(b"b"), &framed(b"a")), "not sorted: 'a' follows 'a'");
    check(&spoil(&framed(b"b"), &framed(b"A")), "not sorted: 'A' follows 'a'");
    check(&spoil(&framed(b"b"), &framed(&[b'n'; 256])), "file name of 256 bytes");
    check(&spoil(&framed(b"node"), &framed(b"name")), "expected tag 'node', got 'name'");
    check(&spoil(&framed(b"node"), &framed(&[b'n'; 33])), "tag of 33 bytes");
    check(&spoil(&framed(b"contents"), &framed(b"executable")), "expected tag 'contents', got 'executable'");
    check(
        &spoil(&[2, 0, 0, 0, 0, 0, 0, 0, b'x'], &[2, 0, 0, 0, 0, 0, 0, 128, b'x']),
        "file contents of 9223372036854775810",
    );
    let target = |text: &[u8]| Tree::Symlink { target: text.to_vec() }.to_nar();
    check(&target(b""), "invalid symlink target ''");
    check(&target(b"a\0b"), "invalid symlink target 'a\\u{0}b'");
    check(&target(&[b't'; 4096]), "symlink target of 4096 bytes");
}

#[test]
fn nesting_is_limited_not_the_stack() {
    assert_eq!(verdict(&deep(1024), Limits::default()), Ok(deep(1024).len() as u64));
    assert!(matches!(verdict(&deep(1025), Limits::default()), Err(NarError::TooDeep { max: 1024, .. })));
    let limits = Limits { max_depth: 100_000, ..Limits::default() };
    assert!(verdict(&deep(100_000), limits).is_ok());
}

/// A file of any length passes in constant memory, and its size is kept in 64 bits.
#[test]
fn s088_a_file_beyond_4_gib() {
    const SIZE: u64 = (6 << 30) + 3;
    let (mut encoder, mut head, mut tail) = (Encoder::new(), Vec::new(), Vec::new());
    encoder.push(Event::File { executable: false, size_bytes: SIZE }, &mut head);
    encoder.push(Event::EndFile, &mut tail);
    let (mut parser, mut left, mut seen) = (Parser::default(), SIZE, 0);
    assert_eq!(parser.next(&mut &head[..]), Ok(Some(Event::File { executable: false, size_bytes: SIZE })));
    let block = vec![0; 1 << 20];
    while left > 0 {
        let here = usize::try_from(left.min(1 << 20)).unwrap();
        let Some(Event::Contents(piece)) = parser.next(&mut &block[..here]).unwrap() else { panic!() };
        seen += piece.len() as u64;
        left -= here as u64;
    }
    assert_eq!(parser.next(&mut &tail[..]), Ok(Some(Event::EndFile)));
    assert_eq!((seen, parser.is_done()), (SIZE, true));
    assert_eq!(parser.consumed(), SIZE + (head.len() + tail.len()) as u64);
}

#[test]
fn what_follows_stays_and_errors_last() {
    let nar = encoder::file(b"hi", false);
    let longer = [&nar[..], b"more"].concat();
    let (mut parser, mut input) = (Parser::default(), &longer[..]);
    while parser.next(&mut input).unwrap().is_some() {}
    assert_eq!((parser.is_done(), input, parser.consumed()), (true, &b"more"[..], nar.len() as u64));

    let mut parser = Parser::default();
    let first = parser.next(&mut &b"neither nor"[..]).unwrap_err();
    assert_eq!(parser.next(&mut &nar[..]), Err(first.clone()));
    assert_eq!(parser.finish(), Err(first));
}

/// The events of an archive in pieces, contents joined, and what the end says.
fn events(pieces: &[&[u8]]) -> (Vec<(u8, Vec<u8>)>, Result<u64, NarError>) {
    let (mut parser, mut events) = (Parser::default(), Vec::<(u8, Vec<u8>)>::new());
    for mut piece in pieces.iter().copied() {
        loop {
            let (kind, bytes) = match parser.next(&mut piece) {
                Ok(None) => break,
                Ok(Some(event)) => match event {
                    Event::Directory => (0, vec![]),
                    Event::Entry { name } => (1, name.to_vec()),
                    Event::EndDirectory => (2, vec![]),
                    Event::File { executable, size_bytes } => {
                        (3 + u8::from(executable), size_bytes.to_le_bytes().to_vec())
                    }
                    Event::Contents(piece) => (5, piece.to_vec()),
                    Event::EndFile => (6, vec![]),
                    Event::Symlink { target } => (7, target.to_vec()),
                },
                Err(error) => return (events, Err(error)),
            };
            match events.last_mut() {
                Some((5, contents)) if kind == 5 => contents.extend(bytes),
                _ => events.push((kind, bytes)),
            }
        }
    }
    (events, parser.finish().map(|()| parser.consumed()))
}

proptest! {
    #[test]
    fn decode_undoes_encode(tree in tree(), after in 0usize..9) {
        let nar = tree.to_nar();
        prop_assert_eq!(nar.len() % 8, 0);
        let longer = [&nar[..], &vec![7; after]].concat();
        prop_assert_eq!(Tree::from_pieces([&longer[..]]), Ok((tree, after)));
    }

    /// However the archive is cut, the events and the verdict are the same.
    #[test]
    fn cuts_do_not_matter(nar in prop_oneof![tree().prop_map(|t| t.to_nar()), spoiled_nar()],
                          cuts in proptest::collection::vec(1usize..100, 1..20)) {
        let whole = events(&[&nar]);
        let (mut pieces, mut rest) = (Vec::new(), &nar[..]);
        for cut in cuts.iter().cycle() {
            if rest.is_empty() { break }
            let (piece, after) = rest.split_at(rest.len().min(*cut * if rest.len() > 10_000 { 100 } else { 1 }));
            pieces.push(piece);
            rest = after;
        }
        prop_assert_eq!(&events(&pieces), &whole);
        if nar.len() < 5000 {
            let bytes: Vec<&[u8]> = nar.chunks(1).collect();
            prop_assert_eq!(&events(&bytes), &whole);
        }
    }

    /// No beginning of an archive is one.
    #[test]
    fn every_truncation_is_an_error(tree in tree()) {
        let nar = tree.to_nar();
        for end in (0..nar.len()).filter(|end| nar.len() < 20_000 || end % 997 == 0) {
            prop_assert_eq!(verdict(&nar[..end], Limits::default()), Err(NarError::UnexpectedEnd { at: end as u64 }));
        }
    }

    /// A spoiled archive fails, or is the one archive of some other tree.
    #[test]
    fn what_is_accepted_is_canonical(nar in spoiled_nar()) {
        if let Ok((tree, left)) = Tree::from_pieces([&nar[..]]) {
            prop_assert_eq!(&tree.to_nar()[..], &nar[..nar.len() - left]);
        }
    }

    /// On a disk that does not tell cases apart no two names are the same, and dumping gives the
    /// names back unless they had the suffix themselves.
    #[test]
    fn case_hack_round_trip(names in proptest::collection::btree_set(name(), 0..20)) {
        let (mut table, mut on_disk) = (Names::default(), std::collections::HashSet::new());
        for name in &names {
            match table.on_disk(name) {
                Ok(made) => {
                    prop_assert!(on_disk.insert(made.to_ascii_lowercase()), "{} twice", Shown(&made));
                    if memchr::memmem::find(name, case_hack::SUFFIX).is_none() {
                        prop_assert_eq!(case_hack::archive_name(&made), Ok(&name[..]));
                    }
                }
                Err(CaseHackError::Collision { .. }) => {
                    prop_assert!(names.iter().any(|n| memchr::memmem::find(n, case_hack::SUFFIX).is_some()));
                    break;
                }
                Err(other) => panic!("{other}"),
            }
        }
    }
}

/// The names alone; the trees are restored and dumped in the tests of `larder-fs`.
#[test]
fn vectors_case_hack_names() {
    let cases = cases(CASE_HACK);
    println!("case_hack: {} cases", cases.len());
    for case in cases.iter().filter(|case| case["op"] == "restore") {
        let id = case["id"].as_str().unwrap();
        let (tree, _) = Tree::from_pieces([&b64(&case["nar_b64"])[..]]).unwrap();
        let Tree::Directory(entries) = tree else { panic!("{id}") };
        let mut table = Names::default();
        let made: Result<Vec<String>, _> =
            entries.keys().map(|n| table.on_disk(n).map(|n| String::from_utf8(n.into_owned()).unwrap())).collect();
        let real = &case["2.26.3"];
        assert_eq!(made.is_ok(), real["accepted"].as_bool().unwrap(), "{id}: {made:?}");
        if let Ok(made) = made {
            let expected = real["restored_names"].as_array().unwrap().iter().map(|n| n.as_str().unwrap());
            let top: Vec<_> = expected
                .filter_map(|n| match n.split_once('/') {
                    Some((name, "")) => Some(name),
                    Some(_) => None,
                    None => Some(n),
                })
                .collect();
            assert_eq!(made, top, "{id}");
        }
    }
}

/// The suffix never makes a name that the archive has itself (Nix 2.26 has the same rule).
#[test]
fn case_hack_collisions() {
    let check = |names: &[&str], refused: &str| {
        let mut table = Names::default();
        let (last, first) = names.split_last().unwrap();
        for name in first {
            table.on_disk(name.as_bytes()).unwrap();
        }
        let error = table.on_disk(last.as_bytes()).unwrap_err();
        assert!(error.to_string().contains(refused), "{error}");
    };
    check(&["FOO", "FOO~nix~case~hack~1", "foo"], "case-hacked file name 'foo~nix~case~hack~1'");
    check(&["FOO", "foo", "foo~nix~case~hack~1"], "case-hacked file name 'foo~nix~case~hack~1'");
    assert!(matches!(case_hack::archive_name(b"~nix~case~hack~1"), Err(CaseHackError::EmptyName { .. })));
    assert_eq!(case_hack::archive_name(b"a~nix~case~hack~1~nix~case~hack~2"), Ok(&b"a"[..]));
}
