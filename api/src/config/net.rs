//! Configuration of network interfaces.

use std::net::IpAddr;
use std::path::PathBuf;

use api_macros::{Words, section};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use super::mac::MacAddr;
use super::rate_limit::{RATE_LIMIT_KEYS, RateLimiterConfig};
use crate::bounded;

/// Default number of queues of an interface: one pair.
pub const DEFAULT_NET_NUM_QUEUES: usize = 2;
/// Default number of entries in each queue of an interface.
pub const DEFAULT_NET_QUEUE_SIZE: u16 = 256;
/// Placeholder for a descriptor that was not received on this connection.
pub const INVALID_FD: i32 = -1;

/// One virtio-net interface.
#[section(option = "net", about = "Network parameters")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Name of the tap device. It is created if it does not exist. The name is generated when absent.
    #[key("<if_name>")]
    pub tap: Option<String>,
    /// Address given to the tap device on the host; left unchanged when absent.
    #[key]
    pub ip: Option<IpAddr>,
    /// Netmask of `ip`, of the same address family.
    #[key("<net_mask>")]
    pub mask: Option<IpAddr>,
    /// Ethernet address of the guest's interface; if absent in the input, a random local one.
    #[key(default = MacAddr::random_local(), fresh)]
    pub mac: MacAddr,
    /// Ethernet address given to the tap device on the host.
    #[key]
    pub host_mac: Option<MacAddr>,
    /// Largest packet in bytes.
    #[key("<mtu>")]
    pub mtu: Option<u16>,
    /// Put the device behind the virtual IOMMU. Unsupported with `vhost_user`.
    #[key(omit_false)]
    pub iommu: bool,
    /// Number of queues, two per pair. An odd number adds the control queue. At most one pair per vCPU.
    #[key("<number_of_queues>", default = DEFAULT_NET_NUM_QUEUES)]
    pub num_queues: usize,
    /// Entries in each queue, a power of two.
    #[key("<size_of_each_queue>", default = DEFAULT_NET_QUEUE_SIZE)]
    pub queue_size: u16,
    /// Served by a vhost-user back end at `socket`, which has the host's side. Needs shared memory.
    #[key]
    pub vhost_user: bool,
    /// Socket of the vhost-user back end.
    #[key("<vhost_user_socket_path>", name = "socket")]
    pub vhost_socket: Option<PathBuf>,
    /// Which side of the vhost-user socket connects.
    #[key]
    pub vhost_mode: VhostMode,
    /// Name of the device; generated when absent.
    #[key("<device_id>")]
    pub id: Option<String>,
    /// File descriptors of open tap devices, one for each queue pair. Over the API, the descriptors come with the
    /// request (SCM_RIGHTS), and every number in JSON reads as -1. On the command line, the numbers are those of
    /// descriptors that the process inherits.
    #[key("<fd1,fd2...>", name = "fd")]
    #[serde(deserialize_with = "invalid_fds")]
    pub fds: Option<Vec<i32>>,
    /// The interface's rate limit.
    #[key(group = RATE_LIMIT_KEYS)]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// PCI segment of the device.
    #[key("<segment_id>")]
    pub pci_segment: u16,
    /// PCI slot on the segment; the next free one when absent.
    #[key("<pci_slot>")]
    pub pci_device_id: Option<u8>,
    /// Offer TCP segmentation offload.
    #[key(default = true)]
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload.
    #[key(default = true)]
    pub offload_ufo: bool,
    /// Offer checksum offload.
    #[key(default = true)]
    pub offload_csum: bool,
}

fn invalid_fds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<i32>>, D::Error> {
    let named = bounded::optional_list::<D, i32>(deserializer)?;
    Ok(named.map(|fds| vec![INVALID_FD; fds.len()]))
}

/// Which side of a vhost-user socket connects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, JsonSchema, Words)]
pub enum VhostMode {
    /// The VMM connects.
    #[default]
    #[word("client")]
    Client,
    /// The VMM listens.
    #[word("server")]
    Server,
}
