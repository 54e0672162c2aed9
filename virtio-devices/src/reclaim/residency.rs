//! Measures how much guest RAM the host holds.
//!
//! For private memory it reads the page tables ([`super::pagemap`]). For a shared file in memory (memfd, tmpfs,
//! hugetlbfs) the page tables would show only what this process has mapped, so the file's allocated blocks are used.
//! They include swapped-out pages.
//!
//! A sample stops no vCPU and does not wait for the guest. The more expensive a sample is, the longer it is cached: a
//! flood of requests never uses more than 1/[`REST_PER_COST`] of a core.
#![allow(unsafe_code)]
// UNSAFETY: `fstat`, `sysinfo` and `mincore` have no safe wrapper among our dependencies.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{
    Address, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::backing::base_page_bytes;
use super::pagemap::{MappedBytes, Pagemap};
use crate::device::GuestRam;
use crate::{Unpoisoned, file_system};

/// A sample up to this age is always reused.
const SAMPLE_AGE_MIN: Duration = Duration::from_millis(100);
/// A sample is reused for at least this many times its duration.
const REST_PER_COST: u32 = 100;

/// Measuring failed; an error is better than a wrong figure.
#[derive(Debug, thiserror::Error)]
pub enum ResidencyError {
    /// `/proc/self/pagemap` cannot be opened.
    #[error("cannot open the page map of this process")]
    OpenPagemap(#[source] io::Error),
    /// The page tables behind guest RAM cannot be read.
    #[error("cannot determine which pages of guest RAM are resident")]
    Lookup(#[source] io::Error),
    /// The file behind guest RAM cannot be examined.
    #[error("cannot examine the file behind guest RAM")]
    Stat(#[source] io::Error),
}

/// The method of reading page tables on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum ResidencyMethod {
    /// `PAGEMAP_SCAN`; the shared zero page counts as absent.
    PagemapScan,
    /// Entry by entry; the shared zero page counts as resident.
    PagemapRead,
}

impl ResidencyMethod {
    /// Name in replies.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The host memory that one region of guest RAM holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionResidency {
    /// Guest address of the region.
    pub guest_start: u64,
    /// Its size.
    pub bytes: u64,
    /// Bytes in host RAM. If several regions map the same file in memory, the first region has the figure for all of
    /// them, because only the file knows its pages.
    pub resident_bytes: u64,
    /// Bytes in host swap; for shared files as above.
    pub swapped_bytes: u64,
}

/// One measurement of all of guest RAM.
#[derive(Clone, Debug)]
pub struct ResidencySample {
    /// Size of the guest's RAM.
    pub configured_bytes: u64,
    /// Bytes in host RAM.
    pub resident_bytes: u64,
    /// Bytes in host swap.
    pub swapped_bytes: u64,
    /// The time of the measurement.
    pub taken: Instant,
    /// The duration of the measurement.
    pub cost_us: u64,
    /// The method of reading page tables.
    pub method: ResidencyMethod,
    /// The same figures by region, in ascending order.
    pub regions: Arc<[RegionResidency]>,
}

impl ResidencySample {
    /// Guest RAM that occupies no host RAM: never touched, discarded, or swapped out.
    #[must_use]
    pub fn reclaimed_bytes(&self) -> u64 {
        self.configured_bytes.saturating_sub(self.resident_bytes)
    }
}

/// Measures guest RAM; shared by all threads that need it.
#[derive(Debug)]
pub struct ResidencyProbe {
    ram: GuestRam,
    pagemap: Pagemap,
    last: Mutex<Option<ResidencySample>>,
}

impl ResidencyProbe {
    /// A probe for this RAM. It follows later changes of the memory map.
    ///
    /// # Errors
    /// The page map of this process cannot be opened.
    pub fn new(ram: GuestRam) -> Result<Self, ResidencyError> {
        let pagemap = Pagemap::open().map_err(ResidencyError::OpenPagemap)?;
        Ok(Self::with_pagemap(ram, pagemap))
    }

    pub(super) fn with_pagemap(ram: GuestRam, pagemap: Pagemap) -> Self {
        Self {
            ram,
            pagemap,
            last: Mutex::new(None),
        }
    }

    /// The current state, or a sample that is recent enough. Callers that arrive during a measurement wait for it and
    /// share it.
    ///
    /// # Errors
    /// The host rejects the measurement.
    pub fn sample(&self) -> Result<ResidencySample, ResidencyError> {
        let mut last = self.last.lock().unpoisoned();
        if let Some(sample) = &*last {
            let rest = Duration::from_micros(sample.cost_us).saturating_mul(REST_PER_COST);
            if sample.taken.elapsed() < rest.max(SAMPLE_AGE_MIN) {
                return Ok(sample.clone());
            }
        }
        let sample = self.measure()?;
        *last = Some(sample.clone());
        Ok(sample)
    }

    /// Measures now, regardless of the cost.
    ///
    /// # Errors
    /// The host rejects the measurement.
    pub fn measure(&self) -> Result<ResidencySample, ResidencyError> {
        let taken = Instant::now();
        let mem = self.ram.memory();
        let regions = self.regions(&mem)?;
        let sum = |bytes: fn(&RegionResidency) -> u64| regions.iter().map(bytes).sum::<u64>();
        let configured_bytes = sum(|region| region.bytes);
        Ok(ResidencySample {
            configured_bytes,
            resident_bytes: sum(|region| region.resident_bytes).min(configured_bytes),
            swapped_bytes: sum(|region| region.swapped_bytes).min(configured_bytes),
            taken,
            cost_us: u64::try_from(taken.elapsed().as_micros()).unwrap_or(u64::MAX),
            method: if self.pagemap.scans() {
                ResidencyMethod::PagemapScan
            } else {
                ResidencyMethod::PagemapRead
            },
            regions: regions.into(),
        })
    }

    fn regions(&self, mem: &GuestMemoryMmap<()>) -> Result<Vec<RegionResidency>, ResidencyError> {
        let swap_in_use = swap_in_use();
        let mut regions = Vec::new();
        let mut files: Vec<FileFigures> = Vec::new();
        for region in mem.iter() {
            let shared = region.flags() & libc::MAP_SHARED != 0;
            let memory_file = region
                .file_offset()
                .map(vm_memory::FileOffset::file)
                .filter(|file| shared && file_system::is_in_memory(file));
            let held = match memory_file {
                Some(file) => {
                    let cached = if swap_in_use {
                        let cached = cached_bytes(region.as_ptr(), region.len());
                        Some(cached.map_err(ResidencyError::Lookup)?)
                    } else {
                        None
                    };
                    note_file(&mut files, file, cached, regions.len())?;
                    MappedBytes::default()
                }
                None => {
                    let start = region.as_ptr() as u64;
                    let end = start + region.len().next_multiple_of(base_page_bytes());
                    let held = self.pagemap.mapped(start, end);
                    held.map_err(ResidencyError::Lookup)?
                }
            };
            regions.push(RegionResidency {
                guest_start: region.start_addr().raw_value(),
                bytes: region.len(),
                resident_bytes: held.present,
                swapped_bytes: held.swapped,
            });
        }
        for file in files {
            // The two figures were read at slightly different times: pages added in between are in RAM.
            let swapped = file.allocated.saturating_sub(file.cached);
            regions[file.first_region].swapped_bytes = swapped;
            regions[file.first_region].resident_bytes = file.allocated - swapped;
        }
        Ok(regions)
    }
}

/// One file in memory. Several regions may map parts of it; its pages count once.
struct FileFigures {
    id: FileId,
    /// The first region that maps the file.
    first_region: usize,
    /// Bytes of its pages, in RAM or in swap.
    allocated: u64,
    /// Bytes in RAM, in its mapped parts.
    cached: u64,
}

type FileId = (libc::dev_t, libc::ino_t);

/// Adds the part of a file that `region` maps: `cached` bytes in RAM, or all of it if this was not measured.
fn note_file(
    files: &mut Vec<FileFigures>,
    file: &File,
    cached: Option<u64>,
    region: usize,
) -> Result<(), ResidencyError> {
    let (id, allocated) = allocation(file).map_err(ResidencyError::Stat)?;
    let cached = cached.unwrap_or(allocated);
    match files.iter_mut().find(|known| known.id == id) {
        Some(known) => known.cached += cached,
        None => files.push(FileFigures {
            id,
            first_region: region,
            allocated,
            cached,
        }),
    }
    Ok(())
}

/// The identity of a file in memory and the bytes of its pages, swapped ones included.
fn allocation(file: &File) -> io::Result<(FileId, u64)> {
    /// The unit of `st_blocks` on every file system (stat(2)).
    const BLOCK_BYTES: u64 = 512;
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: the descriptor is open and `stat` is large enough.
    if unsafe { libc::fstat(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has filled the structure, because it returned zero.
    let stat = unsafe { stat.assume_init() };
    let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
    Ok((
        (stat.st_dev, stat.st_ino),
        blocks.saturating_mul(BLOCK_BYTES),
    ))
}

/// Whether the host uses swap; if not, no guest memory is swapped.
fn swap_in_use() -> bool {
    let mut info = MaybeUninit::<libc::sysinfo>::zeroed();
    // SAFETY: the structure is large enough, and all zeros is a valid value of it.
    let (ret, info) = unsafe { (libc::sysinfo(info.as_mut_ptr()), info.assume_init()) };
    ret != 0 || info.totalswap > info.freeswap
}

/// Number of bytes of a shared mapping whose pages are in RAM, mapped or not.
fn cached_bytes(start: *mut u8, bytes: u64) -> io::Result<u64> {
    /// Pages per call: 32 KiB of stack, 128 MiB of guest RAM.
    const WINDOW_PAGES: u64 = 32 * 1024;
    let page = base_page_bytes();
    let mut window = [0_u8; WINDOW_PAGES as usize];
    let mut cached = 0;
    let mut offset = 0;
    while offset < bytes {
        let len = (WINDOW_PAGES * page).min(bytes - offset);
        // SAFETY: the range is in a mapping that the caller keeps alive, and the window has one byte per page of it.
        // The call changes no memory in the range.
        let ret = unsafe {
            libc::mincore(
                start
                    .wrapping_add(usize::try_from(offset).expect("inside a mapping"))
                    .cast(),
                usize::try_from(len).expect("inside a mapping"),
                window.as_mut_ptr(),
            )
        };
        if ret != 0 {
            return Err(io::Error::last_os_error());
        }
        let pages = usize::try_from(len.div_ceil(page)).expect("at most the window");
        let in_ram = window[..pages]
            .iter()
            .filter(|byte| **byte & 1 != 0)
            .count();
        cached += in_ram as u64 * page;
        offset += len;
    }
    Ok(cached)
}
