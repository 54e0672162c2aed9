//! Requests to the handler thread, and its reports.

use std::error::Error;
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Condvar, Mutex};

use virtio_devices::Unpoisoned;
use vmm_sys_util::eventfd::EventFd;

use super::super::{AbsentPages, SavedZone};
use super::error::FillError;

/// Counts of a completed fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillReport {
    /// Pages that were filled in because a thread waited for them.
    pub demanded_pages: u64,
    /// Pages that the background fill filled in.
    pub filled_pages: u64,
}

/// Maximum number of pages whose order is recorded: 16 MiB of RAM. A longer record delays the start of a machine more than
/// it helps, and the background fill brings the rest faster by whole chunks.
pub const TOUCHED_MAX: usize = 1 << 12;

/// The content with which RAM is filled.
#[derive(Debug)]
pub enum Content {
    /// In the files of each zone.
    Files(Vec<SavedZone>),
    /// These pages, in another process.
    Elsewhere(Vec<AbsentPages>, Box<dyn PageSource>),
}

/// Another process that has pages. It is called by the handler thread only.
pub trait PageSource: Send + fmt::Debug {
    /// Fetches the pages `bits`, one bit each, of the chunk at `offset` of zone number `zone`. Calls `put` with the number in
    /// the chunk and the data of each page that has any; the others are zeros. Must return within a limited time.
    ///
    /// # Errors
    /// The other process does not answer, or wrongly.
    fn fetch(
        &mut self,
        zone: usize,
        offset: u64,
        bits: &[u8],
        put: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// No further page is needed.
    fn end(&mut self);
}

/// Callbacks of the handler thread.
pub trait FillOwner: Send {
    /// `bytes` more of RAM are complete.
    fn progress(&self, bytes: u64);

    /// All of RAM is complete.
    fn filled(&self, report: FillReport);

    /// Numbers of the guest's pages in the order in which they were filled in on demand, at most [`TOUCHED_MAX`]. Called once,
    /// when RAM is complete or no longer in use.
    fn touched(&self, pages: &[u32]);

    /// RAM is no longer filled. The owner must drop the machine and [`OnDemand`]; otherwise, the process is soon aborted.
    fn failed(&self, error: &FillError);
}

/// Orders for the handler thread, and its outcome.
#[derive(Debug)]
pub(super) struct Orders {
    /// End: RAM is no longer in use.
    pub(super) ends: AtomicBool,
    /// Fill in the background.
    pub(super) fills: AtomicBool,
    /// Signalled after a change.
    pub(super) changed: EventFd,
    /// The outcome, once the thread has ended.
    pub(super) outcome: Mutex<Option<Outcome>>,
    /// Notified when the thread ends.
    pub(super) over: Condvar,
}

impl Orders {
    pub(super) fn end(&self, outcome: Outcome) {
        *self.outcome.lock().unpoisoned() = Some(outcome);
        self.over.notify_all();
    }
}

/// The outcome of filling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Filled,
    Failed,
}
