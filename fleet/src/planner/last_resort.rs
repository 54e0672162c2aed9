//! The last resorts: measures without the guests' cooperation if a host stays red. Each must be allowed in the
//! settings.
//!
//! One step is taken at a time, and only after the host has been red for `after` since the last one. Each step applies
//! to the lowest classes only. When the host is green or yellow again, all steps are undone, except that killed VMs
//! stay dead.

use crate::config::{Config, LastResortConfig};
use crate::model::{Bytes, HostState, Inventory, PriorityClass};

use super::view::View;
use super::{ActionKind, PlannerMemory, Reason, Squeezed};

/// Fraction of its resident memory that a throttled VM keeps.
const HIGH_PART: f64 = 0.9;

/// The steps, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    MemoryHigh,
    Swap,
    Pause,
    Kill,
}

fn allowed(resort: &LastResortConfig) -> Vec<Step> {
    [
        (resort.memory_high, Step::MemoryHigh),
        (resort.swap, Step::Swap),
        (resort.pause, Step::Pause),
        (resort.kill, Step::Kill),
    ]
    .into_iter()
    .filter_map(|(allowed, step)| allowed.then_some(step))
    .collect()
}

/// The actions, by the index of the VM. `helpless`: the balloons cannot return the missing memory.
pub(super) fn last_resort(
    views: &mut [View<'_>],
    memory: &mut PlannerMemory,
    helpless: bool,
    inventory: &Inventory,
    config: &Config,
) -> Vec<(usize, ActionKind, Reason)> {
    let now_ms = inventory.now_ms;
    if memory.state <= HostState::Yellow {
        memory.last_resort = 0;
        return recover(views);
    }
    let steps = allowed(&config.last_resort);
    let due = now_ms
        >= memory
            .last_resort_at_ms
            .max(memory.state_since_ms)
            .saturating_add(config.last_resort.after.0);
    // A step based on figures from before the previous step might be unnecessary.
    let host_ms = inventory.host.at_ms;
    let seen = host_ms >= memory.last_resort_at_ms
        && now_ms.saturating_sub(host_ms) <= config.admission.facts_age_max.0;
    if memory.state < HostState::Red || !helpless || !due || !seen || steps.is_empty() {
        return Vec::new();
    }
    memory.last_resort_at_ms = now_ms;
    // The last step may be repeated: one VM is killed at a time, and the host is read in between.
    let step = steps[usize::from(memory.last_resort).min(steps.len() - 1)];
    memory.last_resort = memory.last_resort.saturating_add(1).min(steps.len() as u8);
    apply(step, views, &config.last_resort)
}

fn apply(
    step: Step,
    views: &mut [View<'_>],
    resort: &LastResortConfig,
) -> Vec<(usize, ActionKind, Reason)> {
    let lowest = views
        .iter()
        .filter(|view| !view.memory.squeezed.killed)
        .map(|view| view.facts.policy.class)
        .min()
        .unwrap_or_default();
    let class = match step {
        // Throttling applies to the lowest class present, but never to critical VMs.
        Step::MemoryHigh | Step::Swap => lowest.min(PriorityClass::High),
        Step::Pause | Step::Kill => PriorityClass::Batch,
    };
    let throttles = matches!(step, Step::MemoryHigh | Step::Swap);
    let mut chosen: Vec<usize> = (0..views.len())
        .filter(|&index| {
            let view = &views[index];
            view.facts.policy.class == class
                && view.facts.sample.is_some()
                && !view.memory.squeezed.killed
                && !view.in_other_hands()
                // Pinned memory can be neither reclaimed nor swapped.
                && !(throttles && view.is_inhibited())
                && (view.facts.interlock.is_none() || view.memory.squeezed.paused)
        })
        .collect();
    if step == Step::Kill {
        // The VM whose death frees the most memory.
        chosen.sort_by_key(|&index| (std::cmp::Reverse(views[index].sample.resident), index));
        chosen.truncate(1);
    }
    chosen
        .into_iter()
        .map(|index| {
            let view = &mut views[index];
            let squeezed = &mut view.memory.squeezed;
            let kind = match step {
                Step::MemoryHigh => {
                    squeezed.high = true;
                    let limit = view
                        .sample
                        .resident
                        .scale(HIGH_PART)
                        .max(view.facts.policy.min);
                    ActionKind::MemoryHigh { limit: Some(limit) }
                }
                Step::Swap => {
                    squeezed.swap = true;
                    ActionKind::SwapMax {
                        limit: resort.swap_max.of(view.facts.configured),
                    }
                }
                Step::Pause => {
                    squeezed.paused = true;
                    ActionKind::Pause
                }
                Step::Kill => {
                    squeezed.killed = true;
                    ActionKind::Kill
                }
            };
            (index, kind, Reason::LastResort)
        })
        .collect()
}

fn recover(views: &mut [View<'_>]) -> Vec<(usize, ActionKind, Reason)> {
    let mut actions = Vec::new();
    for (index, view) in views.iter_mut().enumerate() {
        if view.in_other_hands() {
            continue;
        }
        let Squeezed {
            high, swap, paused, ..
        } = view.memory.squeezed;
        let squeezed = &mut view.memory.squeezed;
        let undo = [
            (paused, ActionKind::Resume),
            (high, ActionKind::MemoryHigh { limit: None }),
            (swap, ActionKind::SwapMax { limit: Bytes::ZERO }),
        ];
        for (used, kind) in undo {
            if used {
                actions.push((index, kind, Reason::Recovered));
            }
        }
        (squeezed.high, squeezed.swap, squeezed.paused) = (false, false, false);
    }
    actions
}
