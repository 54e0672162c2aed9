//! The agent's status, shared by command line, web page and metrics.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::config::Millis;
use crate::model::{Bytes, HostFacts, HostState, Ledger, PriorityClass};
use crate::reservations::Reservation;

/// Everything at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// When it was put together, ms since the Unix epoch.
    pub unix_ms: u64,
    /// Version of the agent.
    pub version: String,
    /// When the agent started, ms since the Unix epoch.
    pub started_unix_ms: u64,
    /// Whether it only tells what it would do.
    pub dry_run: bool,
    /// Whether the last reload was taken.
    pub reload_ok: bool,
    /// The host.
    pub host: HostStatus,
    /// The VMs by name.
    pub vms: Vec<VmStatus>,
    /// The reservations, oldest first.
    pub reservations: Vec<ReservationStatus>,
    /// The store that hosts share; absent for a host that is for itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<StoreStatus>,
}

/// The store that hosts share, as this host knows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreStatus {
    /// Name of this host in the fleet.
    pub host: String,
    /// Where it is.
    pub endpoints: Vec<String>,
    /// Whether it answers.
    pub up: bool,
    /// Whether this host is in it.
    pub registered: bool,
    /// What is wrong; absent when nothing is.
    pub error: Option<String>,
    /// Time since it was last in step with this host, ms; absent before the first time.
    pub age_ms: Option<u64>,
    /// How long its last answer took, µs.
    pub latency_us: u64,
    /// The lease.
    pub lease: Millis,
    /// Lines in this host's book.
    pub lines: usize,
    /// Promises held for VMs that were placed here from afar and do not run yet.
    pub held: usize,
    /// Memory of these promises.
    pub held_bytes: Bytes,
    /// Leases that were had.
    pub leases: u64,
    /// Leases that were over before their time.
    pub leases_lost: u64,
    /// Changes that somebody else was quicker than.
    pub conflicts: u64,
    /// Calls by what was asked and what came of it.
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
    /// The name in answers and metrics.
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
    /// For how long, ms.
    pub state_age_ms: u64,
    /// What was read last.
    pub facts: HostFacts,
    /// Age of that, ms.
    pub facts_age_ms: u64,
    /// The books of the last plan.
    pub ledger: Ledger,
    /// The books of the pool of huge pages.
    #[serde(default)]
    pub pool: PoolStatus,
    /// Available memory above the reserve as a part of the usable.
    pub free: f64,
    /// Memory missing to the goal.
    pub shortage: Bytes,
    /// What refused VMs need, as far as guests can give it and are asked for it.
    #[serde(default)]
    pub wanted: Bytes,
    /// What growing balloons will still bring.
    pub pending: Bytes,
    /// What suffering guests lack.
    pub owed: Bytes,
    /// How often available memory covers the burst; absent without liability.
    pub burst_coverage: Option<f64>,
    /// How far the last resorts have gone.
    pub last_resort: u8,
    /// Whether a pressure trigger is armed.
    pub trigger: bool,
    /// Grants that wait for memory.
    pub grants_waiting: usize,
}

/// The host's pool of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// All of it.
    pub total: Bytes,
    /// Neither in use nor reserved by a mapping.
    pub free: Bytes,
    /// Held by VMs.
    pub held: Bytes,
    /// Promised to VMs that have not taken it yet.
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
    /// Changes when another machine stands behind the name.
    pub epoch: u64,
    /// Whether the last sample was good.
    pub up: bool,
    /// Why not: a short word; absent when it was.
    pub failure: Option<String>,
    /// What its interface tells: 0, 1 or 2.
    pub level: u8,
    /// Why it is left alone.
    pub interlock: Option<String>,
    /// The name of its policy.
    pub policy: String,
    /// Its class.
    pub class: PriorityClass,
    /// Its memory with everything plugged in.
    pub configured: Bytes,
    /// Memory it is never driven below.
    pub min: Bytes,
    /// Memory it never gets more of.
    pub max: Bytes,
    /// Balloon asked for.
    pub target: Bytes,
    /// Balloon as the guest claims it.
    pub actual: Bytes,
    /// Host memory it occupies.
    pub resident: Bytes,
    /// What it holds of the pool of huge pages.
    #[serde(default)]
    pub pool_held: Bytes,
    /// Its memory in the host's swap.
    pub swapped: Bytes,
    /// What it may call in without asking.
    pub callable: Bytes,
    /// Memory available inside, as the guest claims it.
    pub guest_available: Option<Bytes>,
    /// Memory unused inside, as the guest claims it.
    pub guest_free: Option<Bytes>,
    /// Counters of the guest: stalls, major faults, processes killed.
    pub guest_stalls: Option<u64>,
    /// See `guest_stalls`.
    pub guest_major_faults: Option<u64>,
    /// See `guest_stalls`.
    pub guest_oom_kills: Option<u64>,
    /// Bytes reported free since its boot.
    pub reported: Option<Bytes>,
    /// Bytes given back to the host since its boot.
    pub discarded: Option<Bytes>,
    /// Bytes left alone on purpose since its boot.
    pub skipped: Option<Bytes>,
    /// Bytes populated again since its boot.
    pub repopulated: Option<Bytes>,
    /// Discarded less repopulated, bytes a second over the last samples.
    pub net_per_s: i64,
    /// Repopulated, bytes a second over the last samples.
    pub repopulated_per_s: u64,
    /// 99 of 100 reports were answered within, µs.
    pub report_p99_us: Option<u64>,
    /// Whether free page reporting is at work.
    pub reporting: bool,
    /// Age of the last good sample, ms.
    pub sample_age_ms: Option<u64>,
    /// Samples that failed since.
    pub missed: u32,
    /// Whether its balloon does not move.
    pub stuck: bool,
    /// Whether its claims are believed.
    pub trusted: bool,
    /// Whether it suffered at the last plan.
    pub suffering: bool,
    /// For how long nothing is taken from it, ms.
    pub take_blocked_ms: u64,
    /// Name of the reason of the last decision.
    pub reason: String,
    /// The last decision in words.
    pub explanation: String,
}

/// One reservation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ReservationStatus {
    /// The reservation.
    #[serde(flatten)]
    pub reservation: Reservation,
    /// What it still counts for.
    pub outstanding: Bytes,
}
