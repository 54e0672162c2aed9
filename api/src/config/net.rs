//! Network interfaces.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use super::mac::MacAddr;
use super::rate_limit::RateLimiterConfig;
use super::serde_rules::{enabled, is_false};

/// Queues of an interface that does not say otherwise: one pair.
pub const DEFAULT_NET_NUM_QUEUES: usize = 2;
/// Entries of each queue of an interface that does not say otherwise.
pub const DEFAULT_NET_QUEUE_SIZE: u16 = 256;
/// What stands for a descriptor that was not handed over on this connection.
pub const INVALID_FD: i32 = -1;

/// One virtio-net interface.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct NetConfig {
    /// Name of the tap device; created when it does not exist, generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Address given to the tap device on the host; left as it is when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Netmask that goes with `ip`, of the same address family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<IpAddr>,
    /// Ethernet address of the guest's interface; a random local one when absent in the input.
    #[serde(default = "MacAddr::random_local")]
    pub mac: MacAddr,
    /// Ethernet address given to the tap device on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddr>,
    /// Largest packet, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Put the device behind the virtual IOMMU.
    #[serde(default, skip_serializing_if = "is_false")]
    pub iommu: bool,
    /// Number of queues, two for each pair.
    #[serde(default = "default_num_queues")]
    pub num_queues: usize,
    /// Entries in each queue, a power of two.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// Served by a vhost-user process.
    #[serde(default)]
    pub vhost_user: bool,
    /// Socket of that process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost_socket: Option<PathBuf>,
    /// Which side of that socket connects.
    #[serde(default)]
    pub vhost_mode: VhostMode,
    /// Name of the device; generated when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Open tap devices, one for each queue pair. A number in JSON means nothing in another process, so every one reads
    /// as [`INVALID_FD`]; the real descriptors travel beside the request.
    #[serde(
        default,
        deserialize_with = "invalid_fds",
        skip_serializing_if = "Option::is_none"
    )]
    pub fds: Option<Vec<i32>>,
    /// The interface's rate limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// PCI segment the device is put on.
    #[serde(default)]
    pub pci_segment: u16,
    /// Slot on that segment; the next free one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Offer TCP segmentation offload.
    #[serde(default = "enabled")]
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload.
    #[serde(default = "enabled")]
    pub offload_ufo: bool,
    /// Offer checksum offload.
    #[serde(default = "enabled")]
    pub offload_csum: bool,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            ip: None,
            mask: None,
            mac: MacAddr::random_local(),
            host_mac: None,
            mtu: None,
            iommu: false,
            num_queues: DEFAULT_NET_NUM_QUEUES,
            queue_size: DEFAULT_NET_QUEUE_SIZE,
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::default(),
            id: None,
            fds: None,
            rate_limiter_config: None,
            pci_segment: 0,
            pci_device_id: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

fn default_num_queues() -> usize {
    DEFAULT_NET_NUM_QUEUES
}

fn default_queue_size() -> u16 {
    DEFAULT_NET_QUEUE_SIZE
}

fn invalid_fds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<i32>>, D::Error> {
    let named = Option::<Vec<i32>>::deserialize(deserializer)?;
    Ok(named.map(|fds| vec![INVALID_FD; fds.len()]))
}

/// Which side of a vhost-user socket connects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum VhostMode {
    /// The VMM connects.
    #[default]
    Client,
    /// The VMM listens.
    Server,
}
