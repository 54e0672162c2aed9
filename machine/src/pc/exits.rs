//! Dispatches vCPU exits.

use std::sync::Arc;

use super::chassis::Chassis;
use crate::bus::Bus;
use crate::cpu::VmExitHandler;
use crate::interrupt::Ioapic;

/// The buses and the I/O APIC, as the vCPU threads see them.
#[derive(Debug)]
pub(super) struct Exits {
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    ioapic: Arc<Ioapic>,
}

impl Exits {
    pub(super) fn new(chassis: &Chassis) -> Self {
        Self {
            ports: Arc::clone(&chassis.ports),
            mmio: Arc::clone(&chassis.mmio),
            ioapic: Arc::clone(&chassis.ioapic),
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
        self.mmio.read(address, data);
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.mmio.write(address, data);
    }

    fn ioapic_eoi(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
}
