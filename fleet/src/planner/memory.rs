//! The planner's state between two plans.

use serde::{Deserialize, Serialize};

use crate::model::{BurstHistogram, Bytes, HostState, Lessons, VmId, VmSample};

/// The state of a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlannerMemory {
    /// The host's state.
    pub state: HostState,
    /// When it began, ms on the planner's clock.
    pub state_since_ms: u64,
    /// When the last step of the last resorts was taken, ms.
    pub last_resort_at_ms: u64,
    /// Number of steps taken.
    pub last_resort: u8,
    /// History of the host's memory pressure.
    pub pressure: PressureMemory,
    /// When the current window of the burst measurement began, ms.
    pub window_from_ms: u64,
    /// Growth by window.
    pub burst: BurstHistogram,
    /// By name, ascending.
    pub vms: Vec<(VmId, VmMemory)>,
}

impl PlannerMemory {
    /// The state of a VM.
    pub fn vm(&self, id: &str) -> Option<&VmMemory> {
        self.vms
            .binary_search_by(|(known, _)| known.as_str().cmp(id))
            .ok()
            .map(|index| &self.vms[index].1)
    }
}

/// Memory pressure over time, so that neither hysteresis nor foreign pressure holds a state forever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PressureMemory {
    /// When pressure last was above the value that begins yellow, orange and red, ms.
    pub above_at_ms: [Option<u64>; 3],
    /// Since when pressure alone has demanded a state while no VM showed a sign of it, ms.
    pub foreign_since_ms: Option<u64>,
}

/// The state of a VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmMemory {
    /// The machine to which it applies.
    pub epoch: u64,
    /// Good samples since the machine was first seen.
    pub samples: u32,
    /// The last sample, with which the next one is compared.
    pub last: VmSample,
    /// The last requested size of the balloon; `asked_at_ms` is the time of the request.
    pub target: Bytes,
    /// See `target`, ms.
    pub asked_at_ms: u64,
    /// The balloon at the time of the request.
    pub asked_from: Bytes,
    /// Host memory that the request was expected to return.
    pub asked_gain: Bytes,
    /// The target before that request.
    pub asked_before: Bytes,
    /// Number of consecutive requests to grow that did not change the target.
    pub refused: u32,
    /// Number of consecutive samples with stalls.
    pub stalled: u32,
    /// Number of consecutive samples with many refaults from swap or files.
    pub refaulting: u32,
    /// Whether it stopped responding because of its balloon and has not responded since.
    pub silenced: bool,
    /// Whether it was suffering at the last sample.
    pub suffering: bool,
    /// Whether memory was repopulated faster than it should be.
    pub harmed: bool,
    /// Number of consecutive samples with more resident memory than the guest claims to have.
    pub lies: u32,
    /// Whether its claims are believed.
    pub distrusted: bool,
    /// Number of consecutive samples without a contradiction since then.
    pub honest: u32,
    /// Whether the balloon is stuck.
    pub stuck: bool,
    /// Number of consecutive times it was found stuck.
    pub stuck_times: u32,
    /// When it is tried again, ms.
    pub stuck_until_ms: u64,
    /// When the current attempt to move it began, ms. `moving_from` is the balloon at that time.
    pub moving_since_ms: Option<u64>,
    /// See `moving_since_ms`.
    pub moving_from: Bytes,
    /// Growth rate of its balloon during requests, bytes per second, as a pessimistic mean. 0 before it first grew.
    pub rate_per_s: f64,
    /// Nothing is taken until then, ms.
    pub take_blocked_until_ms: u64,
    /// Nothing is given until then unless it suffers, ms.
    pub give_blocked_until_ms: u64,
    /// When memory was last taken, ms; 0 if never.
    pub taken_at_ms: u64,
    /// Number of times it suffered soon after memory was taken.
    pub reversals: u32,
    /// Memory it proved to need: it suffered with less.
    pub learned_min: Bytes,
    /// When that is forgotten, ms.
    pub learned_until_ms: u64,
    /// Memory that its programs used when it responded again after a silence that set `learned_min`. If they use less
    /// later, the minimum decreases by the difference. Absent if suffering set `learned_min`.
    pub learned_used: Option<Bytes>,
    /// Times of changes of direction of the balloon in the last hour, ms, newest last.
    pub turns_ms: Vec<u64>,
    /// The last direction of the balloon: true if it grew.
    pub grew: Option<bool>,
    /// Scale of its steps; 1 is a full step.
    pub step_scale: f64,
    /// Memory given to it and not used yet.
    pub granted: Bytes,
    /// When it was last given memory, ms.
    pub granted_at_ms: u64,
    /// Resident memory when the window of the burst measurement began; absent before its first whole window.
    pub window_resident: Option<Bytes>,
    /// Change of its resident memory, bytes per minute, smoothed: a measure of its activity.
    pub activity_per_min: f64,
    /// The last requested reporting policy.
    pub reporting: Option<Reporting>,
    /// The limit that enforces its claimed balloon, if any.
    pub enforced: Option<Bytes>,
    /// The last resorts in use on it.
    pub squeezed: Squeezed,
}

impl VmMemory {
    /// The lessons for the next agent.
    pub fn lessons(&self) -> Lessons {
        Lessons {
            turns_ms: self.turns_ms.clone(),
            grew: self.grew,
            taken_at_ms: self.taken_at_ms,
            take_blocked_until_ms: self.take_blocked_until_ms,
            reversals: self.reversals,
            learned_min: self.learned_min,
            learned_until_ms: self.learned_until_ms,
            guest_reported: self.last.guest.is_some(),
        }
    }

    /// Records a move of the balloon in this direction.
    pub(super) fn turn(&mut self, grows: bool, now_ms: u64) {
        if self.grew.is_some_and(|grew| grew != grows) {
            self.turns_ms.push(now_ms);
        }
        self.grew = Some(grows);
    }

    pub(super) fn take_over(&mut self, lessons: &Lessons) {
        self.turns_ms.clone_from(&lessons.turns_ms);
        self.grew = lessons.grew;
        self.taken_at_ms = lessons.taken_at_ms;
        self.take_blocked_until_ms = lessons.take_blocked_until_ms;
        self.reversals = lessons.reversals;
        self.learned_min = lessons.learned_min;
        self.learned_until_ms = lessons.learned_until_ms;
    }
}

/// The reporting policies among which the planner chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reporting {
    /// Memory is plentiful.
    Relaxed,
    /// Memory is plentiful, and the guest churns.
    Calm,
    /// Memory is scarce.
    Eager,
}

/// Last resorts in use on one VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Squeezed {
    /// `memory.high` is set.
    pub high: bool,
    /// Swap is allowed.
    pub swap: bool,
    /// It is paused.
    pub paused: bool,
    /// It was killed.
    pub killed: bool,
}
