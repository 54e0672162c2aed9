//! The snapshot of a running machine, as the life cycle of the VM sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::error::Done;
use crate::snapshot::Progress;

/// The snapshot of a running machine that is being written.
pub(super) struct LiveSnapshot {
    pub(super) cancel: Arc<AtomicBool>,
    pub(super) progress: Arc<Progress>,
    /// Number of the machine.
    pub(super) machine: u64,
    /// The machine stays paused at the end.
    pub(super) keep_paused: bool,
    /// It was paused for the snapshot.
    pub(super) is_paused: bool,
    pub(super) done: Done,
}

impl LiveSnapshot {
    /// Ends it: its machine ends.
    pub(super) fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    pub(super) fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }
}
