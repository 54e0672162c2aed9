//! Tests every device with random accesses; contains helpers for the other tests.

mod state;

use super::*;
use crate::interrupt::{GsiRouter, Ioapic, fake::FakeBackend};
use crate::signals::VmSignals;
use proptest::prelude::*;

pub(super) fn signals() -> Arc<VmSignals> {
    Arc::new(VmSignals::new().unwrap())
}

pub(super) fn is_raised(event: &EventFd) -> bool {
    event.read().is_ok()
}

fn devices() -> Vec<(Ports, Arc<dyn BusDevice>)> {
    let router = Arc::new(GsiRouter::new(Arc::new(FakeBackend::default())));
    let line = Arc::new(Ioapic::new(router)).line(GED_IRQ).unwrap();
    vec![
        (I8042_PORTS, Arc::new(I8042::new(signals()))),
        (CMOS_PORTS, Arc::new(Cmos::new(1 << 30, 0))),
        (DEBUG_PORTS, Arc::new(DebugPort::new())),
        (
            (0xe9, 1),
            Arc::new(DebugConsole::new(Box::new(std::io::sink()))),
        ),
        (FIRMWARE_DEBUG_PORTS, Arc::new(FirmwareDebug::new())),
        (ACPI_POWER_PORTS, Arc::new(AcpiPower::new(signals()))),
        (PM_TIMER_PORTS, Arc::new(PmTimer::new())),
        ((0x1000, GED_BYTES as u16), Arc::new(Ged::new(line))),
    ]
}

#[test]
fn fixed_ports_are_those_of_their_devices() {
    for port in [
        0x64, 0x70, 0x80, 0x3f8, 0x3ff, 0x402, 0x603, 0x60b, 0xcf8, 0xcff,
    ] {
        assert!(is_fixed_port(port), "{port:#x}");
    }
    for port in [0, 0x60, 0xe9, 0x2f8, 0x400, 0xd00, u16::MAX] {
        assert!(!is_fixed_port(port), "{port:#x}");
    }
}

proptest! {
    #[test]
    fn random_accesses_never_panic(
        accesses in prop::collection::vec(
            (any::<prop::sample::Index>(), 0u16..4, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()),
            0..200,
        )
    ) {
        let bus = Bus::new();
        let mut ports = Vec::new();
        for (range, device) in devices() {
            insert(&bus, range, device).unwrap();
            ports.push(range.0);
        }
        for (device, offset, mut data, is_write) in accesses {
            let address = u64::from(device.get(&ports) + offset);
            if is_write { bus.write(address, &data); } else { bus.read(address, &mut data); }
        }
    }
}
