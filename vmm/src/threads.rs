//! The threads of the VMM: purpose and name.

use std::sync::Arc;

use machine::threads::MachineThread;
use strum::{EnumIter, IntoEnumIterator};

/// Name of the thread that owns the machine.
pub const CONTROL_THREAD: &str = "vmm";
/// Name of the thread that serves the API.
pub const HTTP_THREAD: &str = "http-server";
/// Name of the threads that query the machine for figures.
pub const QUERY_THREAD: &str = "api-query";
/// Name of the thread that writes events.
pub const EVENT_THREAD: &str = "event-monitor";
/// Name of the thread that evaluates alerts.
pub const THRESHOLDS_THREAD: &str = "thresholds";

/// Name of the thread that sends or receives a VM.
pub const MIGRATION_THREAD: &str = "migration";
/// Name of the thread that saves a running VM.
pub const SNAPSHOT_THREAD: &str = "snapshot";

/// Threads with the same permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, EnumIter)]
pub enum ThreadKind {
    /// Waits for the others; installs its filter once they run.
    Main,
    /// Owns the machine and starts its threads.
    Control,
    /// Serves the API and starts query threads.
    HttpServer,
    /// Queries the machine for figures.
    ApiQuery,
    /// Writes events.
    EventMonitor,
    /// Evaluates alerts.
    Thresholds,
    /// Sends or receives a VM.
    Migration,
    /// Saves a running VM.
    Snapshot,
    /// Belongs to the machine.
    #[strum(disabled)]
    Machine(MachineThread),
}

impl ThreadKind {
    /// Every kind.
    pub fn all() -> impl Iterator<Item = Self> {
        Self::iter().chain(MachineThread::all().map(Self::Machine))
    }
}

/// Called first on every thread the VMM starts; it installs the seccomp filter for that kind of thread.
pub type ThreadStart = Arc<dyn Fn(ThreadKind) + Send + Sync>;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn kinds_are_all_listed_once() {
        let kinds: Vec<_> = ThreadKind::all().collect();
        assert_eq!(kinds.len(), 23);
        assert_eq!(kinds.iter().collect::<BTreeSet<_>>().len(), kinds.len());
    }
}
