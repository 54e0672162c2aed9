#![allow(clippy::unwrap_used)]
//! The server against clients that ask well, oddly, or never finish.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use tempfile::TempDir;

use super::*;

fn echo(request: &Request) -> Response {
    Response::text(
        "text/plain",
        format!(
            "{:?} {} {:?} {} {}",
            request.method,
            request.path,
            request.query_value("a"),
            request.body.len(),
            request.peer.is_some()
        ),
    )
}

fn ask(server: &HttpServer, request: &str) -> String {
    let mut stream = TcpStream::connect(server.address().unwrap()).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    // A refusal may close before everything was read, which resets the connection behind the answer.
    let _ = stream.read_to_string(&mut answer);
    answer
}

fn tcp() -> HttpServer {
    serve_tcp("127.0.0.1:0".parse().unwrap(), echo).unwrap()
}

#[test]
fn request_with_query_and_body_arrives_whole() {
    let answer = ask(
        &tcp(),
        "PUT /x?b=1&a=7 HTTP/1.1\r\nHost: x\r\ncontent-length: 3\r\n\r\nabc",
    );
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(
        answer.contains("\r\nContent-Security-Policy: default-src 'none'; script-src 'self';"),
        "{answer}"
    );
    assert!(answer.ends_with("Put /x Some(\"7\") 3 false"), "{answer}");
}

#[test]
fn request_that_is_none_is_refused() {
    let server = tcp();
    for (request, status) in [
        ("nonsense\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", "400"),
        ("PUT / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", "413"),
        ("DELETE / HTTP/1.1\r\n\r\n", "400"),
    ] {
        let answer = ask(&server, request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{request}: {answer}"
        );
    }
    let long = format!("GET / HTTP/1.1\r\nX: {}", "a".repeat(9000));
    assert!(ask(&server, &long).starts_with("HTTP/1.1 413"));
}

#[test]
fn unix_socket_is_for_its_owner_and_tells_who_asks() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("agent.sock");
    let server = serve_unix(&path, echo).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let answer = api::Client::new(&path).get("fleet.status?a=1").unwrap();
    assert_eq!(
        answer.as_deref(),
        Some("Get /api/v1/fleet.status Some(\"1\") 0 true")
    );
    let second = serve_unix(&path, echo).unwrap_err();
    assert_eq!(second.kind(), std::io::ErrorKind::AddrInUse);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn connections_beyond_the_bound_are_told_to_come_back() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("agent.sock");
    let _server = serve_unix(&path, echo).unwrap();
    // Each of these sends nothing and so keeps its place until its deadline.
    let held: Vec<UnixStream> = (0..CONNECTIONS_MAX)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    let mut answer = String::new();
    UnixStream::connect(&path)
        .unwrap()
        .read_to_string(&mut answer)
        .unwrap();
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    drop(held);
}
