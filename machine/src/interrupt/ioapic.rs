//! The I/O APIC (Intel 82093AA with the EOI register of later chips), 24 pins.
//!
//! Redirection entries are converted to MSIs and delivered one by one. A level-triggered, unmasked entry is also added
//! to KVM's routing table under its pin number. From these routes, KVM derives which vectors must cause an exit at the
//! end of an interrupt (`kvm_scan_ioapic_routes`, arch/x86/kvm/irq.c). Edge-triggered entries need no route.
//!
//! ```text
//!  line up ─► [masked?] ─ level ─► remote IRR set ─► MSI ─► guest ─► EOI exit
//!                │                    ▲                                 │
//!                └ edge: lost         └── line still up ◄── IRR cleared ┘
//! ```

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use state::{Part, StateError, parts, require};
use virtio_devices::Unpoisoned;
use virtio_devices::pci::MsiMessage;

use super::{GsiRouter, IOAPIC_PIN_COUNT};
use crate::bus::BusDevice;

// Registers in the window.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

// Registers behind IOREGSEL/IOWIN.
const IOAPICID: u8 = 0;
const IOAPICVER: u8 = 1;
const IOAPICARB: u8 = 2;
const IOREDTBL: u8 = 0x10;

/// 0x20 is the first version with an EOI register.
const VERSION: u32 = 0x20;

// Fields of a redirection entry (82093AA §3.2.4).
const VECTOR_MASK: u64 = 0xff;
const DELIVERY_MODE_SHIFT: u32 = 8;
const DELIVERY_MODE_MASK: u64 = 0x7;
const DESTINATION_LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL_TRIGGERED: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Destination bits 8–14, the paravirtual extension that KVM guests use.
const EXT_DESTINATION_SHIFT: u32 = 49;
const EXT_DESTINATION_MASK: u64 = 0x7f;
const DESTINATION_SHIFT: u32 = 56;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

/// Bits of the id register that a guest can set.
const ID_MASK: u32 = 0x0f00_0000;

const PART: Part = parts::IOAPIC;

const MSI_BASE: u64 = 0xfee0_0000;
const MSI_ASSERT: u32 = 1 << 14;
const MSI_LEVEL: u32 = 1 << 15;

/// The saved state of the I/O APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoapicState {
    /// Selected register of the window.
    pub select: u8,
    /// Id register.
    pub id: u32,
    /// Redirection entries, one per pin.
    pub entries: Vec<u64>,
    /// Pins whose line is asserted, one bit each.
    pub lines: u32,
}

impl state::State for IoapicState {
    const PART: Part = PART;
}

struct State {
    select: u8,
    id: u32,
    entries: [u64; IOAPIC_PIN_COUNT as usize],
    /// Pins whose line is asserted now, one bit each.
    lines: u32,
}

/// The I/O APIC. A device on the MMIO bus; devices reach it through [`IrqLine`]s.
pub struct Ioapic {
    router: Arc<GsiRouter>,
    state: Mutex<State>,
    undelivered: AtomicU64,
}

virtio_devices::debug_fields!(Ioapic(it) {
    entries: format_args!("{:x?}", it.state_now().entries)
});

/// The message that a redirection entry describes.
fn message_of(entry: u64) -> MsiMessage {
    let destination = entry >> DESTINATION_SHIFT;
    let ext_destination = (entry >> EXT_DESTINATION_SHIFT) & EXT_DESTINATION_MASK;
    let mut address = MSI_BASE | destination << 12 | ext_destination << 5;
    if entry & DESTINATION_LOGICAL != 0 {
        address |= 1 << 2;
    }
    let delivery_mode = (entry >> DELIVERY_MODE_SHIFT) & DELIVERY_MODE_MASK;
    let mut data = (entry & VECTOR_MASK) as u32 | (delivery_mode as u32) << 8;
    if entry & LEVEL_TRIGGERED != 0 {
        data |= MSI_LEVEL | MSI_ASSERT;
    }
    MsiMessage { address, data }
}

impl Ioapic {
    /// The state after power-on: every pin masked.
    #[must_use]
    pub fn new(router: Arc<GsiRouter>) -> Self {
        Self {
            router,
            state: Mutex::new(State {
                select: 0,
                id: 0,
                entries: [MASKED; IOAPIC_PIN_COUNT as usize],
                lines: 0,
            }),
            undelivered: AtomicU64::new(0),
        }
    }

    /// The input line of `pin`, or `None` if there is no such pin.
    #[must_use]
    pub fn line(self: &Arc<Self>, pin: u8) -> Option<IrqLine> {
        (pin < IOAPIC_PIN_COUNT).then(|| IrqLine {
            ioapic: Arc::clone(self),
            pin,
        })
    }

    /// A vCPU finished a level-triggered interrupt (`KVM_EXIT_IOAPIC_EOI`).
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = self.state_now();
        for pin in 0..IOAPIC_PIN_COUNT {
            let entry = &mut state.entries[usize::from(pin)];
            let waits = LEVEL_TRIGGERED | REMOTE_IRR;
            if *entry & waits == waits && *entry & VECTOR_MASK == u64::from(vector) {
                *entry &= !REMOTE_IRR;
                // The router counts a rejection, and this caller could not act on it.
                let _counted = self.service_level(&mut state, pin);
            }
        }
    }

    /// The programmed registers and the asserted lines.
    pub fn state(&self) -> IoapicState {
        let state = self.state_now();
        IoapicState {
            select: state.select,
            id: state.id,
            entries: state.entries.to_vec(),
            lines: state.lines,
        }
    }

    /// Restores the chip from which `saved` was taken. Nothing is delivered: interrupts in transit are in the local
    /// APICs.
    ///
    /// # Errors
    /// A state that the chip cannot have; nothing is changed then.
    pub fn restore(&self, saved: &IoapicState) -> Result<(), StateError> {
        let entries = <[u64; IOAPIC_PIN_COUNT as usize]>::try_from(saved.entries.as_slice())
            .map_err(|_wrong_length| {
                let reason = format!("are {}, there are {IOAPIC_PIN_COUNT}", saved.entries.len());
                StateError::invalid(PART, "entries", reason)
            })?;
        for entry in entries {
            let busy_edge = entry & (REMOTE_IRR | LEVEL_TRIGGERED) == REMOTE_IRR;
            require(
                entry & DELIVERY_STATUS == 0 && !busy_edge,
                PART,
                "entries",
                || format!("cannot contain {entry:#x}"),
            )?;
        }
        require(saved.lines >> IOAPIC_PIN_COUNT == 0, PART, "lines", || {
            format!("{:#x} has lines that do not exist", saved.lines)
        })?;
        require(saved.id & !ID_MASK == 0, PART, "id", || {
            format!("cannot be {:#x}", saved.id)
        })?;
        let mut state = self.state_now();
        *state = State {
            select: saved.select,
            id: saved.id,
            entries,
            lines: saved.lines,
        };
        for (pin, entry) in (0..).zip(entries) {
            self.route(pin, entry);
        }
        Ok(())
    }

    /// Interrupts that the host rejected, for example because the guest's entry is invalid.
    pub fn undelivered(&self) -> u64 {
        self.undelivered.load(Ordering::Relaxed)
    }

    fn set_line(&self, pin: u8, up: bool) -> io::Result<()> {
        let mut state = self.state_now();
        let bit = 1 << pin;
        let was_up = state.lines & bit != 0;
        if !up {
            state.lines &= !bit;
            return Ok(());
        }
        state.lines |= bit;
        let entry = state.entries[usize::from(pin)];
        if entry & LEVEL_TRIGGERED != 0 {
            return self.service_level(&mut state, pin);
        }
        // An edge on a masked pin is lost, as in the chip.
        if was_up || entry & MASKED != 0 {
            return Ok(());
        }
        self.deliver(entry)
    }

    /// Delivers a level-triggered pin if its line is asserted and the guest is not still processing the previous
    /// interrupt.
    fn service_level(&self, state: &mut State, pin: u8) -> io::Result<()> {
        let entry = &mut state.entries[usize::from(pin)];
        let up = state.lines & (1 << pin) != 0;
        if !up || *entry & LEVEL_TRIGGERED == 0 || *entry & (MASKED | REMOTE_IRR) != 0 {
            return Ok(());
        }
        *entry |= REMOTE_IRR;
        self.deliver(*entry)
    }

    fn deliver(&self, entry: u64) -> io::Result<()> {
        self.router
            .backend()
            .signal_msi(message_of(entry))
            .inspect_err(|_refused| {
                self.undelivered.fetch_add(1, Ordering::Relaxed);
            })
    }

    fn read_register(&self) -> u32 {
        let state = self.state_now();
        match state.select {
            IOAPICID | IOAPICARB => state.id,
            IOAPICVER => VERSION | u32::from(IOAPIC_PIN_COUNT - 1) << 16,
            select => match pin_of(select) {
                Some((pin, false)) => state.entries[pin] as u32,
                Some((pin, true)) => (state.entries[pin] >> 32) as u32,
                None => 0,
            },
        }
    }

    fn write_register(&self, value: u32) {
        let mut state = self.state_now();
        match state.select {
            IOAPICID => state.id = value & ID_MASK,
            select => {
                if let Some((pin, high)) = pin_of(select) {
                    self.write_entry(&mut state, pin, high, value);
                }
            }
        }
    }

    fn write_entry(&self, state: &mut State, pin: usize, high: bool, value: u32) {
        let old = state.entries[pin];
        let mut new = if high {
            (old & 0xffff_ffff) | u64::from(value) << 32
        } else {
            (old & !0xffff_ffff) | u64::from(value)
        };
        new = (new & !READ_ONLY) | (old & READ_ONLY);
        // Operating systems switch a pin to edge and back to clear a stuck remote IRR.
        if new & LEVEL_TRIGGERED == 0 {
            new &= !REMOTE_IRR;
        }
        state.entries[pin] = new;
        if self.route(pin as u32, new)
            && let Err(error) = self.service_level(state, pin as u8)
        {
            log::debug!("I/O APIC pin {pin}: entry {new:#x} was refused: {error}");
        }
    }

    /// Updates KVM's route of a pin; false if the host rejected it.
    fn route(&self, pin: u32, entry: u64) -> bool {
        let routed = entry & LEVEL_TRIGGERED != 0 && entry & MASKED == 0;
        let message = routed.then(|| message_of(entry));
        let result = self.router.set_route(pin, message);
        if let Err(error) = &result {
            self.undelivered.fetch_add(1, Ordering::Relaxed);
            log::debug!("I/O APIC pin {pin}: entry {entry:#x} was refused: {error}");
        }
        result.is_ok()
    }

    fn state_now(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }
}

/// Pin and half (true: high word) of a redirection table register.
fn pin_of(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(IOREDTBL)?;
    (index < IOAPIC_PIN_COUNT * 2).then_some((usize::from(index / 2), index % 2 == 1))
}

impl BusDevice for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            IOREGSEL => u32::from(self.state_now().select),
            IOWIN => self.read_register(),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(i).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (IOREGSEL, [select, ..]) => self.state_now().select = *select,
            (IOWIN, &[a, b, c, d]) => self.write_register(u32::from_le_bytes([a, b, c, d])),
            (EOI, [vector, ..]) => self.end_of_interrupt(*vector),
            _ => {}
        }
    }
}

/// One input of the I/O APIC, owned by the device that drives it.
#[derive(Clone)]
pub struct IrqLine {
    ioapic: Arc<Ioapic>,
    pin: u8,
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqLine").field("pin", &self.pin).finish()
    }
}

impl IrqLine {
    /// One pulse, for an edge-triggered device. Never blocks.
    ///
    /// # Errors
    /// The host rejected the message that the guest programmed.
    pub fn trigger(&self) -> io::Result<()> {
        let result = self.ioapic.set_line(self.pin, true);
        self.ioapic.set_line(self.pin, false)?;
        result
    }

    /// Asserts or deasserts the line, for a level-triggered device.
    ///
    /// # Errors
    /// The host rejected the message that the guest programmed.
    pub fn set_level(&self, up: bool) -> io::Result<()> {
        self.ioapic.set_line(self.pin, up)
    }
}

impl vm_superio::Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        IrqLine::trigger(self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::FakeBackend;
    use super::*;
    use proptest::prelude::*;

    fn ioapic() -> (Arc<FakeBackend>, Arc<Ioapic>) {
        let backend = Arc::new(FakeBackend::default());
        let router = Arc::new(GsiRouter::new(backend.clone()));
        (backend, Arc::new(Ioapic::new(router)))
    }

    fn write(ioapic: &Ioapic, register: u8, value: u32) {
        ioapic.write(IOREGSEL, &[register]);
        ioapic.write(IOWIN, &value.to_le_bytes());
    }

    fn read(ioapic: &Ioapic, register: u8) -> u32 {
        let mut data = [0; 4];
        ioapic.write(IOREGSEL, &u32::from(register).to_le_bytes());
        ioapic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    fn program(ioapic: &Ioapic, pin: u8, entry: u64) {
        write(ioapic, IOREDTBL + 2 * pin + 1, (entry >> 32) as u32);
        write(ioapic, IOREDTBL + 2 * pin, entry as u32);
    }

    #[test]
    fn version_names_the_pins_and_id_is_kept() {
        let (_, ioapic) = ioapic();
        assert_eq!(read(&ioapic, IOAPICVER), 0x0017_0020);
        write(&ioapic, IOAPICID, 0xffff_ffff);
        assert_eq!(read(&ioapic, IOAPICID), 0x0f00_0000);
    }

    #[test]
    fn message_carries_destination_vector_and_mode() {
        // Logical destination 0x105, lowest priority, vector 0x31.
        let entry = 0x05 << 56 | 1 << 49 | DESTINATION_LOGICAL | 1 << 8 | 0x31;
        let message = message_of(entry);
        assert_eq!(message.address, 0xfee0_5024);
        assert_eq!(message.data, 0x131);
        assert_eq!(message_of(entry | LEVEL_TRIGGERED).data, 0xc131);
    }

    #[test]
    fn edge_pin_delivers_each_pulse_without_a_route() {
        let (backend, ioapic) = ioapic();
        let line = ioapic.line(4).unwrap();
        line.trigger().unwrap();
        assert!(backend.notes().messages.is_empty());
        program(&ioapic, 4, 0x24);
        line.trigger().unwrap();
        line.trigger().unwrap();
        assert_eq!(backend.notes().messages.len(), 2);
        assert!(backend.notes().tables.is_empty());
    }

    #[test]
    fn level_pin_waits_for_the_end_of_interrupt_and_comes_again_while_up() {
        let (backend, ioapic) = ioapic();
        let line = ioapic.line(10).unwrap();
        program(&ioapic, 10, LEVEL_TRIGGERED | 0x55);
        assert_eq!(backend.notes().tables.last().unwrap()[0].gsi, 10);
        line.set_level(true).unwrap();
        line.set_level(true).unwrap();
        assert_eq!(backend.notes().messages.len(), 1);
        assert_eq!(read(&ioapic, IOREDTBL + 20) & 0x4000, 0x4000);
        ioapic.end_of_interrupt(0x54);
        assert_eq!(backend.notes().messages.len(), 1);
        ioapic.end_of_interrupt(0x55);
        assert_eq!(backend.notes().messages.len(), 2);
        line.set_level(false).unwrap();
        ioapic.write(EOI, &[0x55, 0, 0, 0]);
        assert_eq!(backend.notes().messages.len(), 2);
        assert_eq!(read(&ioapic, IOREDTBL + 20) & 0x4000, 0);
    }

    #[test]
    fn level_pin_raised_while_masked_is_delivered_at_unmask() {
        let (backend, ioapic) = ioapic();
        program(&ioapic, 3, MASKED | LEVEL_TRIGGERED | 0x40);
        ioapic.line(3).unwrap().set_level(true).unwrap();
        assert!(backend.notes().messages.is_empty());
        program(&ioapic, 3, LEVEL_TRIGGERED | 0x40);
        assert_eq!(backend.notes().messages.len(), 1);
        program(&ioapic, 3, MASKED | LEVEL_TRIGGERED | 0x40);
        assert!(backend.notes().tables.last().unwrap().is_empty());
    }

    #[test]
    fn remote_irr_is_cleared_by_a_turn_to_edge() {
        let (_, ioapic) = ioapic();
        program(&ioapic, 3, LEVEL_TRIGGERED | 0x40);
        ioapic.line(3).unwrap().set_level(true).unwrap();
        program(&ioapic, 3, MASKED | 0x40);
        assert_eq!(read(&ioapic, IOREDTBL + 6), 0x1_0040);
    }

    #[test]
    fn refused_message_is_an_error_and_counted() {
        let (backend, ioapic) = ioapic();
        program(&ioapic, 4, 0x24);
        backend.notes().refuse = true;
        assert!(ioapic.line(4).unwrap().trigger().is_err());
        assert_eq!(ioapic.undelivered(), 1);
    }

    #[test]
    fn line_of_a_missing_pin_is_none() {
        let (_, ioapic) = ioapic();
        assert!(ioapic.line(24).is_none());
    }

    proptest! {
        #[test]
        fn random_accesses_never_panic(
            accesses in prop::collection::vec(
                (0u64..0x1000, prop::collection::vec(any::<u8>(), 0..9), any::<bool>(), any::<u8>()),
                0..200,
            )
        ) {
            let (_, ioapic) = ioapic();
            for (offset, mut data, is_write, byte) in accesses {
                // Half of the accesses hit an existing register.
                let offset = if byte & 1 == 0 { [IOREGSEL, IOWIN, EOI][usize::from(byte) % 3] } else { offset };
                if is_write { ioapic.write(offset, &data); } else { ioapic.read(offset, &mut data); }
                if let Some(line) = ioapic.line(byte % 32) {
                    line.set_level(is_write).unwrap();
                }
                ioapic.end_of_interrupt(byte);
            }
        }
    }
}
