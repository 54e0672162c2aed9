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
    /// A disk cannot have this size.
    #[error("Cannot change the size of the disk")]
    DiskResize(#[source] virtio_devices::block::DiskResizeError),
    /// A run of hinting cannot be started or stopped.
    #[error("Cannot start or stop free page hinting")]
    Hinting(#[source] virtio_devices::balloon::HintingError),
    /// A device cannot be added or removed.
    #[error(transparent)]
    Hotplug(super::HotplugError),
    /// Reporting cannot be controlled this way.
    #[error("Cannot control free page reporting")]
    Reporting(#[source] virtio_devices::balloon::policy::ReportingError),
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
