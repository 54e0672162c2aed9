//! The REST API: an HTTP server on a UNIX socket, and the implementation of its endpoints.

mod body;
mod dispatch;
mod failure;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod http;
mod query;
mod socket;
#[cfg(test)]
mod tests;

pub use dispatch::Dispatcher;
pub use socket::{ApiSocket, ApiSocketError};
