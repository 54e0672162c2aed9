//! The data of a disk that its configuration half, its queues and the VMM's handle share.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::BlockParams;
use super::counters::BlockCounters;
use super::image::Image;
use super::job;
use super::request::Rules;
use crate::config_interrupt::ConfigInterrupt;

pub(super) const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Data shared by both halves and the handle.
pub(super) struct DiskState {
    pub(super) params: BlockParams,
    pub(super) image: Arc<Image>,
    pub(super) serial: [u8; SERIAL_BYTES],
    /// Changed by a resize.
    pub(super) capacity_sectors: AtomicU64,
    pub(super) writeback: AtomicBool,
    pub(super) counters: BlockCounters,
    pub(super) interrupt: ConfigInterrupt,
}

crate::debug_fields!(DiskState { params, image });

impl DiskState {
    pub(super) fn rules(&self) -> Rules {
        Rules {
            capacity_sectors: self.capacity_sectors.load(Ordering::Acquire),
            readonly: self.params.readonly,
            discard: !self.params.readonly && self.params.sparse,
            write_zeroes: !self.params.readonly,
            unmap: self.params.sparse,
            guards_format: self.params.format.is_none() && self.image.is_flat(),
        }
    }

    /// Padded with zeroes to the 20 bytes of GET_ID.
    pub(super) fn serial(&self) -> &[u8] {
        &self.serial
    }

    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    pub(super) fn is_readonly(&self) -> bool {
        self.params.readonly
    }

    /// Changes the size that the guest sees, and notifies the guest.
    pub(super) fn set_capacity(&self, sectors: u64) {
        self.capacity_sectors.store(sectors, Ordering::Release);
        self.interrupt.signal();
    }

    pub(super) fn has_own_discard(&self) -> bool {
        self.image.has_own_discard()
    }

    /// Maximum number of bytes that one operation discards.
    pub(super) fn discard_piece_bytes(&self) -> u64 {
        let container = self.image.container();
        job::discard_piece_bytes(container.map(|container| container.cluster_bytes()))
    }

    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    pub(super) fn counters(&self) -> &BlockCounters {
        &self.counters
    }

    pub(super) fn id(&self) -> &str {
        &self.params.id
    }

    pub(super) fn path(&self) -> &Path {
        &self.params.path
    }
}
