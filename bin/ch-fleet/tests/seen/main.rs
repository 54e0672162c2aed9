#![allow(clippy::unwrap_used)]
//! What others see of a running agent: its page in a browser, its metrics in a Prometheus.
//!
//! The agent is the program itself, on this machine; the VMMs are fakes. `cargo xtask fleet-page` installs what these tests
//! need and runs them.

mod browser;
mod host;
mod page;
mod picture;
mod prometheus;
