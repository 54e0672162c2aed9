//! Tracks open devices. Each device can be open only once, and the devices of an IOMMU group only in one container.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vfio_ioctls::VfioError;
use virtio_devices::Unpoisoned;

use super::error::AssignError;

/// Whether a container can have devices. Changes only while [`Claims`] are locked.
#[derive(Debug, Default)]
pub(super) struct Occupancy {
    /// Its last group was released, and with it all mappings. It stays empty.
    is_emptied: AtomicBool,
    /// It keeps a group without open devices, and so its mappings.
    keeps_group: AtomicBool,
}

impl Occupancy {
    pub(super) fn is_emptied(&self) -> bool {
        self.is_emptied.load(Ordering::Acquire)
    }
}

/// The open devices of a group.
#[derive(Debug)]
struct Group {
    container: Arc<Occupancy>,
    devices: BTreeSet<PathBuf>,
}

/// The groups with open devices. The paths are those of folders in sysfs, without links.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<BTreeMap<PathBuf, Group>>);

/// An open device's place in its group.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Arc<Claims>,
    group: PathBuf,
    device: PathBuf,
}

impl Claims {
    /// Opens the device whose folder in sysfs is `path`, in a container. `open` learns whether the device is the first of
    /// its group. Devices are opened and closed one by one, because a group is taken with its
    /// first device and released with its last one.
    ///
    /// # Errors
    /// The device is open, another one of its group is in another container, it has no group, the container was emptied,
    /// or `open` fails.
    pub(super) fn open<T>(
        self: &Arc<Self>,
        path: &Path,
        container: &Arc<Occupancy>,
        open: impl FnOnce(bool) -> Result<T, AssignError>,
    ) -> Result<(T, Claim), AssignError> {
        let real = |path: &Path| {
            let found = path.canonicalize();
            found.map_err(|_| AssignError::Open {
                path: path.to_owned(),
                source: VfioError::InvalidPath,
            })
        };
        let device = real(path)?;
        let group = real(&path.join("iommu_group"))?;
        let mut claims = self.0.lock().unpoisoned();
        if container.is_emptied() {
            return Err(AssignError::ContainerEmptied { path: device });
        }
        if let Some(known) = claims.get(&group) {
            if known.devices.contains(&device) {
                return Err(AssignError::IsAssigned { path: device });
            }
            if let Some(other) = known.devices.first()
                && !Arc::ptr_eq(&known.container, container)
            {
                return Err(AssignError::GroupIsAssigned {
                    path: device,
                    other: other.clone(),
                });
            }
        }
        let opened = open(!claims.contains_key(&group))?;
        let new = || Group {
            container: Arc::clone(container),
            devices: BTreeSet::new(),
        };
        let known = claims.entry(group.clone()).or_insert_with(new);
        known.devices.insert(device.clone());
        let claim = Claim {
            claims: Arc::clone(self),
            group,
            device,
        };
        Ok((opened, claim))
    }
}

impl Claim {
    /// Closes the device. `close` learns whether it is the last of its group. `releases_group`: the last one then
    /// releases the group.
    pub(super) fn close(&self, releases_group: bool, close: impl FnOnce(bool)) {
        let mut claims = self.claims.0.lock().unpoisoned();
        if let Some(known) = claims.get_mut(&self.group) {
            known.devices.remove(&self.device);
        }
        let left = claims.extract_if(.., |_, known| known.devices.is_empty());
        let left = left.map(|(_, group)| group.container).last();
        if let Some(container) = &left {
            let is_other = |group: &Group| !Arc::ptr_eq(&group.container, container);
            if !releases_group {
                container.keeps_group.store(true, Ordering::Release);
            } else if !container.keeps_group.load(Ordering::Acquire)
                && claims.values().all(is_other)
            {
                container.is_emptied.store(true, Ordering::Release);
            }
        }
        close(left.is_some());
    }
}
