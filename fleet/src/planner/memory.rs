//! What the planner keeps from one plan to the next.

use serde::{Deserialize, Serialize};

use crate::model::{BurstHistogram, Bytes, HostState, Lessons, VmId, VmSample};

/// Everything remembered about a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlannerMemory {
    /// The host's state.
    pub state: HostState,
    /// Since when, ms on the planner's clock.
    pub state_since_ms: u64,
    /// When the last resorts last went a step further, ms.
    pub last_resort_at_ms: u64,
    /// How far they have gone.
    pub last_resort: u8,
    /// What is remembered of the host's memory pressure.
    pub pressure: PressureMemory,
    /// When the present window of the burst measurement began, ms.
    pub window_from_ms: u64,
    /// Growth by window.
    pub burst: BurstHistogram,
    /// By name, ascending.
    pub vms: Vec<(VmId, VmMemory)>,
}

impl PlannerMemory {
    /// What is remembered of a VM.
    pub fn vm(&self, id: &str) -> Option<&VmMemory> {
        self.vms
            .binary_search_by(|(known, _)| known.as_str().cmp(id))
            .ok()
            .map(|index| &self.vms[index].1)
    }
}

/// Memory pressure over time, so that neither hysteresis nor pressure from elsewhere holds a state for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PressureMemory {
    /// When pressure last was above the value that begins yellow, orange and red, ms.
    pub above_at_ms: [Option<u64>; 3],
    /// Since when pressure alone has asked for a state while no VM showed a sign of it, ms.
    pub foreign_since_ms: Option<u64>,
}

/// Everything remembered about a VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmMemory {
    /// The machine that it is about.
    pub epoch: u64,
    /// Good samples since the machine was first seen.
    pub samples: u32,
    /// The sample before the last one's successor: what the next one is compared with.
    pub last: VmSample,
    /// The balloon's size that was last asked for, and when.
    pub target: Bytes,
    /// See `target`, ms.
    pub asked_at_ms: u64,
    /// The balloon when it was asked.
    pub asked_from: Bytes,
    /// Host memory that was expected of it.
    pub asked_gain: Bytes,
    /// The target before that request.
    pub asked_before: Bytes,
    /// Requests to grow in a row that left the target as it was.
    pub refused: u32,
    /// Samples in a row with stalls.
    pub stalled: u32,
    /// Samples in a row in which it read back much from its swap or its files.
    pub refaulting: u32,
    /// Whether it fell silent under its balloon and has not answered since.
    pub silenced: bool,
    /// Whether it was suffering at the last sample.
    pub suffering: bool,
    /// Whether memory came back faster than it should.
    pub harmed: bool,
    /// Samples in a row in which more was resident than the guest said it had.
    pub lies: u32,
    /// Whether its claims are believed.
    pub distrusted: bool,
    /// Samples in a row without a lie since then.
    pub honest: u32,
    /// Whether the balloon is stuck.
    pub stuck: bool,
    /// How often it was found stuck in a row.
    pub stuck_times: u32,
    /// When it is tried again, ms.
    pub stuck_until_ms: u64,
    /// When the present attempt to move it began, ms; with the balloon then.
    pub moving_since_ms: Option<u64>,
    /// See `moving_since_ms`.
    pub moving_from: Bytes,
    /// How fast its balloon grew when it had to, bytes a second; a pessimist's mean. 0 before it ever grew.
    pub rate_per_s: f64,
    /// Nothing is taken until then, ms.
    pub take_blocked_until_ms: u64,
    /// Nothing is given until then unless it suffers, ms.
    pub give_blocked_until_ms: u64,
    /// When something was last taken, ms; 0 when never.
    pub taken_at_ms: u64,
    /// How often it suffered soon after something was taken.
    pub reversals: u32,
    /// Memory it proved to need: it suffered with less.
    pub learned_min: Bytes,
    /// When that is forgotten, ms.
    pub learned_until_ms: u64,
    /// What its programs used when it answered again after a silence that taught `learned_min`: with less in use it
    /// needs as much less. Absent when it was suffering that taught.
    pub learned_used: Option<Bytes>,
    /// When the balloon was moved the other way in the last hour, ms, newest last.
    pub turns_ms: Vec<u64>,
    /// Which way the balloon was last moved: whether it grew.
    pub grew: Option<bool>,
    /// How much of a step it is asked for; 1 is all of it.
    pub step_scale: f64,
    /// Given to it and not used yet.
    pub granted: Bytes,
    /// When it was last given something, ms.
    pub granted_at_ms: u64,
    /// Resident memory when the window of the burst measurement began; absent before its first whole window.
    pub window_resident: Option<Bytes>,
    /// Change of its resident memory, bytes a minute, smoothed: how active it is.
    pub activity_per_min: f64,
    /// Which way of reporting it was asked for.
    pub reporting: Option<Reporting>,
    /// Whether it is held to what it gave up.
    pub enforced: Option<Bytes>,
    /// Which last resorts are in use on it.
    pub squeezed: Squeezed,
}

impl VmMemory {
    /// What the agent that follows this one has to know.
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

    /// The balloon was moved this way.
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

/// The ways of reporting between which the planner chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reporting {
    /// Memory is plenty.
    Relaxed,
    /// Memory is plenty and the guest only churns.
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
    /// It was told to die.
    pub killed: bool,
}
