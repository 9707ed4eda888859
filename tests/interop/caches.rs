//! Caches made by real Nix and read by Larder, and the other way round.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use larder_cache::testing::{Server, file_of};

use super::has_nix;
use crate::house::{House, run};
use crate::served::Land;
use crate::serving::Serving;

const EXPRESSION: &str = r#"
let
  mk = name: script: derivation {
    inherit name; system = builtins.currentSystem; builder = "/bin/sh";
    PATH = "/bin:/usr/bin"; args = [ "-e" "-c" script ];
  };
  tree = mk "tree" "mkdir -p $out/bin $out/empty; echo '#!/bin/sh' > $out/bin/x; chmod +x $out/bin/x; ln -s bin/x $out/link; : > $out/nothing; echo a b > \"$out/with blank\"";
  numbers = mk "numbers" "seq 1 200000 > $out";
  self = mk "self" "echo $out ${tree} > $out; echo a line of the log";
in mk "top" "mkdir $out; echo ${self} > $out/self; ln -s ${numbers} $out/numbers"
"#;

/// A house where real Nix has built the expression; the path, and the records of its closure.
fn built() -> (House, String, String) {
    let house = House::new();
    let file = house.write("default.nix", EXPRESSION);
    let made = run(real(&house, "nix-build").arg(&file).arg("--no-out-link"), b"");
    assert_eq!(made.status, Some(0), "{}", made.stderr);
    let top = made.stdout.trim_end().to_owned();
    let keys = ["--generate-binary-cache-key", "real-1", "secret", "public"];
    assert_eq!(run(real(&house, "nix-store").args(keys), b"").status, Some(0));
    let records = records(real(&house, "nix-store"), &top);
    (house, top, records)
}

fn real(house: &House, program: &str) -> Command {
    let mut command = house.command(program);
    command
        .env("NIX_CONFIG", "build-users-group =\nexperimental-features = nix-command\nsandbox = false\nsubstituters =");
    command
}

/// What a store knows of the closure of a path: hashes, sizes, derivers, references.
fn records(mut command: Command, top: &str) -> String {
    let program = command.get_program().to_owned();
    let more: Vec<_> = command.get_envs().map(|(n, v)| (n.to_owned(), v.map(ToOwned::to_owned))).collect();
    let again = || {
        let mut again = Command::new(&program);
        again.env_clear();
        for (name, value) in &more {
            if let Some(value) = value {
                again.env(name, value);
            }
        }
        std::os::unix::process::CommandExt::arg0(&mut again, "nix-store");
        again
    };
    let mut text = String::new();
    let mut paths: Vec<String> = run(command.args(["-qR", top]), b"").stdout.lines().map(str::to_owned).collect();
    paths.sort();
    for path in paths {
        for query in ["--hash", "--size", "--deriver", "--references"] {
            let found = run(again().args(["-q", query, &path]), b"");
            assert_eq!(found.status, Some(0), "{query} {path}: {}", found.stderr);
            let mut lines: Vec<&str> = found.stdout.lines().collect();
            lines.sort_unstable();
            text.extend([path.as_str(), " ", query, " ", &lines.join(" "), "\n"]);
        }
    }
    text
}

/// Empties the store of a house.
fn empty(house: &House) {
    for name in ["store", "var", "home/.cache"] {
        let path = house.path().join(name);
        let _ = Command::new("chmod").args(["-R", "u+w"]).arg(&path).output();
        let _ = std::fs::remove_dir_all(&path);
    }
}

#[test]
fn larder_fetches_what_real_nix_copied() {
    if !has_nix() {
        return;
    }
    let (house, top, expected) = built();
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    let secret = house.work().join("secret");
    let methods = ["xz", "bzip2", "gzip", "zstd", "br", "none"];
    for method in methods {
        let to = format!(
            "file://{}?compression={method}&secret-key={}",
            house.work().join(method).display(),
            secret.display()
        );
        let copied = run(real(&house, "nix").args(["copy", "--to", &to, &top]), b"");
        assert_eq!(copied.status, Some(0), "{}", copied.stderr);
    }
    for method in methods {
        let folder = house.work().join(method);
        let server = Server::folder(&folder, Duration::ZERO, |_| None);
        for uri in [format!("file://{}", folder.display()), server.url()] {
            empty(&house);
            let fixed = ["--no-gc-warning", "--option", "substituters", &uri, "--option", "trusted-public-keys"];
            let untrusted = house.run(
                "nix-store",
                fixed.into_iter().chain(["x:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "-r", &top]),
            );
            assert_eq!(untrusted.status, Some(1), "{untrusted:?}");
            let fetched = house.run("nix-store", fixed.into_iter().chain([key.trim_end(), "-r", &top]));
            assert_eq!(fetched.status, Some(0), "{fetched:?}");
            assert_eq!(fetched.stdout, format!("{top}\n"));
            assert_eq!(records(house.applet("nix-store"), &top), expected, "{uri}");
            let verified = house.words("nix-store", "--verify --check-contents");
            assert_eq!(verified.status, Some(0), "{verified:?}");
        }
    }
}

#[test]
fn real_nix_fetches_what_larder_pushed() {
    if !has_nix() {
        return;
    }
    let (house, top, expected) = built();
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    let secret = house.work().join("secret");
    // By way of an unsigned cache into a store of Larder, which then signs.
    let first = format!("file://{}?write-nar-listing=true", house.work().join("first").display());
    assert_eq!(run(real(&house, "nix").args(["copy", "--to", &first, &top]), b"").status, Some(0));
    let methods = ["zstd", "xz", "bzip2", "br", "none", "gzip"];
    empty(&house);
    let from = format!("file://{}?trusted=true", house.work().join("first").display());
    let fetched = house.run("nix-store", ["-r", &top, "--no-gc-warning", "--option", "substituters", &from]);
    assert_eq!(fetched.status, Some(0), "{fetched:?}");
    for method in methods {
        let folder = house.work().join(method);
        let to = format!(
            "file://{}?compression={method}&secret-key={}&write-nar-listing=true",
            folder.display(),
            secret.display()
        );
        let pushed = house.run("larder", ["push", &to, &top]);
        assert!(pushed.status == Some(0) && pushed.stderr.starts_with("copying 4 paths...\n"), "{pushed:?}");
        // Nothing is done twice, and no draft is left.
        house.run("larder", ["push", &to, &top]).prints("");
        let names = |path: &Path| -> Vec<String> {
            std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
        };
        assert!(names(&folder).iter().chain(&names(&folder.join("nar"))).all(|name| !name.contains("tmp")));
        // What lies in the archives is listed as real Nix lists it.
        for name in names(&folder).iter().filter(|name| Path::new(name).extension().is_some_and(|ext| ext == "ls")) {
            let ours = std::fs::read_to_string(folder.join(name)).unwrap();
            assert_eq!(ours, std::fs::read_to_string(house.work().join("first").join(name)).unwrap(), "{name}");
        }
    }
    for method in methods {
        empty(&house);
        let uri = format!("file://{}", house.work().join(method).display());
        let fetched = run(
            real(&house, "nix-store").args([
                "-r",
                &top,
                "--option",
                "substituters",
                &uri,
                "--option",
                "trusted-public-keys",
                key.trim_end(),
            ]),
            b"",
        );
        assert_eq!(fetched.status, Some(0), "{method}: {}", fetched.stderr);
        assert_eq!(records(real(&house, "nix-store"), &top), expected, "{method}");
    }
}

#[test]
fn the_words_of_fetching_are_the_same() {
    if !has_nix() {
        return;
    }
    let (house, top, _) = built();
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    let to =
        format!("file://{}?secret-key={}", house.work().join("c").display(), house.work().join("secret").display());
    assert_eq!(run(real(&house, "nix").args(["copy", "--to", &to, &top]), b"").status, Some(0));
    let uri = format!("file://{}", house.work().join("c").display());
    let nowhere = format!("{}/{}-nowhere", house.path().join("store").display(), "1".repeat(32));
    let fixed = ["--option", "substituters", &uri, "--option", "trusted-public-keys", key.trim_end()];
    for words in
        [&["-r", "--dry-run", &top][..], &["-r", "--dry-run", &top, &nowhere], &["-r", "-Q", &top], &["-r", &top]]
    {
        empty(&house);
        let theirs = run(real(&house, "nix-store").args(words).args(fixed), b"");
        empty(&house);
        let ours = house.run("nix-store", words.iter().copied().chain(fixed));
        // Paths that do not wait for each other come in any order.
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        assert_eq!(sorted(&ours.stderr), sorted(&theirs.stderr), "{words:?}");
        assert_eq!((ours.stdout, ours.status), (theirs.stdout, theirs.status), "{words:?}");
    }
}

/// A command of Nix 2.26.3 with the settings of these tests.
fn trixie(land: &Land, house: &House, program: &str) -> Command {
    let mut command = land.command(house, program);
    command
        .env("NIX_CONFIG", "build-users-group =\nexperimental-features = nix-command\nsandbox = false\nsubstituters =");
    command
}

/// What 2.26.3 fetches from a cache is what was there; into an empty store.
fn trixie_fetches(land: &Land, house: &House, uri: &str, key: &str, top: &str, expected: &str) {
    empty(house);
    let mut command = trixie(land, house, "nix-store");
    let options = ["--option", "substituters", uri, "--option", "trusted-public-keys", key.trim_end()];
    let fetched = run(command.args(["-r", top]).args(options), b"");
    assert_eq!(fetched.status, Some(0), "{uri}: {}", fetched.stderr);
    assert_eq!(fetched.stdout, format!("{top}\n"), "{uri}");
    // Real Nix 2.8 reads the same ledger.
    assert_eq!(records(real(house, "nix-store"), top), expected, "{uri}");
    let verified = run(trixie(land, house, "nix-store").args(["--verify", "--check-contents"]), b"");
    assert_eq!(verified.status, Some(0), "{uri}: {}", verified.stderr);
}

/// Larder fetches a closure into an empty store from a cache that is signed.
fn larder_fetches(house: &House, uri: &str, key: &str, top: &str, expected: &str) {
    empty(house);
    let options = ["--no-gc-warning", "--option", "substituters", uri, "--option", "trusted-public-keys"];
    let fetched = house.run("nix-store", options.into_iter().chain([key.trim_end(), "-r", top]));
    assert_eq!(fetched.status, Some(0), "{uri}: {fetched:?}");
    assert_eq!(records(house.applet("nix-store"), top), expected, "{uri}");
}

#[test]
fn nix_2_26_and_larder_fetch_from_each_other() {
    let Some(land) = Land::trixie().filter(|_| has_nix()) else { return };
    let (house, top, expected) = built();
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    let secret = house.work().join("secret");
    // What 2.26.3 writes, on a disk and by PUT.
    let theirs = house.work().join("theirs");
    let put = house.work().join("put");
    std::fs::create_dir(&put).unwrap();
    let files = put.clone();
    let server = Server::start(move |request| file_of(&files, request));
    for (uri, method) in [(format!("file://{}", theirs.display()), "zstd"), (server.url(), "xz")] {
        let to = format!("{uri}?compression={method}&write-nar-listing=true&secret-key={}", secret.display());
        let copied = run(trixie(&land, &house, "nix").args(["copy", "--to", &to, &top]), b"");
        assert_eq!(copied.status, Some(0), "{to}: {}", copied.stderr);
    }
    for uri in [format!("file://{}", theirs.display()), server.url()] {
        larder_fetches(&house, &uri, &key, &top, &expected);
    }
    // What Larder writes, from the store that it has now.
    let ours = house.work().join("ours");
    std::fs::create_dir(house.work().join("sent")).unwrap();
    let files = house.work().join("sent");
    let sent = Server::start(move |request| file_of(&files, request));
    let uris = [format!("file://{}", ours.display()), sent.url()];
    for uri in &uris {
        let to = format!("{uri}?write-nar-listing=true&secret-key={}", secret.display());
        let pushed = house.run("larder", ["push", &to, &top]);
        assert_eq!(pushed.status, Some(0), "{pushed:?}");
    }
    // The same listings, whoever wrote them; 2.26 sorts the words in them.
    for entry in std::fs::read_dir(&ours).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_some_and(|ext| ext == "ls") {
            let other = theirs.join(entry.file_name().unwrap());
            let read = |path| serde_json::from_slice::<serde_json::Value>(&std::fs::read(path).unwrap()).unwrap();
            assert_eq!(read(entry), read(other));
        }
    }
    for uri in &uris {
        trixie_fetches(&land, &house, uri, &key, &top, &expected);
        let info = run(trixie(&land, &house, "nix").args(["path-info", "--store", uri, "-rS", &top]), b"");
        assert!(info.status == Some(0) && info.stdout.lines().count() == 4, "{uri}: {}", info.stderr);
    }
}

/// Both versions send a closure to a store that Larder serves, and what came is what they have.
#[test]
fn real_nix_writes_to_what_larder_serves() {
    if !has_nix() {
        return;
    }
    let (house, top, expected) = built();
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    house.write("token", "sesame");
    let netrc = house.write("netrc", "machine 127.0.0.1 login x password sesame\n").display().to_string();
    let commands = [Some(real(&house, "nix")), Land::trixie().map(|land| trixie(&land, &house, "nix"))];
    for (number, mut command) in commands.into_iter().flatten().enumerate() {
        let away = house.work().join(format!("away{number}"));
        let part = |name: &str| away.join(name).display().to_string();
        let place = format!("local?real={}&state={}&log={}", part("store"), part("var"), part("log"));
        let mut serve = house.applet("larder");
        serve.args(["serve", "--listen", "127.0.0.1:0", "--store", &place, "--write-token-file", "token"]);
        serve.args(["--option", "trusted-public-keys", key.trim_end()]);
        let serving = Serving::start(serve);
        let to = format!("{}?compression=zstd&secret-key={}", serving.url, house.work().join("secret").display());
        command.args(["copy", "--option", "netrc-file", &netrc, "--to", &to, &top]);
        let copied = run(&mut command, b"");
        assert_eq!(copied.status, Some(0), "{}", copied.stderr);
        let mut ours = house.applet("nix-store");
        ours.env("NIX_REMOTE", &place);
        assert_eq!(records(ours, &top), expected);
        let verified = house.run("nix-store", ["--store", &place, "--verify", "--check-contents"]);
        assert_eq!(verified.status, Some(0), "{verified:?}");
    }
}

#[test]
fn nix_2_26_fetches_from_what_larder_serves() {
    let Some(land) = Land::trixie().filter(|_| has_nix()) else { return };
    let (house, top, expected) = built();
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    let cache = format!("file://{}", house.work().join("cache").display());
    let to = format!("{cache}?secret-key={}", house.work().join("secret").display());
    assert_eq!(run(real(&house, "nix").args(["copy", "--to", &to, &top]), b"").status, Some(0));
    larder_fetches(&house, &cache, &key, &top, &expected);
    // The store of Larder moves away, and is served from there under its own name.
    let away = house.work().join("away");
    std::fs::create_dir(&away).unwrap();
    for name in ["store", "var"] {
        std::fs::rename(house.path().join(name), away.join(name)).unwrap();
    }
    let place = format!("local?real={}&state={}", away.join("store").display(), away.join("var").display());
    for level in ["3", "0"] {
        let mut command = house.applet("larder");
        command.args(["serve", "--listen", "127.0.0.1:0", "--store", &place, "--zstd", level, "--key", "secret"]);
        let serving = Serving::start(command);
        trixie_fetches(&land, &house, &serving.url, &key, &top, &expected);
        let metrics = run(house.command("curl").args(["-sf", &format!("{}/metrics", serving.url)]), b"").stdout;
        assert!(metrics.is_empty() || metrics.contains("larder_requests_total{route=\"nar\"} 4\n"), "{metrics}");
    }
}
