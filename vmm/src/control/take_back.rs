//! Locks the disks of a source again after a failed migration, and resumes its machine.
//!
//! ```text
//!  failed ─► disks locked ─► resumed ─► migration-failed
//!              │ another process has them: tried for LOCK_WAIT; the migration is still under way
//!              ▼
//!            migration-failed: "stays paused until" ─► tried until it works, or the operator acts
//! ```
//! The control thread makes the attempts; the thread of the migration waits between them.

use std::time::{Duration, Instant};

use super::current_migration::{Migration, Role};
use super::error::LifecycleError;
use super::lifecycle::Lifecycle;
use super::migration::Steps;
use crate::events::EventKind;
use crate::migration::MigrationError;
use crate::vm::VmError;

/// How long the migration is under way while another process has the disks: a target that was killed closes its
/// connection before its files.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_INTERVAL: Duration = Duration::from_millis(20);
/// The interval afterwards.
const LATER_INTERVAL: Duration = Duration::from_secs(1);

/// The outcome of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Attempt {
    /// The machine has its disks and runs if it ran before, or there is nothing to do.
    Done,
    /// Another process has the disks.
    Locked(String),
    /// It does not help to try again.
    Failed(String),
}

/// A machine that waits for its disks.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    machine: u64,
    runs: bool,
}

impl Steps {
    /// Ends a migration that failed.
    pub(super) fn end_failed(&self, error: &MigrationError) {
        let error = api::error_line(error);
        log::warn!("The VM has not moved: {error}");
        if let Err(error) = self.take_back(error) {
            log::error!("{}", api::error_line(&error));
        }
    }

    fn take_back(&self, error: String) -> Result<(), MigrationError> {
        let until = Instant::now() + LOCK_WAIT;
        let attempt = loop {
            let attempt = self.step(|vm| Ok(vm.take_back()))?;
            if !matches!(attempt, Attempt::Locked(_)) || Instant::now() >= until {
                break attempt;
            }
            std::thread::sleep(LOCK_INTERVAL);
        };
        let waiting = self.step(move |vm| Ok(vm.end_failed(error, attempt)))?;
        let Some(waiting) = waiting else {
            return Ok(());
        };
        loop {
            std::thread::sleep(LATER_INTERVAL);
            match self.step(move |vm| Ok(vm.take_back_later(waiting)))? {
                Attempt::Locked(_) => {}
                Attempt::Done => return Ok(()),
                Attempt::Failed(cause) => {
                    log::error!("The VM stays paused: {cause}");
                    return Ok(());
                }
            }
        }
    }
}

impl Lifecycle {
    /// The machine that was sent, and whether it ran before.
    fn sent(&self) -> Option<Waiting> {
        match &self.migration {
            Some(Migration {
                role:
                    Role::Source {
                        machine,
                        was_running,
                        ..
                    },
                ..
            }) => Some(Waiting {
                machine: *machine,
                runs: *was_running,
            }),
            _ => None,
        }
    }

    fn take_back(&mut self) -> Attempt {
        match self.sent() {
            Some(sent) if self.machine_number() == Some(sent.machine) => {
                let paused = self.is_paused();
                self.attempt(sent.runs && paused)
            }
            _ => Attempt::Done,
        }
    }

    /// The machine gets its disks back, also if it was paused before, and is resumed if it `runs`.
    fn attempt(&mut self, runs: bool) -> Attempt {
        match self.hold_disks_again() {
            Err(error @ LifecycleError::Machine(VmError::ImageLock { .. })) => {
                return Attempt::Locked(api::error_line(&error));
            }
            Err(error) => return Attempt::Failed(api::error_line(&error)),
            Ok(()) => {}
        }
        match runs.then(|| self.resume()) {
            Some(Err(error)) => Attempt::Failed(api::error_line(&error)),
            _ => Attempt::Done,
        }
    }

    /// Ends the migration, and returns what waits for its disks.
    fn end_failed(&mut self, mut error: String, attempt: Attempt) -> Option<Waiting> {
        let sent = self.sent();
        self.migration = None;
        let waiting = match attempt {
            Attempt::Done => None,
            Attempt::Locked(cause) => {
                error += &format!("; the VM stays paused until its disks are free: {cause}");
                sent
            }
            Attempt::Failed(cause) => {
                error += &format!("; the VM stays paused: {cause}");
                None
            }
        };
        self.emit(EventKind::MigrationFailed { error });
        waiting
    }

    /// Another attempt, unless the operator has acted in the meantime.
    fn take_back_later(&mut self, waiting: Waiting) -> Attempt {
        let is_same = self.machine_number() == Some(waiting.machine);
        if !is_same || self.is_migrating() || !self.disks_released {
            return Attempt::Done;
        }
        self.attempt(waiting.runs)
    }
}
