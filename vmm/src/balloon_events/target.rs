//! Events of the balloon itself: target reached, guest stuck, discards failed.
//!
//! Figures are evaluated once per second, and no guest can cause more than one event of a kind per second. A target is
//! reported as reached once, and a guest as stuck once per [`STUCK_MS`]. Failures are accumulated and reported once per
//! [`FAILED_REST_MS`].

use crate::events::EventKind;

/// A guest that makes no progress towards its target for this long is stuck. Inflating in 4 KiB pages reaches hundreds
/// of MiB per second, and a guest under load still makes some progress. A booting guest may need this long to load its
/// driver.
const STUCK_MS: u64 = 30_000;
/// Minimum time between two reports of failed discards.
const FAILED_REST_MS: u64 = 60_000;

/// The balloon at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BalloonFigures {
    /// The generation of the machine. Figures start from zero with each new machine.
    pub(super) machine: u64,
    /// False while the guest cannot make progress because its machine is paused.
    pub(super) running: bool,
    pub(super) target_bytes: u64,
    pub(super) actual_bytes: u64,
    /// Bytes that the host's kernel failed to discard since the machine was created.
    pub(super) failed_bytes: u64,
}

/// The figures seen and the events reported.
#[derive(Clone, Copy, Debug)]
pub(super) struct BalloonWatch {
    last: BalloonFigures,
    /// The target was set and has not been reached since.
    pending: bool,
    /// The smallest distance to the target so far, bytes. Moving back and forth is not progress.
    distance_bytes_min: u64,
    /// The time of the last progress, or the last time at which progress was impossible.
    progress_at_ms: u64,
    /// It has been reported as stuck.
    stuck_reported: bool,
    failed_bytes_reported: u64,
    failed_reported_at_ms: Option<u64>,
}

impl BalloonWatch {
    /// The first figures of a machine. A balloon without a target set has not reached one.
    pub(super) fn new(now_ms: u64, figures: BalloonFigures) -> Self {
        let distance = figures.target_bytes.abs_diff(figures.actual_bytes);
        Self {
            last: figures,
            pending: figures.target_bytes != 0 || distance != 0,
            distance_bytes_min: distance,
            progress_at_ms: now_ms,
            stuck_reported: false,
            failed_bytes_reported: 0,
            failed_reported_at_ms: None,
        }
    }

    /// Evaluates the current figures.
    pub(super) fn step(&mut self, now_ms: u64, figures: BalloonFigures) -> Vec<EventKind> {
        if figures.machine != self.last.machine {
            *self = Self::new(now_ms, figures);
        }
        let events = [self.target(now_ms, figures), self.failures(now_ms, figures)];
        self.last = figures;
        events.into_iter().flatten().collect()
    }

    fn target(&mut self, now_ms: u64, figures: BalloonFigures) -> Option<EventKind> {
        let BalloonFigures {
            target_bytes,
            actual_bytes,
            ..
        } = figures;
        let distance = target_bytes.abs_diff(actual_bytes);
        if target_bytes != self.last.target_bytes {
            self.pending = true;
            self.stuck_reported = false;
            self.distance_bytes_min = distance;
            self.progress_at_ms = now_ms;
        }
        if !self.pending {
            return None;
        }
        if distance == 0 {
            self.pending = false;
            return Some(EventKind::BalloonTargetReached { target_bytes });
        }
        if distance < self.distance_bytes_min || !figures.running {
            self.stuck_reported &= distance >= self.distance_bytes_min;
            self.distance_bytes_min = distance.min(self.distance_bytes_min);
            self.progress_at_ms = now_ms;
            return None;
        }
        let stuck_ms = now_ms.saturating_sub(self.progress_at_ms);
        if stuck_ms < STUCK_MS || self.stuck_reported {
            return None;
        }
        self.stuck_reported = true;
        Some(EventKind::BalloonStuck {
            target_bytes,
            actual_bytes,
            stuck_ms,
        })
    }

    fn failures(&mut self, now_ms: u64, figures: BalloonFigures) -> Option<EventKind> {
        let new_bytes = figures
            .failed_bytes
            .saturating_sub(self.failed_bytes_reported);
        let resting = self
            .failed_reported_at_ms
            .is_some_and(|at_ms| now_ms.saturating_sub(at_ms) < FAILED_REST_MS);
        if new_bytes == 0 || resting {
            return None;
        }
        self.failed_bytes_reported = figures.failed_bytes;
        self.failed_reported_at_ms = Some(now_ms);
        Some(EventKind::DiscardFailed {
            failed_bytes: figures.failed_bytes,
            new_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn figures(target_bytes: u64, actual_bytes: u64) -> BalloonFigures {
        BalloonFigures {
            machine: 1,
            running: true,
            target_bytes,
            actual_bytes,
            failed_bytes: 0,
        }
    }

    fn watch(first: BalloonFigures) -> BalloonWatch {
        BalloonWatch::new(0, first)
    }

    #[test]
    fn target_reached_is_told_once_for_each_target() {
        let mut watch = watch(figures(0, 0));
        assert_eq!(watch.step(0, figures(0, 0)), []);
        assert_eq!(watch.step(1000, figures(8, 0)), []);
        let reached = |target_bytes| [EventKind::BalloonTargetReached { target_bytes }];
        assert_eq!(watch.step(2000, figures(8, 8)), reached(8));
        // The guest deflated and inflated again: no target was set.
        assert_eq!(watch.step(3000, figures(8, 4)), []);
        assert_eq!(watch.step(4000, figures(8, 8)), []);
        // Set and reached between two evaluations.
        assert_eq!(watch.step(5000, figures(2, 2)), reached(2));
    }

    #[test]
    fn target_of_the_next_machine_is_told_anew() {
        let mut watch = watch(figures(8, 8));
        assert_eq!(watch.step(0, figures(8, 8)).len(), 1);
        let next = |actual| BalloonFigures {
            machine: 2,
            ..figures(8, actual)
        };
        assert_eq!(watch.step(1000, next(0)), []);
        assert_eq!(watch.step(2000, next(8)).len(), 1);
    }

    #[test]
    fn guest_that_comes_no_nearer_is_stuck_once_until_it_does() {
        let mut watch = watch(figures(8, 0));
        assert_eq!(watch.step(STUCK_MS - 1, figures(8, 0)), []);
        let stuck = EventKind::BalloonStuck {
            target_bytes: 8,
            actual_bytes: 0,
            stuck_ms: STUCK_MS,
        };
        assert_eq!(watch.step(STUCK_MS, figures(8, 0)), [stuck]);
        assert_eq!(watch.step(10 * STUCK_MS, figures(8, 0)), []);
        assert_eq!(watch.step(11 * STUCK_MS, figures(8, 1)), []);
        assert_eq!(watch.step(12 * STUCK_MS, figures(8, 0)).len(), 1);
        assert_eq!(watch.step(13 * STUCK_MS, figures(8, 8)).len(), 1);
    }

    #[test]
    fn guest_that_is_paused_is_not_stuck() {
        let paused = BalloonFigures {
            running: false,
            ..figures(8, 0)
        };
        let mut watch = watch(paused);
        assert_eq!(watch.step(2 * STUCK_MS, paused), []);
        assert_eq!(watch.step(3 * STUCK_MS - 1, figures(8, 0)), []);
        assert_eq!(watch.step(3 * STUCK_MS, figures(8, 0)).len(), 1);
    }

    #[test]
    fn failures_are_added_up_while_they_rest() {
        let failed = |failed_bytes| BalloonFigures {
            failed_bytes,
            ..figures(0, 0)
        };
        let told = |failed_bytes, new_bytes| {
            [EventKind::DiscardFailed {
                failed_bytes,
                new_bytes,
            }]
        };
        let mut watch = watch(failed(3));
        assert_eq!(watch.step(0, failed(3)), told(3, 3));
        assert_eq!(watch.step(1000, failed(5)), []);
        assert_eq!(watch.step(FAILED_REST_MS, failed(9)), told(9, 6));
        assert_eq!(watch.step(9 * FAILED_REST_MS, failed(9)), []);
    }

    proptest! {
        /// For any behaviour of the guest, each evaluation yields at most one event per kind, and stuck guests and
        /// failures are reported no more often than their intervals allow.
        #[test]
        fn events_of_any_guest_are_bounded(
            targets in prop::collection::vec((0u64..3, 0u64..200), 1..8),
            actuals in prop::collection::vec(0u64..200, 1..400),
        ) {
            let mut watch = watch(figures(0, 0));
            let (mut now_ms, mut reached, mut stuck, mut failed) = (0, 0, 0, 0);
            let mut targets_seen = 0;
            let mut last_target = (1, 0);
            for (look, actual) in actuals.iter().enumerate() {
                now_ms += 1000;
                let (machine, target) = targets[look * targets.len() / actuals.len()];
                targets_seen += u64::from(last_target != (machine, target));
                last_target = (machine, target);
                let events = watch.step(now_ms, BalloonFigures {
                    machine,
                    failed_bytes: look as u64,
                    ..figures(target, *actual)
                });
                prop_assert!(events.len() <= 2);
                for event in events {
                    match event {
                        EventKind::BalloonTargetReached { .. } => reached += 1,
                        EventKind::BalloonStuck { .. } => stuck += 1,
                        EventKind::DiscardFailed { .. } => failed += 1,
                        other => unreachable!("{other:?} is no event of a target"),
                    }
                }
            }
            prop_assert!(reached <= targets_seen);
            prop_assert!(stuck <= now_ms / STUCK_MS);
            prop_assert!(failed <= now_ms / FAILED_REST_MS + 1 + targets_seen);
        }
    }
}
