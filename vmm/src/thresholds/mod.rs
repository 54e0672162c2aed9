//! Reclaim thresholds (`/vm.reclaim-thresholds`): alerts ([`crate::alerts`]), the reporting policy
//! ([`crate::reporting_policy`]), and the thread that evaluates figures and reports events ([`crate::balloon_events`]
//! as well).
//!
//! ```text
//!  PUT ─► control thread ─► Thresholds::change        GET ─► Thresholds::status
//!                                │                              ▲
//!                     settings and states (ThresholdSettings) ──┘
//!                                │
//!  thread `thresholds`: once a second: what is needed ─► figures of the machine ─► step ─► events
//! ```
//! The control thread and the API only ever take the lock on the settings, which is held for microseconds; the figures
//! are read outside of it. The settings belong to the VM and not to the machine: they outlive reboots and pauses and go
//! with `vm.delete`. Only [`monitor`] knows threads and clocks.

mod monitor;
mod settings;
#[cfg(test)]
mod tests;

use device_facts::PolicyError;

use crate::alerts::AlertError;

pub use monitor::{Monitor, Subjects, Thresholds};

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
