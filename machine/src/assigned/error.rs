//! Reasons why a device cannot be assigned.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use vfio_ioctls::VfioError;

/// A device of the host cannot be assigned to the guest.
#[derive(Debug, thiserror::Error)]
pub enum AssignError {
    /// The path does not name a PCI device.
    #[error("{} is not the folder of a PCI device in sysfs", path.display())]
    NotPci {
        /// The path.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The device has no group, or VFIO does not have the group.
    #[error(
        "cannot find {} in VFIO: is an IOMMU enabled, and are the device and all others of its IOMMU group bound to \
         vfio-pci?",
        path.display()
    )]
    NoGroup {
        /// The device.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Neither the IOMMU nor VFIO.
    #[error("cannot use VFIO: is an IOMMU enabled, and the module vfio-pci loaded?")]
    Container(#[source] VfioError),
    /// KVM rejects the connection to VFIO.
    #[error("cannot connect KVM with VFIO")]
    Kvm(#[source] hypervisor::Error),
    /// The device or its group.
    #[error(
        "cannot open {}: are the device and all others of its IOMMU group bound to vfio-pci?",
        path.display()
    )]
    Open {
        /// The device.
        path: PathBuf,
        #[source]
        source: VfioError,
    },
    /// The guest has it, or has not released it yet.
    #[error("{} is already assigned to this VM", path.display())]
    IsAssigned {
        /// The device.
        path: PathBuf,
    },
    /// A vCPU has removed the last device.
    #[error("cannot open {}: the last assigned device was removed meanwhile; try again", path.display())]
    ContainerEmptied {
        /// The device.
        path: PathBuf,
    },
    /// The host does not give a group away in part.
    #[error(
        "cannot open {}: other devices of its IOMMU group have drivers of the host: {}; bind them to vfio-pci too",
        path.display(),
        others.join(", ")
    )]
    GroupIsUsed {
        /// The device.
        path: PathBuf,
        /// The others, and their drivers.
        others: Vec<String>,
    },
    /// A group has one container, and so one set of mappings.
    #[error(
        "{} is in the IOMMU group of {}, which is assigned to this VM: several devices of a group need iommu=off",
        path.display(),
        other.display()
    )]
    GroupIsAssigned {
        /// The device.
        path: PathBuf,
        /// The device that the guest has.
        other: PathBuf,
    },
    /// The IOMMU, or the limit of locked memory.
    #[error("cannot map guest RAM for the device: is the limit of locked memory as large as RAM?")]
    MapRam(#[source] io::Error),
    /// The kernel tracks changes of such files.
    #[error(
        "cannot map guest RAM at {start:#x} for the device: it is in an ordinary file with shared=on, whose pages the \
         kernel does not pin: use a file on tmpfs or hugetlbfs, or RAM without a file"
    )]
    OrdinaryFile {
        /// Its first guest address.
        start: u64,
    },
    /// The guest maps memory in smaller units.
    #[error("the IOMMU of the host has no pages of 4 KiB: its page sizes are {page_sizes:#x}")]
    IommuPages {
        /// One bit for each size.
        page_sizes: u64,
    },
    /// A bridge, for example.
    #[error("the device has a header of type {header_type:#x}; only type 0 can be assigned")]
    HeaderType {
        /// The type.
        header_type: u8,
    },
    /// The machine has no INTx.
    #[error("the device has neither MSI nor MSI-X")]
    NoInterrupt,
    /// The table or the pending bits of MSI-X.
    #[error("the MSI-X structures of the device are not in one of its memory BARs")]
    BadMsix,
    /// The host has no descriptor or address space left.
    #[error("cannot use the device's registers or interrupts")]
    Host(#[source] io::Error),
}

impl AssignError {
    /// The device whose folder in sysfs is `path` cannot be opened.
    pub(super) fn of_open(path: &Path, source: VfioError) -> Self {
        let path = path.to_owned();
        let others = match source {
            VfioError::GroupViable => users_of_group(&path),
            _ => Vec::new(),
        };
        match others.is_empty() {
            true => Self::Open { path, source },
            false => Self::GroupIsUsed { path, others },
        }
    }
}

/// Devices of the group of `path` that have other drivers than vfio-pci, with the names of these.
fn users_of_group(path: &Path) -> Vec<String> {
    let devices = fs::read_dir(path.join("iommu_group/devices"));
    let devices = devices.into_iter().flatten().flatten();
    let mut users: Vec<String> = devices
        .filter_map(|device| {
            let driver = fs::read_link(device.path().join("driver")).ok()?;
            let driver = driver.file_name()?.to_string_lossy().into_owned();
            let name = device.file_name();
            (driver != "vfio-pci").then(|| format!("{} ({driver})", name.to_string_lossy()))
        })
        .collect();
    users.sort_unstable();
    users
}
