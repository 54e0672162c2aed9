//! Snapshots of a running machine as the control thread sees them: start, the pause for the last pages, and the end.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use api::{Endpoint, VmConfig, VmSnapshotConfig, VmState};

use super::current_snapshot::LiveSnapshot;
use super::error::{Done, LifecycleError, RequestError};
use super::lifecycle::Lifecycle;
use super::thread::ControlHandle;
use crate::events::EventKind;
use crate::snapshot::{
    LiveOwner, LiveReport, LiveSave, Progress, Recorder, SnapshotError, SnapshotState,
    require_recordable, require_recorded, require_steady_disks,
};
use crate::threads::{SNAPSHOT_THREAD, ThreadKind};
use crate::vm::SavedMachine;

const STACK_BYTES: usize = 1 << 20;

impl Lifecycle {
    /// `vm.snapshot`. If another thread saves a running machine, takes `done` and calls it when the snapshot is on stable
    /// storage.
    ///
    /// # Errors
    /// There is no machine that can be saved, or the folder cannot be used.
    pub fn start_snapshot(
        &mut self,
        request: &VmSnapshotConfig,
        control: &ControlHandle,
        done: &mut Option<Done>,
    ) -> Result<(), LifecycleError> {
        let is_running = self.has_machine() && self.machine_state() == VmState::Running;
        match request.live && is_running {
            true => self.start_live(request, control, done),
            false => self.snapshot(request),
        }
    }

    /// Has a running machine saved by another thread. Takes `done` if that has begun.
    fn start_live(
        &mut self,
        request: &VmSnapshotConfig,
        control: &ControlHandle,
        done: &mut Option<Done>,
    ) -> Result<(), LifecycleError> {
        if self.live_snapshot.is_some() {
            return Err(LifecycleError::Saving);
        }
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        let folder = self.snapshot_folder(&request.destination_url)?;
        check_live(config, request.keep_paused)?;
        if request.track_writes {
            require_recordable(config).map_err(LifecycleError::Snapshot)?;
        }
        if !machine.is_memory_complete() {
            return Err(LifecycleError::MemoryIncomplete);
        }
        let link = self.link_of(request, &folder)?;
        let recorder = match self.recorder.take() {
            Some(recorder) => recorder,
            None => Recorder::new(machine.track_writes().map_err(LifecycleError::Machine)?),
        };
        let events = Arc::clone(&self.context.events);
        let progress = Arc::new(Progress::of_snapshot(recorder.memory(), events));
        let cancel = Arc::new(AtomicBool::new(false));
        let save = LiveSave {
            folder,
            link,
            recorder,
            keeps_recording: request.keeps_recording(),
            progress: Arc::clone(&progress),
            cancel: Arc::clone(&cancel),
        };
        self.emit(EventKind::Snapshotting);
        let (thread_start, control) = (Arc::clone(&self.context.thread_start), control.clone());
        // It inherits the confinement of this thread.
        let started = std::thread::Builder::new()
            .name(SNAPSHOT_THREAD.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                thread_start(ThreadKind::Snapshot);
                save.run(&mut LiveSteps(control));
            });
        if let Err(error) = started {
            let error = LifecycleError::Snapshot(SnapshotError::Thread(error));
            self.emit(EventKind::SnapshotFailed {
                error: api::error_line(&error),
            });
            return Err(error);
        }
        self.live_snapshot = done.take().map(|done| LiveSnapshot {
            cancel,
            progress,
            machine: self.machine_number().unwrap_or_default(),
            keep_paused: request.keep_paused,
            is_paused: false,
            done,
        });
        Ok(())
    }

    /// Pauses the machine that is being saved, unless a client has done so.
    fn pause_to_save(&mut self) -> Result<(VmConfig, SnapshotState), LifecycleError> {
        let same = |saving: &LiveSnapshot| Some(saving.machine) == self.machine_number();
        let keep_paused = match self.live_snapshot.as_ref().filter(|saving| same(saving)) {
            Some(saving) => saving.keep_paused,
            None => return Err(LifecycleError::Snapshot(SnapshotError::Cancelled)),
        };
        if self.machine_state() == VmState::Running {
            self.pause()?;
            if let Some(saving) = &mut self.live_snapshot {
                saving.is_paused = true;
            }
        }
        if self.reset_requested {
            return Err(LifecycleError::ResetPending);
        }
        let (Some(machine), Some(config)) = (&self.machine, &self.config) else {
            return Err(LifecycleError::VmNotRunning);
        };
        // Devices may have been added in the meantime.
        check_live(config, keep_paused)?;
        let SavedMachine { pc, memory } = machine.save().map_err(LifecycleError::Machine)?;
        Ok(self.description(config, pc, &memory))
    }

    /// Resumes the machine if this snapshot has paused it. `failed`: also if it was to stay paused.
    fn resume_saved(&mut self, failed: bool) -> Result<(), LifecycleError> {
        let machine = self.machine_number();
        let Some(saving) = &mut self.live_snapshot else {
            return Ok(());
        };
        let resumes = saving.is_paused && (failed || !saving.keep_paused);
        if !resumes || Some(saving.machine) != machine {
            return Ok(());
        }
        saving.is_paused = false;
        match self.machine_state() {
            VmState::Paused => self.resume(),
            _ => Ok(()),
        }
    }

    fn end_live(&mut self, end: Result<LiveReport, SnapshotError>, recorder: Option<Recorder>) {
        let resumed = match &end {
            Ok(_) => Ok(()),
            Err(_) => self.resume_saved(true),
        };
        let Some(saving) = self.live_snapshot.take() else {
            return;
        };
        if Some(saving.machine) == self.machine_number() {
            self.recorder = recorder;
        }
        let outcome = end.map_err(LifecycleError::Snapshot);
        self.emit(match &outcome {
            Ok(report) => EventKind::Snapshotted {
                passes: report.passes,
                data_bytes: report.data_bytes,
                paused_ms: report.paused.as_millis() as u64,
            },
            Err(error) => EventKind::SnapshotFailed {
                error: api::error_line(error),
            },
        });
        if let Err(error) = resumed {
            log::error!("The VM stays paused: {}", api::error_line(&error));
        }
        // The response shows the state after the snapshot.
        self.publish();
        let endpoint = Endpoint::VmSnapshot;
        (saving.done)(
            outcome
                .map(drop)
                .map_err(|cause| RequestError { endpoint, cause }),
        );
    }
}

fn check_live(config: &VmConfig, keep_paused: bool) -> Result<(), LifecycleError> {
    let checked = require_recorded(config).and_then(|()| match keep_paused {
        true => Ok(()),
        false => require_steady_disks(config),
    });
    checked.map_err(LifecycleError::Snapshot)
}

/// Asks the control thread for each step.
struct LiveSteps(ControlHandle);

impl LiveSteps {
    fn step<T: Send + 'static>(
        &self,
        step: impl FnOnce(&mut Lifecycle) -> Result<T, LifecycleError> + Send + 'static,
    ) -> Result<T, SnapshotError> {
        let made = self.0.step(Endpoint::VmSnapshot, step);
        made.map_err(|error| match error.cause {
            LifecycleError::Snapshot(error) => error,
            cause => SnapshotError::Owner(Box::new(cause)),
        })
    }
}

impl LiveOwner for LiveSteps {
    fn pause(&mut self) -> Result<(VmConfig, SnapshotState), SnapshotError> {
        self.step(Lifecycle::pause_to_save)
    }

    fn resume(&mut self) -> Result<(), SnapshotError> {
        self.step(|vm| vm.resume_saved(false))
    }

    fn end(&mut self, end: Result<LiveReport, SnapshotError>, recorder: Option<Recorder>) {
        let ended = self.step(move |vm| {
            vm.end_live(end, recorder);
            Ok(())
        });
        if let Err(error) = ended {
            log::error!("{}", api::error_line(&error));
        }
    }
}
