//! KVM as the backend of interrupt delivery.

use std::io;

use hypervisor::{GsiRoute, Vm};
use virtio_devices::pci::MsiMessage;
use vmm_sys_util::eventfd::EventFd;

use super::{InterruptBackend, Route};

fn to_kvm(message: MsiMessage) -> hypervisor::MsiMessage {
    hypervisor::MsiMessage {
        address: message.address,
        data: message.data,
    }
}

impl InterruptBackend for Vm {
    fn set_routes(&self, routes: &[Route]) -> io::Result<()> {
        let routes: Vec<GsiRoute> = routes
            .iter()
            .map(|route| GsiRoute {
                gsi: route.gsi,
                msi: to_kvm(route.message),
            })
            .collect();
        self.set_gsi_routing(&routes).map_err(io::Error::other)
    }

    fn register_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        Vm::register_irqfd(self, event, gsi).map_err(io::Error::other)
    }

    fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> io::Result<()> {
        Vm::unregister_irqfd(self, event, gsi).map_err(io::Error::other)
    }

    fn signal_msi(&self, message: MsiMessage) -> io::Result<()> {
        // Whether the APIC took it or the guest has it switched off is the
        // guest's business.
        Vm::signal_msi(self, to_kvm(message))
            .map(|_delivered| ())
            .map_err(io::Error::other)
    }
}
