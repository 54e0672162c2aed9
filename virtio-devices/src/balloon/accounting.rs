//! What the balloon has done, in figures.
//!
//! Written by the worker once per batch and read by API threads, each set under
//! a mutex of its own that is held for a copy and never across a system call on
//! guest memory. So a snapshot is consistent: within a path, what was requested
//! is exactly what was discarded, failed and skipped.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::latency::LatencyHistogram;
use super::rate::RateWindow;
use crate::Unpoisoned;
use crate::reclaim::{Extent, Outcome, SkippedBytes};

/// Everything that came in by one way: reporting, inflation or hinting.
#[derive(Clone, Debug, Default)]
pub struct PathFigures {
    /// As the guest claimed it, gross: a range reported twice counts twice. A run
    /// of adjacent page numbers in an inflate chain counts as one range.
    pub requested: Extent,
    /// Given back to the host.
    pub discarded: Extent,
    /// The host's kernel refused.
    pub failed: Extent,
    /// Not tried, by reason.
    pub skipped: SkippedBytes,
    /// Descriptor chains answered.
    pub chains: u64,
    /// Batches worked off; one batch may serve several chains.
    pub batches: u64,
    /// System calls that discard.
    pub syscalls: u64,
    /// From taking the first chain of a batch to having answered the last one.
    pub latency: LatencyHistogram,
    /// How fast memory has been given back lately.
    pub rate: RateWindow,
    /// The most recent batch.
    pub last: Option<LastBatch>,
}

/// The most recent batch of a path.
#[derive(Clone, Copy, Debug)]
pub struct LastBatch {
    /// When it was answered.
    pub at: Instant,
    /// As the guest claimed it.
    pub requested: Extent,
    /// Given back to the host.
    pub discarded: Extent,
    /// How long it took.
    pub took_us: u64,
}

impl PathFigures {
    pub(super) fn record(&mut self, outcome: &Outcome, chains: u64, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.requested.add_all(outcome.requested);
        self.discarded.add_all(outcome.discarded);
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

/// All figures of one balloon, from its creation on; resets of the device do not clear them.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    report: Mutex<PathFigures>,
    inflate: Mutex<PathFigures>,
    hint: Mutex<PathFigures>,
    deflate: Mutex<Extent>,
    faults: Mutex<GuestFaults>,
}

/// The ways memory comes back.
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

    /// Chains and bytes the guest took back.
    pub(super) fn deflate(&self) -> MutexGuard<'_, Extent> {
        lock(&self.deflate)
    }

    pub(super) fn faults(&self) -> MutexGuard<'_, GuestFaults> {
        lock(&self.faults)
    }
}

/// Figures are whole after every single update, so a thread that died while it
/// held the lock has left nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unpoisoned()
}

/// Declares the faults and, from the same list, their names in `vm.counters`.
macro_rules! guest_faults {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Things a well-behaved driver never does. Each was contained.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct GuestFaults {
            $($(#[$doc])* pub $name: u64,)+
        }

        impl GuestFaults {
            /// Each fault with its name.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)+].into_iter()
            }

            /// Sets the fault of this name; false if there is none.
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
    /// Buffers of the wrong direction: writable page frame numbers or
    /// statistics, or reported ranges the device may not write to.
    descriptors_wrong_direction,
    /// Descriptors of length zero.
    descriptors_empty,
    /// Buffers that do not lie in RAM.
    descriptors_unreadable,
    /// Chains with more descriptors or bytes than the device looks at; the rest was ignored.
    chains_too_long,
    /// Chains that come back to a descriptor of theirs, go on where there is none, or
    /// add up to more than 4 GiB; what came before that was used.
    chains_without_end,
    /// Chains without a single descriptor the device could use.
    chains_empty,
    /// Chains whose head does not exist; they cannot be answered.
    chains_without_head,
    /// Lists of page frame numbers that end within a number.
    page_lists_ragged,
    /// Statistics buffers that end within an entry.
    stats_ragged,
    /// Statistics with a tag nobody has defined; skipped. Newer drivers may send such.
    stats_unknown_tags,
    /// Statistics buffers sent while another one was still waiting.
    stats_surplus_buffers,
    /// Hinting commands that are not a number of four bytes.
    hint_commands_malformed,
    /// Hinting commands with an id the host does not ask for. A driver that is
    /// overtaken by a new request sends one.
    hint_commands_not_asked_for,
    /// Queues that are enabled though no negotiated feature explains them.
    queues_unexplained,
    /// Writes to the configuration space that hit no writable field exactly.
    config_writes_ignored,
    /// Words of the reporting policy's that answer what was never asked, or mean nothing.
    policy_words_invalid,
    /// Chains of reports that came after the driver had confirmed that it sends none.
    reports_while_paused,
    /// Times `actual` named more memory than there is.
    actual_beyond_ram,
}
