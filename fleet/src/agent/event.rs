//! What wakes the control loop.

use std::sync::mpsc::SyncSender;

use crate::cluster::{HostReport, StoreView};
use crate::http::{Request, Response};
use crate::worker::VmEvent;

/// An event for the control loop.
pub(super) enum Event {
    Vm(VmEvent),
    /// The kernel says that tasks wait for memory.
    Pressure,
    /// A client's request; the answer goes back over the sender.
    Client(Box<Request>, SyncSender<Response>),
    /// The store's thread brings what was asked from afar; the answer goes back over the sender.
    Store(Box<StoreView>, SyncSender<HostReport>),
    Reload,
    Stop,
}
