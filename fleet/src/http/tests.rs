#![allow(clippy::unwrap_used)]
//! Tests the server with clients that send valid, unusual or incomplete requests.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use tempfile::TempDir;

use super::stream::{Limited, Timed as _};
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
    // The server may reject a request before reading all of it, which resets the connection after the response.
    let _ = stream.read_to_string(&mut answer);
    answer
}

fn tcp() -> HttpServer {
    within(Deadlines::default(), echo)
}

fn within(
    deadlines: Deadlines,
    handler: impl Fn(&Request) -> Response + Send + Sync + 'static,
) -> HttpServer {
    serve_tcp("127.0.0.1:0".parse().unwrap(), None, deadlines, handler).unwrap()
}

/// A file of the adapter's tests, made for `localhost`.
fn pem(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../bin/ch-fleet-adapter/tests/tls")
        .join(name)
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
        ("PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\na", "400"),
        (
            "PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            "400",
        ),
        ("PUT / HTTP/1.1\r\nContent-Length: 1, 2\r\n\r\nab", "400"),
        (
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\na",
            "400",
        ),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
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
    let server = serve_unix(&path, 0o600, echo).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let answer = api::Client::new(&path).get("fleet.status?a=1").unwrap();
    assert_eq!(
        answer.as_deref(),
        Some("Get /api/v1/fleet.status Some(\"1\") 0 true")
    );
    let second = serve_unix(&path, 0o600, echo).unwrap_err();
    assert_eq!(second.kind(), std::io::ErrorKind::AddrInUse);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn unix_socket_replaces_only_a_socket_that_nobody_listens_on() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("agent.sock");
    let hidden = folder.path().join("agent.new");
    let refused = || serve_unix(&path, 0o600, echo).unwrap_err().kind();
    // A file of the user, at the path or next to it, and a link to a socket.
    for file in [&path, &hidden] {
        std::fs::write(file, "kept").unwrap();
        assert_eq!(refused(), std::io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(file).unwrap(), "kept");
        std::fs::remove_file(file).unwrap();
    }
    let elsewhere = folder.path().join("elsewhere");
    drop(UnixListener::bind(&elsewhere).unwrap());
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    assert_eq!(refused(), std::io::ErrorKind::AlreadyExists);
    assert!(path.is_symlink() && elsewhere.exists());
    std::fs::remove_file(&path).unwrap();
    // A listener of another kind, which refuses streams.
    let datagrams = UnixDatagram::bind(&path).unwrap();
    assert!(serve_unix(&path, 0o600, echo).is_err());
    assert!(path.exists());
    drop(datagrams);
    std::fs::remove_file(&path).unwrap();
    // Killed agents leave these.
    drop(UnixListener::bind(&path).unwrap());
    drop(UnixListener::bind(&hidden).unwrap());
    let server = serve_unix(&path, 0o600, echo).unwrap();
    assert!(!hidden.exists());
    // A socket that another process has put in place of ours is not ours to remove.
    std::fs::remove_file(&path).unwrap();
    let other = UnixListener::bind(&path).unwrap();
    drop(server);
    assert!(path.exists());
    drop(other);
}

#[test]
fn connections_beyond_the_bound_are_told_to_come_back() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("agent.sock");
    let _server = serve_unix(&path, 0o600, echo).unwrap();
    // Each of these clients sends nothing and thus occupies its slot until its deadline.
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

/// Larger than the socket buffers, so that sending requires a reader.
const LONG: usize = 64 << 20;
/// Short, so that timeouts occur soon; a normal request takes far less.
const SHORT: Deadlines = Deadlines {
    request: Duration::from_millis(500),
    answer: Duration::from_millis(500),
};

#[test]
fn client_that_takes_an_answer_byte_by_byte_is_given_up() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Every read frees a little buffer space, so a limit on each write would never be exceeded.
            while !over.load(Ordering::Relaxed) && theirs.read(&mut [0]).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
        });
        let mut stream = Limited::new(ours);
        stream.until(Instant::now() + SHORT.answer);
        let result = stream.write_all(&vec![0; LONG]);
        over.store(true, Ordering::Relaxed);
        let error = result.unwrap_err();
        let late = [ErrorKind::TimedOut, ErrorKind::WouldBlock];
        assert!(late.contains(&error.kind()), "{error:?}");
    });
}

#[test]
fn clients_that_send_nothing_or_little_hold_nobody_up_for_long() {
    let server = within(SHORT, echo);
    let address = server.address().unwrap();
    let slow: Vec<TcpStream> = (0..CONNECTIONS_MAX)
        .map(|_| TcpStream::connect(address).unwrap())
        .collect();
    // Sends the head byte by byte, while another client sends a request.
    let mut served = false;
    for byte in b"GET / HTTP/1.1\r\nX: "
        .iter()
        .chain([b'a'].iter().cycle())
        .take(5000)
    {
        for mut stream in &slow {
            let _ = stream.write(&[*byte]);
        }
        if ask(&server, "GET /x HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200") {
            served = true;
            break;
        }
    }
    assert!(served, "the slow ones were never given up");
}

#[test]
fn client_that_never_ends_its_handshake_is_given_up() {
    let tls = server_tls(&pem("server.pem"), &pem("server.key")).unwrap();
    let address = "127.0.0.1:0".parse().unwrap();
    let server = serve_tcp(address, Some(tls), SHORT, echo).unwrap();
    let mut slow = TcpStream::connect(server.address().unwrap()).unwrap();
    // Sends the start of a handshake record, and then a byte now and then.
    slow.write_all(&[22, 3, 1, 2, 0]).unwrap();
    while slow.write(&[1]).is_ok() {
        thread::sleep(Duration::from_millis(20));
    }
    // A client without TLS receives no data of the agent.
    let mut plain = TcpStream::connect(server.address().unwrap()).unwrap();
    plain.write_all(b"GET /x HTTP/1.1\r\n\r\n").unwrap();
    plain.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "{answer:?}");
}

/// Sends a request over TLS and trusts this CA.
fn ask_over_tls(server: &HttpServer, ca: &str) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(pem(ca)).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let session = ClientConnection::new(Arc::new(config), name).unwrap();
    let stream = TcpStream::connect(server.address().unwrap()).unwrap();
    let mut stream = StreamOwned::new(session, stream);
    stream.write_all(b"GET /x HTTP/1.1\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn request_over_tls_is_answered_to_whoever_believes_the_certificate() {
    let tls = server_tls(&pem("server.pem"), &pem("server.key")).unwrap();
    let address = "127.0.0.1:0".parse().unwrap();
    let server = serve_tcp(address, Some(tls), Deadlines::default(), echo).unwrap();
    let answer = ask_over_tls(&server, "ca.pem").unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(ask_over_tls(&server, "other.pem").is_err());
}

#[test]
fn nobody_waits_for_the_handshake_of_a_connection_beyond_the_bound() {
    let tls = server_tls(&pem("server.pem"), &pem("server.key")).unwrap();
    let address = "127.0.0.1:0".parse().unwrap();
    let deadlines = Deadlines {
        request: Duration::from_secs(60),
        ..Deadlines::default()
    };
    let server = serve_tcp(address, Some(tls), deadlines, echo).unwrap();
    let held: Vec<TcpStream> = (0..CONNECTIONS_MAX)
        .map(|_| TcpStream::connect(server.address().unwrap()).unwrap())
        .collect();
    // The connection is closed without a response.
    assert!(ask_over_tls(&server, "ca.pem").is_err());
    drop(held);
}

#[test]
fn certificate_without_its_key_is_refused_by_name() {
    let error = server_tls(&pem("server.pem"), &pem("ca.pem")).unwrap_err();
    assert!(
        error.to_string().contains("ca.pem contains no key"),
        "{error}"
    );
    assert!(server_tls(Path::new("/nowhere"), &pem("server.key")).is_err());
}
