//! The control thread: owns the VM, runs every change, and publishes what there is.

mod lifecycle;
mod machine;
mod request;
mod thread;
mod view;

pub use machine::{Machine, MachineObserver};
pub use request::{ControlError, RequestError, RequestKind, VmAnswer, VmRequest};
pub use thread::{ControlHandle, ControlSetup, ControlThread, ControlThreadError, Done, Ending};
pub use view::{MachineView, PublishedView, View};
