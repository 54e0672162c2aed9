//! The register behind ACPI's generic event device (ACPI 6.5 §5.6.9).
//!
//! An event sets a bit and pulses the interrupt; the DSDT's method reads the
//! byte, which clears it, and notifies the device concerned.

use std::sync::atomic::{AtomicU8, Ordering};

use serde::{Deserialize, Serialize};
use state::{Part, State, StateError, parts, require};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

const PART: Part = parts::GED;

/// Size of the register in bytes.
pub const GED_BYTES: u64 = 1;
/// I/O APIC pin of the device: the first that no ISA device ever had.
pub const GED_IRQ: u8 = 16;
/// vCPUs were added, or should be removed.
pub const GED_CPU_HOTPLUG: u8 = 1;
/// Memory devices were added.
pub const GED_MEMORY_HOTPLUG: u8 = 2;
/// PCI functions were added, or should be removed.
pub const GED_PCI_HOTPLUG: u8 = 4;
/// The power button was pressed.
pub const GED_POWER_BUTTON: u8 = 8;
/// The VM generation identifier has changed.
pub const GED_GENERATION: u8 = 16;

const GED_EVENTS: u8 =
    GED_CPU_HOTPLUG | GED_MEMORY_HOTPLUG | GED_PCI_HOTPLUG | GED_POWER_BUTTON | GED_GENERATION;

/// The saved state of the event device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GedState {
    /// Events that the guest has not read yet.
    pub pending: u8,
}

impl State for GedState {
    const PART: Part = PART;
}

/// The event byte.
#[derive(Debug)]
pub struct Ged {
    pending: AtomicU8,
    line: IrqLine,
}

impl Ged {
    /// No events; pulses `line` for each new one.
    #[must_use]
    pub fn new(line: IrqLine) -> Self {
        Self {
            pending: AtomicU8::new(0),
            line,
        }
    }

    /// Events that the guest has not read yet.
    pub fn state(&self) -> GedState {
        GedState {
            pending: self.pending.load(Ordering::Acquire),
        }
    }

    /// Restores events that the guest has not read yet; their interrupt was delivered.
    ///
    /// # Errors
    /// Unknown events.
    pub fn restore(&self, state: &GedState) -> Result<(), StateError> {
        let unknown = state.pending & !GED_EVENTS;
        require(unknown == 0, PART, "pending", || {
            format!("has unknown events {unknown:#x}")
        })?;
        self.pending.store(state.pending, Ordering::Release);
        Ok(())
    }

    /// Presses the power button. The guest decides how to react.
    ///
    /// # Errors
    /// The host rejected the interrupt that the guest programmed.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.raise(GED_POWER_BUTTON)
    }

    /// Makes the guest read the PCI hot-plug controller.
    ///
    /// # Errors
    /// As [`Ged::press_power_button`].
    pub fn announce_pci_change(&self) -> std::io::Result<()> {
        self.raise(GED_PCI_HOTPLUG)
    }

    /// Makes the guest read the vCPU hot-plug controller.
    ///
    /// # Errors
    /// As [`Ged::press_power_button`].
    pub fn announce_cpu_change(&self) -> std::io::Result<()> {
        self.raise(GED_CPU_HOTPLUG)
    }

    /// Makes the guest read the VM generation identifier.
    ///
    /// # Errors
    /// As [`Ged::press_power_button`].
    pub fn announce_generation(&self) -> std::io::Result<()> {
        self.raise(GED_GENERATION)
    }

    /// Makes the guest read the memory hot-plug controller.
    ///
    /// # Errors
    /// As [`Ged::press_power_button`].
    pub fn announce_memory_change(&self) -> std::io::Result<()> {
        self.raise(GED_MEMORY_HOTPLUG)
    }

    fn raise(&self, event: u8) -> std::io::Result<()> {
        self.pending.fetch_or(event, Ordering::AcqRel);
        self.line.trigger()
    }
}

impl BusDevice for Ged {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(byte) = data.first_mut() {
            *byte = self.pending.swap(0, Ordering::AcqRel);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::{GsiRouter, Ioapic, fake::FakeBackend};
    use std::sync::Arc;

    #[test]
    fn power_button_interrupts_and_is_read_once() {
        let backend = Arc::new(FakeBackend::default());
        let router = Arc::new(GsiRouter::new(backend.clone()));
        let ioapic = Arc::new(Ioapic::new(router));
        ioapic.write(0, &[0x10 + 2 * GED_IRQ]);
        ioapic.write(0x10, &0x39_u32.to_le_bytes());
        let ged = Ged::new(ioapic.line(GED_IRQ).unwrap());
        ged.press_power_button().unwrap();
        assert_eq!(backend.notes().messages[0].data, 0x39);
        let mut byte = [0];
        ged.read(0, &mut byte);
        assert_eq!(byte, [8]);
        ged.read(0, &mut byte);
        assert_eq!(byte, [0]);
    }
}
