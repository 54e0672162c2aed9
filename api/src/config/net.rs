//! Network interfaces.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use super::mac::MacAddr;
use super::rate_limit::RateLimiterConfig;
use super::serde_rules::{enabled, is_false};
use crate::options::{OptionError, Options};

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

impl NetConfig {
    /// Syntax of `--net`.
    pub const SYNTAX: &str = "Network parameters \"tap=<if_name>,ip=<ip_addr>,mask=<net_mask>,mac=<mac_addr>,\
        fd=<fd1,fd2...>,host_mac=<mac_addr>,mtu=<bytes>,iommu=on|off,num_queues=<number_of_queues>,\
        queue_size=<size_of_each_queue>,id=<device_id>,\
        vhost_user=<vhost_user_enable>,socket=<vhost_user_socket_path>,vhost_mode=client|server,\
        bw_size=<bytes>,bw_one_time_burst=<bytes>,bw_refill_time=<ms>,\
        ops_size=<io_ops>,ops_one_time_burst=<io_ops>,ops_refill_time=<ms>,\
        pci_segment=<segment_id>,pci_device_id=<pci_slot>,\
        offload_tso=on|off,offload_ufo=on|off,offload_csum=on|off\"";

    /// Reads the value of one `--net`. Descriptors named here are the calling process's own.
    ///
    /// # Errors
    /// An unknown key or a malformed value.
    pub fn parse(text: &str) -> Result<Self, OptionError> {
        let options = Options::parse("net", text, NET_KEYS, &[])?;
        Ok(Self {
            tap: options.string("tap"),
            ip: options.parsed("ip")?,
            mask: options.parsed("mask")?,
            mac: options.parsed("mac")?.unwrap_or_else(MacAddr::random_local),
            host_mac: options.parsed("host_mac")?,
            mtu: options.parsed("mtu")?,
            iommu: options.toggle("iommu")?.unwrap_or(false),
            num_queues: options
                .parsed("num_queues")?
                .unwrap_or(DEFAULT_NET_NUM_QUEUES),
            queue_size: options
                .parsed("queue_size")?
                .unwrap_or(DEFAULT_NET_QUEUE_SIZE),
            vhost_user: options.toggle("vhost_user")?.unwrap_or(false),
            vhost_socket: options.text("socket").map(PathBuf::from),
            vhost_mode: options
                .word(
                    "vhost_mode",
                    &[("client", VhostMode::Client), ("server", VhostMode::Server)],
                )?
                .unwrap_or_default(),
            id: options.string("id"),
            fds: options.integers("fd")?,
            rate_limiter_config: RateLimiterConfig::from_options(&options)?,
            pci_segment: options.parsed("pci_segment")?.unwrap_or(0),
            pci_device_id: options.parsed("pci_device_id")?,
            offload_tso: options.toggle("offload_tso")?.unwrap_or(true),
            offload_ufo: options.toggle("offload_ufo")?.unwrap_or(true),
            offload_csum: options.toggle("offload_csum")?.unwrap_or(true),
        })
    }
}

const NET_KEYS: &[&str] = &[
    "tap",
    "ip",
    "mask",
    "mac",
    "fd",
    "host_mac",
    "mtu",
    "iommu",
    "num_queues",
    "queue_size",
    "id",
    "vhost_user",
    "socket",
    "vhost_mode",
    "bw_size",
    "bw_one_time_burst",
    "bw_refill_time",
    "ops_size",
    "ops_one_time_burst",
    "ops_refill_time",
    "pci_segment",
    "pci_device_id",
    "offload_tso",
    "offload_ufo",
    "offload_csum",
];
