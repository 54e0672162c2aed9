//! One queue, set up by the driver (virtio 1.2 §2.7, §4.1.4.3).

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

/// Bytes of a descriptor, of an available and of a used element.
const DESC_BYTES: u64 = 16;
const AVAIL_ELEM_BYTES: u64 = 2;
const USED_ELEM_BYTES: u64 = 8;
/// `flags`, `idx` and the event index of either ring.
const RING_META_BYTES: u64 = 6;

/// Reasons why a queue is unusable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingFault {
    #[error("{ring} at {address:#x} is not aligned to {align} bytes")]
    Misaligned {
        ring: &'static str,
        address: u64,
        align: u64,
    },
    #[error(
        "{ring} at {address:#x} with {bytes} bytes is not in guest RAM, or not mapped by the virtual IOMMU"
    )]
    OutsideRam {
        ring: &'static str,
        address: u64,
        bytes: u64,
    },
}

/// The registers of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueueConfig {
    /// Offered maximum size.
    pub(super) max_size: u16,
    /// Size chosen by the driver.
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
}

impl QueueConfig {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }

    /// Sets the size. False if it is invalid for a split queue.
    pub(super) fn set_size(&mut self, size: u16) -> bool {
        let valid = size.is_power_of_two() && size <= self.max_size;
        if valid {
            self.size = size;
        }
        valid
    }

    /// Builds the queue, if all of its rings are in RAM and aligned.
    pub(super) fn build<M: GuestMemory>(
        &self,
        mem: &M,
        event_idx: bool,
    ) -> Result<Queue, RingFault> {
        let entries = u64::from(self.size);
        let rings = [
            (
                "descriptor table",
                self.desc_table,
                DESC_BYTES * entries,
                16,
                Permissions::Read,
            ),
            (
                "available ring",
                self.avail_ring,
                RING_META_BYTES + AVAIL_ELEM_BYTES * entries,
                2,
                Permissions::Read,
            ),
            (
                "used ring",
                self.used_ring,
                RING_META_BYTES + USED_ELEM_BYTES * entries,
                4,
                Permissions::ReadWrite,
            ),
        ];
        for (ring, address, bytes, align, access) in rings {
            if !address.is_multiple_of(align) {
                return Err(RingFault::Misaligned {
                    ring,
                    address,
                    align,
                });
            }
            let length = usize::try_from(bytes).expect("at most 32768 entries");
            // A driver that never set the address leaves it zero, and the queue code treats zero as "not ready".
            if address == 0 || !mem.check_range(GuestAddress(address), length, access) {
                return Err(RingFault::OutsideRam {
                    ring,
                    address,
                    bytes,
                });
            }
        }
        let mut queue = Queue::new(self.max_size).expect("checked when the function was made");
        queue.set_size(self.size);
        let aligned = "alignment was checked above";
        queue
            .try_set_desc_table_address(GuestAddress(self.desc_table))
            .expect(aligned);
        queue
            .try_set_avail_ring_address(GuestAddress(self.avail_ring))
            .expect(aligned);
        queue
            .try_set_used_ring_address(GuestAddress(self.used_ring))
            .expect(aligned);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}
