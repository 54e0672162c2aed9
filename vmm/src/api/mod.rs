//! The REST API: an HTTP server on a UNIX socket, and what its endpoints do.

pub mod http;
