//! Guest memory statistics (virtio 1.2 §5.5.6.3): tags, and asking for a fresh set.
//!
//! The driver hands the device one buffer of statistics at start. The device
//! keeps it, and by returning it asks for a new one:
//!
//! ```text
//!            request            buffer returned            buffer comes back
//!   parked ──────────► wanted ──────────────────► with guest ──────────────► parked
//!                                                      │                (callers wake)
//!                                    deadline passes: the caller gives up, the
//!                                    request stands and serves the next caller
//! ```
//!
//! A timer asks as callers do, without waiting (see [`super::BalloonHandle::set_stats_poll`]).
//!
//! Only the caller waits, on its own thread and with its own deadline; the
//! worker and the VMM's control loop never do. A guest that never answers
//! leaves one request standing, however many callers come.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

use device_facts::{BalloonStats, GuestReporting};

use super::accounting::GuestFaults;
use crate::Unpoisoned;

/// Bytes of a statistics buffer looked at: room for 409 tags of ten bytes.
pub(super) const STATS_BYTES_MAX: usize = 4096;

/// An entry is a packed `{ le16 tag; le64 value; }`.
const ENTRY_BYTES: usize = 10;

/// One set of statistics. What the guest says, not what is: never trust it with
/// more than the guest's own comfort.
#[derive(Clone, Copy, Debug)]
pub struct StatsSample {
    /// The statistics of the standard.
    pub stats: BalloonStats,
    /// What the in-guest half (`guest-patches/README.md`) says of its reporting.
    pub reporting: GuestReporting,
    /// When the buffer arrived.
    pub taken: Instant,
}

impl StatsSample {
    /// `private`: the driver may send the tags of [`GuestReporting`].
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

/// Why there is no fresh sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatsError {
    /// No driver, or one without a statistics queue.
    #[error("the guest has no balloon driver that sends statistics")]
    NotNegotiated,
    /// The guest has not refilled the buffer before the deadline.
    #[error("the guest has not sent statistics in time")]
    TimedOut,
    /// The driver was reset while we waited.
    #[error("the guest has reset its balloon driver")]
    Reset,
}

/// Where callers and the worker meet.
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
    /// Somebody wants a fresh sample.
    wanted: bool,
    /// Counts samples, so that a waiting caller notices his.
    arrivals: u64,
    /// Counts resets, so that a waiting caller notices one.
    resets: u64,
}

impl StatsCell {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is a few plain stores that cannot panic.
        self.state.lock().unpoisoned()
    }

    pub(super) fn latest(&self) -> Option<StatsSample> {
        self.lock().latest
    }

    /// Waits for a fresh sample until `deadline`; `wake` tells the worker and is
    /// called only if no request is standing.
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

    /// Asks for a sample that nobody waits for. Nothing happens without a driver
    /// that sends any, or while a request stands.
    pub(super) fn want(&self) {
        let mut state = self.lock();
        state.wanted |= state.active;
    }

    /// Whether the worker should return the buffer it has parked.
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

    /// Forgets the driver, and with it the last sample: it is of a kernel that is gone.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.active = false;
        state.wanted = false;
        state.latest = None;
        state.resets += 1;
        self.changed.notify_all();
    }
}
