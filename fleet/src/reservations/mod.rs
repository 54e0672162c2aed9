//! Reservations of memory for VMs that do not run yet or have not used all of it yet.
//!
//! ```text
//!            confirm             the VM is seen            settled
//! promised ──────────► starting ───────────────► running ─────────► running, promise used up
//!    │ deadline            │ deadline               │ the VM is gone
//!    └────────► dropped ◄──┴────────────────────────┘            release drops it in any state
//! ```
//!
//! A reservation counts in full until its VM is seen, and then minus the VM's resident memory. Once the VM has had time
//! to grow, the reservation no longer counts, because the measured burst of all VMs covers it. Every change is on disk
//! before the response, so that a restarted agent reserves nothing twice.

mod book;
mod file;

#[cfg(test)]
mod tests;

pub use book::{ReservationError, Reservations, SeenVm};
pub use file::FileError;

use serde::{Deserialize, Serialize};

use crate::model::Bytes;

/// One moment on two clocks. Deadlines use the first; the second is for display, and may jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// ms since the machine started; valid across restarts of the agent.
    pub ms: u64,
    /// Wall time, ms since the Unix epoch.
    pub unix_ms: u64,
}

/// Phase of a reservation.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum ReservationPhase {
    /// Made; the start of the VM has not been confirmed.
    Promised,
    /// The VMM was started and has not been seen yet.
    Starting,
    /// The VM has been seen.
    Running,
}

impl ReservationPhase {
    /// The name in responses and metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// One reservation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Its id.
    pub id: String,
    /// The VM's name, as discovery will see it.
    pub vm: String,
    /// Memory of the VM.
    pub configured: Bytes,
    /// Memory that is reserved.
    pub promised: Bytes,
    /// Its phase.
    pub phase: ReservationPhase,
    /// The user who made it.
    pub owner_uid: u32,
    /// Whether it was requested through the store, for a VM placed here by a remote client.
    #[serde(default)]
    pub remote: bool,
    /// Whether it is from the pool of huge pages.
    #[serde(default)]
    pub huge_pages: bool,
    /// When the current phase began, ms since the Unix epoch.
    pub since_unix_ms: u64,
    /// When it is dropped unless the next phase is reached, ms since the Unix epoch; absent while running.
    pub deadline_unix_ms: Option<u64>,
}
