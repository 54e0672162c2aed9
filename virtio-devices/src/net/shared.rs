//! Data shared by both halves of a network device.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config_space::{GUEST_OFFLOADS, tun_offloads};
use super::control::Controlled;
use super::counters::NetCounters;
use super::params::NetError;
use super::tap::Tap;
use crate::Unpoisoned;

/// Marks [`NetShared::restored_offloads`] as present; not a feature bit.
const RESTORED: u64 = 1 << 63;

/// Data shared by the configuration half and all workers.
#[derive(Debug)]
pub(super) struct NetShared {
    taps: Vec<Tap>,
    /// One event per pair, written when the pair is enabled.
    enabled_events: Vec<EventFd>,
    /// Number of pairs to which the tap sends frames. Locked while it changes.
    enabled_pairs: Mutex<u16>,
    counters: NetCounters,
    /// Feature bits of the offloads that are set on the tap.
    offloads: AtomicU64,
    /// The offloads that the saved driver set, for the next driver to be activated, which is the restored one; 0 for
    /// none.
    restored_offloads: AtomicU64,
    /// Whether the next driver to be activated is a restored one, which switches may know elsewhere.
    is_restored: AtomicBool,
}

impl NetShared {
    pub(super) fn new(taps: Vec<Tap>) -> Result<Self, NetError> {
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
            is_restored: AtomicBool::new(false),
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

    /// Makes the tap distribute frames over the first `count` pairs, because frames for a pair that the guest does not
    /// use would be lost. False if there are fewer pairs.
    pub(super) fn enable_pairs(&self, count: u16) -> bool {
        if count == 0 || usize::from(count) > self.taps.len() {
            return false;
        }
        let mut enabled = self.enabled_pairs.lock().unpoisoned();
        let (low, high) = (count.min(*enabled), count.max(*enabled));
        for pair in usize::from(low)..usize::from(high) {
            // Queues that cannot be switched stay on. Frames for a queue that the guest ignores are then lost, as on a
            // card without this command.
            if let Err(error) = self.taps[pair].set_enabled(count > *enabled) {
                log::debug!("{}: queue {pair}: {error}", self.taps[pair].name());
            }
            if count > *enabled {
                // An eventfd rejects a write only after 2^64 - 2 unread ones.
                self.enabled_events[pair].write(1).ok();
            }
        }
        *enabled = count;
        true
    }

    /// The last offloads set by a driver, including one that is restored but not yet activated.
    pub(super) fn offloads(&self) -> u64 {
        match self.restored_offloads.load(Ordering::Acquire) {
            0 => self.offloads.load(Ordering::Acquire),
            restored => restored & !RESTORED,
        }
    }

    pub(super) fn enabled_pairs(&self) -> u16 {
        let enabled = self.enabled_pairs.lock();
        *enabled.unpoisoned()
    }

    /// Sets the offloads of a newly active driver from its features, unless it was restored and had set others.
    pub(super) fn set_first_offloads(&self, features: u64) {
        let restored = self.restored_offloads.swap(0, Ordering::AcqRel);
        self.set_offloads(if restored == 0 {
            features
        } else {
            restored & !RESTORED
        });
    }

    /// Sets the guest's offloads on the tap. False if the kernel rejects them.
    pub(super) fn set_offloads(&self, features: u64) -> bool {
        let result = self.taps[0].set_offload(tun_offloads(features));
        if let Err(error) = &result
            && self.counters.tap_errors.count_loudly()
        {
            log::warn!("{}: setting offloads: {error}", self.taps[0].name());
        }
        if result.is_ok() {
            self.offloads
                .store(features & GUEST_OFFLOADS, Ordering::Release);
        }
        result.is_ok()
    }

    /// The next driver to be activated is that of a saved state.
    pub(super) fn set_restored(&self) {
        self.is_restored.store(true, Ordering::Release);
    }

    /// Whether the driver that becomes active was restored. True at most once.
    pub(super) fn take_restored(&self) -> bool {
        self.is_restored.swap(false, Ordering::AcqRel)
    }

    /// Keeps the offloads of a saved driver until it is active again.
    pub(super) fn restore_offloads(&self, features: u64) {
        self.restored_offloads
            .store(features | RESTORED, Ordering::Release);
    }
}

impl Controlled for NetShared {
    fn activated(&self, features: u64) {
        self.set_first_offloads(features);
    }

    fn enable_pairs(&self, count: u16) -> bool {
        Self::enable_pairs(self, count)
    }

    fn set_offloads(&self, features: u64) -> bool {
        Self::set_offloads(self, features)
    }

    fn count_bad(&self) {
        self.counters.bad_requests.count();
    }
}
