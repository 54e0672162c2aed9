//! Why alerts were refused. All of these are the caller's faults.

use super::{ALERTS_MAX, NAME_LENGTH_MAX};

/// Why a change was refused; nothing of it was made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlertError {
    /// One alert makes no sense.
    #[error("Alert {name:?}")]
    Alert {
        /// Which one.
        name: String,
        /// What is wrong with it.
        #[source]
        fault: AlertFault,
    },
    /// It would be too many.
    #[error("There can be no more than {ALERTS_MAX} alerts")]
    TooManyAlerts,
}

/// What is wrong with an alert.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AlertFault {
    /// The name is empty or too long.
    #[error("a name has between 1 and {NAME_LENGTH_MAX} characters")]
    Name,
    /// The request has it twice.
    #[error("it is in the request more than once")]
    Twice,
    /// There is none to remove.
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
    /// Nobody waits that long.
    #[error("duration_ms is {0}, more than a day")]
    Duration(u64),
}
