//! Random accesses to every register: ports, PCI configuration, BARs, in every width. The machine passes if it still
//! runs and its PCI bus still responds.

use crate::console;
use crate::machine::{inb, inl, inw, outb, outl, outw};
use crate::memory::{read, write};
use crate::pci::{Function, VENDOR_VIRTIO};
use crate::report::Report;
use crate::virtio::{Device, F_VERSION_1};

/// Accesses per round: each is an exit to the VMM.
const ACCESSES: u32 = 4000;
/// How often a device is initialised to receive its share of the noise.
const ROUNDS: u32 = 8;
/// Room for rings.
const QUEUES_MAX: u16 = 8;
/// Identity and BAR size of pvpanic, whose function has no capabilities.
const PVPANIC: u32 = 0x0011_1b36;
const PVPANIC_BYTES: u32 = 4096;
/// Pending bits of MSI-X in the BAR.
const PENDING_BITS: u64 = 0x4_8000;
/// The legacy ports, without the ones that end the machine on purpose
/// (0x64 i8042, 0x600–0x603 ACPI sleep, 0x402 prints).
const PORTS: &[u16] = &[
    0x20, 0x21, 0x40, 0x43, 0x60, 0x61, 0x62, 0x63, 0x70, 0x71, 0x80, 0x92, 0xa0, 0xe9, 0x2f8,
    0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x608, 0x60a, 0xcf8, 0xcf9, 0xcfa, 0xcfb,
    0xcfc, 0xcfd, 0xcfe, 0xcff, 0xffff,
];

/// A linear congruential generator.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 ^ self.0 >> 16
    }
}

/// The same noise for the same `seed`.
pub fn scenario(seed: u32, report: &mut Report) {
    let mut noise = Noise(seed);
    ports(&mut noise);
    // The noise has put COM1 into loopback, where nothing is printed.
    console::restore();
    report.pass("ports_survive_noise");
    for device in Device::all() {
        for _ in 0..ROUNDS {
            bring_up(&device);
            bar(&device, &mut noise);
        }
    }
    if let Some(function) = Function::all().find(|it| it.read32(0) == PVPANIC) {
        let register = function.move_bar0_low();
        for _ in 0..ACCESSES / ROUNDS {
            access(register + u64::from(noise.next() % PVPANIC_BYTES), &mut noise);
        }
    }
    report.pass("bars_survive_noise");
    configuration(&mut noise);
    report.pass("configuration_survives_noise");
    interrupt_controller(&mut noise);
    report.pass("ioapic_survives_noise");
    let found = Function::all()
        .filter(|function| function.vendor() == VENDOR_VIRTIO)
        .count();
    report.check(
        "pci_answers_after_noise",
        found > 0,
        format_args!("no virtio function left"),
    );
    let broken = Device::all().find(|device| !device.negotiate(F_VERSION_1));
    report.check(
        "devices_negotiate_after_noise",
        broken.is_none(),
        format_args!("slot {:?}", broken.map(|device| device.function.slot)),
    );
}

fn ports(noise: &mut Noise) {
    for _ in 0..ACCESSES {
        let port = PORTS[noise.next() as usize % PORTS.len()];
        let value = noise.next();
        match value % 6 {
            0 => outb(port, value as u8),
            1 => outw(port, value as u16),
            2 => outl(port, value),
            3 => drop(inb(port)),
            4 => drop(inw(port)),
            _ => drop(inl(port)),
        }
        // The data port must not reach a BAR or a command register.
        outl(0xcf8, 0);
    }
}

/// An active device has more state to corrupt than an idle one. Its rings are empty. The end of the test checks that it
/// can be initialised after the noise.
fn bring_up(device: &Device) {
    device.negotiate(F_VERSION_1);
    for index in 0..device.queue_count().min(QUEUES_MAX) {
        device.setup_queue(index);
    }
    device.enable_msix();
    device.driver_ok();
}

/// Most of the BAR is empty: half of the accesses go to existing registers.
fn bar(device: &Device, noise: &mut Noise) {
    let windows = [
        (device.common, 0x40),
        (device.isr, 4),
        (device.config, 0x100),
        (device.notify, 0x100),
        (device.msix_table, 0x100),
        (device.bar + PENDING_BITS, 16),
    ];
    for _ in 0..ACCESSES / ROUNDS {
        let (base, bytes) = match windows.get(noise.next() as usize % (2 * windows.len())) {
            Some(window) => *window,
            None => (device.bar, 512 << 10),
        };
        access(base + u64::from(noise.next() % bytes), noise);
    }
}

fn configuration(noise: &mut Noise) {
    for function in Function::all().filter(|function| function.slot != 0) {
        for _ in 0..ACCESSES / 8 {
            // BARs and the command register are left alone: a BAR moved over this program's memory would be the
            // program's own fault.
            let register = 0x18 + noise.next() % (4096 - 0x18 - 8);
            access(
                0xe800_0000 + (u64::from(function.slot) << 15) + u64::from(register),
                noise,
            );
            let register = 0x18 + noise.next() % (256 - 0x18);
            outl(
                0xcf8,
                0x8000_0000 | u32::from(function.slot) << 11 | register & !3,
            );
            outl(0xcfc, noise.next());
        }
    }
}

fn interrupt_controller(noise: &mut Noise) {
    for _ in 0..ACCESSES {
        access(0xfec0_0000 + u64::from(noise.next() % 0x100), noise);
    }
}

fn access(address: u64, noise: &mut Noise) {
    let value = noise.next();
    match value % 6 {
        0 => write(address, value as u8),
        1 => write(address & !1, value as u16),
        2 => write(address & !3, value),
        3 => write(
            address & !7,
            u64::from(value) << 32 | u64::from(noise.next()),
        ),
        4 => drop(read::<u32>(address & !3)),
        _ => drop(read::<u8>(address)),
    }
}
