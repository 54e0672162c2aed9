//! Requests that save the VM, write its memory, or create it from a snapshot.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use api::{
    Endpoint, RestoreConfig, VmConfig, VmCoredumpData, VmSnapshotConfig, VmSnapshotMergeConfig,
};
use machine::memory::GuestMemory;
use state::Saved;

use super::error::{Done, LifecycleError, RequestError};
use super::lifecycle::Lifecycle;
use super::thread::ControlHandle;
use crate::config::{self, DeviceNumbers};
use crate::events::EventKind;
use crate::landlock;
use crate::snapshot::{
    self, Filling, Link, Progress, Recorder, Snapshot, SnapshotError, SnapshotState,
};
use crate::threads::{SNAPSHOT_THREAD, ThreadKind};
use crate::vm::SavedMachine;

impl Lifecycle {
    /// `vm.snapshot` of a paused machine. Returns when all files are on stable storage.
    ///
    /// # Errors
    /// The machine is not paused or about to be reset, or it cannot be saved. In these cases the folder is unchanged.
    pub(super) fn snapshot(&mut self, request: &VmSnapshotConfig) -> Result<(), LifecycleError> {
        if self.machine.is_none() {
            return Err(LifecycleError::VmNotRunning);
        }
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
        let saved = self.save(request);
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
    fn save(&mut self, request: &VmSnapshotConfig) -> Result<u64, LifecycleError> {
        let folder = self.snapshot_folder(&request.destination_url)?;
        let link = self.link_of(request, &folder)?;
        // The machine is paused: what it writes from now on is written after the snapshot.
        let mut recorder = match (self.recorder.take(), request.track_writes) {
            (Some(recorder), _) => Some(recorder),
            (None, true) => Some(self.new_recorder()?),
            (None, false) => None,
        };
        let saved = self.save_linked(&folder, &link, recorder.as_mut());
        if saved.is_ok()
            && let Some(recorder) = &mut recorder
        {
            recorder.saved(&folder, &link);
        }
        let keeps_recording = match saved {
            Ok(_) => request.keeps_recording(),
            Err(_) => true,
        };
        self.recorder = recorder.filter(|it| keeps_recording && it.has_base());
        saved
    }

    fn save_linked(
        &self,
        folder: &Path,
        link: &Link,
        recorder: Option<&mut Recorder>,
    ) -> Result<u64, LifecycleError> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        let SavedMachine { pc, memory } = machine.save().map_err(LifecycleError::Machine)?;
        let (config, mut state) = self.description(config, pc, &memory);
        state.link = Some(link.clone());
        let written = recorder.map(Recorder::take_all).transpose();
        let written = written.map_err(LifecycleError::Snapshot)?;
        let written = written.filter(|_| link.base.is_some());
        let events = Arc::clone(&self.context.events);
        let progress = Arc::new(Progress::of_snapshot(&memory, events));
        self.publish_with(Some(Arc::clone(&progress)));
        snapshot::write(
            folder,
            &config,
            &state,
            &memory,
            written.as_ref(),
            &progress,
        )
        .map_err(LifecycleError::Snapshot)
    }

    /// The place of a new snapshot in `folder` in its chain.
    ///
    /// # Errors
    /// It cannot be based on the snapshot that the request names.
    pub(super) fn link_of(
        &self,
        request: &VmSnapshotConfig,
        folder: &Path,
    ) -> Result<Link, LifecycleError> {
        let base = request.base_url.as_deref().map(|url| {
            let base = self.readable_folder(url)?;
            Recorder::base(self.recorder.as_ref(), &base, folder).map_err(LifecycleError::Snapshot)
        });
        let link = Link::new(base.transpose()?);
        link.map_err(|error| LifecycleError::Snapshot(SnapshotError::Random(error)))
    }

    /// Starts to record what the machine writes, while it runs.
    ///
    /// # Errors
    /// The VM does not allow it, or KVM cannot do it.
    fn new_recorder(&self) -> Result<Recorder, LifecycleError> {
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        snapshot::require_recordable(config).map_err(LifecycleError::Snapshot)?;
        let tracker = machine.track_writes().map_err(LifecycleError::Machine)?;
        Ok(Recorder::new(tracker))
    }

    /// Stops recording what the machine writes.
    pub(super) fn forget_writes(&mut self, reason: &str) {
        if self.recorder.take().is_some() {
            log::info!("No differential snapshot can follow: {reason}");
        }
    }

    /// A folder of a snapshot that may be read.
    fn readable_folder(&self, url: &str) -> Result<PathBuf, LifecycleError> {
        let folder = snapshot::folder_of(url).map_err(LifecycleError::Snapshot)?;
        self.confinement
            .check(&[landlock::of_restore(&folder)])
            .map_err(LifecycleError::Landlock)?;
        Ok(folder)
    }

    /// The existing folder to save the machine in.
    ///
    /// # Errors
    /// There is none, or the VMM must not write there.
    pub(super) fn snapshot_folder(&self, url: &str) -> Result<PathBuf, LifecycleError> {
        let folder = snapshot::folder_of(url);
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
            link: None,
            next_device_number: self.device_numbers.next(),
        };
        (config, state)
    }

    /// `vm.coredump`: writes a core file of the guest. A running machine is paused until the file is complete.
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

    /// `vm.restore`: creates a machine from a snapshot, paused unless the request states otherwise. Network interfaces
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
        if request.resume {
            return self.resume();
        }
        self.complete_machine();
        Ok(())
    }

    fn admit_base(&self, base: &Path) -> Result<(), SnapshotError> {
        let admitted = self.confinement.check(&[landlock::of_restore(base)]);
        admitted.map_err(|error| SnapshotError::NotAdmitted(Box::new(error)))
    }

    /// `vm.snapshot-merge`: merges a chain into a new snapshot, on a separate thread. Takes `done` if it has been
    /// started, and calls it when the new snapshot is on stable storage.
    ///
    /// # Errors
    /// A folder is missing or not allowed, or another chain is being merged.
    pub fn start_merge(
        &mut self,
        request: &VmSnapshotMergeConfig,
        control: &ControlHandle,
        done: &mut Option<Done>,
    ) -> Result<(), LifecycleError> {
        if self.merging.is_some() {
            return Err(LifecycleError::Merging);
        }
        let source = self.readable_folder(&request.source_url)?;
        let destination = self.snapshot_folder(&request.destination_url)?;
        let bases = snapshot::folders(&source, &|base| self.admit_base(base));
        bases.map_err(LifecycleError::Snapshot)?;
        let (thread_start, control) = (Arc::clone(&self.context.thread_start), control.clone());
        let started = std::thread::Builder::new()
            .name(SNAPSHOT_THREAD.to_owned())
            .spawn(move || {
                thread_start(ThreadKind::Snapshot);
                // The folders were allowed above, and the thread has the confinement of this one.
                let merged = snapshot::merge(&source, &destination, &|_| Ok(()));
                let ended = control.step(Endpoint::VmSnapshotMerge, move |vm| {
                    vm.end_merge(merged);
                    Ok(())
                });
                if let Err(error) = ended {
                    log::error!("{}", api::error_line(&error));
                }
            });
        started.map_err(|error| LifecycleError::Snapshot(SnapshotError::Thread(error)))?;
        self.merging = done.take();
        Ok(())
    }

    fn end_merge(&mut self, merged: Result<(), SnapshotError>) {
        if let Some(done) = self.merging.take() {
            let endpoint = Endpoint::VmSnapshotMerge;
            done(merged.map_err(|error| {
                let cause = LifecycleError::Snapshot(error);
                RequestError { endpoint, cause }
            }));
        }
    }

    fn restore_machine(
        &mut self,
        request: &RestoreConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<(), LifecycleError> {
        let folder = self.readable_folder(&request.source_url)?;
        let filling = Filling::of(request).map_err(LifecycleError::Snapshot)?;
        let admit = |base: &Path| self.admit_base(base);
        let mut snapshot = Snapshot::open(&folder, &admit).map_err(LifecycleError::Snapshot)?;
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
        let numbers = DeviceNumbers::from_saved(snapshot.state.next_device_number);
        let numbers =
            numbers.map_err(|error| LifecycleError::Snapshot(SnapshotError::State(error)))?;
        self.reporting
            .change(&snapshot.state.thresholds, None)
            .map_err(LifecycleError::Thresholds)?;
        let machine = self.make(&mut config, Some(snapshot))?;
        if let Some(bytes) = snapshot.state.memory_size_after_reboot {
            config.memory.size = bytes;
        }
        self.install(config, numbers, machine);
        self.paused = true;
        // The balloon's saved state already includes the pause.
        self.reporting.paused = snapshot.state.reporting_paused;
        self.emit(EventKind::Restored);
        Ok(())
    }
}
