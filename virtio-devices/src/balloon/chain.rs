//! What the balloon reads from descriptor chains and how it answers them, faults counted.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::accounting::GuestFaults;
use crate::device::WorkerError;
use crate::queue::{Chain, ChainEnd, ServedQueue, walk};
use crate::worker::Turn;

/// Descriptors looked at in one chain: the size of our largest queue, so that
/// only a chain through an indirect table, which is not on offer, can have more.
const CHAIN_DESCRIPTORS_MAX: usize = 256;

/// Puts chains into the used ring with length zero: the balloon never writes
/// into a guest's buffers.
///
/// For a report it would be tempting to answer with the length that was
/// discarded. But a device that writes "length" bytes into a reported page says
/// what they are, and one proposed feature (device-initialised pages) reads the
/// length as a promise of zeros. Without that feature nothing is promised.
pub(super) fn answer(
    queue: &mut ServedQueue,
    mem: &GuestMemoryMmap<()>,
    heads: &[u16],
    faults: &mut GuestFaults,
) -> Result<(), WorkerError> {
    let size = queue.size();
    faults.chains_without_head += heads.iter().filter(|head| **head >= size).count() as u64;
    queue.push_used_together(mem, heads.iter().map(|head| (*head, 0)))
}

/// The descriptors of a chain that are not empty, up to the bound.
pub(super) fn each_descriptor(
    chain: Chain<'_>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
    mut visit: impl FnMut(&Descriptor, &mut GuestFaults),
) {
    let end = walk(chain, CHAIN_DESCRIPTORS_MAX, turn, |descriptor| {
        if descriptor.len() == 0 {
            faults.descriptors_empty += 1;
        } else {
            visit(descriptor, faults);
        }
        true
    });
    match end {
        Some(ChainEnd::Empty) => faults.chains_empty += 1,
        Some(ChainEnd::Broken) => faults.chains_without_end += 1,
        Some(ChainEnd::TooLong) => faults.chains_too_long += 1,
        Some(ChainEnd::Whole) | None => {}
    }
}

/// A little-endian number in RAM.
pub(super) fn read_u32(mem: &GuestMemoryMmap<()>, at: GuestAddress) -> Option<u32> {
    let mut bytes = [0; 4];
    mem.read_slice(&mut bytes, at).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// Copies what the driver has written into a chain, at most `bytes_max` of it.
/// Buffers that are not the driver's to write, or not in RAM, are left out.
pub(super) fn read(
    chain: Chain<'_>,
    mem: &GuestMemoryMmap<()>,
    bytes_max: usize,
    out: &mut Vec<u8>,
    turn: &mut Turn,
    faults: &mut GuestFaults,
) {
    out.clear();
    let mut cut = false;
    each_descriptor(chain, turn, faults, |descriptor, faults| {
        if descriptor.is_write_only() {
            faults.descriptors_wrong_direction += 1;
            return;
        }
        let filled = out.len();
        let wanted = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
        let take = wanted.min(bytes_max - filled);
        cut |= take < wanted;
        out.resize(filled + take, 0);
        if mem
            .read_slice(&mut out[filled..], descriptor.addr())
            .is_err()
        {
            out.truncate(filled);
            faults.descriptors_unreadable += 1;
        }
    });
    if cut {
        faults.chains_too_long += 1;
    }
}
