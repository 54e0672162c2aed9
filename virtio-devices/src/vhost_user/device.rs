//! The configuration half of a device whose features and configuration space come from the back end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use state::{Fields, Part, Saved, State, StateError, parts, require};
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ};

use super::identity::{Identity, Learned};
use super::pairs::Pairs;
use super::profile::Profile;
use super::{Endpoint, Link, Shared, handlers};
use crate::device::{
    Counters, DeviceIdentity, Interrupt, QueueHandler, VirtioDevice, read_config_space,
};
use crate::net::{ControlQueue, Controlled, has};
use crate::queue::SingleQueue;
use crate::thread_name::thread_name;

/// Maximum time that a driver waits for a device whose back end has never connected. Linux probes devices one after
/// another, so the guest may not boot earlier.
const PATIENCE: Duration = Duration::from_secs(30);

/// Position of the control queue's handler, behind those of every device.
const CONTROL: usize = 2;

/// Parameters of the device.
#[derive(Debug)]
pub struct VhostUserParams {
    /// Names the device and its threads.
    pub id: String,
    /// The type of device.
    pub profile: Profile,
    /// How the connection to the back end is established.
    pub endpoint: Endpoint,
    /// Entries of each queue, without a control queue.
    pub queue_sizes: Vec<u16>,
}

/// The identity that a driver has seen; absent if there was no back end yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserState {
    /// Features and configuration space.
    pub identity: Option<IdentityState>,
    /// Number of pairs of queues that the driver of a network interface with several uses.
    pub enabled_pairs: Option<u16>,
}

/// Features and configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentityState {
    /// Feature bits of the back end.
    pub features: u64,
    /// The configuration space as the driver reads it.
    pub config: Vec<u8>,
}

impl State for VhostUserState {
    const PART: Part = parts::VHOST_USER;

    fn upgrade(_from: u32, fields: &mut Fields) -> Result<(), StateError> {
        // Version 1 had no interface with several pairs.
        fields.insert("enabled_pairs".to_owned(), ().into());
        Ok(())
    }
}

/// The configuration half.
pub struct VhostUser {
    profile: Profile,
    queue_sizes: Vec<u16>,
    handlers: Vec<Box<dyn QueueHandler>>,
    learned: Arc<Learned>,
    /// Of a network interface with several pairs.
    pairs: Option<Arc<Pairs>>,
    shared: Arc<Shared>,
}

crate::debug_fields!(VhostUser {
    profile,
    queue_sizes,
    shared
});

impl VhostUser {
    /// Connects to the back end later, and again whenever it is gone.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn new(params: VhostUserParams) -> io::Result<Self> {
        Self::with_patience(params, PATIENCE)
    }

    pub(super) fn with_patience(params: VhostUserParams, patience: Duration) -> io::Result<Self> {
        let VhostUserParams {
            id,
            profile,
            endpoint,
            mut queue_sizes,
        } = params;
        let shared = Arc::new(Shared::default());
        let learned = Arc::new(Learned::new(patience));
        let link = Link::new(&id, endpoint, queue_sizes.len(), Arc::clone(&shared))?;
        let link = link.learning(profile, queue_sizes.clone(), Arc::clone(&learned));
        let pairs = profile.has_several_pairs().then(|| {
            let gate = Arc::clone(link.gate());
            Arc::new(Pairs::new(gate, Arc::clone(&shared), profile.pairs()))
        });
        let name = thread_name(&id, "_ctrl");
        let mut handlers = handlers(id, link, &shared);
        if let Some(pairs) = &pairs {
            let control = ControlQueue::new(name, Arc::clone(pairs));
            handlers.push(Box::new(SingleQueue::new(control)));
            // One additional queue for control.
            queue_sizes.extend(queue_sizes.last().copied());
        }
        Ok(Self {
            profile,
            handlers,
            queue_sizes,
            learned,
            pairs,
            shared,
        })
    }
}

impl VirtioDevice for VhostUser {
    fn device_type(&self) -> u32 {
        self.profile.device_type
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.learned.features() & self.profile.features | self.profile.own_features
    }

    fn identity(&self) -> DeviceIdentity {
        self.learned.status()
    }

    fn features_possible(&self) -> u64 {
        self.profile.features | self.profile.own_features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.learned
            .with_config(|config| read_config_space(config, offset, data));
    }

    fn take_handlers(&mut self) -> Vec<Box<dyn QueueHandler>> {
        std::mem::take(&mut self.handlers)
    }

    /// As for a network interface without a back end (virtio 1.2 §5.1.2).
    fn handler_of_queue(&self, queue_index: u16, features: u64) -> Option<usize> {
        if self.pairs.is_none() {
            return Some(0);
        }
        let control = has(features, VIRTIO_NET_F_CTRL_VQ);
        let pairs = match control && has(features, VIRTIO_NET_F_MQ) {
            true => self.profile.pairs(),
            false => 1,
        };
        match queue_index {
            index if index < 2 * pairs => Some(0),
            index if control && index == 2 * pairs => Some(CONTROL),
            _ => None,
        }
    }

    fn set_interrupt(&mut self, interrupt: Arc<dyn Interrupt>) {
        self.learned.interrupt.attach(&interrupt);
    }

    fn reset(&mut self) {
        self.learned.begin_wait();
    }

    fn ram_is_mapped_elsewhere(&self) -> bool {
        true
    }

    fn state(&self) -> Saved {
        let identity = self.learned.get();
        Saved::of(&VhostUserState {
            identity: identity
                .map(|Identity { features, config }| IdentityState { features, config }),
            enabled_pairs: self.pairs.as_ref().map(|pairs| pairs.enabled()),
        })
    }

    fn restore(&mut self, state: &Saved) -> Result<(), StateError> {
        let state = state.read::<VhostUserState>()?;
        let identity = state
            .identity
            .map(|IdentityState { features, config }| Identity { features, config });
        if let Some(Identity { config, .. }) = &identity {
            let bytes = config.len();
            let possible = self.profile.has_config_of(bytes);
            require(possible, parts::VHOST_USER, "config", || {
                format!("cannot have {bytes} bytes")
            })?;
        }
        let enabled = match (&self.pairs, state.enabled_pairs) {
            (Some(pairs), Some(count)) => pairs.enable_pairs(count),
            (pairs, count) => pairs.is_none() && count.is_none(),
        };
        require(enabled, parts::VHOST_USER, "enabled_pairs", || {
            let pairs = self.profile.pairs();
            format!("is {:?}, there are {pairs}", state.enabled_pairs)
        })?;
        self.learned.restore(identity);
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.shared.read()
    }
}
