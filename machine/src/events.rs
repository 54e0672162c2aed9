//! Events of a machine, for its owner.

use std::sync::Arc;

/// An event of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceEvent<'a> {
    /// Identifier of the device.
    pub device: &'a str,
    /// The event.
    pub kind: DeviceEventKind,
    /// Number of events of this device that were dropped since the last one because of the rate limit.
    pub left_out: u64,
}

/// The events of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceEventKind {
    /// A driver initialised the device.
    Activated,
    /// The driver released it.
    Reset,
    /// The guest reported its panic.
    GuestPanic(GuestPanic),
}

/// The guest's report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestPanic {
    /// The kernel has panicked and stops.
    Panicked,
    /// The kernel has panicked and boots a crash kernel.
    CrashLoaded,
    /// An undefined value.
    Unknown,
}

/// Receives events. Called on vCPU threads; never blocks.
pub type DeviceEventSink = Arc<dyn Fn(DeviceEvent<'_>) + Send + Sync>;
