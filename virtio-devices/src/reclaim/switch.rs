//! The switch that disables discarding.
//!
//! A page that a device has pinned for DMA, or that is being copied out of the machine, must not be replaced.
//! Otherwise, the device would continue to use the old page, while the guest sees a new one. Code that requires stable
//! pages holds an [`InhibitGuard`]. Several guards may exist, for the same or different reasons. Discarding resumes
//! when the last one is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use strum::{IntoStaticStr, VariantArray};

/// Reasons why discarding is disabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case", const_into_str)]
#[repr(usize)]
pub enum InhibitReason {
    /// An assigned device has all guest memory pinned for DMA.
    AssignedDevice,
    /// Guest memory is being written out (snapshot, migration, dump).
    MemoryExport,
    /// Guest memory is still being loaded.
    MemoryImport,
    /// The operator has paused reporting; this affects only reports.
    ReportingPaused,
}

impl InhibitReason {
    /// Name in counters and replies.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.into_str()
    }
}

/// Shared by the engine and all code that may need to stop it.
#[derive(Debug, Default)]
pub struct DiscardSwitch {
    holders: [AtomicU32; InhibitReason::VARIANTS.len()],
    /// Batches between their check of `holders` and their last system call.
    batches_running: AtomicU32,
}

impl DiscardSwitch {
    /// Disables discarding until the guard is dropped. A batch that has begun continues: see
    /// [`InhibitGuard::is_settled`].
    #[must_use]
    pub fn inhibit(self: &Arc<Self>, reason: InhibitReason) -> InhibitGuard {
        self.holders[reason as usize].fetch_add(1, Ordering::SeqCst);
        InhibitGuard {
            switch: Arc::clone(self),
            reason,
        }
    }

    /// The first reason why discarding is disabled, if it is.
    #[must_use]
    pub fn inhibited(&self) -> Option<InhibitReason> {
        InhibitReason::VARIANTS
            .iter()
            .copied()
            .find(|reason| self.holders[*reason as usize].load(Ordering::SeqCst) > 0)
    }

    /// Begins a batch, unless discarding is disabled.
    ///
    /// The engine announces itself before it checks for guards, and a guard counts itself before it checks for running
    /// batches. With sequential consistency, at least one of the two sees the other.
    pub(crate) fn begin(&self) -> Result<BatchGuard<'_>, InhibitReason> {
        self.batches_running.fetch_add(1, Ordering::SeqCst);
        let batch = BatchGuard(self);
        match self.inhibited() {
            None => Ok(batch),
            Some(reason) => Err(reason),
        }
    }
}

/// Keeps discarding disabled while it exists.
#[derive(Debug)]
pub struct InhibitGuard {
    switch: Arc<DiscardSwitch>,
    reason: InhibitReason,
}

impl InhibitGuard {
    /// Whether no batch is running any more. Once this is true, no page of the guest is discarded during the life of
    /// the guard. Do not call it again afterwards: a batch that is about to be rejected temporarily counts as running.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.switch.batches_running.load(Ordering::SeqCst) == 0
    }
}

impl Drop for InhibitGuard {
    fn drop(&mut self) {
        self.switch.holders[self.reason as usize].fetch_sub(1, Ordering::SeqCst);
    }
}

/// One batch of the engine.
#[derive(Debug)]
pub(crate) struct BatchGuard<'a>(&'a DiscardSwitch);

impl Drop for BatchGuard<'_> {
    fn drop(&mut self) {
        self.0.batches_running.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn switch_with_two_holders_opens_when_both_let_go() {
        let switch = Arc::new(DiscardSwitch::default());
        let first = switch.inhibit(InhibitReason::AssignedDevice);
        let second = switch.inhibit(InhibitReason::AssignedDevice);
        drop(first);
        assert_eq!(switch.inhibited(), Some(InhibitReason::AssignedDevice));
        drop(second);
        assert_eq!(switch.inhibited(), None);
    }

    #[test]
    fn guard_taken_during_a_batch_settles_when_it_ends() {
        let switch = Arc::new(DiscardSwitch::default());
        let batch = switch.begin().expect("nobody inhibits");
        let guard = switch.inhibit(InhibitReason::MemoryExport);
        assert!(!guard.is_settled());
        drop(batch);
        assert!(guard.is_settled());
        assert_eq!(switch.begin().err(), Some(InhibitReason::MemoryExport));
        assert!(guard.is_settled(), "a refused batch leaves nothing behind");
    }
}
