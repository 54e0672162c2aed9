//! Walks the descriptors of one chain.

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address as _, Bytes as _, GuestAddress};

use super::dma::{DmaMemory, OwnedDmaMemory};
use crate::worker::Turn;

/// Maximum number of descriptors read in one chain: the size of our largest queue. A chain may not have more
/// descriptors than its queue has entries, whether they are in the queue's own table or in an indirect one (virtio 1.2
/// §2.7.5.3.1).
pub(super) const DESCRIPTORS_MAX: usize = 1024;

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

/// Passes address and length of the device-writable buffers of a chain that was taken earlier to `visit`. Stops where
/// the chain is broken, and after [`DESCRIPTORS_MAX`] descriptors; the one that names an indirect table is not one of
/// them, as in [`walk`].
pub(crate) fn each_writable(
    memory: &DmaMemory<'_>,
    mut table: GuestAddress,
    mut size: u16,
    mut index: u16,
    mut visit: impl FnMut(u64, u64),
) {
    const ENTRY_BYTES: u64 = size_of::<Descriptor>() as u64;
    let mut is_indirect = false;
    let mut seen = 0;
    while seen < DESCRIPTORS_MAX {
        let at = table.checked_add(u64::from(index) * ENTRY_BYTES);
        let Some(at) = at.filter(|_| index < size) else {
            return;
        };
        let Ok(descriptor) = memory.read_obj::<Descriptor>(at) else {
            return;
        };
        let has = |flag: u32| u32::from(descriptor.flags()) & flag != 0;
        if has(VRING_DESC_F_INDIRECT) {
            let entries = u64::from(descriptor.len()) / ENTRY_BYTES;
            if std::mem::replace(&mut is_indirect, true) {
                return;
            }
            table = descriptor.addr();
            size = u16::try_from(entries).unwrap_or(u16::MAX);
            index = 0;
            continue;
        }
        seen += 1;
        if has(VRING_DESC_F_WRITE) {
            visit(descriptor.addr().0, u64::from(descriptor.len()));
        }
        if !has(VRING_DESC_F_NEXT) {
            return;
        }
        index = descriptor.next();
    }
}
