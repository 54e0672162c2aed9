//! A VMM that reports only its size, which suffices for discovery.

use std::io::Write as _;
use std::path::Path;

use test_server::{Request, Server, response};

/// Responds until it is dropped.
#[derive(Debug)]
pub(crate) struct FakeVm {
    _server: Server,
}

impl FakeVm {
    pub(crate) fn start(socket: &Path, bytes: u64) -> Self {
        let info = format!(
            r#"{{"config":{{"memory":{{"size":{bytes}}}}},"state":"Running","memory_actual_size":{bytes}}}"#
        );
        let server = Server::unix(socket, usize::MAX, move |mut stream| {
            // A client may only check which process listens.
            let Some(request) = Request::read(&mut stream) else {
                return;
            };
            let answer = match request.target() {
                "GET /api/v1/vm.info" => response(200, "", &info),
                _ => response(404, "", "[\"Not Found\"]"),
            };
            // The client may have given up.
            let _ = stream.write_all(answer.as_bytes());
        });
        Self { _server: server }
    }
}
