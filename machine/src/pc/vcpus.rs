//! vCPU hot-plug.
//!
//! ```text
//! add:     thread started ─► guest interrupted                         (immediately)
//! remove:  guest interrupted ─► … ─► guest ejects ─► thread ended
//!          (immediately)             (vCPU thread)   (thread that owns the machine)
//! ```
//! vCPUs with the highest numbers are removed first. No step waits for the guest.

use super::{Pc, PcError};

impl Pc {
    /// Changes the number of vCPUs to `count`, 1 to the maximum: adds vCPUs, or asks the guest to release the last
    /// ones. Returns immediately. After the guest has released some, [`Pc::take_ejected_vcpus`] ends them.
    ///
    /// # Errors
    /// [`PcError::LeavingVcpus`], a vCPU cannot be added, or the guest cannot be notified.
    pub fn resize_vcpus(&mut self, count: u32) -> Result<(), PcError> {
        self.settle_vcpus()?;
        let hotplug = &self.chassis.cpu_hotplug;
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

    /// Ends the vCPUs that the guest has released, and checks that no other is to be removed.
    ///
    /// # Errors
    /// [`PcError::LeavingVcpus`], or a vCPU did not end within its deadline.
    pub fn settle_vcpus(&mut self) -> Result<(), PcError> {
        self.take_ejected_vcpus()?;
        match self.chassis.cpu_hotplug.leaving() {
            0 => Ok(()),
            count => Err(PcError::LeavingVcpus { count }),
        }
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
