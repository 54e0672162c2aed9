//! Receives a notification from the kernel when tasks begin to wait for memory.
//!
//! A trigger is a line written to a pressure file; `poll` then returns `POLLPRI` at most once per window. A trigger
//! reacts within milliseconds, whereas an average over ten seconds takes seconds to change. A process without
//! `CAP_SYS_RESOURCE` may only use windows that are multiples of two seconds (`kernel/sched/psi.c`, since 6.5). Such a
//! window is the second choice.

use std::fs::{File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use thiserror::Error;

/// The condition of a trigger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TriggerLevel {
    /// Time in which at least one task waited within the window, µs.
    pub stall_us: u64,
    /// The window, µs; 500 ms to 10 s.
    pub window_us: u64,
}

/// Reasons why there is no trigger. The agent then relies on reading the averages once per second.
#[derive(Debug, Error)]
pub enum TriggerError {
    /// The pressure file cannot be opened for writing.
    #[error("Cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The kernel rejected the trigger.
    #[error("{} rejects a trigger of {} µs in {} µs", path.display(), level.stall_us, level.window_us)]
    Refused {
        /// The file.
        path: PathBuf,
        /// The requested value.
        level: TriggerLevel,
        /// The error from the system.
        #[source]
        source: io::Error,
    },
    /// The thread, or the pipe that ends it, could not be created.
    #[error("Cannot start the thread that monitors memory pressure")]
    Thread(#[source] io::Error),
}

/// A watching thread; ends when dropped.
#[derive(Debug)]
pub struct PressureTrigger {
    level: TriggerLevel,
    /// The thread ends when this end of the pipe is closed.
    running: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl PressureTrigger {
    /// The level the kernel accepted.
    pub fn level(&self) -> TriggerLevel {
        self.level
    }
}

impl Drop for PressureTrigger {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was already printed; there is nothing to add while shutting down.
            let _ = thread.join();
        }
    }
}

/// Calls `notify` each time the level is crossed, on a separate thread, at most once per window.
///
/// # Errors
/// The kernel has no pressure file, or accepts neither the level nor its two-second equivalent.
pub fn watch_pressure(
    path: &Path,
    level: TriggerLevel,
    notify: impl FnMut() + Send + 'static,
) -> Result<PressureTrigger, TriggerError> {
    let (file, level) = arm(path, level).or_else(|error| match error {
        TriggerError::Refused { .. } => arm(path, unprivileged(level)),
        other => Err(other),
    })?;
    let (ended, running) = io::pipe().map_err(TriggerError::Thread)?;
    let thread = thread::Builder::new()
        .name("pressure".to_owned())
        .spawn(move || watch(&file, &ended, notify))
        .map_err(TriggerError::Thread)?;
    Ok(PressureTrigger {
        level,
        running: Some(running),
        thread: Some(thread),
    })
}

/// The same fraction of time in a window that needs no privilege.
fn unprivileged(level: TriggerLevel) -> TriggerLevel {
    const WINDOW_US: u64 = 2_000_000;
    let windows = level.window_us.div_ceil(WINDOW_US).max(1);
    TriggerLevel {
        stall_us: level.stall_us,
        window_us: windows * WINDOW_US,
    }
}

fn arm(path: &Path, level: TriggerLevel) -> Result<(File, TriggerLevel), TriggerError> {
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| TriggerError::Open {
            path: path.to_owned(),
            source,
        })?;
    // One write with its terminating zero, as the kernel's documentation does it.
    let line = format!("some {} {}\0", level.stall_us, level.window_us);
    file.write_all(line.as_bytes())
        .map_err(|source| TriggerError::Refused {
            path: path.to_owned(),
            level,
            source,
        })?;
    Ok((file, level))
}

/// Watches the file until the other end of the pipe is closed.
fn watch(file: &File, ended: &PipeReader, mut notify: impl FnMut()) {
    loop {
        let mut polled = [
            PollFd::new(file, PollFlags::PRI),
            PollFd::new(ended, PollFlags::empty()),
        ];
        match poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Ok(_) => {}
            Err(error) => {
                log::warn!("cannot monitor the pressure file any longer: {error}");
                return;
            }
        }
        if !polled[1].revents().is_empty() {
            return;
        }
        let ready = polled[0].revents();
        if ready.contains(PollFlags::ERR) {
            // The control group no longer exists; reading the host will detect this, too.
            log::warn!("the pressure trigger ended with its control group");
            return;
        }
        if ready.contains(PollFlags::PRI) {
            notify();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::mpsc;

    use super::*;

    #[test]
    fn dropped_trigger_ends_its_thread() {
        // The file never reports pressure, so only the drop can wake the thread.
        let file = tempfile::NamedTempFile::new().unwrap();
        let level = TriggerLevel {
            stall_us: 70_000,
            window_us: 1_000_000,
        };
        let (sender, receiver) = mpsc::channel::<()>();
        let trigger = watch_pressure(file.path(), level, move || sender.send(()).unwrap()).unwrap();
        assert_eq!(trigger.level(), level);
        assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Empty));
        drop(trigger);
        assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Disconnected));
    }
}
