//! The 16550 serial port on the port bus.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde::{Deserialize, Serialize};
use state::{Bytes, Part, State, StateError, parts, require};
use virtio_devices::Unpoisoned;
use vm_superio::Serial;
use vm_superio::serial::{Error, NoEvents, SerialState};

use super::{Endpoint, InputSink, Output};
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// Offset of the receive register.
const DATA: u64 = 0;
/// Offset of the interrupt enable register.
const INTERRUPT_ENABLE: u8 = 1;
/// Offset of the interrupt identification register.
const INTERRUPT_IDENTIFICATION: u8 = 2;
/// Offset of the line control register.
const LINE_CONTROL: u8 = 3;
/// Offset of the line status register.
const LINE_STATUS: u8 = 5;
/// Received data available: the interrupt, its identification, and the status.
const RECEIVED_DATA_ENABLED: u8 = 1;
const RECEIVED_DATA_PENDING: u8 = 4;
const RECEIVED_DATA_READY: u8 = 1;
/// In the identification: nothing is pending. The bits below `0x10` give the cause.
const NOTHING_PENDING: u8 = 1;
const IDENTIFICATION_MASK: u8 = 0xf;
/// In the line control: offsets 0 and 1 are the divisor.
const DIVISOR_LATCH: u8 = 0x80;
/// Offset of the modem control register, which has the loopback switch.
const MODEM_CONTROL: u64 = 4;

const PART: Part = parts::SERIAL;
/// Size of its receive FIFO in bytes.
const FIFO_BYTES: usize = 64;

/// The saved state of the port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct UartState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Received but not read by the guest.
    pub fifo: Bytes,
    /// Typed, but not yet in the FIFO because it is full.
    pub waiting: Bytes,
}

impl State for UartState {
    const PART: Part = PART;
}

/// A serial port between a guest and an [`Endpoint`].
pub struct Uart {
    serial: Mutex<Serial<IrqLine, NoEvents, Output>>,
    endpoint: Arc<Endpoint>,
    lost_interrupts: AtomicU64,
}

virtio_devices::debug_fields!(Uart { endpoint });

impl Uart {
    /// A port that pulses `line` and takes over the endpoint's input.
    #[must_use]
    pub fn new(line: IrqLine, endpoint: Arc<Endpoint>) -> Arc<Self> {
        let uart = Arc::new(Self {
            serial: Mutex::new(Serial::new(line, endpoint.output())),
            endpoint,
            lost_interrupts: AtomicU64::new(0),
        });
        let weak: Weak<Self> = Arc::downgrade(&uart);
        uart.endpoint.set_input_sink(weak);
        uart
    }

    /// Registers and input that the guest has not read. No input may arrive during the call; otherwise it would be in
    /// the state or come later, but not both.
    pub fn state(&self) -> UartState {
        let serial = self.serial().state();
        UartState {
            baud_divisor_low: serial.baud_divisor_low,
            baud_divisor_high: serial.baud_divisor_high,
            interrupt_enable: serial.interrupt_enable,
            interrupt_identification: serial.interrupt_identification,
            line_control: serial.line_control,
            line_status: serial.line_status,
            modem_control: serial.modem_control,
            modem_status: serial.modem_status,
            scratch: serial.scratch,
            fifo: Bytes(serial.in_buffer),
            waiting: Bytes(self.endpoint.waiting_input()),
        }
    }

    /// Restores the port from which `state` was taken.
    ///
    /// # Errors
    /// More input than a port and its endpoint can hold; nothing is changed then.
    pub fn restore(&self, state: &UartState) -> Result<(), StateError> {
        for (field, bytes, max) in [
            ("fifo", &state.fifo, FIFO_BYTES),
            ("waiting", &state.waiting, super::input::CHUNK_BYTES),
        ] {
            let count = bytes.0.len();
            require(count <= max, PART, field, || {
                format!("has {count} bytes, at most {max} are possible")
            })?;
        }
        let saved = SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.0.clone(),
        };
        let mut serial = self.serial();
        let line = serial.interrupt_evt().clone();
        match Serial::from_state(&saved, line, NoEvents, self.endpoint.output()) {
            Ok(restored) => *serial = restored,
            Err(error) => {
                let reason = format!("cannot be taken over: {error}");
                return Err(StateError::invalid(PART, "fifo", reason));
            }
        }
        drop(serial);
        self.endpoint.put_back_input(&state.waiting.0);
        Ok(())
    }

    /// Number of interrupts that the host rejected because of what the guest programmed.
    pub fn lost_interrupts(&self) -> u64 {
        self.lost_interrupts.load(Ordering::Relaxed)
    }

    fn serial(&self) -> MutexGuard<'_, Serial<IrqLine, NoEvents, Output>> {
        self.serial.lock().unpoisoned()
    }

    /// The output never fails, and the caller checks for a full FIFO, so only interrupt errors remain.
    fn count<T>(&self, result: &Result<T, Error<io::Error>>) {
        if result.is_err() {
            self.lost_interrupts.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Reads a register as a 16550 does. vm-superio ends the received-data interrupt with the first byte read; real
    /// hardware ends it when the FIFO is empty (PC16550D, 8.5). Linux reads at most 256 bytes per check of the
    /// identification, and would leave the rest until more arrives.
    fn read_register(serial: &mut Serial<IrqLine, NoEvents, Output>, register: u8) -> u8 {
        let value = serial.read(register);
        if register != INTERRUPT_IDENTIFICATION || value & IDENTIFICATION_MASK != NOTHING_PENDING {
            return value;
        }
        let latched = serial.read(LINE_CONTROL) & DIVISOR_LATCH != 0;
        let data = !latched
            && serial.read(INTERRUPT_ENABLE) & RECEIVED_DATA_ENABLED != 0
            && serial.read(LINE_STATUS) & RECEIVED_DATA_READY != 0;
        if data {
            value & !IDENTIFICATION_MASK | RECEIVED_DATA_PENDING
        } else {
            value
        }
    }

    /// The port is eight bits wide: a wider access becomes one access per register.
    fn registers(offset: u64, count: usize) -> impl Iterator<Item = u8> {
        (offset..).map(|offset| offset as u8).take(count)
    }
}

impl BusDevice for Uart {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut serial = self.serial();
        for (register, byte) in Self::registers(offset, data.len()).zip(data) {
            *byte = Self::read_register(&mut serial, register);
        }
        drop(serial);
        if offset == DATA {
            self.endpoint.resume_input();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut serial = self.serial();
        for (register, byte) in Self::registers(offset, data.len()).zip(data) {
            self.count(&serial.write(register, *byte));
        }
        drop(serial);
        // No input is accepted in loopback mode, which may have just ended.
        if (offset..offset + data.len() as u64).contains(&MODEM_CONTROL) {
            self.endpoint.resume_input();
        }
    }
}

impl InputSink for Uart {
    fn accept(&self, bytes: &[u8]) -> usize {
        let mut serial = self.serial();
        let room = serial.fifo_capacity().min(bytes.len());
        if room == 0 {
            return 0;
        }
        let before = serial.fifo_capacity();
        let result = serial.enqueue_raw_bytes(&bytes[..room]);
        // Bytes are in the FIFO even if the interrupt was rejected.
        let accepted = before - serial.fifo_capacity();
        drop(serial);
        self.count(&result);
        accepted
    }
}

#[cfg(test)]
mod tests {
    use super::super::manager::tests::manager;
    use super::super::{EndpointMode, SERIAL_IRQ, SERIAL_PORTS, SerialManager};
    use super::*;
    use crate::bus::Bus;
    use crate::interrupt::fake::FakeBackend;
    use crate::interrupt::{GsiRouter, Ioapic};
    use proptest::prelude::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};
    use tempfile::TempDir;

    const BASE: u64 = SERIAL_PORTS.0 as u64;

    struct Machine {
        ports: Bus,
        backend: Arc<FakeBackend>,
        uart: Arc<Uart>,
    }

    fn machine(endpoint: Arc<Endpoint>) -> Machine {
        let backend = Arc::new(FakeBackend::default());
        let ioapic = Arc::new(Ioapic::new(Arc::new(GsiRouter::new(backend.clone()))));
        ioapic.write(0, &[0x10 + 2 * SERIAL_IRQ]);
        ioapic.write(0x10, &0x24_u32.to_le_bytes());
        let uart = Uart::new(ioapic.line(SERIAL_IRQ).unwrap(), endpoint);
        let ports = Bus::new();
        ports
            .insert(BASE, u64::from(SERIAL_PORTS.1), uart.clone())
            .unwrap();
        Machine {
            ports,
            backend,
            uart,
        }
    }

    /// A machine whose port is a socket, and a client that connects after `before` was applied to the machine.
    fn machine_on_a_socket(
        before: impl FnOnce(&Machine),
    ) -> ((SerialManager, TempDir), Machine, UnixStream) {
        let manager = manager();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console");
        let mode = EndpointMode::Socket(path.clone());
        let machine = machine(Endpoint::open(&mode, &manager).unwrap());
        before(&machine);
        let client = UnixStream::connect(path).unwrap();
        ((manager, directory), machine, client)
    }

    impl Machine {
        fn read(&self, register: u64) -> u8 {
            let mut byte = [0];
            self.ports.read(BASE + register, &mut byte);
            byte[0]
        }

        /// Reads as a driver does: data while the line status reports some.
        fn receive(&self, count: usize) -> Vec<u8> {
            let deadline = Instant::now() + Duration::from_secs(10);
            let mut received = Vec::new();
            while received.len() < count {
                if self.read(5) & 1 != 0 {
                    received.push(self.read(0));
                } else {
                    assert!(Instant::now() < deadline, "{received:?}");
                    std::thread::yield_now();
                }
            }
            received
        }
    }

    #[test]
    fn guest_text_reaches_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mode = EndpointMode::File {
            path: path.clone(),
            bytes_max: None,
        };
        let machine = machine(Endpoint::open(&mode, &manager()).unwrap());
        for byte in b"Linux version" {
            machine.ports.write(BASE, &[*byte]);
        }
        assert_eq!(std::fs::read(path).unwrap(), b"Linux version");
    }

    #[test]
    fn long_input_passes_through_the_small_fifo_complete_and_in_order() {
        let (_keep, machine, mut client) = machine_on_a_socket(|machine| {
            machine.ports.write(BASE + 1, &[1]);
        });
        let sent: Vec<u8> = (0..5000_u32).map(|i| (i % 249) as u8).collect();
        client.write_all(&sent).unwrap();
        assert!(machine.receive(sent.len()) == sent);
        assert!(!machine.backend.notes().messages.is_empty());
        assert_eq!(machine.backend.notes().messages[0].data, 0x24);
    }

    #[test]
    fn line_longer_than_a_drivers_loop_arrives_without_another_key() {
        let (_keep, machine, mut client) = machine_on_a_socket(|machine| {
            machine.ports.write(BASE + 1, &[1]);
        });
        let sent: Vec<u8> = (0..300_u32).map(|i| (i % 251) as u8).collect();
        client.write_all(&sent).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while machine.backend.notes().messages.is_empty() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        // One interrupt, handled as Linux does it (drivers/tty/serial/8250): up to 256 bytes each time that the
        // identification reports a pending interrupt.
        let mut received = Vec::new();
        while machine.read(2) & 0xf == 4 {
            for _ in 0..256 {
                if machine.read(5) & 1 == 0 {
                    break;
                }
                received.push(machine.read(0));
            }
        }
        assert!(
            received == sent,
            "{} of {} bytes",
            received.len(),
            sent.len()
        );
    }

    #[test]
    fn input_during_loopback_comes_after_it() {
        let (_keep, machine, mut client) = machine_on_a_socket(|machine| {
            machine.ports.write(BASE + 4, &[0x10]);
        });
        client.write_all(b"typed").unwrap();
        machine.ports.write(BASE, b"L");
        assert_eq!(machine.receive(1), b"L");
        machine.ports.write(BASE + 4, &[0]);
        assert_eq!(machine.receive(5), b"typed");
    }

    #[test]
    fn port_saved_and_restored_loses_no_typed_byte() {
        let manager = manager();
        let directory = tempfile::tempdir().unwrap();
        let sent: Vec<u8> = (0..200_u8).collect();
        let open = |name| {
            let mode = EndpointMode::Socket(directory.path().join(name));
            machine(Endpoint::open(&mode, &manager).unwrap())
        };
        let first = open("first");
        first.ports.write(BASE + 7, &[0x77]);
        let mut client = UnixStream::connect(directory.path().join("first")).unwrap();
        client.write_all(&sent).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while first.uart.state().waiting.0.len() + FIFO_BYTES < sent.len() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        let saved = state::Saved::of(&first.uart.state());
        let second = open("second");
        second.uart.restore(&saved.read().unwrap()).unwrap();
        assert_eq!(second.read(7), 0x77);
        assert!(second.receive(sent.len()) == sent);

        let third = machine(Endpoint::open(&EndpointMode::Null, &manager).unwrap());
        state::testing::damage(&saved, |damaged| {
            if let Err(error) = damaged.read().and_then(|state| third.uart.restore(&state)) {
                assert!(error.to_string().contains("serial"), "{error}");
            }
        });
    }

    #[test]
    fn refused_interrupt_is_counted_and_loses_no_text() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mode = EndpointMode::File {
            path: path.clone(),
            bytes_max: None,
        };
        let machine = machine(Endpoint::open(&mode, &manager()).unwrap());
        machine.backend.notes().refuse = true;
        machine.ports.write(BASE + 1, &[2]);
        machine.ports.write(BASE, b"x");
        assert!(machine.uart.lost_interrupts() > 0);
        assert_eq!(std::fs::read(path).unwrap(), b"x");
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            accesses in prop::collection::vec(
                (0u64..8, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()),
                0..200,
            )
        ) {
            let machine = machine(Endpoint::open(&EndpointMode::Null, &manager()).unwrap());
            for (register, mut data, is_write) in accesses {
                if is_write {
                    machine.ports.write(BASE + register, &data);
                } else {
                    machine.ports.read(BASE + register, &mut data);
                }
                machine.uart.accept(&data);
            }
        }
    }
}
