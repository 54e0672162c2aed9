//! The differentiated description table: the devices, in ACPI machine language.

use std::iter;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, BufferData, Device, EISAName, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local,
    Memory32Fixed, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Package, Path,
    ResourceTemplate, Return, Store, Uuid, ZERO,
};
use acpi_tables::{Aml, AmlSink};

use super::params::{AcpiParams, PciSegmentEntry};
use super::table::table;
use super::{cpu_hotplug, generation_id, memory_hotplug, pci_hotplug};
use crate::legacy::{
    CMOS_PORTS, GED_BYTES, GED_CPU_HOTPLUG, GED_GENERATION, GED_IRQ, GED_MEMORY_HOTPLUG,
    GED_PCI_HOTPLUG, GED_POWER_BUTTON, S5_SLEEP_TYPE,
};
use crate::memory::layout;
use crate::pci::{CONFIG_PORT_BASE, CONFIG_PORT_BYTES, WindowRanges};
use crate::serial::{SERIAL_IRQ, SERIAL_PORTS};

/// Revision 2 and later have 64-bit integers.
const DSDT_REVISION: u8 = 6;
/// Notification that a power button was pressed (ACPI 6.5 §5.6.6).
const BUTTON_PRESSED: u8 = 0x80;
/// Functions of the PCI firmware specification's `_DSM` (3.3, §4.6).
const PCI_DSM_UUID: &str = "e5c937d0-3553-4d7a-9117-ea4d19c3434d";
/// "Preserve PCI boot configuration".
const PCI_DSM_PRESERVE_BOOT_CONFIG: u8 = 5;

/// All devices of the machine.
pub(super) fn dsdt(params: &AcpiParams) -> Vec<u8> {
    let mut aml = Vec::new();
    for (number, segment) in (0..).zip(&params.pci_segments) {
        pci_host_bridge(number, segment, &mut aml);
    }
    let segments = params.segment_count();
    pci_hotplug::controller(params.pci_hotplug_address, segments, &mut aml);
    if params.vcpus.len() > 1 {
        cpu_hotplug::controller(params.cpu_hotplug_address, &params.vcpus, &mut aml);
    }
    if let Some(address) = params.memory_hotplug_address {
        memory_hotplug::controller(address, &mut aml);
    }
    motherboard(segments, &mut aml);
    if params.has_serial {
        serial_port(&mut aml);
    }
    real_time_clock(&mut aml);
    power_button(&mut aml);
    generation_id::device(&mut aml);
    generic_event_device(params, &mut aml);
    sleep_state(&mut aml);
    table(*b"DSDT", DSDT_REVISION, *b"CHDSDT  ", &aml)
}

fn pci_host_bridge(number: u16, segment: &PciSegmentEntry, aml: &mut Vec<u8>) {
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    let WindowRanges { mmio32, mmio64 } = &segment.windows;
    let (start, last) = (mmio32.start as u32, (mmio32.end - 1) as u32);
    let mmio32 = AddressSpace::new_memory(not_cacheable, true, start, last, None);
    let (start, last) = (mmio64.start, mmio64.end - 1);
    let mmio64 = AddressSpace::new_memory(not_cacheable, true, start, last, None);
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    // The ports are those of segment 0.
    let ports = CONFIG_PORT_BASE as u16;
    let after_ports = ports + CONFIG_PORT_BYTES as u16;
    let config_ports = IO::new(ports, ports, 1, CONFIG_PORT_BYTES as u8);
    let lower_ports = AddressSpace::new_io(0u16, ports - 1, None);
    let upper_ports = AddressSpace::new_io(after_ports, 0xffff, None);
    let mut resources: Vec<&dyn Aml> = vec![&bus, &mmio32, &mmio64];
    if number == 0 {
        resources.extend([&config_ports as &dyn Aml, &lower_ports, &upper_ports]);
    }
    let domain = segment.domain.map(|it| Name::new(Path::new("_PXM"), &it));
    let slots = pci_hotplug::BridgeSlots::new(number);
    let name = |name, value: &dyn Aml| Name::new(Path::new(name), value);
    let fixed = [
        name("_HID", &EISAName::new("PNP0A08")),
        name("_CID", &EISAName::new("PNP0A03")),
        name("_SEG", &number),
        name("_BBN", &ZERO),
        name("_UID", &number),
        name("_CRS", &ResourceTemplate::new(resources)),
    ];
    let mut parts: Vec<&dyn Aml> = fixed.iter().chain(&domain).map(|it| it as _).collect();
    parts.extend([&PciDsm as &dyn Aml, &slots]);
    Device::new(Path::new(&pci_hotplug::bridge_name(number)), parts).to_aml_bytes(aml);
}

/// States that BARs must stay in place: no firmware could place them again after a reset.
struct PciDsm;

impl Aml for PciDsm {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let supported = 1 << PCI_DSM_PRESERVE_BOOT_CONFIG | 1;
        Method::new(
            Path::new("_DSM"),
            4,
            false,
            vec![
                &If::new(
                    &Equal::new(&Arg(0), &Uuid::new(PCI_DSM_UUID)),
                    vec![
                        &If::new(
                            &Equal::new(&Arg(2), &ZERO),
                            vec![&Return::new(&BufferData::new(vec![supported]))],
                        ),
                        &If::new(
                            &Equal::new(&Arg(2), &PCI_DSM_PRESERVE_BOOT_CONFIG),
                            vec![&Return::new(&ZERO)],
                        ),
                    ],
                ),
                &Return::new(&BufferData::new(vec![0])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Keeps the guest from placing anything over the PCI configuration space. By the PCI firmware specification (§4.1.2)
/// this space must not be in the host bridge's own resources.
fn motherboard(segments: u16, aml: &mut Vec<u8>) {
    let bytes = u32::from(segments) * layout::PCI_MMIO_CONFIG_BYTES_PER_SEGMENT as u32;
    Device::new(
        Path::new("_SB_.MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    layout::PCI_MMCONFIG_START as u32,
                    bytes,
                )]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial_port(aml: &mut Vec<u8>) {
    let (port, count) = SERIAL_PORTS;
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_DDN"), &"COM1"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &interrupt(SERIAL_IRQ),
                    &IO::new(port, port, 1, count as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The clock is described as a device without an interrupt. A kernel that finds no clock device assumes a PC's clock
/// with interrupt 8. Without a PIC it then fails to use the clock.
fn real_time_clock(aml: &mut Vec<u8>) {
    let (port, count) = CMOS_PORTS;
    Device::new(
        Path::new("_SB_.RTC_"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(port, port, 1, count as u8)]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// An edge-triggered, active-high interrupt that is not shared.
fn interrupt(number: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, u32::from(number))
}

fn power_button(aml: &mut Vec<u8>) {
    Device::new(
        Path::new("_SB_.PWRB"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &ZERO),
        ],
    )
    .to_aml_bytes(aml);
}

/// Interrupt → `_EVT` → the event byte → `Notify` to the device.
fn generic_event_device(params: &AcpiParams, aml: &mut Vec<u8>) {
    let address = params.ged_address;
    let vcpus_change = params.vcpus.len() > 1;
    let memory_grows = params.memory_hotplug_address.is_some();
    let scan_vcpus = MethodCall::new(Path::new(cpu_hotplug::SCAN_METHOD), vec![]);
    let scan_memory = MethodCall::new(Path::new(memory_hotplug::SCAN_METHOD), vec![]);
    let scan_pci = MethodCall::new(Path::new(pci_hotplug::SCAN_METHOD), vec![]);
    let button = Path::new("\\_SB_.PWRB");
    let press = Notify::new(&button, &BUTTON_PRESSED);
    let generation = Path::new(generation_id::DEVICE);
    let renew = Notify::new(&generation, &generation_id::CHANGED);
    let events = [
        vcpus_change.then_some(OnEvent(GED_CPU_HOTPLUG, &scan_vcpus)),
        memory_grows.then_some(OnEvent(GED_MEMORY_HOTPLUG, &scan_memory)),
        Some(OnEvent(GED_PCI_HOTPLUG, &scan_pci)),
        Some(OnEvent(GED_POWER_BUTTON, &press)),
        Some(OnEvent(GED_GENERATION, &renew)),
    ];
    let register = Path::new("GDAT");
    let local = Local(0);
    let read = Store::new(&local, &register);
    let events = events.iter().flatten().map(|event| event as &dyn Aml);
    let body = iter::once(&read as &dyn Aml).chain(events).collect();
    Device::new(
        Path::new("_SB_.GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&interrupt(GED_IRQ)]),
            ),
            &OpRegion::new(
                Path::new("GDST"),
                OpRegionSpace::SystemMemory,
                &address,
                &GED_BYTES,
            ),
            &Field::new(
                Path::new("GDST"),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"GDAT", 8)],
            ),
            &Method::new(Path::new("_EVT"), 1, true, body),
        ],
    )
    .to_aml_bytes(aml);
}

/// The action if this bit of the event byte, in `Local0`, is set.
struct OnEvent<'a>(u8, &'a dyn Aml);

impl Aml for OnEvent<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        And::new(&Local(1), &Local(0), &self.0).to_aml_bytes(sink);
        If::new(&Equal::new(&Local(1), &self.0), vec![self.1]).to_aml_bytes(sink);
    }
}

/// The value to write to the sleep control register for power-off.
fn sleep_state(aml: &mut Vec<u8>) {
    Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&S5_SLEEP_TYPE, &ZERO, &ZERO, &ZERO]),
    )
    .to_aml_bytes(aml);
}
