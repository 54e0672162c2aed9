//! A sample of one VM, with its age.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Bytes, HostFacts, Lessons, VmPolicy};

/// The stable name of a VM on its host. Cloning it costs nothing.
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

/// How much a VM's interface tells. Lower levels are managed with coarser means, never refused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub enum FeatureLevel {
    /// `vm.info`, and what the host sees of the process: no word from inside the guest.
    #[default]
    L0,
    /// And `vm.balloon-stats`: the guest's own statistics.
    L1,
    /// And `vm.reclaim-stats` with `vm.reclaim-thresholds`: what really came back, and a say in how it is reported.
    L2,
}

/// Why a VM must be left as it is for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, strum::Display)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum Interlock {
    /// It is being moved to another host.
    Migration,
    /// Its memory is being written to a file.
    Snapshot,
    /// It is paused: its driver cannot answer.
    Paused,
    /// It is starting or stopping.
    Transition,
    /// The operator pinned it.
    Pinned,
}

impl Interlock {
    /// Whether somebody else controls the VM: then what the manager did to it stays as it is, too. A pause does not
    /// mean that; it may be the manager's own.
    pub(crate) fn in_other_hands(self) -> bool {
        self != Self::Paused
    }
}

/// What the agent did to a VM beside its balloon and has not undone.
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
    /// Changes when another machine stands behind the same name (restart, restore): counters begin anew.
    pub epoch: u64,
    /// What its interface tells.
    pub level: FeatureLevel,
    /// Its memory with everything plugged in.
    pub configured: Bytes,
    /// Whether it has a balloon device.
    pub has_balloon: bool,
    /// Its limits and weight.
    pub policy: VmPolicy,
    /// Why it must be left alone, if it must.
    pub interlock: Option<Interlock>,
    /// What the agent did to it and has to undo; nothing while an undoing is under way.
    pub in_force: InForce,
    /// What an agent learned about it before.
    pub lessons: Lessons,
    /// The last good sample; absent before the first.
    pub sample: Option<VmSample>,
    /// Samples that failed since the last good one.
    pub missed_samples: u32,
}

/// What one round of questions to a VM brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmSample {
    /// When it was taken, ms on the planner's clock.
    pub at_ms: u64,
    /// The balloon's size that was last asked for.
    pub balloon_target: Bytes,
    /// The balloon's size as the guest claims it.
    pub ballooned: Bytes,
    /// Host memory the VM occupies: measured by the host, no claim.
    pub resident: Bytes,
    /// Its memory in the host's swap.
    pub swapped: Bytes,
    /// What the guest says of itself; absent below [`FeatureLevel::L1`] and when it says nothing.
    pub guest: Option<GuestClaims>,
    /// What came back to the host; absent below [`FeatureLevel::L2`].
    pub reclaim: Option<ReclaimFigures>,
}

/// What a guest claims about itself. Counters count since its boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestClaims {
    /// When the guest said so, ms on the planner's clock.
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
    /// Processes the guest killed for lack of memory.
    pub oom_kills: Option<u64>,
}

/// Reclaim as the VMM measured it. Counters count since the VM's boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimFigures {
    /// Whether free page reporting is at work.
    pub reporting_active: bool,
    /// Whether the guest follows a reporting policy.
    pub policy_in_effect: bool,
    /// Bytes reported as free.
    pub reported: Bytes,
    /// Bytes given back to the host, over all paths.
    pub discarded: Bytes,
    /// Bytes populated again after they were given back.
    pub repopulated: Bytes,
    /// Bytes left alone on purpose.
    pub skipped: Bytes,
    /// Time from a report to its answer that 99 of 100 stayed below, µs.
    pub report_p99_us: u64,
}

/// All that is known when a plan is made. The order of the VMs has no influence on the plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// The planner's clock, ms. Only differences count.
    pub now_ms: u64,
    /// The host.
    pub host: HostFacts,
    /// Its VMs, each name once.
    pub vms: Vec<VmFacts>,
    /// Memory promised to VMs that are not there yet.
    pub promised: Bytes,
    /// What each VM needs that was refused for lack of memory a moment ago, and may ask again.
    #[serde(default)]
    pub wanted: Vec<Bytes>,
}

impl VmFacts {
    /// Memory the guest may take without asking: neither in the balloon nor resident.
    pub fn callable(&self) -> Bytes {
        self.sample.map_or(self.configured, |sample| {
            self.configured
                - sample.ballooned.min(self.configured)
                - sample.resident
                - sample.swapped
        })
    }
}
