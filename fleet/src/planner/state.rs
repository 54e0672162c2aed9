//! Derives the host's state from its facts and its previous state.

use crate::config::{Config, SafetyRule, Thresholds};
use crate::model::{Bytes, Fraction, HostFacts, HostState, Inventory, Ledger};

use super::PressureMemory;
use super::observe::refaulting;
use super::view::View;

/// Available memory beyond the burst that ends the state that a burst began, as a factor on the burst.
pub(super) const BURST_LEAVE: f64 = 1.25;
/// How long pressure below the value that began a state can hold it, ms.
const HELD_MS: u64 = 300_000;
/// After this time, pressure without a sign of it in any VM counts as foreign, ms.
const FOREIGN_MS: u64 = 600_000;

/// The next state: the worst that any of the three signals demands. Free memory and burst have separate dead bands:
/// each demands a state from `enter` on, and until `leave` if the host is in that state or a worse one. `pressed` is
/// the state that pressure demands.
pub(super) fn next(
    before: HostState,
    pressed: HostState,
    ledger: &Ledger,
    config: &Config,
) -> HostState {
    let free = Fraction(ledger.available.ratio(ledger.usable));
    let held = config.control.safety.has(SafetyRule::DeadBand);
    let mut state = pressed;
    for candidate in [HostState::Yellow, HostState::Orange, HostState::Red] {
        let stays = held && before >= candidate;
        if short(candidate, free, stays, &config.thresholds) {
            state = state.max(candidate);
        }
    }
    if config.control.safety.has(SafetyRule::Burst)
        && uncovered(ledger, held && before > HostState::Green)
    {
        state = state.max(HostState::Yellow);
    }
    state
}

fn short(state: HostState, free: Fraction, stays: bool, thresholds: &Thresholds) -> bool {
    thresholds
        .band(state)
        .is_some_and(|band| free < band.enter || stays && free <= band.leave)
}

/// The state that memory pressure demands. A state begins at its value, and ends at half of it or after [`HELD_MS`]
/// below its value, because a host that is busy with other work may have a little pressure forever.
///
/// Pressure on a host with spare memory, without any sign of it in a VM or in the host's swap, is not caused by VMs.
/// After [`FOREIGN_MS`], during which taking memory has not helped, it is ignored.
pub(super) fn pressed_by(
    memory: &mut PressureMemory,
    inventory: &Inventory,
    views: &[View<'_>],
    config: &Config,
) -> HostState {
    let (host, now_ms) = (&inventory.host, inventory.now_ms);
    let thresholds = &config.thresholds;
    let free = host.free_fraction(config.reserve(host.limit()));
    let asked = asked(memory, host, free, now_ms, config);
    let swaps = host.swap_in_per_s > Bytes::ZERO || host.swap_out_per_s > Bytes::ZERO;
    let shows = views
        .iter()
        .any(|view| view.memory.suffering || refaulting(&view.memory));
    if asked == HostState::Green || swaps || shows || free <= thresholds.yellow.leave {
        memory.foreign_since_ms = None;
        return asked;
    }
    memory.foreign_since_ms.get_or_insert(now_ms);
    if memory.is_foreign(now_ms) {
        HostState::Green
    } else {
        asked
    }
}

impl PressureMemory {
    /// Whether pressure is considered foreign.
    pub(super) fn is_foreign(&self, now_ms: u64) -> bool {
        self.foreign_since_ms
            .is_some_and(|since_ms| now_ms >= since_ms + FOREIGN_MS)
    }
}

fn asked(
    memory: &mut PressureMemory,
    host: &HostFacts,
    free: Fraction,
    now_ms: u64,
    config: &Config,
) -> HostState {
    let pressure = host.pressure.some_avg10 / 100.0;
    let held = config.control.safety.has(SafetyRule::DeadBand);
    let counts = free < config.thresholds.pressure_below;
    let mut asked = HostState::Green;
    for (index, candidate) in [HostState::Yellow, HostState::Orange, HostState::Red]
        .into_iter()
        .enumerate()
    {
        let enter = config.thresholds.pressure[index].0;
        let above_at_ms = &mut memory.above_at_ms[index];
        if counts && pressure > enter {
            *above_at_ms = Some(now_ms);
        } else if !counts || !held || pressure <= enter / 2.0 {
            *above_at_ms = None;
        }
        if above_at_ms.is_some_and(|at_ms| now_ms < at_ms + HELD_MS) {
            asked = candidate;
        }
    }
    asked
}

fn uncovered(ledger: &Ledger, stays: bool) -> bool {
    let factor = if stays { BURST_LEAVE } else { 1.0 };
    ledger.burst > Bytes::ZERO && ledger.available - ledger.granted < ledger.burst.scale(factor)
}

#[cfg(test)]
mod tests {
    use strum::VariantArray as _;

    use super::*;
    use crate::model::{Amount, Pressure};

    /// The state after one plan of a host with this much free memory and this pressure.
    fn at(before: HostState, free_percent: u64, some_avg10: f64) -> HostState {
        let mut memory = PressureMemory {
            above_at_ms: HostState::VARIANTS[1..]
                .iter()
                .map(|state| (before >= *state).then_some(0))
                .collect::<Vec<_>>()
                .try_into()
                .unwrap(),
            ..PressureMemory::default()
        };
        after(&mut memory, before, 1000, free_percent, some_avg10)
    }

    fn after(
        memory: &mut PressureMemory,
        before: HostState,
        now_ms: u64,
        free_percent: u64,
        some_avg10: f64,
    ) -> HostState {
        let mut config = Config::default();
        config.host.reserve = Amount::Bytes(Bytes::ZERO);
        let inventory = Inventory {
            now_ms,
            host: HostFacts {
                total: Bytes::gib(100),
                available: Bytes::gib(free_percent),
                pressure: Pressure {
                    some_avg10,
                    ..Pressure::default()
                },
                ..HostFacts::default()
            },
            ..Inventory::default()
        };
        let ledger = Ledger::of(&inventory, Bytes::ZERO, Bytes::ZERO, Bytes::ZERO);
        let pressed = pressed_by(memory, &inventory, &[], &config);
        next(before, pressed, &ledger, &config)
    }

    #[test]
    fn pressure_just_above_half_ends_its_state_in_time() {
        let mut memory = PressureMemory::default();
        let mut state = after(&mut memory, HostState::Green, 0, 48, 1.5);
        assert_eq!(state, HostState::Yellow);
        let mut left_at_ms = None;
        for now_ms in (2000..7_200_000).step_by(2000) {
            state = after(&mut memory, state, now_ms, 48, 0.7);
            if state == HostState::Green {
                left_at_ms.get_or_insert(now_ms);
            } else {
                assert_eq!(left_at_ms, None, "entered again at {now_ms}");
            }
        }
        assert_eq!(left_at_ms, Some(HELD_MS));
    }

    #[test]
    fn pressure_that_no_vm_shows_counts_for_a_while_only() {
        let mut memory = PressureMemory::default();
        let mut state = HostState::Green;
        for now_ms in (0..=FOREIGN_MS).step_by(2000) {
            state = after(&mut memory, state, now_ms, 40, 30.0);
            assert_eq!(state == HostState::Red, now_ms < FOREIGN_MS, "{now_ms}");
        }
        assert!(memory.is_foreign(FOREIGN_MS));
        // A host that runs out of memory is red, regardless of the source of pressure.
        assert_eq!(
            after(&mut memory, state, FOREIGN_MS + 2000, 4, 30.0),
            HostState::Red
        );
    }

    #[test]
    fn states_are_entered_below_their_values() {
        let states = [30, 19, 9, 4].map(|free| at(HostState::Green, free, 0.0));
        assert_eq!(states.as_slice(), HostState::VARIANTS);
    }

    #[test]
    fn states_are_left_above_their_values_only() {
        assert_eq!(at(HostState::Yellow, 23, 0.0), HostState::Yellow);
        assert_eq!(at(HostState::Yellow, 26, 0.0), HostState::Green);
        assert_eq!(at(HostState::Red, 7, 0.0), HostState::Red);
        assert_eq!(at(HostState::Red, 12, 0.0), HostState::Orange);
        assert_eq!(at(HostState::Red, 90, 0.0), HostState::Green);
    }

    #[test]
    fn pressure_counts_only_where_memory_is_not_plenty() {
        assert_eq!(at(HostState::Green, 40, 30.0), HostState::Red);
        assert_eq!(at(HostState::Green, 40, 0.5), HostState::Green);
        assert_eq!(at(HostState::Yellow, 40, 0.6), HostState::Yellow);
        assert_eq!(at(HostState::Green, 60, 30.0), HostState::Green);
    }

    #[test]
    fn burst_without_cover_begins_yellow() {
        let mut ledger = Ledger {
            usable: Bytes::gib(100),
            available: Bytes::gib(40),
            burst: Bytes::gib(41),
            ..Ledger::default()
        };
        let next = |before, ledger: &Ledger| {
            super::next(before, HostState::Green, ledger, &Config::default())
        };
        assert_eq!(next(HostState::Green, &ledger), HostState::Yellow);
        ledger.burst = Bytes::gib(35);
        assert_eq!(next(HostState::Green, &ledger), HostState::Green);
        assert_eq!(next(HostState::Yellow, &ledger), HostState::Yellow);
    }
}
