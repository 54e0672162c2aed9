//! Devices whose queues another process serves: the front end of vhost-user.
//!
//! ```text
//!   guest ── doorbell ──────────────────────────► back end      (signalled by KVM; no thread of the VMM is involved)
//!   guest ◄── interrupt ── queues ◄── call ────── back end
//!                            │ gate
//!                           link ◄── socket ────► back end      (features, memory, addresses of the rings)
//!
//!   queues   the handler of all queues: offers the rings, passes interrupts on
//!   link     a handler without queues: connects and communicates with the back end
//!   gate     state shared by both threads: which rings are offered, and whether the back end has them
//!   session  one connection
//!   config   reads the configuration space of the back end
//!   rings    the queues in the form that the back end needs
//!   ledger   the requests in flight of a back end that does not record them
//!   pairs    the control queue of a network interface: how many pairs of queues the driver uses
//!   device   the configuration half of a device; that of a shared folder is in `fs`
//!   identity features and configuration space, as the link has read them from the back end
//!   profile  the features and the configuration space that a driver may see
//! ```
//!
//! Only the link waits for the back end, without a time limit. If the guest resets the device, or the VM pauses or
//! ends, the queues' thread gives the back end one second (`GRACE`) to return the rings. Then it shuts the connection down, which
//! ends every call of the link. So a back end that never responds blocks no other thread.
//!
//! The link tries forever to reconnect to a back end that has disconnected. If the back end keeps a record of its
//! requests in flight, the VMM keeps that record for its successor (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`). Otherwise,
//! the queues' thread follows the rings at each interrupt, and places the requests in flight where the successor
//! starts. If the thread has lost track, the successor continues after the last completed request. That is exact for a
//! back end that completes requests in order.
//!
//! A device whose features come from the back end has none until a back end connects. A driver that probes it waits in
//! its first reset (`DeviceIdentity`).

#[cfg(any(test, feature = "test-utils"))]
pub mod any_back_end;
mod config;
mod counters;
mod device;
mod gate;
mod identity;
mod ledger;
mod link;
mod pairs;
mod profile;
mod queues;
mod rings;
mod session;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::device::QueueHandler;
pub(crate) use counters::Shared;
pub use device::{IdentityState, VhostUser, VhostUserParams, VhostUserState};
pub use link::Endpoint;
pub(crate) use link::Link;
pub(crate) use profile::RING_FEATURES;
pub use profile::{NetProfile, Profile};
use queues::Queues;

/// Both handlers of a device, in the order in which the transport needs them: queues first.
pub(crate) fn handlers(id: String, link: Link, shared: &Arc<Shared>) -> Vec<Box<dyn QueueHandler>> {
    let queues = Queues::new(id, Arc::clone(link.gate()), Arc::clone(shared));
    vec![Box::new(queues), Box::new(link)]
}
