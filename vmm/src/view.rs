//! The published view: the state after the last completed change.
//!
//! Readers take a reference and never wait for the control thread, even while it boots or stops a machine.

use std::sync::{Arc, RwLock};

use api::{VmConfig, VmInfo, VmState};
use virtio_devices::Unpoisoned;

use crate::migration::SendProgress;
use crate::snapshot::Progress;
use crate::thresholds::Thresholds;
use crate::vm::MachineObserver;

/// One consistent snapshot.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// The stored configuration, if there is one.
    pub config: Option<Arc<VmConfig>>,
    /// The machine, if there is one.
    pub machine: Option<MachineView>,
    /// The snapshot that is being written.
    pub snapshot: Option<Arc<Progress>>,
    /// The migration that is being sent.
    pub migration: Option<Arc<SendProgress>>,
    /// The thresholds, if there is a VM.
    pub thresholds: Option<Arc<Thresholds>>,
}

/// A machine in a [`View`].
#[derive(Debug, Clone)]
pub struct MachineView {
    /// Counts machines: each boot and reboot creates another one, and its figures start from zero. Adding a balloon
    /// resets the balloon's figures, so it counts as well.
    pub generation: u64,
    /// `Running` or `Paused`.
    pub state: VmState,
    /// Its figures.
    pub observer: Arc<dyn MachineObserver>,
}

impl View {
    /// The state of the VM; `None` without a configuration.
    pub fn state(&self) -> Option<VmState> {
        match (&self.machine, &self.config) {
            (Some(machine), _) => Some(machine.state),
            (None, Some(_)) => Some(VmState::Created),
            (None, None) => None,
        }
    }

    /// Body of `GET /vm.info`; `None` without a configuration.
    pub fn info(&self) -> Option<VmInfo> {
        let config = self.config.as_deref()?;
        Some(VmInfo {
            config: config.clone(),
            state: self.state()?,
            memory_actual_size: match &self.machine {
                Some(machine) => machine.observer.memory_actual_size_bytes(),
                // A stored configuration is not validated before boot, so its sum may be meaningless.
                None => config.memory.total_bytes().unwrap_or(u64::MAX),
            },
            device_tree: self
                .machine
                .as_ref()
                .map(|machine| machine.observer.device_tree()),
            snapshot_progress: self.snapshot.as_ref().map(|progress| progress.now()),
            migration_progress: self.migration.as_ref().map(|progress| progress.now()),
        })
    }
}

/// Holds the snapshot that the control thread publishes.
#[derive(Debug, Default)]
pub struct PublishedView(RwLock<Arc<View>>);

impl PublishedView {
    /// The latest snapshot.
    pub fn get(&self) -> Arc<View> {
        Arc::clone(&self.0.read().unpoisoned())
    }

    pub(crate) fn publish(&self, view: View) {
        let previous = {
            let mut place = self.0.write().unpoisoned();
            std::mem::replace(&mut *place, Arc::new(view))
        };
        // Dropped without the lock: it may be the last reference to a machine's figures.
        drop(previous);
    }
}
