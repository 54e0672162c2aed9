//! The configuration half of a network device.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use state::{Bytes, Fields, Part, Saved, State, StateError, parts, require};
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

use super::config_space::{self, CONFIG_BYTES, GUEST_OFFLOADS, has};
use super::control::ControlQueue;
use super::pair::QueuePair;
use super::params::{Backend, NetError, NetLimiters, NetParams, PAIRS_MAX, QUEUE_SIZE_MAX};
use super::shared::NetShared;
use super::tap::{Tap, TapConfig};
use crate::device::{Counters, QueueHandler, VirtioDevice, read_config_space};
use crate::queue::SingleQueue;
use crate::rate_limit::RateLimiterState;
use crate::thread_name::thread_name;

/// Device id (virtio 1.2 §5).
const VIRTIO_ID_NET: u32 = 1;
const QUEUE_SIZE_MIN: u16 = 4;
/// Minimum MTU that IPv4 allows (RFC 791).
const MTU_MIN: u16 = 68;

/// The saved state of a network device beyond its configuration. Frames not yet received are lost, as on any network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetDeviceState {
    /// The configuration space. It must not change.
    pub config: Bytes,
    /// Number of pairs over which frames are distributed.
    pub enabled_pairs: u16,
    /// Feature bits of the offloads that the driver accepts.
    pub offloads: u64,
    /// The rate limit of frames to the guest.
    pub receive_limit: RateLimiterState,
    /// The rate limit of frames from the guest.
    pub transmit_limit: RateLimiterState,
}

impl State for NetDeviceState {
    const PART: Part = parts::NET;

    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        // Version 1 had no limits.
        RateLimiterState::add_none(fields, "receive_limit");
        RateLimiterState::add_none(fields, "transmit_limit");
        Ok(())
    }
}

/// A virtio network device (virtio 1.2 §5.1).
pub struct Net {
    net: Arc<NetShared>,
    features: u64,
    config: [u8; CONFIG_BYTES],
    queue_sizes: Vec<u16>,
    pairs: usize,
    limiters: NetLimiters,
    handlers: Vec<Box<dyn QueueHandler>>,
}

crate::debug_fields!(Net { net });

impl Net {
    /// Opens and configures the tap. Dropping the device releases everything; a tap that was created here disappears.
    ///
    /// # Errors
    /// See [`NetError`]; nothing is left behind.
    pub fn new(mut params: NetParams) -> Result<Self, NetError> {
        check(&params)?;
        let pairs = params.num_queues / 2;
        let taps = match &mut params.backend {
            Backend::Tap { name, ip, host_mac } => {
                let config = TapConfig {
                    ip: *ip,
                    host_mac: *host_mac,
                    mtu: params.mtu,
                };
                Tap::open(name.as_deref(), pairs, config)?
            }
            Backend::Fds(fds) if fds.len() == usize::from(pairs) => {
                Tap::from_fds(std::mem::take(fds))?
            }
            Backend::Fds(fds) => {
                return Err(NetError::FdCount {
                    fds: fds.len(),
                    num_queues: params.num_queues,
                });
            }
        };
        Self::with_taps(&params, taps)
    }

    /// A device on sockets instead of taps, for tests without permission to create taps. They do not block.
    ///
    /// # Errors
    /// The host has no descriptors left.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn on_sockets(
        params: &NetParams,
        sockets: Vec<std::os::fd::OwnedFd>,
    ) -> Result<Self, NetError> {
        let taps = sockets.into_iter().map(Tap::untested).collect();
        Self::with_taps(params, taps)
    }

    /// A device on configured taps, one per pair.
    pub(super) fn with_taps(params: &NetParams, taps: Vec<Tap>) -> Result<Self, NetError> {
        let pairs = taps.len();
        let net = Arc::new(NetShared::new(taps)?);
        let mut handlers: Vec<Box<dyn QueueHandler>> = Vec::new();
        for index in 0..pairs {
            let name = thread_name(&params.id, &format!("_qp{index}"));
            let pair = QueuePair::new(name, Arc::clone(&net), index, params);
            handlers.push(Box::new(pair.map_err(NetError::Events)?));
        }
        let name = thread_name(&params.id, "_ctrl");
        let control = ControlQueue::new(name, Arc::clone(&net));
        handlers.push(Box::new(SingleQueue::new(control)));
        Ok(Self {
            net,
            features: config_space::features(params),
            config: config_space::bytes(params),
            // One additional queue for control.
            queue_sizes: vec![params.queue_size; 2 * pairs + 1],
            pairs,
            limiters: params.limiters.clone(),
            handlers,
        })
    }

    /// Name of the tap on the host.
    pub fn tap_name(&self) -> &str {
        self.net.tap(0).name()
    }
}

fn check(params: &NetParams) -> Result<(), NetError> {
    let NetParams {
        num_queues,
        queue_size,
        mtu,
        mac,
        ..
    } = *params;
    if num_queues % 2 != 0 || !(2..=2 * PAIRS_MAX).contains(&num_queues) {
        return Err(NetError::QueueCount { num_queues });
    }
    if !queue_size.is_power_of_two() || !(QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&queue_size) {
        return Err(NetError::QueueSize { queue_size });
    }
    if let Some(mtu) = mtu
        && mtu < MTU_MIN
    {
        return Err(NetError::Mtu { mtu });
    }
    if mac[0] & 1 != 0 {
        return Err(NetError::MulticastMac);
    }
    Ok(())
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config, offset, data);
    }

    /// No field is writable since virtio 1.0.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.net.counters().bad_requests.count();
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        std::mem::take(&mut self.handlers)
    }

    /// The control queue comes after all pairs if the driver supports several pairs, otherwise after the first (virtio
    /// 1.2 §5.1.2).
    fn handler_of_queue(&self, queue_index: u16, features: u64) -> Option<usize> {
        let control = has(features, VIRTIO_NET_F_CTRL_VQ);
        let pairs = if control && has(features, VIRTIO_NET_F_MQ) {
            self.pairs
        } else {
            1
        };
        let index = usize::from(queue_index);
        if index < 2 * pairs {
            return Some(index / 2);
        }
        (control && index == 2 * pairs).then_some(self.pairs)
    }

    fn state(&self) -> Saved {
        Saved::of(&NetDeviceState {
            config: Bytes(self.config.to_vec()),
            enabled_pairs: self.net.enabled_pairs(),
            offloads: self.net.offloads(),
            receive_limit: self.limiters.receive.state(),
            transmit_limit: self.limiters.transmit.state(),
        })
    }

    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        let state = state.read::<NetDeviceState>()?;
        require(state.config.0 == self.config, parts::NET, "config", || {
            "differs: MAC address, MTU or number of pairs are others".to_owned()
        })?;
        let unknown = state.offloads & !(self.features & GUEST_OFFLOADS);
        require(unknown == 0, parts::NET, "offloads", || {
            format!("has bits {unknown:#x} that are not on offer")
        })?;
        let pairs = state.enabled_pairs;
        let possible = (1..=self.pairs).contains(&usize::from(pairs));
        require(possible, parts::NET, "enabled_pairs", || {
            format!("is {pairs}, there are {}", self.pairs)
        })?;
        let NetLimiters { receive, transmit } = &self.limiters;
        receive.restore(&state.receive_limit, parts::NET, "receive_limit")?;
        transmit.restore(&state.transmit_limit, parts::NET, "transmit_limit")?;
        self.net.enable_pairs(pairs);
        self.net.restore_offloads(state.offloads);
        self.net.set_restored();
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.net.counters().read()
    }
}
