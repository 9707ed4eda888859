//! Every command at every version, and the sessions of real programs.

use larder_core::store_dir::StoreDir;
use proptest::prelude::*;
use serde_json::Value;

use super::MINOR;
use super::ops::{BuildOutcome, Infos, Request};
use crate::codec::{Budget, Decoder, Encoder, Protocol, WireError};
use crate::stream::BareNar;
use crate::value::Wire;

fn dir() -> StoreDir {
    StoreDir::new("/nix/store").unwrap()
}

fn encode(protocol: Protocol, write: impl FnOnce(&mut Encoder<'_>)) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut Encoder::new(&mut out, &dir(), protocol));
    out
}

fn take<T>(
    protocol: Protocol,
    bytes: &mut &[u8],
    read: impl FnOnce(&mut Decoder<'_>) -> Result<T, WireError>,
) -> Result<T, WireError> {
    let dir = dir();
    read(&mut Decoder::new(bytes, &dir, protocol, Budget::unlimited()))
}

fn at_any_version<T: std::fmt::Debug + 'static>(
    arb: fn(Protocol) -> BoxedStrategy<T>,
) -> impl Strategy<Value = (Protocol, T)> {
    (0..=MINOR).prop_map(Protocol::Serve).prop_flat_map(move |protocol| (Just(protocol), arb(protocol)))
}

fn reads_back<T: Wire + PartialEq + std::fmt::Debug>(protocol: Protocol, value: &T) {
    let bytes = encode(protocol, |to| value.write(to));
    let mut rest = &bytes[..];
    assert_eq!(take(protocol, &mut rest, T::read).unwrap(), *value);
    assert_eq!(rest.len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn requests_read_back((protocol, request) in at_any_version(Request::arb)) {
        let bytes = encode(protocol, |to| request.write(to));
        let mut rest = &bytes[..];
        let read = take(protocol, &mut rest, |from| {
            let code = from.word()?;
            Request::read(code, from)
        });
        prop_assert_eq!(read.unwrap(), request);
        prop_assert_eq!(rest.len(), 0);
    }

    #[test]
    fn replies_read_back(
        (protocol, (infos, outcome)) in at_any_version(|protocol| {
            (Infos::arb(protocol), BuildOutcome::arb(protocol)).boxed()
        }),
        (result_protocol, result) in at_any_version(larder_core::api::BuildResult::arb),
    ) {
        reads_back(protocol, &infos);
        reads_back(protocol, &outcome);
        reads_back(result_protocol, &result);
    }
}

/// All of a session is understood, and we would write the same bytes.
fn replay(name: &str, mut c: &[u8], mut s: &[u8]) -> Vec<String> {
    let word = |from: &mut Decoder<'_>| from.word();
    let any = Protocol::Serve(MINOR);
    assert_eq!(take(any, &mut c, word).unwrap(), super::CLIENT_MAGIC, "{name}");
    assert_eq!(take(any, &mut s, word).unwrap(), super::SERVER_MAGIC, "{name}");
    let minor = take(any, &mut c, word).unwrap().min(take(any, &mut s, word).unwrap()) & 0xff;
    let protocol = Protocol::Serve(u8::try_from(minor).unwrap());
    let mut commands = Vec::new();
    while !c.is_empty() {
        let before = c;
        let request = take(protocol, &mut c, |from| {
            let code = from.word()?;
            Request::read(code, from)
        });
        let request = request.unwrap();
        let bytes = encode(protocol, |to| request.write(to));
        assert_eq!(bytes, &before[..before.len() - c.len()], "{name}: {request:?}");
        if let Request::AddToStoreNar(add) = &request {
            let size = usize::try_from(add.info.0.nar_size_bytes).unwrap();
            let mut nar = &c[..size];
            BareNar::new(&mut nar).skip().unwrap();
            assert!(nar.is_empty(), "{name}");
            c = &c[size..];
        }
        let before = s;
        let mut again = Vec::new();
        let dir = dir();
        take(protocol, &mut s, |from| request.copy_reply(from, &mut Encoder::new(&mut again, &dir, protocol))).unwrap();
        assert_eq!(again, &before[..before.len() - s.len()], "{name}: {request:?}");
        if matches!(request, Request::DumpStorePath(_)) {
            BareNar::new(&mut s).skip().unwrap();
        }
        commands.push(request.name().to_owned());
    }
    assert!(s.is_empty(), "{name}: {} bytes of the server are left", s.len());
    commands
}

#[test]
fn recorded_sessions() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/vectors/wire");
    let index: Value = serde_json::from_slice(&std::fs::read(format!("{folder}/index.json")).unwrap()).unwrap();
    let mut count = 0;
    for case in index["cases"].as_array().unwrap() {
        if case["protocol"] != "serve" {
            continue;
        }
        let name = case["name"].as_str().unwrap();
        let read = |end| std::fs::read(format!("{folder}/{name}.{end}.bin")).unwrap();
        let commands = replay(name, &read("c2s"), &read("s2c"));
        let wanted: Vec<&str> = case["operations"].as_array().unwrap().iter().map(|o| o.as_str().unwrap()).collect();
        assert_eq!(commands, wanted, "{name}");
        count += 1;
    }
    println!("serve sessions: {count}");
    assert_eq!(count, 10);
}
