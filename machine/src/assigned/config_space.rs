//! The configuration space of an assigned device as the guest sees it.

use virtio_devices::pci::MsiMessage;

use super::host::{BARS, HostDevice};
use super::layout::{
    BAR0, BarLayout, CAPABILITY_POINTER, COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY, HEADER_TYPE,
    Layout, MsiLayout, SPACE_BYTES,
};

const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const INTERRUPT_LINE: usize = 0x3c;

/// In the upper byte of the register.
const COMMAND_INTX_DISABLE: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const MSI_ENABLE: u8 = 1;
const MSI_64BIT: u8 = 1 << 7;
/// In the upper byte of the message control register.
const MSIX_ENABLE_AND_MASK: u8 = 0b1100_0000;

/// The effect of a write on interrupts and addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct View {
    pub(super) decoded: bool,
    pub(super) is_bus_master: bool,
    /// The message, while MSI is enabled.
    pub(super) msi: Option<MsiMessage>,
    /// The message control register of MSI-X.
    pub(super) msix_control: u16,
}

/// Bytes that this module holds, which of their bits the guest may change, and which bytes are the device's.
pub(super) struct ConfigSpace {
    bytes: [u8; SPACE_BYTES],
    writable: [u8; SPACE_BYTES],
    passed: [bool; SPACE_BYTES],
    bars: Vec<BarLayout>,
    msi: Option<MsiLayout>,
    msix_at: Option<usize>,
}

virtio_devices::debug_fields!(ConfigSpace { bars, msi });

impl ConfigSpace {
    pub(super) fn new(layout: &Layout) -> Self {
        let mut space = Self {
            bytes: [0; SPACE_BYTES],
            writable: [0; SPACE_BYTES],
            passed: [false; SPACE_BYTES],
            bars: layout.bars.clone(),
            msi: layout.msi,
            msix_at: layout.msix.map(|msix| msix.at),
        };
        // Vendor and device; revision and class; subsystem.
        for range in [0..4, 8..12, 0x2c..0x30] {
            space.bytes[range.clone()].copy_from_slice(&layout.header[range]);
        }
        debug_assert_eq!(space.bytes[HEADER_TYPE], 0, "one function of type 0");
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        space.writable[COMMAND + 1] = COMMAND_INTX_DISABLE;
        space.writable[CACHE_LINE_SIZE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        for bar in &layout.bars {
            let registers = bar.registers();
            let address_bits = !(bar.bytes - 1);
            space.bytes[registers.start] = bar.kind;
            let bytes = registers.len();
            space.writable[registers].copy_from_slice(&address_bits.to_le_bytes()[..bytes]);
        }
        let mut link = CAPABILITY_POINTER;
        for capability in &layout.capabilities {
            let at = capability.at;
            space.bytes[link] = at as u8;
            space.bytes[at] = capability.id;
            space.passed[capability.passed.clone()].fill(true);
            link = at + 1;
        }
        space.bytes[STATUS] = STATUS_CAPABILITIES;
        if let Some(msix) = &layout.msix {
            space.bytes[msix.at + 2..msix.at + 12]
                .copy_from_slice(&layout.header[msix.at + 2..msix.at + 12]);
            space.bytes[msix.at + 3] &= !MSIX_ENABLE_AND_MASK;
            space.writable[msix.at + 3] = MSIX_ENABLE_AND_MASK;
        }
        if let Some(msi) = layout.msi {
            // One vector without mask.
            space.bytes[msi.at + 2] = if msi.is_64bit { MSI_64BIT } else { 0 };
            space.writable[msi.at + 2] = MSI_ENABLE;
            let message = msi.at + 4..msi.at + if msi.is_64bit { 14 } else { 10 };
            if message.end <= SPACE_BYTES {
                space.writable[message].fill(0xff);
                space.writable[msi.at + 4] = 0xfc;
            }
        }
        space
    }

    /// Reads; bytes behind conventional space are zero.
    pub(super) fn read(&self, host: &dyn HostDevice, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let start = usize::from(offset);
        if start + data.len() > SPACE_BYTES {
            return;
        }
        let range = start..start + data.len();
        if self.passed[range.clone()].contains(&true) {
            host.config_read(offset, data);
        }
        for (byte, at) in data.iter_mut().zip(range) {
            if !self.passed[at] {
                *byte = self.bytes[at];
            }
        }
    }

    /// Writes what the guest may change.
    pub(super) fn write(&mut self, host: &dyn HostDevice, offset: u16, data: &[u8]) {
        let start = usize::from(offset);
        if start + data.len() > SPACE_BYTES {
            return;
        }
        if self.passed[start..start + data.len()].iter().all(|it| *it) {
            return host.config_write(offset, data);
        }
        for (at, value) in (start..).zip(data) {
            if self.passed[at] {
                host.config_write(at as u16, &[*value]);
            }
            self.change(at, *value);
        }
    }

    /// Changes the bits of a byte that the guest may change.
    fn change(&mut self, at: usize, value: u8) {
        let mask = self.writable[at];
        self.bytes[at] = self.bytes[at] & !mask | value & mask;
    }

    pub(super) fn view(&self) -> View {
        let command = self.bytes[COMMAND];
        View {
            decoded: command & COMMAND_MEMORY != 0,
            is_bus_master: command & COMMAND_BUS_MASTER != 0,
            msi: self.msi.and_then(|msi| self.msi_message(msi)),
            msix_control: self.msix_at.map_or(0, |at| {
                u16::from_le_bytes([self.bytes[at + 2], self.bytes[at + 3]])
            }),
        }
    }

    fn msi_message(&self, msi: MsiLayout) -> Option<MsiMessage> {
        let byte = |at: usize| self.bytes.get(msi.at + at).copied().unwrap_or(0);
        let dword = |at| u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]);
        let (high, data) = match msi.is_64bit {
            true => (dword(8), dword(12)),
            false => (0, dword(8)),
        };
        (byte(2) & MSI_ENABLE != 0).then(|| MsiMessage {
            address: u64::from(high) << 32 | u64::from(dword(4)),
            data: data & 0xffff,
        })
    }

    /// The address programmed into a BAR.
    pub(super) fn bar_address(&self, bar: &BarLayout) -> u64 {
        let registers = bar.registers();
        let mut address = [0; 8];
        address[..registers.len()].copy_from_slice(&self.bytes[registers]);
        u64::from_le_bytes(address) & !(bar.bytes - 1)
    }

    pub(super) fn set_bar_address(&mut self, index: u8, address: u64) {
        let Some(bar) = self.bars.iter().find(|bar| bar.index == index) else {
            return;
        };
        for (at, value) in bar.registers().zip(address.to_le_bytes()) {
            self.change(at, value);
        }
    }

    /// Returns to power-on, except for BAR addresses.
    pub(super) fn reset(&mut self) {
        let bars = BAR0..BAR0 + 4 * usize::from(BARS);
        for at in (0..SPACE_BYTES).filter(|at| !bars.contains(at)) {
            self.bytes[at] &= !self.writable[at];
        }
    }
}
