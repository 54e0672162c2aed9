//! Makes arbitrary accesses to the devices at fixed addresses, while the host sends input, raises interrupts, and plugs
//! vCPUs and memory.
//!
//! Afterwards:
//!
//! * the guest has ejected only vCPUs whose removal was requested;
//! * interrupts were sent only to local APICs;
//! * every device can be restored from its saved state, and has the same state afterwards.

use std::ops::Range;
use std::sync::Arc;

use ::state::{Saved, State};
use virtio_devices::testing::fuzz_input::Input;

use crate::bus::{Bus, BusDevice};
use crate::cpu::{CPU_HOTPLUG_BYTES, CpuHotplug};
use crate::interrupt::fake::FakeBackend;
use crate::interrupt::{GsiRouter, IOAPIC_PIN_COUNT, Ioapic};
use crate::legacy::{
    ACPI_POWER_PORTS, AcpiPower, CMOS_PORTS, Cmos, DEBUG_PORTS, DebugConsole, DebugPort,
    FIRMWARE_DEBUG_PORTS, FirmwareDebug, GED_BYTES, GED_IRQ, Ged, I8042, I8042_PORTS,
    PM_TIMER_PORTS, PmTimer, Ports, RESET_VALUE, insert,
};
use crate::memory::layout::{IOAPIC_BYTES, IOAPIC_START};
use crate::memory::{DIMMS_MAX, MEMORY_HOTPLUG_BYTES, MemoryHotplug};
use crate::serial::{Endpoint, InputSink, SERIAL_IRQ, SERIAL_PORTS, Uart};
use crate::signals::VmSignals;

/// Maximum number of steps per input; further bytes are ignored.
const STEPS_MAX: usize = 128;
const CONSOLE_PORTS: Ports = (0xe9, 1);
const PORTS: [Ports; 8] = [
    I8042_PORTS,
    CMOS_PORTS,
    DEBUG_PORTS,
    CONSOLE_PORTS,
    FIRMWARE_DEBUG_PORTS,
    ACPI_POWER_PORTS,
    PM_TIMER_PORTS,
    SERIAL_PORTS,
];
/// First bytes with a meaning to one of the devices: resets, power-off, clock registers, latches.
const COMMANDS: [u8; 8] = [0xfe, RESET_VALUE, 0x34, 0x0a, 0x0b, 0x32, 0x80, 0x10];
const GED: u64 = 0xd000_0000;
const CPUS: u64 = 0xd000_1000;
const DIMMS: u64 = 0xd000_2000;
const WINDOWS: [(u64, u64); 4] = [
    (IOAPIC_START, IOAPIC_BYTES),
    (GED, GED_BYTES),
    (CPUS, CPU_HOTPLUG_BYTES),
    (DIMMS, MEMORY_HOTPLUG_BYTES),
];
const VCPUS_AT_BOOT: u32 = 2;
const VCPUS_MAX: u32 = 6;
const DIMM_BYTES: u64 = 128 << 20;
/// The local APICs.
const MSI_ADDRESSES: Range<u64> = 0xfee0_0000..0xff00_0000;

/// Figures of a run, for checks that the bytes reach what they should.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    /// Interrupts that reached the hypervisor.
    pub interrupts: usize,
    /// vCPUs that the guest ejected.
    pub ejected: usize,
    /// Ejections without a request.
    pub refused_ejects: u64,
    /// Power-off or reset.
    pub ended: bool,
}

/// Runs the steps that the bytes describe.
///
/// # Panics
/// A device has done what it must not.
pub fn run(bytes: &[u8]) -> Seen {
    let mut input = Input(bytes);
    let mut rig = Rig::new(VCPUS_AT_BOOT, Vec::new());
    for _ in 0..STEPS_MAX {
        if input.is_empty() {
            break;
        }
        rig.step(&mut input);
    }
    rig.take_ejected();
    rig.check_restore();
    let messages = &rig.backend.notes().messages;
    for message in messages {
        assert!(MSI_ADDRESSES.contains(&message.address), "{message:x?}");
    }
    Seen {
        interrupts: messages.len(),
        ejected: rig.ejected,
        refused_ejects: rig.cpus.refused_ejects(),
        ended: rig.signals.shutdown.read().is_ok() || rig.signals.reset.read().is_ok(),
    }
}

struct Rig {
    ports: Bus,
    mmio: Bus,
    backend: Arc<FakeBackend>,
    signals: Arc<VmSignals>,
    ioapic: Arc<Ioapic>,
    cmos: Arc<Cmos>,
    pm_timer: Arc<PmTimer>,
    ged: Arc<Ged>,
    cpus: Arc<CpuHotplug>,
    dimms: Arc<MemoryHotplug>,
    uart: Arc<Uart>,
    plugged_dimms: Vec<Range<u64>>,
    /// vCPUs whose removal was requested, one bit each.
    leaving: u32,
    ejected: usize,
}

impl Rig {
    fn new(vcpus: u32, plugged_dimms: Vec<Range<u64>>) -> Self {
        let backend = Arc::new(FakeBackend::default());
        let router = Arc::new(GsiRouter::new(Arc::clone(&backend) as _));
        let ioapic = Arc::new(Ioapic::new(router));
        let line = |pin| ioapic.line(pin).expect("a pin");
        let signals = Arc::new(VmSignals::new().expect("descriptors"));
        let cmos = Arc::new(Cmos::new(1 << 30, 1 << 32));
        let pm_timer = Arc::new(PmTimer::new());
        let ged = Arc::new(Ged::new(line(GED_IRQ)));
        let uart = Uart::new(line(SERIAL_IRQ), Endpoint::without_client());
        let cpus = Arc::new(CpuHotplug::new(vcpus, VCPUS_MAX, Arc::new(|| {})));
        let dimms = Arc::new(MemoryHotplug::new(plugged_dimms.clone()));
        let ports = Bus::new();
        let at_ports: [Arc<dyn BusDevice>; PORTS.len()] = [
            Arc::new(I8042::new(Arc::clone(&signals))),
            Arc::clone(&cmos) as _,
            Arc::new(DebugPort::new()),
            Arc::new(DebugConsole::new(Box::new(std::io::sink()))),
            Arc::new(FirmwareDebug::new()),
            Arc::new(AcpiPower::new(Arc::clone(&signals))),
            Arc::clone(&pm_timer) as _,
            Arc::clone(&uart) as _,
        ];
        for (range, device) in PORTS.into_iter().zip(at_ports) {
            insert(&ports, range, device).expect("fixed ports");
        }
        let mmio = Bus::new();
        let in_memory: [Arc<dyn BusDevice>; WINDOWS.len()] = [
            Arc::clone(&ioapic) as _,
            Arc::clone(&ged) as _,
            Arc::clone(&cpus) as _,
            Arc::clone(&dimms) as _,
        ];
        for ((base, bytes), device) in WINDOWS.into_iter().zip(in_memory) {
            mmio.insert(base, bytes, device).expect("fixed addresses");
        }
        Self {
            ports,
            mmio,
            backend,
            signals,
            ioapic,
            cmos,
            pm_timer,
            ged,
            cpus,
            dimms,
            uart,
            plugged_dimms,
            leaving: 0,
            ejected: 0,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        let choice = input.byte();
        let high = choice >> 4;
        match choice % 16 {
            0..=3 => {
                let (first, count) = PORTS[usize::from(high) % PORTS.len()];
                let offset = u16::from(input.byte()) % (count + 1);
                access(&self.ports, u64::from(first + offset), input);
            }
            4 | 5 => {
                let (base, bytes) = WINDOWS[usize::from(high) % WINDOWS.len()];
                access(&self.mmio, base + input.number(2) % bytes, input);
            }
            6 | 7 => {
                let register = 0x10 + input.byte() % (2 * IOAPIC_PIN_COUNT);
                self.write(IOAPIC_START, u64::from(register), 1);
                let entry = input.number(4);
                // Mostly not masked, which the interrupts below need.
                let entry = if high < 12 { entry & !(1 << 16) } else { entry };
                self.write(IOAPIC_START + 0x10, entry, 4);
            }
            8 => {
                let line = self.ioapic.line(input.byte() % IOAPIC_PIN_COUNT);
                let line = line.expect("a pin");
                // The device counts what the host rejects.
                match high % 3 {
                    0 => line.trigger().ok(),
                    1 => line.set_level(true).ok(),
                    _ => line.set_level(false).ok(),
                };
            }
            9 => {
                let raised = match high % 5 {
                    0 => self.ged.press_power_button(),
                    1 => self.ged.announce_pci_change(),
                    2 => self.ged.announce_cpu_change(),
                    3 => self.ged.announce_memory_change(),
                    _ => self.ged.announce_generation(),
                };
                assert!(raised.is_ok() || self.backend.notes().refuse);
            }
            10 => self.ioapic.end_of_interrupt(input.byte()),
            11 => self.resize_vcpus(1 + u32::from(high) % VCPUS_MAX),
            12 => {
                // Acknowledges or ejects, as the guest's ACPI code does.
                self.write(CPUS, u64::from(high % 8), 4);
                self.write(CPUS + 4, u64::from(input.byte()), 1);
            }
            13 if self.plugged_dimms.len() < DIMMS_MAX => {
                let start = (4 << 30) + self.plugged_dimms.len() as u64 * DIMM_BYTES;
                let dimm = start..start + DIMM_BYTES;
                self.dimms.insert(&dimm);
                self.plugged_dimms.push(dimm);
            }
            13 => self.take_ejected(),
            14 => {
                let typed: Vec<u8> = (0..=high * 8).map(|_| input.byte()).collect();
                assert!(self.uart.accept(&typed) <= typed.len());
            }
            _ => self.backend.notes().refuse ^= true,
        }
    }

    fn write(&self, address: u64, value: u64, bytes: usize) {
        self.mmio.write(address, &value.to_le_bytes()[..bytes]);
    }

    /// As the thread that owns the machine does it.
    fn resize_vcpus(&mut self, count: u32) {
        self.take_ejected();
        if self.cpus.leaving() > 0 {
            return;
        }
        let present = self.cpus.present();
        if count > present {
            self.cpus.insert(present..count);
        } else {
            self.cpus.request_removal(count..present);
            self.leaving |= (count..present).fold(0, |bits, vcpu| bits | 1 << vcpu);
        }
    }

    fn take_ejected(&mut self) {
        for vcpu in self.cpus.take_ejected() {
            assert_ne!(self.leaving & 1 << vcpu, 0, "vCPU {vcpu} was not to leave");
            self.leaving &= !(1 << vcpu);
            self.ejected += 1;
        }
        assert_eq!(self.cpus.leaving(), self.leaving.count_ones() as usize);
        assert!(self.cpus.present() >= 1);
    }

    fn check_restore(&self) {
        let other = Self::new(self.cpus.present(), self.plugged_dimms.clone());
        check(&self.ioapic.state(), |it| other.ioapic.restore(it));
        assert_eq!(other.ioapic.state(), self.ioapic.state());
        check(&self.cmos.state(), |it| other.cmos.restore(it));
        assert_eq!(other.cmos.state(), self.cmos.state());
        check(&self.ged.state(), |it| other.ged.restore(it));
        assert_eq!(other.ged.state(), self.ged.state());
        check(&self.dimms.state(), |it| other.dimms.restore(it));
        assert_eq!(other.dimms.state(), self.dimms.state());
        check(&self.uart.state(), |it| other.uart.restore(it));
        assert_eq!(other.uart.state(), self.uart.state());
        let time = self.pm_timer.state();
        check(&time, |it| {
            other.pm_timer.restore(*it);
            Ok(())
        });
        assert!(other.pm_timer.state().elapsed_ns >= time.elapsed_ns);
        if self.cpus.leaving() == 0 {
            check(&self.cpus.state(), |it| other.cpus.restore(it));
            assert_eq!(other.cpus.state(), self.cpus.state());
        }
    }
}

fn check<S: State>(state: &S, restore: impl FnOnce(&S) -> Result<(), ::state::StateError>) {
    let read = Saved::of(state).read().expect("just written");
    restore(&read).expect("its own state");
}

/// A read or write of up to eight bytes.
fn access(bus: &Bus, address: u64, input: &mut Input<'_>) {
    let shape = input.byte();
    let mut data = [0; 8];
    let data = &mut data[..usize::from(shape & 0x7f) % 9];
    if shape >> 7 == 0 {
        bus.read(address, data);
    } else {
        data.iter_mut().for_each(|byte| *byte = input.byte());
        if let Some(first) = data.first_mut()
            && usize::from(*first) < COMMANDS.len()
        {
            *first = COMMANDS[usize::from(*first)];
        }
        bus.write(address, data);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;

    /// Without figures above zero, the checks of `run` would mean nothing.
    #[test]
    fn guest_of_random_bytes_breaks_no_device_at_a_fixed_address() {
        let mut runner = TestRunner::deterministic();
        let mut all = Seen::default();
        for _ in 0..2000 {
            let bytes = prop::collection::vec(any::<u8>(), 0..900);
            let seen = run(&bytes.new_tree(&mut runner).expect("bytes").current());
            all.interrupts += seen.interrupts;
            all.ejected += seen.ejected;
            all.refused_ejects += seen.refused_ejects;
            all.ended |= seen.ended;
        }
        assert!(all.interrupts > 0 && all.ejected > 0, "{all:?}");
        assert!(all.refused_ejects > 0 && all.ended, "{all:?}");
    }
}
