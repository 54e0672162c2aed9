//! An HTTP server for tests, on a UNIX socket or a TCP port. The test decides how to serve each connection; this crate
//! accepts connections, reads requests and writes responses in the format of upstream's server.
//!
//! Only tests depend on it, so it panics where a product would report an error.

#![allow(clippy::missing_panics_doc, clippy::unwrap_used)]

use std::fs;
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use rustix::net::{Shutdown, shutdown};

/// A request: head and body as received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Request line and headers, with the empty line.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Request {
    /// Reads exactly one request; `None` if the client disconnects before its end.
    pub fn read(stream: &mut (impl Read + ?Sized)) -> Option<Self> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte).ok()?;
            head.push(byte[0]);
        }
        let mut request = Self {
            head: String::from_utf8(head).unwrap(),
            body: String::new(),
        };
        let length = request.header("Content-Length");
        let mut body = vec![0; length.map_or(0, |text| text.parse().unwrap())];
        stream.read_exact(&mut body).ok()?;
        request.body = String::from_utf8(body).unwrap();
        Some(request)
    }

    /// Method and path, `GET /api/v1/vm.info`.
    pub fn target(&self) -> &str {
        let line = self.head.lines().next().unwrap_or_default();
        line.strip_suffix(" HTTP/1.1").unwrap_or(line)
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let fields = self.head.lines().filter_map(|line| line.split_once(':'));
        fields
            .filter(|(known, _)| known.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim())
            .next()
    }
}

/// A response in the format of upstream's server: no reason phrase, no length without a body. `headers` are whole
/// lines.
pub fn response(status: u16, headers: &str, body: &str) -> String {
    let head = format!("HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\n{headers}");
    if body.is_empty() {
        return format!("{head}\r\n");
    }
    let length = body.len();
    format!("{head}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")
}

/// A server; dropping it stops it and removes its socket.
#[derive(Debug)]
pub struct Server {
    address: Address,
    /// Shut down to stop the thread.
    listener: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Server {
    /// Listens at `path` and passes `connections` connections to `serve`, one after another.
    pub fn unix(
        path: &Path,
        connections: usize,
        serve: impl FnMut(UnixStream) + Send + 'static,
    ) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let handle = listener.try_clone().unwrap().into();
        let accept = move || listener.accept().map(|(stream, _)| stream);
        let address = Address::Unix(path.to_owned());
        Self::start(address, handle, connections, accept, serve)
    }

    /// Listens at a free port of the loopback interface and passes every connection to `serve`, one after another.
    pub fn tcp(serve: impl FnMut(TcpStream) + Send + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let handle = listener.try_clone().unwrap().into();
        let address = Address::Tcp(listener.local_addr().unwrap());
        let accept = move || listener.accept().map(|(stream, _)| stream);
        Self::start(address, handle, usize::MAX, accept, serve)
    }

    fn start<S>(
        address: Address,
        listener: OwnedFd,
        connections: usize,
        mut accept: impl FnMut() -> io::Result<S> + Send + 'static,
        mut serve: impl FnMut(S) + Send + 'static,
    ) -> Self {
        let thread = thread::spawn(move || {
            for _ in 0..connections {
                // Fails when the listener has been shut down.
                let Ok(stream) = accept() else { return };
                serve(stream);
            }
        });
        Self {
            address,
            listener,
            thread: Some(thread),
        }
    }

    /// The port of a TCP server.
    pub fn port(&self) -> u16 {
        match &self.address {
            Address::Tcp(address) => address.port(),
            Address::Unix(path) => panic!("{} has no port", path.display()),
        }
    }

    /// Waits until all connections have been served; a panic of `serve` becomes one here.
    pub fn join(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Address::Unix(path) = &self.address {
            // Its folder may have been removed.
            drop(fs::remove_file(path));
        }
        let Some(thread) = self.thread.take() else {
            return;
        };
        shutdown(&self.listener, Shutdown::Both).unwrap();
        // A failed test may still hold the connection that the thread waits for. A panic of the thread has been
        // printed.
        if !thread::panicking() {
            drop(thread.join());
        }
    }
}
