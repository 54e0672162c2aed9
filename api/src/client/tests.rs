//! Tests the client with servers that respond correctly, incorrectly, or never.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use proptest::prelude::*;
use tempfile::TempDir;
use test_server::{Request, Server};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::response::ResponseReader;
use super::*;
use crate::{Endpoint, error_chain};

/// A server that serves one connection with `serve`.
struct MockServer {
    _dir: TempDir,
    client: Client,
    server: Server,
}

impl MockServer {
    fn new(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("api.sock");
        let mut serve = Some(serve);
        let server = Server::unix(&path, 1, move |stream| serve.take().unwrap()(stream));
        Self {
            _dir: dir,
            client: Client::new(path).with_timeout(Some(Duration::from_secs(10))),
            server,
        }
    }

    /// Responds with `pieces`, each in a separate write.
    fn answering(pieces: Vec<Vec<u8>>) -> Self {
        Self::new(move |mut stream| {
            read_request(&mut stream);
            for piece in pieces {
                stream.write_all(&piece).unwrap();
            }
        })
    }

    fn get(self) -> Result<Option<String>, ClientError> {
        let answer = self.client.get("vm.info");
        self.server.join();
        answer
    }
}

fn read_request(stream: &mut UnixStream) -> String {
    let Request { head, body } = Request::read(stream).unwrap();
    head + &body
}

fn one(text: &str) -> Vec<Vec<u8>> {
    vec![text.as_bytes().to_vec()]
}

fn response_error(error: &ClientError) -> &ResponseError {
    match error {
        ClientError::Response(error) => error,
        other => panic!("{other:?}"),
    }
}

const UPSTREAM_HEADERS: &str = "Server: Cloud Hypervisor API\r\nConnection: keep-alive\r\n";

#[test]
fn client_upstream_answer_without_reason_phrase_is_read() {
    let text = format!(
        "HTTP/1.1 200 \r\n{UPSTREAM_HEADERS}Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{{}}"
    );
    assert_eq!(
        MockServer::answering(one(&text)).get().unwrap().as_deref(),
        Some("{}")
    );
}

#[test]
fn client_answer_in_single_bytes_is_put_together() {
    let text = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nh\u{e9}lo";
    let pieces = text.bytes().map(|byte| vec![byte]).collect();
    assert_eq!(
        MockServer::answering(pieces).get().unwrap().as_deref(),
        Some("h\u{e9}lo")
    );
}

#[test]
fn client_no_content_is_success_without_body_and_without_waiting() {
    let (release, held) = mpsc::channel::<()>();
    let server = MockServer::new(move |mut stream| {
        read_request(&mut stream);
        write!(stream, "HTTP/1.1 204 \r\n{UPSTREAM_HEADERS}\r\n").unwrap();
        // The connection stays open, as upstream's does, until the client has its response.
        held.recv().unwrap_err();
    });
    assert_eq!(server.client.get("vm.info").unwrap(), None);
    drop(release);
    server.server.join();
}

#[test]
fn client_continue_announcement_is_skipped() {
    let text = "HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 \r\nContent-Length: 1\r\n\r\n7";
    assert_eq!(
        MockServer::answering(one(text)).get().unwrap().as_deref(),
        Some("7")
    );
}

#[test]
fn client_server_chain_becomes_the_sources() {
    let body = r#"["Error from API","The VM could not be resized","no balloon"]"#;
    let text = format!(
        "HTTP/1.1 500 \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let error = MockServer::answering(one(&text)).get().unwrap_err();
    assert_eq!(
        error_chain(&error),
        [
            "Server responded with InternalServerError",
            "Error from API",
            "The VM could not be resized",
            "no balloon"
        ]
    );
    let ClientError::Server(server) = error else {
        panic!()
    };
    assert_eq!((server.status, server.chain().count()), (500, 3));
}

#[test]
fn client_other_error_bodies_are_shown() {
    for (status, body, expected) in [
        (
            400,
            r#"{ "error": "bad line" }"#,
            vec!["Server responded with BadRequest", "bad line"],
        ),
        (
            404,
            "plain words",
            vec!["Server responded with NotFound", "plain words"],
        ),
        (409, "", vec!["Server responded with Conflict"]),
        (418, "[]", vec!["Server responded with Unknown (418)"]),
    ] {
        let text = format!(
            "HTTP/1.1 {status} \r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let error = MockServer::answering(one(&text)).get().unwrap_err();
        assert_eq!(error_chain(&error), expected);
    }
}

#[test]
fn client_garbage_is_refused_at_once() {
    let (release, held) = mpsc::channel::<()>();
    let server = MockServer::new(move |mut stream| {
        read_request(&mut stream);
        stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").unwrap();
        held.recv().unwrap_err();
    });
    let error = server.client.get("vm.info").unwrap_err();
    assert!(
        matches!(response_error(&error), ResponseError::StatusLine { .. }),
        "{error:?}"
    );
    drop(release);
    server.server.join();
}

#[test]
fn client_malformed_heads_are_refused() {
    for head in [
        "HTTP/1.1 \r\n\r\n",
        "HTTP/1.1 2x0 OK\r\n\r\n",
        "HTTP/1.1 +20 \r\n\r\n",
        "HTTP/1.1 099 \r\n\r\n",
        "HTTP/1.7 200 \r\n\r\n",
        "HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
        "HTTP/1.1 200 \r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        "HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "HTTP/1.1 200 \r\nContent-Length : 2\r\n\r\n{}",
        "HTTP/1.1 200 \r\nno colon\r\n\r\n",
        "HTTP/1.1 200 \n\nContent-Length: 2\r\n\r\n{}",
    ] {
        let error = MockServer::answering(one(head)).get().unwrap_err();
        assert!(
            matches!(error, ClientError::Response(_)),
            "{head:?}: {error:?}"
        );
    }
}

#[test]
fn client_shows_the_status_line_alone_and_why_headers_are_refused() {
    let refused = |answer: &str| {
        let error = MockServer::answering(one(answer)).get().unwrap_err();
        error_chain(&error)[1..].join(": ")
    };
    assert_eq!(
        refused("HTTP/1.1 2x0 OK\r\nContent-Length: 2\r\n\r\n{}"),
        "\"HTTP/1.1 2x0 OK\" is not an HTTP status line"
    );
    let many = "X: y\r\n".repeat(65);
    assert_eq!(
        refused(&format!("HTTP/1.1 200 \r\n{many}\r\n")),
        "the headers are malformed: too many headers"
    );
}

#[test]
fn client_huge_body_is_refused_before_it_comes() {
    for length in ["16777217", "18446744073709551615", "99999999999999999999"] {
        let error = MockServer::answering(one(&format!(
            "HTTP/1.1 200 \r\nContent-Length: {length}\r\n\r\n"
        )))
        .get()
        .unwrap_err();
        let refused = matches!(
            response_error(&error),
            ResponseError::BodyTooLong { .. } | ResponseError::ContentLength { .. }
        );
        assert!(refused, "{error:?}");
    }
}

#[test]
fn client_headers_without_end_are_refused() {
    let server = MockServer::new(|mut stream| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 \r\n").unwrap();
        // Ends when the client hangs up.
        while stream
            .write_all(b"X: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n")
            .is_ok()
        {}
    });
    let error = server.get().unwrap_err();
    assert_eq!(response_error(&error), &ResponseError::HeadTooLong);
}

#[test]
fn client_early_close_tells_how_far_it_came() {
    let error = MockServer::answering(Vec::new()).get().unwrap_err();
    assert_eq!(response_error(&error), &ResponseError::Nothing);
    let error = MockServer::answering(one("HTTP/1.1 200 \r\nContent-Length: 10\r\n\r\nabc"))
        .get()
        .unwrap_err();
    assert_eq!(
        response_error(&error),
        &ResponseError::Truncated { bytes: 40 }
    );
}

#[test]
fn client_body_that_is_not_text_is_refused() {
    let answer = [
        b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n".as_slice(),
        &[0xff, 0xfe],
    ]
    .concat();
    let error = MockServer::answering(vec![answer]).get().unwrap_err();
    assert_eq!(response_error(&error), &ResponseError::NotText);
}

#[test]
fn client_silent_server_times_out() {
    let (release, held) = mpsc::channel::<()>();
    let server = MockServer::new(move |stream| {
        held.recv().unwrap_err();
        drop(stream);
    });
    let client = server
        .client
        .clone()
        .with_timeout(Some(Duration::from_millis(50)));
    let error = client.get("vm.info").unwrap_err();
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error:?}");
    assert_eq!(error.to_string(), "The VMM did not respond within 50 ms");
    drop(release);
    server.server.join();
}

#[test]
fn client_dripping_server_does_not_renew_the_timeout() {
    let server = MockServer::new(|mut stream| {
        read_request(&mut stream);
        stream.write_all(b"HTTP/1.1 200 \r\n").unwrap();
        while stream.write_all(b"X").is_ok() {
            thread::park_timeout(Duration::from_millis(5));
        }
    });
    let client = server
        .client
        .clone()
        .with_timeout(Some(Duration::from_millis(100)));
    let started = Instant::now();
    assert!(matches!(
        client.get("vm.info").unwrap_err(),
        ClientError::TimedOut { .. }
    ));
    assert!(started.elapsed() < Duration::from_secs(5));
    drop(client);
    server.server.join();
}

#[test]
fn client_full_backlog_times_out() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("api.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let client = Client::new(&path).with_timeout(Some(Duration::from_millis(20)));
    // The server never accepts: connections fill the backlog, and then connecting itself must time out.
    let mut waiting = Vec::new();
    for _ in 0..8192 {
        let deadline = Deadline::after(Duration::from_millis(20));
        match connect::connect(&path, None, Some(deadline)) {
            Ok(stream) => waiting.push(stream),
            Err(error) => {
                assert!(matches!(error, ClientError::TimedOut { .. }), "{error:?}");
                assert!(matches!(
                    client.get("vmm.ping").unwrap_err(),
                    ClientError::TimedOut { .. }
                ));
                return;
            }
        }
    }
    panic!("the backlog took {} connections", waiting.len());
}

#[test]
fn client_missing_socket_and_dead_socket_are_told_apart() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("api.sock");
    let error = Client::new(&path).get("vmm.ping").unwrap_err();
    assert!(matches!(error, ClientError::NoSocket { .. }), "{error:?}");
    drop(UnixListener::bind(&path).unwrap());
    let error = Client::new(&path).get("vmm.ping").unwrap_err();
    assert!(matches!(error, ClientError::Refused { .. }), "{error:?}");
    let error = Client::new("/".repeat(200)).get("vmm.ping").unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
}

#[test]
fn client_request_has_the_form_upstream_sends() {
    let (sender, requests) = mpsc::channel();
    let server = MockServer::new(move |mut stream| {
        sender.send(read_request(&mut stream)).unwrap();
        stream.write_all(b"HTTP/1.1 204 \r\n\r\n").unwrap();
    });
    server.client.put("vm.resize", Some("{\"a\":1}")).unwrap();
    assert_eq!(
        requests.recv().unwrap(),
        "PUT /api/v1/vm.resize HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\
         Content-Type: application/json\r\nContent-Length: 7\r\n\r\n{\"a\":1}"
    );
    server.server.join();
}

#[test]
fn client_large_request_answered_early_shows_the_answer() {
    let server = MockServer::new(|mut stream| {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        stream
            .write_all(b"HTTP/1.1 400 \r\nContent-Length: 11\r\n\r\n[\"too big\"]")
            .unwrap();
        stream.shutdown(std::net::Shutdown::Read).unwrap();
    });
    let error = server
        .client
        .put("vm.create", Some(&" ".repeat(8 << 20)))
        .unwrap_err();
    server.server.join();
    assert_eq!(
        error_chain(&error),
        ["Server responded with BadRequest", "too big"]
    );
}

#[test]
fn client_descriptors_travel_with_the_request() {
    let dir = TempDir::new().unwrap();
    let file_path = dir.path().join("file");
    std::fs::write(&file_path, "contents").unwrap();
    let file = std::fs::File::open(&file_path).unwrap();
    let (sender, received) = mpsc::channel();
    let server = MockServer::new(move |mut stream| {
        let mut buffer = [0; 4096];
        let (count, fd) = stream.recv_with_fd(&mut buffer).unwrap();
        assert!(count > 0);
        let mut text = String::new();
        fd.unwrap().read_to_string(&mut text).unwrap();
        sender.send(text).unwrap();
        stream.write_all(b"HTTP/1.1 204 \r\n\r\n").unwrap();
    });
    server
        .client
        .put_with_fds("vm.add-net", Some("{}"), &[file.as_raw_fd()])
        .unwrap();
    assert_eq!(received.recv().unwrap(), "contents");
    server.server.join();
}

#[test]
fn client_typed_call_decodes_or_says_why_not() {
    let body = r#"{"balloon_actual":4096,"stats":{"free_memory":7}}"#;
    let text = format!(
        "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let server = MockServer::answering(one(&text));
    let stats = server.client.balloon_stats().unwrap();
    assert_eq!(
        (stats.balloon_actual, stats.stats.free_memory),
        (4096, Some(7))
    );
    server.server.join();

    let server = MockServer::answering(one("HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n[]"));
    assert!(matches!(
        server.client.ping().unwrap_err(),
        ClientError::Decode {
            endpoint: "vmm.ping",
            ..
        }
    ));
    server.server.join();

    let server = MockServer::answering(one("HTTP/1.1 204 \r\n\r\n"));
    assert!(matches!(
        server.client.ping().unwrap_err(),
        ClientError::MissingBody {
            endpoint: "vmm.ping"
        }
    ));
    server.server.join();
}

proptest! {
    #[test]
    fn response_any_bytes_in_any_pieces_never_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
        let mut reader = ResponseReader::default();
        for piece in pieces {
            reader.push(&piece);
            if reader.response().is_err() {
                break;
            }
        }
    }

    #[test]
    fn response_cuts_do_not_change_the_result(body in "[ -~]{0,60}", cuts in prop::collection::vec(1_usize..20, 0..12)) {
        let text = format!("HTTP/1.1 200 \r\nX-Y: z\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let mut reader = ResponseReader::default();
        let mut rest = text.as_bytes();
        for cut in cuts {
            let (piece, tail) = rest.split_at(cut.min(rest.len()));
            reader.push(piece);
            reader.response().unwrap();
            rest = tail;
        }
        reader.push(rest);
        prop_assert_eq!(reader.response().unwrap().unwrap().body, body);
    }
}

#[test]
fn only_the_file_that_was_meant_is_connected_to() {
    let server = MockServer::new(|mut stream| {
        let mut bytes = [0; 16];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(b"HTTP/1.1 204 \r\n\r\n").unwrap();
    });
    let socket = server.client.socket().to_owned();
    let metadata = std::fs::metadata(&socket).unwrap();
    let file = SocketInode {
        device: metadata.dev(),
        inode: metadata.ino(),
    };
    let link = socket.with_extension("link");
    std::os::unix::fs::symlink(&socket, &link).unwrap();
    let other = SocketInode {
        inode: file.inode + 1,
        ..file
    };
    for client in [
        server.client.clone().at_file(other),
        Client::new(link).at_file(file),
    ] {
        let error = client.ping().unwrap_err();
        assert!(matches!(error, ClientError::NoSocket { .. }), "{error:?}");
    }
    let answer = server.client.clone().at_file(file).get("vm.info");
    assert_eq!(answer.unwrap(), None);
    server.server.join();
}

#[test]
fn peer_is_the_listener_and_nobody_else_is_sent_anything() {
    let server = MockServer::new(|mut stream| {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"", "the request was for somebody else");
    });
    let own = i32::try_from(std::process::id()).unwrap();
    let error = server.client.to_peer(own + 1).ping().unwrap_err();
    assert!(
        matches!(error, ClientError::OtherPeer { expected, found } if expected == own + 1 && found == own),
        "{error:?}"
    );
    server.server.join();
    let server = MockServer::new(|mut stream| {
        let mut bytes = [0; 16];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(b"HTTP/1.1 204 \r\n\r\n").unwrap();
    });
    let (body, peer) = server
        .client
        .to_peer(own)
        .get_with_peer(Endpoint::VmInfo)
        .unwrap();
    assert_eq!((body, peer.pid, peer.has_ended), (None, own, false));
    assert_eq!(peer.uid, std::fs::metadata("/proc/self").unwrap().uid());
    server.server.join();
}
