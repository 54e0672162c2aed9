//! What the front end knows of each type of device: which feature bits a back end may offer, and the configuration space.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::RING_FEATURES;

/// Virtio device id.
const VIRTIO_ID_BLOCK: u32 = 2;
/// Up to and including `unused1` (virtio 1.1 §5.2.4): what every back end of today has.
const BLOCK_CONFIG_BYTES: usize = 60;
const BLOCK_SEG_MAX: usize = 12;
const BLOCK_NUM_QUEUES: usize = 34;
/// The descriptors of a request besides its data: header and status.
const BLOCK_DESCRIPTORS: u32 = 2;

/// A type of device.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// Virtio device id.
    pub(super) device_type: u32,
    /// Feature bits that are passed from the back end to the driver.
    pub(super) features: u64,
    /// Size of the configuration space.
    pub(super) config_bytes: usize,
    /// Puts the front end's values into the configuration space.
    pub(super) complete: fn(&mut [u8], &[u16]),
}

impl Profile {
    /// A disk. Without CONFIG_WCE, because the cache mode would be state of the back end, and lost with it.
    #[must_use]
    pub fn block() -> Self {
        let bits = [
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_GEOMETRY,
            VIRTIO_BLK_F_RO,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ];
        Self {
            device_type: VIRTIO_ID_BLOCK,
            features: bits
                .iter()
                .fold(RING_FEATURES, |features, bit| features | 1 << bit),
            config_bytes: BLOCK_CONFIG_BYTES,
            complete: complete_block,
        }
    }
}

/// The queues are those of the front end, and a request must fit into one.
fn complete_block(config: &mut [u8], queue_sizes: &[u16]) {
    let count = u16::try_from(queue_sizes.len()).unwrap_or(u16::MAX);
    config[BLOCK_NUM_QUEUES..BLOCK_NUM_QUEUES + 2].copy_from_slice(&count.to_le_bytes());
    let size = queue_sizes.iter().min().copied().unwrap_or(0);
    let fits = u32::from(size).saturating_sub(BLOCK_DESCRIPTORS).max(1);
    let seg_max = &mut config[BLOCK_SEG_MAX..BLOCK_SEG_MAX + 4];
    let told = u32::from_le_bytes(seg_max.try_into().expect("four bytes"));
    seg_max.copy_from_slice(&told.min(fits).to_le_bytes());
}
