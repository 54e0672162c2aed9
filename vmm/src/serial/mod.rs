//! The serial port.

/// First port and number of ports of COM1.
pub const SERIAL_PORTS: (u16, u16) = (0x3f8, 8);
/// Its interrupt.
pub const SERIAL_IRQ: u8 = 4;
