//! Plugs assigned devices into the bus. All other steps are the same as for virtio devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use virtio_devices::dma::DmaEndpoint;
use virtio_devices::iommu::IommuHandle;
use virtio_devices::pci::PciFunction;

use super::Pc;
use super::error::PcError;
use super::plugged::Plugged;
use crate::assigned::{AssignError, AssignedFunction, BarSlots, DeviceIommu, VfioFunction};
use crate::interrupt::FunctionVectors;
use crate::pci::Place;
use crate::threads::DeviceKind;

/// A device of the host for the guest.
#[derive(Debug, Clone)]
pub struct Assignment {
    /// Its identifier.
    pub id: String,
    /// Its place on the bus.
    pub place: Place,
    /// Its folder in sysfs.
    pub path: PathBuf,
    /// The virtual IOMMU, if the device is behind it.
    pub iommu: Option<IommuHandle>,
}

impl Assignment {
    /// Checks what needs neither KVM nor VFIO.
    ///
    /// # Errors
    /// The folder is not that of a PCI device, or VFIO does not have the device's group.
    pub fn check(&self) -> Result<(), PcError> {
        let path = || self.path.clone();
        let vendor = fs::metadata(self.path.join("vendor"));
        let checked = vendor
            .map_err(|source| AssignError::NotPci {
                path: path(),
                source,
            })
            .and_then(|_| {
                vfio_group(&self.path).map_err(|source| AssignError::NoGroup {
                    path: path(),
                    source,
                })
            });
        checked.map(drop).map_err(|source| PcError::Assign {
            id: self.id.clone(),
            source,
        })
    }
}

/// The file of the device's group. It exists once a device of the group is bound to a driver of VFIO.
fn vfio_group(device: &Path) -> io::Result<fs::Metadata> {
    let group = fs::read_link(device.join("iommu_group"))?;
    let name = group.file_name().unwrap_or_default();
    fs::metadata(Path::new("/dev/vfio").join(name))
}

/// An open device, and its connection to the virtual IOMMU if it is behind it.
struct Assigned {
    function: Arc<dyn PciFunction>,
    dma: Option<Arc<DmaEndpoint>>,
}

impl Pc {
    /// Adds a device of the host to the bus of a machine that has not booted. Unless the device is behind the virtual
    /// IOMMU, the caller has stopped discarding: until [`Pc::has_pinned_memory`] returns false, no page of RAM may be
    /// replaced.
    ///
    /// # Errors
    /// The host does not give the device away, or there is no free slot.
    pub fn plug_assigned(&mut self, assignment: Assignment) -> Result<&Plugged, PcError> {
        let plugged = self.put_assigned(assignment)?;
        Ok(self.keep(plugged))
    }

    /// The same for a running or paused machine, whose guest is notified. On an error nothing is left behind.
    ///
    /// # Errors
    /// As [`Pc::plug_assigned`], or the guest cannot be notified.
    pub fn add_assigned(&mut self, assignment: Assignment) -> Result<&Plugged, PcError> {
        let plugged = self.put_assigned(assignment)?;
        self.announce(plugged)
    }

    /// Whether devices have all of RAM pinned.
    pub fn has_pinned_memory(&self) -> bool {
        self.containers.have_pinned_all()
    }

    /// An assigned device, if there is one.
    pub(super) fn assigned_device(&self) -> Option<&Plugged> {
        self.plugged
            .iter()
            .find(|it| it.kind == DeviceKind::Assigned)
    }

    /// Such a machine cannot be copied: the state of the device, and what it writes, are unknown.
    pub(super) fn check_copyable(&self) -> Result<(), PcError> {
        match self.assigned_device() {
            Some(plugged) => Err(PcError::IsAssigned {
                id: plugged.id.clone(),
            }),
            None => Ok(()),
        }
    }

    fn put_assigned(&mut self, assignment: Assignment) -> Result<Plugged, PcError> {
        assignment.check()?;
        let Assignment {
            id,
            place,
            path,
            iommu,
        } = assignment;
        let assigned = self.assign(&id, &path, iommu.as_ref());
        let Assigned { function, dma } = assigned.map_err(|source| PcError::Assign {
            id: id.clone(),
            source,
        })?;
        match self.chassis.pci.add(function.clone(), place) {
            Ok(bdf) => {
                // Until here, the device has no access.
                if let Some(dma) = &dma {
                    dma.place(bdf.endpoint());
                }
                Ok(Plugged::assigned(id, bdf, function, dma.is_some()))
            }
            Err(source) => Err(PcError::Device {
                id,
                source: source.into(),
            }),
        }
    }

    fn assign(
        &mut self,
        id: &str,
        path: &Path,
        iommu: Option<&IommuHandle>,
    ) -> Result<Assigned, AssignError> {
        let vm = self.device_slots.vm();
        let (container, device) = match iommu {
            Some(_) => {
                let container = self.containers.own(vm)?;
                let device = VfioFunction::open(path, Arc::clone(&container))?;
                (container, device)
            }
            None => self.containers.open_shared(vm, path)?,
        };
        let dma = match iommu {
            Some(iommu) => {
                let own = Arc::new(DeviceIommu::new(container, &self.memory)?);
                Some(iommu.endpoint_of_host(own, self.memory.device_ram().clone()))
            }
            None => {
                container.map_ram(&self.memory)?;
                None
            }
        };
        let slots = Arc::clone(&self.device_slots) as Arc<dyn BarSlots>;
        let router = Arc::clone(&self.chassis.router);
        let vectors = |events| FunctionVectors::of_events(router, events);
        let device = (Arc::new(device) as _, dma.clone());
        let function = AssignedFunction::new(id, device, slots, vectors)?;
        Ok(Assigned { function, dma })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn device_that_vfio_does_not_have_is_refused_before_anything_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let assignment = Assignment {
            id: "a".to_owned(),
            place: Place::default(),
            path: path.clone(),
            iommu: None,
        };
        let refusal = || api::error_line(&assignment.check().unwrap_err());
        assert!(refusal().contains("is not the folder of a PCI device"));
        fs::write(path.join("vendor"), "0x8086").unwrap();
        assert!(refusal().contains("its IOMMU group"), "{}", refusal());
        symlink("/sys/kernel/iommu_groups/none", path.join("iommu_group")).unwrap();
        assert!(refusal().contains("its IOMMU group"), "{}", refusal());
    }
}
