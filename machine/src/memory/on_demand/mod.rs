//! Guest RAM that is filled from files while the guest runs.
//!
//! ```text
//!  guest, KVM, device ── missing page ──► waits ─┐              file: checked by 2 MiB, then page by page
//!  balloon ── discards ──► waits until read ─────┤                 │
//!                                                ▼                 ▼
//!                                    thread: forget what is discarded; fill in a page of the file, or zeros
//!                                                └─ nothing to do: the next 2 MiB, in order
//! ```
//! The kernel reports a missing page through [`uffd`], and the thread that touched it waits. If a page is discarded
//! before it was filled in, it reads as zeros, as discarded memory does. Ranges without data in the file are ordinary
//! memory from the start, and so is each chunk of 2 MiB that the background fill has finished.
//!
//! # Failure
//! If the handler thread ended, threads that touch a missing page would wait indefinitely. If the descriptor were
//! closed, they would read zeros. If a file cannot be read or is damaged, the handler thread therefore notifies its
//! owner, which stops the machine. If the machine cannot be stopped, the thread aborts the process.
//!
//! # Rules for the thread
//! It touches no guest RAM, discards none, and takes no lock of a thread that does either: such a thread may wait for it.

mod chunks;
mod handler;
#[cfg(test)]
mod tests;
mod uffd;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

use virtio_devices::Unpoisoned;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::chunks::Chunks;
use self::handler::Handler;
use self::uffd::Userfaultfd;
use super::{ContentError, GuestMemory, ZoneContentState};
use crate::threads::{FILL_THREAD, MachineThread, ThreadStart};

/// The device that creates descriptors; access to it is controlled by its file permissions.
pub const DEVICE: &str = "/dev/userfaultfd";

/// Reasons why RAM cannot be filled on demand.
#[derive(Debug, thiserror::Error)]
pub enum OnDemandError {
    /// The memory is not private memory without a file.
    #[error(
        "Memory zone {zone} is {backing}: only private memory without a file and without huge pages can be filled on demand"
    )]
    Backing {
        /// The zone.
        zone: String,
        /// Its kind, as in statistics.
        backing: &'static str,
    },
    /// The kernel rejects userfaultfd.
    #[error(
        "Cannot create a userfaultfd: {DEVICE}: {device}; userfaultfd(2), which needs CAP_SYS_PTRACE or \
         vm.unprivileged_userfaultfd=1"
    )]
    Unavailable {
        /// The error of the device.
        device: io::Error,
        /// The error of the call.
        #[source]
        source: io::Error,
    },
    /// The kernel is too old.
    #[error(
        "The kernel's userfaultfd does not report discarded memory (UFFD_FEATURE_EVENT_REMOVE)"
    )]
    Features(#[source] io::Error),
    /// A range cannot be registered.
    #[error("Cannot register guest RAM for page faults")]
    Register(#[source] io::Error),
    /// The files do not match the machine.
    #[error(transparent)]
    Content(ContentError),
    /// The system has no descriptor or thread left.
    #[error("Cannot start the thread that fills guest RAM")]
    Thread(#[source] io::Error),
}

/// The descriptor on which the kernel reports page faults, for one [`OnDemand`].
#[derive(Debug, Clone)]
pub struct Faults(Arc<Userfaultfd>);

impl Faults {
    /// # Errors
    /// This process is not permitted to use userfaultfd, or the kernel is too old.
    pub fn open() -> Result<Self, OnDemandError> {
        Ok(Self(Arc::new(Userfaultfd::open()?)))
    }
}

/// Counts of a completed fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FillReport {
    /// Pages that were filled in because a thread waited for them.
    pub demanded_pages: u64,
    /// Pages that the background fill filled in.
    pub filled_pages: u64,
}

/// Callbacks of the handler thread.
pub trait FillOwner: Send {
    /// `bytes` more of RAM are complete.
    fn progress(&self, bytes: u64);

    /// All of RAM is complete.
    fn filled(&self, report: FillReport);

    /// RAM is no longer filled. The owner must drop the machine and [`OnDemand`]; otherwise, the process is soon aborted.
    fn failed(&self, error: &FillError);
}

/// Reasons why RAM cannot be filled any further.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// A file cannot be read or is damaged.
    #[error(transparent)]
    Content(ContentError),
    /// The kernel reports an error.
    #[error("Cannot handle page faults of guest RAM")]
    Faults(#[source] io::Error),
}

/// Orders for the handler thread, and its outcome.
#[derive(Debug)]
struct Orders {
    /// End: RAM is no longer in use.
    ends: AtomicBool,
    /// Fill in the background.
    fills: AtomicBool,
    /// Signalled after a change.
    changed: EventFd,
    /// The outcome, once the thread has ended.
    outcome: Mutex<Option<Outcome>>,
    /// Notified when the thread ends.
    over: Condvar,
}

impl Orders {
    fn end(&self, outcome: Outcome) {
        *self.outcome.lock().unpoisoned() = Some(outcome);
        self.over.notify_all();
    }
}

/// The outcome of filling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Filled,
    Failed,
}

/// RAM that is being filled. Drop it after everything that accesses the RAM.
#[derive(Debug)]
pub struct OnDemand {
    orders: Arc<Orders>,
    thread: Option<JoinHandle<()>>,
}

impl OnDemand {
    /// Starts to fill `memory`, which is untouched, from the files of its zones. `fills`: fill in the background, too.
    ///
    /// # Errors
    /// A zone has another kind of memory, a table or file does not match its zone, or the host rejects a request.
    pub fn start(
        memory: &GuestMemory,
        files: impl IntoIterator<Item = (File, ZoneContentState)>,
        faults: &Faults,
        fills: bool,
        thread_start: &ThreadStart,
        owner: Box<dyn FillOwner>,
    ) -> Result<Self, OnDemandError> {
        let mut chunks = Chunks::new();
        for (zone, (file, state)) in memory.zones().iter().zip(files) {
            if zone.backing != super::source::ANONYMOUS {
                let (zone, backing) = (zone.id.clone(), zone.backing);
                return Err(OnDemandError::Backing { zone, backing });
            }
            let added = chunks.add(memory, zone, file, &state);
            added.map_err(OnDemandError::Content)?;
        }
        let uffd = Arc::clone(&faults.0);
        let watched = chunks.ranges(memory);
        for range in &watched {
            uffd.register(range).map_err(OnDemandError::Register)?;
        }
        let orders = Arc::new(Orders {
            ends: AtomicBool::new(false),
            fills: AtomicBool::new(fills),
            changed: EventFd::new(EFD_NONBLOCK).map_err(OnDemandError::Thread)?,
            outcome: Mutex::new(None),
            over: Condvar::new(),
        });
        let handler = Handler::new(memory, uffd, watched, chunks, Arc::clone(&orders), owner);
        let handler = handler.map_err(OnDemandError::Thread)?;
        let thread_start = Arc::clone(thread_start);
        let thread = thread::Builder::new().name(FILL_THREAD.to_owned());
        let thread = thread.spawn(move || {
            thread_start(MachineThread::Fill);
            handler.run();
        });
        Ok(Self {
            orders,
            thread: Some(thread.map_err(OnDemandError::Thread)?),
        })
    }

    /// Fills in all missing pages. Returns false if that failed, which the owner has been notified of.
    pub fn finish(&self) -> bool {
        self.order(&self.orders.fills);
        let mut outcome = self.orders.outcome.lock().unpoisoned();
        loop {
            match *outcome {
                Some(outcome) => return outcome == Outcome::Filled,
                None => outcome = self.orders.over.wait(outcome).unpoisoned(),
            }
        }
    }

    fn order(&self, order: &AtomicBool) {
        order.store(true, Ordering::Release);
        // Fails only if the counter is full; then the thread is about to wake up anyway.
        self.orders.changed.write(1).ok();
    }
}

impl Drop for OnDemand {
    fn drop(&mut self) {
        self.order(&self.orders.ends);
        if let Some(thread) = self.thread.take() {
            // A thread that panics ends the process.
            thread.join().ok();
        }
    }
}
