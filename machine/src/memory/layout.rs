//! The guest physical address map of an x86-64 machine.
//!
//! ```text
//!   0x0        boot GDT, start info, zero page, stack, command line (below 640 KiB)
//!   0xa0000    ACPI tables from here, VM generation identifier at 0xef010, SMBIOS at 0xf0000
//!   0x100000   kernel, … initramfs at the end of low RAM
//!   0xc0000000 32-bit PCI window            (RAM ends here and continues at 4 GiB)
//!   0xe8000000 ECAM          0xf8000000 KVM's own pages
//!   0xfec00000 I/O APIC      0xfee00000 local APIC
//!   4 GiB      rest of RAM
//!   …          memory that can be hot-plugged, if configured
//!   …          64-bit PCI window, then platform registers, up to the last address
//! ```
//!
//! The addresses match Cloud Hypervisor's, as existing firmware and tools expect.

use std::ops::Range;

use super::MemoryError;

/// Bytes in a KiB, MiB, GiB.
pub const KIB: u64 = 1 << 10;
/// See [`KIB`].
pub const MIB: u64 = 1 << 20;
/// See [`KIB`].
pub const GIB: u64 = 1 << 30;

/// Size of a base page, bytes.
pub const PAGE_BYTES: u64 = 4 * KIB;

/// Boot GDT.
pub const BOOT_GDT_START: u64 = 0x500;
/// Boot IDT: one empty descriptor.
pub const BOOT_IDT_START: u64 = 0x520;
/// PVH `hvm_start_info`.
pub const PVH_INFO_START: u64 = 0x6000;
/// PVH `hvm_modlist_entry`.
pub const PVH_MODLIST_START: u64 = 0x6040;
/// PVH memory map, one page.
pub const PVH_MEMMAP_START: u64 = 0x7000;
/// bzImage zero page; that protocol does not use the PVH memory map.
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Initial stack pointer.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Room for the command line with its final zero.
pub const CMDLINE_MAX_BYTES: u64 = 64 * KIB;
/// A word at this address holds the segment of the extended BIOS data area.
pub const EBDA_POINTER: u64 = 0x40e;
/// End of conventional memory in the memory map, and the extended BIOS data area.
pub const EBDA_START: u64 = 0xa_0000;
/// ACPI root pointer; the tables follow it.
pub const RSDP_START: u64 = EBDA_START;
/// First address after the ACPI tables: the page of the VM generation identifier, which has nothing else.
pub const ACPI_END: u64 = SMBIOS_START - PAGE_BYTES;
/// VM generation identifier. Linux looks for option ROMs at multiples of 2 KiB, where random bytes must not be.
pub const GENERATION_ID_START: u64 = ACPI_END + 16;
/// SMBIOS entry point and structures.
pub const SMBIOS_START: u64 = 0xf_0000;
/// Room for SMBIOS.
pub const SMBIOS_MAX_BYTES: u64 = HIGH_RAM_START - SMBIOS_START;
/// RAM above the first MiB; kernels are loaded from here on.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// 32-bit PCI window. RAM below 4 GiB ends where it starts.
pub const MEM_32BIT_DEVICES_START: u64 = 3 * GIB;
/// Size of the 32-bit PCI window.
pub const MEM_32BIT_DEVICES_BYTES: u64 = 640 * MIB;
/// ECAM, one MiB for each PCI segment.
pub const PCI_MMCONFIG_START: u64 = MEM_32BIT_DEVICES_START + MEM_32BIT_DEVICES_BYTES;
/// Room for 256 segments.
pub const PCI_MMCONFIG_BYTES: u64 = 256 * MIB;
/// ECAM of one segment with its one bus.
pub const PCI_MMIO_CONFIG_BYTES_PER_SEGMENT: u64 = MIB;
/// The start of a segment's ECAM.
pub const fn pci_mmconfig(segment: u16) -> u64 {
    PCI_MMCONFIG_START + segment as u64 * PCI_MMIO_CONFIG_BYTES_PER_SEGMENT
}
/// KVM's real mode task state segment, three pages.
pub const KVM_TSS_START: u64 = 0xf800_0000;
/// KVM's real mode page table, one page.
pub const KVM_IDENTITY_MAP_START: u64 = KVM_TSS_START + 3 * PAGE_BYTES;
/// I/O APIC registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Size of the I/O APIC's registers.
pub const IOAPIC_BYTES: u64 = PAGE_BYTES;
/// Local APIC registers.
pub const APIC_START: u64 = 0xfee0_0000;
/// RAM that did not fit below [`MEM_32BIT_DEVICES_START`].
pub const RAM_64BIT_START: u64 = 4 * GIB;

/// Size of the registers of the platform's own devices, at the end of the address space.
pub const PLATFORM_DEVICE_AREA_BYTES: u64 = MIB;
/// The last bytes of the address space stay free: some guests cannot address them.
const TOP_RESERVED_BYTES: u64 = 64 * KIB;
/// A memory section of Linux on x86-64, the smallest unit of memory hot-plug. The area after RAM is aligned to it.
pub const SECTION_BYTES: u64 = 128 * MIB;
/// The minimum size of the 64-bit window: 2048 devices of 512 KiB, more than the buses have slots for.
const DEVICE_AREA_MIN_BYTES: u64 = GIB;

/// The minimum RAM: the first MiB with the boot structures and one for a payload.
pub const MIN_RAM_BYTES: u64 = 2 * MIB;
/// The minimum physical address width for this map.
const PHYS_BITS_MIN: u8 = 33;
/// The widest physical address of an x86-64 processor.
pub const PHYS_BITS_MAX: u8 = 52;

const _: () = {
    assert!(BOOT_GDT_START + 4 * 8 <= BOOT_IDT_START);
    assert!(PVH_INFO_START + 56 <= PVH_MODLIST_START);
    assert!(PVH_MODLIST_START + 32 <= PVH_MEMMAP_START);
    assert!(PVH_MEMMAP_START + PAGE_BYTES <= BOOT_STACK_POINTER);
    assert!(CMDLINE_START + CMDLINE_MAX_BYTES <= EBDA_START);
    assert!(RSDP_START < ACPI_END && SMBIOS_START < HIGH_RAM_START);
    assert!(PCI_MMCONFIG_START == 0xe800_0000);
    assert!(PCI_MMCONFIG_START + PCI_MMCONFIG_BYTES <= KVM_TSS_START);
    assert!(KVM_IDENTITY_MAP_START + PAGE_BYTES <= IOAPIC_START);
    assert!(APIC_START + PAGE_BYTES <= RAM_64BIT_START);
    assert!(MIN_RAM_BYTES > HIGH_RAM_START);
};

/// The address map of one machine's RAM and device areas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressMap {
    /// RAM from 0, and the rest from 4 GiB if there is any.
    pub ram: Vec<Range<u64>>,
    /// The range for memory hot-plug; empty if not configured.
    pub hotplug: Range<u64>,
    /// 64-bit PCI window.
    pub devices_64bit: Range<u64>,
    /// Registers of the platform's own devices.
    pub platform_devices: Range<u64>,
}

impl AddressMap {
    /// Lays out `ram_bytes` of RAM in `phys_bits` of physical address.
    ///
    /// # Errors
    /// [`MemoryError::TooSmall`], [`MemoryError::NotPageMultiple`],
    /// [`MemoryError::AddressSpace`].
    pub fn new(ram_bytes: u64, phys_bits: u8) -> Result<Self, MemoryError> {
        if ram_bytes < MIN_RAM_BYTES {
            return Err(MemoryError::TooSmall {
                bytes: ram_bytes,
                min_bytes: MIN_RAM_BYTES,
            });
        }
        if !ram_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::NotPageMultiple {
                bytes: ram_bytes,
                page_bytes: PAGE_BYTES,
            });
        }
        let no_room = MemoryError::AddressSpace {
            bytes: ram_bytes,
            phys_bits,
        };
        let Some(platform_devices) = platform_devices(phys_bits) else {
            return Err(no_room);
        };
        let low_bytes = ram_bytes.min(MEM_32BIT_DEVICES_START);
        let high_bytes = ram_bytes - low_bytes;
        let devices_start = RAM_64BIT_START
            .checked_add(high_bytes)
            .and_then(|end| end.checked_next_multiple_of(SECTION_BYTES));
        let Some(devices_start) =
            devices_start.filter(|start| start + DEVICE_AREA_MIN_BYTES <= platform_devices.start)
        else {
            return Err(no_room);
        };
        let low = 0..low_bytes;
        let high = RAM_64BIT_START..RAM_64BIT_START + high_bytes;
        Ok(Self {
            ram: [low, high]
                .into_iter()
                .filter(|range| !range.is_empty())
                .collect(),
            hotplug: devices_start..devices_start,
            devices_64bit: devices_start..platform_devices.start,
            platform_devices,
        })
    }

    /// The same map with space for `bytes` more of memory after RAM, aligned to `align_bytes`, a power of two. They are
    /// the last in [`AddressMap::hotplug`]. `phys_bits` is the width that the map was created with.
    ///
    /// # Errors
    /// [`MemoryError::AddressSpace`].
    pub fn with_hotplug(
        self,
        bytes: u64,
        align_bytes: u64,
        phys_bits: u8,
    ) -> Result<Self, MemoryError> {
        let start = self.devices_64bit.start;
        let align_bytes = align_bytes.max(SECTION_BYTES);
        let hotplug = start.checked_next_multiple_of(align_bytes);
        let hotplug = hotplug.and_then(|start| Some(start..start.checked_add(bytes)?));
        let devices_start = |it: &Range<u64>| it.end.checked_next_multiple_of(SECTION_BYTES);
        let devices_end = self.devices_64bit.end;
        let fits = |start: &u64| *start <= devices_end.saturating_sub(DEVICE_AREA_MIN_BYTES);
        match hotplug.as_ref().and_then(devices_start).filter(fits) {
            Some(devices_start) => Ok(Self {
                hotplug: match (hotplug.expect("the devices are behind it"), &self.hotplug) {
                    (first, before) if before.is_empty() => first,
                    (next, before) => before.start..next.end,
                },
                devices_64bit: devices_start..devices_end,
                ..self
            }),
            None => Err(MemoryError::AddressSpace {
                bytes: self.ram_bytes().saturating_add(bytes),
                phys_bits,
            }),
        }
    }

    /// The same RAM, with the devices after it placed within `phys_bits` of physical address.
    ///
    /// # Errors
    /// [`MemoryError::AddressSpace`].
    pub fn narrowed(self, phys_bits: u8) -> Result<Self, MemoryError> {
        let start = self.devices_64bit.start;
        let fits = |platform: &Range<u64>| start + DEVICE_AREA_MIN_BYTES <= platform.start;
        match platform_devices(phys_bits).filter(fits) {
            Some(platform_devices) => Ok(Self {
                devices_64bit: start..platform_devices.start,
                platform_devices,
                ..self
            }),
            None => Err(MemoryError::AddressSpace {
                bytes: self.ram_bytes() + (self.hotplug.end - self.hotplug.start),
                phys_bits,
            }),
        }
    }

    fn ram_bytes(&self) -> u64 {
        self.ram.iter().map(|range| range.end - range.start).sum()
    }

    /// First address after low RAM.
    pub fn low_ram_end(&self) -> u64 {
        self.ram[0].end
    }
}

/// The addresses of the platform's own devices in `phys_bits` of physical address; `None` if there is no room.
fn platform_devices(phys_bits: u8) -> Option<Range<u64>> {
    if !(PHYS_BITS_MIN..=PHYS_BITS_MAX).contains(&phys_bits) {
        return None;
    }
    let end = (1 << phys_bits) - TOP_RESERVED_BYTES;
    Some(end - PLATFORM_DEVICE_AREA_BYTES..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_narrowed_is_the_map_that_is_made_narrow() {
        for ram_bytes in [512 * MIB, 6 * GIB] {
            let wide = AddressMap::new(ram_bytes, 46).unwrap();
            let narrow = AddressMap::new(ram_bytes, 36).unwrap();
            assert_eq!(wide.clone().narrowed(36).unwrap(), narrow);
            assert!(wide.clone().narrowed(32).is_err());
            let with_hotplug = |map: AddressMap, bits| map.with_hotplug(8 * GIB, GIB, bits);
            let wide = with_hotplug(wide, 46).unwrap();
            let narrow = with_hotplug(narrow, 36).unwrap();
            assert_eq!(wide.clone().narrowed(36).unwrap(), narrow);
            assert!(matches!(
                wide.narrowed(33),
                Err(MemoryError::AddressSpace { bytes, phys_bits: 33 }) if bytes == ram_bytes + 8 * GIB
            ));
        }
    }

    #[test]
    fn map_small_ram_is_one_range() {
        let map = AddressMap::new(512 * MIB, 46).unwrap();
        assert_eq!(map.ram, std::slice::from_ref(&(0..512 * MIB)));
        assert_eq!(map.devices_64bit.start, RAM_64BIT_START);
        assert_eq!(map.platform_devices.end, (1 << 46) - 64 * KIB);
        assert_eq!(map.platform_devices.end - map.platform_devices.start, MIB);
        assert_eq!(map.devices_64bit.end, map.platform_devices.start);
    }

    #[test]
    fn map_three_gib_is_still_one_range() {
        let map = AddressMap::new(3 * GIB, 46).unwrap();
        assert_eq!(map.ram, std::slice::from_ref(&(0..3 * GIB)));
    }

    #[test]
    fn map_large_ram_goes_around_the_hole() {
        let map = AddressMap::new(6 * GIB + PAGE_BYTES, 46).unwrap();
        assert_eq!(map.ram, [0..3 * GIB, 4 * GIB..7 * GIB + PAGE_BYTES]);
        assert_eq!(map.devices_64bit.start, 7 * GIB + 128 * MIB);
        assert_eq!(map.low_ram_end(), 3 * GIB);
    }

    #[test]
    fn map_bad_sizes_are_told_apart() {
        assert!(matches!(
            AddressMap::new(0, 46),
            Err(MemoryError::TooSmall { bytes: 0, .. })
        ));
        assert!(matches!(
            AddressMap::new(64 * MIB + 1, 46),
            Err(MemoryError::NotPageMultiple { .. })
        ));
        for bytes in [1 << 46, 1 << 62, !(PAGE_BYTES - 1)] {
            assert!(matches!(
                AddressMap::new(bytes, 46),
                Err(MemoryError::AddressSpace { phys_bits: 46, .. })
            ));
        }
    }

    #[test]
    fn map_narrow_address_space_is_refused() {
        for phys_bits in [0, 32, 53, 255] {
            assert!(AddressMap::new(64 * MIB, phys_bits).is_err());
        }
        assert!(AddressMap::new(8 * GIB, 33).is_err());
        assert!(AddressMap::new(8 * GIB, 36).is_ok());
    }
}
