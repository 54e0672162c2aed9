//! Tracks the accesses of a device in progress. A request that takes memory away from the device is answered only after
//! these accesses have ended.
//!
//! ```text
//!   worker of the device                        worker of the IOMMU
//!   begins an access, in era 1
//!   translates, uses the memory                 UNMAP: the tables change, era 1 ends
//!   begins an access, in era 2: no mapping      waits
//!   drops the last access of era 1 ───────────► answers
//! ```

use std::sync::{Arc, Condvar, Mutex};

use crate::Unpoisoned;

/// The time between two removals of memory from a device. Each access that begins in it holds it.
#[derive(Debug, Default)]
pub(super) struct Era(Arc<End>);

/// Whether the last access of an era is over.
#[derive(Debug, Default)]
struct End {
    is_over: Mutex<bool>,
    changed: Condvar,
}

impl Drop for Era {
    fn drop(&mut self) {
        *self.0.is_over.lock().unpoisoned() = true;
        self.0.changed.notify_all();
    }
}

/// The accesses of one device.
#[derive(Debug, Default)]
pub(crate) struct Eras {
    current: Mutex<Arc<Era>>,
}

impl Eras {
    /// The era of an access that begins now.
    pub(super) fn current(&self) -> Arc<Era> {
        Arc::clone(&self.current.lock().unpoisoned())
    }

    /// Ends the era, after the tables were changed: accesses of the next one see the change. `None`: it has no accesses,
    /// and later ones see the change too.
    pub(super) fn end(&self) -> Option<EndedEra> {
        let mut current = self.current.lock().unpoisoned();
        if Arc::get_mut(&mut current).is_some() {
            return None;
        }
        let ended = std::mem::take(&mut *current);
        Some(EndedEra(Arc::clone(&ended.0)))
    }
}

/// An era that has ended, but may still have accesses.
#[derive(Debug)]
pub(crate) struct EndedEra(Arc<End>);

impl EndedEra {
    /// Waits for its last access, which ends with a turn of the device's worker or with host I/O in flight.
    pub(super) fn wait(self) {
        let is_over = self.0.is_over.lock().unpoisoned();
        let waited = self.0.changed.wait_while(is_over, |is_over| !*is_over);
        drop(waited.unpoisoned());
    }
}
