//! The commands to a worker thread, and its progress with them.

use std::sync::atomic::AtomicU64;
use std::sync::mpsc::SyncSender;

use super::turn::CommandsPending;
use crate::counters::Count;
use crate::device::{Activation, HandlerState};

/// The commands of a worker thread. Each `SyncSender<()>` acknowledges its command.
pub(super) enum Command {
    Activate(Box<Activation>),
    Reset(Option<SyncSender<()>>),
    Pause(SyncSender<()>),
    Resume(SyncSender<()>),
    /// Returns the paused handler's state.
    State(SyncSender<HandlerState>),
    /// Serves this queue for a vCPU that is held; the result is whether it was served.
    Kick(u16, SyncSender<bool>),
    Stop,
}

/// Data shared by the handle and the thread.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Number of resets requested.
    pub(super) resets_requested: AtomicU64,
    /// Number of resets finished; equal to `resets_requested` when no reset is pending.
    pub(super) resets_done: AtomicU64,
    /// Number of handler failures.
    pub(super) failures: Count,
    /// The signal that makes a handler stop.
    pub(super) pending: CommandsPending,
}
