//! vCPU hot-plug.
//!
//! ```text
//! add:     thread started ─► guest interrupted                         (at once)
//! remove:  guest interrupted ─► … ─► guest ejects ─► thread ended
//!          (at once)                 (vCPU thread)   (who runs the machine)
//! ```
//! The last vCPUs go first. None of this waits for the guest.

use super::{Pc, PcError};

impl Pc {
    /// Adds vCPUs, or requests the release of the last ones from the guest, so that it has `count` of them, 1 to the
    /// maximum. Returns at once. After the guest has released some, [`Pc::take_ejected_vcpus`] ends them.
    ///
    /// # Errors
    /// [`PcError::LeavingVcpus`], a vCPU cannot be added, or the guest cannot be notified.
    pub fn resize_vcpus(&mut self, count: u32) -> Result<(), PcError> {
        self.take_ejected_vcpus()?;
        let hotplug = &self.chassis.cpu_hotplug;
        let leaving = hotplug.leaving();
        if leaving > 0 {
            return Err(PcError::LeavingVcpus { count: leaving });
        }
        let present = hotplug.present();
        if count > present {
            self.vcpus.add(present..count).map_err(PcError::Cpu)?;
            hotplug.insert(present..count);
        } else {
            hotplug.request_removal(count..present);
        }
        let told = self.chassis.ged.announce_cpu_change();
        told.map_err(PcError::AnnounceVcpus)
    }

    /// Ends the vCPUs that the guest has released.
    ///
    /// # Errors
    /// A vCPU did not end within its deadline.
    pub fn take_ejected_vcpus(&mut self) -> Result<(), PcError> {
        let ejected = self.chassis.cpu_hotplug.take_ejected();
        self.vcpus.remove(&ejected).map_err(PcError::Cpu)
    }
}
