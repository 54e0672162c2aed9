//! Data types of a plan.

use std::fmt;

use api::ReportingPolicy;
use serde::{Deserialize, Serialize};

use super::PlannerMemory;
use crate::admission::HostHeadroom;
use crate::model::{Bytes, Fraction, HostState, Interlock, Ledger, PriorityClass, VmId};

/// Targets that differ by less count as equal, because VMMs round them to pages.
pub(super) const TARGET_GRAIN: Bytes = Bytes::mib(1);

/// The next actions on one host, with reasons.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Plan {
    /// When it was made, ms on the planner's clock.
    pub at_ms: u64,
    /// The assessment of the host.
    pub host: HostExplanation,
    /// The ledger on which it is based.
    pub ledger: Ledger,
    /// The actions, in order: all actions that free memory precede all that grant it.
    pub actions: Vec<Action>,
    /// One explanation per VM, by name, including VMs without actions.
    pub explanations: Vec<Explanation>,
    /// The state for the next plan.
    #[serde(skip)]
    pub memory: PlannerMemory,
}

/// The order of execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Frees memory, or does not affect it.
    Free,
    /// Grants memory that was free when the plan was made.
    Grant,
}

/// One action on one VM.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Action {
    /// The VM.
    pub vm: VmId,
    /// The phase.
    pub phase: Phase,
    /// The kind.
    pub kind: ActionKind,
    /// The reason.
    pub reason: Reason,
    /// Conditions for its execution.
    pub requires: Precondition,
}

/// The kinds of actions. All values are absolute, so actions are idempotent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, strum::IntoStaticStr)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case", const_into_str)]
pub enum ActionKind {
    /// Request a balloon of this size.
    Balloon {
        /// The previously requested size.
        from: Bytes,
        /// The size to request.
        to: Bytes,
    },
    /// Set the guest's reporting policy.
    Reporting {
        /// The policy.
        policy: ReportingPolicy,
    },
    /// Limit the VM's control group (`memory.max`); if absent, remove the limit.
    MemoryMax {
        /// The limit.
        limit: Option<Bytes>,
    },
    /// Throttle the VM's control group above this amount of memory (`memory.high`).
    MemoryHigh {
        /// The limit.
        limit: Option<Bytes>,
    },
    /// Limit the swap of the VM's control group (`memory.swap.max`).
    SwapMax {
        /// The limit.
        limit: Bytes,
    },
    /// Pause the VM.
    Pause,
    /// Resume the VM that was paused by [`ActionKind::Pause`].
    Resume,
    /// Kill the VM.
    Kill,
}

impl ActionKind {
    /// The name in metrics and logs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Balloon { from, to } if to.0 >= from.0 => "inflate",
            Self::Balloon { .. } => "deflate",
            _ => self.into_str(),
        }
    }
}

/// The preconditions of an action. If one is not met, the action is dropped, and the next plan decides with newer data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Precondition {
    /// The VM is still the same machine.
    pub epoch: u64,
    /// The plan is not older than this, ms on the planner's clock.
    pub valid_until_ms: u64,
    /// For a grant: memory available on the host, the reserve included.
    pub host_available_min: Bytes,
    /// For a balloon: the requested size is still this, or already the new one.
    pub balloon_target: Option<Bytes>,
}

/// The current state, as seen by the executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// The VM's epoch.
    pub epoch: u64,
    /// The planner's clock, ms.
    pub now_ms: u64,
    /// Memory available on the host.
    pub host_available: Bytes,
    /// The last requested size of the balloon.
    pub balloon_target: Bytes,
}

/// Reasons why an action is no longer executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Block {
    /// The name refers to another machine.
    #[error("the VM was replaced since the plan was made")]
    Replaced,
    /// The plan has expired.
    #[error("the plan is too old")]
    TooOld,
    /// The memory to grant is no longer available.
    #[error("{needed} is needed, but the host has only {available} available")]
    HostShort {
        /// The available memory.
        available: Bytes,
        /// The required memory.
        needed: Bytes,
    },
    /// Another client moved the balloon.
    #[error("the balloon's target is {found}, but the plan was made for {expected}")]
    Moved {
        /// The current target.
        found: Bytes,
        /// The expected target.
        expected: Bytes,
    },
    /// The action has already been executed.
    #[error("no action remains")]
    Done,
}

impl Plan {
    /// The host's data for admission and placement.
    pub fn headroom(&self) -> HostHeadroom {
        HostHeadroom {
            ledger: self.ledger,
            state: self.host.state,
            freeable: self.host.freeable,
            freeable_soon: self.host.freeable_soon,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_off = |limit: Option<Bytes>| {
            limit.map_or_else(|| "off".to_owned(), |limit| limit.to_string())
        };
        match &self.kind {
            ActionKind::Balloon { from, to } => write!(f, "balloon {from} → {to}")?,
            ActionKind::Reporting { policy } => write!(f, "reporting policy {policy}")?,
            ActionKind::MemoryMax { limit } => write!(f, "memory.max {}", or_off(*limit))?,
            ActionKind::MemoryHigh { limit } => write!(f, "memory.high {}", or_off(*limit))?,
            ActionKind::SwapMax { limit } => write!(f, "memory.swap.max {limit}")?,
            ActionKind::Pause | ActionKind::Resume | ActionKind::Kill => {
                f.write_str(self.kind.name())?;
            }
        }
        write!(f, " ({})", self.reason.name())
    }
}

impl Action {
    /// Checks whether the action may still be executed.
    ///
    /// # Errors
    /// The obstacle; [`Block::Done`] if the action has already been executed.
    pub fn check(&self, present: &Present) -> Result<(), Block> {
        let requires = &self.requires;
        if present.epoch != requires.epoch {
            return Err(Block::Replaced);
        }
        if present.now_ms > requires.valid_until_ms {
            return Err(Block::TooOld);
        }
        if let ActionKind::Balloon { to, .. } = self.kind {
            if present.balloon_target.distance(to) < TARGET_GRAIN {
                return Err(Block::Done);
            }
            match requires.balloon_target {
                Some(expected) if expected.distance(present.balloon_target) >= TARGET_GRAIN => {
                    return Err(Block::Moved {
                        found: present.balloon_target,
                        expected,
                    });
                }
                _ => {}
            }
        }
        if self.phase == Phase::Grant && present.host_available < requires.host_available_min {
            return Err(Block::HostShort {
                available: present.host_available,
                needed: requires.host_available_min,
            });
        }
        Ok(())
    }
}

/// The closed list of reasons, for explanations and as a label of metrics.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum Reason {
    /// The host has enough memory.
    #[default]
    NoNeed,
    /// Not enough good samples yet.
    Fresh,
    /// The last sample is too old.
    Stale,
    /// No response after memory was taken, which may have stalled the guest.
    StallSuspected,
    /// Migration, snapshot or a similar operation.
    Interlock,
    /// No balloon, or one that must not be changed.
    Unmanaged,
    /// Nothing that its guest gives back reaches the host: an assigned device has its memory pinned, or it is copied.
    Inhibited,
    /// Memory is never taken from this class.
    Critical,
    /// The host is short of memory.
    Shortage,
    /// A VM that was refused needs memory that this one does not.
    Newcomer,
    /// The burst is not covered by available memory.
    BurstCover,
    /// The guest has nothing left that could be taken without harm.
    NothingToTake,
    /// Other VMs had enough to give.
    OthersGave,
    /// The difference is too small.
    DeadBand,
    /// Its balloon recently moved in the other direction.
    Blocked,
    /// The balloon does not move.
    Stuck,
    /// The guest claims a balloon that did not return memory to the host.
    Lying,
    /// Memory is repopulated faster than it should be: taking does harm.
    Harm,
    /// The guest stalls, swaps, kills or is about to.
    Suffering,
    /// The guest is short of memory but not suffering.
    Need,
    /// The guest has its maximum.
    AtMaximum,
    /// The memory that it needs is not free yet.
    NoBudget,
    /// Memory is plentiful.
    Relax,
    /// It had less than its minimum.
    BelowMinimum,
    /// It had more than its maximum.
    AboveMaximum,
    /// The guest's reporting policy follows the host's state.
    ReportingLever,
    /// The host stayed red although all balloon memory was requested.
    LastResort,
    /// The emergency is over.
    Recovered,
}

impl Reason {
    /// The name in metrics and logs.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// A decision about a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Nothing.
    #[default]
    Keep,
    /// This amount is taken.
    Take(Bytes),
    /// This amount is given.
    Give(Bytes),
}

/// Explains the decision on a VM, with all figures used.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// The VM.
    pub vm: VmId,
    /// The decision.
    pub decision: Decision,
    /// The decisive rule.
    pub reason: Reason,
    /// The balloon's target before.
    pub target_before: Bytes,
    /// The balloon's target after.
    pub target_after: Bytes,
    /// Minimum and maximum of its target.
    pub target_range: (Bytes, Bytes),
    /// The balloon as claimed by the guest.
    pub ballooned: Bytes,
    /// Host memory it occupies.
    pub resident: Bytes,
    /// Memory that it may take without a request (callable).
    pub callable: Bytes,
    /// Available memory as claimed by the guest, minus memory that is being taken; absent without claims.
    pub guest_available: Option<Bytes>,
    /// Available memory that it keeps.
    pub guest_keeps: Bytes,
    /// Its class.
    pub class: PriorityClass,
    /// Age of the sample, ms; absent without one.
    pub sample_age_ms: Option<u64>,
    /// Whether the balloon is stuck.
    pub stuck: bool,
    /// Whether its claims are believed.
    pub trusted: bool,
    /// The reason why it must not be changed, if any.
    pub interlock: Option<Interlock>,
    /// Time for which nothing is taken from it, ms.
    pub take_blocked_ms: u64,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.vm)?;
        match self.decision {
            Decision::Keep => write!(f, "balloon stays at {}", self.target_before)?,
            Decision::Take(by) => write!(f, "balloon grows by {by} to {}", self.target_after)?,
            Decision::Give(by) => write!(f, "balloon shrinks by {by} to {}", self.target_after)?,
        }
        write!(f, " ({})", self.reason.name())?;
        write!(
            f,
            "; {} resident, {} callable",
            self.resident, self.callable
        )?;
        if let Some(available) = self.guest_available {
            write!(
                f,
                ", {available} available inside, keeps {}",
                self.guest_keeps
            )?;
        }
        Ok(())
    }
}

/// The assessment of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct HostExplanation {
    /// The state before.
    pub state_before: HostState,
    /// The state now.
    pub state: HostState,
    /// Available memory above the reserve, as a fraction of the usable memory.
    pub free: Fraction,
    /// The goal for available memory above the reserve.
    pub goal: Bytes,
    /// Whether the host's memory pressure is believed to come from something other than its VMs.
    pub pressure_elsewhere: bool,
    /// Memory missing to reach the goal, after pending memory has arrived.
    pub shortage: Bytes,
    /// Memory that growing balloons will still return.
    pub pending: Bytes,
    /// Memory taken by this plan.
    pub taken: Bytes,
    /// Memory given by this plan.
    pub granted: Bytes,
    /// Memory that suffering guests lack and did not get.
    pub owed: Bytes,
    /// Needs of recently refused VMs, as far as guests can return the memory.
    pub wanted: Bytes,
    /// Memory that balloons could return without harm; includes caches if the host is orange or red.
    pub freeable: Bytes,
    /// The part of it that would return within the reaction time, at the measured speed.
    pub freeable_soon: Bytes,
    /// Ratio of available memory to the burst.
    pub burst_coverage: f64,
    /// Number of last-resort steps taken.
    pub last_resort: u8,
}
