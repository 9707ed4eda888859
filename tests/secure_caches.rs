//! Caches over TLS: whom to believe that they are who they say.

use std::time::Duration;

use larder_cache::compress::Method;
use larder_cache::testing::{Answer, Authority, Identity, Server, Shelf, file_of};

use crate::hostile_caches::refused_with;
use crate::house::{House, run};
use crate::substitute::{fetch, shelf};

/// The files of a shelf, from a server that shows who it is.
fn serve(shelf: &Shelf, identity: &Identity) -> Server {
    let folder = shelf.folder.clone();
    Server::secret(identity, move |request| file_of(&folder, request))
}

#[test]
fn the_setting_and_the_environment_name_authorities() {
    let house = House::new();
    let shelf = shelf(&house);
    let info = shelf.add(1, "a", b"from a", &[], Method::Xz);
    let path = shelf.dir.full(&info.info.path);
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let file = house.write("ours.pem", &ours.pem).display().to_string();
    let both = house.write("both.pem", format!("some words\n{}\n{}", other.pem, ours.pem)).display().to_string();
    let elsewhere = house.write("other.pem", &other.pem).display().to_string();
    let key = shelf.key.public().to_string();
    let get = |url: &str, option: Option<&str>, variables: &[(&str, &str)]| {
        let mut command = house.applet("nix-store");
        command.args(["-r", &path, "--no-gc-warning", "--option", "substituters", url]);
        command.args(["--option", "trusted-public-keys", &key]).envs(variables.iter().copied());
        if let Some(file) = option {
            command.args(["--option", "ssl-cert-file", file]);
        }
        let fetched = run(&mut command, b"");
        if fetched.status == Some(0) {
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "from a");
            house.words("nix-store", &format!("--delete {path}"));
        }
        fetched.status
    };
    let by_name = serve(&shelf, &ours.vouch("localhost", 2150));
    let by_address = serve(&shelf, &ours.vouch("127.0.0.1", 2150));
    for url in [by_name.named_url(), by_address.url()] {
        assert_eq!(get(&url, Some(&file), &[]), Some(0), "{url}");
        assert_eq!(get(&url, Some(&both), &[]), Some(0), "{url}");
        assert_eq!(get(&url, None, &[("NIX_SSL_CERT_FILE", &file)]), Some(0), "{url}");
        assert_eq!(get(&url, None, &[("SSL_CERT_FILE", &file)]), Some(0), "{url}");
        // Who is named first counts, and nobody else.
        assert_eq!(get(&url, Some(&file), &[("NIX_SSL_CERT_FILE", &elsewhere)]), Some(0), "{url}");
        assert_eq!(get(&url, Some(&elsewhere), &[("NIX_SSL_CERT_FILE", &file)]), Some(1), "{url}");
        assert_eq!(get(&url, None, &[("NIX_SSL_CERT_FILE", &elsewhere), ("SSL_CERT_FILE", &file)]), Some(1), "{url}");
    }
}

#[test]
fn servers_that_nobody_vouches_for_are_not_spoken_to() {
    let house = House::new();
    let shelf = shelf(&house);
    let info = shelf.add(1, "a", b"from a", &[], Method::Xz);
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let file = house.write("ours.pem", &ours.pem).display().to_string();
    let good = ours.vouch("localhost", 2150);
    let cases = [
        ("an unknown authority", other.vouch("localhost", 2150), "UnknownIssuer"),
        ("another name", ours.vouch("elsewhere.example", 2150), "certificate not valid for name \"localhost\""),
        ("long ago", ours.vouch("localhost", 2021), "certificate expired"),
    ];
    for (what, identity, reason) in cases {
        let server = serve(&shelf, &identity);
        let url = server.named_url();
        let run = refused_with(&house, &shelf, &url, &info, &["--option", "ssl-cert-file", &file]);
        let said = format!("unable to download '{url}/nix-cache-info'");
        assert!(run.stderr.contains(&said) && run.stderr.contains(reason), "{what}: {run:?}");
        // Asking once more would not help, and nothing was asked at all.
        let more = ["--option", "ssl-cert-file", &file, "--option", "download-attempts", "5"];
        let run = refused_with(&house, &shelf, &url, &info, &more);
        assert!(!run.stderr.contains("retrying"), "{what}: {run:?}");
        assert_eq!(server.take_lines(), [""; 0], "{what}");
        // Who is sent on to such a server stays away, too.
        let (folder, to) = (shelf.folder.clone(), url.clone());
        let sends_on = Server::secret(&good, move |request| match request.path.as_str() {
            path if path.starts_with("/nar/") => Answer::redirect(&format!("{to}{path}")),
            _ => file_of(&folder, request),
        });
        let run = refused_with(&house, &shelf, &sends_on.named_url(), &info, &["--option", "ssl-cert-file", &file]);
        assert!(run.stderr.contains(&sends_on.named_url()) && run.stderr.contains(reason), "{what}: {run:?}");
        std::fs::remove_dir_all(house.path().join("home/.cache")).unwrap();
    }
    // No TLS at all, and an archive that is said to be behind it.
    let plain = Server::start(|_| Answer::status(200));
    let url = plain.url().replace("http:", "https:");
    let run = refused_with(&house, &shelf, &url, &info, &["--option", "ssl-cert-file", &file]);
    assert!(run.stderr.contains(&format!("unable to download '{url}/nix-cache-info'")), "{run:?}");
    // Files that vouch for nobody.
    let server = serve(&shelf, &good);
    let empty = house.write("empty.pem", "no certificate").display().to_string();
    let nowhere = house.work().join("nowhere.pem").display().to_string();
    for (file, reason) in [(&empty, "it holds no certificate"), (&nowhere, "No such file or directory")] {
        let run = refused_with(&house, &shelf, &server.named_url(), &info, &["--option", "ssl-cert-file", file]);
        let said = format!("no server can be trusted: cannot take certificates from '{file}': {reason}");
        assert!(run.stderr.contains(&said), "{run:?}");
    }
    assert_eq!(server.take_lines(), [""; 0]);
    // After all that it comes from the good one.
    let path = shelf.dir.full(&info.info.path);
    let run = fetch(&house, &shelf, &server.named_url(), &["-r", &path, "--option", "ssl-cert-file", &file]);
    assert_eq!(run.status, Some(0), "{run:?}");
}

#[test]
fn a_closure_comes_over_one_connection_unless_http2_is_off() {
    let house = House::new();
    let shelf = shelf(&house);
    let authority = Authority::new("ours");
    let file = house.write("ours.pem", &authority.pem).display().to_string();
    let mut infos = vec![shelf.add(1, "first", b"contents", &[], Method::Zstd)];
    for number in 2..20 {
        let before: Vec<_> = infos.iter().rev().take(3).map(|info| info.info.path.clone()).collect();
        let before: Vec<_> = before.iter().collect();
        infos.push(shelf.add(number, "more", format!("contents {number}").as_bytes(), &before, Method::Xz));
    }
    let top = shelf.dir.full(&infos.last().unwrap().info.path);
    for is_on in [true, false] {
        let folder = shelf.folder.clone();
        let identity = authority.vouch("localhost", 2150);
        let delay = Duration::from_millis(5);
        let server = Server::multiplex(&identity, delay, move |request| file_of(&folder, request));
        let words = ["-r", &top, "--option", "ssl-cert-file", &file, "--option", "http2", &is_on.to_string()];
        let run = fetch(&house, &shelf, &server.named_url(), &words);
        assert_eq!(run.status, Some(0), "{run:?}");
        let asked = server.take_requests();
        assert!(asked.iter().all(|request| request.is_http2 == is_on), "{asked:?}");
        assert!(asked.len() >= 2 * infos.len(), "{asked:?}");
        if is_on {
            assert_eq!(server.connections(), (1, 1));
        }
        let all: Vec<String> = infos.iter().rev().map(|info| shelf.dir.full(&info.info.path)).collect();
        house.words("nix-store", &format!("--delete {}", all.join(" ")));
        std::fs::remove_dir_all(house.path().join("home/.cache")).unwrap();
    }
}
