//! The REST API: an HTTP server on a UNIX socket, and what its endpoints do.

mod dispatch;
pub mod http;
mod socket;
#[cfg(test)]
mod tests;

pub use dispatch::Dispatcher;
pub use socket::{ApiSocket, ApiSocketError};
