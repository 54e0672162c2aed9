//! The configuration half of a network device, and what both halves share.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config_space::{self, CONFIG_BYTES, has, tun_offloads};
use super::control::ControlQueue;
use super::counters::NetCounters;
use super::pair::QueuePair;
use super::tap::{Tap, TapSettings};
use super::{Backend, NetError, NetParams, PAIRS_MAX, QUEUE_SIZE_MAX};
use crate::device::{Counters, QueueHandler, VirtioDevice};
use crate::queue::SingleQueue;
use crate::thread_name::thread_name;

/// Device id (virtio 1.2 §5).
const VIRTIO_ID_NET: u32 = 1;
const QUEUE_SIZE_MIN: u16 = 4;
/// Least MTU that IPv4 allows (RFC 791).
const MTU_MIN: u16 = 68;

/// What the configuration half and all workers know.
#[derive(Debug)]
pub(super) struct NetState {
    taps: Vec<Tap>,
    /// One per pair: written when the pair is enabled.
    enabled_events: Vec<EventFd>,
    /// Pairs that the tap sends frames to. Held while that changes.
    enabled_pairs: Mutex<u16>,
    counters: NetCounters,
}

impl NetState {
    fn new(taps: Vec<Tap>) -> Result<Self, NetError> {
        let enabled_events = taps
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<Result<_, _>>()
            .map_err(NetError::Events)?;
        let all = taps.len() as u16;
        let net = Self {
            taps,
            enabled_events,
            enabled_pairs: Mutex::new(all),
            counters: NetCounters::default(),
        };
        net.enable_pairs(1);
        Ok(net)
    }

    pub(super) fn tap(&self, pair: usize) -> &Tap {
        &self.taps[pair]
    }

    pub(super) fn enabled_event(&self, pair: usize) -> &EventFd {
        &self.enabled_events[pair]
    }

    pub(super) fn counters(&self) -> &NetCounters {
        &self.counters
    }

    /// Has the tap spread frames over the first `count` pairs: those of a pair
    /// the guest does not look at would be lost. False if there are not so many.
    pub(super) fn enable_pairs(&self, count: u16) -> bool {
        if count == 0 || usize::from(count) > self.taps.len() {
            return false;
        }
        let mut enabled = self
            .enabled_pairs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (low, high) = (count.min(*enabled), count.max(*enabled));
        for pair in usize::from(low)..usize::from(high) {
            // Queues that cannot be switched stay on; frames steered to one the
            // guest ignores are then lost, as on a card without this command.
            if let Err(error) = self.taps[pair].set_enabled(count > *enabled) {
                log::debug!("{}: queue {pair}: {error}", self.taps[pair].name());
            }
            if count > *enabled {
                // An eventfd refuses only after 2^64 - 2 unread writes.
                self.enabled_events[pair].write(1).ok();
            }
        }
        *enabled = count;
        true
    }

    /// Tells the tap what the guest can cope with. False if the kernel refuses.
    pub(super) fn set_offloads(&self, features: u64) -> bool {
        let result = self.taps[0].set_offload(tun_offloads(features));
        if let Err(error) = &result
            && NetCounters::count_loudly(&self.counters.tap_errors)
        {
            log::warn!("{}: setting offloads: {error}", self.taps[0].name());
        }
        result.is_ok()
    }
}

/// A virtio network device (virtio 1.2 §5.1).
pub struct Net {
    net: Arc<NetState>,
    features: u64,
    config: [u8; CONFIG_BYTES],
    queue_sizes: Vec<u16>,
    pairs: usize,
    handlers: Vec<Box<dyn QueueHandler>>,
}

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Net")
            .field("net", &self.net)
            .finish_non_exhaustive()
    }
}

impl Net {
    /// Opens and configures the tap. Everything is given back when the device is
    /// dropped; a tap that was made here vanishes.
    ///
    /// # Errors
    /// See [`NetError`]; nothing is left behind.
    pub fn new(mut params: NetParams) -> Result<Self, NetError> {
        check(&params)?;
        let pairs = params.num_queues / 2;
        let taps = match &mut params.backend {
            Backend::Tap { name, ip, host_mac } => {
                let settings = TapSettings {
                    ip: *ip,
                    host_mac: *host_mac,
                    mtu: params.mtu,
                };
                Tap::open(name.as_deref(), pairs, settings)?
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

    /// A device on taps that are ready, one for each pair.
    pub(super) fn with_taps(params: &NetParams, taps: Vec<Tap>) -> Result<Self, NetError> {
        let pairs = taps.len();
        let net = Arc::new(NetState::new(taps)?);
        let mut handlers: Vec<Box<dyn QueueHandler>> = Vec::new();
        for index in 0..pairs {
            let name = thread_name(&params.id, &format!("_qp{index}"));
            let pair = QueuePair::new(name, Arc::clone(&net), index).map_err(NetError::Events)?;
            handlers.push(Box::new(pair));
        }
        let name = thread_name(&params.id, "_ctrl");
        let control = ControlQueue::new(name, Arc::clone(&net));
        handlers.push(Box::new(SingleQueue::new(control)));
        Ok(Self {
            net,
            features: config_space::features(params),
            config: config_space::bytes(params),
            // One more for the control queue.
            queue_sizes: vec![params.queue_size; 2 * pairs + 1],
            pairs,
            handlers,
        })
    }

    /// Name of the tap on the host.
    pub fn tap_name(&self) -> &str {
        self.net.taps[0].name()
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
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let known = self.config.get(at..).unwrap_or_default();
        let count = known.len().min(data.len());
        data[..count].copy_from_slice(&known[..count]);
        data[count..].fill(0);
    }

    /// No field is writable since virtio 1.0.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        NetCounters::count(&self.net.counters.bad_requests);
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        std::mem::take(&mut self.handlers)
    }

    /// The control queue comes after all pairs if the driver knows of several,
    /// else after the first (virtio 1.2 §5.1.2).
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

    fn counters(&self) -> Counters {
        self.net.counters.snapshot()
    }
}
