//! Reclaim thresholds (`/vm.reclaim-thresholds`): alerts on figures, told on the event monitor, and the reporting policy.
//! What is told of the balloon without being asked for ([`balloon`]) is noticed by the same thread.
//!
//! ```text
//!  PUT ─► control thread ─► Thresholds::change        GET ─► Thresholds::status
//!                                │                              ▲
//!                     settings and states (Book) ───────────────┘
//!                                │
//!  thread `thresholds`: once a second: what is needed ─► figures of the machine ─► step ─► events
//! ```
//! The control thread and the API only ever take the lock on the book, which is held for microseconds; the figures are
//! read outside of it. The book belongs to the VM and not to the machine: it outlives reboots and pauses and goes with
//! `vm.delete`. Deciding is pure ([`book`], [`alert`], [`balloon`], [`figure`], [`policy`], [`reporting`]); only [`monitor`] knows threads and
//! clocks.

mod alert;
mod balloon;
mod book;
mod error;
mod figure;
mod monitor;
mod policy;
mod reporting;
#[cfg(test)]
mod tests;

pub use error::{AlertFault, ThresholdError};
pub use monitor::{Monitor, Subjects, Thresholds};
pub use policy::PolicySight;

/// Most alerts of a VM: what bounds events, memory and the cost of a look.
pub const ALERTS_MAX: usize = 32;
/// Most characters of an alert's name and of a figure's.
pub const NAME_LENGTH_MAX: usize = 128;
