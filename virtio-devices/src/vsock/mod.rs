//! Socket device (virtio 1.2 §5.10): stream connections between the guest and host programs, which connect through UNIX
//! sockets.
//!
//! ```text
//!   host → guest   connect to SOCKET, write "CONNECT PORT\n"; once the guest has accepted, read "OK PORT\n"
//!   guest → host   the guest connects to port P of the host; the VMM connects to SOCKET_P
//!
//!   packet      the header of a packet
//!   connection  one stream: its phase, its credit, data in transit to the host
//!   muxer       all streams, the listener, and the order in which the guest is served
//!   handler     the three queues
//!   device      the configuration half
//! ```
//!
//! Connections have no timeouts. A client that gives up closes its end; a guest that gives up sends a reset.
//! [`CONNECTIONS_MAX`] limits the number of open connections.

mod connection;
mod counters;
mod device;
mod handler;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

pub use device::{Vsock, VsockParams, VsockState};
pub use muxer::{CONNECTIONS_MAX, VsockConnectionsState};
