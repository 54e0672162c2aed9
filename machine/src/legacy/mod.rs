//! Devices at fixed ports, and the platform's event device.
//!
//! | Where | Device |
//! | --- | --- |
//! | 0x61–0x64 | [`I8042`]: reset through the keyboard controller |
//! | 0x70–0x71 | [`Cmos`]: memory size and time of day |
//! | 0x80 | [`DebugPort`]: boot progress codes |
//! | 0xe9 | [`DebugConsole`]: text, if configured |
//! | 0x402 | [`FirmwareDebug`]: text from firmware |
//! | 0x600 | [`AcpiPower`]: power-off and reset |
//! | 0x608 | [`PmTimer`]: ACPI's clock |
//! | platform MMIO | [`Ged`]: power button, hot-plug of PCI devices, vCPUs and memory, VM generation |
//!
//! There is no PIC, no PIT and no HPET; their ports read as all ones.

mod acpi_power;
mod cmos;
mod debug;
mod ged;
mod i8042;
mod pm_timer;

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub use acpi_power::{AcpiPower, RESET_VALUE, S5_SLEEP_TYPE};
pub use cmos::{CMOS_CENTURY, Cmos, CmosState};
pub use debug::{DebugConsole, DebugPort, FirmwareDebug};
pub use ged::{
    GED_BYTES, GED_CPU_HOTPLUG, GED_GENERATION, GED_IRQ, GED_MEMORY_HOTPLUG, GED_PCI_HOTPLUG,
    GED_POWER_BUTTON, Ged, GedState,
};
pub use i8042::I8042;
pub use pm_timer::{PmTimer, PmTimerState};

use crate::bus::{Bus, BusDevice, BusError};
use crate::pci::CONFIG_PORTS;
use crate::serial::SERIAL_PORTS;

/// First port and number of ports of a device.
pub type Ports = (u16, u16);

/// Keyboard controller.
pub const I8042_PORTS: Ports = (0x61, 4);
/// Real-time clock and its RAM.
pub const CMOS_PORTS: Ports = (0x70, 2);
/// Boot progress codes.
pub const DEBUG_PORTS: Ports = (0x80, 1);
/// Firmware's debug text.
pub const FIRMWARE_DEBUG_PORTS: Ports = (0x402, 1);
/// ACPI reset register, sleep control and sleep status.
pub const ACPI_POWER_PORTS: Ports = (0x600, 4);
/// ACPI power management timer.
pub const PM_TIMER_PORTS: Ports = (0x608, 4);

/// The ports of every device that has fixed ones.
const FIXED_PORTS: [Ports; 8] = [
    I8042_PORTS,
    CMOS_PORTS,
    DEBUG_PORTS,
    SERIAL_PORTS,
    FIRMWARE_DEBUG_PORTS,
    ACPI_POWER_PORTS,
    PM_TIMER_PORTS,
    CONFIG_PORTS,
];

/// Whether `port` belongs to a device with fixed ports, even if the device is absent.
#[must_use]
pub fn is_fixed_port(port: u16) -> bool {
    FIXED_PORTS
        .iter()
        .any(|(first, count)| (*first..first + count).contains(&port))
}

/// Maps `device` at `ports`.
///
/// # Errors
/// The ports are in use.
pub fn insert(
    bus: &Bus,
    (first, count): Ports,
    device: Arc<dyn BusDevice>,
) -> Result<(), BusError> {
    bus.insert(u64::from(first), u64::from(count), device)
}

/// Signals the control thread. It may receive the same signal twice, because a guest tries several ways to reset.
fn raise(event: &EventFd, what: &str) {
    log::info!("The guest requests a {what}");
    if let Err(error) = event.write(1) {
        log::error!("Cannot notify the control thread of a {what}: {error}");
    }
}

#[cfg(test)]
mod tests;
