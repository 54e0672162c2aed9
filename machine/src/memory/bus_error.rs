//! Handles SIGBUS in guest RAM or in the memory of a device. The signal means that one of our threads touched a page that
//! the host cannot provide, or that is defective.
//!
//! The access cannot fail, and the thread cannot wait. The handler therefore puts a page of zeros in place of the missing
//! one, and notifies the machine's owner, which ends or pauses the machine. Any other SIGBUS ends the process, as by default.
#![allow(unsafe_code)]
// UNSAFETY: a signal handler may only call what is async-signal-safe: atomics and plain system calls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use libc::{c_int, c_void, siginfo_t};
use virtio_devices::Unpoisoned;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::register_signal_handler;

/// Regions in this process: zones, on both sides of the hole, memory devices, and the memory of up to 31 devices on each of
/// 96 PCI segments.
pub(super) const SLOTS_MAX: usize = 4096;

/// A region, for the signal handler. Unused if `end` is 0.
struct Slot {
    start: AtomicUsize,
    end: AtomicUsize,
    page_bytes: AtomicUsize,
    /// Written to after a fault.
    event: AtomicI32,
    /// The first address of a fault; 0 if there was none.
    fault: AtomicUsize,
}

static SLOTS: [Slot; SLOTS_MAX] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page_bytes: AtomicUsize::new(0),
        event: AtomicI32::new(0),
        fault: AtomicUsize::new(0),
    }
}; SLOTS_MAX];
/// Held while a slot is taken.
static TAKING: Mutex<()> = Mutex::new(());

/// While it exists, SIGBUS in one region is survived. Keeps the region mapped.
#[derive(Debug)]
pub(super) struct Cover {
    slot: usize,
    region: Arc<MmapRegion<()>>,
    guest_address: u64,
    _event: Arc<EventFd>,
}

impl Cover {
    /// Covers `region`, which the guest has at `guest_address` and which has pages of `page_bytes`. A fault there
    /// signals `event`.
    pub(super) fn new(
        region: Arc<MmapRegion<()>>,
        guest_address: u64,
        page_bytes: u64,
        event: Arc<EventFd>,
    ) -> io::Result<Self> {
        register_signal_handler(libc::SIGBUS, on_bus_error)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let _taking = TAKING.lock().unpoisoned();
        let mut slots = SLOTS.iter();
        let slot = slots
            .position(|slot| slot.end.load(Ordering::Acquire) == 0)
            .ok_or_else(|| io::Error::other(format!("more than {SLOTS_MAX} regions")))?;
        let start = region.as_ptr() as usize;
        SLOTS[slot].start.store(start, Ordering::Relaxed);
        SLOTS[slot]
            .page_bytes
            .store(page_bytes as usize, Ordering::Relaxed);
        SLOTS[slot]
            .event
            .store(event.as_raw_fd(), Ordering::Relaxed);
        SLOTS[slot].fault.store(0, Ordering::Relaxed);
        SLOTS[slot]
            .end
            .store(start + region.size(), Ordering::Release);
        Ok(Self {
            slot,
            region,
            guest_address,
            _event: event,
        })
    }

    /// Whether the guest has the region at `address`.
    pub(super) fn holds(&self, address: u64) -> bool {
        self.offset(address).is_some()
    }

    fn offset(&self, address: u64) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.guest_address)?).ok()?;
        (offset < self.region.size()).then_some(offset)
    }

    /// Reads a word, which the guest may change at any time.
    pub(super) fn read(&self, address: u64) -> Option<u64> {
        let offset = self.offset(address)?;
        self.region.as_volatile_slice().read_obj(offset).ok()
    }

    /// The guest address of the first fault since the last call.
    pub(super) fn take_fault(&self) -> Option<u64> {
        let address = SLOTS[self.slot].fault.swap(0, Ordering::AcqRel);
        let offset = address.checked_sub(self.region.as_ptr() as usize)?;
        Some(self.guest_address + offset as u64)
    }

    /// Whether [`Cover::take_fault`] would return one.
    pub(super) fn has_fault(&self) -> bool {
        SLOTS[self.slot].fault.load(Ordering::Acquire) != 0
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        SLOTS[self.slot].end.store(0, Ordering::Release);
    }
}

extern "C" fn on_bus_error(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo, and for SIGBUS it has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let mut slots = SLOTS.iter();
    let slot = slots.find(|slot| {
        let end = slot.end.load(Ordering::Acquire);
        address < end && address >= slot.start.load(Ordering::Relaxed)
    });
    // SAFETY: `errno` belongs to this thread; the interrupted code may be about to read it.
    let errno = unsafe { *libc::__errno_location() };
    let survived = slot.is_some_and(|slot| replace_page(slot, address));
    if !survived {
        // SAFETY: async-signal-safe. The access is repeated after the return and ends the process.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts zeros in place of the page and notifies the owner. False if the host lacks even those.
fn replace_page(slot: &Slot, address: usize) -> bool {
    let page_bytes = slot.page_bytes.load(Ordering::Relaxed);
    let page = address / page_bytes * page_bytes;
    // SAFETY: the page is part of a region of the guest, which stays mapped while the slot is in use: its content may
    // change at any time, and no reference to it exists.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::without_provenance_mut(page),
            page_bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    let first = slot
        .fault
        .compare_exchange(0, address, Ordering::AcqRel, Ordering::Relaxed);
    if first.is_ok() {
        let event: RawFd = slot.event.load(Ordering::Relaxed);
        let one = 1u64.to_ne_bytes();
        // SAFETY: `write` is async-signal-safe and reads eight live bytes. If it fails, the event is pending already.
        unsafe { libc::write(event, one.as_ptr().cast(), one.len()) };
    }
    true
}
