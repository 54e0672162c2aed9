//! Requests that add and remove devices.

use std::os::fd::{AsRawFd, OwnedFd};

use api::PciDeviceInfo;

use super::error::LifecycleError;
use super::lifecycle::Lifecycle;
use crate::config::{self, NewDevice, has_iommu, with_device, without_device};
use crate::events::{Event, EventKind};
use crate::landlock;
use crate::snapshot;
use crate::vm::HotplugError;

impl Lifecycle {
    /// Adds a device. A network interface uses the open taps received with the request. Returns `None` if no machine is
    /// running, because the device has no address yet.
    ///
    /// # Errors
    /// There is no VM, or the device cannot be created; nothing is left behind.
    pub fn add_device(
        &mut self,
        mut device: NewDevice,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<PciDeviceInfo>, LifecycleError> {
        let config = self.config.as_ref().ok_or(LifecycleError::VmNotCreated)?;
        if let (NewDevice::Balloon(_), Some(balloon)) = (&device, &config.balloon) {
            let id = config::balloon_id(balloon).to_owned();
            return Err(LifecycleError::Device(HotplugError::BalloonPresent { id }));
        }
        if let (NewDevice::Vsock(_), Some(vsock)) = (&device, &config.vsock) {
            let id = vsock.id.clone().unwrap_or_default();
            return Err(LifecycleError::Device(HotplugError::VsockPresent { id }));
        }
        if let NewDevice::Net(net) = &mut device
            && !fds.is_empty()
        {
            net.fds = Some(fds.iter().map(AsRawFd::as_raw_fd).collect());
        }
        let mut wanted = with_device(config, device.clone());
        config::validate_addition(&wanted, &device).map_err(LifecycleError::ConfigValidation)?;
        self.confinement
            .check(&landlock::of_device(&device))
            .map_err(LifecycleError::Landlock)?;
        let is_recorded = snapshot::require_recorded(&wanted).is_ok();
        if self.live_snapshot.is_some() && !is_recorded {
            return Err(LifecycleError::Saving);
        }
        let Some(machine) = &mut self.machine else {
            self.config = Some(wanted);
            self.taps.keep(fds);
            return Ok(None);
        };
        let mut numbers = self.device_numbers.clone();
        numbers.assign(&mut wanted);
        config::take_id(&wanted, &mut device);
        let added = machine
            .add_device(&mut device)
            .map_err(LifecycleError::Machine)?;
        if matches!(device, NewDevice::Balloon(_)) {
            self.generation += 1;
            self.reporting.steer(machine.as_ref());
        }
        self.config = Some(with_device(config, device));
        self.device_numbers = numbers;
        self.taps.keep(fds);
        if !is_recorded {
            self.forget_writes("the new device's writes to memory are not recorded");
        }
        let bdf = added.bdf.clone();
        self.emit_device(EventKind::DeviceAdded { bdf }, &added.id);
        Ok(Some(added))
    }

    /// `vm.remove-device`: a running guest must release the device first.
    ///
    /// # Errors
    /// There is no such device, or it cannot be removed.
    pub fn remove_device(&mut self, id: &str) -> Result<(), LifecycleError> {
        let config = self.config.as_ref().ok_or(LifecycleError::VmNotCreated)?;
        let without = without_device(config, id);
        match (&mut self.machine, without) {
            // A device with a pending removal exists only in the machine, not in the configuration.
            (Some(machine), without) => {
                machine.remove_device(id).map_err(LifecycleError::Machine)?;
                if let Some(mut without) = without {
                    // The machine keeps its IOMMU, and its saved state needs one.
                    without.iommu |= has_iommu(config);
                    self.config = Some(without);
                }
            }
            (None, Some(without)) => self.config = Some(without),
            (None, None) => {
                let id = id.to_owned();
                return Err(LifecycleError::Device(HotplugError::NoSuchDevice { id }));
            }
        }
        self.device_numbers.retire(id);
        Ok(())
    }

    /// Called when the guest has released devices.
    pub(super) fn finish_removals(&mut self) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let gone = machine.take_ejected();
        for device in &gone {
            let bdf = device.bdf.clone();
            self.emit_device(EventKind::DeviceRemoved { bdf }, &device.id);
        }
        if !gone.is_empty() {
            self.publish();
        }
    }

    fn emit_device(&self, kind: EventKind, id: &str) {
        (self.context.events)(&Event::of_device(kind, id));
    }
}
