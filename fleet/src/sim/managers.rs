//! The managers that a scenario can name: this planner, those it is compared with, and none.

use crate::config::Config;
use crate::model::{Bytes, HostState, Inventory};
use crate::planner::{self, ActionKind, Plan, PlannerMemory, Present};

use super::baselines::{Mom, Proxmox, Squeezed};
use super::manager::{Manager, Order};
use super::scenario::{ManagerKind, Steps};

pub(super) fn new(kind: ManagerKind, steps: &Steps, config: &Config) -> Box<dyn Manager> {
    match kind {
        ManagerKind::Ours => {
            let mut config = config.clone();
            config.control.plan = steps.plan;
            config.control.sample = steps.sample;
            Box::new(Ours {
                config,
                plan: Plan::default(),
            })
        }
        ManagerKind::Mom => Box::new(Mom::default()),
        ManagerKind::Proxmox => Box::new(Proxmox),
        ManagerKind::Squeezed => Box::new(Squeezed::default()),
        ManagerKind::None => Box::new(Nobody),
    }
}

struct Nobody;

impl Manager for Nobody {
    fn interval_ms(&self) -> u64 {
        u64::MAX
    }

    fn act(&mut self, _: &mut Inventory, _: &mut Vec<Order>) {}
}

/// The planner, with the executor's checks.
struct Ours {
    config: Config,
    plan: Plan,
}

impl Manager for Ours {
    fn interval_ms(&self) -> u64 {
        self.config.control.plan.0
    }

    fn act(&mut self, inventory: &mut Inventory, orders: &mut Vec<Order>) {
        let memory: PlannerMemory = std::mem::take(&mut self.plan.memory);
        self.plan = planner::advance(inventory, &self.config, memory);
        for action in &self.plan.actions {
            let Ok(place) = inventory.vms.binary_search_by(|vm| vm.id.cmp(&action.vm)) else {
                continue;
            };
            let vm = &inventory.vms[place];
            let balloon_target = match action.kind {
                ActionKind::Balloon { from, .. } => from,
                _ => Bytes::ZERO,
            };
            let present = Present {
                epoch: vm.epoch,
                now_ms: inventory.now_ms,
                host_available: inventory.host.available(),
                balloon_target,
            };
            if action.check(&present).is_err() {
                continue;
            }
            orders.push(match action.kind {
                ActionKind::Balloon { to, .. } => Order::Balloon(place, to),
                ActionKind::Reporting { policy } => {
                    Order::Eager(place, policy == self.config.reporting.eager)
                }
                ActionKind::MemoryMax { limit } | ActionKind::MemoryHigh { limit } => {
                    Order::Limit(place, limit)
                }
                ActionKind::SwapMax { .. } => continue,
                ActionKind::Pause => Order::Pause(place),
                ActionKind::Resume => Order::Resume(place),
                ActionKind::Kill => Order::Kill(place),
            });
        }
    }

    fn state(&self) -> HostState {
        self.plan.host.state
    }

    fn plan(&self) -> Option<&Plan> {
        Some(&self.plan)
    }
}
