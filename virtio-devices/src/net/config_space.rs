//! Device configuration space and feature bits (virtio 1.2 §5.1.3, §5.1.4).

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::params::NetParams;

/// Bytes of `struct virtio_net_config` up to and including the MTU.
pub(super) const CONFIG_BYTES: usize = 12;

/// The feature bits of offloads that the guest can receive, with the kernel's names.
const GUEST_TO_TUN: [(u32, u32); 5] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];

/// The union of those bits.
pub(super) const GUEST_OFFLOADS: u64 = set(&[
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
]);

const fn set(bits: &[u32]) -> u64 {
    let mut set = 0;
    let mut at = 0;
    while at < bits.len() {
        set |= 1 << bits[at];
        at += 1;
    }
    set
}

/// Whether a set of features contains a bit.
pub(crate) fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// `TUN_F_*` for a set of guest offload bits. The kernel rejects segmentation without checksum offload, so the result
/// is empty without checksum offload.
pub(super) fn tun_offloads(features: u64) -> u32 {
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    GUEST_TO_TUN
        .iter()
        .filter(|(bit, _)| has(features, *bit))
        .fold(0, |offloads, (_, offload)| offloads | offload)
}

/// Feature bits on offer.
pub(super) fn features(params: &NetParams) -> u64 {
    let mut features = set(&[
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CTRL_VQ,
    ]);
    if params.mtu.is_some() {
        features |= set(&[VIRTIO_NET_F_MTU]);
    }
    if params.num_queues > 2 {
        features |= set(&[VIRTIO_NET_F_MQ]);
    }
    if !params.offload_csum {
        return features;
    }
    features |= set(&[
        VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
    ]);
    if params.offload_tso {
        features |= set(&[
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ]);
    }
    if params.offload_ufo {
        features |= set(&[VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_UFO]);
    }
    features
}

/// The configuration space as bytes; every field is little-endian. The status field is not offered, so the link is
/// always up.
pub(super) fn bytes(params: &NetParams) -> [u8; CONFIG_BYTES] {
    let mut space = [0; CONFIG_BYTES];
    space[..6].copy_from_slice(&params.mac);
    space[8..10].copy_from_slice(&(params.num_queues / 2).to_le_bytes());
    space[10..12].copy_from_slice(&params.mtu.unwrap_or(0).to_le_bytes());
    space
}
