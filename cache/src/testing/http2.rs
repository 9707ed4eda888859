//! The same over HTTP/2: each request in a thread of its own, all of a connection over that.

use std::future::Future;
use std::net::TcpStream;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use ureq::http;

use super::{Answer, Request, Shared, whole};
use crate::client::multiplex::drive::{Engine, Line, wait};

/// How long what was sent may take to leave before a stream is cut.
const LEAVE: Duration = Duration::from_millis(300);

pub(super) fn serve(
    tls: rustls::ServerConnection,
    stream: TcpStream,
    shared: &Arc<Shared>,
    delay: Duration,
    answer: &Arc<impl Fn(&Request) -> Answer + Send + Sync + 'static>,
) {
    let line = Line::new(tls.into(), Arc::new(stream)).unwrap();
    let engine = Engine::new(&line).unwrap();
    let serving = async {
        let Ok(mut connection) = h2::server::handshake(line).await else { return };
        while let Some(Ok((request, respond))) = connection.accept().await {
            let (shared, answer) = (Arc::clone(shared), Arc::clone(answer));
            thread::spawn(move || {
                let request = taken(request);
                shared.requests.lock().unwrap().push(request.clone());
                let answer = answer(&request);
                thread::sleep(delay);
                send(respond, &request, answer, &shared);
            });
        }
    };
    let _ = engine.drive(serving);
}

fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    wait(None, |context| future.as_mut().poll(context)).unwrap()
}

fn taken(request: http::Request<RecvStream>) -> Request {
    let (parts, mut stream) = request.into_parts();
    let mut body = Vec::new();
    while let Some(Ok(bytes)) = block_on(stream.data()) {
        body.extend_from_slice(&bytes);
        let _ = stream.flow_control().release_capacity(bytes.len());
    }
    let headers = parts.headers.iter();
    Request {
        is_http2: true,
        method: parts.method.to_string(),
        path: parts.uri.path_and_query().unwrap().to_string(),
        headers: headers.map(|(n, v)| (n.to_string(), String::from_utf8_lossy(v.as_bytes()).into_owned())).collect(),
        body,
    }
}

fn send(mut respond: SendResponse<Bytes>, request: &Request, answer: Answer, shared: &Shared) {
    let (status, headers, body, is_whole) = match whole(request, answer) {
        Ok((status, headers, body)) => (status, headers, body, true),
        Err(Answer::Hang(bytes)) if bytes.is_empty() => return hang(shared),
        Err(Answer::Raw(bytes) | Answer::Hang(bytes)) => {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut parsed = httparse::Response::new(&mut headers);
            let Ok(httparse::Status::Complete(length)) = parsed.parse(&bytes) else {
                return respond.send_reset(Reason::INTERNAL_ERROR);
            };
            let text = |value: &[u8]| String::from_utf8(value.to_vec()).unwrap();
            let headers = parsed.headers.iter().map(|h| (h.name.to_owned(), text(h.value))).collect();
            (parsed.code.unwrap(), headers, bytes[length..].to_vec(), false)
        }
        Err(_) => return respond.send_reset(Reason::INTERNAL_ERROR),
    };
    let mut head = http::Response::builder().status(status);
    for (name, value) in headers {
        head = head.header(name, value);
    }
    let is_empty = is_whole && (body.is_empty() || request.method == "HEAD");
    let Ok(mut stream) = respond.send_response(head.body(()).unwrap(), is_empty) else { return };
    if is_empty {
        return;
    }
    let _ = stream.send_data(body.into(), is_whole);
    if !is_whole {
        thread::sleep(LEAVE);
        stream.send_reset(Reason::INTERNAL_ERROR);
    }
}

fn hang(shared: &Shared) {
    while !shared.stopped.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(20));
    }
}
