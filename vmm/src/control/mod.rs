//! The control thread: owns the VM, runs every change, and publishes the state.

mod current_migration;
mod current_snapshot;
mod devices;
mod error;
mod lifecycle;
mod live_snapshot;
mod migration;
mod reporting;
mod resize;
mod saving;
mod take_back;
mod taps;
mod thread;

pub use error::{Done, LifecycleError, RequestError};
pub use lifecycle::Lifecycle;
#[cfg(test)]
pub(crate) use thread::GUEST_RESET_INTERVAL;
pub use thread::{ControlHandle, ControlSetup, ControlThread, ControlThreadError, Ending};
