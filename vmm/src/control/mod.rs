//! The control thread: owns the VM, runs every change, and publishes the state.

mod current_migration;
mod error;
mod lifecycle;
mod migration;
mod take_back;
mod thread;

pub use error::{LifecycleError, RequestError};
pub use lifecycle::Lifecycle;
#[cfg(test)]
pub(crate) use thread::GUEST_RESET_INTERVAL;
pub use thread::{ControlHandle, ControlSetup, ControlThread, ControlThreadError, Ending};
