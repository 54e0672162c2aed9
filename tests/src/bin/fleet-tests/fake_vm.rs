//! A VMM that tells its size and nothing else: enough to be discovered.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result};

/// Answers until it is dropped.
#[derive(Debug)]
pub(crate) struct FakeVm {
    socket: PathBuf,
}

impl FakeVm {
    pub(crate) fn start(socket: &Path, bytes: u64) -> Result<Self> {
        let listener = UnixListener::bind(socket).context("listening as a VMM")?;
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                answer(stream, bytes);
            }
        });
        Ok(Self {
            socket: socket.to_owned(),
        })
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        // Nobody finds it any more; its thread ends with this program.
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn answer(mut stream: UnixStream, bytes: u64) {
    let mut request = Vec::new();
    let mut part = [0; 1024];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        match stream.read(&mut part) {
            Ok(count @ 1..) => request.extend_from_slice(&part[..count]),
            _ => return,
        }
    }
    let text = String::from_utf8_lossy(&request);
    let body = if text.contains("/vm.info") {
        format!(
            r#"{{"config":{{"memory":{{"size":{bytes}}}}},"state":"Running","memory_actual_size":{bytes}}}"#
        )
    } else {
        "[\"Not Found\"]".to_owned()
    };
    let status = if body.starts_with('{') { 200 } else { 404 };
    let head = format!(
        "HTTP/1.1 {status} \r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    // Whoever asked may have given up.
    let _ = stream.write_all((head + &body).as_bytes());
}
