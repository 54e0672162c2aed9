//! Promises of memory to VMs that are not there yet, or have not grown into what they were promised.
//!
//! ```text
//!            confirm             the VM is seen            settled
//! promised ──────────► starting ───────────────► running ─────────► running, promise used up
//!    │ deadline            │ deadline               │ the VM is gone
//!    └────────► dropped ◄──┴────────────────────────┘            release drops it in any state
//! ```
//!
//! A promise counts in full until its VM is seen, then less what the VM has resident, and nothing any more once the VM had
//! time to grow: from then on the measured burst of all VMs covers it. Every change is on disk before it is answered, so
//! that a restarted agent sells nothing twice.

mod book;
mod file;

#[cfg(test)]
mod tests;

pub use book::{ReservationError, Reservations, SeenVm};
pub use file::FileError;

use serde::{Deserialize, Serialize};

use crate::model::Bytes;

/// One moment on two clocks. Deadlines go by the first; the second is for people, and may jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// ms since the machine started; the same for one agent and the next.
    pub ms: u64,
    /// Wall time, ms since the Unix epoch.
    pub unix_ms: u64,
}

/// How far a reservation is.
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
    /// Made; nobody has said that a VM was started.
    Promised,
    /// The VMM was started and is not seen yet.
    Starting,
    /// The VM is seen.
    Running,
}

impl ReservationPhase {
    /// The name in answers and metrics.
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
    /// Memory that is promised.
    pub promised: Bytes,
    /// How far it is.
    pub phase: ReservationPhase,
    /// Who made it.
    pub owner_uid: u32,
    /// Whether it was asked for through the store, on behalf of a VM that somebody elsewhere placed here.
    #[serde(default)]
    pub remote: bool,
    /// Whether it is of the pool of huge pages.
    #[serde(default)]
    pub huge_pages: bool,
    /// When the present phase began, ms since the Unix epoch.
    pub since_unix_ms: u64,
    /// When it is dropped unless the next phase is reached, ms since the Unix epoch; absent while running.
    pub deadline_unix_ms: Option<u64>,
}
