//! Reclaim thresholds (`/vm.reclaim-thresholds`): alerts ([`crate::alerts`]) and the reporting policy
//! ([`crate::reporting_policy`]). [`crate::figures_thread`] evaluates them.
//!
//! ```text
//!  PUT ─► control thread ─► Thresholds::change        GET ─► Thresholds::status
//!                                │                              ▲
//!                     settings and states (ThresholdSettings) ──┘
//!                                │
//!  thread `thresholds`: once per second: what is needed ─► figures of the machine ─► step ─► events
//! ```
//! The control thread and the API only ever take the lock on the settings, which is held for microseconds; the figures
//! are read outside of it. The settings belong to the VM and not to the machine: they outlive reboots and pauses and go
//! with `vm.delete`.

mod settings;
mod shared;
#[cfg(test)]
mod tests;

use device_facts::PolicyError;

use crate::alerts::AlertError;

pub(crate) use shared::Look;
pub use shared::{Subjects, Thresholds};

/// Why a change was refused; nothing of it was made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ThresholdError {
    /// One of the alerts, or their number.
    #[error(transparent)]
    Alerts(#[from] AlertError),
    /// The reporting policy.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}
