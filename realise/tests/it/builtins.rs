//! Builders that are part of the program, in a sandbox and without.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use larder_core::content_address::Method;
use larder_core::hash::{Algorithm, Hash};
use larder_realise::job::{FailureKind, Mode};

use crate::house::{House, Recipe, WAYS, recipe};

fn builtin(name: &str, builder: &str) -> Recipe {
    Recipe { builder: format!("builtin:{builder}"), system: "builtin".into(), ..recipe(name, "") }
}

/// Answers one request after another with these texts.
fn serve(answers: Vec<(&'static str, Vec<u8>)>) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = std::thread::spawn(move || {
        let mut requests = Vec::new();
        for (status, body) in answers {
            let (mut socket, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            while !request.ends_with(b"\r\n\r\n") && socket.read(&mut byte).unwrap() > 0 {
                request.push(byte[0]);
            }
            requests.push(String::from_utf8(request).unwrap().lines().next().unwrap().to_owned());
            let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            socket.write_all(head.as_bytes()).unwrap();
            socket.write_all(&body).unwrap();
        }
        requests
    });
    (url, server)
}

#[test]
fn fetchurl_over_http() {
    for way in WAYS {
        let house = House::new(way);
        let text = b"contents\n".to_vec();
        let hash = Hash::of(Algorithm::Sha256, &text);
        // A server that is busy for a moment is asked again.
        let (url, server) = serve(vec![("503 Busy", vec![]), ("200 OK", text.clone())]);
        let fetch = builtin("f", "fetchurl").env("url", url + "/x").fixed(Method::Flat, hash);
        let out = house.build(&fetch);
        assert_eq!(house.text(&out), "contents\n");
        assert_eq!(server.join().unwrap(), ["GET /x HTTP/1.1"; 2]);
        assert!(house.log().contains("HTTP error 503"), "{}", house.log());

        let (url, server) = serve(vec![("404 Not Found", vec![])]);
        let gone = builtin("g", "fetchurl").env("url", url.clone() + "/x").fixed(Method::Flat, hash);
        let text = "builder for '{drv}' failed with exit code 1";
        house.fails(&gone, Mode::Normal, FailureKind::Transient, text);
        drop(server);
        let said = format!("error: unable to download '{url}/x': HTTP error 404 ('Not Found')");
        assert!(house.log().contains(&said), "{}", house.log());

        let (url, _server) = serve(vec![("200 OK", b"other".to_vec())]);
        let wrong = builtin("w", "fetchurl").env("url", url + "/x").fixed(Method::Flat, hash);
        assert_eq!(house.fail(&wrong, Mode::Normal).kind, FailureKind::HashMismatch);

        let pure = builtin("p", "fetchurl").env("url", "http://localhost/");
        let text = "'builtin:fetchurl' must be a fixed-output or impure derivation";
        house.fails(&pure, Mode::Normal, FailureKind::InputRejected, text);
        let none = builtin("n", "fetchurl").fixed(Method::Flat, hash);
        house.fail(&none, Mode::Normal);
        assert!(house.log().contains("error: attribute 'url' missing"));
    }
}

#[test]
fn fetchurl_unpacks() {
    for way in WAYS {
        let house = House::new(way);
        let tree = house.build(&recipe("tree", "mkdir $out; echo x > $out/f; ln -s f $out/l"));
        let mut nar = Vec::new();
        house.store.export(std::slice::from_ref(&tree), &mut nar).unwrap();
        // Within the export stream: a number, then the archive of that size.
        let size = usize::try_from(house.info(&tree).nar_size_bytes).unwrap();
        let nar = nar[8..8 + size].to_vec();
        let hash = Hash::of(Algorithm::Sha256, &nar);
        let (url, server) = serve(vec![("200 OK", nar)]);
        let fetch =
            builtin("f", "fetchurl").env("url", url + "/x.nar").env("unpack", "1").fixed(Method::Recursive, hash);
        let out = house.build(&fetch);
        assert_eq!(house.info(&out).nar_hash, house.info(&tree).nar_hash);
        server.join().unwrap();
        let program = b"#!/bin/sh\n".to_vec();
        let nar = larder_core::nar::encoder::file(&program, true);
        let (url, _server) = serve(vec![("200 OK", program)]);
        let fetch = builtin("e", "fetchurl")
            .env("url", url + "/x")
            .env("executable", "1")
            .fixed(Method::Recursive, Hash::of(Algorithm::Sha256, &nar));
        house.build(&fetch);
    }
}

/// What an untrusted client may have fetched is what the builder may read.
#[test]
fn fetchurl_reads_files_as_the_builder() {
    if !crate::house::root_or_skip("fetchurl_reads_files_as_the_builder") {
        return;
    }
    for way in WAYS {
        let house = House::new(way);
        let secret = house.path("secret");
        std::fs::write(&secret, "secret").unwrap();
        std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let fetch = builtin("f", "fetchurl")
            .env("url", format!("file://{}", secret.display()))
            .fixed(Method::Flat, Hash::of(Algorithm::Sha256, b""));
        house.fails(&fetch, Mode::Normal, FailureKind::Transient, "builder for '{drv}' failed with exit code 1");
    }
}

#[test]
fn channels_are_unpacked() {
    for way in WAYS {
        let house = House::new(way);
        for (name, script) in [("plain", "tar c"), ("gz", "tar c -z"), ("bz2", "tar c -j"), ("xz", "tar c -J")] {
            let script = format!("mkdir nixexprs; echo x > nixexprs/default.nix; {script} -f $out nixexprs");
            let archive = house.build(&recipe(name, &script));
            let channel = builtin("channel", "unpack-channel")
                .env("channelName", "name")
                .env("src", house.store.dir().full(&archive))
                .source(&archive);
            let out = house.build(&channel);
            assert_eq!(std::fs::read_to_string(house.real(&out).join("name/default.nix")).unwrap(), "x\n");
        }
        let two = house.build(&recipe("two", "touch a b; tar cf $out a b"));
        let channel = builtin("c", "unpack-channel")
            .env("channelName", "name")
            .env("src", house.store.dir().full(&two))
            .source(&two);
        house.fail(&channel, Mode::Normal);
        assert!(house.log().contains("contains more than one file"), "{}", house.log());
    }
}

#[test]
fn unknown_builtins() {
    let house = House::new(WAYS[0]);
    house.fails(
        &builtin("x", "frob"),
        Mode::Normal,
        FailureKind::Permanent,
        "builder for '{drv}' failed with exit code 1",
    );
    assert_eq!(house.log(), "error: unsupported builtin builder 'frob'\n");
}
