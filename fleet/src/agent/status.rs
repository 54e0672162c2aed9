//! The agent's status, shared by command line, web page and metrics.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cluster::MovePhase;
use crate::config::Millis;
use crate::model::{Bytes, HostFacts, HostState, Ledger, PriorityClass};
use crate::reservations::Reservation;
use crate::standby::Phase;

/// Everything at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// When it was assembled, ms since the Unix epoch.
    pub unix_ms: u64,
    /// Version of the agent.
    pub version: String,
    /// When the agent started, ms since the Unix epoch.
    pub started_unix_ms: u64,
    /// Whether it decides and reports, but changes nothing.
    pub dry_run: bool,
    /// Whether the last reload succeeded.
    pub reload_ok: bool,
    /// The host.
    pub host: HostStatus,
    /// The VMs by name.
    pub vms: Vec<VmStatus>,
    /// The reservations, oldest first.
    pub reservations: Vec<ReservationStatus>,
    /// The VMs in standby, by name.
    #[serde(default)]
    pub standby: Vec<StandbyStatus>,
    /// The moves of VMs from and to this host.
    #[serde(default)]
    pub moves: Vec<MoveStatus>,
    /// The store that hosts share; absent for a standalone host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreStatus>,
}

/// The store that hosts share, as this host knows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Name of this host in the fleet.
    pub host: String,
    /// Its endpoints.
    pub endpoints: Vec<String>,
    /// Whether it responds.
    pub up: bool,
    /// Whether this host is registered in it.
    pub registered: bool,
    /// The error; absent if there is none.
    pub error: Option<String>,
    /// Time since the last successful round, ms; absent before the first.
    pub age_ms: Option<u64>,
    /// Duration of its last response, µs.
    pub latency_us: u64,
    /// The lease.
    pub lease: Millis,
    /// Number of lines in this host's book.
    pub lines: usize,
    /// Number of remote reservations whose VMs do not run yet.
    pub held: usize,
    /// Memory of these reservations.
    pub held_bytes: Bytes,
    /// Number of leases obtained.
    pub leases: u64,
    /// Number of leases that ended early.
    pub leases_lost: u64,
    /// Number of changes that failed because of a concurrent change.
    pub conflicts: u64,
    /// Calls by operation and result.
    pub calls: BTreeMap<String, u64>,
}

/// The host's state as it is published.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Serialize,
    Deserialize,
    strum::Display,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum PublishedState {
    /// [`HostState::Green`]
    #[default]
    Green,
    /// [`HostState::Yellow`]
    Yellow,
    /// [`HostState::Orange`]
    Orange,
    /// [`HostState::Red`]
    Red,
    /// The host could not be read for too long.
    Unknown,
}

impl PublishedState {
    /// The name in responses and metrics.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl From<HostState> for PublishedState {
    fn from(state: HostState) -> Self {
        match state {
            HostState::Green => Self::Green,
            HostState::Yellow => Self::Yellow,
            HostState::Orange => Self::Orange,
            HostState::Red => Self::Red,
        }
    }
}

/// The host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Name of the machine.
    pub name: String,
    /// Its state.
    pub state: PublishedState,
    /// Time since the state last changed, ms.
    pub state_age_ms: u64,
    /// The latest facts.
    pub facts: HostFacts,
    /// Their age, ms.
    pub facts_age_ms: u64,
    /// The ledger of the last plan.
    pub ledger: Ledger,
    /// The accounts of the pool of huge pages.
    #[serde(default)]
    pub pool: PoolStatus,
    /// Available memory above the reserve, as a fraction of the usable memory.
    pub free: f64,
    /// Memory missing to reach the goal.
    pub shortage: Bytes,
    /// Memory that refused VMs need and that is requested from guests.
    #[serde(default)]
    pub wanted: Bytes,
    /// Memory that growing balloons will still return.
    pub pending: Bytes,
    /// Memory that suffering guests lack.
    pub owed: Bytes,
    /// Ratio of available memory to the burst; absent without callable memory.
    pub burst_coverage: Option<f64>,
    /// Number of last-resort steps taken.
    pub last_resort: u8,
    /// Whether a pressure trigger is armed.
    pub trigger: bool,
    /// Grants that wait for memory.
    pub grants_waiting: usize,
}

/// The host's pool of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// Its size.
    pub total: Bytes,
    /// Neither in use nor reserved by a mapping.
    pub free: Bytes,
    /// Memory that VMs hold.
    pub held: Bytes,
    /// Memory reserved for VMs that have not taken it yet.
    pub promised: Bytes,
}

/// One VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Its name.
    pub vm: String,
    /// Its socket.
    pub socket: String,
    /// Process id of its VMM; absent before the first sample.
    pub pid: Option<i32>,
    /// Changes when the name refers to another machine.
    pub epoch: u64,
    /// Whether the last sample succeeded.
    pub up: bool,
    /// The reason if not, as a short word; absent if it did.
    pub failure: Option<String>,
    /// Level of its interface: 0, 1 or 2.
    pub level: u8,
    /// The reason why it must not be changed, if any.
    pub interlock: Option<String>,
    /// The name of its policy.
    pub policy: String,
    /// Its class.
    pub class: PriorityClass,
    /// Its memory with everything plugged in.
    pub configured: Bytes,
    /// Its guaranteed memory.
    pub min: Bytes,
    /// Its maximum memory.
    pub max: Bytes,
    /// Requested balloon.
    pub target: Bytes,
    /// Balloon as reported by the guest.
    pub actual: Bytes,
    /// Host memory it occupies.
    pub resident: Bytes,
    /// Memory of the pool of huge pages that it holds.
    #[serde(default)]
    pub pool_held: Bytes,
    /// Its memory in the host's swap.
    pub swapped: Bytes,
    /// Memory that it may take without a request (callable).
    pub callable: Bytes,
    /// Available memory as reported by the guest.
    pub guest_available: Option<Bytes>,
    /// Unused memory as reported by the guest.
    pub guest_free: Option<Bytes>,
    /// Counters of the guest: stalls, major faults, processes killed.
    pub guest_stalls: Option<u64>,
    /// See `guest_stalls`.
    pub guest_major_faults: Option<u64>,
    /// See `guest_stalls`.
    pub guest_oom_kills: Option<u64>,
    /// Bytes reported free since its boot.
    pub reported: Option<Bytes>,
    /// Bytes returned to the host since its boot.
    pub discarded: Option<Bytes>,
    /// Bytes deliberately not discarded since its boot.
    pub skipped: Option<Bytes>,
    /// Bytes populated again since its boot.
    pub repopulated: Option<Bytes>,
    /// Discarded minus repopulated, bytes per second over the last samples.
    pub net_per_s: i64,
    /// Repopulated, bytes per second over the last samples.
    pub repopulated_per_s: u64,
    /// 99th percentile of the completion time of reports, µs.
    pub report_p99_us: Option<u64>,
    /// Whether free page reporting is active.
    pub reporting: bool,
    /// Age of the last good sample, ms.
    pub sample_age_ms: Option<u64>,
    /// Number of failed samples since then.
    pub missed: u32,
    /// Whether its balloon is stuck.
    pub stuck: bool,
    /// Whether its claims are believed.
    pub trusted: bool,
    /// Whether it suffered at the last plan.
    pub suffering: bool,
    /// Time for which nothing is taken from it, ms.
    pub take_blocked_ms: u64,
    /// Name of the reason of the last decision.
    pub reason: String,
    /// The last decision as text.
    pub explanation: String,
}

/// One reservation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReservationStatus {
    /// The reservation.
    #[serde(flatten)]
    pub reservation: Reservation,
    /// The memory that it still reserves.
    pub outstanding: Bytes,
}

/// The move of a VM to another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveStatus {
    /// The VM.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to; empty if there is none.
    pub to: String,
    /// How far it is.
    pub phase: MovePhase,
    /// Bytes sent so far.
    pub sent: Bytes,
    /// The reason of the phase; empty if there is none.
    pub why: String,
}

/// One VM in standby, or on its way there or back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StandbyStatus {
    /// The VM.
    pub vm: String,
    /// Its phase; absent if its record cannot be read.
    pub phase: Option<Phase>,
    /// The reason why it can only be discarded; absent if there is none.
    pub fault: Option<String>,
    /// When the phase began, ms since the Unix epoch.
    pub since_unix_ms: u64,
    /// Its memory when it runs.
    pub memory: Bytes,
    /// Disk space of its snapshot.
    pub disk: Bytes,
    /// Its folder.
    pub folder: String,
    /// The API socket that it had.
    pub socket: String,
}
