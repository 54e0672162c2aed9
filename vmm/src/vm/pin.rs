//! Stops discarding while assigned devices have guest RAM pinned.
//!
//! If a page of a device were discarded, the device would keep the old page, and the guest would get a new one.

use std::time::{Duration, Instant};

use virtio_devices::balloon::BalloonHandle;
use virtio_devices::reclaim::{InhibitGuard, InhibitReason};

use super::{Vm, VmError};

/// Maximum time to wait for discards in progress. A batch takes milliseconds.
const SETTLE_MAX: Duration = Duration::from_secs(2);
const SETTLE_POLL: Duration = Duration::from_millis(1);

/// Stops the balloon from discarding, and returns when no discard is in progress.
///
/// # Errors
/// The discards in progress do not end.
pub(super) fn settled(balloon: Option<&BalloonHandle>) -> Result<Option<InhibitGuard>, VmError> {
    let Some(balloon) = balloon else {
        return Ok(None);
    };
    let guard = balloon.inhibit(InhibitReason::AssignedDevice);
    let begin = Instant::now();
    while !guard.is_settled() {
        if begin.elapsed() > SETTLE_MAX {
            return Err(VmError::Unsettled);
        }
        std::thread::sleep(SETTLE_POLL);
    }
    Ok(Some(guard))
}

impl Vm {
    /// Before a device is assigned.
    pub(super) fn pin(&mut self) -> Result<(), VmError> {
        if self.pin.is_none() {
            self.pin = settled(self.balloon.as_ref())?;
        }
        Ok(())
    }

    /// The guard that keeps this balloon from discarding, if RAM is pinned.
    pub(super) fn pin_of(&self, balloon: Option<&BalloonHandle>) -> Option<InhibitGuard> {
        let balloon = balloon.filter(|_| self.pc.has_pinned_memory());
        balloon.map(|balloon| balloon.inhibit(InhibitReason::AssignedDevice))
    }

    /// After a device was added or removed. Discarding resumes when no device has RAM pinned.
    pub(super) fn pin_or_unpin(&mut self) {
        if !self.pc.has_pinned_memory() {
            if self.pin.take().is_some()
                && let Some(balloon) = &self.balloon
            {
                // Memory reported in the meantime is resident. A driver that cannot report it again refuses.
                balloon.report_now(true).ok();
            }
        } else if self.pin.is_none() {
            self.pin = self.pin_of(self.balloon.as_ref());
        }
    }
}
