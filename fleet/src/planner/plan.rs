//! The parts of a plan.

use std::fmt;

use api::ReportingPolicy;
use serde::{Deserialize, Serialize};

use super::PlannerMemory;
use crate::admission::HostHeadroom;
use crate::model::{Bytes, Fraction, HostState, Interlock, Ledger, PriorityClass, VmId};

/// Targets that differ by less are the same: VMMs round them to their pages.
pub(super) const TARGET_GRAIN: Bytes = Bytes::mib(1);

/// What to do next on one host, and why.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Plan {
    /// When it was made, ms on the planner's clock.
    pub at_ms: u64,
    /// How the host was judged.
    pub host: HostExplanation,
    /// The books it was made from.
    pub ledger: Ledger,
    /// What to do, in this order: everything that frees memory stands before everything that grants it.
    pub actions: Vec<Action>,
    /// One for each VM, by name, whether anything is done with it or not.
    pub explanations: Vec<Explanation>,
    /// What the next plan needs to know of this one.
    #[serde(skip)]
    pub memory: PlannerMemory,
}

/// The order of execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Frees memory, or changes nothing about it.
    Free,
    /// Grants memory that was free when the plan was made.
    Grant,
}

/// One thing to do with one VM.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Action {
    /// With which VM.
    pub vm: VmId,
    /// When.
    pub phase: Phase,
    /// What.
    pub kind: ActionKind,
    /// The reason.
    pub reason: Reason,
    /// What must still be true when it is carried out.
    pub requires: Precondition,
}

/// What can be done. All values are absolute, so doing it twice is doing it once.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionKind {
    /// Ask for a balloon of this size.
    Balloon {
        /// The size asked for so far.
        from: Bytes,
        /// The size to ask for.
        to: Bytes,
    },
    /// Tell the guest how to report free memory.
    Reporting {
        /// In this way.
        policy: ReportingPolicy,
    },
    /// Hold the VM's control group to this much memory (`memory.max`); no limit when absent.
    MemoryMax {
        /// The limit.
        limit: Option<Bytes>,
    },
    /// Squeeze the VM's control group above this much memory (`memory.high`).
    MemoryHigh {
        /// The limit.
        limit: Option<Bytes>,
    },
    /// Let the VM's control group have so much swap (`memory.swap.max`).
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
            Self::Reporting { .. } => "reporting",
            Self::MemoryMax { .. } => "memory-max",
            Self::MemoryHigh { .. } => "memory-high",
            Self::SwapMax { .. } => "swap-max",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Kill => "kill",
        }
    }
}

/// What must be true when an action is carried out. Where it is not, the action is dropped: the next plan knows better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Precondition {
    /// The VM is still the same machine.
    pub epoch: u64,
    /// The plan is not older than this, ms on the planner's clock.
    pub valid_until_ms: u64,
    /// For a grant: memory available on the host, the reserve included.
    pub host_available_min: Bytes,
    /// For a balloon: the size asked for is still this, or already the new one.
    pub balloon_target: Option<Bytes>,
}

/// The world as the executor finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Present {
    /// The VM's epoch.
    pub epoch: u64,
    /// The planner's clock, ms.
    pub now_ms: u64,
    /// Memory available on the host.
    pub host_available: Bytes,
    /// The balloon's size that was last asked for.
    pub balloon_target: Bytes,
}

/// Why an action is not carried out any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Block {
    /// Another machine stands behind the name.
    #[error("the VM was replaced since the plan was made")]
    Replaced,
    /// Too late.
    #[error("the plan is too old")]
    TooOld,
    /// The memory that was to be granted is gone.
    #[error("{needed} are needed, but the host has only {available} available")]
    HostShort {
        /// What is there.
        available: Bytes,
        /// What has to be there.
        needed: Bytes,
    },
    /// Somebody else moved the balloon.
    #[error("the balloon's target is {found}, the plan was made for {expected}")]
    Moved {
        /// What it is.
        found: Bytes,
        /// What it should be.
        expected: Bytes,
    },
    /// It is already so.
    #[error("no action remains")]
    Done,
}

impl Plan {
    /// The host as admission and placement see it.
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
    /// Whether the action may still be carried out.
    ///
    /// # Errors
    /// What stands against it; [`Block::Done`] when it has been carried out before.
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
    /// No answer after memory was taken: the guest may be stalled by it.
    StallSuspected,
    /// Migration, snapshot or the like.
    Interlock,
    /// No balloon, or none that may be moved.
    Unmanaged,
    /// The class never gives.
    Critical,
    /// The host is short of memory.
    Shortage,
    /// A VM that was refused needs memory that this one does not.
    Newcomer,
    /// What guests may call in at once is not covered.
    BurstCover,
    /// The guest has nothing left that could be taken without harm.
    NothingToTake,
    /// Others had enough to give.
    OthersGave,
    /// The difference is too small.
    DeadBand,
    /// It was moved the other way a moment ago.
    Blocked,
    /// The balloon does not move.
    Stuck,
    /// The guest says it gave what the host did not get.
    Lying,
    /// Memory comes back faster than it should: taking does harm.
    Harm,
    /// The guest stalls, swaps, kills or is about to.
    Suffering,
    /// The guest is short of memory but not suffering.
    Need,
    /// The guest has all it may have.
    AtMaximum,
    /// What it needs is not free yet.
    NoBudget,
    /// Memory is plenty.
    Relax,
    /// It had less than its minimum.
    BelowMinimum,
    /// It had more than its maximum.
    AboveMaximum,
    /// The guest's way of reporting follows the host's state.
    ReportingLever,
    /// The host stayed red although the balloons were asked for all they have.
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

/// What is done about a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Nothing.
    #[default]
    Keep,
    /// So much is taken.
    Take(Bytes),
    /// So much is given.
    Give(Bytes),
}

/// Why a VM's memory is what it is, with every figure that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    /// Which VM.
    pub vm: VmId,
    /// What is done.
    pub decision: Decision,
    /// The rule that won.
    pub reason: Reason,
    /// The balloon's target before.
    pub target_before: Bytes,
    /// The balloon's target after.
    pub target_after: Bytes,
    /// The smallest and the largest target it may have.
    pub target_range: (Bytes, Bytes),
    /// The balloon as the guest claims it.
    pub ballooned: Bytes,
    /// Host memory it occupies.
    pub resident: Bytes,
    /// What it may call in without asking.
    pub callable: Bytes,
    /// Available memory as the guest claims it, less what is being taken; absent without claims.
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
    /// Why it is left alone.
    pub interlock: Option<Interlock>,
    /// Nothing is taken from it for so long, ms.
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

/// How the host was judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct HostExplanation {
    /// The state before.
    pub state_before: HostState,
    /// The state now.
    pub state: HostState,
    /// Available memory above the reserve, as a part of the usable memory.
    pub free: Fraction,
    /// Available memory above the reserve that the plan works towards.
    pub goal: Bytes,
    /// Whether the host's memory pressure is believed to come from something other than its VMs.
    pub pressure_elsewhere: bool,
    /// What is missing to it, after what is under way.
    pub shortage: Bytes,
    /// What balloons that are growing will still bring.
    pub pending: Bytes,
    /// What is taken by this plan.
    pub taken: Bytes,
    /// What is given by this plan.
    pub granted: Bytes,
    /// What suffering guests lack and could not be given.
    pub owed: Bytes,
    /// What newcomers need that were refused a moment ago, as far as guests can give it.
    pub wanted: Bytes,
    /// What balloons could bring without harm; from caches too when the host is orange or red.
    pub freeable: Bytes,
    /// And what of it would come within the reaction time, at the speed that was measured.
    pub freeable_soon: Bytes,
    /// How often available memory covers the burst.
    pub burst_coverage: f64,
    /// How far the last resorts have gone; 0 is not at all.
    pub last_resort: u8,
}
