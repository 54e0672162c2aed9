//! Adds RAM to a running machine.
//!
//! ```text
//! map ─► pin for assigned devices ─► KVM slot ─► stop vhost-user devices ─► make it part of RAM ─► start them ─► interrupt the guest
//! ```
//! No step waits for the guest. The back end of a vhost-user device can delay the steps by at most one second.

use super::{Pc, PcError};
use crate::memory::Zone;
use crate::threads::DeviceKind;

impl Pc {
    /// Adds a memory device that extends RAM to `total_bytes`, and returns its zone; none if RAM already has that size.
    /// The caller then calls [`Pc::announce_memory`].
    ///
    /// # Errors
    /// There is no room for such a device, or the host lacks the memory; in this case nothing has changed.
    pub fn grow_memory(&mut self, total_bytes: u64) -> Result<Option<Zone>, PcError> {
        let mapped = self.memory.map_dimm(total_bytes).map_err(PcError::Grow)?;
        let Some(dimm) = mapped else {
            return Ok(None);
        };
        // Assigned devices have all of RAM, before the guest gives them addresses in it.
        let devices = self.containers.of_all();
        if let Some(devices) = &devices {
            let pinned = devices.map_region(dimm.region());
            pinned.map_err(PcError::PinMemory)?;
        }
        if let Err(error) = self.slots.add(&dimm) {
            if let Some(devices) = devices {
                devices.unmap_region(dimm.region());
            }
            return Err(PcError::Memory(error));
        }
        let zone = dimm.zone().clone();
        // A back end must map the memory before the guest puts buffers there. It does so when its queues start.
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

    /// Interrupts the guest, so that it detects the added memory.
    ///
    /// # Errors
    /// The guest cannot be notified. It sees the memory with the next event.
    pub fn announce_memory(&self) -> Result<(), PcError> {
        let told = self.chassis.ged.announce_memory_change();
        told.map_err(PcError::AnnounceMemory)
    }
}
