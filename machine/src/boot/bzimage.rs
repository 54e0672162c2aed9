//! Linux bzImages, entered by the 32-bit boot protocol (Documentation/arch/x86/boot.rst).
//!
//! A bzImage unpacks itself. In addition to the file, it needs `init_size` bytes from the address at which it will run.
//! If the image is relocatable and was loaded higher than its preferred address, it runs at its load address;
//! otherwise, at its preferred address.

use std::ops::Range;

use linux_loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::image::Image;
use super::loaded::LoadedImage;
use super::{BootError, BootProtocol, EntryPoint};
use crate::memory::layout::HIGH_RAM_START;

const SETUP_HEADER_OFFSET: u64 = 0x1f1;
/// Protocol 2.10 (Linux 2.6.31) introduced `pref_address` and `init_size`.
const PROTOCOL_MIN: u16 = 0x020a;
/// `loadflags`: the protected mode code belongs at 1 MiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: kernel, command line and initramfs may lie anywhere.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// `setup_sects` of ancient kernels that leave it zero.
const SETUP_SECTS_DEFAULT: u64 = 4;
const SECTOR_BYTES: u64 = 512;
/// The unit of `syssize`.
const PARAGRAPH_BYTES: u64 = 16;

/// Loads the image into `usable` RAM.
pub(super) fn load(
    image: &mut Image,
    ram: &GuestMemoryMmap<()>,
    usable: &Range<u64>,
) -> Result<LoadedImage, BootError> {
    let mut header = setup_header::default();
    image.read_at(SETUP_HEADER_OFFSET, header.as_mut_slice())?;
    let version = header.version;
    if version < PROTOCOL_MIN || header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::BzImageProtocol {
            path: image.path.clone(),
            version,
        });
    }
    let setup_bytes = setup_bytes(&header);
    image.require(setup_bytes, u64::from(header.syssize) * PARAGRAPH_BYTES)?;
    let code_bytes = image.bytes - setup_bytes;
    let end = end_of_use(&header, code_bytes);
    image.require_ram(u64::from(header.code32_start), end, usable)?;

    let loaded = BzImage::load(
        ram,
        None,
        &mut image.file,
        Some(vm_memory::GuestAddress(HIGH_RAM_START)),
    )
    .map_err(|source| image.load_error(source))?;
    Ok(LoadedImage {
        entry: EntryPoint {
            protocol: BootProtocol::Linux32,
            address: loaded.kernel_load.0,
        },
        end,
        initramfs_end_max: initramfs_end_max(&header),
        setup_header: Some(header),
    })
}

/// Boot sector and real mode code at the start of the file, which are not executed.
fn setup_bytes(header: &setup_header) -> u64 {
    let sectors = match u64::from(header.setup_sects) {
        0 => SETUP_SECTS_DEFAULT,
        sectors => sectors,
    };
    (sectors + 1) * SECTOR_BYTES
}

/// First address that neither the image nor the unpacking kernel uses.
fn end_of_use(header: &setup_header, code_bytes: u64) -> u64 {
    let load = u64::from(header.code32_start);
    let preferred = header.pref_address;
    let runs_at = if header.relocatable_kernel != 0 && load > preferred {
        let alignment = u64::from(header.kernel_alignment).max(1);
        load.checked_next_multiple_of(alignment).unwrap_or(u64::MAX)
    } else {
        preferred
    };
    let unpacked_end = runs_at.saturating_add(u64::from(header.init_size));
    unpacked_end.max(load.saturating_add(code_bytes))
}

fn initramfs_end_max(header: &setup_header) -> u64 {
    let flags = header.xloadflags;
    if flags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 {
        u64::MAX
    } else {
        u64::from(header.initrd_addr_max) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout::MIB;

    fn header() -> setup_header {
        setup_header {
            code32_start: MIB as u32,
            pref_address: 16 * MIB,
            init_size: 40 * MIB as u32,
            kernel_alignment: 2 * MIB as u32,
            relocatable_kernel: 1,
            ..Default::default()
        }
    }

    #[test]
    fn end_counts_the_unpacked_kernel_at_its_preferred_address() {
        assert_eq!(end_of_use(&header(), 12 * MIB), 56 * MIB);
    }

    #[test]
    fn end_counts_from_where_a_movable_kernel_was_loaded() {
        let header = setup_header {
            code32_start: (32 * MIB + 1) as u32,
            ..header()
        };
        assert_eq!(end_of_use(&header, MIB), 34 * MIB + 40 * MIB);
    }

    #[test]
    fn end_counts_an_image_that_is_larger_than_it_unpacks() {
        assert_eq!(end_of_use(&header(), 100 * MIB), 101 * MIB);
    }

    #[test]
    fn end_of_hostile_header_saturates() {
        let header = setup_header {
            pref_address: u64::MAX,
            ..header()
        };
        assert_eq!(end_of_use(&header, MIB), u64::MAX);
    }

    #[test]
    fn initramfs_limit_is_lifted_for_kernels_that_can_reach_it() {
        let mut header = setup_header {
            initrd_addr_max: 0x7fff_ffff,
            ..header()
        };
        assert_eq!(initramfs_end_max(&header), 0x8000_0000);
        header.xloadflags = XLF_CAN_BE_LOADED_ABOVE_4G;
        assert_eq!(initramfs_end_max(&header), u64::MAX);
    }
}
