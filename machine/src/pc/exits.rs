//! Dispatches vCPU exits.

use std::sync::Arc;

use virtio_devices::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::chassis::Chassis;
use crate::bus::Bus;
use crate::cpu::{ExceptionPath, VmExitHandler};
use crate::interrupt::Ioapic;
use crate::memory::{GuestMemory, MemoryFault, MemoryFaults};

/// The buses and the I/O APIC, as the vCPU threads see them.
#[derive(Debug)]
pub(super) struct Exits {
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    ioapic: Arc<Ioapic>,
    ram: GuestRam,
    faults: Arc<MemoryFaults>,
}

impl Exits {
    pub(super) fn new(chassis: &Chassis, memory: &GuestMemory, faults: &Arc<MemoryFaults>) -> Self {
        Self {
            ports: Arc::clone(&chassis.ports),
            mmio: Arc::clone(&chassis.mmio),
            ioapic: Arc::clone(&chassis.ioapic),
            ram: memory.device_ram().clone(),
            faults: Arc::clone(faults),
        }
    }

    /// An access that no device answered. KVM's emulator treats memory that the host cannot provide in this way.
    fn missed(&self, address: u64) {
        let is_ram = self.ram.memory().address_in_range(GuestAddress(address));
        if is_ram || self.faults.is_of_device(address) {
            self.faults.add(MemoryFault::Emulated { address });
        }
    }
}

impl VmExitHandler for Exits {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(u64::from(port), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.ports.write(u64::from(port), data);
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if !self.mmio.read(address, data) {
            self.missed(address);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if !self.mmio.write(address, data) {
            self.missed(address);
        }
    }

    fn ioapic_eoi(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }

    fn lacks_ram(&self, path: &ExceptionPath) -> bool {
        let ram = self.ram.memory();
        path.touch(|address| {
            let word = ram.read_obj(GuestAddress(address)).ok();
            word.or_else(|| self.faults.read_of_device(address))
        });
        self.faults.has_lost()
    }
}
