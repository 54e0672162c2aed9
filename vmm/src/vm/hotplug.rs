//! Devices that come to and go from a running machine, as far as the configuration knows them.
//!
//! The configuration forgets a device when it is asked to go; the guest may keep it until it is rebooted.

use api::PciDeviceInfo;
use machine::pc::Plugged;
use machine::threads::DeviceKind;

use super::devices::{self, Made};
use super::{Vm, VmError, network};
use crate::config::NewDevice;

/// Why a device cannot come or go.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// No device of this name.
    #[error("There is no device {id}")]
    NoSuchDevice {
        /// The name.
        id: String,
    },
    /// A device that every machine has, or that was not built to go.
    #[error("Device {id} cannot be removed: only disks, network devices and the balloon can")]
    NotRemovable {
        /// The name.
        id: String,
    },
    /// The guest has given memory to the balloon, or has been asked to.
    #[error(
        "The guest has {ballooned_bytes} bytes in the balloon {id} of {target_bytes} bytes it is asked for: \
         resize the balloon to 0 and wait until it is empty"
    )]
    BalloonInflated {
        /// The balloon.
        id: String,
        /// What the guest says it has given.
        ballooned_bytes: u64,
        /// What it is asked for.
        target_bytes: u64,
    },
    /// The guest has been asked to let go of a device of this name and has not done so yet.
    #[error("Device {id} is still being removed: the guest has not let go of it")]
    StillLeaving {
        /// The name.
        id: String,
    },
    /// There are no two balloons.
    #[error("The VM has a balloon already, {id}")]
    BalloonPresent {
        /// The balloon.
        id: String,
    },
}

impl Vm {
    /// Adds a device whose configuration has been checked and named, and tells the guest. On an error nothing is left
    /// behind. `device` is changed as [`Vm::new`] changes the configuration.
    ///
    /// # Errors
    /// The device cannot be made or named, or there is no slot for it.
    pub fn add_device(&mut self, device: &mut NewDevice) -> Result<PciDeviceInfo, VmError> {
        self.check_addition(device).map_err(VmError::Hotplug)?;
        let (Made { plug, counters }, balloon) = match device {
            NewDevice::Disk(disk) => (devices::disk(disk)?, None),
            NewDevice::Net(net) => (network::net(net)?, None),
            NewDevice::Balloon(balloon) => {
                let (made, handle) = devices::balloon(balloon, self.pc.memory())?;
                (made, Some(handle))
            }
        };
        let plugged = self.pc.add(plug).map_err(VmError::Pc)?;
        self.observer.add(plugged, counters, balloon.clone());
        let info = info(plugged);
        self.balloon = balloon.or(self.balloon.take());
        Ok(info)
    }

    fn check_addition(&self, device: &NewDevice) -> Result<(), HotplugError> {
        let mut plugged = self.pc.devices().iter();
        let is_balloon = matches!(device, NewDevice::Balloon(_));
        let in_the_way = |it: &&Plugged| {
            Some(it.id.as_str()) == device.id() || is_balloon && it.kind == DeviceKind::Balloon
        };
        match plugged.find(in_the_way) {
            Some(plugged) => Err(HotplugError::StillLeaving {
                id: plugged.id.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Asks the guest to let go of a device and returns at once; may be repeated. The device goes when the guest has
    /// let go, see [`Vm::take_ejected`].
    ///
    /// # Errors
    /// There is no such device, it cannot go, or it is a balloon with memory in it.
    pub fn remove_device(&mut self, id: &str) -> Result<(), VmError> {
        let plugged = self.removable(id).map_err(VmError::Hotplug)?;
        let is_balloon = plugged.kind == DeviceKind::Balloon;
        self.pc.request_removal(plugged).map_err(VmError::Pc)?;
        if is_balloon {
            // Nobody shall inflate it any more. Its figures go when it does.
            self.balloon = None;
        }
        Ok(())
    }

    fn removable(&self, id: &str) -> Result<&Plugged, HotplugError> {
        let found = self.pc.devices().iter().find(|it| it.id == id);
        let plugged = found.ok_or_else(|| HotplugError::NoSuchDevice { id: id.to_owned() })?;
        match (plugged.kind, &self.balloon) {
            (DeviceKind::Balloon, Some(balloon)) => {
                let (ballooned_bytes, target_bytes) =
                    (balloon.actual_bytes(), balloon.target_bytes());
                if ballooned_bytes > 0 || target_bytes > 0 {
                    return Err(HotplugError::BalloonInflated {
                        id: id.to_owned(),
                        ballooned_bytes,
                        target_bytes,
                    });
                }
            }
            (DeviceKind::Block | DeviceKind::Net | DeviceKind::Balloon, _) => {}
            (DeviceKind::Mem | DeviceKind::Rng | DeviceKind::Console, _) => {
                return Err(HotplugError::NotRemovable { id: id.to_owned() });
            }
        }
        Ok(plugged)
    }

    /// Drops the devices that the guest has let go of, and returns what they were. Waits for host I/O at most.
    pub fn take_ejected(&mut self) -> Vec<PciDeviceInfo> {
        let gone = self.pc.take_ejected().into_iter();
        gone.map(|plugged| {
            let is_balloon = plugged.kind == DeviceKind::Balloon;
            self.observer.remove(&plugged.id, is_balloon);
            info(&plugged)
        })
        .collect()
    }
}

/// A device as the API shows it.
fn info(plugged: &Plugged) -> PciDeviceInfo {
    PciDeviceInfo {
        id: plugged.id.clone(),
        bdf: plugged.bdf.to_string(),
    }
}
