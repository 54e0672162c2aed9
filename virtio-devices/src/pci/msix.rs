//! MSI-X: capability, vector table and pending bits (PCI 3.0 §6.8.2).
//!
//! The driver programs [`MsixTable`] under the function's lock. Device threads use [`MsixLines`], which takes no lock,
//! so that a vCPU in a register access never delays a completion:
//!
//! ```text
//!   device thread: signal(v) ── live? ──yes──► MsiVectors::trigger
//!                                 └───no───► pending[v] = 1, check live again
//!   vCPU: unmask(v) ── MsiVectors::enable ── live = 1 ── pending[v]? ── trigger
//! ```
//!
//! Both sides write their own flag before they read the other's, in one total order. Therefore, either the device
//! thread sees `live`, or the vCPU sees `pending`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use state::{Bytes, Part, State, StateError, parts, require};

use super::{MsiMessage, MsiVectors};

const PART: Part = parts::MSIX;

/// Capability id of MSI-X.
pub const MSIX_CAPABILITY_ID: u8 = 0x11;
/// Bytes of a table entry: address, data, vector control.
pub const MSIX_ENTRY_BYTES: usize = 16;
/// Message control: all vectors are masked.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is enabled.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Vector control: this vector is masked. The only defined bit.
const VECTOR_CONTROL_MASK: u8 = 1;
/// The offset of vector control in an entry.
const VECTOR_CONTROL: usize = 12;
/// Maximum number of vectors of a function: the table size field has eleven bits.
pub const MSIX_VECTORS_MAX: u16 = 2048;

/// The saved table and pending bits. Configuration space holds the enable bit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// The vector table as the driver reads it.
    pub table: Bytes,
    /// Vectors with their pending bit set, ascending.
    pub pending: Vec<u16>,
}

impl State for MsixState {
    const PART: Part = PART;
}

/// The device threads' side of MSI-X.
pub struct MsixLines {
    vectors: Arc<dyn MsiVectors>,
    enabled: AtomicBool,
    lines: Box<[Line]>,
    undelivered: AtomicU64,
}

#[derive(Debug, Default)]
struct Line {
    /// Routed and not masked.
    live: AtomicBool,
    pending: AtomicBool,
}

crate::debug_fields!(MsixLines { enabled, lines });

impl MsixLines {
    /// Sends the vector's message now or, if it is masked, when it is unmasked. Numbers without a vector
    /// (VIRTIO_MSI_NO_VECTOR) are ignored; while MSI-X is disabled all numbers are ignored.
    pub fn signal(&self, vector: u16) {
        let Some(line) = self.lines.get(usize::from(vector)) else {
            return;
        };
        if !self.is_enabled() {
            return;
        }
        // If the vector was masked in this moment, the host rejects it, and it becomes pending.
        if line.live.load(Ordering::SeqCst) && self.vectors.trigger(vector).is_ok() {
            return;
        }
        line.pending.store(true, Ordering::SeqCst);
        if line.live.load(Ordering::SeqCst) {
            self.inject_pending(vector);
        }
    }

    /// Injects vectors that were pending when the table was saved and are not masked.
    pub(crate) fn inject_restored(&self) {
        for (vector, line) in (0u16..).zip(&self.lines) {
            if line.live.load(Ordering::SeqCst) {
                self.inject_pending(vector);
            }
        }
    }

    /// Whether the driver has enabled MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Interrupts that the host refused to route or to inject.
    pub fn undelivered(&self) -> u64 {
        self.undelivered.load(Ordering::Relaxed)
    }

    fn inject_pending(&self, vector: u16) {
        let line = &self.lines[usize::from(vector)];
        if line.pending.swap(false, Ordering::SeqCst) && self.vectors.trigger(vector).is_err() {
            line.pending.store(true, Ordering::SeqCst);
            self.undelivered.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[derive(Debug, Clone)]
struct Entry {
    bytes: [u8; MSIX_ENTRY_BYTES],
    /// The host's current route of this vector.
    routed: Option<MsiMessage>,
}

impl Entry {
    fn power_on() -> Self {
        let mut bytes = [0; MSIX_ENTRY_BYTES];
        bytes[VECTOR_CONTROL] = VECTOR_CONTROL_MASK;
        Self {
            bytes,
            routed: None,
        }
    }

    fn masked(&self) -> bool {
        self.bytes[VECTOR_CONTROL] & VECTOR_CONTROL_MASK != 0
    }

    fn message(&self) -> MsiMessage {
        let (address, rest) = self.bytes.split_at(8);
        MsiMessage {
            address: u64::from_le_bytes(address.try_into().expect("eight bytes")),
            data: u32::from_le_bytes(rest[..4].try_into().expect("four bytes")),
        }
    }
}

/// The driver's side of MSI-X.
#[derive(Debug)]
pub struct MsixTable {
    entries: Vec<Entry>,
    function_masked: bool,
    lines: Arc<MsixLines>,
}

impl MsixTable {
    /// A table of `count` masked vectors, MSI-X disabled.
    ///
    /// # Panics
    /// `count` is zero or above [`MSIX_VECTORS_MAX`].
    pub fn new(count: u16, vectors: Arc<dyn MsiVectors>) -> Self {
        assert!((1..=MSIX_VECTORS_MAX).contains(&count));
        let lines = MsixLines {
            vectors,
            enabled: AtomicBool::new(false),
            lines: (0..count).map(|_| Line::default()).collect(),
            undelivered: AtomicU64::new(0),
        };
        Self {
            entries: vec![Entry::power_on(); usize::from(count)],
            function_masked: false,
            lines: Arc::new(lines),
        }
    }

    /// The interface for device threads.
    pub fn lines(&self) -> Arc<MsixLines> {
        Arc::clone(&self.lines)
    }

    /// The values that the driver has programmed, and its pending interrupts.
    pub fn state(&self) -> MsixState {
        let pending = |line: &Line| line.pending.load(Ordering::SeqCst);
        MsixState {
            table: Bytes(self.entries.iter().flat_map(|entry| entry.bytes).collect()),
            pending: (0u16..)
                .zip(&self.lines.lines)
                .filter_map(|(vector, line)| pending(line).then_some(vector))
                .collect(),
        }
    }

    /// Restores the table from which `state` was taken, with `control` as the message control register. Routes are set,
    /// but nothing is injected before [`MsixLines::inject_restored`].
    ///
    /// # Errors
    /// A table of another size, undefined bits, or vectors that do not exist; nothing is changed then.
    pub fn restore(&mut self, state: &MsixState, control: u16) -> Result<(), StateError> {
        let table = &state.table.0;
        let bytes = self.entries.len() * MSIX_ENTRY_BYTES;
        require(table.len() == bytes, PART, "table", || {
            format!("has {} bytes instead of {bytes}", table.len())
        })?;
        let (entries, _) = table.as_chunks::<MSIX_ENTRY_BYTES>();
        let reserved = entries.iter().position(|entry| {
            entry[VECTOR_CONTROL] & !VECTOR_CONTROL_MASK != 0
                || entry[VECTOR_CONTROL + 1..].iter().any(|byte| *byte != 0)
        });
        require(reserved.is_none(), PART, "table", || {
            format!("sets reserved bits of vector {}", reserved.unwrap_or(0))
        })?;
        let missing = state
            .pending
            .iter()
            .find(|vector| usize::from(**vector) >= entries.len());
        require(missing.is_none(), PART, "pending", || {
            format!("names vector {missing:?} of {}", entries.len())
        })?;
        for (entry, bytes) in self.entries.iter_mut().zip(entries) {
            entry.bytes = *bytes;
        }
        self.set_control(control);
        for vector in &state.pending {
            self.lines.lines[usize::from(*vector)]
                .pending
                .store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// The capability's body and its write mask for
    /// [`ConfigSpace::add_capability`](super::ConfigSpace::add_capability), with table and pending bits at these
    /// offsets of one BAR.
    pub fn capability(&self, bar: u8, table_offset: u32, pba_offset: u32) -> ([u8; 10], [u8; 2]) {
        let size_field = u16::try_from(self.entries.len() - 1).expect("at most 2048 vectors");
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&size_field.to_le_bytes());
        body[2..6].copy_from_slice(&(table_offset | u32::from(bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(pba_offset | u32::from(bar)).to_le_bytes());
        (body, (CONTROL_FUNCTION_MASK | CONTROL_ENABLE).to_le_bytes())
    }

    /// Handles a write to the message control register.
    pub fn set_control(&mut self, control: u16) {
        let enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        if !enabled {
            // From here on signals are dropped and do not become pending.
            self.lines.enabled.store(false, Ordering::SeqCst);
        }
        for vector in 0..self.entries.len() {
            self.apply(vector, enabled);
        }
        self.lines.enabled.store(enabled, Ordering::SeqCst);
        if !enabled {
            for line in &self.lines.lines {
                line.pending.store(false, Ordering::SeqCst);
            }
        }
    }

    /// Reads the table at a byte offset; bytes after its end are zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self
                .position(at)
                .map_or(0, |(vector, at)| self.entries[vector].bytes[at]);
        }
    }

    /// Writes the table at a byte offset and routes the vectors that this unmasks.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let mut touched: Option<(usize, usize)> = None;
        for (at, value) in (offset..).zip(data) {
            let Some((vector, at)) = self.position(at) else {
                break;
            };
            let mask = match at {
                VECTOR_CONTROL => VECTOR_CONTROL_MASK,
                at if at > VECTOR_CONTROL => 0,
                _ => 0xff,
            };
            self.entries[vector].bytes[at] = value & mask;
            touched = Some((touched.map_or(vector, |(first, _)| first), vector));
        }
        if let Some((first, last)) = touched {
            let enabled = self.lines.is_enabled();
            for vector in first..=last {
                self.apply(vector, enabled);
            }
        }
    }

    /// Reads the pending bits at a byte offset; bytes after their end are zero.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = 0;
            for bit in 0..8 {
                let line = usize::try_from(at)
                    .ok()
                    .and_then(|at| at.checked_mul(8))
                    .and_then(|first| self.lines.lines.get(first + bit));
                if line.is_some_and(|line| line.pending.load(Ordering::SeqCst)) {
                    *byte |= 1 << bit;
                }
            }
        }
    }

    /// Resets to power-on: disabled, all vectors masked, nothing pending.
    pub fn reset(&mut self) {
        self.set_control(0);
        self.entries.fill(Entry::power_on());
    }

    /// The entry, and the byte in it, at a table offset.
    fn position(&self, offset: u64) -> Option<(usize, usize)> {
        let offset = usize::try_from(offset).ok()?;
        let vector = offset / MSIX_ENTRY_BYTES;
        (vector < self.entries.len()).then_some((vector, offset % MSIX_ENTRY_BYTES))
    }

    /// Synchronises the host's route of one vector with the table.
    fn apply(&mut self, vector: usize, enabled: bool) {
        let entry = &mut self.entries[vector];
        let line = &self.lines.lines[vector];
        let number = u16::try_from(vector).expect("at most 2048 vectors");
        if !enabled || self.function_masked || entry.masked() {
            if entry.routed.take().is_some() {
                line.live.store(false, Ordering::SeqCst);
                if self.lines.vectors.disable(number).is_err() {
                    self.lines.undelivered.fetch_add(1, Ordering::Relaxed);
                }
            }
            return;
        }
        let message = entry.message();
        if entry.routed == Some(message) {
            return;
        }
        if self.lines.vectors.enable(number, message).is_err() {
            // The interrupt stays pending, and is tried again when the driver writes the entry.
            entry.routed = None;
            line.live.store(false, Ordering::SeqCst);
            self.lines.undelivered.fetch_add(1, Ordering::Relaxed);
            return;
        }
        entry.routed = Some(message);
        line.live.store(true, Ordering::SeqCst);
        self.lines.inject_pending(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MockVectors;
    use proptest::prelude::*;

    const ENABLE: u16 = CONTROL_ENABLE;
    const MASK_ALL: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;

    fn table() -> (MsixTable, Arc<MsixLines>, Arc<MockVectors>) {
        let vectors = Arc::new(MockVectors::new(3));
        let table = MsixTable::new(3, vectors.clone());
        let lines = table.lines();
        (table, lines, vectors)
    }

    fn program(table: &mut MsixTable, vector: u64, data: u32, masked: bool) {
        let at = vector * MSIX_ENTRY_BYTES as u64;
        table.write_table(at + 12, &[1, 0, 0, 0]);
        table.write_table(at, &0xfee0_1000u32.to_le_bytes());
        table.write_table(at + 4, &0u32.to_le_bytes());
        table.write_table(at + 8, &data.to_le_bytes());
        table.write_table(at + 12, &[u8::from(masked), 0, 0, 0]);
    }

    fn pending(table: &MsixTable) -> u8 {
        let mut data = [0];
        table.read_pending(0, &mut data);
        data[0]
    }

    #[test]
    fn vector_unmasked_and_enabled_is_routed_and_injected() {
        let (mut table, lines, vectors) = table();
        program(&mut table, 1, 0x41, false);
        assert_eq!(vectors.message(1), None, "MSI-X is off");
        table.set_control(ENABLE);
        assert_eq!(
            vectors.message(1),
            Some(MsiMessage {
                address: 0xfee0_1000,
                data: 0x41
            })
        );
        lines.signal(1);
        assert_eq!(vectors.triggered(1), 1);
        assert_eq!(pending(&table), 0);
    }

    #[test]
    fn vector_masked_keeps_one_interrupt_for_unmask() {
        let (mut table, lines, vectors) = table();
        table.set_control(ENABLE);
        program(&mut table, 2, 0x42, true);
        lines.signal(2);
        lines.signal(2);
        assert_eq!(vectors.triggered(2), 0);
        assert_eq!(pending(&table), 0b100);
        program(&mut table, 2, 0x42, false);
        assert_eq!(vectors.triggered(2), 1);
        assert_eq!(pending(&table), 0);
        program(&mut table, 2, 0x42, true);
        assert_eq!(vectors.message(2), None);
    }

    #[test]
    fn function_masked_keeps_interrupts_for_unmask() {
        let (mut table, lines, vectors) = table();
        program(&mut table, 0, 0x40, false);
        table.set_control(MASK_ALL);
        lines.signal(0);
        assert_eq!((vectors.triggered(0), pending(&table)), (0, 1));
        table.set_control(ENABLE);
        assert_eq!((vectors.triggered(0), pending(&table)), (1, 0));
    }

    #[test]
    fn vector_rewritten_while_unmasked_is_routed_anew() {
        let (mut table, lines, vectors) = table();
        table.set_control(ENABLE);
        program(&mut table, 0, 0x40, false);
        table.write_table(8, &0x55u32.to_le_bytes());
        assert_eq!(vectors.message(0).map(|message| message.data), Some(0x55));
        lines.signal(0);
        assert_eq!(vectors.triggered(0), 1);
    }

    #[test]
    fn msix_turned_off_drops_signals_and_routes() {
        let (mut table, lines, vectors) = table();
        table.set_control(ENABLE);
        program(&mut table, 0, 0x40, false);
        program(&mut table, 1, 0x41, true);
        lines.signal(1);
        table.set_control(0);
        lines.signal(0);
        lines.signal(u16::MAX);
        assert_eq!(vectors.message(0), None);
        assert_eq!(pending(&table), 0);
        assert_eq!(vectors.triggered(0) + vectors.triggered(1), 0);
        table.reset();
        let mut control = [0];
        table.read_table(12, &mut control);
        assert_eq!(control, [1], "masked again");
    }

    #[test]
    fn host_that_refuses_a_route_leaves_the_interrupt_pending() {
        let (mut table, lines, vectors) = table();
        table.set_control(ENABLE);
        vectors.refuse(true);
        program(&mut table, 0, 0x40, false);
        lines.signal(0);
        assert_eq!((pending(&table), lines.undelivered()), (1, 1));
        vectors.refuse(false);
        program(&mut table, 0, 0x40, false);
        assert_eq!((pending(&table), vectors.triggered(0)), (0, 1));
    }

    #[test]
    fn signal_racing_with_masking_is_never_lost() {
        let (mut table, lines, vectors) = table();
        table.set_control(ENABLE);
        program(&mut table, 0, 0x40, false);
        let signaller = {
            let lines = Arc::clone(&lines);
            std::thread::spawn(move || (0..20_000).for_each(|_| lines.signal(0)))
        };
        while !signaller.is_finished() {
            table.write_table(12, &[1]);
            table.write_table(12, &[0]);
        }
        signaller.join().unwrap();
        table.write_table(12, &[1]);
        let before = vectors.triggered(0);
        lines.signal(0);
        table.write_table(12, &[0]);
        assert_eq!(vectors.triggered(0), before + 1);
        assert_eq!(pending(&table), 0);
    }

    proptest! {
        /// Model: a vector is routed exactly when MSI-X is enabled, the function is not masked and the vector's own
        /// mask bit is clear. A signal while MSI-X is enabled is either injected once or pending.
        #[test]
        fn table_under_any_accesses_agrees_with_the_model(
            steps in prop::collection::vec(
                (0u8..5, 0u64..64, prop::collection::vec(any::<u8>(), 1..9)), 1..80)
        ) {
            let (mut table, lines, vectors) = table();
            for (what, offset, data) in steps {
                match what {
                    0 => table.set_control(u16::from(data[0]) << 8),
                    1 => lines.signal(offset as u16 % 4),
                    2 => table.reset(),
                    _ => table.write_table(offset, &data),
                }
                let mut read = vec![0; data.len()];
                table.read_table(offset, &mut read);
                table.read_pending(offset, &mut read);
                for (vector, entry) in table.entries.iter().enumerate() {
                    let open = lines.is_enabled() && !table.function_masked && !entry.masked();
                    let routed = vectors.message(vector as u16);
                    prop_assert_eq!(routed, open.then(|| entry.message()));
                    let waits = lines.lines[vector].pending.load(Ordering::SeqCst);
                    prop_assert!(!(waits && open));
                }
            }
        }
    }
}
