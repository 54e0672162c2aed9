//! Walks the descriptors of one chain.

use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;

use super::dma::OwnedDmaMemory;
use crate::worker::Turn;

/// A chain in the descriptor table, not yet read.
pub(crate) type Chain<'m> = DescriptorChain<OwnedDmaMemory<'m>>;

/// How a chain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChainEnd {
    /// At a descriptor without a NEXT flag.
    Whole,
    /// Before the first descriptor: the head is outside of the table, or the table is outside of RAM.
    Empty,
    /// By a loop, a descriptor outside of its table, or a length beyond 4 GiB.
    Broken,
    /// At the caller's limit. An indirect table may have 65 535 descriptors.
    TooLong,
}

/// Passes up to `descriptors_max` descriptors to `visit`, until it returns false, and charges them to the turn. `None`:
/// `visit` stopped the walk.
pub(crate) fn walk(
    chain: Chain<'_>,
    descriptors_max: usize,
    turn: &mut Turn,
    mut visit: impl FnMut(&Descriptor) -> bool,
) -> Option<ChainEnd> {
    let mut seen = 0;
    let mut end = Some(ChainEnd::Empty);
    for descriptor in chain {
        if seen == descriptors_max {
            end = Some(ChainEnd::TooLong);
            break;
        }
        seen += 1;
        if !visit(&descriptor) {
            end = None;
            break;
        }
        // The iterator stops silently at a descriptor that it cannot follow.
        end = Some(if descriptor.has_next() {
            ChainEnd::Broken
        } else {
            ChainEnd::Whole
        });
    }
    turn.charge_descriptors(seen as u64);
    end
}
