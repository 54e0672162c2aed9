//! PCI configuration space by ports and by ECAM, and the scenario that compares both.

use crate::machine::{inl, outl};
use crate::memory::{read, write};
use crate::report::Report;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
/// ECAM window of segment 0; those of the others follow.
const ECAM: u64 = 0xe800_0000;
const ECAM_BYTES: u64 = 1 << 20;
const SLOTS: u8 = 32;
/// The new address of BARs: the 32-bit window, which is identity-mapped here.
const LOW_WINDOW: u64 = 0xc000_0000;
/// The share of the second segment, if there are two.
const LOW_WINDOW_SHARE: u64 = 320 << 20;
/// Room for one function's BAR there.
const LOW_WINDOW_STRIDE: u64 = 0x10_0000;

pub const VENDOR_VIRTIO: u16 = 0x1af4;
pub const REG_COMMAND: u16 = 0x04;
pub const REG_BAR0: u16 = 0x10;
pub const REG_CAPABILITIES: u16 = 0x34;
pub const COMMAND_MEMORY_AND_MASTER: u32 = 0x6;
const COMMAND_MASTER: u32 = 0x4;

/// One function on bus 0 of a segment.
#[derive(Clone, Copy)]
pub struct Function {
    pub segment: u16,
    pub slot: u8,
}

impl Function {
    /// Every function present on segment 0.
    pub fn all() -> impl Iterator<Item = Function> {
        Self::all_of(0)
    }

    /// Every function present on this segment.
    pub fn all_of(segment: u16) -> impl Iterator<Item = Function> {
        (0..SLOTS)
            .map(move |slot| Function { segment, slot })
            .filter(|function| function.vendor() != 0xffff)
    }

    pub fn read32(self, register: u16) -> u32 {
        read(self.ecam(register))
    }

    pub fn write32(self, register: u16, value: u32) {
        write(self.ecam(register), value);
    }

    pub fn read8(self, register: u16) -> u8 {
        read(self.ecam(register))
    }

    pub fn read16(self, register: u16) -> u16 {
        read(self.ecam(register))
    }

    pub fn write16(self, register: u16, value: u16) {
        write(self.ecam(register), value);
    }

    pub fn vendor(self) -> u16 {
        self.read16(0)
    }

    pub fn device(self) -> u16 {
        self.read16(2)
    }

    fn read32_by_port(self, register: u16) -> u32 {
        outl(
            CONFIG_ADDRESS,
            0x8000_0000 | u32::from(self.slot) << 11 | u32::from(register),
        );
        inl(CONFIG_DATA)
    }

    fn ecam(self, register: u16) -> u64 {
        let segment = ECAM + u64::from(self.segment) * ECAM_BYTES;
        segment + (u64::from(self.slot) << 15) + u64::from(register)
    }

    /// Moves BAR0 into the low window and switches decoding and mastering on.
    pub fn move_bar0_low(self) -> u64 {
        let window = LOW_WINDOW + u64::from(self.segment) * LOW_WINDOW_SHARE;
        let address = window + u64::from(self.slot) * LOW_WINDOW_STRIDE;
        // A driver may have started the device already, which stops if it is no longer a bus master.
        self.write32(REG_COMMAND, self.read32(REG_COMMAND) & COMMAND_MASTER);
        self.write32(REG_BAR0, address as u32);
        self.write32(REG_BAR0 + 4, 0);
        self.write32(REG_COMMAND, COMMAND_MEMORY_AND_MASTER);
        address
    }

    /// Size of BAR0, by the sizing protocol (PCI 3.0 §6.2.5.1).
    pub fn bar0_size(self) -> u64 {
        let (low, high) = (self.read32(REG_BAR0), self.read32(REG_BAR0 + 4));
        self.write32(REG_BAR0, u32::MAX);
        self.write32(REG_BAR0 + 4, u32::MAX);
        let mask =
            u64::from(self.read32(REG_BAR0) & !0xf) | u64::from(self.read32(REG_BAR0 + 4)) << 32;
        self.write32(REG_BAR0, low);
        self.write32(REG_BAR0 + 4, high);
        (!mask).wrapping_add(1)
    }
}

/// Both access mechanisms of configuration space agree, absent slots read all ones, BARs size and move.
pub fn scenario(report: &mut Report) {
    let bridge = Function {
        segment: 0,
        slot: 0,
    };
    report.check(
        "pci_host_bridge_present",
        bridge.read32(0) == 0x0d57_8086,
        format_args!("slot 0 is {:#x}", bridge.read32(0)),
    );
    let differing = Function::all()
        .flat_map(|function| (0..64u16).map(move |word| (function, word * 4)))
        .find(|(function, register)| {
            function.read32(*register) != function.read32_by_port(*register)
        });
    report.check(
        "pci_ecam_and_ports_agree",
        differing.is_none(),
        format_args!(
            "register {:?}",
            differing.map(|(f, register)| (f.slot, register))
        ),
    );
    let absent = (0..SLOTS)
        .map(|slot| Function { segment: 0, slot })
        .find(|function| function.vendor() == 0xffff);
    if let Some(absent) = absent {
        report.check(
            "pci_absent_slot_reads_ones",
            absent.read32(0x40) == u32::MAX && absent.read8(0x3d) == 0xff,
            format_args!("slot {} reads {:#x}", absent.slot, absent.read32(0x40)),
        );
    }
    for function in Function::all().filter(|function| function.vendor() == VENDOR_VIRTIO) {
        let size = function.bar0_size();
        report.check(
            "pci_bar_size_is_512k",
            size == 512 << 10,
            format_args!("slot {}: {size:#x}", function.slot),
        );
        let address = function.move_bar0_low();
        let queues: u16 = read(address + 0x12);
        report.check(
            "pci_bar_answers_after_move",
            queues != 0 && queues != 0xffff,
            format_args!("slot {}: num_queues {queues}", function.slot),
        );
        function.write32(REG_COMMAND, 0);
        report.check(
            "pci_bar_silent_without_decoding",
            read::<u16>(address + 0x12) == 0xffff,
            format_args!("slot {}", function.slot),
        );
    }
}
