//! A small HTTP server for the agent's own socket and its page.
//!
//! Each connection carries one request. Deadlines, a size limit and a limit on concurrent connections keep clients from
//! blocking the agent or increasing its memory use. The server is deliberately synchronous: a few requests per second
//! need no event loop, and responses come from memory.

mod message;
mod server;
mod stream;
mod tls;

/// Whether these bytes are a valid request.
#[cfg(any(test, fuzzing))]
pub(crate) fn reads_request(mut bytes: &[u8]) -> bool {
    message::read_request(&mut bytes).is_ok()
}

#[cfg(test)]
mod tests;

pub use message::{Method, Peer, Request, Response};
pub use server::{CONNECTIONS_MAX, Deadlines, HttpServer, serve_tcp, serve_unix};
pub use tls::{ServerTlsError, server_tls};
