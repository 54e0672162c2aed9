//! RAM of a restored VM that is filled while the VM runs.

use std::sync::Arc;

use api::RestoreConfig;
use api::config::MemoryRestoreMode;
use machine::memory::on_demand::{Faults, FillError, FillOwner, FillReport};
use machine::signals::VmSignals;
use machine::threads::ThreadStart;

use super::{Progress, SnapshotError};
use crate::events::{EventKind, EventSink};

/// When RAM gets its content.
#[derive(Debug, Default)]
pub enum Filling {
    /// Before the VM exists.
    #[default]
    Before,
    /// As the VM needs it.
    OnDemand {
        /// Opened before Landlock confines this thread to what the configuration names.
        faults: Faults,
        /// And the rest while there is no demand.
        background: bool,
    },
    /// RAM shows the files until it is written.
    CopyOnWrite,
}

impl Filling {
    /// What `request` says.
    ///
    /// # Errors
    /// Settings that exclude each other, or the host refuses userfaultfd.
    pub fn of(request: &RestoreConfig) -> Result<Self, SnapshotError> {
        let background = request.background_fill;
        match request.memory_restore_mode {
            MemoryRestoreMode::OnDemand | MemoryRestoreMode::CopyOnWrite if request.prefault => {
                Err(SnapshotError::Prefault)
            }
            MemoryRestoreMode::OnDemand => {
                let faults = Faults::open().map_err(SnapshotError::OnDemand)?;
                Ok(Self::OnDemand { faults, background })
            }
            _ if !background => Err(SnapshotError::NoBackground),
            MemoryRestoreMode::CopyOnWrite => Ok(Self::CopyOnWrite),
            MemoryRestoreMode::Copy => Ok(Self::Before),
        }
    }
}

/// What restored RAM needs from the program around it.
pub struct RestoreContext {
    /// Event monitor.
    pub events: EventSink,
    /// Signals to the machine's owner.
    pub signals: Arc<VmSignals>,
    /// Called first on the thread that fills RAM.
    pub thread_start: ThreadStart,
}

virtio_devices::debug_fields!(RestoreContext { signals });

/// Reports how far the fill has come, and ends the machine if it cannot go on.
pub(super) struct Owner {
    pub(super) progress: Progress,
    pub(super) events: EventSink,
    pub(super) signals: Arc<VmSignals>,
}

impl FillOwner for Owner {
    fn progress(&self, bytes: u64) {
        self.progress.add(bytes);
    }

    fn filled(&self, report: FillReport) {
        let FillReport {
            demanded_pages,
            filled_pages,
        } = report;
        log::info!(
            "Guest RAM is complete: {demanded_pages} pages on demand, {filled_pages} without"
        );
        let kind = EventKind::MemoryFilled {
            demanded_pages,
            filled_pages,
        };
        (self.events)(&kind.into());
    }

    fn failed(&self, error: &FillError) {
        let error = api::error_chain(error).join(": ");
        log::error!("Guest RAM cannot be filled any further: {error}");
        (self.events)(&EventKind::MemoryFillFailed { error }.into());
        if let Err(error) = self.signals.failed.write(1) {
            log::error!("The control thread cannot be told of it: {error}");
        }
    }
}
