//! Errors of building and controlling a machine.

use std::error::Error;

use machine::pc::PcError;
use machine::serial::SerialError;

use crate::snapshot::SnapshotError;

/// Each variant names the part of the machine; the cause has the details.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration has no balloon.
    #[error("Missing virtio-balloon, can't proceed as expected")]
    MissingBalloon,
    /// The guest cannot have this much memory.
    #[error("Cannot change the size of RAM")]
    MemoryResize(#[source] virtio_devices::mem::ResizeError),
    /// The configuration has no memory hot-plug.
    #[error("Missing virtio-mem, can't proceed as expected")]
    MissingMem,
    /// The host cannot write a disk's image to stable storage.
    #[error("Cannot sync the image of disk {id}")]
    DiskSync {
        /// Its name.
        id: String,
        /// The error from fdatasync.
        #[source]
        source: std::io::Error,
    },
    /// The host cannot write persistent memory to stable storage.
    #[error("Cannot sync the file of persistent memory {id}")]
    PmemSync {
        /// Its name.
        id: String,
        /// The error from fdatasync.
        #[source]
        source: std::io::Error,
    },
    /// Another process uses the image of a disk or of persistent memory.
    #[error("Cannot lock the image of {id}: another process uses it")]
    ImageLock {
        /// Name of the device.
        id: String,
        /// The error from fcntl.
        #[source]
        source: std::io::Error,
    },
    /// The image of a disk or of persistent memory cannot be locked, read again or released.
    #[error("Cannot take over or release the image of {id}")]
    ImageHold {
        /// Name of the device.
        id: String,
        /// The reason.
        #[source]
        source: std::io::Error,
    },
    /// A disk cannot have this size.
    #[error("Cannot change the size of the disk")]
    DiskResize(#[source] virtio_devices::block::DiskResizeError),
    /// A run of hinting cannot be started or stopped.
    #[error("Cannot start or stop free page hinting")]
    Hinting(#[source] virtio_devices::balloon::HintingError),
    /// A device cannot be added or removed.
    #[error(transparent)]
    Hotplug(HotplugError),
    /// Reporting cannot be controlled this way.
    #[error("Cannot control free page reporting")]
    Reporting(#[source] virtio_devices::balloon::reporting_policy::ReportingError),
    /// A device is assigned only when no page can be discarded any more.
    #[error("Cannot assign a device: the balloon is still discarding memory")]
    Unsettled,
    /// Residency of guest RAM cannot be measured.
    #[error("Cannot measure the residency of guest memory")]
    Residency(#[source] virtio_devices::reclaim::ResidencyError),
    /// A console or the serial port.
    #[error("Cannot create console device {id}")]
    Console {
        /// The device.
        id: String,
        /// The reason.
        #[source]
        source: SerialError,
    },
    /// The content of RAM cannot be restored.
    #[error(transparent)]
    Snapshot(SnapshotError),
    /// The machine without its devices cannot be created, or a device cannot be plugged in.
    #[error(transparent)]
    Pc(PcError),
}

impl VmError {
    /// The device `id` cannot be created.
    pub(crate) fn device(id: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Pc(PcError::Device {
            id: id.to_owned(),
            source: source.into(),
        })
    }
}

/// Reasons why a device cannot be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// No device of this name.
    #[error("There is no device {id}")]
    NoSuchDevice {
        /// The name.
        id: String,
    },
    /// A device that every machine has, or that does not support removal.
    #[error(
        "Device {id} cannot be removed: only devices that can be added to a running VM support removal"
    )]
    NotRemovable {
        /// The name.
        id: String,
    },
    /// The balloon is inflated, or has a target.
    #[error(
        "Balloon {id} holds {ballooned_bytes} bytes; its target is {target_bytes} bytes: \
         resize the balloon to 0 and wait until it is empty"
    )]
    BalloonInflated {
        /// The balloon.
        id: String,
        /// The size that the guest reports.
        ballooned_bytes: u64,
        /// The target.
        target_bytes: u64,
    },
    /// A device of this name is still waiting for its release by the guest.
    #[error("Device {id} is still being removed: the guest has not released it")]
    StillLeaving {
        /// The name.
        id: String,
    },
    /// The VMM has no part in its data.
    #[error("Device {id} is served by a vhost-user back end: change it there")]
    OfBackEnd {
        /// The name.
        id: String,
    },
    /// A second balloon.
    #[error("The VM already has balloon {id}")]
    BalloonPresent {
        /// The balloon.
        id: String,
    },
    /// The guest learns at boot which devices are behind the virtual IOMMU.
    #[error(
        "Device {id} cannot be added with iommu=on to PCI segment {segment}: only segments in iommu_segments of --platform accept such devices later"
    )]
    NotIommuSegment {
        /// The device.
        id: String,
        /// Its segment.
        segment: u16,
    },
    /// A second vsock device.
    #[error("The VM already has a vsock device, {id}")]
    VsockPresent {
        /// The device.
        id: String,
    },
}
