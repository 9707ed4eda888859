//! The protocols: messages by themselves, and whole connections.

use std::io::BufReader;

use larder_core::store_dir::StoreDir;
use larder_wire::testing::{MemoryHost, MemoryStore};
use larder_wire::value::Wire as _;
use larder_wire::worker::message::Message;
use larder_wire::worker::ops::Request;
use larder_wire::worker::server::{Options, serve};
use larder_wire::worker::tunnel::Steady;
use larder_wire::worker::{MIN_MINOR, MINOR};
use larder_wire::{Budget, Decoder, Encoder, Protocol, WireError};

fn dir() -> StoreDir {
    StoreDir::new("/nix/store").expect("an absolute path")
}

/// The first byte is the minor version. What can be read is the same after it was written.
pub fn wire(data: &[u8]) {
    let Some((&version, data)) = data.split_first() else { return };
    let protocol = Protocol::Worker(MIN_MINOR + version % (MINOR - MIN_MINOR + 1));
    again(protocol, data, read_request, Request::write);
    again(protocol, data, Message::read, Message::write);
}

fn read_request(from: &mut Decoder<'_>) -> Result<Request, WireError> {
    let code = from.word()?;
    Request::read(code, from)
}

fn again<T: PartialEq + std::fmt::Debug>(
    protocol: Protocol,
    data: &[u8],
    read: fn(&mut Decoder<'_>) -> Result<T, WireError>,
    write: fn(&T, &mut Encoder<'_>),
) {
    let dir = dir();
    let decode = |mut bytes: &[u8]| {
        let value = read(&mut Decoder::new(&mut bytes, &dir, protocol, Budget::new(64 << 20)));
        value.map(|value| (value, bytes.len()))
    };
    let Ok((value, _)) = decode(data) else { return };
    let mut out = Vec::new();
    write(&value, &mut Encoder::new(&mut out, &dir, protocol));
    let (same, left) = decode(&out).expect("what we write can be read");
    assert_eq!((same, left), (value, 0));
}

/// The first byte says how input is cut and whether the client is trusted; the rest is what it
/// sends. Whatever that is, the store is whole afterwards.
pub fn connection(data: &[u8]) {
    let Some((&how, mut data)) = data.split_first() else { return };
    let host = MemoryHost { store: MemoryStore::new(dir()) };
    let options = Options::new("0", how & 1 == 1, Budget::new(64 << 20));
    let mut input = BufReader::with_capacity(usize::from(how >> 1) + 1, &mut data);
    let _ = serve(&mut input, Box::new(Vec::new()), Box::new(Steady), &host, &options);
    host.store.check();
}

/// The same for the serve protocol; the first byte says whether the client may write.
pub fn serve_commands(data: &[u8]) {
    let Some((&how, mut data)) = data.split_first() else { return };
    let host = MemoryHost { store: MemoryStore::new(dir()) };
    let mut input = BufReader::with_capacity(usize::from(how >> 1) + 1, &mut data);
    let mut output = Vec::new();
    let _ = host.serve(&mut input, &mut output, how & 1 == 1);
    host.store.check();
    assert!(how & 1 == 1 || larder_core::api::ReadStore::all_paths(&host.store).is_ok_and(|all| all.is_empty()));
}
