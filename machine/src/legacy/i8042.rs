//! The part of the keyboard controller that operating systems use to reset a PC.

use std::sync::Arc;

use super::raise;
use crate::bus::BusDevice;
use crate::signals::VmSignals;

/// Offset of port 0x61, the system control port.
const SYSTEM_CONTROL: u64 = 0;
/// Offset of port 0x64: command when written, status when read.
const COMMAND: u64 = 3;
/// Timer 2's output is high, so that a calibration loop on it ends.
const TIMER_2_OUTPUT: u8 = 0x20;
/// Pulses the processor's reset line.
const COMMAND_RESET: u8 = 0xfe;

/// Ports 0x61–0x64. Port 0x60 is not implemented, because there is no keyboard.
#[derive(Debug)]
pub struct I8042 {
    signals: Arc<VmSignals>,
}

impl I8042 {
    /// A controller that signals a reset to `signals`.
    #[must_use]
    pub fn new(signals: Arc<VmSignals>) -> Self {
        Self { signals }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // A status of zero means that the input buffer is empty. A guest that resets this way waits for that first.
        data.fill(0);
        if let (SYSTEM_CONTROL, Some(byte)) = (offset, data.first_mut()) {
            *byte = TIMER_2_OUTPUT;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data.first()) == (COMMAND, Some(&COMMAND_RESET)) {
            raise(&self.signals.reset, "reset");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{is_raised, signals};
    use super::*;

    #[test]
    fn reset_command_raises_reset() {
        let signals = signals();
        let i8042 = I8042::new(signals.clone());
        i8042.write(SYSTEM_CONTROL, &[0xfe]);
        i8042.write(COMMAND, &[0xd1]);
        assert!(!is_raised(&signals.reset));
        i8042.write(COMMAND, &[0xfe]);
        assert!(is_raised(&signals.reset));
    }

    #[test]
    fn system_control_port_ends_timer_loops_and_status_is_ready() {
        let i8042 = I8042::new(signals());
        let mut byte = [0xff];
        i8042.read(SYSTEM_CONTROL, &mut byte);
        assert_eq!(byte, [0x20]);
        i8042.read(COMMAND, &mut byte);
        assert_eq!(byte, [0]);
    }
}
