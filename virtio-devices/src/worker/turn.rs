//! Limits how much work a handler does before the worker checks for commands.
//!
//! A guest controls the content of its rings, so work is limited in two ways:
//!
//! * A *turn* has a budget. When it is spent, the handler returns, and other queues and sources are served.
//! * A *command* (pause, reset, a vCPU held at a doorbell) ends the turn immediately. Handlers check for commands between
//!   chains, and between the system calls of a chain that takes several.
//!
//! So a command waits for at most one piece of work, whatever the ring contains. Each turn does at least one piece, so
//! a guest makes progress even if the host pauses and resumes constantly.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Amounts of work. One system call moves or discards a bounded amount of each kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Descriptor chains taken.
    pub chains: u64,
    /// Descriptors read.
    pub descriptors: u64,
    /// Ranges of guest memory or of an image passed to the kernel.
    pub ranges: u64,
    /// Bytes moved or discarded.
    pub bytes: u64,
    /// System calls on data, memory or images.
    pub calls: u64,
}

/// The budget of a turn: several milliseconds of work. A turn ends with the chain that exceeds it.
const TURN: Work = Work {
    // The size of most devices' largest rings.
    chains: 256,
    // About a millisecond.
    descriptors: 16 << 10,
    // Four full vectors, or 20 ms of single calls on shared memory.
    ranges: 4096,
    // 16 MiB of requests are copied in a few milliseconds; discarding is much faster than copying.
    bytes: 1 << 30,
    calls: 8192,
};

/// Number of commands that have been sent to a worker but not received yet.
#[derive(Debug, Clone, Default)]
pub(crate) struct CommandsPending(Arc<AtomicU32>);

impl CommandsPending {
    /// Called before a command is sent, so that the handler stops for it.
    pub(super) fn announce(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    /// Called when the command was received or could not be sent.
    pub(super) fn settle(&self) {
        self.0.fetch_sub(1, Ordering::Release);
    }

    fn any(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }
}

/// One turn of a handler, see the module documentation.
#[derive(Debug, Default)]
pub struct Turn {
    commands: CommandsPending,
    spent: Work,
    #[cfg(any(test, feature = "test-utils"))]
    record: record::Record,
}

impl Turn {
    pub(super) fn new(commands: CommandsPending) -> Self {
        Self {
            commands,
            ..Self::default()
        }
    }

    /// Starts the next turn with a full budget.
    pub(crate) fn begin(&mut self) {
        self.spent = Work::default();
        #[cfg(any(test, feature = "test-utils"))]
        self.record.answer(false);
        self.note_look();
    }

    /// Whether the handler must return before it takes another chain.
    pub(crate) fn is_over(&mut self) -> bool {
        let called = self.is_called();
        let Work {
            chains,
            descriptors,
            ranges,
            bytes,
            calls,
        } = self.spent;
        self.spent != Work::default()
            && (called
                || chains >= TURN.chains
                || descriptors >= TURN.descriptors
                || ranges >= TURN.ranges
                || bytes >= TURN.bytes
                || calls >= TURN.calls)
    }

    /// Whether a command is pending: work that can be put back or continued later must stop.
    pub(crate) fn is_called(&mut self) -> bool {
        self.note_look();
        let called = self.commands.any();
        #[cfg(any(test, feature = "test-utils"))]
        self.record.answer(called && self.spent != Work::default());
        called
    }

    /// Counts a taken chain.
    pub(crate) fn charge_chain(&mut self) {
        self.charge(Work {
            chains: 1,
            ..Work::default()
        });
    }

    /// Counts descriptors that were read.
    pub(crate) fn charge_descriptors(&mut self, descriptors: u64) {
        self.charge(Work {
            descriptors,
            ..Work::default()
        });
    }

    /// Counts a system call on `ranges` ranges of `bytes` in total.
    pub(crate) fn charge_call(&mut self, ranges: u64, bytes: u64) {
        self.charge(Work {
            ranges,
            bytes,
            calls: 1,
            ..Work::default()
        });
    }

    fn charge(&mut self, work: Work) {
        self.spent.add(work);
        #[cfg(any(test, feature = "test-utils"))]
        self.record.charge(work);
    }

    fn note_look(&mut self) {
        #[cfg(any(test, feature = "test-utils"))]
        {
            self.record.look();
            self.call_if_due();
        }
    }
}

impl Work {
    fn add(&mut self, other: Self) {
        self.chains += other.chains;
        self.descriptors += other.descriptors;
        self.ranges += other.ranges;
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.calls += other.calls;
    }
}

/// Records of a handler's turns, for tests.
#[cfg(any(test, feature = "test-utils"))]
mod record {
    use super::{Turn, Work};

    #[derive(Debug, Default)]
    pub(super) struct Record {
        since_look: Work,
        most: Work,
        looks: u64,
        /// The check at which a command is announced.
        call_at: Option<u64>,
        called: bool,
        /// Whether the handler received a stop command in this turn.
        told: bool,
        done_in_spite: Work,
    }

    impl Record {
        pub(super) fn charge(&mut self, work: Work) {
            self.since_look.add(work);
            if self.told {
                self.done_in_spite.add(work);
            }
        }

        pub(super) fn answer(&mut self, told: bool) {
            self.told = told;
        }

        pub(super) fn look(&mut self) {
            self.most = self.most.max(std::mem::take(&mut self.since_look));
            self.looks += 1;
        }
    }

    impl Work {
        /// The maximum of each kind.
        #[must_use]
        pub fn max(self, other: Self) -> Self {
            Self {
                chains: self.chains.max(other.chains),
                descriptors: self.descriptors.max(other.descriptors),
                ranges: self.ranges.max(other.ranges),
                bytes: self.bytes.max(other.bytes),
                calls: self.calls.max(other.calls),
            }
        }
    }

    impl Turn {
        /// Whether a command is pending. Unlike the handler's checks, this one is not counted.
        #[must_use]
        pub fn has_command(&self) -> bool {
            self.commands.any()
        }

        /// The maximum of each kind of work between two checks for commands.
        #[must_use]
        pub fn most_between_looks(&mut self) -> Work {
            self.note_look();
            self.record.most
        }

        /// Work done in the same turn after the handler had seen a command.
        #[must_use]
        pub fn done_in_spite(&self) -> Work {
            self.record.done_in_spite
        }

        /// Makes a command pending from now on; or removes it, and announces none later.
        pub fn set_called(&mut self, called: bool) {
            self.record.call_at = None;
            if called != self.record.called {
                self.record.called = called;
                if called {
                    self.commands.announce();
                } else {
                    self.commands.settle();
                }
            }
        }

        /// Makes a command pending after this number of further checks.
        pub fn call_after(&mut self, looks: u64) {
            self.record.call_at = Some(self.record.looks + looks);
        }

        pub(super) fn call_if_due(&mut self) {
            if self
                .record
                .call_at
                .is_some_and(|at| self.record.looks >= at)
            {
                self.set_called(true);
            }
        }
    }
}
