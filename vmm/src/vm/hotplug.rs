//! Device hot-plug, from the configuration's point of view.
//!
//! A requested removal deletes the device from the configuration immediately; the guest may keep it until it reboots.

use api::PciDeviceInfo;
use api::config::DeviceConfig;
use machine::pc::{Assignment, Plugged};
use machine::threads::DeviceKind;

use super::devices::{self, Made};
use super::{HotplugError, Vm, VmError, info};
use crate::config::NewDevice;

impl Vm {
    /// Plugs in a device that [`Vm::check_addition`] allows, and interrupts the guest.
    pub(super) fn plug(&mut self, device: &mut NewDevice) -> Result<PciDeviceInfo, VmError> {
        let (made, balloon) = match device {
            NewDevice::Disk(disk) => (self.handles.disk(disk)?, None),
            NewDevice::Net(net) => (self.handles.net(net)?, None),
            NewDevice::Fs(fs) => (devices::fs(fs)?, None),
            NewDevice::GenericVhostUser(device) => (devices::generic_vhost_user(device)?, None),
            NewDevice::Assigned(device) => return self.plug_assigned(device),
            NewDevice::Pmem(pmem) => (self.handles.pmem(pmem)?, None),
            NewDevice::Vsock(vsock) => (devices::vsock(vsock)?, None),
            NewDevice::Balloon(balloon) => {
                let (made, handle) = devices::balloon(balloon, self.pc.memory())?;
                (made, Some(handle))
            }
        };
        let Made {
            plug,
            is_behind_iommu,
            ..
        } = &made;
        let fits = self.check_iommu(&plug.id, plug.place.segment, *is_behind_iommu);
        if let Err(error) = fits {
            self.handles.remove(&made.plug.id);
            return Err(VmError::Hotplug(error));
        }
        let Made { plug, .. } = made.connect(self.iommu.as_ref());
        let id = plug.id.clone();
        // Before the guest can see the balloon, and so report to it.
        let pin = self.pin_of(balloon.as_ref());
        let plugged = self.pc.add(plug).map_err(|error| {
            self.handles.remove(&id);
            VmError::Pc(error)
        })?;
        self.observer.add(plugged, balloon.clone());
        let info = info(plugged);
        if balloon.is_some() {
            (self.balloon, self.pin) = (balloon, pin);
        }
        self.pin_or_unpin();
        Ok(info)
    }

    /// Gives a device of the host to the guest. Unless it is behind the virtual IOMMU, no page may be discarded from now
    /// on.
    fn plug_assigned(&mut self, device: &DeviceConfig) -> Result<PciDeviceInfo, VmError> {
        let assignment = devices::assignment(device, self.iommu.as_ref());
        let Assignment { id, place, .. } = &assignment;
        self.check_iommu(id, place.segment, device.iommu)
            .map_err(VmError::Hotplug)?;
        if assignment.iommu.is_none() {
            self.pin()?;
        }
        let added = self.pc.add_assigned(assignment).map(|plugged| {
            self.observer.add(plugged, None);
            info(plugged)
        });
        self.pin_or_unpin();
        added.map_err(VmError::Pc)
    }

    /// A guest looks only at segments for devices that are behind the IOMMU later.
    fn check_iommu(
        &self,
        id: &str,
        segment: u16,
        is_behind_iommu: bool,
    ) -> Result<(), HotplugError> {
        let platform = self.platform.as_ref();
        let segments = platform.and_then(|it| it.iommu_segments.as_deref());
        match is_behind_iommu && !segments.is_some_and(|it| it.contains(&segment)) {
            true => Err(HotplugError::NotIommuSegment {
                id: id.to_owned(),
                segment,
            }),
            false => Ok(()),
        }
    }

    pub(super) fn check_addition(&self, device: &NewDevice) -> Result<(), HotplugError> {
        let plugged = self.pc.devices().iter();
        let plugged = plugged.map(|it| (it.id.as_str(), it.kind));
        match in_the_way(plugged, device, self.balloon.is_some()) {
            Some(id) => Err(HotplugError::StillLeaving { id: id.to_owned() }),
            None => Ok(()),
        }
    }

    /// The device, if it can be removed now.
    pub(super) fn removable(&self, id: &str) -> Result<&Plugged, HotplugError> {
        let found = self.pc.devices().iter().find(|it| it.id == id);
        let plugged = found.ok_or_else(|| HotplugError::NoSuchDevice { id: id.to_owned() })?;
        match (plugged.kind, &self.balloon) {
            (DeviceKind::Balloon, Some(balloon)) => {
                let (ballooned_bytes, target_bytes) =
                    (balloon.actual_bytes(), balloon.target_bytes());
                match (ballooned_bytes, target_bytes) {
                    (0, 0) => Ok(plugged),
                    _ => Err(HotplugError::BalloonInflated {
                        id: id.to_owned(),
                        ballooned_bytes,
                        target_bytes,
                    }),
                }
            }
            (
                DeviceKind::Block
                | DeviceKind::Net
                | DeviceKind::VhostUser
                | DeviceKind::Pmem
                | DeviceKind::Assigned
                | DeviceKind::Vsock
                | DeviceKind::Balloon,
                _,
            ) => Ok(plugged),
            _ => Err(HotplugError::NotRemovable { id: id.to_owned() }),
        }
    }
}

/// The device that has to leave before this one comes. `has_balloon`: there is one that is not leaving.
fn in_the_way<'a>(
    mut plugged: impl Iterator<Item = (&'a str, DeviceKind)>,
    device: &NewDevice,
    has_balloon: bool,
) -> Option<&'a str> {
    let not_beside = match device {
        NewDevice::Balloon(_) => Some(DeviceKind::Balloon),
        NewDevice::Vsock(_) => Some(DeviceKind::Vsock),
        // Nothing can stop a balloon that is leaving from discarding what the guest reports until then.
        NewDevice::Assigned(device) if !has_balloon && !device.iommu => Some(DeviceKind::Balloon),
        NewDevice::Disk(_)
        | NewDevice::Net(_)
        | NewDevice::Fs(_)
        | NewDevice::GenericVhostUser(_)
        | NewDevice::Assigned(_)
        | NewDevice::Pmem(_) => None,
    };
    let found = plugged.find(|(id, kind)| Some(*id) == device.id() || Some(*kind) == not_beside);
    found.map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use api::config::{BalloonConfig, VsockConfig};

    use super::*;

    #[test]
    fn device_waits_for_what_must_not_be_beside_it() {
        let plugged = [
            ("_disk0", DeviceKind::Block),
            ("_balloon", DeviceKind::Balloon),
        ];
        let found = |device: &NewDevice, has_balloon| {
            let plugged = plugged.iter().copied();
            in_the_way(plugged, device, has_balloon).map(str::to_owned)
        };
        let assigned = NewDevice::Assigned(DeviceConfig::default());
        assert_eq!(found(&assigned, false).as_deref(), Some("_balloon"));
        assert_eq!(found(&assigned, true), None, "it can be inhibited");
        let behind_iommu = NewDevice::Assigned(DeviceConfig {
            iommu: true,
            ..DeviceConfig::default()
        });
        assert_eq!(
            found(&behind_iommu, false),
            None,
            "the balloon sees what is mapped"
        );
        let balloon = NewDevice::Balloon(BalloonConfig::default());
        assert_eq!(found(&balloon, false).as_deref(), Some("_balloon"));
        let vsock = NewDevice::Vsock(VsockConfig::default());
        assert_eq!(found(&vsock, false), None);
        let named = NewDevice::Assigned(DeviceConfig {
            id: Some("_disk0".to_owned()),
            ..DeviceConfig::default()
        });
        assert_eq!(found(&named, true).as_deref(), Some("_disk0"));
    }
}
