//! Saved states: how every part of a machine is saved and restored.
//!
//! ```text
//!   run-time part ── state() ──► XxxState ── Saved::of ──► Saved { "version": n, … } ──► JSON
//!   run-time part ◄─ restore ─── XxxState ◄─ Saved::read ─ version readable? upgrade ◄── JSON
//! ```
//!
//! * A *state type* ([`State`]) is plain data that serde can write. It is always a separate type from the run-time
//!   type, so that either can change without the other.
//! * [`Saved`] is a state of any part with its version: parts exchange states in this form.
//! * [`parts`] is the table of all parts and their readable versions.
//!
//! The rules for a new field or version are in `docs/state.md`. A saved state comes from a file or from the network.
//! Reading it never panics, and an impossible value is rejected with an error that names its field.

mod bytes;
mod error;
pub mod parts;
mod saved;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;

pub use bytes::Bytes;
pub use error::{StateError, require};
pub use parts::Part;
pub use saved::{Fields, Saved, State, wrap_in_list};
