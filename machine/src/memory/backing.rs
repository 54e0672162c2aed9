//! The backing of a range of guest RAM: mapping flags and advice.
//!
//! | Configuration | Mapping |
//! | --- | --- |
//! | default | private anonymous, not reserved |
//! | `shared` | shared memfd |
//! | `hugepages` | shared hugetlb memfd |
//! | `file` | see [`super::file`] |
#![allow(unsafe_code)]
// UNSAFETY: memfd_create, madvise and the mapping that keeps an address range occupied have no safe wrapper.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;
use std::sync::Arc;

use api::config::MemoryZoneConfig;
use virtio_devices::file_system;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion};

use super::error::ZoneError;
use super::file::ZoneFile;
use super::hugetlb_limit::{self, Counts};
use super::layout::{MIB, PAGE_BYTES};
use super::numa_policy;
use super::source::Source;

/// The kernel takes 80 bytes with the final zero.
const MAPPING_NAME_CHARS_MAX: usize = 64;
/// Transparent huge pages on x86-64. Guest and host addresses must agree modulo this size; otherwise KVM cannot map any
/// range of the guest with a huge page.
const THP_BYTES: usize = (2 * MIB) as usize;

/// The backing of one zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Backing {
    /// Seen in the process's map.
    name: CString,
    kind: Kind,
    host_numa_node: Option<u32>,
    reserve: bool,
    prefault: bool,
    mergeable: bool,
    transparent_huge_pages: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    PrivateAnonymous,
    SharedMemfd,
    /// Page size in bytes; `None` for the host's default.
    HugetlbMemfd(Option<u64>),
    File(ZoneFile),
}

impl Backing {
    /// Determines the backing from the configuration alone. `thp`: whether RAM uses transparent huge pages.
    pub(super) fn new(zone: &MemoryZoneConfig, thp: bool) -> Self {
        let kind = match (&zone.file, zone.hugepages, zone.shared) {
            (Some(path), _, _) => Kind::File(ZoneFile {
                path: path.clone(),
                shared: zone.shared,
                huge_pages: zone.hugepages,
                huge_page_bytes: zone.hugepage_size,
            }),
            (None, true, _) => Kind::HugetlbMemfd(zone.hugepage_size),
            (None, false, true) => Kind::SharedMemfd,
            (None, false, false) => Kind::PrivateAnonymous,
        };
        Self {
            name: mapping_name(&zone.id),
            kind,
            host_numa_node: zone.host_numa_node,
            reserve: zone.reserve,
            prefault: zone.prefault,
            mergeable: zone.mergeable,
            transparent_huge_pages: thp,
        }
    }

    /// The page size that sizes must be a multiple of, if it is known before anything is created.
    pub(super) fn page_bytes(&self) -> u64 {
        match &self.kind {
            Kind::HugetlbMemfd(bytes) => bytes.unwrap_or(2 * MIB),
            _ => PAGE_BYTES,
        }
    }

    /// `None` if the pages are not in a memory file of ours, otherwise their size, if the configuration has it.
    pub(super) fn memfd_page_bytes(&self) -> Option<Option<u64>> {
        match &self.kind {
            Kind::SharedMemfd => Some(Some(PAGE_BYTES)),
            Kind::HugetlbMemfd(bytes) => Some(*bytes),
            Kind::PrivateAnonymous | Kind::File(_) => None,
        }
    }

    /// Opens or creates the file for `bytes` of pages.
    pub(super) fn open(&self, bytes: u64) -> Result<Source, ZoneError> {
        match &self.kind {
            Kind::PrivateAnonymous => Ok(Source::anonymous()),
            Kind::SharedMemfd => memfd(bytes, 0),
            Kind::HugetlbMemfd(page_bytes) => memfd(bytes, hugetlb_flags(*page_bytes)),
            Kind::File(file) => file.open(bytes),
        }
    }

    /// Creates a mapping of `bytes` from `offset` on and applies its advice.
    pub(super) fn map(
        &self,
        source: &Source,
        offset: u64,
        bytes: u64,
    ) -> Result<MmapRegion<()>, ZoneError> {
        let page_bytes = source.page_bytes;
        if !bytes.is_multiple_of(page_bytes) || !offset.is_multiple_of(page_bytes) {
            return Err(ZoneError::NotPageMultiple { bytes, page_bytes });
        }
        let size = usize::try_from(bytes).map_err(|_| ZoneError::TooLarge { bytes })?;
        let build = || self.build(source, offset, size);
        let region = if self.wants_transparent_huge_pages(source) && size >= THP_BYTES {
            map_aligned(size, build)
        } else {
            build()
        };
        let region = region.map_err(|error| match error {
            MmapRegionError::Mmap(error)
                if source.is_hugetlb() && error.raw_os_error() == Some(libc::ENOMEM) =>
            {
                let limit = hugetlb_limit::check(Counts::Reserved, bytes, page_bytes);
                let too_few = ZoneError::TooFewHugePages { bytes, page_bytes };
                limit.err().unwrap_or(too_few)
            }
            source => ZoneError::Map { bytes, source },
        })?;
        self.advise(source, &region, bytes)?;
        Ok(region)
    }

    /// Huge pages from the pool need no transparent huge pages.
    fn wants_transparent_huge_pages(&self, source: &Source) -> bool {
        self.transparent_huge_pages && !source.is_hugetlb()
    }

    fn build(
        &self,
        source: &Source,
        offset: u64,
        size: usize,
    ) -> Result<MmapRegion<()>, MmapRegionError> {
        let sharing = match (&source.file, source.shared) {
            (Some(_), true) => libc::MAP_SHARED,
            (Some(_), false) => libc::MAP_PRIVATE,
            (None, _) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        };
        // Huge pages come from a pool that does not grow. Without a reservation, a pool that is too small would kill
        // the VMM while the guest runs.
        let reserved = self.reserve || source.is_hugetlb();
        let reserving = if reserved { 0 } else { libc::MAP_NORESERVE };
        let mut builder = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(sharing | reserving)
            .with_hugetlbfs(source.is_hugetlb());
        if let Some(file) = &source.file {
            builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
        }
        builder.build()
    }

    fn advise(
        &self,
        source: &Source,
        region: &MmapRegion<()>,
        bytes: u64,
    ) -> Result<(), ZoneError> {
        // The kernel joins neighbours of the same name, but each zone must appear separately.
        if source.file.is_none() {
            name_mapping(region, &self.name);
        }
        // Before the first page exists, so that none has to be migrated.
        if let Some(node) = self.host_numa_node {
            numa_policy::bind(region, node)
                .map_err(|source| ZoneError::HostNumaNode { node, source })?;
        }
        // A core dump of the VMM must not contain the guest's secrets, nor be as large as its RAM.
        madvise(region, libc::MADV_DONTDUMP, "madvise(MADV_DONTDUMP)", bytes)?;
        let wishes = [
            (
                self.wants_transparent_huge_pages(source),
                libc::MADV_HUGEPAGE,
                "madvise(MADV_HUGEPAGE)",
            ),
            (
                self.mergeable,
                libc::MADV_MERGEABLE,
                "madvise(MADV_MERGEABLE)",
            ),
        ];
        for (wanted, advice, operation) in wishes {
            if wanted && let Err(error) = madvise(region, advice, operation, bytes) {
                // A host kernel without the feature runs the guest nevertheless, as with upstream.
                log::warn!("{}", ::api::error_line(&error));
            }
        }
        match self.prefault {
            true => populate(region),
            false => Ok(()),
        }
    }
}

/// The name of a zone's mappings, with the characters that the kernel accepts.
fn mapping_name(zone: &str) -> CString {
    let is_taken = |it: &char| it.is_ascii_alphanumeric() || "-_.".contains(*it);
    let id = zone.chars().filter(is_taken).take(MAPPING_NAME_CHARS_MAX);
    CString::new(format!("ch_ram_{}", id.collect::<String>())).expect("there is no zero in it")
}

/// A kernel without names for anonymous memory joins neighbours, which changes only the list of mappings.
fn name_mapping(region: &MmapRegion<()>, name: &CStr) {
    // SAFETY: the range is exactly one mapping, alive through the borrow; the kernel copies the name.
    unsafe {
        libc::prctl(
            libc::PR_SET_VMA,
            libc::PR_SET_VMA_ANON_NAME,
            region.as_ptr(),
            region.size(),
            name.as_ptr(),
        )
    };
}

/// Makes the whole region resident. Its content is kept.
pub(super) fn populate(region: &MmapRegion<()>) -> Result<(), ZoneError> {
    madvise(
        region,
        libc::MADV_POPULATE_WRITE,
        "madvise(MADV_POPULATE_WRITE)",
        region.size() as u64,
    )
}

/// `MFD_HUGETLB` with the page size encoded for `MFD_HUGE_SHIFT`: its logarithm.
fn hugetlb_flags(page_bytes: Option<u64>) -> libc::c_uint {
    let size_flag = page_bytes.map_or(0, |bytes| bytes.trailing_zeros() << libc::MFD_HUGE_SHIFT);
    libc::MFD_HUGETLB | size_flag
}

/// Name of our memory files, seen as `memfd:ch_ram` in the process's map.
const MEMFD_NAME: &std::ffi::CStr = c"ch_ram";

const MEMFD_FLAGS: libc::c_uint = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
/// The size is sealed: otherwise a process that shares the file, such as a back end, could shorten it and kill the VMM
/// with SIGBUS. Holes can still be punched.
pub(super) const MEMFD_SEALS: libc::c_int =
    libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// An anonymous file of `bytes` in memory.
fn memfd(bytes: u64, flags: libc::c_uint) -> Result<Source, ZoneError> {
    let host = |operation| {
        move |source| ZoneError::Host {
            operation,
            bytes,
            source,
        }
    };
    // SAFETY: the name is a zero-terminated constant; the result is checked below.
    let fd = unsafe { libc::memfd_create(MEMFD_NAME.as_ptr(), MEMFD_FLAGS | flags) };
    if fd < 0 {
        return Err(host("memfd_create")(io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is open and has no other owner.
    let file = unsafe { File::from_raw_fd(fd) };
    let huge_page_bytes = file_system::huge_page_bytes(&file);
    let page_bytes = huge_page_bytes.unwrap_or(PAGE_BYTES);
    if !bytes.is_multiple_of(page_bytes) {
        return Err(ZoneError::NotPageMultiple { bytes, page_bytes });
    }
    file.set_len(bytes)
        .map_err(|source| ZoneError::of_size(bytes, source))?;
    // SAFETY: the command takes an integer.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, MEMFD_SEALS) } != 0 {
        return Err(host("fcntl(F_ADD_SEALS)")(io::Error::last_os_error()));
    }
    Ok(Source::memfd(file, huge_page_bytes))
}

/// Creates a mapping whose host address is a multiple of [`THP_BYTES`], as newer kernels do.
///
/// `vm-memory` must create the mapping without a requested address, because it unmaps only such a mapping. So this
/// function steers the kernel to an aligned address. It removes a first, unaligned mapping. It then occupies the excess
/// at the end (or, if the kernel searches upwards, the gap at the start), and the next mapping is placed next to it. If
/// another thread interferes, the mapping is still valid, only slower.
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

/// An occupied address range without memory.
struct Placeholder {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Placeholder {
    /// `None` if the range is in use.
    fn new(address: usize, bytes: usize) -> Option<Self> {
        // SAFETY: with MAP_FIXED_NOREPLACE the kernel maps this range only if it is free, so no other memory is
        // affected.
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
        // SAFETY: this is the mapping created in `new`, and no other code knows it.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

/// Allows or prevents transparent huge pages from now on. A kernel without them has nothing to change.
pub(super) fn advise_huge_pages(region: &MmapRegion<()>, wanted: bool) {
    let (advice, operation) = match wanted {
        true => (libc::MADV_HUGEPAGE, "madvise(MADV_HUGEPAGE)"),
        false => (libc::MADV_NOHUGEPAGE, "madvise(MADV_NOHUGEPAGE)"),
    };
    if let Err(error) = madvise(region, advice, operation, region.size() as u64) {
        log::debug!("{}", ::api::error_line(&error));
    }
}

fn madvise(
    region: &MmapRegion<()>,
    advice: libc::c_int,
    operation: &'static str,
    bytes: u64,
) -> Result<(), ZoneError> {
    // SAFETY: the range is exactly one mapping, alive through the borrow. None of this advice discards content.
    let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
    if result == 0 {
        return Ok(());
    }
    Err(ZoneError::Host {
        operation,
        bytes,
        source: io::Error::last_os_error(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zone() -> MemoryZoneConfig {
        MemoryZoneConfig::default()
    }

    fn map(zone: &MemoryZoneConfig, thp: bool, bytes: u64) -> MmapRegion<()> {
        let backing = Backing::new(zone, thp);
        let source = backing.open(bytes).unwrap();
        backing.map(&source, 0, bytes).unwrap()
    }

    #[test]
    fn map_default_is_private_unreserved_and_huge_page_aligned() {
        let region = map(&zone(), true, 64 * MIB);
        assert!(region.file_offset().is_none());
        assert_eq!(
            region.flags() & (libc::MAP_PRIVATE | libc::MAP_NORESERVE),
            libc::MAP_PRIVATE | libc::MAP_NORESERVE
        );
        assert_eq!(region.as_ptr() as usize % THP_BYTES, 0);
    }

    #[test]
    fn mappings_of_two_zones_are_seen_as_two() {
        let bytes = 4 * MIB;
        let mapped = |id: &str| {
            let zone = MemoryZoneConfig {
                id: id.to_owned(),
                ..zone()
            };
            map(&zone, true, bytes)
        };
        // Where the kernel puts them is its own affair: some of these are neighbours.
        let regions: Vec<_> = (0..8)
            .map(|number| mapped(&format!("z {number}")))
            .collect();
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        if !text.contains("[anon:ch_ram_z0]") {
            test_skip::skip("the kernel has no names for anonymous memory");
            return;
        }
        for (number, region) in regions.iter().enumerate() {
            let start = region.as_ptr() as u64;
            let range = format!("{start:x}-{:x} ", start + bytes);
            let line = text.lines().find(|line| line.starts_with(&range));
            let name = format!("[anon:ch_ram_z{number}]");
            assert!(
                line.is_some_and(|line| line.contains(&name)),
                "{range}: {text}"
            );
        }
    }

    #[test]
    fn memfd_keeps_its_size_and_loses_its_pages() {
        let shared = MemoryZoneConfig {
            shared: true,
            ..zone()
        };
        let file = Backing::new(&shared, true)
            .open(4 * MIB)
            .unwrap()
            .file
            .unwrap();
        for bytes in [0, MIB, 8 * MIB] {
            let refused = file.set_len(bytes).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        }
        // SAFETY: sealing takes an integer.
        let sealed =
            unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_WRITE) };
        assert_eq!(sealed, -1, "nobody adds a seal that would stop the guest");
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the file is ours alone and empty.
        let punched = unsafe { libc::fallocate(file.as_raw_fd(), punch, 0, MIB as libc::off_t) };
        assert_eq!(punched, 0);
    }

    #[test]
    fn map_aligned_moves_an_unaligned_mapping() {
        // An odd number of pages makes the kernel choose odd addresses.
        let size = THP_BYTES * 3 + 5 * PAGE_BYTES as usize;
        let backing = Backing::new(&zone(), true);
        let build = || backing.build(&Source::anonymous(), 0, size);
        let regions: Vec<_> = (0..4).map(|_| map_aligned(size, build).unwrap()).collect();
        for region in &regions {
            assert_eq!(region.as_ptr() as usize % THP_BYTES, 0);
        }
    }

    #[test]
    fn map_shared_is_a_memfd_of_that_size() {
        let zone = MemoryZoneConfig {
            shared: true,
            reserve: true,
            ..zone()
        };
        let region = map(&zone, true, 4 * MIB);
        let file = region.file_offset().unwrap();
        assert_eq!(file.start(), 0);
        assert_eq!(file.file().metadata().unwrap().len(), 4 * MIB);
        assert_eq!(
            region.flags() & (libc::MAP_SHARED | libc::MAP_NORESERVE),
            libc::MAP_SHARED
        );
        assert_eq!(region.is_hugetlbfs(), Some(false));
    }

    /// The flags of a mapping in `/proc/self/smaps`, and its resident bytes.
    fn flags_and_resident_bytes(region: &MmapRegion<()>) -> (Vec<String>, u64) {
        let start = region.as_ptr() as u64;
        let range = format!("{start:x}-{:x} ", start + region.size() as u64);
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&range));
        let mut field = |name: &str| {
            let value = lines.find_map(|line| line.strip_prefix(name));
            value.unwrap_or_else(|| panic!("{name} {range}{text}"))
        };
        let kib: u64 = (field("Rss:").trim_end_matches("kB").trim().parse()).unwrap();
        let flags = field("VmFlags:").split_whitespace().map(str::to_owned);
        (flags.collect(), kib << 10)
    }

    /// Every combination, each as the kernel has it afterwards.
    #[test]
    fn settings_of_memory_have_their_effect_in_every_combination() {
        let bytes = 4 * MIB;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let path = || Some(file.path().to_owned());
        let has = |path: &str| std::path::Path::new(path).exists();
        let (ksm, thp_known) = (
            has("/sys/kernel/mm/ksm"),
            has("/sys/kernel/mm/transparent_hugepage"),
        );
        if !(ksm && thp_known) {
            test_skip::skip(format!(
                "merging is tested only with KSM ({ksm}), huge pages only with THP ({thp_known})"
            ));
        }
        let overcommit = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap();
        let kinds = [(None, false), (None, true), (path(), false), (path(), true)];
        for (file, shared) in kinds {
            for bits in 0..16 {
                let [reserve, prefault, mergeable, thp] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
                let zone = MemoryZoneConfig {
                    id: format!("combination-{bits}"),
                    file: file.clone(),
                    shared,
                    reserve,
                    prefault,
                    mergeable,
                    ..zone()
                };
                let region = map(&zone, thp, bytes);
                let (flags, resident) = flags_and_resident_bytes(&region);
                let flag = |name: &str| flags.iter().any(|it| it == name);
                let found = format!("{zone:?}, thp {thp}: {flags:?}");
                assert_eq!(flag("sh"), shared, "{found}");
                // Strict accounting reserves everything.
                let unreserved = !reserve && overcommit.trim() != "2";
                assert_eq!(flag("nr"), unreserved, "{found}");
                // The kernel merges private pages only.
                assert_eq!(flag("mg"), mergeable && !shared && ksm, "{found}");
                assert_eq!(flag("hg"), thp && thp_known, "{found}");
                assert!(flag("dd"), "{found}");
                let expected = if prefault { bytes } else { 0 };
                assert_eq!(resident, expected, "{found}");
            }
        }
    }

    #[test]
    fn map_prefault_is_resident() {
        let zone = MemoryZoneConfig {
            prefault: true,
            ..zone()
        };
        let pages = 512;
        let region = map(&zone, false, pages * PAGE_BYTES);
        let mut resident = vec![0u8; pages as usize];
        // SAFETY: one byte per page of a mapping that is alive.
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
    fn map_on_a_node_that_is_not_there_is_an_error() {
        let zone = MemoryZoneConfig {
            host_numa_node: Some(super::super::HOST_NUMA_NODE_MAX),
            ..zone()
        };
        let backing = Backing::new(&zone, false);
        let mapped = backing.map(&Source::anonymous(), 0, MIB);
        assert!(matches!(mapped, Err(ZoneError::HostNumaNode { .. })));
    }

    #[test]
    fn map_of_more_huge_pages_than_there_are_says_so() {
        let zone = MemoryZoneConfig {
            hugepages: true,
            hugepage_size: Some(2 * MIB),
            ..zone()
        };
        let backing = Backing::new(&zone, false);
        // A TiB: no host that runs tests can reserve that.
        let bytes = 1 << 40;
        let Ok(source) = backing.open(bytes) else {
            test_skip::skip("this kernel has no huge pages of 2 MiB");
            return;
        };
        let mapped = backing.map(&source, 0, bytes);
        assert!(
            matches!(mapped, Err(ZoneError::TooFewHugePages { .. })),
            "{mapped:?}"
        );
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
