//! Restores RAM on demand: fills it while the VM runs.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use api::RestoreConfig;
use api::config::MemoryRestoreMode;
use machine::memory::GuestMemory;
use machine::memory::on_demand::{
    Background, Content, Faults, FillError, FillOwner, FillReport, OnDemand,
};
use machine::pc::BarePc;
use machine::signals::VmSignals;
use machine::threads::MachineThreadStart;

use super::touched::{extended, write_order};
use super::{Progress, SnapshotError};
use crate::events::{EventKind, EventSink};

/// When the RAM of a restored VM is filled.
#[derive(Debug, Default)]
pub enum Filling {
    /// Before the VM exists.
    #[default]
    Before,
    /// While the VM runs.
    OnDemand {
        /// Opened before Landlock confines this thread to the configuration's paths.
        faults: Faults,
        /// Whether to fill the rest in the background.
        background: bool,
    },
    /// Never: RAM maps the files until it is written.
    CopyOnWrite,
    /// It is: a migration has brought the content.
    Done(Box<Received>),
}

/// What the target of a migration has created before the final state came.
#[derive(Debug)]
pub struct Received {
    /// RAM with its content, except for what is postponed.
    pub memory: GuestMemory,
    /// What comes after the machine, once.
    pub postponed: Mutex<Option<(Faults, Content)>>,
    /// The machine without devices, until it gets them; none without KVM.
    pub pc: Mutex<Option<BarePc>>,
}

impl Filling {
    /// Converts `request`.
    ///
    /// # Errors
    /// Settings exclude each other, or the host rejects userfaultfd.
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

/// Connections of restored RAM to the rest of the program.
pub struct RestoreContext {
    /// The event monitor.
    pub events: EventSink,
    /// Signals to the owner of the machine.
    pub signals: Arc<VmSignals>,
    /// Called first on the thread that fills RAM.
    pub thread_start: MachineThreadStart,
}

virtio_devices::debug_fields!(RestoreContext { signals });

impl RestoreContext {
    pub(super) fn owner(&self, progress: Progress, record: Option<Record>) -> Owner {
        Owner {
            progress,
            events: Arc::clone(&self.events),
            signals: Arc::clone(&self.signals),
            record,
        }
    }

    /// As [`OnDemand::start`].
    pub(super) fn fill(
        &self,
        memory: &GuestMemory,
        content: Content,
        faults: &Faults,
        background: Background,
        first: &[u32],
        owner: Owner,
    ) -> Result<OnDemand, SnapshotError> {
        let (start, owner) = (&self.thread_start, Box::new(owner));
        OnDemand::start(memory, content, faults, background, first, start, owner)
            .map_err(SnapshotError::OnDemand)
    }
}

/// Reports the progress of the fill, and ends the machine if the fill fails.
pub(super) struct Owner {
    progress: Progress,
    events: EventSink,
    signals: Arc<VmSignals>,
    /// None if the content comes from no snapshot.
    record: Option<Record>,
}

/// Where the order is recorded in which pages are demanded.
pub(super) struct Record {
    /// The snapshot's folder.
    pub(super) folder: PathBuf,
    /// Its id.
    pub(super) id: Option<String>,
    /// What an earlier machine has recorded.
    pub(super) known: Vec<u32>,
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
            "Guest RAM is complete: {demanded_pages} pages filled on demand, {filled_pages} in the background"
        );
        let kind = EventKind::MemoryFilled {
            demanded_pages,
            filled_pages,
        };
        (self.events)(&kind.into());
    }

    fn touched(&self, pages: &[u32]) {
        let Some(Record { folder, id, known }) = &self.record else {
            return;
        };
        let Some(order) = extended(known, pages) else {
            return;
        };
        if let Err(error) = write_order(folder, id.as_deref(), &order) {
            let folder = folder.display();
            log::info!("The order in which RAM was touched is not recorded in {folder}: {error}");
        }
    }

    fn failed(&self, error: &FillError) {
        let error = api::error_line(error);
        log::error!("Guest RAM cannot be filled any further: {error}");
        (self.events)(&EventKind::MemoryFillFailed { error }.into());
        if let Err(error) = self.signals.failed.write(1) {
            log::error!("Cannot notify the control thread of the failure: {error}");
        }
    }
}
