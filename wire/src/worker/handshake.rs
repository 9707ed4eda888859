//! How a session of the worker protocol begins. Source: protocols, sections 2.2 and 2.3.

use std::collections::BTreeSet;
use std::io::{BufRead, Write};

use larder_core::store_dir::StoreDir;

use super::{MIN_MINOR, MINOR};
use crate::codec::{Budget, Decoder, Encoder, Protocol, WireError};
use crate::value::Wire as _;

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const SERVER_MAGIC: u64 = 0x6478_696f;
const MAJOR: u64 = 1;

/// The feature of programs that know `QueryClosure`, which is Larder's own.
///
/// A server names it only to a client that has named it, so that others see what they know.
const CLOSURES: &str = "larder-closures";

/// What both sides know after the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The minor version that both speak.
    pub minor: u8,
    /// The server's name for its own version, from 1.33 on.
    pub server_version: Option<String>,
    /// Whether the server trusts the client, from 1.35 on, if it says.
    pub trusted: Option<bool>,
    /// Whether both know `QueryClosure`, by a feature (from 1.38 on).
    pub closures: bool,
}

const fn word(minor: u8) -> u64 {
    MAJOR << 8 | minor as u64
}

/// The version that both speak, if there is one.
fn agree(found: u64, newest: u8) -> Result<u8, WireError> {
    let (major, minor) = (found >> 8, found & 0xff);
    let theirs = u8::try_from(minor).unwrap_or(u8::MAX);
    if major != MAJOR || theirs < MIN_MINOR {
        return Err(WireError::Version { major, minor });
    }
    Ok(theirs.min(newest))
}

/// The server's part, up to but without the messages that end it.
///
/// Also gives its last words, which are to be sent with those messages: each write of its own
/// wakes the client. A wrong magic number is answered with nothing.
pub fn accept(
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    dir: &StoreDir,
    version: &str,
    trusted: bool,
) -> Result<(Agreed, Vec<u8>), WireError> {
    let mut out = Vec::with_capacity(64);
    let mut send = |out: &mut Vec<u8>| {
        output.write_all(out).and_then(|()| output.flush()).map_err(WireError::Write)?;
        out.clear();
        Ok::<_, WireError>(())
    };
    let budget = Budget::unlimited();
    let old = Protocol::Worker(MIN_MINOR);
    let mut from = Decoder::new(input, dir, old, budget.clone());
    let found = from.word()?;
    if found != CLIENT_MAGIC {
        return Err(WireError::Magic { found });
    }
    let mut to = Encoder::new(&mut out, dir, old);
    to.word(SERVER_MAGIC);
    to.word(word(MINOR));
    send(&mut out)?;
    let minor = agree(from.word()?, MINOR)?;
    let protocol = Protocol::Worker(minor);
    let mut from = Decoder::new(input, dir, protocol, budget);
    let mut closures = false;
    if protocol.is_worker(38) {
        closures = read_features(&mut from)?.contains(CLOSURES);
        write_features(closures, &mut Encoder::new(&mut out, dir, protocol));
        send(&mut out)?;
    }
    if protocol.is_worker(14) && from.word()? != 0 {
        // The processor that the client runs on: no thread of ours is pinned to it.
        from.word()?;
    }
    if protocol.is_worker(11) {
        from.word()?;
    }
    let mut to = Encoder::new(&mut out, dir, protocol);
    if protocol.is_worker(33) {
        to.text(version);
    }
    if protocol.is_worker(35) {
        to.word(if trusted { 1 } else { 2 });
    }
    let server_version = protocol.is_worker(33).then(|| version.to_owned());
    let trusted = protocol.is_worker(35).then_some(trusted);
    Ok((Agreed { minor, server_version, trusted, closures }, out))
}

fn write_features(closures: bool, to: &mut Encoder<'_>) {
    to.count(usize::from(closures));
    if closures {
        to.text(CLOSURES);
    }
}

/// Features, few and short.
fn read_features(from: &mut Decoder<'_>) -> Result<BTreeSet<String>, WireError> {
    const MAX_FEATURES: u64 = 256;
    let (count, _) = from.count(MAX_FEATURES)?;
    (0..count).map(|_| String::read(from)).collect()
}

/// The client's part, up to but without the messages that end it. `newest` is what it offers.
pub fn connect(
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    dir: &StoreDir,
    newest: u8,
) -> Result<Agreed, WireError> {
    let mut send = |out: &[u8]| output.write_all(out).and_then(|()| output.flush()).map_err(WireError::Write);
    let budget = Budget::unlimited();
    // Servers of any age read both words as they come.
    let mut out = Vec::with_capacity(64);
    let mut to = Encoder::new(&mut out, dir, Protocol::Worker(MIN_MINOR));
    to.word(CLIENT_MAGIC);
    to.word(word(newest));
    send(&out)?;
    let mut from = Decoder::new(input, dir, Protocol::Worker(MIN_MINOR), budget.clone());
    let found = from.word()?;
    if found != SERVER_MAGIC {
        return Err(WireError::Magic { found });
    }
    let minor = agree(from.word()?, newest)?;
    let protocol = Protocol::Worker(minor);
    out.clear();
    let mut to = Encoder::new(&mut out, dir, protocol);
    if protocol.is_worker(38) {
        write_features(true, &mut to);
    }
    for obsolete in [14, 11] {
        if protocol.is_worker(obsolete) {
            to.word(0);
        }
    }
    send(&out)?;
    let mut from = Decoder::new(input, dir, protocol, budget);
    let closures = protocol.is_worker(38) && read_features(&mut from)?.contains(CLOSURES);
    let server_version = if protocol.is_worker(33) { Some(String::read(&mut from)?) } else { None };
    let trusted = if protocol.is_worker(35) {
        match from.word()? {
            0 => None,
            1 => Some(true),
            2 => Some(false),
            found => return Err(WireError::Choice { what: "the trust in the client", found }),
        }
    } else {
        None
    };
    Ok(Agreed { minor, server_version, trusted, closures })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, BufReader};
    use std::os::unix::net::UnixStream;

    /// Client and server of any age understand each other, and nothing is left on the line.
    #[test]
    fn all_versions_meet() {
        let dir = StoreDir::new("/nix/store").unwrap();
        for newest in MIN_MINOR..=MINOR {
            for trusted in [true, false] {
                let (client, server) = UnixStream::pair().unwrap();
                let served = std::thread::spawn({
                    let dir = dir.clone();
                    move || {
                        let (mut input, mut output) = (BufReader::new(&server), &server);
                        let (agreed, last_words) = accept(&mut input, &mut output, &dir, "9.9", trusted).unwrap();
                        output.write_all(&last_words).unwrap();
                        assert_eq!(input.buffer(), b"");
                        agreed
                    }
                });
                let (mut input, mut output) = (BufReader::new(&client), &client);
                let agreed = connect(&mut input, &mut output, &dir, newest).unwrap();
                assert_eq!((agreed.minor, agreed.closures), (newest, newest >= 38));
                assert_eq!(agreed, served.join().unwrap());
                assert_eq!(input.buffer(), b"");
            }
        }
    }

    #[test]
    fn refusals() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let answer = |words: &[u64]| {
            let input: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let mut output = Vec::new();
            let error = accept(&mut &input[..], &mut output, &dir, "9.9", true).unwrap_err();
            (error.to_string(), output.len())
        };
        assert_eq!(answer(&[7]).1, 0);
        assert_eq!(answer(&[]), ("unexpected end-of-file".into(), 0));
        assert!(answer(&[CLIENT_MAGIC, 0x109]).0.contains("version 1.9"));
        assert!(answer(&[CLIENT_MAGIC, 0x209]).0.contains("version 2.9"));
        assert!(answer(&[CLIENT_MAGIC, 1 << 63]).0.contains("not supported"));
        assert!(answer(&[CLIENT_MAGIC, 0x126, 1 << 63]).0.contains("too long"));
        // A version from the future is answered with ours.
        let input: Vec<u8> = [CLIENT_MAGIC, 0x1ff, 0, 0, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        assert_eq!(accept(&mut &input[..], &mut io::sink(), &dir, "9.9", true).unwrap().0.minor, MINOR);
    }

    /// A client that knows nothing of ours, or other features, is told of none.
    #[test]
    fn features_are_for_those_who_know_them() {
        let dir = StoreDir::new("/nix/store").unwrap();
        let greeted = |features: &[&str]| {
            let mut input = Vec::new();
            let mut to = Encoder::new(&mut input, &dir, Protocol::Worker(38));
            to.word(CLIENT_MAGIC);
            to.word(word(38));
            to.count(features.len());
            for feature in features {
                to.text(feature);
            }
            to.word(0);
            to.word(0);
            let mut output = Vec::new();
            let (agreed, _) = accept(&mut &input[..], &mut output, &dir, "9.9", true).unwrap();
            let mut told = output.get(16..).unwrap();
            let mut from = Decoder::new(&mut told, &dir, Protocol::Worker(38), Budget::unlimited());
            (agreed.closures, read_features(&mut from).unwrap())
        };
        assert_eq!(greeted(&[]), (false, BTreeSet::new()));
        assert_eq!(greeted(&["delete-dead-specific-referrers"]), (false, BTreeSet::new()));
        assert_eq!(greeted(&["a", CLOSURES]), (true, BTreeSet::from([CLOSURES.to_owned()])));
        // A server that names what it likes is taken at its word for what we know.
        for (named, known) in [("zork", false), (CLOSURES, true)] {
            let mut said = Vec::new();
            let mut to = Encoder::new(&mut said, &dir, Protocol::Worker(38));
            to.word(SERVER_MAGIC);
            to.word(word(38));
            to.count(1);
            to.text(named);
            to.text("9.9");
            to.word(1);
            assert_eq!(connect(&mut &said[..], &mut io::sink(), &dir, 38).unwrap().closures, known);
        }
    }
}
