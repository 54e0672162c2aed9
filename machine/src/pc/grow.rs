//! More RAM for a running machine.
//!
//! ```text
//! mapped ─► KVM slot ─► vhost-user devices stop ─► part of RAM ─► they start with it ─► guest interrupted
//! ```
//! None of this waits for the guest; a back end of a vhost-user device holds it up for one second at most.

use virtio_devices::pci::PciFunction;

use super::{Pc, PcError};
use crate::memory::Zone;
use crate::threads::DeviceKind;

impl Pc {
    /// Adds a memory device with which the guest has `total_bytes` of RAM, and returns its zone; none if the guest has
    /// that much. [`Pc::announce_memory`] follows.
    ///
    /// # Errors
    /// There is no room for such a device, or the host does not have the memory; nothing has changed then.
    pub fn grow_memory(&mut self, total_bytes: u64) -> Result<Option<Zone>, PcError> {
        let mapped = self.memory.map_dimm(total_bytes).map_err(PcError::Grow)?;
        let Some(dimm) = mapped else {
            return Ok(None);
        };
        self.slots.add(&dimm).map_err(PcError::Memory)?;
        let zone = dimm.zone().clone();
        // A back end must know the memory before the guest puts buffers there. It learns of it when its queues start.
        let vhost_user = self
            .plugged
            .iter()
            .filter(|it| it.kind == DeviceKind::VhostUser);
        let stopped: Vec<_> = vhost_user.filter(|_| !self.paused).cloned().collect();
        for device in &stopped {
            device.function.pause();
        }
        self.memory.add_dimm(dimm);
        for device in &stopped {
            device.function.resume();
        }
        let controller = self.chassis.memory_hotplug.as_ref();
        let controller = controller.expect("memory that takes devices has a controller");
        for range in &zone.ranges {
            controller.insert(range);
        }
        Ok(Some(zone))
    }

    /// Interrupts the guest, so that it reads which memory was added.
    ///
    /// # Errors
    /// The guest cannot be notified. It sees the memory with the next event.
    pub fn announce_memory(&self) -> Result<(), PcError> {
        let told = self.chassis.ged.announce_memory_change();
        told.map_err(PcError::AnnounceMemory)
    }
}
