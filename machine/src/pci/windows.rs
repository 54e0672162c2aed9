//! The address ranges that the host bridge forwards to PCI, and their allocation.
//!
//! Initialises what firmware normally would, because a directly booted kernel has none: BARs are placed here before the
//! guest sees them.

use std::ops::Range;

use virtio_devices::pci::Bar;
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use super::PciError;

/// BARs do not share pages, so that the guest can map each separately.
const BAR_ALIGNMENT_MIN: u64 = 0x1000;
/// The smallest possible memory BAR (PCI 3.0 §6.2.5.1).
const BAR_BYTES_MIN: u64 = 16;

/// The 32-bit and the 64-bit window of a bus.
#[derive(Debug)]
pub struct MemoryWindows {
    mmio32: Window,
    mmio64: Window,
}

/// The addresses of both windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowRanges {
    /// Below 4 GiB.
    pub mmio32: Range<u64>,
    /// Above all RAM.
    pub mmio64: Range<u64>,
}

#[derive(Debug)]
struct Window {
    range: Range<u64>,
    allocator: AddressAllocator,
}

impl Window {
    fn new(range: Range<u64>) -> Result<Self, PciError> {
        let base = range.start;
        let bytes = range.end.saturating_sub(range.start);
        let allocator = AddressAllocator::new(base, bytes).map_err(|source| PciError::Window {
            base,
            bytes,
            source,
        })?;
        Ok(Self { range, allocator })
    }
}

impl MemoryWindows {
    /// Windows over these guest physical addresses: `mmio32` below 4 GiB,
    /// `mmio64` above all RAM.
    ///
    /// # Errors
    /// A window is empty.
    pub fn new(mmio32: Range<u64>, mmio64: Range<u64>) -> Result<Self, PciError> {
        Ok(Self {
            mmio32: Window::new(mmio32)?,
            mmio64: Window::new(mmio64)?,
        })
    }

    pub(super) fn ranges(&self) -> WindowRanges {
        WindowRanges {
            mmio32: self.mmio32.range.clone(),
            mmio64: self.mmio64.range.clone(),
        }
    }

    /// Allocates address space for a BAR of function `id`, from the end of the window down: a guest that assigns BARs
    /// anew starts at the other end, and finds it free.
    ///
    /// # Errors
    /// The size is invalid or there is no room.
    pub(super) fn allocate(&mut self, id: &str, bar: &Bar) -> Result<RangeInclusive, PciError> {
        let bytes = bar.size_bytes;
        if !bytes.is_power_of_two() || bytes < BAR_BYTES_MIN {
            return Err(PciError::BarSize {
                id: id.to_owned(),
                index: bar.index,
                bytes,
            });
        }
        let window = if bar.is_64bit {
            &mut self.mmio64
        } else {
            &mut self.mmio32
        };
        window
            .allocator
            .allocate(bytes, bytes.max(BAR_ALIGNMENT_MIN), AllocPolicy::LastMatch)
            .map_err(|source| PciError::NoAddressSpace {
                id: id.to_owned(),
                index: bar.index,
                bytes,
                source,
            })
    }

    /// Allocates a range that a function had when its state was saved; false if it is not free or is in neither window.
    pub(super) fn take(&mut self, start: u64, bytes: u64) -> bool {
        if bytes == 0 || !self.forwards(start, bytes) {
            return false;
        }
        let window = if self.mmio32.range.contains(&start) {
            &mut self.mmio32
        } else {
            &mut self.mmio64
        };
        let policy = AllocPolicy::ExactMatch(start);
        window.allocator.allocate(bytes, 1, policy).is_ok()
    }

    /// Allocates `bytes` at the end of the 64-bit window for memory of function `id` that is not behind a BAR.
    ///
    /// # Errors
    /// No address space is free.
    pub(super) fn allocate_memory(
        &mut self,
        id: &str,
        bytes: u64,
        align_bytes: u64,
    ) -> Result<RangeInclusive, PciError> {
        self.mmio64
            .allocator
            .allocate(bytes, align_bytes, AllocPolicy::LastMatch)
            .map_err(|source| PciError::NoMemorySpace {
                id: id.to_owned(),
                bytes,
                source,
            })
    }

    /// Frees the result of [`MemoryWindows::allocate`].
    pub(super) fn free(&mut self, range: &RangeInclusive) {
        let window = if self.mmio32.range.contains(&range.start()) {
            &mut self.mmio32
        } else {
            &mut self.mmio64
        };
        if let Err(error) = window.allocator.free(range) {
            log::error!(
                "PCI address {:#x} was not allocated: {error}",
                range.start()
            );
        }
    }

    /// Whether the host bridge forwards this range. A guest can only map a BAR in such a range.
    pub(super) fn forwards(&self, address: u64, bytes: u64) -> bool {
        let Some(end) = address.checked_add(bytes) else {
            return false;
        };
        [&self.mmio32, &self.mmio64]
            .iter()
            .any(|window| window.range.start <= address && end <= window.range.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(size_bytes: u64, is_64bit: bool) -> Bar {
        Bar {
            index: 0,
            size_bytes,
            is_64bit,
            address: 0,
            decoded: false,
        }
    }

    fn windows() -> MemoryWindows {
        MemoryWindows::new(0xc000_0000..0xe800_0000, 0x1_0000_0000..0x2_0000_0000).unwrap()
    }

    #[test]
    fn bars_go_to_the_window_of_their_width_naturally_aligned() {
        let mut windows = windows();
        let small = windows.allocate("_a", &bar(0x1000, true)).unwrap();
        let large = windows.allocate("_b", &bar(0x8_0000, true)).unwrap();
        let low = windows.allocate("_c", &bar(16, false)).unwrap();
        assert_eq!(small.start(), 0x1_ffff_f000);
        assert_eq!(large.start(), 0x1_fff0_0000);
        assert_eq!(low.start(), 0xe7ff_f000);
        windows.free(&large);
        assert_eq!(windows.allocate("_b", &bar(0x8_0000, true)).unwrap(), large);
    }

    #[test]
    fn memory_behind_no_bar_is_at_the_end_of_the_window_and_aligned() {
        let mut windows = windows();
        let first = windows.allocate_memory("_p", 6 << 20, 2 << 20).unwrap();
        assert_eq!(first.start(), 0x2_0000_0000 - (6 << 20));
        let second = windows.allocate_memory("_q", 2 << 20, 2 << 20).unwrap();
        assert_eq!(second.end(), first.start() - 1);
        assert!(!windows.take(first.start(), first.len()), "taken");
        let error = windows.allocate_memory("_r", 4 << 30, 2 << 20).unwrap_err();
        assert!(error.to_string().contains("memory of _r"), "{error}");
        windows.free(&first);
        assert!(windows.take(first.start(), first.len()));
    }

    #[test]
    fn impossible_bars_are_refused() {
        let mut windows = windows();
        for bytes in [0, 8, 0x1800] {
            assert!(matches!(
                windows.allocate("_a", &bar(bytes, true)),
                Err(PciError::BarSize { .. })
            ));
        }
        assert!(matches!(
            windows.allocate("_a", &bar(1 << 40, true)),
            Err(PciError::NoAddressSpace { .. })
        ));
    }

    #[test]
    fn only_ranges_inside_one_window_are_forwarded() {
        let windows = windows();
        assert!(windows.forwards(0xc000_0000, 0x1000));
        assert!(windows.forwards(0x1_ffff_f000, 0x1000));
        assert!(!windows.forwards(0x1_ffff_f000, 0x1001));
        assert!(!windows.forwards(0, 0x1000));
        assert!(!windows.forwards(u64::MAX, 2));
    }
}
