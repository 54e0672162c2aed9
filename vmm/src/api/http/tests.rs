//! Tests the server with well-behaved and hostile clients that send raw bytes.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use micro_http::Request;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

/// Long enough for a loaded machine; only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// Responds to `/ping` immediately, to `/count` with sizes, and keeps the reply to `/later`.
#[derive(Clone, Default)]
struct Fixture {
    kept: Arc<Mutex<Vec<Reply>>>,
}

impl Handler for Fixture {
    fn handle(&self, request: Request, reply: Reply) {
        match request.uri().get_abs_path() {
            "/ping" => reply.send(Answer::json(&["pong"])),
            "/count" => {
                let body_len = request.body.map_or(0, |body| body.len());
                reply.send(Answer::json(&[body_len, request.files.len()]));
            }
            "/big" => reply.send(Answer::json(&"x".repeat(1 << 20))),
            "/later" => self.kept.lock().unwrap().push(reply),
            "/empty" => reply.send(Answer::empty(Status::Ok)),
            _ => reply.send(Answer::no_content()),
        }
    }
}

struct Server {
    dir: tempfile::TempDir,
    fixture: Fixture,
    _server: HttpServer,
}

fn server_with(deadlines: Deadlines) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let fixture = Fixture::default();
    let server = HttpServer::start(listener, fixture.clone(), deadlines, || {}).unwrap();
    Server {
        dir,
        fixture,
        _server: server,
    }
}

fn server() -> Server {
    server_with(Deadlines::default())
}

impl Server {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn ping(&self) {
        let mut stream = self.connect();
        stream.write_all(b"GET /ping HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(
            read_response(&mut stream),
            (200, Some("[\"pong\"]".to_owned()))
        );
    }
}

/// Reads one response as upstream's client does: `Content-Length: ` in exactly this case, or no body.
fn read_response(stream: &mut UnixStream) -> (u16, Option<String>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.strip_prefix("HTTP/1.1 ").unwrap();
    let status = status[..status.find('\r').unwrap()].trim().parse().unwrap();
    let body = head.find("Content-Length: ").map(|at| {
        let rest = &head[at + "Content-Length: ".len()..];
        let len: usize = rest[..rest.find('\r').unwrap()].parse().unwrap();
        let mut body = vec![0; len];
        stream.read_exact(&mut body).unwrap();
        String::from_utf8(body).unwrap()
    });
    (status, body)
}

fn is_closed(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn server_request_byte_by_byte_is_answered() {
    let server = server();
    let mut stream = server.connect();
    for byte in b"PUT /count HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc" {
        stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(read_response(&mut stream), (200, Some("[3,0]".to_owned())));
}

#[test]
fn server_stalled_and_waiting_clients_do_not_delay_another() {
    let server = server();
    let mut half = server.connect();
    half.write_all(b"PUT /count HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc")
        .unwrap();
    let mut waiting = server.connect();
    waiting.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
    let begun = Instant::now();
    server.ping();
    assert!(begun.elapsed() < Duration::from_secs(2));
    let deadline = Instant::now() + PATIENCE;
    while server.fixture.kept.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let reply = server.fixture.kept.lock().unwrap().pop().unwrap();
    reply.send(Answer::no_content());
    assert_eq!(read_response(&mut waiting), (204, None));
}

#[test]
fn server_stalled_clients_do_not_lock_others_out() {
    let server = server_with(Deadlines {
        stall: Duration::from_millis(200),
        linger: Duration::from_millis(50),
        ..Deadlines::default()
    });
    let mut stalled: Vec<_> = (0..CONNECTIONS_MAX)
        .map(|_| {
            let mut stream = server.connect();
            stream.write_all(b"GET /pi").unwrap();
            stream
        })
        .collect();
    let (status, body) = read_response(&mut stalled[0]);
    assert_eq!(status, 400);
    assert!(body.unwrap().contains("not completed in time"));
    server.ping();
}

#[test]
fn server_eleventh_client_gets_503_until_the_others_were_idle_long_enough() {
    let server = server_with(Deadlines {
        idle_grace: Duration::from_secs(3600),
        ..Deadlines::default()
    });
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| server.connect()).collect();
    let mut eleventh = server.connect();
    let (status, body) = read_response(&mut eleventh);
    assert_eq!(status, 503);
    assert!(body.unwrap().starts_with("{\"error\""));
    assert!(is_closed(&mut eleventh));
    clients[3].write_all(b"GET /ping HTTP/1.1\r\n\r\n").unwrap();
    assert_eq!(read_response(&mut clients[3]).0, 200);
    drop(clients.pop());
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut retry = server.connect();
        // Rejected clients see a closed pipe here; only the status 200 of a response counts.
        let _ = retry.write_all(b"GET /ping HTTP/1.1\r\n\r\n");
        if read_response(&mut retry).0 == 200 {
            break;
        }
        assert!(Instant::now() < deadline);
    }
}

#[test]
fn server_has_room_for_ten_clients_that_come_again_and_again() {
    let server = server_with(Deadlines {
        idle_grace: Duration::from_secs(3600),
        ..Deadlines::default()
    });
    std::thread::scope(|scope| {
        for _ in 0..CONNECTIONS_MAX {
            // Each client has left before it connects again, so no request is rejected.
            scope.spawn(|| (0..200).for_each(|_| server.ping()));
        }
    });
}

#[test]
fn server_idle_client_makes_room_for_a_new_one() {
    let server = server_with(Deadlines {
        idle_grace: Duration::ZERO,
        ..Deadlines::default()
    });
    let mut clients: Vec<_> = (0..CONNECTIONS_MAX).map(|_| server.connect()).collect();
    server.ping();
    assert!(is_closed(&mut clients[0]));
}

#[test]
fn server_oversized_body_is_refused_and_the_connection_closed() {
    let server = server();
    let mut stream = server.connect();
    let size = 5 << 20;
    write!(
        stream,
        "PUT /count HTTP/1.1\r\nContent-Length: {size}\r\n\r\n"
    )
    .unwrap();
    stream.write_all(&vec![b' '; size]).unwrap();
    let (status, body) = read_response(&mut stream);
    assert_eq!(status, 400);
    assert!(
        body.unwrap()
            .contains("5242880 is larger than the limit of 4194304")
    );
    assert!(is_closed(&mut stream));
    server.ping();
}

#[test]
fn server_largest_body_is_taken() {
    let server = server();
    let mut stream = server.connect();
    let size = 4 << 20;
    write!(
        stream,
        "PUT /count HTTP/1.1\r\nContent-Length: {size}\r\n\r\n"
    )
    .unwrap();
    stream.write_all(&vec![b' '; size]).unwrap();
    assert_eq!(
        read_response(&mut stream),
        (200, Some(format!("[{size},0]")))
    );
}

#[test]
fn server_pipelined_requests_are_answered_in_order() {
    let server = server();
    let mut stream = server.connect();
    stream
        .write_all(
            b"GET /ping HTTP/1.1\r\n\r\nPUT /count HTTP/1.1\r\nContent-Length: 1\r\n\r\nxGET /none HTTP/1.1\r\n\r\n\
              GET /empty HTTP/1.1\r\n\r\n",
        )
        .unwrap();
    assert_eq!(read_response(&mut stream).1.unwrap(), "[\"pong\"]");
    assert_eq!(read_response(&mut stream).1.unwrap(), "[1,0]");
    assert_eq!(read_response(&mut stream), (204, None));
    assert_eq!(read_response(&mut stream), (200, None));
}

#[test]
fn server_garbage_gets_400_with_an_object() {
    let server = server();
    for garbage in [
        b"\0\xff\x01nonsense\r\n\r\n".as_slice(),
        b"POKE / HTTP/1.1\r\n\r\n",
    ] {
        let mut stream = server.connect();
        stream.write_all(garbage).unwrap();
        let (status, body) = read_response(&mut stream);
        assert_eq!(status, 400);
        let body: serde_json::Value = serde_json::from_str(&body.unwrap()).unwrap();
        let text = body["error"].as_str().unwrap();
        assert!(
            text.ends_with("\nAll previous unanswered requests will be dropped."),
            "{text}"
        );
        assert!(is_closed(&mut stream));
    }
}

#[test]
fn server_large_answer_reaches_a_slow_reader() {
    let server = server();
    let mut stream = server.connect();
    stream.write_all(b"GET /big HTTP/1.1\r\n\r\n").unwrap();
    server.ping();
    assert_eq!(read_response(&mut stream).1.unwrap().len(), (1 << 20) + 2);
}

#[test]
fn server_half_closed_client_still_gets_its_answer() {
    let server = server();
    let mut stream = server.connect();
    stream.write_all(b"GET /ping HTTP/1.1\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(read_response(&mut stream).0, 200);
    assert!(is_closed(&mut stream));
}

#[test]
fn server_waits_for_continue() {
    let server = server();
    let mut stream = server.connect();
    stream
        .write_all(b"PUT /count HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        .unwrap();
    assert_eq!(read_response(&mut stream), (100, None));
    stream.write_all(b"ab").unwrap();
    assert_eq!(read_response(&mut stream), (200, Some("[2,0]".to_owned())));
}

#[test]
fn server_empty_body_in_chunks_is_no_body() {
    let server = server();
    let mut stream = server.connect();
    stream
        .write_all(
            b"PUT /count HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n",
        )
        .unwrap();
    assert_eq!(read_response(&mut stream), (100, None));
    stream.write_all(b"0\r\n\r\n").unwrap();
    assert_eq!(read_response(&mut stream), (200, Some("[0,0]".to_owned())));
    server.ping();
}

#[test]
fn server_client_that_asks_to_close_is_closed() {
    let server = server();
    let mut stream = server.connect();
    stream
        .write_all(b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(read_response(&mut stream).0, 200);
    assert!(is_closed(&mut stream));
}

#[test]
fn server_descriptors_stay_with_their_request() {
    let server = server();
    let mut stream = server.connect();
    let file = tempfile::tempfile().unwrap();
    let head = b"PUT /count HTTP/1.1\r\nContent-Length: 2\r\n".as_slice();
    stream
        .send_with_fds(&[head], &[file.as_raw_fd(), file.as_raw_fd()])
        .unwrap();
    stream.write_all(b"\r\n").unwrap();
    stream.write_all(b"{}").unwrap();
    assert_eq!(read_response(&mut stream), (200, Some("[2,2]".to_owned())));
    stream
        .write_all(b"PUT /count HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        .unwrap();
    assert_eq!(read_response(&mut stream), (200, Some("[2,0]".to_owned())));
}

#[test]
fn server_client_that_leaves_while_its_request_runs_is_forgotten() {
    let server = server();
    for _ in 0..3 * CONNECTIONS_MAX {
        let mut stream = server.connect();
        stream.write_all(b"GET /later HTTP/1.1\r\n\r\n").unwrap();
        let deadline = Instant::now() + PATIENCE;
        while server.fixture.kept.lock().unwrap().is_empty() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        drop(stream);
        drop(server.fixture.kept.lock().unwrap().pop());
    }
    server.ping();
}
