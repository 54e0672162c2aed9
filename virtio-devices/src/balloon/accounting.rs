//! Counts the balloon's work.
//!
//! The worker updates the counters once per batch, and API threads read them. Each set has its own mutex, which is held
//! only for a copy and never across a system call on guest memory. Snapshots are therefore consistent: within a path,
//! the requested amount is exactly the sum of discarded, failed and skipped.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::latency::LatencyHistogram;
use super::rate::RateWindow;
use crate::Unpoisoned;
use crate::reclaim::{Extent, Outcome, SkippedBytes};

/// All memory that arrived by one path: reporting, inflation or hinting.
#[derive(Clone, Debug, Default)]
pub struct PathFigures {
    /// The guest's claims, gross: a range reported twice counts twice. A run of adjacent page frame numbers in an
    /// inflate chain counts as one range.
    pub requested: Extent,
    /// Memory discarded.
    pub discarded: Extent,
    /// The part of it in blocks of huge pages that were not discarded completely, since this device was made.
    pub partial_bytes: u64,
    /// Memory that the host kernel failed to discard.
    pub failed: Extent,
    /// Memory not discarded on purpose, by reason.
    pub skipped: SkippedBytes,
    /// Descriptor chains completed.
    pub chains: u64,
    /// Batches processed; one batch may serve several chains.
    pub batches: u64,
    /// System calls that discard.
    pub syscalls: u64,
    /// Time from taking the first chain of a batch to completing the last one.
    pub latency: LatencyHistogram,
    /// The recent rate at which memory was discarded.
    pub rate: RateWindow,
    /// The most recent batch.
    pub last: Option<LastBatch>,
}

/// The most recent batch of a path.
#[derive(Clone, Copy, Debug)]
pub struct LastBatch {
    /// The time of its completion.
    pub at: Instant,
    /// The guest's claims.
    pub requested: Extent,
    /// Memory discarded.
    pub discarded: Extent,
    /// Its duration.
    pub took_us: u64,
}

impl PathFigures {
    pub(super) fn record(&mut self, outcome: &Outcome, chains: u64, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.requested.add_all(outcome.requested);
        self.discarded.add_all(outcome.discarded);
        self.partial_bytes = self.partial_bytes.saturating_add(outcome.partial_bytes);
        self.failed.add_all(outcome.failed);
        self.skipped.add_all(&outcome.skipped);
        self.chains += chains;
        self.batches += 1;
        self.syscalls += outcome.syscalls;
        self.latency.record(took_us);
        let now = Instant::now();
        self.rate.add(now, outcome.discarded.bytes);
        self.last = Some(LastBatch {
            at: now,
            requested: outcome.requested,
            discarded: outcome.discarded,
            took_us,
        });
    }
}

/// All figures of one balloon since its creation; device resets do not clear them.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    report: Mutex<PathFigures>,
    inflate: Mutex<PathFigures>,
    hint: Mutex<PathFigures>,
    deflate: Mutex<Extent>,
    faults: Mutex<GuestFaults>,
}

/// The paths by which memory returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Path {
    Report,
    Inflate,
    Hint,
}

impl Ledger {
    pub(super) fn path(&self, path: Path) -> MutexGuard<'_, PathFigures> {
        lock(match path {
            Path::Report => &self.report,
            Path::Inflate => &self.inflate,
            Path::Hint => &self.hint,
        })
    }

    /// Chains and bytes that the guest took back.
    pub(super) fn deflate(&self) -> MutexGuard<'_, Extent> {
        lock(&self.deflate)
    }

    pub(super) fn faults(&self) -> MutexGuard<'_, GuestFaults> {
        lock(&self.faults)
    }
}

/// The figures are consistent after every update, so a thread that panicked while it held the lock left valid figures.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unpoisoned()
}

/// Declares the faults and, from the same list, their names in `vm.counters`.
macro_rules! guest_faults {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Actions that a well-behaved driver never takes. The device contains each of them.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct GuestFaults {
            $($(#[$doc])* pub $name: u64,)+
        }

        impl GuestFaults {
            /// Each fault with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }

            /// Sets the fault with this name; false if there is none.
            pub(super) fn set(&mut self, name: &str, count: u64) -> bool {
                match name {
                    $(stringify!($name) => self.$name = count,)+
                    _ => return false,
                }
                true
            }

            pub(super) fn add_all(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)+
            }
        }
    };
}

guest_faults! {
    /// Buffers of the wrong direction: writable page frame numbers or statistics, or reported ranges that the device
    /// may not write to.
    descriptors_wrong_direction,
    /// Descriptors of length zero.
    descriptors_empty,
    /// Buffers outside of RAM.
    descriptors_unreadable,
    /// Chains with more descriptors or bytes than the device reads; the rest was ignored.
    chains_too_long,
    /// Chains that loop, continue outside of the table, or add up to more than 4 GiB. The part before the defect was
    /// used.
    chains_without_end,
    /// Chains without a usable descriptor.
    chains_empty,
    /// Chains whose head does not exist; they cannot be completed.
    chains_without_head,
    /// Lists of page frame numbers that end within a number.
    page_lists_ragged,
    /// Statistics buffers that end within an entry.
    stats_ragged,
    /// Statistics with an undefined tag; skipped. Newer drivers may send such tags.
    stats_unknown_tags,
    /// Statistics buffers sent while another one was still waiting.
    stats_surplus_buffers,
    /// Hinting commands that are not a number of four bytes.
    hint_commands_malformed,
    /// Hinting commands with an id that the host does not request. A driver that is overtaken by a new request sends
    /// one.
    hint_commands_not_asked_for,
    /// Enabled queues that no negotiated feature explains.
    queues_unexplained,
    /// Writes to the configuration space that do not match a writable field exactly.
    config_writes_ignored,
    /// Fields of the reporting policy that acknowledge an unknown request, or have an invalid value.
    policy_words_invalid,
    /// Chains of reports that arrived after the driver had confirmed that it sends none.
    reports_while_paused,
    /// Number of times `actual` named more memory than the guest has.
    actual_beyond_ram,
}
