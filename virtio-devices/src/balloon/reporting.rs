//! The reporting queue: free ranges, each a buffer the device may write to (virtio 1.2 §5.5.6.7).
//!
//! The guest has isolated the pages and waits; nobody uses them until the chain
//! is answered. So they are discarded first and answered afterwards, always.

use super::accounting::GuestFaults;
use super::chain;
use crate::queue::Chain;
use crate::reclaim::GuestRange;
use crate::worker::Turn;

/// Adds the ranges of a chain to `claims`.
///
/// A buffer the device may only read cannot be one of the driver's free pages:
/// to discard it would be to write to it.
pub(super) fn gather(
    chain: Chain<'_>,
    claims: &mut Vec<GuestRange>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    chain::each_descriptor(chain, turn, faults, |descriptor, faults| {
        if descriptor.is_write_only() {
            claims.push(GuestRange {
                start: descriptor.addr().0,
                bytes: u64::from(descriptor.len()),
            });
        } else {
            faults.descriptors_wrong_direction += 1;
        }
    });
}
