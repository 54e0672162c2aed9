//! The memory map for the guest: RAM and reserved ranges.

use super::layout::{
    AddressMap, EBDA_START, HIGH_RAM_START, PCI_MMCONFIG_BYTES, PCI_MMCONFIG_START,
};

/// The type of a range (ACPI 6.5 §15, table 15.4; the PVH map uses the same numbers).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable memory.
    Ram = 1,
    /// Neither memory nor free for devices.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// Guest physical address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// The type of the range.
    pub kind: E820Kind,
}

/// The memory map, in ascending order. The backed range from 640 KiB to 1 MiB, which holds ACPI and SMBIOS tables, is
/// omitted because the guest must not use it as RAM.
pub fn e820_map(map: &AddressMap) -> Vec<E820Entry> {
    let ram = |start, end| E820Entry {
        start,
        bytes: end - start,
        kind: E820Kind::Ram,
    };
    let mut entries = vec![
        ram(0, EBDA_START),
        ram(HIGH_RAM_START, map.low_ram_end()),
        E820Entry {
            start: PCI_MMCONFIG_START,
            bytes: PCI_MMCONFIG_BYTES,
            kind: E820Kind::Reserved,
        },
    ];
    entries.extend(
        map.ram
            .iter()
            .skip(1)
            .map(|range| ram(range.start, range.end)),
    );
    entries
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::{GIB, MIB};

    fn ram_bytes(entries: &[E820Entry]) -> u64 {
        entries
            .iter()
            .filter(|entry| entry.kind == E820Kind::Ram)
            .map(|entry| entry.bytes)
            .sum()
    }

    #[test]
    fn e820_is_ascending_and_holds_all_ram_but_the_legacy_hole() {
        for bytes in [2 * MIB, 512 * MIB, 3 * GIB, 5 * GIB] {
            let entries = e820_map(&AddressMap::new(bytes, 46).unwrap());
            assert!(
                entries
                    .windows(2)
                    .all(|pair| pair[0].start + pair[0].bytes <= pair[1].start)
            );
            assert_eq!(ram_bytes(&entries), bytes - (HIGH_RAM_START - EBDA_START));
        }
    }

    #[test]
    fn e820_large_ram_has_a_part_above_4_gib() {
        let entries = e820_map(&AddressMap::new(4 * GIB, 46).unwrap());
        assert_eq!(
            entries.last(),
            Some(&E820Entry {
                start: 4 * GIB,
                bytes: GIB,
                kind: E820Kind::Ram
            })
        );
    }
}
