//! Properties of each device type: the feature bits that a back end may offer, and the configuration space.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

/// Features, common to all device types, that the back end implements.
pub(crate) const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// Virtio device ids.
const VIRTIO_ID_BLOCK: u32 = 2;
const VIRTIO_ID_NET: u32 = 1;
/// Up to and including `unused1` (virtio 1.1 §5.2.4): what every back end of today has.
const BLOCK_CONFIG_BYTES: usize = 60;
const BLOCK_SEG_MAX: usize = 12;
const BLOCK_NUM_QUEUES: usize = 34;
/// Up to and including `mtu`.
const NET_CONFIG_BYTES: usize = 12;
/// The descriptors of a request besides its data: header and status.
const BLOCK_DESCRIPTORS: u32 = 2;

/// Every type of device has its own bits here (virtio 1.2 §2.2), and the rest belongs to the ring and the transport.
const DEVICE_FEATURES: u64 = ((1 << 24) - 1) | !((1 << 50) - 1);
/// The protocol's limit (`VHOST_USER_MAX_CONFIG_SIZE`).
const CONFIG_BYTES_MAX: usize = 256;

/// The part of the configuration space that the front end reads.
#[derive(Debug, Clone, Copy)]
pub(super) enum ConfigSize {
    /// The driver needs all of it.
    Exactly(usize),
    /// As much as the back end has.
    UpTo(usize),
}

/// The source of the configuration space.
#[derive(Debug, Clone, Copy)]
enum ConfigSpace {
    /// From the back end.
    AsItIs,
    /// From the back end, with the queues of the front end.
    Block,
    /// From the front end.
    Net([u8; NET_CONFIG_BYTES]),
}

/// A type of device.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// Virtio device id.
    pub(super) device_type: u32,
    /// Feature bits that are passed from the back end to the driver.
    pub(super) features: u64,
    /// Feature bits of the front end, which are not passed to the back end.
    pub(super) own_features: u64,
    config: ConfigSpace,
    /// Number of pairs of queues of a network interface.
    pairs: u16,
}

/// Settings of a network interface that the front end decides.
#[derive(Debug, Clone, Copy)]
pub struct NetProfile {
    /// The guest's address.
    pub mac: [u8; 6],
    /// The largest packet, bytes.
    pub mtu: Option<u16>,
    /// Number of pairs of queues. With several, there is a control queue, which the front end serves.
    pub pairs: u16,
    /// Offer TCP segmentation offload, if the back end has it.
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload, if the back end has it.
    pub offload_ufo: bool,
    /// Offer checksum offload, if the back end has it.
    pub offload_csum: bool,
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
            features: RING_FEATURES | mask(&bits),
            own_features: 0,
            config: ConfigSpace::Block,
            pairs: 0,
        }
    }

    /// A network interface. Several pairs need a back end that has them.
    #[must_use]
    pub fn net(net: &NetProfile) -> Self {
        let mut bits = vec![VIRTIO_NET_F_MRG_RXBUF];
        if net.offload_csum {
            bits.extend([VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]);
        }
        if net.offload_tso {
            bits.extend([
                VIRTIO_NET_F_HOST_TSO4,
                VIRTIO_NET_F_HOST_TSO6,
                VIRTIO_NET_F_HOST_ECN,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN,
            ]);
        }
        if net.offload_ufo {
            bits.extend([VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);
        }
        let mut own = vec![VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS];
        if net.pairs > 1 {
            bits.push(VIRTIO_NET_F_MQ);
            own.push(VIRTIO_NET_F_CTRL_VQ);
        }
        own.extend(net.mtu.map(|_| VIRTIO_NET_F_MTU));
        // mac, status, max_virtqueue_pairs, mtu (virtio 1.2 §5.1.4).
        let mut config = [0; NET_CONFIG_BYTES];
        config[..6].copy_from_slice(&net.mac);
        config[6] = VIRTIO_NET_S_LINK_UP as u8;
        config[8..10].copy_from_slice(&net.pairs.to_le_bytes());
        config[10..].copy_from_slice(&net.mtu.unwrap_or(0).to_le_bytes());
        Self {
            device_type: VIRTIO_ID_NET,
            features: RING_FEATURES | mask(&bits),
            own_features: mask(&own),
            config: ConfigSpace::Net(config),
            pairs: net.pairs,
        }
    }

    /// A device of which the front end knows only the virtio device id.
    #[must_use]
    pub fn of_type(device_type: u32) -> Self {
        Self {
            device_type,
            features: RING_FEATURES | DEVICE_FEATURES,
            own_features: 0,
            config: ConfigSpace::AsItIs,
            pairs: 0,
        }
    }

    /// Whether it is a network interface with several pairs of queues, and so with a control queue.
    pub(crate) fn has_several_pairs(&self) -> bool {
        self.pairs > 1
    }

    pub(super) fn pairs(&self) -> u16 {
        self.pairs
    }

    /// The configuration space that the front end reads from the back end.
    pub(super) fn config_size(&self) -> ConfigSize {
        match self.config {
            ConfigSpace::AsItIs => ConfigSize::UpTo(CONFIG_BYTES_MAX),
            ConfigSpace::Block => ConfigSize::Exactly(BLOCK_CONFIG_BYTES),
            ConfigSpace::Net(_) => ConfigSize::UpTo(0),
        }
    }

    /// The configuration space that the driver reads.
    pub(super) fn complete(&self, mut config: Vec<u8>, queue_sizes: &[u16]) -> Vec<u8> {
        match self.config {
            ConfigSpace::AsItIs => config,
            ConfigSpace::Block => {
                complete_block(&mut config, queue_sizes);
                config
            }
            ConfigSpace::Net(own) => own.to_vec(),
        }
    }

    /// Whether a configuration space can have this size.
    pub(super) fn has_config_of(&self, bytes: usize) -> bool {
        match self.config {
            ConfigSpace::AsItIs => bytes <= CONFIG_BYTES_MAX,
            ConfigSpace::Block => bytes == BLOCK_CONFIG_BYTES,
            ConfigSpace::Net(own) => bytes == own.len(),
        }
    }
}

fn mask(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |features, bit| features | 1 << bit)
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
