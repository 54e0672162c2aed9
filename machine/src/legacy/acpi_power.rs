//! ACPI's reset register and sleep control/status registers, all at one port
//! (ACPI 6.5 §4.8.3.6, §4.8.3.7). The FADT points here.

use std::sync::Arc;

use super::raise;
use crate::bus::BusDevice;
use crate::signals::VmSignals;

/// The value that the FADT specifies for a reset.
pub const RESET_VALUE: u8 = 1;
/// Sleep type of S5 in the DSDT's `_S5_` package.
pub const S5_SLEEP_TYPE: u8 = 5;

// Sleep control register.
const SLP_TYP_SHIFT: u8 = 2;
const SLP_EN: u8 = 1 << 5;

/// The register; power-off and reset are signalled to the control thread.
#[derive(Debug)]
pub struct AcpiPower {
    signals: Arc<VmSignals>,
}

impl AcpiPower {
    /// A register that raises `signals`.
    #[must_use]
    pub fn new(signals: Arc<VmSignals>) -> Self {
        Self { signals }
    }
}

impl BusDevice for AcpiPower {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // Sleep status: never woken up.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        const POWER_OFF: u8 = S5_SLEEP_TYPE << SLP_TYP_SHIFT | SLP_EN;
        match (offset, data.first()) {
            (0, Some(&RESET_VALUE)) => raise(&self.signals.reset, "reset"),
            (0, Some(&POWER_OFF)) => raise(&self.signals.shutdown, "power-off"),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{is_raised, signals};
    use super::*;

    #[test]
    fn writes_of_the_two_values_raise_their_event_and_others_none() {
        let signals = signals();
        let power = AcpiPower::new(signals.clone());
        power.write(0, &[0x34]);
        assert!(is_raised(&signals.shutdown));
        power.write(0, &[1, 0, 0, 0]);
        assert!(is_raised(&signals.reset));
        for value in [0, 2, 0x14, 0x20, 0x35] {
            power.write(0, &[value]);
        }
        power.write(1, &[1]);
        assert!(!is_raised(&signals.shutdown));
        assert!(!is_raised(&signals.reset));
    }
}
