//! Gives memory: decides which VMs get memory back, and from which source.
//!
//! Only memory that is free now is given. Memory that balloons are about to return is given by a later plan, after it
//! has arrived: the second of the two phases. A suffering guest gets all of its memory in one request. Small steps do
//! not help a guest that thrashes, and it may never respond again. It may use free memory down to half of the value at
//! which the host turns red. Guests that are merely short of memory may use memory above `give_above`, the others
//! memory above `relax_above`.

use crate::config::{Config, ControlConfig, SafetyRule};
use crate::model::{Bytes, HostState, Ledger};

use super::Reason;
use super::observe::{learn_from_silence, refaulting, suffer_below};
use super::state::BURST_LEAVE;
use super::view::View;

/// If a guest stops responding within this time after memory was taken, the taking is considered the cause, ms.
const STALL_SUSPECTED_MS: u64 = 60_000;
/// Number of steps that one plan gives to a guest without need.
const RELAX_STEPS: u64 = 4;
/// Between the two values, a guest gets one step per this time, and only after the host was green for as long, ms. Ten
/// minutes limit changes of direction to six per hour even if every step is taken again.
const RELAX_SLOWLY_MS: u64 = 600_000;

/// The memory that this plan may still give.
#[derive(Debug)]
pub(super) struct Budget {
    free: Bytes,
    usable: Bytes,
    /// Memory that may become callable while the burst stays covered.
    covered: Bytes,
    /// Given so far.
    pub(super) granted: Bytes,
    /// Memory that suffering guests need and did not get.
    pub(super) owed: Bytes,
}

impl Budget {
    pub(super) fn new(ledger: &Ledger, control: &ControlConfig) -> Self {
        let granted = if control.safety.has(SafetyRule::GrantedCounts) {
            ledger.granted
        } else {
            Bytes::ZERO
        };
        Self {
            free: ledger.available - ledger.promised - granted,
            usable: ledger.usable,
            covered: covered(ledger, control),
            granted: Bytes::ZERO,
            owed: Bytes::ZERO,
        }
    }

    /// Free memory above this fraction of the usable memory.
    fn above(&self, part: f64, control: &ControlConfig) -> Bytes {
        if control.safety.has(SafetyRule::TwoPhase) {
            self.free - self.granted - self.usable.scale(part)
        } else {
            self.usable
        }
    }
}

/// How much more memory may become callable. Memory given to guests without need becomes callable, and would be taken
/// again immediately if the burst were no longer covered.
fn covered(ledger: &Ledger, control: &ControlConfig) -> Bytes {
    let cover = ledger.available.scale(1.0 / (BURST_LEAVE * BURST_LEAVE));
    if !control.safety.has(SafetyRule::Burst) || ledger.burst_measured <= cover {
        ledger.usable
    } else {
        cover - ledger.callable_liability
    }
}

/// Gives to guests in urgent need: below their minimum, suffering, or not responding since memory was taken.
pub(super) fn give_urgent(
    views: &mut [View<'_>],
    budget: &mut Budget,
    now_ms: u64,
    config: &Config,
) {
    let control = &config.control;
    let mut urgent: Vec<(usize, Bytes)> = Vec::new();
    for (index, view) in views.iter_mut().enumerate() {
        if let Some((to, reason)) = urgency(view, now_ms, control) {
            view.reason = reason;
            if view.target > to {
                if reason == Reason::StallSuspected {
                    learn_from_silence(view.facts, &mut view.memory, now_ms, control);
                }
                urgent.push((index, to));
            }
        }
    }
    // The highest class first; within a class the smallest need first, so that as many guests as possible get all they
    // need.
    urgent.sort_by_key(|&(index, to)| {
        let view = &views[index];
        (
            std::cmp::Reverse(view.facts.policy.class),
            view.grant(to),
            index,
        )
    });
    let floor = config.thresholds.red.enter.0 / 2.0;
    for (index, to) in urgent {
        let view = &mut views[index];
        let wish = view.grant(to);
        let grant = wish.min(budget.above(floor, control));
        budget.granted += grant;
        budget.owed += wish - grant;
        // In any case, no more is taken: the target is reduced at least to the balloon's current size.
        view.to = (view.target.min(view.sample.ballooned) - grant).max(to);
        if view.to == view.target {
            view.reason = Reason::NoBudget;
        }
    }
}

/// The target that a VM needs immediately, and the reason.
fn urgency(view: &View<'_>, now_ms: u64, control: &ControlConfig) -> Option<(Bytes, Reason)> {
    if view.off_limits().is_some() {
        return None;
    }
    if view.target > view.high {
        return Some((view.high, Reason::BelowMinimum));
    }
    if view.memory.distrusted || !control.safety.has(SafetyRule::GiveBack) {
        return None;
    }
    if view.memory.suffering {
        return Some((view.low, Reason::Suffering));
    }
    let lately =
        view.memory.taken_at_ms > 0 && now_ms < view.memory.taken_at_ms + STALL_SUSPECTED_MS;
    // Without a recent taking, the silence must last longer, because the agent itself may be late.
    let silent_ms = view
        .sample
        .guest
        .map(|guest| now_ms.saturating_sub(guest.at_ms));
    let long = view.facts.missed_samples >= 2 * control.misses_max
        || silent_ms.is_some_and(|silent_ms| silent_ms > 2 * control.sample_age_max.0);
    ((lately || long) && view.stale(now_ms, control)).then_some((view.low, Reason::StallSuspected))
}

/// Gives to guests that are short of memory, and to all guests on a host that has had spare memory since
/// `relax_since_ms`.
pub(super) fn give_rest(
    views: &mut [View<'_>],
    budget: &mut Budget,
    state: HostState,
    relax_since_ms: Option<u64>,
    now_ms: u64,
    config: &Config,
) {
    let control = &config.control;
    let above_give = budget.above(control.give_above.0, control);
    share(
        views,
        budget,
        above_give,
        |view| may_give(view, now_ms, control).then(|| need(view, state, control))?,
        Reason::Need,
        control,
    );
    if let Some(since_ms) = relax_since_ms {
        relax_slowly(views, budget, since_ms, now_ms, config);
        let above_relax = budget
            .above(control.relax_above.0, control)
            .min(budget.covered);
        share(
            views,
            budget,
            above_relax,
            |view| {
                let step = Bytes(view.step(state, control).0.saturating_mul(RELAX_STEPS));
                let wish = (view.target - view.low).min(step);
                (may_give(view, now_ms, control) && wish > Bytes::ZERO).then_some(wish)
            },
            Reason::Relax,
            control,
        );
    }
}

/// Between the value that ends yellow and `relax_above`, nothing is urgent, but guests must eventually get their memory
/// back: they get it step by step, until free memory is down to a quarter of the way above the lower value.
fn relax_slowly(
    views: &mut [View<'_>],
    budget: &mut Budget,
    green_since_ms: u64,
    now_ms: u64,
    config: &Config,
) {
    if now_ms < green_since_ms + RELAX_SLOWLY_MS {
        return;
    }
    let control = &config.control;
    let low = config.thresholds.yellow.leave.0;
    let mark = low + (control.relax_above.0 - low) / 4.0;
    let above_mark = budget.above(mark, control).min(budget.covered);
    share(
        views,
        budget,
        above_mark,
        |view| {
            let rested = now_ms >= view.memory.asked_at_ms + RELAX_SLOWLY_MS;
            let wish = (view.target - view.low).min(view.step(HostState::Green, control));
            (rested && may_give(view, now_ms, control) && wish > Bytes::ZERO).then_some(wish)
        },
        Reason::Relax,
        control,
    );
}

fn may_give(view: &View<'_>, now_ms: u64, control: &ControlConfig) -> bool {
    let blocked =
        control.safety.has(SafetyRule::Blocking) && now_ms < view.memory.give_blocked_until_ms;
    view.to == view.target
        && view.off_limits().is_none()
        && !view.stale(now_ms, control)
        && !view.memory.distrusted
        && view.memory.samples >= control.samples_min
        && !blocked
}

/// The memory that a guest lacks to reach what it should keep, once it is halfway to suffering. Above that, it lacks
/// nothing, unless it refaults pages that it had to give up: then it lacks one step, regardless of the available memory
/// that it claims.
fn need(view: &View<'_>, state: HostState, control: &ControlConfig) -> Option<Bytes> {
    let available = view.available?;
    if refaulting(&view.memory) {
        let step = view.step(state, control);
        let wish = (view.keeps - available)
            .max(step)
            .min(view.target - view.low);
        return (wish > Bytes::ZERO).then_some(wish);
    }
    let suffers = suffer_below(view.facts.configured - view.target, control);
    let begins = Bytes(u64::midpoint(view.keeps.0, suffers.0));
    let wish = (view.keeps - available).min(view.target - view.low);
    (available < begins && wish > Bytes::ZERO).then_some(wish)
}

/// Distributes `sum` by shares among guests with a need, none above its need.
fn share(
    views: &mut [View<'_>],
    budget: &mut Budget,
    sum: Bytes,
    wish: impl Fn(&View<'_>) -> Option<Bytes>,
    reason: Reason,
    control: &ControlConfig,
) {
    if sum == Bytes::ZERO {
        return;
    }
    let mut wishes: Vec<(usize, Bytes)> = views
        .iter()
        .enumerate()
        .filter_map(|(index, view)| Some((index, wish(view)?)))
        .collect();
    let weight = |view: &View<'_>| f64::from(view.facts.policy.shares);
    // The smallest need per share first: the rest of its part goes to those that follow.
    let key = |&(index, wish): &(usize, Bytes)| wish.0 as f64 / weight(&views[index]);
    wishes.sort_by(|a, b| key(a).total_cmp(&key(b)).then(a.0.cmp(&b.0)));
    let mut weights: f64 = wishes.iter().map(|&(index, _)| weight(&views[index])).sum();
    let mut left = sum;
    for (index, wish) in wishes {
        let view = &mut views[index];
        let gift = wish.min(left.scale((weight(view) / weights).min(1.0)));
        weights = (weights - weight(view)).max(f64::MIN_POSITIVE);
        if gift < view.dead_band(control) {
            view.reason = Reason::DeadBand;
            continue;
        }
        let to = view.target - gift;
        view.to = to.max(view.low);
        view.reason = reason;
        let grant = view.grant(view.to);
        budget.granted += grant;
        left -= gift;
    }
}
