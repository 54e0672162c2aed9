//! The configuration change interrupt, as the parts of a device share it.

use std::sync::{Arc, OnceLock, Weak};

use crate::device::Interrupt;

/// Does nothing until the device is attached to its transport, and once the transport is gone. A query of the VMM may
/// hold a part of a device longer than the machine lives, on a thread that may not unregister interrupts.
#[derive(Default)]
pub(crate) struct ConfigInterrupt(OnceLock<Weak<dyn Interrupt>>);

crate::debug_fields!(ConfigInterrupt {});

impl ConfigInterrupt {
    /// See `VirtioDevice::set_interrupt`.
    pub(crate) fn attach(&self, interrupt: &Arc<dyn Interrupt>) {
        // Set once: there is only one transport.
        self.0.set(Arc::downgrade(interrupt)).ok();
    }

    /// Notifies the driver that the configuration space has changed.
    pub(crate) fn signal(&self) {
        if let Some(interrupt) = self.0.get().and_then(Weak::upgrade) {
            interrupt.signal_config();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::MockInterrupt;

    #[test]
    fn interrupt_ends_with_its_transport() {
        let (attached, transport) = (ConfigInterrupt::default(), Arc::<MockInterrupt>::default());
        let interrupt: Arc<dyn Interrupt> = transport.clone();
        attached.attach(&interrupt);
        drop(interrupt);
        attached.signal();
        assert_eq!(transport.config_signals(), 1);
        assert_eq!(Arc::strong_count(&transport), 1);
        drop(transport);
        attached.signal();
    }
}
