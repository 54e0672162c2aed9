//! A run of free page hinting, from the host's request to the guest's last message.
//!
//! ```text
//!            start                  guest sends the id
//!    Idle ──────────► Requested ───────────────────────► Running
//!     ▲ ▲                 │ stop                          │   │ stop
//!     │ └─────────────────┘                               │   ▼
//!     │      guest sends STOP, or its driver resets       │ Stopping
//!     └───────────────────────────────────────────────────┴───┘
//! ```
//!
//! Blocks are discarded only in `Running`. The guest sees the request as `free_page_hint_cmd_id`. A new id starts a
//! run. DONE stops or ends it, so that the guest takes its blocks back. A guest that never responds keeps the run in
//! `Requested`. A guest that never ends it keeps the run in `Stopping`, which the next start also leaves.
//!
//! # When a hinted block may be discarded
//!
//! Reporting isolates pages until the device completes the chain. Hinting does not: the standard lets the driver reuse
//! a hinted block at any time, completed or not, and its writes must persist. A device that discards a block some time
//! after the hint may lose such a write.
//!
//! Linux (drivers/virtio/virtio_balloon.c, the same order since 4.20) processes one block at a time in
//! `get_free_page_and_send`:
//!
//! ```text
//!   page = alloc_pages(…)            the block has no other user
//!   virtqueue_add_inbuf(vq, page)    the device can see it
//!   virtqueue_kick(vq)               ◄── rings our doorbell
//!   balloon_page_push(&vb->free_page_list, page)
//!                                    from here on the shrinker
//!                                    (`virtio_balloon_shrinker_scan`), or DONE
//!                                    (`return_free_pages_to_mm`), may free it
//! ```
//!
//! The shrinker takes the last pushed block and checks no used ring, so neither an uncompleted chain nor a run in
//! progress protects a block. The kick does: until the kick returns to the vCPU, the block is allocated and on no list.
//! Hence the rules:
//!
//! * the doorbell of this queue holds the vCPU that signals it ([`crate::VirtioDevice::holds_notifier`]), so KVM does not
//!   handle it in the kernel;
//! * a block is discarded only while the vCPU is held, and of the available chains only the *last* one. The kicks of
//!   earlier chains have returned. Normally, no earlier chains exist, because the driver's work item is one thread, and
//!   the device offers no feature that suppresses kicks;
//! * a block found in any other way, for example after a pause, is completed and counted as `hint_not_held`;
//! * the run must be acknowledged and not stopped; otherwise the block is counted as `hint_stale`.
//!
//! After the guest has sent all its blocks, it ends the run with the id STOP and receives DONE. It then takes its
//! blocks back as ordinary free memory, which has no host memory behind it.

use std::sync::{Mutex, MutexGuard};

use ::state::{Part, StateError, parts, require};
use device_facts::HintingPhase;
use serde::{Deserialize, Serialize};

use super::config::ConfigSpace;
use super::spec::{VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP};
use crate::Unpoisoned;

const PART: Part = parts::BALLOON;

/// The first id of a run.
const CMD_ID_FIRST: u32 = 2;

/// The runs of hinting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HintingRuns {
    /// The phase of the latest run.
    pub phase: HintingPhase,
    /// Id of the latest run; 0 before the first.
    pub command_id: u32,
    /// Runs requested.
    pub runs_requested: u64,
    /// Runs that the guest has ended after sending everything.
    pub runs_completed: u64,
}

/// The saved state of hinting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingState {
    /// Name of the phase.
    pub phase: String,
    /// Id of the latest run; 0 before the first.
    pub command_id: u32,
    /// Runs requested.
    pub runs_requested: u64,
    /// Runs that the guest has ended.
    pub runs_completed: u64,
}

/// Reasons why a run cannot be started or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HintingError {
    /// Not configured, or guest memory cannot be discarded in blocks.
    #[error("free page hinting is not configured, or the guest's memory does not support it")]
    NotOffered,
    /// No driver is running.
    #[error("no balloon driver is running in the guest")]
    DriverNotReady,
    /// The driver does not support it or has not enabled the queue.
    #[error("the guest's balloon driver does not support hinting")]
    GuestDeclined,
    /// A run is in progress already.
    #[error("run {0} of free page hinting is already in progress")]
    UnderWay(u32),
}

/// The runs of hinting. The fields that the guest sees change under the same lock.
#[derive(Debug, Default)]
pub(super) struct Hinting(Mutex<HintingRuns>);

impl Hinting {
    fn lock(&self) -> MutexGuard<'_, HintingRuns> {
        // Only plain stores run under the lock, so no holder can panic.
        self.0.lock().unpoisoned()
    }

    pub(super) fn status(&self) -> HintingRuns {
        *self.lock()
    }

    pub(super) fn state(&self) -> HintingState {
        let status = self.status();
        HintingState {
            phase: status.phase.name().to_owned(),
            command_id: status.command_id,
            runs_requested: status.runs_requested,
            runs_completed: status.runs_completed,
        }
    }

    /// Continues a saved run, whose id the guest sees as `shown_id`.
    pub(super) fn restore(&self, state: &HintingState, shown_id: u32) -> Result<(), StateError> {
        let phase = HintingPhase::ALL
            .iter()
            .copied()
            .find(|phase| phase.name() == state.phase)
            .ok_or_else(|| {
                let reason = format!("has unknown phase {:?}", state.phase);
                StateError::invalid(PART, "hinting", reason)
            })?;
        let shown = match phase {
            HintingPhase::Requested | HintingPhase::Running => {
                state.command_id >= CMD_ID_FIRST && shown_id == state.command_id
            }
            HintingPhase::Idle | HintingPhase::Stopping => {
                [VIRTIO_BALLOON_CMD_ID_DONE, VIRTIO_BALLOON_CMD_ID_STOP].contains(&shown_id)
            }
        };
        require(shown, PART, "free_page_hint_cmd_id", || {
            format!(
                "cannot be {shown_id} in phase {:?} of run {}",
                state.phase, state.command_id
            )
        })?;
        *self.lock() = HintingRuns {
            phase,
            command_id: state.command_id,
            runs_requested: state.runs_requested,
            runs_completed: state.runs_completed,
        };
        Ok(())
    }

    pub(super) fn is_running(&self) -> bool {
        self.lock().phase == HintingPhase::Running
    }

    /// Requests a run; the caller then sends the configuration change interrupt.
    pub(super) fn start(&self, config: &ConfigSpace) -> Result<u32, HintingError> {
        let mut status = self.lock();
        if matches!(
            status.phase,
            HintingPhase::Requested | HintingPhase::Running
        ) {
            return Err(HintingError::UnderWay(status.command_id));
        }
        // When ids wrap around, the two reserved ids are skipped.
        let id = status.command_id.wrapping_add(1).max(CMD_ID_FIRST);
        status.phase = HintingPhase::Requested;
        status.command_id = id;
        status.runs_requested += 1;
        config.set_hint_cmd_id(id);
        Ok(id)
    }

    /// Ends the run, if there is one. Returns whether the caller must send the configuration change interrupt.
    pub(super) fn stop(&self, config: &ConfigSpace) -> bool {
        let mut status = self.lock();
        status.phase = match status.phase {
            HintingPhase::Idle | HintingPhase::Stopping => return false,
            // If the guest still sends the id, no run matches it.
            HintingPhase::Requested => HintingPhase::Idle,
            HintingPhase::Running => HintingPhase::Stopping,
        };
        config.set_hint_cmd_id(VIRTIO_BALLOON_CMD_ID_DONE);
        true
    }

    /// Handles a command id that the guest has sent.
    pub(super) fn command(&self, id: u32, config: &ConfigSpace) -> CommandEffect {
        let mut status = self.lock();
        match (id, status.phase) {
            (VIRTIO_BALLOON_CMD_ID_STOP, HintingPhase::Running) => {
                status.phase = HintingPhase::Idle;
                status.runs_completed += 1;
                config.set_hint_cmd_id(VIRTIO_BALLOON_CMD_ID_DONE);
                CommandEffect::Signal
            }
            (VIRTIO_BALLOON_CMD_ID_STOP, HintingPhase::Stopping) => {
                status.phase = HintingPhase::Idle;
                CommandEffect::None
            }
            // The end of a run that a stop, and possibly a start, has overtaken.
            (VIRTIO_BALLOON_CMD_ID_STOP, _) => CommandEffect::None,
            (id, HintingPhase::Requested) if id == status.command_id => {
                status.phase = HintingPhase::Running;
                CommandEffect::None
            }
            _ => CommandEffect::NotAskedFor,
        }
    }

    /// Handles the loss of the driver. The next driver must not see a request from before its start.
    pub(super) fn forget_driver(&self, config: &ConfigSpace) {
        let mut status = self.lock();
        status.phase = HintingPhase::Idle;
        config.set_hint_cmd_id(VIRTIO_BALLOON_CMD_ID_STOP);
    }
}

/// The effect of a command id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CommandEffect {
    None,
    /// The guest must read the configuration again.
    Signal,
    /// No current run has this id.
    NotAskedFor,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_id_that_wraps_skips_those_with_a_meaning() {
        let (hinting, config) = (Hinting::default(), ConfigSpace::default());
        hinting.lock().command_id = u32::MAX - 1;
        for expected in [u32::MAX, 2, 3] {
            assert_eq!(hinting.start(&config), Ok(expected));
            assert_eq!(config.hint_cmd_id(), expected);
            assert!(hinting.stop(&config));
        }
    }

    #[test]
    fn guest_that_never_ends_a_stopped_run_does_not_block_the_next() {
        let (hinting, config) = (Hinting::default(), ConfigSpace::default());
        let first = hinting.start(&config).unwrap();
        assert_eq!(hinting.command(first, &config), CommandEffect::None);
        assert!(hinting.stop(&config));
        assert!(!hinting.stop(&config), "once is enough");
        assert_eq!(hinting.status().phase, HintingPhase::Stopping);
        let second = hinting.start(&config).unwrap();
        // The end of the first run must not end the second.
        hinting.command(VIRTIO_BALLOON_CMD_ID_STOP, &config);
        assert_eq!(hinting.status().phase, HintingPhase::Requested);
        assert_eq!(hinting.command(first, &config), CommandEffect::NotAskedFor);
        hinting.command(second, &config);
        assert!(hinting.is_running());
        assert_eq!(hinting.start(&config), Err(HintingError::UnderWay(second)));
    }
}
