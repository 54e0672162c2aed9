//! The kinds of threads, told by the thread's name.

use crate::api::QUERY_THREAD;
use crate::api::http::HTTP_THREAD;
use crate::control::CONTROL_THREAD;
use crate::event_monitor::EVENT_THREAD;
use crate::serial::SERIAL_MANAGER_THREAD;
use crate::thresholds::THRESHOLDS_THREAD;

/// Threads that may do the same things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThreadKind {
    /// Waits for the others; filtered once they run.
    Main,
    /// Owns the machine and starts its threads.
    Control,
    /// Serves the API and starts query threads.
    HttpServer,
    /// Asks the machine for figures.
    ApiQuery,
    /// Writes events.
    EventMonitor,
    /// Looks at figures for alerts.
    Thresholds,
    /// Runs the guest.
    Vcpu,
    /// Carries serial port input and output.
    Serial,
    /// Serves queues of the balloon.
    Balloon,
    /// Serves the queue of the device that plugs memory in.
    Mem,
    /// Serves queues of a disk.
    Block,
    /// Serves queues of a network device.
    Net,
    /// Serves the queue of the random number device.
    Rng,
    /// Serves queues of the console.
    Console,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: &[Self] = &[
        Self::Main,
        Self::Control,
        Self::HttpServer,
        Self::ApiQuery,
        Self::EventMonitor,
        Self::Thresholds,
        Self::Vcpu,
        Self::Serial,
        Self::Balloon,
        Self::Mem,
        Self::Block,
        Self::Net,
        Self::Rng,
        Self::Console,
    ];

    /// The kind of the thread that the hook is given this name for; `None` when no thread of ours is called so.
    pub fn of_name(name: &str) -> Option<Self> {
        let known = [
            ("main", Self::Main),
            (CONTROL_THREAD, Self::Control),
            (HTTP_THREAD, Self::HttpServer),
            (QUERY_THREAD, Self::ApiQuery),
            (EVENT_THREAD, Self::EventMonitor),
            (THRESHOLDS_THREAD, Self::Thresholds),
            (SERIAL_MANAGER_THREAD, Self::Serial),
        ];
        let workers = Self::ALL
            .iter()
            .filter_map(|kind| Some((kind.worker_name()?, *kind)));
        known
            .into_iter()
            .chain(workers)
            .find(|(known, _)| *known == name)
            .map(|(_, kind)| kind)
            .or_else(|| is_vcpu(name).then_some(Self::Vcpu))
    }

    /// The name the hook is given for the workers of a device. Their own begins with the device's id, which a user may
    /// choose to be the name of any other thread.
    pub fn worker_name(self) -> Option<&'static str> {
        match self {
            Self::Balloon => Some("balloon-worker"),
            Self::Mem => Some("mem-worker"),
            Self::Block => Some("block-worker"),
            Self::Net => Some("net-worker"),
            Self::Rng => Some("rng-worker"),
            Self::Console => Some("console-worker"),
            Self::Main
            | Self::Control
            | Self::HttpServer
            | Self::ApiQuery
            | Self::EventMonitor
            | Self::Thresholds
            | Self::Vcpu
            | Self::Serial => None,
        }
    }
}

fn is_vcpu(name: &str) -> bool {
    name.strip_prefix("vcpu")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}
