//! Takes memory: decides which balloons grow, and by how much.
//!
//! The lowest class gives all it can in this plan before the next class gives anything. Within a class, each VM's part
//! is proportional to its spare memory, weighted by idleness and inversely by shares. A step limits how much one plan
//! takes from one VM, so that the next sample shows whether it did harm.

use strum::VariantArray as _;

use crate::config::ControlConfig;
use crate::model::{Bytes, HostState, PriorityClass};

use super::observe::TURNS_MAX;
use super::view::View;
use super::{Reason, Squeezed};

/// The missing memory, and its reason.
#[derive(Clone, Copy, Debug)]
pub(super) struct Demand {
    pub(super) now_ms: u64,
    pub(super) state: HostState,
    pub(super) shortage: Bytes,
    /// The reason.
    pub(super) reason: Reason,
    /// Callable memory that must become firm, so that the burst is covered.
    pub(super) firm: Bytes,
}

/// Takes at most `shortage` plus one dead band, and returns the amount taken.
pub(super) fn take(views: &mut [View<'_>], demand: &Demand, control: &ControlConfig) -> Bytes {
    let mut taken = Bytes::ZERO;
    for &class in PriorityClass::VARIANTS {
        let missing = demand.shortage - taken;
        if missing == Bytes::ZERO {
            break;
        }
        taken += take_from_class(views, class, missing, demand, control);
    }
    firm_up(views, demand, control);
    for view in views.iter_mut() {
        explain_rest(view, demand, control);
    }
    taken
}

/// Takes free memory that is not resident. This does not return memory to the host now, but keeps the guests from
/// taking all of it at the same time.
fn firm_up(views: &mut [View<'_>], demand: &Demand, control: &ControlConfig) {
    let under_way: Bytes = views
        .iter()
        .map(|view| view.target - view.sample.ballooned)
        .sum();
    let mut missing = demand.firm - under_way;
    for &class in PriorityClass::VARIANTS {
        for view in views
            .iter_mut()
            .filter(|view| view.facts.policy.class == class)
        {
            let spared = view.spared(demand.state, demand.now_ms, control);
            // One step per sample: the next sample shows how the guest reacted.
            let seen = view.sample.at_ms > view.memory.asked_at_ms;
            if view.to != view.target || spared.is_some() || !seen {
                continue;
            }
            let room = view.target_max(HostState::Yellow, control) - view.target;
            let firm = room
                .min(view.absent())
                .min(view.step(HostState::Red, control));
            let part = firm.min(missing.max(view.dead_band(control)));
            if missing == Bytes::ZERO || part < view.dead_band(control) {
                continue;
            }
            view.to = view.target + part;
            view.reason = Reason::BurstCover;
            missing -= part;
        }
    }
}

/// A VM that can give memory.
struct Giver {
    index: usize,
    /// Growth of the balloon that returns no host memory.
    absent: Bytes,
    /// Maximum host memory that it returns.
    gain: Bytes,
    weight: f64,
}

/// Distributes `missing` in proportion to the givers' weights, none above its maximum. Givers that reach their maximum
/// first are processed first, so that one pass yields the exact parts of the rest. Parts below the dead band are
/// rounded up to it, so the sum is too large by at most one dead band.
fn take_from_class(
    views: &mut [View<'_>],
    class: PriorityClass,
    missing: Bytes,
    demand: &Demand,
    control: &ControlConfig,
) -> Bytes {
    let mut givers: Vec<Giver> = views
        .iter()
        .enumerate()
        .filter(|(_, view)| view.facts.policy.class == class)
        .filter_map(|(index, view)| giver(index, view, demand, control))
        .collect();
    let bound = |giver: &Giver| giver.gain.0 as f64 / giver.weight;
    givers.sort_by(|a, b| {
        bound(a)
            .total_cmp(&bound(b))
            .then(b.gain.cmp(&a.gain))
            .then(a.index.cmp(&b.index))
    });
    let mut weight: f64 = givers.iter().map(|giver| giver.weight).sum();
    let mut taken = Bytes::ZERO;
    for giver in &givers {
        let rest = missing - taken;
        let view = &mut views[giver.index];
        if rest == Bytes::ZERO {
            view.reason = Reason::OthersGave;
            continue;
        }
        let part = rest.scale((giver.weight / weight).min(1.0));
        weight = (weight - giver.weight).max(f64::MIN_POSITIVE);
        // The part is rounded up, because a remaining byte would cost another VM a whole dead band.
        let gain = (part + Bytes(1))
            .max(view.dead_band(control))
            .min(giver.gain);
        view.to = view.target + giver.absent + gain;
        view.gain = gain;
        view.reason = demand.reason;
        taken += gain;
    }
    taken
}

fn giver(index: usize, view: &View<'_>, demand: &Demand, control: &ControlConfig) -> Option<Giver> {
    if view.to != view.target || view.spared(demand.state, demand.now_ms, control).is_some() {
        return None;
    }
    if view.memory.harmed && demand.state < HostState::Red {
        return None;
    }
    let room = view.target_max(demand.state, control) - view.target;
    let absent = view.absent();
    // Pending memory counts, so that at most one step is in progress, regardless of how often plans are made.
    let step = view.step(demand.state, control) - view.pending_gain(control);
    let gain = (room - absent).min(step);
    (gain >= view.dead_band(control)).then(|| Giver {
        index,
        absent,
        gain,
        weight: view.take_weight(gain),
    })
}

/// Records why nothing was taken from a VM.
fn explain_rest(view: &mut View<'_>, demand: &Demand, control: &ControlConfig) {
    if view.to != view.target || view.reason != Reason::NoNeed {
        return;
    }
    view.reason = match view.spared(demand.state, demand.now_ms, control) {
        Some(reason) => reason,
        None if view.memory.harmed => Reason::Harm,
        None => {
            let room = view.target_max(demand.state, control) - view.target;
            match room - view.absent() {
                Bytes::ZERO => Reason::NothingToTake,
                gain if gain < view.dead_band(control) => Reason::DeadBand,
                _ => Reason::OthersGave,
            }
        }
    };
}

/// Grows a balloon that is smaller than the VM's maximum requires. The operator's limit applies without a shortage.
pub(super) fn hold_to_maximum(view: &mut View<'_>, now_ms: u64, control: &ControlConfig) {
    let known = view.off_limits().is_none() && !view.stale(now_ms, control);
    let moves =
        !view.memory.stuck && !view.is_inhibited() && view.memory.turns_ms.len() < TURNS_MAX;
    // One step per sample: the next sample shows how the guest reacted.
    let seen = view.sample.at_ms > view.memory.asked_at_ms;
    if view.target < view.low && known && moves && seen {
        let step = view.step(HostState::Red, control);
        view.to = view.low.min(view.target + step);
        view.gain = (view.to - view.target) - view.absent();
        view.reason = Reason::AboveMaximum;
    }
}

/// Sets a stuck balloon's target to its size: if it moves again, it must not continue towards an outdated target.
pub(super) fn pin_stuck(view: &mut View<'_>) {
    let held = view.sample.ballooned.max(view.low);
    if view.memory.stuck && view.off_limits().is_none() && held < view.target {
        view.to = held;
        view.reason = Reason::Stuck;
    }
}

/// Whether any last resort is in use.
pub(super) fn in_use(squeezed: &Squeezed) -> bool {
    squeezed.high || squeezed.swap || squeezed.paused
}
