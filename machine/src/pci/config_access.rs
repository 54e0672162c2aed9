//! The two access mechanisms of configuration space: ports 0xcf8/0xcfc and ECAM.
//!
//! Both accept any width at any offset. The bus splits accesses into naturally aligned pieces, and a piece beyond the
//! function's space reads as all ones.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use super::PciBus;
use crate::bus::BusDevice;

/// First port of the two registers, and number of ports.
pub const CONFIG_PORTS: (u16, u16) = (0xcf8, 8);
/// First port of configuration mechanism 1 (PCI 3.0 §3.2.2.3.2).
pub const CONFIG_PORT_BASE: u64 = CONFIG_PORTS.0 as u64;
/// Number of ports: the address register and the data window, four each.
pub const CONFIG_PORT_BYTES: u64 = CONFIG_PORTS.1 as u64;
/// One bus in ECAM: 4 KiB for each of 8 functions in 32 slots.
pub const ECAM_BYTES: u64 = 1 << 20;

const ADDRESS_BYTES: u64 = 4;
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Functions have 4 KiB of configuration space.
const FUNCTION_SHIFT: u32 = 12;

/// Slot, function number and offset of a configuration access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    slot: u8,
    function: u8,
    offset: u16,
}

/// The address register at 0xcf8 and the data window at 0xcfc.
#[derive(Debug)]
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    /// Bit 31 enable, bits 23–16 bus, 15–11 slot, 10–8 function, 7–2 register.
    address: AtomicU32,
}

impl ConfigPorts {
    /// Ports for `bus`.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self {
            bus,
            address: AtomicU32::new(0),
        }
    }

    /// The address register. Any value is possible, because a guest can write any.
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Relaxed)
    }

    /// Restores the address register.
    pub fn restore_address(&self, address: u32) {
        self.address.store(address, Ordering::Relaxed);
    }

    /// The target of the data window at `port_offset`, if the enable bit is set and the bus is ours.
    fn target(&self, port_offset: u64) -> Option<Target> {
        let address = self.address.load(Ordering::Relaxed);
        let bus = (address >> 16) & 0xff;
        if address & ADDRESS_ENABLE == 0 || bus != 0 {
            return None;
        }
        let offset = (address & 0xfc) as u16 + (port_offset - ADDRESS_BYTES) as u16;
        Some(Target {
            slot: ((address >> 11) & 0x1f) as u8,
            function: ((address >> 8) & 0x7) as u8,
            offset,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset < ADDRESS_BYTES {
            let bytes = self.address.load(Ordering::Relaxed).to_le_bytes();
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = bytes.get(offset as usize + i).copied().unwrap_or(0xff);
            }
            return;
        }
        match self.target(offset) {
            Some(target) => read(&self.bus, target, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= ADDRESS_BYTES {
            if let Some(target) = self.target(offset) {
                write(&self.bus, target, data);
            }
            return;
        }
        // A narrow write changes only its bytes: Linux probes for this mechanism with a byte write to 0xcfb
        // (arch/x86/pci/direct.c). Concurrent writes by two vCPUs are a race in the guest.
        let mut bytes = self.address.load(Ordering::Relaxed).to_le_bytes();
        for (old, new) in bytes.iter_mut().skip(offset as usize).zip(data) {
            *old = *new;
        }
        self.address
            .store(u32::from_le_bytes(bytes), Ordering::Relaxed);
    }
}

/// Memory-mapped configuration space of a segment.
///
/// It is on the MMIO bus on which [`PciBus`] moves BARs. The reference is weak because otherwise the two would keep
/// each other alive.
#[derive(Debug)]
pub struct Ecam {
    bus: Weak<PciBus>,
}

impl Ecam {
    /// A window of [`ECAM_BYTES`] for `bus`.
    #[must_use]
    pub fn new(bus: &Arc<PciBus>) -> Self {
        Self {
            bus: Arc::downgrade(bus),
        }
    }

    fn target(offset: u64) -> Target {
        Target {
            slot: ((offset >> (FUNCTION_SHIFT + 3)) & 0x1f) as u8,
            function: ((offset >> FUNCTION_SHIFT) & 0x7) as u8,
            offset: (offset & ((1 << FUNCTION_SHIFT) - 1)) as u16,
        }
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.bus.upgrade() {
            Some(bus) => read(&bus, Self::target(offset), data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(bus) = self.bus.upgrade() {
            write(&bus, Self::target(offset), data);
        }
    }
}

fn read(bus: &PciBus, target: Target, data: &mut [u8]) {
    if target.function == 0 {
        bus.config_read(target.slot, target.offset, data);
    } else {
        data.fill(0xff);
    }
}

fn write(bus: &PciBus, target: Target, data: &[u8]) {
    if target.function == 0 {
        bus.config_write(target.slot, target.offset, data);
    }
}
