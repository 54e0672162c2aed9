//! The reporting policy: the host's settings for the guest's driver, and the driver's acknowledgement.
//!
//! It uses an experimental feature bit and a block of configuration fields after the standard ones.
//! `guest-patches/README.md` is the specification; `device-facts` holds its numbers. Linux supports the feature only
//! with our patches. The device offers it only if configured.
//!
//! ```text
//!   API ─► BalloonHandle ─► Control (mutex) ◄── configuration space ◄── driver
//!                              │ host's fields: settings, flags, report_now_id
//!                              │ driver's fields: generation, settings, report_now_done
//!                              └ gate ─► worker: may this report be discarded?
//! ```
//!
//! Pausing works with every guest. The device requests a guest that follows the policy to stop, and the guest confirms
//! when no report is in flight. For any other guest, reports are completed without being discarded. In both cases the
//! device's gate closes before the pause counts as confirmed, so the state of a paused balloon never depends on the
//! guest.

mod control;
mod fields;
mod status;

pub(super) use control::Control;
pub use control::{ControlState, PauseState, ReportingError};
pub(super) use fields::FieldWrite;
pub use fields::{FollowedState, WordsState};
pub use status::{PolicyStatus, ReportNowStatus, SettingState};
