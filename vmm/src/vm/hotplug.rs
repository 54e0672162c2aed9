//! Devices that come to and go from a running machine.
//!
//! ```text
//! add:     device made ─► on the bus ─► guest interrupted              (answered at once)
//! remove:  guest interrupted ─► … ─► guest lets go ─► off the bus ─► device dropped
//!          (answered at once)        (vCPU thread)                   (control thread)
//! ```
//! Nothing here waits for the guest. A guest that never lets go keeps the device until it is rebooted: the
//! configuration has forgotten it by then.

use std::io;

use api::PciDeviceInfo;
use api::config::{BalloonConfig, DiskConfig, NetConfig};
use virtio_devices::pci::PciFunction;

use super::build::{BALLOON_ID, plug_balloon, plug_disk};
use super::devices::{Devices, Plugged};
use super::{Vm, VmError, network};
use crate::seccomp::ThreadKind;

/// A device for a machine, running or not.
#[derive(Debug, Clone)]
pub enum NewDevice {
    /// A disk.
    Disk(DiskConfig),
    /// A network interface.
    Net(NetConfig),
    /// The balloon.
    Balloon(BalloonConfig),
}

impl NewDevice {
    /// Its name, if it has one already.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Disk(disk) => disk.id.as_deref(),
            Self::Net(net) => net.id.as_deref(),
            Self::Balloon(balloon) => Some(balloon.id.as_deref().unwrap_or(BALLOON_ID)),
        }
    }
}

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
    /// The guest cannot be interrupted.
    #[error("Cannot tell the guest of device {id}")]
    Announce {
        /// The device.
        id: String,
        /// What the host said.
        #[source]
        source: io::Error,
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
        let mut devices = Devices::new(&self.chassis, self.memory.ram().clone(), &self.context);
        let balloon = match device {
            NewDevice::Disk(disk) => plug_disk(&mut devices, disk).map(|()| None),
            NewDevice::Net(net) => network::plug(&mut devices, net).map(|()| None),
            NewDevice::Balloon(balloon) => {
                plug_balloon(&mut devices, balloon, &self.memory).map(Some)
            }
        }?;
        let Devices {
            mut plugged,
            counters,
            tree,
            ..
        } = devices;
        let plugged = plugged.pop().expect("one device has been plugged in");
        let info = plugged.info();
        if self.paused {
            plugged.function.pause();
        }
        self.chassis.hotplug.announce(plugged.bdf);
        if let Err(source) = self.chassis.ged.announce_pci_change() {
            self.chassis.pci.remove(plugged.bdf);
            let id = info.id;
            return Err(VmError::Hotplug(HotplugError::Announce { id, source }));
        }
        self.observer.add(counters, balloon.clone(), tree);
        self.balloon = balloon.or(self.balloon.take());
        self.plugged.push(plugged);
        Ok(info)
    }

    fn check_addition(&self, device: &NewDevice) -> Result<(), HotplugError> {
        let same_name = |it: &&Plugged| Some(it.id.as_str()) == device.id();
        if let Some(plugged) = self.plugged.iter().find(same_name) {
            let id = plugged.id.clone();
            return Err(HotplugError::StillLeaving { id });
        }
        let is_balloon = |it: &&Plugged| it.kind == ThreadKind::Balloon;
        match (device, self.plugged.iter().find(is_balloon)) {
            (NewDevice::Balloon(_), Some(plugged)) => Err(HotplugError::StillLeaving {
                id: plugged.id.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Asks the guest to let go of a device and returns at once; may be repeated. The device goes when the guest has
    /// let go, see [`Vm::take_ejected`].
    ///
    /// # Errors
    /// There is no such device, it cannot go, or it is a balloon with memory in it.
    pub fn remove_device(&mut self, id: &str) -> Result<(), VmError> {
        self.request_removal(id).map_err(VmError::Hotplug)
    }

    fn request_removal(&mut self, id: &str) -> Result<(), HotplugError> {
        let found = self.plugged.iter_mut().find(|it| it.id == id);
        let plugged = found.ok_or_else(|| HotplugError::NoSuchDevice { id: id.to_owned() })?;
        match plugged.kind {
            ThreadKind::Block | ThreadKind::Net => {}
            ThreadKind::Balloon => {
                if let Some(balloon) = &self.balloon {
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
            }
            _ => return Err(HotplugError::NotRemovable { id: id.to_owned() }),
        }
        self.chassis.hotplug.request_removal(plugged.bdf);
        let told = self.chassis.ged.announce_pci_change();
        told.map_err(|source| HotplugError::Announce {
            id: id.to_owned(),
            source,
        })?;
        if plugged.kind == ThreadKind::Balloon {
            // Nobody shall inflate it any more. Its figures go when it does.
            self.balloon = None;
        }
        Ok(())
    }

    /// Drops the devices that the guest has let go of, and returns what they were. Waits for host I/O at most.
    pub fn take_ejected(&mut self) -> Vec<PciDeviceInfo> {
        let ejected = self.chassis.hotplug.take_ejected();
        let (gone, stay) = std::mem::take(&mut self.plugged)
            .into_iter()
            .partition(|it| ejected.contains(&it.bdf));
        self.plugged = stay;
        let gone: Vec<Plugged> = gone;
        gone.into_iter()
            .map(|plugged| {
                // Work under way ends here, and not on a vCPU thread that holds the last reference by chance.
                plugged.function.reset();
                self.observer
                    .remove(&plugged.id, plugged.kind == ThreadKind::Balloon);
                plugged.info()
            })
            .collect()
    }
}
