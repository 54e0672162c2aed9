//! Requests of clients and their responses.

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

/// Response to `PUT fleet.reserve`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReserveAnswer {
    /// The reservation; absent for a dry run.
    pub reservation: Option<Reservation>,
    /// Memory that can still be reserved afterwards.
    pub firm_free_after: Bytes,
}
