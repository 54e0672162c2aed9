#![allow(clippy::unwrap_used)]
// Two sets of tests use this file, each a different part of it.
#![allow(dead_code)]
//! A server for tests: sends predefined replies, one per request, and records the requests.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;
use test_server::{Request, Server, response};

/// A connection, encrypted or not.
trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// One reply.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    status: u16,
    headers: String,
    body: String,
    hangs: bool,
}

impl Reply {
    pub(crate) fn new(status: u16, body: &str) -> Self {
        Self {
            status,
            headers: String::new(),
            body: body.to_owned(),
            hangs: false,
        }
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers += &format!("{name}: {value}\r\n");
        self
    }

    /// Makes the server never send this reply.
    pub(crate) fn hanging(mut self) -> Self {
        self.hangs = true;
        self
    }
}

#[derive(Debug)]
pub(crate) struct FakeServer {
    server: Server,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl FakeServer {
    pub(crate) fn start(replies: impl IntoIterator<Item = Reply>) -> Self {
        Self::start_with(replies, |stream| Box::new(stream))
    }

    /// The same with TLS; the files contain the server's certificate and its key.
    pub(crate) fn start_tls(
        certificate: &Path,
        key: &Path,
        replies: impl IntoIterator<Item = Reply>,
    ) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap();
        let config = Arc::new(config);
        Self::start_with(replies, move |stream| {
            let connection = ServerConnection::new(Arc::clone(&config)).unwrap();
            Box::new(StreamOwned::new(connection, stream))
        })
    }

    fn start_with(
        replies: impl IntoIterator<Item = Reply>,
        wrap: impl Fn(TcpStream) -> Box<dyn Stream> + Send + 'static,
    ) -> Self {
        let mut replies: VecDeque<Reply> = replies.into_iter().collect();
        let asked = Arc::<Mutex<Vec<Request>>>::default();
        let noted = Arc::clone(&asked);
        // Connections without a reply stay open.
        let mut held = Vec::new();
        let server = Server::tcp(move |stream| {
            let mut stream = wrap(stream);
            let Some(request) = Request::read(stream.as_mut()) else {
                return;
            };
            noted.lock().unwrap().push(request);
            let reply = replies.pop_front().expect("an answer to every request");
            if reply.hangs {
                held.push(stream);
                return;
            }
            let headers = format!("{}Connection: close\r\n", reply.headers);
            // The client may have given up.
            let _ = stream.write_all(response(reply.status, &headers, &reply.body).as_bytes());
        });
        Self { server, asked }
    }

    pub(crate) fn port(&self) -> u16 {
        self.server.port()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.server.port())
    }

    /// Method and path of every request, with its body.
    pub(crate) fn requests(&self) -> Vec<(String, Value)> {
        let asked = self.asked.lock().unwrap();
        let body = |one: &Request| serde_json::from_str(&one.body).unwrap_or(Value::Null);
        asked
            .iter()
            .map(|one| (one.target().to_owned(), body(one)))
            .collect()
    }

    /// A header of every request.
    pub(crate) fn headers(&self, name: &str) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked
            .iter()
            .filter_map(|one| one.header(name))
            .map(str::to_owned)
            .collect()
    }
}
