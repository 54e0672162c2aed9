//! Requests of clients and their responses.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::Bytes;
use crate::reservations::Reservation;

/// `PUT fleet.reserve`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReserveRequest {
    /// The VM's name, as discovery will see it; or its socket, from which the agent derives the name.
    pub vm: String,
    /// Memory of the VM.
    pub memory: Bytes,
    /// Memory that must be reserved; by default that of the VM's policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<Bytes>,
    /// Whether it is backed by huge pages: all of it is reserved from the host's pool.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub huge_pages: bool,
    /// Only report whether it would fit.
    #[serde(default)]
    pub dry_run: bool,
}

/// `PUT fleet.confirm`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfirmRequest {
    /// Id of the reservation or name of its VM.
    pub reservation: String,
}

/// `PUT fleet.release`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    /// Id of the reservation or name of its VM.
    pub reservation: String,
}

/// `PUT fleet.pin`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// The VM.
    pub vm: String,
    /// Whether it is excluded from management.
    pub pinned: bool,
}

/// `PUT fleet.standby`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StandbyRequest {
    /// The VM.
    pub vm: String,
}

/// `PUT fleet.wake`. The client holds the lock of the VM's folder, and starts the VMM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WakeRequest {
    /// The VM.
    pub vm: String,
    /// Memory that must be reserved; by default that of the VM's policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<Bytes>,
    /// Wake the VM even if it may have run, or an image was changed, since it was saved.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
}

/// Response to `PUT fleet.wake`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WakeAnswer {
    /// The reservation.
    pub reservation: Reservation,
    /// The folder of the snapshot.
    pub snapshot: PathBuf,
    /// The API socket that the VM had.
    pub socket: PathBuf,
    /// The user that its VMM ran as.
    pub uid: u32,
    /// `agent.wake_command`
    pub command: Vec<String>,
}

/// `PUT fleet.woken`: the VMM has loaded the snapshot and is paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WokenRequest {
    /// The VM.
    pub vm: String,
    /// The VMM, which has the lock open.
    pub pid: i32,
    /// The client gives up instead. If the agent agrees, the VM will not run, and the client may kill the VMM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failed: bool,
}

/// `PUT fleet.discard`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscardRequest {
    /// The VM in standby.
    pub vm: String,
}

/// Response to `PUT fleet.reserve`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReserveAnswer {
    /// The reservation; absent for a dry run.
    pub reservation: Option<Reservation>,
    /// Memory that can still be reserved afterwards.
    pub firm_free_after: Bytes,
}
