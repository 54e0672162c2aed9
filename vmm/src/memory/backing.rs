//! What backs a range of guest RAM: which mapping, which advice.
//!
//! | Configuration | Mapping |
//! | --- | --- |
//! | default | private anonymous, not reserved |
//! | `shared` | shared memfd |
//! | `hugepages` | shared hugetlb memfd |
#![allow(unsafe_code)]
// UNSAFETY: memfd_create, madvise and the mapping that keeps an address range occupied
// have no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::ptr;

use ::api::config::MemoryConfig;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use super::MemoryError;
use super::layout::{MIB, PAGE_BYTES};

/// Transparent huge pages on x86-64. Guest and host addresses must agree modulo
/// this, or KVM can map no range of the guest with a huge page.
const THP_BYTES: usize = (2 * MIB) as usize;

/// How the range of one region is backed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Backing {
    kind: Kind,
    reserve: bool,
    prefault: bool,
    mergeable: bool,
    transparent_huge_pages: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    PrivateAnonymous,
    SharedMemfd,
    /// Page size in bytes; `None` for the host's default.
    HugetlbMemfd(Option<u64>),
}

impl Backing {
    /// Reads the backing from the configuration.
    pub(super) fn new(config: &MemoryConfig) -> Result<Self, MemoryError> {
        let kind = match (config.hugepages, config.shared, config.hugepage_size) {
            (true, _, Some(bytes)) if !bytes.is_power_of_two() || bytes <= PAGE_BYTES => {
                return Err(MemoryError::HugepageSize { bytes });
            }
            (true, _, size) => Kind::HugetlbMemfd(size),
            (false, _, Some(_)) => return Err(MemoryError::HugepageSizeWithoutHugepages),
            (false, true, None) => Kind::SharedMemfd,
            (false, false, None) => Kind::PrivateAnonymous,
        };
        Ok(Self {
            kind,
            reserve: config.reserve,
            prefault: config.prefault,
            mergeable: config.mergeable,
            // Huge pages from the pool are huge already.
            transparent_huge_pages: config.thp && !config.hugepages,
        })
    }

    /// The page size that sizes must be multiples of, where it is known before anything is made.
    pub(super) fn page_bytes(self) -> u64 {
        match self.kind {
            Kind::HugetlbMemfd(Some(bytes)) => bytes,
            _ => PAGE_BYTES,
        }
    }

    /// Makes a mapping of `bytes` and gives it its advice.
    pub(super) fn map(self, bytes: u64) -> Result<MmapRegion<()>, MemoryError> {
        let size = usize::try_from(bytes).map_err(|_| MemoryError::SizeOverflow)?;
        let file = match self.kind {
            Kind::PrivateAnonymous => None,
            Kind::SharedMemfd => Some(memfd(bytes, 0)?),
            Kind::HugetlbMemfd(page_bytes) => Some(memfd(bytes, hugetlb_flags(page_bytes))?),
        };
        let build = || self.build(file.as_ref(), size);
        let region = if self.transparent_huge_pages && size >= THP_BYTES {
            map_aligned(size, build)
        } else {
            build()
        }
        .map_err(|source| MemoryError::Map { bytes, source })?;
        self.advise(&region, bytes)?;
        Ok(region)
    }

    fn build(
        self,
        file: Option<&FileOffset>,
        size: usize,
    ) -> Result<MmapRegion<()>, vm_memory::mmap::MmapRegionError> {
        let sharing = match file {
            Some(_) => libc::MAP_SHARED,
            None => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        // Huge pages come from a pool that does not grow: without a reservation a pool too
        // small would kill the VMM in the middle of the guest's work.
        let reserved = self.reserve || matches!(self.kind, Kind::HugetlbMemfd(_));
        let reserving = if reserved { 0 } else { libc::MAP_NORESERVE };
        let mut builder = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | reserving)
            .with_hugetlbfs(matches!(self.kind, Kind::HugetlbMemfd(_)));
        if let Some(file) = file {
            builder = builder.with_file_offset(file.clone());
        }
        builder.build()
    }

    fn advise(self, region: &MmapRegion<()>, bytes: u64) -> Result<(), MemoryError> {
        // A core dump of the VMM must not carry the guest's secrets, nor its size.
        madvise(region, libc::MADV_DONTDUMP, "madvise(MADV_DONTDUMP)", bytes)?;
        if self.transparent_huge_pages
            && let Err(error) =
                madvise(region, libc::MADV_HUGEPAGE, "madvise(MADV_HUGEPAGE)", bytes)
        {
            // A host kernel without transparent huge pages runs the guest all the same.
            log::warn!("Guest RAM without transparent huge pages: {error}");
        }
        if self.mergeable {
            madvise(
                region,
                libc::MADV_MERGEABLE,
                "madvise(MADV_MERGEABLE)",
                bytes,
            )?;
        }
        if self.prefault {
            madvise(
                region,
                libc::MADV_POPULATE_WRITE,
                "madvise(MADV_POPULATE_WRITE)",
                bytes,
            )?;
        }
        Ok(())
    }
}

/// `MFD_HUGETLB` with the page size encoded as `MFD_HUGE_SHIFT` wants it: its logarithm.
fn hugetlb_flags(page_bytes: Option<u64>) -> libc::c_uint {
    let size_flag = page_bytes.map_or(0, |bytes| bytes.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    libc::MFD_HUGETLB | size_flag
}

/// An anonymous file of `bytes` in memory, seen as `memfd:ch_ram` in the process's map.
fn memfd(bytes: u64, flags: libc::c_uint) -> Result<FileOffset, MemoryError> {
    let host = |operation| {
        move |source| MemoryError::Host {
            operation,
            bytes,
            source,
        }
    };
    // SAFETY: the name is a zero-terminated constant; the result is checked below.
    let fd = unsafe { libc::memfd_create(c"ch_ram".as_ptr(), libc::MFD_CLOEXEC | flags) };
    if fd < 0 {
        return Err(host("memfd_create")(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes).map_err(host("ftruncate"))?;
    Ok(FileOffset::new(file, 0))
}

/// Maps so that the host address is a multiple of [`THP_BYTES`], as newer kernels do by themselves.
///
/// The mapping must be made by `vm-memory` without a wish for an address, because only such a
/// mapping is unmapped by it. So the kernel is moved to the right place: after a first, unaligned
/// mapping is gone again, the excess at the end (or, should the kernel search upwards, the gap at
/// the start) is occupied, and the next mapping lands beside it. If another thread interferes, the
/// mapping is still good, only slower.
fn map_aligned<E>(
    size: usize,
    build: impl Fn() -> Result<MmapRegion<()>, E>,
) -> Result<MmapRegion<()>, E> {
    let excess = |region: &MmapRegion<()>| region.as_ptr() as usize % THP_BYTES;
    for search_down in [true, false] {
        let region = build()?;
        let (start, excess_bytes) = (region.as_ptr() as usize, excess(&region));
        if excess_bytes == 0 {
            return Ok(region);
        }
        drop(region);
        let _occupied = if search_down {
            Placeholder::new(start + size - excess_bytes, excess_bytes)
        } else {
            Placeholder::new(start, THP_BYTES - excess_bytes)
        };
        let region = build()?;
        if excess(&region) == 0 {
            return Ok(region);
        }
    }
    log::debug!("Guest RAM is not aligned to {THP_BYTES} bytes on the host");
    build()
}

/// An address range kept occupied, without memory behind it.
struct Placeholder {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Placeholder {
    /// `None` if the range is in use.
    fn new(address: usize, bytes: usize) -> Option<Self> {
        // SAFETY: with MAP_FIXED_NOREPLACE the kernel maps this range only if nothing is there,
        // so no memory of anybody is touched.
        let mapped = unsafe {
            libc::mmap(
                ptr::without_provenance_mut(address),
                bytes,
                libc::PROT_NONE,
                libc::MAP_PRIVATE
                    | libc::MAP_ANONYMOUS
                    | libc::MAP_NORESERVE
                    | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        (mapped != libc::MAP_FAILED).then_some(Self {
            address: mapped,
            bytes,
        })
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, and nobody else knows of it.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

fn madvise(
    region: &MmapRegion<()>,
    advice: libc::c_int,
    operation: &'static str,
    bytes: u64,
) -> Result<(), MemoryError> {
    // SAFETY: the range is exactly one mapping, alive through the borrow. None of the advice given
    // here discards content.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
    if result == 0 {
        return Ok(());
    }
    Err(MemoryError::Host {
        operation,
        bytes,
        source: io::Error::last_os_error(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MemoryConfig {
        MemoryConfig::default()
    }

    #[test]
    fn map_default_is_private_unreserved_and_huge_page_aligned() {
        let region = Backing::new(&config()).unwrap().map(64 * MIB).unwrap();
        assert!(region.file_offset().is_none());
        assert_eq!(
            region.flags() & (libc::MAP_PRIVATE | libc::MAP_NORESERVE),
            libc::MAP_PRIVATE | libc::MAP_NORESERVE
        );
        assert_eq!(region.as_ptr() as usize % THP_BYTES, 0);
    }

    #[test]
    fn map_aligned_moves_an_unaligned_mapping() {
        // An odd number of pages makes the kernel choose odd addresses.
        let size = THP_BYTES * 3 + 5 * PAGE_BYTES as usize;
        let backing = Backing::new(&config()).unwrap();
        let regions: Vec<_> = (0..4)
            .map(|_| map_aligned(size, || backing.build(None, size)).unwrap())
            .collect();
        for region in &regions {
            assert_eq!(region.as_ptr() as usize % THP_BYTES, 0);
        }
    }

    #[test]
    fn map_shared_is_a_memfd_of_that_size() {
        let config = MemoryConfig {
            shared: true,
            reserve: true,
            ..config()
        };
        let region = Backing::new(&config).unwrap().map(4 * MIB).unwrap();
        let file = region.file_offset().unwrap();
        assert_eq!(file.start(), 0);
        assert_eq!(file.file().metadata().unwrap().len(), 4 * MIB);
        assert_eq!(
            region.flags() & (libc::MAP_SHARED | libc::MAP_NORESERVE),
            libc::MAP_SHARED
        );
        assert_eq!(region.is_hugetlbfs(), Some(false));
    }

    #[test]
    fn map_prefault_is_resident() {
        let config = MemoryConfig {
            prefault: true,
            thp: false,
            ..config()
        };
        let pages = 512;
        let region = Backing::new(&config)
            .unwrap()
            .map(pages * PAGE_BYTES)
            .unwrap();
        let mut resident = vec![0u8; pages as usize];
        // SAFETY: one byte a page of a mapping that is alive.
        let result = unsafe {
            libc::mincore(
                region.as_ptr().cast(),
                region.size(),
                resident.as_mut_ptr().cast(),
            )
        };
        assert_eq!(result, 0);
        assert!(resident.iter().all(|page| page & 1 == 1));
    }

    #[test]
    fn backing_odd_huge_page_size_is_refused() {
        for bytes in [0, 4096, 3 * MIB] {
            let config = MemoryConfig {
                hugepages: true,
                hugepage_size: Some(bytes),
                ..config()
            };
            assert!(matches!(
                Backing::new(&config),
                Err(MemoryError::HugepageSize { .. })
            ));
        }
        let config = MemoryConfig {
            hugepage_size: Some(2 * MIB),
            ..config()
        };
        assert!(matches!(
            Backing::new(&config),
            Err(MemoryError::HugepageSizeWithoutHugepages)
        ));
    }

    #[test]
    fn hugetlb_flags_carry_the_logarithm_of_the_size() {
        assert_eq!(
            hugetlb_flags(Some(2 * MIB)),
            libc::MFD_HUGETLB | libc::MFD_HUGE_2MB
        );
        assert_eq!(hugetlb_flags(None), libc::MFD_HUGETLB);
    }
}
