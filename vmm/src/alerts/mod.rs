//! Alerts: named rules on one figure each, with hysteresis. Pure; times are numbers.

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

/// Most alerts of a VM: what bounds events, memory and the cost of a look.
pub const ALERTS_MAX: usize = 32;
/// Most characters of an alert's name and of a figure's.
pub const NAME_LENGTH_MAX: usize = 128;
