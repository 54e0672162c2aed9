//! Tracks open devices. Each device can be open only once, and the devices of an IOMMU group only in one container.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use vfio_ioctls::VfioError;
use virtio_devices::Unpoisoned;

use super::error::AssignError;

/// The open devices of a group.
#[derive(Debug)]
struct Group {
    /// The number of their container.
    container: u64,
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
    /// Opens the device whose folder in sysfs is `path`, in the container with this number. `open` learns whether the
    /// device is the first of its group. Devices are opened and closed one by one, because a group is taken with its
    /// first device and released with its last one.
    ///
    /// # Errors
    /// The device is open, another one of its group is in another container, it has no group, or `open` fails.
    pub(super) fn open<T>(
        self: &Arc<Self>,
        path: &Path,
        container: u64,
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
        if let Some(known) = claims.get(&group) {
            if known.devices.contains(&device) {
                return Err(AssignError::IsAssigned { path: device });
            }
            if let Some(other) = known.devices.first()
                && known.container != container
            {
                return Err(AssignError::GroupIsAssigned {
                    path: device,
                    other: other.clone(),
                });
            }
        }
        let opened = open(!claims.contains_key(&group))?;
        let new = || Group {
            container,
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
    /// Closes the device. `close` learns whether it is the last of its group.
    pub(super) fn close(&self, close: impl FnOnce(bool)) {
        let mut claims = self.claims.0.lock().unpoisoned();
        let mut is_last = false;
        if let Some(known) = claims.get_mut(&self.group) {
            known.devices.remove(&self.device);
            is_last = known.devices.is_empty();
        }
        close(is_last);
        if is_last {
            claims.remove(&self.group);
        }
    }
}
