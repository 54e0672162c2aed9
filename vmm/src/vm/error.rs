//! Why a machine could not be built or steered.

use std::error::Error;

use machine::pc::PcError;
use machine::serial::SerialError;

/// Each variant names the part of the machine; the cause says the rest.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The configuration has no balloon.
    #[error("Missing virtio-balloon, can't proceed as expected")]
    MissingBalloon,
    /// The guest cannot have so much memory.
    #[error("The size of RAM cannot be changed so")]
    MemoryResize(#[source] virtio_devices::mem::ResizeError),
    /// The configuration gives no memory to be plugged in.
    #[error("Missing virtio-mem, can't proceed as expected")]
    MissingMem,
    /// A run of hinting cannot be started or stopped.
    #[error("The balloon does not take it")]
    Hinting(#[source] virtio_devices::balloon::HintingError),
    /// A device cannot come or go.
    #[error(transparent)]
    Hotplug(super::HotplugError),
    /// Reporting cannot be steered so.
    #[error("The balloon does not take it")]
    Reporting(#[source] virtio_devices::balloon::policy::ReportingError),
    /// Residency of guest RAM cannot be measured.
    #[error("Cannot measure the residency of guest memory")]
    Residency(#[source] virtio_devices::reclaim::ResidencyError),
    /// A console or the serial port.
    #[error("Cannot create console device {id}")]
    Console {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: SerialError,
    },
    /// The machine without its devices, or a device cannot be plugged in.
    #[error(transparent)]
    Pc(PcError),
}

impl VmError {
    /// The device `id` cannot be made.
    pub(crate) fn device(id: &str, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Pc(PcError::Device {
            id: id.to_owned(),
            source: source.into(),
        })
    }
}
