//! The host's state, from its facts and the state before.

use crate::config::{Config, Thresholds};
use crate::model::{Bytes, Fraction, HostFacts, HostState, Ledger};

/// Available memory beyond the burst that ends the state that a burst began, as a factor on the burst.
pub(super) const BURST_LEAVE: f64 = 1.25;

/// The next state: the worst that any of the three signals asks for. Each has its own dead band: it asks for a state
/// from `enter` on, and goes on asking until `leave` if the host is in that state or a worse one.
pub(super) fn next(
    before: HostState,
    host: &HostFacts,
    ledger: &Ledger,
    config: &Config,
) -> HostState {
    let free = Fraction(ledger.available.ratio(ledger.usable));
    let held = config.control.safety.dead_band;
    let mut state = HostState::Green;
    for candidate in [HostState::Yellow, HostState::Orange, HostState::Red] {
        let stays = held && before >= candidate;
        if short(candidate, free, stays, &config.thresholds)
            || pressed(candidate, host, free, stays, &config.thresholds)
        {
            state = candidate;
        }
    }
    if config.control.safety.burst && uncovered(ledger, held && before > HostState::Green) {
        state = state.max(HostState::Yellow);
    }
    state
}

fn short(state: HostState, free: Fraction, stays: bool, thresholds: &Thresholds) -> bool {
    thresholds
        .band(state)
        .is_some_and(|band| free < band.enter || stays && free <= band.leave)
}

fn pressed(
    state: HostState,
    host: &HostFacts,
    free: Fraction,
    stays: bool,
    thresholds: &Thresholds,
) -> bool {
    let enter = match state {
        HostState::Green => return false,
        HostState::Yellow => thresholds.pressure[0],
        HostState::Orange => thresholds.pressure[1],
        HostState::Red => thresholds.pressure[2],
    };
    let pressure = host.pressure.some_avg10 / 100.0;
    let value = if stays { enter.0 / 2.0 } else { enter.0 };
    free < thresholds.pressure_below && pressure > value
}

fn uncovered(ledger: &Ledger, stays: bool) -> bool {
    let factor = if stays { BURST_LEAVE } else { 1.0 };
    ledger.burst > Bytes::ZERO && ledger.available - ledger.granted < ledger.burst.scale(factor)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Pressure;

    fn at(before: HostState, free_percent: u64, some_avg10: f64) -> HostState {
        let ledger = Ledger {
            usable: Bytes::gib(100),
            available: Bytes::gib(free_percent),
            ..Ledger::default()
        };
        let host = HostFacts {
            pressure: Pressure {
                some_avg10,
                ..Pressure::default()
            },
            ..HostFacts::default()
        };
        next(before, &host, &ledger, &Config::default())
    }

    #[test]
    fn states_are_entered_below_their_values() {
        let states = [30, 19, 9, 4].map(|free| at(HostState::Green, free, 0.0));
        assert_eq!(states, HostState::ALL);
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
            super::next(before, &HostFacts::default(), ledger, &Config::default())
        };
        assert_eq!(next(HostState::Green, &ledger), HostState::Yellow);
        ledger.burst = Bytes::gib(35);
        assert_eq!(next(HostState::Green, &ledger), HostState::Green);
        assert_eq!(next(HostState::Yellow, &ledger), HostState::Yellow);
    }
}
