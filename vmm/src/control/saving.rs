//! Requests that save the VM, write its memory, or create it from a snapshot.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::{RestoreConfig, VmConfig, VmCoredumpData, VmSnapshotConfig};
use machine::memory::GuestMemory;
use state::Saved;

use super::error::LifecycleError;
use super::lifecycle::Lifecycle;
use crate::config;
use crate::events::EventKind;
use crate::landlock;
use crate::snapshot::{self, Filling, Progress, Snapshot, SnapshotState};
use crate::vm::{Machine, SavedMachine};

impl Lifecycle {
    /// `vm.snapshot` of a paused machine. Returns when all files are on stable storage.
    ///
    /// # Errors
    /// The machine is not paused or about to be reset, or it cannot be saved. In these cases the folder is unchanged.
    pub(super) fn snapshot(&mut self, request: &VmSnapshotConfig) -> Result<(), LifecycleError> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        if self.live_snapshot.is_some() {
            return Err(LifecycleError::Saving);
        }
        if !self.paused {
            return Err(LifecycleError::NotPaused);
        }
        if self.reset_requested {
            return Err(LifecycleError::ResetPending);
        }
        self.emit(EventKind::Snapshotting);
        let saved = self.save(machine.as_ref(), config, request);
        self.emit(match &saved {
            Ok(data_bytes) => EventKind::Snapshotted {
                passes: 1,
                data_bytes: *data_bytes,
                paused_ms: 0,
            },
            Err(error) => EventKind::SnapshotFailed {
                error: api::error_line(error),
            },
        });
        saved.map(drop)
    }

    /// Returns the number of bytes of RAM in the snapshot.
    fn save(
        &self,
        machine: &dyn Machine,
        config: &VmConfig,
        request: &VmSnapshotConfig,
    ) -> Result<u64, LifecycleError> {
        let folder = self.snapshot_folder(request)?;
        let SavedMachine { pc, memory } = machine.save().map_err(LifecycleError::Machine)?;
        let (config, state) = self.description(config, pc, &memory);
        let events = Arc::clone(&self.context.events);
        let progress = Arc::new(Progress::of_snapshot(&memory, events));
        self.publish_with(Some(Arc::clone(&progress)));
        snapshot::write(&folder, &config, &state, &memory, &progress)
            .map_err(LifecycleError::Snapshot)
    }

    /// The existing folder to save the machine in.
    ///
    /// # Errors
    /// There is none, or the VMM must not write there.
    pub(super) fn snapshot_folder(
        &self,
        request: &VmSnapshotConfig,
    ) -> Result<PathBuf, LifecycleError> {
        let folder = snapshot::folder_of(&request.destination_url);
        let folder = folder.map_err(LifecycleError::Snapshot)?;
        self.confinement
            .check(&[landlock::of_snapshot(&folder)])
            .map_err(LifecycleError::Landlock)?;
        Ok(folder)
    }

    /// The configuration and the state from which another process can continue the machine.
    pub(super) fn description(
        &self,
        config: &VmConfig,
        pc: Saved,
        memory: &GuestMemory,
    ) -> (VmConfig, SnapshotState) {
        let mut config = config.clone();
        // RAM that a reboot takes away is still there.
        let next = (config.memory.size > 0)
            .then(|| std::mem::replace(&mut config.memory.size, memory.own_bytes()));
        let state = SnapshotState {
            pc,
            thresholds: self.reporting.thresholds().as_change(),
            reporting_paused: self.reporting.paused,
            memory_size_after_reboot: next.filter(|next| *next != config.memory.size),
        };
        (config, state)
    }

    /// `vm.coredump`: writes a core file of the guest. A running machine is paused meanwhile.
    ///
    /// # Errors
    /// There is no machine, it did not pause, or the file cannot be written. There is no file then, and the machine is
    /// paused if it could not be written.
    pub fn coredump(&mut self, request: &VmCoredumpData) -> Result<(), LifecycleError> {
        if self.machine.is_none() {
            return Err(LifecycleError::VmNotRunning);
        }
        let url = &request.destination_url;
        let path = url.strip_prefix("file://").map(Path::new);
        let path = path.filter(|path| path.is_absolute());
        let (Some(path), Some(folder)) = (path, path.and_then(Path::parent)) else {
            let url = url.clone();
            return Err(LifecycleError::CoreUrl { url });
        };
        self.confinement
            .check(&[landlock::of_core_file(folder)])
            .map_err(LifecycleError::Landlock)?;
        let mut options = File::options();
        let options = options.write(true).create_new(true).mode(0o600);
        let file = options
            .open(path)
            .map_err(|source| LifecycleError::CoreFile {
                path: path.to_owned(),
                source,
            })?;
        let runs = !self.paused;
        let written = match runs {
            true => self.pause(),
            false => Ok(()),
        };
        let written = written.and_then(|()| {
            self.emit(EventKind::Coredumping);
            self.on_machine(|machine| machine.write_core(&file))
        });
        if written.is_err()
            && let Err(error) = std::fs::remove_file(path)
        {
            log::warn!("Cannot remove {}: {error}", path.display());
        }
        written?;
        match runs {
            true => self.resume(),
            false => Ok(()),
        }
    }

    /// `vm.restore`: creates a machine from a snapshot, paused unless the request says otherwise. Network interfaces
    /// use the open taps received with the request.
    ///
    /// # Errors
    /// There is a configuration already, or the snapshot cannot be restored; in this case nothing is left behind. If
    /// only the resume fails, the machine stays paused.
    pub fn restore(
        &mut self,
        request: &RestoreConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LifecycleError> {
        if self.config.is_some() {
            return Err(LifecycleError::VmAlreadyCreated);
        }
        self.emit(EventKind::Restoring);
        let restored = self.restore_machine(request, fds);
        if let Err(error) = &restored {
            self.forget_vm();
            let error = api::error_line(error);
            self.emit(EventKind::RestoreFailed { error });
        }
        restored?;
        match request.resume {
            true => self.resume(),
            false => Ok(()),
        }
    }

    fn restore_machine(
        &mut self,
        request: &RestoreConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LifecycleError> {
        let folder = snapshot::folder_of(&request.source_url);
        let folder = folder.map_err(LifecycleError::Snapshot)?;
        self.confinement
            .check(&[landlock::of_restore(&folder)])
            .map_err(LifecycleError::Landlock)?;
        let filling = Filling::of(request).map_err(LifecycleError::Snapshot)?;
        let mut snapshot = Snapshot::open(&folder).map_err(LifecycleError::Snapshot)?;
        snapshot.filling = filling;
        let mut config = snapshot.config.clone();
        let numbers: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        snapshot::adapt(&mut config, request, &numbers).map_err(LifecycleError::Snapshot)?;
        config::validate(&config).map_err(LifecycleError::ConfigValidation)?;
        self.confinement
            .admit(&config)
            .map_err(LifecycleError::Landlock)?;
        self.create_restored(&snapshot, config)?;
        self.taps.keep(fds);
        Ok(())
    }

    /// Creates the machine of `snapshot` with the checked `config`. It is paused.
    pub(super) fn create_restored(
        &mut self,
        snapshot: &Snapshot,
        mut config: VmConfig,
    ) -> Result<(), LifecycleError> {
        self.reporting
            .change(&snapshot.state.thresholds, None)
            .map_err(LifecycleError::Thresholds)?;
        let machine = self.make(&mut config, Some(snapshot))?;
        if let Some(bytes) = snapshot.state.memory_size_after_reboot {
            config.memory.size = bytes;
        }
        self.install(config, machine);
        self.paused = true;
        // The balloon's saved state already includes the pause.
        self.reporting.paused = snapshot.state.reporting_paused;
        self.emit(EventKind::Restored);
        Ok(())
    }
}
