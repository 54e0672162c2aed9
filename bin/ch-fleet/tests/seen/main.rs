#![allow(clippy::unwrap_used)]
//! Tests a running agent from outside: its page in a browser, its metrics in Prometheus.
//!
//! The agent is the real program on this machine; the VMMs are fakes. `cargo xtask fleet-page` installs the programs
//! that these tests need and runs them.

mod browser;
mod host;
mod page;
mod picture;
mod prometheus;
