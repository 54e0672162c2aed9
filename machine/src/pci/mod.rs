//! PCI: up to 96 segments, each with one bus of 32 slots, one function each.
//!
//! ```text
//!  port 0xcf8/0xcfc ─ ConfigPorts ─┐ (segment 0)
//!                                  ├─► PciBus ─ slots ─► PciFunction
//!  0xe800_0000 ────── Ecam ────────┘     │ BARs moved: remap
//!  + n MiB: segment n                    │
//!                                        └─► MMIO bus + doorbells (ioeventfd)
//! ```
//!
//! [`virtio_devices::pci`] defines what a function is. This module replaces a host bridge and its firmware. It answers
//! configuration cycles (PCI 3.0 §3.2.2.3.2, PCI Express 3.0 §7.2.2), places BARs, and forwards memory accesses to
//! them.

mod bars;
mod bus;
mod config_access;
mod host_bridge;
mod hotplug;
mod late_doorbells;
mod segments;
mod state;
mod windows;

#[cfg(test)]
mod fake;
#[cfg(any(test, fuzzing))]
pub(crate) mod fake_doorbells;

use std::fmt;
use std::io;

use vmm_sys_util::eventfd::EventFd;

pub use bus::PciBus;
pub use config_access::{
    CONFIG_PORT_BASE, CONFIG_PORT_BYTES, CONFIG_PORTS, ConfigPorts, ECAM_BYTES, Ecam,
};
pub use host_bridge::HostBridge;
pub use hotplug::{EjectSink, HOTPLUG_BYTES, HotplugController, HotplugState, SegmentSlots};
pub use late_doorbells::LateDoorbells;
pub use segments::{PciSegments, SEGMENT_COUNT_MAX, SegmentWeights};
pub use state::{PciBusState, RangeState, SegmentState, SlotState};
pub use windows::{MemoryWindows, WindowRanges};

use crate::bus::BusError;

/// Slots of a bus; slot 0 of segment 0 is the host bridge's.
pub const SLOT_COUNT: u8 = 32;

/// The address of a function, shown as `0001:00:05.0`. Bus and function number are always zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    /// The segment.
    pub segment: u16,
    /// The device number.
    pub slot: u8,
}

impl Bdf {
    /// Bus, device and function number in the form of PCI.
    pub fn routing_id(self) -> u16 {
        u16::from(self.slot) << 3
    }

    /// The number of the function at the virtual IOMMU.
    pub fn endpoint(self) -> u32 {
        u32::from(self.segment) << 16 | u32::from(self.routing_id())
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:00:{:02x}.0", self.segment, self.slot)
    }
}

/// The requested place of a function.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// The segment.
    pub segment: u16,
    /// The device number; the next free one if `None`.
    pub slot: Option<u8>,
}

/// Registers doorbells with the hypervisor: a guest's write to an address signals an eventfd without leaving the
/// kernel.
pub trait DoorbellBackend: Send + Sync {
    /// Connects `event`: a write of any width to `address` signals it from now on.
    ///
    /// # Errors
    /// The host rejected it, for example because there are too many.
    fn register_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes [`DoorbellBackend::register_doorbell`].
    ///
    /// # Errors
    /// It was not registered.
    fn unregister_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()>;
}

impl DoorbellBackend for hypervisor::Vm {
    fn register_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.register_ioeventfd(event, hypervisor::IoAddress::Mmio(address), None)
            .map_err(io::Error::other)
    }

    fn unregister_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        self.unregister_ioeventfd(event, hypervisor::IoAddress::Mmio(address), None)
            .map_err(io::Error::other)
    }
}

/// Reasons why a function cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// The requested segment does not exist.
    #[error("PCI segment {segment} does not exist: the VM has {count}, counted from 0")]
    NoSuchSegment {
        /// The segment.
        segment: u16,
        /// The number of segments.
        count: usize,
    },
    /// The requested device number is not below 32.
    #[error("Given PCI device ID ({0}) is out of the supported range of 0..{SLOT_COUNT}")]
    SlotOutOfRange(u8),
    /// The requested device number is in use.
    #[error("Valid PCI device identifier but already used: {0}")]
    SlotInUse(u8),
    /// All slots are in use.
    #[error("No free PCI device number on segment {segment}: all {count} are in use")]
    BusFull {
        /// The segment.
        segment: u16,
        /// Slots that it has for functions.
        count: u8,
    },
    /// A BAR's size is not a power of two of at least 16 bytes.
    #[error("BAR {index} of {id} cannot have a size of {bytes} bytes")]
    BarSize {
        /// The function.
        id: String,
        /// BAR number.
        index: u8,
        /// The requested size.
        bytes: u64,
    },
    /// No address space for a BAR.
    #[error("No room for BAR {index} of {id} ({bytes} bytes)")]
    NoAddressSpace {
        /// The function.
        id: String,
        /// BAR number.
        index: u8,
        /// The requested size.
        bytes: u64,
        #[source]
        source: vm_allocator::Error,
    },
    /// No address space for memory of a device.
    #[error("No room for the memory of {id} ({bytes} bytes)")]
    NoMemorySpace {
        /// The function.
        id: String,
        /// The requested size.
        bytes: u64,
        #[source]
        source: vm_allocator::Error,
    },
    /// An address window is empty or wraps around.
    #[error("PCI memory window {base:#x}+{bytes:#x} is not usable")]
    Window {
        /// Start.
        base: u64,
        /// Length.
        bytes: u64,
        #[source]
        source: vm_allocator::Error,
    },
    /// A register window of the bus overlaps another range.
    #[error("Cannot place the PCI configuration space")]
    Place(#[from] BusError),
}
