//! Whole connections against a store in memory: what is asked, what is answered, and what is left.

use std::io::{self, Write as _};
use std::sync::{Arc, Mutex};

use larder_core::api::Outputs;
use larder_core::hash::Sha256Digest;
use larder_core::nar::encoder;
use larder_core::path_info::PathInfo;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use super::*;
use crate::stream::FramedWriter;
use crate::testing::{MemoryHost, MemoryStore};
use crate::value::{Flag, WholeInfo, Wire};
use crate::worker::message::Message;
use crate::worker::ops;
use crate::worker::tunnel::Steady;

/// Output that the test can look at.
#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl io::Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Outlet for Sink {
    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write(bytes)
    }
}

fn dir() -> StoreDir {
    StoreDir::new("/nix/store").unwrap()
}

fn host() -> MemoryHost {
    MemoryHost { store: MemoryStore::new(dir()) }
}

/// What a client sends.
struct Script {
    bytes: Vec<u8>,
    minor: u8,
}

impl Script {
    fn new(minor: u8) -> Self {
        let mut words = vec![0x6e69_7863, 0x100 | u64::from(minor)];
        for from in [38, 14, 11] {
            words.extend((minor >= from).then_some(0));
        }
        Self { bytes: words.iter().flat_map(|w| w.to_le_bytes()).collect(), minor }
    }

    fn with(mut self, write: impl FnOnce(&mut Encoder<'_>)) -> Self {
        write(&mut Encoder::new(&mut self.bytes, &dir(), Protocol::Worker(self.minor)));
        self
    }

    fn ask<O: Operation>(self, operation: &O) -> Self {
        self.with(|to| {
            to.word(O::CODE);
            operation.write(to);
        })
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn framed(mut self, bytes: &[u8]) -> Self {
        let mut writer = FramedWriter::new(&mut self.bytes);
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap();
        self
    }

    /// Plays it, and gives what the server says after the handshake.
    fn play(&self, host: &MemoryHost, trusted: bool) -> Answers {
        self.play_in_pieces(host, trusted, self.bytes.len())
    }

    /// The same when it comes in pieces of this size.
    fn play_in_pieces(&self, host: &MemoryHost, trusted: bool, size: usize) -> Answers {
        let sink = Sink::default();
        let options = Options::new("9.9", trusted, Budget::unlimited());
        let mut input = io::BufReader::with_capacity(size.max(1), &self.bytes[..]);
        let served = serve(&mut input, Box::new(sink.clone()), Box::new(Steady), host, &options);
        host.store.check();
        let mut bytes = sink.0.lock().unwrap().clone();
        let mut head = 16;
        for (from, size) in [(38, 8), (33, 16), (35, 8)] {
            head += if self.minor >= from { size } else { 0 };
        }
        bytes.drain(..head.min(bytes.len()));
        let mut answers = Answers { bytes, minor: self.minor, served };
        if !answers.bytes.is_empty() {
            assert_eq!(answers.outcome(), Ok(()));
        }
        answers
    }
}

struct Answers {
    bytes: Vec<u8>,
    minor: u8,
    served: Result<(), WireError>,
}

impl Answers {
    fn read<T: Wire>(&mut self) -> T {
        let dir = dir();
        let mut rest = &self.bytes[..];
        let value = T::read(&mut Decoder::new(&mut rest, &dir, Protocol::Worker(self.minor), Budget::unlimited()));
        self.bytes = rest.to_vec();
        value.unwrap()
    }

    /// Reads messages up to the one that ends them.
    fn outcome(&mut self) -> Result<(), String> {
        loop {
            match self.read::<Message>() {
                Message::Last => return Ok(()),
                Message::Error(error) => return Err(String::from_utf8(error.text).unwrap()),
                _ => {}
            }
        }
    }

    fn reply<O: Operation>(&mut self) -> Result<O::Reply, String> {
        self.outcome().map(|()| self.read())
    }

    /// The connection went on to its end.
    fn ended_well(self) {
        assert_eq!(self.bytes, b"");
        self.served.unwrap();
    }
}

fn object(name: &str, contents: &[u8]) -> (PathInfo, Vec<u8>) {
    let nar = encoder::file(contents, false);
    let path: StorePath = format!("0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-{name}").parse().unwrap();
    (PathInfo::new(path, Sha256Digest::of(&nar), nar.len() as u64), nar)
}

fn add_nar(info: &PathInfo, dont_check: bool) -> ops::AddToStoreNar {
    ops::AddToStoreNar { info: WholeInfo(info.clone()), repair: Flag(false), dont_check_signatures: Flag(dont_check) }
}

/// Data comes inline, pulled or framed, as the version has it; reads back at each.
#[test]
fn an_object_at_every_version() {
    for minor in super::super::MIN_MINOR..=super::super::MINOR {
        let host = host();
        let (info, nar) = object("x", b"contents");
        let script = Script::new(minor).ask(&add_nar(&info, true));
        let script = match minor {
            23.. => script.framed(&nar),
            21.. => script.with(|to| to.bytes(&nar)),
            _ => script.raw(&nar),
        };
        let script = script
            .ask(&ops::QueryPathInfo { path: info.path.clone() })
            .ask(&ops::NarFromPath { path: info.path.clone() });
        let mut answers = script.play(&host, true);
        assert_eq!(answers.reply::<ops::AddToStoreNar>(), Ok(()), "1.{minor}");
        let found = answers.reply::<ops::QueryPathInfo>().unwrap().0.unwrap();
        assert_eq!((found.nar_hash, found.nar_size_bytes), (info.nar_hash, info.nar_size_bytes));
        answers.outcome().unwrap();
        assert_eq!(answers.bytes, nar);
        answers.served.unwrap();
    }
}

/// Questions that were sent ahead have the same answers as those that come one by one, in their order.
#[test]
fn questions_that_come_together() {
    let host = host();
    let (info, nar) = object("x", b"contents");
    let missing: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-other".parse().unwrap();
    let info_of = |path: &StorePath| ops::QueryPathInfo { path: path.clone() };
    let mut script = Script::new(38).ask(&add_nar(&info, true)).framed(&nar);
    for n in 0..400 {
        script = match n % 23 {
            7 => script.ask(&ops::IsValidPath { path: info.path.clone() }),
            3 | 11 => script.ask(&info_of(&missing)),
            _ => script.ask(&info_of(&info.path)),
        };
    }
    // The last one is cut off.
    let script = script.ask(&info_of(&info.path));
    let script = Script { bytes: script.bytes[..script.bytes.len() - 5].to_vec(), minor: 38 };
    let one_by_one = script.play_in_pieces(&host, true, 1);
    assert!(one_by_one.bytes.len() > 400 * 24 && one_by_one.served.is_err());
    for size in [8, 30, 90, 1000, 8192, script.bytes.len()] {
        let together = script.play_in_pieces(&host, true, size);
        assert!(together.bytes == one_by_one.bytes && together.served.is_err(), "pieces of {size} bytes");
    }
}

/// An operation that fails leaves the connection in step.
#[test]
fn failures_keep_the_connection() {
    let (info, nar) = object("x", b"contents");
    let lie = PathInfo { nar_hash: Sha256Digest([7; 32]), ..info.clone() };
    let host = host();
    let script = Script::new(38)
        // A NAR that lies about its hash.
        .ask(&add_nar(&lie, true))
        .framed(&nar)
        // One that ends early, one with something behind it, and no NAR at all.
        .ask(&add_nar(&info, true))
        .framed(&nar[..50])
        .ask(&add_nar(&info, true))
        .framed(&[&nar[..], b"more"].concat())
        .ask(&add_nar(&info, true))
        .framed(&[7; 64])
        .ask(&ops::NarFromPath { path: info.path.clone() })
        .ask(&ops::QueryPathInfo { path: info.path.clone() })
        .ask(&ops::IsValidPath { path: info.path.clone() });
    let mut answers = script.play(&host, true);
    assert_eq!(answers.outcome(), Err("hash mismatch importing path".into()));
    assert!(answers.outcome().unwrap_err().starts_with("unexpected end-of-file"));
    assert!(answers.outcome().unwrap_err().contains("bytes that do not belong"));
    assert!(answers.outcome().unwrap_err().starts_with("bad archive"));
    assert!(answers.outcome().unwrap_err().ends_with("is not valid"));
    assert_eq!(answers.reply::<ops::QueryPathInfo>().unwrap().0, None);
    assert_eq!(answers.reply::<ops::IsValidPath>(), Ok(false));
    answers.ended_well();
}

#[test]
fn what_an_untrusted_client_may_not() {
    let (info, nar) = object("x", b"contents");
    let host = host();
    let path = || info.path.clone();
    let script = Script::new(38)
        .ask(&add_nar(&info, true))
        .framed(&nar)
        .ask(&ops::BuildPaths { targets: vec![], mode: BuildMode::Repair })
        .ask(&ops::VerifyStore { check_contents: Flag(false), repair: Flag(true) })
        .ask(&ops::AddBuildLog { drv: crate::value::BaseName(path()) })
        .framed(b"log")
        .ask(&ops::AddPermRoot { path: path(), link: FilePath(b"/x".to_vec()) })
        .ask(&ops::ImportPaths {})
        .ask(&ops::BuildPaths { targets: vec![], mode: BuildMode::Normal })
        .ask(&ops::VerifyStore { check_contents: Flag(false), repair: Flag(false) });
    let mut answers = script.play(&host, false);
    for text in [
        "lacks a signature by a trusted key",
        "repairing is not allowed because you are not in 'trusted-users'",
        "you are not privileged to repair paths",
        "you are not privileged to add logs",
        "you are not privileged to create perm roots",
        "importing paths needs signatures",
    ] {
        let error = answers.outcome().unwrap_err();
        assert!(error.contains(text), "{error}");
    }
    assert_eq!(answers.reply::<ops::BuildPaths>(), Ok(One));
    assert_eq!(answers.reply::<ops::VerifyStore>(), Ok(false));
    answers.ended_well();
}

/// Roots that tell of other users' programs are not for everybody.
#[test]
fn roots_are_censored() {
    for trusted in [true, false] {
        let host = host();
        let (info, nar) = object("x", b"");
        let add = Script::new(38).ask(&add_nar(&info, true)).framed(&nar);
        add.play(&host, true);
        let mut answers = Script::new(38).ask(&ops::FindRoots {}).play(&host, trusted);
        let roots = answers.reply::<ops::FindRoots>().unwrap();
        let wanted: &[u8] = if trusted { b"{temp:1}" } else { b"{censored}" };
        assert_eq!(roots[0].link, wanted);
    }
}

/// Requests that cannot be read get one error, and then the connection ends.
#[test]
fn bad_requests_end_the_connection() {
    let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    for (bytes, text) in [
        (words(&[999]), "invalid operation 999"),
        (words(&[1, 1 << 63]), "is too long"),
        (words(&[31, 1 << 63]), "is too long"),
        (words(&[1, 5]), "unexpected end-of-file"),
        (words(&[1]), "unexpected end-of-file"),
        (words(&[1, 0]), "not an absolute path"),
        (words(&[9, 0, 77]), "the build mode"),
        // Frames that say they are huge, and frames without an end.
        (
            [words(&[45, 34]), b"0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x\0\0\0\0\0\0".to_vec(), words(&[1 << 63])].concat(),
            "too large",
        ),
        (
            [words(&[45, 34]), b"0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x\0\0\0\0\0\0".to_vec(), words(&[8, 0])].concat(),
            "unexpected end-of-file",
        ),
    ] {
        let mut answers = Script::new(38).raw(&bytes).play(&host(), true);
        let error = answers.outcome().unwrap_err();
        assert!(error.contains(text), "{error}");
        assert_eq!(answers.bytes, b"");
        assert!(answers.served.is_err(), "{text}");
    }
}

/// An operation of ours is there for those who have agreed on it, and for others as unknown as any.
#[test]
fn closures_are_for_those_who_know_them() {
    let ask = ops::QueryClosure { paths: BTreeSet::new(), include_outputs: Flag(false) };
    let mut answers = Script::new(38).ask(&ask).play(&host(), true);
    assert_eq!(answers.outcome(), Err(format!("invalid operation {}", ops::QueryClosure::CODE)));
    assert!(answers.bytes.is_empty() && answers.served.is_err());
}

/// What the handshake says last and the end of its messages come in one write.
#[test]
fn the_greeting_ends_in_one_write() {
    #[derive(Clone, Default)]
    struct Writes(Arc<Mutex<Vec<usize>>>);
    impl io::Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().push(bytes.len());
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Outlet for Writes {
        fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.write(bytes)
        }
    }
    for (minor, sizes) in [(34, vec![16, 16 + 8]), (37, vec![16, 16 + 8 + 8]), (38, vec![16, 8, 16 + 8 + 8])] {
        let writes = Writes::default();
        let options = Options::new("9.9", true, Budget::unlimited());
        let script = Script::new(minor);
        serve(&mut &script.bytes[..], Box::new(writes.clone()), Box::new(Steady), &host(), &options).unwrap();
        assert_eq!(*writes.0.lock().unwrap(), sizes, "1.{minor}");
    }
}

/// A garbage greeting is answered with nothing.
#[test]
fn garbage_magics() {
    for bytes in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 64]] {
        let sink = Sink::default();
        let options = Options::new("9.9", true, Budget::unlimited());
        let served = serve(&mut &bytes[..], Box::new(sink.clone()), Box::new(Steady), &host(), &options);
        assert!(served.is_err());
        assert_eq!(*sink.0.lock().unwrap(), b"");
    }
}

/// Errors have the form of the version, and its exit status.
#[test]
fn old_errors_have_a_status() {
    let (info, _) = object("x.drv", b"");
    let target = DerivedPath::Built { drv: info.path, outputs: Outputs::All };
    let ask = ops::BuildPaths { targets: vec![target], mode: BuildMode::Normal };
    let mut answers = Script::new(25).ask(&ask).play(&host(), true);
    let Message::Error(error) = answers.read() else { panic!() };
    assert_eq!((error.text.as_slice(), error.status), (&b"error: this store builds nothing"[..], 100));
}

/// What was whole before the fault stays; the rest of the stream is read.
#[test]
fn many_objects() {
    let (first, nar) = object("x", b"1");
    let path: StorePath = "1c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-y".parse().unwrap();
    let second = PathInfo { path, references: [first.path.clone()].into(), ..first.clone() };
    let third = PathInfo { nar_hash: Sha256Digest([1; 32]), ..second.clone() };
    let stream = |infos: &[&PathInfo]| {
        let mut bytes = Vec::new();
        for (i, info) in infos.iter().enumerate() {
            let dir = dir();
            let mut to = Encoder::new(&mut bytes, &dir, Protocol::Worker(38));
            if i == 0 {
                to.word(infos.len() as u64);
            }
            WholeInfo((*info).clone()).write(&mut to);
            bytes.extend_from_slice(&nar);
        }
        bytes
    };
    let ask = ops::AddMultipleToStore { repair: Flag(false), dont_check_signatures: Flag(true) };
    let valid = ops::QueryAllValidPaths {};
    let host = host();
    let script = Script::new(32)
        .ask(&ask)
        .framed(&stream(&[&first, &third]))
        .ask(&valid)
        .ask(&ask)
        .framed(&stream(&[&first, &second]))
        .ask(&valid);
    let mut answers = script.play(&host, true);
    assert!(answers.outcome().is_err());
    assert_eq!(answers.reply::<ops::QueryAllValidPaths>().unwrap().len(), 1);
    assert_eq!(answers.reply::<ops::AddMultipleToStore>(), Ok(()));
    assert_eq!(answers.reply::<ops::QueryAllValidPaths>().unwrap().len(), 2);
    answers.ended_well();
}

/// S096: many paths are asked for in one request.
#[test]
fn s096_one_request_for_many_paths() {
    let host = host();
    let (info, nar) = object("x", b"1");
    let mut paths: BTreeSet<StorePath> =
        (0..10_000).map(|n| format!("2c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-{n}").parse().unwrap()).collect();
    paths.insert(info.path.clone());
    let script =
        Script::new(38).ask(&add_nar(&info, true)).framed(&nar).ask(&ops::QueryValidPaths { paths, substitute: false });
    let mut answers = script.play(&host, true);
    answers.outcome().unwrap();
    assert_eq!(answers.reply::<ops::QueryValidPaths>().unwrap(), BTreeSet::from([info.path]));
    answers.ended_well();
}
