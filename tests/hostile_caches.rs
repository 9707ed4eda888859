//! Caches that lie, break off, or never end: nothing of it becomes valid, and the message says
//! which cache and which path.

use std::path::Path;
use std::time::{Duration, Instant};

use larder_cache::compress::{Method, compress};
use larder_cache::testing::{Answer, Server, Shelf, nar_of};
use larder_core::hash::Sha256Digest;
use larder_core::narinfo::NarInfo;

use crate::house::{House, Run};
use crate::substitute::{fetch, shelf};

/// Makes a record say what is not so.
type Spoil<'a> = &'a dyn Fn(&mut NarInfo);

/// Tries to fetch an object, which must fail: nothing is left of it, and a good cache still helps.
#[track_caller]
fn refused(house: &House, shelf: &Shelf, uri: &str, info: &NarInfo) -> Run {
    refused_with(house, shelf, uri, info, &[])
}

/// The same with more words.
#[track_caller]
pub fn refused_with(house: &House, shelf: &Shelf, uri: &str, info: &NarInfo, more: &[&str]) -> Run {
    let path = shelf.dir.full(&info.info.path);
    let began = Instant::now();
    let fixed = ["-r", &path, "--option", "stalled-download-timeout", "1"];
    let run = fetch(house, shelf, uri, &[&fixed[..], more].concat());
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert_eq!(run.status, Some(1), "{run:?}");
    assert!(!run.stderr.contains("panicked") && !run.stderr.contains("a bug"), "{run:?}");
    let left: Vec<_> = std::fs::read_dir(house.path().join("store"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".links")
        .collect();
    assert_eq!(left, [""; 0], "{run:?}");
    assert_eq!(house.words("nix-store", &format!("--check-validity {path}")).status, Some(1));
    run
}

#[test]
fn sizes_and_hashes_that_are_not_so() {
    let house = House::new();
    let shelf = shelf(&house);
    let good = shelf.add(1, "a", &b"some contents ".repeat(1000), &[], Method::Xz);
    let zeros = Sha256Digest([0; 32]);
    let cases: [(&str, Spoil<'_>); 6] = [
        ("size mismatch", &|info| info.file_size_bytes = Some(info.file_size_bytes.unwrap() + 1)),
        ("there is more than the", &|info| info.file_size_bytes = Some(info.file_size_bytes.unwrap() - 1)),
        ("hash mismatch of 'nar/", &|info| info.file_hash = Some(zeros.to_hash())),
        ("hash mismatch importing path", &|info| info.info.nar_hash = zeros),
        ("size mismatch importing path", &|info| info.info.nar_size_bytes += 1),
        ("there is more than the", &|info| info.info.nar_size_bytes -= 1),
    ];
    for (text, spoil) in cases {
        let mut info = good.clone();
        spoil(&mut info);
        shelf.write(&info);
        let run = refused(&house, &shelf, &shelf.uri(), &info);
        assert!(run.stderr.contains(text) && run.stderr.contains(&shelf.uri()), "{text}: {run:?}");
    }
    // Uncompressed, where the file is the archive.
    let plain = shelf.add(2, "b", b"some contents", &[], Method::None);
    let cases: [Spoil<'_>; 4] = [
        &|info| info.file_hash = Some(zeros.to_hash()),
        &|info| info.file_size_bytes = Some(1),
        &|info| info.info.nar_hash = zeros,
        &|info| (info.info.nar_size_bytes, info.file_size_bytes) = (8, None),
    ];
    for spoil in cases {
        let mut info = plain.clone();
        spoil(&mut info);
        shelf.write(&info);
        refused(&house, &shelf, &shelf.uri(), &info);
    }
}

#[test]
fn bombs_end_where_the_archive_should() {
    let house = House::new();
    let shelf = shelf(&house);
    // A good archive of 64 MiB, of which the narinfo file says that it has a few bytes.
    let block = vec![0; 64 << 20];
    for method in [Method::Zstd, Method::Gzip, Method::Brotli] {
        let mut info = shelf.add(1, "a", b"a", &[], method);
        let bomb = nar_of(&block);
        let packed = compress(method, &bomb).unwrap();
        std::fs::write(shelf.folder.join(&info.url), &packed).unwrap();
        info.file_hash = Some(Sha256Digest::of(&packed).to_hash());
        info.file_size_bytes = Some(packed.len() as u64);
        shelf.write(&info);
        let run = refused(&house, &shelf, &shelf.uri(), &info);
        let text = format!("there is more than the {} bytes it said", info.info.nar_size_bytes);
        assert!(run.stderr.contains(&text), "{run:?}");
        // An archive that says it holds a file of 2^60 bytes, and a narinfo file that agrees.
        let mut liar = Vec::new();
        larder_core::nar::Encoder::new()
            .push(larder_core::nar::Event::File { executable: false, size_bytes: 1 << 60 }, &mut liar);
        liar.extend_from_slice(&block[..1 << 20]);
        let packed = compress(method, &liar).unwrap();
        std::fs::write(shelf.folder.join(&info.url), &packed).unwrap();
        info.file_hash = Some(Sha256Digest::of(&packed).to_hash());
        info.file_size_bytes = Some(packed.len() as u64);
        info.info.nar_size_bytes = (1 << 60) + 112;
        shelf.write(&info);
        refused(&house, &shelf, &shelf.uri(), &info);
    }
}

#[test]
fn another_path_and_references_that_nobody_has() {
    let house = House::new();
    let shelf = shelf(&house);
    let a = shelf.add(1, "a", b"a", &[], Method::Xz);
    let b = shelf.add(2, "b", b"b", &[], Method::Xz);
    let file = |info: &NarInfo| shelf.folder.join(format!("{}.narinfo", info.info.path.hash_part()));
    std::fs::copy(file(&b), file(&a)).unwrap();
    let run = refused(&house, &shelf, &shelf.uri(), &a);
    assert!(run.stderr.contains(&format!("tells of '{}'", shelf.dir.full(&b.info.path))), "{run:?}");
    // The same hash part, another name.
    let other = NarInfo {
        info: larder_core::path_info::PathInfo {
            path: format!("{}-z", a.info.path.hash_part()).parse().unwrap(),
            ..a.info.clone()
        },
        ..a.clone()
    };
    shelf.write(&other);
    refused(&house, &shelf, &shelf.uri(), &a);
    let nowhere = format!("{}-nowhere", "7".repeat(32)).parse().unwrap();
    let c = shelf.add(3, "c", b"c", &[&nowhere], Method::Xz);
    let run = refused(&house, &shelf, &shelf.uri(), &c);
    assert!(run.stderr.contains("don't know how to build these paths"), "{run:?}");
    // A narinfo file that is none.
    for junk in ["", "StorePath", "StorePath: /x\n", "URL: nar/x\n\n"] {
        std::fs::write(file(&b), junk).unwrap();
        let run = refused(&house, &shelf, &shelf.uri(), &b);
        assert!(run.stderr.contains(&shelf.uri()) && run.stderr.contains(".narinfo"), "{junk:?}: {run:?}");
    }
}

#[test]
fn files_that_are_none_of_the_caches() {
    let house = House::new();
    let shelf = shelf(&house);
    let good = shelf.add(1, "a", b"a", &[], Method::None);
    let secret = house.write("secret", nar_of(b"a"));
    std::os::unix::fs::symlink("/dev/zero", shelf.folder.join("nar/zero")).unwrap();
    for url in [
        format!("file://{}", secret.display()),
        secret.display().to_string(),
        "../work/secret".into(),
        "nar/../../work/secret".into(),
        "nar/zero".into(),
        "nar".into(),
        "ftp://x/y".into(),
    ] {
        let info = NarInfo { url, ..good.clone() };
        shelf.write(&info);
        refused(&house, &shelf, &shelf.uri(), &info);
    }
    // A server may send elsewhere, but not to files of ours.
    let target = format!("file://{}", secret.display());
    let server = Server::folder(&shelf.folder, Duration::ZERO, move |request| {
        request.path.starts_with("/nar/").then(|| Answer::redirect(&target))
    });
    shelf.write(&good);
    refused(&house, &shelf, &server.url(), &good);
    let info = NarInfo { url: format!("file://{}", secret.display()), ..good };
    shelf.write(&info);
    refused(&house, &shelf, &server.url(), &info);
}

#[test]
fn servers_that_break_off_or_never_end() {
    let house = House::new();
    let shelf = shelf(&house);
    let info = shelf.add(1, "a", &b"some contents".repeat(100), &[], Method::Xz);
    let packed = std::fs::read(shelf.folder.join(&info.url)).unwrap();
    let length = packed.len();
    let endless = |head: &str, again: &[u8]| Answer::Endless { head: head.into(), again: again.to_vec() };
    let ok = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
    let chunk = [b"1000\r\n", &[b'x'; 4096][..], b"\r\n"].concat();
    let answers: Vec<Answer> = vec![
        Answer::status(500),
        Answer::status(404),
        Answer::status(403),
        Answer::Raw(Vec::new()),
        Answer::Raw(b"HTTP/1.1 200 OK\r\nContent-Le".to_vec()),
        Answer::Raw(ok.clone().into_bytes()),
        Answer::Hang(ok.into_bytes()),
        endless("HTTP/1.1 200 OK\r\n", b"X-More: and more of it\r\n"),
        // A body without a length, that has no end.
        endless("HTTP/1.1 200 OK\r\n\r\n", &[b'x'; 4096]),
        endless("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", &chunk),
        Answer::redirect("/nar/again"),
        Answer::Full { status: 200, headers: vec![("Content-Encoding".into(), "zork".into())], body: packed.clone() },
    ];
    for answer in answers {
        for what in ["/nar/", ".narinfo", "/nix-cache-info"] {
            let theirs = answer.clone();
            let server = Server::folder(&shelf.folder, Duration::ZERO, move |request| {
                request.path.contains(what).then(|| theirs.clone())
            });
            let run = refused(&house, &shelf, &server.url(), &info);
            let absent = what == ".narinfo" && matches!(answer, Answer::Full { status: 302 | 403 | 404, .. });
            assert!(absent || run.stderr.contains(&server.url()), "{what} {answer:?}: {run:?}");
            std::fs::remove_dir_all(house.path().join("home/.cache")).ok();
        }
    }
    // Cut at some offsets, without and with ranges: the latter comes whole all the same.
    let path = shelf.dir.full(&info.info.path);
    for at in (0..length).step_by(length / 9 + 1) {
        for ranges in [false, true] {
            let (body, first) = (packed.clone(), std::sync::atomic::AtomicBool::new(true));
            let server = Server::folder(&shelf.folder, Duration::ZERO, move |request| {
                let cut = request.path.starts_with("/nar/")
                    && (!ranges || first.swap(false, std::sync::atomic::Ordering::SeqCst));
                cut.then(|| Answer::cut(&body, at, ranges))
            });
            if ranges {
                let run = fetch(&house, &shelf, &server.url(), &["-r", &path, "--option", "download-attempts", "3"]);
                assert_eq!(run.status, Some(0), "cut at {at}: {run:?}");
                assert_eq!(std::fs::read(&path).unwrap(), b"some contents".repeat(100));
            } else {
                refused(&house, &shelf, &server.url(), &info);
            }
            house.words("nix-store", &format!("--delete {path}"));
        }
    }
    assert!(!Path::new(&path).exists());
    // From a good server it comes, after all that.
    let server = Server::folder(&shelf.folder, Duration::ZERO, |_| None);
    assert_eq!(fetch(&house, &shelf, &server.url(), &["-r", &path]).status, Some(0));
}

#[test]
fn archives_that_are_none() {
    let house = House::new();
    let shelf = shelf(&house);
    let path = |n: usize| format!("{n:032}-a").parse().unwrap();
    let good = nar_of(b"some contents");
    let mut evil = Vec::new();
    let mut encoder = larder_core::nar::Encoder::new();
    for event in [
        larder_core::nar::Event::Directory,
        larder_core::nar::Event::Entry { name: b".." },
        larder_core::nar::Event::Symlink { target: b"/etc" },
        larder_core::nar::Event::EndDirectory,
    ] {
        encoder.push(event, &mut evil);
    }
    let longer = [&good[..], b"behind"].concat();
    for (number, nar) in
        [&b"no archive"[..], &good[..good.len() - 1], &good[..40], &evil, &longer].into_iter().enumerate()
    {
        let info = shelf.add_nar(path(number), nar, &[], Method::Zstd);
        let run = refused(&house, &shelf, &shelf.uri(), &info);
        assert!(run.stderr.contains(&format!("from '{}'", shelf.uri())), "{run:?}");
    }
    let mut info = shelf.add_nar(path(9), &good, &[], Method::Zstd);
    info.compression = "zork".into();
    shelf.write(&info);
    let run = refused(&house, &shelf, &shelf.uri(), &info);
    assert!(run.stderr.contains("unknown compression method 'zork'"), "{run:?}");
    // What it says it is not: compressed by something else.
    for method in ["xz", "bzip2", "gzip", "br", "none"] {
        info.compression = method.into();
        shelf.write(&info);
        refused(&house, &shelf, &shelf.uri(), &info);
    }
}
