//! HTTP on a UNIX socket: `micro_http` parses and formats messages; this module runs the server loop.
//!
//! Limits: ten clients, a head of 16 KiB, a body of 4 MiB, 64 descriptors, and one request at a time on each
//! connection. Everything that a client can delay has a deadline. The wire format is upstream's, because upstream's
//! `ch-remote` depends on its details.

mod connection;
mod framing;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod receive;
mod reply;
mod server;
#[cfg(test)]
mod tests;

pub use connection::Deadlines;
pub use reply::{Answer, Reply, Status};
pub use server::{CONNECTIONS_MAX, Handler, HttpServer, HttpServerError};
