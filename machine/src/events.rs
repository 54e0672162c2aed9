//! What happens in a machine, for whoever listens.

use std::sync::Arc;

/// Something that happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEvent<'a> {
    /// A driver took the device with this id.
    Activated(&'a str),
    /// The driver let go of it.
    Reset(&'a str),
}

/// Takes events. Called on vCPU threads, and never blocks.
pub type DeviceEventSink = Arc<dyn Fn(DeviceEvent<'_>) + Send + Sync>;
