//! Updates the planner's state from samples: how a guest reacted to actions.
//!
//! Each sample is processed once and compared with the previous one. No decisions are made here.

use crate::config::{ControlConfig, SafetyRule};
use crate::model::{Bytes, VmFacts, VmSample};

use super::VmMemory;
use super::plan::TARGET_GRAIN;

/// Consecutive samples with stalls that count as suffering; a single stall can happen to any guest.
const STALLED_SAMPLES: u32 = 2;
/// Consecutive samples with refaults that count as need; starting programs fault in their files once.
const REFAULTING_SAMPLES: u32 = 2;
/// Memory read back from swap and files per second, as a fraction of the guest's size, that counts as refaulting. A
/// guest of 4 GiB that reads back 4 MiB per second spends a tenth of its time on an ordinary disk.
const REFAULT_PART_PER_S: f64 = 0.001;
/// Minimum size of a major fault: the guest's page (virtio-balloon counts faults, not bytes).
const FAULT_BYTES: u64 = 4096;
/// Consecutive requests to grow without effect after which a balloon counts as stuck; a single one may have been
/// dropped as outdated.
const REFUSALS: u32 = 2;
/// Consecutive samples with more resident memory than possible after which a guest is distrusted; the figures of one
/// sample are not taken at the same moment.
const LIES: u32 = 2;
/// Consecutive samples without a contradiction that restore trust.
const HONEST: u32 = 12;
/// Maximum number of reversals that count: 2^6 times the shortest time is an hour.
const REVERSALS_MAX: u32 = 6;
/// The time over which changes of direction are counted, ms.
const HOUR_MS: u64 = 3_600_000;
/// Changes of direction per hour after which nothing more is taken. Each take may be followed by one give, so a balloon
/// changes direction at most twelve times per hour, regardless of its guest.
pub(super) const TURNS_MAX: usize = 10;
/// Number of reaction times after which unused granted memory counts as ordinary callable memory.
const GRANT_REACTIONS: u64 = 3;
/// Minimum scale of a step.
const STEP_SCALE_MIN: f64 = 1.0 / 16.0;

/// Updates the state with the facts.
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
        memory.take_over(&facts.lessons);
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
    undo_what_is_left(facts, memory);
    forget(memory, now_ms, control);
}

/// Acts of an earlier agent, and acts that this agent could not undo, are undone like its own.
fn undo_what_is_left(facts: &VmFacts, memory: &mut VmMemory) {
    let in_force = &facts.in_force;
    memory.squeezed.high |= in_force.high;
    memory.squeezed.swap |= in_force.swap;
    memory.squeezed.paused |= in_force.paused;
    memory.enforced = memory.enforced.or(in_force.max);
}

fn compare(facts: &VmFacts, sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    if std::mem::take(&mut memory.silenced) {
        memory.learned_used = Some(Bytes::ZERO);
    }
    if let (Some(most), Some(used)) = (&mut memory.learned_used, used(facts, sample)) {
        *most = used.max(*most);
    }
    request(sample, memory, control);
    let minutes = (sample.at_ms - memory.last.at_ms) as f64 / 60_000.0;
    let change = sample.resident.distance(memory.last.resident).0 as f64 / minutes;
    memory.activity_per_min += (change - memory.activity_per_min) * 0.2;
    memory.granted -= sample.resident - memory.last.resident;
    harm(sample, memory, minutes, control);
    refaults(facts, sample, memory, minutes, control);
    suffering(facts, sample, memory, control);
    trust(facts, sample, memory, control);
    movement(facts, sample, memory, control);
}

/// Evaluates the last request. If the target differs, another client moved the balloon, or the request was never
/// executed: the VMM's target counts, and the missing gain is no longer expected.
fn request(sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    if sample.at_ms <= memory.asked_at_ms {
        return;
    }
    if sample.balloon_target.distance(memory.target) < TARGET_GRAIN {
        memory.refused = 0;
        return;
    }
    let grew = memory.target > memory.asked_before;
    let unchanged = sample.balloon_target.distance(memory.asked_before) < TARGET_GRAIN;
    if !unchanged {
        // A late request or another client's counts as a change of direction, because it affects the guest in the same
        // way.
        memory.turn(sample.balloon_target > memory.target, sample.at_ms);
    }
    memory.target = sample.balloon_target;
    memory.asked_from = sample.ballooned;
    memory.asked_gain = Bytes::ZERO;
    if !(grew && unchanged && control.safety.has(SafetyRule::Stuck)) {
        return;
    }
    memory.refused += 1;
    if memory.refused >= REFUSALS {
        memory.refused = 0;
        stick(memory, sample.at_ms, control);
    }
}

/// Stops changing the balloon for some time, longer each time.
fn stick(memory: &mut VmMemory, now_ms: u64, control: &ControlConfig) {
    memory.stuck = true;
    let wait = control.stuck_retry.0 << memory.stuck_times.min(16);
    memory.stuck_until_ms = now_ms + wait.min(control.stuck_retry_max.0);
    memory.stuck_times = memory.stuck_times.saturating_add(1);
}

/// Whether the guest refaults pages from swap and files that it had to give up. This can last for hours without a
/// stalled allocation.
fn refaults(
    facts: &VmFacts,
    sample: &VmSample,
    memory: &mut VmMemory,
    minutes: f64,
    control: &ControlConfig,
) {
    let (Some(now), Some(before)) = (sample.guest, memory.last.guest) else {
        memory.refaulting = 0;
        return;
    };
    let swapped_in = now.swap_in.unwrap_or_default() - before.swap_in.unwrap_or_default();
    let faults = now
        .major_faults
        .unwrap_or_default()
        .saturating_sub(before.major_faults.unwrap_or_default());
    // A page from swap is also a major fault, and is counted once.
    let read_back = swapped_in.max(Bytes(faults.saturating_mul(FAULT_BYTES)));
    let per_s = read_back.0 as f64 / (minutes * 60.0);
    memory.refaulting = if per_s > facts.configured.scale(REFAULT_PART_PER_S).0 as f64 {
        memory.refaulting.saturating_add(1)
    } else {
        0
    };
    if memory.refaulting == REFAULTING_SAMPLES && sample.ballooned > Bytes::ZERO {
        let has = facts.configured - sample.ballooned;
        memory.learned_used = None;
        learn(facts, has, memory, sample.at_ms, control);
    }
}

/// Whether the guest reads back so much that it needs more memory.
pub(super) fn refaulting(memory: &VmMemory) -> bool {
    memory.refaulting >= REFAULTING_SAMPLES
}

/// A guest that stopped responding because of its balloon is assumed to have stalled. This counts like suffering, once
/// per silence.
pub(super) fn learn_from_silence(
    facts: &VmFacts,
    memory: &mut VmMemory,
    now_ms: u64,
    control: &ControlConfig,
) {
    if !memory.silenced {
        memory.silenced = true;
        // It worked with its memory at the last response, so the memory left to it since then is too little.
        let has = facts.configured - memory.target.max(memory.last.ballooned);
        learn(facts, has, memory, now_ms, control);
    }
}

/// Memory that the guest's programs use.
pub(super) fn used(facts: &VmFacts, sample: &VmSample) -> Option<Bytes> {
    let has = facts.configured - sample.ballooned;
    sample.guest.map(|claims| has - claims.available)
}

/// Whether memory is repopulated faster than it should be after some was taken, and the resulting step size.
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
    // If two signals agree, no second sample is needed.
    let stalls = memory.stalled >= STALLED_SAMPLES
        || memory.stalled > 0 && claims.available < keeps(has, control);
    // Without a balloon, the guest is simply full, and no memory can be returned.
    memory.suffering = (killed || short || stalls) && sample.ballooned > Bytes::ZERO;
    if memory.suffering && !was {
        memory.learned_used = None;
        learn(facts, has, memory, sample.at_ms, control);
    }
}

/// A suffering guest needs more memory than it has. The learned minimum is kept longer each time.
fn learn(facts: &VmFacts, has: Bytes, memory: &mut VmMemory, now_ms: u64, control: &ControlConfig) {
    if memory.taken_at_ms > 0 && now_ms < memory.taken_at_ms + control.block_max.0 {
        memory.reversals = (memory.reversals + 1).min(REVERSALS_MAX);
    }
    let needs = (has + keeps(has, control)).min(facts.configured);
    memory.learned_min = memory.learned_min.max(needs);
    memory.learned_until_ms = now_ms + (control.block_max.0 << memory.reversals);
}

fn trust(facts: &VmFacts, sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    if !control.safety.has(SafetyRule::Trust) {
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

/// Maximum resident memory if the guest's claim about its balloon is true. The tolerance covers the VMM's own memory
/// and figures that are read at different times.
pub(super) fn possible(facts: &VmFacts, sample: &VmSample) -> Bytes {
    let returned = match sample.reclaim {
        // The balloon's pages stay resident.
        Some(reclaim) if reclaim.inhibited => Bytes::ZERO,
        _ => sample.ballooned,
    };
    facts.configured - returned + Bytes::mib(64).max(facts.configured.scale(0.02))
}

/// Whether a balloon that should grow does so, and its rate.
fn movement(facts: &VmFacts, sample: &VmSample, memory: &mut VmMemory, control: &ControlConfig) {
    let near = dead_band(facts.configured, control);
    let grown = sample.ballooned - memory.last.ballooned;
    if grown >= near {
        let from_ms = memory
            .last
            .at_ms
            .max(memory.asked_at_ms.min(sample.at_ms - 1));
        let rate = grown.0 as f64 * 1000.0 / (sample.at_ms - from_ms) as f64;
        // A lower rate counts immediately, a higher one gradually, because reservations depend on it.
        let weight = if rate < memory.rate_per_s { 0.5 } else { 0.1 };
        memory.rate_per_s += if memory.rate_per_s == 0.0 {
            rate
        } else {
            (rate - memory.rate_per_s) * weight
        };
    }
    if sample.ballooned + near >= memory.target {
        memory.moving_since_ms = None;
        // The balloon reached its target by moving, not because its target was pinned to its size.
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
    if moved < expected && control.safety.has(SafetyRule::Stuck) {
        stick(memory, sample.at_ms, control);
    }
    // The rate refers to the last interval, so that a formerly fast guest is not considered fast forever.
    memory.moving_since_ms = Some(sample.at_ms);
    memory.moving_from = sample.ballooned;
}

/// Differences below this are not acted on.
pub(super) fn dead_band(configured: Bytes, control: &ControlConfig) -> Bytes {
    if control.safety.has(SafetyRule::DeadBand) {
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
        memory.learned_used = None;
    }
    memory.turns_ms.retain(|at_ms| now_ms < at_ms + HOUR_MS);
    if now_ms > memory.granted_at_ms + GRANT_REACTIONS * control.react.0 {
        memory.granted = Bytes::ZERO;
    }
}
