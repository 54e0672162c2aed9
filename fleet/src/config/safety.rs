//! The planner's safety rules. All of them are always in force in an agent.
//!
//! Tests and simulations switch single rules off to show what each one prevents. That needs the feature `sim`; without it
//! no switch is compiled in.

use serde::{Deserialize, Serialize};

/// A safety rule. Its name on the command line and in scenarios is the same in kebab case.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    strum::EnumString,
    strum::VariantNames,
)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum SafetyRule {
    /// Grants come only out of memory that is free now; what is being freed is granted when it has arrived.
    TwoPhase,
    /// What was given and not yet used still counts as given.
    GrantedCounts,
    /// What is being taken and has not arrived counts towards the goal.
    PendingCounts,
    /// A balloon that does not move is left alone, and counts for nothing.
    Stuck,
    /// Claims are checked against resident memory.
    Trust,
    /// A suffering guest gets its memory back at once.
    GiveBack,
    /// Nothing changes between two close values.
    DeadBand,
    /// A VM is not moved the other way right after it was moved.
    Blocking,
    /// Nothing is taken from a VM that does not answer.
    Stale,
    /// What guests may call in at once is kept back.
    Burst,
}

/// Which rules are in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Safety {
    /// One bit for each rule that is switched off.
    #[cfg(feature = "sim")]
    off: u32,
}

impl Safety {
    /// Whether a rule is in force.
    #[cfg(feature = "sim")]
    pub const fn has(self, rule: SafetyRule) -> bool {
        self.off & (1 << rule as u32) == 0
    }

    /// Whether a rule is in force: without simulation, each one is.
    #[cfg(not(feature = "sim"))]
    pub const fn has(self, _: SafetyRule) -> bool {
        true
    }

    /// Switches a rule off.
    #[cfg(feature = "sim")]
    pub const fn switch_off(&mut self, rule: SafetyRule) {
        self.off |= 1 << rule as u32;
    }
}
