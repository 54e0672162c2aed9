//! The configuration half of a network device, and what both halves share.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use state::{Bytes, Part, Saved, State, StateError, parts, require};
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config_space::{self, CONFIG_BYTES, GUEST_OFFLOADS, has, tun_offloads};
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

/// What a network device is besides its configuration. Frames that nobody has taken are lost, as on
/// any network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetDeviceState {
    /// The configuration space; it must be the same again.
    pub config: Bytes,
    /// Pairs that frames are spread over.
    pub enabled_pairs: u16,
    /// Feature bits of the offloads that the driver can cope with.
    pub offloads: u64,
}

impl State for NetDeviceState {
    const PART: Part = parts::NET;
}

/// Marks [`NetState::restored_offloads`] as there; no feature bit.
const RESTORED: u64 = 1 << 63;

/// What the configuration half and all workers know.
#[derive(Debug)]
pub(super) struct NetState {
    taps: Vec<Tap>,
    /// One per pair: written when the pair is enabled.
    enabled_events: Vec<EventFd>,
    /// Pairs that the tap sends frames to. Held while that changes.
    enabled_pairs: Mutex<u16>,
    counters: NetCounters,
    /// Feature bits of the offloads that the tap has been told of.
    offloads: AtomicU64,
    /// What the next driver that is activated, which is a restored one, had set; 0 for none.
    restored_offloads: AtomicU64,
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
            offloads: AtomicU64::new(0),
            restored_offloads: AtomicU64::new(0),
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

    /// What a driver has set last, be it restored and not yet activated.
    fn offloads(&self) -> u64 {
        match self.restored_offloads.load(Ordering::Acquire) {
            0 => self.offloads.load(Ordering::Acquire),
            restored => restored & !RESTORED,
        }
    }

    pub(super) fn enabled_pairs(&self) -> u16 {
        let enabled = self.enabled_pairs.lock();
        *enabled.unwrap_or_else(PoisonError::into_inner)
    }

    /// A driver is there: what its features say, unless it was restored and had said something else.
    pub(super) fn set_first_offloads(&self, features: u64) {
        let restored = self.restored_offloads.swap(0, Ordering::AcqRel);
        self.set_offloads(if restored == 0 {
            features
        } else {
            restored & !RESTORED
        });
    }

    /// Tells the tap what the guest can cope with. False if the kernel refuses.
    pub(super) fn set_offloads(&self, features: u64) -> bool {
        let result = self.taps[0].set_offload(tun_offloads(features));
        if let Err(error) = &result
            && NetCounters::count_loudly(&self.counters.tap_errors)
        {
            log::warn!("{}: setting offloads: {error}", self.taps[0].name());
        }
        if result.is_ok() {
            self.offloads
                .store(features & GUEST_OFFLOADS, Ordering::Release);
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

    fn state(&self) -> Saved {
        Saved::of(&NetDeviceState {
            config: Bytes(self.config.to_vec()),
            enabled_pairs: self.net.enabled_pairs(),
            offloads: self.net.offloads(),
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
        self.net.enable_pairs(pairs);
        self.net
            .restored_offloads
            .store(state.offloads | RESTORED, Ordering::Release);
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.net.counters.snapshot()
    }
}
