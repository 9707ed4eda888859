//! `larder serve`, and what else goes over HTTP: logs and `nix-prefetch-url`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use larder_cache::testing::{Answer, Server};

use crate::house::{House, Run, run};

/// A server of a house's store; gone when dropped.
pub struct Serving {
    child: Child,
    pub url: String,
}

impl Serving {
    /// A command that tells where it listens.
    pub fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self { child, url: line.trim_end().to_owned() }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(house: &House, words: &[&str]) -> Serving {
    let mut command = house.applet("larder");
    command.args(["serve", "--listen", "127.0.0.1:0"]).args(words);
    Serving::start(command)
}

/// Head and body of what comes back for some bytes, on a connection that is then closed.
fn ask(serving: &Serving, request: &str) -> (String, Vec<u8>) {
    let mut stream = TcpStream::connect(serving.url.trim_start_matches("http://")).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    let at = all.windows(4).position(|four| four == b"\r\n\r\n").map_or(all.len(), |at| at + 4);
    let body = all.split_off(at);
    (String::from_utf8(all).unwrap(), body)
}

fn get(serving: &Serving, path: &str, more: &str) -> (String, Vec<u8>) {
    ask(serving, &format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n"))
}

fn add(house: &House, name: &str, contents: &str) -> String {
    let file = house.write(name, contents);
    house.run("nix-store", ["--add".as_ref(), file.as_os_str()]).stdout.trim_end().to_owned()
}

/// Two derivations, the second of which refers to the first, built; what the second makes.
pub fn built(house: &House) -> (String, String) {
    let json = r#"{"name": "a", "builder": "/bin/sh", "args": ["-e", "-c", "echo a line; echo from a > $out"]}"#;
    house.write("a.json", json);
    let json = r#"{"name": "b", "builder": "/bin/sh", "args": ["-e", "-c", "echo $a > $out"], "derivations": {"a": "a.json"}}"#;
    let file = house.write("b.json", json);
    let drv =
        house.run("larder", ["derivation".as_ref(), "add".as_ref(), file.as_os_str()]).stdout.trim_end().to_owned();
    let made = house.run("nix-store", ["-r", &drv, "--no-gc-warning", "--option", "sandbox", "false"]);
    assert_eq!(made.status, Some(0), "{made:?}");
    let a = house.words("nix-store", &format!("-q --references {}", made.stdout.trim_end())).stdout;
    (made.stdout.trim_end().to_owned(), a.trim_end().to_owned())
}

pub fn hash_part(path: &str) -> &str {
    &path.rsplit('/').next().unwrap()[..32]
}

#[test]
fn what_is_served() {
    let house = House::new();
    let path = add(&house, "f", &"some text ".repeat(500));
    house.run("nix-store", ["--generate-binary-cache-key", "serve-1", "secret", "public"]);
    let serving = serve(&house, &["--key", "secret", "--priority", "7"]);
    let store = house.path().join("store").display().to_string();
    let (head, body) = get(&serving, "/nix-cache-info", "");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let text = format!("StoreDir: {store}\nWantMassQuery: 1\nPriority: 7\nLarderClosure: closure\n");
    assert_eq!(String::from_utf8(body).unwrap(), text);
    let (head, body) = get(&serving, &format!("/{}.narinfo", hash_part(&path)), "");
    let text = String::from_utf8(body).unwrap();
    assert!(head.contains("text/x-nix-narinfo") && text.contains("\nSig: serve-1:"), "{head}{text}");
    let url = text.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap();
    let nar = std::fs::read(house.work().join("nar")).or_else(|_| {
        house.run("nix-store", ["--dump", &path]);
        Ok::<_, std::io::Error>(crate::house::output(house.applet("nix-store").args(["--dump", &path]), b"").stdout)
    });
    let nar = nar.unwrap();
    let url = format!("/{url}");
    let (head, body) = get(&serving, &url, "");
    assert!(
        head.contains("Accept-Ranges: bytes") && head.contains(&format!("Content-Length: {}", nar.len())),
        "{head}"
    );
    assert!(body == nar);
    for (range, expected) in
        [("0-9", 0..10), ("100-", 100..nar.len()), ("-50", nar.len() - 50..nar.len()), ("8-8", 8..9)]
    {
        let (head, body) = get(&serving, &url, &format!("Range: bytes={range}\r\n"));
        assert!(head.starts_with("HTTP/1.1 206 ") && head.contains("Content-Range: bytes "), "{head}");
        assert!(body == nar[expected], "{range}");
    }
    assert!(get(&serving, &url, &format!("Range: bytes={}-\r\n", nar.len())).0.starts_with("HTTP/1.1 416 "));
    let (head, body) = get(&serving, &url, "Accept-Encoding: gzip, zstd\r\n");
    assert!(head.contains("Content-Encoding: zstd") && body.len() < nar.len() / 2, "{head}");
    let (head, body) = ask(&serving, &format!("HEAD {url} HTTP/1.1\r\nConnection: close\r\n\r\n"));
    assert!(head.contains(&format!("Content-Length: {}", nar.len())) && body.is_empty(), "{head}");
    let (_, body) = get(&serving, &format!("/{}.ls", hash_part(&path)), "");
    assert_eq!(
        String::from_utf8(body).unwrap(),
        r#"{"version":1,"root":{"type":"regular","size":5000,"narOffset":96}}"#
    );
    // Two requests on one connection.
    let (head, body) = ask(&serving, "GET /health HTTP/1.1\r\n\r\nGET /health HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && String::from_utf8_lossy(&body).contains("HTTP/1.1 200"));
    let other = url.replacen("nar/", "nar/0", 1);
    for (request, status) in [
        ("GET /../../etc/passwd HTTP/1.1\r\n", 404),
        ("GET /nar/../../../etc/passwd HTTP/1.1\r\n", 404),
        ("GET /log/../../../../etc/passwd HTTP/1.1\r\n", 404),
        ("GET /11111111111111111111111111111111.narinfo HTTP/1.1\r\n", 404),
        ("GET /x.narinfo HTTP/1.1\r\n", 404),
        (&format!("GET {other} HTTP/1.1\r\n"), 404),
        ("DELETE / HTTP/1.1\r\n", 405),
        ("POST /closure HTTP/1.1\r\nContent-Length: 3\r\n", 400),
        ("POST /closure HTTP/1.1\r\nContent-Length: 99999999\r\n", 413),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n", 400),
        ("nonsense\r\n", 400),
    ] {
        let (head, _) = ask(&serving, &format!("{request}Connection: close\r\n\r\nxyz"));
        assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {head}");
    }
    let (head, _) = ask(&serving, &format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(30_000)));
    assert!(head.starts_with("HTTP/1.1 431 "), "{head}");
    let (_, metrics) = get(&serving, "/metrics", "");
    let metrics = String::from_utf8(metrics).unwrap();
    assert!(metrics.contains("larder_requests_total{route=\"nar\"} "), "{metrics}");
    assert!(!metrics.contains("larder_nar_bytes_total 0\n"), "{metrics}");
    // Nothing is protected from collection any more once it was sent.
    assert_eq!(house.words("nix-store", &format!("--delete {path}")).status, Some(0));
    assert!(get(&serving, &url, "").0.starts_with("HTTP/1.1 404 "));
}

/// Moves the store of a house out of the way, so that the same paths can be made again.
fn emptied(house: &House) -> House {
    House::at(house.path())
}

#[test]
fn larder_and_curl_and_real_nix_are_its_clients() {
    let house = House::at(&std::env::temp_dir().join(format!("larder-serving-{}", std::process::id())));
    let (b, a) = built(&house);
    house.run("nix-store", ["--generate-binary-cache-key", "serve-1", "secret", "public"]);
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    // Another place with the same store directory: below a root.
    let moved = house.path().with_extension("served");
    let _ = std::fs::remove_dir_all(&moved);
    std::fs::rename(house.path(), &moved).unwrap();
    let house = emptied(&house);
    let mut command = house.applet("larder");
    let place = format!(
        "local?real={}&state={}&log={}",
        moved.join("store").display(),
        moved.join("var").display(),
        moved.join("log").display()
    );
    let secret = moved.join("work/secret");
    command.args(["serve", "--listen", "127.0.0.1:0", "--store", &place, "--key"]).arg(&secret);
    let serving = Serving::start(command);
    let fetch = |mut command: Command| {
        let fixed = ["--option", "substituters", &serving.url, "--option", "trusted-public-keys", key.trim_end()];
        run(command.args(fixed).args(["-r", &b]), b"")
    };
    let fetched = fetch(house.applet("nix-store"));
    assert_eq!(fetched.status, Some(0), "{fetched:?}");
    assert_eq!(std::fs::read_to_string(&a).unwrap(), "from a\n");
    let (_, metrics) = get(&serving, "/metrics", "");
    let metrics = String::from_utf8(metrics).unwrap();
    // The closure came in one answer.
    assert!(metrics.contains("larder_requests_total{route=\"closure\"} 1\n"), "{metrics}");
    assert!(metrics.contains("larder_requests_total{route=\"narinfo\"} 0\n"), "{metrics}");
    // The log is there for whoever has the path only.
    let log = house.run("nix-store", ["-l", &a, "--option", "substituters", &serving.url]);
    assert_eq!((log.stdout.as_str(), log.status), ("a line\n", Some(0)), "{log:?}");
    assert!(log.stderr.starts_with(&format!("(using build log from {}/log/", serving.url)), "{log:?}");
    if Command::new("curl").arg("--version").output().is_ok() {
        let url = format!("{}/{}.narinfo", serving.url, hash_part(&b));
        let got = run(Command::new("curl").args(["-sSf", "--compressed", &url]), b"");
        assert!(got.stdout.starts_with(&format!("StorePath: {b}\n")), "{got:?}");
    }
    if Command::new("nix-store").arg("--version").output().is_ok() {
        drop(house);
        let house = House::at(&moved.with_extension(""));
        let mut real = house.command("nix-store");
        real.env("NIX_CONFIG", "build-users-group =");
        let fetched = fetch(real);
        assert_eq!(fetched.status, Some(0), "{fetched:?}");
        assert_eq!(std::fs::read_to_string(&a).unwrap(), "from a\n");
    }
    drop(serving);
    let _ = Command::new("chmod").args(["-R", "u+w"]).arg(&moved).arg(moved.with_extension("")).output();
    let _ = std::fs::remove_dir_all(moved.with_extension(""));
    let _ = std::fs::remove_dir_all(&moved);
}

#[test]
fn a_token_is_asked_for() {
    let house = House::new();
    let path = add(&house, "f", "text");
    house.write("token", "sesame\n");
    let serving = serve(&house, &["--token-file", "token"]);
    let file = format!("/{}.narinfo", hash_part(&path));
    let status = |more: &str| get(&serving, &file, more).0.split(' ').nth(1).unwrap().to_owned();
    assert_eq!(status(""), "401");
    assert_eq!(status("Authorization: Bearer sesam\r\n"), "401");
    assert_eq!(status("Authorization: Bearer sesame\r\n"), "200");
    assert_eq!(status("Authorization: Basic dTpzZXNhbWU=\r\n"), "200");
    assert_eq!(status("Authorization: Basic dTp4\r\n"), "401");
    assert!(get(&serving, "/health", "").0.starts_with("HTTP/1.1 200 "));
    assert!(get(&serving, "/metrics", "").0.starts_with("HTTP/1.1 401 "));
    // A client of ours sends it by netrc, or as the URI says.
    let other = House::new();
    let netrc = other.write("netrc", "machine 127.0.0.1 login x password sesame\n");
    let netrc = netrc.display().to_string();
    let nowhere = format!("{}/{}-x", other.path().join("store").display(), "1".repeat(32));
    let asks = |more: &[&str]| {
        let fixed = ["-r", &nowhere, "--option", "download-attempts", "1"];
        other.run("nix-store", fixed.iter().chain(more))
    };
    // The store directory is another, which it can only say if it is let in.
    let inside = "is for Nix stores with prefix";
    assert!(!asks(&["--option", "substituters", &serving.url]).stderr.contains(inside));
    assert!(
        asks(&["--option", "substituters", &serving.url, "--option", "netrc-file", &netrc]).stderr.contains(inside)
    );
    let with_token = format!("{}?token=sesame", serving.url);
    assert!(asks(&["--option", "substituters", &with_token]).stderr.contains(inside));
}

/// A store of its own below a house, under the same name as that of the house, that is served with
/// more words.
fn served_away(house: &House, words: &[&str]) -> (Serving, String) {
    let away = house.work().join("away");
    let part = |name: &str| away.join(name).display().to_string();
    let place = format!("local?real={}&state={}&log={}", part("store"), part("var"), part("log"));
    let mut command = house.applet("larder");
    command.args(["serve", "--listen", "127.0.0.1:0", "--store", &place]).args(words);
    (Serving::start(command), place)
}

#[test]
fn who_knows_the_token_may_write() {
    let house = House::new();
    let (b, a) = built(&house);
    house.run("nix-store", ["--generate-binary-cache-key", "write-1", "secret", "public"]);
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    house.write("token", "sesame\n");
    let options = ["--write-token-file", "token", "--option", "trusted-public-keys", key.trim_end()];
    let (serving, place) = served_away(&house, &options);
    let url = &serving.url;
    let secret = house.work().join("secret").display().to_string();
    let push = |more: &str| house.run("larder", ["push", "--logs", &format!("{url}?{more}"), &b]);
    let refused = push("token=sesam");
    assert!(refused.stderr.contains("HTTP error 401 ('Unauthorized: a token is needed')"), "{refused:?}");
    // Nobody has signed them.
    let refused = push("token=sesame");
    let text =
        format!("HTTP error 403 ('Forbidden: cannot add path '{a}' because it lacks a signature by a trusted key')");
    assert!(refused.stderr.contains(&text) && refused.status == Some(1), "{refused:?}");
    let valid = |path: &str| house.run("nix-store", ["--store", &place, "--check-validity", path]).status == Some(0);
    assert!(!valid(&a) && !valid(&b));
    let pushed = push(&format!("token=sesame&secret-key={secret}&write-nar-listing=true"));
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    assert!(valid(&a) && valid(&b));
    house.run("nix-store", ["--store", &place, "--verify-path", &a, &b]).prints("");
    house.run("nix-store", ["--store", &place, "-q", "--references", &b]).prints(&format!("{a}\n"));
    let log = house.run("nix-store", ["--store", &place, "-l", &a]);
    assert_eq!((log.stdout.as_str(), log.status), ("a line\n", Some(0)), "{log:?}");
    push("token=sesame").prints("");
    // Everybody may read, and finds the signature.
    let (_, text) = get(&serving, &format!("/{}.narinfo", hash_part(&a)), "");
    assert!(String::from_utf8(text).unwrap().contains("\nSig: write-1:"));
    let (_, metrics) = get(&serving, "/metrics", "");
    assert!(!String::from_utf8(metrics).unwrap().contains("larder_taken_bytes_total 0\n"));
    // Without uploads nothing is taken.
    let (closed, _) = served_away(&house, &[]);
    let (head, _) = ask(&closed, "PUT /nar/x HTTP/1.1\r\nAuthorization: Bearer sesame\r\nContent-Length: 1\r\n\r\nx");
    assert!(head.starts_with("HTTP/1.1 405 "), "{head}");
}

/// An answer has a status and says something.
#[track_caller]
fn is((status, answer): (String, String), expected: &str, text: &str) {
    assert!(status == expected && answer.contains(text), "{answer}");
}
#[test]
fn what_is_sent_must_be_what_it_is_said_to_be() {
    let house = House::new();
    let (b, a) = built(&house);
    house.write("token", "sesame\n");
    let words = ["--write-token-file", "token", "--option", "require-sigs", "false", "--upload-space", "5000000"];
    let (serving, place) = served_away(&house, &words);
    let folder = house.work().join("cache");
    let pushed = house.run("larder", ["push", &format!("file://{}?compression=gzip", folder.display()), &b]);
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    let put = |name: &str, body: &[u8], more: &str| {
        let mut stream = TcpStream::connect(serving.url.trim_start_matches("http://")).unwrap();
        let head = format!("PUT /{name} HTTP/1.1\r\nAuthorization: Bearer sesame\r\nConnection: close\r\n{more}");
        stream.write_all(format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes()).unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8(answer).unwrap();
        // After the word that the body may come, if it was waited for.
        (answer.rsplit("HTTP/1.1 ").next().unwrap()[..3].to_owned(), answer)
    };
    let narinfo = |path: &str| std::fs::read_to_string(folder.join(format!("{}.narinfo", hash_part(path)))).unwrap();
    let field = |text: &str, name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
    let (name_a, name_b) = (format!("{}.narinfo", hash_part(&a)), format!("{}.narinfo", hash_part(&b)));
    let (info_a, info_b) = (narinfo(&a), narinfo(&b));
    let (nar_a, nar_b) = (field(&info_a, "URL: "), field(&info_b, "URL: "));
    let bytes = |name: &str| std::fs::read(folder.join(name)).unwrap();
    is(put(&name_a, info_a.as_bytes(), ""), "409", "has not been sent");
    // Other bytes than are told of, fewer of them, and what is no gzip.
    for (body, text) in [
        (bytes(&nar_b), "mismatch"),
        (bytes(&nar_a)[..60].to_vec(), "what was sent"),
        (b"junk".to_vec(), "what was sent"),
    ] {
        is(put(&nar_a, &body, ""), "201", "");
        is(put(&name_a, info_a.as_bytes(), ""), "400", text);
    }
    is(put(&nar_a, &bytes(&nar_a), ""), "201", "");
    for (from, to) in [
        ("NarSize: ", "NarSize: 1"),
        ("NarHash: sha256:0", "NarHash: sha256:1"),
        ("NarHash: sha256:1", "NarHash: sha256:0"),
    ] {
        if info_a.contains(from) {
            is(put(&name_a, info_a.replace(from, to).as_bytes(), ""), "400", "");
        }
    }
    is(put(&name_b, info_a.as_bytes(), ""), "400", "tells of");
    is(put(&name_a, b"junk", ""), "400", "");
    // What it refers to is not there.
    is(put(&nar_b, &bytes(&nar_b), ""), "201", "");
    let (status, answer) = put(&name_b, info_b.as_bytes(), "");
    assert!(["400", "409"].contains(&status.as_str()) && answer.contains(&a), "{answer}");
    for (name, body, more, status) in [
        ("zork", &b"x"[..], "", "404"),
        ("../../etc/passwd", b"x", "", "404"),
        ("nar/../x", b"x", "", "404"),
        ("log/zork", b"x", "", "404"),
        (&name_a, b"x", "Content-Encoding: zork\r\n", "415"),
        (&name_a, b"x", "Content-Encoding: gzip\r\n", "400"),
        ("nar/x", b"x", "Transfer-Encoding: chunked\r\n", "400"),
    ] {
        is(put(name, body, more), status, "");
    }
    // What is too long is refused before it comes.
    let head = "PUT /nar/large HTTP/1.1\r\nAuthorization: Bearer sesame\r\nExpect: 100-continue\r\n";
    let (head, _) = ask(&serving, &format!("{head}Content-Length: 5000001\r\n\r\n"));
    assert!(head.starts_with("HTTP/1.1 413 "), "{head}");
    let all = house.run("nix-store", ["--store", &place, "--dump-db"]);
    assert_eq!((all.stdout.as_str(), all.status), ("", Some(0)), "nothing was registered: {all:?}");
    let left = std::fs::read_dir(house.work().join("away/store")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.filter(|name| name != ".links").count(), 0);
    // In the right order it comes in, also when the client waits to be asked for it.
    is(put(&nar_a, &bytes(&nar_a), "Expect: 100-continue\r\n"), "201", "");
    is(put(&name_a, info_a.as_bytes(), ""), "201", "");
    is(put(&name_b, info_b.as_bytes(), ""), "201", "");
    house.run("nix-store", ["--store", &place, "--verify-path", &a, &b]).prints("");
}

#[test]
fn s019_logs_come_from_log_servers() {
    let house = House::new();
    let (b, _) = built(&house);
    let drv = house.words("nix-store", &format!("-q --deriver {b}")).stdout.trim_end().to_owned();
    let base = drv.rsplit('/').next().unwrap().to_owned();
    std::fs::remove_dir_all(house.path().join("log")).unwrap();
    let path = format!("/logs/{base}");
    let asked = path.clone();
    let server =
        Server::start(
            move |request| {
                if request.path == asked { Answer::File(b"from afar\n".to_vec()) } else { Answer::status(404) }
            },
        );
    for prefix in ["/logs", "/logs/"] {
        let servers = format!("{}/nothing {}{prefix}", server.url(), server.url());
        let log = house.run("nix-store", ["-l", &b, "--option", "log-servers", &servers]);
        // Of 1.x the setting is known, and warned of as in 2.x.
        assert_eq!((log.stdout.as_str(), log.status), ("from afar\n", Some(0)), "{log:?}");
        assert!(log.stderr.contains(&format!("(using build log from {}{path})\n", server.url())), "{log:?}");
    }
    let log = house.run("nix-store", ["-l", &b]);
    assert!(log.stderr.ends_with(&format!("error: build log of derivation '{b}' is not available\n")), "{log:?}");
}

fn prefetch(house: &House, words: &[&str]) -> Run {
    house.run("nix-prefetch-url", words)
}

#[test]
fn files_are_prefetched() {
    // The hashes are those that Nix 2.8 printed.
    const HASH: &str = "1r3v22qkypccqifzbww5lrn6hf1chi23m6zzkyvb8bvg457nxslq";
    let house = House::new();
    house.write("f.txt", "hi\n");
    let url = format!("file://{}", house.work().join("f.txt").display());
    let store = house.path().join("store").display().to_string();
    let run = prefetch(&house, &[&url]);
    assert_eq!((run.stdout.as_str(), run.status), (&*format!("{HASH}\n"), Some(0)), "{run:?}");
    assert!(run.stderr.starts_with(&format!("path is '{store}/")) && run.stderr.ends_with("-f.txt'\n"), "{run:?}");
    let path = run.stderr.trim_end().trim_start_matches("path is '").trim_end_matches('\'').to_owned();
    prefetch(&house, &["--print-path", &url]).prints(&format!("{HASH}\n{path}\n"));
    for (kind, hash) in [("sha1", "fd540npwk7x370s4s2jzpx74wf365jjm"), ("md5", "764efa883dda1e11db47671c4a3bbd9e")] {
        assert_eq!(prefetch(&house, &["--type", kind, &url]).stdout, format!("{hash}\n"));
    }
    let run = prefetch(&house, &["--executable", "--print-path", "--name", "x", &url]);
    assert!(run.stdout.starts_with("19qdn6jdp9i45l6wvas7q9cljnjp1kgm84a9ci9pd247ncdcwnxm\n"), "{run:?}");
    assert!(run.stdout.trim_end().ends_with("-x"), "{run:?}");
    // With its hash it need not be there.
    for hash in [HASH.to_owned(), format!("sha256:{HASH}")] {
        prefetch(&house, &["--print-path", "http://127.0.0.1:1/f.txt", &hash]).prints(&format!("{HASH}\n{path}\n"));
    }
    let other = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
    let run = prefetch(&house, &[&url, other]);
    assert!(run.stderr.starts_with(&format!("error: hash mismatch for '{url}'")) && run.status == Some(1), "{run:?}");
    let nope = url.replace("f.txt", "nope");
    let run = prefetch(&house, &[&nope]);
    assert!(run.stderr.starts_with(&format!("error: unable to download '{nope}'")) && run.status == Some(1), "{run:?}");
    prefetch(&house, &[]).fails_usage("nix-prefetch-url", "you must specify a URL");
    prefetch(&house, &["a", "b", "c"]).fails_usage("nix-prefetch-url", "too many arguments");
    prefetch(&house, &["--zork", "x"]).fails_usage("nix-prefetch-url", "unrecognised flag '--zork'");
    assert_eq!(prefetch(&house, &[&url.replace("f.txt", "")]).status, Some(1));
}

#[test]
fn archives_are_prefetched_and_servers_too() {
    const HASH: &str = "0hvrbf2j2xly3hjh8r2mn9hg833h2kh6ikxrm67510168ri1n4sf\n";
    let house = House::new();
    std::fs::create_dir_all(house.work().join("pk/sub")).unwrap();
    std::fs::write(house.work().join("pk/a"), "x\n").unwrap();
    for (name, words) in [("one.tar.gz", "czf"), ("one.tar.xz", "cJf"), ("one.tar", "cf")] {
        let packed = run(house.command("tar").args([words, name, "pk"]), b"");
        assert_eq!(packed.status, Some(0), "{packed:?}");
    }
    let packed = run(house.command("tar").args(["czf", "many.tar.gz", "-C", "pk", "a", "sub"]), b"");
    assert_eq!(packed.status, Some(0), "{packed:?}");
    let server = Server::folder(&house.work(), Duration::ZERO, |_| None);
    for name in ["one.tar.gz", "one.tar.xz", "one.tar", "many.tar.gz"] {
        let run = prefetch(&house, &["--unpack", &format!("{}/{name}", server.url())]);
        assert_eq!((run.stdout.as_str(), run.status), (HASH, Some(0)), "{name}: {run:?}");
        assert!(run.stderr.ends_with(&format!("-{name}'\n")), "{run:?}");
    }
    let script = "import zipfile\nz = zipfile.ZipFile('one.zip', 'w', zipfile.ZIP_DEFLATED)\nz.write('pk/a')\nz.write('pk/sub')\nz.close()";
    let packed = house.command("python3").args(["-c", script]).status();
    if packed.is_ok_and(|status| status.success()) {
        let url = format!("{}/one.zip", server.url());
        assert_eq!(prefetch(&house, &["--unpack", &url]).stdout, HASH);
        if crate::served::has("nix-prefetch-url") {
            let mut real = house.command("nix-prefetch-url");
            assert_eq!(run(real.args(["--unpack", &url]), b"").stdout, HASH);
        }
    } else {
        println!("skipped: there is no python3 to make a zip archive");
    }
    let run = prefetch(&house, &["--unpack", &format!("{}/pk/a", server.url())]);
    assert!(run.stderr.starts_with("error: failed to open archive") && run.status == Some(1), "{run:?}");
    let url = format!("{}/nope", server.url());
    let run = prefetch(&house, &[&url]);
    assert!(
        run.stderr.contains(&format!("unable to download '{url}': HTTP error 404")) && run.status == Some(1),
        "{run:?}"
    );
}
