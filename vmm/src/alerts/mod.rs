//! Alerts: named rules on one figure each, with hysteresis. Pure functions; times are numbers.

mod alert;
mod error;
mod figure;
mod list;

pub(crate) use alert::Transition;
pub use error::{AlertError, AlertFault};
#[cfg(test)]
pub(crate) use figure::Figure;
pub(crate) use figure::{Needs, Sources};
pub(crate) use list::AlertList;

/// Maximum number of alerts of a VM, which bounds events, memory and the cost of an evaluation.
pub const ALERTS_MAX: usize = 32;
/// Maximum length of an alert's name and of a figure's, in characters.
pub const NAME_LENGTH_MAX: usize = 128;
