//! Reasons for rejecting alerts. All of them are client errors.

use super::{ALERTS_MAX, NAME_LENGTH_MAX};

/// Reasons for rejecting a change; nothing of it was applied.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlertError {
    /// One alert is invalid.
    #[error("Alert {name:?}")]
    Alert {
        /// The alert.
        name: String,
        /// The reason.
        #[source]
        fault: AlertFault,
    },
    /// There would be too many alerts.
    #[error("There can be no more than {ALERTS_MAX} alerts")]
    TooManyAlerts,
}

/// Errors in an alert.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlertFault {
    /// The name is empty or too long.
    #[error("a name has between 1 and {NAME_LENGTH_MAX} characters")]
    Name,
    /// The request contains the name twice.
    #[error("it is in the request more than once")]
    Twice,
    /// There is no such alert to remove.
    #[error("there is no such alert")]
    Unknown,
    /// A new alert lacks something.
    #[error("a new alert needs {0:?}")]
    Missing(&'static str),
    /// The figure does not exist.
    #[error("{0:?} is neither a number of vm.reclaim-stats nor of the form <device>/<counter>")]
    Figure(String),
    /// The value that ends the alert would start it.
    #[error("leave ({leave}) must not be {side} enter ({enter})")]
    LeaveBeyondEnter {
        /// Value that ends it.
        leave: u64,
        /// Value that starts it.
        enter: u64,
        /// `above` or `below`.
        side: &'static str,
    },
    /// The duration is too long.
    #[error("duration_ms is {0}, more than a day")]
    Duration(u64),
}
