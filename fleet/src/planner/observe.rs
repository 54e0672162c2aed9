//! From samples to what is remembered: how a guest took what was done to it.
//!
//! A sample is looked at once. Everything here compares it with the one before; nothing decides what to do.

use crate::config::ControlConfig;
use crate::model::{Bytes, VmFacts, VmSample};

use super::VmMemory;
use super::plan::TARGET_GRAIN;

/// Samples in a row with stalls that make suffering; a single stall happens to any guest.
const STALLED_SAMPLES: u32 = 2;
/// Samples in a row with more resident than possible that end trust: figures of one sample are not of one moment.
const LIES: u32 = 2;
/// Samples in a row without, that restore it.
const HONEST: u32 = 12;
/// Reversals that count: 2^6 times the shortest time is an hour.
const REVERSALS_MAX: u32 = 6;
/// What was granted and not used for so many reaction times is a loan like any other.
const GRANT_REACTIONS: u64 = 3;
/// The smallest part of a step that is still asked for.
const STEP_SCALE_MIN: f64 = 1.0 / 16.0;

/// Brings what is remembered up to date with the facts.
pub(super) fn observe(
    facts: &VmFacts,
    memory: &mut VmMemory,
    now_ms: u64,
    control: &ControlConfig,
) {
    if memory.samples == 0 || memory.epoch != facts.epoch {
        *memory = VmMemory {
            epoch: facts.epoch,
            step_scale: 1.0,
            ..VmMemory::default()
        };
    }
    if let Some(sample) = facts.sample
        && (memory.samples == 0 || sample.at_ms > memory.last.at_ms)
    {
        if memory.samples == 0 {
            memory.target = sample.balloon_target;
        } else {
            compare(facts, &sample, memory, control);
        }
        memory.samples = memory.samples.saturating_add(1);
        memory.last = sample;
    }
    forget(memory, now_ms, control);
}

fn compare(facts: &VmFacts, sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    // Somebody else moved the balloon, or what was asked for was never carried out: the VMM's word counts.
    let other = sample.balloon_target.distance(memory.target) >= TARGET_GRAIN;
    if sample.at_ms > memory.asked_at_ms && other {
        memory.target = sample.balloon_target;
        memory.asked_from = sample.ballooned;
        memory.asked_gain = Bytes::ZERO;
    }
    let minutes = (sample.at_ms - memory.last.at_ms) as f64 / 60_000.0;
    let change = sample.resident.distance(memory.last.resident).0 as f64 / minutes;
    memory.activity_per_min += (change - memory.activity_per_min) * 0.2;
    memory.granted -= sample.resident - memory.last.resident;
    harm(sample, memory, minutes, control);
    suffering(facts, sample, memory, control);
    trust(facts, sample, memory, control);
    movement(facts, sample, memory, control);
}

/// Whether memory comes back faster than it should after some was taken, and how large steps may be.
fn harm(sample: &VmSample, memory: &mut VmMemory, minutes: f64, control: &ControlConfig) {
    let (Some(now), Some(before)) = (sample.reclaim, memory.last.reclaim) else {
        memory.harmed = false;
        return;
    };
    let repopulated = (now.repopulated - before.repopulated).ratio(sample.resident) / minutes;
    let recently = memory.taken_at_ms > 0 && sample.at_ms < memory.taken_at_ms + 60_000;
    memory.harmed = recently && repopulated > control.repopulate_max.0;
    if memory.harmed || now.report_p99_us > control.report_p99_us_max {
        memory.step_scale = (memory.step_scale / 2.0).max(STEP_SCALE_MIN);
    } else {
        memory.step_scale = (memory.step_scale + 0.1).min(1.0);
    }
}

/// Available memory below which a guest suffers.
pub(super) fn suffer_below(has: Bytes, control: &ControlConfig) -> Bytes {
    has.part(control.suffer).max(control.suffer_min)
}

/// Available memory that a guest keeps.
pub(super) fn keeps(has: Bytes, control: &ControlConfig) -> Bytes {
    has.part(control.keep).max(control.keep_min)
}

fn suffering(facts: &VmFacts, sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    let was = memory.suffering;
    memory.suffering = false;
    let Some(claims) = sample.guest else {
        return;
    };
    let before = memory.last.guest.unwrap_or(claims);
    let has = facts.configured - sample.ballooned;
    let rose = |now: Option<u64>, before: Option<u64>| now > before && before.is_some();
    memory.stalled = if rose(claims.alloc_stalls, before.alloc_stalls) {
        memory.stalled + 1
    } else {
        0
    };
    let killed = rose(claims.oom_kills, before.oom_kills);
    let short = claims.available < suffer_below(has, control);
    // Two signals that agree need no second sample.
    let stalls = memory.stalled >= STALLED_SAMPLES
        || memory.stalled > 0 && claims.available < keeps(has, control);
    // Without a balloon the guest is simply full, and there is nothing to give back.
    memory.suffering = (killed || short || stalls) && sample.ballooned > Bytes::ZERO;
    if memory.suffering && !was {
        learn(facts, has, memory, sample.at_ms, control);
    }
}

/// A guest that suffers proves that it needs more than it has. It is remembered for longer each time.
fn learn(facts: &VmFacts, has: Bytes, memory: &mut VmMemory, now_ms: u64, control: &ControlConfig) {
    if memory.taken_at_ms > 0 && now_ms < memory.taken_at_ms + control.block_max.0 {
        memory.reversals = (memory.reversals + 1).min(REVERSALS_MAX);
    }
    let needs = (has + keeps(has, control)).min(facts.configured);
    memory.learned_min = memory.learned_min.max(needs);
    memory.learned_until_ms = now_ms + (control.block_max.0 << memory.reversals);
}

fn trust(facts: &VmFacts, sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    if !control.safety.trust {
        return;
    }
    if sample.resident > possible(facts, sample) {
        memory.lies = memory.lies.saturating_add(1);
        memory.honest = 0;
    } else {
        memory.lies = 0;
        memory.honest = memory.honest.saturating_add(1);
    }
    memory.distrusted = if memory.distrusted {
        memory.honest < HONEST
    } else {
        memory.lies >= LIES
    };
}

/// The most that can be resident when the guest's claim about its balloon is true. The VMM's own memory and figures
/// taken one after the other blur it.
pub(super) fn possible(facts: &VmFacts, sample: &VmSample) -> Bytes {
    facts.configured - sample.ballooned + Bytes::mib(64).max(facts.configured.scale(0.02))
}

/// Whether a balloon that should grow does, and how fast.
fn movement(facts: &VmFacts, sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    let near = dead_band(facts.configured, control);
    let grown = sample.ballooned - memory.last.ballooned;
    if grown >= near {
        let from_ms = memory
            .last
            .at_ms
            .max(memory.asked_at_ms.min(sample.at_ms - 1));
        let rate = grown.0 as f64 * 1000.0 / (sample.at_ms - from_ms) as f64;
        // Bad news at once, good news slowly: a promise is made of it.
        let weight = if rate < memory.rate_per_s { 0.5 } else { 0.1 };
        memory.rate_per_s += if memory.rate_per_s == 0.0 {
            rate
        } else {
            (rate - memory.rate_per_s) * weight
        };
    }
    if sample.ballooned + near >= memory.target {
        memory.moving_since_ms = None;
        // It arrived where it was sent, and did not just stand where it was pinned.
        if sample.ballooned > memory.asked_from + near {
            memory.stuck_times = 0;
        }
        return;
    }
    let Some(since) = memory.moving_since_ms else {
        memory.moving_since_ms = Some(sample.at_ms.min(memory.asked_at_ms.max(memory.last.at_ms)));
        memory.moving_from = memory.last.ballooned;
        return;
    };
    let elapsed_ms = sample.at_ms.saturating_sub(since);
    if elapsed_ms < control.stuck_after.0 {
        return;
    }
    let moved = sample.ballooned - memory.moving_from;
    let expected = control.stuck_rate.scale(elapsed_ms as f64 / 1000.0);
    if moved < expected && control.safety.stuck {
        memory.stuck = true;
        let wait = control.stuck_retry.0 << memory.stuck_times.min(16);
        memory.stuck_until_ms = sample.at_ms + wait.min(control.stuck_retry_max.0);
        memory.stuck_times = memory.stuck_times.saturating_add(1);
    }
    // The rate is that of the last stretch, so that a guest that was fast once is not fast for ever.
    memory.moving_since_ms = Some(sample.at_ms);
    memory.moving_from = sample.ballooned;
}

/// Differences below this are not acted on.
pub(super) fn dead_band(configured: Bytes, control: &ControlConfig) -> Bytes {
    if control.safety.dead_band {
        control
            .dead_band
            .max(configured.part(control.dead_band_part))
    } else {
        Bytes(1)
    }
}

fn forget(memory: &mut VmMemory, now_ms: u64, control: &ControlConfig) {
    if memory.stuck && now_ms >= memory.stuck_until_ms {
        memory.stuck = false;
        memory.moving_since_ms = None;
    }
    if memory.learned_min > Bytes::ZERO && now_ms >= memory.learned_until_ms {
        memory.learned_min = Bytes::ZERO;
    }
    if now_ms > memory.granted_at_ms + GRANT_REACTIONS * control.react.0 {
        memory.granted = Bytes::ZERO;
    }
}
