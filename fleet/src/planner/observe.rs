//! From samples to what is remembered: how a guest took what was done to it.
//!
//! A sample is looked at once. Everything here compares it with the one before; nothing decides what to do.

use crate::config::{ControlConfig, SafetyRule};
use crate::model::{Bytes, VmFacts, VmSample};

use super::VmMemory;
use super::plan::TARGET_GRAIN;

/// Samples in a row with stalls that make suffering; a single stall happens to any guest.
const STALLED_SAMPLES: u32 = 2;
/// Samples in a row with refaults that make need; programs that start fault their files in once.
const REFAULTING_SAMPLES: u32 = 2;
/// Memory read back from swap and files in a second, as a part of the guest's size, that counts as refaulting. A guest
/// of 4 GiB that reads back 4 MiB per second spends a tenth of its time on an ordinary disk.
const REFAULT_PART_PER_S: f64 = 0.001;
/// What a major fault reads at least: the guest's page (virtio-balloon counts faults, not bytes).
const FAULT_BYTES: u64 = 4096;
/// Requests to grow in a row without effect after which a balloon is stuck; one may have been dropped as outdated.
const REFUSALS: u32 = 2;
/// Samples in a row with more resident than possible that end trust: figures of one sample are not of one moment.
const LIES: u32 = 2;
/// Samples in a row without, that restore it.
const HONEST: u32 = 12;
/// Reversals that count: 2^6 times the shortest time is an hour.
const REVERSALS_MAX: u32 = 6;
/// The time over which changes of direction are counted, ms.
const HOUR_MS: u64 = 3_600_000;
/// Changes of direction in an hour after which nothing more is taken: each take may be followed by one give, so that a
/// balloon turns at most twelve times an hour whatever its guest does.
pub(super) const TURNS_MAX: usize = 10;
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

/// What an agent before this one did, or this one could not undo, is undone like what is remembered.
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

/// What became of the last request. Where the target is another one, somebody else moved the balloon or the request was
/// never carried out: the VMM's word counts, and a gain that did not come is not expected again.
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
        // A request that was carried out late, or somebody else's: for the guest it is a turn like any other.
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

/// Leaves the balloon alone for a while, longer each time.
fn stick(memory: &mut VmMemory, now_ms: u64, control: &ControlConfig) {
    memory.stuck = true;
    let wait = control.stuck_retry.0 << memory.stuck_times.min(16);
    memory.stuck_until_ms = now_ms + wait.min(control.stuck_retry_max.0);
    memory.stuck_times = memory.stuck_times.saturating_add(1);
}

/// Whether the guest reads back what it had to give up: swap, and pages of files. It may do so for hours without a
/// single allocation that waits.
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
    // A page from swap is a major fault as well: counted once.
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

/// A guest that fell silent under its balloon is believed to have stalled. That teaches as much as suffering does, once
/// for each silence.
pub(super) fn learn_from_silence(
    facts: &VmFacts,
    memory: &mut VmMemory,
    now_ms: u64,
    control: &ControlConfig,
) {
    if !memory.silenced {
        memory.silenced = true;
        // It lived with what it had at its last answer, so it is what it was left with since that is too little.
        let has = facts.configured - memory.target.max(memory.last.ballooned);
        learn(facts, has, memory, now_ms, control);
    }
}

/// What the guest's programs use.
pub(super) fn used(facts: &VmFacts, sample: &VmSample) -> Option<Bytes> {
    let has = facts.configured - sample.ballooned;
    sample.guest.map(|claims| has - claims.available)
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
        memory.learned_used = None;
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
    if moved < expected && control.safety.has(SafetyRule::Stuck) {
        stick(memory, sample.at_ms, control);
    }
    // The rate is that of the last stretch, so that a guest that was fast once is not fast for ever.
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
