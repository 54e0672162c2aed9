//! A VMM that says what a test tells it to.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};

use tempfile::TempDir;

/// Answers one connection after the other with the given bytes, and hands back the requests.
pub(crate) struct MockServer {
    _dir: TempDir,
    pub(crate) socket: PathBuf,
    thread: JoinHandle<Vec<String>>,
}

impl MockServer {
    pub(crate) fn answering(answers: &[&str]) -> Self {
        let dir = TempDir::new().unwrap();
        let socket = dir.path().join("api.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let answers: Vec<_> = answers.iter().map(|answer| (*answer).to_owned()).collect();
        let thread = thread::spawn(move || {
            answers
                .iter()
                .map(|answer| serve(&mut listener.accept().unwrap().0, answer))
                .collect()
        });
        Self {
            _dir: dir,
            socket,
            thread,
        }
    }

    /// The requests, once all answers are given.
    pub(crate) fn requests(self) -> Vec<String> {
        self.thread.join().unwrap()
    }
}

fn serve(stream: &mut UnixStream, answer: &str) -> String {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    let head = String::from_utf8(bytes).unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |text| text.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    // In two writes, as a server with separate buffers for head and body does it.
    let (first, second) = answer.split_at(answer.len() / 2);
    stream.write_all(first.as_bytes()).unwrap();
    stream.write_all(second.as_bytes()).unwrap();
    head + std::str::from_utf8(&body).unwrap()
}

/// An answer as upstream's server writes it: no reason phrase, no length without a body.
pub(crate) fn answer(status: u16, body: &str) -> String {
    let headers = "Server: Cloud Hypervisor API\r\nConnection: keep-alive\r\n";
    if body.is_empty() {
        return format!("HTTP/1.1 {status} \r\n{headers}\r\n");
    }
    let length = body.len();
    format!(
        "HTTP/1.1 {status} \r\n{headers}Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}
