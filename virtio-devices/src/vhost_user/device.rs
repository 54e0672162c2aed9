//! The configuration half of a device whose features and configuration space come from the back end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use state::{Part, Saved, State, StateError, parts, require};

use super::identity::{Identity, Learned};
use super::profile::Profile;
use super::{Endpoint, Link, Shared, handlers};
use crate::device::{
    Counters, DeviceIdentity, Interrupt, QueueHandler, VirtioDevice, read_config_space,
};

/// Maximum time that a driver waits for a device whose back end has never connected. Linux probes devices one after
/// another, so the guest may not boot earlier.
const PATIENCE: Duration = Duration::from_secs(30);

/// Parameters of the device.
#[derive(Debug)]
pub struct VhostUserParams {
    /// Names the device and its threads.
    pub id: String,
    /// The type of device.
    pub profile: Profile,
    /// How the connection to the back end is established.
    pub endpoint: Endpoint,
    /// Entries of each queue.
    pub queue_sizes: Vec<u16>,
}

/// The identity that a driver has seen; absent if there was no back end yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserState {
    /// Features and configuration space.
    pub identity: Option<IdentityState>,
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
}

/// The configuration half.
pub struct VhostUser {
    profile: Profile,
    queue_sizes: Vec<u16>,
    handlers: Vec<Box<dyn QueueHandler>>,
    learned: Arc<Learned>,
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
            queue_sizes,
        } = params;
        let shared = Arc::new(Shared::default());
        let learned = Arc::new(Learned::new(patience));
        let link = Link::new(&id, endpoint, queue_sizes.len(), Arc::clone(&shared))?;
        let link = link.learning(profile, queue_sizes.clone(), Arc::clone(&learned));
        Ok(Self {
            profile,
            handlers: handlers(id, link, &shared),
            queue_sizes,
            learned,
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
        self.learned.restore(identity);
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.shared.read()
    }
}
