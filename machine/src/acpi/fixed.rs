//! The tables without AML: FADT, MADT, MCFG.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;

use super::params::VcpuEntry;
use super::table::{OEM_ID, OEM_REVISION, bytes_of, table};
use crate::legacy::{ACPI_POWER_PORTS, CMOS_CENTURY, PM_TIMER_PORTS, RESET_VALUE};
use crate::memory::layout;
use crate::serial::SERIAL_IRQ;

/// FADT `IAPC_BOOT_ARCH`: no VGA to probe for. There is no keyboard either, so its bit is clear.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const HYPERVISOR_ID: u64 = u64::from_le_bytes(*b"CLOUDHYP");

/// Fixed ACPI description table, for a platform without fixed hardware.
pub(super) fn fadt(dsdt_address: u64) -> Vec<u8> {
    let power_port = |bits| io_port(ACPI_POWER_PORTS.0, bits, AccessSize::ByteAccess);
    let mut fadt = FADTBuilder::new(OEM_ID, *b"CHFACP  ", OEM_REVISION)
        .dsdt_64(dsdt_address)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::ResetRegSup)
        .flag(Flags::TmrValExt)
        // Buttons, if any, are devices and not fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.century = CMOS_CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.reset_reg = power_port(8);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = power_port(8);
    fadt.sleep_status_reg = power_port(8);
    fadt.x_pm_tmr_blk = io_port(PM_TIMER_PORTS.0, 32, AccessSize::DwordAccess);
    fadt.hypervisor_vendor_identity = HYPERVISOR_ID.into();
    bytes_of(&fadt.finalize())
}

fn io_port(port: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
}

/// Revision that supports processors that are not online yet (ACPI 6.3).
const MADT_REVISION: u8 = 5;
const MADT_LOCAL_APIC: u8 = 0;
const MADT_IO_APIC: u8 = 1;
const MADT_INTERRUPT_OVERRIDE: u8 = 2;
const MADT_X2APIC: u8 = 9;
/// The first id that needs the extended entry: a local APIC's own entry has one byte, of which 255 is the broadcast.
const X2APIC_ID_MIN: u32 = 255;
const APIC_ENABLED: u32 = 1 << 0;
const APIC_ONLINE_CAPABLE: u32 = 1 << 1;
/// Polarity and trigger mode as on the ISA bus: high, edge.
const FLAGS_CONFORM_TO_BUS: u16 = 0;

/// The entry of a vCPU, which may come online later if it is not enabled. Ids below 255 have the entry of a local APIC
/// (ACPI 6.5 §5.2.12.12), because a guest without support for x2APIC ignores the extended one.
pub(super) fn apic_entry(uid: u32, apic_id: u32, enabled: bool) -> Vec<u8> {
    let flags = if enabled {
        APIC_ENABLED
    } else {
        APIC_ONLINE_CAPABLE
    };
    let narrow = |number| u8::try_from(number).ok().filter(|_| number < X2APIC_ID_MIN);
    if let (Some(uid), Some(apic_id)) = (narrow(uid), narrow(apic_id)) {
        let mut entry = vec![MADT_LOCAL_APIC, 8, uid, apic_id];
        entry.extend(flags.to_le_bytes());
        return entry;
    }
    let mut entry = vec![MADT_X2APIC, 16, 0, 0];
    entry.extend(apic_id.to_le_bytes());
    entry.extend(flags.to_le_bytes());
    entry.extend(uid.to_le_bytes());
    entry
}

/// Multiple APIC description table.
pub(super) fn madt(vcpus: &[VcpuEntry]) -> Vec<u8> {
    let mut entries = Vec::new();
    // Address of the local APICs, then flags: no PICs.
    entries.extend((layout::APIC_START as u32).to_le_bytes());
    entries.extend(0_u32.to_le_bytes());
    for (uid, vcpu) in (0_u32..).zip(vcpus) {
        entries.extend(apic_entry(uid, vcpu.apic_id, vcpu.enabled));
    }
    // I/O APIC 0 serves the interrupts from 0 on.
    entries.extend([MADT_IO_APIC, 12, 0, 0]);
    entries.extend((layout::IOAPIC_START as u32).to_le_bytes());
    entries.extend(0_u32.to_le_bytes());
    // ISA interrupt 4 is the global interrupt of the same number.
    entries.extend([MADT_INTERRUPT_OVERRIDE, 10, 0, SERIAL_IRQ]);
    entries.extend(u32::from(SERIAL_IRQ).to_le_bytes());
    entries.extend(FLAGS_CONFORM_TO_BUS.to_le_bytes());
    table(*b"APIC", MADT_REVISION, *b"CHMADT  ", &entries)
}

/// Where PCI configuration space is mapped: one bus for each segment.
pub(super) fn mcfg(segments: u16) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, *b"CHMCFG  ", OEM_REVISION);
    for segment in 0..segments {
        mcfg.add_ecam(layout::pci_mmconfig(segment), segment, 0, 0);
    }
    bytes_of(&mcfg)
}
