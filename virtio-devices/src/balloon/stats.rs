//! Guest memory statistics (virtio 1.2 §5.5.6.3): tags, and requests for a fresh set.
//!
//! The driver provides one statistics buffer when it starts. The device keeps the buffer, and requests a new set by
//! returning it:
//!
//! ```text
//!            request            buffer returned            buffer comes back
//!   parked ──────────► wanted ──────────────────► with guest ──────────────► parked
//!                                                      │                (callers wake)
//!                                    deadline passes: the caller gives up; the
//!                                    request stays pending and serves the next caller
//! ```
//!
//! A timer requests statistics in the same way, without waiting (see [`super::BalloonHandle::set_stats_poll`]).
//!
//! Only callers wait, on their own threads and with their own deadlines; the worker and the VMM's control loop never
//! do. A guest that never responds leaves one request pending, regardless of the number of callers.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

use device_facts::{BalloonStats, GuestReporting};

use super::accounting::GuestFaults;
use crate::Unpoisoned;

/// Maximum number of bytes read from a statistics buffer: space for 409 tags of ten bytes.
pub(super) const STATS_BYTES_MAX: usize = 4096;

/// An entry is a packed `{ le16 tag; le64 value; }`.
const ENTRY_BYTES: usize = 10;

/// One set of statistics. These are the guest's claims and may be wrong: only the guest's own performance may depend on
/// them.
#[derive(Clone, Copy, Debug)]
pub struct StatsSample {
    /// The statistics of the standard.
    pub stats: BalloonStats,
    /// Statistics from the guest patches (`guest-patches/README.md`) about reporting.
    pub reporting: GuestReporting,
    /// When the buffer arrived.
    pub taken: Instant,
}

impl StatsSample {
    /// `private`: whether the driver may send the tags of [`GuestReporting`].
    pub(super) fn parse(
        bytes: &[u8],
        taken: Instant,
        private: bool,
        faults: &mut GuestFaults,
    ) -> Self {
        let mut sample = Self {
            stats: BalloonStats::default(),
            reporting: GuestReporting::default(),
            taken,
        };
        let entries = bytes.chunks_exact(ENTRY_BYTES);
        if !entries.remainder().is_empty() {
            faults.stats_ragged += 1;
        }
        for entry in entries {
            let (tag, value) = entry.split_at(2);
            let tag = u16::from_le_bytes(tag.try_into().expect("split at two"));
            let value = u64::from_le_bytes(value.try_into().expect("ten less two"));
            if !(sample.stats.set(tag, value) || private && sample.reporting.set(tag, value)) {
                faults.stats_unknown_tags += 1;
            }
        }
        sample
    }
}

/// Reasons why there is no fresh sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatsError {
    /// No driver, or one without a statistics queue.
    #[error("the guest has no balloon driver that sends statistics")]
    NotNegotiated,
    /// The guest has not refilled the buffer before the deadline.
    #[error("the guest has not sent statistics in time")]
    TimedOut,
    /// The driver was reset during the wait.
    #[error("the guest has reset its balloon driver")]
    Reset,
}

/// State shared by callers and the worker.
#[derive(Debug, Default)]
pub(super) struct StatsCell {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    latest: Option<StatsSample>,
    /// A driver with a statistics queue is running.
    active: bool,
    /// A fresh sample is requested.
    wanted: bool,
    /// Counts samples, so that a waiting caller recognises a new one.
    arrivals: u64,
    /// Counts resets, so that a waiting caller recognises one.
    resets: u64,
}

impl StatsCell {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change consists of a few plain stores, which cannot panic.
        self.state.lock().unpoisoned()
    }

    pub(super) fn latest(&self) -> Option<StatsSample> {
        self.lock().latest
    }

    /// Waits for a fresh sample until `deadline`; `wake` wakes the worker and is called only if no request is pending.
    pub(super) fn request(
        &self,
        deadline: Instant,
        wake: impl FnOnce(),
    ) -> Result<StatsSample, StatsError> {
        let mut state = self.lock();
        if !state.active {
            return Err(StatsError::NotNegotiated);
        }
        let (arrivals, resets) = (state.arrivals, state.resets);
        if !state.wanted {
            state.wanted = true;
            wake();
        }
        let patience = deadline.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, patience, |state| {
            state.arrivals == arrivals && state.resets == resets
        });
        let (state, _) = waited.unpoisoned();
        if state.resets != resets {
            Err(StatsError::Reset)
        } else if state.arrivals != arrivals {
            state.latest.ok_or(StatsError::Reset)
        } else {
            Err(StatsError::TimedOut)
        }
    }

    /// Requests a sample without waiting. Has no effect without a driver that sends statistics, or while a request is
    /// pending.
    pub(super) fn want(&self) {
        let mut state = self.lock();
        state.wanted |= state.active;
    }

    /// Whether the worker should return the parked buffer.
    pub(super) fn is_wanted(&self) -> bool {
        self.lock().wanted
    }

    pub(super) fn publish(&self, sample: StatsSample) {
        let mut state = self.lock();
        state.latest = Some(sample);
        state.wanted = false;
        state.arrivals += 1;
        self.changed.notify_all();
    }

    pub(super) fn activate(&self) {
        self.lock().active = true;
    }

    /// Clears the driver's data, including the last sample, because its kernel is gone.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.active = false;
        state.wanted = false;
        state.latest = None;
        state.resets += 1;
        self.changed.notify_all();
    }
}
