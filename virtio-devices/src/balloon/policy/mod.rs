//! The reporting policy: telling the guest's driver how to report, and what it answers.
//!
//! Feature bit 56 and a block of configuration fields behind the standard ones;
//! `guest-patches/README.md` is the specification, `device-facts` holds its numbers. Linux
//! knows the bit only with our patches, and it is offered only on request.
//!
//! ```text
//!   API ─► BalloonHandle ─► Control (mutex) ◄── configuration space ◄── driver
//!                              │ host's fields: settings, flags, report_now_id
//!                              │ driver's fields: generation, settings, report_now_done
//!                              └ gate ─► worker: may this report be discarded?
//! ```
//!
//! Pausing works with every guest. One that follows the policy is asked to stop
//! and says when nothing is in flight any more. Any other is not asked: its
//! reports are answered without being discarded. Either way the gate of the
//! device closes before the pause counts as confirmed, so nothing that is said
//! of a paused balloon rests on the guest's word.

mod control;
mod fields;
mod status;

pub(super) use control::Control;
pub use control::{ControlState, PauseState, ReportingError};
pub(super) use fields::FieldWrite;
pub use fields::{FollowedState, WordsState};
pub use status::{PolicyStatus, ReportNowStatus, SettingState};
