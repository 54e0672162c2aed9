//! A rate over the recent past.

use std::time::Instant;

/// Length of the window in whole seconds.
const WINDOW_SECONDS: u64 = 10;
/// The seconds of the window, plus the current one.
const SLOTS: u64 = WINDOW_SECONDS + 1;

/// Bytes per second over the last few seconds.
#[derive(Clone, Debug)]
pub struct RateWindow {
    start: Instant,
    /// Seconds from `start` to the newest slot.
    newest: u64,
    slots: [u64; SLOTS as usize],
}

impl Default for RateWindow {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            newest: 0,
            slots: [0; SLOTS as usize],
        }
    }
}

impl RateWindow {
    pub(super) fn add(&mut self, now: Instant, bytes: u64) {
        self.move_to(self.second(now));
        let slot = &mut self.slots[slot_of(self.newest)];
        *slot = slot.saturating_add(bytes);
    }

    /// Mean over the window's whole seconds, without the current one.
    #[must_use]
    pub fn bytes_per_second(&self, now: Instant) -> u64 {
        let mut window = self.clone();
        window.move_to(self.second(now));
        let filling = slot_of(window.newest);
        let whole = window.slots.iter().enumerate();
        let bytes = whole
            .filter(|(at, _)| *at != filling)
            .map(|(_, bytes)| bytes);
        bytes.fold(0_u64, |sum, bytes| sum.saturating_add(*bytes)) / WINDOW_SECONDS
    }

    fn second(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs()
    }

    /// Clears slots that have left the window. A clock that runs backwards changes nothing.
    fn move_to(&mut self, second: u64) {
        for gone in (self.newest + 1..=second).take(SLOTS as usize) {
            self.slots[slot_of(gone)] = 0;
        }
        // After a gap longer than the window all slots are cleared, in any order.
        self.newest = self.newest.max(second);
    }
}

fn slot_of(second: u64) -> usize {
    usize::try_from(second % SLOTS).expect("less than eleven")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(window: &RateWindow, millis: u64) -> Instant {
        window.start + Duration::from_millis(millis)
    }

    #[test]
    fn rate_is_the_mean_of_whole_seconds_and_falls_back_to_zero() {
        let mut window = RateWindow::default();
        window.add(at(&window, 100), 600);
        window.add(at(&window, 999), 400);
        window.add(at(&window, 2_500), 9_000);
        for (millis, rate) in [
            (2_999, 100),
            (3_000, 1_000),
            (10_999, 1_000),
            (11_000, 900),
            (13_000, 0),
            (1_000_000_000, 0),
        ] {
            let now = at(&window, millis);
            assert_eq!(window.bytes_per_second(now), rate, "{millis} ms");
        }
    }

    #[test]
    fn window_left_alone_for_long_starts_anew() {
        let mut window = RateWindow::default();
        for second in 0..11 {
            window.add(at(&window, second * 1_000), 10);
        }
        window.add(at(&window, 3_600_000), 50);
        assert_eq!(window.bytes_per_second(at(&window, 3_601_000)), 5);
        // With a clock that runs backwards, bytes count in the newest slot.
        window.add(at(&window, 0), 50);
        assert_eq!(window.bytes_per_second(at(&window, 3_601_000)), 10);
    }
}
