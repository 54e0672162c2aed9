//! Interrupt delivery through KVM.

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
        // Whether the APIC accepted the message, or the guest has disabled the APIC, does not matter here.
        Vm::signal_msi(self, to_kvm(message))
            .map(|_delivered| ())
            .map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    //! Tests what a fake back end cannot: that KVM accepts the calls.

    use std::sync::Arc;

    use hypervisor::{Kvm, Vm};
    use virtio_devices::pci::{MsiMessage, MsiVectors};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::super::{FunctionVectors, GSI_COUNT_MAX, GsiRouter, IOAPIC_PIN_COUNT, Ioapic};
    use crate::bus::BusDevice;
    use crate::pci::DoorbellBackend;

    /// A machine with one vCPU, or `None` without KVM.
    fn machine() -> Option<(Arc<Vm>, hypervisor::Vcpu)> {
        let kvm = Kvm::open().map_err(test_skip::skip).ok()?;
        let vm = kvm.create_vm().unwrap();
        vm.enable_split_irqchip(u32::from(IOAPIC_PIN_COUNT))
            .unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Some((Arc::new(vm), vcpu))
    }

    #[test]
    fn kvm_takes_routes_irqfds_and_messages() {
        let Some((vm, _vcpu)) = machine() else {
            return;
        };
        let router = Arc::new(GsiRouter::new(vm));
        let message = MsiMessage {
            address: 0xfee0_0000,
            data: 0x41,
        };
        router.set_route(GSI_COUNT_MAX - 1, Some(message)).unwrap();

        let vectors = FunctionVectors::new(router.clone(), 2);
        for vector in [0, 1, 0] {
            vectors.enable(vector, message).unwrap();
            vectors.trigger(vector).unwrap();
        }
        vectors.disable(0).unwrap();
        assert!(vectors.trigger(0).is_err());

        let ioapic = Arc::new(Ioapic::new(router));
        // Pin 10: level, vector 0x42; pin 4: edge, vector 0x44.
        for (register, value) in [(0x10 + 20, 0x8042_u32), (0x10 + 8, 0x44)] {
            ioapic.write(0, &[register]);
            ioapic.write(0x10, &value.to_le_bytes());
        }
        ioapic.line(10).unwrap().set_level(true).unwrap();
        ioapic.line(4).unwrap().trigger().unwrap();
        ioapic.end_of_interrupt(0x42);
        assert_eq!(ioapic.undelivered(), 0);
    }

    #[test]
    fn kvm_takes_doorbells_of_any_width_and_gives_them_back() {
        let Some((vm, _vcpu)) = machine() else {
            return;
        };
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        vm.register_doorbell(0x1_0000_6000, &event).unwrap();
        assert!(vm.register_doorbell(0x1_0000_6000, &event).is_err());
        vm.unregister_doorbell(0x1_0000_6000, &event).unwrap();
        assert!(vm.unregister_doorbell(0x1_0000_6000, &event).is_err());
    }
}
