//! The reporting policy: telling the guest's driver how to report, and what it answers.
//!
//! Feature bit 56 and a block of configuration fields behind the standard ones;
//! `guest-patches/README.md` is the specification, [`abi`] its constants. Linux
//! knows the bit only with our patches, and it is offered only on request.
//!
//! ```text
//!   API ─► BalloonHandle ─► Control (mutex) ◄── configuration space ◄── driver
//!                              │ host's words: settings, flags, report_now_id
//!                              │ driver's words: generation, settings, report_now_done
//!                              └ gate ─► worker: may this report be discarded?
//! ```
//!
//! Pausing works with every guest. One that follows the policy is asked to stop
//! and says when nothing is in flight any more. Any other is not asked: its
//! reports are answered without being discarded. Either way the gate of the
//! device closes before the pause counts as confirmed, so nothing that is said
//! of a paused balloon rests on the guest's word.

pub mod abi;
mod control;
mod settings;
mod state;

pub(super) use control::Control;
pub use control::PauseState;
pub use control::{ControlError, ControlState, PausePhase, PolicyStatus, ReportNowStatus};
pub use settings::{PolicySetting, PolicySettings, SettingState};
pub(super) use state::WordWrite;
pub use state::{FollowedState, WordsState};
