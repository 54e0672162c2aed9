//! The interface between a PCI function and the VMM's bus.
//!
//! The bus itself (ECAM, CF8/CFC, address windows) is in the VMM. This module defines the interface between both, and
//! the two building blocks of every function: its configuration space and MSI-X.

mod config_space;
mod msix;

use std::io;

pub use config_space::{ConfigSpace, Identity, PciConfigState};
pub use msix::{
    MSIX_CAPABILITY_ID, MSIX_ENTRY_BYTES, MSIX_VECTORS_MAX, MsixLines, MsixState, MsixTable,
};

use vmm_sys_util::eventfd::EventFd;

use crate::counters::Counters;
use crate::worker::Pausing;

/// A message-signalled interrupt as the driver programmed it (PCI 3.0 §6.8.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Message address, both halves.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// The interrupt vectors of one function. Implemented by the VMM on top of
/// KVM's GSI routing and irqfds.
pub trait MsiVectors: Send + Sync {
    /// Routes `vector` to `message`; from then on [`MsiVectors::trigger`] injects.
    ///
    /// # Errors
    /// The host rejected the route; the vector stays disabled.
    fn enable(&self, vector: u16, message: MsiMessage) -> io::Result<()>;
    /// Removes the route. Idempotent.
    ///
    /// # Errors
    /// The host refused.
    fn disable(&self, vector: u16) -> io::Result<()>;
    /// Injects an enabled vector; never blocks.
    ///
    /// # Errors
    /// The vector is not enabled, or the host rejected it.
    fn trigger(&self, vector: u16) -> io::Result<()>;
}

/// One base address register or pair (all of ours are memory BARs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Register number 0–5 (the lower one of a 64-bit pair).
    pub index: u8,
    /// Size in bytes, a power of two.
    pub size_bytes: u64,
    /// 64-bit prefetchable-capable BAR.
    pub is_64bit: bool,
    /// The programmed address.
    pub address: u64,
    /// Whether memory decoding is on, so that the function responds at `address`.
    pub decoded: bool,
}

/// A write-only register whose writes KVM turns into eventfd signals without leaving the kernel.
#[derive(Debug)]
pub struct DoorbellRegister<'a> {
    /// The BAR that contains it.
    pub bar_index: u8,
    /// Offset in that BAR.
    pub offset: u64,
    /// Signalled on a write of any width to that address.
    pub event: &'a EventFd,
}

/// A PCI function. Called by vCPU threads, serialised by the implementation; never waits for the guest. A write to the
/// doorbell of a queue that holds its notifier waits for the worker's current batch and one run of that queue.
pub trait PciFunction: Send + Sync {
    /// The device's id in the API, e.g. `_disk0`.
    fn id(&self) -> &str;
    /// Reads configuration space; `offset + data.len() <= 4096`, 1, 2 or 4 bytes, naturally aligned.
    fn config_read(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space. Returns true when an entry of
    /// [`PciFunction::bars`] may have changed, so that the bus remaps.
    fn config_write(&self, offset: u16, data: &[u8]) -> bool;
    /// The BARs with their current addresses.
    fn bars(&self) -> Vec<Bar>;
    /// Programs a BAR as firmware would, before the guest sees the function. Decoding does not change.
    fn set_bar_address(&self, index: u8, address: u64);
    /// Reads from a BAR; any length and offset inside it.
    fn bar_read(&self, index: u8, offset: u64, data: &mut [u8]);
    /// Writes to a BAR; any length and offset inside it.
    fn bar_write(&self, index: u8, offset: u64, data: &[u8]);
    /// The bus has mapped a BAR at this address, or no longer maps it. A function that shows memory there hides it before
    /// it returns.
    fn bar_mapped(&self, _index: u8, _address: Option<u64>) {}
    /// The doorbells, for the bus to register with KVM wherever the BAR is mapped.
    fn with_doorbells(&self, visit: &mut dyn FnMut(DoorbellRegister<'_>));
    /// Counters of the device and of the function, for `vm.counters`; an empty map omits the device.
    fn counters(&self) -> Counters {
        Counters::new()
    }
    /// Asks the threads of the device to stop accessing guest RAM, and returns what waits for them. A function without
    /// threads has none.
    fn begin_pause(&self) -> Vec<Pausing> {
        Vec::new()
    }
    /// As [`PciFunction::begin_pause`], but returns when the threads have stopped.
    fn pause(&self) {
        self.begin_pause().into_iter().for_each(Pausing::wait);
    }
    /// Undoes [`PciFunction::pause`].
    fn resume(&self);
    /// Asks the threads of the device to end, which its drop waits for. Nothing else may be called afterwards.
    fn begin_stop(&self) {}
    /// Resets to the power-on state (VM reset); BAR addresses are kept.
    fn reset(&self);
}

/// Pauses all functions at the same time, and so waits for the slowest one instead of for the sum.
pub fn pause_all<'a>(functions: impl IntoIterator<Item = &'a dyn PciFunction>) {
    let functions = functions.into_iter();
    let pausing: Vec<_> = functions.flat_map(PciFunction::begin_pause).collect();
    pausing.into_iter().for_each(Pausing::wait);
}
