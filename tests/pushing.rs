//! Writing to caches behind web servers, by `PUT`.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use larder_cache::testing::{Answer, Request, Server, file_of};

use crate::house::{House, Run};
use crate::serving::{built, hash_part};

/// Which requests are answered otherwise.
type IsBad = Box<dyn Fn(&Request) -> bool + Send + Sync>;

/// A folder that a server fills.
fn shelf(house: &House, name: &str) -> PathBuf {
    let folder = house.work().join(name);
    std::fs::create_dir(&folder).unwrap();
    folder
}

/// Fetches two paths that were deleted from a cache that needs no signatures.
fn fetched_again(house: &House, uri: &str, a: &str, b: &str) -> Run {
    house.words("nix-store", &format!("--delete {a} {b}"));
    let _ = std::fs::remove_dir_all(house.path().join("home/.cache"));
    let fixed = ["--no-gc-warning", "--option", "require-sigs", "false", "--option", "download-attempts", "1"];
    let run = house.run("nix-store", fixed.iter().chain(&["-r", b, "--option", "substituters", uri]));
    assert_eq!(run.status, Some(0), "{run:?}");
    assert_eq!(std::fs::read_to_string(a).unwrap(), "from a\n");
    house.words("nix-store", &format!("-q --references {b}")).prints(&format!("{a}\n"));
    house.words("nix-store", &format!("--verify-path {a} {b}")).prints("");
    run
}

#[test]
fn files_come_in_an_order_that_is_never_wrong() {
    let house = House::new();
    let (b, a) = built(&house);
    house.run("nix-store", ["--generate-binary-cache-key", "push-1", "secret", "public"]);
    let folder = shelf(&house, "shelf");
    let files = folder.clone();
    let server = Server::start(move |request| file_of(&files, request));
    let secret = house.work().join("secret");
    let to = format!("{}?write-nar-listing=true&secret-key={}", server.url(), secret.display());
    let pushed = house.run("larder", ["push", &to, &b, "--logs"]);
    let copying = [&a, &b].map(|path| format!("copying path '{path}' to '{}'...\n", server.url()));
    assert!(pushed.status == Some(0) && pushed.stdout.is_empty(), "{pushed:?}");
    assert!(pushed.stderr.starts_with("copying 2 paths...\n"), "{pushed:?}");
    assert!(copying.iter().all(|line| pushed.stderr.contains(line)), "{pushed:?}");
    let requests = server.take_requests();
    let place = |method: &str, name: &str| {
        let found: Vec<usize> = (0..requests.len())
            .filter(|n| requests[*n].method == method && requests[*n].path == format!("/{name}"))
            .collect();
        assert_eq!(found.len(), 1, "{method} {name}: {requests:?}");
        found[0]
    };
    let kind = |place: usize| requests[place].headers.get("content-type").map(String::as_str);
    assert!(place("GET", "nix-cache-info") < place("PUT", "nix-cache-info"));
    assert_eq!(kind(place("PUT", "nix-cache-info")), Some("text/x-nix-cache-info"));
    let mut told = Vec::new();
    for path in [&a, &b] {
        let part = hash_part(path);
        let narinfo = std::fs::read_to_string(folder.join(format!("{part}.narinfo"))).unwrap();
        assert!(narinfo.contains("\nSig: push-1:"), "{narinfo}");
        let nar = narinfo.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap();
        let drv = house.words("nix-store", &format!("-q --deriver {path}")).stdout;
        let log = place("PUT", &format!("log/{}", drv.trim_end().rsplit('/').next().unwrap()));
        assert!(place("HEAD", &format!("{part}.narinfo")) < log && place("HEAD", nar) < place("PUT", nar));
        let order = [place("PUT", nar), place("PUT", &format!("{part}.ls")), place("PUT", &format!("{part}.narinfo"))];
        assert!(order.is_sorted() && log < order[2], "{requests:?}");
        let kinds = order.map(kind);
        let expected = ["application/x-nix-nar", "application/json", "text/x-nix-narinfo"].map(Some);
        assert_eq!((kinds, kind(log)), (expected, Some("text/plain; charset=utf-8")));
        told.push(order[2]);
    }
    assert!(told.is_sorted(), "what is referred to is told of first");
    // Nothing is sent twice.
    house.run("larder", ["push", &to, &b]).prints("");
    let asked = server.take_lines();
    assert!(asked.len() == 3 && asked.iter().all(|line| !line.starts_with("PUT")), "{asked:?}");
    fetched_again(&house, &server.url(), &a, &b);
    std::fs::remove_dir_all(house.path().join("log")).unwrap();
    let log = house.run("nix-store", ["-l", &a, "--option", "substituters", &server.url()]);
    assert_eq!((log.stdout.as_str(), log.status), ("a line\n", Some(0)), "{log:?}");
}

#[test]
fn who_may_not_write_hears_of_it() {
    let house = House::new();
    let (b, a) = built(&house);
    let folder = shelf(&house, "shelf");
    let files = folder.clone();
    let server = Server::start(move |request| {
        let words = request.headers.get("authorization").map_or("", String::as_str);
        let good = ["Bearer sesame", "Basic bWU6c2VzYW1l"].contains(&words);
        if request.method == "PUT" && !good { Answer::status(401) } else { file_of(&files, request) }
    });
    let url = server.url();
    let refused = house.run("larder", ["push", &url, &b]);
    let said = format!("error: unable to upload '{url}/nix-cache-info': HTTP error 401 ('Unauthorized')\n");
    assert_eq!((refused.stderr, refused.status), (said, Some(1)));
    let refused = house.run("larder", ["push", &format!("{url}?token=sesam"), &b]);
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(std::fs::read_dir(&folder).unwrap().next().is_none());
    let pushed = house.run("larder", ["push", &format!("{url}?token=sesame"), &a]);
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    house.write("netrc", "machine 127.0.0.1 login me password sesame\n");
    let netrc = house.work().join("netrc").display().to_string();
    let pushed = house.run("larder", ["push", &url, &b, "--option", "netrc-file", &netrc]);
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    fetched_again(&house, &url, &a, &b);
}

#[test]
fn what_fails_once_is_sent_again_and_what_fails_for_good_is_not_told_of() {
    let house = House::new();
    let (b, a) = built(&house);
    let folder = shelf(&house, "shelf");
    let (files, failures) = (folder.clone(), AtomicUsize::new(0));
    let server = Server::start(move |request| match (request.method.as_str(), request.path.starts_with("/nar/")) {
        ("PUT", true) if failures.fetch_add(1, Ordering::SeqCst) < 2 => Answer::status(503),
        _ => file_of(&files, request),
    });
    let pushed = house.run("larder", ["push", &server.url(), &b]);
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    assert!(pushed.stderr.contains("warning: unable to upload '"), "{pushed:?}");
    assert!(pushed.stderr.contains("HTTP error 503 ('Service Unavailable'); retrying in "), "{pushed:?}");
    fetched_again(&house, &server.url(), &a, &b);
    // One that takes everything but what is said of `a`, or the archive of `a`, or sends elsewhere.
    let part = hash_part(&a).to_owned();
    let size = |path: &str| house.words("nix-store", &format!("-q --size {path}")).stdout.trim_end().to_owned();
    assert_ne!(size(&a), size(&b));
    let cases: [(&str, IsBad, Answer); 3] = [
        ("HTTP error 500", Box::new(move |request| request.path == format!("/{part}.narinfo")), Answer::status(500)),
        ("HTTP error 413", Box::new(|request| request.path.starts_with("/nar/")), Answer::status(413)),
        ("HTTP error 302", Box::new(|request| request.path.starts_with("/nar/")), Answer::redirect("/elsewhere")),
    ];
    for (number, (text, is_bad, answer)) in cases.into_iter().enumerate() {
        let folder = shelf(&house, &format!("shelf{number}"));
        let files = folder.clone();
        let server = Server::start(move |request| match request.method.as_str() {
            "PUT" if is_bad(request) => answer.clone(),
            _ => file_of(&files, request),
        });
        let pushed = house.run("larder", ["push", &server.url(), &b, "--option", "download-attempts", "2"]);
        assert!(pushed.status == Some(1) && pushed.stderr.contains(text), "{text}: {pushed:?}");
        assert!(pushed.stderr.contains(&format!("error: unable to upload '{}/", server.url())), "{pushed:?}");
        let names = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().all(|name| !name.to_str().unwrap().ends_with(".narinfo")), "{text}");
    }
}

#[test]
fn many_are_written_at_once_within_the_limit() {
    let house = House::new();
    let folder = shelf(&house, "shelf");
    let files: Vec<String> =
        (0..30).map(|n| house.write(&format!("f{n}"), format!("{n}")).display().to_string()).collect();
    let added = house.run("nix-store", [vec!["--add".to_owned()], files].concat());
    let paths: Vec<&str> = added.stdout.lines().collect();
    let shelf = folder.clone();
    let server = Server::slow(std::time::Duration::from_millis(10), move |request| file_of(&shelf, request));
    let words = ["push", "-j1", &server.url(), "--option", "http-connections", "7"];
    let pushed = house.run("larder", words.iter().chain(&paths));
    assert_eq!(pushed.status, Some(0), "{pushed:?}");
    assert!(server.connections().0 <= 7 && server.connections().0 > 1, "{:?}", server.connections());
    let told = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(told.filter(|name| name.ends_with(".narinfo")).count(), 30);
}

#[test]
fn what_was_pushed_is_found_though_it_was_not_there_before() {
    let house = House::new();
    let (b, a) = built(&house);
    let folder = shelf(&house, "shelf");
    std::fs::write(folder.join("nix-cache-info"), format!("StoreDir: {}\n", house.path().join("store").display()))
        .unwrap();
    let files = folder.clone();
    let server = Server::start(move |request| file_of(&files, request));
    let export = crate::house::output(house.applet("nix-store").args(["--export", &a, &b]), b"").stdout;
    house.words("nix-store", &format!("--delete {a} {b}"));
    let fetch = || {
        let fixed = ["--no-gc-warning", "--option", "require-sigs", "false", "--option", "substituters", &server.url()];
        house.run("nix-store", fixed.iter().chain(&["-r", b.as_str()])).status
    };
    assert_eq!(fetch(), Some(1));
    server.take_lines();
    assert_eq!(fetch(), Some(1));
    assert_eq!(server.take_lines(), [""; 0], "that it is not there is remembered");
    assert_eq!(house.feed("nix-store", "--import", &export).status, Some(0));
    assert_eq!(house.run("larder", ["push", &server.url(), &b]).status, Some(0));
    house.words("nix-store", &format!("--delete {a} {b}"));
    assert_eq!(fetch(), Some(0));
}

#[test]
fn copying_to_a_cache_is_pushing() {
    let house = House::new();
    let (b, a) = built(&house);
    let folder = shelf(&house, "shelf");
    let files = folder.clone();
    let server = Server::start(move |request| file_of(&files, request));
    let url = server.url();
    let list = format!("[\n  \"{a}\",\n  \"{b}\"\n]\n");
    let dry = house.run("larder", ["copy", "--to", &url, "--dry-run", "--json", &b]);
    assert_eq!((dry.stdout.as_str(), dry.status), (list.as_str(), Some(0)), "{dry:?}");
    assert!(!folder.join("nar").exists());
    let one = house.run("larder", ["copy", "--to", &url, "--no-recursive", &a]);
    assert_eq!(one.status, Some(0), "{one:?}");
    let rest = house.run("larder", ["copy", "--to", &url, "--json", &b]);
    assert_eq!(rest.stdout, format!("[\n  \"{b}\"\n]\n"), "{rest:?}");
    fetched_again(&house, &url, &a, &b);
    let to_folder = format!("file://{}", house.work().join("folder").display());
    assert_eq!(house.run("larder", ["copy", "--to", &to_folder, &b]).status, Some(0));
    fetched_again(&house, &to_folder, &a, &b);
    house
        .run("larder", ["copy", "-s", "--to", &url, &b])
        .fails(&format!("the binary cache '{url}' cannot fetch anything (--substitute-on-destination)"));
}
