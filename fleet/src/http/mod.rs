//! A small HTTP server for the agent's own socket and its page.
//!
//! One request a connection, each with a deadline for all of it, a bound on its size and one on how many are served at once: whoever
//! scrapes or asks can neither hold the agent up nor make it grow. It is synchronous on purpose: a handful of requests a
//! second needs no event loop, and answers come out of memory.

mod message;
mod server;
mod stream;
mod tls;

/// Whether these bytes are a request.
#[cfg(any(test, fuzzing))]
pub(crate) fn reads_request(mut bytes: &[u8]) -> bool {
    message::read_request(&mut bytes).is_ok()
}

#[cfg(test)]
mod tests;

pub use message::{Method, Peer, Request, Response};
pub use server::{CONNECTIONS_MAX, Deadlines, HttpServer, serve_tcp, serve_unix};
pub use tls::{TlsError, server_tls};
