//! Fetching from binary caches, from the words to what lies in the store.

use std::path::Path;
use std::time::{Duration, Instant};

use larder_cache::compress::Method;
use larder_cache::testing::{Answer, Server, Shelf, nar_of};
use larder_core::narinfo::NarInfo;
use larder_core::store_dir::StoreDir;
use larder_core::store_path::StorePath;

use crate::house::{House, Run};

/// A cache for the store of a house, in the house.
pub fn shelf(house: &House) -> Shelf {
    let dir = StoreDir::new(house.path().join("store").to_str().unwrap()).unwrap();
    Shelf::new(&house.path().join("cache"), &dir)
}

/// `nix-store` with these words, that fetches from `uris` what the shelf has signed.
pub fn fetch(house: &House, shelf: &Shelf, uris: &str, words: &[&str]) -> Run {
    let key = shelf.key.public().to_string();
    let fixed = ["--no-gc-warning", "--option", "substituters", uris, "--option", "trusted-public-keys", &key];
    let quick = ["--option", "download-attempts", "1", "--option", "sandbox", "false"];
    house.run("nix-store", fixed.into_iter().chain(quick).chain(words.iter().copied()))
}

fn full(shelf: &Shelf, info: &NarInfo) -> String {
    shelf.dir.full(&info.info.path)
}

fn is_valid(house: &House, path: &str) -> bool {
    house.words("nix-store", &format!("--check-validity {path}")).status == Some(0)
}

/// `a`, `b` that refers to it, `c` that refers to both.
fn three(shelf: &Shelf) -> [NarInfo; 3] {
    let a = shelf.add(1, "a", b"from a", &[], Method::Xz);
    let b = shelf.add(2, "b", b"from b", &[&a.info.path], Method::Zstd);
    let c = shelf.add(3, "c", b"from c", &[&a.info.path, &b.info.path], Method::Bzip2);
    [a, b, c]
}

#[test]
fn a_closure_comes_from_a_folder() {
    let house = House::new();
    let shelf = shelf(&house);
    let [a, b, c] = three(&shelf);
    let own: StorePath = format!("{}-self", "4".repeat(32)).parse().unwrap();
    shelf.add_nar(own.clone(), &nar_of(own.to_string().as_bytes()), &[&own], Method::Brotli);
    let [a, b, c] = [&a, &b, &c].map(|info| full(&shelf, info));
    let uri = shelf.uri();
    let list = format!("these 3 paths will be fetched (0.00 MiB download, 0.00 MiB unpacked):\n  {a}\n  {b}\n  {c}\n");
    let dry = fetch(&house, &shelf, &uri, &["-r", "--dry-run", &c]);
    assert_eq!(dry, Run { stdout: String::new(), stderr: list.clone(), status: Some(0) });
    assert!(!is_valid(&house, &a));
    let run = fetch(&house, &shelf, &uri, &["-r", &c]);
    let copying: String = [&a, &b, &c].map(|path| format!("copying path '{path}' from '{uri}'...\n")).concat();
    assert_eq!(run, Run { stdout: format!("{c}\n"), stderr: list + &copying, status: Some(0) });
    assert_eq!(std::fs::read_to_string(&c).unwrap(), "from c");
    house.words("nix-store", &format!("-q --references {c}")).prints(&format!("{a}\n{b}\n"));
    house.words("nix-store", &format!("--verify-path {a} {b} {c}")).prints("");
    let own = shelf.dir.full(&own);
    let run = fetch(&house, &shelf, &uri, &["-r", &own]);
    let one = format!("this path will be fetched (0.00 MiB download, 0.00 MiB unpacked):\n  {own}\n");
    assert!(run.stderr.starts_with(&one) && run.status == Some(0), "{run:?}");
    house.words("nix-store", &format!("-q --references {own}")).prints(&format!("{own}\n"));
    // Once more: nothing is to be done, and nobody is asked.
    fetch(&house, &shelf, "file:///nowhere zork://x", &["-r", &c, &own]).prints(&format!("{c}\n{own}\n"));
    // The signatures came along.
    let dumped = house.run("larder", ["path-info", "--json", &c]);
    assert!(dumped.stdout.contains("shelf-1:"), "{dumped:?}");
    let left: Vec<_> = std::fs::read_dir(house.path().join("store")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 5, "{left:?}");
}

#[test]
fn nothing_comes_without_a_good_signature() {
    let house = House::new();
    let shelf = shelf(&house);
    let a = shelf.add(1, "a", b"from a", &[], Method::Xz);
    let path = full(&shelf, &a);
    let uri = shelf.uri();
    let plain = ["-r", &path, "--no-gc-warning", "--option", "substituters", &uri];
    let run = house.run("nix-store", plain);
    let warning = format!(
        "warning: the substitute for '{path}' from '{uri}' is not signed by any of the keys in \
         'trusted-public-keys' (it has signatures by: shelf-1; trusted are: cache.nixos.org-1)\n"
    );
    assert!(run.stderr.contains(&warning), "{run:?}");
    assert!(run.stderr.ends_with(&format!("error: build of '{path}' failed\n")) && run.status == Some(1), "{run:?}");
    // The right name, another key; another size under the right signature.
    let other = larder_core::signature::SecretKey::from_seed("shelf-1", &[8; 32]).unwrap().public().to_string();
    let run = house.run("nix-store", plain.into_iter().chain(["--option", "trusted-public-keys", &other]));
    assert_eq!(run.status, Some(1), "{run:?}");
    let mut signed = a.clone();
    signed.info.signatures = [shelf.key.sign_path(&shelf.dir, &a.info).unwrap()].into();
    signed.info.nar_size_bytes += 1;
    shelf.write_unsigned(&signed);
    assert_eq!(fetch(&house, &shelf, &uri, &["-r", &path]).status, Some(1));
    shelf.write_unsigned(&a);
    assert_eq!(fetch(&house, &shelf, &uri, &["-r", &path]).status, Some(1));
    assert!(!is_valid(&house, &path));
    // A broken key is an error of its own.
    let run = house.run("nix-store", plain.into_iter().chain(["--option", "trusted-public-keys", "x:y"]));
    assert!(run.stderr.contains("key 'x'") && run.status == Some(1), "{run:?}");
    // Who does not ask for signatures, or trusts the cache, gets it.
    let trusted = format!("{uri}?trusted=true");
    let run = house.run("nix-store", ["-r", &path, "--no-gc-warning", "--option", "substituters", &trusted]);
    assert_eq!(run.status, Some(0), "{run:?}");
    house.words("nix-store", &format!("--delete {path}"));
    let run = house.run("nix-store", plain.into_iter().chain(["--option", "require-sigs", "false"]));
    assert_eq!(run.status, Some(0), "{run:?}");
}

#[test]
fn what_follows_from_its_contents_needs_no_signature() {
    let house = House::new();
    let shelf = shelf(&house);
    let file = house.write("f", "contents");
    let added = house.run("nix-store", ["--add".as_ref(), file.as_os_str()]).stdout;
    let path = added.trim_end().to_owned();
    let nar = nar_of(b"contents");
    let store_path = shelf.dir.parse(path.as_bytes()).unwrap();
    let mut info = shelf.add_nar(store_path, &nar, &[], Method::Gzip);
    info.info.content_address = Some(format!("fixed:r:{}", info.info.nar_hash).parse().unwrap());
    shelf.write_unsigned(&info);
    assert_eq!(house.words("nix-store", &format!("--delete {path}")).status, Some(0));
    let fetches = || house.run("nix-store", ["-r", &path, "--no-gc-warning", "--option", "substituters", &shelf.uri()]);
    let run = fetches();
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_eq!(house.words("nix-store", &format!("--delete {path}")).status, Some(0));
    // An address that leads elsewhere is worth nothing.
    info.info.content_address = Some(format!("fixed:sha256:{}", "0".repeat(52)).parse().unwrap());
    shelf.write_unsigned(&info);
    assert_eq!(fetches().status, Some(1));
}

#[test]
fn s097_s100_one_question_for_each_path_and_none_again() {
    let house = House::new();
    let shelf = shelf(&house);
    let infos = three(&shelf);
    let c = full(&shelf, &infos[2]);
    let server = Server::folder(&shelf.folder, Duration::ZERO, |_| None);
    let run = fetch(&house, &shelf, &server.url(), &["-r", "--dry-run", &c]);
    assert_eq!(run.status, Some(0), "{run:?}");
    let mut asked = server.take_lines();
    asked.sort();
    let mut wanted: Vec<String> =
        infos.iter().map(|info| format!("GET /{}.narinfo", info.info.path.hash_part())).collect();
    wanted.push("GET /nix-cache-info".into());
    wanted.sort();
    assert_eq!(asked, wanted);
    let run = fetch(&house, &shelf, &server.url(), &["-r", &c]);
    assert_eq!(run.status, Some(0), "{run:?}");
    let mut asked = server.take_lines();
    asked.sort();
    let mut wanted: Vec<String> = infos.iter().map(|info| format!("GET /{}", info.url)).collect();
    wanted.sort();
    assert_eq!(asked, wanted, "the second run asks for archives only");
    // Neither is asked again for what it has not, nor by another house's user.
    let nowhere = format!("{}/{}-x", shelf.dir, "9".repeat(32));
    for (times, wanted) in [(1, 1), (2, 0)] {
        assert_eq!(fetch(&house, &shelf, &server.url(), &["-r", &nowhere]).status, Some(1));
        assert_eq!(server.take_lines().len(), wanted, "{times}");
    }
    let fresh = ["-r", &nowhere, "--option", "narinfo-cache-negative-ttl", "0"];
    assert_eq!(fetch(&house, &shelf, &server.url(), &fresh).status, Some(1));
    assert!(!server.take_lines().is_empty());
}

#[test]
fn s098_s099_rounds_are_the_depth_of_the_graph() {
    let house = House::new();
    let shelf = shelf(&house);
    // 500 paths on 9 levels.
    let mut below: Vec<StorePath> = Vec::new();
    let mut number = 0;
    for level in 0..9 {
        let mut here = Vec::new();
        for n in 0..if level == 8 { 4 } else { 62 } {
            number += 1;
            let references: Vec<&StorePath> = below.iter().skip(n % 7).step_by(7).collect();
            let info = shelf.add(number, &format!("p{level}-{n}"), &[b'x'; 100], &references, Method::None);
            here.push(info.info.path);
        }
        below = here;
    }
    let tops: Vec<String> = below.iter().map(|path| shelf.dir.full(path)).collect();
    let server = Server::folder(&shelf.folder, Duration::from_millis(100), |_| None);
    let mut words = vec!["-r", "--dry-run"];
    words.extend(tops.iter().map(String::as_str));
    let began = Instant::now();
    let run = fetch(&house, &shelf, &server.url(), &[&words[..], &["--option", "http-connections", "100"]].concat());
    let elapsed = began.elapsed();
    assert!(run.stderr.contains("paths will be fetched") && run.status == Some(0), "{run:?}");
    assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
    assert!(server.connections().0 <= 100);
    assert_eq!(fetch(&house, &shelf, &server.url(), &words).status, Some(0));
    // Fetching them all keeps to the limit too.
    let server = Server::folder(&shelf.folder, Duration::from_millis(1), |_| None);
    let words: Vec<&str> = std::iter::once("-r").chain(tops.iter().map(String::as_str)).collect();
    let run = fetch(&house, &shelf, &server.url(), &[&words[..], &["--option", "http-connections", "5"]].concat());
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(server.connections().0 <= 5, "{:?}", server.connections());
    house.words("nix-store", "--verify --check-contents");
}

/// A derivation with outputs `out`, `dev` and `man`, whose outputs a cache has.
fn three_outputs(house: &House, shelf: &Shelf, more: &str) -> (String, Vec<NarInfo>) {
    let json = format!(
        r#"{{"name": "multi", "builder": "/bin/sh", "args": ["-c", "for o in $out $dev $man; do echo built > $o; done"],
            "outputs": {{"out": {{}}, "dev": {{}}, "man": {{}}}}{more}}}"#
    );
    let file = house.write("multi.json", json);
    let added = house.run("larder", ["derivation".as_ref(), "add".as_ref(), file.as_os_str()]);
    assert_eq!(added.status, Some(0), "{added:?}");
    let drv = added.stdout.trim_end().to_owned();
    let outputs = house.words("nix-store", &format!("-q --outputs {drv}")).stdout;
    let infos = outputs.lines().map(|path| {
        let path = shelf.dir.parse(path.as_bytes()).unwrap();
        shelf.add_nar(path, &nar_of(b"fetched"), &[], Method::Xz)
    });
    let infos = infos.collect();
    (drv, infos)
}

#[test]
fn s074_s075_only_wanted_outputs_come() {
    let house = House::new();
    let shelf = shelf(&house);
    let (drv, infos) = three_outputs(&house, &shelf, "");
    let server = Server::folder(&shelf.folder, Duration::ZERO, |_| None);
    let run = fetch(&house, &shelf, &server.url(), &["-r", &format!("{drv}!man")]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.stdout.trim_end().ends_with("-multi-man"), "{run:?}");
    let fetched = |infos: &[NarInfo]| infos.iter().filter(|info| is_valid(&house, &full(&shelf, info))).count();
    assert_eq!(fetched(&infos), 1);
    assert_eq!(server.take_lines().len(), 3, "the cache, what it has, and the archive");
    // Two targets of one derivation in one run: these two, and no third.
    house.words("nix-store", &format!("--delete {}", run.stdout.trim_end()));
    let run = fetch(&house, &shelf, &server.url(), &["-r", &format!("{drv}!man"), &format!("{drv}!dev")]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_eq!(fetched(&infos), 2);
    assert_eq!(std::fs::read_to_string(run.stdout.lines().next().unwrap()).unwrap(), "fetched");
}

#[test]
fn s052_s054_who_may_not_or_need_not_be_asked_is_not() {
    let house = House::new();
    let shelf = shelf(&house);
    let (drv, _) = three_outputs(&house, &shelf, r#", "env": {"allowSubstitutes": ""}"#);
    let server = Server::folder(&shelf.folder, Duration::ZERO, |_| None);
    let run = fetch(&house, &shelf, &server.url(), &["-r", &drv]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.stderr.starts_with("this derivation will be built:\n"), "{run:?}");
    assert_eq!(server.take_lines(), [""; 0], "nobody is asked");
    let out = run.stdout.lines().next().unwrap();
    assert_eq!(std::fs::read_to_string(out).unwrap(), "built\n");
    let other = House::new();
    let theirs = self::shelf(&other);
    let (drv, _) = three_outputs(&other, &theirs, "");
    for more in [&["--option", "substitute", "false"][..], &["--option", "use-binary-caches", "false"]] {
        let run = fetch(&other, &theirs, &server.url(), &[&["-r", "--dry-run", &drv][..], more].concat());
        assert!(run.stderr.starts_with("this derivation will be built:\n"), "{run:?}");
        assert_eq!(server.take_lines(), [""; 0]);
    }
    let run = fetch(&other, &theirs, "", &["-r", "--dry-run", &drv]);
    assert!(run.stderr.starts_with("this derivation will be built:\n"), "{run:?}");
}

#[test]
fn s039_every_archive_is_checked() {
    let house = House::new();
    let shelf = shelf(&house);
    let (drv, infos) = three_outputs(&house, &shelf, "");
    let info = infos.iter().find(|info| info.info.path.name().as_str() == "multi").unwrap();
    let mut nar = nar_of(b"fetched");
    let at = nar.windows(7).position(|seven| seven == b"fetched").unwrap();
    nar[at] ^= 1;
    let packed = larder_cache::compress::compress(Method::Xz, &nar).unwrap();
    // A cache that lies all the way: the compressed file is as it says.
    let mut lies = info.clone();
    lies.file_hash = Some(larder_core::hash::Sha256Digest::of(&packed).to_hash());
    lies.file_size_bytes = Some(packed.len() as u64);
    std::fs::write(shelf.folder.join(&info.url), &packed).unwrap();
    shelf.write(&lies);
    let path = full(&shelf, info);
    let run = fetch(&house, &shelf, &shelf.uri(), &["-r", &path]);
    let text = format!("error: hash mismatch importing path '{path}';\n         specified: sha256:");
    assert!(run.stderr.contains(&text) && run.status == Some(1), "{run:?}");
    assert!(run.stderr.contains(&format!("from:      {}", shelf.uri())), "{run:?}");
    assert!(!is_valid(&house, &path) && !Path::new(&path).exists());
    // As an output it fails too, unless it may be built.
    let run = fetch(&house, &shelf, &shelf.uri(), &["-r", &format!("{drv}!out")]);
    let text = "try '--fallback' to build derivation from source";
    assert!(run.stderr.contains(text) && run.status == Some(1), "{run:?}");
    let run = fetch(&house, &shelf, &shelf.uri(), &["-r", "--fallback", &format!("{drv}!out")]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "built\n");
}

#[test]
fn what_a_cache_has_not_after_all_is_built_or_comes_from_another() {
    let house = House::new();
    let shelf = shelf(&house);
    let (drv, infos) = three_outputs(&house, &shelf, "");
    let server = Server::folder(&shelf.folder, Duration::ZERO, |request| {
        request.path.starts_with("/nar/").then(|| Answer::status(404))
    });
    let url = server.url();
    let man = format!("{drv}!man");
    let run = fetch(&house, &shelf, &format!("{url} {}?priority=50", shelf.uri()), &["-r", &man]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.stderr.contains(&format!("does not exist in binary cache '{url}'\n")), "{run:?}");
    assert_eq!(std::fs::read_to_string(run.stdout.trim_end()).unwrap(), "fetched");
    // Alone, it is as if it had not said so: no fallback is needed.
    let dev = format!("{drv}!dev");
    let run = fetch(&house, &shelf, &url, &["-r", &dev]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_eq!(std::fs::read_to_string(run.stdout.trim_end()).unwrap(), "built\n");
    assert_eq!(infos.len(), 3);
}

#[test]
fn the_others_serve_when_one_fails() {
    let house = House::new();
    let shelf = shelf(&house);
    let infos = three(&shelf);
    let c = full(&shelf, &infos[2]);
    let broken = Server::folder(&shelf.folder, Duration::ZERO, |request| {
        request.path.ends_with(".narinfo").then(|| Answer::status(500))
    });
    let gone = "http://127.0.0.1:1";
    let uris = format!("{gone} {} {}?priority=9", broken.url(), shelf.uri());
    let run = fetch(&house, &shelf, &uris, &["-r", &c]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert!(run.stderr.contains(&format!("warning: unable to download '{gone}/nix-cache-info'")), "{run:?}");
    assert!(run.stderr.contains(&format!("disabling binary cache '{}' for 60 seconds", broken.url())), "{run:?}");
    // It failed once and was then left alone.
    assert_eq!(broken.take_lines().iter().filter(|line| line.ends_with(".narinfo")).count(), 1);
    // Where no other has the path it is an error, and none with fallback.
    let other = House::new();
    let theirs = self::shelf(&other);
    let (drv, _) = three_outputs(&other, &theirs, "");
    let broken = Server::folder(&theirs.folder, Duration::ZERO, |request| {
        request.path.ends_with(".narinfo").then(|| Answer::status(500))
    });
    let run = fetch(&other, &theirs, &broken.url(), &["-r", &drv]);
    assert!(run.stderr.contains("HTTP error 500") && run.status == Some(1), "{run:?}");
    let run = fetch(&other, &theirs, &broken.url(), &["-r", "--fallback", &drv]);
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_eq!(std::fs::read_to_string(run.stdout.lines().next().unwrap()).unwrap(), "built\n");
}

#[test]
fn the_order_is_that_of_priorities() {
    let house = House::new();
    let shelf = shelf(&house);
    let a = shelf.add(1, "a", b"from a", &[], Method::None);
    std::fs::write(shelf.folder.join("nix-cache-info"), format!("StoreDir: {}\nPriority: 20\n", shelf.dir)).unwrap();
    let first = Server::folder(&shelf.folder, Duration::ZERO, |_| None);
    let second = Server::folder(&shelf.folder, Duration::ZERO, |_| None);
    let uris = format!("{} {}?priority=10", first.url(), second.url());
    let run = fetch(&house, &shelf, &uris, &["-r", &full(&shelf, &a)]);
    assert!(run.stderr.contains(&format!("from '{}'", second.url())) && run.status == Some(0), "{run:?}");
    assert_eq!(first.take_lines(), ["GET /nix-cache-info"]);
    // A cache for another store is told of, and not used.
    let other = Shelf::new(&house.path().join("other"), &StoreDir::new("/nix/store").unwrap());
    let run = fetch(&house, &shelf, &other.uri(), &["-r", &format!("{}/{}-x", shelf.dir, "8".repeat(32))]);
    let text = format!("is for Nix stores with prefix '/nix/store', not '{}'", shelf.dir);
    assert!(run.stderr.contains(&text), "{run:?}");
}

#[test]
fn s029_locks_go_when_the_path_is_there() {
    let house = House::new();
    let shelf = shelf(&house);
    let a = shelf.add(1, "a", b"from a", &[], Method::Xz);
    let path = full(&shelf, &a);
    let json =
        r#"{"name": "slow", "builder": "/bin/sh", "args": ["-c", "sleep 60"], "env": {"PATH": "/bin:/usr/bin"}}"#;
    let file = house.write("slow.json", json);
    let drv = house.run("larder", ["derivation".as_ref(), "add".as_ref(), file.as_os_str()]).stdout;
    let key = shelf.key.public().to_string();
    let uri = shelf.uri();
    let words =
        ["-r", &path, drv.trim_end(), "--option", "substituters", &uri, "--option", "trusted-public-keys", &key];
    let mut command = house.applet("nix-store");
    let mut child = crate::house::spawn(command.args(words).args(["--option", "sandbox", "false"]));
    let began = Instant::now();
    while !is_valid(&house, &path) {
        assert!(began.elapsed() < Duration::from_secs(30), "it does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Another process can lock it, while the first still runs.
    std::thread::sleep(Duration::from_millis(100));
    let locked = crate::house::run(house.command("flock").args(["-n", &format!("{path}.lock"), "true"]), b"");
    assert_eq!(locked.status, Some(0), "{locked:?}");
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// How a process that is killed while it fetches leaves things: as if it had not begun.
#[test]
fn a_killed_fetch_leaves_nothing_valid_and_is_done_again() {
    let house = House::new();
    let shelf = shelf(&house);
    let a = shelf.add(1, "a", &b"from a ".repeat(100_000), &[], Method::None);
    let path = full(&shelf, &a);
    let nar = std::fs::read(shelf.folder.join(&a.url)).unwrap();
    let half = nar.len() / 2;
    let stuck = Server::folder(&shelf.folder, Duration::ZERO, move |request| {
        let mut raw = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", nar.len()).into_bytes();
        raw.extend_from_slice(&nar[..half]);
        request.path.starts_with("/nar/").then_some(Answer::Hang(raw))
    });
    let key = shelf.key.public().to_string();
    let url = stuck.url();
    let words = ["-r", &path, "--option", "substituters", &url, "--option", "trusted-public-keys", &key];
    for signal in ["KILL", "INT"] {
        let mut child = crate::house::spawn(house.applet("nix-store").args(words));
        std::thread::sleep(Duration::from_millis(700));
        // Meanwhile another waits for the lock, and says so; it goes on when the first is gone.
        let began = Instant::now();
        let id = child.id().to_string();
        assert_eq!(crate::house::run(house.command("kill").args(["-s", signal, &id]), b"").status, Some(0));
        let status = child.wait().unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{signal}: {:?}", began.elapsed());
        assert!(!status.success() && !is_valid(&house, &path), "{signal}: {status:?}");
    }
    assert_eq!(fetch(&house, &shelf, &shelf.uri(), &["-r", &path]).status, Some(0));
    house.words("nix-store", &format!("--verify-path {path}")).prints("");
}

#[test]
fn damaged_paths_are_fetched_anew() {
    let house = House::new();
    let shelf = shelf(&house);
    let [a, b, c] = three(&shelf);
    let [a, b, c] = [&a, &b, &c].map(|info| full(&shelf, info));
    assert_eq!(fetch(&house, &shelf, &shelf.uri(), &["-r", &c]).status, Some(0));
    let spoil = |path: &str| {
        let mut permissions = Path::new(path).metadata().unwrap().permissions();
        #[expect(clippy::permissions_set_readonly_false, reason = "it is spoilt on purpose")]
        permissions.set_readonly(false);
        std::fs::set_permissions(path, permissions).unwrap();
        std::fs::write(path, "spoilt").unwrap();
    };
    spoil(&c);
    let run = fetch(&house, &shelf, &shelf.uri(), &["-r", "--repair", &c]);
    assert_eq!(run.status, Some(0), "{run:?}");
    house.words("nix-store", &format!("--verify-path {c}")).prints("");
    spoil(&a);
    std::fs::remove_file(&b).unwrap();
    for path in [&a, &b] {
        let run = fetch(&house, &shelf, &shelf.uri(), &["--repair-path", path]);
        assert_eq!(run.status, Some(0), "{run:?}");
    }
    house.words("nix-store", &format!("--verify-path {a} {b} {c}")).prints("");
    assert_eq!(std::fs::read_to_string(&b).unwrap(), "from b");
    // Nobody has it, and nobody knows what made it.
    spoil(&a);
    let run = fetch(&house, &shelf, "file:///nowhere", &["--repair-path", &a]);
    assert!(run.stderr.ends_with(&format!("error: cannot repair path '{a}'\n")) && run.status == Some(1), "{run:?}");
}
