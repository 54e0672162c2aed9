//! What happens in a machine, for whoever listens.

use std::sync::Arc;

/// Something that happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceEvent<'a> {
    /// Identifier of the device.
    pub device: &'a str,
    /// What happened.
    pub kind: DeviceEventKind,
    /// Events of this device that were left out since the last one, because there were too many.
    pub left_out: u64,
}

/// What happened to a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEventKind {
    /// A driver took the device.
    Activated,
    /// The driver released it.
    Reset,
}

/// Takes events. Called on vCPU threads, and never blocks.
pub type DeviceEventSink = Arc<dyn Fn(DeviceEvent<'_>) + Send + Sync>;
