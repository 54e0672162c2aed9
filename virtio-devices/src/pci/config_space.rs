//! The configuration space of one function (PCI 3.0 §6): a type 0 header with memory BARs, a capability list, and a
//! write mask.
//!
//! Only fields that a driver may change are writable. All others ignore writes, so a guest may write any value at any
//! width.

use serde::{Deserialize, Serialize};
use state::{Bytes, Part, State, StateError, parts, require};

const PART: Part = parts::PCI_CONFIG;

/// Bytes of conventional configuration space. Our functions have no PCI Express capability; the extended space after it
/// reads as zero, "no capabilities".
const SPACE_BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE_SIZE: usize = 0x0c;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: u8 = 0x40;

/// Command register: the function responds at its memory BARs.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may send MSIs and read memory.
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: INTx is off. Our functions have no INTx, but drivers read back what they wrote.
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// BAR type bits of a 64-bit memory BAR, not prefetchable.
const BAR_MEMORY_64: u32 = 0b100;

/// Number of BAR registers in a type 0 header.
const BAR_REGISTERS: u8 = 6;

/// The identity of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Base class.
    pub class: u8,
    /// Subclass.
    pub subclass: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// The bytes, and the mask of bits that a driver may change.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SPACE_BYTES],
    writable: [u8; SPACE_BYTES],
    next_capability: u8,
    last_capability: Option<u8>,
}

/// The saved state of conventional configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciConfigState {
    /// All bytes of the space.
    pub bytes: Bytes,
}

impl State for PciConfigState {
    const PART: Part = PART;
}

impl ConfigSpace {
    /// The current content.
    pub fn state(&self) -> PciConfigState {
        PciConfigState {
            bytes: Bytes(self.bytes.to_vec()),
        }
    }

    /// Restores the fields that a driver may change. The other fields identify the function and must be equal.
    ///
    /// # Errors
    /// The state belongs to another function; nothing is changed then.
    pub fn restore(&mut self, state: &PciConfigState) -> Result<(), StateError> {
        let bytes = &state.bytes.0;
        require(bytes.len() == SPACE_BYTES, PART, "bytes", || {
            format!("has {} bytes instead of {SPACE_BYTES}", bytes.len())
        })?;
        let other =
            (0..SPACE_BYTES).find(|&at| (bytes[at] ^ self.bytes[at]) & !self.writable[at] != 0);
        if let Some(at) = other {
            let reason = format!("differs at {at:#x}: it is of another function");
            return Err(StateError::invalid(PART, "bytes", reason));
        }
        self.bytes.copy_from_slice(bytes);
        Ok(())
    }

    /// A header without BARs and capabilities; decoding is off, as at power-on.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SPACE_BYTES],
            writable: [0; SPACE_BYTES],
            next_capability: FIRST_CAPABILITY,
            last_capability: None,
        };
        space.bytes[0..2].copy_from_slice(&identity.vendor.to_le_bytes());
        space.bytes[2..4].copy_from_slice(&identity.device.to_le_bytes());
        space.bytes[8] = identity.revision;
        space.bytes[10] = identity.subclass;
        space.bytes[11] = identity.class;
        space.bytes[SUBSYSTEM..SUBSYSTEM + 2]
            .copy_from_slice(&identity.subsystem_vendor.to_le_bytes());
        space.bytes[SUBSYSTEM + 2..SUBSYSTEM + 4]
            .copy_from_slice(&identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        space.writable[CACHE_LINE_SIZE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Adds a 64-bit memory BAR in registers `index` and `index + 1`.
    ///
    /// # Panics
    /// `size_bytes` is not a power of two of at least 16, or the two registers do not exist: errors of the caller,
    /// never of a guest.
    pub fn add_memory_bar_64(&mut self, index: u8, size_bytes: u64) {
        assert!(size_bytes.is_power_of_two() && size_bytes >= 16);
        assert!(index + 1 < BAR_REGISTERS);
        let at = bar_register(index);
        // Address bits below the size are hard-wired to zero: a driver determines the size by writing all ones and
        // reading back.
        let address_bits = !(size_bytes - 1);
        self.bytes[at..at + 8].copy_from_slice(&u64::from(BAR_MEMORY_64).to_le_bytes());
        self.writable[at..at + 8].copy_from_slice(&address_bits.to_le_bytes());
    }

    /// Adds a 32-bit memory BAR in register `index`. The following register must not be a BAR.
    ///
    /// # Panics
    /// `size_bytes` is not a power of two from 16 to 2 GiB, or the register does not exist: errors of the caller, never
    /// of a guest.
    pub fn add_memory_bar_32(&mut self, index: u8, size_bytes: u32) {
        assert!(size_bytes.is_power_of_two() && size_bytes >= 16);
        assert!(index + 1 < BAR_REGISTERS);
        let at = bar_register(index);
        let address_bits = !(size_bytes - 1);
        self.writable[at..at + 4].copy_from_slice(&address_bits.to_le_bytes());
    }

    /// The address programmed into a BAR.
    pub fn bar_address(&self, index: u8) -> u64 {
        let at = bar_register(index);
        let writable = le_u64(&self.writable[at..at + 8]);
        le_u64(&self.bytes[at..at + 8]) & writable
    }

    /// Programs a BAR; bits below its size are dropped.
    pub fn set_bar_address(&mut self, index: u8, address: u64) {
        let at = bar_register(index);
        self.write_masked(at, &address.to_le_bytes());
    }

    /// Whether memory decoding is on.
    pub fn memory_decoded(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY.to_le_bytes()[0] != 0
    }

    /// Whether the function may access memory.
    pub fn is_bus_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_BUS_MASTER.to_le_bytes()[0] != 0
    }

    /// Clears the command register, as a reset does. BAR addresses are kept.
    pub fn reset_command(&mut self) {
        self.bytes[COMMAND..COMMAND + 2].fill(0);
    }

    /// Appends a capability: `body` follows the id and the next pointer; `writable` is the mask of bits that a driver
    /// may change (if shorter, the rest is read-only). Returns the offset of the capability.
    ///
    /// # Panics
    /// The space is full: an error of the caller, never of a guest.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let at = self.next_capability;
        let start = usize::from(at);
        let body_start = start + 2;
        self.bytes[start] = id;
        self.bytes[body_start..body_start + body.len()].copy_from_slice(body);
        self.writable[body_start..body_start + writable.len()].copy_from_slice(writable);

        match self.last_capability {
            Some(last) => self.bytes[usize::from(last) + 1] = at,
            None => {
                self.bytes[CAPABILITY_POINTER] = at;
                self.bytes[STATUS] |= STATUS_CAPABILITIES.to_le_bytes()[0];
            }
        }
        self.last_capability = Some(at);
        let end = (body_start + body.len()).next_multiple_of(4);
        self.next_capability = u8::try_from(end).expect("capabilities fit into 256 bytes");
        at
    }

    /// Reads bytes; bytes after the end are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let start = usize::from(offset).min(SPACE_BYTES);
        let count = data.len().min(SPACE_BYTES - start);
        data[..count].copy_from_slice(&self.bytes[start..start + count]);
    }

    /// Writes `data` where bits are writable.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let start = usize::from(offset).min(SPACE_BYTES);
        let count = data.len().min(SPACE_BYTES - start);
        self.write_masked(start, &data[..count]);
    }

    fn write_masked(&mut self, start: usize, data: &[u8]) {
        for (at, value) in (start..).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
    }
}

fn bar_register(index: u8) -> usize {
    BAR0 + 4 * usize::from(index)
}

fn le_u64(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 512 << 10;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1045,
            revision: 1,
            class: 0xff,
            subclass: 0xfe,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1145,
        });
        space.add_memory_bar_64(0, SIZE);
        space
    }

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn header_of_new_function_tells_its_identity() {
        let space = space();
        assert_eq!(dword(&space, 0), 0x1045_1af4);
        assert_eq!(dword(&space, 8), 0xfffe_0001);
        assert_eq!(dword(&space, 0x2c), 0x1145_1af4);
        assert_eq!(dword(&space, 0xc) >> 16, 0, "type 0, one function");
        assert!(!space.memory_decoded());
    }

    #[test]
    fn header_written_with_ones_changes_only_writable_bits() {
        let mut space = space();
        space.write(0, &[0xff; 16]);
        assert_eq!(dword(&space, 0), 0x1045_1af4);
        assert_eq!(dword(&space, 4), 0x0406);
        assert_eq!(dword(&space, 8), 0xfffe_0001);
        assert!(space.memory_decoded());
        space.reset_command();
        assert!(!space.memory_decoded());
    }

    #[test]
    fn bar_sized_by_a_driver_answers_its_size() {
        let mut space = space();
        space.set_bar_address(0, 0x12_3408_0000);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(dword(&space, 0x10), !(SIZE as u32 - 1) | BAR_MEMORY_64);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&space, 0x14), u32::MAX);
        assert_eq!(dword(&space, 0x18), 0, "no further BAR");

        space.write(0x10, &0x3408_0000u32.to_le_bytes());
        space.write(0x14, &0x12u32.to_le_bytes());
        assert_eq!(space.bar_address(0), 0x12_3408_0000);
    }

    #[test]
    fn capabilities_are_linked_in_order() {
        let mut space = space();
        let first = space.add_capability(9, &[7; 5], &[]);
        let second = space.add_capability(0x11, &[1, 2], &[0, 0xff]);
        assert_eq!(dword(&space, 0x34), u32::from(first));
        assert_eq!(
            dword(&space, u16::from(first)) & 0xffff,
            u32::from(second) << 8 | 9
        );
        assert_eq!(dword(&space, u16::from(second)), 0x0201_0011);
        assert_eq!(dword(&space, 4) >> 16, 0x10);
        space.write(u16::from(second), &[0xff; 4]);
        assert_eq!(dword(&space, u16::from(second)), 0xff01_0011);
    }

    proptest! {
        #[test]
        fn space_written_anywhere_keeps_read_only_bits(
            writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let mut space = space();
            space.add_capability(0x11, &[1, 2], &[0, 0xf0]);
            let before = space.bytes;
            for (offset, data) in &writes {
                space.write(*offset, data);
                let mut read = vec![0xaa; data.len()];
                space.read(*offset, &mut read);
            }
            for (at, byte) in before.iter().enumerate() {
                prop_assert_eq!(space.bytes[at] & !space.writable[at], byte & !space.writable[at]);
            }
        }
    }
}
