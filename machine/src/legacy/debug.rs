//! Three ports to which a guest may write debug output.
//!
//! The output is guest-controlled: the length and the number of lines are limited, and control characters do not reach
//! a terminal.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use virtio_devices::Unpoisoned;

use crate::bus::BusDevice;

/// Codes logged per machine; Linux also writes here as a delay.
const CODES_LOGGED_MAX: u64 = 64;
/// Bytes of one line of firmware text.
const LINE_BYTES_MAX: usize = 256;
/// Lines of firmware text logged per machine: about 1 MiB.
const LINES_LOGGED_MAX: u64 = 4096;
/// The value that reads of 0xe9 and 0x402 return if the port is present.
const PORT_PRESENT: u8 = 0xe9;

/// Port 0x80: codes of boot progress, with their times.
#[derive(Debug)]
pub struct DebugPort {
    start: Instant,
    codes: AtomicU64,
    first_seen: Mutex<BTreeMap<u8, Duration>>,
}

impl DebugPort {
    /// Kernel code runs (written by firmware or an instrumented kernel).
    pub const CODE_KERNEL: u8 = 0x40;
    /// User space runs.
    pub const CODE_USERSPACE: u8 = 0x41;

    /// Starts the clock.
    #[must_use]
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            codes: AtomicU64::new(0),
            first_seen: Mutex::default(),
        }
    }

    /// The time of `code`'s first occurrence, counted from [`DebugPort::new`]. Kept for [`DebugPort::CODE_KERNEL`] and
    /// [`DebugPort::CODE_USERSPACE`].
    pub fn first_seen(&self, code: u8) -> Option<Duration> {
        lock(&self.first_seen).get(&code).copied()
    }
}

impl Default for DebugPort {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let Some(&code) = data.first() else {
            return;
        };
        let elapsed = self.start.elapsed();
        if matches!(code, Self::CODE_KERNEL | Self::CODE_USERSPACE) {
            lock(&self.first_seen).entry(code).or_insert(elapsed);
        }
        if self.codes.fetch_add(1, Ordering::Relaxed) < CODES_LOGGED_MAX {
            log::debug!(
                "[Debug I/O port: {code:#04x}] {}.{:06} s",
                elapsed.as_secs(),
                elapsed.subsec_micros()
            );
        }
    }
}

/// Port 0x402: firmware's debug text, one log entry per line.
#[derive(Debug)]
pub struct FirmwareDebug {
    line: Mutex<Vec<u8>>,
    lines: AtomicU64,
}

impl FirmwareDebug {
    /// No text yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            line: Mutex::default(),
            lines: AtomicU64::new(0),
        }
    }

    /// Lines received, logged or not.
    pub fn lines(&self) -> u64 {
        self.lines.load(Ordering::Relaxed)
    }

    fn end_line(&self, line: &mut Vec<u8>) {
        if self.lines.fetch_add(1, Ordering::Relaxed) < LINES_LOGGED_MAX {
            log::debug!("Firmware: {}", line.escape_ascii());
        }
        line.clear();
    }
}

impl Default for FirmwareDebug {
    fn default() -> Self {
        Self::new()
    }
}

impl BusDevice for FirmwareDebug {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PORT_PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut line = lock(&self.line);
        for &byte in data {
            match byte {
                b'\n' => self.end_line(&mut line),
                b'\r' => {}
                byte => {
                    line.push(byte);
                    if line.len() == LINE_BYTES_MAX {
                        self.end_line(&mut line);
                    }
                }
            }
        }
    }
}

/// Port 0xe9: bytes for an output chosen by the operator.
pub struct DebugConsole {
    output: Mutex<Box<dyn Write + Send>>,
    lost_bytes: AtomicU64,
}

virtio_devices::debug_fields!(DebugConsole { lost_bytes });

impl DebugConsole {
    /// Writes to `output`, which must not block.
    #[must_use]
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        Self {
            output: Mutex::new(output),
            lost_bytes: AtomicU64::new(0),
        }
    }
}

impl BusDevice for DebugConsole {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PORT_PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if lock(&self.output).write_all(data).is_err() {
            self.lost_bytes
                .fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unpoisoned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_port_remembers_when_a_code_first_came() {
        let port = DebugPort::new();
        assert!(port.first_seen(DebugPort::CODE_KERNEL).is_none());
        port.write(0, &[0x40]);
        let first = port.first_seen(DebugPort::CODE_KERNEL).unwrap();
        port.write(0, &[0x40]);
        assert_eq!(port.first_seen(DebugPort::CODE_KERNEL), Some(first));
        port.write(0, &[0x99]);
        assert!(port.first_seen(0x99).is_none());
    }

    #[test]
    fn firmware_text_is_cut_into_lines_of_bounded_length() {
        let port = FirmwareDebug::new();
        port.write(0, b"hello\r\nwor");
        assert_eq!(port.lines(), 1);
        for _ in 0..LINE_BYTES_MAX {
            port.write(0, b"x");
        }
        assert_eq!(port.lines(), 2);
        assert_eq!(lock(&port.line).len(), 3);
    }

    #[test]
    fn debug_ports_say_that_they_are_there() {
        let mut byte = [0];
        FirmwareDebug::new().read(0, &mut byte);
        assert_eq!(byte, [0xe9]);
        DebugConsole::new(Box::new(std::io::sink())).read(0, &mut byte);
        assert_eq!(byte, [0xe9]);
    }
}
