//! A host IOMMU in memory. It behaves as VFIO does, and panics if the VMM would corrupt the host's memory.

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Permissions, VolatileSlice};

use crate::Unpoisoned;
use crate::iommu::HostIommu;

const PAGE_BYTES: u64 = 4096;

/// Addresses that an IOMMU of 39 bits can map: all but those of interrupts.
const USABLE: [RangeInclusive<u64>; 2] = [0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1];

/// One mapping: the address in this process, its bytes, and the access it allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMapped {
    /// First address in this process.
    pub address: usize,
    /// Length.
    pub bytes: u64,
    /// Permitted accesses of the device.
    pub allows: Permissions,
}

/// The IOMMU in front of one device.
pub struct MockHostIommu {
    mapped: Mutex<BTreeMap<u64, HostMapped>>,
    entries_max: usize,
    fails: AtomicBool,
    kept: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
}

impl fmt::Debug for MockHostIommu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MockHostIommu").finish_non_exhaustive()
    }
}

impl MockHostIommu {
    /// It accepts at most `entries_max` mappings.
    #[must_use]
    pub fn new(entries_max: usize) -> Self {
        Self {
            mapped: Mutex::default(),
            entries_max,
            fails: AtomicBool::new(false),
            kept: Mutex::default(),
        }
    }

    /// The mappings by input address.
    pub fn mapped(&self) -> BTreeMap<u64, HostMapped> {
        self.mapped.lock().unpoisoned().clone()
    }

    /// Every call waits until the result is dropped.
    pub fn busy(&self) -> impl Drop + '_ {
        self.mapped.lock().unpoisoned()
    }

    /// Ends all mappings, as the kernel does when the device is closed.
    pub fn close(&self) {
        self.mapped.lock().unpoisoned().clear();
        self.kept.lock().unpoisoned().clear();
    }

    /// Makes every request that unmaps fail from now on, or no more.
    pub fn fail_to_unmap(&self, fails: bool) {
        self.fails.store(fails, Ordering::SeqCst);
    }
}

impl HostIommu for MockHostIommu {
    fn usable(&self) -> &[RangeInclusive<u64>] {
        &USABLE
    }

    fn map(&self, input: u64, memory: &VolatileSlice<'_>, allows: Permissions) -> io::Result<()> {
        let mut mapped = self.mapped.lock().unpoisoned();
        let bytes = memory.len() as u64;
        let address = memory.ptr_guard_mut().as_ptr() as usize;
        assert!(bytes > 0 && allows != Permissions::No);
        assert!(
            [input, bytes, address as u64]
                .iter()
                .all(|it| it.is_multiple_of(PAGE_BYTES)),
            "{input:#x} {bytes:#x} {address:#x} are not whole pages"
        );
        let last = input + (bytes - 1);
        assert!(
            USABLE
                .iter()
                .any(|it| it.contains(&input) && it.contains(&last)),
            "{input:#x} to {last:#x} cannot be mapped"
        );
        let before = mapped.range(..=last).next_back();
        assert!(
            before.is_none_or(|(start, it)| start + it.bytes <= input),
            "{input:#x} to {last:#x} is mapped"
        );
        if mapped.len() == self.entries_max {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let new = HostMapped {
            address,
            bytes,
            allows,
        };
        mapped.insert(input, new);
        Ok(())
    }

    fn unmap(&self, input: u64, bytes: u64) -> io::Result<()> {
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut mapped = self.mapped.lock().unpoisoned();
        let end = input + bytes;
        let inside: Vec<(u64, u64)> = mapped
            .range(input..end)
            .map(|(start, it)| (*start, it.bytes))
            .collect();
        let sum: u64 = inside.iter().map(|(_, bytes)| bytes).sum();
        assert_eq!(
            sum, bytes,
            "{input:#x} to {end:#x} is not mapped as a whole"
        );
        inside.iter().for_each(|(start, _)| {
            mapped.remove(start);
        });
        Ok(())
    }

    fn keep(&self, value: Arc<dyn Any + Send + Sync>) {
        self.kept.lock().unpoisoned().push(value);
    }
}
