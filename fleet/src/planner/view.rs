//! One VM during planning: facts and memory, and the figures on which the rules decide.

use crate::config::{Config, ControlConfig, SafetyRule};
use crate::model::{Bytes, FeatureLevel, HostState, Interlock, PriorityClass, VmFacts, VmSample};

use super::observe::{TURNS_MAX, dead_band, keeps, possible, refaulting, used};
use super::{Reason, VmMemory};

/// A VM during planning. The rules set `to` and `reason`.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) facts: &'a VmFacts,
    pub(super) memory: VmMemory,
    pub(super) sample: VmSample,
    /// The balloon's target so far.
    pub(super) target: Bytes,
    /// The smallest target that keeps the VM to its maximum.
    pub(super) low: Bytes,
    /// The largest target that leaves it its minimum.
    pub(super) high: Bytes,
    /// Available memory as it will be when the balloon has reached `target`; absent without claims from the guest.
    pub(super) available: Option<Bytes>,
    /// Unused memory, likewise.
    pub(super) free: Option<Bytes>,
    /// Available memory that it keeps.
    pub(super) keeps: Bytes,
    /// The new target.
    pub(super) to: Bytes,
    /// The rule that set it.
    pub(super) reason: Reason,
    /// Host memory that growing the balloon to `to` returns.
    pub(super) gain: Bytes,
}

/// Memory that guests could give without harm.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Freeable {
    /// Host memory in total.
    pub(super) gain: Bytes,
    /// The part of it that would return within the reaction time.
    pub(super) soon: Bytes,
    /// Memory that a balloon takes in the process although it is not resident: it is no longer callable.
    pub(super) firm: Bytes,
}

impl<'a> View<'a> {
    pub(super) fn new(facts: &'a VmFacts, memory: VmMemory, now_ms: u64, config: &Config) -> Self {
        let sample = facts.sample.unwrap_or_default();
        let target = if memory.samples == 0 {
            sample.balloon_target
        } else {
            memory.target
        };
        let pending = target - sample.ballooned;
        let has = facts.configured - sample.ballooned;
        let control = &config.control;
        let fresh = |at_ms: u64| {
            now_ms <= at_ms + control.sample_age_max.0 || !control.safety.has(SafetyRule::Stale)
        };
        let claims = sample.guest.filter(|claims| fresh(claims.at_ms));
        Self {
            facts,
            sample,
            target,
            low: facts.policy.balloon_min(facts.configured),
            high: facts.policy.balloon_max(facts.configured),
            available: claims.map(|claims| claims.available.min(has) - pending),
            free: claims.map(|claims| claims.free.min(has) - pending),
            keeps: keeps(facts.configured - target, control),
            to: target,
            reason: Reason::NoNeed,
            gain: Bytes::ZERO,
            memory,
        }
    }

    /// The reason why the manager must not change the VM, if any.
    pub(super) fn off_limits(&self) -> Option<Reason> {
        if self.facts.interlock.is_some() {
            Some(Reason::Interlock)
        } else if !self.facts.has_balloon || !self.facts.policy.managed() {
            Some(Reason::Unmanaged)
        } else if self.facts.sample.is_none() {
            Some(Reason::Fresh)
        } else {
            None
        }
    }

    /// Whether the host gets nothing that the guest gives back.
    pub(super) fn is_inhibited(&self) -> bool {
        self.sample.reclaim.is_some_and(|it| it.inhibited)
    }

    /// [`Interlock::in_other_hands`]
    pub(super) fn in_other_hands(&self) -> bool {
        self.facts.interlock.is_some_and(Interlock::in_other_hands)
    }

    /// True if the VM has not responded for so long that its state is unknown.
    pub(super) fn stale(&self, now_ms: u64, control: &ControlConfig) -> bool {
        control.safety.has(SafetyRule::Stale)
            && (self.facts.missed_samples >= control.misses_max
                || now_ms > self.sample.at_ms + control.sample_age_max.0
                || self.facts.level >= FeatureLevel::L1
                    && self.sample.guest.is_some()
                    && self.available.is_none())
    }

    /// The reason why nothing may be taken, if any.
    pub(super) fn spared(
        &self,
        state: HostState,
        now_ms: u64,
        control: &ControlConfig,
    ) -> Option<Reason> {
        let memory = &self.memory;
        if let Some(reason) = self.off_limits() {
            Some(reason)
        } else if self.facts.policy.class == PriorityClass::Critical {
            Some(Reason::Critical)
        } else if self.is_inhibited() {
            Some(Reason::Inhibited)
        } else if memory.samples < control.samples_min {
            Some(Reason::Fresh)
        } else if self.stale(now_ms, control) {
            Some(Reason::Stale)
        } else if memory.distrusted {
            Some(Reason::Lying)
        } else if memory.stuck {
            Some(Reason::Stuck)
        } else if memory.suffering && control.safety.has(SafetyRule::GiveBack) {
            Some(Reason::Suffering)
        } else if refaulting(memory) && control.safety.has(SafetyRule::GiveBack) {
            Some(Reason::Need)
        } else if control.safety.has(SafetyRule::Blocking)
            && (self.rests(state, now_ms, control)
                || self.shrinking(control)
                || memory.turns_ms.len() >= TURNS_MAX)
        {
            Some(Reason::Blocked)
        } else {
            None
        }
    }

    /// Whether it was recently given memory. In red, the rest has its minimum length: otherwise guests that often
    /// received memory would all rest for minutes while the host runs out.
    fn rests(&self, state: HostState, now_ms: u64, control: &ControlConfig) -> bool {
        let until_ms = self.memory.take_blocked_until_ms;
        let given_ms = self.memory.granted_at_ms + control.block_take.0;
        now_ms < until_ms && (state < HostState::Red || now_ms < given_ms)
    }

    /// Whether the balloon is still larger than requested, so that given memory has not arrived.
    fn shrinking(&self, control: &ControlConfig) -> bool {
        self.sample.ballooned > self.target + self.dead_band(control)
    }

    /// The largest target that does no harm. Free memory is taken first, droppable caches from orange on. From a guest
    /// without claims, memory is taken only from orange on.
    pub(super) fn target_max(&self, state: HostState, control: &ControlConfig) -> Bytes {
        let high = if control.safety.has(SafetyRule::GiveBack) {
            self.high.min(self.facts.configured - self.learned_min())
        } else {
            self.high
        };
        let room = match (self.available, self.free) {
            (Some(available), Some(free)) => {
                let spare = match state {
                    HostState::Red => available - Bytes(self.keeps.0 / 2),
                    _ => available - self.keeps,
                };
                if state < HostState::Orange {
                    spare.min(free)
                } else {
                    spare
                }
            }
            _ if state == HostState::Red => high - self.target,
            _ if state == HostState::Orange => Bytes((high - self.target).0 / 2),
            _ => Bytes::ZERO,
        };
        (self.target + room).min(high).max(self.target)
    }

    /// The learned minimum, reduced if its programs use less than at that time.
    fn learned_min(&self) -> Bytes {
        let memory = &self.memory;
        match (memory.learned_used, used(self.facts, &self.sample)) {
            (Some(then), Some(now)) => memory.learned_min - (then - now),
            _ => memory.learned_min,
        }
    }

    /// The part of the memory that the balloon would take next that is not resident: taking it returns nothing.
    pub(super) fn absent(&self) -> Bytes {
        let callable = self.facts.callable() - (self.target - self.sample.ballooned);
        self.free.unwrap_or(callable).min(callable)
    }

    /// Host memory that a moving balloon will still return.
    pub(super) fn pending_gain(&self, control: &ControlConfig) -> Bytes {
        let missing = self.target - self.sample.ballooned;
        let memory = &self.memory;
        if !control.safety.has(SafetyRule::PendingCounts)
            || memory.stuck
            || memory.distrusted
            || self.is_inhibited()
        {
            return Bytes::ZERO;
        }
        let asked = memory.target - memory.asked_from;
        memory
            .asked_gain
            .scale(missing.ratio(asked).min(1.0))
            .min(missing)
    }

    /// Its idleness: from 1 if its memory changes to 4 if nothing changes. Among equals, idle memory is taken first
    /// (the idle memory tax of Waldspurger 2002, with a rate of three quarters).
    pub(super) fn idleness(&self) -> f64 {
        let per_min = self.memory.activity_per_min / self.sample.resident.0.max(1) as f64;
        1.0 / (0.25 + 0.75 * (per_min / 0.05).min(1.0))
    }

    /// Memory that it could give without harm in this host state.
    pub(super) fn freeable(
        &self,
        state: HostState,
        now_ms: u64,
        control: &ControlConfig,
    ) -> Freeable {
        if self.spared(state, now_ms, control).is_some() {
            return Freeable::default();
        }
        let room = self.target_max(state, control) - self.target;
        let absent = self.absent();
        let gain = room - absent;
        if gain == Bytes::ZERO {
            return Freeable::default();
        }
        // A balloon that never moved is assumed to have the minimum rate of one that is not stuck.
        let rate = self.memory.rate_per_s.max(control.stuck_rate.0 as f64);
        let soon = gain.min(Bytes((rate * control.react.0 as f64 / 1000.0) as u64));
        Freeable {
            gain,
            soon,
            firm: absent,
        }
    }

    /// Its weight when memory is taken: high if much is idle and its shares are few.
    pub(super) fn take_weight(&self, gain: Bytes) -> f64 {
        gain.0 as f64 * self.idleness() / f64::from(self.facts.policy.shares.max(1))
    }

    /// Maximum amount taken at once.
    pub(super) fn step(&self, state: HostState, control: &ControlConfig) -> Bytes {
        let factor = match state {
            HostState::Red => 4.0,
            HostState::Orange => 2.0,
            _ => 1.0,
        };
        let step = control
            .step
            .min(self.facts.configured.part(control.step_part));
        step.scale(factor * self.memory.step_scale)
            .max(self.dead_band(control))
    }

    pub(super) fn dead_band(&self, control: &ControlConfig) -> Bytes {
        dead_band(self.facts.configured, control)
    }

    /// Host memory that the guest can use after its target becomes `to`. The balloon's actual size counts, not the
    /// requested one.
    pub(super) fn grant(&self, to: Bytes) -> Bytes {
        self.sample.ballooned.min(self.target) - to
    }

    /// The limit of its control group if it lies.
    pub(super) fn enforced_limit(&self) -> Bytes {
        possible(self.facts, &self.sample).max(self.facts.policy.min)
    }
}
