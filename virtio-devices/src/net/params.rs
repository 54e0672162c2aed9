//! Everything that makes a network device, and why it cannot be made.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use super::tap::TapError;

/// Largest queue: the kernel takes 1024 vectors in one call.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Most pairs of queues; what the kernel's tap has at most.
pub const PAIRS_MAX: u16 = 256;

/// Where frames come from and go to.
#[derive(Debug)]
pub enum Backend {
    /// A tap made or opened by name.
    Tap {
        /// Its name; the kernel picks a `vmtapN` if absent.
        name: Option<String>,
        /// Address and mask for the host's side.
        ip: Option<(Ipv4Addr, Ipv4Addr)>,
        /// Hardware address of the host's side.
        host_mac: Option<[u8; 6]>,
    },
    /// Queues of a tap that somebody has opened and configured.
    Fds(Vec<OwnedFd>),
}

/// Everything that makes a network device.
#[derive(Debug)]
pub struct NetParams {
    /// Names the worker threads, e.g. `_net0`.
    pub id: String,
    /// The tap.
    pub backend: Backend,
    /// Hardware address of the guest's side.
    pub mac: [u8; 6],
    /// MTU to set on the tap and to offer to the guest.
    pub mtu: Option<u16>,
    /// Receive and transmit queues together: even, from 2 to twice [`PAIRS_MAX`].
    pub num_queues: u16,
    /// Entries of each: a power of two from 4 to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// Offer TCP segmentation offload.
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload.
    pub offload_ufo: bool,
    /// Offer checksum offload; the others need it.
    pub offload_csum: bool,
}

/// Why a network device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Number of queues out of range.
    #[error("{num_queues} queues are not possible: an even number from 2 to 512 is")]
    QueueCount {
        /// What was asked for.
        num_queues: u16,
    },
    /// Queue size out of range.
    #[error("queue size {queue_size} is not a power of two from 4 to {QUEUE_SIZE_MAX}")]
    QueueSize {
        /// What was asked for.
        queue_size: u16,
    },
    /// A descriptor is needed for each pair.
    #[error("{fds} file descriptors do not fit {num_queues} queues: one for each two is needed")]
    FdCount {
        /// Descriptors given.
        fds: usize,
        /// Queues asked for.
        num_queues: u16,
    },
    /// Below the least that IPv4 allows.
    #[error("MTU {mtu} is less than 68")]
    Mtu {
        /// What was asked for.
        mtu: u16,
    },
    /// A multicast address cannot be anybody's own.
    #[error("hardware address is a multicast address")]
    MulticastMac,
    /// The tap.
    #[error("cannot use the tap device")]
    Tap(#[from] TapError),
    /// Descriptors of our own.
    #[error("cannot make the event descriptors of a queue pair")]
    Events(#[source] std::io::Error),
}
