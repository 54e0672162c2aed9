//! The planner's safety rules. All of them are always in force in an agent.
//!
//! Tests and simulations switch single rules off to show what each one prevents. That needs the feature `sim`; without
//! it, the switch is not compiled.

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
    /// Memory is granted only if it is free now. Memory that is being freed is granted when it has arrived.
    TwoPhase,
    /// Memory that was given and not used yet still counts as granted.
    GrantedCounts,
    /// Memory that is being taken and has not arrived counts towards the goal.
    PendingCounts,
    /// A stuck balloon is not changed, and no memory is expected from it.
    Stuck,
    /// Claims are checked against resident memory.
    Trust,
    /// A suffering guest gets its memory back immediately.
    GiveBack,
    /// Nothing changes between two close values.
    DeadBand,
    /// A balloon does not change direction shortly after it was moved.
    Blocking,
    /// Nothing is taken from a VM that does not respond.
    Stale,
    /// Memory that guests may take simultaneously is kept available.
    Burst,
}

impl SafetyRule {
    /// The names of all rules.
    pub const NAMES: &'static [&'static str] = <Self as strum::VariantNames>::VARIANTS;
}

/// The rules in force.
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
