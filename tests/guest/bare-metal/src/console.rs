//! COM1 as an output: bytes go straight to the transmit register, which our
//! VMM always accepts.

use core::fmt::{self, Write};

use crate::machine::outb;

const COM1: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = 1;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;

struct Com1;

impl Write for Com1 {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            outb(COM1, byte);
        }
        Ok(())
    }
}

/// Resets COM1's registers after other writes: divisor access, loopback and interrupts off.
pub fn restore() {
    outb(COM1 + LINE_CONTROL, 0x03);
    outb(COM1 + MODEM_CONTROL, 0);
    outb(COM1 + INTERRUPT_ENABLE, 0);
}

/// Prints one line.
pub fn line(arguments: fmt::Arguments<'_>) {
    // Com1 never fails.
    let _ = Com1.write_fmt(arguments);
    let _ = Com1.write_str("\n");
}
