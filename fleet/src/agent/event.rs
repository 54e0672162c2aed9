//! Events that wake the control loop.

use std::sync::mpsc::SyncSender;

use crate::cluster::{HostReport, StoreView};
use crate::http::{Request, Response};
use crate::moves::{Home, MoveNews};
use crate::worker::VmEvent;

/// An event for the control loop.
pub(super) enum Event {
    Vm(VmEvent),
    /// The kernel reports that tasks wait for memory.
    Pressure,
    /// A client's request; the response is sent through the sender.
    Client(Box<Request>, SyncSender<Response>),
    /// Requests from the store, sent by its thread; the response is sent through the sender.
    Store(Box<StoreView>, SyncSender<HostReport>),
    /// The moves from and to this host; the response is sent through the sender.
    Moves(Box<MoveNews>, SyncSender<Home>),
    Reload,
    Stop,
}
