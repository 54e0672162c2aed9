//! The configuration change interrupt, as the parts of a device share it.

use std::sync::{Arc, OnceLock};

use crate::device::Interrupt;

/// Does nothing until the device is attached to its transport.
#[derive(Default)]
pub(crate) struct ConfigInterrupt(OnceLock<Arc<dyn Interrupt>>);

crate::debug_fields!(ConfigInterrupt {});

impl ConfigInterrupt {
    /// See `VirtioDevice::set_interrupt`.
    pub(crate) fn attach(&self, interrupt: Arc<dyn Interrupt>) {
        // Set once: there is only one transport.
        self.0.set(interrupt).ok();
    }

    /// Notifies the driver that the configuration space has changed.
    pub(crate) fn signal(&self) {
        if let Some(interrupt) = self.0.get() {
            interrupt.signal_config();
        }
    }
}
