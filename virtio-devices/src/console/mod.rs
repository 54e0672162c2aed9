//! Console device (virtio 1.2 §5.3): one port, bytes in and bytes out.
//!
//! ```text
//!   host input ──► only while the guest has buffers ──► queue 0 (receive)
//!   host output ◄── backlog, bounded, oldest first ◄── queue 1 (transmit)
//! ```
//!
//! A slow reader of the output never blocks the guest, although Linux spins until its console write is completed.
//! Output that is not accepted immediately waits in the backlog. Output that does not fit there is dropped and counted.

mod device;
mod endpoint;
mod handler;
mod output;
mod shared;
#[cfg(test)]
mod tests;

pub use device::{Console, ConsoleHandle, ConsoleState, WindowSize};
pub use endpoint::ConsoleEndpoint;
pub use handler::ConsoleOutputState;
