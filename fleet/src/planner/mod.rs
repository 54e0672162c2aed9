//! The planner: facts, configuration and memory in, a plan out. It reads no clock and touches nothing.
//!
//! The plan is so specific that the executor has no choice left: absolute targets, each with what must still be true
//! when it is carried out. Running a plan twice does the same as running it once. What the planner has to remember
//! between two plans is in the plan as well ([`Plan::memory`]), so that a simulator, a test and the agent differ in
//! nothing.

mod memory;
mod plan;

pub use memory::{PlannerMemory, Reporting, Squeezed, VmMemory};
pub use plan::{
    Action, ActionKind, Block, Decision, Explanation, HostExplanation, Phase, Plan, Precondition,
    Present, Reason,
};

use crate::config::Config;
use crate::model::Inventory;

/// Makes the next plan.
pub fn plan(inventory: &Inventory, _config: &Config, memory: &PlannerMemory) -> Plan {
    Plan {
        at_ms: inventory.now_ms,
        memory: memory.clone(),
        ..Plan::default()
    }
}
