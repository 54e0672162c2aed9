//! Tracks open devices. Each device can be open only once, and only one device of an IOMMU group.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use vfio_ioctls::VfioError;
use virtio_devices::Unpoisoned;

use super::error::AssignError;

/// The open devices by their groups. The paths are those of folders in sysfs, without links.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<BTreeMap<PathBuf, PathBuf>>);

/// The right to open a device, until it is dropped.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Arc<Claims>,
    group: PathBuf,
}

impl Claims {
    /// Claims the device whose folder in sysfs is `path`.
    ///
    /// # Errors
    /// The device is open, another one of its group is, or it has no group.
    pub(super) fn claim(self: &Arc<Self>, path: &Path) -> Result<Claim, AssignError> {
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
        match claims.get(&group) {
            Some(open) if *open == device => Err(AssignError::IsAssigned { path: device }),
            Some(open) => Err(AssignError::GroupIsAssigned {
                path: device,
                other: open.clone(),
            }),
            None => {
                claims.insert(group.clone(), device);
                Ok(Claim {
                    claims: Arc::clone(self),
                    group,
                })
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.0.lock().unpoisoned().remove(&self.group);
    }
}
