//! Reclaim thresholds (`/vm.reclaim-thresholds`): alerts ([`crate::alerts`]) and the reporting policy
//! ([`crate::reporting_policy`]). [`crate::figures_thread`] evaluates them.
//!
//! ```text
//!  PUT ─► control thread ─► Thresholds::change        GET ─► Thresholds::status
//!                                │                              ▲
//!                     rules and states (ThresholdConfig) ──┘
//!                                │
//!  thread `thresholds`: once per second: what is needed ─► figures of the machine ─► step ─► events
//! ```
//! The control thread and the API take only the lock on the configuration, which is held for microseconds. Figures are
//! read without holding it. The configuration belongs to the VM and not to the machine: it survives reboots and pauses,
//! and `vm.delete` deletes it.

mod config;
mod shared;
#[cfg(test)]
mod tests;

use device_facts::PolicyError;

use crate::alerts::AlertError;

pub(crate) use shared::Look;
pub use shared::{Subjects, Thresholds};

/// Reasons for rejecting a change; nothing of it was applied.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ThresholdError {
    /// One of the alerts, or their number.
    #[error(transparent)]
    Alerts(#[from] AlertError),
    /// The reporting policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}
