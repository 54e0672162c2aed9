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
    /// The change would result in too many alerts.
    #[error("A VM can have at most {ALERTS_MAX} alerts")]
    TooManyAlerts,
}

/// Errors in an alert.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlertFault {
    /// The name is empty or too long.
    #[error("a name has between 1 and {NAME_LENGTH_MAX} characters")]
    Name,
    /// The request contains the name twice.
    #[error("it occurs more than once in the request")]
    Twice,
    /// There is no such alert to remove.
    #[error("no such alert")]
    Unknown,
    /// A new alert lacks a required field.
    #[error("a new alert requires {0:?}")]
    Missing(&'static str),
    /// The figure does not exist.
    #[error("{0:?} is neither a figure of vm.reclaim-stats nor of the form <device>/<counter>")]
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
    #[error("duration_ms must be at most one day; got {0}")]
    Duration(u64),
}
