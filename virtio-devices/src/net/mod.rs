//! virtio-net (virtio 1.2 §5.1) on a tap device.
//!
//! ```text
//!   params        a device's parameters       shared  data shared by the device's halves
//!   device        configuration half: features, configuration space, queue numbers
//!   pair          queue half: one receive and one transmit queue on one worker
//!   receive       tap → guest            transmit   guest → tap
//!   announce      announces to switches where a restored guest is
//!   control       control queue: number of pairs in use, offloads
//!   tap           opening and configuring; tap_sys  its ioctls
//!   frame_io      frames in and out of a tap, directly from and to guest RAM
//!   tap_watch     the tap events that the worker waits for
//! ```
//!
//! Frames have the 12-byte header of virtio 1.x on both sides, so the kernel itself fills in and reads checksums and
//! segmentation offloads.

mod announce;
mod config_space;
mod control;
mod counters;
mod device;
mod frame_io;
mod pair;
mod params;
mod receive;
mod shared;
mod tap;
mod tap_sys;
mod tap_watch;
#[cfg(test)]
mod tests;
mod transmit;

pub(crate) use config_space::has;
pub(crate) use control::{ControlQueue, Controlled};
pub use device::{Net, NetDeviceState};
pub use params::{Backend, NetError, NetLimiters, NetParams, PAIRS_MAX, QUEUE_SIZE_MAX};
pub use tap::{Tap, TapError};
