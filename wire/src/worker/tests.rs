//! Every message at every version, and the sessions of real programs.

use std::io::BufRead;

use larder_core::store_dir::StoreDir;
use proptest::prelude::*;
use serde_json::Value;

use super::message::Message;
use super::ops::{Data, Request, TABLE, copy_reply};
use super::{MIN_MINOR, MINOR};
use crate::codec::{Budget, Decoder, Encoder, Protocol, WireError};
use crate::stream::{BareNar, Framed};
use crate::value::Wire;

fn dir() -> StoreDir {
    StoreDir::new("/nix/store").unwrap()
}

fn encode(protocol: Protocol, write: impl FnOnce(&mut Encoder<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut Encoder::new(&mut out, &dir(), protocol));
    out
}

fn decode<T>(
    protocol: Protocol,
    mut bytes: &[u8],
    read: impl FnOnce(&mut Decoder<'_>) -> Result<T, WireError>,
) -> (Result<T, WireError>, usize) {
    let before = bytes.len();
    let dir = dir();
    let read = read(&mut Decoder::new(&mut bytes, &dir, protocol, Budget::unlimited()));
    (read, before - bytes.len())
}

fn protocols() -> impl Strategy<Value = Protocol> {
    (MIN_MINOR..=MINOR).prop_map(Protocol::Worker)
}

/// At any version, whatever that version can say.
fn at_any_version<T: std::fmt::Debug + 'static>(
    arb: fn(Protocol) -> BoxedStrategy<T>,
) -> impl Strategy<Value = (Protocol, T)> {
    protocols().prop_flat_map(move |protocol| (Just(protocol), arb(protocol)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn requests_read_back((protocol, request) in at_any_version(Request::arb), after in any::<[u8; 3]>()) {
        let mut bytes = encode(protocol, |to| request.write(to));
        let length = bytes.len();
        bytes.extend(after);
        let (read, taken) = decode(protocol, &bytes, |from| {
            let code = from.word()?;
            Request::read(code, from)
        });
        prop_assert_eq!(read.unwrap(), request);
        prop_assert_eq!(taken, length);
    }

    #[test]
    fn replies_read_back((protocol, (code, bytes)) in at_any_version(Request::arb_reply)) {
        let mut again = Vec::new();
        let (dir, mut input) = (dir(), &bytes[..]);
        copy_reply(
            code,
            &mut Decoder::new(&mut input, &dir, protocol, Budget::unlimited()),
            &mut Encoder::new(&mut again, &dir, protocol),
        ).unwrap();
        prop_assert_eq!(input.len(), 0);
        prop_assert_eq!(again, bytes);
    }

    #[test]
    fn messages_read_back((protocol, message) in at_any_version(Message::arb)) {
        let bytes = encode(protocol, |to| message.write(to));
        let (read, taken) = decode(protocol, &bytes, Message::read);
        prop_assert_eq!(read.unwrap(), message);
        prop_assert_eq!(taken, bytes.len());
    }

    /// A request that is cut short is an error; one that is spoiled is an error or another one.
    #[test]
    fn spoiled_requests(
        (protocol, bytes) in at_any_version(|protocol| {
            Request::arb(protocol)
                .prop_flat_map(move |request| {
                    larder_core::arb::texts::spoiled(encode(protocol, |to| request.write(to)))
                })
                .boxed()
        }),
        cut in any::<prop::sample::Index>(),
    ) {
        let read = |from: &mut Decoder<'_>| {
            let code = from.word()?;
            Request::read(code, from)
        };
        let (whole, taken) = decode(protocol, &bytes, read);
        if whole.is_ok() && taken > 0 {
            let (part, _) = decode(protocol, &bytes[..cut.index(taken)], read);
            prop_assert!(matches!(part, Err(WireError::UnexpectedEnd)), "{:?}", part);
        }
    }
}

/// The bytes of one direction, and how far they were read.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn read<T>(&mut self, protocol: Protocol, read: impl FnOnce(&mut Decoder<'_>) -> Result<T, WireError>) -> T {
        let (value, taken) = decode(protocol, self.0, read);
        self.0 = &self.0[taken..];
        value.unwrap()
    }

    #[expect(clippy::redundant_closure_for_method_calls, reason = "the method alone has one lifetime")]
    fn word(&mut self) -> u64 {
        self.read(Protocol::Worker(MINOR), |from| from.word())
    }
}

/// Reads a session of a real client and a real server: all of it is understood, and what we
/// would write in their place are the same bytes. Gives the operations.
fn replay(name: &str, to_server: &[u8], to_client: &[u8]) -> Vec<String> {
    let (mut c, mut s) = (Bytes(to_server), Bytes(to_client));
    assert_eq!((c.word(), s.word()), (0x6e69_7863, 0x6478_696f), "{name}");
    let minor = u8::try_from((c.word() & 0xff).min(s.word() & 0xff)).unwrap();
    let protocol = Protocol::Worker(minor);
    if minor >= 38 {
        let _: (Vec<String>, Vec<String>) = (c.read(protocol, Wire::read), s.read(protocol, Wire::read));
    }
    if minor >= 14 && c.word() != 0 {
        c.word();
    }
    if minor >= 11 {
        c.word();
    }
    if minor >= 33 {
        let _: String = s.read(protocol, Wire::read);
    }
    if minor >= 35 {
        s.word();
    }
    assert_eq!(s.word(), 0x616c_7473, "{name}");
    let mut operations = Vec::new();
    while !c.0.is_empty() {
        let before = c.0;
        let request = c.read(protocol, |from| {
            let code = from.word()?;
            Request::read(code, from)
        });
        let bytes = &before[..before.len() - c.0.len()];
        // Fields that others make meaningless (`hack`: not fixed, so recursive SHA-256) are not kept.
        let is_hack = matches!(&request, Request::AddToStore(r) if format!("{:?}", r.what).contains("\"hack-"));
        if !is_hack {
            assert_eq!(encode(protocol, |to| request.write(to)), bytes, "{name}: {request:?}");
        }
        match request.data(minor) {
            Data::Framed => Framed::new(&mut c.0).skip().unwrap(),
            Data::Nar => BareNar::new(&mut c.0).skip().unwrap(),
            Data::Nothing | Data::Pulled => {}
        }
        let failed = loop {
            let before = s.0;
            let message = s.read(protocol, Message::read);
            let bytes = &before[..before.len() - s.0.len()];
            assert_eq!(encode(protocol, |to| message.write(to)), bytes, "{name}: {message:?}");
            match message {
                Message::Last => break false,
                Message::Error(_) => break true,
                Message::Read(most) => {
                    let data: crate::value::Text = c.read(protocol, Wire::read);
                    assert!(data.0.len() as u64 <= most, "{name}");
                }
                _ => {}
            }
        };
        if !failed {
            let before = s.0;
            let mut again = Vec::new();
            let dir = dir();
            s.read(protocol, |from| request.copy_reply(from, &mut Encoder::new(&mut again, &dir, protocol)));
            assert_eq!(again, &before[..before.len() - s.0.len()], "{name}: {request:?}");
            if matches!(request, Request::NarFromPath(_)) {
                BareNar::new(&mut s.0).skip().unwrap();
            }
        }
        operations.push(format!("{}{}", request.name(), if failed { "!error" } else { "" }));
    }
    assert!(s.0.fill_buf().unwrap().is_empty(), "{name}: {} bytes of the server are left", s.0.len());
    operations
}

#[test]
fn recorded_sessions() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/wire");
    let index: Value = serde_json::from_slice(&std::fs::read(format!("{folder}/index.json")).unwrap()).unwrap();
    let mut count = 0;
    for case in index["cases"].as_array().unwrap() {
        if case["protocol"] != "worker" {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let read = |end| std::fs::read(format!("{folder}/{name}.{end}.bin")).unwrap();
        let operations = replay(name, &read("c2s"), &read("s2c"));
        let wanted: Vec<&str> = case["operations"].as_array().unwrap().iter().map(|o| o.as_str().unwrap()).collect();
        assert_eq!(operations, wanted, "{name}");
        count += 1;
    }
    println!("worker sessions: {count}");
    assert!(count > 80);
}

#[test]
fn bad_requests() {
    let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let read = |bytes: &[u8]| {
        let (read, _) = decode(Protocol::Worker(MINOR), bytes, |from| {
            let code = from.word()?;
            Request::read(code, from)
        });
        read.unwrap_err().to_string()
    };
    let path = |text: &str| {
        encode(Protocol::Worker(MINOR), |to| {
            to.word(1);
            to.text(text);
        })
    };
    for (bytes, error) in [
        (words(&[2]), "invalid operation 2"),
        (words(&[24]), "invalid operation 24"),
        (words(&[1 << 63]), "invalid operation 9223372036854775808"),
        (words(&[1, 1 << 63]), "string of 9223372036854775808 bytes is too long, at most 65536 are allowed"),
        (words(&[1, 1 << 62]), "string of 4611686018427387904 bytes is too long, at most 65536 are allowed"),
        (words(&[31, 1 << 63]), "list of 9223372036854775808 items is too long, at most 4194304 are allowed"),
        (words(&[31, 4 << 20]), "unexpected end-of-file"),
        (words(&[9, 0, 3]), "the build mode has the value 3, which means nothing"),
        (words(&[20, 4]), "the action of a collector has the value 4, which means nothing"),
        (words(&[35, 2]), "serialised integer 2 is too large for type 'b'"),
        (words(&[19, 0, 0, 0, 1 << 32]), "serialised integer 4294967296 is too large for type 'j'"),
        (words(&[1, 1, 1 << 63 | 1]), "non-zero padding"),
        (path(""), "not an absolute path: ''"),
        (path("/etc/passwd"), "path '/etc/passwd' is not in the Nix store"),
        (path("/nix/store/../x"), "path '/nix/x' is not in the Nix store"),
        (
            path("/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x/bin"),
            "path '/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x/bin' is not in the Nix store",
        ),
    ] {
        assert_eq!(read(&bytes), error);
    }
}

/// Sets may come unsorted and with duplicates.
#[test]
fn unsorted_sets() {
    let protocol = Protocol::Worker(MINOR);
    let paths = ["/nix/store/1c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-b", "/nix/store/0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-a"];
    let bytes = encode(protocol, |to| {
        to.word(32);
        to.count(3);
        to.text(paths[0]);
        to.text(paths[1]);
        to.text(paths[0]);
    });
    let (read, _) = decode(protocol, &bytes, |from| {
        let code = from.word()?;
        Request::read(code, from)
    });
    let Request::QuerySubstitutablePaths(read) = read.unwrap() else { panic!() };
    let read: Vec<String> = read.paths.iter().map(|path| dir().full(path)).collect();
    assert_eq!(read, [paths[1], paths[0]]);
}

/// A request takes from the budget what it takes in memory, and gives it back.
#[test]
fn budgets() {
    let bytes = encode(Protocol::Worker(MINOR), |to| {
        to.word(8);
        to.text("x");
        to.bytes(&vec![0; 300_000]);
        to.count(0);
    });
    let dir = dir();
    let read = |budget: &std::sync::Arc<Budget>| {
        let mut input = &bytes[..];
        let mut from = Decoder::new(&mut input, &dir, Protocol::Worker(MINOR), budget.clone());
        let code = from.word().unwrap();
        Request::read(code, &mut from).map(|_| from.into_allowance())
    };
    let budget = Budget::new(600_000);
    let first = read(&budget).unwrap();
    assert!(budget.left() < 400_000);
    let second = read(&budget).unwrap();
    assert_eq!(read(&budget).unwrap_err().to_string(), "Nix daemon out of memory");
    drop(second);
    let third = read(&budget).unwrap();
    drop((first, third));
    assert_eq!(budget.left(), 600_000);
}

#[test]
fn numbers_and_names() {
    let mut codes: Vec<u64> = TABLE.iter().map(|(code, _)| *code).collect();
    assert!(codes.is_sorted());
    codes.dedup();
    assert_eq!(codes.len(), TABLE.len());
    assert!([2, 15, 17, 24, 25].iter().all(|gone| !codes.contains(gone)));
}
