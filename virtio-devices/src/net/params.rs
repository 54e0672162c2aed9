//! Parameters of a network device, and the errors of creating one.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::tap::TapError;
use crate::rate_limit::{RateLimiter, RateLimits};

/// Maximum queue size: the kernel accepts 1024 vectors in one call.
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Maximum number of queue pairs; the limit of the kernel's tap.
pub const PAIRS_MAX: u16 = 256;

/// The source and destination of frames.
#[derive(Debug)]
pub enum Backend {
    /// A tap created or opened by name.
    Tap {
        /// Its name; if absent, the kernel chooses a `vmtapN`.
        name: Option<String>,
        /// Address and mask for the host's side.
        ip: Option<(Ipv4Addr, Ipv4Addr)>,
        /// Hardware address of the host's side.
        host_mac: Option<[u8; 6]>,
    },
    /// Queues of a tap that another process has opened and configured.
    Fds(Vec<OwnedFd>),
}

/// Parameters of a network device.
#[derive(Debug)]
pub struct NetParams {
    /// Used in the names of the worker threads, e.g. `_net0`.
    pub id: String,
    /// The tap.
    pub backend: Backend,
    /// Hardware address of the guest's side.
    pub mac: [u8; 6],
    /// MTU to set on the tap and to offer to the guest.
    pub mtu: Option<u16>,
    /// Receive and transmit queues together: even, from 2 to twice [`PAIRS_MAX`].
    pub num_queues: u16,
    /// Entries of each queue: a power of two from 4 to [`QUEUE_SIZE_MAX`].
    pub queue_size: u16,
    /// Offer TCP segmentation offload.
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload.
    pub offload_ufo: bool,
    /// Offer checksum offload; the other offloads need it.
    pub offload_csum: bool,
    /// Limits on all pairs together.
    pub limiters: NetLimiters,
}

/// The rate limits of an interface. They apply to each direction separately.
#[derive(Debug, Clone, Default)]
pub struct NetLimiters {
    /// Frames to the guest.
    pub receive: Arc<RateLimiter>,
    /// Frames from the guest.
    pub transmit: Arc<RateLimiter>,
}

impl NetLimiters {
    /// Full buckets for each direction.
    #[must_use]
    pub fn new(limits: RateLimits) -> Self {
        Self {
            receive: Arc::new(RateLimiter::new(limits)),
            transmit: Arc::new(RateLimiter::new(limits)),
        }
    }

    /// Replaces the limits of both directions, as in [`RateLimiter::set`].
    pub fn set(&self, limits: RateLimits) {
        self.receive.set(limits);
        self.transmit.set(limits);
    }
}

/// Errors of creating a network device.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Number of queues out of range.
    #[error("num_queues must be an even number between 2 and 512; got {num_queues}")]
    QueueCount {
        /// The requested value.
        num_queues: u16,
    },
    /// Queue size out of range.
    #[error("queue size {queue_size} is not a power of two from 4 to {QUEUE_SIZE_MAX}")]
    QueueSize {
        /// The requested value.
        queue_size: u16,
    },
    /// One descriptor per pair is required.
    #[error("num_queues={num_queues} needs one file descriptor per queue pair; got {fds}")]
    FdCount {
        /// Descriptors given.
        fds: usize,
        /// Queues requested.
        num_queues: u16,
    },
    /// Below the minimum that IPv4 allows.
    #[error("mtu must be at least 68; got {mtu}")]
    Mtu {
        /// The requested value.
        mtu: u16,
    },
    /// A multicast address cannot belong to an interface.
    #[error("hardware address is a multicast address")]
    MulticastMac,
    /// An error of the tap.
    #[error("cannot use the tap device")]
    Tap(#[from] TapError),
    /// The device has no descriptors for its own events.
    #[error("cannot create the event descriptors of a queue pair")]
    Events(#[source] std::io::Error),
}
