//! Guest RAM that is filled from files, or from another process, while the guest runs.
//!
//! ```text
//!  guest, KVM, device ── missing page ──► waits ─┐              file: checked by 16 KiB, then page by page
//!  balloon ── discards ──► waits until read ─────┤                 │
//!                                                ▼                 ▼
//!                                    thread: forget what is discarded; fill in a page of the file, or zeros
//!                                                └─ nothing to do: the pages that an earlier machine touched first,
//!                                                                  then the next 2 MiB, in order
//! ```
//! The kernel reports a missing page through [`uffd`], and the thread that touched it waits. If a page is discarded
//! before it was filled in, it reads as zeros, as discarded memory does. Ranges without data in the file are ordinary
//! memory from the start. A chunk of 2 MiB becomes ordinary memory once the background fill has finished it.
//!
//! # Failure
//! If the handler thread ended, threads that touch a missing page would wait indefinitely. If the descriptor were
//! closed, they would read zeros. If a file cannot be read or is damaged, the handler thread therefore notifies its
//! owner, which stops the machine. If the machine cannot be stopped, the thread aborts the process.
//!
//! # Rules for the thread
//! The handler thread must not touch or discard guest RAM, nor take a lock of a thread that does either. Such a thread
//! may wait for the handler thread.

mod chunks;
mod error;
mod handler;
mod orders;
#[cfg(test)]
mod tests;
mod uffd;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

use virtio_devices::Unpoisoned;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::chunks::Chunks;
use self::handler::Handler;
use self::orders::{Orders, Outcome};
use self::uffd::Userfaultfd;
use super::GuestMemory;
use crate::threads::{FILL_THREAD, MachineThread, MachineThreadStart};

pub use self::error::{DEVICE, FillError, OnDemandError};
pub use self::orders::{Content, FillOwner, FillReport, PageSource, TOUCHED_MAX};

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

/// When the pages are filled in that no thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Background {
    /// From the start.
    AtOnce,
    /// From [`OnDemand::begin`] on: until then, the machine that is being restored has the host's processors. It also pauses
    /// after each demand.
    Later,
    /// Only if all pages are needed.
    Never,
}

/// RAM that is being filled. Drop it after everything that accesses the RAM.
#[derive(Debug)]
pub struct OnDemand {
    orders: Arc<Orders>,
    background: Background,
    thread: Option<JoinHandle<()>>,
}

impl OnDemand {
    /// Whether RAM like `memory` can be filled on demand.
    ///
    /// # Errors
    /// A zone has another kind of memory.
    pub fn check(memory: &GuestMemory) -> Result<(), OnDemandError> {
        let mut zones = memory.zones().iter();
        match zones.find(|zone| zone.backing != super::source::ANONYMOUS) {
            Some(zone) => Err(OnDemandError::Backing {
                zone: zone.id.clone(),
                backing: zone.backing,
            }),
            None => Ok(()),
        }
    }

    /// Starts to fill `memory` with `content`, whose pages are not present. The fill in the background begins with the
    /// guest's pages that have the numbers in `first`. Numbers of other pages are ignored.
    ///
    /// # Errors
    /// A zone has another kind of memory, a table or file does not match its zone, or the host rejects a request.
    pub fn start(
        memory: &GuestMemory,
        content: Content,
        faults: &Faults,
        background: Background,
        first: &[u32],
        thread_start: &MachineThreadStart,
        owner: Box<dyn FillOwner>,
    ) -> Result<Self, OnDemandError> {
        Self::check(memory)?;
        let chunks = Chunks::new(memory, content).map_err(OnDemandError::Content)?;
        let uffd = Arc::clone(&faults.0);
        let watched = chunks.ranges(memory);
        for range in &watched {
            uffd.register(range).map_err(OnDemandError::Register)?;
        }
        let orders = Arc::new(Orders {
            ends: AtomicBool::new(false),
            fills: AtomicBool::new(background == Background::AtOnce),
            changed: EventFd::new(EFD_NONBLOCK).map_err(OnDemandError::Thread)?,
            outcome: Mutex::new(None),
            over: Condvar::new(),
        });
        let first = chunks.places(first);
        let handler = Handler::new(memory, uffd, watched, chunks, Arc::clone(&orders), owner);
        let handler = handler
            .map_err(OnDemandError::Thread)?
            .beginning_with(first)
            .yielding(background == Background::Later);
        let thread_start = Arc::clone(thread_start);
        let thread = thread::Builder::new().name(FILL_THREAD.to_owned());
        let thread = thread.spawn(move || {
            thread_start(MachineThread::Fill);
            handler.run();
        });
        Ok(Self {
            orders,
            background,
            thread: Some(thread.map_err(OnDemandError::Thread)?),
        })
    }

    /// The machine has been restored: starts the fill in the background, unless it was to start at another time.
    pub fn begin(&self) {
        if self.background == Background::Later {
            self.order(&self.orders.fills);
        }
    }

    /// Whether no page is missing. If one is, all are filled in the background from now on.
    pub fn is_complete(&self) -> bool {
        self.order(&self.orders.fills);
        *self.orders.outcome.lock().unpoisoned() == Some(Outcome::Filled)
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
