//! Requests, against a server that does not always do what it should.

use super::*;
use crate::error::CacheError;
use crate::testing::{Answer, Authority, Request as Asked, Server};
use larder_core::report::Silent;

fn options() -> ClientOptions {
    ClientOptions { attempts: 3, stall_timeout: Some(Duration::from_secs(1)), ..ClientOptions::default() }
}

fn client(options: ClientOptions) -> Arc<Client> {
    Client::new(options, Arc::new(Silent))
}

fn get(server: &Server, path: &str) -> Ask {
    Ask { url: format!("{}{path}", server.url()), ..Ask::default() }
}

fn read(download: Result<Download, DownloadError>) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut download = download.map_err(|error| chain(&error))?;
    download.read_to_end(&mut bytes).map_err(|error| chain(&CacheError::from_io(error).unwrap()))?;
    Ok(bytes)
}

/// Does one thing first and then another.
fn turns(answers: Vec<Answer>) -> impl Fn(&Asked) -> Answer + Send + Sync {
    let next = AtomicU64::new(0);
    move |_| {
        let n = usize::try_from(next.fetch_add(1, Ordering::SeqCst)).unwrap();
        answers.get(n).or(answers.last()).unwrap().clone()
    }
}

#[test]
fn what_fails_for_a_while_is_tried_again() {
    let server = Server::start(turns(vec![Answer::status(503), Answer::status(429), Answer::File(b"text".to_vec())]));
    let client = client(options());
    let began = Instant::now();
    assert_eq!(read(client.ask(&get(&server, "/x"))).unwrap(), b"text");
    assert!(began.elapsed() >= Duration::from_millis(700), "{:?}", began.elapsed());
    assert_eq!(server.take_lines().len(), 3);
    // Answers with errors were read, so one connection was enough.
    assert_eq!(server.connections(), (1, 1));
    for (status, tries) in [(500, 3), (404, 1), (403, 1), (501, 1), (408, 3)] {
        let server = Server::start(move |_| Answer::status(status));
        let error = read(client.ask(&get(&server, "/x"))).unwrap_err();
        assert!(error.starts_with(&format!("HTTP error {status} (")), "{error}");
        assert_eq!(server.take_lines().len(), tries, "{status}");
    }
}

#[test]
fn cut_at_every_offset_and_gone_on_with() {
    let body: Vec<u8> = (0..60u8).collect();
    for at in 0..body.len() {
        for ranges in [true, false] {
            let whole = body.clone();
            let cut = Answer::cut(&body, at, ranges);
            let server = Server::start(turns(vec![cut, Answer::File(whole)]));
            let found = read(client(options()).ask(&get(&server, "/x")));
            let asked = server.take_requests();
            if ranges || at == 0 {
                assert_eq!(found.unwrap(), body, "cut at {at}");
                let range = asked[1].headers.get("range").cloned();
                assert_eq!(range, (at > 0).then(|| format!("bytes={at}-")));
            } else {
                assert!(found.unwrap_err().contains(&format!(": it was cut after {at} bytes")), "cut at {at}");
            }
        }
    }
}

#[test]
fn what_is_gone_on_with_must_be_the_same_file() {
    let old: Vec<u8> = vec![b'o'; 100];
    let cut = |tag: &str| {
        let mut raw = format!("HTTP/1.1 200 OK\r\nContent-Length: 100\r\nAccept-Ranges: bytes\r\nETag: {tag}\r\n\r\n")
            .into_bytes();
        raw.extend_from_slice(&old[..40]);
        Answer::Raw(raw)
    };
    let full = |status, headers: &[(&str, &str)], body: &[u8]| Answer::Full {
        status,
        headers: headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect(),
        body: body.to_vec(),
    };
    let cases = [
        // Another length; another place; another tag; the whole file, the same, is fine.
        (full(206, &[("Content-Range", "bytes 40-98/99")], &[b'n'; 59]), false),
        (full(206, &[("Content-Range", "bytes 0-99/100")], &[b'n'; 100]), false),
        (full(206, &[], &[b'n'; 60]), false),
        (full(200, &[("ETag", "\"new\"")], &[b'n'; 100]), false),
        (full(200, &[("ETag", "\"old\"")], &old), true),
        (full(206, &[("Content-Range", "bytes 40-99/100")], &old[40..]), true),
        (full(200, &[("ETag", "\"old\"")], &old[..30]), false),
        (Answer::status(416), false),
    ];
    for (number, (answer, good)) in cases.into_iter().enumerate() {
        let server = Server::start(turns(vec![cut("\"old\""), answer]));
        let found = read(client(ClientOptions { attempts: 2, ..options() }).ask(&get(&server, "/x")));
        assert_eq!(found.is_ok(), good, "case {number}: {found:?}");
        assert!(found.is_err() || found.is_ok_and(|found| found == old));
        assert_eq!(server.take_requests()[1].headers.get("if-range").map(String::as_str), Some("\"old\""));
    }
}

#[test]
fn stalled_and_endless_answers_end() {
    let server = Server::start(|request| match request.path.as_str() {
        "/silent" => Answer::Hang(Vec::new()),
        "/stalls" => Answer::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab".to_vec()),
        "/head" => {
            Answer::Endless { head: b"HTTP/1.1 200 OK\r\n".to_vec(), again: b"X-More: and more of it\r\n".to_vec() }
        }
        "/line" => {
            Answer::Endless { head: b"HTTP/1.1 200 OK\r\nX: ".to_vec(), again: b"yyyyyyyyyyyyyyyyyyyy".to_vec() }
        }
        "/1xx" => Answer::Endless { head: Vec::new(), again: b"HTTP/1.1 102 Wait\r\n\r\n".to_vec() },
        "/loop" => Answer::redirect("/loop"),
        "/file" => Answer::redirect("file:///etc/passwd"),
        "/junk" => Answer::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
        _ => Answer::Raw(Vec::new()),
    });
    let client = client(ClientOptions { attempts: 1, ..options() });
    for path in ["/silent", "/stalls", "/head", "/line", "/1xx", "/loop", "/file", "/junk", "/nothing"] {
        let began = Instant::now();
        let error = read(client.ask(&get(&server, path))).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(5), "{path}: {:?}: {error}", began.elapsed());
        assert!(!error.is_empty(), "{path}");
    }
    let error = client.ask(&Ask { url: "file:///etc/passwd".into(), ..Ask::default() }).unwrap_err();
    assert!(matches!(error, DownloadError::Scheme { .. }));
}

#[test]
fn s099_never_more_at_once_than_allowed() {
    let server = Server::slow(Duration::from_millis(5), |request| match request.path.len() % 3 {
        0 => Answer::status(404),
        _ => Answer::File(b"text".to_vec()),
    });
    let client = client(ClientOptions { connections: 4, ..options() });
    thread_scope(16, |n| {
        for m in 0..10 {
            let _ = read(client.ask(&get(&server, &format!("/{}", "x".repeat(n + m)))));
        }
    });
    let (most, _) = server.connections();
    assert!(most <= 4, "{most} were open at once");
    assert_eq!(server.take_lines().len(), 160);
}

fn thread_scope(many: usize, work: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        for n in 0..many {
            let work = &work;
            scope.spawn(move || work(n));
        }
    });
}

#[test]
fn stopped_at_once_and_good_again() {
    let server = Server::start(|request| match request.path.as_str() {
        "/hang" => Answer::Hang(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab".to_vec()),
        _ => Answer::File(b"text".to_vec()),
    });
    let client = client(ClientOptions { stall_timeout: None, ..options() });
    let began = Instant::now();
    std::thread::scope(|scope| {
        let hangs = scope.spawn(|| read(client.ask(&get(&server, "/hang"))));
        std::thread::sleep(Duration::from_millis(200));
        client.stop();
        let error = hangs.join().unwrap().unwrap_err();
        assert!(error.ends_with("the download was stopped"), "{error}");
    });
    assert!(began.elapsed() < Duration::from_secs(2));
    assert_eq!(read(client.ask(&get(&server, "/x"))).unwrap(), b"text");
}

#[test]
fn no_faster_than_allowed() {
    let body = vec![7; 40_000];
    let file = body.clone();
    let server = Server::start(move |_| Answer::File(file.clone()));
    let client = client(ClientOptions { speed: std::num::NonZeroU64::new(100_000), ..options() });
    let began = Instant::now();
    assert!(read(client.ask(&get(&server, "/x"))).unwrap() == body);
    assert!(began.elapsed() >= Duration::from_millis(400), "{:?}", began.elapsed());
}

#[test]
fn passwords_and_proxies_go_where_they_should() {
    let elsewhere = Server::start(|_| Answer::File(b"elsewhere".to_vec()));
    let to = format!("{}/y", elsewhere.url().replace("127.0.0.1", "localhost"));
    let server = Server::start(move |request| match request.path.as_str() {
        "/moved" => Answer::redirect(&to),
        _ => Answer::File(b"text".to_vec()),
    });
    let netrc = Some("machine 127.0.0.1 login me password p".to_owned());
    let named = client(ClientOptions { netrc, ..options() });
    read(named.ask(&get(&server, "/x"))).unwrap();
    let header = server.take_requests()[0].headers.get("authorization").cloned();
    assert_eq!(header, Some(crate::netrc::basic("me", "p")));
    // To another host the password does not follow.
    assert_eq!(read(named.ask(&get(&server, "/moved"))).unwrap(), b"elsewhere");
    assert_eq!(elsewhere.take_requests()[0].headers.get("authorization"), None);
    let proxies =
        Proxies { http: Some(server.url()), none: Some("direct.example, .inner".into()), ..Proxies::default() };
    for (url, through) in [("http://a.b/x", true), ("http://direct.example/", false), ("http://x.inner/", false)] {
        assert_eq!(proxies.of(url).is_some(), through, "{url}");
    }
    server.take_requests();
    let through = client(ClientOptions { proxies, ..options() });
    let got = through.ask(&Ask { url: "http://no.such.host.example/z".into(), ..Ask::default() });
    assert_eq!(read(got).unwrap(), b"text");
}

/// A server that speaks HTTP/2, and how to believe it.
fn multiplex(delay_ms: u64, answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> (Server, ClientOptions) {
    let authority = Authority::new("ours");
    let server = Server::multiplex(&authority.vouch("127.0.0.1", 2150), Duration::from_millis(delay_ms), answer);
    let authorities = Authorities { pem: Some(authority.pem), refused: None };
    (server, ClientOptions { authorities, ..options() })
}

#[test]
fn many_requests_share_one_connection_but_not_more_at_once_than_allowed() {
    let busy = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let theirs = Arc::clone(&busy);
    let (server, options) = multiplex(0, move |request| {
        let now = theirs[0].fetch_add(1, Ordering::SeqCst) + 1;
        theirs[1].fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(10));
        theirs[0].fetch_sub(1, Ordering::SeqCst);
        match request.path.len() % 3 {
            0 => Answer::status(404),
            _ => Answer::File(request.path.clone().into_bytes()),
        }
    });
    let client = client(ClientOptions { connections: 4, ..options });
    thread_scope(16, |n| {
        for m in 0..10 {
            let path = format!("/{}", "x".repeat(n + m));
            match read(client.ask(&get(&server, &path))) {
                Ok(found) => assert_eq!(found, path.as_bytes()),
                Err(error) => assert!(path.len() % 3 == 0 && error.starts_with("HTTP error 404"), "{error}"),
            }
        }
    });
    assert_eq!(server.connections(), (1, 1));
    let asked = server.take_requests();
    assert_eq!(asked.len(), 160);
    assert!(asked.iter().all(|request| request.is_http2 && request.headers["user-agent"].starts_with("Larder/")));
    let most = busy[1].load(Ordering::SeqCst);
    assert!((2..=4).contains(&most), "{most} at once");
}

#[test]
fn version_1_1_where_that_is_wished_or_nothing_else_offered() {
    let (server, options) = multiplex(0, |_| Answer::File(b"text".to_vec()));
    let client_1 = client(ClientOptions { http2: false, ..options.clone() });
    assert_eq!(read(client_1.ask(&get(&server, "/x"))).unwrap(), b"text");
    let authority = Authority::new("ours");
    let old = Server::secret(&authority.vouch("127.0.0.1", 2150), |request| match request.path.as_str() {
        "/absent" => Answer::status(404),
        _ => Answer::File(b"text".to_vec()),
    });
    let client_2 = client(ClientOptions {
        authorities: Authorities { pem: Some(authority.pem), refused: None },
        ..options.clone()
    });
    for path in ["/x", "/absent", "/y", "/z"] {
        assert_eq!(read(client_2.ask(&get(&old, path))).is_ok(), path != "/absent");
    }
    assert!(server.take_requests().iter().chain(&old.take_requests()).all(|request| !request.is_http2));
    assert_eq!(old.connections(), (1, 1));
    // Whom nobody vouches for is believed only by who does not care.
    let stranger = client(ClientOptions { authorities: Authorities::default(), ..options.clone() });
    let error = read(stranger.ask(&get(&server, "/x"))).unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
    assert_eq!(server.take_lines(), [""; 0]);
    let careless = ClientOptions { authorities: Authorities::default(), checks_certificates: false, ..options };
    assert_eq!(read(client(careless).ask(&get(&server, "/x"))).unwrap(), b"text");
    assert!(server.take_requests()[0].is_http2);
}

#[test]
fn who_chooses_http2_and_hangs_up_each_time_is_given_up() {
    let (server, options) = multiplex(0, |_| Answer::File(b"text".to_vec()));
    let asking = client(ClientOptions { attempts: 2, ..options });
    server.hang_up(true);
    read(asking.ask(&get(&server, "/x"))).unwrap_err();
    let (_, connections) = server.connections();
    assert!((2..=2 * CHOICES_MAX as usize).contains(&connections), "{connections}");
    assert_eq!(server.take_lines(), [""; 0]);
    // It comes to its senses.
    server.hang_up(false);
    assert_eq!(read(asking.ask(&get(&server, "/x"))).unwrap(), b"text");
}

#[test]
fn http2_is_tried_again_gone_on_with_and_stopped() {
    let body: Vec<u8> = (0..=250).cycle().take(9_000_000).collect();
    let (whole, count) = (body.clone(), AtomicU64::new(0));
    let elsewhere = Server::start(|_| Answer::File(b"elsewhere".to_vec()));
    let to = format!("{}/y", elsewhere.url().replace("127.0.0.1", "localhost"));
    let (server, options) = multiplex(0, move |request| match request.path.as_str() {
        "/busy" if count.fetch_add(1, Ordering::SeqCst) < 2 => Answer::status(503),
        "/cut" if !request.headers.contains_key("range") => Answer::cut(&whole, 100_000, true),
        "/cut" | "/large" => Answer::File(whole.clone()),
        "/always-cut" => Answer::cut(&whole, 10, false),
        "/hang" => Answer::Hang(Vec::new()),
        "/moved" => Answer::redirect(&to),
        "/near" => Answer::redirect("x"),
        "/loop" => Answer::redirect("/loop"),
        "/file" => Answer::redirect("file:///etc/passwd"),
        _ => Answer::File(b"text".to_vec()),
    });
    let netrc = Some("machine 127.0.0.1 login me password p".to_owned());
    let named = client(ClientOptions { netrc, ..options });
    let asked = |path: &str| read(named.ask(&get(&server, path)));
    assert!(asked("/cut").unwrap() == body);
    let ranges: Vec<_> = server.take_requests().iter().map(|request| request.headers.get("range").cloned()).collect();
    assert!(ranges.len() == 2 && ranges[1].as_deref().is_some_and(|range| range.starts_with("bytes=")), "{ranges:?}");
    assert_eq!(asked("/busy").unwrap(), b"text");
    assert_eq!(server.take_lines().len(), 3);
    assert!(asked("/always-cut").unwrap_err().contains(": it was cut after "));
    assert!(asked("/large").unwrap() == body);
    server.take_requests();
    // To another host the password does not follow; to the same it need not.
    assert_eq!(asked("/moved").unwrap(), b"elsewhere");
    assert_eq!(server.take_requests()[0].headers.get("authorization"), Some(&crate::netrc::basic("me", "p")));
    assert_eq!(elsewhere.take_requests()[0].headers.get("authorization"), None);
    assert_eq!(asked("/near").unwrap(), b"text");
    assert!(asked("/loop").unwrap_err().contains("redirects"));
    asked("/file").unwrap_err();
    let head = Ask { method: Method::Head, ..get(&server, "/large") };
    assert_eq!(read(named.ask(&head)).unwrap(), b"");
    // What is left half read does not hinder others.
    let mut half = named.ask(&get(&server, "/large")).unwrap();
    half.read_exact(&mut [0; 100]).unwrap();
    assert_eq!(asked("/x").unwrap(), b"text");
    drop(half);
    assert!(server.take_requests().iter().all(|request| request.is_http2));
    assert_eq!(server.connections(), (1, 1));
    assert!(asked("/hang").unwrap_err().contains("nothing came for 1 seconds"));
    server.take_requests();
    let patient = client(ClientOptions { stall_timeout: None, ..named.options.clone() });
    std::thread::scope(|scope| {
        let hangs = scope.spawn(|| read(patient.ask(&get(&server, "/hang"))));
        while server.take_requests().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        patient.stop();
        let error = hangs.join().unwrap().unwrap_err();
        assert!(error.ends_with("the download was stopped"), "{error}");
    });
    assert_eq!(read(patient.ask(&get(&server, "/x"))).unwrap(), b"text");
}
