//! The counters of a device that another process serves.

use crate::counters::counters;

counters! {
    /// The counters of a device.
    Shared {
        /// Gauge: whether the back end is connected.
        connected,
        /// Gauge: whether the back end has the rings.
        serving,
        connections,
        connections_lost,
        /// Messages and values that violate the protocol, and rejections by the back end.
        protocol_errors,
        /// Requests of the control queue that were answered with an error.
        bad_requests,
        /// Number of times the back end did not return the rings in time.
        rings_taken_away,
        /// Requests in flight at the end of a back end, which its successor may not get, or get although they were completed.
        uncertain_requests,
        interrupts,
    }
}
