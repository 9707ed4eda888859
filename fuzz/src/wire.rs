//! The protocols: messages by themselves, and whole connections.

use std::collections::BTreeSet;
use std::io::BufReader;
use std::sync::Arc;

use larder_core::api::{BuildMode, Collect, DerivedPath, Outputs, Store};
use larder_core::report::Silent;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;
use larder_wire::serve::client::Client as ServeClient;
use larder_wire::testing::{MemoryHost, MemoryStore};
use larder_wire::value::Wire as _;
use larder_wire::worker::client::Client;
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

/// What a server says to our client, whatever that is: no panic, and after anything that is no
/// error of the server's nothing is asked any more. The first byte is the version that we offer.
pub fn client(data: &[u8]) {
    let Some((&version, data)) = data.split_first() else { return };
    let input = Box::new(BufReader::new(std::io::Cursor::new(data.to_vec())));
    let newest = MIN_MINOR + version % (MINOR - MIN_MINOR + 1);
    let Ok(client) = Client::connect(input, Box::new(std::io::sink()), dir(), newest, Arc::new(Silent)) else { return };
    assert!(client.agreed().minor <= newest);
    ask_everything(&client);
}

/// The same for the client of the serve protocol.
pub fn serve_client(data: &[u8]) {
    let Some((&version, data)) = data.split_first() else { return };
    let input = Box::new(BufReader::new(std::io::Cursor::new(data.to_vec())));
    let newest = version % (larder_wire::serve::MINOR + 1);
    let Ok(client) = ServeClient::connect(input, Box::new(std::io::sink()), dir(), newest) else { return };
    assert!(client.minor() <= newest);
    ask_everything(&client);
}

fn ask_everything(store: &dyn Store) {
    let path: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x".parse().expect("a store path");
    let drv: StorePath = "0c0mv0v7jmmvwkr0fqm8jrc4clmz2w1c-x.drv".parse().expect("a store path");
    let paths: BTreeSet<StorePath> = [path.clone(), drv.clone()].into();
    let targets = [DerivedPath::Built { drv: drv.clone(), outputs: Outputs::All }];
    for _ in 0..3 {
        if let Ok(Some(info)) = store.info(&path) {
            assert_eq!(info.path, path);
        }
        let infos = store.infos(&[path.clone(), drv.clone()]);
        assert!(infos.is_err() || infos.is_ok_and(|infos| infos.len() == 2));
        let _ = store.is_valid(&path);
        let _ = store.hold_valid(&paths, true);
        let _ = store.closure(&paths, true);
        let _ = store.sorted(&paths);
        let _ = store.referrers(&path);
        let _ = store.derivation_outputs(&drv);
        let _ = store.missing(&targets);
        let _ = store.nar(&path, &mut std::io::sink());
        let results = store.build(&targets, BuildMode::Normal);
        assert!(results.is_err() || results.is_ok_and(|results| results.len() == 1));
        let _ = store.realise(&targets, BuildMode::Normal);
        let _ = store.roots();
        let _ = store.collect(&Collect::ListDead, u64::MAX);
    }
}

/// The same as [`connection`] for the serve protocol; the first byte says whether the client may write.
pub fn serve_commands(data: &[u8]) {
    let Some((&how, mut data)) = data.split_first() else { return };
    let host = MemoryHost { store: MemoryStore::new(dir()) };
    let mut input = BufReader::with_capacity(usize::from(how >> 1) + 1, &mut data);
    let mut output = Vec::new();
    let _ = host.serve(&mut input, &mut output, how & 1 == 1);
    host.store.check();
    assert!(how & 1 == 1 || larder_core::api::ReadStore::all_paths(&host.store).is_ok_and(|all| all.is_empty()));
}
