//! Device configuration space and feature bits (virtio 1.2 §5.2.3, §5.2.4).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::image::Topology;
use super::{BlockParams, DATA_BYTES_MAX, SECTOR_BYTES, WRITE_ZEROES_SECTORS_MAX};

/// Bytes of `struct virtio_blk_config` up to and including write zeroes.
pub(super) const CONFIG_BYTES: usize = 60;
/// Offset of the only writable field.
pub(super) const WRITEBACK_AT: usize = 32;

/// Maximum number of sectors in one discard request: this device sets no limit.
const DISCARD_SECTORS_MAX: u32 = u32::MAX;
/// Maximum number of ranges in one discard or write zeroes request. With a limit of one, each request is one operation.
const RANGES_MAX: u32 = 1;

/// Whether a set of features contains a bit.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Feature bits on offer.
pub(super) fn features(params: &BlockParams) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
    ];
    if params.num_queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    if params.readonly {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
        if params.sparse {
            bits.push(VIRTIO_BLK_F_DISCARD);
        }
    }
    bits.into_iter().fold(0, |set, bit| set | 1 << bit)
}

/// Maximum length of a segment: the maximum number of segments per request holds at most as much data as a request may
/// move. A power of two, so that pages and sectors divide it evenly.
fn segment_bytes_max(segments: u32) -> u32 {
    // At most DATA_BYTES_MAX, which has 27 bits.
    let bytes = (DATA_BYTES_MAX / u64::from(segments.max(1))) as u32;
    1 << bytes.ilog2()
}

/// The configuration space as bytes; every field is little-endian.
pub(super) fn bytes(
    params: &BlockParams,
    topology: Topology,
    capacity_sectors: u64,
    writeback: bool,
) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    let mut put = |at: usize, field: &[u8]| space[at..at + field.len()].copy_from_slice(field);
    put(0, &capacity_sectors.to_le_bytes());
    // Header and status use two descriptors of a ring; an indirect table is limited to the same size.
    let segments = u32::from(params.queue_size - 2);
    put(8, &segment_bytes_max(segments).to_le_bytes());
    put(12, &segments.to_le_bytes());
    put(20, &topology.logical.to_le_bytes());
    let per_physical = (topology.physical / topology.logical).max(1);
    put(24, &[per_physical.ilog2() as u8, 0]);
    let min_io_blocks = u16::try_from(topology.io_min / topology.logical).unwrap_or(u16::MAX);
    put(26, &min_io_blocks.to_le_bytes());
    put(28, &(topology.io_opt / topology.logical).to_le_bytes());
    put(WRITEBACK_AT, &[u8::from(writeback)]);
    put(34, &params.num_queues.to_le_bytes());
    if !params.readonly {
        let alignment_sectors = topology.discard / SECTOR_BYTES as u32;
        if params.sparse {
            put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
            put(40, &RANGES_MAX.to_le_bytes());
            put(44, &alignment_sectors.to_le_bytes());
        }
        put(48, &WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
        put(52, &RANGES_MAX.to_le_bytes());
        put(56, &[u8::from(params.sparse)]);
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_of_one_request_are_no_more_than_it_may_move() {
        for queue_size in [4_u32, 128, 1024] {
            let segments = queue_size - 2;
            let bytes = segment_bytes_max(segments);
            assert!(u64::from(bytes) * u64::from(segments) <= DATA_BYTES_MAX);
            assert!(u64::from(bytes) >= 16 * 4096);
        }
        assert_eq!(segment_bytes_max(126), 512 << 10);
    }
}
