//! Caches in buckets, against a server of S3: `moto`, a package of Python.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use crate::house::{House, Run, run};
use crate::served::wait_for;
use crate::serving::{built, hash_part};

/// A server of S3; gone when dropped.
struct Moto {
    child: Child,
    address: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Moto {
    /// With a bucket called `cache`; `None` where there is no such program.
    fn start() -> Option<Self> {
        // The program is a script that may start another: Python itself is the one to end.
        let python = ["python3", "python"].into_iter().find(|python| {
            let tried = Command::new(python).args(["-c", "import moto.server, flask"]).stderr(Stdio::null()).status();
            tried.is_ok_and(|status| status.success())
        });
        let Some(python) = python else {
            println!("skipped: there is no moto here (pip install 'moto[server]')");
            return None;
        };
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
        let mut command = Command::new(python);
        command.args(["-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", &free.port().to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let moto = Self { child, address: free.to_string() };
        wait_for("moto listens", || TcpStream::connect(&moto.address).is_ok());
        assert!(moto.ask("PUT", "/cache").starts_with("HTTP/1.1 200"));
        Some(moto)
    }

    fn ask(&self, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let (address, auth) = (&self.address, "AWS4-HMAC-SHA256 Credential=x/20260101/us-east-1/s3/aws4_request");
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: {auth}\r\n");
        stream.write_all(format!("{head}Content-Length: 0\r\nConnection: close\r\n\r\n").as_bytes()).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The names of what is in the bucket.
    fn names(&self) -> Vec<String> {
        let list = self.ask("GET", "/cache?list-type=2");
        list.split("<Key>").skip(1).map(|rest| rest.split("</Key>").next().unwrap().to_owned()).collect()
    }

    fn uri(&self, more: &str) -> String {
        format!("s3://cache?scheme=http&endpoint={}{more}", self.address)
    }
}

/// Runs a command with keys in its environment.
fn with_keys(house: &House, applet: &str, words: &[&str]) -> Run {
    let mut command = house.applet(applet);
    command.env("AWS_ACCESS_KEY_ID", "an-id").env("AWS_SECRET_ACCESS_KEY", "a-secret").args(words);
    run(&mut command, b"")
}

/// Deletes paths, and fetches the last of them with what it needs.
fn fetch(house: &House, uri: &str, paths: &[&str]) -> Run {
    let key = std::fs::read_to_string(house.work().join("public")).unwrap();
    house.run("nix-store", ["--delete"].iter().chain(paths));
    let _ = std::fs::remove_dir_all(house.path().join("home/.cache"));
    let options = ["--no-gc-warning", "--option", "substituters", uri, "--option", "trusted-public-keys"];
    with_keys(house, "nix-store", &[&options[..], &[key.trim_end(), "-r", paths[paths.len() - 1]]].concat())
}

#[test]
fn what_is_pushed_to_a_bucket_comes_back() {
    let Some(moto) = Moto::start() else { return };
    let house = House::new();
    let (b, a) = built(&house);
    house.run("nix-store", ["--generate-binary-cache-key", "s3-1", "secret", "public"]);
    let secret = house.work().join("secret").display().to_string();
    let small = "&narinfo-compression=gzip&ls-compression=br&log-compression=zstd&write-nar-listing=true";
    for more in ["", small] {
        for name in moto.names() {
            moto.ask("DELETE", &format!("/cache/{name}"));
        }
        let to = moto.uri(&format!("&secret-key={secret}{more}"));
        let pushed = with_keys(&house, "larder", &["push", "--logs", &to, &b]);
        assert!(pushed.status == Some(0) && pushed.stderr.starts_with("copying 2 paths...\n"), "{pushed:?}");
        assert!(pushed.stderr.contains(&format!("copying path '{b}' to 's3://cache'...\n")), "{pushed:?}");
        with_keys(&house, "larder", &["push", &to, &b]).prints("");
        let names = moto.names();
        let count = |text: &str| names.iter().filter(|name| name.contains(text)).count();
        let listings = if more.is_empty() { 0 } else { 2 };
        assert_eq!([count(".narinfo"), count("nar/"), count("log/"), count(".ls")], [2, 2, 2, listings], "{names:?}");
        let narinfo = moto.ask("GET", &format!("/cache/{}.narinfo", hash_part(&a)));
        assert_eq!(narinfo.to_lowercase().contains("content-encoding: gzip"), !more.is_empty(), "{narinfo}");
        let fetched = fetch(&house, &moto.uri(""), &[&a, &b]);
        assert_eq!(fetched.status, Some(0), "{fetched:?}");
        assert!(fetched.stderr.contains(&format!("copying path '{a}' from 's3://cache'...\n")), "{fetched:?}");
        assert_eq!(std::fs::read_to_string(&a).unwrap(), "from a\n");
        house.words("nix-store", &format!("--verify-path {a} {b}")).prints("");
        let logs = house.path().join("log");
        std::fs::rename(&logs, house.path().join("log.away")).unwrap();
        let log = with_keys(&house, "nix-store", &["-l", &a, "--option", "substituters", &moto.uri("")]);
        assert_eq!((log.stdout.as_str(), log.status), ("a line\n", Some(0)), "{log:?}");
        std::fs::rename(house.path().join("log.away"), logs).unwrap();
    }
}

#[test]
fn what_is_large_goes_in_parts() {
    let Some(moto) = Moto::start() else { return };
    let house = House::new();
    let mut number = 1u32;
    let noise: Vec<u8> = (0..(12 << 20) + 5)
        .map(|_| {
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            number.to_be_bytes()[0]
        })
        .collect();
    let file = house.write("noise", &noise);
    let path = house.run("nix-store", ["--add".as_ref(), file.as_os_str()]).stdout.trim_end().to_owned();
    house.run("nix-store", ["--generate-binary-cache-key", "s3-1", "secret", "public"]);
    let secret = house.work().join("secret").display().to_string();
    let to = moto.uri(&format!("&secret-key={secret}&compression=none&multipart-upload=true&buffer-size=6000000"));
    let pushed = with_keys(&house, "larder", &["push", &to, &path]);
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    let nar = moto.names().into_iter().find(|name| name.starts_with("nar/")).unwrap();
    // An object of three parts says so in its tag.
    let head = moto.ask("HEAD", &format!("/cache/{nar}")).to_lowercase();
    assert!(head.contains("-3\"") && head.contains("content-type: application/x-nix-nar"), "{head}");
    let fetched = fetch(&house, &moto.uri(""), &[&path]);
    assert_eq!(fetched.status, Some(0), "{fetched:?}");
    assert!(std::fs::read(&path).unwrap() == noise);
    // Nothing half done lies about.
    let uploads = moto.ask("GET", "/cache?uploads");
    assert!(!uploads.contains("<Upload>"), "{uploads}");
    let small = moto.uri("&multipart-upload=true&buffer-size=1000");
    let refused = with_keys(&house, "larder", &["push", &small, &path]);
    let said = "the URI 's3://cache' of a cache is not valid: 'buffer-size' is less than 5242880, the smallest part";
    assert!(refused.stderr.contains(said) && refused.status == Some(1), "{refused:?}");
}

#[test]
fn buckets_and_profiles_that_are_not_there() {
    let Some(moto) = Moto::start() else { return };
    let house = House::new();
    let (b, _) = built(&house);
    let nowhere = moto.uri("").replace("s3://cache", "s3://nowhere");
    let refused = with_keys(&house, "larder", &["push", &nowhere, &b]);
    let said = format!("unable to upload 'http://{}/nowhere/nix-cache-info': HTTP error 404", moto.address);
    assert!(refused.stderr.contains(&said) && refused.status == Some(1), "{refused:?}");
    // No URL with a signature is ever shown.
    assert!(!refused.stderr.contains("X-Amz"), "{refused:?}");
    let fetched = house.run("nix-store", ["-r", &b.replace("-b", "-c"), "--option", "substituters", &nowhere]);
    assert!(fetched.stderr.contains("'s3://nowhere' does not appear to be a binary cache"), "{fetched:?}");
    let refused = house.run("larder", ["push", &moto.uri("&profile=me"), &b]);
    let said = "error: no keys for the bucket of 's3://cache': the profile 'me' is in no file ('";
    assert!(refused.stderr.starts_with(said) && refused.status == Some(1), "{refused:?}");
    std::fs::create_dir(house.path().join("home/.aws")).unwrap();
    let text = "[me]\naws_access_key_id = x\naws_secret_access_key = y\n";
    std::fs::write(house.path().join("home/.aws/credentials"), text).unwrap();
    assert_eq!(house.run("larder", ["push", &moto.uri("&profile=me"), &b]).status, Some(0));
    for (more, reason) in [("&zork=1", "'zork' is not known"), ("&scheme=ftp", "'scheme' is neither")] {
        let refused = with_keys(&house, "larder", &["push", &moto.uri(more), &b]);
        assert!(refused.stderr.contains(reason) && refused.status == Some(1), "{refused:?}");
    }
}
