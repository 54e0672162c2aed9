//! The faults that end the work of a worker.

/// Reasons why a worker stops serving its device until the next reset.
///
/// Only for faults after which the worker cannot continue (rings outside of guest RAM, a host descriptor that is gone).
/// An invalid request is completed with an error status, or dropped and counted; it is not a `WorkerError`.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The ring itself cannot be read or written.
    #[error("virtqueue {index} is unusable: {reason}")]
    Queue {
        /// Queue number.
        index: u16,
        /// The error from the queue code; it does not implement `std::error::Error`.
        reason: String,
    },
    /// Registering or using a host descriptor failed.
    #[error("{what} failed")]
    Host {
        /// The operation, e.g. "epoll_ctl".
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// The worker thread cannot run on its host CPUs.
    #[error("cannot run a worker thread on host CPUs {host_cpus:?}")]
    Affinity {
        /// The host CPUs.
        host_cpus: Vec<usize>,
        #[source]
        source: std::io::Error,
    },
    /// The worker thread accepts no commands.
    #[error("the worker thread does not respond: {reason}")]
    Unresponsive {
        /// The error from the channel.
        reason: &'static str,
    },
}
