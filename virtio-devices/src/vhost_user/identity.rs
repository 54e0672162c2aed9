//! Properties of the device that the back end has reported: shared by the configuration half and the link.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::Unpoisoned;
use crate::config_interrupt::ConfigInterrupt;
use crate::device::DeviceIdentity;

/// Features and configuration space of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// As the back end offers them.
    pub(super) features: u64,
    /// With the front end's values.
    pub(super) config: Vec<u8>,
}

struct State {
    known: Option<Identity>,
    /// When the driver began to wait.
    reset_at: Instant,
}

/// The identity, which changes when another back end connects.
pub(super) struct Learned {
    state: Mutex<State>,
    pub(super) interrupt: ConfigInterrupt,
    /// How long a driver waits.
    patience: Duration,
}

crate::debug_fields!(Learned { patience });

impl Learned {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            state: Mutex::new(State {
                known: None,
                reset_at: Instant::now(),
            }),
            interrupt: ConfigInterrupt::default(),
            patience,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unpoisoned()
    }

    pub(super) fn get(&self) -> Option<Identity> {
        self.lock().known.clone()
    }

    pub(super) fn features(&self) -> u64 {
        self.lock().known.as_ref().map_or(0, |known| known.features)
    }

    /// Runs `read` on the configuration space, which is empty until it is known.
    pub(super) fn with_config(&self, read: impl FnOnce(&[u8])) {
        let state = self.lock();
        read(state.known.as_ref().map_or(&[], |known| &known.config));
    }

    pub(super) fn status(&self) -> DeviceIdentity {
        let state = self.lock();
        match state.known {
            Some(_) => DeviceIdentity::Known,
            None if state.reset_at.elapsed() < self.patience => DeviceIdentity::Awaited,
            None => DeviceIdentity::Absent,
        }
    }

    /// Called when a driver begins to wait.
    pub(super) fn begin_wait(&self) {
        self.lock().reset_at = Instant::now();
    }

    /// The identity of a saved device.
    pub(super) fn restore(&self, known: Option<Identity>) {
        self.lock().known = known;
    }

    /// Stores the identity of a back end that has connected. Notifies the driver if the configuration space differs.
    pub(super) fn learn(&self, identity: Identity) {
        let mut state = self.lock();
        let known = state.known.as_ref();
        let changed = known.is_some_and(|known| known.config != identity.config);
        state.known = Some(identity);
        drop(state);
        if changed {
            self.interrupt.signal();
        }
    }
}
