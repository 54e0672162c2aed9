//! Worker threads: one per queue handler, created with the device, driven by commands.
//!
//! Threads are created with the device, before a guest sees it. Seccomp filters are inherited, so a thread created on a
//! vCPU thread would also have the vCPU's filter.
//!
//! ```text
//!            activate              fault                 resume
//!   Idle ───────────────► Active ─────────► Failed      Paused ──► as before
//!    ▲                      │                  │          ▲
//!    └───────── reset ──────┴──────────────────┘          └─ pause, from any state
//! ```
//!
//! * *Idle*: only commands and the handler's idle sources are served.
//! * *Active*: doorbells and the handler's own sources are served as well.
//! * *Failed*: as idle, with DEVICE_NEEDS_RESET set for the driver. A worker enters this state when its handler returns
//!   an error, which is logged once and counted.
//! * *Paused*: only commands are served. Doorbells are level-triggered and not drained, so a kick during the pause is
//!   found at resume. An activation during the pause waits for resume; a reset does not.
//!
//! A handler works in turns, see [`Turn`]: regardless of a ring's content, a command waits for at most one bounded
//! piece of work.

mod affinity;
mod command;
mod error;
mod handle;
mod sources;
#[cfg(test)]
mod tests;
mod thread;
mod throttle;
mod turn;

use std::sync::Arc;

pub use affinity::{HOST_CPUS_MAX, pin};
pub use error::WorkerError;
pub use handle::{Pausing, Worker, WorkerHandle};
#[cfg(any(test, feature = "test-utils"))]
pub(crate) use sources::Wake;
pub use sources::{Doorbell, EventSources};
pub(crate) use throttle::Throttle;
pub use turn::{Turn, Work};

/// The VMM's hook that runs first on every new worker thread, with the thread's name. It can install a seccomp filter.
pub type WorkerStart = Arc<dyn Fn(&str) + Send + Sync>;
