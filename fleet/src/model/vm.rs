//! A sample of one VM, with its age.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Bytes, HostFacts, Lessons, VmPolicy};

/// The stable name of a VM on its host. Cloning it is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub struct VmId(Arc<str>);

impl VmId {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for VmId {
    fn from(name: String) -> Self {
        Self(name.into())
    }
}

impl From<&str> for VmId {
    fn from(name: &str) -> Self {
        Self(name.into())
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.0.as_ref().to_owned()
    }
}

impl Borrow<str> for VmId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// Features of a VM's interface. VMs with lower levels are managed less precisely, but never rejected.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum FeatureLevel {
    /// `vm.info`, and the host's view of the process; no data from the guest.
    #[default]
    L0,
    /// Additionally `vm.balloon-stats`: the guest's own statistics.
    L1,
    /// Additionally `vm.reclaim-stats` and `vm.reclaim-thresholds`: the memory that really returned, and control of
    /// reporting.
    L2,
}

/// Reasons why a VM must not be changed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, strum::Display)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum Interlock {
    /// It is being moved to another host.
    Migration,
    /// Its memory is being written to a file.
    Snapshot,
    /// It is paused: its driver cannot respond.
    Paused,
    /// It is starting or stopping.
    Transition,
    /// The operator pinned it.
    Pinned,
}

impl Interlock {
    /// Whether another manager controls the VM; then the manager's own acts on it stay in force, too. A pause does not
    /// count, because it may be the manager's own.
    pub(crate) fn in_other_hands(self) -> bool {
        self != Self::Paused
    }
}

/// The agent's acts on a VM, other than its balloon, that are in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InForce {
    /// `memory.high` is set.
    pub high: bool,
    /// Swap is allowed.
    pub swap: bool,
    /// It is paused.
    pub paused: bool,
    /// `memory.max` is set to this.
    pub max: Option<Bytes>,
}

/// One VM as the planner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmFacts {
    /// Its name.
    pub id: VmId,
    /// Changes when the name refers to another machine (restart, restore), whose counters start from zero.
    pub epoch: u64,
    /// The level of its interface.
    pub level: FeatureLevel,
    /// Its memory with everything plugged in.
    pub configured: Bytes,
    /// Whether it has a balloon device.
    pub has_balloon: bool,
    /// Its limits and weight.
    pub policy: VmPolicy,
    /// The reason why it must not be changed, if any.
    pub interlock: Option<Interlock>,
    /// Acts that the agent has to undo; none while they are being undone.
    pub in_force: InForce,
    /// Lessons of earlier agents about it.
    pub lessons: Lessons,
    /// The last good sample; absent before the first.
    pub sample: Option<VmSample>,
    /// Number of failed samples since the last good one.
    pub missed_samples: u32,
}

/// The result of one round of queries to a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmSample {
    /// When it was taken, ms on the planner's clock.
    pub at_ms: u64,
    /// The last requested size of the balloon.
    pub balloon_target: Bytes,
    /// The balloon's size as claimed by the guest.
    pub ballooned: Bytes,
    /// Host memory the VM occupies: measured by the host, not a claim.
    pub resident: Bytes,
    /// Its memory in the host's swap.
    pub swapped: Bytes,
    /// Memory beyond that of the VM that the guest can take without asking: of memory hot-plug.
    #[serde(default)]
    pub obtainable: Bytes,
    /// The guest's claims; absent below [`FeatureLevel::L1`] and if the guest sends none.
    pub guest: Option<GuestClaims>,
    /// The memory that returned to the host; absent below [`FeatureLevel::L2`].
    pub reclaim: Option<ReclaimFigures>,
}

/// A guest's claims about itself. Counters count since its boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestClaims {
    /// When the guest sent them, ms on the planner's clock.
    pub at_ms: u64,
    /// Unused memory.
    pub free: Bytes,
    /// Memory that could be used without swapping: free memory and droppable caches.
    pub available: Bytes,
    /// Allocations that waited for reclaim; absent in guests before Linux 6.12.
    pub alloc_stalls: Option<u64>,
    /// Page faults that needed I/O.
    pub major_faults: Option<u64>,
    /// Memory read back from the guest's swap.
    pub swap_in: Option<Bytes>,
    /// Processes that the guest killed because it was out of memory.
    pub oom_kills: Option<u64>,
}

/// Reclaim as the VMM measured it. Counters count since the VM's boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimFigures {
    /// Whether free page reporting is active.
    pub reporting_active: bool,
    /// Whether the host gets nothing that the guest gives back, because a device has guest memory pinned or it is copied.
    #[serde(default)]
    pub inhibited: bool,
    /// Whether the guest follows a reporting policy.
    pub policy_in_effect: bool,
    /// Bytes reported as free.
    pub reported: Bytes,
    /// Bytes returned to the host, over all paths.
    pub discarded: Bytes,
    /// Bytes populated again after they were returned.
    pub repopulated: Bytes,
    /// Bytes deliberately not discarded.
    pub skipped: Bytes,
    /// 99th percentile of the time from a report to its completion, µs.
    pub report_p99_us: u64,
}

/// The input of a plan. The order of the VMs has no influence on the plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// The planner's clock, ms. Only differences matter.
    pub now_ms: u64,
    /// The host.
    pub host: HostFacts,
    /// Its VMs, each name once.
    pub vms: Vec<VmFacts>,
    /// Memory reserved for VMs that do not run yet.
    pub promised: Bytes,
    /// The needs of VMs that were recently refused for lack of memory and may try again.
    #[serde(default)]
    pub wanted: Vec<Bytes>,
}

impl VmFacts {
    /// All that the host may have to provide without notice.
    pub fn liability(&self) -> Bytes {
        let obtainable = self.sample.map_or(Bytes::ZERO, |sample| sample.obtainable);
        self.callable() + obtainable
    }

    /// Memory of the VM that the guest may take without asking: neither in the balloon nor resident.
    pub fn callable(&self) -> Bytes {
        self.sample.map_or(self.configured, |sample| {
            self.configured
                - sample.ballooned.min(self.configured)
                - sample.resident
                - sample.swapped
        })
    }
}
