//! VFIO's calls for the IOMMU of a container. The crate vfio-ioctls supports neither read-only mappings nor the
//! properties of the IOMMU.
#![allow(unsafe_code)]
// UNSAFETY: gives guest RAM to devices, and calls the kernel.

use std::io;
use std::mem::{offset_of, size_of};
use std::ops::RangeInclusive;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_TYPE, vfio_info_cap_header,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info, vfio_iova_range,
};
use vfio_ioctls::VfioContainer;
use vm_memory::{Permissions, VolatileSlice};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE as u32, VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE as u32, VFIO_BASE + 14);

/// The unit in which guests map memory.
pub(super) const PAGE_BYTES: u64 = 4096;
/// Maximum size of the properties. The kernel needs some hundred bytes.
const INFO_BYTES_MAX: usize = 64 << 10;

/// The properties of an IOMMU.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IommuInfo {
    /// Sizes of pages, one bit each.
    pub(super) page_sizes: u64,
    /// Input addresses that can be mapped, ascending.
    pub(super) usable: Vec<RangeInclusive<u64>>,
}

impl IommuInfo {
    /// Reads what the kernel has written. A kernel that names no ranges can map every address.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let flags = u32_at(bytes, offset_of!(vfio_iommu_type1_info, flags)).unwrap_or(0);
        let page_sizes = u64_at(bytes, offset_of!(vfio_iommu_type1_info, iova_pgsizes));
        let page_sizes = page_sizes.filter(|_| flags & VFIO_IOMMU_INFO_PGSIZES != 0);
        let first = u32_at(bytes, offset_of!(vfio_iommu_type1_info, cap_offset));
        let first = first.filter(|_| flags & VFIO_IOMMU_INFO_CAPS != 0);
        let ranges = iova_ranges(bytes, first.unwrap_or(0));
        Self {
            page_sizes: page_sizes.unwrap_or(PAGE_BYTES),
            usable: ranges.unwrap_or_else(|| vec![0..=u64::MAX]),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let number = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*number))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let number = bytes.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*number))
}

/// The ranges in the list of capabilities whose first element is at offset `at`.
fn iova_ranges(bytes: &[u8], at: u32) -> Option<Vec<RangeInclusive<u64>>> {
    let mut at = at as usize;
    // Offsets ascend in a sound list; another one ends.
    while at >= size_of::<vfio_iommu_type1_info>() {
        let id = u32_at(bytes, at)? & u32::from(u16::MAX);
        if id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            let count_at = at + size_of::<vfio_info_cap_header>();
            let count = u32_at(bytes, count_at)? as usize;
            let ranges = bytes.get(count_at + 8..)?;
            let ranges = ranges
                .chunks_exact(size_of::<vfio_iova_range>())
                .take(count);
            let ranges = ranges.filter_map(|it| Some(u64_at(it, 0)?..=u64_at(it, 8)?));
            let mut ranges: Vec<_> = ranges.filter(|it| !it.is_empty()).collect();
            ranges.sort_by_key(|it| *it.start());
            return Some(ranges);
        }
        let next = u32_at(bytes, at + offset_of!(vfio_info_cap_header, next))? as usize;
        at = if next > at { next } else { 0 };
    }
    None
}

/// The properties of the container's IOMMU. The container has a device.
///
/// # Errors
/// The kernel does not answer.
pub(super) fn read_info(vfio: &VfioContainer) -> io::Result<IommuInfo> {
    let mut bytes = size_of::<vfio_iommu_type1_info>();
    loop {
        // Eight bytes each, so that it is aligned.
        let mut buffer = vec![0_u64; bytes.div_ceil(8)];
        let head = vfio_iommu_type1_info {
            argsz: bytes as u32,
            ..Default::default()
        };
        let place = buffer.as_mut_ptr().cast::<vfio_iommu_type1_info>();
        // SAFETY: the buffer is at least as large as the structure, and aligned for it.
        unsafe { place.write(head) };
        // SAFETY: the kernel writes at most `argsz` bytes, which the buffer has.
        let done = unsafe { ioctl_with_mut_ptr(vfio, VFIO_IOMMU_GET_INFO(), place) };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        let read: Vec<u8> = buffer.iter().flat_map(|it| it.to_ne_bytes()).collect();
        // The size that the kernel needs for all of it.
        let needed = u32_at(&read, 0).unwrap_or(0) as usize;
        if needed <= bytes || needed > INFO_BYTES_MAX {
            return Ok(IommuInfo::parse(&read));
        }
        bytes = needed;
    }
}

/// Gives the devices of the container access to `memory` from the input address `input` on, and pins it. It is guest RAM,
/// which the machine unmaps after its devices have gone.
///
/// # Errors
/// The IOMMU rejects it, or a limit does.
pub(super) fn map(
    vfio: &VfioContainer,
    input: u64,
    memory: &VolatileSlice<'_>,
    allows: Permissions,
) -> io::Result<()> {
    let mut flags = 0;
    if allows.allow(Permissions::Read) {
        flags |= VFIO_DMA_MAP_FLAG_READ;
    }
    if allows.has_write() {
        flags |= VFIO_DMA_MAP_FLAG_WRITE;
    }
    let guard = memory.ptr_guard_mut();
    if !allows.has_write() {
        // Kernels before 6.2 would pin the page of zeros, and give the guest another page when it writes. It fails
        // on kernels before 5.14, and then the guest must have written before.
        populate(memory).ok();
    }
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
        flags,
        vaddr: guard.as_ptr() as u64,
        iova: input,
        size: memory.len() as u64,
    };
    with_pages(memory, || {
        // SAFETY: guest RAM is accessed through raw pointers and volatile accesses only, because vCPUs change it at any
        // time, too. The machine drops its devices before RAM.
        match unsafe { ioctl_with_ref(vfio, VFIO_IOMMU_MAP_DMA(), &map) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })
}

/// Calls `map`, and a second time if pages of `memory` are missing: the kernel does not wait for the thread that fills
/// in restored memory (userfaultfd) while it pins, and returns EFAULT.
fn with_pages(memory: &VolatileSlice<'_>, map: impl Fn() -> io::Result<()>) -> io::Result<()> {
    match map() {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
            // The first error is more informative than that of a kernel that cannot populate.
            populate(memory).map_err(|_| error)?;
            map()
        }
        mapped => mapped,
    }
}

/// Makes guest RAM resident and writable, and waits for what has to be filled in.
///
/// # Errors
/// The kernel is older than 5.14, or cannot provide a page.
fn populate(memory: &VolatileSlice<'_>) -> io::Result<()> {
    let (guard, advice) = (memory.ptr_guard_mut(), libc::MADV_POPULATE_WRITE);
    // SAFETY: makes guest RAM resident, and changes no content.
    match unsafe { libc::madvise(guard.as_ptr().cast(), memory.len(), advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Undoes the mappings from `input` to `input + bytes`, none of which is only partly inside.
///
/// # Errors
/// The IOMMU fails; the devices may still have access.
pub(super) fn unmap(vfio: &VfioContainer, input: u64, bytes: u64) -> io::Result<()> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
        iova: input,
        size: bytes,
        ..Default::default()
    };
    // SAFETY: takes memory away from a device; the kernel writes only to the structure.
    match unsafe { ioctl_with_mut_ref(vfio, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) } {
        0 if unmap.size == bytes => Ok(()),
        0 => Err(io::Error::other(format!("only {:#x} bytes", unmap.size))),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use vm_memory::{MmapRegion, VolatileMemory};

    use super::*;

    /// Properties with these flags and capabilities: the number, and what follows the header.
    fn info(flags: u32, capabilities: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(0x4020_1000_u64.to_ne_bytes());
        bytes.extend(24_u32.to_ne_bytes());
        bytes.extend([0; 4]);
        for (at, (id, body)) in capabilities.iter().enumerate() {
            let next = bytes.len() + 8 + body.len();
            let next = if at + 1 < capabilities.len() { next } else { 0 };
            bytes.extend(id.to_ne_bytes());
            bytes.extend(1_u16.to_ne_bytes());
            bytes.extend((next as u32).to_ne_bytes());
            bytes.extend(body);
        }
        bytes
    }

    fn ranges(count: u32, ranges: &[(u64, u64)]) -> Vec<u8> {
        let mut body = count.to_ne_bytes().to_vec();
        body.extend([0; 4]);
        for (start, end) in ranges {
            body.extend(start.to_ne_bytes());
            body.extend(end.to_ne_bytes());
        }
        body
    }

    #[test]
    fn properties_have_the_ranges_that_can_be_mapped() {
        let both = [(0xfef0_0000, (1 << 39) - 1), (0, 0xfedf_ffff)];
        let bytes = info(3, &[(3, vec![0; 8]), (1, ranges(2, &both))]);
        let expected = IommuInfo {
            page_sizes: 0x4020_1000,
            usable: vec![0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1],
        };
        assert_eq!(IommuInfo::parse(&bytes), expected);
        // Without flags, nothing behind them counts.
        let without = IommuInfo::parse(&info(0, &[(1, ranges(1, &both))]));
        assert_eq!(
            (without.page_sizes, without.usable),
            (4096, vec![0..=u64::MAX])
        );
    }

    #[test]
    fn damaged_properties_do_no_harm() {
        let whole = info(3, &[(3, vec![0; 8]), (1, ranges(2, &[(0, 0xfff), (7, 3)]))]);
        for end in 0..whole.len() {
            IommuInfo::parse(&whole[..end]);
        }
        // More ranges than there are, and one that is empty.
        let many = info(3, &[(1, ranges(u32::MAX, &[(0, 0xfff), (7, 3)]))]);
        assert_eq!(IommuInfo::parse(&many).usable, [0..=0xfff]);
        // A list that leads to itself, and one that leads outside.
        for next in [24_u32, 8, 4000, u32::MAX] {
            let mut bytes = info(3, &[(3, vec![0; 8])]);
            bytes[28..32].copy_from_slice(&next.to_ne_bytes());
            assert_eq!(IommuInfo::parse(&bytes).usable, [0..=u64::MAX]);
        }
    }

    /// Whether each page of a mapping is resident.
    fn resident(region: &MmapRegion<()>) -> Vec<bool> {
        let mut pages = vec![0_u8; region.size() / PAGE_BYTES as usize];
        // SAFETY: one byte per page of a mapping that is alive.
        let read =
            unsafe { libc::mincore(region.as_ptr().cast(), region.size(), pages.as_mut_ptr()) };
        assert_eq!(read, 0);
        pages.iter().map(|page| page & 1 == 1).collect()
    }

    #[test]
    fn mapping_of_missing_pages_is_tried_again_once_they_are_there() {
        let region = MmapRegion::<()>::new(4 * PAGE_BYTES as usize).unwrap();
        let part = region.get_slice(PAGE_BYTES as usize, 2 * PAGE_BYTES as usize);
        let part = part.unwrap();
        let seen = RefCell::new(Vec::new());
        // As the kernel does, which maps only what is present.
        let present = || {
            seen.borrow_mut().push(resident(&region));
            match seen.borrow().last() {
                Some(pages) if pages[1..3] == [true; 2] => Ok(()),
                _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
            }
        };
        with_pages(&part, present).unwrap();
        let filled = [false, true, true, false].to_vec();
        assert_eq!(seen.take(), [vec![false; 4], filled]);
        // Pages that are present and cannot be pinned, and other errors.
        for (number, calls) in [(libc::EFAULT, 2), (libc::ENOMEM, 1)] {
            let refuse = || {
                seen.borrow_mut().push(Vec::new());
                Err(io::Error::from_raw_os_error(number))
            };
            let refused = with_pages(&part, refuse).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(number));
            assert_eq!(seen.take().len(), calls);
        }
    }
}
