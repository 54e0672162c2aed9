//! Giving guest memory back to the host, and measuring how much of it is back.
//!
//! [`DiscardEngine`] is the only code of the VMM that discards guest memory. It
//! takes ranges a guest *claims* are free and treats each as a claim:
//!
//! ```text
//!   claims ──► plan (ranges.rs, pure) ──► pieces ──► system calls (discard.rs, sys.rs) ──► Outcome
//!              sort, unite, clamp to RAM,            one vector call per batch,
//!              split at region borders,              or one call per united piece
//!              cut to whole backing pages
//! ```
//!
//! Every byte asked for is accounted for exactly once: it was discarded, it was
//! skipped for a [`SkipReason`], or the system call on it failed. Nothing else
//! is ever reported, to the guest or to the operator.
//!
//! [`ResidencyProbe`] measures what is resident. It looks at page tables and
//! files, never at what was discarded: a discarded page the guest has touched
//! again is resident, and only measuring tells.

mod backing;
mod discard;
#[cfg(any(test, feature = "test-utils"))]
pub mod guarded_ram;
mod pagemap;
mod ranges;
mod residency;
mod switch;
mod sys;

#[cfg(test)]
mod tests;

pub use backing::smallest_reclaimable_page_bytes;
pub use device_facts::SkipReason;
pub use discard::{DiscardEngine, Extent, Outcome};
pub use ranges::{Expected, GuestRange, SkippedBytes};
pub use residency::{
    RegionResidency, ResidencyError, ResidencyMethod, ResidencyProbe, ResidencySample,
};
pub use switch::{DiscardSwitch, InhibitGuard, InhibitReason};
