//! Discards guest memory, and measures how much of it is resident.
//!
//! [`DiscardEngine`] is the only code of the VMM that discards guest memory. It accepts ranges that a guest *claims*
//! are free, and does not trust these claims:
//!
//! ```text
//!   claims ──► plan (ranges.rs, pure) ──► pieces ──► system calls (discard.rs, sys.rs) ──► Outcome
//!              sort, merge, clamp to RAM,            one vector call per batch,
//!              split at region boundaries,           or one call per merged piece
//!              trim to whole backing pages
//! ```
//!
//! Every requested byte is accounted for exactly once: it was discarded, it was skipped for a [`SkipReason`], or the
//! system call on it failed. Nothing else is reported, either to the guest or to the operator.
//!
//! [`ResidencyProbe`] measures what is resident. It reads page tables and files, and does not rely on the record of
//! discards. If the guest touches a discarded page again, the page is resident, and only a measurement shows that.

#[cfg(any(test, feature = "test-utils"))]
pub mod any_claims;
mod backing;
mod discard;
#[cfg(any(test, feature = "test-utils"))]
pub mod guarded_ram;
mod huge;
mod overlay;
mod pagemap;
mod ranges;
mod residency;
mod switch;
mod sys;

#[cfg(test)]
mod tests;

pub use backing::{Expected, smallest_reclaimable_page_bytes};
pub use device_facts::SkipReason;
pub use discard::{DiscardEngine, Extent, Outcome};
pub use overlay::{Hidden, Overlay};
pub use pagemap::Pagemap;
pub use ranges::{GuestRange, SkippedBytes};
pub use residency::{
    RegionResidency, ResidencyError, ResidencyMethod, ResidencyProbe, ResidencySample,
};
pub use switch::{DiscardSwitch, InhibitGuard, InhibitReason};
